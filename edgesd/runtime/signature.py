"""Signatures of bundles (Ed25519, RFC 8032), and the keys that this machine trusts.

`bundle.sig` is one line: a version, the signer's public key and the signature, the latter two in
base64. Signed are a fixed prefix and the bytes of bundle.json, which holds the hash of every other
file. Public keys are lines as OpenSSH writes them ("ssh-ed25519 AAAA... name"); a file of such
lines says whom a machine trusts. If there is such a file, unsigned bundles and other signers are
refused; if it has no keys or can't be read, every bundle is.
"""

from __future__ import annotations

import base64
import binascii
import errno
import hashlib
import os
import re
import shlex
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from edgesd.errors import BundleError, InputError, MissingDependencyError
from edgesd.files import atomic_write, check_file_place, user_config
from edgesd.runtime.bundle import MANIFEST, SIGNATURE, Bundle
from edgesd.textfiles import read_lines, read_text

_VERSION = "edgesd-ed25519-v1"
_PREFIX = b"edgesd bundle manifest, version 1\n"
_LORA_PREFIX = b"edgesd lora, version 1\n"
_MOST_SIGNATURE = 512
"""Bytes of the file."""

SYSTEM_KEYS = Path("/etc/edgesd/trusted_keys")
"""If this file exists, it alone decides."""
_TYPE = "ssh-ed25519"
_KEY_BYTES = 32
_MOST_CHARACTERS = 1000
"""Of a public key's line."""
_HEAD = (
    "# Bundles signed by these keys run here, and no others. Without this file any bundle runs.\n"
)


class PublicKey(NamedTuple):
    """One signer: the line it was read from, its 32 bytes, and its name ("" if none)."""

    line: str
    raw: bytes
    name: str

    @property
    def fingerprint(self) -> str:
        """As `ssh-keygen -l` prints it: SHA256:..."""
        return _fingerprint(self.raw)

    def __str__(self) -> str:
        return f"{self.fingerprint} ({self.name})" if self.name else self.fingerprint


def parse_public_key(line: str) -> PublicKey:
    """One line "ssh-ed25519 BASE64 [name]" (RFC 8709, section 4). Raises InputError, also for more
    than one line, so that the whole trusted text is shown."""
    if len(line.strip()) > _MOST_CHARACTERS or re.search(r"[\x00-\x1f\x7f]", line.strip()):
        raise InputError(
            f"{line.strip()[:60]!r} isn't one line of at most {_MOST_CHARACTERS} characters, as a "
            "public key is"
        )
    kind, _, rest = line.strip().partition(" ")
    encoded, _, name = rest.strip().partition(" ")
    try:
        blob = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        blob = b""
    raw = blob[-_KEY_BYTES:]
    if kind != _TYPE or len(raw) != _KEY_BYTES or blob != _blob(raw):
        raise InputError(
            f"{line.strip()[:60]!r} isn't a public key of type {_TYPE}: give NAME.pub, as "
            "`edgesd keys new` writes it"
        )
    return PublicKey(line.strip(), raw, name.strip())


def user_keys() -> Path | None:
    """The user's own file of trusted keys: edgesd/trusted_keys in XDG_CONFIG_HOME or ~/.config.

    None without a home folder: such a user has no keys.
    """
    folder = user_config()
    return folder and folder / "trusted_keys"


def keys_file() -> Path | None:
    """The file that says whom this machine trusts: SYSTEM_KEYS where it is there, else the user's;
    None where neither is. A dangling link is there.

    Raises InputError where that can't be found out.
    """
    for path in (SYSTEM_KEYS, user_keys()):
        if path is None:
            continue
        try:
            path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as exc:
            raise _unreadable(path, exc) from exc
        return path
    return None


def trusted_keys(path: Path | None = None) -> dict[str, PublicKey] | None:
    """Trusted keys by fingerprint. Empty: no bundle runs here. None, if there is no such file: any
    bundle runs.

    path: the file, instead of `keys_file`. Raises InputError for a file that can't be read, has a
    line that is no key, or that every user may change: a machine whose keys are unknown runs no
    bundle either.
    """
    path = path or keys_file()
    if path is None:
        return None
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "it isn't a regular file")
        folder = path.resolve().parent
        for place, mode in ((path, found.st_mode), (folder, folder.stat().st_mode)):
            if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
                raise InputError(
                    f"{path} says whose bundles run here, and every user may change {place}: no "
                    f"bundle runs until chmod o-w {shlex.quote(str(place))}"
                )
    except OSError as exc:
        raise _unreadable(path, exc) from exc
    try:
        lines = [line.strip() for line in read_lines(path)]
        keys = [parse_public_key(line) for line in lines if line and not line.startswith("#")]
    except InputError as exc:
        raise InputError(f"{path}: {exc}; until then no bundle runs here") from exc
    return {key.fingerprint: key for key in keys}


def _unreadable(path: Path, error: OSError) -> InputError:
    why = error.strerror or str(error)
    return InputError(
        f"{path}, which says whose bundles run here, can't be read ({why}): no bundle runs until "
        "it is repaired, or removed, after which any bundle runs"
    )


def trust(key: PublicKey, trusted: bool = True) -> Path:
    """Add `key` to the user's trusted keys, or take it out; the file. Raises InputError.

    When the last key is taken out, the empty file stays, and no bundle runs. To let any bundle run,
    remove the file.
    """
    path = user_keys()
    if path is None:
        raise InputError(
            "there is no home folder for a list of trusted keys: set HOME or XDG_CONFIG_HOME"
        )
    keys = (trusted_keys(path) if os.path.lexists(path) else None) or {}
    if not trusted and key.fingerprint not in keys:
        raise InputError(f"{key} isn't among the trusted keys in {path}")
    keys.pop(key.fingerprint, None)
    if trusted:
        keys[key.fingerprint] = key
    with atomic_write(path) as file:
        file.write((_HEAD + "".join(f"{one.line}\n" for one in keys.values())).encode())
    return path


def signer(bundle: Bundle) -> PublicKey | None:
    """Who signed `bundle`: the key, once its signature was found right. None for an unsigned one.

    Raises BundleError for a signature that isn't of this manifest, MissingDependencyError without
    the package cryptography. The files are not hashed here: `Bundle.verify` does that.
    """
    if not bundle.signed:
        return None
    return _signer(bundle.framed(SIGNATURE), _message(bundle), str(bundle.path), MANIFEST)


def _signer(signature: bytes, message: bytes, what: str, signed: str) -> PublicKey:
    """Who signed `message`. what, signed: the bundle or file, and what of it, for errors."""
    line = signature.decode("ascii", "replace")
    try:
        version, encoded_key, encoded = line.split()
        raw, found = (base64.b64decode(part, validate=True) for part in (encoded_key, encoded))
    except (ValueError, binascii.Error):
        version, raw, found = "", b"", b""
    if version != _VERSION or len(raw) != _KEY_BYTES or len(found) != 64:
        raise BundleError(f"{what}: its signature isn't one of {_VERSION}: sign anew")
    try:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    except ImportError as exc:
        raise MissingDependencyError(
            "signatures are checked by cryptography, which isn't installed: pip install "
            "'edgesd[signed]'"
        ) from exc
    try:
        Ed25519PublicKey.from_public_bytes(raw).verify(found, message)
    except InvalidSignature as exc:
        raise BundleError(
            f"{what}: its signature isn't right: {signed} or the signature was altered"
        ) from exc
    encoded_key = base64.b64encode(_blob(raw)).decode()
    return PublicKey(f"{_TYPE} {encoded_key}", raw, "")


def check_trusted(bundle: Bundle) -> PublicKey | None:
    """Refuse a bundle that this machine's trusted keys didn't sign; the key that did.

    None on a machine that has no file of trusted keys: there any bundle may run. Raises
    BundleError, InputError as `trusted_keys`, MissingDependencyError as `signer`.
    """
    what = f"the bundle {bundle.manifest.name}"
    return _check_trusted(what, "edgesd keys sign", lambda: signer(bundle))


def _check_trusted(
    what: str, advice: str, signer_of: Callable[[], PublicKey | None]
) -> PublicKey | None:
    """advice: how it is signed."""
    trusted = trusted_keys()
    if trusted is None:
        return None
    if not trusted:
        raise BundleError(
            f"{keys_file()} lists no key, so no bundle runs here: edgesd keys trust NAME.pub adds "
            "one; without the file any bundle runs"
        )
    names = ", ".join(map(str, trusted.values()))
    found = signer_of()
    if found is None:
        raise BundleError(
            f"{what} isn't signed, and this machine runs only what is signed by {names}: {advice}"
        )
    if found.fingerprint not in trusted:
        raise BundleError(
            f"{what} is signed by {found}, and this machine trusts only {names}: sign it by that "
            "key, or edgesd keys trust"
        )
    return trusted[found.fingerprint]


def check_trusted_lora(path: Path, sha256: str) -> PublicKey | None:
    """The same for the LoRA in a file, whose bytes have that hash (runtime/lora.py); PATH.sig is
    its signature."""

    def signer_of() -> PublicKey | None:
        line = read_lora_signature(path)
        if line is None:
            return None
        return _signer(line, _LORA_PREFIX + sha256.encode(), str(path), path.name)

    return _check_trusted(f"the LoRA {path.name}", "edgesd lora convert --key", signer_of)


def lora_signature(path: Path) -> Path:
    """Where the signature of a LoRA lies."""
    return path.with_name(f"{path.name}.sig")


def read_lora_signature(path: Path) -> bytes | None:
    """The signature of the LoRA in a file; None where it has none. Raises InputError where it can't
    be read. Of one that is too long, the beginning, which isn't right."""
    beside = lora_signature(path)
    try:
        with beside.open("rb") as file:
            return file.read(_MOST_SIGNATURE)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise InputError(f"{beside} can't be read ({exc.strerror or exc})") from exc


def new_key(path: Path, passphrase: bytes | None = None) -> PublicKey:
    """Make a key: `path` with the suffix .key (PKCS 8 in PEM, mode 600), and .pub beside it.

    Raises InputError when one of them exists.
    """
    serialization, ed25519 = _library()
    private, public = (path.with_name(path.name + suffix) for suffix in (".key", ".pub"))
    for file in (private, public):
        check_file_place(file)
        if file.exists():
            raise InputError(f"{file} exists already: keys aren't overwritten; choose another name")
    key = ed25519.Ed25519PrivateKey.generate()
    encryption = (
        serialization.BestAvailableEncryption(passphrase)
        if passphrase
        else serialization.NoEncryption()
    )
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
    )
    line = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    found = parse_public_key(f"{line.decode()} {path.name}")
    with atomic_write(private, private=True, new=True) as out:
        out.write(pem)
    with atomic_write(public, new=True) as out:
        out.write(f"{found.line}\n".encode())
    return found


class WrongPassphraseError(InputError):
    """The private key is encrypted, and the passphrase is missing or wrong."""


def sign(bundle: Bundle, key: Path, passphrase: bytes | None = None) -> bytes:
    """The content of `bundle.sig`: `bundle`'s manifest, signed by the private key in a file.

    key: PEM, or OpenSSH's own format. Raises InputError for anything but an Ed25519 key,
    WrongPassphraseError.
    """
    return _signed(_message(bundle), key, passphrase)


def sign_lora(path: Path, sha256: str, key: Path, passphrase: bytes | None = None) -> Path:
    """Write the signature of the LoRA in a file, whose bytes have that hash; its path. Raises as
    `sign`."""
    line = _signed(_LORA_PREFIX + sha256.encode(), key, passphrase)
    with atomic_write(lora_signature(path)) as file:
        file.write(line)
    return lora_signature(path)


def _signed(message: bytes, key: Path, passphrase: bytes | None) -> bytes:
    """The line that is the signature of `message`."""
    serialization, ed25519 = _library()
    data = read_text(key).encode()
    openssh = data.startswith(b"-----BEGIN OPENSSH PRIVATE KEY-----")
    load = serialization.load_ssh_private_key if openssh else serialization.load_pem_private_key
    try:
        private = load(data, passphrase)
    except TypeError as exc:  # its words for a missing passphrase, and for one that isn't needed
        raise WrongPassphraseError(f"{key}: {exc}") from exc
    except Exception as exc:
        if passphrase is not None:
            raise WrongPassphraseError(f"{key}: the passphrase isn't right") from exc
        raise InputError(f"{key} isn't a private key: make one by `edgesd keys new`") from exc
    if not isinstance(private, ed25519.Ed25519PrivateKey):
        raise InputError(f"{key} isn't an Ed25519 key: make one by `edgesd keys new`")
    raw = private.public_key().public_bytes_raw()
    parts = (base64.b64encode(part).decode() for part in (raw, private.sign(message)))
    return f"{' '.join((_VERSION, *parts))}\n".encode()


def _library() -> Any:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as exc:
        raise MissingDependencyError(
            "keys are made and used by cryptography, which isn't installed: pip install "
            "'edgesd[signed]'"
        ) from exc
    return serialization, ed25519


def _message(bundle: Bundle) -> bytes:
    return _PREFIX + bundle.framed(MANIFEST)


def _fingerprint(raw: bytes) -> str:
    digest = hashlib.sha256(_blob(raw)).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def _blob(raw: bytes) -> bytes:
    """A public key as SSH writes it: two strings (RFC 4251, section 5; RFC 8709, section 4)."""
    return b"".join(len(part).to_bytes(4, "big") + part for part in (_TYPE.encode(), raw))
