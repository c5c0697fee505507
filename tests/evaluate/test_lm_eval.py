"""Through lm-eval: quantization shows in log-likelihoods, padding does not, and its own results say what it was."""

import json
import sys

import pytest
import torch
from typer.testing import CliRunner

from kvist.demo.model import load
from kvist.evaluate.contenders import Contender
from kvist.evaluate.results import Results
from kvist.evaluate.task import Subject, run
from kvist.evaluate.tasks import harness
from kvist.methods import parse

pytest.importorskip("lm_eval")

TEXT = (
    "It was a bright cold day in April, and the clocks were striking thirteen. The hall smelt of cabbage and old mats. "
)
CHOICE = """
task: birds
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}, train: {data}}}}}
test_split: test
fewshot_split: train
output_type: multiple_choice
doc_to_text: "{{{{text}}}}\\nQuestion: {{{{question}}}}\\nAnswer:"
doc_to_target: answer
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
ROLLING = """
task: lines
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - {{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}}
metadata: {{version: 1.0}}
"""
WRITING = """
task: going_on
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{question}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 6, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""


@pytest.fixture(scope="module")
def bundled():
    return load(dtype="float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Definitions and data of three tasks, four documents of unequal lengths."""
    place = tmp_path_factory.mktemp("own")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", place / "cache")
        data = place / "birds.jsonl"
        docs = [
            {
                "text": TEXT * (2 + i),
                "question": f"What of day {i}?",
                "choices": ["cold", "very hot", "blue"],
                "answer": 0,
            }
            for i in range(4)
        ]
        data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
        for name, text in (("birds", CHOICE), ("lines", ROLLING), ("going_on", WRITING)):
            (place / f"{name}.yaml").write_text(text.format(data=data))
        yield place


@pytest.fixture(scope="module")
def likelihoods(bundled, folder):
    """By model class and arguments: log-likelihoods of all requests, and lm-eval's results."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    import kvist.evaluate.lm_eval  # noqa: F401

    known = {}

    def found(name: str, tasks=("birds", "lines"), **arguments):
        key = name, tasks, tuple(sorted(arguments.items()))
        if key not in known:
            model, tokenizer = bundled
            manager = TaskManager(include_path=str(folder), include_defaults=False)
            arguments = {"pretrained": model, "tokenizer": tokenizer, "batch_size": 2} | arguments
            results = lm_eval.simple_evaluate(
                model=name, model_args=arguments, tasks=list(tasks), task_manager=manager, bootstrap_iters=0
            )
            samples = [each for task in tasks for each in results["samples"][task]]
            known[key] = [r for each in samples for r in each["resps"]], results
        return known[key]

    return found


def numbers(responses) -> torch.Tensor:
    """Of a choice, its log-likelihood; of a rolling one, the only number."""
    flat = [response[0] for response in responses]
    return torch.tensor([each[0] if isinstance(each, tuple) else each for each in flat], dtype=torch.float64)


@pytest.mark.parametrize("mode", ["simulated", "stored"])
def test_exact_is_what_lm_eval_gives(likelihoods, mode: str):
    plain, _ = likelihoods("hf", batch_size=1)
    ours, results = likelihoods("kvist", method="exact", mode=mode)
    assert len(plain) == 4 * 3 + 4
    torch.testing.assert_close(numbers(ours), numbers(plain), atol=1e-5, rtol=1e-5)
    said = results["config"]["kvist"]
    assert said["mode"] == mode and said["method"] == "exact" and said["recipe"]["name"] == "exact"
    json.dumps(said)


@pytest.mark.parametrize("mode", ["simulated", "stored"])
def test_a_batch_is_its_rows(likelihoods, mode: str, method: str = "kivi k=2 v=2 group=32 recent=32"):
    """Right padding is seen by no causal logit, but it would be by scales that tokens share."""
    together, _ = likelihoods("kvist", method=method, mode=mode)
    alone, _ = likelihoods("kvist", method=method, mode=mode, batch_size=1)
    torch.testing.assert_close(numbers(together), numbers(alone), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("mode", ["simulated", "stored"])
def test_two_bits_show(likelihoods, mode: str):
    exact, _ = likelihoods("kvist", method="exact", mode=mode)
    coded, results = likelihoods("kvist", method="kivi k=2 v=2 group=32 recent=32", mode=mode)
    moved = (numbers(coded) - numbers(exact)).abs()
    assert (moved > 1e-3).float().mean() > 0.9
    assert 2 < results["config"]["kvist"]["bits_per_element"] < 32


def test_modes_differ(likelihoods):
    simulated, stored = (
        numbers(likelihoods("kvist", method="kivi k=2 v=2 group=32 recent=32", mode=mode)[0])
        for mode in ("simulated", "stored")
    )
    assert not torch.allclose(simulated, stored)


def test_generation_uses_the_cache(likelihoods):
    plain, _ = likelihoods("hf", ("going_on",), batch_size=2)
    exact, _ = likelihoods("kvist", ("going_on",), method="exact")
    assert exact == plain
    coded, results = likelihoods("kvist", ("going_on",), method="hadamard k=1 v=1")
    assert coded != plain
    assert results["config"]["kvist"]["bits_per_element"] < 20


def test_in_our_runner(bundled, folder, likelihoods, tmp_path):
    """The same numbers as lm-eval's own loop, in rows that a later run goes on from."""
    model, tokenizer = bundled
    made = harness.tasks(["birds", "lines"], tokenizer, folder, mode="simulated", batch=2)
    assert [task.name for task in made] == ["lm-eval:birds", "lm-eval:lines"]
    contenders = [Contender(text, parse(text)) for text in ("exact", "int4")]
    results = Results(tmp_path / "results.jsonl")
    cells = [run(task, Subject.of(model), contenders, results) for task in made]
    for contender, *found in zip(("exact", "int4"), *cells, strict=True):
        theirs, whole = likelihoods("kvist", method=contender, mode="simulated", batch_size=1)
        ours = [r for cell in found for requests in cell.values["response"] for r in requests]
        ours = [each[0] if isinstance(each, list) else each for each in ours]
        torch.testing.assert_close(torch.tensor(ours).double(), numbers(theirs), atol=1e-4, rtol=1e-5)
        totals = [task.totals(cell.values) for task, cell in zip(made, found, strict=True)]
        assert totals[0]["acc"] == pytest.approx(whole["results"]["birds"]["acc,none"])
        assert totals[1]["word_perplexity"] == pytest.approx(
            whole["results"]["lines"]["word_perplexity,none"], rel=1e-4
        )
        assert found[0].values["score"] == found[0].values["acc"] and "score" not in found[1].values
    again = Results(tmp_path / "results.jsonl")
    only = harness.tasks(["birds"], tokenizer, folder, mode="simulated", limit=3)[0]
    assert only.count == 3
    run(only, Subject.of(model), contenders, again)
    assert sum(map(len, again.rows.values())) == sum(map(len, results.rows.values())), "measured twice"


def test_few_shots_do_not_depend_on_the_items(bundled, folder):
    _, tokenizer = bundled
    whole, part = (harness.tasks(["birds"], tokenizer, folder, shots=2, limit=limit)[0] for limit in (None, 2))
    assert [r.args for r in whole.requests[1]] == [r.args for r in part.requests[1]]
    assert whole.settings == part.settings and whole.settings["shots"] == 2
    assert whole.requests[0][0].args[0].count("Question:") == 3


def test_bad_input_is_one_sentence(bundled, folder, tmp_path):
    from kvist.evaluate.lm_eval import KvistLM

    model, tokenizer = bundled
    for options, words in (
        ({"mode": "fake"}, "a mode is"),
        ({"batch_size": "auto"}, "expected a number as batch size"),
        ({"method": "kivy:2"}, "kivy"),
        ({"method": "kvquant:3"}, "needs"),
    ):
        with pytest.raises(ValueError, match=words):
            KvistLM(model, tokenizer=tokenizer, **options)
    with pytest.raises(ValueError, match="expected a folder with definitions"):
        harness.tasks(["birds"], tokenizer, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="expected a chat template"):
        harness.tasks(["birds"], tokenizer, folder, chat=True)
    (tmp_path / "gone.yaml").write_text(CHOICE.format(data=tmp_path / "gone.jsonl").replace("birds", "gone"))
    with pytest.raises(ValueError, match="gone cannot be made by lm-eval"):
        harness.tasks(["gone"], tokenizer, tmp_path)


def test_without_lm_eval(monkeypatch, bundled):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ValueError, match=r"pip install 'kvist\[eval\]'"):
        harness.tasks(["birds"], bundled[1])


def test_the_command_is_lm_evals_own(monkeypatch):
    import lm_eval.__main__
    import typer
    from lm_eval.api.registry import get_model

    from kvist.cli import lm_eval as command

    app = typer.Typer()
    app.callback()(lambda: None)
    app.command("lm-eval", context_settings=command.SETTINGS, add_help_option=False)(command.lm_eval)
    told = CliRunner().invoke(app, ["lm-eval", "run", "--help"])
    assert told.exit_code == 0 and "--model_args" in told.output
    seen = []
    monkeypatch.setattr(lm_eval.__main__, "cli_evaluate", lambda: seen.append((list(sys.argv), get_model("kvist"))))
    before = sys.argv
    arguments = [
        "--model",
        "kvist",
        "--model_args",
        "pretrained=x,method=kivi:2",
        "mode=stored",
        "-h",
        "--",
        "--tasks",
        "a",
    ]
    outcome = CliRunner().invoke(app, ["lm-eval", *arguments], catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    assert seen[0][0] == ["kvist lm-eval", *arguments] and seen[0][1].__name__ == "KvistLM"
    assert sys.argv is before
