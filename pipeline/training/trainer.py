"""Train one net on one fold with Lightning; an interrupted training resumes after the last finished epoch."""

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from pipeline.config import TrainSettings
from pipeline.errors import CarvanaError, original_error
from pipeline.models.networks import build_model
from pipeline.models.tensors import device_label, memory_format, resolve_device, resolve_precision
from pipeline.models.weights import save_config, save_weights
from pipeline.training.callbacks import (
    GradientNormMonitor,
    MetricsHistory,
    TensorBoardWriter,
    ThroughputMonitor,
    ValidationGridLogger,
    training_timing,
)
from pipeline.training.dataset import (
    CachedImages,
    LoaderOptions,
    LoadingResources,
    batch_bytes,
    check_shared_memory,
    fits_in_memory,
    prepared_batches,
    training_loader,
    validation_loader,
)
from pipeline.training.module import SegmentationModule, TrainJob
from pipeline.utils.files import atomic_write, publish_tree, write_json, write_text
from pipeline.workspace import WEIGHTS

_CHECKPOINT = "last.ckpt"

_GRID = "panel.jpg"


def train(job: TrainJob, work: Path, log: Path | None = None) -> Path:
    """Train a net and return its folder, below ``work``: weights, config, curves, metrics and a prediction grid.

    ``work`` keeps a checkpoint of the last finished epoch, from which the next call resumes. ``log`` is a folder for
    TensorBoard's events. Raises CarvanaError if the loss becomes NaN or infinite, or the device is missing.
    """
    settings = job.model.train
    device = resolve_device(job.hardware.device)
    if device.type == "cuda" and settings.devices > torch.cuda.device_count():
        raise CarvanaError(
            f"train.devices is {settings.devices}, but torch finds {torch.cuda.device_count()} GPUs. Lower it."
        )
    net = build_model(job.model.spec, job.model.input, job.seed, init_checkpoint=job.init_checkpoint)
    segmenter = SegmentationModule(net, job, device)
    resources = _resources(job)
    check_shared_memory(_shared_bytes(job, resources, device, segmenter))
    trainer = _trainer(settings, device, work, _callbacks(job, work, log))
    checkpoint = work / _CHECKPOINT
    with _reraise_worker_errors():
        trainer.fit(
            segmenter,
            SegmentationData(job, resources),
            ckpt_path=checkpoint if checkpoint.is_file() else None,
            weights_only=False,
        )
    parameters = sum(parameter.numel() for parameter in segmenter.net.parameters())
    label = device_label(device, resolve_precision(settings.precision, device))
    return _write_model_dir(job, work, label, parameters)


def _resources(job: TrainJob) -> LoadingResources:
    settings, hardware = job.model.train, job.hardware
    largest = batch_bytes(job.model.input, settings, hardware.predict_batch)
    return LoadingResources.resolve(hardware, largest, settings.devices)


def _shared_bytes(job: TrainJob, resources: LoadingResources, device: torch.device, net: LightningModule) -> int:
    """Return the bytes of shared memory that a training takes: prepared batches, and the net for several processes."""
    settings, input = job.model.train, job.model.input
    images = len(job.train_ids) + len(job.validation_ids)
    cached = fits_in_memory(images, input, resources.cache_gb / settings.devices)
    workers = LoaderOptions(resources.workers, device.type == "cuda").loader_kwargs(cached)["num_workers"]
    largest = batch_bytes(input, settings, job.hardware.predict_batch)
    weights = sum(value.nbytes for value in net.state_dict().values()) if settings.devices > 1 else 0
    return settings.devices * prepared_batches(workers) * largest + weights


def _callbacks(job: TrainJob, work: Path, log: Path | None) -> list[Callback]:
    """Return the callbacks, which run in this order at the end of an epoch: the checkpoint is the last."""
    settings = job.model.train
    history, throughput = MetricsHistory(settings), ThroughputMonitor()
    grid = ValidationGridLogger(job.validation_ids, job.reader, job.model.input, work / _GRID)
    logged = {**job.facts, "seed": job.seed, **job.model.model_dump(mode="json")}
    tensorboard = [TensorBoardWriter(log, logged, history, throughput, work / _GRID)] if log else []
    return [
        BestWeights(work),
        grid,
        *([WeightAverage(settings.ema_decay)] if settings.ema_decay else []),
        GradientNormMonitor(),
        history,
        throughput,
        *tensorboard,
        LastCheckpoint(work),
    ]


@contextlib.contextmanager
def _reraise_worker_errors() -> Iterator[None]:
    """Raise the error of a loader or training process as if it had been raised here, without its traceback."""
    try:
        yield
    except Exception as error:
        original = original_error(error)
        if original is error:
            raise
        raise original from error
    except SystemExit:  # how Lightning ends after Ctrl-C
        raise KeyboardInterrupt from None


class BestWeights(Callback):
    """Keeps the weights of the best validation.

    It comes before ``WeightAverage`` among the callbacks, so that the averages are still in place.
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
        """Restore the best score."""
        self.dice, self.epoch = state_dict["dice"], state_dict["epoch"]


class LastCheckpoint(Checkpoint):
    """Keeps the state after the last finished epoch: optimizer, schedule, scaler, averages, history."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / _CHECKPOINT

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the checkpoint of the epoch, and delete best weights that are no longer needed."""
        trainer.save_checkpoint(self.path)
        if trainer.is_global_zero:
            (best,) = (callback for callback in trainer.callbacks if isinstance(callback, BestWeights))  # type: ignore[attr-defined]
            for older in set(self.path.parent.glob(_best("*"))) - {self.path.parent / _best(best.epoch)}:
                older.unlink()


class WeightAverage(Callback):
    """Exponential moving average of the net's weights and buffers, which is validated and saved in their place.

    It lies on the training device. Lightning's own is made before the net moves to a GPU, so that it stays on the CPU,
    and every step would copy all weights there.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.updates, self._step = 0, 0
        self._saved: Mapping[str, Tensor] | None = None
        self._averages: dict[str, Tensor] = {}
        self._pairs: list[tuple[list[Tensor], ...]] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start from the checkpoint's averages, if there are any, now that the net is on its device."""
        current = pl_module.state_dict()
        self._averages = {name: value.clone() for name, value in current.items()}
        for name, value in (self._saved or {}).items():
            self._averages[name].copy_(value)
        self._saved = None
        # Steps change weights in place, so that these lists stay those of the net.
        states = (self._averages, current)
        self._pairs = [
            tuple([value for value in state.values() if value.is_floating_point() == floating] for state in states)
            for floating in (True, False)
        ]

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Update the average after each optimizer step."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        (averaged, current), (averaged_counts, current_counts) = self._pairs
        if self.updates:
            # Warm-up: with a fixed 0.999 the initial weights would still be 86 % of the average after 150 steps.
            decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
            torch._foreach_lerp_(averaged, current, 1 - decay)
        else:
            torch._foreach_copy_(averaged, current)
        torch._foreach_copy_(averaged_counts, current_counts)
        self.updates += 1

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the averages into the net."""
        self._swap()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the trained weights back."""
        self._swap()

    def state_dict(self) -> dict[str, Any]:
        """Return the numbers of updates and steps, for the checkpoint."""
        return {"updates": self.updates, "step": self._step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the numbers of updates and steps."""
        self.updates, self._step = state_dict["updates"], state_dict["step"]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the averages as the checkpoint's weights, and the trained weights next to them."""
        checkpoint["trained_state_dict"] = checkpoint["state_dict"]
        checkpoint["state_dict"] = dict(self._averages)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore both."""
        self._saved = checkpoint["state_dict"]
        pl_module.load_state_dict(checkpoint["trained_state_dict"])

    @torch.no_grad()
    def _swap(self) -> None:
        for averaged, current in self._pairs:
            kept = [value.clone() for value in averaged]
            torch._foreach_copy_(averaged, current)
            torch._foreach_copy_(current, kept)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints atomically; Lightning's own class writes through another file system."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write the checkpoint; it replaces the previous one at once."""
        with atomic_write(Path(path)) as temporary:
            torch.save(checkpoint, temporary)


class SegmentationData(LightningDataModule):
    """Data loaders, made in each process, each with its share of the images."""

    def __init__(self, job: TrainJob, resources: LoadingResources) -> None:
        super().__init__()
        self.job = job
        self.resources = resources

    def train_dataloader(self) -> Any:
        """Return the loader of training images."""
        examples, train = self._examples(self.job.train_ids), self.job.model.train
        return training_loader(examples, train, self._workers(), self.job.seed, *self._share())

    def val_dataloader(self) -> Any:
        """Return the loader of validation images."""
        # Whole images, where training may use small crops: in batches as large as in prediction.
        examples, batch_size = self._examples(self.job.validation_ids), self.job.hardware.predict_batch
        return validation_loader(examples, batch_size, self._workers(), *self._share())

    def on_after_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> dict[str, Tensor]:
        """Turn images from (B, h, w, C), as loaders pass them, to (B, C, h, w) in the net's memory format."""
        image_BhwC = batch["image"]
        wanted = memory_format(image_BhwC.device) if self.job.model.train.channels_last else torch.contiguous_format
        return {**batch, "image": image_BhwC.permute(0, 3, 1, 2).contiguous(memory_format=wanted)}

    def _workers(self) -> LoaderOptions:
        return LoaderOptions(self.resources.workers, resolve_device(self.job.hardware.device).type == "cuda")

    def _examples(self, image_ids: Sequence[str]) -> CachedImages:
        # The memory is shared by training and validation images, and by the processes.
        share = len(image_ids) / (len(self.job.train_ids) + len(self.job.validation_ids)) / self._share()[1]
        cache_gb = self.resources.cache_gb * share
        return CachedImages.load(image_ids, self.job.reader, self.job.model.input, cache_gb)

    def _share(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)


def _best(epoch: int | str) -> str:
    # Named by epoch: a kill between the two writes leaves a file that the checkpoint does not name.
    return f"best-{epoch}.safetensors"


def _trainer(settings: TrainSettings, device: torch.device, work: Path, callbacks: list[Callback]) -> Trainer:
    _silence_lightning()
    return Trainer(
        accelerator={"cuda": "gpu"}.get(device.type, device.type),
        devices=settings.devices,
        # Spawned, not launched again: another launch of the stage would wait for the lock that this one holds.
        # No broadcast of buffers: shares of the validation images differ in length, so processes would wait forever.
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


def _write_model_dir(job: TrainJob, work: Path, device: str, parameters: int) -> Path:
    """Write the folder of the trained net from the last checkpoint, which has the averaged weights."""
    checkpoint = torch.load(work / _CHECKPOINT, map_location="cpu", weights_only=False)
    states = checkpoint["callbacks"]
    rows, best = states["MetricsHistory"]["rows"], states["BestWeights"]
    folder = work / "net"
    folder.mkdir(exist_ok=True)
    net = {name.removeprefix("net."): value for name, value in checkpoint["state_dict"].items()}
    save_weights(folder / WEIGHTS["last"], net)
    publish_tree(work / _best(best["epoch"]), folder / WEIGHTS["best"])
    publish_tree(work / _GRID, folder / _GRID)
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
