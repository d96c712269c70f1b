"""CLIP's text encoder and its tokenizer.

Graph: input_ids int64 [batch, tokens] -> encoder_hidden_states [batch, tokens, C], the last hidden
state after the final norm, or an earlier one, as it is (and text_embeds [batch, P], the projected
state of the end of the text); or text_embeds [batch, C] alone, that state as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from edgesd.errors import InputError
from edgesd.export.families import Component
from edgesd.export.families.checkpoint import Checkpoint, Embedding
from edgesd.export.families.parts.shapes import dims, float_tensor, token_ids
from edgesd.export.families.parts.textual_inversion import add_tokens
from edgesd.export.families.parts.weights import load_network
from edgesd.spec.pipeline import ComponentSpec, ShapeSpec, TensorSpec

HIDDEN, POOLED = "encoder_hidden_states", "text_embeds"
"""Outputs."""

_OLD_EOS = 2
"""Of configs that were written before transformers read it."""


class TextEncoder(nn.Module):
    """input_ids [batch, tokens] -> hidden state [batch, tokens, C] behind the last layer but
    `dropped`, which are dropped; after the final norm if `normed`."""

    def __init__(self, net: Any, dropped: int = 0, normed: bool = True) -> None:
        super().__init__()
        self.net = net
        if dropped:
            net.encoder.layers = net.encoder.layers[:-dropped]
        if not normed:
            net.final_layer_norm = nn.Identity()

    def forward(self, input_ids: Tensor) -> Tensor:
        out: Tensor = self.net(input_ids=input_ids).last_hidden_state
        return out


class ProjectedTextEncoder(nn.Module):
    """input_ids [batch, tokens] -> hidden state [batch, tokens, C] behind the last layer but
    `behind`, as it is, and the projected state of the end of the text [batch, P], behind all.

    The end is where the token of the highest id is first, or that of the config's eos_token_id,
    unless that is 2, which stands for the former (transformers' CLIPTextModel.forward). It is found
    without the casts and gathers of transformers' own code, which compilers in fp16 can't take.
    """

    def __init__(self, net: Any, behind: int) -> None:
        super().__init__()
        self.net = net
        self.place = -1 - behind
        self.eos = _eos_of(net)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        out = self.net(input_ids=input_ids, output_hidden_states=True)
        state = _at_end(input_ids, out.last_hidden_state, self.eos)
        return out.hidden_states[self.place], self.net.text_projection(state)


class PooledTextEncoder(nn.Module):
    """input_ids [batch, tokens] -> the state of the end of the text [batch, C], after the final
    norm. The end is where ProjectedTextEncoder has it."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net
        self.eos = _eos_of(net)

    def forward(self, input_ids: Tensor) -> Tensor:
        return _at_end(input_ids, self.net(input_ids=input_ids).last_hidden_state, self.eos)


def _eos_of(net: Any) -> int | None:
    """The token that ends a text; None: that of the highest id."""
    found: int = net.config.eos_token_id
    return None if found == _OLD_EOS else found


def _at_end(input_ids: Tensor, states: Tensor, eos: int | None) -> Tensor:
    """The state [batch, C] of the end of the text among those of all tokens [batch, tokens, C]."""
    places = torch.arange(input_ids.shape[1], device=input_ids.device)
    end = input_ids.amax(1, keepdim=True) if eos is None else eos
    first = torch.where(input_ids == end, places, len(places)).amin(1, keepdim=True)
    return torch.where((places == first)[..., None], states, 0.0).sum(1)


def pooled_text_encoder(
    source: Checkpoint, name: str, config: Mapping[str, Any], tokens: int, shape: ShapeSpec
) -> Component:
    """The component `name`, in a folder of that name, which gives the state of the end of the text
    alone. config: transformers' of the encoder."""

    def load(weights: bool = True) -> nn.Module:
        net = load_network(source, name, transformers.CLIPTextModel, weights)
        return PooledTextEncoder(net)

    pooled = float_tensor(POOLED, dims(shape, 1)[0], config["hidden_size"])
    return _component(name, config, tokens, shape, (pooled,), load)


def _component(
    name: str,
    config: Mapping[str, Any],
    tokens: int,
    shape: ShapeSpec,
    outputs: tuple[TensorSpec, ...],
    load: Callable[..., nn.Module],
) -> Component:
    ids = TensorSpec("input_ids", "int64", (dims(shape, 1)[0], tokens))
    return Component(
        ComponentSpec(name, (ids,), outputs),
        load,
        sizes=({"batch": 1}, {"batch": 2}) if shape.dynamic else ({}, {}),
        examples={"input_ids": token_ids(config["vocab_size"], _end_of_text(config))},
    )


def text_encoder(
    source: Checkpoint,
    name: str,
    config: Mapping[str, Any],
    tokens: int,
    shape: ShapeSpec,
    behind: int = 0,
    normed: bool = True,
    pooled: bool = False,
) -> Component:
    """The component `name`, in a folder of that name. config: transformers' of the encoder.

    behind: layers behind the hidden state that is read, which are dropped. normed: whether it is
    read after the final norm. pooled: with the text's projected embedding, for which all layers
    stay, and the hidden state is read as it is. Raises InputError when there are no such layers.
    """
    if not 0 <= behind < config["num_hidden_layers"]:
        raise InputError(
            f"{source.name}: {name} has {config['num_hidden_layers']} layers, and {behind} can't "
            "be left out: give a smaller --clip-skip"
        )

    def load(weights: bool = True) -> nn.Module:
        if pooled:
            cls = transformers.CLIPTextModelWithProjection
            return ProjectedTextEncoder(load_network(source, name, cls, weights), behind)
        net = load_network(source, name, transformers.CLIPTextModel, weights)
        return TextEncoder(net, behind, normed)

    batch = dims(shape, 1)[0]
    outputs = [float_tensor(HIDDEN, batch, tokens, config["hidden_size"])]
    if pooled:
        outputs.append(float_tensor(POOLED, batch, config["projection_dim"]))
    return _component(name, config, tokens, shape, tuple(outputs), load)


def _end_of_text(config: Mapping[str, Any]) -> int:
    """The token that ends a text, as far as the config tells."""
    last, found = config["vocab_size"] - 1, config["eos_token_id"]
    return found if isinstance(found, int) and _OLD_EOS < found < last else last


def token_count(folder: Path, tokenizer: Any, config: Mapping[str, Any]) -> int:
    """Tokens of a prompt with its padding: as many as diffusers' tokenizer gives.

    folder: of the tokenizer. config: of the encoder that takes them. Raises InputError where the
    two don't fit each other.
    """
    tokens, most = tokenizer.model_max_length, config["max_position_embeddings"]
    if not 2 <= tokens <= most:
        raise InputError(
            f"{folder}/tokenizer_config.json: model_max_length is missing or isn't 2 to {most}, as "
            f"many tokens as the text encoder takes: set it to {most}"
        )
    if (last := max(tokenizer.get_vocab().values())) >= config["vocab_size"]:
        raise InputError(
            f"{folder} gives token ids up to {last}, and the text encoder has embeddings for "
            f"{config['vocab_size']} only: save the text encoder that these tokens were added to"
        )
    return int(tokens)


def load_tokenizer(folder: Path, embeddings: Sequence[Embedding] = ()) -> Any:
    """The tokenizer as diffusers' pipelines use it: the one that knows tokenizer.json, which
    transformers 4 has beside one in Python; with the tokens of textual inversions. Raises
    InputError where its files are missing, which transformers takes for a tokenizer without words,
    and for a token that it has already."""
    names = ("vocab.json", "merges.txt"), ("tokenizer.json",)
    if not any(all((folder / name).is_file() for name in files) for files in names):
        raise InputError(
            f"{folder} lacks the tokenizer's files, tokenizer.json or vocab.json and merges.txt: "
            "download the model again"
        )
    cls: Any = transformers.CLIPTokenizerFast  # type: ignore[attr-defined]
    tokenizer = cls.from_pretrained(str(folder), local_files_only=True)
    add_tokens(tokenizer, embeddings)
    return tokenizer
