"""Predict from JPEG to shard, against the forward pass alone, of the same net on the same batches."""

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import cv2
import torch
from torch import Tensor, nn

from benchmarks.timing import Row, compare
from pipeline.competition.image_ids import HEIGHT, WIDTH
from pipeline.config import InputSettings, ModelConfig, SmpUNetConfig, UNetConfig
from pipeline.data.competition_data import CompetitionData
from pipeline.inference.prediction_store import ShardWriter
from pipeline.inference.torch_predictor import TorchPredictor, predict_stream
from pipeline.models.networks import build_model
from pipeline.models.resize import soft_target
from pipeline.models.tensors import to_batch
from pipeline.models.tta import TTATransform
from pipeline.models.weights import save_config, save_weights
from pipeline.utils.arrays import UInt8Array

TINY = UNetConfig(architecture="unet", widths=(4, 8))
SMALL = UNetConfig(architecture="unet", widths=(16, 24, 32, 48, 64))
NATIVE = SmpUNetConfig(architecture="smp_unet", encoder="resnet34")


class FixedLogits(nn.Module):
    """Runs an untrained net, then replaces its logits by those of a trained one.

    An untrained net is uncertain everywhere; a trained net only along the outline. Both contenders run it.
    """

    def __init__(self, net: Callable[[Tensor], Tensor], logits_HW: Tensor) -> None:
        super().__init__()
        self.net = net
        self.logits_HW = logits_HW

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        return self.net(pixels_BCHW).copy_(self.logits_HW)


def with_outline(
    net: Callable[[Tensor], Tensor], mask_HW: UInt8Array, input: InputSettings, device: torch.device
) -> FixedLogits:
    """Return ``net`` with the logits of a trained one that sees ``mask_HW``."""
    soft_hw = torch.from_numpy(soft_target(mask_HW, input)) / 255
    return FixedLogits(net, torch.logit(soft_hw, 1e-3).to(device))


@dataclass(frozen=True, eq=False)
class _Contender:
    data: Path
    net: Path
    image_ids: list[str]
    views: tuple[str, ...]
    batch_size: int

    @cached_property
    def source(self) -> CompetitionData:
        return CompetitionData(self.data)

    @cached_property
    def predictor(self) -> TorchPredictor:
        predictor = TorchPredictor(self.net, views=self.views)
        mask_HW = self.source.masks.mask(self.image_ids[0])
        predictor.net = with_outline(predictor.net, mask_HW, predictor.input, predictor.device)  # type: ignore[assignment]
        return predictor


class Ours(_Contender):
    """Decode, downsample, predict, upsample, quantize, sum the views, write."""

    def __call__(self) -> None:
        threads = os.cpu_count() or 1
        predictions = predict_stream(
            self.predictor, self.image_ids, self.source.train.image, (HEIGHT, WIDTH), self.batch_size, threads, True
        )
        with ShardWriter(self.net / "maps.parquet") as writer:
            for _, maps in predictions:
                assert not isinstance(maps, Exception)
                writer.add(*maps)
            writer.note_unreadable({})


class ForwardOnly(_Contender):
    """The net alone, on batches that are in memory."""

    @cached_property
    @torch.inference_mode()
    def batches(self) -> list[Tensor]:
        inputs = [self.predictor.preprocess(self.source.train.image(image_id)) for image_id in self.image_ids]
        groups = [inputs[i : i + self.batch_size] for i in range(0, len(inputs), self.batch_size)]
        batches = [to_batch(group, self.predictor.device).float() for group in groups]
        views = [TTATransform.parse(name) for name in self.predictor.views]
        return [view.augment(batch) for batch in batches for view in views]

    @torch.inference_mode()
    def __call__(self) -> None:
        predictor = self.predictor
        with torch.autocast(predictor.device.type, predictor.dtype, enabled=predictor.dtype != torch.float32):
            for batch in self.batches:
                predictor.net(batch)
        if predictor.device.type == "cuda":
            torch.cuda.synchronize()


def run(folder: Path, tiny: bool = False) -> list[Row]:
    """Return prediction with a small net and with one at native size, one item being an image.

    The ratio is the share of the forward pass's speed that prediction reaches.
    """
    cv2.setNumThreads(-1)
    two_views, one_view = ("identity", "hflip"), ("identity",)
    if tiny:
        size = InputSettings(size=(64, 96))
        return [_row(folder, "predict, tiny U-Net 64 x 96", TINY, size, 2, two_views, batch_size=2, rounds=1)]
    gpu = torch.cuda.is_available()
    return [
        _row(
            folder,
            "predict, small U-Net 160 x 240 / forward pass",
            SMALL,
            InputSettings(size=(160, 240)),
            16,
            two_views,
            batch_size=4,
            rounds=7,
        ),
        _row(
            folder,
            "predict, ResNet-34 U-Net native / forward pass",
            NATIVE,
            InputSettings(size="native"),
            64 if gpu else 2,
            one_view,
            batch_size=4 if gpu else 1,
            rounds=7 if gpu else 2,
            # A native pass takes too long to warm up on a CPU; on a GPU, the first pass selects algorithms.
            warm=gpu,
        ),
    ]


def _row(
    folder: Path,
    name: str,
    spec: ModelConfig,
    input: InputSettings,
    count: int,
    views: tuple[str, ...],
    batch_size: int,
    rounds: int,
    warm: bool = True,
) -> Row:
    ids = CompetitionData(folder).train.ids()
    ids = ids[:: max(1, len(ids) // count)][:count]
    with tempfile.TemporaryDirectory() as temporary:
        net = Path(temporary)
        save_config(net, spec, input, {})
        save_weights(net / "model.safetensors", build_model(spec, input, pretrained=False).state_dict())
        ours = Ours(folder, net, ids, views, batch_size)
        forward = ForwardOnly(folder, net, ids, views, batch_size)
        ours.predictor, forward.batches  # noqa: B018 - created before the timing
        return compare(name, ours, forward, len(ids), rounds, target=0.9, warm=warm)
