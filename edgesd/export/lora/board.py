"""A LoRA file becomes a file of factors for boards (runtime/lora.py), for the slots of a bundle."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from edgesd.errors import InputError, UsageError
from edgesd.export.families.parts.lora import NETWORK_OF, Placed, place
from edgesd.export.lora.read import read_lora
from edgesd.export.lora.update import LowRank, Shape, Update, brief, listed
from edgesd.files import atomic_write, check_new
from edgesd.runtime.arrays import Array
from edgesd.runtime.bundle import Bundle
from edgesd.runtime.lora import MOST_VALUE, SUFFIX, Factors, Place, lora_bytes, slots_of
from edgesd.spec.build import MOST_SKIPPED
from edgesd.spec.lora import LoraFile, LoraSlots

_NUMBERED = re.compile(r"(.*\blayers\.)(\d+)(\..*)")
"""A layer of a text encoder: what comes before its number, that, and what comes after."""

_ROUNDING = 1e-3
"""Relative RMS that fp16 may change a factor by: normal numbers of fp16 are rounded by 3e-4."""

_MERGE = "merge it when the bundle is built: edgesd build --lora"


class Converted(NamedTuple):
    """A file for boards. rank: the largest. unused: layers of the LoRA that the pipeline never
    runs, which are left out: those behind the hidden states that it takes of a text encoder."""

    path: Path
    rank: int
    layers: int
    unused: tuple[str, ...]


def convert(given: str, bundle: Bundle, out: Path | None = None) -> Converted:
    """Write the LoRA in FILE, or FILE:SCALE, to the new file `out`, for bundles with the slots of
    `bundle`. Without `out` it is beside FILE, with the suffix .lora.

    Raises InputError as `read_lora`, for a LoRA that isn't one of products (DoRA, LoHa, LoKr), and
    for layers that have no slot, UsageError for a bundle without slots, or a rank above theirs.
    """
    slots = slots_of(bundle.manifest)
    lora = read_lora(given)
    out = lora.files[0].with_suffix(SUFFIX) if out is None else out
    check_new(out)
    networks: dict[str, dict[str, Shape]] = {}
    owners: dict[Place, str] = {}
    for component, each in slots.items():
        network, shapes = NETWORK_OF.get(component, component), _shapes(each)
        networks[network] = networks.get(network, {}) | shapes
        owners |= {(network, name.removesuffix(".weight")): component for name in shapes}
    placed = [
        one._replace(component=owners[one.component, one.layer])
        for one in place(lora, bundle.manifest.name, networks)
    ]
    known = {(c, slot.name) for c, each in slots.items() for slot in each.layers}
    elsewhere = {(c, other.name) for c, each in slots.items() for other in each.others}
    missing = [one.update.layer for one in placed if (one.component, one.layer) in elsewhere]
    if missing:
        raise InputError(
            f"{lora.name} changes {listed(missing)}, which have no slots in a bundle (linears of "
            f"tokens and convolutions of 1x1 have): {_MERGE}"
        )
    factors: dict[Place, Factors] = {}
    for one in placed:
        if (one.component, one.layer) in known:
            factors[one.component, one.layer] = _factors(lora.name, one, lora.scale)
    unused = [one.update.layer for one in placed if (one.component, one.layer) not in known]
    if not factors:
        raise InputError(f"{lora.name} changes nothing that {bundle.manifest.name} runs")
    rank, most = max(pair.rank for pair in factors.values()), min(s.rank for s in slots.values())
    if rank > most:
        raise UsageError(
            f"{lora.name} has the rank {rank}, and {bundle.manifest.name} was built with "
            f"--lora-slots {most}: build it for more"
        )
    lora.check_unchanged()
    about = LoraFile(1, lora.name[-200:], lora.sha256, bundle.manifest.name[:200])
    with atomic_write(out, new=True) as file:
        file.write(lora_bytes(factors, about))
    return Converted(out, rank, len(factors), tuple(unused))


def _shapes(slots: LoraSlots) -> dict[str, Shape]:
    """The weights of a component by name, as far as LoRAs change them. Of a text encoder, also
    those of layers that it had behind its last."""
    found: dict[str, Shape] = {
        f"{slot.name}.weight": (slot.outputs, slot.inputs) for slot in slots.layers
    }
    found |= {f"{other.name}.weight": other.shape for other in slots.others}
    numbered = {name: m for name in found if (m := _NUMBERED.fullmatch(name))}
    last = max((int(match[2]) for match in numbered.values()), default=0)
    more = {
        f"{match[1]}{last + behind}{match[3]}": found[name]
        for name, match in numbered.items()
        if int(match[2]) == last
        for behind in range(1, MOST_SKIPPED + 2)
    }
    return found | more


def _factors(name: str, one: Placed, scale: float) -> Factors:
    """What an update adds, as a product. Raises InputError where it is none."""
    update = one.update
    product = update.product
    why = _why_not(update)
    if why or not isinstance(product, LowRank):
        raise InputError(
            f"{name}: {brief(update.layer)} {why}, which a slot can't add on a board: {_MERGE}"
        )
    down, up = product.down.float().flatten(1).T, product.up.float().flatten(1).T
    return Factors(_stored(down, name), _stored(up * (update.scale * scale), name))


def _why_not(update: Update) -> str:
    """Why an update isn't a product of two factors alone; "" where it is."""
    if update.magnitude is not None:
        return "has magnitudes (DoRA)"
    if update.bias is not None:
        return "changes a bias"
    if not isinstance(update.product, LowRank):
        return f"is no product of two matrices ({type(update.product).__name__})"
    return "has a core (Tucker's form)" if update.product.mid is not None else ""


def _stored(values: Tensor, name: str) -> Array:
    """A factor in fp16 where that is precise enough, else in fp32."""
    whole: Array = values.numpy()
    if not np.abs(whole).max() <= MOST_VALUE:
        raise InputError(
            f"{name}: a factor has values beyond {MOST_VALUE:.0f}: is its scale right?"
        )
    half = whole.astype(np.float16)
    lost = float(np.sqrt(np.mean((half.astype(np.float32) - whole) ** 2)))
    return half if lost <= _ROUNDING * float(np.sqrt(np.mean(whole**2))) else whole
