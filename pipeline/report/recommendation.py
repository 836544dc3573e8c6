"""`carvana ablate`: the table, the recommended setting, and applying it to params.yaml."""

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from pipeline.ablation.search_space import AblationSpace, ablation_space
from pipeline.config import PARAMS_FILE, SCORED_SPLITS, Params, ScoredSplit, read_params
from pipeline.errors import CarvanaError
from pipeline.recipes import apply_overlay
from pipeline.report.ablation_text import (
    AblationSummary,
    describe_cost,
    format_dice,
    format_signed,
    is_known,
    summarize_ablation,
)
from pipeline.report.tables import SPLIT_TITLES as TITLES
from pipeline.report.tables import describe_setting, read_table, rows_of_split
from pipeline.workspace import REPORTS_DIR, net_digest, net_dir, read_json

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
