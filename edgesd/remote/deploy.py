"""`edgesd deploy`: the runtime and a bundle onto a board, over SSH.

The board needs python3 and sshd only. The runtime goes into a virtual environment, from
wheels, without a network there; then `edgesd slots` there (device/slots.py) takes the bundle in,
and LoRAs for it.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

from msgspec import Meta

import edgesd
from edgesd.device.capabilities import normal_arch
from edgesd.device.slots import BoardLora, Installed, Slot, check_lora_name
from edgesd.device.targets import OS_BYTES
from edgesd.errors import BoardError, TargetError
from edgesd.files import sha256_file
from edgesd.progress import SILENT, Progress, count_bytes
from edgesd.remote import board as boards
from edgesd.remote.board import Board, Item, bundle_items
from edgesd.remote.wheels import BOARD_PACKAGES, cached_wheels, fitting_wheels
from edgesd.runtime.backends import get_backend
from edgesd.runtime.bundle import CHECKSUM, MANIFEST, SIGNATURE, Bundle
from edgesd.runtime.fitting import least_memory
from edgesd.runtime.footprint import prompter_bytes
from edgesd.runtime.lora import SUFFIX, Used, filling, read_lora
from edgesd.runtime.signature import read_lora_signature
from edgesd.spec.base import Spec

_HOME = "edgesd"
"""Folder on the board, as device.slots.home_folder says it."""
_OBJECTS = f"{_HOME}/objects"
_PYTHONS = ((3, 10), (3, 13))
_SPARE_BYTES = 64 << 20
"""Of the board's disk, left free."""
_INSTALL_SECONDS = 3600.0
_SHOW_SECONDS = 900.0
"""For slots, which wait for another deploy to end."""
_UNPACKED = 4
"""A wheel takes about so many times its size once installed."""


class Deployed(Spec, frozen=True):
    """The result of a deploy.

    sent_bytes: over the link. written_bytes: to the board's disk, counted: what was sent, and the
    runtime once installed. runtime: "installed", or "kept". installed: None where this very bundle
    was active already, and every byte of it right. loras: what was put beside it.
    """

    slot: Slot
    runtime: str
    sent_bytes: int
    written_bytes: int
    seconds: float
    installed: Installed | None = None
    loras: tuple[BoardLora, ...] = ()


class LoraToDeploy(NamedTuple):
    """A LoRA for boards. files: its own, and its signature's, if it has one."""

    name: str
    files: tuple[Item, ...]


def lora_to_deploy(path: Path, bundle: Bundle) -> LoraToDeploy:
    """The LoRA in a file of `edgesd lora convert`, which is called as the file is on boards.

    Raises InputError as `read_lora` and `read_lora_signature`, UsageError where it doesn't fit the
    bundle, or has a name that it can't have there.
    """
    name = path.name.removesuffix(SUFFIX)
    lora = read_lora(path)
    check_lora_name(name)
    filling(bundle.manifest, [Used(lora)])
    files = [Item(path.stat().st_size, lora.sha256, partial(_pieces, path))]
    raw = read_lora_signature(path)
    if raw is not None:
        files.append(Item(len(raw), hashlib.sha256(raw).hexdigest(), partial(iter, [raw])))
    return LoraToDeploy(name, tuple(files))


class _Here(NamedTuple):
    """Facts about a board that has no edgesd yet. glibc: the minor version of 2."""

    python: str
    arch: str
    glibc: int
    jetson: bool


_ASK = """
import json, os, platform, struct, sys
libc, version = platform.libc_ver()
try:
    memory = int(open("/proc/meminfo").read().split("MemTotal:")[1].split()[0])
except (OSError, IndexError, ValueError):
    memory = 0
print(json.dumps([list(sys.version_info[:2]), platform.machine(), 8 * struct.calcsize("P"), libc,
                  version, os.path.exists("/etc/nv_tegra_release"), memory]))
"""


class _Told(NamedTuple):
    """What _ASK prints. memory: in kB; 0 where it can't be read."""

    python: tuple[int, int]
    machine: str
    bits: int
    libc: str
    version: str
    jetson: bool
    memory: Annotated[int, Meta(ge=0, le=1 << 40)]


_GLIBC = re.compile(r"2\.([0-9]{1,3})(?:\.[0-9]+)?")

_INSTALL = """
set -e
cd "$1"; id="$2"; site="$3"; pip="$4"; shift 4
exec 9>>lock  # what a lost link left at work here still holds it
flock -w 600 9 || { echo "another deploy is at work: wait until it has ended" >&2; exit 1; }
if [ -f "runtime/$id/whole" ]; then exit 0; fi
rm -rf "runtime/$id"; mkdir -p runtime
python3 -I -m venv --without-pip $site "runtime/$id"
PYTHONPATH="wheels/$pip" "runtime/$id/bin/python" -m pip install --quiet --no-index \
    --find-links wheels --no-cache-dir --disable-pip-version-check \
    --root-user-action ignore "$@" >&2
"runtime/$id/bin/edgesd" --version >&2
sync "runtime/$id" 2>/dev/null || sync
touch "runtime/$id/whole"
"""

_SWITCH = """
set -e
cd "$1"
rm -f .bin.new; ln -s "runtime/$2/bin" .bin.new; mv -T .bin.new bin
mkdir -p "$HOME/.local/bin"
[ -e "$HOME/.local/bin/edgesd" ] || ln -sfn "$PWD/bin/edgesd" "$HOME/.local/bin/edgesd"
for other in runtime/*; do [ "$other" = "runtime/$2" ] || rm -rf "$other"; done
sync . 2>/dev/null || sync
du -sk "runtime/$2"
"""


async def deploy(
    board: Board,
    bundle: Bundle,
    wheels: Path | None = None,
    self_test: bool = True,
    progress: Progress = SILENT,
    loras: Sequence[LoraToDeploy] = (),
) -> Deployed:
    """Install the runtime and `bundle` on the board, and make it the active bundle, with `loras`
    beside it. wheels: folder that they are chosen from; None asks pip's index, on this machine.
    Raises TargetError when the board isn't one of the bundle's architecture, has no fit Python or
    too little memory for any mode, ResourceError when its disk is too small, BoardError with the
    board's own words when it refuses the bundle or a LoRA, or the self-test fails there.
    """
    start = time.perf_counter()
    here = await _look(board, bundle)
    sent, written = await _runtime(board, bundle, here, wheels, progress)
    state = "installed" if written else "kept"
    slot, installed, of_bundle = await _bundle(board, bundle, self_test, progress)
    placed, of_loras = await _loras(board, loras, progress)
    sent_now = of_bundle + of_loras
    seconds = time.perf_counter() - start
    return Deployed(slot, state, sent + sent_now, written + sent_now, seconds, installed, placed)


async def _bundle(
    board: Board, bundle: Bundle, self_test: bool, progress: Progress
) -> tuple[Slot, Installed | None, int]:
    """Make `bundle` the active one: its slot, what was done (None where it was active and whole),
    and bytes sent."""
    active = await active_slot(board)
    files = bundle_items(bundle)
    frame = {name: files[name].sha256 for name in bundle.frame}
    items = {item.sha256: item for item in files.values()}
    signature = frame.get(SIGNATURE, "")
    # An unsigned copy takes no signature away; "" where the active bundle can't be opened.
    same = active is not None and active.manifest_sha256 == bundle.manifest_sha256
    if active and same and signature not in ("", active.signature_sha256):
        progress.line("it is active already: sending its signature")
    elif same:
        progress.line("it is active already: verifying it there")
        try:
            slot = boards.decode(
                board, await boards.edgesd(board, "slots", "check", "--json"), Slot
            )
            return slot, None, 0
        except BoardError as exc:
            progress.line(f"installing it anew, for this reason: {exc}")
    count = count_bytes(progress, "bundle", sum(item.size for item in items.values()))
    sent = await boards.send(board, _OBJECTS, items, count, _SPARE_BYTES, others=True)
    arguments = ["slots", "install", frame[MANIFEST], frame[CHECKSUM], "--json"]
    if SIGNATURE in frame:
        arguments += ["--signature", frame[SIGNATURE]]
    if not self_test:
        arguments.append("--no-self-test")
    output = await boards.edgesd(board, *arguments, on_line=progress.line)
    installed = boards.decode(board, output, Installed)
    return installed.slot, installed, sent


async def _loras(
    board: Board, loras: Sequence[LoraToDeploy], progress: Progress
) -> tuple[tuple[BoardLora, ...], int]:
    """Put LoRAs beside the active bundle: what is there then, and bytes sent."""
    placed, sent = [], 0
    for lora in loras:
        items = {item.sha256: item for item in lora.files}
        count = count_bytes(progress, lora.name, sum(item.size for item in lora.files))
        sent += await boards.send(board, _OBJECTS, items, count, _SPARE_BYTES, others=True)
        own, *signatures = (item.sha256 for item in lora.files)
        signed = [part for sha256 in signatures for part in ("--signature", sha256)]
        output = await boards.edgesd(
            board, "slots", "lora", lora.name, own, *signed, "--json", on_line=progress.line
        )
        placed.append(boards.decode(board, output, BoardLora))
    return tuple(placed), sent


async def rollback(board: Board, self_test: bool = True, progress: Progress = SILENT) -> Installed:
    """Make the previous bundle active again. Raises BoardError with the board's words."""
    arguments = ["slots", "rollback", "--json", *([] if self_test else ["--no-self-test"])]
    return boards.decode(
        board, await boards.edgesd(board, *arguments, on_line=progress.line), Installed
    )


async def active_slot(board: Board) -> Slot | None:
    """The bundle that is active on the board, or None."""
    output = await boards.edgesd(
        board, "slots", "show", "--wait", "--json", limit_seconds=_SHOW_SECONDS
    )
    return next((slot for slot in boards.decode(board, output, list[Slot]) if slot.active), None)


async def _look(board: Board, bundle: Bundle) -> _Here:
    done = await boards.in_time(board, board.run(["python3", "-I", "-c", _ASK]), "python3")
    if done.status == 127:
        raise TargetError(
            f"{board.name} has no python3: install it there (Debian: apt-get install python3)"
        )
    if done.status:
        words = boards.excerpt(done.err) or f"it ended with status {done.status}"
        raise BoardError(f"{board.name}: python3 doesn't work there: {words}")
    told = boards.decode(board, done.out, _Told)
    (major, minor), machine, bits, libc, version, jetson, memory = told
    manifest = bundle.manifest
    arch = normal_arch(machine)
    if bits != 64:
        raise TargetError(f"{board.name} has a 32-bit Python: edgesd needs a 64-bit system")
    if arch != normal_arch(manifest.arch):
        raise TargetError(
            f"{board.name} is {arch}, and {bundle.path.name} is for {manifest.target} "
            f"({manifest.arch}): build it for a board of that architecture"
        )
    if libc != "glibc":
        raise TargetError(
            f"{board.name} has no glibc: the wheels that edgesd needs are made for it"
        )
    if not _PYTHONS[0] <= (major, minor) <= _PYTHONS[1]:
        raise TargetError(
            f"{board.name} has Python {major}.{minor}: edgesd needs 3.10 to 3.13 there"
        )
    glibc = _GLIBC.fullmatch(version)
    if not glibc:
        raise boards.strange(board, "python3", version)
    if memory:
        _check_memory(board, bundle, memory << 10)
    return _Here(f"{major}.{minor}", arch, int(glibc[1]), jetson)


def _check_memory(board: Board, bundle: Bundle, memory_bytes: int) -> None:
    """Raise TargetError for a bundle that needs more than a board has in any memory mode."""
    usable = memory_bytes - OS_BYTES
    mode, needed = least_memory(bundle)
    prompter = bundle.manifest.prompter
    if prompter:
        needed = max(needed, prompter_bytes(bundle.size(name) for name in prompter.files))
    if needed > usable:
        shape = bundle.manifest.pipeline.shape
        raise TargetError(
            f"{board.name} has {max(0, usable) / 1e6:.0f} MB of memory for edgesd, and "
            f"{bundle.path.name} needs {needed / 1e6:.0f} MB to generate {shape.width}x"
            f"{shape.height} pixels in {mode} mode: build one for such a board, edgesd plan says "
            "what fits"
        )


async def _runtime(
    board: Board, bundle: Bundle, here: _Here, wheels: Path | None, progress: Progress
) -> tuple[int, int]:
    """Install the runtime that `bundle` needs, unless it is there; bytes sent and bytes written."""
    extra = list(get_backend(bundle.manifest.backend).board_packages)
    if bundle.manifest.prompter:
        extra.append("xllamacpp")
    if wheels is not None:
        chosen = fitting_wheels(wheels, here.python, here.arch, here.glibc)
    else:
        own = any(engine.kernels for engine in bundle.manifest.engines.values())
        chosen = cached_wheels(here.python, here.arch, extra, here.glibc, own, progress)
    items = {
        path.name: Item(path.stat().st_size, sha256_file(path), partial(_pieces, path))
        for path in chosen
    }
    said = sorted(f"{name} {item.sha256}" for name, item in items.items())
    key = "\n".join([*said, here.python, str(here.jetson), *extra])
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    there = board.run(["test", "-f", f"{_HOME}/runtime/{name}/whole"])
    if (await boards.in_time(board, there, "test")).status == 0:
        await boards.ask(board, ["sh", "-c", _SWITCH, "switch", _HOME, name])
        return 0, 0
    total = sum(item.size for item in items.values())
    count = count_bytes(progress, "runtime", total)
    spare = _SPARE_BYTES + _UNPACKED * total
    sent = await boards.send(board, f"{_HOME}/wheels", items, count, spare)
    progress.line(f"installing edgesd {edgesd.__version__} for Python {here.python} on {here.arch}")
    pip = next(path.name for path in chosen if path.name.startswith("pip-"))
    site = "--system-site-packages" if here.jetson else ""
    packages = [p for p in (*BOARD_PACKAGES, *extra) if p != "pip"]
    command = ["sh", "-c", _INSTALL, "install", _HOME, name, site, pip, *packages]
    await boards.ask(board, command, progress.line, _INSTALL_SECONDS)
    output = await boards.ask(board, ["sh", "-c", _SWITCH, "switch", _HOME, name])
    used = re.match(r"([0-9]{1,12})\s", output)
    if not used:
        raise boards.strange(board, "du", output)
    return sent, sent + (int(used[1]) << 10)


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            yield piece
