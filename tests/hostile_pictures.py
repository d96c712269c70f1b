"""Files that are given for pictures and aren't, or are damaged, endless or made to harm.

Each case is made anew from a few lines, the same bytes on every machine.
"""

from __future__ import annotations

import functools
import io
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image, features

Outcome = Literal["refused", "read", "either"]


@dataclass(frozen=True)
class Case:
    """Bytes, and what becomes of them. said: a part of the line that refuses them, or of the note.
    either: some versions of Pillow's libraries read them and others don't."""

    make: Callable[[], bytes]
    outcome: Outcome = "refused"
    said: str = ""


PNG = b"\x89PNG\r\n\x1a\n"


def scene(width: int = 24, height: int = 16, mode: str = "RGB") -> Image.Image:
    values = np.random.RandomState(3).randint(0, 256, (height, width, 3)).astype(np.uint8)
    return Image.fromarray(values).convert(mode)


def encoded(
    kind: str, mode: str = "RGB", size: tuple[int, int] = (24, 16), **options: Any
) -> bytes:
    file = io.BytesIO()
    scene(*size, mode).save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, content: bytes, checksum: int | None = None) -> bytes:
    found = zlib.crc32(kind + content) if checksum is None else checksum
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", found)


def header(width: int, height: int, bits: int = 8, colour: int = 2, **more: int) -> bytes:
    fields = bits, colour, more.get("packing", 0), more.get("filters", 0), more.get("laced", 0)
    return chunk(b"IHDR", struct.pack(">II5B", width, height, *fields))


PIXELS = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + bytes(12) for _ in range(4))))
END = chunk(b"IEND", b"")


def png(*chunks: bytes, first: bytes | None = None) -> bytes:
    """A PNG of 4x4 black pixels with more chunks before them."""
    return PNG + (header(4, 4) if first is None else first) + b"".join(chunks) + PIXELS + END


def tiff(
    changes: dict[int, tuple[int, int, int]], pixels: bytes = bytes(48), more: int = 0
) -> bytes:
    """A TIFF of 4x4 black pixels; changes: tag -> type, count and value of its entry. more: where
    the next picture's directory is."""
    tags = {
        256: (4, 1, 4),
        257: (4, 1, 4),
        258: (3, 1, 8),
        259: (3, 1, 1),
        262: (3, 1, 2),
        273: (4, 1, 8),
        277: (3, 1, 3),
        278: (4, 1, 4),
        279: (4, 1, len(pixels)),
    }
    tags |= changes
    at = 8 + len(pixels)
    entries = b"".join(struct.pack("<HHII", tag, *tags[tag]) for tag in sorted(tags))
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", more)
    return b"II*\0" + struct.pack("<I", at) + pixels + directory


def float_tiff(*values: float) -> bytes:
    pixels = struct.pack("<16f", *values, *[0.5] * (16 - len(values)))
    return tiff({258: (3, 1, 32), 262: (3, 1, 1), 277: (3, 1, 1), 339: (3, 1, 3)}, pixels)


def bmp(width: int = 4, height: int = 4, bits: int = 24, packing: int = 0, **more: int) -> bytes:
    pixels = bytes(64)
    info = struct.pack(
        *("<IiiHHIIiiII", more.get("header", 40), width, height, 1, bits, packing, len(pixels)),
        *(0, 0, more.get("colours", 0), 0),
    )
    return b"BM" + struct.pack("<IHHI", 54 + len(pixels), 0, 0, more.get("at", 54)) + info + pixels


def gif(width: int, height: int, image: bytes | None = None) -> bytes:
    palette = bytes(6)
    if image is None:
        image = b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x44\x01\0"
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + palette + image + b";"


def webp(kind: bytes, content: bytes) -> bytes:
    body = b"WEBP" + kind + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def canvas(width: int, height: int) -> bytes:
    """A WebP's header of a canvas, which may be moving."""
    sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return webp(b"VP8X", bytes([2, 0, 0, 0]) + sides)


def jpeg_sized(width: int, height: int, progressive: bool = False) -> bytes:
    """A JPEG whose header says another size than it has."""
    raw = bytearray(encoded("JPEG", progressive=progressive))
    at = raw.index(b"\xff\xc2" if progressive else b"\xff\xc0")
    raw[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(raw)


def jpeg_with(segment: bytes) -> bytes:
    raw = encoded("JPEG")
    return raw[:2] + segment + raw[2:]


def app1(content: bytes) -> bytes:
    return b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content


def changed(raw: bytes, at: int, new: bytes) -> bytes:
    return raw[:at] + new + raw[at + len(new) :]


def moving(kind: str) -> bytes:
    file = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    frames[0].save(file, kind, save_all=True, append_images=frames[1:])
    return file.getvalue()


def noise(seed: int, count: int = 4000) -> bytes:
    return np.random.RandomState(seed).bytes(count)


FILES: dict[str, Callable[[], bytes]] = {
    "png": functools.partial(encoded, "PNG"),
    "png-palette": functools.partial(encoded, "PNG", "P"),
    "jpeg": functools.partial(encoded, "JPEG"),
    "jpeg-progressive": functools.partial(encoded, "JPEG", progressive=True),
    "jpeg-cmyk": functools.partial(encoded, "JPEG", "CMYK"),
    "webp": functools.partial(encoded, "WEBP"),
    "webp-lossless": functools.partial(encoded, "WEBP", lossless=True),
    "gif": functools.partial(encoded, "GIF", "P"),
    "bmp": functools.partial(encoded, "BMP"),
    "tiff": functools.partial(encoded, "TIFF"),
    "tiff-lzw": functools.partial(encoded, "TIFF", compression="tiff_lzw"),
    "ppm": functools.partial(encoded, "PPM"),
    **(
        {"avif": functools.partial(encoded, "AVIF")}
        if "avif" in features.get_supported_modules()
        else {}
    ),
}

OTHER_FILES = {
    "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200),
    "PDF": b"%PDF-1.7\n%\xe2\xe3\n1 0 obj\n",
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
    "Photoshop": b"8BPS\0\1" + bytes(30),
    "GIMP": b"gimp xcf v011\0" + bytes(30),
    "SVG": b"  <svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
    "XML": b"<?xml version='1.0'?><svg/>",
    "HTML": b"<!DOCTYPE html><title>404 Not Found</title>",
}

NO_PICTURES = {
    "text": b"a photograph of a cat\n" * 20,
    "text of UTF-16": "a cat".encode("utf-16"),
    "zeros": bytes(5000),
    "one byte": b"\x89",
    "a program": b"\x7fELF\2\1\1" + bytes(100),
    "an archive": b"PK\3\4" + bytes(100),
    "a zipped picture": zlib.compress(b"\x89PNG\r\n\x1a\n" + bytes(100)),
    "a film": b"\0\0\0\x20ftypisom\0\0\2\0isomiso2" + bytes(100),
    "a sound": b"RIFF\x24\0\0\0WAVEfmt " + bytes(40),
    "an icon": b"\0\0\1\0\1\0\x10\x10\0\0\1\0\x20\0\x30\0\0\0\x16\0\0\0" + bytes(48),
    "a TGA": bytes([0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4, 0, 4, 0, 24, 0]) + bytes(48),
    "JPEG 2000": b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(60),
    "an X bitmap": b"#define a_width 8\n#define a_height 1\nstatic char a_bits[] = {0x00};",
    "weights": struct.pack("<Q", 60) + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    "a prompt of JSON": b'{"prompt": "a cat"}',
    **{f"noise {seed}": noise(seed) for seed in range(6)},
}


def _cut() -> Iterator[tuple[str, Case]]:
    for name, make in FILES.items():
        for kind, at in ("its signature", 12), ("its header", 30), ("a half", 0):
            yield (
                f"{name}, {kind}",
                Case(lambda make=make, at=at: make()[: at or len(make()) // 2]),  # type: ignore[misc]
            )


def _garbled() -> Iterator[tuple[str, Case]]:
    """Whose middle is noise: decoders without checksums see colours in it."""
    sums = ("png", "png-palette")
    for name, make in FILES.items():

        def garbled(make: Callable[[], bytes] = make) -> bytes:
            raw = make()
            return changed(raw, len(raw) // 3, noise(8, len(raw) // 3))

        yield f"{name}, garbled", Case(garbled, "refused" if name in sums else "either")


SIZES = {
    "png of no width": (lambda: png(first=header(0, 4)), ""),
    "png of no height": (lambda: png(first=header(4, 0)), ""),
    "png of 0x0": (lambda: png(first=header(0, 0)), ""),
    "png, 40000 wide": (lambda: png(first=header(40_000, 1)), "40000x1 pixels, and 32768"),
    "png, 40000 tall": (lambda: png(first=header(1, 40_000)), "1x40000 pixels, and 32768"),
    "png, 40000 square": (lambda: png(first=header(40_000, 40_000)), "pixels"),
    "png, largest": (lambda: png(first=header(2**31 - 1, 2**31 - 1)), "pixels"),
    "png, over largest": (lambda: png(first=header(2**32 - 1, 2**32 - 1)), ""),
    "png, 30 million": (lambda: png(first=header(6000, 5000)), "more than the 25 million"),
    "png, bilevel": (lambda: png(first=header(30_000, 30_000, 1, 0)), "pixels"),
    "jpeg of no height": (lambda: jpeg_sized(24, 0), ""),
    "jpeg of no width": (lambda: jpeg_sized(0, 16), ""),
    "jpeg, largest": (lambda: jpeg_sized(65_500, 65_500), "pixels"),
    "jpeg, 200 million": (lambda: jpeg_sized(16_000, 12_500), "pixels"),
    "jpeg, progressive": (lambda: jpeg_sized(6000, 5000, True), "6000x5000 pixels, more than"),
    "webp, largest": (lambda: canvas(16_384, 16_384), ""),
    "webp, 20 million": (lambda: canvas(5000, 4000), ""),
    "webp, over largest": (lambda: canvas(1 << 24, 1 << 24), ""),
    "gif of 0x0": (lambda: gif(0, 0), ""),
    "gif, largest": (lambda: gif(65_535, 65_535), "pixels"),
    "gif, 16 million": (lambda: gif(4000, 4000), "4000x4000 pixels, more than the 12.5 million"),
    "bmp of 0x0": (lambda: bmp(0, 0), ""),
    "bmp, largest": (lambda: bmp(2**31 - 1, 2**31 - 1), "pixels"),
    "bmp of negative width": (lambda: bmp(-4, 4), ""),
    "bmp of least height": (lambda: bmp(4, -(2**31)), ""),
    "tiff of 0x0": (lambda: tiff({256: (4, 1, 0), 257: (4, 1, 0)}), ""),
    "tiff, largest": (lambda: tiff({256: (4, 1, 2**31 - 1), 257: (4, 1, 2**31 - 1)}), ""),
    "tiff, 30 million": (lambda: tiff({256: (4, 1, 6000), 257: (4, 1, 5000)}), "pixels, more than"),
    "ppm of 0x0": (lambda: b"P6 0 0 255\n", ""),
    "ppm of negative width": (lambda: b"P6 -4 4 255\n" + bytes(48), ""),
    "ppm, largest": (lambda: b"P6 99999999 99999999 255\n" + bytes(48), "pixels"),
    "ppm of endless digits": (lambda: b"P6 " + b"9" * 100_000 + b" 4 255\n", ""),
}
"""Of a header, refused before a pixel is decoded."""


def _of_numbers() -> Iterator[tuple[str, Case]]:
    for name, value in ("NaN", np.nan), ("infinity", np.inf), ("minus infinity", -np.inf):
        yield f"tiff with {name}", Case(lambda v=value: float_tiff(0.1, v), said="no numbers")  # type: ignore[misc]
        raw = b"Pf\n1 1\n-1.0\n" + struct.pack("<f", value)
        yield f"pfm with {name}", Case(lambda raw=raw: raw)  # type: ignore[misc]
    yield "tiff of 0 to 255", Case(lambda: float_tiff(0, 255), said="0 to 255: expected 0 to 1")
    yield "tiff below 0", Case(lambda: float_tiff(-1e-3), said="-0.001 to 0.5")
    yield (
        "tiff of 32 bits",
        Case(
            lambda: tiff(
                {258: (3, 1, 32), 262: (3, 1, 1), 277: (3, 1, 1), 339: (3, 1, 2)}, bytes(64)
            ),
            said="32 bits",
        ),
    )


DAMAGED_PNG = {
    "without pixels": Case(lambda: PNG + header(4, 4) + END),
    "without a header": Case(lambda: PNG + PIXELS + END),
    "signature alone": Case(lambda: PNG),
    "header alone": Case(lambda: PNG + header(4, 4)),
    "without a palette": Case(lambda: png(first=header(4, 4, colour=3)), "either"),
    "a header of a wrong sum": Case(
        lambda: PNG + chunk(b"IHDR", struct.pack(">II5B", 4, 4, 8, 2, 0, 0, 0), 1) + PIXELS + END
    ),
    "pixels of a wrong sum": Case(
        lambda: PNG + header(4, 4) + chunk(b"IDAT", zlib.compress(bytes(52)), 1) + END,
        "either",
    ),
    "pixels that aren't packed": Case(
        lambda: PNG + header(4, 4) + chunk(b"IDAT", noise(1, 60)) + END
    ),
    "too few pixels": Case(
        lambda: PNG + header(4, 4) + chunk(b"IDAT", zlib.compress(bytes(20))) + END
    ),
    "too many pixels": Case(
        lambda: PNG + header(4, 4) + chunk(b"IDAT", zlib.compress(bytes(10**7))) + END, "read"
    ),
    "3 bits": Case(lambda: png(first=header(4, 4, bits=3))),
    "colours of kind 5": Case(lambda: png(first=header(4, 4, colour=5))),
    "packed by kind 9": Case(lambda: png(first=header(4, 4, packing=9)), "either"),
    "interlaced by kind 9": Case(lambda: png(first=header(4, 4, laced=9)), "either"),
    "an endless chunk": Case(lambda: PNG + header(4, 4) + b"\xff\xff\xff\xffIDAT"),
    "a long chunk": Case(lambda: PNG + header(4, 4) + b"\x7f\xff\xff\xffIDAT" + bytes(100)),
    "an unknown chunk": Case(lambda: png(chunk(b"ABCD", b"?")), "either"),
    "a packed text of 100 MB": Case(
        lambda: png(chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(10**8), 1))), "either"
    ),
    "a packed profile of 100 MB": Case(
        lambda: png(chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(10**8), 1))), "either"
    ),
    "99 texts of 1 MB": Case(
        lambda: png(*[chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(10**6)))] * 99), "either"
    ),
    "Exif of noise": Case(lambda: png(chunk(b"eXIf", noise(4, 400))), "read"),
    "0 frames": Case(lambda: png(chunk(b"acTL", struct.pack(">II", 0, 0))), "either"),
    "2 billion frames": Case(lambda: png(chunk(b"acTL", struct.pack(">II", 2**31, 0))), "either"),
    "two headers": Case(lambda: png(header(9, 9)), "either"),
    "transparency of noise": Case(lambda: png(chunk(b"tRNS", noise(1, 3000))), "either"),
}

DAMAGED_JPEG = {
    "signature alone": Case(lambda: b"\xff\xd8\xff"),
    "without tables": Case(lambda: encoded("JPEG").replace(b"\xff\xc4", b"\xff\xee"), "either"),
    "Exif of noise": Case(lambda: jpeg_with(app1(b"Exif\0\0" + noise(2, 900))), "read"),
    "Exif that leads to itself": Case(
        lambda: jpeg_with(
            app1(b"Exif\0\0II*\0\x08\0\0\0\1\0\x69\x87\4\0\1\0\0\0\x08\0\0\0\x08\0\0\0")
        ),
        "read",
    ),
    "Exif of a billion entries": Case(
        lambda: jpeg_with(
            app1(b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\x01\3\0\xff\xff\xff\x3f\x08\0\0\0")
        ),
        "read",
    ),
    "a segment of no length": Case(lambda: jpeg_with(b"\xff\xe1\0\0"), "either"),
    "16 bits": Case(
        lambda: changed(encoded("JPEG"), encoded("JPEG").index(b"\xff\xc0") + 4, b"\x10")
    ),
    "7 channels": Case(
        lambda: changed(encoded("JPEG"), encoded("JPEG").index(b"\xff\xc0") + 9, b"\7")
    ),
    "arithmetic coding": Case(lambda: encoded("JPEG").replace(b"\xff\xc0", b"\xff\xc9"), "either"),
    "1000 scans": Case(
        lambda: encoded("JPEG") + b"\xff\xda\0\x08\1\1\0\0\x3f\0" * 1000, said="too many scans"
    ),
    "an index of others of noise": Case(
        lambda: jpeg_with(b"\xff\xe2" + struct.pack(">H", 206) + b"MPF\0" + noise(6, 200)), "read"
    ),
    "a second picture behind": Case(lambda: encoded("JPEG") + encoded("JPEG"), "read"),
}

DAMAGED_TIFF = {
    "a directory far away": Case(lambda: b"II*\0\xff\xff\xff\x7f" + bytes(60)),
    "a directory that leads to itself": Case(lambda: tiff({}, more=56), "either"),
    "a tag of a billion": Case(lambda: tiff({273: (4, 1 << 30, 8)})),
    "pixels far away": Case(lambda: tiff({273: (4, 1, 1 << 30)})),
    "0 bits": Case(lambda: tiff({258: (3, 1, 0)})),
    "64 bits": Case(lambda: tiff({258: (3, 1, 64)})),
    "1000 channels": Case(lambda: tiff({277: (3, 1, 1000)})),
    "0 channels": Case(lambda: tiff({277: (3, 1, 0)})),
    "packed by kind 9999": Case(lambda: tiff({259: (3, 1, 9999)})),
    "packed, of noise": Case(lambda: tiff({259: (3, 1, 5)}, noise(3, 48)), "either"),
    "JPEG inside, of noise": Case(lambda: tiff({259: (3, 1, 7)}, noise(3, 48)), "either"),
    "tiles of no size": Case(
        lambda: tiff({322: (4, 1, 0), 323: (4, 1, 0), 324: (4, 1, 8)}), "either"
    ),
    "colours of kind 99": Case(lambda: tiff({262: (3, 1, 99)})),
    "orientation 99": Case(lambda: tiff({274: (3, 1, 99)}), "either"),
    "no entries": Case(lambda: b"II*\0\x08\0\0\0\0\0\0\0\0\0"),
    "65535 entries": Case(lambda: b"II*\0\x08\0\0\0\xff\xff" + bytes(200)),
    "Lab": Case(lambda: encoded("TIFF", "LAB"), "either"),
}

DAMAGED_OTHERS = {
    "gif without a frame": Case(lambda: gif(4, 4, b"")),
    "gif of a frame outside": Case(
        lambda: gif(4, 4, b"," + struct.pack("<HHHHB", 60000, 60000, 4, 4, 0) + b"\2\2\x44\1\0"),
        "either",
    ),
    "gif of codes of 20 bits": Case(
        lambda: gif(4, 4, b"," + struct.pack("<HHHHB", 0, 0, 4, 4, 0) + b"\x14\2\x44\1\0"), "either"
    ),
    "gif of comments without end": Case(lambda: gif(4, 4, b"!\xfe" + b"\xff" * 50_000)),
    "webp without pixels": Case(lambda: webp(b"VP8 ", b"")),
    "webp of noise": Case(lambda: webp(b"VP8L", b"\x2f" + noise(2, 400)), "either"),
    "webp without frames": Case(lambda: canvas(8, 8)),
    "webp of an unknown kind": Case(lambda: webp(b"WXYZ", bytes(30))),
    "bmp of 3 bits": Case(lambda: bmp(bits=3)),
    "bmp of a wrong header": Case(lambda: bmp(header=7)),
    "bmp of pixels far away": Case(lambda: bmp(at=2**31)),
    "bmp packed by kind 77": Case(lambda: bmp(packing=77)),
    "bmp packed, of noise": Case(
        lambda: changed(bmp(bits=8, packing=1), 54, noise(1, 64)), "either"
    ),
    "bmp of a billion colours": Case(lambda: bmp(bits=8, colours=1 << 30), "either"),
    "ppm of no brightness": Case(lambda: b"P6 4 4 0\n" + bytes(48)),
    "ppm of 17 bits": Case(lambda: b"P6 4 4 70000\n" + bytes(96)),
    "ppm of words": Case(lambda: b"P3 4 4 255\nred green blue"),
    "ppm of a comment without end": Case(lambda: b"P6 #" + b"x" * 200_000),
    "ppm without pixels": Case(lambda: b"P6 4 4 255\n"),
    "pbm of words": Case(lambda: b"P1 2 2\n0 1 two 1"),
    "pfm of scale 0": Case(lambda: b"Pf\n1 1\n0.0\n" + bytes(4)),
    "pfm of scale NaN": Case(lambda: b"Pf\n1 1\nnan\n" + bytes(4)),
    "pam": Case(lambda: b"P7\nWIDTH 1\nHEIGHT 1\nDEPTH 1\nMAXVAL 255\nENDHDR\n\0", "either"),
    "avif of noise": Case(lambda: b"\0\0\0\x20ftypavif\0\0\0\0avifmif1miafMA1B" + noise(5, 400)),
    "avif box without end": Case(lambda: b"\0\0\0\0ftypavif" + bytes(60)),
}

READ = {
    "one pixel": Case(lambda: encoded("PNG", size=(1, 1)), "read"),
    "a row": Case(lambda: encoded("PNG", size=(5000, 1)), "read"),
    "bilevel": Case(lambda: encoded("PNG", "1"), "read"),
    "palette": Case(lambda: encoded("PNG", "P"), "read"),
    "grey with alpha": Case(lambda: encoded("PNG", "LA"), "read"),
    "16 bits": Case(lambda: b"P5 2 1 65535\n" + bytes(4), "read"),
    "cmyk": Case(lambda: encoded("TIFF", "CMYK"), "read"),
    "bottom up": Case(lambda: bmp(4, -4), "read"),
    "a moving gif": Case(lambda: moving("GIF"), "read", "several frames"),
    "a moving png": Case(lambda: moving("PNG"), "read", "several frames"),
    "a moving webp": Case(lambda: moving("WEBP"), "read", "several frames"),
    "a tiff of pages": Case(lambda: moving("TIFF"), "read", "several frames"),
    "something behind": Case(lambda: encoded("PNG") + noise(1), "read"),
}

CASES: dict[str, Case] = {
    "empty": Case(lambda: b"", said="is empty"),
    **{f"cut: {name}": case for name, case in _cut()},
    **dict(_garbled()),
    **{
        f"a {kind} file": Case(lambda raw=raw: raw, said="save it as PNG")  # type: ignore[misc]
        for kind, raw in OTHER_FILES.items()
    },
    **{
        name: Case(lambda raw=raw: raw, said="no picture of a format that is read")  # type: ignore[misc]
        for name, raw in NO_PICTURES.items()
    },
    **{name: Case(make, said=said) for name, (make, said) in SIZES.items()},
    **dict(_of_numbers()),
    **{f"png: {name}": case for name, case in DAMAGED_PNG.items()},
    **{f"jpeg: {name}": case for name, case in DAMAGED_JPEG.items()},
    **{f"tiff: {name}": case for name, case in DAMAGED_TIFF.items()},
    **DAMAGED_OTHERS,
    **{f"read: {name}": case for name, case in READ.items()},
}
