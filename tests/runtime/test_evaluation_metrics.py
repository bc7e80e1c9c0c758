"""Every metric against a slow definition of its own and examples worked out by hand."""

from __future__ import annotations

import functools
import re
import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorgnette.runtime.evaluation.choice import find_choice
from lorgnette.runtime.evaluation.edit_distance import edit_distance
from lorgnette.runtime.evaluation.metrics import Metric, anls, contains, exact, relaxed, vqa
from lorgnette.runtime.evaluation.vqa_text import CONTRACTIONS, normalise

FEW = st.text("ab 1.,'é", max_size=12)
ANSWERS = st.lists(FEW, min_size=1, max_size=12)

# The keys of the evaluation's table, but for those with capitals, which lower case never meets,
# and those that stand for themselves.
KEYS = """
aint arent cant couldve couldnt couldn'tve couldnt've didnt doesnt dont hadnt hadnt've hadn'tve
hasnt havent hed hed've he'dve hes howd howll hows isnt itd itd've it'dve itll maam mightnt
mightnt've mightn'tve mightve mustnt mustve neednt notve oclock oughtnt ow's'at 'ows'at 'ow'sat
shant shed've she'dve shouldve shouldnt shouldnt've shouldn'tve somebody'd somebodyd've
somebody'dve somebodyll somebodys someoned someoned've someone'dve someonell someones somethingd
somethingd've something'dve somethingll thats thered thered've there'dve therere theres theyd
theyd've they'dve theyll theyre theyve twas wasnt wed've we'dve weve werent whatll whatre whats
whatve whens whered wheres whereve whod whod've who'dve wholl whos whove whyll whyre whys wont
wouldve wouldnt wouldnt've wouldn'tve yall yall'll y'allll yall'd've y'alld've y'all'dve youd
youd've you'dve youll youre youve
"""


def slow_distance(a: str, b: str) -> int:
    """By the recursive definition."""

    @functools.cache
    def distance(i: int, j: int) -> int:
        if i == 0 or j == 0:
            return i + j
        replaced = distance(i - 1, j - 1) + (a[i - 1] != b[j - 1])
        return min(replaced, distance(i - 1, j) + 1, distance(i, j - 1) + 1)

    return distance(len(a), len(b))


@given(st.text("abcé", max_size=14), st.text("abcé", max_size=14))
def test_the_distance_is_the_recursive_one(a: str, b: str) -> None:
    assert edit_distance(a, b) == slow_distance(a, b)


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("kitten", "sitting", 3), ("", "abc", 3), ("flaw", "lawn", 2), ("same", "same", 0)],
)
def test_known_distances(a: str, b: str, distance: int) -> None:
    assert edit_distance(a, b) == edit_distance(b, a) == distance


def test_long_texts_are_compared_quickly() -> None:
    # 10^8 cells of the table: minutes if each were computed by itself.
    started = time.perf_counter()
    assert edit_distance("ab" * 5000, "ba" * 5000) == 2
    assert time.perf_counter() - started < 10


@given(FEW, ANSWERS)
def test_anls_is_its_definition(answer: str, accepted: list[str]) -> None:
    def similarity(one: str) -> Fraction:
        a, b = (re.sub(r"\s+", " ", text.lower()).strip() for text in (answer, one))
        longer = max(len(a), len(b))
        return 1 - Fraction(slow_distance(a, b), longer) if longer else Fraction(1)

    best = max(map(similarity, accepted))
    wanted = best if best >= Fraction(1, 2) else 0
    assert anls(answer, accepted) == pytest.approx(float(wanted), abs=1e-12)


@pytest.mark.parametrize(
    ("answer", "accepted", "score"),
    [
        ("Coca  Cola", ["coca cola"], 1.0),
        ("hallo", ["hello", "help"], 0.8),
        ("ab", ["ac"], 0.5),  # exactly at the threshold, which counts
        ("abc", ["axy"], 0.0),  # a third is below it
        ("", ["word"], 0.0),
        ("the answer is 1994 of course", ["1994"], 0.0),
    ],
)
def test_anls_by_hand(answer: str, accepted: list[str], score: float) -> None:
    assert anls(answer, accepted) == pytest.approx(score)


@given(FEW, ANSWERS)
def test_vqa_accuracy_is_its_definition(answer: str, accepted: list[str]) -> None:
    told = normalise(answer)
    scores = []
    for left_out in range(len(accepted)):
        others = accepted[:left_out] + accepted[left_out + 1 :]
        matches = len([one for one in others if normalise(one) == told])
        scores.append(min(Fraction(1), Fraction(matches, 3)))
    if len(accepted) == 1:  # nobody else to agree with
        scores = [Fraction(normalise(accepted[0]) == told)]
    assert vqa(answer, accepted) == pytest.approx(float(sum(scores) / len(scores)), abs=1e-12)


@pytest.mark.parametrize(
    ("matches", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)]
)
def test_vqa_accuracy_of_ten_people(matches: int, score: float) -> None:
    # The well-known values of the leave-one-out mean with ten accepted answers.
    accepted = ["red"] * matches + ["blue"] * (10 - matches)
    assert vqa("Red", accepted) == pytest.approx(score)


def slow_normalised(answer: str) -> str:
    """Mark by mark and word by word, as the evaluation's description goes."""
    text = " ".join(re.split(r"[\n\t]", answer)).strip()
    comma = any(re.fullmatch(r"\d,\d", text[i : i + 3]) for i in range(len(text)))
    kept = ""
    for character in text:
        if character in ';/[]"{}()=+\\_-><@`,?!':
            beside = any(
                text[i] == character and " " in (text[i - 1 : i] + text[i + 1 : i + 2])
                for i in range(len(text))
            )
            kept += "" if comma or beside else " "
        else:
            kept += character
    dotless = ""
    for place, character in enumerate(kept):
        if character != "." or kept[place + 1 : place + 2].isdecimal():
            dotless += character
    words = []
    for word in dotless.lower().split():
        digits = ["none", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight"]
        digits += ["nine", "ten"]
        said = str(max(digits.index(word) - 1, 0)) if word in digits else word
        if said not in ("a", "an", "the"):
            words.append(CONTRACTIONS.get(said, said))
    return " ".join(words)


@given(
    st.lists(
        st.sampled_from(
            ["the", "A", "ten", "none", "dont", "12", "x", " ", "\t", "\n", *",.;-/'!?"]
        ),
        max_size=12,
    ).map("".join)
)
def test_answers_are_normalised_as_the_description_says(answer: str) -> None:
    assert normalise(answer) == slow_normalised(answer)


@pytest.mark.parametrize(
    ("answer", "normalised"),
    [
        ("The Dog.", "dog"),
        ("two dogs", "2 dogs"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("dont know", "don't know"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("a\nb", "b"),
        ("none", "0"),
        ("it's 5:30", "it's 5:30"),
    ],
)
def test_normalised_by_hand(answer: str, normalised: str) -> None:
    assert normalise(answer) == normalised


def test_the_contractions_are_those_of_the_evaluation() -> None:
    assert set(CONTRACTIONS) == set(KEYS.split())
    for key, word in CONTRACTIONS.items():
        assert key.replace("'", "") == word.replace("'", "")


NUMBERS = st.sampled_from(
    ["0", "1", "1.05", "1.051", "0.95", "-1", "100%", "105 %", "1e2", "5%", "0.05", ".5", "5."]
)


@given(NUMBERS | st.sampled_from(["red", "Red", "nan", "inf", "1,000", "%", ""]), NUMBERS)
def test_relaxed_accuracy_is_its_definition(answer: str, wanted: str) -> None:
    def value(text: str) -> Fraction | None:
        part = Fraction(1, 100) if text.endswith("%") else 1
        try:
            return Fraction(text.removesuffix("%").strip()) * part
        except ValueError:
            return None

    number, target = value(answer), value(wanted.removesuffix("."))
    if number is None or not target:
        right = answer.lower() == wanted.lower()
    else:
        right = abs(number - target) <= abs(target) * Fraction(5, 100)
    if number is not None and target and abs(number - target) == abs(target) * Fraction(5, 100):
        return  # at the edge itself, binary fractions decide
    assert relaxed(answer, [wanted]) == right


@pytest.mark.parametrize(
    ("answer", "accepted", "score"),
    [
        ("105", ["100"], 1),
        ("105.1", ["100"], 0),
        ("-104", ["100"], 0),
        ("4%", ["0.04"], 1),
        ("4%", ["4"], 0),
        (" Yes ", ["yes"], 1),
        ("yes.", ["yes"], 0),
        ("0", ["0.0"], 0),  # nothing is within 5 % of nothing
        ("1e999", ["1e999"], 1),
        ("7", ["red", "7.1"], 1),
    ],
)
def test_relaxed_by_hand(answer: str, accepted: list[str], score: int) -> None:
    assert relaxed(answer, accepted) == score


@given(FEW, ANSWERS)
def test_exact_and_contains_are_their_definitions(answer: str, accepted: list[str]) -> None:
    wanted = [one.strip().lower() for one in accepted]
    assert exact(answer, accepted) == (answer.strip().lower() in wanted)
    assert contains(answer, accepted) == any(one in answer.strip().lower() for one in wanted)


def test_exact_does_not_forgive_a_full_stop() -> None:
    assert exact(" DOG\n", ["cat", "dog"]) == 1
    assert exact("dog.", ["dog"]) == 0
    assert contains("It says\nSTOP!", ["says stop"]) == 1


OPTIONS = {"A": "cat", "B": "a dog", "C": "dark red", "D": "red"}


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        (" b ", "B"),
        ("B.", "B"),
        ("(B) because", "B"),
        ("**B**", "B"),
        ("B: a dog", "B"),
        ("B\nThe picture shows a dog", "B"),
        ("Answer: B", "B"),
        ("The answer is (B).", "B"),
        ("I would say (B), it has ears", "B"),
        ("It is (A) or (B)", None),
        ("a dog", "B"),
        ("A dog.", "B"),
        ("A cat", "A"),
        ("C dark red", "C"),
        ("dark red", "C"),
        ("It is a cat!", "A"),
        ("catalogue", None),
        ("A bird", None),
        ("A very long tale of many words that mentions a cat and nothing else", None),
        ("E", None),
        ("(E) a cat", "A"),
        ("", None),
        ("answers: none", None),
    ],
)
def test_which_option_an_answer_names(answer: str, letter: str | None) -> None:
    assert find_choice(answer, OPTIONS) == letter


def test_options_with_the_same_text_are_not_told_apart() -> None:
    assert find_choice("dog", {"A": "dog", "B": "dog"}) is None


@given(st.text(max_size=30), st.dictionaries(st.sampled_from("ABCDE"), st.text(max_size=5)))
def test_a_choice_is_an_option_or_none(answer: str, options: dict[str, str]) -> None:
    assert find_choice(answer, options) in (None, *options)


@pytest.mark.parametrize("metric", [exact, contains, relaxed, anls, vqa])
@given(answer=FEW, accepted=ANSWERS)
def test_scores_lie_between_0_and_1(metric: Metric, answer: str, accepted: list[str]) -> None:
    assert 0 <= metric(answer, accepted) <= 1
    assert metric(accepted[0], [accepted[0]] * 4) == 1
