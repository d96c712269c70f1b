"""What each part of the graph for edgesd's own kernels gains, on one UNet step.

    python -m benchmarks.kernel_gains --folder FOLDER [--precision w8a8]

The same random weights as `peers`, Stable Diffusion 1.5's size, 512x512, one image. Each line
adds one part to the line above; steps of all lines alternate, and ratios are of the line above in
the same round. FOLDER is that of `peers` (11 GB), and gets another 5 for the time of the run.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import environment, paired_ratio, parser, run, spread, table, write_json
from benchmarks.peer_files import MODELS, QUANTIZED, Model, prepare, rounded
from benchmarks.peers import relative_rms
from edgesd.errors import MissingDependencyError
from edgesd.files import atomic_dir

POOLED = "pooled"
"""Fewer keys and values in the largest self-attention: `edgesd build --pool-attention`."""

LINES: dict[str, tuple[str, ...] | None] = {
    "stock, exact sums on any x86": None,
    "stock": None,
    "+ our linears and convolutions": (),
    "+ sums and GEGLU behind them": ("epilogue",),
    "+ norm, SiLU, upsampling before": ("epilogue", "prologue"),
    "+ attention in 8 bits": ("epilogue", "prologue", "attention"),
    "+ pooled keys and values": ("epilogue", "prologue", "attention", POOLED),
}
"""Name -> sides of the fusions, "attention" and POOLED; None for ONNX Runtime's own operators."""


def _graph(folder: Path, precision: str, parts: tuple[str, ...] | None) -> Path:
    """The folder of one line's graph; made where it isn't there."""
    from edgesd.export.backends.onnxruntime import LOWERING
    from edgesd.export.external_data import write_model
    from edgesd.export.passes.fusions import FUSIONS
    from edgesd.export.passes.pooled_attention import PooledAttention

    name = "stock" if parts is None else "-".join(("own", *parts))
    out = folder / f"gains-{precision}" / name
    if not out.exists():
        print(f"making {name} (once)", flush=True)
        graph, layers = rounded(folder, precision)
        if parts is not None and POOLED in parts:
            PooledAttention("sample")(graph)
        if parts is None:
            LOWERING.lower_quantized(graph, layers, set(), None)
        else:
            fusions = [fusion for fusion in FUSIONS if fusion.side in parts]
            LOWERING.lower_to_kernels(graph, layers, set(), None, "attention" in parts, fusions)
        with atomic_dir(out) as made:
            write_model(graph, made)
    return out


def measure(folder: Path, model: Model, precision: str, rounds: int) -> list[dict[str, Any]]:
    """Seconds per step of each line, and how far its output is from fp32's."""
    import onnxruntime

    from edgesd.runtime import kernels
    from edgesd.runtime.backends.onnxruntime import session_options

    if kernels.library() is None:
        raise MissingDependencyError("edgesd's own kernels aren't there: edgesd kernels build")
    inputs, sessions = model.inputs(), {}
    reference = onnxruntime.InferenceSession(
        str(folder / "edgesd" / "model.onnx"), session_options(2), ["CPUExecutionProvider"]
    )
    wanted = reference.run(None, inputs)[0]
    del reference
    for name, parts in LINES.items():
        options = session_options(2, kernels.library())
        if "exact" in name:
            options.add_session_config_entry("session.x64quantprecision", "1")
        path = _graph(folder, precision, parts) / "model.onnx"
        sessions[name] = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    outputs = {name: session.run(None, inputs)[0] for name, session in sessions.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(rounds):
        for name, session in sessions.items():
            start = time.perf_counter()
            session.run(None, inputs)
            seconds[name].append(time.perf_counter() - start)
    rows, above = [], next(iter(LINES))
    for name, values in seconds.items():
        rows.append(
            {
                "line": name,
                "step_seconds": spread(values),
                "ratio": paired_ratio(values, seconds[above]),
                "relative_rms": relative_rms(outputs[name], np.asarray(wanted)),
            }
        )
        above = name
    return rows


def main() -> None:
    """Prepare, measure, print, and write."""
    arguments = parser(__doc__)
    arguments.add_argument("--folder", type=Path, required=True, help="that of peers")
    arguments.add_argument("--model", choices=MODELS, default="sd15")
    arguments.add_argument("--precision", choices=QUANTIZED, default="w8a8")
    arguments.add_argument("--rounds", type=int, default=9, help="steps of each (default: 9)")
    given = arguments.parse_args()
    model = MODELS[given.model]
    folder = prepare(given.folder, model, ["edgesd"])
    rows = measure(folder, model, given.precision, given.rounds)
    print(
        table(
            ("", "s/step", "of the line above", "differs from fp32 by"),
            (
                (
                    row["line"],
                    row["step_seconds"].text(),
                    row["ratio"].text(),
                    f"{row['relative_rms']:.1e}",
                )
                for row in rows
            ),
        )
    )
    shutil.rmtree(folder / f"gains-{given.precision}")
    lines = [
        {k: v._asdict() if hasattr(v, "_asdict") else v for k, v in row.items()} for row in rows
    ]
    write_json(given.json, {"environment": environment(), "lines": lines})


if __name__ == "__main__":
    run(main)
