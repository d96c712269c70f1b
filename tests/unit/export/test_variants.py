"""What tells the kind of a model, and what follows for steps, guidance, sampler and schedule."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

from safetensors.numpy import save_file

from edgesd.export.families import ExportSpec
from edgesd.export.own_pipeline import check_own_pipeline
from edgesd.export.pipeline import export_spec
from edgesd.export.source import resolve_source
from edgesd.export.tokenizer import write_tokenizer
from edgesd.runtime.schedulers import create_scheduler
from edgesd.runtime.tokenizer import PromptTokenizer
from edgesd.spec.build import Variant
from tests.models import WEIGHTS, write_configs
from tests.support import assert_refused, run_cli

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("one_thread")]

EULER, ANCESTRAL = "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"
LCM_CLASS = "LatentConsistencyModelPipeline"
ZERO_SNR = {
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}
GUIDED = {"time_cond_proj_dim": 16}


def scheduled(class_name: str, **options: Any) -> dict[str, dict[str, Any]]:
    return {
        "index": {"scheduler": ["diffusers", class_name]},
        "scheduler_": {"_class_name": class_name, "beta_schedule": "scaled_linear", **options},
    }


def exported(
    folder: Path, variant: Variant | None = None, scheduler: str | None = None
) -> ExportSpec:
    """The export spec of a model, held to diffusers' own pipeline."""
    export = export_spec(replace(resolve_source(folder), variant=variant), None, scheduler)
    files = write_tokenizer(folder / "tokenizer", folder / "written", 77)
    check_own_pipeline(export, {"tokenizer": PromptTokenizer(*files.values())})
    return export


def found(export: ExportSpec) -> tuple[str, int, float]:
    pipeline = export.pipeline
    return pipeline.scheduler.name, pipeline.num_inference_steps, pipeline.guidance_scale


@pytest.mark.parametrize(
    ("changes", "expected", "words"),
    [
        (
            scheduled(EULER),
            ("euler", 20, 7.5),
            "base, as nothing says otherwise: 20 steps, guidance 7.5; if it was distilled",
        ),
        (
            scheduled(EULER, timestep_spacing="trailing"),
            ("euler", 4, 1.0),
            "turbo, as its EulerDiscreteScheduler begins with the last timestep: 4 steps, "
            "no guidance; --variant base|lightning|lcm",
        ),
        (
            scheduled(ANCESTRAL, timestep_spacing="trailing"),
            ("euler-a", 4, 1.0),
            "turbo, as its",
        ),
        (scheduled(EULER, **ZERO_SNR), ("euler", 20, 7.5), "base, as nothing"),
        (scheduled("DDIMScheduler", **ZERO_SNR), ("ddim", 20, 7.5), "base, as nothing"),
        (scheduled("LCMScheduler"), ("lcm", 4, 1.0), "lcm, as it has a LCMScheduler"),
        (scheduled("LCMScheduler") | {"unet": GUIDED}, ("lcm", 4, 7.5), "lcm, as it"),
        (
            {**scheduled("LCMScheduler"), "unet": GUIDED}
            | {"index": {"scheduler": ["diffusers", "LCMScheduler"], "_class_name": LCM_CLASS}},
            ("lcm", 4, 8.5),
            f"lcm, as it has a {LCM_CLASS}",
        ),
    ],
    ids=["base", "sd-turbo", "xl-turbo", "zero-snr", "zero-snr-ddim", "lcm-lora", "lcm", "lcm-own"],
)
def test_what_a_model_tells(
    changes: dict[str, dict[str, Any]],
    expected: tuple[str, int, float],
    words: str,
    tmp_path: Path,
) -> None:
    export = exported(write_configs(tmp_path / "model", **changes))
    assert found(export) == expected
    assert words in export.assumed and "\n" not in export.assumed


@pytest.mark.parametrize(
    ("variant", "changes", "expected", "options"),
    [
        # A single file of SD-Turbo is taken for Stable Diffusion 2.1, which predicts v.
        (
            "turbo",
            scheduled("PNDMScheduler", prediction_type="v_prediction", steps_offset=1),
            ("euler", 4, 1.0),
            {"prediction_type": "epsilon", "timestep_spacing": "trailing"},
        ),
        ("turbo", scheduled(ANCESTRAL), ("euler-a", 4, 1.0), {"timestep_spacing": "trailing"}),
        (
            "lightning",
            scheduled(EULER, prediction_type="sample"),
            ("euler", 4, 1.0),
            {"prediction_type": "sample", "timestep_spacing": "trailing"},
        ),
        (
            "lightning",
            scheduled("DDIMScheduler", prediction_type="epsilon"),
            ("ddim", 4, 1.0),
            {"timestep_spacing": "trailing"},
        ),
        ("lcm", scheduled("PNDMScheduler"), ("lcm", 4, 1.0), {}),
        ("lcm", scheduled("DDIMScheduler") | {"unet": GUIDED}, ("lcm", 4, 7.5), {}),
        (
            "base",
            scheduled(EULER, timestep_spacing="trailing"),
            ("euler", 20, 7.5),
            {"timestep_spacing": "trailing"},
        ),
    ],
)
def test_what_the_user_says_decides(
    variant: Variant,
    changes: dict[str, dict[str, Any]],
    expected: tuple[str, int, float],
    options: dict[str, Any],
    tmp_path: Path,
) -> None:
    """The gate runs diffusers' own pipeline with the same schedule."""
    folder = write_configs(tmp_path / "model", **changes)
    export = exported(folder, variant)
    assert found(export) == expected
    config = export.pipeline.scheduler.config
    assert {name: config[name] for name in options} == options
    scheduler = create_scheduler(expected[0], config)
    scheduler.set_timesteps(expected[1])
    if options.get("timestep_spacing") == "trailing":
        assert scheduler.timesteps[0] == 999
    # What edgesd.json says is the same, and the user is heard before it.
    (folder / "edgesd.json").write_text(json.dumps({"variant": variant}))
    again = exported(folder)
    assert again.pipeline.scheduler == export.pipeline.scheduler and found(again) == expected


def test_another_sampler_has_the_schedule_of_the_kind(tmp_path: Path) -> None:
    folder = write_configs(tmp_path / "model", **scheduled("PNDMScheduler"))
    export = exported(folder, "turbo", "dpmpp-2m")
    assert found(export) == ("dpmpp-2m", 4, 1.0)
    assert export.pipeline.scheduler.config["timestep_spacing"] == "trailing"


def test_figures_of_the_model_go_before_those_of_its_kind(tmp_path: Path) -> None:
    folder = write_configs(tmp_path / "model", **scheduled(EULER))
    hints = {"num_inference_steps": 8, "guidance_scale": 2.0, "variant": "lightning"}
    (folder / "edgesd.json").write_text(json.dumps(hints))
    export = exported(folder)
    assert found(export) == ("euler", 8, 2.0) and not export.assumed
    assert found(exported(folder, "lightning")) == ("euler", 8, 2.0)
    # They are of a Lightning model, and the user says that it is none.
    assert found(exported(folder, "base")) == ("euler", 20, 7.5)
    (folder / "edgesd.json").write_text('{"num_inference_steps": 8}')
    export = exported(folder)
    assert found(export) == ("euler", 8, 7.5)
    assert "8 steps, guidance 7.5; if it was distilled" in export.assumed


@pytest.mark.parametrize("name", ["sd-turbo", "sdxl-lightning-4step", "LCM_Dreamshaper"])
def test_names_tell_nothing(name: str, tmp_path: Path) -> None:
    export = export_spec(resolve_source(write_configs(tmp_path / name, **scheduled(EULER))))
    assert found(export) == ("euler", 20, 7.5)


def test_a_plan_says_what_is_assumed(tmp_path: Path) -> None:
    folder = write_configs(tmp_path / "model", **scheduled(EULER))
    for component, stem in WEIGHTS.items():
        save_file({}, str(folder / component / f"{stem}.safetensors"))
    told = run_cli("plan", folder, "--target", "raspberry-pi-5", "--size", "64x64")
    assert "kind of the model: base, as nothing says otherwise: 20 steps" in told.out
    told = run_cli("plan", folder, "--target", "raspberry-pi-5", "--variant", "lcm", "--json")
    plan = json.loads(told.out)
    assert (plan["steps"], plan["guidance"]) == (4, 1.0)
    assert plan["assumed"].startswith(
        "kind of the model: lcm, as was said: 4 steps, no guidance; --steps"
    )
    assert_refused(run_cli("plan", folder, "--target", "x86-64-cpu", "--variant", "Turbo"), "turbo")
