"""What a demo has by default: its methods, its documents, and as many questions."""

from kvist.demo import chat, documents
from kvist.demo.documents import Document
from kvist.demo.measure import BASELINE, Method
from kvist.demo.model import BUNDLED, fitted, recipe
from kvist.methods import parse

METHODS = ("exact", "int8", "int4", "hadamard:4", "kivi:4", "kvquant:4", "kvquant:3", "kivi:2")
OF_BUNDLED, OF_A_TEXT = 120, 12  # questions


def methods(name: str, chosen: tuple[str, ...] = ()) -> list[Method]:
    """Names and recipes, the baseline and `exact` first; by default those that need no tables, or have them."""
    default = [text for text in METHODS if fitted(name) or not parse(text).needs]
    texts = dict.fromkeys(["exact", *(chosen or default)])
    return [(BASELINE, None), *((text, recipe(text, name)) for text in texts)]


def read(name: str, tokenizer, text: str, questions: int | None = None, seed: int = 0) -> list[Document]:
    """What the model reads: the text, or documents of its own kind."""
    if name == BUNDLED:
        return documents.documents(tokenizer, questions or OF_BUNDLED, seed)
    return [chat.document(tokenizer, text, questions or OF_A_TEXT, seed)]
