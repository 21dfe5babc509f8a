"""Bits: exhaustive where finite, against torch, ml_dtypes and a float64 table of our own."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from fp4graph.formats.minifloat import (
    E2M1,
    E4M3,
    Minifloat,
    ceil_exponent,
    decode_e8m0,
    even_exponent,
    floor_exponent,
)

E2M1_VALUES = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
ALL_BYTES = torch.arange(256, dtype=torch.uint8)


def bits(x: Tensor) -> list[int]:
    return x.view(torch.int32).tolist()


def samples() -> Tensor:
    """Draw finite floats of every exponent, and every rounding boundary with its neighbours."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(-(2**31), 2**31, (2_000_000,), generator=generator)
    random = random.to(torch.int32).view(torch.float32)
    values = [E2M1.decode(torch.arange(8, dtype=torch.uint8)), E4M3.decode(ALL_BYTES[:127])]
    edges = torch.cat([torch.cat((v, (v[1:] + v[:-1]) / 2)) for v in values])
    around = [torch.nextafter(edges, torch.tensor(limit)) for limit in (torch.inf, -torch.inf)]
    edges = torch.cat([edges, *around])
    everything = torch.cat((random, edges, -edges))
    return everything[everything.isfinite()]


def test_e2m1_decodes_to_its_sixteen_values() -> None:
    assert bits(E2M1.decode(ALL_BYTES[:16])) == bits(torch.tensor(E2M1_VALUES, dtype=torch.float32))


def test_e2m1_ties_go_to_even_codes_and_the_top_saturates() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert E2M1.encode(ties).tolist() == [0, 2, 2, 4, 4, 6, 6]
    assert E2M1.encode(-ties).tolist() == [8, 10, 10, 12, 12, 14, 14]
    assert E2M1.encode(torch.tensor([6.0, 7.0, 1e30, -1e30])).tolist() == [7, 7, 7, 15]


@pytest.mark.parametrize("minifloat", [E2M1, E4M3])
def test_zero_keeps_its_sign(minifloat: Minifloat) -> None:
    assert minifloat.encode(torch.tensor([0.0, -0.0])).tolist() == [0, 1 << minifloat.sign_shift]


@pytest.mark.parametrize(
    "minifloat, oracle",
    [(E2M1, ml_dtypes.float4_e2m1fn), (E4M3, ml_dtypes.float8_e4m3fn)],
    ids=["e2m1", "e4m3"],
)
def test_encode_agrees_with_ml_dtypes(minifloat: Minifloat, oracle: type) -> None:
    x = samples().clamp(-minifloat.max, minifloat.max)  # above, ml_dtypes makes NaN of E4M3
    mask = (2 << minifloat.sign_shift) - 1
    expected = x.numpy().astype(oracle).view(np.uint8) & mask
    assert np.array_equal(minifloat.encode(x).numpy(), expected)


def test_e4m3_agrees_with_torch_on_every_byte_and_back() -> None:
    torch_values = ALL_BYTES.view(torch.float8_e4m3fn).to(torch.float32)
    assert bits(E4M3.decode(ALL_BYTES).nan_to_num(nan=1e9)) == bits(
        torch_values.nan_to_num(nan=1e9)
    )
    finite = ALL_BYTES[torch_values.isfinite()]
    assert torch.equal(E4M3.encode(E4M3.decode(finite)), finite)
    x = samples().clamp(-448, 448)
    assert torch.equal(E4M3.encode(x), x.to(torch.float8_e4m3fn).view(torch.uint8))


def test_e8m0_agrees_with_torch_on_every_byte() -> None:
    ours, theirs = decode_e8m0(ALL_BYTES), ALL_BYTES.view(torch.float8_e8m0fnu).to(torch.float32)
    assert bits(ours.nan_to_num(nan=-1.0)) == bits(theirs.nan_to_num(nan=-1.0))
    assert ours[0] == 2.0**-127
    assert ours[255].isnan()


def test_exponents_agree_with_float64_logarithms() -> None:
    x = samples().abs()
    x = x[x >= 2.0**-126]
    log = torch.log2(x.double())
    near = (log - log.round()).abs() < 1e-9  # float64 cannot tell; frexp can
    mantissa, exponent = torch.frexp(x.double())
    assert torch.equal(floor_exponent(x), exponent.to(torch.int32) - 1)
    assert torch.equal(ceil_exponent(x), (exponent - (mantissa == 0.5).int()).to(torch.int32))
    assert torch.equal(floor_exponent(x)[~near], log.floor().to(torch.int32)[~near])
    even = (exponent - 1 + (mantissa >= 0.875).int()).to(torch.int32)
    assert torch.equal(even_exponent(x[x < 2.0**127]), even[x < 2.0**127])


def test_floor_exponent_does_not_round_up_below_a_power_of_two() -> None:
    below = torch.nextafter(torch.tensor([8.0]), torch.tensor([0.0]))
    assert floor_exponent(below).item() == 2
    assert floor_exponent(torch.tensor([8.0])).item() == 3


@pytest.mark.parametrize("minifloat", [E2M1, E4M3])
def test_rounding_is_encoding_and_decoding(minifloat: Minifloat) -> None:
    x = samples()
    assert bits(minifloat.round(x)) == bits(minifloat.decode(minifloat.encode(x)))
