"""One net trained on one fold, with Lightning; what a kill leaves behind is taken up at the last whole epoch."""

import contextlib
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.multiprocessing.spawn import ProcessRaisedException
from torch.optim import Optimizer, lr_scheduler

from pipeline.competition.layout import HEIGHT, WIDTH
from pipeline.errors import CarvanaError
from pipeline.files import atomic_write, publish_tree, write_json, write_text
from pipeline.learning.calibration import update_bn_stats
from pipeline.learning.clock import ThroughputMonitor, training_timing
from pipeline.learning.dataset import CachedImages, ImageReader, LoaderOptions, training_loader, validation_loader
from pipeline.learning.devices import device_label, resolve_device, resolve_precision
from pipeline.learning.logbook import (
    GradientNormMonitor,
    MetricsHistory,
    TensorBoardWriter,
    ValidationGridLogger,
    is_validation_epoch,
)
from pipeline.learning.losses import compute_losses
from pipeline.learning.models import WEIGHTS, SegmentationModel, build_model, non_finite_name, save_config, save_weights
from pipeline.learning.pixels import memory_format, upsample_logits_tensor
from pipeline.learning.settings import HardwareSettings, ResolvedModel, TrainSettings

_CHECKPOINT = "last.ckpt"

_PANEL = "panel.jpg"

_BN_IMAGES = 64
"""Training images, about, that running statistics are measured on."""

_NAN_HINT = "lower train.lr, set train.gradient_clip_norm to 1.0, or train.precision to 32"
"""What to do about numbers that are not finite."""


@dataclass(frozen=True)
class TrainJob:
    """One net to train: the design, the images to learn from and those to be scored on."""

    model: ResolvedModel
    seed: int
    train_ids: Sequence[str]
    validation_ids: Sequence[str]
    reader: ImageReader
    hardware: HardwareSettings
    init_checkpoint: Path | None = None
    """Weights to start from: see ``models.build``."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Written into the net's config.json, for people."""


def train(job: TrainJob, work: Path, log: Path | None = None) -> Path:
    """Train a net and return the folder, below ``work``, of weights, config, curves, metrics and a panel of pictures.

    ``work`` keeps a checkpoint of the last whole epoch, from which the next call goes on. ``log`` is a folder for
    TensorBoard's events. Raises CarvanaError if the loss turns NaN or infinite, or the device asked for is missing.
    """
    settings = job.model.train
    device = resolve_device(job.hardware.device)
    if device.type == "cuda" and settings.devices > torch.cuda.device_count():
        raise CarvanaError(
            f"train.devices is {settings.devices}, but torch sees {torch.cuda.device_count()} GPU(s): lower it."
        )
    segmenter = SegmentationModule(
        build_model(job.model.spec, job.model.input, job.seed, init_checkpoint=job.init_checkpoint), job, device
    )
    trainer = _trainer(settings, device, work, _callbacks(job, work, log))
    checkpoint = work / _CHECKPOINT
    with _reraise_worker_errors():
        trainer.fit(
            segmenter, SegmentationData(job), ckpt_path=checkpoint if checkpoint.is_file() else None, weights_only=False
        )
    parameters = sum(parameter.numel() for parameter in segmenter.net.parameters())
    return _write_model_dir(job, work, device_label(device, resolve_precision(settings.precision, device)), parameters)


def _callbacks(job: TrainJob, work: Path, log: Path | None) -> list[Callback]:
    """Return what looks on: each hears of an epoch's end after those before it, the checkpoint last."""
    settings, design = job.model.train, job.model
    curves, clock = MetricsHistory(settings), ThroughputMonitor()
    pictures = ValidationGridLogger(job.validation_ids, job.reader, design.input, work / _PANEL)
    told = {**job.facts, "seed": job.seed, **design.model_dump(mode="json")}
    books = [TensorBoardWriter(log, told, curves, clock, work / _PANEL)] if log else []
    averaging = _averaging(settings)
    return [BestWeights(work), *averaging, GradientNormMonitor(), curves, clock, pictures, *books, LastCheckpoint(work)]


@contextlib.contextmanager
def _reraise_worker_errors() -> Iterator[None]:
    """Raise what a loading or a training process raised as if it had been raised here, without its traceback."""
    try:
        yield
    except (CarvanaError, ProcessRaisedException) as error:
        of_users = re.split(r"^pipeline\.errors\.\w+: ", str(error), flags=re.MULTILINE)
        if len(of_users) > 1:
            raise CarvanaError(of_users[-1].strip()) from error
        last_line = str(error).strip().splitlines()[-1]
        if re.match(r"[\w.]*(OutOfMemory|Memory)Error\b", last_line):
            raise MemoryError(last_line.partition(": ")[2]) from error
        raise
    except SystemExit:  # Lightning's own answer to Ctrl-C
        raise KeyboardInterrupt from None


class SegmentationModule(LightningModule):
    """Loss, score, optimizer and schedule of a net."""

    def __init__(self, net: SegmentationModel, job: TrainJob, device: torch.device) -> None:
        super().__init__()
        self.net = net
        self.settings = job.model.train
        self.seed = job.seed
        self.image_ids = job.train_ids
        self.dice_sum, self.dice_count = 0.0, 0
        if self.settings.channels_last:
            self.net.to(memory_format=memory_format(device))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Draw dropout from (seed, step, process), so that a resumed run draws what an uninterrupted one would."""
        step = np.random.default_rng((self.seed, self.current_epoch, batch_idx, self.global_rank))
        torch.manual_seed(int(step.integers(1 << 31)))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch; raises CarvanaError if it is no finite number."""
        settings = self.settings
        logits_B1HW = self.net(batch["image"])
        parts = compute_losses(logits_B1HW, batch["target"] / 255, settings.losses, settings.border_weight)
        if not torch.isfinite(parts["loss"]):
            raise CarvanaError(self._non_finite_message(parts, batch))
        self.log_dict(
            {name: part.detach() for name, part in parts.items()}, on_step=False, on_epoch=True, sync_dist=True
        )
        return parts["loss"]

    def on_validation_epoch_start(self) -> None:
        """Begin a new mean, with running statistics of the weights that are scored, the same in every process."""
        self.dice_sum, self.dice_count = 0.0, 0
        if self.trainer.is_global_zero:
            self.refresh_bn_stats(_BN_IMAGES)
            self._check_finite_weights()
        if self.trainer.world_size > 1:
            for buffer in self.net.buffers():
                torch.distributed.broadcast(buffer, src=0)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Score as Kaggle does: each whole image by itself, at 1280 x 1918."""
        logits_B1HW = self.net(batch["image"])
        if not torch.isfinite(logits_B1HW).all():
            raise CarvanaError(f"The net gives no finite numbers after epoch {self.current_epoch + 1}: {_NAN_HINT}.")
        logits_BHW = upsample_logits_tensor(logits_B1HW, HEIGHT, WIDTH)
        for mask_HW, true_HW in zip(logits_BHW >= 0, batch["mask"].bool(), strict=True):
            total = int(mask_HW.sum()) + int(true_HW.sum())
            self.dice_sum += 2 * int((mask_HW & true_HW).sum()) / total if total else 1.0
            self.dice_count += 1

    def on_validation_epoch_end(self) -> None:
        """Log the score, for curves and ``plateau``."""
        self.log("dice", self.validation_dice(), rank_zero_only=True)

    def on_train_epoch_end(self) -> None:
        """Let ``plateau`` see the epoch's score, if there is one."""
        schedule = self.lr_schedulers()
        if isinstance(schedule, lr_scheduler.ReduceLROnPlateau) and is_validation_epoch(self.trainer):
            schedule.step(self.validation_dice())

    def validation_dice(self) -> float:
        """Return the mean Dice over the images of all processes."""
        sums = torch.tensor([self.dice_sum, self.dice_count], dtype=torch.float64)
        if self.device.type == "mps":
            sums = sums.float()
        gathered = self.all_gather(sums.to(self.device))
        assert isinstance(gathered, Tensor)
        total = gathered.reshape(-1, 2).sum(0)
        return float(total[0] / total[1])

    def configure_optimizers(self) -> Any:
        """Return the optimizer and its schedule."""
        optimizer = _optimizer(self.net, self.settings)
        steps = int(self.trainer.estimated_stepping_batches)
        if self.settings.schedule == "plateau":
            plateau = lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", factor=0.5, patience=2)
            # Lightning would step it after the checkpoint is written, which would then lack the epoch's step.
            never = self.settings.epochs + 1
            rule = {"scheduler": plateau, "interval": "epoch", "frequency": never, "monitor": "dice", "strict": False}
            return {"optimizer": optimizer, "lr_scheduler": rule}
        schedule = lr_scheduler.LambdaLR(optimizer, lr_lambda(self.settings, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def refresh_bn_stats(self, count: int) -> None:
        """Measure running statistics again, on about so many training images, for the weights that are in the net."""
        with self.trainer.precision_plugin.forward_context():
            update_bn_stats(self.net, self._bn_batches(count))

    def _check_finite_weights(self) -> None:
        name = non_finite_name(self.net.state_dict())
        if name is not None:
            raise CarvanaError(
                f"The net's '{name}' contains NaN or infinity after epoch {self.current_epoch + 1}: {_NAN_HINT}."
            )

    def _bn_batches(self, count: int) -> Iterator[Tensor]:
        """Yield batches of about so many training images, evenly spaced, as this epoch changes them."""
        images: Any = self.trainer.train_dataloader.dataset  # type: ignore[union-attr]
        chosen = range(0, len(images), max(1, len(images) // count))
        for start in range(0, len(chosen), self.settings.batch_size):
            part = chosen[start : start + self.settings.batch_size]
            batch = torch.stack([images[self.current_epoch, index]["image"] for index in part])
            yield batch.to(self.device)

    def _non_finite_message(self, parts: Mapping[str, Tensor], batch: dict[str, Tensor]) -> str:
        values = ", ".join(f"{name} {float(part.detach()):g}" for name, part in parts.items() if name != "loss")
        images = ", ".join(self.image_ids[int(index)] for index in batch["index"][:4])
        return (
            f"The loss is no finite number in epoch {self.current_epoch + 1} ({values}), on images {images} ...: "
            f"{_NAN_HINT}."
        )


def lr_lambda(settings: TrainSettings, steps: int) -> Callable[[int], float]:
    """Return the factor on ``lr`` by step: a warm-up from near 0, then the schedule down to the last step."""
    warmup = round(settings.warmup_fraction * steps)
    if settings.schedule == "onecycle":
        warmup = warmup or round(0.3 * steps)
    falls: dict[str, Callable[[float], float]] = {
        "constant": lambda part: 1.0,
        "cosine": lambda part: 0.5 * (1 + math.cos(math.pi * part)),
        "onecycle": lambda part: 0.5 * (1 + math.cos(math.pi * part)),
        "poly": lambda part: (1 - part) ** 0.9,
    }

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return falls[settings.schedule](min(1.0, (step - warmup) / max(1, steps - warmup)))

    return factor


class BestWeights(Callback):
    """Keeps the weights of the best validation.

    Stands before the averaging of weights among the callbacks, so that it sees the averaged ones in place.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.dice, self.epoch = -1.0, 0

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the weights if they are the best so far."""
        assert isinstance(pl_module, SegmentationModule)
        dice = pl_module.validation_dice()
        if dice > self.dice:
            self.dice, self.epoch = dice, trainer.current_epoch + 1
            if trainer.is_global_zero:
                save_weights(self.folder / _best(self.epoch), pl_module.net.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Return the best score so far, for the checkpoint."""
        return {"dice": self.dice, "epoch": self.epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the best score of the checkpoint."""
        self.dice, self.epoch = state_dict["dice"], state_dict["epoch"]


class LastCheckpoint(Checkpoint):
    """Keeps the state of the last whole epoch: optimizer, schedule, scaler, averages and rows included."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / _CHECKPOINT

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the checkpoint of the epoch, and delete best weights that are no longer needed."""
        trainer.save_checkpoint(self.path)
        if trainer.is_global_zero:
            (best,) = (callback for callback in trainer.callbacks if isinstance(callback, BestWeights))  # type: ignore[attr-defined]
            for older in set(self.path.parent.glob(_best("*"))) - {self.path.parent / _best(best.epoch)}:
                older.unlink()


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that replace the one before at one stroke: Lightning's own go through another file system."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write the checkpoint; it replaces the previous one at once."""
        with atomic_write(Path(path)) as temporary:
            torch.save(checkpoint, temporary)


class SegmentationData(LightningDataModule):
    """Loaders, made in each process, each with its share of the images."""

    def __init__(self, job: TrainJob) -> None:
        super().__init__()
        self.job = job

    def train_dataloader(self) -> Any:
        """Return the loader of training images."""
        examples, train = self._examples(self.job.train_ids), self.job.model.train
        return training_loader(examples, train, self._workers(), self.job.seed, *self._share())

    def val_dataloader(self) -> Any:
        """Return the loader of validation images."""
        # Whole images, where training may see small crops: in batches as prediction has them.
        examples, batch_size = self._examples(self.job.validation_ids), self.job.hardware.predict_batch
        return validation_loader(examples, batch_size, self._workers(), *self._share())

    def _workers(self) -> LoaderOptions:
        return LoaderOptions(self.job.hardware.workers, resolve_device(self.job.hardware.device).type == "cuda")

    def _examples(self, image_ids: Sequence[str]) -> CachedImages:
        # The memory is shared by training and validation images, and by the processes.
        share = len(image_ids) / (len(self.job.train_ids) + len(self.job.validation_ids)) / self._share()[1]
        cache_gb = self.job.hardware.cache_gb * share
        return CachedImages.load(image_ids, self.job.reader, self.job.model.input, cache_gb)

    def _share(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)


def _best(epoch: int | str) -> str:
    # Named by epoch: a kill between weights and checkpoint leaves one that the checkpoint knows nothing of.
    return f"best-{epoch}.safetensors"


def _trainer(settings: TrainSettings, device: torch.device, work: Path, callbacks: list[Callback]) -> Trainer:
    _silence_lightning()
    return Trainer(
        accelerator={"cuda": "gpu"}.get(device.type, device.type),
        devices=settings.devices,
        # Spawned, not launched again: another launch of the stage would wait for the lock that this one holds.
        # Buffers are not sent round: shares of the validation images differ in length, and would wait for each other.
        strategy=DDPStrategy(start_method="spawn", broadcast_buffers=False) if settings.devices > 1 else "auto",
        precision=_lightning_precision(resolve_precision(settings.precision, device)),  # type: ignore[arg-type]
        max_epochs=settings.epochs,
        accumulate_grad_batches=settings.accumulate_grad_batches,
        gradient_clip_val=settings.gradient_clip_norm,
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        default_root_dir=work,
        check_val_every_n_epoch=settings.validate_every,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        benchmark=device.type == "cuda",
    )


def _lightning_precision(dtype: torch.dtype) -> str:
    return {torch.float32: "32-true", torch.bfloat16: "bf16-mixed", torch.float16: "16-mixed"}[dtype]


def _averaging(settings: TrainSettings) -> list[Callback]:
    return [WeightAveraging(use_buffers=True, multi_avg_fn=EmaUpdate(settings.ema_decay))] if settings.ema_decay else []


@dataclass(frozen=True)
class EmaUpdate:
    """Exponential moving average of weights, with a warm-up of the decay."""

    decay: float

    def __call__(self, averaged: list[Tensor], current: list[Tensor], count: Tensor | int) -> None:
        """Update ``averaged`` in place."""
        # A warm-up: at a fixed 0.999 the first, random weights would still be 86 % of the average after 150 steps.
        decay = min(self.decay, (1 + int(count)) / (10 + int(count)))
        if averaged[0].is_floating_point():
            torch._foreach_lerp_(averaged, current, 1 - decay)
        else:
            torch._foreach_copy_(averaged, current)


def _optimizer(net: SegmentationModel, settings: TrainSettings) -> Optimizer:
    common: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    optimizers: dict[str, Callable[[], Optimizer]] = {
        "adam": lambda: torch.optim.Adam(net.parameters(), **common),
        "adamw": lambda: torch.optim.AdamW(net.parameters(), **common),
        "sgd": lambda: torch.optim.SGD(net.parameters(), momentum=0.9, nesterov=True, **common),
        "rmsprop": lambda: torch.optim.RMSprop(net.parameters(), momentum=0.9, **common),
    }
    return optimizers[settings.optimizer]()


def _write_model_dir(job: TrainJob, work: Path, device: str, parameters: int) -> Path:
    """Make the folder of the trained net from the last checkpoint, which holds the averaged weights."""
    checkpoint = torch.load(work / _CHECKPOINT, map_location="cpu", weights_only=False)
    states = checkpoint["callbacks"]
    rows, best = states["MetricsHistory"]["rows"], states["BestWeights"]
    folder = work / "net"
    folder.mkdir(exist_ok=True)
    net = {name.removeprefix("net."): value for name, value in checkpoint["state_dict"].items()}
    save_weights(folder / WEIGHTS["last"], net)
    publish_tree(work / _best(best["epoch"]), folder / WEIGHTS["best"])
    publish_tree(work / _PANEL, folder / _PANEL)
    save_config(folder, job.model.spec, job.model.input, job.facts)
    write_text(folder / "curves.csv", pd.DataFrame(rows).to_csv(index=False, lineterminator="\n"))
    write_json(folder / "timing.json", training_timing(states["ThroughputMonitor"], device))
    scores = {"dice": rows[-1]["dice"], "best_dice": best["dice"], "best_epoch": best["epoch"]}
    write_json(folder / "metrics.json", scores | {"parameters": parameters})
    return folder


def _silence_lightning() -> None:
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory.*exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*The number of training batches.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning against the newest torch
