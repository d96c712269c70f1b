"""Graphs -> engines, and the bundle that carries them. One file per backend."""

from __future__ import annotations

from collections.abc import Callable

from edgesd.engines import onnxruntime, tensorrt
from edgesd.spec.bundle import Engine, Graph

BACKENDS: dict[str, Callable[[Graph], Engine]] = {
    onnxruntime.BACKEND: onnxruntime.engine_from_graph,
    tensorrt.BACKEND: tensorrt.engine_from_graph,
}
"""Backends that this version builds for. A target names all that its board could run."""
