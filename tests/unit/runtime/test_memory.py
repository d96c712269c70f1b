"""What memory is left, in a container too, and what was used."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgesd.runtime.memory import available_bytes, peak_bytes

GB = 2**30


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root folder with 8 GB available."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable:  {8 << 20} kB\n")
    return tmp_path


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def test_without_a_limit(root: Path) -> None:
    assert available_bytes(root) == 8 * GB
    write(root / "sys/fs/cgroup", memory__max="max", memory__current=GB)
    assert available_bytes(root) == 8 * GB


def test_page_cache_does_not_count_as_used(root: Path) -> None:
    stat = f"anon 5\ninactive_file {2 * GB}\nactive_file {GB}"
    write(root / "sys/fs/cgroup", memory__max=4 * GB, memory__stat=stat)
    write(root / "sys/fs/cgroup", memory__current=int(3.5 * GB))
    assert available_bytes(root) == 3.5 * GB


def test_nested_groups_and_version_1(root: Path) -> None:
    (root / "proc/self/cgroup").write_text("5:cpu,memory:/box\n0::/user/one\n")
    write(root / "sys/fs/cgroup/user/one", memory__max=2 * GB, memory__current=GB)
    assert available_bytes(root) == GB
    write(
        root / "sys/fs/cgroup/memory/box",
        memory__limit_in_bytes=GB,
        memory__usage_in_bytes=GB,
        memory__stat=f"total_inactive_file {GB // 4}",
    )
    assert available_bytes(root) == GB // 4


def test_nothing_known(tmp_path: Path) -> None:
    assert available_bytes(tmp_path) is None


def test_this_process() -> None:
    assert 10 << 20 < peak_bytes() < 100 * GB
    assert (available_bytes() or 0) > 0
