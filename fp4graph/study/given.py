"""What users give a study, read: a model, tokens, selections, calibrations."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn

from fp4graph import Calibration, CorpusError, ModelError, Policy, Selector
from fp4graph.models import LoadedModel
from fp4graph.study.evaluate import Windows
from fp4graph.study.plan import Group
from fp4graph.study.trial import DENSE, Trial

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fp4graph.policy import Select

    Texts = str | Sequence[str]
    Selects = Select | Sequence[Select]
    Packed = nn.Module | LoadedModel | Sequence[nn.Module | LoadedModel]
    Calibrations: TypeAlias = Calibration | str | Path | Sequence[Calibration | str | Path]


def plan_of(
    select: Selects,
    format: Texts,
    activations: Texts,
    quantizer: Texts,
    name: Texts = (),
    calibration: Calibrations = (),
    direction: str = "only",
    packed: Packed = (),
) -> list[Trial]:
    """Return the dense model, each selection in every way, and then models that were converted.

    Raises:
        OptionError: a value that does not exist.
        SelectorError: a selector that cannot be parsed.
    """
    codes = read_calibrations(calibration)
    ways = (texts_of(format), texts_of(activations), texts_of(quantizer), direction)
    found: list[Trial] = []
    names = itertools.chain(texts_of(name), itertools.repeat(""))
    for each, called in zip(selects_of(select), names, strict=False):
        found += Group((each,), (), (called,) if called else (), *ways).read(codes).trials()
    found = found or [DENSE]
    return list(dict.fromkeys((*found, *packed_trials(packed))))


def packed_trials(packed: Packed) -> list[Trial]:
    """Return the trials of models that were converted.

    Raises:
        ModelError: one was not.
    """
    several = [packed] if isinstance(packed, nn.Module | LoadedModel) else packed
    return [Trial.of_packed(_loaded(each)) for each in several]


def read_calibrations(given: Calibrations) -> list[Calibration]:
    """Return calibrations as they are given, or as their files hold them.

    Raises:
        CalibrationError: a file that cannot be read.
    """
    several = [given] if isinstance(given, Calibration | str | Path) else given
    return [each if isinstance(each, Calibration) else Calibration.load(each) for each in several]


def texts_of(given: Texts) -> tuple[str, ...]:
    """Return one text or several as several."""
    return (given,) if isinstance(given, str) else tuple(given)


def selects_of(given: Selects) -> tuple[Select, ...]:
    """Return one selection or several as several."""
    if isinstance(given, str | Selector | Policy | Mapping):
        return (given,)
    return tuple(given)


@contextmanager
def in_evaluation(model: nn.Module | LoadedModel) -> Iterator[LoadedModel]:
    """Yield a model that is ready to be measured: in evaluation mode, which ends with the study.

    Raises:
        ModelError: it is no module.
    """
    if isinstance(model, LoadedModel):
        yield model
        return
    other: object = model  # the annotation is no promise
    if not isinstance(other, nn.Module):
        hint = "fp4graph.models.load(name) loads one" if isinstance(model, str) else "expected one"
        raise ModelError(f"model={model!r} is no torch.nn.Module: {hint}")
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield _loaded(model)
    finally:
        for module in training:
            module.training = True


def _loaded(model: nn.Module | LoadedModel) -> LoadedModel:
    if isinstance(model, LoadedModel):
        return model
    config = getattr(model, "config", None)
    return LoadedModel(getattr(config, "name_or_path", "") or type(model).__name__, model, None)


def windows_of(loaded: LoadedModel, tokens: Tensor | Windows) -> Windows:
    """Return tokens as windows that a model can take.

    Raises:
        CorpusError: it cannot.
    """
    windows = tokens if isinstance(tokens, Windows) else None
    ids = tokens if windows is None else windows.ids
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.dtype != torch.int64:
        what = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise CorpusError(f"tokens: expected int64 [windows, length], got {what}")
    if not ids.shape[0] or ids.shape[1] < 2:
        raise CorpusError(f"tokens {list(ids.shape)}: a window needs 2 tokens, and one is needed")
    vocabulary = loaded.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        spread = f"{int(ids.min())} to {int(ids.max())}"
        raise CorpusError(f"tokens are {spread}, and the model knows 0 to {vocabulary - 1}")
    return windows or Windows(ids.cpu(), first=1)


def short(corpus: str) -> str:
    """Return what a corpus is called in titles: of a file its name."""
    return corpus if corpus.startswith("hf:") else Path(corpus).name


def title_of(loaded: LoadedModel, windows: Windows, corpus: str) -> str:
    """Return what a study is called: model, text, tokens, dtype."""
    dtype = str(next(loaded.model.parameters()).dtype).removeprefix("torch.")
    text = short(corpus) or f"text {windows.digest()}"
    return f"{loaded.name}, {text}, {windows.ids.numel()} tokens, {dtype}"
