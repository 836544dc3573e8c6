"""`carvana ablate`: the table, the recommended setting, and applying it to params.yaml."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from pipeline.ablation.search_space import AblationSpace, ablation_space
from pipeline.config import PARAMS_FILE, SCORED_SPLITS, Params, ScoredSplit, read_params
from pipeline.errors import CarvanaError
from pipeline.recipes import apply_overlay
from pipeline.report.ablation_text import (
    PER_FOLD,
    AblationSummary,
    format_dice,
    format_int,
    format_seconds,
    format_signed,
    is_known,
    summarize_ablation,
)
from pipeline.report.tables import SPLIT_TITLES as TITLES
from pipeline.report.tables import describe_setting, read_table, rows_of_split
from pipeline.utils.terminal import print_table
from pipeline.workspace import REPORTS_DIR, net_digest, net_dir, read_json

_SHOWN = 12
"""Settings printed per split, in addition to the current one."""

_RERUN_HINT = "run 'dvc repro ablate'"


def show_table(split: ScoredSplit | None = None) -> None:
    """Print the current and the best settings of each split, or of one."""
    ablation, table = _read_ablation(), read_table(REPORTS_DIR / "ablation.csv")
    for name in _splits(split):
        rows = rows_of_split(table, name)
        if "skipped" in ablation[name]:
            print(f"{TITLES[name]}: {ablation[name]['skipped']}\n")
            continue
        if len(rows) != ablation[name]["settings"]:
            raise CarvanaError(f"{REPORTS_DIR / 'ablation.csv'} is truncated: {_RERUN_HINT} to create it again.")
        nets = f" ({PER_FOLD})" if name == "oof" else ""
        print(f"{TITLES[name]}: current setting, and the best of {len(rows)}. Cost per image{nets}.")
        _print_settings(rows)
        print()
    print(f"All settings: {REPORTS_DIR / 'ablation.csv'}. Recommendation: 'carvana ablate --best'.")


def show_recommendation(split: ScoredSplit | None = None) -> None:
    """Print the results of each split, or of one: the best setting, the confidence set, the recommended setting."""
    summaries = dict(zip(TITLES, summarize_ablation(_read_ablation()), strict=True))
    for name in _splits(split):
        _print_summary(summaries[name])
        print()
    print("Apply it: 'carvana ablate --apply'. Details: reports/index.html.")


def apply_recommendation(split: ScoredSplit | None = None) -> None:
    """Write the recommended setting to params.yaml.

    By default that of the held-out cars, the only ones that score fold ensembles; if they are too few, the out-of-fold
    one, which leaves the folds as they are. Raises CarvanaError if neither split has a recommendation, or if nets or
    params.yaml changed since the ablation.
    """
    ablation, params = _read_ablation(), read_params()
    _check_fresh(ablation, params)
    usable = [name for name in _splits(split) if ablation[name].get("recommended")]
    if not usable:
        reasons = [ablation[name].get("skipped") or ablation[name].get("no_interval") for name in _splits(split)]
        raise CarvanaError(f"Nothing to apply. {' '.join(map(str, reasons))}")
    name = usable[-1]
    if name == "oof" and params.predict.checkpoint == "best":
        raise CarvanaError(f"Nothing to apply. {ablation[name]['warnings'][0]}")
    row = ablation[name]["recommended"]
    print(f"{TITLES[name]}: {describe_setting(row)}\n  {ablation[name]['reason']}")
    changes = apply_overlay(_overlay(row, ablation_space(params)))
    print("\n".join(changes) or "Nothing changed: params.yaml has this setting already.")
    if changes:
        predicts = " Test images are predicted with the new views." if "predict.tta.test" in str(changes) else ""
        print(f"Run 'dvc repro'. Nets are not retrained.{predicts}")


def _splits(split: ScoredSplit | None) -> list[ScoredSplit]:
    return [split] if split else list(SCORED_SPLITS)


def _check_fresh(ablation: Mapping[str, Any], params: Params) -> None:
    if ablation["search_space"] != ablation_space(params).fingerprint():
        raise CarvanaError(f"{PARAMS_FILE} changed since the last ablation: {_RERUN_HINT} first.")
    for name, digest in ablation["nets"].items():
        model, fold = name.rsplit("/", 1)
        if net_digest(net_dir(model, int(fold)), params.predict.checkpoint) != digest:
            raise CarvanaError(f"Net {name} changed since the last ablation: {_RERUN_HINT} first.")


def _overlay(row: Mapping[str, Any], space: AblationSpace) -> dict[str, Any]:
    """Return the settings of a row that differ from the current ones, in the structure of params.yaml."""
    models, views = row["models"].split(), row["views"].split()
    ensemble: dict[str, Any] = {"threshold": row["threshold"]}
    if set(models) != set(space.ensemble.models or space.models):
        ensemble["models"] = models
    if len(models) > 1:
        ensemble["weights"] = {m: int(w) for m, _, w in (pair.partition("=") for pair in row["weights"].split())}
    folds = [int(fold) for fold in row["folds"].split()]
    if folds and set(folds) != set(space.ensemble.folds or space.folds):
        ensemble["folds"] = folds
    if len(models) * max(1, len(folds)) > 1:
        ensemble["merge"] = row["merge"]
    overlay: dict[str, Any] = {"ensemble": ensemble}
    if set(views) != set(space.views):
        overlay["predict"] = {"tta": {"test": views}}
    return overlay


def _print_settings(rows: pd.DataFrame) -> None:
    best = rows[~rows["current"]].sort_values(["dice", "cost"], ascending=[False, True], kind="stable").head(_SHOWN)
    shown = pd.concat([rows[rows["current"]], best]).to_dict("records")
    cells = {
        "Dice": [format_dice(row["dice"]) for row in shown],
        "difference": ["current" if row["current"] else format_signed(row["difference"]) for row in shown],
        "95 % CI": ["" if row["current"] else _interval(row) for row in shown],
        "passes": [format_int(row["passes"]) for row in shown],
        "time": [format_seconds(row["seconds"]) if is_known(row["seconds"]) else "" for row in shown],
        "setting": [describe_setting(row) for row in shown],
    }
    filled = {title: column for title, column in cells.items() if any(column)}
    print_table(list(filled), zip(*filled.values(), strict=True), right=set(filled) - {"setting"})


def _interval(row: Mapping[Any, Any]) -> str:
    return f"{format_signed(row['low'])} to {format_signed(row['high'])}" if is_known(row["low"]) else ""


def _print_summary(summary: AblationSummary) -> None:
    if summary.skipped:
        print(f"{summary.title}: {summary.skipped}")
        return
    points = [(p.label, f"{p.setting}. {p.text}" if p.setting else p.text) for p in summary.points]
    warnings = [("Warning", warning) for warning in summary.warnings]
    print_table([summary.title, summary.basis], [*points, *warnings])


def _read_ablation() -> dict[str, Any]:
    path = REPORTS_DIR / "ablation.json"
    ablation = read_json(path)
    if not {"search_space", "nets", *SCORED_SPLITS} <= ablation.keys():
        raise CarvanaError(f"{path} was written by another version: {_RERUN_HINT} to create it again.")
    return ablation
