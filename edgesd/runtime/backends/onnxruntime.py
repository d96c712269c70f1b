"""Components on ONNX Runtime, on the CPU. onnxruntime is imported when the first one is loaded."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgesd.cores import SPIN_MICROSECONDS, fast_cores, thread_cores
from edgesd.errors import BundleError, EdgesdError, MissingDependencyError, ResourceError
from edgesd.runtime import kernels
from edgesd.runtime.arrays import Array
from edgesd.runtime.backends.base import Backend, BoundRunner, RunnerOptions
from edgesd.runtime.bundle import Bundle, GraphFile
from edgesd.runtime.onnx_wire import bf16_in_fp32
from edgesd.spec.bundle import ComponentPart
from edgesd.spec.lora import LoraSlots
from edgesd.spec.pipeline import ComponentSpec

if TYPE_CHECKING:
    import onnxruntime

_UNKNOWN_OPERATOR = "is not a registered function/op"
_OUT_OF_MEMORY = ("bad_alloc", "bad allocation", "failed to allocate", "out of memory")


_IMPORT_BYTES = 36 << 20
"""Of ONNX Runtime, its first session, and what turns a prompt into tokens (measured on x86-64)."""

_VNNI = ("avx512_vnni", "avx_vnni")
"""Linux's names of the x86 instructions that add products of bytes in 32 bits."""


@cache
def _sums_saturate() -> bool:
    """Whether sums of u8 x s8 products saturate in 16 bits: on x86 without VNNI."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return True
    flags = next((line.split() for line in lines if line.startswith("flags")), None)
    return flags is not None and not set(flags) & set(_VNNI)


def session_options(threads: int = 0, library: Path | None = None) -> onnxruntime.SessionOptions:
    """How every session of edgesd runs, on boards and where graphs are checked.

    threads: per operator; 0: see edgesd.cores. library: of edgesd's own kernels, for graphs that
    need it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if threads == 0:
        # Told the number, ONNX Runtime pins none: the system moves those of two processes apart.
        cores = thread_cores()
        threads = len(cores)
        # All threads wait for the slowest: a small core would hold up the large ones. The caller's
        # own thread is one of them, and isn't pinned.
        if len(fast_cores()) < len(os.sched_getaffinity(0)) and threads > 1:
            pinned = ";".join(str(core + 1) for core in cores[1:])
            options.add_session_config_entry("session.intra_op_thread_affinities", pinned)
    options.intra_op_num_threads = threads
    # As long as from one operator to the next, which no other process notices; older versions of
    # ONNX Runtime don't know the setting, and wait longer.
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_MICROSECONDS))
    # Operators run one after another: each has work for all threads.
    options.inter_op_num_threads = 1
    # The static reuse plan keeps the down path's large buffers alive until the up path: without
    # it the arena reuses them at run time, at equal speed and a quarter less peak memory.
    options.enable_mem_pattern = False
    options.enable_mem_reuse = False
    if _sums_saturate():  # take the exact way there, at less than half the speed
        options.add_session_config_entry("session.x64quantprecision", "1")
    # Weights behind a DequantizeLinear are folded once; else they would be computed in every run.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    # Never ONNX Runtime's own format, whose references to other files weren't checked.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    options.log_severity_level = 4  # failures are raised, too
    if library is not None:
        options.register_custom_ops_library(str(library))
    return options


class OnnxRuntimeRunner(BoundRunner):
    """An ONNX session whose inputs and outputs live in numpy arrays, without a copy per run.

    threads: per operator; 0 takes the fast cores. as_written: nodes run as early as the graph's own
    order lets them; the default order is ONNX Runtime's. library: of edgesd's own kernels, for a
    graph that needs it. weights_in_file: weights aren't copied into the layout that is fastest:
    they stay mapped, which takes a third more time. small: nor are those of convolutions (a sixth
    more time on an x86 CPU). unfolded: what is computed from weights alone, as by
    DequantizeLinear, is computed in each run, and not kept. slots: for LoRAs, that the graph has.
    Raises BundleError when the graph can't be loaded, MissingDependencyError when it needs an
    operator that isn't there, ResourceError when memory runs out.
    """

    def __init__(
        self,
        spec: ComponentSpec,
        graph: GraphFile,
        threads: int = 0,
        as_written: bool = False,
        library: Path | None = None,
        weights_in_file: bool = False,
        small: bool = False,
        unfolded: bool = False,
        slots: LoraSlots | None = None,
    ) -> None:
        super().__init__(spec, slots)
        try:
            import onnxruntime
        except ImportError as exc:
            raise MissingDependencyError(
                f"onnxruntime can't be imported ({exc}): pip install onnxruntime"
            ) from exc

        try:
            options = session_options(threads, library)
        except Exception as exc:
            raise MissingDependencyError(
                f"{library} can't be used ({' '.join(str(exc).split())}): edgesd kernels build, or "
                "EDGESD_KERNELS=none"
            ) from exc
        if as_written:
            options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
        if small:
            options.graph_optimization_level = (
                onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
            )
        if weights_in_file:
            options.add_session_config_entry("session.disable_prepacking", "1")
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(graph.folder)
        )
        try:
            self._session: onnxruntime.InferenceSession | None = onnxruntime.InferenceSession(
                graph.model,
                options,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=["ConstantFolding"] if unfolded else [],
            )
        except Exception as exc:
            raise self._error(exc, "can't be loaded") from exc
        self._binding: onnxruntime.IOBinding | None = None

    def bind(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        before = self.inputs
        super().bind(shapes)
        if self.inputs is before:
            return
        assert self._session is not None
        self._binding = self._session.io_binding()
        try:
            self._bind_arrays({**self.inputs, **self.factors})
            for tensor in self.spec.outputs:
                self._binding.bind_output(tensor.name, "cpu")
        except Exception as exc:
            raise self._error(exc, "doesn't have the inputs and outputs of its manifest") from exc

    def adapt(self, factors: Mapping[str, Array]) -> None:
        super().adapt(factors)
        if self._binding is not None:
            self._bind_arrays(self.factors)

    def _bind_arrays(self, arrays: Mapping[str, Array]) -> None:
        assert self._binding is not None
        for name, array in arrays.items():
            self._binding.bind_input(
                name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data
            )

    def run(self) -> None:
        """See Runner.run. After the first run, whose shapes are then known, outputs are bound."""
        assert self._session is not None and self._binding is not None
        start = time.perf_counter()
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as exc:
            raise self._error(exc, "failed while running") from exc
        if not self.outputs:
            values = self._binding.copy_outputs_to_cpu()
            self.check_outputs(values)
            self._binding.clear_binding_outputs()
            for tensor, value in zip(self.spec.outputs, values, strict=True):
                array = np.ascontiguousarray(value)
                self.outputs[tensor.name] = array
                self._binding.bind_output(
                    tensor.name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data
                )
        self.seconds += time.perf_counter() - start

    def close(self) -> None:
        self._binding = None
        self._session = None
        super().close()

    def _error(self, exc: Exception, what: str) -> EdgesdError:
        text = " ".join(str(exc).split())
        if isinstance(exc, MemoryError) or any(sign in text.lower() for sign in _OUT_OF_MEMORY):
            return ResourceError(
                f"not enough memory for {self.spec.name}: use --memory stream, a smaller --size or "
                "--batch 1"
            )
        kind = MissingDependencyError if _UNKNOWN_OPERATOR in text else BundleError
        return kind(f"{self.spec.name} {what} in ONNX Runtime: {text}")


class OnnxRuntime(Backend):
    """Runs graphs as they are, by edgesd's own kernels where the bundle and this machine have
    them."""

    name = "onnxruntime"

    def open_runner(
        self,
        bundle: Bundle,
        component: str,
        options: RunnerOptions,
        part: ComponentPart | None = None,
    ) -> OnnxRuntimeRunner:
        """See Backend. Without the library of own kernels, the standard graph is run."""
        spec = part.spec if part else bundle.manifest.pipeline.components[component]
        threads, small = options.threads, part is not None
        slots = None if part else bundle.manifest.engines[component].slots
        if options.kernels and self.own_kernels(bundle, component):
            graph = bundle.graph_file(component, kernels=True, part=part)
            try:
                with kernels.keeping_weights(options.kept_bytes if options.streamed else None):
                    # Few layers are left that our kernels don't run: those of the timestep's row.
                    return OnnxRuntimeRunner(
                        spec,
                        graph,
                        threads,
                        library=kernels.library(),
                        small=small,
                        unfolded=options.streamed and part is None,
                        slots=slots,
                    )
            except MissingDependencyError as exc:
                options.on_fallback(f"{exc}; generating without edgesd's own kernels")
        graph = bundle.graph_file(component, part=part)
        if bundle.manifest.engines[component].precision == "bf16":  # another backend's
            graph = graph._replace(model=bf16_in_fp32(graph.model))
        return OnnxRuntimeRunner(
            spec, graph, threads, weights_in_file=options.streamed, small=small, slots=slots
        )

    def own_kernels(self, bundle: Bundle, component: str) -> bool:
        engine, recipe = bundle.manifest.engines[component], bundle.manifest.recipe
        if engine.kernels is None or recipe is None:
            return False
        return kernels.usable(la.scheme for la in recipe.layers if la.component == component)

    def unimported_bytes(self) -> int:
        return 0 if "onnxruntime" in sys.modules else _IMPORT_BYTES


BACKEND = OnnxRuntime()
