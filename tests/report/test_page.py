"""The page, the Markdown and the picture: all that was measured is there, and nothing is loaded from elsewhere."""

import json
import re
from html.parser import HTMLParser

import pytest
import typer
from rows import bench, row, rows, write
from typer.testing import CliRunner

from kvist.cli import compare, report
from kvist.cli.errors import Verbs
from kvist.report import page, study
from kvist.report.page import markdown

app = typer.Typer(cls=Verbs, pretty_exceptions_enable=False)
app.command("report")(report.report)
app.command("compare")(compare.compare)
METHODS = ("exact", "kivi:2", "kivi k=4 v=2", "hadamard:4", "int4 (control)")


class Elements(HTMLParser):
    """Every element's name and attributes; whether all that is opened is closed."""

    VOID = ("meta", "br", "link", "img")

    def __init__(self, text: str):
        super().__init__()
        self.found, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Made-up results, and reports of benchmarks beside them."""
    path = tmp_path_factory.mktemp("results")
    write(path / "results.jsonl", rows(methods=METHODS, models=("kvist-6m",), items=12))
    bench(path)
    return path


@pytest.fixture(scope="module")
def written(folder, tmp_path_factory):
    """What one run says and leaves."""
    out = tmp_path_factory.mktemp("out") / "new"
    result = CliRunner().invoke(app, ["report", str(folder), "--out", str(out), "--json"])
    assert result.exit_code == 0, (result.output, result.exception)
    return out, json.loads(result.stdout)


@pytest.fixture(scope="module")
def text(written):
    return (written[0] / "report.html").read_text()


def refused(*words: str) -> str:
    """The one sentence of a refusal."""
    result = CliRunner().invoke(app, list(words))
    said = [line for line in result.stderr.splitlines() if line.strip()]
    assert result.exit_code == 2 and result.stdout == "" and len(said) == 1 and said[0].startswith("kvist: ")
    return said[0]


def test_what_is_written(written, folder):
    out, told = written
    assert {path.name for path in out.iterdir()} == {"report.html", "report.md", "pareto.png"}
    assert (out / "pareto.png").read_bytes().startswith(b"\x89PNG") and len(told["verdict"]) == 3
    assert told["baseline"] == "kivi:2" and {task["task"] for task in told["tasks"]} >= {"fidelity", "needle", "gsm8k"}
    (line,) = [line for line in told["tasks"][0]["methods"] if line["method"] == "hadamard:4"]
    assert line["baseline"]["verdict"] == "better" and line["baseline"]["difference"]["high"] < 0
    assert "pareto.png" in (out / "report.md").read_text() and not list(folder.glob("*.html"))


def test_nothing_is_loaded(text):
    elements = Elements(text)
    assert elements.open == [] and len(text) < 1_500_000
    for tag, attributes in elements.found:
        assert tag not in ("link", "img", "iframe", "object"), tag
        assert "src" not in attributes and attributes.get("href", "#").startswith("#"), attributes
    assert "@import" not in text and not re.search(r"url\((?!#)", text)


def test_all_is_there_and_traced(text, folder):
    elements = Elements(text).found
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    named = [each for each in ids if not re.fullmatch(r"[mpC][0-9a-z_]+", each)]  # markers of figures may recur
    assert len(named) == len(set(named))
    links = {attributes["href"][1:] for _, attributes in elements if "href" in attributes}
    assert links <= set(ids)
    figures = [attributes for tag, attributes in elements if tag == "figure"]
    assert {each["id"].rstrip("0123456789") for each in figures} == {
        *("pareto-", "map-", "position-", "sides", "horizon-", "at-once", "memory-", "cost", "bench-", "factors")
    }
    for each in figures:
        numbers = each["data-rows"].split()
        assert all(f"rows-{number}" in ids for number in numbers)
        assert numbers or each["id"].startswith("bench-")
    for method in METHODS:
        assert f">{method}<" in text
    count = len((folder / "results.jsonl").read_text().splitlines())
    known = re.findall(r"results\.jsonl:([\d,-]+)", text)
    lines = {n for one in known for part in one.split(",") for n in range(*_ends(part))}
    assert lines == set(range(1, count + 1))
    assert "holds" in text and "what rounding alone does" in text and "decode.json" in text


def test_markdown_has_the_same_numbers(folder, text):
    told = markdown(study.read(folder))
    assert all(f"`{method}`" in told for method in METHODS)
    lines = [line for line in told.splitlines() if line.startswith("|")]
    widths = [line.count("|") for line in lines]
    assert all(line.endswith("|") for line in lines) and len(set(widths)) >= 2
    (cell,) = {line.split("|")[3].strip() for line in lines if line.startswith("| `hadamard:4` ● | 5.05 ")} & {
        line.split("|")[3].strip() for line in lines[:7]
    }
    assert cell.split()[0] in text and cell.split(" ", 1)[1] in text


def test_names_are_escaped(tmp_path):
    bad = '<b> & "$x$" | {{ 1 }}'
    values = {"kl": [0.1, 0.2, 0.3], "nll": [1.0, 2.0, 3.0], "tokens": [1, 1, 1], "kl_curve": [[0.1, 0.2, 0.3]] * 3}
    made = [row("fidelity", name, values, bits=4 + i) for i, name in enumerate(("exact", bad, "kivi:2"))]
    write(tmp_path / "r.jsonl", made)
    read = study.read(tmp_path)
    text = page.page(read)
    assert Elements(text).open == [] and "<b>" not in text and "&lt;b&gt; &amp;" in text
    assert "\\|" in markdown(read)


def test_little_is_enough(tmp_path):
    """One window, two methods, no exact cache."""
    write(tmp_path / "r.jsonl", [row("fidelity", name, {"kl": [0.1]}) for name in ("a:2", "b:3")])
    text = page.page(study.read(tmp_path))
    assert "pareto-1" in text and 'id="maps"' not in text and 'id="nuisance"' not in text
    write(tmp_path / "r.jsonl", [row("gsm8k", name, {"score": [1.0, 0.0]}) for name in ("a:2", "b:3")])
    text = page.page(study.read(tmp_path))
    assert 'id="scores"' in text and 'id="tables"' not in text


def test_refusals(tmp_path, folder):
    assert "no results in" in refused("report", str(tmp_path))
    assert "--baseline is one of" in refused("report", str(folder), "--baseline", "x", "--out", str(tmp_path))
    assert "--out is a folder" in refused("report", str(folder), "--out", str(folder / "results.jsonl"))
    assert "without --results" in refused("compare", "kivi:2", "int4")
    assert "no such method" in refused("compare", "kivi:2", "int5", "--results", str(folder))
    assert not list(tmp_path.iterdir())


def test_the_program_compares(folder):
    said = CliRunner().invoke(app, ["compare", "hadamard:4", "kivi:2", "-r", str(folder)]).stdout.splitlines()
    start = "fidelity (kvist-6m, as trained, 12 items): hadamard:4 is really better"
    assert any(line.startswith(start) for line in said)
    told = json.loads(CliRunner().invoke(app, ["compare", "hadamard:4", "kivi:2", "-r", str(folder), "--json"]).stdout)
    assert [each["sentence"] for each in told] == said and told[0]["real"] is True


def _ends(part: str) -> tuple[int, int]:
    first, _, last = part.partition("-")
    return int(first), int(last or first) + 1


@pytest.mark.parametrize("name", ["report.html", "report.md", "pareto.png"])
def test_a_folder_in_place_of_one_file_writes_none(name, tmp_path):
    write(tmp_path / "results.jsonl", rows(("fidelity",), METHODS, ("kvist-6m",), ("none",), 2))
    (tmp_path / "out" / name).mkdir(parents=True)
    result = CliRunner().invoke(app, ["report", str(tmp_path), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2 and f"{name}, found a folder; move it away" in result.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]
