"""How good a method is on text: perplexity and divergence, with intervals."""
