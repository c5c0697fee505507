"""`kvist run`: a model of yours generates from packed keys and values."""

from pathlib import Path
from typing import Annotated

import typer

from kvist.cli.show import MODEL, Json, console, dump
from kvist.units import size


def run(
    model: Annotated[str, typer.Argument(help=MODEL)],
    method: Annotated[
        str | None,
        typer.Option(
            "--method", "-m", help="'kivi:2', 'kivi k=2 v=4 group=32', or a recipe's JSON file.  [default: kivi:2]"
        ),
    ] = None,
    allocation: Annotated[
        Path | None,
        typer.Option(help="A JSON file of bits per layer, for a method with k and v.  [method's default: kvmix]"),
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="The prompt.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option("--prompt-file", help="A text file that holds the prompt.")
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", help="A system prompt, for the model's chat template.")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="The prompt as it is, without the model's chat template.")] = False,
    chat: Annotated[
        bool, typer.Option("--chat", help="Talk: one cache over all turns; an empty line ends it.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to write, per turn.")] = 256,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always the likeliest token, instead of sampling.")] = False,
    temperature: Annotated[float, typer.Option(help="Of sampling; above 0.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    reserve: Annotated[
        int, typer.Option(min=0, help="Tokens for which room is set aside at once; the cache grows beyond.")
    ] = 0,
    prefill: Annotated[
        str | None, typer.Option(help="exact: a prompt attends to itself in full precision; stored: to what is stored.")
    ] = None,
    chunk: Annotated[int, typer.Option(min=1, help="A longer prompt is read in chunks of so many tokens.")] = 8192,
    attach: Annotated[
        bool, typer.Option(help="Attention that reads packed pages; without, they are decoded each step.")
    ] = True,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="auto (as saved; CPUs: what is fast), float32, float16 or bfloat16.")
    ] = "auto",
    save_cache: Annotated[Path | None, typer.Option(help="Write the cache to this file at the end.")] = None,
    load_cache: Annotated[Path | None, typer.Option(help="Go on from the cache in this file.")] = None,
    json: Json = False,
) -> None:
    """Generate text from packed keys and values; then say what they took.

    Examples: kvist run Qwen/Qwen3-0.6B --method kivi:2 --prompt 'Once upon a time' --greedy;
    kvist run ./my-model -m 'kivi k=2 v=4' --prompt-file book.txt --reserve 140000;
    kvist run smollm2 -m kivi:4 -p 'What is the capital of France?' --greedy;
    kvist run ./my-model --chat --save-cache talk.kvist;
    kvist run ./my-model -m 'kivi recent=64' --allocation alloc.json --prompt-file book.txt
    """
    from kvist.methods import parse

    if (prompt is not None) + (prompt_file is not None) + chat != 1:
        raise ValueError("give exactly one of --prompt TEXT, --prompt-file FILE and --chat")
    if chat and json:
        raise ValueError("--chat is a conversation and --json prints data only; give one of them")
    if prefill not in (None, "exact", "stored"):
        raise ValueError(f"--prefill is 'exact' or 'stored', found {prefill!r}")
    if not temperature > 0:
        raise ValueError(f"--temperature must be above 0, found {temperature}; --greedy takes the likeliest token")
    if load_cache and (reserve or prefill):
        raise ValueError("--load-cache brings its own --reserve and --prefill; leave them out")
    if load_cache and system is not None:
        raise ValueError("--system begins a conversation, and --load-cache goes on with one; give one of them")
    if load_cache and not load_cache.is_file():
        raise ValueError(f"expected a cache written by --save-cache at {load_cache}, found no file")
    if save_cache and not save_cache.parent.is_dir():
        raise ValueError(f"expected a folder to write {save_cache.name} into, found none at {save_cache.parent}")
    if allocation:
        recipe = parse(method or "kvmix", allocation=allocation)
    else:
        recipe = None if method is None else parse(method)
    text = _read(prompt_file) if prompt_file else prompt or ""
    if not text and not chat:
        raise ValueError("the prompt is empty; give it some text")

    from kvist.cli.generate import Session
    from kvist.cli.models import load
    from kvist.cli.prompts import check_system, opening

    loaded, tokenizer = load(model, device, dtype)
    check_system(tokenizer, system, raw)
    sampling = {"do_sample": False} if greedy else {"do_sample": True, "temperature": temperature}
    session = Session(loaded, tokenizer, recipe, reserve, prefill, load_cache, chunk, sampling, seed, raw)
    with session.attached(attach):
        if chat:
            _talk(session, max_new_tokens, system)
        else:
            session.write(session.turn(opening(text, system), end=""), max_new_tokens, stream=not json)
    if save_cache:
        session.cache.save(save_cache)
    figures = session.figures(attach)
    if json:
        return dump({"model": model, "text": session.text, **figures})
    from kvist.cli.generate import sentences

    print("\n" + "\n".join(sentences(figures)))
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text in UTF-8"
        raise ValueError(f"the prompt's file {path} cannot be read: {reason}") from None


def _talk(session, max_new_tokens: int, system: str | None) -> None:
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
            session.write(ids, max_new_tokens, stream=True)
        except KeyboardInterrupt:
            session.interrupted()
        turns.append({"role": "assistant", "content": session.text})
        report = session.cache.report()
        used = size(sum(report.used.values()))
        aside.print(f"[{session.cache.get_seq_length()} tokens, {used} used, {size(report.nbytes)} allocated]")
