"""Finds the layers of a LoRA in a model, whatever program named them, and merges it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from edgesd.errors import InputError
from edgesd.export.families import TOKENIZER_OF
from edgesd.export.families.checkpoint import Checkpoint
from edgesd.export.families.latent_diffusion import UNET
from edgesd.export.families.parts.flux_names import (
    MODULATION,
    TRANSFORMER,
    WEIGHT,
    Rows,
    authors_layers,
    authors_norms,
)
from edgesd.export.lora.update import Lora, Shape, Update, brief, listed
from edgesd.export.mapped import Edit

_DENOISERS = (UNET, TRANSFORMER)
TAKES_LORA = (*_DENOISERS, *TOKENIZER_OF)
"""Networks that a LoRA may change."""

NETWORK_OF = {MODULATION: TRANSFORMER}
"""Component of a bundle -> the network of a checkpoint that it is a part of, where it is one."""

_FIRST, _SECOND = TOKENIZER_OF
_PREFIXES: Mapping[str, tuple[str, ...]] = {
    "lora_unet_": _DENOISERS,
    "lora_transformer_": (TRANSFORMER,),
    "lora_te_": (_FIRST,),
    "lora_te1_": (_FIRST,),
    "lora_te2_": (_SECOND,),
    "lora_te3_": (_SECOND,),
    f"{UNET}.": (UNET,),
    f"{TRANSFORMER}.": (TRANSFORMER,),
    f"{_FIRST}.": (_FIRST,),
    f"{_SECOND}.": (_SECOND,),
    "diffusion_model.": _DENOISERS,
    "model.diffusion_model.": _DENOISERS,
    "base_model.model.": TAKES_LORA,
    "lycoris_": TAKES_LORA,
    "": TAKES_LORA,
}
"""What names of layers begin with -> the networks that they may be of. Several may fit: the first
does."""

_WRAPPER = "text_model."
_OLD_NAMES = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
"""Layers of a text encoder -> what diffusers' releases before 0.20 called them."""

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
"""Parts of diffusers' UNet -> their names in the code of Stable Diffusion's authors."""

_WIDTHS = {
    768: "Stable Diffusion 1.x",
    1024: "Stable Diffusion 2.x",
    1280: "the refiner of Stable Diffusion XL",
    2048: "Stable Diffusion XL",
}
"""Width of the text embeddings that a UNet takes -> whose it is."""

_OF_FLUX = ("double_blocks", "single_blocks", "single_transformer_blocks")
"""In names of its layers, by its authors and by diffusers."""

_FIRST_LAYER = ("x_embedder", "img_in")
"""Of FLUX's transformer, by diffusers and by its authors: what tokens of latents go into."""

_SAYS_BASE = ("modelspec.architecture", "ss_base_model_version")
"""In a file's metadata."""

Shapes = Mapping[str, Shape]
"""Of the weights of a network, by their names."""


class Placed(NamedTuple):
    """An update, and the layer of a component that it changes: its weights are `layer`.weight and
    `layer`.bias."""

    component: str
    layer: str
    update: Update


class _Candidate(NamedTuple):
    """An update that may belong to a component by its name: there, it changes `rows`, which are one
    layer or several."""

    component: str
    rows: tuple[Rows, ...]
    update: Update

    @property
    def whole(self) -> bool:
        """Whether the layer is changed as the update has it."""
        return len(self.rows) == 1 and not self.rows[0].swapped

    def shape(self, shapes: Shapes) -> Shape:
        """Of the weights that it changes, taken together."""
        inner = shapes[f"{self.rows[0].layer}.weight"][1:]
        return (sum(one.size for one in self.rows), *inner)

    def biases(self, shapes: Shapes) -> int | None:
        """How many biases these layers have together; None where one has none."""
        found = [shapes.get(f"{one.layer}.bias") for one in self.rows]
        return None if None in found else sum(one[0] for one in found if one)

    def fits(self, shapes: Shapes) -> bool:
        """Whether the layers have the shape of what is changed."""
        bias = self.update.bias
        if bias is not None and bias.numel() != self.biases(shapes):
            return False
        return self.update.fits(self.shape(shapes))

    def placed(self) -> list[Placed]:
        """Each layer with what changes it."""
        if self.whole:
            return [Placed(self.component, self.rows[0].layer, self.update)]
        return [Placed(self.component, one.layer, self.update.part(one.of)) for one in self.rows]


def shapes_of(net: nn.Module) -> Shapes:
    """The shapes of a network's parameters, with values or without."""
    return {name: tuple(value.shape) for name, value in net.named_parameters()}


def place(lora: Lora, model: str, networks: Mapping[str, Shapes]) -> tuple[Placed, ...]:
    """Where each of the updates of a LoRA belongs. model: its name. networks: those of TAKES_LORA
    that it has.

    Raises InputError unless each has one place, whose weights have its shape.
    """
    first = networks.get(TRANSFORMER, {}).get(f"{_FIRST_LAYER[0]}{WEIGHT}")
    if first is not None and takes_control([lora], first[1]):
        raise InputError(
            f"{lora.name} takes a control image beside the latents (a Control-LoRA), which {model} "
            "doesn't: build one that does with edgesd build --lora"
        )
    tables = {name: _layers(shapes) for name, shapes in networks.items() if name in TAKES_LORA}
    placed: list[Placed] = []
    homeless: list[str] = []
    for update in lora.updates:
        named = _named(update, tables)
        if not named:
            homeless.append(update.layer)
            continue
        fitting = [one for one in named if one.fits(networks[one.component])]
        if len(fitting) != 1:
            raise InputError(_why_not(lora, model, named, fitting, networks))
        if not fitting[0].whole and update.magnitude and update.magnitude.of_inputs:
            raise InputError(
                f"{lora.name}: {brief(update.layer)} has magnitudes of inputs (DoRA), which "
                f"can't be cut into those of layers of {model}"
            )
        placed += fitting[0].placed()
    if homeless:
        raise InputError(
            f"{lora.name}: {model} has no {listed(homeless)} ({len(homeless)} of "
            f"{len(lora.updates)} layers){_made_for(lora, networks)}: give the model that it was "
            "made for"
        )
    counts = Counter((one.component, one.layer) for one in placed)
    for one in placed:
        if counts[one.component, one.layer] > 1:
            raise InputError(
                f"{lora.name} changes {one.layer} of {one.component} more than once, under "
                "different names: expected one LoRA"
            )
    return tuple(placed)


def check_loras(source: Checkpoint, networks: Mapping[str, nn.Module]) -> None:
    """Raise InputError unless all LoRAs of a model fit it. networks: all that it has."""
    if source.loras:
        shapes = {name: shapes_of(net) for name, net in networks.items() if name in TAKES_LORA}
        for lora in source.loras:
            place(lora, source.name, shapes)


def takes_control(loras: Iterable[Lora], channels: int) -> bool:
    """Whether one of `loras` makes a transformer of FLUX that takes `channels` of tokens one that
    takes as many of a control image beside them, as FLUX.1's Control-LoRAs do."""
    return any(
        _flat(update.layer).endswith(_FIRST_LAYER)
        and update.product is not None
        and update.product.shape[1:] == (2 * channels,)
        for lora in loras
        for update in lora.updates
    )


def widen(net: Any, source: Checkpoint, component: str) -> None:
    """Let a transformer of FLUX take a control image's latents beside its own, from which nothing
    comes yet, where a LoRA of the source is for that. In place."""
    if component != TRANSFORMER or not takes_control(source.loras, net.config.in_channels):
        return
    first, channels = net.x_embedder, net.config.in_channels
    wide = torch.cat([first.weight, torch.zeros_like(first.weight)], 1)
    first.weight, first.in_features = nn.Parameter(wide, requires_grad=False), 2 * channels
    net.register_to_config(in_channels=2 * channels, out_channels=net.out_channels)


def lora_edits(source: Checkpoint, component: str, net: nn.Module) -> dict[str, Edit]:
    """What a model's LoRAs do to the parameters of a component, by name. They were checked."""
    edits: dict[str, list[Edit]] = {}
    if not source.loras or component not in TAKES_LORA:
        return {}
    shapes = shapes_of(net)
    tables = {component: _layers(shapes)}
    for lora in source.loras:
        for update in lora.updates:
            fitting = [one for one in _named(update, tables) if one.fits(shapes)]
            for _, layer, change in (placed for one in fitting for placed in one.placed()):
                if change.product is not None:
                    edit = partial(change.weights, scale=lora.scale)
                    edits.setdefault(f"{layer}.weight", []).append(edit)
                if change.bias is not None:
                    edit = partial(change.biases, scale=lora.scale)
                    edits.setdefault(f"{layer}.bias", []).append(edit)
    names = ", ".join(lora.name for lora in source.loras)
    return {name: partial(_edited, each, f"{names}: {name}") for name, each in edits.items()}


def _edited(edits: Iterable[Edit], what: str, weight: Tensor) -> Tensor:
    for edit in edits:
        weight = edit(weight)
    if not bool(torch.isfinite(weight).all()):
        raise InputError(
            f"{what} becomes NaN or infinite: its values are too large; is the scale right?"
        )
    return weight


def _named(update: Update, tables: Mapping[str, _Layers]) -> list[_Candidate]:
    """Where an update may belong by its name. tables: `_layers` of components."""
    return [
        _Candidate(component, tables[component][name], update)
        for component, name in _readings(update.layer)
        if name in tables.get(component, {})
    ]


def _readings(layer: str) -> list[tuple[str, str]]:
    """The components that a layer of a file may be of, and its name there, as in `_layers`."""
    prefix = max((one for one in _PREFIXES if layer.startswith(one)), key=len)
    name = layer.removeprefix(prefix).replace(".processor.", ".")
    return [(component, _flat(name)) for component in _PREFIXES[prefix]]


def _flat(name: str) -> str:
    """Kohya's scripts have underscores for dots: so has a name of any other program here."""
    return name.replace(".", "_")


_Layers = Mapping[str, tuple[Rows, ...]]


def _layers(shapes: Shapes) -> _Layers:
    """Flat name of a layer, in all programs' ways -> what it is in the network: a layer, or rows
    that are several."""
    layers = [name.removesuffix(".weight") for name in shapes if name.endswith(".weight")]
    authors = _authors_blocks(layers)
    found: dict[str, tuple[Rows, ...]] = {}
    for layer in layers:
        rows = (Rows(layer, 0, shapes[f"{layer}.weight"][0]),)
        names = [layer, *_aliases(layer)]
        blocks = layer.split(".")
        for count in range(1, 6):
            block, rest = ".".join(blocks[:count]), ".".join(blocks[count:])
            if block in authors:
                names.append(".".join(filter(None, (authors[block], _RESNET.get(rest, rest)))))
        found |= {_flat(name): rows for name in names if _flat(name) not in found}
    found |= {_flat(name): rows for name, rows in authors_layers(shapes, xlabs=True).items()}
    for theirs, ours in authors_norms(shapes).items():
        if ours in shapes:  # slots don't tell all weights
            layer = ours.removesuffix(WEIGHT)
            found[_flat(theirs.rpartition(".")[0])] = (Rows(layer, 0, shapes[ours][0]),)
    return found


def _aliases(layer: str) -> list[str]:
    """Other names of a layer: of attention in diffusers' old releases, of text encoders with and
    without a wrapper."""
    first, dot, last = layer.rpartition(".")
    names = [first] if last == "0" and first.endswith(".to_out") else []
    if last in _OLD_NAMES:
        names.append(f"{first}{dot}{_OLD_NAMES[last]}")
    bare = [name.removeprefix(_WRAPPER) for name in (layer, *names)]
    return [*names, *bare, *(f"{_WRAPPER}{name}" for name in bare)]


def _authors_blocks(layers: Collection[str]) -> dict[str, str]:
    """Blocks of diffusers' UNet -> their names in the code of Stable Diffusion's authors, which
    counts resnets and samplers of all levels on."""
    blocks = {".".join(layer.split(".")[:4]) for layer in layers}
    found = dict(_OUTSIDE)
    level, number = 0, 1
    while (down := f"down_blocks.{level}.resnets.0") in blocks:
        place = 0
        while (down := f"down_blocks.{level}.resnets.{place}") in blocks:
            found[down] = f"input_blocks.{number}.0"
            found[f"down_blocks.{level}.attentions.{place}"] = f"input_blocks.{number}.1"
            place, number = place + 1, number + 1
        if (sampler := f"down_blocks.{level}.downsamplers.0") in blocks:
            found[f"{sampler}.conv"] = f"input_blocks.{number}.0.op"
            number += 1
        level += 1
    level, number = 0, 0
    while f"up_blocks.{level}.resnets.0" in blocks:
        place, attends = 0, 0
        while (up := f"up_blocks.{level}.resnets.{place}") in blocks:
            found[up] = f"output_blocks.{number}.0"
            attention = f"up_blocks.{level}.attentions.{place}"
            found[attention] = f"output_blocks.{number}.1"
            attends = int(any(block.startswith(f"{attention}.") for block in layers))
            place, number = place + 1, number + 1
        found[f"up_blocks.{level}.upsamplers.0"] = f"output_blocks.{number - 1}.{1 + attends}"
        level += 1
    return found


def _why_not(
    lora: Lora,
    model: str,
    named: Collection[_Candidate],
    fitting: Collection[_Candidate],
    networks: Mapping[str, Shapes],
) -> str:
    """For an update that has a name in the model: none of its layers fits, or several do."""
    one = next(iter(named))
    what = f"{lora.name}: {brief(one.update.layer)}"
    if fitting:
        places = " and ".join(place.component for place in fitting)
        return f"{what} could be of {places}: expected a file whose names tell which"
    shapes = networks[one.component]
    product, bias = one.update.product, one.update.bias
    weight, layers = one.shape(shapes), " and ".join(rows.layer for rows in one.rows)
    if product is None or one.update.fits(weight):
        assert bias is not None
        return (
            f"{what} changes a bias of {bias.numel()} values, and {layers} of {model} has "
            f"{one.biases(shapes) or 'none'}{_made_for(lora, networks)}"
        )
    return (
        f"{what} changes weights of shape {list(product.shape)}, and those of {model} have "
        f"{list(weight)}{_made_for(lora, networks)}: give the model that it was made for"
    )


def _made_for(lora: Lora, networks: Collection[str]) -> str:
    """Which model a LoRA looks to be made for, as a part of a sentence; "" where nothing tells.
    networks: of the model that it doesn't fit."""
    names = [update.layer for update in lora.updates]
    if any(word in name for name in names for word in _OF_FLUX):
        base = "a FLUX of another size" if TRANSFORMER in networks else "FLUX"
    elif any(name.startswith(("transformer.", "lora_transformer_")) for name in names):
        base = "a model with a transformer in place of a UNet"
        if TRANSFORMER in networks:
            base = "another model with a transformer"
    else:
        base = _by_width(lora) or _said(lora)
    return f"; it looks like one for {base}" if base else ""


def _by_width(lora: Lora) -> str:
    for update in lora.updates:
        if _flat(update.layer).endswith(("attn2_to_k", "attn2_to_v")) and update.product:
            return _WIDTHS.get(update.product.shape[1], "")
    second = any(update.layer.startswith(("lora_te2_", f"{_SECOND}.")) for update in lora.updates)
    return _WIDTHS[2048] if second else ""


def _said(lora: Lora) -> str:
    said = [lora.metadata[name] for name in _SAYS_BASE if name in lora.metadata]
    return f"{said[0][:60]!r}" if said else ""
