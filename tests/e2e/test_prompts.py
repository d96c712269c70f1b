"""Long prompts, weights and textual inversions make the images that diffusers makes of the same
embeddings, which are computed here with transformers alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from safetensors.torch import save_file  # noqa: E402

from edgesd.export.own_pipeline import check_own_pipeline  # noqa: E402
from edgesd.export.pipeline import export_spec  # noqa: E402
from edgesd.export.source import resolve_source  # noqa: E402
from edgesd.recipes.sources import open_model  # noqa: E402
from edgesd.runtime.pipeline import Pipeline  # noqa: E402
from edgesd.runtime.requests import Request  # noqa: E402
from edgesd.runtime.tokenizer import tokenizer_of  # noqa: E402
from tests.tiny_pipelines import WIDTH, on_torch, tiny, write_tiny  # noqa: E402

STEPS, GUIDANCE, SEED = 3, 25.0, 5
OPTIONS = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "width": 40, "height": 24}
LONG = "a red cat, the blue sea " * 20 + "star"
"""Of more tokens than one chunk has."""

Weighted = Sequence[tuple[str, float]]
"""Words of one chunk, and their weights."""


@pytest.fixture(scope="module", params=["sd", "sd2-v", "sdxl"])
def pipelines(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Pipeline]:
    """diffusers' pipeline and edgesd's."""
    folder = tmp_path_factory.mktemp("tiny")
    source = resolve_source(write_tiny(request.param, folder / request.param))
    return tiny(request.param), on_torch(source, export_spec(source), folder / "bundle")


def encoders(theirs: Any) -> list[tuple[Any, Any]]:
    """Tokenizers and text encoders."""
    found = [(theirs.tokenizer, theirs.text_encoder)]
    if hasattr(theirs, "text_encoder_2"):
        found.append((theirs.tokenizer_2, theirs.text_encoder_2))
    return found


def embedded(theirs: Any, chunks: Sequence[Weighted]) -> tuple[Any, Any]:
    """Embeddings [1, 77 x chunks, C], and of the whole text that of the first chunk or None."""
    several = len(encoders(theirs)) > 1
    hidden, pooled = [], None
    for tokenizer, encoder in encoders(theirs):
        states = []
        for chunk in chunks:
            ids, weights = [tokenizer.bos_token_id], [1.0]
            for words, weight in chunk:
                more = tokenizer(words, add_special_tokens=False).input_ids
                ids, weights = [*ids, *more], [*weights, *[weight] * len(more)]
            ids += [tokenizer.eos_token_id] + [tokenizer.pad_token_id] * (76 - len(ids))
            weights += [1.0] * (77 - len(weights))
            with torch.no_grad():
                out = encoder(torch.tensor([ids]), output_hidden_states=True)
            state = out.hidden_states[-2] if several else out.last_hidden_state
            if set(weights) != {1.0}:
                changed = state * torch.tensor(weights)[None, :, None]
                state = changed * (state.mean() / changed.mean())
            states.append(state)
            if pooled is None and "text_embeds" in out:
                pooled = out.text_embeds
        hidden.append(torch.cat(states, 1))
    return torch.cat(hidden, -1), pooled


def wanted(theirs: Any, positive: Sequence[Weighted], negative: Sequence[Weighted] | None) -> Any:
    """diffusers' image. negative: None for zeros."""
    count = max(len(positive), len(negative or ()))

    def filled(chunks: Sequence[Weighted]) -> list[Weighted]:
        return [*chunks, *[[]] * (count - len(chunks))]

    prompt, pooled = embedded(theirs, filled(positive))
    other, other_pooled = embedded(theirs, filled(negative or ()))
    if negative is None:
        other, other_pooled = torch.zeros_like(other), torch.zeros_like(other_pooled)
    given = {"prompt_embeds": prompt, "negative_prompt_embeds": other}
    if pooled is not None:
        given |= {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": other_pooled}
    return theirs(**given, **OPTIONS, generator=torch.Generator().manual_seed(SEED)).images[0]


def difference(ours: Pipeline, image: Any, prompt: str, **options: Any) -> int:
    """The largest difference of edgesd's image, 0 to 255."""
    request = Request(
        prompt, SEED, num_inference_steps=STEPS, guidance_scale=GUIDANCE, width=40, height=24,
        **options,
    )  # fmt: skip
    (found,) = ours.generate([request])
    return int(np.abs(np.int32(found) - np.int32(image)).max())


def cut(theirs: Any, text: str) -> list[Weighted]:
    """A plain text in chunks of 75 tokens, each of which is the text of its tokens."""
    tokenizer = theirs.tokenizer
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert 75 < len(ids) <= 150
    parts = [tokenizer.decode(ids[first : first + 75]) for first in range(0, len(ids), 75)]
    for part, first in zip(parts, range(0, len(ids), 75), strict=True):
        assert tokenizer(part, add_special_tokens=False).input_ids == ids[first : first + 75]
    return [[(part, 1.0)] for part in parts]


def test_a_long_prompt_is_encoded_in_chunks(pipelines: tuple[Any, Pipeline]) -> None:
    theirs, ours = pipelines
    chunks = cut(theirs, LONG)
    image = wanted(theirs, chunks, [[("a dog", 1.0)]])
    assert difference(ours, image, LONG, negative_prompt="a dog") <= 1
    first = wanted(theirs, chunks[:1], [[("a dog", 1.0)]])
    assert difference(ours, first, LONG, negative_prompt="a dog") > 5
    turned = wanted(theirs, [[("a dog", 1.0)]], chunks)
    assert difference(ours, turned, "a dog", negative_prompt=LONG) <= 1


def test_zeros_are_as_long_as_a_long_prompt(pipelines: tuple[Any, Pipeline]) -> None:
    theirs, ours = pipelines
    zeros = ours.spec.wiring.zero_negative
    image = wanted(theirs, cut(theirs, LONG), None if zeros else [])
    assert difference(ours, image, LONG) <= 1


def test_weights_and_breaks(pipelines: tuple[Any, Pipeline]) -> None:
    theirs, ours = pipelines
    chunks = [
        [("a", 1.0), ("red", 5.0), ("cat", 1.1), ("on", 1.0)],
        [("the", 1.0), ("sea", 1 / 1.1), ("star", 0.5)],
    ]
    image = wanted(theirs, chunks, [[("dog", 1.3)]])
    prompt = "a (red:5) (cat) on BREAK the [sea] (star:0.5)"
    asked = {"negative_prompt": "(dog:1.3)", "syntax": "a1111"}
    assert difference(ours, image, prompt, **asked) <= 1
    assert difference(ours, image, prompt.replace("red:5", "red:2"), **asked) > 1
    assert difference(ours, image, prompt.replace("BREAK", ""), **asked) > 1


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_a_textual_inversion_makes_the_image_of_diffusers(name: str, tmp_path: Path) -> None:
    theirs, folder = tiny(name), write_tiny(name, tmp_path / name)
    random = torch.Generator().manual_seed(0)
    vectors = {key: torch.randn(3, WIDTH, generator=random) for key in ("clip_l", "clip_g")}
    if name == "sd":
        del vectors["clip_g"]
        theirs.load_textual_inversion(vectors["clip_l"], token="<new>")
        save_file({"emb_params": vectors["clip_l"]}, tmp_path / "new.safetensors")
    else:
        for (tokenizer, encoder), key in zip(encoders(theirs), vectors, strict=True):
            theirs.load_textual_inversion(
                vectors[key], token="<new>", tokenizer=tokenizer, text_encoder=encoder
            )
        save_file(vectors, tmp_path / "new.safetensors")
    source = open_model(str(folder), embeddings=[f"{tmp_path}/new.safetensors:<new>"])
    prompt = "a red <new> cat"
    image = theirs(prompt, **OPTIONS, generator=torch.Generator().manual_seed(SEED)).images[0]
    with on_torch(source, export_spec(source), tmp_path / "bundle") as ours:
        assert difference(ours, image, prompt) <= 1
        assert difference(ours, image, "a red cat") > 5


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_fixed_shapes_take_their_number_of_chunks(name: str, tmp_path: Path) -> None:
    theirs, source = tiny(name), resolve_source(write_tiny(name, tmp_path / name))
    export = export_spec(source, (40, 24), batch=2, chunks=2)
    with on_torch(source, export, tmp_path / "bundle") as ours:
        folders = export.pipeline.wiring.tokenizers
        check_own_pipeline(export, {each: tokenizer_of(ours.bundle, each) for each in folders})
        negative: list[Weighted] = [[("a dog", 1.0)], []]
        short = wanted(theirs, [[("a red cat", 1.0)], []], negative)
        assert difference(ours, short, "a red cat", negative_prompt="a dog") <= 1
        long = wanted(theirs, cut(theirs, LONG), negative)
        assert difference(ours, long, LONG, negative_prompt="a dog") <= 1
        assert not ours.truncations
        difference(ours, long, LONG + LONG)
        assert ours.truncations[LONG + LONG].kept_tokens == 150
