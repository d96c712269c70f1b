"""edgesd plan beside what is built: layers, kernels, bytes."""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from pathlib import Path

import msgspec
import onnx_ir as ir
import pytest

pytest.importorskip("torch")

from edgesd.export.cost.cpu_lowering import (
    EDGESD_FORMS,
    EDGESD_INT4,
    EDGESD_INT8,
    EDGESD_ROWS,
    FUSED,
    lower_workload,
)
from edgesd.export.cost.workload import Workload, trace
from edgesd.export.pipeline import export_spec
from edgesd.export.quantize.assign import planned
from edgesd.export.source import resolve_source
from edgesd.recipes import DEMO, BuildOptions, LocalFolders, QuantOptions, build, demo_model
from edgesd.recipes.estimate import Estimate, PlanRequest
from edgesd.recipes.footprints import footprinted
from edgesd.recipes.planner import estimate_build
from edgesd.runtime import kernels
from edgesd.runtime.bundle import Bundle
from edgesd.runtime.footprint import PROGRAM_BYTES
from edgesd.runtime.rates import Rate, Rates
from edgesd.spec.scheme import parse_scheme
from tests.quantizing import fused_in
from tests.support import assert_refused, run_cli

pytestmark = pytest.mark.usefixtures("kept_exports", "own_kernels")

SCHEME = "w8a8"


@pytest.fixture(scope="module")
def bundle(
    kept_exports: object, own_kernels: object, work: Path, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    how = QuantOptions("rtn", calibration_prompts=("red apple",), quality_prompts=(), steps=1)
    options = BuildOptions("x86-64-cpu", SCHEME, quantization=how)
    out = tmp_path_factory.mktemp("plan") / "demo"
    return build(DEMO, options, out, LocalFolders(work)).bundle


@pytest.fixture(scope="module")
def workloads() -> dict[str, Workload]:
    plan = export_spec(resolve_source(demo_model()))
    return {c.name: trace(c, c.sizes[0]) for c in plan.components}


def test_layers_are_those_of_the_graphs(workloads: dict[str, Workload], bundle: Bundle) -> None:
    recipe = bundle.manifest.recipe
    assert recipe is not None
    for name, workload in workloads.items():
        built = {(la.name, la.kind, la.shape) for la in recipe.layers if la.component == name}
        assert {(la.name, la.kind, la.shape) for la in workload.layers} == built


def test_a_layer_that_sees_one_row_is_told_from_others(workloads: dict[str, Workload]) -> None:
    rows = {layer.name: layer.one_row for layer in workloads["unet"].layers}
    assert rows["time_embedding.linear_1"] and not any(
        one for name, one in rows.items() if "attn" in name
    )


def test_kernels_are_those_of_the_graphs(workloads: dict[str, Workload], bundle: Bundle) -> None:
    if not kernels.usable([SCHEME]):
        pytest.skip("edgesd's own kernels can't be used here: edgesd kernels build")
    kinds = {"conv": "QuantConv", "linear": "QuantLinear"}
    for name, workload in workloads.items():
        made = lower_workload(workload, planned(workload.layers, parse_scheme(SCHEME)), True, False)
        counted = Counter(
            "QuantRows" if op.form == EDGESD_ROWS else kinds[op.kind]
            for op in made.operations
            if op.form in EDGESD_FORMS
        )
        graph = ir.load(bundle.path / name / "kernels.onnx").graph
        assert counted == Counter(node.op_type for node in graph if node.domain == "edgesd")
        # What became part of a layer isn't there any more.
        for kind, operator in {"group_norm": "InstanceNormalization", "gelu": "Gelu"}.items():
            left = sum(op.kind == kind and op.form != FUSED for op in made.operations)
            assert left == sum(node.op_type == operator for node in graph), (name, kind)
        inside = {EDGESD_INT8, EDGESD_INT4}
        layers = [op for op in made.operations if op.layer is not None and op.form in inside]
        assert {op.layer.name: set(op.fused) for op in layers if op.layer} == fused_in(graph), name


def test_multiplications_are_counted(workloads: dict[str, Workload]) -> None:
    unet = workloads["unet"]
    first = next(op for op in unet.operations if op.kind == "conv")
    assert first.layer is not None and first.layer.name == "conv_in"
    pixels = unet.sizes[unet.inputs[0]] // 4 // first.layer.channels
    assert first.macs == pixels * first.layer.rows * first.layer.columns
    attention = [op for op in unet.operations if op.kind == "attention"]
    assert all(op.macs == 2 * b * h * n * m * d for op in attention for b, h, n, m, d in [op.heads])


def test_bytes_on_disk_are_those_of_the_bundle(bundle: Bundle) -> None:
    plan = estimate_build(DEMO, "x86-64-cpu", PlanRequest(SCHEME, method="rtn"))
    for name, cost in plan.components.items():
        assert cost.bytes == pytest.approx(bundle.weight_bytes(name), rel=0.2), name
    assert plan.bundle_bytes == pytest.approx(bundle.disk_bytes(), rel=0.1)


def test_modes_and_sizes_order_memory() -> None:
    def peaks(size: int, precision: str = "w4a8-g32") -> dict[str, int]:
        return estimate_build(DEMO, "x86-64-cpu", PlanRequest(precision, (size, size))).memory

    small, large = peaks(64), peaks(512)
    assert all(large[mode] > small[mode] for mode in small)
    assert large["fast"] > large["balanced"] > large["stream"]
    assert peaks(64, "fp32")["fast"] > small["fast"]


def board(instruction_set: str | None) -> Rates:
    kinds = (
        "add",
        "relu",
        "gelu",
        "silu",
        "layer_norm",
        "group_norm",
        "copy",
        "concat",
        "resize",
        "map",
    )
    rates = [Rate(kind, "", (1000,), 1e-6) for kind in [*kinds, "fresh"]]
    rates.append(Rate("read", "", (1000,), 1e-9))
    for form in ("fp32", "int8", "matmul_nbits", "edgesd_int8", "edgesd_int4"):
        rates += [Rate(kind, form, (100, 100, 100), 1e-4) for kind in ("conv", "linear")]
        rates.append(Rate("attention", form, (1, 100, 100, 100), 1e-4))
    return Rates("a board", "1.0", instruction_set, 0, 50 << 20, tuple(rates))


def test_time_is_of_all_runs_and_in_proportion_to_steps() -> None:
    def seconds(steps: int, guidance: float) -> Estimate:
        request = PlanRequest(SCHEME, None, steps, guidance, rates=board("avx512_vnni"))
        return estimate_build(DEMO, "x86-64-cpu", request)

    one, two, guided = seconds(1, 1), seconds(2, 1), seconds(1, 3)
    assert one.seconds and two.seconds and guided.seconds and one.kernels
    step = two.seconds["balanced"] - one.seconds["balanced"]
    unet = one.components["unet"].seconds["balanced"]
    assert unet is not None and step == pytest.approx(unet, rel=0.05)
    assert guided.components["unet"].runs == {"fast": 1, "balanced": 2, "stream": 2}
    # Of rates of 1e10 a second, which all products have.
    macs = sum(one.components["unet"].macs.values())
    assert unet == pytest.approx(macs / 1e10, rel=0.3)


def test_kernels_are_planned_where_the_board_has_them() -> None:
    def own(target: str, precision: str, rates: Rates | None = None) -> bool:
        return estimate_build(DEMO, target, PlanRequest(precision, rates=rates)).kernels

    assert own("raspberry-pi-5", "w8a8") and not own("raspberry-pi-4", "w8a8")
    assert own("x86-64-cpu", "w4a8-g32") and not own("x86-64-cpu", "w8a8")
    assert own("x86-64-cpu", "w8a8", board("avx_vnni"))
    assert not own("raspberry-pi-5", "w8a8", board(None)) and not own("raspberry-pi-5", "fp32")


def test_what_doesnt_fit_says_what_would() -> None:
    plan = estimate_build(
        DEMO, "x86-64-cpu", PlanRequest("w8a8", (1024, 1024), max_memory=260 << 20)
    )
    assert plan.mode is None and any("--size" in line for line in plan.advice)
    tiny = estimate_build(DEMO, "x86-64-cpu", PlanRequest("w8a8", max_memory=1 << 20))
    assert tiny.mode is None and "no precision or size" in tiny.advice[0]


def test_a_gpu_holds_four_bits_as_four() -> None:
    held = []
    for precision in ("fp32", "fp16", "w8a16", "w4a16-g64"):
        plan = estimate_build(DEMO, "jetson-orin", PlanRequest(precision))
        held.append(plan.memory["fast"])
    # 4.3 million weights, of which 1.7 million are linears'; activations are in fp32 at first.
    assert held == sorted(held, reverse=True)
    assert held[1] - held[2] > 3_000_000 and held[2] - held[3] > 500_000


def test_a_gpu_has_no_stream_and_no_time() -> None:
    plan = estimate_build(DEMO, "jetson-orin", PlanRequest("fp16"))
    assert plan.backend == "tensorrt" and set(plan.memory) == {"fast", "balanced"}
    assert plan.seconds is None


def test_the_command_tells_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    told = run_cli("plan", DEMO, "--target", "raspberry-pi-5", "--precision", "w8a8", "--json")
    assert told.code == 0
    plan = msgspec.json.decode(told.out, type=Estimate)
    assert plan.target == "raspberry-pi-5" and plan.seconds is None
    assert plan.judged_by == "psnr"
    shown = run_cli("plan", DEMO, "--target", "raspberry-pi-5", "--precision", "w8a8")
    assert "the build judges its images by PSNR" in shown.out
    assert "edgesd profile" in shown.out and f"{plan.memory['stream'] / 1e6:.0f}" in shown.out
    path = tmp_path / "rates.json"
    path.write_bytes(msgspec.json.encode(board("neon_dotprod")))
    timed = run_cli("plan", DEMO, "--target", "raspberry-pi-5", "--rates", path, "--json")
    assert json.loads(timed.out)["rates"] == "a board"
    assert json.loads(timed.out)["judged_by"] is None, "in fp32"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--target", "raspberry-pi-55"], ["raspberry-pi-5"]),
        (["--target", "raspberry-pi-5", "--precision", "w3a3"], ["w3a3"]),
        (["--target", "raspberry-pi-5", "--size", "65x64"], ["multiple"]),
        (["--target", "raspberry-pi-5", "--backend", "tensorrt"], ["tensorrt"]),
        (["--target", "raspberry-pi-5", "--steps", "0"], ["steps"]),
        (["--target", "raspberry-pi-5", "--guidance", "nan"], ["guidance"]),
        (["--target", "raspberry-pi-5", "--rates", "none.json"], ["none.json", "profile"]),
    ],
)
def test_wrong_input_is_one_line(arguments: list[str], words: list[str]) -> None:
    assert_refused(run_cli("plan", DEMO, *arguments), *words)


def test_a_model_that_isnt_there_is_refused(tmp_path: Path) -> None:
    assert_refused(run_cli("plan", tmp_path / "none", "--target", "raspberry-pi-5"), "none")


def test_a_full_autoencoder_is_planned_in_halves_where_it_is_streamed(tmp_path: Path) -> None:
    import diffusers

    from tests.e2e.test_export import variant

    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (16, 16, 32, 32),
        "norm_num_groups": 8,
        "layers_per_block": 1,
        "latent_channels": 4,
    }
    folder = variant(tmp_path, {}, diffusers.AutoencoderKL(**blocks), diffusers.DDIMScheduler())
    plans = {
        size: estimate_build(
            str(folder),
            "x86-64-cpu",
            PlanRequest("w8a8", (size, size), 1, 1, rates=board("avx512_vnni"), tasks=("image",)),
        )
        for size in (512, 1024)
    }
    for half, slower, least in (("vae_decoder", 2, 4), ("vae_encoder", 1.5, 2)):
        for plan in plans.values():
            cost = plan.components[half]
            assert cost.memory["stream"] < cost.memory["balanced"]
            whole, tiled = cost.seconds["balanced"], cost.seconds["stream"]
            assert whole is not None and tiled is not None
            assert slower * whole < tiled < 8 * whole
        # The whole grows with the image; of the tiles only the image and its features do, which
        # are larger in an encoder.
        small, large = (plan.components[half].memory for plan in plans.values())
        assert large["balanced"] - small["balanced"] > least * (large["stream"] - small["stream"])


def test_plan_says_what_the_bundle_itself_says(bundle: Bundle) -> None:
    """One model of cost: the figures that a bundle carries are those that were planned, with
    attention in 8 bits, which a build that compares no images leaves in fp32."""
    from edgesd.runtime.pipeline import Pipeline
    from edgesd.runtime.requests import Request
    from edgesd.runtime.settings import Settings

    own = kernels.usable([SCHEME])
    as_planned = copy.copy(bundle)
    as_planned.manifest = footprinted(bundle.manifest, export_spec(resolve_source(demo_model())))
    target = "x86-64-cpu"
    rates = board("avx512_vnni" if own else None)
    for size in (128, 512):
        plan = estimate_build(
            DEMO, target, PlanRequest(SCHEME, (size, size), rates=rates, method="rtn")
        )
        for mode, planned_bytes in plan.memory.items():
            with Pipeline(as_planned, Settings(memory=mode)) as pipeline:  # type: ignore[arg-type]
                request = pipeline.complete(Request("a cat", 1, height=size, width=size))
                told = pipeline.estimate(request, 1) - pipeline.process_bytes
            assert planned_bytes - (50 << 20) - PROGRAM_BYTES == pytest.approx(
                told, rel=0.06, abs=3 << 20
            ), mode


def test_layers_that_got_a_better_scheme_count_as_they_were_written(bundle: Bundle) -> None:
    """As --min-psnr promotes them: what counts is the recipe of the finished bundle."""
    manifest, spec = bundle.manifest, export_spec(resolve_source(demo_model()))
    assert manifest.recipe is not None
    written = manifest.engines["unet"]
    assert footprinted(manifest, spec, attention=False).engines["unet"] == written
    largest = max(
        (la for la in manifest.recipe.layers if la.component == "unet" and la.scheme == SCHEME),
        key=lambda la: la.bytes,
    )
    count = math.prod(largest.shape)
    better = msgspec.structs.replace(largest, scheme="fp16", method="fp16", bytes=2 * count)
    layers = tuple(better if la == largest else la for la in manifest.recipe.layers)
    recipe = msgspec.structs.replace(manifest.recipe, layers=layers)
    weights = manifest.files["unet/weights.bin"]
    more = msgspec.structs.replace(weights, bytes=weights.bytes + 2 * count - largest.bytes)
    files = {**manifest.files, "unet/weights.bin": more}
    changed = msgspec.structs.replace(manifest, recipe=recipe, files=files)
    found = footprinted(changed, spec, attention=False).engines["unet"]
    for before, after in (
        (written.footprint, found.footprint),
        (written.kernels_footprint, found.kernels_footprint),
    ):
        if before is not None:  # fp16 is computed with in fp32
            assert after is not None and after.weights - before.weights > 2 * count


def test_what_was_planned_is_what_is_taken(bundle: Bundle, tmp_path: Path) -> None:
    """In a process of its own; PNG and all."""
    import subprocess
    import sys

    for size, options in ((512, ("--memory", "stream")), (512, ("--memory", "fast"))):
        command = (
            *(sys.executable, "-m", "edgesd", "generate", str(bundle.path), "-p", "a cat"),
            *("--size", str(size), "--steps", "1", "--any-machine", "--json"),
            *("-o", str(tmp_path / f"{options[1]}.png"), *options),
        )
        told = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
        taken = json.loads(told.stdout)["peak_memory_bytes"]
        rates = board("avx512_vnni" if kernels.usable([SCHEME]) else None)
        request = PlanRequest(
            SCHEME, (size, size), rates=msgspec.structs.replace(rates, process_bytes=66 << 20)
        )
        assert estimate_build(DEMO, "x86-64-cpu", request).memory[options[1]] == pytest.approx(
            taken, rel=0.15
        )
