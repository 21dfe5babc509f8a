"""choose: find a kernel for every selected linear, or say why there is none."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from fp4graph.errors import CalibrationError, Fp4GraphError, RefusalError
from fp4graph.graph.site import LinearSite, mark, sites
from fp4graph.kernels import KERNELS, Problem, Target, choose, refusals, target_of
from fp4graph.quantizers import is_plain, matrix_name
from fp4graph.report import REFUSED

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.fx import GraphModule

OnRefusal = Literal["raise", "keep"]
_SHOWN = 3


@dataclass(frozen=True)
class ChooseKernels:
    """Choose kernels by format, shape, dtype and device.

    Given:
        q = linear(x, q_weight, None)      # scheme nvfp4 W4A16; reason `attn`
        k = linear(x, k_weight, None)      # reason not selected
    Result, with kernel="reference":
        q = linear(x, q_weight, None)      # kernel reference; reason `attn` as nvfp4 W4A16
        k = linear(x, k_weight, None)      # reason not selected

    Given, a linear that cannot run in FP4:
        q = linear(x, q_weight, None)      # scheme nvfp4 W4A16
        # unsupported its weight is no nn.Parameter
    Result, with on_refusal="keep":
        q = linear(x, q_weight, None)      # scheme none
        # reason refused: its weight is no nn.Parameter

    Raises:
        RefusalError: a selected linear is refused and `on_refusal` is "raise"; names the linears.
    """

    name: ClassVar[str] = "choose"
    on_refusal: OnRefusal = "raise"
    target: Target | None = None  # the device to choose for; None: where the weights are

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> None:
        """See the class."""
        refused: list[tuple[str, Fp4GraphError]] = []
        for node, site in sites(gm):
            if site.scheme is None:
                continue
            try:
                problem = _problem(site, example_inputs, self.target)
                kernel = choose(problem, site.scheme.kernel)
            except (RefusalError, CalibrationError) as error:
                refused.append((site.tag.fqn, error))
                mark(node, replace(site, scheme=None, reason=f"{REFUSED}{error}"))
            else:
                note = ""
                if kernel.note and site.scheme.kernel == "auto":
                    # it is second best: say what the better ones lack
                    better = [each for each in KERNELS if each.serves(problem.target)]
                    note = f" ({'; '.join((kernel.note, *refusals(problem, better)))})"
                if problem.inputs == "auto" and problem.format.base not in kernel.auto_ops:
                    note += f"; exact at any number of rows, for {kernel.name} rounds none"
                if problem.inputs == "same" and not kernel.rounds(problem):
                    note += "; emulated: inputs are rounded in a call of their own"
                reason = f"{site.reason} as {site.scheme}{note}"
                mark(node, replace(site, problem=problem, kernel=kernel, reason=reason))
        if refused and self.on_refusal == "raise":
            raise refusal(refused)


def refusal(
    refused: Sequence[tuple[str, object]],
    problem: str = 'cannot run in FP4; select others, or keep them dense with on_refusal="keep"',
) -> RefusalError:
    """Return the error for selected linears of which something is asked that cannot be.

    Args:
        refused: their paths and reasons.
        problem: what cannot be, and what to do.
    """
    shown = "; ".join(f"{path}: {reason}" for path, reason in refused[:_SHOWN])
    more = f" (and {len(refused) - _SHOWN} more)" if len(refused) > _SHOWN else ""
    return RefusalError(f"{len(refused)} selected linears {problem}: {shown}{more}")


def _problem(site: LinearSite, example_inputs: Sequence[Any], target: Target | None) -> Problem:
    assert site.scheme is not None
    if site.unsupported or site.weight is None:
        raise RefusalError(site.unsupported or "it has no weight")
    weight = example_inputs[site.weight]
    if site.scheme.calibration is not None:
        first = 0 if weight.ndim == 3 else None
        name, how = matrix_name(site.tag.fqn, first), (site.scheme.format, site.scheme.quantizer)
        site.scheme.calibration.require(name, *how)
    if not is_plain(weight):
        raise RefusalError(f"its weight is a {type(weight).__name__}, not a plain tensor")
    if weight.layout != torch.strided or not weight.dtype.is_floating_point:
        raise RefusalError(f"its weight is {weight.dtype} with layout {weight.layout}")
    if weight.device.type == "meta" and target is None:
        raise RefusalError("its weight is on the meta device, so there is nothing to pack")
    if weight.is_inference():
        raise RefusalError(
            "its weight was made under torch.inference_mode(), so changes to it cannot be seen: "
            "load the model outside"
        )
    out_features, in_features = site.tag.shape[-2:]
    rotation = site.scheme.rotation
    if rotation and in_features % rotation:
        raise RefusalError(f"K={in_features} is no multiple of the rotation's {rotation}")
    if (rotation or site.scheme.quantizer.strength) and site.rows is not None:
        raise RefusalError("only a part of it is selected, and its quantizer changes all its input")
    return Problem(
        out_features if site.rows is None else len(site.rows),
        in_features,
        site.scheme.format,
        site.dtype,
        target or target_of(weight.device),
        inputs=site.scheme.inputs,
        weight_dtype=weight.dtype if weight.dtype != site.dtype else None,
        experts=math.prod(site.tag.shape[:-2]),
    )
