"""Manners toward other people's models: what they are, what they tell, and how to listen without changing them."""
