"""A model converted beside the same model compiled: what differs."""

from __future__ import annotations

from typing import Any

import torch
from support.architectures import build, call

import fp4graph
from fp4graph.errors import SelectorError


def compare(kind: str) -> dict[str, Any]:
    """Compile and convert a type with all that can be in FP4.

    Returns:
        `linears`, how many the compiled model has in FP4; `only_compiled` and `only_converted`,
        paths; `difference`, largest of the logits, relative to the largest logit.
    """
    model, inputs = build(kind)
    for select in ("all,expert", "all"):
        torch._dynamo.reset()
        backend = fp4graph.backend(select, inner="eager", model=model, on_refusal="keep")
        try:
            want = call(torch.compile(model, backend=backend), inputs)
        except SelectorError:
            model, inputs = build(kind)
            continue
        break
    compiled = {row.path for row in backend.report.selected}
    model, inputs = build(kind)
    if not any(row.role == "expert" for row in backend.report.selected):
        select = "all"
    report = fp4graph.convert(model, select, on_refusal="keep", inputs=inputs)
    converted = {row.path for row in report.selected}
    difference = (call(model, inputs) - want).abs().max() / want.abs().max().clamp_min(1e-30)
    return {
        "linears": len(compiled),
        "only_compiled": sorted(compiled - converted),
        "only_converted": sorted(converted - compiled),
        "difference": float(difference),
    }
