"""The TensorRT runner on fakes: TensorRT over ONNX Runtime, a GPU of numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from edgesd.errors import BundleError, MissingDependencyError, ResourceError, TargetError
from edgesd.runtime.backends.tensorrt import TensorRtRunner
from edgesd.runtime.device_memory import NumpyMemory
from edgesd.spec.lora import LoraSlot, LoraSlots
from edgesd.spec.pipeline import ComponentSpec, TensorSpec
from tests import fake_tensorrt

SPEC = ComponentSpec(
    "unet",
    (TensorSpec("x", "float32", ("batch", 4)), TensorSpec("ids", "int64", ("batch",))),
    (TensorSpec("y", "float32", ("batch", 4)),),
)


def plan(batch: str = "batch", name: str = "y") -> bytes:
    """y = x + ids, row by row."""
    model = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : 20]>
        g (float[{batch}, 4] x, int64[{batch}] ids) => (float[{batch}, 4] {name}) {{
            column = Unsqueeze (ids, axis)
            number = Cast <to = 1> (column)
            {name} = Add (x, number)
        }}""")
    axis = onnx.numpy_helper.from_array(np.array([1], np.int64), "axis")
    model.graph.initializer.append(axis)
    found: bytes = model.SerializeToString()
    return found


def runner(memory: NumpyMemory, made: bytes | None = None) -> TensorRtRunner:
    return TensorRtRunner(SPEC, made or plan(), memory, fake_tensorrt)


def fill(made: TensorRtRunner, value: float, rows: int = 2) -> None:
    made.bind({"x": (rows, 4), "ids": (rows,)})
    made.inputs["x"][...] = value
    made.inputs["ids"][...] = np.arange(rows)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("captures", [False, True])
def test_runs_compute_on_what_the_inputs_hold(shared: bool, captures: bool) -> None:
    with runner(NumpyMemory(shared=shared, captures=captures)) as made:
        fill(made, 0)
        arrays = dict(made.inputs)
        outputs: dict[str, Any] = {}
        for value in (1.5, 2.5, 3.5, 4.5):
            made.inputs["x"][...] = value
            made.run()
            np.testing.assert_array_equal(made.outputs["y"], [[value] * 4, [value + 1] * 4])
            outputs = outputs or dict(made.outputs)
        assert all(made.inputs[name] is array for name, array in arrays.items())
        assert made.outputs["y"] is outputs["y"]
        assert made.seconds > 0


def test_the_second_run_is_recorded_and_later_ones_repeat_it() -> None:
    memory = NumpyMemory()
    with runner(memory) as made:
        fill(made, 1)
        copies = ["upload", "upload", "download"]
        for expected in (
            [*copies, "synchronize"],
            ["capture", "launch", *copies, "synchronize"],
            ["launch", *copies, "synchronize"],
        ):
            memory.log.clear()
            made.run()
            assert memory.log == expected


def test_other_shapes_are_recorded_anew() -> None:
    memory = NumpyMemory()
    with runner(memory) as made:
        for rows in (2, 3):
            memory.log.clear()
            fill(made, 1, rows)
            for _ in range(3):
                made.run()
            assert memory.log.count("capture") == 1
            assert made.outputs["y"].shape == (rows, 4)
            np.testing.assert_array_equal(made.outputs["y"][:, 0], 1 + np.arange(rows))


def test_a_damaged_plan() -> None:
    with pytest.raises(TargetError, match="the plan of unet can't be loaded: it is damaged"):
        runner(NumpyMemory(), b"damaged")


def test_a_plan_of_other_tensors() -> None:
    with pytest.raises(BundleError, match=r"has the tensors \['ids', 'x', 'z'\], not \['ids'"):
        runner(NumpyMemory(), plan(name="z"))


def test_a_shape_that_the_plan_was_not_built_for() -> None:
    with (
        runner(NumpyMemory(), plan(batch="2")) as made,
        pytest.raises(BundleError, match=r"doesn't take x of the shape \[3, 4\]"),
    ):
        fill(made, 1, 3)


def test_a_run_that_fails() -> None:
    with runner(NumpyMemory()) as made:
        fill(made, 1)
        made._context.fails = True
        with pytest.raises(TargetError, match="unet failed while running in TensorRT"):
            made.run()


def test_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with runner(NumpyMemory(limit_bytes=40)) as made, pytest.raises(ResourceError, match="full"):
        fill(made, 1, 20)
    monkeypatch.setattr(fake_tensorrt.Engine, "contexts", 0)
    with pytest.raises(ResourceError, match="not enough GPU memory for unet"):
        runner(NumpyMemory())


def test_without_tensorrt() -> None:
    with pytest.raises(MissingDependencyError, match="no_such_trt can't be imported"):
        TensorRtRunner(SPEC, plan(), NumpyMemory(), "no_such_trt")


SLOTS = LoraSlots(3, True, (LoraSlot("linear", 4, 4),))


def plan_with_a_slot() -> bytes:
    """y = x + (x down) up."""
    model = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 20]>
        g (float[2, 4] x, float[4, 3] down, float[3, 4] up) => (float[2, 4] y) {
            low = MatMul (x, down)
            product = MatMul (low, up)
            y = Add (x, product)
        }""")
    names = {"down": "lora.0.down", "up": "lora.0.up"}  # which the parser doesn't take
    for value in model.graph.input:
        value.name = names.get(value.name, value.name)
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
    found: bytes = model.SerializeToString()
    return found


@pytest.mark.parametrize("shared", [False, True])
def test_factors_of_loras_are_uploaded_when_they_change(shared: bool) -> None:
    spec = ComponentSpec(
        "unet",
        (TensorSpec("x", "float32", (2, 4)),),
        (TensorSpec("y", "float32", (2, 4)),),
    )
    memory = NumpyMemory(shared=shared)
    down, up = np.arange(8, dtype=np.float32).reshape(4, 2), np.ones((2, 4), np.float32)
    with TensorRtRunner(spec, plan_with_a_slot(), memory, fake_tensorrt, SLOTS) as made:
        made.bind({"x": (2, 4)})
        x = made.inputs["x"]
        x[...] = np.arange(8).reshape(2, 4)
        for factors in ({}, {"lora.0.down": down, "lora.0.up": up}, {}):
            made.adapt(factors)
            wanted = x + (x @ down @ up if factors else 0)
            for _ in range(3):
                memory.log.clear()
                made.run()
                assert memory.log.count("upload") == 1
                np.testing.assert_allclose(made.outputs["y"], wanted)
