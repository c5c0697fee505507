"""GSM8K: prompts and extraction are lm-eval's own; what is read from stored keys and values is the problem."""

import json
import subprocess
import sys

import pytest
import torch

from kvist.demo.model import load
from kvist.evaluate.contenders import Contender
from kvist.evaluate.results import Results
from kvist.evaluate.task import Subject, run
from kvist.evaluate.tasks.gsm8k import GSM8K, rescored
from kvist.methods import parse

pytest.importorskip("lm_eval")

PROBLEM = "A shelf has {} books and gets {} more. How many books are there?"
ANSWER = "{0} + {1} = <<{0}+{1}={2}>>{2} books.\n#### {2}"


@pytest.fixture(scope="module")
def bundled():
    return load(dtype="float32")


def documents(start: int, count: int) -> list[dict]:
    sums = [(n, 2 * n + 1, 3 * n + 1) for n in range(start, start + count)]
    return [{"question": PROBLEM.format(*each), "answer": ANSWER.format(*each)} for each in sums]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("data")
    (place / "eval" / "gsm8k").mkdir(parents=True)
    for name, docs in (("test", documents(2, 4)), ("train_first200", documents(50, 9))):
        lines = "".join(json.dumps(doc) + "\n" for doc in docs)
        (place / "eval" / "gsm8k" / f"{name}.jsonl").write_text(lines)
    return place


@pytest.fixture(scope="module")
def theirs(bundled, folder, tmp_path_factory):
    """What lm-eval's own loop, on the same files, asks and answers with its own model class."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    files = {"test": "test", "train": "train_first200"}
    files = {split: str(folder / "eval" / "gsm8k" / f"{name}.jsonl") for split, name in files.items()}
    place, definition = tmp_path_factory.mktemp("theirs"), f"{lm_eval.__path__[0]}/tasks/gsm8k/gsm8k.yaml"
    lines = [f"include: {definition}", "dataset_path: json", "dataset_name: null"]
    (place / "ours.yaml").write_text("\n".join([*lines, f"dataset_kwargs: {json.dumps({'data_files': files})}"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", place / "cache")
        return lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": bundled[0], "tokenizer": bundled[1], "batch_size": 2},
            tasks=["gsm8k"],
            task_manager=TaskManager(include_path=str(place), include_defaults=False),
            bootstrap_iters=0,
            limit=2,
        )


def test_prompts_are_lm_evals(bundled, folder, theirs):
    task = GSM8K(bundled[1], 2048, folder, limit=2)
    samples = [each for each in theirs["samples"]["gsm8k"] if each["filter"] == "strict-match"]
    assert task.count == len(samples) == 2
    for prompt, sample in zip(task.prompts, samples, strict=True):
        text, options = sample["arguments"][0]
        assert list(prompt.context + prompt.question) == bundled[1](text)["input_ids"]
        assert list(prompt.stops) == options["until"]
        asked = bundled[1].decode(prompt.question).strip()
        assert asked == f"Question: {sample['doc']['question']}\nAnswer:"


def test_answers_and_scores_are_lm_evals(bundled, folder, theirs, tmp_path):
    """Under the exact cache. The model knows nothing of sums: extraction has a test of its own."""
    model, tokenizer = bundled
    task = GSM8K(tokenizer, 2048, folder, limit=2)
    results = Results(tmp_path / "results.jsonl")
    [cell] = run(task, Subject.of(model), [Contender("exact", parse("exact"))], results)
    for filter_, name in (("strict-match", "strict"), ("flexible-extract", "flexible")):
        samples = [each for each in theirs["samples"]["gsm8k"] if each["filter"] == filter_]
        assert cell.values["prediction"] == [each["resps"][0][0] for each in samples]
        assert cell.values[name] == [each["exact_match"] for each in samples]
    assert cell.values["score"] == cell.values["strict"]
    values = {name: cell.values[name] for name in ("prediction", "expected")}
    assert rescored(task.settings, values) == cell.values


def test_extraction():
    said = {
        "It is 7.\n#### 7": (1, 1),
        "The answer is 7.": (0, 1),
        "#### 7 then 8": (1, 0),
        "#### 1,007": (0, 0),
        "no number": (0, 0),
        "": (0, 0),
        "first 8, so $7.00": (0, 0),
    }
    found = rescored({}, {"prediction": list(said), "expected": [["3 + 4 = <<3+4=7>>7\n#### 7"]] * len(said)})
    assert list(zip(found["strict"], found["flexible"], strict=True)) == list(said.values())
    assert rescored({}, {"prediction": ["#### 1,007"], "expected": [["#### 1007"]]})["score"] == [1.0]


def test_settings_say_what_decides(bundled, folder, tmp_path):
    task = GSM8K(bundled[1], 2048, folder)
    assert task.settings == GSM8K(bundled[1], 2048, folder, limit=1, batch=2).settings
    for other in (GSM8K(bundled[1], 2048, folder, shots=2), GSM8K(bundled[1], 2048, folder, seed=5)):
        assert other.settings != task.settings and other.prompts != task.prompts
    json.dumps(task.settings)


def test_a_problem_does_not_depend_on_the_others(bundled, folder):
    whole, part = (GSM8K(bundled[1], 2048, folder, limit=limit).prompts for limit in (None, 1))
    assert whole[:1] == part


def test_chat(bundled, folder):
    tokenizer = load(dtype="float32")[1]
    tokenizer.chat_template = "<s>{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}[assistant]"
    task = GSM8K(tokenizer, 2048, folder, shots=1, chat=True)
    prompt = task.prompts[0]
    text = tokenizer.decode(prompt.context + prompt.question)
    assert text.count("[user]") == 2 and text.count("[assistant]") == 2 and text.count("<s>") == 1
    assert task.documents[0]["question"] in tokenizer.decode(prompt.question)
    with pytest.raises(ValueError, match=r"expected a chat template .* found none; leave --chat out"):
        GSM8K(bundled[1], 2048, folder, chat=True)


def test_from_the_hub(bundled, monkeypatch):
    asked = []

    def rows(path, name, split):
        asked.append((path, name, split))
        return documents(3, 8)

    monkeypatch.setattr("datasets.load_dataset", rows)
    task = GSM8K(bundled[1], 2048, limit=2, shots=0)
    assert task.count == 2 and asked == [("openai/gsm8k", "main", "test"), ("openai/gsm8k", "main", "train")]
    assert len(task.prompts[0].context) >= 1

    def offline(path, name, split):
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(
        ValueError, match=r"openai/gsm8k \(main, test\) cannot be fetched .*: no network; give --data-dir"
    ):
        GSM8K(bundled[1], 2048)


def test_bad_input_is_one_sentence(bundled, folder, tmp_path):
    with pytest.raises(ValueError, match=r"expected eval/gsm8k/test.jsonl in .*, found none"):
        GSM8K(bundled[1], 2048, tmp_path)
    with pytest.raises(ValueError, match=r"take .* tokens, the model takes 300; give fewer --shots"):
        GSM8K(bundled[1], 300, folder)
    with pytest.raises(ValueError, match="expected 0 to 9 few-shots, found 10"):
        GSM8K(bundled[1], 2048, folder, shots=10)
    (tmp_path / "eval" / "gsm8k").mkdir(parents=True)
    file = tmp_path / "eval" / "gsm8k" / "test.jsonl"
    for text, words in (
        ('{"question": "a"}\n', "line 1 of .* has no 'answer': expected 'question', 'answer', found 'question'"),
        ("\n[1]\n", "line 2 of .* is no document"),
        ("{\n", "line 1 of .* is no JSON"),
        ("\n", "expected a document per line"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=words):
            GSM8K(bundled[1], 2048, tmp_path)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="cannot be read: it is not text in UTF-8"):
        GSM8K(bundled[1], 2048, tmp_path)


def test_lm_eval_is_imported_late():
    code = "import sys, kvist.cli.lm_eval; from kvist.evaluate.tasks import gsm8k, harness, longbench; "
    code += "sys.exit('lm_eval' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_padding_and_two_bits(bundled, folder, monkeypatch):
    """Prompts of unequal lengths in one batch say what they say alone."""
    monkeypatch.setattr("kvist.evaluate.definitions.MOST", 24)
    model, tokenizer = bundled
    together, alone = (GSM8K(tokenizer, 2048, folder, limit=2, shots=2, batch=batch) for batch in (2, 1))
    chosen = [Contender(text, parse(text)) for text in ("exact", "kivi k=2 v=2 group=32 recent=32")]
    cells = [run(task, Subject.of(model), chosen, Results()) for task in (together, alone)]
    assert cells[0][0].values["prediction"] == cells[1][0].values["prediction"]
    assert cells[0][1].values["prediction"] == cells[1][1].values["prediction"]
    assert cells[0][0].values["prediction"] != cells[0][1].values["prediction"]
    assert cells[0][1].bits < torch.finfo(torch.float32).bits
