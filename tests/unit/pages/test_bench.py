"""The page on benchmarks: one file, complete, and harmless whatever names and prompts say."""

from __future__ import annotations

import io

import msgspec
import pytest
from jinja2 import UndefinedError
from PIL import Image

from edgesd.device.bench import BENCH_VERSION, Asked, Bench, Run, summarize
from edgesd.device.telemetry import Sample
from edgesd.pages.bench import bench_html
from edgesd.pages.page import page_bytes, render
from edgesd.spec.target import Machine
from tests.unit.pages.outline import HOSTILE, Outline, assert_stands_alone


def png(width: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, width)).save(file, "PNG")
    return file.getvalue()


def made(text: str = "plain", width: int = 64) -> Bench:
    """A benchmark of two images, with `text` wherever it may be anything."""
    runs = [
        Run(seed, start, start + 1.5, {text: 0.5}, {text: 1.25}, (0.25, 0.5))
        for seed, start in enumerate((2.0, 4.0, 6.0))
    ]
    samples = tuple(
        Sample(
            float(seconds),
            memory_used_bytes=3_000_000_000,
            process_bytes=40_000_000 + seconds,
            cpu_mhz=(1500 - seconds, 600),
            gpu_percent=10.0 * seconds,
            gpu_mhz=(300,),
            celsius={text: 40.0 + seconds},
            watts={"VDD_IN": 3.0 + seconds},
            limits=(text,) if seconds > 5 else (),
        )
        for seconds in range(9)
    )
    return Bench(
        version=BENCH_VERSION,
        edgesd=text,
        began=text,
        machine=Machine(text, text, None, 1 << 30, 4, ()),
        emulated=True,
        kernel=text,
        libraries={text: text},
        power_mode=text,
        bundle=text,
        manifest_sha256="0" * 64,
        target=text,
        backend=text,
        precision=text,
        bundle_bytes=12_300_000,
        fallbacks={text: text},
        asked=Asked(text, 1, 2, 7.5, width, width, text, 0, "stream", 1, 2, 0.5),
        summary=summarize(runs[:1], runs[1:], samples, 1.5, 56_000_000),
        warm_up=tuple(runs[:1]),
        runs=tuple(runs[1:]),
        samples=samples,
        images=(png(width), png(width)),
        host=text,
    )


def test_the_page_is_well_formed_and_needs_nothing_else() -> None:
    page = bench_html([made()])
    assert_stands_alone(page)
    assert "<script" not in page
    assert [tag for tag, _ in Outline(page).tags].count("img") == 2


def test_everything_that_was_measured_is_on_the_page() -> None:
    text = Outline(bench_html([made()])).text
    for words in (
        *("56.0 MB", "12.3 MB", "throttled", "from 6.0 s on", "weights left in their file"),
        *("2 steps of plain, guidance 7.5, one at a time, 1 to warm up", "plain is emulated"),
        *("plain: plain", "J", "W, idle", "Each step, s", "GPU load, %"),
        *("seed 1, 1.5 s", "seed 2, 1.5 s", "Shaded: images that count."),
    ):
        assert words in text, words
    assert "a step" not in text  # an emulated board's times aren't figures
    real = Outline(bench_html([msgspec.structs.replace(made(), emulated=False)])).text
    assert "a step" in real and "median of 2 images" in real


def test_text_from_outside_stays_text() -> None:
    page = bench_html([made(HOSTILE), made(HOSTILE)])
    outline = Outline(page)
    assert outline.structure() == Outline(bench_html([made(), made()])).structure()
    assert HOSTILE.replace("\u202e", "\ufffd") in outline.text and "\u202e" not in page
    assert_stands_alone(page)


def test_plots_stay_within_their_frames() -> None:
    for tag, attrs in Outline(bench_html([made()])).tags:
        if tag == "polyline":
            for point in str(attrs["points"]).split():
                x, y = map(float, point.split(","))
                assert 56 <= x <= 632 and 12 <= y <= 172
        if tag == "circle":
            assert 56 <= float(str(attrs["cx"])) <= 632 and 12 <= float(str(attrs["cy"])) <= 172


def test_several_boards_are_told_apart_and_one_without_samples_is_shown() -> None:
    without = msgspec.structs.replace(made(width=512), samples=(), host="other")
    text = Outline(bench_html([made(), without])).text
    assert "plain: times" in text and "other: times" in text
    assert "No samples were taken." in text


def test_small_images_keep_their_pixels() -> None:
    assert 'class="gallery sharp"' in bench_html([made(width=256)])
    assert 'class="gallery sharp"' not in bench_html([made(width=257)])


def test_a_name_that_the_data_lack_is_an_error() -> None:
    with pytest.raises(UndefinedError, match="'figures' is undefined"):
        render("bench.html.j2", title="t", lead="l", notices=[], boards=[])


def test_a_byte_that_is_no_text_is_replaced() -> None:
    asked = msgspec.structs.replace(made().asked, prompt="caf\udce9 \x07")
    page = page_bytes(bench_html([msgspec.structs.replace(made(), asked=asked)]))
    assert "caf? \ufffd" in page.decode()
