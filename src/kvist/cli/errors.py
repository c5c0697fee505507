"""Every bad input is one sentence on stderr and exit code 2; `--debug` shows the traceback instead."""

import sys

import typer
from typer.core import TyperGroup

EXIT = 2


class Verbs(TyperGroup):
    """A group of commands that turns a user's mistake into a sentence, in one place."""

    def make_context(self, *args, **kwargs):
        try:
            return super().make_context(*args, **kwargs)
        except Exception as error:
            _explain(error)
            raise

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except Exception as error:
            if not ctx.params.get("debug"):
                _explain(error)
            raise


def _explain(error: Exception) -> None:
    """Print and exit for errors that a user can mend; return for all others, help and exits among them."""
    if type(error).__name__ == "NoArgsIsHelpError":
        return
    if words := getattr(error, "format_message", None):  # unknown commands and options, missing arguments
        sentence = words()
    elif isinstance(error, ValueError | OSError | ModuleNotFoundError) and not isinstance(error, BrokenPipeError):
        sentence = str(error)
    else:
        return
    print("kvist: " + (" ".join(sentence.split()) or type(error).__name__), file=sys.stderr)
    raise typer.Exit(EXIT) from None
