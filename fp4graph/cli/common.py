"""What the commands share: options, error handling, output, progress."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import signal
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fp4graph import Fp4GraphError, OptionError, StudyError, models
from fp4graph.study.evaluate import cut
from fp4graph.study.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fp4graph.study.evaluate import Windows

_LOG = logging.getLogger("fp4graph.cli")
FAULT = 1
USAGE = 2
INTERRUPTED = 130

CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _console(*, stderr: bool) -> Console:
    """Make a console. Into a file or a pipe it writes wide: nothing can be scrolled there."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _PIPE_WIDTH
    return Console(stderr=stderr, highlight=False, width=width)


_PIPE_WIDTH = 160
stderr = _console(stderr=True)


class CommaList(click.ParamType[tuple[str, ...]]):
    """Values in one argument, commas between them."""

    name = "list"

    def __init__(self, *choices: str) -> None:
        self._choices = choices

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Split; where choices are given, refuse others."""
        if not isinstance(value, str):
            return value
        parts = tuple(part.strip() for part in value.split(","))
        for part in parts:
            if self._choices and part not in self._choices:
                self.fail(f"{part!r} is not one of {', '.join(self._choices)}", param, ctx)
        return parts


def dtype_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--dtype`."""
    choice = click.Choice(list(DTYPES))
    text = "Dtype of weights and activations that stay dense."
    return click.option("--dtype", type=choice, default="float32", show_default=True, help=text)(
        command
    )


def weights_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--allow-weights`, which `load_model` heeds."""

    def keep(ctx: click.Context, param: click.Parameter, patterns: tuple[str, ...]) -> None:
        ctx.meta[_ALLOWED] = patterns

    text = "Names of weights that the checkpoint may lack, or have too many or misshapen: lm_head.*"
    return click.option(
        "--allow-weights", type=CommaList(), default=(), callback=keep, expose_value=False,
        help=text, metavar="PATTERNS",
    )(command)  # fmt: skip


_ALLOWED = "fp4graph.allow_weights"


def device_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--device`."""
    text = "Where the model runs: cpu, cuda, cuda:1.  [default: cuda if there is a GPU, else cpu]"
    return click.option("--device", type=_Device(), default=_fastest, help=text)(command)


class _Device(click.ParamType[torch.device]):
    """A CPU or a GPU that is here."""

    name = "device"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Refuse what is neither, and GPUs that are not here."""
        if not re.fullmatch(r"cpu|cuda(:\d+)?", str(value)):
            self.fail(f"{value!r}: expected cpu, cuda, or cuda:1 and the like", param, ctx)
        device = torch.device(value)
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            self.fail(f"{value}: torch sees {torch.cuda.device_count()} GPUs here", param, ctx)
        return device


def _fastest() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--json`."""
    text = "Print one JSON object a line on stdout; progress and tables stay on stderr."
    return click.option("--json", "as_json", is_flag=True, help=text)(command)


def picture_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--picture`."""
    path = click.Path(path_type=Path, dir_okay=False)
    text = "Draw it into a PNG."
    return click.option("--picture", type=path, callback=_check_picture, help=text)(command)


def _check_picture(ctx: click.Context, param: click.Parameter, path: Path | None) -> Path | None:
    if path is not None and path.suffix != ".png":
        raise OptionError(f"--picture {path}: expected a name that ends with .png")
    return path


def read_text(corpus: str, tokens: int | None) -> str:
    """Return a corpus, or as much of its beginning as that number of tokens can take."""
    return models.corpus(corpus, None if tokens is None else tokens * _CHARACTERS_A_TOKEN)


_CHARACTERS_A_TOKEN = 256  # more than any text has


def load_model(model: str, dtype: str, device: torch.device = CPU) -> models.LoadedModel:
    """Load a model by its name, and say so while it takes.

    Raises:
        ModelError: see `models.load`.
    """
    allowed = click.get_current_context().meta.get(_ALLOWED, ())
    with stderr.status(f"loading {model}"):
        return models.load(model, DTYPES[dtype], device=device, allow_weights=allowed)


def open_results(path: Path) -> Store:
    """Open a results folder, or its trials.sqlite.

    Raises:
        StudyError: there is none.
    """
    file = path / "trials.sqlite" if path.is_dir() else path
    if not file.is_file():
        raise StudyError(f"there are no results in {path}")
    return Store(file)


def load_windows(
    model: str, corpus: str, tokens: int, seq_len: int, dtype: str, device: torch.device
) -> tuple[models.LoadedModel, Windows]:
    """Load a model with trained weights, and a corpus's first tokens in windows.

    Raises:
        OptionError: the model's weights are random.
        CorpusError: see `cut`.
        ModelError: nothing loads by that name.
    """
    check_trained(model)
    text = read_text(corpus, tokens)
    loaded = load_model(model, dtype, device)
    return loaded, cut(text, loaded.tokenizer, tokens, seq_len)


@contextlib.contextmanager
def windows_bar(total: int) -> Iterator[Callable[[], None]]:
    """Show a progress bar; call what is yielded after each window."""
    with progress_bar() as bar:
        task = bar.add_task("windows", total=total)

        def advance() -> None:
            check_interrupt()
            bar.advance(task)

        yield advance


def check_trained(model: str) -> None:
    """Check that a name is not one of random weights.

    Raises:
        OptionError: it is.
    """
    if model in models.RANDOM_MODELS:
        raise OptionError(f"{model} has random weights: its accuracy means nothing")


@contextlib.contextmanager
def readable_errors() -> Iterator[None]:
    """Turn every error into one line on stderr.

    Exit status 2 for what a user can mend, 130 for Ctrl-C, 1 for what should not have happened.
    """
    _interrupted.clear()
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ours = usual and threading.current_thread() is threading.main_thread()
    if ours:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    except Fp4GraphError as error:
        click.echo(f"fp4graph: {error}", err=True)
        sys.exit(USAGE)
    except KeyboardInterrupt:
        kept = "what ended is kept: the same ablate or calibrate command goes on where it was"
        click.echo(f"fp4graph: interrupted; {kept}", err=True)
        sys.exit(INTERRUPTED)
    except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
        raise
    except OSError as error:
        click.echo(f"fp4graph: {error}", err=True)
        sys.exit(USAGE)
    except Exception as error:
        _LOG.info("where it came from", exc_info=True)
        click.echo(f"fp4graph: {_unforeseen(error)}", err=True)
        sys.exit(FAULT)
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _unforeseen(error: Exception) -> str:
    reason = " ".join(str(error).split())[:300]
    memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in reason
    if memory:
        return f"not enough memory: {reason}"
    return (
        f"a fault of fp4graph's or of the model's code ({type(error).__name__}: {reason}); "
        "what ended is kept; `fp4graph -v COMMAND` shows where it came from"
    )


_interrupted = threading.Event()


def _interrupt(signum: int, frame: object) -> None:
    _interrupted.set()
    raise KeyboardInterrupt


def check_interrupt() -> None:
    """Raise KeyboardInterrupt if Ctrl-C came before: in a finalizer Python drops the exception."""
    if _interrupted.is_set():
        raise KeyboardInterrupt


def print_json(row: Any) -> None:
    """Print a dataclass or a dict as one line of JSON, at once, for whoever reads along."""
    click.echo(json.dumps(row if isinstance(row, dict) else asdict(row)))
    sys.stdout.flush()


def output(*, as_json: bool) -> Console:
    """Return where tables go: stdout, or stderr where that holds JSON."""
    return stderr if as_json else _console(stderr=False)


def progress_bar() -> Progress:
    """Return a progress bar on stderr with an ETA."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=stderr,
    )
