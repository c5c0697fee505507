"""Bytes and tokens as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvist.units import parse_count, parse_size


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("10GiB", 10 * 2**30),
        ("1.5 GB", 1_500_000_000),
        ("512MiB", 512 * 2**20),
        ("3mb", 3_000_000),
        ("64 KiB", 65536),
        ("2TiB", 2**41),
        (" 8000000000 ", 8_000_000_000),
        ("17B", 17),
    ],
)
def test_sizes(text, nbytes):
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "ten", "10G", "-1GiB", "1e9", "0GiB", "0.1B", "4 GiB free", "1.2.3MB", "5iB"])
def test_no_sizes(text):
    with pytest.raises(ValueError, match="expected bytes such as '10GiB'"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "tokens"), [("131072", 131072), ("128K", 131072), ("1m", 2**20), ("0.5k", 512), (" 7 ", 7)]
)
def test_counts(text, tokens):
    assert parse_count(text) == tokens


@pytest.mark.parametrize("text", ["", "K", "128 KiB", "-4", "0", "0.0001K", "1G", "nan"])
def test_no_counts(text):
    with pytest.raises(ValueError, match="expected a number of tokens such as '4096' or '128K'"):
        parse_count(text)


@given(st.integers(1, 2**50))
def test_plain_numbers_are_what_they_say(n):
    """Below 2^53 a float holds every integer."""
    assert parse_size(str(n)) == parse_count(str(n)) == n
