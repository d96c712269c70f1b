"""What counts as a layer, how its weight becomes a matrix, and layers on disk."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ir = pytest.importorskip("onnx_ir")
pytest.importorskip("safetensors")

import onnx  # noqa: E402
import onnxruntime  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from safetensors import safe_open  # noqa: E402

from edgesd.errors import EdgesdError  # noqa: E402
from edgesd.export.quantize.layers import (  # noqa: E402
    Activations,
    Layer,
    PackedCodes,
    QuantizedLayer,
    dequantize,
    find_layers,
    load_layer,
    matrix_of,
    pack_int4,
    save_layer,
    spread,
    weight_of,
)
from edgesd.spec.scheme import parse_scheme  # noqa: E402
from tests.quantizing import normal, patches  # noqa: E402

Array = npt.NDArray[np.float32]


def model(
    nodes: list[onnx.NodeProto],
    weights: dict[str, npt.NDArray[np.generic]],
    inputs: dict[str, int] | None = None,
) -> onnx.ModelProto:
    """A graph whose outputs are all that no node takes. inputs: name -> rank."""
    used = {name for node in nodes for name in node.input}
    outputs = [name for node in nodes for name in node.output if name not in used]
    shapes = {"x": 4} if inputs is None else inputs
    kinds = {"ids": TensorProto.INT64}
    graph = helper.make_graph(
        nodes,
        "unet",
        [
            helper.make_tensor_value_info(n, kinds.get(n, TensorProto.FLOAT), [None] * rank)
            for n, rank in shapes.items()
        ],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def layers(proto: onnx.ModelProto) -> list[Layer]:
    return find_layers("unet", ir.serde.deserialize_model(proto))


def one(
    op: str,
    weight: npt.NDArray[np.generic],
    rank: int = 4,
    name: str = "down.0.conv/Op",
    **kw: object,
) -> onnx.ModelProto:
    """A graph of one node."""
    if op == "Gather":
        node = helper.make_node(op, ["w", "ids"], ["y"], name=name, **kw)
        return model([node], {"w": weight}, {"ids": rank})
    return model(
        [helper.make_node(op, ["x", "w"], ["y"], name=name, **kw)], {"w": weight}, {"x": rank}
    )


class TestFindLayers:
    def test_conv(self) -> None:
        proto = one("Conv", normal(8, 20, 3, 3), strides=[2, 2], pads=[0, 1, 2, 3])
        (layer,) = layers(proto)
        assert layer == Layer(
            "unet", "down.0.conv", "down.0.conv/Op", "conv", (8, 20, 3, 3),
            strides=(2, 2), pads=(0, 1, 2, 3),
        )  # fmt: skip
        assert (layer.rows, layer.columns, layer.channels, layer.kernel) == (8, 180, 20, (3, 3))

    def test_linears(self) -> None:
        (matmul,) = layers(one("MatMul", normal(48, 32), 3))
        assert (matmul.kind, matmul.shape, matmul.one_row) == ("linear", (32, 48), False)
        (gemm,) = layers(one("Gemm", normal(48, 32), 2))
        assert (gemm.kind, gemm.shape, gemm.one_row) == ("linear", (32, 48), True)
        (transposed,) = layers(one("Gemm", normal(32, 48), 2, transB=1))
        assert (transposed.shape, transposed.one_row) == ((32, 48), True)
        assert (matmul.rows, matmul.columns, matmul.kernel) == (32, 48, (1, 1))

    def test_embedding(self) -> None:
        (layer,) = layers(one("Gather", normal(64, 32), 2))
        assert (layer.kind, layer.shape) == ("embedding", (64, 32))

    @pytest.mark.parametrize(
        "proto",
        [
            one("Conv", normal(16, 8, 3, 3), group=2),
            one("Conv", normal(16, 8, 3, 3), dilations=[2, 2]),
            one("Conv", normal(16, 8, 3, 3), auto_pad="SAME_UPPER"),
            one("Conv", normal(16, 64, 3), 3),
            one("Conv", normal(16, 8, 2, 2, 2), 5),
            one("Conv", normal(5, 8, 5, 5)),
            one("MatMul", normal(31, 33), 3),
            one("MatMul", normal(2, 32, 32), 3),
            one("MatMul", normal(64, 64).astype(np.float16), 3),
            one("MatMul", normal(64, 64).astype(np.float64), 3),
            one("MatMul", normal(64, 64), 3, name="MatMul_7"),
            one("MatMul", normal(64, 64), 3, name=""),
            one("Gemm", normal(64, 64), 2, transA=1),
            one("Gemm", normal(64, 64), 2, alpha=0.5),
            one("Gemm", normal(64, 64), 2, beta=2.0),
            one("Gather", normal(64, 64), 2, axis=1),
            one("Mul", normal(64, 64), 2),
            one("Conv", normal(64, 64, 1, 1), domain="com.example"),
        ],
        ids=[
            *("grouped", "dilated", "auto_pad", "conv1d", "conv3d", "small conv", "small"),
            *("batched", "fp16", "fp64", "no module", "no name", "transA", "alpha", "beta"),
            *("gather of axis 1", "mul", "other domain"),
        ],
    )
    def test_what_is_left_out(self, proto: onnx.ModelProto) -> None:
        assert layers(proto) == []

    def test_dilations_and_auto_pad_of_no_effect_are_taken(self) -> None:
        proto = one("Conv", normal(8, 20, 3, 3), dilations=[1, 1], auto_pad="NOTSET", group=1)
        assert len(layers(proto)) == 1

    def test_shared_weights_are_left_out(self) -> None:
        nodes = [
            helper.make_node("MatMul", ["x", "w"], ["a"], name="a/MatMul"),
            helper.make_node("MatMul", ["a", "w"], ["b"], name="b/MatMul"),
            helper.make_node("MatMul", ["b", "v"], ["c"], name="c/MatMul"),
        ]
        weights: dict[str, npt.NDArray[np.generic]] = {"w": normal(64, 64), "v": normal(64, 64)}
        found = layers(model(nodes, weights, {"x": 3}))
        assert [layer.name for layer in found] == ["c"]

    def test_computed_weights_are_left_out(self) -> None:
        nodes = [
            helper.make_node("Mul", ["w", "s"], ["scaled"], name="m/Mul"),
            helper.make_node("MatMul", ["x", "scaled"], ["y"], name="m/MatMul"),
            helper.make_node("MatMul", ["w2", "y"], ["z"], name="n/MatMul"),
        ]
        weights: dict[str, npt.NDArray[np.generic]] = {
            "w": normal(64, 64), "s": normal(64), "w2": normal(64, 64)
        }  # fmt: skip
        assert layers(model(nodes, weights, {"x": 3})) == []

    def test_layers_are_in_the_graphs_order(self) -> None:
        nodes = [
            helper.make_node("MatMul", [a, f"w{a}"], [b], name=f"z{9 - i}/MatMul")
            for i, (a, b) in enumerate(zip("xabc", "abcd", strict=True))
        ]
        weights: dict[str, npt.NDArray[np.generic]] = {f"w{n}": normal(40, 40) for n in "xabc"}
        found = layers(model(nodes, weights, {"x": 3}))
        assert [layer.name for layer in found] == ["z9", "z8", "z7", "z6"]


def run(proto: onnx.ModelProto, feed: npt.NDArray[np.generic]) -> Array:
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    out: Array = session.run(None, {session.get_inputs()[0].name: feed})[0]
    return out


@pytest.mark.parametrize(
    ("kernel", "strides", "pads"),
    [
        ((3, 3), (1, 1), (1, 1, 1, 1)),
        ((3, 3), (2, 2), (0, 0, 1, 1)),
        ((1, 1), (1, 1), (0, 0, 0, 0)),
        ((1, 1), (2, 2), (0, 0, 0, 0)),
        ((2, 5), (1, 3), (0, 2, 1, 0)),
    ],
)
def test_the_matrix_of_a_conv_times_its_patches_is_the_conv(
    kernel: tuple[int, int], strides: tuple[int, int], pads: tuple[int, int, int, int]
) -> None:
    proto = one("Conv", normal(33, 36, *kernel), strides=strides, pads=pads, kernel_shape=kernel)
    loaded = ir.serde.deserialize_model(proto)
    (layer,) = find_layers("unet", loaded)
    (node,) = loaded.graph
    matrix = matrix_of(node, layer)
    assert matrix.shape == (layer.rows, layer.columns) and matrix.flags.c_contiguous
    x = normal(2, 36, 7, 9, seed=1)
    expected = (patches(x, layer) @ matrix.T).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(run(proto, x), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("op", "shape", "kw"),
    [("MatMul", (48, 40), {}), ("Gemm", (48, 40), {}), ("Gemm", (40, 48), {"transB": 1})],
)
def test_the_matrix_of_a_linear_times_its_input_is_the_linear(
    op: str, shape: tuple[int, int], kw: dict[str, int]
) -> None:
    proto = one(op, normal(*shape), 2, **kw)
    loaded = ir.serde.deserialize_model(proto)
    (layer,) = find_layers("unet", loaded)
    (node,) = loaded.graph
    matrix = matrix_of(node, layer)
    assert matrix.shape == (40, 48) == layer.shape
    x = normal(5, 48, seed=1)
    np.testing.assert_allclose(run(proto, x), (matrix @ x.T).T, atol=1e-4)


def test_the_matrix_of_an_embedding_is_its_table() -> None:
    proto = one("Gather", normal(64, 32), 1)
    loaded = ir.serde.deserialize_model(proto)
    (layer,) = find_layers("unet", loaded)
    (node,) = loaded.graph
    ids = np.array([3, 60, 3])
    np.testing.assert_array_equal(run(proto, ids), matrix_of(node, layer)[ids])


def test_weight_of() -> None:
    loaded = ir.serde.deserialize_model(one("MatMul", normal(48, 40), 3))
    (node,) = loaded.graph
    weight = weight_of(node)
    assert weight is not None and weight.name == "w"
    assert weight_of(ir.node("Conv", [ir.Value(name="x"), None])) is None
    assert weight_of(ir.node("Conv", [ir.Value(name="x")])) is None


# On disk.


def quantized(columns: int = 36, group: int = 16, full: bool = True) -> QuantizedLayer:
    rng = np.random.default_rng(0)
    layer = Layer(
        "unet", "mid.conv", "mid.conv/Conv", "conv", (10, columns, 3, 1), (2, 2), (1, 0, 1, 0)
    )
    wide = columns * 3
    count = -(-wide // group)
    plain = QuantizedLayer(
        layer=layer,
        scheme=parse_scheme("w4a8-g16-lr4" if full else "w4a16-g16"),
        method="svdquant+gptq",
        stored=rng.integers(-8, 8, (10, wide)).astype(np.int8),
        scales=rng.uniform(0.01, 1, (10, count)).astype(np.float16),
        group=group,
        error=0.123456789,
    )
    if not full:
        return plain
    return replace(
        plain,
        smooth=rng.uniform(0.1, 9, columns).astype(np.float32),
        down=normal(4, wide).astype(np.float16),
        up=normal(10, 4).astype(np.float16),
        activations=Activations(
            "static", 8, 0, np.array([0.1, 0.2], np.float32), np.array([3, 255], np.uint8),
            np.array([0.3], np.float32), rng.uniform(0, 1, columns).astype(np.float32),
        ),
    )  # fmt: skip


def assert_equal(ours: QuantizedLayer, theirs: QuantizedLayer) -> None:
    for name in ("codes", *(each.name for each in fields(ours) if each.name != "stored")):
        value, other = getattr(ours, name), getattr(theirs, name)
        if isinstance(value, np.ndarray):
            assert value.dtype == other.dtype
            np.testing.assert_array_equal(value, other)
        elif isinstance(value, Activations):
            for part, array in vars(value).items():
                np.testing.assert_array_equal(array, getattr(other, part))
        else:
            assert value == other, name


@pytest.mark.parametrize("full", [False, True])
def test_a_layer_survives_the_disk(full: bool, tmp_path: Path) -> None:
    layer = quantized(full=full)
    save_layer(layer, tmp_path / "a" / "one.safetensors")
    save_layer(layer, tmp_path / "two.safetensors")
    first = (tmp_path / "a" / "one.safetensors").read_bytes()
    assert first == (tmp_path / "two.safetensors").read_bytes()
    loaded = load_layer(tmp_path / "two.safetensors")
    assert_equal(layer, loaded)
    save_layer(loaded, tmp_path / "two.safetensors")
    assert first == (tmp_path / "two.safetensors").read_bytes()
    assert sorted(p.name for p in tmp_path.rglob("*")) == [
        "a",
        "one.safetensors",
        "two.safetensors",
    ]


def test_a_layer_of_views_survives_the_disk(tmp_path: Path) -> None:
    layer = quantized()
    assert layer.down is not None
    views = replace(
        layer,
        stored=np.asfortranarray(layer.codes),
        scales=layer.scales.repeat(2, 1)[:, ::2],
        down=np.asfortranarray(layer.down),
    )
    save_layer(views, tmp_path / "layer.safetensors")
    assert_equal(layer, load_layer(tmp_path / "layer.safetensors"))


def test_a_layer_stays_in_its_file(tmp_path: Path) -> None:
    path = tmp_path / "layer.safetensors"
    save_layer(quantized(), path)
    loaded = load_layer(path)
    assert str(path) in Path("/proc/self/maps").read_text()
    del loaded
    assert str(path) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("columns", [36, 35])
def test_codes_of_4_bits_take_half_a_byte_in_their_file(columns: int, tmp_path: Path) -> None:
    layer = quantized(columns)
    assert layer.codes.min() == -8 and layer.codes.max() == 7
    save_layer(layer, tmp_path / "layer.safetensors")
    loaded = load_layer(tmp_path / "layer.safetensors")
    assert isinstance(loaded.stored, PackedCodes) and loaded.stored.shape == layer.codes.shape
    assert loaded.stored.packed.nbytes == 10 * -(-3 * columns // 2)
    assert loaded.codes is not loaded.codes
    assert_equal(layer, loaded)


def test_codes_of_another_shape_are_one_clear_error(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save

    path = tmp_path / "layer.safetensors"
    save_layer(quantized(), path)
    with safe_open(path, "np") as file:
        meta = file.metadata()
    tensors = load_file(path)
    path.write_bytes(save({**tensors, "codes": tensors["codes"][:, 1:]}, meta))
    with pytest.raises(EdgesdError, match=r"its codes are .*: remove it and run again"):
        load_layer(path)


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, 0.5, 0.99, -1])
def test_a_truncated_file_is_one_clear_error(keep: float, tmp_path: Path) -> None:
    path = tmp_path / "layer.safetensors"
    save_layer(quantized(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole)) if 0 < keep < 1 else int(keep)])
    with pytest.raises(
        EdgesdError, match=r"layer\.safetensors can't be read .*: remove it"
    ) as caught:
        load_layer(path)
    assert len(str(caught.value).splitlines()) == 1


def test_a_missing_file_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(EdgesdError, match="remove it and run again"):
        load_layer(tmp_path / "none.safetensors")


def test_a_damaged_header_is_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "layer.safetensors"
    save_layer(quantized(), path)
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    other = []
    for at in range(0, end, 7):
        damaged = bytearray(whole)
        damaged[at] ^= 1
        path.write_bytes(damaged)
        try:
            load_layer(path)
        except EdgesdError as exc:
            assert len(str(exc).splitlines()) == 1
        except Exception as exc:  # noqa: BLE001 - that is what must not happen
            other.append(f"{at}: {exc!r}")
    assert not other, f"{len(other)} positions, such as {other[:3]}"


@pytest.mark.parametrize("meta", [{}, {"edgesd": "[]"}, {"edgesd": "{}"}, {"edgesd": "null"}])
def test_another_safetensors_file_is_one_clear_error(meta: dict[str, str], tmp_path: Path) -> None:
    from safetensors.numpy import save

    path = tmp_path / "layer.safetensors"
    path.write_bytes(save({"codes": np.zeros((2, 2), np.int8)}, meta))
    with pytest.raises(EdgesdError, match="remove it and run again"):
        load_layer(path)


# The description.


def test_what_a_description_stands_for() -> None:
    layer = quantized()
    residual, branch = layer.residual(), layer.branch()
    assert layer.smooth is not None and layer.down is not None and layer.up is not None
    for n, k in ((0, 0), (3, 15), (3, 16), (9, 107)):
        code, scale = int(layer.codes[n, k]), np.float32(layer.scales[n, k // 16])
        assert residual[n, k] == code * scale
        low = float(layer.up[n].astype(np.float64) @ layer.down[:, k].astype(np.float64))
        assert branch[n, k] == pytest.approx(low, abs=1e-5)
        expected = (code * scale + low) / layer.smooth[k % 36]
        assert layer.effective_weight()[n, k] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert layer.rank == 4 and quantized(full=False).rank == 0
    assert not quantized(full=False).branch().any()
    np.testing.assert_array_equal(
        quantized(full=False).effective_weight(), quantized(full=False).residual()
    )
    assert spread(layer.smooth, 108).shape == (108,)
    np.testing.assert_array_equal(spread(layer.smooth, 108)[36:72], layer.smooth)


def test_dequantize_with_a_short_last_group() -> None:
    codes = np.arange(-8, 8, dtype=np.int8)[None, :11]
    scales = np.array([[1, 10, 100]], np.float16)
    expected = [-8, -7, -6, -5, -40, -30, -20, -10, 0, 100, 200]
    np.testing.assert_array_equal(dequantize(codes, scales, 4), [expected])


def test_bytes_of_a_layer() -> None:
    layer = quantized(columns=32, full=False)
    assert layer.bytes() == 10 * 96 // 2 + 10 * 6 * 2
    full = quantized(columns=32)
    assert full.bytes() == layer.bytes() + 32 * 4 + (4 * 96 + 10 * 4) * 2


@given(
    st.lists(st.integers(-8, 7), min_size=2, max_size=64).filter(lambda v: len(v) % 2 == 0),
    st.integers(1, 3),
)
@settings(max_examples=100)
def test_four_bits_are_packed_and_unpacked(values: list[int], rows: int) -> None:
    codes = np.tile(np.array(values, np.int8), (rows, 1))
    packed = pack_int4(codes)
    assert packed.dtype == np.uint8 and packed.shape == (rows, len(values) // 2)
    tensor = helper.make_tensor("c", TensorProto.INT4, codes.shape, packed.tobytes(), raw=True)
    np.testing.assert_array_equal(numpy_helper.to_array(tensor), codes)
    first = [(v & 15) | (w & 15) << 4 for v, w in zip(values[::2], values[1::2], strict=True)]
    np.testing.assert_array_equal(packed[0], first)


def test_packing_is_onnxs() -> None:
    codes = np.array([-8, -1, 0, 7, 3, -5], np.int8)
    tensor = helper.make_tensor("c", TensorProto.INT4, [6], codes.tolist())
    assert np.asarray(tensor.int32_data, np.uint8).tobytes() == pack_int4(codes).tobytes()
    np.testing.assert_array_equal(numpy_helper.to_array(tensor), codes)
