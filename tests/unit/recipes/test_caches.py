"""What earlier versions kept is found again: names of cache entries don't follow those in code."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import msgspec
import pytest

pytest.importorskip("torch")

import torch

from edgesd.errors import EdgesdError, InputError
from edgesd.export import calibrate
from edgesd.export.quantize import store as store_module
from edgesd.export.quantize.layers import Layer
from edgesd.export.quantize.methods import get_method
from edgesd.export.quantize.store import LayerStore
from edgesd.progress import SILENT
from edgesd.recipes.comparison import Comparison
from edgesd.runtime.requests import CompleteRequest, Request
from edgesd.spec.pipeline import PipelineSpec, ShapeSpec
from edgesd.spec.scheme import Scheme
from tests.support import pipeline_spec

pytestmark = pytest.mark.integration


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names depend on torch, and on how many threads share the sums."""
    monkeypatch.setattr(torch, "__version__", "2.0")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


def test_statistics_of_a_calibration() -> None:
    asked = calibrate.CalibrationSettings(("a cat", "a dog"), 20, 7.5, "ddim", 64, 64)
    assert calibrate.calibration_key(asked, "0" * 64) == "4e9c6533bc8ecb9a"


@pytest.mark.parametrize(
    ("method", "key"), [("gptq", "5d66e17c0e272b2f"), ("rtn", "dbc12c89c850ed53")]
)
def test_quantized_layers(tmp_path: Path, method: str, key: str) -> None:
    calibration: Any = SimpleNamespace(folder=Path("calibration-4e9c6533bc8ecb9a"))
    no: Any = None
    store = LayerStore(tmp_path, {}, calibration, get_method(method), tmp_path, no, no)
    assert store.folder.name == f"layers-{key}"


def test_layers_of_a_checkpoint_that_has_changed_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would be taken for those of the checkpoint as it was."""

    def check() -> None:
        raise InputError("changed")

    for name in ("matrix_of", "quantize_layer"):
        monkeypatch.setattr(store_module, name, lambda *given: None)
    graphs: Any = SimpleNamespace(check=check)
    calibration: Any = SimpleNamespace(folder=tmp_path / "c", layer=lambda layer: None)
    layer: Any = MagicMock(component="unet")
    layer.name = "conv_in"
    no: Any = None
    store = LayerStore(graphs, {layer: no}, calibration, get_method("gptq"), tmp_path, no, no)
    with pytest.raises(InputError, match="changed"):
        store.get(layer, no)
    assert not store.folder.exists()


def _layer(name: str) -> Layer:
    return Layer("unet", name, f"{name}/Node", "linear", (4, 4))


def _store(folder: Path, monkeypatch: pytest.MonkeyPatch, get: Callable[..., None]) -> LayerStore:
    calibration: Any = SimpleNamespace(folder=folder / "c")
    no: Any = None
    store = LayerStore(no, {}, calibration, get_method("gptq"), folder, no, no)
    monkeypatch.setattr(store, "get", get)
    return store


def test_layers_are_quantized_once_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[tuple[Any, Any]] = []
    store = _store(tmp_path, monkeypatch, lambda *pair: got.append(pair))
    layers: list[Layer] = [_layer(f"conv{k}") for k in range(5)]
    there, scheme = layers[0], Scheme(8, 8)
    path = store.folder / "unet" / f"{there.name}.{scheme}.safetensors"
    path.parent.mkdir(parents=True)
    path.touch()
    shown: list[tuple[object, ...]] = []
    progress: Any = SimpleNamespace(update=lambda *seen: shown.append(seen))
    pairs: list[tuple[Any, Any]] = [(layer, scheme) for layer in layers]
    before = torch.get_num_threads()
    store.quantize([*pairs, *pairs, (layers[1], None)], progress, "unet: quantize")
    assert sorted(got, key=lambda pair: pair[0].name) == pairs[1:]
    assert shown[-1] == ("unet: quantize", 4, 4)
    assert torch.get_num_threads() == before


def test_after_a_layer_that_fails_no_other_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []
    cancelled = Event()

    class Pool(ThreadPoolExecutor):
        def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            cancelled.set()
            super().shutdown(wait=wait)

    def get(layer: Any, scheme: Any) -> None:
        begun.append(layer.name)
        if layer.name != "conv0":
            assert cancelled.wait(60)
        raise EdgesdError(f"{layer.name} holds NaN")

    monkeypatch.setattr(store_module, "ThreadPoolExecutor", Pool)
    store = _store(tmp_path, monkeypatch, get)
    layers: list[Layer] = [_layer(f"conv{k}") for k in range(9)]
    with pytest.raises(EdgesdError, match="conv0 holds NaN"):
        store.quantize([(layer, Scheme(8, 8)) for layer in layers], SILENT, "unet: quantize")
    # Of two workers, one goes on with a second layer at most.
    assert len(begun) <= 3


def test_images_of_a_source(tmp_path: Path) -> None:
    pipeline = msgspec.structs.replace(pipeline_spec(), shape=ShapeSpec(64, 64, 32, True, 8))
    manifest = SimpleNamespace(tools={"edgesd": "0.1", "torch": "2.0"}, pipeline=pipeline)
    reference: Any = SimpleNamespace(manifest=manifest)
    requests = [CompleteRequest("a cat", 7, "", 20, 7.5, 64, 64, "ddim")]
    no: Any = None
    comparison = Comparison([], reference, requests, no, tmp_path, SILENT)  # type: ignore[arg-type]
    assert comparison.folder.name == "pictures-99ee47d30db085ff"


def test_images_of_other_defaults_are_others(tmp_path: Path) -> None:
    """Of a pipeline with another sampler, and of zeros in place of no words."""
    spec = pipeline_spec()
    zeros = msgspec.structs.replace(spec.wiring, zero_negative=True)
    euler = msgspec.structs.replace(spec.scheduler, name="euler")

    def folder(pipeline: PipelineSpec, *negative: str) -> str:
        reference: Any = SimpleNamespace(manifest=SimpleNamespace(tools={}, pipeline=pipeline))
        requests, no = [Request("a cat", 7, *negative)], None
        made: Any = Comparison([], reference, requests, no, tmp_path, SILENT)  # type: ignore[arg-type]
        return str(made.folder.name)

    changed = {
        "scheduler": euler,
        "num_inference_steps": spec.num_inference_steps + 1,
        "guidance_scale": spec.guidance_scale + 1,
        "wiring": zeros,
    }
    pipelines = [msgspec.structs.replace(spec, **{name: new}) for name, new in changed.items()]
    pipelines += [pipeline_spec(tokens=154), pipeline_spec(tokens=231)]
    names = {folder(spec), *map(folder, pipelines)}
    assert len(names) == 7
    assert folder(spec, "") == folder(spec)
    assert folder(pipelines[3], "") == folder(spec)
