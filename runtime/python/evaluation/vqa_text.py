"""How the VQA evaluation normalises an answer before it compares.

In order: line ends and tabs become spaces; punctuation marks vanish where, anywhere in the text,
the mark stands beside a space or a comma between digits, and become spaces otherwise; full stops
vanish but before a digit; words are put in lower case, the number words from none to ten become
digits, articles are dropped, and contractions get their apostrophes back.

Source: GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation/vqaEval.py, with the marks of
    VLMEvalKit's copy (vlmeval/smp `process_punctuation`), which leaves the colon and the
    apostrophe alone. The original's slip of stopping after 32 full stops is not followed, nor does
    it skip the accepted answers where all of them are the same.
"""

from __future__ import annotations

import re

ARTICLES = frozenset({"a", "an", "the"})
NUMBERS = {"none": "0"} | {
    word: str(value)
    for value, word in enumerate(
        "zero one two three four five six seven eight nine ten".split()  # noqa: SIM905
    )
}

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_DIGITS_COMMA = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't
    mightn't've must've mustn't needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
    shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
    someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
    why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll
    you're you've
"""


def _without_one_apostrophe() -> dict[str, str]:
    """Every way to forget one apostrophe of a contraction, and the contraction."""
    forms = {}
    for word in _CONTRACTED.split():
        for place, character in enumerate(word):
            if character == "'":
                forms[word[:place] + word[place + 1 :]] = word
    return forms


CONTRACTIONS = _without_one_apostrophe() | {
    "somebody'd": "somebodyd"
}  # the last one as it is there
"""Words without an apostrophe, and with it."""


def normalise(answer: str) -> str:
    """The form in which two answers are compared."""
    text = _without_marks(answer.replace("\n", " ").replace("\t", " ").strip())
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _without_marks(text: str) -> str:
    has_digits_comma = _DIGITS_COMMA.search(text) is not None
    result = text
    for mark in _MARKS:
        if mark in text:
            vanishes = has_digits_comma or f"{mark} " in text or f" {mark}" in text
            result = result.replace(mark, "" if vanishes else " ")
    return _FULL_STOP.sub("", result)
