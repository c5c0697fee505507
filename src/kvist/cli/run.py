"""`kvist run`: a model of yours generates from packed keys and values."""

from dataclasses import dataclass
from pathlib import Path

from kvist.cli import files
from kvist.cli.options import MODEL, Generation, Where, command
from kvist.cli.show import Printed, console
from kvist.flags import argument, flag
from kvist.units import size


@dataclass(frozen=True)
class Asked:
    """A model, its method, what is said to it, and the files of its cache."""

    model: str = argument(..., MODEL)
    method: str | None = flag(
        None, "'kivi:2', 'kivi k=2 v=4 group=32', or a recipe's JSON file.  [default: kivi:2]", "-m"
    )
    allocation: Path | None = flag(
        None, "A JSON file of bits per layer, for a method with k and v.  [method's default: kvmix]"
    )
    prompt: str | None = flag(None, "The prompt.", "-p")
    prompt_file: Path | None = flag(None, "A text file that holds the prompt.")
    system: str | None = flag(None, "A system prompt, for the model's chat template.")
    chat: bool = flag(False, "Talk: one cache over all turns; an empty line ends it.")
    save_cache: Path | None = flag(None, "Write the cache to this file at the end.")
    load_cache: Path | None = flag(None, "Go on from the cache in this file.")


@command
def run(asked: Asked, generation: Generation, where: Where, printed: Printed) -> None:
    """Generate text from packed keys and values; then say what they took.

    Examples: kvist run Qwen/Qwen3-0.6B --method kivi:2 --prompt 'Once upon a time' --greedy;
    kvist run ./my-model -m 'kivi k=2 v=4' --prompt-file book.txt --reserve 140000;
    kvist run smollm2 -m kivi:4 -p 'What is the capital of France?' --greedy;
    kvist run ./my-model --chat --save-cache talk.kvist;
    kvist run ./my-model -m 'kivi recent=64' --allocation alloc.json --prompt-file book.txt
    """
    _consistent(asked, generation, printed)
    recipe, text = _recipe(asked), _text(asked)

    from kvist.cli.generate import Session, sentences
    from kvist.cli.models import load
    from kvist.cli.prompts import check_system, opening

    model, tokenizer = load(asked.model, where.device, where.dtype)
    check_system(tokenizer, asked.system, generation.raw)
    session = Session(model, tokenizer, recipe, generation, asked.load_cache)
    with session.attached():
        if asked.chat:
            _talk(session, asked.system)
        else:
            session.write(session.turn(opening(text, asked.system), end=""), stream=not printed.json)
    if asked.save_cache:
        session.cache.save(asked.save_cache)
    figures = session.figures()
    printed.say({"model": asked.model, "text": session.text, **figures}, "", *sentences(figures))


def _consistent(asked: Asked, generation: Generation, printed: Printed) -> None:
    """Refuse options that contradict each other, and files that are not there."""
    if (asked.prompt is not None) + (asked.prompt_file is not None) + asked.chat != 1:
        raise ValueError("give exactly one of --prompt TEXT, --prompt-file FILE and --chat")
    if asked.chat and printed.json:
        raise ValueError("--chat is a conversation and --json prints data only; give one of them")
    if not generation.temperature > 0:
        raise ValueError(
            f"--temperature must be above 0, found {generation.temperature}; --greedy takes the likeliest token"
        )
    if asked.load_cache:
        if generation.reserve or generation.prefill:
            raise ValueError("--load-cache brings its own --reserve and --prefill; leave them out")
        if asked.system is not None:
            raise ValueError("--system begins a conversation, and --load-cache goes on with one; give one of them")
        if not asked.load_cache.is_file():
            raise ValueError(f"expected a cache written by --save-cache at {asked.load_cache}, found no file")
    if asked.save_cache:
        files.check_parent(asked.save_cache)


def _recipe(asked: Asked):
    """The recipe, or None for that of a loaded cache, or the default."""
    from kvist.methods import parse

    if asked.allocation:
        return parse(asked.method or "kvmix", allocation=asked.allocation)
    return None if asked.method is None else parse(asked.method)


def _text(asked: Asked) -> str:
    """The prompt, empty for a talk."""
    text = files.read(asked.prompt_file, "the prompt's file") if asked.prompt_file else asked.prompt or ""
    if not text and not asked.chat:
        raise ValueError("the prompt is empty; give it some text")
    return text


def _talk(session, system: str | None) -> None:
    from kvist.cli.prompts import opening

    aside = console(stderr=True)
    aside.print("One cache over all turns; an empty line or Ctrl-D ends the talk.")
    turns: list[dict[str, str]] = []
    while True:
        aside.print("\n> ", end="")
        try:
            said = input()
        except (EOFError, KeyboardInterrupt):
            break
        if not said.strip():
            break
        turns += opening(said, None if turns else system)
        ids = session.turn(turns)
        if session.again:
            aside.print(f"[layers of this model cannot go back: the conversation, {len(ids)} tokens, is read again]")
        try:
            session.write(ids, stream=True)
        except KeyboardInterrupt:
            session.interrupted()
        turns.append({"role": "assistant", "content": session.text})
        report = session.cache.report()
        used = size(sum(report.used.values()))
        aside.print(f"[{session.cache.get_seq_length()} tokens, {used} used, {size(report.nbytes)} allocated]")
