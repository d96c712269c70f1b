"""diffusers' samplers, also those that need scipy or torchsde where these aren't there."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgesd.runtime.schedulers import sampler_class
from edgesd.runtime.schedulers.brownian import BrownianPath


def _quad(f: Any, start: Any, end: Any, **_: float) -> tuple[float, float]:
    """scipy.integrate.quad of a polynomial."""
    nodes, weights = np.polynomial.legendre.leggauss(6)
    half = (float(end) - float(start)) / 2
    values = [float(f(float(start) + half * (1 + node))) for node in nodes]
    return half * float(np.dot(weights, values)), 0.0


class _Interval:
    """torchsde.BrownianInterval."""

    def __init__(self, *, t0: Any, t1: Any, size: Any, entropy: int, **_: Any) -> None:
        self._path = BrownianPath(entropy, tuple(size), float(t0), float(t1))

    def __call__(self, start: Any, end: Any) -> Any:
        import torch

        return torch.from_numpy(self._path.increment(float(start), float(end)))


def diffusers_sampler(name: str, patch: pytest.MonkeyPatch) -> Any:
    """diffusers' class of one of our names; where scipy or torchsde isn't there, with what they do
    for it: an integral of a polynomial, and a path that edgesd's own stands for."""
    import diffusers

    found = getattr(diffusers, sampler_class(name))
    if not isinstance(found, diffusers.utils.DummyObject):
        return found
    if name == "dpmpp-sde":
        patch.setitem(sys.modules, "torchsde", SimpleNamespace(BrownianInterval=_Interval))  # type: ignore[arg-type]
        module = importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde")
    else:
        module = importlib.import_module("diffusers.schedulers.scheduling_lms_discrete")
        patch.setattr(module, "integrate", SimpleNamespace(quad=_quad), raising=False)
    return getattr(module, sampler_class(name))


def round_once(patch: pytest.MonkeyPatch) -> None:
    """Make torch's functions round as IEEE 754 has it: their last bit depends on the build and on
    the processor, and much depends on it in samplers that aren't exact."""
    import torch

    for function in ("log", "exp", "__pow__"):
        exact = getattr(torch.Tensor, function)

        def rounded(x: Any, *power: Any, exact: Any = exact) -> Any:
            return exact(x.double(), *power).to(x.dtype)

        patch.setattr(torch.Tensor, function, rounded)
