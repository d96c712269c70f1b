"""Files of factors for boards: what is read, what is refused, and what slots are filled with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edgesd.errors import BundleError, EdgesdError, InputError, UsageError
from edgesd.runtime.bundle import Bundle
from edgesd.runtime.lora import (
    Factors,
    Lora,
    Used,
    fill_slots,
    filling,
    lora_bytes,
    open_lora,
    read_lora,
)
from edgesd.runtime.pipeline import Pipeline
from edgesd.runtime.signature import new_key, sign_lora, trust
from edgesd.spec.bundle import BundleManifest
from edgesd.spec.lora import LoraFile, LoraSlot, LoraSlots
from edgesd.text import shown
from tests.support import assert_refused, run_cli, with_lora_slot

ABOUT = LoraFile(1, "style.safetensors", "ab" * 32, "tiny")
SLOTS = LoraSlots(8, False, (LoraSlot("a.to_q", 6, 4), LoraSlot("a.ff", 3, 5)))


def pair(inputs: int, outputs: int, rank: int, seed: int = 0, dtype: Any = np.float32) -> Factors:
    rng = np.random.default_rng(seed)
    shapes = (inputs, rank), (rank, outputs)
    down, up = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
    return Factors(down, up)


def content() -> bytes:
    factors = {("unet", "a.to_q"): pair(6, 4, 2), ("unet", "a.ff"): pair(3, 5, 1, 1, np.float16)}
    return lora_bytes(factors, ABOUT)


def lora(rank: int, name: str = "a.to_q", seed: int = 0) -> Lora:
    inputs, outputs = {slot.name: (slot.inputs, slot.outputs) for slot in SLOTS.layers}[name]
    return Lora("0" * 64, ABOUT, {("unet", name): pair(inputs, outputs, rank, seed)})


@pytest.fixture
def with_slots(miniature: Bundle) -> BundleManifest:
    manifest = miniature.manifest
    unet = msgspec.structs.replace(manifest.engines["unet"], slots=SLOTS)
    return msgspec.structs.replace(manifest, engines={**manifest.engines, "unet": unet})


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "style.lora"
    path.write_bytes(content())
    found = read_lora(path)
    assert found.about == ABOUT
    assert found.factors.keys() == {("unet", "a.to_q"), ("unet", "a.ff")}
    wanted = pair(3, 5, 1, 1, np.float16)
    for array, other in zip(found.factors["unet", "a.ff"], wanted, strict=True):
        assert array.dtype == np.float16
        np.testing.assert_array_equal(array, other)
    assert content() == content()


def test_other_programs_read_it(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    tensors = safetensors.load(content())
    np.testing.assert_array_equal(tensors["unet/a.to_q/up"], pair(6, 4, 2).up)


def changed(change: Callable[[dict[str, Any]], None], tail: bytes = b"") -> bytes:
    """The file with another header."""
    raw = content()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + raw[8 + length :] + tail


def entry(name: str, **fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[name].update(fields)


def with_value(value: float) -> bytes:
    factors = pair(6, 4, 2)
    factors.up[0, 1] = value
    return lora_bytes({("unet", "a.to_q"): factors}, ABOUT)


def renamed(header: dict[str, Any]) -> None:
    header["unet/a.to_q/side"] = header.pop("unet/a.to_q/down")


UP = "unet/a.to_q/up"
BROKEN = {
    "nothing": b"",
    "another file": b"\x89PNG\r\n\x1a\n" + bytes(200),
    "a header that never ends": (1 << 40).to_bytes(8, "little") + bytes(100),
    "no JSON": (20).to_bytes(8, "little") + b"{" * 20,
    "nested JSON": (40_000).to_bytes(8, "little") + b'{"a":' + b"[" * 39_995,
    "truncated": content()[:-1],
    "longer": content() + b"\0",
    "no metadata": changed(lambda header: header.pop("__metadata__") and None),
    "another version": changed(
        lambda header: header["__metadata__"].update(edgesd='{"version":2}')
    ),
    "no factors": changed(
        lambda header: [header.pop(name) for name in list(header) if "/" in name] and None
    ),
    "a type of its own": changed(entry(UP, dtype="F64")),
    "three dimensions": changed(entry(UP, shape=[1, 2, 4])),
    "a shape beyond all": changed(entry(UP, shape=[2**31 - 1, 2**31 - 1])),
    "no values": changed(entry(UP, shape=[0, 4])),
    "offsets before the file": changed(entry(UP, data_offsets=[-32, 0])),
    "offsets that overlap": changed(entry(UP, data_offsets=[0, 32])),
    "offsets behind the file": changed(entry(UP, data_offsets=[2**40, 2**40 + 32])),
    "another rank": changed(entry(UP, shape=[4, 2])),
    "a factor alone": changed(lambda header: header.pop(UP) and None),
    "a name that is none": changed(renamed),
    "NaN": with_value(np.nan),
    "infinite": with_value(np.inf),
    "beyond fp16": with_value(1e5),
}


def test_what_is_no_whole_file_of_factors_is_refused_in_one_line(
    miniature: Bundle, tmp_path: Path
) -> None:
    bundle = with_lora_slot(miniature, tmp_path / "slots").path
    path, image = tmp_path / "style.lora", tmp_path / "image.png"
    for what, broken in BROKEN.items():
        path.write_bytes(broken)
        with pytest.raises(InputError) as caught:
            read_lora(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value), what
        outcome = run_cli("generate", bundle, "-p", "a", "--lora", path, "-o", image)
        assert_refused(outcome)
        assert outcome.err == f"{shown(f'edgesd: {caught.value}')}\n", what
        assert outcome.code == InputError.exit_code and not image.exists(), what


def test_random_damage_is_refused_or_read(tmp_path: Path) -> None:
    """Nothing but an error of edgesd's leaves the reader."""
    rng, whole, path = np.random.default_rng(0), content(), tmp_path / "style.lora"
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for place in rng.integers(*((0, 300) if rng.random() < 0.7 else (-60, 0)), 3):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            read_lora(path)
        except EdgesdError:
            refused += 1
    assert 100 < refused < 300


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "none"):
        with pytest.raises(InputError, match=r"regular file|can't be read|directory"):
            read_lora(path)


def test_a_scale_follows_the_name(tmp_path: Path) -> None:
    path = tmp_path / "style.lora"
    path.write_bytes(content())
    assert open_lora(str(path)).scale == 1
    assert open_lora(f"{path}:-0.5").scale == -0.5
    for wrong in ("x", "nan", "1e9", ""):
        with pytest.raises((UsageError, InputError), match=r"scale|no such file"):
            open_lora(f"{path}:{wrong}")


def test_a_name_is_looked_for_where_loras_are_deployed(tmp_path: Path) -> None:
    folder = tmp_path / "loras"
    folder.mkdir()
    (folder / "style.lora").write_bytes(content())
    for given, scale in (("style", 1), ("style.lora", 1), ("style:0.5", 0.5)):
        assert open_lora(given, folder).scale == scale
        with pytest.raises(InputError, match="no such file"):
            open_lora(given)
    (tmp_path / "more.lora").write_bytes(content())
    for given in ("../more", "more", "loras/style", "..", str(tmp_path / "style")):
        with pytest.raises(InputError, match="no such file"):
            open_lora(given, folder)


def test_several_are_added_with_their_scales(with_slots: BundleManifest) -> None:
    one, two = lora(2, seed=1), lora(3, seed=2)
    found = filling(with_slots, [Used(one, 0.5), Used(two, -1), Used(lora(1, "a.ff"), 0)])
    assert found.keys() == {"unet"} and found["unet"].keys() == {"lora.0.down", "lora.0.up"}
    factors = [each.factors["unet", "a.to_q"] for each in (one, two)]
    wanted = sum(s * (f.down @ f.up) for s, f in zip((0.5, -1), factors, strict=True))
    made = found["unet"]["lora.0.down"] @ found["unet"]["lora.0.up"]
    np.testing.assert_allclose(made, wanted, rtol=1e-5, atol=1e-6)
    assert not filling(with_slots, [Used(one, 0)])


def test_ranks_that_are_too_large_together_are_refused(with_slots: BundleManifest) -> None:
    filling(with_slots, [Used(lora(5)), Used(lora(3))])
    with pytest.raises(UsageError, match=r"a rank of 9 in unet/a.to_q.*--lora-slots 8"):
        filling(with_slots, [Used(lora(5)), Used(lora(4))])


def test_a_lora_of_another_model_is_refused(with_slots: BundleManifest, miniature: Bundle) -> None:
    other = Lora("0" * 64, ABOUT, {("unet", "a.to_q"): pair(6, 5, 2)})
    nowhere = Lora("0" * 64, ABOUT, {("unet", "b"): pair(6, 4, 2)})
    for each in (other, nowhere):
        with pytest.raises(UsageError, match="made for another model"):
            filling(with_slots, [Used(each)])
    with pytest.raises(UsageError, match="--lora-slots"):
        filling(miniature.manifest, [Used(lora(2))])
    with Pipeline(miniature) as pipeline:
        with pytest.raises(UsageError, match="--lora-slots"):
            pipeline.use_loras([Used(lora(2))])
        assert pipeline.loras == ()


def test_slots_of_a_fixed_rank_are_filled_up_with_zeros() -> None:
    fixed = msgspec.structs.replace(SLOTS, fixed=True)
    factors = pair(6, 4, 2)
    found = fill_slots(fixed, {"lora.0.down": factors.down, "lora.0.up": factors.up})
    assert {name: array.shape for name, array in found.items()} == {
        "lora.0.down": (6, 8),
        "lora.0.up": (8, 4),
        "lora.1.down": (3, 8),
        "lora.1.up": (8, 5),
    }
    np.testing.assert_allclose(found["lora.0.down"] @ found["lora.0.up"], factors.down @ factors.up)
    assert not found["lora.1.up"].any()
    with pytest.raises(InputError, match=r"lora.7.up"):
        fill_slots(fixed, {"lora.7.up": factors.up})


def test_a_machine_that_trusts_keys_takes_loras_that_they_signed(tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    path = tmp_path / "style.lora"
    path.write_bytes(content())
    key, other = (new_key(tmp_path / name) for name in ("key", "other"))
    places = [trust(key)]
    try:
        with pytest.raises(BundleError, match="isn't signed"):
            open_lora(str(path))
        sha256 = read_lora(path).sha256
        sign_lora(path, sha256, tmp_path / "other.key")
        with pytest.raises(BundleError, match=r"is signed by .*trusts only"):
            open_lora(str(path))
        sign_lora(path, sha256, tmp_path / "key.key")
        assert open_lora(str(path)).lora.sha256 == sha256
        path.write_bytes(with_value(2))
        with pytest.raises(BundleError, match="isn't right"):
            open_lora(str(path))
    finally:
        for place in places:
            place.unlink()
    assert other != key
