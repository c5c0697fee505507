"""GSM8K: grade-school mathematics, a few solved problems before each. Prompts, few-shots, extraction and metric are
lm-eval's; ours are the data's place, the cache, and that each problem is read from what is stored of the few-shots."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

from kvist.evaluate import definitions, records
from kvist.evaluate.contenders import Contender
from kvist.evaluate.generation import Prompt, generate
from kvist.evaluate.measures import average
from kvist.evaluate.records import chatted, need_template, split
from kvist.evaluate.registry import Source, task
from kvist.evaluate.settings import Asked, FewShot, Kept, Prefill
from kvist.evaluate.task import Measured

DEFINITION = "gsm8k"
COLUMNS = ("question", "answer")
PLACES = {"test": ("eval/gsm8k/test.jsonl",), "train": ("eval/gsm8k/train.jsonl", "eval/gsm8k/train_first200.jsonl")}
FILTERS = {"strict": "strict-match", "flexible": "flexible-extract"}  # our names of lm-eval's
SEED = 1234  # of few-shots: lm-eval's own default


@dataclass(frozen=True)
class GSM8K:
    """The test problems, or the first `limit`. longest: tokens that the model takes, answers included. data_dir: where
    eval/gsm8k lies; without it data come from the Hugging Face hub. Few-shots are drawn one problem after the other
    from `seed`, as lm-eval draws them, so that they do not depend on which problems are asked."""

    tokenizer: Any
    longest: int
    data_dir: str | Path | None = None
    limit: int | None = None
    shots: int = 5
    chat: bool = False
    seed: int = SEED
    prefill: Prefill = "exact"
    chunk: int = 8192
    batch: int = 8
    name = "gsm8k"
    metric = 1
    recipes_only = False

    def __post_init__(self) -> None:
        if self.chat:
            need_template(self.tokenizer)
        if not 0 <= self.shots <= len(self.splits["train"]):
            raise ValueError(f"expected 0 to {len(self.splits['train'])} few-shots, found {self.shots}")
        for number, prompt in enumerate(self.prompts):
            taken = len(prompt.context) + len(prompt.question) + prompt.most
            if taken > self.longest:
                raise ValueError(
                    f"problem {number} of gsm8k and its answer take {taken} tokens, the model takes {self.longest}; "
                    "give fewer --shots"
                )

    @cached_property
    def splits(self) -> dict[str, list[dict]]:
        if self.data_dir is not None:
            return {split: records.read(self.data_dir, places, COLUMNS) for split, places in PLACES.items()}
        source = definitions.source(DEFINITION, DEFINITION)
        return {split: records.fetch(*source, split, COLUMNS) for split in PLACES}

    @cached_property
    def documents(self) -> list[dict]:
        return records.first(self.splits["test"], self.limit)

    @property
    def settings(self) -> dict[str, Any]:
        own = {"shots": self.shots, "seed": self.seed, "chat": self.chat, "prefill": self.prefill}
        data = {"data": records.digest(self.splits["test"]), "few_shots": records.digest(self.splits["train"])}
        return data | own | {"definition": f"{DEFINITION} {_scorer().VERSION}", "lm_eval": definitions.version()}

    @property
    def count(self) -> int:
        return len(self.documents)

    def kin(self, item: int) -> None:
        """Prompts of unequal lengths go together, padded."""

    @cached_property
    def prompts(self) -> list[Prompt]:
        task = definitions.task(DEFINITION, DEFINITION, self.splits)
        task.set_fewshot_seed(self.seed)
        most, stops = definitions.limits(task)
        options = {"fewshot_as_multiturn": True, "chat_template": partial(chatted, self.tokenizer)} if self.chat else {}
        found = []
        for doc in self.documents:
            text = task.fewshot_context(doc, num_fewshot=self.shots, apply_chat_template=self.chat, **options)
            found.append(split(self.tokenizer, text, task.doc_to_text(doc), most, stops))
        return found

    def measure(self, model, contenders: Sequence[Contender], items: Sequence[int]) -> Iterator[Measured]:
        prompts = [self.prompts[number] for number in items]
        expected = [[self.documents[number]["answer"]] for number in items]
        for found in generate(model, self.tokenizer, contenders, prompts, self.prefill, self.chunk):
            values = rescored(self.settings, {"prediction": found.texts, "expected": expected})
            yield Measured(found.contender, found.bits, found.seconds, values)


def rescored(settings: dict, values: dict[str, list]) -> dict[str, list]:
    """The values with scores of their predictions, 0 or 1: strict, the number behind "####"; flexible, the last number
    anywhere; score, the strict one."""
    pairs = zip(values["expected"], values["prediction"], strict=True)
    asked = [definitions.answered({"question": "", "answer": expected[0]}, text) for expected, text in pairs]
    found = definitions.scored(_scorer(), asked)
    own = {name: [float(each[filter_]["exact_match"]) for each in found] for name, filter_ in FILTERS.items()}
    return values | own | {"score": own["strict"]}


@cache
def _scorer() -> Any:
    """lm-eval's task on no problem in particular: enough for its filters and its metric."""
    nothing = [{"question": "", "answer": "#### 0"}]
    return definitions.task(DEFINITION, DEFINITION, {"train": nothing, "test": nothing})


@dataclass(frozen=True)
class Options(FewShot, Asked, Kept):
    """The data lie in eval/gsm8k."""


@task(
    "gsm8k",
    "problems in words, few-shot; prompts and metrics of lm-eval",
    options=Options,
    statistics={name: average(name) for name in FILTERS},
    rescored=rescored,
)
def gsm8k(options: Options, source: Source) -> list[GSM8K]:
    given = {name: value for name, value in vars(options).items() if value is not None}
    return [GSM8K(source.tokenizer, source.longest, **given)]
