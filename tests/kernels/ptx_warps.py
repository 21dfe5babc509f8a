"""Run a warp-specialised PTX kernel on numpy, a warp at a time; see ptx.py.

It knows Hopper's wgmma, TMA, mbarriers, named barriers and partitions. What is asynchronous happens
as early as it may or as late as it may: wgmma reads its registers and shared memory when it is
issued or when it is waited for; a copy lands when it is issued or only when no warp can go on. If
results differ, there is a race. Not modelled: fences and proxies.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from kernels.ptx import Kernel, execute
from kernels.ptx_hopper import Descriptor, move_box, product_of
from kernels.ptx_program import Array, Instruction, Program, PtxError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Until = Callable[[], bool]

SHARED = 227 << 10
_NOTHING = ("fence", "setmaxnreg", "membar", "cp.async.bulk", "wgmma.fence", "bar.warp")


@dataclass
class _Barrier:
    """An mbarrier: a phase ends when all have arrived and all bytes have come."""

    count: int
    pending: int
    bytes: int = 0
    phase: int = 0

    def arrive(self, arrivals: int, arrived: int = 0) -> None:
        self.pending -= arrivals
        self.bytes -= arrived
        if self.pending < 0:
            raise PtxError("more arrivals than an mbarrier counts")
        if self.pending == 0 and self.bytes == 0:
            self.phase ^= 1
            self.pending = self.count


@dataclass
class _Cta:
    """What the warps of a program share."""

    threads: int
    late: tuple[str, ...]
    descriptors: dict[int, Descriptor]
    barriers: dict[int, _Barrier] = field(default_factory=dict)
    named: dict[int, list[int]] = field(default_factory=dict)  # arrived, generation
    copies: list[Callable[[], None]] = field(default_factory=list)
    shared: Array = field(default_factory=lambda: np.full(SHARED, 0xFF, np.uint8))


class WarpKernel(Kernel):
    """A kernel whose warps run by themselves.

    Args:
        text: PTX.
        late: what happens as late as it may, of "wgmma" and "tma".
        seed: of the order in which warps go on.
    """

    def __init__(self, text: str, late: tuple[str, ...] = (), seed: int = 0) -> None:
        super().__init__(text)
        self._late, self._seed = late, seed
        self.descriptors: dict[int, Descriptor] = {}

    def run(
        self, grid: Sequence[int], threads: int, arguments: Sequence[int], memory: Array
    ) -> None:
        """See `Kernel.run`; a descriptor's argument is its key in `descriptors`."""
        padded = [*arguments, *[0] * (len(self.parameters) - len(arguments))]
        values = dict(zip(self.parameters, padded, strict=True))
        with np.errstate(all="ignore"):
            for index in np.ndindex(*reversed(grid)):
                self._run_cta(index[::-1], threads, values, memory)

    def _run_cta(
        self, index: tuple[int, ...], threads: int, values: dict[str, int], memory: Array
    ) -> None:
        cta = _Cta(threads, self._late, self.descriptors)
        order = np.random.default_rng(self._seed)
        waiting: dict[int, Until | None] = {}
        warps: dict[int, Iterator[Until | None]] = {}
        for number in range(threads // 32):
            p = Program(index, 32, values, memory)
            p.thread = p.thread + 32 * number
            p.memory = {"global": memory, "shared": cta.shared}
            p.registers |= {name: np.full(32, each, np.uint64) for name, each in values.items()}
            waiting[number], warps[number] = None, _Warp(self, p, cta).run()
        while waiting:
            moved = False
            for number in order.permutation(list(waiting)):
                until = waiting[number]
                if until is not None and not until():
                    continue
                moved = True
                try:
                    waiting[number] = next(warps[number])
                except StopIteration:
                    del waiting[number]
            if not moved:
                if not cta.copies:
                    raise PtxError("deadlock: no warp can go on")
                cta.copies.pop(0)()


class _Warp:
    """A warp on its way through a kernel."""

    def __init__(self, kernel: WarpKernel, p: Program, cta: _Cta) -> None:
        self.kernel, self.p, self.cta = kernel, p, cta
        self.products: list[Callable[[], None]] = []  # of wgmma, not yet committed
        self.groups: list[list[Callable[[], None]]] = []

    def run(self) -> Iterator[Until | None]:
        """Yield where others may go on, with what this one waits for."""
        p, at = self.p, 0
        while at < len(self.kernel.code):
            i = self.kernel.code[at]
            at += 1
            p.active = np.ones(32, bool)
            if i.guard is not None:
                p.active = p.predicate(i.guard[0]) ^ i.guard[1]
            if i.name[0] in ("ret", "exit"):
                if self.groups or self.products:
                    raise PtxError("wgmma in flight at the end")
                return
            if i.name[0] in ("bra", "brx"):
                at = self._branch(i, at)
            elif p.active.any():
                yield from self._do(i)

    def _branch(self, i: Instruction, at: int) -> int:
        if i.name[0] == "brx":
            table = self.kernel.tables[i.operands[1]]
            return self.kernel.labels[table[int(self.p.read(i.operands[0])[0])]]
        if self.p.active.any() != self.p.active.all():
            raise PtxError("a branch that the threads of a warp take differently")
        return self.kernel.labels[i.operands[0]] if self.p.active.all() else at

    def _do(self, i: Instruction) -> Iterator[Until | None]:
        name = ".".join(i.name)
        for prefix, event in _EVENTS.items():
            if name.startswith(prefix):
                yield from event(self, i)
                return
        if not name.startswith(_NOTHING):
            execute(self.p, i)

    def meet(self, i: Instruction) -> Iterator[Until | None]:
        """Arrive at a named barrier."""
        count = int(i.operands[1]) if len(i.operands) > 1 else self.cta.threads
        barrier = self.cta.named.setdefault(int(i.operands[0]), [0, 0])
        barrier[0] += 32
        generation = barrier[1]
        if barrier[0] < count:
            yield lambda: barrier[1] != generation
        else:
            barrier[:] = 0, generation + 1
            yield None

    def await_phase(self, i: Instruction) -> Iterator[Until | None]:
        barrier = self.cta.barriers[int(self.p.address(i.operands[1])[self.p.active][0])]
        parity = int(self.p.read(i.operands[2])[0])
        if barrier.phase == parity:
            yield lambda: barrier.phase != parity
        self.p.write(i.operands[0], np.ones(32, bool))

    def change_barriers(self, i: Instruction) -> Iterator[Until | None]:
        place = next(each for each in i.operands if each[0] == "[")
        for at in map(int, self.p.address(place)[self.p.active]):
            if i.name[1] == "init":
                count = int(i.operands[1])
                self.cta.barriers[at] = _Barrier(count, count)
            elif i.name[1] == "inval":
                del self.cta.barriers[at]
            elif i.name[1] == "arrive":
                expected = int(i.operands[2]) if "expect_tx" in i.name else 0
                self.cta.barriers[at].arrive(1, -expected)
            else:
                raise PtxError(f"unknown instruction {'.'.join(i.name)}")
        yield from ()

    def copy(self, i: Instruction) -> Iterator[Until | None]:
        """Copy a box of a tensor to or from shared memory; its first coordinate is innermost."""
        p, cta = self.p, self.cta
        one = int(np.flatnonzero(p.active)[0])
        is_store = i.name[5] == "global"
        text = i.operands[0 if is_store else 1]
        found = re.match(r"\[(\S+),\s*\{([^}]*)\}", text)
        assert found is not None, text
        tensor = cta.descriptors[int(p.read(found[1], 64)[one])]
        start = [int(p.signed(each.strip(), 32)[one]) for each in reversed(found[2].split(","))]
        place = int(p.address(i.operands[1 if is_store else 0])[one])
        memory = p.memory["global"]
        if is_store:
            move_box(cta.shared, memory, tensor, start, place, is_store=True)
            return
        barrier = cta.barriers[int(p.address(i.operands[2])[one])]

        def land() -> None:
            move_box(cta.shared, memory, tensor, start, place, is_store=False)
            barrier.arrive(0, int(np.prod(tensor.box)) * tensor.size)

        if "tma" in cta.late:
            cta.copies.append(land)
        else:
            land()
        yield from ()

    def multiply(self, i: Instruction) -> Iterator[Until | None]:
        product = product_of(self.p, self.cta.shared, i)
        if "wgmma" in self.cta.late:
            self.products.append(product)
        else:
            product()
        yield from ()

    def commit(self, _: Instruction) -> Iterator[Until | None]:
        self.groups.append(self.products)
        self.products = []
        yield None

    def drain(self, i: Instruction) -> Iterator[Until | None]:
        yield None
        while len(self.groups) > int(i.operands[0]):
            for product in self.groups.pop(0):
                product()


_EVENTS: dict[str, Callable[[_Warp, Instruction], Iterator[Until | None]]] = {
    "bar.sync": _Warp.meet,
    "barrier.sync": _Warp.meet,
    "mbarrier.try_wait": _Warp.await_phase,
    "mbarrier": _Warp.change_barriers,
    "cp.async.bulk.tensor": _Warp.copy,
    "wgmma.mma_async": _Warp.multiply,
    "wgmma.commit": _Warp.commit,
    "wgmma.wait": _Warp.drain,
}
