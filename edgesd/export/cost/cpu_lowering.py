"""Lowers a workload to the kernels that ONNX Runtime runs on a CPU, with their outputs.

It follows `Lowering.lower_quantized` and `lower_to_kernels`, without a graph: each operation of the
source becomes those of the graph, which differ in what lies in memory meanwhile and in the time
that they take.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from edgesd.export.cost.workload import Operation, Workload
from edgesd.export.passes.fusions import FUSIONS, Fusion, attention_taken, kernel_takes, rows_taken
from edgesd.export.quantize.activations import activation_mode
from edgesd.export.quantize.assign import LayerScheme
from edgesd.export.quantize.layers import Layer

FUSED = "fused"
"""Form of what belongs to another operation: it writes memory, and its time is the other's."""

EDGESD_INT8, EDGESD_INT4, MATMUL_NBITS = "edgesd_int8", "edgesd_int4", "matmul_nbits"
EDGESD_ROWS = "edgesd_rows"
"""Forms of layers in edgesd's own kernels, with weights of 8 and of 4 bits, of a few rows that
aren't rounded, and in ONNX Runtime's of 4 bits. Its others are fp32 and int8."""

EDGESD_FORMS = (EDGESD_INT8, EDGESD_INT4, EDGESD_ROWS)


BEFORE_ATTENTION = ("rotary", "concat", "rms_norm")
"""What edgesd's kernel of attention computes of its queries and keys, from their end back
(AttentionIn8Bits of passes/own_kernels.py)."""


class Slots(NamedTuple):
    """Layers whose outputs a LoRA is added to (passes/lora_slots.py), by name, and its rank."""

    rank: int = 0
    layers: frozenset[str] = frozenset()


NO_SLOTS = Slots()


def lower_workload(
    workload: Workload,
    choices: Mapping[Layer, LayerScheme],
    kernels: bool,
    attention: bool,
    tail: bool = False,
    fusions: Iterable[Fusion] = FUSIONS,
    slots: Slots = NO_SLOTS,
) -> Workload:
    """The same workload as a CPU runs it, each operation with its `form`.

    choices: of quantized layers; others stay in fp32. kernels: edgesd's own, where there are any;
    attention: in 8 bits with them. tail: of a decoder's tail, whose group normalizations take their
    statistics from outside (passes/split_autoencoder.py). fusions: what becomes part of layers in
    edgesd's own kernels. slots: for LoRAs, of the largest rank.
    """
    if not kernels:
        return OrtOps(workload, choices, tail, slots).run()
    return EdgesdOps(workload, choices, tail, slots, attention, fusions).run()


class OrtOps:
    """ONNX Runtime's own operators: passes/quantized_ort.py."""

    def __init__(
        self,
        workload: Workload,
        choices: Mapping[Layer, LayerScheme],
        tail: bool,
        slots: Slots,
    ) -> None:
        self.source, self.choices, self.tail, self.slots = workload, choices, tail, slots
        self.sizes = list(workload.sizes)
        self.made: list[Operation] = []

    def run(self) -> Workload:
        """The lowered workload."""
        for op in self.source.operations:
            self.lower(op)
            if self.has_slot(op):
                self.fill_slot(op)
        return replace(self.source, operations=tuple(self.made), sizes=tuple(self.sizes))

    def lower(self, op: Operation) -> None:
        """Append one lowered operation."""
        choice = self.choices.get(op.layer) if op.layer else None
        if op.kind == "attention":  # its inputs head by head; the scores, as large as their bias
            copies = tuple(self.sizes[value] for value in op.reads)
            self.made.append(replace(op, form="fp32", spare=copies))
            return
        if op.kind == "group_norm" and self.tail:  # what it sees of its own, BatchNormalization
            self.made.append(replace(op, spare=(self.sizes[op.reads[0]],)))
        elif op.kind == "group_norm":  # InstanceNormalization, and Mul and Add in its output
            scaled = Operation("mul", op.writes, op.writes, in_place=True, form=FUSED)
            self.made += [op, scaled, scaled]
        elif op.kind == "silu":  # Sigmoid, Mul
            gate = self.new(self.sizes[op.reads[0]])
            self.made.append(Operation("silu", op.reads, (gate,), in_place=True))
            reads = (*op.reads, gate)
            self.made.append(Operation("mul", reads, op.writes, in_place=True, form=FUSED))
        elif op.layer is None or op.layer.kind == "embedding" or choice is None:
            self.made.append(self._plain(op))
        elif not self.eight_bits(op, choice):
            four = choice.weight_bits == 4 and op.kind == "linear"
            self.made.append(replace(op, form=self.exact_form(op, four)))
        elif op.kind == "linear":
            self.made.append(replace(op, form=MATMUL_NBITS if choice.weight_bits == 4 else "int8"))
        else:
            self._conv(op, op.layer)

    def _plain(self, op: Operation) -> Operation:
        """An operation that isn't quantized."""
        if op.kind not in ("conv", "linear"):
            return op
        # A convolution among others that aren't fp32's reorders its input into blocks of channels.
        blocks = op.kind == "conv" and self.choices and op.layer and op.layer.channels >= 16
        spare = (self.sizes[op.reads[0]],) if blocks else ()
        return replace(op, form="fp32", spare=spare)

    def eight_bits(self, op: Operation, choice: LayerScheme) -> bool:
        """Whether a layer's inputs are 8 bits: a timestep's vector stays as it is."""
        if op.layer is None or choice is None or op.kind not in ("conv", "linear"):
            return False
        mode = activation_mode(op.layer, choice, False)
        return choice.activation_bits == 8 and mode != "none"

    def exact_form(self, op: Operation, four: bool) -> str:
        """The form of a quantized layer whose input stays as it is. four: a linear's 4 bits."""
        return MATMUL_NBITS if four else "fp32"

    def has_slot(self, op: Operation) -> bool:
        """Whether a LoRA is added to an operation's output."""
        return op.layer is not None and op.layer.module in self.slots.layers

    def fill_slot(self, op: Operation) -> None:
        """Two products of the layer's input, and a sum."""
        assert op.layer is not None
        (written,), rank = op.writes, self.slots.rank
        low, product = self.new(4 * op.rows * rank), self.new(self.sizes[written])
        self.made += [
            _factor(op, op.reads[0], low, op.layer.columns, rank),
            _factor(op, low, product, rank, op.layer.rows),
            Operation("add", (written, product), (written,), in_place=True),
        ]

    def new(self, size: int) -> int:
        """A further value of `size` bytes."""
        self.sizes.append(size)
        return len(self.sizes) - 1

    def _copy(self, source: int, size: int) -> int:
        """Copy `source` to a new value."""
        value = self.new(size)
        self.made.append(Operation("copy", (source,), (value,), form=FUSED))
        return value

    def _conv(self, op: Operation, layer: Layer) -> None:
        """Codes of the input, channels last, patches, their product, channels first."""
        (source,) = op.reads
        codes = self.new(self.sizes[source] // 4)
        self.made.append(Operation("quantize", (source,), (codes,), form=FUSED))
        last = self._copy(codes, self.sizes[codes])
        if any(layer.pads):
            last = self._copy(last, self.sizes[codes])
        taps = layer.kernel[0] * layer.kernel[1]
        if taps > 1:
            parts = [self._copy(last, op.rows * layer.channels) for _ in range(taps)]
            last = self.new(op.rows * layer.columns)
            self.made.append(Operation("concat", tuple(parts), (last,), form=FUSED))
        product = self.new(self.sizes[op.writes[0]])
        self.made.append(replace(op, reads=(last,), writes=(product,), form="int8"))
        self.made.append(Operation("copy", (product,), op.writes, form=FUSED))


def _factor(op: Operation, read: int, written: int, columns: int, outputs: int) -> Operation:
    """A product with one of a LoRA's factors [columns, outputs], in the slot of `op`."""
    macs = op.rows * columns * outputs
    return Operation("matmul", (read,), (written,), macs=macs, rows=op.rows)


class EdgesdOps(OrtOps):
    """edgesd's own kernels: passes/own_kernels.py. What became part of a layer is left out, and
    what a kernel doesn't compute is as in OrtOps."""

    def __init__(
        self,
        workload: Workload,
        choices: Mapping[Layer, LayerScheme],
        tail: bool,
        slots: Slots,
        attention: bool,
        fusions: Iterable[Fusion],
    ) -> None:
        super().__init__(workload, choices, tail, slots)
        self.attention = attention
        # In a tail statistics come from outside: nothing that could be fused is left of a norm.
        self.fusions = [f for f in fusions if not (tail and "group_norm" in f.traced)]
        self.readers = workload.readers()
        self.writer = {value: op for op in workload.operations for value in op.writes}
        self.inside: set[int] = set()  # ids of operations that became part of a layer
        layers = [op for op in workload.operations if op.layer is not None and self._form(op)]
        self.layers = {id(op): op for op in layers}  # with what became part of them
        for fuse in (self._fuse_epilogue, self._fuse_prologue):
            for op in layers:
                self.layers[id(op)] = fuse(self.layers[id(op)])
        for op in workload.operations:
            if op.kind == "attention" and self._form(op):
                reads = (v for read in op.reads for v in self._unprepared(read, BEFORE_ATTENTION))
                self.layers[id(op)] = replace(op, reads=tuple(dict.fromkeys(reads)))

    def lower(self, op: Operation) -> None:
        if id(op) in self.inside:
            return
        form = self._form(op)
        if form is None:
            super().lower(op)
            return
        layer = self.layers.get(id(op), op)
        if rank := self._branch_rank(op):
            layer = self._with_branch(layer, 4 * op.rows * rank)
        self.made.append(replace(layer, form=form))
        if op.biased and "bias" not in layer.fused:
            self.made.append(Operation("add", op.writes, op.writes, in_place=True))

    def exact_form(self, op: Operation, four: bool) -> str:
        taken = op.layer is not None and rows_taken(op.layer)
        return EDGESD_ROWS if taken else super().exact_form(op, four)

    def fill_slot(self, op: Operation) -> None:
        if op.layer is None or op.kind != "linear" or self._form(op) is None:
            super().fill_slot(op)
            return
        # The second product is the kernel's, and so of no memory of its own; its time is counted.
        rank, written = self.slots.rank, self.made[-1].writes[0]
        low = self.new(4 * op.rows * rank)
        first = _factor(op, op.reads[0], low, op.layer.columns, rank)
        second = _factor(op, low, written, rank, op.layer.rows)
        self.made += [first, replace(second, reads=(low, written), in_place=True)]

    def _form(self, op: Operation) -> str | None:
        if op.kind == "attention":
            fits = attention_taken(op.heads[-1], op.causal, op.biased)
            return EDGESD_INT8 if self.attention and fits else None
        choice = self.choices.get(op.layer) if op.layer else None
        if op.layer is None or choice is None:
            return None
        if not self.eight_bits(op, choice) or not kernel_takes(op.layer):
            return None
        return EDGESD_INT8 if choice.weight_bits == 8 else EDGESD_INT4

    def _fuse_epilogue(self, op: Operation) -> Operation:
        """A layer, fused with the operations after it."""
        if op.kind == "conv" and self.has_slot(op):  # its product is added before anything else
            return op
        # A convolution's low-rank branch comes in where another branch's values would.
        taken = {"residual"} if op.kind == "conv" and self._branch_rank(op) else set(op.fused)
        fusions = [f for f in self.fusions if f.side == "epilogue" and op.kind in f.layers]
        if op.biased:
            if not any(f.name == "bias" for f in fusions):
                return op
            op = replace(op, fused=(*op.fused, "bias"))
        found = True
        while found:
            found = False
            for fusion in fusions:
                if not fusion.traced or taken & {fusion.name, *fusion.excludes}:
                    continue
                chain = self._following(fusion.traced, op.writes[0])
                others = self._others(op.writes[0], chain)
                if not chain or not self._adds(fusion, op, others):
                    continue
                self.inside |= {id(each) for each in chain}
                taken.add(fusion.name)
                op = replace(
                    op,
                    reads=(*op.reads, *others),
                    writes=chain[-1].writes,
                    fused=(*op.fused, fusion.name),
                )
                found = not fusion.last
                break
        return op

    def _fuse_prologue(self, op: Operation) -> Operation:
        """A layer, fused with the operations before it."""
        if self._branch_rank(op) or self.has_slot(op):  # which reads the input, too
            return op
        for fusion in self.fusions:
            if fusion.side == "epilogue" or op.kind not in fusion.layers:
                continue
            (kind,), source = fusion.traced, op.reads[0]
            before = self.writer.get(source)
            if before is not None and before.kind == kind and self._read_once(source):
                self.inside.add(id(before))
                op = replace(
                    op, reads=(*before.reads, *op.reads[1:]), fused=(*op.fused, fusion.name)
                )
        return op

    def _unprepared(self, value: int, kinds: Sequence[str]) -> tuple[int, ...]:
        """What operations of these kinds, the last one first, make a value of, where nothing else
        reads what they make."""
        before = self.writer.get(value)
        if before is None or before.kind not in kinds or not self._read_once(value):
            return (value,)
        self.inside.add(id(before))
        others = kinds[kinds.index(before.kind) + 1 :]
        return tuple(v for read in before.reads for v in self._unprepared(read, others))

    def _with_branch(self, op: Operation, low_bytes: int) -> Operation:
        """A layer that reads down x, of `low_bytes`; a convolution's kernel up (down x)."""
        read = self.new(low_bytes)
        self.made.append(Operation("matmul", op.reads[:1], (read,), form=FUSED))
        if op.kind == "conv":
            low, read = read, self.new(self.sizes[op.writes[0]])
            self.made.append(Operation("matmul", (low,), (read,), form=FUSED))
        return replace(op, reads=(*op.reads, read))

    def _branch_rank(self, op: Operation) -> int:
        scheme = self.choices.get(op.layer) if op.layer else None
        return 0 if scheme is None else scheme.rank

    def _following(self, kinds: Sequence[str], value: int) -> list[Operation]:
        """Operations of these kinds: the first reads `value`, each other what one of them wrote,
        and nothing else reads what lies between. Empty where that isn't so."""
        chain: list[Operation] = []
        between = [value]
        for kind in kinds:
            after = [self.source.operations[n] for v in between for n in self.readers.get(v, ())]
            op = next((op for op in after if op.kind == kind and op not in chain), None)
            if op is None or id(op) in self.inside:
                return []
            chain.append(op)
            between += op.writes
        end = chain[-1].writes
        alone = all(
            value in end
            or (
                value not in self.source.outputs
                and all(self.source.operations[n] in chain for n in self.readers.get(value, ()))
            )
            for value in between
        )
        return chain if alone else []

    def _others(self, value: int, chain: Sequence[Operation]) -> list[int]:
        """Values that the operations read, other than `value` and those they wrote."""
        made = {value, *(v for op in chain for v in op.writes)}
        return [v for op in chain for v in op.reads if v not in made]

    def _adds(self, fusion: Fusion, op: Operation, others: Sequence[int]) -> bool:
        """Whether what a fusion adds to a layer's output is as large as it must be."""
        if len(others) != len(fusion.operands) or op.layer is None:
            return False
        whole, rows = self.sizes[op.writes[0]], 4 * op.layer.rows
        return all(
            size == whole if operand == "output" else size < whole and size % rows == 0
            for operand, size in zip(
                fusion.operands, (self.sizes[other] for other in others), strict=True
            )
        )

    def _read_once(self, value: int) -> bool:
        return len(self.readers.get(value, ())) == 1 and value not in self.source.outputs
