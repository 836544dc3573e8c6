"""``carvana export``: a trained model as files that run elsewhere, each checked, with a card: exports/<model>/."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.folds import images_in_folds, training_folds
from pipeline.errors import CarvanaError
from pipeline.exporting.card import format_bytes, format_rate
from pipeline.exporting.check import CHECK_IMAGES, ExportReport
from pipeline.exporting.export import README_FILE, ExportResult, check_formats, export_net
from pipeline.exporting.formats import FORMATS
from pipeline.exporting.material import ExportJob
from pipeline.learning.models import CONFIG
from pipeline.params import Params, read_params
from pipeline.resume import STATE_DIR, file_lock
from pipeline.stages.inputs import net_dir, read_fold_by_car, training_images
from pipeline.stages.nets import net_digest

EXPORTS_DIR = Path("exports")
METRICS = Path("reports/metrics.json")


def export_model(model: str, fold: int | None, formats: Sequence[str] | None, images: int) -> None:
    """Export a trained model, print a line a format, and write its card.

    ``fold``, by default the first active one, says whose net; ``formats`` are all by default; ``images`` are for the
    calibration of int8. Raises CarvanaError for what is not there, and in the end for what failed its check.
    """
    names = list(dict.fromkeys(formats or FORMATS))
    check_formats(names)
    params, folder = read_params(), EXPORTS_DIR / model
    job = _job(params, model, params.folds.active[0] if fold is None else fold, "ensemble" in names, images)
    refused = []
    with file_lock(Path(STATE_DIR) / "running" / f"export-{model}.lock", f"the exports of {model}"):
        for done in export_net(job, names, _own_scores(model), folder):
            print(_line(done), flush=True)
            refused += [str(done.result)] if isinstance(done.result, CarvanaError) else []
    if (folder / README_FILE).exists():  # not where nothing was ever kept
        print(f"{folder / README_FILE} says what they are and how to use them.")
    if refused:
        raise CarvanaError("\n".join(refused))


def _job(params: Params, model: str, fold: int, ensemble: bool, calibration: int) -> ExportJob:
    trained = _demand_trained(model, fold)
    merged = params.folds.active if ensemble else ()
    folders = {number: net_dir(model, number) for number in sorted({fold, *merged})}
    weights, settings = params.predict.checkpoint, params.ensemble
    photographs, fold_by_car = training_images(params), read_fold_by_car()
    unseen = images_in_folds(photographs.ids(), fold_by_car, [fold])
    if not unseen:
        raise CarvanaError(f"Fold {fold} has no photographs to check exports on: name another with --fold.")
    learned = images_in_folds(photographs.ids(), fold_by_car, training_folds(fold, params.folds.count))
    return ExportJob(
        model=model,
        fold=fold,
        folders=folders,
        digests={number: net_digest(net_dir(model, number), weights) for number in trained},
        ensemble=merged,
        weights=weights,
        views=params.predict.tta.test,
        merge=settings.merge,
        threshold=settings.threshold,
        reader=photographs,
        check_ids=_spread(unseen, CHECK_IMAGES),
        calibration=_spread(learned, calibration),
    )


def _demand_trained(model: str, fold: int) -> list[int]:
    """Return the folds of a model that are trained; raises CarvanaError if ``fold`` is not among them."""
    trained = sorted(path.parent.relative_to("folds") for path in Path("folds").glob(f"[!.]*/[!.]*/{CONFIG}"))
    models = sorted({path.parts[0] for path in trained})
    if not models:
        raise CarvanaError("There is no trained net yet: run 'dvc repro train'.")
    if model not in models:
        raise CarvanaError(f"There is no trained model '{model}': there is {', '.join(models)}.")
    there = sorted(int(path.name) for path in trained if path.parts[0] == model)
    if fold not in there:
        known = ", ".join(map(str, there))
        raise CarvanaError(
            f"There is no net of {model} for fold {fold}, only for {known}: name one of these with --fold, "
            "or train it with 'dvc repro train'."
        )
    return there


def _own_scores(model: str) -> dict[str, Any]:
    """Return the model's scores out of fold, nothing before the report has them."""
    try:
        scores: dict[str, Any] = json.loads(METRICS.read_text(encoding="utf-8"))["oof"].get(model, {})
    except (OSError, ValueError, KeyError):
        return {}
    return scores


def _spread(image_ids: Sequence[str], wanted: int) -> list[str]:
    """Return so many images, or all, from one end of the list to the other: of many cars and angles."""
    places = np.linspace(0, len(image_ids) - 1, min(wanted, len(image_ids))).round().astype(int)
    return [image_ids[place] for place in places]


def _line(done: ExportResult) -> str:
    result = done.result
    if not isinstance(result, ExportReport):
        return f"{done.path}  not kept"
    return (
        f"{done.path}  {format_bytes(result.bytes)}  difference {result.difference:.1g}  "
        f"Dice lost {result.dice_drop:+.4f}  {format_rate(result.images_per_second)} images/s"
    )
