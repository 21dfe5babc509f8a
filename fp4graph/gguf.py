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

if TYPE_CHECKING:
    from torch import nn

_LOG = logging.getLogger("fp4graph.gguf")


def load_gguf(file: Path, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """Load a model and its tokenizer from a GGUF file, through a converted copy in the cache.

    The copy is in float32, which holds every value of the file's own quantisation, and lies in
    FP4GRAPH_CACHE, or else in `fp4graph` of the user's cache folder, by a hash of the file. Where
    it cannot be written, the file is converted each time, and a warning says so.

    Args:
        file: the GGUF file.
        dtype: of all weights.
    """
    folder = cache_folder() / "gguf" / f"{_digest(file)}-{transformers.__version__}"
    if not folder.is_dir():
        _LOG.warning("converting %s, once; the copy is kept in %s", file.name, folder)
        model, tokenizer = _convert(file)
        try:
            _keep(model, tokenizer, folder)
        except OSError as error:
            _LOG.warning("no copy kept in %s (%s): every command will convert", folder, error)
            return model.to(dtype), tokenizer
    return (
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype),
        transformers.AutoTokenizer.from_pretrained(folder),
    )


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "blake2b").hexdigest()[:16]


def _convert(file: Path) -> tuple[Any, Any]:
    options = {"gguf_file": file.name}
    with contextlib.redirect_stderr(io.StringIO()):  # its bar counts tensors, not time
        model = transformers.AutoModelForCausalLM.from_pretrained(
            file.parent, dtype=torch.float32, **options
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **options)
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
