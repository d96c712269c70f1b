"""Rates: what is timed, what is made of it, and what is refused."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from edgesd.errors import InputError
from edgesd.runtime import kernels, rates
from edgesd.runtime.rates import (
    Probe,
    Rate,
    Rates,
    Speed,
    find_rates,
    measure,
    rates_path,
    read_probes,
    read_rates,
)
from edgesd.spec.target import Machine
from tests.support import Recorded, assert_refused, run_cli

pytestmark = pytest.mark.integration


def some(*found: Rate) -> Rates:
    return Rates("a board", "1.0", None, 0, 1 << 20, found)


def test_what_was_measured_comes_out_and_the_nearest_counts_most() -> None:
    slow, fast = (
        Rate("conv", "fp32", (64, 1152, 128), 0.1),
        Rate("conv", "fp32", (4096, 2880, 320), 0.2),
    )
    speed = Speed(some(slow, fast))
    for rate in (slow, fast):
        assert speed.seconds("conv", "fp32", rate.size) == pytest.approx(rate.seconds, rel=1e-3)
    per_unit = [rate.seconds / math.prod(rate.size) for rate in (slow, fast)]
    between = speed.seconds("conv", "fp32", (512, 2304, 256)) / (512 * 2304 * 256)
    assert min(per_unit) < between < max(per_unit)
    near = speed.seconds("conv", "fp32", (8192, 2880, 320)) / (8192 * 2880 * 320)
    assert near == pytest.approx(per_unit[1], rel=0.1)


def test_rates_that_were_measured_before_names_changed_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kept = tmp_path / "edgesd/rates/raspberry-pi-5.json"
    kept.parent.mkdir(parents=True)
    kept.write_text(
        '{"machine":"Raspberry Pi 5","onnxruntime":"1.20.1","instruction_set":"neon_dotprod",'
        '"threads":0,"process_bytes":80000000,"rates":['
        '{"kind":"conv","form":"own8","size":[64,9,3],"seconds":0.001},'
        '{"kind":"conv","form":"own4","size":[64,9,3],"seconds":0.002},'
        '{"kind":"linear","form":"nbits","size":[64,9,3],"seconds":0.003},'
        '{"kind":"add","form":"","size":[64],"seconds":0.004}]}'
    )
    found = find_rates("raspberry-pi-5")
    assert found is not None and found.process_bytes == 80000000
    speed = Speed(found)
    for kind, form, seconds in (
        ("conv", "edgesd_int8", 0.001),
        ("conv", "edgesd_int4", 0.002),
        ("linear", "matmul_nbits", 0.003),
    ):
        assert speed.seconds(kind, form, (64, 9, 3)) == pytest.approx(seconds, rel=1e-3)


def test_a_kind_that_was_never_measured_is_an_error() -> None:
    speed = Speed(some(Rate("add", "", (100,), 1e-6)))
    assert speed.knows("add") and not speed.knows("conv")
    with pytest.raises(InputError, match="no conv in edgesd_int8"):
        speed.seconds("conv", "edgesd_int8", (1, 1, 1))


def test_probes_cover_every_kernel_and_fit_their_graphs() -> None:
    probes, graphs = read_probes()
    kinds = {(probe.kind, probe.form) for probe in probes}
    for kind, forms in {
        "conv": ("fp32", "int8", "edgesd_int8", "edgesd_int4"),
        "linear": ("fp32", "int8", "matmul_nbits", "edgesd_int8", "edgesd_int4"),
        "attention": ("fp32", "edgesd_int8"),
    }.items():
        assert {(kind, form) for form in forms} <= kinds
    assert set(graphs) == {probe.graph for probe in probes}
    assert all((probe.scheme is not None) == probe.form.startswith("edgesd_") for probe in probes)


def few(kind: str, form: str, most: int) -> tuple[list[Probe], dict[str, bytes]]:
    probes, graphs = read_probes()
    chosen = [p for p in probes if (p.kind, p.form) == (kind, form) and math.prod(p.size) <= most]
    return chosen, graphs


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("add", ""),
        ("group_norm", ""),
        ("linear", "int8"),
        ("linear", "matmul_nbits"),
        ("conv", "int8"),
    ],
)
def test_probes_run(kind: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = few(kind, form, 1 << 29)
    assert chosen[0]
    monkeypatch.setattr(rates, "read_probes", lambda: chosen)
    monkeypatch.setattr(rates, "_RUNS", 1)
    monkeypatch.setattr(rates, "_SECONDS", 0.0)
    told = Recorded()
    found = measure("here", 1, told)
    assert [(r.kind, r.form, r.size) for r in found.rates[:-2]] == [
        (p.kind, p.form, p.size) for p in chosen[0]
    ]
    assert [rate.kind for rate in found.rates[-2:]] == ["fresh", "read"]
    assert all(rate.seconds > 0 for rate in found.rates) and found.process_bytes > 1 << 20
    assert told.updates[0] == (chosen[0][0].name, 0, len(chosen[0]))


@pytest.mark.parametrize("form", ["edgesd_int4", "edgesd_int8"])
def test_probes_of_our_kernels_run_where_these_do(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in ("conv", "linear", "attention"):
        chosen = few(kind, form, 1 << 29)
        if not chosen[0]:
            continue  # attention has no 4 bits
        monkeypatch.setattr(rates, "read_probes", lambda chosen=chosen: chosen)
        monkeypatch.setattr(rates, "_SECONDS", 0.0)
        found = measure("here", 1)
        runs = [p for p in chosen[0] if p.scheme and kernels.usable([p.scheme])]
        assert len(found.rates) == len(runs) + 2


def test_rates_are_kept_by_target_and_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert find_rates("raspberry-pi-5") is None
    path = rates_path("raspberry-pi-5")
    path.parent.mkdir(parents=True)
    path.write_bytes(msgspec.json.encode(some(Rate("add", "", (100,), 1e-6))))
    assert find_rates("raspberry-pi-5") == read_rates(path)


@pytest.mark.parametrize("text", [b"", b"{}", b"[1]", b"\xff"])
def test_a_file_of_something_else_is_refused(text: bytes, tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    path.write_bytes(text)
    with pytest.raises(InputError, match="isn't a file of edgesd profile"):
        read_rates(path)
    with pytest.raises(InputError, match="isn't there"):
        read_rates(tmp_path / "none.json")


def test_profile_writes_what_plan_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = few("add", "", 1 << 29)
    monkeypatch.setattr(rates, "read_probes", lambda: chosen)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    done = run_cli("profile", "--target", "raspberry-pi-5")
    assert done.code == 0 and "add" in done.out
    found = find_rates("raspberry-pi-5")
    assert found is not None and {rate.kind for rate in found.rates} == {"add", "fresh", "read"}


def test_the_older_name_of_profile_works_and_says_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = few("add", "", 1 << 29)
    monkeypatch.setattr(rates, "read_probes", lambda: chosen)
    path = tmp_path / "rates.json"
    done = run_cli("calibrate", "-o", path, "--json")
    assert done.code == 0
    assert msgspec.json.decode(done.out, type=Rates) == read_rates(path)
    (line,) = done.err.splitlines()
    assert "`edgesd calibrate` is now `edgesd profile`" in line
    listed = run_cli("--help").out
    assert "  profile " in listed and "calibrate" not in listed


def test_profile_refuses_a_target_that_isnt_there() -> None:
    assert_refused(run_cli("profile", "--target", "raspberry-pi-55"), "raspberry-pi-5")


def test_profile_says_that_a_place_cannot_be_written_before_it_measures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def measured(*_: object) -> Rates:
        raise AssertionError("it measured")

    monkeypatch.setattr(rates, "measure", measured)
    assert_refused(run_cli("profile", "-o", "/proc/none/rates.json"), "/proc/none")


def test_a_boards_rates_are_kept_under_its_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, ...]] = []
    here = Machine("aarch64", "Raspberry Pi 5", "raspberry-pi-5", 4 << 30, 4, ())

    async def edgesd(board: object, *arguments: str) -> str:
        asked.append(arguments)
        found = some(Rate("add", "", (100,), 1e-6)) if arguments[0] == "profile" else here
        return msgspec.json.encode(found).decode()

    def on_each(hosts: list[str], work: Callable[..., Any]) -> dict[str, object]:
        return {host: asyncio.run(work(SimpleNamespace(name=host))) for host in hosts}

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("edgesd.remote.board.edgesd", edgesd)
    monkeypatch.setattr("edgesd.remote.hosts.on_each", on_each)
    done = run_cli("profile", "--host", "pi@board", "--threads", "3")
    assert done.code == 0, done.err
    assert asked[0] == ("profile", "--json", "--threads=3")
    assert find_rates("raspberry-pi-5") is not None and "raspberry-pi-5" in done.out


@pytest.mark.parametrize(
    "rate",
    [
        {"size": [0, 1, 1]},
        {"size": []},
        {"size": [-1, 1, 1]},
        {"size": [10**400, 1, 1]},
        {"seconds": 0},
        {"seconds": -1.0},
        {"seconds": 5e-324},
    ],
)
def test_rates_that_can_not_be_are_refused(rate: dict[str, object], tmp_path: Path) -> None:
    told = {
        "machine": "a board",
        "onnxruntime": "1",
        "instruction_set": None,
        "threads": 0,
        "process_bytes": 1,
        "rates": [{"kind": "conv", "form": "fp32", "size": [1, 1, 1], "seconds": 1e-6, **rate}],
    }
    path = tmp_path / "rates.json"
    path.write_text(json.dumps(told))
    with pytest.raises(InputError, match="isn't a file of edgesd profile"):
        read_rates(path)


def test_rates_of_other_dimensions_are_as_good_as_none() -> None:
    rates = Rates("a board", "1", None, 0, 1, (Rate("conv", "fp32", (5, 5), 1e-6),))
    with pytest.raises(InputError, match="no conv in fp32"):
        Speed(rates).seconds("conv", "fp32", (1, 2, 3))


@pytest.mark.parametrize(
    ("former", "form"),
    [("nbits", "matmul_nbits"), ("own8", "edgesd_int8"), ("own4", "edgesd_int4")],
)
def test_rates_that_were_measured_under_former_names_are_read(
    former: str, form: str, tmp_path: Path
) -> None:
    path = tmp_path / "rates.json"
    written = msgspec.json.encode(some(Rate("linear", form, (1, 2, 3), 1e-6)))
    path.write_bytes(written.replace(form.encode(), former.encode()))
    assert read_rates(path).rates[0].form == form
