"""Bundles with a ControlNet: built and used by commands, on graphs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch")

from edgesd.export import parity
from edgesd.export.external_data import write_model
from edgesd.export.pipeline import export_spec
from edgesd.export.to_onnx import graph_from_module
from edgesd.recipes import BuildOptions, LocalFolders, QuantOptions, build
from edgesd.recipes.sources import open_model
from edgesd.runtime.bundle import Bundle, open_bundle
from edgesd.runtime.footprint import Generation
from edgesd.runtime.recorded import recorded
from edgesd.spec.build import SideKind
from tests.support import assert_refused, random_picture, run_cli
from tests.tiny_pipelines import (
    adapter,
    controlnet,
    diffusers_images,
    for_adapter,
    tiny,
)

PROMPTS = ("a red apple", "the blue cat")
PICTURE = random_picture(1, (63, 45))


class Folders(NamedTuple):
    """A tiny pipeline and a ControlNet for it, as diffusers saves them; and a picture."""

    base: Path
    side: Path
    picture: Path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("tiny")
    pipeline = tiny("sd")
    pipeline.save_pretrained(root / "sd")
    controlnet(pipeline.unet).save_pretrained(root / "side")
    (root / "picture.png").write_bytes(PICTURE.raw)
    return Folders(root / "sd", root / "side", root / "picture.png")


def built(folders: Folders, out: Path, *options: Any) -> Bundle:
    outcome = run_cli(
        "build", folders.base, "--target", "x86-64-cpu", "--controlnet", f"{folders.side}:lines",
        *options, "--work", out.parent / "work", "-o", out,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    return open_bundle(out)


def generated(bundle: Path, out: Path, *options: Any) -> Any:
    return run_cli(
        "generate", bundle, "-p", PROMPTS[0], "--seed", 3, "--steps", 3, "--guidance", 4,
        "--size", "40x24", "-o", out, *options,
    )  # fmt: skip


def pixels(path: Path) -> Any:
    with Image.open(path) as image:
        return np.int32(image)


@pytest.fixture(scope="module")
def bundle(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return built(folders, tmp_path_factory.mktemp("built") / "fp32")


@pytest.mark.slow
def test_commands_build_and_show_a_picture(
    bundle: Bundle, folders: Folders, tmp_path: Path
) -> None:
    plain = tiny("sd")
    theirs: Any = diffusers.StableDiffusionControlNetPipeline(
        **plain.components, controlnet=controlnet(plain.unet), requires_safety_checker=False
    )
    theirs.set_progress_bar_config(disable=True)
    (wanted,) = diffusers_images(
        theirs, PROMPTS[:1], [3], image=PICTURE.decoded(), num_inference_steps=3, width=40,
        height=24, guidance_scale=4.0, controlnet_conditioning_scale=0.7, control_guidance_end=0.7,
    )  # fmt: skip
    out, options = tmp_path / "one.png", ("--control-scale", 0.7, "--control-end", 0.7)
    made = generated(bundle.path, out, "--control", folders.picture, *options)
    assert made.code == 0, made.err
    assert np.abs(pixels(out) - np.int32(wanted)).max() <= 1
    (record,) = recorded(out).controls
    assert (record.name, record.sha256, record.kind) == ("lines", PICTURE.sha256, "ready")
    assert (record.scale, record.start, record.end) == (0.7, 0.0, 0.7)
    # Again by what the image says; the picture must be given.
    again = tmp_path / "again.png"
    like = ("generate", bundle.path, "--like", out, "-o", again)
    assert_refused(run_cli(*like), "say where it is: --control FILE:lines")
    assert run_cli(*like, "--control", f"{folders.picture}:lines").code == 0
    assert again.read_bytes() == out.read_bytes()
    other = tmp_path / "other.png"
    other.write_bytes(random_picture(2, (30, 30)).raw)
    outcome = run_cli(*like, "--control", other)
    assert outcome.code == 0 and "isn't the picture that" in outcome.err
    assert (pixels(again) != pixels(out)).any()


@pytest.mark.slow
def test_pictures_of_all_kinds_and_what_is_refused(
    bundle: Bundle, folders: Folders, tmp_path: Path
) -> None:
    images = {}
    for kind in "hint", "photo":
        out = tmp_path / f"{kind}.png"
        made = generated(
            bundle.path, out, "--control", folders.picture, "--control-from", kind, "--guess-mode",
            "--json",
        )  # fmt: skip
        assert made.code == 0, made.err
        assert PICTURE.sha256 in made.out
        assert recorded(out).values["guess_mode"] is True
        images[kind] = pixels(out)
    assert (images["hint"] != images["photo"]).any()
    odd = shutil.copyfile(folders.picture, tmp_path / "a:lines")
    assert generated(bundle.path, tmp_path / "odd.png", "--control", odd).code == 0
    text = tmp_path / "text.png"
    text.write_text("no picture")
    for options, words in (
        (("--control", tmp_path / "none.png"), "none.png"),
        (("--control", text), "text.png"),
        (("--control", f"{folders.picture}:depth"), "unknown control 'depth'"),
        (("--control-scale", 1), "--control-scale goes with --control FILE"),
        (("--control", odd, "--control-scale", 1, "--control-scale", 2), "given 2 times for 1"),
        (("--control", odd, "--control", odd), "gets two control images"),
        (("--control", odd, "--control-start", 0.5, "--control-end", 0.5), "acts from 0.5 to 0.5"),
        (("--control", odd, "--control-scale", 99), "control-scale"),
        (("--guess-mode",), "guess mode is for"),
    ):
        assert_refused(generated(bundle.path, tmp_path / "refused.png", *options), words)
    assert not (tmp_path / "refused.png").exists()


@pytest.mark.slow
def test_a_bundle_says_what_it_was_built_with(bundle: Bundle, folders: Folders) -> None:
    manifest = bundle.manifest
    assert manifest.build is not None
    (side,) = manifest.build.sides
    assert (side.kind, side.name, side.model.name) == ("controlnet", "lines", "side")
    assert "controlnet-lines" in manifest.engines
    outcome = run_cli("build", folders.base, "--like", bundle.path)
    assert_refused(outcome, "say where all of them are: --controlnet FOLDER:NAME for each")


@pytest.mark.slow
def test_a_side_that_does_not_run_takes_no_memory(bundle: Bundle) -> None:
    from edgesd.runtime.fitting import bundle_costs
    from edgesd.runtime.flow import flow_of

    flow = flow_of(bundle.manifest.pipeline)
    costs = bundle_costs(bundle, flow.components, lambda component: False, 1 << 20)
    needs = [
        costs.need("fast", Generation(16, 16, 2, sides=sides)).resident
        for sides in (frozenset(), flow.sides)
    ]
    footprint = bundle.manifest.engines["controlnet-lines"].footprint
    assert footprint is not None and needs[1] - needs[0] > footprint.weights


def test_graphs_of_a_controlnet_and_of_an_adapter(folders: Folders, tmp_path: Path) -> None:
    """Of any size and batch, where the control image has a multiple of the latents' sizes."""
    cases_: tuple[tuple[SideKind, Path | None], ...] = (
        ("controlnet", folders.side),
        ("adapter", None),
    )
    for kind, side in cases_:
        base = folders.base
        if side is None:
            pipeline = for_adapter(tiny("sd"))
            base, side = tmp_path / "base", tmp_path / "adapter"
            pipeline.save_pretrained(base)
            adapter(pipeline.unet, channels=1).save_pretrained(side)
        export = export_spec(open_model(str(base), sides=[(kind, str(side))]))
        component = next(one for one in export.components if one.name == kind)
        module = component.load()
        cases = parity.reference_cases(module, component)
        write_model(graph_from_module(module, component, "ort-mha"), tmp_path / kind)
        graph = tmp_path / kind / "model.onnx"
        assert parity.check_parity(graph, component, cases, "fp32").rel_rms < 1e-5


def test_the_plan_has_it(folders: Folders) -> None:
    plan = ("plan", folders.base, "--target", "raspberry-pi-5", "--precision", "w8a8")
    outcome = run_cli(*plan, "--controlnet", folders.side)
    assert outcome.code == 0, outcome.err
    lines = [line.split()[0] for line in outcome.out.splitlines() if line]
    assert "controlnet" in lines


@pytest.mark.slow
def test_a_controlnet_is_quantized_with_its_unet(folders: Folders, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    bundle = built(
        folders, tmp_path / "w8a8", "--precision", "w8a8",
        "--calibration-prompts", prompts, "--quality-prompts", prompts,
    )  # fmt: skip
    recipe, quality = bundle.manifest.recipe, bundle.manifest.quality
    assert recipe is not None and quality is not None
    quantized = {layer.component for layer in recipe.layers if layer.scheme == "w8a8"}
    assert {"controlnet-lines", "unet"} <= quantized
    assert quality.psnr_min > 30
    plain = tmp_path / "plain.png"
    assert generated(bundle.path, plain).code == 0
    for memory in "fast", "balanced", "stream":
        out = tmp_path / f"{memory}.png"
        made = generated(bundle.path, out, "--control", folders.picture, "--memory", memory)
        assert made.code == 0, made.err
        assert np.abs(pixels(out) - pixels(tmp_path / "fast.png")).mean() < 1
        assert np.abs(pixels(out) - pixels(plain)).max() > 8


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "w8a8"])
def test_graphs_for_tensorrt_pass_their_checks(precision: str, tmp_path: Path) -> None:
    """Of fixed shapes, with a ControlNet and an adapter at once; the build lints each graph."""
    pipeline = for_adapter(tiny("sdxl"))
    pipeline.save_pretrained(tmp_path / "sdxl")
    controlnet(pipeline.unet).save_pretrained(tmp_path / "net")
    adapter(pipeline.unet).save_pretrained(tmp_path / "adapter")
    quantization = QuantOptions(calibration_prompts=PROMPTS, quality_prompts=(), steps=2)
    options = BuildOptions("jetson-orin-nano", precision, quantization=quantization)
    made = build(
        str(tmp_path / "sdxl"),
        options,
        tmp_path / "bundle",
        LocalFolders(
            tmp_path / "work",
            controlnets=(str(tmp_path / "net"),),
            adapters=(str(tmp_path / "adapter"),),
        ),
    )
    components = made.bundle.manifest.pipeline.components
    assert {"controlnet", "adapter"} <= {*components}
    assert components["unet"].input("feature_3") is not None
