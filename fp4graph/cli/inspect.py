"""fp4graph inspect: which linears a selector picks, before anything is run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

import fp4graph
from fp4graph.cli.common import load_model, output, print_json, stderr
from fp4graph.cli.options import DTYPES, json_option, one_selection, weights_option
from fp4graph.errors import OptionError

if TYPE_CHECKING:
    from fp4graph import Report
    from fp4graph.policy import Select

_LENGTH = 8


@click.command("inspect", short_help="Print a model's linears, and what a selector picks.")
@click.argument("model")
@click.option("--select", help="A selector, or a mapping in JSON.  [default: all]")
@click.option(
    "--mix",
    type=click.Path(path_type=Path, dir_okay=False),
    help="A .toml file with a table [select].",
)
@click.option("--format", "format_name", default="nvfp4", show_default=True, help="FP4 format.")
@click.option("--quantizer", default="rtn", show_default=True, help="How codes are found.")
@click.option("--activations", default="none", show_default=True, help="none, same, int8, or auto.")
@click.option("--kernel", default="auto", show_default=True, help="Kernel.")
@click.option(
    "--device",
    help="Choose kernels for a device that need not be here: cpu, cuda:sm_80, cuda:sm_90, "
    "cuda:sm_100, cuda:sm_120, hip:gfx942, hip:gfx950.",
)
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="Dtype of the model: float32, or bfloat16 on a GPU, if left out.",
)
@click.option("--linears", is_flag=True, help="A row for every linear, not for every role.")
@weights_option
@json_option
def inspect_command(
    model: str,
    select: str | None,
    mix: Path | None,
    format_name: str,
    quantizer: str,
    activations: str,
    kernel: str,
    device: str | None,
    dtype: str | None,
    linears: bool,
    as_json: bool,
) -> None:
    """Sum up the linears of MODEL by role: blocks, shape, and what SELECT would make of them.

    MODEL is a Hub id, a folder, a GGUF file, smollm2-135m, or qwen2.5-SIZE-random; of a folder that
    `convert` wrote it is what runs there. The model is traced on the meta device: no weight is
    read, nothing is computed.
    """
    from fp4graph.kernels import parse_target

    what = one_selection(select, mix)
    scheme = fp4graph.Scheme.read(format_name, quantizer, activations, kernel)
    fp4graph.Policy.of(what or "all", scheme)  # before the model is made
    on_gpu = device is not None and parse_target(device).backend != "cpu"
    dtype = dtype or ("bfloat16" if on_gpu else "float32")
    report = _report(model, dtype, what, scheme, device)
    if as_json:
        for row in report:
            print_json(row)
    plans = device is not None
    table = report.table(plans=plans) if linears else report.by_role(plans=plans)
    output(as_json=as_json).print(table)


def _report(
    model: str, dtype: str, what: Select | None, scheme: fp4graph.Scheme, device: str | None
) -> Report:
    """Trace a model without weights; one whose code looks at values is loaded after all."""
    import torch

    from fp4graph.hf_quantizer import packed_config
    from fp4graph.loading import dense_of, load_packed

    def explained(module: torch.nn.Module) -> Report:
        return fp4graph.explain(
            module,
            torch.arange(_LENGTH, device="cpu")[None],
            select=policy,
            format=scheme.format,
            quantizer=str(scheme.quantizer),
            activations=str(scheme.activations),
            kernel=scheme.kernel,
            device=device,
            use_cache=False,
        )

    if dense_of(model) == "":  # in the layout of another program: what is packed is in its files
        if what is not None:
            raise OptionError(f"{model} is packed already, and says itself what runs how")
        return fp4graph.report_of(load_packed(model, getattr(torch, dtype)).model)
    outline = fp4graph.models.outline(model, getattr(torch, dtype), packed=True)
    packed = packed_config(outline.model.config)
    if packed is not None and what is not None:
        raise OptionError(f"{model} is packed already, and says itself what runs how")
    policy = what or "all" if packed is None else packed.policy
    with stderr.status(f"tracing {model}"):
        try:
            return explained(outline.model)
        except (fp4graph.Fp4GraphError, KeyboardInterrupt):
            raise
        except Exception as error:  # models' own code raises anything
            reason = " ".join(str(error).split())[:100]
    stderr.print(f"loading {model}: it cannot be traced without weights ({reason})", markup=False)
    return explained(load_model(model, dtype).model)
