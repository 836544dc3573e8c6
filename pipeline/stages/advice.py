"""``carvana ablate``: what the last ablation says, in words, and its advice put into params.yaml."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline.ensembling.grid import SPLITS, Choices, Split
from pipeline.errors import PipelineError
from pipeline.params import FILE, read_params
from pipeline.recipes import lay_over

REPORTS = Path("reports")

_NAMES = {"oof": "Out of fold, each image by the nets that never saw its car", "holdout": "Held-out cars"}
_SHOWN = 12
_TEXTS = dict.fromkeys(("models", "folds", "views", "weights"), str)


def show_table() -> None:
    """Print the best settings of each split, with the current one."""
    facts = _facts()
    table = pd.read_csv(REPORTS / "ablation.csv", dtype=_TEXTS, keep_default_na=True)
    for split in SPLITS:
        rows = table[table["split"] == split]
        if rows.empty:
            print(f"{_NAMES[split]}: {facts[split].get('refused', 'nothing was scored.')}\n")
            continue
        order = rows.sort_values(["dice", "passes"], ascending=[False, True], kind="stable")
        shown = pd.concat([rows[rows["current"]], order[~order["current"]].head(_SHOWN)])
        print(f"{_NAMES[split]}: the current setting and the best of {len(rows)}")
        print("\n".join(f"  {_line(row)}" for row in _records(shown)))
        print()
    print("reports/ablation.csv has all; 'carvana ablate --best' says what they show.")


def show_best() -> None:
    """Print what each split shows: the best, what can't be told apart from it, the cheapest of those."""
    facts = _facts()
    for split in SPLITS:
        print("\n".join(_verdict(_NAMES[split], facts[split])))
        print()
    print("'carvana ablate --apply' writes the cheapest to params.yaml; reports/index.html shows it all.")


def apply_best(split: Split | None = None) -> None:
    """Write the cheapest setting that can't be told apart from the best to params.yaml.

    By default that of the held-out cars, which alone score fold ensembles; where they are too few to tell, that out
    of fold, which says nothing of folds. Raises PipelineError if neither can tell, or params.yaml changed since.
    """
    facts, params = _facts(), read_params()
    if facts["choices"] != params.choices().described():
        raise PipelineError(f"{FILE} changed since the last ablation: run 'dvc repro ablate' first.")
    chosen = split or next((s for s in ("holdout", "oof") if facts[s].get("cheapest")), None)
    if chosen is None or not facts[chosen].get("cheapest"):
        reasons = {s: facts[s].get("refused") or facts[s].get("no_interval") for s in SPLITS if s == split or not split}
        raise PipelineError(f"Nothing to apply. {' '.join(str(reason) for reason in reasons.values())}")
    row = facts[chosen]["cheapest"]
    print(f"{_NAMES[chosen]}, the cheapest that can't be told apart from the best:\n  {_line(row)}\n  {_loss(row)}")
    changes = lay_over(_overlay(row, params.choices()))
    print("\n".join(changes) or "Nothing changed: the submission is made so already.")
    if changes:
        predicts = " The new views of test images will be predicted." if "predict.views.test" in str(changes) else ""
        print(f"Run 'dvc repro'. No net is trained anew.{predicts}")


def _overlay(row: Mapping[str, Any], choices: Choices) -> dict[str, Any]:
    """Return what of a row differs from what is chosen now, as params.yaml has it."""
    models, views = row["models"].split(), row["views"].split()
    ensemble: dict[str, Any] = {"threshold": row["threshold"]}
    if set(models) != set(choices.ensemble.models or choices.models):
        ensemble["models"] = models
    if len(models) > 1:
        weights = {m: int(w) for m, _, w in (pair.partition("=") for pair in row["weights"].split())}
        ensemble["weights"] = weights
    folds = [int(fold) for fold in row["folds"].split()]
    if folds and set(folds) != set(choices.ensemble.folds or choices.folds):
        ensemble["folds"] = folds
    if len(models) * max(1, len(folds)) > 1:
        ensemble["merge"] = row["merge"]
    overlay: dict[str, Any] = {"ensemble": ensemble}
    if set(views) != set(choices.views):
        overlay["predict"] = {"views": {"test": views}}
    return overlay


def _verdict(name: str, facts: Mapping[str, Any]) -> list[str]:
    if "refused" in facts:
        return [f"{name}: {facts['refused']}"]
    current, best, selection = facts["current"], facts["best"], facts["selection"]
    lines = [
        f"{name}: {facts['cars']} cars, {facts['images']} images, {facts['settings']} settings",
        f"  now   {current['dice']:.5f}{_bounds(current)}",
        f"  best  {_line(best)}",
    ]
    if facts["no_interval"]:
        lines.append(f"  {facts['no_interval']}")
    else:
        lines += _cheapest(facts)
    if selection:
        lines.append(
            f"  Chosen on some cars and scored on others, in turn, the best gives {selection['honest']:.5f}, where the "
            f"cars that chose it say {selection['optimistic']:.5f}: {selection['difference']:+.5f}{_bounds(selection)} "
            "against now."
        )
    return lines


def _cheapest(facts: Mapping[str, Any]) -> list[str]:
    count = facts["indistinguishable"]
    if count == 1:
        return ["  It can be told apart from all others."]
    return [
        f"  {count} of the settings can't be told apart from the best: 0 lies in their 95 % intervals, paired by car.",
        "  The cheapest of them:",
        f"        {_line(facts['cheapest'])}",
        f"        {_loss(facts['cheapest'])}",
    ]


def _loss(row: Mapping[str, Any]) -> str:
    if row["loss_at_most"] == 0:
        return "It is the best, or as good."
    at_most = f"may be up to {row['loss_at_most']:.5f} below"
    return f"It is {row['loss']:.5f} below the best, and {at_most}: more cars tell more."


def _line(row: Mapping[str, Any]) -> str:
    """Return a row of the table in a line of text."""
    parts = [row["models"], f"folds {row['folds']}" if isinstance(row["folds"], str) and row["folds"] else None]
    parts += [row["views"], row["merge"], f"{row['threshold']:g}"]
    parts += [row["weights"] if isinstance(row["weights"], str) else None]
    cost = f"{row['passes']} passes" if row["passes"] > 1 else "1 pass"
    seconds = row["seconds"]
    timed = f", {seconds * 1000:.0f} ms" if seconds is not None and seconds == seconds else ""
    difference = "now" if row["current"] else f"{row['difference']:+.5f}{_bounds(row)}"
    return f"{row['dice']:.5f}  {difference}  {', '.join(filter(None, parts))}: {cost}{timed} an image"


def _bounds(row: Mapping[str, Any]) -> str:
    low, high = row["low"], row["high"]
    return (
        ""
        if low is None or low != low
        else f" [{low:+.5f}, {high:+.5f}]"
        if "difference" in row
        else f" [{low:.5f}, {high:.5f}]"
    )


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [dict(zip(map(str, table.columns), row, strict=True)) for row in table.itertuples(index=False)]


def _facts() -> dict[str, Any]:
    path = REPORTS / "ablation.json"
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PipelineError(f"{path} can't be read ({error}): run 'dvc repro ablate', which makes it.") from error
    return facts
