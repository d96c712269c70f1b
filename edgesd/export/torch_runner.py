"""A component's torch source as a runner, so that calibration runs the device's own loop."""

from __future__ import annotations

import time

import msgspec
import torch
from torch import nn

from edgesd.runtime.backends.base import BoundRunner
from edgesd.spec.pipeline import ComponentSpec


class TorchRunner(BoundRunner):
    """Runs `module`, which takes the inputs of `spec` in order, on the CPU in fp32."""

    def __init__(self, spec: ComponentSpec, module: nn.Module) -> None:
        super().__init__(spec)
        self.module = module

    def run(self) -> None:
        start = time.perf_counter()
        with torch.inference_mode():
            out = self.module(*(torch.from_numpy(array) for array in self.inputs.values()))
        outputs = out if isinstance(out, tuple) else (out,)
        for tensor, value in zip(self.spec.outputs, outputs, strict=True):
            array = value.numpy()
            if tensor.name in self.outputs:
                self.outputs[tensor.name][...] = array
            else:
                self.outputs[tensor.name] = array.copy()
        self.seconds += time.perf_counter() - start


def any_batch(spec: ComponentSpec) -> ComponentSpec:
    """The same component for any batch and, in embeddings [batch, tokens, C], any number of tokens,
    which a source takes also where its graph is to have fixed ones."""
    inputs = []
    for tensor in spec.inputs:
        shape = tensor.shape
        if len(shape) == 3:
            shape = "batch", "tokens", shape[2]
        elif len(shape) > 1 or shape != (1,):
            shape = "batch", *shape[1:]
        inputs.append(msgspec.structs.replace(tensor, shape=shape))
    return msgspec.structs.replace(spec, inputs=tuple(inputs))
