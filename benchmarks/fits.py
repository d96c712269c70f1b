"""What fits where: `edgesd plan` of models on every target, as a table in Markdown.

    python -m benchmarks.fits MODEL [MODEL ...] [--precisions fp16 w8a8 w4a8-g64]

A cell names the fastest --memory mode that fits the board's memory, and its peak in MB; or, in
brackets, what the mode that takes least would need. Nothing is built or measured: the planner
(docs/planner.md) reads each model's configs, and hashes its weights once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.common import environment, parser, run, write_json
from edgesd.device.targets import check_request, list_targets
from edgesd.errors import TargetError
from edgesd.recipes.estimate import Estimate, PlanRequest
from edgesd.recipes.options import model_name
from edgesd.recipes.planner import estimate_source
from edgesd.recipes.sources import open_model
from edgesd.spec.target import Target

PRECISIONS = ("fp16", "w8a8", "w4a16-g64", "w4a8-g64")


def cell(estimate: Estimate) -> str:
    """One model in one precision on one board."""
    if estimate.mode is None:
        return f"({estimate.needed_bytes / 1e6:.0f})"
    return f"{estimate.mode} {estimate.memory[estimate.mode] / 1e6:.0f}"


def rows(model: str, precisions: Sequence[str]) -> Iterator[tuple[Target, dict[str, str]]]:
    """Each board, and a cell for each precision that it takes; "-" where it takes none."""
    source = open_model(model, weights=False)
    for target in list_targets():
        backend = target.backends[0]
        found = {}
        for precision in precisions:
            try:
                check_request(target, precision, backend)
                estimate = estimate_source(source, model, target, backend, PlanRequest(precision))
            except TargetError:
                found[precision] = "-"
            else:
                found[precision] = cell(estimate)
        yield target, found


def main() -> None:
    """Plan, print, and write."""
    arguments = parser(__doc__)
    arguments.add_argument("models", nargs="+", metavar="MODEL")
    arguments.add_argument("--precisions", nargs="+", default=list(PRECISIONS))
    given = arguments.parse_args()
    figures: dict[str, Any] = {"environment": environment(), "models": {}}
    for model in given.models:
        name = model_name(model)
        head = [name, *given.precisions]
        print(f"\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
        lines = figures["models"][name] = {}
        for target, found in rows(model, given.precisions):
            lines[target.name] = found
            print(f"| {target.name} | {' | '.join(found.values())} |", flush=True)
    write_json(given.json, figures)


if __name__ == "__main__":
    run(main)
