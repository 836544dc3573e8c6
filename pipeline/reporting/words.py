"""What the ablation found, in words and numbers for people."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from typing import Any

from pipeline.reporting.tables import SETTING, SPLITS, in_words

A_FOLD = "a fold's nets"
"""Whose costs are told out of fold: those of the submission are of all folds."""


@dataclass(frozen=True)
class Verdict:
    """What comparing the settings of a split came to, as labelled sentences, or why there is nothing to compare."""

    title: str
    basis: str
    points: Sequence["Point"]
    cautions: Sequence[str] = ()
    refused: str = ""


@dataclass(frozen=True)
class Point:
    """A sentence of a verdict, with the setting that it is about."""

    label: str
    words: str
    setting: str = ""


def verdicts(ablation: Mapping[str, Any]) -> list[Verdict]:
    """Return what each split's settings came to."""
    return [_verdict(title, ablation[split]) for split, title in SPLITS.items()]


def _verdict(title: str, told: Mapping[str, Any]) -> Verdict:
    if "refused" in told:
        return Verdict(title, "", [], refused=told["refused"])
    points = [_best(told["best"])]
    if told["indistinguishable"] is not None:
        points.append(_cheapest(told))
    points.append(_honestly(told["selection"]))
    if told["advice"]:
        points.append(Point("Advice", told["advice_words"], in_words(told["advice"])))
    if told["no_interval"]:
        points.append(Point("No intervals", told["no_interval"]))
    return Verdict(title, f"{_basis(told)}, {count(told['settings'], 'setting')} compared", points, told["cautions"])


def _best(best: Mapping[str, Any]) -> Point:
    if best["current"]:
        return Point("Best", f"Dice {dice(best['dice'])}, at {cost(best)}. It is the current setting.", in_words(best))
    return Point("Best", f"Dice {dice(best['dice'])}, {against_current(best)}, at {cost(best)}.", in_words(best))


def _cheapest(told: Mapping[str, Any]) -> Point:
    number, cheapest = told["indistinguishable"], told["cheapest"]
    if number == 1:
        return Point("Cheapest", "No other setting: all can be told from the best.")
    alike = f"{whole(number)} settings, the best among them, can't be told apart from it, all compared at once."
    if all(cheapest[name] == told["best"][name] for name in SETTING):
        return Point("Cheapest", f"{alike} None of them is cheaper than the best.")
    against = "the current setting" if cheapest["current"] else against_current(cheapest)
    words = f"{alike} The cheapest of them: Dice {dice(cheapest['dice'])}, {against}, {_loss(cheapest)}, "
    return Point("Cheapest", f"{words}at {cost(cheapest)}.", in_words(cheapest))


def _loss(cheapest: Mapping[str, Any]) -> str:
    words = f"{dice(cheapest['loss'])} below the best"
    most = cheapest["loss_at_most"]
    return f"{words}, and may be up to {dice(most)} below" if known(most) else words


def _honestly(selection: Mapping[str, Any] | None) -> Point:
    if selection is None:
        return Point("Hindsight", "The best was chosen on the very images that score it: its Dice is optimistic.")
    honest, optimistic = dice(selection["honest"]), dice(selection["optimistic"])
    instead = "as well" if honest == optimistic else f"instead of {optimistic}"
    return Point(
        "Hindsight",
        f"The best was chosen on the very images that score it, which is optimistic. Chosen on other cars each time, "
        f"in {selection['groups']} turns, the winner scores {honest} {instead}: {signed(selection['difference'])} "
        "against the current setting.",
    )


def against_current(row: Mapping[str, Any]) -> str:
    """Return a difference from the current setting, with its interval where there is one."""
    words = f"{signed(row['difference'])} against the current setting"
    return f"{words} (95 %: {signed(row['low'])} to {signed(row['high'])})" if known(row["low"]) else words


def cost(row: Mapping[str, Any]) -> str:
    """Return what an image costs under a setting of ``ablation.csv``; out of fold a fold's nets look at it."""
    nets = f", by {A_FOLD}" if row["split"] == "oof" else ""
    return f"{spent(row['passes'], row['seconds'])}{nets}"


def spent(passes: float, timed: float | None) -> str:
    """Return what an image costs, in seconds too where they are known."""
    looks = count(passes, "forward pass", "forward passes")
    return f"{looks} an image" if timed is None or isnan(timed) else f"{seconds(timed)} and {looks} an image"


def known(value: float | None) -> bool:
    """Return whether there is a number at all."""
    return value is not None and not isnan(value)


def dice(value: float) -> str:
    """Return a Dice; the 4th decimal counts, the 5th tells ties apart."""
    return f"{value:.5f}"


def signed(value: float) -> str:
    """Return a difference of Dice, with a minus as long as the plus."""
    return f"{value:+.5f}".replace("-", "−")


def seconds(value: float) -> str:
    """Return a time, to two digits."""
    return f"{value:.0f} s" if value >= 10 else f"{value:.2g} s"


def whole(value: float) -> str:
    """Return a whole number, with commas between thousands."""
    return f"{round(value):,}"


def count(number: float, one: str, many: str = "") -> str:
    """Return a number of things."""
    return f"{whole(number)} {one if number == 1 else many or f'{one}s'}"


def _basis(told: Mapping[str, Any]) -> str:
    return f"{count(told['images'], 'image')} of {count(told['cars'], 'car')}"
