"""Graph rewrites. Each is a pass: requires -> call -> ensures, and says whether it changed
anything.

The habit is onnx_ir's (its passes/_pass_infra.py); a rewrite goes into a file of its own here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir


class Pass(ABC):
    """A rewrite of a model, in place."""

    def __call__(self, model: ir.Model) -> bool:
        """Check, rewrite, check again. True if the model was changed. Raises EdgesdError."""
        self.requires(model)
        changed = self.call(model)
        self.ensures(model)
        return changed

    def requires(self, model: ir.Model) -> None:  # noqa: B027 - most passes take any model
        """Raise EdgesdError when this pass can't work on `model`."""

    @abstractmethod
    def call(self, model: ir.Model) -> bool:
        """Rewrite `model`; True if it was changed."""

    def ensures(self, model: ir.Model) -> None:  # noqa: B027 - most passes promise nothing more
        """Raise EdgesdError when `model` isn't as this pass promises."""
