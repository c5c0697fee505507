"""For whoever writes a method: settings to try it with, made-up fits, and the laws that every method obeys.

from kvist.testing import LAWS, stand_in

@pytest.mark.parametrize("law", LAWS)
def test_my_method(law):
    law(stand_in(kvist.methods.parse("mine k=2 recent=32"), heads=2, dim=32))
"""

from kvist.testing.cases import CASES, EACH, recipe
from kvist.testing.laws import LAWS, errors_fall
from kvist.testing.stand_in import stand_in

__all__ = ["CASES", "EACH", "LAWS", "errors_fall", "recipe", "stand_in"]
