"""A full autoencoder's decoder or encoder: as a whole, and in tiles. Seconds, peak memory, PSNR.

    python -m benchmarks.vae_tiles --folder FOLDER [--half encoder] [--sizes 512 1024]
        [--precisions fp32 w8a8]

The half of Stable Diffusion 1.5's size with random weights, or, with --autoencoder, that of an
AutoencoderKL's folder. Each run has a process of its own, in which all is imported that `generate`
imports; rounds alternate. PSNR is against fp32 as a whole, over images from -1 to 1, or over the
latents' mean as far as 2 deviations. FOLDER keeps graphs of 200 MB. The input is noise, for an
encoder with smooth light and flat parts, or --input FILE.npy [B, C, h, w].
"""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from benchmarks.common import environment, parser, run, spread, table, write_json
from edgesd.errors import EdgesdError
from edgesd.files import atomic_dir
from edgesd.spec.bundle import SplitComponent
from edgesd.spec.pipeline import ComponentSpec, LatentSpec, TensorSpec
from edgesd.spec.scheme import parse_scheme

Array = npt.NDArray[np.float32]
SCALE = 8
MODES = ("whole", "tiles")
IMAGE = TensorSpec("image", "float32", ("batch", 3, "image_height", "image_width"))


def _latents(name: str) -> TensorSpec:
    return TensorSpec(name, "float32", ("batch", 4, f"{name}_height", f"{name}_width"))


SPECS = {
    "decoder": ComponentSpec("vae_decoder", (_latents("latents"),), (IMAGE,)),
    "encoder": ComponentSpec("vae_encoder", (IMAGE,), (_latents("mean"), _latents("std"))),
}


class Made(NamedTuple):
    """One run: seconds without loading, with loading, peak RSS, passes of each part in tiles, and
    the first output."""

    seconds: float
    with_loading: float
    peak_bytes: int
    passes: tuple[int, ...]
    image: Array


def make_graphs(half: str, folder: Path, precision: str, autoencoder: Path | None) -> None:
    """Write the graphs of a half, and what a bundle says of them, to the new folder `folder`."""
    import onnx_ir as ir

    from edgesd.export.backends.onnxruntime import LOWERING
    from edgesd.export.external_data import KERNELS_FILE, split_files, write_model
    from edgesd.export.passes.split_autoencoder import describe_split, split_component
    from edgesd.export.quantize.layers import find_layers, matrix_of
    from edgesd.export.quantize.quantize import rounded_layer

    model = _exported(half, autoencoder)
    parts = split_component(model)
    if not parts:
        raise EdgesdError(f"the {half} in {autoencoder} can't be split")
    files = split_files(len(parts))
    graphs = dict(zip(("model.onnx", *files), (model, *parts), strict=True))
    if precision in ("fp32", "fp16"):
        for graph in graphs.values():
            LOWERING.lower(graph, precision)
        names: Sequence[str] = ()
    else:
        scheme, nodes = parse_scheme(precision), {node.name: node for node in model.graph}
        layers = {
            layer.node: rounded_layer(layer, matrix_of(nodes[layer.node], layer), scheme)
            for layer in find_layers(SPECS[half].name, model)
        }

        def mine(graph: ir.Model) -> Any:
            there = {node.name for node in graph.graph}
            return {name: layer for name, layer in layers.items() if name in there}

        names = split_files(len(parts), kernels=True)
        own = [graph.clone() for graph in graphs.values()]
        for graph in graphs.values():
            LOWERING.lower_quantized(graph, mine(graph), set(), None)
        for name, graph in zip((KERNELS_FILE, *names), own, strict=True):
            LOWERING.lower_to_kernels(graph, mine(graph), set(), None, attention=False)
            graphs[name] = graph
    split = describe_split(SPECS[half].name, [graphs[name] for name in files], files, names)
    with atomic_dir(folder) as out:
        write_model(graphs.pop("model.onnx"), out, graphs)
        (out / "split.json").write_bytes(msgspec.json.encode(split))


def _exported(half: str, autoencoder: Path | None) -> Any:
    """The fp32 graph of a half."""
    import torch
    from diffusers import AutoencoderKL

    from edgesd.export.families import Component
    from edgesd.export.families.parts.vae import VaeDecoder, VaeEncoder
    from edgesd.export.to_onnx import graph_from_module

    make: Any = AutoencoderKL
    torch.manual_seed(0)
    if autoencoder is None:
        net = make(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
    else:
        net = make.from_pretrained(autoencoder, local_files_only=True)
    decodes = half == "decoder"
    if decodes:
        net.encoder = net.quant_conv = None
    else:
        net.decoder = net.post_quant_conv = None
    latent = LatentSpec(4, SCALE, net.config.scaling_factor)
    module = (VaeDecoder if decodes else VaeEncoder)(net.eval().requires_grad_(False), latent)
    unit, prefix = (1, "latents") if decodes else (SCALE, "image")
    sizes = {"batch": 2, f"{prefix}_height": 16 * unit, f"{prefix}_width": 24 * unit}
    multiples = dict.fromkeys(("image_height", "image_width"), SCALE)
    component = Component(SPECS[half], lambda: module, (sizes,), multiples=multiples)
    return graph_from_module(module, component, "ort-mha")


def compute(
    half: str, folder: Path, mode: str, given: Array, kernels: bool, answer: Connection
) -> None:
    """In a process of its own: run a half on latents or an image [1, C, h, w] and send what it
    took."""
    import PIL.Image  # noqa: F401 - part of what `generate` has in memory

    import edgesd.runtime.pipeline  # noqa: F401
    from edgesd.runtime import kernels as own
    from edgesd.runtime import tiles
    from edgesd.runtime.backends.base import Runner, run_once
    from edgesd.runtime.backends.onnxruntime import OnnxRuntimeRunner
    from edgesd.runtime.bundle import GraphFile
    from edgesd.runtime.memory import give_back, peak_bytes

    split = msgspec.json.decode((folder / "split.json").read_bytes(), type=SplitComponent)
    library = own.library() if kernels else None

    def opened(spec: ComponentSpec, name: str, small: bool) -> Runner:
        graph = GraphFile((folder / name).read_bytes(), folder)
        in_file = small and not kernels
        with own.keeping_weights(0 if kernels and mode == "tiles" else None):
            return OnnxRuntimeRunner(spec, graph, 0, False, library, in_file, small)

    began = time.perf_counter()
    passes = []
    seconds, spec, made = 0.0, SPECS[half], given
    if mode == "whole":
        with opened(spec, "kernels.onnx" if kernels else "model.onnx", False) as runner:
            made = np.array(run_once(runner, {spec.inputs[0].name: given})[spec.outputs[0].name])
            seconds = runner.seconds
    else:
        counted, difference = 0, tiles.difference

        def counting(taken: tiles.Figures, found: tiles.Figures) -> float:
            nonlocal counted
            counted += 1
            return difference(taken, found)

        tiles.difference = counting
        window = max(tiles.WINDOWS)
        for index, part in enumerate(split.parts):
            file = Path(part.kernels if kernels and part.kernels else part.path).name
            with opened(part.spec, file, True) as runner:
                if part.spec.input("statistics") is None:
                    fed = {part.spec.inputs[0].name: made}
                    made = np.array(run_once(runner, fed)[part.spec.outputs[0].name])
                elif part.margins is None:
                    made = tiles.in_tiled_part(runner, made[0], (1, SCALE), window)[None]
                else:
                    side = tiles.encoder_window(window, index)
                    made = tiles.in_tiled_part(runner, made[0], (2, 1), side, part.margins)[None]
                seconds += runner.seconds
            give_back()
            # An encoder's first pass is compared with none before it.
            passes.append(counted + (part.margins is not None and counted > 0))
            counted = 0
    loaded = time.perf_counter() - began
    answer.send(Made(seconds, loaded, peak_bytes(), tuple(passes), made[0]))
    answer.close()


def _apart(work: Callable[..., None], *arguments: Any) -> Made:
    """What `work` sends from a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(*arguments, theirs))
    process.start()
    theirs.close()
    try:
        found: Made = ours.recv()
    except EOFError as exc:
        raise EdgesdError("a run ended without an output: see above") from exc
    finally:
        process.join()
    return found


def psnr(found: Array, wanted: Array) -> float:
    """In dB, of values from -1 to 1; what lies outside is cut off, as in images."""
    error = float(np.mean((found.clip(-1, 1) - wanted.clip(-1, 1)).astype(np.float64) ** 2))
    return -10 * math.log10(error / 4) if error else math.inf


def measure(
    half: str,
    folders: dict[str, Path],
    inputs: dict[int, Array],
    modes: Sequence[str],
    rounds: int,
) -> list[dict[str, Any]]:
    """A row for each size, precision and mode; the first is what the others are compared with."""
    rows = []
    for size, given in inputs.items():
        found: dict[tuple[str, str], list[Made]] = {}
        for _ in range(rounds):
            for precision, folder in folders.items():
                for mode in modes:
                    kernels = precision not in ("fp32", "fp16")
                    one = _apart(compute, half, folder, mode, given, kernels)
                    found.setdefault((precision, mode), []).append(one)
        wanted = found.get(("fp32", "whole"))
        for (precision, mode), several in found.items():
            first = several[0]
            whole = found.get((precision, "whole"))
            rows.append(
                {
                    "size": size,
                    "precision": precision,
                    "mode": mode,
                    "seconds": spread(one.seconds for one in several)._asdict(),
                    "with_loading": spread(one.with_loading for one in several)._asdict(),
                    "peak_rss_bytes": max(one.peak_bytes for one in several),
                    "passes": first.passes,
                    "psnr_to_fp32": _decibels(first, wanted),
                    "psnr_to_whole": _decibels(first, whole),
                }
            )
    return rows


def _decibels(found: Made, wanted: list[Made] | None) -> float | None:
    """None for equal images, and where there is nothing to compare with."""
    value = math.inf
    if wanted is not None:
        whole = wanted[0].image
        scale = 1.0 if len(whole) == 3 else 2 * float(whole.std())
        value = psnr(found.image / scale, whole / scale)
    return value if math.isfinite(value) else None


def _noise(side: int) -> Array:
    """Latents."""
    return np.random.default_rng(0).standard_normal((1, 4, side, side), dtype=np.float32)


def _picture(side: int) -> Array:
    """An image that isn't alike everywhere, as normalizations of its tiles would take it."""
    down, across = np.linspace(-1, 1, side)[:, None], np.linspace(-1, 1, side)
    smooth = np.stack([down * across, np.sin(3 * down + across), np.cos(2 * across) + 0 * down])
    noise = np.random.default_rng(0).standard_normal((3, side, side)) * 0.2 * (down > 0)
    values: Array = np.clip(smooth + noise, -1, 1).astype(np.float32)
    values[:, : side // 3, side // 2 :] = 0.9
    return values[None]


def main() -> None:
    """Prepare, measure, print, and write."""
    arguments = parser(__doc__)
    arguments.add_argument("--half", choices=list(SPECS), default="decoder")
    arguments.add_argument("--folder", type=Path, required=True, help="for the graphs")
    arguments.add_argument("--autoencoder", type=Path, help="folder of a diffusers AutoencoderKL")
    arguments.add_argument("--input", type=Path, help="file of numpy; only its first is taken")
    arguments.add_argument("--sizes", type=int, nargs="+", default=[512], help="pixels")
    arguments.add_argument("--precisions", nargs="+", default=["fp32"], help="fp32 fp16 w8a8")
    arguments.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    arguments.add_argument("--rounds", type=int, default=1, help="of each (default: 1)")
    given = arguments.parse_args()
    ending = "" if given.half == "decoder" else "-encoder"
    folders = {name: given.folder / f"{name}{ending}" for name in given.precisions}
    for name, folder in folders.items():
        if not folder.exists():
            print(f"making {name} (once)", flush=True)
            context = multiprocessing.get_context("spawn")
            process = context.Process(
                target=partial(make_graphs, given.half, folder, name, given.autoencoder)
            )
            process.start()
            process.join()
            if process.exitcode:
                raise EdgesdError(f"{name} could not be made: see above")
    unit = SCALE if given.half == "decoder" else 1
    if given.input:
        array = np.load(given.input)[:1].astype(np.float32)
        inputs = {array.shape[3] * unit: array}
    else:
        example = _noise if given.half == "decoder" else _picture
        inputs = {size: example(size // unit) for size in given.sizes}
    rows = measure(given.half, folders, inputs, given.modes, given.rounds)
    print(
        table(
            ("pixels", "", "", "s", "peak RSS MB", "passes", "PSNR to fp32", "to its whole"),
            (
                (
                    row["size"],
                    row["precision"],
                    row["mode"],
                    f"{row['seconds']['median']:.1f}",
                    f"{row['peak_rss_bytes'] / 1e6:.0f}",
                    " ".join(str(n) for n in row["passes"] if n),
                    *(
                        "" if row[key] is None else f"{row[key]:.1f}"
                        for key in ("psnr_to_fp32", "psnr_to_whole")
                    ),
                )
                for row in rows
            ),
        )
    )
    write_json(given.json, {"environment": environment("onnx"), "rows": rows})


if __name__ == "__main__":
    run(main)
