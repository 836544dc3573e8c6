"""Train one model on all folds but one: folds/<model>/<fold>/."""

import sys
from pathlib import Path

from pipeline.data.folds import select, training_folds
from pipeline.errors import PipelineError
from pipeline.learning.devices import describe, resolve_device, resolve_precision
from pipeline.learning.logbook import run_folder
from pipeline.learning.models import CONFIG, init_file, weights_digest
from pipeline.learning.training import Job, train
from pipeline.params import Params
from pipeline.places import home, runs
from pipeline.resume import hold, versions
from pipeline.stages.code import digest
from pipeline.stages.command import stage
from pipeline.stages.inputs import folds, net_folder, read_json, read_manifest, training_images


def run(params: Params, model: str, fold: int) -> None:
    """Read images, folds.csv and the model's design; write weights, config, curves and metrics."""
    if not 0 <= fold < params.folds.count:
        raise PipelineError(f"There is no fold {fold}: folds.count is {params.folds.count}.")
    design, images, fold_by_car, ids = params.design(model), training_images(params), folds(), read_manifest()
    init = init_file(design.train.init, fold)
    if init and net_folder(model, fold).resolve() in init.resolve().parents:
        raise PipelineError(f"train.init leads to {init}, which DVC removes before it trains anew: copy it elsewhere.")
    if init and (learned := _fold_of(init)) not in (None, fold):
        print(
            f"warning: train.init leads to {init}, a net of fold {learned}, which may have learned the cars that fold "
            f"{fold} is scored on: write {{fold}} in its path, or trust no score out of fold.",
            file=sys.stderr,
        )
    job = Job(
        design=design,
        seed=design.train.seed * 1000 + fold,
        train_ids=select(images.ids(), fold_by_car, training_folds(fold, params.folds.count)),
        validation_ids=select(images.ids(), fold_by_car, [fold]),
        reader=images,
        machine=params.machine,
        init=init,
        facts={"model": model, "fold": fold},
    )
    device = resolve_device(params.machine.device)
    dtype = resolve_precision(design.train.precision, device)
    facts = {
        "code": digest("train"),
        "libraries": versions("torch", "lightning", "timm", "segmentation-models-pytorch", "albumentations"),
        "precision": str(dtype),
        "starts_from": weights_digest(design.spec, job.init),
        "design": design.model_dump(mode="json"),
        "seed": job.seed,
        "images": {part: ids[part]["digest"] for part in ("train", "masks")},
        "train_ids": job.train_ids,
        "validation_ids": job.validation_ids,
    }
    with hold(home(), f"train/{model}/{fold}", facts) as state:
        if not state.finished:
            print(f"Training {model}/{fold} on {describe(device, dtype)}.", file=sys.stderr)
            state.finish(train(job, state.work, run_folder(runs() / model / str(fold), state.folder.name)))
        state.publish(net_folder(model, fold))


def _fold_of(weights: Path) -> int | None:
    """Return the fold of the net in whose folder the weights lie, None if they lie alone."""
    config = weights.parent / CONFIG
    return read_json(config).get("fold") if config.is_file() else None


if __name__ == "__main__":
    stage(run, __doc__)
