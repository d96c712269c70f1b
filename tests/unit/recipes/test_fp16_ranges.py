"""Values that fp16 can't hold: found while an image is generated, and kept in fp32.

`onnx.reference` computes fp16 in fp16, as a GPU does and ONNX Runtime's CPU doesn't.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

ir = pytest.importorskip("onnx_ir")
pytest.importorskip("torch")

import onnx  # noqa: E402
import onnxruntime  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402
from onnx_ir.passes import common  # noqa: E402

from edgesd.engines.bundle import update_manifest  # noqa: E402
from edgesd.errors import EdgesdError  # noqa: E402
from edgesd.export.backends.tensorrt_lint import lint  # noqa: E402
from edgesd.export.external_data import write_model  # noqa: E402
from edgesd.export.passes.fp32_region import Fp32Region  # noqa: E402
from edgesd.export.passes.half_compute import HalfCompute  # noqa: E402
from edgesd.export.passes.record_largest import LARGEST, RecordLargest  # noqa: E402
from edgesd.recipes import fp16_ranges  # noqa: E402
from edgesd.recipes.fp16_ranges import (  # noqa: E402
    LIMIT,
    measuring,
    protect_fp16_overflows,
    record,
)
from edgesd.runtime.bundle import Bundle, open_bundle  # noqa: E402
from edgesd.runtime.pipeline import Pipeline  # noqa: E402
from edgesd.runtime.requests import Request  # noqa: E402
from tests.support import write_bundle  # noqa: E402

Array = npt.NDArray[Any]
X = np.array([[1.0, -2.0, 3.0, 0.5]], np.float32)
WEIGHT = np.linspace(-1, 1, 16, dtype=np.float32).reshape(4, 4)


def parse(body: str, **weights: Array) -> ir.Model:
    """A graph x float [1, 4] -> y float [1, 4] of named nodes."""
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 21]> g (float[1, 4] x) => (float[1, 4] y) {{{body}}}'
    )
    for number, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{number}"
    model.graph.initializer.extend(onnx.numpy_helper.from_array(w, n) for n, w in weights.items())
    inferred = onnx.shape_inference.infer_shapes(model)
    return ir.serde.deserialize_model(inferred)


def evaluate(model: ir.Model, x: Array = X) -> list[Array]:
    """All outputs, each value computed in its own type."""
    proto = ir.serde.serialize_model(model)
    onnx.checker.check_model(proto, full_check=True)
    with np.errstate(over="ignore", invalid="ignore"):
        found: list[Array] = ReferenceEvaluator(proto).run(None, {"x": x})
    return found


def assert_builds(model: ir.Model, folder: Path) -> None:
    """The lint of what TensorRT takes finds nothing."""
    ir.save(model, folder / "model.onnx")
    assert not lint(folder / "model.onnx")


LOUD = "a = MatMul(x, w)  b = Mul(a, big)  c = Add(b, big)  d = Mul(c, small)  y = Tanh(d)"


def loud() -> ir.Model:
    """b and c are of 1e5, d is small again."""
    model = parse(
        LOUD, w=WEIGHT, big=np.array([6e4], np.float32), small=np.array([1e-5], np.float32)
    )
    HalfCompute()(model)
    return model


def exact() -> Array:
    return np.tanh((X @ WEIGHT * 6e4 + 6e4) * 1e-5)


def test_what_overflows_is_found_in_the_arithmetic_of_a_gpu() -> None:
    model = loud()
    assert not np.isfinite(np.tan(evaluate(model)[0])).all() or not np.allclose(
        evaluate(model)[0], exact(), atol=0.01
    )
    recorded = RecordLargest()
    assert recorded(model)
    sizes = dict(zip(recorded.names, evaluate(model)[1], strict=True))
    assert np.isinf(sizes["b"]) and sizes["a"] == pytest.approx(np.abs(X @ WEIGHT).max(), rel=1e-3)
    assert sizes.keys() >= {"a", "b", "c", "d", "x/to_fp16"}


def test_what_overflows_spoils_nothing_behind_it() -> None:
    """ONNX Runtime may move values in fp16, though it computes in fp32."""
    model = parse(
        "a = MatMul(x, w)  b = Mul(a, big)  c = Add(b, a)  s = Slice(c, start, end)"
        "n = LayerNormalization(s, one)  y = Tanh(n)",
        w=WEIGHT * 6e4,
        big=np.array([4.0], np.float32),
        one=np.ones(4, np.float32),
        start=np.array([0, 0]),
        end=np.array([1, 4]),
    )
    HalfCompute()(model)
    raw, names = measuring(model)
    found = onnxruntime.InferenceSession(raw).run([LARGEST], {"x": X})[0]
    sizes = dict(zip(names, found, strict=True))
    assert np.isfinite(found).all()
    assert {name for name, size in sizes.items() if size > LIMIT} == {"a", "b", "c", "s"}
    assert sizes["b"] == pytest.approx(np.abs(X @ WEIGHT).max() * 2.4e5, rel=1e-2)


def test_a_region_in_fp32_computes_what_fp32_computes(tmp_path: Path) -> None:
    model = loud()
    assert Fp32Region({"b", "c"})(model)
    np.testing.assert_allclose(evaluate(model)[0], exact(), atol=2e-3)
    assert_builds(model, tmp_path)
    kinds = {node.name: node.outputs[0].dtype for node in model.graph}
    assert kinds["MatMul_0"] == ir.DataType.FLOAT16
    assert kinds["Mul_1"] == kinds["Add_2"] == ir.DataType.FLOAT
    assert kinds["Tanh_4"] == ir.DataType.FLOAT16


def test_a_region_that_reaches_the_boundary(tmp_path: Path) -> None:
    model = parse("a = Mul(x, big)  y = Mul(a, big)", big=np.array([6e4], np.float32))
    HalfCompute()(model)
    names = {node.outputs[0].name for node in model.graph if node.op_type == "Mul"}
    Fp32Region(names)(model)
    np.testing.assert_allclose(evaluate(model)[0], X * 3.6e9, rtol=1e-3)
    assert_builds(model, tmp_path)
    assert not {v.dtype for v in model.graph.initializers.values()} - {ir.DataType.FLOAT}


def test_an_input_that_is_cast_in_the_region_is_not_rounded() -> None:
    model = parse("y = Add(x, one)", one=np.ones(1, np.float32))
    HalfCompute()(model)
    Fp32Region({"x/to_fp16", "y/fp16"})(model)
    np.testing.assert_array_equal(evaluate(model, X * 1e30)[0], X * np.float32(1e30) + 1)


def test_a_weight_that_others_read_in_fp16_stays(tmp_path: Path) -> None:
    model = parse(
        "a = Mul(x, s)  b = Mul(a, s)  c = Mul(b, t)  y = Mul(c, s)",
        s=np.array([6e2], np.float32),
        t=np.array([1e-5], np.float32),
    )
    HalfCompute()(model)
    Fp32Region({"b"})(model)
    assert model.graph.initializers["s"].dtype == ir.DataType.FLOAT16
    assert model.graph.initializers["s/fp32"].dtype == ir.DataType.FLOAT
    np.testing.assert_allclose(evaluate(model)[0], X * (6e2**3 * 1e-5), rtol=2e-3)
    assert_builds(model, tmp_path)


def test_a_quantized_layer_stays_one(tmp_path: Path) -> None:
    """Its Q and DQ join the region: nothing comes between them and the product."""
    half = np.float16
    model = parse(
        """a = Cast<to = 10>(x)  q = QuantizeLinear(a, s, z)  d = DequantizeLinear(q, s, z)
        v = DequantizeLinear<axis = 1>(codes, steps)  m = MatMul(d, v)  b = Add(m, bias)
        n = Mul(b, tiny)  y = Cast<to = 1>(n)""",
        s=np.array(0.25, half),
        z=np.array(0, np.int8),
        codes=np.arange(-8, 8, dtype=np.int8).reshape(4, 4),
        steps=np.full(4, 3e4, half),
        bias=np.ones(4, half),
        tiny=np.array([1e-5], half),
    )
    wanted = X @ (np.arange(-8, 8).reshape(4, 4) * 3e4) * np.float64(half(1e-5))
    assert not np.isfinite(evaluate(model)[0]).all()
    Fp32Region({"v", "m", "b"})(model)
    np.testing.assert_allclose(evaluate(model)[0], wanted, rtol=2e-3)
    assert_builds(model, tmp_path)
    (product,) = (node for node in model.graph if node.op_type == "MatMul")
    assert [v.producer().op_type for v in product.inputs] == ["DequantizeLinear"] * 2
    assert {model.graph.initializers[f"{n}/fp32"].dtype for n in ("s", "steps")} == {
        ir.DataType.FLOAT
    }


def test_a_value_that_is_not_there() -> None:
    with pytest.raises(EdgesdError, match="there is no value nonesuch"):
        Fp32Region({"nonesuch"})(loud())


def test_a_graph_without_fp16_has_nothing_to_record() -> None:
    model = parse("y = Tanh(x)")
    assert not RecordLargest()(model)
    assert LARGEST not in {value.name for value in model.graph.outputs}


@pytest.fixture
def overflowing(miniature: Bundle, tmp_path: Path) -> Path:
    """The miniature for TensorRT, whose decoder passes through values of 1e5."""
    root = tmp_path / "bundle"
    shutil.copytree(miniature.path, root)
    changed = []
    for component in miniature.manifest.engines:
        path = root / component / "model.onnx"
        model = ir.load(path)
        if component == "vae_decoder":
            _amplify(model)
        model = common.ShapeInferencePass()(model).model
        HalfCompute()(model)
        write_model(model, path.parent)
        changed += [f"{component}/model.onnx", f"{component}/weights.bin"]
    update_manifest(root, miniature.manifest, changed)
    return root


def _amplify(model: ir.Model) -> None:
    (latents,) = model.graph.inputs
    for factor in (6e4, 1 / 6e4):
        const = ir.tensor(np.array([factor], np.float32), name=f"factor{factor}")
        value = ir.Value(
            name=const.name,
            const_value=const,
            type=ir.TensorType(ir.DataType.FLOAT),
            shape=ir.Shape([1]),
        )
        model.graph.initializers.add(value)
        users = list(latents.uses())
        node = ir.node("Mul", [latents, value], name=f"amplify{factor}")
        out = node.outputs[0]
        out.name, out.shape, out.type = node.name, latents.shape, ir.TensorType(ir.DataType.FLOAT)
        for user, at in users:
            user.replace_input_with(at, out)
        model.graph.insert_before(users[0][0], node)
        latents = out


def test_a_component_may_be_in_fp32_whatever_the_image_hits(
    overflowing: Path, miniature: Bundle
) -> None:
    damaged = open_bundle(overflowing)
    beyond = protect_fp16_overflows(damaged, "a cat", {"unet", "spare"})
    assert set(beyond) == {"unet", "vae_decoder"} and max(beyond["unet"].values()) < LIMIT
    manifest = damaged.manifest
    changed = [n for name in beyond for n in damaged.engine_files(manifest.engines[name])]
    update_manifest(overflowing, manifest, changed)
    found = lint(overflowing / "unet" / "model.onnx")
    assert not [one for one in found if one.rule != "shapes"]
    model = ir.load(overflowing / "unet" / "model.onnx")
    values = [*model.graph.initializers.values(), *(v for n in model.graph for v in n.outputs)]
    assert values and not any(value.dtype == ir.DataType.FLOAT16 for value in values)
    with Pipeline(open_bundle(overflowing)) as pipeline:
        pipeline.generate([Request("a red apple", 3)])


def test_an_encoder_is_recorded_on_the_image(miniature: Bundle, tmp_path: Path) -> None:
    """No image of a prompt runs it."""
    manifest = miniature.manifest
    bundle = write_bundle(tmp_path / "images", manifest.target, manifest.arch, images=True)
    folder = bundle.path / "vae_encoder"
    model = common.ShapeInferencePass()(ir.load(folder / "model.onnx")).model
    HalfCompute()(model)
    write_model(model, folder)
    files = [f"vae_encoder/{name}" for name in ("model.onnx", "weights.bin")]
    update_manifest(bundle.path, bundle.manifest, files)
    beyond = protect_fp16_overflows(open_bundle(bundle.path), "a cat", {"vae_encoder"})
    assert set(beyond) == {"vae_encoder"} and max(beyond["vae_encoder"].values()) > 0


def test_a_bundle_is_mended_before_it_is_written(overflowing: Path, miniature: Bundle) -> None:
    damaged = open_bundle(overflowing)
    before = record(damaged, "a cat")
    assert max(before["unet"].values()) < LIMIT < max(before["vae_decoder"].values())
    beyond = protect_fp16_overflows(damaged, "a cat")
    assert set(beyond) == {"vae_decoder"}
    assert all(name.startswith("amplify") for name in beyond["vae_decoder"])
    changed = damaged.engine_files(damaged.manifest.engines["vae_decoder"])
    update_manifest(overflowing, damaged.manifest, changed)
    bundle = open_bundle(overflowing)
    bundle.verify()
    assert protect_fp16_overflows(bundle, "a cat") == {}
    request = Request("a red apple", 3)
    with Pipeline(miniature) as first, Pipeline(bundle) as second:
        wanted = np.asarray(first.generate([request])[0], int)
        found = np.asarray(second.generate([request])[0], int)
    assert np.abs(found - wanted).max() <= 2


def test_a_large_graph_is_recorded_piece_by_piece(
    overflowing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = record(open_bundle(overflowing), "a cat")
    monkeypatch.setattr(fp16_ranges, "WHOLE_BYTES", 0)
    monkeypatch.setattr(fp16_ranges, "PIECE_BYTES", 1 << 12)
    pieces = record(open_bundle(overflowing), "a cat")
    assert pieces.keys() == whole.keys()
    for component, values in whole.items():
        assert pieces[component] == pytest.approx(values, rel=1e-3)
