"""The lot report of a run: `lot.html` for people (one file, no script, charts as SVG) and `lot.json` for machines."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Final

from jinja2 import Environment, PackageLoader, StrictUndefined

from reports.formats import CannotCarryError, RunReports
from reports.lot.lots import GRID, DefectMap, LotReport, lot_report
from reports.lot.sampling import Plan
from reports.texts import Words, capital, number, visible, words

CHART_HEIGHT: Final = 220  # in the units of the drawing, which are pixels on a wide screen
POINT_WIDTH: Final = 46
LABELS_UP_TO: Final = 30  # subgroups whose names have room below the chart


def write(reports: RunReports, folder: Path) -> None:
    """Puts `lot.html` and `lot.json` into `folder`. Raises CannotCarryError, BundleError and OSError."""
    found = lot_report(reports, reports.lot)
    if not found.pictures:
        raise CannotCarryError("There is no inspection report in this folder: lots are made of those only.")
    (folder / "lot.json").write_text(render_json(found), encoding="utf-8")
    (folder / "lot.html").write_text(render_html(found, words(reports.language)), encoding="utf-8")


def render_json(found: LotReport) -> str:
    """The lot report as one JSON object."""
    plain = asdict(found) | {"standard": "ISO 2859-1:1999", "plan": found.plan.model_dump()}
    for verdict, judged in zip(plain["verdicts"], found.verdicts, strict=True):
        verdict["plan"] |= {"reject": judged.plan.reject, "name": judged.plan.name}
    for point, subgroup in zip(plain["chart"], found.chart, strict=True):
        point["in_control"] = subgroup.in_control
    return json.dumps(plain, ensure_ascii=False, indent=1, default=str) + "\n"


def render_html(found: LotReport, say: Words) -> str:
    """The lot report as one HTML page in the language of `say`."""

    def text(key: str, **values: object) -> str:
        return say.term("lot", key).format_map(values)

    environment = Environment(
        loader=PackageLoader("reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "number": number, "visible": visible, "capital": capital}
    return environment.get_template("lot.html.j2").render(
        found=found,
        text=text,
        say=say,
        language=say.language,
        plan_name=lambda plan: _plan_name(plan, say),
        short=_short,
        map_max=lambda chart: max(map(max, chart.cells)),
        zones=_zones,
        grid=GRID,
        dispositions=[say.term("disposition", each) for each in found.plan.nonconforming],
        height=CHART_HEIGHT,
        step=POINT_WIDTH,
        labels=len(found.chart) <= LABELS_UP_TO,
        top=_round_up(max((max(p.upper, p.p) for p in found.chart), default=1.0)),
        counts_items=found.plan.counts_items,
    )


def _plan_name(plan: Plan, say: Words) -> str:
    """The plan as the standard writes it; only the words are in the language."""
    words = say.term("lot", "plan-all" if plan.all_items else "plan")
    return words.format(
        n=plan.n,
        ac=plan.accept,
        re=plan.reject,
        letter=plan.letter,
        level=plan.level,
        aql=f"{plan.aql:g}",
        inspection=say.term("lot", plan.inspection),
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _round_up(share: float) -> float:
    """The top of the chart's scale: a round number not below `share`."""
    return next((mark for mark in (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75) if mark >= share), 1.0)


def _short(name: str) -> str:
    """A lot's name with its end, where names differ, when it is long."""
    name = visible(name)
    return name if len(name) <= 40 else f"…{name[-39:]}"


def _zones(chart: DefectMap) -> list[list[int]]:
    """The map summed up by ninths, row by row from the top: the same for those who cannot see it."""
    third = GRID // 3
    return [
        [
            sum(sum(row[third * j : third * (j + 1)]) for row in chart.cells[third * i : third * (i + 1)])
            for j in range(3)
        ]
        for i in range(3)
    ]
