"""Plans that a board builds: `edgesd finalize --on` and `edgesd build --on`, over a real SSH
connection to a Jetson whose TensorRT is a fake."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgesd.engines import plans
from edgesd.engines.bundle import pack_bundle
from edgesd.runtime.bundle import Bundle, open_bundle
from edgesd.runtime.cuda import Gpu
from tests import fake_tensorrt
from tests.boards import JETSON, MACHINE, Builder, Jetson, Server, sshd
from tests.support import Outcome, assert_refused, run_cli, write_bundle

COMPONENTS = ("text_encoder", "unet", "vae_decoder")


@pytest.fixture
def jetson(tmp_path: Path) -> Jetson:
    return Jetson(tmp_path / "board")


@pytest.fixture
def server(jetson: Jetson, tmp_path: Path) -> Iterator[Server]:
    with sshd(tmp_path / "user", jetson.home) as found:
        yield found


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_bundle(tmp_path / "graphs", "jetson-orin-nano-4gb", "aarch64", "tensorrt")


def host(server: Server) -> str:
    return f"jetson@127.0.0.1:{server.port}"


def left_on(server: Server) -> list[Path]:
    folder = server.home / ".cache/edgesd/incoming"
    return list(folder.iterdir()) if folder.exists() else []


@pytest.mark.parametrize("form", ["folder", "file"])
def test_plans_come_back_in_a_bundle(
    form: str, server: Server, jetson: Jetson, bundle: Bundle, tmp_path: Path
) -> None:
    path = bundle.path
    if form == "file":
        path = tmp_path / "graphs.edgesd"
        pack_bundle(bundle, path)
    out = tmp_path / ("new.edgesd" if form == "file" else "new")
    outcome = run_cli("finalize", path, "--on", host(server), "-o", out)
    assert outcome.code == 0, outcome.err
    assert "building the plan of unet for this machine, once" in outcome.err
    assert "tensorrt 10.3.0, sm_87" in outcome.out
    made = open_bundle(out)
    made.verify()
    for name in COMPONENTS:
        engine = made.manifest.engines[name]
        assert engine.plan == f"plans/{name}.plan" and engine.built_for == JETSON
        assert engine.checked == f"built for sm_87 on {MACHINE.model} by tensorrt 10.3.0"
        assert made.read(engine.plan).startswith(b"\x08")
    assert jetson.built == list(COMPONENTS)
    assert left_on(server) == []
    told = run_cli("inspect", out)
    assert told.code == 0 and "its plan is for tensorrt 10.3.0, sm_87" in told.out
    again = run_cli("finalize", path, "--on", host(server), "-o", out)
    assert_refused(again, "exists already")


def test_a_plan_of_the_bundle_is_used_where_it_was_built_for(
    server: Server,
    board: Builder,
    bundle: Bundle,
    miniature: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    made, wanted, generated = tmp_path / "new", tmp_path / "wanted.png", tmp_path / "generated.png"
    assert run_cli("finalize", bundle.path, "--on", host(server), "-o", made).code == 0
    monkeypatch.setenv("EDGESD_PLANS", str(tmp_path / "none yet"))
    generate = ("generate", "-p", "a red apple", "--seed", "3", "--any-machine")
    assert run_cli(*generate, miniature.path, "-o", wanted).code == 0
    outcome = run_cli(*generate, made, "-o", generated, "--no-fallback")
    assert outcome.code == 0, outcome.err
    assert board.built == []  # the bundle brings them
    np.testing.assert_array_equal(np.asarray(Image.open(wanted)), np.asarray(Image.open(generated)))
    told = run_cli("finalize", made)
    assert told.out.count("the bundle's own plan fits") == 3

    monkeypatch.setattr(fake_tensorrt, "__version__", "10.7.0")
    outcome = run_cli(*generate, made, "-o", generated, "--no-fallback")
    assert outcome.code == 0, outcome.err
    assert len(board.built) == 3  # its own are for another TensorRT
    (said,) = caplog.messages
    assert "built for tensorrt 10.3.0, sm_87" in said and "is tensorrt 10.7.0, sm_87" in said

    caplog.clear()
    monkeypatch.setattr(fake_tensorrt, "__version__", "10.3.0")
    monkeypatch.setattr(plans, "find_gpu", lambda: Gpu("Thor", "sm_110", 8 << 30))
    outcome = run_cli(*generate, made, "-o", generated, "--no-fallback")
    assert outcome.code == 0, outcome.err
    assert len(board.built) == 6  # and these for another GPU
    (said,) = caplog.messages
    assert "built for tensorrt 10.3.0, sm_87" in said and "is tensorrt 10.3.0, sm_110" in said


def test_a_link_that_is_lost_on_the_way(
    server: Server, jetson: Jetson, bundle: Bundle, tmp_path: Path
) -> None:
    chance = random.Random(4)
    out = tmp_path / "new"
    losses = 0
    for _ in range(200):
        server.cut_after = server.written + chance.randrange(1, bundle.disk_bytes())
        outcome = run_cli("finalize", bundle.path, "--on", host(server), "-o", out)
        if outcome.code == 0:
            break
        losses += 1
        assert_refused(outcome, "was lost: run the command again, it goes on")
        assert not out.exists()
        assert not [path for path in tmp_path.iterdir() if path.name.endswith(".part")]
    assert losses >= 1
    open_bundle(out).verify()
    assert jetson.built == list(COMPONENTS)


def test_a_build_that_fails_on_the_board(
    server: Server, jetson: Jetson, bundle: Bundle, tmp_path: Path
) -> None:
    jetson.change(error="unet: tensorrt refuses the graph: Conv_3 has no kernel")
    outcome = run_cli("finalize", bundle.path, "--on", host(server), "-o", tmp_path / "new")
    assert outcome.code == 8
    last = outcome.err.splitlines()[-1]
    assert last.startswith(f"edgesd: {host(server)}: edgesd finalize: unet: tensorrt refuses")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"capabilities": ("dotprod", "fp16_arithmetic")}, "without sm_87"),
        ({"arch": "x86_64"}, "bundle is for jetson-orin-nano-4gb (aarch64)"),
        ({"memory_bytes": 2 << 30}, "with 2 GB of memory"),
    ],
)
def test_a_board_of_another_kind(
    changes: dict[str, object],
    words: str,
    server: Server,
    jetson: Jetson,
    bundle: Bundle,
    tmp_path: Path,
) -> None:
    jetson.change(target=None, **changes)
    outcome = run_cli("finalize", bundle.path, "--on", host(server), "-o", tmp_path / "new")
    assert outcome.code == 5
    assert_refused(outcome, host(server), words)
    assert server.written == 0


def test_a_board_without_a_gpu(
    server: Server, jetson: Jetson, bundle: Bundle, tmp_path: Path
) -> None:
    jetson.change(gpu=False)
    outcome = run_cli("finalize", bundle.path, "--on", host(server), "-o", tmp_path / "new")
    assert_refused(outcome, host(server), "there is no NVIDIA driver")


def test_a_board_that_answers_in_another_form(
    server: Server, jetson: Jetson, bundle: Bundle, tmp_path: Path
) -> None:
    program = jetson.home / ".local/bin/edgesd"
    program.write_text("#!/bin/sh\necho '{\"machine\": {}}'\n")
    outcome = run_cli("finalize", bundle.path, "--on", host(server), "-o", tmp_path / "new")
    assert_refused(outcome, host(server), "install the same version there")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--on", "jetson@board"), "name it by -o"),
        (("--on", "jetson:secret@board", "-o", "new"), "a password has no place there"),
        (("-o", "new"), "-o goes with --on"),
        (("--check",), "give nothing else"),
    ],
)
def test_what_is_asked_in_the_wrong_way(
    arguments: tuple[str, ...], words: str, bundle: Bundle
) -> None:
    outcome = run_cli("finalize", bundle.path, *arguments)
    assert outcome.code == 2
    assert words in outcome.err


def test_a_bundle_that_needs_no_plans(miniature: Bundle, tmp_path: Path) -> None:
    outcome = run_cli("finalize", miniature.path, "--on", "jetson@board", "-o", tmp_path / "new")
    assert_refused(outcome, "which needs no plans")
    assert not (tmp_path / "new").exists()


def test_what_this_machine_builds_plans_for(board: Builder) -> None:
    outcome = run_cli("finalize", "--check")
    assert "plans are built for tensorrt 10.3.0, sm_87" in outcome.out
    told = json.loads(run_cli("finalize", "--check", "--json").out)
    assert told["environment"]["sm"] == "sm_87" and "arch" in told["machine"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("torch")
    from tests.tiny_pipelines import write_tiny

    return write_tiny("sd", tmp_path_factory.mktemp("model") / "sd")


class TestBuild:
    """`edgesd build --on`, on a tiny pipeline."""

    @pytest.fixture(autouse=True)
    def _quick(self, kept_exports: object, monkeypatch: pytest.MonkeyPatch) -> None:
        """Exported once, and without TensorRT-RTX's check, which other tests see."""
        monkeypatch.setattr("edgesd.export.backends.tensorrt.CHECK_MODULE", "no_such_module")

    def build(self, model: Path, server: Server, out: Path) -> Outcome:
        return run_cli(
            *("build", model, "--target", "jetson-orin", "--precision", "fp16"),
            *("--size", "32x32", "--on", host(server), "-o", out),
        )

    def test_it_ends_in_engines(
        self, model: Path, server: Server, jetson: Jetson, tmp_path: Path
    ) -> None:
        out = tmp_path / "demo.edgesd"
        outcome = self.build(model, server, out)
        assert outcome.code == 0, outcome.err
        assert f"{host(server)} builds plans for tensorrt 10.3.0, sm_87" in outcome.err
        assert "note:" not in outcome.out
        manifest = open_bundle(out).manifest
        assert all(engine.built_for == JETSON for engine in manifest.engines.values())
        assert "vae_decoder" in jetson.built

    def test_a_failure_at_the_end_costs_no_more_than_the_plans(
        self, model: Path, server: Server, jetson: Jetson, tmp_path: Path
    ) -> None:
        out = tmp_path / "demo.edgesd"
        jetson.change(error="unet: tensorrt was killed")
        outcome = self.build(model, server, out)
        assert outcome.code == 8
        last = outcome.err.splitlines()[-1]
        assert "tensorrt was killed" in last
        assert f"edgesd finalize {out} --on {host(server)} -o NEW adds them" in last
        made = open_bundle(out)
        made.verify()
        assert not any(engine.plan for engine in made.manifest.engines.values())
        jetson.change()
        again = run_cli("finalize", out, "--on", host(server), "-o", tmp_path / "whole.edgesd")
        assert again.code == 0, again.err

    def test_a_board_that_does_not_answer_is_told_before_long_work(
        self, model: Path, server: Server, tmp_path: Path
    ) -> None:
        (tmp_path / "user/.ssh/known_hosts").unlink()
        outcome = self.build(model, server, tmp_path / "demo")
        assert outcome.code == 8
        assert_refused(outcome, "its host key isn't known here")

    def test_a_target_without_plans(self, tmp_path: Path) -> None:
        outcome = run_cli("build", "demo", "--target", "raspberry-pi-5", "--on", "pi@board")
        assert outcome.code == 2 and "raspberry-pi-5 needs none" in outcome.err


def test_an_empty_address_is_no_address_and_nothing_is_built(tmp_path: Path) -> None:
    out = tmp_path / "new"
    outcome = run_cli("build", "demo", "--target", "jetson-orin-nano", "--on", "", "-o", out)
    assert outcome.code == 2
    assert_refused(outcome, "'' isn't a board's address")
    assert not out.exists()
