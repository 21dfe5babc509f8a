"""GGUF files, converted once: transformers takes 20 s to unpack one in Python, each time."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from fp4graph.cache import cache_folder
from fp4graph.errors import ModelError
from fp4graph.pretrained import read_checkpoint
from fp4graph.skeleton import check_memory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

_LOG = logging.getLogger("fp4graph.gguf")


def load_gguf(
    file: Path, dtype: torch.dtype, allow: Sequence[str] = (), **options: Any
) -> tuple[nn.Module, Any]:
    """Load a model and its tokenizer from a GGUF file, through a converted copy in the cache.

    The copy is in float32, which holds every value of the file's own quantisation, and lies in
    FP4GRAPH_CACHE, or else in `fp4graph` of the user's cache folder, by a hash of the file. Where
    it cannot be written, the file is converted each time, and a warning says so.

    Args:
        file: the GGUF file.
        dtype: of all weights.
        allow: see `read_checkpoint`; no copy is kept of a file that lacks weights.
        options: see `read_checkpoint`, for the copy.

    Raises:
        ModelError: see `read_checkpoint`; or the file is one of several parts of a model.
    """
    folder = copy_of(file)
    if not folder.is_dir():
        _LOG.warning("converting %s, once; the copy is kept in %s", file.name, folder)
        try:
            model, tokenizer = _convert(file)
        except ModelError:
            if not allow:
                raise
            model, tokenizer = _convert(file, allow)
            return model.to(dtype), tokenizer
        try:
            _keep(model, tokenizer, folder)
        except OSError as error:
            _LOG.warning("no copy kept in %s (%s): every command will convert", folder, error)
            return model.to(dtype), tokenizer
    model = read_checkpoint(folder, dtype, **options)
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def copy_of(file: Path) -> Path:
    """Return the folder of a GGUF file's converted copy, be it there or not."""
    return cache_folder() / "gguf" / f"{_digest(file)}-{transformers.__version__}-whole"


def _check_whole(file: Path) -> None:
    """Check that a file holds a whole model, and that memory holds it.

    Raises:
        ModelError: it is one of several parts, or too large.
    """
    from gguf import GGUFReader

    reader = GGUFReader(file)
    field = reader.get_field("split.count")
    parts = 1 if field is None else int(field.contents())
    if parts > 1:
        raise ModelError(
            f"{file.name} is one of {parts} parts of a model; put them together first: "
            "llama-gguf-split --merge FIRST-PART WHOLE.gguf"
        )
    check_memory(sum(int(each.n_elements) for each in reader.tensors), torch.float32, "cpu")


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "blake2b").hexdigest()[:16]


def _convert(file: Path, allow: Sequence[str] = ()) -> tuple[Any, Any]:
    _check_whole(file)
    with contextlib.redirect_stderr(io.StringIO()):  # its bar counts tensors, not time
        model = read_checkpoint(file.parent, torch.float32, allow, gguf_file=file.name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model.hf_quantizer = None  # the weights are plain now, and only plain ones can be saved
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, tokenizer


def _keep(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write the copy under another name first, so that nobody finds half of one."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".draft-"))
    try:
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        with contextlib.suppress(OSError):  # another process was faster
            draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    if not folder.is_dir():
        raise OSError("the finished copy could not be moved there")
