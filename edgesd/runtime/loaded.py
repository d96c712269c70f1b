"""The networks of a pipeline that are in memory, and where the time goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, field

from edgesd.runtime.arrays import Array
from edgesd.runtime.backends.base import Runner, run_once
from edgesd.runtime.memory import give_back


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
    """Runners of components, opened when first needed."""

    def __init__(self, open_runner: Callable[[str], Runner]) -> None:
        self.timings = Timings()
        self._open_runner = open_runner
        self._runners: dict[str, Runner] = {}
        self._replaced: set[str] = set()

    @property
    def components(self) -> Set[str]:
        """Those that are in memory."""
        return self._runners.keys()

    @property
    def replaced(self) -> Set[str]:
        """Those whose runner is the caller's: they are never released."""
        return self._replaced

    def runner(self, component: str) -> Runner:
        """The runner of a component, loaded if need be."""
        if component not in self._runners:
            with self.timings.loading(component):
                self._runners[component] = self._open_runner(component)
        return self._runners[component]

    def run(self, component: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run a component once on copies of `inputs`; the outputs stay until its next run."""
        runner = self.runner(component)
        with self.timings.running(component, runner):
            return run_once(runner, inputs)

    @contextmanager
    def part(self, component: str, open_part: Callable[[], Runner]) -> Iterator[Runner]:
        """A runner of a part of a component, which is freed behind."""
        with self.timings.loading(component):
            runner = open_part()
        with runner, self.timings.running(component, runner):
            yield runner
        give_back()

    def release(self, components: Iterable[str]) -> None:
        """Free those of `components` that are in memory."""
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
        """Free all."""
        for runner in self._runners.values():
            runner.close()
        self._runners.clear()
