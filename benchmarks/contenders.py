"""The contenders of `peers`: each loads its own files, and lives in a process of its own."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks.peer_files import QUANTIZED, SDCPP_TYPES, Inputs, Model, load_torch
from edgesd.errors import EdgesdError
from edgesd.spec.pipeline import ComponentSpec

Array = npt.NDArray[np.float32]
Predict = Callable[[Inputs], Array]


class Loaded(NamedTuple):
    """A contender's answer once it can run. note: version, and precision as it states it."""

    seconds: float
    note: str


class Stepped(NamedTuple):
    """A contender's answer to a step: inputs in, noise_pred on the host. output: if wanted."""

    seconds: float
    output: Array | None


class Failed(NamedTuple):
    """A contender's answer when it can't go on."""

    message: str


Answer = Loaded | Stepped | Failed


def serve(
    name: str, folder: Path, model: Model, threads: int, connection: Connection[Answer, Any]
) -> None:
    """Load contender `name` and answer each request: True runs a step and sends its output, False
    runs a step, None ends."""
    try:
        start = time.perf_counter()
        step, note = CONTENDERS[name](folder, model, threads)
        connection.send(Loaded(time.perf_counter() - start, note))
        inputs = model.inputs()
        while (wanted := connection.recv()) is not None:
            start = time.perf_counter()
            output = step(inputs)
            seconds = time.perf_counter() - start
            connection.send(Stepped(seconds, output if wanted else None))
    except (EOFError, KeyboardInterrupt):
        pass  # the parent has gone
    except Exception as exc:  # noqa: BLE001 - handed to the parent, whatever it is
        connection.send(Failed(f"{type(exc).__name__}: {' '.join(str(exc).split())[:500]}"))


def _edgesd(
    graph: Path, spec: ComponentSpec, inputs: Inputs, threads: int, how: str = ""
) -> tuple[Predict, str]:
    """edgesd's own runner, as the device side uses it. how: "stock" without our own kernels,
    "stream" with weights let go after each layer."""
    import onnxruntime

    from edgesd.runtime import kernels
    from edgesd.runtime.backends.onnxruntime import OnnxRuntimeRunner
    from edgesd.runtime.bundle import GraphFile

    own = (graph / "kernels.onnx").exists() and how != "stock"
    library = kernels.library() if own else None
    if own and library is None:
        raise EdgesdError("edgesd's own kernels aren't there: edgesd kernels build")
    file = GraphFile((graph / ("kernels.onnx" if own else "model.onnx")).read_bytes(), graph)
    with kernels.keeping_weights(0 if own and how == "stream" else None):
        runner = OnnxRuntimeRunner(spec, file, threads, library=library)
    runner.bind({name: array.shape for name, array in inputs.items()})

    def step(inputs: Inputs) -> Array:
        for name, array in inputs.items():
            runner.inputs[name][:] = array
        runner.run()
        return runner.outputs["noise_pred"].astype(np.float32, copy=False)

    isa = kernels.instruction_set() if own else "its own operators"
    return step, f"onnxruntime {onnxruntime.__version__}, {isa} {how}".strip()


def openvino_step(folder: Path, threads: int) -> tuple[Predict, str]:
    """A fixed size, one stream, and fp32 by hint: on a CPU with bf16 OpenVINO's default is bf16."""
    import openvino
    from openvino import properties
    from openvino.properties import hint

    core = openvino.Core()
    compiled = core.compile_model(
        core.read_model(folder / "unet.xml"),
        "CPU",
        {
            hint.inference_precision(): openvino.Type.f32,
            hint.performance_mode(): hint.PerformanceMode.LATENCY,
            properties.inference_num_threads(): threads,
            properties.num_streams(): 1,
        },
    )
    request = compiled.create_infer_request()

    def step(inputs: Inputs) -> Array:
        request.infer(inputs)
        output: Array = request.get_output_tensor(0).data
        return output

    precision = compiled.get_property(hint.inference_precision()).to_string()
    used = compiled.get_property(properties.inference_num_threads())
    version = openvino.__version__.partition("-")[0]
    return step, f"openvino {version}, precision {precision}, {used} threads"


def _torch(folder: Path, model: Model, threads: int) -> tuple[Predict, str]:
    """Eager, with diffusers' default attention: scaled_dot_product_attention."""
    import torch

    torch.set_num_threads(threads)
    module = load_torch(folder)

    def step(inputs: Inputs) -> Array:
        with torch.inference_mode():
            output: Array = module(*(torch.from_numpy(array) for array in inputs.values())).numpy()
        return output

    return step, f"torch {torch.__version__} eager, fp32, {torch.get_num_threads()} threads"


def _sdcpp(folder: Path, threads: int) -> tuple[Predict, str]:
    """stable-diffusion.cpp generates one endless image on a thread, and waits before each step."""
    import stable_diffusion_cpp

    model = stable_diffusion_cpp.StableDiffusion(
        model_path=str(folder / "model.gguf"),
        n_threads=threads,
        diffusion_flash_attn=True,
        verbose=False,
    )
    go, done = queue.Queue[None](), queue.Queue[None]()

    def between(step: int, steps: int, seconds: float) -> None:
        done.put(None)
        go.get()

    def generate() -> None:
        model.generate_image(
            "a red apple", sample_steps=1000, cfg_scale=1.0, progress_callback=between
        )

    threading.Thread(target=generate, daemon=True).start()
    done.get()  # before the first step

    def step(inputs: Inputs) -> Array:
        go.put(None)
        done.get()
        return np.zeros(0, np.float32)  # it doesn't show what its UNet gives

    version = metadata.version("stable-diffusion-cpp-python")
    return step, f"stable-diffusion-cpp-python {version}"


def _quantized(name: str, how: str) -> Callable[[Path, Model, int], tuple[Predict, str]]:
    return lambda folder, model, threads: _edgesd(
        folder / name, model.spec(), model.inputs(), threads, how
    )


def _gguf(name: str) -> Callable[[Path, Model, int], tuple[Predict, str]]:
    return lambda folder, _, threads: _sdcpp(folder / name, threads)


CONTENDERS: dict[str, Callable[[Path, Model, int], tuple[Predict, str]]] = {
    "edgesd": lambda folder, model, threads: _edgesd(
        folder / "edgesd", model.spec(), model.inputs(), threads
    ),
    "edgesd-static": lambda folder, model, threads: _edgesd(
        folder / "edgesd-static", model.spec(static=True), model.inputs(), threads
    ),
    "openvino": lambda folder, _, threads: openvino_step(folder / "openvino", threads),
    "openvino-onnx": lambda folder, _, threads: openvino_step(folder / "openvino-onnx", threads),
    "openvino-int8": lambda folder, _, threads: openvino_step(folder / "openvino-int8", threads),
    "torch": _torch,
    **{
        f"edgesd-{precision}{'+' if how else ''}{how}": _quantized(f"edgesd-{precision}", how)
        for precision in QUANTIZED
        for how in ("", "stock", "stream")
    },
    **{f"sdcpp-{kind}": _gguf(f"sdcpp-{kind}") for kind in SDCPP_TYPES},
}
"""Name -> loads from the folder of all formats; returns what runs a step, and a note."""
