"""Every error is one sentence on stderr, with its cause and the way out: what a user can mend (exit code 2), and what
nobody foresaw (exit code 1). `--debug`, anywhere in the line, shows the traceback instead."""

import sys
import traceback
from pathlib import Path

import typer
from typer.core import TyperGroup

EXIT, FAULT = 2, 1
DEBUG = "--debug"
OTHERS = ("lm-eval",)  # verbs whose options belong to another program
MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory")
LIBRARIES = ("kvist", "transformers", "torch", "huggingface_hub", "tokenizers", "safetensors", "peft", "accelerate")


class Verbs(TyperGroup):
    """A group of commands that turns every error into a sentence, in one place."""

    def parse_args(self, ctx, args):
        own = args[: args.index("--")] if "--" in args else args
        if ctx.parent is None and DEBUG in own and not set(own) & set(OTHERS):  # after the verb, too
            at = own.index(DEBUG)
            args = [DEBUG, *args[:at], *args[at + 1 :]]
        return super().parse_args(ctx, args)

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
            if not ctx.find_root().params.get("debug"):
                _explain(error)
            raise


def sentence(error: Exception) -> tuple[str, int] | None:
    """What to print for an error, and the exit code; None for what ends a program without being one."""
    if type(error).__name__ == "NoArgsIsHelpError" or isinstance(error, typer.Exit | typer.Abort | BrokenPipeError):
        return None
    if words := getattr(error, "format_message", None):  # unknown commands and options, missing arguments
        return words(), EXIT
    from kvist.stranger import printable

    said = printable(str(error)) or type(error).__name__
    if isinstance(error, MemoryError) or any(words in said.lower() for words in MEMORY):
        return (
            f"there is not enough memory ({_first(said)}); give a smaller --reserve, --chunk or --batch, a method of "
            "fewer bits, or another --device",
            EXIT,
        )
    if isinstance(error, UnicodeError):
        return f"text cannot be read or printed here ({said}); set PYTHONIOENCODING=utf-8, or mend the text", EXIT
    if isinstance(error, ValueError | OSError | ModuleNotFoundError):
        return said, EXIT
    where = _origin(error)
    if where == "kvist" and isinstance(error, RuntimeError):
        return said, EXIT
    cause = f"{type(error).__name__}: {_first(said)}"
    if where not in (None, "kvist"):
        return f"{where} stopped with {cause}; `kvist {DEBUG} …` shows where, other releases may do without it", FAULT
    return f"unforeseen {cause}; `kvist {DEBUG} …` shows where: please report it with that", FAULT


def _explain(error: Exception) -> None:
    """Print and exit; return for help and exits."""
    if found := sentence(error):
        from kvist.stranger import printable

        print("kvist: " + printable(found[0]), file=sys.stderr)
        raise typer.Exit(found[1]) from None


def _origin(error: Exception) -> str | None:
    """The library that an error was raised in, where it is a known one."""
    frames = traceback.extract_tb(error.__traceback__)
    parts = Path(frames[-1].filename).parts if frames else ()
    return next((name for name in reversed(parts) if name in LIBRARIES), None)


def _first(said: str) -> str:
    """Its first sentence."""
    end = said.find(". ")
    return said if end < 0 else said[:end]
