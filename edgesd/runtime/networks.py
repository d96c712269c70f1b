"""Checks that the networks' inputs and outputs fit the wiring.

A manifest may come from anywhere, so everything the loop relies on is checked before loading.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

from edgesd.errors import BundleError, UsageError
from edgesd.runtime.chunks import chunked, fixed_chunks
from edgesd.runtime.flow import flow_of
from edgesd.runtime.tasks import TASKS
from edgesd.spec.base import Dim
from edgesd.spec.build import MOST_CHUNKS
from edgesd.spec.bundle import BundleManifest, SplitComponent
from edgesd.spec.pipeline import (
    ENCODING_TASKS,
    GIVEN_BY_TASKS,
    IMAGE_TASKS,
    SIZE_FILLS,
    ComponentSpec,
    DenoiserSpec,
    Fill,
    InputSpec,
    ModulationSpec,
    Part,
    PipelineSpec,
    SideSpec,
    TensorSpec,
    is_size,
)
from edgesd.spec.scheme import number_format

_FLOAT, _IDS = ("float32", "float16"), ("int64", "int32")
_COLOURS = 3
_PER_TOKEN = 3
"""Rank of embeddings of tokens: [batch, tokens, C]."""

_FEATURE_RANK = 4
"""Of what sides give: [batch, C, h, w]."""

_MODULATED: tuple[Fill, ...] = ("timestep", "guidance", "joined")
"""What a modulation can be filled with."""

_Filled = SideSpec | DenoiserSpec | ModulationSpec
_ANY_SIZE = range(1, 1 << 31)
_GUIDANCE_WIDTHS = range(4, 1 << 16)
"""Of an embedding of the guidance scale: two frequencies at least."""


class _Like(NamedTuple):
    """What a tensor must be: its rank, sizes on some axes, the types it may have. known: axes whose
    size must be a number, since the loop reads it, and which numbers it may be."""

    rank: int
    sizes: Mapping[int, Dim] = {}
    types: tuple[str, ...] = _FLOAT
    known: Mapping[int, range] = {}

    def fits(self, tensor: TensorSpec) -> bool:
        """Whether `tensor` is so."""
        shape = tensor.shape
        return (
            len(shape) == self.rank
            and tensor.dtype in self.types
            and all(shape[axis] == size for axis, size in self.sizes.items())
            and all(_among(shape[axis], sizes) for axis, sizes in self.known.items())
        )


def _among(size: Dim, sizes: range) -> bool:
    """Whether a size is a number of a range; a name would be compared with each of them."""
    return isinstance(size, int) and size in sizes


_Tensors = Mapping[str, _Like]
_FEATURES = {"features": _Like(4, known={1: _ANY_SIZE})}
_COARSE = {"coarse": _Like(4, known={1: _ANY_SIZE})}
_MOMENTS = {"moments": _Like(3)}
_STATISTICS = {
    "statistics": _Like(3, known=dict.fromkeys(range(3), _ANY_SIZE)),
    "own": _Like(1),
    "core": _Like(1, types=("int64",)),
}


def check_networks(manifest: BundleManifest) -> None:
    """Raise BundleError unless the components that the wiring names are there, take and give what
    it names and nothing else, and fit each other and the pipeline's latents; and unless this
    version has what the wiring asks of tasks."""
    pipeline = manifest.pipeline
    components, named = pipeline.components, flow_of(pipeline).components
    for name in named:
        if name not in components:
            raise BundleError(f"{manifest.name} has no {name}: build the bundle again")
    if len(set(named)) != len(named):
        raise BundleError(f"{manifest.name} has a component in two places: build the bundle again")
    for problem in chain(_wiring_problems(pipeline), _network_problems(manifest)):
        raise BundleError(f"{problem}: build the bundle again")
    _check_precisions(manifest)
    wiring = pipeline.wiring
    asked = {one.fill for spec in wiring.filled for one in spec.inputs}
    asked = (asked | {*wiring.denoiser.concat}) & GIVEN_BY_TASKS
    for task in wiring.tasks:
        if missing := sorted(asked - TASKS[task].gives):
            raise BundleError(
                f"{manifest.name} needs {', '.join(missing)} for the task {task!r}, which this "
                "version can't give: upgrade edgesd on this machine"
            )


def _wiring_problems(pipeline: PipelineSpec) -> Iterator[str]:
    """Inputs whose source isn't available when they are filled."""
    wiring, components = pipeline.wiring, pipeline.components
    texts = {text.component for text in wiring.texts}
    sides = {side.component for side in wiring.sides}
    if len({side.name for side in wiring.sides}) != len(wiring.sides):
        yield "two components have one name for requests"
    for spec in wiring.filled:
        side = isinstance(spec, SideSpec)
        once = isinstance(spec, SideSpec) and spec.when == "once"
        if side and sum(one.fill == "control" for one in spec.inputs) != 1:
            yield f"{spec.component} doesn't have exactly one input filled with a control image"
        if len({one.name for one in spec.inputs}) != len(spec.inputs):
            yield f"{spec.component} has an input that is filled twice"
        for one in spec.inputs:
            where = f"{one.name} of {spec.component}"
            if once and one.fill != "control":
                yield f"{where} is filled once, and {one.fill!r} isn't known then"
            modulates = isinstance(spec, ModulationSpec)
            if one.fill == ("side" if side else "control") or (
                one.fill not in _MODULATED if modulates else one.fill == "modulation" and side
            ):
                yield f"{where} is filled with {one.fill!r}, which isn't for it"
            known = sides if one.fill == "side" else texts
            shapes = set()
            for part in one.parts:
                found = part.component in known and components[part.component].output(part.output)
                if not found:
                    yield f"{where} is filled with {part.output} of {part.component}: there is none"
                else:
                    shapes.add(found.shape[:-1])
            if len(shapes) > 1 or () in shapes:
                yield f"{where} is filled with tensors that can't be joined"
    split = wiring.modulation is not None
    counts: list[tuple[_Filled, Fill, int]] = [
        (wiring.denoiser, "sample", 1),
        (wiring.denoiser, "timestep", int(not split)),
        (wiring.denoiser, "modulation", int(split)),
    ]
    if wiring.modulation is not None:
        counts.append((wiring.modulation, "timestep", 1))
    for filled, fill, count in counts:
        if sum(one.fill == fill for one in filled.inputs) != count:
            number = "doesn't have exactly one" if count else "has an"
            yield f"{filled.component} {number} input filled with {fill}"
    if wiring.encoder is None and (tasks := sorted({*wiring.tasks} & {*ENCODING_TASKS})):
        yield f"nothing encodes the images that the task {tasks[0]!r} begins with"
    for task in IMAGE_TASKS:
        if task in wiring.tasks and task not in wiring.strengths:
            yield f"the task {task!r} has no strength"
    if len(set(wiring.denoiser.concat)) != len(wiring.denoiser.concat):
        yield f"{wiring.denoiser.component} has a part of its sample twice"


def _network_problems(manifest: BundleManifest) -> Iterator[str]:
    """Components that aren't as the wiring needs them."""
    pipeline = manifest.pipeline
    wiring, components = pipeline.wiring, pipeline.components
    channels = {1: pipeline.latent.channels}
    for text in wiring.texts:
        spec = components[text.component]
        tokenizer = wiring.tokenizers.get(text.tokenizer)
        if tokenizer is None:
            yield f"{text.component} has no tokenizer {text.tokenizer}"
        else:
            ids = _Like(2, {1: tokenizer.max_tokens}, _IDS)
            yield from _misfits(text.component, spec, {text.input: ids}, None)
    yield from _chunk_problems(pipeline)
    for side in wiring.sides:
        spec = components[side.component]
        yield from _misfits(side.component, spec, _filled(pipeline, side), None)
    if (modulation := wiring.modulation) is not None:
        rows = {modulation.output: _Like(2, known={1: _ANY_SIZE})}
        spec = components[modulation.component]
        yield from _misfits(modulation.component, spec, _filled(pipeline, modulation), rows)
    denoiser, decoder = wiring.denoiser, wiring.decoder
    yield from _misfits(
        denoiser.component,
        components[denoiser.component],
        _filled(pipeline, denoiser),
        {denoiser.output: _Like(4, channels)},
    )
    latents = {decoder.input: _Like(4, channels)}
    image = {decoder.output: _Like(4, {1: _COLOURS})}
    yield from _misfits(decoder.component, components[decoder.component], latents, image)
    if (encoder := wiring.encoder) is not None:
        pixels = {encoder.input: _Like(4, {1: _COLOURS})}
        moments = dict.fromkeys(encoder.outputs, _Like(4, channels))
        yield from _misfits(encoder.component, components[encoder.component], pixels, moments)
        split = manifest.engines[encoder.component].split
        if split is not None:
            yield from _split_problems(split, pixels, moments)
            if 2 ** (len(split.parts) - 1) != pipeline.latent.scale_factor:
                yield f"{encoder.component} has {len(split.parts)} parts"
    split = manifest.engines[decoder.component].split
    if split is not None:
        yield from _misfits("head", split.head.spec, latents, _FEATURES)
        outputs = {**image, **_MOMENTS}
        yield from _misfits("tail", split.tail.spec, {**_FEATURES, **_STATISTICS}, outputs)
        if split.middle:
            yield f"{decoder.component} has more than a head and a tail"


def _split_problems(split: SplitComponent, image: _Tensors, made: _Tensors) -> Iterator[str]:
    """Parts of an encoder that aren't as runtime/tiles.py runs them."""
    taken = image
    for number, part in enumerate(split.parts[:-1], 1):
        name = f"part {number} of the encoder"
        out = {**(_COARSE if number > 1 else _FEATURES), **_MOMENTS}
        yield from _misfits(name, part.spec, {**taken, **_STATISTICS}, out)
        if part.margins is None:
            yield f"{name} has no margins"
        taken = _FEATURES
    yield from _misfits("the tail of the encoder", split.tail.spec, _FEATURES, made)


def _chunk_problems(pipeline: PipelineSpec) -> Iterator[str]:
    """Inputs for the embeddings of tokens that don't all take equally many chunks of a prompt."""
    counts = set()
    most = MOST_CHUNKS if chunked(pipeline.wiring) else 1
    for spec in pipeline.wiring.filled:
        for one in spec.inputs:
            tensor = pipeline.components[spec.component].input(one.name)
            if one.fill != "joined" or tensor is None or len(tensor.shape) != _PER_TOKEN:
                continue
            part = one.parts[0]
            made = pipeline.components[part.component].output(part.output)
            taken, given = tensor.shape[1], made.shape[1] if made else 0
            if isinstance(taken, int) and isinstance(given, int):
                if not 0 < taken <= most * given or taken % given:
                    yield f"{one.name} of {spec.component} takes {taken} tokens of {given}"
                counts.add(taken)
    if len(counts) > 1:
        yield f"{pipeline.wiring.denoiser.component} and its sides take chunks of unlike numbers"
    # What encoders give may be of any length, as the manifest has it.
    if (count := fixed_chunks(pipeline)) is not None and count > MOST_CHUNKS:
        yield f"a prompt is given as {count} chunks, and {MOST_CHUNKS} are the most"


def _filled(pipeline: PipelineSpec, spec: _Filled) -> _Tensors:
    """What the inputs of a component must be like to be filled as its wiring says."""
    channels = pipeline.latent.channels
    widths = {"mask": 1, "masked": channels, "control_latents": channels}
    concat = spec.concat if isinstance(spec, DenoiserSpec) else ()
    fixed = {
        "sample": _Like(4, {1: channels + sum(widths[fill] for fill in concat)}),
        "timestep": _Like(1),
        "guidance": _Like(1),
        "guidance_embedding": _Like(2, known={1: _GUIDANCE_WIDTHS}),
        **{fill: _Like(2, {1: count}) for fill, count in SIZE_FILLS.items()},
        "control": _Like(4, {1: _COLOURS}),
        "pixel_mask": _Like(4, {1: 1}),
        **{fill: _Like(4, {1: width}) for fill, width in widths.items()},
        "modulation": _modulated(pipeline),
    }
    return {
        one.name: _added(pipeline, spec, one)
        if one.fill == "side"
        else _joined(pipeline, one.parts)
        if one.parts
        else fixed[one.fill]
        for one in spec.inputs
    }


def _modulated(pipeline: PipelineSpec) -> _Like:
    """What the modulation makes."""
    modulation = pipeline.wiring.modulation
    made = modulation and pipeline.components[modulation.component].output(modulation.output)
    return _Like(2, {1: made.shape[-1]} if made and made.shape else {})


def _added(pipeline: PipelineSpec, spec: _Filled, one: InputSpec) -> _Like:
    """What an input must be like that outputs of sides are added up in: of as many channels, and of
    sizes that are known where none of them runs."""
    found = [pipeline.components[part.component].output(part.output) for part in one.parts]
    channels = {t.shape[1] if len(t.shape) == _FEATURE_RANK else 0 for t in found if t is not None}
    own = pipeline.components[spec.component].input(one.name)
    known = own is not None and all(map(is_size, own.shape))
    if len(channels) != 1 or not known:
        return _Like(0)
    return _Like(_FEATURE_RANK, {1: channels.pop()})


def _joined(pipeline: PipelineSpec, parts: Sequence[Part]) -> _Like:
    """The tensor that outputs joined on their last axis make; sizes may be unknown."""
    found = [pipeline.components[part.component].output(part.output) for part in parts]
    shapes = [tensor.shape for tensor in found if tensor is not None]
    rank, widths = len(shapes[0]), [shape[-1] for shape in shapes]
    whole = [width for width in widths if isinstance(width, int)]
    return _Like(rank, {rank - 1: sum(whole)} if len(whole) == len(widths) else {})


def _misfits(
    name: str, spec: ComponentSpec, inputs: _Tensors, outputs: _Tensors | None
) -> Iterator[str]:
    """Problems of a component's inputs and outputs. outputs: None for any, in floating point."""
    anything = {tensor.name: _Like(len(tensor.shape)) for tensor in spec.outputs}
    for what, tensors, needed in (
        ("inputs", spec.inputs, inputs),
        ("outputs", spec.outputs, anything if outputs is None else outputs),
    ):
        names = [tensor.name for tensor in tensors]
        if sorted(names) != sorted(needed):
            yield f"{name} in the manifest has the {what} {', '.join(names) or 'none'}, not " + (
                ", ".join(needed)
            )
        for tensor in tensors:
            if tensor.name in needed and not needed[tensor.name].fits(tensor):
                shape = list(tensor.shape)
                yield f"{name} in the manifest has {tensor.name} as {tensor.dtype} {shape}"


def _check_precisions(manifest: BundleManifest) -> None:
    """Raise BundleError for a number format that no version knows."""
    layers = () if manifest.recipe is None else manifest.recipe.layers
    for precision in {manifest.precision, *(layer.scheme for layer in layers)}:
        try:
            number_format(precision)
        except UsageError as exc:
            raise BundleError(f"{manifest.name}: its manifest isn't valid: {exc}") from exc
