"""Native CPU kernels: C++ on torch's stable ABI, compiled for what the CPU has."""

from fp4graph.kernels.cpu.library import Missing, Native, load, native
from fp4graph.kernels.cpu.ops import CPU, pack_tiles, unpack_tiles

__all__ = ["CPU", "Missing", "Native", "load", "native", "pack_tiles", "unpack_tiles"]
