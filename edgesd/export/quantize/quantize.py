"""One layer under one scheme and method."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edgesd.errors import EdgesdError
from edgesd.export.calibrate import LayerStats
from edgesd.export.quantize.activations import (
    activation_mode,
    channel_group,
    fake_quantize,
    smoothing,
    static_ranges,
)
from edgesd.export.quantize.blocks import spans
from edgesd.export.quantize.layers import Activations, Layer, QuantizedLayer
from edgesd.export.quantize.method import Method, Problem, plain_branch
from edgesd.export.quantize.rounding import rounded
from edgesd.runtime.arrays import Float
from edgesd.spec.scheme import Scheme

VERSIONS = {False: 7, True: 8}
"""Part of the cache key: raised when methods change their results, or their file its form. True: of
those that use the inputs' covariance."""

_PRIOR = 0.1
"""Rows without correlations for each column; 1 loses as much where there are rows enough."""

_ALPHAS = (0.25, 0.5, 0.75)
_WORTHWHILE = 0.7
"""The error must fall to this part for smoothing to be worth it: it costs a multiplication per run,
and a small gain on sampled rows is a loss in images (docs/quantization.md)."""
_SHARED_WORTHWHILE = {8: _WORTHWHILE, 4: 0.9}
"""The same of what several layers share, by bits of the inputs."""


@dataclass(frozen=True)
class _Inputs:
    """Statistics of a layer's input, as tensors."""

    blocks: list[Tensor]
    rows: Tensor
    steps: Tensor
    low: Tensor
    high: Tensor

    @property
    def ranges(self) -> Tensor:
        """Smallest and largest value of the whole input at each timestep [T, 2]."""
        return torch.stack([self.low.amin(1), self.high.amax(1)], 1)

    @property
    def channel_max(self) -> Tensor:
        """Largest magnitude of each channel over all timesteps [C]."""
        return torch.maximum(self.low.abs(), self.high.abs()).amax(0)

    def divided(self, smooth: Tensor) -> _Inputs:
        """The statistics of inputs divided by `smooth` [C]."""
        wide = _per_column(smooth, self.rows.shape[1])
        blocks = [block / wide[span, None] / wide[span] for span, block in spans(self.blocks)]
        return _Inputs(blocks, self.rows / wide, self.steps, self.low / smooth, self.high / smooth)


def quantize_layer(
    layer: Layer,
    weight: Float,
    stats: LayerStats | None,
    scheme: Scheme,
    method: Method,
    shared: Callable[[], Float | None] | None = None,
) -> QuantizedLayer:
    """Quantize weight [N, K]. stats: None for an embedding, and where nothing was recorded.
    shared: gives the smoothing of all layers that read this one's input (`joint_smoothing`); not
    called where none is to be chosen. Without it the layer gets its own.

    Raises EdgesdError when the weight or the statistics hold NaN or infinite values.
    """
    if not np.isfinite(weight).all():
        raise EdgesdError(f"{layer.component}: {layer.name} holds NaN or infinite weights")
    matrix = torch.from_numpy(np.array(weight, np.float32))
    if layer.kind == "embedding":  # rows are read, not multiplied: no kernel wants them in 4 bits
        scheme = Scheme(8, 16)
    group = scheme.group or layer.columns
    if stats is None or not stats.count:
        return _blind(layer, matrix, scheme, group)
    source, recorded = matrix, _inputs(layer, stats)
    mode = activation_mode(layer, scheme, method.static)
    smooth = None
    if method.smooths and mode != "none":
        if shared is None:
            smooth = _best_smoothing(layer, [matrix], recorded, scheme, mode, method)
        elif (common := shared()) is not None:
            smooth = torch.from_numpy(common)
    inputs = recorded
    if smooth is not None:
        matrix, inputs = matrix * _per_column(smooth, layer.columns), recorded.divided(smooth)
    acts = _activations(layer, inputs, scheme, mode, method, smooth)
    rank = min(scheme.rank, *matrix.shape)

    def noise() -> Tensor | None:
        return _noise(layer, inputs, acts) if mode != "none" else None

    problem = Problem(matrix, scheme.weight_bits, group, rank, inputs.blocks, noise)
    codes, scales, up, down = method.represent(problem)
    result = QuantizedLayer(
        layer=layer,
        scheme=scheme,
        method=method.label,
        stored=codes.numpy(),
        scales=scales.half().numpy(),
        group=group,
        smooth=None if smooth is None else smooth.numpy(),
        down=down.half().numpy() if rank else None,
        up=up.half().numpy() if rank else None,
        activations=acts,
    )
    return replace(result, error=_error(result, source, recorded))


def joint_smoothing(
    layer: Layer, weights: Iterable[Float], stats: LayerStats, scheme: Scheme, method: Method
) -> Float | None:
    """The smoothing [C] that is best for all layers that read one input; None where it doesn't pay.

    weights [N, K] of each, in an order that doesn't depend on which of them `layer` is. Raises
    EdgesdError when the statistics hold NaN or infinite values.
    """
    matrices = [torch.from_numpy(np.array(weight, np.float32)) for weight in weights]
    mode = activation_mode(layer, scheme, method.static)
    pays = _SHARED_WORTHWHILE[scheme.activation_bits]
    found = _best_smoothing(layer, matrices, _inputs(layer, stats), scheme, mode, method, pays)
    if found is None:
        return None
    smooth: Float = found.numpy()
    return smooth


def rounded_layer(layer: Layer, weight: Float, scheme: Scheme) -> QuantizedLayer:
    """Quantize weight [N, K] by rounding alone, without calibration: inputs of 8 bits get their
    ranges as they come, and the branch is the weight's own. For measuring speed and memory."""
    matrix = torch.from_numpy(np.array(weight, np.float32))
    if layer.kind == "embedding":
        scheme = Scheme(8, 16)
    group = scheme.group or layer.columns
    mode = activation_mode(layer, scheme, False)
    rank = min(scheme.rank, *matrix.shape)
    up, down = plain_branch(matrix, 0)
    if rank:  # the whole SVD of a large matrix takes a minute, and would be as fast to compute with
        left, values, right = torch.svd_lowrank(matrix, rank)
        up, down = (left * values).half().float(), right.T.half().float()
    codes, scales, _ = rounded(matrix - up @ down, group, scheme.weight_bits)
    bits = scheme.activation_bits
    acts = {
        "none": Activations(),
        "dynamic": Activations("dynamic", 8),
        "group": Activations(
            "group", bits, channel_group(layer, scheme), shift=_shift(layer, scheme, None)
        ),
    }[mode]
    return QuantizedLayer(
        layer=layer,
        scheme=scheme,
        method="rtn",
        stored=codes.numpy(),
        scales=scales.half().numpy(),
        group=group,
        down=down.half().numpy() if rank else None,
        up=up.half().numpy() if rank else None,
        activations=acts,
    )


def layer_error(quantized: QuantizedLayer, weight: Float, stats: LayerStats | None) -> float:
    """RMS of the change of the layer's output over RMS of the output, on the sampled rows.

    Without rows (an embedding): of the weight itself.
    """
    inputs = None if stats is None or not stats.count else _inputs(quantized.layer, stats)
    return _error(quantized, torch.from_numpy(np.array(weight, np.float32)), inputs)


def _error(quantized: QuantizedLayer, source: Tensor, inputs: _Inputs | None) -> float:
    if inputs is None:
        wanted, found = source, torch.from_numpy(quantized.effective_weight())
    else:
        wanted = inputs.rows @ source.T
        if quantized.smooth is not None:
            inputs = inputs.divided(torch.from_numpy(quantized.smooth))
        low = fake_quantize(
            inputs.rows, quantized.activations, quantized.layer, inputs.ranges, inputs.steps
        )
        found = low @ torch.from_numpy(quantized.residual()).T
        if quantized.rank:
            found += inputs.rows @ torch.from_numpy(quantized.branch()).T
    scale = float(wanted.square().mean())
    return math.sqrt(float((found - wanted).square().mean()) / scale) if scale > 0 else 0.0


def _blind(layer: Layer, matrix: Tensor, scheme: Scheme, group: int) -> QuantizedLayer:
    """Round to nearest, for a layer without statistics."""
    codes, scales, _ = rounded(matrix, group, scheme.weight_bits)
    result = QuantizedLayer(
        layer=layer,
        scheme=Scheme(scheme.weight_bits, 16, scheme.group),
        method="rtn",
        stored=codes.numpy(),
        scales=scales.half().numpy(),
        group=group,
    )
    return replace(result, error=_error(result, matrix, None))


def _inputs(layer: Layer, stats: LayerStats) -> _Inputs:
    parts: list[npt.NDArray[Any]] = [stats.low, stats.high, stats.rows, *stats.blocks]
    for part in parts:
        if not np.isfinite(part).all():
            raise EdgesdError(
                f"{layer.component}: the inputs of {layer.name} aren't finite in calibration"
            )
    return _Inputs(
        blocks=[_shrunk(torch.from_numpy(block), stats.count) for block in stats.blocks],
        rows=torch.from_numpy(stats.rows.astype(np.float32)),
        steps=torch.from_numpy(stats.row_steps),
        low=torch.from_numpy(stats.low),
        high=torch.from_numpy(stats.high),
    )


def _shrunk(block: Tensor, count: int) -> Tensor:
    """Covariance [B, B] of the sum of x x^T over `count` rows, as if there had been _PRIOR * B rows
    more whose columns don't correlate.

    What few rows say of correlations is partly chance: codes and branches that are fitted to that
    lose on other prompts (docs/quantization.md). With many rows next to nothing changes.
    """
    shrunk = block / (count + _PRIOR * len(block))
    shrunk.diagonal().copy_(block.diagonal() / count)
    return shrunk


def _per_column(values: Tensor, columns: int) -> Tensor:
    """Values [C] of channels, repeated for every tap -> [K]."""
    return values.repeat(columns // len(values))


def _noise(layer: Layer, inputs: _Inputs, acts: Activations) -> Tensor:
    """RMS of the change that the number format makes to each column of the input [K]."""
    low = fake_quantize(inputs.rows, acts, layer, inputs.ranges, inputs.steps)
    return (low - inputs.rows).square().mean(0).sqrt()


def _activations(
    layer: Layer, inputs: _Inputs, scheme: Scheme, mode: str, method: Method, smooth: Tensor | None
) -> Activations:
    if mode == "none":
        return Activations()
    if mode == "static":
        return static_ranges(inputs.ranges)
    if mode == "group":
        shift = _shift(layer, scheme, smooth) if "unsigned" in method.measures else None
        group = channel_group(layer, scheme)
        return Activations("group", scheme.activation_bits, group, shift=shift)
    return Activations("dynamic", 8)


def _shift(layer: Layer, scheme: Scheme, smooth: Tensor | None) -> Float | None:
    """What makes a smoothed input positive [C], so that it needs no sign; None where nothing does.

    In 8 bits it would gain nothing: kernels have a zero point, or no unsigned codes.
    """
    if not layer.floor or scheme.activation_bits == 8:
        return None
    smooth = torch.ones(layer.channels) if smooth is None else smooth
    shift: Float = (layer.floor / smooth).numpy()
    return shift


def _best_smoothing(
    layer: Layer,
    matrices: Sequence[Tensor],
    inputs: _Inputs,
    scheme: Scheme,
    mode: str,
    method: Method,
    pays: float = _WORTHWHILE,
) -> Tensor | None:
    """The smoothing [C] whose rounding to nearest loses least over the weights of all layers that
    read the input; None where the error doesn't fall to the part `pays`."""
    acts = _activations(layer, inputs, scheme, mode, method, None)
    peaks = torch.stack([each.abs().amax(0) for each in matrices])
    wanted = [inputs.rows @ each.T for each in matrices]
    best = _trial(layer, matrices, wanted, None, inputs, acts, scheme) * pays
    chosen: Tensor | None = None
    for alpha in _ALPHAS:
        smooth = smoothing(inputs.channel_max, peaks, alpha)
        divided = inputs.divided(smooth)
        acts = _activations(layer, divided, scheme, mode, method, smooth)
        error = _trial(layer, matrices, wanted, smooth, divided, acts, scheme)
        if error < best:
            best, chosen = error, smooth
    return chosen


def _trial(
    layer: Layer,
    matrices: Sequence[Tensor],
    outputs: Sequence[Tensor],
    smooth: Tensor | None,
    inputs: _Inputs,
    acts: Activations,
    scheme: Scheme,
) -> float:
    """RMS of the layers' errors, each relative to its output, when codes are rounded to nearest.

    outputs: of each, without any error. inputs: divided by `smooth`.
    """
    low = fake_quantize(inputs.rows, acts, layer, inputs.ranges, inputs.steps)
    total = 0.0
    for source, wanted in zip(matrices, outputs, strict=True):
        matrix = source if smooth is None else source * _per_column(smooth, layer.columns)
        if not scheme.rank:  # else the branch takes care of the weights: judge the inputs
            matrix = rounded(matrix, scheme.group or layer.columns, scheme.weight_bits)[2]
        lost = float((low @ matrix.T - wanted).square().sum())
        total += lost / max(float(wanted.square().sum()), 1e-30)
    return math.sqrt(total / len(matrices))
