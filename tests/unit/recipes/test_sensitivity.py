"""What stands in for a layer's effect on images of a large model, for which none are generated."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")

from edgesd.export.quantize.layers import Layer
from edgesd.progress import SILENT
from edgesd.recipes.sensitivity import Sensitivities
from edgesd.runtime.bundle import Bundle
from edgesd.spec.scheme import Scheme

W8A8 = Scheme(8, 8)


def test_the_error_of_a_layer_s_output_stands_in_where_weights_stay_in_the_checkpoint(
    miniature: Bundle, tmp_path: Path
) -> None:
    near, far, whole, unused = (
        Layer(component, name, f"{name}/MatMul", "linear", (64, 64))
        for component, name in (
            ("unet", "near"), ("unet", "far"), ("unet", "whole"), ("spare", "unused")
        )
    )  # fmt: skip
    errors = {near: 0.01, far: 0.1}
    store: Any = SimpleNamespace(
        graphs=SimpleNamespace(whole=lambda: False),
        folder=tmp_path,
        summary=lambda layer, scheme: SimpleNamespace(error=errors[layer]),
    )
    comparison: Any = SimpleNamespace(
        reference=miniature, folder=tmp_path, encodes=lambda places: False
    )
    planned = {near: W8A8, far: W8A8, whole: None, unused: W8A8}
    ours = Sensitivities(comparison, store, planned, W8A8, tmp_path, SILENT)
    found = ours.measure((0, 1))
    assert found == {near: pytest.approx(1e-4), far: pytest.approx(1e-2), whole: 0.0, unused: 0.0}
    assert list(tmp_path.iterdir()) == []
