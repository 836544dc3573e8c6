"""reports/index.html: all that a run found on one page, which asks nothing of anyone to open."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd
import vl_convert
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline.report import ablation_text, charts, summary
from pipeline.report.charts import ChartSpec
from pipeline.report.overlays import Figure
from pipeline.report.tables import (
    SETTING_COLUMNS,
    SPLIT_TITLES,
    SUSPECT_PIXELS,
    SUSPECT_SIDE,
    best_and_current,
    describe_setting,
    one_factor_changes,
    rows_of_split,
    suspected_label_errors,
)

PLOT_WIDTH = 150
"""Of the forest plot, in pixels."""

_MARGIN = 8


@dataclass(frozen=True)
class ComparisonCell:
    """A part of a setting."""

    name: str
    text: str
    changed: bool
    """Whether it is another than in the current setting."""


@dataclass(frozen=True)
class CiMark:
    """A difference in the forest plot, as distances from its left border; without an interval both ends are the dot."""

    dot: float
    low: float
    high: float


@dataclass(frozen=True)
class ComparisonRow:
    """A setting and what it scored."""

    label: str
    cells: Sequence[ComparisonCell]
    current: bool
    dice: str
    difference: str
    interval: str
    kind: str
    """``better`` or ``worse`` where the interval says so, else ``open``."""
    mark: CiMark
    better: str
    worse: str
    seconds: str
    passes: str


@dataclass(frozen=True)
class ComparisonTable:
    """A table of settings."""

    label: str
    """Head of the first column."""
    heads: Sequence[str]
    lines: Sequence[ComparisonRow]
    timed: bool
    """Whether any of them has a time."""
    nets: str
    """Whose cost it is, if not that of all nets of a setting."""
    zero: float
    """Where the forest plot has its line of no difference."""
    low: str
    high: str
    """Ends of its axis."""


def build_comparison(
    rows: pd.DataFrame, labels: Sequence[str], label: str, current: "pd.Series[Any]"
) -> ComparisonTable:
    """Return the rows as a table; ``current`` is the setting that they are compared with."""
    heads = [name for name in SETTING_COLUMNS if (rows[name] != "").any()]
    ends = pd.concat([rows["difference"], rows["low"], rows["high"], pd.Series([0.0])]).dropna()
    low, high = float(ends.min()), float(ends.max())
    span = (high - low) or 1.0

    def place(value: float) -> float:
        return round(_MARGIN + (value - low) / span * (PLOT_WIDTH - 2 * _MARGIN), 1)

    lines = [
        _line(row, name, heads, current, _mark(row, place))
        for name, row in zip(labels, rows.to_dict("records"), strict=True)
    ]
    return ComparisonTable(
        label=label,
        heads=heads,
        lines=lines,
        timed=bool(rows["seconds"].notna().any()),
        nets=ablation_text.PER_FOLD if (rows["split"] == "oof").all() else "",
        zero=place(0.0),
        low=ablation_text.format_signed(low),
        high=ablation_text.format_signed(high),
    )


def _mark(row: dict[Any, Any], place: Any) -> CiMark:
    dot = place(row["difference"])
    return (
        CiMark(dot, place(row["low"]), place(row["high"]))
        if ablation_text.is_known(row["low"])
        else CiMark(dot, dot, dot)
    )


def _line(
    row: dict[Any, Any], label: str, heads: Sequence[str], current: "pd.Series[Any]", mark: CiMark
) -> ComparisonRow:
    sure = ablation_text.is_known(row["low"])
    return ComparisonRow(
        label=label,
        cells=[ComparisonCell(name, _cell(name, row[name]), row[name] != current[name]) for name in heads],
        current=row["current"],
        dice=ablation_text.format_dice(row["dice"]),
        difference="" if row["current"] else ablation_text.format_signed(row["difference"]),
        interval=f"{ablation_text.format_signed(row['low'])} to {ablation_text.format_signed(row['high'])}"
        if sure and not row["current"]
        else "",
        kind="better" if sure and row["low"] > 0 else "worse" if sure and row["high"] < 0 else "open",
        mark=mark,
        better="" if row["current"] else ablation_text.format_int(row["better"]),
        worse="" if row["current"] else ablation_text.format_int(row["worse"]),
        seconds=ablation_text.format_seconds(row["seconds"]) if ablation_text.is_known(row["seconds"]) else "",
        passes=ablation_text.format_int(row["passes"]),
    )


def _cell(name: str, value: Any) -> str:
    if name == "threshold":
        return f"{value:g}"
    return " + ".join(value.split()) if name in ("models", "views") else value


TEMPLATE = Path(__file__).with_name("html_page.html.j2")

_BEST, _OF_EACH_CHANGE = 15, 3


@dataclass(frozen=True)
class ReportData:
    """What other stages wrote, as ``tables.read_table`` and JSON give it."""

    ablation: Mapping[str, Any]
    settings: pd.DataFrame
    postprocess: pd.DataFrame
    fold_worth: pd.DataFrame
    doubts: pd.DataFrame
    """With the Dice of ``images``."""
    images: pd.DataFrame
    """Rows of images.csv that are scored as the submission is made."""
    curves: pd.DataFrame
    submission: Mapping[str, Any]
    makes: Mapping[str, str]
    """By car; empty where metadata.csv is not there."""
    warnings: Sequence[str] = ()
    """Of images that were left out or replaced."""


@dataclass(frozen=True)
class ReportChart:
    """A chart of the page: where it stands, and a line over it."""

    name: str
    title: str
    spec: ChartSpec


def render_page(
    findings: ReportData, worst: Sequence[Figure], suspected: Sequence[Figure], panels: Sequence[Figure] = ()
) -> str:
    """Return the page's HTML."""
    settings, postprocessed = _by_split(findings.settings), _by_split(findings.postprocess)
    drawn: dict[str, list[ReportChart]] = {
        "cost": [_chart("cost", title, charts.accuracy_by_cost(rows)) for title, rows in settings.items()],
        "folds": [_chart("folds", "Held-out cars", charts.fold_worth(findings.fold_worth))]
        if len(findings.fold_worth)
        else [],
        "threshold": [_chart("threshold", title, charts.threshold_curve(rows)) for title, rows in settings.items()],
        "training": _training(findings.curves),
        "angle": [_chart("angle", "By angle", charts.dice_by_angle(findings.doubts))],
        "make": [_chart("make", "By make", charts.dice_by_make(findings.doubts, findings.makes))]
        if findings.makes
        else [],
    }
    environment = Environment(loader=FileSystemLoader(TEMPLATE.parent), autoescape=True, undefined=StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    environment.policies["json.dumps_kwargs"] = {}  # the charts in their order, that they be drawn from the top
    html = environment.get_template(TEMPLATE.name).render(
        scores=summary.headline_scores(findings.images, findings.submission),
        warnings=findings.warnings,
        before=_before(findings.submission),
        verdicts=ablation_text.summarize_ablation(findings.ablation),
        charts=drawn,
        specs={chart.name: chart.spec for section in drawn.values() for chart in section},
        compared={title: ablation_text.pluralize(len(rows), "setting") for title, rows in settings.items()},
        best={title: _best(rows) for title, rows in settings.items()},
        changes={title: _changes(rows) for title, rows in settings.items()},
        postprocess={_postprocessed(title, rows): _postprocess(rows) for title, rows in postprocessed.items()},
        panels=panels,
        worst=worst,
        suspects=suspected,
        suspect_share=(
            f"{ablation_text.format_int(len(suspected_label_errors(findings.doubts)))} of "
            f"{ablation_text.pluralize(len(findings.doubts), 'image')}"
        ),
        suspect_pixels=SUSPECT_PIXELS,
        suspect_side=SUSPECT_SIDE,
        now=_now(settings, findings.submission),
        forest_width=PLOT_WIDTH,
        library=_library(),
    )
    return html.lstrip()


def _by_split(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return the rows of each split that has some, by the words for it."""
    parts = {title: rows_of_split(rows, split) for split, title in SPLIT_TITLES.items()}
    return {title: part for title, part in parts.items() if len(part)}


def _chart(section: str, title: str, spec: ChartSpec) -> ReportChart:
    return ReportChart(f"chart-{section}-{title.lower().replace(' ', '-')}", title, spec)


def _training(curves: pd.DataFrame) -> list[ReportChart]:
    shown = (("dice", "Dice of validation cars", "Dice"), ("loss", "Loss", "loss"))
    return [
        _chart("training", title, charts.training_curves(curves, column, unit))
        for column, title, unit in shown
        if curves[column].notna().any()
    ]


def _best(rows: pd.DataFrame) -> ComparisonTable:
    shown = best_and_current(rows, _BEST)
    return build_comparison(shown, [ablation_text.format_int(rank) for rank in shown["rank"]], "rank", _current(rows))


def _changes(rows: pd.DataFrame) -> ComparisonTable:
    shown = one_factor_changes(rows, _OF_EACH_CHANGE)
    return build_comparison(shown, list(shown["changed"]), "changed", _current(rows))


def _postprocess(rows: pd.DataFrame) -> ComparisonTable:
    return build_comparison(
        rows, [steps.replace(" ", " + ") for steps in rows["postprocess"]], "postprocess", _current(rows)
    )


def _postprocessed(title: str, rows: pd.DataFrame) -> str:
    """Return the caption of a table of steps, which are tried on few cars."""
    first = rows.iloc[0]
    timed = ", the time with the steps" if rows["seconds"].notna().any() else ""
    basis = f"{ablation_text.pluralize(first['images'], 'image')} of {ablation_text.pluralize(first['cars'], 'car')}"
    return f"{title}: masks post-processed, on {basis}{timed}"


def _before(submission: Mapping[str, Any]) -> str:
    """Return what must be known of settings that are compared without the steps of the submission."""
    steps = submission["postprocess"]
    if not steps:
        return ""
    return (
        f"Settings are compared before post-processing ({', '.join(steps)}); the scores at the top, angles, makes and "
        "photographs are after it."
    )


def _now(settings: Mapping[str, pd.DataFrame], submission: Mapping[str, Any]) -> str:
    """Return the current setting in words with what an image of the submission costs.

    Only held-out cars, which come last, are looked at by all its nets, so that only they tell its seconds.
    """
    row = {str(name): value for name, value in _current(list(settings.values())[-1]).items()}
    nets, steps = submission["nets"], submission["postprocess"]
    folds = " ".join(dict.fromkeys(net.rpartition("/")[2] for net in nets))
    postprocessed = f", post-processed with {' and '.join(steps)}" if steps else ""
    beyond = ", the mending not counted" if steps else ""
    timed = None if row["split"] == "oof" else row["seconds"]
    cost = ablation_text.format_cost(len(nets) * len(submission["views"]), timed)
    setting = f"{describe_setting(row | {'folds': folds})}{postprocessed}"
    return f"{setting}; {ablation_text.pluralize(len(nets), 'net')}, {cost}{beyond}"


def _current(rows: pd.DataFrame) -> "pd.Series[Any]":
    return rows[rows["current"]].iloc[0]


@cache
def _library() -> str:
    """Return Vega, Vega-Lite and Vega-Embed in one script."""
    version = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    script: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=version)
    # Else a text in it could end the page's script element.
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--")
