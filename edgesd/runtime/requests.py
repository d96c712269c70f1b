"""Requests for images, and complete requests with every value filled in and checked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

from edgesd.errors import InputError, UsageError
from edgesd.runtime.chunks import Prompt
from edgesd.runtime.schedulers import Scheduler, create_scheduler
from edgesd.runtime.syntax import Syntax, segments
from edgesd.runtime.tokenizer import check_prompt
from edgesd.spec.base import MAX_GUIDANCE
from edgesd.spec.pipeline import PipelineSpec, check_multiple


@dataclass(frozen=True)
class Request:
    """One image to make; None takes the bundle's own default.

    height, width: pixels. guidance_scale <= 1 turns guidance off. scheduler: one of our names.
    prompt_2, negative_prompt_2: what a pipeline's second tokenizer reads; None: the same as the
    first. syntax: of all prompts.
    """

    prompt: str
    seed: int
    negative_prompt: str | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    scheduler: str | None = None
    prompt_2: str | None = None
    negative_prompt_2: str | None = None
    syntax: Syntax = "plain"


@dataclass(frozen=True)
class CompleteRequest:
    """The same with every value, as `Completion` makes it. negative_prompt: None where zeros stand
    for its encoding."""

    prompt: str
    seed: int
    negative_prompt: str | None
    num_inference_steps: int
    guidance_scale: float
    height: int
    width: int
    scheduler: str
    prompt_2: str | None = None
    negative_prompt_2: str | None = None
    syntax: Syntax = "plain"

    @property
    def positive(self) -> Prompt:
        """The prompt, as it is encoded."""
        second = self.prompt if self.prompt_2 is None else self.prompt_2
        return Prompt((self.prompt, second), self.syntax)

    @property
    def negative(self) -> Prompt | None:
        """The negative prompt, as it is encoded."""
        first, second = self.negative_prompt, self.negative_prompt_2
        if first is None:
            return None
        return Prompt((first, first if second is None else second), self.syntax)

    def like(self, other: CompleteRequest) -> bool:
        """Whether both can be generated in one batch: they differ in prompts and seed only."""
        same = replace(
            self,
            prompt=other.prompt,
            seed=other.seed,
            negative_prompt=other.negative_prompt,
            prompt_2=other.prompt_2,
            negative_prompt_2=other.negative_prompt_2,
        )
        return same == other


class Completion:
    """Completes requests to one pipeline."""

    def __init__(self, spec: PipelineSpec) -> None:
        self._spec = spec
        self._checked: set[tuple[str, int, int, int]] = set()
        """Schedules that can be computed: each is tried once."""

    def complete(self, request: Request | CompleteRequest) -> CompleteRequest:
        """Fill in the pipeline's defaults and check every value; a complete request stays as it is.

        Raises UsageError naming the value, what is valid, and the nearest valid choice.
        """
        if isinstance(request, CompleteRequest):
            return request
        spec, shape = self._spec, self._spec.shape
        negative = request.negative_prompt
        if negative is None and not spec.wiring.zero_negative:
            negative = ""
        found = CompleteRequest(
            prompt=request.prompt,
            seed=request.seed,
            negative_prompt=negative,
            num_inference_steps=_first(request.num_inference_steps, spec.num_inference_steps),
            guidance_scale=_first(request.guidance_scale, spec.guidance_scale),
            height=_first(request.height, shape.height),
            width=_first(request.width, shape.width),
            scheduler=_first(request.scheduler, spec.scheduler.name),
            prompt_2=request.prompt_2,
            negative_prompt_2=request.negative_prompt_2,
            syntax=request.syntax,
        )
        if not abs(found.guidance_scale) <= MAX_GUIDANCE:
            raise UsageError(
                f"guidance must be a number of at most {MAX_GUIDANCE}, not "
                f"{found.guidance_scale}: 1 is none, 7.5 is usual"
            )
        self._check_prompts(found)
        for name, size, built in (
            ("height", found.height, shape.height),
            ("width", found.width, shape.width),
        ):
            if not shape.dynamic and size != built:
                raise UsageError(
                    f"this bundle was built for {shape.width}x{shape.height} pixels only, "
                    f"not {name} {size}: leave --size out, or build without --size"
                )
            check_multiple(name, size, shape.multiple_of, spec.latent.scale_factor)
        schedule = found.scheduler, found.num_inference_steps, found.height, found.width
        if schedule not in self._checked:
            scheduler_of(spec, found)
            self._checked.add(schedule)
        return found

    def _check_prompts(self, request: CompleteRequest) -> None:
        """Raise InputError for prompts that can't be encoded, UsageError for more than are read."""
        second = request.prompt_2, request.negative_prompt_2
        if second != (None, None) and len(self._spec.wiring.tokenizers) < 2:
            raise UsageError(
                "a second prompt is for pipelines with two text encoders, and this one has a "
                "single one: leave --prompt-2 and --negative-2 out"
            )
        if request.negative_prompt_2 is not None and request.negative_prompt is None:
            raise UsageError(
                "without a negative prompt, zeros stand for both encoders' in this pipeline: give "
                "--negative with --negative-2"
            )
        for prompt in (request.prompt, request.negative_prompt, *second):
            if prompt is not None:
                check_prompt(prompt)
                segments(prompt, request.syntax)


def scheduler_of(spec: PipelineSpec, request: CompleteRequest) -> Scheduler:
    """The request's sampler, with its timesteps laid out.

    Raises UsageError for an unknown sampler or a number of steps that it can't make, InputError for
    a configuration that gives no schedule.
    """
    unit = spec.latent.scale_factor
    latents = (request.height // unit) * (request.width // unit)
    try:
        scheduler = create_scheduler(request.scheduler, spec.scheduler.config)
        scheduler.set_timesteps(request.num_inference_steps, image_seq_len=latents)
    except (ArithmeticError, ValueError, IndexError) as exc:
        raise InputError(
            f"no schedule of {request.scheduler} in {request.num_inference_steps} steps can be "
            f"computed from the bundle's configuration ({exc}): choose another --scheduler"
        ) from exc
    return scheduler


_T = TypeVar("_T")


def _first(value: _T | None, default: _T) -> _T:
    return default if value is None else value
