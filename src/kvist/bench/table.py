"""Results of a benchmark: a JSON file written whole, and a table."""

import json
import os
import platform
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table

from kvist.atomic import replacing


def machine() -> dict:
    """What it ran on."""
    return {
        "processor": _processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def write(report: dict, path: str | Path | None) -> None:
    """The report as JSON at `path`, or nowhere; a half-written file never takes its place."""
    if path is None:
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as scratch:
        scratch.write_text(json.dumps(report, indent=1) + "\n")


def show(report: dict, as_json: bool) -> None:
    """Print the report as JSON, or its rows as a table; a row with "failed" says why."""
    if as_json:
        print(json.dumps(report))
        return
    rows = report["rows"]
    columns = list(dict.fromkeys(name for row in rows for name in row if name != "failed"))
    table = Table(title=report["title"])
    for name in columns:
        text = any(isinstance(row.get(name), str) for row in rows)
        table.add_column(name, justify="left" if text else "right", no_wrap=text)
    for row in rows:
        cells = [_cell(row.get(name)) for name in columns]
        if "failed" in row:
            cells[-1] = f"failed: {row['failed'][:60]}"
        table.add_row(*cells)
    out = Console()
    Console(width=None if out.is_terminal else 140).print(table)


def _cell(value) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if isinstance(value, float) else str(value)
