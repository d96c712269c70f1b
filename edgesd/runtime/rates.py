"""How fast this machine computes: each kind of operation, timed alone at sizes of real networks.

The graphs lie in probes.zip beside this file (scripts/make_probes.py makes them, by the passes that
bundles go through), so that a board needs nothing but ONNX Runtime. Their weights are one file of
one repeated number, written for the time of the run: speed doesn't depend on values.
"""

from __future__ import annotations

import math
import mmap
import statistics
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import numpy as np
from msgspec import Meta

from edgesd.errors import InputError
from edgesd.files import disk_errors, user_cache
from edgesd.progress import SILENT, Progress
from edgesd.runtime import kernels
from edgesd.runtime.bundle import GraphFile
from edgesd.runtime.memory import resident_bytes
from edgesd.spec.base import MOST_DIMS, Bytes, Count, Spec, decode_json
from edgesd.spec.pipeline import ComponentSpec, TensorSpec

if TYPE_CHECKING:
    from edgesd.runtime.backends.onnxruntime import OnnxRuntimeRunner

PROBES = Path(__file__).with_name("probes.zip")
INDEX = "probes.json"
WEIGHTS = "weights.bin"
"""The file that all probes' weights refer to."""

VALUE = np.float32(0.0123)
"""What it is full of: a number, whichever type of 1 to 4 bytes reads it."""

_FRESH, _COLD = 32 << 20, 96 << 20
_RUNS, _SECONDS = 5, 0.4
"""Of a probe, at least, and for how long at least."""

_FORMER_NAMES = {"nbits": "matmul_nbits", "own8": "edgesd_int8", "own4": "edgesd_int4"}
"""Old names of forms, in files that older versions wrote."""


class Probe(Spec, frozen=True):
    """A small graph that one kind of operation is timed with.

    kind, form, size: see Rate. graph: its file. scheme: of its layer, where it needs edgesd's own
    kernels. weight_bytes: of its largest weight.
    """

    name: str
    kind: str
    form: str
    size: tuple[int, ...]
    graph: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weight_bytes: int = 0
    scheme: str | None = None


class Rate(Spec, frozen=True):
    """Seconds that one operation takes on a machine.

    form: which kernel: fp32, int8 or matmul_nbits of ONNX Runtime, edgesd_int8 or edgesd_int4 of
    edgesd; "" for what has no weights. size: rows, K and N of a product; batch times heads,
    queries, keys and width of attention; elements of its output for others.
    """

    kind: str
    form: str
    size: Annotated[
        tuple[Annotated[int, Meta(ge=1, le=1 << 50)], ...],
        Meta(min_length=1, max_length=MOST_DIMS),
    ]
    seconds: Annotated[float, Meta(ge=1e-15, le=1e9)]

    def __post_init__(self) -> None:
        # Rates that were measured before the kernels had these names are as good.
        form = _FORMER_NAMES.get(self.form)
        if form is not None:
            msgspec.structs.force_setattr(self, "form", form)


class Rates(Spec, frozen=True):
    """How fast a machine is, as `edgesd profile` measured it.

    instruction_set: of edgesd's own kernels, or None without. threads: per operator; 0 for all.
    process_bytes: resident memory of Python with ONNX Runtime and one small graph.
    """

    machine: str
    onnxruntime: str
    instruction_set: str | None
    threads: Count
    process_bytes: Bytes
    rates: tuple[Rate, ...]


def rates_path(target: str) -> Path:
    """The file of a target's measured rates."""
    return user_cache() / "rates" / f"{target}.json"


def read_rates(path: Path) -> Rates:
    """Read a file of `edgesd profile`. Raises InputError."""
    try:
        return decode_json(path.read_bytes(), Rates)
    except FileNotFoundError as exc:
        raise InputError(f"{path} isn't there: edgesd profile -o {path} makes it") from exc
    except InputError as exc:
        raise InputError(f"{path} isn't a file of edgesd profile: {exc}") from exc


def find_rates(target: str, path: Path | None = None) -> Rates | None:
    """The rates in `path`, or those that were kept for a target; None where there are none.

    Raises InputError for a file that can't be read.
    """
    kept = rates_path(target)
    if path is None and not kept.is_file():
        return None
    return read_rates(path or kept)


def summary(rates: Rates) -> list[tuple[str, str, str]]:
    """Kind, form, and the least and the most of what such operations reach, for people: products
    in billions of multiplications per second, others in billions of elements."""
    found: dict[tuple[str, str], list[float]] = {}
    for rate in rates.rates:
        speed = math.prod(rate.size) / rate.seconds / 1e9
        found.setdefault((rate.kind, rate.form), []).append(speed)
    return [
        (kind, form, f"{min(speeds):.2f} to {max(speeds):.2f} G/s")
        for (kind, form), speeds in found.items()
    ]


def read_probes() -> tuple[list[Probe], dict[str, bytes]]:
    """All probes, and their graphs by file name."""
    with zipfile.ZipFile(PROBES) as file:
        probes = msgspec.json.decode(file.read(INDEX), type=list[Probe])
        return probes, {probe.graph: file.read(probe.graph) for probe in probes}


def measure(machine: str, threads: int = 0, progress: Progress = SILENT) -> Rates:
    """Time every probe that this machine can run: about a minute on a PC.

    threads: per operator; 0 takes the fast cores. Raises ResourceError when memory or disk run
    out, MissingDependencyError without ONNX Runtime.
    """
    import onnxruntime

    probes, graphs = read_probes()
    probes = [probe for probe in probes if probe.scheme is None or kernels.usable([probe.scheme])]
    found: list[Rate] = []
    process = 0
    with tempfile.TemporaryDirectory(prefix="edgesd-") as name:
        folder = Path(name)
        most = max((probe.weight_bytes for probe in probes), default=0)
        _write_weights(folder / WEIGHTS, most)
        for number, probe in enumerate(probes):
            progress.update(probe.name, number, len(probes))
            runner = _runner(probe, GraphFile(graphs[probe.graph], folder), threads)
            seconds = _time(runner)
            runner.close()
            process = process or resident_bytes()  # the first is a small one
            found.append(Rate(probe.kind, probe.form, probe.size, seconds))
    found += [_fresh(), _read()]
    return Rates(
        machine=machine,
        onnxruntime=onnxruntime.__version__,
        instruction_set=kernels.instruction_set() or None,
        threads=threads,
        process_bytes=process,
        rates=tuple(found),
    )


def _fresh() -> Rate:
    """How long it takes to touch memory for the first time."""
    seconds: list[float] = []
    for _ in range(_RUNS):
        with mmap.mmap(-1, _FRESH, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
            begin = time.perf_counter()
            memory[:: mmap.PAGESIZE] = bytes(_FRESH // mmap.PAGESIZE)
            seconds.append(time.perf_counter() - begin)
    return Rate("fresh", "", (_FRESH,), statistics.median(seconds))


def _read() -> Rate:
    """How long it takes to read what no cache holds any more."""
    values = np.ones(_COLD // 8)
    seconds: list[float] = []
    for _ in range(_RUNS):
        begin = time.perf_counter()
        values.sum()
        seconds.append(time.perf_counter() - begin)
    return Rate("read", "", (_COLD,), statistics.median(seconds))


def _write_weights(path: Path, size: int) -> None:
    with disk_errors(path.parent):
        np.full(-(-size // 4), VALUE).tofile(path)


def _runner(probe: Probe, graph: GraphFile, threads: int) -> OnnxRuntimeRunner:
    from edgesd.runtime.backends.onnxruntime import OnnxRuntimeRunner

    spec = ComponentSpec(probe.name, probe.inputs, probe.outputs)
    library = kernels.library() if probe.scheme else None
    runner = OnnxRuntimeRunner(spec, graph, threads, library=library)
    runner.bind({t.name: tuple(int(d) for d in t.shape) for t in probe.inputs})
    rng = np.random.default_rng(0)
    for array in runner.inputs.values():
        array[:] = rng.standard_normal(array.shape, np.float32)
    return runner


def _time(runner: OnnxRuntimeRunner) -> float:
    """Median seconds of a run; the first one, which allocates memory, isn't counted."""
    runner.run()
    seconds: list[float] = []
    begin = time.perf_counter()
    while len(seconds) < _RUNS or time.perf_counter() - begin < _SECONDS:
        before = runner.seconds
        runner.run()
        seconds.append(runner.seconds - before)
    return statistics.median(seconds)


class Speed:
    """Seconds of operations of any size, from those that were measured.

    An operation of work w (products, or elements) takes w times the seconds per unit of work of
    those of the same kind and form that are nearest in size, by the distance of the logarithms
    of their dimensions, each weighted by its inverse fourth power (Shepard 1968,
    A two-dimensional interpolation function for irregularly-spaced data).
    """

    def __init__(self, rates: Rates) -> None:
        self._known: dict[tuple[str, str], list[Rate]] = {}
        for rate in rates.rates:
            self._known.setdefault((rate.kind, rate.form), []).append(rate)

    def knows(self, kind: str) -> bool:
        """Whether operations of `kind` were measured in fp32, or without weights."""
        return (kind, "") in self._known or (kind, "fp32") in self._known

    def seconds(self, kind: str, form: str, size: Sequence[int]) -> float:
        """Of one operation. Raises InputError where its kind was never measured."""
        rates = [r for r in self._known.get((kind, form), []) if len(r.size) == len(size)]
        if not rates:
            raise InputError(
                f"the rates have no {kind} in {form or 'fp32'}: measure them again, with edgesd "
                "profile"
            )
        weights = [1 / (_distance(rate.size, size) ** 4 + 1e-6) for rate in rates]
        per_unit = sum(
            w * math.log(rate.seconds / math.prod(rate.size))
            for w, rate in zip(weights, rates, strict=True)
        ) / sum(weights)
        return math.exp(per_unit) * math.prod(size)


def _distance(one: Sequence[int], other: Sequence[int]) -> float:
    return math.dist([math.log(n) for n in one], [math.log(n) for n in other])
