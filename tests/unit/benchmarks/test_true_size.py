"""Memory of a process, and of those that it started."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support import wait_until

pytest.importorskip("torch")
pytest.importorskip("diffusers")

from benchmarks import true_size

pytestmark = pytest.mark.integration

SIZE = 200 << 20


def test_anonymous_pages_of_children_count() -> None:
    before = true_size.Sampler()
    before.begin("child")
    code = f"held = bytearray({SIZE}); held[::4096] = b'x' * len(held[::4096]); input()"
    with subprocess.Popen(
        [sys.executable, "-c", f"{code}\n"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        wait_until(lambda: true_size._resident(child.pid)[0] >= SIZE, "the child holds its memory")
        assert child.pid in true_size._family(os.getpid())
        before._sample()
        child.communicate(b"\n")
    before.end()
    first, second, _ = before.stages
    assert second.name == "child" and second.anonymous >= SIZE
    assert second.both >= second.anonymous and first.mapped > 0


def test_a_process_that_ended_takes_nothing() -> None:
    assert true_size._resident(1 << 30) == (0, 0)
    assert list(true_size._family(1 << 30)) == [1 << 30]
