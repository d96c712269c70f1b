"""The embedded pipelines: small models that come with the source checkout."""

from __future__ import annotations

from pathlib import Path

import edgesd
from edgesd.device.detect import describe_machine, detect_machine, runnable_targets
from edgesd.errors import InputError, TargetError
from edgesd.spec.build import EMBEDDED

_MODELS = Path(edgesd.__file__).resolve().parent.parent / "models"


def demo_judge() -> Path | None:
    """Folder of the judge of the embedded pipeline's images, or None outside a checkout."""
    folder = _MODELS / "emoji-judge"
    return folder if folder.is_dir() else None


def demo_model(name: str = EMBEDDED[0]) -> Path:
    """Folder of an embedded pipeline. Raises InputError where it isn't there."""
    folder = _MODELS / name
    if not (folder / "model_index.json").is_file():
        raise InputError(
            f"the embedded pipeline {name} is part of the source checkout, not of the installed "
            "package: clone edgesd and run there, or give the folder of a diffusers pipeline"
        )
    return folder


def demo_sha256(name: str = EMBEDDED[0]) -> str:
    """Hash of an embedded pipeline, as its bundles carry it. Raises InputError."""
    from edgesd.export.source import resolve_source

    return resolve_source(demo_model(name)).sha256()


def demo_target() -> str:
    """The target that this machine is, or the plainest one of its architecture.

    Raises TargetError on a machine that no target fits.
    """
    machine = detect_machine()
    if machine.target:
        return machine.target
    runnable = runnable_targets(machine)
    if not runnable:
        raise TargetError(describe_machine(machine))
    return runnable[0].name
