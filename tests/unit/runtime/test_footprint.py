"""What generation takes in memory is fitted to each request, or refused before any work."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edgesd.engines.bundle import update_manifest
from edgesd.errors import ResourceError
from edgesd.runtime import fitting, old_bundles
from edgesd.runtime import loaded as loading
from edgesd.runtime.backends import get_backend
from edgesd.runtime.backends.onnxruntime import OnnxRuntime
from edgesd.runtime.bundle import Bundle, open_bundle
from edgesd.runtime.fitting import Batch, Budget, Fitting
from edgesd.runtime.footprint import (
    Costs,
    Generation,
    Need,
    Part,
    autoencoder_in_tiles,
    computing,
    decoder_in_parts,
    encoder_in_parts,
    together,
    whole,
    with_margin,
)
from edgesd.runtime.images import make_images
from edgesd.runtime.loaded import Loaded
from edgesd.runtime.memory import MEMORY_MODES, MemoryMode
from edgesd.runtime.pipeline import Pipeline
from edgesd.runtime.requests import Request
from edgesd.runtime.settings import Settings
from edgesd.runtime.tiles import encoder_window
from edgesd.spec.bundle import Footprint
from tests.support import assert_refused, run_cli, write_bundle

MB = 1 << 20
PROCESS = 80 * MB
FOOTPRINTS = {
    "text_encoder": Footprint(10 * MB, 0, 1 * MB, 0, 0, ((1, 1 * MB, 0),)),
    # 16x16 pixels are 8x8 latents.
    "unet": Footprint(100 * MB, 0, 20 * MB, 10 * MB, 0, ((64, 10 * MB, 0),)),
    "vae_decoder": Footprint(20 * MB, 0, 2 * MB, 0, 0, ((64, 10 * MB, 0),)),
}


@pytest.fixture(scope="module")
def bundle(miniature: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The miniature pipeline, which says that it takes as much as a large one."""
    root = tmp_path_factory.mktemp("footprints") / "bundle"
    shutil.copytree(miniature.path, root)
    engines = {
        name: msgspec.structs.replace(engine, footprint=FOOTPRINTS[name])
        for name, engine in miniature.manifest.engines.items()
    }
    update_manifest(root, msgspec.structs.replace(miniature.manifest, engines=engines))
    return open_bundle(root)


@pytest.fixture(autouse=True)
def process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process itself always takes the same."""
    monkeypatch.setattr(fitting, "resident_bytes", lambda: PROCESS)
    monkeypatch.setattr(OnnxRuntime, "unimported_bytes", lambda backend: 0)


def free(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(loading, "available_bytes", lambda: count)


def request_of(pipeline: Pipeline, size: int = 16, **fields: Any) -> Request:
    return pipeline.complete(Request("a red apple", 1, height=size, width=size, **fields))


def mode(bundle: Bundle, limit: int, size: int = 16, count: int = 1, **fields: Any) -> str:
    """The mode that is taken within `limit`, or "refused"."""
    with Pipeline(bundle, Settings(max_memory=PROCESS + limit)) as pipeline:
        try:
            pipeline.fit(request_of(pipeline, size, **fields), count)
        except ResourceError:
            return "refused"
        return pipeline.memory


def test_a_run_takes_what_was_traced_and_in_proportion_between_and_beyond() -> None:
    footprint = Footprint(0, 0, 0, 0, 0, ((100, 1000, 10), (200, 900, 20), (400, 3000, 40)))
    assert computing(footprint, 100) == (1000, 10)
    assert computing(footprint, 1) == (1000, 10)
    assert computing(footprint, 200) == (1000, 20)  # a run takes no less than a smaller one
    assert computing(footprint, 300) == (2000, 30)
    assert computing(footprint, 800) == (6000, 80)
    assert computing(Footprint(0, 0, 0, 0, 0, ()), 100) == (0, 0)


def test_modes_add_components_up() -> None:
    for name, footprint in FOOTPRINTS.items():
        part = whole(footprint, 64 if name != "text_encoder" else 1, "fast")
        assert part.resident == part.loaded == footprint.weights + footprint.runs[0][1]
    parts = {"a": Part(5, 1, 4, 1), "b": Part(50, 20, 40, 3), "c": Part(7, 0, 6, 1)}
    groups = [{name: part} for name, part in parts.items()]
    assert together(groups, 100, "fast").resident == 100 + 4 + 40 + 6 + 3
    balanced = together(groups, 100, "balanced")
    apart = (("a",), ("b",), ("c",))
    assert balanced == Need(150, 130, {"a": 105, "b": 150, "c": 107}, apart)
    previews = together(groups, 100, "balanced", previews=True)
    assert previews.parts == {"a": 105, "b": 157, "c": 157}
    assert previews.together == (("a",), ("b", "c"))


@pytest.mark.parametrize("mode", MEMORY_MODES)
def test_pictures_are_read_beside_networks_that_stay_loaded(
    bundle: Bundle, mode: MemoryMode
) -> None:
    costs = Costs(bundle.manifest.pipeline, FOOTPRINTS, {}, PROCESS)
    none, small, large = (
        costs.need(mode, Generation(8, 8, 2, picture_bytes=count)).resident
        for count in (0, MB, 500 * MB)
    )
    kept = Generation(8, 8, 2).kept_bytes
    if mode == "fast":
        assert (small, large) == (none + MB, none + 500 * MB)
    else:
        assert (small, large) == (none, PROCESS + kept + 500 * MB)


def test_what_pictures_take_changes_nothing_of_which_weights_stay_mapped(bundle: Bundle) -> None:
    costs = Costs(bundle.manifest.pipeline, FOOTPRINTS, {}, PROCESS)
    stream = Fitting(costs, Budget(PROCESS + 120 * MB), memory="stream")
    batch = Batch(16, 16, 1, True)
    fits = [stream.check(replace(batch, picture_bytes=count)) for count in (0, MB, 60 * MB)]
    assert [fit.weights_kept for fit in fits] == [fits[0].weights_kept] * 3
    assert fits[0].weights_kept.keys() == FOOTPRINTS.keys()


def test_what_runs_in_each_step_is_loaded_together() -> None:
    groups = [
        {"text": Part(5, 1, 4, 1)},
        {"side": Part(30, 2, 25, 4), "denoiser": Part(50, 20, 40, 3)},
        {"decoder": Part(7, 0, 6, 1)},
    ]
    both = 100 + 25 + 40 + 4
    balanced = together(groups, 100, "balanced")
    assert balanced.parts == {"text": 105, "side": both, "denoiser": both, "decoder": 107}
    assert balanced.resident == both and balanced.held == both - 22
    assert balanced.together == (("text",), ("side", "denoiser"), ("decoder",))
    fast = together(groups, 100, "fast")
    assert fast.resident == fast.held == 100 + 4 + 25 + 40 + 6 + 4


def test_a_decoder_in_tiles_grows_with_the_image_alone() -> None:
    footprint = Footprint(1000, 0, 1000, 0, 0, ((32 * 32, 10**8, 0),))
    small, large = (Generation(n, n, 8) for n in (128, 256))
    tiled = [autoencoder_in_tiles(footprint, d, 8).resident for d in (small, large)]
    images = 5 * (large.image_bytes - small.image_bytes)
    assert tiled[1] - tiled[0] == images
    whole_ones = [whole(footprint, d.height * d.width, "balanced").resident for d in (small, large)]
    assert whole_ones[1] - whole_ones[0] > 40 * 10**8


def test_a_decoder_that_would_take_most_runs_in_tiles(bundle: Bundle) -> None:
    """Where components are released, its peak would be that of all."""
    spec = bundle.manifest.pipeline
    generation = Generation(64, 64, spec.latent.scale_factor)

    def tiled(mode: MemoryMode, halo: int | None = 8, **footprints: Footprint) -> set[str]:
        latent = msgspec.structs.replace(spec.latent, halo=halo)
        pipeline = msgspec.structs.replace(spec, latent=latent)
        costs = Costs(pipeline, {**FOOTPRINTS, **footprints}, {}, PROCESS)
        *_, least = tilings = costs.tilings(mode, generation)
        assert tilings[:-1] == ([frozenset()] if mode == "balanced" and least else [])
        if least and mode == "balanced":
            assert costs.need(mode, generation).resident < min(
                costs.need(mode, generation, tiled=other).resident for other in tilings[:-1]
            )
        return set(least)

    small = Footprint(1, 0, 1, 0, 0, ((64, 1, 0),))
    both: set[str] = {"vae_decoder"}
    none: set[str] = set()
    assert [tiled(mode) for mode in MEMORY_MODES] == [none, none, both]
    assert [tiled(mode, unet=small) for mode in MEMORY_MODES] == [none, both, both]
    assert [tiled(mode, None, unet=small) for mode in MEMORY_MODES] == [none, none, none]


def test_a_decoder_runs_in_tiles_where_it_does_not_fit_as_a_whole(
    bundle: Bundle, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(bundle.path, tmp_path / "bundle"))
    footprint = Footprint(20 * MB, 0, 2 * MB, 0, 0, ((64, 10 * MB, 0), (128 * 128, 500 * MB, 0)))
    unet = Footprint(100 * MB, 0, 20 * MB, 10 * MB, 0, ((64, 1 * MB, 0), (128 * 128, 10 * MB, 0)))
    pipeline = bundle.manifest.pipeline
    latent = msgspec.structs.replace(pipeline.latent, halo=8)
    engines = {
        name: msgspec.structs.replace(bundle.manifest.engines[name], footprint=found)
        for name, found in (("vae_decoder", footprint), ("unet", unet))
    }
    manifest = msgspec.structs.replace(
        bundle.manifest,
        pipeline=msgspec.structs.replace(pipeline, latent=latent),
        engines={**bundle.manifest.engines, **engines},
    )
    update_manifest(root, manifest)
    ours, images = open_bundle(root), []
    for limit, tiled in (300 * MB, set()), (180 * MB, {"vae_decoder"}):
        settings = Settings(memory="balanced", max_memory=PROCESS + limit)
        with Pipeline(ours, settings) as pipe:
            request = pipe.complete(Request("a cat", 1, height=160, width=160))
            images.append(np.asarray(pipe.generate([request])[0]).astype(int))
            assert set(pipe._loaded.tiled) == tiled
    assert np.abs(images[0] - images[1]).max() <= 3


def test_of_a_decoder_in_halves_the_larger_counts() -> None:
    head = Footprint(0, 0, 100, 0, 0, ((64, 1000, 0),))
    tail = Footprint(0, 0, 500, 0, 0, ((22 * 22, 4000, 0), (28 * 28, 9000, 0)))
    generation = Generation(64, 64, 8)
    features = 4 * 64 * 64
    image = 5 * generation.image_bytes
    narrow, wide = (decoder_in_parts(head, tail, generation, 4, n).resident for n in (22, 28))
    assert (narrow, wide) == (4500 + features + image, 9500 + features + image)
    wider = Footprint(0, 0, 10**9, 0, 0, ((64, 1000, 0),))
    assert decoder_in_parts(wider, tail, generation, 4, 22).resident > 10**9


def test_of_an_encoder_in_parts_the_largest_counts_with_what_it_takes_and_makes() -> None:
    generation, levels = Generation(64, 32, 4), (512, 512, 256)
    image = 5 * generation.image_bytes
    made = 4 * 256 * 128 * 64, 4 * 512 * 64 * 32

    def parts(*activations: int) -> list[Footprint]:
        # Of all at once.
        units = (128 * 64, 64 * 32, 64 * 32)
        runs = zip(units, activations, strict=True)
        return [Footprint(0, 0, 10, 0, 0, ((n, each, 0),)) for n, each in runs]

    def need(*activations: int) -> int:
        return encoder_in_parts(parts(*activations), generation, levels, 28).resident - image - 10

    assert encoder_window(28, 0) > 128 and encoder_window(28, 1) > 64
    assert need(10**9, 0, 0) == 10**9 + made[0]
    assert need(0, 10**9, 0) == 10**9 + sum(made)
    assert need(0, 0, 10**9) == 10**9 + made[1]
    narrow, wide = (
        encoder_in_parts(parts(10**9, 0, 0), Generation(400, 400, 4), levels, n).resident
        for n in (22, 28)
    )
    assert narrow < wide


def test_the_mode_follows_the_limit(bundle: Bundle) -> None:
    found = [mode(bundle, limit * MB) for limit in (1000, 200, 150, 60, 10)]
    assert found == ["fast", "fast", "balanced", "stream", "refused"]


def test_modes_that_make_no_difference_to_a_backend_are_not_taken(
    bundle: Bundle, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(bundle.path, tmp_path / "tensorrt"))
    engines = {
        name: msgspec.structs.replace(engine, backend="tensorrt")
        for name, engine in bundle.manifest.engines.items()
    }
    update_manifest(root, msgspec.structs.replace(bundle.manifest, engines=engines))
    ours, cuda = open_bundle(root), get_backend("tensorrt").process_bytes
    found = [mode(ours, cuda + limit * MB) for limit in (1000, 160, 60)]
    assert found == ["fast", "balanced", "refused"]


def test_the_mode_follows_size_batch_and_guidance(bundle: Bundle) -> None:
    limit = 220 * MB
    assert mode(bundle, limit) == "fast"
    assert mode(bundle, limit, size=32) == "balanced"
    assert mode(bundle, limit, size=64) == "stream"
    assert mode(bundle, limit, size=512) == "refused"
    assert mode(bundle, limit, count=5) == "balanced"
    assert mode(bundle, limit, count=31) == "refused"
    assert mode(bundle, 174 * MB) == "balanced"  # two rows of the UNet in a run
    assert mode(bundle, 174 * MB, guidance_scale=1.0) == "fast"


def test_previews_count(bundle: Bundle) -> None:
    settings = Settings(max_memory=PROCESS + 150 * MB)
    with Pipeline(bundle, settings) as pipeline:
        request = request_of(pipeline)
        pipeline.fit(request, 1, previews=False)
        assert pipeline.memory == "balanced"
        pipeline.fit(request, 1, previews=True)
        assert pipeline.memory == "stream"


@pytest.mark.parametrize("previews", [False, True])
def test_components_that_are_there_at_once_share_what_is_left_for_weights(
    previews: bool, bundle: Bundle
) -> None:
    """A preview's decoder is there beside the denoiser."""
    limit = PROCESS + 120 * MB
    with Pipeline(bundle, Settings(memory="stream", max_memory=limit)) as pipeline:
        pipeline.fit(request_of(pipeline), 1, previews)
        fit, costs = pipeline._loaded._fit, pipeline._loaded._fitting().costs
    assert fit is not None
    generation = replace(fit.generation, previews=previews)
    peaks = costs.need("stream", generation, fit.window, fit.tiled).parts
    left = {name: limit - with_margin(peaks[name], PROCESS) for name in ("unet", "vae_decoder")}
    kept = fit.weights_kept
    assert kept["vae_decoder"] == 20 * MB  # all of them
    if previews:
        assert kept["unet"] == left["unet"] - 20 * MB and left["unet"] == left["vae_decoder"]
    else:
        assert kept["unet"] == left["unet"] < 100 * MB


def test_later_requests_are_fitted_anew_and_generate_the_same(bundle: Bundle) -> None:
    with Pipeline(bundle, Settings(max_memory=PROCESS + 220 * MB)) as pipeline:
        images, modes = [], []
        for size in (16, 64, 16, 32):
            images.append(np.asarray(pipeline.generate([request_of(pipeline, size)])[0]))
            modes.append(pipeline.memory)
        assert modes == ["fast", "stream", "fast", "balanced"]
        with pytest.raises(ResourceError):
            pipeline.generate([request_of(pipeline, 512)])
        again = np.asarray(pipeline.generate([request_of(pipeline)])[0])
    with Pipeline(bundle, Settings(memory="fast")) as alone:
        for size, image in zip((16, 64, 16, 32), images, strict=True):
            other = np.asarray(alone.generate([request_of(alone, size)])[0])
            assert np.abs(image.astype(int) - other).max() <= 1
    assert np.array_equal(again, images[0])


def test_what_is_refused_says_what_fits_and_that_is_true(bundle: Bundle) -> None:
    settings = Settings(max_memory=PROCESS + 150 * MB)
    with Pipeline(bundle, settings) as pipeline:
        with pytest.raises(ResourceError) as caught:
            pipeline.fit(request_of(pipeline, 64), 8)
        told = str(caught.value)
        assert told.startswith("64x64 pixels, 8 at a time, need about ")
        allowed = int(told.partition("allow ")[2].partition(" MB")[0])
        smaller = int(told.partition("--size ")[2].partition("x")[0])
        pipeline.fit(request_of(pipeline, smaller), 8)
    with Pipeline(bundle, Settings(max_memory=allowed * 10**6)) as pipeline:
        pipeline.fit(request_of(pipeline, 64), 8)
    less = Settings(max_memory=(allowed - 1) * 10**6)
    with Pipeline(bundle, less) as pipeline, pytest.raises(ResourceError):
        pipeline.fit(request_of(pipeline, 64), 8)


def test_the_command_refuses_a_size_beyond_the_limit_before_any_work(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Loaded, "runner", lambda *_: pytest.fail("a network was loaded"))
    base = ("generate", bundle.path, "-p", "a cat", "-o", tmp_path / "a.png")
    refused = run_cli(*base, "--max-memory", "300MB", "--size", "256x256")
    assert refused.code == 6 and not list(tmp_path.iterdir())
    assert_refused(refused, "256x256 pixels need about", "--max-memory is 300 MB", "--size")


def test_images_that_do_not_fit_are_refused_before_the_first_is_generated(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Loaded, "runner", lambda *_: pytest.fail("a network was loaded"))
    with Pipeline(bundle, Settings(max_memory=PROCESS + 100 * MB)) as pipeline:
        requests = [Request("a cat", seed) for seed in range(33)]
        with pytest.raises(ResourceError, match=r"32 at a time.*--batch 1"):
            make_images(pipeline, requests, tmp_path / "out", 32)


def test_without_a_limit_what_is_free_decides(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(count: int, size: int = 16, memory: Any = None) -> str:
        free(monkeypatch, count)
        with Pipeline(bundle, Settings(memory=memory)) as pipeline:
            try:
                pipeline.fit(request_of(pipeline, size), 1)
            except ResourceError as exc:
                assert "MB are free" in str(exc)
                return "refused"
            return pipeline.memory

    assert [found(n * MB) for n in (1000, 190, 40, 10)] == ["fast", "balanced", "stream", "refused"]
    assert found(190 * MB, 48) == "stream" and found(190 * MB, 512) == "refused"
    assert found(100 * MB, memory="fast") == "refused"
    # What lies in the bundle's file can be taken back: it doesn't count as held.
    assert found(21 * MB) == "stream" and found(21 * MB, memory="stream") == "stream"


def test_what_is_loaded_already_is_not_counted_again(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    free(monkeypatch, 1000 * MB)
    with Pipeline(bundle) as pipeline:
        request = request_of(pipeline)
        pipeline.generate([request])
        free(monkeypatch, 100 * MB)  # as after loading
        pipeline.fit(request, 1)
        assert pipeline.memory == "fast"


def test_where_nothing_is_known_of_the_machine_nothing_is_refused(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "available_bytes", lambda: None)
    with Pipeline(bundle) as pipeline:
        pipeline.fit(request_of(pipeline, 512), 1)
        assert pipeline.memory == "fast"


def test_bundles_that_do_not_say_it_are_held_to_an_estimate(miniature: Bundle) -> None:
    assert all(engine.footprint is None for engine in miniature.manifest.engines.values())
    assert mode(miniature, 1000 * MB) == "fast"
    assert mode(miniature, 1000 * MB, size=4096) == "refused"
    assert mode(miniature, 20 * MB) != "refused"


def test_a_runner_of_another_survives_a_change_of_mode(bundle: Bundle) -> None:
    with Pipeline(bundle, Settings(max_memory=PROCESS + 220 * MB)) as pipeline:
        closed = []
        runner = pipeline.open_runner("vae_decoder")
        close = runner.close
        runner.close = lambda: (closed.append(1), close())[1]  # type: ignore[method-assign]
        pipeline.replace("vae_decoder", runner)
        for size in (16, 64, 16):
            pipeline.generate([request_of(pipeline, size)])
        assert not closed
        pipeline.restore("vae_decoder")
        assert closed


def test_memory_of_a_decoder() -> None:
    levels = (512, 512, 256, 128)
    # 256 channels of 512x512 pixels, four times.
    assert old_bundles.decoder_bytes(levels, 64, 64) == 4 * 4 * 256 * 512 * 512
    assert old_bundles.head_bytes(levels) == 10 * 4 * 512
    assert old_bundles.decoder_bytes((64,), 10, 20) == 4 * 4 * 64 * 200


def test_long_prompts_take_memory(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each further chunk of tokens, for both halves of guidance."""
    other = write_bundle(tmp_path / "bundle", tokens="tokens")
    engines = {
        name: msgspec.structs.replace(
            engine,
            footprint=msgspec.structs.replace(FOOTPRINTS[name], chunk=MB if name == "unet" else 0),
        )
        for name, engine in bundle.manifest.engines.items()
    }
    update_manifest(other.path, msgspec.structs.replace(other.manifest, engines=engines))
    with Pipeline(open_bundle(other.path)) as pipeline:
        free(monkeypatch, 10**10)

        def needed(words: int) -> int:
            request = pipeline.complete(Request("cat " * words, 1))
            pipeline.fit(request, 1)
            assert pipeline.memory == "fast"
            return pipeline.estimate(request, 1)

        one, two, three = (needed(words) for words in (75, 150, 225))
        assert two - one == three - two >= 2 * MB
    with Pipeline(open_bundle(other.path), Settings(max_memory=PROCESS + 41 * MB)) as pipeline:
        pipeline.fit(pipeline.complete(Request("cat", 1)), 1)
        with pytest.raises(ResourceError, match="a shorter prompt"):
            pipeline.fit(pipeline.complete(Request("cat " * 75 * 30, 1)), 1)
