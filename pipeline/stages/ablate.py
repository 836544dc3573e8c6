"""Compare settings on stored maps.

Writes ablation.csv, ablation.json, postprocess.csv, fold_subsets.csv and image_disagreement.csv in reports/.
"""

from pathlib import Path

import pandas as pd

from pipeline.ablation.runner import AblationRunner, scoring_groups
from pipeline.ablation.search_space import ablation_space
from pipeline.config import Params
from pipeline.data.fold_assignment import HOLDOUT_FOLD
from pipeline.utils.files import write_json, write_text
from pipeline.workspace import REPORTS_DIR, net_digest, net_dir, read_fold_by_car, training_images


def run(params: Params) -> None:
    """Read maps of validation and held-out cars and ``ablation``; write a row a setting, and what they show."""
    images, fold_by_car = training_images(params), read_fold_by_car()
    comparison = AblationRunner(
        choices=ablation_space(params),
        held_out=sum(fold == HOLDOUT_FOLD for fold in fold_by_car.values()),
        panels=lambda split: scoring_groups(params, images.ids(), fold_by_car, split),
        true_mask=images.mask,
        photo=images.image,
    )
    findings = comparison.run()
    nets = {
        f"{m}/{f}": net_digest(net_dir(m, f), params.predict.checkpoint)
        for m in params.models.active
        for f in params.folds.active
    }
    write_json(REPORTS_DIR / "ablation.json", findings.facts | {"nets": nets})
    _write(REPORTS_DIR / "ablation.csv", pd.concat(findings.settings, ignore_index=True))
    _write(REPORTS_DIR / "postprocess.csv", pd.concat(findings.postprocess, ignore_index=True))
    _write(REPORTS_DIR / "fold_subsets.csv", findings.fold_worth)
    _write(REPORTS_DIR / "image_disagreement.csv", pd.concat(findings.doubts, ignore_index=True))


def _write(path: Path, table: pd.DataFrame) -> None:
    write_text(path, table.to_csv(index=False, lineterminator="\n", float_format="%.9g"))
