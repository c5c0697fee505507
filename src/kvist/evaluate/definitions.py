"""lm-eval's own task definitions, on documents that we give them: prompts, few-shots, filters, metrics.

They are read from the installed package at run time. A definition downloads its data when its task is made, unless it
is given a function that makes them: `task` gives it one, so that nothing is fetched here.
"""

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

NEEDED = "lm-eval is needed for this and is not installed: pip install 'kvist[eval]'"
MOST = 256  # new tokens where a definition does not say: lm-eval's own default


def harness(module: str = "") -> Any:
    """lm-eval, or a module of it. ValueError where it is not installed."""
    try:
        return import_module(f"lm_eval.{module}" if module else "lm_eval")
    except ModuleNotFoundError as error:
        raise ValueError(f"{NEEDED} ({error})") from None


def version() -> str:
    """Of lm-eval: its definitions may change with it."""
    return harness().__version__


@contextmanager
def quiet() -> Iterator[None]:
    """lm-eval and its packages log what they do at every step; here only their errors are heard."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "jieba")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def names(folder: str) -> list[str]:
    """The tasks that are defined in a folder of lm-eval's."""
    return _manager(folder).all_subtasks


def source(folder: str, name: str) -> tuple[str, str | None]:
    """Dataset and configuration on the Hugging Face hub that a definition names."""
    config = _manager(folder).task_index[name].cfg
    return config["dataset_path"], config.get("dataset_name")


def task(folder: str, name: str, splits: Mapping[str, Sequence[dict]]) -> Any:
    """lm-eval's task of a definition, on these documents per split, none of them empty. Anything that is to be true of
    all documents (their columns) is read off the first."""
    datasets = harness_datasets()
    given = {split: datasets.Dataset.from_list(list(docs)) for split, docs in splits.items()}
    # a group of one: lm-eval's way to change an entry of a definition that has a name
    changed = {"group": f"{name} on given documents", "task": [{"task": name, "custom_dataset": lambda **_: given}]}
    with quiet(), warnings.catch_warnings(action="ignore"):  # of packages that a metric imports
        try:
            made = _manager(folder).load(changed)
        except ImportError as error:
            raise ValueError(f"{name} needs a package: pip install 'kvist[eval]' ({error})") from None
    return made["tasks"][name]


def scored(task, asked: Sequence[Sequence]) -> list[dict[str, dict[str, Any]]]:
    """Of documents, each with its requests (lm-eval's `Instance`) and their responses: per filter, the metrics."""
    every = [request for requests in asked for request in requests]
    filters = [filter_.name for filter_ in task._filters]
    with quiet():
        for filter_ in task._filters:
            filter_.apply(every)
        return [
            {name: task.process_results(r[0].doc, [request.filtered_resps[name] for request in r]) for name in filters}
            for r in asked
        ]


def answered(doc: dict, text: str) -> list:
    """The one request of a document, and the text that was generated for it."""
    instance = harness("api.instance").Instance
    return [instance("generate_until", doc, (), 0, resps=[text])]


def limits(task) -> tuple[int, tuple[str, ...]]:
    """New tokens at most, and what ends an answer."""
    options = task.config.generation_kwargs or {}
    until = options.get("until") or []
    return options.get("max_gen_toks", MOST), tuple([until] if isinstance(until, str) else until)


def harness_datasets() -> Any:
    """The package datasets, which lm-eval needs."""
    try:
        return import_module("datasets")
    except ModuleNotFoundError as error:
        raise ValueError(f"{NEEDED} ({error})") from None


@cache
def _manager(folder: str) -> Any:
    place = Path(harness().__file__).parent / "tasks" / folder
    with quiet():
        return harness("tasks").TaskManager(include_defaults=False, include_path=str(place))
