"""Generation over one living cache: streaming, clocks, and figures at the end."""

import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import TextStreamer

from kvist.attention import attach
from kvist.cache.cache import Cache
from kvist.cli import prompts
from kvist.cli.options import Generation
from kvist.models.compat import cache_argument
from kvist.plan import Recipe
from kvist.units import size

DEFAULT = "kivi:2"
BILLED = {"4K": 4096, "32K": 32768}  # tokens


class Clock(TextStreamer):
    """Notes when each token came, and prints the text unless told not to."""

    def __init__(self, tokenizer, stream: bool):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.stream, self.times, self.tokens = stream, [], []

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.times.append(time.perf_counter())
            self.tokens += value.flatten().tolist()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self.stream:
            print(text, flush=True, end="\n" if stream_end else "")


class Session:
    """A model, its cache, and the token ids whose keys and values the cache holds."""

    def __init__(self, model, tokenizer, recipe: Recipe | None, options: Generation, file: Path | None = None):
        self.raw = options.raw or tokenizer.chat_template is None
        self.model, self.tokenizer, self.options = model, tokenizer, options
        if file:
            self.cache = Cache.load(file, model, recipe)
        else:
            self.cache = Cache(model, recipe or DEFAULT, reserve=options.reserve, prefill=options.prefill)
        self.reserve, self.text = self.cache.reserve, ""
        self.before = self.cache.get_seq_length()  # slots of a loaded cache, whose text is not known
        self.stored: list[int] = []  # ids behind them
        self.pending: list[int] = []  # written but not stored yet: the last token of a turn
        self.again = False  # whether the next turn reads the conversation from its beginning
        self.prompt_tokens = self.new_tokens = self.decoded = 0
        self.ended_at_once = False
        self.prefill_seconds = self.decode_seconds = 0.0
        torch.manual_seed(options.seed)
        if model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(model.device)

    def attached(self):
        """The attention that reads packed pages, while the context is open, unless it is not wanted."""
        return attach(self.model) if self.options.attach else nullcontext()

    def encode(self, text: str) -> list[int]:
        """A prompt's ids; special tokens at the start of a text only."""
        begins = not (self.before or self.stored or self.pending)
        return self.tokenizer(text, add_special_tokens=begins)["input_ids"]

    def turn(self, turns: list[dict[str, str]], end: str = "\n") -> list[int]:
        """The ids of a conversation that the cache does not hold yet. What it holds beyond the common beginning, as
        where a template writes an old turn differently, is cropped. `end` closes a turn where there is no template."""
        said = turns[-1]["content"]
        if self.raw:
            return self.pending + self.encode(("\n" if self.stored or self.pending else "") + said + end)
        if self.before:
            ids = prompts.next_turn(self.tokenizer, said)
            return self.pending + (ids[1:] if self.pending == ids[:1] else ids)
        ids = prompts.conversation(self.tokenizer, turns)
        same = next((i for i, (a, b) in enumerate(zip(self.stored, ids, strict=False)) if a != b), len(self.stored))
        same = min(same, len(ids) - 1)
        if same < len(self.stored):
            try:
                self.cache.crop(same - len(self.stored))
                self.stored = self.stored[:same]
            except ValueError:  # it has layers that cannot go back, and nothing was changed
                self._start_over()
                return ids
        return ids[same:]

    def _start_over(self) -> None:
        """Forget what the cache holds; the next turn reads the conversation again."""
        self.cache.reset()
        self.stored, self.pending, self.again = [], self.stored + self.pending, True

    def write(self, ids: list[int], stream: bool) -> None:
        """Read `ids` after what the cache holds, then generate."""
        past, clock, self.again = self.before + len(self.stored), Clock(self.tokenizer, stream), False
        inputs = torch.tensor([ids], device=self.model.device)
        chunked = {"prefill_chunk_size": self.options.chunk} if len(ids) > self.options.chunk else {}
        if self.options.greedy:
            sampling = {"do_sample": False, "top_k": None, "top_p": None, "temperature": None}
        else:
            sampling = {"do_sample": True, "temperature": self.options.temperature}
        self._given, self._clock, self._start = ids, clock, time.perf_counter()
        self.model.generate(
            input_ids=inputs,
            attention_mask=torch.ones(1, past + len(ids), dtype=torch.long, device=self.model.device),
            **cache_argument(self.cache),
            max_new_tokens=self.options.max_new_tokens,
            streamer=clock,
            pad_token_id=self._padding(),
            **sampling,
            **chunked,
        )
        self._account()

    def interrupted(self) -> None:
        """After Ctrl-C: what the cache holds counts, the rest of the turn does not."""
        self._clock.end()
        try:
            self.cache.mend()
        except ValueError:  # it has layers that cannot go back
            if self.before:
                raise  # what a loaded cache holds cannot be read again
            self.pending = []
            self._start_over()
        self._account()

    def _account(self) -> None:
        clock = self._clock
        written = (self.pending if self.again else []) + self._given + clock.tokens
        held = self.cache.get_seq_length() - self.before - len(self.stored)
        self.stored, self.pending = self.stored + written[:held], written[held:]
        self.ended_at_once = prompts.at_once(clock.tokens, self._ends())
        self.text = self.tokenizer.decode(clock.tokens, skip_special_tokens=True)
        self.prompt_tokens, self.new_tokens = self.prompt_tokens + len(self._given), self.new_tokens + len(clock.tokens)
        if clock.times:
            self.prefill_seconds += clock.times[0] - self._start
            self.decode_seconds += clock.times[-1] - clock.times[0]
            self.decoded += len(clock.times) - 1

    def _ends(self) -> list[int]:
        found = self.model.generation_config.eos_token_id
        return found if isinstance(found, list) else [] if found is None else [found]

    def _padding(self) -> int | None:
        padding = self.model.generation_config.pad_token_id
        return next(iter(self._ends()), None) if padding is None else padding

    def figures(self) -> dict:
        """What the run took, as plain data."""
        report, slots = self.cache.report(), self.cache.get_seq_length()
        cuda = self.model.device.type == "cuda"
        kept = self.cache.inner.describes.shapes[0].stored(any(plan.packs for plan in self.cache.recipe.layers))
        advice = None
        if self.ended_at_once:
            template = self.tokenizer.chat_template is not None
            advice = prompts.advice(self.raw, template, self.options.greedy)
        peak = torch.cuda.max_memory_allocated(self.model.device) if cuda else _resident()
        return {
            "method": str(self.cache.recipe),
            "recipe": self.cache.recipe.model_dump(mode="json"),
            "attached": self.options.attach,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "cached_tokens": slots,
            "reserve": self.reserve,
            "reserve_exceeded": bool(self.reserve) and slots > self.reserve,
            "cache": report.to_dict(),
            "room_for_tokens": self._room(report.nbytes),
            "bill": {label: self._bill(tokens) for label, tokens in BILLED.items()},
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "exact_dtype": str(kept).removeprefix("torch."),
            "ended_at_once": advice,
            "bits_per_element": report.bits_per_element,
            "bytes": report.nbytes,
            "bytes_16_bit_arithmetic": report.exact_bytes,
            "prefill_tokens_per_second": self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else None,
            "decode_tokens_per_second": self.decoded / self.decode_seconds if self.decoded else None,
            "peak_memory_bytes": peak,
            "peak_memory_is": "CUDA allocations" if cuda else "resident set of the process",
        }

    def _bill(self, tokens: int) -> dict:
        """What a prompt of so many tokens will take, with room reserved for just them, beside 16 bits."""
        nbytes = self.cache.bill(tokens, reserve=tokens)
        elements = tokens * sum(s.heads * (s.key_dim + s.value_dim) for s in self.cache.inner.describes.shapes)
        return {"bytes": nbytes, "bits_per_element": 8 * nbytes / elements, "bytes_16_bit": 2 * elements}

    def _room(self, nbytes: int) -> int:
        """The most tokens that `nbytes` hold, by the bill."""
        few, many = 0, 1
        while self.cache.bill(many, self.reserve) <= nbytes:
            few, many = many, 2 * many
        while many - few > 1:
            middle = (few + many) // 2
            few, many = (middle, many) if self.cache.bill(middle, self.reserve) <= nbytes else (few, middle)
        return max(few, self.cache.get_seq_length())


def _resident() -> int | None:
    """The most memory that the process had resident, in bytes; None where the system does not tell."""
    try:
        import resource
    except ModuleNotFoundError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def sentences(figures: dict) -> list[str]:
    """The figures for people."""
    used = size(sum(figures["cache"]["used"].values()))
    speeds = [
        f"{name} {figures[key]:.1f} tokens/s" if figures[key] else f"{name} not measured"
        for name, key in (("prefill", "prefill_tokens_per_second"), ("decode", "decode_tokens_per_second"))
    ]
    read, written, held = (figures[k] for k in ("prompt_tokens", "new_tokens", "cached_tokens"))
    room = f"{size(figures['bytes'])} allocated, room for {figures['room_for_tokens']}"
    kept = "" if figures["exact_dtype"] == figures["dtype"] else f", exact tokens kept in {figures['exact_dtype']}"
    lines = [
        figures["method"],
        f"  tokens   {read} read, {written} written, {held} in the cache",
        f"  cache    {used} used by {held} tokens; {room}",
        *(f"  at {label:<6}{_billed(bill)}" for label, bill in figures["bill"].items()),
        f"  types    computed in {figures['dtype']}{kept}",
        f"  speed    {', '.join(speeds)}"
        + ("" if figures["attached"] else " (not attached: pages are decoded each step)"),
    ]
    if figures["peak_memory_bytes"]:
        peak = size(figures["peak_memory_bytes"])
        lines.append(f"  memory   {peak} at the peak ({figures['peak_memory_is']}, weights included)")
    if figures["reserve_exceeded"]:
        lines.append(f"  reserve  {held} tokens are more than the {figures['reserve']} reserved: the cache grew")
    if figures["ended_at_once"]:
        lines.append(f"  ended    the first token was end-of-text; {figures['ended_at_once']}")
    return lines


def _billed(bill: dict) -> str:
    ratio = bill["bytes_16_bit"] / bill["bytes"]
    than = f"{ratio:.2f} times smaller than" if ratio >= 1 else f"{1 / ratio:.2f} times larger than"
    bits = f"{bill['bits_per_element']:.2f} bits per element"
    return f"{size(bill['bytes'])} by the bill, {bits}, {than} 16 bits ({size(bill['bytes_16_bit'])})"
