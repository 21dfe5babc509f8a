"""A checkpoint, read so that nothing of it or of the model is left out without a word."""

from __future__ import annotations

import json
import logging
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from fp4graph.errors import ModelError
from fp4graph.files import read_text
from fp4graph.quantizers import is_plain

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from torch import nn

_SHOWN = 3
_TALKERS = ("modeling_utils", "distributed.tensor_parallel")


def read_checkpoint(
    source: str | Path | None,
    dtype: torch.dtype | str,
    allow: Sequence[str] = (),
    kind: Any = transformers.AutoModelForCausalLM,
    **options: Any,
) -> Any:
    """Load a causal language model of transformers, each of its weights from the checkpoint.

    transformers draws weights at random that a checkpoint lacks, and leaves out those that the
    model has no place for, with a warning at most.

    Args:
        source: folder or hub id; None where `options` have the tensors, `state_dict`.
        dtype: of all weights; `auto`: the checkpoint's own.
        allow: patterns of names (`fnmatch`) that may be missing, unexpected or of another shape.
            What is drawn for them is the same each time.
        kind: class of the model.
        options: further ones of `from_pretrained`.

    Raises:
        ModelError: weights are missing, unexpected or misshapen; names them.
    """
    state = torch.get_rng_state()
    torch.manual_seed(0)
    try:
        with _quiet():
            model, info = kind.from_pretrained(
                source,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # to be named with the others
                **options,
            )
    finally:
        torch.set_rng_state(state)
    problems = {
        "lacks": sorted(info["missing_keys"]),
        "has no place in the model for": sorted(info["unexpected_keys"]),
        "has another shape for": sorted(name for name, *_ in info["mismatched_keys"]),
    }
    said = []
    for problem, names in problems.items():
        left = [name for name in names if not any(fnmatchcase(name, each) for each in allow)]
        if left:
            more = f" and {len(left) - _SHOWN} more" if len(left) > _SHOWN else ""
            said.append(f"the checkpoint {problem} {', '.join(left[:_SHOWN])}{more}")
    if info["error_msgs"]:
        said.append(str(info["error_msgs"][0]))
    if said:
        raise ModelError(
            f"{'; '.join(said)}; transformers would draw what is missing at random: where that is "
            "meant, allow these names (--allow-weights PATTERN, allow_weights=[...])"
        )
    return model


def check_whole(folder: Path) -> None:
    """Check that a folder's safetensors files are all there and whole, by their heads alone.

    A folder without any is whole too: a configuration is enough to see what a model would be.

    Raises:
        ModelError: a file is missing or cut short; names it.
    """
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    files = set(folder.glob("*.safetensors"))
    if index.is_file():
        listed = json.loads(read_text(index))["weight_map"].values()
        files |= {folder / name for name in listed}
    for file in sorted(files):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{file.name} is missing or not whole ({error})") from None


def check_dense(model: nn.Module) -> None:
    """Check that a model's weights are dense, for FP4 is measured against dense weights.

    Raises:
        ModelError: a weight is quantised already; names it.
    """
    for name, parameter in model.named_parameters():
        small = parameter.element_size() < torch.float16.itemsize
        if small or not parameter.is_floating_point() or not is_plain(parameter):
            kind = type(parameter.data).__name__ if not is_plain(parameter) else parameter.dtype
            raise ModelError(
                f"its weights are quantised already ({name} is a {kind}): FP4 is measured against "
                "dense weights, so give the dense checkpoint"
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what transformers says of a checkpoint's weights: ours says it once.

    Its rules of sharding are for dense weights' names, and it takes this quiet for a wish to hear
    of each layer that they miss.
    """
    loggers = [logging.getLogger(f"transformers.{name}") for name in _TALKERS]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
