"""Benchmarks: the figures, the JSON, the page, and runs that go on alone."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import msgspec
import pytest

from edgesd.device import detached
from edgesd.device.bench import (
    BENCH_VERSION,
    Bench,
    Run,
    compare,
    energy_joules,
    read_bench,
    stats,
    summarize,
)
from edgesd.device.telemetry import Sample
from edgesd.errors import BoardError, InputError, UsageError
from edgesd.runtime.bundle import Bundle
from tests.support import PATIENCE_SECONDS, run_cli, wait_until


def sample(seconds: float, watts: float | None = None, **fields: object) -> Sample:
    rails = {} if watts is None else {"VDD_IN": watts}
    return msgspec.structs.replace(Sample(seconds, watts=rails), **fields)  # type: ignore[arg-type]


def run(start: float, end: float, seed: int = 0) -> Run:
    return Run(seed, start, end, {"unet": 0.5}, {"unet": end - start}, (0.1, 0.2))


def test_stats() -> None:
    found = stats([5.0, 1.0, 2.0, 3.0, 4.0, 6.0, 7.0, 8.0, 9.0, 10.0])
    assert (found.count, found.median, found.p90) == (10, 5.5, 9.0)
    assert (found.minimum, found.maximum, found.spread) == (1.0, 10.0, 4.5)
    assert stats([2.0]) == stats([2.0])
    assert stats([2.0]).spread == 0


def test_energy_is_the_integral_of_power() -> None:
    samples = [sample(t, w) for t, w in ((0, 2.0), (2, 6.0), (4, 6.0), (6, 0.0))]
    assert energy_joules(samples, 0, 6) == pytest.approx(8 + 12 + 6)
    assert energy_joules(samples, 1, 3) == pytest.approx(5 + 6)
    assert energy_joules(samples, 1, 7) is None  # nobody knows what came behind
    assert energy_joules([sample(t) for t in (0, 1, 2)], 0, 1) is None
    assert energy_joules([], 0, 1) is None


def test_summary() -> None:
    samples = [
        sample(0, 3.0, celsius={"cpu": 40.0}),
        sample(2, 3.0, celsius={"cpu": 41.0}),
        sample(4, 9.0, celsius={"cpu": 60.0, "gpu": 55.0}, cpu_mhz=(1500, 0)),
        sample(6, 9.0, celsius={"cpu": 82.0}, cpu_mhz=(1000, 600), limits=("throttled",)),
        sample(8, 9.0, memory_used_bytes=7, limits=("throttled", "frequency capped")),
        sample(10, 3.0, celsius={"cpu": 99.0}),
    ]
    found = summarize([run(2.5, 3.5)], [run(4, 6), run(6, 8)], samples, 2.2, 123)
    assert found.image.median == 2 and found.step.count == 4
    assert found.idle_watts == 3 and found.joules == pytest.approx(18)
    assert found.joules_above_idle == pytest.approx(12)
    assert found.hottest_celsius == 82
    assert found.cpu_mhz and found.cpu_mhz.minimum == 1000
    assert found.throttled == ("throttled", "frequency capped") and found.throttled_at == 6
    assert found.system_memory_bytes == 7 and found.peak_memory_bytes == 123
    alone = summarize([run(2.5, 3.5)], [run(4, 6)], [], 2.2, 123)
    assert alone.joules is None and alone.cpu_mhz is None and alone.throttled == ()


@pytest.fixture(scope="module")
def made(miniature: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A benchmark of the miniature pipeline, by the command, and its page beside it."""
    path = tmp_path_factory.mktemp("bench") / "bench.json"
    outcome = run_cli(
        *("bench", miniature.path, "-n", "3", "--steps", "4", "--interval", "0.05"),
        *("-o", path, "--html", path.with_suffix(".html")),
    )
    assert outcome.code == 0, outcome.err
    assert "image " in outcome.out and "throttled" in outcome.out
    return path


@pytest.mark.integration
def test_what_is_measured(made: Path, miniature: Bundle) -> None:
    (bench,) = read_bench(made)
    assert bench.version == BENCH_VERSION
    assert bench.manifest_sha256 == miniature.manifest_sha256
    assert len(bench.runs) == len(bench.images) == 3
    assert [run.seed for run in bench.runs] == [0, 1, 2]
    assert all(len(run.steps) == 4 for run in bench.runs)
    assert set(bench.summary.components) == {"text_encoder", "unet", "vae_decoder"}
    assert set(bench.summary.load) == set(bench.summary.components)
    for one in bench.runs:
        assert sum(one.steps) <= one.seconds and 0 < sum(one.run.values()) <= one.seconds
        assert one.load == {}  # the warm-up has loaded
    assert bench.samples[0].seconds < bench.warm_up[0].start
    assert bench.summary.peak_memory_bytes > 10e6
    assert len(set(bench.images)) == 3


@pytest.mark.integration
def test_the_page_stands_alone(made: Path) -> None:
    page = made.with_suffix(".html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "<svg" in page and "http" not in page.replace("http-equiv", "")
    assert 'name="viewport"' in page


@pytest.mark.integration
def test_compare(made: Path, tmp_path: Path) -> None:
    outcome = run_cli("bench", "compare", made, made)
    assert outcome.code == 0
    assert all(line.endswith("1.000") for line in outcome.out.splitlines()[2:])
    (table,) = json.loads(run_cli("bench", "compare", made, made, "--json").out)
    assert table["s per step"]["before"] == table["s per step"]["after"]
    (bench,) = read_bench(made)
    with pytest.raises(UsageError, match="under emulation"):
        compare(bench, msgspec.structs.replace(bench, emulated=True))
    longer = msgspec.structs.replace(bench.asked, num_inference_steps=9)
    with pytest.raises(UsageError, match="num_inference_steps was 4 and 9"):
        compare(bench, msgspec.structs.replace(bench, asked=longer))


@pytest.mark.parametrize(
    "change",
    [
        {"runs": []},
        {"pictures": []},
        {"runs": [{"seed": 0, "start": 0, "end": 1, "load": {}, "run": {}, "steps": []}] * 3},
    ],
)
@pytest.mark.integration
def test_a_benchmark_without_what_it_is_of_is_refused(
    change: dict[str, object], made: Path, tmp_path: Path
) -> None:
    (found,) = json.loads(made.read_bytes())
    path = tmp_path / "x.json"
    path.write_text(json.dumps([found | change]))
    with pytest.raises(InputError, match=r"isn't a file of .*: a benchmark has"):
        read_bench(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "can't be read"),
        (b"{}", "isn't a file of"),
        (b"[]", "holds no benchmark"),
        (b'[{"version": 99}]', "reads up to"),
        (b"\xff", "isn't UTF-8 text"),
    ],
)
def test_what_is_no_benchmark(content: bytes | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=words):
        read_bench(path)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("-n", "0"), 2, "0 is not in the range"),
        (("--html", "page.pdf"), 2, "HTML page"),
        (("--steps", "0"), 2, "steps"),
        (("--host", "a b"), 2, "isn't a board's address"),
        (("--memory", "stream", "--max-memory", "1GB"), 2, "give only one of them"),
    ],
)
def test_what_is_asked_in_the_wrong_way(
    arguments: tuple[str, ...], code: int, words: str, miniature: Bundle
) -> None:
    outcome = run_cli("bench", miniature.path, *arguments)
    assert outcome.code == code and words in outcome.err, outcome.err


def test_it_reads_nothing_heavy() -> None:
    import subprocess

    code = "import sys, edgesd.device.bench, edgesd.device.slots; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "onnx", "transformers", "asyncssh"} & set(done.stdout.split())


class TestDetached:
    @pytest.fixture(autouse=True)
    def _cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def command(self, tmp_path: Path, waits: bool = False) -> list[str]:
        """Counts its runs; waits: for the file `go`, a line before its end."""
        code = (
            "import os, sys, time; print('one', file=sys.stderr, flush=True)\n"
            f"open({str(tmp_path / 'count')!r}, 'a').write('x')\n"
            f"end = time.monotonic() + {PATIENCE_SECONDS * waits}\n"
            f"while time.monotonic() < end and not os.path.exists({str(tmp_path / 'go')!r}):\n"
            "    time.sleep(0.01)\n"
            "print('two', file=sys.stderr); print('out')"
        )
        return [sys.executable, "-c", code]

    def test_once_and_its_result_until_it_is_fetched(self, tmp_path: Path) -> None:
        lines: list[str] = []
        ended = detached.follow("k", self.command(tmp_path), lines.append)
        assert ended == detached.Ended(0, "out\n", "one\ntwo\n")
        assert lines in (["one", "two"], [])  # [] when it had ended before anybody listened
        assert detached.follow("k", self.command(tmp_path), lines.append) == ended
        assert (tmp_path / "count").read_text() == "x"
        detached.forget("k")
        detached.follow("k", self.command(tmp_path), lines.append)
        assert (tmp_path / "count").read_text() == "xx"

    def test_whoever_comes_later_joins(self, tmp_path: Path) -> None:
        follower = os.fork()
        if follower == 0:  # who loses the link
            detached.follow("j", self.command(tmp_path, True), lambda line: None)
            os._exit(0)
        wait_until((tmp_path / "count").exists, "the command that was begun")
        os.kill(follower, signal.SIGKILL)
        os.waitpid(follower, 0)
        lines: list[str] = []

        def heard(line: str) -> None:
            lines.append(line)
            (tmp_path / "go").touch()

        ended = detached.follow("j", self.command(tmp_path), heard)
        assert ended.out == "out\n" and lines == ["one", "two"]
        assert (tmp_path / "count").read_text() == "x"

    def test_an_end_without_a_result(self, tmp_path: Path) -> None:
        code = f"import os, signal; os.kill(os.getppid(), {int(signal.SIGKILL)})"
        with pytest.raises(BoardError, match="without a result"):
            detached.follow("e", [sys.executable, "-c", code], lambda line: None)

    def test_a_damaged_result_is_told_and_the_next_begins_anew(self, tmp_path: Path) -> None:
        lost = detached._result("d")
        lost.parent.mkdir(parents=True, exist_ok=True)
        lost.write_bytes(b'{"status":0,"ou')
        with pytest.raises(BoardError, match=r"is damaged \(.*\): run the command again"):
            detached.follow("d", self.command(tmp_path), lambda line: None)
        assert detached.follow("d", self.command(tmp_path), lambda line: None).out == "out\n"

    def test_a_bad_key(self) -> None:
        with pytest.raises(InputError, match="isn't a key"):
            detached.follow("../x", ["true"], lambda line: None)


@pytest.mark.integration
def test_the_json_reads_back(made: Path) -> None:
    found = read_bench(made)
    assert msgspec.json.decode(msgspec.json.encode(found), type=list[Bench]) == found
