"""The graphs of a quantized bundle: each written, and run once beside its source."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from edgesd.export.external_data import GRAPH_FILE, KERNELS_FILE
from edgesd.export.families import Component
from edgesd.export.parity import Case, check_parity, check_split
from edgesd.export.quantize.assign import LayerScheme
from edgesd.export.quantize.layers import Layer
from edgesd.export.quantize.store import GraphForm, LayerStore, can_pool
from edgesd.progress import Progress
from edgesd.runtime import kernels
from edgesd.spec.bundle import Graph, Parity, SplitComponent
from edgesd.spec.lora import LoraSlots
from edgesd.spec.scheme import Precision


class GraphFiles:
    """The graphs of `components` in a bundle's folder `root`, made of the layers in `store`.

    precision: as the bundle has it. lora_slots: the largest rank of LoRAs that they take, if any.
    graphs: those that are in `root` now.
    """

    def __init__(
        self,
        root: Path,
        store: LayerStore,
        components: Sequence[Component],
        precision: Precision,
        progress: Progress,
        lora_slots: int | None = None,
    ) -> None:
        self.root, self.store, self._components = root, store, components
        self._precision, self._progress = precision, progress
        self._lora_slots = lora_slots
        self.graphs: dict[str, Graph] = {}
        self._written: dict[str, tuple[Mapping[Layer, LayerScheme], GraphForm]] = {}
        self._cases: dict[str, list[Case]] = {}

    def write(self, schemes: Mapping[Layer, LayerScheme], form: GraphForm) -> None:
        """Write the graphs that aren't there yet: layers have `schemes`.

        Raises ParityError for a graph that is too far from its source.
        """
        for component in self._components:
            name = component.name
            mine = {la: scheme for la, scheme in schemes.items() if la.component == name}
            wanted = mine, self._form_of(name, mine, form)
            if self._written.get(name) != wanted:
                self._written.pop(name, None)
                self.graphs[name] = self._write(component, *wanted)
                self._written[name] = wanted

    def _form_of(
        self, name: str, schemes: Mapping[Layer, LayerScheme], form: GraphForm
    ) -> GraphForm:
        """What of `form` matters to a component."""
        own = form.kernels and kernels.usable(str(scheme) for scheme in schemes.values())
        pooled = form.pooled and can_pool(self.store.graphs, name, self.store.wiring)
        return GraphForm(own, own and form.attention, pooled, self._lora_slots)

    def _write(
        self, component: Component, schemes: Mapping[Layer, LayerScheme], form: GraphForm
    ) -> Graph:
        name = component.name
        self._progress.line(f"{name}: quantize")
        folder = self.root / name
        shutil.rmtree(folder, ignore_errors=True)
        self.store.quantize(schemes.items(), self._progress, f"{name}: quantize")
        split, slots = self.store.write(name, schemes, folder, form)
        self._progress.line(f"{name}: check")
        if name not in self._cases:
            self._cases[name] = self.store.graphs.cases(name)
        own = (folder / KERNELS_FILE).exists()
        parity = self._check(component, GRAPH_FILE, split, slots, None)
        if own:
            self._check(component, KERNELS_FILE, split, slots, kernels.library())
        return Graph(
            component=name,
            path=f"{name}/{GRAPH_FILE}",
            precision=self._precision,
            parity=parity,
            kernels=f"{name}/{KERNELS_FILE}" if own else None,
            split=split,
            slots=slots,
        )

    def _check(
        self,
        component: Component,
        file: str,
        split: SplitComponent | None,
        slots: LoraSlots | None,
        library: Path | None,
    ) -> Parity:
        """Parity of the whole graph in `file`; an autoencoder's parts must pass, too."""
        name = component.name
        cases, precision = self._cases[name], self._precision
        parity = check_parity(
            self.root / name / file, component, cases, precision, library, slots=slots
        )
        if split is not None:
            check_split(self.root, split, component, cases, precision, library)
        return parity
