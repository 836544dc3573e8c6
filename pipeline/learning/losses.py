"""Losses on logits against soft targets, in float32."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.learning.settings import LossName

_BORDER_RADIUS = 3
"""Pixels from an outline that ``border_bce`` still counts as near."""


def compute_losses(
    logits_B1HW: Tensor, target_B1HW: Tensor, weights: Mapping[LossName, float], border_weight: float
) -> dict[str, Tensor]:
    """Return every loss as ``loss_<name>``, and their weighted sum as ``loss``; scalars in float32.

    ``target`` is the part of each pixel that is car, 0 to 1.
    """
    # Half precision overflows in sums over a raster, so that masks come out blank: leave autocast here.
    with torch.autocast(logits_B1HW.device.type, enabled=False):
        logits, target = logits_B1HW.float(), target_B1HW.float()
        parts = {name: _losses(border_weight)[name](logits, target) for name in weights}
    total = torch.stack([weights[name] * parts[name] for name in weights]).sum()
    return {f"loss_{name}": part for name, part in parts.items()} | {"loss": total}


def dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """One minus the soft Dice of each image, averaged; an empty target is no division by zero."""
    probability, dims = logits.sigmoid(), (1, 2, 3)
    overlap = (probability * target).sum(dims)
    total = probability.sum(dims) + target.sum(dims)
    return (1 - (2 * overlap + 1) / (total + 1)).mean()


def border_bce(logits: Tensor, target: Tensor, border_weight: float) -> Tensor:
    """Cross-entropy that counts pixels near an outline ``1 + border_weight`` times, as a weighted mean."""
    size = 2 * _BORDER_RADIUS + 1
    highest = functional.max_pool2d(target, size, stride=1, padding=_BORDER_RADIUS)
    lowest = -functional.max_pool2d(-target, size, stride=1, padding=_BORDER_RADIUS)
    weight = 1 + border_weight * (highest - lowest)
    return functional.binary_cross_entropy_with_logits(logits, target, weight, reduction="sum") / weight.sum()


def lovasz(logits: Tensor, target: Tensor) -> Tensor:
    """Lovász hinge of the IoU, an image at a time, against the target rounded to 0 or 1."""
    from segmentation_models_pytorch.losses import LovaszLoss

    return LovaszLoss("binary", per_image=True)(logits, (target >= 0.5).float())  # type: ignore[no-any-return]


def _losses(border_weight: float) -> dict[LossName, Callable[[Tensor, Tensor], Tensor]]:
    return {
        "bce": functional.binary_cross_entropy_with_logits,
        "dice": dice_loss,
        "border_bce": lambda logits, target: border_bce(logits, target, border_weight),
        "lovasz": lovasz,
    }
