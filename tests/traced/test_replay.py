"""Trials that begin at a block give what the whole model gives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers as hf
from support.models import CONFIGS, FAMILIES, tiny, tokens

from fp4graph import Policy, Replay, Scheme, StreamedReplay, TracedModel
from fp4graph.graph.site import sites
from fp4graph.traced.cuts import cuts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path


INPUTS = [{"input_ids": tokens(seed=seed), "use_cache": False} for seed in (0, 1)]


def replay(
    model: torch.nn.Module, folder: Path | None = None, inputs: Sequence[Any] = INPUTS
) -> tuple[TracedModel, Replay]:
    traced = TracedModel(model.requires_grad_(False))
    with torch.no_grad():
        traced(**INPUTS[0])
    if folder is None:
        return traced, Replay(traced, lambda out: out.logits, inputs)
    return traced, StreamedReplay(traced, lambda out: out.logits, inputs, folder, lambda *_: None)


def replayed(
    traced: TracedModel,
    part: Replay,
    policy: Policy,
    base: Policy | None = None,
) -> list[torch.Tensor]:
    """Run two inputs in part, and check logits and report against the whole model's."""
    report = part.select(policy, base)
    found = [part.run(index) for index in (1, 0)][::-1]
    assert report.rows == traced.select(policy).rows
    with torch.no_grad():
        expected = [traced(**each).logits for each in INPUTS]
    assert all(map(torch.equal, found, expected))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_whole_model(family: str) -> None:
    check_against_the_whole_model(family, None)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "mixtral"])
def test_streamed_equals_the_whole_model(family: str, tmp_path: Path) -> None:
    check_against_the_whole_model(family, tmp_path)


def check_against_the_whole_model(family: str, folder: Path | None) -> None:
    traced, part = replay(tiny(family), folder)
    assert part.refusal is None
    dense = [part.dense(index) for index in (0, 1)]
    with torch.no_grad():
        assert all(map(torch.equal, dense, [traced(**each).logits for each in INPUTS]))
    block_0, block_1 = (f"all,blocks={block}" for block in (0, 1))
    for mode in ("none", "same"):
        scheme = Scheme.of(activations=mode)
        for select in (block_1, block_0, "lm_head", "all", f"all,!({block_0})"):
            found = replayed(traced, part, Policy.of(select, scheme))
            assert not any(map(torch.equal, found, dense))
        base = Policy.of("all", scheme)
        everything = replayed(traced, part, base, base)
        for kept in ("blocks=0", "blocks=1", "o,blocks=1", "q,blocks=0", "o", "lm_head"):
            policy = Policy.of({"all": {}, kept: None}, scheme)
            found = replayed(traced, part, policy, base)
            assert all(map(torch.equal, found, everything)) == (kept == "lm_head")


def test_rewrites_no_more_than_it_must() -> None:
    _, part = replay(tiny("llama"))
    part.dense(0)
    linears = []
    for select in ("q,blocks=0", "down,blocks=0", "q", "q,blocks=1", "lm_head"):
        part.select(Policy.of(select, Scheme.of()))
        assert part._chosen is not None
        linears.append(len(list(sites(part._graph(*part._chosen).tagged))))
    assert linears == [7, 7, 15, 8, 8]


def test_all_but_a_few_runs_what_comes_first_once() -> None:
    _, part = replay(tiny("llama"))
    part.dense(0)
    scheme = Scheme.of()
    ran: list[int] = []

    def counted(number: int, run: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: (ran.append(number), run(*args))[1]

    pieces = part._rewrite_pieces(Policy.of("all", scheme))  # inputs, block 0, block 1 and head
    pieces.runs = [counted(*each) for each in enumerate(pieces.runs)]
    part._pieces = pieces
    found = []
    for kept in ("q,blocks=0", "q,blocks=1", "down,blocks=1", "blocks=0"):
        part.select(Policy.of("q", scheme))  # budgets mix directions
        part.run(0)
        part.select(Policy.of({"all": {}, kept: None}, scheme), pieces.policy)
        part.run(0)
        found.append(list(ran))
        ran.clear()
    assert found == [[0, 2], [1], [], [0, 2]]


def test_a_linear_before_the_first_block() -> None:
    config = CONFIGS["opt"]()
    config.word_embed_proj_dim = 32
    traced, part = replay(hf.OPTForCausalLM(config).eval())
    part.dense(0)
    policy = Policy.of("path:*project_in", Scheme.of())
    report = part.select(policy)
    assert [row.path for row in report.selected] == ["model.decoder.project_in"]
    found = part.run(0)
    traced.select(policy)
    with torch.no_grad():
        assert torch.equal(found, traced(input_ids=tokens(), use_cache=False).logits)


def test_keeps_the_least_between_two_blocks() -> None:
    traced, _ = replay(tiny("llama"))
    found = cuts(traced.graphs[0].tagged)
    assert not isinstance(found, str)
    assert len(found) == 2
    shapes = [tuple(node.meta["example_value"].shape) for node in found[1].live]
    assert sorted(shapes).count((1, 8, 64)) == 1, "the residual stream, once"
    assert found[1].bytes < 2.5 * 8 * 64 * 4


@pytest.mark.slow
def test_experts_write_in_place_only_within_their_block() -> None:
    traced, part = replay(tiny("mixtral"))
    assert part.refusal is None
    part.dense(0)
    policy = Policy.of("expert,blocks=1", Scheme.of())
    part.select(policy)
    found = part.run(0)
    traced.select(policy)
    with torch.no_grad():
        assert torch.equal(found, traced(input_ids=tokens(), use_cache=False).logits)


def test_says_why_not() -> None:
    model = tiny("llama")
    model.model.layers[1].register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
    _, part = replay(model)
    assert part.refusal is not None
    assert "graphs of it" in part.refusal
    assert part.dense(0).shape == (1, 8, 96)
    torch._dynamo.reset()
    _, part = replay(tiny("llama"), inputs=range(10**12))
    assert part.refusal is not None
    assert "GB" in part.refusal
