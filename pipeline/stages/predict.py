"""Predict the images of one split with one trained net: predictions/<split>/<model>/<fold>/."""

import sys
from collections.abc import Callable, Sequence
from functools import partial

from pipeline.competition.image_ids import HEIGHT, WIDTH
from pipeline.config import Params
from pipeline.data.fold_assignment import HOLDOUT_FOLD, images_in_folds
from pipeline.inference.prediction_store import PredictJob, Timing, WarmupAndRest, write_predictions
from pipeline.inference.torch_predictor import TorchPredictor, predict_stream
from pipeline.models.tensors import device_label
from pipeline.utils.arrays import UInt8Array
from pipeline.utils.parallel import available_cpus
from pipeline.utils.run_state import acquire_run_state, package_versions
from pipeline.workspace import (
    code_digest,
    net_digest,
    net_dir,
    predictions_dir,
    project_root,
    read_fold_by_car,
    read_manifest,
    test_images,
    training_images,
)


def run(params: Params, model: str, fold: int, split: str) -> None:
    """Read images and the net; write probability maps: one per view for labeled cars, summed over views for test."""
    image_ids, read = _images(params, fold, split)
    views, weights, hardware = getattr(params.predict.tta, split), params.predict.checkpoint, params.hardware
    net = net_dir(model, fold)
    predictor = TorchPredictor(
        net,
        views=views,
        weights=weights,
        device=hardware.device,
        precision=params.predict.precision,
        compile=hardware.compile,
    )
    job = PredictJob(image_ids, views, params.predict.shard_images, test=split == "test", net=net_digest(net, weights))
    cache_key = {
        "code": code_digest("predict"),
        "libraries": package_versions("torch", "timm", "segmentation-models-pytorch", "opencv-python-headless"),
        "net": job.net,
        "images": read_manifest()["test" if split == "test" else "train"]["digest"],
        "image_ids": image_ids,
        "views": views,
        "precision": str(predictor.dtype),
        "shard_images": job.shard_images,
    }
    predict = partial(
        predict_stream,
        predictor,
        read=read,
        size=(HEIGHT, WIDTH),
        batch_size=hardware.predict_batch,
        threads=available_cpus(),
        merged=job.test,
    )
    with acquire_run_state(project_root(), f"predict/{split}/{model}/{fold}", cache_key) as state:
        if not state.finished:
            device = device_label(predictor.device, predictor.dtype)
            print(f"Predicting on {device}.", file=sys.stderr)
            state.finish(write_predictions(job, predict, state.work_dir, partial(_timings, predictor, device)))
        state.publish(predictions_dir(split, model, fold))


def _timings(predictor: TorchPredictor, device: str) -> WarmupAndRest:
    warmup, rest = (Timing(lap.images, lap.seconds, lap.views, device) for lap in predictor.timer.lap())
    return warmup, rest


def _images(params: Params, fold: int, split: str) -> tuple[Sequence[str], Callable[[str], UInt8Array]]:
    if split == "test":
        test = test_images(params)
        return test.ids(), test.image
    images = training_images(params)
    return images_in_folds(
        images.ids(), read_fold_by_car(), [HOLDOUT_FOLD if split == "holdout" else fold]
    ), images.image
