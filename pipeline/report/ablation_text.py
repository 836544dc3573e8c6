"""What an ablation found, in sentences; the recommended setting."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from typing import Any

from pipeline.report.tables import SETTING_COLUMNS, SPLIT_TITLES, describe_setting

PER_FOLD = "a fold's nets"
"""Whose costs are told out of fold: those of the submission are of all folds."""


@dataclass(frozen=True)
class AblationSummary:
    """What comparing the settings of a split came to, as labelled sentences, or why there is nothing to compare."""

    title: str
    basis: str
    points: Sequence["SummaryPoint"]
    cautions: Sequence[str] = ()
    refused: str = ""


@dataclass(frozen=True)
class SummaryPoint:
    """A sentence of a verdict, with the setting that it is about."""

    label: str
    words: str
    setting: str = ""


def summarize_ablation(ablation: Mapping[str, Any]) -> list[AblationSummary]:
    """Return what each split's settings came to."""
    return [_summarize_split(title, ablation[split]) for split, title in SPLIT_TITLES.items()]


def _summarize_split(title: str, told: Mapping[str, Any]) -> AblationSummary:
    if "refused" in told:
        return AblationSummary(title, "", [], refused=told["refused"])
    points = [_describe_best(told["best"])]
    if told["indistinguishable"] is not None:
        points.append(_describe_cheapest(told))
    points.append(_describe_selection(told["selection"]))
    if told["advice"]:
        points.append(SummaryPoint("Advice", told["advice_words"], describe_setting(told["advice"])))
    if told["no_interval"]:
        points.append(SummaryPoint("No intervals", told["no_interval"]))
    return AblationSummary(
        title, f"{_describe_basis(told)}, {pluralize(told['settings'], 'setting')} compared", points, told["cautions"]
    )


def _describe_best(best: Mapping[str, Any]) -> SummaryPoint:
    if best["current"]:
        return SummaryPoint(
            "Best",
            f"Dice {format_dice(best['dice'])}, at {describe_cost(best)}. It is the current setting.",
            describe_setting(best),
        )
    return SummaryPoint(
        "Best",
        f"Dice {format_dice(best['dice'])}, {describe_difference(best)}, at {describe_cost(best)}.",
        describe_setting(best),
    )


def _describe_cheapest(told: Mapping[str, Any]) -> SummaryPoint:
    number, cheapest = told["indistinguishable"], told["cheapest"]
    if number == 1:
        return SummaryPoint("Cheapest", "No other setting: all can be told from the best.")
    alike = f"{format_int(number)} settings, the best among them, can't be told apart from it, all compared at once."
    if all(cheapest[name] == told["best"][name] for name in SETTING_COLUMNS):
        return SummaryPoint("Cheapest", f"{alike} None of them is cheaper than the best.")
    against = "the current setting" if cheapest["current"] else describe_difference(cheapest)
    words = (
        f"{alike} The cheapest of them: Dice {format_dice(cheapest['dice'])}, {against}, {_describe_loss(cheapest)}, "
    )
    return SummaryPoint("Cheapest", f"{words}at {describe_cost(cheapest)}.", describe_setting(cheapest))


def _describe_loss(cheapest: Mapping[str, Any]) -> str:
    words = f"{format_dice(cheapest['loss'])} below the best"
    most = cheapest["loss_at_most"]
    return f"{words}, and may be up to {format_dice(most)} below" if is_known(most) else words


def _describe_selection(selection: Mapping[str, Any] | None) -> SummaryPoint:
    if selection is None:
        return SummaryPoint(
            "Hindsight", "The best was chosen on the very images that score it: its Dice is optimistic."
        )
    honest, optimistic = format_dice(selection["honest"]), format_dice(selection["optimistic"])
    instead = "as well" if honest == optimistic else f"instead of {optimistic}"
    return SummaryPoint(
        "Hindsight",
        f"The best was chosen on the very images that score it, which is optimistic. Chosen on other cars each time, "
        f"in {selection['groups']} turns, the winner scores {honest} {instead}: "
        f"{format_signed(selection['difference'])} "
        "against the current setting.",
    )


def describe_difference(row: Mapping[str, Any]) -> str:
    """Return a difference from the current setting, with its interval where there is one."""
    words = f"{format_signed(row['difference'])} against the current setting"
    return (
        f"{words} (95 %: {format_signed(row['low'])} to {format_signed(row['high'])})"
        if is_known(row["low"])
        else words
    )


def describe_cost(row: Mapping[str, Any]) -> str:
    """Return what an image costs under a setting of ``ablation.csv``; out of fold a fold's nets look at it."""
    nets = f", by {PER_FOLD}" if row["split"] == "oof" else ""
    return f"{format_cost(row['passes'], row['seconds'])}{nets}"


def format_cost(passes: float, timed: float | None) -> str:
    """Return what an image costs, in seconds too where they are known."""
    looks = pluralize(passes, "forward pass", "forward passes")
    return f"{looks} an image" if timed is None or isnan(timed) else f"{format_seconds(timed)} and {looks} an image"


def is_known(value: float | None) -> bool:
    """Return whether there is a number at all."""
    return value is not None and not isnan(value)


def format_dice(value: float) -> str:
    """Return a Dice; the 4th decimal counts, the 5th tells ties apart."""
    return f"{value:.5f}"


def format_signed(value: float) -> str:
    """Return a difference of Dice, with a minus as long as the plus."""
    return f"{value:+.5f}".replace("-", "−")


def format_seconds(value: float) -> str:
    """Return a time, to two digits."""
    return f"{value:.0f} s" if value >= 10 else f"{value:.2g} s"


def format_int(value: float) -> str:
    """Return a whole number, with commas between thousands."""
    return f"{round(value):,}"


def pluralize(number: float, one: str, many: str = "") -> str:
    """Return a number of things."""
    return f"{format_int(number)} {one if number == 1 else many or f'{one}s'}"


def _describe_basis(told: Mapping[str, Any]) -> str:
    return f"{pluralize(told['images'], 'image')} of {pluralize(told['cars'], 'car')}"
