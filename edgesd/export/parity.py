"""The gate: an exported component must compute what its torch source computes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from edgesd.errors import ParityError
from edgesd.export.families import Component, Sizes
from edgesd.export.passes.split_autoencoder import CORE, OWN, STATISTICS
from edgesd.export.pieces import run_in_pieces
from edgesd.runtime.arrays import Array
from edgesd.runtime.backends.onnxruntime import session_options
from edgesd.runtime.lora import empty_factors
from edgesd.spec.bundle import ComponentPart, Parity, SplitComponent
from edgesd.spec.lora import LoraSlots
from edgesd.spec.pipeline import TensorSpec, size_of
from edgesd.spec.scheme import Precision
from edgesd.text import first_sentence

Case = tuple[dict[str, Array], tuple[Array, ...]]
"""Inputs by name, and what the source made of them, output by output."""

TOLERANCE: dict[Precision, float] = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 4e-2}
"""The largest relative RMS difference that passes."""

QUANTIZED_TOLERANCE = 0.5
"""The same for quantized graphs: beyond it something is wrong, however few the bits. Whether a
graph is good enough its images say."""


def example_inputs(component: Component, sizes: Sizes, seed: int) -> dict[str, Array]:
    """Inputs as the pipeline would feed them: noise, token ids padded at the end, a timestep."""
    rng = np.random.default_rng(seed)
    return {t.name: _example(t, component, sizes, rng) for t in component.spec.inputs}


def reference_cases(module: nn.Module, component: Component) -> list[Case]:
    """Run the source module once for each of component.sizes, on inputs of fixed seeds."""
    cases = []
    for seed, sizes in enumerate(component.sizes):
        inputs = example_inputs(component, sizes, seed)
        with torch.inference_mode():
            out = module(*(torch.from_numpy(array) for array in inputs.values()))
        outputs = out if isinstance(out, tuple) else (out,)
        cases.append((inputs, tuple(tensor.numpy() for tensor in outputs)))
    return cases


def check_parity(
    graph: Path,
    component: Component,
    cases: Sequence[Case],
    precision: Precision,
    library: Path | None = None,
    elsewhere: Mapping[str, ir.TensorProtocol] | None = None,
    slots: LoraSlots | None = None,
) -> Parity:
    """Run the graph file in ONNX Runtime on the CPU, in pieces where it is large, and compare. The
    worst output and case count.

    library: of edgesd's own kernels, for a graph that needs it. elsewhere: weights that the graph's
    files don't hold, by name. slots: for LoRAs, which are empty here.

    Raises ParityError, naming component, figure and tolerance, when the graph doesn't load or run,
    when an output isn't finite, or when it is further away than the tolerance.
    """
    names = [tensor.name for tensor in component.spec.outputs]

    empty = {} if slots is None else empty_factors(slots)

    def run(inputs: list[dict[str, Array]]) -> Iterator[Sequence[Array]]:
        given = [{**each, **empty} for each in inputs]
        for made in run_in_pieces(graph, given, library, elsewhere):
            yield [made[name] for name in names]

    return _check(run, component, cases, precision)


def check_split(
    root: Path,
    split: SplitComponent,
    component: Component,
    cases: Sequence[Case],
    precision: Precision,
    library: Path | None = None,
) -> Parity:
    """The same for the parts of a decoder or encoder below the folder `root`, one after the other,
    each image in one tile. library: takes their graphs for edgesd's own kernels."""

    def run(inputs: list[dict[str, Array]]) -> Iterator[Sequence[Array]]:
        sessions = [
            _session(root / (part.kernels if library and part.kernels else part.path), library)
            for part in split.parts
        ]
        for each in inputs:
            (images,) = each.values()
            rows = []
            for row in images:
                made = [row[None]]
                for part, session in zip(split.parts, sessions, strict=True):
                    made = session.run(None, _in_one_tile(part, made[0]))
                rows.append(made[: len(component.spec.outputs)])
            yield [np.concatenate(row) for row in zip(*rows, strict=True)]

    return _check(run, component, cases, precision)


def _in_one_tile(part: ComponentPart, source: Array) -> dict[str, Array]:
    """The inputs of a part, which takes its own statistics if any."""
    inputs = {tensor.name: tensor for tensor in part.spec.inputs}
    if (statistics := inputs.get(STATISTICS)) is None:
        return {next(iter(inputs)): source}
    (name,) = inputs.keys() - {STATISTICS, OWN, CORE}
    none = np.zeros([int(dim) for dim in statistics.shape], statistics.dtype)
    # Too large for any: a slice ends with its tensor.
    core = np.array([0, 0, *source.shape[2:]])
    return {name: source, STATISTICS: none, OWN: np.ones(1, np.float32), CORE: core}


def _check(
    run: Callable[[list[dict[str, Array]]], Iterable[Sequence[Array]]],
    component: Component,
    cases: Sequence[Case],
    precision: Precision,
) -> Parity:
    """run: makes the outputs of each case, given all inputs."""
    tolerance = TOLERANCE.get(precision, QUANTIZED_TOLERANCE)
    names = [tensor.name for tensor in component.spec.outputs]
    max_abs, rel_rms = 0.0, 0.0
    try:
        for found, (_, wanted) in zip(run([inputs for inputs, _ in cases]), cases, strict=True):
            for name, ours, source in zip(names, found, wanted, strict=True):
                if ours.shape != source.shape:
                    raise ParityError(
                        f"{component.name}: {name} of the exported graph has the shape "
                        f"{list(ours.shape)}, its source {list(source.shape)}"
                    )
                for what, array in (("the source", source), ("the exported graph", ours)):
                    if not np.isfinite(array).all():
                        raise ParityError(f"{component.name}: {name} of {what} isn't finite")
                max_abs = max(max_abs, float(np.abs(ours - source).max()))
                rel_rms = max(rel_rms, relative_rms(ours, source))
    except ParityError:
        raise
    except Exception as exc:  # onnxruntime raises a class for each of its error codes
        raise ParityError(
            f"{component.name}: ONNX Runtime can't run the exported graph: {first_sentence(exc)}"
        ) from exc
    if not rel_rms <= tolerance:
        raise ParityError(
            f"{component.name} ({precision}) differs from its source by {rel_rms:.2e} (relative "
            f"RMS; largest difference {max_abs:.2e}), more than the tolerance {tolerance:.0e}"
        )
    return Parity(max_abs=max_abs, rel_rms=rel_rms, tolerance=tolerance)


def relative_rms(ours: Array, source: Array) -> float:
    """RMS of the difference over RMS of the source; infinite if only the source is zero."""
    source = source.astype(np.float64)
    difference = float(np.sqrt(np.mean((ours - source) ** 2)))
    scale = float(np.sqrt(np.mean(source**2)))
    if scale == 0:
        return 0.0 if difference == 0 else math.inf
    return difference / scale


def _session(graph: Path, library: Path | None = None) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(
        str(graph), session_options(library=library), providers=["CPUExecutionProvider"]
    )


def _example(
    tensor: TensorSpec, component: Component, sizes: Sizes, rng: np.random.Generator
) -> Array:
    shape = [size_of(dim, sizes) for dim in tensor.shape]
    if tensor.name in component.examples:
        return component.examples[tensor.name](rng, shape)
    return rng.standard_normal(shape, dtype=np.float32)
