"""Reads LoRA files: names of tensors of all common programs become layers and parts of them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgesd.errors import InputError
from edgesd.export.lora.scales import Scales, scales_of
from edgesd.export.lora.update import (
    Difference,
    Hadamard,
    Kronecker,
    Lora,
    LowRank,
    Magnitude,
    Product,
    Update,
    Whole,
    brief,
    files_sha256,
    listed,
)
from edgesd.export.source.folder import HINTS, INDEX, check_hints, check_no_pickle, read_json_object
from edgesd.export.source.tensor_file import NUMBERS, TensorFile
from edgesd.files import scaled_path
from edgesd.spec.build import MOST_LORA_SCALE

if TYPE_CHECKING:
    from torch import Tensor

_MOST_TENSORS, _LONGEST_NAME, _MOST_RANKS = 100_000, 500, 5
"""Tensors of a file, characters of a name, dimensions of a tensor."""

_METADATA = "edgesd"
"""Of a file: the same JSON object as edgesd.json has."""
_HINTS = ("num_inference_steps", "guidance_scale", "variant")
"""Those that a LoRA may give."""

_ADAPTER = r"(?:\.\w+)?"
"""peft's name of an adapter, in names of tensors in memory."""
_LORA = r"(?:[._]lora(?:_linear_layer)?|(?<=_lora[12]))"
"""diffusers' word. XLabs number theirs by what they see, which is a part of the layer's name."""
_PARTS = {
    "down": rf"\.lora_A{_ADAPTER}\.weight|{_LORA}\.down\.weight|\.lora_down\.weight",
    "up": rf"\.lora_B{_ADAPTER}\.weight|{_LORA}\.up\.weight|\.lora_up\.weight",
    "mid": r"\.lora_mid\.weight",
    "bias": rf"\.lora_B{_ADAPTER}\.bias|\.lora_up\.bias",
    "alpha": r"(?:[._]lora)?\.alpha",
    "magnitude": rf"\.lora_magnitude_vector{_ADAPTER}(?:\.weight)?",
    "dora_scale": r"\.dora_scale",
    **{f"w{n}{side}": rf"\.hada_w{n}{side}{_ADAPTER}" for n in "12" for side in ("_a", "_b")},
    **{f"t{n}": rf"\.hada_t{n}{_ADAPTER}" for n in "12"},
    **{f"k{n}{side}": rf"\.lokr_w{n}{side}{_ADAPTER}" for n in "12" for side in ("", "_a", "_b")},
    "kt2": rf"\.lokr_t2{_ADAPTER}",
    "diff": r"\.diff|\.w_norm",
    "diff_bias": r"\.diff_b|\.b_norm",
    "norm": r"(?<=_norm)\.scale|(?:(?<=\.norm_[qk])|(?<=\.norm_added_[qk]))\.weight",
}
"""Part of an update -> ends of its tensors' names: of peft, of diffusers (old and new), of Kohya's
scripts and of LyCORIS; norm: of FLUX's Control-LoRAs, as its authors and diffusers call it."""

_NAME = re.compile(
    "(.+?)(?:" + "|".join(f"(?P<{part}>{ends})" for part, ends in _PARTS.items()) + ")"
)

_OTHERS = (
    (r"^bundle_emb\.", "a textual inversion: save it as a file of its own, for --embedding"),
    (r"\.oft_|\.boft_|oft_blocks|oft_diag", "OFT, which isn't supported"),
    (r"on_input$", "(IA)3, which isn't supported"),
    (r"\.[ab][12]\.weight$", "GLoRA, which isn't supported"),
    (r"\.lora_embedding_[AB]|modules_to_save|base_layer", "a layer that was trained as a whole"),
    (r"^lora_controlnet$", "a Control-LoRA, which replaces a ControlNet"),
    (r"^(model\.)?diffusion_model\..*\.(weight|bias)$", "a whole model: give it as MODEL"),
)
"""Pattern of a name -> what has it."""


def read_loras(given: Collection[str]) -> tuple[Lora, ...]:
    """All of several, in their order. Raises InputError as `read_lora`."""
    return tuple(map(read_lora, given))


def read_lora(given: str) -> Lora:
    """The LoRA in FILE, or in FILE:SCALE, scaled; its tensors are mapped from the file.

    Raises InputError for what is no LoRA, for a name or a set of tensors that isn't known, and for
    shapes and values that can't be.
    """
    path, scale = _path_and_scale(given)
    file = TensorFile(path)
    parts = _grouped(file)
    scales = scales_of(file)
    shapes = {name: file[name].shape for named in parts.values() for name in named.values()}
    for name, shape in shapes.items():
        if len(shape) > _MOST_RANKS or 0 in shape:
            raise InputError(
                f"{path}: {brief(name)} has the shape {str(list(shape))[:60]}, which no LoRA has: "
                "download it again"
            )
    alphas = {named["alpha"] for named in parts.values() if "alpha" in named}
    tensors = file.load(shapes.keys() - alphas) | file.load(alphas, NUMBERS)
    _check_finite(path, tensors)
    updates = tuple(
        _update(path, layer, {part: tensors[name] for part, name in named.items()}, scales)
        for layer, named in parts.items()
    )
    files = (path, *scales.files)
    return Lora(
        path.name,
        files_sha256(files),
        scale,
        updates,
        files,
        _hints(file),
        file.metadata,
        file.licence,
    )


def _path_and_scale(given: str) -> tuple[Path, float]:
    path, scale = scaled_path(given)
    if path.is_file() and not abs(scale) <= MOST_LORA_SCALE:
        raise InputError(
            f"--lora {given}: {given.rpartition(':')[2][:40]!r} is no scale: give FILE or "
            f"FILE:SCALE with a number from -{MOST_LORA_SCALE:g} to {MOST_LORA_SCALE:g}, mostly 0 "
            "to 1"
        )
    if path.is_dir():
        raise InputError(f"--lora {given}: {path} is a folder: give the .safetensors file in it")
    if not path.is_file():
        raise InputError(f"--lora {given}: there is no such file: give FILE or FILE:SCALE")
    check_no_pickle(path, "lora.md")
    return path, scale


def _grouped(file: TensorFile) -> dict[str, dict[str, str]]:
    """Layer -> part -> name of its tensor. Raises InputError for names of something else."""
    if not file:
        raise InputError(f"{file.path} holds no tensors: download it again")
    if len(file) > _MOST_TENSORS:
        raise InputError(f"{file.path} holds {len(file)} tensors: no LoRA has so many")
    found: dict[str, dict[str, str]] = {}
    unknown: list[str] = []
    for name in file:
        match = _NAME.fullmatch(name) if len(name) <= _LONGEST_NAME else None
        if match is None or match.lastgroup is None:
            unknown.append(name)
            continue
        named = found.setdefault(match[1], {})
        if match.lastgroup in named:
            raise InputError(
                f"{file.path} has {brief(match[1])} twice, as {brief(named[match.lastgroup])} "
                f"and {brief(name)}: expected one LoRA"
            )
        named[match.lastgroup] = name
    if unknown:
        raise InputError(_why_unknown(file, unknown))
    return found


def _why_unknown(file: TensorFile, unknown: Sequence[str]) -> str:
    for pattern, what in _OTHERS:
        if named := [name for name in unknown if re.search(pattern, name[:_LONGEST_NAME])]:
            return f"{file.path}: {listed(named)} of {len(file)} tensors: {what}"
    if len(unknown) == len(file):
        return f"{file.path} is no LoRA that edgesd knows: its tensors are {listed(unknown)}"
    return (
        f"{file.path} has more than LoRA: {listed(unknown)} of {len(file)} tensors; nothing of a "
        "file is left out, so it isn't taken"
    )


def _check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    import torch

    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(
                f"{path}: {brief(name)} holds NaN or infinite values: download it again"
            )


def _update(path: Path, layer: str, parts: Mapping[str, Tensor], scales: Scales) -> Update:
    """What all tensors of one layer mean together. Raises InputError where they mean nothing."""
    left = dict(parts)
    product = _product(left)
    alpha, bias, own_bias = (left.pop(part, None) for part in ("alpha", "bias", "diff_bias"))
    norms = left.pop("magnitude", None)
    kohya = norms is None and "dora_scale" in left
    if kohya:
        norms = left.pop("dora_scale")
    held = product is not None or own_bias is not None
    if left or not held or (bias is not None and own_bias is not None):
        raise InputError(
            f"{path}: {brief(layer)} has {', '.join(sorted(parts))}, which together make no LoRA, "
            "LoHa or LoKr: is the file complete?"
        )

    def refuse(what: str) -> InputError:
        shapes = ", ".join(f"{part} {list(parts[part].shape)}" for part in sorted(parts))
        return InputError(f"{path}: {brief(layer)}: {what}: {shapes[:300]}")

    if product is not None and not product.sound:
        raise refuse("shapes that don't fit each other")
    if alpha is not None and alpha.numel() != 1:
        raise refuse("its alpha isn't one number")
    shape = () if product is None else product.shape
    magnitude = None
    if norms is not None:
        # LyCORIS has them as [out, 1, ...] or as [1, in, ...]; peft's are of outputs.
        of_inputs = kohya and norms.shape[:1] != shape[:1]
        magnitude = Magnitude(norms, of_inputs)
        if len(shape) < 2 or norms.numel() != shape[int(of_inputs)]:
            raise refuse("magnitudes that don't fit its other tensors")
    scale = scales.of(
        layer,
        None if alpha is None else float(alpha.flatten()[0]),
        None if product is None else product.rank,
    )
    if bias is not None:
        return Update(layer, product, scale, magnitude, bias, scale)
    return Update(layer, product, scale, magnitude, own_bias)


def _product(left: dict[str, Tensor]) -> Product | None:
    """The product of a layer's tensors, which are taken out of `left`; None where there is none."""

    def take(*names: str) -> list[Tensor]:
        """All of these, if they are there."""
        return [left.pop(name) for name in names] if left.keys() >= set(names) else []

    if pair := take("down", "up"):
        return LowRank(pair[0], pair[1], left.pop("mid", None))
    if four := take("w1_a", "w1_b", "w2_a", "w2_b"):
        cores = take("t1", "t2")
        one, two = (four[0], four[1]), (four[2], four[3])
        return Hadamard(one, two, (cores[0], cores[1]) if cores else None)
    first, second = (take(f"k{n}") or take(f"k{n}_a", f"k{n}_b") for n in "12")
    if first and second:
        return Kronecker(tuple(first), tuple(second), left.pop("kt2", None))
    if whole := take("diff"):
        return None if "alpha" in left else Difference(whole[0])
    if whole := take("norm"):
        return Whole(whole[0])
    return None


def _hints(file: TensorFile) -> dict[str, Any]:
    """What edgesd.json beside a file asks for, unless it is that of a pipeline, or what the file
    itself does. Raises InputError."""
    path = file.path.parent / HINTS
    if path.is_file() and not (path.parent / INDEX).exists():
        return check_hints(path, read_json_object(path), _HINTS)
    found = file.metadata_object(_METADATA) or {}
    return check_hints(f"{file.path}: {_METADATA} in its metadata", found, _HINTS)
