"""Which option an answer names.

The rules, in order; the first that finds an option decides, and an answer in which none does is
wrong. Nothing is guessed.

1. The answer begins with a letter, behind it `.`, `)`, `:`, `,` or nothing more on the line:
   "B", "b", "B. a dog", "(B) a dog", "**B**".
2. "Answer" goes before such a letter: "Answer: B", "The answer is (B)."
3. Exactly one letter stands in brackets: "I would say (B) because ...".
4. The answer is an option's text, perhaps behind its letter: "a dog", "B a dog".
5. The text of exactly one option stands in the answer, as whole words, where the answer is at most
   twice as long as all options together.

Letters that have no option are passed over. A letter followed by a word ("A dog ...") is taken for
the article it may be.

Source: the places looked at are those of VLMEvalKit, vlmeval/utils/matching_util.py `can_infer`,
    which finds a letter anywhere between spaces instead of by rules 1 to 3, and may afterwards ask
    another model or draw at random.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_ENDED = r"(?=[.):,\]*]|\s*$|\s*\n)"
_LEADING = re.compile(rf"[(\[*\s]*([A-Za-z]){_ENDED}")
_ANNOUNCED = re.compile(rf"(?i:\banswer)\b(?i:\s+is)?\s*:?[(\[*\s]*([A-Za-z]){_ENDED}")
_BRACKETED = re.compile(r"[(\[]\s*([A-Z])\s*[)\]]")


def find_choice(answer: str, options: Mapping[str, str]) -> str | None:
    """The letter of the option that an answer names, None where it names none.

    Args:
        answer: What the model said.
        options: Texts by upper-case letter.
    """
    for find in (_leading, _announced, _bracketed, _by_text, _by_mention):
        letter = find(answer.strip(), options)
        if letter is not None:
            return letter
    return None


def _leading(answer: str, options: Mapping[str, str]) -> str | None:
    found = _LEADING.match(answer)
    return _known(found, options)


def _announced(answer: str, options: Mapping[str, str]) -> str | None:
    return _known(_ANNOUNCED.search(answer), options)


def _known(found: re.Match[str] | None, options: Mapping[str, str]) -> str | None:
    letter = found[1].upper() if found else None
    return letter if letter in options else None


def _bracketed(answer: str, options: Mapping[str, str]) -> str | None:
    letters = {letter for letter in _BRACKETED.findall(answer) if letter in options}
    return letters.pop() if len(letters) == 1 else None


def _by_text(answer: str, options: Mapping[str, str]) -> str | None:
    told = _plain(answer)
    same = [
        letter
        for letter, text in options.items()
        if told in (_plain(text), f"{letter.lower()} {_plain(text)}")
    ]
    return same[0] if len(same) == 1 else None


def _by_mention(answer: str, options: Mapping[str, str]) -> str | None:
    if len(answer) > 2 * sum(map(len, options.values())):
        return None
    told = _plain(answer)
    mentioned = [letter for letter, text in options.items() if _stands_in(_plain(text), told)]
    return mentioned[0] if len(mentioned) == 1 else None


def _stands_in(text: str, answer: str) -> bool:
    """Whether a text stands in an answer with no letter or digit right beside it."""
    return bool(text) and re.search(rf"(?<!\w){re.escape(text)}(?!\w)", answer) is not None


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).strip(" .")
