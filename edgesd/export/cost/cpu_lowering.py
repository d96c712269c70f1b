"""What ONNX Runtime makes of a workload on a CPU: which kernels run, and what they write.

It follows `backends.lower_quantized` and `lower_to_kernels`, without a graph: each operation of the
source becomes those of the graph, which differ in what lies in memory meanwhile and in the time
that they take.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from edgesd.export.cost.workload import Operation, Workload
from edgesd.export.passes.own_kernels import MAX_HEAD
from edgesd.export.quantize.activations import activation_mode
from edgesd.export.quantize.assign import LayerScheme
from edgesd.export.quantize.layers import Layer

PART = "part"
"""Form of what belongs to another operation: it writes memory, and its time is the other's."""


def lowered(
    workload: Workload,
    choices: Mapping[Layer, LayerScheme],
    kernels: bool,
    attention: bool,
    tail: bool = False,
) -> Workload:
    """The same workload as a CPU runs it, each operation with its `form`.

    choices: of quantized layers; others stay in fp32. kernels: edgesd's own, where there are any;
    attention: in 8 bits with them. tail: of a decoder's tail, whose group normalizations take their
    statistics from outside (passes/tiled_decoder.py).
    """
    if not kernels:
        return _Stock(workload, choices, tail).run()
    return _Own(workload, choices, attention, tail).run()


class _Stock:
    """ONNX Runtime's own operators: passes/quantized_ort.py."""

    def __init__(
        self, workload: Workload, choices: Mapping[Layer, LayerScheme], tail: bool
    ) -> None:
        self.source, self.choices, self.tail = workload, choices, tail
        self.sizes = list(workload.sizes)
        self.made: list[Operation] = []

    def run(self) -> Workload:
        """The lowered workload."""
        for op in self.source.operations:
            self.lower(op)
        return replace(self.source, operations=tuple(self.made), sizes=tuple(self.sizes))

    def lower(self, op: Operation) -> None:
        """Append what becomes of one operation."""
        choice = self.choices.get(op.layer) if op.layer else None
        if op.kind == "attention":  # its inputs head by head
            copies = tuple(self.sizes[value] for value in op.reads)
            self.made.append(replace(op, form="fp32", spare=copies))
            return
        if op.kind == "group_norm" and self.tail:  # what it sees of its own, BatchNormalization
            self.made.append(replace(op, spare=(self.sizes[op.reads[0]],)))
        elif op.kind == "group_norm":  # InstanceNormalization, and Mul and Add in its output
            scaled = Operation("mul", op.writes, op.writes, in_place=True, form=PART)
            self.made += [op, scaled, scaled]
        elif op.kind == "silu":  # Sigmoid, Mul
            gate = self.new(self.sizes[op.reads[0]])
            self.made.append(Operation("silu", op.reads, (gate,), in_place=True))
            reads = (*op.reads, gate)
            self.made.append(Operation("mul", reads, op.writes, in_place=True, form=PART))
        elif op.layer is None or op.layer.kind == "embedding" or choice is None:
            self.made.append(self._plain(op))
        elif not self.eight_bits(op, choice):
            four = choice.weight_bits == 4 and op.kind == "linear"
            self.made.append(replace(op, form="nbits" if four else "fp32"))
        elif op.kind == "linear":
            self.made.append(replace(op, form="nbits" if choice.weight_bits == 4 else "int8"))
        else:
            self._conv(op)

    def _plain(self, op: Operation) -> Operation:
        """An operation that isn't quantized."""
        if op.kind not in ("conv", "linear"):
            return op
        # A convolution among others that aren't fp32's brings its input into blocks of channels.
        blocks = op.kind == "conv" and self.choices and op.layer and op.layer.channels >= 16
        spare = (self.sizes[op.reads[0]],) if blocks else ()
        return replace(op, form="fp32", spare=spare)

    def eight_bits(self, op: Operation, choice: LayerScheme) -> bool:
        """Whether a layer's inputs are 8 bits: a timestep's vector stays as it is."""
        if op.layer is None or choice is None or op.kind not in ("conv", "linear"):
            return False
        mode = activation_mode(op.layer, choice, False)
        return choice.activation_bits == 8 and mode != "none"

    def new(self, size: int) -> int:
        """A further value of `size` bytes."""
        self.sizes.append(size)
        return len(self.sizes) - 1

    def _copy(self, source: int, size: int) -> int:
        """Copy `source` to a new value."""
        value = self.new(size)
        self.made.append(Operation("copy", (source,), (value,), form=PART))
        return value

    def _conv(self, op: Operation) -> None:
        """Codes of the input, channels last, patches, their product, channels first."""
        assert op.layer is not None
        (source,), layer = op.reads, op.layer
        codes = self.new(self.sizes[source] // 4)
        self.made.append(Operation("quantize", (source,), (codes,), form=PART))
        last = self._copy(codes, self.sizes[codes])
        if any(layer.pads):
            last = self._copy(last, self.sizes[codes])
        taps = layer.kernel[0] * layer.kernel[1]
        if taps > 1:
            parts = [self._copy(last, op.rows * layer.channels) for _ in range(taps)]
            last = self.new(op.rows * layer.columns)
            self.made.append(Operation("concat", tuple(parts), (last,), form=PART))
        product = self.new(self.sizes[op.writes[0]])
        self.made.append(replace(op, reads=(last,), writes=(product,), form="int8"))
        self.made.append(Operation("copy", (product,), op.writes, form=PART))


class _Own(_Stock):
    """edgesd's own kernels: passes/own_kernels.py. What a layer takes in is left out."""

    def __init__(
        self, workload: Workload, choices: Mapping[Layer, LayerScheme], attention: bool, tail: bool
    ) -> None:
        super().__init__(workload, choices, tail)
        self.attention = attention
        self.readers = workload.readers()
        self.writer = {v: op for op in workload.operations for v in op.writes}
        self.inside: set[int] = set()  # ids of operations that became part of a layer
        self.form = {id(op): form for op in workload.operations if (form := self._form(op))}
        self.inputs: dict[int, tuple[int, ...]] = {}
        self.outputs: dict[int, int] = {}
        for op in workload.operations:
            if id(op) in self.form and op.layer is not None:
                self._take_in(op)

    def lower(self, op: Operation) -> None:
        """See _Stock."""
        if id(op) in self.inside:
            return
        form = self.form.get(id(op))
        if form is None:
            super().lower(op)
            return
        reads = self.inputs.get(id(op), op.reads)
        writes = (self.outputs.get(id(op), op.writes[0]),)
        self.made.append(replace(op, reads=reads, writes=writes, form=form))

    def _form(self, op: Operation) -> str | None:
        if op.kind == "attention":
            fits = op.heads[-1] <= MAX_HEAD and not op.causal
            return "own8" if self.attention and fits else None
        choice = self.choices.get(op.layer) if op.layer else None
        if choice is None or not self.eight_bits(op, choice):
            return None
        return "own8" if choice.weight_bits == 8 else "own4"

    def _take_in(self, op: Operation) -> None:
        """What lies before and behind a layer, as far as it becomes part of it."""
        source, others = op.reads[0], []
        if op.kind == "conv":
            for kind in ("resize", "silu", "group_norm"):
                before = self.writer.get(source)
                if before is None or before.kind != kind or not self._sole(source):
                    continue
                if kind == "group_norm" and self.tail:
                    continue
                self.inside.add(id(before))
                source = before.reads[0]
        out = op.writes[0]
        while self._sole(out):
            behind = self.source.operations[self.readers[out][0]]
            if behind.kind == "add" and len(behind.reads) == 2:
                others += [value for value in behind.reads if value != out]
            elif not (behind.kind == "relu" and op.kind == "conv"):
                break
            if id(behind) in self.inside or len(others) > 2:
                break
            self.inside.add(id(behind))
            out = behind.writes[0]
        if op.kind == "linear":
            out = self._gated(out)
        self.inputs[id(op)], self.outputs[id(op)] = (source, *others), out

    def _gated(self, out: int) -> int:
        """GEGLU behind a linear: split, gelu, mul."""
        readers = self.readers.get(out, [])
        split = self.source.operations[readers[0]] if len(readers) == 1 else None
        if split is None or split.kind != "split" or len(split.writes) != 2:
            return out
        after = [self.source.operations[self.readers[v][0]] for v in split.writes]
        gelu = next((op for op in after if op.kind == "gelu"), None)
        product = next((op for op in after if op.kind == "mul"), None)
        if gelu is None or product is None:
            return out
        self.inside |= {id(split), id(gelu), id(product)}
        return product.writes[0]

    def _sole(self, value: int) -> bool:
        """Whether one operation alone reads a value, which stays inside."""
        return len(self.readers.get(value, ())) == 1 and value not in self.source.outputs
