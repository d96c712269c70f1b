"""Are the images of a bundle those of its source?

    python -m benchmarks.parity FOLDER BUNDLE

Generates the same prompts with the same seeds twice, with diffusers' StableDiffusionPipeline from
FOLDER in fp32 and with edgesd from BUNDLE, and compares the 8-bit images: 20 steps of the
model's own scheduler, and 8 steps of DPM-Solver++ (diffusers' DPMSolverMultistepScheduler made
from the same config).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common import environment, parser, run, table, write_json
from edgesd.evaluate.psnr import max_abs_difference, psnr
from edgesd.runtime.bundle import Bundle, open_bundle
from edgesd.runtime.images import read_prompts
from edgesd.runtime.pipeline import Pipeline
from edgesd.runtime.requests import Request
from edgesd.runtime.settings import Settings

PROMPTS = (
    "a red apple",
    "a blue heart",
    "a grinning cat",
    "a rocket",
    "a pizza",
    "a green dinosaur",
    "a penguin",
    "a yellow balloon",
    "a purple star",
    "a house",
    "an orange fish",
    "a tree",
    "a crown",
    "a pink flower",
    "a bicycle",
    "emoji of a brown dog",
)


class Case(NamedTuple):
    """A sampler on both sides. ours: None is the bundle's own; diffusers: None is the model's."""

    name: str
    ours: str | None
    diffusers: str | None
    steps: int


CASES = (
    Case("own scheduler, 20 steps", None, None, 20),
    Case("dpmpp-2m, 8 steps", "dpmpp-2m", "DPMSolverMultistepScheduler", 8),
)


class Row(NamedTuple):
    """One image. psnr_db is infinite when both sides generated it alike."""

    case: str
    prompt: str
    seed: int
    psnr_db: float
    max_abs_difference: int


class Summary(NamedTuple):
    """Of one case. mean_db leaves out identical images, whose PSNR is infinite."""

    case: str
    minimum_db: float
    mean_db: float
    identical: int
    images: int
    max_abs_difference: int


def compare(
    source: Path,
    bundle: Bundle,
    cases: Sequence[Case],
    prompts: Sequence[str],
    seed: int,
    guidance: float,
    threads: int,
) -> Iterator[Row]:
    """Generate each prompt on both sides, one image at a time; prompt k has the seed `seed` + k."""
    import diffusers
    import torch

    logging: Any = diffusers.utils.logging
    logging.set_verbosity_error()
    pipeline: Any = diffusers.StableDiffusionPipeline
    theirs = pipeline.from_pretrained(source, torch_dtype=torch.float32, local_files_only=True)
    theirs.safety_checker = None
    theirs.set_progress_bar_config(disable=True)
    own = theirs.scheduler
    shape = bundle.manifest.pipeline.shape
    with Pipeline(bundle, Settings(threads)) as ours:
        for case in cases:
            theirs.scheduler = (
                getattr(diffusers, case.diffusers).from_config(own.config)
                if case.diffusers
                else own
            )
            for k, prompt in enumerate(prompts):
                (found,) = ours.generate(
                    [
                        Request(
                            prompt,
                            seed + k,
                            num_inference_steps=case.steps,
                            guidance_scale=guidance,
                            scheduler=case.ours,
                        )
                    ]
                )
                (wanted,) = theirs(
                    prompt,
                    height=shape.height,
                    width=shape.width,
                    num_inference_steps=case.steps,
                    guidance_scale=guidance,
                    generator=torch.Generator("cpu").manual_seed(seed + k),
                ).images
                yield Row(
                    case.name,
                    prompt,
                    seed + k,
                    psnr(found, wanted),
                    max_abs_difference(found, wanted),
                )


def summarise(rows: Sequence[Row]) -> list[Summary]:
    """One line per case, in the order of `rows`."""
    summaries = []
    for case in dict.fromkeys(row.case for row in rows):
        ours = [row for row in rows if row.case == case]
        different = [row.psnr_db for row in ours if math.isfinite(row.psnr_db)]
        summaries.append(
            Summary(
                case,
                min(different, default=math.inf),
                sum(different) / len(different) if different else math.inf,
                len(ours) - len(different),
                len(ours),
                max(row.max_abs_difference for row in ours),
            )
        )
    return summaries


def jsonable(fields: dict[str, Any]) -> dict[str, Any]:
    """The same, with null for infinity, which JSON can't write."""
    return {key: None if value == math.inf else value for key, value in fields.items()}


def main() -> None:
    """Measure, print, and write."""
    arguments = parser(__doc__)
    arguments.add_argument("source", type=Path, help="diffusers folder it was made from")
    arguments.add_argument("bundle", type=Path)
    arguments.add_argument("--seed", type=int, default=0, help="of the first prompt (default: 0)")
    arguments.add_argument("--guidance", type=float, default=4.0, help="scale (default: 4)")
    arguments.add_argument("--prompts", type=Path, help="file of prompts, one per line")
    arguments.add_argument("--threads", type=int, default=0, help="0 (default): all cores")
    given = arguments.parse_args()
    prompts: Sequence[str] = PROMPTS
    if given.prompts:
        with given.prompts.open("rb") as file:
            prompts = read_prompts(file)
    bundle = open_bundle(given.bundle)
    rows = list(
        compare(given.source, bundle, CASES, prompts, given.seed, given.guidance, given.threads)
    )
    print(table(Row._fields, rows))
    print()
    summaries = summarise(rows)
    print(table(Summary._fields, summaries))
    write_json(
        given.json,
        {
            "environment": environment("torch", "diffusers", "transformers"),
            "precision": bundle.manifest.precision,
            "guidance": given.guidance,
            "summary": [jsonable(summary._asdict()) for summary in summaries],
            "images": [jsonable(row._asdict()) for row in rows],
        },
    )


if __name__ == "__main__":
    run(main)
