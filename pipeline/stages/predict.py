"""Predict the images of one split with one trained net: predictions/<split>/<model>/<fold>/."""

import sys
from collections.abc import Callable, Sequence
from functools import partial

from pipeline.competition.layout import HEIGHT, WIDTH
from pipeline.cores import cores
from pipeline.data.folds import HELD_OUT, select
from pipeline.data.images import Pixels
from pipeline.ensembling.mapping import MapJob, make_maps
from pipeline.ensembling.timing import Laps, Timing
from pipeline.learning.devices import describe
from pipeline.learning.inference import Predictor, stream
from pipeline.params import Params
from pipeline.places import home
from pipeline.resume import hold, versions
from pipeline.stages.code import digest
from pipeline.stages.command import stage
from pipeline.stages.inputs import folds, maps_folder, net_folder, read_manifest, test_images, training_images
from pipeline.stages.nets import net_digest


def run(params: Params, model: str, fold: int, split: str) -> None:
    """Read images and the net; write its maps, a view each for cars with masks and summed over views for test."""
    image_ids, read = _images(params, fold, split)
    views, weights, machine = getattr(params.predict.views, split), params.predict.weights, params.machine
    net = net_folder(model, fold)
    predictor = Predictor(net, views=views, weights=weights, device=machine.device, precision=params.predict.precision)
    job = MapJob(image_ids, views, params.predict.shard_images, test=split == "test", net=net_digest(net, weights))
    facts = {
        "code": digest("predict"),
        "libraries": versions("torch", "timm", "segmentation-models-pytorch", "opencv-python-headless"),
        "net": job.net,
        "images": read_manifest()["test" if split == "test" else "train"]["digest"],
        "image_ids": image_ids,
        "views": views,
        "precision": str(predictor.dtype),
        "shard_images": job.shard_images,
    }
    predict = partial(
        stream,
        predictor,
        read=read,
        size=(HEIGHT, WIDTH),
        batch_size=machine.predict_batch,
        threads=cores(),
    )
    with hold(home(), f"predict/{split}/{model}/{fold}", facts) as state:
        if not state.finished:
            device = describe(predictor.device, predictor.dtype)
            print(f"Predicting on {device}.", file=sys.stderr)
            state.finish(make_maps(job, predict, state.work, partial(_took, predictor, device)))
        state.publish(maps_folder(split, model, fold))


def _took(predictor: Predictor, device: str) -> Laps:
    first, later = (Timing(lap.images, lap.seconds, lap.views, device) for lap in predictor.stopwatch.laps())
    return first, later


def _images(params: Params, fold: int, split: str) -> tuple[Sequence[str], Callable[[str], Pixels]]:
    if split == "test":
        photos = test_images(params)
        return photos.ids(), photos.image
    images = training_images(params)
    return select(images.ids(), folds(), [HELD_OUT if split == "holdout" else fold]), images.image


if __name__ == "__main__":
    stage(run, __doc__)
