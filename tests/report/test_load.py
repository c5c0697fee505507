"""Files of rows: grouped, traced to their lines, refused in a sentence."""

import lzma

import pytest
from rows import row, write

from kvist.report import study
from kvist.report.load import load, titles


def kl(*values: float) -> dict:
    return {"kl": list(values)}


def test_cells_are_traced_to_lines(tmp_path):
    some = [
        row("fidelity", "a", kl(1.0, 2.0)),
        row("fidelity", "b", kl(3.0, 4.0)),
        row("fidelity", "a", kl(5.0), items=(2,)),
        row("fidelity", "a", kl(6.0), items=(3,)),
    ]
    write(tmp_path / "one.jsonl", some)
    more = row("fidelity", "a", kl(7.0), items=(9,)).line.encode()
    (tmp_path / "two.jsonl.xz").write_bytes(lzma.compress(more))
    (group,) = load(tmp_path)
    assert [entry.source for entry in group.entries] == ["one.jsonl:1,3-4, two.jsonl.xz:1", "one.jsonl:2"]
    assert group.entries[0].cell.items == [0, 1, 2, 3, 9] and group.entries[0].cell.values["kl"] == [1, 2, 5, 6, 7]
    # what is compared is what all have
    assert group.whole.items == 2 and group.whole.entries[0].cell.values["kl"] == [1, 2]
    assert group.place.name == "small" and "source novels" in group.about


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    path = write(tmp_path / "r.jsonl", [row("fidelity", "a", kl(1.0)), row("fidelity", "b", kl(1.0))])
    before = path.read_bytes() + b'{"task": "fid'
    path.write_bytes(before)
    assert len(load(path)[0].entries) == 2 and path.read_bytes() == before


def test_ways_of_measuring_are_told_apart(tmp_path):
    some = [row("ppl", "a", kl(1.0), settings={"mode": mode, "seqlen": 64}) for mode in ("stored", "simulated")]
    some += [row("ppl", "a", kl(1.0), settings={"mode": "stored", "seqlen": 64}, stress="strong")]
    some += [row("ppl", "a", kl(2.0), settings={"mode": "stored", "seqlen": 64}, digest="another")]
    groups = load(write(tmp_path / "r.jsonl", some))
    assert sorted(titles(groups).values()) == ["ppl", "ppl, mode simulated", "ppl, mode stored"]
    both = next(group for group in groups if len(group.entries) == 2)
    assert [entry.method for entry in both.entries] == ["a (a)", "a (anothe)"]


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ([], "no results"),
        ([row("fidelity", "a", kl(1.0))], "found a alone"),
        ([row("fidelity", "a", kl(1.0)), row("fidelity", "b", kl(1.0), items=(7,))], "no item was measured with every"),
    ],
)
def test_refusals(made, said, tmp_path):
    if made:
        write(tmp_path / "r.jsonl", made)
    with pytest.raises(ValueError, match=said):
        study.read(tmp_path)


def test_more_refusals(tmp_path):
    with pytest.raises(ValueError, match="found nothing"):
        load(tmp_path / "nowhere")
    write(tmp_path / "r.jsonl", [row("fidelity", name, kl(1.0)) for name in ("a", "b")])
    with pytest.raises(ValueError, match="--baseline is one of a, b, found 'c'"):
        study.read(tmp_path, "c")
    (tmp_path / "r.jsonl").write_text("hello\n")
    with pytest.raises(ValueError, match=r"line 1 of .* is no result"):
        load(tmp_path)
    (tmp_path / "r.jsonl").unlink()
    (tmp_path / "r.jsonl.xz").write_bytes(b"hello")
    with pytest.raises(ValueError, match="no xz file"):
        load(tmp_path)
