"""Bundles on a board: two slots, one of them active, and the files that both share.

Below `home_folder()`:

    objects/SHA256     files that were sent, by their content
    slots/a  slots/b   bundles, of hard links to objects: files that both have are on the card once
    current            symbolic link to the active slot
    loras/NAME.lora    LoRAs, hard links to objects, too; NAME.lora.sig where they are signed

A bundle is assembled beside the slots, verified, and tested by generating an image. Only then it
takes the place of the slot that isn't active, and `current` is switched by one rename: whatever is
killed or cut, and whenever, `current` leads to the whole old bundle or to the whole new one.
LoRAs belong to no slot: they fit every bundle with the same places for them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import msgspec

from edgesd.device.detect import emulated
from edgesd.device.opening import check_runs_here
from edgesd.errors import BoardError, BundleError, InputError, UsageError
from edgesd.files import (
    disk_errors,
    environment_folder,
    fsync_dir,
    fsync_tree,
    link_or_copy,
    sha256_file,
    user_home,
)
from edgesd.processes import module_command
from edgesd.progress import SILENT, Progress, count_bytes
from edgesd.runtime.bundle import (
    CHECKSUM,
    MANIFEST,
    SIGNATURE,
    Bundle,
    open_bundle,
    read_manifest,
)
from edgesd.runtime.lora import SUFFIX, Used, filling, read_lora
from edgesd.runtime.signature import check_trusted_lora, lora_signature
from edgesd.spec.base import Spec, is_sha256

_SLOTS, _LORAS = ("a", "b"), "loras"
_TEST_STEPS = 2
_TEST_PROMPT = "a red apple"
_PATIENCE_SECONDS, _POLL_SECONDS = 600, 0.2
"""How long another deploy on the same board is waited for, and how often it is looked."""
_SHARED_MEMORY = Path("/dev/shm")


class SelfTest(Spec, frozen=True):
    """The result of the self-test before a switch. Seconds of wall time, loading included.

    emulated: they are not a board's.
    """

    seconds: float
    step_seconds: float
    peak_memory_bytes: int
    emulated: bool


class Slot(Spec, frozen=True):
    """A bundle on a board. problem: why it can't be opened, where it can't. signature_sha256: of
    its bundle.sig; "" for an unsigned one."""

    slot: str
    active: bool
    name: str = ""
    precision: str = ""
    target: str = ""
    manifest_sha256: str = ""
    bytes: int = 0
    problem: str | None = None
    signature_sha256: str = ""


class Installed(Spec, frozen=True):
    """The result of `install` and `rollback`. signer: who signed it, if this machine checks
    signatures."""

    slot: Slot
    self_test: SelfTest | None
    signer: str | None = None


class BoardLora(Spec, frozen=True):
    """A LoRA on a board. name: what `edgesd generate --lora` calls it there. sha256: of its file;
    "" where that isn't asked for."""

    name: str
    bytes: int
    sha256: str = ""


_LORA_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")


def check_lora_name(name: str) -> None:
    """Raise UsageError for a name that a LoRA can't have on boards."""
    if not _LORA_NAME.fullmatch(name):
        raise UsageError(
            f"{name[:120]!r} can't be the name of a LoRA on a board: letters, digits, _, . and - "
            "can, 100 at most: rename the file"
        )


_BETTER_DISK = "bundles are deployed to a home folder on a disk with links and locks (ext4)"
"""Advice where symbolic links or locks are missing. Not EDGESD_HOME: deploy sets it."""


def home_folder() -> Path:
    """EDGESD_HOME, or ~/edgesd: where `edgesd deploy` puts everything. Raises InputError without
    a home folder."""
    given = environment_folder("EDGESD_HOME")
    if given is not None:
        return given
    home = user_home()
    if home is None:
        raise InputError("there is no home folder here: set EDGESD_HOME to the folder of slots")
    return home / "edgesd"


def lora_folder() -> Path | None:
    """Where the LoRAs lie that were deployed to this machine. None without a home folder."""
    try:
        return home_folder() / _LORAS
    except InputError:
        return None


class Slots:
    """The bundles below `root`. Raises InputError, ResourceError as the disk answers."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or home_folder()
        self.current = self.root / "current"
        self._objects = self.root / "objects"
        self._slots = self.root / "slots"
        self._loras = self.root / _LORAS

    def show(self, wait: bool = False) -> list[Slot]:
        """The bundles that are there, the active one first.

        wait: until no other process changes them: a deploy whose link was lost works on.
        """
        if wait and self.root.is_dir():
            with self._alone():
                return self.show()
        active = self._active()
        found = [self._look(name, name == active) for name in _SLOTS if self._at(name).is_dir()]
        return sorted(found, key=lambda slot: not slot.active)

    def install(
        self,
        manifest: str,
        checksum: str,
        signature: str | None = None,
        self_test: bool = True,
        progress: Progress = SILENT,
    ) -> Installed:
        """Make the bundle active whose bundle.json, bundle.sha256 and bundle.sig are these objects.

        Raises BundleError when an object is missing or damaged (it is removed: sending it anew
        mends that) or no trusted key signed the bundle, TargetError when it is for another board,
        BoardError when the self-test fails. In all these cases the active bundle stays, and so does
        the one to go back to.
        """
        with self._alone():
            fresh = self._slots / ".next"
            self._link(fresh, manifest, checksum, signature)
            bundle = open_bundle(fresh)
            signer = self._check(bundle, progress)
            tested = self._self_test(fresh, progress) if self_test else None
            fsync_tree(fresh)
            active = self._active()
            if active and self._sign(active, fresh):
                return Installed(self._look(active, True), tested, signer)
            into = self._spare()
            self._clear(self._at(into))
            fresh.rename(self._at(into))
            fsync_dir(self._slots)
            self._switch(into)
            self._sweep()
            return Installed(self._look(into, True), tested, signer)

    def rollback(self, self_test: bool = True, progress: Progress = SILENT) -> Installed:
        """Make the other slot active again, once it was verified and has generated an image.

        Raises InputError when there is no other, else as `install`.
        """
        with self._alone():
            into = self._spare()
            path = self._at(into)
            if self._active() is None or not path.is_dir():
                raise InputError("there is no bundle to go back to: deploy one")
            signer = self._check(open_bundle(path), progress)
            tested = self._self_test(path, progress) if self_test else None
            self._switch(into)
            return Installed(self._look(into, True), tested, signer)

    def check(self, progress: Progress = SILENT) -> Slot:
        """The active slot, once every byte of it is verified. Raises BundleError, InputError."""
        active = self._active()
        if active is None:
            raise InputError("no bundle is active: deploy one")
        with self._alone():
            self._check(open_bundle(self._at(active)), progress)
        return self._look(active, True)

    def put_lora(self, name: str, sha256: str, signature: str | None = None) -> BoardLora:
        """Let `edgesd generate --lora NAME` use the LoRA whose file is this object, as NAME.lora.
        It takes the place of another one of that name. signature: the object that is its own.

        Raises UsageError for a name that is none, and for a LoRA that doesn't fit the active
        bundle; InputError where no bundle is active, and for a file that is no LoRA; BundleError
        for an object that is missing or damaged, or that no trusted key signed. What was there
        stays then.
        """
        check_lora_name(name)
        with self._alone():
            active = self.active_bundle()
            if active is None:
                raise InputError("no bundle is active that a LoRA could be for: deploy one")
            fresh = self._loras / ".next"
            try:
                self._link_lora(fresh / f"{name}{SUFFIX}", sha256, signature, active)
                place = self._move_lora(fresh / f"{name}{SUFFIX}")
            finally:
                self._clear(fresh)
            self._sweep()
            return BoardLora(name, place.stat().st_size, sha256)

    def loras(self) -> list[BoardLora]:
        """The LoRAs that were deployed, by name."""
        found = sorted(self._loras.glob(f"[!.]*{SUFFIX}")) if self._loras.is_dir() else []
        return [BoardLora(path.name[: -len(SUFFIX)], path.stat().st_size) for path in found]

    def active_bundle(self) -> Bundle | None:
        """The bundle that is active, or None. Raises BundleError for one that can't be opened."""
        active = self._active()
        return None if active is None else open_bundle(self._at(active))

    def _sign(self, active: str, fresh: Path) -> bool:
        """Where `fresh` is the active bundle but for its signature: put that there, and no more.

        The bundle to go back to stays what it was.
        """
        path, signature = self._at(active), fresh / SIGNATURE
        if not signature.exists():
            return False
        files = [file.relative_to(fresh) for file in fresh.rglob("*") if file.is_file()]
        for file in files:
            there = path / file
            if file.name != SIGNATURE and not (there.exists() and there.samefile(fresh / file)):
                return False
        signature.replace(path / SIGNATURE)
        fsync_dir(path)
        self._clear(fresh)
        self._sweep()
        return True

    def _at(self, slot: str) -> Path:
        return self._slots / slot

    def _active(self) -> str | None:
        try:
            name = self.current.readlink().name
        except OSError:
            return None
        return name if name in _SLOTS and self._at(name).is_dir() else None

    def _spare(self) -> str:
        return "b" if self._active() == "a" else "a"

    def _look(self, name: str, active: bool) -> Slot:
        try:
            bundle = open_bundle(self._at(name))
        except BundleError as exc:
            return Slot(name, active, problem=str(exc))
        manifest = bundle.manifest
        return Slot(
            name,
            active,
            manifest.name,
            manifest.precision,
            manifest.target,
            bundle.manifest_sha256,
            bundle.disk_bytes(),
            signature_sha256=_signature_sha256(bundle),
        )

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Lock the slots. Waits for another process that has them; raises InputError at last."""
        with disk_errors(self.root, output=False):
            self._slots.mkdir(parents=True, exist_ok=True)
            self._objects.mkdir(exist_ok=True)
            with (self.root / "lock").open("a") as lock:
                end = time.monotonic() + _PATIENCE_SECONDS
                while not _locked(lock):
                    if time.monotonic() > end:
                        raise InputError(
                            f"another deploy is at work in {self.root}: wait until it has ended"
                        )
                    time.sleep(_POLL_SECONDS)
                self._clear(self._slots / ".old")
                yield

    def _link(self, fresh: Path, manifest: str, checksum: str, signature: str | None) -> None:
        """Make the folder `fresh` of hard links to what the manifest lists."""
        self._clear(fresh)
        fresh.mkdir()
        frame = {MANIFEST: manifest, CHECKSUM: checksum}
        if signature:
            frame[SIGNATURE] = signature
        for name, sha256 in frame.items():
            self._link_one(sha256, fresh / name)
        found = read_manifest(fresh, (fresh / MANIFEST).read_bytes())
        for name, entry in found.files.items():
            path = fresh / name
            path.parent.mkdir(parents=True, exist_ok=True)
            self._link_one(entry.sha256, path)

    def _link_one(self, sha256: str, path: Path) -> None:
        if not is_sha256(sha256):
            raise BundleError(f"{path.name}: {sha256[:80]!r} isn't a SHA-256: deploy again")
        try:
            link_or_copy(self._objects / sha256, path)
        except FileNotFoundError as exc:
            raise BundleError(f"{path.name} hasn't arrived: deploy again") from exc

    def _link_lora(self, path: Path, sha256: str, signature: str | None, active: Bundle) -> None:
        """Make `path`, and its signature, of objects in a folder of their own, and check them."""
        self._clear(path.parent)
        path.parent.mkdir(parents=True)
        self._link_one(sha256, path)
        if signature:
            self._link_one(signature, lora_signature(path))
        if sha256_file(path) != sha256:
            raise BundleError(f"{path.name} is damaged: deploy it again")
        filling(active.manifest, [Used(read_lora(path))])
        check_trusted_lora(path, sha256)
        fsync_tree(path.parent)

    def _move_lora(self, path: Path) -> Path:
        """Put the LoRA where it is looked for, and its signature: the new path."""
        place = self._loras / path.name
        if lora_signature(path).exists():
            lora_signature(path).replace(lora_signature(place))
        else:
            lora_signature(place).unlink(missing_ok=True)
        path.replace(place)
        fsync_dir(self._loras)
        return place

    def _check(self, bundle: Bundle, progress: Progress) -> str | None:
        """Verify every byte; an object that is damaged is removed, so that it is sent anew."""
        signer = check_runs_here(bundle)
        progress.line("verifying")
        on_bytes = count_bytes(progress, "verify", bundle.total_bytes())
        for name, entry in bundle.manifest.files.items():
            try:
                bundle.verify([name], on_bytes)
            except BundleError:
                (self._objects / entry.sha256).unlink(missing_ok=True)
                raise
        return str(signer) if signer else None

    def _self_test(self, path: Path, progress: Progress) -> SelfTest:
        """Generate one image in few steps, in a process of its own, which may crash."""
        progress.line("generating a test image")
        memory = _SHARED_MEMORY if os.access(_SHARED_MEMORY, os.W_OK) else None
        with tempfile.TemporaryDirectory(prefix="edgesd-", dir=memory) as folder:
            image = Path(folder) / "test.png"
            command = module_command("edgesd", "generate", str(path), "-p", _TEST_PROMPT)
            command += ["--steps", str(_TEST_STEPS), "--seed", "0", "-o", str(image)]
            # The machine was checked, and the one in a test may be a fake.
            command += ["--any-machine", "--json"]
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
            if done.returncode:
                raise BoardError(f"the self-test failed, nothing was switched: {_ended(done)}")
            result = msgspec.json.decode(done.stdout, type=_Generated)
            _check_image(image)
        step = max(result.step_seconds)
        return SelfTest(result.total_seconds, step, result.peak_memory_bytes, emulated())

    def _switch(self, slot: str) -> None:
        new = self.root / ".current.new"
        new.unlink(missing_ok=True)
        try:
            new.symlink_to(Path("slots") / slot)
        except OSError as exc:
            if exc.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            raise InputError(
                f"{self.root} lies on a disk without symbolic links: {_BETTER_DISK}"
            ) from exc
        new.replace(self.current)
        fsync_dir(self.root)

    def _clear(self, path: Path) -> None:
        """Remove a slot in one go, so that it is never seen in part."""
        if not path.exists():
            return
        old = self._slots / ".old"
        if path != old:
            path.rename(old)
        shutil.rmtree(old)

    def _sweep(self) -> None:
        """Remove objects that no slot has, and what is left of those that were cut off."""
        for path in self._objects.iterdir():
            if path.stat().st_nlink == 1:
                path.unlink()


def _signature_sha256(bundle: Bundle) -> str:
    if not bundle.signed:
        return ""
    return hashlib.sha256(bundle.framed(SIGNATURE)).hexdigest()


def _locked(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as exc:
        raise InputError(f"{lock.name} can't be locked ({exc.strerror}): {_BETTER_DISK}") from exc
    return True


class _Generated(msgspec.Struct):
    """What the self-test reads of `edgesd generate --json`."""

    total_seconds: float
    step_seconds: list[float]
    peak_memory_bytes: int


def _ended(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        hint = ": out of memory?" if name == "SIGKILL" else ""
        return f"generating was killed by {name}{hint}"
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return lines[-1].removeprefix("edgesd: ") if lines else f"status {done.returncode}"


def _check_image(path: Path) -> None:
    from PIL import Image

    with Image.open(path) as image:
        if all(low == high for low, high in image.convert("RGB").getextrema()):
            raise BoardError("the self-test generated one flat colour: nothing was switched")
