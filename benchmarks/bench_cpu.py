"""What prediction and training compute on one thread of a CPU, against the usual way, in seconds of the processor.

The usual way shrinks images by OpenCV's area average, keeps batches as (B, C, H, W) in memory, and upsamples and
quantizes every pixel. Seconds of the processor barely depend on what else the machine does.
"""

import contextlib
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np
import torch

from benchmarks.bench_prediction import FixedLogits
from benchmarks.timing import Contender, Row, compare
from pipeline.competition.image_ids import HEIGHT, WIDTH
from pipeline.config import InputSettings, SmpUNetConfig, UNetConfig
from pipeline.data.competition_data import CompetitionData
from pipeline.inference.torch_predictor import TorchPredictor
from pipeline.models.networks import build_model
from pipeline.models.resize import (
    clamped_sigmoid,
    quantize_probabilities,
    soft_target,
    to_network_input,
    upsample_and_quantize,
    upsample_logits,
)
from pipeline.models.tensors import memory_format, resolve_precision
from pipeline.models.weights import save_config, save_weights
from pipeline.utils.arrays import Float32Array, UInt8Array

SMALL = UNetConfig(architecture="unet", widths=(16, 24, 32, 48, 64))
MOBILE = SmpUNetConfig(architecture="smp_unet", encoder="mobilenet_v2", encoder_weights=None)
CPU = torch.device("cpu")


def area_average(image: UInt8Array, input: InputSettings) -> UInt8Array:
    """Shrink an image in the usual way."""
    return np.asarray(cv2.resize(image, (input.width, input.height), interpolation=cv2.INTER_AREA), np.uint8)


def quantize_everywhere(logits_hw: Float32Array) -> UInt8Array:
    """Return a map at full size in the usual way, without a sigmoid for certain pixels."""
    logits_HW = upsample_logits(logits_hw, HEIGHT, WIDTH)
    probs_HW = (logits_HW > 0).view(np.uint8) * np.uint8(255)
    uncertain = np.flatnonzero(cv2.inRange(logits_HW, -3.9, 3.9).view(np.bool_))
    probs_HW.ravel()[uncertain] = quantize_probabilities(clamped_sigmoid(logits_HW.ravel()[uncertain]))
    return probs_HW


def typical_logits(mask_HW: UInt8Array, input: InputSettings) -> Float32Array:
    """Return logits, float32 (h, w), that a trained net could output: certain but for a few pixels of outline."""
    soft_hw = soft_target(mask_HW, input) / np.float32(255)
    soft_hw = cv2.GaussianBlur(soft_hw, (0, 0), input.height / 256)
    noise_hw = np.random.default_rng(0).normal(0, 0.1, soft_hw.shape)
    return np.asarray(np.log((soft_hw + 1e-4) / (1.0001 - soft_hw)) + noise_hw, np.float32)


@dataclass(frozen=True, eq=False)
class _Images:
    data: Path
    image_ids: list[str]
    input: InputSettings

    @cached_property
    def source(self) -> CompetitionData:
        return CompetitionData(self.data)

    @cached_property
    def images(self) -> list[tuple[UInt8Array, UInt8Array]]:
        return [(self.source.train.image(i), self.source.masks.mask(i)) for i in self.image_ids]

    @cached_property
    def logits(self) -> list[Float32Array]:
        return [typical_logits(mask_HW, self.input) for _, mask_HW in self.images]


class OurInputs(_Images):
    """Images and masks in memory, to inputs and soft targets."""

    def __call__(self) -> list[UInt8Array]:
        shrunk = [(to_network_input(image, self.input), soft_target(mask, self.input)) for image, mask in self.images]
        return [array for pair in shrunk for array in pair]


class UsualInputs(_Images):
    """The same in the usual way."""

    def __call__(self) -> list[UInt8Array]:
        return [area_average(a, self.input) for image, mask in self.images for a in (image, mask * np.uint8(255))]


class OurMaps(_Images):
    """Logits to maps at full size."""

    def __call__(self) -> list[UInt8Array]:
        return [upsample_and_quantize(logits_hw, HEIGHT, WIDTH) for logits_hw in self.logits]


class UsualMaps(_Images):
    """The same in the usual way."""

    def __call__(self) -> list[UInt8Array]:
        return [quantize_everywhere(logits_hw) for logits_hw in self.logits]


@dataclass(frozen=True, eq=False)
class _Prediction(_Images):
    net: Path

    @cached_property
    def predictor(self) -> TorchPredictor:
        predictor = TorchPredictor(self.net, views=("identity", "hflip"), device="cpu")
        logits_hw = torch.from_numpy(typical_logits(self.source.masks.mask(self.image_ids[0]), self.input))
        predictor.net = FixedLogits(predictor.net, logits_hw)  # type: ignore[assignment]
        return predictor


class OurPrediction(_Prediction):
    """JPEG to the maps of two views."""

    def __call__(self) -> list[UInt8Array]:
        images = (self.source.train.image(image_id) for image_id in self.image_ids)
        return [self.predictor.predict_u8([self.predictor.preprocess(image)], HEIGHT, WIDTH)[0] for image in images]


class UsualPrediction(_Prediction):
    """The same in the usual way, with the same net."""

    @torch.inference_mode()
    def __call__(self) -> list[UInt8Array]:
        self.predictor.net.to(memory_format=torch.contiguous_format)
        return [self._maps(self.source.train.image(image_id)) for image_id in self.image_ids]

    def _maps(self, image_HWC: UInt8Array) -> UInt8Array:
        pixels_hwC = area_average(image_HWC, self.input)
        pixels_1Chw = torch.from_numpy(pixels_hwC.transpose(2, 0, 1).astype(np.float32))[None]
        dtype = self.predictor.dtype
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = [self.predictor.net(pixels_1Chw), self.predictor.net(pixels_1Chw.flip(-1)).flip(-1)]
        return np.stack([quantize_everywhere(logits_11hw[0, 0].float().numpy()) for logits_11hw in logits])


@dataclass(frozen=True, eq=False)
class Steps:
    """Forward and backward passes of a batch of 4, in the memory format of ours or the usual one."""

    spec: UNetConfig | SmpUNetConfig
    input: InputSettings
    ours: bool
    count: int

    @cached_property
    def net_and_batch(self) -> tuple[torch.nn.Module, torch.Tensor]:
        layout = memory_format(CPU) if self.ours else torch.contiguous_format
        net = build_model(self.spec, self.input, pretrained=False).train().to(memory_format=layout)
        return net, torch.rand(4, 3, self.input.height, self.input.width).contiguous(memory_format=layout) * 255

    def __call__(self) -> None:
        net, pixels_BCHW = self.net_and_batch
        dtype = resolve_precision("auto", CPU)
        for _ in range(self.count):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                logits: torch.Tensor = net(pixels_BCHW)
            logits.float().square().mean().backward()  # type: ignore[no-untyped-call]
            net.zero_grad()


def run(folder: Path, tiny: bool = False) -> list[Row]:
    """Return parts and the whole of prediction, one item being an image, and training steps, one item being a step."""
    input = InputSettings(size=(64, 96) if tiny else (128, 192))
    count, rounds = (2, 1) if tiny else (16, 7)
    ids = CompetitionData(folder).train.ids()
    data = folder, ids[:: len(ids) // count][:count], input
    size = f"{input.height} x {input.width}"
    with _one_thread(), tempfile.TemporaryDirectory() as temporary:
        net = Path(temporary)
        save_config(net, SMALL, input, {})
        save_weights(net / "model.safetensors", build_model(SMALL, input, pretrained=False).state_dict())
        _assert_within(OurInputs(*data)(), UsualInputs(*data)(), 1)
        _assert_within(OurMaps(*data)(), UsualMaps(*data)(), 0)

        pairs: list[tuple[str, Contender, Contender, int, float | None]] = [
            (f"shrink image, mask to {size} / INTER_AREA", OurInputs(*data), UsualInputs(*data), count, None),
            (f"logits {size} to full map / every pixel", OurMaps(*data), UsualMaps(*data), count, None),
            (
                f"predict, small U-Net {size}, 2 views / usual way",
                OurPrediction(*data, net),
                UsualPrediction(*data, net),
                count,
                1.7,
            ),
        ]
        for name, spec in [("small U-Net", SMALL), ("MobileNetV2 U-Net", MOBILE)]:
            ours, usual = (Steps(spec, input, ours, count // 2) for ours in (True, False))
            pairs.append((f"training step, {name} {size} / NCHW", ours, usual, count // 2, None))
        return [compare(*pair[:4], rounds, pair[4], clock=time.process_time) for pair in pairs]


def _assert_within(ours: list[UInt8Array], usual: list[UInt8Array], levels: int) -> None:
    for our, their in zip(ours, usual, strict=True):
        if np.abs(our.astype(int) - their).max() > levels:
            raise AssertionError(f"Ours differs by more than {levels} from the usual way.")


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads[0])
        cv2.setNumThreads(threads[1])
