"""A board that isn't one: arm64 Debian under emulation, with a real sshd, in a network of its own.

    python scripts/fake_board start      # as root; prints its address, and how to reach it
    python scripts/fake_board stop
    python scripts/fake_board remove     # the cached system, too

It answers `uname -m` with aarch64 and says it is a Raspberry Pi 5, runs real aarch64 wheels on an
emulated Cortex-A76, and has nothing but python3 and sshd. It is for whether things work and whether
numbers are right: **its speed says nothing of any board's** (float is emulated hundreds of times
slower than this machine's own, int8 tens of times).

Needs root, Debian's packages qemu-user-static, binfmt-support, mmdebstrap and iproute2, and once
Debian's archive: the system is made in about 3 minutes and kept in ~/.cache/edgesd/fake-board.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from edgesd.errors import EdgesdError, InputError, ResourceError
from edgesd.files import atomic_path, expanded, user_cache
from edgesd.textfiles import read_text

PACKAGES = ("python3", "openssh-server")
SUITE = "bookworm"
CPU = "cortex-a76"
NAMESPACE = "edgesd-board"
ADDRESS, HOST_SIDE = "10.87.0.2", "10.87.0.1"
USER = "pi"
NEEDED = {
    "qemu-aarch64-static": "qemu-user-static",
    "update-binfmts": "binfmt-support",
    "mmdebstrap": "mmdebstrap",
    "ip": "iproute2",
}
CPUINFO = (
    "".join(
        f"processor\t: {core}\nBogoMIPS\t: 108.00\n"
        "Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid "
        "asimdrdm lrcpc dcpop asimddp\nCPU implementer\t: 0x41\n"
        "CPU architecture: 8\nCPU variant\t: 0x4\n"
        "CPU part\t: 0xd0b\nCPU revision\t: 1\n\n"
        for core in range(4)
    )
    + "Revision\t: d04170\nModel\t\t: Raspberry Pi 5 Model B Rev 1.0\n"
)
"""A Raspberry Pi 5's /proc/cpuinfo: this machine's own would mislead libraries."""


def folder() -> Path:
    """Where the system lies."""
    return user_cache() / "fake-board"


def base() -> Path:
    """The archive of the system as Debian makes it, named for what it holds."""
    key = hashlib.sha256("\n".join([SUITE, *PACKAGES]).encode()).hexdigest()[:12]
    return folder() / f"arm64-{key}.tar"


def start(key: Path) -> str:
    """Start the board anew; its address. `key`: public key that may log in.

    Raises InputError without root or a package, ResourceError when a step fails.
    """
    if os.geteuid() != 0:
        raise InputError("the fake board needs root: it makes a chroot and a network namespace")
    missing = sorted({package for tool, package in NEEDED.items() if not shutil.which(tool)})
    if missing:
        raise InputError(f"the fake board needs more: apt-get install {' '.join(missing)}")
    if not key.is_file():
        raise InputError(f"there is no {key}: make a key by ssh-keygen -t ed25519")
    stop()
    _emulation()
    if not base().exists():
        print("making the system, once: about 3 minutes", file=sys.stderr)
        with atomic_path(base()) as made:
            include = f"--include={','.join(PACKAGES)}"
            command = ["mmdebstrap", "--arch=arm64", "--variant=minbase", "--format=tar", include]
            _run([*command, SUITE, str(made)])
    root = folder() / "root"
    root.mkdir(parents=True)
    _run(["tar", "-xf", str(base()), "-C", str(root)])
    _prepare(root, read_text(key))
    _network()
    inside = ["ip", "netns", "exec", NAMESPACE, "chroot", str(root)]
    sshd = subprocess.Popen(
        [*inside, "/usr/sbin/sshd", "-D", "-e"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=(folder() / "sshd.log").open("w"),
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "QEMU_CPU": CPU},
        start_new_session=True,
    )
    (folder() / "pid").write_text(str(sshd.pid))
    _wait_for_sshd()
    public = (root / "etc/ssh/ssh_host_ed25519_key.pub").read_text().split()[:2]
    (folder() / "known_hosts").write_text(f"{ADDRESS} {' '.join(public)}\n")
    return f"{USER}@{ADDRESS}"


def mount_namespace() -> list[str]:
    """What to put before a command so that it sees, and changes, the board's mounts."""
    return ["nsenter", "--mount", "--target", (folder() / "pid").read_text()]


def stop() -> None:
    """End everything on the board, and remove its files but for the cached archive."""
    root = folder() / "root"
    for process in Path("/proc").glob("[0-9]*"):
        try:
            inside = (process / "root").readlink() == root
        except OSError:
            continue
        if inside:
            os.kill(int(process.name), signal.SIGKILL)
    if subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout.count(
        NAMESPACE
    ):
        _run(["ip", "netns", "delete", NAMESPACE])
    mounted = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for mount in reversed([place for place in mounted if place.startswith(f"{root}/")]):
        _run(["umount", "-l", mount])
    if root.exists():
        shutil.rmtree(root)


def _emulation() -> None:
    """Have the kernel run aarch64 programs by qemu."""
    binfmt = Path("/proc/sys/fs/binfmt_misc")
    if not (binfmt / "register").exists():
        _run(["mount", "-t", "binfmt_misc", "binfmt_misc", str(binfmt)])
    _run(["update-binfmts", "--enable", "qemu-aarch64"])


def _prepare(root: Path, key: str) -> None:
    _run(["chroot", str(root), "useradd", "--create-home", "--shell", "/bin/bash", USER])
    _run(["chroot", str(root), "usermod", "--password", "*", USER])  # sshd refuses a locked one
    ssh = root / "home" / USER / ".ssh"
    ssh.mkdir(mode=0o700)
    (ssh / "authorized_keys").write_text(key)
    owner = (root / "home" / USER).stat()
    for path in (ssh, ssh / "authorized_keys"):
        os.chown(path, owner.st_uid, owner.st_gid)
    # SetEnv: each login is emulated as the same CPU.
    (root / "etc/ssh/sshd_config.d/board.conf").write_text(
        f"UseDNS no\nUsePAM no\nPasswordAuthentication no\nSetEnv QEMU_CPU={CPU}\nMaxStartups 50\n"
    )
    (root / "run/sshd").mkdir(exist_ok=True)
    (root / "cpuinfo").write_text(CPUINFO)
    for kind, place in (("proc", "proc"), ("sysfs", "sys"), ("tmpfs", "dev/shm")):
        (root / place).mkdir(exist_ok=True)
        _run(["mount", "-t", kind, kind, str(root / place)])
    _run(["mount", "--bind", str(root / "cpuinfo"), str(root / "proc/cpuinfo")])
    for device in ("null", "zero", "urandom", "random", "tty"):
        (root / "dev" / device).touch()
        _run(["mount", "--bind", f"/dev/{device}", str(root / "dev" / device)])


def _network() -> None:
    """A network namespace, and a cable between it and this machine."""
    _run(["ip", "netns", "add", NAMESPACE])
    within = ["ip", "-n", NAMESPACE]
    _run(["ip", "link", "add", "edgesd0", "type", "veth", "peer", "eth0", "netns", NAMESPACE])
    _run(["ip", "address", "add", f"{HOST_SIDE}/24", "dev", "edgesd0"])
    _run(["ip", "link", "set", "edgesd0", "up"])
    _run([*within, "address", "add", f"{ADDRESS}/24", "dev", "eth0"])
    for device in ("lo", "eth0"):
        _run([*within, "link", "set", device, "up"])


def _wait_for_sshd() -> None:
    import socket

    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            with socket.create_connection((ADDRESS, 22), 2) as link:
                if link.recv(4) == b"SSH-":
                    return
        except OSError:
            time.sleep(0.3)
    log = (folder() / "sshd.log").read_text().strip().splitlines()
    raise ResourceError(f"the board's sshd doesn't answer: {log[-1] if log else 'it said nothing'}")


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise ResourceError(f"{' '.join(command[:3])}: {said[-1] if said else done.returncode}")


def main() -> int:
    """Parse, do, tell; the exit status."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("what", choices=("start", "stop", "remove"))
    made.add_argument("--key", type=Path, default=expanded("~/.ssh/id_ed25519.pub"))
    given = made.parse_args()
    try:
        if given.what == "start":
            address = start(given.key)
            print(address)
            print(
                f"cat {folder()}/known_hosts >> ~/.ssh/known_hosts  # to reach it", file=sys.stderr
            )
        else:
            stop()
            if given.what == "remove":
                shutil.rmtree(folder(), ignore_errors=True)
    except EdgesdError as exc:
        print(f"fake_board: {exc}", file=sys.stderr)
        return exc.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
