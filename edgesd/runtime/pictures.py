"""Picture files of the user's, and what a pipeline reads of them: image, mask and control image.

A file is read once. Its hash is that of the bytes that are decoded, and only these bytes are kept:
pixels are decoded for each use, so that a photo doesn't lie in a small board's memory while it
draws. Sizes are those of the upright picture.

Pixels become arrays as in diffusers' VaeImageProcessor, bit for bit.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import logging
import math
import os
import stat
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np

from edgesd.errors import InputError, ResourceError, UsageError
from edgesd.runtime.arrays import Float
from edgesd.text import first_sentence

if TYPE_CHECKING:
    from PIL import Image

MOST_BYTES = 64 << 20
"""Of a file."""

MOST_PIXELS = 25_000_000
"""That are decoded: 100 MB, twice while a picture is turned or flattened."""

_PIXEL_BYTES, _ALPHA_BYTES = 12, 4
"""What a pixel takes at most while a file is decoded, turned, flattened or made a mask, and more of
it where it isn't opaque (measured: 5 to 16; of WebP, the most of all formats, up to 26)."""

MOST_SIDE = 1 << 15

_MOST_JPEG_PIXELS = 160_000_000
"""Of a JPEG whose size is halved, once or more, while it is decoded."""

_MOST_JPEG_SCANS = 200
"""Each of them goes over all pixels, and takes few bytes."""

_BAND = 256
"""Rows that are laid over a picture at a time."""

MOST_BLUR = 256
MOST_PADDING = 1 << 14

_LIMITS = {
    "PNG": MOST_PIXELS,
    "JPEG": MOST_PIXELS,
    "WEBP": MOST_PIXELS // 2,  # decoded into three copies
    "AVIF": MOST_PIXELS // 2,
    "GIF": MOST_PIXELS // 2,
    "BMP": MOST_PIXELS,
    "TIFF": MOST_PIXELS,
    "PPM": MOST_PIXELS,
}
"""The formats that are opened, and how many pixels of each are: no format that is a program, that
names other files or that has no signature."""

_PLUGINS = {"WEBP": "WebPImagePlugin", "AVIF": "AvifImagePlugin", "TIFF": "TiffImagePlugin"}
"""Of the formats that Pillow doesn't know from the start. Older ones lack AVIF."""

_FORMAT_NAMES = "PNG, JPEG, WebP, AVIF, GIF, BMP, TIFF or PPM"

_UNREAD = (
    (4, (b"ftypheic", b"ftypheix", b"ftyphevc", b"ftypheim", b"ftypmif1"), "HEIC"),
    (0, (b"%PDF",), "PDF"),
    (0, (b"%!PS",), "PostScript"),
    (0, (b"8BPS",), "Photoshop"),
    (0, (b"gimp xcf",), "GIMP"),
    (0, (b"<svg", b"<?xml", b"<!DOCTYPE", b"<html"), "XML or SVG"),
)
"""Where what stands in files that people take for pictures, and what they are."""

_DEEP = ("I;16", "I;16L", "I;16B", "I;16N")
_WITH_ALPHA = ("LA", "PA", "RGBA", "La", "RGBa")

_UNSEEN_STRETCH, _UNSEEN_SHRINK = 1.05, 0.8

_COLOURED = 24
"""How much the channels of a pixel differ where it isn't a grey that a lossy format changed."""


@dataclass(frozen=True)
class Picture:
    """A picture file that was read and can be decoded. Two of the same bytes are equal.

    sha256: of the file, hexadecimal. width, height: pixels, upright. transparent: somewhere, at
    least in part. notes: lines for the user. reading_bytes: what reading it anew takes in memory,
    at most, beside `raw`.
    """

    name: str = field(compare=False)
    sha256: str
    width: int
    height: int
    transparent: bool
    notes: tuple[str, ...] = field(compare=False)
    reading_bytes: int = field(compare=False)
    raw: bytes = field(compare=False, repr=False)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.width, self.height

    def decoded(self) -> Image.Image:
        """The pixels, RGB and upright; what is transparent lies on white."""
        return _flat(_decode(self.name, self.raw).image, "white")

    def mask(self) -> Image.Image:
        """The pixels as a mask (mode L): what is white is painted.

        Of a picture with colours and a hole it is the hole that is painted; in a black and white
        mask, what is transparent counts as black.
        """
        from PIL import Image, ImageOps

        image = _decode(self.name, self.raw).image
        if image.mode != "RGBA":
            return image.convert("L")
        alpha = image.getchannel("A")
        if _has_colours(image):
            return ImageOps.invert(alpha)
        return Image.composite(image.convert("L"), Image.new("L", image.size), alpha)

    def hole(self) -> Image.Image:
        """A mask (mode L) that is white where the picture is transparent.

        Raises InputError when it is opaque.
        """
        from PIL import ImageOps

        image = _decode(self.name, self.raw).image
        if image.mode != "RGBA":
            raise InputError(
                f"{self.name} isn't transparent anywhere, so that it can't be its own mask"
            )
        return ImageOps.invert(image.getchannel("A"))


def read_picture(source: Path | BinaryIO | bytes, name: str | None = None) -> Picture:
    """Read and check a picture: a file, an open one, or the bytes of one.

    name: of `source` in messages, its own by default. Raises InputError when it can't be read, is
    too large, isn't a picture of a format that is read, is damaged, or has values that are no
    colours; ResourceError when its pixels don't fit into memory.
    """
    if name is None:
        own = source if isinstance(source, Path) else getattr(source, "name", "the picture")
        name = str(own)
    raw = source if isinstance(source, bytes) else _read(source, name)
    if len(raw) > MOST_BYTES:
        raise InputError(
            f"{name} is larger than {MOST_BYTES >> 20} MiB, the most that is read: save it smaller"
        )
    if not raw:
        raise InputError(f"{name} is empty: expected a picture, {_FORMAT_NAMES}")
    image, notes, pixel_bytes = _decode(name, raw)
    return Picture(
        name=name,
        sha256=hashlib.sha256(raw).hexdigest(),
        width=image.width,
        height=image.height,
        transparent=image.mode == "RGBA",
        notes=tuple(notes),
        reading_bytes=pixel_bytes * image.width * image.height,
        raw=raw,
    )


def _read(source: Path | BinaryIO, name: str) -> bytes:
    try:
        return _file_bytes(source, name) if isinstance(source, Path) else _bounded(source)
    except OSError as exc:
        raise InputError(f"{name} can't be read: {exc.strerror or exc}") from exc
    except ValueError as exc:  # a name with a zero byte in it
        raise InputError(f"{name} can't be read: {first_sentence(exc)}") from exc


def _file_bytes(path: Path, name: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # never waits for a pipe
    try:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode):
            what = "a folder" if stat.S_ISDIR(mode) else "a device or a pipe"
            raise InputError(f"{name} is {what}: expected a picture, {_FORMAT_NAMES}")
        with open(fd, "rb", closefd=False) as file:
            return _bounded(file)
    finally:
        os.close(fd)


def _bounded(file: BinaryIO) -> bytes:
    """A file's bytes: of one that is too large as many as show that."""
    return file.read(MOST_BYTES + 1)


# --- decoding -------------------------------------------------------------------------------------


class _Decoded(NamedTuple):
    """The upright pixels of a file: RGB, or RGBA where it isn't opaque; notes; and what a pixel
    takes in memory at most, before it is one of these."""

    image: Image.Image
    notes: list[str]
    pixel_bytes: int


def _decode(name: str, raw: bytes) -> _Decoded:
    with _pillow_errors(name, raw):
        image, notes = _opened(name, raw)
        with _libtiff_silenced() if image.format == "TIFF" else nullcontext():
            image.load()
        orientation = 1 if image.format == "TIFF" else _orientation(image)  # Pillow turns these
        # Of formats that take more, fewer pixels are read.
        more = MOST_PIXELS // _LIMITS.get(str(image.format), MOST_PIXELS)
        image = _eight_bits(name, image)
        image = _turned(image, orientation)
    alpha = _ALPHA_BYTES if image.mode == "RGBA" else 0
    return _Decoded(image, notes, _PIXEL_BYTES * more + alpha)


@contextmanager
def _pillow_errors(name: str, raw: bytes) -> Iterator[None]:
    """Turn whatever Pillow raises for hostile bytes into one line, and its warnings into none."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except InputError:
        raise
    except MemoryError as exc:
        raise ResourceError(f"the pixels of {name} don't fit into memory: save it smaller") from exc
    except UnidentifiedImageError as exc:  # whose words name an object of ours
        raise InputError(_unidentified(name, raw)) from exc
    except Image.DecompressionBombError as exc:
        raise InputError(f"{name} has far too many pixels: save it smaller") from exc
    except Exception as exc:  # Pillow raises errors of many kinds
        raise InputError(f"{name} is damaged, or cut off ({first_sentence(exc)})") from exc


@contextmanager
def _libtiff_silenced() -> Iterator[None]:
    """libtiff prints what it finds wrong to standard error, by itself."""
    sys.stderr.flush()
    try:
        kept = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _unidentified(name: str, raw: bytes) -> str:
    for at, beginnings, kind in _UNREAD:
        if raw[at:].lstrip()[:16].startswith(beginnings):
            return f"{name} is a {kind} file, which isn't read: save it as {_FORMAT_NAMES}"
    return f"{name} is damaged, or no picture of a format that is read: {_FORMAT_NAMES}"


def _opened(name: str, raw: bytes) -> tuple[Image.Image, list[str]]:
    """A picture whose header was read and whose size is within bounds, and notes."""
    from PIL import Image

    logging.getLogger("PIL").setLevel(logging.CRITICAL)  # what is wrong, it raises as well
    Image.preinit()
    for plugin in _PLUGINS.values():
        try:
            importlib.import_module(f"PIL.{plugin}")
        except ModuleNotFoundError:
            continue
    known = tuple(name for name in _LIMITS if name in Image.OPEN)
    image = Image.open(io.BytesIO(raw), formats=known)
    width, height = image.size
    told = f"{name} has {width}x{height} pixels"
    if width < 1 or height < 1:
        raise InputError(f"{told}: there is nothing to see")
    if max(width, height) > MOST_SIDE:
        raise InputError(f"{told}, and {MOST_SIDE} are the most on a side: save it smaller")
    notes = []
    jpeg = image.format in ("JPEG", "MPO")  # MPO: a JPEG with others behind it, as phones make them
    most = _LIMITS["JPEG" if jpeg else str(image.format)]
    if jpeg and raw.count(b"\xff\xda") > _MOST_JPEG_SCANS:
        raise InputError(f"{name} is a JPEG of too many scans: save it anew")
    if jpeg and most < width * height <= _MOST_JPEG_PIXELS and _is_one_scan(raw):
        half = 2 if width * height <= 4 * most else 4
        image.draft(None, (width // half, height // half))
        notes.append(f"{told}: it is read with {image.width}x{image.height}")
    if image.width * image.height > most:
        raise InputError(
            f"{told}, more than the {most / 1e6:g} million that are read: save it smaller"
        )
    if image.format != "MPO" and getattr(image, "is_animated", False):
        notes.append(f"{name} has several frames: the first is taken")
    return image, notes


def _is_one_scan(raw: bytes) -> bool:
    """Whether a JPEG's first scan has all its channels, so that it is decoded row by row; else all
    of its coefficients are held in memory (ITU-T T.81, annex B)."""
    at, channels = 2, 0
    while at + 10 <= len(raw) and raw[at] == 0xFF:
        marker, length = raw[at + 1], int.from_bytes(raw[at + 2 : at + 4], "big")
        if marker == 0xFF:  # fill
            at += 1
            continue
        if marker in (0xC0, 0xC1):
            channels = raw[at + 9]
        elif marker == 0xDA:
            return raw[at + 4] == channels
        elif 0xC2 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return False
        at += 2 + length
    return False


def _orientation(image: Image.Image) -> int:
    """How the camera was held: 1 to 8, as in Exif 2.3, tag 274; 1 where nothing readable says."""
    try:
        found = image.getexif().get(274, 1)
    except Exception:  # noqa: BLE001  damaged notes of a camera spoil no picture
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    from PIL import Image

    way = Image.Transpose
    ways = (
        *(None, way.FLIP_LEFT_RIGHT, way.ROTATE_180, way.FLIP_TOP_BOTTOM),
        *(way.TRANSPOSE, way.ROTATE_270, way.TRANSVERSE, way.ROTATE_90),
    )
    chosen = ways[orientation - 1]
    return image if chosen is None else image.transpose(chosen)


def _eight_bits(name: str, image: Image.Image) -> Image.Image:
    """RGB, or RGBA where `image` isn't opaque, of 8 bits a channel.

    Raises InputError for values that are no brightness, ValueError for colours that Pillow can't
    convert.
    """
    from PIL import Image

    if image.mode in _DEEP or image.mode == "I":
        if image.mode == "I" and image.format not in ("PNG", "PPM"):  # in these it is 16 bits
            raise InputError(f"{name} has pixels of 32 bits: save it with 8 or 16")
        of_16_bits = ((np.arange(1 << 16) * 255 + 32767) // 65535).astype(np.uint8)
        image = Image.fromarray(of_16_bits[np.asarray(image)])
    elif image.mode == "F":
        image = _of_floats(name, image)
    if image.mode in _WITH_ALPHA or "transparency" in image.info:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            return image
    return image if image.mode == "RGB" else image.convert("RGB")


def _of_floats(name: str, image: Image.Image) -> Image.Image:
    from PIL import Image

    values = np.asarray(image)
    least, most = float(values.min()), float(values.max())
    if not np.isfinite([least, most]).all():
        raise InputError(f"{name} has pixels that are no numbers (NaN or infinite)")
    if least < 0 or most > 1:
        raise InputError(
            f"{name} has floating-point pixels of {least:g} to {most:g}: expected 0 to 1"
        )
    scaled = values * np.float32(255)
    return Image.fromarray(np.rint(scaled, out=scaled).astype(np.uint8))


def _has_colours(image: Image.Image) -> bool:
    """Whether something that can be seen of an RGBA image isn't grey."""
    from PIL import ImageChops

    red, green, blue, alpha = image.split()
    brightest = ImageChops.lighter(ImageChops.lighter(red, green), blue)
    darkest = ImageChops.darker(ImageChops.darker(red, green), blue)
    spread = ImageChops.subtract(brightest, darkest)
    seen = alpha.point([0, *[255] * 255])
    return int(np.asarray(ImageChops.darker(spread, seen)).max()) > _COLOURED


def _flat(image: Image.Image, ground: str) -> Image.Image:
    """An RGB or RGBA image as RGB, on `ground`."""
    from PIL import Image

    if image.mode == "RGB":
        return image
    below = Image.new("RGB", image.size, ground)
    below.paste(image, mask=image.getchannel("A"))
    return below


# --- sizes ----------------------------------------------------------------------------------------


def own_size(picture: Picture, multiple: int, most: int) -> tuple[int, int]:
    """Width and height of an image made from `picture`: its own, down to the next `multiple`. Of a
    picture that has more than `most` pixels then, the multiples nearest to its shape in so many.

    Raises InputError when it is smaller than the multiple.
    """
    width, height = (side - side % multiple for side in picture.size)
    if not width or not height:
        raise InputError(
            f"{picture.name} has {picture.width}x{picture.height} pixels, less than the "
            f"{multiple}x{multiple} that can be drawn: give --size"
        )
    if width * height <= most:
        return width, height
    part = math.sqrt(most / (picture.width * picture.height)) / multiple
    width, height = (max(1, round(side * part)) * multiple for side in picture.size)
    return width, height


def shrunk(picture: Picture, width: int, height: int) -> str | None:
    """A note for the user where a picture is drawn with much fewer pixels than it has; else
    None."""
    if width * height > _UNSEEN_SHRINK * picture.width * picture.height:
        return None
    return (
        f"{picture.name} has {picture.width}x{picture.height} pixels and is drawn with "
        f"{width}x{height}, which suits the model: --size chooses another size"
    )


def stretched(picture: Picture, width: int, height: int) -> str | None:
    """A note for the user where a picture is read in another shape; None for nearly the same."""
    factor = width * picture.height / (height * picture.width)
    if 1 / _UNSEEN_STRETCH < factor < _UNSEEN_STRETCH:
        return None
    return (
        f"{picture.name} has {picture.width}x{picture.height} pixels and is stretched to "
        f"{width}x{height}: give a --size of its shape, or crop it"
    )


# --- arrays ---------------------------------------------------------------------------------------


def image_array(image: Image.Image, width: int, height: int) -> Float:
    """RGB [H, W, 3] of 8 bits -> [1, 3, height, width] of -1 to 1, resized by Lanczos' filter."""
    values: Float = np.float32(2) * hint_array(image, width, height) - np.float32(1)
    return values


def hint_array(image: Image.Image, width: int, height: int, channels: int = 3) -> Float:
    """What a ControlNet or an adapter reads: RGB of 8 bits -> [1, channels, height, width], 0 to 1.

    channels: 1 for an adapter that reads a grey picture.
    """
    if channels == 1:
        image = image.convert("L")
    values = np.asarray(_resized(image, width, height)).reshape(height, width, channels)
    values = values.astype(np.float32) / np.float32(255)
    return np.ascontiguousarray(values.transpose(2, 0, 1)[None])


def mask_array(mask: Image.Image, width: int, height: int) -> Float:
    """A mask (mode L) -> [1, 1, height, width] of 0 (kept) and 1 (painted), from half on."""
    return _binary(_resized(mask, width, height))


def _binary(mask: Image.Image) -> Float:
    values = np.asarray(mask).astype(np.float32) / np.float32(255)
    painted: Float = (values >= 0.5).astype(np.float32)
    return painted[None, None]


def latent_mask(mask: Float, height: int, width: int) -> Float:
    """A mask [1, 1, H, W] -> [1, 1, height, width]: the nearest values, as torch's `interpolate`
    takes them: at floor(i * H / height)."""
    rows, columns = (
        np.minimum((np.arange(new, dtype=np.float32) * np.float32(old / new)).astype(int), old - 1)
        for old, new in zip(mask.shape[2:], (height, width), strict=True)
    )
    return np.ascontiguousarray(mask[:, :, rows][:, :, :, columns])


def masked_image(image: Float, mask: Float) -> Float:
    """`image` [1, 3, H, W] with 0, which is grey, where `mask` [1, 1, H, W] is painted."""
    kept: Float = image * (mask < 0.5)
    return kept


def _resized(image: Image.Image, width: int, height: int) -> Image.Image:
    from PIL import Image

    return image.resize((width, height), Image.Resampling.LANCZOS)


# --- inpainting -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Painting:
    """What an inpainting run draws: an image, its mask of the same size, and the box around the
    mask that is drawn alone, if one is.

    image: decoded where its pixels are used. mask: L. box: left, top, right, bottom. width, height:
    what is drawn. notes: lines for the user.
    """

    image: Picture
    mask: Image.Image
    box: tuple[int, int, int, int] | None
    width: int
    height: int
    notes: tuple[str, ...] = ()

    def arrays(self) -> tuple[Float, Float]:
        """The image [1, 3, height, width] of -1 to 1, and the mask [1, 1, height, width] of 0 and
        1. A box of another shape than what is drawn is filled up by its edges.

        Raises InputError when nothing is left to be painted.
        """
        found = mask_array(self._fitted(self.mask), self.width, self.height)
        if not found.any():
            raise InputError(
                f"the mask has no white left, blurred and in {self.width}x{self.height} pixels: "
                "make it wider, or blur it less"
            )
        image = self._fitted(self.image.decoded())
        return image_array(image, self.width, self.height), found

    def _fitted(self, image: Image.Image) -> Image.Image:
        """What of an image or mask is read."""
        if self.box is None:
            return image
        return _filled(image.crop(self.box), self.width, self.height)

    def same_part(self, image: Image.Image) -> Image.Image:
        """What another RGB image shows of where is painted; it is scaled to the size of the one
        that is painted in."""
        if self.box is not None and image.size != self.image.size:
            image = _resized(image, *self.image.size)
        return self._fitted(image)

    def overlaid(self, drawn: Image.Image) -> Image.Image:
        """`drawn` where the mask is, in the image: of its size, with its own bits where the mask
        is 0, and in between where it is grey."""
        from PIL import Image, ImageOps

        image = self.image.decoded()
        if self.box is None:
            box = self.mask.getbbox() or (0, 0, *image.size)
            drawn = drawn if drawn.size == image.size else _resized(drawn, *image.size)
            drawn = drawn.crop(box)
        else:
            box = self.box
            drawn = _covering(drawn, box[2] - box[0], box[3] - box[1])
        left, above, right, below = box
        for top in range(above, below, _BAND):  # takes several copies of what it joins
            bottom = min(top + _BAND, below)
            part = left, top, right, bottom
            kept = Image.new("RGBa", (right - left, bottom - top))
            around = image.crop(part).convert("RGBA").convert("RGBa")
            kept.paste(around, mask=ImageOps.invert(self.mask.crop(part)))
            new = drawn.crop((0, top - above, drawn.width, bottom - above)).convert("RGBA")
            new.alpha_composite(kept.convert("RGBA"))
            image.paste(new.convert("RGB"), (left, top))
        return image


def painting(
    image: Picture,
    mask: Picture,
    width: int,
    height: int,
    blur: float = 0,
    padding: int | None = None,
) -> Painting:
    """What is painted in `image`, at `width` x `height`.

    mask: white where it is painted; the same file as `image`: where that is transparent. blur: the
    radius in pixels of `image`. padding: draw the mask's surroundings alone, so many pixels wide,
    widened to the shape of what is drawn; None: draw the whole image.
    Raises InputError when the mask has another shape than the image, or nothing to paint;
    UsageError for a blur or padding out of range.
    """
    from PIL import ImageFilter

    if not 0 <= blur <= MOST_BLUR:
        raise UsageError(f"mask blur must be 0 to {MOST_BLUR} pixels, not {blur}")
    if padding is not None and not 0 <= padding <= MOST_PADDING:
        raise UsageError(f"mask padding must be 0 to {MOST_PADDING} pixels, not {padding}")
    notes = []
    found, name = image.hole() if mask == image else mask.mask(), mask.name
    if found.size != image.size:
        sizes = f"{found.width}x{found.height}", f"{image.width}x{image.height}"
        if not _same_shape(found.size, image.size):
            raise InputError(
                f"{name} has {sizes[0]} pixels and {image.name} {sizes[1]}: a mask has the shape "
                "of its image"
            )
        found = _resized(found, *image.size)
        notes.append(f"{name} is scaled from {sizes[0]} to the {sizes[1]} pixels of {image.name}")
    if _binary(found).max() == 0:
        raise InputError(f"{name} has no white in it: nothing would be painted")
    if blur:
        found = found.filter(ImageFilter.GaussianBlur(blur))
    box = None if padding is None else crop_box(found, width, height, padding)
    return Painting(image, found, box, width, height, tuple(notes))


def _same_shape(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two sizes are one picture's, scaled and rounded to whole pixels."""
    (width, height), (wide, tall) = one, other
    across = width * tall - height * wide
    return abs(across) < max(*one, *other)


def crop_box(mask: Image.Image, width: int, height: int, padding: int) -> tuple[int, int, int, int]:
    """The box around all of a mask (mode L) that isn't black: left, top, right, bottom.

    It is `padding` pixels wider on all sides, widened to the shape of `width` x `height`, and
    moved or cut to lie within the mask. diffusers: VaeImageProcessor.get_crop_region.
    """
    left, top, right, bottom = mask.getbbox() or (0, 0, *mask.size)
    left, right = max(left - padding, 0), min(right + padding, mask.width)
    top, bottom = max(top - padding, 0), min(bottom + padding, mask.height)
    shape = width / height
    if (right - left) / (bottom - top) > shape:
        more = int((right - left) / shape - (bottom - top))
        top, bottom = _widened(top, bottom, more, mask.height)
    else:
        more = int((bottom - top) * shape - (right - left))
        left, right = _widened(left, right, more, mask.width)
    return left, top, right, bottom


def _widened(first: int, end: int, more: int, most: int) -> tuple[int, int]:
    """`first` to `end`, by `more` longer to both sides, within 0 to `most`."""
    first -= more // 2
    end += more - more // 2
    over = max(end - most, 0)
    first, end = first - over, end - over
    under = max(-first, 0)
    return first + under, min(end + under, most)


def _scaled_sides(size: tuple[int, int], width: int, height: int, cover: bool) -> tuple[int, int]:
    """`size` scaled to lie within width x height, or to cover it."""
    wide, tall = size
    shape, own = width / height, wide / tall
    if shape > own if cover else shape < own:
        return width, max(tall * width // wide, 1)
    return max(wide * height // tall, 1), height


def _covering(image: Image.Image, width: int, height: int) -> Image.Image:
    """RGB `image`, scaled to cover width x height, its middle cut out."""
    from PIL import Image

    scaled = _resized(image, *_scaled_sides(image.size, width, height, cover=True))
    found = Image.new("RGB", (width, height))
    found.paste(scaled, (width // 2 - scaled.width // 2, height // 2 - scaled.height // 2))
    return found


def _filled(image: Image.Image, width: int, height: int) -> Image.Image:
    """`image`, scaled to lie in the middle of width x height; its edges are drawn out to fill it.

    diffusers: VaeImageProcessor.resize, resize_mode "fill".
    """
    from PIL import Image

    scaled = _resized(image, *_scaled_sides(image.size, width, height, cover=False))
    wide, tall = scaled.size
    found = Image.new(image.mode, (width, height))
    left, top = width // 2 - wide // 2, height // 2 - tall // 2
    found.paste(scaled, (left, top))
    if left > 0:
        for edge, at in (0, 0), (wide, left + wide):
            found.paste(scaled.resize((left, height), box=(edge, 0, edge, tall)), (at, 0))
    if top > 0:
        for edge, at in (0, 0), (tall, top + tall):
            found.paste(scaled.resize((width, top), box=(0, edge, wide, edge)), (0, at))
    return found
