"""LoRAs in the slots of a bundle make the images of diffusers with the same LoRAs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

import numpy as np
import torch

from edgesd.errors import InputError, UsageError
from edgesd.evaluate.psnr import psnr
from edgesd.export.lora.board import convert
from edgesd.recipes import BuildOptions, LocalFolders, QuantOptions, build
from edgesd.recipes.estimate import Estimate, PlanRequest
from edgesd.recipes.planner import estimate_build
from edgesd.runtime.bundle import Bundle
from edgesd.runtime.footprint import PROGRAM_BYTES
from edgesd.runtime.lora import Factors, Lora, Used, read_lora, slots_of
from edgesd.runtime.pipeline import Pipeline
from edgesd.runtime.recorded import recorded
from edgesd.runtime.requests import Request
from edgesd.runtime.settings import Settings
from edgesd.spec.lora import LoraFile
from tests.e2e.test_lora_images import (
    GUIDANCE,
    HEIGHT,
    PROMPT,
    SEED,
    STEPS,
    WIDTH,
    difference,
    theirs,
)
from tests.e2e.test_plan import board
from tests.loras import Tensors, kohya_lora, peft_lora, save
from tests.support import assert_refused, run_cli
from tests.tiny_pipelines import diffusers_images, tiny, write_tiny

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

RANK = 8


class Model(NamedTuple):
    """A tiny pipeline on disk, and a bundle of it with slots."""

    name: str
    folder: Path
    bundle: Bundle

    def used(self, tensors: Tensors, folder: Path, scale: float = 1.0) -> Used:
        """A LoRA, converted."""
        file = save(folder / f"{len(list(folder.iterdir()))}.safetensors", tensors)
        made = convert(str(file), self.bundle, file.with_suffix(".lora"))
        return Used(read_lora(made.path), scale)


def built(name: str, folder: Path, precision: str, slots: int | None, *loras: str) -> Bundle:
    source = folder / name
    if not source.exists():
        write_tiny(name, source)
    quantization = QuantOptions(quality_prompts=(), calibration_prompts=(PROMPT,), steps=STEPS)
    options = BuildOptions("x86-64-cpu", precision, lora_slots=slots, quantization=quantization)
    out = folder / f"{precision}-{slots}-{len(loras)}"
    return build(str(source), options, out, LocalFolders(folder / "work", loras=loras)).bundle


def made(name: str, root: Path) -> Model:
    return Model(name, root / name, built(name, root, "fp32", RANK))


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return made("sd", tmp_path_factory.mktemp("slots"))


@pytest.fixture
def pipeline(sd: Model) -> Iterator[Pipeline]:
    with Pipeline(sd.bundle, Settings(memory="fast")) as opened:
        yield opened


def drawn(pipeline: Pipeline, *loras: Used) -> Any:
    pipeline.use_loras(loras)
    request = Request(PROMPT, SEED, None, STEPS, GUIDANCE, height=HEIGHT, width=WIDTH)
    return pipeline.generate([request])[0]


def test_a_plan_counts_slots_that_are_filled(sd: Model) -> None:
    """As generating does with LoRAs of the largest rank in all slots."""
    size = WIDTH, HEIGHT

    def planned(slots: int | None, target: str = "x86-64-cpu") -> Estimate:
        request = PlanRequest("fp32", size, STEPS, GUIDANCE, rates=board(None), lora_slots=slots)
        return estimate_build(str(sd.folder), target, request)

    plan, plain = planned(RANK), planned(None)
    layers = {c: each.layers for c, each in slots_of(sd.bundle.manifest).items()}
    assert layers.keys() == {"unet", "text_encoder"}
    factors = {
        (component, slot.name): Factors(
            np.ones((slot.inputs, RANK), np.float16), np.ones((RANK, slot.outputs), np.float16)
        )
        for component, slots in layers.items()
        for slot in slots
    }
    lora = Lora("0" * 64, LoraFile(1, "full", "0" * 64, "sd"), factors)
    # In fp16 as they are read, and in fp32 as graphs take them.
    assert plan.lora_bytes == 3 * lora.bytes and plain.lora_bytes == 0
    process = board(None).process_bytes + PROGRAM_BYTES
    for mode, planned_bytes in plan.memory.items():
        assert planned_bytes > plain.memory[mode] + plan.lora_bytes
        with Pipeline(sd.bundle, Settings(memory=mode)) as pipeline:  # type: ignore[arg-type]
            pipeline.use_loras([Used(lora)])
            asked = Request(PROMPT, 1, None, STEPS, GUIDANCE, height=HEIGHT, width=WIDTH)
            told = pipeline.estimate(pipeline.complete(asked), 1) - pipeline.process_bytes
        assert planned_bytes - process == pytest.approx(told, rel=0.03), mode
    seconds, before = plan.seconds, plain.seconds
    assert seconds and before and all(seconds[mode] > before[mode] for mode in before)
    on_gpu = [planned(slots, "jetson-orin").memory["balanced"] for slots in (None, RANK)]
    assert on_gpu[1] - on_gpu[0] > plan.lora_bytes


def test_a_plan_of_a_merged_lora_reads_it(sd: Model, tmp_path: Path) -> None:
    style, other = (
        save(tmp_path / f"{name}.safetensors", peft_lora(tiny(name))) for name in ("sd", "sdxl")
    )
    plan = ("plan", sd.folder, "--target", "x86-64-cpu", "--lora-slots")
    told = run_cli(*plan, 4, "--lora", f"{style}:0.5")
    assert told.code == 0 and "LoRAs of rank 4 in all slots: " in told.out, told.err
    assert_refused(run_cli(*plan, 4, "--lora", other), "sdxl.safetensors", "that it was made for")
    assert_refused(run_cli(*plan, 513), "--lora-slots")


def of_linears(tensors: Tensors) -> Tensors:
    """Without convolutions of 3x3."""
    return {name: tensor for name, tensor in tensors.items() if "_conv" not in name}


def check_images(model: Model, pipeline: Pipeline, folder: Path) -> None:
    """One LoRA after another, both together, and none again, without loading anything anew."""
    peft = peft_lora(tiny(model.name), text=True)
    kohya = of_linears(kohya_lora(tiny(model.name), seed=1, text=True))
    one, two = model.used(peft, folder), model.used(kohya, folder)
    plain = drawn(pipeline)
    runners = {name: pipeline._loaded.runner(name) for name in pipeline.loaded}
    for loras, wanted in (
        ([one], {"one": (peft, 1.0)}),
        ([two._replace(scale=0.7)], {"two": (kohya, 0.7)}),
        ([one._replace(scale=0.5), two], {"one": (peft, 0.5), "two": (kohya, 1.0)}),
    ):
        found = drawn(pipeline, *loras)
        assert difference(found, theirs(model.name, wanted)) <= 1 < difference(found, plain)
    assert difference(drawn(pipeline, one._replace(scale=0.0)), plain) == 0
    assert difference(drawn(pipeline), plain) == 0
    assert runners == {name: pipeline._loaded.runner(name) for name in pipeline.loaded}


def test_images_are_those_of_diffusers(sd: Model, pipeline: Pipeline, tmp_path: Path) -> None:
    check_images(sd, pipeline, tmp_path)


@pytest.mark.slow
def test_images_of_two_encoders_are_those_of_diffusers(tmp_path: Path) -> None:
    """SDXL's first encoder has a layer that is never run: its part of a LoRA is left out."""
    model = made("sdxl", tmp_path)
    (tmp_path / "loras").mkdir()
    with Pipeline(model.bundle, Settings(memory="fast")) as pipeline:
        check_images(model, pipeline, tmp_path / "loras")
    file = save(tmp_path / "text.safetensors", peft_lora(tiny("sdxl"), text=True))
    unused = convert(str(file), model.bundle, tmp_path / "text.lora").unused
    assert unused and all("text_encoder." in name and ".layers.2." in name for name in unused)


def test_what_has_no_slot_is_refused_by_name(sd: Model, tmp_path: Path) -> None:
    def refused(tensors: Tensors, words: str) -> None:
        file = save(tmp_path / "style.safetensors", tensors)
        with pytest.raises(InputError, match=words):
            convert(str(file), sd.bundle, tmp_path / "style.lora")
        assert not (tmp_path / "style.lora").exists()

    refused(kohya_lora(tiny("sd")), r"conv1.* which have no slots.*build --lora")
    peft = peft_lora(tiny("sd"))
    name = next(name.removesuffix(".lora_A.weight") for name in peft if "lora_A" in name)
    rows = peft[f"{name}.lora_B.weight"].shape[0]
    refused({**peft, f"{name}.lora_magnitude_vector": torch.ones(rows)}, "DoRA.*build --lora")
    refused(peft_lora(tiny("sdxl")), "have no place in|changes weights of shape")
    large = save(tmp_path / "large.safetensors", peft_lora(tiny("sd"), rank=RANK + 1))
    with pytest.raises(UsageError, match=f"rank {RANK + 1}.*--lora-slots {RANK}"):
        convert(str(large), sd.bundle, tmp_path / "large.lora")


def test_commands(sd: Model, tmp_path: Path) -> None:
    file = save(tmp_path / "style.safetensors", peft_lora(tiny("sd"), text=True))
    board, bundle = tmp_path / "style.lora", sd.bundle.path
    assert run_cli("lora", "convert", file, "--for", bundle).code == 0
    assert_refused(run_cli("lora", "convert", file, "--for", bundle), "style.lora")
    assert_refused(run_cli("lora", "convert", ".", "--for", bundle), "is a folder")
    out = tmp_path / "image.png"
    options = ("--seed", 3, "--steps", 2, "--size", f"{WIDTH}x{HEIGHT}", "--guidance", GUIDANCE)
    asked = ("generate", bundle, "-p", PROMPT, *options, "-o", out, "--any-machine")
    assert run_cli(*asked, "--lora", f"{board}:0.5").code == 0
    said = recorded(out).made_by["loras"]
    assert said == f"{read_lora(board).sha256}:0.5"
    told = run_cli(*asked, "--like", out)
    assert told.code == 0 and "other LoRAs" in told.err
    broken = tmp_path / "broken.lora"
    broken.write_bytes(board.read_bytes()[:-4])
    refused = run_cli(*asked, "--lora", broken)
    assert refused.code == 3
    assert_refused(refused, "broken.lora", "copy it anew")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["w8a8", "w4a8-g32-lr4"])
def test_slots_of_quantized_bundles_are_as_good_as_merging(
    precision: str, sd: Model, tmp_path: Path
) -> None:
    """An image with a LoRA in slots is as near to fp32's as one that it was merged into before."""
    tensors = {name: tensor * 2 for name, tensor in peft_lora(tiny("sd")).items()}
    file = save(tmp_path / "style.safetensors", tensors)
    used = sd.used(tensors, tmp_path)
    with Pipeline(sd.bundle) as whole:
        wanted = drawn(whole, used)
    slotted = built("sd", tmp_path, precision, RANK)
    with Pipeline(slotted) as pipeline:
        found, empty = drawn(pipeline, used), drawn(pipeline)
    with Pipeline(built("sd", tmp_path, precision, None)) as pipeline:
        assert psnr(drawn(pipeline), empty) > 40  # sums are rounded in another order
    with Pipeline(built("sd", tmp_path, precision, None, str(file))) as pipeline:
        merged = drawn(pipeline)
    assert psnr(found, wanted) > psnr(merged, wanted) - 3
    assert psnr(found, wanted) > psnr(empty, wanted)


def lora_of_flux(width: int) -> Tensors:
    """Of fused layers of a tiny network, others, and those of its modulation, in Kohya's names."""
    shapes = {
        "double_blocks_0_img_attn_qkv": (3 * width, width),
        "double_blocks_1_txt_mod_lin": (6 * width, width),
        "single_blocks_1_linear2": (width, 5 * width),
        "single_blocks_0_modulation_lin": (3 * width, width),
    }
    generator = torch.Generator().manual_seed(7)
    found: Tensors = {}
    for name, (rows, columns) in shapes.items():
        for end, shape in (("down", (4, columns)), ("up", (rows, 4))):
            factor = torch.randn(shape, generator=generator)
            found[f"lora_unet_{name}.lora_{end}.weight"] = 0.3 * factor
    return found


@pytest.mark.slow
def test_a_lora_of_flux_fills_slots_of_both_its_networks(tmp_path: Path) -> None:
    tensors = lora_of_flux(tiny("flux-dev").transformer.inner_dim)
    bundle = built("flux-dev", tmp_path, "fp32", RANK)
    file = save(tmp_path / "style.safetensors", tensors)
    made = convert(str(file), bundle)
    used = Used(read_lora(made.path))
    assert made.layers == 3 + 3 and not made.unused
    assert {component for component, _ in used.lora.factors} == {"transformer", "modulation"}
    with Pipeline(bundle, Settings(memory="fast")) as pipeline:
        plain, found = drawn(pipeline), drawn(pipeline, used)
        assert difference(drawn(pipeline), plain) == 0
    theirs = tiny("flux-dev")
    theirs.load_lora_weights(dict(tensors))
    options = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
    (wanted,) = diffusers_images(theirs, [PROMPT], [SEED], width=WIDTH, height=HEIGHT, **options)
    assert difference(found, wanted) <= 1 < difference(found, plain)
    quantized = built("flux-dev", tmp_path, "w4a8-g32-lr4", RANK)
    made = convert(str(file), quantized, tmp_path / "other.lora")
    assert made.layers == 3 + 3
    with Pipeline(quantized, Settings(memory="fast")) as pipeline:
        empty = drawn(pipeline)
        filled = drawn(pipeline, Used(read_lora(made.path)))
        assert difference(drawn(pipeline), empty) == 0
    assert psnr(filled, wanted) > psnr(empty, plain) - 3
    assert psnr(filled, wanted) > psnr(empty, wanted) + 2
