"""Calls in a process of their own, which starts empty."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection


class ApartError(Exception):
    """A call in another process came to nothing; says why."""


def call_apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function of a module gives in a new process; what it writes to stderr is lost.

    Raises:
        ApartError: it raised, or the process was killed.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    # as bytes: they are read, and what they need is imported, once stderr is closed
    payload = pickle.dumps((function, arguments))
    child = context.Process(target=_answer, args=(theirs, payload), daemon=True)
    child.start()
    theirs.close()
    try:
        found, problem = ours.recv()
    except EOFError:
        child.join()
        raise ApartError(f"its process ended with {child.exitcode}") from None
    child.join()
    if problem:
        raise ApartError(problem)
    return found


def _answer(pipe: Connection, payload: bytes) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        function, arguments = pickle.loads(payload)
        pipe.send((function(*arguments), ""))
    except Exception as error:  # whatever the function raises is for the caller to hear of
        pipe.send((None, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"))
