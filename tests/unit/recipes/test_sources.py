"""The model that a build is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from edgesd.errors import InputError
from edgesd.recipes.sources import open_model


@pytest.mark.parametrize(
    "fields",
    [
        {"latent_channels": 8},
        {"latent_channels": "x" * 9999},
        {"block_out_channels": [1] * 20_000},  # of whose power of 2 Python prints no digits
    ],
)
def test_an_autoencoder_of_other_latents_is_refused(fields: dict[str, Any], tmp_path: Path) -> None:
    config = {"_class_name": "AutoencoderKL", "latent_channels": 4, **fields}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="give an autoencoder of the same latents") as error:
        open_model("demo", vae=str(tmp_path))
    assert len(str(error.value)) < 500
