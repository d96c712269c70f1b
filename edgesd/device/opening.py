"""Checks whether a bundle may run on this machine."""

from __future__ import annotations

from pathlib import Path

from edgesd.device.detect import check_machine, detect_machine
from edgesd.runtime.bundle import Bundle, open_bundle
from edgesd.runtime.signature import PublicKey, check_trusted


def open_for_generate(path: Path, any_machine: bool = False) -> Bundle:
    """The bundle at `path`, once `check_runs_here` has passed.

    any_machine: whether it may be for another board. Raises what `open_bundle` and
    `check_runs_here` raise.
    """
    bundle = open_bundle(path)
    check_runs_here(bundle, any_machine)
    return bundle


def check_runs_here(bundle: Bundle, any_machine: bool = False) -> PublicKey | None:
    """Check that this machine trusts `bundle` and is one that it was built for; the trusted key
    that signed it, if any.

    Raises BundleError for one that isn't trusted here, TargetError for one of another board.
    """
    signer = check_trusted(bundle)
    if not any_machine:
        check_machine(bundle.manifest.target, bundle.manifest.arch, detect_machine())
    return signer
