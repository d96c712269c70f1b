"""The fp32 graphs of a checkpoint, which quantization starts from, in a folder of the cache.

Weights of a large network aren't copied there: its graph names the checkpoint's tensors, and they
are read from the checkpoint whenever one is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from edgesd.errors import EdgesdError
from edgesd.export.external_data import (
    GRAPH_FILE,
    in_checkpoint,
    refer_to_checkpoint,
    weight_bytes,
    write_model,
)
from edgesd.export.families import Component
from edgesd.export.mapped import Weight, state_of
from edgesd.export.parity import Case
from edgesd.export.passes.bind import BoundTensor
from edgesd.files import atomic_write
from edgesd.runtime.arrays import Array

VERSION = 1
"""Of the folder's form: part of its name in the cache."""

REFER_BYTES = 1 << 30
"""A graph of more weights than this leaves them in the checkpoint."""

CASES_FILE = "cases.npz"
"""Beside a graph: inputs, and what the source makes of them."""


class SourceGraphs:
    """Graphs COMPONENT/model.onnx below `folder`, as `write_source_graph` wrote them, of the
    checkpoint that `components` are of. check: raises InputError where the checkpoint isn't any
    more what it was; to be called before what was made of its weights is kept."""

    def __init__(
        self,
        folder: Path,
        components: Iterable[Component],
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder, self.check = folder, check
        self._components = {component.name: component for component in components}
        self._states: dict[str, dict[str, Weight]] = {}

    def load(self, component: str) -> ir.Model:
        """The fp32 graph of a component. Its weights are mapped, and made fp32 one by one."""
        model = ir.load(self.folder / component / GRAPH_FILE)
        for value in model.graph.initializers.values():
            found = in_checkpoint(value.const_value)
            if found is not None:
                state = self._state(component)
                if found.name not in state:
                    raise EdgesdError(
                        f"{self.folder} is of another model: {component} has no {found.name}; "
                        "remove it and run again"
                    )
                value.const_value = BoundTensor(found.name, state[found.name], found.transposed)
        return model

    def cases(self, component: str) -> list[Case]:
        """Inputs of a component, and what its source makes of them, as recorded at its export."""
        with np.load(self.folder / component / CASES_FILE) as file:
            arrays = {name: file[name] for name in file.files}
        cases: list[Case] = []
        while inputs := _part(arrays, f"{len(cases)}/input/"):
            cases.append((inputs, tuple(_part(arrays, f"{len(cases)}/output/").values())))
        return cases

    def whole(self) -> bool:
        """Whether all weights are in the folder, so that ONNX Runtime can run the graphs."""
        return self._elsewhere() == 0

    def extra_bytes(self) -> int:
        """What graphs of their own weights would take more than the folder does: the weights that
        stayed in the checkpoint, less what else is kept here."""
        cases = sum((self.folder / name / CASES_FILE).stat().st_size for name in self._components)
        return self._elsewhere() - cases

    def _elsewhere(self) -> int:
        models = [ir.load(self.folder / name / GRAPH_FILE) for name in self._components]
        tensors = [v.const_value for model in models for v in model.graph.initializers.values()]
        return sum(each.nbytes for each in tensors if each is not None and in_checkpoint(each))

    def _state(self, component: str) -> dict[str, Weight]:
        if component not in self._states:
            self._states[component] = state_of(self._components[component].load())
        return self._states[component]


def write_source_graph(
    model: ir.Model, folder: Path, others: Mapping[str, ir.Model], cases: Sequence[Case]
) -> dict[str, ir.TensorProtocol]:
    """Write a graph as `SourceGraphs` reads it, and those of its parts (see `write_model`).

    The weights that stayed in the checkpoint, by their names in the graph.
    """
    elsewhere: dict[str, ir.TensorProtocol] = {}
    if weight_bytes(model) > REFER_BYTES:
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            if isinstance(tensor, BoundTensor):
                elsewhere[name] = tensor
                value.const_value = refer_to_checkpoint(tensor, tensor.source, tensor.transposed)
    write_model(model, folder, others)
    arrays: dict[str, Array] = {}
    for index, (inputs, outputs) in enumerate(cases):
        arrays |= {f"{index}/input/{name}": array for name, array in inputs.items()}
        arrays |= {f"{index}/output/{place}": array for place, array in enumerate(outputs)}
    with atomic_write(folder / CASES_FILE) as file:
        np.savez(file, allow_pickle=False, **arrays)
    return elsewhere


def _part(arrays: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    """Arrays whose names begin with `prefix`, without it, in their order."""
    return {
        name.removeprefix(prefix): array
        for name, array in arrays.items()
        if name.startswith(prefix)
    }
