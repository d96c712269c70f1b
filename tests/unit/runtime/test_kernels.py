"""edgesd's own kernels: each instruction set, the graphs that use them, and being without them."""

from __future__ import annotations

import ctypes.util
import os
import platform
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

ir = pytest.importorskip("onnx_ir")
torch = pytest.importorskip("torch")

import onnx  # noqa: E402
import onnxruntime  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from edgesd.engines import kernels as engine_kernels  # noqa: E402
from edgesd.engines.bundle import update_manifest  # noqa: E402
from edgesd.engines.kernels import build_library, ensure_library  # noqa: E402
from edgesd.errors import (  # noqa: E402
    InputError,
    MissingDependencyError,
    ResourceError,
    TargetError,
)
from edgesd.export.external_data import write_model  # noqa: E402
from edgesd.export.passes.own_kernels import OwnKernels  # noqa: E402
from edgesd.export.quantize.layers import QuantizedLayer, find_layers, matrix_of  # noqa: E402
from edgesd.export.quantize.methods import get_method  # noqa: E402
from edgesd.export.quantize.quantize import quantize_layer  # noqa: E402
from edgesd.runtime import kernels  # noqa: E402
from edgesd.runtime.backends.onnxruntime import OnnxRuntimeRunner, session_options  # noqa: E402
from edgesd.runtime.bundle import GraphFile  # noqa: E402
from edgesd.spec.bundle import LayerRecipe, QuantRecipe  # noqa: E402
from edgesd.spec.pipeline import ComponentSpec, TensorSpec  # noqa: E402
from edgesd.spec.scheme import parse_scheme  # noqa: E402
from tests.hostile_graphs import CASES  # noqa: E402
from tests.quantizing import normal, record  # noqa: E402
from tests.support import write_bundle  # noqa: E402
from tests.unit.export.passes.test_quantized_ort import (  # noqa: E402
    KINDS,
    Array,
    Kind,
    example,
    graph,
    lowered,
    quantize,
    run,
    session,
)

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("one_thread")]

ROOT = Path(__file__).resolve().parents[3]
TARGET = {"aarch64": ("raspberry-pi-5", "aarch64")}.get(
    platform.machine(), ("x86-64-cpu", "x86_64")
)
COMPILED = {
    "avx512_vnni": ("g++", "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mavx2 -mfma"),
    "avx2": ("g++", "-mavx2 -mfma -mf16c"),
    "neon_dotprod": ("aarch64-linux-gnu-g++", "-march=armv8.2-a+dotprod -static"),
}


@pytest.fixture(scope="module")
def library(own_kernels: Path | None) -> Path:
    if own_kernels is None:
        pytest.skip("no compiler, or a processor without the instruction sets")
    return own_kernels


def runs(isa: str) -> list[str] | None:
    """The command that runs a program of an instruction set here; None where nothing does."""
    if isa == "neon_dotprod":
        emulator = shutil.which("qemu-aarch64-static")
        if platform.machine() == "aarch64":
            return []
        return [emulator] if emulator else None
    flags = Path("/proc/cpuinfo").read_text().split()
    return [] if platform.machine() == "x86_64" and isa in flags else None


# The code itself.


@pytest.mark.parametrize("isa", COMPILED)
def test_each_instruction_set_computes_what_plain_sums_give(isa: str, tmp_path: Path) -> None:
    compiler, flags = COMPILED[isa]
    command = runs(isa)
    if command is None or not shutil.which(compiler):
        pytest.skip(f"neither this machine nor an emulator runs {isa}")
    program = tmp_path / "check"
    sources = [str(kernels.SOURCES / "compute.cpp"), str(ROOT / "tests/kernels_check.cpp")]
    subprocess.run(
        [
            *(compiler, "-O2", "-std=c++17", "-w", *flags.split(), f"-DISA={isa}_compute"),
            *(*sources, "-o", str(program), "-pthread"),
        ],
        check=True,
    )
    out = subprocess.run([*command, str(program)], check=True, capture_output=True, text=True)
    name, *lines = out.stdout.splitlines()
    assert name == isa and len(lines) == (29 if isa == "avx2" else 38)
    for line in lines:
        what, bits, error = line.split()
        # 8 bits of an input are off by 0.3 % of a normal distribution's, its product by as much;
        # codes of 64 steps and probabilities of 127 add to that.
        coarse = (
            isa == "avx2"
            or what in ("gated", "normed")
            or (isa == "neon_dotprod" and what in ("attention", "joint"))
        )
        limit = {"widen": 0, "rows": 1e-5}.get(what, 0.02 if coarse else 0.01)
        assert float(error) <= limit, (what, bits)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g32"])
@pytest.mark.parametrize("name", [name for name in KINDS if "gemm" not in name])
def test_a_layer_is_what_its_description_says(name: str, scheme: str, library: Path) -> None:
    kind = KINDS[name]
    proto = graph(kind)
    quantized = quantize(kind, proto, scheme, False, 1, smooth=kind.op == "Conv")
    fast = session_of(own(proto, [quantized]), library)
    slow = session(lowered(proto, {quantized.layer.node: quantized}))
    for seed in (1, 2):
        x = example(kind, seed)
        assert off(run(fast, x), run(slow, x)) < 0.015
    again = run(fast, x)
    assert np.array_equal(again, run(fast, x))


@pytest.mark.parametrize("scheme", ["w8a8", "w8a16-lr4", "w4a8-g32", "w4a16-g16-lr4", "w4a4-g32"])
@pytest.mark.parametrize("name", ["gemm", "gemm not transposed"])
def test_a_few_rows_are_not_rounded(name: str, scheme: str, library: Path) -> None:
    kind = KINDS[name]
    proto = graph(kind)
    quantized = quantize(kind, proto, scheme, False, 1)
    made = own(proto, [quantized])
    assert sum(node.op_type == "QuantRows" for node in made.graph.node) == 1
    fast = session_of(made, library)
    slow = session(lowered(proto, {quantized.layer.node: quantized}))
    x = example(kind, 1)
    assert off(run(fast, x), run(slow, x)) < 1e-5
    x[0, 3] = np.nan
    found = run(fast, x)
    assert np.isnan(found[0]).all() and np.isfinite(found[1:]).all()


def test_inputs_are_taken_row_by_row(library: Path) -> None:
    """One large token doesn't make the others coarse, as it does where a tensor has one scale."""
    kind = Kind("MatMul", (64, 48), (1, 8, 64), {})
    proto = graph(kind)
    quantized = quantize(kind, proto, "w8a8", False, 1)
    x = normal(1, 8, 64)
    x[0, 0] *= 1000
    plain = x @ quantized.effective_weight().T
    fast = run(session_of(own(proto, [quantized]), library), x)
    slow = run(session(lowered(proto, {quantized.layer.node: quantized})), x)
    assert off(fast[0, 1:], plain[0, 1:]) < 0.01 < off(slow[0, 1:], plain[0, 1:])


def test_nan_comes_out_as_it_went_in(library: Path) -> None:
    kind = KINDS["linear"]
    proto = graph(kind)
    fast = session_of(own(proto, [quantize(kind, proto, "w8a8", False, 1)]), library)
    x = example(kind, 1)
    x[0, 3, 5] = np.nan
    assert np.isnan(run(fast, x)[0, 3]).all()


# Graphs.


def block(wide: int = 32) -> onnx.ModelProto:
    """conv + timestep + residual; linear + bias + residual; GEGLU; attention, causal and not."""
    float_, n = TensorProto.FLOAT, 2 * wide
    weights: dict[str, Array] = {
        "conv.w": normal(wide, wide, 3, 3, seed=1) * np.float32(0.1),
        "conv.b": normal(wide, seed=2),
        "linear.w": normal(wide, wide, seed=3) * np.float32(0.2),
        "linear.b": normal(wide, seed=4),
        "gate.w": normal(wide, n, seed=5) * np.float32(0.2),
        "gate.b": normal(n, seed=6),
    }
    ints = {"flat": [1, wide, -1], "halves": [wide, wide]}
    make = helper.make_node
    attention: dict[str, Any] = {"num_heads": 2, "scale": 0.25, "domain": "com.microsoft"}
    nodes = [
        make("Conv", ["x", "conv.w", "conv.b"], ["c"], name="a.conv/Conv", pads=[1, 1, 1, 1]),
        make("Add", ["c", "time"], ["ct"], name="a/Add"),
        make("Add", ["x", "ct"], ["cx"], name="a/Add_2"),
        make("Reshape", ["cx", "flat"], ["rows"], name="a/Reshape"),
        make("Transpose", ["rows"], ["t"], name="a/Transpose", perm=[0, 2, 1]),
        make(
            "MultiHeadAttention", ["t", "t", "t"], ["m"], name="a/m", unidirectional=0, **attention
        ),
        make(
            "MultiHeadAttention", ["m", "m", "m"], ["o"], name="a/o", unidirectional=1, **attention
        ),
        make("MatMul", ["o", "linear.w"], ["l"], name="a.linear/MatMul"),
        make("Add", ["l", "linear.b"], ["lb"], name="a.linear/Add"),
        make("Add", ["lb", "t"], ["lt"], name="a/Add_3"),
        make("MatMul", ["lt", "gate.w"], ["g"], name="a.gate/MatMul"),
        make("Add", ["g", "gate.b"], ["gb"], name="a.gate/Add"),
        make("Split", ["gb", "halves"], ["left", "right"], name="a/Split", axis=-1),
        make("Gelu", ["right"], ["gelu"], name="a/Gelu"),
        make("Mul", ["left", "gelu"], ["y"], name="a/Mul"),
    ]
    image, rows = ["batch", wide, "height", "width"], ["batch", "pixels", wide]
    gates = ["batch", "pixels", n]
    shapes: dict[str, list[Any]] = {
        **dict.fromkeys(("c", "ct", "cx"), image),
        **dict.fromkeys(("t", "m", "o", "l", "lb", "lt"), rows),
        **dict.fromkeys(("g", "gb"), gates),
    }
    info = helper.make_tensor_value_info
    proto = helper.make_graph(
        nodes,
        "unet",
        [
            info("x", float_, image),
            info("time", float_, ["batch", wide, 1, 1]),
            info("timestep", float_, [1]),
        ],
        [info("y", float_, rows)],
        [
            *(numpy_helper.from_array(array, name) for name, array in weights.items()),
            *(numpy_helper.from_array(np.array(v, np.int64), name) for name, v in ints.items()),
        ],
        value_info=[info(name, float_, shape) for name, shape in shapes.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(proto, opset_imports=opsets, ir_version=10)


def quantized_block(proto: onnx.ModelProto, scheme: str) -> list[QuantizedLayer]:
    model = ir.serde.deserialize_model(proto)
    nodes = {node.name: node for node in model.graph}
    found = []
    for layer in find_layers("unet", model):
        shape = (1, layer.channels, 8, 8) if layer.kind == "conv" else (1, 64, layer.columns)
        stats = record(layer, [normal(*shape)])
        weight = matrix_of(nodes[layer.node], layer)
        found.append(quantize_layer(layer, weight, stats, parse_scheme(scheme), get_method("rtn")))
    return found


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g32", "w4a8-g32-lr8"])
def test_what_surrounds_a_layer_becomes_part_of_it(
    scheme: str, attention: bool, library: Path
) -> None:
    proto = block()
    layers = quantized_block(proto, scheme)
    fused = own(proto, layers, attention)
    counts = Counter(node.op_type for node in fused.graph.node)
    branches = scheme.endswith("lr8")
    # A convolution's branch takes the place of a residual, which stays an Add.
    assert counts["Add"] == (1 if branches else 0)
    assert counts["Gelu"] == 0
    assert (counts["Widen"], counts["Cast"]) == (6 if branches else 0, 0)
    assert counts["QuantLinear"] == 2 and counts["QuantConv"] == 1
    assert (counts["QuantAttention"], counts["MultiHeadAttention"]) == (
        (1, 1) if attention else (0, 2)
    )
    feed = {"x": normal(2, 32, 6, 5), "time": normal(2, 32, 1, 1, seed=7)}
    reshaped = {name: array[:1] for name, array in feed.items()}
    fast = answer(session_of(fused, library), reshaped)
    slow = answer(session(lowered(proto, {q.layer.node: q for q in layers})), reshaped)
    assert fast.shape == slow.shape and off(fast, slow) < 0.03


def joint_attention(
    text: int, d: int = 8, epsilon: float = 1e-6, start: int = 0, read: bool = False
) -> onnx.ModelProto:
    """Attention of an image's tokens and a text's (text: 1) or of the former alone, as a FLUX
    transformer is exported. start: position from which on pairs are rotated. read: the normalized
    values are read by somebody else, too."""
    float_, heads, make = TensorProto.FLOAT, 2, helper.make_node
    wide, info, nodes = heads * d, helper.make_tensor_value_info, []
    shapes: dict[str, list[Any]] = {}
    weights: dict[str, Array] = {}
    for number, part in enumerate(("x", "t")[: 1 + text]):
        tokens = ["batch", f"tokens_{part}", wide]
        for letter, each in enumerate("qkv"):
            name = f"{part}{each}"
            weights[f"{name}.w"] = normal(wide, wide, seed=10 * number + letter)
            nodes.append(make("MatMul", [part, f"{name}.w"], [name], name=f"{name}/MatMul"))
            shapes[name] = tokens
            if each == "v":
                continue
            weights[f"{name}.norm"] = normal(d, seed=20 + 10 * number + letter)
            nodes += [
                make("Reshape", [name, "split"], [f"{name}4"], name=f"{name}/split"),
                make(
                    *("SimplifiedLayerNormalization", [f"{name}4", f"{name}.norm"], [f"{name}n"]),
                    name=f"{name}/norm",
                    axis=-1,
                    epsilon=epsilon,
                ),
                make("Reshape", [f"{name}n", "flat"], [f"{name}f"], name=f"{name}/flat"),
            ]
            for made in (f"{name}4", f"{name}n"):
                shapes[made] = [*tokens[:2], heads, d]
            shapes[f"{name}f"] = tokens
    nodes.append(make("Constant", [], ["start"], name="start", value_ints=[start]))
    for each in "qkv":
        end = f"x{each}" if each == "v" else f"x{each}f"
        if text:
            nodes.append(
                make("Concat", [end.replace("x", "t", 1), end], [f"j{each}"], f"j{each}", axis=1)
            )
            end, shapes[f"j{each}"] = f"j{each}", ["batch", "tokens", wide]
        if each == "v":
            value = end
            continue
        how: dict[str, Any] = {"interleaved": 1, "domain": "com.microsoft", "name": f"turn.{each}"}
        nodes.append(make("RotaryEmbedding", [end, "start", "cos", "sin"], [f"r{each}"], **how))
        shapes[f"r{each}"] = ["batch", "tokens", wide]
    nodes.append(
        make(
            *("MultiHeadAttention", ["rq", "rk", value], ["y"], "attention"),
            domain="com.microsoft",
            num_heads=heads,
            scale=0.3,
            unidirectional=0,
        )
    )
    ints = {"split": [0, 0, heads, d], "flat": [0, 0, wide]}
    outputs = [info("y", float_, ["batch", "tokens", wide])]
    if read:
        outputs.append(info("xqn", float_, shapes["xqn"]))
    made_graph = helper.make_graph(
        nodes,
        "transformer",
        [
            *(info(part, float_, shapes[f"{part}v"]) for part in ("x", "t")[: 1 + text]),
            *(info(name, float_, ["tokens", d // 2]) for name in ("cos", "sin")),
        ],
        outputs,
        [
            *(numpy_helper.from_array(array, name) for name, array in weights.items()),
            *(numpy_helper.from_array(np.array(v, np.int64), name) for name, v in ints.items()),
        ],
        value_info=[info(name, float_, shape) for name, shape in shapes.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(made_graph, opset_imports=opsets, ir_version=10)


@pytest.mark.parametrize("text", [0, 1])
@pytest.mark.parametrize("read", [False, True])
def test_norms_and_rotation_of_heads_become_part_of_attention(
    text: int, read: bool, library: Path
) -> None:
    proto = joint_attention(text, read=read)
    fused = own(proto, [])
    counts = Counter(node.op_type for node in fused.graph.node)
    assert counts["QuantAttention"] == 1
    assert counts["RotaryEmbedding"] == counts["Concat"] == 0
    assert counts["SimplifiedLayerNormalization"] == read
    angles = normal(9 + 5 * text, 4, seed=3)
    feed = {"x": normal(2, 9, 16), "cos": np.cos(angles), "sin": np.sin(angles)}
    if text:
        feed["t"] = normal(2, 5, 16, seed=1)
    assert off(answer(session_of(fused, library), feed), answer(session(proto), feed)) < 0.02


def test_a_rotation_that_the_kernel_does_not_know_stays(library: Path) -> None:
    """From another position on: queries and keys are taken as they come out of it."""
    fused = own(joint_attention(1, start=2), [])
    counts = Counter(node.op_type for node in fused.graph.node)
    assert (counts["QuantAttention"], counts["RotaryEmbedding"], counts["Concat"]) == (1, 2, 3)


@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("read", [False, True])
def test_what_comes_before_a_convolution_becomes_part_of_it(
    read: bool, silu: bool, upsample: bool, library: Path
) -> None:
    """read: the normalized values are read by somebody else, too, and must stay."""
    float_, make, info = TensorProto.FLOAT, helper.make_node, helper.make_tensor_value_info
    weights: dict[str, Any] = {
        "conv.w": normal(40, 32, 3, 3, seed=1) * np.float32(0.1),
        "gamma": normal(32, 1, 1, seed=2) + np.float32(1),
        "beta": normal(32, 1, 1, seed=3),
        "ones": np.ones(8, np.float32),
        "zeros": np.zeros(8, np.float32),
        "flat": np.array([0, 8, -1]),
        "twice": np.array([1, 1, 2, 2], np.float32),
    }
    nodes = [
        make("Reshape", ["x", "flat"], ["r"], name="n/r"),
        make("InstanceNormalization", ["r", "ones", "zeros"], ["i"], name="n/i", epsilon=1e-5),
        make("Shape", ["x"], ["s"], name="n/s"),
        make("Reshape", ["i", "s"], ["b"], name="n/b"),
        make("Mul", ["b", "gamma"], ["m"], name="n/m"),
        make("Add", ["m", "beta"], ["a"], name="n/a"),
    ]
    last = "a"
    if silu:
        nodes.append(make("Sigmoid", ["a"], ["sigmoid"], name="n/sigmoid"))
        nodes.append(make("Mul", ["a", "sigmoid"], ["silu"], name="n/silu"))
        last = "silu"
    if upsample:
        how = {"mode": "nearest", "nearest_mode": "floor"}
        how["coordinate_transformation_mode"] = "asymmetric"
        nodes.append(make("Resize", [last, "", "twice"], ["up"], name="n/up", **how))
        last = "up"
    nodes.append(make("Conv", [last, "conv.w"], ["y"], name="c.conv/Conv", pads=[1] * 4))
    outputs = [info("y", float_, ["b", 40, "h2", "w2"])]
    if read:
        outputs.append(info("a", float_, ["b", 32, "h", "w"]))
    proto = helper.make_model(
        helper.make_graph(
            nodes,
            "unet",
            [info("x", float_, ["b", 32, "h", "w"]), info("timestep", float_, [1])],
            outputs,
            [numpy_helper.from_array(array, name) for name, array in weights.items()],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    layers = quantized_block(proto, "w8a8")
    fused = own(proto, layers)
    counts = Counter(node.op_type for node in fused.graph.node)
    assert counts["Resize"] == 0
    assert counts["InstanceNormalization"] == (1 if read else 0)
    assert counts["Sigmoid"] == 0
    feed = {"x": normal(2, 32, 6, 5) * np.float32(3) + np.float32(2)}
    slow = session(lowered(proto, {q.layer.node: q for q in layers}))
    assert off(answer(session_of(fused, library), feed), answer(slow, feed)) < 0.02


def test_a_sum_that_somebody_else_reads_stays() -> None:
    proto = block()
    proto.graph.output.append(helper.make_tensor_value_info("l", TensorProto.FLOAT, None))
    fused = own(proto, quantized_block(proto, "w8a8"))
    assert "l" in {o.name for o in fused.graph.output}
    assert sum(node.op_type == "Add" for node in fused.graph.node) == 2


def test_both_graphs_share_one_file_of_weights(tmp_path: Path, library: Path) -> None:
    proto = block(64)
    layers = {q.layer.node: q for q in quantized_block(proto, "w4a8-g32")}
    plain, fused = ir.serde.deserialize_model(lowered(proto, layers)), own_model(proto, layers)
    write_model(plain, tmp_path / "alone")
    stock = ir.serde.deserialize_model(lowered(proto, layers))
    write_model(stock, tmp_path / "both", {"kernels.onnx": fused})
    alone, both = (tmp_path / name / "weights.bin" for name in ("alone", "both"))
    assert both.stat().st_size < alone.stat().st_size * 1.05
    feed = {"x": normal(1, 64, 8, 8), "time": normal(1, 64, 1, 1, seed=7)}
    found = [
        answer(
            onnxruntime.InferenceSession(
                str(tmp_path / "both" / name), session_options(1, library), ["CPUExecutionProvider"]
            ),
            feed,
        )
        for name in ("model.onnx", "kernels.onnx")
    ]
    assert off(found[1], found[0]) < 0.03


@pytest.mark.parametrize("scheme", ["w4a8-g32", "w4a8-g32-lr64"])
@pytest.mark.parametrize("kept", [0, 10_000, None])
def test_weights_that_are_let_go_come_back(
    kept: int | None, scheme: str, tmp_path: Path, library: Path
) -> None:
    proto = block(128)
    layers = {q.layer.node: q for q in quantized_block(proto, scheme)}
    write_model(own_model(proto, layers), tmp_path)
    feed = {"x": normal(1, 128, 8, 8), "time": normal(1, 128, 1, 1, seed=7)}

    def generated() -> list[Array]:
        loaded = onnxruntime.InferenceSession(
            str(tmp_path / "model.onnx"), session_options(1, library), ["CPUExecutionProvider"]
        )
        return [answer(loaded, feed) for _ in range(3)]

    wanted = generated()
    with kernels.keeping_weights(kept):
        assert all(np.array_equal(a, b) for a, b in zip(wanted, generated(), strict=True))


ADVICE = """
#include <dlfcn.h>
#include <stdio.h>
#include <sys/mman.h>
extern "C" int madvise(void* address, size_t bytes, int advice) noexcept {
  using Function = int (*)(void*, size_t, int);
  static const auto real = reinterpret_cast<Function>(dlsym(RTLD_NEXT, "madvise"));
  if (advice == MADV_WILLNEED || advice == MADV_DONTNEED)
    dprintf(1, "%s %p %zu\\n", advice == MADV_WILLNEED ? "ask" : "drop", address, bytes);
  return real(address, bytes, advice);
}
"""
"""The C library's function, which prints what it is told."""


def run_twice_without_keeping_weights(folder: Path) -> None:
    """Runs in a process with ADVICE."""
    with kernels.keeping_weights(0):
        loaded = onnxruntime.InferenceSession(
            str(folder / "model.onnx"),
            session_options(1, kernels.library()),
            ["CPUExecutionProvider"],
        )
    for _ in range(2):
        print("run", flush=True)
        answer(loaded, {"x": normal(1, 8, 512)})


def test_weights_are_asked_for_in_the_order_that_layers_run_in(
    tmp_path: Path, library: Path
) -> None:
    """ONNX Runtime makes layers of one input in the graph's order, and runs them in another."""
    (tmp_path / "advice.cpp").write_text(ADVICE)
    advice = tmp_path / "advice.so"
    command = ["g++", "-shared", "-fPIC", str(tmp_path / "advice.cpp"), "-o", str(advice), "-ldl"]
    subprocess.run(command, check=True)
    names, make = ("q", "k", "v", "out"), helper.make_node
    nodes = [make("MatMul", ["x", f"{one}.w"], [one], name=f"{one}/MatMul") for one in names[:3]]
    nodes += [
        make("Mul", ["q", "k"], ["qk"]),
        make("Mul", ["qk", "v"], ["qkv"]),
        make("MatMul", ["qkv", "out.w"], ["y"], name="out/MatMul"),
    ]
    rows = ["batch", "n", 512]
    info = helper.make_tensor_value_info
    inner = [info(name, TensorProto.FLOAT, rows) for name in (*names[:3], "qk", "qkv")]
    proto = helper.make_model(
        helper.make_graph(
            nodes,
            "unet",
            [info("x", TensorProto.FLOAT, rows)],
            [info("y", TensorProto.FLOAT, rows)],
            [
                numpy_helper.from_array(normal(512, 512, seed=i), f"{n}.w")
                for i, n in enumerate(names)
            ],
            value_info=inner,
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    layers = {q.layer.node: q for q in quantized_block(proto, "w4a8-g32")}
    assert len(layers) == 4
    write_model(own_model(proto, layers), tmp_path)
    code = (
        "import sys; from pathlib import Path; from tests.unit.runtime import test_kernels\n"
        "test_kernels.run_twice_without_keeping_weights(Path(sys.argv[1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, "LD_PRELOAD": str(advice), "EDGESD_KERNELS": str(library)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    last = done.stdout.split("run\n")[2].splitlines()
    codes = [line.split() for line in last if 2**17 - 8192 < int(line.split()[2]) <= 2**17]
    ran = [address for what, address, _ in codes if what == "drop"]
    assert len(ran) == len(set(ran)) == 4
    for place, address in enumerate(ran):
        asked = [one for what, one, _ in codes[4 * place : 4 * place + 3] if what == "ask"]
        assert asked == [*ran[place + 1 :], *ran[:place]], f"before {address}"


@pytest.mark.parametrize("scheme", ["w4a8-g32", "w4a8-g32-lr64"])
def test_weights_that_lie_in_memory_are_not_let_go(scheme: str, library: Path) -> None:
    """They would be lost, and answers be of zeros: of this thread, and of another one, which isn't
    told to let any go."""
    proto = block(128)
    model = own(proto, list(quantized_block(proto, scheme)))
    feed = {"x": normal(1, 128, 8, 8), "time": normal(1, 128, 1, 1, seed=7)}

    def generated() -> list[Array]:
        loaded = session_of(model, library)
        return [answer(loaded, feed) for _ in range(2)]

    wanted = generated()
    with ThreadPoolExecutor(1) as pool, kernels.keeping_weights(0):
        for found in (generated(), pool.submit(generated).result(timeout=60)):
            assert all(np.array_equal(a, b) for a, b in zip(wanted, found, strict=True))


# Graphs of an attacker.


def run_hostile(library: Path, *arguments: str) -> list[str]:
    """What tests.hostile_graphs prints, in a process of its own: a fault would end it."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.hostile_graphs", *arguments],
        cwd=ROOT,
        env={**os.environ, "EDGESD_KERNELS": str(library)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, (done.returncode, lines[-1:], done.stderr)
    return lines


def test_a_graph_that_does_not_fit_its_weights_is_refused(library: Path) -> None:
    lines = run_hostile(library)
    said = dict(zip(lines[::2], lines[1::2], strict=True))
    assert said.keys() == CASES.keys()
    exact = kernels.instruction_set() not in kernels.ONLY_4_BITS
    for name, (case, words) in CASES.items():
        if exact or case.attributes.get("bits") != 8:
            assert words in said[name], name
            assert said[name].startswith("ran" if words == "ran" else "refused: "), name


def test_random_graphs_are_refused_or_answered_in_whole(library: Path) -> None:
    """More of them, with sanitizers: test_kernels_sanitized.py."""
    said = run_hostile(library, "7", "0", "240")[1::2]
    assert len(said) == 240 and not [line for line in said if line.startswith("wrong")]
    assert said.count("ran") > 30


@pytest.mark.parametrize(
    ("n", "words"),
    [
        (10**8, "QuantLinear: N is 100000000"),
        (4096, "QuantLinear: codes is [64, 64], not of 262144"),
    ],
)
def test_a_bundle_with_such_a_graph_ends_in_one_line(
    n: int, words: str, tmp_path: Path, library: Path
) -> None:
    if kernels.instruction_set() in kernels.ONLY_4_BITS:
        pytest.skip("8-bit weights aren't generated with these instructions")
    folder, part = tmp_path / "bundle", "text_encoder/kernels.onnx"
    bundle = write_bundle(folder, *TARGET)
    proto = onnx.load(folder / "text_encoder/model.onnx")
    weights = {"a": np.ones((4, 64), np.float32), "b": np.ones((64, 64), np.int8)}
    weights["c"] = np.ones(64, np.float32)
    proto.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in weights.items())
    attributes = {"bits": 8, "group": 1, "layout": 0, "N": n, "K": 64, "gated": 0}
    proto.graph.node.append(
        helper.make_node("QuantLinear", list(weights), ["d"], domain="edgesd", **attributes)
    )
    proto.graph.output.append(helper.make_tensor_value_info("d", TensorProto.FLOAT, None))
    proto.opset_import.append(helper.make_opsetid("edgesd", 1))
    (folder / part).write_bytes(proto.SerializeToString())
    layer = LayerRecipe("l", "text_encoder", "linear", (64, 64), "w8a8", "rtn", 0, 4096, 0.0)
    engines = dict(bundle.manifest.engines)
    engines["text_encoder"] = msgspec.structs.replace(engines["text_encoder"], kernels=part)
    manifest = msgspec.structs.replace(
        bundle.manifest, engines=engines, recipe=QuantRecipe("w8a8", False, (layer,))
    )
    update_manifest(folder, manifest, [part])
    image = tmp_path / "image.png"
    done = subprocess.run(
        [sys.executable, "-m", "edgesd", "generate", str(folder), "-p", "x", "-o", str(image)],
        env={**os.environ, "EDGESD_KERNELS": str(library)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 4 and not image.exists(), done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("edgesd: text_encoder ") and words in line


# Being without memory.

NO_MEMORY = """
#include <cstdlib>
#include <sys/syscall.h>
#include <unistd.h>
static volatile bool refused;
extern "C" void refuse_memory(bool on) { refused = on; }
extern "C" void* aligned_alloc(size_t alignment, size_t size) noexcept {
  void* found = nullptr;
  if (refused && syscall(SYS_gettid) != getpid()) return nullptr;
  return posix_memalign(&found, alignment, size) ? nullptr : found;
}
"""
"""The C library's function, which gives threads beside the first one nothing when it is told so."""


def generated_without_memory(folder: Path, library: Path) -> None:
    """Runs in a process with NO_MEMORY. Prints ResourceError's words when a worker got no memory,
    and whether the next run gives what a run before gave."""
    import ctypes

    feed = {"x": normal(1, 64, 48, 48), "time": normal(1, 64, 1, 1, seed=7)}
    inputs = [TensorSpec(name, "float32", array.shape) for name, array in feed.items()]
    spec = ComponentSpec(
        "unet",
        (*inputs, TensorSpec("timestep", "float32", (1,))),
        (TensorSpec("y", "float32", (1, 48 * 48, 64)),),
    )
    refuse = ctypes.CDLL(None).refuse_memory
    found = []
    for refused in (False, True):
        graph = GraphFile((folder / "model.onnx").read_bytes(), folder)
        with OnnxRuntimeRunner(spec, graph, 2, library=library) as runner:
            runner.bind({name: array.shape for name, array in feed.items()} | {"timestep": (1,)})
            for name, array in feed.items():
                runner.inputs[name][...] = array
            refuse(refused)
            for _ in range(300 if refused else 0):  # until a worker has taken a part
                try:
                    runner.run()
                except ResourceError as exc:
                    print(exc)
                    break
            refuse(False)
            runner.run()
            found.append(runner.outputs["y"].copy())
    print(np.array_equal(*found))


def test_without_memory_in_a_worker_a_run_fails_and_the_process_goes_on(
    tmp_path: Path, library: Path
) -> None:
    (tmp_path / "refuse.cpp").write_text(NO_MEMORY)
    refuse = tmp_path / "refuse.so"
    command = ["g++", "-shared", "-fPIC", str(tmp_path / "refuse.cpp"), "-o", str(refuse)]
    subprocess.run(command, check=True)
    proto = block(64)
    layers = {q.layer.node: q for q in quantized_block(proto, "w4a8-g32")}
    write_model(own_model(proto, layers), tmp_path)
    code = (
        "import sys; from pathlib import Path; from tests.unit.runtime import test_kernels\n"
        "test_kernels.generated_without_memory(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), str(library)],
        env={**os.environ, "LD_PRELOAD": str(refuse)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,  # a worker that is lost may be waited for without end
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "not enough memory for unet: use --memory stream, a smaller --size or --batch 1",
        "True",
    ]


# Being without them.


def test_the_library_can_be_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for value, expected in (("none", None), (str(tmp_path / "no.so"), tmp_path / "no.so")):
        monkeypatch.setenv("EDGESD_KERNELS", value)
        kernels.forget()
        assert kernels.library() == expected and not kernels.usable(["w4a8-g64"])
        assert ensure_library() is None
    kernels.forget()


def test_8_bit_weights_need_exact_sums(monkeypatch: pytest.MonkeyPatch, library: Path) -> None:
    if runs("avx2") is None:
        pytest.skip("no x86 processor with AVX2")
    monkeypatch.setenv("EDGESD_INSTRUCTION_SET", "avx2")
    kernels.forget()
    assert kernels.instruction_set() == "avx2"
    assert kernels.usable(["w4a8-g64"]) and not kernels.usable(["fp16", "w8a8"])
    proto = graph(KINDS["linear"])
    model = own(proto, [quantize(KINDS["linear"], proto, "w8a8", False, 1)])
    with pytest.raises(Exception, match="8-bit weights aren't exact with avx2"):
        session_of(model, library)
    model = own(proto, [quantize(KINDS["linear"], proto, "w4a8-g32", False, 1)])
    assert session_of(model, library)
    kernels.forget()


@pytest.mark.parametrize("what", ["text", "foreign", "folder", "empty name"])
def test_what_is_no_library_of_edgesds_is_left_alone(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "kernels.so"
    if what == "text":
        path.write_bytes(b"\x7fELF, or so it says")
    elif what == "foreign":
        path = Path(ctypes.util.find_library("m") or "libm.so.6")
    elif what == "folder":
        path.mkdir()
    monkeypatch.setenv("EDGESD_KERNELS", "" if what == "empty name" else str(path))
    kernels.forget()
    try:
        assert kernels.instruction_set() == "" and not kernels.usable(["w4a8-g64"])
        with kernels.keeping_weights(0):
            pass
        assert ensure_library() is None
    finally:
        monkeypatch.undo()
        kernels.forget()


def test_a_library_that_others_can_change_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("EDGESD_KERNELS", raising=False)
    monkeypatch.setattr(kernels, "SOURCES", tmp_path / "sources")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = kernels.library_folders()[1] / kernels.library_name(platform.machine())
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")

    def found() -> Path | None:
        kernels.forget()
        return kernels.library()

    try:
        assert found() == path
        for place in (path, path.parent, tmp_path / "cache"):
            mode = place.stat().st_mode
            place.chmod(0o777)
            assert found() is None and f"another user can write {place}" in caplog.text
            with pytest.raises(InputError, match="isn't used: another user can write"):
                build_library(platform.machine())
            place.chmod(mode)
            caplog.clear()
        (tmp_path / "cache").chmod(0o1777)  # as /tmp is: others can't take away what is there
        assert found() == path
        if os.geteuid() == 0:
            os.chown(path, 12345, -1)
        else:
            mine = os.geteuid()
            monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
        assert found() is None
    finally:
        monkeypatch.undo()
        kernels.forget()


def test_without_a_compiler_it_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(engine_kernels, "find_program", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"apt install g\+\+"):
        build_library(platform.machine(), tmp_path)
    with pytest.raises(TargetError, match="there are for x86_64, aarch64"):
        build_library("riscv64", tmp_path)
    assert not list(tmp_path.iterdir())


def own_model(proto: onnx.ModelProto, layers: dict[str, QuantizedLayer]) -> Any:
    model = ir.serde.deserialize_model(proto)
    OwnKernels(layers, None)(model)
    return model


def own(
    proto: onnx.ModelProto, layers: list[QuantizedLayer], attention: bool = True
) -> onnx.ModelProto:
    model = ir.serde.deserialize_model(proto)
    OwnKernels({q.layer.node: q for q in layers}, None, attention)(model)
    return ir.serde.serialize_model(model)


def session_of(proto: onnx.ModelProto, library: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(
        proto.SerializeToString(), session_options(1, library), ["CPUExecutionProvider"]
    )


def answer(loaded: onnxruntime.InferenceSession, feed: dict[str, Array]) -> Array:
    """y; the timestep is an input of some graphs only."""
    names = {i.name for i in loaded.get_inputs()}
    every = {**feed, "timestep": np.array([500], np.float32)}
    out: Array = loaded.run(["y"], {n: a for n, a in every.items() if n in names})[0]
    return out


def off(found: Array, wanted: Array) -> float:
    """Relative RMS."""
    return float(np.sqrt(np.mean((found - wanted) ** 2) / np.mean(wanted**2)))


def test_what_is_kept_is_asked_for_while_a_session_is_made_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Later sessions keep what they are told."""
    asked: list[int] = []

    class Library:
        edgesd_keep_weights = asked.append

    monkeypatch.setattr(kernels, "_functions", Library)
    with pytest.raises(ValueError, match="fails"), kernels.keeping_weights(5):
        raise ValueError("a session fails")
    with kernels.keeping_weights(None):
        pass
    assert asked == [5, -1]
