"""How the demo models in the forms of XL and of four steps begin, and what they are taught."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import CLIPTokenizer

from scripts.demo_model import model, train_lcm, train_xl, xl
from scripts.demo_model.sampling import settings_of
from scripts.demo_model.train_unet import diffusion_loss
from scripts.demo_model.training import fit

EMOJI = Path(__file__).resolve().parents[3] / "models" / "emoji"
CAPTIONS = ["a red apple", "penguin", "blue octopus", "flat icon, pizza"]


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    """The UNet that training begins with."""
    return UNet2DConditionModel.from_pretrained(EMOJI / "unet").requires_grad_(False).eval()


@pytest.fixture(scope="module")
def denoiser() -> xl.Denoiser:
    """The denoiser in XL's form as training begins with it."""
    return train_xl.start_of(EMOJI).eval()


def told(captions: list[str], sizes: Tensor, *, empty: bool = False) -> xl.Conditioning:
    tokenizers = [
        CLIPTokenizer.from_pretrained(EMOJI / "tokenizer", pad_token=pad)
        for pad in ("<|endoftext|>", xl.PAD_2)
    ]
    return xl.Conditioning(
        *(model.token_ids(tokenizer, captions) for tokenizer in tokenizers),
        torch.tensor([empty] * len(captions)),
        sizes,
    )


WHOLE = torch.tensor([[128, 128, 0, 0, 128, 128]] * len(CAPTIONS))


@torch.no_grad()
def test_xl_begins_near_the_model_that_it_is_made_of(
    denoiser: xl.Denoiser, unet: UNet2DConditionModel
) -> None:
    noisy = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([50, 300, 600, 900])
    conditioning = told(CAPTIONS, WHOLE)
    given = denoiser(noisy, timesteps, conditioning)
    two_layers = denoiser.text(conditioning.ids, output_hidden_states=True).hidden_states[-2]
    wanted = unet(noisy, timesteps, denoiser.text.final_layer_norm(two_layers)).sample
    assert (given - wanted).pow(2).mean() < 0.1 * wanted.pow(2).mean()


@torch.no_grad()
def test_what_xl_is_told_more_than_its_model_adds_nothing_at_first(denoiser: xl.Denoiser) -> None:
    noisy = torch.zeros(4, 4, 16, 16)
    timesteps = torch.full((4,), 500)
    soft = torch.tensor([[20, 20, 7, 3, 128, 128]] * 4)
    plain = denoiser(noisy, timesteps, told(CAPTIONS, WHOLE))
    assert torch.equal(plain, denoiser(noisy, timesteps, told(CAPTIONS, soft)))
    assert not torch.equal(plain, denoiser(noisy, timesteps, told(CAPTIONS[::-1], WHOLE)))
    other = denoiser(noisy, timesteps, told(CAPTIONS[::-1], WHOLE, empty=True))
    assert torch.equal(denoiser(noisy, timesteps, told(CAPTIONS, WHOLE, empty=True)), other)


def test_all_of_xl_is_taught_but_its_first_encoder(denoiser: xl.Denoiser) -> None:
    torch.manual_seed(0)
    alphas = model.scheduler().alphas_cumprod
    latents = torch.randn(4, 4, 16, 16)
    diffusion_loss(denoiser, alphas, latents, told(CAPTIONS, WHOLE)).backward()
    silent = {name for name, value in denoiser.named_parameters() if value.grad is None}
    assert silent == {f"text.{name}" for name, _ in denoiser.text.named_parameters()}
    # The size ids and the second encoder move from the second step on: what they meet is zero.
    assert denoiser.unet.add_embedding.linear_2.weight.grad.abs().max() > 0
    denoiser.zero_grad(set_to_none=True)


def test_a_crop_begins_where_it_says_and_is_white_beyond_the_picture() -> None:
    picture = torch.arange(3 * 8 * 8).reshape(3, 8, 8).float()
    window = train_xl.crop(picture, 2, 3)
    assert torch.equal(window[:, :6, :5], picture[:, 2:, 3:])
    assert (window[:, 6:] == 255).all()
    assert (window[:, :, 5:] == 255).all()
    assert torch.equal(train_xl.crop(picture, 0, 0), picture)


def test_a_variant_says_what_was_done_to_it() -> None:
    rng = random.Random(0)
    picture = torch.rand(3, 128, 128, generator=torch.Generator().manual_seed(1)) * 255
    same, sizes = train_xl.variant(picture, soft=False, cropped=False, rng=rng)
    assert torch.equal(same, picture)
    assert sizes == [128, 128, 0, 0, 128, 128]
    for _ in range(20):
        soft, (height, width, top, left, *target) = train_xl.variant(picture, True, True, rng)
        assert 16 <= height == width <= 96
        assert 0 <= top <= 16
        assert 0 <= left <= 16
        assert target == [128, 128]
        assert soft.std() < picture.std()


def test_variants_are_encoded_with_their_sizes() -> None:
    vae = AutoencoderTiny.from_pretrained(EMOJI / "vae")
    latents, sizes = train_xl.encode_variants(vae, torch.full((2, 3, 128, 128), 200).byte())
    assert latents.shape == (2, len(train_xl.VARIANTS), 4, 16, 16)
    assert sizes.shape == (2, len(train_xl.VARIANTS), 6)
    assert sum(train_xl.KIND_SHARES.values()) == pytest.approx(1)
    assert (sizes[:, :, 0] < 128).sum() == 2 * sum(soft for soft, _ in train_xl.VARIANTS)


@torch.no_grad()
def test_the_student_begins_as_its_teacher(unet: UNet2DConditionModel) -> None:
    noisy, hidden = torch.randn(2, 4, 16, 16), torch.randn(2, 77, 128)
    condition = train_lcm.guidance_embedding(torch.tensor([2.0, 5.0]))
    student = train_lcm.student_of(unet)
    timesteps = torch.tensor([999, 19])
    taught = student(noisy, timesteps, hidden, timestep_cond=condition).sample
    assert torch.equal(taught, unet(noisy, timesteps, hidden).sample)


def test_guidance_is_embedded_as_the_pipeline_does() -> None:
    scales = torch.tensor([2.0, 3.0, 6.0])
    wanted = LatentConsistencyModelPipeline.get_guidance_scale_embedding(
        None, scales - 1, embedding_dim=train_lcm.GUIDANCE_WIDTH
    )
    torch.testing.assert_close(train_lcm.guidance_embedding(scales), wanted, atol=2e-4, rtol=0)


def test_the_student_is_taught_where_its_scheduler_samples() -> None:
    torch.manual_seed(0)
    drawn = set()
    solver = train_lcm.Solver()
    for _ in range(40):
        drawn |= set(solver.start_timesteps(16).tolist())
    assert drawn == set(range(19, 1000, 20))
    scheduler = train_lcm.scheduler()
    scheduler.set_timesteps(4)
    assert set(scheduler.timesteps.tolist()) <= drawn


def test_the_solver_steps_as_ddim() -> None:
    noisy, v = torch.randn(1, 4, 16, 16), torch.randn(1, 4, 16, 16)
    ddim = DDIMScheduler.from_config(model.scheduler().config, timestep_spacing="leading")
    ddim.set_timesteps(train_lcm.SOLVER_STEPS)
    wanted = ddim.step(v, 500, noisy).prev_sample
    solver = train_lcm.Solver()
    at, before = torch.tensor([500]), torch.tensor([480])
    torch.testing.assert_close(solver.join(*solver.split(noisy, at, v), before), wanted)


def test_the_consistency_function_is_the_schedulers() -> None:
    noisy, v = torch.randn(1, 4, 16, 16), torch.randn(1, 4, 16, 16)
    solver, scheduler = train_lcm.Solver(), train_lcm.scheduler()
    assert isinstance(scheduler, LCMScheduler)
    scheduler.set_timesteps(4)
    wanted = scheduler.step(v, scheduler.timesteps[1], noisy).denoised
    given = solver.consistent(noisy, scheduler.timesteps[1:2], v)
    torch.testing.assert_close(given, wanted)
    assert torch.equal(solver.consistent(noisy, torch.tensor([0]), v), noisy)


class Says(nn.Module):
    """A denoiser whose v means the same picture everywhere: all of one value."""

    def __init__(self, solver: train_lcm.Solver, value: float) -> None:
        super().__init__()
        self.solver, self.value = solver, value

    def forward(self, noisy: Tensor, timesteps: Tensor, *_: Tensor, **__: Tensor) -> object:
        alpha = self.solver.alpha(timesteps)
        v = (alpha.sqrt() * noisy - self.value) / (1 - alpha).sqrt()
        return SimpleNamespace(sample=v)


def test_a_consistent_student_has_no_loss_and_another_has() -> None:
    torch.manual_seed(0)
    solver = train_lcm.Solver()
    zero, one = Says(solver, 0.0), Says(solver, 1.0)
    hidden = torch.randn(8, 77, 128)
    arguments = (solver, torch.zeros(8, 4, 16, 16), hidden, torch.zeros_like(hidden))
    # The last timestep is the picture itself, with the little noise that DDIM leaves there.
    assert train_lcm.distillation_loss(zero, zero, zero, *arguments) < 0.01
    assert train_lcm.distillation_loss(one, zero, zero, *arguments) > 0.8
    assert train_lcm.distillation_loss(zero, one, zero, *arguments) > 0.8


@pytest.fixture
def own_signals() -> Iterator[None]:
    """Training takes SIGTERM for itself until its process ends."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("own_signals")
def test_training_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    def train(cpu_minutes: float) -> nn.Linear:
        torch.manual_seed(7)
        net, average = nn.Linear(2, 2), nn.Linear(2, 2)
        net.bias.requires_grad_(False)

        def loss_of(rng: random.Random) -> Tensor:
            return (net(torch.tensor([[rng.random(), 1.0]])) - 3.0).pow(2).mean()

        fit(
            net,
            average,
            loss_of,
            tmp_path / "net.pt",
            cpu_minutes=cpu_minutes,
            batch=1,
            lr=1e-2,
            average_decay=0.9,
        )
        return net

    first = train(0.002)
    state = torch.load(tmp_path / "net.pt")
    assert state["step"] == state["samples"] > 0
    assert torch.equal(state["net"]["weight"], first.weight)
    longer = state["spent_s"] / 60 + 0.002  # than the first took, on whatever machine
    train(longer)
    more = torch.load(tmp_path / "net.pt")
    assert more["step"] > state["step"]
    assert more["spent_s"] > state["spent_s"]
    assert torch.equal(more["net"]["bias"], state["net"]["bias"])  # wanted no gradient
    assert torch.equal(train(longer).weight, more["net"]["weight"])  # the budget is used up


def test_settings_are_the_models_own_unless_given(tmp_path: Path) -> None:
    own = {"num_inference_steps": 4, "guidance_scale": 3.0}
    (tmp_path / "edgesd.json").write_text(json.dumps(own))
    assert settings_of(tmp_path, None, None) == own
    assert settings_of(tmp_path, 8, None) == {"num_inference_steps": 8, "guidance_scale": 3.0}


def test_flux_is_told_the_size_and_the_tokens_it_was_trained_with(tmp_path: Path) -> None:
    own = {"num_inference_steps": 4, "guidance_scale": 0.0, "height": 128, "width": 128}
    (tmp_path / "edgesd.json").write_text(json.dumps(own))
    (tmp_path / "transformer").mkdir()
    told = own | {"max_sequence_length": 24}
    assert settings_of(tmp_path, None, None) == told
    assert settings_of(tmp_path, None, 3.5) == told | {"guidance_scale": 3.5}
