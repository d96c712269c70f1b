"""Exports a trained adapter for bundles: GGUF files, checked in llama.cpp itself."""

from __future__ import annotations

import ctypes
from pathlib import Path

import msgspec
import numpy as np

from edgesd.cores import thread_cores
from edgesd.errors import InputError, MissingDependencyError, QualityError, UsageError
from edgesd.export.prompter.gguf_files import tensor_types, write_adapter, write_merged
from edgesd.export.prompter.grammar import closed_grammar
from edgesd.export.prompter.pairs import PairSet
from edgesd.export.prompter.train import HELD_PAIRS, REPORT, TrainingReport
from edgesd.files import (
    atomic_dir,
    atomic_path,
    check_new,
    check_writable,
    link_or_copy,
    sha256_file,
)
from edgesd.progress import SILENT, Progress
from edgesd.runtime.llama import LlamaCppPython, bindings, silence
from edgesd.runtime.prompter import FRAME, SPEC
from edgesd.spec.base import Spec, decode_json
from edgesd.spec.bundle import PrompterSpec
from edgesd.textfiles import read_text

EXPORT = "export.json"
BASE, ADAPTER, GRAMMAR_FILE = "base.gguf", "adapter.gguf", "grammar.gbnf"

TOLERANCE = 0.03
"""The loss in llama.cpp may exceed that of training by this part."""


class ExportReport(Spec, frozen=True):
    """export.json. Losses in nats per token over the same held-out pairs. types: type of
    quantization -> weights of the model file that really have it."""

    merged: str | None
    loss_torch: float
    loss_llama: float
    types: dict[str, int]
    bytes: int


def export(
    run: Path,
    base: Path,
    pairs: PairSet,
    out: Path,
    licence: str,
    merge: str | None = None,
    progress: Progress = SILENT,
) -> ExportReport:
    """Write the prompter that `run` trained to the new folder `out`: the base as it is and an
    adapter, or one model of the type `merge`.

    base: the file that it was trained on; after training on a transformers folder, any of the same
    shapes. Raises UsageError for a merge back onto the base's own grid, which would erase what was
    learned, or without `merge` after training all weights; InputError for another base;
    QualityError when the loss in llama.cpp is worse than in training; MissingDependencyError
    without llama-cpp-python.
    """
    if out.exists() and not out.is_dir():
        check_new(out)
    check_writable(out)
    report = read_report(run)
    if not base.is_file() or report.base_sha256 not in ("", sha256_file(base)):
        raise InputError(f"{base} isn't the file that {run} was trained on ({report.base})")
    if merge is None and report.rank == 0:
        raise UsageError(
            f"{run} trained all weights, so that there is no adapter: add --merge TYPE"
        )
    own = next(iter(tensor_types(base)))
    if merge is not None and merge != "F16" and merge.startswith(own):
        raise UsageError(
            f"the base is {own} already, and rounding back onto its own grid erases what was "
            f"learned: leave --merge out (base and adapter), or merge to Q8_0 or Q4_K_M"
        )
    with atomic_dir(out) as root:
        if merge is None:
            progress.line("adapter")
            write_adapter(run, base, report.alpha, root / ADAPTER)
            link_or_copy(base.resolve(), root / BASE)
        else:
            progress.line("merge")
            merged = root / "merged.gguf"
            write_merged(run, base, report.alpha / max(1, report.rank), merged)
            if merge == "F16":
                merged.rename(root / BASE)
            else:
                progress.line(f"quantize to {merge}")
                quantize(merged, root / BASE, merge)
                merged.unlink()
        progress.line("loss in llama.cpp")
        adapter = None if merge else ADAPTER
        loss = llama_loss(root / BASE, root / ADAPTER if adapter else None, pairs)
        allowed = report.loss_after * (1 + TOLERANCE)
        if not loss <= allowed:
            raise QualityError(
                f"in llama.cpp the held-out loss is {loss:.4f} nats per token, after training it "
                f"was {report.loss_after:.4f} (allowed {allowed:.4f}): "
                + ("export without --merge" if merge else "train and export again")
            )
        if pairs.closed:
            answers = {pair.prompt for pair in pairs.pairs}
            (root / GRAMMAR_FILE).write_text(closed_grammar(answers))
        grammar = GRAMMAR_FILE if pairs.closed else None
        spec = PrompterSpec(BASE, adapter, report.domain, report.form, licence, grammar)
        made = ExportReport(
            merged=merge,
            loss_torch=report.loss_after,
            loss_llama=loss,
            types=tensor_types(root / BASE),
            bytes=sum(path.stat().st_size for path in root.iterdir()),
        )
        for name, content in ((SPEC, spec), (EXPORT, made)):
            (root / name).write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=1))
    return made


def read_report(run: Path) -> TrainingReport:
    """The result of the training in the folder `run`. Raises InputError."""
    if not (run / REPORT).is_file():
        raise InputError(f"{run} holds no finished training")
    text = read_text(run / REPORT)
    try:
        return decode_json(text, TrainingReport)
    except InputError as exc:
        raise InputError(f"{run / REPORT} isn't valid ({exc}): train again") from exc


def llama_loss(base: Path, adapter: Path | None, pairs: PairSet) -> float:
    """Mean loss in nats per token in llama.cpp, of what `train.held_loss` measures in torch.

    Raises MissingDependencyError without llama-cpp-python, InputError for a file it can't load.
    """
    try:
        llama = LlamaCppPython(base, adapter, len(thread_cores()))
    except ImportError as exc:
        raise MissingDependencyError(
            "the loss is measured by llama-cpp-python, which isn't installed: pip install "
            "'edgesd[prompter]' (it is compiled then: minutes)"
        ) from exc
    found = []
    with llama:
        for pair in pairs.some_held(HELD_PAIRS):
            frame = llama.tokenize(FRAME.format(pair.user_prompt))
            answer = [*llama.tokenize(f" {pair.prompt}\n"), llama.end()]
            found.append(llama.log_likelihoods(frame, answer))
    return float(-np.concatenate(found).mean())


def quantize(model: Path, out: Path, kind: str) -> None:
    """Write `model` in the type `kind`, by llama.cpp's own quantizer. Raises InputError,
    MissingDependencyError."""
    try:
        llama_cpp = bindings()
    except ImportError as exc:
        raise MissingDependencyError(
            "models are quantized by llama-cpp-python, which isn't installed: pip install "
            "'edgesd[prompter]'"
        ) from exc
    silence()
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    with atomic_path(out) as temporary:
        status = llama_cpp.llama_model_quantize(
            str(model).encode(), str(temporary).encode(), ctypes.byref(options)
        )
        if status:
            raise InputError(f"llama.cpp's quantizer refuses {model} (status {status})")
