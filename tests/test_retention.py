"""Which tokens wait: every rule against a plain simulation, and the published recurrences as lists."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.retention import Block, Gather, Immediate, KeepAll, LogSparse, Ratio, Share, Sliding, Streaming, log_pins

windows = st.integers(1, 70)
rules = st.one_of(
    st.just(KeepAll()),
    st.just(Immediate()),
    st.builds(Block, size=windows),
    st.builds(Gather, size=windows),
    st.builds(Sliding, size=windows),
    st.builds(Streaming, window=windows),
    st.builds(LogSparse, window=windows),
    st.builds(Ratio, ratio=st.floats(0, 0.9), group=st.sampled_from([1, 8, 11, 32])),
    st.builds(Share, ratio=st.floats(0, 1, exclude_max=True), group=st.sampled_from([1, 8, 11, 32])),
)


@settings(max_examples=300, deadline=None)
@given(rule=rules, steps=st.lists(st.integers(1, 300), min_size=1, max_size=30))
def test_laws_of_every_rule(rule, steps):
    """The frontier never retreats and never overtakes; pins are packed, ascending and few; nothing waits too long."""
    frontier = length = 0
    for i, step in enumerate(steps):
        length += step
        after = rule.advance(frontier, length, i == 0)
        assert frontier <= after <= length
        frontier = after
        pins = rule.pins(frontier)
        assert list(pins) == sorted(set(pins)) and len(pins) <= rule.most_pins
        assert all(0 <= pin < frontier for pin in pins)
        if rule.most is not None:
            assert length - frontier <= rule.most


@settings(max_examples=200, deadline=None)
@given(rule=rules, prompt=st.integers(1, 400), cuts=st.lists(st.integers(1, 60), max_size=12))
def test_the_order_of_updates_matters_only_where_a_rule_says_so(rule, prompt, cuts):
    if rule.chunking is not None:
        return
    frontier = rule.advance(0, prompt, True)
    length = prompt
    for cut in cuts:
        length += cut
        frontier = rule.advance(frontier, length, False)
    assert frontier == rule.advance(0, length, True)


def test_rules_that_depend_on_chunking_name_the_reason():
    assert all(rule.chunking for rule in (Streaming(window=8), Gather(size=8), Ratio(ratio=0.2)))
    others = (KeepAll(), Immediate(), Block(size=8), Sliding(size=8), LogSparse(window=8), Share(ratio=0.2))
    assert not any(rule.chunking for rule in others)


@settings(max_examples=100, deadline=None)
@given(size=windows, prompt=st.integers(1, 300), more=st.integers(0, 200))
def test_block_and_sliding_are_kivis_two_streaming_rules(size, prompt, more):
    """The published loop: after a prompt keys keep T mod R and values min(T, R); then keys empty a full residual and
    values drop their oldest when there are more than R."""
    keys, values = prompt % size, min(prompt, size)
    block, sliding = (rule.advance(0, prompt, True) for rule in (Block(size=size), Sliding(size=size)))
    for length in range(prompt, prompt + more + 1):
        if length > prompt:
            keys = 0 if keys + 1 == size else keys + 1
            values = min(values + 1, size)
            block = Block(size=size).advance(block, length, False)
            sliding = Sliding(size=size).advance(sliding, length, False)
        assert (length - block, length - sliding) == (keys, values)


@settings(max_examples=100, deadline=None)
@given(window=windows, prompt=st.integers(1, 400), more=st.integers(0, 300))
def test_streaming_is_the_published_window(window, prompt, more):
    """A prompt leaves W; a new token that would make the window 2W flushes all but the last W."""
    recent = list(range(prompt))[-window:]
    rule = Streaming(window=window)
    frontier = rule.advance(0, prompt, True)
    assert frontier == recent[0]
    for length in range(prompt + 1, prompt + more + 1):
        recent.append(length - 1)
        if len(recent) == 2 * window:
            recent = recent[-window:]
        frontier = rule.advance(frontier, length, False)
        assert frontier == recent[0]


@settings(max_examples=100, deadline=None)
@given(size=windows, prompt=st.integers(1, 400), more=st.integers(0, 300))
def test_gathered_values_count_from_the_prompt(size, prompt, more):
    """A prompt of a block or more leaves nothing; then a residual grows token by token and is emptied when full."""
    rule, residual = Gather(size=size), prompt if prompt < size else 0
    frontier = rule.advance(0, prompt, True)
    for length in range(prompt, prompt + more + 1):
        if length > prompt:
            residual = (residual + 1) % size
            frontier = rule.advance(frontier, length, False)
        assert length - frontier == residual


@pytest.mark.parametrize(
    ("window", "prompt", "steps", "exact"),
    [(4, 9, 0, 4), (4, 9, 3, 7), (4, 9, 4, 4), (64, 69, 63, 67), (64, 69, 64, 4)],
)
def test_the_worked_examples_of_gathered_values(window, prompt, steps, exact):
    """What the published program keeps exact with 4 sinks: [0, 1, 2, 3] of 9 tokens at W = 4, whereas blocks counted
    from the sinks would leave token 8; and 67 values at W = 64, 63 tokens after a prompt of 69, where they leave 4."""
    rule = Gather(size=window, sinks=4)
    frontier = rule.advance(0, prompt - 4, True)
    for length in range(prompt - 3, prompt + steps - 3):
        frontier = rule.advance(frontier, length, False)
    assert prompt + steps - frontier == exact


def published_prompt(n: int, w: int) -> tuple[list[int], list[int]]:
    """The log set and the window of a prompt: halve the first 2W until fewer than 3W are left."""
    if n <= w:
        return [], list(range(n))
    tokens = list(range(n))
    while len(tokens) >= 3 * w:
        tokens = tokens[: 2 * w][::2] + tokens[2 * w :]
    return tokens[:w], tokens[w:]


def published_step(log: list[int], window: list[int], token: int, w: int) -> tuple[list[int], list[int]]:
    """One decoded token: one that makes the window 2W sends its W oldest into the log set, which is then halved."""
    window = [*window, token]
    if len(window) >= 2 * w:
        oldest, window = window[:w], window[w:]
        log = (log + oldest)[::2] if log else oldest
    return log, window


@settings(max_examples=150, deadline=None)
@given(w=windows, blocks=st.floats(0.01, 12), more=st.floats(0, 6))
def test_exact_tokens_of_the_log_rule_are_those_of_the_published_recurrence(w, blocks, more):
    prompt = max(1, int(blocks * w))
    rule = LogSparse(window=w)
    log, window = published_prompt(prompt, w)
    frontier = rule.advance(0, prompt, True)
    assert kept(rule, frontier, prompt) == log + window
    for length in range(prompt + 1, prompt + int(more * w) + 1):
        log, window = published_step(log, window, length - 1, w)
        frontier = rule.advance(frontier, length, False)
        assert kept(rule, frontier, length) == log + window


@settings(max_examples=100, deadline=None)
@given(w=windows, more=st.integers(0, 500))
def test_log_sets_of_a_sequence_that_only_decodes(w, more):
    """They are also those of a prompt of the same length: [0, 2, 4, 6] and the newest 4 at W = 4 and 12 tokens."""
    rule, frontier, log, window = LogSparse(window=w), 0, [], []
    for length in range(1, more + 1):
        log, window = published_step(log, window, length - 1, w)
        frontier = rule.advance(frontier, length, False)
        assert (list(rule.pins(frontier)), list(range(frontier, length))) == (log, window)
        assert log + window == [p for part in published_prompt(length, w) for p in part]


def test_a_log_prompt_of_twelve_tokens():
    rule = LogSparse(window=4)
    assert kept(rule, rule.advance(0, 12, True), 12) == [0, 2, 4, 6, 8, 9, 10, 11]
    assert rule.advance(4, 12, False) == 8


def kept(rule, frontier: int, length: int) -> list[int]:
    return [*rule.pins(frontier), *range(frontier, length)]


def test_the_worked_examples_of_the_log_set():
    rule = LogSparse(window=8)
    frontier = rule.advance(0, 1000, True)
    assert frontier == 992 and rule.pins(frontier) == (0, 968, 976, 980, 984, 986, 988, 990)
    rule = LogSparse(window=42)
    frontier = rule.advance(0, 1000, True)
    pins = rule.pins(frontier)
    gaps = [b - a for a, b in pairwise(pins)]
    assert frontier == 924 and len(pins) == 42
    assert gaps[:8] == [694, 42, 26, 16, 16, 10, 8, 8] and gaps[-1] == 2


@settings(max_examples=100, deadline=None)
@given(w=windows, blocks=st.integers(1, 40))
def test_the_log_set_has_w_members_and_keeps_the_first_token(w, blocks):
    pins = log_pins(w, blocks)
    assert len(pins) == w and pins[0] == 0


def exact_tokens(rule, prompt: int, more: int) -> int:
    """The most tokens that a side keeps exact at any moment: sinks, pins and those that wait."""
    frontier = rule.advance(0, prompt, True)
    most = 0
    for length in range(prompt, prompt + more + 1):
        frontier = rule.advance(frontier, length, False) if length > prompt else frontier
        most = max(most, rule.sinks + len(rule.pins(frontier)) + length - frontier)
    return most


@settings(max_examples=80, deadline=None)
@given(w=windows, sinks=st.integers(0, 8), prompt=st.integers(1, 500), more=st.integers(0, 300))
def test_published_costs_are_upper_bounds(w, sinks, prompt, more):
    """S + 2W, 3W, and for the partial forms the mean of keys and values: S + 1.5W and 2W."""
    streaming = exact_tokens(Streaming(window=w, sinks=sinks), prompt, more)
    log = exact_tokens(LogSparse(window=w), prompt, more)
    assert streaming <= sinks + 2 * w and log <= 3 * w
    for values in (Block(size=w, sinks=sinks), Gather(size=w, sinks=sinks)):
        assert (streaming + exact_tokens(values, prompt, more)) / 2 <= sinks + 1.5 * w
    assert (log + exact_tokens(Block(size=w), prompt, more)) / 2 <= 2 * w


def test_published_costs_are_reached_within_one_token():
    """The bounds are tight: long decoding comes within a token of them."""
    assert exact_tokens(Streaming(window=32, sinks=4), 100, 200) == 4 + 2 * 32 - 1
    assert exact_tokens(LogSparse(window=32), 100, 200) == 3 * 32 - 1


COLLAPSE = [  # KVmix: ratio, group, exact tokens after a prompt of 4,096 and after each of four steps, steady range
    (0.2, 32, [832, 193, 66, 35, 36], (7, 38)),
    (0.1, 32, [416, 65, 34, 3, 4], (3, 34)),
    (0.3, 32, [1248, 385, 130, 67, 36], (13, 44)),
    (0.2, 11, [829, 170, 39, 18, 8], (2, 12)),
]


@pytest.mark.parametrize(("ratio", "group", "held", "steady"), COLLAPSE)
def test_ratio_windows_collapse_as_published(ratio, group, held, steady):
    rule, frontier, found = Ratio(ratio=ratio, group=group), 0, []
    for length in range(4096, 4096 + 2000):
        frontier = rule.advance(frontier, length, length == 4096)
        found.append(length - frontier)
    assert found[:5] == held
    assert (min(found[1000:]), max(found[1000:])) == steady
    assert max(found[1000:]) < group / (1 - ratio)


@settings(max_examples=100, deadline=None)
@given(ratio=st.floats(0, 0.9), group=st.sampled_from([8, 11, 32]), steps=st.lists(st.integers(1, 500), min_size=1))
def test_ratio_packs_the_oldest_whole_groups(ratio, group, steps):
    rule, frontier, length = Ratio(ratio=ratio, group=group), 0, 0
    for i, step in enumerate(steps):
        length += step
        held = length - frontier
        packed = (held - int(ratio * held)) // group * group
        after = rule.advance(frontier, length, i == 0)
        assert after - frontier == packed
        frontier = after


@settings(max_examples=100, deadline=None)
@given(ratio=st.floats(0, 0.9), group=st.sampled_from([8, 11, 32]), steps=st.lists(st.integers(1, 500), min_size=1))
def test_a_share_of_the_context_stays_exact_at_any_length(ratio, group, steps):
    rule, frontier, length = Share(ratio=ratio, group=group), 0, 0
    for i, step in enumerate(steps):
        length += step
        frontier = rule.advance(frontier, length, i == 0)
        share = int(ratio * length)
        assert frontier % group == 0 and share <= length - frontier < share + group


def test_the_share_by_hand():
    """A fifth of 4,096 is 819; the other 3,277 are 102 groups of 32 and 13 tokens. Where the ratio of what waits falls
    to some 36 tokens, the share stays; a crop gives nothing back."""
    rule = Share(ratio=0.2)
    assert rule.advance(0, 4096, True) == 102 * 32 == 4096 - 819 - 13
    assert rule.most is None and rule.chunking is None
    assert [6096 - rule.advance(n, 6096, False) for n in (0, 3264)] == [6096 - 152 * 32] * 2
    assert rule.advance(3264, 3270, False) == 3264


IMPOSSIBLE = [
    lambda: Block(size=0),
    lambda: Ratio(ratio=1.0),
    lambda: Share(ratio=1.0),
    lambda: Share(ratio=-0.1),
    lambda: Sliding(size=4, sinks=-1),
]


@pytest.mark.parametrize("make", IMPOSSIBLE)
def test_impossible_rules_are_refused(make):
    with pytest.raises(ValueError):
        make()
