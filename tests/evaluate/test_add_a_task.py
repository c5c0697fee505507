"""A task is one file: one that is written here is measured, told and drawn, and nothing else knows of it."""

import json
import sys

import pytest
from typer.testing import CliRunner

from kvist.cli.app import app
from kvist.demo.model import FOLDER
from kvist.evaluate import registry

FILE = '''
"""Echo: how much of the last keys of a text a cache gives back, as a toy."""

from dataclasses import dataclass

import torch
from transformers import DynamicCache

from kvist.evaluate.contenders import bits, fill
from kvist.evaluate.generation import living, read, states_of
from kvist.evaluate.measures import Compared, Dots, Section, average, column
from kvist.evaluate.registry import task
from kvist.evaluate.task import Measured
from kvist.evaluate.windows import OfWindows, Text, Windowed
from kvist.models.adapter import describe


@dataclass(frozen=True)
class Options(Windowed):
    """last: tokens that are looked at."""

    last: int = 4


@dataclass(frozen=True)
class Echo(OfWindows):
    last: int = 4
    batch, name, metric, recipes_only = 1, "echo", 1, False

    @property
    def settings(self):
        return self.text.settings | {"last": self.last}

    @torch.no_grad()
    def measure(self, model, contenders, items):
        ids = self.text.windows[list(items)]
        exact = DynamicCache(config=model.config)
        read(model, exact, ids, torch.ones_like(ids), 8192)
        states = states_of(exact)
        for i, contender in enumerate(contenders):
            with living(model, contender, ids.shape[1]) as cache:
                fill(cache, states, None)
                size = bits(cache, describe(model).shape, len(ids))
            loss = 1 / size
            yield Measured(i, size, 0.0, {"loss": [loss] * len(items), "half": [loss / 2] * len(items)})


@task(
    "echo",
    "how much of the last keys comes back",
    options=Options,
    statistics={"loss": average("loss", "what is lost", "of the last keys"), "half": average("half")},
    compared={"loss": Compared(("loss",), column("loss"), True, "a loss")},
    section=Section("echo", "What echoes"),
    figures=(
        Dots("echoes", "Losses", ("loss", "half"), {"all": column("loss"), "half": column("half")}, "loss", "A toy."),
    ),
)
def echo(options, source):
    return [Echo(Text.first(options, source, options.length(source)), options.last)]
'''


@pytest.fixture
def echo(tmp_path, monkeypatch):
    """The task's module, imported; its registration is taken away again."""
    (tmp_path / "echo_task.py").write_text(FILE)
    monkeypatch.syspath_prepend(tmp_path)
    registry.kinds()
    import echo_task  # noqa: F401

    yield
    registry.KINDS.pop("echo", None)
    del sys.modules["echo_task"]


def call(*words: str) -> str:
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def test_a_task_in_one_file(echo, tmp_path):
    (tmp_path / "book.txt").write_text("The old house stood by the river, and nobody had lived in it. " * 20)
    listed = call("eval", "--list-tasks")
    assert "echo" in listed and "how much of the last keys comes back" in listed and "last" in listed
    words = ["eval", str(FOLDER), "--device", "cpu", "--data", str(tmp_path / "book.txt"), "-m", "int8", "-m", "int4"]
    words += ["-n", "2", "--seqlen", "48", "-t", "echo last=3", "--out", str(tmp_path / "out")]
    (told,) = json.loads(call(*words, "--json"))["tasks"]
    exact, int8, int4 = told["results"]
    assert told["settings"]["last"] == 3 and exact["loss"]["value"] == pytest.approx(1 / exact["bits"])
    assert int4["half"]["value"] == pytest.approx(int4["loss"]["value"] / 2) and int8["loss_difference"]["value"] == 0
    assert "loss difference" in call(*words)
    call("report", str(tmp_path / "out"))
    page, tables = ((tmp_path / "out" / name).read_text() for name in ("report.html", "report.md"))
    assert 'id="echo"' in page and 'figure id="echoes"' in page and ">what is lost</th>" in page
    assert "| method | bits | what is lost | to int8 | to best cheaper |" in tables
    said = call("compare", "int8", "int4", "-r", str(tmp_path / "out"))
    assert said.startswith("echo (kvist-6m, as trained, 2 items): no difference") and "a loss: " in said
    del registry.KINDS["echo"]  # rows of a task that nobody registered can be read
    call("report", str(tmp_path / "out"))
    assert "echo: kvist-6m" in (tmp_path / "out" / "report.html").read_text()
