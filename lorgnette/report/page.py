"""One HTML file that needs nothing else: no network, no scripts.

What is written in reports comes from anywhere: all of it is escaped, and the file forbids a browser
to load anything.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; } td, th { padding: .2rem .8rem .2rem 0; text-align: left;
  vertical-align: top; border-bottom: 1px solid #ddd; unicode-bidi: isolate; }
td { white-space: pre-wrap; overflow-wrap: anywhere; }
img { max-width: 100%; } .kept { color: #00694a; } .broken { color: #a33b00; font-weight: bold; }
"""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
# Controls, halves of surrogate pairs and what is no character: none may stand in a document.
_UNSHOWN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")

Row = Sequence[str]


def page(title: str, parts: Sequence[str]) -> bytes:
    """A whole file.

    Args:
        title: Its heading, as text.
        parts: What follows, as pieces of the document.
    """
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en" xmlns="http://www.w3.org/1999/xhtml">',
            '<head><meta charset="utf-8"/>',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"/>',
            f"<title>{text(title)}</title>",
            f"<style>{_STYLE}</style></head>",
            "<body>",
            f"<h1>{text(title)}</h1>",
            *parts,
            "</body>",
            "</html>",
            "",
        ]
    ).encode("utf-8")


def text(value: str) -> str:
    """Text of unknown origin as a piece of the document."""
    return html.escape(_UNSHOWN.sub("\N{REPLACEMENT CHARACTER}", value))


def table(head: Row, rows: Sequence[Row]) -> list[str]:
    """A table of texts."""

    def line(cells: Row, tag: str) -> str:
        inside = "".join(f"<{tag}>{text(cell)}</{tag}>" for cell in cells)
        return f"<tr>{inside}</tr>"

    return ["<table>", line(head, "th"), *(line(row, "td") for row in rows), "</table>"]


def picture(svg: bytes, name: str) -> str:
    """A plot as an image of its own: names inside several SVGs would clash in one document."""
    data = base64.b64encode(svg).decode("ascii")
    return f'<p><img alt="{text(name)}" src="data:image/svg+xml;base64,{data}"/></p>'
