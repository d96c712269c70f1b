"""Train the demo model in FLUX's form, in four stages.

    python -m scripts.demo_model.train_flux STAGE --data DATA --work WORK --start models/emoji

text     the T5 encoder: the mean of its hidden states becomes CLIP's pooled output
base     the transformer, on straight paths from noise to latents (Esser et al., arXiv 2403.03206)
dev      the guidance scale becomes an input: the student gives in one run what guidance makes of
         the base's two (Meng et al., arXiv 2210.03142)
schnell  four steps without guidance, each as long as several guided steps of the base

Autoencoder and CLIP encoder are those of ``--start`` and stay as they are; so does T5 after its
stage. ``dev`` and ``schnell`` begin with the base. Run a stage again with the same ``--work`` to
go on from its checkpoint, ``work/flux-STAGE.pt``.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from transformers import T5EncoderModel, T5Tokenizer

from . import flux, stage
from .dataset import Emoji
from .training import Options, averaged, spread, stage_parser, stratified

TOKENIZER = "tokenizer_2"
EMPTY_CAPTION_SHARE = 0.1  # for classifier-free guidance
POOLED_LEFT_OUT_SHARE = 0.2  # else T5 might hardly be listened to
UNIFORM_SHARE = 0.15  # of the sigmas; the others are logit-normal
GUIDANCE_SCALES = (1.0, 6.0)
GUIDANCE_SCALE = 3.0
STEPS = 4
TEACHER_STEPS = 4  # for each of the student's
OWN_SHARE = 0.5  # of the points that the four-step student reached itself


def t5_tokenizer(work: Path, emoji: Sequence[Emoji]) -> T5Tokenizer:
    """The tokenizer in ``work``, trained on the captions and written there if there is none.

    Kept, because two trainings order the rarest pieces differently.
    """
    folder = work / TOKENIZER
    if not folder.exists():
        flux.tokenizer(emoji).save_pretrained(folder)
    tokenizer: T5Tokenizer = T5Tokenizer.from_pretrained(folder)
    return tokenizer


class Lesson(NamedTuple):
    """What a stage trains: ``net``, ``average`` following it. others: networks that the loss runs,
    too."""

    net: nn.Module
    average: nn.Module
    loss_of: Callable[[random.Random], Tensor]
    others: tuple[nn.Module, ...] = ()


class Material:
    """Latents and captions of the training set, as the transformer takes them."""

    def __init__(self, options: Options) -> None:
        self.begun = stage.begin(options)
        self.latents = flux.pack(self.begun.latents(self.begun.pictures))  # [N, 64, 16]
        self.tokenizer = t5_tokenizer(options.work, self.begun.emoji)
        self._clip = self.begun.text()
        self._pooled: dict[str, Tensor] = {}

    @torch.no_grad()
    def pooled(self, captions: list[str]) -> Tensor:
        """CLIP's pooled output [B, 128]; a caption's is kept."""
        new = sorted({caption for caption in captions if caption not in self._pooled})
        if new:
            self._pooled |= dict(
                zip(new, self._clip(self.begun.ids(new)).pooler_output, strict=True)
            )
        return torch.stack([self._pooled[caption] for caption in captions])

    def text(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """T5's token ids [B, 24] and CLIP's pooled output [B, 128]."""
        return flux.token_ids(self.tokenizer, captions), self.pooled(captions)


def some_sigmas(batch: int) -> Tensor:
    """Noise levels from 0 to 1, [B]: mostly logit-normal."""
    places = spread(batch)
    normal = torch.special.ndtri(places.clamp(1e-4, 1 - 1e-4))
    return torch.where(torch.rand(batch) < UNIFORM_SHARE, places, normal.sigmoid())


def noised(latents: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
    """The point at sigmas [B] of the straight paths from latents to noise, both [B, 64, 16]."""
    share = sigmas[:, None, None]
    return (1.0 - share) * latents + share * noise


def guided(
    teacher: flux.Denoiser,
    noisy: Tensor,
    sigmas: Tensor,
    text: tuple[Tensor, Tensor],
    empty: tuple[Tensor, Tensor],
    scale: Tensor,
) -> Tensor:
    """Velocity [B, 64, 16] of the teacher under classifier-free guidance of ``scale`` [B]."""
    both = [torch.cat([given, none]) for given, none in zip(text, empty, strict=True)]
    velocity = teacher(torch.cat([noisy] * 2), torch.cat([sigmas] * 2), *both).float()
    with_text, without = velocity.chunk(2)
    changed: Tensor = without + scale[:, None, None] * (with_text - without)
    return changed


def text_loss(material: Material, text: T5EncoderModel, rng: random.Random) -> Tensor:
    """Squared distance of T5's mean hidden state from CLIP's pooled output, a scalar."""
    _, captions = material.begun.pick(rng, EMPTY_CAPTION_SHARE)
    ids, pooled = material.text(captions)
    with flux.quick_steps():
        told: Tensor = text(ids)[0].mean(dim=1)
    return squared_error(told, pooled)


def base_loss(material: Material, net: flux.Denoiser, rng: random.Random) -> Tensor:
    """Mean squared error of the velocity, a scalar."""
    chosen, captions = material.begun.pick(rng, EMPTY_CAPTION_SHARE)
    ids, pooled = material.text(captions)
    left_out = torch.rand(len(captions), 1) < POOLED_LEFT_OUT_SHARE
    pooled = torch.where(left_out, material.pooled([""]), pooled)
    latents, sigmas = material.latents[chosen], some_sigmas(len(captions))
    noise = torch.randn_like(latents)
    with flux.quick_steps():
        velocity = net(noised(latents, noise, sigmas), sigmas, ids, pooled)
    return squared_error(velocity, noise - latents)


def squared_error(given: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared error in fp32, a scalar."""
    return (given.float() - wanted).pow(2).mean()


def dev_loss(
    material: Material, net: flux.Denoiser, teacher: flux.Denoiser, rng: random.Random
) -> Tensor:
    """Squared distance from the guided teacher at a random scale, a scalar."""
    chosen, captions = material.begun.pick(rng, EMPTY_CAPTION_SHARE)
    batch = len(captions)
    text, empty = material.text(captions), material.text([""] * batch)
    low, high = GUIDANCE_SCALES
    scale = low + (high - low) * spread(batch)
    sigmas = some_sigmas(batch)
    latents = material.latents[chosen]
    noisy = noised(latents, torch.randn_like(latents), sigmas)
    with flux.quick_steps():
        with torch.no_grad():
            wanted = guided(teacher, noisy, sigmas, text, empty, scale)
        return squared_error(net(noisy, sigmas, *text, scale), wanted)


def schnell_loss(
    material: Material,
    net: flux.Denoiser,
    average: flux.Denoiser,
    teacher: flux.Denoiser,
    rng: random.Random,
) -> Tensor:
    """Squared distance from the mean velocity of the guided teacher over one of the four steps.

    The step begins at a picture with noise, or where the student's average itself came from noise.
    """
    chosen, captions = material.begun.pick(rng, 0.0)
    batch = len(captions)
    text, empty = material.text(captions), material.text([""] * batch)
    scale = torch.full((batch,), GUIDANCE_SCALE)
    places = stratified(batch, STEPS)
    sigmas = 1.0 - places / STEPS
    latents = material.latents[chosen]
    noise = torch.randn_like(latents)
    with flux.quick_steps():
        with torch.no_grad():
            own = noise
            reached = noised(latents, noise, sigmas)
            is_own = torch.rand(batch) < OWN_SHARE
            for step in range(STEPS):
                now = is_own & (places == step)
                reached = torch.where(now[:, None, None], own, reached)
                if step < STEPS - 1:
                    level = torch.full((batch,), 1.0 - step / STEPS)
                    own = own - average(own, level, *text).float() / STEPS
            point = reached
            length = 1.0 / (STEPS * TEACHER_STEPS)
            for step in range(TEACHER_STEPS):
                level = sigmas - step * length
                point = point - length * guided(teacher, point, level, text, empty, scale)
        wanted = (reached - point) * STEPS
        return squared_error(net(reached, sigmas, *text), wanted)


def text_of(tokenizer: T5Tokenizer, work: Path) -> T5EncoderModel:
    """The T5 encoder with its averaged weights; it doesn't train."""
    text = flux.text_encoder(len(tokenizer)).requires_grad_(False)
    text.load_state_dict(torch.load(work / "flux-text.pt")["average"])
    return text


def base_of(tokenizer: T5Tokenizer, work: Path) -> flux.Denoiser:
    """The averaged weights of the base; they don't train."""
    net = flux.Denoiser(flux.text_encoder(len(tokenizer)), flux.transformer(guidance=False))
    net.load_state_dict(torch.load(work / "flux-base.pt")["average"])
    return net.requires_grad_(False).eval()


def student_of(teacher: flux.Denoiser, guidance: bool) -> flux.Denoiser:
    """The teacher's T5 and a copy of its transformer; a guidance scale adds nothing yet."""
    transformer: FluxTransformer2DModel = flux.transformer(guidance)
    missing, unexpected = transformer.load_state_dict(
        teacher.transformer.state_dict(), strict=False
    )
    if unexpected or any(".guidance_embedder." not in name for name in missing):
        raise ValueError(f"the transformers differ in more than guidance: {missing}, {unexpected}")
    if guidance:
        last = transformer.time_text_embed.guidance_embedder.linear_2
        torch.nn.init.zeros_(last.weight)
        torch.nn.init.zeros_(last.bias)
    return flux.Denoiser(teacher.text, transformer)


def text_lesson(material: Material) -> Lesson:
    """For the T5 encoder."""
    text = flux.text_encoder(len(material.tokenizer))
    return Lesson(text, averaged(text), lambda rng: text_loss(material, text, rng))


def base_lesson(material: Material) -> Lesson:
    """For the transformer, on pictures."""
    text = text_of(material.tokenizer, material.begun.options.work)
    net = flux.Denoiser(text, flux.transformer(guidance=False))
    flux.begin(net.transformer)
    return Lesson(net, averaged(net), lambda rng: base_loss(material, net, rng))


def dev_lesson(material: Material) -> Lesson:
    """To distil the guidance."""
    teacher = base_of(material.tokenizer, material.begun.options.work)
    net = student_of(teacher, guidance=True)
    return Lesson(net, averaged(net), lambda rng: dev_loss(material, net, teacher, rng), (teacher,))


def schnell_lesson(material: Material) -> Lesson:
    """To distil guidance and steps."""
    teacher = base_of(material.tokenizer, material.begun.options.work)
    net = student_of(teacher, guidance=False)
    average = averaged(net)
    return Lesson(
        net, average, lambda rng: schnell_loss(material, net, average, teacher, rng), (teacher,)
    )


STAGES: dict[str, Callable[[Material], Lesson]] = {
    "text": text_lesson,
    "base": base_lesson,
    "dev": dev_lesson,
    "schnell": schnell_lesson,
}


def train(options: Options, name: str, flat: float, compiled: bool) -> None:
    """Train a stage for the CPU time given. flat: share of it at the full learning rate."""
    material = Material(options)
    net, average, loss_of, others = STAGES[name](material)
    if compiled:
        for each in (net, average, *others):
            each.compile()
    material.begun.fit(f"flux-{name}", net, average, loss_of, flat=flat)


def main() -> None:
    parser = stage_parser(__doc__, lr=1e-3)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument(
        "--flat", type=float, default=0.5, help="share of the time at the full rate"
    )
    parser.add_argument("--eager", action="store_true", help="don't compile: needs no C++ compiler")
    given = vars(parser.parse_args())
    name, flat, eager = given.pop("stage"), given.pop("flat"), given.pop("eager")
    train(Options(**given), name, flat, not eager)


if __name__ == "__main__":
    main()
