"""The page as a file, and what Model Explorer shows on a graph."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined

from fp4graph import StudyError
from fp4graph.files import write_text

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_GRADIENT = ("#ffffd9", "#41b6c4", "#081d58")


def write_page(found: Mapping[str, Any], out: Path) -> None:
    """Write one HTML file that needs nothing else.

    Args:
        found: see `gather`.
        out: the file.

    Raises:
        StudyError: it cannot be written.
    """
    folder = files("fp4graph.page")
    parts = {name: (folder / f"page.{name}").read_text("utf-8") for name in ("css", "js", "html")}
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    text = environment.from_string(parts["html"]).render(
        title=found["studies"][0]["title"],
        css=parts["css"],
        js=parts["js"],
        data=json.dumps(found, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
        version=version("fp4graph"),
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
    )
    try:
        write_text(out, text)
    except OSError as error:
        raise StudyError(f"cannot write {out}: {error}") from None


def node_data(found: Mapping[str, Any]) -> str:
    """Return the first study's KL by linear as node data of Model Explorer, JSON.

    Nodes are called as `torch.export` calls them where each role is one linear in each block and
    they run in the model's order: `linear`, `linear_1`, and so on.

    Raises:
        StudyError: nothing says what linears cost.
    """
    study = found["studies"][0]
    if not study["settings"]:
        raise StudyError("nothing says what single linears cost: run ablate or sensitivity")
    setting = study["settings"][0]
    stops = enumerate(_GRADIENT)
    gradient = [{"stop": at / (len(_GRADIENT) - 1), "bgColor": color} for at, color in stops]
    names = ("linear", *(f"linear_{place}" for place in range(1, len(setting["kl"]))))
    values = zip(names, setting["kl"], strict=True)
    results = {name: {"value": kl} for name, kl in values if kl is not None}
    name = f"KL, nats, {setting['name']}"
    return json.dumps({"results": results, "name": name, "gradient": gradient}, indent=1)
