"""`kvist` and `python -m kvist`."""

from kvist.cli.app import app


def main() -> None:
    """The command line."""
    app(prog_name="kvist")


if __name__ == "__main__":
    main()
