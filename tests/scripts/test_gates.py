"""Stored at once = stored in pieces, of every method that says so."""

import sys
from pathlib import Path

from models_tiny import tiny_llama, tokens

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from gates import gates


def test_at_once_is_streamed():
    found = gates(tiny_llama(), tokens(2, 200))
    assert len(found) == 7 and all(gate["holds"] for gate in found)
