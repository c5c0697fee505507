"""Codecs that several methods share."""

from kvist.coding import Codec, Grouping, Raw, Uniform

WIDTHS = (1, 2, 3, 4, 8)
Width = int | None  # bits of one side; None: those of both sides


def per_channel(bits: int, group: int) -> Codec:
    """Groups of consecutive tokens of one channel: for keys, whose outliers live in fixed channels."""
    return _codec(bits, Grouping(along="tokens", size=group))


def per_token(bits: int, group: int | None = None) -> Codec:
    """Groups of consecutive channels of one token; `group` None is the whole head."""
    return _codec(bits, Grouping(along="channels", size=group))


def width(given, bits: int):
    """A side's own bits, or those of both sides."""
    return bits if given is None else given


def _codec(bits: int, grouping: Grouping) -> Codec:
    if bits == 16:
        return Codec(levels=Raw(), grouping=Grouping(along="channels"))
    if bits not in WIDTHS:
        raise ValueError(f"bits must be one of {', '.join(map(str, WIDTHS))} or 16 (exact), found {bits}")
    return Codec(levels=Uniform(bits=bits), grouping=grouping)


def check_group(group: int, recent: int) -> None:
    """Group 32, 64 or 128, and a window at least as long."""
    if group not in (32, 64, 128):
        raise ValueError(f"group must be 32, 64 or 128, found {group}")
    if recent < group:
        raise ValueError(f"the window ({recent} tokens) is shorter than the group ({group}); use at least {group}")
