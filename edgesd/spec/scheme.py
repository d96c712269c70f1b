"""Precisions: fp32, fp16, bf16, and quantization schemes."""

from __future__ import annotations

import re

from edgesd.errors import UsageError, unknown_name
from edgesd.spec.base import Spec

Precision = str
"""fp32, fp16, bf16, or a quantization scheme in canonical form: w4a8-g64-lr32 (`parse_scheme`)."""

FLOATING: tuple[Precision, ...] = ("fp32", "fp16", "bf16")
"""Those that quantize nothing."""

_QUANTIZED: tuple[Precision, ...] = ("w8a16", "w8a8", "w4a16", "w4a8", "w4a4")

PRECISIONS: tuple[Precision, ...] = (*FLOATING, *_QUANTIZED)
"""The number formats, without group and rank."""

CPU_PRECISIONS: tuple[Precision, ...] = tuple(name for name in PRECISIONS if name != "bf16")
"""Those that ONNX Runtime has on CPUs, where no kernel computes in bf16."""

TENSORRT_PRECISIONS: tuple[Precision, ...] = PRECISIONS[:-1]
"""Those that TensorRT has on GPUs from sm_80 on: w4a4 is only simulated."""


class Scheme(Spec, frozen=True):
    """How the weights and activations of a layer are represented: wXaY[-gN][-lrR].

    weight_bits: 8 (a scale per output channel) or 4 (a scale per `group` values of K, the reduced
    dimension). activation_bits: 16 leaves activations in floating point. group: 0 for none; with
    activation_bits 4, activations too get a scale per group. rank: of the 16-bit low-rank branch,
    at most; 0 for none.
    """

    weight_bits: int
    activation_bits: int
    group: int = 0
    rank: int = 0

    def __str__(self) -> str:
        group = f"-g{self.group}" if self.group else ""
        rank = f"-lr{self.rank}" if self.rank else ""
        return f"w{self.weight_bits}a{self.activation_bits}{group}{rank}"

    @property
    def simulated(self) -> bool:
        """Whether no engine computes in this format: the image is right, speed and RAM aren't."""
        return self.activation_bits == 4


GROUPS = (16, 32, 64, 128, 256)

MAX_RANK = 512

_SCHEME = re.compile(r"w(8|4)a(16|8|4)(?:-g([1-9][0-9]{0,3}))?(?:-lr([1-9][0-9]{0,3}))?")

_EXAMPLES = ("w8a8", "w8a16", "w4a16-g64", "w4a8-g64", "w4a4-g64", "w4a8-g64-lr32")

_SCHEMES = ", ".join(_EXAMPLES)


def parse_scheme(name: str) -> Scheme:
    """`name` as a Scheme. Raises UsageError, naming what is valid, for anything but a scheme."""
    match = _SCHEME.fullmatch(name)
    if not match:
        raise UsageError(unknown_name("precision", name, (*FLOATING, *_EXAMPLES)))
    weights, activations, group, rank = (int(part or 0) for part in match.groups())
    if weights == 8 and (group or activations == 4):
        raise UsageError(
            f"{name}: 8-bit weights have a scale per channel and no group, and go with 8- or "
            f"16-bit activations: valid are {_SCHEMES}"
        )
    if weights == 4 and group not in GROUPS:
        valid = ", ".join(f"-g{size}" for size in GROUPS)
        raise UsageError(f"{name}: 4-bit weights need a group: {valid} (w4a{activations}-g64)")
    if rank > MAX_RANK:
        raise UsageError(f"{name}: the rank must be from 1 to {MAX_RANK}")
    return Scheme(weights, activations, group, rank)


def number_format(precision: Precision) -> str:
    """The member of PRECISIONS that `precision` belongs to: w4a8 for w4a8-g64-lr32.

    Raises UsageError for a name that is no precision.
    """
    if precision in FLOATING:
        return precision
    scheme = parse_scheme(precision)
    return f"w{scheme.weight_bits}a{scheme.activation_bits}"
