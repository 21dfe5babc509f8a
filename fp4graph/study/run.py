"""An ablation from trials that were read to the folder of results."""

from __future__ import annotations

import math
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fp4graph.study import results
from fp4graph.study.ablate import Ablation
from fp4graph.study.cluster import Job, run_on_ray
from fp4graph.study.plan import by_information
from fp4graph.study.store import Store

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fp4graph.models import LoadedModel
    from fp4graph.study.cluster import Where
    from fp4graph.study.evaluate import Windows
    from fp4graph.study.plan import Combinations
    from fp4graph.study.probe import Probe
    from fp4graph.study.progress import Progress
    from fp4graph.study.table import Table
    from fp4graph.study.trial import Row, Trial


def run_trials(
    loaded: LoadedModel,
    windows: Windows,
    groups: Sequence[Combinations],
    out: Path | str | None,
    progress: Progress,
    *,
    probe: Probe | None = None,
    budget: float | None = None,
    corpus: str = "",
    where: Where | None = None,
) -> Table:
    """Run trials that were read; arguments and errors as in `ablate`."""
    with _folder(out) as folder:
        store = Store(None if out is None else folder / results.STORE)
        about = {"corpus": corpus}
        ablation = Ablation(loaded, windows, store, folder, probe, about)
        todo = _todo(ablation, groups, progress, by_budget=budget is not None)
        forecast = ablation.forecast(todo)
        progress.note(str(forecast))
        if budget is not None and forecast.seconds:
            ends = forecast.done_in(budget)
            progress.note(f"a budget of {budget / 60:g} min is enough for about {ends} of them")
        seconds = math.inf if budget is None else budget
        found: dict[int, Row] = {}  # by their place in the plan
        try:
            if where is None:
                found.update(enumerate(ablation.run(todo, progress, seconds)))
            else:
                job = Job.of(loaded, windows, probe, about, todo)
                found.update(run_on_ray(ablation, store, job, where, progress, seconds))
        finally:
            rows = [found[place] for place in sorted(found)]
            if out is not None and rows:
                results.write(store, folder)
            store.close()
        title = results.title_of(ablation.provenance(), ablation.identity)
    return results.table_of(rows, title, len(todo) - len(rows))


def _todo(
    ablation: Ablation, groups: Sequence[Combinations], progress: Progress, *, by_budget: bool
) -> list[Trial]:
    """Return the trials, checked against the model."""
    if ablation.whole_because:
        progress.note(f"every trial runs the whole model: {ablation.whole_because}")
    report = ablation.report()
    if report.refused:
        first = report.refused[0]
        progress.note(
            f"{len(report.refused)} linears stay dense in every trial, such as {first.path}: "
            f"{first.reason}"
        )
    found = (trial for group in groups for trial in group.trials(report))
    plan = list(dict.fromkeys(found))
    ablation.check(plan)
    return by_information(plan, ablation.sizes(plan)) if by_budget else plan


@contextmanager
def _folder(out: Path | str | None) -> Iterator[Path]:
    """Yield where to write: a folder of the user's, or one that is gone afterwards."""
    if out is not None:
        yield Path(out)
        return
    with tempfile.TemporaryDirectory(prefix="fp4graph-") as folder:
        yield Path(folder)
