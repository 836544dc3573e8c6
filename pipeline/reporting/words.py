"""What the ablation found, in words and numbers for people."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from typing import Any

from pipeline.reporting.tables import SETTING, SPLITS, in_words

_MEANING = {
    "oof": "Every image by the nets of its own fold, which never saw its car.",
    "holdout": "The whole ensemble, on cars that no net trained on.",
    "test": "The submission itself.",
}


@dataclass(frozen=True)
class Score:
    """A headline: one Dice, and how far to trust it."""

    title: str
    meaning: str
    dice: str
    interval: str
    """The 95 % interval, or why there is none."""
    basis: str
    """On how many images and cars it rests."""


@dataclass(frozen=True)
class Verdict:
    """What comparing the settings of a split came to, as labelled sentences, or why there is nothing to compare."""

    title: str
    basis: str
    points: Sequence["Point"]
    refused: str = ""


@dataclass(frozen=True)
class Point:
    """A sentence of a verdict, with the setting that it is about."""

    label: str
    words: str
    setting: str = ""


def scores(ablation: Mapping[str, Any], submission: Mapping[str, Any]) -> list[Score]:
    """Return the headlines of the current setting, as far as they are known."""
    found = []
    for split, title in SPLITS.items():
        told = ablation[split]
        if "refused" not in told:
            now = told["current"]
            sure = known(now["low"]) and known(now["high"])
            interval = f"95 %: {dice(now['low'])} to {dice(now['high'])}" if sure else told["no_interval"] or ""
            found.append(Score(title, _MEANING[split], dice(now["dice"]), interval, _basis(told)))
    if "test" in submission:
        reason = "No interval: of the test cars one mean is kept, not the score of each."
        basis = f"{whole(submission['rows'])} images"
        found.append(Score("Test cars", _MEANING["test"], dice(submission["test"]["dice"]), reason, basis))
    return found


def verdicts(ablation: Mapping[str, Any]) -> list[Verdict]:
    """Return what each split's settings came to."""
    return [_verdict(title, ablation[split]) for split, title in SPLITS.items()]


def _verdict(title: str, told: Mapping[str, Any]) -> Verdict:
    if "refused" in told:
        return Verdict(title, "", [], told["refused"])
    points = [_best(told["best"])]
    if told["indistinguishable"] is not None:
        points.append(_as_good(told))
    points.append(_honestly(told["selection"]))
    if told["no_interval"]:
        points.append(Point("No intervals", told["no_interval"]))
    return Verdict(title, f"{_basis(told)}, {count(told['settings'], 'setting')} compared", points)


def _best(best: Mapping[str, Any]) -> Point:
    if best["current"]:
        return Point("Best", f"Dice {dice(best['dice'])}, at {cost(best)}. It is the current setting.", in_words(best))
    return Point("Best", f"Dice {dice(best['dice'])}, {against_current(best)}, at {cost(best)}.", in_words(best))


def _as_good(told: Mapping[str, Any]) -> Point:
    number, cheapest = told["indistinguishable"], told["cheapest"]
    if number == 1:
        return Point("As good", "No other: the best can be told from all others on these cars.")
    if all(cheapest[name] == told["best"][name] for name in SETTING):
        return Point("As good", f"{whole(number - 1)} others can't be told from it on these cars, and none is cheaper.")
    words = f"{whole(number)} settings, the best among them, can't be told apart on these cars. This is the cheapest: "
    now = " It is the current setting." if cheapest["current"] else ""
    loss = f"{dice(cheapest['loss'])} below the best, and may be up to {dice(cheapest['loss_at_most'])} below"
    words += f"Dice {dice(cheapest['dice'])}, {loss}, at {cost(cheapest)}.{now}"
    return Point("As good", words, in_words(cheapest))


def _honestly(selection: Mapping[str, Any] | None) -> Point:
    if selection is None:
        return Point("Hindsight", "The best was chosen on the very images that score it: its Dice is optimistic.")
    honest, optimistic = dice(selection["honest"]), dice(selection["optimistic"])
    instead = "as well" if honest == optimistic else f"instead of {optimistic}"
    return Point(
        "Hindsight",
        f"The best was chosen on the very images that score it, which is optimistic. Chosen on other cars each time, "
        f"in {selection['groups']} turns, the winner scores {honest} {instead}: {against_current(selection)}.",
    )


def against_current(row: Mapping[str, Any]) -> str:
    """Return a difference from the current setting, with its interval where there is one."""
    words = f"{signed(row['difference'])} against the current setting"
    return f"{words} (95 %: {signed(row['low'])} to {signed(row['high'])})" if known(row["low"]) else words


def cost(row: Mapping[str, Any]) -> str:
    """Return what an image costs."""
    passes = count(row["passes"], "forward pass", "forward passes")
    return f"{seconds(row['seconds'])} and {passes} an image" if known(row["seconds"]) else f"{passes} an image"


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
