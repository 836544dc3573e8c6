"""Losses: values, weights, precision."""

import torch

from pipeline.training.module import border_bce, compute_losses, dice_loss


class TestLosses:
    def test_all_are_low_for_the_truth_and_high_for_its_opposite(self) -> None:
        target = torch.zeros(2, 1, 32, 32)
        target[:, :, 8:24, 8:20] = 1
        weights = {"bce": 1.0, "border_bce": 1.0, "dice": 1.0, "lovasz": 1.0}
        right = compute_losses((target - 0.5) * 40, target, weights, 5.0, 3)
        wrong = compute_losses((0.5 - target) * 40, target, weights, 5.0, 3)
        for name in ("loss_bce", "loss_border_bce", "loss_dice", "loss_lovasz"):
            assert right[name] < 0.01 < 0.5 < wrong[name]
        assert torch.isclose(right["loss"], sum(right[f"loss_{name}"] for name in weights))

    def test_the_sum_is_weighted(self) -> None:
        logits, target = torch.randn(1, 1, 8, 8), torch.rand(1, 1, 8, 8)
        parts = compute_losses(logits, target, {"bce": 2.0, "dice": 0.5}, 0, 3)
        assert torch.isclose(parts["loss"], 2 * parts["loss_bce"] + 0.5 * parts["loss_dice"])

    def test_half_precision_logits_give_a_float32_loss(self) -> None:
        # A raster of this size overflows a sum in float16, whose largest number is 65,504.
        logits, target = torch.full((1, 1, 512, 512), 5.0, dtype=torch.float16), torch.ones(1, 1, 512, 512)
        with torch.autocast("cpu", torch.bfloat16):
            loss = compute_losses(logits, target, {"dice": 1.0}, 0, 3)["loss"]
        assert loss.dtype == torch.float32
        assert 0 < loss < 0.01

    def test_empty_target(self) -> None:
        assert dice_loss(torch.full((1, 1, 8, 8), -20.0), torch.zeros(1, 1, 8, 8)) < 1e-3

    def test_border_weight(self) -> None:
        target = torch.zeros(1, 1, 32, 32)
        target[..., 16:] = 1
        near, far = torch.zeros_like(target), torch.zeros_like(target)
        logits = (target - 0.5) * 20
        near[..., 15] = 20
        far[..., 1] = 20
        assert border_bce(logits + near, target, 5.0, 3) > 2 * border_bce(logits + far, target, 5.0, 3)

    def test_the_radius_says_what_is_near(self) -> None:
        target = torch.zeros(1, 1, 40, 40)
        target[..., :20] = 1
        logits = (target - 0.5) * 20
        logits[..., 26] *= -1  # six pixels beyond the outline
        assert border_bce(logits, target, 5.0, 8) > 2 * border_bce(logits, target, 5.0, 3)
