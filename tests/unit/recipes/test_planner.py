"""plan, build and what is generated give one answer; what plan advises is true."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import msgspec
import pytest

pytest.importorskip("torch")

from edgesd import recipes
from edgesd.device.targets import get_target, usable_bytes
from edgesd.errors import TargetError
from edgesd.export.backends import get_lowering
from edgesd.export.cost.arena import arena_bytes
from edgesd.export.cost.costs import file_bytes
from edgesd.export.pipeline import export_spec
from edgesd.export.quantize.assign import planned
from edgesd.export.source import ModelSource, resolve_source
from edgesd.recipes import demo_model
from edgesd.recipes.estimate import Estimate, PlanRequest
from edgesd.recipes.footprints import ComponentForm, Networks
from edgesd.recipes.planner import estimate_build
from edgesd.runtime.backends import get_backend
from edgesd.runtime.fitting import Batch, Budget, Fitting
from edgesd.runtime.footprint import PROCESS_BYTES, PROGRAM_BYTES, Costs
from edgesd.runtime.memory import MEMORY_MODES, MemoryMode
from edgesd.runtime.modulation import ROWS
from edgesd.spec.build import BuildOptions
from edgesd.spec.scheme import parse_scheme
from tests.support import assert_refused, run_cli
from tests.tiny_pipelines import write_tiny

pytestmark = pytest.mark.integration

MB = 1 << 20


def sparse_model(folder: Path, blocks: tuple[int, ...], layers: int) -> Path:
    """The embedded pipeline with a larger UNet, whose weights are a hole in a file: headers and
    sizes are all that planning reads."""
    import diffusers
    import torch

    shutil.copytree(demo_model(), folder)
    shutil.rmtree(folder / "unet")
    (folder / "unet").mkdir()
    text = json.loads((folder / "text_encoder/config.json").read_text())
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(
            sample_size=32,
            in_channels=4,
            out_channels=4,
            cross_attention_dim=text["hidden_size"],
            block_out_channels=blocks,
            layers_per_block=layers,
            down_block_types=("CrossAttnDownBlock2D",) * (len(blocks) - 1) + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (len(blocks) - 1),
            attention_head_dim=8,
        )
    config = {**unet.config, "_class_name": "UNet2DConditionModel"}
    (folder / "unet/config.json").write_text(json.dumps(config))
    header, offset = {}, 0
    for name, value in unet.state_dict().items():
        end = offset + 2 * value.numel()
        shape = list(value.shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with (folder / "unet/diffusion_pytorch_model.fp16.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + offset)
    return folder


SHAPES: dict[str, tuple[tuple[int, ...], int]] = {
    "small": ((320, 768), 1),  # 102 million weights, in few operations
    "large": ((1280, 1920), 1),  # 848 million
    "medium": ((128, 256, 512, 512), 2),  # 136 million
    "sd15": ((320, 640, 1280, 1280), 2),  # 844 million: Stable Diffusion 1.5's UNet
}


class Models(dict[str, str]):
    """Name -> folder of a pipeline, made when it is first asked for."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root

    def __missing__(self, name: str) -> str:
        self[name] = str(sparse_model(self.root / name, *SHAPES[name]))
        return self[name]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return resolve_source(write_tiny("flux-dev", tmp_path_factory.mktemp("flux") / "flux-dev"))


@pytest.fixture(autouse=True)
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gigabytes of zeros aren't hashed."""
    monkeypatch.setattr(ModelSource, "sha256", lambda _: "0" * 64)


PRECISIONS = ("fp32", "fp16", "w8a8", "w4a8-g64")


class BegunError(Exception):
    """A build was accepted, and began its work."""


def accepts(model: str, options: BuildOptions, out: Path, **named: Any) -> bool:
    """Whether `build` begins."""
    try:
        recipes.build(model, options, out, **named)
    except BegunError:
        return True
    except TargetError as exc:
        assert "MB" in str(exc), exc
        return False
    raise AssertionError("the build came to an end")


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> None:
    def begin(*_: object, **__: object) -> None:
        raise BegunError

    monkeypatch.setattr("edgesd.recipes.BundleWriter", begin)


TABLE = [
    ("large", "raspberry-pi-5-1gb", "w4a8-g64", "fast"),
    ("large", "raspberry-pi-5-1gb", "w8a8", "stream"),
    ("large", "raspberry-pi-5-1gb", "fp16", None),
    ("small", "raspberry-pi-zero-2w", "w8a8", "balanced"),
    ("small", "jetson-orin-nano-4gb", "fp16", "fast"),
    *(
        pytest.param(*row, marks=pytest.mark.slow)
        for row in (
            ("sd15", "raspberry-pi-5-1gb", "w4a8-g64", "fast"),
            ("sd15", "raspberry-pi-5-1gb", "w8a8", "stream"),
            ("sd15", "raspberry-pi-5-1gb", "fp16", None),
            ("sd15", "raspberry-pi-5-8gb", "fp32", "fast"),
            ("medium", "raspberry-pi-zero-2w", "w4a8-g64", None),
            ("medium", "raspberry-pi-zero-2w", "w8a8", "balanced"),
        )
    ),
]


@pytest.mark.parametrize(("model", "target", "precision", "mode"), TABLE)
def test_build_accepts_what_plan_says_fits_and_nothing_else(
    models: Models,
    begun: None,
    tmp_path: Path,
    model: str,
    target: str,
    precision: str,
    mode: str | None,
) -> None:
    plan = estimate_build(models[model], target, PlanRequest(precision))
    assert plan.mode == mode
    options = BuildOptions(target, precision)
    assert accepts(models[model], options, tmp_path / "b") == (mode is not None)


@pytest.mark.parametrize(
    ("size", "batch", "fits"),
    [((256, 256), 1, True), ((512, 512), 1, False), ((256, 256), 8, False)],
)
def test_fixed_sizes_and_batches_count(
    models: Models,
    begun: None,
    tmp_path: Path,
    size: tuple[int, int],
    batch: int,
    fits: bool,
) -> None:
    target = "raspberry-pi-zero-2w"
    asked = PlanRequest("w8a8", size, fixed=True, batch=batch)
    assert (estimate_build(models["small"], target, asked).mode is not None) == fits
    options = BuildOptions(target, "w8a8", size=size, batch=batch)
    assert accepts(models["small"], options, tmp_path / "b") == fits


def test_chunks_of_fixed_shapes_count(models: Models) -> None:
    few, many = (
        estimate_build(
            models["small"],
            "x86-64-cpu",
            PlanRequest("fp32", (256, 256), fixed=True, prompt_chunks=chunks),
        )
        for chunks in (1, 32)
    )
    (denoiser,) = (
        name for name in few.components if few.components[name].macs != many.components[name].macs
    )
    cost, other = few.components[denoiser], many.components[denoiser]
    assert sum(cost.macs.values()) < sum(other.macs.values())
    assert cost.memory["stream"] < other.memory["stream"] and cost.bytes == other.bytes


def follow(plan: Estimate, model: str, asked: PlanRequest, advice: str) -> Estimate:
    """The plan of what a line of advice says."""
    words = advice.split()
    given = {
        word[2:]: words[place + 1] for place, word in enumerate(words) if word.startswith("--")
    }
    size = tuple(int(n) for n in given["size"].split("x")) if "size" in given else asked.size
    limit = asked.max_memory
    if "max-memory" in given:
        limit = int(given["max-memory"].removesuffix("MB")) * 10**6
    changed = PlanRequest(given.get("precision", asked.precision), size, max_memory=limit)  # type: ignore[arg-type]
    return estimate_build(model, given.get("target", plan.target), changed)


@pytest.mark.parametrize(
    ("model", "target", "asked", "expected"),
    [
        ("large", "raspberry-pi-5-1gb", PlanRequest("fp16"), "--precision w8a8"),
        ("small", "raspberry-pi-zero-2w", PlanRequest("w8a8", (512, 512)), "--size"),
        ("large", "raspberry-pi-zero-2w", PlanRequest("w8a8"), "--target"),
        (
            "large",
            "raspberry-pi-5-1gb",
            PlanRequest("w4a8-g64", max_memory=100 * MB),
            "--max-memory",
        ),
        *(
            pytest.param(*row, marks=pytest.mark.slow)
            for row in (
                ("medium", "raspberry-pi-zero-2w", PlanRequest("w4a8-g64"), "--precision w8a8"),
                ("small", "raspberry-pi-zero-2w", PlanRequest("fp32", (1024, 1024)), "w8a8 --size"),
                ("sd15", "raspberry-pi-zero-2w", PlanRequest("w8a8"), "--target"),
            )
        ),
    ],
)
def test_all_advice_fits_when_it_is_followed(
    models: Models, model: str, target: str, asked: PlanRequest, expected: str
) -> None:
    plan = estimate_build(models[model], target, asked)
    assert plan.mode is None and any(expected in line for line in plan.advice), plan.advice
    for line in plan.advice:
        other = follow(plan, models[model], asked, line)
        assert other.mode is not None, line
        if " MB in " in line:
            assert f"{other.memory[other.mode] / 1e6:.0f} MB in {other.mode} mode" in line


@pytest.mark.parametrize(
    ("model", "target"),
    [
        ("small", "raspberry-pi-zero-2w"),
        ("large", "raspberry-pi-5-1gb"),
        pytest.param("medium", "raspberry-pi-zero-2w", marks=pytest.mark.slow),
        pytest.param("sd15", "raspberry-pi-5-1gb", marks=pytest.mark.slow),
    ],
)
def test_a_precision_is_advised_if_and_only_if_it_fits(
    models: Models, model: str, target: str
) -> None:
    plans = {p: estimate_build(models[model], target, PlanRequest(p)) for p in PRECISIONS}
    fits = [p for p in PRECISIONS if plans[p].mode]  # the finest first
    assert fits and len(fits) < len(PRECISIONS), "nothing to advise"
    for precision, plan in plans.items():
        advised = [line.split()[1] for line in plan.advice if line.startswith("--precision")]
        expected = [] if precision in fits else fits[:1]
        assert advised == expected, (precision, plan.advice)
        assert not (plan.mode and plan.advice)


KNOWN: dict[tuple[str, str, bool], Costs] = {}


def costs_of(plan: Estimate, model: str) -> Costs:
    """What a bundle of a plan would say of its graphs."""
    key = (model, plan.precision, plan.kernels)
    if key not in KNOWN:
        spec = export_spec(resolve_source(model))
        networks, lowering = Networks(spec), get_lowering(plan.backend)
        footprints = {}
        for stage in networks.flow.stages:
            workload = networks.trace_own(stage)
            quantized = plan.precision not in ("fp32", "fp16")
            schemes = planned(workload.layers, parse_scheme(plan.precision)) if quantized else {}
            on_disk = file_bytes(workload, schemes, 2 if plan.precision == "fp16" else 4, True)
            form = ComponentForm(plan.precision, lowering, schemes, on_disk, plan.kernels)
            footprints[stage.component] = networks.footprint(stage, form)
        process = PROCESS_BYTES + PROGRAM_BYTES + get_backend(plan.backend).process_bytes
        KNOWN[key] = Costs(spec.pipeline, footprints, {}, process)
    return KNOWN[key]


GRID = [
    pytest.param(
        *(target, precision, size, limit),
        marks=() if size == 256 and limit is None else pytest.mark.slow,
    )
    for target in ("raspberry-pi-zero-2w", "raspberry-pi-5-1gb", "raspberry-pi-5")
    for precision in PRECISIONS
    for size in (128, 256, 512)
    for limit in (None, 300 * MB)
]


@pytest.mark.parametrize(("target", "precision", "size", "limit"), GRID)
def test_plan_build_and_generate_give_one_answer(
    models: Models,
    begun: None,
    tmp_path: Path,
    target: str,
    precision: str,
    size: int,
    limit: int | None,
) -> None:
    """Generate's answer is that of a board with as much memory free as was planned with, by the
    footprints that the bundle would carry."""
    model = models["small"]
    asked = PlanRequest(precision, (size, size), max_memory=limit)
    plan = estimate_build(model, target, asked)
    costs = costs_of(plan, model)
    budget = Budget(limit, None if limit else usable_bytes(get_target(target)))
    batch = Batch(size, size, guided=plan.guidance > 1)

    def chosen(memory: MemoryMode | None = None) -> str | None:
        fit = Fitting(costs, budget, memory).choose(batch)
        return None if fit is None else fit.memory

    # Weights in their file may be read from there again in each run: generate does so where it must
    # (stream), and nothing is planned so.
    again = plan.mode is None and limit is None and chosen() == "stream"
    if again:
        assert plan.memory["stream"] > plan.usable_bytes
    else:
        assert chosen() == plan.mode
    if plan.mode is None and not again:
        assert not any(map(chosen, MEMORY_MODES))  # whichever is asked for by name
    elif plan.mode is not None:
        assert chosen(next(mode for mode in MEMORY_MODES if mode == plan.mode)) == plan.mode
    if limit is None and size == 256:  # the model's own
        options = BuildOptions(target, precision)
        assert accepts(model, options, tmp_path / "b") == (plan.mode is not None)


def test_build_says_what_would_fit(models: Models, tmp_path: Path) -> None:
    out = tmp_path / "b"
    outcome = run_cli(
        "build", models["large"], "--target", "raspberry-pi-5-1gb", "--precision", "fp16", "-o", out
    )  # fmt: skip
    assert outcome.code == 5 and not out.exists()
    assert_refused(outcome, "has 805 MB for it", "--precision w8a8 fits")


def test_a_build_that_needs_more_than_is_free_here_warns(
    models: Models, begun: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    for free in (1 << 30, 64 << 30):
        monkeypatch.setattr("edgesd.recipes.available_bytes", lambda free=free: free)
        options = BuildOptions("raspberry-pi-5", "w8a8")
        assert accepts(models["small"], options, tmp_path / "b", warn=told.append)
    assert len(told) == 1 and "1 GB are free here" in told[0]


def test_both_halves_of_guidance_take_the_same_weights(models: Models) -> None:
    """A network that is traced at two rows has the layers of the one at one row."""
    one, two = (
        estimate_build(models["small"], "raspberry-pi-5", PlanRequest("w4a8-g64", guidance=scale))
        for scale in (1, 5)
    )
    assert two.memory["fast"] - one.memory["fast"] < 40 * MB
    assert 0 < two.memory["balanced"] - one.memory["balanced"] < MB, "another prompt's embeddings"


def test_a_plan_needs_configs_alone(models: Models, tmp_path: Path) -> None:
    folder = tmp_path / "small"
    shutil.copytree(models["small"], folder, ignore=shutil.ignore_patterns("*.safetensors"))
    request = PlanRequest("w4a8-g64")
    bare, whole = (
        estimate_build(model, "raspberry-pi-5", request) for model in (str(folder), models["small"])
    )
    assert bare == msgspec.structs.replace(whole, model=str(folder))


@pytest.mark.parametrize("size", [None, (64, 48)])
def test_a_modulation_of_many_rows_is_one_of_single_rows(
    flux: ModelSource, size: tuple[int, int] | None
) -> None:
    """Graphs of fixed shapes always run `ROWS`; what sees a vector for each keeps its inputs."""
    networks = Networks(export_spec(flux, size))
    stage = networks.flow.modulation
    assert stage is not None
    layers = networks.trace_own(stage).layers
    assert layers and all(layer.one_row for layer in layers)
    denoiser = networks.trace_own(networks.flow.denoiser).layers
    assert denoiser and not any(layer.one_row for layer in denoiser)
    schemes = planned(layers, parse_scheme("w4a8-g32"))
    lowering = get_lowering("onnxruntime")
    runs = networks.footprint(stage, ComponentForm("w4a8-g32", lowering, schemes, 10**6)).runs
    assert [units for units, *_ in runs] == ([1, 4, ROWS] if size is None else [ROWS])


def test_a_batch_takes_as_much_for_each_image(flux: ModelSource) -> None:
    """Each image's tokens are a slice of what attention made of text and image."""
    networks = Networks(export_spec(flux))
    stage = networks.flow.denoiser
    form = ComponentForm("fp32", get_lowering("onnxruntime"), {}, 10**6)
    one, two = (networks.trace(stage, (8, 8, batch)) for batch in (1, 2))
    assert [op.kind for op in one.operations] == [op.kind for op in two.operations]
    touched = [arena_bytes([form.lowered(each)]) for each in (one, two)]
    assert touched[1] < 2.2 * touched[0]


def test_a_huge_size_is_planned_and_does_not_fit(models: Models) -> None:
    plan = estimate_build(models["small"], "raspberry-pi-5", PlanRequest("w8a8", (16384, 16384)))
    assert plan.mode is None and min(plan.memory.values()) > plan.usable_bytes
