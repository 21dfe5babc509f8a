"""Options that several commands have."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import fp4graph
from fp4graph.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Callable

    from fp4graph.policy import Select

DTYPES = ("float32", "bfloat16", "float16")
_ALLOWED = "fp4graph.allow_weights"
_STREAMED = "fp4graph.stream"
_FILE = click.Path(path_type=Path, dir_okay=False)


class CommaList(click.ParamType[tuple[str, ...]]):
    """Values in one argument, commas between them."""

    name = "list"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Split."""
        if not isinstance(value, str):
            return value
        return tuple(part.strip() for part in value.split(","))


def selection_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add what says which linears run how: `--select`, `--mix`, `--name` and `--calibration`."""
    for option in (
        click.option(
            "--calibration", "calibrations", type=_FILE, multiple=True,
            help="Codes that `fp4graph calibrate` found; repeatable.",
        ),
        click.option("--name", "names", multiple=True,
                     help="What a selection is called in tables; repeatable, in their order."),
        click.option("--mix", "mixes", type=_FILE, multiple=True,
                     help="A .toml file with a table [select]: selector to format; repeatable."),
        click.option("--select", "selects", multiple=True,
                     help="A selector, or a mapping such as '{\"all\": \"nvfp4\", \"v\": null}'; "
                     "repeatable."),
    ):  # fmt: skip
        command = option(command)
    return command


def scheme_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add how what is selected runs: `--format`, `--activations` and `--quantizer`."""
    for option in (
        click.option("--quantizer", type=CommaList(), default=(),
                     help="How codes are found: rtn, scale-search, rtn@32, ...: docs/numerics.md.  "
                     "[default: rtn, or what the calibrations were made with]"),
        click.option("--activations", type=CommaList(), default="none", show_default=True,
                     help="none is W4A16, same is W4A4, int8 is W4A8."),
        click.option("--format", type=CommaList(), default=(),
                     help="nvfp4, mxfp4, mxfp4:RULE, or fp8.  "
                     "[default: nvfp4, or what the calibrations are for]"),
    ):  # fmt: skip
        command = option(command)
    return command


def packing_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add what says how one model is packed; `--policy` and `--mix` are the same file."""
    for option in (
        click.option("--calibration", type=_FILE, help="Codes that `fp4graph calibrate` found."),
        click.option("--activations", default="none", show_default=True,
                     help="none is W4A16, same is W4A4, int8 is W4A8, auto is int8 for many rows."),
        click.option("--quantizer", default="rtn", show_default=True,
                     help="How codes are found: docs/numerics.md."),
        click.option("--format", default="nvfp4", show_default=True,
                     help="nvfp4, mxfp4, mxfp4:RULE, or fp8."),
        click.option("--mix", "--policy", "mix", type=_FILE,
                     help="A .toml file with a table [select]: selector to format."),
        click.option("--select", help="A selector, or a mapping in JSON.  [default: all]"),
    ):  # fmt: skip
        command = option(command)
    return command


def one_selection(select: str | None, mix: Path | None) -> Select | None:
    """Return what `--select` or `--mix` picks; None without either.

    Raises:
        OptionError: both; a file that is no mix.
    """
    if select and mix:
        raise OptionError("give --select or --mix, just one")
    texts, files = (select,) if select else (), (mix,) if mix else ()
    return selected(texts, files, ())[0][0] if select or mix else None


def selected(
    selects: tuple[str, ...], mixes: tuple[Path, ...], names: tuple[str, ...]
) -> tuple[tuple[Select, ...], tuple[str, ...]]:
    """Return all selections of a command line, and what each is called, empty without a name.

    Raises:
        OptionError: a file that is no mix; more names than selections.
    """
    from fp4graph.study.plan import read_mix

    read = [read_mix(file) for file in mixes]
    everything = (*selects, *(select for select, _ in read))
    called = [*("" for _ in selects), *(name for _, name in read)]
    if len(names) > len(called):
        raise OptionError(f"{len(names)} times --name, and {len(called)} selections to be named")
    called[: len(names)] = names
    return everything, tuple(called)


def direction_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--direction`."""
    return click.option(
        "--direction",
        type=click.Choice(("only", "except", "both")),
        default="only",
        show_default=True,
        help="FP4 in the selection only, everywhere except in it, or one trial of each.",
    )(command)


def text_options(tokens: int, seq_len: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return what adds `--corpus`, `--tokens` and `--seq-len`."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        size = click.IntRange(min=2)
        for option in (
            click.option("--seq-len", type=size, default=seq_len, show_default=True,
                         help="Tokens of a window; windows are scored one by one."),
            click.option("--tokens", type=size, default=tokens, show_default=True),
            click.option("--corpus", default="pydoc", show_default=True,
                         help="pydoc, the English that Python ships; a file; or hf:DATASET."),
        ):  # fmt: skip
            command = option(command)
        return command

    return add


def dtype_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--dtype`."""
    text = "Dtype of weights and activations that stay dense."
    choice = click.Choice(DTYPES)
    return click.option("--dtype", type=choice, default="float32", show_default=True, help=text)(
        command
    )


def weights_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--allow-weights`, which `allowed_weights` returns."""

    def keep(ctx: click.Context, param: click.Parameter, patterns: tuple[str, ...]) -> None:
        ctx.meta[_ALLOWED] = patterns

    text = "Names of weights that the checkpoint may lack, or have too many or misshapen: lm_head.*"
    return click.option(
        "--allow-weights", type=CommaList(), default=(), callback=keep, expose_value=False,
        help=text, metavar="PATTERNS",
    )(command)  # fmt: skip


def allowed_weights() -> tuple[str, ...]:
    """Return the patterns of `--allow-weights`."""
    found: tuple[str, ...] = click.get_current_context().meta.get(_ALLOWED, ())
    return found


def stream_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--stream`, which `is_streamed` returns."""

    def keep(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        ctx.meta[_STREAMED] = value

    text = "For a model larger than memory: weights stay on disk, and blocks run in turn."
    return click.option(
        "--stream", is_flag=True, is_eager=True, callback=keep, expose_value=False, help=text,
    )(command)  # fmt: skip


def is_streamed() -> bool:
    """Return whether `--stream` was given."""
    found: bool = click.get_current_context().meta.get(_STREAMED, False)
    return found


def dense_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--dense`."""
    text = "What a converted MODEL is compared with.  [default: what it was converted from]"
    return click.option("--dense", help=text, metavar="MODEL")(command)


def device_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--device`."""
    text = "Where the model runs: cpu, cuda, cuda:1.  [default: cuda if there is a GPU, else cpu]"
    return click.option("--device", type=_Device(), default=_fastest, help=text)(command)


class _Device(click.ParamType[Any]):
    """A CPU or a GPU that is here."""

    name = "device"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Refuse what is neither, and GPUs that are not here."""
        import torch

        if not re.fullmatch(r"cpu|cuda(:\d+)?", str(value)):
            self.fail(f"{value!r}: expected cpu, cuda, or cuda:1 and the like", param, ctx)
        device = torch.device(value)
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            self.fail(f"{value}: torch sees {torch.cuda.device_count()} GPUs here", param, ctx)
        return device


def _fastest() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() and not is_streamed() else "cpu"


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--json`."""
    text = "Print one JSON object a line on stdout; progress and tables stay on stderr."
    return click.option("--json", "as_json", is_flag=True, help=text)(command)


def picture_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--picture`."""
    text = "Draw it into a .png, .svg or .pdf."
    return click.option("--picture", type=_FILE, callback=_check_picture, help=text)(command)


def _check_picture(ctx: click.Context, param: click.Parameter, path: Path | None) -> Path | None:
    if path is not None:
        from fp4graph.study.plot_style import check_ending

        check_ending(path)
    return path


def is_default(name: str) -> bool:
    """Whether an option was left out."""
    source = click.get_current_context().get_parameter_source(name)
    return source is not click.core.ParameterSource.COMMANDLINE


def check_trained(model: str) -> None:
    """Check that a name is not one of random weights.

    Raises:
        OptionError: it is.
    """
    if model in fp4graph.models.RANDOM_MODELS:
        raise OptionError(f"{model} has random weights: its accuracy means nothing")
