"""Each sampler equals diffusers' over whole loops; what can't be honoured is refused."""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from edgesd.errors import InputError, UsageError
from edgesd.runtime.cut import first_of_picture
from edgesd.runtime.noise import TorchNoise
from edgesd.runtime.schedulers import (
    SCHEDULERS,
    Scheduler,
    create_scheduler,
    name_from_class,
    preset,
    sampler_class,
    spread_options,
)
from edgesd.runtime.schedulers.flow_euler import FlowEuler
from tests.samplers import diffusers_sampler, round_once

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

TOLERANCE = 1e-5  # of the largest magnitude of the sample at that step
SHAPE = (2, 4, 6, 5)
SEED = 11
STEPS = (1, 2, 4, 20, 50)
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "trailing", "linspace")
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
MASK = np.pad(np.ones(SHAPE[2:], np.float32)[:, 2:], ((0, 0), (2, 0)))
PATTERN = np.linspace(-1.0, 1.0, int(np.prod(SHAPE))).reshape(SHAPE).astype(np.float32)
CLASSES = {name: sampler_class(name) for name in SCHEDULERS}
EDM = ["edm-euler", "edm-dpmpp-2m"]
DISCRETE = sorted(set(SCHEDULERS) - {"flow-euler", "lms", "dpmpp-sde", *EDM})
"""Those that diffusers has without scipy and torchsde."""
SOLVERS = ["dpmpp-2m", "dpmpp-2s", "deis", "unipc"]
SPREADING = ["euler", "heun", "dpm2", "dpm2-a", *SOLVERS]
NO_SAMPLE = ("euler-a", "pndm", "dpm2", "dpm2-a")
"""diffusers' has no such prediction_type."""


@pytest.fixture(scope="module")
def torch() -> ModuleType:
    module = pytest.importorskip("torch")
    module.set_num_threads(1)
    return module


@pytest.fixture(scope="module")
def diffusers() -> Iterator[ModuleType]:
    module = pytest.importorskip("diffusers")
    module.utils.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield module


def model(sample: np.ndarray, timestep: float, prediction: str = "epsilon") -> np.ndarray:
    """A network stand-in that depends on the sample and on the timestep."""
    wave = np.tanh(0.6 * sample) * 0.8 + 0.3 * PATTERN * np.cos(float(timestep) / 300.0)
    return wave.astype(np.float32)


def ours(
    scheduler: Scheduler,
    noise: Callable[[tuple[int, ...]], np.ndarray],
    strength: float | None = None,
) -> tuple[list[np.ndarray], np.ndarray]:
    """The sample after each step, and the timesteps. strength: PATTERN is drawn over so much, and
    where MASK is 0 it stays."""
    drawn, first = noise(SHAPE), 0
    sample = drawn * np.float32(scheduler.init_noise_sigma)
    if strength is not None:
        first = first_of_picture(scheduler, strength)
        sample = scheduler.add_noise(PATTERN, drawn, first)
    trace = [sample]
    scheduler.begin(first)
    for i, t in enumerate(scheduler.timesteps[first:], first):
        scaled = scheduler.scale_model_input(sample, i)
        before = sample.copy()
        output = model(scaled, t)
        sample = scheduler.step(output, i, sample, noise)
        assert sample.dtype == np.float32 and sample.shape == SHAPE
        assert not np.shares_memory(sample, output)
        assert np.array_equal(trace[-1], before)
        if strength is not None:
            kept = scheduler.add_noise(PATTERN, drawn, i + 1)
            assert not np.shares_memory(kept, PATTERN)
            sample = (1 - MASK) * kept + MASK * sample
        trace.append(sample)
    return trace, scheduler.timesteps


def reference(
    torch: ModuleType,
    scheduler: Any,
    monkeypatch: pytest.MonkeyPatch,
    noise: Callable[[tuple[int, ...]], np.ndarray],
    steps: int,
    strength: float | None = None,
    **options: float,
) -> tuple[list[np.ndarray], np.ndarray]:
    """The same by diffusers, whose randn_tensor draws from `noise`. strength: as its pipeline for
    inpainting has it."""
    import diffusers

    def draw(shape: tuple[int, ...], **_: Any) -> Any:
        return torch.from_numpy(noise(tuple(shape)))

    monkeypatch.setattr(
        sys.modules[type(scheduler).__module__], "randn_tensor", draw, raising=False
    )
    timesteps, drawn = scheduler.timesteps, draw(SHAPE)
    sample = drawn * float(getattr(scheduler, "init_noise_sigma", 1.0))
    picture, mask = torch.from_numpy(PATTERN), torch.from_numpy(MASK)
    if strength is not None:
        pipeline = SimpleNamespace(scheduler=scheduler)
        get_timesteps = diffusers.StableDiffusionInpaintPipeline.get_timesteps
        timesteps, _ = get_timesteps(pipeline, steps, strength, None)
        sample = _noisy(scheduler, picture, drawn, timesteps[:1].repeat(SHAPE[0]))
    elif hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    trace = [sample.numpy()]
    for i, t in enumerate(timesteps):
        scaled = sample
        if hasattr(scheduler, "scale_model_input"):
            scaled = scheduler.scale_model_input(sample, t)
        output = torch.from_numpy(model(scaled.numpy(), float(t)))
        sample = scheduler.step(output, t, sample, return_dict=False, **options)[0]
        if strength is not None:
            kept = picture
            if i < len(timesteps) - 1:
                kept = _noisy(scheduler, picture, drawn, timesteps[i + 1 : i + 2])
            sample = (1 - mask) * kept + mask * sample
        trace.append(sample.numpy())
    return trace, scheduler.timesteps.numpy()


def _noisy(scheduler: Any, x0: Any, noise: Any, timesteps: Any) -> Any:
    """add_noise, or a flow's scale_noise."""
    if hasattr(scheduler, "add_noise"):
        return scheduler.add_noise(x0, noise, timesteps)
    return scheduler.scale_noise(x0, timesteps, noise)


class Compare:
    """Runs both and asserts that they agree; keeps the largest error seen."""

    def __init__(self, torch: ModuleType) -> None:
        self.torch, self.worst = torch, 0.0

    def __call__(self, *args: Any, **options: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            self._compare(patch, *args, **options)

    def _compare(
        self,
        patch: pytest.MonkeyPatch,
        name: str,
        config: Mapping[str, Any],
        steps: int,
        roundings: int = 0,
        strength: float | None = None,
        eta: float | None = None,
        **timesteps: Any,
    ) -> None:
        """roundings: float32 roundings of the largest sample so far that are let pass; where
        sigma starts in the thousands, they are all that diffusers' own sums leave certain."""
        if name == "tcd" and eta is None:
            eta = 0.0  # what diffusers' pipelines hand over
        scheduler = create_scheduler(name, config, eta)
        scheduler.set_timesteps(steps, **timesteps)
        cls = diffusers_sampler(name, patch)
        if not SCHEDULERS[name].exact:
            round_once(patch)
        theirs = cls.from_config(dict(config), **preset(name))
        lists = {key: list(value) for key, value in timesteps.items() if key != "image_seq_len"}
        if "image_seq_len" in timesteps:
            assert isinstance(scheduler, FlowEuler)
            lists["mu"] = scheduler.dynamic_shift(timesteps["image_seq_len"])
        theirs.set_timesteps(None if set(lists) - {"mu"} else steps, **lists)
        if name == "deis":  # whose own float32 logarithms cost up to 1.5e-5
            theirs.sigmas = theirs.sigmas.double()
        options = {} if eta is None else {"eta": eta}
        noise = TorchNoise(SEED)
        want, want_timesteps = reference(
            self.torch, theirs, patch, noise, steps, strength, **options
        )
        left = noise((3,))
        noise = TorchNoise(SEED)
        got, got_timesteps = ours(scheduler, noise, strength)
        wide = want_timesteps.dtype == np.float64  # the network gets float32 all the same
        assert got_timesteps.dtype == (np.float32 if wide else want_timesteps.dtype)
        np.testing.assert_allclose(got_timesteps, want_timesteps, rtol=1e-6, atol=2e-4)
        if hasattr(theirs, "init_noise_sigma"):
            assert scheduler.init_noise_sigma == pytest.approx(float(theirs.init_noise_sigma))
        assert len(got) == len(want)
        peak = 0.0
        for a, b in zip(got, want, strict=True):
            assert np.isfinite(b).all(), "the reference itself fails here"
            error = float(np.abs(a - b).max() / np.abs(b).max())
            self.worst = max(self.worst, error)
            peak = max(peak, float(np.abs(b).max()))
            assert error <= TOLERANCE + roundings * 2.0**-23 * peak / np.abs(b).max()
        assert np.array_equal(noise((3,)), left), "noise was drawn another number of times"


@pytest.fixture(scope="module")
def compare(torch: ModuleType, diffusers: ModuleType) -> Iterator[Compare]:
    both = Compare(torch)
    yield both
    print(f"largest relative error: {both.worst:.2e}")


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", DISCRETE)
def test_grid(compare: Compare, name: str, prediction: str, spacing: str, steps: int) -> None:
    if prediction == "sample" and name in NO_SAMPLE:
        pytest.skip("diffusers has no such combination")
    options = {
        "prediction_type": prediction,
        "timestep_spacing": spacing,
        "steps_offset": 1,
        "skip_prk_steps": True,
        "clip_sample": False,
    }
    compare(name, SD | options, steps, roundings=4 if (name, steps) == ("heun", 2) else 0)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_a_loop_begins_where_strength_says(compare: Compare, name: str, spacing: str) -> None:
    config = {"timestep_spacing": spacing, "steps_offset": 1, "skip_prk_steps": True}
    config |= {"noise_sampler_seed": 5, "clip_sample": False}
    for strength in (1.0, 0.9, 0.8, 0.3, 0.1):
        compare(name, SD | config, 10, strength=strength)
    compare(name, SD | config, 20, strength=0.05)


def test_a_strength_that_leaves_no_step_is_refused() -> None:
    for name in ("euler", "heun", "pndm"):
        scheduler = create_scheduler(name, {"skip_prk_steps": True})
        for steps in (1, 2, 3, 7, 20, 61):
            scheduler.set_timesteps(steps)
            with pytest.raises(UsageError, match="leaves no step of") as caught:
                first_of_picture(scheduler, 0.99 / steps)
            enough = float(str(caught.value).split("--strength of ")[1].split()[0])
            first = first_of_picture(scheduler, enough)
            assert first == (steps - 1) * scheduler.order
            assert first < len(scheduler.timesteps)
    cut = create_scheduler("dpmpp-2m", {"lambda_min_clipped": -1.0, "timestep_spacing": "trailing"})
    cut.set_timesteps(20)
    with pytest.raises(UsageError, match="leaves no step: scheduler dpmpp-2m has"):
        first_of_picture(cut, 0.1)


@pytest.mark.parametrize("name", ["lcm", "tcd"])
def test_steps_within_a_strength(diffusers: ModuleType, name: str) -> None:
    """As diffusers' pipeline for latent consistency models places them."""
    for steps, strength, given_ in (
        (4, 0.8, None), (4, 0.31, None), (2, 1.0, None), (50, 1.0, None), (1, 0.02, None),
        (0, 0.5, (999, 759, 499, 259)), (0, 0.3, (999, 759, 499, 259)), (0, 1.0, (900, 20)),
    ):  # fmt: skip
        theirs, scheduler = getattr(diffusers, CLASSES[name])(), create_scheduler(name, {})
        options = {"strength": strength, "timesteps": given_ and list(given_)}
        theirs.set_timesteps(None if given_ else steps, **options)
        scheduler.set_timesteps(steps, timesteps=given_, strength=strength)
        assert scheduler.timesteps.tolist() == theirs.timesteps.tolist()
        assert first_of_picture(scheduler, strength) == 0
    for steps, strength, given_ in ((26, 0.5, None), (1, 0.01, None), (0, 0.4, (900, 20))):
        with pytest.raises(UsageError, match=r"strength 0\.\d+"):
            scheduler.set_timesteps(steps, timesteps=given_, strength=strength)


BETAS = tuple(np.linspace(0.001, 0.02, 200).tolist())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *itertools.product(
            DISCRETE,
            [
                {},
                {"beta_schedule": "linear"},
                {"beta_schedule": "squaredcos_cap_v2"},
                {"trained_betas": BETAS, "num_train_timesteps": 200},
                {"num_train_timesteps": 437},
            ],
        ),
        *itertools.product(
            ["ddim", "lcm", "ddpm", "tcd"],
            [
                {"clip_sample": True, "clip_sample_range": 0.7},
                {"thresholding": True, "sample_max_value": 1.6},
                {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.0},
                {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
                {"rescale_betas_zero_snr": True, "prediction_type": "sample"},
            ],
        ),
        ("ddim", {"set_alpha_to_one": False}),
        ("ddim", {"set_alpha_to_one": False, "timestep_spacing": "trailing"}),
        ("pndm", {"set_alpha_to_one": True}),
        ("pndm", {"skip_prk_steps": True, "set_alpha_to_one": True, "steps_offset": 1}),
        ("pndm", {"skip_prk_steps": True}),
        ("pndm", {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}),
        ("pndm", {"prediction_type": "v_prediction", "timestep_spacing": "linspace"}),
        ("lcm", {"original_inference_steps": 100, "timestep_scaling": 3.0}),
        ("lcm", {"original_inference_steps": 1000}),
        *itertools.product(
            SPREADING,
            [
                {"use_karras_sigmas": True},
                {"use_karras_sigmas": True, "beta_schedule": "squaredcos_cap_v2"},
                {"use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 9.0},
                {"use_exponential_sigmas": True},
                {"use_exponential_sigmas": True, "sigma_min": 0.05, "sigma_max": 9.0},
                {"use_exponential_sigmas": True, "final_sigmas_type": "sigma_min"},
                {"final_sigmas_type": "sigma_min"},
                {
                    "rescale_betas_zero_snr": True,
                    "prediction_type": "v_prediction",
                    "timestep_spacing": "trailing",
                },
            ],
        ),
        *itertools.product(
            SOLVERS,
            [
                {"solver_order": 1},
                {"solver_order": 3},
                {"solver_order": 3, "prediction_type": "v_prediction"},
                {"solver_order": 3, "final_sigmas_type": "sigma_min"},
                {"solver_order": 3, "use_karras_sigmas": True},
                {"solver_type": "heun"},
                {"solver_type": "bh2"},
                {"solver_order": 3, "solver_type": "heun"},
                {"solver_order": 3, "lower_order_final": True},
                {"solver_order": 3, "lower_order_final": False, "final_sigmas_type": "sigma_min"},
                {"lower_order_final": False, "final_sigmas_type": "sigma_min"},
                {"thresholding": True, "sample_max_value": 1.6},
            ],
        ),
        *itertools.product(
            ["dpmpp-2m", "dpmpp-2s"],
            [
                {"algorithm_type": "sde-dpmsolver++"},
                {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"},
                {"algorithm_type": "sde-dpmsolver++", "solver_order": 1},
                {"algorithm_type": "sde-dpmsolver++", "solver_order": 3},
                {
                    "algorithm_type": "sde-dpmsolver++",
                    "solver_order": 3,
                    "solver_type": "heun",
                    "final_sigmas_type": "sigma_min",
                },
                {"lambda_min_clipped": -5.1, "beta_schedule": "squaredcos_cap_v2"},
                {"lambda_min_clipped": -1.0, "timestep_spacing": "trailing"},
            ],
        ),
        *itertools.product(
            ["unipc"],
            [
                {"solver_type": "bh1", "final_sigmas_type": "sigma_min"},
                {"solver_type": "bh1", "final_sigmas_type": "sigma_min", "solver_order": 3},
                {"predict_x0": False, "final_sigmas_type": "sigma_min"},
                {"predict_x0": False, "final_sigmas_type": "sigma_min", "solver_order": 3},
                {
                    "predict_x0": False,
                    "final_sigmas_type": "sigma_min",
                    "prediction_type": "v_prediction",
                    "thresholding": True,
                },
                {"disable_corrector": [0, 2, 3]},
                {"solver_order": 1, "lower_order_final": False},
            ],
        ),
        *itertools.product(
            ["ddpm"],
            [
                {"variance_type": "fixed_small_log"},
                {"variance_type": "fixed_large"},
                {"beta_schedule": "laplace"},
                {"beta_schedule": "sigmoid"},
                {"timestep_spacing": "trailing", "num_train_timesteps": 437},
            ],
        ),
        ("heun", {"beta_schedule": "exp"}),
        ("heun", {"clip_sample": True, "clip_sample_range": 0.7}),
        ("tcd", {"original_inference_steps": 100}),
        *itertools.product(
            ["euler", "dpmpp-2m"],
            [
                {
                    "rescale_betas_zero_snr": True,
                    "prediction_type": "v_prediction",
                    "timestep_spacing": "trailing",
                },
            ],
        ),
        ("euler", {"interpolation_type": "log_linear"}),
        ("euler", {"interpolation_type": "log_linear", "use_karras_sigmas": True}),
        ("euler", {"prediction_type": "original_sample"}),
        (
            "euler",
            {
                "timestep_type": "continuous",
                "prediction_type": "v_prediction",
                "use_karras_sigmas": True,
                "sigma_min": 0.002,
                "sigma_max": 700.0,
            },
        ),
        *itertools.product(
            ["dpmpp-2m"],
            [
                {"algorithm_type": "deis", "final_sigmas_type": "sigma_min"},
                {"lower_order_final": False},
                {"euler_at_final": True, "final_sigmas_type": "sigma_min"},
                {"use_lu_lambdas": True},
                {"use_lu_lambdas": True, "use_exponential_sigmas": True},
            ],
        ),
    ],
)
def test_options(compare: Compare, name: str, options: dict[str, Any]) -> None:
    if name == "dpm2-a" and options == {"beta_schedule": "squaredcos_cap_v2"}:
        with pytest.raises(UsageError, match="use fewer steps"):  # no number in diffusers either
            compare(name, SD | options, 5)
        return
    for steps in (5, 20):
        compare(name, SD | {"clip_sample": False} | options, steps, roundings=4)
    strength = 1.0 if "lambda_min_clipped" in options else 0.6  # which leaves out early steps
    compare(name, SD | {"clip_sample": False} | options, 10, roundings=4, strength=strength)


@pytest.mark.parametrize("name", ["euler", "euler-a", "dpmpp-2m"])
def test_epsilon_with_next_to_no_signal(compare: Compare, name: str) -> None:
    # The first step takes the sample from a sigma of 4096 down to 30 or so: rounding shows.
    config = SD | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    compare(name, config, 20)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shift": 3.0},
        {"shift": 0.5, "num_train_timesteps": 500},
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True, "shift": 3.0},
        {"invert_sigmas": True},
        {"stochastic_sampling": True},
        {"shift_terminal": 0.1},
        {"use_dynamic_shifting": True, "image_seq_len": 800},
        {"use_dynamic_shifting": True, "image_seq_len": 900, "time_shift_type": "linear"},
        {"use_dynamic_shifting": True, "image_seq_len": 256, "shift_terminal": 0.02},
        {"use_dynamic_shifting": True, "image_seq_len": 800, "sigmas": True},
        {"sigmas": True, "shift": 2.0},
    ],
)
def test_flow_euler(compare: Compare, options: dict[str, Any], steps: int) -> None:
    config = {k: v for k, v in options.items() if k not in ("image_seq_len", "sigmas")}
    given_ = {k: v for k, v in options.items() if k == "image_seq_len"}
    if "sigmas" in options:
        given_["sigmas"] = np.linspace(1.0, 1.0 / steps, steps).tolist()
    if steps == 1 and options.get("shift_terminal") and not options.get("sigmas"):
        scheduler = create_scheduler("flow-euler", config)
        with pytest.raises(UsageError, match="two or more"):
            scheduler.set_timesteps(1, image_seq_len=256)
        return
    compare("flow-euler", config, steps, **given_)
    compare("flow-euler", config, steps, strength=1.0 if steps == 1 else 0.5, **given_)


def test_flow_euler_takes_its_shift_from_the_image_size() -> None:
    config = {"use_dynamic_shifting": True, "base_shift": 0.4, "max_shift": 1.3}
    scheduler = create_scheduler("flow-euler", config)
    assert isinstance(scheduler, FlowEuler)
    mu = scheduler.dynamic_shift(1024)
    assert mu == pytest.approx(0.4 + (1.3 - 0.4) * (1024 - 256) / (4096 - 256))
    with pytest.raises(UsageError, match="image_seq_len"):
        scheduler.set_timesteps(4)


MORE_PACKAGES = [
    *itertools.product(
        ["lms", "dpmpp-sde"],
        [
            {},
            {"prediction_type": "v_prediction"},
            {"timestep_spacing": "leading", "steps_offset": 1},
            {"timestep_spacing": "trailing"},
            {"use_karras_sigmas": True},
            {"use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 9.0},
            {"use_exponential_sigmas": True, "sigma_min": 0.05, "sigma_max": 9.0},
            {"num_train_timesteps": 437, "beta_schedule": "squaredcos_cap_v2"},
        ],
    ),
    *itertools.product(
        [*SPREADING, "lms", "dpmpp-sde"],
        [{"use_beta_sigmas": True}, {"use_beta_sigmas": True, "sigma_min": 0.05, "sigma_max": 9.0}],
    ),
    ("flow-euler", {"use_beta_sigmas": True}),
]
"""Cases for which diffusers needs scipy, or torchsde."""
RECORDED = Path(__file__).parents[2] / "golden" / "samplers.npz"
"""What diffusers 0.42.1 with scipy 1.17.1 and torchsde 0.2.6 makes of each in 7 steps, by index."""


def _case(name: str, options: dict[str, Any]) -> dict[str, Any]:
    if name == "flow-euler":
        return options
    return SD | {"noise_sampler_seed": 5} | options


@pytest.mark.parametrize(("name", "options"), MORE_PACKAGES)
def test_what_needs_more_packages_in_diffusers(
    compare: Compare, name: str, options: dict[str, Any]
) -> None:
    if "use_beta_sigmas" in options:
        pytest.importorskip("scipy")
    for steps in (1, 2, 7, 20):
        compare(name, _case(name, options), steps, roundings=4)


@pytest.mark.parametrize("case", range(len(MORE_PACKAGES)))
def test_what_needs_more_packages_is_as_recorded(case: int) -> None:
    name, options = MORE_PACKAGES[case]
    scheduler = create_scheduler(name, _case(name, options))
    scheduler.set_timesteps(7)
    trace, _ = ours(scheduler, TorchNoise(SEED))
    with np.load(RECORDED) as recorded:
        want = recorded[str(case)]
    assert np.abs(trace[-1] - want).max() <= 2 * TOLERANCE * np.abs(want).max()


@settings(max_examples=50, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(DISCRETE),
    source=st.sampled_from([*CLASSES.values(), "UniPCMultistepScheduler", None]),
    steps=st.integers(1, 60),
    config=st.fixed_dictionaries(
        {},
        optional={
            "num_train_timesteps": st.integers(60, 1200),
            "beta_start": st.floats(1e-4, 1e-3),
            "beta_end": st.floats(0.01, 0.02),
            # squaredcos_cap_v2 is in test_options: its alphas_cumprod of 1e-9 makes x_0 so large
            # that a clipped one is rounding noise in diffusers too.
            "beta_schedule": st.sampled_from(["linear", "scaled_linear"]),
            "prediction_type": st.sampled_from(PREDICTIONS),
            "timestep_spacing": st.sampled_from(SPACINGS),
            "steps_offset": st.integers(0, 2),
            "clip_sample": st.booleans(),
            "clip_sample_range": st.floats(0.5, 3.0),
            "set_alpha_to_one": st.booleans(),
            "thresholding": st.booleans(),
            "sample_max_value": st.floats(1.0, 3.0),
            "use_karras_sigmas": st.booleans(),
            # Exponential sigmas are in test_options: their first timestep is truncated, at a whole
            # number but for the last bit of torch's roots, which differs between builds.
            "solver_order": st.sampled_from([1, 2, 3]),
            "predict_x0": st.booleans(),
            "variance_type": st.sampled_from([None, "fixed_small", "fixed_large", "learned"]),
            "solver_type": st.sampled_from(["midpoint", "heun", "bh1", "bh2"]),
            "algorithm_type": st.sampled_from(["dpmsolver++", "sde-dpmsolver++"]),
            "lower_order_final": st.booleans(),
            "euler_at_final": st.booleans(),
            "final_sigmas_type": st.sampled_from(["zero", "sigma_min"]),
            "skip_prk_steps": st.booleans(),
            "original_inference_steps": st.integers(20, 60),
            "timestep_scaling": st.floats(1.0, 12.0),
            "interpolation_type": st.sampled_from(["linear", "log_linear"]),
            "some_option_of_another_class": st.integers(),
        },
    ),
)
def test_any_config(
    compare: Compare, name: str, source: str | None, steps: int, config: dict[str, Any]
) -> None:
    assume(source is None or not source.startswith("FlowMatch"))
    given_ = config if source is None else config | {"_class_name": source}
    try:
        scheduler = create_scheduler(name, given_)
        scheduler.set_timesteps(steps)
    except (InputError, UsageError) as error:
        assert "\n" not in str(error)
        return
    assume(len(set(scheduler.timesteps.tolist())) > len(scheduler.timesteps) - 13)
    compare(name, given_, steps, roundings=4)


def test_defaults_are_those_of_the_class(diffusers: ModuleType) -> None:
    for name, class_name in CLASSES.items():
        if isinstance(getattr(diffusers, class_name), diffusers.utils.DummyObject):
            continue
        mine = create_scheduler(name, {}).config  # type: ignore[attr-defined]
        theirs = dict(getattr(diffusers, class_name)().config) | preset(name)
        for field in msgspec.structs.fields(type(mine)):
            if field.name in theirs:
                value = theirs[field.name]
                value = tuple(value) if isinstance(value, list) else value
                assert getattr(mine, field.name) == value, (name, field.name)
            else:
                assert field.name in ("sigma_min", "sigma_max", "steps_offset"), (name, field.name)


def test_every_option_that_diffusers_has_is_known(diffusers: ModuleType) -> None:
    without_effect = {
        "lcm": {"timestep_spacing", "steps_offset"},
        "tcd": {
            "timestep_spacing", "steps_offset", "timestep_scaling", "set_alpha_to_one",
            "clip_sample", "clip_sample_range",
        },
    }  # fmt: skip
    of_flow_sigmas = {"flow_shift", "use_dynamic_shifting", "time_shift_type"}
    for name, class_name in CLASSES.items():
        if isinstance(getattr(diffusers, class_name), diffusers.utils.DummyObject):
            continue
        mine = create_scheduler(name, {}).config  # type: ignore[attr-defined]
        theirs = {key for key in getattr(diffusers, class_name)().config if key[0] != "_"}
        allowed = without_effect.get(name, set())
        if "use_flow_sigmas" in theirs:
            allowed = allowed | of_flow_sigmas
        assert theirs - set(mine.__struct_fields__) <= allowed, name


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("ddim", "prediction_type", "flow_prediction"),
        ("ddim", "timestep_spacing", "uneven"),
        ("ddim", "beta_schedule", "sigmoid"),
        ("ddim", "clip_sample", "yes"),
        ("ddim", "num_train_timesteps", 0),
        ("ddim", "num_train_timesteps", "many"),
        ("ddim", "beta_end", 2.0),
        ("ddim", "beta_start", -1.0),
        ("ddim", "trained_betas", [0.1, 0.2]),
        ("ddim", "dynamic_thresholding_ratio", 1.5),
        ("euler", "interpolation_type", "cubic"),
        ("euler", "final_sigmas_type", "one"),
        ("euler", "timestep_type", "odd"),
        ("euler-a", "prediction_type", "sample"),
        ("pndm", "prediction_type", "sample"),
        ("dpmpp-2m", "solver_order", 4),
        ("unipc", "solver_order", 0),
        ("dpmpp-2m", "algorithm_type", "dpmsolver"),
        ("dpmpp-2m", "algorithm_type", "sde-dpmsolver"),
        ("dpmpp-2m", "solver_type", "runge"),
        ("dpmpp-2s", "algorithm_type", "dpmsolver"),
        *((name, "use_flow_sigmas", True) for name in SOLVERS),
        *((name, "prediction_type", "flow_prediction") for name in SOLVERS),
        ("deis", "algorithm_type", "unipc"),
        ("unipc", "solver_type", "bh3"),
        ("unipc", "solver_type", "bh1"),
        ("unipc", "predict_x0", False),
        ("unipc", "lower_order_final", False),
        ("unipc", "solver_p", {"_class_name": "DDIMScheduler"}),
        ("ddpm", "variance_type", "learned_range"),
        ("ddpm", "variance_type", "fixed_large_log"),
        ("ddpm", "beta_schedule", "exp"),
        ("heun", "beta_schedule", "laplace"),
        ("dpmpp-sde", "prediction_type", "sample"),
        ("tcd", "original_inference_steps", 0),
        ("edm-euler", "prediction_type", "sample"),
        ("edm-euler", "sigma_max", 0.001),
        ("edm-euler", "sigma_data", 0.0),
        ("edm-dpmpp-2m", "solver_order", 4),
        ("edm-dpmpp-2m", "algorithm_type", "dpmsolver"),
        ("dpmpp-2m", "variance_type", "learned_range"),
        ("lcm", "original_inference_steps", 2000),
        ("lcm", "original_inference_steps", 0),
        ("dpmpp-sde", "noise_sampler_seed", -1),
        ("flow-euler", "time_shift_type", "cubic"),
        ("flow-euler", "shift", 0.0),
        ("flow-euler", "shift_terminal", 1.0),
        ("flow-euler", "num_train_timesteps", 0),
    ],
)
def test_unsupported_options_are_refused_by_name(name: str, option: str, value: Any) -> None:
    options: dict[str, Any] = {option: value}
    if option == "dynamic_thresholding_ratio":
        options["thresholding"] = True
    with pytest.raises(InputError) as caught:
        create_scheduler(name, options)
    message = str(caught.value)
    assert option in message and "\n" not in message and "expected" in message.lower()


@pytest.mark.parametrize("name", [name for name, cls in SCHEDULERS.items() if cls.spreads])
def test_two_sigma_spacings_at_once_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="use_exponential_sigmas"):
        create_scheduler(name, {"use_karras_sigmas": True, "use_exponential_sigmas": True})


@pytest.mark.parametrize("name", ["ddim", "lcm", "ddpm", "tcd"])
def test_epsilon_without_any_signal_is_refused(name: str) -> None:
    config = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    scheduler = create_scheduler(name, SD | config)
    with pytest.raises(InputError, match="prediction_type"):
        scheduler.set_timesteps(4)


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
@pytest.mark.parametrize("steps", [0, -3, 1001])
def test_bad_step_counts(name: str, steps: int) -> None:
    with pytest.raises(UsageError, match=f"num_inference_steps is {steps}"):
        create_scheduler(name, {}).set_timesteps(steps)


def test_step_counts_that_a_schedule_cannot_make() -> None:
    with pytest.raises(UsageError, match="4 or more"):
        create_scheduler("pndm", {}).set_timesteps(3)
    with pytest.raises(UsageError, match="original_inference_steps"):
        create_scheduler("lcm", {}).set_timesteps(51)
    with pytest.raises(UsageError, match="steps_offset"):
        create_scheduler("ddim", {"steps_offset": 1}).set_timesteps(1000)
    with pytest.raises(UsageError, match="fewer"):
        create_scheduler("dpmpp-2m", {"timestep_spacing": "leading"}).set_timesteps(1000)
    with pytest.raises(UsageError, match="inside"):
        create_scheduler("flow-euler", {}).set_timesteps(sigmas=[1.5])


@pytest.mark.parametrize(
    "options",
    [{"timestep_spacing": "trailing"}, {"timestep_spacing": "leading", "steps_offset": -1}],
)
@pytest.mark.parametrize("name", sorted(set(DISCRETE) - {"lcm", "tcd"}))
def test_a_timestep_before_the_first_is_what_it_is_in_diffusers(
    compare: Compare, name: str, options: dict[str, Any]
) -> None:
    config = SD | {"prediction_type": "v_prediction", "clip_sample": False} | options
    scheduler = create_scheduler(name, config)
    scheduler.set_timesteps(61)
    assert scheduler.timesteps[-1] == -1 or scheduler.name in SOLVERS  # which leave it out
    compare(name, config, 61)


def test_names() -> None:
    assert name_from_class("DPMSolverMultistepScheduler") == "dpmpp-2m"
    assert name_from_class("DDIMParallelScheduler") == "ddim"
    with pytest.raises(UsageError, match="did you mean 'euler'"):
        create_scheduler("eular", {})


@pytest.mark.parametrize(
    ("name", "order", "algorithm"),
    [("dpmpp-2m-sde", 2, "sde-dpmsolver++"), ("dpmpp-3m-sde", 3, "sde-dpmsolver++")],
)
def test_a_name_may_stand_for_options(name: str, order: int, algorithm: str) -> None:
    config = create_scheduler(name, {"solver_order": 1}).config  # type: ignore[attr-defined]
    assert (config.solver_order, config.algorithm_type) == (order, algorithm)


@pytest.mark.parametrize("class_name", ["KarrasVeScheduler", "", "x" * 10**6])
def test_an_unknown_scheduler_names_what_the_option_takes(class_name: str) -> None:
    with pytest.raises(InputError) as error:
        name_from_class(class_name)
    assert str(error.value).endswith(f"--scheduler takes {', '.join(sorted(SCHEDULERS))}")
    assert len(str(error.value)) < 350


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("name", ["ddim", "tcd"])
def test_eta_draws_noise_as_in_diffusers(compare: Compare, name: str, eta: float) -> None:
    for prediction in PREDICTIONS:
        for steps in (1, 4, 20):
            config = SD | {"clip_sample": False, "prediction_type": prediction}
            compare(name, config, steps, eta=eta)
        compare(name, config, 10, eta=eta, strength=0.6)


def test_eta_is_refused_where_there_is_none() -> None:
    with pytest.raises(UsageError, match="euler has no eta; these have: ddim, tcd"):
        create_scheduler("euler", {}, 0.5)
    with pytest.raises(UsageError, match="expected 0 to 1"):
        create_scheduler("ddim", {}, 1.5)


@pytest.mark.parametrize("timesteps", [(999,), (999, 759, 499, 259), (800, 600, 300, 100, 20, 0)])
@pytest.mark.parametrize("name", [n for n in DISCRETE if "timesteps" in SCHEDULERS[n].takes])
def test_a_list_of_timesteps(compare: Compare, name: str, timesteps: tuple[int, ...]) -> None:
    for strength in (None, 1.0, 0.8):
        if strength is None or int(strength * len(timesteps)):
            config = SD | {"clip_sample": False}
            options = {"roundings": 4, "strength": strength, "timesteps": timesteps}
            compare(name, config, len(timesteps), **options)


@pytest.mark.parametrize("sigmas", [(14.6, 0.0), (14.615, 6.315, 3.771, 2.181, 0.862, 0.38, 0.03)])
def test_a_list_of_sigmas(compare: Compare, sigmas: tuple[float, ...]) -> None:
    compare("euler", SD, len(sigmas) - 1, roundings=4, sigmas=sigmas)
    strength = 1.0 if len(sigmas) == 2 else 0.5
    compare("euler", SD, len(sigmas) - 1, roundings=4, strength=strength, sigmas=sigmas)


def test_lists_that_are_refused() -> None:
    for name in SCHEDULERS:
        for option in ("timesteps", "sigmas"):
            given_: dict[str, Any] = {option: (900, 500)}
            scheduler = create_scheduler(name, {})
            if option in scheduler.takes:
                continue
            with pytest.raises(UsageError, match=f"{scheduler.name} takes no list of {option}"):
                scheduler.set_timesteps(**given_)
    scheduler = create_scheduler("euler", {})
    with pytest.raises(UsageError, match="not both"):
        scheduler.set_timesteps(timesteps=(900,), sigmas=(3.0, 0.0))
    for timesteps in ((), (900, 900), (5, 900), (1000,), (900, -1), (2.5,), (float("nan"),)):
        with pytest.raises(UsageError, match=r"timesteps|num_inference_steps"):
            scheduler.set_timesteps(timesteps=timesteps)  # type: ignore[arg-type]
    for sigmas in ((), (3.0,), (3.0, 3.0), (1.0, 3.0), (3.0, -1.0), (float("inf"), 1.0)):
        with pytest.raises(UsageError, match=r"sigmas|num_inference_steps"):
            scheduler.set_timesteps(sigmas=sigmas)
    spread = create_scheduler("euler", {"use_karras_sigmas": True})
    with pytest.raises(UsageError, match="not both"):
        spread.set_timesteps(timesteps=(900, 500))


def test_kinds_of_sigmas() -> None:
    options = spread_options("euler", "karras")
    assert [key for key, on in options.items() if on] == ["use_karras_sigmas"]
    assert not any(spread_options("euler", "normal").values())
    with pytest.raises(UsageError, match="did you mean 'karras'"):
        spread_options("euler", "karas")
    with pytest.raises(
        UsageError, match=r"ddim has no beta sigmas; these have: deis, dpm2, dpm2-a,"
    ):
        spread_options("ddim", "beta")


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prediction_type": "v_prediction"},
        {"sigma_min": 0.01, "sigma_max": 120.0, "sigma_data": 0.7, "rho": 5.0},
        {"sigma_schedule": "exponential"},
        {"final_sigmas_type": "sigma_min"},
        {"solver_order": 1, "final_sigmas_type": "sigma_min"},
        {"solver_order": 3},
        {"solver_type": "heun"},
        {"algorithm_type": "sde-dpmsolver++"},
        {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"},
        {"lower_order_final": False, "solver_order": 3},
        {"euler_at_final": True, "final_sigmas_type": "sigma_min"},
        {"thresholding": True, "sample_max_value": 1.6},
    ],
)
@pytest.mark.parametrize("name", EDM)
def test_models_with_preconditioning_of_their_own(
    compare: Compare, name: str, options: dict[str, Any], steps: int
) -> None:
    config = {"_class_name": CLASSES[name]} | options
    compare(name, config, steps, roundings=4)
    compare(name, config, steps, roundings=4, strength=1.0 if steps == 1 else 0.5)


def test_processes_are_not_mixed() -> None:
    with pytest.raises(InputError, match="expected edm-dpmpp-2m, edm-euler"):
        create_scheduler("euler", {"_class_name": "EDMEulerScheduler"})
    with pytest.raises(InputError, match="edm-euler doesn't fit"):
        create_scheduler("edm-euler", {"_class_name": "EulerDiscreteScheduler"})
    with pytest.raises(InputError, match="flow"):
        create_scheduler("ddim", {"_class_name": "FlowMatchEulerDiscreteScheduler"})
    with pytest.raises(InputError, match="flow"):
        create_scheduler("flow-euler", {"_class_name": "DDIMScheduler"})


def test_null_and_default_values_take_the_defaults() -> None:
    config = {
        "lambda_min_clipped": None,
        "use_karras_sigmas": None,
        "trained_betas": None,
        "beta_start": 0.5,
        "_use_default_values": ["beta_start"],
    }
    scheduler = create_scheduler("dpmpp-2m", config)
    assert scheduler.config == create_scheduler("dpmpp-2m", {}).config  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_a_second_loop_equals_the_first(name: str) -> None:
    scheduler = create_scheduler(name, {})
    scheduler.set_timesteps(5)
    first, _ = ours(scheduler, TorchNoise(1))
    second, _ = ours(scheduler, TorchNoise(1))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_outputs_may_be_half_precision_and_reuse_a_buffer(name: str) -> None:
    scheduler = create_scheduler(name, {"clip_sample": False})
    scheduler.set_timesteps(6)
    buffer = np.empty(SHAPE, np.float16)
    traces = []
    for shared in (False, True):
        noise = TorchNoise(3)
        sample = noise(SHAPE)
        scheduler.begin()
        for i, t in enumerate(scheduler.timesteps):
            output = model(sample, t).astype(np.float16)
            if shared:
                buffer[...] = output
                output = buffer
            else:
                output = output.astype(np.float32)
            sample = scheduler.step(output, i, sample, noise)
            buffer[...] = np.nan
        traces.append(sample)
    assert traces[1].dtype == np.float32
    assert np.array_equal(*traces)


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_the_scaled_input_goes_where_it_is_wanted(name: str) -> None:
    scheduler = create_scheduler(name, {})
    scheduler.set_timesteps(4)
    sample = TorchNoise(0)(SHAPE)
    for dtype in (np.float32, np.float16):
        out = np.empty(SHAPE, dtype)
        assert scheduler.scale_model_input(sample, 1, out=out) is out
        assert np.array_equal(out, scheduler.scale_model_input(sample, 1).astype(dtype))
