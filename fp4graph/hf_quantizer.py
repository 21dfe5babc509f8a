"""transformers' own door: `from_pretrained(quantization_config=FP4Config(...))`, and from disk.

A tensor of the checkpoint is read, quantised and freed before the next: the dense model never
exists. A folder that `save_pretrained` wrote has the plain layout, and its configuration says how
its linears run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from fp4graph.compiler import policy_of
from fp4graph.conversion import (
    METHOD,
    attach,
    check_refused,
    facts,
    packed_linear,
    plan,
    replace_linear,
    smoothed,
)
from fp4graph.errors import Fp4GraphError, OptionError
from fp4graph.formats import PackedWeight
from fp4graph.memory import give_back_memory, let_go
from fp4graph.packed.linear import FP4Linear
from fp4graph.policy import Policy
from fp4graph.scheme import Scheme

if TYPE_CHECKING:
    from pathlib import Path

    from fp4graph.graph.site import LinearSite
    from fp4graph.passes.pipeline import OnRefusal
    from fp4graph.policy import Select
    from fp4graph.quantizers import Calibration


class Failure:
    """Where a quantizer leaves its error: one for all copies of a configuration."""

    error: Fp4GraphError | None = None

    def __deepcopy__(self, memo: object) -> Failure:
        return self


@register_quantization_config(METHOD)
class FP4Config(QuantizationConfigMixin):
    """What runs in FP4, for transformers' `from_pretrained`.

    Args:
        select: as in `fp4graph.convert`.
        format: as in `fp4graph.convert`.
        quantizer: as in `fp4graph.convert`.
        activations: as in `fp4graph.convert`.
        kernel: as in `fp4graph.convert`.
        on_refusal: as in `fp4graph.convert`.
        calibration: codes found with data, or their file; what is saved has them.
        smoothed: paths of linears whose inputs are divided; only a saved configuration has it.
        kwargs: what transformers adds.

    Attributes:
        failure: why a weight could not be quantised, where transformers says only that one failed.

    Raises:
        OptionError: an option that does not exist.
        SelectorError: a selector that cannot be parsed.
        CalibrationError: see `fp4graph.backend`.
    """

    def __init__(
        self,
        select: Select = "all",
        format: str = "nvfp4",
        quantizer: str = "rtn",
        activations: str | None = None,
        kernel: str = "auto",
        on_refusal: OnRefusal = "raise",
        calibration: Calibration | str | Path | None = None,
        smoothed: tuple[str, ...] = (),
        **kwargs: Any,
    ) -> None:
        self.quant_method = METHOD
        if on_refusal not in ("raise", "keep"):
            raise OptionError(f"on_refusal={on_refusal!r}: expected 'raise' or 'keep'")
        scheme = Scheme.read(format, quantizer, activations, kernel)
        self._policy = Policy.read(select, scheme)
        if calibration is not None or not kwargs.get("saved"):
            self._policy = policy_of(select, format, quantizer, activations, kernel, calibration)
        self.on_refusal = on_refusal
        self.failure = Failure()
        self.smoothed = tuple(smoothed)

    @property
    def policy(self) -> Policy:
        """What runs how."""
        return self._policy

    def to_dict(self) -> dict[str, Any]:
        """Return what `config.json` holds: the policy as a mapping, each entry whole."""
        return facts(self._policy, self.on_refusal, self.smoothed)

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the same: nothing is left out."""
        return self.to_dict()


def packed_policy(config: Any) -> Policy | None:
    """Return what a model's configuration says of its packed linears; None if they are not."""
    found = getattr(config, "quantization_config", None) or {}
    found = found if isinstance(found, dict) else found.to_dict()
    if found.get("quant_method") != METHOD:
        return None
    made: FP4Config = FP4Config.from_dict(found)
    return made.policy


@register_quantizer(METHOD)
class FP4Quantizer(HfQuantizer):
    """Quantises a model's selected linears as transformers loads them, or loads packed ones."""

    requires_calibration = False
    quantization_config: FP4Config

    def __init__(self, quantization_config: FP4Config, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._sites: dict[str, LinearSite] = {}

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        config = self.quantization_config
        found, self._report = plan(model, config.policy)
        kept = check_refused(model, found, self._report, config.on_refusal)
        self._sites = {site.tag.fqn: site for site in kept}
        if self.pre_quantized:
            for site in kept:
                replace_linear(model, site.tag.fqn, self._hull(model, site))

    def _hull(self, model: nn.Module, site: LinearSite) -> FP4Linear:
        """Return a linear on the meta device, whose values are yet to come."""
        assert site.scheme is not None
        module = model.get_submodule(site.tag.fqn)
        N, K = site.tag.shape
        N = N if site.rows is None else len(site.rows)
        format = site.scheme.format
        groups = -(-K // format.block_size)
        meta = torch.device("meta")
        packed = PackedWeight(
            torch.empty(N, groups * format.block_size // 2, dtype=torch.uint8, device=meta),
            torch.empty(N, groups, dtype=format.scale_codec.dtype, device=meta),
            torch.empty((), dtype=torch.float32, device=meta)
            if format.has_per_tensor_scale
            else None,
            (N, K),
            format,
        )
        smooth, rest, dtype = None, None, module.weight.dtype
        if site.tag.fqn in self.quantization_config.smoothed:
            smooth = torch.empty(K, dtype=torch.float32, device=meta)
        bias: Any = getattr(module, "bias", None)
        if site.rows is not None:
            others = site.tag.shape[0] - N
            rest = nn.Linear(K, others, bias is not None, device=meta, dtype=dtype)
            bias = None if bias is None else bias[:N]
        return FP4Linear(packed, site.scheme, dtype, bias, smooth, site.rows, rest)  # type: ignore[arg-type]

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        """Whether a tensor of the checkpoint is the weight of a linear that is selected."""
        path, _, name = param_name.rpartition(".")
        return not self.pre_quantized and name == "weight" and path in self._sites

    def get_quantize_ops(self) -> ConversionOps:
        """Return what is done to such a tensor."""
        return _Quantize(self.quantization_config, self._sites)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        for path, site in self._sites.items():
            module = model.get_submodule(path)
            if isinstance(module, FP4Linear):
                module.prepare()
            else:  # a weight that the checkpoint has under another name alone, as tied heads are
                replace_linear(model, path, packed_linear(module, site))
        self.quantization_config.smoothed = tuple(smoothed(model))
        if not self.pre_quantized:
            for parameter in model.parameters():  # else the file stays mapped, all of it
                parameter.data = parameter.data.clone()
                give_back_memory()
        attach(model, self._report)

    def is_serializable(self) -> bool:
        """Whether `save_pretrained` works: it does."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether gradients pass: they do not."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Whether `torch.compile` works: it does."""
        return True


class _Quantize(ConversionOps):
    """Puts an `FP4Linear` in a dense linear's place as soon as its weight is there."""

    def __init__(self, config: FP4Config, sites: dict[str, LinearSite]) -> None:
        self._config = config
        self._sites = sites

    def convert(
        self, input_dict: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, list[Tensor]]:
        """Take a weight; nothing is left to be set."""
        model = kwargs["model"]
        for name, values in input_dict.items():
            weight = values[0] if isinstance(values, list) else values
            path = name.removesuffix(".weight")
            module = model.get_submodule(path)
            module.weight = nn.Parameter(weight, requires_grad=False)
            try:
                new = packed_linear(module, self._sites[path], prepare=False)
            except Fp4GraphError as error:
                self._config.failure.error = error
                raise
            for each in (*new.parameters(), *new.buffers()):
                each._is_hf_initialized = True  # type: ignore[attr-defined] # else drawn at random
            replace_linear(model, path, new)
            let_go(weight)
            kwargs["missing_keys"].discard(name)
        return {}
