"""`kvist methods` and `kvist show`: the catalogue and one page of it, both generated from the recipes."""

from dataclasses import dataclass

from kvist.cli.options import command
from kvist.cli.show import Printed, table
from kvist.flags import argument, flag
from kvist.units import size

LENGTHS = {"4K": 4096, "128K": 131072}
HEADS, DIM = 8, 128
SHAPE = f"{HEADS} KV heads of {DIM}, 16-bit model, one row, room reserved, sinks, windows and tables included"


@dataclass(frozen=True)
class Shown:
    """A method, and the length of its bill."""

    method: str = argument(..., "'kivi:2', 'kivi k=2 v=4 group=32', or a recipe's JSON file.")
    length: int = flag(4096, "Tokens for the bill.", "-n", least=1)


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


@command
def catalogue(printed: Printed) -> None:
    """The catalogue: every method, its paper, its size, what it needs.

    Example: kvist methods --json
    """
    found = rows()
    made = table(
        "Methods, at their defaults",
        *("method", "paper", "needs", "what it does", "bits 4K", "bits 128K"),
        caption=f"bits: allocated bits per cached number, mean of keys and values: {SHAPE}.",
        left=4,
    )
    for row in found:
        bits = (f"{row['bits'][k]:.2f}" for k in LENGTHS)
        made.add_row(row["name"], row["paper"], ", ".join(row["needs"]), row["idea"], *bits)
    printed.say({"shape": SHAPE, "methods": found}, made)


@command
def show(shown: Shown, printed: Printed) -> None:
    """One method: its sentence, its options, its bill, its JSON.

    Examples: kvist show kivi:2; kvist show 'logquant bits=4 window=128' --length 32768 --json
    """
    from kvist.methods import defaults, entry, names, parse

    recipe, length = parse(shown.method), shown.length
    layers = len(recipe.layers)
    bill = recipe.bill(geometry(), layers, length, reserve=length)
    bits = recipe.bits_per_element(geometry(), layers, length)
    known = defaults(recipe.name) if recipe.name in names() else {}
    known = {name.replace("_", "-"): default for name, default in known.items()}
    where = f"{length} tokens, {layers} layer{'s' * (layers > 1)} of {SHAPE}"
    data = {"sentence": str(recipe), "options": known, "length": length, "shape": where}
    data |= {"bill": dict(bill), "bits_per_element": bits, "recipe": recipe.model_dump(mode="json")}
    about = [str(recipe)]
    if recipe.name in names():
        about.append("\n" + " ".join((entry(recipe.name).__doc__ or "").split()) + f" ({recipe.paper})")
    if known:
        about.append("\nOptions: " + ", ".join(f"{k}={'(empty)' if v == '' else v}" for k, v in known.items()))
    if recipe.chunking:
        about.append(f"\nDepends on how a prompt is cut: {recipe.chunking}.")
    made = table("", "item", "allocated", "bits per element", left=1)
    numbers = layers * length * HEADS * 2 * DIM
    for item, nbytes in bill.items():
        made.add_row(item, size(nbytes), f"{8 * nbytes / numbers:.3f}")
    made.add_row("total", size(bill.total()), f"{bits:.3f}")
    printed.say(data, *about, f"\nBill for {where}:", made, recipe.model_dump_json(indent=2))
