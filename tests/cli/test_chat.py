"""A talk on a model whose layers cannot go back: what cannot be cropped or mended is read again."""

import pytest
import torch
from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig
from typer.testing import CliRunner

from kvist.cli.app import app
from kvist.cli.generate import Session
from kvist.cli.options import Generation
from kvist.demo.model import FOLDER
from kvist.methods import parse

SHORTENED = (  # earlier answers are written differently, as templates do that drop the reasoning
    "{% for m in messages %}{{ m.role }}: {{ m.content[:4] if m.role == 'assistant' else m.content }}\n{% endfor %}"
)
KINDS = ["sliding_attention", "full_attention"]


@pytest.fixture(scope="module")
def tokenizer():
    found = AutoTokenizer.from_pretrained(FOLDER)
    found.chat_template = SHORTENED
    return found


@pytest.fixture(scope="module")
def model(tokenizer):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    layers = {"num_hidden_layers": 2, "head_dim": 8, "sliding_window": 8, "layer_types": KINDS}
    torch.manual_seed(0)
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": None, "bos_token_id": None}
    return Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=len(tokenizer), **sizes, **layers, **ends)).eval()


def session(model, tokenizer) -> Session:
    return Session(model, tokenizer, parse("kivi:4"), Generation(greedy=True, max_new_tokens=12))


def test_an_answer_that_the_template_rewrites(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    words = ["run", str(tmp_path), "--chat", "--greedy", "--max-new-tokens", "12", "-m", "kivi:4", "--device", "cpu"]
    result = CliRunner().invoke(app, words, input="Hello there, how are you?\nTell me more.\n\n")
    assert result.exit_code == 0 and "24 written" in result.stdout, (result.output, result.exception)
    assert "cannot go back: the conversation" in result.stderr and "is read again" in result.stderr


@pytest.mark.parametrize("template", [True, False])
def test_a_turn_that_is_interrupted(model, tokenizer, template, monkeypatch):
    """The next turn is answered as if the conversation had been read from its beginning."""
    monkeypatch.setattr(tokenizer, "chat_template", SHORTENED if template else None)
    turns, talk = [{"role": "user", "content": "Hello there, how are you today?"}], session(model, tokenizer)
    talk.write(talk.turn(turns), stream=False)
    turns += [{"role": "assistant", "content": talk.text}, {"role": "user", "content": "Tell me more."}]

    def stop(*_):
        raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        talk.write(talk.turn(turns), stream=False)
    hook.remove()
    talk.interrupted()
    turns += [{"role": "assistant", "content": talk.text}, {"role": "user", "content": "And then?"}]
    ids = talk.turn(turns)
    assert talk.cache.get_seq_length() == 0
    fresh = session(model, tokenizer)
    for one in (talk, fresh):
        one.write(ids, stream=False)
    assert talk.text == fresh.text and talk.stored == fresh.stored
    expected = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"] if template else None
    said = tokenizer.decode(ids)
    assert ids == expected if template else all(turn["content"] in said for turn in turns[::2])
