"""The LightningModule: loss, optimizer, learning rate, batch-norm statistics."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn, no_grad
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer, lr_scheduler

from pipeline.competition.image_ids import HEIGHT, WIDTH
from pipeline.config import HardwareSettings, LossName, ResolvedModel, TrainSettings
from pipeline.errors import CarvanaError
from pipeline.models.networks import SegmentationModel
from pipeline.models.tensors import compile_or_eager, memory_format, resolve_precision, upsample_logits_tensor
from pipeline.models.weights import non_finite_name
from pipeline.training.callbacks import is_validation_epoch
from pipeline.training.dataset import ImageReader

_BN_IMAGES = 64
"""Maximum number of training images that batch-norm statistics are measured on."""


_NAN_HINT = "lower train.lr, set train.gradient_clip_norm to 1.0, or train.precision to 32"
"""What to do about NaN and infinity."""


def compute_losses(
    logits_B1HW: Tensor,
    target_B1HW: Tensor,
    weights: Mapping[LossName, float],
    border_weight: float,
    border_radius: int,
) -> dict[str, Tensor]:
    """Return every loss as ``loss_<name>``, and their weighted sum as ``loss``; scalars in float32.

    ``target_B1HW`` is the share of foreground in each pixel, 0 to 1.
    """
    # Sums over all pixels overflow in half precision, and masks come out blank: no autocast here.
    with torch.autocast(logits_B1HW.device.type, enabled=False):
        logits, target = logits_B1HW.float(), target_B1HW.float()
        losses = _losses(border_weight, border_radius)
        parts = {name: losses[name](logits, target) for name in weights}
    total = torch.stack([weights[name] * parts[name] for name in weights]).sum()
    return {f"loss_{name}": part for name, part in parts.items()} | {"loss": total}


def dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Return one minus the soft Dice of each image, averaged; smoothed by 1, for empty targets."""
    probability, dims = logits.sigmoid(), (1, 2, 3)
    overlap = (probability * target).sum(dims)
    total = probability.sum(dims) + target.sum(dims)
    return (1 - (2 * overlap + 1) / (total + 1)).mean()


def border_bce(logits: Tensor, target: Tensor, border_weight: float, border_radius: int) -> Tensor:
    """Return the cross-entropy, as a mean in which pixels near an outline count ``1 + border_weight`` times."""
    highest, lowest = _highest_within(target, border_radius), -_highest_within(-target, border_radius)
    weight = 1 + border_weight * (highest - lowest)
    return functional.binary_cross_entropy_with_logits(logits, target, weight, reduction="sum") / weight.sum()


def _highest_within(values: Tensor, radius: int) -> Tensor:
    """Return the maximum over a square around each pixel; by rows and then by columns, which is the same and faster."""
    size = 2 * radius + 1
    rows = functional.max_pool2d(values, (1, size), stride=1, padding=(0, radius))
    return functional.max_pool2d(rows, (size, 1), stride=1, padding=(radius, 0))


def lovasz(logits: Tensor, target: Tensor) -> Tensor:
    """Return the Lovász hinge of the IoU, per image, with the target rounded to 0 or 1."""
    from segmentation_models_pytorch.losses import LovaszLoss

    return LovaszLoss("binary", per_image=True)(logits, (target >= 0.5).float())  # type: ignore[no-any-return]


def _losses(border_weight: float, border_radius: int) -> dict[LossName, Callable[[Tensor, Tensor], Tensor]]:
    return {
        "bce": functional.binary_cross_entropy_with_logits,
        "dice": dice_loss,
        "border_bce": lambda logits, target: border_bce(logits, target, border_weight, border_radius),
        "lovasz": lovasz,
    }


@no_grad()
def update_bn_stats(net: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set the batch-norm statistics of ``net`` to the mean over ``batches`` of pixels (B, C, H, W).

    Those that training leaves belong to older weights, and averaged weights never had any ("precise BN": Wu and
    Johnson, Rethinking "Batch" in BatchNorm, 2021). All other layers run as in prediction.
    """
    layers = [module for module in net.modules() if isinstance(module, _BatchNorm)]
    if not layers:
        return
    momenta, was_training = [layer.momentum for layer in layers], net.training
    net.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the plain mean over batches
        layer.train()
    for pixels_BCHW in batches:
        net(pixels_BCHW)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    net.train(was_training)


@dataclass(frozen=True)
class TrainJob:
    """One net to train: its model, training images and validation images."""

    model: ResolvedModel
    seed: int
    train_ids: Sequence[str]
    validation_ids: Sequence[str]
    reader: ImageReader
    hardware: HardwareSettings
    init_checkpoint: Path | None = None
    """Weights to start from: see ``build_model``."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Written into the net's config.json."""


class SegmentationModule(LightningModule):
    """Loss, score, optimizer and schedule of a net."""

    def __init__(self, net: SegmentationModel, job: TrainJob, device: torch.device) -> None:
        super().__init__()
        self.net = net
        self.settings = job.model.train
        self.seed = job.seed
        self.image_ids = job.train_ids
        self.precision = resolve_precision(self.settings.precision, device)
        if self.settings.channels_last:
            self.net.to(memory_format=memory_format(device))
        self.gradient_norms: list[Tensor] = []
        """Of the epoch's steps so far, before clipping; scalars on the device."""
        self._compile = job.hardware.compile
        self._compiled: Callable[[Tensor], Tensor] | None = None
        self._unchecked: list[tuple[Tensor, Tensor]] = []
        self._recent: deque[Tensor] = deque(maxlen=math.ceil(_BN_IMAGES / self.settings.batch_size))
        self._scores: list[Tensor] = []
        self._finite: list[Tensor] = []

    def on_fit_start(self) -> None:
        """Compile the net, where that is wanted; in the process that trains, as it can't be sent to another."""
        if self._compile:
            self._compiled = compile_or_eager(self.net)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed dropout from (seed, epoch, batch, process), so that a resumed run equals an uninterrupted one."""
        step = np.random.default_rng((self.seed, self.current_epoch, batch_idx, self.global_rank))
        torch.manual_seed(int(step.integers(1 << 31)))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch; raises CarvanaError soon after one that is NaN or infinite."""
        settings = self.settings
        if is_validation_epoch(self.trainer):
            self._recent.append(batch["image"])
        logits_B1HW = (self._compiled or self.net)(batch["image"])
        parts = compute_losses(
            logits_B1HW, batch["target"] / 255, settings.losses, settings.border_weight, settings.border_radius
        )
        details = {name: part.detach() for name, part in parts.items()}
        self._unchecked.append((torch.stack(list(details.values())), batch["index"]))
        if len(self._unchecked) == _losses_at_once(self.device) or batch_idx + 1 == self.trainer.num_training_batches:
            self._check_losses(list(details))
        self.log_dict(details, on_step=False, on_epoch=True, sync_dist=True)
        return parts["loss"]

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Measure the norm of the gradients once, for the log and for clipping.

        Lightning's own clipping refuses fused optimizers, which matters in fp16 only.
        """
        parameters = [parameter for parameter in self.net.parameters() if parameter.grad is not None]
        norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        self.gradient_norms.append(norm)
        if gradient_clip_val is not None:
            clip_grads_with_norm_(parameters, gradient_clip_val, norm)

    def on_validation_epoch_start(self) -> None:
        """Start a new mean, with batch-norm statistics of the weights that are scored, equal in all processes."""
        self._scores, self._finite = [], []
        if self.trainer.is_global_zero:
            self._refresh_bn_stats()
            self._check_finite_weights()
        self._recent.clear()
        if self.trainer.world_size > 1:
            for buffer in self.net.buffers():
                torch.distributed.broadcast(buffer, src=0)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Score as Kaggle does: each whole image by itself, at 1280 x 1918."""
        logits_B1HW = self.net(batch["image"])
        self._finite.append(torch.isfinite(logits_B1HW).all())
        masks_BHW, true_BHW = upsample_logits_tensor(logits_B1HW, HEIGHT, WIDTH) >= 0, batch["mask"].bool()
        overlap, total = (masks_BHW & true_BHW).sum((1, 2)), masks_BHW.sum((1, 2)) + true_BHW.sum((1, 2))
        # Two empty masks are equal.
        overlap, total = (sums.to(_score_dtype(self.device)) for sums in (overlap, total))
        self._scores.append(torch.where(total > 0, 2 * overlap / total, 1.0))

    def on_validation_epoch_end(self) -> None:
        """Log the score, for curves and ``plateau``."""
        self.log("dice", self.validation_dice(), rank_zero_only=True)

    def on_train_epoch_end(self) -> None:
        """Pass the epoch's score to the schedule ``plateau``, if there is one."""
        schedule = self.lr_schedulers()
        if isinstance(schedule, lr_scheduler.ReduceLROnPlateau) and is_validation_epoch(self.trainer):
            schedule.step(self.validation_dice())

    def validation_dice(self) -> float:
        """Return the mean Dice over the images of all processes; raises CarvanaError if a logit is not finite."""
        if not torch.stack(self._finite).all():
            raise CarvanaError(f"Model output is NaN or infinite after epoch {self.current_epoch + 1}: {_NAN_HINT}.")
        scores = torch.cat(self._scores)
        gathered = self.all_gather(torch.stack([scores.sum(), scores.new_tensor(len(scores))]))
        assert isinstance(gathered, Tensor)
        total = gathered.reshape(-1, 2).sum(0)
        return float(total[0] / total[1])

    def configure_optimizers(self) -> Any:
        """Return the optimizer and its schedule."""
        optimizer = _optimizer(self.net, self.settings, fused=_can_fuse(self.device, self.precision))
        steps = int(self.trainer.estimated_stepping_batches)
        if self.settings.schedule == "plateau":
            plateau = lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", factor=0.5, patience=2)
            # Lightning steps it after the checkpoint is written, which would then lack this epoch's step.
            never = self.settings.epochs + 1
            rule = {"scheduler": plateau, "interval": "epoch", "frequency": never, "monitor": "dice", "strict": False}
            return {"optimizer": optimizer, "lr_scheduler": rule}
        schedule = lr_scheduler.LambdaLR(optimizer, lr_lambda(self.settings, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _refresh_bn_stats(self) -> None:
        """Measure running statistics again, on the last training images of the epoch, for the weights in the net."""
        batches = bn_batches(torch.cat(list(self._recent))[-_BN_IMAGES:], self.settings.batch_size)
        with self.trainer.precision_plugin.forward_context():
            update_bn_stats(self.net, batches)

    def _check_losses(self, names: Sequence[str]) -> None:
        """Raise CarvanaError if a loss since the last check is NaN or infinite."""
        unchecked, self._unchecked = self._unchecked, []
        for values, (_, indices) in zip(torch.stack([v for v, _ in unchecked]).tolist(), unchecked, strict=True):
            if not all(map(math.isfinite, values)):
                raise CarvanaError(self._non_finite_message(dict(zip(names, values, strict=True)), indices))

    def _check_finite_weights(self) -> None:
        name = non_finite_name(self.net.state_dict())
        if name is not None:
            raise CarvanaError(
                f"The net's '{name}' contains NaN or infinity after epoch {self.current_epoch + 1}: {_NAN_HINT}."
            )

    def _non_finite_message(self, losses: Mapping[str, float], indices: Tensor) -> str:
        values = ", ".join(f"{name} {value:g}" for name, value in losses.items() if name != "loss")
        images = ", ".join(self.image_ids[index] for index in indices[:4].tolist())
        return (
            f"The loss is NaN or infinite in epoch {self.current_epoch + 1} ({values}), on images {images} ...: "
            f"{_NAN_HINT}."
        )


def _score_dtype(device: torch.device) -> torch.dtype:
    """Return the type in which scores are averaged; Apple's GPUs have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def _losses_at_once(device: torch.device) -> int:
    """Return the number of batches whose losses are read together: reading them from a GPU waits for it."""
    return 32 if device.type == "cuda" else 1


def bn_batches(images_BChw: Tensor, batch_size: int) -> list[Tensor]:
    """Return the images in batches of about ``batch_size``, none of them of one image unless there is only one.

    A batch of one has no statistics after global pooling.
    """
    batches = list(torch.split(images_BChw, max(2, batch_size)))
    return batches[:-1] if len(batches) > 1 and len(batches[-1]) == 1 else batches


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


def _can_fuse(device: torch.device, precision: torch.dtype) -> bool:
    """Return whether one kernel may update all weights: not in fp16, where Lightning then leaves gradients scaled."""
    return device.type in ("cuda", "cpu") and precision != torch.float16


def _optimizer(net: SegmentationModel, settings: TrainSettings, fused: bool) -> Optimizer:
    encoder = [value for name, value in net.named_parameters() if ".encoder." in name]
    others = [value for name, value in net.named_parameters() if ".encoder." not in name]
    groups: list[dict[str, Any]] = [{"params": others}]
    if encoder:
        groups.append({"params": encoder, "lr": settings.lr * settings.encoder_lr_scale})
    common: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    can_fuse = common | {"fused": fused or None}
    optimizers: dict[str, Callable[[], Optimizer]] = {
        "adam": lambda: torch.optim.Adam(groups, **can_fuse),
        "adamw": lambda: torch.optim.AdamW(groups, **can_fuse),
        "sgd": lambda: torch.optim.SGD(groups, momentum=0.9, nesterov=True, **can_fuse),
        "rmsprop": lambda: torch.optim.RMSprop(groups, momentum=0.9, **common),
    }
    return optimizers[settings.optimizer]()
