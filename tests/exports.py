"""Exported graphs that tests share: a model's, for one size, precision and backend, once a run."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from filelock import FileLock

from edgesd.progress import SILENT, Progress
from edgesd.spec.bundle import GraphSet
from tests.support import Recorded

Export = Callable[..., GraphSet]
"""A function such as `export_pipeline`."""

_Kept = tuple[GraphSet, list[str]]


class KeptExports:
    """`export_pipeline` for tests of what comes behind it: what was exported before is copied.

    folder: of what is kept; several processes may share it.
    """

    def __init__(self, export: Export, folder: Path) -> None:
        self.export, self.folder = export, folder

    def __call__(
        self,
        source: Any,
        plan: Any,
        out_dir: Path,
        precision: str = "fp32",
        *,
        lowering: Any = None,
        progress: Progress = SILENT,
        as_source: bool = False,
        lora_slots: int | None = None,
    ) -> GraphSet:
        """See `export_pipeline`; the lines of progress are the first export's."""
        fp32 = lowering is None and precision == "fp32"  # those of a source have a file more
        name = lowering and lowering.name
        what = msgspec.json.encode((plan.pipeline, precision, name, lora_slots))
        kept = self.folder / hashlib.sha256(what).hexdigest()[:16]
        with FileLock(f"{kept}.lock", timeout=500):
            if not (kept / "graphs.json").exists():
                told = Recorded()
                found = self.export(
                    source,
                    plan,
                    kept / "graphs",
                    precision,
                    lowering=lowering,
                    progress=told,
                    as_source=fp32 and lora_slots is None,
                    lora_slots=lora_slots,
                )
                (kept / "graphs.json").write_bytes(msgspec.json.encode((found, told.lines)))
        left_out = shutil.ignore_patterns(*([] if as_source else ["cases.npz"]))
        shutil.copytree(kept / "graphs", out_dir, ignore=left_out, dirs_exist_ok=True)
        graphs, lines = msgspec.json.decode((kept / "graphs.json").read_bytes(), type=_Kept)
        for line in lines:
            progress.line(line)
        return msgspec.structs.replace(graphs, root=str(out_dir))
