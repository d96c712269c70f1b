"""Estimates memory for bundles without footprints: those of a schema before 7."""

from __future__ import annotations

import math
from collections.abc import Sequence

from edgesd.runtime.bundle import Bundle
from edgesd.runtime.tiles import WINDOWS
from edgesd.spec.bundle import ComponentPart, Footprint, LayerRecipe
from edgesd.spec.scheme import parse_scheme

_LIVE_TENSORS = 18
"""Of a UNet's first block, at once."""

_LIVE_IN_DECODER, _LIVE_IN_HEAD = 4, 10
"""Tensors of a full autoencoder that are in memory at once, about: see `decoder_bytes`."""

_CHANNELS = 320
"""Of that block, where they can't be read: Stable Diffusion's."""

_TEXT_BYTES = 16 << 20
"""Activations of a text encoder, of one prompt."""

_TINY_BYTES, _TINY_PATCHES = 4 * 4 * 64, 3 * 64
"""Of an AutoencoderTiny's decoder for each pixel: four tensors of 64 channels; and of the patches
that convolutions in 8 bits make in ONNX Runtime's own operators."""

_GRAPH_FACTOR = 40
"""Memory of a session for each byte of its graph's file."""

_MOST_OF_A_GRAPH = 64 << 20


def assumed_footprint(
    bundle: Bundle, component: str, part: ComponentPart | None, own: bool
) -> Footprint:
    """An estimate that is rather too large, by what the manifest says of layers and latents.

    own: of the graph for edgesd's own kernels. part: of the decoder's head or tail.
    """
    recipe, engine = bundle.manifest.recipe, bundle.manifest.engines[component]
    layers = [] if recipe is None else [la for la in recipe.layers if la.component == component]
    on_disk = bundle.weight_bytes(component)
    passing = min(
        on_disk, 2 * max((la.bytes for la in layers if la.kind != "embedding"), default=0)
    )
    if own:
        weights, streamed, in_file = on_disk, passing, passing
    elif layers:
        weights = streamed = sum(_loaded_bytes(layer) for layer in layers)
        in_file = 0
    else:
        weights = streamed = on_disk * (2 if engine.precision == "fp16" else 1)
        in_file = 0 if engine.precision == "fp16" else streamed
    if part is not None:
        copies = 1 if own or engine.precision == "fp32" else 3 if engine.precision == "fp16" else 5
        weights = streamed = copies * part.weight_bytes
        in_file = 0 if copies > 1 else streamed
    graph = min(_MOST_OF_A_GRAPH, _GRAPH_FACTOR * bundle.size((part or engine).path))
    split = engine.split
    tail = part is not None and split is not None and part == split.tail
    units = max(WINDOWS) ** 2 if tail else 1
    touched = _activations(bundle, component, part is not None, bool(layers) and not own)
    if tail:
        side = max(WINDOWS)
        touched = decoder_bytes(bundle.manifest.pipeline.latent.levels or (0,), side, side)
    return Footprint(weights, 0, streamed, in_file, graph, ((units, touched, 0),))


def _activations(bundle: Bundle, component: str, head: bool, patches: bool) -> int:
    """Bytes for each unit of the component's input. head: of a decoder's."""
    latent, recipe = bundle.manifest.pipeline.latent, bundle.manifest.recipe
    if component == "text_encoder":
        return _TEXT_BYTES
    if component == "unet":
        layers = () if recipe is None else recipe.layers
        first = [la.shape[0] for la in layers if (la.component, la.name) == ("unet", "conv_in")]
        return _LIVE_TENSORS * 4 * (first[0] if first else _CHANNELS) * (2 if patches else 1)
    if latent.levels is None:
        return (_TINY_BYTES + (_TINY_PATCHES if patches else 0)) * latent.scale_factor**2
    return head_bytes(latent.levels) if head else decoder_bytes(latent.levels, 1, 1)


def _loaded_bytes(layer: LayerRecipe) -> int:
    """Memory of one quantized layer's weights in a session of ONNX Runtime's own operators: what is
    computed with (fp32, int8, or packed 4 bits), its file, and its branch in fp32."""
    scheme = None if layer.scheme == "fp16" else parse_scheme(layer.scheme)
    if scheme is None:
        per_weight = 4
    elif layer.kind == "embedding":
        per_weight = 1
    elif layer.kind == "linear" and scheme.weight_bits == 4:
        per_weight = 0
    else:
        per_weight = 1 if scheme.activation_bits == 8 else 4
    return per_weight * math.prod(layer.shape) + 2 * layer.bytes


def decoder_bytes(levels: Sequence[int], height: int, width: int) -> int:
    """Memory of the activations of a full autoencoder's decoder that is run as a whole, about.

    levels: its channels, coarsest first (512, 512, 256, 128); each level but the first is twice as
    large as the one before, and begins with the channels of that one. height, width: in latents.

    The largest tensor is that after the last upsampling, with the channels of the level before. At
    once there are a residual block's input, its norm, what SiLU makes of that, and a fourth: the
    convolution's output, or buffers that are kept for later. 4 x 4 bytes x channels x pixels:
    measured are 3.4 to 4.0 (docs/cpu.md).
    """
    sizes = [levels[max(0, level - 1)] << (2 * level) for level in range(len(levels))]
    return _LIVE_IN_DECODER * 4 * max(sizes) * height * width


def head_bytes(levels: Sequence[int]) -> int:
    """The same of its head, for each latent: attention has 5 tensors of the first level at once,
    and features are copied on their way out."""
    return _LIVE_IN_HEAD * 4 * levels[0]
