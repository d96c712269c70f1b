"""LoRAs in slots: what they cost a step, and images beside LoRAs that were merged.

python -m benchmarks.lora_slots --folder FOLDER [--model sd15] [--precisions w4a8-g64 ...] [--built]
python -m benchmarks.lora_slots --folder FOLDER --images [--ranks 4 16 64] [--lora FILE ...]

The first is of a pipeline of true size with random weights (benchmarks/random_pipeline.py writes
FOLDER/MODEL if it isn't there; --model demo is the embedded one, for a try): a step of the denoiser
without slots, with empty ones, and with a LoRA of each rank in all of them, in turn, and the time
from one LoRA to another: medians, with quartiles in brackets, and ratios of steps that were taken
one after another. --built takes the bundles of an earlier run, to measure alone. The second is
of the embedded model: PSNR of images with a LoRA in the slots of a quantized bundle, and of a
bundle that it was merged into before it was quantized, both beside fp32 with the LoRA; and what
quantizing costs without one. FILE: a LoRA in any form that edgesd reads, in place of random ones.
FOLDER/work keeps what builds keep.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from msgspec.structs import replace
from PIL import Image
from safetensors.numpy import save_file

from benchmarks.common import environment, paired_ratio, parser, run, spread, table, write_json
from benchmarks.random_pipeline import MODELS, write_pipeline
from edgesd.evaluate.psnr import psnr
from edgesd.export.lora.board import convert
from edgesd.files import sha256_file
from edgesd.recipes import DEMO, BuildOptions, LocalFolders, QuantOptions, build, demo_model
from edgesd.recipes.prompts import CALIBRATION
from edgesd.runtime.arrays import Float
from edgesd.runtime.backends.base import Runner
from edgesd.runtime.bundle import Bundle, open_bundle
from edgesd.runtime.images import read_prompts
from edgesd.runtime.lora import Factors, Lora, Used, filling, read_lora, slots_of
from edgesd.runtime.pipeline import Pipeline
from edgesd.runtime.requests import Request
from edgesd.spec.lora import LoraFile

TARGET, MOST_RANK = "x86-64-cpu", 64
STRENGTH = 0.3
"""Of random LoRAs: RMS of what they add to a weight, in RMS of the weight as networks begin."""


class Row(NamedTuple):
    """A line of the speed table: seconds of a step; ratio: to that without slots beside it."""

    precision: str
    what: str
    step: str
    ratio: str
    swap_ms: float


class ImageRow(NamedTuple):
    """PSNR in dB of images beside fp32 with the LoRA: mean and least. plain: of fp32 without it.
    without: of the quantized bundle beside fp32, both without it."""

    precision: str
    lora: str
    without: str
    plain: str
    merged: str
    slots: str


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--folder", type=Path, required=True)
    models = [*MODELS, DEMO]
    made.add_argument("--model", choices=models, default="sd15", help="(default: sd15)")
    made.add_argument("--built", action="store_true", help="take the bundles that are there")
    made.add_argument("--precisions", nargs="+", default=["w4a8-g64", "w8a8"], metavar="NAME")
    made.add_argument("--size", type=int, default=512, metavar="PIXELS", help="(default: 512)")
    made.add_argument("--ranks", type=int, nargs="+", default=None, help="(default: 16; 4 16 64)")
    made.add_argument("--rounds", type=int, default=9, help="of all steps in turn (default: 9)")
    made.add_argument("--images", action="store_true", help="compare images instead")
    made.add_argument("--count", type=int, default=8, help="of images (default: 8)")
    made.add_argument("--lora", type=Path, nargs="+", help="instead of random ones")
    given = made.parse_args()
    if given.images:
        ranks = given.ranks or [4, 16, 64]
        loras = given.lora or ranks
        rows = images(given.folder, given.precisions, loras, given.count, given.built)
        print(table(ImageRow._fields, rows))
        figures = [row._asdict() for row in rows]
    else:
        folder = given.folder / given.model
        if given.model != DEMO and not folder.exists():
            write_pipeline(folder, given.model)
        model = DEMO if given.model == DEMO else str(folder)
        found = [
            row
            for precision in given.precisions
            for row in steps(
                *(model, given.folder, precision, given.ranks or [16], given.size, given.rounds),
                built=given.built,
            )
        ]
        print(table(Row._fields, found))
        figures = [row._asdict() for row in found]
    write_json(given.json, {"environment": environment("torch"), "rows": figures})


def _built(
    model: str,
    folder: Path,
    precision: str,
    slots: int | None,
    loras: Sequence[str] = (),
    quick: bool = False,
    built: bool = False,
) -> Bundle:
    """A bundle, built anew unless it was `built`; what it has in common with others is in
    FOLDER/work. quick: rounded to nearest, after a step of one prompt, as images don't matter."""
    name = [Path(model).name, precision, str(slots), *(["quick"] if quick else [])]
    name += [sha256_file(Path(lora))[:8] for lora in loras]
    out = folder / "bundles" / "-".join(name)
    if built and out.exists():
        return open_bundle(out)
    shutil.rmtree(out, ignore_errors=True)
    quantization = QuantOptions(quality_prompts=())
    if quick:
        quantization = replace(
            quantization, method="rtn", calibration_prompts=CALIBRATION[:1], steps=1
        )
    options = BuildOptions(TARGET, precision, lora_slots=slots, quantization=quantization)
    folders = LocalFolders(folder / "work", loras=tuple(loras))
    return build(model, options, out, folders).bundle


def random_lora(bundle: Bundle, rank: int, seed: int = 0) -> Lora:
    """Of all slots."""
    rng = np.random.default_rng(seed)
    factors = {}
    for component, slots in slots_of(bundle.manifest).items():
        for slot in slots.layers:
            down = rng.standard_normal((slot.inputs, rank), np.float32)
            up = rng.standard_normal((rank, slot.outputs), np.float32)
            # Linears begin with an RMS of 1 / sqrt(3 K), as torch makes them.
            scale = np.float32(STRENGTH / np.sqrt(3.0 * slot.inputs * rank))
            factors[component, slot.name] = Factors(down, up * scale)
    return Lora("0" * 64, LoraFile(1, f"rank {rank}", "0" * 64, bundle.manifest.name), factors)


def steps(
    model: str,
    folder: Path,
    precision: str,
    ranks: Sequence[int],
    size: int,
    rounds: int,
    built: bool,
) -> list[Row]:
    """A step of the denoiser in each state, in turn."""
    plain, slotted = (
        _built(model, folder, precision, slots, quick=True, built=built)
        for slots in (None, MOST_RANK)
    )
    loras = {f"rank {rank}": [Used(random_lora(slotted, rank))] for rank in ranks}
    name = plain.manifest.pipeline.wiring.denoiser.component
    filled: dict[str, dict[str, Float]] = {"empty": {}}
    filled |= {what: filling(slotted.manifest, used)[name] for what, used in loras.items()}
    times: dict[str, list[float]] = {"without slots": [], **{what: [] for what in filled}}
    swaps: dict[str, list[float]] = {what: [] for what in times}
    with Pipeline(plain) as a, Pipeline(slotted) as b:
        first, second = a.open_runner(name), b.open_runner(name)
        with first, second:
            for runner in (first, second):
                _bind(runner, plain, size)
            for _ in range(rounds + 1):
                times["without slots"].append(_timed(first))
                swaps["without slots"].append(0.0)
                for what, factors in filled.items():
                    start = time.perf_counter()
                    second.adapt(factors)
                    swaps[what].append(1000 * (time.perf_counter() - start))
                    times[what].append(_timed(second))
    measured = {what: values[1:] for what, values in times.items()}  # the first warms up
    return [
        Row(
            precision,
            what,
            spread(values).text(),
            paired_ratio(values, measured["without slots"]).text(),
            spread(swaps[what][1:]).median,
        )
        for what, values in measured.items()
    ]


def _bind(runner: Runner, bundle: Bundle, size: int) -> None:
    side = size // bundle.manifest.pipeline.latent.scale_factor
    tokens = max(ref.max_tokens for ref in bundle.manifest.pipeline.wiring.tokenizers.values())
    sizes = {"batch": 1, "height": side, "width": side}
    shapes = {
        tensor.name: tuple(d if isinstance(d, int) else sizes.get(d, tokens) for d in tensor.shape)
        for tensor in runner.spec.inputs
    }
    runner.bind(shapes)
    rng = np.random.default_rng(0)
    for array in runner.inputs.values():
        array[...] = rng.standard_normal(array.shape)
    timestep = bundle.manifest.pipeline.wiring.denoiser.input_of("timestep")
    if timestep is not None:
        runner.inputs[timestep.name][...] = 500


def _timed(runner: Runner) -> float:
    start = time.perf_counter()
    runner.run()
    return time.perf_counter() - start


def images(
    folder: Path,
    precisions: Sequence[str],
    loras: Sequence[int | Path],
    count: int,
    built: bool,
) -> list[ImageRow]:
    """The embedded model's images with LoRAs: files, or random ones of these ranks."""
    prompts = read_prompts(demo_model() / "prompts" / "quality.txt")[:count]
    requests = [Request(prompt, seed) for seed, prompt in enumerate(prompts)]
    whole = _built(DEMO, folder, "fp32", MOST_RANK, built=built)
    files = [
        each if isinstance(each, Path) else _random_file(whole, folder, each) for each in loras
    ]
    plain = _images(whole, requests, [])
    rows = []
    for precision in precisions:
        slotted = _built(DEMO, folder, precision, MOST_RANK, built=built)
        without = _psnr(_images(slotted, requests, []), plain)
        for file in files:
            label = f"{file.parent.name}/{file.stem}"
            out = folder / "used.lora"
            out.unlink(missing_ok=True)
            convert(str(file), whole, out)
            used = [Used(read_lora(out))]
            wanted = _images(whole, requests, used)
            merged = _built(DEMO, folder, precision, None, [str(file)], built=built)
            found = (plain, _images(merged, requests, []), _images(slotted, requests, used))
            beside = [_psnr(each, wanted) for each in found]
            rows.append(ImageRow(precision, label, without, *beside))
    return rows


def _random_file(bundle: Bundle, folder: Path, rank: int) -> Path:
    """A random LoRA in peft's names, as a file."""
    path = folder / f"rank-{rank}.safetensors"
    tensors = {}
    for (component, layer), (down, up) in random_lora(bundle, rank).factors.items():
        tensors[f"{component}.{layer}.lora_A.weight"] = np.ascontiguousarray(down.T)
        tensors[f"{component}.{layer}.lora_B.weight"] = np.ascontiguousarray(up.T)
    save_file(tensors, path)
    return path


def _images(
    bundle: Bundle, requests: Sequence[Request], loras: Sequence[Used]
) -> list[Image.Image]:
    with Pipeline(bundle) as pipeline:
        pipeline.use_loras(loras)
        return [pipeline.generate([request])[0] for request in requests]


def _psnr(found: Sequence[Image.Image], wanted: Sequence[Image.Image]) -> str:
    values = [psnr(a, b) for a, b in zip(found, wanted, strict=True)]
    return f"{sum(values) / len(values):.1f} ({min(values):.1f})"


if __name__ == "__main__":
    run(main)
