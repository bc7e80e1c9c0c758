"""Sets of pictures with questions: what is read, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorgnette.errors import EXIT_WRONG_INPUT, DatasetError
from lorgnette.quantize import samples as samples_module
from lorgnette.quantize.samples import (
    QUESTION,
    Sample,
    default_samples,
    read_samples,
    samples_digest,
)
from lorgnette.runtime.image import load_image
from tests.runtime.evaluation_support import base64_of, encoded_picture, png, row, write_tsv
from tests.runtime.support import picture


def write_picture(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(picture(12, 16, seed)))
    return path


def write_lines(folder: Path, *lines: object) -> Path:
    """A folder with `samples.jsonl`; objects are written as JSON, text as it is."""
    folder.mkdir(exist_ok=True)
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "samples.jsonl").write_text("".join(text + "\n" for text in texts))
    return folder


def refused(path: Path, *parts: str) -> None:
    with pytest.raises(DatasetError) as caught:
        read_samples(path)
    told = str(caught.value)
    assert caught.value.exit_code == EXIT_WRONG_INPUT
    assert "\n" not in told
    for part in parts:
        assert part in told, told


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two pictures and no questions yet."""
    write_picture(tmp_path / "set/a.png", 1)
    write_picture(tmp_path / "set/deep/b.png", 2)
    return tmp_path / "set"


def test_lines_are_read_in_order(folder: Path) -> None:
    write_lines(
        folder,
        {"image": "deep/b.png", "question": "What is it?", "answer": "A disc."},
        "",
        {"image": "a.png", "question": "Where?"},
        {"image": "a.png", "question": "Again?", "answer": None},
    )
    wanted = (
        Sample(folder / "deep/b.png", "What is it?", "A disc.", "deep/b.png"),
        Sample(folder / "a.png", "Where?", None, "a.png"),
        Sample(folder / "a.png", "Again?", None, "a.png"),
    )
    assert read_samples(folder) == wanted
    assert read_samples(folder / "samples.jsonl") == wanted
    assert load_image(wanted[0].image).shape == (12, 16, 3)


def test_a_file_of_lines_may_have_any_name(folder: Path) -> None:
    write_lines(folder, {"image": "a.png", "question": "?"})
    (folder / "samples.jsonl").rename(folder / "mine.jsonl")
    assert len(read_samples(folder / "mine.jsonl")) == 1


def test_the_first_of_a_set_are_read_without_the_rest(folder: Path) -> None:
    line = {"image": "a.png", "question": "?"}
    write_lines(folder, line, line, "no sample")
    assert len(read_samples(folder, 2)) == 2
    refused(folder, "line 3")


def test_pictures_alone_are_asked_what_is_seen_in_the_order_of_names(folder: Path) -> None:
    write_picture(folder / "B.PNG", 3)
    write_picture(folder / "c.webp", 4)
    (folder / "notes.txt").write_text("x")
    found = read_samples(folder)
    assert [sample.name for sample in found] == ["B.PNG", "a.png", "c.webp"]
    assert {(sample.question, sample.answer) for sample in found} == {(QUESTION, None)}


def test_rows_of_a_benchmark_are_read(tmp_path: Path) -> None:
    path = write_tsv(
        tmp_path / "TextVQA.tsv",
        [
            row(1, question="What word?", answer="['stop', 'Stop']"),
            row(2, question="Which?", answer="B", A="a cat", B="a dog"),
        ],
    )
    first, second = read_samples(path)
    assert first.question == "What word?\nAnswer the question using a single word or phrase."
    assert (first.answer, first.name) == ("stop", "row 1")
    assert "A. a cat\nB. a dog" in second.question
    assert second.answer == "B"
    assert (load_image(second.image) == picture(24, 32)).all()


def test_a_row_that_cannot_be_used_is_refused_with_its_line(tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "a.tsv", [row(1), row(2, question=" ")])
    refused(path, "a.tsv, line 3", "the row has no question")


def test_a_row_with_two_pictures_is_refused(tmp_path: Path) -> None:
    two = f"['{encoded_picture(1)}', '{encoded_picture(2)}']"
    refused(write_tsv(tmp_path / "a.tsv", [row(1, image=two)]), "line 2", "2 pictures")


def test_pictures_of_a_benchmark_that_would_fill_memory_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples_module, "MAX_TSV_BYTES", 4000)
    image = base64_of(png(picture(24, 32)))
    rows = [row(n, image=image) for n in range(4)]
    refused(write_tsv(tmp_path / "a.tsv", rows), "bytes so far")


@pytest.mark.parametrize(
    "name",
    [
        "../secret.png",
        "deep/../../secret.png",
        "/etc/passwd",
        "..",
        ".",
        "",
        "C:/x.png",
        "..\\secret.png",
        "a.png\0",
        "a\n.png",
    ],
)
def test_a_path_that_leaves_the_folder_is_refused(folder: Path, name: str) -> None:
    write_picture(folder.parent / "secret.png")
    write_lines(folder, {"image": "a.png", "question": "?"}, {"image": name, "question": "?"})
    refused(folder, "samples.jsonl, line 2", "leaves the folder")


@given(st.text("./\\:a\0 ", max_size=9) | st.text(max_size=9))
def test_no_path_is_read_from_outside(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    root = tmp_path_factory.getbasetemp() / "outside"
    folder = root / "set"
    if not folder.exists():
        write_picture(root / "a")
        write_picture(folder / "a")
        write_picture(folder / "aa")
    write_lines(folder, {"image": name, "question": "?"})
    try:
        (sample,) = read_samples(folder)
    except DatasetError:
        return
    assert isinstance(sample.image, Path)
    assert sample.image.resolve().is_relative_to(folder.resolve())


def test_a_link_out_of_the_folder_is_refused(folder: Path) -> None:
    (folder / "link.png").symlink_to(write_picture(folder.parent / "secret.png"))
    write_lines(folder, {"image": "link.png", "question": "?"})
    refused(folder, "line 1", "link out of the folder")


def test_a_folder_that_is_a_link_out_is_refused(folder: Path) -> None:
    write_picture(folder.parent / "elsewhere/c.png")
    (folder / "linked").symlink_to(folder.parent / "elsewhere")
    write_lines(folder, {"image": "linked/c.png", "question": "?"})
    refused(folder, "line 1", "link out of the folder")


def test_a_link_out_is_refused_among_pictures_without_questions_too(folder: Path) -> None:
    (folder / "z.png").symlink_to(write_picture(folder.parent / "secret.png"))
    refused(folder, "link out of the folder")


def test_links_in_a_circle_are_refused(folder: Path) -> None:
    (folder / "x.png").symlink_to(folder / "y.png")
    (folder / "y.png").symlink_to(folder / "x.png")
    write_lines(folder, {"image": "x.png", "question": "?"})
    refused(folder, "line 1", "picture")


def test_a_set_may_itself_be_reached_by_a_link(folder: Path) -> None:
    write_lines(folder, {"image": "a.png", "question": "?"})
    link = folder.parent / "link"
    link.symlink_to(folder)
    assert len(read_samples(link)) == 1


def test_a_picture_that_is_not_there_is_named(folder: Path) -> None:
    write_lines(folder, {"image": "none.png", "question": "?"})
    refused(folder, "line 1", "'none.png'", "no such file")


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_a_picture_that_is_no_plain_file_is_refused(folder: Path, kind: str) -> None:
    path = folder / "odd.png"
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    write_lines(folder, {"image": "odd.png", "question": "?"})
    refused(folder, "line 1", "not a plain file")


def test_an_empty_picture_is_refused(folder: Path) -> None:
    (folder / "a.png").write_bytes(b"")
    write_lines(folder, {"image": "a.png", "question": "?"})
    refused(folder, "line 1", "0 bytes")


def test_a_picture_that_is_too_large_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples_module, "MAX_PICTURE_BYTES", 10)
    write_lines(folder, {"image": "a.png", "question": "?"})
    refused(folder, "line 1", "wanted 1 to 10")


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ({"image": "a.png", "question": "?", "prompt": "x"}, "unknown field `prompt`"),
        ({"image": "a.png"}, "`question`"),
        ({"question": "?"}, "`image`"),
        ({"image": ["a.png"], "question": "?"}, "Expected `str`"),
        ({"image": "a.png", "question": 3}, "Expected `str`"),
        ({"image": "a.png", "question": " \n"}, "'question' is empty"),
        ({"image": "a.png", "question": "?", "answer": ""}, "'answer' is empty"),
        ("[]", "not a sample"),
        ("{", "not a sample"),
        ('{"image": "a.png", "question": "\\ud800"}', "not a sample"),
        ("[" * 5000, "not a sample"),
    ],
)
def test_a_line_that_is_no_sample_is_refused(folder: Path, line: object, part: str) -> None:
    write_lines(folder, {"image": "a.png", "question": "?"}, line)
    refused(folder, "samples.jsonl, line 2", part)


def test_bytes_that_are_no_text_are_refused(folder: Path) -> None:
    (folder / "samples.jsonl").write_bytes(b'{"image": "a.png", "question": "\xff"}\n')
    refused(folder, "line 1", "not a sample")


def test_a_line_that_is_too_long_is_refused(folder: Path) -> None:
    write_lines(folder, {"image": "a.png", "question": "?" * samples_module.MAX_LINE_BYTES})
    refused(folder, "line 1", "too long")


def test_too_many_lines_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples_module, "MAX_SAMPLES", 2)
    write_lines(folder, *[{"image": "a.png", "question": "?"}] * 3)
    refused(folder, "too many lines", "at most 2")


def test_too_many_pictures_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples_module, "MAX_SAMPLES", 2)
    write_picture(folder / "b.png")
    write_picture(folder / "c.png")
    refused(folder, "too many samples", "at most 2")


def test_a_file_of_lines_without_any_is_refused(folder: Path) -> None:
    refused(write_lines(folder, ""), "no samples")


def test_a_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, "no samples", "samples.jsonl")


def test_a_list_that_is_a_broken_link_is_not_taken_for_none(folder: Path) -> None:
    (folder / "samples.jsonl").symlink_to(folder / "gone")
    refused(folder, "not a regular file")


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "none", "no samples", "got nothing")


def test_a_file_of_another_kind_is_refused(folder: Path) -> None:
    refused(folder / "a.png", "'.png'", ".jsonl or .tsv")


def test_the_digest_tells_sets_apart_and_not_where_they_lie(folder: Path, tmp_path: Path) -> None:
    line = {"image": "a.png", "question": "What?", "answer": "It."}
    write_lines(folder, line)
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "a.png").rename(copy / "renamed.png")
    write_lines(copy, "", {**line, "image": "renamed.png"})
    first = samples_digest(read_samples(folder))
    assert samples_digest(read_samples(copy)) == first
    # By hand, so that the digest of a set stays the same in later versions.
    pixels = hashlib.sha256((folder / "a.png").read_bytes()).hexdigest()
    text = f'["{pixels}", "What?", "It."]\n'
    assert first == hashlib.sha256(text.encode()).hexdigest()
    others = [
        {**line, "question": "Why?"},
        {**line, "answer": "Not."},
        {"image": "a.png", "question": "What?"},
        {**line, "image": "deep/b.png"},
    ]
    digests = {samples_digest(read_samples(write_lines(folder, other))) for other in others}
    assert len(digests | {first}) == 5
    both = read_samples(write_lines(folder, line, others[0]))
    assert samples_digest(both) != samples_digest(both[::-1])


def test_a_picture_in_memory_has_the_digest_of_its_file(folder: Path) -> None:
    path = folder / "a.png"
    assert samples_digest([Sample(path, "?")]) == samples_digest([Sample(path.read_bytes(), "?")])


def test_the_set_of_the_package_can_be_read() -> None:
    found = read_samples(default_samples())
    assert len(found) >= 8
    for sample in found:
        assert load_image(sample.image).ndim == 3
        assert sample.question
