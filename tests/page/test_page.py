"""The page: what it holds, what a browser makes of it, and that clicks give the right selector."""

from __future__ import annotations

import html
import json
import random
import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from support.models import tiny, tokens

import fp4graph
from fp4graph.cli import main
from fp4graph.page import gather, node_data, write_page
from fp4graph.study.selections import shortest
from fp4graph.study.store import Passage, Store
from fp4graph.study.trial import Row

ROLES = ("q", "k", "v", "o", "gate", "up", "down")
CELLS = [(role, block) for block in range(2) for role in ROLES]
STUDY = Path(__file__).parents[2] / "docs/studies/smollm2-135m"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
IDENTITY = {"protocol": 2, "model": "m", "text": "t", "dtype": "torch.float32"}
VERSIONS = {"fp4graph": "0", "torch": "2", "transformers": "5"}


def row(selector: str, kl: float, format: str | None = "nvfp4", **other: Any) -> Row:
    values = {
        **dict.fromkeys(("ppl", "dnll", "dnll_low", "dnll_high", "kl_p50", "kl_p90"), 1.0),
        **dict.fromkeys(("dnll_per_mb", "kl_per_mb", "dnll_per_mparam", "kl_per_mparam"), 1.0),
        "kl_p99": 1.0, "dnll_se": 0.1, "kl_se": kl / 10, "top1": 0.9, "linears": 1,
        "parameters": 1000, "bytes_dense": 4000, "bytes_packed": 563,
    }  # fmt: skip
    values |= other
    return Row(selector, format, "none", "rtn", "only", kl=kl, **values)


def cost(role: str, block: int) -> float:
    return 0.001 * (1 + CELLS.index((role, block)))


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Return a folder with a grid in NVFP4, scores in MXFP4, and rows of the other commands."""
    store = Store(tmp_path / "trials.sqlite")
    facts = {"model_name": "tiny</script><b>", "corpus": "a text", "scored_tokens": 64}
    run = store.begin({**facts, "command": ["fp4graph", "ablate"], "date": "2026-11-30"})
    trials = [row("none", 0.0, None)]
    trials += [row(f"{role},blocks={block}", cost(role, block)) for role, block in CELLS]
    trials.append(replace(row("all", 0.1, linears=14, bytes_packed=14 * 563), name="</td>"))
    for each in trials:
        facts = {"selector": each.selector, "format": each.format, "direction": "only"}
        identity = {**IDENTITY, **VERSIONS, **facts}
        said = ["one", " two", "\n", " <b>", " five"]
        passage = Passage(np.array([0.5, 0.25, 0, 1e-4, 1e9]), said) if each.format else None
        store.put(identity, each, run, passage)
    store.close()
    scores = [
        {
            "path": f"layers.{block}.{role}_proj", "role": role, "block": block, "format": "mxfp4",
            "activations": "none", "quantizer": "rtn", "parameters": 1000, "kl_element": 1.0,
            "kl": 2 * cost(role, block), "kl_se": 0.0001,
        }
        for role, block in CELLS
    ]  # fmt: skip
    reach = {"ratio": 2.5, "kurtosis": 9.0, "outlier_channels": 3}
    outlier = {"path": "p", "role": "q", "block": 0, "shape": [2, 2], "tokens": 9}
    beside = {
        "s.jsonl": scores,
        "o.jsonl": [{**outlier, "input": reach, "weight": reach}],
        "l.jsonl": [
            {"selector": s, "format": f, "quantizer": "rtn", "ttft_s": 1.0, "weight_bytes": w,
             "per_token_ms": {"p50": ms}}
            for s, f, w, ms in (("none", None, 56000, 10.0), ("all", "nvfp4", 14 * 563, 4.0))
        ],
        "p.jsonl": [
            {"plan": name, "bits": bits, "predicted_kl": 0.1, "measured_kl": kl}
            for name, bits, kl in (("plan", 5.0, 0.05), ("uniform", 4.5, 0.1))
        ],
    }  # fmt: skip
    for name, rows in beside.items():
        (tmp_path / name).write_text("".join(json.dumps(each) + "\n" for each in rows))
    (tmp_path / "runs.jsonl").write_text("drawn from trials\n")
    (tmp_path / "other.jsonl").write_text('\n{"kl_element": NaN, "block": null, "role": "q"}\n')
    return tmp_path


def test_holds_what_the_folder_holds(results: Path) -> None:
    found = gather(results)
    (study,) = found["studies"]
    measured, estimated = study["settings"]
    assert [(cell["role"], cell["block"]) for cell in study["cells"]] == CELLS
    assert study["roles"] == list(ROLES)
    assert measured["kl"] == pytest.approx([cost(*cell) for cell in CELLS])
    assert measured["measured"] == [1] * 14
    assert not measured["needs_data"]
    assert estimated["name"] == "mxfp4 W4A16"
    assert estimated["kl"] == pytest.approx([2 * cost(*cell) for cell in CELLS])
    assert estimated["measured"] == [0] * 14
    assert estimated["bytes"] == [531] * 14, "4.25 bits"
    assert study["outliers"] == {0: {"input": [2.5, 9.0, 3], "weight": [2.5, 9.0, 3]}}
    assert len(study["trials"]) == 16
    assert len(study["passages"]) == 15
    assert study["receipts"][0]["command"] == "fp4graph ablate"
    assert len(found["latency"]) == len(found["policy"]) == 2
    assert any(each.startswith("nvfp4 W4A16: ") and "0.10 nats" in each for each in study["words"])
    assert gather(results / "trials.sqlite") == found


def test_estimates_take_the_scale_of_what_was_measured(results: Path) -> None:
    scores = [json.loads(line) for line in (results / "s.jsonl").read_text().splitlines()]
    for each in scores:
        each["format"] = "nvfp4"
    (results / "s.jsonl").write_text("".join(json.dumps(each) + "\n" for each in scores))
    store = Store(results / "trials.sqlite")
    for role, block in CELLS[9:]:
        store._execute("DELETE FROM trials WHERE identity LIKE ?", (f"%{role},blocks={block}%",))
    store.close()
    ((setting,),) = ([study["settings"] for study in gather(results)["studies"]],)
    assert setting[0]["measured"] == [1] * 9 + [0] * 5
    assert setting[0]["kl"] == pytest.approx([cost(*cell) for cell in CELLS]), "not twice that"


def test_results_without_trials_and_without_anything(results: Path, tmp_path: Path) -> None:
    (results / "trials.sqlite").unlink()
    (study,) = gather(results)["studies"]
    assert [each["name"] for each in study["settings"]] == ["mxfp4 W4A16"]
    empty = tmp_path / "empty"
    empty.mkdir()
    for path in (empty, tmp_path / "nowhere"):
        with pytest.raises(fp4graph.StudyError, match="there are no results in"):
            gather(path)
    (empty / "cut.jsonl").write_text('{"kl_element": 1}\n{"kl_el')
    with pytest.raises(fp4graph.StudyError, match=r"cut\.jsonl, line 2"):
        gather(empty)
    (empty / "cut.jsonl").write_bytes("{}".encode("utf-16"))
    with pytest.raises(fp4graph.StudyError, match=r"cannot read .*cut\.jsonl"):
        gather(empty)


def test_the_command(results: Path) -> None:
    out = results / "p.html"
    arguments = ["page", str(results), "--out", str(out), "--node-data", str(results / "n.json")]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    text = out.read_text()
    assert "tiny</script>" not in text
    assert not re.search(r"""(src|href)=["']?http""", text), "it needs no network"
    values = json.loads((results / "n.json").read_text())["results"]
    assert values["linear_13"] == {"value": pytest.approx(cost("down", 1))}
    missing = CliRunner().invoke(main, ["page", str(results / "nowhere")])
    assert missing.exit_code == 2
    assert "there are no results" in missing.output


def test_nodes_are_called_as_torch_export_calls_them(results: Path) -> None:
    model = tiny("llama").requires_grad_(False)
    program = torch.export.export(model, (tokens(8),), {"use_cache": False}, strict=False)
    linears = [node for node in program.graph.nodes if "linear" in str(node.target)]
    stacks = {node.name: list(node.meta["nn_module_stack"].values())[-1][0] for node in linears}
    values = json.loads(node_data(gather(results)))["results"]
    assert list(values) == list(stacks)[:-1], "all but the head"
    for name, (role, block) in zip(values, CELLS, strict=True):
        assert re.search(rf"layers\.{block}\.\w+\.{role}_proj$", stacks[name])


@pytest.mark.real_model
def test_the_study_is_below_three_megabytes(tmp_path: Path) -> None:
    folder = shutil.copytree(STUDY, tmp_path / "study")
    write_page(gather(folder), tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 3e6


def run_in_browser(page: Path, script: str, width: int = 1280) -> Any:
    """Return what a script leaves in `result`; nothing may be written to the console."""
    if CHROMIUM is None:
        pytest.skip("there is no chromium: apt-get install chromium")
    after = f"<script>{script};const pre=make('pre',{{id:'result'}},JSON.stringify(result));"
    after += "document.body.append(pre);</script></body>"
    copy = page.with_name("probe.html")
    copy.write_text(page.read_text().replace("</body>", after))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    options += ["--virtual-time-budget=8000", f"--window-size={width},900", "--dump-dom"]
    options.append(f"--user-data-dir={page.parent / 'profile'}")
    done = subprocess.run(
        [CHROMIUM, *options, copy.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    found = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stdout[-500:]
    return json.loads(html.unescape(found[1]))


CLICK = (
    "const click = (what) => document.querySelector(what).dispatchEvent(new MouseEvent('click'));"
)


def test_clicks_choose_what_explain_agrees_with(results: Path, tiny_folder: Path) -> None:
    write_page(gather(results), results / "page.html")
    draw = random.Random(0)
    sets = [sorted(draw.sample(range(14), draw.randint(0, 14))) for _ in range(59)]
    sets.append(list(range(14)))
    script = f"""{CLICK} const result = {json.dumps(sets)}.map((indices) => {{
      byId('none').onclick();
      indices.forEach((i) => click(`#heat [data-index="${{i}}"]`));
      return [byId('selector').textContent, byId('command').textContent, chosen()]; }});
    click('[data-role=down]'); click('[data-block="0"]'); byId('none').onclick();
    click('[data-role=down]'); click('[data-block="0"]'); click('[data-role=down]');
    result.push([byId('selector').textContent]); byId('all').onclick();
    result.push([byId('selector').textContent]);
    byId('budget').value = 0.01; byId('budget').oninput({{ target: byId('budget') }});
    result.push([byId('selector').textContent]);"""
    *found, role_and_block, everything, least = run_in_browser(results / "page.html", script)
    model = tiny("llama")
    for indices, (selector, command, total) in zip(sets, found, strict=True):
        cells = [CELLS[i] for i in indices]
        assert selector == shortest(cells, CELLS)
        assert f"--select '{selector}' --format nvfp4" in command
        assert total["kl"] == pytest.approx(sum(cost(*cell) for cell in cells))
        assert total["now"] == 14 * 4000 - len(cells) * (4000 - 563)
        assert total["ms"] == pytest.approx(-6 * len(cells) / 14), "latency's gain, by bytes"
        if cells and indices in sets[:4]:
            report = fp4graph.explain(model, tokens(8), select=selector, use_cache=False)
            assert sorted((r.role, r.block) for r in report.selected) == sorted(cells)
    assert role_and_block == [shortest([c for c in CELLS if c[1] == 0 and c[0] != "down"], CELLS)]
    assert everything == ["all"]
    whole = found[[len(indices) for indices in sets].index(14)][1]
    name, what, asked, *options = shlex.split(whole)
    assert (name, what, asked) == ("fp4graph", "export", "tiny</script><b>")
    options[options.index("DIR")] = str(results / "exported")
    done = CliRunner().invoke(main, [what, str(tiny_folder), *options])
    assert done.exit_code == 0, done.output
    assert least == [shortest(CELLS[:4], CELLS)], "0.001 + 0.002 + 0.003 + 0.004 nats"


def test_says_where_it_hurts_and_sorts_tables(results: Path) -> None:
    write_page(gather(results), results / "page.html")
    script = """
    const every = (what) => [...document.querySelectorAll(what)];
    const spans = every('.tokens span');
    every('details').forEach((each) => (each.open = true));
    byId('setting').value = 1;
    byId('setting').onchange({ target: byId('setting') });
    show(0);
    const result = {
      tokens: spans.map((each) => each.textContent),
      said: spans.map((each) => each.title),
      title: document.title,
      stars: every('.star').length,
      plots: every('.plots svg').length,
      panel: byId('panel').textContent,
      tables: every('[data-table]').map((each) => each.dataset.table),
    };
    setTimeout(() => {
      const column = every('[data-table=trials] th').findIndex((each) => each.innerText === 'kl');
      const head = every('[data-table=trials] th button')[column];
      head.click();
      head.click();
      result.first = every('[data-table=trials] td')[column].textContent;
      byId('result').textContent = JSON.stringify(result);
    }, 500);"""
    found = run_in_browser(results / "page.html", script)
    assert found["tokens"] == ["one", " two", "\n", " <b>", " five"]
    assert found["said"][:2] == ["0.5 nats", "0.25 nats"]
    assert found["title"].startswith("tiny</script><b>, a text")
    assert found["plots"] == 3
    assert found["stars"] == 1
    assert "KL, estimated0.002" in found["panel"]
    assert "kurtosis 9, 3 channels" in found["panel"]
    assert found["first"] == "0", "the dense model's, sorted by KL upwards"
    assert found["tables"] == ["trials", "linears", "outliers", "latency", "plans", "runs"]


@pytest.mark.real_model
def test_a_click_in_a_large_study_is_fast_and_a_phone_shows_it_all(tmp_path: Path) -> None:
    folder = shutil.copytree(STUDY, tmp_path / "study")
    write_page(gather(folder), tmp_path / "page.html")
    script = f"""{CLICK} const start = performance.now();
    for (let i = 0; i < 20; i += 1) click(`#heat [data-index="${{7 * i}}"]`);
    const result = {{ ms: (performance.now() - start) / 20,
      wider: document.documentElement.scrollWidth - innerWidth }};"""
    for width in (1280, 500):
        found = run_in_browser(tmp_path / "page.html", script, width)
        assert found["ms"] < 100
        assert found["wider"] <= 0, "nothing but the map and tables scrolls sideways"
