"""What a run reached, for DVC's metrics and plots and for the terminal."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline.competition import rle
from pipeline.competition.layout import HEIGHT, WIDTH
from pipeline.competition.submission import read_rows
from pipeline.reporting.pictures import SheetTile, UInt8Array

_SCORES = ("dice", "iou", "accuracy")


def build_metrics(
    evaluation: Mapping[str, Any], submission: Mapping[str, Any], ablation: Mapping[str, Any]
) -> dict[str, Any]:
    """Return ``oof.<model>.dice``, ``holdout.dice``, ``test.dice`` and their like, as far as they are known.

    Of the ablation ``ablation.<split>.current``, ``best`` and ``honest``: the Dice of the current setting, of the best
    one, and of the best one chosen on other cars than those that score it.
    """
    scored = {"oof": evaluation["oof"], "holdout": evaluation.get("holdout"), "test": submission.get("test")}
    compared = {split: _compared(ablation[split]) for split in ("oof", "holdout") if "refused" not in ablation[split]}
    return {key: _rounded(values) for key, values in (scored | {"ablation": compared}).items() if values}


def collect_curves(nets: Mapping[str, Path]) -> pd.DataFrame:
    """Return the curves of all nets in one table: net, epoch, lr, loss and its parts, norms of the gradient, dice."""
    tables = [pd.read_csv(folder / "curves.csv").assign(net=name) for name, folder in nets.items()]
    table = pd.concat(tables, ignore_index=True)
    return table[["net", *(column for column in table.columns if column != "net")]]


def prediction_tiles(
    csv: Path, image: Callable[[str], UInt8Array], submission: Mapping[str, Any], wanted: int
) -> list[SheetTile]:
    """Return tiles of evenly spaced test images with their masks from the submission; unreadable ones are passed."""
    step = max(1, submission["rows"] // wanted)
    replaced = submission["replaced_images"]
    chosen = [(i, text) for n, i, text in read_rows(csv) if (n - 2) % step == 0 and i not in replaced][:wanted]
    return [SheetTile(image(image_id), rle.decode(text, HEIGHT, WIDTH), None, image_id) for image_id, text in chosen]


def format_summary(evaluation: Mapping[str, Any], submission: Mapping[str, Any]) -> str:
    """Return a table of scores and the facts of the submission, for the terminal."""
    scored = {f"out of fold, {model}": values for model, values in evaluation["oof"].items()}
    if "holdout" in evaluation:
        scored["held-out cars, ensemble"] = evaluation["holdout"]
    if "test" in submission:
        scored["test cars, submission"] = submission["test"]
    width = max(map(len, scored))
    lines = ["", f"{'':{width}}  {'Dice':>8} {'IoU':>8} {'accuracy':>8}"]
    lines += [f"{name:{width}}  " + " ".join(f"{v[key]:8.5f}" for key in _SCORES) for name, v in scored.items()]
    lines += [
        "",
        f"submissions/submission.csv.gz: {submission['rows']} images, {len(submission['nets'])} nets, checked",
    ]
    lines += collect_warnings(evaluation, submission)
    return "\n".join(
        [*lines, "reports/: index.html, metrics.json, images.csv, cars.csv, curves.csv, worst.jpg, predictions.jpg"]
    )


def _compared(told: Mapping[str, Any]) -> dict[str, float]:
    honest = {"honest": told["selection"]["honest"]} if told["selection"] else {}
    return {"current": told["current"]["dice"], "best": told["best"]["dice"], **honest}


def collect_warnings(evaluation: Mapping[str, Any], submission: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each kind of images that had to be left out or replaced, if there are any."""
    lists = {
        "training images were left out": evaluation["skipped_images"],
        "test images could not be read and have the mean mask of their angle": submission["replaced_images"],
    }
    return [
        f"{len(images)} {words}: {', '.join(list(images)[:3])}{' ...' if len(images) > 3 else ''}"
        for words, images in lists.items()
        if images
    ]


def _rounded(values: Any) -> Any:
    if isinstance(values, Mapping):
        return {key: _rounded(value) for key, value in values.items()}
    return round(values, 6) if isinstance(values, float) else values
