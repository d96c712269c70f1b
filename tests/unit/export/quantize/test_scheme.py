"""The names of quantization schemes: what is one, what isn't, and how that is said."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgesd.errors import UsageError
from edgesd.spec.scheme import (
    FLOATING,
    GROUPS,
    MAX_RANK,
    PRECISIONS,
    Scheme,
    number_format,
    parse_scheme,
)

RANKS = ("", "-lr1", "-lr32", f"-lr{MAX_RANK}")
VALID = [
    f"{numbers}{rank}"
    for numbers, rank in itertools.product(
        ("w8a16", "w8a8", *(f"w4a{a}-g{group}" for a in (16, 8, 4) for group in GROUPS)), RANKS
    )
]
INVALID = [
    *("", "w", "w8", "int8", "fp16", "fp32", "W8A8", "w8a8 ", " w8a8", "w8a8\n", "w8a8-", "-lr32"),
    *("w8a4", "w8a32", "w2a8-g64", "w16a16", "w3a16-g64", "w88a8", "w8a8a8", "w08a8"),
    *("w8a8-g64", "w8a16-g64-lr32", "w8a8-g0", "w8a4-g64"),
    *("w4a16", "w4a8", "w4a4-lr32", "w4a8-g", "w4a8-g0", "w4a8-g8", "w4a8-g48", "w4a8-g512"),
    *("w4a8-g-64", "w4a8-g64.0", "w4a8-g6 4", "w4a8-g1_6", "w4a8-g99999999999999999999"),
    *("w8a8-lr", "w8a8-lr0", "w8a8-lr513", "w8a8-lr-1", "w8a8-lr9999", "w8a8-lr1e2"),
    *("w4a8-lr32-g64", "w4a8-g64-g64", "w4a8-g64-lr32-lr32", "w4a8g64", "w4a8-64", "w4a8_g64"),
    *(
        "w4a8-g\u0666\u0664",
        "w\uff18a8",
        "w8a8-lr\uff13\uff12",
        "w4a8-g64\x00",
        "w4a8-g64\nw8a8",
        "é",
        "🙂" * 50,
    ),
]


@pytest.mark.parametrize("name", VALID)
def test_a_valid_name_is_its_scheme_and_back(name: str) -> None:
    scheme = parse_scheme(name)
    assert str(scheme) == name
    assert parse_scheme(str(scheme)) == scheme
    assert number_format(name) == name.partition("-")[0]
    assert number_format(name) in PRECISIONS
    assert scheme.simulated == ("a4" in name)


@pytest.mark.parametrize("name", INVALID)
def test_an_invalid_name_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_scheme(name)
    message = str(caught.value)
    assert message and message.isprintable()
    assert "w4a" in message or "rank" in message or "w8a8" in message


def test_the_message_says_what_is_valid() -> None:
    with pytest.raises(UsageError, match=r"unknown precision 'int8': .*w4a16-g64.* w8a8"):
        parse_scheme("int8")
    with pytest.raises(UsageError, match=r"w4a8-g48: .* -g16, -g32, -g64, -g128, -g256"):
        parse_scheme("w4a8-g48")
    with pytest.raises(UsageError, match=r"w8a8-lr513: .* from 1 to 512"):
        parse_scheme("w8a8-lr513")


@pytest.mark.parametrize("name", FLOATING)
def test_floating_point_has_a_number_format_and_is_no_scheme(name: str) -> None:
    assert number_format(name) == name
    with pytest.raises(UsageError):
        parse_scheme(name)


PARTS = ("w", "a", "-", "g", "lr", "4", "8", "16", "64", "0", "32", "512", "w4a8", "-g64", "-lr")


@given(st.one_of(st.text(max_size=40), st.lists(st.sampled_from(PARTS), max_size=8).map("".join)))
@settings(max_examples=500)
def test_any_text_is_a_scheme_or_a_usage_error(name: str) -> None:
    try:
        scheme = parse_scheme(name)
    except UsageError as exc:
        assert len(str(exc).splitlines()) == 1
        if name not in FLOATING:
            with pytest.raises(UsageError):
                number_format(name)
        return
    assert parse_scheme(str(scheme)) == scheme
    assert str(scheme) in VALID or 1 <= scheme.rank <= MAX_RANK
    assert scheme.group in (0, *GROUPS)


def test_schemes_compare_by_value() -> None:
    assert Scheme(4, 8, 64, 32) == parse_scheme("w4a8-g64-lr32") != parse_scheme("w4a8-g64")
    assert len({parse_scheme(name) for name in VALID}) == len(VALID)
