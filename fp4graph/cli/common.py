"""What the commands share: error handling, output, progress, loading."""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
import os
import re
import signal
import sys
import threading
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

import fp4graph
from fp4graph.cli.options import allowed_weights, check_trained, is_streamed
from fp4graph.errors import Fp4GraphError, ModelError, OptionError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from fp4graph.models import LoadedModel
    from fp4graph.study import Table
    from fp4graph.study.evaluate import Windows
    from fp4graph.study.progress import Progress

_LOG = logging.getLogger("fp4graph.cli")
FAULT = 1
USAGE = 2
INTERRUPTED = 130
_PIPE_WIDTH = 4096
_CHARACTERS_A_TOKEN = 256  # more than any text has


def _console(*, stderr: bool) -> Console:
    """Make a console as wide as its terminal. A file or a pipe takes all: nothing is cut there."""
    stream = sys.stderr if stderr else sys.stdout
    width = _PIPE_WIDTH
    if stream.isatty():
        width = int(os.environ.get("COLUMNS") or os.get_terminal_size(stream.fileno()).columns)
    return Console(stderr=stderr, highlight=False, width=width or 80)


stderr = _console(stderr=True)


def read_text(corpus: str, tokens: int | None) -> str:
    """Return a corpus, or as much of its beginning as that number of tokens can take."""
    return fp4graph.models.corpus(corpus, None if tokens is None else tokens * _CHARACTERS_A_TOKEN)


def load_model(model: str, dtype: str, device: torch.device | str = "cpu") -> LoadedModel:
    """Load a model by its name, and say so while it takes.

    Raises:
        ModelError: see `models.load`.
    """
    import torch

    with stderr.status(f"loading {model}"):
        return fp4graph.models.load(
            model,
            getattr(torch, dtype),
            device=device,
            allow_weights=allowed_weights(),
            stream=is_streamed(),
        )


def load_models(
    model: str, dtype: str, device: torch.device, dense: str | None
) -> tuple[LoadedModel, tuple[LoadedModel, ...]]:
    """Load what a study is of: a dense model, and beside it the converted one that was named.

    Args:
        model: the dense one, or a converted one.
        dtype: of what is dense.
        device: where to put them.
        dense: what a converted one is compared with; None: what it was converted from.

    Raises:
        OptionError: a dense model, and `dense`.
        ModelError: see `models.load`; a converted one that does not say what it was.
    """
    import torch

    from fp4graph.loading import dense_of, load_packed

    known = dense_of(model)
    if known is None:
        if dense is not None:
            raise OptionError(f"--dense is for a converted model, and {model} is dense itself")
        return load_model(model, dtype, device), ()
    if not (dense or known):
        raise ModelError(f"{model} does not say what it was converted from: give --dense MODEL")
    found = load_model(dense or known, dtype, device)
    with stderr.status(f"loading {model}"):
        return found, (load_packed(model, getattr(torch, dtype), device),)


def load_windows(
    model: str, corpus: str, tokens: int, seq_len: int, dtype: str, device: torch.device
) -> tuple[LoadedModel, Windows]:
    """Load a model with trained weights, and a corpus's first tokens in windows.

    Raises:
        OptionError: the model's weights are random.
        CorpusError: see `cut`.
        ModelError: nothing loads by that name.
    """
    from fp4graph.study.evaluate import cut

    check_trained(model)
    text = read_text(corpus, tokens)
    loaded = load_model(model, dtype, device)
    return loaded, cut(text, loaded.text_tokenizer(), tokens, seq_len)


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
        click.echo(f"fp4graph: {_in_options(str(error))}", err=True)
        sys.exit(USAGE)
    except KeyboardInterrupt:
        kept = "what ended is kept: the same ablate or calibrate command goes on where it was"
        click.echo(f"fp4graph: interrupted; {kept}", err=True)
        sys.exit(INTERRUPTED)
    except click.NoSuchOption as error:
        near = difflib.get_close_matches(error.option_name, error.possibilities or (), cutoff=0.75)
        raise click.NoSuchOption(error.option_name, None, near, error.ctx) from None
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


def _in_options(message: str) -> str:
    """Return a message with a command's options in place of arguments: `--format` for `format=`."""
    context = click.get_current_context(silent=True)
    name = context.invoked_subcommand if context else None
    command = context.command.get_command(context, name) if name else None  # type: ignore[union-attr]
    for option in () if command is None else (o for p in command.params for o in p.opts):
        if option.startswith("--"):
            argument = option.removeprefix("--").replace("-", "_")
            message = re.sub(rf"(?<![\w-]){argument}=", f"{option} ", message)
    return message


def _unforeseen(error: Exception) -> str:
    reason = " ".join(str(error).split())[:300]
    memory = (
        type(error).__name__ in ("MemoryError", "OutOfMemoryError") or "allocate memory" in reason
    )
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


def print_table(table: Table, *, as_json: bool, rows: bool = True) -> None:
    """Print a study: its rows as JSON if asked, unless they are out already, and its tables."""
    if as_json:
        for each in _all(table):
            if rows or each is not table:
                for row in each:
                    print_json(row)
    output(as_json=as_json).print(table)


def _all(table: Table) -> Iterator[Table]:
    yield table
    for each in table.more:
        yield from _all(each)


@contextlib.contextmanager
def progress_shown(*, as_json: bool = False) -> Iterator[Progress]:
    """Yield what a study tells its progress to: a bar on a terminal, else lines, on stderr.

    Ctrl-C is heeded at each step; with `as_json` each result is printed as it comes.
    """
    from fp4graph.study.progress import Bar, Lines, Progress

    class Watched(Progress):
        """Passes everything on."""

        def __init__(self, inner: Progress) -> None:
            self.start = inner.start  # type: ignore[method-assign]
            self.note = inner.note  # type: ignore[method-assign]
            self._inner = inner

        def advance(self, what: str = "") -> None:
            check_interrupt()
            self._inner.advance(what)

        def within(self, what: str) -> None:
            check_interrupt()
            self._inner.within(what)

        def ended(self, what: str, row: object, *, kept: bool = False) -> None:
            self._inner.ended(what, row, kept=kept)
            if as_json:
                print_json(row)

    if stderr.is_terminal:
        with Bar(stderr) as bar:
            yield Watched(bar)
    else:
        yield Watched(Lines(stderr))
