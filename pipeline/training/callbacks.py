"""Callbacks that record each epoch: metrics, throughput, gradient norms, the prediction grid, TensorBoard."""

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from pipeline.config import InputSettings, TrainSettings
from pipeline.training.dataset import ImageReader
from pipeline.training.prediction_grid import PredictionGrid
from pipeline.utils.files import atomic_write


class ThroughputMonitor(Callback):
    """Measures the time of epochs, with and without validation."""

    def __init__(self) -> None:
        self.total = {
            "seconds": 0.0,
            "training_seconds": 0.0,
            "images": 0,
            "fastest_epoch": 0.0,
            "peak_memory_bytes": 0,
        }
        """Of all epochs; ``training_seconds`` is without validation, ``fastest_epoch`` in images per second."""
        self.images_per_second = 0.0
        """Of the last epoch, without validation."""
        self._epoch_start = self._validation_start = self._validation_seconds = 0.0
        self._images = 0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the epoch's time."""
        self._epoch_start, self._validation_seconds, self._images = time.perf_counter(), 0.0, 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the images of all devices."""
        self._images += len(batch["image"]) * trainer.world_size

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the time of validation."""
        self._validation_start = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the time of validation."""
        self._validation_seconds += time.perf_counter() - self._validation_start

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the epoch."""
        seconds = time.perf_counter() - self._epoch_start
        training = max(seconds - self._validation_seconds, 1e-9)
        self.images_per_second = self._images / training
        self.total["seconds"] += seconds
        self.total["training_seconds"] += training
        self.total["images"] += self._images
        self.total["fastest_epoch"] = max(self.total["fastest_epoch"], self.images_per_second)
        self.total["peak_memory_bytes"] = max(self.total["peak_memory_bytes"], _memory(pl_module.device))

    def state_dict(self) -> dict[str, Any]:
        """Return the time so far, for the checkpoint."""
        return dict(self.total)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the times."""
        self.total = dict(state_dict)


def training_timing(state: Mapping[str, Any], device: str) -> dict[str, Any]:
    """Return timing.json from the state of a ``ThroughputMonitor`` and the name of the device."""
    return {**state, "images_per_second": state["images"] / state["training_seconds"], "device": device}


def _memory(device: torch.device) -> int:
    """Return bytes: the most that torch held on a GPU, or what this process holds now."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


_LOGGED_BATCHES = 100
"""Maximum number of batches per epoch that are logged individually."""

_LOGGED_AT_ONCE = 10
"""Number of batches whose losses are read from the device together."""

_TAGS = {
    "loss": "loss/sum",
    "dice": "score/dice",
    "lr": "steps/lr",
    "gradient_norm": "steps/gradient_norm",
    "gradient_norm_max": "steps/gradient_norm_max",
    "images_per_second": "machine/images_per_second",
    "memory_gb": "machine/memory_gb",
}
"""Tags in TensorBoard, which groups them by their first part."""


def is_validation_epoch(trainer: Trainer) -> bool:
    """Return whether the current epoch ends with a validation."""
    every = trainer.check_val_every_n_epoch or 1
    return (trainer.current_epoch + 1) % every == 0


class MetricsHistory(Callback):
    """Keeps one row of metrics per epoch in the checkpoint, and shows progress.

    It also makes the last epoch a validated one, whatever ``validate_every`` is, since its weights are used.
    """

    def __init__(self, settings: TrainSettings) -> None:
        self.every = settings.validate_every
        self.rows: list[dict[str, float]] = []
        self.bar: Any = None
        self.validation_bar: Any = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show a progress bar over all epochs, starting where this run resumes."""
        last = trainer.current_epoch + 1 == trainer.max_epochs
        trainer.check_val_every_n_epoch = 1 if last else self.every
        if self.bar is None and trainer.is_global_zero:
            batches = int(trainer.num_training_batches)
            done = trainer.current_epoch * batches
            self.bar = tqdm(total=(trainer.max_epochs or 0) * batches, initial=done, desc="Training", unit="batch")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Move the bar."""
        if self.bar is not None:
            self.bar.update()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show a progress bar for validation, which takes minutes for native images."""
        if trainer.is_global_zero:
            batches = int(trainer.num_val_batches[0])
            self.validation_bar = tqdm(total=batches, desc="Scoring", unit="batch", leave=False)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Move the bar of the validation."""
        if self.validation_bar is not None:
            self.validation_bar.update()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar of the validation."""
        if self.validation_bar is not None:
            self.validation_bar.close()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the epoch's row."""
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if not is_validation_epoch(trainer):
            metrics.pop("dice", None)
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        self.rows.append({"epoch": trainer.current_epoch + 1, "lr": rate, **metrics})
        if self.bar is not None:
            shown = {name: f"{metrics[name]:.4f}" for name in ("loss", "dice") if name in metrics}
            self.bar.set_postfix(shown)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the rows so far, for the checkpoint."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the rows."""
        self.rows = list(state_dict["rows"])


class GradientNormMonitor(Callback):
    """Logs mean and maximum of the gradient norm before clipping, per epoch; comes before ``MetricsHistory``."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the epoch's mean and maximum."""
        assert isinstance(pl_module.gradient_norms, list)
        norms = torch.stack(pl_module.gradient_norms)
        pl_module.gradient_norms.clear()
        norms = norms[torch.isfinite(norms)]  # fp16 skips the step of a gradient that overflows
        norms = norms if len(norms) else norms.new_tensor([torch.nan])  # else Lightning would log the last epoch's
        pl_module.log_dict({"gradient_norm": norms.mean(), "gradient_norm_max": norms.max()}, rank_zero_only=True)


class ValidationGridLogger(Callback):
    """Draws the prediction grid of each validation, with the weights that are scored.

    It comes before ``WeightAverage`` among the callbacks, so that the averages are still in place.
    """

    def __init__(self, image_ids: Sequence[str], reader: ImageReader, input: InputSettings, path: Path) -> None:
        self.image_ids, self.reader, self.input = image_ids, reader, input
        self.path = path
        self._grid: PredictionGrid | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decode the images once, in the process that draws."""
        if trainer.is_global_zero:
            self._grid = PredictionGrid.load(self.image_ids, self.reader, self.input)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the grid, atomically, before the checkpoint of its epoch."""
        if self._grid is None:
            return
        with trainer.precision_plugin.forward_context():
            jpeg = self._grid.draw(pl_module.net, pl_module.device)  # type: ignore[arg-type]
        with atomic_write(self.path) as temporary:
            temporary.write_bytes(jpeg)


class TensorBoardWriter(Callback):
    """Writes what the callbacks before it recorded to TensorBoard.

    ``folder`` has metrics and grids by epoch, ``folder/batches`` the loss by batch. If the log can't be written,
    it stops with one warning, and training goes on.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        history: MetricsHistory,
        throughput: ThroughputMonitor,
        grid: Path,
    ) -> None:
        self.folder, self.settings = folder, settings
        self.history, self.throughput, self.grid = history, throughput, grid
        self._epochs: SummaryWriter | None = None
        self._batches: SummaryWriter | None = None
        self._failed = False
        self._waiting: list[tuple[int, Tensor, float]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the log, or continue it: entries after the checkpoint are purged."""
        if not trainer.is_global_zero:
            return
        with self._stop_on_error():
            done = trainer.current_epoch
            self._epochs = SummaryWriter(self.folder, purge_step=done + 1)
            # In a folder of its own, since a purge counts one kind of step.
            self._batches = SummaryWriter(
                self.folder / "batches", purge_step=done * int(trainer.num_training_batches) + 1
            )
            if not done:
                self._epochs.add_text("settings", f"```\n{json.dumps(self.settings, indent=2)}\n```", 0)
            self._epochs.flush()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the loss of some of the batches."""
        batches = int(trainer.num_training_batches)
        if self._batches is None or (batch_idx + 1) % -(-batches // _LOGGED_BATCHES):
            return
        step = trainer.current_epoch * batches + batch_idx + 1
        # Lightning passes the loss divided by the accumulated batches.
        loss = outputs["loss"].detach() * trainer.accumulate_grad_batches
        self._waiting.append((step, loss, trainer.optimizers[0].param_groups[0]["lr"]))
        if len(self._waiting) == _LOGGED_AT_ONCE:
            self._log_batches()

    def _log_batches(self) -> None:
        """Log the batches that wait: reading a loss waits for the GPU."""
        waiting, self._waiting = self._waiting, []
        if self._batches is None or not waiting:
            return
        losses = torch.stack([loss for _, loss, _ in waiting]).tolist()
        with self._stop_on_error():
            for (step, _, rate), loss in zip(waiting, losses, strict=True):
                self._batches.add_scalar("batch/loss", loss, step)
                self._batches.add_scalar("batch/lr", rate, step)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the epoch."""
        self._log_batches()
        if self._epochs is None or self._batches is None:
            return
        row = dict(self.history.rows[-1])
        epoch = int(row.pop("epoch"))
        row["images_per_second"] = self.throughput.images_per_second
        row["memory_gb"] = self.throughput.total["peak_memory_bytes"] / 1e9
        with self._stop_on_error():
            for name, value in row.items():
                self._epochs.add_scalar(_TAGS.get(name, name.replace("_", "/", 1)), value, epoch)
            if is_validation_epoch(trainer):
                # As a JPEG: add_image would make a PNG, five times as large.
                image = Summary.Image(encoded_image_string=self.grid.read_bytes(), colorspace=3)
                summary = Summary(value=[Summary.Value(tag="panel", image=image)])
                self._epochs.file_writer.add_summary(summary, epoch)  # type: ignore[attr-defined]
            self._epochs.flush()
            self._batches.flush()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the log."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End the log with what there is."""
        self._close()

    def _close(self) -> None:
        writers = [writer for writer in (self._epochs, self._batches) if writer is not None]
        self._epochs = self._batches = None
        with self._stop_on_error():
            for writer in writers:
                writer.close()

    @contextlib.contextmanager
    def _stop_on_error(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._epochs = self._batches = None
            if not self._failed:
                print(
                    f"warning: {self.folder} can't be written ({error}). Training continues without a log.",
                    file=sys.stderr,
                )
            self._failed = True


def run_dir(runs: Path, digest: str) -> Path:
    """Return the log folder of a training: the existing one with its ``digest``, or a new one named by the time."""
    earlier = sorted(runs.glob(f"*_{digest[:8]}"))
    return earlier[-1] if earlier else runs / f"{datetime.now():%Y-%m-%d_%H-%M}_{digest[:8]}"
