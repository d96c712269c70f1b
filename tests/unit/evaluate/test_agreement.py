"""Judges of images and texts: the small one in the checkout, and CLIP on random weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgesd.errors import InputError
from edgesd.evaluate.agreement import JUDGE, open_agreement, word_ids, words_of
from edgesd.evaluate.prompter import agreed
from edgesd.recipes import demo_judge, demo_model

pytestmark = pytest.mark.integration

FOLDER = demo_judge()
assert FOLDER


def disc(colour: tuple[int, int, int], size: int = 128) -> Image.Image:
    from PIL import ImageDraw

    image = Image.new("RGB", (size, size), "white")
    ImageDraw.Draw(image).ellipse((16, 16, size - 16, size - 16), fill=colour)
    return image


def test_words() -> None:
    assert words_of("A T-shirt, o\u2019clock & 1st (red_cat)") == [
        *("a", "t-shirt", "o'clock", "1st", "red", "cat")
    ]
    ids = word_ids(["red cat", "no such", ""], ["cat", "red"])
    assert ids[:, :3].tolist() == [[2, 1, 0], [0, 0, 0], [0, 0, 0]]


def test_the_small_judge_knows_colours_and_shapes() -> None:
    judge = open_agreement(FOLDER)
    assert not judge.is_clip and "not CLIP" in judge.name
    discs = {"blue circle": (30, 100, 220), "red circle": (220, 30, 50)}
    images = judge.images([disc(colour) for colour in discs.values()])
    texts = judge.texts([*discs, "penguin", "castle"])
    np.testing.assert_allclose(np.linalg.norm(images, axis=1), 1, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(texts, axis=1), 1, atol=1e-4)
    assert (images @ texts.T).argmax(axis=1).tolist() == [0, 1]
    many = judge.images([disc((30, 100, 220))] * 300)
    np.testing.assert_allclose(many, np.repeat(images[:1], 300, axis=0), atol=1e-4)


def test_images_are_held_against_texts() -> None:
    judge = open_agreement(FOLDER)
    blue, red = disc((30, 100, 220)), disc((220, 30, 50))
    wanted = ["blue circle", "red circle"]
    generated = {"user_prompts": [red, blue], "prompts": [blue, red], "wanted": [blue, red]}
    found = agreed(judge, generated, wanted)
    assert found.found_user_prompt.mean == 0.0 and found.found_prompt.mean == 1.0
    assert found.gain.low > 0 and found.score_prompt == found.score_wanted
    assert found.chance == pytest.approx(found.score_user_prompt.mean, abs=0.01)


def test_what_is_no_judge(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no judge"):
        open_agreement(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="can't be read as a CLIP model"):
        open_agreement(tmp_path)
    shutil.copy(FOLDER / JUDGE, tmp_path)
    with pytest.raises(InputError, match="can't be read as a judge"):
        open_agreement(tmp_path)
    for name in ("pictures.onnx", "captions.onnx"):
        (tmp_path / name).write_bytes(b"nonsense")
    with pytest.raises(InputError, match="can't be read as a judge"):
        open_agreement(tmp_path)


def test_clip_is_what_transformers_computes(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(demo_model() / "tokenizer")
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    small["num_attention_heads"] = 2
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = transformers.CLIPConfig(
        text_config={**small, **ends, "vocab_size": len(tokenizer), "max_position_embeddings": 16},
        vision_config={**small, "image_size": 32, "patch_size": 8},
        projection_dim=24,
    )
    model = transformers.CLIPModel(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    judge = open_agreement(tmp_path)
    assert judge.is_clip and judge.name == "CLIP (8 px patches at 32 px)"
    texts = ["a red apple", "apple " * 60]
    chance = np.random.default_rng(0)
    noise = [chance.integers(0, 256, (48, 40, 3), dtype=np.uint8) for _ in range(2)]
    images = [np.asarray(Image.fromarray(x).resize((80, 96), 3)) for x in noise]
    processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    inputs = processor(images, return_tensors="pt")
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=16, return_tensors="pt")
    with torch.no_grad():
        found = model(**inputs, **tokens)
    cosines = judge.images(images) @ judge.texts(texts).T
    wanted = (found.image_embeds @ found.text_embeds.T).numpy()
    np.testing.assert_allclose(cosines, wanted, atol=5e-3)
