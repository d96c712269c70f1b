"""A build's folders on this machine, and a bundle's reference to its model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from edgesd.files import environment_folder, expanded, user_cache
from edgesd.spec.build import DEMO, FOLDER, HUB, ModelReference, SideKind

Sides = tuple[tuple[SideKind, str], ...]

_FILE = ".safetensors"


def cache_folder() -> Path:
    """EDGESD_CACHE, or edgesd in the user's cache folder."""
    return environment_folder("EDGESD_CACHE") or user_cache()


@dataclass(frozen=True)
class LocalFolders:
    """Folders of this machine that a build uses; its bundle doesn't name them.

    work: for intermediate results. keep_work: they stay there, however large. lpips: with the
    weights of LPIPS; None for what stands in for it. prompter: an exported prompter that is
    included in the bundle. embeddings: files of textual inversions, as FILE or FILE:TOKEN. loras:
    files of LoRAs, as FILE or FILE:SCALE. controlnets, adapters: their folders or hub ids, which
    may end in :NAME. config: a diffusers folder with the configs and tokenizers of a model that is
    a single file.
    """

    work: Path = field(default_factory=cache_folder)
    keep_work: bool = False
    lpips: Path | None = None
    prompter: Path | None = None
    embeddings: tuple[str, ...] = ()
    loras: tuple[str, ...] = ()
    config: Path | None = None
    controlnets: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()

    @property
    def sides(self) -> Sides:
        """ControlNets, then adapters, with their kinds."""
        return sides_of(self.controlnets, self.adapters)


def sides_of(controlnets: Iterable[str], adapters: Iterable[str]) -> Sides:
    """ControlNets, then adapters, with their kinds."""
    found: list[tuple[SideKind, str]] = [("controlnet", one) for one in controlnets]
    return (*found, *(("adapter", one) for one in adapters))


def model_name(model: str) -> str:
    """What a model is called in names of files: of a path or a hub id the last part."""
    return DEMO if model == DEMO else Path(model).resolve().name.removesuffix(_FILE) or "model"


def model_reference(model: str, sha256: str) -> ModelReference:
    """How a bundle names the model that the user called `model`. sha256: of what was read."""
    if model == DEMO:
        return ModelReference(DEMO, DEMO, sha256)
    if expanded(model).exists():
        return ModelReference(FOLDER, model_name(model), sha256)
    return ModelReference(HUB, model, sha256)
