"""`python -m benchmarks`, from the repository's root: what needs a GPU, or what a compiler makes of the kernels."""

from pathlib import Path
from typing import Annotated

import typer

from kvist.cli.errors import Verbs
from kvist.cli.show import Json, check_plot

app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Measure the kernels; `make gpu` measures all that wants a GPU.",
)


@app.command()
def kernels(
    shape: Annotated[
        list[str] | None,
        typer.Option("--shape", "-s", help="Query/KV heads:tokens[xbatch]: 32/8:128K, 32/32:32Kx8; repeatable."),
    ] = None,
    method: Annotated[list[str] | None, typer.Option("--method", "-m", help="A method of ours; repeatable.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda. On a CPU: toy sizes, checks, no times.")] = "auto",
    rounds: Annotated[int, typer.Option(min=1, help="Measured replays of each contender.")] = 50,
    toy: Annotated[bool, typer.Option("--toy", help="Sizes that an interpreter can bear.")] = False,
    variants: Annotated[bool, typer.Option(help="Pages anywhere, ragged batches, packing, too.")] = True,
    out: Annotated[Path | None, typer.Option(help="File for the results, as JSON; written after every shape.")] = None,
    plot: Annotated[Path | None, typer.Option(help="File for a roofline plot, as PNG.")] = None,
    json: Json = False,
) -> None:
    """One layer's decode attention over packed pages against torch, FlashInfer and FlashAttention over 16 bits and FP8.

    Every method is checked against fp32 attention over the decoded cache first; one that is wrong is not timed. Times
    are the device's own, of CUDA graphs, in turn, over data that its cache cannot hold.

    Example: python -m benchmarks kernels --shape 32/8:128K --method kivi:2 --out runs/kernels.json
    """
    from benchmarks import kernels as measured

    check_plot(plot)
    asked = shape or (), method or measured.METHODS
    measured.run(*asked, device=device, rounds=rounds, toy=toy, variants=variants, out=out, plot=plot, as_json=json)


@app.command()
def gpu(
    out: Annotated[Path, typer.Option(help="Folder for the results, a file per stage.")] = Path("runs/gpu"),
    budget: Annotated[float, typer.Option("--budget-seconds", min=30, help="That all of it may take.")] = 480,
    plan: Annotated[str, typer.Option(help="check, kernels, models, headline, or all.")] = "all",
    json: Json = False,
) -> None:
    """Everything that wants a GPU: checks, kernels, whole models, the longest contexts; then which goals are met.

    Builds nothing. Each stage is a process of its own and writes what it found; stages that no time is left for are
    named. Without a GPU all of it runs at toy sizes and nothing is timed.
    """
    from benchmarks import gpu as everything

    everything.run(out, budget_seconds=budget, plan=plan, as_json=json)


@app.command()
def instructions(
    arch: Annotated[list[int] | None, typer.Option(help="80, 90 or 100; repeatable.  [default: all]")] = None,
    bits: Annotated[list[int] | None, typer.Option(help="2 or 4; repeatable.  [default: both]")] = None,
    group: Annotated[list[int] | None, typer.Option(help="32 or 128; repeatable.  [default: both]")] = None,
    out: Annotated[Path | None, typer.Option(help="File for the results, as JSON.")] = None,
    json: Json = False,
) -> None:
    """Warp instructions per cached number of the GPU decode kernels, from machine code; needs no GPU.

    Beside it the budget: issue slots per number at the full bandwidth of an A100, H200 or B200.

    Example: python -m benchmarks instructions --arch 90 --bits 2
    """
    from benchmarks import instructions as counted

    chosen = {"arch": arch, "bits": bits, "group": group}
    counted.run(**{k: v for k, v in chosen.items() if v}, out=out, as_json=json)


if __name__ == "__main__":
    app()
