"""How the demo's `text.txt` came to be: run once, kept because a file should say where it is from.

The bundled model continues openings of our own, sampled with a seed. Sentences that could be taken for a planted fact,
or that are not plain sentences, are left out. `python dev/sample.py` writes the file anew.
"""

import re

from kvist.demo.documents import FORBIDDEN, ROOM
from kvist.demo.model import load

TEXT = ROOM / "text.txt"
SEED, TEMPERATURE, TOKENS = 20, 0.9, 1100
OPENINGS = (
    "The harbour was quiet in the morning, and",
    "My grandmother kept a garden behind the house, where",
    "They walked along the river until",
    "It was a long winter, and the people of the valley",
    "When the letter came, she",
    "The captain looked at the sea and said that",
    "On the road to the village there stood",
    "He had never been a rich man, but",
    "The school was at the end of the street, and the children",
    "There was a light in the window of the mill, and",
    "After dinner the old doctor told us how",
    "The king had three sons, and the youngest",
    "In the spring the brothers went up into the hills, where",
    "She put the lamp upon the table and",
    "The train was late, and we",
    "Nobody in the town knew why the bridge",
    "My father used to say that a good horse",
    "The rain had stopped, and from the garden",
    "At the market she met a woman who",
    "The forest was dark, and the travellers",
    "His room was small, with a table and",
    "The ship lay at anchor for many days, because",
    "We sat by the fire, and my uncle",
    "The young man took his hat and",
)


def sentences(text: str) -> list[str]:
    """The plain sentences of a text, of 6 to 40 words, none twice."""
    flat = " ".join(text.split())
    found = [s.strip() for s in re.findall(r"[A-Z][^.!?]*[.!?](?=\s|$)", flat)]
    return list(dict.fromkeys(s for s in found if 6 <= len(s.split()) <= 40 and not FORBIDDEN.search(s)))


def sample() -> str:
    """The file's text: one sentence per line."""
    import torch

    model, tokenizer = load(dtype="float32")
    torch.manual_seed(SEED)
    tokenizer.padding_side = "left"
    inputs = tokenizer(list(OPENINGS), return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    never = {"eos_token_id": -1}  # an end token is sampled like any other and dropped
    out = model.generate(**inputs, **never, max_new_tokens=TOKENS, do_sample=True, temperature=TEMPERATURE, top_k=0)
    texts = tokenizer.batch_decode(out, skip_special_tokens=True)
    return "\n".join(s for text in texts for s in sentences(text)) + "\n"


if __name__ == "__main__":
    TEXT.write_text(sample())
