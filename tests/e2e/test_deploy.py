"""`edgesd deploy` over a real SSH connection to a home folder on this machine, where a real edgesd
takes the bundles in. Installing the runtime is left to the tests of the fake board."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image

from edgesd.engines.bundle import update_manifest
from edgesd.remote import deploy as deploying
from edgesd.runtime.bundle import Bundle, open_bundle
from edgesd.runtime.lora import read_lora
from edgesd.runtime.signature import new_key
from edgesd.spec.bundle import SCHEMA_VERSION
from tests.boards import Pi, Server, sshd
from tests.support import (
    PATIENCE_SECONDS,
    Outcome,
    assert_refused,
    lora_file,
    run_cli,
    wait_until,
    with_lora_slot,
    with_other_decoder,
)

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def pi(tmp_path: Path) -> Pi:
    return Pi(tmp_path / "board")


@pytest.fixture
def server(pi: Pi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    async def kept(*_: object) -> tuple[int, int]:
        return 0, 0

    monkeypatch.setattr(deploying, "_runtime", kept)
    with sshd(tmp_path / "user", pi.home) as found:
        yield found


@pytest.fixture
def other(miniature: Bundle, tmp_path: Path) -> Bundle:
    """The same bundle, but for its decoder's weights."""
    return with_other_decoder(miniature, tmp_path / "other")


def host(server: Server) -> str:
    return f"jetson@127.0.0.1:{server.port}"


def deploy(server: Server, bundle: Bundle, *more: object) -> Outcome:
    return run_cli("deploy", bundle.path, host(server), *more)


def active(pi: Pi) -> str:
    """The manifest of the active bundle, once every byte of it is verified."""
    bundle = open_bundle(pi.home / "edgesd/current")
    bundle.verify()
    return bundle.manifest_sha256


def test_deploy_and_generate(server: Server, pi: Pi, miniature: Bundle, tmp_path: Path) -> None:
    outcome = deploy(server, miniature)
    assert outcome.code == 0, outcome.err
    assert "active in slot a" in outcome.err and "generating a test image" in outcome.err
    assert active(pi) == miniature.manifest_sha256
    generate = ("-p", "a", "--seed", "1", "--steps", "2")
    ours, theirs = tmp_path / "ours.png", tmp_path / "theirs.png"
    assert run_cli("generate", miniature.path, *generate, "-o", ours).code == 0
    assert run_cli("generate", pi.home / "edgesd/current", *generate, "-o", theirs).code == 0
    np.testing.assert_array_equal(np.asarray(Image.open(ours)), np.asarray(Image.open(theirs)))


@pytest.fixture
def slotted(miniature: Bundle, tmp_path: Path) -> Bundle:
    return with_lora_slot(miniature, tmp_path / "slotted")


def test_loras_come_with_a_bundle(
    server: Server, pi: Pi, slotted: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name there, what the file is here; a further deploy sends what changed of them."""
    style, other = (lora_file(tmp_path / f"{n}.lora", seed=i) for i, n in enumerate("ab"))
    outcome = deploy(server, slotted, "--lora", style, "--lora", other, "--no-self-test")
    assert outcome.code == 0 and "LoRAs: a, b. Generate there" in outcome.err, outcome.err
    monkeypatch.setenv("EDGESD_HOME", str(pi.home / "edgesd"))
    assert "lora  a, 0.0 MB" in run_cli("slots", "show").out

    def pixels(bundle: Path, *lora: object) -> bytes:
        options = ("-p", "a", "--seed", "1", "--steps", "2", "-o", tmp_path / "image.png")
        asked = [part for one in lora for part in ("--lora", one)]
        outcome = run_cli("generate", bundle, *options, *asked)
        assert outcome.code == 0, outcome.err
        return Image.open(tmp_path / "image.png").tobytes()

    current = pi.home / "edgesd/current"
    here, there = pixels(slotted.path, f"{style}:0.5"), pixels(current, "a:0.5")
    assert here == there != pixels(current) and there != pixels(current, "b.lora:0.5")
    before = server.written
    assert deploy(server, slotted, "--lora", style).code == 0
    assert server.written == before
    told = json.loads(
        deploy(server, slotted, "--lora", lora_file(style, 3), "--json", "--no-self-test").out
    )[host(server)]
    assert told["sent_bytes"] == style.stat().st_size == server.written - before
    (placed,) = told["loras"]
    assert placed["sha256"] == read_lora(pi.home / "edgesd/loras/a.lora").sha256
    assert pixels(current, "b.lora")
    objects = {path.name for path in (pi.home / "edgesd/objects").iterdir()}
    assert {placed["sha256"], read_lora(other).sha256} < objects


def test_a_lora_that_does_not_fit_is_refused_before_anything_is_sent(
    server: Server, miniature: Bundle, slotted: Bundle, tmp_path: Path
) -> None:
    style = lora_file(tmp_path / "style.lora")
    broken = tmp_path / "broken.lora"
    broken.write_bytes(style.read_bytes()[:-4])
    (tmp_path / "more").mkdir()
    same = lora_file(tmp_path / "more/style.lora", seed=1)
    for bundle, loras, words in (
        (miniature, [style], "has no place for LoRAs"),
        (slotted, [style, lora_file(tmp_path / "wide.lora", outputs=7)], "for another model"),
        (slotted, [lora_file(tmp_path / "high.lora", rank=5)], "--lora-slots 4"),
        (slotted, [broken], "copy it anew"),
        (slotted, [tmp_path / "none.lora"], "none.lora: it can't be read"),
        (slotted, [lora_file(tmp_path / "a b.lora")], "can't be the name of a LoRA"),
        (slotted, [style, same], "the same name"),
    ):
        asked = [part for lora in loras for part in ("--lora", lora)]
        assert_refused(deploy(server, bundle, *asked), words)
    assert_refused(run_cli("deploy", "--rollback", host(server), "--lora", style), "LoRAs stay")
    assert server.written == 0


def test_the_same_again_sends_nothing(server: Server, pi: Pi, miniature: Bundle) -> None:
    assert deploy(server, miniature).code == 0
    before = server.written
    outcome = deploy(server, miniature)
    assert "is active already, and every byte of it is right" in outcome.err
    assert server.written == before


def test_only_what_changed_is_sent(
    server: Server, pi: Pi, miniature: Bundle, other: Bundle
) -> None:
    assert deploy(server, miniature).code == 0
    outcome = deploy(server, other, "--json")
    told = json.loads(outcome.out)[host(server)]
    changed = other.manifest.files["vae_decoder/weights.bin"].bytes
    frame = sum(other.size(name) for name in other.frame)
    assert told["sent_bytes"] == changed + frame == told["written_bytes"]
    assert active(pi) == other.manifest_sha256
    slots = {slot.slot: slot for slot in pi.slots.show()}
    assert slots["b"].active and slots["a"].manifest_sha256 == miniature.manifest_sha256
    shared = pi.home / "edgesd/slots/a/unet/weights.bin"
    assert shared.samefile(pi.home / "edgesd/slots/b/unet/weights.bin")


def test_back_and_forth(server: Server, pi: Pi, miniature: Bundle, other: Bundle) -> None:
    assert_refused(run_cli("deploy", "--rollback", host(server)), "no bundle to go back to")
    assert deploy(server, miniature).code == 0
    assert deploy(server, other).code == 0
    for wanted in (miniature, other):
        outcome = run_cli("deploy", "--rollback", host(server))
        assert outcome.code == 0, outcome.err
        assert active(pi) == wanted.manifest_sha256


def test_a_failed_self_test_changes_nothing(
    server: Server, pi: Pi, miniature: Bundle, other: Bundle, tmp_path: Path
) -> None:
    assert deploy(server, miniature).code == 0
    assert deploy(server, other).code == 0
    broken = tmp_path / "broken"
    shutil.copytree(miniature.path, broken)
    (broken / "unet/model.onnx").write_bytes(b"this is no graph")
    update_manifest(broken, miniature.manifest, ["unet/model.onnx"])
    outcome = deploy(server, open_bundle(broken))
    assert outcome.code == 8
    assert "the self-test failed, nothing was switched" in outcome.err.splitlines()[-1]
    assert active(pi) == other.manifest_sha256
    assert [slot.manifest_sha256 for slot in pi.slots.show()] == [
        other.manifest_sha256,
        miniature.manifest_sha256,
    ]


def test_a_board_with_an_older_runtime_refuses_a_newer_bundle_in_one_line(
    server: Server, pi: Pi, miniature: Bundle, other: Bundle
) -> None:
    assert deploy(server, miniature).code == 0
    pi.program.write_text(older_program())
    outcome = deploy(server, other)
    assert outcome.code == 8
    last = outcome.err.splitlines()[-1]
    newest = SCHEMA_VERSION
    assert f"has schema version {newest}; this edgesd reads up to {newest - 1}: upgrade" in last
    assert active(pi) == miniature.manifest_sha256


def older_program() -> str:
    """An edgesd that reads bundles of the schema before."""
    code = (
        "import edgesd.spec.bundle as bundle\n"
        f"bundle.SCHEMA_VERSION = {SCHEMA_VERSION - 1}\n"
        "from edgesd.cli import main\n"
        "main()\n"
    )
    return f"#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -c '{code}' \"$@\"\n"


def test_damage_on_the_board_is_mended(server: Server, pi: Pi, miniature: Bundle) -> None:
    assert deploy(server, miniature).code == 0
    weights = pi.home / "edgesd/current/unet/weights.bin"
    data = bytearray(weights.read_bytes())
    data[100] ^= 4
    weights.write_bytes(data)
    outcome = deploy(server, miniature)
    assert outcome.code == 0, outcome.err
    assert "installing it anew, for this reason" in outcome.err
    assert active(pi) == miniature.manifest_sha256


def test_signed_bundles_alone(
    server: Server, pi: Pi, miniature: Bundle, other: Bundle, tmp_path: Path
) -> None:
    assert deploy(server, miniature).code == 0
    new_key(tmp_path / "release")
    trust = ("keys", "trust", tmp_path / "release.pub", "--host", host(server))
    outcome = run_cli(*trust)
    assert outcome.code == 8
    assert "the active bundle miniature is not signed" in outcome.err and "--yes" in outcome.err
    assert "none" in run_cli("keys", "list", "--host", host(server)).out
    assert run_cli(*trust, "--yes").code == 0
    assert "release" in run_cli("keys", "list", "--host", host(server)).out
    outcome = deploy(server, other)
    assert outcome.code == 8
    assert "isn't signed, and this machine runs only" in outcome.err.splitlines()[-1]
    assert open_bundle(pi.home / "edgesd/current").manifest_sha256 == miniature.manifest_sha256
    assert run_cli("keys", "sign", other.path, "--key", tmp_path / "release.key").code == 0
    outcome = deploy(server, open_bundle(other.path))
    assert outcome.code == 0 and "(release)" in outcome.err, outcome.err


def test_a_signature_is_delivered_to_the_bundle_that_is_active(
    server: Server, pi: Pi, miniature: Bundle, other: Bundle, tmp_path: Path
) -> None:
    """And the bundle to go back to stays; then the key may be trusted."""
    assert deploy(server, miniature).code == 0
    assert deploy(server, other).code == 0
    new_key(tmp_path / "release")
    assert run_cli("keys", "sign", other.path, "--key", tmp_path / "release.key").code == 0
    outcome = deploy(server, open_bundle(other.path), "--no-self-test")
    assert outcome.code == 0 and "sending its signature" in outcome.err, outcome.err
    slots = pi.slots.show()
    assert [slot.manifest_sha256 for slot in slots] == [
        other.manifest_sha256,
        miniature.manifest_sha256,
    ]
    assert slots[0].signature_sha256 and not slots[1].signature_sha256
    trust = ("keys", "trust", tmp_path / "release.pub", "--host", host(server))
    assert run_cli(*trust).code == 0
    outcome = deploy(server, open_bundle(other.path))
    assert outcome.code == 0 and "is active already" in outcome.err, outcome.err


def test_a_home_of_edgesd_that_the_board_sets_does_not_mislead_deploy(
    server: Server, pi: Pi, miniature: Bundle
) -> None:
    server.before = "export EDGESD_HOME=/nonexistent; "
    assert deploy(server, miniature, "--no-self-test").code == 0
    assert active(pi) == miniature.manifest_sha256


def test_a_rollback_names_boards_alone(server: Server, pi: Pi, miniature: Bundle) -> None:
    outcome = run_cli("deploy", "--rollback", miniature.path, host(server))
    assert outcome.code == 2
    assert_refused(outcome, "give only boards")


def test_several_boards_at_once(server: Server, pi: Pi, miniature: Bundle) -> None:
    outcome = run_cli("deploy", miniature.path, host(server), "jetson@127.0.0.1:1")
    assert outcome.code == 8
    assert active(pi) == miniature.manifest_sha256
    assert "127.0.0.1 refuses connections to port 1: does sshd run there" in outcome.err
    assert outcome.err.splitlines()[-1] == "edgesd: 1 of 2 boards failed: see the lines above"
    outcome = run_cli("deploy", miniature.path, host(server), host(server))
    assert outcome.code == 2 and "named twice" in outcome.err


def test_a_board_of_another_architecture(server: Server, miniature: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "arm"
    shutil.copytree(miniature.path, path)
    other = "x86_64" if miniature.manifest.arch == "aarch64" else "aarch64"
    update_manifest(path, msgspec.structs.replace(miniature.manifest, arch=other))
    outcome = deploy(server, open_bundle(path))
    assert outcome.code == 5
    assert_refused(outcome, "build it for a board of that architecture")
    assert server.written == 0


def test_a_tampered_bundle_is_not_sent_whole(
    server: Server, pi: Pi, miniature: Bundle, other: Bundle
) -> None:
    assert deploy(server, miniature).code == 0
    path = other.path / "vae_decoder/weights.bin"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    outcome = deploy(server, open_bundle(other.path))
    assert outcome.code == 4
    assert "was altered or damaged" in outcome.err.splitlines()[-1]
    assert active(pi) == miniature.manifest_sha256


@pytest.mark.parametrize("arguments", [(), ("bundle",), ("--rollback",)])
def test_no_board_is_named(arguments: tuple[str, ...]) -> None:
    assert run_cli("deploy", *arguments).code == 2


def chaos(
    server: Server,
    pi: Pi,
    bundles: tuple[Bundle, Bundle],
    count: int,
    kill: bool,
    later: float = 0.1,
) -> tuple[int, int]:
    """Disturb `count` deploys at random points; those that failed, and those that still switched.

    The first one as a command begins or bytes arrive, the others up to `later` seconds behind such
    a point. After each, the active bundle is one of the two and whole, and a deploy without
    disturbance brings the other one.
    """
    chance = random.Random(7)
    assert deploy(server, bundles[0]).code == 0
    events = 0

    def count_events() -> None:
        nonlocal events
        events += 1

    server.on_event = count_events
    shutil.rmtree(pi.home / "edgesd/objects")
    assert deploy(server, bundles[1]).code == 0
    usual, failed, switched = events, 0, 0
    assert usual > 10
    for index in range(count):
        wanted = bundles[index % 2]
        shutil.rmtree(pi.home / "edgesd/objects")  # so that there is much to send
        left, delay = chance.randrange(usual), chance.uniform(0, later) if index else 0.0

        def disturb() -> None:
            if kill:
                for process in pi.processes():
                    if process != os.getpid():
                        os.kill(process, signal.SIGKILL)
            server.hang_up()

        def count_down(delay: float = delay) -> None:
            nonlocal left
            if left == 0:
                asyncio.get_running_loop().call_later(delay, disturb)
            left -= 1

        server.on_event = count_down
        outcome = deploy(server, wanted)
        server.on_event = lambda: None
        found = active(pi)
        assert found in {bundle.manifest_sha256 for bundle in bundles}
        if outcome.code:
            failed += 1
            switched += found == wanted.manifest_sha256
        again = deploy(server, wanted)
        assert again.code == 0, again.err
        assert active(pi) == wanted.manifest_sha256
    return failed, switched


@pytest.mark.parametrize("kill", [False, True])
def test_cut_and_killed(
    kill: bool, server: Server, pi: Pi, miniature: Bundle, other: Bundle
) -> None:
    failed, _ = chaos(server, pi, (miniature, other), 3, kill)
    assert failed


@pytest.mark.slow
@pytest.mark.parametrize("kill", [False, True])
def test_cut_and_killed_at_50_points(
    kill: bool, server: Server, pi: Pi, miniature: Bundle, other: Bundle
) -> None:
    failed, switched = chaos(server, pi, (miniature, other), 50, kill)
    print(f"kill={kill}: {failed} of 50 failed, {switched} of these had switched; none lost")
    assert failed >= 25


def test_bench_over_ssh(
    server: Server, pi: Pi, miniature: Bundle, other: Bundle, tmp_path: Path
) -> None:
    """The link is cut in the middle; the board goes on, and the figures arrive."""
    asked = ("bench", miniature.path, "--host", host(server), "-n", "3", "--steps", "300")
    assert deploy(server, other).code == 0
    assert_refused(run_cli(*asked), "has another bundle active", "edgesd deploy")
    assert deploy(server, miniature).code == 0

    def begun() -> bool:
        return sum(b"detached" in cmdline(process) for process in pi.processes()) > 1

    def cut() -> None:
        wait_until(begun, "the bench on the board")
        server.hang_up()

    thread = threading.Thread(target=cut)
    thread.start()
    page = tmp_path / "page.html"
    outcome = run_cli(*asked, "--json", "--html", page)
    thread.join(PATIENCE_SECONDS)
    assert outcome.code == 0, outcome.err
    assert "was lost" in outcome.err and "joining it again" in outcome.err
    (told,) = json.loads(outcome.out)
    assert told["host"] == host(server) and len(told["runs"]) == 3
    assert page.exists()
    assert not list((pi.home / ".cache/edgesd/runs").iterdir())


def test_watch_over_ssh(server: Server, pi: Pi) -> None:
    outcome = run_cli("watch", "--seconds", "0.2", "--interval", "0.1", "--host", host(server))
    assert outcome.code == 0, outcome.err
    assert outcome.out and all("memory" in line for line in outcome.out.splitlines())
    assert_refused(run_cli("watch", "--host", host(server), "--pid", 2**22 + 1), "no process")


def cmdline(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""


def test_slots_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGESD_HOME", str(tmp_path / "edgesd"))
    assert "none: edgesd deploy installs one" in run_cli("slots", "show").out
    assert_refused(run_cli("slots", "check"), "no bundle is active")
    assert_refused(run_cli("slots", "install", "0" * 64, "1" * 64), "hasn't arrived")
