"""Compare settings on stored maps: reports/ablation.csv and .json, postprocess.csv, fold_worth.csv, doubts.csv."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from pipeline.data.folds import HELD_OUT, select
from pipeline.ensembling.ablation import Panel
from pipeline.ensembling.comparison import Comparison
from pipeline.ensembling.grid import OWN, Net, Split
from pipeline.ensembling.maps import MapStore
from pipeline.files import write_json, write_text
from pipeline.params import Params
from pipeline.stages.command import stage
from pipeline.stages.inputs import folds, maps_folder, net_folder, training_images
from pipeline.stages.nets import net_digest

REPORTS = Path("reports")


def run(params: Params) -> None:
    """Read maps of validation and held-out cars and ``ablation``; write a row a setting, and what they show."""
    images, fold_by_car = training_images(params), folds()
    comparison = Comparison(
        choices=params.choices(),
        held_out=sum(fold == HELD_OUT for fold in fold_by_car.values()),
        panels=lambda split: panels(params, images.ids(), fold_by_car, split),
        true_mask=images.mask,
        photo=images.image,
    )
    findings = comparison.run()
    nets = {f"{m}/{f}": _digest(params, (m, f)) for m in params.models.active for f in params.folds.active}
    write_json(REPORTS / "ablation.json", findings.facts | {"nets": nets})
    _write(REPORTS / "ablation.csv", pd.concat(findings.settings, ignore_index=True))
    _write(REPORTS / "postprocess.csv", pd.concat(findings.postprocess, ignore_index=True))
    _write(REPORTS / "fold_worth.csv", findings.fold_worth)
    _write(REPORTS / "doubts.csv", pd.concat(findings.doubts, ignore_index=True))


def panels(params: Params, image_ids: Sequence[str], fold_by_car: dict[str, int], split: Split) -> list[Panel]:
    """Return the maps of a split, that of each fold by itself out of fold; raises PipelineError for stale ones."""
    models, active = params.models.active, params.folds.active
    if split == "holdout":
        nets = [(model, fold) for model in models for fold in active]
        return [_panel(params, split, nets, nets, select(image_ids, fold_by_car, [HELD_OUT]))]
    return [
        _panel(
            params,
            split,
            [(model, OWN) for model in models],
            [(model, fold) for model in models],
            select(image_ids, fold_by_car, [fold]),
        )
        for fold in active
    ]


def _panel(params: Params, split: Split, names: Sequence[Net], nets: Sequence[Net], image_ids: Sequence[str]) -> Panel:
    panel = Panel(names, [MapStore(maps_folder(split, *net)) for net in nets])
    panel.demand(image_ids, getattr(params.predict.views, split), [_digest(params, net) for net in nets])
    return panel


def _digest(params: Params, net: Net) -> str:
    return net_digest(net_folder(*net), params.predict.weights)


def _write(path: Path, table: pd.DataFrame) -> None:
    write_text(path, table.to_csv(index=False, lineterminator="\n", float_format="%.9g"))


if __name__ == "__main__":
    stage(run, __doc__)
