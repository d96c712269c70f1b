"""The benchmarks' own arithmetic, and short runs of those that need no peer."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import (
    beside_others,
    common,
    loop_overhead,
    parity,
    peer_files,
    peers,
    startup,
    whole_images,
)
from edgesd.errors import EdgesdError, UsageError
from edgesd.runtime.bundle import Bundle
from edgesd.runtime.schedulers import SCHEDULERS


def test_spread_is_median_and_quartiles() -> None:
    assert common.spread([5, 1, 2, 4, 3]) == (3, 2, 4, 5)
    assert common.spread([2.0]) == (2.0, 2.0, 2.0, 1)
    assert common.spread([1, 2]) == (1.5, 1.25, 1.75, 2)
    assert common.spread([3, 1, 2]).text(1) == "2.0 (1.5 to 2.5)"


def test_ratios_are_of_pairs() -> None:
    assert common.paired_ratio([1, 4, 9], [2, 4, 3]).median == 1
    with pytest.raises(ValueError, match="zip"):
        common.paired_ratio([1], [1, 2])


def test_tables_are_aligned() -> None:
    assert common.table(("a", "long"), [("wide", 1.5), ("b", 2)]).splitlines() == [
        "a     long",
        "----  -----",
        "wide  1.500",
        "b     2",
    ]


def test_json_is_written_only_when_asked(tmp_path: Path) -> None:
    common.write_json(None, {})
    common.write_json(tmp_path / "figures.json", {"environment": common.environment("none-such")})
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["environment"]["none-such"] == "not installed"
    assert figures["environment"]["cores"] >= 1


def test_loop_overhead_of_the_miniature(
    miniature: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "overhead.json"
    options = ["--steps", "4", "--repeats", "2", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", ["loop_overhead", str(miniature.path), *options])
    loop_overhead.main()
    figures = json.loads(out.read_text())
    names = {name for name, cls in SCHEDULERS.items() if cls.process == "diffusion"}
    assert set(figures["schedulers"]) == names
    for row in figures["schedulers"].values():
        assert 0 < row["overhead_percent"]["median"] < 100
        assert 0 < row["outside_us"]["median"] < row["step_us"]["median"]
        assert row["outside_us_fake"]["median"] > 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)


@pytest.mark.integration
def test_steps_beside_others_of_the_miniature(
    miniature: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "beside.json"
    options = ["--steps", "1", "--rounds", "1", "--libraries", "onnxruntime", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", ["beside_others", str(miniature.path), *options])
    beside_others.main()
    rows = json.loads(out.read_text())["rows"]
    assert [row["situation"] for row in rows] == list(beside_others.SITUATIONS)
    assert all(row["ratio"]["median"] > 0 for row in rows)


def test_import_report_is_read() -> None:
    report = (
        "import time: self [us] | cumulative | imported package\n"
        "import time:       200 |        300 |   numpy\n"
        "import time:       500 |       4200 | edgesd.runtime\n"
    )
    assert startup.import_us(report, "edgesd.runtime") == 4200
    with pytest.raises(EdgesdError, match="doesn't report"):
        startup.import_us(report, "edgesd")


def test_heavy_modules_are_found_past_an_exit() -> None:
    assert startup.heavy_modules("import numpy; raise SystemExit(0)") == ["numpy"]
    assert startup.heavy_modules(startup.HELP) == []


def test_parity_is_summed_up_per_case() -> None:
    rows = [
        parity.Row("a", "x", 0, math.inf, 0),
        parity.Row("a", "y", 1, 60.0, 2),
        parity.Row("a", "z", 2, 70.0, 1),
        parity.Row("b", "x", 0, math.inf, 0),
    ]
    assert parity.summarise(rows) == [
        ("a", 60.0, 65.0, 1, 3, 2),
        ("b", math.inf, math.inf, 1, 1, 0),
    ]
    assert parity.jsonable(rows[0]._asdict())["psnr_db"] is None
    assert len(set(parity.PROMPTS)) == 16


def test_the_true_size_is_that_of_stable_diffusion() -> None:
    model = peer_files.MODELS["sd15"]
    shapes = {name: array.shape for name, array in model.inputs().items()}
    assert shapes == {
        "sample": (1, 4, 64, 64),
        "timestep": (1,),
        "encoder_hidden_states": (1, 77, 768),
    }
    assert [tensor.name for tensor in model.spec().inputs] == list(shapes)


def test_a_controlnet_has_its_author_s_names() -> None:
    """As diffusers reads them."""
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

    kinds = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    net = diffusers.ControlNetModel(
        block_out_channels=(8, 16, 16, 16),
        down_block_types=kinds,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=2,
    )
    state = net.state_dict()
    named = {f"control_model.{peer_files.control_name(n)}": t for n, t in state.items()}
    assert len(named) == len(state)
    back = convert_controlnet_checkpoint(named, dict(net.config))
    assert back.keys() == state.keys() and all(back[name] is state[name] for name in state)
    with pytest.raises(EdgesdError, match="up_blocks"):
        peer_files.control_name("up_blocks.0.conv.weight")


@pytest.mark.integration
def test_a_random_controlnet_is_kept_for_the_peer(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors.numpy")
    from benchmarks.random_pipeline import write_controlnet

    write_controlnet(tmp_path / "control", channels=32)
    kept = peer_files.convert_sdcpp_control(tmp_path / "control", tmp_path / "work")
    tensors = safetensors.load_file(kept)
    zero = tensors["control_model.zero_convs.0.0.weight"]
    assert zero.dtype == np.float16 and np.abs(zero).max() > 0
    assert tensors["control_model.input_blocks.11.0.out_layers.3.weight"].shape == (128, 128, 3, 3)
    kept.write_bytes(b"kept")
    again = peer_files.convert_sdcpp_control(tmp_path / "control", tmp_path / "work")
    assert again == kept and kept.read_bytes() == b"kept"


def test_what_a_controlnet_is_shown_reaches_both_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that says what it was called with stands in for edgesd, a module for the peer."""
    told = tmp_path / "told.json"
    program = f"""
import json, pathlib, sys
pathlib.Path({str(told)!r}).write_text(json.dumps(sys.argv[1:]))
print(json.dumps({{"step_seconds": [1.0, 2.0, 9.0], "peak_memory_bytes": 7}}))
"""
    monkeypatch.setattr(
        whole_images, "module_command", lambda module, *rest: [sys.executable, "-c", program, *rest]
    )
    asked = whole_images.Asked((64, 32), 2, 1.0, 1, tmp_path / "edges.png", 0.5)
    made = whole_images.by_edgesd(tmp_path / "bundle", "stream", asked)
    assert (made.step_seconds, made.peak_bytes) == (2.0, 7)
    options = json.loads(told.read_text())
    assert options[options.index("--control") + 1] == str(tmp_path / "edges.png")
    assert options[options.index("--control-scale") + 1] == "0.5"
    given: dict[str, object] = {}

    class Fake:
        def __init__(self, **options: object) -> None:
            given.update(options)

        def generate_image(self, prompt: str, **options: Any) -> None:
            given.update(options)
            for step in range(options["sample_steps"] + 3):
                options["progress_callback"](step)

    monkeypatch.setitem(sys.modules, "stable_diffusion_cpp", SimpleNamespace(StableDiffusion=Fake))
    assert len(whole_images.sdcpp(tmp_path / "m.gguf", asked, tmp_path / "c.safetensors")) == 2
    assert given["control_net_path"] == str(tmp_path / "c.safetensors")
    assert (given["control_image"], given["control_strength"]) == (str(asked.control), 0.5)
    whole_images.sdcpp(tmp_path / "m.gguf", asked)
    assert given["control_net_path"] == "" and given["control_image"] is None


@pytest.mark.parametrize(
    "options", [["--control", "a.png", "--sdcpp", "q8_0"], ["--controlnet", "c"]]
)
def test_a_controlnet_goes_with_what_it_is_shown(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["whole_images", str(tmp_path), *options])
    with pytest.raises(EdgesdError, match="--controlnet goes with"):
        whole_images.main()


def test_relative_rms() -> None:
    # difference 1 and 1, wanted 3 and 4: sqrt(1) / sqrt(12.5)
    found, wanted = np.array([4, 5], np.float32), np.array([3, 4], np.float32)
    assert peers.relative_rms(found, wanted) == pytest.approx(1 / math.sqrt(12.5))


def test_memory_of_a_process_is_read() -> None:
    assert peers.status_bytes(os.getpid(), "VmHWM") > 10_000_000
    assert peers.status_bytes(0, "VmHWM") == 0


@pytest.mark.parametrize("best", [1e-4, 1e-3, 3.2e-3, 1e-1])
def test_a_learning_rate_is_tuned_to_its_best(best: float) -> None:
    pytest.importorskip("torch")
    from benchmarks.prompter_starts import tune

    asked = []

    def run(rate: float) -> dict[str, float]:
        asked.append(rate)
        return {"rate": rate, "tuning": math.log10(rate / best) ** 2}

    found = tune(run)
    assert abs(math.log10(found["rate"] / best)) <= 0.26
    assert len(set(asked)) == len(asked)


def test_the_grid_of_the_starts_is_that_of_q4_0() -> None:
    pytest.importorskip("torch")
    pytest.importorskip("gguf")
    from benchmarks.prompter_starts import grid
    from edgesd.export.prompter.gguf_files import rounded

    weight = np.random.default_rng(0).standard_normal((64, 96)).astype(np.float32)
    weight[0, :32] = 0
    ours, theirs = grid(4)(weight), rounded(weight, "Q4_0")
    error = np.linalg.norm(theirs - weight)
    assert np.linalg.norm(ours - theirs) < 0.1 * error  # ties
    assert np.linalg.norm(ours - weight) <= 1.001 * error
    errors = [np.linalg.norm(grid(bits)(weight) - weight) for bits in (4, 3, 2)]
    assert errors[0] < errors[1] < errors[2]
    assert len(np.unique(grid(2)(weight)[1, :32])) <= 4


def test_quantization_is_measured_of_what_onnx_runtime_runs_in_fp32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("torch")
    from benchmarks import quantization

    quantization.check_model("demo")
    monkeypatch.setattr(quantization, "REFER_BYTES", 1 << 20)
    with pytest.raises(UsageError, match=r"weights in fp32, .*: give a smaller model") as error:
        quantization.check_model("demo")
    assert "\n" not in str(error.value)
