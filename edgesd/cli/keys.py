"""edgesd keys ..."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgesd.cli.common import OutputPath, Reporter, each_host, say
from edgesd.cli.options import hosts_option, option_arguments
from edgesd.errors import InputError
from edgesd.progress import count_bytes
from edgesd.text import shown

if TYPE_CHECKING:
    from edgesd.runtime.signature import PublicKey


@click.group("keys", short_help="Sign bundles; choose whose bundles a machine runs.")
def keys_group() -> None:
    """Sign bundles, and choose whose bundles a machine runs.

    If any key is trusted, unsigned bundles and other signers are refused. The trusted keys are
    listed in /etc/edgesd/trusted_keys where that file exists, else in
    ~/.config/edgesd/trusted_keys. If the file lists no key, every bundle is refused; without the
    file any bundle runs.
    """


@keys_group.command("new", short_help="Make a key: NAME.key and NAME.pub.")
@click.argument("name", type=OutputPath())
@click.option("--passphrase", is_flag=True, help="Ask for a passphrase that NAME.key needs.")
def new_command(name: Path, passphrase: bool) -> None:
    """Make an Ed25519 key: NAME.key, which signs and stays secret, and NAME.pub, for the boards."""
    from edgesd.runtime.signature import new_key

    words = _ask("passphrase of the new key", confirm=True) if passphrase else None
    key = new_key(name, words)
    say(f"{name}.key signs: keep it secret. {name}.pub is for the boards: {key}")


@keys_group.command("sign", short_help="Sign BUNDLE.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--key",
    type=click.Path(path_type=Path),
    required=True,
    help="NAME.key, or an Ed25519 key of OpenSSH.",
)
def sign_command(bundle: Path, key: Path) -> None:
    """Sign BUNDLE, once every byte of it is verified. An older signature is replaced."""
    from edgesd.engines.bundle import sign_bundle
    from edgesd.runtime.bundle import open_bundle
    from edgesd.runtime.signature import WrongPassphraseError, sign, signer

    opened = open_bundle(bundle)
    try:
        signature = sign(opened, key)
    except WrongPassphraseError:
        signature = sign(opened, key, _ask(f"passphrase of {key}"))
    reporter = Reporter()
    with reporter.bar():
        sign_bundle(opened, signature, count_bytes(reporter, "verify", opened.total_bytes()))
    say(f"{bundle} is signed by {signer(open_bundle(bundle))}")


@keys_group.command("check", short_help="Show who signed BUNDLE, and whether it may run here.")
@click.argument("bundle", type=click.Path(path_type=Path))
def check_command(bundle: Path) -> None:
    """Show who signed BUNDLE. Fails if this machine would refuse it."""
    from edgesd.runtime.bundle import open_bundle
    from edgesd.runtime.signature import check_trusted, signer

    opened = open_bundle(bundle)
    found = signer(opened)
    trusted = check_trusted(opened)
    opened.verify()
    say(f"{bundle}: signed by {trusted or found}" if found else f"{bundle}: not signed")
    say("this machine trusts that key" if trusted else "this machine runs any bundle")


@keys_group.command("trust", short_help="Run only bundles that KEY signed.")
@click.argument("key")
@hosts_option
@click.option("--remove", is_flag=True, help="Stop trusting the key.")
@click.option(
    "--yes",
    is_flag=True,
    help="Don't ask, even if the active bundle would be refused from then on.",
)
def trust_command(key: str, hosts: tuple[str, ...], remove: bool, yes: bool) -> None:
    """Run only bundles that KEY signed, or another trusted key. KEY: NAME.pub, or its line.

    If the active bundle would be refused from then on, the command asks first, or fails without a
    terminal: sign that bundle and deploy it, then trust the key.
    """
    from edgesd.runtime.signature import parse_public_key, trust, trusted_keys
    from edgesd.textfiles import read_lines

    path = Path(key)
    if key.startswith("ssh-"):
        text = key
    elif not path.is_file():
        raise InputError(f"there is no file {key}: give NAME.pub, as `edgesd keys new` writes it")
    else:
        lines = [line for line in read_lines(path) if line.strip()]
        if len(lines) != 1:
            raise InputError(f"{key} has {len(lines)} lines: a public key is one, as in NAME.pub")
        (text,) = lines
    found = parse_public_key(text)
    if hosts:
        options = option_arguments(click.get_current_context(), without=["hosts"])
        each_host(hosts, ["keys", "trust", found.line, *options])
        return
    if not yes and (stopped := _stopped_by(found, remove)):
        _confirm(stopped)
    file = trust(found, not remove)
    say(f"{found} is {'no longer ' if remove else ''}trusted: {file}")
    if not trusted_keys(file):
        say(f"no key is left: no bundle runs here. Any bundle runs once {file} is removed")


@keys_group.command("list", short_help="List the trusted keys.")
@hosts_option
def list_command(hosts: tuple[str, ...]) -> None:
    """List the keys that this machine trusts."""
    from edgesd.runtime.signature import keys_file, trusted_keys

    if hosts:
        each_host(hosts, ["keys", "list"])
        return
    keys = trusted_keys()
    if keys is None:
        say("none: any bundle runs here")
    elif not keys:
        say(f"none: no bundle runs here. Any bundle runs once {keys_file()} is removed")
    for key in (keys or {}).values():
        say(str(key))


def _stopped_by(key: PublicKey, remove: bool) -> str:
    """Why the active bundle of this machine, which runs now, doesn't any more; "" where it does."""
    from edgesd.device.slots import Slots
    from edgesd.errors import EdgesdError
    from edgesd.runtime.signature import SYSTEM_KEYS, check_trusted, keys_file, signer, trusted_keys

    if keys_file() == SYSTEM_KEYS:
        return ""  # which decides alone
    try:
        bundle = Slots().active_bundle()
        if bundle is None:
            return ""
        check_trusted(bundle)
        by = signer(bundle)
    except EdgesdError:
        return ""  # it doesn't run as it is
    trusted = {*(trusted_keys() or {}), key.fingerprint} - ({key.fingerprint} if remove else set())
    if by is not None and by.fingerprint in trusted:
        return ""
    signed = f"signed by {by}" if by else "not signed"
    return (
        f"the active bundle {bundle.manifest.name} is {signed}: from then on it doesn't run here. "
        "Sign it and deploy it first (edgesd keys sign, edgesd deploy)"
    )


def _confirm(stopped: str) -> None:
    if not sys.stdin.isatty():
        raise InputError(f"{stopped}, or give --yes")
    if not click.confirm(shown(f"{stopped}. Trust it now?"), err=True):
        raise click.Abort


def _ask(words: str, confirm: bool = False) -> bytes:
    given = click.prompt(shown(words), hide_input=True, confirmation_prompt=confirm, err=True)
    return str(given).encode()
