"""A backend that is added by a file on each side, and a board that runs it by another."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgesd.device import targets
from edgesd.runtime import backends
from edgesd.runtime.bundle import open_bundle
from tests.support import assert_refused, run_cli

pytest.importorskip("torch")
from edgesd.export import backends as lowerings
from tests.tiny_pipelines import write_tiny

RUNTIME = '''
"""Runs graphs as they are written, without any fusion."""

import numpy as np
import onnxruntime

from edgesd.runtime.backends.base import Backend, BoundRunner


class Runner(BoundRunner):
    def __init__(self, spec, graph):
        super().__init__(spec)
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(graph.folder)
        )
        self.session = onnxruntime.InferenceSession(graph.model, options)

    def run(self):
        values = self.session.run(None, self.inputs)
        self.check_outputs(values)
        self.outputs = {t.name: v for t, v in zip(self.spec.outputs, values)}


class Third(Backend):
    name = "third"
    memory_modes = ("fast", "balanced")
    process_bytes = 10 << 20
    opened = []

    def open_runner(self, bundle, component, options, part=None):
        self.opened.append(component)
        return Runner(bundle.manifest.pipeline.components[component], bundle.graph_file(component))


BACKEND = Third()
'''

LOWERING = '''
"""Standard operators, of one size, and a file that says so."""

import msgspec
import onnx

from edgesd.export.backends.base import Lowering
from edgesd.export.passes.standard_attention import StandardAttention


class ThirdLowering(Lowering):
    name = "third"
    fixed_shapes = True
    checks_engines = True

    def lower(self, model, precision):
        StandardAttention()(model)

    def lower_quantized(self, model, layers, fp16_weights, timesteps):
        raise NotImplementedError

    def files(self, engines):
        return {"third.txt": " ".join(engines).encode()}

    def check_engine(self, root, engine, target):
        model = onnx.load(root / engine.path, load_external_data=False)
        assert {node.domain for node in model.graph.node} == {""}
        return msgspec.structs.replace(engine, checked=f"fits {target.name}")


LOWERING = ThirdLowering()
'''

BOARD = f"""
from edgesd.spec.target import Target

TARGETS = (
    Target(
        name="third-board",
        title="A board of another make",
        arch="{platform.machine()}",
        backends=("third",),
        memory_bytes=4 << 30,
        cpu_count=1,
    ),
)
"""

PLACES = (
    (backends, "third", RUNTIME),
    (lowerings, "third", LOWERING),
    (targets, "third_board", BOARD),
)


@pytest.fixture
def third(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A file more in three packages."""
    for package, module, source in PLACES:
        folder = tmp_path / package.__name__
        folder.mkdir()
        (folder / f"{module}.py").write_text(source)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    targets.list_targets.cache_clear()
    targets.all_targets.cache_clear()
    yield
    targets.list_targets.cache_clear()
    targets.all_targets.cache_clear()
    for package, module, _ in PLACES:
        sys.modules.pop(f"{package.__name__}.{module}", None)
        vars(package).pop(module, None)


def generated(bundle: Path, out: Path, *more: object) -> np.ndarray:
    outcome = run_cli(
        "generate", bundle, "-p", "a cat", "--seed", 1, "--steps", 2, "-o", out, *more
    )
    assert outcome.code == 0, outcome.err
    with Image.open(out) as image:
        return np.asarray(image.convert("RGB"), np.int16)


def test_a_file_on_each_side_makes_a_backend(third: None, tmp_path: Path) -> None:
    model = write_tiny("sd", tmp_path / "model")
    planned = run_cli("plan", model, "--target", "third-board", "--json")
    assert planned.code == 0, planned.err
    plan = json.loads(planned.out)
    assert plan["backend"] == "third" and plan["memory"].keys() == {"fast", "balanced"}
    ours, standard = tmp_path / "third", tmp_path / "standard"
    for target, out in (("third-board", ours), ("x86-64-cpu", standard)):
        built = run_cli(
            "build", model, "--target", target, "--precision", "fp32", "--size", "40x24", "-o", out
        )
        assert built.code == 0, built.err
    bundle = open_bundle(ours)
    assert bundle.manifest.backend == "third" and not bundle.manifest.pipeline.shape.dynamic
    assert bundle.read("third.txt").split() == [name.encode() for name in bundle.manifest.engines]
    for engine in bundle.manifest.engines.values():
        assert engine.backend == "third" and engine.checked == "fits third-board"
        assert engine.footprint and engine.kernels is None and engine.split is None

    found = generated(ours, tmp_path / "ours.png")
    assert {*backends.get_backend("third").opened} == {"text_encoder", "unet", "vae_decoder"}
    wanted = generated(standard, tmp_path / "wanted.png", "--any-machine")
    assert np.abs(found - wanted).max() <= 1
    assert_refused(run_cli("finalize", ours), "a bundle for third, which needs no plans")


def test_what_is_asked_for_in_vain_is_told_what_there_is(third: None) -> None:
    assert backends.backend_names() == ["onnxruntime", "tensorrt", "third"]
    refused = run_cli("plan", "demo", "--target", "third-board", "--backend", "thrid")
    assert refused.code == 2
    assert_refused(refused, "did you mean 'third'? valid: onnxruntime, tensorrt, third")
