"""End-to-end latency of greedy generation, variants alternating in one run.

Protocol: fixed random prompt, static cache, batch 1, greedy, no stop at EOS. Each variant is
warmed up by two whole generations, whose time is reported apart as compilation; then rounds run
every variant once, in an order that rotates, so that a slow moment of the machine hits all alike.
Nothing changes the model meanwhile, so Dynamo need not guard its modules (docs/speed.md).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import StaticCache

import fp4graph
from fp4graph import OptionError, Report, TracedModel, report_of
from fp4graph.attention import attending
from fp4graph.models import check_length
from fp4graph.private import counters
from fp4graph.study.compiled import compiled
from fp4graph.study.footprint import Footprint, footprint
from fp4graph.study.progress import SILENT
from fp4graph.study.statistics import bootstrap
from fp4graph.study.trial import DENSE, OfTrial

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

    from fp4graph.models import LoadedModel
    from fp4graph.study.progress import Progress
    from fp4graph.study.trial import Direction, Trial

_WARM_UPS = 2


@dataclass(frozen=True)
class Variant:
    """One way to run the model.

    Attributes:
        trial: what is in FP4, and how; the dense model is the inner compiler alone.
        inner: `inductor` or `eager`.
        mode: of torch.compile, for Inductor; `reduce-overhead` for CUDA graphs.
        attention: transformers' `attn_implementation`, `fp4graph` among them (`set_attention`);
            None leaves the model's.
    """

    trial: Trial
    inner: str
    mode: str = "default"
    attention: str | None = None


def mode_for(device: str, inner: str) -> str:
    """Return the mode of torch.compile that serves generation best on a device."""
    return "reduce-overhead" if device == "cuda" and inner == "inductor" else "default"


@dataclass(frozen=True)
class Ratio:
    """How many times faster than the dense variant: median of paired ratios, 95 % interval."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class LatencyRow(OfTrial):
    """What was measured of a variant; the fields are the keys of the JSON lines.

    Attributes:
        selector: of its trial, and so are `format`, `quantizer`, `activations`, `direction` and
            `name`.
        inner: see `Variant`, and so are `mode` and `attention`.
        ttft_s: time to first token, median over rounds, seconds.
        prefill_tokens_per_s: prompt tokens over `ttft_s`.
        decode_tokens_per_s: tokens after the first over their time, median over rounds.
        per_token_ms: p50, p90, p99 over all decoded tokens of all rounds.
        compile_s: time of the warm-up generations, compilation included.
        weight_bytes: bytes of the linear weights that a token reads, FP4 ones as packed.
        resident_rss: resident memory between generations, bytes, in a process that does nothing
            else; None where the model cannot be loaded again, by its name.
        peak_rss: the highest of that process since it began, loading and compiling included.
        gb_per_s: weight_bytes times decode_tokens_per_s, in 10^9.
        recompiles: graphs compiled after the warm-up; 0 unless something is wrong.
        graph_breaks: breaks that Dynamo counted while it compiled this variant.
        ratio: of `prefill` and `decode` against the dense variant, None for itself.
        device: of the model, `cpu` or `cuda`.
        rounds: how many times each variant generated.
    """

    selector: str
    format: str | None
    inner: str
    ttft_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    per_token_ms: dict[str, float]
    compile_s: float
    weight_bytes: int
    resident_rss: int | None
    peak_rss: int | None
    gb_per_s: float
    recompiles: int
    graph_breaks: int
    ratio: dict[str, Ratio] | None
    quantizer: str
    mode: str
    attention: str
    device: str
    activations: str
    rounds: int
    name: str = ""
    direction: Direction = "only"


class Runner:
    """A compiled variant with its measurements; it generates from `prompt`, int64 [1, length]."""

    def __init__(
        self, model: nn.Module, variant: Variant, prompt_tokens: int, new_tokens: int
    ) -> None:
        self.variant = variant
        self.report = Report()
        policy, packed = variant.trial.policy, variant.trial.packed
        if packed is not None:
            model, policy = packed.model, DENSE.policy
        self.prompt = prompt = _prompt(model, prompt_tokens)
        self._new_tokens = new_tokens
        backend = fp4graph.backend(policy, inner=variant.inner, model=model, report=self.report)
        self._call = compiled(model, backend, dynamic=False, **_options(variant.mode))
        self.model = model
        self._cache = StaticCache(config=model.config, max_cache_len=prompt.shape[1] + new_tokens)
        with torch.no_grad():  # allocates the cache; a CUDA graph takes none that a graph allocated
            model(input_ids=prompt[:, :1], past_key_values=self._cache, use_cache=True)
        self.first_s: list[float] = []
        self.decode_s: list[list[float]] = []
        self.tokens: list[int] = []
        start, breaks = time.perf_counter(), sum(counters["graph_break"].values())
        for _ in range(_WARM_UPS):
            self.generate()
        self.compile_s = time.perf_counter() - start
        self.graph_breaks = sum(counters["graph_break"].values()) - breaks
        self.first_s, self.decode_s = [], []
        self._graphs = self.report.graphs

    @property
    def weight_bytes(self) -> int:
        """Bytes of the linear weights that a token reads."""
        packed = self.variant.trial.packed
        return (self.report if packed is None else report_of(packed.model)).bytes_selected

    @property
    def device(self) -> str:
        """Where it runs."""
        return self.prompt.device.type

    @property
    def recompiles(self) -> int:
        """Graphs compiled after the warm-up."""
        return self.report.graphs - self._graphs

    @property
    def attention(self) -> str:
        """The attention's implementation, as transformers calls it."""
        return self.variant.attention or str(self.model.config._attn_implementation)  # type: ignore[union-attr]

    @torch.no_grad()
    def generate(self) -> None:
        """Generate once and note the times."""
        self._cache.reset()
        with attending(self.model, self.variant.attention):
            start = time.perf_counter()
            token = self.next(self.prompt)
            first = time.perf_counter()
            times, tokens = [first], [int(token)]
            for _ in range(self._new_tokens - 1):
                token = self.next(token)
                times.append(time.perf_counter())
                tokens.append(int(token))
        self.first_s.append(first - start)
        self.decode_s.append(np.diff(times).tolist())
        self.tokens = tokens

    def next(self, ids: Tensor) -> Tensor:
        """Return the token [1, 1] that follows `ids` and what the cache holds."""
        out = self._call(
            input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )
        token: Tensor = out.logits[:, -1:].max(-1).indices  # argmax is four times as slow here
        token.sum().item()  # waits for an accelerator
        return token


def _options(mode: str) -> dict[str, Any]:
    """Return what `torch.compile` is asked for; it takes options for the default mode alone."""
    if mode != "default":
        return {"mode": mode}
    return {"options": {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}}


def _prompt(model: nn.Module, length: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(0)
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    prompt = torch.randint(vocabulary, (1, length), generator=generator, device="cpu")
    return prompt.to(next(model.parameters()).device)


def measure(
    loaded: LoadedModel,
    variants: Sequence[Variant],
    *,
    prompt_tokens: int,
    new_tokens: int,
    rounds: int,
    memory: bool = True,
    progress: Progress = SILENT,
) -> list[LatencyRow]:
    """Measure variants against the first, which should be the dense one.

    Args:
        loaded: a causal language model of transformers; where it can be loaded again, memory is
            measured too.
        variants: what to measure.
        prompt_tokens: length of the prompt.
        new_tokens: tokens to generate, at least 2.
        rounds: how many times each variant generates, at least 1.
        memory: whether to measure that, in a process for each variant.
        progress: is told about each generation.

    Raises:
        OptionError: a number too small; an attention that transformers does not have.
        ModelError: prompt and new tokens are more than the model has positions.
        SelectorError: a selector matches nothing; said before anything is compiled.
        StudyError: a variant did not run as selected.
    """
    if prompt_tokens < 1 or new_tokens < 2 or rounds < 1:
        raise OptionError("latency needs at least 1 prompt token, 2 new tokens and 1 round")
    model = loaded.model
    check_length(model, prompt_tokens + new_tokens)
    _check_selectors(model, variants, _prompt(model, 1))
    for variant in variants:
        with attending((variant.trial.packed or loaded).model, variant.attention):
            pass  # which says beforehand what the model does not have
    alone = memory and loaded.again is not None
    progress.start(len(variants) * (1 + rounds + alone), "generations")
    footprints: list[Footprint | str | None] = []
    for variant in variants if alone else ():
        footprints.append(_footprint(loaded, variant, prompt_tokens, new_tokens))
        if isinstance(footprints[-1], str):
            progress.note(f"{_named(variant)}: its memory is not known, {footprints[-1]}")
        progress.advance(f"memory of {_named(variant)}, in a process of its own")
    runners = []
    for variant in variants:
        runners.append(Runner(model, variant, prompt_tokens, new_tokens))
        progress.advance(f"compiled {_named(variant)}")
    for index in range(rounds):
        shift = index % len(runners)
        for runner in runners[shift:] + runners[:shift]:
            runner.generate()
            progress.advance(f"round {index + 1}: {_named(runner.variant)}")
    found = footprints or [None] * len(runners)
    pairs = zip(runners, found, strict=True)
    return [_row(runner, runners[0], prompt_tokens, memory) for runner, memory in pairs]


def _footprint(
    loaded: LoadedModel, variant: Variant, prompt_tokens: int, new_tokens: int
) -> Footprint | str:
    lean = replace(variant, trial=replace(variant.trial, packed=None))  # not to be sent along
    is_packed = variant.trial.packed is not None
    make = partial(_generator, lean, is_packed, prompt_tokens, new_tokens)
    return footprint((variant.trial.packed or loaded).again, make)


def _generator(
    variant: Variant,
    is_packed: bool,
    prompt_tokens: int,
    new_tokens: int,
    loaded: LoadedModel,
) -> Callable[[], None]:
    if is_packed:
        variant = replace(variant, trial=replace(variant.trial, packed=loaded))
    return Runner(loaded.model, variant, prompt_tokens, new_tokens).generate


def _named(variant: Variant) -> str:
    return variant.trial.name or variant.trial.select.text


def _check_selectors(model: nn.Module, variants: Sequence[Variant], prompt: Tensor) -> None:
    traced = TracedModel(model)
    with torch.no_grad():
        traced(input_ids=prompt[:, :1], use_cache=False)
    for variant in variants:
        if variant.trial != DENSE and variant.trial.packed is None:
            traced.plan(variant.trial.policy)


def _row(
    runner: Runner, dense: Runner, prompt_tokens: int, memory: Footprint | str | None
) -> LatencyRow:
    known = memory if isinstance(memory, Footprint) else None
    variant, trial = runner.variant, runner.variant.trial
    ttft = float(np.median(runner.first_s))
    decode = np.array(runner.decode_s)
    rate = float(np.median(decode.shape[1] / decode.sum(axis=1)))
    p50, p90, p99 = (float(p) * 1e3 for p in np.percentile(decode, [50, 90, 99]))
    weight_bytes = runner.weight_bytes
    ratio = {
        "prefill": paired_ratio(dense.first_s, runner.first_s),
        "decode": paired_ratio(np.ravel(dense.decode_s), np.ravel(decode)),
    }
    return LatencyRow(
        selector=trial.facts["selector"],
        format=trial.facts["format"],
        inner=variant.inner,
        ttft_s=ttft,
        prefill_tokens_per_s=prompt_tokens / ttft,
        decode_tokens_per_s=rate,
        per_token_ms={"p50": p50, "p90": p90, "p99": p99},
        compile_s=runner.compile_s,
        weight_bytes=weight_bytes,
        resident_rss=None if known is None else known.resident,
        peak_rss=None if known is None else known.peak,
        gb_per_s=weight_bytes * rate / 1e9,
        recompiles=runner.recompiles,
        graph_breaks=runner.graph_breaks,
        ratio=None if runner is dense else ratio,
        quantizer=trial.facts["quantizer"],
        mode=variant.mode,
        attention=runner.attention,
        device=runner.device,
        activations=trial.facts["activations"],
        rounds=len(runner.first_s),
        name=trial.name,
    )


def paired_ratio(dense: Any, candidate: Any) -> Ratio:
    """Return how many times faster `candidate` is, from times taken in pairs.

    The interval is the 2.5 % to 97.5 % range of the median over bootstrap resamples of the pairs.
    """
    ratios = np.asarray(dense) / np.asarray(candidate)
    interval = bootstrap(len(ratios), lambda drawn: np.median(ratios[drawn], axis=1))
    return Ratio(float(np.median(ratios)), *interval)
