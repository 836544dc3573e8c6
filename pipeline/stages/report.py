"""Summarize the run: reports/index.html, metrics.json, curves.csv and predictions.jpg."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.config import Params
from pipeline.data.competition_data import read_car_makes
from pipeline.ensemble.evaluation import ImagePredictions, MemberPredictions, ensemble_context
from pipeline.report import overlays
from pipeline.report.html_page import ReportData, render_page
from pipeline.report.overlays import Figure, write_contact_sheet
from pipeline.report.summary import (
    build_metrics,
    collect_curves,
    collect_warnings,
    prediction_tiles,
    rows_as_submitted,
    with_final_dice,
)
from pipeline.report.tables import TableRow, read_table, suspected_label_errors, worst_images
from pipeline.utils.files import write_json, write_text
from pipeline.workspace import REPORTS_DIR, competition_files, net_dir, read_json, test_images, training_images

MAX_FIGURES = 8
"""Most worst images, and most possible label errors, on the page."""


def run(params: Params) -> None:
    """Read the results of earlier stages; write the page, the metrics, the curves and a sheet of test masks."""
    evaluation, ablation = read_json(REPORTS_DIR / "evaluation.json"), read_json(REPORTS_DIR / "ablation.json")
    submission = read_json(Path("submissions/submission.json"))
    nets = {f"{m}/{f}": net_dir(m, f) for m in params.models.active for f in params.folds.active}
    write_json(REPORTS_DIR / "metrics.json", build_metrics(evaluation, submission, ablation))
    curves = collect_curves(nets)
    write_text(REPORTS_DIR / "curves.csv", curves.to_csv(index=False, lineterminator="\n"))
    tiles = prediction_tiles(Path("submissions/submission.csv.gz"), test_images(params).image, submission, 16)
    write_contact_sheet(REPORTS_DIR / "predictions.jpg", tiles, "Test images with the outlines of the submitted masks")
    scored = rows_as_submitted(read_table(REPORTS_DIR / "images.csv"), submission)
    data = ReportData(
        ablation=ablation,
        settings=read_table(REPORTS_DIR / "ablation.csv"),
        postprocess=read_table(REPORTS_DIR / "postprocess.csv"),
        fold_subsets=read_table(REPORTS_DIR / "fold_subsets.csv"),
        disagreement=with_final_dice(read_table(REPORTS_DIR / "image_disagreement.csv"), scored),
        images=scored,
        curves=curves,
        submission=submission,
        makes=read_car_makes(competition_files(params).directory),
        warnings=collect_warnings(evaluation, submission),
    )
    images, makes = training_images(params), data.makes
    members = MemberPredictions(ensemble_context(params, images.image))

    def worst_figure(row: TableRow, predictions: ImagePredictions) -> Figure:
        mask_HW = predictions.mask_HW.view(np.uint8)
        image_HWC, true_HW = images.image(predictions.image_id), images.mask(predictions.image_id)
        return overlays.worst_image_figure(
            row, makes.get(row["car"]), image_HWC, true_HW, mask_HW, predictions.disagreement_HW
        )

    def label_error_figure(row: TableRow, predictions: ImagePredictions) -> Figure:
        masks = [mask_HW.view(np.uint8) for mask_HW in predictions.nets.values()]
        image_HWC, true_HW = images.image(predictions.image_id), images.mask(predictions.image_id)
        return overlays.label_error_figure(row, makes.get(row["car"]), image_HWC, true_HW, masks)

    worst = _make_figures(worst_images(data.disagreement, MAX_FIGURES, per_car=2), members, worst_figure)
    suspected = _make_figures(suspected_label_errors(data.disagreement).head(MAX_FIGURES), members, label_error_figure)
    first_nets = [f"{model}/{params.folds.active[0]}" for model in params.models.active]
    prediction_grids = [
        overlays.prediction_grid_figure(net, _last_dice(curves, net), (nets[net] / "panel.jpg").read_bytes())
        for net in first_nets
    ]
    write_text(REPORTS_DIR / "index.html", render_page(data, worst, suspected, prediction_grids))


def _last_dice(curves: pd.DataFrame, net: str) -> float:
    """Return the Dice of a net's last epoch, which is always validated."""
    return float(curves.loc[curves["net"] == net, "dice"].iloc[-1])


def _make_figures(
    rows: pd.DataFrame, members: MemberPredictions, figure: Callable[[TableRow, ImagePredictions], Figure]
) -> list[Figure]:
    """Return the figure of each row of image_disagreement.csv, with the masks of one image in memory at a time."""
    figures: dict[str, Figure] = {}
    for split, part in rows.groupby("split"):
        by_image = {str(row["image_id"]): row for row in part.to_dict("records")}
        figures |= {p.image_id: figure(by_image[p.image_id], p) for p in members.iter_images(str(split), by_image)}
    return [figures[image_id] for image_id in rows["image_id"]]
