"""T5's text encoder and its tokenizer.

Graph: input_ids int64 [batch, tokens] -> encoder_hidden_states [batch, tokens, C], the last hidden
state after the final norm. Padding is seen as any token: diffusers' FluxPipeline gives no mask. So
the number of tokens is part of the image, and the graph's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from torch import Tensor, nn
from transformers.models.t5.modeling_t5 import T5Attention

from edgesd.errors import InputError
from edgesd.export.families import Component, Example
from edgesd.export.families.checkpoint import Checkpoint
from edgesd.export.families.parts.shapes import dims, float_tensor
from edgesd.export.families.parts.weights import load_network
from edgesd.spec.build import LEAST_TOKENS, MOST_TOKENS
from edgesd.spec.pipeline import ComponentSpec, ShapeSpec, TensorSpec

HIDDEN = "encoder_hidden_states"
"""The output."""

TOKENIZERS = ("T5Tokenizer", "T5TokenizerFast")
"""Classes in model_index.json: of one tokenizer, which transformers 4 had in Python, too."""


class T5Encoder(transformers.T5EncoderModel):  # type: ignore[no-untyped-call]
    """transformers' encoder, whose weights are all loaded in the type of their files, and so stay
    mapped (export/mapped.py). In fp16, transformers makes some fp32, as what they compute exceeds
    fp16; here all compute in fp32."""

    def post_init(self) -> None:
        """See transformers' PreTrainedModel."""
        super().post_init()  # type: ignore[no-untyped-call]
        self._keep_in_fp32_modules = []


class TextEncoder(nn.Module):
    """input_ids [batch, tokens] -> last hidden state [batch, tokens, C].

    Each layer with a table of biases gets it as `biases` [heads, rows] in fp32, and `buckets`
    [tokens, tokens], the row for each query and key: see export/attention.py. So the table is no
    layer whose weights are quantized, and no logarithm is left in the graph.
    """

    def __init__(self, net: T5Encoder, tokens: int, device: str = "cpu") -> None:
        """device: meta for a network without values."""
        super().__init__()
        self.net = net
        bucket: Any = T5Attention._relative_position_bucket
        places, config = torch.arange(tokens), net.config
        rows = config.relative_attention_num_buckets
        for module in net.modules():
            if isinstance(module, T5Attention) and module.has_relative_attention_bias:
                buckets = bucket(
                    places - places[:, None],
                    num_buckets=rows,
                    max_distance=config.relative_attention_max_distance,
                )
                # As a module, whose weight is there while it runs (export/mapped.py).
                biases = module.relative_attention_bias(torch.arange(rows, device=device)).T
                module.register_buffer("biases", biases.contiguous(), persistent=False)
                module.register_buffer("buckets", buckets.to(device), persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        out: Tensor = self.net(input_ids=input_ids).last_hidden_state
        return out


def text_encoder(
    source: Checkpoint, name: str, config: Mapping[str, Any], tokens: int, shape: ShapeSpec
) -> Component:
    """The component `name`, in a folder of that name. config: transformers' of the encoder.
    tokens: of a prompt, with its padding. Raises InputError for distances that fit no bucket."""
    exact = config["relative_attention_num_buckets"] // 4  # to each side, a distance each
    if not 0 < exact < config["relative_attention_max_distance"]:
        raise InputError(
            f"{source.folder(name)}/config.json: relative_attention_max_distance is "
            f"{config['relative_attention_max_distance']}: expected more than a quarter of "
            f"relative_attention_num_buckets, {config['relative_attention_num_buckets']}"
        )

    def load(weights: bool = True) -> nn.Module:
        net = load_network(source, name, T5Encoder, weights)
        return TextEncoder(net, tokens, "cpu" if weights else "meta")

    batch = dims(shape, 1)[0]
    return Component(
        ComponentSpec(
            name,
            (TensorSpec("input_ids", "int64", (batch, tokens)),),
            (float_tensor(HIDDEN, batch, tokens, config["d_model"]),),
        ),
        load,
        sizes=({"batch": 1}, {"batch": 2}) if shape.dynamic else ({}, {}),
        examples={"input_ids": _ids(config)},
    )


def _ids(config: Mapping[str, Any]) -> Example:
    """Ids [batch, tokens] of a prompt that takes half of them, with its end and padding, as far as
    the config tells."""
    last = config["vocab_size"] - 1
    pad, end = (
        found if isinstance(found := config[name], int) and 0 <= found <= last else last
        for name in ("pad_token_id", "eos_token_id")
    )

    def values(rng: np.random.Generator, shape: Sequence[int]) -> npt.NDArray[Any]:
        ids = rng.integers(0, config["vocab_size"], shape)
        ids[:, shape[1] // 2 :] = pad
        ids[:, shape[1] // 2] = end
        return ids.astype(np.int64)

    return values


def token_count(
    source: Checkpoint, folder: str, tokenizer: Any, config: Mapping[str, Any], usual: int
) -> int:
    """Tokens of a prompt with its padding: as many as the user or edgesd.json asks for; otherwise
    `usual` of its family, or fewer where the tokenizer says so.

    folder: of the tokenizer. config: of the encoder that takes them. Raises InputError for a number
    that diffusers refuses, and where tokenizer and encoder don't fit each other.
    """
    if (last := max(tokenizer.get_vocab().values())) >= config["vocab_size"]:
        raise InputError(
            f"{source.folder(folder)} gives token ids up to {last}, and T5 has embeddings for "
            f"{config['vocab_size']} only: do both belong to one model?"
        )
    usual = min(usual, int(tokenizer.model_max_length))
    tokens = int(source.hints().get("max_tokens", usual))
    if not LEAST_TOKENS <= tokens <= MOST_TOKENS:
        raise InputError(
            f"{source.name}: T5 takes {LEAST_TOKENS} to {MOST_TOKENS} tokens of a prompt, not "
            f"{tokens}: give --max-tokens, or correct max_tokens in edgesd.json, or "
            "model_max_length of its tokenizer"
        )
    return tokens


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer as diffusers' pipelines use it. Raises InputError where its file is missing,
    which transformers takes for a tokenizer without words."""
    if not (folder / "tokenizer.json").is_file():
        raise InputError(
            f"{folder} lacks tokenizer.json: download the model again; where it has spiece.model "
            "alone, transformers makes the other of it, with the package sentencepiece: "
            f"T5Tokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
        )
    cls: Any = transformers.T5TokenizerFast  # type: ignore[attr-defined]
    return cls.from_pretrained(str(folder), local_files_only=True)
