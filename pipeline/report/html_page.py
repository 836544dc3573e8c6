"""reports/index.html: the results of a run on one self-contained page."""

from collections.abc import Callable, Mapping, Sequence
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
"""Width of the forest plot in pixels."""

_MARGIN = 8


@dataclass(frozen=True)
class ComparisonCell:
    """One cell of a setting."""

    name: str
    text: str
    changed: bool
    """Whether it differs from the current setting."""


@dataclass(frozen=True)
class CiMark:
    """A difference in the forest plot, in pixels from its left edge; without an interval both ends equal ``dot``."""

    dot: float
    low: float
    high: float


@dataclass(frozen=True)
class ComparisonRow:
    """A setting and its scores."""

    label: str
    cells: Sequence[ComparisonCell]
    current: bool
    dice: str
    difference: str
    interval: str
    kind: str
    """``better`` or ``worse`` if the interval excludes 0, else ``open``."""
    mark: CiMark
    better: str
    worse: str
    seconds: str
    passes: str


@dataclass(frozen=True)
class ComparisonTable:
    """A table of settings, compared with the current one."""

    label: str
    """Title of the first column."""
    columns: Sequence[str]
    rows: Sequence[ComparisonRow]
    timed: bool
    """Whether any row has a time."""
    nets: str
    """Which nets the cost is of, if not all nets of a setting."""
    zero: float
    """Position of "no difference" in the forest plot."""
    low: str
    high: str
    """Ends of the forest plot's axis."""


def build_comparison(
    rows: pd.DataFrame, labels: Sequence[str], label: str, current: "pd.Series[Any]"
) -> ComparisonTable:
    """Return a table of the rows, each labeled by one of ``labels``; ``current`` is the current setting."""
    columns = [name for name in SETTING_COLUMNS if (rows[name] != "").any()]
    ends = pd.concat([rows["difference"], rows["low"], rows["high"], pd.Series([0.0])]).dropna()
    low, high = float(ends.min()), float(ends.max())
    span = (high - low) or 1.0

    def position(value: float) -> float:
        return round(_MARGIN + (value - low) / span * (PLOT_WIDTH - 2 * _MARGIN), 1)

    table_rows = [
        _comparison_row(row, name, columns, current, _mark(row, position))
        for name, row in zip(labels, rows.to_dict("records"), strict=True)
    ]
    return ComparisonTable(
        label=label,
        columns=columns,
        rows=table_rows,
        timed=bool(rows["seconds"].notna().any()),
        nets=ablation_text.PER_FOLD if (rows["split"] == "oof").all() else "",
        zero=position(0.0),
        low=ablation_text.format_signed(low),
        high=ablation_text.format_signed(high),
    )


def _mark(row: dict[Any, Any], position: Callable[[float], float]) -> CiMark:
    dot = position(row["difference"])
    if not ablation_text.is_known(row["low"]):
        return CiMark(dot, dot, dot)
    return CiMark(dot, position(row["low"]), position(row["high"]))


def _comparison_row(
    row: dict[Any, Any], label: str, columns: Sequence[str], current: "pd.Series[Any]", mark: CiMark
) -> ComparisonRow:
    has_interval = ablation_text.is_known(row["low"])
    return ComparisonRow(
        label=label,
        cells=[ComparisonCell(name, _cell(name, row[name]), row[name] != current[name]) for name in columns],
        current=row["current"],
        dice=ablation_text.format_dice(row["dice"]),
        difference="" if row["current"] else ablation_text.format_signed(row["difference"]),
        interval=f"{ablation_text.format_signed(row['low'])} to {ablation_text.format_signed(row['high'])}"
        if has_interval and not row["current"]
        else "",
        kind="better" if has_interval and row["low"] > 0 else "worse" if has_interval and row["high"] < 0 else "open",
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

_BEST, _PER_FACTOR = 15, 3
"""Rows of the table of best settings, and rows per changed factor in the one-factor comparison."""


@dataclass(frozen=True)
class ReportData:
    """The results of earlier stages: tables as ``tables.read_table`` returns them, and parsed JSON."""

    ablation: Mapping[str, Any]
    settings: pd.DataFrame
    postprocess: pd.DataFrame
    fold_subsets: pd.DataFrame
    disagreement: pd.DataFrame
    """image_disagreement.csv with the Dice of ``images``."""
    images: pd.DataFrame
    """Rows of images.csv whose masks are made like the submission's."""
    curves: pd.DataFrame
    submission: Mapping[str, Any]
    makes: Mapping[str, str]
    """By car; empty if there is no metadata.csv."""
    warnings: Sequence[str] = ()
    """About images that were skipped or replaced."""


@dataclass(frozen=True)
class ReportChart:
    """A chart with its element id and its title."""

    name: str
    title: str
    spec: ChartSpec


def render_page(
    data: ReportData, worst: Sequence[Figure], suspected: Sequence[Figure], prediction_grids: Sequence[Figure] = ()
) -> str:
    """Return the page's HTML.

    ``worst``: images with the lowest Dice; ``suspected``: possible label errors; ``prediction_grids``: one per model.
    """
    settings, postprocessed = _by_split(data.settings), _by_split(data.postprocess)
    sections: dict[str, list[ReportChart]] = {
        "cost": [_chart("cost", title, charts.accuracy_by_cost(rows)) for title, rows in settings.items()],
        "folds": [_chart("folds", "Held-out cars", charts.fold_subsets(data.fold_subsets))]
        if len(data.fold_subsets)
        else [],
        "threshold": [_chart("threshold", title, charts.threshold_curve(rows)) for title, rows in settings.items()],
        "training": _training(data.curves),
        "angle": [_chart("angle", "By angle", charts.dice_by_angle(data.disagreement))],
        "make": [_chart("make", "By make", charts.dice_by_make(data.disagreement, data.makes))] if data.makes else [],
    }
    environment = Environment(loader=FileSystemLoader(TEMPLATE.parent), autoescape=True, undefined=StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    environment.policies["json.dumps_kwargs"] = {}  # keep the order of the charts, so that they are drawn from the top
    html = environment.get_template(TEMPLATE.name).render(
        scores=summary.headline_scores(data.images, data.submission),
        warnings=data.warnings,
        postprocess_note=_postprocess_note(data.submission),
        summaries=ablation_text.summarize_ablation(data.ablation),
        charts=sections,
        specs={chart.name: chart.spec for section in sections.values() for chart in section},
        setting_counts={title: ablation_text.pluralize(len(rows), "setting") for title, rows in settings.items()},
        best={title: _best(rows) for title, rows in settings.items()},
        changes={title: _changes(rows) for title, rows in settings.items()},
        postprocess={_postprocess_caption(t, rows): _postprocess_table(rows) for t, rows in postprocessed.items()},
        prediction_grids=prediction_grids,
        worst=worst,
        suspects=suspected,
        suspect_count=(
            f"{ablation_text.format_int(len(suspected_label_errors(data.disagreement)))} of "
            f"{ablation_text.pluralize(len(data.disagreement), 'image')}"
        ),
        suspect_pixels=SUSPECT_PIXELS,
        suspect_side=SUSPECT_SIDE,
        current_setting=_describe_current(settings, data.submission),
        forest_width=PLOT_WIDTH,
        library=_library(),
    )
    return html.lstrip()


def _by_split(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return the rows of each split that has any, by the split's title."""
    parts = {title: rows_of_split(rows, split) for split, title in SPLIT_TITLES.items()}
    return {title: part for title, part in parts.items() if len(part)}


def _chart(section: str, title: str, spec: ChartSpec) -> ReportChart:
    return ReportChart(f"chart-{section}-{title.lower().replace(' ', '-')}", title, spec)


def _training(curves: pd.DataFrame) -> list[ReportChart]:
    shown = (("dice", "Validation Dice", "Dice"), ("loss", "Training loss", "loss"))
    return [
        _chart("training", title, charts.training_curves(curves, column, unit))
        for column, title, unit in shown
        if curves[column].notna().any()
    ]


def _best(rows: pd.DataFrame) -> ComparisonTable:
    shown = best_and_current(rows, _BEST)
    return build_comparison(shown, [ablation_text.format_int(rank) for rank in shown["rank"]], "rank", _current(rows))


def _changes(rows: pd.DataFrame) -> ComparisonTable:
    shown = one_factor_changes(rows, _PER_FACTOR)
    return build_comparison(shown, list(shown["changed"]), "changed", _current(rows))


def _postprocess_table(rows: pd.DataFrame) -> ComparisonTable:
    labels = [steps.replace(" ", " + ") for steps in rows["postprocess"]]
    return build_comparison(rows, labels, "post-processing", _current(rows))


def _postprocess_caption(title: str, rows: pd.DataFrame) -> str:
    """Return the caption of a table of post-processing steps, which are scored on a few cars only."""
    first = rows.iloc[0]
    timed = " (time includes post-processing)" if rows["seconds"].notna().any() else ""
    basis = f"{ablation_text.pluralize(first['images'], 'image')} of {ablation_text.pluralize(first['cars'], 'car')}"
    return f"{title}: post-processing, on {basis}{timed}"


def _postprocess_note(submission: Mapping[str, Any]) -> str:
    """Return a note that settings are compared without the submission's post-processing, if it has any."""
    steps = submission["postprocess"]
    if not steps:
        return ""
    return (
        f"Settings are compared before post-processing ({', '.join(steps)}). Headline scores, angles, makes and "
        "example images include it."
    )


def _describe_current(settings: Mapping[str, pd.DataFrame], submission: Mapping[str, Any]) -> str:
    """Return the current setting as text, with the submission's cost per image.

    Its seconds are known only from the holdout split (the last one), which all its nets predict.
    """
    row = {str(name): value for name, value in _current(list(settings.values())[-1]).items()}
    nets, steps = submission["nets"], submission["postprocess"]
    folds = " ".join(dict.fromkeys(net.rpartition("/")[2] for net in nets))
    postprocess = f", post-processing {' and '.join(steps)}" if steps else ""
    excluded = ", excluding post-processing" if steps else ""
    seconds = None if row["split"] == "oof" else row["seconds"]
    cost = ablation_text.format_cost(len(nets) * len(submission["views"]), seconds)
    setting = f"{describe_setting(row | {'folds': folds})}{postprocess}"
    return f"{setting}; {ablation_text.pluralize(len(nets), 'net')}, {cost}{excluded}"


def _current(rows: pd.DataFrame) -> "pd.Series[Any]":
    return rows[rows["current"]].iloc[0]


@cache
def _library() -> str:
    """Return Vega, Vega-Lite and Vega-Embed as one script."""
    version = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    script: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=version)
    # Escaped, because these strings would end the page's script element.
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--")
