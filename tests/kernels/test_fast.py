"""The fast CPU kernels mean what the reference means."""

import os

import pytest
import torch
from asking import ask
from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.coding import AbsMax, Codec, Grouping, Raw, Uniform, Unrotate
from kvist.kernels.contract import Stored
from kvist.kernels.reference.attend import attend
from kvist.kernels.reference.grid import rotate
from kvist.methods.parts import per_channel, per_token

pytest.importorskip("numba")
pytestmark = pytest.mark.numerical
CPU = torch.device("cpu")
PAGE = 128


def test_the_processor_is_the_one_that_was_asked_for():
    """Else the tests that run again under narrower instruction sets would run as before."""
    from numba.core.registry import cpu_target

    wanted = {name: os.environ.get(name) for name in ("ATEN_CPU_CAPABILITY", "NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES")}
    capability = torch.backends.cpu.get_cpu_capability().lower()
    assert wanted["ATEN_CPU_CAPABILITY"] in (None, capability)
    _, name, features = cpu_target.target_context.codegen().magic_tuple()
    assert wanted["NUMBA_CPU_NAME"] in (None, name) and wanted["NUMBA_CPU_FEATURES"] in (None, features)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([1, 2, 3, 4, 8]),
    group=st.sampled_from([32, 64, 128, None]),
    keys=st.booleans(),
    dim=st.integers(1, 20).map(lambda n: 8 * n),
    blocks=st.integers(1, 3),
    exponent=st.integers(-12, 6),
    seed=st.integers(0, 2**16),
)
def test_encoder_and_decoder_give_the_reference_to_the_bit(bits, group, keys, dim, blocks, exponent, seed):
    codec = per_channel(bits, group or 32) if keys else per_token(bits, group)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, blocks * max(codec.granule, 8), dim, generator=generator) * 10.0**exponent
    x[0, 0, :, 0] = 1.5  # a constant channel
    x[1, 1] = 0.0  # a constant head
    fast = ask("ENCODE", codec).run
    expected = codec._reference(x)
    constants = codec.constants(3, CPU)
    found = fast(x, constants, 0)
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name
    back = ask("DECODE", codec).run
    assert torch.equal(back(found, constants), codec._decoded(expected))


@pytest.mark.parametrize("dim", [8, 40, 64, 96, 128, 256])
def test_rotation_gives_the_reference_to_the_bit_however_tokens_come(dim):
    torch.manual_seed(dim)
    x, fast = 5 * torch.randn(2, 3, 7, dim), ask("ROTATE").run
    whole = fast(x, dim & -dim)
    assert torch.equal(whole, rotate(x, dim & -dim))
    assert torch.equal(whole[0, 1, 4], fast(x[0, 1, 4].clone(), dim & -dim))


def _pages(codec, x):
    """Values (B, H, T, D), T a multiple of the page, as shuffled pages."""
    batch, _, tokens, _ = x.shape
    count = tokens // PAGE
    order = torch.randperm(batch * count).view(batch, count)
    pools = {}
    for name, array in codec.encode(x).items():
        paged = array.unflatten(2, (count, -1)).transpose(1, 2)  # (B, pages, H, page/stride, …)
        pool = torch.empty(batch * count, *paged.shape[2:], dtype=array.dtype)
        pool[order] = paged
        pools[name] = pool
    return Stored(pools, order.int(), codec.constants(x.shape[1], CPU))


@pytest.mark.parametrize("bits", [(2, 2), (1, 4), (3, 3), (4, 8)])
@pytest.mark.parametrize("keys", [per_channel, per_token], ids=["keys-per-channel", "keys-per-token"])
@pytest.mark.parametrize(("group", "dim"), [(32, 64), (64, 128), (32, 40), (128, 96)])
def test_attention_over_pages_equals_attention_over_decoded_tokens(bits, keys, group, dim):
    torch.manual_seed(bits[0] + group + dim)
    key, value = keys(bits[0], group), per_token(bits[1], group)
    batch, heads, kv_heads, queries, tokens = 3, 6, 2, 3, 4 * PAGE
    k, v = (torch.randn(batch, kv_heads, tokens, dim) for _ in range(2))
    packed = _pages(key, k), _pages(value, v)
    limits = [tokens, 2 * PAGE + 37, 0]
    skip = torch.rand(batch, tokens) < 0.1
    q = torch.randn(batch, heads, queries, dim)
    fast = ask("PAGES", key, value).run
    out, lse = fast(q, *packed, limits, skip, PAGE, 0.3, None, None)
    seen = (torch.arange(tokens) < torch.tensor(limits).unsqueeze(-1)) & ~skip
    expected = attend(q, key.decode(key.encode(k)), value.decode(value.encode(v)), 0.3, seen[:, None, None])
    # fp32 sums over 512 tokens in another order, an exponential good to 1e-6: hundreds of ulps are room enough
    torch.testing.assert_close(out, expected.out, rtol=2e-4, atol=2e-5)
    torch.testing.assert_close(lse[:2], expected.lse[:2], rtol=1e-5, atol=1e-4)
    assert (lse[2] == -torch.inf).all() and (out[2] == 0).all()


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e2])
def test_attention_is_stable_at_extreme_scores(scale, softcap):
    torch.manual_seed(0)
    codec = per_token(8)
    k, v = torch.randn(1, 1, 8 * PAGE, 64), torch.randn(1, 1, 8 * PAGE, 64)
    packed = _pages(codec, k), _pages(codec, v)
    q = torch.randn(1, 1, 1, 64)
    fast = ask("PAGES", codec, codec).run
    out, lse = fast(q, *packed, [8 * PAGE], None, PAGE, scale, softcap, None)
    expected = attend(q, codec.decode(codec.encode(k)), codec.decode(codec.encode(v)), scale, softcap=softcap)
    torch.testing.assert_close(out, expected.out, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(lse, expected.lse, rtol=1e-4, atol=1e-4)


def test_threads_do_not_change_the_result_beyond_rounding():
    torch.manual_seed(0)
    codec = per_token(4, 32)
    k, v = torch.randn(1, 1, 64 * PAGE, 64), torch.randn(1, 1, 64 * PAGE, 64)
    packed = _pages(codec, k), _pages(codec, v)
    q = torch.randn(1, 4, 1, 64)
    fast = ask("PAGES", codec, codec).run
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(fast(q, *packed, [64 * PAGE - 5], None, PAGE, 0.2, None, None))
    finally:
        torch.set_num_threads(before)
    for out, lse in results[1:]:
        torch.testing.assert_close(out, results[0].out, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(lse, results[0].lse, rtol=1e-5, atol=1e-5)


def test_what_it_does_not_serve_is_named():
    uniform = per_token(2, 32)
    raw = Codec(levels=Raw(), grouping=Grouping(along="channels"))
    symmetric = Codec(levels=Uniform(bits=4), grouping=Grouping(along="channels"), range=AbsMax())
    turned = Unrotate(frequencies=(1.0, 0.5, 0.25, 0.125), style="interleaved")
    interleaved = Codec(levels=Uniform(bits=4), grouping=Grouping(along="channels"), transform=turned)

    def refuses(operation, *codecs, **said):
        choice = ask(operation, *codecs, **said)
        assert choice.run is None and choice.name == "reference"
        return " ".join(choice.reasons)

    for codec, word in ((raw, "raw"), (symmetric, "absmax")):
        assert word in refuses("PAGES", codec, uniform) and word in refuses("ENCODE", codec)
    assert "interleaved" in refuses("PAGES", interleaved, uniform)
    assert ask("ENCODE", interleaved).run and ask("DECODE", interleaved).run
    assert "values are stored before a rotary embedding" in refuses("PAGES", uniform, interleaved)
    assert ask("PAGES", uniform, per_channel(2, 32)).run
    assert "not on cuda" in refuses("PAGES", uniform, uniform, device="cuda")
    assert "does not see" in refuses("PAGES", uniform, uniform, hidden=True)
    assert "more than 32 queries" in refuses("PAGES", uniform, uniform, queries=33)
    rotated = Codec(levels=Uniform(bits=4), grouping=Grouping(along="channels"), transform=Unrotate(frequencies=(1.0,)))
    for gone in ("gaps", "shifted"):
        assert "positions have gaps" in refuses("PAGES", rotated, uniform, **{gone: True})
        assert ask("PAGES", uniform, uniform, **{gone: True}).run
    assert "bias" in refuses("EXACT", biased=True) and "float64" in refuses("EXACT", kept=torch.float64)
    assert "merged" in refuses("STEP", uniform, uniform)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_exact_attention_reads_only_what_is_visible(dtype, softcap):
    torch.manual_seed(0)
    k, v = (torch.randn(2, 2, 37, 40).to(dtype) for _ in range(2))
    q, visible = torch.randn(2, 6, 3, 40), torch.rand(2, 1, 3, 37) < 0.5
    visible[..., 30:] = False
    visible[1, :, 2] = False  # a query that sees nothing
    expected = attend(q, k, v, 0.4, visible, softcap=softcap)
    k[:, :, 30:], v[:, :, 30:] = torch.nan, torch.nan
    fast = ask("EXACT").run
    out, lse = fast(q, k, v, visible, 0.4, softcap)
    torch.testing.assert_close(out, expected.out, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, expected.lse, rtol=1e-5, atol=1e-6)
    assert (lse[1, :, 2] == -torch.inf).all() and (out[1, :, 2] == 0).all()


def test_the_exponential_is_as_good_as_its_docstring_says():
    from kvist.kernels.numba.dense import exponentials

    top = torch.tensor(3.0)
    x = torch.cat([torch.linspace(-83, 3, 100_001), torch.tensor([-85.0, -1e4, -torch.inf])])
    found = x.clone()
    exponentials(found.numpy(), top.numpy()[()], torch.empty_like(x).numpy())
    truth, gap = (x.double() - top).exp(), (top - x).double()
    assert (found[-3:] == 0).all()
    assert ((found[:-3] - truth[:-3]).abs() <= 2e-7 * (1 + gap[:-3]) * truth[:-3]).all()


def test_no_kernel_inherits_the_arithmetic_of_its_caller():
    """numba compiles a helper that leaves fast-math open with that of whoever calls it first: then bits would depend on
    the order of calls."""
    import importlib
    import pkgutil

    from numba.core.registry import CPUDispatcher

    from kvist.kernels import numba

    modules = [f"{numba.__name__}.{m.name}" for m in pkgutil.iter_modules(numba.__path__)]
    found = {
        f for name in modules for f in vars(importlib.import_module(name)).values() if isinstance(f, CPUDispatcher)
    }
    assert len(found) > 20
    assert not [f.py_func.__name__ for f in found if "fastmath" not in f.targetoptions]
