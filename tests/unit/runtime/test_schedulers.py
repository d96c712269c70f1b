"""Each sampler equals diffusers' over whole loops; what can't be honoured is refused."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from edgesd.errors import InputError, UsageError
from edgesd.runtime.noise import TorchNoise
from edgesd.runtime.schedulers import (
    DIFFUSERS_CLASSES,
    SCHEDULERS,
    Scheduler,
    create_scheduler,
    sampler_of,
)
from edgesd.runtime.schedulers.flow_euler import FlowEuler

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

TOLERANCE = 1e-5  # of the largest magnitude of the sample at that step
SHAPE = (2, 4, 6, 5)
SEED = 11
STEPS = (1, 2, 4, 20, 50)
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "trailing", "linspace")
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PATTERN = np.linspace(-1.0, 1.0, int(np.prod(SHAPE))).reshape(SHAPE).astype(np.float32)
CLASSES = {name: class_name for class_name, name in DIFFUSERS_CLASSES.items()}


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
    scheduler: Scheduler, noise: Callable[[tuple[int, ...]], np.ndarray], first: int = 0
) -> tuple[list[np.ndarray], np.ndarray]:
    """The sample after each step, and the timesteps; from step `first` on, of a noisy PATTERN."""
    sample = noise(SHAPE) * np.float32(scheduler.init_noise_sigma)
    if first:
        sample = scheduler.add_noise(PATTERN, noise(SHAPE), first)
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
        trace.append(sample)
    return trace, scheduler.timesteps


def reference(
    torch: ModuleType,
    scheduler: Any,
    monkeypatch: pytest.MonkeyPatch,
    noise: Callable[[tuple[int, ...]], np.ndarray],
    first: int = 0,
) -> tuple[list[np.ndarray], np.ndarray]:
    """The same by diffusers, whose randn_tensor draws from `noise`."""
    import sys

    def draw(shape: tuple[int, ...], **_: Any) -> Any:
        return torch.from_numpy(noise(tuple(shape)))

    monkeypatch.setattr(
        sys.modules[type(scheduler).__module__], "randn_tensor", draw, raising=False
    )
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    sample = draw(SHAPE) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    if first:
        timesteps = scheduler.timesteps[first : first + 1].expand(SHAPE[0])
        noisy = getattr(scheduler, "add_noise", None) or scheduler.scale_noise
        sample = noisy(*_ordered(noisy, torch.from_numpy(PATTERN), draw(SHAPE), timesteps))
    trace = [sample.numpy()]
    for t in scheduler.timesteps[first:]:
        scaled = sample
        if hasattr(scheduler, "scale_model_input"):
            scaled = scheduler.scale_model_input(sample, t)
        output = torch.from_numpy(model(scaled.numpy(), float(t)))
        sample = scheduler.step(output, t, sample, return_dict=False)[0]
        trace.append(sample.numpy())
    return trace, scheduler.timesteps.numpy()


def _ordered(noisy: Callable[..., Any], x0: Any, noise: Any, timesteps: Any) -> tuple[Any, ...]:
    """Arguments of add_noise, or of a flow's scale_noise."""
    return (x0, timesteps, noise) if noisy.__name__ == "scale_noise" else (x0, noise, timesteps)


class Compare:
    """Runs both and asserts that they agree; keeps the largest error seen."""

    def __init__(self, torch: ModuleType, diffusers: ModuleType) -> None:
        self.torch, self.diffusers, self.worst = torch, diffusers, 0.0

    def __call__(
        self,
        name: str,
        config: Mapping[str, Any],
        steps: int,
        roundings: int = 0,
        first: int = 0,
        **timesteps: Any,
    ) -> None:
        """roundings: float32 roundings of the largest sample so far that are let pass; where
        sigma starts in the thousands, they are all that diffusers' own sums leave certain."""
        scheduler = create_scheduler(name, config)
        mine = {k: v for k, v in timesteps.items() if k in ("mu", "sigmas")}
        scheduler.set_timesteps(steps, **mine)
        theirs = getattr(self.diffusers, CLASSES[name]).from_config(dict(config))
        theirs.set_timesteps(None if "sigmas" in timesteps else steps, **timesteps)
        with pytest.MonkeyPatch.context() as patch:
            noise = TorchNoise(SEED)
            want, want_timesteps = reference(self.torch, theirs, patch, noise, first)
            left = noise((3,))
        noise = TorchNoise(SEED)
        got, got_timesteps = ours(scheduler, noise, first)
        assert got_timesteps.dtype == want_timesteps.dtype
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
    both = Compare(torch, diffusers)
    yield both
    print(f"largest relative error: {both.worst:.2e}")


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", ["ddim", "euler", "euler-a", "dpmpp-2m", "pndm", "lcm"])
def test_grid(compare: Compare, name: str, prediction: str, spacing: str, steps: int) -> None:
    if prediction == "sample" and name in ("euler-a", "pndm"):
        pytest.skip("diffusers has no such combination")
    options = {
        "prediction_type": prediction,
        "timestep_spacing": spacing,
        "steps_offset": 1,
        "skip_prk_steps": True,
        "clip_sample": False,
    }
    compare(name, SD | options, steps)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_a_loop_begins_anywhere(compare: Compare, name: str, spacing: str) -> None:
    config = {"timestep_spacing": spacing, "steps_offset": 1, "skip_prk_steps": True}
    for first in (1, 2, 3, 9):
        compare(name, SD | config | {"clip_sample": False}, 10, first=first)


BETAS = tuple(np.linspace(0.001, 0.02, 200).tolist())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *itertools.product(
            ["ddim", "euler", "euler-a", "dpmpp-2m", "pndm", "lcm"],
            [
                {},
                {"beta_schedule": "linear"},
                {"beta_schedule": "squaredcos_cap_v2"},
                {"trained_betas": BETAS, "num_train_timesteps": 200},
                {"num_train_timesteps": 437},
            ],
        ),
        *itertools.product(
            ["ddim", "lcm"],
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
            ["euler", "dpmpp-2m"],
            [
                {"use_karras_sigmas": True},
                {"use_karras_sigmas": True, "beta_schedule": "squaredcos_cap_v2"},
                {"use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 9.0},
                {"use_exponential_sigmas": True},
                {"final_sigmas_type": "sigma_min"},
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
                {"solver_order": 1},
                {"solver_type": "heun"},
                {"solver_type": "bh2"},
                {"algorithm_type": "deis", "final_sigmas_type": "sigma_min"},
                {"lower_order_final": False},
                {"lower_order_final": False, "final_sigmas_type": "sigma_min"},
                {"euler_at_final": True, "final_sigmas_type": "sigma_min"},
                {"algorithm_type": "sde-dpmsolver++"},
                {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"},
                {"algorithm_type": "sde-dpmsolver++", "solver_order": 1},
                {"use_lu_lambdas": True},
                {"lambda_min_clipped": -5.1, "beta_schedule": "squaredcos_cap_v2"},
                {"lambda_min_clipped": -1.0, "timestep_spacing": "trailing"},
                {"thresholding": True, "sample_max_value": 1.6},
            ],
        ),
    ],
)
def test_options(compare: Compare, name: str, options: dict[str, Any]) -> None:
    for steps in (5, 20):
        compare(name, SD | {"clip_sample": False} | options, steps, roundings=4)


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
        {"use_dynamic_shifting": True, "mu": 0.8},
        {"use_dynamic_shifting": True, "mu": 1.1, "time_shift_type": "linear"},
        {"use_dynamic_shifting": True, "mu": 0.8, "shift_terminal": 0.02},
        {"use_dynamic_shifting": True, "mu": 0.8, "sigmas": True},
        {"sigmas": True, "shift": 2.0},
    ],
)
def test_flow_euler(compare: Compare, options: dict[str, Any], steps: int) -> None:
    config = {k: v for k, v in options.items() if k not in ("mu", "sigmas")}
    given_: dict[str, Any] = {"mu": options["mu"]} if "mu" in options else {}
    if "sigmas" in options:
        given_["sigmas"] = np.linspace(1.0, 1.0 / steps, steps).tolist()
    if steps == 1 and options.get("shift_terminal") and not options.get("sigmas"):
        scheduler = create_scheduler("flow-euler", config)
        with pytest.raises(UsageError, match="two or more"):
            scheduler.set_timesteps(1, image_seq_len=256)
        return
    compare("flow-euler", config, steps, **given_)


def test_flow_euler_takes_its_shift_from_the_image_size() -> None:
    config = {"use_dynamic_shifting": True, "base_shift": 0.4, "max_shift": 1.3}
    scheduler = create_scheduler("flow-euler", config)
    assert isinstance(scheduler, FlowEuler)
    mu = scheduler.dynamic_shift(1024)
    assert mu == pytest.approx(0.4 + (1.3 - 0.4) * (1024 - 256) / (4096 - 256))
    scheduler.set_timesteps(4, image_seq_len=1024)
    by_size = scheduler.timesteps
    scheduler.set_timesteps(4, mu=mu)
    assert np.array_equal(by_size, scheduler.timesteps)
    with pytest.raises(UsageError, match="image_seq_len"):
        scheduler.set_timesteps(4)


@settings(max_examples=50, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(["ddim", "euler", "euler-a", "dpmpp-2m", "pndm", "lcm"]),
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
            "solver_order": st.sampled_from([1, 2]),
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
    # Left out on purpose: beta sigmas and flow in a discrete scheduler, both refused.
    for name, class_name in CLASSES.items():
        mine = create_scheduler(name, {}).config  # type: ignore[attr-defined]
        theirs = getattr(diffusers, class_name)().config
        for field in msgspec.structs.fields(type(mine)):
            if field.name in theirs:
                value = theirs[field.name]
                assert getattr(mine, field.name) == value, (name, field.name)
            else:
                assert field.name in ("sigma_min", "sigma_max", "steps_offset"), (name, field.name)


def test_every_option_that_diffusers_has_is_known(diffusers: ModuleType) -> None:
    without_effect = {
        "lcm": {"timestep_spacing", "steps_offset"},
        "dpmpp-2m": {"flow_shift", "use_dynamic_shifting", "time_shift_type"},  # of flow sigmas
    }
    for name, class_name in CLASSES.items():
        mine = create_scheduler(name, {}).config  # type: ignore[attr-defined]
        theirs = {key for key in getattr(diffusers, class_name)().config if key[0] != "_"}
        assert theirs - set(mine.__struct_fields__) <= without_effect.get(name, set())


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
        ("euler", "use_beta_sigmas", True),
        ("euler", "interpolation_type", "cubic"),
        ("euler", "final_sigmas_type", "one"),
        ("euler", "timestep_type", "odd"),
        ("euler-a", "prediction_type", "sample"),
        ("pndm", "prediction_type", "sample"),
        ("dpmpp-2m", "solver_order", 3),
        ("dpmpp-2m", "algorithm_type", "dpmsolver"),
        ("dpmpp-2m", "algorithm_type", "sde-dpmsolver"),
        ("dpmpp-2m", "solver_type", "runge"),
        ("dpmpp-2m", "use_beta_sigmas", True),
        ("dpmpp-2m", "use_flow_sigmas", True),
        ("dpmpp-2m", "variance_type", "learned_range"),
        ("lcm", "original_inference_steps", 2000),
        ("lcm", "original_inference_steps", 0),
        ("flow-euler", "use_beta_sigmas", True),
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


@pytest.mark.parametrize("name", ["euler", "dpmpp-2m", "flow-euler"])
def test_two_sigma_spacings_at_once_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="use_exponential_sigmas"):
        create_scheduler(name, {"use_karras_sigmas": True, "use_exponential_sigmas": True})


@pytest.mark.parametrize("name", ["ddim", "lcm"])
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
        scheduler = create_scheduler("flow-euler", {})
        assert isinstance(scheduler, FlowEuler)
        scheduler.set_timesteps(2, sigmas=[1.0])


@pytest.mark.parametrize(
    "options",
    [{"timestep_spacing": "trailing"}, {"timestep_spacing": "leading", "steps_offset": -1}],
)
@pytest.mark.parametrize("name", ["ddim", "euler", "euler-a", "dpmpp-2m", "pndm"])
def test_a_timestep_before_the_first_is_what_it_is_in_diffusers(
    compare: Compare, name: str, options: dict[str, Any]
) -> None:
    config = SD | {"prediction_type": "v_prediction", "clip_sample": False} | options
    scheduler = create_scheduler(name, config)
    scheduler.set_timesteps(61)
    assert scheduler.timesteps[-1] == -1 or name == "dpmpp-2m"  # which leaves it out
    compare(name, config, 61)


def test_names() -> None:
    assert sorted(SCHEDULERS) == sorted(
        ["ddim", "euler", "euler-a", "dpmpp-2m", "pndm", "lcm", "flow-euler"]
    )
    assert sampler_of("DPMSolverMultistepScheduler", {}) == "dpmpp-2m"
    with pytest.raises(UsageError, match="did you mean 'euler'"):
        create_scheduler("eular", {})


@pytest.mark.parametrize(
    ("class_name", "name"),
    [
        ("UniPCMultistepScheduler", "dpmpp-2m"),
        ("DEISMultistepScheduler", "dpmpp-2m"),
        ("HeunDiscreteScheduler", "euler"),
        ("KDPM2AncestralDiscreteScheduler", "euler-a"),
    ],
)
def test_the_nearest_sampler_stands_in_for_one_that_there_isn_t_with_a_warning(
    class_name: str, name: str, diffusers: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    config = dict(getattr(diffusers, class_name)().config) | {"_class_name": class_name}
    assert sampler_of(class_name, config) == name
    (warning,) = caplog.messages
    assert class_name in warning and f"{name}, the nearest, is used" in warning
    assert all(known in warning.partition("--scheduler takes")[2] for known in SCHEDULERS)
    create_scheduler(name, config).set_timesteps(20)


def test_a_sampler_that_doesn_t_take_the_options_stands_in_for_none() -> None:
    assert sampler_of("UniPCMultistepScheduler", {"solver_order": 3}) == "euler"
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    with pytest.raises(InputError, match=r"UniPC.*--scheduler takes ddim, dpmpp-2m, euler,"):
        sampler_of("UniPCMultistepScheduler", flow)


@pytest.mark.parametrize("class_name", ["NoSuchScheduler", "", "x" * 10**6])
def test_a_scheduler_without_a_near_one_names_what_the_option_takes(class_name: str) -> None:
    with pytest.raises(InputError) as error:
        sampler_of(class_name, {})
    assert str(error.value).endswith(f"--scheduler takes {', '.join(sorted(SCHEDULERS))}")
    assert len(str(error.value)) < 300


def test_flow_and_diffusion_are_not_mixed() -> None:
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
