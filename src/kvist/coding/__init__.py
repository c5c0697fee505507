"""Quantization: one tensor in, one packed value out, and back: five parts and their composition."""

from kvist.coding.codec import Codec
from kvist.coding.grouping import Grouping
from kvist.coding.levels import Raw, Table, Uniform
from kvist.coding.outliers import NoOutliers, Slots
from kvist.coding.ranges import AbsMax, Fixed, MinMax
from kvist.coding.transforms import Hadamard, Identity, Unrotate

__all__ = [
    "AbsMax",
    "Codec",
    "Fixed",
    "Grouping",
    "Hadamard",
    "Identity",
    "MinMax",
    "NoOutliers",
    "Raw",
    "Slots",
    "Table",
    "Uniform",
    "Unrotate",
]
