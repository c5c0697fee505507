"""The demo: its documents, its measure, and the table that it prints."""

import json

import pytest
import torch
from transformers import DynamicCache
from typer.testing import CliRunner

import kvist
from kvist.cli.app import app
from kvist.demo import documents, measure, sample
from kvist.demo.model import load
from kvist.methods import parse
from kvist.models.compat import cache_argument


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def bundled():
    return load()


@pytest.fixture(scope="module")
def document(bundled):
    return documents.documents(bundled[1], 12)[0]


def test_documents_hold_their_answers_and_are_made_from_the_seed(bundled):
    made = documents.documents(bundled[1], 30, seed=3)
    assert made == documents.documents(bundled[1], 30, seed=3) != documents.documents(bundled[1], 30, seed=4)
    assert sum(len(d.questions) for d in made) == 30
    for d in made:
        assert documents.SHORTEST - 60 < len(d.ids) <= documents.LONGEST
        for question in d.questions:
            digits = question.answer.strip(" .")
            assert digits in d.text and question.ids and bundled[1].decode(question.answer_ids) == question.answer


def test_text_between_facts_cannot_be_taken_for_one():
    for sentence in documents._filler():
        assert not sample.FORBIDDEN.search(sentence)


def test_a_cache_filled_by_hand_is_a_cache_filled_by_the_model(bundled, document):
    model, recipe = bundled[0], parse("kivi:2")
    with torch.inference_mode(), kvist.attach(model):
        filled = measure._filled(model, recipe, document, measure._prompt(model, document))
        lived = kvist.Cache(model, recipe, reserve=filled.reserve)
        model(torch.tensor([document.ids]), **cache_argument(lived), logits_to_keep=1)
        token = torch.tensor([[5]])
        logits = [model(token, **cache_argument(cache)).logits for cache in (filled, lived)]
    assert torch.equal(*logits)
    assert filled.report() == lived.report()


def test_exact_answers_are_those_of_transformers(bundled, document):
    """The batch with padding between document and question gives what one plain sequence gives."""
    model, few = bundled[0].float(), documents.Document(document.text, document.ids, document.questions[:3])
    try:
        with torch.inference_mode(), kvist.attach(model):
            prompt = measure._prompt(model, few)
            logits = measure._answers(model, measure._filled(model, parse("exact"), few, prompt), few)
        with torch.inference_mode():
            for question, row in zip(few.questions, logits, strict=True):
                ids = torch.tensor([[*few.ids, *question.ids, *question.answer_ids[:-1]]])
                plain = model(ids, **cache_argument(DynamicCache(config=model.config))).logits[0]
                torch.testing.assert_close(row, plain[-len(question.answer_ids) :], atol=2e-3, rtol=1e-3)
    finally:
        model.bfloat16()


def test_right_means_what_greedy_decoding_writes(bundled, document):
    model, few = bundled[0], documents.Document(document.text, document.ids, document.questions[:4])
    result = measure.measure(model, [few], [("int8", parse("int8"))])[0]
    right = 0
    for question in few.questions:
        ids = torch.tensor([[*few.ids, *question.ids]])
        cache = kvist.Cache(model, "int8")
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            **cache_argument(cache),
            do_sample=False,
            max_new_tokens=len(question.answer_ids),
        )
        right += out[0, ids.shape[1] :].tolist() == list(question.answer_ids)
    assert result.right == right > 0


def test_demo(tmp_path):
    words = ["demo", "--method", "int8", "-m", "hadamard:2", "--questions", "12", "--out", str(tmp_path / "out")]
    found = json.loads(CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False).stdout)
    exact, eight, two = found["results"]
    assert [r["method"] for r in found["results"]] == ["exact", "int8", "hadamard:2"]
    assert exact["kl"] == 0 < eight["kl"] < two["kl"]
    assert exact["right"] >= 8 and exact["asked"] == 12 and exact["right"] > two["right"]
    assert two["nbytes"] < eight["nbytes"] < exact["nbytes"]
    assert (tmp_path / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")
    kept = json.loads((tmp_path / "out" / "results.json").read_text())
    assert kept["results"] == found["results"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["demo.png", "results.json"]


def test_demo_prints_one_table(tmp_path):
    words = ["demo", "-m", "int4", "--questions", "1", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0 and "KL to exact" in result.stdout and "int4" in result.stdout
    assert "documents × methods" not in result.stdout


def test_demo_refuses_before_it_works(tmp_path):
    (tmp_path / "file").write_text("")
    for words in (["-m", "kvi"], ["--questions", "0"], ["--out", str(tmp_path / "file")]):
        result = CliRunner().invoke(app, ["demo", *words])
        assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1 and result.stdout == ""


def test_rows_of_unequal_state_are_packed_one_by_one(bundled):
    """Rows that differ in length pack at different moments: each keeps what it would keep alone."""
    model = bundled[0]
    torch.manual_seed(0)
    ids = torch.randint(3, 6000, (2, 200))
    mask = torch.ones(2, 201, dtype=torch.long)
    mask[0, :70] = 0
    with torch.inference_mode():
        both, alone = kvist.Cache(model, "int4"), kvist.Cache(model, "int4")
        for cache, rows in ((both, slice(0, 2)), (alone, slice(1, 2))):
            model(ids[rows], attention_mask=mask[rows, :200], **cache_argument(cache), logits_to_keep=1)
            model(ids[rows, :1], attention_mask=mask[rows], **cache_argument(cache))
    for pair in zip(both.ours, alone.ours, strict=True):
        fetched = [layer.key.states[-1].frontier for layer in pair]
        assert fetched[0] == fetched[1] == 200
    assert [layer.key.states[0].frontier for layer in both.ours] == [130] * 6
