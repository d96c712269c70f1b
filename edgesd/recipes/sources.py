"""The model that a build, or a plan of one, is asked for."""

from __future__ import annotations

from dataclasses import replace

from edgesd.export.source import ModelSource, resolve_source
from edgesd.recipes.demo import demo_model
from edgesd.spec.build import DEMO, Variant


def open_model(model: str, variant: Variant | None = None) -> ModelSource:
    """What the user called `model`: "demo", a diffusers folder, or a hub id. variant: the kind that
    it is said to be. Raises what `resolve_source` raises."""
    source = resolve_source(str(demo_model()) if model == DEMO else model)
    return replace(source, variant=variant)
