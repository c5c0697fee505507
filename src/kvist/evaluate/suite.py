"""Tasks by name, made from one set of options."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from kvist.calibrate import text
from kvist.evaluate import contenders
from kvist.evaluate.contenders import Contender
from kvist.evaluate.generation import Prefill
from kvist.evaluate.questions import KINDS
from kvist.evaluate.task import Task
from kvist.evaluate.tasks.fidelity import Fidelity, Perplexity, Text
from kvist.evaluate.tasks.harness import PREFIX
from kvist.evaluate.tasks.horizon import Horizon
from kvist.evaluate.tasks.nuisance import Nuisance
from kvist.evaluate.tasks.recall import Haystack, Recall
from kvist.evaluate.tokenwise import MODES, Mode

WINDOWED = {
    "fidelity": "KL from the exact cache: mean, quantiles, by position",
    "ppl": "perplexity, of windows or of the last tokens of long ones",
    "horizon": "KL by decode step, history quantized as it is produced; where greedy texts part",
    "nuisance": "padding, batch and chunks, which should change nothing",
}
TASKS = WINDOWED | {
    "passkey": "one number in noise, KIVI's form",
    "needle": "a magic number for a city in a text, by length and depth",
    "multi-key": "eight needles, one is asked",
    "multi-value": "three numbers for one city",
    "multi-query": "three cities asked at once",
    "variable-tracking": "a chain of variables, beside another",
    "aggregation": "the word that was named most often",
    "gsm8k": "problems in words, few-shot; prompts and metrics of lm-eval",
    "longbench": "all of LongBench, or longbench:NAME; prompts and metrics of lm-eval",
    "longbench-e": "all of LongBench-E",
    "lm-eval:NAME": "any task of lm-eval, several with commas: log-likelihoods, simulated or stored",
}
LONGBENCH, LONGBENCH_E = "longbench", "longbench-e"
STEP = 32  # tokens per update, of which none is packed before the next update begins
LAST = 256  # tokens scored at the end of long windows
SEQLEN, HORIZON = 2048, 1500
PREFILLS = get_args(Prefill)


@dataclass(frozen=True)
class Options:
    """What the command line says, for all tasks. 0 or None: what suits the task.

    data, data_dir, split: the text, as `kvist.calibrate.text.texts` finds it. windows: of a text; seqlen: tokens of
    each; prompt: tokens of each whose keys and values are exact when attention sees them; step: tokens per update
    behind it. lengths: of contexts, or of windows for perplexity of their last tokens; depths: how many, from the start
    to the end; samples: per length and depth. free: greedy tokens until texts part. shots: examples before a question;
    chat: questions go through the model's chat template; tasks_dir: definitions for lm-eval of one's own.
    """

    data: str = "wikitext2"
    data_dir: Path | None = None
    split: str = "test"
    mode: Mode | None = None
    windows: int = 16
    seqlen: int = 0
    prompt: int | None = None
    step: int | None = None
    lengths: tuple[int, ...] = ()
    depths: int = 5
    samples: int = 4
    free: int = 128
    prefill: Prefill = "exact"
    chunk: int = 8192
    batch: int = 1
    shots: int | None = None
    chat: bool = False
    tasks_dir: Path | None = None
    seed: int = 0


def named(text_: str) -> list[str]:
    """Names of tasks from words with commas between; what follows `lm-eval:NAME` and is no task of ours is lm-eval's.
    ValueError for a name that nobody knows."""
    found: list[str] = []
    for word in filter(None, map(str.strip, text_.split(","))):
        ours = word in TASKS or word.startswith(("longbench:", PREFIX))
        if not ours and found and found[-1].startswith(PREFIX):
            word, ours = PREFIX + word, True
        if not ours or word == "lm-eval:NAME":
            raise ValueError(f"no task is called {word!r}; there are {', '.join(TASKS)}")
        found.append(word)
    if not found:
        raise ValueError(f"expected names of tasks, found none; there are {', '.join(TASKS)}")
    return list(dict.fromkeys(found))


def documents(names: Sequence[str], options: Options) -> list[str]:
    """The text that these tasks need, empty for none. Raises ValueError, before a model is loaded, for options that are
    none, or a text that is not there."""
    for name, value, choices in (("mode", options.mode, (None, *MODES)), ("prefill", options.prefill, PREFILLS)):
        if value not in choices:
            raise ValueError(f"--{name} is {' or '.join(filter(None, choices))}, found {value!r}")
    if not any(name in WINDOWED or (name in KINDS and name != "passkey") for name in names):
        return []
    return text.texts(options.data, options.data_dir, options.split)


def tasks(names: Sequence[str], options: Options, documents: list[str], model, tokenizer) -> list[Task]:
    """The tasks of these names, for a model. Raises ValueError for lengths that the model does not know, or data that
    are not there or too short."""
    config = model.config.get_text_config(decoder=True)
    longest = getattr(config, "max_position_embeddings", None) or SEQLEN
    for length in (options.seqlen, *options.lengths):
        if length > longest:
            raise ValueError(f"the model knows {longest} positions, found a length of {length}; give {longest} or less")
    made: list[Task] = []
    for name in names:
        if name in WINDOWED:
            made += _windowed(name, options, documents, tokenizer, longest)
        elif name in KINDS:
            made.append(_recall(name, options, documents, tokenizer, longest))
        elif not name.startswith(PREFIX):
            made += _benchmark(name, options, tokenizer, longest)
    own = [name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX)]
    return made + (_harness(own, options, tokenizer) if own else [])


def _benchmark(name: str, options: Options, tokenizer, longest: int) -> list[Task]:
    given: dict[str, Any] = {"data_dir": options.data_dir, "chat": options.chat, "prefill": options.prefill}
    given |= {"chunk": options.chunk, "batch": options.batch}
    if options.shots is not None and name == "gsm8k":
        given["shots"] = options.shots
    if name == "gsm8k":
        from kvist.evaluate.tasks.gsm8k import GSM8K

        return [GSM8K(tokenizer, longest, **given)]
    from kvist.evaluate.tasks.longbench import LongBench, datasets

    whole = {LONGBENCH: False, LONGBENCH_E: True}
    chosen = datasets(extended=whole[name]) if name in whole else [name.removeprefix("longbench:")]
    return [LongBench(dataset, tokenizer, longest, **given) for dataset in chosen]


def _harness(names: Sequence[str], options: Options, tokenizer) -> list[Task]:
    from kvist.evaluate.tasks import harness

    mode = options.mode or "simulated"  # a continuation fits the exact window of many methods: stored shows nothing
    given: Any = {"shots": options.shots, "chat": options.chat, "mode": mode, "batch": options.batch}
    return list(harness.tasks(names, tokenizer, options.tasks_dir, **given))


def floors(task: Task, model) -> list[Contender]:
    """Contenders that quantize nothing, where a task knows them."""
    return contenders.floors(model.dtype) if task.name == "fidelity" and task.settings["mode"] == "stored" else []


def _windowed(name: str, options: Options, documents: list[str], tokenizer, longest: int) -> list[Task]:
    step, seqlen = options.step or STEP, options.seqlen or min(SEQLEN, longest)
    batch: Any = {"batch": options.batch, "chunk": options.chunk}
    mode = options.mode or "stored"
    if name == "ppl" and options.lengths:
        return [
            Perplexity(_text(options, documents, tokenizer, length), "stored", _before(length), step, **batch)
            for length in options.lengths
        ]
    if name == "ppl":
        chosen, streamed = _text(options, documents, tokenizer, seqlen), options.prompt or options.step
        prompt = _checked(options.prompt or 0, seqlen)
        return [Perplexity(chosen, mode, prompt, step if streamed else None, **batch)]
    if name == "fidelity":
        chosen, prompt = _text(options, documents, tokenizer, seqlen), _checked(options.prompt or 0, seqlen)
        simulated = mode == "simulated"
        return [Fidelity(chosen, mode, prompt, None if simulated else step, **batch)]
    if name == "horizon":
        seqlen = options.seqlen or min(HORIZON, longest)
        if seqlen < 4:
            raise ValueError(f"horizon needs windows of at least 4 tokens, found --seqlen {seqlen}")
        prompt = _checked(options.prompt or 0, seqlen)
        at = tuple(range(STEP * 8, seqlen - prompt - STEP, max(STEP, (seqlen - prompt) // 4 // STEP * STEP)))
        free = min(options.free, seqlen // 2)
        return [Horizon(_text(options, documents, tokenizer, seqlen), prompt, step, at, STEP, free, **batch)]
    prompt = _checked(options.prompt or seqlen // 2, seqlen)
    return [Nuisance(_text(options, documents, tokenizer, seqlen), prompt, step)]


def _recall(name: str, options: Options, documents: list[str], tokenizer, longest: int) -> Recall:
    """Lengths leave room for the question and its answer."""
    room = longest - 128
    lengths = options.lengths or tuple(room * part // 4 for part in (1, 2, 3, 4))
    hay = Haystack.noise() if name == "passkey" else Haystack(tuple(documents), options.data)
    depths = tuple(round(i / max(1, options.depths - 1), 4) for i in range(options.depths))
    samples = options.samples if name in ("passkey", "needle") else options.samples * len(depths)
    if too_long := [length for length in lengths if length > room]:
        raise ValueError(f"the model knows {longest} positions; contexts have at most {room}, found {too_long[0]}")
    return Recall(
        name, tokenizer, hay, lengths, depths, samples, options.seed, options.prefill, options.chunk, options.batch
    )


def _text(options: Options, documents: list[str], tokenizer, seqlen: int) -> Text:
    """The first windows, side by side."""
    found = text.windows(tokenizer, documents, seqlen, options.windows or None)
    if len(found) < options.windows:
        raise ValueError(
            f"{options.data} has {len(found)} windows of {seqlen} tokens, found --windows {options.windows}; "
            "give 0 for all"
        )
    return Text(found, options.data, text.digest(documents))


def _before(length: int) -> int:
    return length - max(2, min(LAST, length // 2))


def _checked(prompt: int, seqlen: int) -> int:
    if prompt > seqlen - 2:
        raise ValueError(f"a prompt leaves at least 2 of a window's {seqlen} tokens to score, found --prompt {prompt}")
    return prompt
