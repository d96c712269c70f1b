"""How sessions run: cores, and exact sums."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgesd import cores
from edgesd.cgroup import cpu_quota
from edgesd.runtime.backends import onnxruntime as runner
from edgesd.runtime.backends.base import RunnerOptions, run_once
from edgesd.runtime.bundle import Bundle, GraphFile
from edgesd.spec.pipeline import ComponentSpec, TensorSpec


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
    assert cores.fast_cores(machine(tmp_path, clocks)) == expected


def test_cores_that_a_container_withholds_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 5})
    assert cores.fast_cores(machine(tmp_path, [1800000] * 4 + [2400000] * 4)) == [5]
    assert cores.fast_cores(tmp_path / "nothing") == [0, 5]


@pytest.mark.parametrize(
    ("siblings", "expected"),
    [
        (["0-1", "0-1", "2-3", "2-3"], [0, 2]),
        (["0,2", "1,3", "0,2", "1,3"], [0, 1]),
        ([], [0, 1, 2, 3]),
    ],
)
def test_of_a_core_s_hardware_threads_one_counts(
    siblings: list[str], expected: list[int], tmp_path: Path
) -> None:
    for core, text in enumerate(siblings):
        folder = tmp_path / f"sys/devices/system/cpu/cpu{core}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{text}\n")
    assert cores.physical_cores([0, 1, 2, 3], tmp_path) == expected


@pytest.mark.parametrize(
    ("files", "quota", "threads"),
    [
        ({}, None, 4),
        ({"sys/fs/cgroup/cpu.max": "max 100000"}, None, 4),
        ({"sys/fs/cgroup/cpu.max": "200000 100000"}, 2.0, 2),
        ({"sys/fs/cgroup/cpu.max": "150000 100000"}, 1.5, 1),
        ({"sys/fs/cgroup/cpu.max": "20000 100000"}, 0.2, 1),
        ({"sys/fs/cgroup/cpu.max": "900000 100000"}, 9.0, 4),
        ({"sys/fs/cgroup/cpu.max": "200000 0"}, None, 4),
        ({"sys/fs/cgroup/cpu.max": "a few"}, None, 4),
        (  # the strictest of the groups above counts
            {
                "proc/self/cgroup": "0::/user/box\n",
                "sys/fs/cgroup/user/cpu.max": "100000 50000",
                "sys/fs/cgroup/user/box/cpu.max": "300000 100000",
            },
            2.0,
            2,
        ),
        (
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n",
                "sys/fs/cgroup/cpu/docker/abc/cpu.cfs_quota_us": "300000\n",
                "sys/fs/cgroup/cpu/docker/abc/cpu.cfs_period_us": "100000\n",
            },
            3.0,
            3,
        ),
        (
            {
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            None,
            4,
        ),
    ],
)
def test_there_are_no_more_threads_than_a_quota_keeps_busy(
    files: dict[str, str],
    quota: float | None,
    threads: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cpu_quota(tmp_path) == quota
    assert cores.thread_cores(tmp_path) == list(range(threads))
    found = cores.library_settings({}, tmp_path)
    assert found.get("OMP_NUM_THREADS") == (str(threads) if threads < 4 else None)


@pytest.mark.parametrize("name", ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS"])
def test_what_the_user_says_of_openmp_stays(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/cpu.max").write_text("100000 100000")
    found = cores.library_settings({}, tmp_path)
    assert found == {"GOMP_SPINCOUNT": "2000", "OMP_NUM_THREADS": "1"}
    kept = cores.library_settings({name: "7"}, tmp_path)
    of_waiting = name != "OMP_NUM_THREADS"
    assert kept.keys() == {"OMP_NUM_THREADS" if of_waiting else "GOMP_SPINCOUNT"}


def test_threads_are_those_of_the_fast_cores_and_pinned_where_there_are_slow_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pins, spins = "session.intra_op_thread_affinities", "session.intra_op.spin_duration_us"
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    monkeypatch.setattr(runner, "fast_cores", lambda: [4, 5])
    monkeypatch.setattr(runner, "thread_cores", lambda: [4, 5])
    options = runner.session_options()
    assert options.intra_op_num_threads == 2
    assert options.get_session_config_entry(pins) == "6"
    assert options.get_session_config_entry(spins) == "50"
    assert runner.session_options(3).intra_op_num_threads == 3
    monkeypatch.setattr(runner, "fast_cores", lambda: list(range(6)))
    options = runner.session_options()
    assert options.intra_op_num_threads == 2
    with pytest.raises(RuntimeError):  # not pinned
        options.get_session_config_entry(pins)


def test_a_process_on_one_core_has_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    assert runner.session_options().intra_op_num_threads == 1


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


@pytest.mark.parametrize("unfolded", [False, True])
def test_codes_are_unpacked_once_or_in_each_run(
    unfolded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.parser.parse_model(
        """
        <ir_version: 10, opset_import: ["" : 20]>
        net (float[1, 2] x) => (float[1, 3] y)
        <int8[2, 3] codes = {1, 2, 3, 4, 5, 6}, float[3] scales = {0.5, 1, 2}>
        {
            w = DequantizeLinear <axis = 1> (codes, scales)
            y = MatMul (x, w)
        }
        """
    )
    spec = ComponentSpec(
        "net", (TensorSpec("x", "float32", (1, 2)),), (TensorSpec("y", "float32", (1, 3)),)
    )
    usual, path = runner.session_options, tmp_path / "optimized.onnx"

    def written(*given: Any) -> Any:
        options = usual(*given)
        options.optimized_model_filepath = str(path)
        return options

    monkeypatch.setattr(runner, "session_options", written)
    graph = GraphFile(model.SerializeToString(), tmp_path)
    with runner.OnnxRuntimeRunner(spec, graph, 1, unfolded=unfolded) as opened:
        found = run_once(opened, {"x": np.float32([[1, 10]])})["y"]
        assert found.tolist() == [[20.5, 52.0, 126.0]]
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert ("DequantizeLinear" in kinds) == unfolded


@pytest.mark.parametrize("streamed", [False, True])
def test_beside_our_kernels_codes_are_unpacked_in_each_run_where_weights_are_streamed(
    streamed: bool, miniature: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner.OnnxRuntime, "own_kernels", lambda *_: True)
    monkeypatch.setattr(Bundle, "graph_file", lambda *_, **__: GraphFile(b"", tmp_path))
    monkeypatch.setattr(runner, "OnnxRuntimeRunner", lambda *_, **options: options)
    options: Any = runner.BACKEND.open_runner(miniature, "unet", RunnerOptions(streamed=streamed))
    assert options["unfolded"] == streamed
