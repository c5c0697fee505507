"""Writes docs/api.md from the docstrings of the public names, read from the source: nothing is imported.

python dev/api.py            write it
python dev/api.py --check    exit 1 when it is stale, write nothing
"""

import argparse
import ast
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "api.md"
SECTIONS = {  # title: (module as it is imported, {name: file})
    "The front door": (
        "kvist",
        {
            "Cache": "cache/cache.py",
            "attach": "attention/switch.py",
            "detach": "attention/switch.py",
            "Captured": "attention/captured.py",
            "Recipe": "plan.py",
            "Allocation": "allocation/table.py",
            "method": "methods/registry.py",
        },
    ),
    "What they give": (
        "",
        {"Report": "cache/report.py", "Attachment": "attention/switch.py", "Geometry": "types.py"},
    ),
    "Methods": (
        "kvist.methods",
        dict.fromkeys(("get", "parse", "resolve", "names", "entry", "defaults", "widths"), "methods/__init__.py"),
    ),
    "Testing a method": (
        "kvist.testing",
        {
            "LAWS": "testing/laws.py",
            "errors_fall": "testing/laws.py",
            "CASES": "testing/cases.py",
            "EACH": "testing/cases.py",
            "recipe": "testing/cases.py",
            "stand_in": "testing/stand_in.py",
        },
    ),
    "Models of the demo": ("kvist.demo.model", {"load": "demo/model.py", "recipe": "demo/model.py"}),
}
INNER = {"Cache": {"hear", "finish", "ours"}}  # called by hooks, or read by the rooms above
ABOUT = """# The public names

Made from the docstrings by `python dev/api.py`; a test holds it to them. Shapes of tensors are written (B, H, T, D):
rows, heads, tokens, channels. What is not here may change in any release ([versions](start.md#versions)).
"""


def page() -> str:
    """The whole of docs/api.md."""
    parts = [ABOUT]
    for title, (module, names) in SECTIONS.items():
        parts.append(f"## {title}\n")
        if module:
            parts.append(f"`from {module} import {', '.join(names)}`\n")
        for name, file in names.items():
            parts += entry(f"{module}.{name}" if module == "kvist" else name, file, definition(file, name))
    return "\n".join(parts)


def definition(file: str, name: str) -> tuple[ast.stmt, str]:
    """Where a file says what a name is, and its docstring. Raises ValueError where it says neither."""
    body = ast.parse((ROOT / "src" / "kvist" / file).read_text()).body
    for i, node in enumerate(body):
        if name not in _names(node):
            continue
        text = ast.get_docstring(node) if hasattr(node, "body") else _string(body[i + 1 : i + 2])
        if text:
            return node, text
    raise ValueError(f"{file} has no {name} with a docstring")


def entry(shown: str, file: str, found: tuple[ast.stmt, str]) -> list[str]:
    """A name as Markdown: how it is called, what it says, and its members where it is a class."""
    node, text = found
    lines = [f"### {shown}\n", f"[{file}](../src/kvist/{file})\n"]
    if isinstance(node, ast.FunctionDef):
        lines += [_code(_call(shown, node)), text + "\n"]
    elif isinstance(node, ast.ClassDef):
        lines += [_code(_constructor(shown, node)), text + "\n"]
        members = list(_members(node))
        for call, said in members:
            lines.append(f"- `{call}`\n{textwrap.indent(said, '  ')}")
        lines += [""] if members else []
    else:
        lines.append(text + "\n")
    return lines


def _names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _string(body: list[ast.stmt]) -> str:
    for node in body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            return node.value.value
    return ""


def _constructor(shown: str, node: ast.ClassDef) -> str:
    """How an object is made: by __init__, or by the fields of a dataclass or a model."""
    for member in node.body:
        if isinstance(member, ast.FunctionDef) and member.name == "__init__":
            return _call(shown, member)
    fields = [x for x in node.body if isinstance(x, ast.AnnAssign)]
    for field in fields:
        if field.value is not None and ast.unparse(field.value).startswith("Field("):
            field.value = None  # bounds, no default
    return f"{shown}({', '.join(map(_plain, fields))})"


def _members(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    """Public methods and properties with what they say; ValueError for one that says nothing."""
    for member in node.body:
        if not isinstance(member, ast.FunctionDef) or member.name.startswith("_"):
            continue
        if member.name in INNER.get(node.name, ()):
            continue
        text, marks = ast.get_docstring(member), {ast.unparse(x) for x in member.decorator_list}
        if not text:
            raise ValueError(f"{node.name}.{member.name} has no docstring")
        yield (member.name if "property" in marks else _call(member.name, member)), text


def _call(shown: str, node: ast.FunctionDef) -> str:
    if node.args.args and node.args.args[0].arg in ("self", "cls"):
        del node.args.args[0]
    returns = "" if node.returns is None or node.name == "__init__" else f" -> {_plain(node.returns)}"
    return f"{shown}({_plain(node.args)}){returns}"


class _Unquoted(ast.NodeTransformer):
    """Annotations that are strings become what the strings say."""

    def visit_arg(self, node: ast.arg) -> ast.arg:
        if isinstance(node.annotation, ast.Constant):
            node.annotation = ast.parse(str(node.annotation.value), mode="eval").body
        return node


def _plain(node: ast.AST) -> str:
    if isinstance(node, ast.Constant):  # an annotation by itself
        return str(node.value)
    return ast.unparse(_Unquoted().visit(node))


def _code(text: str) -> str:
    """A call in a block of its own, wrapped."""
    if len(text) > 118:
        text = "\n".join(textwrap.wrap(text, 118, subsequent_indent="    ", break_on_hyphens=False))
    return f"```text\n{text}\n```\n"


def main(arguments: list[str] | None = None) -> int:
    """0, or 1 when --check found a stale page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit 1 when the page is stale; write nothing")
    check = parser.parse_args(arguments).check
    made = page()
    if PAGE.exists() and PAGE.read_text() == made:
        return 0
    if not check:
        PAGE.write_text(made)
    print(f"{'stale' if check else 'written'}: docs/api.md")
    return int(check)


if __name__ == "__main__":
    sys.exit(main())
