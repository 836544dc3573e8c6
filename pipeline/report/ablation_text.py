"""What an ablation found, in sentences; the recommended setting."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline.ablation.search_space import AblationSpace, ablation_space
from pipeline.config import PARAMS_FILE, SCORED_SPLITS, Params, ScoredSplit, read_params
from pipeline.errors import CarvanaError
from pipeline.recipes import apply_overlay
from pipeline.report.tables import SETTING_COLUMNS, SPLIT_TITLES, describe_setting, read_table, rows_of_split
from pipeline.report.tables import SPLIT_TITLES as TITLES
from pipeline.workspace import net_digest, net_dir, read_json

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


REPORTS_DIR = Path("reports")

_SHOWN = 12
_WIDTH = 118
_RERUN_HINT = "run 'dvc repro ablate'"


def show_table(split: ScoredSplit | None = None) -> None:
    """Print the best settings of each split, or of one, with the current one."""
    facts, table = _read_ablation(), read_table(REPORTS_DIR / "ablation.csv")
    for name in _splits(split):
        rows = rows_of_split(table, name)
        if "refused" in facts[name]:
            print(f"{TITLES[name]}: {facts[name]['refused']}\n")
            continue
        if len(rows) != facts[name]["settings"]:
            raise CarvanaError(f"{REPORTS_DIR / 'ablation.csv'} is cut short: {_RERUN_HINT}, which makes it.")
        print(f"{TITLES[name]}: the current setting and the best of {len(rows)}")
        print("\n".join(f"  {_line(row)}" for row in _shown(rows)), end="\n\n")
    print(f"{REPORTS_DIR / 'ablation.csv'} has all; 'carvana ablate --best' says what they show.")


def show_recommendation(split: ScoredSplit | None = None) -> None:
    """Print what each split, or one, shows: the best, what can't be told apart from it, the cheapest, the advice."""
    facts = _read_ablation()
    verdicts = dict(zip(TITLES, summarize_ablation(facts), strict=True))
    for name in _splits(split):
        print("\n".join(_in_lines(verdicts[name])), end="\n\n")
    print("'carvana ablate --apply' follows the advice; reports/index.html shows all of it.")


def apply_recommendation(split: ScoredSplit | None = None) -> None:
    """Write the advised setting to params.yaml.

    By default that of the held-out cars, which alone score fold ensembles; where they are too few to tell, that out
    of fold, which says nothing of folds. Raises CarvanaError if neither can tell, or nets or params.yaml changed.
    """
    facts, params = _read_ablation(), read_params()
    _check_fresh(facts, params)
    able = [name for name in _splits(split) if facts[name].get("advice")]
    if not able:
        reasons = [facts[name].get("refused") or facts[name].get("no_interval") for name in _splits(split)]
        raise CarvanaError(f"Nothing to apply. {' '.join(map(str, reasons))}")
    name = able[-1]
    if name == "oof" and params.predict.checkpoint == "best":
        raise CarvanaError(f"Nothing to apply. {facts[name]['cautions'][0]}")
    row = facts[name]["advice"]
    print(f"{TITLES[name]}: {describe_setting(row)}\n  {facts[name]['advice_words']}")
    changes = apply_overlay(_overlay(row, ablation_space(params)))
    print("\n".join(changes) or "Nothing changed: the submission is made so already.")
    if changes:
        predicts = " The new views of test images will be predicted." if "predict.tta.test" in str(changes) else ""
        print(f"Run 'dvc repro'. No net is trained again.{predicts}")


def _splits(split: ScoredSplit | None) -> list[ScoredSplit]:
    return [split] if split else list(SCORED_SPLITS)


def _check_fresh(facts: Mapping[str, Any], params: Params) -> None:
    if facts["choices"] != ablation_space(params).fingerprint():
        raise CarvanaError(f"{PARAMS_FILE} changed since the last ablation: {_RERUN_HINT} first.")
    for name, digest in facts["nets"].items():
        model, fold = name.rsplit("/", 1)
        if net_digest(net_dir(model, int(fold)), params.predict.checkpoint) != digest:
            raise CarvanaError(f"The net {name} changed since the last ablation: {_RERUN_HINT} first.")


def _overlay(row: Mapping[str, Any], choices: AblationSpace) -> dict[str, Any]:
    """Return what of a row differs from what is chosen now, as params.yaml has it."""
    models, views = row["models"].split(), row["views"].split()
    ensemble: dict[str, Any] = {"threshold": row["threshold"]}
    if set(models) != set(choices.ensemble.models or choices.models):
        ensemble["models"] = models
    if len(models) > 1:
        ensemble["weights"] = {m: int(w) for m, _, w in (pair.partition("=") for pair in row["weights"].split())}
    folds = [int(fold) for fold in row["folds"].split()]
    if folds and set(folds) != set(choices.ensemble.folds or choices.folds):
        ensemble["folds"] = folds
    if len(models) * max(1, len(folds)) > 1:
        ensemble["merge"] = row["merge"]
    overlay: dict[str, Any] = {"ensemble": ensemble}
    if set(views) != set(choices.views):
        overlay["predict"] = {"tta": {"test": views}}
    return overlay


def _shown(rows: pd.DataFrame) -> Iterator[dict[str, Any]]:
    best = rows[~rows["current"]].sort_values(["dice", "cost"], ascending=[False, True], kind="stable").head(_SHOWN)
    shown = pd.concat([rows[rows["current"]], best])
    yield from (dict(zip(map(str, shown.columns), row, strict=True)) for row in shown.itertuples(index=False))


def _line(row: Mapping[str, Any]) -> str:
    bounds = f" [{format_signed(row['low'])}, {format_signed(row['high'])}]" if is_known(row["low"]) else ""
    difference = "now" if row["current"] else f"{format_signed(row['difference'])}{bounds}"
    return f"{format_dice(row['dice'])}  {difference}  {describe_setting(row)}: {describe_cost(row)}"


def _in_lines(verdict: AblationSummary) -> Iterator[str]:
    """Yield a verdict for the terminal, each point after its label."""
    if verdict.refused:
        yield from textwrap.wrap(f"{verdict.title}: {verdict.refused}", _WIDTH, subsequent_indent="  ")
        return
    yield f"{verdict.title}: {verdict.basis}"
    for point in verdict.points:
        told = f"{point.setting}. {point.words}" if point.setting else point.words
        yield from textwrap.wrap(told, _WIDTH, initial_indent=f"  {point.label:<13}", subsequent_indent=" " * 15)
    for caution in verdict.cautions:
        yield from textwrap.wrap(caution, _WIDTH, initial_indent="  ", subsequent_indent="  ")


def _read_ablation() -> dict[str, Any]:
    path = REPORTS_DIR / "ablation.json"
    facts = read_json(path)
    if not {"choices", "nets", *SCORED_SPLITS} <= facts.keys():
        raise CarvanaError(f"{path} is of another version: {_RERUN_HINT}, which makes it.")
    return facts
