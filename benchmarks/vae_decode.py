"""Decoding by a full autoencoder: as a whole, and in tiles. Seconds, peak memory, and PSNR.

    python -m benchmarks.vae_decode --folder FOLDER [--sizes 512 1024] [--precisions fp32 w8a8]

The decoder of Stable Diffusion 1.5's size with random weights, or, with --autoencoder, that of an
AutoencoderKL's folder. Each decoding has a process of its own, in which all is imported that
`generate` imports; rounds alternate. PSNR is against fp32 as a whole, over values from -1 to 1.
FOLDER keeps graphs of 200 MB. Latents are noise, or --latents FILE.npy [B, C, h, w].
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
from edgesd.spec.bundle import SplitDecoder
from edgesd.spec.pipeline import ComponentSpec, LatentSpec, TensorSpec
from edgesd.spec.scheme import parse_scheme

Array = npt.NDArray[np.float32]
COMPONENT = "vae_decoder"
SCALE = 8
MODES = ("whole", "tiles")
SPEC = ComponentSpec(
    COMPONENT,
    (TensorSpec("latents", "float32", ("batch", 4, "height", "width")),),
    (TensorSpec("image", "float32", ("batch", 3, "image_height", "image_width")),),
)


class Decoded(NamedTuple):
    """One decoding: seconds without loading, with loading, peak RSS, times the tail generated it
    all."""

    seconds: float
    with_loading: float
    peak_bytes: int
    passes: int
    image: Array


def make_graphs(folder: Path, precision: str, autoencoder: Path | None) -> None:
    """Write a decoder's graphs, and what a bundle says of them, to the new folder `folder`."""
    import onnx_ir as ir

    from edgesd.export.backends.onnxruntime import LOWERING
    from edgesd.export.external_data import (
        KERNELS_FILE,
        KERNELS_SPLIT_FILES,
        SPLIT_FILES,
        write_model,
    )
    from edgesd.export.passes.tiled_decoder import describe_split, split_decoder
    from edgesd.export.quantize.layers import find_layers, matrix_of
    from edgesd.export.quantize.quantize import rounded_layer

    model = _exported(autoencoder)
    parts = split_decoder(model)
    if parts is None:
        raise EdgesdError(f"the decoder in {autoencoder} can't be split")
    graphs = dict(zip(("model.onnx", *SPLIT_FILES), (model, *parts), strict=True))
    if precision in ("fp32", "fp16"):
        for graph in graphs.values():
            LOWERING.lower(graph, precision, None)
        names: Sequence[str] = ()
    else:
        scheme, nodes = parse_scheme(precision), {node.name: node for node in model.graph}
        layers = {
            layer.node: rounded_layer(layer, matrix_of(nodes[layer.node], layer), scheme)
            for layer in find_layers(COMPONENT, model)
        }

        def mine(graph: ir.Model) -> Any:
            there = {node.name for node in graph.graph}
            return {name: layer for name, layer in layers.items() if name in there}

        names = KERNELS_SPLIT_FILES
        own = [graph.clone() for graph in graphs.values()]
        for graph in graphs.values():
            LOWERING.lower_quantized(graph, mine(graph), set(), None)
        for name, graph in zip((KERNELS_FILE, *names), own, strict=True):
            LOWERING.lower_to_kernels(graph, mine(graph), set(), None, attention=False)
            graphs[name] = graph
    split = describe_split("", [graphs[name] for name in SPLIT_FILES], SPLIT_FILES, names)
    with atomic_dir(folder) as out:
        write_model(graphs.pop("model.onnx"), out, graphs)
        (out / "split.json").write_bytes(msgspec.json.encode(split))


def _exported(autoencoder: Path | None) -> Any:
    """The fp32 graph of a decoder."""
    import torch
    from diffusers import AutoencoderKL

    from edgesd.export.families import Component
    from edgesd.export.families.parts.vae import VaeDecoder
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
    net.encoder = net.quant_conv = None
    latent = LatentSpec(4, SCALE, net.config.scaling_factor)
    module = VaeDecoder(net.eval().requires_grad_(False), latent)
    size = {"batch": 2, "height": 16, "width": 24}
    return graph_from_module(module, Component(SPEC, lambda: module, (size,)), "ort-mha")


def decode(folder: Path, mode: str, latents: Array, kernels: bool, answer: Connection) -> None:
    """In a process of its own: decode latents [1, C, h, w] and send what it took."""
    import PIL.Image  # noqa: F401 - part of what `generate` has in memory

    import edgesd.runtime.pipeline  # noqa: F401
    from edgesd.runtime import kernels as own
    from edgesd.runtime import tiles
    from edgesd.runtime.backends.base import Runner, run_once
    from edgesd.runtime.backends.onnxruntime import OnnxRuntimeRunner
    from edgesd.runtime.bundle import GraphFile
    from edgesd.runtime.memory import give_back, peak_bytes

    split = msgspec.json.decode((folder / "split.json").read_bytes(), type=SplitDecoder)
    library = own.library() if kernels else None

    def opened(spec: ComponentSpec, name: str, small: bool) -> Runner:
        graph = GraphFile((folder / name).read_bytes(), folder)
        in_file = small and not kernels
        with own.keeping_weights(0 if kernels and mode == "tiles" else None):
            return OnnxRuntimeRunner(spec, graph, 0, False, library, in_file, small)

    began = time.perf_counter()
    passes = 0
    if mode == "whole":
        with opened(SPEC, "kernels.onnx" if kernels else "model.onnx", False) as runner:
            image = np.array(run_once(runner, {"latents": latents})["image"][0])
            seconds = runner.seconds
    else:
        files = [
            Path(part.kernels if kernels and part.kernels else part.path).name
            for part in (split.head, split.tail)
        ]
        with opened(split.head.spec, files[0], True) as head:
            features = np.array(run_once(head, {"latents": latents})["features"][0])
            seconds = head.seconds
        give_back()
        counted, difference = 0, tiles.difference

        def counting(taken: tiles.Figures, found: tiles.Figures) -> float:
            nonlocal counted
            counted += 1
            return difference(taken, found)

        tiles.difference = counting
        with opened(split.tail.spec, files[1], True) as tail:
            image = tiles.decode_tail(tail, features, SCALE)
            seconds += tail.seconds
        passes = counted
    loaded = time.perf_counter() - began
    answer.send(Decoded(seconds, loaded, peak_bytes(), passes, image))
    answer.close()


def _apart(work: Callable[..., None], *arguments: Any) -> Decoded:
    """What `work` sends from a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(*arguments, theirs))
    process.start()
    theirs.close()
    try:
        found: Decoded = ours.recv()
    except EOFError as exc:
        raise EdgesdError("a decoding ended without an image: see above") from exc
    finally:
        process.join()
    return found


def psnr(found: Array, wanted: Array) -> float:
    """In dB, of values from -1 to 1; what lies outside is cut off, as in images."""
    error = float(np.mean((found.clip(-1, 1) - wanted.clip(-1, 1)).astype(np.float64) ** 2))
    return -10 * math.log10(error / 4) if error else math.inf


def measure(
    folders: dict[str, Path], latents: dict[int, Array], modes: Sequence[str], rounds: int
) -> list[dict[str, Any]]:
    """A row for each size, precision and mode; the first is what the others are compared with."""
    rows = []
    for size, given in latents.items():
        found: dict[tuple[str, str], list[Decoded]] = {}
        for _ in range(rounds):
            for precision, folder in folders.items():
                for mode in modes:
                    kernels = precision not in ("fp32", "fp16")
                    one = _apart(decode, folder, mode, given, kernels)
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


def _decibels(found: Decoded, wanted: list[Decoded] | None) -> float | None:
    """None for equal images, and where there is nothing to compare with."""
    value = math.inf if wanted is None else psnr(found.image, wanted[0].image)
    return value if math.isfinite(value) else None


def main() -> None:
    """Prepare, measure, print, and write."""
    arguments = parser(__doc__)
    arguments.add_argument("--folder", type=Path, required=True, help="for the graphs")
    arguments.add_argument("--autoencoder", type=Path, help="folder of a diffusers AutoencoderKL")
    arguments.add_argument("--latents", type=Path, help="file of numpy; only its first is decoded")
    arguments.add_argument("--sizes", type=int, nargs="+", default=[512], help="pixels")
    arguments.add_argument("--precisions", nargs="+", default=["fp32"], help="fp32 fp16 w8a8")
    arguments.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    arguments.add_argument("--rounds", type=int, default=1, help="of each (default: 1)")
    given = arguments.parse_args()
    folders = {name: given.folder / name for name in given.precisions}
    for name, folder in folders.items():
        if not folder.exists():
            print(f"making {name} (once)", flush=True)
            context = multiprocessing.get_context("spawn")
            process = context.Process(target=partial(make_graphs, folder, name, given.autoencoder))
            process.start()
            process.join()
            if process.exitcode:
                raise EdgesdError(f"{name} could not be made: see above")
    if given.latents:
        array = np.load(given.latents)[:1].astype(np.float32)
        latents = {array.shape[3] * SCALE: array}
    else:
        rng = np.random.default_rng(0)
        sides = {size: size // SCALE for size in given.sizes}
        latents = {
            size: rng.standard_normal((1, 4, side, side), dtype=np.float32)
            for size, side in sides.items()
        }
    rows = measure(folders, latents, given.modes, given.rounds)
    print(
        table(
            ("pixels", "", "", "s", "peak RSS MB", "generated", "PSNR to fp32", "to its whole"),
            (
                (
                    row["size"],
                    row["precision"],
                    row["mode"],
                    f"{row['seconds']['median']:.1f}",
                    f"{row['peak_rss_bytes'] / 1e6:.0f}",
                    row["passes"] or "",
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
