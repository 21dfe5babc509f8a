"""GGUF files whose selected linears are packed, from a GGUF file: all else stays as it is.

ggml keeps a group's low half in the low nibbles and its high half in the high ones:

    block_mxfp4 (17 bytes, 32 values)    E8M0 scale; qs[16], byte j = value j | value j + 16 << 4
    block_nvfp4 (36 bytes, 64 values)    E4M3 scale of each 16; qs[32], byte j = j | j + 8 << 4

NVFP4's per-tensor scale is a tensor of its own, `blk.0.attn_q.scale` beside `.weight`.
Source: ggml/src/ggml-common.h; gguf 0.19, `quants.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fp4graph.conversion import plan
from fp4graph.errors import ModelError, RefusalError, SelectorError
from fp4graph.files import written_whole
from fp4graph.packed.packing import pack
from fp4graph.passes.choose import refusal
from fp4graph.scheme import Activations

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import nn

    from fp4graph.formats import PackedWeight
    from fp4graph.graph.site import LinearSite
    from fp4graph.policy import Policy
    from fp4graph.report import Report

    Bytes = np.ndarray[Any, np.dtype[np.uint8]]

_BLOCK = {"nvfp4": 64, "mxfp4": 32}
_INTERNAL = ("GGUF.", "general.architecture", "general.file_type", "split.")


def blocks(packed: PackedWeight) -> Bytes:
    """Return a weight as ggml has it, uint8 [N, bytes of a row].

    Raises:
        RefusalError: K is no multiple of ggml's block.
    """
    N, K = packed.shape
    base = packed.format.base
    if K % _BLOCK[base]:
        raise RefusalError(f"K={K} is no multiple of {_BLOCK[base]}, which ggml's blocks need")
    low, high = packed.qdata & 0xF, packed.qdata >> 4
    codes = torch.stack((low, high), -1).reshape(N, -1, packed.format.block_size)
    first, second = codes.chunk(2, -1)
    halves = first | (second << 4)
    scale = packed.scale.view(torch.uint8)
    if base == "mxfp4":
        return torch.cat((scale[..., None], halves), -1).reshape(N, -1).numpy()
    four = (scale.reshape(N, -1, 4), halves.reshape(N, -1, 32))
    return torch.cat(four, -1).reshape(N, -1).numpy()


def export_gguf(
    file: Path,
    model: nn.Module,
    policy: Policy,
    out: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Write a GGUF file whose selected linears are packed, whole or not at all.

    Args:
        file: the GGUF file, dense or quantised: what is selected is rounded from its values.
        model: the same without its weights, on the meta device.
        policy: what runs how; no fused sets are needed here.
        out: a new file.
        progress: is told how many tensors of how many are written.

    Returns:
        a row for each linear.

    Raises:
        ModelError: `out` is there or cannot be written; a tensor that gguf has no name for.
        SelectorError: a selector matches nothing.
        RefusalError: a linear that GGUF cannot have in this way.
        WeightError: a weight holds NaN or Inf; names the linear.
    """
    import gguf

    if out.exists():
        raise ModelError(f"{out} is there already: give the name of a new file")
    reader = gguf.GGUFReader(file)
    sites, report, _ = plan(model, policy)
    refused = [(row.path, row.reason) for row in report.refused]
    refused += [(site.tag.fqn, why) for site in sites if (why := _obstacle(site))]
    if refused:
        raise refusal(refused, "cannot be written to GGUF; select others")
    if not sites:
        raise SelectorError(policy.text, "leaves no linear in FP4")
    names = _names(gguf, reader, sites)
    try:
        with written_whole(out) as draft:
            arch = str(reader.fields["general.architecture"].contents())
            writer = gguf.GGUFWriter(draft, arch)
            _copy_facts(reader, writer)
            for number, tensor in enumerate(reader.tensors):
                site = names.get(tensor.name)
                if site is None:
                    shape = tensor.data.shape
                    kind = tensor.tensor_type
                    writer.add_tensor(tensor.name, tensor.data, raw_shape=shape, raw_dtype=kind)
                else:
                    _add(gguf, writer, tensor, site)
                progress(number + 1, len(reader.tensors))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
    except OSError as error:
        raise ModelError(f"cannot write {out}: {error}") from None
    return report


def _obstacle(site: LinearSite) -> str | None:
    assert site.scheme is not None
    scheme = site.scheme
    if site.rows is not None:
        return "a part of a fused weight, and GGUF has the whole"
    if site.is_stack:
        return "experts are not written to GGUF"
    if scheme.calibration is not None:
        return "GGUF files have rows in an order of their own, and calibrated codes another"
    if scheme.rotation:
        return f"{scheme.quantizer} changes its inputs, which llama.cpp does not"
    if scheme.activations is not Activations.NONE:
        return "llama.cpp rounds activations in its own way: activations=none"
    if scheme.format.base not in _BLOCK:
        return f"ggml has no {scheme.format}"
    if site.tag.shape[-1] % _BLOCK[scheme.format.base]:
        return f"K={site.tag.shape[-1]} is no multiple of {_BLOCK[scheme.format.base]}"
    return None


def _names(gguf: Any, reader: Any, sites: list[LinearSite]) -> Mapping[str, LinearSite]:
    """Return the linears by the names that GGUF gives their weights."""
    arch = str(reader.fields["general.architecture"].contents())
    count = int(reader.fields[f"{arch}.block_count"].contents())
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    known = gguf.get_tensor_name_map(kind, count)
    there = {tensor.name for tensor in reader.tensors}
    found = {}
    for site in sites:
        name = known.get_name(site.tag.fqn)
        if name is None or f"{name}.weight" not in there:
            raise ModelError(f"the GGUF file has no weight of {site.tag.fqn}")
        found[f"{name}.weight"] = site
    return found


def _copy_facts(reader: Any, writer: Any) -> None:
    for key, field in reader.fields.items():
        if key.startswith(_INTERNAL):
            continue
        first, *more = field.types
        writer.add_key_value(key, field.contents(), first, more[-1] if more else None)


def _add(gguf: Any, writer: Any, tensor: Any, site: LinearSite) -> None:
    assert site.scheme is not None
    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    packed = pack(torch.from_numpy(np.array(values, np.float32)), site.scheme, site.tag.fqn)
    kind = gguf.GGMLQuantizationType[packed.format.base.upper()]
    writer.add_tensor(tensor.name, blocks(packed), raw_dtype=kind)
    if packed.per_tensor_scale is not None:
        scale = packed.per_tensor_scale.reshape(1).numpy()
        writer.add_tensor(f"{tensor.name.removesuffix('.weight')}.scale", scale)
