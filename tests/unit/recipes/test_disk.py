"""Disk that builds take is told before them, and given back after."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgesd.errors import ResourceError
from edgesd.progress import SILENT, Lines
from edgesd.recipes import disk


def _free(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=1, free=size))


def test_what_is_kept_is_counted_beside_a_bundle_on_the_same_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    out, work = tmp_path / "bundle", tmp_path / "new" / "work"
    _free(monkeypatch, 8_000_000_000)
    with pytest.raises(ResourceError, match="give --work FOLDER") as caught:
        disk.check_disk(out, work, 2_000_000, 8_000_000_000, Lines(said.append))
    assert len(str(caught.value).splitlines()) == 1 and "8.0 GB" in str(caught.value)
    _free(monkeypatch, 8_002_000_000)
    disk.check_disk(out, work, 2_000_000, 8_000_000_000, Lines(said.append))
    assert len(said) == 2 and "8.0 GB" in said[1] and str(work) in said[1]
    assert not out.exists() and not work.exists()


def test_what_an_interrupted_build_kept_counts_and_nothing_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _free(monkeypatch, 500)
    (tmp_path / "layers-1" / "unet").mkdir(parents=True)
    (tmp_path / "layers-1" / "unet" / "a").write_bytes(bytes(600))
    (tmp_path / "layers-2").mkdir()
    (tmp_path / "layers-2" / "b").write_bytes(bytes(9000))
    kept = [tmp_path / "layers-1", tmp_path / "none"]
    disk.check_disk(tmp_path / "out", tmp_path, 0, 1000, SILENT, kept)
    with pytest.raises(ResourceError):
        disk.check_disk(tmp_path / "out", tmp_path, 0, 1200, SILENT, kept)


def test_little_is_said_of_little(tmp_path: Path) -> None:
    said: list[str] = []
    disk.check_disk(tmp_path / "out", tmp_path / "work", 1000, 1000, Lines(said.append))
    assert said == []


def test_only_much_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "LARGE_BYTES", 1000)
    folders = [tmp_path / "layers-1", tmp_path / "calibration-1", tmp_path / "none"]
    for folder in folders[:2]:
        (folder / "unet").mkdir(parents=True)
        (folder / "unet" / "a").write_bytes(bytes(500))
    assert disk.remove_large(folders) == 0 and folders[0].exists()
    (folders[0] / "b").write_bytes(b"1")
    assert disk.remove_large(folders) == 1001
    assert list(tmp_path.iterdir()) == []


def test_large_networks_take_no_copy_of_their_weights() -> None:
    pytest.importorskip("torch")
    small = disk.work_bytes(100, {"unet": 1000}, covariance=True)
    assert small == 3 * 4000 + 100
    from edgesd.export.calibrate import COVARIANCE_BYTES, SAMPLES_BYTES

    huge = disk.work_bytes(100, {"transformer": 12 * 10**9, "text_encoder": 1000}, covariance=False)
    assert huge == 100 + 2 * SAMPLES_BYTES + 2 * 4000
    with_covariance = disk.work_bytes(100, {"transformer": 12 * 10**9}, covariance=True)
    assert with_covariance == 100 + 2 * (SAMPLES_BYTES + COVARIANCE_BYTES)
