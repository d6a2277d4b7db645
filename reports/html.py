"""The HTML report: one self-contained file (no script, no network) with the evidence boxes drawn over the images.

Boxes are drawn by an SVG whose view box is the shown part of the image.  All text goes through autoescape, and a
content security policy forbids scripts anyway.
"""

from __future__ import annotations

from functools import cache
from typing import Final

from jinja2 import Environment, PackageLoader, StrictUndefined

from reports.bundle import Bundle
from reports.figures import close_ups, figures
from reports.page import page_of
from reports.texts import capital, percent, visible, words

LONGEST_SIDE: Final = 1600  # of an embedded picture
CLOSE_UP_SIDE: Final = 360


def render(bundle: Bundle) -> bytes:
    """The report as one UTF-8 HTML file."""
    report = bundle.report
    text = (
        environment()
        .get_template("report.html.j2")
        .render(
            page=page_of(report),
            figures=figures(report, bundle.images, longest_side=LONGEST_SIDE),
            crops=close_ups(report, bundle.images, longest_side=CLOSE_UP_SIDE),
        )
    )
    return text.encode("utf-8")


@cache
def environment() -> Environment:
    """The templates of reports and index pages, with the filters that they use."""
    env = Environment(
        loader=PackageLoader("reports"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: visible(value) if type(value) is str else value,  # Markup is no longer user text
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {"capital": capital, "percent": percent, "words": lambda term: words("en").term("type", term)}
    return env
