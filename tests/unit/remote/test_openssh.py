"""Configurations of ssh beside OpenSSH's own answer: what works there works here, else it is told.
A real sshd on loopback; both read the same file, which is that of HOME."""

from __future__ import annotations

import asyncio
import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from edgesd.errors import BoardError
from edgesd.remote.board import Address
from edgesd.remote.ssh import connect

_SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(_SSHD is None, reason="needs openssh-server"),
    pytest.mark.skipif(shutil.which("ssh") is None, reason="needs openssh-client"),
]


class Lab(NamedTuple):
    """folder: with keys, known hosts and a home. port: of an sshd; closed: of nobody."""

    folder: Path
    port: int
    closed: int

    @property
    def config(self) -> Path:
        return self.folder / "home/.ssh/config"

    def write(self, text: str, host: str = "pi") -> None:
        """Make the user's ssh_config `text`, behind where the board `pi` is."""
        where = f"Host {host}\n  HostName 127.0.0.1\n  Port {self.port}\n"
        where += f"  User {getpass.getuser()}\n"
        filled = text.replace("DIR", str(self.folder)).replace("CLOSED", str(self.closed))
        self.config.write_text(filled.replace("PORT", str(self.port)).replace("BOARD", where))

    def ssh_works(self) -> bool:
        """OpenSSH's own answer."""
        done = subprocess.run(
            ["ssh", "-F", self.config, "-o", "BatchMode=yes", "pi", "echo works"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.stdout == "works\n"

    def ours(self) -> str:
        """What a command prints through edgesd's connection, or why there is none."""

        async def run() -> str:
            async with connect(Address("pi")) as board:
                return (await board.run(["echo", "works"])).out

        try:
            return asyncio.run(run())
        except BoardError as exc:
            return str(exc)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _key(path: Path, *options: str) -> Path:
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-f", path, *(options or ("-N", ""))], check=True
    )
    return path


def _public(path: Path) -> str:
    return " ".join(path.with_suffix(".pub").read_text().split()[:2])


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    assert _SSHD
    folder = tmp_path_factory.mktemp("lab")
    (folder / "home/.ssh").mkdir(parents=True)
    for name in ("host", "id", "other", "stranger", "ca", "hostca"):
        _key(folder / name)
    _key(folder / "locked", "-N", "secret")
    shutil.copy(folder / "id", folder / "open")
    (folder / "open").chmod(0o644)
    ca = ["ssh-keygen", "-q", "-s", folder / "ca", "-I", "user", "-n", getpass.getuser()]
    subprocess.run([*ca, folder / "stranger.pub"], check=True)
    shutil.copy(folder / "id", folder / f"id-127.0.0.1-{getpass.getuser()}")
    hosts = ["ssh-keygen", "-q", "-s", folder / "hostca", "-I", "host", "-h", "-n", "127.0.0.1"]
    subprocess.run([*hosts, folder / "host.pub"], check=True)
    authorized = f"{_public(folder / 'id')}\n{_public(folder / 'locked')}\n"
    (folder / "authorized").write_text(authorized)
    port = _free_port()
    here, key = f"[127.0.0.1]:{port}", _public(folder / "host")
    wrong = _public(folder / "other")
    files = {
        "known": f"{here} {key}\n",
        "alias": f"shelf {key}\n",
        "wrong": f"{here} {wrong}\n",
        "revoked": f"@revoked * {key}\n",
        "authority": f"@cert-authority * {_public(folder / 'hostca')}\n",
        "hashed": f"{here} {key}\n",
        "empty": "",
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", folder / "hashed"], check=True)
    (folder / "sshd").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\n"
        f"HostCertificate {folder}/host-cert.pub\nAuthorizedKeysFile {folder}/authorized\n"
        f"TrustedUserCAKeys {folder}/ca.pub\nStrictModes no\nPidFile none\nUsePAM no\n"
        "PasswordAuthentication no\nKbdInteractiveAuthentication no\n"  # and no sftp
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    with (folder / "log").open("w") as log:
        server = subprocess.Popen([_SSHD, "-D", "-e", "-f", folder / "sshd"], stderr=log)
    try:
        end = time.monotonic() + 120
        while True:
            with socket.socket() as trying:
                if trying.connect_ex(("127.0.0.1", port)) == 0:
                    break
            if server.poll() is not None or time.monotonic() > end:
                pytest.skip(f"sshd doesn't start: {(folder / 'log').read_text()[-300:]}")
            time.sleep(0.05)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HOME", str(folder / "home"))
            patch.setenv("SSH_AUTH_SOCK", "")
            yield Lab(folder, port, _free_port())
    finally:
        server.terminate()
        server.wait(120)


_PROXY = "ssh -F DIR/included -W 127.0.0.1:PORT pi"
GOOD = "BOARD  IdentityFile DIR/id\n  UserKnownHostsFile DIR/known\n"
BY_KEY = "BOARD  IdentityFile DIR/id\n"
KNOWN = "  UserKnownHostsFile DIR/known\n"

# Name -> configuration, and words of the message where ssh refuses it.
QUICK: dict[str, tuple[str, str]] = {
    "all as it should be": (GOOD, ""),
    "a key that is absent": (f"BOARD  IdentityFile DIR/absent\n  IdentityFile DIR/id\n{KNOWN}", ""),
    "known hosts nowhere": (
        f"{BY_KEY}  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n",
        "",
    ),
    "a host key that is another": (
        f"{BY_KEY}  UserKnownHostsFile DIR/wrong\n",
        "ssh-keygen -f DIR/wrong -R '[127.0.0.1]:PORT'",
    ),
    "a key that isn't taken": (
        f"BOARD  IdentityFile DIR/other\n{KNOWN}",
        "takes none of your keys (tried DIR/other",
    ),
    "an option that ssh doesn't know": (f"{GOOD}  NoSuchOption yes\n", "nosuchoption"),
}
SLOW: dict[str, tuple[str, str]] = {
    "known hosts that are absent": (
        f"{BY_KEY}  UserKnownHostsFile DIR/absent\n",
        "its host key isn't known here yet",
    ),
    "one of two files is absent": (f"{BY_KEY}  UserKnownHostsFile DIR/absent DIR/known\n", ""),
    "checking is strict": (f"{GOOD}  StrictHostKeyChecking yes\n", ""),
    "strict and unknown": (
        f"{BY_KEY}  StrictHostKeyChecking yes\n  UserKnownHostsFile DIR/empty\n",
        "isn't known here yet",
    ),
    "ask and unknown": (
        f"{BY_KEY}  StrictHostKeyChecking ask\n  UserKnownHostsFile DIR/empty\n",
        "isn't known here yet",
    ),
    "accept new ones": (
        f"{BY_KEY}  StrictHostKeyChecking accept-new\n  UserKnownHostsFile /dev/null\n",
        "",
    ),
    "accept new ones, but it is another": (
        f"{BY_KEY}  StrictHostKeyChecking accept-new\n  UserKnownHostsFile DIR/wrong\n",
        "isn't the known one",
    ),
    "no checking and another": (
        f"{BY_KEY}  StrictHostKeyChecking no\n  UserKnownHostsFile DIR/wrong\n",
        "",
    ),
    "the system's known hosts": (
        f"{BY_KEY}  UserKnownHostsFile DIR/absent\n  GlobalKnownHostsFile DIR/known\n",
        "",
    ),
    "an alias of the host key": (
        f"{BY_KEY}  HostKeyAlias shelf\n  UserKnownHostsFile DIR/alias\n",
        "",
    ),
    "an alias that isn't known": (f"{GOOD}  HostKeyAlias shelf\n", "isn't known here yet"),
    "hashed known hosts": (f"{BY_KEY}  UserKnownHostsFile DIR/hashed\n", ""),
    "a revoked host key": (f"{BY_KEY}  UserKnownHostsFile DIR/revoked DIR/known\n", "revoked"),
    "an authority of hosts": (f"{BY_KEY}  UserKnownHostsFile DIR/authority\n", ""),
    "tokens": (f"BOARD  IdentityFile DIR/id-%h-%r\n{KNOWN}", ""),
    "a token of the port": (f"{BY_KEY}  UserKnownHostsFile DIR/%p DIR/known\n", ""),
    "a token that there isn't": (f"BOARD  IdentityFile DIR/%Q\n{KNOWN}", "%Q"),
    "included": ("Include DIR/included\n", ""),
    "included by a pattern": ("Include DIR/none-*.conf\nInclude DIR/includ*\n", ""),
    "a match of the host": (
        f"BOARD{KNOWN}Match originalhost pi\n  IdentityFile DIR/id\n",
        "",
    ),
    "a match by a command": (f'BOARD{KNOWN}Match exec "true"\n  IdentityFile DIR/id\n', ""),
    "a negated pattern": (
        f"BOARD{KNOWN}Host * !pi\n  HostKeyAlias no\nHost p?\n  IdentityFile DIR/id\n",
        "",
    ),
    "a proxy command": (f"{GOOD}  ProxyCommand {_PROXY}\n", ""),
    "a proxy command that fails": (f"{GOOD}  ProxyCommand false\n", "can't be reached by SSH"),
    "a jump host": (
        f"{GOOD}  ProxyJump jump\nHost jump\n  HostName 127.0.0.1\n  Port PORT\n"
        f"  IdentityFile DIR/id\n{KNOWN}",
        "",
    ),
    "a jump host that is off": (
        f"{GOOD}  ProxyJump jump\nHost jump\n  HostName 127.0.0.1\n  Port CLOSED\n",
        "127.0.0.1 refuses connections to port CLOSED",
    ),
    "these keys only": (f"{GOOD}  IdentitiesOnly yes\n", ""),
    "an agent that is absent": (f"{GOOD}  IdentityAgent DIR/no-agent\n", ""),
    "no agent": (f"{GOOD}  IdentityAgent none\n", ""),
    "a key with a passphrase": (f"BOARD  IdentityFile DIR/locked\n{KNOWN}", "DIR/locked"),
    "a key that others may read": (f"BOARD  IdentityFile DIR/open\n{KNOWN}", "bad permissions"),
    "a certificate": (
        f"BOARD  IdentityFile DIR/stranger\n  CertificateFile DIR/stranger-cert.pub\n{KNOWN}",
        "",
    ),
    "a file with CR LF": (GOOD.replace("\n", "\r\n"), ""),
    "nothing listens": (
        GOOD.replace("BOARD", "Host pi\n  Port CLOSED\nBOARD"),
        "refuses connections",
    ),
    "a name without an address": (
        GOOD.replace("BOARD", "Host pi\n  HostName no-such-board.invalid\nBOARD"),
        "the name no-such-board.invalid has no address",
    ),
    "another user": (
        GOOD.replace("BOARD", "Host pi\n  User no-such-user\nBOARD"),
        "none of your keys",
    ),
    "a value that is none": (f"{GOOD}  StrictHostKeyChecking perhaps\n", "perhaps"),
    "ignored options": (f"IgnoreUnknown UseKeychain\n{GOOD}  UseKeychain yes\n", ""),
    "a cipher that nobody has": (f"{GOOD}  Ciphers none\n", "cipher"),
    "quiet": (f"{BY_KEY}  UserKnownHostsFile DIR/wrong\n  LogLevel QUIET\n", "isn't the known one"),
    "its own master": (
        f"{GOOD}  ControlMaster auto\n  ControlPath DIR/s-%C\n  ControlPersist no\n",
        "",
    ),
    "a forward that can't be": (
        f"{GOOD}  LocalForward PORT 127.0.0.1:1\n  ExitOnForwardFailure no\n",
        "",
    ),
    "a terminal is wanted": (f"{GOOD}  RequestTTY no\n  SendEnv *\n  Compression yes\n", ""),
    "keys are confirmed": (f"{GOOD}  VerifyHostKeyDNS ask\n  UpdateHostKeys yes\n", ""),
}


def check(lab: Lab, text: str, words: str) -> None:
    lab.write(f"BOARD  IdentityFile {lab.folder}/id\n  UserKnownHostsFile {lab.folder}/known\n")
    shutil.copy(lab.config, lab.folder / "included")
    lab.write(text)
    theirs, ours = lab.ssh_works(), lab.ours()
    assert (ours == "works\n") == theirs, ours
    words = words.replace("DIR", str(lab.folder)).replace("PORT", str(lab.port))
    words = words.replace("CLOSED", str(lab.closed))
    assert theirs == (words == ""), (theirs, ours)
    if words:
        assert words in ours and "is it on" not in ours


@pytest.mark.parametrize("name", QUICK)
def test_ssh_says_the_same(name: str, lab: Lab) -> None:
    check(lab, *QUICK[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_ssh_says_the_same_of(name: str, lab: Lab) -> None:
    check(lab, *SLOW[name])


def test_an_agent_has_the_key(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one whose file has a passphrase."""
    lab.write("BOARD  UserKnownHostsFile DIR/known\n")
    started = subprocess.run(["ssh-agent", "-s"], capture_output=True, text=True, check=True).stdout
    values = dict(part.split("=", 1) for part in started.split(";") if "=" in part)
    values = {name.strip(): value for name, value in values.items()}
    try:
        monkeypatch.setenv("SSH_AUTH_SOCK", values["SSH_AUTH_SOCK"])
        subprocess.run(["ssh-add", "-q", lab.folder / "id"], check=True)
        assert lab.ssh_works()
        assert lab.ours() == "works\n"
    finally:
        os.kill(int(values["SSH_AGENT_PID"]), 15)


def test_an_interrupt_ends_what_runs_on_the_board(lab: Lab) -> None:
    lab.write(GOOD)
    mark = f"{time.monotonic()}"

    async def run() -> None:
        async with connect(Address("pi")) as board:
            work = asyncio.ensure_future(board.run(["sh", "-c", "sleep 600", mark]))
            while not _running(mark):
                await asyncio.sleep(0.05)
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)

    asyncio.run(asyncio.wait_for(run(), 60))
    end = time.monotonic() + 120
    while _running(mark):
        assert time.monotonic() < end, "what was interrupted still runs on the board"
        time.sleep(0.05)


def _running(mark: str) -> bool:
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if process.read_bytes().endswith(f"\0{mark}\0".encode()):
                return True
        except OSError:
            continue
    return False
