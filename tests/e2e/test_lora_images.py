"""Images of a model with LoRAs merged are those of diffusers' load_lora_weights and fuse_lora."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

from edgesd.export.pipeline import export_spec
from edgesd.recipes.sources import open_model
from edgesd.runtime.requests import Request
from tests.loras import Tensors, kohya_lora, peft_lora, save
from tests.tiny_pipelines import diffusers_images, on_torch, tiny, write_tiny

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

PROMPT, SEED, STEPS, GUIDANCE, WIDTH, HEIGHT = "a red apple", 3, 2, 5.0, 40, 24


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {name: write_tiny(name, root / name) for name in ("sd", "sdxl")}


def theirs(name: str, loras: Mapping[str, tuple[Tensors, float]]) -> Any:
    """diffusers' image with LoRAs (tensors, scale) that are fused."""
    pipeline = tiny(name)
    for adapter, (tensors, _) in loras.items():
        pipeline.load_lora_weights(dict(tensors), adapter_name=adapter)
    if loras:
        pipeline.set_adapters([*loras], [scale for _, scale in loras.values()])
        prefixes = {"unet": "unet", "text_encoder": "te", "text_encoder_2": "te2"}
        keys = [key for tensors, _ in loras.values() for key in tensors]
        parts = [
            part
            for part, short in prefixes.items()
            if any(
                key.startswith((f"{part}.", f"lora_{short}_", f"lora_{short}1_")) for key in keys
            )
        ]
        pipeline.fuse_lora(components=parts)
    return drawn(pipeline)


def drawn(pipeline: Any) -> Any:
    options = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
    return diffusers_images(pipeline, [PROMPT], [SEED], width=WIDTH, height=HEIGHT, **options)[0]


def ours(folder: Path, loras: list[str], bundle: Path) -> Any:
    source = open_model(str(folder), loras=loras)
    with on_torch(source, export_spec(source), bundle) as pipeline:
        request = Request(PROMPT, SEED, None, STEPS, GUIDANCE, height=HEIGHT, width=WIDTH)
        return pipeline.generate([request])[0]


def difference(one: Any, other: Any) -> int:
    return int(np.abs(np.int32(one) - np.int32(other)).max())


@pytest.mark.parametrize("name", ["sd", "sdxl"])
@pytest.mark.parametrize("make", [peft_lora, kohya_lora])
def test_images_are_those_of_diffusers(
    name: str, make: Callable[..., Tensors], folders: Mapping[str, Path], tmp_path: Path
) -> None:
    tensors = make(tiny(name), text=True)
    file, plain = save(tmp_path / "style.safetensors", tensors), theirs(name, {})
    for scale in (0, 0.5, 1):
        wanted = theirs(name, {"style": (tensors, scale)})
        found = ours(folders[name], [f"{file}:{scale}"], tmp_path / f"bundle-{scale}")
        assert difference(found, wanted) <= 1
        changed = difference(wanted, plain)
        assert changed == 0 if scale == 0 else changed > 8


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_two_loras(name: str, folders: Mapping[str, Path], tmp_path: Path) -> None:
    one, two = peft_lora(tiny(name), seed=1), kohya_lora(tiny(name), seed=2)
    files = [save(tmp_path / "1.safetensors", one), save(tmp_path / "2.safetensors", two)]
    wanted = theirs(name, {"one": (one, 0.7), "two": (two, -0.4)})
    given = [f"{files[0]}:0.7", f"{files[1]}:-0.4"]
    assert difference(ours(folders[name], given, tmp_path / "both"), wanted) <= 1
    assert difference(ours(folders[name], given[:1], tmp_path / "one"), wanted) > 8
