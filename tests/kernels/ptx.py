"""Run a compiled PTX kernel on numpy, program by program.

    Kernel(compiled.asm["ptx"]).run(grid, threads, [address or number, ...], memory)

Triton's interpreter knows no inline assembly. This runs what ptxas would be given, with the
fragment maps of the PTX ISA, so that packing, the order of registers and index arithmetic are
proven without a GPU. All threads of a program run in lock step, and branches must be uniform. An
instruction that it does not know is an error. Not modelled: races, the order of memory, and the
rounding inside a tensor core (products are summed in float64 and rounded once).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np
from kernels.ptx_instructions import HANDLERS
from kernels.ptx_program import Array, Instruction, Program, PtxError

if TYPE_CHECKING:
    from collections.abc import Sequence

_IGNORED = ("bar", "fence")


class Kernel:
    """A kernel's instructions, parsed."""

    def __init__(self, text: str) -> None:
        head, _, body = text[text.index(".entry") :].partition(")")
        self.parameters = re.findall(r"[\w$]+_param_\d+", head)
        directives = r"^\s*\.(loc|file|reqntid|maxnreg|minnctapersm).*$"
        body = re.sub(rf"//.*|{directives}", "", body, flags=re.M)
        body = re.sub(r"\b(0x[0-9A-Fa-f]+)U\b", r"\1", body)
        self.code: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self.tables: dict[str, list[str]] = {}  # of brx.idx
        for statement in body.partition(".section")[0].split(";"):
            rest = statement.strip().lstrip("{} \t\n")
            while label := re.match(r"(\$?[\w$]+):\s*", rest):
                self.labels[label[1]] = len(self.code)
                rest = rest[label.end() :].lstrip("{} \t\n")
                if rest.startswith(".branchtargets"):
                    self.tables[label[1]] = re.findall(r"\$\w+", rest)
            if rest and rest[0] != ".":
                self.code.append(_parse(rest))

    def run(
        self, grid: Sequence[int], threads: int, arguments: Sequence[int], memory: Array
    ) -> None:
        """Run all programs.

        Args:
            grid: programs by x, y, z.
            threads: threads of a program.
            arguments: one number a parameter; pointers are offsets into `memory`.
            memory: uint8, all of global memory; changed in place.
        """
        padded = [*arguments, *[0] * (len(self.parameters) - len(arguments))]
        values = dict(zip(self.parameters, padded, strict=True))
        with np.errstate(all="ignore"):  # GPUs do not warn
            for index in np.ndindex(*reversed(grid)):
                self._run(Program(index[::-1], threads, values, memory))

    def _run(self, p: Program) -> None:
        at = 0
        while at < len(self.code):
            each = self.code[at]
            at += 1
            p.active = np.ones(len(p.thread), bool)
            if each.guard is not None:
                p.active = p.registers[each.guard[0]] ^ each.guard[1]
            if each.name[0] == "bra":
                if p.active.any() != p.active.all():
                    raise PtxError("a branch that threads take differently")
                at = self.labels[each.operands[0]] if p.active.all() else at
            elif each.name[0] == "ret":
                return
            elif each.name[0] not in _IGNORED and p.active.any():
                execute(p, each)


def execute(p: Program, each: Instruction) -> None:
    """Do what an instruction does to the registers and memory of a program.

    Raises:
        PtxError: no handler knows it.
    """
    for count in range(len(each.name), 0, -1):
        handler = HANDLERS.get(".".join(each.name[:count]))
        if handler is not None:
            return handler(p, each)
    raise PtxError(f"unknown instruction {'.'.join(each.name)} {each.operands}")


def _parse(text: str) -> Instruction:
    guard = None
    if found := re.match(r"@(!?)(%?\w+)\s+", text):
        guard = (found[2], found[1] == "!")
        text = text[found.end() :]
    name, *rest = text.split(None, 1)
    operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", rest[0] if rest else "")
    split = tuple(_elements(each) if each[0] == "{" else each.strip() for each in operands)
    parts = (part.removesuffix("::cta") for part in name.split("."))  # as triton 3.8 spells it
    return Instruction(guard, tuple(parts), split)


def _elements(braced: str) -> list[str]:
    return [each.strip() for each in braced[1:-1].split(",")]
