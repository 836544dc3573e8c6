"""Charts of the report's tables, as Vega-Lite specifications with inline data.

Colors and fonts come from the page, which applies its light or dark theme to the specifications.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import pandas as pd

from pipeline.report.ablation_text import PER_FOLD
from pipeline.report.tables import (
    MERGE_TITLES,
    SPLIT_TITLES,
    best_at_each_cost,
    cost_column,
    describe_setting,
    differs_only_in,
    pareto_rows,
)

ChartSpec = dict[str, Any]
"""A Vega-Lite specification as JSON."""

SETTING_KINDS = ("single net", "folds", "models")
COST_TITLES = {"seconds": "seconds per image", "passes": "forward passes per image"}

_LINE, _RING, _LABEL, _HALO = "front", "current", "label", "halo"
"""Mark styles defined by the page's theme: Pareto front, ring and label of the current setting, and a text outline."""

_HEIGHT = 320
_LOG_SCALE_RATIO = 8
"""Ratio of highest to lowest cost above which the cost axis is logarithmic."""

_DICE = ".5f"

_TICKS = 8
"""Most epoch labels; chosen here because Vega would also label half epochs."""


def accuracy_by_cost(rows: pd.DataFrame, pick: str | None = None, chosen: Mapping[Any, Any] | None = None) -> ChartSpec:
    """Return Dice against cost for the settings of one split: the best at each cost, the Pareto front, the current one.

    ``pick`` names a Vega selection of clicked points by their ``setting`` text. The row ``chosen`` is marked too.
    """
    cost = cost_column(rows)
    shown = best_at_each_cost(rows)
    settings = [describe_setting(row) for row in shown.to_dict("records")]
    columns = dict.fromkeys(["dice", "difference", "kind", "current", "passes", cost])
    points = shown[list(columns)].assign(setting=settings)
    wide = rows[cost].max() > _LOG_SCALE_RATIO * rows[cost].min()
    scale = alt.Scale(type="log", nice=False, padding=14) if wide else alt.Scale(zero=False, padding=14)
    # The domain lists all kinds, so that each has the same color in every chart.
    domain, legend = alt.Scale(domain=list(SETTING_KINDS)), alt.Legend(values=_ordered(rows["kind"], SETTING_KINDS))
    axis = alt.Axis(format="~g", tickCount=6, tickMinStep=1 if cost == "passes" else alt.Undefined)
    title = f"{COST_TITLES[cost]} ({PER_FOLD})" if (rows["split"] == "oof").all() else COST_TITLES[cost]
    x = alt.X(f"{cost}:Q", title=title, scale=scale, axis=axis)
    tooltip = [
        alt.Tooltip("setting:N", title="setting"),
        _dice_tooltip(),
        alt.Tooltip("difference:Q", title="vs. current", format="+.5f"),
        alt.Tooltip("passes:Q", title="forward passes"),
        *([alt.Tooltip("seconds:Q", title="seconds", format=".3~g")] if cost == "seconds" else []),
    ]
    marks = _chart(points).mark_point(filled=True, size=55, opacity=0.8)
    marks = marks.encode(
        x=x,
        y=_dice(),
        color=alt.Color("kind:N", title=None, scale=domain, legend=legend),
        shape=alt.Shape("kind:N", title=None, scale=domain, legend=legend),
        tooltip=tooltip,
    )
    if pick:
        picked = alt.selection_point(name=pick, fields=["setting"])
        marks = marks.encode(opacity=alt.condition(picked, alt.value(0.9), alt.value(0.25))).add_params(picked)
    front = _chart(pareto_rows(rows)[[cost, "dice"]]).mark_line(style=_LINE, interpolate="step-after")
    layers = front.encode(x=x, y=_dice()) + _marked(points[points["current"]], x, tooltip)
    if chosen:
        layers += _marked(pd.DataFrame([chosen])[[cost, "dice"]], x, [], "selected")
    return _spec(layers + marks)  # points on top, so that rings do not block clicks


def fold_subsets(rows: pd.DataFrame) -> ChartSpec:
    """Return Dice against the number of folds: every subset, and per model the mean with one standard deviation."""
    rows = rows.assign(models=rows["models"].str.replace(" ", " and "))
    axis = alt.Axis(values=sorted(rows["count"].unique().tolist()), format="d")
    x = alt.X("count:Q", title="folds merged", axis=axis, scale=_padded())
    by_count = rows.groupby(["models", "count"], sort=False)["dice"].agg(["mean", "std", "size"]).reset_index()
    means = by_count.assign(low=by_count["mean"] - by_count["std"], high=by_count["mean"] + by_count["std"])
    color = alt.Color("models:N", title=None)
    band = (
        _chart(means[means["std"].notna()])
        .mark_area(opacity=0.15)
        .encode(x=x, y=_dice("low"), y2="high:Q", color=color)
    )
    line = _chart(means).mark_line().encode(x=x, y=_dice("mean"), color=color)
    points = _chart(rows[["models", "count", "folds", "dice"]]).mark_point(filled=True, size=40, opacity=0.7)
    tooltip = [alt.Tooltip("models:N", title="models"), alt.Tooltip("folds:N", title="folds"), _dice_tooltip()]
    return _spec(band + line + points.encode(x=x, y=_dice(), color=color, tooltip=tooltip))


def threshold_curve(rows: pd.DataFrame) -> ChartSpec:
    """Return Dice against the threshold, one line per merge rule, with all other settings as in the current one."""
    similar = differs_only_in(rows, "merge", "threshold")
    points = similar[["threshold", "merge", "dice", "current"]].replace({"merge": MERGE_TITLES})
    x = alt.X("threshold:Q", title="probability threshold", scale=_padded())
    color = alt.Color("merge:N", title=None, scale=alt.Scale(domain=_ordered(points["merge"], MERGE_TITLES.values())))
    tooltip = [alt.Tooltip("merge:N", title="merge"), alt.Tooltip("threshold:Q"), _dice_tooltip()]
    line = _chart(points).mark_line(point={"size": 45}).encode(x=x, y=_dice(), color=color, tooltip=tooltip)
    return _spec(line + _marked(points[points["current"]], x, tooltip))


def training_curves(rows: pd.DataFrame, column: str, title: str) -> ChartSpec:
    """Return a column of curves.csv against the epoch, one line per net, colored by model (by net if there is one)."""
    model = rows["net"].str.rpartition("/")[0]
    lines = rows[["net", "epoch", column]].assign(color=model if model.nunique() > 1 else rows["net"])
    chart = _chart(lines[lines[column].notna()]).mark_line(strokeWidth=1.5, point={"size": 18})
    epochs = sorted(set(rows["epoch"].tolist()))
    return _spec(
        chart.encode(
            x=alt.X("epoch:Q", title="epoch", axis=alt.Axis(values=epochs[:: -(-len(epochs) // _TICKS)], format="d")),
            y=alt.Y(f"{column}:Q", title=title, scale=alt.Scale(zero=False)),
            color=alt.Color("color:N", title=None),
            detail="net:N",
            tooltip=["net:N", "epoch:Q", alt.Tooltip(f"{column}:Q", title=title, format=_DICE)],
        )
    )


def dice_by_angle(images: pd.DataFrame) -> ChartSpec:
    """Return Dice against the turntable angle, per split: the median and the interquartile range."""
    grouped = images.groupby(["split", "angle"], sort=False)["dice"]
    quarters = {name: grouped.quantile(part) for name, part in (("low", 0.25), ("median", 0.5), ("high", 0.75))}
    rows = grouped.agg(lowest="min", images="size").assign(**quarters).reset_index().replace({"split": SPLIT_TITLES})
    x = alt.X("angle:O", title="angle of the turntable, in steps of 22.5°", axis=alt.Axis(labelAngle=0))
    # Side by side, so that one split does not hide the other.
    side = alt.XOffset("split:N", scale=alt.Scale(paddingInner=0.5, paddingOuter=0.5))
    color = alt.Color("split:N", title=None, scale=alt.Scale(domain=_ordered(rows["split"], SPLIT_TITLES.values())))
    tooltip = [
        alt.Tooltip("split:N", title="split"),
        alt.Tooltip("angle:O"),
        _dice_tooltip("median"),
        alt.Tooltip("low:Q", title="lower quartile", format=_DICE),
        alt.Tooltip("high:Q", title="upper quartile", format=_DICE),
        alt.Tooltip("lowest:Q", format=_DICE),
        alt.Tooltip("images:Q"),
    ]
    quartiles = _chart(rows).mark_rule(strokeWidth=3, opacity=0.35)
    quartiles = quartiles.encode(x=x, xOffset=side, y=_dice("low"), y2="high:Q", color=color)
    points = _chart(rows).mark_point(filled=True, size=50)
    return _spec(quartiles + points.encode(x=x, xOffset=side, y=_dice("median"), color=color, tooltip=tooltip))


def dice_by_make(images: pd.DataFrame, makes: Mapping[str, str]) -> ChartSpec:
    """Return the Dice of every car, one row per make with its number of cars, and the mean of each split.

    Splits are averaged separately: out of fold, one net per model predicts a car; held-out cars, all nets.
    """
    cars = images.groupby(["split", "car"], sort=False)["dice"].mean().reset_index()
    cars = cars.assign(make=cars["car"].map(makes).fillna("make unknown")).replace({"split": SPLIT_TITLES})
    makes_found = cars.groupby("make")["dice"].agg(["mean", "size"]).sort_values("mean", ascending=False)
    labels = {make: f"{make} ({size})" for make, size in makes_found["size"].items()}
    cars = cars.assign(row=cars["make"].map(labels))
    means = cars.groupby(["row", "split"], sort=False)["dice"].mean().reset_index(name="mean")
    y = alt.Y("row:N", title="make (cars)", sort=list(labels.values()), axis=alt.Axis(labelLimit=160, grid=True))
    color = alt.Color("split:N", title=None, scale=alt.Scale(domain=_ordered(cars["split"], SPLIT_TITLES.values())))
    shape = alt.Shape("split:N", title=None, scale=alt.Scale(domain=_ordered(cars["split"], SPLIT_TITLES.values())))
    tooltip = [alt.Tooltip("car:N"), alt.Tooltip("make:N"), alt.Tooltip("split:N", title="split"), _dice_tooltip()]
    points = _chart(cars).mark_point(filled=True, size=45, opacity=0.75)
    points = points.encode(x=_dice_x("dice"), y=y, color=color, shape=shape, tooltip=tooltip)
    ticks = _chart(means).mark_tick(thickness=3, size=18)
    return _spec(ticks.encode(x=_dice_x("mean"), y=y, color=color) + points, height=24 * len(labels))


def _marked(rows: pd.DataFrame, x: alt.X, tooltip: Sequence[alt.Tooltip], label: str = "current") -> alt.LayerChart:
    """Return a ring and a label around a setting, by default the current one."""
    base = _chart(rows).encode(x=x, y=_dice(), tooltip=list(tooltip))
    ring = base.mark_point(style=_RING, filled=False, size=220, strokeWidth=2)
    labels = [base.mark_text(style=style, text=label, dy=-17) for style in (_HALO, _LABEL)]
    return alt.LayerChart(layer=[ring, *labels])


def _dice(column: str = "dice") -> alt.Y:
    return alt.Y(f"{column}:Q", title="Dice", scale=alt.Scale(zero=False, padding=12))


def _dice_x(column: str) -> alt.X:
    axis = alt.Axis(labelOverlap=True, tickCount=5)
    return alt.X(f"{column}:Q", title="mean Dice per car", scale=alt.Scale(zero=False, padding=12), axis=axis)


def _dice_tooltip(column: str = "dice") -> alt.Tooltip:
    return alt.Tooltip(f"{column}:Q", title="Dice" if column == "dice" else column, format=_DICE)


def _padded() -> alt.Scale:
    return alt.Scale(zero=False, nice=False, padding=16)


def _ordered(values: pd.Series, order: Any) -> list[str]:
    """Return the values that occur, in the given order, so that colors are consistent between charts."""
    present = set(values)
    return [name for name in order if name in present]


def _chart(rows: pd.DataFrame) -> alt.Chart:
    columns = {name: rows[name].round(6) if rows[name].dtype == float else rows[name] for name in rows.columns}
    records = pd.DataFrame(columns).astype(object)
    values: list[dict[str, Any]] = records.where(records.notna(), None).to_dict("records")  # type: ignore[assignment]
    return alt.Chart(alt.InlineData(values=values))


def _spec(chart: alt.Chart | alt.LayerChart, height: int = _HEIGHT) -> ChartSpec:
    fit = alt.AutoSizeParams(type="fit-x", contains="padding")
    spec: ChartSpec = chart.properties(width="container", height=height, autosize=fit).to_dict()
    # The schema is a URL, which the page must not contain; the page has its own theme.
    return {key: value for key, value in spec.items() if key not in ("$schema", "config")}
