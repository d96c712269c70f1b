"""The process that answers short prompts: python -m edgesd.runtime.prompter_worker, a Task on its
input.

Prints JSON lines (llama.Line), one per short prompt.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path

import msgspec

from edgesd.errors import EdgesdError, InputError
from edgesd.runtime.llama import Answer, Refusal, Task, open_llama
from edgesd.runtime.memory import peak_bytes


def main() -> int:
    """Answer; exit status 0, or 1 after a refusal."""
    lines = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # libraries may print
    with contextlib.suppress(OSError):  # if a model takes all memory, this process is to go
        Path("/proc/self/oom_score_adj").write_text("1000")
    task = msgspec.json.decode(sys.stdin.buffer.read(), type=Task)
    adapter = Path(task.adapter) if task.adapter else None
    try:
        llama = open_llama(Path(task.base), adapter, task.threads)
        for frame in task.frames:
            start = time.perf_counter()
            text, problem = "", None
            try:
                text = llama.complete(frame, task.grammar, task.max_tokens)
            except InputError as exc:  # of this short prompt alone
                problem = str(exc)
            answer = Answer(text, time.perf_counter() - start, problem, peak_bytes())
            lines.write(msgspec.json.encode(answer) + b"\n")
        llama.close()
    except EdgesdError as exc:
        lines.write(msgspec.json.encode(Refusal(str(exc))) + b"\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
