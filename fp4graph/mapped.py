"""Tensors in a file that is mapped: they come as they are read, and go when memory is needed."""

from __future__ import annotations

import mmap
import os
import shutil
import sys
import tempfile
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import finalize

import torch
from torch import Tensor

from fp4graph.errors import StudyError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

_PIECE = 1 << 28  # is mapped at once: each map holds a file handle
_ALIGNED = 64  # as torch's own memory, by which some kernels choose


class MappedFile:
    """Tensors in a file without a name, which goes with the process, however that ends.

    Args:
        folder: on a disk; it is made.

    Raises:
        StudyError: nothing can be written there.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._start = self._end = self._next = 0  # of the piece, and where free room in it begins
        with self._errors():
            folder.mkdir(parents=True, exist_ok=True)
            file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        self._file = file.fileno()
        finalize(self, file.close)

    def room(self, size: int) -> None:
        """Check that the disk has room for so many bytes.

        Raises:
            StudyError: it has not.
        """
        with self._errors():
            free = shutil.disk_usage(self._folder).free
        if size > free:
            sizes = f"{size / 1e9:.1f} GB are needed, and {free / 1e9:.1f} GB are free"
            raise StudyError(f"there is no room in {self._folder}: {sizes}")

    def keep(self, tensor: Tensor) -> Tensor:
        """Return a tensor's values in the file, in the same order in memory.

        Raises:
            StudyError: the disk is full.
        """
        if not tensor.numel():
            return tensor
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        span = 1 + sum((size - 1) * step for size, step in steps)
        flat = tensor.detach().as_strided((span,), (1,))
        with self._errors():
            if self._next + flat.nbytes > self._end:
                self._map(max(flat.nbytes, _PIECE))
            rest, at = flat.view(torch.uint8).numpy().data, self._next
            while rest:
                done = os.pwrite(self._file, rest, at)
                rest, at = rest[done:], at + done
        offset = self._next - self._start
        values = torch.frombuffer(self._pages, dtype=tensor.dtype, count=span, offset=offset)
        self._next = -(-at // _ALIGNED) * _ALIGNED
        return values.as_strided(tensor.shape, tensor.stride())

    def keep_new(self, values: Iterable[Any], given: Iterable[Any]) -> tuple[Any, ...]:
        """Return values with the tensors among them in the file, but for those that were given.

        Raises:
            StudyError: the disk is full.
        """
        known = set(map(id, given))
        return tuple(
            self.keep(each) if isinstance(each, Tensor) and id(each) not in known else each
            for each in values
        )

    def _map(self, size: int) -> None:
        whole = mmap.ALLOCATIONGRANULARITY
        self._start = self._next = -(-self._end // whole) * whole
        self._end = self._start + size
        os.truncate(self._file, self._end)
        self._pages = mmap.mmap(self._file, size, offset=self._start)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StudyError(f"cannot keep values in {self._folder}: {error}") from None


def is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor's memory is a file's, as far as this system tells."""
    if sys.platform != "linux":
        return False
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        for line in maps:
            span, *_, inode, path = [*line.split(maxsplit=5), ""][:6]
            low, high = (int(end, 16) for end in span.split("-"))
            if low <= tensor.data_ptr() < high:
                return inode != "0" and path.startswith("/")
    return False
