"""What calibration records, against hooks that keep everything; and runs that are interrupted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from edgesd.errors import EdgesdError, InputError  # noqa: E402
from edgesd.export import calibrate as calibrating  # noqa: E402
from edgesd.export import examples  # noqa: E402
from edgesd.export.calibrate import (  # noqa: E402
    Calibration,
    CalibrationSettings,
    LayerStats,
    calibrate,
    calibration_key,
)
from edgesd.export.families import Component, ExportSpec  # noqa: E402
from edgesd.export.families.parts import flux_transformer  # noqa: E402
from edgesd.export.mapped import state_of  # noqa: E402
from edgesd.export.pipeline import export_spec  # noqa: E402
from edgesd.export.quantize.layers import Layer  # noqa: E402
from edgesd.export.source import resolve_source  # noqa: E402
from edgesd.export.tokenizer import write_tokenizer  # noqa: E402
from edgesd.export.torch_runner import TorchRunner  # noqa: E402
from edgesd.recipes.drawings import drawing  # noqa: E402
from edgesd.runtime.requests import Control  # noqa: E402
from edgesd.runtime.tokenizer import PromptTokenizer  # noqa: E402
from edgesd.spec.pipeline import (  # noqa: E402
    ComponentSpec,
    DecoderSpec,
    DenoiserSpec,
    InputSpec,
    Part,
    TensorSpec,
    TextSpec,
    Wiring,
)
from tests import tiny_pipelines  # noqa: E402
from tests.models import EMOJI  # noqa: E402
from tests.support import Recorded  # noqa: E402

pytestmark = pytest.mark.integration
HOW = CalibrationSettings(("a red apple", "a cat"), 2, 4.0, "ddim", 64, 64)
CALLS = {"text_encoder": 3, "unet": 4, "vae_decoder": 2}
"""Runs of each network: an empty prompt and two; two prompts of two steps; two images."""

Seen = dict[tuple[str, str], list[torch.Tensor]]
Tokenizers = dict[str, PromptTokenizer]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """On matrices this small, threads wait for each other more than they work."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


@pytest.fixture(scope="module")
def export() -> ExportSpec:
    return export_spec(resolve_source(EMOJI))


@pytest.fixture(scope="module")
def tokenizers(
    export: ExportSpec, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, PromptTokenizer]:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokens = export.pipeline.wiring.tokenizers["tokenizer"].max_tokens
    files = write_tokenizer(EMOJI / "tokenizer", folder, tokens)
    return {"tokenizer": PromptTokenizer(*files.values())}


@pytest.fixture(scope="module")
def layers(export: ExportSpec) -> list[Layer]:
    """Some layers of each network, made from its modules: of each kind, stride and kernel."""
    found = []
    for component in export.components:
        net = component.load().get_submodule("net")
        kinds = set()
        for name, module in net.named_modules():
            if isinstance(module, torch.nn.Conv2d):
                layer = Layer(
                    component.name, name, f"{name}/Conv", "conv", tuple(module.weight.shape),
                    strides=module.stride, pads=(module.padding * 2),
                )  # fmt: skip
            elif isinstance(module, torch.nn.Linear):
                layer = Layer(
                    component.name, name, f"{name}/MatMul", "linear", tuple(module.weight.shape)
                )
            elif isinstance(module, torch.nn.Embedding):
                layer = Layer(
                    component.name, name, f"{name}/Gather", "embedding", tuple(module.weight.shape)
                )
            else:
                continue
            kind = (layer.kind, layer.kernel, layer.strides, "to_k" in name, "time" in name)
            unused = {"vae_decoder": "encoder"}.get(component.name)
            if kind not in kinds and not (unused and name.startswith(unused)):
                kinds.add(kind)
                found.append(layer)
    return found


def watched(export: ExportSpec, layers: list[Layer], seen: Seen) -> ExportSpec:
    """The same spec, whose modules keep all inputs of the layers."""

    def loading(component: Any) -> Callable[[], torch.nn.Module]:
        def load() -> torch.nn.Module:
            module = component.load()
            for layer in layers:
                if layer.component == component.name:

                    def keep(
                        _: object, inputs: tuple[torch.Tensor, ...], key: tuple[str, str]
                    ) -> None:
                        seen.setdefault(key, []).append(inputs[0].detach().clone())

                    key = (component.name, layer.name)
                    module.get_submodule(f"net.{layer.name}").register_forward_pre_hook(
                        lambda m, i, keep=keep, key=key: keep(m, i, key)
                    )
            return module

        return load

    components = tuple(replace(c, load=loading(c)) for c in export.components)
    return replace(export, components=components)


@pytest.fixture(scope="module")
def recorded(
    export: ExportSpec,
    layers: list[Layer],
    tokenizers: dict[str, PromptTokenizer],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Calibration, Seen, list[tuple[str, int, int]]]:
    """A calibration in which every row counts, and what really went through the layers."""
    seen: Seen = {}
    told = Recorded()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrating, "ROWS_PER_RUN", 1 << 30)
        patch.setattr(calibrating, "BLOCKS", (288, 100))
        found = calibrate(
            watched(export, layers, seen), layers, HOW, tokenizers,
            tmp_path_factory.mktemp("calibration"), told,
        )  # fmt: skip
    return found, seen, told.updates


def step_of(layer: Layer, call: int) -> int:
    """The timestep of a run of its network."""
    return call % 2 if layer.component == "unet" else 0


def rows_of(layer: Layer, x: torch.Tensor) -> npt.NDArray[np.float64]:
    """Rows of the matrix product by torch's own unfold, whose columns are channel-major."""
    if layer.kind != "conv":
        return np.asarray(x.reshape(-1, layer.channels).double())
    top, left, bottom, right = layer.pads
    assert (top, left) == (bottom, right)
    unfolded = torch.nn.functional.unfold(
        x, layer.kernel, padding=(top, left), stride=layer.strides
    )
    batch, _, count = unfolded.shape
    taps = layer.kernel[0] * layer.kernel[1]
    by_channel = unfolded.reshape(batch, layer.channels, taps, count).permute(0, 3, 2, 1)
    return np.asarray(by_channel.reshape(batch * count, -1).double())


def loaded(calibration: Calibration, layer: Layer) -> LayerStats:
    stats = calibration.layer(layer)
    assert stats is not None
    return stats


def test_all_kinds_of_layers_are_there(layers: list[Layer]) -> None:
    kinds = {(layer.component, layer.kind, layer.kernel, layer.strides) for layer in layers}
    assert ("unet", "conv", (3, 3), (2, 2)) in kinds
    assert ("unet", "conv", (1, 1), (1, 1)) in kinds
    assert ("unet", "linear", (1, 1), (1, 1)) in kinds
    assert {component for component, *_ in kinds} == set(CALLS)
    assert any(layer.kind == "embedding" for layer in layers)


def test_covariances_are_those_of_all_rows(
    recorded: tuple[Calibration, Seen, object], layers: list[Layer]
) -> None:
    calibration, seen, _ = recorded
    for layer in layers:
        if layer.kind == "embedding":
            assert calibration.layer(layer) is None
            continue
        stats = loaded(calibration, layer)
        calls = seen[layer.component, layer.name]
        assert len(calls) == CALLS[layer.component]
        rows = np.concatenate([rows_of(layer, x) for x in calls])
        assert stats.count == len(rows)
        assert stats.rows_per_run == len(rows_of(layer, calls[-1]))
        widths = [len(block) for block in stats.blocks]
        assert sum(widths) == layer.columns and widths[0] == min(layer.columns, 288)
        start = 0
        for block in stats.blocks:
            part = rows[:, start : start + len(block)]
            wanted = part.T @ part
            np.testing.assert_allclose(block, wanted, rtol=1e-3, atol=1e-5 * np.abs(wanted).max())
            start += len(block)


def test_ranges_are_those_of_each_timestep(
    recorded: tuple[Calibration, Seen, object], layers: list[Layer]
) -> None:
    calibration, seen, _ = recorded
    for layer in layers:
        if layer.kind == "embedding":
            continue
        stats = loaded(calibration, layer)
        steps = 2 if layer.component == "unet" else 1
        assert stats.low.shape == stats.high.shape == (steps, layer.channels)
        for step in range(steps):
            calls = seen[layer.component, layer.name]
            mine = [x for call, x in enumerate(calls) if step_of(layer, call) == step]
            axes = (0, 2, 3) if layer.kind == "conv" else tuple(range(mine[0].ndim - 1))
            least = np.min([x.numpy().min(axes) for x in mine], axis=0)
            np.testing.assert_array_equal(stats.low[step], least)
            largest = np.max([x.numpy().max(axes) for x in mine], axis=0)
            np.testing.assert_array_equal(stats.high[step], largest)


def test_the_sample_holds_rows_of_every_run(
    recorded: tuple[Calibration, Seen, object], layers: list[Layer]
) -> None:
    calibration, seen, _ = recorded
    for layer in layers:
        if layer.kind == "embedding":
            continue
        stats = loaded(calibration, layer)
        assert stats.rows.dtype == np.float16 and stats.rows.shape[1] == layer.columns
        assert len(stats.rows) == len(stats.row_steps) <= calibrating.SAMPLE_ROWS
        of_runs = [
            (step_of(layer, call), {row.tobytes() for row in rows_of(layer, x).astype(np.float16)})
            for call, x in enumerate(seen[layer.component, layer.name])
        ]
        used = set()
        for row, step in zip(stats.rows, stats.row_steps, strict=True):
            runs = [
                n for n, (at, rows) in enumerate(of_runs) if at == step and row.tobytes() in rows
            ]
            assert runs
            used.update(runs)
        assert used == set(range(len(of_runs)))


def test_what_is_told_and_written(
    recorded: tuple[Calibration, Seen, list[tuple[str, int, int]]], export: ExportSpec
) -> None:
    calibration, _, told = recorded
    assert told[:4] == [("text_encoder: calibrate", n, 3) for n in range(4)]
    assert told[4:9] == [("unet: calibrate", n, 4) for n in range(5)]
    assert told[9:] == [("vae_decoder: calibrate", n, 2) for n in range(3)]
    files = {f"{name}.safetensors" for name in CALLS} | {"timesteps.npy"}
    assert {p.name for p in calibration.folder.iterdir()} == files
    timesteps = calibration.timesteps()
    assert timesteps.dtype == np.float32 and timesteps.shape == (2,) and timesteps[0] > timesteps[1]
    spec = calibration.spec
    assert (spec.prompts, spec.num_inference_steps, spec.scheduler) == (2, 2, "ddim")
    assert (spec.height, spec.width, spec.guidance_scale) == (64, 64, 4.0)


# Models for inpainting.


@pytest.fixture(scope="module")
def inpainting(tmp_path_factory: pytest.TempPathFactory) -> tuple[ExportSpec, Tokenizers]:
    """A tiny random UNet of nine channels, and what reads its prompts."""
    folder = tmp_path_factory.mktemp("inpainting")
    tiny_pipelines.write_tiny("sd-inpaint", folder / "model")
    export = export_spec(resolve_source(folder / "model"))
    tokens = export.pipeline.wiring.tokenizers["tokenizer"].max_tokens
    files = write_tokenizer(folder / "model" / "tokenizer", folder, tokens)
    return export, {"tokenizer": PromptTokenizer(*files.values())}


def test_a_network_for_inpainting_sees_masks_and_what_they_leave(
    inpainting: tuple[ExportSpec, Tokenizers], tmp_path: Path
) -> None:
    export, tokenizers = inpainting
    pictures = (drawing(export.pipeline, 0),)
    how = replace(
        HOW, prompts=("a", "b", "c"), height=32, width=48, scheduler="euler", pictures=pictures
    )
    conv = Layer("unet", "conv_in", "", "conv", (16, 9, 3, 3), pads=(1, 1, 1, 1))
    first = Layer("vae_encoder", "encoder.conv_in", "", "conv", (16, 3, 3, 3), pads=(1, 1, 1, 1))
    seen: Seen = {}
    calibrate(watched(export, [conv, first], seen), [conv, first], how, tokenizers, tmp_path)
    with calibrating.safe_open(tmp_path / "unet.safetensors", "numpy") as file:
        made = file.get_tensor("outputs")
    images = [x.numpy() for x in seen["vae_encoder", "encoder.conv_in"]]
    assert len(images) == 8 and not images[0].any()
    shown = 2 * Control(pictures[0]).hint(48, 32) - 1
    np.testing.assert_array_equal(images[1], shown)
    beside = np.load(tmp_path / "beside.npy")
    runs = [x.numpy() for x in seen["unet", "conv_in"]]
    assert len(runs) == 6
    grey, drawn = beside[:1], beside[1:]
    for index, (start, later) in enumerate(zip(runs[::2], runs[1::2], strict=True)):
        given = start[:1, 4:]
        for half in (*start, *later):  # of guidance, at each step
            assert np.array_equal(half[4:], given[0])
        mask = given[:, :1]
        assert set(np.unique(mask)) <= {0.0, 1.0} and mask.mean() == (1 / 2, 1 / 4, 1 / 2)[index]
        earlier = made[index - 1] if index else drawn
        assert np.array_equal(given[:, 1:], np.where(mask, grey, earlier))
        image, rest = images[2 + index], images[5 + index]
        hidden = examples.example_mask(index, 32, 48)
        assert np.array_equal(rest, image * (1 - hidden)) and image.any()
    before = files_of(tmp_path)
    calibrate(export, [conv, first], how, tokenizers, tmp_path)
    assert files_of(tmp_path) == before


def test_a_network_that_draws_by_a_picture_is_shown_another_each_time(tmp_path: Path) -> None:
    tiny_pipelines.write_tiny("flux-control", tmp_path / "model")
    export = export_spec(resolve_source(tmp_path / "model"))
    tokenizers = {}
    for folder, tokens in export.pipeline.wiring.tokenizers.items():
        path = tmp_path / "model" / folder
        cls = "CLIPTokenizer" if folder == "tokenizer" else "T5TokenizerFast"
        (tmp_path / folder).mkdir()
        files = write_tokenizer(path, tmp_path / folder, tokens.max_tokens, (), cls)
        tokenizers[folder] = PromptTokenizer(*files.values())
    pictures = drawing(export.pipeline, 0), drawing(export.pipeline, 1)
    prompts = ("a", "b", "c")
    how = CalibrationSettings(prompts, 2, 3.5, "flow-euler", 24, 40, pictures=pictures)
    linear = Layer("transformer", "x_embedder", "", "linear", (32, 32))
    first = Layer("vae_encoder", "encoder.conv_in", "", "conv", (8, 3, 3, 3), pads=(1, 1, 1, 1))
    seen: Seen = {}
    work = tmp_path / "work"
    calibrate(watched(export, [linear, first], seen), [linear, first], how, tokenizers, work)
    latents = np.load(work / "beside.npy")[1:]
    runs = [x.numpy() for x in seen["transformer", "x_embedder"]]
    assert len(latents) == 2 and len(runs) == 3 * 2
    for index, run in enumerate(runs):
        wanted = flux_transformer.packed(torch.from_numpy(latents[index // 2 % 2][None])).numpy()
        assert np.array_equal(run[..., run.shape[2] // 2 :], wanted)
    images = [x.numpy() for x in seen["vae_encoder", "encoder.conv_in"]]
    shown = [2 * Control(picture).hint(40, 24) - 1 for picture in pictures]
    for index in range(3):  # grey, the pictures, and those made are before these
        assert np.array_equal(images[3 + 3 + index], shown[index % 2])


# Interrupted, damaged, repeated.


class StoppedError(Exception):
    """What the user's Ctrl-C stands for here."""


class Stopping(Recorded):
    """Raises StoppedError when `at` parts of a component's calibration are done."""

    def __init__(self, component: str, at: int) -> None:
        super().__init__()
        self.last = f"{component}: calibrate", at

    def update(self, task: str, done: int, *others: object, **more: object) -> None:
        if (task, done) == self.last:
            raise StoppedError


@pytest.fixture
def few(layers: list[Layer]) -> list[Layer]:
    """Enough layers to see a difference, few enough to be quick."""
    return [layer for layer in layers if layer.columns <= 300]


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def whole(
    export: ExportSpec,
    layers: list[Layer],
    tokenizers: dict[str, PromptTokenizer],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, bytes]:
    """The files of a run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    few = [layer for layer in layers if layer.columns <= 300]
    calibrate(export, few, HOW, tokenizers, folder)
    return files_of(folder)


@pytest.mark.parametrize(
    ("component", "at"), [("text_encoder", 1), ("unet", 2), ("vae_decoder", 1)]
)
def test_a_run_that_was_interrupted_ends_with_the_same_bytes(
    component: str,
    at: int,
    export: ExportSpec,
    few: list[Layer],
    tokenizers: dict[str, PromptTokenizer],
    whole: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(calibrating, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(calibrating, "SAVE_SHARE", 0.0)
    with pytest.raises(StoppedError):
        calibrate(export, few, HOW, tokenizers, tmp_path, Stopping(component, at))
    assert not list(tmp_path.glob("*.part")) and not list(tmp_path.glob(".*"))
    started = {p.stem for p in tmp_path.glob("*.safetensors")}
    order = list(CALLS)
    assert started == set(order[: order.index(component) + (at > 0)])
    told = Recorded()
    calibrate(export, few, HOW, tokenizers, tmp_path, told)
    assert told.updates[0][:2] == (f"{component}: calibrate", at)
    assert files_of(tmp_path) == whole


def test_a_finished_run_is_not_repeated(
    export: ExportSpec,
    few: list[Layer],
    tokenizers: dict[str, PromptTokenizer],
    whole: dict[str, bytes],
    tmp_path: Path,
) -> None:
    for name, data in whole.items():
        (tmp_path / name).write_bytes(data)

    def load() -> torch.nn.Module:
        raise AssertionError("nothing has to be loaded")

    unloadable = replace(export, components=tuple(replace(c, load=load) for c in export.components))
    told = Recorded()
    calibrate(unloadable, few, HOW, tokenizers, tmp_path, told)
    assert told.updates == [] and files_of(tmp_path) == whole


def test_layers_that_a_finished_run_left_out_are_recorded(
    export: ExportSpec, few: list[Layer], tokenizers: dict[str, PromptTokenizer], tmp_path: Path
) -> None:
    calibrate(export, few[:2], HOW, tokenizers, tmp_path)
    found = calibrate(export, few, HOW, tokenizers, tmp_path)
    for layer in few:
        assert (found.layer(layer) is None) == (layer.kind == "embedding"), layer.name


def _cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _renamed(data: bytes) -> bytes:
    return data.replace(b"edgesd", b"edgest", 1)


def _without_done(data: bytes) -> bytes:
    return data.replace(b'\\"done\\"', b'\\"dome\\"', 1)


@pytest.mark.parametrize(
    "damage", [_cut, _renamed, _without_done, lambda data: b"", lambda data: b"\xff" * 64],
    ids=["cut", "other metadata", "no count", "empty", "noise"],
)  # fmt: skip
def test_a_damaged_state_is_recorded_again(
    damage: Callable[[bytes], bytes],
    export: ExportSpec,
    few: list[Layer],
    tokenizers: dict[str, PromptTokenizer],
    whole: dict[str, bytes],
    tmp_path: Path,
) -> None:
    for name, data in whole.items():
        (tmp_path / name).write_bytes(data)
    state = tmp_path / "text_encoder.safetensors"
    state.write_bytes(damage(whole[state.name]))
    assert state.read_bytes() != whole[state.name]
    calibrate(export, few, HOW, tokenizers, tmp_path)
    assert files_of(tmp_path) == whole


def test_statistics_that_cannot_be_read(
    whole: dict[str, bytes], few: list[Layer], tmp_path: Path
) -> None:
    layer = next(x for x in few if x.component == "unet" and x.kind != "embedding")
    (tmp_path / "unet.safetensors").write_bytes(_cut(whole["unet.safetensors"]))
    with pytest.raises(EdgesdError, match=r"unet\.safetensors can't be read .*: remove it"):
        Calibration(tmp_path, HOW.spec()).layer(layer)
    with pytest.raises(EdgesdError, match="remove it and run again"):
        Calibration(tmp_path / "none", HOW.spec()).layer(layer)


def test_samples_of_many_layers_share_their_space(monkeypatch: pytest.MonkeyPatch) -> None:
    wide, narrow = (
        Layer("unet", str(columns), "", "linear", (8, columns)) for columns in (40_000, 100)
    )
    rows = calibrating._sample_rows([wide, narrow])
    assert rows == {wide: calibrating.LEAST_ROWS, narrow: calibrating.SAMPLE_ROWS}
    many = [replace(narrow, name=str(n)) for n in range(50)]
    monkeypatch.setattr(calibrating, "SAMPLES_BYTES", 2_000_000)
    assert set(calibrating._sample_rows(many).values()) == {200}
    monkeypatch.setattr(calibrating, "SAMPLES_BYTES", 1)
    assert set(calibrating._sample_rows(many).values()) == {calibrating.LEAST_ROWS}


def test_a_state_that_takes_long_to_write_is_written_less_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = calibrating._State(tmp_path, "unet")
    monkeypatch.setattr(calibrating, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(calibrating, "SAVE_SHARE", 1e9)
    state.save(1, False, {"one": torch.zeros(1)})
    assert not state.due()
    monkeypatch.setattr(calibrating, "SAVE_SHARE", 0)
    state.save(2, False, {"one": torch.zeros(1)})
    assert state.due()


# Values that are not finite.


@pytest.mark.parametrize(
    ("component", "bad"),
    [*zip(CALLS, (math.nan, math.inf, math.nan), strict=True)],
)
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_weights_that_are_not_finite(
    component: str,
    bad: float,
    export: ExportSpec,
    tokenizers: dict[str, PromptTokenizer],
    whole: dict[str, bytes],
    tmp_path: Path,
) -> None:
    order = list(CALLS)
    for name in order[: order.index(component)]:
        (tmp_path / f"{name}.safetensors").write_bytes(whole[f"{name}.safetensors"])
    component_of = {c.name: c for c in export.components}

    def load() -> torch.nn.Module:
        module = component_of[component].load()
        with torch.no_grad():
            next(p for p in reversed(state_of(module).values()) if p.ndim == 1).fill_(bad)
        return module

    broken = replace(
        export,
        components=tuple(
            replace(c, load=load) if c.name == component else c for c in export.components
        ),
    )
    with pytest.raises(InputError) as caught:
        calibrate(broken, [], HOW, tokenizers, tmp_path)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and "finite" in message
    assert not (tmp_path / f"{component}.safetensors").exists()


def test_the_prompt_that_is_at_fault_is_counted_right(
    export: ExportSpec, tokenizers: dict[str, PromptTokenizer], tmp_path: Path
) -> None:
    calls = 0
    (encoder,) = (c for c in export.components if c.name == "text_encoder")

    def load() -> torch.nn.Module:
        module = encoder.load()

        def spoil(_: object, __: object, out: torch.Tensor) -> torch.Tensor:
            nonlocal calls
            calls += 1
            return out * math.nan if calls == 2 else out

        module.register_forward_hook(spoil)
        return module

    broken = replace(
        export,
        components=tuple(replace(c, load=load) if c is encoder else c for c in export.components),
    )
    with pytest.raises(InputError, match="calibration prompt 1:"):
        calibrate(broken, [], HOW, tokenizers, tmp_path)


def test_a_prompt_that_is_no_text(
    export: ExportSpec, tokenizers: dict[str, PromptTokenizer], tmp_path: Path
) -> None:
    with pytest.raises(InputError) as caught:
        calibrate(export, [], replace(HOW, prompts=("a\0b",)), tokenizers, tmp_path)
    assert len(str(caught.value).splitlines()) == 1


# Parts.


def recorder(layer: Layer, runs: int, steps: int = 1) -> Any:
    tensors: dict[str, torch.Tensor] = {}
    calibrating._allocate(tensors, layer, steps, 288, calibrating._sample_rows([layer])[layer])
    return calibrating._StatsRecorder(
        torch.nn.Module(), [], steps, runs, tensors, lambda done: None
    )


def test_values_beyond_float16_are_kept_finite() -> None:
    layer = Layer("vae_decoder", "conv", "conv/Conv", "conv", (8, 16, 3, 3), pads=(1, 1, 1, 1))
    one = recorder(layer, 1)
    one._record(layer, torch.full((1, 16, 4, 4), 1e5))
    assert torch.isfinite(one.tensors["conv:rows"]).all()


def test_no_covariance_is_kept_where_none_is_wanted() -> None:
    layer = Layer("unet", "linear", "linear/MatMul", "linear", (8, 16))
    tensors: dict[str, torch.Tensor] = {}
    calibrating._allocate(tensors, layer, 1, 0, calibrating._sample_rows([layer])[layer])
    assert not [name for name in tensors if "block" in name]
    one = calibrating._StatsRecorder(
        torch.nn.Module(), [layer][:0], 1, 1, tensors, lambda done: None, covariance=False
    )
    one._record(layer, torch.arange(32.0).reshape(1, 2, 16))
    assert not [name for name in tensors if "block" in name]
    assert int(tensors["linear:used"]) == 2 and float(tensors["linear:high"].max()) == 31


@pytest.mark.parametrize(("runs", "tokens"), [(4, 50), (16, 400), (2000, 64)])
def test_the_sample_is_spread_over_all_runs(runs: int, tokens: int) -> None:
    layer = Layer("unet", "linear", "linear/MatMul", "linear", (8, 16))
    one = recorder(layer, runs)
    for run in range(runs):
        one._record(layer, torch.full((1, tokens, 16), float(run)))
    used = int(one.tensors["linear:used"])
    assert used <= calibrating.SAMPLE_ROWS
    seen = one.tensors["linear:rows"][:used, 0]
    assert float(seen.max()) >= 0.9 * (runs - 1) and float(seen.min()) <= 0.1 * runs
    share = used / runs
    for quarter in range(4):
        low, high = runs * quarter // 4, runs * (quarter + 1) // 4
        mine = int(((seen >= low) & (seen < high)).sum())
        assert mine == pytest.approx(share * (high - low), rel=0.1)


@pytest.mark.parametrize(("total", "limit"), [(1, 512), (7, 7), (8, 7), (513, 512), (4096, 512)])
def test_rows_are_spread_evenly(total: int, limit: int) -> None:
    at = calibrating._spread(total, limit).numpy()
    assert len(at) == min(total, limit) == len(set(at.tolist()))
    assert at[0] == 0 and at[-1] < total
    assert set(np.diff(at).tolist()) <= {total // len(at), -(-total // len(at))}


@pytest.mark.parametrize(
    ("kernel", "strides", "pads"),
    [((3, 3), (1, 1), (1, 1, 1, 1)), ((3, 3), (2, 2), (0, 0, 1, 1)), ((1, 1), (1, 1), (0,) * 4)],
)
def test_rows_of_a_conv(
    kernel: tuple[int, int], strides: tuple[int, int], pads: tuple[int, int, int, int]
) -> None:
    layer = Layer("unet", "c", "c/Conv", "conv", (6, 5, *kernel), strides, pads)
    x, weight = torch.randn(2, 5, 8, 9), torch.randn(6, 5, *kernel)
    rows, count = calibrating._rows(layer, x, 1 << 30)
    assert count == len(rows)
    top, left, bottom, right = pads
    padded = torch.nn.functional.pad(x, (left, right, top, bottom))
    expected = torch.nn.functional.conv2d(padded, weight, stride=strides)
    product = rows @ weight.permute(0, 2, 3, 1).reshape(6, -1).T
    torch.testing.assert_close(product, expected.permute(0, 2, 3, 1).reshape(-1, 6))
    few, total = calibrating._rows(layer, x, 10)
    assert len(few) == 10 and total == count


def test_blocks_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = [Layer("unet", str(n), str(n), "linear", (8, 4608)) for n in range(10)]
    assert calibrating._block_size(wide) == 4608
    monkeypatch.setattr(calibrating, "COVARIANCE_BYTES", 10 * 4 * 4608 * 1152)
    assert calibrating._block_size(wide) == 1152
    monkeypatch.setattr(calibrating, "COVARIANCE_BYTES", 1)
    assert calibrating._block_size(wide) == calibrating.BLOCKS[-1]
    table = Layer("text_encoder", "e", "e", "embedding", (50000, 768))
    assert calibrating._block_size([table]) == calibrating.BLOCKS[0]


def test_the_key_is_of_all_that_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    key = calibration_key(HOW, "ab")
    assert key == calibration_key(replace(HOW), "ab") and len(key) == 16
    others = [
        replace(HOW, prompts=("a red apple",)),
        replace(HOW, prompts=("a cat", "a red apple")),
        replace(HOW, num_inference_steps=3),
        replace(HOW, guidance_scale=4.5),
        replace(HOW, scheduler="euler"),
        replace(HOW, height=128),
        replace(HOW, width=128),
        replace(HOW, first_seed=1),
        replace(HOW, covariance=False),
    ]
    keys = {calibration_key(other, "ab") for other in others} | {calibration_key(HOW, "abc")}
    monkeypatch.setattr(calibrating, "ROWS_PER_RUN", 100)
    keys.add(calibration_key(HOW, "ab"))
    assert key not in keys and len(keys) == len(others) + 2


def test_a_torch_module_behind_the_runner_protocol(export: ExportSpec) -> None:
    (component,) = (c for c in export.components if c.name == "vae_decoder")
    module = component.load()
    with TorchRunner(component.spec, module) as runner:
        runner.bind({"latents": (1, 4, 8, 8)})
        x = np.random.default_rng(0).standard_normal((1, 4, 8, 8), dtype=np.float32)
        runner.inputs["latents"][:] = x
        runner.run()
        (first,) = runner.outputs.values()
        with torch.inference_mode():
            np.testing.assert_array_equal(first, module(torch.from_numpy(x)).numpy())
        before = first.copy()
        runner.inputs["latents"][:] = -x
        runner.run()
        assert next(iter(runner.outputs.values())) is first and not np.array_equal(first, before)
        assert runner.seconds > 0
        with pytest.raises(InputError, match="takes the inputs"):
            runner.bind({"sample": (1, 4, 8, 8)})
    assert runner.outputs == {}


# Other pipelines: what runs, and on what, follows from the wiring.


class Encoder(torch.nn.Module):
    """ids [1, 77] -> hidden [1, 77, width] and pooled [1, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(1, width))

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = torch.tanh(self.net(ids[..., None].float() / 1000))
        return hidden, hidden.mean(1)


class Denoiser(torch.nn.Module):
    """Keeps what it was given of the encoders."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 4))
        self.given: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, states: torch.Tensor, pooled: torch.Tensor
    ) -> torch.Tensor:
        self.given.append((states.clone(), pooled.clone()))
        text = states.mean((1, 2)) + pooled.mean(1) + t * 1e-3
        out: torch.Tensor = torch.tanh(self.net(x.movedim(1, -1)).movedim(-1, 1))
        return out + text[:, None, None, None]


class Decoder(torch.nn.Module):
    """z [1, 4, h, w] -> image [1, 3, h, w]."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 3))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.net(z.movedim(1, -1)).movedim(-1, 1)
        return out


def two_encoders(export: ExportSpec) -> tuple[ExportSpec, Denoiser]:
    """A pipeline of two text encoders, of which the second also gives a pooled state."""

    def tensor(name: str, *shape: int | str, dtype: str = "float32") -> TensorSpec:
        return TensorSpec(name, dtype, shape)

    ids, denoiser = tensor("ids", "batch", 77, dtype="int64"), Denoiser()
    latents = ("batch", 4, "height", "width")
    modules = {"words": Encoder(5), "style": Encoder(3), "denoiser": denoiser, "decoder": Decoder()}
    outputs = {
        name: (tensor("hidden", "batch", 77, width), tensor("pooled", "batch", width))
        for name, width in (("words", 5), ("style", 3))
    }
    specs = [
        *(ComponentSpec(name, (ids,), both) for name, both in outputs.items()),
        ComponentSpec(
            "denoiser",
            (
                tensor("x", *latents),
                tensor("t", 1),
                tensor("states", "batch", 77, 8),
                tensor("pooled", "batch", 3),
            ),
            (tensor("noise", *latents),),
        ),
        ComponentSpec(
            "decoder", (tensor("z", *latents),), (tensor("pixels", "batch", 3, "h", "w"),)
        ),
    ]
    hidden = (Part("words", "hidden"), Part("style", "hidden"))
    wiring = Wiring(
        texts=tuple(TextSpec(name, "tokenizer", "ids") for name in ("words", "style")),
        denoiser=DenoiserSpec(
            "denoiser",
            (
                InputSpec("x", "sample"),
                InputSpec("t", "timestep"),
                InputSpec("states", "joined", hidden),
                InputSpec("pooled", "joined", (Part("style", "pooled"),)),
            ),
            "noise",
        ),
        tokenizers=export.pipeline.wiring.tokenizers,
        decoder=DecoderSpec("decoder", "z", "pixels"),
        zero_negative=True,
    )
    pipeline = msgspec.structs.replace(
        export.pipeline, components={spec.name: spec for spec in specs}, wiring=wiring
    )
    components = tuple(
        Component(spec, lambda module=modules[spec.name]: module, ()) for spec in specs
    )
    return replace(export, pipeline=pipeline, components=components), denoiser


def test_each_stage_of_the_wiring_is_recorded(
    export: ExportSpec,
    tokenizers: dict[str, PromptTokenizer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    export, denoiser = two_encoders(export)
    layers = [
        Layer(name, "0", f"{name}/MatMul", "linear", (rows, columns))
        for name, rows, columns in (
            ("words", 5, 1), ("style", 3, 1), ("denoiser", 4, 4), ("decoder", 3, 4),
        )
    ]  # fmt: skip
    found = calibrate(export, layers, HOW, tokenizers, tmp_path / "whole")
    for layer in layers:
        stats = found.layer(layer)
        assert stats is not None and np.isfinite(stats.low).all() and stats.count > 0
    assert len(denoiser.given) == CALLS["unet"]
    states, pooled = denoiser.given[0]  # without a negative prompt: zeros
    assert states.shape == (2, 77, 8) and pooled.shape == (2, 3)
    assert not states[0].any() and states[1].any() and not pooled[0].any() and pooled[1].any()

    monkeypatch.setattr(calibrating, "SAVE_SECONDS", 0.0)
    for component in ("style", "denoiser"):
        stopping = Stopping(component, 1)
        with pytest.raises(StoppedError):
            calibrate(export, layers, HOW, tokenizers, tmp_path / "parts", stopping)
    calibrate(export, layers, HOW, tokenizers, tmp_path / "parts")
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "whole")
