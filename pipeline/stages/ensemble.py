"""Merge the probability maps of test images: submissions/submission.csv.gz and submission.json."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pipeline.config import Params
from pipeline.ensemble.evaluation import build_mask_builder, cv_dice
from pipeline.ensemble.postprocess import no_image
from pipeline.ensemble.submission_writer import mean_mask_rows, write_submission
from pipeline.inference.prediction_store import PredictionStore
from pipeline.submission import validation
from pipeline.utils.files import publish_tree, write_json
from pipeline.utils.run_state import acquire_run_state
from pipeline.workspace import (
    code_digest,
    predictions_dir,
    project_root,
    read_json,
    read_manifest,
    test_images,
    training_images,
    truth_path,
)

CSV = Path("submissions/submission.csv.gz")


def run(params: Params) -> None:
    """Read the maps and ``ensemble``; write and validate the CSV, and describe it in submission.json."""
    settings, nets = params.ensemble, params.ensemble_members()
    stores = [PredictionStore(predictions_dir("test", *net)) for net in nets]
    images, needs_images = training_images(params), "refine_edges" in settings.postprocess
    cache_key = {
        "code": code_digest("ensemble"),
        "maps": [store.digest for store in stores],
        "settings": settings.model_dump(mode="json"),
        "nets": nets,
        # For the mean masks that replace unreadable images.
        "masks": read_manifest()["masks"]["digest"],
        "mask_ids": images.ids(),
        "photographs": read_manifest()["test"]["digest"] if needs_images else None,
    }
    with acquire_run_state(project_root(), "ensemble", cache_key) as state:
        if not state.finished:
            image = test_images(params).image if needs_images else no_image
            mask_builder = build_mask_builder(settings, nets, len(stores[0].views), image)
            fallback = mean_mask_rows(images.ids(), images.mask)
            result = state.work_dir / "result"
            write_submission(stores, mask_builder, fallback, state.work_dir, result / CSV.name)
            state.finish(result)
        publish_tree(state.result_dir / CSV.name, CSV)
    progress = partial(tqdm, total=len(stores[0].image_ids), unit="row")
    report = validation.validate_submission(CSV, stores[0].image_ids, partial(progress, desc="Checking"))
    for warning in report.warnings:
        print(f"warning: {CSV}: {warning}", file=sys.stderr)
    truth = truth_path()
    description: dict[str, Any] = {
        "content_sha256": report.sha256,
        "rows": report.rows,
        "empty_masks": report.empty,
        "coverage": {"min": report.coverage_min, "mean": report.coverage_mean, "max": report.coverage_max},
        "nets": [f"{model}/{fold}" for model, fold in nets],
        "views": stores[0].views,
        "merge": settings.merge,
        "weights": settings.weights,
        "threshold": settings.threshold,
        "postprocess": settings.postprocess,
        "replaced_images": stores[0].unreadable,
        "own_dice": cv_dice(read_json(Path("reports/evaluation.json"))),
    }
    if truth:
        score = validation.score_submission(CSV, truth, partial(progress, desc="Scoring"))
        description["test"] = {"dice": score.mean, "iou": score.mean_iou, "accuracy": score.mean_accuracy}
    write_json(CSV.with_name("submission.json"), description)
