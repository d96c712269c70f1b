# ruff: noqa: E501  captured lines
"""What a board says of itself: captured lines of JetPack 5, 6 and 7 and of Raspberry Pis."""

from __future__ import annotations

import itertools
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgesd.device.telemetry import (
    Sampler,
    Sources,
    board_watts,
    parse_pmic,
    parse_tegrastats,
    parse_throttled,
    read_files,
    sampled,
)
from tests.support import assert_refused, run_cli, wait_until

AGX_ORIN_5 = (
    "04-11-2025 10:36:27 RAM 4321/62801MB (lfb 1759x4MB) SWAP 19/31400MB (cached 0MB) CPU [0%@729,"
    "0%@729,0%@729,0%@729,0%@729,0%@729,0%@729,0%@729,0%@729,0%@729,0%@729,0%@729] EMC_FREQ 0%@2133 "
    "GR3D_FREQ 0%@[0,0] VIC_FREQ 729 APE 174 CV0@-256C CPU@44.562C Tboard@32C SOC2@40.093C Tdiode@33C "
    "SOC0@41.093C CV1@-256C GPU@-256C tj@44.343C SOC1@41.25C CV2@-256C VDD_GPU_SOC 2340mW/2340mW "
    "VDD_CPU_CV 390mW/390mW VIN_SYS_5V0 4025mW/4025mW NC 0mW/0mW VDDQ_VDD2_1V8AO 301mW/301mW "
    "NC 0mW/0mW"
)
XAVIER_NX_5 = (
    "07-09-2024 13:31:31 RAM 3168/6851MB (lfb 2x4MB) SWAP 161/3426MB (cached 0MB) CPU [23%@1397,"
    "17%@1192,16%@1190,13%@1190,23%@1190,10%@1190] EMC_FREQ 2%@204 GR3D_FREQ 0%@[114] VIC_FREQ 115 "
    "APE 150 AUX@45C CPU@46.5C thermal@45.6C AO@45C GPU@45.5C PMIC@50C VDD_IN 2763mW/2846mW "
    "VDD_CPU_GPU_CV 650mW/670mW VDD_SOC 650mW/711mW"
)
ORIN_NANO_6 = (
    "01-04-2025 16:02:59 RAM 1273/7620MB (lfb 1x4MB) SWAP 286/3810MB (cached 1MB) CPU [0%@1036,"
    "0%@1036,1%@1036,0%@1036,0%@729,0%@729] GR3D_FREQ 0% cpu@45.875C soc2@45.843C soc0@44.843C "
    "gpu@45.437C tj@46.312C soc1@46.312C VDD_IN 4968mW/4968mW VDD_CPU_GPU_CV 436mW/436mW "
    "VDD_SOC 1708mW/1708mW\n"
)
ORIN_NANO_6_BUSY = (
    "10-08-2026 04:35:02 RAM 6712/7620MB (lfb 12x4MB) SWAP 369/3810MB (cached 8MB) CPU [38%@1497,"
    "2%@729,1%@729,0%@729,1%@729,0%@729] EMC_FREQ 61%@2133 GR3D_FREQ 99%@[612] NVDEC off NVJPG off "
    "VIC off OFA off APE 200 cpu@57.125C soc2@55.093C soc0@56.625C gpu@58.625C tj@58.312C "
    "soc1@55.937C VDD_IN 16321mW/11204mW VDD_CPU_GPU_CV 7104mW/4944mW VDD_SOC 3120mW/3659mW"
)
THOR_7 = (
    "04-21-2026 15:50:52 RAM 105265/125772MB (lfb 34x4MB) CPU [0%@972,0%@972,0%@972,0%@972,0%@972,"
    "0%@972,1%@972,0%@972,0%@972,0%@972,0%@972,8%@972,0%@972,0%@972] EMC_FREQ 0%@2750 GR3D_FREQ "
    "@[314,314,314] NVENC0_FREQ @314 NVENC1_FREQ @314 NVDEC0_FREQ @314 NVDEC1_FREQ @314 NVJPG0_FREQ "
    "@314 VIC off OFA_FREQ @315 PVA0_FREQ off APE 300 cpu@37.343C tj@38.875C soc012@37.468C "
    "gpu@38.875C soc345@37.406C VDD_GPU 1962mW/1962mW VDD_CPU_SOC_MSS 5887mW/5887mW "
    "VIN_SYS_5V0 5635mW/5635mW VIN 19780mW/19780mW"
)
THOR_7_2 = (
    "07-02-2026 13:45:44 RAM 36529/125749MB (lfb 12x4MB) SWAP 11/4096MB (cached 9MB) CPU [2%@972,"
    "1%@972,0%@972,0%@972,0%@972,0%@972,0%@972,0%@972,0%@972,0%@972,0%@972,0%@972,0%@972,2%@972] "
    "cpu@60.406C tj@63.281C soc012@58.468C gpu@62.906C soc345@63.281C "
    "VDD_GPU 37528mW/37528mW/37528mW VDD_CPU_SOC_MSS 18961mW/18961mW/18961mW "
    "VIN_SYS_5V0 18331mW/18331mW/18331mW VIN 87426mW/43713mW/87426mW"
)
PI_5_RAILS = """\
 3V7_WL_SW_A current(0)=0.10247270A
   3V3_SYS_A current(1)=0.10832820A
   1V8_SYS_A current(2)=0.15712470A
  DDR_VDD2_A current(3)=0.00585558A
  DDR_VDDQ_A current(4)=0.00000000A
   1V1_SYS_A current(5)=0.24105470A
    0V8_SW_A current(6)=0.31424950A
  VDD_CORE_A current(7)=1.42880000A
   3V3_DAC_A current(17)=0.00000000A
   3V3_ADC_A current(18)=0.00006105A
   0V8_AON_A current(16)=0.00354090A
      HDMI_A current(22)=0.02002440A
 3V7_WL_SW_V volt(8)=3.71091200V
   3V3_SYS_V volt(9)=3.30910500V
   1V8_SYS_V volt(10)=1.80073100V
  DDR_VDD2_V volt(11)=1.10439400V
  DDR_VDDQ_V volt(12)=0.60439500V
   1V1_SYS_V volt(13)=1.10805800V
    0V8_SW_V volt(14)=0.80402850V
  VDD_CORE_V volt(15)=0.90659250V
   3V3_DAC_V volt(20)=3.31135200V
   3V3_ADC_V volt(21)=3.31867800V
   0V8_AON_V volt(19)=0.79882700V
      HDMI_V volt(23)=5.07860000V
     EXT5V_V volt(24)=5.05716000V
      BATT_V volt(25)=0.00000000V
"""


@pytest.mark.parametrize(
    ("line", "megabytes", "cores", "gpu", "clocks", "hottest", "watts"),
    [
        (AGX_ORIN_5, (4321, 62801), (729,) * 12, 0.0, (0, 0), ("CPU", 44.562), 6.755),
        (XAVIER_NX_5, (3168, 6851), (1397, 1192, 1190, 1190, 1190, 1190), 0.0, (114,),
         ("PMIC", 50.0), 2.763),
        (ORIN_NANO_6, (1273, 7620), (1036,) * 4 + (729,) * 2, 0.0, None, ("tj", 46.312), 4.968),
        (ORIN_NANO_6_BUSY, (6712, 7620), (1497,) + (729,) * 5, 99.0, (612,), ("gpu", 58.625), 16.321),
        (THOR_7, (105265, 125772), (972,) * 14, None, (314, 314, 314), ("tj", 38.875), 19.78),
        (THOR_7_2, (36529, 125749), (972,) * 14, None, None, ("tj", 63.281), 87.426),
    ],
)  # fmt: skip
def test_lines_of_tegrastats(line, megabytes, cores, gpu, clocks, hottest, watts) -> None:
    found = parse_tegrastats(line)
    memory = found["memory_used_bytes"], found["memory_bytes"]
    assert memory == tuple(n << 20 for n in megabytes)
    assert found["cpu_mhz"] == cores
    assert found.get("gpu_percent") == gpu and found.get("gpu_mhz") == clocks
    assert max(found["celsius"].items(), key=lambda item: item[1]) == hottest
    assert min(found["celsius"].values()) > 0
    assert board_watts(found["watts"]) == pytest.approx(watts)
    assert not {"RAM", "SWAP", "NC", "APE"} & found["watts"].keys()


def test_cores_that_are_off_and_rails_without_an_average() -> None:
    found = parse_tegrastats(
        "RAM 1/2MB CPU [5%@1510,off,3%@1510] VDD_GPU -392mW/-392mW VIN 28548mW"
    )
    assert found["cpu_mhz"] == (1510, 0, 1510)
    assert found["watts"] == {"VDD_GPU": -0.392, "VIN": 28.548}
    nothing = parse_tegrastats("tegrastats: no such thing")
    assert nothing == {"celsius": {}, "watts": {}}


@pytest.mark.parametrize(
    ("text", "now", "past"),
    [
        ("throttled=0x0\n", (), ()),
        ("throttled=0x50000", (), ("under-voltage", "throttled")),
        ("throttled=0x50005", ("under-voltage", "throttled"), ("under-voltage", "throttled")),
        ("throttled=0xe0008", ("soft temperature limit",),
         ("frequency capped", "throttled", "soft temperature limit")),
        ("VCHI initialization failed", (), ()),
    ],
)  # fmt: skip
def test_what_holds_a_raspberry_pi_back(text, now, past) -> None:
    assert parse_throttled(text) == (now, past)


def test_rails_of_a_raspberry_pi_5() -> None:
    watts = parse_pmic(PI_5_RAILS)
    assert len(watts) == 12 and "pmic EXT5V" not in watts
    assert watts["pmic VDD_CORE"] == pytest.approx(1.4288 * 0.9065925)
    assert (
        board_watts(watts) == pytest.approx(sum(watts.values())) == pytest.approx(2.948, abs=0.001)
    )
    assert parse_pmic("error=1") == {} and board_watts({}) is None


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


PI_4 = {
    "proc/meminfo": "MemTotal:        3884368 kB\nMemFree: 1 kB\nMemAvailable:    3000000 kB\n",
    "proc/77/status": "Name:\tedgesd\nVmHWM:\t  204800 kB\nVmRSS:\t  102400 kB\n",
    **{
        f"sys/devices/system/cpu/cpu{n}/cpufreq/scaling_cur_freq": f"{n + 6}00000\n" for n in (0, 1)
    },
    "sys/devices/system/cpu/cpu10/cpufreq/scaling_cur_freq": "1800000\n",
    "sys/devices/system/cpu/cpufreq/policy0/x": "",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
    "sys/class/thermal/thermal_zone0/temp": "81320\n",
    "sys/class/thermal/thermal_zone1/type": "broken\n",
    "sys/class/thermal/thermal_zone1/temp": "\n",
    "sys/class/thermal/cooling_device0/type": "cpufreq-cpu0\n",
    "sys/class/thermal/cooling_device0/cur_state": "2\n",
    "sys/class/thermal/cooling_device1/type": "pwm-fan\n",
    "sys/class/thermal/cooling_device1/cur_state": "4\n",
}


def test_files_of_linux(tmp_path: Path) -> None:
    found = read_files(tree(tmp_path, PI_4), 77)
    assert found == {
        "memory_bytes": 3884368 << 10,
        "memory_used_bytes": 884368 << 10,
        "process_bytes": 100 << 20,
        "process_peak_bytes": 200 << 20,
        "cpu_mhz": (600, 700, 1800),
        "celsius": {"cpu-thermal": 81.32},
        "limits": ("cpufreq-cpu0 held back by heat",),
    }
    assert read_files(tmp_path / "nothing", 77)["process_bytes"] is None


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Returns a function that puts a shell script on the path."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def put(name: str, text: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)

    return put


def test_a_jetson_is_asked_by_tegrastats(programs, tmp_path: Path) -> None:
    programs("tegrastats", f"echo '{ORIN_NANO_6_BUSY}'; exec sleep 60")
    with Sources(0.01, 77, tree(tmp_path / "root", PI_4)) as sources:
        wait_until(
            lambda: sources.read(1.0).gpu_percent is not None, "the first line of tegrastats"
        )
        sample = sources.read(1.0)
    assert sample.gpu_percent == 99.0 and board_watts(sample.watts) == 16.321
    assert sample.celsius["gpu"] == 58.625 and sample.process_peak_bytes == 200 << 20


def test_a_raspberry_pi_is_asked_by_vcgencmd(programs, tmp_path: Path) -> None:
    (tmp_path / "rails").write_text(PI_5_RAILS)
    programs(
        "vcgencmd",
        f'case $1 in get_throttled) echo throttled=0x50004;; *) cat "{tmp_path}/rails";; esac',
    )
    with Sources(0.5, None, tree(tmp_path / "root", PI_4)) as sources:
        sample = sources.read(0.25)
    assert sample.limits == ("cpufreq-cpu0 held back by heat", "throttled")
    assert sample.past_limits == ("under-voltage", "throttled")
    assert board_watts(sample.watts) == pytest.approx(2.948, abs=0.001)
    programs("vcgencmd", "echo 'error=1 error_msg=\"Command not registered\"'; exit 1")
    with Sources(0.5, None, tmp_path / "root") as sources:
        sample = sources.read(0.25)
    assert sample.watts == {} and sample.past_limits == ()


def test_a_process_of_its_own_samples_this_one() -> None:
    with Sampler(0.05, os.getpid()) as sampler:
        wait_until(lambda: len(sampler.samples) >= 3, "three samples of another process")
    samples = sampler.samples
    assert [s.seconds for s in samples] == sorted(s.seconds for s in samples)
    assert all(s.process_bytes and s.memory_bytes for s in samples)
    assert samples[0].process_peak_bytes >= samples[0].process_bytes
    count = len(samples)
    time.sleep(0.15)
    assert len(sampler.samples) == count  # it has ended


def test_samples_come_without_end(tmp_path: Path) -> None:
    steady = sampled(0.01, None, tree(tmp_path, PI_4))
    first, second = next(steady), next(steady)
    steady.close()
    assert second.seconds > first.seconds and second.cpu_mhz == (600, 700, 1800)


def test_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = run_cli("watch", "--seconds", "0.2", "--interval", "0.05", "--pid", os.getpid())
    assert outcome.code == 0 and "memory" in outcome.out and "process" in outcome.out
    clock = SimpleNamespace(monotonic=itertools.count(0, 5).__next__)
    monkeypatch.setattr("edgesd.cli.watch.time", clock)
    lines = run_cli("watch", "--seconds", "10", "--interval", "0.05", "--json").out.splitlines()
    assert len(lines) == 2 and json.loads(lines[0])["memory_bytes"] > 0
    assert run_cli("watch", "--interval", "0").code == 2
    assert_refused(run_cli("watch", "--pid", 2**22 + 1), "there is no process")


def test_what_is_no_figure_is_left_out_quickly() -> None:
    """Digits that int() doesn't take, and lines without end."""
    found = parse_tegrastats("RAM 1/2MB CPU [10%@1\u00b210,20%@729] GR3D_FREQ 5%")
    assert found["cpu_mhz"] == (0, 729)
    start = time.monotonic()
    assert parse_pmic("x" * 200_000) == {}
    assert parse_throttled("throttled=0x" + "f" * 5000) == ((), ())
    assert time.monotonic() - start < 60
