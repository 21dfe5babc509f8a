"""Trials on a real Ray cluster of two workers: the same table, whatever dies."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import torch
from support.cluster import another, loaded, lost
from support.models import tiny, tokens

import fp4graph
from fp4graph.study import ablate
from fp4graph.study.cluster import Where
from fp4graph.study.progress import Progress
from fp4graph.study.results import open_results

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.slow
ray = pytest.importorskip("ray")
TOKENS = tokens(16, batch=4)
WANTED: dict[str, Any] = {"by": ("role", "block"), "format": ("nvfp4", "mxfp4")}


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 # Ray's name; or the workers starve
    where = str(Path(__file__).parents[1])
    environment = {"env_vars": {"PYTHONPATH": where, "OMP_NUM_THREADS": "1"}}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums in the order of a worker, which has half of the processors."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def processes() -> list[psutil.Process]:
    """Return the workers' processes."""
    found = psutil.Process().children(recursive=True)
    return [each for each in found if "ray::_Worker" in " ".join(each.cmdline())]


class Kills(Progress):
    """Kills a worker when the third result is there."""

    def __init__(self) -> None:
        self.killed: list[int] = []
        self.ends = 0

    def ended(self, what: str, row: object, *, kept: bool = False) -> None:
        self.ends += 1
        if self.ends == 3:
            worker = processes()[0]
            self.killed.append(worker.pid)
            os.kill(worker.pid, signal.SIGKILL)


def test_the_table_is_the_serial_run_s_though_a_worker_is_killed(tmp_path: Path) -> None:
    kills = Kills()
    spread = ablate(
        loaded(), TOKENS, out=tmp_path / "ray", on="ray", workers=2, progress=kills, **WANTED
    )
    serial = ablate(loaded(), TOKENS, out=tmp_path / "one", progress=Progress(), **WANTED)
    assert kills.killed
    assert kills.ends == len(spread) == 1 + 2 * (7 + 2)
    assert spread.rows == serial.rows
    found = {name: open_results(tmp_path / name) for name in ("ray", "one")}
    text = found["one"].all()[0].identity["text"]
    assert found["ray"].passages(text) == found["one"].passages(text)
    keys = [{each.key for each in store.all()} for store in found.values()]
    assert keys[0] == keys[1]
    assert all(run["machine"] for run in found["ray"].runs())


def test_what_is_kept_is_not_run_again_and_ctrl_c_loses_nothing(tmp_path: Path) -> None:
    class Stops(Progress):
        ends = 0

        def ended(self, what: str, row: object, *, kept: bool = False) -> None:
            self.ends += 1
            if self.ends == 2 and not kept:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ablate(loaded(), TOKENS, by="block", out=tmp_path, on="ray", progress=Stops())
    assert len(open_results(tmp_path).all()) == 2

    class Counts(Progress):
        kept = 0

        def ended(self, what: str, row: object, *, kept: bool = False) -> None:
            self.kept += kept

    counts = Counts()
    table = ablate(loaded(), TOKENS, by="block", out=tmp_path, on="ray", progress=counts)
    assert counts.kept == 2
    assert [row.selector for row in table] == ["none", "blocks=0", "blocks=1"]
    assert (tmp_path / "ablation.jsonl").is_file()


def test_a_worker_without_a_place_is_not_waited_for(tmp_path: Path) -> None:
    """A machine whose processors are taken by others."""
    holder = ray.remote(num_cpus=1)(type("Holder", (), {"ready": lambda self: None})).remote()
    ray.get(holder.ready.remote())
    table = ablate(
        loaded(), TOKENS, by="block", out=tmp_path, on="ray", workers=2, progress=Progress()
    )
    ray.kill(holder)
    assert [row.selector for row in table] == ["none", "blocks=0", "blocks=1"]


def test_what_cannot_be_spread() -> None:
    with pytest.raises(fp4graph.OptionError, match="each worker loads the model"):
        ablate(tiny("llama").requires_grad_(False), TOKENS, on="ray", progress=Progress())
    with pytest.raises(fp4graph.OptionError, match=r"expected ray, or ray://HOST:PORT"):
        ablate(loaded(), TOKENS, on="slurm")
    with pytest.raises(fp4graph.OptionError, match=r"3 workers are asked for, .* 2 processors"):
        ablate(loaded(), TOKENS, by="role", on="ray", workers=3, progress=Progress())
    with pytest.raises(fp4graph.OptionError, match="expected 1 or more"):
        Where("ray", 0)


def test_errors_of_workers_are_the_trial_s() -> None:
    with pytest.raises(fp4graph.StudyError, match="the dense model: nothing loads by the name"):
        ablate(lost(), TOKENS, on="ray", workers=1, progress=Progress())
    with pytest.raises(fp4graph.StudyError, match="loads another model by the name"):
        ablate(another(), TOKENS, on="ray", workers=1, progress=Progress())
