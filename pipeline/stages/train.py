"""Train one model on all folds but one: folds/<model>/<fold>/."""

import sys
from pathlib import Path

from pipeline.config import Params
from pipeline.data.fold_assignment import images_in_folds, training_folds
from pipeline.errors import CarvanaError
from pipeline.models.networks import check_sizes
from pipeline.models.tensors import device_label, resolve_device, resolve_precision
from pipeline.models.tta import TTATransform
from pipeline.models.weights import initial_weights
from pipeline.training.callbacks import run_dir
from pipeline.training.module import TrainJob
from pipeline.training.trainer import train
from pipeline.utils.run_state import acquire_run_state, package_versions
from pipeline.workspace import (
    CONFIG,
    code_digest,
    init_checkpoint_path,
    net_dir,
    project_root,
    read_fold_by_car,
    read_json,
    read_manifest,
    runs_dir,
    training_images,
)


def run(params: Params, model: str, fold: int) -> None:
    """Read images, folds.csv and the model's settings; write weights, config, curves and metrics."""
    if not 0 <= fold < params.folds.count:
        raise CarvanaError(f"Fold {fold} does not exist: folds.count is {params.folds.count}.")
    resolved, images = params.resolve_model(model), training_images(params)
    fold_by_car, manifest = read_fold_by_car(), read_manifest()
    init = init_checkpoint_path(resolved.train.init_checkpoint, fold)
    if init and net_dir(model, fold).resolve() in init.resolve().parents:
        raise CarvanaError(
            f"train.init_checkpoint is {init}, which DVC deletes before training. Copy it to another folder."
        )
    if init and (init_fold := _fold_of(init)) not in (None, fold):
        print(
            f"warning: train.init_checkpoint is {init}, a net of fold {init_fold}, which may have trained on the cars "
            f"that score fold {fold}. Put {{fold}} in its path, or the out-of-fold scores are not valid.",
            file=sys.stderr,
        )
    start = initial_weights(resolved.spec, init)
    job = TrainJob(
        model=resolved,
        seed=resolved.train.seed * 1000 + fold,
        train_ids=images_in_folds(images.ids(), fold_by_car, training_folds(fold, params.folds.count)),
        validation_ids=images_in_folds(images.ids(), fold_by_car, [fold]),
        reader=images,
        hardware=params.hardware,
        init_checkpoint=init,
        facts={"model": model, "fold": fold, "initial_weights": start},
    )
    _check_sizes(params, job)
    device = resolve_device(params.hardware.device)
    dtype = resolve_precision(resolved.train.precision, device)
    cache_key = {
        "code": code_digest("train"),
        "libraries": package_versions("torch", "lightning", "timm", "segmentation-models-pytorch", "albumentations"),
        "precision": str(dtype),
        "starts_from": start and start["sha256"],
        "design": resolved.model_dump(mode="json"),
        "seed": job.seed,
        "images": {part: manifest[part]["digest"] for part in ("train", "masks")},
        "train_ids": job.train_ids,
        "validation_ids": job.validation_ids,
    }
    with acquire_run_state(project_root(), f"train/{model}/{fold}", cache_key) as state:
        if not state.finished:
            print(f"Training {model}/{fold} on {device_label(device, dtype)}.", file=sys.stderr)
            state.finish(train(job, state.work_dir, run_dir(runs_dir() / model / str(fold), state.folder.name)))
        state.publish(net_dir(model, fold))


def _check_sizes(params: Params, job: TrainJob) -> None:
    """Try the net at every size that training, validation, the views of all splits and export will use."""
    settings, input = job.model.train, job.model.input
    full = input.height, input.width
    images = min(settings.batch_size, max(1, len(job.train_ids) // settings.devices))
    views = {
        f"view {name} of predict.tta.{split}": TTATransform.parse(name).size(*full)
        for split in ("oof", "holdout", "test")
        for name in getattr(params.predict.tta, split)
    }
    check_sizes(job.model.spec, input, {"training": (images, *(settings.crop or full))}, {"validation": full, **views})


def _fold_of(weights: Path) -> int | None:
    """Return the fold of the net that the weights belong to; None if there is no config.json next to them."""
    config = weights.parent / CONFIG
    return read_json(config).get("fold") if config.is_file() else None
