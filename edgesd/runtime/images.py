"""Generates images and writes them; each file says how it was made."""

from __future__ import annotations

import io
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from edgesd.errors import EdgesdError, InputError, UsageError
from edgesd.files import (
    ExistsError,
    atomic_write,
    check_writable,
    free_names,
    is_special,
    keep,
    save,
    write_free,
)
from edgesd.runtime import a1111
from edgesd.runtime.denoise import Step
from edgesd.runtime.noise import image_seeds
from edgesd.runtime.pipeline import Pipeline
from edgesd.runtime.recorded import texts_of
from edgesd.runtime.refined import Refined
from edgesd.runtime.requests import CompleteRequest, Request
from edgesd.textfiles import read_lines

if TYPE_CHECKING:
    from PIL import Image

_OTHER_FORMATS = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".edgesd")

_MOST_PROMPTS = 100_000
_MOST_IMAGES = 1_000_000
"""In one run, which plans all images before the first is generated."""

_NUMBERED = re.compile(r"(\d{3,9})-.*\.png", re.IGNORECASE)


@dataclass(frozen=True)
class SavedImage:
    """An image that was written, and the complete request it was made from.

    path: None for standard output. replaced: there was an older file of that name.
    """

    path: Path | None
    request: CompleteRequest
    replaced: bool = False


def check_output(out: Path | BinaryIO, count: int) -> None:
    """Whether `count` images can be written to `out`, before long work is done in vain.

    Raises UsageError when several are to go into one file, InputError when `out` is a file where a
    folder is needed, or the reverse, and what `check_writable` raises.
    """
    if not isinstance(out, Path):
        if count != 1:
            raise UsageError(f"standard output is one file for {count} images: give a folder")
        return
    if out.suffix.lower() in _OTHER_FORMATS:
        raise UsageError(f"-o {out}: images are written as PNG; give a name ending in .png")
    if _is_one_file(out):
        if count != 1:
            raise UsageError(f"-o {out} is one file for {count} images: give a folder")
        if out.is_dir():
            raise InputError(f"{out} is a folder: give another name for the image")
        check_writable(out)
        return
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file, not a folder: give a folder, or a name ending in .png")
    check_writable(out / "000.png")


def _is_one_file(out: Path) -> bool:
    return out.suffix.lower() == ".png" or is_special(out)


def _next_number(folder: Path) -> int:
    """One more than the highest number of an image in `folder`."""
    names = (path.name for path in folder.iterdir()) if folder.is_dir() else ()
    matches = map(_NUMBERED.fullmatch, names)
    return max((int(match[1]) + 1 for match in matches if match), default=0)


def _numbered(folder: Path, number: int, request: CompleteRequest) -> Path:
    return folder / f"{number:03d}-{_slug(request.prompt)}-{request.seed}.png"


def plan_paths(out: Path, requests: Sequence[CompleteRequest]) -> list[Path]:
    """File names for the images: `out` itself for one `.png`, else files in the folder `out`,
    numbered on from those that are there."""
    if _is_one_file(out):
        return [out]
    first = _next_number(out)
    return [_numbered(out, first + index, request) for index, request in enumerate(requests)]


def make_images(
    pipeline: Pipeline | Refined,
    requests: Sequence[Request],
    out: Path | BinaryIO,
    batch: int = 1,
    preview_every: int = 0,
    on_step: Callable[[range, Step], None] | None = None,
    on_image: Callable[[SavedImage], None] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> list[SavedImage]:
    """Make and write all `requests`, `batch` at a time. A file is written whole or not at all.

    out: a .png for one image, whose older file is replaced, or a device or pipe; a folder, where
    nothing is; or an open file for one image. preview_every: every so many steps, decode the
    unfinished latents into NAME.preview.png (0: never), or the next free name; it goes when the
    image is there, or the work is interrupted. on_step gets the indices of the batch's images,
    and the step. on_note: called with messages for the user.
    Raises what `check_output` raises and UsageError for bad values before anything is run. A
    image that can't be written then is kept elsewhere, and the error says where.
    """
    check_output(out, len(requests))
    complete = [pipeline.complete(request) for request in requests]
    chunks = [pipeline.chunks(request) for request in complete]
    batches = _batches(chunks, batch)
    sizes = {(len(each), chunks[each.start]): each.start for each in batches}
    for (count, _), index in sizes.items():
        pipeline.fit(complete[index], count, preview_every > 0)
    if isinstance(out, Path):
        paths = plan_paths(out, complete)
        check_writable(paths[0], sum(map(_most_bytes, complete[:batch])))
    else:
        paths = []
    previews = _Previews(on_note or (lambda text: None))
    written: list[SavedImage] = []
    try:
        for indices in batches:
            chosen = slice(indices.start, indices.stop)
            group, group_paths = complete[chosen], paths[chosen]

            def watch(
                step: Step, indices: range = indices, group_paths: list[Path] = group_paths
            ) -> None:
                if on_step:
                    on_step(indices, step)
                done = step.index + 1
                if preview_every and done % preview_every == 0 and done < step.count:
                    for image, path in zip(pipeline.decode(step.latents), group_paths, strict=True):
                        previews.show(image, path)

            images = pipeline.generate(group, watch, preview_every > 0)
            contents = [
                png_bytes(image, text_chunks(pipeline, request))
                for image, request in zip(images, group, strict=True)
            ]
            for index, request in enumerate(group):
                try:
                    if isinstance(out, Path):
                        made = _write_image(contents[index], out, group_paths[index], request)
                        previews.remove(group_paths[index])
                    else:
                        made = _write_out(contents[index], out, request)
                except EdgesdError as exc:
                    rest = zip(group_paths[index + 1 :], contents[index + 1 :], strict=True)
                    kept = [str(keep(path.name, content)) for path, content in rest]
                    also = f"; and of the same batch {', '.join(kept)}" if kept else ""
                    raise type(exc)(f"{exc}{also}") from exc
                written.append(made)
                if on_image:
                    on_image(made)
    finally:
        try:
            previews.remove_all()
        finally:  # again, for a signal that came meanwhile
            previews.remove_all()
    return written


def _batches(chunks: Sequence[int], most: int) -> list[range]:
    """Indices of requests that are generated together, in order: at most `most`, with equally many
    chunks of tokens. chunks: of each request."""
    found: list[range] = []
    first = 0
    for index in range(1, len(chunks) + 1):
        full = index - first == most
        if index == len(chunks) or full or chunks[index] != chunks[first]:
            found.append(range(first, index))
            first = index
    return found


def _most_bytes(request: CompleteRequest) -> int:
    return request.width * request.height * 3


def _write_image(content: bytes, out: Path, path: Path, request: CompleteRequest) -> SavedImage:
    """Write to `path`; in a folder to another number where somebody else has taken that name."""
    if _is_one_file(out):
        replaced = path.exists() and not is_special(path)
        save(path, content)
        return SavedImage(path, request, replaced)
    while True:
        try:
            save(path, content, new=True)
        except ExistsError:
            path = _numbered(out, _next_number(out), request)
            continue
        return SavedImage(path, request)


def _write_out(content: bytes, out: BinaryIO, request: CompleteRequest) -> SavedImage:
    try:
        rest = memoryview(content)
        while rest:
            rest = rest[out.write(rest) :]
        out.flush()
    except OSError as exc:
        kept = keep("image.png", content)
        where = f"; the image is kept as {kept}" if kept else ""
        raise InputError(f"cannot write to standard output: {exc.strerror}{where}") from exc
    return SavedImage(None, request)


class _Previews:
    """Preview files of unfinished images, beside their final places. Only what was written here is
    replaced or removed: a file of the user's may have the same name, or take it meanwhile."""

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note
        self._shown: dict[Path, tuple[Path, tuple[bytes, ...]]] = {}
        """Image -> its preview, and what may be in that: a signal may come at any moment."""
        self._failed = False

    def show(self, image: Image.Image, path: Path) -> None:
        """Write `image` as the preview of `path`. A failure costs the preview, not the image."""
        if self._failed:
            return
        content = png_bytes(image, {})
        wanted = path.with_suffix(".preview.png")
        try:
            shown = self._ours(path)
            if shown is not None:
                self._shown[path] = (shown, (*self._shown[path][1], content))
                with atomic_write(shown) as file:
                    file.write(content)
                self._shown[path] = (shown, (content,))
                return
            for name in free_names(wanted):
                self._shown[path] = (name, (content,))
                try:
                    with atomic_write(name, new=True) as file:
                        file.write(content)
                except ExistsError:
                    continue
                if name != wanted:
                    self._note(f"{wanted} exists already: the preview is {name}")
                return
        except EdgesdError as exc:
            self._failed = True
            self._note(f"no preview: {exc}")

    def _ours(self, path: Path) -> Path | None:
        """The preview of `path`, if it is still what was written."""
        name, contents = self._shown.get(path, (None, ()))
        try:
            return name if name is not None and name.read_bytes() in contents else None
        except OSError:
            return None

    def remove(self, path: Path) -> None:
        """Remove the preview of `path`, which is written."""
        name = self._ours(path)
        if name is not None:
            try:
                name.unlink(missing_ok=True)
            except OSError as exc:
                self._note(f"the preview {name} can't be removed: {exc.strerror}")
        self._shown.pop(path, None)

    def remove_all(self) -> None:
        """Remove all previews."""
        for path in [*self._shown]:
            self.remove(path)


def text_chunks(pipeline: Pipeline | Refined, request: CompleteRequest) -> dict[str, str]:
    """Text chunks of an image's PNG: everything needed to generate it again."""
    refiner = pipeline.refiner.bundle.manifest if isinstance(pipeline, Refined) else None
    return texts_of(pipeline.bundle.manifest, request, refiner, pipeline.loras)


def png_bytes(image: Image.Image, chunks: dict[str, str]) -> bytes:
    """`image` as PNG, `chunks` as its text chunks (PNG specification, 11.3.3)."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in chunks.items():
        if key == a1111.KEY:
            info.add_text(key, value)  # as there, for readers that know no other kind
        else:
            info.add_itxt(key, value)
    file = io.BytesIO()
    image.save(file, "PNG", pnginfo=info)
    return file.getvalue()


def contact_sheet(paths: Sequence[Path], out: Path, columns: int) -> Path:
    """Write the images at `paths`, all of one size, side by side to `out`, or where that exists
    to the next free name, which is returned."""
    from PIL import Image

    images = [Image.open(path) for path in paths]
    width, height = images[0].size
    gap = max(2, width // 32)
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + gap), rows * (height + gap)), "white")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        sheet.paste(image, (column * (width + gap) + gap // 2, row * (height + gap) + gap // 2))
    return write_free(out, png_bytes(sheet, {}))


def read_prompts(file: Path | BinaryIO) -> list[str]:
    """One prompt per line of UTF-8 text; empty lines are skipped.

    Raises InputError when the file isn't UTF-8 text, has no prompt in it, or is far too large.
    """
    name = file if isinstance(file, Path) else getattr(file, "name", "the file")
    prompts = [line.strip(" \t") for line in read_lines(file) if line.strip()]
    if not prompts:
        raise InputError(f"{name} has no prompt in it: write one per line")
    if len(prompts) > _MOST_PROMPTS:
        raise InputError(f"{name} has {len(prompts)} prompts, and {_MOST_PROMPTS} are the most")
    return prompts


def expand_requests(template: Request, prompts: Sequence[str], count: int) -> list[Request]:
    """`count` requests per prompt, in order; their seeds count up from the template's.

    Raises UsageError for more than can be planned.
    """
    if len(prompts) * count > _MOST_IMAGES:
        raise UsageError(
            f"{len(prompts)} prompts times {count} are more than {_MOST_IMAGES} images: generate "
            "them in several runs"
        )
    return [
        replace(template, prompt=prompt, seed=seed)
        for prompt in prompts
        for seed in image_seeds(template.seed, count)
    ]


def _slug(prompt: str) -> str:
    ascii_text = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", ascii_text).strip("-")[:40].strip("-") or "image"
