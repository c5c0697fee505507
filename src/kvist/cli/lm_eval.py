"""`kvist lm-eval`: lm-eval's own command, in which `--model kvist` is known."""

import sys

import typer

# all that is not ours, help included, is lm-eval's
SETTINGS = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "allow_interspersed_args": False,
    "help_option_names": [],
}


def lm_eval(ctx: typer.Context) -> None:
    """lm-eval's own command (all arguments are its own), where --model kvist is known: its --model_args are those of
    hf, method='kivi:2', and mode=simulated or stored, how log-likelihoods are taken."""
    import kvist.evaluate.lm_eval  # noqa: F401  # registers the model
    from kvist.evaluate.definitions import harness

    before = sys.argv
    sys.argv = ["kvist lm-eval", *ctx.args]
    try:
        harness("__main__").cli_evaluate()
    finally:
        sys.argv = before
