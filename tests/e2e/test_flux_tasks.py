"""FLUX.1's models for inpainting and for control images make diffusers' images, from the same draws
of noise, and mistakes in what they are given are noticed.

As in test_same_images.py, networks are the torch modules that would be exported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

from edgesd.engines.tensorrt import BuildSpec, build_plan  # noqa: E402
from edgesd.errors import InputError, UsageError  # noqa: E402
from edgesd.evaluate.psnr import psnr  # noqa: E402
from edgesd.export.families.parts import flux_transformer  # noqa: E402
from edgesd.export.pipeline import export_spec  # noqa: E402
from edgesd.export.source import resolve_source  # noqa: E402
from edgesd.recipes import BuildOptions, LocalFolders, QuantOptions, build  # noqa: E402
from edgesd.recipes.estimate import PlanRequest  # noqa: E402
from edgesd.recipes.planner import estimate_build  # noqa: E402
from edgesd.runtime import kernels, tasks  # noqa: E402
from edgesd.runtime.bundle import Bundle  # noqa: E402
from edgesd.runtime.denoise import Start  # noqa: E402
from edgesd.runtime.footprint import PROGRAM_BYTES  # noqa: E402
from edgesd.runtime.memory import MemoryMode  # noqa: E402
from edgesd.runtime.pipeline import Pipeline  # noqa: E402
from edgesd.runtime.requests import Control, Request  # noqa: E402
from edgesd.runtime.settings import Settings  # noqa: E402
from edgesd.runtime.tasks import Task  # noqa: E402
from edgesd.runtime.tasks.beginning import Beginning  # noqa: E402
from edgesd.spec.pipeline import ImageTask  # noqa: E402
from edgesd.spec.scheme import Precision  # noqa: E402
from tests.e2e.test_plan import board  # noqa: E402
from tests.image_tasks import HINT, OBLONG, PROMPTS, SQUARE, Both, both, mask, picture  # noqa: E402
from tests.support import assert_refused, random_picture, run_cli  # noqa: E402
from tests.tiny_pipelines import tiny, write_tiny  # noqa: E402


def opened(name: str, folder: Path, tasks: tuple[ImageTask, ...] = ()) -> Both:
    source = resolve_source(write_tiny(name, folder / "model"))
    return both(source, tiny(name), folder / "bundle", tasks)


@pytest.fixture(scope="module")
def fill(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    found = opened("flux-fill", tmp_path_factory.mktemp("fill"))
    yield found
    found.ours.close()


@pytest.fixture(scope="module")
def steered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    found = opened("flux-control", tmp_path_factory.mktemp("control"))
    yield found
    found.ours.close()


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    found = opened("flux-dev", tmp_path_factory.mktemp("dev"), ("inpaint",))
    yield found
    found.ours.close()


def test_builds_see_the_same_as_diffusers(fill: Both, steered: Both) -> None:
    fill.check_own_pipeline()
    steered.check_own_pipeline()


def test_each_knows_one_task(fill: Both, steered: Both) -> None:
    assert fill.ours.spec.wiring.tasks == ("inpaint",)
    assert steered.ours.spec.wiring.tasks == ("control",)
    specs = fill.ours.spec, steered.ours.spec
    assert [(one.num_inference_steps, one.guidance_scale) for one in specs] == [(50, 30), (28, 3.5)]


@pytest.mark.parametrize("strength", [0.3, 0.8, 1.0])
@pytest.mark.parametrize(("count", "size"), [(1, SQUARE), (2, OBLONG)])
def test_what_a_mask_covers_is_filled(
    strength: float, count: int, size: tuple[int, int], fill: Both
) -> None:
    assert fill.difference("inpaint", count, size, strength=strength) <= 1


@pytest.mark.parametrize(("count", "size"), [(1, SQUARE), (2, OBLONG)])
def test_a_control_image_steers(count: int, size: tuple[int, int], steered: Both) -> None:
    assert steered.difference("control", count, size) <= 1


@pytest.mark.parametrize("task", ["image", "inpaint"])
def test_true_cfg_of_images(task: ImageTask, dev: Both) -> None:
    asked = {"negative_prompt": "a green house", "true_cfg_scale": 4.0}
    assert dev.difference(task, 2, strength=0.8, **asked) <= 1


def test_the_pixels_of_a_mask_become_channels() -> None:
    pixels = torch.arange(2 * 24 * 40, dtype=torch.float32).reshape(2, 1, 24, 40)
    blocks = flux_transformer.blocks_of(pixels, 8)
    assert torch.equal(blocks, torch.nn.functional.pixel_unshuffle(pixels, 8))
    assert torch.equal(flux_transformer.mask_of(blocks), pixels)


# Mutations.


def noise_first(begin: Beginning) -> Start:
    """The control image's latents are drawn last."""
    noise = begin.drawn()
    hint = begin.requests[0].controls[0].hint(*(begin.requests[0].width, begin.requests[0].height))
    shown = begin.encoded([2 * hint - 1] * len(begin.requests))
    return Start(noise, given={"control_latents": shown})


def darker(begin: Beginning) -> Start:
    """The control image from 0 to 1."""
    first = begin.requests[0]
    shown = begin.encoded([first.controls[0].hint(first.width, first.height)])
    return Start(begin.drawn(), given={"control_latents": shown})


@pytest.mark.parametrize("wrong", [noise_first, darker])
def test_other_control_latents_are_noticed(
    wrong: Callable[[Beginning], Start], steered: Both, monkeypatch: pytest.MonkeyPatch
) -> None:
    gives = tasks.TASKS["control"].gives
    monkeypatch.setitem(tasks.TASKS, "control", Task(wrong, gives))
    assert steered.difference("control") > 1


def by_column(pixels: Any, unit: int) -> Any:
    """The pixels under a latent column by column."""
    blocks = torch.nn.functional.pixel_unshuffle(pixels, unit)
    return blocks.unflatten(1, (unit, unit)).transpose(1, 2).flatten(1, 2)


def test_another_order_of_a_masks_pixels_is_noticed(
    fill: Both, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flux_transformer, "blocks_of", by_column)
    assert fill.difference("inpaint") > 1


# What is refused.


def test_what_a_task_needs_must_be_given(fill: Both, steered: Both) -> None:
    with pytest.raises(UsageError, match="for inpainting: give --image and --mask"):
        fill.ours.complete(Request("a cat", 1))
    with pytest.raises(UsageError, match="for inpainting alone: give --mask"):
        fill.ours.complete(Request("a cat", 1, image=picture(0, SQUARE)))
    with pytest.raises(UsageError, match=r"draws by a control image.*give --control"):
        steered.ours.complete(Request("a cat", 1))
    with pytest.raises(UsageError, match="no ControlNet and no adapter"):
        fill.ours.complete(Request("a cat", 1, controls=(Control(HINT),)))
    for wrong in Control(HINT, scale=0.5), Control(HINT, start=0.1), Control(HINT, end=0.9):
        with pytest.raises(UsageError, match="acts in all steps"):
            steered.ours.complete(Request("a cat", 1, controls=(wrong,)))
    with pytest.raises(UsageError, match="unknown control"):
        steered.ours.complete(Request("a cat", 1, controls=(Control(HINT, "sketch"),)))
    shown = Request("a cat", 1, controls=(Control(HINT),))
    with pytest.raises(UsageError, match="guess mode"):
        steered.ours.complete(replace(shown, guess_mode=True))
    painted = {"image": picture(0, SQUARE), "mask": mask(0, SQUARE)}
    for given in {"image": painted["image"]}, {"mask": painted["mask"]}, painted, {"strength": 0.5}:
        with pytest.raises(UsageError, match=r"doesn't begin with an image.*leave --image, --mask"):
            steered.ours.complete(replace(shown, **given))
    with pytest.raises(InputError, match="mask"):
        fill.ours.complete(Request("a cat", 1, image=picture(0, SQUARE), mask=mask(0, (40, 24))))


def test_other_tasks_and_channels_are_refused(tmp_path: Path) -> None:
    source = resolve_source(write_tiny("flux-control", tmp_path / "model"))
    with pytest.raises(UsageError, match="draws by a control image alone: leave --task out"):
        export_spec(source, tasks=("image",))
    index = tmp_path / "model" / "model_index.json"
    text = index.read_text()
    for name in "FluxPipeline", "FluxFillPipeline":
        index.write_text(text.replace("FluxControlPipeline", name))
        with pytest.raises(InputError, match=rf"takes 32 channels .* that of a {name} takes"):
            export_spec(resolve_source(tmp_path / "model"))


# Bundles.


def asked(name: str) -> Request:
    """A request of a small image, which is begun with or controlled."""
    request = Request(PROMPTS[0], 3, num_inference_steps=2, width=OBLONG[0], height=OBLONG[1])
    if name == "flux-control":
        return replace(request, controls=(Control(HINT),))
    return replace(request, image=picture(0, OBLONG), mask=mask(0, OBLONG))


def drawn(bundle: Bundle, request: Request, memory: MemoryMode = "fast") -> Any:
    with Pipeline(bundle, Settings(memory=memory)) as pipeline:
        return pipeline.generate([request])[0]


Kept = Callable[[str], tuple[Path, LocalFolders]]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Kept:
    """A model by name, and where its builds keep what they have in common."""

    def keep(name: str) -> tuple[Path, LocalFolders]:
        if name not in known:
            folder = tmp_path_factory.mktemp(name)
            known[name] = write_tiny(name, folder / "model"), LocalFolders(folder / "work")
        return known[name]

    known: dict[str, tuple[Path, LocalFolders]] = {}
    return keep


@pytest.mark.slow
@pytest.mark.usefixtures("own_kernels")
@pytest.mark.parametrize("precision", ["w8a8", "w4a8-g32-lr4", "fp32"])
@pytest.mark.parametrize("name", ["flux-fill", "flux-control"])
def test_bundles_of_both(name: str, precision: str, kept: Kept, tmp_path: Path) -> None:
    """Built, checked and drawn with, whole and memory-saving; in few bits nearly the source's
    images."""
    model, folders = kept(name)
    quantization = QuantOptions(calibration_prompts=PROMPTS, quality_prompts=PROMPTS, steps=2)
    options = BuildOptions("x86-64-cpu", precision, quantization=quantization)
    built = build(str(model), options, tmp_path / "bundle", folders)
    quantized = precision != "fp32"
    picture(0, OBLONG).save(tmp_path / "photo.png")
    mask(0, OBLONG).save(tmp_path / "mask.png")
    given = ["--control", tmp_path / "photo.png", "--control-from", "photo"]
    if name == "flux-fill":
        given = ["--image", tmp_path / "photo.png", "--mask", tmp_path / "mask.png"]
    made = []
    for memory in "fast", "stream":
        out = tmp_path / f"{memory}.png"
        outcome = run_cli(
            "generate", built.path, "-p", PROMPTS[0], "--seed", 3, "--steps", 2,
            "--size", "40x24", "--memory", memory, "-o", out, *given,
        )  # fmt: skip
        assert outcome.code == 0, outcome.err
        made.append(np.int32(Image.open(out)))
    off = np.abs(made[0] - made[1])
    assert off.mean() < 1 if quantized else off.max() <= 1
    again = tmp_path / "again.png"
    outcome = run_cli("generate", built.path, "--like", tmp_path / "fast.png", "-o", again, *given)
    assert outcome.code == 0, outcome.err
    assert np.array_equal(np.int32(Image.open(again)), made[0])
    assert run_cli("generate", built.path, "-p", "a cat", "-o", again).code == 2
    check_plan(str(model), built.bundle, precision, asked(name))
    if quantized:
        assert built.reference is not None
        wanted = drawn(built.reference, asked(name))
        assert psnr(drawn(built.bundle, asked(name)), wanted) > LEAST[precision]
        # In 8 bits less than what another picture changes.
        other: dict[str, Any] = {"image": picture(1, OBLONG)}
        if name == "flux-control":
            other = {"controls": (Control(random_picture(2, (63, 45))),)}
        changed = drawn(built.reference, replace(asked(name), **other))
        assert psnr(changed, wanted) < LEAST["w8a8"] - 3


LEAST = {"w8a8": 47, "w4a8-g32-lr4": 35}
"""PSNR in dB; seen were 51 and 38."""


def check_plan(model: str, bundle: Bundle, precision: Precision, request: Request) -> None:
    """What is planned for a large image is what the bundle asks for, its pictures aside."""
    size, own = (1024, 1024), kernels.usable([precision]) if precision != "fp32" else False
    rates = board("avx512_vnni" if own else None)
    plan = estimate_build(model, "x86-64-cpu", PlanRequest(precision, size, rates=rates))
    assert {*plan.components} == {*bundle.manifest.engines}
    large: dict[str, Any] = {"width": size[0], "height": size[1]}
    if request.image is not None:
        large |= {"image": picture(0, size), "mask": mask(0, size)}
    for mode, planned in plan.memory.items():
        with Pipeline(bundle, Settings(memory=mode)) as pipeline:  # type: ignore[arg-type]
            asked_for = pipeline.complete(replace(request, **large))
            told = pipeline.estimate(asked_for, 1) - pipeline.process_bytes
        networks = told - asked_for.picture_bytes(1)
        own_bytes = planned - rates.process_bytes - PROGRAM_BYTES
        assert own_bytes == pytest.approx(networks, rel=0.06), mode


@pytest.mark.parametrize("name", ["flux-fill", "flux-control"])
def test_plans_of_both(name: str, tmp_path: Path) -> None:
    model = write_tiny(name, tmp_path / "model")
    plan = "plan", model, "--target", "raspberry-pi-5", "--precision", "w4a8-g32"
    outcome = run_cli(*plan)
    assert outcome.code == 0, outcome.err
    rows = {line.split()[0] for line in outcome.out.splitlines() if line}
    assert {"modulation", "transformer", "vae_encoder", "vae_decoder"} <= rows
    assert_refused(run_cli(*plan, "--size", "62x64"), "width 62 isn't a multiple of 4")
    if name == "flux-control":
        assert_refused(run_cli(*plan, "--task", "inpaint"), "draws by a control image alone")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "w8a8"])
@pytest.mark.parametrize("name", ["flux-fill", "flux-control"])
def test_graphs_of_both_for_tensorrt(name: str, precision: str, kept: Kept, tmp_path: Path) -> None:
    """The build lints each graph; TensorRT takes the transformer's, where it is."""
    model, folders = kept(name)
    quantization = QuantOptions(calibration_prompts=PROMPTS, quality_prompts=(), steps=2)
    options = BuildOptions("jetson-orin-nano", precision, size=(64, 48), quantization=quantization)
    made = build(str(model), options, tmp_path / "bundle", folders)
    inputs = made.bundle.manifest.pipeline.components["transformer"].inputs
    shapes = {tensor.name: tensor.shape for tensor in inputs}
    assert shapes["sample"] == (1, 4 + 4, 24, 32)
    assert shapes.get("mask") == ((1, 1, 48, 64) if name == "flux-fill" else None)
    plan = estimate_build(
        str(model), "jetson-orin-nano", PlanRequest(precision, (64, 48), fixed=True)
    )
    assert plan.mode is not None and {*plan.components} == {*made.bundle.manifest.engines}
    pytest.importorskip("tensorrt_rtx")
    graph = made.bundle.path / made.bundle.manifest.engines["transformer"].path
    report = build_plan(
        graph, BuildSpec("transformer", "tensorrt_rtx", "sm_86"), tmp_path / "transformer.plan"
    )
    assert report.plan_bytes > 0
