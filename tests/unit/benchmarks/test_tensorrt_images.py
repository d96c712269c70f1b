"""The figures of a GPU, on fakes of the GPU and of TensorRT."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from edgesd.errors import EdgesdError
from edgesd.runtime.bundle import Bundle
from tests.boards import Builder
from tests.support import write_bundle

pytest.importorskip("torch")

from benchmarks import tensorrt_images
from benchmarks.tensorrt_images import Row, measured, rows


class Memory:
    """Free bytes: less at each question until the tenth, then as at first."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self) -> int:
        self.asked += 1
        return 1000 - (self.asked if self.asked < 10 else 0)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("tensorrt-images") / "bundle"
    return write_bundle(folder, "x86-64-cpu", "x86_64", "tensorrt")


def test_a_row_of_what_is_measured(
    ours: Bundle, miniature: Bundle, board: Builder, tmp_path: Path
) -> None:
    row = measured("tiny", ours, miniature, tmp_path / "plans", 2, Memory(), 1.5, 7)
    assert board.built == ["text_encoder", "unet", "vae_decoder"]
    assert row.psnr_db == math.inf  # the fake computes by ONNX Runtime
    assert row.step_ms > 0 and row.cpu_step_ms > 0
    assert row.plan_bytes == sum(p.stat().st_size for p in (tmp_path / "plans").glob("*.plan"))
    assert 0 < row.gpu_bytes <= 9
    assert (row.build_seconds, row.planned_bytes) == (1.5, 7)


def test_what_fails_or_is_late_is_named_and_the_rest_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = Row("sd15", "fp16", 40.0, 1.0, 2.0, 3, 4.0, 5, 6, 7.0)

    def one_row(model: str, precision: str, *_: object) -> Row:
        if model == "demo":
            raise EdgesdError("the GPU is on fire")
        return made

    monkeypatch.setattr(tensorrt_images, "one_row", one_row)
    found = list(rows(["demo", "sd15"], ["fp16"], tmp_path, 10, 4, Memory()))
    assert found == ["demo fp16: the GPU is on fire", made]
    late = list(rows(["sd15"], ["fp16"], tmp_path, -1, 4, Memory()))
    assert late == ["sd15 fp16: not begun, -1 minutes are over"]


@pytest.mark.slow
def test_the_embedded_pipeline_from_the_model_to_the_row(board: Builder, tmp_path: Path) -> None:
    row = tensorrt_images.one_row("demo", "fp16", tmp_path, 2, Memory())
    assert row.psnr_db > 40 and row.plan_bytes > 0 and row.planned_bytes > row.plan_bytes
