"""`kvist inspect`: what kvist would do with a model, from its config alone."""

from collections import Counter
from typing import Annotated

import typer

from kvist.cli.show import Json, dump, put, table
from kvist.units import size

LENGTHS = {"4K": 4096, "32K": 32768, "128K": 131072}


def inspect(
    model: Annotated[str, typer.Argument(help="A model's folder, or its name on the Hugging Face Hub.")],
    method: Annotated[
        list[str] | None,
        typer.Option("--method", "-m", help="'kivi:2', 'kivi k=2 v=4', or a recipe's JSON file; repeatable."),
    ] = None,
    device: Annotated[str, typer.Option(help="Where it would run: cpu or cuda.")] = "cpu",
    json: Json = False,
) -> None:
    """What kvist would do with a model: layers, heads, kernel, bytes. Reads the config, not the weights.

    Example: kvist inspect meta-llama/Llama-3.1-8B --method kivi:2 --method int4
    """
    from kvist.cli.models import outline
    from kvist.methods import parse
    from kvist.models.adapter import describe

    recipes = [parse(text) for text in method or ["kivi:2"]]
    outlined = outline(model)
    described = describe(outlined)
    shape = described.shape
    token = len(described.served) * shape.heads * (shape.key_dim + shape.value_dim)
    data = {
        "model": model,
        "family": described.name,
        "layers": len(described.kinds),
        "served": described.served,
        "not_served": _others(described.kinds, described.served),
        "query_heads": described.query_heads,
        "kv_heads": shape.heads,
        "head_sizes": [shape.key_dim, shape.value_dim],
        "dtype": str(shape.dtype).removeprefix("torch."),
        "rotary": described.rotary,
        "attention": outlined.config._attn_implementation,
        "attach": _attaches(outlined),
        "bytes_per_token_16_bit": 2 * token,
        "methods": [_method(recipe, described, token, device) | _fitted(recipe, outlined) for recipe in recipes],
    }
    if json:
        return dump(data)
    _print(data)
    return None


def _others(kinds: tuple[str, ...], served: list[int]) -> dict[str, dict]:
    """Layers that keep transformers' own cache, by kind, with the reason."""
    counts = Counter(kind for i, kind in enumerate(kinds) if i not in served)
    reasons = {"sliding_attention": "its window bounds its cache", "chunked_attention": "its chunk bounds its cache"}
    return {
        kind: {"layers": n, "why": reasons.get(kind, "it keeps no keys and values per token")}
        for kind, n in counts.items()
    }


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
    bills = {k: recipe.bill(described.shape, len(plans), n, reserve=n).total() for k, n in LENGTHS.items()}
    for plan in plans:
        for side, dim in zip(plan.sides, (described.shape.key_dim, described.shape.value_dim), strict=True):
            side.codec.layout(described.shape.heads, dim, described.shape.dtype)
    return {
        "method": recipe.name,
        "sentence": str(recipe),
        "kernel": _kernel(plans, described, device),
        "encoder": _encoder(plans, device),
        "captured": _capture(plans, device),
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


def _kernel(plans, described, device: str) -> str:
    """Which attention reads the packed pages, or why only the reference does. On a GPU: of decode steps, which are one
    launch each."""
    import torch

    from kvist.kernels.choose import decode_attention, packed_attention

    if not any(plan.packs for plan in plans):
        return "none needed: nothing is packed, the model's own attention serves"
    place = torch.device(device)
    traits = [(plan.key.codec.traits, plan.value.codec.traits, place) for plan in plans]
    if place.type == "cpu":
        return _answer([packed_attention(*given) for given in traits], "layers")
    dims, rows = (described.shape.key_dim, described.shape.value_dim), described.query_heads // described.shape.heads
    steps = zip(traits, plans, strict=True)
    return _answer([decode_attention(*given, dims, rows, plan.pinned) for given, plan in steps], "layers")


def _capture(plans, device: str) -> str:
    """What stores the tokens of captured decode steps, or why they cannot be captured."""
    import torch

    from kvist.kernels.choose import stepper

    packing = [plan for plan in plans if plan.packs]
    if len(packing) < len(plans):
        return "none: a layer packs nothing"
    found = [stepper(plan.key.codec.traits, plan.value.codec.traits, torch.device(device)) for plan in packing]
    return _answer(found, "layers").replace("reference; ", "none: ")


def _encoder(plans, device: str) -> str:
    """What packs keys and values, or why only the reference does."""
    import torch

    from kvist.kernels.choose import encoder

    codecs = [side.codec for plan in plans for side in plan.sides if plan.packs and not side.codec.raw]
    if not codecs:
        return "none needed: nothing is packed"
    return _answer([encoder(codec.traits, torch.device(device)) for codec in codecs], "sides of layers")


def _answer(found, unit: str) -> str:
    """The implementations that were chosen, by name, with counts where they differ."""
    answers = Counter()
    for fast, reasons in found:
        function = getattr(fast, "func", fast)
        answers[f"{function.__module__}.{function.__name__}" if function else "reference; " + "; ".join(reasons)] += 1
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


def _print(data: dict) -> None:
    facts = {
        "family": data["family"],
        "layers": f"{data['layers']}, of which kvist serves {len(data['served'])}",
        **{
            f"  {kind}": f"{o['layers']} stay with transformers' own cache: {o['why']}"
            for kind, o in data["not_served"].items()
        },
        "heads": f"{data['query_heads']} query, {data['kv_heads']} KV",
        "head size": f"{data['head_sizes'][0]} keys, {data['head_sizes'][1]} values",
        "dtype": data["dtype"],
        "rotary": data["rotary"],
        "attention": f"{data['attention']}; {data['attach']}",
        "16-bit cache": f"{size(data['bytes_per_token_16_bit'])} per token in the layers served",
    }
    width = max(map(len, facts))
    print("\n".join(f"{name:<{width}}  {value}" for name, value in facts.items()))
    for method in data["methods"]:
        print("\n" + "\n  ".join([_sentence(method["sentence"]), *(": ".join(f) for f in _facts(method).items())]))
    made = table(
        "Bytes, room reserved, one row",
        *("method", "per token at 32K", *LENGTHS),
        caption="Layers that kvist serves, sinks, windows and tables included; the 16-bit row is arithmetic.",
    )
    for method in data["methods"]:
        made.add_row(method["method"], size(method["bytes_per_token"]), *(size(n) for n in method["bytes"].values()))
    plain = data["methods"][0]["bytes_16_bit"]
    made.add_row("16-bit", size(data["bytes_per_token_16_bit"]), *(size(n) for n in plain.values()))
    put(made)
