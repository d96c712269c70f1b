"""A torch module becomes an ONNX graph."""

from __future__ import annotations

import inspect
import re
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim

from edgesd import __version__
from edgesd.errors import EdgesdError
from edgesd.export.attention import Lowering, replace_attention, translation_table
from edgesd.export.families import MAX_BATCH, Component
from edgesd.export.mapped import release
from edgesd.export.parity import example_inputs
from edgesd.export.passes.bind import BindWeights
from edgesd.export.passes.check import MAX_IR_VERSION, OPSET, CheckGraph
from edgesd.export.passes.dims import NameDims
from edgesd.export.passes.names import StableNames
from edgesd.export.passes.tidy import Tidy
from edgesd.export.quiet import quiet
from edgesd.spec.pipeline import ComponentSpec, size_of
from edgesd.text import first_sentence

_ANY_NUMBER = inspect.Parameter.VAR_POSITIONAL


def graph_from_module(module: nn.Module, component: Component, lowering: Lowering) -> ir.Model:
    """Export `module`, whose attention is replaced in place, with the inputs of component.spec.

    The module is left without its weights (see `release`), which the graph reads where the module
    had them. Raises EdgesdError when the exporter fails, or the graph breaks a promise of
    `passes.check`.
    """
    attentions = replace_attention(module, lowering)
    spec = component.spec
    example = example_inputs(component, component.sizes[-1], seed=0)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    state = release(module, fake)
    try:
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                module,
                tuple(fake.from_tensor(torch.from_numpy(array)) for array in example.values()),
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=[tensor.name for tensor in spec.inputs],
                output_names=[tensor.name for tensor in spec.outputs],
                dynamic_shapes=_dynamic_shapes(module, component),
                custom_translation_table=translation_table(),
                optimize=False,  # it would need the weights
            )
            assert program is not None
            model = program.model
            BindWeights(state)(model)
    except EdgesdError:
        raise
    except Exception as exc:  # the exporter raises errors of many libraries
        raise EdgesdError(
            f"{component.name} could not be exported to ONNX: {_reason(exc)}; "
            "see the chained error with --debug"
        ) from exc
    for rewrite in (Tidy(), StableNames(), NameDims(spec), CheckGraph(attentions, lowering)):
        rewrite(model)
    model.producer_name, model.producer_version = "edgesd", __version__
    model.graph.name = component.name
    model.ir_version = min(model.ir_version, MAX_IR_VERSION)
    return model


def _dynamic_shapes(module: nn.Module, component: Component) -> dict[str, Any] | None:
    """For each input: axis -> torch dimension, a multiple where the network needs it; together for
    a module that takes any number of inputs."""
    spec: ComponentSpec = component.spec
    names = {name for t in spec.inputs for name in t.shape if isinstance(name, str)}
    if not names:
        return None
    whole = {re.split("[*/]", name)[0] for name in names}
    units = {name: component.multiples.get(name, 1) for name in whole}
    roots = {}
    for name in whole:
        top = MAX_BATCH if name == "batch" else None
        roots[name] = Dim(f"{name}_units") if units[name] > 1 else Dim(name, max=top)
    dims = {}
    for name in names:
        root, multiple = roots[re.split("[*/]", name)[0]], size_of(name, units)
        dims[name] = multiple * root if multiple > 1 else root
    shapes = {
        tensor.name: {
            axis: dims[name] for axis, name in enumerate(tensor.shape) if isinstance(name, str)
        }
        for tensor in spec.inputs
    }
    kinds = [each.kind for each in inspect.signature(module.forward).parameters.values()]
    return {"inputs": (*shapes.values(),)} if kinds == [_ANY_NUMBER] else shapes


def _reason(exc: BaseException) -> str:
    """The innermost cause, which says more than the exporter's own summary."""
    while exc.__cause__ is not None:
        exc = exc.__cause__
    return f"{type(exc).__name__}: {first_sentence(exc)}"
