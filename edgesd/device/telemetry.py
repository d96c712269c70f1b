"""Samples a board's memory, clocks, heat and power, and what throttles it.

Read from Linux's own files, from tegrastats on a Jetson and vcgencmd on a Raspberry Pi, whichever
are there; what can't be read isn't guessed. Sampled in a process of its own (`Sampler`), so that it
takes no time of the process that is measured: python -m edgesd.device.telemetry.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from edgesd.errors import InputError, ResourceError
from edgesd.processes import find_program, module_command
from edgesd.spec.base import Spec

_ROOT = Path("/")

# Bits of vcgencmd get_throttled, from its documentation; the same 16 higher: since boot.
_THROTTLED = ("under-voltage", "frequency capped", "throttled", "soft temperature limit")

# Rails that are a Jetson's whole input, or add up to it: of Orin Nano and NX, Thor, AGX Orin.
_INPUTS = (("VDD_IN",), ("VIN",), ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"))
_PMIC = "pmic "
"""Before the names of a Raspberry Pi's rails."""

_VALUE = r"-?[0-9]{1,15}(?:\.[0-9]{1,15})?"
_CLOCK = re.compile(r"[0-9]{1,9}\Z")
_TEGRA_MEMORY = re.compile(r"\bRAM ([0-9]{1,12})/([0-9]{1,12})MB")
_TEGRA_CPU = re.compile(r"\bCPU \[([^\]]*)\]")
_TEGRA_GPU = re.compile(r"\bGR3D_FREQ(?: ([0-9]{1,3})%)?(?: ?@\[?([0-9,]{1,99})\]?)?")
_TEGRA_HEAT = re.compile(rf"\b(\w+)@({_VALUE})C\b")
_TEGRA_RAIL = re.compile(r"\b([A-Z]\w*) (-?[0-9]{1,12})(?:mW(?:/-?[0-9]+mW)*|/[0-9]+)(?=\s|$)")
_NO_SENSOR = -256.0
"""Degrees that tegrastats gives for what is switched off."""

_PMIC_LINE = re.compile(rf"\s*(\w{{1,64}})_([AV])\s+(?:current|volt)\(\d+\)=({_VALUE})[AV]\s*")
_LINE_CHARACTERS = 4096
"""Of a line or a file that is read: more isn't what it should be."""


class Sample(Spec, frozen=True):
    """One moment. What isn't known is None or empty.

    seconds: since sampling began. *_bytes: of the machine, and of the process that is watched (most
    ever: its peak). cpu_mhz: by core, 0 where one is switched off. gpu_percent: of its time.
    celsius, watts: by sensor and by rail, as the board names them. limits: what holds the board
    back now; past_limits: what has since it started.
    """

    seconds: float
    memory_used_bytes: int | None = None
    memory_bytes: int | None = None
    process_bytes: int | None = None
    process_peak_bytes: int | None = None
    cpu_mhz: tuple[int, ...] = ()
    gpu_percent: float | None = None
    gpu_mhz: tuple[int, ...] = ()
    celsius: dict[str, float] = msgspec.field(default_factory=dict)
    watts: dict[str, float] = msgspec.field(default_factory=dict)
    limits: tuple[str, ...] = ()
    past_limits: tuple[str, ...] = ()


def power_mode(root: Path = _ROOT) -> str:
    """A Jetson's power mode, as nvpmodel names it, and the CPU's governor; "" if unknown."""
    found = []
    if path := find_program("nvpmodel"):
        done = subprocess.run([path, "-q"], capture_output=True, text=True, errors="replace")
        if match := re.search(r"NV Power Mode: *(\S+)", done.stdout):
            found.append(match[1])
    governors = {
        _text(core / "cpufreq/scaling_governor")
        for core in (root / "sys/devices/system/cpu").glob("cpu[0-9]*")
    } - {""}
    if governors:
        found.append(f"governor {', '.join(sorted(governors))}")
    return ", ".join(found)


def board_watts(watts: Mapping[str, float]) -> float | None:
    """The power of the whole board in watts, or None where its rails aren't measured.

    A Jetson's input rail, or the sum of those that make it up. Of a Raspberry Pi 5 the sum of the
    rails after its power chip: what the chip itself and the 5 V ports take isn't in it.
    """
    for rails in _INPUTS:
        if all(rail in watts for rail in rails):
            return sum(watts[rail] for rail in rails)
    after_chip = [value for rail, value in watts.items() if rail.startswith(_PMIC)]
    return sum(after_chip) if after_chip else None


def parse_tegrastats(line: str) -> dict[str, Any]:
    """Fields of a Sample from one line of tegrastats, of JetPack 5, 6 and 7.

    JetPack 7 may leave the GPU out, or report its clocks alone, and adds a third figure to rails:
    the first is the present one in all.
    """
    found: dict[str, Any] = {}
    if memory := _TEGRA_MEMORY.search(line):
        found["memory_used_bytes"], found["memory_bytes"] = (
            int(part) << 20 for part in memory.groups()
        )
    if cores := _TEGRA_CPU.search(line):
        clocks = (core.partition("@")[2] for core in cores[1].split(","))
        found["cpu_mhz"] = tuple(int(clock) if _CLOCK.match(clock) else 0 for clock in clocks)
    if gpu := _TEGRA_GPU.search(line):
        if gpu[1]:
            found["gpu_percent"] = float(gpu[1])
        if gpu[2]:
            found["gpu_mhz"] = tuple(int(clock) for clock in gpu[2].split(",") if clock)
    heat = {name: float(value) for name, value in _TEGRA_HEAT.findall(line)}
    found["celsius"] = {name: value for name, value in heat.items() if value != _NO_SENSOR}
    rails = _TEGRA_RAIL.findall(line)
    found["watts"] = {name: int(value) / 1000 for name, value in rails if name != "NC"}
    return found


def parse_throttled(text: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """vcgencmd get_throttled -> what throttles the board now, and what has since it started."""
    match = re.fullmatch(r"throttled=0x([0-9a-fA-F]{1,8})", text.strip())
    if not match:
        return (), ()
    bits = int(match[1], 16)
    now, past = (
        tuple(name for place, name in enumerate(_THROTTLED) if bits >> place + shift & 1)
        for shift in (0, 16)
    )
    return now, past


def parse_pmic(text: str) -> dict[str, float]:
    """vcgencmd pmic_read_adc -> watts by rail, of those with both a current and a voltage."""
    read: dict[str, dict[str, float]] = {}
    for line in text.splitlines():
        if match := _PMIC_LINE.fullmatch(line[:_LINE_CHARACTERS]):
            read.setdefault(match[1], {})[match[2]] = float(match[3])
    return {
        _PMIC + rail: both["A"] * both["V"] for rail, both in read.items() if both.keys() >= {*"AV"}
    }


def read_files(root: Path = _ROOT, pid: int | None = None) -> dict[str, Any]:
    """Fields of a Sample from the files below `root`: those of every Linux."""
    found: dict[str, Any] = {}
    memory = _fields(root / "proc/meminfo")
    if {"MemTotal", "MemAvailable"} <= memory.keys():
        found["memory_bytes"] = memory["MemTotal"]
        found["memory_used_bytes"] = memory["MemTotal"] - memory["MemAvailable"]
    if pid is not None:
        process = _fields(root / f"proc/{pid}/status")
        found["process_bytes"] = process.get("VmRSS")
        found["process_peak_bytes"] = process.get("VmHWM")
    cores = _numbered((root / "sys/devices/system/cpu").glob("cpu[0-9]*"))
    clocks = (_number(core / "cpufreq/scaling_cur_freq") for core in cores)
    found["cpu_mhz"] = tuple(round(clock / 1000) for clock in clocks if clock is not None)
    heat = {}
    for zone in _numbered((root / "sys/class/thermal").glob("thermal_zone[0-9]*")):
        value = _number(zone / "temp")
        if value is not None:
            heat[_text(zone / "type") or zone.name] = value / 1000
    found["celsius"] = heat
    found["limits"] = tuple(
        f"{_text(device / 'type')} held back by heat"
        for device in _numbered((root / "sys/class/thermal").glob("cooling_device[0-9]*"))
        if "fan" not in _text(device / "type") and (_number(device / "cur_state") or 0) > 0
    )
    return found


class Sources:
    """All sources of samples on this machine. A context manager; tegrastats runs for as long."""

    def __init__(self, interval: float, pid: int | None = None, root: Path = _ROOT) -> None:
        self._pid, self._root = pid, root
        self._latest = ""
        self._tegrastats: subprocess.Popen[str] | None = None
        self._vcgencmd = find_program("vcgencmd")
        self._unanswered: set[str] = set()
        if path := find_program("tegrastats"):
            self._tegrastats = subprocess.Popen(
                [path, "--interval", str(max(1, round(1000 * interval)))],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                errors="replace",
            )
            threading.Thread(target=self._follow, daemon=True).start()

    def __enter__(self) -> Sources:
        return self

    def __exit__(self, *_: object) -> None:
        if self._tegrastats:
            self._tegrastats.kill()
            self._tegrastats.wait()

    def read(self, seconds: float) -> Sample:
        """A sample of the present moment."""
        found = read_files(self._root, self._pid)
        if self._latest:
            parsed = parse_tegrastats(self._latest)
            # A zone that is switched off can't be read as a file, or reads as nonsense.
            found |= {name: value for name, value in parsed.items() if value}
        if self._vcgencmd:
            now, past = parse_throttled(self._ask("get_throttled"))
            found["limits"] = (*found["limits"], *now)
            found["past_limits"] = past
            found["watts"] = parse_pmic(self._ask("pmic_read_adc"))
        return Sample(round(seconds, 3), **found)

    def _ask(self, what: str) -> str:
        """vcgencmd's answer; "" where it has none (a Raspberry Pi 4 measures no rails)."""
        assert self._vcgencmd
        if what in self._unanswered:
            return ""
        try:
            done = subprocess.run(
                [self._vcgencmd, what], capture_output=True, timeout=5, check=True
            )
        except (OSError, subprocess.SubprocessError):
            self._unanswered.add(what)  # it won't have one later: spare the process
            return ""
        return done.stdout.decode(errors="replace")

    def _follow(self) -> None:
        assert self._tegrastats and self._tegrastats.stdout
        while line := self._tegrastats.stdout.readline(_LINE_CHARACTERS):
            self._latest = line


class Sampler:
    """Samples of this machine while its context lasts, taken by a process of its own.

    They are kept in memory: nothing is written to a card. zero: where their seconds begin, by
    time.monotonic(). Raises ResourceError when the process
    can't be started.
    """

    def __init__(self, interval: float = 0.5, pid: int | None = None) -> None:
        self.samples: list[Sample] = []
        self.zero = time.monotonic()
        command = module_command("edgesd.device.telemetry", "--interval", str(interval))
        command += ["--zero", repr(self.zero)]
        if pid is not None:
            command += ["--pid", str(pid)]
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
        except OSError as exc:
            raise ResourceError(f"telemetry can't be started: {exc.strerror or exc}") from exc
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """Id of the process that samples."""
        return self._process.pid

    def __enter__(self) -> Sampler:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()  # which ends it
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            with contextlib.suppress(msgspec.MsgspecError):  # cut off in the middle
                self.samples.append(msgspec.json.decode(line, type=Sample))


def sampled(
    interval: float,
    pid: int | None = None,
    root: Path = _ROOT,
    zero: float | None = None,
) -> Iterator[Sample]:
    """A sample every `interval` seconds, without end; late ones are left out, not caught up.

    zero: where their seconds begin, by time.monotonic() [default: now]. Raises InputError
    when there is no process `pid`.
    """
    if pid is not None and not (root / f"proc/{pid}").is_dir():
        raise InputError(f"there is no process {pid}: ps shows those that there are")
    with Sources(interval, pid, root) as sources:
        due = time.monotonic()
        start = due if zero is None else zero
        while True:
            yield sources.read(time.monotonic() - start)
            due = max(due + interval, time.monotonic())
            time.sleep(max(0.0, due - time.monotonic()))


def _fields(path: Path) -> dict[str, int]:
    """Lines "Name:   12 kB" -> bytes by name."""
    matches = re.finditer(r"^(\w+):\s+([0-9]{1,18}) kB$", _text(path), re.MULTILINE)
    return {match[1]: int(match[2]) << 10 for match in matches}


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:  # a sensor that is switched off can't be read
        return ""


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if re.fullmatch(r"-?[0-9]{1,18}", text) else None


def _numbered(paths: Iterable[Path]) -> list[Path]:
    """Paths sorted by the number that their names end with."""
    return sorted(paths, key=lambda path: int(re.sub(r"\D", "", path.name)))


def main() -> int:
    """Print samples as JSON lines until the standard input ends."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--interval", type=float, default=0.5, help="seconds")
    parser.add_argument("--pid", type=int, help="process to watch")
    parser.add_argument("--zero", type=float, help="time.monotonic() where seconds begin")
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the reader decides when it ends
    threading.Thread(
        target=_print, args=(arguments.interval, arguments.pid, arguments.zero), daemon=True
    ).start()
    sys.stdin.buffer.read()
    return 0


def _print(interval: float, pid: int | None, zero: float | None) -> None:
    for sample in sampled(interval, pid, zero=zero):
        sys.stdout.buffer.write(msgspec.json.encode(sample) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main())
