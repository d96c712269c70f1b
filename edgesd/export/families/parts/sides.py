"""ControlNets and adapters beside a UNet, which takes what they add."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec
from torch import Tensor, nn

from edgesd.errors import InputError
from edgesd.export.families import Component
from edgesd.export.families.checkpoint import Checkpoint
from edgesd.export.families.parts import adapter, controlnet
from edgesd.export.families.parts.inlets import FEATURE, RESIDUAL, inlets_of, tensors
from edgesd.export.families.parts.shapes import CONTROL
from edgesd.export.families.parts.unet import told
from edgesd.spec.pipeline import InputSpec, LatentSpec, Part, ShapeSpec, SideSpec, Wiring


class SidedUnet(nn.Module):
    """A UNet (parts/unet.py) with residuals and features as further inputs. names: of all inputs,
    in order."""

    def __init__(self, net: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.net = net
        self.names = (*names,)

    def forward(self, *inputs: Tensor) -> Tensor:
        given = dict(zip(self.names, inputs, strict=True))
        residuals, features = _of_kind(given, RESIDUAL), _of_kind(given, FEATURE)
        out: Tensor = self.net(
            given["sample"],
            given["timestep"],
            encoder_hidden_states=given["encoder_hidden_states"],
            timestep_cond=given.get("timestep_cond"),
            added_cond_kwargs=told(given),
            down_block_additional_residuals=residuals[:-1] or None,
            mid_block_additional_residual=residuals[-1] if residuals else None,
            down_intrablock_additional_residuals=features or None,
            return_dict=False,
        )[0]
        return out


def _of_kind(given: Mapping[str, Tensor], kind: str) -> list[Tensor]:
    """The inputs of a kind, in order."""
    return [tensor for name, tensor in given.items() if name.startswith(f"{kind}_")]


def with_sides(
    source: Checkpoint,
    components: tuple[Component, ...],
    config: Mapping[str, Any],
    shape: ShapeSpec,
    latent: LatentSpec,
    wiring: Wiring,
) -> tuple[tuple[Component, ...], Wiring]:
    """The components of a pipeline and their wiring, with the ControlNets and adapters that
    `source` was given, which may be none. config: of the UNet. Raises InputError for those of
    another base model."""
    if not source.sides:
        return components, wiring
    place = [component.name for component in components].index(wiring.denoiser.component)
    unet = components[place]
    if "refine" in wiring.tasks:
        raise InputError(f"{source.name} is a refiner, which takes no ControlNet and no adapter")
    if shape.dynamic and not unet.multiples:
        raise InputError(
            f"{source.name} makes images of sizes that its UNet's levels don't divide, and "
            "ControlNets and adapters are for those that they do: give --size"
        )
    inlets = inlets_of(unet, shape, latent)
    found, sides = [], []
    parts: dict[str, list[Part]] = {}
    by_name = {one.name: one for one in wiring.denoiser.inputs}
    by_name[CONTROL] = InputSpec(CONTROL, "control")
    for name in source.sides:
        once = source.class_of(name) == adapter.CLASS
        if once:
            component = adapter.adapter(source, name, inlets, shape, latent)
        else:
            component = controlnet.controlnet(source, name, unet, config, inlets, shape, latent)
        found.append(component)
        inputs = tuple(by_name[tensor.name] for tensor in component.spec.inputs)
        sides.append(SideSpec(name, "once" if once else "each_step", inputs))
        for tensor in component.spec.outputs:
            parts.setdefault(tensor.name, []).append(Part(name, tensor.name))
    batch = unet.spec.inputs[0].shape[0]
    places = {RESIDUAL: inlets.residuals, FEATURE: inlets.features}
    added = [
        tensor
        for kind, where in places.items()
        for tensor in tensors(kind, where, batch, shape, inlets.sizes)
        if tensor.name in parts
    ]
    spec = msgspec.structs.replace(unet.spec, inputs=(*unet.spec.inputs, *added))
    names = [tensor.name for tensor in spec.inputs]

    def load(weights: bool = True) -> nn.Module:
        module: Any = unet.load(weights)
        return SidedUnet(module.net, names)

    denoiser = msgspec.structs.replace(
        wiring.denoiser,
        inputs=(
            *wiring.denoiser.inputs,
            *(InputSpec(one.name, "side", tuple(parts[one.name])) for one in added),
        ),
    )
    wiring = msgspec.structs.replace(wiring, denoiser=denoiser, sides=tuple(sides))
    network = replace(unet, spec=spec, load=load)
    return (*components[:place], *found, network, *components[place + 1 :]), wiring
