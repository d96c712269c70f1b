"""Holds what edgesd calls of TensorRT against the Python bindings of many versions.

python scripts/tensorrt_surface.py [VERSION ...]

The bindings are wheels on PyPI, and the libraries behind them are not: each is imported, in a
process of its own, over a library of empty functions that gcc makes (nothing of it is called).
Prints a table; exit status 1 when a version lacks something. Needs gcc, binutils and pip.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from edgesd.processes import module_command

VERSIONS = ("10.3.0", "10.13.3.9", "10.16.1.11", "11.4.0.106")

NEEDED = (
    # edgesd/runtime/backends/tensorrt.py
    "DataType.FLOAT.itemsize",
    "ICudaEngine.create_execution_context",
    "ICudaEngine.get_tensor_dtype",
    "ICudaEngine.get_tensor_name",
    "ICudaEngine.num_io_tensors",
    "IExecutionContext.execute_async_v3",
    "IExecutionContext.get_tensor_shape",
    "IExecutionContext.set_input_shape",
    "IExecutionContext.set_tensor_address",
    "Logger.ERROR",
    "Runtime.deserialize_cuda_engine",
    # edgesd/engines/tensorrt_worker.py
    "Builder.build_serialized_network",
    "Builder.create_builder_config",
    "Builder.create_network",
    "IBuilderConfig.builder_optimization_level",
    "IBuilderConfig.progress_monitor",
    "IBuilderConfig.set_memory_pool_limit",
    "IHostMemory.nbytes",
    "ILogger.Severity.ERROR",
    "ILogger.Severity.INTERNAL_ERROR",
    "ILogger.Severity.WARNING",
    "INetworkDefinition.get_input",
    "INetworkDefinition.num_inputs",
    "IProgressMonitor",
    "MemoryPoolType.WORKSPACE",
    "NetworkDefinitionCreationFlag.STRONGLY_TYPED",
    "OnnxParser.get_error",
    "OnnxParser.num_errors",
    "OnnxParser.parse",
    "ParserError.desc",
    "ParserError.node_name",
    "ParserError.node_operator",
)
"""Names that edgesd uses whatever the version."""

SIGNATURES = (
    "IExecutionContext.execute_async_v3",
    "IExecutionContext.set_input_shape",
    "IExecutionContext.set_tensor_address",
    "Runtime.deserialize_cuda_engine",
    "Builder.build_serialized_network",
    "Builder.create_network",
    "IBuilderConfig.set_memory_pool_limit",
    "OnnxParser.parse",
)
"""Of these the arguments' names and types are compared, too: pybind11 writes them down."""

_QUERY = """
import json, os, sys
sys.setdlopenflags(os.RTLD_LAZY)
import tensorrt_bindings as trt
needed, signatures = json.loads(sys.argv[1])
def find(path):
    found = trt
    for part in path.split("."):
        found = getattr(found, part)
    return found
def has(path):
    try:
        find(path)
    except AttributeError:
        return False
    return True
missing = [path for path in needed if not has(path)]
def signature(path):
    lines = [line.strip() for line in (find(path).__doc__ or "").splitlines()]
    real = [line.removeprefix("1. ") for line in lines if "(self" in line]
    return (real or lines or [""])[0]
lines = {path: signature(path) for path in signatures if path not in missing}
print(json.dumps([trt.__version__, missing, lines]))
"""


def surface(version: str, folder: Path) -> tuple[str, list[str], dict[str, str]]:
    """Version as the bindings name it, names of NEEDED that it lacks, and its SIGNATURES."""
    subprocess.run(
        module_command(
            *("pip", "install", "--quiet", "--no-deps"),
            *("--disable-pip-version-check", "--target", str(folder)),
            f"tensorrt-cu12-bindings=={version}",
        ),
        check=True,
    )
    library = folder / "tensorrt_bindings" / "tensorrt.so"
    stubs = _stubs(library, version.partition(".")[0], folder / "stubs")
    done = subprocess.run(
        [sys.executable, "-c", _QUERY, json.dumps([NEEDED, SIGNATURES])],
        env={**os.environ, "LD_LIBRARY_PATH": str(stubs), "PYTHONPATH": str(folder)},
        check=True,
        capture_output=True,
        text=True,
    )
    name, missing, lines = json.loads(done.stdout)
    return name, missing, lines


def _stubs(library: Path, major: str, folder: Path) -> Path:
    """Libraries of the names that `library` asks for, whose functions all return 0."""
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", str(library)], check=True, capture_output=True, text=True
    )
    symbols = [line.split()[-1] for line in listed.stdout.splitlines()]
    plain = [s for s in symbols if s.startswith(("create", "get", "init")) and "@" not in s]
    folder.mkdir()
    source = folder / "stubs.c"
    source.write_text("".join(f"int {symbol}(void) {{ return 0; }}\n" for symbol in plain) + "\n")
    for name in ("nvinfer", "nvonnxparser", "nvinfer_plugin"):
        soname = f"lib{name}.so.{major}"
        subprocess.run(
            [
                *("gcc", "-w", "-shared", "-fPIC", str(source)),
                *("-o", str(folder / soname), f"-Wl,-soname,{soname}"),
            ],
            check=True,
        )
    return folder


def main() -> int:
    """Compare; the exit status."""
    versions = sys.argv[1:] or VERSIONS
    first: dict[str, str] = {}
    status = 0
    for version in versions:
        with tempfile.TemporaryDirectory() as folder:
            name, missing, lines = surface(version, Path(folder))
        lines = {path: line.replace("typing.SupportsInt", "int") for path, line in lines.items()}
        first = first or lines
        other = [path for path in lines if lines[path] != first.get(path)]
        print(f"TensorRT {name}: {len(NEEDED) - len(missing)} of {len(NEEDED)} names", end="")
        print(f"; missing: {', '.join(missing)}" if missing else "", end="")
        print(f"; other signatures: {', '.join(other)}" if other else "; the same signatures")
        for path in other:
            print(f"  {lines[path]}\n  instead of {first.get(path)}")
        status |= bool(missing)
    return status


if __name__ == "__main__":
    sys.exit(main())
