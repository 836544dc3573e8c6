"""Score nets on unseen cars: reports/evaluation.json, images.csv, cars.csv and worst.jpg."""

from pipeline.config import Params
from pipeline.ensemble.evaluation import Evaluation, ensemble_context
from pipeline.report.overlays import SheetTile, write_contact_sheet
from pipeline.utils.files import write_json, write_text
from pipeline.workspace import REPORTS_DIR, read_manifest, training_images


def run(params: Params) -> None:
    """Read the maps of validation and held-out cars; write scores per model, image and car, and the worst images."""
    images = training_images(params)
    evaluation = Evaluation(ensemble_context(params, images.image), images.mask)
    scores = evaluation.score(holdout=params.folds.holdout_cars > 0)
    write_json(REPORTS_DIR / "evaluation.json", scores.summary() | {"skipped_images": read_manifest()["unreadable"]})
    write_text(REPORTS_DIR / "images.csv", scores.images.to_csv(index=False, lineterminator="\n", float_format="%.6f"))
    write_text(REPORTS_DIR / "cars.csv", scores.by_car().to_csv(index=False, lineterminator="\n", float_format="%.6f"))
    tiles = [
        SheetTile(
            images.image(row.image_id), mask_HW, images.mask(row.image_id), f"{row.image_id}  Dice {row.dice:.4f}"
        )
        for row, mask_HW in evaluation.worst_images(scores, 16)
    ]
    write_contact_sheet(
        REPORTS_DIR / "worst.jpg",
        tiles,
        "Worst validation images: true outline green, false negatives orange, false positives red",
    )
