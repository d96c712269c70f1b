"""Plans on a real GPU: built, run beside ONNX Runtime, recorded. `python scripts/gpu_tests.py`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgesd.engines.plans import Plans, plan_environment, prepare_plans
from edgesd.engines.tensorrt import BuildSpec, build_plan
from edgesd.errors import EdgesdError
from edgesd.runtime.backends import onnxruntime
from edgesd.runtime.backends.base import RunnerOptions
from edgesd.runtime.backends.tensorrt import TensorRtRunner
from edgesd.runtime.bundle import Bundle, open_bundle
from edgesd.runtime.cuda import find_gpu
from edgesd.runtime.device_memory import DeviceMemory, open_device_memory
from edgesd.runtime.flow import flow_of
from edgesd.runtime.pipeline import Pipeline
from edgesd.runtime.requests import Request
from edgesd.runtime.settings import Settings
from tests.support import pipeline_spec

pytestmark = pytest.mark.gpu

COMPONENTS = flow_of(pipeline_spec()).components

PRECISIONS = ("fp16", "bf16", "w8a8", "w4a16-g64-lr32")
REQUEST = Request("a red apple", 3)


@pytest.fixture(scope="module", autouse=True)
def gpu() -> None:
    found = find_gpu()
    if isinstance(found, str):
        pytest.skip(found)
    try:
        plan_environment()
    except EdgesdError as exc:
        pytest.skip(str(exc))


@pytest.fixture(scope="module", params=PRECISIONS)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The embedded pipeline for TensorRT."""
    pytest.importorskip("torch")
    from edgesd.recipes import DEMO, BuildOptions, LocalFolders, QuantOptions, build

    folder = tmp_path_factory.mktemp("tensorrt")
    how = QuantOptions(quality_prompts=())
    options = BuildOptions("jetson-agx-orin-64gb", request.param, quantization=how)
    out = folder / "bundle"
    build(DEMO, options, out, LocalFolders(folder / "work"))
    return open_bundle(out)


@pytest.fixture
def memory() -> Iterator[DeviceMemory]:
    with open_device_memory() as found:
        yield found


def settings(folder: Path, bundle: Bundle) -> Settings:
    return Settings(plan_of=Plans(bundle, folder), fallback=False)


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_component_computes_what_onnx_runtime_computes(
    component: str, bundle: Bundle, memory: DeviceMemory, tmp_path: Path
) -> None:
    spec = bundle.manifest.pipeline.components[component]
    engine = bundle.manifest.engines[component]
    plan, module = tmp_path / "plan", plan_environment().module
    build_plan(bundle.path / engine.path, BuildSpec(component, module), plan)
    rng = np.random.default_rng(0)
    shapes: dict[str, Any] = {tensor.name: tensor.shape for tensor in spec.inputs}
    with (
        TensorRtRunner(spec, plan.read_bytes(), memory, module) as ours,
        onnxruntime.BACKEND.open_runner(bundle, component, RunnerOptions()) as theirs,
    ):
        for runner in (ours, theirs):
            runner.bind(shapes)
        for _ in range(4):  # as it is, recorded, repeated
            for tensor in spec.inputs:
                values = (
                    rng.integers(0, 100, shapes[tensor.name])
                    if tensor.dtype == "int64"
                    else rng.standard_normal(shapes[tensor.name])
                    * (1 + 500 * (tensor.name == "timestep"))
                )
                for runner in (ours, theirs):
                    runner.inputs[tensor.name][...] = values
            for runner in (ours, theirs):
                runner.run()
            for name, wanted in theirs.outputs.items():
                apart = np.sqrt(np.mean((ours.outputs[name] - wanted) ** 2) / np.mean(wanted**2))
                # ONNX Runtime computes in fp32, a GPU in 8 or 11 bits.
                assert apart < (8e-2 if engine.precision == "bf16" else 2e-2), name


def test_a_image_is_that_of_the_cpu(bundle: Bundle, tmp_path: Path) -> None:
    from edgesd.evaluate.psnr import psnr

    with Pipeline(bundle) as pipeline:
        wanted = pipeline.generate([REQUEST])[0]
    with Pipeline(bundle, settings(tmp_path, bundle)) as pipeline:
        found = pipeline.generate([REQUEST])[0]
        again = pipeline.generate([REQUEST])[0]
        assert not pipeline.fallbacks
    assert psnr(found, wanted) > (24 if bundle.manifest.precision == "bf16" else 30)
    assert found.tobytes() == again.tobytes()


def test_plans_are_found_again(bundle: Bundle, tmp_path: Path) -> None:
    first = prepare_plans(bundle, tmp_path)["unet"]
    assert first is not None
    made = first.stat().st_mtime_ns
    assert prepare_plans(bundle, tmp_path)["unet"] == first
    assert first.stat().st_mtime_ns == made
