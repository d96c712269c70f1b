"""A short prompt becomes a prompt: a small language model in a process of its own, which ends
before the image model is loaded.

Nothing in a short prompt is an instruction. It is reduced to words and plain punctuation
(`clean_user_prompt`), so that no control token can be spelled in it, and the model may answer in
one line of words alone (a grammar). Whatever fails, the short prompt itself is the prompt, with one
line that says why.
"""

from __future__ import annotations

import contextlib
import os
import queue
import subprocess
import threading
import unicodedata
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from edgesd.cores import thread_cores
from edgesd.errors import BundleError, InputError
from edgesd.files import atomic_path, sha256_file, user_cache
from edgesd.processes import module_command
from edgesd.runtime.bundle import Bundle, OpenFile
from edgesd.runtime.llama import Answer, Line, Refusal, Task
from edgesd.runtime.signature import check_trusted
from edgesd.runtime.tokenizer import PromptTokenizer
from edgesd.spec.base import decode_json, is_file_name
from edgesd.spec.bundle import PrompterSpec
from edgesd.textfiles import decode_text, read_text

USER_PROMPT_CHARACTERS = 300
"""More of a short prompt isn't read."""

PROMPT_CHARACTERS = 240
"""The model's line, at most; the text encoder's tokens are counted besides."""

SPEC = "prompter.json"
"""File of an exported prompter that says what it is (PrompterSpec)."""

FRAME = "Wish: {}\nPrompt:"
"""What the model reads. It goes on with a space, the prompt, and a line break."""

MAX_TOKENS = 64
"""Tokens of the model's line, at most."""

COMMAND = tuple(module_command("edgesd.runtime.prompter_worker"))

SECONDS = 20.0
"""A process that isn't done with one short prompt by then is killed."""

_PUNCTUATION = frozenset(" ,.'\u2019&-!?:;/()%")

GRAMMAR = f"""root ::= " " first rest{{0,{PROMPT_CHARACTERS - 1}}} "\\n"
first ::= [a-zA-Z0-9]
rest ::= [a-zA-Z0-9 ,.'&-]
"""
"""GBNF: one line of words in Latin letters, digits and light punctuation."""


FORM_CHARACTERS = 1000
"""Of a form, at most: a text encoder takes some 77 tokens."""

_ANSWER_CHARACTERS = 1000
"""More of an answer isn't read, whatever grammar a bundle has."""

_LINE_BYTES = 64 << 10
"""Of a line that the process answers, at most."""

_NOISE_BYTES = 4 << 10
"""Kept of what it prints besides: the end."""


def check_form(form: str) -> None:
    """Raise InputError where `form` isn't text with one "{}" in it."""
    if form.count("{}") != 1 or len(form) > FORM_CHARACTERS:
        raise InputError(
            f"the prompter's form is {form[:60]!r}: expected text of at most {FORM_CHARACTERS} "
            'characters with one "{}" in it, where the line goes'
        )


def in_form(form: str, line: str) -> str:
    """`line` in its form: text, and no format string of Python's, whatever else is in it."""
    return form.replace("{}", line, 1)


class Enhanced(NamedTuple):
    """The result for a short prompt. problem: why `prompt` is the short prompt itself, or None.
    seconds: of the model alone, without its start. bytes: most memory of its process so far, mapped
    model included; 0 where there was none."""

    user_prompt: str
    prompt: str
    seconds: float
    problem: str | None = None
    bytes: int = 0


def clean_user_prompt(user_prompt: str) -> str:
    """A short prompt as the model reads it: letters, digits and plain punctuation of any script, at
    most USER_PROMPT_CHARACTERS, single spaces.

    No control token and no chat template has a form that survives: brackets, bars, braces and
    line breaks become spaces.
    """
    text = unicodedata.normalize("NFKC", user_prompt[: 4 * USER_PROMPT_CHARACTERS])
    kept = (c if c in _PUNCTUATION or unicodedata.category(c)[0] in "LMN" else " " for c in text)
    return " ".join("".join(kept).split())[:USER_PROMPT_CHARACTERS].strip()


class Prompter(NamedTuple):
    """Files of a prompter, and its spec. adapter: None where it is merged into the base. grammar:
    of its line. opened: files of a bundle that `base` and `adapter` lead to while they are open."""

    base: Path
    adapter: Path | None
    spec: PrompterSpec
    grammar: str = GRAMMAR
    opened: tuple[OpenFile, ...] = ()


def enhance(
    prompter: Prompter,
    user_prompts: Sequence[str],
    tokenizer: PromptTokenizer | None = None,
    threads: int = 0,
    seconds: float = SECONDS,
) -> list[Enhanced]:
    """A prompt for each short prompt, in order; the short prompt itself where anything fails.

    tokenizer: of the text encoder; a prompt that doesn't fit it is cut at a word. seconds: for each
    short prompt, and for the start; a process that takes longer is killed. The process has ended
    when this returns.
    """
    cleaned = [clean_user_prompt(user_prompt) for user_prompt in user_prompts]
    asked = [user_prompt for user_prompt in cleaned if user_prompt]
    lines = _answers(prompter, asked, threads or len(thread_cores()), seconds)
    found = []
    problem: str | None = None
    for user_prompt, clean in zip(user_prompts, cleaned, strict=True):
        if not clean:
            found.append(Enhanced(user_prompt, user_prompt, 0.0, "there are no words in it"))
            continue
        if problem is None:
            line = next(lines, Refusal("it ended without an answer"))
            if isinstance(line, Answer):
                prompt = _finish(line.text, prompter.spec.form, tokenizer)
                unusable = line.problem or (None if prompt else "the model's answer was empty")
                found.append(
                    Enhanced(user_prompt, prompt or user_prompt, line.seconds, unusable, line.bytes)
                )
                continue
            problem = line.message
        found.append(Enhanced(user_prompt, user_prompt, 0.0, problem))
    lines.close()
    return found


def _finish(text: str, form: str, tokenizer: PromptTokenizer | None) -> str:
    """The model's line in its form, cut at a word to fit the text encoder."""
    plain = "".join(c if c.isprintable() else " " for c in text[:_ANSWER_CHARACTERS])
    words = plain.strip(" ,.'&-").split()
    while words:
        prompt = in_form(form, " ".join(words).rstrip(" ,.'&-"))
        if tokenizer is None or tokenizer.encode(prompt)[1] is None:
            return prompt
        words.pop()
    return ""


def _answers(
    prompter: Prompter, user_prompts: Sequence[str], threads: int, seconds: float
) -> Generator[Line, None, None]:
    """The worker's answers; a Refusal is the last line, where it fails or takes too long."""
    if not user_prompts:
        return
    task = Task(
        base=str(prompter.base),
        adapter=str(prompter.adapter or ""),
        frames=tuple(FRAME.format(user_prompt) for user_prompt in user_prompts),
        grammar=prompter.grammar,
        max_tokens=MAX_TOKENS,
        threads=threads,
    )
    try:
        task_json = msgspec.json.encode(task)
    except UnicodeEncodeError:
        yield Refusal(f"{prompter.base} has a name that isn't UTF-8: rename its folder")
        return
    try:
        pipe = subprocess.PIPE
        worker = subprocess.Popen(COMMAND, stdin=pipe, stdout=pipe, stderr=pipe)
    except OSError as exc:  # no memory for another process, for one
        yield Refusal(f"it can't be started: {exc.strerror or exc}")
        return
    try:
        talk = _Talk(worker, task_json, len(user_prompts))
        for number in range(len(user_prompts)):
            start = seconds if number == 0 else 0.0
            try:
                raw = talk.lines.get(timeout=seconds + start)
            except queue.Empty:
                yield Refusal(f"it took more than {seconds:g} s")
                return
            if raw is None:
                yield Refusal(talk.ending(seconds))
                return
            try:
                yield msgspec.json.decode(raw, type=Line)
            except (msgspec.MsgspecError, RecursionError):
                yield Refusal(f"it answered in another form: {raw[:80]!r}")
                return
    finally:
        worker.kill()
        worker.wait()


class _Talk:
    """Writes to a worker and reads from it, in threads: a pipe has no time limit, and a worker
    may read nothing, or print without end."""

    def __init__(self, worker: subprocess.Popen[bytes], task_json: bytes, answers: int) -> None:
        self.lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        """At most `answers` lines as they come, then None."""
        self._worker, self._noise = worker, b""
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        threading.Thread(target=self._write, args=(task_json,), daemon=True).start()
        threading.Thread(target=self._read, args=(answers,), daemon=True).start()

    def ending(self, seconds: float) -> str:
        """How the worker ended, and its last words."""
        try:
            status = f"status {self._worker.wait(seconds)}"
        except subprocess.TimeoutExpired:
            return "it closed its output and went on"
        self._listener.join(seconds)
        tail = " ".join(self._noise.decode(errors="replace").split())[-200:]
        return f"it ended with {status} ({tail or 'silent'})"

    def _write(self, task_json: bytes) -> None:
        assert self._worker.stdin
        with contextlib.suppress(OSError), self._worker.stdin as pipe:  # its last words say why
            pipe.write(task_json)

    def _read(self, answers: int) -> None:
        assert self._worker.stdout
        for _ in range(answers):
            line = self._worker.stdout.readline(_LINE_BYTES)
            if not line:
                break
            self.lines.put(line)
        self.lines.put(None)

    def _listen(self) -> None:
        assert self._worker.stderr
        while part := os.read(self._worker.stderr.fileno(), _NOISE_BYTES):
            self._noise = (self._noise + part)[-_NOISE_BYTES:]


def read_prompter(folder: Path) -> PrompterSpec:
    """The spec of an exported prompter. Raises InputError when the folder holds none."""
    if not (folder / SPEC).is_file():
        raise InputError(f"{folder} holds no prompter: edgesd prompter export makes one")
    text = read_text(folder / SPEC)
    try:
        spec = decode_json(text, PrompterSpec)
    except InputError as exc:
        raise InputError(f"{folder / SPEC} isn't valid ({exc}): export again") from exc
    check_form(spec.form)
    for name in spec.files:
        if not is_file_name(name):
            raise InputError(
                f"{folder / SPEC} names {name!r}, which isn't a file of its folder: export again"
            )
        if not (folder / name).is_file():
            raise InputError(f"{folder} has no {name}: export again")
        if (folder / name).resolve().parent != folder.resolve():
            raise InputError(
                f"{folder / name} is a link out of its folder, and would be copied into bundles: "
                "put the file itself there"
            )
    return spec


def prompter_in(folder: Path) -> Prompter:
    """The exported prompter in `folder`. Raises InputError when it holds none."""
    spec = read_prompter(folder)
    adapter = None if spec.adapter is None else folder / spec.adapter
    grammar = GRAMMAR if spec.grammar is None else read_text(folder / spec.grammar)
    return Prompter(folder / spec.base, adapter, spec, grammar)


def prompter_of(bundle: Bundle) -> Prompter:
    """The prompter of a bundle, its files verified.

    llama.cpp can't read within a one-file bundle: from there its files are copied once, into the
    user's cache. Raises BundleError when the bundle has none, was altered, or isn't trusted here.
    """
    check_trusted(bundle)
    spec = bundle.manifest.prompter
    if spec is None:
        raise BundleError(
            f"{bundle.path} includes no prompter: build it with --prompter, or leave --enhance out"
        )
    check_form(spec.form)
    grammar = GRAMMAR
    if spec.grammar is not None:
        grammar = decode_text(bundle.read(spec.grammar), spec.grammar)
    opened: list[OpenFile] = []
    base = _file_of(bundle, spec.base, opened)
    adapter = None if spec.adapter is None else _file_of(bundle, spec.adapter, opened)
    return Prompter(base, adapter, spec, grammar, tuple(opened))


def _file_of(bundle: Bundle, name: str, opened: list[OpenFile]) -> Path:
    entry = bundle.manifest.files[name]
    if bundle.in_one_file:
        path = user_cache() / "prompter" / f"{entry.sha256[:32]}.gguf"
        if not path.exists() or sha256_file(path) != entry.sha256:
            with atomic_path(path) as temporary, temporary.open("wb") as file:
                file.writelines(bundle.verified_chunks(name))
        return path
    found = bundle.verified_location(name).file
    opened.append(found)
    return Path(f"/proc/{os.getpid()}/fd/{found.fileno()}")  # of this process, for its child
