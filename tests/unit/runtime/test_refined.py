"""A base model's bundle and a refiner's: latents are handed over, and one is in memory at a time.

Both are miniatures here; tests/e2e/test_same_images.py compares with diffusers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from edgesd.engines.bundle import update_manifest
from edgesd.errors import UsageError
from edgesd.runtime.bundle import Bundle, open_bundle
from edgesd.runtime.cut import first_of_refiner, steps_of_base
from edgesd.runtime.denoise import Step
from edgesd.runtime.memory import MemoryMode
from edgesd.runtime.pipeline import Pipeline
from edgesd.runtime.refined import Refined
from edgesd.runtime.requests import Request
from edgesd.runtime.schedulers import create_scheduler
from edgesd.runtime.settings import Settings
from tests.support import (
    assert_refused,
    lora_file,
    pipeline_spec,
    random_picture,
    run_cli,
    with_lora_slot,
    with_other_decoder,
    write_bundle,
)

REQUESTS = [Request("a red apple", 3, num_inference_steps=10), Request("a cat", 4, None, 10)]


def changed(bundle: Bundle, **pipeline: Any) -> Bundle:
    """A bundle folder whose manifest says something else of its pipeline."""
    manifest = bundle.manifest
    spec = msgspec.structs.replace(manifest.pipeline, **pipeline)
    update_manifest(bundle.path, msgspec.structs.replace(manifest, pipeline=spec), [])
    return open_bundle(bundle.path)


@pytest.fixture(scope="module")
def refiner(miniature: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A refiner with another decoder than the base model's."""
    bundle = with_other_decoder(miniature, tmp_path_factory.mktemp("refiner") / "bundle")
    wiring = msgspec.structs.replace(bundle.manifest.pipeline.wiring, tasks=("refine",))
    return changed(bundle, wiring=wiring, source="refiner", source_sha256="1" * 64)


@pytest.fixture
def opened(miniature: Bundle, refiner: Bundle) -> Iterator[Refined]:
    with Pipeline(miniature) as base, Pipeline(refiner) as second:
        yield Refined(base, second)


def test_the_same_model_twice_makes_the_image_of_one(opened: Refined, miniature: Bundle) -> None:
    """DDIM remembers nothing, and both have the same denoiser: only the decoder differs."""
    latents: list[Any] = []
    with Pipeline(miniature) as alone:
        alone.generate(REQUESTS, lambda step: latents.append(step.latents))
    for end in (0.8, 0.3):
        steps: list[Step] = []
        requests = [opened.complete(replace(one, denoising_end=end)) for one in REQUESTS]
        images = opened.generate(requests, steps.append)
        assert [(step.index, step.count) for step in steps] == [(i, 10) for i in range(10)]
        np.testing.assert_allclose(steps[-1].latents, latents[-1], atol=1e-6)
        wanted = opened.refiner.decode(latents[-1])
        assert [one.tobytes() for one in images] == [one.tobytes() for one in wanted]


@pytest.mark.parametrize("memory", ["fast", "balanced", "stream"])
def test_one_of_both_is_in_memory_at_a_time(
    memory: MemoryMode, miniature: Bundle, refiner: Bundle
) -> None:
    settings = Settings(memory=memory)
    with Pipeline(miniature, settings) as base, Pipeline(refiner, settings) as second:
        both = Refined(base, second)
        request = both.complete(REQUESTS[0])
        seen = []

        def watch(step: Step) -> None:
            both.decode(step.latents)
            seen.append((bool(base.loaded), bool(second.loaded)))

        both.fit(request, 1, previews=True)
        both.generate([request], watch, previews=True)
        assert seen == [(True, False)] * 8 + [(False, True)] * 2
        assert not base.loaded and not second.loaded
        assert {"unet", "refiner.unet"} <= both.timings.run.keys()
        assert len(both.timings.steps) == 10


@pytest.mark.parametrize(
    ("end", "steps", "base", "first"), [(0.8, 10, 8, 8), (0.5, 7, 3, 3), (0.05, 50, 2, 2)]
)
def test_timesteps_are_cut_as_diffusers_cuts_them(
    end: float, steps: int, base: int, first: int
) -> None:
    spec = pipeline_spec()
    scheduler = create_scheduler("ddim", spec.scheduler.config)
    scheduler.set_timesteps(steps)
    assert base == len([t for t in scheduler.timesteps if t >= round(1000 - end * 1000)])
    assert (steps_of_base(spec, scheduler, end), first_of_refiner(spec, scheduler, end)) == (
        base,
        first,
    )


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request("a", 1, num_inference_steps=1), "leaves no step of 1 to the base model"),
        (Request("a", 1, scheduler="dpmpp-2m"), "denoising_end 0.8 leaves no step of 4 to the ref"),
        (Request("a", 1, num_inference_steps=2, denoising_end=0.01), "to the base model"),
        (Request("a", 1, denoising_end=1.0), "must be between 0 and 1"),
        (Request("a", 1, denoising_end=float("nan")), "must be between 0 and 1"),
    ],
)
def test_where_one_of_both_has_nothing_to_do(
    request_: Request, words: str, opened: Refined
) -> None:
    with pytest.raises(UsageError, match=words):
        opened.complete(request_)


def test_samplers_that_scale_latents_differently_are_refused(
    miniature: Bundle, refiner: Bundle, tmp_path: Path
) -> None:
    other = msgspec.structs.replace(refiner.manifest.pipeline.scheduler, name="euler")
    second = changed(refiner, scheduler=other)
    try:
        with Pipeline(miniature) as base, Pipeline(second) as last:
            both = Refined(base, last)
            with pytest.raises(UsageError, match="samplers ddim and euler scale latents"):
                both.complete(REQUESTS[0])
            both.complete(Request("a", 1, num_inference_steps=10, scheduler="euler"))
        twice = msgspec.structs.replace(other, name="heun")  # more timesteps than the refiner has
        first = changed(with_other_decoder(miniature, tmp_path / "base"), scheduler=twice)
        with Pipeline(first) as base, Pipeline(second) as last:
            Refined(base, last).complete(REQUESTS[0])
    finally:
        changed(second, scheduler=refiner.manifest.pipeline.scheduler)


def test_a_refiner_goes_on_and_does_not_begin(opened: Refined, miniature: Bundle) -> None:
    with pytest.raises(UsageError, match="is a refiner, which finishes what a base model began"):
        Refined(opened.refiner, opened.refiner)
    with pytest.raises(UsageError, match="is no refiner"):
        Refined(opened.base, opened.base)
    with Pipeline(miniature) as pipeline:
        with pytest.raises(UsageError, match="leaves the last steps to a refiner"):
            pipeline.generate([Request("a", 1, denoising_end=0.8)])
        with pytest.raises(UsageError, match="this pipeline is no refiner"):
            pipeline.generate([Request("a", 1)], begun=np.zeros((1, 4, 8, 8), np.float32))
        with pytest.raises(UsageError, match="give denoising_end"):
            pipeline.begin([Request("a", 1)])


class TestCommand:
    def test_images_by_both(self, miniature: Bundle, refiner: Bundle, tmp_path: Path) -> None:
        first, second = tmp_path / "first.png", tmp_path / "second.png"
        both = miniature.path, "--refiner", refiner.path
        made = run_cli(
            "generate", *both, "-p", "a red apple", "--seed", 3, "--steps", 10, "-o", first
        )
        assert made.code == 0, made.err
        texts = Image.open(first).text  # type: ignore[attr-defined]
        assert texts["denoising_end"] == "0.8"
        assert texts["refiner_model_sha256"] == "1" * 64
        again = run_cli("generate", *both, "--like", first, "-o", second)
        assert again.code == 0 and "was made by another bundle" not in again.err, again.err
        assert Image.open(second).tobytes() == Image.open(first).tobytes()
        assert_refused(
            run_cli("generate", miniature.path, "--like", first, "-o", second),
            "was finished by a refiner (miniature): give --refiner BUNDLE",
        )

    def test_an_image_is_begun_with_and_finished(self, refiner: Bundle, tmp_path: Path) -> None:
        base = write_bundle(tmp_path / "base", images=True)
        photo, first, second = (tmp_path / f"{name}.png" for name in ("photo", "first", "second"))
        photo.write_bytes(random_picture(1, (24, 24)).raw)
        asked = "generate", base.path, "--refiner", refiner.path, "--any-machine"
        given = "--image", photo, "--strength", 0.5, "-p", "a", "--steps", 10
        made = run_cli(*asked, *given, "-o", first)
        assert made.code == 0, made.err
        again = run_cli(*asked, "--like", first, "--image", photo, "-o", second)
        assert again.code == 0, again.err
        assert Image.open(second).tobytes() == Image.open(first).tobytes()
        assert_refused(run_cli(*asked, *given, "--mask", photo, "-o", first), "--mask out")
        assert_refused(run_cli(*asked, *given, "--strength", 0.1, "-o", first), "--strength")

    def test_loras_are_of_the_base_model(
        self, miniature: Bundle, refiner: Bundle, tmp_path: Path
    ) -> None:
        base, style = with_lora_slot(miniature, tmp_path / "base"), lora_file(tmp_path / "a.lora")
        other = with_lora_slot(refiner, tmp_path / "refiner")
        out, made = tmp_path / "image.png", []
        for second, loras in (
            (refiner, ()),
            (refiner, ("--lora", style)),
            (other, ("--lora", style)),
        ):
            asked = base.path, "--refiner", second.path, "-p", "a", "--seed", 3, "--steps", 10
            outcome = run_cli("generate", *asked, *loras, "-o", out)
            assert outcome.code == 0, outcome.err
            made.append(Image.open(out).tobytes())
            assert ("loras" in Image.open(out).text) == bool(loras)  # type: ignore[attr-defined]
        assert made[0] != made[1] == made[2]
        asked = miniature.path, "--refiner", other.path, "-p", "a", "--lora", style, "-o", out
        assert_refused(run_cli("generate", *asked), "miniature has no place for LoRAs")

    def test_what_each_of_both_is_for(
        self, miniature: Bundle, refiner: Bundle, tmp_path: Path
    ) -> None:
        asked = "-p", "a", "-o", tmp_path / "image.png"
        assert_refused(
            run_cli("generate", refiner.path, *asked),
            "is a refiner, which finishes what a base model began: edgesd generate BASE --refiner",
        )
        assert_refused(
            run_cli("generate", miniature.path, "--refiner", miniature.path, *asked),
            "is no refiner",
        )
        assert_refused(
            run_cli("generate", miniature.path, "--denoising-end", "0.5", *asked),
            "--denoising-end goes with --refiner",
        )
        for end in ("0", "1", "nan", "-1"):
            both = "--refiner", refiner.path, f"--denoising-end={end}"
            assert_refused(run_cli("generate", miniature.path, *both, *asked), "--denoising-end")
        assert_refused(
            run_cli("generate", miniature.path, "--refiner", tmp_path / "none", *asked), "none"
        )

    def test_a_refiner_that_was_changed_is_not_run(
        self, miniature: Bundle, refiner: Bundle, tmp_path: Path
    ) -> None:
        damaged = with_other_decoder(refiner, tmp_path / "damaged")
        weights = damaged.path / "unet" / "weights.bin"
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
        out = tmp_path / "image.png"
        asked = "--refiner", damaged.path, "-p", "a", "--steps", 10, "-o", out
        assert_refused(run_cli("generate", miniature.path, *asked), "unet/weights.bin")
        assert not out.exists()
