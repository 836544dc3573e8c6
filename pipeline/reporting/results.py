"""What runs reached, kept a file a run, and laid side by side as Markdown."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import pandas as pd

from pipeline.reporting.headlines import mean_dice_bounds
from pipeline.reporting.words import format_dice, format_int, pluralize

RunResult = Mapping[str, Any]
"""Of a model or of several merged: ``KEYS``, and ``ensemble``, the section of ``params.yaml``."""

KEYS = {
    "name",
    "setting",
    "data",
    "folds",
    "seeds",
    "views",
    "device",
    "models",
    "parameters",
    "oof",
    "holdout",
    "minutes",
    "trained_per_second",
    "predicted_per_second",
}
"""What the table tells; ``setting`` is a digest of all in which results have to be equal to be compared."""

_COLUMNS = (
    "recipe",
    "parameters",
    "sees",
    "epochs",
    "Dice out of fold",
    "Dice held out",
    "IoU",
    "accuracy",
    "training, min",
    "images/s trained",
    "images/s predicted",
)

_NOTES = (
    "Dice, IoU and accuracy are means over images at 1918 x 1280. Dice out of fold, IoU and accuracy score each car by "
    "the net that never saw it; Dice held out scores cars that were kept out of every fold, by all folds merged. In "
    "brackets the 95 % interval, by resampling cars, which takes 8 of them. Minutes are those of training all folds, "
    "scoring included. Images a second are those of training steps, and of predicting out of fold, reading and storing "
    "included. *: an encoder that began with random weights."
)


def scores_of_split(images: pd.DataFrame, split: str, model: str) -> dict[str, Any] | None:
    """Return scores of rows of ``reports/images.csv`` with the interval of their Dice, or None if there are none."""
    rows = images[(images["split"] == split) & (images["model"] == model)]
    if rows.empty:
        return None
    means = {name: round(float(rows[name].mean()), 6) for name in ("dice", "iou", "accuracy")}
    low_high = mean_dice_bounds(rows)
    interval = [round(bound, 6) for bound in low_high] if low_high else None
    return means | {"interval": interval, "images": len(rows), "cars": int(rows["car"].nunique())}


def throughput(trainings: Sequence[Mapping[str, Any]], predictions: Sequence[tuple[int, float]]) -> dict[str, Any]:
    """Return minutes and images a second from the ``timing.json`` of nets, and images and seconds of predictions."""
    trained = sum(timing["training_seconds"] for timing in trainings)
    predicted = sum(seconds for _, seconds in predictions)
    return {
        "minutes": round(sum(timing["seconds"] for timing in trainings) / 60, 2),
        "trained_per_second": _ratio(sum(timing["images"] for timing in trainings), trained),
        "predicted_per_second": _ratio(sum(images for images, _ in predictions), predicted),
        "device": " and ".join(dict.fromkeys(timing["device"] for timing in trainings)),
    }


def results_table(results: Sequence[RunResult]) -> str:
    """Return Markdown: a table for each setting, since only equal ones compare, best first."""
    parts, ruler = [_NOTES], ["---", *["---:"] * (len(_COLUMNS) - 1)]
    for _, group in groupby(sorted(results, key=_order), key=lambda result: result["setting"]):
        equal = list(group)
        lines = [f"## {_heading(equal[0])}", "", _line(_COLUMNS), _line(ruler)]
        parts.append("\n".join([*lines, *(_line(_cells(result)) for result in equal)]))
    return "\n\n".join(parts) + "\n"


def _order(result: RunResult) -> tuple[str, str, float]:
    return _heading(result), result["setting"], -result["oof"]["dice"]


def _heading(result: RunResult) -> str:
    data, folds = result["data"], result["folds"]
    cars = pluralize(data["cars"], "car")
    what = f"The drawn sample, {cars}" if data["source"] == "sample" else f"Real photographs, {cars}"
    parts = f"{len(folds['active'])} of {folds['count']} folds, {pluralize(folds['holdout_cars'], 'car')} held out"
    return (
        f"{what}; {parts}, seed {folds['seed']} of folds and {' and '.join(map(str, result['seeds']))} of training; "
        f"{result['device']}; {_views(result['views'])}; setting {result['setting']}"
    )


def _views(views: Mapping[str, Sequence[str]]) -> str:
    out_of_fold, held_out = (", ".join(views[split]) for split in ("oof", "test"))
    return out_of_fold if out_of_fold == held_out else f"{out_of_fold} out of fold, {held_out} held out"


def _cells(result: RunResult) -> Iterator[str]:
    yield result["name"] + (" *" if any(map(_from_random, result["models"])) else "")
    yield format_int(result["parameters"])
    yield " + ".join(dict.fromkeys(model["sees"] for model in result["models"]))
    yield " + ".join(dict.fromkeys(str(model["epochs"]) for model in result["models"]))
    yield _with_interval(result["oof"])
    yield _with_interval(result["holdout"])
    yield format_dice(result["oof"]["iou"])
    yield f"{result['oof']['accuracy']:.2%}"
    yield f"{result['minutes']:.1f}"
    yield _speed(result["trained_per_second"])
    yield _speed(result["predicted_per_second"])


def _from_random(model: Mapping[str, Any]) -> bool:
    return model["spec"]["architecture"] == "smp_unet" and model["spec"]["encoder_weights"] is None


def _with_interval(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return "-"
    interval = score["interval"]
    return format_dice(score["dice"]) + (
        f" [{format_dice(interval[0])}, {format_dice(interval[1])}]" if interval else ""
    )


def _ratio(images: float, seconds: float) -> float | None:
    return round(images / seconds, 3) if seconds else None


def _speed(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"
