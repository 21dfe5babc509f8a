"""A whole model beside llama.cpp, alternating in one run: decode, prefill, bytes, perplexity.

    python bench/llama.py FILE.gguf --text FILE [--prompt 512] [--tokens 48] [--rounds 7]
        [--format mxfp4] [--dtype bfloat16] [--threads 2]

FILE.gguf is made anew twice for llama.cpp: block linears and head in the format (our export, so the
same codes as ours), and in Q4_0, which it repacks. Ours is the same model converted, head included:
exact, and with activations rounded to 8 bits, as llama.cpp rounds them always. Rounds run every
engine once, in an order that rotates: a prompt, then tokens one by one, greedily. Printed are
medians, and the median of paired ratios to llama.cpp's faster type. Wants llama-cpp-python, built
on the machine that it runs on.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llama_cpp
import numpy as np
import torch
from markdown import table
from torch.nn.functional import cross_entropy

import fp4graph
from fp4graph import models
from fp4graph.study.latency import Runner, Variant, paired_ratio
from fp4graph.study.trial import Trial

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SELECT = "all | lm_head"
Q4_0 = 2  # of ggml's types and of llama.cpp's file types


class Llama:
    """llama.cpp with one sequence, by its C functions."""

    def __init__(self, file: Path, length: int, threads: int) -> None:
        llama_cpp.llama_backend_init()
        how = llama_cpp.llama_context_default_params()
        how.n_ctx = how.n_batch = how.n_ubatch = length
        how.n_threads = how.n_threads_batch = threads
        self.model = llama_cpp.llama_model_load_from_file(
            str(file).encode(), llama_cpp.llama_model_default_params()
        )
        self.context = llama_cpp.llama_init_from_model(self.model, how)
        vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self.words = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self.batch = llama_cpp.llama_batch_init(length, 0, 1)

    def clear(self) -> None:
        """Forget what was read."""
        memory = llama_cpp.llama_get_memory(self.context)
        llama_cpp.llama_memory_clear(memory, True)
        self.at = 0

    def logits(self, tokens: Sequence[int], *, every: bool = False) -> np.ndarray[Any, Any]:
        """Read tokens; return the last one's logits, or all."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, self.at + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = every or i == len(tokens) - 1
        if llama_cpp.llama_decode(self.context, batch):
            raise SystemExit("llama.cpp could not decode")
        self.at += len(tokens)
        rows = len(tokens) if every else 1
        found = llama_cpp.llama_get_logits(self.context)
        return np.ctypeslib.as_array(found, (rows, self.words))


@dataclass
class Engine:
    """What is timed, and its times in seconds."""

    name: str
    weight_bytes: int
    round: Callable[[], None]
    nll: Callable[[Sequence[int]], float]
    prefill: list[float] = field(default_factory=list)
    decode: list[list[float]] = field(default_factory=list)


def theirs(name: str, file: Path, options: Any, prompt: Sequence[int]) -> Engine:
    """Return llama.cpp on a file."""
    llama = Llama(file, max(options.prompt + options.tokens, options.window), options.threads)

    def round() -> None:
        llama.clear()
        times = [time.perf_counter()]
        token = int(llama.logits(prompt)[0].argmax())
        times.append(time.perf_counter())
        for _ in range(options.tokens - 1):
            token = int(llama.logits([token])[0].argmax())
            times.append(time.perf_counter())
        engine.prefill.append(times[1] - times[0])
        engine.decode.append(np.diff(times[1:]).tolist())

    def nll(window: Sequence[int]) -> float:
        llama.clear()
        logits = torch.from_numpy(llama.logits(window, every=True)[:-1].copy())
        return cross_entropy(logits, torch.tensor(window[1:])).item()

    size = sum(tensor.nbytes for tensor in _linears(file))
    engine = Engine(name, size, round, nll)
    return engine


def _linears(file: Path) -> list[Any]:
    import gguf

    tensors = gguf.GGUFReader(file).tensors
    names = {tensor.name for tensor in tensors}
    tied = "output.weight" not in names
    return [
        tensor.data
        for tensor in tensors
        if len(tensor.shape) > 1 and (tied or not tensor.name.startswith("token_embd"))
    ]


def ours(name: str, options: Any, prompt: Sequence[int], activations: str) -> Engine:
    """Return the model converted by fp4graph."""
    packed = models.load(options.file, getattr(torch, options.dtype))
    fp4graph.convert(packed.model, SELECT, format=options.format, activations=activations)
    variant = Variant(Trial.of_packed(packed), "inductor", attention=options.attention)
    runner = Runner(packed.model, variant, options.prompt, options.tokens)
    runner.prompt = torch.tensor([prompt])
    print(f"{name}: compiled in {runner.compile_s:.0f} s", flush=True)

    def round() -> None:
        runner.generate()
        engine.prefill.append(runner.first_s[-1])
        engine.decode.append(runner.decode_s[-1])

    @torch.no_grad()
    def nll(window: Sequence[int]) -> float:
        ids = torch.tensor([window])
        logits = packed.model(ids, use_cache=False).logits[0, :-1].float()
        return cross_entropy(logits, ids[0, 1:]).item()

    engine = Engine(name, runner.weight_bytes, round, nll)
    return engine


def exported(file: str, format: str, out: Path) -> None:
    """Write a GGUF file with our codes."""
    how = ("--to", "gguf", "--select", SELECT, "--format", format, "--out", str(out))
    command = Path(sys.executable).with_name("fp4graph")
    subprocess.run([command, "export", file, *how], check=True)


def quantized(file: str, out: Path) -> None:
    """Write a GGUF file in Q4_0, head included."""
    how = llama_cpp.llama_model_quantize_default_params()
    how.ftype = how.output_tensor_type = Q4_0
    how.allow_requantize = how.pure = True
    failed = llama_cpp.llama_model_quantize(file.encode(), str(out).encode(), ctypes.byref(how))
    if failed:
        raise SystemExit("llama.cpp could not quantise")


def main() -> None:
    parser = argparse.ArgumentParser(description="A whole model beside llama.cpp.")
    parser.add_argument("file")
    parser.add_argument("--text", required=True)
    parser.add_argument("--format", default="mxfp4")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--attention", default="fp4graph")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p())
    text = models.corpus(options.text, options.windows * options.window * 8)
    ids = models.load(options.file).tokenizer(text)["input_ids"]  # type: ignore[misc]
    prompt = ids[: options.prompt]
    with tempfile.TemporaryDirectory() as folder:
        same, q4 = Path(folder) / "same.gguf", Path(folder) / "q4_0.gguf"
        exported(options.file, options.format, same)
        quantized(options.file, q4)
        engines = [
            theirs(f"llama.cpp, {options.format}", same, options, prompt),
            theirs("llama.cpp, Q4_0", q4, options, prompt),
            ours("fp4graph, exact", options, prompt, "none"),
            ours("fp4graph, int8 activations", options, prompt, "int8"),
        ]
        for index in range(options.rounds):
            for engine in engines[index % 4 :] + engines[: index % 4]:
                engine.round()
        print(_table(engines, ids, options))


def _table(engines: Sequence[Engine], ids: Sequence[int], options: Any) -> str:
    fastest = min(engines[:2], key=lambda each: float(np.median(each.decode)))
    windows = [
        ids[start : start + options.window]
        for start in range(0, options.windows * options.window, options.window)
    ]
    rows = []
    for engine in engines:
        decode = paired_ratio(np.ravel(fastest.decode), np.ravel(engine.decode))
        prefill = paired_ratio(fastest.prefill, engine.prefill)
        rows.append(
            [
                engine.name,
                f"{engine.weight_bytes / 1e6:.0f}",
                f"{1 / statistics.median(np.ravel(engine.decode)):.1f}",
                f"{decode.median:.2f} [{decode.low:.2f}, {decode.high:.2f}]",
                f"{options.prompt / statistics.median(engine.prefill):.0f}",
                f"{prefill.median:.2f} [{prefill.low:.2f}, {prefill.high:.2f}]",
                f"{statistics.mean(map(engine.nll, windows)):.4f}",
            ]
        )
    head = ("engine", "MB of linears", "tokens/s", "ratio", "prefill tokens/s", "ratio", "NLL")
    return table(head, rows)


if __name__ == "__main__":
    main()
