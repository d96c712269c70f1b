"""The slots of a board: wherever a deploy dies, the active bundle is whole."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from edgesd.device import slots as slots_module
from edgesd.device.slots import Slots
from edgesd.errors import BoardError, BundleError, InputError, UsageError
from edgesd.files import sha256_file
from edgesd.runtime.bundle import CHECKSUM, MANIFEST, Bundle, open_bundle
from edgesd.runtime.lora import open_lora
from edgesd.runtime.signature import new_key, sign_lora, trust
from tests.support import lora_file, with_lora_slot, with_other_decoder

pytestmark = pytest.mark.integration

CHANGES = ("os.rename", "os.link", "os.symlink", "os.remove", "os.rmdir", "os.mkdir")


@pytest.fixture(scope="module")
def bundles(
    miniature: Bundle, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Bundle, Bundle, Bundle]:
    """Three that differ in their decoder's weights."""
    folder = tmp_path_factory.mktemp("bundles")
    second, third = (
        with_other_decoder(miniature, folder / str(factor), factor) for factor in (0.97, 0.95)
    )
    return miniature, second, third


def arrive(slots: Slots, bundle: Bundle) -> tuple[str, str]:
    """Put a bundle's files where `edgesd deploy` sends them; what `install` is told."""
    objects = slots.root / "objects"
    objects.mkdir(parents=True, exist_ok=True)
    for name in [*bundle.manifest.files, *bundle.frame]:
        path = bundle.path / name
        shutil.copy(path, objects / sha256_file(path))
    return sha256_file(bundle.path / MANIFEST), sha256_file(bundle.path / CHECKSUM)


def install(slots: Slots, bundle: Bundle) -> None:
    slots.install(*arrive(slots, bundle), self_test=False)


def active(slots: Slots) -> str:
    bundle = open_bundle(slots.current)
    bundle.verify()
    return bundle.manifest_sha256


def dies_at(count: int, work: Callable[[], object]) -> bool:
    """Do `work` in a process that is gone before its change number `count` to the disk; whether it
    lived that long."""
    child = os.fork()
    if child == 0:
        left = count

        def watch(event: str, arguments: object) -> None:
            nonlocal left
            if event in CHANGES:
                left -= 1
                if left < 0:
                    os._exit(9)

        sys.addaudithook(watch)
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("what", ["install", "rollback"])
def test_dying_at_every_change_of_the_disk(
    what: str, bundles: tuple[Bundle, Bundle, Bundle], tmp_path: Path
) -> None:
    first, second, third = bundles
    wanted = third if what == "install" else first
    count = 0
    while True:
        slots = Slots(tmp_path / str(count))
        install(slots, first)
        install(slots, second)
        told = arrive(slots, wanted)
        if what == "install":
            died = dies_at(count, partial(slots.install, *told, self_test=False))
        else:
            died = dies_at(count, partial(slots.rollback, self_test=False))
        found = active(slots)
        assert found in (second.manifest_sha256, wanted.manifest_sha256)
        if not died:
            assert found == wanted.manifest_sha256
            break
        install(slots, third)  # the next one finishes
        assert active(slots) == third.manifest_sha256
        left = {path.name for path in (slots.root / "slots").iterdir()}
        assert left == {"a", "b"}, count
        count += 1
    assert count >= (20 if what == "install" else 1)


def send(slots: Slots, lora: Path) -> str:
    """Put a LoRA's file where `edgesd deploy` sends it; its hash."""
    sha256 = sha256_file(lora)
    shutil.copy(lora, slots.root / "objects" / sha256)
    return sha256


def test_dying_while_a_lora_takes_another_ones_place(miniature: Bundle, tmp_path: Path) -> None:
    slots = Slots(tmp_path / "home")
    install(slots, with_lora_slot(miniature, tmp_path / "slotted"))
    files = [lora_file(tmp_path / f"{seed}.lora", seed=seed) for seed in (1, 2)]
    slots.put_lora("style", send(slots, files[0]))
    place, count, died = slots.root / "loras/style.lora", 0, True
    while died:
        old, new = sha256_file(place), send(slots, files[(count + 1) % 2])
        died = dies_at(count, partial(slots.put_lora, "style", new))
        assert sha256_file(place) in (old, new) and [one.name for one in slots.loras()] == ["style"]
        assert died or sha256_file(place) == new
        slots.put_lora("style", send(slots, files[(count + 1) % 2]))  # the next one finishes
        assert sha256_file(place) == new
        assert [path.name for path in place.parent.iterdir()] == ["style.lora"]
        count += 1
    assert count >= 8


def test_a_lora_that_is_refused_leaves_the_one_before(miniature: Bundle, tmp_path: Path) -> None:
    slots = Slots(tmp_path / "home")
    slots.show()
    (slots.root / "objects").mkdir(parents=True)
    style, wide = (lora_file(tmp_path / f"{n}.lora", outputs=n) for n in (4, 5))
    with pytest.raises(InputError, match="no bundle is active"):
        slots.put_lora("style", send(slots, style))
    install(slots, with_lora_slot(miniature, tmp_path / "slotted"))
    slots.put_lora("style", send(slots, style))
    damaged = slots.root / "objects" / send(slots, wide)
    with pytest.raises(UsageError, match="another model"):
        slots.put_lora("style", damaged.name)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"style\.lora is damaged: deploy it again"):
        slots.put_lora("style", damaged.name)
    for name in ("../style", ".style", "", "a" * 101, "a\n", "-style"):
        with pytest.raises(UsageError, match="can't be the name of a LoRA"):
            slots.put_lora(name, damaged.name)
    for sha256 in ("0" * 64, "../" * 21 + "x"):
        with pytest.raises(BundleError, match=r"hasn't arrived|isn't a SHA-256"):
            slots.put_lora("style", sha256)
    assert sha256_file(slots.root / "loras/style.lora") == sha256_file(style)
    assert [path.name for path in (slots.root / "loras").iterdir()] == ["style.lora"]
    install(slots, with_other_decoder(miniature, tmp_path / "other"))
    assert sha256_file(slots.root / "loras/style.lora") == sha256_file(style)


def test_where_keys_are_trusted_loras_come_with_signatures(
    miniature: Bundle, tmp_path: Path
) -> None:
    pytest.importorskip("cryptography")
    slots = Slots(tmp_path / "home")
    install(slots, with_lora_slot(miniature, tmp_path / "slotted"))
    style = lora_file(tmp_path / "style.lora")
    trusted = trust(new_key(tmp_path / "key"))
    try:
        sha256 = send(slots, style)
        with pytest.raises(BundleError, match=r"the LoRA style\.lora isn't signed"):
            slots.put_lora("style", sha256)
        signature = send(slots, sign_lora(style, sha256, tmp_path / "key.key"))
        slots.put_lora("style", sha256, signature)
        assert open_lora("style:0.5", slots.root / "loras").lora.sha256 == sha256
    finally:
        trusted.unlink()


def test_damage_is_found_and_its_object_removed(
    bundles: tuple[Bundle, Bundle, Bundle], tmp_path: Path
) -> None:
    slots = Slots(tmp_path)
    install(slots, bundles[0])
    told = arrive(slots, bundles[1])
    sha256 = bundles[1].manifest.files["unet/weights.bin"].sha256
    path = tmp_path / "objects" / sha256
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.unlink()  # else the active bundle's file, which is the same one, was damaged, too
    path.write_bytes(data)
    with pytest.raises(BundleError, match=r"unet/weights\.bin was altered or damaged"):
        slots.install(*told, self_test=False)
    assert not path.exists()
    assert active(slots) == bundles[0].manifest_sha256
    shutil.copy(bundles[1].path / "unet/weights.bin", path)
    slots.install(*told, self_test=False)
    assert active(slots) == bundles[1].manifest_sha256


def test_what_no_slot_has_is_swept(bundles: tuple[Bundle, Bundle, Bundle], tmp_path: Path) -> None:
    slots = Slots(tmp_path)
    for bundle in bundles:
        install(slots, bundle)
    kept = {path.name for path in (tmp_path / "objects").iterdir()}
    name = "vae_decoder/weights.bin"
    has = [bundle.manifest.files[name].sha256 in kept for bundle in bundles]
    assert has == [False, True, True]


def test_a_manifest_that_points_outside(
    bundles: tuple[Bundle, Bundle, Bundle], tmp_path: Path
) -> None:
    slots = Slots(tmp_path / "home")
    path = tmp_path / "evil"
    shutil.copytree(bundles[0].path, path)
    text = (path / MANIFEST).read_text().replace('"unet/weights.bin"', '"../../../evil.bin"')
    (path / MANIFEST).write_text(text)
    objects = slots.root / "objects"
    objects.mkdir(parents=True)
    for file in path.rglob("*"):
        if file.is_file():
            shutil.copy(file, objects / sha256_file(file))
    told = sha256_file(path / MANIFEST), sha256_file(path / CHECKSUM)
    with pytest.raises(BundleError, match="unsafe path"):
        slots.install(*told, self_test=False)
    assert not list(tmp_path.glob("**/evil.bin"))


def test_what_lies_in_the_way_is_named_and_left_alone(
    bundles: tuple[Bundle, Bundle, Bundle], tmp_path: Path
) -> None:
    foreign = tmp_path / "notes"
    foreign.write_text("precious")
    slots = Slots(tmp_path / "home")
    told = arrive(slots, bundles[0])
    lock = slots.root / "lock"
    lock.mkdir()
    with pytest.raises(InputError, match=rf"{lock}: Is a directory; .*move what is there away"):
        slots.install(*told, self_test=False)
    lock.rmdir()
    lock.symlink_to(foreign)
    slots.install(*told, self_test=False)
    assert foreign.read_text() == "precious"


def test_two_deploys_at_once(
    bundles: tuple[Bundle, Bundle, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots_module, "_PATIENCE_SECONDS", 0.0)
    slots = Slots(tmp_path)
    told = arrive(slots, bundles[0])
    with slots._alone(), pytest.raises(InputError, match="another deploy is at work"):
        slots.install(*told, self_test=False)


@pytest.mark.parametrize("size", [(1, 1), (2, 2)])
def test_a_flat_image_fails_the_self_test(size: tuple[int, int], tmp_path: Path) -> None:
    from PIL import Image

    image = Image.new("RGB", size, "gray")
    image.save(tmp_path / "flat.png")
    with pytest.raises(BoardError, match="one flat colour"):
        slots_module._check_image(tmp_path / "flat.png")
