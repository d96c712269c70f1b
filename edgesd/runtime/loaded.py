"""The networks of a bundle that are in memory, their memory mode and cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

from edgesd.runtime.arrays import Array
from edgesd.runtime.backends import get_backend
from edgesd.runtime.backends.base import Backend, Runner, RunnerOptions, run_once
from edgesd.runtime.bundle import Bundle
from edgesd.runtime.fitting import (
    Batch,
    Budget,
    Fit,
    Fitting,
    bundle_costs,
    memory_modes,
    process_bytes,
    unimported_bytes,
)
from edgesd.runtime.flow import flow_of
from edgesd.runtime.memory import MemoryMode, available_bytes, give_back
from edgesd.runtime.settings import Settings
from edgesd.runtime.tiles import WINDOWS
from edgesd.spec.bundle import ComponentPart

OpenRunner = Callable[[str], Runner]
"""Opens a runner of one component, which is the caller's to close."""


@dataclass
class Timings:
    """Where the time went, in seconds; `steps` holds each step's wall time."""

    load: dict[str, float] = field(default_factory=dict)
    run: dict[str, float] = field(default_factory=dict)
    steps: list[float] = field(default_factory=list)
    total: float = 0.0
    peak_memory_bytes: int = 0

    @contextmanager
    def loading(self, component: str) -> Iterator[None]:
        """Count what happens within as loading of a component."""
        start = time.perf_counter()
        yield
        self.load[component] = self.load.get(component, 0.0) + time.perf_counter() - start

    @contextmanager
    def running(self, component: str, runner: Runner) -> Iterator[None]:
        """Count the time that `runner` computes within."""
        before = runner.seconds
        yield
        self.run[component] = self.run.get(component, 0.0) + runner.seconds - before


class Loaded:
    """Runners of a bundle's components, opened when first needed.

    open: opens a runner, by the component's backend unless another way was given. fallbacks: of
    every component that runs slower than it was built for, why.
    """

    def __init__(self, bundle: Bundle, settings: Settings, open_runner: OpenRunner | None) -> None:
        self.bundle, self.settings = bundle, settings
        self.timings = Timings()
        self.fallbacks: dict[str, str] = {}
        self.open: OpenRunner = open_runner or self._open_by_backend
        self._runners: dict[str, Runner] = {}
        self._replaced: set[str] = set()
        self._fit: Fit | None = None
        self._factors: Mapping[str, Mapping[str, Array]] = {}
        self._factor_bytes = 0
        self._backends = {get_backend(e.backend) for e in bundle.manifest.engines.values()}
        self.process_bytes = process_bytes(self._backends)

    @property
    def components(self) -> tuple[str, ...]:
        """Those that are in memory."""
        return tuple(self._runners)

    @property
    def replaced(self) -> Set[str]:
        """Those whose runner is the caller's: they are never released."""
        return self._replaced

    @property
    def memory(self) -> MemoryMode:
        """The mode that was fitted last; before any, the one that the settings ask for, or fast."""
        return self._fit.memory if self._fit else self.settings.memory or "fast"

    @property
    def window(self) -> int:
        """Side in latents of a decoder's tiles."""
        return self._fit.window if self._fit else WINDOWS[0]

    @property
    def tiled(self) -> Set[str]:
        """Components that are run in parts or tiles."""
        if self._fit:
            return self._fit.tiled
        return self._fitting().costs.tileable if self.memory == "stream" else frozenset()

    def fit(self, batch: Batch) -> None:
        """Choose the fastest mode that `batch` fits into; components loaded for another mode, or
        that it has no use for, are freed.

        Raises ResourceError where it fits into none, and UsageError as flow.guidance_mode.
        """
        flow = flow_of(self.bundle.manifest.pipeline)
        encoder = [flow.encoder.component] if flow.encoder and not batch.encodes else []
        self._free(*encoder, *(flow.sides - batch.sides))
        found = self._fitting().check(batch)
        before, self._fit = self._fit, found
        if before is not None and (
            (found.memory, found.window, found.tiled)
            != (before.memory, before.window, before.tiled)
            # What a session took for another size, it keeps: together that may be more than either.
            or (self.settings.max_memory is not None and found.generation != before.generation)
        ):
            self._free(*self._runners)

    def estimate(self, batch: Batch) -> int:
        """Bytes of the process at most, mapped files included, while `batch` is generated in the
        mode that is set."""
        fitting = self._fitting()
        generation = fitting.generation(batch, self.memory)
        fit = self._fit or replace(fitting, memory=self.memory).choose(batch)
        tiled = fit.tiled if fit else None
        return fitting.costs.need(self.memory, generation, self.window, tiled).resident

    def _fitting(self) -> Fitting:
        """The choice of modes, with the memory that is free now."""
        settings, process = self.settings, self.process_bytes + self._factor_bytes
        components = flow_of(self.bundle.manifest.pipeline).components
        costs = bundle_costs(self.bundle, components, self._own_kernels, process, self._replaced)
        free = available_bytes() if settings.max_memory is None else None
        taken = process - unimported_bytes(self._backends)
        taken += costs.loaded(self._runners, self.memory == "stream")
        budget = Budget(settings.max_memory, free, taken)
        modes = memory_modes(self._backends)
        return Fitting(costs, budget, settings.memory, settings.guidance_mode, modes)

    def _backend(self, component: str) -> Backend:
        return get_backend(self.bundle.manifest.engines[component].backend)

    def _own_kernels(self, component: str) -> bool:
        """Whether the component's graph for edgesd's own kernels is there and can run here."""
        backend = self._backend(component)
        return self.settings.kernels and backend.own_kernels(self.bundle, component)

    def _open_by_backend(self, component: str, part: ComponentPart | None = None) -> Runner:
        options = RunnerOptions(
            threads=self.settings.threads,
            streamed=self.memory == "stream" or component in self.tiled,
            kept_bytes=self._fit.weights_kept.get(component, 0) if self._fit else 0,
            kernels=self.settings.kernels,
            plan_of=self.settings.plan_of,
            fallback=self.settings.fallback,
            on_fallback=partial(self.fallbacks.__setitem__, component),
        )
        return self._backend(component).open_runner(self.bundle, component, options, part)

    def runner(self, component: str) -> Runner:
        """The runner of a component, loaded if need be."""
        if component not in self._runners:
            with self.timings.loading(component):
                self._runners[component] = self._adapted(component)
        return self._runners[component]

    def _adapted(self, component: str) -> Runner:
        runner = self.open(component)
        if component in self._factors:
            runner.adapt(self._factors[component])
        return runner

    def adapt(self, factors: Mapping[str, Mapping[str, Array]], besides: int) -> Set[str]:
        """Run components with these factors of LoRAs from now on (Runner.adapt), and the others
        without any; those that run with others than before. besides: bytes of the LoRAs. When
        memory runs out, there are none."""
        before, self._factors = self._factors, factors
        arrays = [array for each in factors.values() for array in each.values()]
        self._factor_bytes = besides + sum(array.nbytes for array in arrays)
        changed = before.keys() | factors.keys()
        try:
            for component in self._runners.keys() & changed:
                self._runners[component].adapt(factors.get(component, {}))
        except BaseException:
            self._factors, self._factor_bytes = {}, 0
            self.unload()  # some have them, and others not
            raise
        return changed

    def run(self, component: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run a component once on copies of `inputs`; the outputs stay until its next run."""
        with self.running((component,)) as runners:
            return run_once(runners[component], inputs)

    @contextmanager
    def running(self, components: tuple[str, ...]) -> Iterator[dict[str, Runner]]:
        """The runners of components, loaded if need be; the time that they compute is counted."""
        runners = {component: self.runner(component) for component in components}
        with ExitStack() as counted:
            for component, runner in runners.items():
                counted.enter_context(self.timings.running(component, runner))
            yield runners

    @contextmanager
    def part(self, component: str, part: ComponentPart) -> Iterator[Runner]:
        """A runner of a part of a component, which is freed at the end."""
        with self.timings.loading(component):
            runner = self._open_by_backend(component, part)
        with runner, self.timings.running(component, runner):
            yield runner
        give_back()

    def release(self, *components: str) -> None:
        """Free components that aren't needed any more for an image, unless they may stay."""
        if self.memory != "fast":
            self._free(*components)

    def unload(self) -> None:
        """Free all components but those whose runner is the caller's."""
        self._free(*self._runners)

    def _free(self, *components: str) -> None:
        freed = {*components} & self._runners.keys() - self._replaced
        for component in freed:
            self._runners.pop(component).close()
        if freed:
            give_back()

    def replace(self, component: str, runner: Runner) -> None:
        """Take another runner for a component; the one before is freed."""
        before = self._runners.pop(component, None)
        if before is not None:
            before.close()
        self._runners[component] = runner
        self._replaced.add(component)

    def restore(self, component: str) -> None:
        """Free a component's runner that was taken by `replace`."""
        self._runners.pop(component).close()
        self._replaced.discard(component)

    def close(self) -> None:
        """Free all components."""
        for runner in self._runners.values():
            runner.close()
        self._runners.clear()
