"""Which calibrations differ: KL of each on one text, and differences in pairs of windows.

    python bench/paired.py --corpus FILE [--tokens 10240] A.safetensors B.safetensors ...

Every calibration is compared with the first: the mean difference over windows, its standard error,
and how many errors it is. All block linears run in FP4, weights alone.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from markdown import table

from fp4graph import Policy, Scheme, TracedModel, models
from fp4graph.quantizers import Calibration
from fp4graph.study.evaluate import DenseReference, cut
from fp4graph.study.statistics import mean_and_error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("calibrations", nargs="+", type=Path)
    parser.add_argument("--model", default=models.SMOLLM2)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--tokens", type=int, default=10240)
    parser.add_argument("--seq-len", type=int, default=512)
    options = parser.parse_args()
    loaded = models.load(options.model, torch.float32)
    text = models.corpus(options.corpus, options.tokens * 8)
    windows = cut(text, loaded.tokenizer, options.tokens, options.seq_len)
    traced = TracedModel(loaded.model)

    @torch.no_grad()
    def run(index: int) -> torch.Tensor:
        ids = windows.ids[index : index + 1]
        logits: torch.Tensor = traced(input_ids=ids, use_cache=False).logits
        return logits

    def ignore() -> None: ...

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        run(0)
        reference = DenseReference(run, windows, Path(folder), ignore)
        first = None
        for path in options.calibrations:
            calibration = Calibration.load(path)
            (format, quantizer), *others = calibration.ways
            if others:
                parser.error(f"{path} holds codes of several formats or quantizers")
            scheme = Scheme.of(format, quantizer, calibration=calibration)
            traced.select(Policy.of("all", scheme))
            kl_WT = reference.score(run, ignore).kl
            first = kl_WT if first is None else first
            kl, error = mean_and_error(kl_WT)
            more, by = mean_and_error(kl_WT - first)
            rows.append([
                path.stem, f"{kl:.4f} +- {error:.4f}",
                "" if not more else f"{more:+.4f} +- {by:.4f}",
                "" if not more or not by else f"{more / by:+.1f}",
            ])  # fmt: skip
    print(table(["calibration", "KL", "more than the first", "errors"], rows))


if __name__ == "__main__":
    main()
