"""Bytes and tokens as people write them."""

import re


def size(nbytes: float) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} GiB"


def parse_size(text: str) -> int:
    """Bytes from '10GiB', '1.5 GB', '512MiB', '64kB' or plain bytes; 1 GB is 1000 MB, 1 GiB is 1024 MiB."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?)b|b)?", text.strip(), re.IGNORECASE)
    nbytes = 0
    if found:
        number, letter, binary = found.groups(default="")
        nbytes = int(float(number) * (1024 if binary else 1000) ** (" kmgt".index(letter.lower()) if letter else 0))
    if not nbytes:
        raise ValueError(f"expected bytes such as '10GiB', '512MiB' or '8000000000', found {text!r}")
    return nbytes


def parse_counts(text: str) -> tuple[int, ...]:
    """Tokens from such texts with commas between."""
    return tuple(parse_count(each) for each in text.split(","))


def parse_count(text: str) -> int:
    """Tokens from '131072', '128K' or '1M'; 1 K is 1024."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([km]?)", text.strip(), re.IGNORECASE)
    count = int(float(found[1]) * 1024 ** " km".index(found[2].lower() or " ")) if found else 0
    if not count:
        raise ValueError(f"expected a number of tokens such as '4096' or '128K', found {text!r}")
    return count
