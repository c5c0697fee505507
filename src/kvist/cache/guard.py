"""Whether all layers of a cache hold the same tokens, and what becomes of those that are not ours when it must change.

A change is refused before anything is done to any layer, and the sentence names the layer that cannot follow.
"""

from collections.abc import Callable

from kvist.cache import foreign
from kvist.cache.layer import Layer

Numbered = tuple[int, str, object]  # a layer's number, its kind, and the layer


class Guard:
    """Of one cache: `layers`, the list that it holds; their kinds; `make`, a new layer in place of one not ours.

    begun: what the last forward found, until it has returned. spoilt: why the cache cannot go on, "" where it can.
    """

    def __init__(self, layers: list, kinds: tuple[str, ...], make: Callable[[int], object]):
        self.layers, self.kinds, self.make = layers, kinds, make
        self.begun: foreign.Mark | None = None
        self.spoilt = ""

    @property
    def ours(self) -> list[Layer]:
        """The layers that kvist stores."""
        return [layer for layer in self.layers if isinstance(layer, Layer)]

    @property
    def others(self) -> list[Numbered]:
        """Those that transformers' own cache serves."""
        pairs = zip(self.kinds, self.layers, strict=True)
        return [(i, kind, layer) for i, (kind, layer) in enumerate(pairs) if not isinstance(layer, Layer)]

    def marked(self, upcoming: list[int]) -> foreign.Mark:
        """What a forward finds that begins now. ValueError where an earlier one stopped half-way."""
        self.check()
        marks = {i: foreign.mark(layer) for i, _, layer in self.others}
        return foreign.Mark(self.ours[0].slots, upcoming, marks)

    def returned(self, expected: int, name: str) -> None:
        """A forward is over. ValueError where one of our layers was not given all of its `expected` slots."""
        self.begun = None
        missed = [i for i, layer in enumerate(self.layers) if isinstance(layer, Layer) and layer.slots < expected]
        if missed:
            self.spoil(
                f"{name} stored nothing in layer {missed[0]}, which by its config attends to the whole text: kvist "
                "does not know this family; use transformers' own cache"
            )

    def check(self) -> None:
        """Refuse to go on where an earlier forward stopped half-way."""
        if self.spoilt:
            raise ValueError(self.spoilt)
        if self.begun is not None and (self._changed() or any(x.slots != self.begun.slots for x in self.ours)):
            raise ValueError(
                "an earlier forward with this cache did not finish, so that its layers are out of step; call mend()"
            )

    def spoil(self, why: str) -> None:
        self.spoilt = why
        raise ValueError(why)

    def _changed(self) -> list[Numbered]:
        """Of the layers that are not ours, those that hold something else than when the last forward began. Where that
        was not heard: all that hold something, and do not count as many slots as the shortest of ours."""
        if self.begun is None:
            held = min(layer.slots for layer in self.ours)
            return [other for other in self.others if foreign.held(other[2]) and foreign.seen(other[2]) != held]
        return [(i, kind, layer) for i, kind, layer in self.others if foreign.mark(layer) != self.begun.layers[i]]

    def mend(self) -> foreign.Mark | None:
        """Take every layer back to what an interrupted forward found; None where none was. Spoils the cache where a
        layer cannot go back."""
        if self.spoilt:
            raise ValueError(self.spoilt)
        slots, found = [layer.slots for layer in self.ours], self.begun
        if found is None and max(slots) == min(slots):
            return None  # no forward began, or it was not heard and reached every layer
        held = min(slots) if found is None else found.slots
        changed = self._changed() if held else []
        for i, kind, layer in changed:
            if reason := foreign.why_not_mended(layer, kind, held):
                self.spoil(
                    f"a forward was interrupted after it had changed layer {i} ({kind}), which cannot go back, "
                    f"{reason}; reset() this cache and read the text again, or load a saved one"
                )
        for _, kind, layer in changed:
            foreign.crop(layer, kind, layer.get_seq_length() - held)
        for layer in self.ours:
            layer.crop(held - layer.slots)
        if not held:
            self.renew()
        self.begun = None
        return found or foreign.Mark(held, [], {})

    def crop(self, remove: int) -> None:
        """Take the last `remove` slots from every layer. ValueError, with nothing changed, where one cannot."""
        self.check()
        held = self.ours[0].slots
        for i, kind, layer in self.others:
            if reason := foreign.why_not_cropped(layer, kind, remove, held):
                raise ValueError(
                    f"the last {remove} tokens cannot be removed: layer {i} ({kind}) cannot go back, {reason}; reset() "
                    "this cache and read the text again"
                )
        for layer in self.ours:
            layer.crop(-remove)
        if remove >= held > 0:
            self.renew()
            return
        for _, kind, layer in self.others:
            foreign.crop(layer, kind, remove)

    def renew(self) -> None:
        """New layers in place of those that are not ours: what these do to forget is not always enough."""
        for i, _, old in self.others:
            self.layers[i] = self.make(i)
            if getattr(old, "record_past", False):
                self.layers[i].activate_past_recording()

    def reset(self) -> None:
        """Forget everything."""
        for layer in self.ours:
            layer.reset()
        self.renew()
        self.begun, self.spoilt = None, ""
