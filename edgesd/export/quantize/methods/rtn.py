"""Round to nearest, and the branch of the weight alone."""

from __future__ import annotations

from dataclasses import dataclass

from edgesd.export.quantize.method import Method, Problem, Represented
from edgesd.export.quantize.rounding import rounded


@dataclass(frozen=True, repr=False)
class RoundToNearest(Method):
    """Each group's scale is chosen to lose least, whatever the inputs are."""

    name = label = "rtn"

    def represent(self, problem: Problem) -> Represented:
        up, down, rest = problem.plain_branch()
        codes, scales, _ = rounded(rest, problem.group, problem.bits)
        return Represented(codes, scales, up, down)


METHOD = RoundToNearest
