"""Makes a list of pictures and writes them, with how they were made in each file."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from edgesd.errors import InputError, UsageError
from edgesd.files import atomic_write, check_writable
from edgesd.runtime.denoise import Step
from edgesd.runtime.noise import image_seeds
from edgesd.runtime.pipeline import Pipeline, Request

if TYPE_CHECKING:
    from PIL import Image

_OTHER_FORMATS = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".edgesd")


@dataclass(frozen=True)
class Picture:
    """A picture that was written, and the complete request it was made from."""

    path: Path
    request: Request


def plan_paths(out: Path, requests: Sequence[Request]) -> list[Path]:
    """File names for the pictures: `out` itself for one `.png`, else files in the folder `out`.

    Raises UsageError when several pictures are to go into one file, InputError when `out` is a
    file where a folder is needed, or the reverse.
    """
    if out.suffix.lower() in _OTHER_FORMATS:
        raise UsageError(f"-o {out}: pictures are written as PNG; give a name ending in .png")
    if out.suffix.lower() == ".png":
        if len(requests) != 1:
            raise UsageError(f"-o {out} is one file for {len(requests)} pictures: give a folder")
        if out.is_dir():
            raise InputError(f"{out} is a folder: give another name for the picture")
        return [out]
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file, not a folder: give a folder, or a name ending in .png")
    return [
        out / f"{index:03d}-{_slug(request.prompt)}-{request.seed}.png"
        for index, request in enumerate(requests)
    ]


def make_pictures(
    pipeline: Pipeline,
    requests: Sequence[Request],
    out: Path,
    batch: int = 1,
    preview_every: int = 0,
    on_step: Callable[[int, Step], None] | None = None,
    on_picture: Callable[[Picture], None] | None = None,
) -> list[Picture]:
    """Make and write all `requests`, `batch` at a time. A file is written whole or not at all.

    preview_every: every so many steps, decode the unfinished latents into NAME.preview.png (0:
    never), which goes when the picture is there. on_step gets the index of the batch's first
    picture, and the step.
    Raises UsageError for bad values before anything is run.
    """
    paths = plan_paths(out, requests)
    requests = [pipeline.complete(request) for request in requests]
    for count in {min(batch, len(requests)), len(requests) % batch} - {0}:
        pipeline.guidance_mode(requests[0], count)
    check_writable(paths[0])
    written: list[Picture] = []
    for first in range(0, len(requests), batch):
        group, group_paths = requests[first : first + batch], paths[first : first + batch]

        def watch(step: Step, first: int = first, group_paths: list[Path] = group_paths) -> None:
            if on_step:
                on_step(first, step)
            done = step.index + 1
            if preview_every and done % preview_every == 0 and done < step.count:
                for image, path in zip(pipeline.decode(step.latents), group_paths, strict=True):
                    write_png(image, _preview(path), {})

        images = pipeline.generate(group, watch)
        for image, request, path in zip(images, group, group_paths, strict=True):
            write_png(image, path, text_chunks(pipeline, request))
            _preview(path).unlink(missing_ok=True)
            written.append(Picture(path, request))
            if on_picture:
                on_picture(written[-1])
    return written


def text_chunks(pipeline: Pipeline, request: Request) -> dict[str, str]:
    """What a picture's PNG says of its making: enough to make it again."""
    manifest = pipeline.bundle.manifest
    return {
        "Software": f"edgesd {manifest.tools.get('edgesd', '')}".strip(),
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "seed": str(request.seed),
        "steps": str(request.num_inference_steps),
        "guidance_scale": str(request.guidance_scale),
        "scheduler": str(request.scheduler),
        "size": f"{request.width}x{request.height}",
        "model": manifest.name,
        "model_sha256": manifest.pipeline.source_sha256,
        "precision": manifest.precision,
        "target": manifest.target,
    }


def write_png(image: Image.Image, path: Path, chunks: dict[str, str]) -> None:
    """Write `image` to `path` atomically, `chunks` as text chunks (PNG specification, 11.3.3)."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in chunks.items():
        info.add_itxt(key, value)
    with atomic_write(path) as file:
        image.save(file, "PNG", pnginfo=info)


def contact_sheet(paths: Sequence[Path], out: Path, columns: int) -> Path:
    """Write the pictures at `paths`, all of one size, side by side to `out`; returns `out`."""
    from PIL import Image

    images = [Image.open(path) for path in paths]
    width, height = images[0].size
    gap = max(2, width // 32)
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + gap), rows * (height + gap)), "white")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        sheet.paste(image, (column * (width + gap) + gap // 2, row * (height + gap) + gap // 2))
    write_png(sheet, out, {})
    return out


def read_prompts(file: BinaryIO) -> list[str]:
    """One prompt per line of UTF-8 text; empty lines are skipped.

    Raises InputError when the file isn't UTF-8 text, or has no prompt in it.
    """
    name = getattr(file, "name", "the file")
    try:
        lines = [line.strip() for line in file.read().decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError as exc:
        raise InputError(f"{name} isn't UTF-8 text (byte {exc.start}): save it as UTF-8") from exc
    prompts = [line for line in lines if line]
    if not prompts:
        raise InputError(f"{name} has no prompt in it: write one per line")
    return prompts


def expand_requests(template: Request, prompts: Sequence[str], count: int) -> list[Request]:
    """`count` requests per prompt, in order; their seeds count up from the template's."""
    return [
        replace(template, prompt=prompt, seed=seed)
        for prompt in prompts
        for seed in image_seeds(template.seed, count)
    ]


def _preview(path: Path) -> Path:
    return path.with_suffix(".preview.png")


def _slug(prompt: str) -> str:
    ascii_text = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", ascii_text).strip("-")[:40].strip("-") or "picture"
