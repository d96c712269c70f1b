"""Whatever is given for a picture is read, or refused in one line, and nothing else happens."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import numpy as np
import pytest
from PIL import ImageFile

from edgesd.errors import InputError
from edgesd.runtime import pictures
from edgesd.runtime.pictures import image_array, read_picture
from tests.hostile_pictures import CASES, FILES, SIZES, encoded


def refused(source: Path | bytes, name: str | None = None) -> str:
    with pytest.raises(InputError) as caught:
        read_picture(source, name)
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 400
    assert "Error" not in line
    return line


@pytest.mark.parametrize("name", CASES)
def test_hostile_bytes(
    name: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    recwarn: pytest.WarningsRecorder,
) -> None:
    case = CASES[name]
    path = tmp_path / "given.png"
    path.write_bytes(case.make())
    try:
        picture = read_picture(path)
    except InputError:
        assert case.outcome != "read"
        assert case.said in refused(path)
        assert refused(path).startswith(str(path))
    else:
        assert case.outcome != "refused"
        assert case.said in " ".join(picture.notes)
        values = image_array(picture.decoded(), 8, 8)
        assert np.abs(values).max() <= 1
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert not recwarn.list
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_refused_before_pixels_are_decoded(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(image: ImageFile.ImageFile) -> None:
        raise AssertionError(f"{image.size} pixels are decoded")

    raw, said = SIZES[name][0](), SIZES[name][1]
    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    line = refused(raw, "given.png")
    assert said in line
    assert "are decoded" not in line


def mutated(raw: bytes, random: np.random.RandomState) -> bytes:
    """`raw` with a few bytes changed, left out or put in."""
    found = bytearray(raw)
    for _ in range(random.choice([1, 2, 8])):
        at = random.randint(len(found))
        kind = random.randint(3)
        if kind == 0:
            found[at] = random.randint(256)
        elif kind == 1:
            del found[at : at + random.randint(1, 20)]
        else:
            found[at:at] = random.bytes(random.randint(1, 8))
        found = found or bytearray(b"\0")
    return bytes(found)


@pytest.mark.parametrize("name", FILES)
def test_files_of_changed_bytes(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    raw, random = FILES[name](), np.random.RandomState(7)
    outcomes = set()
    for _ in range(150):
        changed = mutated(raw, random)
        try:
            picture = read_picture(changed)
        except InputError:
            refused(changed)
            outcomes.add("refused")
        else:
            assert picture.decoded().size == picture.size
            outcomes.add("read")
    assert outcomes == {"read", "refused"}
    assert capfd.readouterr() == ("", "")


def test_what_is_no_file(tmp_path: Path) -> None:
    assert "is a folder: expected a picture" in refused(tmp_path)
    assert "No such file" in refused(tmp_path / "missing.png")
    assert "Not a directory" in refused(Path(__file__) / "inside.png")
    assert "File name too long" in refused(tmp_path / ("a" * 300))
    assert "can't be read: embedded null" in refused(tmp_path / "a\0b.png")
    os.mkfifo(tmp_path / "pipe.png")
    assert "is a device or a pipe" in refused(tmp_path / "pipe.png")
    assert "is a device or a pipe" in refused(Path("/dev/zero"))
    (tmp_path / "around.png").symlink_to("around.png")
    assert "symbolic links" in refused(tmp_path / "around.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        assert "can't be read" in refused(tmp_path / "socket")


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "private.png"
    path.write_bytes(encoded("PNG"))

    def forbidden(*args: object) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(pictures.os, "open", forbidden)
    assert refused(path) == f"{path} can't be read: Permission denied"


def test_a_file_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    with path.open("wb") as file:
        file.write(encoded("PNG"))
        file.truncate(1 << 40)
    assert "larger than 64 MiB" in refused(path)


def test_a_link_to_a_picture_is_one(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(encoded("PNG"))
    (tmp_path / "link.png").symlink_to("real")
    assert read_picture(tmp_path / "link.png").size == (24, 16)
