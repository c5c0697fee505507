"""Text, from a file, a folder of data or the Hugging Face hub, to windows of tokens.

Documents are joined by blank lines and tokenised as one text, so that a window may span two of them: the convention of
GPTQ, whose perplexities KVQuant reports.
"""

import hashlib
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvist import stranger

SEPARATOR = "<|endoftext|>"
BLANK = "\n\n"
MOST_BYTES = 1 << 31  # of a text
WIDE = 8  # characters that hold a token, with room to spare
# where a name's text lies in a folder of data, by what it is for
PLACES = {
    "test": ("eval/{}/test.txt", "eval/{}.txt"),
    "valid": ("eval/{}/valid.txt",),
    "train": ("train/{}.txt.xz", "train/{}.txt", "train/{}/train.txt"),
}
# dataset, arguments, and how many documents are read at most: the hub's files of C4 are far longer than is ever used
HUB = {
    ("wikitext2", "test"): ("Salesforce/wikitext", {"name": "wikitext-2-raw-v1", "split": "test"}, None),
    ("wikitext2", "valid"): ("Salesforce/wikitext", {"name": "wikitext-2-raw-v1", "split": "validation"}, None),
    ("wikitext2", "train"): ("Salesforce/wikitext", {"name": "wikitext-2-raw-v1", "split": "train"}, None),
    ("c4", "test"): ("allenai/c4", {"data_files": "en/c4-validation.00000-of-00008.json.gz", "split": "train"}, 1_100),
    ("c4", "train"): ("allenai/c4", {"data_files": "en/c4-train.00000-of-01024.json.gz", "split": "train"}, 20_000),
}


def texts(name: str, data_dir: str | Path | None = None, split: str = "test") -> list[str]:
    """The documents of a text file (also .xz; `<|endoftext|>` between documents), or of a name: wikitext2, c4, novels …

    A name is looked up in the folder `data_dir`, for its split: eval/NAME/test.txt or eval/NAME.txt ("test"),
    eval/NAME/valid.txt ("valid"), train/NAME.txt or .txt.xz ("train"). Without `data_dir`, wikitext2 (raw) and c4 (the
    first 1,100 documents of the first validation file; of the first training file, 20,000) come from the hub.
    Raises ValueError where there is no such text, or an empty one.
    """
    if split not in PLACES:
        raise ValueError(f"a split is one of {', '.join(PLACES)}, found {split!r}")
    file = Path(name)
    if data_dir is None and (file.exists() or file.suffix or len(file.parts) > 1):
        found = _read(file)
    elif data_dir is not None:
        found = _read(_placed(name, Path(data_dir), split))
    elif (name, split) in HUB:
        found = _fetch(name, split)
    else:
        raise ValueError(
            f"expected a text file, or wikitext2 or c4 from the Hugging Face hub, found {name!r} (for {split}); other "
            "names need --data-dir"
        )
    if not any(map(str.strip, found)):
        raise ValueError(f"{name} has no text in it")
    return found


def digest(documents: Sequence[str]) -> str:
    """A hash of the documents and their order."""
    made = hashlib.blake2b(digest_size=8)
    for text in documents:
        made.update(text.encode() + b"\0")
    return made.hexdigest()


def windows(tokenizer, documents: Sequence[str], seqlen: int, most: int | None = None) -> Tensor:
    """Windows of `seqlen` tokens side by side, in order, int64 (n, seqlen); what is left at the end is dropped. At most
    the first `most`. Raises ValueError for text shorter than one window."""
    _check(seqlen, 1 if most is None else most)
    text = BLANK.join(documents)
    ids = encode(tokenizer, text if most is None else text[: WIDE * seqlen * most], special=True)
    if most is not None and len(ids) <= most * seqlen:  # the tokens of the cut itself are never used
        ids = encode(tokenizer, text, special=True)
    count = len(ids) // seqlen
    if not count:
        raise ValueError(f"the text is {len(ids)} tokens long, a window needs {seqlen}; give a smaller --seqlen")
    return torch.tensor(ids[: count * seqlen]).view(count, seqlen)[:most]


def sample(tokenizer, documents: Sequence[str], samples: int, seqlen: int, seed: int = 0) -> Tensor:
    """`samples` random windows of `seqlen` tokens, int64 (samples, seqlen). They overlap only where the text is too
    short for them. Of a long text, only the stretches drawn are tokenised. Raises ValueError for text shorter than one
    window."""
    _check(seqlen, samples)
    text, draw, found = BLANK.join(documents), random.Random(seed), []
    stretches = range(0, max(0, len(text) - WIDE * seqlen + 1), WIDE * seqlen)
    for start in draw.sample(stretches, len(stretches)):
        space = re.compile(r"\s").search(text, start)
        ids = encode(tokenizer, text[space.start() if space and start else start : start + WIDE * seqlen])
        if len(ids) > seqlen:
            found.append(ids[:seqlen])
        if len(found) == samples:
            return torch.tensor(found)
    ids = encode(tokenizer, text)
    if len(ids) < seqlen:
        raise ValueError(f"the text is {len(ids)} tokens long, a window needs {seqlen}; give a smaller --seqlen")
    starts = [seqlen * i for i in draw.sample(range(len(ids) // seqlen), min(samples, len(ids) // seqlen))]
    starts += [draw.randrange(len(ids) - seqlen + 1) for _ in range(samples - len(starts))]
    return torch.tensor([ids[start : start + seqlen] for start in starts])


def prompts(name: str, data_dir: str | Path | None = None) -> list[str]:
    """One prompt per line of a .jsonl file: its "prompt" or "text", or its "context" and "input" (as LongBench has
    them). Raises ValueError where a line is another thing."""
    path, found = Path(name), []
    if data_dir is not None and not path.exists():
        path = Path(data_dir) / name
    try:
        lines = path.read_text().split("\n")  # alone: other separators may stand inside a JSON string
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text in UTF-8"
        raise ValueError(f"the prompts {path} cannot be read: {reason}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            parts = [row[key] for key in ("prompt", "text") if key in row][:1] or [row["context"], row.get("input", "")]
            found.append(BLANK.join(part for part in parts if part))
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f'line {number} of {path} is no prompt: expected JSON with "prompt", "text" or "context"'
            ) from None
    return found


def draw(
    tokenizer, name: str, data_dir: str | Path | None, samples: int, seqlen: int, seed: int = 0
) -> tuple[list[Tensor], str]:
    """`samples` prompts of at most `seqlen` tokens, each int64 (T,), and the hash of the text they come from: random
    lines of a .jsonl file, cut behind, or random windows of a training text. Raises ValueError where there are not as
    many."""
    if not name.endswith(".jsonl"):
        documents = texts(name, data_dir, "train")
        return list(sample(tokenizer, documents, samples, seqlen, seed)), digest(documents)
    _check(seqlen, samples)
    documents, found = prompts(name, data_dir), []
    for text in random.Random(seed).sample(documents, len(documents)):
        ids = encode(tokenizer, text[: WIDE * seqlen], special=True)[:seqlen]
        if len(ids) > 1:
            found.append(torch.tensor(ids))
        if len(found) == samples:
            return found, digest(documents)
    raise ValueError(f"{name} has {len(found)} prompts of at least 2 tokens, found --samples {samples}; ask for fewer")


def encode(tokenizer, text: str, special: bool = False) -> list[int]:
    """The tokens of a text of any length, without a word about its length."""
    return tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]


def _check(seqlen: int, count: int) -> None:
    if seqlen < 2:
        raise ValueError(f"a window has at least 2 tokens, found {seqlen}")
    if count < 1:
        raise ValueError(f"expected at least 1 window, found {count}")


def _read(path: Path) -> list[str]:
    try:
        data = stranger.read(path, MOST_BYTES)
        text = (stranger.unpack(data, MOST_BYTES) if path.suffix == ".xz" else data).decode()
    except UnicodeDecodeError:
        raise ValueError(f"the text {path} cannot be read: it is not text in UTF-8") from None
    except ValueError as error:
        raise ValueError(f"the text {path} cannot be read: {error}") from None
    return [part for part in text.split(SEPARATOR) if part.strip()]


def _placed(name: str, folder: Path, split: str) -> Path:
    places = [folder / place.format(name) for place in PLACES[split]]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        wanted = " or ".join(str(place.relative_to(folder)) for place in places)
        raise ValueError(f"expected {wanted} in {folder} for the {split} text {name!r}, found none")
    return found


def _fetch(name: str, split: str) -> list[str]:
    otherwise = "give a text file, or --data-dir"
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise ValueError(
            f"{name} comes from the Hugging Face hub by the package datasets, which is not installed (pip install "
            f"datasets); or {otherwise}"
        ) from None
    library: Any = datasets
    path, arguments, most = HUB[name, split]
    try:
        rows = library.load_dataset(path, streaming=most is not None, **arguments)
        rows = rows if most is None else rows.take(most)
        return [row["text"] for row in rows]
    except Exception as error:  # the library and the hub's client raise many kinds
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"{name} cannot be fetched from the Hugging Face hub: {reason}; {otherwise}") from error
