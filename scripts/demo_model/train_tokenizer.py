"""Train the tokenizer on the captions: needed only for a model from nothing.

    python -m scripts.demo_model.train_tokenizer --data DATA --out PIPELINE/tokenizer

The token ids change with the captions, so a text encoder fits only the tokenizer it was trained
with.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import CLIPTokenizer

from . import dataset
from .captions import captions
from .dataset import Emoji

VOCABULARY = 4096
START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
# Splits text as CLIP does: words, single digits, runs of other signs.
SPLIT = r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def corpus(emoji: list[Emoji]) -> list[str]:
    """Names weigh more than keywords."""
    lines = [line for entry in emoji for line in captions(entry.name, entry.style)]
    return lines + [tag for entry in emoji for tag in entry.tags]


def train_merges(lines: list[str]) -> list[tuple[str, str]]:
    """Merge rules of a byte-level BPE, most useful first."""
    tokenizer = Tokenizer(BPE(end_of_word_suffix=WORD_END))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        end_of_word_suffix=WORD_END,
        show_progress=False,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(lines, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [(first, second) for first, second in merges]


def vocabulary_of(merges: list[tuple[str, str]]) -> dict[str, int]:
    """Token ids in CLIP's order: bytes, bytes at a word's end, merges, start, end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = alphabet + [letter + WORD_END for letter in alphabet]
    words += [first + second for first, second in merges] + [START, END]
    return {word: index for index, word in enumerate(dict.fromkeys(words))}


def train_tokenizer(emoji: list[Emoji]) -> CLIPTokenizer:
    """A tokenizer of at most ``VOCABULARY`` entries."""
    room = VOCABULARY - 2 * len(pre_tokenizers.ByteLevel.alphabet()) - 2
    merges = train_merges(corpus(emoji))[:room]
    return CLIPTokenizer(
        vocab=vocabulary_of(merges),
        merges=merges,  # type: ignore[arg-type]  # pairs are what it takes
        model_max_length=77,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="folder made by prepare_data")
    parser.add_argument("--out", type=Path, required=True, help="tokenizer folder to write")
    arguments = parser.parse_args()
    _, emoji = dataset.load(arguments.data)
    train_tokenizer(emoji).save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
