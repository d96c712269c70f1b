"""The scripts that make the demo model, as far as they run without torch."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts.demo_model import dataset
from scripts.demo_model.captions import (
    captions,
    is_held_out,
    nearest_colour,
    pick_caption,
    with_article,
)
from scripts.demo_model.colour import HUES, hue_distance, main_hue, tint
from scripts.demo_model.dataset import Emoji
from scripts.demo_model.vocabulary import CORE, SHEET_PROMPTS, SHOWN, SHOWN_TINTED, TINTED


def square(rgb: tuple[int, int, int], side: int = 16) -> Image.Image:
    """A coloured square in the middle of a white picture."""
    picture = Image.new("RGB", (side, side), "white")
    picture.paste(rgb, (side // 4, side // 4, 3 * side // 4, 3 * side // 4))
    return picture


def test_captions_use_the_right_article() -> None:
    assert with_article("apple") == "an apple"
    assert with_article("red apple") == "a red apple"
    assert "a red apple, flat icon" in captions("red apple")
    assert all("red apple" in caption for caption in captions("red apple"))


def test_picked_captions_repeat_with_the_seed_and_keep_the_name() -> None:
    first = [pick_caption("ghost", ("monster", "scary"), "flat", random.Random(7)) for _ in "ab"]
    assert first[0] == first[1]
    rng = random.Random(0)
    picked = {pick_caption("ghost", ("monster", "scary"), "flat", rng) for _ in range(200)}
    assert all("ghost" in caption for caption in picked)
    assert any("monster" in caption for caption in picked)


@pytest.mark.parametrize("short_name", sorted(TINTED.values()))
def test_at_most_one_colour_of_an_object_is_held_out(short_name: str) -> None:
    for own in HUES:
        held = [colour for colour in HUES if is_held_out(colour, short_name, own)]
        assert len(held) <= 1
        assert own not in held


def test_held_out_pairs_do_not_change() -> None:
    # The model card promises these, so the rule must never drift.
    assert is_held_out("purple", "car", "red")
    assert is_held_out("blue", "octopus", "red")
    assert is_held_out("green", "guitar", "red")
    assert not is_held_out("green", "car", "red")


def test_hue_distance_goes_round_the_circle() -> None:
    assert hue_distance(350, 10) == 20
    assert hue_distance(10, 350) == 20
    assert hue_distance(0, 180) == 180


def test_nearest_colour() -> None:
    assert nearest_colour(358) == "red"
    assert nearest_colour(200) == "blue"
    assert nearest_colour(335) != "pink"


def test_white_and_grey_have_no_hue() -> None:
    assert main_hue(Image.new("RGB", (8, 8), "white")) is None
    assert main_hue(Image.new("RGB", (8, 8), (90, 90, 90))) is None


@pytest.mark.parametrize("colour", HUES)
def test_tint_gives_the_wanted_hue_and_leaves_white(colour: str) -> None:
    painted = tint(square((200, 40, 30)), colour)
    hue = main_hue(painted)
    assert hue is not None
    assert hue_distance(hue, HUES[colour]) < 10
    assert painted.getpixel((0, 0)) == (255, 255, 255)


def test_tint_leaves_other_hues() -> None:
    picture = square((200, 40, 30))
    picture.paste((30, 180, 40), (0, 0, 4, 4))
    change = np.subtract(tint(picture, "blue").getpixel((1, 1)), picture.getpixel((1, 1)))
    assert np.abs(change).max() <= 4  # rounding on the way through HSV


def test_vocabulary_is_consistent() -> None:
    assert SHOWN <= CORE
    assert set(TINTED) <= CORE
    assert set(TINTED.values()) >= SHOWN_TINTED
    assert len(set(TINTED.values())) == len(TINTED)
    assert len(SHEET_PROMPTS) == len(set(SHEET_PROMPTS)) == 32
    assert all(name == name.lower() for name in CORE)


def test_data_set_round_trip(tmp_path: Path) -> None:
    pictures = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    emoji = [Emoji("flat", "ghost", ("monster",), "shown"), Emoji("noto", "fox", (), "core")]
    dataset.save(tmp_path, pictures, emoji)
    loaded, entries = dataset.load(tmp_path)
    assert entries == emoji
    np.testing.assert_array_equal(loaded, pictures)
    only, entries = dataset.load(tmp_path, style="noto")
    assert entries == emoji[1:]
    np.testing.assert_array_equal(only, pictures[1:])


def test_data_set_of_another_format_is_refused(tmp_path: Path) -> None:
    dataset.save(tmp_path, np.zeros((0, 4, 4, 3), np.uint8), [])
    (tmp_path / "emoji.json").write_text('{"format": 99, "emoji": []}')
    with pytest.raises(ValueError, match="format 99, expected 1"):
        dataset.load(tmp_path)


def test_saving_needs_an_entry_for_each_picture(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 pictures but 0 entries"):
        dataset.save(tmp_path, np.zeros((2, 4, 4, 3), np.uint8), [])


def test_pictures_are_rendered_from_a_small_icon_set() -> None:
    pytest.importorskip("resvg_py")
    from scripts.demo_model.prepare_data import cldr_entries, emoji_pictures

    icons = {
        "width": 32,
        "icons": {
            "red-heart": {"body": '<circle cx="16" cy="16" r="12" fill="#e02020"/>'},
            "boy": {"body": '<circle cx="16" cy="16" r="12" fill="#2020e0"/>'},
        },
    }
    compact = [
        {"hexcode": "2764-FE0F", "label": "red heart", "tags": ["love", "♥"], "group": 0},
        {"hexcode": "1F466", "label": "boy", "tags": [], "group": 1},
        {"hexcode": "1F499", "label": "blue heart", "tags": [], "group": 0},
    ]
    chars = {"2764-fe0f": "red-heart", "1f466": "boy", "1f47b": "unknown"}
    drawn = list(emoji_pictures("flat", icons, chars, cldr_entries(compact), 16))

    entries = {entry.name: entry for entry, _ in drawn}
    assert list(entries) == ["red heart", *(f"{c} heart" for c in HUES if c != "red")]
    assert drawn[0][0] == Emoji("flat", "red heart", ("love",), "shown")
    assert "boy" not in entries  # no people
    assert entries["blue heart"].kind == "tint"  # an emoji of its own, so never held out
    for entry, picture in drawn:
        assert picture.size == (16, 16)
        assert picture.getpixel((0, 0)) == (255, 255, 255)
        hue = main_hue(picture)
        assert hue is not None
        assert hue_distance(hue, HUES[entry.name.split()[0]]) < 10
