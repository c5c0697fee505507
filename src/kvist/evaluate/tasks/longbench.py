"""LongBench (arXiv 2308.14508) and LongBench-E: long documents, 21 tasks and 13. Prompts, limits and metrics are
lm-eval's; ours are the data's place, the middle that is left out of what a model cannot take, and the cache."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

from kvist.evaluate import definitions, records
from kvist.evaluate.contenders import Contender
from kvist.evaluate.generation import Prompt, generate
from kvist.evaluate.records import chatted, need_template, split, tokens, without_middle
from kvist.evaluate.registry import Source, task
from kvist.evaluate.settings import Asked, Chatty, Kept, Prefill
from kvist.evaluate.task import Measured

FOLDER = "longbench"
PREFIX = "longbench_"
EXTENDED = "_e"
COLUMNS = ("context", "input|question", "answers", "all_classes")
# few-shot and code tasks go on with a text; the benchmark gives them no chat template
PLAIN = ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p")


def datasets(extended: bool = False) -> list[str]:
    """The names of LongBench's datasets, or those of LongBench-E, which end in "_e"."""
    found = [name.removeprefix(PREFIX) for name in definitions.names(FOLDER)]
    return [name for name in found if name.endswith(EXTENDED) == extended]


@dataclass(frozen=True)
class LongBench:
    """One dataset, or its first `limit` documents. longest: tokens that the model takes, answers included; the middle
    of a longer prompt is left out. data_dir: where eval/longbench/DATASET.jsonl lies; without it data come from the
    Hugging Face hub. chat: the model's chat template, where the benchmark uses one."""

    dataset: str
    tokenizer: Any
    longest: int
    data_dir: str | Path | None = None
    limit: int | None = None
    chat: bool = False
    prefill: Prefill = "exact"
    chunk: int = 8192
    batch: int = 1
    metric = 1
    recipes_only = False

    def __post_init__(self) -> None:
        known = datasets() + datasets(extended=True)
        if self.dataset not in known:
            raise ValueError(f"expected a dataset of LongBench ({', '.join(known)}), found {self.dataset!r}")
        if self.chats:
            need_template(self.tokenizer)
        if self.room < 2:
            raise ValueError(
                f"answers of {self.dataset} take {self.limits[0]} tokens, and the model takes {self.longest} in all; "
                "give a model that takes more"
            )
        for number, doc in enumerate(self.documents):
            answers = doc["answers"]
            if not isinstance(answers, list) or not answers or not all(isinstance(each, str) for each in answers):
                raise ValueError(f"document {number} of {self.dataset}: expected a list of answers, found {answers!r}")

    @property
    def name(self) -> str:
        return f"longbench:{self.dataset}"

    @property
    def chats(self) -> bool:
        return self.chat and self.dataset.removesuffix(EXTENDED) not in PLAIN

    @cached_property
    def every(self) -> list[dict]:
        if self.data_dir is not None:
            found = records.read(self.data_dir, [f"eval/longbench/{self.dataset}.jsonl"], COLUMNS)
        else:
            found = records.fetch(*definitions.source(FOLDER, PREFIX + self.dataset), "test", COLUMNS)
        # the benchmark's own files say "input" for what lm-eval's dataset calls "question"
        return [doc if "question" in doc else doc | {"question": doc["input"]} for doc in found]

    @cached_property
    def documents(self) -> list[dict]:
        return records.first(self.every, self.limit)

    @property
    def limits(self) -> tuple[int, tuple[str, ...]]:
        return definitions.limits(_scorer(self.dataset))

    @cached_property
    def room(self) -> int:
        """Tokens of a prompt, without those of an empty chat."""
        around = tokens(self.tokenizer, chatted(self.tokenizer, _said(""))) if self.chats else []
        return self.longest - self.limits[0] - len(around)

    @property
    def settings(self) -> dict[str, Any]:
        own = {"longest": self.longest, "chat": self.chats, "prefill": self.prefill}
        version = _scorer(self.dataset).VERSION
        definition = {"definition": f"{PREFIX}{self.dataset} {version}", "lm_eval": definitions.version()}
        return {"dataset": self.dataset, "data": records.digest(self.every)} | own | definition

    @property
    def count(self) -> int:
        return len(self.documents)

    def kin(self, item: int) -> None:
        """Prompts of unequal lengths go together, padded, where there is a batch."""

    def item(self, number: int) -> Prompt:
        """A prompt; the question is what stands behind the document in it."""
        doc = self.documents[number]
        text = _scorer(self.dataset).doc_to_text(doc)
        question = text[text.rfind(doc["context"]) + len(doc["context"]) :]
        ids = tokens(self.tokenizer, text)
        if not self.chats:
            return split(self.tokenizer, text, question, *self.limits, ids=without_middle(ids, self.room))
        room = self.room
        while True:  # a text may take a few tokens more where two halves of it meet
            said = self._text(text, ids, room)
            whole = chatted(self.tokenizer, _said(said))
            over = len(tokens(self.tokenizer, whole)) + self.limits[0] - self.longest
            if over <= 0:
                return split(self.tokenizer, whole, question, *self.limits)
            room -= over

    def _text(self, text: str, ids: list[int], room: int) -> str:
        """The text, or its halves, decoded: a chat template takes no tokens."""
        kept = without_middle(ids, room)
        if kept is ids:
            return text
        halves = kept[: len(kept) // 2], kept[len(kept) // 2 :]
        return "".join(self.tokenizer.decode(half, skip_special_tokens=True) for half in halves)

    def measure(self, model, contenders: Sequence[Contender], items: Sequence[int]) -> Iterator[Measured]:
        prompts, docs = [self.item(number) for number in items], [self.documents[number] for number in items]
        known = {
            "expected": [list(doc["answers"]) for doc in docs],
            "classes": [list(doc["all_classes"] or ()) for doc in docs],
        }
        for found in generate(model, self.tokenizer, contenders, prompts, self.prefill, self.chunk):
            values = rescored(self.settings, {"prediction": found.texts} | known)
            yield Measured(found.contender, found.bits, found.seconds, values)


def rescored(settings: dict, values: dict[str, list]) -> dict[str, list]:
    """The values with scores of their predictions, 0 to 1: the dataset's metric, of the answer that fits best."""
    rows = zip(values["expected"], values["classes"], values["prediction"], strict=True)
    asked = [
        definitions.answered({"answers": answers, "all_classes": classes}, text) for answers, classes, text in rows
    ]
    found = definitions.scored(_scorer(settings["dataset"]), asked)
    return values | {"score": [float(metrics["score"]) for each in found for metrics in each.values()]}


def _said(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@cache
def _scorer(dataset: str) -> Any:
    """lm-eval's task on no document in particular: enough for its prompt, its limits and its metric."""
    nothing = {"context": "", "question": "", "answers": [""], "all_classes": [""]}
    return definitions.task(FOLDER, PREFIX + dataset, {"test": [nothing]})


@dataclass(frozen=True)
class Options(Chatty, Asked, Kept):
    """The data lie in eval/longbench; a chat template is used where the benchmark uses one."""


def _every(options: Options, source: Source, extended: bool) -> list[LongBench]:
    chosen = [source.of] if source.of else datasets(extended)
    return [LongBench(dataset, source.tokenizer, source.longest, **vars(options)) for dataset in chosen]


_ALL = "all of LongBench, or longbench:NAME; prompts and metrics of lm-eval"
task("longbench", _ALL, options=Options, rescored=rescored, suffix="NAME")(partial(_every, extended=False))
task("longbench-e", "all of LongBench-E", options=Options)(partial(_every, extended=True))
