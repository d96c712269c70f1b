"""ControlNets and adapters that are added to a model: FOLDER, or FOLDER:NAME."""

from __future__ import annotations

import re
from collections.abc import Collection

from edgesd.errors import InputError, UsageError
from edgesd.export.source.folder import INDEX, ModelSource, is_pipeline
from edgesd.files import expanded, named_path
from edgesd.spec.build import SideKind

_CLASSES: dict[SideKind, str] = {"controlnet": "ControlNetModel", "adapter": "T2IAdapter"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,39}")


def component_of(kind: SideKind, name: str) -> str:
    """What a side component is called in a pipeline (spec.pipeline.SideSpec.name)."""
    return f"{kind}-{name}" if name else kind


def read_sides(given: Collection[tuple[SideKind, str]]) -> dict[str, ModelSource]:
    """The networks that were given, by the component's name, in order.

    Raises UsageError for names that are none, or that two have, InputError for another network.
    """
    from edgesd.export.source import resolve_network

    found: dict[str, ModelSource] = {}
    names = set()
    for kind, text in given:
        where, name = named_path(text)
        option = f"--{kind} {text}"
        if name and not _NAME.fullmatch(name):
            raise UsageError(
                f"{option}: {name[:60]!r} is no name: expected up to 40 letters, digits, dots, "
                "hyphens and underscores"
            )
        component = component_of(kind, name)
        if (name or kind) in names:
            raise UsageError(
                f"{option}: another has the name {name or kind!r}: give each one of its own, as "
                "FOLDER:NAME"
            )
        names.add(name or kind)
        folder = expanded(where)
        if folder.is_dir() and is_pipeline(folder):
            raise InputError(
                f"{option}: that is a pipeline ({INDEX}): give the folder of the network alone, "
                f"such as {folder / kind}"
            )
        source = resolve_network(where, component)
        if source.class_of(component) != _CLASSES[kind]:
            raise InputError(
                f"{option}: that is a {source.class_of(component)}, and edgesd takes a "
                f"{_CLASSES[kind]} there"
            )
        found[component] = source
    return found
