"""Every error is one sentence, with its cause and the way out; --debug shows the traceback, wherever it stands."""

import json
import os
import subprocess
import sys

import pytest
import torch
import typer
from typer.testing import CliRunner

from kvist.cli import methods
from kvist.cli.app import app
from kvist.cli.errors import EXIT, FAULT, sentence


def raised(make) -> Exception:
    try:
        make()
    except Exception as error:
        return error
    raise AssertionError


class Ambiguous(AttributeError):
    """As configs raise it."""


def broken():
    raise Ambiguous("head_dim differs per layer. Look at each layer.\nMore\nlines")


CASES = {
    "torch": (lambda: torch.ones(2, 3) @ torch.ones(2, 3), FAULT, "unforeseen RuntimeError: mat1 and mat2"),
    "a config": (broken, FAULT, "unforeseen Ambiguous: head_dim differs per layer; `kvist --debug …`"),
    "memory": (lambda: torch.empty(2**60), EXIT, "not enough memory"),
    "python's memory": (lambda: bytes(2**62), EXIT, "not enough memory"),
    "a value": (lambda: int("x"), EXIT, "invalid literal"),
    "a file": (lambda: os.stat("/none/of/it"), EXIT, "No such file"),
    "text": (lambda: "\ud800".encode(), EXIT, "PYTHONIOENCODING"),
    "a key": (lambda: {}["word"], FAULT, "unforeseen KeyError: 'word'"),
    "depth": (lambda: json.loads("[" * 10**5), FAULT, "unforeseen RecursionError"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_sentences(case, monkeypatch):
    make, code, words = CASES[case]
    error = raised(make)
    said, found = sentence(error)
    assert words in said and found == code

    def failing(*_):
        raise error

    monkeypatch.setattr(methods, "rows", failing)
    result = CliRunner().invoke(app, ["methods"])
    assert result.exit_code == code and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("kvist: ") and words in line and line.isprintable()
    for order in (["--debug", "methods"], ["methods", "--debug"], ["methods", "--debug", "--json"]):
        shown = CliRunner().invoke(app, order)
        assert shown.exception is error and not shown.stderr


def test_errors_of_libraries_name_them():
    from transformers.cache_utils import DynamicSlidingWindowLayer

    layer = DynamicSlidingWindowLayer(sliding_window=8)
    layer.update(torch.zeros(1, 1, 20, 4), torch.zeros(1, 1, 20, 4))
    said, code = sentence(raised(lambda: layer.crop(-3)))
    assert said.startswith("transformers stopped with") and "--debug" in said and code == FAULT


def test_what_ends_without_an_error():
    assert sentence(typer.Exit(0)) is None and sentence(BrokenPipeError()) is None


def test_a_traceback_is_asked_for():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for words, lines in ((["show", "nix"], 1), (["show", "nix", "--debug"], 5)):
        ended = subprocess.run([sys.executable, "-m", "kvist", *words], capture_output=True, text=True, env=environment)
        assert ended.returncode and len(ended.stderr.splitlines()) >= lines
        assert ("Traceback" in ended.stderr) == ("--debug" in words)
