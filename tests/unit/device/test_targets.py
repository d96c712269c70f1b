"""Boards and machines. tests/golden/machines holds the files that a machine shows, one text each.

The texts follow the kernel's format and published listings; none is a capture of one board.
"""

from __future__ import annotations

import importlib
import platform
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from edgesd.device import targets
from edgesd.device.capabilities import CAPABILITIES, CPU_FLAGS, GB, in_gb, normal_arch
from edgesd.device.detect import check_machine, describe_machine, detect_machine, runnable_targets
from edgesd.device.targets import (
    all_targets,
    check_request,
    families,
    get_target,
    list_targets,
    usable_bytes,
)
from edgesd.errors import TargetError, UsageError
from edgesd.runtime.backends import get_backend
from edgesd.spec.target import Machine, Target

MACHINES = Path(__file__).parents[2] / "golden" / "machines"

BOARDS = {
    "raspberry-pi-5": 2,
    "raspberry-pi-4": 1,
    "raspberry-pi-zero-2w": 0.5,
    "jetson-orin-nano-4gb": 4,
    "jetson-orin-nano-8gb": 8,
    "jetson-orin-nx-8gb": 8,
    "jetson-orin-nx-16gb": 16,
    "jetson-agx-orin-32gb": 32,
    "jetson-agx-orin-64gb": 64,
    "jetson-thor": 128,
    "rtx-30": 8,
    "rtx-40": 8,
    "rtx-50": 8,
    "x86-64-cpu": 8,
}


@pytest.fixture
def tree(tmp_path):
    """Returns a function: name of a golden machine -> a root folder with its files."""

    def unpack(name: str) -> Path:
        parts = re.split(r"^==> (.+) <==\n", (MACHINES / f"{name}.txt").read_text(), flags=re.M)
        for path, text in zip(parts[1::2], parts[2::2], strict=True):
            file = tmp_path / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text.removesuffix("\n").replace("\\0", "\0"))
        return tmp_path

    return unpack


def machine(arch="aarch64", memory_gb=8.0, capabilities=(), target=None, model="a board"):
    return Machine(
        arch=arch,
        model=model,
        target=target,
        memory_bytes=int(memory_gb * GB),
        cpu_count=4,
        capabilities=capabilities,
    )


# The registry


def test_every_board_is_registered_with_its_memory():
    assert {t.name: t.memory_bytes / GB for t in list_targets()} == BOARDS


def test_order_is_that_of_the_modules():
    modules = sorted(p.stem for p in Path(targets.__file__).parent.glob("[!_]*.py"))
    assert len(modules) == 7
    found = [importlib.import_module(f"{targets.__name__}.{module}").TARGETS for module in modules]
    assert list_targets() == tuple(board for boards in found for board in boards)


def test_a_family_is_its_smallest_member():
    assert families() == {
        "jetson-agx-orin": "jetson-agx-orin-32gb",
        "jetson-orin": "jetson-orin-nano-4gb",
        "jetson-orin-nano": "jetson-orin-nano-4gb",
        "jetson-orin-nx": "jetson-orin-nx-8gb",
    }
    assert get_target("jetson-orin").name == "jetson-orin-nano-4gb"


def test_names_are_unique_and_well_formed():
    names = [t.name for t in all_targets()] + list(families())
    assert len(names) == len(set(names))
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name) for name in names)
    ids = [i for t in list_targets() for i in t.module_ids]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("target", all_targets(), ids=lambda t: t.name)
def test_targets_are_consistent(target):
    assert target.arch in CPU_FLAGS
    assert set(target.capabilities) <= set(CAPABILITIES)
    assert list(target.capabilities) == sorted(target.capabilities)
    assert target.memory_bytes not in target.memory_options
    assert 0 < usable_bytes(target) < target.memory_bytes
    jetson = target.name.startswith("jetson")
    nvidia = jetson or target.name.startswith("rtx")
    assert target.backends == (("tensorrt", "onnxruntime") if nvidia else ("onnxruntime",))
    assert any(name.startswith("sm_") for name in target.capabilities) == nvidia
    assert bool(target.module_ids) == jetson
    assert get_target(target.name) == target
    assert msgspec.json.decode(msgspec.json.encode(target), type=Target) == target


def test_memory_of_the_board_at_hand():
    pi = get_target("raspberry-pi-5-8gb")
    assert (pi.name, pi.memory_bytes) == ("raspberry-pi-5-8gb", 8 * GB)
    assert pi.capabilities == get_target("raspberry-pi-5").capabilities
    assert get_target("raspberry-pi-5-2gb") is get_target("raspberry-pi-5")
    assert get_target("x86-64-cpu-32gb").memory_bytes == 32 * GB


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("raspbery-pi-5", "raspberry-pi-5"),
        ("raspberry-pi-5-3gb", "raspberry-pi-5-"),
        ("jetson-orin-nano-8", "jetson-orin-nano-8gb"),
        ("x86-64", "x86-64-cpu"),
    ],
)
def test_unknown_target(name, near):
    with pytest.raises(UsageError) as error:
        get_target(name)
    assert str(error.value).startswith(f"unknown target '{name}': did you mean '{near}")
    assert "`edgesd targets`" in str(error.value) and len(str(error.value)) < 200


@pytest.mark.parametrize("name", ["", "tpu"])
def test_unknown_target_without_a_near_one_says_where_they_are_listed(name):
    with pytest.raises(UsageError, match=r"^unknown target '.*': `edgesd targets` lists all \d+$"):
        get_target(name)


# Refused requests


@pytest.mark.parametrize("target", list_targets(), ids=lambda t: t.name)
def test_what_a_target_says_it_can_do_is_allowed(target):
    for number_format in target.precisions:
        precision = f"{number_format}-g64" if number_format.startswith("w4") else number_format
        check_request(target, precision)
        able = [name for name in target.backends if number_format in get_backend(name).precisions]
        assert able
        for backend in able:
            check_request(target, precision, backend)


def test_unknown_precision_or_backend():
    pi = get_target("raspberry-pi-5")
    with pytest.raises(UsageError, match="unknown precision 'fp61': did you mean 'fp16'"):
        check_request(pi, "fp61")
    with pytest.raises(UsageError, match="unknown backend 'tensort': did you mean 'tensorrt'"):
        check_request(pi, "fp16", "tensort")


def test_backend_that_only_others_run():
    with pytest.raises(TargetError) as error:
        check_request(get_target("raspberry-pi-5"), "fp16", "tensorrt")
    assert str(error.value) == (
        "raspberry-pi-5 can't run backend tensorrt, it runs onnxruntime: "
        "use one of these, or --target jetson-orin-nano-4gb"
    )


def test_precision_that_only_others_run():
    old = msgspec.structs.replace(get_target("raspberry-pi-4"), precisions=("fp32",))
    with pytest.raises(TargetError) as error:
        check_request(old, "fp16")
    assert str(error.value) == (
        "raspberry-pi-4 can't run precision fp16, it runs fp32: "
        "use one of these, or --target raspberry-pi-4"
    )  # the registered one, which isn't restricted


def test_bf16_is_for_gpus() -> None:
    with pytest.raises(
        TargetError, match=r"^raspberry-pi-5 can't run precision bf16, it runs .*fp16"
    ):
        check_request(get_target("raspberry-pi-5"), "bf16")
    board = get_target("jetson-orin")
    check_request(board, "bf16")
    check_request(board, "bf16", "tensorrt")
    with pytest.raises(TargetError, match="can't run precision bf16 by onnxruntime, it runs fp32,"):
        check_request(board, "bf16", "onnxruntime")


def test_usable_memory_is_near_what_boards_show():
    assert 6.5 < usable_bytes(get_target("jetson-orin-nano-8gb")) / GB < 7.3


def test_words():
    assert [normal_arch(a) for a in ("AMD64", "arm64", "x86_64", "riscv64")] == [
        "x86_64",
        "aarch64",
        "x86_64",
        "riscv64",
    ]
    assert [in_gb(b) for b in (GB // 2, 8 * GB, 10 * GB, 0)] == ["0.5 GB", "8 GB", "10 GB", "0 GB"]


# Detection


@pytest.mark.parametrize(
    ("name", "target", "cpus", "capabilities"),
    [
        ("raspberry-pi-5-2gb", "raspberry-pi-5", 4, "dotprod fp16_arithmetic"),
        ("raspberry-pi-5-8gb", "raspberry-pi-5-8gb", 4, "dotprod fp16_arithmetic"),
        ("raspberry-pi-4-4gb", "raspberry-pi-4-4gb", 4, ""),
        ("raspberry-pi-zero-2w", "raspberry-pi-zero-2w", 4, ""),
        ("jetson-orin-nano-8gb", "jetson-orin-nano-8gb", 6, "dotprod fp16_arithmetic sm_87"),
        ("jetson-orin-nano-8gb-devkit", "jetson-orin-nano-8gb", 6, "dotprod fp16_arithmetic sm_87"),
        ("jetson-orin-nx-16gb", "jetson-orin-nx-16gb", 8, "dotprod fp16_arithmetic sm_87"),
        ("jetson-agx-orin-64gb", "jetson-agx-orin-64gb", 12, "dotprod fp16_arithmetic sm_87"),
        ("jetson-thor", "jetson-thor", 14, "bf16 dotprod fp16_arithmetic i8mm sm_110 sve sve2"),
        ("x86-64-i7-12700-16gb", "x86-64-cpu", 8, "avx2 avx_vnni f16c fma"),
        ("x86-64-rtx-3060-16gb", "rtx-30", 8, "avx2 avx_vnni f16c fma sm_86"),
        (
            "x86-64-xeon-amx-64gb",
            "x86-64-cpu",
            4,
            "amx_bf16 amx_int8 avx2 avx512_bf16 avx512_fp16 avx512_vnni avx512f avx_vnni f16c fma",
        ),
        ("x86-64-without-avx2", None, 4, ""),
        ("aarch64-server", None, 4, "dotprod fp16_arithmetic"),
    ],
)
def test_detection(tree, name, target, cpus, capabilities):
    found = detect_machine(tree(name))
    assert (found.target, found.cpu_count) == (target, cpus)
    assert " ".join(found.capabilities) == capabilities
    assert found.arch == ("x86_64" if name.startswith("x86") else "aarch64")
    assert found.l4t == {"jetson-thor": "38.2.0"}.get(name, "36.4.3" if "jets" in name else None)
    assert set(found.capabilities) <= set(CAPABILITIES)


@pytest.mark.parametrize("path", sorted(MACHINES.glob("*.txt")), ids=lambda p: p.stem)
def test_a_machine_runs_the_bundle_of_its_own_target(tree, path):
    found = detect_machine(tree(path.stem))
    if found.target:
        own = get_target(found.target)
        check_machine(own.name, own.arch, found, own.capabilities)
        assert describe_machine(found).startswith(f"{own.name}: ")
    else:
        assert describe_machine(found).startswith("not a board that edgesd knows: ")


def test_model_is_what_the_machine_calls_itself(tree):
    assert detect_machine(tree("raspberry-pi-5-8gb")).model == "Raspberry Pi 5 Model B Rev 1.0"


def test_model_without_a_device_tree(tree):
    assert detect_machine(tree("aarch64-server")).model == "Ampere server"


def test_model_of_a_pc_is_its_cpu(tree):
    assert "i7-12700" in detect_machine(tree("x86-64-i7-12700-16gb")).model


@pytest.mark.parametrize("name", ["raspberry-pi-5-8gb", "jetson-orin-nano-8gb"])
def test_container_hides_the_device_tree(tree, name):
    root = tree(name)
    for file in ("model", "compatible"):
        (root / "proc/device-tree" / file).unlink()
    found = detect_machine(root)
    assert found.target == name
    assert ("sm_87" in found.capabilities) == name.startswith("jetson")


def test_gpu_of_an_unknown_jetson_is_not_guessed(tree):
    root = tree("jetson-orin-nano-8gb")
    for file in ("proc/device-tree/model", "proc/device-tree/compatible", "etc/nv_tegra_release"):
        (root / file).unlink()
    found = detect_machine(root)
    assert "sm_87" not in found.capabilities
    assert found.target is None


def test_empty_tree(tmp_path):
    found = detect_machine(tmp_path)
    assert found == Machine(
        arch="unknown",
        model="unknown machine",
        target=None,
        memory_bytes=0,
        cpu_count=1,
        capabilities=(),
    )
    assert "edgesd runs on 64-bit systems only (aarch64, x86_64)" in describe_machine(found)


def test_arch_without_the_kernel_file(tree, tmp_path):
    root = tree("raspberry-pi-5-8gb")
    (root / "proc/sys/kernel/arch").unlink()
    assert detect_machine(root).arch == "aarch64"
    assert detect_machine(root, arch="ARM64").target == "raspberry-pi-5-8gb"
    assert detect_machine(root, arch="amd64").target is None


def test_arch_of_a_pc_without_the_kernel_file(tree):
    root = tree("x86-64-i7-12700-16gb")
    (root / "proc/sys/kernel/arch").unlink()
    assert detect_machine(root).arch == "x86_64"


def test_odd_files_are_not_fatal(tree):
    root = tree("raspberry-pi-5-8gb")
    (root / "proc/meminfo").write_text("MemTotal: lots\n")
    (root / "proc/cpuinfo").write_bytes(b"\xff\xfe:\n:\nFeatures\n\nprocessor : 0\n")
    (root / "proc/device-tree/compatible").unlink()
    (root / "proc/device-tree/compatible").mkdir()
    found = detect_machine(root)
    assert (found.memory_bytes, found.capabilities, found.cpu_count) == (0, (), 1)
    assert found.model == "Raspberry Pi 5 Model B Rev 1.0"
    assert found.target is None  # without dotprod it can't run what a Pi 5 can


def test_capabilities_are_those_of_all_cores(tree):
    root = tree("raspberry-pi-5-8gb")
    cpuinfo = root / "proc/cpuinfo"
    cpuinfo.write_text(cpuinfo.read_text().replace(" asimddp", "", 1))
    assert detect_machine(root).capabilities == ("fp16_arithmetic",)


@pytest.mark.parametrize(
    ("group", "file", "text", "expected_gb"),
    [
        ("0::/", "sys/fs/cgroup/memory.max", f"{GB * 2}\n", 2),
        ("0::/a/b", "sys/fs/cgroup/a/memory.max", f"{GB * 2}\n", 2),
        ("0::/a/b", "sys/fs/cgroup/a/b/memory.max", f"{GB * 2}\n", 2),
        ("0::/a/b", "sys/fs/cgroup/c/memory.max", f"{GB * 2}\n", None),
        ("0::/", "sys/fs/cgroup/memory.max", "max\n", None),
        ("0::/", "sys/fs/cgroup/memory.max", f"{GB * 99}\n", None),
        ("0::/", "sys/fs/cgroup/memory.max", "²\n", None),
        ("5:cpu,memory:/d", "sys/fs/cgroup/memory/d/memory.limit_in_bytes", f"{GB * 2}", 2),
        ("5:memory:/d", "sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712", None),
        ("garbage", "sys/fs/cgroup/memory.max", f"{GB * 2}\n", 2),
    ],
)
def test_control_group_limits_memory(tree, group, file, text, expected_gb):
    root = tree("raspberry-pi-5-8gb")
    (root / "proc/self/cgroup").write_text(group)
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_text(text, encoding="utf-8")
    found = detect_machine(root)
    if expected_gb:
        assert found.memory_bytes == expected_gb * GB
        assert found.target == "raspberry-pi-5"
    else:
        assert found.memory_bytes == 8256480 * 1024


def test_this_machine():
    found = detect_machine()
    assert found.arch == normal_arch(platform.machine())
    assert found.memory_bytes > GB // 4
    assert found.cpu_count >= 1
    assert found.model
    assert found.target is None or get_target(found.target).arch == found.arch


def test_32_bit_python_on_a_64_bit_kernel(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(sys, "maxsize", 2**31 - 1)
    found = detect_machine()
    assert (found.arch, found.target) == ("armv7l", None)
    with pytest.raises(TargetError, match="runs on 64-bit systems only"):
        check_machine("raspberry-pi-zero-2w", "aarch64", found)


# Bundles and machines


def test_bundle_of_another_architecture():
    pc = machine("x86_64", 8, ("avx2", "fma"), "x86-64-cpu")
    with pytest.raises(TargetError) as error:
        check_machine("raspberry-pi-5", "arm64", pc)
    assert str(error.value) == (
        "bundle is for raspberry-pi-5 (aarch64); this machine is x86-64-cpu (x86_64): "
        "build it with --target x86-64-cpu"
    )


def test_a_newer_board_runs_an_older_ones_bundle_but_not_the_reverse(tree):
    pi5 = machine(
        memory_gb=7.9, capabilities=("dotprod", "fp16_arithmetic"), target="raspberry-pi-5"
    )
    pi4 = detect_machine(tree("raspberry-pi-4-4gb"))
    check_machine("raspberry-pi-4", "aarch64", pi5)
    check_machine("raspberry-pi-5", "aarch64", pi4)  # requires nothing that a Pi 4 lacks
    with pytest.raises(TargetError) as error:
        check_machine("raspberry-pi-5", "aarch64", pi4, ("dotprod",))
    assert str(error.value) == (
        "bundle is for raspberry-pi-5 (aarch64); this machine is raspberry-pi-4-4gb (aarch64) "
        "without dotprod, which is required: build it with --target raspberry-pi-4-4gb"
    )


def test_engine_for_another_gpu(tree):
    with pytest.raises(TargetError, match=r"jetson-thor .* without sm_87.* --target jetson-thor"):
        check_machine(
            "jetson-orin-nx-8gb", "aarch64", detect_machine(tree("jetson-thor")), ("sm_87",)
        )


def test_machine_with_less_memory_than_the_target():
    pi = machine(memory_gb=2, capabilities=("dotprod", "fp16_arithmetic"), target="raspberry-pi-5")
    with pytest.raises(TargetError) as error:
        check_machine("raspberry-pi-5-8gb", "aarch64", pi)
    assert str(error.value) == (
        "bundle is for raspberry-pi-5-8gb (aarch64); this machine is raspberry-pi-5 (aarch64) with "
        "2 GB of memory, the bundle may use 6.88 GB: build it with --target raspberry-pi-5"
    )


def test_memory_that_can_t_be_compared_is_not():
    unknown = machine(memory_gb=0)
    check_machine("raspberry-pi-5-8gb", "aarch64", unknown)
    check_machine("raspberry-pi-9", "aarch64", machine(memory_gb=1))
    # x86-64-cpu only assumes its RAM; a size said aloud counts.
    small = machine("amd64", 4, ("avx2", "fma"), "x86-64-cpu")
    small = msgspec.structs.replace(small, arch="x86_64")
    check_machine("x86-64-cpu", "x86_64", small)
    with pytest.raises(TargetError, match="x86-64-cpu-32gb"):
        check_machine("x86-64-cpu-32gb", "x86_64", small)


def test_unknown_board_is_told_what_it_can_run(tree):
    server = detect_machine(tree("aarch64-server"))
    names = [t.name for t in runnable_targets(server)]
    assert "raspberry-pi-5-16gb" in names
    assert not any(name.startswith(("jetson", "x86")) for name in names)
    assert describe_machine(server) == (
        "not a board that edgesd knows: Ampere server (aarch64, 4 CPUs, 15.51 GB; dotprod, "
        "fp16_arithmetic): build it with --target raspberry-pi-5-16gb"
    )
    check_machine("raspberry-pi-5-16gb", "aarch64", server, ("dotprod",))


def test_machine_too_weak_for_every_target(tree):
    weak = detect_machine(tree("x86-64-without-avx2"))
    assert runnable_targets(weak) == ()
    with pytest.raises(TargetError, match=r"without avx2, which .* every target needs more"):
        check_machine("x86-64-cpu", "x86_64", weak, ("avx2",))


def test_the_device_room_is_light():
    code = (
        "import sys, edgesd.device.detect\n"
        "heavy = {'torch', 'numpy', 'onnx', 'onnxruntime', 'diffusers', 'transformers', 'click'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
