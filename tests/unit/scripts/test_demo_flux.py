"""The demo model in FLUX's form: its parts, how it begins, and what its stages are taught."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from diffusers import AutoencoderTiny, FluxPipeline
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTokenizer, T5Tokenizer

from scripts.demo_model import flux, model, train_flux
from scripts.demo_model.dataset import Emoji
from scripts.demo_model.training import averaged

EMOJI = Path(__file__).resolve().parents[3] / "models" / "emoji"
NAMES = ("red apple", "penguin", "blue octopus", "pizza", "hot beverage", "rocket", "cat face")
TEXT = (torch.tensor([[5, 6, 1] + [0] * 21, [7, 1] + [0] * 22]), torch.randn(2, 128))


@pytest.fixture(scope="module")
def emoji() -> list[Emoji]:
    return [Emoji("flat", name, ("food", "animal"), "core") for name in NAMES]


@pytest.fixture(scope="module")
def tokenizer(emoji: list[Emoji]) -> T5Tokenizer:
    return flux.tokenizer(emoji)


@pytest.fixture(scope="module")
def denoiser() -> flux.Denoiser:
    """Shaken, since at first all of its blocks are the identity."""
    torch.manual_seed(0)
    net = flux.Denoiser(flux.text_encoder(64), flux.transformer(guidance=False))
    flux.begin(net.transformer)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return net.eval()


def packed(seed: int = 0) -> Tensor:
    return torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(seed))


def test_the_tokenizer_pads_ends_and_knows_the_captions(
    tokenizer: T5Tokenizer, tmp_path: Path
) -> None:
    ids = flux.token_ids(tokenizer, ["flat icon, red apple", "", "penguin " * 40])
    assert ids.shape == (3, flux.TOKENS)
    pad, end, unknown = tokenizer.convert_tokens_to_ids([flux.PAD, flux.END, flux.UNKNOWN])
    assert (pad, end, unknown) == (0, 1, 2)
    assert ids[1].tolist() == [end] + [pad] * (flux.TOKENS - 1)
    assert ids[2, -1] == end
    assert unknown not in ids
    tokenizer.save_pretrained(tmp_path)
    assert torch.equal(flux.token_ids(T5Tokenizer.from_pretrained(tmp_path), ["rocket"])[0],
                       flux.token_ids(tokenizer, ["rocket"])[0])  # fmt: skip


def test_the_tokenizer_of_a_training_is_kept(emoji: list[Emoji], tmp_path: Path) -> None:
    first = train_flux.t5_tokenizer(tmp_path, emoji)
    again = train_flux.t5_tokenizer(tmp_path, emoji[:2])  # else it would have fewer pieces
    assert again.get_vocab() == first.get_vocab()


def test_latents_are_packed_as_the_pipeline_does() -> None:
    latents = torch.randn(2, 4, 16, 16)
    wanted = FluxPipeline._pack_latents(latents, 2, 4, 16, 16)
    assert torch.equal(flux.pack(latents), wanted)


@torch.no_grad()
def test_training_begins_with_blocks_that_do_nothing() -> None:
    net = flux.transformer(guidance=False)
    flux.begin(net)
    seen: list[Tensor] = []
    net.transformer_blocks[0].register_forward_pre_hook(
        lambda _block, _given, named: seen.append(named["hidden_states"]), with_kwargs=True
    )
    net.single_transformer_blocks[-1].register_forward_hook(
        lambda _block, _given, result: seen.append(result[1])
    )
    whole = flux.Denoiser(flux.text_encoder(64), net)
    velocity = whole(packed(), torch.tensor([0.2, 0.9]), *TEXT)
    assert torch.equal(*seen)
    assert seen[0].abs().max() > 0
    assert torch.equal(velocity, torch.zeros(2, 64, 16))


def test_the_denoiser_reads_both_texts(denoiser: flux.Denoiser) -> None:
    ids, pooled = TEXT
    sigmas = torch.tensor([0.3, 0.8])
    velocity = denoiser(packed(), sigmas, ids, pooled)
    assert not torch.equal(velocity, denoiser(packed(), sigmas, ids, -pooled))
    assert not torch.equal(velocity, denoiser(packed(), sigmas, ids.flip(0), pooled))
    velocity.pow(2).mean().backward()
    silent = {name for name, value in denoiser.named_parameters() if value.grad is None}
    assert not silent
    denoiser.zero_grad(set_to_none=True)


@pytest.mark.parametrize("masked", [False, True])
def test_plain_attention_is_attention(masked: bool) -> None:
    query, key, value = torch.randn(3, 2, 4, 10, 8)
    mask = torch.randn(2, 4, 10, 10) if masked else None
    wanted = functional.scaled_dot_product_attention(query, key, value, mask, scale=0.7)
    torch.testing.assert_close(flux.plain_attention(query, key, value, mask, scale=0.7), wanted)
    with pytest.raises(ValueError, match="plain"):
        flux.plain_attention(query, key, value, is_causal=True)


def test_noise_levels_are_spread_from_picture_to_noise() -> None:
    torch.manual_seed(0)
    sigmas = torch.cat([train_flux.some_sigmas(16) for _ in range(100)])
    assert 0 <= sigmas.min() < 0.02
    assert 0.98 < sigmas.max() <= 1
    assert sigmas.mean() == pytest.approx(0.5, abs=0.01)
    middle = ((sigmas > 0.25) & (sigmas < 0.75)).float().mean()
    assert 0.6 < middle < 0.8  # half of a uniform distribution, three quarters of a logit-normal


@torch.no_grad()
@pytest.mark.parametrize("guidance", [False, True])
def test_a_student_begins_as_its_teacher(denoiser: flux.Denoiser, guidance: bool) -> None:
    student = train_flux.student_of(denoiser, guidance)
    sigmas = torch.tensor([0.3, 0.8])
    scale = torch.tensor([1.0, 5.0]) if guidance else None
    torch.testing.assert_close(
        student(packed(), sigmas, *TEXT, scale), denoiser(packed(), sigmas, *TEXT)
    )


class Material:
    """Two pictures and texts, as ``train_flux.Material`` gives them."""

    latents = packed(1)

    def __init__(self) -> None:
        self.begun = SimpleNamespace(pick=self.pick)

    def pick(self, _rng: random.Random, empty_share: float) -> tuple[Tensor, list[str]]:
        return torch.tensor([0, 1] * 4), ["one", "two"] * 4

    def pooled(self, captions: list[str]) -> Tensor:
        return self.text(captions)[1]

    def text(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        told = torch.tensor([{"": 0.0, "one": 1.0, "two": 2.0}[caption] for caption in captions])
        return told.long()[:, None], told[:, None]


MATERIAL = cast(train_flux.Material, Material())


class Straight(nn.Module):
    """A denoiser whose velocity is that of the caption, whatever the point; it keeps the levels,
    and whether both texts ever differed."""

    def __init__(self, guided: Callable[[Tensor, Tensor | None], Tensor]) -> None:
        super().__init__()
        self.guided = guided
        self.levels: set[float] = set()
        self.unlike = False

    def forward(
        self,
        noisy: Tensor,
        sigmas: Tensor,
        ids: Tensor,
        pooled: Tensor,
        scale: Tensor | None = None,
    ) -> Tensor:
        self.levels |= set(sigmas.tolist())
        self.unlike |= not torch.equal(ids.float(), pooled)
        return self.guided(pooled[:, 0], scale)[:, None, None].expand_as(noisy)


def straight(guided: Callable[[Tensor, Tensor | None], Tensor]) -> flux.Denoiser:
    return cast(flux.Denoiser, Straight(guided))


@torch.no_grad()
def test_t5_is_taught_what_clip_says(denoiser: flux.Denoiser) -> None:
    class Ids(Material):
        def text(self, captions: list[str]) -> tuple[Tensor, Tensor]:
            ids = TEXT[0].repeat(len(captions) // 2, 1)
            return ids, denoiser.text(ids)[0].mean(dim=1) + 2.0

    loss = train_flux.text_loss(cast(train_flux.Material, Ids()), denoiser.text, random.Random(0))
    assert loss == pytest.approx(4.0, rel=0.02)  # products in bfloat16


def test_the_base_is_taught_the_way_from_noise_to_the_picture() -> None:
    """A net that knows the pictures has no loss: its velocity leads from noise to them."""

    class Knowing(nn.Module):
        def forward(self, noisy: Tensor, sigmas: Tensor, *_: Tensor) -> Tensor:
            return (noisy - Material.latents.repeat(4, 1, 1)) / sigmas[:, None, None]

    rng = random.Random(0)
    loss = train_flux.base_loss(MATERIAL, cast(flux.Denoiser, Knowing()), rng)
    assert loss < 1e-6
    other = Straight(lambda told, _: told)
    torch.manual_seed(0)
    for _ in range(4):
        assert train_flux.base_loss(MATERIAL, cast(flux.Denoiser, other), rng) > 1
    assert other.unlike  # some pictures are told to T5 alone


def test_dev_is_taught_what_guidance_makes() -> None:
    teacher = straight(lambda told, _: told + 1.0)
    rng = random.Random(0)

    def right(told: Tensor, scale: Tensor | None) -> Tensor:
        assert scale is not None
        assert ((scale >= 1) & (scale <= 6)).all()
        return 1.0 + scale * told

    assert train_flux.dev_loss(MATERIAL, straight(right), teacher, rng) < 1e-9
    wrong = straight(lambda told, _: 1.0 + told)
    assert train_flux.dev_loss(MATERIAL, wrong, teacher, rng) > 1


def test_schnell_is_taught_four_guided_steps() -> None:
    teacher = straight(lambda told, _: told + 1.0)
    student = straight(lambda told, _: 1.0 + train_flux.GUIDANCE_SCALE * told)
    rng = random.Random(0)
    loss = train_flux.schnell_loss(MATERIAL, student, student, teacher, rng)
    assert loss < 1e-9
    scheduler = flux.scheduler(dynamic=False)
    scheduler.set_timesteps(train_flux.STEPS, sigmas=[1.0, 0.75, 0.5, 0.25])
    assert cast(Straight, student).levels == set(scheduler.sigmas[:-1].tolist())
    assert not cast(Straight, teacher).unlike
    assert min(cast(Straight, teacher).levels) == pytest.approx(1 / 16)
    wrong = straight(lambda told, _: 1.0 + told)
    assert train_flux.schnell_loss(MATERIAL, wrong, student, teacher, rng) > 1


@torch.no_grad()
def test_a_saved_pipeline_draws(tokenizer: T5Tokenizer, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = flux.Denoiser(flux.text_encoder(len(tokenizer)), flux.transformer(guidance=True))
    pipeline = flux.assemble(
        CLIPTokenizer.from_pretrained(EMOJI / "tokenizer"),
        CLIPTextModel.from_pretrained(EMOJI / "text_encoder", dtype=torch.float32),
        tokenizer,
        averaged(net),
        AutoencoderTiny.from_pretrained(EMOJI / "vae"),
    )
    model.save_pipeline(pipeline, tmp_path)
    loaded = FluxPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.scheduler.config.use_dynamic_shifting
    assert loaded.text_encoder_2.dtype == torch.float32
    [picture] = loaded(
        "red apple", height=128, width=128, num_inference_steps=1, max_sequence_length=flux.TOKENS
    ).images
    assert picture.size == (128, 128)
