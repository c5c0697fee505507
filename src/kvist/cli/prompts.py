"""What is said to a model becomes ids: through its chat template, where it has one."""

from collections.abc import Sequence

MARK = "kvist-answer-7f3a"  # stands where an answer would, in a conversation that is only rendered


def check_system(tokenizer, system: str | None, raw: bool) -> None:
    """Refuse a system prompt where nothing would carry it."""
    if system is not None and (raw or tokenizer.chat_template is None):
        why = "--raw leaves the chat template out" if raw else "the model has no chat template"
        raise ValueError(f"--system has no place: {why}; write it into the prompt")


def opening(text: str, system: str | None) -> list[dict[str, str]]:
    """A conversation that begins with `text`."""
    before = [] if system is None else [{"role": "system", "content": system}]
    return [*before, {"role": "user", "content": text}]


def conversation(tokenizer, turns: Sequence[dict[str, str]]) -> list[int]:
    """Ids of a conversation, up to where the model is to answer."""
    return list(_templated(tokenizer, turns, tokenize=True, return_dict=True)["input_ids"])


def next_turn(tokenizer, text: str) -> list[int]:
    """Ids that follow an answer whose conversation is not known: the end of the answer, and a turn with `text`."""
    turns = [*opening("…", None), {"role": "assistant", "content": MARK}, *opening(text, None)]
    _, mark, after = _templated(tokenizer, turns, tokenize=False).rpartition(MARK)
    if not mark:
        raise ValueError("the model's chat template drops earlier answers, so a conversation cannot go on; use --raw")
    return tokenizer(after, add_special_tokens=False)["input_ids"]


def _templated(tokenizer, turns, **options):
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(turns, add_generation_prompt=True, **options)
    except TemplateError as error:
        raise ValueError(f"the model's chat template refuses this conversation: {error}; --raw leaves it out") from None


def at_once(ids: Sequence[int], ends: Sequence[int]) -> bool:
    """Whether nothing was written but the end of text."""
    return bool(ids) and ids[0] in ends


def advice(raw: bool, template: bool, greedy: bool) -> str:
    """Why a model may have ended at once, and what to try."""
    if template and raw:
        return "its chat template was left out, which an instruct model waits for: try without --raw"
    other = "sampling (without --greedy)" if greedy else "another --seed"
    if template:
        return f"try another prompt, or {other}"
    return f"it has no chat template and continues text: try a longer prompt that is not a finished text, or {other}"
