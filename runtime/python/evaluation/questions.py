"""From a row to a prompt, and to how its answer is scored.

Source: VLMEvalKit's defaults: vlmeval/dataset/image_mcq.py and image_vqa.py `build_prompt` (the
    wording), image_vqa.py `evaluate` (metrics by benchmark). Several of its models bring wordings
    of their own instead; those are not here.
"""

from __future__ import annotations

from dataclasses import dataclass

from lorgnette.errors import DatasetError
from lorgnette.runtime.evaluation.choice import find_choice
from lorgnette.runtime.evaluation.literals import is_list, parse_texts
from lorgnette.runtime.evaluation.metrics import METRICS
from lorgnette.runtime.evaluation.tsv import Row

PROMPTS = ("vlmevalkit", "plain")
"""Ways to word a prompt."""
CHOICE = "choice"
"""The metric of multiple choice: 1 where the answer names the right option."""
AUTO = "auto"
METRIC_NAMES = (AUTO, CHOICE, *METRICS)

NAMED = (
    ("textvqa", "vqa"),
    ("chartqa", "relaxed"),
    ("docvqa", "anls"),
    ("infovqa", "anls"),
    ("infographicvqa", "anls"),
    ("ocrbench", "contains"),
)
"""What is found in a file's name, and the metric of that benchmark."""
BRIEF = "\nAnswer the question using a single word or phrase."
SELECT = "Please select the correct answer from the options above. \n"


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, and what is right.

    Attributes:
        prompt: The text behind the pictures.
        metric: How the answer is scored.
        accepted: The right answers; of a multiple choice, the one letter.
        options: Options by letter, where the metric is `choice`.
    """

    prompt: str
    metric: str
    accepted: tuple[str, ...]
    options: dict[str, str]

    def score(self, answer: str) -> float:
        """What an answer is worth, from 0 to 1."""
        if self.metric == CHOICE:
            return float(find_choice(answer, self.options) == self.accepted[0])
        return METRICS[self.metric](answer, self.accepted)


def metric_by_name(file_name: str) -> str:
    """The metric of the benchmark that a file's name tells, `exact` where it tells none."""
    name = file_name.lower()
    return next((metric for part, metric in NAMED if part in name), "exact")


def is_brief(file_name: str) -> bool:
    """Whether the benchmark asks for a word or a phrase; OCRBench says so in its questions."""
    return "ocrbench" not in file_name.lower()


def read_question(row: Row, metric: str, prompt: str, file_name: str) -> Question:
    """Makes the question of a row.

    Args:
        row: The row.
        metric: One of `METRIC_NAMES`; `auto` is `choice` where the row has options, else what the
            file's name tells.
        prompt: One of `PROMPTS`.
        file_name: The file's name, without its folder.

    Raises:
        DatasetError: The row has no answer to compare with, or none that fits its options.
    """
    if metric == AUTO:
        metric = CHOICE if row.options else metric_by_name(file_name)
    if not row.answer:
        raise DatasetError("the row has no answer")
    text = _plain(row) if prompt == "plain" else _vlmevalkit(row, is_brief(file_name))
    if metric != CHOICE:
        accepted = parse_texts(row.answer) if is_list(row.answer) else (row.answer,)
        return Question(text, metric, accepted, {})
    if not row.options:
        raise DatasetError("the row has no options", hint="choose another --metric")
    letter = row.answer.upper()
    if letter not in row.options:
        got = row.answer if len(row.answer) <= 40 else f"{row.answer[:37]}..."
        wanted = " or ".join(row.options)
        raise DatasetError("the answer is none of the options", got=repr(got), wanted=wanted)
    return Question(text, metric, (letter,), row.options)


def _vlmevalkit(row: Row, brief: bool) -> str:
    if not row.options:
        return row.question + BRIEF if brief else row.question
    hint = f"Hint: {row.hint}\n" if row.hint.strip() else ""
    return f"{hint}Question: {row.question}\nOptions:\n{_listed(row.options)}{SELECT}"


def _plain(row: Row) -> str:
    if not row.options:
        return row.question
    return f"{row.question}\n{_listed(row.options)}".removesuffix("\n")


def _listed(options: dict[str, str]) -> str:
    return "".join(f"{letter}. {text}\n" for letter, text in options.items())
