"""The notebooks of docs run, and come to what is printed in them."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[2] / "docs/notebooks").glob("*.ipynb"))


def texts(notebook: Any) -> list[str]:
    """Return what its cells came to as plain text."""
    outputs = (out for cell in notebook.cells for out in cell.get("outputs", ()))
    return [out["data"]["text/plain"] for out in outputs if out.output_type == "execute_result"]


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_to_what_it_says(path: Path, smollm2: object) -> None:
    notebook = nbformat.read(path, as_version=4)
    kept = texts(notebook)
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    found = texts(notebook)
    assert len(found) == len(kept) > 3
    numbers = [ast.literal_eval(text) for text in kept if text.startswith("{")]
    again = [ast.literal_eval(text) for text in found if text.startswith("{")]
    assert numbers
    for one, other in zip(numbers, again, strict=True):
        assert one == pytest.approx(other, abs=2e-4)


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS
