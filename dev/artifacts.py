"""Make the artefacts of the demo's models (src/kvist/demo/kvquant, references/kvquant), and the page read to SmolLM2:

    python dev/artifacts.py bundled | smollm2 | page

Each model is fitted on documents like the demo's, with other facts in them: fitted on plain novels, keys that only
recall needs lie beyond their ranges (docs/measured.md). SmolLM2 sees the prose of those pages of docs/ that the demo
does not read, as chats. All in fp32.
"""

import re
import shutil
import sys
import tempfile
from pathlib import Path

from kvist import text
from kvist.artifact import Settings
from kvist.calibrate.run import observe, origin
from kvist.calibrate.state import State
from kvist.demo import chat
from kvist.demo import documents as made
from kvist.demo.model import BUNDLED, artifact, load

DOCS = Path(__file__).parents[1] / "docs"
READ = ("start.md", "nouns.md")  # in the demo
SEEDS = (101, 102)  # of the documents; the demo's is 0
SHAPES = {BUNDLED: (16, 1800), "smollm2": (8, 1024)}  # windows, tokens
QUESTIONS, PARAGRAPHS = 120, 14


def main(name: str) -> None:
    if name == "page":
        chat.PAGE.write_text("\n".join(line for page in READ for line in prose(DOCS / page)) + "\n")
        return
    model, tokenizer = load(name, dtype="float32")
    documents, source = bundled(tokenizer) if name == BUNDLED else chats(tokenizer)
    windows = text.sample(tokenizer, documents, *SHAPES[name], seed=0)
    about = origin(source, text.digest(documents), 0, windows)
    with tempfile.TemporaryDirectory() as folder:
        seen = observe(model, windows, Settings(bits=3), State(Path(folder), "demo"), print)
    for bits in (2, 3, 4):
        folder = artifact(name, bits)
        shutil.rmtree(folder, ignore_errors=True)
        seen.fit(Settings(bits=bits), "auto", about).save(folder)


def bundled(tokenizer) -> tuple[list[str], str]:
    """Documents of the bundled model's kind, and what they are."""
    documents = [
        whole(tokenizer, document) for seed in SEEDS for document in made.documents(tokenizer, QUESTIONS, seed)
    ]
    return documents, f"documents of the demo, seeds {', '.join(map(str, SEEDS))}"


def chats(tokenizer) -> tuple[list[str], str]:
    """Prose of the other pages, in pieces with facts planted in them, and what it is."""
    pages = [page for page in sorted(DOCS.glob("*.md")) if page.name not in READ]
    lines = [line for page in pages for line in prose(page)]
    pieces = ["\n".join(lines[i : i + PARAGRAPHS]) for i in range(0, len(lines) - 1, PARAGRAPHS)]
    documents = [whole(tokenizer, chat.document(tokenizer, piece, 4, SEEDS[0] + i)) for i, piece in enumerate(pieces)]
    return documents, f"prose of kvist's docs but for {' and '.join(READ)}, as chats, with facts planted in it"


def whole(tokenizer, document: made.Document) -> str:
    """A document with its questions and their answers behind it."""
    asked = (tokenizer.decode([*q.ids, *q.answer_ids]) for q in document.questions)
    return document.text + "".join(asked)


def prose(page: Path) -> list[str]:
    """The paragraphs and list items of a page of Markdown, without tables, code, headings and marks."""
    words = re.sub(r"^```.*?^```|<!--.*?-->", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    words = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", words).replace("`", "").replace("**", "")
    blocks = [block.strip() for block in re.split(r"\n\s*\n|^(?:- |\d+\. )", words, flags=re.MULTILINE)]
    return [" ".join(block.split()) for block in blocks if len(block) > 40 and block[0] not in "|#!$"]


if __name__ == "__main__":
    main(sys.argv[1])
