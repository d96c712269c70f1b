"""Networks whose weights stay in the checkpoint's files: mapped, in 16 bits, computed with in fp32.

A layer has its weights in fp32 only while it runs. So a network takes the memory of its largest
layer, whatever its own size; the pages of the files are the system's to keep or to drop.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

_HELD = "_edgesd_held"
"""Attribute of a module whose parameters are mapped: its `_Held`."""

_LARGE = 1 << 20
"""Values of a weight from which on memory for it is kept."""

_memory = threading.local()

Edit = Callable[[Tensor], Tensor]
"""A weight in fp32 -> a new tensor, in fp32 and of the same shape, which takes its place."""


class Edited:
    """A weight that is made of the checkpoint's whenever it is asked for, and not kept. It has
    what is asked of mapped tensors."""

    def __init__(self, tensor: Tensor | Edited, edit: Edit) -> None:
        self._tensor, self._edit = tensor, edit
        self.shape: torch.Size = tensor.shape
        self.dtype = torch.float32

    def float(self) -> Tensor:
        """Its values."""
        return self._edit(self._tensor.float())

    def numel(self) -> int:
        """How many there are."""
        return self._tensor.numel()

    def is_floating_point(self) -> bool:
        """They are."""
        return True

    def detach(self) -> Edited:
        """They aren't part of any computation."""
        return self


Weight = Tensor | Edited
"""A weight of a network that is held mapped."""


def hold_mapped(net: nn.Module) -> None:
    """Let each module of `net` have its parameters in fp32 while it runs, and at no other time.

    In place. Between runs a parameter is on torch's meta device, of its shape and in fp32, and
    `state_of` has the values: a network that computes with a parameter outside of the forward of
    its module makes garbage, which the parity gate sees. Floating-point buffers, which are small,
    become fp32.
    """
    stand_ins: dict[int, nn.Parameter] = {}
    for module in net.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.float()
        own = {name: value for name, value in module._parameters.items() if value is not None}
        if own:
            for value in own.values():
                # Parameters that modules share stay shared.
                stand_ins.setdefault(id(value), _stand_in(value))
            places = {name: stand_ins[id(value)] for name, value in own.items()}
            setattr(module, _HELD, _Held(module, {**own}, places))


def edit_mapped(net: nn.Module, edits: Mapping[str, Edit]) -> None:
    """Let parameters of a network that is held mapped be made by `edits`, of those that they are
    now. In place. edits: by names as in its state dict."""
    for path, module in net.named_modules():
        held: _Held | None = getattr(module, _HELD, None)
        if held is not None:
            prefix = f"{path}." if path else ""
            for name, value in held.values.items():
                if edit := edits.get(f"{prefix}{name}"):
                    held.values[name] = Edited(value, edit)


def state_of(net: nn.Module) -> dict[str, Weight]:
    """The parameters and buffers of a network, mapped or not: name as in its state dict ->
    tensor, of the type that the checkpoint has it in."""
    found: dict[str, Weight] = {}
    for path, module in net.named_modules():
        held: _Held | None = getattr(module, _HELD, None)
        own = {**module._buffers, **(module._parameters if held is None else held.values)}
        prefix = f"{path}." if path else ""
        found |= {f"{prefix}{name}": t.detach() for name, t in own.items() if t is not None}
    return found


def release(net: nn.Module, fake: FakeTensorMode) -> dict[str, Weight]:
    """Take parameters and buffers out of `net`, for an export; returns `state_of` it.

    Tensors of `fake` take their places: of the same shapes, on the CPU, without values.
    """
    state = state_of(net)
    made: dict[int, Tensor] = {}  # parameters that modules share stay shared
    for module in net.modules():
        held: _Held | None = getattr(module, _HELD, None)
        if held is not None:
            held.close()
            delattr(module, _HELD)
        stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for own in stores:
            for name, value in own.items():
                if value is not None:
                    with fake:
                        empty = torch.empty(value.shape, dtype=value.dtype)
                    if isinstance(value, nn.Parameter):
                        empty = nn.Parameter(empty, requires_grad=False)
                    own[name] = made.setdefault(id(value), empty)
    return state


class _Held:
    """The parameters of one module: where the checkpoint has them, and what stands in for them."""

    def __init__(
        self,
        module: nn.Module,
        values: dict[str, Weight],
        stand_ins: Mapping[str, nn.Parameter],
    ) -> None:
        self.values, self._stand_ins = values, stand_ins
        self._hooks = (
            module.register_forward_pre_hook(self._bring),
            module.register_forward_hook(self._take_away, always_call=True),
        )
        self._take_away(module, None, None)

    def close(self) -> None:
        """Leave the module with what stands in for its parameters."""
        for hook in self._hooks:
            hook.remove()

    def _bring(self, module: nn.Module, inputs: object) -> None:
        for name, value in self.values.items():
            if type(module) is nn.Linear and isinstance(value, Tensor) and value.numel() > _LARGE:
                full = _scratch(value)
            else:
                full = value.float()
            module._parameters[name] = nn.Parameter(full, requires_grad=False)

    def _take_away(self, module: nn.Module, inputs: object, outputs: object) -> None:
        module._parameters.update(self._stand_ins)


def _scratch(value: Tensor) -> Tensor:
    """A large weight in fp32, in memory that the thread's next one takes over: new memory costs ten
    times what the conversion does. A linear runs alone, and hands its weight to nobody."""
    kept: Tensor | None = getattr(_memory, "kept", None)
    if kept is None or kept.numel() < value.numel():
        with torch.inference_mode(False):  # one made within can't be written to outside
            _memory.kept = kept = torch.empty(value.numel())
    return kept[: value.numel()].view(value.shape).copy_(value)


def _stand_in(value: Tensor) -> nn.Parameter:
    empty = torch.empty(value.shape, dtype=torch.float32, device="meta")
    return nn.Parameter(empty, requires_grad=False)
