"""Disk that builds take: told, and held against what is free, before the work; what a large one
kept is removed after it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from edgesd.errors import ResourceError
from edgesd.files import check_writable
from edgesd.progress import Progress

LARGE_BYTES = 10_000_000_000
"""What a finished build kept for others is removed if it is more, unless --work names its place."""

_TOLD_BYTES = 1_000_000_000
"""A build that takes less says nothing of it."""


def work_bytes(bundle_bytes: int, parameters: Mapping[str, int], covariance: bool) -> int:
    """Bytes that a quantized build keeps beside its bundle, about: fp32 graphs of networks that
    aren't large, statistics, quantized layers. parameters: of each network. covariance: of layers'
    inputs, is among the statistics."""
    from edgesd.export.calibrate import COVARIANCE_BYTES, SAMPLES_BYTES
    from edgesd.export.source_graphs import REFER_BYTES

    full = [4 * count for count in parameters.values()]
    graphs = sum(size for size in full if size <= REFER_BYTES)
    most = SAMPLES_BYTES + (COVARIANCE_BYTES if covariance else 0)
    states = [min(most, size) for size in full]
    # A state is written beside the one before it.
    return graphs + sum(states) + max(states, default=0) + bundle_bytes


def check_disk(
    out: Path,
    work: Path,
    bundle_bytes: int,
    kept_bytes: int,
    progress: Progress,
    kept: Iterable[Path] = (),
) -> None:
    """Tell what a build writes to `out`, and keeps in `work`, where it is much. kept: the folders
    of that: what one before it left in them counts for it.

    Raises ResourceError where that is more than is free, InputError where `out` can't be written.
    """
    check_writable(out, bundle_bytes)
    kept_bytes = max(0, kept_bytes - sum(map(size_of, kept)))
    if not kept_bytes:
        return
    check_writable(work / "work")
    here, there = _existing(out), _existing(work / "work")
    shared = here.stat().st_dev == there.stat().st_dev
    needed, disk = kept_bytes + bundle_bytes * shared, shutil.disk_usage(there)
    if not disk.total:  # the file system doesn't say
        return
    free = disk.free
    if bundle_bytes + kept_bytes >= _TOLD_BYTES:
        progress.line(
            f"disk: about {gigabytes(bundle_bytes)} in {out}, and {gigabytes(kept_bytes)} in "
            f"{work} while it is built; {gigabytes(free)} are free there"
        )
    if needed > free:
        both = f" and the bundle {gigabytes(bundle_bytes)}" if shared else ""
        raise ResourceError(
            f"the build keeps about {gigabytes(kept_bytes)} in {work}{both}, and {gigabytes(free)} "
            "of disk are free there: free some space, or give --work FOLDER on another disk"
        )


def remove_large(folders: Iterable[Path]) -> int:
    """Remove what a finished build kept where it is large; the bytes that are free by that."""
    folders = [folder for folder in folders if folder.is_dir()]
    freed = sum(map(size_of, folders))
    if freed <= LARGE_BYTES:
        return 0
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    return freed - sum(map(size_of, folders))


def gigabytes(size: int) -> str:
    """Bytes on a disk, for people: in billions."""
    return f"{size / 1e9:.1f} GB"


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder. What another build removes meanwhile counts nothing."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += Path(root, name).lstat().st_size
            except OSError:
                continue
    return total


def _existing(path: Path) -> Path:
    """The nearest folder above a path that is there."""
    path = path.absolute()
    return next(folder for folder in path.parents if folder.exists())
