"""The report on paper: PDF/A-2a (ISO 19005-2) that is also PDF/UA-1 (ISO 14289-1), set by typst with the bundled fonts.

The same report gives the same bytes: the only date in the file is that of the report.  What a report says reaches the
template as JSON strings, which typst sets and never evaluates.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any, Final

import typst
from fontTools.ttLib import TTFont

from reports.bundle import Bundle
from reports.figures import Figure, close_ups, figures
from reports.page import page_of

STANDARDS: Final = ("a-2a", "ua-1")
FONTS: Final = Path(__file__).with_name("fonts")
TEMPLATE: Final = Path(__file__).with_name("templates") / "report.typ"
LONGEST_SIDE: Final = 1000  # of a figure: 230 pixels an inch at its largest
CLOSE_UP_SIDE: Final = 260
NO_GLYPH: Final = "□"  # PDF/A forbids text without a glyph (ISO 19005-2, 6.2.11.8)
LONG_FINDING: Final = 1200  # characters, above which a finding may run over two pages

# The compiler takes files from memory only as text.
_SVG: Final = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">'
    '<image width="{width}" height="{height}" preserveAspectRatio="none" href="{data_uri}"/></svg>'
)


def render(bundle: Bundle) -> bytes:
    """The report as PDF. The last one is kept as long as its bundle lives: several formats carry the same."""
    global _latest
    with _one_at_a_time:
        if _latest is None or _latest[0]() is not bundle:
            _latest = weakref.ref(bundle), _render(bundle)
        return _latest[1]


_latest: tuple[weakref.ref[Bundle], bytes] | None = None
_one_at_a_time: Final = Lock()  # the compiler is one, and keeps its own state


def _render(bundle: Bundle) -> bytes:
    report = bundle.report
    files: dict[str, bytes] = {"main.typ": _template()}
    page = asdict(page_of(report))
    for finding in page["findings"]:
        finding["long"] = len(json.dumps(finding)) > LONG_FINDING
    page["figures"] = [
        _placed(figure, f"figure-{n}", files, named=True)
        for n, figure in enumerate(figures(report, bundle.images, longest_side=LONGEST_SIDE))
    ]
    shown = close_ups(report, bundle.images, longest_side=CLOSE_UP_SIDE)
    page["close-ups"] = {
        name: _placed(figure, f"close-up-{n}", files, named=False)
        for n, (name, figure) in enumerate(shown.items())
        if figure
    }
    files["data.json"] = json.dumps(_printable(page)).encode()
    compiler: Any = _compiler()  # its stub leaves out that files may come from memory
    date = report.created.replace(microsecond=0)  # a PDF date has none (ISO 32000-1, 7.9.4)
    made = compiler.compile(files, format="pdf", pdf_standards=list(STANDARDS), timestamp=date)
    assert isinstance(made, bytes)
    return made


def _placed(figure: Figure, name: str, files: dict[str, bytes], *, named: bool) -> dict[str, Any]:
    """The figure for the template, which measures its boxes in shares of the picture; its file goes into `files`."""
    width, height = figure.size
    files[f"{name}.svg"] = _SVG.format(width=width, height=height, data_uri=figure.picture.data_uri).encode()
    marks = [
        {"id": m.finding_id, "weak": m.weak, "x": m.x / width, "y": m.y / height}
        | {"width": m.width / width, "height": m.height / height}
        | {"tag-left": m.tag_left / 100, "tag-top": m.tag_top / 100, "tag-below": m.tag_below}
        for m in figure.marks
    ]
    said = {"alt": figure.alt, "caption": figure.caption, "named": named}
    return said | {"file": f"{name}.svg", "ratio": figure.picture.display_ratio, "marks": marks}


def _printable(value: Any) -> Any:
    """The value with text that the fonts can set."""
    if isinstance(value, str):
        return "".join(character if ord(character) in _characters() else NO_GLYPH for character in value)
    if isinstance(value, Mapping):
        return {key: _printable(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_printable(each) for each in value]
    return value


@cache
def _characters() -> frozenset[int]:
    """The code points that the fonts have."""
    return frozenset().union(*(TTFont(path, lazy=True).getBestCmap() for path in _font_files()))


def _font_files() -> list[Path]:
    return sorted(path for path in FONTS.iterdir() if path.suffix in (".ttf", ".otf"))


@cache
def _compiler() -> typst.Compiler:
    """One for the process: it keeps the fonts and what of the template does not change."""
    fonts = typst.Fonts(include_system_fonts=False, include_embedded_fonts=False, font_paths=[str(FONTS)])
    return typst.Compiler(font_paths=fonts, ignore_system_fonts=True)


@cache
def _template() -> bytes:
    return TEMPLATE.read_bytes()
