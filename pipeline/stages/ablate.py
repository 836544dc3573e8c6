"""Compare settings on stored maps.

Writes ablation.csv, ablation.json, postprocess.csv, fold_subsets.csv and image_disagreement.csv in reports/.
"""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from pipeline.ablation.runner import AblationRunner, ScoringGroup
from pipeline.ablation.search_space import OWN_FOLD, ablation_space
from pipeline.config import NetId, Params, ScoredSplit
from pipeline.data.fold_assignment import HOLDOUT_FOLD, images_in_folds
from pipeline.inference.prediction_store import PredictionStore
from pipeline.stages.runner import run_stage
from pipeline.utils.files import write_json, write_text
from pipeline.workspace import net_digest, net_dir, predictions_dir, read_fold_by_car, training_images

REPORTS_DIR = Path("reports")


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
    nets = {f"{m}/{f}": _digest(params, (m, f)) for m in params.models.active for f in params.folds.active}
    write_json(REPORTS_DIR / "ablation.json", findings.facts | {"nets": nets})
    _write(REPORTS_DIR / "ablation.csv", pd.concat(findings.settings, ignore_index=True))
    _write(REPORTS_DIR / "postprocess.csv", pd.concat(findings.postprocess, ignore_index=True))
    _write(REPORTS_DIR / "fold_subsets.csv", findings.fold_worth)
    _write(REPORTS_DIR / "image_disagreement.csv", pd.concat(findings.doubts, ignore_index=True))


def scoring_groups(
    params: Params, image_ids: Sequence[str], fold_by_car: dict[str, int], split: ScoredSplit
) -> list[ScoringGroup]:
    """Return the maps of a split, that of each fold by itself out of fold; raises CarvanaError for stale ones."""
    models, active = params.models.active, params.folds.active
    if split == "holdout":
        nets = [(model, fold) for model in models for fold in active]
        return [_scoring_group(params, split, nets, nets, images_in_folds(image_ids, fold_by_car, [HOLDOUT_FOLD]))]
    return [
        _scoring_group(
            params,
            split,
            [(model, OWN_FOLD) for model in models],
            [(model, fold) for model in models],
            images_in_folds(image_ids, fold_by_car, [fold]),
        )
        for fold in active
    ]


def _scoring_group(
    params: Params, split: ScoredSplit, names: Sequence[NetId], nets: Sequence[NetId], image_ids: Sequence[str]
) -> ScoringGroup:
    panel = ScoringGroup(names, [PredictionStore(predictions_dir(split, *net)) for net in nets])
    panel.validate(image_ids, getattr(params.predict.tta, split), [_digest(params, net) for net in nets])
    return panel


def _digest(params: Params, net: NetId) -> str:
    return net_digest(net_dir(*net), params.predict.checkpoint)


def _write(path: Path, table: pd.DataFrame) -> None:
    write_text(path, table.to_csv(index=False, lineterminator="\n", float_format="%.9g"))


if __name__ == "__main__":
    run_stage(run, __doc__)
