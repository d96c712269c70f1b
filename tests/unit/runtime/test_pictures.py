"""Picture files become what diffusers makes of them, bit for bit."""

from __future__ import annotations

import hashlib
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import load_image
from PIL import Image, ImageDraw, features

from edgesd.errors import InputError, UsageError
from edgesd.runtime import pictures
from edgesd.runtime.pictures import (
    Picture,
    crop_box,
    hint_array,
    image_array,
    latent_mask,
    mask_array,
    masked_image,
    own_size,
    painting,
    read_picture,
    shrunk,
    stretched,
)

FORMATS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "png": ("RGB", "PNG", {}),
    "png-grey": ("L", "PNG", {}),
    "png-palette": ("P", "PNG", {}),
    "png-bilevel": ("1", "PNG", {}),
    "jpeg": ("RGB", "JPEG", {}),
    "jpeg-progressive": ("RGB", "JPEG", {"progressive": True}),
    "jpeg-grey": ("L", "JPEG", {}),
    "jpeg-cmyk": ("CMYK", "JPEG", {}),
    "webp": ("RGB", "WEBP", {}),
    "webp-lossless": ("RGB", "WEBP", {"lossless": True}),
    "avif": ("RGB", "AVIF", {}),
    "gif": ("P", "GIF", {}),
    "bmp": ("RGB", "BMP", {}),
    "tiff": ("RGB", "TIFF", {}),
    "tiff-lzw": ("RGB", "TIFF", {"compression": "tiff_lzw"}),
    "tiff-cmyk": ("CMYK", "TIFF", {}),
    "ppm": ("RGB", "PPM", {}),
    "pgm": ("L", "PPM", {}),
}

SIZES = [((97, 61), (64, 64)), ((64, 128), (64, 128)), ((20, 30), (128, 64))]
"""Of the file, and of what is drawn: width and height."""


def scene(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Noise over a gradient: all brightnesses, and edges at each pixel."""
    noise = np.random.default_rng(width * 1000 + height).integers(0, 96, (height, width, 3))
    slope = np.linspace(0, 159, width)[None, :, None]
    return Image.fromarray((noise + slope).astype(np.uint8)).convert(mode)


def blob(width: int, height: int, box: tuple[int, int, int, int] | None = None) -> Image.Image:
    """A mask with a grey rim."""
    mask = Image.new("L", (width, height))
    left, top, right, bottom = box or (width // 4, height // 3, width // 2, height // 2)
    ImageDraw.Draw(mask).ellipse((left - 2, top - 2, right + 2, bottom + 2), fill=90)
    ImageDraw.Draw(mask).ellipse((left, top, right, bottom), fill=255)
    return mask


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def read(image: Image.Image, name: str = "image.png") -> Picture:
    return read_picture(encoded(image), name)


@pytest.mark.parametrize("name", FORMATS)
def test_arrays_of_every_format_equal_those_of_diffusers(name: str, tmp_path: Path) -> None:
    mode, kind, options = FORMATS[name]
    if kind == "AVIF" and "avif" not in features.get_supported_modules():
        pytest.skip("this Pillow has no AVIF")
    path = tmp_path / name
    for size, drawn in SIZES:
        path.write_bytes(encoded(scene(*size, mode), kind, **options))
        picture = read_picture(path)
        assert (picture.size, picture.transparent, picture.notes) == (size, False, ())
        assert picture.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        theirs = load_image(str(path))
        width, height = drawn
        image = VaeImageProcessor().preprocess(theirs, height=height, width=width)
        assert np.array_equal(image_array(picture.decoded(), width, height), image.numpy())
        hints = VaeImageProcessor(do_convert_rgb=True, do_normalize=False)
        hint = hints.preprocess(theirs, height=height, width=width)
        assert np.array_equal(hint_array(picture.decoded(), width, height), hint.numpy())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_is_upright(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    for kind in "JPEG", "PNG", "WEBP":
        path = tmp_path / kind
        path.write_bytes(encoded(scene(40, 24), kind, exif=exif))
        picture = read_picture(path)
        theirs = load_image(str(path))
        assert picture.size == theirs.size == ((40, 24) if orientation < 5 else (24, 40))
        assert np.array_equal(np.asarray(picture.decoded()), np.asarray(theirs))
    as_png = np.asarray(read_picture(tmp_path / "PNG").decoded())
    for options in (
        {},
        {"compression": "tiff_lzw"},
    ):  # Pillow itself turns these, some versions twice
        tiff = encoded(scene(40, 24), "TIFF", exif=exif, **options)
        assert np.array_equal(np.asarray(read_picture(tiff).decoded()), as_png)


@pytest.mark.parametrize("orientation", [0, 9, 200])
def test_an_orientation_that_is_none_changes_nothing(orientation: Any) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    picture = read_picture(encoded(scene(40, 24), "JPEG", exif=exif), "photo.jpg")
    assert picture.size == (40, 24)


def test_a_grey_hint_has_one_channel_where_an_adapter_reads_one() -> None:
    grey = scene(50, 30, "L")
    hint = hint_array(read(grey).decoded(), 32, 64, channels=1)
    theirs = np.asarray(grey.resize((32, 64), Image.Resampling.LANCZOS), np.float32) / 255
    assert np.array_equal(hint, theirs[None, None])


@pytest.mark.parametrize(
    ("sixteen", "eight"), [(0, 0), (128, 0), (129, 1), (257, 1), (32896, 128), (65535, 255)]
)
def test_16_bits_become_the_nearest_of_8(sixteen: int, eight: int) -> None:
    values = np.full((5, 4), sixteen, np.uint16)
    for raw in (
        encoded(Image.fromarray(values)),
        encoded(Image.fromarray(values), "TIFF"),
        b"P5 4 5 65535\n" + values.astype(">u2").tobytes(),
    ):
        found = np.asarray(read_picture(raw).decoded())
        assert found.shape == (5, 4, 3)
        assert np.all(found == eight)


def test_floats_are_0_to_1(tmp_path: Path) -> None:
    values = np.array([[0, 0.25, 1]], np.float32)
    picture = read_picture(encoded(Image.fromarray(values), "TIFF"))
    assert np.asarray(picture.decoded())[0, :, 0].tolist() == [0, 64, 255]
    for bad, said in (
        (np.nan, "no numbers"),
        (np.inf, "no numbers"),
        (-np.inf, "no numbers"),
        (1.5, "0 to 1.5: expected 0 to 1"),
        (-0.5, "-0.5 to 1"),
    ):
        values[0, 1] = bad
        with pytest.raises(InputError, match=said):
            read_picture(encoded(Image.fromarray(values), "TIFF"))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "palette", "colour key"])
def test_what_is_transparent_lies_on_white_and_is_a_hole(mode: str) -> None:
    opaque = np.asarray(scene(16, 8)).copy()
    opaque[0, 0] = 1, 2, 3
    alpha = np.full((8, 16), 255, np.uint8)
    alpha[2:5, 3:9] = 0
    image = Image.fromarray(np.dstack([opaque, alpha]))
    if mode in ("RGBA", "LA"):
        raw = encoded(image.convert(mode))
    else:
        flat = np.where(alpha[..., None] == 0, np.uint8(7), np.maximum(opaque, 8))
        grey = Image.fromarray(flat[..., 0])
        raw = encoded(grey.convert("P") if mode == "palette" else grey, transparency=7)
    picture = read_picture(raw)
    assert picture.transparent
    assert np.all(np.asarray(picture.decoded())[2:5, 3:9] == 255)
    assert np.array_equal(np.asarray(picture.hole()), 255 - alpha)


def test_an_opaque_alpha_channel_is_none() -> None:
    picture = read(scene(9, 9, "RGBA"), "opaque.png")
    assert not picture.transparent
    with pytest.raises(InputError, match=r"^opaque\.png isn't transparent anywhere"):
        picture.hole()


def test_a_mask_with_transparency() -> None:
    strokes = Image.new("RGBA", (10, 10), (255, 255, 255, 0))
    strokes.paste((250, 250, 250, 255), (2, 2, 5, 5))
    found = np.asarray(read(strokes).mask())
    assert found[3, 3] == 250
    assert found.astype(bool).sum() == 9

    cut = scene(10, 10, "RGBA")
    cut.paste((0, 0, 0, 0), (2, 2, 5, 5))
    found = np.asarray(read(cut).mask())
    assert found[3, 3] == 255
    assert found.astype(bool).sum() == 9


def test_of_several_frames_the_first_is_taken() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    for kind in "GIF", "PNG", "WEBP", "TIFF":
        options = {"lossless": True} if kind == "WEBP" else {}
        raw = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        picture = read_picture(raw, "moving")
        assert picture.notes == ("moving has several frames: the first is taken",)
        assert picture.decoded().getpixel((4, 4)) == (255, 0, 0)


def test_a_phones_jpeg_with_others_behind_it_is_a_photo() -> None:
    raw = encoded(scene(16, 16), "MPO", save_all=True, append_images=[scene(8, 8)])
    picture = read_picture(raw)
    assert (picture.size, picture.notes) == ((16, 16), ())


def test_a_large_jpeg_is_halved_while_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(pictures._LIMITS, "JPEG", 1000)
    picture = read_picture(encoded(scene(60, 40), "JPEG"), "photo.jpg")
    assert picture.size == (30, 20)
    assert picture.notes == ("photo.jpg has 60x40 pixels: it is read with 30x20",)
    assert read_picture(encoded(scene(100, 120), "JPEG")).size == (25, 30)
    with pytest.raises(InputError, match="60x40 pixels, more than"):
        read_picture(encoded(scene(60, 40), "JPEG", progressive=True))
    apart = bytearray(encoded(scene(60, 40), "JPEG"))
    apart[apart.index(b"\xff\xda") + 4] = 1  # channel in its first scan
    with pytest.raises(InputError, match="60x40 pixels, more than"):
        read_picture(bytes(apart))


def test_sizes_follow_the_image() -> None:
    assert own_size(read(scene(100, 71)), 8, 96 * 64) == (96, 64)
    assert own_size(read(scene(64, 64)), 64, 64 * 64) == (64, 64)
    with pytest.raises(InputError, match=r"image\.png has 100x63 pixels, less than the 64x64"):
        own_size(read(scene(100, 63)), 64, 512 * 512)


@pytest.mark.parametrize(
    ("size", "multiple", "drawn"),
    [
        ((4000, 3000), 64, (576, 448)),
        ((3000, 4000), 8, (440, 592)),
        ((520, 520), 8, (512, 512)),
        ((511, 600), 8, (472, 552)),
        ((20_000, 100), 64, (7232, 64)),
    ],
)
def test_a_larger_image_keeps_its_shape(
    size: tuple[int, int], multiple: int, drawn: tuple[int, int]
) -> None:
    photo = replace(read(scene(8, 8), "photo.png"), width=size[0], height=size[1])
    assert own_size(photo, multiple, 512 * 512) == drawn
    told = f"photo.png has {size[0]}x{size[1]} pixels and is drawn with {drawn[0]}x{drawn[1]}"
    assert (told in (shrunk(photo, *drawn) or "")) == (size[0] > 600)


def test_a_picture_that_is_stretched_is_told() -> None:
    photo = read(scene(100, 75), "photo.png")
    for width, height in (96, 72), (64, 48), (64, 46), (400, 304):
        assert stretched(photo, width, height) is None
    told = "photo.png has 100x75 pixels and is stretched to 64x64: give a --size of its shape"
    assert str(stretched(photo, 64, 64)).startswith(told)
    assert stretched(photo, 128, 64)


def test_pictures_of_the_same_bytes_are_equal(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(encoded(scene(8, 8)))
    first, second = read_picture(tmp_path / "a"), read_picture(encoded(scene(8, 8)))
    assert first == second
    assert len({first, second}) == 1
    assert first != read(scene(8, 9))
    with (tmp_path / "a").open("rb") as file:
        assert read_picture(file) == first


# --- masks ----------------------------------------------------------------------------------------

MASKS = VaeImageProcessor(do_normalize=False, do_binarize=True, do_convert_grayscale=True)


@pytest.mark.parametrize(("size", "drawn"), SIZES)
def test_masks_equal_those_of_diffusers(size: tuple[int, int], drawn: tuple[int, int]) -> None:
    width, height = drawn
    for mask in blob(*size), scene(*size, "L"):
        theirs = MASKS.preprocess(mask, height=height, width=width)
        ours = mask_array(read(mask).mask(), width, height)
        assert np.array_equal(ours, theirs.numpy())
        image = VaeImageProcessor().preprocess(scene(*size), height=height, width=width)
        assert np.array_equal(masked_image(image.numpy(), ours), (image * (theirs < 0.5)).numpy())
        for rows, columns in (height // 8, width // 8), (height // 2, width // 4), (7, 5):
            latents = torch.nn.functional.interpolate(theirs, (rows, columns))
            assert np.array_equal(latent_mask(ours, rows, columns), latents.numpy())


BOXES = [
    (30, 30, 50, 44),
    (0, 0, 6, 60),
    (90, 2, 99, 9),
    (10, 70, 95, 79),
    (0, 0, 99, 79),
    (44, 3, 52, 77),
]


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("padding", [0, 7, 200])
@pytest.mark.parametrize("drawn", [(64, 64), (128, 64), (64, 136)])
def test_the_masks_surroundings_are_drawn_as_by_diffusers(
    box: tuple[int, int, int, int],
    padding: int,
    drawn: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pictures, "_BAND", 7)
    width, height = drawn
    mask, image = blob(100, 80, box), scene(100, 80)
    mask_file, image_file = read(mask), read(image)
    for blur in 0, 4:
        if blur:
            mask = VaeImageProcessor.blur(mask, blur)
        region = VaeImageProcessor.get_crop_region(mask, width, height, pad=padding)
        assert crop_box(mask, width, height, padding) == region
        both = painting(image_file, mask_file, width, height, blur, padding)
        assert both.box == region
        size = {"height": height, "width": width, "crops_coords": region, "resize_mode": "fill"}
        pixels, painted = both.arrays()
        assert np.array_equal(pixels, VaeImageProcessor().preprocess(image, **size).numpy())
        assert np.array_equal(painted, MASKS.preprocess(mask, **size).numpy())
        made = scene(width, height)
        theirs = VaeImageProcessor().apply_overlay(mask, image, made, region)
        ours = both.overlaid(made)
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))
        outside = np.asarray(mask) == 0
        assert np.array_equal(np.asarray(ours)[outside], np.asarray(image)[outside])


def test_without_padding_the_whole_image_is_drawn_and_laid_below(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mask, image, made = blob(100, 80), scene(100, 80), scene(100, 80).rotate(180)
    monkeypatch.setattr(pictures, "_BAND", 33)
    both = painting(read(image), read(mask), 100, 80, blur=3)
    blurred = VaeImageProcessor.blur(mask, 3)
    theirs = VaeImageProcessor().apply_overlay(blurred, image, made)
    assert np.array_equal(np.asarray(both.overlaid(made)), np.asarray(theirs))
    other = both.overlaid(scene(64, 64))
    assert other.size == image.size
    outside = np.asarray(blurred) == 0
    assert np.array_equal(np.asarray(other)[outside], np.asarray(image)[outside])


def test_a_mask_of_another_size_is_scaled_and_of_another_shape_refused() -> None:
    image = read(scene(100, 80), "photo.png")
    small = painting(image, read(blob(50, 40), "mask.png"), 64, 64)
    assert small.mask.size == (100, 80)
    assert small.notes == ("mask.png is scaled from 50x40 to the 100x80 pixels of photo.png",)
    assert painting(image, read(blob(33, 26)), 64, 64).mask.size == (100, 80)  # 26.4
    for width, height in (80, 100), (100, 82), (64, 64), (2000, 500):
        with pytest.raises(InputError, match="a mask has the shape of its image") as caught:
            painting(image, read(blob(width, height), "mask.png"), 64, 64)
        assert f"mask.png has {width}x{height} pixels and photo.png 100x80" in str(caught.value)


def test_a_mask_with_nothing_to_paint_is_refused() -> None:
    image = read(scene(100, 80))
    for level in 0, 127:
        with pytest.raises(InputError, match=r"^mask\.png has no white in it"):
            painting(image, read(Image.new("L", (100, 80), level), "mask.png"), 64, 64)
    dot = Image.new("L", (100, 80))
    dot.putpixel((50, 40), 255)
    assert painting(image, read(dot), 100, 80).arrays()[1].sum() == 1
    with pytest.raises(InputError, match="no white left, blurred and in 16x16 pixels"):
        painting(image, read(dot), 16, 16).arrays()


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_an_image_is_its_own_mask_where_it_is_transparent(mode: str) -> None:
    image = scene(100, 80, mode)
    image.putalpha(Image.eval(blob(100, 80), lambda value: 255 - value))
    both = painting(read(image, "a.png"), read(image, "b.png"), 64, 64)
    assert np.array_equal(np.asarray(both.mask), np.asarray(blob(100, 80)))
    with pytest.raises(InputError, match="isn't transparent anywhere"):
        painting(read(scene(10, 10)), read(scene(10, 10)), 64, 64)


@pytest.mark.parametrize("blur", [-1, 257, float("nan"), float("inf")])
def test_blur_is_bounded(blur: float) -> None:
    with pytest.raises(UsageError, match="mask blur must be 0 to 256 pixels"):
        painting(read(scene(8, 8)), read(blob(8, 8)), 8, 8, blur=blur)


@pytest.mark.parametrize("padding", [-1, 1 << 15])
def test_padding_is_bounded(padding: int) -> None:
    with pytest.raises(UsageError, match="mask padding must be 0 to 16384 pixels"):
        painting(read(scene(8, 8)), read(blob(8, 8)), 8, 8, padding=padding)
