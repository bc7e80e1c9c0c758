"""The reader of tokenizer.model, held to the library's own."""

from __future__ import annotations

import contextlib

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from lorgnette.errors import CheckpointError
from lorgnette.export.formats.sentencepiece import (
    MAX_PIECE_BYTES,
    ModelKind,
    PieceKind,
    parse_sentencepiece,
)
from tests.sentencepiece_files import FIRST_PIECES, NORMAL, train, write_model

SMALL = write_model([*FIRST_PIECES, ("a", -1.0, NORMAL), ("▁", -2.0, NORMAL)])


def test_pieces_are_those_that_the_library_reads() -> None:
    content = train(split_by_unicode_script=True)
    oracle = sentencepiece.SentencePieceProcessor(model_proto=content)
    model = parse_sentencepiece(content, "m")
    assert len(model.pieces) == oracle.get_piece_size()
    for i, piece in enumerate(model.pieces):
        assert piece.text == oracle.id_to_piece(i)
        assert piece.score == oracle.get_score(i)
        assert (piece.kind == PieceKind.CONTROL) == oracle.is_control(i)
        assert (piece.kind == PieceKind.UNKNOWN) == oracle.is_unknown(i)
        assert (piece.kind == PieceKind.BYTE) == oracle.is_byte(i)
    assert model.kind == ModelKind.BPE
    assert model.byte_fallback
    assert model.add_dummy_prefix
    assert not model.remove_extra_whitespaces
    assert model.escape_whitespaces
    assert model.charsmap == model.decoding_charsmap == b""
    assert not model.treat_whitespace_as_suffix


def test_settings_that_a_file_leaves_out_have_the_defaults_of_the_format() -> None:
    model = parse_sentencepiece(write_model(FIRST_PIECES, trainer={}, normalizer={}), "m")
    assert model.kind == ModelKind.UNIGRAM
    assert model.remove_extra_whitespaces
    assert model.add_dummy_prefix
    assert model.escape_whitespaces
    assert not model.byte_fallback


def test_normalisation_rules_are_seen() -> None:
    import io

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c"]),
        model_writer=written,
        model_type="bpe",
        vocab_size=8,
        normalization_rule_name="nmt_nfkc",
        minloglevel=2,
    )
    assert len(parse_sentencepiece(written.getvalue(), "m").charsmap) > 1000


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 100,
        b"PK\x03\x04" + bytes(100),
        b'{"version": "1.0"}',
        b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
        b"\xff" * 50,
        SMALL[:-3],
        SMALL[:4],
        write_model([("a" * (MAX_PIECE_BYTES + 1), 0.0, NORMAL)]),
        write_model([("", 0.0, NORMAL)]),
        write_model([("a", float("nan"), NORMAL)]),
        write_model([("a", float("inf"), NORMAL)]),
        write_model([("a", 0.0, 9)]),
        write_model([("a", 0.0, NORMAL)], trainer={3: 9}),
        write_model([("a", 0.0, NORMAL), ("a", -1.0, NORMAL)]),
        SMALL.replace(b"\xe2\x96\x81", b"\xff\xff\xff"),
    ],
)
def test_what_is_no_model_is_refused(content: bytes) -> None:
    with pytest.raises(CheckpointError, match="not a sentencepiece model in m") as caught:
        parse_sentencepiece(content, "m")
    assert "\n" not in str(caught.value)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_damage_is_told(data: st.DataObject) -> None:
    content = bytearray(SMALL)
    for at in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[at] = data.draw(st.integers(0, 255))
    with contextlib.suppress(CheckpointError):
        parse_sentencepiece(bytes(content), "m")
    with contextlib.suppress(CheckpointError):
        parse_sentencepiece(data.draw(st.binary(max_size=80)), "m")
