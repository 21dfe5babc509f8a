"""Models of several stacks of blocks: what a selector without a prefix means, and with one."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import fp4graph
from fp4graph.errors import SelectorError
from fp4graph.graph.names import named_linears
from fp4graph.linears.selector import Selector
from fp4graph.linears.stacks import Stacks, stack_of

D = 32


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.o_proj = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.o_proj(self.q_proj(x).relu())


class Tower(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attention() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class TwoTowers(nn.Module):
    """Four blocks that see, two that speak, a projector between them and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.visual, self.language_model = Tower(4), Tower(2)
        self.visual.merger = nn.Linear(D, D)
        self.lm_head = nn.Linear(D, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(self.language_model(self.visual.merger(self.visual(x))))


def picked(select: str) -> set[str]:
    report = fp4graph.explain(TwoTowers(), torch.ones(3, D), select=select)
    return {row.path for row in report.selected}


@pytest.mark.parametrize(
    "select, paths",
    [
        ("q", {f"language_model.blocks.{i}.q_proj" for i in range(2)}),
        ("vision:q", {f"visual.blocks.{i}.q_proj" for i in range(4)}),
        ("text:q,blocks=-1", {"language_model.blocks.1.q_proj"}),
        ("vision:q,blocks=-1", {"visual.blocks.3.q_proj"}),
        ("all:q,blocks=-1", {"visual.blocks.3.q_proj", "language_model.blocks.1.q_proj"}),
        ("blocks=0", {f"language_model.blocks.0.{x}_proj" for x in "qo"}),
        ("vision:all,!all:o,blocks>2", {"visual.blocks.3.q_proj"}),
        ("lm_head", {"lm_head"}),
        ("vision:other", {"visual.merger"}),
        ("path:visual.*.q_proj,blocks=1", {"visual.blocks.1.q_proj"}),
    ],
)
def test_a_prefix_names_the_stack(select: str, paths: set[str]) -> None:
    assert picked(select) == paths


def test_errors_name_the_stacks() -> None:
    stacks = (
        r"stacks text: \(lm_head, o, q; blocks 0\.\.1\), vision: \(o, other, q; blocks 0\.\.3\)"
    )
    with pytest.raises(SelectorError, match=f"select nothing: this model has {stacks}"):
        Selector("q,blocks>2").check(tags(TwoTowers()))
    with pytest.raises(SelectorError, match=f"`audio:q` matches nothing: this model has {stacks}"):
        Selector("audio:q").check(tags(TwoTowers()))
    with pytest.raises(SelectorError, match=r"unknown prefix 'visoin' \(did you mean 'vision'\?\)"):
        Selector("visoin:q")


def tags(model: nn.Module) -> list[fp4graph.linears.tags.LinearTag]:
    return [each.tag for each in named_linears(model)]


def test_prefixed_names_have_one_canonical_text() -> None:
    assert str(Selector("vision:v , all : q,expert:down,v")) == "all:q,v,vision:v,expert:down"


@pytest.mark.parametrize(
    "path, stack",
    [
        ("model.layers.0.mlp.up_proj", "text"),
        ("model.language_model.layers.0.mlp.up_proj", "text"),
        ("model.visual.blocks.0.attn.qkv", "vision"),
        ("vision_tower.vision_model.encoder.layers.0.mlp.fc1", "vision"),
        ("vit.encoder.layer.0.attention.attention.query", "vision"),
        ("text_model.encoder.layers.0.mlp.fc1", "text"),
        ("audio_tower.layers.0.fc1", "audio"),
        ("encoder.block.0.layer.0.SelfAttention.q", "encoder"),
        ("text_encoder.encoder.block.0.layer.0.SelfAttention.q", "encoder"),
        ("model.decoder.layers.0.fc1", "decoder"),
        ("lm_head", "text"),
    ],
)
def test_stacks_by_path(path: str, stack: str) -> None:
    assert stack_of(path) == stack


def test_the_decoder_of_a_sequence_to_sequence_model_is_its_language_model() -> None:
    config = hf.T5Config(
        d_model=D, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=3, num_heads=4, vocab_size=64,
        decoder_start_token_id=0, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    found = tags(hf.T5ForConditionalGeneration(config))
    assert Stacks.of(found) == Stacks({"encoder": 2, "decoder": 3})
    assert Stacks.of(found).main == "decoder"
    assert {tag.num_blocks for tag in found if tag.main} == {3}


@pytest.mark.parametrize(
    "blocks, main",
    [
        ({"vision": 4, "text": 2}, "text"),
        ({"encoder": 4, "decoder": 2}, "decoder"),
        ({"vision": 4, "encoder": 2}, "encoder"),
        ({"vision": 4}, "vision"),
        ({}, None),
    ],
)
def test_which_stack_is_the_main_one(blocks: dict[str, int], main: str | None) -> None:
    assert Stacks(blocks).main == main


def test_a_fragment_that_holds_another_stack_is_refused_without_the_model() -> None:
    model = TwoTowers()
    model.language_model.register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
    with torch.no_grad():
        with pytest.raises(SelectorError, match="which stack is the main one is in doubt: pass"):
            torch.compile(model, backend=fp4graph.backend("q", inner="eager"))(torch.ones(3, D))
        torch._dynamo.reset()
        backend = fp4graph.backend("q", inner="eager", model=model)
        torch.compile(model, backend=backend)(torch.ones(3, D))
    assert {row.stack for row in backend.report.selected} == {"text"}
    assert "vision:q" in str(backend.report)
