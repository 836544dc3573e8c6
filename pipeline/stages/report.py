"""Gather what the run reached: reports/metrics.json, curves.csv and predictions.jpg."""

from pathlib import Path

from pipeline.files import write_json, write_text
from pipeline.params import Params
from pipeline.reporting.pictures import write_sheet
from pipeline.reporting.summary import curves, metrics, prediction_tiles
from pipeline.stages.command import stage
from pipeline.stages.inputs import net_folder, read_json, test_images

REPORTS = Path("reports")


def run(params: Params) -> None:
    """Read what evaluate, ensemble and train wrote; write metrics, curves and a picture of test masks."""
    evaluation = read_json(REPORTS / "evaluation.json")
    submission = read_json(Path("submissions/submission.json"))
    nets = {f"{m}/{f}": net_folder(m, f) for m in params.models.active for f in params.folds.active}
    write_json(REPORTS / "metrics.json", metrics(evaluation, submission))
    write_text(REPORTS / "curves.csv", curves(nets).to_csv(index=False, lineterminator="\n"))
    tiles = prediction_tiles(Path("submissions/submission.csv.gz"), test_images(params).image, submission, 16)
    write_sheet(REPORTS / "predictions.jpg", tiles, "Test images with the outline that the submission gives them")


if __name__ == "__main__":
    stage(run, __doc__)
