"""How much memory a device has left."""

from __future__ import annotations

import ctypes
import mmap
import sys

import psutil
import torch

_SHARE = 1 / 3  # a study keeps two things, and the model runs beside them


def available(device: torch.device) -> int:
    """Return how many bytes a device has free, of a CPU what this process may still take."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    if sys.platform == "linux":
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)  # ulimit -v
        if limit != resource.RLIM_INFINITY:
            free = min(free, max(limit - int(psutil.Process().memory_info().vms), 0))
    return free


def fits(size: int, device: torch.device) -> bool:
    """Whether `size` bytes are at most a third of what a device has free."""
    return size <= _SHARE * available(device)


def give_back_memory() -> None:
    """Give freed memory back to the system: glibc keeps it, in pieces that grow block by block."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
        if trim is not None:
            trim(0)


def let_go(tensor: torch.Tensor) -> None:
    """Let the system take back the pages of a tensor that is mapped from a file.

    A checkpoint's pages count as this process's memory until all of it is read. Nothing is lost: a
    page that is read again comes from the file.
    """
    if sys.platform == "linux" and tensor.device.type == "cpu":
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if end > start:  # an older kernel knows no such advice, and says so by an error
            advise = ctypes.CDLL(None).madvise
            advise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _PAGE_OUT)


_PAGE_OUT = 21  # MADV_PAGEOUT of linux/mman.h, since 5.4
