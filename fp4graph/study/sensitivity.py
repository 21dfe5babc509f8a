"""What FP4 in each linear will cost, told from one run of the model instead of one run a linear.

ΔY is what FP4 changes in a linear's output, J the derivative of the model's logits by it. The KL
divergence of the changed model from the dense one is ½ (J ΔY)ᵀ F (J ΔY) up to third order, with
F = diag(p) - p pᵀ at each position. For r normal and v = √p ∘ r - p (√p · r), F is E[v vᵀ]. So
one backward pass from v gives Jᵀ v for every linear. On average ½ (v · J ΔY)² is the divergence.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from dataclasses import dataclass, field, replace
from statistics import fmean, variance
from typing import TYPE_CHECKING, Any

import torch
from scipy.special import digamma, polygamma
from torch import Tensor

from fp4graph import (
    Activations,
    OptionError,
    Scheme,
    StudyError,
    TracedModel,
    quantize,
)
from fp4graph.models import check_length
from fp4graph.study.taps import steps_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from fp4graph import PackedWeight
    from fp4graph.linears.tags import LinearTag
    from fp4graph.models import LoadedModel
    from fp4graph.study.evaluate import Windows
    from fp4graph.traced.tap import Seen, Step

_ON_CPU: Any = {"dtype": torch.float32, "device": "cpu"}  # whatever torch's defaults are
PREDICTORS = (
    *("weight_error", "output_error", "fisher"),
    *("kl_element", "kl_token", "kl_window", "kl"),
)
"""Fields of `SensitivityRow` that say how much a linear's FP4 will cost."""


@dataclass(frozen=True)
class SensitivityRow:
    """One linear in one format; the fields are the keys of the JSON lines.

    Attributes:
        path: module path.
        role: role by its selector name.
        block: block index.
        format: of its weight.
        activations: `none` or `same`.
        quantizer: how the codes are found.
        parameters: values in the weight.
        weight_error: squared error of the weight over its square.
        output_error: squared error of the output over its square, on the text.
        sqnr: the same in dB, of signal over noise.
        fisher: (∂L/∂Y)² (ΔY)², added up over a text's outputs, a token; L is the text's NLL. It is
            the score of ModelOpt's auto_quantize.
        kl_element: ½ (Jᵀv)² (ΔY)², output by output.
        kl_token: ½ (Jᵀv · ΔY)² with the product taken over a token's outputs.
        kl_window: with the product taken over a window's, which is the divergence itself to
            second order, but for the noise of a few samples.
        kl: the recommended estimate, nats a token. `kl_window`, shrunk towards the role's mean
            ratio to sqrt(kl_element * kl_token), in proportion to its sampling noise.
        kl_se: standard error of `kl` by that noise.
        dnll: first-order change of the NLL, ∂L/∂Y · ΔY, and `kl`, nats a token.
    """

    path: str
    role: str
    block: int | None
    format: str
    activations: Activations
    quantizer: str
    parameters: int
    weight_error: float
    output_error: float
    sqnr: float
    fisher: float
    kl_element: float
    kl_token: float
    kl_window: float
    kl: float
    kl_se: float
    dnll: float


@dataclass
class _Sums:
    """What is added up over windows for a linear and a scheme."""

    error: float = 0.0
    power: float = 0.0
    fisher: float = 0.0
    first: float = 0.0
    element: float = 0.0
    token: float = 0.0
    products: list[float] = field(default_factory=list)  # v · J ΔY, a window and a sample each


def schemes_of(
    formats: Sequence[str], activations: Sequence[str], quantizer: str
) -> tuple[Scheme, ...]:
    """Return what linears are scored for.

    Raises:
        OptionError: a value that does not exist, or that is not scored.
    """
    found = [
        Scheme.read(format, quantizer, mode, "auto") for format in formats for mode in activations
    ]
    for scheme in found:
        _check_scored(scheme)
    return tuple(found)


def _check_scored(scheme: Scheme) -> None:
    how = scheme.quantizer
    if how.needs_data or how.rotation or scheme.calibration is not None:
        raise OptionError(
            f"quantizer {str(how)!r} is not scored, only those that need no data and do not "
            "rotate: `fp4graph ablate` measures it"
        )
    if scheme.has_int8:
        mode = str(scheme.activations)
        raise OptionError(f"activations {mode!r} are not scored: `fp4graph ablate` measures 'int8'")


class Sensitivity:
    """Scores of a model's block linears on a text.

    Args:
        loaded: the model; its gradients are taken, its weights stay as they are.
        windows: the text.
        schemes: formats, quantizers and activation modes.
        samples: backward passes a window from random v; what a window gives is one value each.
        progress: called once after each window.

    Attributes:
        tags: the model's linears.
        rows: one a linear and scheme, scheme by scheme.
        left_out: paths of block linears that have no row: their weight is made in the graph, or the
            logits do not depend on them.
        products: for each format and activation mode, and each linear's path, v · J ΔY for all
            samples, float64 [windows * samples]. What a set of linears will cost is ½ the mean
            square of their sum over the tokens of a window.
        forwards: the time of it all, in runs of the dense model over the same text.
        traced: the model, traced.

    Raises:
        OptionError: a scheme whose codes need a calibration or a rotation.
        ModelError: a window is longer than the model's positions.
        StudyError: the model's weights are random, or its logits NaN; it hides its linears inside
            higher-order ops.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        windows: Windows,
        schemes: Sequence[Scheme],
        samples: int = 2,
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        if loaded.is_random:
            raise StudyError(f"{loaded.name} has random weights: its accuracy means nothing")
        for scheme in schemes:
            _check_scored(scheme)
        check_length(loaded.model, windows.ids.shape[1])
        self._windows = windows
        self._samples = samples
        ids_WT = windows.ids.to(loaded.device)
        self.traced = traced = TracedModel(loaded.model)
        with torch.enable_grad():
            traced.settle(input_ids=ids_WT[:1], use_cache=False)
        self.tags = traced.tags
        self._packed: dict[tuple[Scheme, LinearTag], PackedWeight] = {}
        self._weight_errors: dict[tuple[Scheme, LinearTag], float] = {}
        self._sums: dict[tuple[Scheme, LinearTag], _Sums] = defaultdict(_Sums)
        self._generator = torch.Generator("cpu").manual_seed(0)
        dense = _seconds(loaded, ids_WT)
        start = time.perf_counter()
        inputs = [{"input_ids": ids, "use_cache": False} for ids in ids_WT.split(1)]
        for step in steps_of(loaded, traced, inputs, progress, self._losses):
            self._take(step, schemes)
        self.forwards = (time.perf_counter() - start) / dense
        scored = [
            key for tag in self.tags for each in schemes if (key := (each, tag)) in self._sums
        ]
        self.rows = _pooled([self._row(*key) for key in scored], samples * len(windows.ids))
        known = {tag for _, tag in self._sums}
        self.left_out = [t.fqn for t in self.tags if t.is_block_linear and t not in known]
        self.products: dict[tuple[str, str], dict[str, Tensor]] = defaultdict(dict)
        for (scheme, tag), sums in self._sums.items():
            products = _tensor(sums.products)
            self.products[scheme.format.name, scheme.activations][tag.fqn] = products

    def _losses(self, index: int, logits: Tensor) -> Iterator[Tensor]:
        """Yield a window's NLL, and its logits times v for each sample."""
        first = self._windows.first
        ids = self._windows.ids[index, first:, None].to(logits.device)
        with torch.enable_grad():
            logits_TV = logits[0, first - 1 : -1].float()
            if bool(logits_TV.isnan().any()):
                raise StudyError("its logits hold NaN, so there is nothing to score")
            logp_TV = logits_TV.log_softmax(-1)
            nll = -logp_TV.gather(1, ids).sum()
        yield nll
        root_TV = (logp_TV.detach() / 2).exp()
        for _ in range(self._samples):
            r_TV = torch.randn(root_TV.shape, generator=self._generator, **_ON_CPU)
            r_TV = r_TV.to(root_TV.device) * root_TV
            v_TV = r_TV - root_TV.square() * r_TV.sum(-1, keepdim=True)
            with torch.enable_grad():
                product = (logits_TV.where(root_TV > 0, 0) * v_TV).sum()  # -Inf rules a token out
            yield product

    @torch.no_grad()
    def _take(self, step: Step, schemes: Sequence[Scheme]) -> None:
        if not step.index:
            self._packed.clear()  # of another block, where they come one by one
        by_nll, *by_sample = step.gradients
        for tag, gradient in by_nll.items():
            if tag.is_block_linear:
                samples = [_rows(each[tag]) for each in by_sample]
                self._add(schemes, tag, step.seen[tag], _rows(gradient), samples)

    def _add(
        self,
        schemes: Sequence[Scheme],
        tag: LinearTag,
        calls: Sequence[Seen],
        g_MN: Tensor,
        samples: Sequence[Tensor],
    ) -> None:
        """Take in what each scheme changes in all calls of a linear."""
        w_NK = calls[0].weight.float()
        x_MK = _rows([seen.x for seen in calls]).float()
        y_MN = x_MK @ w_NK.T
        power = _sum(y_MN.square())
        for scheme in schemes:
            key = (scheme, tag)
            if key not in self._packed:
                self._packed[key] = quantize(w_NK, scheme.format, scheme.quantizer)
            rounded_NK = self._packed[key].dequantize()
            if key not in self._weight_errors:
                self._weight_errors[key] = _relative(rounded_NK - w_NK, w_NK)
            if scheme.activations is Activations.NONE:
                change_MN = x_MK @ (rounded_NK - w_NK).T
            else:
                change_MN = scheme.format.fake_quantize(x_MK) @ rounded_NK.T - y_MN
            sums = self._sums[key]
            square_MN = change_MN.square()
            sums.error += _sum(square_MN)
            sums.power += power
            sums.fisher += _sum(g_MN.square() * square_MN)
            sums.first += _sum(g_MN * change_MN)
            for v_MN in samples:
                product_M = (v_MN * change_MN).sum(-1, dtype=torch.float64)
                share = 0.5 / len(samples)
                sums.element += share * _sum(v_MN.square() * square_MN)
                sums.token += share * float(product_M.square().sum())
                sums.products.append(float(product_M.sum()))

    def _row(self, scheme: Scheme, tag: LinearTag) -> SensitivityRow:
        sums = self._sums[scheme, tag]
        tokens = len(self._windows.ids) * self._windows.scored
        error = sums.error / sums.power if sums.power else 0.0
        return SensitivityRow(
            path=tag.fqn,
            role=str(tag.role),
            block=tag.block,
            format=scheme.format.name,
            activations=scheme.activations,
            quantizer=str(scheme.quantizer),
            parameters=tag.parameters,
            weight_error=self._weight_errors[scheme, tag],
            output_error=error,
            sqnr=-10 * math.log10(error) if error else math.inf,
            fisher=sums.fisher / tokens,
            kl_element=sums.element / tokens,
            kl_token=sums.token / tokens,
            kl_window=kl_of(_tensor(sums.products), self._windows),
            kl=math.sqrt(sums.element * sums.token) / tokens,
            kl_se=0.0,
            dnll=sums.first / tokens,
        )


def _pooled(rows: Sequence[SensitivityRow], samples: int) -> list[SensitivityRow]:
    """Return rows whose `kl` is the best of their estimates together.

    `kl_element` and `kl_token` hardly vary from sample to sample, but leave out what tokens have in
    common. `kl_window` has it, and is noisy: a mean of a few squares of normal values. Its ratio to
    their geometric mean is alike within a role. So a linear's own ratio is shrunk towards its
    role's mean, in proportion to the share of noise in the variance (empirical Bayes).
    """
    noise = float(polygamma(1, samples / 2))  # variance of the logarithm of that mean
    low = float(digamma(samples / 2)) - math.log(samples / 2)  # its expectation
    above: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for row in rows:
        if row.kl and row.kl_window:
            above[_group(row)].append(math.log(row.kl_window / row.kl) - low)
    pooled = []
    for row in rows:
        kl, error = row.kl, 0.0
        if row.kl and row.kl_window:
            group = above[_group(row)]
            spread = variance(group) if len(group) > 1 else 0.0
            own = max(spread - noise, 0.0) / spread if spread else 0.0
            mean = fmean(group)
            kl *= math.exp(mean + own * (math.log(row.kl_window / row.kl) - low - mean))
            error = kl * math.sqrt(noise * (own + (1 - own) / len(group)))
        pooled.append(replace(row, kl=kl, kl_se=error, dnll=row.dnll + kl))
    return pooled


def _group(row: SensitivityRow) -> tuple[str, ...]:
    return row.format, row.activations, row.quantizer, row.role


def kl_of(products: Tensor, windows: Windows) -> float:
    """Return the divergence, nats a token, from v · J ΔY over windows: of a set, from their sum."""
    return float(products.double().square().mean() / (2 * windows.scored))


@torch.no_grad()
def _seconds(loaded: LoadedModel, ids_WT: Tensor) -> float:
    """Return how long the dense model takes for all windows; the first run warms up."""
    for _ in range(2):
        start = time.perf_counter()
        logits = loaded.model(input_ids=ids_WT[:1], use_cache=False).logits
        logits[0, -1, -1].item()  # waits for an accelerator
    return (time.perf_counter() - start) * len(ids_WT)


def _tensor(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def _sum(values: Tensor) -> float:
    return float(values.sum(dtype=torch.float64))


def _rows(calls: Sequence[Tensor]) -> Tensor:
    """Return values [..., N] of all calls as one matrix."""
    return torch.cat([each.reshape(-1, each.shape[-1]) for each in calls])


def _relative(change: Tensor, whole: Tensor) -> float:
    power = float(whole.double().square().sum())
    return float(change.double().square().sum()) / power if power else 0.0
