"""What a LoRA does to a layer: products of a few small tensors, which are added to its weights.

Factors are of any floating type, mostly mapped from a file; all is computed in fp32.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from edgesd.errors import InputError
from edgesd.files import sha256_file

Shape = tuple[int, ...]

_SHOWN, _LONGEST = 3, 100
"""Names in an error, and characters of one."""


class Product(Protocol):
    """A change of weights [out, in, *kernel] before it is scaled; `shape` is its own, which is
    [out, in * kernel] for some that are meant for convolutions.

    rank: what alpha is divided by; None where there is none. sound: whether its factors have shapes
    that fit each other; without that, nothing else of it may be asked for.
    """

    @property
    def sound(self) -> bool: ...

    @property
    def shape(self) -> Shape: ...

    @property
    def rank(self) -> int | None: ...

    def computed(self) -> Tensor:
        """The change, in fp32."""


@dataclass(frozen=True, eq=False)
class LowRank:
    """up [out, R] x down [R, in, *kernel] (Hu et al. 2021, arXiv 2106.09685).

    mid: [R, S, *kernel] between both, down being [S, in] then (LoCon in Tucker's form; R = S).
    """

    down: Tensor
    up: Tensor
    mid: Tensor | None = None

    @property
    def sound(self) -> bool:
        up, down = _matrix_shape(self.up), tuple(self.down.shape)
        if self.mid is None:
            return up is not None and len(down) in (2, 4) and up[1] == down[0]
        matrix = _matrix_shape(self.down)
        if up is None or matrix is None:
            return False
        return self.mid.ndim == 4 and tuple(self.mid.shape[:2]) == (up[1], matrix[0])

    @property
    def shape(self) -> Shape:
        kernel = self.down.shape[2:] if self.mid is None else self.mid.shape[2:]
        return (self.up.shape[0], self.down.shape[1], *kernel)

    @property
    def rank(self) -> int:
        return int(self.down.shape[0])

    def computed(self) -> Tensor:
        up, down = self.up.float().flatten(1), self.down.float()
        if self.mid is not None:
            down = torch.einsum("rs...,si->ri...", self.mid.float(), down.flatten(1))
        return (up @ down.flatten(1)).reshape(self.shape)


@dataclass(frozen=True, eq=False)
class Hadamard:
    """The elementwise product of two low-rank matrices, LoHa (Hyeon-Woo et al. 2021, arXiv
    2108.06098): (one[0] x one[1]) * (two[0] x two[1]), of [out, R] and [R, in * kernel].

    cores: [R, R, *kernel] of each, whose factors are [R, out] and [R, in] then (Tucker's form).
    """

    one: tuple[Tensor, Tensor]
    two: tuple[Tensor, Tensor]
    cores: tuple[Tensor, Tensor] | None = None

    @property
    def sound(self) -> bool:
        if any(factor.ndim != 2 for factor in (*self.one, *self.two)):
            return False
        if self.cores is None:
            (a, b), (c, d) = self.one, self.two
            outer = a.shape[0] == c.shape[0] and b.shape[1] == d.shape[1]
            return outer and a.shape[1] == b.shape[0] and c.shape[1] == d.shape[0]
        same = [a.shape[1] == b.shape[1] for a, b in zip(self.one, self.two, strict=True)]
        kernels = {tuple(core.shape[2:]) for core in self.cores}
        pairs = zip(self.cores, (self.one, self.two), strict=True)
        return all(same) and len(kernels) == 1 and all(_joins(core, two) for core, two in pairs)

    @property
    def shape(self) -> Shape:
        left, right = self.one
        if self.cores is None:
            return (left.shape[0], right.shape[1])
        return (left.shape[1], right.shape[1], *self.cores[0].shape[2:])

    @property
    def rank(self) -> int:
        return int(self.one[1].shape[0])

    def computed(self) -> Tensor:
        if self.cores is None:
            return _product(*self.one) * _product(*self.two)
        return _tucker(self.cores[0], *self.one) * _tucker(self.cores[1], *self.two)


@dataclass(frozen=True, eq=False)
class Kronecker:
    """The Kronecker product of two matrices, LoKr (Yeh et al. 2023, arXiv 2309.14859), each whole
    (one tensor) or of two factors [., R] and [R, .].

    core: [R, R, *kernel] of the second, whose factors are [R, out] and [R, in] then.
    """

    one: tuple[Tensor, ...]
    two: tuple[Tensor, ...]
    core: Tensor | None = None

    @property
    def sound(self) -> bool:
        one, two = _whole_shape(self.one), _whole_shape(self.two)
        if self.core is not None:
            return one is not None and len(self.two) == 2 and _joins(self.core, self.two)
        return one is not None and len(one) == 2 and two is not None and len(two) in (2, 4)

    @property
    def shape(self) -> Shape:
        first, second = _whole_shape(self.one), _whole_shape(self.two)
        if self.core is not None:
            second = (*(factor.shape[1] for factor in self.two), *self.core.shape[2:])
        assert first is not None
        assert second is not None
        return (first[0] * second[0], first[1] * second[1], *second[2:])

    @property
    def rank(self) -> int | None:
        factored = next((pair for pair in (self.two, self.one) if len(pair) == 2), None)
        return None if factored is None else int(factored[1].shape[0])

    def computed(self) -> Tensor:
        one = _whole(self.one)
        two = _whole(self.two) if self.core is None else _tucker(self.core, *self.two)
        return torch.kron(one.reshape(*one.shape, *(1,) * (two.ndim - 2)), two.contiguous())


@dataclass(frozen=True, eq=False)
class Difference:
    """The change itself, of any shape."""

    values: Tensor

    @property
    def sound(self) -> bool:
        return self.values.ndim > 0

    @property
    def shape(self) -> Shape:
        return tuple(self.values.shape)

    @property
    def rank(self) -> None:
        return None

    def computed(self) -> Tensor:
        return self.values.float()


@dataclass(frozen=True, eq=False)
class Whole(Difference):
    """What takes the place of the weights, of their shape."""


@dataclass(frozen=True, eq=False)
class Part:
    """Rows of a change. take: what takes them from a tensor [out, ...]. count: how many."""

    whole: Product
    take: Callable[[Tensor], Tensor]
    count: int

    @property
    def sound(self) -> bool:
        return self.whole.sound

    @property
    def shape(self) -> Shape:
        return (self.count, *self.whole.shape[1:])

    @property
    def rank(self) -> int | None:
        return self.whole.rank

    def computed(self) -> Tensor:
        return self.take(self.whole.computed())


@dataclass(frozen=True, eq=False)
class Magnitude:
    """Norms that the rows of changed weights get, DoRA (Liu et al. 2024, arXiv 2402.09353).

    values: one for each output [out], or, if `of_inputs`, for each input [in].
    """

    values: Tensor
    of_inputs: bool = False

    def applied(self, weight: Tensor) -> Tensor:
        """weight: [out, in, *kernel], changed already."""
        rows = weight.transpose(0, 1) if self.of_inputs else weight
        norms = rows.flatten(1).norm(dim=1)
        factor = (self.values.float().flatten() / norms).reshape(-1, *(1,) * (rows.ndim - 1))
        scaled: Tensor = rows * factor
        return scaled.transpose(0, 1) if self.of_inputs else scaled


@dataclass(frozen=True, eq=False)
class Update:
    """What is done to one layer.

    layer: its name in the file, without what names the part. product: what is added to the weights,
    times `scale`; None where the bias alone changes. bias: the same for the bias.
    """

    layer: str
    product: Product | None
    scale: float = 1.0
    magnitude: Magnitude | None = None
    bias: Tensor | None = None
    bias_scale: float = 1.0

    def weights(self, weight: Tensor, scale: float) -> Tensor:
        """`weight` with the change, in fp32. scale: the user's.

        As in peft, a magnitude is that of the weights with the scaled change.
        """
        assert self.product is not None
        if isinstance(self.product, Whole):
            return torch.lerp(weight.float(), self.product.computed(), scale)
        change = self.product.computed().reshape(weight.shape)
        changed = weight.float() + self.scale * scale * change
        return changed if self.magnitude is None else self.magnitude.applied(changed)

    def biases(self, bias: Tensor, scale: float) -> Tensor:
        """`bias` [out] with the change, in fp32."""
        assert self.bias is not None
        return bias.float() + self.bias_scale * scale * self.bias.float().reshape(bias.shape)

    def part(self, take: Callable[[Tensor], Tensor]) -> Update:
        """What is done to some of the layer's outputs: `take` takes their rows from a tensor
        [out, ...]. Magnitudes must be of outputs."""
        product, magnitude = self.product, self.magnitude
        if isinstance(product, LowRank):
            product = replace(product, up=take(product.up))
        elif product is not None:
            count = len(take(torch.empty(product.shape[0], device="meta")))
            product = Part(product, take, count)
        if magnitude is not None:
            assert not magnitude.of_inputs
            magnitude = Magnitude(take(magnitude.values.flatten()))
        bias = None if self.bias is None else take(self.bias.flatten())
        return replace(self, product=product, magnitude=magnitude, bias=bias)

    def fits(self, shape: Shape) -> bool:
        """Whether it can be added to weights of that shape, [out, in, *kernel] or any."""
        if self.product is None:
            return True
        own, flat = self.product.shape, (*shape[:1], math.prod(shape[1:]))
        return own == flat or _without_ones(own) == _without_ones(shape)


@dataclass(frozen=True, eq=False)
class Lora:
    """A LoRA, or what is built like one.

    sha256: of its file (and of the adapter_config.json that tells its scales). scale: the user's.
    hints: defaults that it asks for (as families.checkpoint.Checkpoint.hints). metadata, licence:
    what the file says of itself. files: those that it was read from.
    """

    name: str
    sha256: str
    scale: float
    updates: tuple[Update, ...]
    files: tuple[Path, ...]
    hints: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    licence: str = ""

    def check_unchanged(self) -> None:
        """Raise InputError unless its files are as they were when it was read."""
        if files_sha256(self.files) != self.sha256:
            raise InputError(f"{self.name} was changed while it was read: run again")


def files_sha256(files: Sequence[Path]) -> str:
    """Of a single file its own hash; of several, one over theirs. Raises OSError."""
    hashes = [sha256_file(path) for path in files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def brief(name: str) -> str:
    """A name from a file, for an error."""
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 3]}..."


def listed(names: Sequence[str]) -> str:
    """The first of several names, and how many there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(brief, names[:_SHOWN])) + more


def _product(left: Tensor, right: Tensor) -> Tensor:
    return left.float() @ right.float()


def _tucker(core: Tensor, out: Tensor, into: Tensor) -> Tensor:
    """core: [R, S, *kernel]; out: [R, out]; into: [S, in] -> [out, in, *kernel]."""
    return torch.einsum("rs...,ro,si->oi...", core.float(), out.float(), into.float())


def _joins(core: Tensor, factors: tuple[Tensor, ...]) -> bool:
    """Whether `_tucker` takes them."""
    sizes = tuple(factor.shape[0] for factor in factors)
    return core.ndim == 4 and tuple(core.shape[:2]) == sizes and all(f.ndim == 2 for f in factors)


def _whole(parts: tuple[Tensor, ...]) -> Tensor:
    return parts[0].float() if len(parts) == 1 else _product(*parts)


def _whole_shape(parts: tuple[Tensor, ...]) -> Shape | None:
    """Of `_whole`; None where the two don't make one."""
    if len(parts) == 1:
        return tuple(parts[0].shape)
    left, right = parts
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
        return None
    return (left.shape[0], right.shape[1])


def _matrix_shape(tensor: Tensor) -> Shape | None:
    """Of a matrix, or a 1x1 convolution; None for another tensor."""
    shape = _without_ones(tuple(tensor.shape))
    return shape if len(shape) == 2 and tensor.ndim in (2, 4) else None


def _without_ones(shape: Shape) -> Shape:
    """A 1x1 convolution is a matrix."""
    return shape[:2] if all(size == 1 for size in shape[2:]) else shape
