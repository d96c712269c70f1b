"""Options that several commands have: described once, with the object that they describe.

A group adds its options to a command and hands the command that object. The command to run on a
board is derived from these options, so that an option which is added later reaches the board, too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import click

from edgesd.cli.common import Bytes, Finite, Numbers, Offset, Size
from edgesd.files import expanded, named_path
from edgesd.spec.base import MAX_CONTROL_SCALE, MAX_GUIDANCE, MAX_SCORE, MAX_STEPS
from edgesd.spec.build import LEAST_TOKENS, MOST_TOKENS, VARIANTS
from edgesd.spec.pipeline import IMAGE_TASKS
from edgesd.spec.scheme import MAX_RANK

if TYPE_CHECKING:
    from edgesd.runtime.hints import Hint, Lines
    from edgesd.runtime.memory import MemoryMode
    from edgesd.runtime.recorded import Recorded
    from edgesd.runtime.requests import Request
    from edgesd.runtime.settings import Settings
    from edgesd.runtime.syntax import Syntax

_T = TypeVar("_T")
_Command = Callable[..., Any]
_Decorator = Callable[[Any], Any]


class OptionGroup(Generic[_T]):
    """Options of a command, which takes, by the name `name`, what `make` makes of their values.

    make: takes a keyword argument for each option.
    """

    def __init__(self, name: str, make: Callable[..., _T], options: Sequence[_Decorator]) -> None:
        self._name, self._make, self._options = name, make, options

    def __call__(self, command: _Command) -> _Command:
        """`command` with the options."""

        @wraps(command)
        def with_object(*arguments: Any, **values: Any) -> Any:
            own = {name: values.pop(name) for name in names}
            return command(*arguments, **values, **{self._name: self._make(**own)})

        before = list(_params(command))
        decorated: _Command = with_object
        for option in reversed(self._options):
            decorated = option(decorated)
        names = [param.name for param in _params(decorated) if param not in before]
        return decorated


def _params(command: _Command) -> list[click.Parameter]:
    """Options and arguments that a function has, before it becomes a command."""
    return list(getattr(command, "__click_params__", ()))


@dataclass(frozen=True)
class GenerationOptions:
    """What to generate; None takes the default of the bundle or model. size: width, height."""

    steps: int | None = None
    guidance: float | None = None
    size: tuple[int, int] | None = None
    scheduler: str | None = None
    negative: str | None = None

    def request(self, prompt: str, seed: int) -> Request:
        """One image of this."""
        from edgesd.runtime.requests import Request

        width, height = self.size or (None, None)
        return Request(
            prompt=prompt,
            seed=seed,
            negative_prompt=self.negative,
            num_inference_steps=self.steps,
            guidance_scale=self.guidance,
            height=height,
            width=width,
            scheduler=self.scheduler,
        )


def generation_options(of: str, without: Collection[str] = ()) -> OptionGroup[GenerationOptions]:
    """--steps, --guidance, --negative, --size and --scheduler, but those in `without`, as
    `generation`. of: whose defaults they have (bundle, model)."""
    options = {
        "steps": click.option(
            "--steps",
            type=click.IntRange(1, MAX_STEPS),
            help=f"Denoising steps. [default: the {of}'s]",
        ),
        "guidance": click.option(
            "--guidance",
            type=Finite(-MAX_GUIDANCE, MAX_GUIDANCE),
            help=f"Classifier-free guidance scale; 1 is none. [default: the {of}'s]",
        ),
        "negative": click.option("--negative", metavar="TEXT", help="What not to generate."),
        "size": click.option(
            "--size", type=Size(), help=f"Image size in pixels. [default: the {of}'s]"
        ),
        "scheduler": scheduler_option("Sampler", f"the {of}'s"),
    }
    chosen = [option for name, option in options.items() if name not in without]
    return OptionGroup("generation", GenerationOptions, chosen)


@dataclass(frozen=True)
class PictureOptions:
    """What an image begins with; None: with noise, and what belongs to it the bundle's."""

    image: Path | None = None
    mask: Path | None = None
    strength: float | None = None
    mask_blur: float | None = None
    mask_padding: int | None = None

    def applied(self, request: Request) -> Request:
        """`request` with these. Reads the files, and raises as `read_picture`."""
        from edgesd.runtime.pictures import read_picture

        return replace(
            request,
            image=self.image and read_picture(self.image),
            mask=self.mask and read_picture(self.mask),
            strength=self.strength,
            mask_blur=self.mask_blur,
            mask_padding=self.mask_padding,
        )


picture_options = OptionGroup(
    "pictures",
    PictureOptions,
    [
        click.option(
            "--image",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="Begin with this image (bundles of build --task image); without --size the new "
            "one has its size, rounded down; of a larger one than the bundle's own, its shape.",
        ),
        click.option(
            "--mask",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="Paint anew what is white in this image, and keep the rest of --image (bundles of "
            "build --task inpaint).",
        ),
        click.option(
            "--strength",
            type=Finite(0, 1, min_open=True),
            help="With --image: the part of the steps that is taken; the more, the less is left of "
            "the image. [default: the model's]",
        ),
        click.option(
            "--mask-blur",
            type=Finite(0),
            metavar="PIXELS",
            help="With --mask: blur its edges so wide, and put what it covers into --image, which "
            "keeps its pixels elsewhere. [default: the whole new image is written]",
        ),
        click.option(
            "--mask-padding",
            type=click.IntRange(0),
            metavar="PIXELS",
            help="With --mask: draw only what it covers and so many pixels around, as large as "
            "--size, and put it into --image. [default: draw the whole image]",
        ),
    ],
)


@dataclass(frozen=True)
class PromptOptions:
    """How prompts are read; None: a second tokenizer reads what the first does."""

    prompt_2: str | None = None
    negative_2: str | None = None
    prompt_syntax: Syntax | None = None

    def applied(self, request: Request) -> Request:
        """`request` with these."""
        return replace(
            request,
            prompt_2=self.prompt_2,
            negative_prompt_2=self.negative_2,
            syntax=self.prompt_syntax,
        )


prompt_options = OptionGroup(
    "prompting",
    PromptOptions,
    [
        click.option(
            "--prompt-2",
            metavar="TEXT",
            help="What the second of two text encoders reads. [default: the prompt]",
        ),
        click.option(
            "--negative-2",
            metavar="TEXT",
            help="What it reads of what not to generate.",
        ),
        click.option(
            "--prompt-syntax",
            type=click.Choice(["plain", "a1111"]),
            help="a1111 reads (word:1.3), [word] and BREAK as AUTOMATIC1111's web UI does. "
            "[default: plain]",
        ),
    ],
)
"""--prompt-2, --negative-2 and --prompt-syntax, as `prompting`."""


@dataclass(frozen=True)
class FineOptions:
    """What few models need to be told; None takes the default. Sizes: width, height; crops: left,
    top."""

    guidance_rescale: float | None = None
    true_cfg: float | None = None
    original_size: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    target_size: tuple[int, int] | None = None
    aesthetic_score: float | None = None
    negative_original_size: tuple[int, int] | None = None
    negative_crop: tuple[int, int] | None = None
    negative_target_size: tuple[int, int] | None = None
    negative_aesthetic_score: float | None = None

    def applied(self, request: Request) -> Request:
        """`request` with these."""
        from edgesd.runtime.requests import Micro

        return replace(
            request,
            guidance_rescale=self.guidance_rescale,
            true_cfg_scale=self.true_cfg,
            micro=Micro(self.original_size, self.crop, self.target_size, self.aesthetic_score),
            negative_micro=Micro(
                self.negative_original_size,
                self.negative_crop,
                self.negative_target_size,
                self.negative_aesthetic_score,
            ),
        )


def _fine_options() -> list[_Decorator]:
    told = (
        ("original-size", Size(), "size before scaling: small ones are soft", "the image's"),
        ("crop", Offset(), "what was cut off at its left and top", "0,0"),
        ("target-size", Size(), "size after that", "the image's"),
        ("aesthetic-score", Finite(-MAX_SCORE, MAX_SCORE), "quality, up to 10, for refiners", "6"),
    )
    own = [
        click.option(
            f"--{name}",
            type=kind,
            help=f"SDXL: as a training picture's {words}. [default: {default}]",
        )
        for name, kind, words, default in told
    ]
    negative = [
        click.option(
            f"--negative-{name}",
            type=kind,
            help=f"--{name} of what not to generate. [default: "
            f"{'2.5' if name == 'aesthetic-score' else f'that of --{name}'}]",
        )
        for name, kind, _, _ in told
    ]
    rescale = click.option(
        "--guidance-rescale",
        type=Finite(0, 1),
        help="Bring back the contrast that guidance adds, by this share; 0.7 suits models of zero "
        "terminal SNR. [default: 0]",
    )
    true_cfg = click.option(
        "--true-cfg",
        type=Finite(1, MAX_GUIDANCE),
        help="FLUX: classifier-free guidance scale, with --negative; every step takes twice as "
        "long. [default: 1, none]",
    )
    return [rescale, true_cfg, *own, *negative]


fine_options = OptionGroup("fine", FineOptions, _fine_options())
"""--guidance-rescale, --true-cfg and what SDXL is told of sizes, as `fine`."""


@dataclass(frozen=True)
class ScheduleOptions:
    """How the sampler places its steps; None takes the bundle's way."""

    sigmas: str | tuple[float, ...] | None = None
    timesteps: tuple[int, ...] | None = None
    eta: float | None = None

    def applied(self, request: Request) -> Request:
        """`request` with these."""
        return replace(request, sigmas=self.sigmas, timesteps=self.timesteps, eta=self.eta)


schedule_options = OptionGroup(
    "schedule",
    ScheduleOptions,
    [
        click.option(
            "--sigmas",
            type=Numbers("KIND|LIST", words=("normal", "karras", "exponential", "beta")),
            help="How noise levels are spread: normal, karras, exponential or beta; or all of "
            "them, as 14.6,6.3,3.8,1.6,0. [default: the bundle's]",
        ),
        click.option(
            "--timesteps",
            type=Numbers("LIST", whole=True),
            help="All timesteps, as 999,749,499,249, of a model that was distilled for those.",
        ),
        click.option(
            "--eta",
            type=Finite(0, 1),
            help="Share of the noise that ddim and tcd draw anew at each step. [default: 0]",
        ),
    ],
)
"""--sigmas, --timesteps and --eta, as `schedule`."""


def scheduler_option(words: str, default: str = "the model's own") -> _Decorator:
    """--scheduler. words: what it sets."""
    default = f"[default: {default}]"

    class Named(click.Option):
        """Its help names all samplers, which are imported when it is shown."""

        def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
            from edgesd.runtime.schedulers import SCHEDULERS

            *names, last = sorted(SCHEDULERS)
            return f"--scheduler {self.metavar}", (
                f"{words}: {', '.join(names)} or {last}. {default}"
            )

    return click.option("--scheduler", cls=Named, metavar="NAME", help=f"{words}. {default}")


variant_option = click.option(
    "--variant",
    type=click.Choice(VARIANTS),
    help="What kind of model MODEL is, if its pipeline, scheduler and edgesd.json don't tell, as "
    "those of single files: it sets steps, guidance and schedule. [default: what they tell, or "
    "base]",
)


task_option = click.option(
    "--task",
    "tasks",
    type=click.Choice(IMAGE_TASKS),
    multiple=True,
    callback=lambda context, option, values: values or None,
    help="What the bundle is for beside text to image: image to image, or inpainting (and image to "
    "image); may be repeated. Models made for inpainting need no --task.",
)


vae_option = click.option(
    "--vae",
    metavar="MODEL",
    help="Take this autoencoder of the same latents instead of the model's own, as TAESD: a folder "
    "that diffusers saved, alone or in a pipeline, or a hub id.",
)


side_options = (
    click.option(
        "--controlnet",
        "controlnets",
        metavar="FOLDER[:NAME]",
        multiple=True,
        help="Add a ControlNet, which images are steered by (`generate --control`): the folder of "
        "a ControlNetModel that diffusers saved, or a hub id; may be repeated, each with a NAME.",
    ),
    click.option(
        "--adapter",
        "adapters",
        metavar="FOLDER[:NAME]",
        multiple=True,
        help="Add a T2I-Adapter; as --controlnet.",
    ),
)
"""--controlnet and --adapter, of what a bundle is built of."""


merged_lora_option = click.option(
    "--lora",
    "loras",
    metavar="FILE[:SCALE]",
    multiple=True,
    help="Merge a LoRA (.safetensors) into the model, at SCALE [default: 1]; may be repeated.",
)
"""--lora, of what a bundle is built of."""


max_tokens_option = click.option(
    "--max-tokens",
    type=click.IntRange(LEAST_TOKENS, MOST_TOKENS),
    help="For FLUX: tokens of a prompt that T5 is given, with padding: 128, 256 or 512. The number "
    "changes the image, and T5 takes time and memory by it. [default: the model's]",
)


lora_slots_option = click.option(
    "--lora-slots",
    type=click.IntRange(1, MAX_RANK),
    metavar="RANK",
    help="Leave places for LoRAs of up to this rank together, which `generate --lora` fills "
    "without building anew. [default: none]",
)


config_option = click.option(
    "--config",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    metavar="FOLDER",
    help="Of a MODEL that is a single file: the diffusers folder whose configs and tokenizers it "
    "has; its weights aren't needed, except FLUX's beside the transformer. [default: those of the "
    "published model of its layout; FLUX has none]",
)


@dataclass(frozen=True)
class RefinerOptions:
    """The bundle of a refiner, and where it goes on."""

    refiner: Path | None = None
    denoising_end: float | None = None

    def __post_init__(self) -> None:
        if self.denoising_end is not None and self.refiner is None:
            raise click.UsageError("--denoising-end goes with --refiner")

    def applied(self, request: Request) -> Request:
        """The request with it."""
        return replace(request, denoising_end=self.denoising_end)


refiner_options = OptionGroup(
    "refining",
    RefinerOptions,
    [
        click.option(
            "--refiner",
            type=click.Path(path_type=Path),
            metavar="BUNDLE",
            help="Let this bundle of a refiner take the last steps; only one of both is in memory "
            "at a time.",
        ),
        click.option(
            "--denoising-end",
            type=Finite(0, 1, min_open=True, max_open=True),
            metavar="PART",
            help="With --refiner: which part of the timesteps is denoised before it goes on.  "
            "[default: 0.8]",
        ),
    ],
)
"""--refiner and --denoising-end, as `refining`."""


@dataclass(frozen=True)
class ControlOptions:
    """What ControlNets and adapters are shown: FILE or FILE:NAME, and for each, or for all, how."""

    controls: tuple[str, ...] = ()
    scales: tuple[float, ...] = ()
    starts: tuple[float, ...] = ()
    ends: tuple[float, ...] = ()
    sources: tuple[str, ...] = ()
    thresholds: tuple[tuple[float, float], ...] = ()
    lines: tuple[Lines, ...] = ()
    guess_mode: bool = False

    def __post_init__(self) -> None:
        for option, values in (
            ("--control-scale", self.scales),
            ("--control-start", self.starts),
            ("--control-end", self.ends),
            ("--control-from", self.sources),
            ("--control-thresholds", self.thresholds),
            ("--control-lines", self.lines),
        ):
            if values and not self.controls:
                raise click.UsageError(f"{option} goes with --control FILE")
            if len(values) not in (0, 1, len(self.controls)):
                raise click.UsageError(
                    f"{option} is given {len(values)} times for {len(self.controls)} control "
                    "images: give it once for all, or once for each, in their order"
                )

    def applied(self, request: Request, known: Recorded | None = None) -> Request:
        """`request` with the pictures, which are read. known: of an image that is made again: what
        isn't given is as it was there. Raises InputError, and UsageError where a picture that was
        shown then isn't given, or an option has no picture that it is for."""
        from edgesd.runtime.hints import USUAL
        from edgesd.runtime.pictures import read_picture
        from edgesd.runtime.requests import Control

        before = {} if known is None else {one.name: one for one in known.controls}
        found = []
        for place, given in enumerate(self.controls):
            path, name = named_path(given)
            if not name and len(before) == 1:
                (name,) = before
            own: dict[str, Any] = {
                field: values[place % len(values)]
                for field, values in (
                    ("scale", self.scales),
                    ("start", self.starts),
                    ("end", self.ends),
                    ("kind", [_SOURCES[source] for source in self.sources]),
                )
                if values
            }
            options = USUAL
            if one := before.pop(name, None):
                then = {"scale": one.scale, "start": one.start, "end": one.end, "kind": one.kind}
                own, options = {**then, **own}, one.options
            if self.thresholds:
                low, high = self.thresholds[place % len(self.thresholds)]
                options = replace(options, low=low, high=high)
            if self.lines:
                options = replace(options, lines=self.lines[place % len(self.lines)])
            found.append(Control(read_picture(expanded(path)), name, **own, options=options))
        for name, one in before.items():
            raise click.UsageError(
                f"that image was made with a control image for {name} (sha256 {one.sha256[:16]}...)"
                f": say where it is: --control FILE:{name}"
            )
        kinds = {control.kind for control in found}
        for option, values, source in (
            ("--control-thresholds", self.thresholds, "photo"),
            ("--control-lines", self.lines, "sketch"),
        ):
            if values and _SOURCES[source] not in kinds:
                raise click.UsageError(f"{option} goes with --control-from {source}")
        return replace(request, controls=tuple(found), guess_mode=self.guess_mode)


_SOURCES: Mapping[str, Hint] = {"hint": "ready", "photo": "canny", "sketch": "scribble"}
"""--control-from -> how the control image is made."""

_SCALE = Finite(-MAX_CONTROL_SCALE, MAX_CONTROL_SCALE)

control_options = OptionGroup(
    "control",
    ControlOptions,
    [
        click.option(
            "--control",
            "controls",
            metavar="FILE[:NAME]",
            multiple=True,
            help="Show this picture to the bundle's ControlNet or adapter, or to the one that was "
            "built in as NAME; may be repeated for several. A path that exists is taken whole, "
            "colons included.",
        ),
        click.option(
            "--control-scale",
            "scales",
            type=_SCALE,
            metavar="NUMBER",
            multiple=True,
            help="How much it counts. This and the other --control-... may be given once for all "
            "pictures, or once for each, in their order.  [default: 1]",
        ),
        click.option(
            "--control-start",
            "starts",
            type=Finite(0, 1),
            metavar="PART",
            multiple=True,
            help="Part of the steps after which it begins to act.  [default: 0]",
        ),
        click.option(
            "--control-end",
            "ends",
            type=Finite(0, 1),
            metavar="PART",
            multiple=True,
            help="Part of the steps after which it stops.  [default: 1]",
        ),
        click.option(
            "--control-from",
            "sources",
            type=click.Choice([*_SOURCES]),
            multiple=True,
            help="What the picture is: a hint, as the ControlNet was trained with (edges, depth, a "
            "pose), or a photo or a sketch, of which white lines on black are made.  "
            "[default: hint]",
        ),
        click.option(
            "--control-thresholds",
            "thresholds",
            type=(Finite(0), Finite(0)),
            metavar="LOW HIGH",
            multiple=True,
            help="Of a photo's edges (Canny): lower ones find more. An edge begins where it is "
            "steeper than HIGH and goes on down to LOW.  [default: 100 200]",
        ),
        click.option(
            "--control-lines",
            "lines",
            type=click.Choice(["dark", "light"]),
            multiple=True,
            help="Whether a sketch's lines are darker or lighter than its ground.  [default: "
            "whichever there is less of]",
        ),
        click.option(
            "--guess-mode",
            is_flag=True,
            help="Let ControlNets act on the prompt's half of guidance alone, for images that "
            "follow the picture with hardly a prompt.",
        ),
    ],
)
"""--control and how it is shown, as `control`."""


@dataclass(frozen=True)
class RunOptions:
    """How to run. threads: 0 for all fast cores. memory, max_memory: at most one is given."""

    threads: int = 0
    memory: MemoryMode | None = None
    max_memory: int | None = None

    def __post_init__(self) -> None:
        if self.memory is not None and self.max_memory is not None:
            raise click.UsageError(
                f"--memory {self.memory} is used whatever it needs, and --max-memory chooses one "
                "that fits: give only one of them"
            )

    def settings(self, **others: Any) -> Settings:
        """Settings of a pipeline that is run so. others: their further fields."""
        from edgesd.runtime.settings import Settings

        return Settings(self.threads, self.memory, max_memory=self.max_memory, **others)


threads_option = click.option(
    "--threads",
    type=click.IntRange(0, 256),
    default=0,
    show_default=True,
    help="CPU threads; 0 uses all fast cores.",
)

run_options = OptionGroup(
    "run",
    RunOptions,
    [
        click.option(
            "--memory",
            type=click.Choice(["fast", "balanced", "stream"]),
            help="fast keeps all networks loaded, balanced releases each after its use, stream "
            "leaves weights in their file. [default: by free memory]",
        ),
        click.option(
            "--max-memory",
            type=Bytes(),
            help="Use the fastest --memory that fits into this (400MB, 1.5GB) at the given size "
            "and batch; fail if none does. Mapped weights count, as in the printed peak.",
        ),
        threads_option,
    ],
)
"""--memory, --max-memory and --threads, as `run`."""

any_machine_option = click.option(
    "--any-machine", is_flag=True, help="Run a bundle that was built for another board."
)

self_test_option = click.option(
    "--self-test/--no-self-test",
    default=True,
    help="Generate an image in 2 steps before switching.",
)


def json_option(command: _Command) -> _Command:
    """--json: one JSON object on standard output."""
    return click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON object on standard output."
    )(command)


def hosts_option(command: _Command) -> _Command:
    """--host, any number of times."""
    return click.option(
        "--host",
        "hosts",
        metavar="USER@BOARD[:PORT]",
        multiple=True,
        help="Do this on that board, over SSH; may be repeated.",
    )(command)


def lpips_option(command: _Command) -> _Command:
    """--lpips: weights of the perceptual distance."""
    return click.option(
        "--lpips",
        type=click.Path(path_type=Path, file_okay=False, exists=True),
        help="Folder with LPIPS's weights: alexnet-owt-7be5be79.pth and alex.pth, or those of "
        "VGG16. [default: EDGESD_LPIPS, or torch.hub's cache]",
    )(command)


def option_arguments(context: click.Context, without: Collection[str]) -> list[str]:
    """The options of a command that was given, as arguments that mean the same on a board.

    without: names of those that are for this machine alone. Options without a value are left out;
    defaults are said, as another version may have other ones.
    """
    arguments: list[str] = []
    for param in context.command.params:
        if not isinstance(param, click.Option) or param.name in without:
            continue
        value = context.params[str(param.name)]
        if value is None:
            continue
        if param.is_flag:
            arguments += (param.opts if value else param.secondary_opts)[-1:]
            continue
        for one in value if param.multiple else [value]:
            arguments.append(f"{param.opts[-1]}={_typed(one)}")
    return arguments


def _typed(value: object) -> str:
    """An option's value as it is typed: a size as WxH, others as Python writes them."""
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return str(value)
