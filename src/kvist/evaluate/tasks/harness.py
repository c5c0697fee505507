"""Tasks of lm-eval by name, for `lm-eval:NAME,…`: its requests, its filters and its metrics, our caches and results."""

import io
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from kvist.evaluate import definitions, records
from kvist.evaluate.contenders import Contender
from kvist.evaluate.records import chatted, need_template
from kvist.evaluate.registry import Source, task
from kvist.evaluate.settings import Batched, Defined, FewShot, Mode, Moded
from kvist.evaluate.task import Measured

PREFIX = "lm-eval:"
PLACES = ("dataset_path", "dataset_name", "dataset_kwargs", "metadata", "num_fewshot")  # no part of what is asked


@dataclass(frozen=True)
class Harness:
    """One task of lm-eval, `task`, made by it; its documents, or the first `limit`. mode: how log-likelihoods are
    taken. Few-shots are drawn for all documents in order, so that they do not depend on which are asked."""

    task: Any
    tokenizer: Any
    mode: Mode = "simulated"
    limit: int | None = None
    chat: bool = False
    batch: int = 8
    metric = 1
    recipes_only = True

    @property
    def name(self) -> str:
        return PREFIX + self.task.task_name

    @cached_property
    def data(self) -> str:
        """A hash of all documents, and of those that few-shots are drawn from."""
        shots = [dict(doc) for doc in (self.task.fewshot_docs() or [])] if self.task.config.num_fewshot else []
        return records.digest([dict(doc) for doc in self.task.eval_docs] + shots)

    @cached_property
    def definition(self) -> str:
        """A hash of what the task asks and how it scores, wherever it and its data lie."""
        known = self.task.config.to_dict()
        return records.digest([{name: known[name] for name in known if name not in PLACES}])

    @property
    def settings(self) -> dict[str, Any]:
        own = {"mode": self.mode, "shots": self.task.config.num_fewshot or 0, "chat": self.chat}
        return own | {"data": self.data, "definition": self.definition, "lm_eval": definitions.version()}

    @property
    def count(self) -> int:
        return len(self.requests)

    def kin(self, item: int) -> None:
        """Sequences of unequal lengths are kept apart where they meet a cache."""

    @cached_property
    def requests(self) -> list[list[Any]]:
        """Per document: lm-eval's requests, in order."""
        task = self.task
        task.set_fewshot_seed(harness_seed())
        with definitions.quiet(), redirect_stderr(io.StringIO()):  # a bar of its own, whatever is asked
            task.build_all_requests(
                limit=self.limit,
                apply_chat_template=self.chat,
                fewshot_as_multiturn=self.chat,
                chat_template=partial(chatted, self.tokenizer) if self.chat else None,
            )
        found: dict[int, list] = {}
        for request in task.instances:
            found.setdefault(request.doc_id, []).append(request)
        return [sorted(found[number], key=lambda request: request.idx) for number in sorted(found)]

    def measure(self, model, contenders: Sequence[Contender], items: Sequence[int]) -> Iterator[Measured]:
        from kvist.evaluate.lm_eval import KvistLM

        lm, options = None, {"mode": self.mode, "tokenizer": self.tokenizer, "batch_size": self.batch}
        for i, contender in enumerate(contenders):
            assert contender.recipe is not None, "tasks of lm-eval are for recipes only"
            if lm is None:
                with definitions.quiet():
                    lm = KvistLM(model, method=contender.recipe, **options)
                lm.silent = True
            lm.take(contender.recipe)
            asked = [[replace(r, resps=[], filtered_resps={}) for r in self.requests[number]] for number in items]
            began = time.perf_counter()
            _answer(lm, [request for requests in asked for request in requests])
            seconds = time.perf_counter() - began
            yield Measured(i, lm.bits_per_element, seconds, self.values(asked))

    def values(self, asked: Sequence[Sequence]) -> dict[str, list]:
        """Of answered requests per document: each metric by its name (and its filter's, where there are several) as a
        number, or as the numbers that lm-eval makes one of; score, the first metric if it is a number per document;
        response, what the model said."""
        found = definitions.scored(self.task, asked)
        values: dict[str, list] = {}
        for filter_ in found[0]:
            for metric in found[0][filter_]:
                name = metric if len(found[0]) == 1 else f"{metric},{filter_}"
                values[name] = [_plain(each[filter_][metric]) for each in found]
        first = next(iter(values.values()))
        score = {} if isinstance(first[0], list) else {"score": first}
        return score | values | {"response": [_plain([r.resps[0] for r in requests]) for requests in asked]}

    def totals(self, values: dict[str, list]) -> dict[str, float]:
        """What lm-eval makes of all documents' values, per metric."""
        known = self.task.aggregation()
        return {
            name: known[name.split(",")[0]]([tuple(v) if isinstance(v, list) else v for v in column])
            for name, column in values.items()
            if name.split(",")[0] in known
        }


def tasks(
    names: Sequence[str],
    tokenizer: Any,
    include_path: str | Path | None = None,
    shots: int | None = None,
    chat: bool = False,
    **options,
) -> list[Harness]:
    """The tasks of names of lm-eval's: tasks, groups and tags. include_path: a folder with definitions of one's own.
    Their data are fetched by lm-eval. ValueError for a name that there is not, or data that cannot be had."""
    if chat:
        need_template(tokenizer)
    with definitions.quiet():
        manager = _manager(names, include_path)
        for name in names:
            if name not in manager.task_index:
                raise ValueError(
                    f"expected the name of a task of lm-eval, found {name!r}; `kvist lm-eval ls tasks` lists them"
                )
        try:
            with warnings.catch_warnings(action="ignore"):  # of packages that a metric imports
                made = manager.load(list(names))["tasks"]
        except Exception as error:  # lm-eval, datasets and the hub's client raise many kinds
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ValueError(f"{', '.join(names)} cannot be made by lm-eval: {reason}; try another task") from error
    for one in made.values():
        if shots is not None and one.config.num_fewshot != 0:
            one.set_config(key="num_fewshot", value=shots)
    return [Harness(one, tokenizer, chat=chat, **options) for one in made.values()]


def harness_seed() -> int:
    """Of few-shots: lm-eval's own default."""
    return definitions.harness("defaults").DEFAULT_OTHER_SEED


def _manager(names: Sequence[str], include_path: str | Path | None) -> Any:
    """lm-eval's own definitions are thousands of files: they are read only for a name that is not one's own."""
    manager = definitions.harness("tasks").TaskManager
    if include_path is not None:
        if not Path(include_path).is_dir():
            raise ValueError(f"expected a folder with definitions of tasks, found none at {include_path}")
        own = manager(include_path=str(include_path), include_defaults=False)
        if all(name in own.task_index for name in names):
            return own
    return manager(include_path=None if include_path is None else str(include_path))


def _answer(lm, requests: Sequence) -> None:
    """Give each request its responses, as many as it asks for."""
    kinds: dict[str, list] = {}
    for request in requests:
        kinds.setdefault(request.request_type, []).extend([request] * request.repeats)
    for kind, asked in kinds.items():
        with definitions.quiet():
            responses = getattr(lm, kind)(asked, disable_tqdm=True)
        for request, response in zip(asked, responses, strict=True):
            request.resps.append(response)


def _plain(value: Any) -> Any:
    """A number, text or list that JSON has."""
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, bool | str) or value is None:
        return value
    return value.tolist() if hasattr(value, "tolist") else float(value)


@dataclass(frozen=True)
class Options(Defined, FewShot, Batched, Moded):
    """mode: how log-likelihoods are taken."""


@task(
    "lm-eval",
    "any task of lm-eval, several with commas: log-likelihoods, simulated or stored",
    options=Options,
    suffix="NAME",
    bare=False,
)
def named(options: Options, source: Source) -> list[Harness]:
    given = {"shots": options.shots, "chat": options.chat, "batch": options.batch}
    # a continuation fits the exact window of many methods: stored shows nothing
    mode = options.mode or "simulated"
    return tasks(source.of.split(","), source.tokenizer, options.tasks_dir, mode=mode, **given)
