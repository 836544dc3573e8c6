"""Score ensemble settings on stored probability maps.

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
    """Read the maps of validation and held-out cars; write the scores of all settings and their summary."""
    images, fold_by_car = training_images(params), read_fold_by_car()
    runner = AblationRunner(
        space=ablation_space(params),
        holdout_cars=sum(fold == HOLDOUT_FOLD for fold in fold_by_car.values()),
        groups=lambda split: scoring_groups(params, images.ids(), fold_by_car, split),
        true_mask=images.mask,
        image=images.image,
    )
    tables = runner.run()
    nets = {
        f"{m}/{f}": net_digest(net_dir(m, f), params.predict.checkpoint)
        for m in params.models.active
        for f in params.folds.active
    }
    write_json(REPORTS_DIR / "ablation.json", tables.summary | {"nets": nets})
    _write(REPORTS_DIR / "ablation.csv", pd.concat(tables.settings, ignore_index=True))
    _write(REPORTS_DIR / "postprocess.csv", pd.concat(tables.postprocess, ignore_index=True))
    _write(REPORTS_DIR / "fold_subsets.csv", tables.fold_subsets)
    _write(REPORTS_DIR / "image_disagreement.csv", pd.concat(tables.disagreement, ignore_index=True))


def _write(path: Path, table: pd.DataFrame) -> None:
    write_text(path, table.to_csv(index=False, lineterminator="\n", float_format="%.9g"))
