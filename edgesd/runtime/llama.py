"""llama.cpp with one small interface: by llama-cpp-python, or by xllamacpp, whose wheels need no
compiler on a board. Only the prompter's own process imports this."""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgesd.errors import InputError, MissingDependencyError
from edgesd.runtime.closeable import Closeable
from edgesd.spec.base import Spec

CONTEXT = 256
"""Tokens of a frame, its short prompt and the answer together, at most."""

_ASKED, _MOST_ASKED = 64, 1024
"""Candidates that the grammar is asked about at first, and at once: each takes 0.6 kB."""

_AT_A_TIME = 32
"""Tokens that are computed together: each costs a row of the vocabulary's logits in memory."""


class Task(Spec, frozen=True):
    """What the process reads: a model file, an adapter or "", framed short prompts, and how to
    answer.

    Answers are the likeliest ones: there is no chance in them, and so no seed.
    """

    base: str
    adapter: str
    frames: tuple[str, ...]
    grammar: str
    max_tokens: int
    threads: int


class Answer(Spec, frozen=True, tag="answer"):
    """One short prompt's line, as the model wrote it. seconds: it took. problem: why there is none.
    bytes: most memory of the process so far, its mapped files included."""

    text: str
    seconds: float
    problem: str | None = None
    bytes: int = 0


class Refusal(Spec, frozen=True, tag="refusal"):
    """Why the process gives no more answers."""

    message: str


Line = Answer | Refusal
"""What the process prints, a JSON object per line."""


class Llama(Protocol):
    """A loaded model. A context manager."""

    def complete(self, text: str, grammar: str, max_tokens: int) -> str:
        """The likeliest answer to `text` that the GBNF grammar allows, token by token.

        Raises InputError for a text that is too long.
        """

    def close(self) -> None:
        """Free the model."""


def open_llama(base: Path, adapter: Path | None, threads: int) -> Llama:
    """By the first library that is installed. Raises MissingDependencyError, or InputError when a
    file can't be loaded."""
    reasons = []
    for kind in (LlamaCppPython, XLlamaCpp):
        try:
            return kind(base, adapter, threads)
        except ImportError as exc:
            reasons.append(str(exc))
    raise MissingDependencyError(
        f"there is no llama.cpp ({'; '.join(reasons)}): pip install llama-cpp-python, or "
        "xllamacpp, which needs no compiler (both need the system's libgomp1)"
    )


@cache
def bindings() -> Any:
    """llama-cpp-python's bindings of llama.h alone. Raises ImportError.

    Its package imports its high-level classes and a template engine besides: 10 MB of memory.
    """
    found = importlib.util.find_spec("llama_cpp")
    if found is None or found.submodule_search_locations is None:
        raise ImportError("No module named 'llama_cpp'")
    whole = sys.modules.get("llama_cpp")
    bare = ModuleType("llama_cpp")
    bare.__path__ = list(found.submodule_search_locations)
    sys.modules["llama_cpp"] = bare
    try:
        return importlib.import_module("llama_cpp.llama_cpp")
    finally:  # for readers of all of it
        del sys.modules["llama_cpp"]
        if whole is not None:
            sys.modules["llama_cpp"] = whole


@cache
def silence() -> Any:
    """Let llama.cpp print nothing. The callback lives on here: the library keeps its address."""
    llama_cpp = bindings()
    callback = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    return callback


class LlamaCppPython(Closeable):
    """By llama-cpp-python's bindings of the C interface (llama.h)."""

    def __init__(self, base: Path, adapter: Path | None, threads: int) -> None:
        llama_cpp = bindings()
        self._lib: Any = llama_cpp
        self._model = self._context = self._adapter = None
        silence()
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = 0  # the GPU's memory is the image model's
        options.use_extra_bufts = False  # repacked weights would be a second copy
        self._model = llama_cpp.llama_model_load_from_file(_name(base), options)
        if not self._model:
            raise InputError(f"{base} can't be loaded by llama.cpp: is it a GGUF model?")
        self._vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = CONTEXT
        settings.n_ubatch = _AT_A_TIME
        settings.n_threads = settings.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        if not self._context:
            raise InputError(f"llama.cpp can't make a context for {base}: is memory short?")
        if adapter is not None:
            # Not by the high-level class, whose lora_path would turn memory mapping off.
            self._adapter = llama_cpp.llama_adapter_lora_init(self._model, _name(adapter))
            if not self._adapter:
                raise InputError(f"{adapter} isn't an adapter for {base}")
            adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(self._adapter)
            scales = (ctypes.c_float * 1)(1.0)
            if llama_cpp.llama_set_adapters_lora(self._context, adapters, 1, scales):
                raise InputError(f"{adapter} can't be applied to {base}")

    def tokenize(self, text: str) -> list[int]:
        """Token ids. Control tokens that `text` spells are plain text."""
        raw = text.encode()
        found = (self._lib.llama_token * (len(raw) + 8))()
        count = self._lib.llama_tokenize(
            self._vocabulary, raw, len(raw), found, len(found), False, False
        )
        return list(found[:count])

    def end(self) -> int:
        """The token that ends a text."""
        return int(self._lib.llama_vocab_eos(self._vocabulary))

    def complete(self, text: str, grammar: str, max_tokens: int) -> str:
        lib = self._lib
        rules = lib.llama_sampler_init_grammar(self._vocabulary, grammar.encode(), b"root")
        if not rules:
            raise InputError("llama.cpp can't read the grammar")
        try:
            lib.llama_memory_clear(lib.llama_get_memory(self._context), True)
            pending = self.tokenize(text)
            if len(pending) + max_tokens > CONTEXT:
                raise InputError(_too_long(len(pending)))
            said = b""
            for _ in range(max_tokens):
                self._decode(pending)
                token = self._likeliest(rules)
                if token is None or lib.llama_vocab_is_eog(self._vocabulary, token):
                    break
                lib.llama_sampler_accept(rules, token)
                said += self._piece(token)
                if said.endswith(b"\n"):
                    break
                pending = [token]
            return said.decode(errors="replace")
        finally:
            lib.llama_sampler_free(rules)

    def _likeliest(self, rules: Any) -> int | None:
        """The likeliest next token that the grammar allows, or None.

        The grammar is asked about the likeliest tokens first, then about more: to ask about all at
        once takes 30 MB.
        """
        lib, logits = self._lib, self._logits(-1)
        order = np.argsort(-logits, kind="stable")
        start, asked = 0, _ASKED
        while start < len(order):
            part = order[start : start + asked]
            start, asked = start + asked, min(2 * asked, _MOST_ASKED)
            entries = (lib.llama_token_data * len(part))()
            for entry, token in zip(entries, part, strict=True):
                entry.id, entry.logit = int(token), float(logits[token])
            data = lib.llama_token_data_array(entries, len(part), -1, False)
            lib.llama_sampler_apply(rules, ctypes.byref(data))
            for entry in entries[: data.size]:  # what isn't allowed has a logit of -inf
                if entry.logit > -np.inf:
                    return int(entry.id)
        return None

    def _logits(self, at: int) -> npt.NDArray[np.float64]:
        size = self._lib.llama_vocab_n_tokens(self._vocabulary)
        row = self._lib.llama_get_logits_ith(self._context, at)
        return np.ctypeslib.as_array(row, (size,)).astype(np.float64)

    def log_likelihoods(self, frame: list[int], answer: list[int]) -> npt.NDArray[np.float64]:
        """Natural logarithms of the probabilities of `answer`'s tokens after `frame`."""
        lib = self._lib
        both = [*frame, *answer]
        lib.llama_memory_clear(lib.llama_get_memory(self._context), True)
        batch = lib.llama_batch_init(len(both), 0, 1)
        try:
            batch.n_tokens = len(both)
            for at, token in enumerate(both):
                batch.token[at] = token
                batch.pos[at] = at
                batch.n_seq_id[at] = 1
                batch.seq_id[at][0] = 0
                batch.logits[at] = len(frame) - 1 <= at < len(both) - 1
            if lib.llama_decode(self._context, batch):
                raise InputError("llama.cpp can't compute this text: is it too long?")
            found = []
            for at, token in enumerate(answer, start=len(frame) - 1):
                row = self._logits(at)
                top = row.max()
                found.append(row[token] - top - np.log(np.exp(row - top).sum()))
            return np.array(found)
        finally:
            lib.llama_batch_free(batch)

    def close(self) -> None:
        if self._context:
            self._lib.llama_free(self._context)
        if self._model:
            self._lib.llama_model_free(self._model)
        self._context = self._model = None

    def _decode(self, tokens: list[int]) -> None:
        array = (self._lib.llama_token * len(tokens))(*tokens)
        if self._lib.llama_decode(self._context, self._lib.llama_batch_get_one(array, len(tokens))):
            raise InputError("llama.cpp can't compute this text: is it too long?")

    def _piece(self, token: int) -> bytes:
        buffer = ctypes.create_string_buffer(64)
        count = self._lib.llama_token_to_piece(
            self._vocabulary, token, buffer, len(buffer), 0, False
        )
        return buffer.raw[: max(0, count)]


class XLlamaCpp(Closeable):
    """By xllamacpp, llama.cpp's server within the process; no port is opened."""

    def __init__(self, base: Path, adapter: Path | None, threads: int) -> None:
        import xllamacpp

        for path in (base, adapter):  # the server's own words go to its log only
            if path is not None and not path.is_file():
                raise InputError(f"there is no {path}")
        options = xllamacpp.CommonParams()
        options.model.path = str(base)
        options.n_ctx = options.n_batch = CONTEXT
        options.n_ubatch = _AT_A_TIME
        options.n_parallel = 1
        options.n_gpu_layers = 0
        options.warmup = False
        options.verbosity = 0
        options.cache_ram_mib = 0
        options.cpuparams.n_threads = options.cpuparams_batch.n_threads = threads
        if adapter is not None:
            options.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        try:
            self._server: Any = xllamacpp.Server(options)
        except (RuntimeError, ValueError) as exc:
            raise InputError(f"{base} can't be loaded by llama.cpp: {exc}") from exc

    def complete(self, text: str, grammar: str, max_tokens: int) -> str:
        done = self._server.handle_completions(
            {
                "prompt": text,
                "max_tokens": max_tokens,
                "temperature": 0.0,
                "seed": 0,
                "grammar": grammar,
                "stop": ["\n"],
            }
        )
        if "choices" not in done:
            error = done.get("error", {})
            if error.get("type") == "exceed_context_size_error":
                raise InputError(_too_long(error["n_prompt_tokens"]))
            raise InputError(f"llama.cpp gives no answer: {error.get('message', done)}")
        return str(done["choices"][0]["text"])

    def close(self) -> None:
        self._server = None


def _too_long(tokens: int) -> str:
    return f"the short prompt has {tokens} tokens: write a shorter one"


def _name(path: Path) -> bytes:
    return str(path).encode()
