"""The demonstration: a small trained model of our own, documents with planted facts, and one table over all methods."""
