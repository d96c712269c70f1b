"""Builds a model of true size with random weights: minutes and memory of each stage.

python -m benchmarks.true_size FOLDER [--model sdxl] [--precision w8a8] [--size 512 512] ...

FOLDER/MODEL is the pipeline (benchmarks/random_pipeline.py writes it if it isn't there: 7 GB for
SDXL, 34 GB for FLUX.1 at its full depth), FOLDER/work keeps what builds keep, FOLDER/bundle is the
result, which is removed before the next. Memory is sampled every half second over this process and
its children: anonymous pages, which must be there, and mapped ones, which the system may drop and
read again. What a build finds in FOLDER/work takes no time: remove it for figures of a whole build.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from benchmarks.common import environment, parser, run, table, write_json
from benchmarks.random_pipeline import MODELS, add_depth, depth_options, write_pipeline
from edgesd.progress import Lines
from edgesd.recipes import BuildOptions, LocalFolders, QuantOptions, build
from edgesd.recipes.prompts import CALIBRATION, QUALITY

TARGET = "x86-64-cpu"
SAMPLE_SECONDS = 0.5


@dataclass
class Stage:
    """A stage of a build. began: in seconds. anonymous, mapped: peaks in bytes; both: of their
    sum."""

    name: str
    began: float
    anonymous: int = 0
    mapped: int = 0
    both: int = 0


class Sampler:
    """Follows the memory of this process and its children, stage by stage."""

    def __init__(self) -> None:
        self.stages = [Stage("start", time.monotonic())]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def begin(self, name: str) -> None:
        """A stage begins."""
        print(f"{time.monotonic() - self.stages[0].began:6.0f} s  {name}", flush=True)
        self._sample()
        self.stages.append(Stage(name, time.monotonic()))

    def end(self) -> None:
        """The last stage is over."""
        self._sample()
        self._stop.set()
        self._thread.join()
        self.stages.append(Stage("end", time.monotonic()))

    def _follow(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self._sample()

    def _sample(self) -> None:
        found = [_resident(pid) for pid in _family(os.getpid())]
        anonymous, mapped = (sum(each) for each in zip(*found, strict=True))
        stage = self.stages[-1]
        stage.anonymous = max(stage.anonymous, anonymous)
        stage.mapped = max(stage.mapped, mapped)
        stage.both = max(stage.both, anonymous + mapped)


def _family(pid: int) -> Iterator[int]:
    """A process and all that it started, directly or not."""
    yield pid
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = path.read_text().split()
        except OSError:  # it ended
            continue
        for child in children:
            yield from _family(int(child))


def _resident(pid: int) -> tuple[int, int]:
    """Bytes of anonymous and of mapped pages (shared memory among these); 0 of one that ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    fields = dict(line.split(":", 1) for line in lines)
    sizes = [
        int(fields.get(name, "0 kB").split()[0]) << 10
        for name in ("RssAnon", "RssFile", "RssShmem")
    ]
    return sizes[0], sizes[1] + sizes[2]


def main() -> None:
    made = parser(__doc__)
    made.add_argument("folder", type=Path)
    made.add_argument("--model", choices=MODELS, default="sdxl", help="(default: sdxl)")
    made.add_argument("--pipeline", type=Path, help="the pipeline, if not FOLDER/MODEL")
    made.add_argument(
        "--controlnet", type=Path, help="build this in (benchmarks/random_pipeline.py makes one)"
    )
    made.add_argument("--precision", default="w8a8", help="(default: w8a8)")
    made.add_argument("--method", default="svdquant", help="(default: svdquant)")
    made.add_argument(
        "--size", type=int, nargs=2, metavar="PIXELS", help="static graphs (default: of any size)"
    )
    made.add_argument("--steps", type=int, help="of calibration and images")
    made.add_argument("--prompts", type=int, help="of calibration (default: as a build has them)")
    made.add_argument("--images", type=int, help="that are compared (default: the same; 0: none)")
    add_depth(made)
    given = made.parse_args()
    depth = depth_options(made, given)
    pipeline = given.pipeline or given.folder / given.model
    if not pipeline.exists():
        write_pipeline(pipeline, given.model, tiny_vae=False, **depth)
    bundle = given.folder / "bundle"
    shutil.rmtree(bundle, ignore_errors=True)
    quantization = QuantOptions(
        method=given.method,
        calibration_prompts=None if given.prompts is None else CALIBRATION[: given.prompts],
        quality_prompts=None if given.images is None else QUALITY[: given.images],
        steps=given.steps,
    )
    size = tuple(given.size) if given.size else None
    options = BuildOptions(TARGET, given.precision, size=size, quantization=quantization)
    controlnets = (str(given.controlnet),) if given.controlnet else ()
    sampler = Sampler()
    try:
        build(
            str(pipeline),
            options,
            bundle,
            LocalFolders(given.folder / "work", keep_work=True, controlnets=controlnets),
            Lines(sampler.begin),
            lambda warning: print(f"warning: {warning}", flush=True),
        )
    finally:
        sampler.end()
        _report(sampler.stages, given.json)


class Row(NamedTuple):
    """A stage: minutes, and peaks in MB."""

    stage: str
    minutes: float
    anonymous: int
    mapped: int
    together: int


def _report(stages: list[Stage], json: Path | None) -> None:
    rows = [
        Row(
            stage.name,
            (later.began - stage.began) / 60,
            *(size // 10**6 for size in (stage.anonymous, stage.mapped, stage.both)),
        )
        for stage, later in pairwise(stages)
    ]
    minutes = sum(row.minutes for row in rows)
    peaks = [max(peak) for peak in zip(*(row[2:] for row in rows), strict=True)]
    rows.append(Row("whole", minutes, *peaks))
    print(table(Row._fields, rows))
    figures = [row._asdict() for row in rows]
    write_json(json, {"environment": environment("torch"), "stages": figures})


if __name__ == "__main__":
    run(main)
