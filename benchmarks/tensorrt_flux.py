"""Plans that TensorRT-RTX builds of FLUX.1's transformer at its true width, without a GPU.

python -m benchmarks.tensorrt_flux --work FOLDER [--blocks DOUBLE,SINGLE ...] [--precision NAME]
    [--size 512] [--tokens 512] [--sm sm_89] [--json FILE]

Weights are random, and shared between layers as far as memory asks for it: sizes, types and kernels
are the published model's, for as many blocks of both kinds as are asked for (all: 19,38). What
edgesd's own exporter makes of diffusers' network is lowered as `edgesd build` does, linted, and
built for a desktop GPU; all linears of blocks are quantized. Differences between rows are what a
block takes: bytes of weights, of the plan, of a GPU's memory while it runs, and of the build.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import diffusers
import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from benchmarks.common import environment, parser, run, table, write_json
from benchmarks.tensorrt_builds import weights_of
from edgesd.engines.tensorrt import BuildSpec, build_plan
from edgesd.export.backends.tensorrt import LOWERING
from edgesd.export.backends.tensorrt_lint import check_graph
from edgesd.export.external_data import GRAPH_FILE, write_model
from edgesd.export.families.checkpoint import Checkpoint
from edgesd.export.families.parts.flux_transformer import FluxTransformer, flux_transformer
from edgesd.export.families.parts.shapes import fixed_shape
from edgesd.export.mapped import hold_mapped
from edgesd.export.passes.split_concat import SplitConcat
from edgesd.export.quantize.layers import (
    Activations,
    Layer,
    PackedCodes,
    QuantizedLayer,
    find_layers,
)
from edgesd.export.quiet import quiet
from edgesd.export.to_onnx import graph_from_module
from edgesd.spec.pipeline import LatentSpec
from edgesd.spec.scheme import FLOATING, Scheme, parse_scheme

CONFIG = {"guidance_embeds": False, "axes_dims_rope": (16, 56, 56)}
"""Of schnell; the rest is what diffusers' class takes by itself."""
_LATENTS = LatentSpec(16, 8, 0.3611)
_POOL = (1 << 26) + 9
"""Bytes that random codes and factors are read from."""


class Row(NamedTuple):
    """A plan. weights_m: of the network, and how many of them are quantized; the rest as in
    tensorrt_builds.Row."""

    blocks: str
    precision: str
    weights_m: float
    quantized_m: float
    plan_mb: float
    gpu_mb: float
    run_mb: float
    seconds: float
    peak_mb: float


def network(double: int, single: int) -> Any:
    """FLUX.1's transformer of so many blocks. Weights of one shape share their values."""
    with torch.device("meta"):
        net = diffusers.FluxTransformer2DModel(
            num_layers=double, num_single_layers=single, **CONFIG
        )
    rng = torch.Generator().manual_seed(0)
    shared: dict[tuple[int, ...], torch.Tensor] = {}
    for module in net.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            shape = tuple(weight.shape)
            if shape not in shared:
                drawn = torch.randn(shape, generator=rng) / shape[-1] ** 0.5
                shared[shape] = drawn.bfloat16()
            setattr(module, name, nn.Parameter(shared[shape].detach(), requires_grad=False))
    net.pos_embed = type(net.pos_embed)(theta=10000, axes_dim=CONFIG["axes_dims_rope"])
    return net.eval()


class Drawn:
    """Quantized layers of random codes, scales and factors, which are views of one pool."""

    def __init__(self) -> None:
        self._pool = np.random.default_rng(0).integers(0, 256, _POOL, np.uint8)
        self._small = (self._pool.astype(np.float16) / 2**14 + np.float16(2**-10))[: _POOL // 4]
        self._at = 0

    def layer(self, layer: Layer, scheme: Scheme) -> QuantizedLayer:
        """A linear under `scheme`, whose inputs are in 16 bits."""
        rows, columns = layer.rows, layer.columns
        four, group = scheme.weight_bits == 4, scheme.group or columns
        codes = self._taken(rows, columns // 2 if four else columns, self._pool)
        rank = scheme.rank
        return QuantizedLayer(
            layer=layer,
            scheme=scheme,
            method="rtn",
            stored=PackedCodes(codes, (rows, columns)) if four else codes.view(np.int8),
            scales=self._taken(rows, -(-columns // group), self._small),
            group=group,
            down=self._taken(rank, columns, self._small) if rank else None,
            up=self._taken(rows, rank, self._small) if rank else None,
            activations=Activations(),
        )

    def _taken(self, rows: int, columns: int, pool: np.ndarray) -> np.ndarray:
        """The next values, from where the last ones began and a little further."""
        count = rows * columns
        self._at = (self._at + 4099) % (len(pool) - count)
        return pool[self._at : self._at + count].reshape(rows, columns)


def graph(
    double: int, single: int, precision: str, side: int, tokens: int
) -> tuple[ir.Model, dict[str, QuantizedLayer]]:
    """The lowered graph for one image of `side` pixels, and its quantized layers by node."""
    with quiet():
        net = network(double, single)
        positions, shape = side // 16, fixed_shape((side, side), 1, 16, 16)
        unit = _LATENTS.scale_factor
        nowhere = cast(Checkpoint, None)  # nothing is loaded
        component = flux_transformer(nowhere, "transformer", net.config, tokens, shape, _LATENTS)
        hold_mapped(net)
        model = graph_from_module(FluxTransformer(net, positions, unit), component, "ort-mha")
    if precision in FLOATING:
        LOWERING.lower(model, precision)
        return model, {}
    SplitConcat()(model)
    drawn, scheme = Drawn(), parse_scheme(precision)
    layers = {
        layer.node: drawn.layer(layer, scheme)
        for layer in find_layers("transformer", model)
        if "transformer_blocks." in layer.name
    }
    LOWERING.lower_quantized(model, layers, (), None)
    return model, layers


def rows(
    counts: list[tuple[int, int]], precision: str, side: int, tokens: int, sm: str, work: Path
) -> Iterator[Row]:
    """A plan for each number of blocks."""
    for double, single in counts:
        folder = work / "graph"
        shutil.rmtree(folder, ignore_errors=True)
        model, layers = graph(double, single, precision, side, tokens)
        parameters = sum(each.layer.rows * each.layer.columns for each in layers.values())
        write_model(model, folder)
        del model, layers
        check_graph(folder / GRAPH_FILE, "transformer")
        whole = parameters or weights_of(folder / GRAPH_FILE)
        plan = work / "transformer.plan"
        report = build_plan(folder / GRAPH_FILE, BuildSpec("transformer", "tensorrt_rtx", sm), plan)
        plan.unlink()
        yield Row(
            blocks=f"{double} double, {single} single",
            precision=precision,
            weights_m=whole / 1e6,
            quantized_m=parameters / 1e6,
            plan_mb=report.plan_bytes / 1e6,
            gpu_mb=(report.weight_bytes or 0) / 1e6,
            run_mb=(report.activation_bytes or 0) / 1e6,
            seconds=report.seconds,
            peak_mb=report.peak_bytes / 1e6,
        )
        shutil.rmtree(folder)


def _blocks(text: str) -> tuple[int, int]:
    double, single = text.split(",")
    return int(double), int(single)


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--work", type=Path, required=True, help="folder for what is kept")
    made.add_argument("--blocks", type=_blocks, nargs="+", default=[(1, 1), (1, 2), (2, 1)])
    made.add_argument("--precision", default="w4a16-g64-lr32")
    made.add_argument("--size", type=int, default=512)
    made.add_argument("--tokens", type=int, default=512, help="of the text")
    made.add_argument("--sm", default="sm_89", help="GPU that TensorRT-RTX builds for")
    given = made.parse_args()
    found = []
    for row in rows(given.blocks, given.precision, given.size, given.tokens, given.sm, given.work):
        print(table(Row._fields, [row]), flush=True)
        found.append(row)
    print()
    print(table(Row._fields, found))
    write_json(
        given.json,
        {
            "environment": environment("onnx"),
            "size": given.size,
            "tokens": given.tokens,
            "sm": given.sm,
            "rows": [row._asdict() for row in found],
        },
    )


if __name__ == "__main__":
    run(main)
