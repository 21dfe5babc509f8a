"""The real model's damage by role, against torchao's own fake quantisation of the same weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from support.trials import Counted
from torchao.prototype.mx_formats.mx_tensor import MXTensor
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

from fp4graph import models
from fp4graph.study.ablate import Ablation
from fp4graph.study.evaluate import cut
from fp4graph.study.store import Store
from fp4graph.study.trial import DENSE, Trial

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

TOKENS, SEQ_LEN = 256, 64
TRIALS = [
    Trial.of("down", "nvfp4"),
    Trial.of("q", "nvfp4"),
    Trial.of("v", "mxfp4"),
    Trial.of("down", "mxfp4"),
]


def torchao(weight: Tensor, format: str) -> Tensor:
    if format == "nvfp4":
        scale = per_tensor_amax_to_scale(weight.abs().amax())
        return NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=scale).dequantize(torch.float32)
    return MXTensor.to_mx(weight, torch.float4_e2m1fn_x2, 32).dequantize(torch.float32)


@torch.no_grad()
def nll(model: torch.nn.Module, ids: Tensor) -> np.ndarray:
    """Mean NLL of each window by transformers' own loss."""
    return np.array(
        [float(model(row[None], labels=row[None], use_cache=False).loss) for row in ids]
    )


@pytest.mark.slow
@pytest.mark.real_model
def test_damage_agrees_with_torchao_and_down_is_worst(
    smollm2: models.LoadedModel, tmp_path: Path
) -> None:
    windows = cut(models.corpus("pydoc"), smollm2.tokenizer, TOKENS, SEQ_LEN)
    study = Ablation(smollm2, windows, Store(tmp_path / "t.sqlite"), tmp_path)
    dense, *rows = study.run([DENSE, *TRIALS], Counted())
    base = nll(smollm2.model, windows.ids)
    assert dense.ppl == pytest.approx(float(np.exp(base.mean())), rel=1e-5)
    for trial, row in zip(TRIALS, rows, strict=True):
        weights = {
            name: p
            for name, p in smollm2.model.named_parameters()
            if f".{trial.select.text}_proj." in name
        }
        assert len(weights) == row.linears == 30
        kept = {name: p.detach().clone() for name, p in weights.items()}
        with torch.no_grad():
            for p in weights.values():
                p.copy_(torchao(p, trial.facts["format"]))
            difference = nll(smollm2.model, windows.ids) - base
            for name, p in weights.items():
                p.copy_(kept[name])
        error = difference.std(ddof=1) / np.sqrt(len(difference))
        assert row.dnll == pytest.approx(difference.mean(), abs=1e-5)
        assert row.dnll_se == pytest.approx(error, abs=1e-5)
        assert abs(row.dnll - difference.mean()) <= 2 * error
    assert rows[0].dnll > rows[1].dnll, "down before q"
