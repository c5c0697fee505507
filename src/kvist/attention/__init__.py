"""The attention that reads packed pages: switched on for one model on request, and off again without a trace."""

from kvist.attention.switch import attach, detach

__all__ = ["attach", "detach"]
