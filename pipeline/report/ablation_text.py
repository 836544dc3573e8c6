"""The results of an ablation as sentences, and number formats for people."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from typing import Any, TypeGuard

from pipeline.report.tables import SETTING_COLUMNS, SPLIT_TITLES, describe_setting

PER_FOLD = "nets of one fold"
"""Out of fold, costs are those of one fold's nets; the submission runs those of all folds."""


@dataclass(frozen=True)
class AblationSummary:
    """The results of one split as labeled sentences, or why it was skipped."""

    title: str
    basis: str
    points: Sequence["SummaryPoint"]
    warnings: Sequence[str] = ()
    skipped: str = ""


@dataclass(frozen=True)
class SummaryPoint:
    """One result, with the setting that it is about."""

    label: str
    text: str
    setting: str = ""


def summarize_ablation(ablation: Mapping[str, Any]) -> list[AblationSummary]:
    """Return the results of each split from the content of ablation.json."""
    return [_summarize_split(title, ablation[split]) for split, title in SPLIT_TITLES.items()]


def _summarize_split(title: str, result: Mapping[str, Any]) -> AblationSummary:
    if "skipped" in result:
        return AblationSummary(title, "", [], skipped=result["skipped"])
    points = [_describe_best(result["best"])]
    if result["confidence_set_size"] is not None:
        points.append(_describe_cheapest(result))
    points.append(_describe_selection_bias(result["nested_selection"]))
    if result["recommended"]:
        points.append(SummaryPoint("Recommended", result["reason"], describe_setting(result["recommended"])))
    if result["no_interval"]:
        points.append(SummaryPoint("No intervals", result["no_interval"]))
    images, cars = pluralize(result["images"], "image"), pluralize(result["cars"], "car")
    basis = f"{images} of {cars}, {pluralize(result['settings'], 'setting')} compared"
    return AblationSummary(title, basis, points, result["warnings"])


def _describe_best(best: Mapping[str, Any]) -> SummaryPoint:
    difference = "the current setting" if best["current"] else describe_difference(best)
    text = f"Dice {format_dice(best['dice'])}, {difference}, at {describe_cost(best)}."
    return SummaryPoint("Best", text, describe_setting(best))


def _describe_cheapest(result: Mapping[str, Any]) -> SummaryPoint:
    size, cheapest = result["confidence_set_size"], result["cheapest"]
    if size == 1:
        return SummaryPoint("Cheapest", "All other settings are significantly worse than the best.")
    confidence_set = f"{format_int(size)} settings are not significantly worse than the best (simultaneous test)."
    if all(cheapest[name] == result["best"][name] for name in SETTING_COLUMNS):
        return SummaryPoint("Cheapest", f"{confidence_set} The best is the cheapest of them.")
    difference = "the current setting" if cheapest["current"] else describe_difference(cheapest)
    loss = f"{format_dice(cheapest['loss'])} below the best"
    if is_known(cheapest["loss_at_most"]):
        loss += f" (at most {format_dice(cheapest['loss_at_most'])})"
    text = (
        f"{confidence_set} The cheapest of them has Dice {format_dice(cheapest['dice'])}, {difference}, {loss}, "
        f"at {describe_cost(cheapest)}."
    )
    return SummaryPoint("Cheapest", text, describe_setting(cheapest))


def _describe_selection_bias(selection: Mapping[str, Any] | None) -> SummaryPoint:
    bias = "The best setting is selected on the images that score it, so its Dice is biased upward."
    if selection is None:
        return SummaryPoint("Selection bias", bias)
    return SummaryPoint(
        "Selection bias",
        f"{bias} With nested selection ({selection['groups']} groups of cars, each scored with the setting chosen on "
        f"the others) its Dice is {format_dice(selection['nested_dice'])} instead of "
        f"{format_dice(selection['best_dice'])}: {format_signed(selection['difference'])} vs. the current setting.",
    )


def describe_difference(row: Mapping[str, Any]) -> str:
    """Return the difference from the current setting, with its interval where there is one."""
    text = f"{format_signed(row['difference'])} vs. the current setting"
    if is_known(row["low"]):
        text += f" (95 % CI {format_signed(row['low'])} to {format_signed(row['high'])})"
    return text


def describe_cost(row: Mapping[str, Any]) -> str:
    """Return the cost per image of a row of ablation.csv; out of fold, that of one fold's nets."""
    nets = f" ({PER_FOLD})" if row["split"] == "oof" else ""
    return f"{format_cost(row['passes'], row['seconds'])}{nets}"


def format_cost(passes: float, seconds: float | None) -> str:
    """Return the cost per image, in seconds too where they are known."""
    forward_passes = f"{pluralize(passes, 'forward pass', 'forward passes')} per image"
    return f"{format_seconds(seconds)} and {forward_passes}" if is_known(seconds) else forward_passes


def is_known(value: float | None) -> TypeGuard[float]:
    """Return whether a value is neither None nor NaN."""
    return value is not None and not isnan(value)


def format_dice(value: float) -> str:
    """Return a Dice with 5 decimals: differences in the 4th matter."""
    return f"{value:.5f}"


def format_signed(value: float) -> str:
    """Return a Dice difference with its sign; a true minus sign keeps columns aligned."""
    return f"{value:+.5f}".replace("-", "−")


def format_seconds(value: float) -> str:
    """Return seconds with two significant digits."""
    return f"{value:.0f} s" if value >= 10 else f"{value:.2g} s"


def format_int(value: float) -> str:
    """Return a rounded number with thousands separators."""
    return f"{round(value):,}"


def pluralize(number: float, one: str, many: str = "") -> str:
    """Return a count with its noun, such as ``1 image`` or ``2,000 images``."""
    return f"{format_int(number)} {one if number == 1 else many or f'{one}s'}"
