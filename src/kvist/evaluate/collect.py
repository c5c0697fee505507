"""Scores of named methods on a text, those that are known already left out."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import transformers
from torch import Tensor

from kvist import __version__
from kvist.cache.files import fingerprint
from kvist.evaluate.perplexity import Mode, measure
from kvist.evaluate.results import Results, Row, recipe_digest
from kvist.models.adapter import describe
from kvist.plan import Recipe


class Text(NamedTuple):
    """Windows int64 (n, seqlen) of a text, the name it is known by, and the hash of its documents."""

    windows: Tensor
    source: str
    digest: str


def collect(
    model,
    text: Text,
    recipes: Mapping[str, Recipe],
    mode: Mode,
    results: Results,
    batch: int = 1,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, list[Row]]:
    """The rows of each recipe for each window, by the recipes' names. What `results` has is not measured again, what it
    has not is added to it at once. `tick` is told how many of all that is missing are done. ValueError as `measure`."""
    about = {
        "model": f"{describe(model).identity.name}-{fingerprint(model)[:16]}",
        "dtype": str(model.dtype).removeprefix("torch."),
        "mode": mode,
        "source": text.source,
        "data": text.digest,
        "seqlen": text.windows.shape[1],
        "versions": {"kvist": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }
    names, digests = list(recipes), [recipe_digest(recipe) for recipe in recipes.values()]

    def key(recipe: int, window: int):
        return Row.key_of(about | {"recipe": digests[recipe], "window": window})

    pairs = [(i, n) for i in range(len(names)) for n in range(len(text.windows))]
    missing = {pair for pair in pairs if key(*pair) not in results.rows}
    scores = measure(
        model, text.windows, list(recipes.values()), mode, batch=batch, wanted=lambda i, n: (i, n) in missing
    )
    tick(0, len(missing))
    for done, score in enumerate(scores, start=1):
        values = score._asdict()
        recipe = values.pop("recipe")
        results.add(Row(**about, **values, method=names[recipe], recipe=digests[recipe]))
        tick(done, len(missing))
    return {name: [results.rows[key(i, n)] for n in range(len(text.windows))] for i, name in enumerate(names)}
