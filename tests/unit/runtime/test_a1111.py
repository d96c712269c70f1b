"""The `parameters` of images tell the web UI's reader what edgesd made; its own are understood."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgesd.runtime.a1111 import parameters, parsed
from edgesd.runtime.bundle import Bundle
from edgesd.runtime.requests import CompleteRequest, Completion, Request
from edgesd.runtime.schedulers import SCHEDULERS
from edgesd.runtime.syntax import escaped, segments
from edgesd.spec.pipeline import SchedulerSpec
from tests.support import pipeline_spec

OF_THE_WEB_UI = """girl with an artist's beret, blue eyes, ((eyeshadow)), (coquettish)
second line
Negative prompt: ugly, [blurry], (extra_limb:1.2)
more of it
Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 965400086, Size: 512x768, Model hash: 45dee52b"""


def complete(**values: Any) -> CompleteRequest:
    return Completion(pipeline_spec()).complete(Request(**{"prompt": "a", "seed": 1, **values}))


def test_a_text_of_the_web_ui() -> None:
    found = parsed(OF_THE_WEB_UI)
    assert found.values == {
        "prompt": "girl with an artist's beret, blue eyes, ((eyeshadow)), (coquettish)\n"
        "second line",
        "negative_prompt": "ugly, [blurry], (extra_limb:1.2)\nmore of it",
        "steps": "20",
        "scheduler": "euler-a",
        "guidance_scale": "7",
        "seed": "965400086",
        "size": "512x768",
    }
    assert found.remarks == ("its noise was made on a GPU: another image comes of the same seed",)


SETTINGS = "Steps: 20, Sampler: {}, CFG scale: 7, Seed: 1, RNG: CPU"


@pytest.mark.parametrize(
    ("settings", "scheduler", "remarks"),
    [
        (SETTINGS.format("DPM++ 2M"), "dpmpp-2m", []),
        (SETTINGS.format("DPM++ 2M Karras"), "dpmpp-2m", []),
        (SETTINGS.format("DPM++ 2M, Schedule type: Beta"), "dpmpp-2m", []),
        (
            SETTINGS.format("DPM++ 2M, Schedule type: Polyexponential"),
            "dpmpp-2m",
            ["schedule poly"],
        ),
        (SETTINGS.format("DDIM, Schedule type: Karras"), "ddim", ["schedule karras"]),
        (SETTINGS.format("DPM++ 2M, Schedule type: Automatic"), "dpmpp-2m", []),
        (SETTINGS.format("Restart"), None, ["sampler restart"]),
        (
            SETTINGS.format("LMS, Clip skip: 2, Hires upscale: 2"),
            "lms",
            ["Clip skip, Hires upscale"],
        ),
        (
            SETTINGS.format('Euler, Lora hashes: "a: 1, Seed: 5", Model: "x, \\"y\\": z"'),
            "euler",
            ["not used: Lora hashes"],
        ),
    ],
)
def test_what_is_used_and_what_is_not(
    settings: str, scheduler: str | None, remarks: list[str]
) -> None:
    found = parsed(f"a cat\n{settings}")
    assert found.values.get("scheduler") == scheduler and found.values["seed"] == "1"
    assert len(found.remarks) == len(remarks)
    for words, remark in zip(remarks, found.remarks, strict=True):
        assert words in remark


def test_a_last_line_of_few_pairs_is_the_prompt() -> None:
    found = parsed("a cat\nSteps: 20, Sampler: Euler")
    assert found.values["prompt"] == "a cat\nSteps: 20, Sampler: Euler"
    assert "no settings" in found.remarks[0]


@pytest.mark.parametrize("name", [*SCHEDULERS])
def test_every_sampler_is_written_as_it_is_read(name: str, miniature: Bundle) -> None:
    text = parameters(miniature.manifest, replace(complete(), scheduler=name))
    found = parsed(text).values["scheduler"]
    assert found == name or (found, name) == ("euler", "flow-euler")


@pytest.mark.parametrize("kind", ["karras", "exponential", "beta"])
def test_the_schedule_is_written(kind: str, miniature: Bundle) -> None:
    pipeline = miniature.manifest.pipeline
    scheduler = SchedulerSpec("euler", {f"use_{kind}_sigmas": True})
    manifest = msgspec.structs.replace(
        miniature.manifest, pipeline=msgspec.structs.replace(pipeline, scheduler=scheduler)
    )
    request = complete(scheduler="euler")
    assert f"Schedule type: {kind.title()}, " in parameters(manifest, request)
    for other in (
        replace(request, scheduler="ddim"),
        replace(request, sigmas="normal"),
        replace(request, sigmas=(9.0, 1.0, 0.0)),
    ):
        assert "Schedule type" not in parameters(manifest, other)


def test_an_image_in_the_words_of_the_web_ui(miniature: Bundle) -> None:
    manifest = msgspec.structs.replace(miniature.manifest, name="odd, name: it")
    request = complete(
        prompt="a (red) cat", negative_prompt="blue", guidance_scale=2.5, scheduler="pndm"
    )
    assert parameters(manifest, request).split("\n") == [
        r"a \(red\) cat",
        "Negative prompt: blue",
        "Steps: 4, Sampler: PLMS, CFG scale: 2.5, Seed: 1, Size: 16x16, Model hash: 0000000000, "
        'Model: "odd, name: it", RNG: CPU, Version: edgesd 0',
    ]
    weighted = complete(prompt="a (red:1.3) cat", syntax="a1111")
    assert parameters(manifest, weighted).startswith("a (red:1.3) cat\nSteps: 4")


def lines(text: str) -> str:
    """As the web UI's reader leaves a prompt."""
    return "\n".join(line.strip() for line in text.strip().split("\n"))


TEXT = st.one_of(
    st.text(st.characters(exclude_characters="\0", codec="utf-8")),
    st.text('aNB:,\n "\\()[]<>1|'),
    st.lists(
        st.sampled_from(
            [
                "Negative prompt: x",
                "  Negative prompt:",
                "Steps: 1, Seed: 2, Size: 3x4",
                "BREAK",
                "BREAD",
                "AND",
                "<lora:a:1>",
                "(a:1.3)",
                "[a|b]",
                "\n",
            ]
        )
    ).map(" ".join),
)


@given(TEXT, TEXT)
def test_any_plain_prompt_means_itself_to_the_web_ui(
    miniature: Bundle, prompt: str, negative: str
) -> None:
    request = complete(prompt=prompt, negative_prompt=negative)
    found = parsed(parameters(miniature.manifest, request))
    assert found.values["seed"] == "1" and not found.remarks
    for name, text in (("prompt", prompt), ("negative_prompt", negative)):
        read = "".join(segment.text for segment in segments(found.values[name], "a1111"))
        assert lines(read) == lines(text)
        assert {segment.weight for segment in segments(found.values[name], "a1111")} == {1.0}


@given(TEXT)
def test_any_text_is_read(text: str) -> None:
    assert "prompt" in parsed(text).values


@pytest.mark.parametrize(
    "text",
    [
        "a b: " * 50_000,
        'a b: "' * 40_000,
        "a" * 250_000,
        " " * 250_000,
        ",:" * 120_000,
        "\n" * 250_000,
        'ab: "\\' * 40_000,
        "x" * 60 + ":" + "y " * 120_000,
    ],
    ids=range(8),
)
def test_long_texts_take_linear_time(text: str) -> None:
    parsed(text)
    parsed(f"a\n{text}")
    escaped(text)


def test_the_spread_of_noise_levels_is_taken_where_the_sampler_has_it() -> None:
    for settings in ("DPM++ 2M Karras", "DPM++ 2M, Schedule type: Karras"):
        assert parsed(f"a cat\n{SETTINGS.format(settings)}").values["sigmas"] == "karras"
    assert "sigmas" not in parsed(f"a cat\n{SETTINGS.format('DDIM, Schedule type: Karras')}").values
