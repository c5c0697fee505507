"""`python -m benchmarks`, from the repository's root: what needs a GPU, or what a compiler makes of the kernels."""

from dataclasses import dataclass
from pathlib import Path

import typer

from kvist.cli.errors import Verbs
from kvist.cli.files import check_plot
from kvist.cli.options import command
from kvist.cli.show import Printed
from kvist.flags import flag

app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Measure the kernels; `make gpu` measures all that wants a GPU.",
)


@dataclass(frozen=True)
class Kernels:
    """Which kernels are measured, on what."""

    shape: tuple[str, ...] = flag((), "Query/KV heads:tokens[xbatch]: 32/8:128K, 32/32:32Kx8; repeatable.", "-s")
    method: tuple[str, ...] = flag((), "A method of ours; repeatable.", "-m")
    device: str = flag("auto", "auto, cpu or cuda. On a CPU: toy sizes, checks, no times.")
    rounds: int = flag(50, "Measured replays of each contender.", least=1)
    toy: bool = flag(False, "Sizes that an interpreter can bear.")
    variants: bool = flag(True, "Pages anywhere, ragged batches, packing, too.")
    out: Path | None = flag(None, "File for the results, as JSON; written after every shape.")
    plot: Path | None = flag(None, "File for a roofline plot, as PNG.")


@app.command()
@command
def kernels(asked: Kernels, printed: Printed) -> None:
    """One layer's decode attention over packed pages against torch, FlashInfer and FlashAttention over 16 bits and FP8.

    Every method is checked against fp32 attention over the decoded cache first; one that is wrong is not timed. Times
    are the device's own, of CUDA graphs, in turn, over data that its cache cannot hold.

    Example: python -m benchmarks kernels --shape 32/8:128K --method kivi:2 --out runs/kernels.json
    """
    from benchmarks import kernels as measured

    check_plot(asked.plot)
    given = {name: value for name, value in vars(asked).items() if name not in ("shape", "method")}
    measured.run(asked.shape, asked.method or measured.METHODS, **given, as_json=printed.json)


@dataclass(frozen=True)
class Everything:
    """How much of it, and where results go."""

    out: Path = flag(Path("runs/gpu"), "Folder for the results, a file per stage.")
    budget_seconds: float = flag(480, "That all of it may take.", least=30)
    plan: str = flag("all", "check, kernels, models, headline, or all.")


@app.command()
@command
def gpu(asked: Everything, printed: Printed) -> None:
    """Everything that wants a GPU: checks, kernels, whole models, the longest contexts; then which goals are met.

    Builds nothing. Each stage is a process of its own and writes what it found; stages that no time is left for are
    named. Without a GPU all of it runs at toy sizes and nothing is timed.
    """
    from benchmarks import gpu as everything

    everything.run(asked.out, asked.budget_seconds, plan=asked.plan, as_json=printed.json)


@dataclass(frozen=True)
class Counted:
    """Which machine code is counted."""

    arch: tuple[int, ...] = flag((), "80, 90 or 100; repeatable.  [default: all]")
    bits: tuple[int, ...] = flag((), "2 or 4; repeatable.  [default: both]")
    group: tuple[int, ...] = flag((), "32 or 128; repeatable.  [default: both]")
    out: Path | None = flag(None, "File for the results, as JSON.")


@app.command()
@command
def instructions(asked: Counted, printed: Printed) -> None:
    """Warp instructions per cached number of the GPU decode kernels, from machine code; needs no GPU.

    Beside it the budget: issue slots per number at the full bandwidth of an A100, H200 or B200.

    Example: python -m benchmarks instructions --arch 90 --bits 2
    """
    from benchmarks import instructions as counted

    counted.run(**{name: value for name, value in vars(asked).items() if value}, as_json=printed.json)


if __name__ == "__main__":
    app()
