"""Texts to prompts: special tokens, chat templates, a middle left out, and where the question begins."""

from collections.abc import Sequence

from kvist.calibrate.text import encode
from kvist.evaluate.generation import Prompt


def tokens(tokenizer, text: str) -> list[int]:
    """With the tokenizer's special tokens, unless the text begins with one, as a chat template's does."""
    begin = tokenizer.bos_token
    return encode(tokenizer, text, special=not (begin and text.startswith(begin)))


def chatted(tokenizer, messages: Sequence[dict[str, str]], add_generation_prompt: bool = True) -> str:
    """Messages (role, content) through the model's chat template, up to where it answers."""
    need_template(tokenizer)
    return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=add_generation_prompt)


def need_template(tokenizer) -> None:
    """ValueError for a model without a chat template."""
    if not getattr(tokenizer, "chat_template", None):
        name = getattr(tokenizer, "name_or_path", "") or "the model"
        raise ValueError(f"expected a chat template in the tokenizer of {name}, found none; leave --chat out")


def split(tokenizer, text: str, question: str, most: int, stops: Sequence[str], ids: list[int] | None = None) -> Prompt:
    """A prompt of a text, or of its `ids`: from where `question` stands last in it, it is read from what is stored.
    The tokens are those of the whole text; the cut lies as many tokens before the end as the question takes alone."""
    ids = tokens(tokenizer, text) if ids is None else ids
    if len(ids) < 2:
        raise ValueError(f"expected a prompt of at least 2 tokens, found {text!r}")
    at = text.rfind(question.strip())
    tail = text[at:] if question.strip() and at >= 0 else question
    asked = min(max(1, len(encode(tokenizer, tail))), len(ids) - 1)
    return Prompt(tuple(ids[:-asked]), tuple(ids[-asked:]), most, tuple(stops))


def without_middle(ids: list[int], room: int) -> list[int]:
    """At most `room` tokens: the first and the last half of them, as LongBench does. ValueError for less than 2."""
    if len(ids) <= room:
        return ids
    if room < 2:
        raise ValueError(
            f"expected room for a prompt of at least 2 tokens, found {room}; the model is too short for it"
        )
    half = room // 2
    return ids[:half] + ids[-half:]
