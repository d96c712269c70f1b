"""Manifests that edgesd wrote at each schema version before this one are read as they were meant.

tests/golden/manifests/schema-N.json is bundle.json of the embedded pipeline, built by the last
version of edgesd with that schema (w8a8; fp32 at 1), with its lists of layers and images cut short.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgesd.runtime.bundle import read_manifest
from edgesd.runtime.flow import flow_of
from edgesd.runtime.networks import check_networks
from edgesd.spec.bundle import SCHEMA_VERSION, BundleManifest
from edgesd.spec.pipeline import stable_diffusion

FOLDER = Path(__file__).parents[2] / "golden" / "manifests"
VERSIONS = range(1, SCHEMA_VERSION)


def manifest(version: int) -> BundleManifest:
    path = FOLDER / f"schema-{version}.json"
    return read_manifest(path, path.read_bytes())


@pytest.mark.parametrize("version", VERSIONS)
def test_it_is_stable_diffusion_with_one_text_encoder(version: int) -> None:
    found = manifest(version)
    assert found.schema_version == version
    assert found.pipeline.wiring == stable_diffusion()
    check_networks(found)
    assert flow_of(found.pipeline).components == ("text_encoder", "unet", "vae_decoder")
    # The encoder is in old bundles, and nothing runs it.
    assert ("vae_encoder" in found.engines) == (version < 8)


@pytest.mark.parametrize("version", VERSIONS)
def test_what_later_versions_added_is_absent(version: int) -> None:
    found = manifest(version)
    decoder = found.engines["vae_decoder"]
    assert (found.recipe is not None) == (version >= 2)
    assert (found.engines["unet"].kernels is not None) == (version >= 5)
    assert (found.pipeline.latent.halo is not None) == (version >= 5)
    assert (decoder.footprint is not None) == (version >= 7)


def test_images_and_layers_keep_their_names_on_disk() -> None:
    raw = json.loads((FOLDER / "schema-7.json").read_bytes())
    found = manifest(7)
    assert found.quality is not None and found.recipe is not None
    assert len(found.quality.images) == len(raw["quality"]["pictures"]) == 2
    assert [layer.name for layer in found.recipe.layers] == [
        layer["name"] for layer in raw["recipe"]["layers"]
    ]
