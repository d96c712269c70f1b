"""ONNX Runtime's allocator as the planner follows it, on workloads that can be counted by hand."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgesd.export.cost.arena import Arena, arena_bytes
from edgesd.export.cost.workload import Operation, Workload

MB = 1 << 20


def workload(sizes: list[int], *operations: Operation) -> Workload:
    """Value 0 is the input, the last one the output."""
    return Workload("unet", operations, tuple(sizes), (0,), (len(sizes) - 1,), 0)


def op(reads: tuple[int, ...], writes: tuple[int, ...], **more: object) -> Operation:
    return Operation("add", reads, writes, **more)  # type: ignore[arg-type]


def test_what_is_given_and_returned_lies_outside() -> None:
    assert arena_bytes([workload([MB, MB], op((0,), (1,)))]) == 0


def test_a_value_lives_until_it_is_read_for_the_last_time() -> None:
    chain = workload([MB] * 5, op((0,), (1,)), op((1,), (2,)), op((2,), (3,)), op((3,), (4,)))
    kept = workload([MB] * 5, op((0,), (1,)), op((1,), (2,)), op((2,), (3,)), op((3, 1), (4,)))
    assert arena_bytes([chain]) == 2 * MB
    assert arena_bytes([kept]) == 3 * MB


def test_an_operation_in_place_takes_no_memory() -> None:
    def made(in_place: bool) -> Workload:
        second = op((1,), (2,), in_place=in_place)
        return workload([MB] * 4, op((0,), (1,)), second, op((2,), (3,)))

    assert arena_bytes([made(True)]) == MB
    assert arena_bytes([made(False)]) == 2 * MB
    # Not where its input is read once more, or is of another size.
    again = workload([MB] * 4, op((0,), (1,)), op((1,), (2,), in_place=True), op((2, 1), (3,)))
    assert arena_bytes([again]) == 2 * MB
    wider = workload([MB, MB, 2 * MB, MB], op((0,), (1,)), op((1,), (2,), in_place=True))
    assert arena_bytes([wider]) == 3 * MB


def test_what_waits_for_no_image_is_there_from_the_beginning() -> None:
    """As keys and values of a text: two blocks' lie there while the first block runs."""
    blocks = (
        op((1,), (2,)),
        op((0, 2), (3,)),
        op((1,), (4,)),
        op((3, 4), (5,), in_place=True),
        op((5,), (6,)),
    )
    found = Workload("unet", blocks, (MB,) * 7, (0, 1), (6,), 0)
    assert arena_bytes([found]) == 3 * MB
    # In the order that is written, the first block's would be gone before the second's come.
    one_input = Workload("unet", blocks, (MB,) * 7, (1, 0), (6,), 0)
    assert arena_bytes([one_input]) == 2 * MB


def test_what_an_operation_takes_besides_counts() -> None:
    assert arena_bytes([workload([MB, MB], op((0,), (1,), spare=(MB, MB)))]) == 2 * MB


def test_a_second_run_uses_the_first_ones_memory() -> None:
    small = workload([MB] * 3, op((0,), (1,)), op((1,), (2,)))
    large = workload([4 * MB] * 3, op((0,), (1,)), op((1,), (2,)))
    assert arena_bytes([small, small]) == MB
    assert arena_bytes([small, large]) == 5 * MB
    assert arena_bytes([large, small]) == 4 * MB


def test_regions_double_and_chunks_are_split_and_joined() -> None:
    arena = Arena()
    first = arena.take(300)  # rounded up to 512 of a region of 1 MB
    second = arena.take(MB // 4)
    assert [chunk.size for chunk in arena.regions[0]] == [512, MB // 4, 3 * MB // 4 - 512]
    third = arena.take(MB)  # the next region has 2 MB
    assert third.region == 1 and sum(chunk.size for chunk in arena.regions[1]) == 2 * MB
    arena.give_back(second)
    assert len(arena.regions[0]) == 2
    arena.give_back(first)
    assert [chunk.size for chunk in arena.regions[0]] == [MB]
    assert arena.bytes() == 300 + MB // 4 + MB


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 4 * MB)), max_size=60))
def test_chunks_never_overlap_and_nothing_is_lost(steps: list[tuple[bool, int]]) -> None:
    arena, held, asked = Arena(), [], 0
    for free, size in steps:
        if free and held:
            arena.give_back(held.pop(size % len(held)))
        else:
            held.append(arena.take(size))
            asked = max(asked, sum(chunk.size for chunk in held))
    for region in arena.regions:
        ends = [chunk.begin + chunk.size for chunk in region]
        assert [chunk.begin for chunk in region] == [0, *ends[:-1]]
        assert not any(a.free and b.free for a, b in pairwise(region))
    places = {(chunk.region, chunk.begin) for chunk in held}
    taken = [c for region in arena.regions for c in region if not c.free]
    assert places == {(chunk.region, chunk.begin) for chunk in taken} and len(taken) == len(held)
    total = sum(chunk.size for region in arena.regions for chunk in region)
    assert arena.bytes() <= total


@pytest.mark.parametrize("size", [1, 255, 256, 257, 3 * MB, 200 * MB])
def test_a_chunk_has_room(size: int) -> None:
    assert Arena().take(size).size >= size
