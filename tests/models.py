"""Model folders for tests: configs alone, or small networks of random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

EMOJI = Path(__file__).resolve().parents[1] / "models" / "emoji"
WEIGHTS = {
    "text_encoder": "model",
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
}


def write_configs(folder: Path, **changes: dict[str, Any]) -> Path:
    """The embedded model's configs and tokenizer at the new `folder`; its weight files are empty.

    changes: component (unet, scheduler, tokenizer, index ...) -> fields of its config; None takes
    one away. `unet_`, with one underscore more, stands for all of a config.
    """
    for component in ("scheduler", "text_encoder", "tokenizer", "unet", "vae"):
        (folder / component).mkdir(parents=True)
        for path in (EMOJI / component).iterdir():
            if path.suffix in (".json", ".txt"):
                shutil.copyfile(path, folder / component / path.name)
    for component, stem in WEIGHTS.items():
        (folder / component / f"{stem}.safetensors").touch()
    shutil.copyfile(EMOJI / "model_index.json", folder / "model_index.json")
    for component, fields in changes.items():
        edit(config_of(folder, component.rstrip("_")), component.endswith("_"), **fields)
    return folder


def config_of(folder: Path, component: str) -> Path:
    """The file that holds a component's config."""
    names = {
        "index": "model_index.json",
        "scheduler": "scheduler/scheduler_config.json",
        "tokenizer": "tokenizer/tokenizer_config.json",
    }
    return folder / names.get(component, f"{component}/config.json")


def edit(path: Path, anew: bool = False, **fields: Any) -> None:
    """Change the json object in a file; None takes a field away. anew: nothing else stays."""
    content = {} if anew else json.loads(path.read_text())
    content |= fields
    path.write_text(json.dumps({key: v for key, v in content.items() if v is not None}))
