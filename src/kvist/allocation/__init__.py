"""Who gets how many bits: the table, rules that fill it, and solvers that keep to a budget."""

from kvist.allocation.table import WIDTHS, Allocation

__all__ = ["WIDTHS", "Allocation"]
