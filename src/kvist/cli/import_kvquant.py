"""`kvist import-kvquant`: a quantizer file that KVQuant's authors published becomes an artefact."""

from pathlib import Path
from typing import Annotated

import typer

from kvist.cli.show import Json, dump


def import_kvquant(
    file: Annotated[Path, typer.Argument(help="The quantizer file, quantizer-….pickle; nothing in it is run.")],
    model: Annotated[str, typer.Option("--model", help="The model it was made for: a folder, or its name on the Hub.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder that the artefact is written into.")],
    sinks: Annotated[
        int | None, typer.Option(min=0, help="First tokens that stay exact.  [default: 5 for llama (LWM), else 1]")
    ] = None,
    cap: Annotated[
        str | None,
        typer.Option(
            help="token: as many outliers in every token; none: those beyond the thresholds.  [default: none for "
            "dbrx, else token]"
        ),
    ] = None,
    outliers: Annotated[str, typer.Option(help="Share of the channels that escape, per token.")] = "1%",
    slots: Annotated[
        int | None,
        typer.Option(help="With --cap none: room for outliers of keys per token.  [default: twice the share]"),
    ] = None,
    levels: Annotated[str | None, typer.Option(help="nf or int, for a file without codebooks.")] = None,
    bits: Annotated[int | None, typer.Option(help="2 to 5, for a file without codebooks.")] = None,
    json: Json = False,
) -> None:
    """Read a quantizer file published with KVQuant and write an artefact; only the model's config is needed.

    Example: kvist import-kvquant quantizer-lwm-text-chat-256K-a3-s1.pickle --model LargeWorldModel/LWM-Text-Chat-256K
    --out lwm-256k-a3
    """
    from kvist.calibrate.published import load, to_artifact
    from kvist.cli.models import outline
    from kvist.coding import Slots
    from kvist.methods.kvquant import parse_share

    share = parse_share(outliers)
    published = load(file)
    artifact = to_artifact(
        published, outline(model), outliers=share, cap=cap, sinks=sinks, slots=slots, levels=levels, bits=bits
    )
    artifact.save(out)
    settings, facts = artifact.settings, artifact.model
    channels = facts.heads * facts.key_dim
    figures = {
        "file": str(file),
        "artifact": str(out),
        "model": facts.name,
        "layers": facts.layers,
        "channels": channels,
        "levels": settings.levels,
        "bits": settings.bits,
        "outliers": settings.outliers,
        "cap": settings.cap,
        "slots": settings.slots if settings.cap == "none" else Slots(share=share).count(channels) if share else 0,
        "sinks": settings.sinks,
        "qnorm": settings.qnorm,
        "on_grid": artifact.on_grid,
    }
    if json:
        return dump(figures)
    print("\n".join(_sentences(figures, chosen=sinks is not None or cap is not None, room=slots is not None)))
    return None


def _sentences(f: dict, chosen: bool, room: bool) -> list[str]:
    escape = f"{f['slots']} outliers per token" if f["slots"] else "no outliers"
    usual = "" if chosen else " (as published for this family; --cap and --sinks say otherwise)"
    lines = [
        f"{f['file']}: {f['levels']}{f['bits']} for {f['layers']} layers of {f['channels']} KV channels, "
        f"{'with' if f['qnorm'] else 'without'} Q-Norm.",
        f"Cap {f['cap']}, {escape} among keys, {f['sinks']} sinks{usual}.",
    ]
    if f["cap"] == "none" and not room and f["slots"]:
        lines.append("The slots are twice the share of outliers, as the file does not say how many tokens need more.")
    if not f["on_grid"]:
        lines.append("Its tables do not lie on 256 even steps and are kept in fp32; the same code reads both.")
    lines.append(f"Written to {f['artifact']}; use it as --method 'kvquant artifact={f['artifact']}'.")
    return lines
