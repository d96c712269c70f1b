"""How sessions run: cores, and exact sums."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edgesd.runtime.runners import onnxruntime as runner


def machine(root: Path, clocks: list[int]) -> Path:
    for core, clock in enumerate(clocks):
        folder = root / f"sys/devices/system/cpu/cpu{core}/cpufreq"
        folder.mkdir(parents=True)
        (folder / "cpuinfo_max_freq").write_text(f"{clock}\n")
    return root


@pytest.mark.parametrize(
    ("clocks", "expected"),
    [
        ([2400000] * 4, [0, 1, 2, 3]),
        ([1800000] * 4 + [2400000] * 4, [4, 5, 6, 7]),
        ([2256000, 2256000, 2400000, 2400000], [0, 1, 2, 3]),  # bins of one kind of core
        ([0] * 4, [0, 1, 2, 3]),
    ],
)
def test_small_cores_are_left_out(
    clocks: list[int], expected: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(len(clocks))))
    assert runner.fast_cores(machine(tmp_path, clocks)) == expected


def test_cores_that_a_container_withholds_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 5})
    assert runner.fast_cores(machine(tmp_path, [1800000] * 4 + [2400000] * 4)) == [5]
    assert runner.fast_cores(tmp_path / "nothing") == [0, 5]


def test_threads_go_to_the_fast_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    monkeypatch.setattr(runner, "fast_cores", lambda: [4, 5])
    options = runner.session_options()
    assert options.intra_op_num_threads == 2
    assert options.get_session_config_entry("session.intra_op_thread_affinities") == "6"
    assert runner.session_options(3).intra_op_num_threads == 3


def test_a_process_on_one_core_has_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {2})
    assert runner.session_options().intra_op_num_threads == 1
    monkeypatch.setattr(runner, "fast_cores", lambda: [0, 1, 2, 3])
    assert runner.session_options().intra_op_num_threads == 0


@pytest.mark.parametrize(
    ("flags", "exact"),
    [("avx2 fma", True), ("avx2 avx512_vnni", False), ("avx2 avx_vnni", False), (None, False)],
)
def test_sums_that_would_saturate_take_the_exact_way(
    flags: str | None, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "processor : 0\n" + (f"flags\t\t: fpu {flags}\n" if flags else "Features : asimddp\n")
    monkeypatch.setattr(Path, "read_text", lambda self: text)
    runner._sums_saturate.cache_clear()
    try:
        assert runner._sums_saturate() is exact
    finally:
        runner._sums_saturate.cache_clear()
