"""Which linears of every causal architecture of transformers fp4graph knows and runs: a census.

And of five diffusion transformers of diffusers (tests/support/diffusion.py).

    make architectures          # or: python bench/architectures.py [TYPE ...]

Each model type, made tiny with random weights (tests/support/architectures.py), runs in a process
of its own: `select="all,expert"` against a copy of the model whose selected weights were rounded to
FP4 by hand. Without names of types it writes docs/architectures.md.

block linears   rows in blocks that are no router, expert or adapter, and how many are `other`
no row          weights that a forward multiplies by and that have no row
routers         rows of routers that `all` selected: none, or something is wrong
equal           largest difference to the copy, relative to the largest logit
converted       the same type converted: other linears than the compiled one's, and the difference
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import sys
import warnings
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.architectures import TYPES, build, call
from support.converted import compare
from support.diffusion import DIFFUSION, build_diffusion

import fp4graph
from fp4graph.linears.stacks import below_block

PAGE = Path(__file__).parents[1] / "docs/architectures.md"
SECONDS = 150
EQUAL = 1e-4
_NO_BLOCK_LINEARS = ("lm_head", "router", "expert", "adapter")
_PRODUCTS = {"linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "__matmul__"} | {
    "__rmatmul__", "grouped_mm", "_grouped_mm", "grouped_mm_fallback", "mv", "tensordot", "inner",
}  # fmt: skip


class Products(TorchFunctionMode):
    """Notes the parameters that enter a matrix product, by storage, so that views count."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.seen: set[tuple[str, ...]] = set()
        self._names: dict[int, tuple[str, ...]] = defaultdict(tuple)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if parameter.ndim > 1 and "bias" not in name:
                self._names[parameter.untyped_storage().data_ptr()] += (name,)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        if getattr(func, "__name__", "") in _PRODUCTS:
            for each in (*args, *(kwargs or {}).values()):
                if isinstance(each, Tensor) and each.untyped_storage().data_ptr() in self._names:
                    self.seen.add(self._names[each.untyped_storage().data_ptr()])
        return func(*args, **(kwargs or {}))


def examine(kind: str) -> dict[str, Any]:
    """Run one type and count."""
    model, inputs = (build_diffusion if kind in DIFFUSION else build)(kind)
    dense = call(model, inputs)
    products = Products(model)
    with products:
        call(model, inputs)
    backend, out = run(model, inputs)
    rows = backend.report.rows
    inside = [row for row in rows if row.block is not None]
    linears = [row for row in inside if row.role not in _NO_BLOCK_LINEARS]
    paths = {path for row in rows for path in (row.path, f"{row.path}.weight")}
    twin = rounded(model, backend.report)
    expected = call(twin, inputs)
    return {
        "linears": len(linears),
        "other": sorted({below_block(row.path) for row in linears if row.role == "other"}),
        "experts": sum(row.role == "expert" for row in inside),
        "no_row": sorted(names[0] for names in products.seen if paths.isdisjoint(names)),
        "routers": sum(row.role == "router" for row in backend.report.selected),
        "selected": len(backend.report.selected),
        "refused": sorted({row.reason for row in rows if row.reason.startswith("refused")}),
        "difference": difference(out, expected),
        "damage": difference(expected, dense),
        "converted": {} if kind in DIFFUSION else compare(kind),
    }


def run(model: nn.Module, inputs: dict[str, Any]) -> tuple[Any, Tensor]:
    """Run `all,expert` in FP4, or what of it there is and can be."""
    for select, keep in (("all,expert", "raise"), ("all,expert", "keep"), ("all", "keep")):
        torch._dynamo.reset()
        backend = fp4graph.backend(select, inner="eager", model=model, on_refusal=keep)
        try:
            return backend, call(torch.compile(model, backend=backend), inputs)
        except (fp4graph.SelectorError, fp4graph.errors.RefusalError) as error:
            last = error
    raise last


def rounded(model: nn.Module, report: fp4graph.Report) -> nn.Module:
    """Copy a model with the selected weights rounded by hand."""
    twin = copy.deepcopy(model)
    parameters = dict(twin.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for row in report.selected:
            w = parameters.get(row.path, parameters.get(f"{row.path}.weight"))
            module = twin.get_submodule(row.path.removesuffix(".weight").rpartition(".")[0])
            owner = getattr(module, row.path.rpartition(".")[2], None)
            flip = type(owner).__name__ == "Conv1D" or tuple(w.shape) != row.shape
            w_ENK = (w.mT if flip else w).reshape(-1, *row.shape[-2:])
            q_ENK = torch.stack([fp4graph.quantize(each).dequantize(w.dtype) for each in w_ENK])
            q = q_ENK.reshape(row.shape)
            w.copy_(q.mT if flip else q)
    return twin


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max().clamp_min(1e-30))


def in_a_process(kind: str) -> dict[str, Any]:
    """Examine a type where nothing that it does can hurt the others."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)

    def child() -> None:
        torch.set_num_threads(1)
        warnings.filterwarnings("ignore")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            theirs.send(examine(kind))
        except Exception as error:
            text = " ".join(str(error).split())
            theirs.send({"error": f"{type(error).__name__}: {text[:160]}"})

    process = context.Process(target=child)
    process.start()
    found = ours.recv() if ours.poll(SECONDS) else {"error": f"not done in {SECONDS} s"}
    process.kill()
    process.join()
    return {"type": kind, **found}


def page(every: list[dict[str, Any]]) -> str:
    """Return the page."""
    found = [each for each in every if each["type"] not in DIFFUSION]
    ran = [each for each in found if "error" not in each]
    good = {
        "every block linear has a role": sum(not each["other"] for each in ran),
        "every weight that is multiplied by has a row": sum(not each["no_row"] for each in ran),
        "no router is selected by `all`": sum(not each["routers"] for each in ran),
        f"equal to the rounded copy within {EQUAL:g}": sum(
            each["difference"] <= EQUAL for each in ran
        ),
        "`convert` picks the linears that `backend` picks": sum(map(same_linears, ran)),
        f"converted and compiled are equal within {EQUAL:g}": sum(
            each["converted"]["difference"] <= EQUAL for each in ran
        ),
    }
    lines = [
        "# Architectures",
        "",
        f"All {len(found)} causal language models of transformers {fp4graph_versions()}, tiny and",
        "random, run with `all,expert` in NVFP4 (`bench/architectures.py` says what is counted):",
        "",
        "    make architectures",
        "",
        "| | of |", "|---|---|",
        f"| builds, runs and compiles | {len(ran)} of {len(found)} |",
        *(f"| {name} | {count} of {len(ran)} |" for name, count in good.items()),
        "",
        *table(found),
        "",
        "## Diffusion transformers",
        "",
        f"Of diffusers {version('diffusers')}, tiny and random, run with `all` in NVFP4. What is",
        "`other` there makes scales and shifts of a time embedding (adaptive norms).",
        "",
        *table([each for each in every if each["type"] in DIFFUSION]),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def table(found: list[dict[str, Any]]) -> list[str]:
    """Return the lines of a table."""
    lines = [
        "| type | block linears | `other` | expert stacks | in FP4 | difference | notes |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in found:
        if "error" in each:
            lines.append(f"| {each['type']} | | | | | | {each['error'].replace('|', '/')} |")
            continue
        notes = [f"no row: {', '.join(each['no_row'])}"] if each["no_row"] else []
        notes += each["refused"][:1]
        if not same_linears(each):
            notes.append("`convert` picks others")
        lines.append(
            f"| {each['type']} | {each['linears']} | {', '.join(each['other'])} | "
            f"{each['experts'] or ''} | {each['selected']} | {each['difference']:.0e} | "
            f"{'; '.join(notes).replace('|', '/')} |"
        )
    return lines


def same_linears(each: dict[str, Any]) -> bool:
    """Whether `convert` picked what the backend did."""
    found = each["converted"]
    return not found or not (found["only_compiled"] or found["only_converted"])


def fp4graph_versions() -> str:
    import transformers

    return f"{transformers.__version__} (torch {torch.__version__})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("types", nargs="*", metavar="TYPE")
    chosen = parser.parse_args().types
    found = []
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        for kind in progress.track(chosen or (*TYPES, *DIFFUSION), description="types"):
            found.append(in_a_process(kind))
            if chosen:
                print(json.dumps(found[-1], indent=1))
    if not chosen:
        PAGE.write_text(page(found), encoding="utf-8")
        print(PAGE)


if __name__ == "__main__":
    main()
