"""Each command by hand: what it prints, its JSON, and one sentence with exit code 2 for each mistake."""

import json

import pytest
import torch
from artifacts import made
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import kvist
from kvist.cli.app import app
from kvist.demo.model import FOLDER, artifact
from kvist.methods import names, parse


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random Llama with the bundled tokenizer."""
    path = tmp_path_factory.mktemp("tiny")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 6144, "max_position_embeddings": 512}
    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, pad_token_id=2, **sizes)
    LlamaForCausalLM(config).save_pretrained(path)
    AutoTokenizer.from_pretrained(FOLDER).save_pretrained(path)
    return str(path)


def call(*words: str, code: int = 0, text: str | None = None):
    result = CliRunner().invoke(app, list(words), input=text)
    assert result.exit_code == code, (result.output, result.exception)
    return result


def data(*words: str) -> dict:
    return json.loads(call(*words, "--json").stdout)


def refused(*words: str) -> str:
    """The one sentence of a refusal."""
    result = call(*words, code=2)
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("kvist: ")
    return lines[0]


def test_bare_and_version():
    assert "Commands" in call().stdout and call("--version").stdout == f"kvist {kvist.__version__}\n"


@pytest.mark.parametrize("verb", ["methods", "show", "run", "inspect", "demo"])
def test_help(verb):
    assert "Example" in call(verb, "--help").stdout


def test_methods():
    rows = {row["name"]: row for row in data("methods")["methods"]}
    assert list(rows) == names()
    assert rows["exact"]["bits"] == {"4K": 16.0, "128K": 16.0}
    # codes, and a 16-bit scale and offset per 128 channels
    assert rows["int8"]["bits"]["128K"] == pytest.approx(8 + 32 / 128, abs=0.01)
    assert all(row["paper"] and row["idea"].endswith(".") for row in rows.values())
    assert {name for name, row in rows.items() if row["needs"] != ["nothing"]} == {"kvquant"}
    printed = call("methods").stdout
    assert all(name in printed for name in names()) and "8 KV heads of 128" in printed


def test_show(tmp_path):
    shown = data("show", "kivi k=2 v=4", "--length", "8192")
    recipe = parse("kivi k=2 v=4")
    assert shown["recipe"] == recipe.model_dump(mode="json") and shown["sentence"] == str(recipe)
    assert 8 * sum(shown["bill"].values()) / (8192 * 8 * 256) == pytest.approx(shown["bits_per_element"])
    assert shown["options"]["group"] == 32
    printed = call("show", "kivi k=2 v=4").stdout
    assert str(recipe) in printed and "total" in printed and '"retention"' in printed
    recipe.save(tmp_path / "mine.json")
    assert data("show", str(tmp_path / "mine.json"))["recipe"] == shown["recipe"]


def test_run_exact_is_the_models_own_generation(folder):
    prompt = "The harbour was quiet in the morning, and"
    found = data(
        "run", folder, "-m", "exact", "--prompt", prompt, "--greedy", "--max-new-tokens", "8", "--device", "cpu"
    )
    model, tokenizer = LlamaForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    wanted = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    assert found["text"] == tokenizer.decode(wanted[0, ids.shape[1] :], skip_special_tokens=True)
    assert found["prompt_tokens"] == ids.shape[1] and found["cached_tokens"] == wanted.shape[1] - 1
    assert found["bytes_16_bit_arithmetic"] == 2 * found["cached_tokens"] * 2 * 2 * 2 * 8
    assert found["peak_memory_bytes"] > 0 and found["decode_tokens_per_second"] > 0


def test_run_prints_text_and_figures(folder, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("The captain looked at the sea. " * 20)
    words = ["run", folder, "--prompt-file", str(file), "--max-new-tokens", "6", "--reserve", "50", "--chunk", "64"]
    first, second = (call(*words, "--seed", "5", "--device", "cpu").stdout for _ in range(2))
    assert "at 32K" in first and "by the bill" in first and "used by" in first and "more than the 50 reserved" in first
    assert first.split("\nkivi")[0] == second.split("\nkivi")[0]


def test_chunked_prompt_of_the_exact_cache_changes_nothing(folder):
    words = ["run", folder, "-m", "exact", "-p", "One day the king " * 20, "--greedy", "--max-new-tokens", "5"]
    assert data(*words, "--chunk", "16")["text"] == data(*words)["text"]


def test_run_goes_on_from_a_saved_cache(folder, tmp_path):
    file, words = str(tmp_path / "cache"), ["run", folder, "--greedy", "--device", "cpu"]
    saved = data(*words, "-m", "int8", "-p", "On the road", "--max-new-tokens", "4", "--save-cache", file)
    loaded = data(*words, "-p", " to the village", "--max-new-tokens", "3", "--load-cache", file)
    assert loaded["recipe"] == saved["recipe"]
    assert loaded["cached_tokens"] == saved["cached_tokens"] + loaded["prompt_tokens"] + loaded["new_tokens"] - 1
    assert "another recipe" in refused(*words, "-p", "x", "-m", "kivi", "--load-cache", file)


def test_chat_keeps_one_cache(folder):
    result = call("run", folder, "--chat", "--max-new-tokens", "3", "--greedy", text="Hello there\nAnd now?\n\n")
    assert result.stderr.count("allocated]") == 2 and "6 written" in result.stdout


def test_chat_with_a_template_crops_what_it_writes_differently(folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} said {{ m.content.strip() }}\n{% endfor %}"
    LlamaForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    words = ["run", str(tmp_path), "--chat", "--max-new-tokens", "3", "--greedy", "-m", "exact"]
    result = call(*words, text="Hello there\nAnd now?\n\n")
    assert "6 written" in result.stdout


def test_inspect(folder):
    found = data("inspect", folder, "-m", "int4", "-m", "exact")
    assert (found["family"], found["served"], found["query_heads"], found["kv_heads"]) == ("llama", [0, 1], 4, 2)
    assert found["head_sizes"] == [8, 8] and found["rotary"].startswith("default") and found["attention"] == "sdpa"
    packed, exact = found["methods"]
    assert packed["kernel"] and "none needed" in exact["kernel"]
    shape = kvist.Cache(LlamaForCausalLM.from_pretrained(folder), "int4").inner.describes.shape
    assert packed["bytes"]["4K"] == parse("int4").bill(shape, 2, 4096, reserve=4096).total()
    assert "kernel" in call("inspect", folder).stdout


def test_inspect_of_a_method_that_must_be_fitted(folder):
    (found,) = data("inspect", folder, "-m", "kvquant:3 outliers=5%")["methods"]
    assert set(found["needs"]) == {"a fitted table", "fitted ranges", "a model's rotary"} and found["tables"] is None
    assert found["kernel"] == "numba.bound.Bound"
    assert found["encoder"] == "numba.codec.encode"
    printed = call("inspect", folder, "-m", "kvquant:3 outliers=5%").stdout
    assert "missing: " in printed and "kvist calibrate" in printed
    assert "missing" not in call("inspect", folder, "-m", "int4").stdout


def test_inspect_says_what_a_gpu_would_run_and_why_not(folder):
    pytest.importorskip("triton")
    pytest.importorskip("cuda.bindings")
    kivi, kvquant = data("inspect", folder, "--device", "cuda", "-m", "kivi:2", "-m", "kvquant:3")["methods"]
    assert kivi["kernel"] == kvquant["kernel"] == "triton.decode.decode"  # heads of 8
    assert kivi["encoder"] == "triton.codec.encode"
    assert kivi["captured"] == "triton.step.step"
    reasons = "keys keep outliers, keys are stored before a rotary embedding, values keep outliers"
    assert kvquant["captured"].startswith("none: ") and kvquant["captured"].endswith(f"triton: {reasons}")
    (on_cpu,) = data("inspect", folder)["methods"]
    assert on_cpu["captured"].startswith("none: ") and "triton: they run on GPUs" in on_cpu["captured"]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_inspect_of_what_was_fitted_to_the_bundled_model(bits, folder):
    method = f"kvquant artifact={artifact('bundled', bits)}"
    (found,) = data("inspect", str(FOLDER), "-m", method)["methods"]
    assert found["needs"] == [] and found["fitted_to"] == "kvist-6m" and found["tables"] == {"all": 12, "on_grid": 12}
    shape = kvist.Cache(LlamaForCausalLM.from_pretrained(FOLDER), method).inner.describes.shape
    assert found["bytes"]["4K"] == parse(method).bill(shape, 6, 4096, reserve=4096).total()
    if bits == 3:
        printed = call("inspect", str(FOLDER), "-m", method).stdout
        assert "fitted to: kvist-6m" in printed and "tables: 12 of 12 lie on the 256-step grid\n" in printed
        assert printed.count("3-bit table, fixed per channel") == 1  # layers described alike are told once
        assert "6 layers but the model has 2" in refused("inspect", folder, "-m", method)


@pytest.mark.parametrize(("kind", "on_grid"), [("grid", 4), ("free", 0)])
def test_inspect_says_where_tables_lie(kind, on_grid, folder, tmp_path):
    model = LlamaForCausalLM.from_pretrained(folder)
    made(kind, model).save(tmp_path)
    method = f"kvquant artifact={tmp_path}"
    assert data("inspect", folder, "-m", method)["methods"][0]["tables"] == {"all": 4, "on_grid": on_grid}
    printed = call("inspect", folder, "-m", method).stdout
    assert ("0 of 4 lie on the 256-step grid, 4 elsewhere; the same code reads both" in printed) == (kind == "free")
    model.config.rope_parameters["rope_theta"] = 5e5
    model.save_pretrained(tmp_path / "other")
    assert "config differs" in refused("inspect", str(tmp_path / "other"), "-m", method)


def test_inspect_tells_apart_what_layers_do_differently(folder):
    printed = call("inspect", folder, "-m", "kvmix k=3,2 v=4,4").stdout
    assert "kvmix: layer 0: keys: 3-bit" in printed and "\n  layer 1: keys: 2-bit" in printed


def test_inspect_of_a_model_whose_keys_cannot_be_taken_back(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
    LlamaConfig(**sizes, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}).save_pretrained(
        tmp_path
    )
    assert "dynamic RoPE depend" in refused("inspect", str(tmp_path), "-m", "kvquant:3")
    (found,) = data("inspect", str(tmp_path), "-m", "kvquant:3 keys=post-rope")["methods"]
    assert set(found["needs"]) == {"a fitted table", "fitted ranges"}


def test_help_of_bench_and_its_mistakes():
    assert "decode" in call("bench", "--help").stdout and "Example" in call("bench", "decode", "--help").stdout
    assert "'kivi'" in refused("bench", "decode", "-m", "kvi")


def test_refusals(folder, tmp_path):
    run = ["run", folder, "--max-new-tokens", "2", "--device", "cpu"]
    assert "did you mean 'kivi'" in refused("show", "kvi")
    assert "did you mean 'recent'" in refused("show", "kivi recnt=3")
    assert "shorter than the group" in refused(*run, "-p", "x", "-m", "kivi group=64 recent=32")
    assert "no folder" in refused("inspect", str(tmp_path / "nothing"))
    assert "no config.json" in refused("run", str(tmp_path), "-p", "x")
    assert "exactly one" in refused(*run) and "exactly one" in refused(*run, "-p", "x", "--chat")
    assert "cannot be read" in refused(*run, "--prompt-file", str(tmp_path / "no.txt"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xfd")
    assert "not text" in refused(*run, "--prompt-file", str(tmp_path / "binary"))
    assert "empty" in refused(*run, "-p", "")
    assert "above 0" in refused(*run, "-p", "x", "--temperature", "0")
    assert "--dtype" in refused(*run, "-p", "x", "--dtype", "int3")
    assert "--device" in refused("run", folder, "-p", "x", "--device", "nowhere")
    assert "no file" in refused(*run, "-p", "x", "--load-cache", str(tmp_path / "no"))
    assert "found none that can be read" in refused(*run, "-p", "x", "--load-cache", str(tmp_path / "binary"))
    save_file({"a": torch.zeros(2)}, tmp_path / "foreign")
    assert "not a kvist cache" in refused(*run, "-p", "x", "--load-cache", str(tmp_path / "foreign"))
    assert "layers" in refused("inspect", folder, "-m", "kvmix k=2,3,4 v=2,3,4")
    assert "nosuch" in refused("nosuch") and "--foo" in refused("methods", "--foo") and "--bar" in refused("--bar")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    assert "cannot be read as" in refused("inspect", str(tmp_path / "broken"))


def test_debug_keeps_the_traceback():
    result = CliRunner().invoke(app, ["--debug", "show", "kvi"])
    assert result.exit_code == 1 and isinstance(result.exception, ValueError)
