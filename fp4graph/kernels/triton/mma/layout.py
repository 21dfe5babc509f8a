"""How a weight lies in memory for the fragment kernels: as the registers of `mma.sync` want it.

`mma.sync.m16n8k16` multiplies 16 rows of weights by 16 columns: register a = 0..3 of lane L holds
row L/4 + 8 (a%2) and columns 2 (L%4) + 8 (a/2) + {0, 1}. Weights take the side of 16 rows, tokens
the side of 8. K is permuted, weights and activations alike, so that lane L owns a whole scale group
of its rows. It needs one scale for 16 weights, and its activations are 16 neighbours in memory.

**Stream** int32 [N/64, K/128, 1024 + scale words]. A *record* is 64 rows by 128 columns. It has 8
*tiles* of 16 rows by 64 columns: tile (u, r) for r < 4 row tiles and u < 2 steps of columns.
GB = B/16:

    word (u*4 + r)*128 + L*4 + i     codes of lane L for the i-th of a tile's four MMAs
      row    64*rb + 16*r + L/4 + 8*(a%2)
      column 128*s + (u/GB)*64*GB + (u%GB)*16 + 16*(L%4)*GB + 4*i + 2*(a/2) + e
    then 1024 + L*S + q              scales of lane L: words of two pairs, S = 64/B of them
      pair (r/2, u/GB, r%2) in order; a pair is row L/4 in its low half, row L/4 + 8 in its high
      half; the second pair of a word is rotated right by 8 bits

**Bits of a code word.** Eight codes (a, e) share 32 bits. Few operations bring each where a 16-bit
float has its sign, its exponent's low bits and its mantissa's high bit. The magnitude eem of E2M1,
subnormal 0.5 included, is then the value times 2^-126 (bfloat16) or 2^-14 (float16).

| order | sign, magnitude | register 0 | 1 | 2 | 3 |
|---|---|---|---|---|---|
| `bfloat16` | 15, 8..6 | as it is | << 4 | rotated left 10 | in two words, see `_code_words` |
| `float16` | 15, 11..9 | as it is | << 8 | bits 6..4, 7, 0 | and two more of the same |
| `float16 cvt` | 3, 2..0 of byte a | `cvt.rn.f16x2.e2m1x2` of byte a (sm_100, sm_120) | | | |

**Scales.** E4M3 becomes a byte without sign and subnormals: 5 bits of exponent, 3 of mantissa (a
group of scale 0 gets codes 0). E8M0 becomes the exponent field of the activations' dtype, relative
to the row's largest, which goes into `row_scale` with whatever power of two the bits are short of.
A group smaller than the row's largest by more than the dtype holds (2^125; 2^24 in float16, 2^27 in
`float16 cvt`) counts as 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from fp4graph.kernels.triton import layout as plain

if TYPE_CHECKING:
    from fp4graph.formats import PackedWeight
    from fp4graph.kernels.target import Target

ROW_TILES, STEPS = 4, 2
ROWS, COLUMNS = 16 * ROW_TILES, 64 * STEPS
CODE_WORDS = ROW_TILES * STEPS * 128

Bits = Literal["bfloat16", "float16", "float16 cvt"]


@dataclass(frozen=True)
class Order:
    """Which bits of a word mean what, and what they are short of.

    Attributes:
        bits: as the table above names them.
        e4m3_bias: added to the exponent of an E4M3 scale.
        e8m0_top: exponent field of a row's largest E8M0 scale.
        e8m0_range: how many binades below that a scale is still exact.
        scale_shift: where the byte of a scale starts in its 16 bits, for E4M3 and E8M0.
        code_exponent: a code's bits are its value times 2 to this.
    """

    bits: Bits
    e4m3_bias: int
    e8m0_top: int
    e8m0_range: int
    scale_shift: tuple[int, int]
    code_exponent: int

    @property
    def e4m3_exponent(self) -> int:
        """A decoded E4M3 scale times a code's bits is scale times value times 2 to this."""
        return {"bfloat16": -7, "float16": -7, "float16 cvt": 0}[self.bits]

    @property
    def e8m0_exponent(self) -> int:
        """The same for the row's largest E8M0 scale."""
        bias = 127 if self.bits == "bfloat16" else 15
        return self.e8m0_top - bias + self.code_exponent


ORDERS = {
    order.bits: order
    for order in (
        Order("bfloat16", 22, 253, 125, (4, 7), -126),
        Order("float16", 22, 30, 24, (7, 10), -14),
        Order("float16 cvt", 15, 28, 27, (7, 10), 0),
    )
}


def order_of(dtype: torch.dtype, target: Target) -> Order:
    """Return the order that activations of a dtype want on a target."""
    if dtype == torch.bfloat16:
        return ORDERS["bfloat16"]
    return ORDERS["float16 cvt" if target.capability >= 100 else "float16"]


def pack(packed: PackedWeight, order: Order) -> tuple[Tensor, Tensor]:
    """Return the stream, int32 [N/64, K/128, record], and `row_scale`, float32 [N].

    `row_scale` multiplies a row's sum, as in the portable layout, and makes good what the bits are
    short of; rows and columns are filled up with zeros.
    """
    qdata, scale, row_scale = plain.pack(packed)
    (N, K), B = packed.shape, packed.format.block_size
    rows, steps = -(-N // ROWS), -(-K // COLUMNS)
    codes = torch.stack((qdata & 15, qdata >> 4), dim=-1).flatten(1).to(torch.int32)
    codes = pad(codes, (0, steps * COLUMNS - codes.shape[1], 0, rows * ROWS - N))
    fields, lost, exponent = _scale_fields(packed, scale, row_scale, order)
    fields, lost = (
        pad(each, (0, steps * COLUMNS // B - each.shape[1], 0, rows * ROWS - N))
        for each in (fields, lost)
    )
    codes = codes.masked_fill(lost.repeat_interleave(B, 1), 0)
    GB = B // 16
    # row: rb, r, a%2, L/4; column: s, u/GB, L%4, u%GB, i, a/2, e
    tiles = codes.view(rows, ROW_TILES, 2, 8, steps, STEPS // GB, 4, GB, 4, 2, 2)
    tiles = tiles.permute(0, 4, 5, 7, 1, 3, 6, 8, 9, 2, 10)  # rb s u/GB u%GB r L/4 L%4 i a/2 a%2 e
    words = _code_words(tiles.reshape(rows, steps, STEPS * ROW_TILES * 32, 4, 4, 2), order)
    # row: rb, r/2, r%2, a%2, L/4; column: s, u/GB, L%4
    halves = fields.view(rows, ROW_TILES // 2, 2, 2, 8, steps, STEPS // GB, 4)
    halves = halves.permute(0, 5, 4, 7, 1, 6, 2, 3)  # rb s L/4 L%4 r/2 u/GB r%2 a%2
    pairs = (halves[..., 0] | halves[..., 1] << 16) << order.scale_shift[GB - 1]
    scales = pairs[..., 0] | _rotated_right(pairs[..., 1], 8)
    stream = torch.cat((words.flatten(2), scales.flatten(2)), dim=-1)
    return _as_int32(stream), row_scale * 2.0**-exponent


def unpack(
    stream: Tensor, row_scale: Tensor, shape: tuple[int, int], B: int, order: Order
) -> tuple[Tensor, Tensor]:
    """Undo `pack`: return codes, uint8 [N, K], and the scales that multiply them, float32 [N, K/B].

    The scales include `row_scale` and are those of `PackedWeight.dequantize`, but for groups of
    scale 0, or of a size that counts as 0, which are groups of codes 0 here.
    """
    rows, steps = stream.shape[:2]
    GB = B // 16
    words = (stream.to(torch.int64) & 0xFFFFFFFF)[..., :CODE_WORDS]
    tiles = _codes(words.view(rows, steps, STEPS * ROW_TILES * 32, 4), order)
    tiles = tiles.view(rows, steps, STEPS // GB, GB, ROW_TILES, 8, 4, 4, 2, 2, 2)
    codes = tiles.permute(0, 4, 9, 5, 1, 2, 6, 3, 7, 8, 10).reshape(rows * ROWS, steps * COLUMNS)
    scales = (stream.to(torch.int64) & 0xFFFFFFFF)[..., CODE_WORDS:]
    pairs = torch.stack((scales, _rotated_right(scales, 24)), -1) >> order.scale_shift[GB - 1]
    halves = torch.stack((pairs, pairs >> 16), -1) & 0xFF
    halves = halves.view(rows, steps, 8, 4, ROW_TILES // 2, STEPS // GB, 2, 2)
    fields = halves.permute(0, 4, 6, 7, 2, 1, 5, 3).reshape(rows * ROWS, steps * COLUMNS // B)
    if GB == 1:
        exponent = (fields >> 3) - order.e4m3_bias + order.e4m3_exponent
        values = torch.ldexp(1 + (fields & 7) / 8, exponent)
    else:
        bias = 127 if order.bits == "bfloat16" else 15
        field = fields if order.bits == "bfloat16" else fields & 0x1F
        exponent = field - bias + order.code_exponent
        values = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)
    (N, K), groups = shape, -(-shape[1] // B)
    factor = values.double()[:N, :groups] * row_scale.double()[:, None]
    return codes[:N, :K].to(torch.uint8), factor.float()


def _scale_fields(
    packed: PackedWeight, scale: Tensor, row_scale: Tensor, order: Order
) -> tuple[Tensor, Tensor, int]:
    """Return the bytes of the scales, which groups they lose, and the exponent to make good."""
    if packed.format.has_per_tensor_scale:
        value = scale.view(torch.float8_e4m3fn).float()
        lost = ~(value > 0)  # NaN made its row_scale NaN
        mantissa, exponent = torch.frexp(value.masked_fill(lost, 1.0))
        field = (exponent - 1 + order.e4m3_bias) << 3 | (mantissa * 16 - 8).to(torch.int32)
        return field, lost, order.e4m3_exponent
    top = torch.frexp(row_scale)[1].masked_fill(row_scale.isnan(), 0) - 1 + 127
    below = top[:, None] - scale.to(torch.int32)
    lost = (below > order.e8m0_range) | (below < 0)  # below 0: a NaN among the scales
    field = order.e8m0_top - below.masked_fill(lost, 0)
    return field, lost, order.e8m0_exponent


def _code_words(codes: Tensor, order: Order) -> Tensor:
    """Codes int32 [..., 4 words, 4 registers, 2 halves] -> words int64 [..., 4], bits 0 to 31."""
    codes = codes.to(torch.int64)
    if order.bits == "float16 cvt":
        byte = codes[..., 0] | codes[..., 1] << 4
        return byte[..., 0] | byte[..., 1] << 8 | byte[..., 2] << 16 | byte[..., 3] << 24
    shift = 6 if order.bits == "bfloat16" else 9
    half = (codes & 7) << shift | (codes & 8) << 12
    v = half[..., 0] | half[..., 1] << 16
    if order.bits == "float16":
        # the byte that registers 2 and 3 share has its sign in bit 0 and its magnitude in 6..4
        low = v[..., 2] | v[..., 3] >> 8
        moved = (low & 0x0E0E0E0E) << 3 | (low & 0x80808080) >> 7
        return v[..., 0] | v[..., 1] >> 8 | moved
    # bits 0, 1, 9, 10 of each half are left over; with those of the neighbouring word they make a
    # word that holds register 3 of both: rotated left 6 for the even word, 12 for the odd one
    words = v[..., 0] | _rotated_right(v[..., 1], 4) | _rotated_right(v[..., 2], 10)
    both = _rotated_right(v[..., 0::2, 3], 6) | _rotated_right(v[..., 1::2, 3], 12)
    words[..., 0::2] |= both & _KEPT
    words[..., 1::2] |= _rotated_right(both & ~_KEPT & 0xFFFFFFFF, 2)
    return words


_KEPT = 0x06030603


def _codes(words: Tensor, order: Order) -> Tensor:
    """Undo `_code_words`: int64 [..., 4] -> [..., 4, 4, 2]."""
    if order.bits == "float16 cvt":
        nibbles = [words >> 4 * each & 15 for each in range(8)]
        return torch.stack(nibbles, -1).view(*words.shape, 4, 2)
    if order.bits == "float16":
        low = words >> 3 & 0x0E0E0E0E | words << 7 & 0x80808080
        registers = [words, words << 8, low, low << 8]
        shift = 9
    else:
        even, odd = words[..., 0::2], words[..., 1::2]
        both = even & _KEPT | _rotated_right(odd, 30) & ~_KEPT
        last = torch.stack((_rotated_right(both, 26), _rotated_right(both, 20)), -1).flatten(-2)
        registers = [words, _rotated_right(words, 28), _rotated_right(words, 22), last]
        shift = 6
    v = torch.stack(registers, -1)
    halves = torch.stack((v & 0xFFFF, v >> 16 & 0xFFFF), -1)
    return halves >> shift & 7 | halves >> 12 & 8


def _rotated_right(words: Tensor, bits: int) -> Tensor:
    words = words.to(torch.int64) & 0xFFFFFFFF
    return (words >> bits | words << (32 - bits)) & 0xFFFFFFFF


def _as_int32(words: Tensor) -> Tensor:
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
