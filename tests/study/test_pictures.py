"""Pictures: everybody tells colours apart, nothing lies over anything, no kind is left out."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from support.trials import row

from fp4graph import OptionError, StudyError
from fp4graph.study import plot, plot_scores, plot_style
from fp4graph.study.plot import draw
from fp4graph.study.plot_scores import draw_cells, draw_points
from fp4graph.study.plot_style import COLORS, HATCHES, MAP, MARKERS, color_scale, in_model_order

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure

ROLES = ("q", "k", "v", "o", "gate", "up", "down")
DEUTERANOPIA = np.array(  # Machado, Oliveira and Fernandes 2009, severity 1, of linear RGB
    [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ]
)  # fmt: skip
PROTANOPIA = np.array(
    [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ]
)  # fmt: skip


def lab(rgb: Any) -> Any:
    """Return CIE L*a*b* of linear RGB, D65."""
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    x = to_xyz @ np.clip(rgb, 0, 1) / np.array([0.9505, 1.0, 1.089])
    f = np.where(x > 0.008856, np.cbrt(x), 7.787 * x + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def seen(color: Any, eye: Any) -> Any:
    rgb = np.array(to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return lab(eye @ linear)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every picture that is saved, as a figure."""
    found: list[Figure] = []
    real = plot_style.save

    def keep(figure: Figure, path: Path) -> None:
        real(figure, path)
        found.append(figure)

    monkeypatch.setattr(plot, "save", keep)
    monkeypatch.setattr(plot_scores, "save", keep)
    return found


def trials(blocks: int = 4, **changes: object) -> list[Any]:
    found = [row("none", 0.0, format=None, kl_se=0.0, dnll_se=0.0)]
    for format, mode, direction in itertools.product(
        ("nvfp4", "mxfp4"), ("none", "same"), ("only", "except")
    ):
        how = {"format": format, "activations": mode, "kl_se": 0.001, **changes}
        names = [*ROLES, *(f"blocks={block}" for block in range(blocks))]
        names += [f"{role},blocks={block}" for role in ROLES for block in range(blocks)]
        found += [row(name, 0.01 + 0.001 * n, direction, **how) for n, name in enumerate(names)]
        found += [row("all", 0.9, "only", **how)]
    return found


@pytest.mark.parametrize("eye", [DEUTERANOPIA, PROTANOPIA])
def test_a_red_green_blind_reader_tells_kinds_and_values_apart(eye: Any) -> None:
    for (one, _), (other, _) in itertools.combinations(zip(COLORS, MARKERS, strict=True), 2):
        assert np.linalg.norm(seen(one, eye) - seen(other, eye)) > 10, (one, other)
    assert len(set(MARKERS)) == len(set(HATCHES)) == len(COLORS) == 8
    lightness = [seen(mpl.colormaps[MAP](x)[:3], eye)[0] for x in np.linspace(0, 1, 32)]
    assert all(a > b + 0.5 for a, b in itertools.pairwise(lightness)), "darker is worse"


def test_every_picture_as_it_is_seen(figures: list[Figure], tmp_path: Path) -> None:
    draw(trials(), "all kinds", tmp_path / "a.png")
    points = [(0.01 * n, 0.011 * n, role) for n, role in enumerate(ROLES, 1)]
    draw_points({"nvfp4": points}, "estimated, nats", "measured, nats", "t", tmp_path / "b.png")
    cells = {(role, block): 0.1 + block for role in ROLES for block in range(3)}
    draw_cells({"nvfp4": cells}, "KL, nats", "t", tmp_path / "c.png")
    for figure in figures:
        for axis in figure.axes:
            marks = {patch.get_facecolor()[:3] for patch in axis.patches}
            marks |= {tuple(each.get_facecolor()[0][:3]) for each in axis.collections
                      if len(each.get_facecolor()) and axis.get_xlabel()}  # fmt: skip
            for eye in (DEUTERANOPIA, PROTANOPIA):
                for one, other in itertools.combinations(marks, 2):
                    assert np.linalg.norm(seen(one, eye) - seen(other, eye)) > 10
            if axis.images:
                assert axis.images[0].get_cmap().name == MAP


def test_axes_are_named_with_their_units(figures: list[Figure], tmp_path: Path) -> None:
    draw(trials(), "all kinds", tmp_path / "a.png")
    points = [(0.01 * n, 0.011 * n, "q") for n in range(1, 7)]
    draw_points({"nvfp4": points}, "estimated, nats", "measured, nats", "t", tmp_path / "b.svg")
    for figure in figures:
        for axis in figure.axes:
            if axis.get_label() == "<colorbar>":
                assert "nats" in axis.get_ylabel()
                continue
            assert axis.get_xlabel()
            assert axis.get_ylabel()
            said = axis.get_xlabel() + axis.get_ylabel()
            assert axis.images or "nats" in said, said


def test_the_plan_of_the_paper_gives_a_panel_a_kind(figures: list[Figure], tmp_path: Path) -> None:
    draw(trials(blocks=32), "paper", tmp_path / "paper.png")
    (figure,) = figures
    maps = [axis for axis in figure.axes if axis.images]
    assert len(maps) == 2 * 2 * 2, "format, mode, direction"
    assert figure.get_figheight() * 120 < 8000
    assert figure.get_figwidth() * 120 < 2500
    assert [text.get_text() for text in maps[0].get_yticklabels()] == list(ROLES)
    legends = [axis.get_legend() for axis in figure.axes if axis.get_legend()]
    names = {text.get_text() for legend in legends for text in legend.get_texts()}
    assert names == {"nvfp4", "mxfp4"}, "formats stand beside each other"


def test_what_was_not_measured_is_hatched_and_counted(
    figures: list[Figure], tmp_path: Path
) -> None:
    few = [row("q,blocks=0", 0.1), row("v,blocks=2", 0.0, kl_se=0.01), row("down,blocks=1", 0.2)]
    draw(few, "few", tmp_path / "few.png")
    axis = figures[0].axes[0]
    assert "(3 of 9 measured, others hatched)" in axis.get_title()
    assert axis.patch.get_hatch()
    assert np.isnan(np.ma.filled(axis.images[0].get_array(), np.nan)).sum() == 6
    texts = {text.get_text() for text in axis.texts}
    assert {"0.1", "0.2"} <= texts or {"100", "200"} <= texts
    assert any(text.startswith("~") for text in texts), "within two errors of nothing"


def test_nothing_lies_over_anything_with_long_names(figures: list[Figure], tmp_path: Path) -> None:
    long = [f"all,!(gate,blocks={n})" + f",!(up,blocks={n})" * 40 for n in range(60)]
    title = "a/very/long/path/" * 12
    draw(
        [row(name, 0.01 * n, kl_se=0.002) for n, name in enumerate(long)], title, tmp_path / "l.png"
    )
    (figure,) = figures
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    (axis,) = figure.axes
    boxes = [axis.get_window_extent(renderer), figure._suptitle.get_window_extent(renderer)]
    labels = [label.get_window_extent(renderer) for label in axis.get_yticklabels()]
    assert len(labels) == 40
    for one, other in itertools.combinations([*boxes, *labels], 2):
        assert not one.overlaps(other)
    width, height = figure.get_size_inches() * figure.dpi
    for box in (*boxes, *labels):
        assert box.x0 >= 0
        assert box.x1 <= width + 1
        assert box.y1 <= height + 1


@pytest.mark.parametrize(
    "ending, start", [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")]
)
def test_formats_of_pictures(tmp_path: Path, ending: str, start: bytes) -> None:
    path = tmp_path / f"picture.{ending}"
    draw([row("q", 0.1), row("v", 0.2)], "t", path)
    assert path.read_bytes().startswith(start)


def test_what_cannot_be_drawn(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"ends with \.png, \.svg, \.pdf"):
        draw([row("q", 0.1)], "t", tmp_path / "a.jpg")
    with pytest.raises(StudyError, match="no trial"):
        draw([row("none", 0.0, format=None)], "t", tmp_path / "a.png")
    with pytest.raises(StudyError, match="nothing that was measured"):
        draw_points({}, "x", "y", "t", tmp_path / "a.png")
    with pytest.raises(StudyError, match="no linear in a block"):
        draw_cells({"a": {}}, "x", "t", tmp_path / "a.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(StudyError, match="cannot write"):
        draw([row("q", 0.1)], "t", tmp_path / "folder.png")


def test_scales_and_orders() -> None:
    assert in_model_order(["down", "lm_head", "q", "odd", "v"])[:3] == ["q", "v", "down"]
    assert type(color_scale([0.001, 1.0])).__name__ == "LogNorm"
    assert color_scale([0.5, 1.0]).vmin == 0.0
    assert color_scale([0.5, 1.0], from_zero=False).vmin == 0.5
    assert color_scale([0.0]).vmax == 1.0
