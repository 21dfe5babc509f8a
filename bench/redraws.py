"""How far a model's damage moves when its activations are rounded anew.

    python bench/redraws.py [MODEL] --corpus FILE [--tokens 4096] [--draws 8] > redraws.jsonl

A relative change of 1e-6, drawn at random, in every value of the embeddings is nothing to the dense
model. With activations in FP4 it turns a few roundings, which turn others in each later linear. A
line of JSON for each format, mode and draw: KL and dNLL of `all` against the unchanged dense model,
and `dense_kl`, what the same change does to the dense model.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fp4graph import Policy, Scheme, TracedModel, models
from fp4graph.study.evaluate import DenseReference, cut

if TYPE_CHECKING:
    from torch import Tensor

CHANGE = 1e-6


def main() -> None:
    parser = argparse.ArgumentParser(description="Damage when activations are rounded anew.")
    parser.add_argument("model", nargs="?", default=models.SMOLLM2)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--draws", type=int, default=8)
    options = parser.parse_args()
    loaded = models.load(options.model, torch.float32)
    text = models.corpus(options.corpus, options.tokens * 8)
    windows = cut(text, loaded.tokenizer, options.tokens, 512)
    traced = TracedModel(loaded.model)
    embeddings: Tensor = loaded.model.get_input_embeddings().weight  # type: ignore[operator]
    original = embeddings.detach().clone()

    @torch.no_grad()
    def run(index: int) -> Tensor:
        ids = windows.ids[index : index + 1]
        logits: Tensor = traced(input_ids=ids, use_cache=False).logits
        return logits

    def ignore() -> None: ...

    run(0)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        reference = DenseReference(run, windows, Path(folder), ignore)
        for draw in range(options.draws):
            noise = torch.randn(original.shape, generator=torch.Generator().manual_seed(draw))
            embeddings.copy_(original * (1 + CHANGE * noise))
            traced.select(None)
            dense = reference.score(run, ignore)
            for format, mode in itertools.product(("nvfp4", "mxfp4"), ("none", "same")):
                traced.select(Policy.of("all", Scheme.of(format, "rtn", mode)))
                scores = reference.score(run, ignore)
                row = {
                    "format": format,
                    "activations": mode,
                    "draw": draw,
                    "kl": scores.kl.mean(),
                    "dnll": (scores.nll - reference.scores.nll).mean(),
                    "dense_kl": dense.kl.mean(),
                }
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
