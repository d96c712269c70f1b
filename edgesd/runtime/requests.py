"""Requests for images, and complete requests with every value filled in and checked."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from edgesd.errors import InputError, UsageError, unknown_name
from edgesd.runtime.arrays import Float
from edgesd.runtime.chunks import Prompt
from edgesd.runtime.cut import first_of_picture
from edgesd.runtime.flow import flow_of
from edgesd.runtime.hints import USUAL, Hint, HintOptions, control_image, making_bytes
from edgesd.runtime.pictures import (
    Painting,
    Picture,
    hint_array,
    own_size,
    painting,
    read_picture,
)
from edgesd.runtime.schedulers import (
    Scheduler,
    create_scheduler,
    spread_options,
    with_options,
)
from edgesd.runtime.syntax import Syntax, segments
from edgesd.runtime.tokenizer import check_prompt
from edgesd.spec.base import MAX_CONTROL_SCALE, MAX_GUIDANCE, MAX_SCORE
from edgesd.spec.pipeline import (
    IMAGE_TASKS,
    SIZE_FILLS,
    ImageTask,
    PipelineSpec,
    Task,
    check_multiple,
)

if TYPE_CHECKING:
    from PIL import Image

    GivenPicture = Picture | Image.Image | Path | str

MOST_TOLD_PIXELS = 1 << 20
"""Sizes and crops that a model is told."""

_CONTROL = "control"
"""What requests call the control image of a model that takes one and no more."""

_SCORE, _NEGATIVE_SCORE = 6.0, 2.5
"""Aesthetic scores that diffusers' pipelines tell a model."""

_MASK_BYTES, _PASTED_BYTES = 1, 8
"""Of a pixel of the image: of a mask that is kept while the image is read; of an image that was
laid over it, decoded and as a file."""

Sigmas = str | tuple[float, ...]


@dataclass(frozen=True)
class Micro:
    """What a model is told of an image's sizes and quality: micro-conditioning (Podell et al. 2023,
    arXiv 2307.01952, sec. 2.2). None takes the default.

    original_size, target_size: width and height in pixels of a picture as in training, before and
    after it was scaled and cropped; the image's own are the default. crop: how far from its left
    and top; 0 and 0 are the default. aesthetic_score: of its quality, up to 10.
    """

    original_size: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    target_size: tuple[int, int] | None = None
    aesthetic_score: float | None = None


@dataclass(frozen=True)
class CompleteMicro:
    """The same with every value."""

    original_size: tuple[int, int]
    crop: tuple[int, int]
    target_size: tuple[int, int]
    aesthetic_score: float


@dataclass(frozen=True)
class Control:
    """A picture that a ControlNet or an adapter of the bundle is shown.

    name: which; "" where the bundle has one only. scale: what its outputs are multiplied by.
    start, end: parts of the steps, between which it acts. kind, options: how the control image is
    made of the picture.
    """

    picture: Picture
    name: str = ""
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    kind: Hint = "ready"
    options: HintOptions = USUAL

    def hint(self, width: int, height: int, painted: Painting | None = None) -> Float:
        """What is shown, [1, 3, height, width] from 0 to 1. painted: where a part of an image is
        painted alone: the same part of the picture is shown. Raises InputError for a broken
        picture, and for a sketch without lines."""
        image = self.picture.decoded()
        if painted is not None:
            image = painted.same_part(image)
        image = control_image(image, self.kind, width, height, self.options)
        return hint_array(image, width, height)

    def making_bytes(self, width: int, height: int) -> int:
        """Memory at most while that is made."""
        return self.picture.reading_bytes + making_bytes(self.kind, width, height)


@dataclass(frozen=True)
class Request:
    """One image to make; None takes the bundle's own default.

    height, width: pixels. guidance_scale <= 1 turns guidance off. scheduler: one of our names.
    sigmas: how the sampler spreads its noise levels, one of SIGMA_KINDS, or all of them, descending
    to the image's. timesteps: all of them, descending. With a list it gives the number of steps.
    eta: how much of the noise is drawn anew at each step, by samplers that have it.
    prompt_2, negative_prompt_2: what a pipeline's second tokenizer reads; None: the same as the
    first. syntax: of all prompts; None: plain.
    guidance_rescale: 0 (as None) to 1, how far the prediction under guidance is brought back to the
    deviation it has without. true_cfg_scale: above 1 for classifier-free guidance by the negative
    prompt in models that take guidance_scale as an input, or none. controls: what ControlNets and
    adapters, or a denoiser made for it, are shown; guess_mode: whether ControlNets are asked
    without the negative prompt. negative_micro: where it differs from `micro`, for the negative
    half of guidance. denoising_end: between 0 and 1, how far a base model denoises before a refiner
    goes on; None where one model does all of it.
    image: begin with this one; its own size, rounded down, is the default then, or of a larger one
    its shape with as many pixels as the bundle's own size. mask: what is white
    of it is painted anew, the rest stays. strength: above 0 to 1, the part of the steps that is
    taken. mask_blur, mask_padding: in pixels of the image, how far the mask's edges are blurred,
    and how much around the mask is drawn, of which the image gets what the mask covers; with either
    of them, the rest of the image keeps its bits.
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
    syntax: Syntax | None = None
    guidance_rescale: float | None = None
    sigmas: Sigmas | None = None
    timesteps: tuple[int, ...] | None = None
    eta: float | None = None
    micro: Micro = Micro()
    negative_micro: Micro = Micro()
    denoising_end: float | None = None
    image: GivenPicture | None = None
    mask: GivenPicture | None = None
    strength: float | None = None
    mask_blur: float | None = None
    mask_padding: int | None = None
    controls: tuple[Control, ...] = ()
    guess_mode: bool = False
    true_cfg_scale: float | None = None


@dataclass(frozen=True)
class CompleteRequest:
    """The same with every value, as `Completion` makes it. negative_prompt: None where zeros stand
    for its encoding. micro, negative_micro: None where the model takes none. controls: each with a
    name, in the order of the pipeline's sides. strength: None where there is no image."""

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
    guidance_rescale: float = 0.0
    sigmas: Sigmas | None = None
    timesteps: tuple[int, ...] | None = None
    eta: float | None = None
    micro: CompleteMicro | None = None
    negative_micro: CompleteMicro | None = None
    denoising_end: float | None = None
    image: Picture | None = None
    mask: Picture | None = None
    strength: float | None = None
    mask_blur: float | None = None
    mask_padding: int | None = None
    controls: tuple[Control, ...] = ()
    guess_mode: bool = False
    true_cfg_scale: float = 1.0

    @property
    def task(self) -> ImageTask | None:
        """What denoising begins with; None for the pipeline's own task, which takes no image."""
        return image_task(self)

    @property
    def pasted(self) -> bool:
        """Whether what the mask covers of the image drawn goes into the one given."""
        return self.mask_blur is not None or self.mask_padding is not None

    def painting(self) -> Painting | None:
        """What is painted in the image; None where there is no mask. Raises as
        `pictures.painting`."""
        if self.image is None or self.mask is None:
            return None
        size, blur = (self.width, self.height), self.mask_blur or 0
        return painting(self.image, self.mask, *size, blur, self.mask_padding)

    def picture_bytes(self, count: int) -> int:
        """Memory at most while the pictures of `count` such requests are read, one after another,
        and while images are laid over them."""
        size = self.width, self.height
        each = [one.reading_bytes for one in (self.image, self.mask) if one is not None]
        each += [control.making_bytes(*size) for control in self.controls]
        reading = max(each, default=0)
        if self.image is None or self.mask is None:
            return reading
        whole = _PASTED_BYTES * count if self.pasted else 0
        return reading + (_MASK_BYTES + whole) * self.image.width * self.image.height

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

    @property
    def shared(self) -> CompleteRequest:
        """What the images of one batch have in common: all but prompts, seed, and which image and
        mask they begin with."""
        return replace(
            self,
            prompt="",
            seed=0,
            negative_prompt=None,
            prompt_2=None,
            negative_prompt_2=None,
            image=None,
            mask=None,
        )


class Completion:
    """Completes requests to one pipeline."""

    def __init__(self, spec: PipelineSpec) -> None:
        self._spec = spec
        self._checked: dict[tuple[CompleteRequest, ImageTask | None], int] = {}
        """What images of a batch share, without pictures -> the steps of their schedule, which is
        tried once."""
        self._painted: set[tuple[object, ...]] = set()
        """Images, masks (by their hashes) and their settings that fit each other, likewise."""

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
        image, mask = (_picture(one) for one in (request.image, request.mask))
        task = self._task(request)
        width, height = shape.width, shape.height
        if image is not None and shape.dynamic and request.width is request.height is None:
            width, height = own_size(image, shape.multiple_of, width * height)
        found = CompleteRequest(
            prompt=request.prompt,
            seed=request.seed,
            negative_prompt=negative,
            num_inference_steps=_first(request.num_inference_steps, spec.num_inference_steps),
            guidance_scale=_first(request.guidance_scale, spec.guidance_scale),
            height=_first(request.height, height),
            width=_first(request.width, width),
            scheduler=_first(request.scheduler, spec.scheduler.name),
            prompt_2=request.prompt_2,
            negative_prompt_2=request.negative_prompt_2,
            syntax=_first(request.syntax, CompleteRequest.syntax),
            guidance_rescale=_first(request.guidance_rescale, CompleteRequest.guidance_rescale),
            sigmas=request.sigmas,
            timesteps=request.timesteps,
            eta=request.eta,
            denoising_end=request.denoising_end,
            image=image,
            mask=mask,
            strength=_first(request.strength, spec.wiring.strengths.get(task, 1.0))
            if image
            else None,
            mask_blur=request.mask_blur,
            mask_padding=request.mask_padding,
            controls=self._controls(request),
            guess_mode=request.guess_mode,
            true_cfg_scale=_first(request.true_cfg_scale, CompleteRequest.true_cfg_scale),
        )
        if not abs(found.guidance_scale) <= MAX_GUIDANCE:
            raise UsageError(
                f"guidance must be a number of at most {MAX_GUIDANCE}, not "
                f"{found.guidance_scale}: 1 is none, 7.5 is usual"
            )
        self._check_true_cfg(found)
        self._check_prompts(found)
        if not 0 <= found.guidance_rescale <= 1:
            raise UsageError(
                f"guidance_rescale must be 0 to 1, not {found.guidance_rescale}: 0 is off, "
                "0.7 usual"
            )
        if found.denoising_end is not None and not 0 < found.denoising_end < 1:
            raise UsageError(
                f"denoising_end must be between 0 and 1, not {found.denoising_end}: 0.8 is usual"
            )
        for name, size, built in (
            ("height", found.height, shape.height),
            ("width", found.width, shape.width),
        ):
            if not shape.dynamic and size != built:
                raise UsageError(
                    f"this bundle was built for {shape.width}x{shape.height} pixels only, "
                    f"not {name} {size}: leave --size out, or build without --size"
                )
            check_multiple(name, size, shape.multiple_of, spec.latent.unit)
        self._check_image(found)
        steps = self._steps(found)
        if request.num_inference_steps not in (None, steps):
            raise UsageError(
                f"the list of {'sigmas' if found.timesteps is None else 'timesteps'} has {steps} "
                f"steps, not {request.num_inference_steps}: leave --steps out"
            )
        return self._with_micro(replace(found, num_inference_steps=steps), request)

    def _steps(self, found: CompleteRequest) -> int:
        """The steps of a request's schedule. Raises as `scheduler_of`."""
        shared = replace(found.shared, controls=()), found.task
        if shared not in self._checked:
            scheduler = scheduler_of(self._spec, found)
            if found.strength is not None:
                first_of_picture(scheduler, found.strength)  # refuses what leaves no step
            self._checked[shared] = scheduler.num_inference_steps
        return self._checked[shared]

    def _task(self, request: Request) -> Task:
        """What is asked for. Raises UsageError where the pipeline hasn't got it, or what it needs
        isn't given."""
        tasks, task = self._spec.wiring.tasks, image_task(request)
        if task == "inpaint" and request.denoising_end is not None:
            raise UsageError(
                "a refiner goes on with whole images, not with what a mask covers: leave --refiner "
                "or --mask out"
            )
        given = {
            "a mask": request.mask,
            "strength": request.strength,
            "mask_blur": request.mask_blur,
            "mask_padding": request.mask_padding,
        }
        asked = request.image, *given.values()
        if tasks[0] == "control" and any(value is not None for value in asked):
            raise UsageError(
                "this bundle doesn't begin with an image, its model draws by a control image "
                "alone: give it by --control, and leave --image, --mask and --strength out"
            )
        if task is None:
            for name, value in given.items():
                if value is not None:
                    raise UsageError(f"{name} goes with an image: give --image, too")
            return tasks[0]
        if task not in tasks:
            if "inpaint" in tasks and request.mask is None:
                raise UsageError(
                    "this bundle is for inpainting alone: give --mask, which is white where the "
                    "image is to be painted"
                )
            what = "doesn't begin with an image" if task == "image" else "doesn't inpaint"
            raise UsageError(f"this bundle {what}: build it with --task {task}")
        if request.mask is None and (request.mask_blur, request.mask_padding) != (None, None):
            raise UsageError("mask_blur and mask_padding go with a mask: give --mask, too")
        return task

    def _check_image(self, found: CompleteRequest) -> None:
        """Raise UsageError for values out of their ranges, InputError for a mask that doesn't
        fit."""
        if found.strength is not None and not 0 < found.strength <= 1:
            raise UsageError(
                f"strength must be above 0, up to 1, not {found.strength}: 0.3 keeps much of the "
                "image, 0.8 little"
            )
        if found.image is None or found.mask is None:
            return
        files = found.image.sha256, found.mask.sha256
        painted = *files, found.mask_blur, found.mask_padding
        if painted not in self._painted:
            found.painting()
            self._painted.add(painted)

    def _with_micro(self, found: CompleteRequest, request: Request) -> CompleteRequest:
        """A complete request with what the model is told of sizes, if it takes that. As in
        diffusers, the negative half is told the same, but for its aesthetic score."""
        asked, negative = request.micro, request.negative_micro
        if not any(self._spec.wiring.denoiser.input_of(fill) for fill in SIZE_FILLS):
            if asked != Micro() or negative != Micro():
                raise UsageError(
                    "this model isn't told sizes, crops and aesthetic scores, as SDXL is: leave "
                    "them out"
                )
            return found
        own = found.width, found.height
        micro = _micro(asked, CompleteMicro(own, (0, 0), own, _SCORE))
        like = replace(micro, aesthetic_score=_NEGATIVE_SCORE)
        return replace(found, micro=micro, negative_micro=_micro(negative, like))

    def _controls(self, request: Request) -> tuple[Control, ...]:
        """The controls of a request, each with its name. Raises UsageError."""
        sides = control_names(self._spec)
        found: dict[str, Control] = {}
        for control in request.controls:
            name = control.name
            if not sides:
                raise UsageError(
                    "this bundle has no ControlNet and no adapter to show a control image to: "
                    "build one with edgesd build MODEL --controlnet FOLDER, which models of Stable "
                    "Diffusion take, or leave --control out"
                )
            if not name and len(sides) == 1:
                (name,) = sides
            if not name:
                raise UsageError(
                    f"this bundle has {len(sides)} that a control image can be for: give FILE:NAME "
                    f"with one of {', '.join(sides)}"
                )
            if name not in sides:
                raise UsageError(unknown_name("control", name, sides))
            if name in found:
                raise UsageError(f"{name} gets two control images: give it one")
            _check_control(name, control)
            if sides[name] == "always" and (control.scale, control.start, control.end) != (1, 0, 1):
                raise UsageError(
                    "the control image of this model acts in all steps, as strongly as it was "
                    "trained to: leave --control-scale, --control-start and --control-end out"
                )
            found[name] = replace(control, name=name)
        if request.guess_mode and "each_step" not in {sides[name] for name in found}:
            raise UsageError("guess mode is for the control image of a ControlNet: leave it out")
        return tuple(found[name] for name in sides if name in found)

    def _check_true_cfg(self, found: CompleteRequest) -> None:
        """Raise UsageError for a scale that is out of range, or that nothing is done by."""
        scale = found.true_cfg_scale
        if not 1 <= scale <= MAX_GUIDANCE:
            raise UsageError(
                f"true_cfg_scale must be 1 to {MAX_GUIDANCE}, not {scale}: 1 is none, 4 is usual"
            )
        if scale == 1:
            return
        if self._spec.wiring.cfg:
            raise UsageError(
                "true CFG is for models that were distilled with guidance, as FLUX: this one's is "
                "set by --guidance"
            )
        if found.negative_prompt is None:
            raise UsageError("true CFG leads away from a negative prompt: give --negative, too")

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

    Raises UsageError for an unknown sampler, and for steps or options that it doesn't have,
    InputError for a configuration that gives no schedule.
    """
    config, sigmas = spec.scheduler.config, request.sigmas
    if isinstance(sigmas, str):
        config, sigmas = with_options(config, spread_options(request.scheduler, sigmas)), None
    unit = spec.latent.unit
    tokens = (request.height // unit) * (request.width // unit)
    try:
        scheduler = create_scheduler(request.scheduler, config, request.eta)
        scheduler.set_timesteps(
            request.num_inference_steps,
            image_seq_len=tokens,
            timesteps=request.timesteps,
            sigmas=sigmas,
            strength=_narrowed(spec, request, scheduler),
            even_sigmas=spec.scheduler.even_sigmas,
        )
    except (ArithmeticError, ValueError, IndexError) as exc:
        raise InputError(
            f"no schedule of {request.scheduler} in {request.num_inference_steps} steps can be "
            f"computed from the bundle's configuration ({exc}): choose another --scheduler"
        ) from exc
    return scheduler


def _narrowed(spec: PipelineSpec, request: CompleteRequest, scheduler: Scheduler) -> float:
    """The part of the schedule that all steps are placed within: a request's strength, where
    diffusers' pipeline does so. That is the one for Stable Diffusion's latent consistency models
    that begins with an image; the one for Stable Diffusion XL's, and for inpainting, doesn't."""
    inputs = spec.wiring.denoiser
    distilled = inputs.input_of("guidance_embedding") is not None
    told_sizes = any(inputs.input_of(fill) for fill in SIZE_FILLS)
    if request.task == "image" and distilled and not told_sizes and scheduler.narrows:
        return 1.0 if request.strength is None else request.strength
    return 1.0


def image_task(request: Request | CompleteRequest) -> ImageTask | None:
    """What is asked for by an image, or one and a mask; None where no image is given."""
    if request.image is None:
        return None
    return "image" if request.mask is None else "inpaint"


def of_pictures(
    requests: Sequence[CompleteRequest], read: Callable[[CompleteRequest], _T]
) -> list[_T]:
    """What is read of each request's image and mask: once for those that have the same."""
    known: dict[object, _T] = {}
    for request in requests:
        pictures = request.image, request.mask
        if pictures not in known:
            known[pictures] = read(request)
    return [known[request.image, request.mask] for request in requests]


def painted_whole(spec: PipelineSpec, request: Request) -> Request:
    """`request` for a pipeline that can't do without an image, with a grey one of which all is
    painted, or that controls it: where images are made to measure them, of prompts alone. Others
    stay as they are."""
    controlled = spec.wiring.tasks[0] == "control"
    if not controlled and spec.wiring.tasks[0] not in IMAGE_TASKS:
        return request
    if request.image is not None or request.controls:
        return request
    from PIL import Image

    width, height = request.width or spec.shape.width, request.height or spec.shape.height
    grey, white = (Image.new("L", (width, height), value) for value in (127, 255))
    if controlled:
        return replace(request, controls=(shown(grey),))
    return replace(
        request, image=grey.convert("RGB"), mask=white, strength=1.0, width=width, height=height
    )


def unused(spec: PipelineSpec, request: CompleteRequest) -> Iterator[str]:
    """What a request asks for that changes no image of this pipeline."""
    wiring, flow = spec.wiring, flow_of(spec)
    told = any(one.fill == "guidance" for each in wiring.filled for one in each.inputs)
    if not wiring.cfg and not told and request.guidance_scale != spec.guidance_scale:
        yield "this model takes no guidance scale: --guidance isn't used"
    if flow.guided(request.guidance_scale, request.true_cfg_scale):
        return
    how = "it is with --guidance above 1"
    if flow.distilled:
        how = "the model takes none" if wiring.cfg else "it is with --true-cfg above 1"
    if request.negative_prompt or request.negative_prompt_2:
        yield f"the negative prompt isn't used: {how}"
    if request.guidance_rescale:
        yield f"--guidance-rescale isn't used: {how}"


def control_names(spec: PipelineSpec) -> dict[str, Literal["once", "each_step", "always"]]:
    """What requests call the control images of a pipeline -> when what is shown one runs: its
    sides, and a denoiser that is given the latents of one, which always acts."""
    found: dict[str, Literal["once", "each_step", "always"]] = {
        side.name: side.when for side in spec.wiring.sides
    }
    if "control_latents" in spec.wiring.denoiser.concat:
        found[_CONTROL] = "always"
    return found


def shown(image: Image.Image) -> Control:
    """An image as the control image of a model that takes one and no more."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return Control(read_picture(file.getvalue()), _CONTROL)


def _check_control(name: str, control: Control) -> None:
    """Raise UsageError for a value that is out of its range."""
    if not abs(control.scale) <= MAX_CONTROL_SCALE:
        raise UsageError(
            f"the scale of {name} must be a number of at most {MAX_CONTROL_SCALE}, not "
            f"{control.scale}: 1 is usual, 0 turns it off"
        )
    if not 0 <= control.start < control.end <= 1:
        raise UsageError(
            f"{name} acts from {control.start:g} to {control.end:g} of the steps: expected two "
            "numbers from 0 to 1, the first below the second"
        )


def _picture(given: GivenPicture | None) -> Picture | None:
    """What was given, read and checked. Raises as `read_picture`."""
    if given is None or isinstance(given, Picture):
        return given
    if isinstance(given, Path | str):
        return read_picture(Path(given))
    file = io.BytesIO()
    given.save(file, "PNG")
    return read_picture(file.getvalue())


def _micro(asked: Micro, default: CompleteMicro) -> CompleteMicro:
    """What was asked for, and the default for the rest. Raises UsageError."""
    given = {one.name: getattr(asked, one.name) for one in fields(asked)}
    found = replace(default, **{name: value for name, value in given.items() if value is not None})
    for name, least in ("original_size", 1), ("crop", 0), ("target_size", 1):
        pair: tuple[int, int] = getattr(found, name)
        if not all(least <= value <= MOST_TOLD_PIXELS for value in pair):
            raise UsageError(
                f"{name} {pair[0]}x{pair[1]} is out of range: expected {least} to "
                f"{MOST_TOLD_PIXELS}"
            )
    if not abs(found.aesthetic_score) <= MAX_SCORE:
        raise UsageError(
            f"aesthetic_score {found.aesthetic_score} is out of range: expected a number such as "
            f"{_SCORE:g}, {MAX_SCORE} at most"
        )
    return found


_T = TypeVar("_T")


def _first(value: _T | None, default: _T) -> _T:
    return default if value is None else value
