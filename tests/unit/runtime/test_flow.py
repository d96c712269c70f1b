"""Wirings as data: stages in their order, inputs filled as they say, and wrong ones refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np
import pytest
from PIL import Image

from edgesd.engines.bundle import write_manifest
from edgesd.errors import BundleError, InputError, UsageError
from edgesd.runtime import tasks
from edgesd.runtime.arrays import Array, Float
from edgesd.runtime.backends.fake import FakeRunner
from edgesd.runtime.bundle import CHECKSUM, MANIFEST, Bundle, checksum_line, open_bundle
from edgesd.runtime.controls import Shown
from edgesd.runtime.denoise import Start
from edgesd.runtime.flow import GuidanceMode, Stage, flow_of
from edgesd.runtime.hints import HintOptions
from edgesd.runtime.images import png_bytes
from edgesd.runtime.memory import MemoryMode
from edgesd.runtime.pipeline import Pipeline
from edgesd.runtime.recorded import recorded, texts_of
from edgesd.runtime.requests import CompleteRequest, Control, Micro, Request
from edgesd.runtime.settings import Settings
from edgesd.runtime.tasks import Task
from edgesd.runtime.tasks.beginning import Beginning
from edgesd.spec.base import decode_json
from edgesd.spec.bundle import (
    SCHEMA_VERSION,
    BundleManifest,
    Engine,
    Footprint,
    Licence,
    Parity,
)
from edgesd.spec.pipeline import (
    ComponentSpec,
    DecoderSpec,
    DenoiserSpec,
    Dim,
    EncoderSpec,
    Fill,
    InputSpec,
    LatentSpec,
    Part,
    PipelineSpec,
    SchedulerSpec,
    ShapeSpec,
    SideSpec,
    TensorSpec,
    TextSpec,
    TokenizerRef,
    Wiring,
    stable_diffusion,
)
from tests.support import (
    assert_refused,
    file_entries,
    pipeline_spec,
    random_picture,
    run_cli,
    write_tokenizer,
)

C, SCALE, TOKENS, STEPS = 4, 2, 77, 3
LATENT: tuple[Dim, ...] = ("batch", C, "height", "width")


def f32(name: str, *shape: Dim) -> TensorSpec:
    return TensorSpec(name, "float32", shape)


COMPONENTS = {
    "words": ComponentSpec(
        "words", (TensorSpec("ids", "int64", ("batch", TOKENS)),), (f32("hidden", "b", TOKENS, 8),)
    ),
    "phrases": ComponentSpec(
        "phrases",
        (TensorSpec("ids", "int64", ("batch", TOKENS)),),
        (f32("hidden", "b", TOKENS, 4), f32("pooled", "b", 4)),
    ),
    "adapter": ComponentSpec(
        "adapter", (f32("hint", "batch", 3, "h", "w"),), (f32("feature", *LATENT),)
    ),
    "sketch": ComponentSpec(
        "sketch",
        (
            f32("x", *LATENT),
            f32("t", 1),
            f32("text", "batch", TOKENS, 8),
            f32("hint", "batch", 3, "h", "w"),
        ),
        (f32("residual", *LATENT),),
    ),
    "net": ComponentSpec(
        "net",
        (
            f32("x", "batch", 2 * C + 1, "height", "width"),
            f32("t", 1),
            f32("text", "batch", TOKENS, 12),
            f32("vector", "batch", 4),
            f32("sizes", "batch", 6),
            f32("quality", "batch", 5),
            f32("residual", *LATENT),
            f32("feature", *LATENT),
        ),
        (f32("noise", *LATENT),),
    ),
    "painter": ComponentSpec(
        "painter", (f32("z", *LATENT),), (f32("pixels", "batch", 3, "h", "w"),)
    ),
}
HIDDEN, PHRASES, POOLED = (
    Part("words", "hidden"),
    Part("phrases", "hidden"),
    Part("phrases", "pooled"),
)
RESIDUAL, FEATURE = Part("sketch", "residual"), Part("adapter", "feature")
WIRING = Wiring(
    texts=(TextSpec("words", "tokenizer", "ids"), TextSpec("phrases", "tokenizer_2", "ids")),
    tokenizers={name: TokenizerRef(TOKENS) for name in ("tokenizer", "tokenizer_2")},
    sides=(
        SideSpec("adapter", "once", (InputSpec("hint", "control"),)),
        SideSpec(
            "sketch",
            "each_step",
            (
                InputSpec("x", "sample"),
                InputSpec("t", "timestep"),
                InputSpec("text", "joined", (HIDDEN,)),
                InputSpec("hint", "control"),
            ),
        ),
    ),
    denoiser=DenoiserSpec(
        "net",
        (
            InputSpec("x", "sample"),
            InputSpec("t", "timestep"),
            InputSpec("text", "joined", (HIDDEN, PHRASES)),
            InputSpec("vector", "joined", (POOLED,)),
            InputSpec("residual", "side", (RESIDUAL,)),
            InputSpec("feature", "side", (FEATURE,)),
            InputSpec("sizes", "size_ids"),
            InputSpec("quality", "aesthetic_ids"),
        ),
        "noise",
        concat=("mask", "masked"),
    ),
    decoder=DecoderSpec("painter", "z", "pixels"),
    zero_negative=True,
)
SPEC = PipelineSpec(
    family="fakes",
    source="fakes",
    source_sha256="0" * 64,
    components=COMPONENTS,
    scheduler=SchedulerSpec("euler", {}),
    latent=LatentSpec(C, SCALE, 1.0),
    shape=ShapeSpec(16, 12, 8, dynamic=True, multiple_of=SCALE),
    num_inference_steps=STEPS,
    guidance_scale=3.0,
    wiring=WIRING,
)
SCALES = {"adapter": 0.5, "sketch": 2.0}
CONTROLS = tuple(
    Control(random_picture(7, (12, 15)), name, scale) for name, scale in SCALES.items()
)
REQUESTS = (
    Request("a red cat", 1, controls=CONTROLS),
    Request("a blue apple", 2, negative_prompt="a cat", controls=CONTROLS),
)


def write(root: Path, spec: PipelineSpec) -> Bundle:
    """A bundle without networks: its runners are fakes."""
    for name in spec.components:
        (root / name).mkdir(parents=True)
        (root / name / "model.onnx").write_bytes(b"x")
    write_tokenizer(root / "tokenizer")
    write_tokenizer(root / "tokenizer_2", pad=0)
    footprint = Footprint(1, 0, 1, 0, 1, ((1, 1, 1),))
    manifest = BundleManifest(
        schema_version=SCHEMA_VERSION,
        name="fakes",
        target="x86-64-cpu",
        arch="x86_64",
        backend="onnxruntime",
        precision="fp32",
        pipeline=spec,
        engines={
            name: Engine(
                name,
                f"{name}/model.onnx",
                "onnxruntime",
                "fp32",
                Parity(0.0, 0.0, 1e-4),
                footprint=footprint,
            )
            for name in spec.components
        },
        licence=Licence("CC0-1.0"),
        tools={},
        files=file_entries(root),
    )
    write_manifest(root, manifest)
    return open_bundle(root)


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    monkeypatch.setitem(tasks.TASKS, "text", TASK)
    return write(tmp_path / "bundle", SPEC)


def images_of(requests: Sequence[CompleteRequest]) -> dict[Any, Float]:
    """Mask and masked latents of each request, from its seed."""
    found: dict[Any, list[Float]] = {"mask": [], "masked": []}
    for request in requests:
        rng = np.random.default_rng(request.seed)
        h, w = request.height // SCALE, request.width // SCALE
        found["mask"].append(rng.random((1, h, w), np.float32).round())
        found["masked"].append(rng.standard_normal((C, h, w), np.float32))
    return {fill: np.stack(rows) for fill, rows in found.items()}


def prepare(begin: Beginning) -> Start:
    sigma = np.float32(begin.scheduler.init_noise_sigma)
    return Start(begin.drawn() * sigma, given=images_of(begin.requests))


TASK = Task(prepare, frozenset(("mask", "masked")))


def words(inputs: Mapping[str, Any]) -> dict[str, Array]:
    wave = np.arange(1, 9, dtype=np.float32) / 8
    return {"hidden": np.sin(inputs["ids"][..., None].astype(np.float32) * wave)}


def phrases(inputs: Mapping[str, Any]) -> dict[str, Array]:
    hidden = np.cos(inputs["ids"][..., None].astype(np.float32) * np.arange(1, 5, dtype=np.float32))
    return {"hidden": hidden, "pooled": hidden.mean(axis=1)}


def adapter(inputs: Mapping[str, Any]) -> dict[str, Array]:
    small = inputs["hint"][:, :, ::SCALE, ::SCALE]
    return {"feature": np.concatenate([small, small[:, :1] * 2], axis=1)}


def by_row(values: Any) -> Any:
    return values.reshape(len(values), -1).mean(axis=1)[:, None, None, None]


def sketch(inputs: Mapping[str, Any]) -> dict[str, Array]:
    rows = by_row(inputs["text"]) + by_row(inputs["hint"]) + inputs["t"] * 1e-3
    return {"residual": np.tanh(inputs["x"] + rows).astype(np.float32)}


def net(inputs: Mapping[str, Any]) -> dict[str, Array]:
    x = inputs["x"]
    rows = by_row(inputs["text"]) + by_row(inputs["vector"]) + inputs["t"] * 1e-3
    kept = x[:, C : C + 1] * x[:, C + 1 :]
    mixed = x[:, :C] + kept + 0.3 * inputs["residual"] + 0.1 * inputs["feature"] + rows
    return {"noise": np.tanh(mixed).astype(np.float32)}


def painter(inputs: Mapping[str, Any]) -> dict[str, Array]:
    return {"pixels": np.tanh(inputs["z"][:, :3].repeat(SCALE, 2).repeat(SCALE, 3))}


FUNCTIONS: dict[str, Callable[[Mapping[str, Any]], dict[str, Array]]] = {
    "words": words,
    "phrases": phrases,
    "adapter": adapter,
    "sketch": sketch,
    "net": net,
    "painter": painter,
}


class Fakes:
    """Opens fakes, and writes down what happens to them, and what each is given."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.seen: dict[str, list[dict[str, Any]]] = {name: [] for name in FUNCTIONS}
        self.made: dict[str, list[dict[str, Any]]] = {name: [] for name in FUNCTIONS}

    def __call__(self, component: str) -> FakeRunner:
        def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
            self.seen[component].append({name: array.copy() for name, array in inputs.items()})
            out = FUNCTIONS[component](inputs)
            self.made[component].append(out)
            return out

        self.events.append(f"+{component}")
        runner = FakeRunner(COMPONENTS[component], run)
        closed = runner.close

        def close() -> None:
            self.events.append(f"-{component}")
            closed()

        runner.close = close  # type: ignore[method-assign]
        return runner


def generated(
    bundle: Bundle,
    mode: GuidanceMode = "batched",
    memory: MemoryMode = "fast",
    requests: Sequence[Request] = REQUESTS,
) -> tuple[list[bytes], Fakes]:
    fakes = Fakes()
    settings = Settings(made_here=True, memory=memory, guidance_mode=mode)
    with Pipeline(bundle, settings, fakes) as pipeline:
        images = pipeline.generate(requests)
        assert [image.size for image in images] == [(12, 16)] * 2
    return [image.tobytes() for image in images], fakes


def test_every_input_gets_what_the_wiring_says(bundle: Bundle) -> None:
    _, fakes = generated(bundle)
    seen, made = fakes.seen, fakes.made
    # Each distinct prompt once by each encoder, through its own tokenizer.
    assert [len(seen[name]) for name in ("words", "phrases")] == [3, 3]
    padding = [seen[name][0]["ids"][0, -1] for name in ("words", "phrases")]
    assert padding == [2, 0]
    hidden = [out["hidden"] for out in made["words"]]
    phrase, pooled = ([out[name] for out in made["phrases"]] for name in ("hidden", "pooled"))

    def halves(cat: Float, apple: Float, negative: Float) -> Float:
        """Negative rows, the first of them zeros: nothing was asked for. Then the positive ones."""
        return np.concatenate([np.zeros_like(cat), negative, cat, apple])

    given = images_of([pipeline_request(bundle, request) for request in REQUESTS])
    twice = {fill: np.concatenate([value, value]) for fill, value in given.items()}
    shown = CONTROLS[0].hint(12, 16)
    features = adapter({"hint": shown})["feature"] * np.float32(SCALES["adapter"])
    assert len(seen["adapter"]) == 1  # once for all images
    np.testing.assert_array_equal(seen["adapter"][0]["hint"], shown)
    assert len(seen["net"]) == len(seen["sketch"]) == STEPS
    for step, (ours, side, residual) in enumerate(
        zip(seen["net"], seen["sketch"], made["sketch"], strict=True)
    ):
        np.testing.assert_array_equal(ours["x"][:, C : C + 1], twice["mask"])
        np.testing.assert_array_equal(ours["x"][:, C + 1 :], twice["masked"])
        np.testing.assert_array_equal(ours["x"][:2, :C], ours["x"][2:, :C])
        np.testing.assert_array_equal(side["x"], ours["x"][:, :C])
        np.testing.assert_array_equal(side["hint"], np.concatenate([shown] * 4))
        np.testing.assert_array_equal(side["text"], halves(*hidden))
        both = [np.concatenate(pair, axis=-1) for pair in zip(hidden, phrase, strict=True)]
        np.testing.assert_array_equal(ours["text"], halves(*both))
        np.testing.assert_array_equal(ours["vector"], halves(*pooled))
        scaled = residual["residual"] * np.float32(SCALES["sketch"])
        np.testing.assert_array_equal(ours["residual"], scaled)
        np.testing.assert_array_equal(ours["feature"], np.concatenate([features] * 4))
        assert ours["t"] == side["t"] and (step == 0 or ours["t"] < seen["net"][step - 1]["t"])


SIZES = {
    "as diffusers has them": (Micro(), Micro(), [16, 12, 0, 0, 16, 12], [16, 12, 0, 0, 16, 12]),
    "of the image": (
        Micro((640, 480), (3, 7), (320, 240)),
        Micro(),
        [480, 640, 7, 3, 240, 320],
        [480, 640, 7, 3, 240, 320],
    ),
    "of each half": (
        Micro(crop=(3, 7), aesthetic_score=9),
        Micro((64, 48), target_size=(5, 6), aesthetic_score=1),
        [16, 12, 7, 3, 16, 12],
        [48, 64, 7, 3, 6, 5],
    ),
}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("mode", ["batched", "sequential"])
def test_each_half_is_told_its_sizes_height_first(
    name: str, mode: GuidanceMode, bundle: Bundle
) -> None:
    asked, negative_asked, positive, negative = SIZES[name]
    requests = [replace(one, micro=asked, negative_micro=negative_asked) for one in REQUESTS]
    fakes = Fakes()
    with Pipeline(bundle, Settings(made_here=True, guidance_mode=mode), fakes) as pipeline:
        pipeline.generate(requests)
    seen, scores = fakes.seen["net"], (asked.aesthetic_score or 6, negative_asked.aesthetic_score)
    halves = np.float32([negative] * 2 + [positive] * 2)
    quality = np.float32([[scores[1] or 2.5]] * 2 + [[scores[0]]] * 2)
    runs = (
        seen
        if mode == "batched"
        else [
            {key: np.concatenate([a[key], b[key]]) for key in ("sizes", "quality")}
            for a, b in zip(seen[::2], seen[1::2], strict=True)
        ]
    )
    assert len(runs) == STEPS
    for run in runs:
        np.testing.assert_array_equal(run["sizes"], halves)
        np.testing.assert_array_equal(run["quality"], np.concatenate([halves[:, :4], quality], 1))


@pytest.mark.parametrize(
    ("micro", "words"),
    [
        (Micro(original_size=(0, 64)), "original_size 0x64 is out of range: expected 1 to"),
        (Micro(crop=(-1, 0)), "crop -1x0 is out of range"),
        (Micro(target_size=(64, 1 << 30)), "target_size .* is out of range"),
        (Micro(aesthetic_score=float("nan")), "aesthetic_score nan is out of range"),
    ],
)
def test_sizes_and_scores_have_ranges(micro: Micro, words: str, bundle: Bundle) -> None:
    for field in "micro", "negative_micro":
        with pytest.raises(UsageError, match=words):
            pipeline_request(bundle, replace(REQUESTS[0], **{field: micro}))  # type: ignore[arg-type]


def test_a_model_that_is_told_no_sizes_refuses_them(miniature: Bundle) -> None:
    with Pipeline(miniature) as pipeline:
        assert pipeline.complete(Request("a cat", 1)).micro is None
        for field in "micro", "negative_micro":
            request = replace(Request("a cat", 1), **{field: Micro(crop=(0, 0))})  # type: ignore[arg-type]
            with pytest.raises(UsageError, match=r"isn't told sizes.* leave them out"):
                pipeline.complete(request)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """What `edgesd generate` is asked for; no images are made."""
    found: list[Request] = []
    monkeypatch.setattr(
        "edgesd.runtime.images.expand_requests", lambda first, texts, count: found.append(first)
    )
    monkeypatch.setattr("edgesd.cli.generate.generate", lambda *args: [])
    monkeypatch.setattr("edgesd.cli.generate.summary", lambda *args: "")
    return found


def test_command_line_tells_the_model_sizes(bundle: Bundle, made: list[Request]) -> None:
    options = (
        *("--guidance-rescale", 0.5, "--original-size", "64x48", "--crop", "3,7"),
        *("--target-size", "32x24", "--aesthetic-score", 7, "--negative-original-size", "8x9"),
        *("--negative-crop", "1,2", "--negative-target-size", 5, "--negative-aesthetic-score", 3),
    )
    outcome = run_cli("generate", bundle.path, "-p", "a cat", *options, "-o", bundle.path / "x.png")
    assert outcome.code == 0, outcome.err
    (found,) = made
    assert found.guidance_rescale == 0.5
    assert found.micro == Micro((64, 48), (3, 7), (32, 24), 7.0)
    assert found.negative_micro == Micro((8, 9), (1, 2), (5, 5), 3.0)
    assert_refused(run_cli("generate", bundle.path, "-p", "a", "--crop", "3x7"), "LEFT,TOP")


def test_command_line_shows_pictures(bundle: Bundle, tmp_path: Path, made: list[Request]) -> None:
    file, odd = tmp_path / "a.png", tmp_path / "b:sketch"
    for path in file, odd:
        path.write_bytes(CONTROLS[0].picture.raw)
    image = tmp_path / "x.png"
    command = ("generate", bundle.path, "-p", "a cat", "-o", image)
    options = (
        *("--control", f"{file}:sketch", "--control", f"{odd}:adapter", "--guess-mode"),
        *("--control-scale", 0.5, "--control-scale", 2, "--control-start", 0.1),
        *("--control-end", 0.9, "--control-from", "photo", "--control-from", "sketch"),
        *("--control-thresholds", 50, 90.5, "--control-lines", "light"),
    )
    outcome = run_cli(*command, *options)
    assert outcome.code == 0, outcome.err
    picture = CONTROLS[0].picture
    shown = (
        Control(picture, "sketch", 0.5, 0.1, 0.9, "canny", HintOptions(50, 90.5, "light")),
        Control(picture, "adapter", 2.0, 0.1, 0.9, "scribble", HintOptions(50, 90.5, "light")),
    )
    assert made[-1].controls == shown and made[-1].guess_mode
    for more, words in (
        (("--control-scale", 1), "--control-scale goes with --control FILE"),
        (("--control", odd, *("--control-end", 0.5) * 2), "given 2 times for 1 control images"),
        (("--control", tmp_path / "none.png"), "none.png"),
        (("--control", odd, "--control-scale", "nan"), "nan"),
        (("--control", odd, "--control-from", "video"), "video"),
        (("--control-lines", "dark"), "--control-lines goes with --control FILE"),
        (("--control", odd, "--control-lines", "dark"), "goes with --control-from sketch"),
        (
            ("--control", odd, "--control-from", "sketch", "--control-thresholds", 1, 2),
            "--control-thresholds goes with --control-from photo",
        ),
        (
            ("--control", odd, "--control-from", "photo", "--control-thresholds", 9, 5),
            "the low one first, not 9.0 and 5.0",
        ),
        (
            ("--control", odd, "--control-from", "photo", "--control-thresholds", 1, 1e9),
            "must be 0 to 2040",
        ),
    ):
        assert_refused(run_cli(*command, *more), words)
    # What an image says of them is read again; the pictures themselves must be given.
    manifest = bundle.manifest
    complete = pipeline_request(bundle, made[-1])
    image.write_bytes(png_bytes(Image.new("RGB", (12, 16)), texts_of(manifest, complete)))
    like = ("generate", bundle.path, "--like", image, "-o", tmp_path / "y.png")
    assert_refused(run_cli(*like, "--control", f"{file}:sketch"), "--control FILE:adapter")
    options = ("--control", f"{file}:sketch", "--control", f"{odd}:adapter", "--control-end", 0.8)
    assert run_cli(*like, *options).code == 0
    assert made[-1].controls == tuple(replace(one, end=0.8) for one in shown)
    assert made[-1].guess_mode
    assert run_cli(*like, *options, "--control-lines", "dark").code == 0
    assert [one.options for one in made[-1].controls] == [HintOptions(50, 90.5, "dark")] * 2
    other = tmp_path / "other.png"
    other.write_bytes(random_picture(8, (12, 15)).raw)
    outcome = run_cli(*like, "--control", f"{other}:sketch", "--control", f"{odd}:adapter")
    assert outcome.code == 0 and "isn't the picture that" in outcome.err


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sketch",
        f"sketch {'0' * 64} 1 0 1 video",
        f"../sketch {'0' * 64} 1 0 1 ready",
        f"sketch {'0' * 63} 1 0 1 ready",
        f"sketch {'0' * 64} nan 0 1 ready",
        f"sketch {'0' * 64} 1 0 2 ready",
        f"sketch {'0' * 64} 1 0 ready",
        f"sketch {'0' * 64} 1 0 1 canny low=9 high=5",
        f"sketch {'0' * 64} 1 0 1 canny low=nan",
        f"sketch {'0' * 64} 1 0 1 canny low",
        f"sketch {'0' * 64} 1 0 1 canny middle=5",
        f"sketch {'0' * 64} 1 0 1 scribble lines=blue",
        f"sketch {'0' * 64} 1 0 1 scribble line_width=999",
        "\n".join([f"sketch {'0' * 64} 1 0 1 ready"] * 17),
    ],
)
def test_what_an_image_says_of_controls_is_checked(
    text: str, bundle: Bundle, tmp_path: Path
) -> None:
    texts = texts_of(bundle.manifest, pipeline_request(bundle, REQUESTS[0]))
    path = tmp_path / "x.png"
    path.write_bytes(png_bytes(Image.new("RGB", (12, 16)), {**texts, "controls": text}))
    with pytest.raises(InputError, match=r"says controls .*: expected lines of") as caught:
        recorded(path)
    assert len(str(caught.value).splitlines()) == 1


def pipeline_request(bundle: Bundle, request: Request) -> CompleteRequest:
    with Pipeline(bundle, Settings(made_here=True), Fakes()) as pipeline:
        return pipeline.complete(request)


@pytest.mark.parametrize("memory", ["fast", "balanced", "stream"])
def test_modes_of_guidance_and_memory_give_the_same_images(
    memory: MemoryMode, bundle: Bundle
) -> None:
    assert generated(bundle)[0] == generated(bundle, "sequential", memory)[0]


@pytest.mark.parametrize("mode", ["batched", "sequential"])
def test_in_guess_mode_the_positive_half_alone_is_looked_at(
    mode: GuidanceMode, bundle: Bundle
) -> None:
    requests = [replace(one, controls=CONTROLS[1:], guess_mode=True) for one in REQUESTS]
    _, fakes = generated(bundle, mode, requests=requests)
    assert [len(inputs["x"]) for inputs in fakes.seen["sketch"]] == [2] * STEPS
    runs = fakes.seen["net"]
    if mode == "sequential":
        runs = [
            {"residual": np.concatenate([low["residual"], high["residual"]])}
            for low, high in zip(runs[::2], runs[1::2], strict=True)
        ]
    for ours, made in zip(runs, fakes.made["sketch"], strict=True):
        assert not ours["residual"][:2].any()
        # The only output counts a tenth.
        wanted = made["residual"] * np.float32(SCALES["sketch"] * 0.1)
        np.testing.assert_allclose(ours["residual"][2:], wanted, rtol=1e-6)


def test_a_side_runs_for_requests_and_steps_that_ask_for_it(bundle: Bundle) -> None:
    asked = [replace(one, controls=()) for one in REQUESTS]
    _, fakes = generated(bundle, requests=asked)
    assert not fakes.seen["sketch"] and not fakes.seen["adapter"]
    assert not {"+sketch", "+adapter"} & {*fakes.events}
    assert not any(inputs["residual"].any() for inputs in fakes.seen["net"])
    off = tuple(replace(one, scale=0.0) for one in CONTROLS)
    _, fakes = generated(bundle, requests=[replace(one, controls=off) for one in REQUESTS])
    assert not {"+sketch", "+adapter"} & {*fakes.events}
    late = (replace(CONTROLS[1], start=0.5),)
    _, fakes = generated(bundle, requests=[replace(one, controls=late) for one in REQUESTS])
    assert len(fakes.seen["sketch"]) == 1
    assert [bool(inputs["residual"].any()) for inputs in fakes.seen["net"]] == [False, False, True]


def test_parts_of_steps_are_counted_as_by_diffusers() -> None:
    """A ControlNet's of all steps; an adapter's of those that are taken, rounded down."""
    hint = np.zeros((1, 3, 1, 1), np.float32)
    for end, count, taken, controlnet, adapter in (
        (0.5, 8, 8, 4, 4),
        (0.58, 50, 50, 29, 28),  # 50 * 0.58 is a little less than 29
        (0.5, 8, 5, 4, 2),
        (1.0, 3, 3, 3, 3),
    ):
        for once, acting in (False, controlnet), (True, adapter):
            shown = Shown("side", hint, end=end, once=once)
            found = [shown.acts(index, count, taken) for index in range(count)]
            assert found == [True] * acting + [False] * (count - acting)


@pytest.mark.parametrize(
    ("controls", "guess", "words"),
    [
        ((Control(CONTROLS[0].picture),), False, "has 2 .* FILE:NAME with one of adapter, sketch"),
        ((replace(CONTROLS[0], name="depth"),), False, "unknown control 'depth'.* adapter, sketch"),
        ((CONTROLS[0], CONTROLS[0]), False, "adapter gets two control images"),
        ((replace(CONTROLS[0], scale=float("nan")),), False, "scale of adapter .* not nan"),
        ((replace(CONTROLS[0], scale=11.0),), False, "scale of adapter .* not 11"),
        ((replace(CONTROLS[0], start=0.5, end=0.5),), False, "acts from 0.5 to 0.5"),
        ((replace(CONTROLS[0], end=1.5),), False, "acts from 0 to 1.5"),
        ((replace(CONTROLS[0], start=float("nan")),), False, "acts from nan to 1"),
        ((CONTROLS[0],), True, "guess mode is for the control image of a ControlNet"),
        ((), True, "guess mode is for"),
    ],
)
def test_wrong_controls_are_refused_in_one_line(
    controls: Any, guess: bool, words: str, bundle: Bundle
) -> None:
    request = replace(REQUESTS[0], controls=controls, guess_mode=guess)
    with pytest.raises(UsageError, match=words) as caught:
        pipeline_request(bundle, request)
    assert len(str(caught.value).splitlines()) == 1


def test_a_sketch_without_lines_is_refused_before_a_network_is_loaded(bundle: Bundle) -> None:
    empty = replace(CONTROLS[1], picture=random_picture(1, (3, 3)), kind="scribble")
    fakes = Fakes()
    with (
        Pipeline(bundle, Settings(made_here=True), fakes) as pipeline,
        pytest.raises(InputError, match="no lines that stand out"),
    ):
        pipeline.generate([replace(REQUESTS[0], controls=(empty,))])
    assert fakes.events == []


def test_a_bundle_without_sides_refuses_control_images(miniature: Bundle) -> None:
    with Pipeline(miniature) as pipeline, pytest.raises(UsageError, match="--controlnet FOLDER"):
        pipeline.complete(Request("a cat", 1, controls=CONTROLS[:1]))


def test_what_is_not_needed_any_more_is_released(bundle: Bundle) -> None:
    _, fakes = generated(bundle, memory="balanced")
    *before, a, b, c, d, last, end = fakes.events
    assert before == ["+words", "-words", "+phrases", "-phrases", "+adapter", "-adapter"]
    assert [a, b, *sorted((c, d))] == ["+sketch", "+net", "-net", "-sketch"]
    assert [last, end] == ["+painter", "-painter"]
    assert [event[0] for event in generated(bundle)[1].events] == ["+"] * 6 + ["-"] * 6


def test_stages_are_in_the_order_of_their_runs() -> None:
    flow = flow_of(SPEC)
    assert flow.components == ("words", "phrases", "adapter", "sketch", "net", "painter")
    assert [len(group) for group in flow.groups] == [1, 1, 1, 2, 1]
    assert flow.denoiser == Stage("net", "denoiser", "step")
    assert flow.once == {"words", "phrases", "adapter", "painter"}
    assert flow.stage("painter") == flow.decoder and flow.stage("another") is None
    assert flow.guided(3.0) and not flow.guided(1.0)
    assert not flow_of(
        msgspec.structs.replace(SPEC, wiring=stable_diffusion(distilled=True))
    ).guided(3.0)


def test_an_encoder_runs_on_its_own_behind_the_texts() -> None:
    wiring = changed(encoder=EncoderSpec("camera", "hint", ("mean", "std")))
    flow = flow_of(msgspec.structs.replace(SPEC, wiring=wiring))
    assert flow.encoder == Stage("camera", "encoder", "image")
    assert flow.groups[2] == (flow.encoder,) and flow.components[2] == "camera"
    assert flow.from_prompts == flow_of(SPEC).components
    assert flow_of(SPEC).encoder is None


@pytest.mark.parametrize(
    ("per", "mode", "rows", "runs"),
    [
        ("prompt", "batched", 1, 2),
        ("image", "sequential", 1, 1),
        ("step", "batched", 6, 20),
        ("step", "sequential", 3, 40),
    ],
)
def test_rows_and_runs_of_a_stage(per: Any, mode: GuidanceMode, rows: int, runs: int) -> None:
    stage = Stage("net", "denoiser", per)
    assert (stage.batch(3, True, mode), stage.runs(20, True, mode)) == (rows, runs)
    unguided = {"prompt": 1, "image": 1, "step": 20}[per]
    assert stage.runs(20, False, mode) == unguided
    assert stage.batch(3, False, mode) == (3 if per == "step" else 1)


def changed(**fields: Any) -> Wiring:
    return msgspec.structs.replace(WIRING, **fields)


def denoiser(**fields: Any) -> Wiring:
    return changed(denoiser=msgspec.structs.replace(WIRING.denoiser, **fields))


def input_of(index: int, *values: Any) -> Wiring:
    inputs = [*WIRING.denoiser.inputs]
    inputs[index] = InputSpec(inputs[index].name, *values)
    return denoiser(inputs=tuple(inputs))


WRONG: dict[str, tuple[Wiring, str]] = {
    "a component that isn't there": (denoiser(component="nobody"), "has no nobody"),
    "one component twice": (
        changed(decoder=DecoderSpec("net", "x", "noise")),
        "a component in two places",
    ),
    "an output that isn't there": (
        input_of(2, "joined", (HIDDEN, Part("phrases", "nothing"))),
        "nothing of phrases: there is none",
    ),
    "a side among texts": (input_of(2, "joined", (RESIDUAL,)), "residual of sketch: there is none"),
    "a text among sides": (input_of(4, "side", (HIDDEN,)), "hidden of words: there is none"),
    "the decoder's output": (
        input_of(4, "side", (Part("painter", "pixels"),)),
        "pixels of painter: there is none",
    ),
    "widths that don't add up": (input_of(2, "joined", (HIDDEN,)), "net .* has text as"),
    "ranks that differ": (input_of(2, "joined", (HIDDEN, POOLED)), "can't be joined"),
    "another rank": (input_of(3, "joined", (PHRASES,)), "net .* has vector as"),
    "no timestep": (input_of(1, "mask"), "exactly one input filled with timestep"),
    "two samples": (input_of(4, "sample"), "exactly one input filled with sample"),
    "another number of channels": (denoiser(concat=()), "net .* has x as"),
    "an input twice": (
        denoiser(inputs=(*WIRING.denoiser.inputs, WIRING.denoiser.inputs[2])),
        "net has an input that is filled twice",
    ),
    "a mask twice": (denoiser(concat=("mask", "mask")), "a part of its sample twice"),
    "an image where none is shown": (
        input_of(4, "control"),
        "residual of net is filled with 'control', which isn't for it",
    ),
    "a side that sees no image": (
        changed(sides=(SideSpec("adapter", "once", ()), WIRING.sides[1])),
        "adapter doesn't have exactly one input filled with a control image",
    ),
    "a side that adds to a side": (
        changed(
            sides=(
                WIRING.sides[0],
                SideSpec(
                    "sketch",
                    "each_step",
                    (*WIRING.sides[1].inputs[:1], InputSpec("t", "side", (FEATURE,))),
                ),
            )
        ),
        "t of sketch is filled with 'side', which isn't for it|exactly one input",
    ),
    "another output": (denoiser(output="other"), "net .* has the outputs noise, not other"),
    "an input that nothing fills": (
        denoiser(inputs=WIRING.denoiser.inputs[:-1]),
        "net .* has the inputs",
    ),
    "an input that isn't there": (
        denoiser(inputs=(*WIRING.denoiser.inputs, InputSpec("more", "mask"))),
        "net .* has the inputs",
    ),
    "a side that runs once and sees the sample": (
        changed(sides=(msgspec.structs.replace(WIRING.sides[1], when="once"), WIRING.sides[0])),
        "'sample' isn't known then",
    ),
    "token ids that aren't": (
        changed(texts=(*WIRING.texts, TextSpec("sketch", "tokenizer", "x")), sides=()),
        "there is none|sketch .* has",
    ),
    "a tokenizer that isn't there": (
        changed(tokenizers={"tokenizer": TokenizerRef(TOKENS)}),
        "phrases has no tokenizer tokenizer_2",
    ),
    "another number of tokens": (
        changed(tokenizers={**WIRING.tokenizers, "tokenizer_2": TokenizerRef(64)}),
        "phrases .* has ids as",
    ),
    "a task without what encodes its images": (
        changed(tasks=("text", "image")),
        "nothing encodes the images that the task 'image' begins with",
    ),
    "an encoder of what is no image": (
        changed(encoder=EncoderSpec("adapter", "z", ("feature",)), sides=WIRING.sides[1:]),
        "there is none|adapter .* has the inputs hint, not z",
    ),
    "an encoder of other latents": (
        changed(encoder=EncoderSpec("adapter", "hint", ("mean", "std")), sides=WIRING.sides[1:]),
        "there is none|adapter .* has the outputs feature, not mean, std",
    ),
    "an image of four colours": (
        changed(decoder=DecoderSpec("adapter", "hint", "feature"), sides=WIRING.sides[1:]),
        "there is none|adapter .* has",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_wiring_is_refused_in_one_line(name: str, bundle: Bundle, tmp_path: Path) -> None:
    wiring, words = WRONG[name]
    wrong = write(tmp_path / "wrong", msgspec.structs.replace(SPEC, wiring=wiring))
    with pytest.raises(BundleError, match=words) as caught:
        Pipeline(wrong, Settings(made_here=True), Fakes())
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("fill", get_args(Fill))
def test_whatever_fills_an_input_has_a_shape_that_is_checked(fill: Fill, tmp_path: Path) -> None:
    inputs = (*COMPONENTS["net"].inputs, f32("more", 1, 2, 3, 4, 5))
    net = msgspec.structs.replace(COMPONENTS["net"], inputs=inputs)
    parts = {"joined": (HIDDEN,), "side": (FEATURE,)}.get(fill, ())
    wiring = denoiser(inputs=(*WIRING.denoiser.inputs, InputSpec("more", fill, parts)))
    spec = msgspec.structs.replace(SPEC, wiring=wiring, components={**COMPONENTS, "net": net})
    with pytest.raises(
        BundleError,
        match=r"net in the manifest has more as|exactly one input|isn't for it|has an input filled",
    ):
        Pipeline(write(tmp_path / "wrong", spec), Settings(made_here=True), Fakes())


@pytest.mark.parametrize("width", [2, 3, 1 << 20, "width"])
def test_an_embedding_of_guidance_has_a_width_that_can_be_computed(
    width: Dim, tmp_path: Path
) -> None:
    inputs = (*COMPONENTS["net"].inputs, f32("scale", "batch", width))
    net = msgspec.structs.replace(COMPONENTS["net"], inputs=inputs)
    scale = InputSpec("scale", "guidance_embedding")
    wiring = denoiser(inputs=(*WIRING.denoiser.inputs, scale))
    spec = msgspec.structs.replace(SPEC, wiring=wiring, components={**COMPONENTS, "net": net})
    with pytest.raises(BundleError, match="net in the manifest has scale as float32"):
        Pipeline(write(tmp_path / "wrong", spec), Settings(made_here=True), Fakes())


def test_what_no_task_gives_is_refused(tmp_path: Path) -> None:
    bundle = write(tmp_path / "bundle", SPEC)
    with pytest.raises(BundleError, match=r"fakes needs mask, masked .* upgrade edgesd"):
        Pipeline(bundle, Settings(made_here=True), Fakes())


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (("denoiser", "inputs", 0, "fill"), "a later word"),
        (("denoiser", "inputs", 0, "parts"), [{"component": "words", "output": "hidden"}]),
        (("denoiser", "inputs", 2, "parts"), []),
        (("denoiser", "concat"), ["control"]),
        (("sides", 0, "when"), "sometimes"),
        (("texts",), []),
        (("texts", 0, "tokenizer"), "../tokenizer"),
        (("denoiser", "output"), "noise\u2028"),
        (("denoiser", "output"), "noise\x9b31m"),
        (("tasks",), ["video"]),
        (("tasks",), []),
        (("more",), 1),
    ],
)
def test_words_that_this_version_lacks_are_refused_in_one_line(
    at: tuple[Any, ...], value: Any, tmp_path: Path
) -> None:
    root = write(tmp_path / "bundle", SPEC).path
    manifest = json.loads((root / MANIFEST).read_bytes())
    inner = manifest["pipeline"]["wiring"]
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = value
    rewrite(root, manifest)
    with pytest.raises(BundleError, match=r"bundle\.json isn't valid") as caught:
        open_bundle(root)
    assert len(str(caught.value).splitlines()) == 1


def rewrite(root: Path, manifest: dict[str, Any]) -> None:
    raw = json.dumps(manifest).encode()
    (root / MANIFEST).write_bytes(raw)
    (root / CHECKSUM).write_bytes(checksum_line(raw))


@pytest.mark.parametrize("distilled", [False, True])
def test_bundles_of_older_schemas_have_the_wiring_of_stable_diffusion(
    distilled: bool, tmp_path: Path
) -> None:
    spec = pipeline_spec()
    unet = spec.components["unet"]
    if distilled:
        unet = msgspec.structs.replace(
            unet, inputs=(*unet.inputs, f32("timestep_cond", "batch", 8))
        )
    spec = msgspec.structs.replace(spec, components={**spec.components, "unet": unet})
    root = write(tmp_path / "bundle", spec).path
    manifest = json.loads((root / MANIFEST).read_bytes())
    del manifest["pipeline"]["wiring"]
    rewrite(root, manifest)
    with pytest.raises(BundleError, match="missing required field `wiring`"):
        open_bundle(root)
    manifest["pipeline"]["max_tokens"] = TOKENS
    rewrite(root, manifest | {"schema_version": 7})
    found = open_bundle(root).manifest.pipeline
    assert found.wiring == stable_diffusion(TOKENS, distilled)
    assert flow_of(found).components == ("text_encoder", "unet", "vae_decoder")
    assert flow_of(found).distilled == distilled


def test_a_wiring_is_the_same_when_it_was_written_and_read() -> None:
    assert decode_json(msgspec.json.encode(WIRING), Wiring) == WIRING


def test_inspect_shows_a_bundle_of_another_wiring(tmp_path: Path) -> None:
    write(tmp_path / "bundle", SPEC)
    assert run_cli("inspect", tmp_path / "bundle").code == 0
