"""transformers' own door: `from_pretrained(quantization_config=FP4Config(...))`, and from disk.

A tensor of the checkpoint is read, quantised and freed before the next: the dense model never
exists. A folder that `save_pretrained` wrote has the plain layout, and its configuration says how
its linears run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
    origin,
    plan,
    smoothed,
)
from fp4graph.errors import Fp4GraphError, OptionError
from fp4graph.memory import give_back_memory, let_go
from fp4graph.policy import Policy
from fp4graph.replacement import Place, hollow_module, packed_at, packed_module, place_of, put
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
        dense: what is converted, for studies that compare; None: the name that is loaded.
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
        dense: str | None = None,
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
        self.dense = dense

    @property
    def policy(self) -> Policy:
        """What runs how."""
        return self._policy

    def to_dict(self) -> dict[str, Any]:
        """Return what `config.json` holds: the policy as a mapping, each entry whole."""
        return facts(self._policy, self.on_refusal, self.smoothed, self.dense or "")

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the same: nothing is left out."""
        return self.to_dict()


def packed_config(config: Any) -> FP4Config | None:
    """Return what a model's configuration says of its packed linears; None if they are not."""
    found = getattr(config, "quantization_config", None) or {}
    found = found if isinstance(found, dict) else found.to_dict()
    if found.get("quant_method") != METHOD:
        return None
    made: FP4Config = FP4Config.from_dict(found)
    return made


@register_quantizer(METHOD)
class FP4Quantizer(HfQuantizer):
    """Quantises a model's selected linears as transformers loads them, or loads packed ones."""

    requires_calibration = False
    quantization_config: FP4Config

    def __init__(self, quantization_config: FP4Config, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._sites: dict[Place, LinearSite] = {}

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        config = self.quantization_config
        found, self._report, _ = plan(model, config.policy)
        kept = check_refused(model, found, self._report, config.on_refusal)
        self._sites = {}
        for site in kept:
            place = place_of(model, site)
            assert place is not None
            self._sites[place] = site
        self._by_parameter = {place.parameter: site for place, site in self._sites.items()}
        if self.pre_quantized:
            for site in kept:
                smoothed = site.tag.fqn in config.smoothed
                put(model, site, hollow_module(model, site, smoothed=smoothed))

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        """Whether a tensor of the checkpoint is the weight of a linear that is selected."""
        return not self.pre_quantized and param_name in self._by_parameter

    def get_quantize_ops(self) -> ConversionOps:
        """Return what is done to such a tensor."""
        return _Quantize(self.quantization_config, self._by_parameter)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        for place, site in self._sites.items():
            module = packed_at(model, place)
            if module is not None:
                module.prepare()
            else:  # a weight that the checkpoint has under another name alone, as tied heads are
                put(model, site, packed_module(model, site))
        self.quantization_config.smoothed = tuple(smoothed(model))
        if self.quantization_config.dense is None:
            name: str = model.config.name_or_path  # type: ignore[union-attr, assignment]
            self.quantization_config.dense = origin(name)
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
    """Puts a `PackedModule` in a dense linear's place as soon as its weight is there."""

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
            site = self._sites[name]
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, nn.Parameter(weight, requires_grad=False))
            try:
                new = packed_module(model, site, prepare=False)
            except Fp4GraphError as error:
                self._config.failure.error = error
                raise
            for each in (*new.parameters(), *new.buffers()):
                each._is_hf_initialized = True  # type: ignore[attr-defined] # else drawn at random
            put(model, site, new)
            let_go(weight)
            kwargs["missing_keys"].discard(name)
        return {}
