"""Gather what the run reached: reports/index.html, metrics.json, curves.csv and predictions.jpg."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipeline.data.metadata import read_makes
from pipeline.ensembling.opinions import Opinion, Opinions
from pipeline.files import write_json, write_text
from pipeline.params import Params
from pipeline.reporting import figures
from pipeline.reporting.figures import Figure
from pipeline.reporting.headlines import as_submitted, rescored
from pipeline.reporting.page import Findings, page
from pipeline.reporting.pictures import write_sheet
from pipeline.reporting.summary import curves, metrics, prediction_tiles, warnings
from pipeline.reporting.tables import read_table, suspects, worst_images
from pipeline.stages.active import active_nets
from pipeline.stages.command import stage
from pipeline.stages.inputs import competition_files, net_folder, read_json, test_images, training_images

REPORTS = Path("reports")

SHOWN = 8
"""Photographs of either kind on the page."""

Row = Mapping[Any, Any]


def run(params: Params) -> None:
    """Read what other stages wrote; write the page, the metrics, the curves and a picture of test masks."""
    evaluation, ablation = read_json(REPORTS / "evaluation.json"), read_json(REPORTS / "ablation.json")
    submission = read_json(Path("submissions/submission.json"))
    nets = {f"{m}/{f}": net_folder(m, f) for m in params.models.active for f in params.folds.active}
    write_json(REPORTS / "metrics.json", metrics(evaluation, submission, ablation))
    learned = curves(nets)
    write_text(REPORTS / "curves.csv", learned.to_csv(index=False, lineterminator="\n"))
    tiles = prediction_tiles(Path("submissions/submission.csv.gz"), test_images(params).image, submission, 16)
    write_sheet(REPORTS / "predictions.jpg", tiles, "Test images with the outline that the submission gives them")
    scored = as_submitted(read_table(REPORTS / "images.csv"), submission)
    findings = Findings(
        ablation=ablation,
        settings=read_table(REPORTS / "ablation.csv"),
        postprocess=read_table(REPORTS / "postprocess.csv"),
        fold_worth=read_table(REPORTS / "fold_worth.csv"),
        doubts=rescored(read_table(REPORTS / "doubts.csv"), scored),
        images=scored,
        curves=learned,
        submission=submission,
        makes=read_makes(competition_files(params).directory),
        warnings=warnings(evaluation, submission),
    )
    images, makes = training_images(params), findings.makes
    opinions = Opinions(active_nets(params, images.image))

    def worst(row: Row, opinion: Opinion) -> Figure:
        mask_HW = opinion.mask_HW.view(np.uint8)
        photograph, true_HW = images.image(opinion.image_id), images.mask(opinion.image_id)
        return figures.worst(row, makes.get(row["car"]), photograph, true_HW, mask_HW, opinion.doubt_HW)

    def suspect(row: Row, opinion: Opinion) -> Figure:
        masks = [mask_HW.view(np.uint8) for mask_HW in opinion.nets.values()]
        photograph, true_HW = images.image(opinion.image_id), images.mask(opinion.image_id)
        return figures.suspect(row, makes.get(row["car"]), photograph, true_HW, masks)

    lowest = worst_images(findings.doubts, SHOWN, of_a_car=2)
    doubted = suspects(findings.doubts).head(SHOWN)
    firsts = [f"{model}/{params.folds.active[0]}" for model in params.models.active]
    panels = [figures.panel(net, _last_dice(learned, net), (nets[net] / "panel.jpg").read_bytes()) for net in firsts]
    html = page(findings, _draw(lowest, opinions, worst), _draw(doubted, opinions, suspect), panels)
    write_text(REPORTS / "index.html", html)


def _last_dice(curves: pd.DataFrame, net: str) -> float:
    """Return the Dice of a net's last epoch, which is always validated."""
    return float(curves.loc[curves["net"] == net, "dice"].iloc[-1])


def _draw(rows: pd.DataFrame, opinions: Opinions, figure: Callable[[Row, Opinion], Figure]) -> list[Figure]:
    """Return the figure of each row of doubts.csv; one image's masks at a time are in memory."""
    drawn: dict[str, Figure] = {}
    for split, part in rows.groupby("split"):
        by_image = {str(row["image_id"]): row for row in part.to_dict("records")}
        drawn |= {o.image_id: figure(by_image[o.image_id], o) for o in opinions.of(str(split), by_image)}
    return [drawn[image_id] for image_id in rows["image_id"]]


if __name__ == "__main__":
    stage(run, __doc__)
