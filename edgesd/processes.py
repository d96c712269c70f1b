"""How edgesd starts other programs: no program of the current folder is run by accident.

`python -m` puts the current folder first among the places where modules are looked for, and an
empty or relative entry of PATH does so for programs: a downloaded folder would run its code.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
"""Where this edgesd lies: its processes take the same, whether it is installed or not."""

# What `python -P -m` does, which Python 3.10 doesn't have. PYTHONPATH keeps its meaning.
_RUN_MODULE = (
    "import sys; root, module = sys.argv[1:3]; del sys.argv[1:3]; "
    "sys.path[:1] == [''] and sys.path.pop(0); "
    "root in sys.path or sys.path.insert(0, root); "
    "import runpy; runpy.run_module(module, run_name='__main__', alter_sys=True)"
)


def module_command(module: str, *arguments: str) -> list[str]:
    """The command that runs `module` in another process of this Python, with `arguments`.

    Modules are looked for as in this process, this very edgesd among them, but not in the current
    folder.
    """
    return [sys.executable, "-c", _RUN_MODULE, str(_ROOT), module, *arguments]


def find_program(name: str) -> str | None:
    """Where the program `name` is, by the absolute folders of PATH; None where there is none."""
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    return shutil.which(name, path=os.pathsep.join(filter(os.path.isabs, folders)))
