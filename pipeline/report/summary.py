"""Headline scores, metrics.json and the terminal summary."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipeline.ablation.bootstrap import MIN_CLUSTERS, studentized_ci
from pipeline.competition import rle
from pipeline.competition.image_ids import HEIGHT, WIDTH
from pipeline.errors import CarvanaError
from pipeline.report.ablation_text import format_dice, format_int, pluralize
from pipeline.report.overlays import SheetTile
from pipeline.report.tables import SPLIT_TITLES, rows_of_split
from pipeline.submission.csv_file import read_rows
from pipeline.utils.arrays import UInt8Array
from pipeline.utils.terminal import print_table

MERGED = "ensemble"
"""The ``model`` in rows of images.csv that score merged nets: several models out of fold, all nets on held-out cars."""

_SCORES = {"dice": "Dice", "iou": "IoU", "accuracy": "accuracy"}

_MEANING = {
    "oof": "Each image is predicted by the nets of its own fold, which did not train on its car.",
    "holdout": "The whole ensemble, on cars that no net trained on.",
    "test": "The submission itself.",
}


@dataclass(frozen=True)
class HeadlineScore:
    """A headline Dice with its interval."""

    title: str
    meaning: str
    dice: str
    interval: str
    """The 95 % confidence interval, or why there is none."""
    basis: str
    """The number of images and cars."""


def rows_as_submitted(images: pd.DataFrame, submission: Mapping[str, Any]) -> pd.DataFrame:
    """Return the rows of images.csv, one per image, whose masks are made like the submission's."""
    models = {net.rpartition("/")[0] for net in submission["nets"]}
    out_of_fold = MERGED if len(models) > 1 else models.pop()
    return images[images["model"] == images["split"].map({"oof": out_of_fold, "holdout": MERGED})]


def with_final_dice(disagreement: pd.DataFrame, images: pd.DataFrame) -> pd.DataFrame:
    """Return image_disagreement.csv with the Dice of ``images``; its own Dice is that before post-processing."""
    final = images[["split", "image_id", "dice"]]
    keys = ["split", "image_id"]
    return disagreement.drop(columns="dice").merge(final, on=keys, how="left", validate="one_to_one")


def headline_scores(images: pd.DataFrame, submission: Mapping[str, Any]) -> list[HeadlineScore]:
    """Return the headline scores of `rows_as_submitted`, and the test score if it is known."""
    parts = {split: rows_of_split(images, split) for split in SPLIT_TITLES}
    scores = [_headline_score(split, rows) for split, rows in parts.items() if len(rows)]
    if "test" in submission:
        reason = "No interval: only the mean over test images is known."
        basis = f"{format_int(submission['rows'])} images"
        scores.append(
            HeadlineScore("Test cars", _MEANING["test"], format_dice(submission["test"]["dice"]), reason, basis)
        )
    return scores


def mean_dice_bounds(rows: pd.DataFrame) -> tuple[float, float] | None:
    """Return the 95 % confidence interval of the mean Dice of rows of images.csv, or None if there are too few cars."""
    by_car = rows.groupby("car")["dice"].agg(["sum", "size"])
    bounds_12 = studentized_ci(by_car[["sum"]].to_numpy(np.float64), by_car["size"].to_numpy(np.int64))
    low, high = np.minimum(bounds_12, 1.0)[0].tolist()
    return None if isnan(low) else (low, high)


def _headline_score(split: str, rows: pd.DataFrame) -> HeadlineScore:
    bounds = mean_dice_bounds(rows)
    interval = (
        f"95 % CI {format_dice(bounds[0])} to {format_dice(bounds[1])}"
        if bounds
        else f"No interval: it needs at least {MIN_CLUSTERS} cars."
    )
    basis = f"{pluralize(len(rows), 'image')} of {pluralize(rows['car'].nunique(), 'car')}"
    return HeadlineScore(SPLIT_TITLES[split], _MEANING[split], format_dice(float(rows["dice"].mean())), interval, basis)


def build_metrics(
    evaluation: Mapping[str, Any], submission: Mapping[str, Any], ablation: Mapping[str, Any]
) -> dict[str, Any]:
    """Return ``oof.<model>.dice``, ``holdout.dice``, ``test.dice`` and so on, as far as they are known.

    From the ablation, ``ablation.<split>.current``, ``best`` and ``honest``: the Dice of the current setting, of the
    best one, and of the best one by nested selection.
    """
    scored = {"oof": evaluation["oof"], "holdout": evaluation.get("holdout"), "test": submission.get("test")}
    compared = {split: _ablation_dice(ablation[split]) for split in SPLIT_TITLES if "skipped" not in ablation[split]}
    return {key: _rounded(values) for key, values in (scored | {"ablation": compared}).items() if values}


def collect_curves(nets: Mapping[str, Path]) -> pd.DataFrame:
    """Return the curves of all nets in one table: net, epoch, lr, loss and its parts, gradient norms, dice."""
    tables = [pd.read_csv(folder / "curves.csv").assign(net=name) for name, folder in nets.items()]
    table = pd.concat(tables, ignore_index=True)
    return table[["net", *(column for column in table.columns if column != "net")]]


def prediction_tiles(
    csv: Path, image: Callable[[str], UInt8Array], submission: Mapping[str, Any], wanted: int
) -> list[SheetTile]:
    """Return tiles of evenly spaced test images with their submitted masks; unreadable images are skipped."""
    step = max(1, submission["rows"] // wanted)
    replaced = submission["replaced_images"]
    chosen = [(i, text) for n, i, text in read_rows(csv) if (n - 2) % step == 0 and i not in replaced][:wanted]
    return [SheetTile(image(image_id), rle.decode(text, HEIGHT, WIDTH), None, image_id) for image_id, text in chosen]


def print_summary(evaluation: Mapping[str, Any], submission: Mapping[str, Any]) -> None:
    """Print a table of scores and a summary of the submission."""
    scored = {f"out of fold, {model}": values for model, values in evaluation["oof"].items()}
    if "holdout" in evaluation:
        scored["held-out cars, ensemble"] = evaluation["holdout"]
    if "test" in submission:
        scored["test cars, submission"] = submission["test"]
    rows = [(name, *(f"{values[key]:.5f}" for key in _SCORES)) for name, values in scored.items()]
    print_table(["scored on", *_SCORES.values()], rows, right=_SCORES.values())
    print(f"\nsubmissions/submission.csv.gz: {submission['rows']} images, {len(submission['nets'])} nets, checked")
    for warning in collect_warnings(evaluation, submission):
        print(warning)
    print("reports/: index.html, metrics.json, images.csv, cars.csv, curves.csv, worst.jpg, predictions.jpg")


def _ablation_dice(result: Mapping[str, Any]) -> dict[str, float]:
    nested = {"honest": result["nested_selection"]["nested_dice"]} if result["nested_selection"] else {}
    return {"current": result["current"]["dice"], "best": result["best"]["dice"], **nested}


def collect_warnings(evaluation: Mapping[str, Any], submission: Mapping[str, Any]) -> list[str]:
    """Return a sentence about skipped training images and one about replaced test images, if there are any."""
    lists = {
        "training images were skipped": evaluation["skipped_images"],
        "test images could not be read and got the mean mask of their angle": submission["replaced_images"],
    }
    return [
        f"{len(images)} {what}: {', '.join(list(images)[:3])}{' ...' if len(images) > 3 else ''}"
        for what, images in lists.items()
        if images
    ]


def _rounded(values: Any) -> Any:
    if isinstance(values, Mapping):
        return {key: _rounded(value) for key, value in values.items()}
    return round(values, 6) if isinstance(values, float) else values


def show_summary() -> None:
    """Print the scores of the last run; raises CarvanaError if there is none."""
    try:
        evaluation = json.loads(Path("reports/evaluation.json").read_text(encoding="utf-8"))
        submission = json.loads(Path("submissions/submission.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise CarvanaError(f"{error.filename} not found. Run 'carvana repro' first.") from error
    print_summary(evaluation, submission)
