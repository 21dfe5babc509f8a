"""GGUF files: what gguf itself reads out of them."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from gguf import GGMLQuantizationType, GGUFReader

import fp4graph
from fp4graph import RefusalError
from fp4graph.checkpoints.ggml import blocks
from fp4graph.cli import main
from fp4graph.models import SMOLLM2, locate


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4", "mxfp4:rceil"])
@pytest.mark.parametrize("shape", [(1, 64), (7, 192), (64, 576)])
def test_gguf_reads_the_same_values(format: str, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    packed = fp4graph.quantize(torch.randn(shape), format)
    kind = GGMLQuantizationType[packed.format.base.upper()]
    values = gguf.quants.dequantize(blocks(packed), kind)
    scale = 1.0 if packed.per_tensor_scale is None else float(packed.per_tensor_scale)
    want = packed.dequantize().numpy()
    assert np.allclose(values * scale, want, rtol=2**-22, atol=0)
    if packed.per_tensor_scale is None:
        assert np.array_equal(values, want)


def test_a_row_that_does_not_fill_a_block() -> None:
    with pytest.raises(RefusalError, match="no multiple of 64"):
        blocks(fp4graph.quantize(torch.randn(4, 96), "nvfp4"))


@pytest.mark.slow
@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_the_command(format: str, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    how = ("--select", "q,down,blocks=3", "--format", format, "--to", "gguf")
    arguments = ["export", SMOLLM2, *how]
    done = CliRunner().invoke(main, [*arguments, "--out", str(out)])
    assert done.exit_code == 0, done.output
    folder, name = locate(SMOLLM2)
    source = {each.name: each for each in GGUFReader(Path(folder) / str(name)).tensors}
    reader = GGUFReader(out)
    found = {each.name: each for each in reader.tensors}
    changed = {name for name in source if source[name].tensor_type != found[name].tensor_type}
    assert changed == {"blk.3.attn_q.weight", "blk.3.ffn_down.weight"}
    for name in changed:
        dense = gguf.quants.dequantize(source[name].data, source[name].tensor_type)
        packed = fp4graph.quantize(torch.tensor(np.array(dense)), format)
        values = gguf.quants.dequantize(found[name].data, found[name].tensor_type)
        if packed.per_tensor_scale is not None:
            values = values * found[name.replace(".weight", ".scale")].data[0]
        assert np.allclose(values, packed.dequantize().numpy(), rtol=2**-22, atol=0)
    for name in set(source) - changed:
        assert np.array_equal(source[name].data, found[name].data)
    fields = GGUFReader(Path(folder) / str(locate(SMOLLM2)[1])).fields
    for key in ("tokenizer.ggml.tokens", "llama.rope.freq_base", "tokenizer.ggml.add_bos_token"):
        assert reader.fields[key].contents() == fields[key].contents()
    done = CliRunner().invoke(main, [*arguments, "--out", str(out)])
    assert "is there already" in done.stderr


def test_a_folder_is_no_gguf_file(tiny_folder: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out.gguf")
    done = CliRunner().invoke(main, ["export", str(tiny_folder), "--to", "gguf", "--out", out])
    assert done.exit_code == 2
    assert "convert_hf_to_gguf.py" in done.stderr
