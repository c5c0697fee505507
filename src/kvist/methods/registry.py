"""The decorator that names a method. Kept apart so that method files import nothing but it and the nouns."""

from collections.abc import Callable

from kvist.plan import Recipe

METHODS: dict[str, Callable[..., Recipe]] = {}


def method(paper: str) -> Callable[[Callable[..., Recipe]], Callable[..., Recipe]]:
    """Register a function under its own name, underscores as hyphens; `paper` is the reference that `kvist methods`
    prints."""

    def register(function: Callable[..., Recipe]) -> Callable[..., Recipe]:
        name = function.__name__.replace("_", "-")
        function.paper = paper
        METHODS[name] = function
        return function

    return register
