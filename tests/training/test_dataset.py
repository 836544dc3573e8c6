"""Training images: caching, augmentation, sampling."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.config import AugmentSettings, HardwareSettings, InputSettings, TrainSettings
from pipeline.errors import CarvanaError
from pipeline.training import dataset
from pipeline.training.dataset import (
    CachedImages,
    DistributedEvalSampler,
    EpochSampler,
    LoaderOptions,
    LoadingResources,
    TrainingSet,
    available_memory,
    batch_bytes,
    check_shared_memory,
    training_loader,
)
from tests.fakes.fake_images import FakeImages


def settings(**changes: object) -> TrainSettings:
    values = {"epochs": 2, "batch_size": 2, "losses": {"bce": 1.0}, "lr": 0.01}
    return TrainSettings.model_validate(values | changes)


@pytest.fixture(scope="module")
def examples() -> CachedImages:
    return CachedImages.load([str(n) for n in range(6)], FakeImages(), InputSettings(size=(32, 48)), cache_gb=1)


class TestDataset:
    def test_targets_are_soft(self, examples: CachedImages) -> None:
        target = examples[0][1]
        assert set(np.unique(target)) > {0, 255}

    def test_cached_or_not_is_the_same(self, examples: CachedImages) -> None:
        decoded = CachedImages.load(examples.image_ids, examples.reader, examples.input, cache_gb=0)
        assert decoded.cache is None
        assert all(np.array_equal(a, b) for a, b in zip(decoded[3], examples[3], strict=True))

    def test_augmentation_follows_from_seed_epoch_and_image_alone(self, examples: CachedImages) -> None:
        def look(seed: int, *steps: tuple[int, int]) -> torch.Tensor:
            dataset = TrainingSet(examples, settings(), seed)
            return [dataset[step]["image"] for step in steps][-1]

        assert torch.equal(look(0, (4, 2)), look(0, (0, 1), (3, 3), (4, 2)))
        assert not torch.equal(look(0, (4, 2)), look(0, (5, 2)))
        assert not torch.equal(look(0, (4, 2)), look(1, (4, 2)))

    def test_image_and_target_move_together(self, examples: CachedImages) -> None:
        only_moves = AugmentSettings(shift=0.2, scale=0.2, rotate=10, brightness=0, hue=0)
        item = TrainingSet(examples, settings(augment=only_moves), 0)[(1, 3)]
        car = item["image"][..., 0].float() - 60
        assert (car / 120 - item["target"][0].float() / 255).abs().mean() < 0.02

    def test_crops(self, examples: CachedImages) -> None:
        item = TrainingSet(examples, settings(crop=(16, 24)), 0)[(0, 0)]
        assert item["image"].shape == (16, 24, 3)
        assert item["target"].shape == (1, 16, 24)

    def test_order_follows_from_seed_and_epoch(self) -> None:
        sampler = EpochSampler(10, seed=1)
        first = list(sampler)
        sampler.set_epoch(1)
        assert [epoch for epoch, _ in sampler] == [1] * 10
        assert [index for _, index in first] != [index for _, index in sampler]
        assert sorted(index for _, index in sampler) == list(range(10))

    @pytest.mark.parametrize("sampler", [EpochSampler, DistributedEvalSampler])
    def test_processes_share_without_overlap(self, sampler: Callable[..., EpochSampler]) -> None:
        shares = [list(sampler(11, *([7] if sampler is EpochSampler else []), rank, 2)) for rank in (0, 1)]
        assert not set(shares[0]) & set(shares[1])
        assert len(shares[0]) + len(shares[1]) == (11 if sampler is DistributedEvalSampler else 10)

    @pytest.mark.parametrize(
        ("images", "batch_size", "processes"), [(5, 2, 1), (65, 16, 1), (7, 3, 2), (9, 4, 2), (4, 8, 2), (3, 8, 1)]
    )
    def test_no_process_trains_on_a_batch_of_one(self, images: int, batch_size: int, processes: int) -> None:
        input = InputSettings(size=(32, 48))
        examples = CachedImages.load([str(n) for n in range(images)], FakeImages(), input, cache_gb=1)
        for rank in range(processes):
            train = settings(batch_size=batch_size)
            loader = training_loader(examples, train, LoaderOptions(0, gpu=False), 0, rank, processes)
            sizes = [len(batch["index"]) for batch in loader]
            assert sizes
            assert 1 not in sizes


class TestSharedMemory:
    def test_too_little_is_noticed_before_the_first_batch(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=64_000_000))
        with pytest.raises(CarvanaError, match=r"64 MB.*200 MB.*--shm-size.*hardware\.workers"):
            check_shared_memory(200_000_000, tmp_path)
        check_shared_memory(50_000_000, tmp_path)

    def test_a_system_without_it_is_left_alone(self, tmp_path: Path) -> None:
        check_shared_memory(1 << 40, tmp_path / "none")

    def test_the_larger_batch_counts(self) -> None:
        native = InputSettings(size="native")
        pixels = 1280 * 1918
        assert batch_bytes(native, settings(batch_size=8), predict_batch=4) == 8 * pixels * 4
        assert batch_bytes(native, settings(batch_size=8, crop=(128, 128)), predict_batch=4) == 4 * pixels * 4


class TestLoadingResources:
    BATCH = 1_000_000

    def resolve(self, processes: int = 1, **settings: Any) -> LoadingResources:
        return LoadingResources.resolve(HardwareSettings(**settings), self.BATCH, processes)

    def test_numbers_are_kept(self) -> None:
        assert self.resolve(workers=7, cache_gb=1.5) == LoadingResources(7, 1.5)

    @pytest.mark.parametrize(
        ("cpus", "processes", "workers"),
        [(1, 1, 1), (2, 1, 2), (3, 1, 2), (4, 1, 2), (16, 1, 14), (16, 2, 7), (2, 4, 1)],
    )
    def test_two_cpus_are_left_free(
        self, monkeypatch: pytest.MonkeyPatch, cpus: int, processes: int, workers: int
    ) -> None:
        monkeypatch.setattr(dataset, "available_cpus", lambda: cpus)
        monkeypatch.setattr(dataset, "free_shared_memory", lambda: 1 << 40)
        assert self.resolve(processes).workers == workers

    @pytest.mark.parametrize(("batches", "workers"), [(29, 14), (28, 13), (5, 2), (4, 1), (0, 1)])
    def test_batches_fit_into_shared_memory(self, monkeypatch: pytest.MonkeyPatch, batches: int, workers: int) -> None:
        monkeypatch.setattr(dataset, "available_cpus", lambda: 16)
        monkeypatch.setattr(dataset, "free_shared_memory", lambda: batches * self.BATCH)
        assert self.resolve().workers == workers

    @pytest.mark.parametrize(("platform", "cache_gb"), [("linux", 4.0), ("win32", 2.0)])
    def test_half_of_the_free_memory_is_for_images(
        self, monkeypatch: pytest.MonkeyPatch, platform: str, cache_gb: float
    ) -> None:
        monkeypatch.setattr(dataset, "available_memory", lambda: 8 << 30)
        monkeypatch.setattr(sys, "platform", platform)
        assert self.resolve(workers=1).cache_gb == cache_gb

    @pytest.mark.parametrize(
        ("limit", "free"), [("1000000", 700_000), ("max", 1 << 40), (None, 1 << 40), ("400000", 100_000), ("1", 0)]
    )
    def test_the_limit_of_a_container_counts(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str | None, free: int
    ) -> None:
        monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1 << 40))
        if limit:
            (tmp_path / "memory.max").write_text(f"{limit}\n")
            (tmp_path / "memory.current").write_text("350000\n")
            (tmp_path / "memory.stat").write_text("anon 300000\ninactive_file 50000\n")
        assert available_memory(tmp_path) == free
