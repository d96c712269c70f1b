"""ONNX Runtime takes the exported graph as it is: the engine is the graph."""

from __future__ import annotations

from edgesd.spec.bundle import Engine, Graph

BACKEND = "onnxruntime"


def engine_from_graph(graph: Graph) -> Engine:
    """The engine of one component. Path and parity stay those of the graph."""
    return Engine(
        component=graph.component,
        path=graph.path,
        backend=BACKEND,
        precision=graph.precision,
        parity=graph.parity,
        kernels=graph.kernels,
        split=graph.split,
    )
