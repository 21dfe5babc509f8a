"""Tests lie where what they test lies."""

from pathlib import Path

import fp4graph

PACKAGE = Path(fp4graph.__file__).parent
TESTS = Path(__file__).parent


def folders(root: Path) -> set[str]:
    return {path.name for path in root.iterdir() if any(path.glob("*.py"))}


def test_every_package_has_its_tests() -> None:
    assert folders(TESTS) - {"support"} == folders(PACKAGE)
