"""Writes docs/cli.md from --help. `--check` only says whether it is up to date."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from edgesd.cli import cli

PAGE = Path(__file__).resolve().parent.parent / "docs" / "cli.md"


def render() -> str:
    """The command reference as Markdown."""
    parts = ["# Command reference", "", "Made from `--help` by `make docs`.", ""]
    root = click.Context(cli, info_name="edgesd", terminal_width=100)
    parts += ["## edgesd", "", "```text", cli.get_help(root), "```", ""]
    for name in cli.list_commands(root):
        command = cli.get_command(root, name)
        assert command is not None
        context = click.Context(command, parent=root, info_name=name, terminal_width=100)
        parts += [f"## edgesd {name}", "", "```text", command.get_help(context), "```", ""]
    return "\n".join(parts)


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
