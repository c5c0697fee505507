"""`kvist inspect`: what kvist would do with a model, from its config alone."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvist.cli.options import MODEL, command
from kvist.cli.show import Printed, table
from kvist.flags import argument, flag
from kvist.units import size

LENGTHS = {"4K": 4096, "32K": 32768, "128K": 131072}


@dataclass(frozen=True)
class Outlined:
    """A model, and what would be done with it."""

    model: str = argument(..., MODEL)
    method: tuple[str, ...] = flag(("kivi:2",), "'kivi:2', 'kivi k=2 v=4', or a recipe's JSON file; repeatable.", "-m")
    device: str = flag("cpu", "Where it would run: cpu or cuda.")


@command
def inspect(asked: Outlined, printed: Printed) -> None:
    """What kvist would do with a model: layers, heads, kernel, bytes. Reads the config, not the weights.

    Example: kvist inspect meta-llama/Llama-3.1-8B --method kivi:2 --method int4
    """
    from kvist.cli.models import outline
    from kvist.methods import parse
    from kvist.models.adapter import describe

    recipes = [parse(text) for text in asked.method]
    outlined = outline(asked.model)
    described = describe(outlined)
    shapes = described.shapes
    token = sum(shape.heads * (shape.key_dim + shape.value_dim) for shape in shapes)
    data = {
        "model": asked.model,
        "family": described.name,
        "layers": len(described.kinds),
        "served": described.served,
        "not_served": _others(described.kinds, described.served),
        "query_heads": _one(described.queries),
        "kv_heads": _one([shape.heads for shape in shapes]),
        "head_sizes": _one([[shape.key_dim, shape.value_dim] for shape in shapes]),
        "dtype": str(shapes[0].dtype).removeprefix("torch."),
        "rotary": described.rotary,
        "attention": outlined.config._attn_implementation,
        "attach": _attaches(outlined),
        "bytes_per_token_16_bit": 2 * token,
        "methods": [_method(recipe, described, token, asked.device) | _fitted(recipe, outlined) for recipe in recipes],
    }
    printed.say(data, *_shown(data))


def _others(kinds: tuple[str, ...], served: list[int]) -> dict[str, dict]:
    """Layers that keep transformers' own cache, by kind, with the reason."""
    from kvist.models.adapter import reason

    counts = Counter(kind for i, kind in enumerate(kinds) if i not in served)
    return {kind: {"layers": n, "why": reason(kind)} for kind, n in counts.items()}


def _one(facts: Sequence):
    """A fact of all layers, or those of each where they differ."""
    return facts[0] if all(fact == facts[0] for fact in facts) else list(facts)


def _attaches(model) -> str:
    """What attaching would do, tried on the outline."""
    from kvist.attention import attach

    try:
        with attach(model) as attached:
            if attached.before:
                return "the attention that reads packed pages is switched on by name"
        return "no switch needed: the handles answer scaled_dot_product_attention"
    except ValueError as error:
        return f"refused: {error}"


def _method(recipe, described, token: int, device: str) -> dict:
    plans = recipe.for_layers(len(described.served))
    length = LENGTHS["32K"]
    bills = {k: recipe.bill(described.shapes, len(plans), n, reserve=n).total() for k, n in LENGTHS.items()}
    for plan, shape in zip(plans, described.shapes, strict=True):
        for side, dim in zip(plan.sides, (shape.key_dim, shape.value_dim), strict=True):
            side.codec.layout(shape.heads, dim, shape.dtype)
    return {
        "method": recipe.name,
        "sentence": str(recipe),
        **_kernels(recipe, plans, described, device),
        "bytes_per_token": bills["32K"] / length,
        "bytes": bills,
        "bytes_16_bit": {k: 2 * token * n for k, n in LENGTHS.items()},
    }


def _fitted(recipe, model) -> dict:
    """What calibration must still provide, or has provided for this model; refuses a recipe fitted to another."""
    from kvist.cache.cache import Cache
    from kvist.models.rope import rotary

    if recipe.needs:
        if recipe.rotary:
            rotary(model)  # refuses, with the reason, what calibration would refuse
        return {"needs": list(recipe.needs), "fitted_to": None, "tables": None}
    Cache(model, recipe).close()  # holds nothing before it is given something
    levels = (side.codec.levels for plan in recipe.layers for side in plan.sides)
    tables = [table for table in levels if table.kind == "table"]
    counts = {"all": len(tables), "on_grid": sum(table.grid is not None for table in tables)} if tables else None
    return {"needs": [], "fitted_to": recipe.model and recipe.model.name, "tables": counts}


def _kernels(recipe, plans, described, device: str) -> dict[str, str]:
    """What serves a decode step of one row (on a GPU it is one launch), packing, and captured steps; or why not."""
    from dataclasses import replace

    import torch

    from kvist.kernels.choose import choose
    from kvist.kernels.contract import Operation

    packing = [plan for plan in plans if plan.packs]
    if not packing:
        none = "none needed: nothing is packed"
        return {"kernel": f"{none}, the model's own attention serves", "encoder": none, "captured": none}
    asked = [
        replace(plan.request(shape, recipe.page, torch.device(device)), group=queries // shape.heads, dtype=shape.dtype)
        for plan, shape, queries in zip(plans, described.shapes, described.queries, strict=True)
        if plan.packs
    ]
    sides = [replace(one, sides=(side,)) for one in asked for side in one.sides if side.levels != "raw"]
    attend = Operation.WHOLE if device == "cpu" else Operation.STEP
    stored = _answer([choose(Operation.STORE, one) for one in asked], "layers").replace("reference; ", "none: ")
    return {
        "kernel": _answer([choose(attend, one) for one in asked], "layers"),
        "encoder": _answer([choose(Operation.ENCODE, one) for one in sides], "sides of layers"),
        "captured": stored if len(packing) == len(plans) else "none: a layer packs nothing",
    }


def _answer(choices, unit: str) -> str:
    """The implementations that were chosen, by name, with counts where they differ."""
    answers = Counter("; ".join([choice.name, *choice.reasons]) for choice in choices)
    if len(answers) == 1:
        return next(iter(answers))
    return "; ".join(f"{n} {unit}: {answer}" for answer, n in answers.items())


def _sentence(text: str) -> str:
    """A recipe's sentence, layers that are described alike told once."""
    name, _, rest = text.partition(": ")
    groups: dict[str, list[str]] = {}
    for line in rest.split("\n  "):
        layer, _, words = line.partition(": ") if line.startswith("layer ") else ("", "", line)
        groups.setdefault(words, []).append(layer.removeprefix("layer "))
    if len(groups) == 1:
        return f"{name}: {next(iter(groups))}"
    lines = (f"layer{'s' * (len(own) > 1)} {', '.join(own)}: {words}" for words, own in groups.items())
    return f"{name}: " + "\n  ".join(lines)


def _facts(method: dict) -> dict[str, str]:
    """What is to be said about one method, by its heading."""
    facts = {"kernel": method["kernel"], "packing": method["encoder"], "captured steps": method["captured"]}
    if method["needs"]:
        facts["missing"] = (
            f"{', '.join(method['needs'])}; `kvist calibrate` fits them; the bytes below hold for the same settings"
        )
    if method["fitted_to"]:
        facts["fitted to"] = f"{method['fitted_to']}; it fits this model"
    if tables := method["tables"]:
        off = tables["all"] - tables["on_grid"]
        rest = f", {off} elsewhere; the same code reads both" if off else ""
        facts["tables"] = f"{tables['on_grid']} of {tables['all']} lie on the 256-step grid{rest}"
    return facts


def _sizes(found: list) -> str:
    """Head sizes of keys and values in words, of layers that differ one after the other."""
    if isinstance(found[0], int):
        return f"{found[0]} keys, {found[1]} values"
    return "; ".join(f"{n} layers: {_sizes(list(pair))}" for pair, n in Counter(map(tuple, found)).items())


def _shown(data: dict) -> Iterator:
    """All of it, as texts and a table."""
    facts = {
        "family": data["family"],
        "layers": f"{data['layers']}, of which kvist serves {len(data['served'])}",
        **{
            f"  {kind}": f"{o['layers']} stay with transformers' own cache: {o['why']}"
            for kind, o in data["not_served"].items()
        },
        "heads": f"{data['query_heads']} query, {data['kv_heads']} KV",
        "head size": _sizes(data["head_sizes"]),
        "dtype": data["dtype"],
        "rotary": data["rotary"],
        "attention": f"{data['attention']}; {data['attach']}",
        "16-bit cache": f"{size(data['bytes_per_token_16_bit'])} per token in the layers served",
    }
    width = max(map(len, facts))
    yield from (f"{name:<{width}}  {value}" for name, value in facts.items())
    for method in data["methods"]:
        yield "\n" + "\n  ".join([_sentence(method["sentence"]), *(": ".join(f) for f in _facts(method).items())])
    made = table(
        "Bytes, room reserved, one row",
        *("method", "per token at 32K", *LENGTHS),
        caption="Layers that kvist serves, sinks, windows and tables included; the 16-bit row is arithmetic.",
    )
    for method in data["methods"]:
        made.add_row(method["method"], size(method["bytes_per_token"]), *(size(n) for n in method["bytes"].values()))
    plain = data["methods"][0]["bytes_16_bit"]
    made.add_row("16-bit", size(data["bytes_per_token_16_bit"]), *(size(n) for n in plain.values()))
    yield made
