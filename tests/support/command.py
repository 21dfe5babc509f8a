"""`fp4graph` in a process forked from one that has imported it, which saves seconds."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import tempfile
from pathlib import Path

_TESTS = str(Path(__file__).parents[1])
os.environ["PYTHONPATH"] = os.pathsep.join(  # Python 3.11's server does not get sys.path
    [_TESTS, *filter(None, [os.environ.get("PYTHONPATH")])]
)
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["support.preloaded"])


class Command:
    """A running command.

    Args:
        arguments: of `fp4graph`.
        file_size: bytes beyond which none of its files may grow.
    """

    def __init__(self, *arguments: str, file_size: int = resource.RLIM_INFINITY) -> None:
        self._said = [Path(tempfile.mkstemp()[1]) for _ in range(2)]
        self._process = _SERVER.Process(target=_main, args=(arguments, self._said, file_size))
        self._process.start()

    def running(self) -> bool:
        return self._process.is_alive()

    def kill(self) -> bool:
        """Kill it and say whether it was still running."""
        self._process.kill()
        return self.wait()[0] == -signal.SIGKILL

    def wait(self) -> tuple[int, str, str]:
        """Return the exit code, negative for a signal, and what it wrote to stdout and stderr."""
        self._process.join()
        code = self._process.exitcode
        assert code is not None
        out, errors = (path.read_text() for path in self._said)
        for path in self._said:
            path.unlink()
        return code, out, errors


def _main(arguments: tuple[str, ...], said: list[Path], file_size: int) -> None:
    from fp4graph.cli import main

    for number, path in enumerate(said, 1):
        os.dup2(os.open(path, os.O_WRONLY), number)
    sys.stdout, sys.stderr = (
        os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2)
    )
    signal.signal(signal.SIGINT, signal.default_int_handler)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python does: an error, not an end
    main(list(arguments), prog_name="fp4graph")
