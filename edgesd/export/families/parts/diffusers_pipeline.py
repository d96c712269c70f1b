"""diffusers' own pipeline of a checkpoint, whose networks take no memory."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import diffusers

from edgesd.errors import InputError
from edgesd.export.families.checkpoint import Checkpoint
from edgesd.export.families.parts.lora import check_loras
from edgesd.export.families.parts.weights import shell
from edgesd.export.quiet import quiet
from edgesd.runtime.schedulers import preset, sampler_class
from edgesd.text import first_sentence

_NO_OPTIONS = ("_diffusers_version", "_name_or_path")
"""Of a scheduler's config."""


def diffusers_pipeline(
    source: Checkpoint,
    class_name: str,
    networks: Mapping[str, Any],
    tokenizers: Mapping[str, Callable[[], Any]],
    sampler: str,
    scheduler_options: Mapping[str, Any],
    **options: Any,
) -> Any:
    """diffusers' pipeline `class_name` of a model, as its constructor leaves the configs.

    networks: component -> class; they are made of their configs alone, on torch's meta device.
    tokenizers: component -> what makes it. sampler: class of the scheduler where diffusers has none
    of the model's own name, or lacks a package that it needs. scheduler_options: in place of the
    model's own. options: for the constructor. Raises InputError for what the libraries can't make
    sense of.
    """
    scheduler = _scheduler_class(source.class_of("scheduler"), sampler)
    made = {}
    for part, cls in networks.items():
        made[part] = _made(source, part, partial(shell, source, part, cls))
    check_loras(source, made)
    for part, make in tokenizers.items():
        made[part] = _made(source, part, make)
    made["scheduler"] = _made(
        source,
        "scheduler",
        lambda: scheduler.from_pretrained(
            str(source.folder("scheduler")), local_files_only=True, **scheduler_options
        ),
    )
    try:
        with quiet():
            cls = getattr(diffusers, class_name)
            return cls(**made, **options)
    except Exception as exc:  # many libraries read here, each with exceptions of its own
        raise InputError(f"{source.name} makes no {class_name}: {first_sentence(exc)}") from exc


def with_networks_of(pipeline: Any, class_name: str, **options: Any) -> Any:
    """diffusers' pipeline `class_name` of the networks of another one. options: for the
    constructor."""
    with quiet():
        return getattr(diffusers, class_name)(**pipeline.components, **options)


def _made(source: Checkpoint, part: str, make: Callable[[], Any]) -> Any:
    try:
        with quiet():
            return make()
    except InputError:
        raise
    except Exception as exc:  # as above
        raise InputError(f"cannot read {source.folder(part)}: {first_sentence(exc)}") from exc


def call_default(class_name: str, argument: str) -> float:
    """A number that diffusers' pipeline `class_name` takes where nobody gives one."""
    call = getattr(diffusers, class_name).__call__
    return float(inspect.signature(call).parameters[argument].default)


def _scheduler_class(*names: str) -> Any:
    """The first of diffusers' schedulers with one of these names that has the packages it needs;
    Euler's where none has, which keeps all options, as all classes do.

    A model names what it likes: other classes load what lies in its folder, such as code.
    """
    for name in names:
        cls = getattr(diffusers, name, None)
        if isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin):
            return cls
    return diffusers.EulerDiscreteScheduler


def scheduler_of(pipeline: Any, sampler: str) -> Any:
    """A scheduler of the diffusers class of one of our samplers, with the options of a pipeline's
    own; of Euler's, which keeps them all, where diffusers lacks a package for that class."""
    own, class_name = pipeline.scheduler, sampler_class(sampler)
    options = preset(sampler)
    if type(own).__name__ == class_name and not options:
        return own
    with quiet():
        return _scheduler_class(class_name).from_config(own.config, **options)


def scheduler_config(scheduler: Any) -> dict[str, Any]:
    """All options of a scheduler, by diffusers' names, as JSON can hold them: what isn't finite
    becomes None. `_use_default_values` lists those that its model doesn't give."""
    config: dict[str, Any] = json.loads(scheduler.to_json_string())
    used = sorted(scheduler.config.get("_use_default_values") or ())
    config = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in config.items()
        if key not in _NO_OPTIONS
    }
    return {**config, "_use_default_values": used} if used else config
