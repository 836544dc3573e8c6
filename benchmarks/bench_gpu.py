"""Measure training and prediction of the ``carvana`` recipe's net at native size on this machine's GPU.

What our code reaches is given as a share of a bare loop: the same net on batches that lie on the device already.
"""

import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from benchmarks.bench_prediction import with_outline
from pipeline.competition.image_ids import HEIGHT, WIDTH
from pipeline.config import (
    AugmentSettings,
    Device,
    HardwareSettings,
    InputSettings,
    ResolvedModel,
    SmpUNetConfig,
    TrainSettings,
)
from pipeline.data.competition_data import CompetitionData
from pipeline.inference.prediction_store import PredictJob, write_predictions
from pipeline.inference.torch_predictor import TorchPredictor, predict_stream
from pipeline.models.networks import SegmentationModel, build_model, prepare_for_gpu
from pipeline.models.tensors import memory_format, resolve_device, resolve_precision
from pipeline.models.weights import save_config, save_weights
from pipeline.training.dataset import CachedImages, LoaderOptions, training_loader
from pipeline.training.module import TrainJob, compute_losses
from pipeline.training.trainer import train
from pipeline.utils.arrays import UInt8Array
from pipeline.utils.parallel import available_cpus

PARTS = ("copies", "forward", "steps", "loader", "training", "prediction")
"""What is measured, in this order. The shares of training and prediction need the steps and the forward passes."""


@dataclass(frozen=True)
class Reader:
    """Images and masks of the labeled cars."""

    source: CompetitionData

    def image(self, image_id: str) -> UInt8Array:
        return self.source.train.image(image_id)

    def mask(self, image_id: str) -> UInt8Array:
        return self.source.masks.mask(image_id)


class Figures:
    """Named figures, printed as they come, for a table and a JSON file."""

    def __init__(self, facts: dict[str, object]) -> None:
        self.facts = facts
        self.rows: list[dict[str, object]] = []
        self.values: dict[str, float] = {}

    def add(self, name: str, value: float, unit: str) -> None:
        self.rows.append({"name": name, "value": round(value, 4), "unit": unit})
        self.values[name] = value
        print(f"{name:<72}{value:>12.3f} {unit}", flush=True)

    def add_ratio(self, name: str, part: str, whole: str) -> None:
        """Add how much of the speed of ``part`` the time ``whole`` reaches, if both were measured."""
        if part in self.values and whole in self.values:
            self.add(name, self.values[part] / self.values[whole], "of 1")

    def write(self, path: Path) -> None:
        path.write_text(json.dumps({**self.facts, "figures": self.rows}, indent=1) + "\n")


class GpuBenchmark:
    """All measurements, on one device."""

    def __init__(self, folder: Path, tiny: bool) -> None:
        self.tiny = tiny
        self.device = resolve_device("cpu" if tiny else "auto")
        self.on_gpu = self.device.type == "cuda"
        self.dtype = resolve_precision("auto", self.device)
        self.reader = Reader(CompetitionData(folder))
        self.image_ids = self.reader.source.train.ids()
        self.spec = SmpUNetConfig(architecture="smp_unet", encoder="resnet18" if tiny else "resnet34")
        self.input = InputSettings(size=(64, 96)) if tiny else InputSettings(size="native")
        self.size = (64, 96) if tiny else (1280, 1920)
        self.batch_sizes = (1, 2) if tiny else (1, 4, 8, 16)
        self.figures = Figures(
            {
                "device": torch.cuda.get_device_name() if self.on_gpu else "cpu",
                "torch": torch.__version__,
                "cores": available_cpus(),
                "precision": str(self.dtype).removeprefix("torch."),
            }
        )

    def run(self, out: Path | None, only: Sequence[str]) -> None:
        for name in only or PARTS:
            with self._report_failure(name):
                getattr(self, name)()
            if out:
                self.figures.write(out)

    def copies(self) -> None:
        """Copy rates between the memory of the host and the device."""
        images = torch.empty(4 * 3 * self.size[0] * self.size[1], dtype=torch.uint8)
        kinds = {"pageable": images, **({"pinned": images.pin_memory()} if self.on_gpu else {})}
        for kind, host in kinds.items():
            there = host.to(self.device)
            up, down = partial(there.copy_, host, non_blocking=True), partial(host.copy_, there, non_blocking=True)
            for direction, copy_once in (("to the device", up), ("from the device", down)):
                self.figures.add(
                    f"copy {direction}, {kind} memory", images.nbytes / 1e9 / self._seconds(copy_once), "GB/s"
                )

    def forward(self) -> None:
        """The net alone, by batch size and option."""
        net = self._net().eval()
        for batch in self.batch_sizes:
            self._forward("forward, eager", net, batch, autocast=True)
        prepared = prepare_for_gpu(net, self.dtype)
        for batch in self.batch_sizes:
            self._forward("forward, prepared", prepared, batch, autocast=False)
        if not self.tiny:
            self._forward("forward, compiled", torch.compile(prepared, dynamic=False), 4, autocast=False)
            torch._dynamo.reset()

    def steps(self) -> None:
        """A bare loop: forward, losses, backward, AdamW, the average of the weights."""
        options = [("eager", False, batch) for batch in self.batch_sizes[1:]]
        options += [] if self.tiny else [("compiled", True, 4)]
        for name, compiled, batch in options:
            with self._report_failure(f"training step, {name}, batch {batch}"):
                self._reset_peak()
                seconds = self._seconds(self._step(batch, compiled))
                self.figures.add(f"training step, {name}, batch {batch}", seconds / batch * 1e3, "ms/image")
                self._add_peak(f"training step, {name}, batch {batch}: peak memory")
            torch._dynamo.reset()

    def loader(self) -> None:
        """The training images alone: decoded, augmented, collated and uploaded."""
        ids = self.image_ids[: 16 if self.tiny else 224]
        for workers in sorted({min(2, available_cpus()), available_cpus()}):
            loader = training_loader(
                CachedImages(ids, self.reader, self.input),
                self._settings(),
                LoaderOptions(workers, self.on_gpu),
                *(0, 0, 1),
            )

            def once(loader=loader) -> None:  # type: ignore[no-untyped-def]
                for batch in loader:
                    batch["image"].to(self.device, non_blocking=True)

            once()
            start = time.perf_counter()
            once()
            seconds = (time.perf_counter() - start) / len(ids)
            self.figures.add(f"loader alone, {workers} processes", seconds * 1e3, "ms/image")

    def training(self) -> None:
        """Our training against the bare loop."""
        batch = 2 if self.tiny else 4
        count = 16 if self.tiny else 256
        # Images several times, as each epoch begins with an empty queue of batches: 5 % of 1,024 images, 1 % of 5,088.
        ids, validation = self.image_ids[:count] * (1 if self.tiny else 4), self.image_ids[count : count + 32]
        for name, compiled in self._options():
            model = ResolvedModel(spec=self.spec, input=self.input, train=self._settings(batch))
            device: Device = "cpu" if self.tiny else "auto"
            hardware = HardwareSettings(device=device, workers=available_cpus(), compile=compiled)
            job = TrainJob(model, 0, ids, validation, self.reader, hardware)
            with self._report_failure(f"training, {name}"), tempfile.TemporaryDirectory() as work:
                self._reset_peak()
                start = time.perf_counter()
                timing = json.loads((train(job, Path(work)) / "timing.json").read_text())
                whole = time.perf_counter() - start
                step, name = f"training step, {name}, batch {batch}", f"training, {name}, batch {batch}"
                self.figures.add(name, 1e3 / timing["fastest_epoch"], "ms/image")
                self.figures.add_ratio(f"{name}: share of the bare loop", step, name)
                self.figures.add(f"{name}: start, {model.train.epochs} epochs, a validation", whole, "s")
                if self.on_gpu:
                    self.figures.add(f"{name}: peak memory", timing["peak_memory_bytes"] / 1e9, "GB")

    def prediction(self) -> None:
        """Our prediction with two views, from JPEG to shard, against the bare prepared forward pass."""
        views = ("identity", "hflip")
        ids, repeats = (self.image_ids[:16], 1) if self.tiny else (self.image_ids, 4)
        with tempfile.TemporaryDirectory() as temporary:
            net = Path(temporary)
            save_config(net, self.spec, self.input, {})
            save_weights(net / "model.safetensors", self._net().state_dict())
            batch = 2 if self.tiny else 4
            for option, compiled in self._options():
                predictor = TorchPredictor(net, views=views, device="cpu" if self.tiny else "auto", compile=compiled)
                mask_HW = self.reader.mask(ids[0])
                run_net = predictor._run_net or predictor.net
                predictor.net = with_outline(run_net, mask_HW, self.input, self.device)  # type: ignore[assignment]
                predictor._run_net = None
                job = PredictJob(ids, views, 256, True, "benchmark")
                predict = partial(
                    predict_stream,
                    predictor,
                    read=self.reader.image,
                    size=(HEIGHT, WIDTH),
                    batch_size=batch,
                    threads=available_cpus(),
                    merged=True,
                )
                list(predict(ids[:batch]))  # selects algorithms
                start = time.perf_counter()
                for repeat in range(repeats):
                    work = net / option / str(repeat)
                    work.mkdir(parents=True)
                    write_predictions(job, predict, work)
                seconds = (time.perf_counter() - start) / repeats
                name = f"prediction, {option}, 2 views, batch {batch}"
                self.figures.add(name, seconds / len(ids) / len(views) * 1e3, "ms/pass")
                bare = f"forward, {'compiled' if compiled else 'prepared'}, batch {batch}"
                self.figures.add_ratio(f"{name}: share of the bare forward pass", bare, name)
                self.figures.add(f"{name}: 100,064 images x 5 folds", seconds / len(ids) * 100_064 * 5 / 60, "min")

    def _options(self) -> list[tuple[str, bool]]:
        return [("eager", False)] + ([] if self.tiny else [("compiled", True)])

    def _forward(self, name: str, net: nn.Module, batch: int, autocast: bool) -> None:
        with self._report_failure(f"{name}, batch {batch}"):
            pixels = torch.randint(0, 256, (batch, *self.size, 3), device=self.device).float().permute(0, 3, 1, 2)
            context = torch.autocast(self.device.type, self.dtype, enabled=autocast)
            with torch.no_grad(), context:
                self._reset_peak()
                seconds = self._seconds(lambda: net(pixels))
            self.figures.add(f"{name}, batch {batch}", seconds / batch * 1e3, "ms/image")
            self._add_peak(f"{name}, batch {batch}: peak memory")

    def _net(self) -> SegmentationModel:
        net = build_model(self.spec, self.input, pretrained=False)
        return net.to(self.device).to(memory_format=memory_format(self.device))

    def _step(self, batch: int, compiled: bool) -> Callable[[], object]:
        settings = self._settings(batch)
        net = self._net().train()
        run = torch.compile(net, dynamic=False) if compiled else net
        fused = self.on_gpu and self.dtype != torch.float16
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=fused)
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        averages = [value.detach().clone() for value in net.parameters()]
        pixels = torch.randint(0, 256, (batch, *self.size, 3), dtype=torch.uint8, device=self.device).permute(
            0, 3, 1, 2
        )
        target = torch.rand(batch, 1, *self.size, device=self.device)

        def step() -> None:
            with torch.autocast(self.device.type, self.dtype):
                loss = compute_losses(
                    run(pixels), target, settings.losses, settings.border_weight, settings.border_radius
                )["loss"]
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            torch._foreach_lerp_(averages, list(net.parameters()), 0.001)

        return step

    def _settings(self, batch: int = 4) -> TrainSettings:
        return TrainSettings(
            epochs=1 if self.tiny else 2,
            batch_size=batch,
            losses={"bce": 1.0, "dice": 1.0},
            lr=5e-4,
            ema_decay=0.999,
            validate_every=5,
            augment=AugmentSettings(shift=0.05, scale=0.1, rotate=3.0, hue=0.05),
        )

    def _seconds(self, call: Callable[[], object]) -> float:
        """Return the median time of a call, after some that warm up."""
        for _ in range(1 if self.tiny else 4):
            call()
        times = []
        for _ in range(2 if self.tiny else 12):
            self._wait()
            start = time.perf_counter()
            call()
            self._wait()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def _reset_peak(self) -> None:
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def _add_peak(self, name: str) -> None:
        if self.on_gpu:
            self.figures.add(name, torch.cuda.max_memory_allocated() / 1e9, "GB")

    @contextlib.contextmanager
    def _report_failure(self, name: str) -> Iterator[None]:
        """Go on with the other measurements where one fails, as for lack of memory."""
        try:
            yield
        except Exception as error:
            if self.tiny:
                raise
            print(f"{name} failed: {type(error).__name__}: {str(error)[:300]}", flush=True)


def run_gpu(folder: Path, tiny: bool, out: Path | None, only: Sequence[str] = ()) -> None:
    """Print the figures of this machine's GPU, of all parts or those in ``only``, and write them to ``out``."""
    torch.backends.cudnn.benchmark = True
    GpuBenchmark(folder, tiny).run(out, only)
