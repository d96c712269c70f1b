"""One build, as it is known before long work begins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgesd.progress import SILENT, Progress
from edgesd.recipes.options import LocalFolders
from edgesd.spec.build import BuildOptions
from edgesd.spec.target import Target

if TYPE_CHECKING:
    from edgesd.export.backends.base import Lowering
    from edgesd.export.families import ExportSpec
    from edgesd.export.source import ModelSource
    from edgesd.recipes.gates import Judging


@dataclass(frozen=True)
class Job:
    """What is built of what, for what. spec: what is exported of `source`. lowering: of the
    backend. options: with the target's and the backend's name filled in. judging: how images are
    judged; None where none are generated."""

    source: ModelSource
    spec: ExportSpec
    target: Target
    lowering: Lowering
    options: BuildOptions
    folders: LocalFolders
    progress: Progress = SILENT
    judging: Judging | None = None
