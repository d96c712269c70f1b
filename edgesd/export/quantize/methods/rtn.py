"""Round to nearest, and the branch of the weight alone."""

from __future__ import annotations

from dataclasses import dataclass

from edgesd.export.quantize.method import Method, Problem, Represented
from edgesd.export.quantize.rounding import group_scales, round_to_nearest


@dataclass(frozen=True, repr=False)
class RoundToNearest(Method):
    """Each group's scale is chosen to lose least, whatever the inputs are."""

    name = label = "rtn"
    correlates = False

    def represent(self, problem: Problem) -> Represented:
        up, down, rest = problem.plain_branch()
        scales = group_scales(rest, problem.group, problem.bits)
        codes = round_to_nearest(rest, scales, problem.group, problem.bits)
        return Represented(codes, scales, up, down)


METHOD = RoundToNearest
