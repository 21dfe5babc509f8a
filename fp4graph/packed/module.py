"""Modules that own packed weights: the plain layout in state dicts, the kernel's own in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fp4graph.formats import PackedWeight
from fp4graph.kernels import Problem, before, choose, target_of
from fp4graph.packed.stand_in import Multiplied

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import Self

    from fp4graph.kernels import Kernel
    from fp4graph.scheme import Scheme

    Op = torch._ops.OpOverload[..., Tensor]

_LAYOUT = "_layout_"


class PackedModule(Multiplied, nn.Module):
    """One packed weight, or a stack of them.

    A `state_dict` has the plain layout; a stack's tensors have one more dimension in front.
    `qdata`, uint8 [N, K/2]; `scale`, a byte or float8 each group; `per_tensor_scale`, float32 []
    (NVFP4); `smooth`, float32 [K] (SmoothQuant). In memory there is the kernel's own layout
    instead, where the kernel can give the plain one back; else the plain one waits in host memory.
    `to(dtype)` changes what is computed in; the weight keeps its bits.

    Args:
        weights: the weight, or those of a stack, which are laid out one after the other.
        matrix: [N, K] of each.
        stored: shape of the parameter in whose place it stands.
        scheme: how it runs.
        dtype: of inputs and results.
        smooth: what the weight's columns were multiplied by, float32 [K], or None.
        stacked: how many weights there are; None for one that is no stack.
        prepare: whether to lay the weight out at once; else `prepare` is called before its use.
    """

    qdata: Tensor | None
    scale: Tensor | None
    per_tensor_scale: Tensor | None
    smooth: Tensor | None

    def __init__(
        self,
        weights: Iterable[PackedWeight],
        matrix: tuple[int, int],
        stored: torch.Size,
        scheme: Scheme,
        dtype: torch.dtype,
        smooth: Tensor | None,
        *,
        stacked: int | None,
        prepare: bool,
    ) -> None:
        super().__init__()
        self.scheme = scheme
        self.dtype = dtype
        self.kernel: Kernel | None = None
        self._computes: Op | None = None
        self._before: tuple[Any, ...] | None = None
        self._shape, self._stacked = matrix, stacked
        self._stored = stored
        self._is_hf_initialized = True  # transformers draws no weights at random here
        self._layouts = 0
        self._host: list[PackedWeight] = []
        for name in ("qdata", "scale", "per_tensor_scale"):
            self.register_buffer(name, None)
        self.register_buffer("smooth", smooth)
        if prepare:
            self._lay_out(weights)
        else:
            self._keep_plain(list(weights))

    @property
    def shape(self) -> torch.Size:
        """Of the dense weight."""
        return self._stored

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return (self._tensors()[0] if self.qdata is None else self.qdata).device

    def weights(self) -> list[PackedWeight]:
        """Return each weight in the plain layout, made from the kernel's where there is that."""
        scales = self._each(self.per_tensor_scale)
        if self.qdata is not None:
            format = self.scheme.format
            parts = zip(self._each(self.qdata), self._each(self.scale), scales, strict=True)
            return [PackedWeight(*each, self._shape, format) for each in parts]  # type: ignore[arg-type]
        if self._host:
            return self._host
        assert self.kernel is not None
        assert self.kernel.unpack is not None
        unpack, problem = self.kernel.unpack, self._problem()
        layouts = zip(*(self._each(tensor) for tensor in self._tensors()), strict=True)
        return [
            unpack(tensors, problem, scale) for tensors, scale in zip(layouts, scales, strict=True)
        ]

    def prepare(self) -> None:
        """Choose the kernel for where the weight lies, and lay the weight out as it wants.

        Raises:
            RefusalError: no kernel serves it there.
        """
        if not self._layouts and self.device.type != "meta":
            self._lay_out(self.weights())

    def plain(self) -> None:
        """Go back to the plain layout, as a `state_dict` and a move to another device need it."""
        if not self._layouts:
            return
        device = self.device
        self._keep_plain([weight.to(device) for weight in self.weights()])
        for number in range(self._layouts):
            delattr(self, f"{_LAYOUT}{number}")
        self._layouts, self._host = 0, []

    def _lay_out(self, weights: Iterable[PackedWeight]) -> None:
        layouts: list[Tensor] = []
        scales: list[Tensor | None] = []
        host: list[PackedWeight] = []
        for number, plain in enumerate(weights):
            problem = self._problem(plain.qdata.device)
            kernel = self.kernel = choose(problem, self.scheme.kernel)
            self._computes = kernel.op_for(problem)
            self._before = before(kernel, problem, self.scheme.rotation)
            with torch.no_grad():
                tensors = kernel.prepack(plain, problem)
            if self._stacked is None:
                layouts = list(tensors)
            else:
                layouts = layouts or [
                    each.new_empty(self._stacked, *each.shape) for each in tensors
                ]
                for layout, tensor in zip(layouts, tensors, strict=True):
                    layout[number] = tensor
            scales.append(plain.per_tensor_scale)
            if kernel.unpack is None:
                host.append(plain.to(torch.device("cpu")))
        for number, layout in enumerate(layouts):
            self.register_buffer(f"{_LAYOUT}{number}", layout, persistent=False)
        self._layouts, self._host = len(layouts), host
        self.per_tensor_scale = self._join(scales)
        self.qdata = self.scale = None

    def _keep_plain(self, weights: Sequence[PackedWeight]) -> None:
        self.qdata = self._join([weight.qdata for weight in weights])
        self.scale = self._join([weight.scale for weight in weights])
        self.per_tensor_scale = self._join([weight.per_tensor_scale for weight in weights])

    def _each(self, tensor: Tensor | None) -> Sequence[Tensor | None]:
        """Return what each weight has of a tensor."""
        if self._stacked is None:
            return [tensor]
        return [None] * self._stacked if tensor is None else tensor.unbind()

    def _join(self, tensors: Sequence[Tensor | None]) -> Tensor | None:
        first = tensors[0]
        if self._stacked is None or first is None:
            return first
        size, codec = first.element_size(), first.dtype  # some backends cannot stack float8
        stacked = torch.stack([each.view(torch.uint8) if size == 1 else each for each in tensors])  # type: ignore[union-attr, misc]
        return stacked.view(codec)

    def _tensors(self) -> list[Tensor]:
        return [getattr(self, f"{_LAYOUT}{number}") for number in range(self._layouts)]

    def _problem(self, device: torch.device | None = None) -> Problem:
        return Problem(
            *self._shape,
            self.scheme.format,
            self.dtype,
            target_of(device or self.device),
            inputs=self.scheme.inputs,
            experts=self._stacked or 1,
        )

    def _op(self) -> Op:
        """Return what computes."""
        assert self._computes is not None, "its weight is on the meta device"
        return self._computes

    def _taken(self, x: Tensor) -> Tensor:
        """Return what the op takes of an input [..., K]: smoothed, rotated, rounded."""
        if self.smooth is not None:
            x = x * self.smooth.reciprocal().to(x.dtype)
        if self._before is None:
            return x
        op, *arguments = self._before
        taken: Tensor = op(x, *arguments)
        return taken

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast: the weight moves and keeps its bits, all else does what `fn` says."""
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        self.plain()
        names = ("qdata", "scale", "per_tensor_scale", "smooth")
        kept = {name: self._buffers.pop(name) for name in names}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in kept.items():
            self._buffers[name] = None if tensor is None else tensor.to(probe.device)
        self.dtype = probe.dtype
        self.prepare()
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weights = self.weights()
        destination[f"{prefix}qdata"] = self._join([weight.qdata for weight in weights])
        destination[f"{prefix}scale"] = self._join([weight.scale for weight in weights])

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.plain()
        super()._load_from_state_dict(*args, **kwargs)
        self.prepare()

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle the plain layout, for the kernel's own is this machine's.

        Scales go as bytes: pickle cannot read float8 back.
        """
        other = self.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._buffers = dict(self._buffers)
        other._non_persistent_buffers_set = set(self._non_persistent_buffers_set)
        other.plain()
        assert other.scale is not None
        other.scale = other.scale.view(torch.uint8)
        return {
            **other.__dict__,
            "kernel": None,
            "_computes": None,
            "_before": None,
            "_grouped": None,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        assert self.scale is not None
        self.scale = self.scale.view(self.scheme.format.scale_codec.dtype)
        self.prepare()

    def extra_repr(self) -> str:
        """What `print(model)` says."""
        kernel = self.kernel.name if self.kernel else "none"
        stack = [] if self._stacked is None else [str(self._stacked)]
        N, K = self._shape
        return ", ".join([*stack, str(K), str(N), str(self.scheme), f"kernel={kernel}"])
