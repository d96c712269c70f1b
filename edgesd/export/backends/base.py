"""How an exported graph is rewritten for a backend, and how it is checked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir

from edgesd.export.passes.fusions import FUSIONS, Fusion
from edgesd.export.passes.lowering import Timesteps
from edgesd.export.quantize.assign import LayerScheme
from edgesd.export.quantize.layers import Layer, QuantizedLayer
from edgesd.spec.bundle import Engine
from edgesd.spec.scheme import Precision
from edgesd.spec.target import Target


class Lowering(ABC):
    """Makes the graphs of one backend.

    name: of the backend (edgesd/runtime/backends). fixed_shapes: its graphs take one size and
    batch. static_ranges: 8-bit activations need ranges recorded in calibration. fp16_arithmetic:
    what isn't quantized is computed in fp16 (unless the bundle is fp32), so that values which
    overflow must be kept in fp32. splits_autoencoder: parts of a full autoencoder have graphs
    of their own. own_kernels: there are graphs for edgesd's own kernels, too. pools_attention:
    attention of quantized graphs may be pooled. checks_engines: `check_engine` looks at each graph
    of a finished bundle.
    """

    name: ClassVar[str]
    fixed_shapes: ClassVar[bool] = False
    static_ranges: ClassVar[bool] = False
    fp16_arithmetic: ClassVar[bool] = False
    splits_autoencoder: ClassVar[bool] = False
    own_kernels: ClassVar[bool] = False
    pools_attention: ClassVar[bool] = False
    checks_engines: ClassVar[bool] = False

    @abstractmethod
    def lower(self, model: ir.Model, precision: Precision) -> None:
        """Rewrite an exported graph in place as the backend takes it, in fp32 or fp16. Raises
        EdgesdError when the backend has no such graph."""

    @abstractmethod
    def lower_quantized(
        self,
        model: ir.Model,
        layers: Mapping[str, QuantizedLayer],
        fp16_weights: Collection[str],
        timesteps: Timesteps | None,
    ) -> None:
        """The same with `layers` (by node name) quantized. fp16_weights: names of those in fp16.

        timesteps: None for a graph without such an input.
        """

    def lower_to_kernels(
        self,
        model: ir.Model,
        layers: Mapping[str, QuantizedLayer],
        fp16_weights: Collection[str],
        timesteps: Timesteps | None,
        attention: bool = True,
        fusions: Iterable[Fusion] = FUSIONS,
    ) -> bool:
        """The same for edgesd's own kernels (attention, fusions: see OwnKernels); False where none
        of them has anything to do, as where `own_kernels` is False."""
        return False

    def gpu_bytes(
        self, parameters: int, schemes: Mapping[Layer, LayerScheme], fp32: bool
    ) -> tuple[int, int] | None:
        """Bytes that a component's weights take in a GPU's memory, and those that its kernels take
        whatever the size of what they compute; None where ONNX Runtime's allocator is what counts.

        parameters: of all of the component. schemes: of its quantized layers. fp32: whether the
        rest is in fp32, and not in 16 bits.
        """
        return None

    def files(self, engines: Mapping[str, Engine]) -> dict[str, bytes]:
        """Further files of a bundle of these engines: name -> content."""
        return {}

    def check_engine(self, root: Path, engine: Engine, target: Target) -> Engine:
        """Check an engine of the bundle folder `root` for its target; the engine with what was
        found, and with a plan where one was built.

        Raises EdgesdError, naming the node, when the backend would refuse the graph.
        """
        return engine
