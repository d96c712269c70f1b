"""Writes docs/cli.md from --help. `--check` only says whether it is up to date."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from edgesd.cli import cli
from edgesd.errors import EXIT_STATUSES

PAGE = Path(__file__).resolve().parent.parent / "docs" / "cli.md"


def render() -> str:
    """The command reference as Markdown."""
    parts = ["# Command reference", "", "Made from `--help` by `make docs`.", ""]
    parts += ["| exit status | meaning |", "|---|---|"]
    parts += [f"| {status} | {meaning} |" for status, meaning in EXIT_STATUSES.items()]
    parts += ["", "An error is one line on standard error; `--debug` shows the traceback too.", ""]
    return "\n".join(parts + _pages(cli, "edgesd", None))


def _pages(command: click.Command, name: str, parent: click.Context | None) -> list[str]:
    """A command's help, and that of all commands below it."""
    settings = {**command.context_settings, "terminal_width": 100}
    context = click.Context(command, parent=parent, info_name=name, **settings)
    parts = [f"## {context.command_path}", "", "```text", command.get_help(context), "```", ""]
    if isinstance(command, click.Group):
        for below in command.list_commands(context):
            found = command.get_command(context, below)
            assert found is not None
            if found.hidden:
                continue
            parts += _pages(found, below, context)
    return parts


def main() -> int:
    """Write the page, or with --check compare it."""
    text = render()
    if "--check" in sys.argv[1:]:
        current = PAGE.read_text() if PAGE.exists() else ""
        if current != text:
            print("docs/cli.md is out of date: run `make docs`", file=sys.stderr)
            return 1
        return 0
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
