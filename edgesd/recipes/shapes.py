"""Fixed shapes for a pipeline."""

from __future__ import annotations

from edgesd.runtime.flow import flow_of
from edgesd.spec.pipeline import PipelineSpec


def fixed_shape(pipeline: PipelineSpec) -> tuple[tuple[int, int], str, int]:
    """Size, scheduler and batch of the same pipeline with fixed shapes: its own size, one image.

    A plan of fixed shapes needs least memory, to be built and to run.
    """
    shape = pipeline.shape
    batch = 2 if flow_of(pipeline).guided(pipeline.guidance_scale) else 1
    return (shape.width, shape.height), pipeline.scheduler.name, batch
