"""The HTML report: well-formed, complete in itself, and nothing in it but what it should tell."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorgnette.manifest import PromiseEntry, QualitySummary
from lorgnette.quantize.quality import (
    FloatTensor,
    QualityReport,
    SampleQuality,
    TensorQuality,
)
from lorgnette.report.html import render, text
from lorgnette.report.lines import promise_text, summary_rows
from lorgnette.report.plots import (
    LEAST_KL,
    bytes_by_form,
    kl_by_position,
    kl_of_samples,
    layer_of,
    sqnr_by_layer,
)

ROOT = Path(__file__).resolve().parents[2]
XHTML = "{http://www.w3.org/1999/xhtml}"
HOSTILE = (
    "<script>alert(1)</script>",
    '"/><img src="http://evil.example/x.png" onerror="alert(1)"/>',
    "</td></table></body> & &lt; ]]> --> <!--",
    "\x00\x1b[2J\ud800\ufffe\u202e",
    "$\\frac{1}{0}$ % {html}",
)

SUMMARY = QualitySummary(
    sample_set="zoo",
    sample_set_sha256="0" * 64,
    samples=7,
    skipped=2,
    positions=14,
    max_new_tokens=24,
    kl_mean=1.5e-4,
    kl_p95=2e-4,
    kl_max=3e-4,
    top1=0.99,
    same_answer=0.9375,
    image_token_cosine_mean=0.9991,
    image_token_cosine_min=0.991,
    exact_match=0.5,
    original_exact_match=0.625,
    promise=PromiseEntry(max_kl=1e-4, min_same_answer=0.98, kept=False),
)


def sample(number: int, *, kl: tuple[float, ...] = (1e-4, 0.0), same: bool = True) -> SampleQuality:
    return SampleQuality(
        name=f"{number}.png",
        question=f"Question {number}?",
        given=None,
        original="A disc.",
        answer="A disc." if same else f"Another {number}.",
        same=same,
        top1=1.0,
        kl=kl,
        image_token_cosine=0.99,
    )


def tensor(name: str, sqnr: float | None = 20.0, component: str = "decoder") -> TensorQuality:
    return TensorQuality(
        component=component, name=name, scheme="int4g32", method="rtn", sqnr_db=sqnr, bytes=1234
    )


REPORT = QualityReport(
    checkpoint="tiny",
    target="onnx-cpu",
    plan="int4",
    summary=SUMMARY,
    samples=(
        *(sample(n, kl=(n * 1e-5, 0.0, 1e-6)[: 1 + n % 3]) for n in range(6)),
        sample(6, same=False),
    ),
    tensors=tuple(tensor(f"layers.{n}.mlp.down.weight", 20.0 + n) for n in range(30)),
    tensors_left_out=None,
    weight_bytes={"int4g32": 4_000_000, "float32": 1_000_000},
    kept_in_float=(FloatTensor(component="vision_encoder", name="a.weight", reason="too odd"),),
)


@pytest.fixture(scope="module")
def page() -> bytes:
    return render(REPORT)


def parsed(data: bytes) -> ElementTree.Element:
    """The document as XML, once it has passed a parser of HTML too."""
    HTMLParser().feed(data.decode("utf-8"))
    return ElementTree.fromstring(data)


def shown(root: ElementTree.Element) -> str:
    body = root.find(f"{XHTML}body")
    assert body is not None
    return "\n".join(body.itertext())


def cells(root: ElementTree.Element, heading: str) -> list[list[str]]:
    """The rows of the first table behind a heading."""
    body = list(root.find(f"{XHTML}body") or ())
    at = next(n for n, e in enumerate(body) if e.tag == f"{XHTML}h2" and e.text == heading)
    table = next(element for element in body[at:] if element.tag == f"{XHTML}table")
    return [[cell.text or "" for cell in row] for row in table]


def test_it_tells_what_was_measured(page: bytes) -> None:
    root = parsed(page)
    told = shown(root)
    for part in (
        "Quality of tiny, plan int4, target onnx-cpu",
        "7 of set zoo, 2 left out: too long; 14 tokens compared",
        "mean 1.50e-04, 95 % under 2.00e-04, largest 3.00e-04 nats",
        "93.75%",
        "50.00%, the original's 62.50%",
        "mean KL divergence <= 0.0001, same answer >= 98.00%: broken",
    ):
        assert part in told
    assert cells(root, "What stayed float against the plan")[1:] == [
        ["vision_encoder/a.weight", "too odd"]
    ]


def test_the_worst_answers_are_those_that_changed_and_then_by_divergence(page: bytes) -> None:
    rows = cells(parsed(page), "The worst 5 answers")
    assert [row[0] for row in rows[1:]] == [f"{n}.png" for n in (6, 5, 4, 3, 2)]
    assert rows[1][3:5] == ["A disc.", "Another 6."]
    assert rows[2][3:5] == ["A disc.", "the same"]


def test_the_noisiest_matrices_are_listed() -> None:
    mixed = msgspec.structs.replace(REPORT, tensors=(tensor("exact", None), *REPORT.tensors[::-1]))
    rows = cells(parsed(render(mixed)), "Rounding noise of each matrix")
    assert len(rows) == 21
    assert [row[0] for row in rows[1:3]] == [
        "decoder/layers.0.mlp.down.weight",
        "decoder/layers.1.mlp.down.weight",
    ]
    assert rows[1][1:] == ["int4g32", "rtn", "20.00", "1,234"]


def test_why_matrices_were_not_measured_is_told() -> None:
    bare = msgspec.structs.replace(
        REPORT, tensors=(), tensors_left_out="no <reason>", kept_in_float=()
    )
    told = shown(parsed(render(bare)))
    assert "Not measured: no <reason>." in told
    assert "Nothing." in told


def test_it_is_complete_in_itself(page: bytes) -> None:
    root = parsed(page)
    tags = {element.tag.removeprefix(XHTML) for element in root.iter()}
    assert not tags & {"script", "link", "iframe", "object", "embed", "form", "a", "base"}
    sources = [e.get("src", "") for e in root.iter(f"{XHTML}img")]
    assert len(sources) == 4
    for source in sources:
        head, data = source.split(",")
        assert head == "data:image/svg+xml;base64"
        svg = ElementTree.fromstring(base64.b64decode(data))
        assert svg.tag == "{http://www.w3.org/2000/svg}svg"
        for element in svg.iter():
            assert not element.tag.endswith("script")
            for name, value in element.attrib.items():
                assert not name.endswith("href") or value.startswith("#")
    attributes = {name for e in root.iter() for name in e.attrib}
    assert not {name for name in attributes if name.startswith("on")}
    policy = next(e for e in root.iter(f"{XHTML}meta") if e.get("http-equiv"))
    assert "default-src 'none'" in (policy.get("content") or "")


def test_hostile_text_stays_text(page: bytes) -> None:
    evil = " ".join(HOSTILE)
    bad = SampleQuality(
        name=evil,
        question=evil,
        given=evil,
        original=evil,
        answer=evil,
        same=False,
        top1=1.0,
        kl=(1.0,),
        image_token_cosine=1.0,
    )
    report = QualityReport(
        checkpoint=evil,
        target=evil,
        plan=evil,
        summary=msgspec.structs.replace(SUMMARY, sample_set=evil),
        samples=(bad, *REPORT.samples),
        tensors=(tensor(evil, component=evil), *REPORT.tensors),
        tensors_left_out=None,
        weight_bytes={evil: 1000},
        kept_in_float=(FloatTensor(component=evil, name=evil, reason=evil),),
    )
    root, plain = parsed(render(report)), parsed(page)
    # Tables are cut at a number of rows, so both have the same elements.
    tags = [element.tag for element in root.iter()]
    wanted = [element.tag for element in plain.iter()]
    assert len([tag for tag in tags if tag == f"{XHTML}img"]) == 4
    assert set(tags) == set(wanted)
    assert len(tags) == len(wanted)
    visible = "".join(c for c in evil if c.isprintable() or c == "\u202e")
    assert visible in shown(root).replace("\ufffd", "")
    assert not set(shown(root)) & {"\x00", "\x1b", "\ufffe"}
    for image in root.iter(f"{XHTML}img"):
        ElementTree.fromstring(base64.b64decode(image.get("src", "").partition(",")[2]))


@given(st.text(st.characters(), max_size=20))
def test_any_text_can_be_escaped(value: str) -> None:
    document = f"<p>{text(value)}</p>".encode()
    found = ElementTree.fromstring(document).text or ""
    kept = [(a, b) for a, b in zip(value, found, strict=True) if a != b]
    assert all(b == "\ufffd" for _, b in kept)
    assert all(not a.isprintable() or a == "\ufffd" for a, _ in kept)


def test_the_same_report_gives_the_same_bytes_everywhere(page: bytes, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_bytes(msgspec.json.encode(REPORT))
    # A user's own settings of matplotlib, and another seed of hashes.
    (tmp_path / "matplotlibrc").write_text("lines.linewidth: 9\nfont.size: 30\nsvg.fonttype: none")
    code = (
        "import sys, msgspec; from pathlib import Path\n"
        "from lorgnette.quantize.quality import QualityReport\n"
        "from lorgnette.report.html import render\n"
        "report = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=QualityReport)\n"
        "Path(sys.argv[2]).write_bytes(render(report))\n"
    )
    environment = {
        **os.environ,
        "PYTHONHASHSEED": "77",
        "MATPLOTLIBRC": str(tmp_path / "matplotlibrc"),
        "PYTHONPATH": str(ROOT),
    }
    arguments = [str(tmp_path / "report.json"), str(tmp_path / "a.html")]
    command = [sys.executable, "-c", code, *arguments]
    subprocess.run(command, env=environment, check=True, timeout=120)
    assert (tmp_path / "a.html").read_bytes() == page


divergences = st.lists(st.floats(0, 100) | st.just(0.0), min_size=1, max_size=24)
reports = st.lists(
    st.builds(lambda kl, same: sample(0, kl=tuple(kl), same=same), divergences, st.booleans()),
    min_size=1,
    max_size=5,
)


@settings(max_examples=6)
@given(reports)
def test_plots_stand_any_divergence(samples: list[SampleQuality]) -> None:
    for svg in (kl_by_position(samples), kl_of_samples(samples)):
        ElementTree.fromstring(svg)


def test_plots_stand_matrices_without_noise_and_forms_without_bytes() -> None:
    for svg in (
        sqnr_by_layer([tensor("a", None)]),
        sqnr_by_layer([tensor("a", -3000.0), tensor("layers.3.b", None)]),
        bytes_by_form({"float32": 0}),
        bytes_by_form({}),
    ):
        ElementTree.fromstring(svg)


def test_equality_is_drawn_at_the_lower_edge() -> None:
    assert kl_by_position([sample(0, kl=(0.0,))]) == kl_by_position([sample(0, kl=(LEAST_KL,))])


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("layers.0.mlp.weight", 0),
        ("tower.layers.11.attention.qkv.weight", 11),
        ("head.weight", -1),
        ("players.3.x", -1),
        ("layers.9999999.x", -1),
    ],
)
def test_layers_are_told_by_name(name: str, layer: int) -> None:
    assert layer_of(name) == layer


def test_what_is_not_known_is_left_out() -> None:
    bare = msgspec.structs.replace(
        SUMMARY, skipped=0, exact_match=None, original_exact_match=None, promise=None
    )
    rows = dict(summary_rows(bare))
    assert "left out" not in rows["questions"]
    assert set(rows) == {
        "questions",
        "KL divergence",
        "same token likeliest",
        "same answer",
        "image tokens",
    }
    half = dict(summary_rows(msgspec.structs.replace(SUMMARY, exact_match=None)))
    assert half["exact match"] == "unknown, the original's 62.50%"


@pytest.mark.parametrize(
    ("promise", "told"),
    [
        (
            PromiseEntry(max_kl=None, min_same_answer=0.95, kept=True),
            "same answer >= 95.00%: kept",
        ),
        (
            PromiseEntry(max_kl=0.5, min_same_answer=0.0, kept=False, accepted_loss=True),
            "mean KL divergence <= 0.5, same answer >= 0.00%: broken (accepted at export)",
        ),
        (
            PromiseEntry(max_kl=0.5, min_same_answer=0.0, kept=True, accepted_loss=True),
            "mean KL divergence <= 0.5, same answer >= 0.00%: kept",
        ),
    ],
)
def test_promises_are_told(promise: PromiseEntry, told: str) -> None:
    assert promise_text(promise) == told
