"""Models larger than memory: transformers' own door for weights that stay in a file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from fp4graph.cache import cache_folder
from fp4graph.errors import StudyError
from fp4graph.mapped import MappedFile, is_mapped
from fp4graph.memory import let_go

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

_METHOD = "fp4graph-mapped"


@register_quantization_config(_METHOD)
class MappedConfig(QuantizationConfigMixin):
    """Weights that stay dense, for transformers' `from_pretrained`: each is mapped when it is read.

    It has to be taken off what was loaded, with `plain`.

    Attributes:
        error: why a weight could not be kept, where transformers says only that one failed.
    """

    def __init__(self) -> None:
        self.quant_method = _METHOD
        self.file = MappedFile(cache_folder())
        self.error: StudyError | None = None

    def __deepcopy__(self, memo: object) -> MappedConfig:
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return nothing of the file."""
        return {"quant_method": _METHOD}


def plain(model: Any) -> Any:
    """Return a model that was loaded with `MappedConfig` without the traces of it."""
    model.hf_quantizer = None
    del model.config.quantization_config
    return model


@register_quantizer(_METHOD)
class MappedQuantizer(HfQuantizer):
    """Maps every weight that is not mapped already, as the checkpoint's own files may be."""

    requires_calibration = False
    quantization_config: MappedConfig

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        usual = model.config.dtype  # the others' dtype is transformers' to see to
        named = model.named_parameters()
        self._shapes = {name: each.shape for name, each in named if each.dtype == usual}

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        """Whether it is a weight, of the shape that the model has."""
        return param_name in self._shapes

    def get_quantize_ops(self) -> ConversionOps:
        """Return what maps."""
        return _Map(self.quantization_config, self._shapes)

    def is_serializable(self) -> bool:
        """Whether `save_pretrained` works: what is plain again can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether gradients pass: they do."""
        return True


class _Map(ConversionOps):
    def __init__(self, config: MappedConfig, shapes: dict[str, torch.Size]) -> None:
        self._config, self._shapes = config, shapes

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        found = {}
        for name, values in input_dict.items():
            tensor = values[0] if isinstance(values, list) else values
            if self._shapes.get(name) != tensor.shape:
                self._shapes.pop(name, None)  # transformers is to name it
            elif not is_mapped(tensor):
                tensor = self._kept(tensor)
            let_go(tensor)
            found[name] = tensor
        return found

    def _kept(self, tensor: Tensor) -> Tensor:
        try:
            return self._config.file.keep(tensor)
        except StudyError as error:
            self._config.error = error
            raise
