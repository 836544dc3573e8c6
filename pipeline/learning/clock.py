"""What training took: seconds, images a second, memory. Kept through kills, in the checkpoint."""

import time
from collections.abc import Mapping
from typing import Any

import psutil
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback


class ThroughputMonitor(Callback):
    """Takes the time of epochs, and apart from it that of scoring them."""

    def __init__(self) -> None:
        self.total = {"seconds": 0.0, "training_seconds": 0.0, "images": 0, "peak_memory_bytes": 0}
        """Of all epochs; ``training_seconds`` without scoring."""
        self.images_per_second = 0.0
        """Of the last epoch, without scoring."""
        self._began = self._scoring_began = self._scored = 0.0
        self._images = 0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the epoch's time."""
        self._began, self._scored, self._images = time.perf_counter(), 0.0, 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count what all devices saw."""
        self._images += len(batch["image"]) * trainer.world_size

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin what is no training."""
        self._scoring_began = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End what is no training."""
        self._scored += time.perf_counter() - self._scoring_began

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the epoch."""
        took = time.perf_counter() - self._began
        training = max(took - self._scored, 1e-9)
        self.images_per_second = self._images / training
        self.total["seconds"] += took
        self.total["training_seconds"] += training
        self.total["images"] += self._images
        self.total["peak_memory_bytes"] = max(self.total["peak_memory_bytes"], _memory(pl_module.device))

    def state_dict(self) -> dict[str, Any]:
        """Return the time so far, for the checkpoint."""
        return dict(self.total)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the time of the checkpoint."""
        self.total = dict(state_dict)


def training_timing(state: Mapping[str, Any], device: str) -> dict[str, Any]:
    """Return what a clock's ``state`` tells of a training on ``device``, for ``timing.json``."""
    return {**state, "images_per_second": state["images"] / state["training_seconds"], "device": device}


def _memory(device: torch.device) -> int:
    """Return bytes: of a GPU what torch held at most, else what this process holds now."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
