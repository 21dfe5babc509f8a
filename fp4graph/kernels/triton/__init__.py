"""Triton kernels for GPUs: portable ones so far, proven in the interpreter, not registered yet."""
