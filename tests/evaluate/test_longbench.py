"""LongBench: its metrics against other programs of them, the middle left out, and the folder of data."""

import difflib
import json

import pytest
import torch

from kvist.demo.model import load
from kvist.evaluate.contenders import Contender
from kvist.evaluate.results import Results
from kvist.evaluate.task import Subject, run
from kvist.evaluate.tasks.longbench import PLAIN, LongBench, datasets, rescored
from kvist.methods import parse

pytest.importorskip("lm_eval")
pytest.importorskip("rouge")

STORY = "The council met on Monday to discuss the flood. Two bridges were closed and the school served as a shelter. "


@pytest.fixture(scope="module")
def bundled():
    return load(dtype="float32")


def document(**changed) -> dict:
    own = {"input": "What was closed?", "context": STORY * 4, "answers": ["two bridges"], "all_classes": None}
    return own | {"length": 80, "dataset": "any", "language": "en", "_id": "0"} | changed


@pytest.fixture
def folder(tmp_path):
    """A folder of data, and what writes a dataset into it."""
    (tmp_path / "eval" / "longbench").mkdir(parents=True)

    def write(dataset: str, *docs: dict):
        lines = "".join(json.dumps(doc, ensure_ascii=False) + "\n" for doc in docs)
        (tmp_path / "eval" / "longbench" / f"{dataset}.jsonl").write_text(lines, encoding="utf-8")
        return tmp_path

    return write


def scores(dataset: str, predictions: list[str], expected: list[list[str]], classes=None) -> list[float]:
    classes = classes or [[]] * len(predictions)
    return rescored({"dataset": dataset}, {"prediction": predictions, "expected": expected, "classes": classes})[
        "score"
    ]


def test_twenty_one_and_thirteen():
    assert len(datasets()) == 21 and len(datasets(extended=True)) == 13
    assert {"multi_news", "repobench-p", "vcsum"} < set(datasets())
    assert set(PLAIN) < set(datasets()) and "multi_news_e" in datasets(extended=True)


def test_rouge_is_the_packages():
    from rouge import Rouge

    said = [STORY, "Two bridges were closed.", "Nothing.\n\n New lines  and spaces. The flood. The flood.", "a", ""]
    true = ["The council discussed the flood; two bridges were closed.", "The school was a shelter. It was Monday."]
    found = scores("multi_news", said, [true] * len(said))
    for text, score in zip(said, found, strict=True):
        alone = [Rouge().get_scores(text.strip(), each)[0]["rouge-l"]["f"] if text else 0.0 for each in true]
        assert score == pytest.approx(max(alone), abs=1e-12)
    assert found[-1] == 0 and max(found) > 0.2


def test_other_metrics():
    # words in common: two of three said, two of two expected, articles and case aside
    assert scores("qasper", ["The two big bridges."], [["two bridges"]]) == pytest.approx([0.8])
    assert scores("hotpotqa", ["no"], [["yes", "No!"]]) == [1.0]
    assert scores("passage_count", ["5, or 7"], [["7"]]) == [0.5]
    assert scores("passage_retrieval_en", ["Paragraph 12"], [["Paragraph 12"]]) == [1.0]
    kinds = ["Date", "City", "Other city"]
    assert scores("trec", ["City", "Date City"], [["City"], ["City"]], [kinds] * 2) == [1.0, 0.5]
    line, true = "    return x + 1", "    return x + 2"
    ratio = difflib.SequenceMatcher(None, line, true).ratio()
    assert scores("lcc", [f"# a comment\n{line}\nmore"], [[true]]) == pytest.approx([ratio], abs=0.006)
    assert scores("multifieldqa_zh", ["两座桥"], [["两座桥"]]) == [1.0]
    assert scores("multi_news_e", ["a flood"], [["a flood"]]) == pytest.approx([1.0], abs=1e-6)


def test_what_fits_is_whole(bundled, folder):
    task = LongBench("hotpotqa", bundled[1], 2048, folder("hotpotqa", document()))
    prompt = task.item(0)
    text = bundled[1].decode(prompt.context + prompt.question)
    assert text.count(STORY.strip()) == 4 and text.endswith("Question: What was closed?\nAnswer:")
    assert STORY.strip() not in bundled[1].decode(prompt.question)
    assert "What was closed?" in bundled[1].decode(prompt.question)
    assert (prompt.most, prompt.stops) == (32, ())


@pytest.mark.parametrize("longest", [400, 401])
def test_the_middle_is_left_out(bundled, folder, longest: int):
    task = LongBench("hotpotqa", bundled[1], longest, folder("hotpotqa", document(context=STORY * 40)))
    prompt = task.item(0)
    kept = list(prompt.context + prompt.question)
    whole = LongBench("hotpotqa", bundled[1], 1 << 20, folder("hotpotqa", document(context=STORY * 40))).item(0)
    half = (longest - 32) // 2
    every = list(whole.context + whole.question)
    assert kept == every[:half] + every[-half:] and prompt.question == whole.question


def test_chat(bundled, folder):
    tokenizer = load(dtype="float32")[1]
    tokenizer.chat_template = "<s>{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}[assistant]"
    for context in (STORY, STORY * 40):
        task = LongBench("hotpotqa", tokenizer, 400, folder("hotpotqa", document(context=context)), chat=True)
        prompt = task.item(0)
        text = tokenizer.decode(prompt.context + prompt.question)
        assert text.startswith("<s>") and text.count("<s>") == 1 and text.endswith("[assistant]")
        assert len(prompt.context) + len(prompt.question) + prompt.most <= 400
        assert "[assistant]" in tokenizer.decode(prompt.question) and task.settings["chat"]
    trec = LongBench("trec", tokenizer, 400, folder("trec", document()), chat=True)
    assert not trec.settings["chat"] and trec.item(0).stops == ("\n",)
    LongBench("trec", bundled[1], 400, folder("trec", document()), chat=True)  # needs none
    with pytest.raises(ValueError, match=r"expected a chat template .* found none; leave --chat out"):
        LongBench("hotpotqa", bundled[1], 400, folder("hotpotqa", document()), chat=True)


def test_in_our_runner(bundled, folder, tmp_path):
    """The exact cache says what the model says; two bits are on disk with their scores."""
    model, tokenizer = bundled
    task = LongBench("hotpotqa", tokenizer, 400, folder("hotpotqa", document(), document(context=STORY * 40)))
    chosen = [Contender(text, parse(text)) for text in ("exact", "kivi k=2 v=2 group=32 recent=32")]
    results = Results(tmp_path / "results.jsonl")
    exact, coded = run(task, Subject.of(model), chosen, results)
    for number, said in enumerate(exact.values["prediction"]):
        prompt = task.item(number)
        ids = torch.tensor([prompt.context + prompt.question])
        out = model.generate(ids, max_new_tokens=prompt.most, do_sample=False)[0, ids.shape[1] :]
        assert said == tokenizer.decode(out, skip_special_tokens=True)
    assert coded.bits < exact.bits and coded.values["expected"] == [["two bridges"]] * 2
    assert exact.first.task == "longbench:hotpotqa" and all(0 <= score <= 1 for score in exact.values["score"])
    values = {name: column for name, column in coded.values.items() if name != "score"}
    assert rescored(coded.first.settings, values) == coded.values
    assert Results(tmp_path / "results.jsonl").rows.keys() == results.rows.keys()


def test_from_the_hub(bundled, monkeypatch):
    asked = []

    def rows(*source, split):
        asked.append((*source, split))
        return [{"question": "Who?", "context": STORY, "answers": ["the council"], "all_classes": None}]

    monkeypatch.setattr("datasets.load_dataset", rows)
    task = LongBench("qasper_e", bundled[1], 2048)
    assert task.count == 1 and asked == [("Xnhyacinth/LongBench", "qasper_e", "test")]
    assert task.settings["definition"].startswith("longbench_qasper_e ")


def test_bad_input_is_one_sentence(bundled, folder, tmp_path):
    place = folder("hotpotqa", document())
    with pytest.raises(ValueError, match=r"expected eval/longbench/qasper.jsonl in .*, found none"):
        LongBench("qasper", bundled[1], 2048, place)
    with pytest.raises(ValueError, match=r"expected a dataset of LongBench .*, found 'news'"):
        LongBench("news", bundled[1], 2048, place)
    with pytest.raises(ValueError, match="answers of hotpotqa take 32 tokens, and the model takes 32 in all"):
        LongBench("hotpotqa", bundled[1], 32, place)
    with pytest.raises(ValueError, match="a limit is at least 1"):
        LongBench("hotpotqa", bundled[1], 2048, place, limit=0)
    wrong = document()
    del wrong["input"]
    with pytest.raises(ValueError, match=r"line 2 of .* has no 'input' or 'question': expected 'context'"):
        LongBench("hotpotqa", bundled[1], 2048, folder("hotpotqa", document(), wrong))
    with pytest.raises(ValueError, match="document 0 of hotpotqa: expected a list of answers, found 'a'"):
        LongBench("hotpotqa", bundled[1], 2048, folder("hotpotqa", document(answers="a")))
