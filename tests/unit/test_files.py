"""Files that are written: their names and modes, and what is never lost for them."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgesd import files
from edgesd.errors import InputError, ResourceError
from edgesd.files import (
    ExistsError,
    KeptError,
    atomic_dir,
    atomic_path,
    atomic_write,
    check_file_place,
    check_writable,
    environment_folder,
    link_or_copy,
    mapped,
    private_folder,
    save,
    user_cache,
    user_config,
    user_home,
    write_free,
)
from tests.marks import utf8_names


@pytest.fixture(params=[0o022, 0o027, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def write(path: Path, content: bytes = b"new", **options: bool) -> None:
    with atomic_write(path, **options) as file:
        file.write(content)


def test_a_new_file_has_the_mode_that_the_umask_leaves(tmp_path: Path, umask: int) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b", new=True)
    with atomic_dir(tmp_path / "folder") as root:
        write(root / "c")
    assert mode(tmp_path / "a") == mode(tmp_path / "b") == 0o666 & ~umask
    assert mode(tmp_path / "folder") == 0o777 & ~umask
    assert mode(tmp_path / "folder/c") == 0o666 & ~umask


@pytest.mark.parametrize("older", [0o600, 0o640, 0o664, 0o755])
def test_a_file_that_is_replaced_keeps_its_mode(tmp_path: Path, umask: int, older: int) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    path.chmod(older)
    write(path)
    assert (path.read_bytes(), mode(path)) == (b"new", older)


def test_a_private_file_is_its_owners_alone(tmp_path: Path) -> None:
    write(tmp_path / "key", private=True)
    assert mode(tmp_path / "key") == 0o600
    with atomic_path(tmp_path / "other", private=True) as path:
        path.unlink()  # as a linker does
        path.write_bytes(b"anew")
    assert mode(tmp_path / "other") == 0o600


@utf8_names
def test_names_may_be_as_long_as_the_disk_allows(tmp_path: Path) -> None:
    path = tmp_path / ("é" * 125 + ".html")  # 255 bytes
    write(path)
    with atomic_dir(tmp_path / ("b" * 255)) as root:
        write(root / ("c" * 255))
    assert path.read_bytes() == b"new"
    with pytest.raises(InputError, match="too long"):
        check_writable(tmp_path / ("d" * 256))


def fail(monkeypatch: pytest.MonkeyPatch, name: str, number: int) -> None:
    """Let the call `name` of the system fail."""

    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, name, refuse)


@pytest.mark.parametrize("new", [False, True])
def test_a_disk_without_modes_links_and_locks_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new: bool
) -> None:
    path = tmp_path / "a"
    if not new:
        path.write_bytes(b"old")
        path.chmod(0o600)
    for name, number in (("chmod", errno.EPERM), ("link", errno.EOPNOTSUPP)):
        fail(monkeypatch, name, number)
    fail(monkeypatch, "fsync", errno.EINVAL)

    def unlocked(fd: int, how: int) -> None:
        raise OSError(errno.ENOSYS, "no locks")

    monkeypatch.setattr(fcntl, "flock", unlocked)
    write(path, new=new)
    with atomic_dir(tmp_path / "folder") as root:
        write(root / "b")
    link_or_copy(path, tmp_path / "copy")
    assert path.read_bytes() == (tmp_path / "copy").read_bytes() == b"new"
    with pytest.raises(ExistsError):
        write(path, b"other", new=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "copy", "folder"]


def test_a_new_file_replaces_none_that_came_in_the_last_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for links in (True, False):
        path = tmp_path / f"a{links}"
        if not links:
            fail(monkeypatch, "link", errno.EPERM)
        with pytest.raises(ExistsError), atomic_write(path, new=True):
            path.write_bytes(b"theirs")
        assert path.read_bytes() == b"theirs"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_link_that_leads_nowhere_is_there(tmp_path: Path) -> None:
    (tmp_path / "a.png").symlink_to("nowhere")
    assert write_free(tmp_path / "a.png", b"new") == tmp_path / "a-2.png"
    assert (tmp_path / "a.png").is_symlink() and not (tmp_path / "nowhere").exists()


def test_twenty_at_once_take_twenty_names(tmp_path: Path) -> None:
    def work(number: int) -> None:
        write_free(tmp_path / "a.png", b"%d" % number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert {path.read_bytes() for path in tmp_path.iterdir()} == {b"%d" % n for n in range(20)}


def test_a_device_is_written_into_and_stays_one(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    check_file_place(pipe)
    write(pipe, b"through")
    reader.join(60)
    assert got == [b"through"] and stat.S_ISFIFO(pipe.stat().st_mode)
    null = tmp_path / "null"
    null.symlink_to("/dev/null")
    write(null)
    assert null.is_symlink() and stat.S_ISCHR(Path("/dev/null").stat().st_mode)


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    code = """
import os, sys
from pathlib import Path
from edgesd.files import atomic_write
with atomic_write(Path(sys.argv[1]) / "a") as file:
    file.write(b"half")
    file.flush()
    print("there", flush=True)
    os.read(0, 1)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout and process.stdout.readline() == b"there\n"
    (part,) = tmp_path.iterdir()
    foreign = {
        *(tmp_path / name for name in ("b.part", ".edgesd-x.part", ".edgesd-own.part.txt")),
        tmp_path / (part.name[:10] + ("1" if part.name[10] == "0" else "0") + part.name[11:]),
    }
    for path in foreign:
        path.write_bytes(b"theirs")
    files._swept.clear()
    write(tmp_path / "one")
    assert part.is_dir(), "its process lives"
    process.kill()
    process.wait(60)
    process.stdin.close()  # type: ignore[union-attr]
    process.stdout.close()
    files._swept.clear()
    write(tmp_path / "two")
    assert set(tmp_path.iterdir()) == {tmp_path / "one", tmp_path / "two", *foreign}


def test_a_folder_that_others_hold_is_not_swept(tmp_path: Path) -> None:
    with private_folder(tmp_path / "a") as folder:
        files._swept.clear()
        write(tmp_path / "b")
        assert folder.is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_work_that_cannot_be_placed_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    wanted = tmp_path / "out/a.png"
    with monkeypatch.context() as patch:
        taken = iter([OSError(errno.ENOSPC, "full")])
        really = os.fsync

        def full_once(fd: int) -> None:
            for error in taken:
                raise error
            really(fd)

        patch.setattr(os, "fsync", full_once)
        with pytest.raises(ResourceError, match=r"kept as .*kept/a\.png"):
            save(wanted, b"image")
    assert not wanted.exists()
    assert (tmp_path / "cache/edgesd/kept/a.png").read_bytes() == b"image"


def test_a_folder_that_was_taken_meanwhile_leaves_what_was_made(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeptError) as caught, atomic_dir(out) as root:
        write(root / "a")
        write(out / "theirs")
    kept = Path(str(caught.value).rpartition("kept as ")[2])
    assert (kept / "a").read_bytes() == b"new"
    assert [path.name for path in out.iterdir()] == ["theirs"]


def test_a_folder_is_made_where_a_link_to_an_empty_one_leads(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o750)
    link = tmp_path / "link"
    link.symlink_to("real")
    with atomic_dir(link) as root:
        (root / "file").write_text("made")
    assert (tmp_path / "real/file").read_text() == "made"
    assert link.is_symlink() and sorted(tmp_path.iterdir()) == [link, tmp_path / "real"]


def test_errors_name_the_place_that_was_wanted(tmp_path: Path) -> None:
    with (
        pytest.raises(ResourceError) as caught,
        atomic_dir(tmp_path / "out") as root,
        atomic_write(root / "a"),
    ):
        raise OSError(errno.ENOSPC, "full")
    assert f"no space left to write {tmp_path / 'out/a'}: free" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_what_can_fail_is_tried_first(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder"):
        check_file_place(tmp_path)
    with pytest.raises(ResourceError, match="MB of disk are free"):
        check_writable(tmp_path / "a", 1 << 60)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        check_writable(tmp_path / "file/a")
    check_writable(tmp_path / "new/folder/a", 1)
    assert not (tmp_path / "new").exists()


def test_what_stands_in_the_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dead").symlink_to("nowhere")
    for name, what in (("file", "no folder"), ("dead", "a link that leads nowhere")):
        for below in ("a.png", "folder/a.png"):
            with pytest.raises(InputError, match=f"write into {tmp_path / name}: it is {what}"):
                check_writable(tmp_path / name / below)


@pytest.mark.timeout(60)
def test_a_folder_that_takes_no_files_is_refused_and_not_tried_for_ever(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot write /proc/a\.png"):
        check_writable(Path("/proc/a.png"))


def test_a_file_that_only_its_owner_may_replace_is_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o1777)
    (tmp_path / "a.png").write_bytes(b"theirs")
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 4321)
    with pytest.raises(InputError, match="another user's"):
        check_file_place(tmp_path / "a.png")
    check_file_place(tmp_path / "b.png")
    tmp_path.chmod(0o777)
    check_file_place(tmp_path / "a.png")


def test_a_socket_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # their paths have 108 bytes at most
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("a.png")
        with pytest.raises(InputError, match="can't be written into"):
            check_file_place(Path("a.png"))


def test_no_umask_leaves_a_private_folder_behind(tmp_path: Path) -> None:
    before = os.umask(0o777)
    try:
        with private_folder(tmp_path / "a") as folder:
            assert mode(folder) == 0o700
    finally:
        os.umask(before)
    assert not list(tmp_path.iterdir())


def no_entry(uid: int) -> None:
    raise KeyError(uid)


@pytest.mark.parametrize("home", [None, "", "relative", "~"])
def test_without_a_home_folder(
    home: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pwd.getpwuid", no_entry)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    if home is not None:
        monkeypatch.setenv("HOME", home)
    assert user_home() is None and user_config() is None
    cache = user_cache()
    assert cache == user_cache() and cache.parent == tmp_path and mode(cache) == 0o700
    cache.chmod(0o777)
    with pytest.raises(InputError, match="set XDG_CACHE_HOME"):
        user_cache()


def test_a_home_folder_that_cannot_be_is_none_for_a_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    assert user_cache().parent == tmp_path
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/counts/as/none")
    assert user_cache().parent == tmp_path
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert user_cache() == tmp_path / "cache/edgesd"


def test_folders_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for value, found in (("", None), ("~/x", tmp_path / "x"), ("x/y", Path("x/y"))):
        monkeypatch.setenv("EDGESD_HOME", value)
        assert environment_folder("EDGESD_HOME") == found
    (tmp_path / "file").touch()
    monkeypatch.setenv("EDGESD_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"EDGESD_HOME is .* which is no folder"):
        environment_folder("EDGESD_HOME")


@pytest.mark.parametrize(("offset", "size"), [(0, 9000), (1, 1), (4096, 10), (5000, 4000), (7, 0)])
def test_a_part_of_a_file_is_mapped(offset: int, size: int, tmp_path: Path) -> None:
    content = os.urandom(9000)
    path = tmp_path / "file"
    path.write_bytes(content)
    with path.open("rb") as file:
        found = mapped(file.fileno(), offset, size)
    assert found == content[offset : offset + size]
