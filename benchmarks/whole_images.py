r"""A whole image of a bundle beside stable-diffusion.cpp: prompt to pixels, each in a process; and
the steps of OpenVINO's UNet.

    python -m benchmarks.whole_images MODEL --bundle BUNDLE --modes stream balanced \
        --sdcpp q8_0 q4_0 --openvino
    python -m benchmarks.whole_images MODEL --bundle BUNDLE --modes stream --sdcpp q8_0 \
        --controlnet CONTROLNET --control IMAGE --size 512 512

MODEL is the diffusers folder that each BUNDLE was built from (benchmarks/random_pipeline.py makes
some). All generate the same size and number of steps, without guidance unless --guidance is more
than 1, in turn: A B C A B C. Seconds of a step, of the whole image with loading and decoding, and
the process's peak resident set (mapped files included) and largest anonymous memory. What
stable-diffusion.cpp reads is made from MODEL once and kept in --work; it decodes in tiles, with
flash attention. --openvino adds the UNet of an SDXL model in INT8 by nncf, alone, which takes more
than 31 GB of memory to make once for 1024x1024, and has yet to be run. `python -m benchmarks.peers
--install` gets both.

With --control, an image steers a ControlNet: that of BUNDLE (`edgesd build --controlnet
CONTROLNET`), and CONTROLNET itself in stable-diffusion.cpp. `random_pipeline --controlnet` makes
one.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import environment, paired_ratio, parser, run, spread, table, write_json
from benchmarks.contenders import openvino_step
from benchmarks.peer_files import (
    FLUX_FILES,
    INPUTS_FILE,
    SDCPP_TYPES,
    convert_openvino,
    convert_sdcpp,
    convert_sdcpp_control,
)
from benchmarks.peers import status_bytes
from edgesd.errors import EdgesdError
from edgesd.processes import module_command
from edgesd.runtime.memory import MEMORY_MODES

_PROMPT, _SEED = "a red apple", 1
_SAMPLE_SECONDS = 0.05


@dataclass(frozen=True)
class Asked:
    """What is generated. size: (width, height). control: the image that a ControlNet is shown, and
    its scale."""

    size: tuple[int, int]
    steps: int
    guidance: float
    threads: int
    control: Path | None = None
    scale: float = 1.0


Generate = Callable[[Path, "Asked"], list[float]]
"""By a peer's library, of a file or folder: seconds of each step."""


@dataclass(frozen=True)
class Made:
    """One image. step_seconds: median. seconds: of the process, from its start to the pixels."""

    step_seconds: float
    seconds: float
    peak_bytes: int
    peak_anonymous_bytes: int


def by_edgesd(bundle: Path, mode: str, asked: Asked) -> Made:
    """One image by `edgesd generate`. Raises EdgesdError with its message when it fails."""
    with tempfile.TemporaryDirectory() as folder:
        command = module_command("edgesd", "generate", str(bundle), "-p", _PROMPT)
        command += ["--seed", str(_SEED), "--memory", mode, "--steps", str(asked.steps)]
        command += ["--size", "{}x{}".format(*asked.size), "--guidance", str(asked.guidance)]
        command += ["--threads", str(asked.threads), "--any-machine", "--json"]
        if asked.control:
            command += ["--control", str(asked.control), "--control-scale", str(asked.scale)]
        out, log = Path(folder) / "out.json", Path(folder) / "log"
        began = time.perf_counter()
        with out.open("wb") as written, log.open("wb") as said:
            child = subprocess.Popen(
                [*command, "-o", f"{folder}/out.png"], stdout=written, stderr=said
            )
            anonymous = 0
            while child.poll() is None:
                anonymous = max(anonymous, status_bytes(child.pid, "RssAnon"))
                time.sleep(_SAMPLE_SECONDS)
        seconds = time.perf_counter() - began
        if child.returncode:
            raise EdgesdError(f"{bundle}: {log.read_text(errors='replace').strip()[-500:]}")
        told = json.loads(out.read_text())
    return Made(
        statistics.median(told["step_seconds"]), seconds, told["peak_memory_bytes"], anonymous
    )


def by_peer(generate: Generate, path: Path, asked: Asked) -> Made:
    """One image by another program's library, in a process of its own. Raises EdgesdError when it
    fails."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    began = time.perf_counter()
    process = context.Process(target=_answer, args=(generate, path, asked, theirs), daemon=True)
    process.start()
    theirs.close()
    anonymous = 0
    while not ours.poll(_SAMPLE_SECONDS):
        anonymous = max(anonymous, status_bytes(process.pid, "RssAnon"))
    seconds = time.perf_counter() - began
    try:
        steps = ours.recv()
    except EOFError:
        process.join()
        raise EdgesdError(
            f"the peer's run of {path.name} ended with status {process.exitcode}"
        ) from None
    peak = status_bytes(process.pid, "VmHWM")
    process.kill()
    process.join()
    return Made(statistics.median(steps), seconds, peak, anonymous)


def _answer(
    generate: Generate, path: Path, asked: Asked, connection: Connection[list[float], None]
) -> None:
    """In the child: generate, answer with each step's seconds, and wait to be read and killed."""
    connection.send(generate(path, asked))
    time.sleep(60)


def sdcpp(path: Path, asked: Asked, controlnet: Path | None = None) -> list[float]:
    """Seconds of each step of an image by stable-diffusion.cpp. controlnet: of
    convert_sdcpp_control."""
    import stable_diffusion_cpp

    files = {"model_path": str(path)}
    if path.is_dir():
        files = {name: str(path / file) for name, file in FLUX_FILES.items()}
    model = stable_diffusion_cpp.StableDiffusion(
        **files,
        control_net_path=str(controlnet or ""),
        n_threads=asked.threads,
        diffusion_flash_attn=True,
        verbose=False,
    )
    ends: list[float] = []
    width, height = asked.size
    model.generate_image(
        _PROMPT,
        width=width,
        height=height,
        seed=_SEED,
        sample_steps=asked.steps,
        cfg_scale=asked.guidance,
        control_image=str(asked.control) if controlnet else None,
        control_strength=asked.scale,
        vae_tiling=True,
        progress_callback=lambda *_: ends.append(time.perf_counter()),
    )
    # It is called before the first step and after each; later calls are of the decoder's tiles.
    ends = ends[: asked.steps + 1]
    return [after - before for before, after in pairwise(ends)]


def openvino_unet(folder: Path, asked: Asked) -> list[float]:
    """Seconds of each step by OpenVINO's UNet alone, without text encoders and decoder."""
    step, _ = openvino_step(folder, asked.threads)
    with np.load(folder / INPUTS_FILE) as file:
        inputs = {name: file[name] for name in file.files}
    seconds = []
    for _ in range(asked.steps):
        began = time.perf_counter()
        step(inputs)
        seconds.append(time.perf_counter() - began)
    return seconds


def measure(
    contenders: dict[str, Callable[[Asked], Made]], asked: Asked, rounds: int
) -> list[dict[str, Any]]:
    """`rounds` images of each, in turn. Ratios are the first contender's over each one's."""
    made: dict[str, list[Made]] = {name: [] for name in contenders}
    for index in range(rounds):
        for name, generate in contenders.items():
            image = generate(asked)
            made[name].append(image)
            print(f"round {index + 1}: {name} {image}", flush=True)
    first = made[next(iter(made))]
    return [
        {
            "contender": name,
            "step_seconds": spread(image.step_seconds for image in images),
            "seconds": spread(image.seconds for image in images),
            "peak_bytes": max(image.peak_bytes for image in images),
            "peak_anonymous_bytes": max(image.peak_anonymous_bytes for image in images),
            "step_ratio": paired_ratio(
                [image.step_seconds for image in first], [image.step_seconds for image in images]
            ),
            "memory_ratio": max(image.peak_bytes for image in first)
            / max(image.peak_bytes for image in images),
        }
        for name, images in made.items()
    ]


def _contenders(
    model: Path,
    bundles: Sequence[Path],
    modes: Sequence[str],
    kinds: Sequence[str],
    openvino_size: tuple[int, int] | None,
    controlnet: Path | None,
    work: Path,
) -> dict[str, Callable[[Asked], Made]]:
    found: dict[str, Callable[[Asked], Made]] = {}
    for bundle in bundles:
        for mode in modes:
            found[f"{bundle.stem} {mode}"] = partial(by_edgesd, bundle, mode)
    control = convert_sdcpp_control(controlnet, work) if controlnet and kinds else None
    for kind in kinds:
        generate = partial(sdcpp, controlnet=control) if control else sdcpp
        found[f"sdcpp {kind}"] = partial(by_peer, generate, convert_sdcpp(model, kind, work))
    if openvino_size:
        unet = convert_openvino(model, openvino_size, work)
        found["openvino int8, UNet alone"] = partial(by_peer, openvino_unet, unet)
    return found


def main() -> None:
    """Measure, print, and write."""
    arguments = parser(__doc__)
    arguments.add_argument("model", type=Path, help="diffusers folder of all contenders")
    arguments.add_argument("--bundle", type=Path, nargs="+", default=[])
    arguments.add_argument(
        "--modes", nargs="+", choices=MEMORY_MODES, default=["balanced"], help="of each bundle"
    )
    arguments.add_argument("--sdcpp", nargs="*", choices=SDCPP_TYPES, default=[])
    arguments.add_argument("--openvino", action="store_true")
    arguments.add_argument("--controlnet", type=Path, help="diffusers folder, of --sdcpp")
    arguments.add_argument("--control", type=Path, help="what the ControlNets are shown")
    arguments.add_argument("--control-scale", type=float, default=1.0)
    arguments.add_argument("--work", type=Path, default=Path("out/whole_images"))
    arguments.add_argument("--size", type=int, nargs=2, default=(1024, 1024), metavar="PIXELS")
    arguments.add_argument("--steps", type=int, default=2)
    arguments.add_argument("--guidance", type=float, default=1.0)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--rounds", type=int, default=3)
    given = arguments.parse_args()
    asked = Asked(
        tuple(given.size),
        given.steps,
        given.guidance,
        given.threads,
        given.control,
        given.control_scale,
    )
    if bool(given.sdcpp and given.control) != bool(given.controlnet):
        raise EdgesdError("--controlnet goes with --sdcpp and --control")
    contenders = _contenders(
        given.model,
        given.bundle,
        given.modes,
        given.sdcpp,
        asked.size if given.openvino else None,
        given.controlnet,
        given.work,
    )
    if not contenders:
        raise EdgesdError("nothing to measure: give --bundle, --sdcpp or --openvino")
    rows = measure(contenders, asked, given.rounds)
    first = rows[0]["contender"]
    print(
        table(
            ["contender", "s/step", f"{first}'s / its", "s/image", "peak RSS MB", "anonymous MB"],
            (
                [
                    row["contender"],
                    row["step_seconds"].text(2),
                    row["step_ratio"].text(),
                    row["seconds"].text(1),
                    f"{row['peak_bytes'] / 1e6:.0f}",
                    f"{row['peak_anonymous_bytes'] / 1e6:.0f}",
                ]
                for row in rows
            ),
        )
    )
    lines = [
        {key: v._asdict() if hasattr(v, "_asdict") else v for key, v in row.items()} for row in rows
    ]
    packages = environment("stable-diffusion-cpp-python", "openvino", "nncf")
    write_json(
        given.json,
        {
            "environment": packages,
            "asked": {**vars(asked), "control": str(asked.control or "")},
            "contenders": lines,
        },
    )


if __name__ == "__main__":
    run(main)
