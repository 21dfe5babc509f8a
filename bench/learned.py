"""What learned rounding brings in one block, on text that it has not seen.

    python bench/learned.py [MODEL] --corpus FILE [--format mxfp4] [--block 10]

Prints the error of the block's output, squared, over its square, on 8 windows after those that
were calibrated with, for codes found in four ways; the blocks before it are dense.
"""

from __future__ import annotations

import argparse

import torch

from fp4graph import Policy, Scheme, get_format, models, quantize
from fp4graph.calibration.blocks import Blocks
from fp4graph.quantizers import gptq, learn, scale_search
from fp4graph.study.evaluate import cut

TRAIN, TEST, LENGTH = 64, 8, 256


def main() -> None:
    parser = argparse.ArgumentParser(description="What learned rounding brings in one block.")
    parser.add_argument("model", nargs="?", default=models.SMOLLM2)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--format", default="mxfp4")
    parser.add_argument("--block", type=int, default=10)
    options = parser.parse_args()
    format = get_format(options.format)
    loaded = models.load(options.model, torch.float32)
    tokens = (TRAIN + TEST) * LENGTH
    text = models.corpus(options.corpus, tokens * 256)
    windows = cut(text, loaded.tokenizer, tokens, LENGTH).ids.split(1)
    policy = Policy.of("all", Scheme.of(format))
    train, test = (
        Blocks(loaded.model, part, policy, dense=True)
        for part in (windows[:TRAIN], windows[TRAIN:])
    )
    for number in range(options.block):
        train.advance(number, {})
        test.advance(number, {})
    seen = train.see(options.block)
    weights = {each.site.tag.fqn: train.weight(each.site) for each in seen}
    searched = {fqn: scale_search(weight, format) for fqn, weight in weights.items()}
    solved = {
        fqn: gptq(weights[fqn], each.hessian.mean, searched[fqn])
        for fqn, each in zip(weights, seen, strict=True)
    }
    error = train.error(options.block)
    codes = {
        "rtn": {fqn: quantize(weight, format) for fqn, weight in weights.items()},
        "scale-search": searched,
        "gptq:scale-search": solved,
        "learned:scale-search": learn(
            weights, solved, lambda w, batch: error(w, {}, batch), train.batches
        ),
    }
    error_of_test = test.error(options.block)
    for name, packed in codes.items():
        rounded = {fqn: each.dequantize() for fqn, each in packed.items()}
        with torch.no_grad():
            mean = sum(float(error_of_test(rounded, {}, batch)) for batch in range(TEST)) / TEST
        print(f"{name:22} {mean:.6f}")


if __name__ == "__main__":
    main()
