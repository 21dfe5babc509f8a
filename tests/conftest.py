"""Fixtures: a clean Dynamo for each test, a tiny model on disk, the real model once."""

from __future__ import annotations

import os
from functools import cache
from typing import TYPE_CHECKING

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: tests ask no hub

import pytest
import torch
from hypothesis import HealthCheck, settings
from kernels import proofs
from support.models import byte_tokenizer, tiny

import fp4graph.models
from fp4graph.private import setting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


# a machine that stands still for seconds says nothing about a test
settings.register_profile("any", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any")


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "run proofs of sources that did not change too (make proofs)"
    parser.addoption("--proofs", action="store_true", help=text)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--proofs"):
        return
    for item in items:
        mark = item.get_closest_marker("proof")
        if mark and proofs.holds(*mark.args):
            item.add_marker(pytest.mark.skip(reason="proven for these sources: make proofs"))


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    names = ("recompile_limit", "accumulated_recompile_limit")  # a Backend raises these for good
    entries = [setting(name) for name in names]
    before = [entry.default for entry in entries]
    torch._dynamo.reset()
    yield
    for entry, default in zip(entries, before, strict=True):
        entry.default = default


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Save a random model of a family with a byte tokenizer, as `from_pretrained` wants it."""

    @cache
    def save(family: str) -> Path:
        folder = tmp_path_factory.mktemp(f"tiny-{family}")
        tiny(family, vocab=300).save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def tiny_folder(folder_of: Callable[[str], Path]) -> Path:
    """Save a random Llama."""
    return folder_of("llama")


@pytest.fixture(scope="session")
def smollm2() -> fp4graph.models.LoadedModel:
    """Load the real model."""
    return fp4graph.models.load(fp4graph.models.SMOLLM2)
