"""The program `kvist` and its verbs."""

import logging
import os
from typing import Annotated

import typer

from kvist import __version__
from kvist.cli import (
    allocate,
    bench,
    calibrate,
    compare,
    demo,
    evaluate,
    import_kvquant,
    inspect,
    lm_eval,
    methods,
    profile,
    report,
    run,
)
from kvist.cli.errors import Verbs

app = typer.Typer(
    cls=Verbs,
    invoke_without_command=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        print(f"kvist {__version__}")
        raise typer.Exit


@app.callback()
def kvist(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """A key-value cache of 1 to 4 bits for Hugging Face causal language models, truly packed.

    A method is written the same way everywhere: 'kivi:2', 'kivi k=2 v=4 group=32 recent=128', or a recipe's JSON file.
    """
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())
    for library in ("torchao", "torch.utils._pytree"):  # what it lacks on this machine is not the user's matter
        logging.getLogger(library).setLevel(logging.DEBUG if debug else logging.ERROR)
    if ctx.invoked_subcommand != "bench":
        # OpenMP's idle threads spin for milliseconds on cores that the packed attention wants. It must be said before
        # torch is loaded; the benchmarks measure what a user has by default.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")


app.command("methods")(methods.catalogue)
app.command("show")(methods.show)
app.command("run")(run.run)
app.command("inspect")(inspect.inspect)
app.command("calibrate")(calibrate.calibrate)
app.command("import-kvquant")(import_kvquant.import_kvquant)
app.command("profile")(profile.profile)
app.command("allocate")(allocate.allocate)
app.command("demo")(demo.demo)
app.command("eval")(evaluate.evaluate)
app.command("lm-eval", context_settings=lm_eval.SETTINGS, add_help_option=False)(lm_eval.lm_eval)
app.command("report")(report.report)
app.command("compare")(compare.compare)
app.add_typer(bench.app, name="bench")
