"""Prompts go through the chat template, where there is one, and a model that ends at once is not left unexplained."""

import json

import pytest
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from kvist.cli import prompts
from kvist.cli.app import app
from kvist.demo.model import FOLDER

TEMPLATE = (
    "{% for m in messages %}{{ m.role }} said {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant said{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TEMPLATE


@pytest.fixture
def tokenizer():
    """The bundled tokenizer with a chat template."""
    made = AutoTokenizer.from_pretrained(FOLDER)
    made.chat_template = TEMPLATE
    return made


@pytest.fixture
def folder(tokenizer, tmp_path):
    """A tiny random instruct model whose every token is the end of a text."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 6144, "max_position_embeddings": 512}
    config = LlamaConfig(num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, pad_token_id=2, **sizes)
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = list(range(6144))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return str(tmp_path)


def run(folder: str, *words: str, code: int = 0):
    result = CliRunner().invoke(app, ["run", folder, "--greedy", "--device", "cpu", "-p", "Hello", *words])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def read(folder: str, *words: str) -> dict:
    return json.loads(run(folder, *words, "--json").stdout)


def test_template_system_and_raw(folder, tokenizer):
    lengths = {
        (): "user said Hello\nassistant said",
        ("--system", "Be brief."): "system said Be brief.\nuser said Hello\nassistant said",
    }
    for words, text in lengths.items():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert read(folder, *words)["prompt_tokens"] == len(ids), words
    assert read(folder, "--raw")["prompt_tokens"] == len(tokenizer("Hello")["input_ids"])


def test_a_loaded_conversation_goes_on_with_a_turn(folder, tokenizer, tmp_path):
    file = str(tmp_path / "talk")
    run(folder, "--save-cache", file)
    ids = tokenizer("\nuser said Hello\nassistant said", add_special_tokens=False)["input_ids"]
    assert prompts.next_turn(tokenizer, "Hello") == ids
    assert read(folder, "--load-cache", file)["prompt_tokens"] == len(ids)
    assert "goes on with one" in run(folder, "--load-cache", file, "--system", "x", code=2).stderr


def test_what_ends_at_once_is_told(folder):
    assert "end-of-text; try another prompt, or sampling" in run(folder).stdout
    assert "without --raw" in run(folder, "--raw").stdout
    assert "no chat template" in prompts.advice(True, False, greedy=False)
    assert not prompts.at_once([], [2]) and not prompts.at_once([5, 2], [2])


def test_a_system_prompt_that_nothing_would_carry_is_refused(folder, tokenizer, tmp_path):
    assert "leaves the chat template out" in run(folder, "--raw", "--system", "x", code=2).stderr
    tokenizer.chat_template = NO_SYSTEM
    tokenizer.save_pretrained(tmp_path)
    assert "no system role" in run(folder, "--system", "x", code=2).stderr
    with pytest.raises(ValueError, match="no chat template"):
        prompts.check_system(AutoTokenizer.from_pretrained(FOLDER), "x", False)


def test_the_summary_says_what_is_used_what_is_reserved_and_what_will_be(folder):
    lines = run(folder, "--reserve", "300").stdout.splitlines()
    (cache,) = (line for line in lines if line.startswith("  cache"))
    assert "used by" in cache and "room for" in cache and "bits" not in cache
    assert int(cache.rpartition(" ")[2]) >= 300
    assert sum("by the bill" in line for line in lines) == 2
    found = read(folder)
    assert found["bill"]["32K"]["bytes_16_bit"] == 2 * 32768 * 2 * 2 * 8
