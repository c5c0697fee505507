"""How much the tests that can run for ever do by default."""

SEQUENCES = 2000  # of the state machine, over all its methods
STRANGERS = 2000  # changed files, over all doors
