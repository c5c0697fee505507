"""Tasks on windows of text: distributions, drift while decoding, and what should change nothing."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models_tiny import tiny_llama, tokens
from oracle import OracleCache

import kvist
from kvist.evaluate.contenders import Contender, bits, contender
from kvist.evaluate.registry import kind_of
from kvist.evaluate.results import Results
from kvist.evaluate.task import Subject, run
from kvist.evaluate.tasks.fidelity import Fidelity, among, counts, quantile
from kvist.evaluate.tasks.horizon import Horizon, slopes
from kvist.evaluate.tasks.nuisance import FACTORS, Nuisance
from kvist.evaluate.tokenwise import compared, exact
from kvist.evaluate.windows import Text, curve
from kvist.methods import parse
from kvist.models.adapter import describe
from kvist.models.compat import cache_argument

TEXT = Text(tokens(2, 200), "tokens", "abc")
EXACT, KIVI = contender("exact"), contender("kivi:2 recent=32")


def measured(task, *contenders: Contender):
    return run(task, Subject.of(tiny_llama()), contenders, Results())


@given(st.integers(0, 1000), st.sampled_from([0.01, 0.5, 0.9, 0.999]), st.floats(0.3, 3))
def test_quantiles_of_all_windows_are_known_to_six_per_cent(seed, share, spread):
    draws = torch.Generator().manual_seed(seed)
    kl = torch.exp(spread * torch.randn(3, 400, generator=draws, dtype=torch.float64) - 6)
    found = quantile([counts(row) for row in kl], share)
    assert found == pytest.approx(np.quantile(kl.numpy(), share, method="inverted_cdf"), rel=0.06)


def test_quantiles_of_nothing_lost():
    assert quantile([counts(torch.zeros(9))], 0.5) == 0


@given(st.integers(1, 300), st.integers(1, 80))
def test_curves(length, bucket):
    kl = torch.arange(length, dtype=torch.float64)
    expected = [np.arange(i, min(i + bucket, length)).mean() for i in range(0, length, bucket)]
    assert curve(kl, bucket) == pytest.approx(expected)
    which = kl % 3 == 1
    assert among(kl, which) == [int(which.sum()), kl[which].mean().item() if which.any() else None]


def test_fidelity():
    exact, kivi = measured(Fidelity(TEXT, step=32, batch=2), EXACT, KIVI)
    assert exact.values["inside"][0][0] == 199 and exact.values["beyond"][0] == [0, None]
    values = kivi.values
    for row in range(2):
        (inside, kl_in), (beyond, kl_out) = values["inside"][row], values["beyond"][row]
        assert inside + beyond == values["tokens"][row] == 199 and kl_in < 1e-6 < kl_out
        assert values["kl"][row] == pytest.approx((inside * kl_in + beyond * kl_out) / 199)
        assert sum(values["kl_counts"][row].values()) == 199 and values["last"][row][0] == 49
        sizes = [64, 64, 64, 7]
        mean = np.average(values["kl_curve"][row], weights=sizes)
        assert values["kl"][row] == pytest.approx(mean) and values["kl_max"][row] >= max(values["kl_curve"][row])
    found = kind_of(kivi).tell(kivi)
    assert found["kl_median"] <= found["kl"].value <= found["kl_99.9%"] * 1.06 <= found["kl_max"] * 1.13


@torch.no_grad()
def test_texts_part_where_free_running_ones_do():
    """Greedy text, written token by token from the cache's own choices."""
    task = Horizon(TEXT, step=1, free=20, batch=2)
    exact, kivi = measured(task, EXACT, KIVI)
    assert exact.values["first_mismatch"] == [20, 20]
    for row, found in enumerate(kivi.values["first_mismatch"]):
        written = []
        for method in ("exact", "kivi:2 recent=32"):
            cache, ids = kvist.Cache(tiny_llama(), method), TEXT.windows[row : row + 1, :100]
            tiny_llama()(ids[:, :-1], **cache_argument(cache))
            token, text = ids[:, -1:], []
            for _ in range(20):
                token = tiny_llama()(token, **cache_argument(cache)).logits[:, -1:].argmax(-1)
                text.append(token.item())
            written.append(text)
        pairs = enumerate(zip(*written, strict=True))
        assert found == next((i for i, (a, b) in pairs if a != b), 20)


def test_history_quantized_at_once():
    task = Horizon(TEXT, step=16, at=(64, 128), probe=16, batch=2)
    exact, kivi = measured(task, EXACT, KIVI)
    for cell in (exact, kivi):
        assert [[step for step, *_ in row] for row in cell.values["kl_at_once"]] == [[64, 128]] * 2
    assert max(kl for row in exact.values["kl_at_once"] for _, *kls in row for kl in kls) < 1e-6
    assert min(kl for row in kivi.values["kl_at_once"] for _, *kls in row for kl in kls) > 1e-6
    whole = measured(Fidelity(TEXT, step=16, batch=2), KIVI)[0]  # the same decoding
    assert whole.values["kl"] == pytest.approx(kivi.values["kl"])


@torch.no_grad()
@pytest.mark.parametrize("method", ["kivi:2 recent=32", "int4", "logquant:2 window=32"])
def test_history_at_once_is_one_update_of_exact_keys_and_values(method):
    task = Horizon(TEXT, prompt=20, step=16, at=(100,), probe=16, batch=2)
    (cell,) = measured(task, contender(method))
    model, ids = tiny_llama(), TEXT.windows
    oracle, states = OracleCache(parse(method), 2), exact(model, ids, 199).states
    for layer, given_ in enumerate(states):
        oracle.update(*(x[:, :, :120] for x in given_), layer)
    logits = model(ids[:, 120:136], **cache_argument(oracle)).logits
    expected = compared(exact(model, ids), logits, 120).kl.mean(1)
    assert [once for ((_, _, once),) in cell.values["kl_at_once"]] == pytest.approx(expected.tolist(), rel=0.02)
    assert expected.min() > 1e-6


def test_slopes():
    curve = [5.0] * 4 + [0.1 + 0.002 * 64 * i for i in range(10)]  # 0.002 per step
    found = slopes({"kl_curve": [curve, curve], "kl_at_once": [[], []]})
    assert found == pytest.approx([2.0, 2.0])
    assert slopes({"kl_curve": [curve[:5]], "kl_at_once": [[]]}) == []


def test_nuisance_is_at_the_floor():
    methods = [EXACT, *map(contender, ("int4", "kivi:2 recent=32", "logquant:2 window=32", "streaming:4 window=32"))]
    for cell in measured(Nuisance(TEXT, prompt=120, step=16), *methods):
        for factor in FACTORS:
            assert max(cell.values[f"kl_{factor}"]) < 1e-4 + 0.01 * max(cell.values["kl"])
            assert max(map(abs, cell.values[f"shift_{factor}"])) < 1e-4 + 0.01 * max(cell.values["kl"])


def test_bits_are_measured():
    facts = describe(tiny_llama())
    cache = kvist.Cache(tiny_llama(), "kivi:2", reserve=200)
    tiny_llama()(TEXT.windows, **cache_argument(cache))
    assert bits(cache, facts, 2) == pytest.approx(8 * cache.report().nbytes / (2 * 2 * 200 * 2 * 64))
    assert cache.report().nbytes == parse("kivi:2").bill(facts.shapes, 2, 200, 2, 200).total()


def test_quantized_cache_is_named_as_what_it_is():
    pytest.importorskip("optimum.quanto")
    control = contender("quanto:4")
    (cell,) = measured(Horizon(TEXT, step=32, batch=2), control)
    assert cell.method == "QuantizedCache quanto:4" and cell.first.recipe["name"] == "transformers QuantizedCache"
    assert 4 < cell.bits < 32 and min(cell.values["kl"]) > 0
    with pytest.raises(ValueError, match="needs a recipe"):
        measured(Fidelity(TEXT), control)


def test_refusals():
    with pytest.raises(ValueError, match="quanto:2, quanto:4"):
        contender("quanto:5")
    with pytest.raises(ValueError, match="no prefill 'stored'"):
        contender("quanto:4").cache(tiny_llama(), 0, "stored")
    with pytest.raises(ValueError, match="3 layers"):
        measured(Fidelity(TEXT), contender("kvmix k=2,3,4 v=2,3,4"))
    with pytest.raises(ValueError, match="needs"):
        measured(Fidelity(TEXT), contender("kvquant"))
