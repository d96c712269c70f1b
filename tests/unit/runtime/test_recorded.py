"""An image says how it was made, and is made again; what other programs wrote is used as far as it
goes; a hostile file costs one line."""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from edgesd.errors import InputError
from edgesd.runtime.bundle import Bundle
from edgesd.runtime.hints import HintOptions
from edgesd.runtime.pictures import Picture
from edgesd.runtime.recorded import Recorded, RecordedControl, recorded, texts_of
from edgesd.runtime.requests import CompleteMicro, CompleteRequest, Completion, Control, Request
from tests.support import assert_refused, pipeline_spec, run_cli, write_bundle

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def write_png(path: Path, **texts: str) -> Path:
    info = PngInfo()
    for key, value in texts.items():
        info.add_itxt(key, value)
    Image.new("RGB", (4, 4)).save(path, pnginfo=info)
    return path


def chunk(kind: bytes, content: bytes) -> bytes:
    crc = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)


def header(width: int = 4, height: int = 4) -> bytes:
    return SIGNATURE + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))


def same_again(bundle: Bundle, folder: Path, *options: object) -> None:
    first, second = folder / "first.png", folder / "second.png"
    assert run_cli("generate", bundle.path, *options, "-o", first).code == 0
    again = run_cli("generate", bundle.path, "--like", first, "-o", second)
    assert again.code == 0 and "another bundle" not in again.err, again.err
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        ("-p", "a red apple"),
        ("-p", "a (red:1.5) cat BREAK blue", "--prompt-syntax", "a1111", "--negative", "(a)"),
        ("-p", ' leading,\nlines: "quoted" été 🍎', "--negative", "", "--seed", 2**64 - 1),
        ("-p", "a cat", "--seed", 7, "--steps", 3, "--size", "20x12", "--guidance-rescale", 0.7),
        ("-p", "a cat", "--guidance", 2.123456789012),
        ("-p", "a cat", "--scheduler", "euler-a", "--guidance", "-1.5"),
        ("-p", "", "--seed", 1),
    ],
    ids=range(7),
)
def test_the_same_image_again(
    options: tuple[object, ...], miniature: Bundle, tmp_path: Path
) -> None:
    same_again(miniature, tmp_path, *options)


def test_options_change_what_the_image_says(miniature: Bundle, tmp_path: Path) -> None:
    first, second = tmp_path / "first.png", tmp_path / "second.png"
    made = ("--seed", 5, "--steps", 3, "--negative", "blue")
    assert run_cli("generate", miniature.path, "-p", "a cat", *made, "-o", first).code == 0
    run_cli("generate", miniature.path, "--like", first, "-p", "red", "--seed", 6, "-o", second)
    assert Image.open(second).text.items() >= {  # type: ignore[attr-defined]
        "prompt": "red", "seed": "6", "steps": "3", "negative_prompt": "blue",
    }.items()  # fmt: skip


def test_options_that_are_defaults_count_too(miniature: Bundle, tmp_path: Path) -> None:
    first, second = tmp_path / "first.png", tmp_path / "second.png"
    made = ("-p", "a (cat)", "--prompt-syntax", "a1111", "--guidance-rescale", 0.7)
    assert run_cli("generate", miniature.path, *made, "-o", first).code == 0
    plain = ("--prompt-syntax", "plain", "--guidance-rescale", 0)
    assert run_cli("generate", miniature.path, "--like", first, *plain, "-o", second).code == 0
    texts = Image.open(second).text  # type: ignore[attr-defined]
    assert not {"prompt_syntax", "guidance_rescale"} & texts.keys()


def test_another_bundle_is_told(miniature: Bundle, tmp_path: Path) -> None:
    other = write_bundle(tmp_path / "other", "raspberry-pi-5", "aarch64")
    image = tmp_path / "a.png"
    assert run_cli("generate", miniature.path, "-p", "a cat", "-o", image).code == 0
    made = run_cli(
        "generate", other.path, "--any-machine", "--like", image, "-o", tmp_path / "b.png"
    )
    assert made.code == 0
    assert f"another bundle (target {miniature.manifest.target})" in made.err


def test_an_image_of_the_web_ui(miniature: Bundle, tmp_path: Path) -> None:
    text = (
        "a (red:1.5) cat <lora:x:1>\nNegative prompt: blue\n"
        "Steps: 3, Sampler: Euler a, CFG scale: 2, Seed: 5, Size: 20x12, Clip skip: 2, RNG: CPU"
    )
    image = write_png(tmp_path / "theirs.png", parameters=text)
    made = run_cli("generate", miniature.path, "--like", image, "-o", tmp_path / "ours.png")
    assert made.code == 0
    for words in ("not used: Clip skip", "<lora:x:1> is left out"):
        assert words in made.err
    asked = (
        "-p", "a (red:1.5) cat ", "--negative", "blue", "--prompt-syntax", "a1111", "--steps", 3,
        "--scheduler", "euler-a", "--guidance", 2, "--seed", 5, "--size", "20x12",
    )  # fmt: skip
    assert run_cli("generate", miniature.path, *asked, "-o", tmp_path / "asked.png").code == 0
    ours, wanted = (Image.open(tmp_path / name) for name in ("ours.png", "asked.png"))
    assert ours.tobytes() == wanted.tobytes()


def test_values_of_other_programs_that_do_not_fit_are_left_out(tmp_path: Path) -> None:
    text = "a cat\nSteps: 20000, Sampler: Euler, CFG scale: nan, Seed: -1, Size: 5x0"
    found = recorded(write_png(tmp_path / "a.png", parameters=text))
    assert found.values.keys() == {"prompt", "negative_prompt", "syntax", "scheduler"}
    for word in ("steps '20000'", "guidance_scale 'nan'", "seed '-1'", "size '5x0'"):
        assert any(f"{word} isn't used" in remark for remark in found.remarks)


OWN = {"Software": "edgesd 0.1", "prompt": "a", "seed": "1"}


@pytest.mark.parametrize(
    ("key", "values"),
    {
        "seed": ["-1", str(2**64), "1.5", "", "٣", "9" * 5000],
        "steps": ["0", "1001", "x"],
        "guidance_scale": ["nan", "inf", "1e9", ""],
        "size": ["0x4", "16385x4", "4", "4x4x4", "ax4"],
        "prompt_syntax": ["A1111", ""],
        "guidance_rescale": ["-0.1", "1.1"],
        "true_cfg_scale": ["0.9", "nan", "1e9"],
        "original_size": ["0x1", "4"],
        "negative_crop": ["-1x4"],
        "aesthetic_score": ["nan", "1e4"],
    }.items(),
)
def test_values_out_of_range_are_refused(key: str, values: list[str], tmp_path: Path) -> None:
    for number, value in enumerate(values):
        path = write_png(tmp_path / f"{number}.png", **{**OWN, key: value})
        with pytest.raises(InputError, match=f"says {key} .*expected "):
            recorded(path)


def test_files_that_say_nothing(miniature: Bundle, tmp_path: Path) -> None:
    pixels = chunk(b"IDAT", zlib.compress(bytes(13 * 4))) + chunk(b"IEND", b"")
    bomb = chunk(b"zTXt", b"parameters\0\0" + zlib.compress(bytes(1 << 26)))
    files = {
        "empty": b"",
        "text": b"Steps: 1",
        "jpeg": b"\xff\xd8\xff\xe0" + bytes(100),
        "signature": SIGNATURE,
        "header": header(),
        "no text": header() + pixels,
        "bomb": header() + bomb + pixels,
        "large text": header() + chunk(b"tEXt", b"parameters\0" + b"a" * 300_000) + pixels,
        "cut text": header() + struct.pack(">I", 1 << 30) + b"tEXtparameters\0" + b"a" * 1000,
        "long chunk": header() + struct.pack(">I", 0xFFFFFFFF) + b"tEXt",
        "crc": header() + chunk(b"tEXt", b"parameters\0a")[:-4] + b"\0\0\0\0" + pixels,
        "huge": header(2**31 - 1, 2**31 - 1) + pixels,
        "no prompt": header()
        + chunk(b"tEXt", b"Software\0edgesd 0.1")
        + chunk(b"tEXt", b"seed\x001")
        + pixels,
        "bad utf-8": header() + chunk(b"iTXt", b"parameters\0\0\0\0\0\xff\xfe") + pixels,
    }
    for name, content in files.items():
        path = tmp_path / f"{name}.png"
        path.write_bytes(content)
        out = tmp_path / "out.png"
        assert_refused(run_cli("generate", miniature.path, "--like", path, "-o", out), name)
        assert not out.exists()


def test_the_text_of_a_large_picture_is_read(tmp_path: Path) -> None:
    """Its pixels aren't."""
    text = b"parameters\0a cat\nSteps: 3, Sampler: Euler, CFG scale: 2, Seed: 5"
    path = tmp_path / "large.png"
    path.write_bytes(header(12_000, 12_000) + chunk(b"tEXt", text) + chunk(b"IDAT", b"x"))
    assert recorded(path).values["seed"] == 5


PICTURE = Picture("a.png", "a" * 64, 8, 8, False, (), 0, b"")


def test_every_value_of_a_request_is_written(miniature: Bundle, tmp_path: Path) -> None:
    """None can be added to requests without a text for it."""
    request = Completion(pipeline_spec()).complete(Request("a", 1))
    other = CompleteRequest(
        prompt="b",
        seed=9,
        negative_prompt="c",
        num_inference_steps=7,
        guidance_scale=1.25,
        height=32,
        width=24,
        scheduler="euler",
        prompt_2="b",
        negative_prompt_2="d",
        syntax="a1111",
        guidance_rescale=0.3,
        true_cfg_scale=4.5,
        sigmas=(14.5, 3.25, 0.0),
        timesteps=(999, 499),
        eta=0.5,
        micro=CompleteMicro((640, 480), (3, 7), (320, 240), 6.5),
        negative_micro=CompleteMicro((64, 48), (1, 2), (32, 24), 2.25),
        denoising_end=0.8,
        image=PICTURE,
        mask=replace(PICTURE, sha256="b" * 64),
        strength=0.4,
        mask_blur=4.5,
        mask_padding=32,
        controls=(
            Control(
                replace(PICTURE, sha256="c" * 64),
                "sketch",
                0.5,
                0.25,
                0.75,
                options=HintOptions(0.25, 1e3, "dark", 5),
            ),
        ),
        guess_mode=True,
    )
    assert all(getattr(request, name) != value for name, value in vars(other).items())
    texts = texts_of(miniature.manifest, other)
    known = recorded(write_png(tmp_path / "a.png", **texts))
    values, pictures = dict(known.values), {"image": other.image, "mask": other.mask}
    assert known.pictures == {"image": "a" * 64, "mask": "b" * 64}
    (control,) = other.controls
    said = RecordedControl("sketch", "c" * 64, 0.5, 0.25, 0.75, "ready", control.options)
    assert known.controls == (said,)
    for name in ("micro", "negative_micro"):
        values[name] = CompleteMicro(**vars(values[name]))
    assert CompleteRequest(**values, **pictures, controls=other.controls) == other
    spread = texts_of(miniature.manifest, replace(other, sigmas="karras", scheduler="dpmpp-2m"))
    assert recorded(write_png(tmp_path / "b.png", **spread)).values["sigmas"] == "karras"
    assert "Sampler: DPM++ 2M, Schedule type: Karras" in spread["parameters"]


def test_another_sampler_or_number_of_steps_has_its_own_schedule() -> None:
    values = {"prompt": "a", "scheduler": "ddim", "timesteps": (999, 499), "eta": 0.5}
    known = Recorded(values, {}, {})
    assert known.request(Request("", 1)).timesteps == (999, 499)
    found = known.request(Request("", 1, scheduler="euler"))
    assert (found.scheduler, found.timesteps, found.eta) == ("euler", None, Request("", 1).eta)
    found = known.request(Request("", 1, num_inference_steps=7))
    assert (found.num_inference_steps, found.timesteps, found.eta) == (7, None, 0.5)
    spread = Recorded({**values, "sigmas": "karras"}, {}, {})
    assert spread.request(Request("", 1, num_inference_steps=7)).sigmas == "karras"
    assert spread.request(Request("", 1, scheduler="ddim")).sigmas is None
