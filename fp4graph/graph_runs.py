"""Proof that a call ran a compiled graph, and not the plain model."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fp4graph.errors import StudyError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class GraphRuns:
    """Counts how often the graphs of one compiler run.

    Dynamo falls back to the plain model without a word: where frames are skipped, in methods that
    it does not wrap such as `generate`, past its limits. The plain model's result then looks like
    that of FP4 linears without damage.
    """

    def __init__(self) -> None:
        self.count = 0

    def counted(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """Return a compiled graph whose runs are counted."""

        def run_counted(*args: Any) -> Any:
            self.count += 1
            return run(*args)

        return run_counted

    @contextmanager
    def required(self) -> Iterator[None]:
        """Check that a graph runs inside.

        Raises:
            StudyError: none did.
        """
        before = self.count
        yield
        if self.count == before:
            raise StudyError(
                "the model ran without its traced graph: the result is the dense model's"
            )
