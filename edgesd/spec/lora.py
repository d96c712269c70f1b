"""Places for LoRAs in a bundle's graphs, and what a file of factors for boards says of itself."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from edgesd.spec.base import MOST_DIMS, Label, Sha256, Size, Spec, Text
from edgesd.spec.scheme import MAX_RANK

MOST_SLOTS = 20_000
"""In one component."""


class LoraSlot(Spec, frozen=True):
    """A layer to whose output a graph adds (x down) up: x is the layer's own input [..., inputs],
    before smoothing and quantization. name: of the torch module below its component's network."""

    name: Label
    inputs: Size
    outputs: Size


class OtherLayer(Spec, frozen=True):
    """A layer without a slot, which says so to who converts a LoRA of it. shape: of its weight."""

    name: Label
    shape: Annotated[tuple[Size, ...], Meta(min_length=1, max_length=MOST_DIMS)]


class LoraSlots(Spec, frozen=True):
    """The slots of one component's graphs, each with two inputs (`slot_inputs`), fp32: down
    [inputs, r] and up [r, outputs].

    rank: the largest r. fixed: graphs take r = rank only, filled up with zeros; others take any,
    and each slot its own: 0 for none. others: the component's other layers.
    """

    rank: Annotated[int, Meta(ge=1, le=MAX_RANK)]
    fixed: bool
    layers: Annotated[tuple[LoraSlot, ...], Meta(min_length=1, max_length=MOST_SLOTS)]
    others: Annotated[tuple[OtherLayer, ...], Meta(max_length=MOST_SLOTS)] = ()

    def __post_init__(self) -> None:
        """Refuse a layer that is there twice: when decoded, as an invalid value."""
        if len({slot.name for slot in self.layers}) != len(self.layers):
            raise ValueError("a layer has two slots for LoRAs")


def slot_inputs(index: int) -> tuple[str, str]:
    """Names of the two inputs of a graph for the slot at `index`."""
    return f"lora.{index}.down", f"lora.{index}.up"


class LoraFile(Spec, frozen=True):
    """What a file of factors for boards says of itself (runtime/lora.py).

    version: of the file's form. name: of the file it was made of, whose bytes had the hash
    `source_sha256`. model: which bundle's it was made for, for people.
    """

    version: Literal[1]
    name: Annotated[str, Meta(min_length=1, max_length=200)]
    source_sha256: Sha256
    model: Text
