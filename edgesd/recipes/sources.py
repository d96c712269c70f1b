"""The model that a build, or a plan of one, is asked for."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgesd.errors import InputError
from edgesd.export.families import AUTOENCODER
from edgesd.export.source import ModelSource, resolve_network, resolve_source
from edgesd.export.source.side import read_sides
from edgesd.recipes.demo import demo_model
from edgesd.spec.build import DEMO, SideKind, Variant


def open_model(
    model: str,
    variant: Variant | None = None,
    vae: str | None = None,
    embeddings: Collection[str] = (),
    config: Path | None = None,
    loras: Collection[str] = (),
    sides: Collection[tuple[SideKind, str]] = (),
    weights: bool = True,
) -> ModelSource:
    """What the user called `model`: "demo", or one of the forms of export/source.

    variant: the kind that it is said to be. vae: the model whose autoencoder stands in for its own.
    embeddings: textual inversions that are added, as FILE or FILE:TOKEN. config: a diffusers folder
    with the configs and tokenizers of a single file. loras: what is merged into its networks, as
    FILE or FILE:SCALE. sides: ControlNets and adapters that are added, by their kind, as FOLDER or
    FOLDER:NAME. weights: without them files are neither hashed nor need they hold weights, which is
    enough for a plan. Raises what `resolve_source`, `read_embeddings`, `read_loras` and
    `read_sides` raise, and InputError for an autoencoder of other latents.
    """
    found = resolve_source(str(demo_model()) if model == DEMO else model, config, weights)
    source = replace(found, variant=variant, hashed=weights)
    if embeddings:
        from edgesd.export.source.embedding import read_embeddings

        source = replace(source, embeddings=read_embeddings(embeddings))
    if loras:
        from edgesd.export.lora.read import read_loras

        source = replace(source, loras=read_loras(loras))
    others = read_sides(sides)
    source = replace(source, others=others, sides=(*others,))
    if vae is None:
        return source
    other = resolve_network(vae, AUTOENCODER)
    _check_latents(source, other)
    return replace(source, others={AUTOENCODER: other, **others})


def _check_latents(source: ModelSource, other: ModelSource) -> None:
    """Raise InputError where latents of an autoencoder have another form than those of a model's
    own. Where the model has none of its own, the denoiser is compared with later."""
    config = other.config(f"{AUTOENCODER}/config.json")
    if not (source.folder(AUTOENCODER) / "config.json").is_file():
        return
    own = source.config(f"{AUTOENCODER}/config.json")
    for what, of in (("channels", _channels), ("pixels to a side of a latent", _scale_factor)):
        if of(config) != of(own):
            raise InputError(
                f"--vae {other.name}: it has {str(of(config))[:40]} {what}, and the latents of "
                f"{source.name} have {str(of(own))[:40]}: give an autoencoder of the same latents"
            )


def _channels(config: Mapping[str, Any]) -> object:
    return config.get("latent_channels", 4)  # diffusers' default


def _scale_factor(config: Mapping[str, Any]) -> int:
    """Pixels to each side of a latent. diffusers' pipelines compute it so, of both kinds."""
    levels = config.get("block_out_channels", config.get("decoder_block_out_channels", (64,)))
    return 1 << min(len(levels) - 1, 63) if isinstance(levels, list) and levels else 1
