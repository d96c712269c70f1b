"""A pipeline that optimum exported to ONNX: its weights are read back into diffusers' networks.

Graphs as given would be of no use: what calibration records, passes rewrite and boards run are
edgesd's own exports. The exporter names nodes by the modules that they come from, which tells where
a weight belongs whose own name was lost, as those of matrices are. The networks that come out of it
are then held to the graphs: both compute the same inputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgesd.errors import InputError
from edgesd.export.families import family_of
from edgesd.export.source.folder import (
    INDEX,
    ModelSource,
    class_name_of,
    read_json_object,
)
from edgesd.export.source.layouts import ConfigFolder
from edgesd.export.source.names import known_name
from edgesd.export.source.pointers import check_no_pointer
from edgesd.text import first_sentence

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import Tensor, nn

    from edgesd.runtime.arrays import Array

GRAPH = "model.onnx"
_PARTS = ("encoder", "decoder")
"""What optimum adds to the folder's name of a network that it exports as two graphs."""
_CLASS_PREFIXES = ("ORT", "Onnx")
"""Of pipelines: optimum's, and diffusers' older ones."""

_PLACES: Mapping[str, Mapping[int, str]] = {
    "Add": {0: "bias", 1: "bias"},
    "Conv": {1: "weight", 2: "bias"},
    "ConvTranspose": {1: "weight", 2: "bias"},
    "Gather": {0: "weight"},
    "Gemm": {1: "weight", 2: "bias"},
    "GroupNormalization": {1: "weight", 2: "bias"},
    "LayerNormalization": {1: "weight", 2: "bias"},
    "MatMul": {1: "weight"},
    "Mul": {0: "weight", 1: "weight"},
}
"""Operator -> which of its inputs is which parameter of the module that it comes from."""

_QUANTIZED = ("quantize", "qlinear", "integer")
"""In names of operators of quantized graphs, in small letters."""
_LOOPS = ("Loop", "Scan")
"""Operators that no network of a pipeline has; running one may take for ever."""
_TYPES = ("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE")


@dataclass(frozen=True, kw_only=True)
class OnnxFolder(ModelSource):
    """A folder as optimum writes it: model.onnx and config.json for each graph.

    made: the configs of networks that are more than one graph. held: components that were compared
    with their graphs.
    """

    made: ConfigFolder
    held: set[str] = field(default_factory=set)

    def folder(self, name: str) -> Path:
        """The folder of a component's config, a tokenizer or the scheduler."""
        made = self.made.root / name
        return made if name not in self.others and made.is_dir() else super().folder(name)

    def state(self, component: str, net: nn.Module) -> Mapping[str, Tensor] | None:
        """The weights of `net` by the names in its state dict, from its graphs. Raises InputError
        where a graph isn't of this network, was quantized, or has fused operators."""
        if component in self.others:
            return super().state(component, net)
        found: dict[str, Tensor] = {}
        for graph in self._graphs(component):
            found |= _weights_of(graph, _load(graph), net)
        for name in net.state_dict():
            if name not in found:
                raise InputError(
                    f"{self.root}: the graphs of its {component} lack {name}: give the diffusers "
                    "folder that they were exported from"
                )
        return found

    def check_network(self, component: str, net: nn.Module) -> None:
        """Hold a network with its weights to its graphs. Raises InputError for another result."""
        if component in self.others or component in self.held:
            return super().check_network(component, net)
        from edgesd.export.families.parts.optimum import hold_to_graph

        for graph in self._graphs(component):
            hold_to_graph(graph, net)
        self.held.add(component)
        return None

    def parameters(self, component: str) -> int:
        """Number of weights of a component."""
        if component in self.others:
            return super().parameters(component)
        models = map(_load, self._graphs(component))
        return sum(
            value.const_value.size
            for model in models
            for value in model.graph.initializers.values()
            if value.const_value is not None
        )

    def _graphs(self, component: str) -> list[Path]:
        """The graphs of a component. Raises InputError for one that is missing."""
        single = self.root / component / GRAPH
        parts = [self.root / f"{component}_{part}" / GRAPH for part in _PARTS]
        graphs = [single] if single.is_file() or not any(p.is_file() for p in parts) else parts
        for path in graphs:
            if not path.is_file():
                raise InputError(f"{path} is missing: is this optimum's whole export?")
            check_no_pointer(path)
        return graphs

    def _files(self) -> list[tuple[str, Path]]:
        found = self._config_files()
        for component in self._own_networks:
            folders = [graph.parent for graph in self._graphs(component)]
            found += self._named(
                path
                for folder in folders
                for path in sorted(folder.iterdir())
                if path.is_file() and path.suffix != ".json"
            )
        return found

    def _config_files(self) -> list[tuple[str, Path]]:
        configs = [
            (f"{component}/config.json", self.folder(component) / "config.json")
            for component in self._own_networks
        ]
        return [*self._named([self.root / INDEX]), *configs, *self._text_files()]


def is_onnx_folder(root: Path) -> bool:
    """Whether the folder `root` holds graphs, and no weights for PyTorch."""
    weights = (".safetensors", ".bin")
    return any(root.glob(f"*/{GRAPH}")) and not any(p.suffix in weights for p in root.glob("*/*"))


def open_onnx_folder(name: str, root: Path) -> OnnxFolder:
    """Open a pipeline that optimum exported. Raises InputError for a folder that isn't one."""
    given = read_json_object(root / INDEX)
    class_name = class_name_of(root / INDEX, given)
    for prefix in _CLASS_PREFIXES:
        class_name = class_name.removeprefix(prefix)
    family = family_of(class_name, name)
    made, index = ConfigFolder(), {**given, "_class_name": class_name}
    for component in family.weights:
        folder = root / component
        if not (folder / "config.json").is_file():
            folder = root / f"{component}_{_PARTS[-1]}"
        if not folder.is_dir():
            continue  # a component that this pipeline hasn't
        config = read_json_object(folder / "config.json")
        index[component] = _class_of(folder / "config.json", config)
        if folder.name != component:
            made.write(f"{component}/config.json", config)
    return OnnxFolder(name, root, index, family, made=made)


def _class_of(path: Path, config: Mapping[str, Any]) -> list[str]:
    """Library and class of the network whose config is in `path`. Raises InputError."""
    own, architectures = config.get("_class_name"), config.get("architectures")
    if isinstance(own, str):
        return ["diffusers", own]
    if isinstance(architectures, list) and architectures and isinstance(architectures[0], str):
        return ["transformers", architectures[0]]
    raise InputError(f"{path} names no class (_class_name or architectures): is it optimum's?")


def _load(path: Path) -> ir.Model:
    """The graph in `path`, whose weights stay in their files. Raises InputError for one that isn't
    as the exporter left it, or reads files outside of its folder."""
    import onnx_ir as ir

    try:
        model = ir.load(path)
        nodes = list(model.graph.all_nodes())
    except Exception as exc:  # of many libraries
        raise InputError(f"cannot read {path}: {first_sentence(exc)}") from exc
    for node in nodes:
        if node.domain not in ("", "ai.onnx") or any(
            word in node.op_type.lower() for word in _QUANTIZED
        ):
            kind = node.op_type[:60] + (f" of {node.domain[:60]}" if node.domain else "")
            raise InputError(
                f"{path} has a {kind}: it was fused or quantized for ONNX Runtime; give the export "
                "before that (optimum-cli export onnx without --optimize and --quantize)"
            )
        if node.op_type in _LOOPS:
            raise InputError(f"{path} has a {node.op_type}: it isn't a network of a pipeline")
    for tensor in _tensors(model):
        if isinstance(tensor, ir.ExternalTensor):
            place = Path(tensor.path).resolve()
            if place.parent != path.parent.resolve() or not place.is_file():
                raise InputError(
                    f"{path}: the weight {str(tensor.name)[:80]} is in "
                    f"{str(tensor.location)[:80]}, which isn't a file beside the graph: export the "
                    "model again"
                )
    return model


def _tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    """All that a graph holds, in its nodes, too, and in the graphs within it."""
    import onnx_ir as ir

    for graph in (model.graph, *model.graph.subgraphs()):
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value.const_value
    for node in model.graph.all_nodes():
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.TENSOR:
                yield attribute.as_tensor()
            elif attribute.type == ir.AttributeType.TENSORS:
                yield from attribute.as_tensors()


def _weights_of(path: Path, model: ir.Model, net: nn.Module) -> dict[str, Tensor]:
    """The parameters of `net` that the graph has. Raises InputError for one of another shape."""
    wanted = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    found: dict[str, Tensor] = {}
    for name, value, transposed in _uses(model):
        known = known_name(name, wanted)
        if known in wanted and known not in found:
            found[known] = _tensor(path, known, value, wanted[known], transposed)
    return found


def _uses(model: ir.Model) -> Iterator[tuple[str, ir.Value, bool]]:
    """Name of a parameter, where the graph has it, and whether it is transposed there.

    By the nodes first: equal weights are one initializer, under the name of the first.
    """
    for node in model.graph:
        module = ".".join(str(node.name).strip("/").split("/")[:-1])
        for index, leaf in _PLACES.get(node.op_type, {}).items():
            value = _source_of(node.inputs[index]) if index < len(node.inputs) else None
            if value is not None and value.is_initializer():
                gemm = node.op_type == "Gemm" and not node.attributes.get_int("transB", 0)
                yield (
                    f"{module}.{leaf}",
                    value,
                    leaf == "weight" and (gemm or node.op_type == "MatMul"),
                )
    for name, value in model.graph.initializers.items():
        yield name, value, False


def _source_of(value: ir.Value | None) -> ir.Value | None:
    """What a value is a copy of: equal weights are one initializer, and copies of it."""
    seen = set[Any]()  # a graph from outside may have a circle of them
    while value is not None and (node := value.producer()) and node.op_type == "Identity":
        if value in seen:
            return None
        seen.add(value)
        value = node.inputs[0] if node.inputs else None
    return value


def _tensor(
    path: Path, name: str, value: ir.Value, shape: tuple[int, ...], transposed: bool
) -> Tensor:
    """A parameter of a network. Raises InputError unless the graph has it in its shape, or one that
    only lacks or adds axes of length 1."""
    assert value.const_value is not None
    given = tuple(value.const_value.shape.numpy())
    found = given[::-1] if transposed and len(given) == 2 else given
    if [n for n in found if n != 1] != [n for n in shape if n != 1]:
        raise InputError(
            f"{path}: {name} has the shape {list(found)}, and its config asks for {list(shape)}: "
            "do graph and config belong to one model?"
        )
    dtype = value.const_value.dtype.name
    if dtype not in _TYPES:
        raise InputError(f"{path}: {name} is stored as {dtype}: expected {', '.join(_TYPES)}")
    try:
        tensor = _as_torch(value.const_value.numpy())
    except Exception as exc:  # of numpy, and of the operating system
        raise InputError(f"cannot read {name} of {path}: {first_sentence(exc)}") from exc
    return (tensor.T if transposed and tensor.ndim == 2 else tensor).reshape(shape)


def _as_torch(array: Array) -> Tensor:
    """A tensor of the same memory."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is mapped can't be written, and isn't
        if array.dtype.name == "bfloat16":  # which NumPy knows by an extension only
            return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
        return torch.from_numpy(array)
