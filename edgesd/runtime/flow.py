"""From a pipeline's wiring to the order in which its networks run: the only code that knows it.

Generation, calibration, planning and the checks of a build iterate over the stages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edgesd.errors import UsageError
from edgesd.spec.pipeline import PipelineSpec, ShapeSpec

GuidanceMode = Literal["batched", "sequential"]
"""Both halves of guidance in one run of twice the batch, or one after the other in less memory."""

Per = Literal["prompt", "image", "step"]
Role = Literal["text", "encoder", "side", "modulation", "denoiser", "decoder"]


@dataclass(frozen=True)
class Stage:
    """A component at its place in the flow. per: whether it runs once for each distinct prompt,
    once for each image, or at each step."""

    component: str
    role: Role
    per: Per

    def batch(self, count: int, guided: bool, mode: GuidanceMode) -> int:
        """Batch of one run, if `count` images are generated at a time."""
        if self.per != "step":
            return 1
        return 2 * count if guided and mode == "batched" else count

    def runs(self, calls: int, guided: bool, mode: GuidanceMode) -> int:
        """Runs for one image, generated on its own, by a sampler that asks for `calls` predictions:
        one for each of its timesteps."""
        if self.per == "image":
            return 1
        halves = 2 if guided else 1
        if self.per == "prompt":
            return halves
        return calls * (halves if mode == "sequential" else 1)


@dataclass(frozen=True)
class Flow:
    """The stages of a pipeline. groups: in the order in which they run; the stages of one group are
    loaded together, and may be released before the next group is loaded.

    distilled: guidance is an input of the denoiser, or there is none, and a negative prompt is
    needed for true CFG alone.
    """

    groups: tuple[tuple[Stage, ...], ...]
    distilled: bool

    @property
    def stages(self) -> tuple[Stage, ...]:
        """All stages, in the order in which they run."""
        return tuple(stage for group in self.groups for stage in group)

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the components that generate images, in the order in which they run."""
        return tuple(stage.component for stage in self.stages)

    @property
    def from_prompts(self) -> tuple[str, ...]:
        """Those that run for every image: all but the encoder."""
        return tuple(stage.component for stage in self.stages if stage.role != "encoder")

    @property
    def texts(self) -> tuple[Stage, ...]:
        """The text encoders."""
        return tuple(stage for stage in self.stages if stage.role == "text")

    @property
    def encoder(self) -> Stage | None:
        """The network that makes latents of images, where a task begins with one."""
        return next((stage for stage in self.stages if stage.role == "encoder"), None)

    @property
    def sides(self) -> frozenset[str]:
        """The components beside the denoiser, which run where a request shows them an image."""
        return frozenset(stage.component for stage in self.stages if stage.role == "side")

    @property
    def denoiser(self) -> Stage:
        """The network that predicts noise."""
        return next(stage for stage in self.stages if stage.role == "denoiser")

    @property
    def decoder(self) -> Stage:
        """The network that makes images of latents."""
        return next(stage for stage in self.stages if stage.role == "decoder")

    @property
    def modulation(self) -> Stage | None:
        """The network that makes what the denoiser is told of the timestep, where it is one of its
        own."""
        return next((stage for stage in self.stages if stage.role == "modulation"), None)

    @property
    def loop(self) -> tuple[Stage, ...]:
        """What runs at each step: the sides, then the denoiser."""
        return tuple(stage for stage in self.stages if stage.per == "step")

    @property
    def once(self) -> frozenset[str]:
        """The components that run once for a prompt or an image, and not at each step."""
        return frozenset(stage.component for stage in self.stages if stage.per != "step")

    def stage(self, component: str) -> Stage | None:
        """The stage of a component; None where it takes no part in generation."""
        return next((stage for stage in self.stages if stage.component == component), None)

    def guided(self, guidance_scale: float, true_cfg_scale: float = 1.0) -> bool:
        """Whether the denoiser is run with the negative prompt, too (classifier-free guidance).
        true_cfg_scale: that of models for which the guidance scale doesn't say so."""
        return (true_cfg_scale if self.distilled else guidance_scale) > 1


def flow_of(pipeline: PipelineSpec) -> Flow:
    """The flow of a pipeline, as its wiring says. What is wrong with a wiring that comes from
    outside, networks.check_networks says."""
    wiring = pipeline.wiring
    sides = {when: [s.component for s in wiring.sides if s.when == when] for when in _WHEN}
    denoiser = Stage(wiring.denoiser.component, "denoiser", "step")
    modulations = [wiring.modulation.component] if wiring.modulation else []
    encoders = [wiring.encoder.component] if wiring.encoder else []
    return Flow(
        groups=(
            *((Stage(text.component, "text", "prompt"),) for text in wiring.texts),
            *((Stage(name, "encoder", "image"),) for name in encoders),
            *((Stage(name, "side", "image"),) for name in sides["once"]),
            *((Stage(name, "modulation", "image"),) for name in modulations),
            (*(Stage(name, "side", "step") for name in sides["each_step"]), denoiser),
            (Stage(wiring.decoder.component, "decoder", "image"),),
        ),
        distilled=not wiring.cfg or wiring.denoiser.input_of("guidance_embedding") is not None,
    )


_WHEN = ("once", "each_step")


def guidance_mode(
    shape: ShapeSpec, count: int, guided: bool, fast: bool, asked: GuidanceMode | None
) -> GuidanceMode:
    """How `count` images are generated at a time: batched if `fast` and the denoiser's batch allows
    it.

    asked: the mode that must be used, None for either. Raises UsageError when the denoiser's
    batch, or `asked`, doesn't allow so many images.
    """
    batches: dict[GuidanceMode, int] = {"batched": 2 * count, "sequential": count}
    if not guided:
        batches = {"sequential": count}
    fits = [
        mode
        for mode, n in batches.items()
        if n == shape.batch or (shape.dynamic and n < shape.batch)
    ]
    if asked and len(batches) == 2:
        fits = [mode for mode in fits if mode == asked]
    if not fits:
        most = "up to" if shape.dynamic else "exactly"
        need = " or ".join(f"{n} ({mode} guidance)" for mode, n in batches.items())
        raise UsageError(
            f"this bundle's denoiser takes a batch of {most} {shape.batch}; {count} at a time need "
            f"{need}: change --batch or --guidance-mode"
        )
    return fits[0] if fast else fits[-1]
