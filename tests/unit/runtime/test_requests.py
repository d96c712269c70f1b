"""How a request places its steps, and what is refused of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edgesd.errors import UsageError
from edgesd.runtime.requests import CompleteRequest, Completion, Request, scheduler_of, unused
from edgesd.runtime.schedulers import DIFFUSERS_CLASSES, SCHEDULERS
from edgesd.spec.pipeline import SchedulerSpec
from tests.support import pipeline_spec

DOCS = Path(__file__).parents[3] / "docs"
SPEC = pipeline_spec()


def completed(**fields: Any) -> CompleteRequest:
    return Completion(SPEC).complete(Request("a", 1, **fields))


@pytest.mark.parametrize(
    ("fields", "steps", "first"),
    [
        ({"scheduler": "euler", "timesteps": (999, 500, 20)}, 3, 999),
        ({"scheduler": "euler", "timesteps": (999, 500, 20), "num_inference_steps": 3}, 3, 999),
        ({"scheduler": "euler", "sigmas": (9.0, 3.0, 0.0)}, 2, None),
        ({"scheduler": "lcm", "timesteps": (799,)}, 1, 799),
        ({"scheduler": "ddim", "num_inference_steps": 4, "eta": 0.5}, 4, None),
    ],
)
def test_a_list_gives_the_steps(fields: dict[str, Any], steps: int, first: int | None) -> None:
    request = completed(**fields)
    assert request.num_inference_steps == steps
    scheduler = scheduler_of(SPEC, request)
    assert scheduler.num_inference_steps == steps
    assert first is None or scheduler.timesteps[0] == first


def test_a_kind_of_sigmas_goes_before_the_bundle_s() -> None:
    def timesteps(config: dict[str, Any], sigmas: str | None) -> list[float]:
        # As a bundle's configuration lists what its model doesn't say.
        config = {**config, "_use_default_values": ["use_karras_sigmas", "use_beta_sigmas"]}
        spec = msgspec.structs.replace(SPEC, scheduler=SchedulerSpec("unipc", config))
        request = Completion(spec).complete(Request("a", 1, scheduler="euler", sigmas=sigmas))
        return [float(t) for t in scheduler_of(spec, request).timesteps]

    plain = timesteps({"_class_name": "UniPCMultistepScheduler"}, None)
    exponential = {"_class_name": "UniPCMultistepScheduler", "use_exponential_sigmas": True}
    assert timesteps(exponential, "normal") == plain != timesteps(exponential, None)
    assert timesteps(exponential, "karras") == timesteps(
        {"_class_name": "UniPCMultistepScheduler"}, "karras"
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"scheduler": "euler", "timesteps": (900, 5), "num_inference_steps": 3},
            "the list of timesteps has 2 steps, not 3: leave --steps out",
        ),
        (
            {"scheduler": "euler", "sigmas": (3.0, 0.0), "num_inference_steps": 2},
            "the list of sigmas has 1 steps, not 2",
        ),
        ({"scheduler": "ddim", "sigmas": "karras"}, "ddim has no karras sigmas"),
        ({"scheduler": "ddim", "timesteps": (900,)}, "ddim takes no list of timesteps"),
        ({"scheduler": "euler", "timesteps": (5, 900)}, "whole numbers that descend"),
        ({"scheduler": "euler", "eta": 0.3}, "euler has no eta"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        completed(**fields)
    assert "\n" not in str(caught.value)


def test_the_page_on_samplers_lists_each_with_its_class() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \|[^|]*\| (\w+)", (DOCS / "samplers.md").read_text(), re.M)
    assert sorted(name for name, _ in rows) == sorted(SCHEDULERS)
    told = {name: cls for name, cls in rows if cls != "the"}
    assert told == {name: cls for cls, name in DIFFUSERS_CLASSES.items()}


def test_a_negative_prompt_without_guidance_is_told() -> None:
    told = [*unused(SPEC, completed(negative_prompt="fog", guidance_scale=1.0))]
    assert told == ["the negative prompt isn't used: it is with --guidance above 1"]
    assert [*unused(SPEC, completed(negative_prompt="fog", guidance_scale=2.0))] == []
    assert [*unused(SPEC, completed(guidance_scale=1.0))] == []
