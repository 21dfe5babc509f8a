"""`convert` picks the linears that `backend` picks, whatever a model's code looks like.

`make architectures` compares all types; these spell their linears in different ways.
"""

from __future__ import annotations

import pytest
from support.converted import compare

TYPES = [
    "afmoe",  # experts and a dense block
    "bart",  # an encoder that the call does not reach
    "bloom",  # a fused qkv, interleaved
    "falcon",  # x @ W.T, tensors of its own on the CPU
    "gpt2",  # addmm on [in, out]
    "inkling_text",  # a bare parameter, einsum
    "jamba",  # W @ x, experts
    "jetmoe",  # lists of experts, a stack in a module of its own
    "llama4_text",  # as many rows for each expert
    "mamba",
    "rwkv",  # weights that the first call writes to
    "xmod",  # layers that Dynamo skips
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("kind", TYPES)
def test_the_same_linears_and_the_same_numbers(kind: str) -> None:
    found = compare(kind)
    assert found["linears"]
    assert not found["only_compiled"]
    assert not found["only_converted"]
    assert found["difference"] < 1e-5
