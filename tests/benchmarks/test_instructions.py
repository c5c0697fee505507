"""The decode kernels' machine code stays within what full bandwidth leaves room for."""

import json
import subprocess
import sys

import pytest

from benchmarks.instructions import CHIPS, budget
from benchmarks.sass import main_loop

pytest.importorskip("triton")
pytest.importorskip("cuda.bindings")

SASS = """
.text.other:
        /*0000*/                   HMMA R0 ;
	.section	.text.sum
.text.sum:
.L_x_0:
        /*0000*/                   LDG.E R2, desc[UR4][R2.64] ;
.L_x_1:
        /*0010*/                   HMMA.16816.F32 R4, R8, R10, R4 ;
        /*0020*/                   HMMA.16816.F32 R4, R8, R10, R4 ;
        /*0030*/                   HMMA.16816.F32 R4, R8, R10, R4 ;
        /*0040*/                   HMMA.16816.F32 R4, R8, R10, R4 ;
        /*0050*/                   HMMA.16816.F32 R4, R8, R10, R4 ;
        /*0060*/                   VOTE.ANY P0, P0 ;
        /*0070*/              @!P0 BRA `(.L_x_2) ;
        /*0080*/                   FMUL R1, R1, R2 ;
        /*0090*/                   FMUL R1, R1, R2 ;
.L_x_2:
        /*00a0*/               @P1 BRA `(.L_x_1) ;
        /*00b0*/               @P2 BRA `(.L_x_0) ;
        /*00c0*/                   EXIT ;
"""


def counted(*options: str) -> list[dict]:
    """Rows of the benchmark, in a process of its own: in this one Triton may be the interpreter."""
    command = [sys.executable, "-m", "benchmarks", "instructions", "--json", *options]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = json.loads(found.stdout)["rows"]
    assert not [row for row in rows if "failed" in row]
    return rows


def test_the_innermost_loop_is_counted_and_what_a_vote_skips_is_told_apart():
    loop = main_loop(SASS, "sum")
    assert (loop.instructions, loop.rare, loop.usual) == (10, 2, 8)
    assert loop.opcodes["HMMA"] == 5 and loop.opcodes["FMUL"] == 2
    with pytest.raises(ValueError, match="no loop"):
        main_loop(SASS, "other")


def test_the_budget_is_that_of_the_design():
    assert budget(CHIPS[90], 2, 128) == pytest.approx(1.94, abs=0.01)
    assert budget(CHIPS[90], 4, 128) == pytest.approx(3.66, abs=0.01)


def test_the_path_that_ships_for_hopper_keeps_its_promise():
    rows = {(r["kernel"], r["bits"], r["group"]): r for r in counted("--arch", "90")}
    assert rows["cuda", 2, 128]["per number"] <= 1.75
    assert rows["cuda", 2, 32]["per number"] <= 1.95
    assert rows["cuda", 4, 128]["per number"] <= 2.4 and rows["cuda", 4, 32]["per number"] <= 2.4
    for (kernel, bits, _), row in rows.items():
        if kernel == "cuda":
            assert row["per number"] < row["budget"]
        else:
            assert row["per number"] <= {2: 4.5, 4: 4.9}[bits]


def test_other_architectures():
    rows = counted("--arch", "80", "--arch", "100", "--bits", "2", "--group", "128")
    assert {row["arch"] for row in rows} == {"sm_80", "sm_100"}
    found = {row["arch"]: row for row in rows if row["kernel"] == "cuda"}
    assert found["sm_80"]["per number"] < found["sm_80"]["budget"]
    assert found["sm_100"]["per number"] <= 1.75  # above what a B200's bandwidth leaves room for


def test_an_unknown_architecture_is_refused():
    command = [sys.executable, "-m", "benchmarks", "instructions", "--arch", "75"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode and "80, 90, 100, found 75" in found.stderr
