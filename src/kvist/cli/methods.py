"""`kvist methods` and `kvist show`: the catalogue and one page of it, both generated from the recipes."""

from typing import Annotated

import typer

from kvist.cli.show import Json, dump, put, table
from kvist.units import size

LENGTHS = {"4K": 4096, "128K": 131072}
HEADS, DIM = 8, 128
SHAPE = f"{HEADS} KV heads of {DIM}, 16-bit model, one row, room reserved, sinks, windows and tables included"


def geometry():
    """The layer that the catalogue's figures are for."""
    import torch

    from kvist.types import Geometry

    return Geometry(HEADS, DIM, DIM, torch.bfloat16)


def first_sentence(text: str | None) -> str:
    """A docstring's first sentence, on one line."""
    words = " ".join((text or "").split())
    end = words.find(". ")
    return words if end < 0 else words[: end + 1]


def rows() -> list[dict]:
    """The catalogue as data: one entry per registered method, at its defaults."""
    from kvist.methods import entry, get, names

    found = []
    for name in names():
        recipe, function = get(name), entry(name)
        bits = {k: recipe.bits_per_element(geometry(), len(recipe.layers), n) for k, n in LENGTHS.items()}
        needs = list(recipe.needs) or ["nothing"]
        idea = first_sentence(function.__doc__)
        found.append({"name": name, "paper": recipe.paper, "bits": bits, "needs": needs, "idea": idea})
    return found


def catalogue(json: Json = False) -> None:
    """The catalogue: every method, its paper, its size, what it needs.

    Example: kvist methods --json
    """
    found = rows()
    if json:
        return dump({"shape": SHAPE, "methods": found})
    made = table(
        "Methods, at their defaults",
        *("method", "paper", "needs", "what it does", "bits 4K", "bits 128K"),
        caption=f"bits: allocated bits per cached number, mean of keys and values: {SHAPE}.",
        left=4,
    )
    for row in found:
        bits = (f"{row['bits'][k]:.2f}" for k in LENGTHS)
        made.add_row(row["name"], row["paper"], ", ".join(row["needs"]), row["idea"], *bits)
    put(made)
    return None


def options(name: str) -> dict[str, object]:
    """A method's options with their defaults."""
    from kvist.methods import defaults, names

    return {k.replace("_", "-"): default for k, default in defaults(name).items()} if name in names() else {}


def show(
    method: Annotated[str, typer.Argument(help="'kivi:2', 'kivi k=2 v=4 group=32', or a recipe's JSON file.")],
    length: Annotated[int, typer.Option("--length", "-n", min=1, help="Tokens for the bill.")] = 4096,
    json: Json = False,
) -> None:
    """One method: its sentence, its options, its bill, its JSON.

    Examples: kvist show kivi:2; kvist show 'logquant bits=4 window=128' --length 32768 --json
    """
    from kvist.methods import entry, names, parse

    recipe = parse(method)
    layers = len(recipe.layers)
    bill = recipe.bill(geometry(), layers, length, reserve=length)
    bits = recipe.bits_per_element(geometry(), layers, length)
    known = options(recipe.name)
    where = f"{length} tokens, {layers} layer{'s' * (layers > 1)} of {SHAPE}"
    if json:
        data = {"sentence": str(recipe), "options": known, "length": length, "shape": where}
        return dump(data | {"bill": dict(bill), "bits_per_element": bits, "recipe": recipe.model_dump(mode="json")})
    print(recipe)
    if recipe.name in names():
        print("\n" + " ".join((entry(recipe.name).__doc__ or "").split()) + f" ({recipe.paper})")
    if known:
        print("\nOptions: " + ", ".join(f"{k}={'(empty)' if v == '' else v}" for k, v in known.items()))
    if recipe.chunking:
        print(f"\nDepends on how a prompt is cut: {recipe.chunking}.")
    print(f"\nBill for {where}:")
    made = table("", "item", "allocated", "bits per element", left=1)
    numbers = layers * length * HEADS * 2 * DIM
    for item, nbytes in bill.items():
        made.add_row(item, size(nbytes), f"{8 * nbytes / numbers:.3f}")
    made.add_row("total", size(bill.total()), f"{bits:.3f}")
    put(made)
    print(recipe.model_dump_json(indent=2))
    return None
