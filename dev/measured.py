"""Files of measurements that runs/, the demo and the benchmarks write, and how their tables are written."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def table(head: list[str], rows: list[list[str]], align: str) -> str:
    rule = [{"l": ":--", "r": "--:"}[a] for a in align]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def read(candidates: tuple[str, ...]):
    path = next((ROOT / name for name in candidates if (ROOT / name).exists()), None)
    return None if path is None else json.loads(path.read_text())


def count(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


def machine(found: dict) -> str:
    return (
        f"{found['processor']} ({found['capability']}), {count(found['threads'], 'thread')}, "
        f"Python {found['python']}, torch {found['torch']}, transformers {found['transformers']}."
    )
