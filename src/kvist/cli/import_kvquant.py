"""`kvist import-kvquant`: a quantizer file that KVQuant's authors published becomes an artefact."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvist.cli.options import command
from kvist.cli.show import Printed
from kvist.flags import argument, flag


@dataclass(frozen=True)
class Source:
    """A published file, the model it was made for, and where it goes."""

    file: Path = argument(..., "The quantizer file, quantizer-….pickle; nothing in it is run.")
    model: str = flag(..., "The model it was made for: a folder, or its name on the Hub.")
    out: Path = flag(..., "The folder that the artefact is written into.", "-o")


@dataclass(frozen=True)
class Unsaid:
    """What the file does not say."""

    sinks: int | None = flag(None, "First tokens that stay exact.  [default: 5 for llama (LWM), else 1]", least=0)
    cap: str | None = flag(
        None,
        "token: as many outliers in every token; none: those beyond the thresholds.  "
        "[default: none for dbrx, else token]",
    )
    outliers: str = flag("1%", "Share of the channels that escape, per token.")
    slots: int | None = flag(None, "With --cap none: room for outliers of keys per token.  [default: twice the share]")
    levels: str | None = flag(None, "nf or int, for a file without codebooks.")
    bits: int | None = flag(None, "2 to 5, for a file without codebooks.")


@command
def import_kvquant(source: Source, unsaid: Unsaid, printed: Printed) -> None:
    """Read a quantizer file published with KVQuant and write an artefact; only the model's config is needed.

    Example: kvist import-kvquant quantizer-lwm-text-chat-256K-a3-s1.pickle --model LargeWorldModel/LWM-Text-Chat-256K
    --out lwm-256k-a3
    """
    from kvist.calibrate.published import load, to_artifact
    from kvist.cli.models import outline
    from kvist.coding import Slots
    from kvist.methods.kvquant import parse_share

    share = parse_share(unsaid.outliers)
    given: dict[str, Any] = vars(unsaid) | {"outliers": share}
    artifact = to_artifact(load(source.file), outline(source.model), **given)
    artifact.save(source.out)
    settings, facts = artifact.settings, artifact.model
    channels = facts.heads * facts.key_dim
    figures = {
        "file": str(source.file),
        "artifact": str(source.out),
        "model": facts.name,
        "layers": facts.layers,
        "channels": channels,
        **{name: getattr(settings, name) for name in ("levels", "bits", "outliers", "cap", "sinks", "qnorm")},
        "slots": settings.slots if settings.cap == "none" else Slots(share=share).count(channels) if share else 0,
        "on_grid": artifact.on_grid,
    }
    chosen = unsaid.sinks is not None or unsaid.cap is not None
    printed.say(figures, *_sentences(figures, chosen, room=unsaid.slots is not None))


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
