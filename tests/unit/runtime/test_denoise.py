"""The one loop: guidance, its two modes, and what it refuses."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from edgesd.errors import InputError
from edgesd.runtime.arrays import Array, Float
from edgesd.runtime.backends.fake import FakeRunner
from edgesd.runtime.conditioning import Conditioned
from edgesd.runtime.denoise import Start, Step, _rescale, denoise, guidance_scale_embedding
from edgesd.runtime.flow import GuidanceMode
from edgesd.runtime.noise import BatchNoise
from edgesd.runtime.schedulers import create_scheduler
from edgesd.spec.pipeline import ComponentSpec, Part, TensorSpec, stable_diffusion

LATENT = ("batch", 4, "height", "width")
SPEC = ComponentSpec(
    "unet",
    (
        TensorSpec("sample", "float32", LATENT),
        TensorSpec("timestep", "float32", (1,)),
        TensorSpec("encoder_hidden_states", "float32", ("batch", 77, 8)),
    ),
    (TensorSpec("noise_pred", "float32", LATENT),),
)
WIRING = stable_diffusion()
STATES = Part("text_encoder", "encoder_hidden_states")


def predict(inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Depends on each input, and on each row alone."""
    text = inputs["encoder_hidden_states"].mean(axis=(1, 2))[:, None, None, None]
    return {"noise_pred": np.tanh(inputs["sample"] * 0.7 + text + inputs["timestep"] * 1e-3)}


def run(
    mode: GuidanceMode,
    batch: int = 2,
    scale: float = 4.0,
    guided: bool = True,
    rescale: float = 0.0,
) -> np.ndarray:
    rng = np.random.default_rng(1)
    positive, negative = rng.standard_normal((2, batch, 77, 8)).astype(np.float32)
    scheduler = create_scheduler("ddim", {"clip_sample": False})
    scheduler.set_timesteps(5)
    noise = BatchNoise(range(batch))
    return denoise(
        WIRING,
        {SPEC.name: FakeRunner(SPEC, predict)},
        scheduler,
        Start(noise((batch, 4, 4, 4))),
        Conditioned({STATES: positive}, {STATES: negative} if guided else None),
        scale,
        noise,
        mode=mode,
        guidance_rescale=rescale,
    )


def test_batched_and_sequential_guidance_agree() -> None:
    np.testing.assert_allclose(run("batched"), run("sequential"), rtol=0, atol=1e-6)


def test_guidance_scale_one_is_the_positive_prediction() -> None:
    plain = run("batched", guided=False)
    np.testing.assert_allclose(run("batched", scale=1.0), plain, rtol=0, atol=1e-5)
    assert not np.allclose(run("batched", scale=3.0), plain, atol=1e-2)


@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_rescaled_guidance_equals_diffusers(strength: float) -> None:
    torch = pytest.importorskip("torch")
    pipelines = pytest.importorskip(
        "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion"
    )
    rng = np.random.default_rng(2)
    guided, positive = rng.standard_normal((2, 3, 4, 5, 6)).astype(np.float32)
    guided *= np.float32([3, 1, 0.2])[:, None, None, None]
    wanted = pipelines.rescale_noise_cfg(
        torch.from_numpy(guided), torch.from_numpy(positive), strength
    )
    _rescale(guided, positive, strength)
    np.testing.assert_allclose(guided, wanted.numpy(), rtol=0, atol=1e-6)


def test_guidance_is_rescaled_in_both_modes() -> None:
    batched = run("batched", rescale=0.7)
    np.testing.assert_allclose(batched, run("sequential", rescale=0.7), rtol=0, atol=1e-6)
    assert not np.allclose(batched, run("batched"), atol=1e-3)


def test_steps_are_reported_in_order() -> None:
    seen: list[Step] = []
    scheduler = create_scheduler("euler", {})
    scheduler.set_timesteps(3)
    states = np.zeros((1, 77, 8), np.float32)
    noise = BatchNoise([0])
    runners = {SPEC.name: FakeRunner(SPEC, predict)}
    start, conditioned = Start(noise((1, 4, 4, 4))), Conditioned({STATES: states}, None)
    denoise(WIRING, runners, scheduler, start, conditioned, 1.0, noise, on_step=seen.append)
    assert [(step.index, step.count) for step in seen] == [(0, 3), (1, 3), (2, 3)]
    assert all(step.seconds >= 0 for step in seen)


def test_a_start_in_the_middle_takes_the_steps_that_are_left() -> None:
    """As an image that is changed, not made anew, takes them."""
    scheduler = create_scheduler("ddim", {"clip_sample": False})
    scheduler.set_timesteps(5)
    runner = FakeRunner(SPEC, predict)
    states = {STATES: np.zeros((1, 77, 8), np.float32)}
    steps: list[Step] = []
    after: list[int] = []

    def after_step(index: int, latents: Float) -> Float:
        after.append(index)
        return np.full_like(latents, index)

    start = Start(np.ones((1, 4, 4, 4), np.float32), first_step=3, after_step=after_step)
    conditioned, noise = Conditioned(states, None), BatchNoise([0])
    found = denoise(
        WIRING, {SPEC.name: runner}, scheduler, start, conditioned, 1.0, noise, on_step=steps.append
    )
    assert after == [3, 4] and runner.runs == 2
    assert [(step.index, step.count) for step in steps] == [(0, 2), (1, 2)]
    assert runner.inputs["timestep"][0] == scheduler.timesteps[4]
    np.testing.assert_array_equal(runner.inputs["sample"], 3)
    np.testing.assert_array_equal(found, 4)


def test_infinite_latents_are_refused_with_the_step() -> None:
    runner = FakeRunner(SPEC, lambda inputs: {"noise_pred": inputs["sample"] * np.float32(np.nan)})
    scheduler = create_scheduler("ddim", {})
    scheduler.set_timesteps(3)
    states = np.zeros((1, 77, 8), np.float32)
    noise = BatchNoise([0])
    start, conditioned = Start(noise((1, 4, 4, 4))), Conditioned({STATES: states}, None)
    with pytest.raises(InputError, match="no longer finite after step 1 of 3"):
        denoise(WIRING, {SPEC.name: runner}, scheduler, start, conditioned, 1.0, noise)


def test_binding_checks_names_and_shapes_once() -> None:
    runner = FakeRunner(SPEC, predict)
    good = {"sample": (1, 4, 4, 4), "timestep": (1,), "encoder_hidden_states": (1, 77, 8)}
    runner.bind(good)
    before = runner.inputs["sample"]
    runner.bind(good)
    assert runner.inputs["sample"] is before
    with pytest.raises(InputError, match="encoder_hidden_states has the shape"):
        runner.bind(good | {"encoder_hidden_states": (2, 77, 8)})
    with pytest.raises(InputError, match="takes the inputs"):
        runner.bind({"sample": (1, 4, 4, 4)})


@pytest.mark.integration
def test_guidance_embedding_equals_diffusers() -> None:
    torch = pytest.importorskip("torch")
    from diffusers import StableDiffusionPipeline

    expected = StableDiffusionPipeline.get_guidance_scale_embedding(
        None, torch.tensor([6.5]), embedding_dim=257
    ).numpy()
    np.testing.assert_allclose(guidance_scale_embedding(7.5, 257), expected, rtol=0, atol=5e-4)


def test_a_loop_takes_the_steps_from_its_first_to_its_last() -> None:
    seen: list[Step] = []
    scheduler = create_scheduler("pndm", {"skip_prk_steps": True})
    scheduler.set_timesteps(10)
    states = np.zeros((1, 77, 8), np.float32)
    runner, conditioned = FakeRunner(SPEC, predict), Conditioned({STATES: states}, None)
    noise = BatchNoise([0])
    whole = noise((1, 4, 4, 4))
    denoise(
        WIRING, {SPEC.name: runner}, scheduler, Start(whole, first_step=2, last_step=7),
        conditioned, 1.0, noise, on_step=seen.append,
    )  # fmt: skip
    assert [(step.index, step.count) for step in seen] == [(k, 5) for k in range(5)]
