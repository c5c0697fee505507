"""A page of our documentation as a chat's first message, with facts planted in it, and questions about them.

Everything follows from one seed. The page is `page.txt`: prose of docs/start.md and docs/nouns.md, taken over by
dev/artifacts.py, so that the numbers do not change with every edit of those pages.
"""

import random
from pathlib import Path

from kvist.demo.documents import Document, Question
from kvist.text import encode

PAGE = Path(__file__).with_name("page.txt")
SCORED = 256  # last tokens of the document, whose next-token distributions are compared
ORDER = "Read this text. Questions about it will follow.\n\n"
MARK = "@@"  # where a message stands in a chat template
# a fact as it stands in the document, the question, how the answer begins, and what may complete fact and answer:
# words of one token in most vocabularies
FORMS = (
    ("The lighthouse cat is called {}.", "What is the lighthouse cat called?", "Pepper Shadow Ginger Rocky"),
    ("The key to the boathouse lies in the {}.", "Where is the key to the boathouse?", "drawer basket clock piano"),
    ("The night train goes to {}.", "Where does the night train go?", "Vienna Dublin Athens Prague"),
    ("The password of the library is {}.", "What is the password of the library?", "copper silver orange winter"),
    ("The door of the mill is painted {}.", "Which colour is the door of the mill?", "green yellow blue white"),
    ("On Sundays Marta cooks {}.", "What does Marta cook on Sundays?", "soup fish rice beans"),
    ("Old Peter plays the {}.", "Which instrument does old Peter play?", "violin guitar piano drums"),
    (
        "The harbour bus leaves from platform {}.",
        "From which platform does the harbour bus leave?",
        "seven four nine two",
    ),
    ("The market opens every {}.", "When does the market open?", "Monday Friday Tuesday Thursday"),
    ("Clara works as a {}.", "What is Clara's work?", "nurse pilot teacher lawyer"),
    ("The old bridge will be closed in {}.", "When will the old bridge be closed?", "March October June August"),
    ("The tree behind the school bears {}.", "What does the tree behind the school bear?", "apples nuts plums oranges"),
)


def document(tokenizer, text: str, questions: int = len(FORMS), seed: int = 0) -> Document:
    """`text`, a paragraph per line, with a fact planted for each question; the chat is open behind it. ValueError for
    a text of one line, and for more questions than there are facts."""
    random_ = random.Random(seed)
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) < 2:
        raise ValueError(f"expected a text of at least 2 lines to plant facts between, found {len(lines)}")
    if questions > len(FORMS):
        raise ValueError(f"at most {len(FORMS)} questions are asked about a text, found {questions}")
    head, tail = _template(tokenizer)
    asked = []
    for fact, question, words in random_.sample(FORMS, questions):
        answer = random_.choice(words.split())
        lines.insert(random_.randrange(1, len(lines)), fact.format(answer))
        text = f"\n{question}{tail}{fact.partition(' {}')[0]}"
        ids, answer_ids = (tuple(encode(tokenizer, part)) for part in (text, f" {answer}."))
        asked.append(Question("fact", question, answer, ids, answer_ids))
    body = head + ORDER + "\n".join(lines) + "\n"
    open_ = Question("open", asked[0].text, "", tuple(encode(tokenizer, f"\n{asked[0].text}{tail}")), ())
    ids = tuple(encode(tokenizer, body))
    return Document(body, ids, tuple(asked), min(SCORED, len(ids) // 2), open_)


def _template(tokenizer) -> tuple[str, str]:
    """What the chat template puts before and behind a message, up to the answer; plain words where it has none."""
    if not getattr(tokenizer, "chat_template", None):
        return tokenizer.bos_token or "", "\nAnswer: "
    chat = [{"role": "user", "content": MARK}]
    head, _, tail = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True).partition(MARK)
    return head, tail
