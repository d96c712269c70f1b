"""Signatures of bundles, and the keys that a machine trusts."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

import msgspec
import pytest

from edgesd.engines.bundle import pack_bundle, sign_bundle, update_manifest
from edgesd.errors import BundleError, InputError
from edgesd.runtime import signature
from edgesd.runtime.bundle import SIGNATURE, Bundle, open_bundle
from edgesd.runtime.pipeline import Pipeline
from edgesd.runtime.prompter import prompter_of
from edgesd.runtime.settings import Settings
from edgesd.runtime.signature import (
    WrongPassphraseError,
    check_trusted,
    new_key,
    parse_public_key,
    sign,
    signer,
    trust,
    trusted_keys,
)
from tests.support import assert_refused, run_cli


@pytest.fixture(autouse=True)
def _own_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(signature, "SYSTEM_KEYS", tmp_path / "no system keys")


@pytest.fixture
def bundle(miniature: Bundle, tmp_path: Path) -> Bundle:
    shutil.copytree(miniature.path, tmp_path / "bundle")
    return open_bundle(tmp_path / "bundle")


def signed(bundle: Bundle, key: Path) -> Bundle:
    sign_bundle(bundle, sign(bundle, key))
    return open_bundle(bundle.path)


def test_signed_and_checked(bundle: Bundle, tmp_path: Path) -> None:
    key = new_key(tmp_path / "release")
    assert stat.S_IMODE((tmp_path / "release.key").stat().st_mode) == 0o600
    assert signer(bundle) is None
    made = signed(bundle, tmp_path / "release.key")
    found = signer(made)
    assert found and found.fingerprint == key.fingerprint
    made.verify()


def test_the_fingerprint_is_the_one_of_openssh(tmp_path: Path) -> None:
    if not shutil.which("ssh-keygen"):
        pytest.skip("needs ssh-keygen")
    key = new_key(tmp_path / "release")
    told = subprocess.run(
        ["ssh-keygen", "-l", "-f", tmp_path / "release.pub"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.split()[1] == key.fingerprint


def test_a_key_of_openssh_signs(bundle: Bundle, tmp_path: Path) -> None:
    if not shutil.which("ssh-keygen"):
        pytest.skip("needs ssh-keygen")
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "id")]
    subprocess.run(command, check=True)
    made = signed(bundle, tmp_path / "id")
    found = signer(made)
    assert found == parse_public_key((tmp_path / "id.pub").read_text())._replace(
        line=found.line if found else "", name=""
    )


def test_a_key_with_a_passphrase(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_key(tmp_path / "release", b"open sesame")
    key = tmp_path / "release.key"
    assert b"ENCRYPTED" in key.read_bytes()
    with pytest.raises(WrongPassphraseError):
        sign(bundle, key)
    with pytest.raises(WrongPassphraseError, match="isn't right"):
        sign(bundle, key, b"open barley")
    monkeypatch.setattr("click.prompt", lambda *_, **__: "open sesame")
    outcome = run_cli("keys", "sign", bundle.path, "--key", key)
    assert outcome.code == 0, outcome.err
    assert signer(open_bundle(bundle.path))


def test_the_one_file_form(bundle: Bundle, tmp_path: Path) -> None:
    new_key(tmp_path / "release")
    path = tmp_path / "one.edgesd"
    pack_bundle(bundle, path)
    made = signed(open_bundle(path), tmp_path / "release.key")
    assert signer(made)
    made.verify()
    again = tmp_path / "again.edgesd"
    pack_bundle(made, again)
    assert again.read_bytes() == path.read_bytes()
    folder = tmp_path / "folder"
    subprocess.run(["tar", "-xf", path, f"--one-top-level={folder}"], check=True)
    assert signer(open_bundle(folder))


def test_who_trusts_nobody_runs_anything(bundle: Bundle) -> None:
    assert check_trusted(bundle) is None


def test_who_trusts_somebody_refuses_the_rest(bundle: Bundle, tmp_path: Path) -> None:
    ours = new_key(tmp_path / "ours")
    new_key(tmp_path / "theirs")
    trust(ours)
    with pytest.raises(BundleError, match="isn't signed, and this machine runs only"):
        check_trusted(bundle)
    with pytest.raises(BundleError, match="this machine trusts only"):
        check_trusted(signed(bundle, tmp_path / "theirs.key"))
    found = check_trusted(signed(bundle, tmp_path / "ours.key"))
    assert found and found.name == "ours"
    trust(ours, trusted=False)
    assert trusted_keys() == {}
    with pytest.raises(BundleError, match="so no bundle runs here"):
        check_trusted(bundle)


NOBODY = {
    "empty": b"",
    "only comments": b"# ours:\n\n",
    "cut": b"ssh-ed25519 AAAAC3NzaC1lZDI1",
    "noise": b"\xff",
}


@pytest.mark.parametrize("whose", ["system", "user"])
@pytest.mark.parametrize("what", [*NOBODY, "dangling link", "folder", "fifo"])
def test_a_file_of_keys_without_a_key_lets_no_bundle_run(
    whose: str, what: str, bundle: Bundle, tmp_path: Path
) -> None:
    path = signature.SYSTEM_KEYS if whose == "system" else signature.user_keys()
    path.parent.mkdir(parents=True, exist_ok=True)
    if what in NOBODY:
        path.write_bytes(NOBODY[what])
    elif what == "folder":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(tmp_path / "nowhere")
    out = tmp_path / "out.png"
    outcome = run_cli("generate", bundle.path, "-p", "a cat", "-o", out)
    assert_refused(outcome, str(path), "runs")
    with pytest.raises((BundleError, InputError), match=r"no bundle|runs no"):
        Pipeline(bundle)
    assert not out.exists()


@pytest.mark.parametrize("what", ["the file", "its folder"])
def test_keys_that_every_user_may_change_let_no_bundle_run(
    what: str, bundle: Bundle, tmp_path: Path
) -> None:
    path = trust(new_key(tmp_path / "ours"))
    place, mode = (path, 0o600) if what == "the file" else (path.parent, 0o700)
    place.chmod(mode | 0o022)
    outcome = run_cli("keys", "check", bundle.path)
    assert_refused(outcome, f"every user may change {place}", f"chmod o-w {place}")
    place.chmod(mode | 0o020)  # a group of the user's own is usual
    with pytest.raises(BundleError, match="isn't signed"):
        check_trusted(bundle)


def test_one_key_is_trusted_at_a_time(tmp_path: Path) -> None:
    """A second line, or a name that the file can't hold, would be trusted unseen, or by nobody."""
    ours, theirs = (new_key(tmp_path / name).line for name in ("ours", "theirs"))
    both = tmp_path / "both.pub"
    both.write_text(f"{ours}\n{theirs}\n")
    assert_refused(run_cli("keys", "trust", both, "--yes"), "2 lines")
    for line in (f"{ours}\n{theirs}", f"{ours}\r{theirs}", f"{ours} {'n' * 2000}"):
        assert_refused(run_cli("keys", "trust", line, "--yes"), "isn't one line of at most")
    assert trusted_keys() is None


def test_python_asks_who_signed_as_the_commands_do(bundle: Bundle, tmp_path: Path) -> None:
    key = new_key(tmp_path / "ours")
    with Pipeline(bundle):
        pass
    trust(key)
    with pytest.raises(BundleError, match="isn't signed"):
        Pipeline(bundle)
    with pytest.raises(BundleError, match="isn't signed"):
        prompter_of(bundle)
    with (
        Pipeline(bundle, Settings(made_here=True)),
        Pipeline(signed(bundle, tmp_path / "ours.key")),
    ):
        pass


def test_the_signature_is_checked_on_the_manifest_that_is_used(
    bundle: Bundle, tmp_path: Path
) -> None:
    trust(new_key(tmp_path / "ours"))
    good = signed(bundle, tmp_path / "ours.key")
    evil = tmp_path / "evil"
    shutil.copytree(good.path, evil)
    update_manifest(evil, msgspec.structs.replace(good.manifest, name="EVIL"))
    opened = open_bundle(evil)
    evil.rename(tmp_path / "away")
    good.path.rename(evil)  # whoever reads the manifest again finds one that is signed
    assert opened.manifest.name == "EVIL"
    with pytest.raises(BundleError, match="signature isn't right"):
        check_trusted(opened)
    assert opened.manifest_sha256 != open_bundle(evil).manifest_sha256


def test_every_altered_byte_of_the_signature_is_seen(bundle: Bundle, tmp_path: Path) -> None:
    key = new_key(tmp_path / "ours")
    trust(key)
    made = signed(bundle, tmp_path / "ours.key")
    path = made.path / SIGNATURE
    right = path.read_bytes()
    for place in range(0, len(right) - 1, 7):
        altered = bytearray(right)
        altered[place] ^= 1
        path.write_bytes(altered)
        with pytest.raises(BundleError):
            check_trusted(open_bundle(made.path))
    path.write_bytes(right)
    assert check_trusted(open_bundle(made.path))


def test_a_changed_manifest_is_no_longer_signed(bundle: Bundle, tmp_path: Path) -> None:
    new_key(tmp_path / "ours")
    made = signed(bundle, tmp_path / "ours.key")
    update_manifest(made.path, msgspec.structs.replace(made.manifest, name="another"))
    with pytest.raises(BundleError, match="signature isn't right"):
        signer(open_bundle(made.path))


def test_the_system_s_keys_come_first(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system, user = new_key(tmp_path / "system"), new_key(tmp_path / "user")
    trust(user)
    (tmp_path / "trusted").write_text(f"# ours\n\n{system.line}\n")
    monkeypatch.setattr(signature, "SYSTEM_KEYS", tmp_path / "trusted")
    assert list(trusted_keys()) == [system.fingerprint]


def test_unreadable_keys_trust_nobody(bundle: Bundle, tmp_path: Path) -> None:
    path = signature.user_keys()
    path.parent.mkdir(parents=True)
    path.write_text("ssh-rsa AAAA\n")
    with pytest.raises(InputError, match="isn't a public key"):
        check_trusted(bundle)


class TestCommands:
    def test_from_a_new_key_to_a_refusal(self, bundle: Bundle, tmp_path: Path) -> None:
        name = tmp_path / "release"
        assert run_cli("keys", "new", name).code == 0
        assert_refused(run_cli("keys", "new", name), "aren't overwritten")
        assert "any bundle runs here" in run_cli("keys", "list").out
        assert run_cli("keys", "trust", f"{name}.pub").code == 0
        generate = ("generate", bundle.path, "-p", "a", "--steps", "1", "-o", tmp_path / "a.png")
        assert_refused(run_cli(*generate), "isn't signed", "edgesd keys sign")
        assert_refused(run_cli("keys", "check", bundle.path), "isn't signed")
        outcome = run_cli("keys", "sign", bundle.path, "--key", f"{name}.key")
        assert outcome.code == 0 and "is signed by SHA256:" in outcome.out
        assert "this machine trusts that key" in run_cli("keys", "check", bundle.path).out
        assert "signed by  SHA256:" in run_cli("inspect", bundle.path).out
        outcome = run_cli(*generate)
        assert outcome.code == 0, outcome.err
        line = Path(f"{name}.pub").read_text().strip()
        assert run_cli("keys", "trust", line, "--remove").code == 0
        assert_refused(run_cli("keys", "trust", line, "--remove"), "isn't among")

    @pytest.mark.parametrize(
        ("content", "words"),
        [(b"", "isn't a private key"), (None, "can't be read")],
    )
    def test_what_is_no_key(
        self, content: bytes | None, words: str, bundle: Bundle, tmp_path: Path
    ) -> None:
        if content is not None:
            (tmp_path / "x.key").write_bytes(content)
        assert_refused(run_cli("keys", "sign", bundle.path, "--key", tmp_path / "x.key"), words)
        assert_refused(run_cli("keys", "trust", tmp_path / "none.pub"), "give NAME.pub")

    def test_a_damaged_bundle_is_not_signed(self, bundle: Bundle, tmp_path: Path) -> None:
        new_key(tmp_path / "ours")
        name = next(name for name in bundle.manifest.files if name.endswith(".bin"))
        data = bytearray((bundle.path / name).read_bytes())
        data[0] ^= 1
        (bundle.path / name).write_bytes(data)
        outcome = run_cli("keys", "sign", bundle.path, "--key", tmp_path / "ours.key")
        assert outcome.code == 4
        assert not (bundle.path / SIGNATURE).exists()
