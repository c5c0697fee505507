"""Files of strangers, changed at random: each is served or refused in one sentence, whatever stands in it. No
traceback, no crash, nothing run, nothing written, within a memory and a time limit."""

import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
from doors import DOORS

WORKER = Path(__file__).with_name("worker.py")
MOST = 5  # faults that are told


def open_all(folder: Path, names: list[str], count: int) -> tuple[dict[str, Counter], list[str]]:
    """How often files of each door went which way, and what went wrong. A worker that dies is started again behind the
    file that it died of."""
    found, wrong = {name: Counter() for name in names}, []
    firsts = dict.fromkeys(names, 0)
    while firsts and len(wrong) < MOST:
        rest = [f"{name}:{first}" for name, first in firsts.items()]
        command = [sys.executable, str(WORKER), str(folder), str(count), *rest]
        with (folder / "said").open("wb") as said:  # what libraries say on stderr is no sentence of a door
            ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=said, timeout=60 + count * len(names))
        for line in ended.stdout.decode().splitlines():
            name, number, word, *rest = line.split(" ", 3)
            firsts[name] = int(number) + 1
            found[name][word] += 1
            if word == "wrong":
                wrong.append(f"{name} {number}: {' '.join(rest)}")
        firsts = {name: first for name, first in firsts.items() if first < count}
        if firsts and len(wrong) < MOST:
            name, first = next(iter(firsts.items()))
            said = (folder / "said").read_text(errors="replace")[-2000:]
            wrong.append(f"{name} {first}: the process ended with {ended.returncode}: {said}")
            firsts[name] = first + 1
    return found, wrong


@pytest.mark.skipif(sys.platform != "linux", reason="limits and sizes of a process are asked of Linux")
def test_changed_files(tmp_path, strangers):
    names = [name for name in DOORS if name != "model.gguf" or find_spec("gguf")]
    (tmp_path / "genuine").mkdir()
    for name in names:
        DOORS[name].make(tmp_path / "genuine" / name)
    found, wrong = open_all(tmp_path, names, -(-strangers // len(names)))
    assert not wrong, "\n".join(wrong)
    for name, counted in found.items():
        assert counted["ok"] + counted["refused"] == counted.total() and counted["refused"], (name, counted)
