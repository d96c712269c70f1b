"""`edgesd bench --host`: a benchmark of the bundle that is active on a board, over SSH.

The board goes on with it when the link is lost: it runs there under a key (device/detached.py) that
says what is measured, and a second command for the same joins it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import msgspec

from edgesd.device.bench import Bench
from edgesd.errors import TargetError
from edgesd.progress import SILENT, Progress
from edgesd.remote import board as boards
from edgesd.remote.board import Board
from edgesd.remote.deploy import active_slot
from edgesd.runtime.bundle import Bundle

_ACTIVE = "edgesd/current"


async def bench_on(
    board: Board, bundle: Bundle, options: Sequence[str], progress: Progress = SILENT
) -> Bench:
    """Measure `bundle` on the board; options: those of `edgesd bench`, but for where it runs.

    Raises TargetError when another bundle is active there, BoardError with the board's own words.
    """
    slot = await active_slot(board)
    if slot is None or slot.manifest_sha256 != bundle.manifest_sha256:
        active = f"{slot.name} {slot.manifest_sha256[:16]}" if slot else "none"
        raise TargetError(
            f"{board.name} has another bundle active ({active}): edgesd deploy {bundle.path} "
            f"{board.name}"
        )
    said = "\n".join([bundle.manifest_sha256, *options])
    key = f"bench-{hashlib.sha256(said.encode()).hexdigest()[:24]}"
    command = ["bench", "run", _ACTIVE, *options, "--json", "--detached", key]
    output = await boards.edgesd(board, *command, on_line=progress.line)
    found = boards.decode(board, output, tuple[Bench])[0]
    await boards.edgesd(board, "bench", "forget", key)
    return msgspec.structs.replace(found, host=board.name)
