"""How tests ask who serves: `ask("PAGES", key, value)`, of codecs and whatever else a request says."""

from kvist.kernels.choose import Choice, choose
from kvist.kernels.contract import Operation, Request


def ask(operation: str, *codecs, **said) -> Choice:
    return choose(Operation[operation], Request(**{"device": "cpu", "sides": tuple(c.traits for c in codecs)} | said))
