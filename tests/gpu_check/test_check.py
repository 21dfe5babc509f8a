"""The whole check with a device that is this CPU, and the command without one."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from click.testing import CliRunner
from support.fake_device import FakeDevice
from support.models import tiny

import fp4graph
from fp4graph.cli import main
from fp4graph.gpu_check import check, exact, whole
from fp4graph.gpu_check.check import Work
from fp4graph.gpu_check.speed import best_over_dense, speeds
from fp4graph.gpu_check.told import table_of_speeds, tables, to_json, verdict
from fp4graph.kernels.cpu import CPU
from fp4graph.study.progress import SILENT

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from fp4graph.gpu_check.device import Device
    from fp4graph.gpu_check.found import Found
    from fp4graph.study.latency import LatencyRow


def tiny_generation(device: Device) -> Iterable[LatencyRow]:
    model = tiny("llama").bfloat16().to(device.where)
    return fp4graph.study.latency(
        model, whole.SELECTORS, inner="eager", prompt_tokens=8, new_tokens=4, progress=SILENT
    )


WORK = Work(
    exact=((64, 128, 1), (100, 300, 33)), faults=(16,), cuts=((64, 128, 1),),
    times=((64, 128, 1), (64, 128, 64)), model=tiny_generation,
)  # fmt: skip
NO_MODEL = replace(WORK, exact=WORK.exact[:1])


def seconds(name: str) -> float:
    return {"F.linear": 8e-6, "nvfp4 cpu": 4e-6, "mxfp4 cpu": 16e-6}.get(name, 2e-6)


def test_a_whole_check() -> None:
    saved: list[dict[str, Any]] = []
    found = check(FakeDevice(seconds), WORK, save=lambda found: saved.append(to_json(found)))
    assert found.is_right, found.errors
    assert len(saved) == 1 + len(found.rows)
    last = json.loads(json.dumps(saved[-1]))
    assert last["environment"] == {"gpu": "a fake", "target": "cpu"}
    assert [row["ok"] for row in last["exact"]] == [True] * 4
    assert all(row["found"] for row in last["faults"])
    assert last["cuts"] == []  # a CPU has no fragment kernel
    assert {row["selector"] for row in last["model"]} == {"none", *whole.SELECTORS}
    assert all(row["recompiles"] == 0 for row in last["model"])
    assert last["seconds"].keys() == found.rows.keys()
    text = "\n".join(verdict(found))
    assert "4 of 4 results equal float64" in text
    assert "2.00 at 1, 2.00 at 64" in text
    assert "with `all` in nvfp4" in text
    assert "x F.linear" in str(next(tables(found)))


def test_the_largest_model_that_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole.models, "load", lambda name, *_, **__: name)
    for room, name in [(60e9, "qwen2.5-7b-random"), (4e9, "qwen2.5-0.5b-random")]:
        monkeypatch.setattr(whole, "available", lambda _, room=room: room)
        assert whole.load(FakeDevice()) == name
    monkeypatch.setattr(whole, "available", lambda _: 1e9)
    with pytest.raises(
        fp4graph.ModelError, match=r"1\.0 GB are free on cpu: too little for a model"
    ):
        whole.load(FakeDevice())


def test_times_are_paired_and_beside_a_read() -> None:
    rows = list(speeds(FakeDevice(seconds), 64, 128, 4))
    dense, nvfp4, mxfp4 = rows
    assert (dense.variant, nvfp4.variant, mxfp4.variant) == ("F.linear", "nvfp4 cpu", "mxfp4 cpu")
    assert (dense.over_dense, nvfp4.over_dense, mxfp4.over_dense) == (1, 2, 0.5)
    assert nvfp4.us == pytest.approx(4 * 1.7)  # the drift's median
    read = 64 * 128 // 2 + 64 * 128 // 16
    packed = nvfp4.gb_per_s * nvfp4.us * 1e3
    assert nvfp4.of_read == pytest.approx(0.5 * packed / read)
    assert best_over_dense(rows) == {4: 2}
    others = [
        replace(nvfp4, variant=f"{name} scaled_mm", over_dense=9.0)
        for name in ("nvfp4 W4A4", "fp8 W8A8")
    ]
    assert best_over_dense([*rows, *others]) == {4: 2}


def test_what_torch_lacks_has_a_row_that_says_why() -> None:
    found = {row.variant: row for row in speeds(FakeDevice(target="cuda:sm_100"), 128, 256, 4)}
    assert {"torch int4", "torch fp8 W8A8", "torch nvfp4 W4A4"} < found.keys()
    assert all(row.us is None for name, row in found.items() if row.reason)
    assert found["F.linear"].over_dense == 1
    assert "Error: " in found["torch int4"].reason
    text = str(table_of_speeds(list(found.values()), "title"))
    assert "torch int4: " in text


def test_what_is_wrong_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(x: torch.Tensor, *tensors: torch.Tensor | None) -> torch.Tensor:
        return CPU.ops["nvfp4"](x, *tensors) * 1.5

    monkeypatch.setattr(exact, "KERNELS", (replace(CPU, ops={"nvfp4": wrong}),))
    found = check(FakeDevice(seconds), replace(NO_MODEL, model=_no_model))
    assert not found.is_right
    text = "\n".join(verdict(found))
    assert "0 of 1 results equal float64" in text
    assert "WRONG: cpu nvfp4 bfloat16 64x128, 1 rows" in text
    assert "model: 1 failed" in text
    assert "no room" in text


def test_a_fault_that_is_not_seen_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fp4graph.gpu_check.faults.of_bound", lambda *_: 0.5)
    found = check(FakeDevice(seconds), replace(NO_MODEL, times=(), model=_no_model))
    assert not found.is_right
    assert "NOT FOUND: cpu nvfp4, 16 rows, tensor 0" in "\n".join(verdict(found))


def test_time_that_runs_out_is_said() -> None:
    ticks = itertools.count(0, 100)  # each look at the clock is 100 seconds later
    found = check(
        FakeDevice(seconds), replace(WORK, model=_no_model), clock=lambda: float(next(ticks))
    )
    assert found.left_out["exact"] == ["100x300, 33 rows"]
    assert found.left_out["faults"] == ["16 rows"]
    assert "exact: no time for 1" in verdict(found)


def test_an_interrupt_keeps_what_was_found() -> None:
    saved: list[Found] = []

    def stop(device: Device) -> Iterable[LatencyRow]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check(FakeDevice(seconds), replace(NO_MODEL, model=stop), save=saved.append)
    assert saved[-1].rows["exact"]


def _no_model(device: Device) -> Iterable[LatencyRow]:
    raise MemoryError("no room")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["gpu-check"])
    assert result.exit_code == 0
    assert "no GPU: nothing measured" in result.stdout
    assert list(tmp_path.iterdir()) == []
    file = tmp_path / "deep" / "found.json"
    result = CliRunner().invoke(main, ["gpu-check", "--json", str(file)])
    assert result.exit_code == 0
    found = json.loads(file.read_text())
    assert found["measured"] is False
    assert found["verdict"] == ["no GPU: nothing measured"]
    assert "sees 0 GPUs" in CliRunner().invoke(main, ["gpu-check", "--device", "cuda"]).stderr
