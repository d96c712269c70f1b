"""A miniature pipeline in ONNX, made without torch: real graphs, real weights, a few kilobytes."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import msgspec
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from edgesd.cli import main
from edgesd.engines.bundle import update_manifest, write_manifest
from edgesd.files import sha256_file
from edgesd.progress import Lines
from edgesd.runtime.bundle import Bundle, open_bundle
from edgesd.runtime.lora import Factors, lora_bytes
from edgesd.runtime.pictures import Picture, read_picture
from edgesd.spec.bundle import SCHEMA_VERSION, BundleManifest, Engine, FileEntry, Licence, Parity
from edgesd.spec.lora import LoraFile, LoraSlot, LoraSlots, slot_inputs
from edgesd.spec.pipeline import (
    ComponentSpec,
    EncoderSpec,
    LatentSpec,
    PipelineSpec,
    SchedulerSpec,
    ShapeSpec,
    TensorSpec,
    stable_diffusion,
)

CHANNELS, TEXT, SCALE, VOCABULARY = 4, 8, 2, 8
F32 = TensorProto.FLOAT


PATIENCE_SECONDS = 120.0
"""What is waited for at most where an idle machine takes a moment: others are slow, or busy."""


def wait_until(done: Callable[[], object], what: str, seconds: float = PATIENCE_SECONDS) -> None:
    """Return when `done()` is true; fail, naming `what` was waited for, when it never is."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.01)


def random_picture(seed: int, size: tuple[int, int]) -> Picture:
    """A picture of random boxes of colours. size: width and height, multiples of 3."""
    rng = np.random.default_rng(seed)
    cells = rng.integers(0, 256, (size[1] // 3, size[0] // 3, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(np.repeat(np.repeat(cells, 3, 0), 3, 1)).save(file, "PNG")
    return read_picture(file.getvalue(), f"{seed}.png")


def file_entries(root: Path) -> dict[str, FileEntry]:
    """What a manifest says of every file below `root`, sorted by name."""
    return {
        path.relative_to(root).as_posix(): FileEntry(path.stat().st_size, sha256_file(path))
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


class Recorded(Lines):
    """Progress that is kept: its lines, and of each update the task, done and total."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.updates: list[tuple[str, int, int]] = []
        super().__init__(self.lines.append)

    def update(
        self, task: str, done: int, total: int, note: str = "", *, in_bytes: bool = False
    ) -> None:
        """See Progress."""
        self.updates.append((task, done, total))


class Interrupting(Recorded):
    """Progress at which Ctrl-C is pressed, when `step` parts of a task are done."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def update(
        self, task: str, done: int, total: int, note: str = "", *, in_bytes: bool = False
    ) -> None:
        """See Progress."""
        super().update(task, done, total, note, in_bytes=in_bytes)
        if done == self.step:
            raise KeyboardInterrupt


class Outcome(NamedTuple):
    """What a command line did."""

    code: int
    out: str
    err: str


def run_cli(*arguments: object) -> Outcome:
    """Run `edgesd ARGUMENTS` in this process, as its entry point does."""
    out, err = io.StringIO(), io.StringIO()
    argv = ["edgesd", *map(str, arguments)]
    code: object = 0
    with (
        mock.patch.object(sys, "argv", argv),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as exc:
            code = exc.code
    return Outcome(int(code or 0), out.getvalue(), err.getvalue())


def assert_refused(outcome: Outcome, *words: str) -> None:
    """The command failed with exactly one line, which holds all `words`, and no traceback."""
    assert outcome.code != 0
    lines = [line for line in outcome.err.splitlines() if line]
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("edgesd: ")
    for word in words:
        assert word in lines[0], f"{word!r} not in {lines[0]!r}"


def _graph(
    folder: Path,
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    weights: dict[str, np.ndarray],
) -> None:
    """Write model.onnx and weights.bin, each weight 64-byte aligned, as the export does."""
    folder.mkdir(parents=True)
    tensors, blob = [], b""
    for name, array in weights.items():
        if array.size < 8:  # what shape inference reads must lie in the model itself
            tensors.append(numpy_helper.from_array(array, name))
            continue
        blob += bytes(-len(blob) % 64)
        tensor = TensorProto(
            name=name,
            data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
            dims=array.shape,
            data_location=TensorProto.EXTERNAL,
        )
        for key, value in (
            ("location", "weights.bin"),
            ("offset", str(len(blob))),
            ("length", str(array.nbytes)),
        ):
            tensor.external_data.add(key=key, value=value)
        tensors.append(tensor)
        blob += array.tobytes()
    graph = helper.make_graph(nodes, folder.name, inputs, outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    (folder / "weights.bin").write_bytes(blob)


def _value(name: str, dtype: int, shape: list[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def _write_encoder(folder: Path) -> None:
    """Mean and deviation [batch, C, h, w] of an image: its colours, and half of that."""
    weight = np.random.default_rng(1).standard_normal((CHANNELS, 3, 1, 1)).astype(np.float32)
    latent: list[int | str] = ["batch", CHANNELS, "h", "w"]
    size = [SCALE, SCALE]
    _graph(
        folder,
        [
            helper.make_node("AveragePool", ["image"], ["small"], kernel_shape=size, strides=size),
            helper.make_node("Conv", ["small", "kernel"], ["mean"]),
            helper.make_node("Mul", ["mean", "half"], ["std"]),
        ],
        [_value("image", F32, ["batch", 3, "height", "width"])],
        [_value("mean", F32, latent), _value("std", F32, latent)],
        {"kernel": weight, "half": np.float32([0.5])},
    )


def _write_graphs(root: Path, tokens: int | str) -> None:
    rng = np.random.default_rng(0)

    def weight(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32) * np.float32(0.3)

    _graph(
        root / "text_encoder",
        [helper.make_node("Gather", ["table", "input_ids"], ["encoder_hidden_states"])],
        [_value("input_ids", TensorProto.INT64, ["batch", 77])],
        [_value("encoder_hidden_states", F32, ["batch", 77, TEXT])],
        {"table": weight(VOCABULARY, TEXT)},
    )
    latent: list[int | str] = ["batch", CHANNELS, "height", "width"]
    _graph(
        root / "unet",
        [
            helper.make_node("Conv", ["sample", "kernel"], ["mixed"], pads=[1, 1, 1, 1]),
            helper.make_node("ReduceMean", ["encoder_hidden_states", "axes"], ["mean"], keepdims=0),
            helper.make_node("MatMul", ["mean", "project"], ["text"]),
            helper.make_node("Unsqueeze", ["text", "last"], ["text4"]),
            helper.make_node("Add", ["mixed", "text4"], ["sum"]),
            helper.make_node("Mul", ["timestep", "milli"], ["time"]),
            helper.make_node("Add", ["sum", "time"], ["raw"]),
            helper.make_node("Tanh", ["raw"], ["noise_pred"]),
        ],
        [
            _value("sample", F32, latent),
            _value("timestep", F32, [1]),
            _value("encoder_hidden_states", F32, ["batch", tokens, TEXT]),
        ],
        [_value("noise_pred", F32, latent)],
        {
            "kernel": weight(CHANNELS, CHANNELS, 3, 3),
            "project": weight(TEXT, CHANNELS),
            "milli": np.float32([1e-3]),
            "axes": np.int64([1]),
            "last": np.int64([2, 3]),
        },
    )
    _graph(
        root / "vae_decoder",
        [
            helper.make_node("Conv", ["latents", "kernel"], ["colour"]),
            helper.make_node("Resize", ["colour", "", "scales"], ["image"], mode="nearest"),
        ],
        [_value("latents", F32, latent)],
        [_value("image", F32, ["batch", 3, "h", "w"])],
        {"kernel": weight(3, CHANNELS, 1, 1), "scales": np.float32([1, 1, SCALE, SCALE])},
    )


def _tensor(name: str, dtype: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name, dtype, shape)


def _component(name: str, inputs: list[TensorSpec], output: TensorSpec) -> ComponentSpec:
    return ComponentSpec(name, tuple(inputs), (output,))


def for_images(spec: PipelineSpec) -> PipelineSpec:
    """The miniature pipeline with an encoder, and tasks that begin with an image."""
    latent = ("batch", CHANNELS, "h", "w")
    image = _tensor("image", "float32", "batch", 3, "height", "width")
    outputs = tuple(_tensor(name, "float32", *latent) for name in ("mean", "std"))
    wiring = msgspec.structs.replace(
        spec.wiring,
        tasks=("text", "image", "inpaint"),
        encoder=EncoderSpec("vae_encoder", "image", ("mean", "std")),
        strengths={"image": 0.8, "inpaint": 1.0},
    )
    components = {**spec.components, "vae_encoder": ComponentSpec("vae_encoder", (image,), outputs)}
    return msgspec.structs.replace(spec, wiring=wiring, components=components)


def pipeline_spec(tokens: int | str = 77) -> PipelineSpec:
    """Spec of the miniature pipeline: 4 latent channels, 2 pixels per latent, DDIM. tokens: that
    its denoiser takes of a prompt."""
    latent = ("batch", CHANNELS, "height", "width")
    states = _tensor("encoder_hidden_states", "float32", "batch", 77, TEXT)
    return PipelineSpec(
        family="sd",
        source="miniature",
        source_sha256="0" * 64,
        components={
            "text_encoder": _component(
                "text_encoder", [_tensor("input_ids", "int64", "batch", 77)], states
            ),
            "unet": _component(
                "unet",
                [
                    _tensor("sample", "float32", *latent),
                    _tensor("timestep", "float32", 1),
                    _tensor("encoder_hidden_states", "float32", "batch", tokens, TEXT),
                ],
                _tensor("noise_pred", "float32", *latent),
            ),
            "vae_decoder": _component(
                "vae_decoder",
                [_tensor("latents", "float32", *latent)],
                _tensor("image", "float32", "batch", 3, "h", "w"),
            ),
        },
        scheduler=SchedulerSpec("ddim", {"_class_name": "DDIMScheduler", "clip_sample": False}),
        latent=LatentSpec(CHANNELS, SCALE, 1.0),
        shape=ShapeSpec(16, 16, 63, dynamic=True, multiple_of=SCALE),
        num_inference_steps=4,
        guidance_scale=3.0,
        wiring=stable_diffusion(77),
    )


def write_tokenizer(folder: Path, pad: int = 2) -> None:
    """Write a tokenizer of a few words to the new `folder`. pad: id of what fills up a prompt."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["<unk>", "<|startoftext|>", "<|endoftext|>", "a", "red", "apple", "blue", "cat"]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>",
        special_tokens=[("<|startoftext|>", 1), ("<|endoftext|>", 2)],
    )
    folder.mkdir()
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    (folder / "tokenizer_spec.json").write_text(
        json.dumps({"max_length": 77, "pad_id": pad, "bos_id": 1, "eos_id": 2})
    )


def write_bundle(
    root: Path,
    target: str = "x86-64-cpu",
    arch: str = "x86_64",
    backend: str = "onnxruntime",
    tokens: int | str = 77,
    images: bool = False,
) -> Bundle:
    """Write the miniature pipeline as a bundle to the new folder `root`. tokens: that its denoiser
    takes of a prompt. images: whether it can begin with one."""
    root.mkdir(parents=True)
    _write_graphs(root, tokens)
    write_tokenizer(root / "tokenizer")
    (root / "LICENSE").write_text("Public domain.\n")
    spec = pipeline_spec(tokens)
    if images:
        _write_encoder(root / "vae_encoder")
        spec = for_images(spec)
    manifest = BundleManifest(
        schema_version=SCHEMA_VERSION,
        name="miniature",
        target=target,
        arch=arch,
        backend=backend,
        precision="fp32",
        pipeline=spec,
        engines={
            name: Engine(name, f"{name}/model.onnx", backend, "fp32", Parity(0.0, 0.0, 1e-4))
            for name in spec.components
        },
        licence=Licence("CC0-1.0", ("LICENSE",)),
        tools={"edgesd": "0"},
        files=file_entries(root),
    )
    write_manifest(root, manifest)
    return open_bundle(root)


def with_other_decoder(bundle: Bundle, path: Path, factor: float = 0.97) -> Bundle:
    """A copy of a bundle folder at `path`, with its decoder's weights multiplied by `factor`."""
    shutil.copytree(bundle.path, path)
    name = "vae_decoder/weights.bin"
    weights = np.fromfile(path / name, np.float32)
    (weights * np.float32(factor)).tofile(path / name)
    update_manifest(path, bundle.manifest, [name])
    return open_bundle(path)


def with_lora_slot(bundle: Bundle, path: Path, rank: int = 4) -> Bundle:
    """A copy of a bundle folder at `path`, whose UNet has a slot for LoRAs: in `project`, of what
    it takes of the prompt."""
    shutil.copytree(bundle.path, path)
    name = "unet/model.onnx"
    model = onnx.load(path / name, load_external_data=False)
    at = next(i for i, node in enumerate(model.graph.node) if "project" in node.input)
    linear = model.graph.node[at]
    source, written = linear.input[0], linear.output[0]
    linear.output[0] = "without"
    down, up = slot_inputs(0)
    model.graph.input.extend([_value(down, F32, [TEXT, "r"]), _value(up, F32, ["r", CHANNELS])])
    added = (
        helper.make_node("MatMul", [source, down], ["low"]),
        helper.make_node("MatMul", ["low", up], ["product"]),
        helper.make_node("Add", ["without", "product"], [written]),
    )
    for behind, node in enumerate(added, 1):
        model.graph.node.insert(at + behind, node)
    (path / name).write_bytes(model.SerializeToString())
    slots = LoraSlots(rank, False, (LoraSlot("project", TEXT, CHANNELS),))
    unet = msgspec.structs.replace(bundle.manifest.engines["unet"], slots=slots)
    engines = {**bundle.manifest.engines, "unet": unet}
    update_manifest(path, msgspec.structs.replace(bundle.manifest, engines=engines), [name])
    return open_bundle(path)


def lora_file(path: Path, rank: int = 2, seed: int = 0, outputs: int = CHANNELS) -> Path:
    """A LoRA for the slot of `with_lora_slot`, in a new file."""
    rng = np.random.default_rng(seed)
    down, up = (rng.standard_normal(s, np.float32) for s in ((TEXT, rank), (rank, outputs)))
    about = LoraFile(1, path.name, "ab" * 32, "miniature")
    path.write_bytes(lora_bytes({("unet", "project"): Factors(down, up)}, about))
    return path
