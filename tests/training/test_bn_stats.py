"""Running statistics measured again."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from pipeline.training.module import bn_batches, update_bn_stats


def batches() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    for mean in (1.0, 3.0):
        yield torch.randn(8, 2, 16, 16, generator=generator) * 2 + mean


def net() -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(2, momentum=0.1), nn.Dropout(0.9), nn.BatchNorm2d(2))


def test_statistics_are_the_mean_over_batches_whatever_they_were() -> None:
    made = net()
    made[0].running_mean.fill_(100.0)  # type: ignore[union-attr, operator]
    update_bn_stats(made, batches())
    expected = torch.stack([batch.mean((0, 2, 3)) for batch in batches()]).mean(0)
    variance = torch.stack([batch.var((0, 2, 3)) for batch in batches()]).mean(0)
    torch.testing.assert_close(made[0].running_mean, expected)
    torch.testing.assert_close(made[0].running_var, variance)


def test_dropout_is_off_while_statistics_are_measured() -> None:
    """Dropout would make what comes after it vary more than it ever will again."""
    made = net()
    update_bn_stats(made, batches())
    assert isinstance(made[2].running_var, Tensor)
    assert made[2].running_var.max() < 1.1


def test_update_bn_stats_restores_mode_and_weights() -> None:
    made = net().train()
    weights = [parameter.clone() for parameter in made.parameters()]
    update_bn_stats(made, batches())
    assert made.training
    assert all(module.training for module in made)
    assert made[0].momentum == 0.1
    assert all(torch.equal(a, b) for a, b in zip(weights, made.parameters(), strict=True))
    assert not update_bn_stats(nn.Sequential(nn.Conv2d(2, 2, 1)), iter(()))


@pytest.mark.parametrize(("images", "batch_size"), [(65, 4), (65, 16), (5, 2), (3, 1), (7, 8), (2, 1)])
def test_no_batch_of_statistics_has_one_image(images: int, batch_size: int) -> None:
    sizes = [len(batch) for batch in bn_batches(torch.zeros(images, 3, 4, 4), batch_size)]
    assert 1 not in sizes
    assert images - 1 <= sum(sizes) <= images
