"""edgesd's own operators under AddressSanitizer and UndefinedBehaviorSanitizer, on graphs that an
attacker would write."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

pytest.importorskip("onnx")

from edgesd.engines.kernels import compile_library, find_compiler
from tests.hostile_graphs import FILLED

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
GRAPHS, BATCH = 2400, 400
SANITIZERS = (
    *("-O1", "-g1", "-w", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"),
    "-fsanitize=address,undefined,float-cast-overflow",
)
OPTIONS = ":".join(
    (
        "detect_leaks=0",  # Python's own
        "allocator_may_return_null=1",
        # What is allocated is filled, so that a value that nobody writes is known.
        f"max_malloc_fill_size={1 << 30}",
        f"malloc_fill_byte={FILLED[0]}",
    )
)
INSTRUCTIONS = {
    "x86_64": {"avx512_vnni": "avx512_vnni", "avx_vnni": "avx_vnni", "avx2": "avx2"},
    "aarch64": {"neon_dotprod": "asimddp"},
}
"""Architecture -> instruction set -> its name in /proc/cpuinfo."""


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The library with the sanitizers, and what a process has to preload for it."""
    arch = platform.machine()
    compiler = find_compiler(arch) if arch in INSTRUCTIONS else None
    if compiler is None or "g++" not in compiler:
        pytest.skip("no g++ for this machine")
    found = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    if not all(Path(path).is_absolute() for path in found):
        pytest.skip("g++ has no sanitizers here: apt install libasan8 libubsan1")
    path = tmp_path_factory.mktemp("sanitized") / "kernels.so"
    compile_library(compiler, arch, path, flags=SANITIZERS)
    return path, ":".join(found)


def run(sanitized: tuple[Path, str], isa: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python process with the sanitizers beneath."""
    library, preload = sanitized
    environment = {
        **os.environ,
        "EDGESD_KERNELS": str(library),
        "EDGESD_INSTRUCTION_SET": isa,
        "ASAN_OPTIONS": OPTIONS,
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "LD_PRELOAD": preload,
        "PYTHONMALLOC": "malloc",
    }
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=1200,
    )


@pytest.mark.parametrize("isa", [isa for isas in INSTRUCTIONS.values() for isa in isas])
def test_no_graph_makes_the_operators_leave_their_memory(
    isa: str, sanitized: tuple[Path, str]
) -> None:
    name = INSTRUCTIONS[platform.machine()].get(isa)
    flags = Path("/proc/cpuinfo").read_text().split()
    if name is None or name not in flags:
        pytest.skip(f"this processor has no {isa}")
    seed = 20 + sorted(INSTRUCTIONS[platform.machine()]).index(isa)
    ran = refused = 0
    faults: list[str] = []
    first = 0
    while first < GRAPHS and len(faults) < 5:
        last = min(GRAPHS, first + BATCH)
        done = run(sanitized, isa, "-m", "tests.hostile_graphs", *map(str, (seed, first, last)))
        lines = done.stdout.splitlines()
        ran += lines.count("ran")
        refused += sum(line.startswith("refused: ") for line in lines)
        faults += [
            f"{graph}\n{said}" for graph, said in pairwise(lines) if said.startswith("wrong")
        ]
        first = last
        if done.returncode:  # it ended in the graph that it named last
            graphs = [line for line in lines if re.match(r"\d+ Graph", line)]
            faults.append(
                f"{(graphs or ['none'])[-1]}\nrc {done.returncode}: {done.stderr[-3000:]}"
            )
            first = int(graphs[-1].split()[0]) + 1 if graphs else GRAPHS
    assert not faults, "\n\n".join(faults)
    assert ran + refused == GRAPHS and min(ran, refused) > GRAPHS // 8
    print(f"{isa}: {ran} graphs ran, {refused} were refused")


FAULTS = {
    "address": "heap-buffer-overflow",
    "undefined": "signed integer overflow",
    "fill": "values were never written",
}
CHILD = """
import ctypes, sys
import numpy as np
from edgesd.runtime import kernels
if sys.argv[1] == "fill":
    from tests import hostile_graphs as h
    got = np.empty(64, np.float32)
    left = got.view(np.uint32) == np.frombuffer(h.FILLED, np.uint32)[0]
    sys.exit(f"{left.sum()} values were never written" if left.any() else 0)
functions = ctypes.CDLL(str(kernels.library()))
functions.edgesd_seeded_fault(sys.argv[1].encode())
"""


@pytest.mark.parametrize("kind", FAULTS)
def test_the_sanitizers_would_see_it(
    kind: str, sanitized: tuple[Path, str], tmp_path: Path
) -> None:
    """A fault that is put into a library built in the same way ends the process, and is named."""
    source, library = tmp_path / "fault.cpp", tmp_path / "fault.so"
    source.write_text(
        """
#include <cstring>
extern "C" int edgesd_seeded_fault(const char* kind) {
  volatile int most = 2147483647;
  if (std::strcmp(kind, "undefined") == 0) return most + 1;
  char* volatile memory = new char[16];
  volatile int place = 16;
  return memory[place];
}
"""
    )
    command = [
        find_compiler(platform.machine()) or "",
        *SANITIZERS,
        "-fPIC",
        "-shared",
        str(source),
        "-o",
        str(library),
    ]
    subprocess.run(command, check=True)
    done = run((library, sanitized[1]), "", "-c", CHILD, kind)
    assert done.returncode != 0 and FAULTS[kind] in done.stderr
