"""TensorRT plans that a board builds: its graphs go there over SSH, its plans come back.

What a board has built it keeps, and what has arrived there isn't sent again: after a lost link the
same command goes on from that.
"""

from __future__ import annotations

import asyncio
import hashlib
import shutil
from pathlib import Path

import msgspec

from edgesd.device.detect import check_machine
from edgesd.device.targets import get_target
from edgesd.engines.bundle import pack_bundle, update_manifest
from edgesd.engines.plans import FinalizeCheck, Finalized, require_plans
from edgesd.engines.tensorrt import plan_path
from edgesd.errors import BoardError, ResourceError, TargetError
from edgesd.files import (
    atomic_dir,
    atomic_write,
    check_new,
    check_writable,
    private_folder,
    sha256_file,
)
from edgesd.progress import SILENT, Progress, count_bytes
from edgesd.remote import board as boards
from edgesd.remote.board import Board, bundle_items, parse_address
from edgesd.remote.ssh import connect
from edgesd.runtime.bundle import MANIFEST, SUFFIX, Bundle, open_bundle
from edgesd.runtime.flow import flow_of

_INCOMING = ".cache/edgesd/incoming"
"""Folder on the board of bundles whose plans aren't all built yet."""


def check_board(host: str, target_name: str) -> FinalizeCheck:
    """Ask the board `host` what it is and builds plans for, before long work. host:
    user@host[:port]. Raises UsageError for a malformed one, BoardError when the board can't be
    reached or can't build plans, TargetError when it isn't a board of the target.
    """

    async def check() -> FinalizeCheck:
        async with connect(parse_address(host)) as board:
            return await _look(board, target_name)

    return asyncio.run(check())


def add_plans(
    host: str,
    root: Path,
    progress: Progress = SILENT,
) -> dict[str, Finalized]:
    """Build the plans of the bundle folder `root` on the board `host`, and put them into it.

    Not atomic: `root` isn't visible to others yet. Raises UsageError, TargetError,
    BoardError, ResourceError when the board's disk is too small.
    """
    bundle = open_bundle(root)
    require_plans(bundle)

    async def build() -> tuple[FinalizeCheck, dict[str, Finalized]]:
        async with connect(parse_address(host)) as board:
            here = await _look(board, bundle.manifest.target)
            return here, await _build(board, bundle, root, progress)

    here, found = asyncio.run(build())
    engines = {}
    for name, engine in bundle.manifest.engines.items():
        plan = found[name].plan if name in found else None
        if plan is not None:
            built = plan.report.environment
            words = f"built for {built.sm} on {here.machine.model} by {built.module}"
            engine = msgspec.structs.replace(
                engine,
                checked=f"{words} {built.version}",
                built_for=built,
                plan=plan_path(name),
            )
        engines[name] = engine
    changed = [plan_path(name) for name, final in found.items() if final.plan is not None]
    update_manifest(root, msgspec.structs.replace(bundle.manifest, engines=engines), changed)
    return found


def finalize_on(
    host: str,
    bundle: Bundle,
    out: Path,
    progress: Progress = SILENT,
) -> dict[str, Finalized]:
    """Write `bundle` with plans that the board `host` builds to `out`, a folder or NAME.edgesd.

    Raises what `add_plans` raises, InputError when `out` exists, BundleError when the bundle was
    altered.
    """
    require_plans(bundle)
    check_new(out)
    check_writable(out, bundle.total_bytes())
    one_file = out.suffix == SUFFIX
    with private_folder(out) if one_file else atomic_dir(out) as root:
        for name in bundle.manifest.files:
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                file.writelines(bundle.verified_chunks(name))
        update_manifest(root, bundle.manifest)
        found = add_plans(host, root, progress)
        if one_file:
            pack_bundle(open_bundle(root), out)
    return found


async def _look(board: Board, target_name: str) -> FinalizeCheck:
    output = await boards.edgesd(
        board, "finalize", "--check", "--json", limit_seconds=boards.ANSWER_SECONDS
    )
    here = boards.decode(board, output, FinalizeCheck)
    target = get_target(target_name)
    try:
        check_machine(target.name, target.arch, here.machine, target.capabilities)
    except TargetError as exc:
        raise TargetError(f"{board.name}: {exc}") from exc
    return here


async def _build(
    board: Board, bundle: Bundle, root: Path, progress: Progress
) -> dict[str, Finalized]:
    items = bundle_items(bundle)
    raw = b"".join(bundle.chunks(MANIFEST))
    folder = f"{_INCOMING}/{hashlib.sha256(raw).hexdigest()[:16]}"
    total = sum(item.size for item in items.values())
    await boards.send(board, folder, items, count_bytes(progress, "send", total))
    await boards.edgesd(board, "finalize", folder, on_line=progress.line)
    output = await boards.edgesd(board, "finalize", folder, "--json")
    answer = boards.decode(board, output, dict[str, Finalized])
    components = flow_of(bundle.manifest.pipeline).components
    if missing := [name for name in components if name not in answer]:
        raise BoardError(f"{board.name} built no plan of {', '.join(missing)}")
    built = {name: answer[name] for name in components}  # an older runtime there builds others, too
    for name, final in built.items():
        if final.path is not None and final.plan is not None:
            await _fetch(board, final, root, name, progress)
    await boards.ask(board, ["rm", "-rf", "--", folder])
    return built


async def _fetch(board: Board, final: Finalized, root: Path, name: str, progress: Progress) -> None:
    assert final.path is not None and final.plan is not None
    path = root / plan_path(name)
    total = final.plan.report.plan_bytes
    if total <= 0:
        raise BoardError(f"{board.name} announces a plan of {total} bytes, which can't be one")
    free = shutil.disk_usage(root).free
    if total > free:
        raise ResourceError(
            f"{board.name} announces a plan of {total / 1e6:.0f} MB, and {root} has "
            f"{free / 1e6:.0f} MB left: free some space, or choose another folder with -o"
        )

    with atomic_write(path) as file:
        await board.get(final.path, total, file, count_bytes(progress, "fetch", total))
    if sha256_file(path) != final.plan.sha256:
        raise BoardError(f"{board.name}: the plan of {name} arrived damaged")
