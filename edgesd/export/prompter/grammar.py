"""A GBNF grammar that has the given prompts alone: a tree of their words."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

Tree: TypeAlias = "dict[str, Tree]"

_END = ""
"""A word that ends a prompt."""


def closed_grammar(prompts: Iterable[str]) -> str:
    """GBNF whose lines are a space, one of `prompts` (as `clean_prompt` makes them), a line break.

    Prompts that begin alike share their beginning: the fewer ways to go on, the faster it is.
    """
    tree: Tree = {}
    for prompt in prompts:
        node = tree
        for word in prompt.split(" "):
            node = node.setdefault(word, {})
        node[_END] = {}
    return f"root ::= {_alternatives(tree)}\n"


def _alternatives(tree: Tree) -> str:
    """What may follow: each word with what follows it, or the end."""
    parts = [
        '"\\n"' if word == _END else f'" {word}" {_alternatives(rest)}'
        for word, rest in sorted(tree.items())
    ]
    return parts[0] if len(parts) == 1 else f"({' | '.join(parts)})"
