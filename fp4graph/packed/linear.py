"""A linear that owns its packed weight: what `convert` puts in the place of a dense one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fp4graph.formats import PackedWeight
from fp4graph.kernels import ROTATE, Problem, choose, fake_quantize_op, target_of
from fp4graph.scheme import Activations

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fp4graph.kernels import Kernel
    from fp4graph.scheme import Scheme

_PLAIN = ("qdata", "scale")
_LAYOUT = "_layout_"


class FP4Linear(nn.Module):
    """Computes `F.linear(x, packed.dequantize(x.dtype), bias)` by the kernel that suits its device.

    A `state_dict` has the plain layout: `qdata`, uint8 [N, K/2]; `scale`, a byte or float8 each
    group; `per_tensor_scale`, float32 [] (NVFP4); `smooth`, float32 [K] (SmoothQuant); `bias`. In
    memory there is the kernel's own layout instead, where the kernel can give the plain one back;
    else the plain one waits in host memory. `to(dtype)` changes the bias and what dtype is
    computed in; the weight keeps its bits.

    Args:
        packed: the weight.
        scheme: how it runs.
        dtype: of inputs and results.
        bias: [N], or None.
        smooth: what the weight's columns were multiplied by, float32 [K], or None.
        rows: of a fused weight the rows that `packed` has, ascending; None for all.
        rest: the dense linear of the other rows.
        prepare: whether to lay the weight out at once; else `prepare` is called before its use.
    """

    qdata: Tensor | None
    scale: Tensor | None
    per_tensor_scale: Tensor | None
    smooth: Tensor | None
    places: Tensor

    def __init__(
        self,
        packed: PackedWeight,
        scheme: Scheme,
        dtype: torch.dtype,
        bias: Tensor | None = None,
        smooth: Tensor | None = None,
        rows: Sequence[int] | None = None,
        rest: nn.Linear | None = None,
        *,
        prepare: bool = True,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self.scheme = scheme
        self.dtype = dtype
        self.kernel: Kernel | None = None
        self.register_buffer("qdata", packed.qdata)
        self.register_buffer("scale", packed.scale)
        self.register_buffer("per_tensor_scale", packed.per_tensor_scale)
        self.register_buffer("smooth", smooth)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.rest = rest
        self._rows = () if rows is None else tuple(rows)
        if rest is not None:
            self.out_features += rest.out_features
        self._layouts = 0
        self._host: PackedWeight | None = None
        if prepare:
            self.prepare()

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return (self._tensors()[0] if self.qdata is None else self.qdata).device

    @property
    def weight(self) -> Tensor:
        """A stand-in on the meta device with the dense weight's shape and dtype, and no values.

        Models ask for these, and initialise what has none; the values are `packed.dequantize()`.
        """
        shape = self.out_features, self.in_features
        found = torch.empty(shape, dtype=self.dtype, device="meta")
        found._is_hf_initialized = True  # type: ignore[attr-defined]
        return found

    @property
    def packed(self) -> PackedWeight:
        """The weight in the plain layout; made from the kernel's where that is what there is."""
        N = self.out_features - (self.rest.out_features if self.rest is not None else 0)
        if self.qdata is not None and self.scale is not None:
            shape = N, self.in_features
            return PackedWeight(
                self.qdata, self.scale, self.per_tensor_scale, shape, self.scheme.format
            )
        if self._host is not None:
            return self._host
        assert self.kernel is not None
        assert self.kernel.unpack is not None
        problem = self._problem(self.device)
        return self.kernel.unpack(self._tensors(), problem, self.per_tensor_scale)

    def prepare(self) -> None:
        """Choose the kernel for where the weight lies, and lay the weight out as it wants.

        Raises:
            RefusalError: no kernel serves it there.
        """
        if self._layouts or self.device.type == "meta":
            return
        problem = self._problem(self.device)
        self.kernel = choose(problem, self.scheme.kernel)
        plain = self.packed
        with torch.no_grad():
            tensors = self.kernel.prepack(plain, problem)
        for number, tensor in enumerate(tensors):
            self.register_buffer(f"{_LAYOUT}{number}", tensor, persistent=False)
        self._layouts = len(tensors)
        if self._rows:
            others = sorted(set(range(self.out_features)) - set(self._rows))
            places = torch.tensor([*self._rows, *others], device=self.device).argsort()
            self.register_buffer("places", places, persistent=False)
        if not self.kernel.keeps_plain:
            if self.kernel.unpack is None:
                self._host = plain.to(torch.device("cpu"))
            self.qdata = self.scale = None

    def plain(self) -> None:
        """Go back to the plain layout, as a `state_dict` and a move to another device need it."""
        if not self._layouts:
            return
        if self.qdata is None:
            packed = self.packed.to(self.device)
            self.qdata, self.scale = packed.qdata, packed.scale
        for number in range(self._layouts):
            delattr(self, f"{_LAYOUT}{number}")
        self._layouts, self._host = 0, None

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` [..., K] times the weight, [..., N]."""
        given = x
        if self.smooth is not None:
            x = x * self.smooth.reciprocal().to(x.dtype)
        format, rotation = self.scheme.format, self.scheme.rotation
        assert self.kernel is not None, "its weight is on the meta device"
        ops = self.kernel.ops
        if self.scheme.activations is Activations.SAME:
            x = fake_quantize_op(format)(x, format.name, rotation)
        elif rotation:
            x = ROTATE(x, rotation)
        if self.scheme.activations is Activations.INT8:
            ops = self.kernel.int8_ops
        y = ops[format.base](x, *self._tensors(), self.bias)
        if self.rest is None:
            return y
        dense = linear(given, self.rest.weight, self.rest.bias)
        return torch.cat((y, dense), -1).index_select(-1, self.places)

    def _tensors(self) -> list[Tensor]:
        return [getattr(self, f"{_LAYOUT}{number}") for number in range(self._layouts)]

    def _problem(self, device: torch.device) -> Problem:
        N = self.out_features - (self.rest.out_features if self.rest is not None else 0)
        return Problem(
            N,
            self.in_features,
            self.scheme.format,
            self.dtype,
            target_of(device),
            int8=self.scheme.activations is Activations.INT8,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FP4Linear:
        """Move or cast: the weight moves and keeps its bits, all else does what `fn` says."""
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        self.plain()
        kept = {name: self._buffers.pop(name) for name in (*_PLAIN, "per_tensor_scale", "smooth")}
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
        packed = self.packed
        destination[f"{prefix}qdata"], destination[f"{prefix}scale"] = packed.qdata, packed.scale

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
        other.plain()
        assert other.scale is not None
        other.scale = other.scale.view(torch.uint8)
        return {**other.__dict__, "kernel": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        assert self.scale is not None
        self.scale = self.scale.view(self.scheme.format.scale_codec.dtype)
        self.prepare()

    def extra_repr(self) -> str:
        """What `print(model)` says."""
        kernel = self.kernel.name if self.kernel else "none"
        return f"{self.in_features}, {self.out_features}, {self.scheme}, kernel={kernel}"
