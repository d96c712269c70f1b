"""How much memory ONNX Runtime's allocator touches while a workload runs.

Values live from the operation that writes them to the last that reads them; what is free between
them can't always be used again. So that the figure holds, the allocator itself is followed: the
best-fit one with coalescing of onnxruntime/core/framework/bfc_arena.cc, with its defaults.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from edgesd.export.cost.workload import Workload

_ALIGN = 256
_FIRST_REGION = 1 << 20
_LARGEST_REGION = 1 << 30
_DEAD = 128 << 20
"""A chunk that is larger than asked for by this much is split, as is one of twice the size."""


@dataclass
class _Chunk:
    """Bytes of a region, from `begin` on: free, or a value's."""

    region: int
    begin: int
    size: int
    free: bool = True


@dataclass
class Arena:
    """Chunks by region, in order of their addresses. touched: of each region, what was ever used,
    as ranges apart from each other."""

    regions: list[list[_Chunk]] = field(default_factory=list)
    touched: list[list[tuple[int, int]]] = field(default_factory=list)
    _next: int = _FIRST_REGION

    def take(self, size: int) -> _Chunk:
        """A chunk of at least `size` bytes: the smallest that fits, else of a new region."""
        need = max(_ALIGN, -(-size // _ALIGN) * _ALIGN)
        fits = [c for region in self.regions for c in region if c.free and c.size >= need]
        if not fits:
            grown = need > self._next
            while need > self._next:
                self._next *= 2
            length = max(need, min(self._next, _LARGEST_REGION))
            if not grown:
                self._next *= 2
            fits = [_Chunk(len(self.regions), 0, length)]
            self.regions.append(fits[:])
            self.touched.append([])
        chunk = min(fits, key=lambda c: (c.size, c.region, c.begin))
        if chunk.size >= 2 * need or chunk.size - need >= _DEAD:
            region = self.regions[chunk.region]
            rest = _Chunk(chunk.region, chunk.begin + need, chunk.size - need)
            region.insert(region.index(chunk) + 1, rest)
            chunk.size = need
        chunk.free = False
        self._touch(chunk, size)
        return chunk

    def give_back(self, chunk: _Chunk) -> None:
        """Free a chunk, and join it with free neighbours."""
        chunk.free = True
        region = self.regions[chunk.region]
        place = region.index(chunk)
        for other in (place + 1, place):  # the one behind, then the one before
            if 0 < other < len(region) and region[other].free and region[other - 1].free:
                region[other - 1].size += region[other].size
                del region[other]

    def bytes(self) -> int:
        """Bytes that were ever used: they stay resident."""
        return sum(end - begin for ranges in self.touched for begin, end in ranges)

    def _touch(self, chunk: _Chunk, size: int) -> None:
        begin, end = chunk.begin, chunk.begin + size
        apart = []
        for low, high in self.touched[chunk.region]:
            if high < begin or low > end:
                apart.append((low, high))
            else:
                begin, end = min(begin, low), max(end, high)
        self.touched[chunk.region] = [*apart, (begin, end)]


def arena_bytes(workloads: Iterable[Workload]) -> int:
    """Bytes that lowered workloads touch, run one after another in one session. What a run is
    given, and what it returns, lie outside."""
    arena = Arena()
    for workload in workloads:
        _run(arena, _as_run(workload))
    return arena.bytes()


def _as_run(workload: Workload) -> Workload:
    """In ONNX Runtime's order: what doesn't wait for the first input comes before all that does.
    Of a denoiser of many blocks that is each one's keys and values of the text, which lie there
    until the block reads them."""
    waiting = set(workload.inputs[:1])
    first, rest = [], []
    for op in workload.operations:
        if waiting.isdisjoint(op.reads):
            first.append(op)
        else:
            waiting.update(op.writes)
            rest.append(op)
    return replace(workload, operations=(*first, *rest))


def _run(arena: Arena, workload: Workload) -> None:
    last = {value: places[-1] for value, places in workload.readers().items()}
    outside = {*workload.inputs, *workload.outputs}
    chunks: dict[int, _Chunk] = {}
    for place, op in enumerate(workload.operations):
        gone = [v for v in dict.fromkeys((*op.reads, *op.writes)) if last.get(v, place) <= place]
        for value in op.writes:
            if value in chunks or value in outside:
                continue
            size = workload.sizes[value]
            heir = next(
                (v for v in gone if op.in_place and v in chunks and workload.sizes[v] == size), None
            )
            chunks[value] = arena.take(size) if heir is None else chunks.pop(heir)
        spare = [arena.take(size) for size in op.spare]
        for chunk in spare:
            arena.give_back(chunk)
        for value in gone:
            if value in chunks:
                arena.give_back(chunks.pop(value))
