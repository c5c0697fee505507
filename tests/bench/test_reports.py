"""What the benchmarks leave has a schema: what was written is read, what is no number is refused by its place."""

import json
from pathlib import Path

import pytest

from kvist.bench.reports import Decode, Encode, Gates, Throughput, load, read_beside

RUNS = Path(__file__).parents[2] / "runs"
KNOWN = {"decode": Decode, "decode-passive": Decode, "encode": Encode}
ROW = {"tokens": 64, "contender": "dynamic", "median ms": 1.5, "p10 ms": 1.0, "p90 ms": 2.0}


def test_the_repositorys_own_are_read():
    found = {path.stem: load(path) for path in RUNS.glob("*.json")}
    assert all(type(found[name]) is kind for name, kind in KNOWN.items())
    throughput = [report for report in found.values() if isinstance(report, Throughput)]
    assert len(throughput) == 4 and all(row.speed or row.not_run or row.failed for r in throughput for row in r.rows)
    assert found["kvquant"] is None and isinstance(load(RUNS / "leaderboard" / "gates.json"), Gates)
    assert found["decode"].data == json.loads((RUNS / "decode.json").read_text())


def test_what_is_saved_is_read(tmp_path):
    report = Decode(title="t", machine={"threads": 2}, rows=[ROW, {"tokens": 64, "contender": "hqq:2", "failed": "no"}])
    report.save(tmp_path / "new" / "decode.json")
    (tmp_path / "new" / "other.json").write_text('{"bench": "another", "rows": 3}')
    (tmp_path / "new" / "list.json").write_text("[1, 2]")
    assert read_beside(tmp_path / "new") == [("decode.json", report)]
    assert report.data["rows"][1] == {"tokens": 64, "contender": "hqq:2", "failed": "no"}
    assert [path.name for path in (tmp_path / "new").iterdir() if ".part" in path.name] == []


@pytest.mark.parametrize(
    ("row", "where"),
    [
        (ROW | {"median ms": float("nan")}, "it has the number NaN"),
        (ROW | {"median ms": -1.0}, "rows 0 median ms: .* found '-1.0'"),
        (ROW | {"median ms": 1e300}, "rows 0 median ms"),
        (ROW | {"tokens": -64}, "rows 0 tokens"),
        (ROW | {"speed": 3}, "rows 0 speed"),
        ({"contender": "a"}, "rows 0 tokens"),
    ],
)
def test_damage_is_named(row, where, tmp_path):
    path = tmp_path / "decode.json"
    path.write_text(json.dumps({"bench": "decode", "title": "t", "rows": [row]}))
    with pytest.raises(ValueError, match=f"decode.json is a damaged report of `kvist bench`: {where}"):
        load(path)
