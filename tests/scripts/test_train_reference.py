"""Reference models of a few steps: their size, their record, going on from a checkpoint, and mistakes as sentences."""

import json
import random
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import lessons
import train_reference
import trainer
import variants

NAME = "norm-4to1-128"
TINY = {
    **variants.VARIANTS[NAME],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
CPU = trainer.Machine(torch.device("cpu"), 256)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(train_reference.TOKENIZER)


@pytest.fixture(scope="module")
def documents() -> list[str]:
    draws = random.Random(0)
    words = ["the", "river", "was", "quiet", "and", "cold", "when", "morning", "came", "over", "hills"]
    return ["".join(" ".join(draws.choices(words, k=9)).capitalize() + ". " for _ in range(200)) for _ in range(2)]


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(variants.VARIANTS, NAME, TINY)


def made(tokenizer, documents) -> trainer.Trainer:
    model = variants.build(variants.config_of(TINY, tokenizer))
    return trainer.Trainer(model, lessons.Lessons(tokenizer, documents), CPU, 0, [])


def invoke(*words: str):
    return CliRunner().invoke(train_reference.app, words)


@pytest.mark.parametrize("name", variants.VARIANTS)
def test_every_variant_is_small(tokenizer, name):
    config = variants.config_of(variants.VARIANTS[name], tokenizer)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert 3_000_000 < variants.parameters(model) <= variants.MOST
    names = [weight for weight, _ in model.named_parameters()]
    assert any("q_proj.bias" in weight for weight in names) == name.startswith("bias")
    assert any("k_norm" in weight for weight in names) == name.startswith("norm")


@pytest.mark.parametrize("kind", lessons.THEN)
@pytest.mark.parametrize("length", [128, 256, 1000])
def test_lessons_are_as_long_as_asked_and_count_something(tokenizer, documents, kind, length):
    source = lessons.Lessons(tokenizer, documents)
    for seed in range(8):
        name, lesson = source.draw({kind: 1.0}, length, random.Random(seed))
        assert name == kind
        assert len(lesson.ids) == len(lesson.counted) == length
        assert any(lesson.counted) and not lesson.counted[0]


def test_answers_stand_in_what_comes_before_them(tokenizer, documents):
    source = lessons.Lessons(tokenizer, documents)
    for seed in range(8):
        _, lesson = source.draw({"recall": 1.0}, 512, random.Random(seed))
        first = lesson.counted.index(True)
        last = next(i for i in range(first, 512) if i == 511 or not lesson.counted[i + 1])
        answer = tokenizer.decode(lesson.ids[first : last + 1]).strip(" .\n").split(", ")
        assert all(part in tokenizer.decode(lesson.ids[:first]) for part in answer)


def test_sums_are_worked_out_with_their_carries():
    assert lessons.worked(97, 5) == " 7 + 5 = 12, write 2, carry 1; 9 + 0 + 1 = 10, write 0, carry 1. 97 + 5 = 102."


def test_going_on_from_a_checkpoint_is_as_if_nothing_had_happened(tokenizer, documents, tmp_path, monkeypatch):
    whole, cut, rest = (made(tokenizer, documents) for _ in range(3))
    budget = trainer.Budget(0.0, steps=4, save=0.0)
    for each in (whole, cut, rest):
        (tmp_path / str(id(each))).mkdir()
    whole.run(budget, tmp_path / str(id(whole)))
    step = cut.step

    def interrupted(progress: float) -> None:
        if progress >= 0.5:
            raise KeyboardInterrupt
        step(progress)

    monkeypatch.setattr(cut, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cut.run(budget, tmp_path / str(id(cut)))
    rest.load(tmp_path / str(id(cut)) / trainer.CHECKPOINT)
    assert rest.state.step == 2
    rest.run(budget, tmp_path / str(id(rest)))
    assert rest.state.losses == whole.state.losses and rest.state.tokens == whole.state.tokens
    for one, other in zip(whole.model.parameters(), rest.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_sequences_grow_to_the_context(tokenizer, documents):
    learner = made(tokenizer, documents)
    learner.context, learner.state.formed = 2048, 0
    assert [learner._stage(i / 20)[0] for i in (0, 6, 11, 15, 19)] == [256, 512, 1024, 2048, 2048]
    learner.state.formed = None
    assert learner._stage(0.1) == (128, lessons.FIRST)


def test_a_model_is_trained_measured_and_recorded(tiny, documents, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("<|endoftext|>".join(documents))
    monkeypatch.setattr(train_reference, "LENGTHS", (220,))
    words = ["--text", str(text), "--out", str(tmp_path / "made"), "--steps", "2", "--tokens", "256", "--device", "cpu"]
    start = ["--start", str(train_reference.TOKENIZER), "--evaluate", str(text), "--samples", "1"]
    refused = invoke(NAME, *words, *start)
    assert refused.exit_code == 2 and "leave --start out" in refused.output
    made = invoke(NAME, *words, *start[2:])
    assert made.exit_code == 0, made.output
    folder = tmp_path / "made" / NAME
    record = json.loads((folder / train_reference.RECORD).read_text())
    assert record["steps"] == 2 and record["tokens"] == 4 * (128 + 256) and record["start"] is None
    assert set(record["recall"]) == set(train_reference.KINDS) and "summary" in record["anatomy"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16 and record["parameters"] == variants.parameters(model)
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {file.name for file in folder.iterdir()} == names | {train_reference.RECORD}
    again = invoke(NAME, *words)
    assert again.exit_code == 2 and "not empty" in again.output
    assert invoke(NAME, *words, "--resume").exit_code == 0  # nothing is left to do


def test_attention_that_cannot_be_regrouped_is_drawn_anew(tokenizer):
    model = variants.build(variants.config_of(variants.VARIANTS["plain-4to1-64"], tokenizer))
    names = variants.start_from(model, train_reference.TOKENIZER)
    assert len(names) == 1 + 6 * 5 + 1 and not any("self_attn" in name for name in names)


@pytest.mark.parametrize(("name", "most"), [("bias-1to1-64", 1e-4), ("plain-4to1-128", 0.15), ("norm-4to1-128", 0.3)])
@torch.no_grad()
def test_regrouped_heads_attend_as_before(tokenizer, monkeypatch, name, most):
    """Repeated heads do so exactly; folded ones with rotary frequencies, and norms, that are nearly the same."""
    monkeypatch.setattr(variants, "NOISE", 0.0)
    bundled = AutoModelForCausalLM.from_pretrained(train_reference.TOKENIZER, dtype=torch.float32)
    model = variants.build(variants.config_of(variants.VARIANTS[name], tokenizer)).eval()
    assert len(variants.start_from(model, train_reference.TOKENIZER)) == 1 + 6 * 9 + 1
    ids = torch.tensor([tokenizer("The key is 4821, and the door is shut. The key is 48")["input_ids"]])
    one, other = (each(ids).logits.log_softmax(-1) for each in (bundled, model))
    assert (one.exp() * (one - other)).sum(-1).mean() < most


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["other", "--text", "x.txt"], "a reference model is one of"),
        ([NAME], "nothing to do"),
        ([NAME, "--text", "nowhere.txt"], "cannot be read"),
        ([NAME, "--evaluate", "{tmp}"], "expected .txt or .txt.xz files"),
        ([NAME, "--text", "{text}", "--device", "abacus"], "a device is cpu, cuda or auto"),
        ([NAME, "--text", "{text}", "--out", "{tmp}", "--start", "{tmp}"], "expected a model's folder"),
        ([NAME, "--evaluate", "{text}", "--out", "{tmp}"], "no finished model"),
    ],
)
def test_mistakes_are_one_sentence(tiny, tmp_path, monkeypatch, words, expected):
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "texts" / "a.txt"
    text.parent.mkdir()
    text.write_text("Some words. " * 400)
    found = invoke(*[word.format(tmp=tmp_path, text=text) for word in words])
    assert found.exit_code == 2
    assert expected in found.output and found.output.count("\n") == 1
