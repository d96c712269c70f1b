"""What a denoiser is told of timesteps, made by a network of its own."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import numpy as np
import pytest

from edgesd.errors import InputError
from edgesd.runtime.arrays import Array, Float
from edgesd.runtime.backends.fake import FakeRunner
from edgesd.runtime.conditioning import Conditioned
from edgesd.runtime.modulation import ROWS, modulated
from edgesd.spec.pipeline import (
    ComponentSpec,
    InputSpec,
    ModulationSpec,
    Part,
    TensorSpec,
    stable_diffusion,
)

POOLED = Part("encoder", "pooled")
SPEC = ComponentSpec(
    "shifts",
    (TensorSpec("timestep", "float32", ("batch",)), TensorSpec("text", "float32", ("batch", 2))),
    (TensorSpec("made", "float32", ("batch", 3)),),
)
INPUTS = (InputSpec("timestep", "timestep"), InputSpec("text", "joined", (POOLED,)))
WIRING = msgspec.structs.replace(
    stable_diffusion(), modulation=ModulationSpec(SPEC.name, INPUTS, "made")
)
TIMES = [*range(2 * ROWS + 5)]


def told(inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Depends on each row alone."""
    rows = np.concatenate([inputs["timestep"][:, None], inputs["text"]], axis=1)
    return {"made": rows * np.float32(0.5)}


def run(text: Float, last: float = 1.0) -> Float:
    """last: a factor of the last timestep's rows."""

    def network(inputs: Mapping[str, Array]) -> dict[str, Array]:
        made = told(inputs)["made"]
        made[inputs["timestep"] == TIMES[-1]] *= np.float32(last)
        return {"made": made}

    conditioned = Conditioned({POOLED: text}, {POOLED: text + 1})
    return modulated(WIRING, FakeRunner(SPEC, network), TIMES, conditioned, len(text), 1.0)


def test_rows_are_of_their_step_half_and_image() -> None:
    text = np.float32([[1, 2], [3, 4]])
    made = run(text)
    assert made.shape == (len(TIMES), 2, 2, 3)
    for half, values in enumerate((text + 1, text)):
        np.testing.assert_array_equal(made[:, half, :, 0], 0.5 * np.float32([TIMES, TIMES]).T)
        np.testing.assert_array_equal(made[:, half, :, 1:], [0.5 * values] * len(TIMES))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_none_are_told_of_the_network_that_made_them(value: float) -> None:
    text = np.ones((1, 2), np.float32)
    with pytest.raises(InputError, match=r"^shifts makes NaN or infinite values: try a bundle"):
        run(text, last=value)
    text[0, 1] = value
    with pytest.raises(InputError, match=r"^encoder makes NaN or infinite values"):
        run(text)
