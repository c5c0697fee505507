"""Make the artefacts that come with the bundled model (src/kvist/demo/kvquant): `python dev/artifacts.py`.

Calibrated on documents like the demo's, with other facts in them: fitted on plain novels, keys that only
recall needs lie beyond their ranges (docs/measured.md).
"""

import shutil
import tempfile
from pathlib import Path

from kvist.artifact import Settings
from kvist.calibrate import text
from kvist.calibrate.run import observe, origin
from kvist.calibrate.state import State
from kvist.demo import documents as made
from kvist.demo.model import FITTED, load

SEEDS = (101, 102)  # of the documents; the demo's is 0
SAMPLES, SEQLEN, QUESTIONS = 16, 1800, 120


def main() -> None:
    model, tokenizer = load()
    documents = [
        tokenizer.decode(document.ids, skip_special_tokens=True)
        + "".join(tokenizer.decode([*asked.ids, *asked.answer_ids]) for asked in document.questions)
        for seed in SEEDS
        for document in made.documents(tokenizer, QUESTIONS, seed)
    ]
    windows = text.sample(tokenizer, documents, SAMPLES, SEQLEN, seed=0)
    source = f"documents of the demo, seeds {', '.join(map(str, SEEDS))}"
    about = origin(source, text.digest(documents), 0, windows)
    with tempfile.TemporaryDirectory() as folder:
        seen = observe(model, windows, Settings(bits=3), State(Path(folder), "demo"))
    shutil.rmtree(FITTED, ignore_errors=True)
    for bits in (2, 3, 4):
        seen.fit(Settings(bits=bits), "auto", about).save(FITTED / str(bits))


if __name__ == "__main__":
    main()
