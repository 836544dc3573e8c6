"""The torch predictor, its stream of images, and its timer."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pipeline import workspace
from pipeline.config import Precision
from pipeline.errors import CarvanaError, CorruptFileError
from pipeline.inference.torch_predictor import (
    DeviceSpans,
    PredictionTimer,
    TimingRecord,
    TorchPredictor,
    predict_stream,
)
from pipeline.models import weights

PRECISIONS: tuple[Precision, ...] = ("32", "bf16")


class TestPredictor:
    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_probability_at_the_pictures_own_size(self, net_folder: Path, precision: Precision) -> None:
        image = np.random.default_rng(0).integers(0, 255, (70, 90, 3), np.uint8)
        probability = TorchPredictor(net_folder, device="cpu", precision=precision)(image)
        assert probability.shape == (70, 90)
        assert probability.dtype == np.float32
        assert 0 <= probability.min() < probability.max() <= 1

    def test_flip_view_sees_the_mirrored_picture(self, net_folder: Path) -> None:
        image = np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8)
        plain = TorchPredictor(net_folder, views=["identity"], device="cpu", precision="32")
        flipped = TorchPredictor(net_folder, views=["hflip"], device="cpu", precision="32")
        # OpenCV's own resizing is exact under mirroring but for rounding.
        difference = np.abs(flipped(image[:, ::-1].copy())[:, ::-1] - plain(image))
        assert np.median(difference) < 0.01

    @pytest.mark.parametrize(("precision", "tolerance"), [("32", 1), ("bf16", 3)])
    def test_stream_keeps_order_and_passes_what_cannot_be_read(
        self, net_folder: Path, precision: Precision, tolerance: int
    ) -> None:
        random = np.random.default_rng(0)
        images = {f"{n}": random.integers(0, 255, (64, 96, 3), np.uint8) for n in range(7)}

        def read(image_id: str) -> NDArray[np.uint8]:
            if image_id in ("2", "6"):
                raise CorruptFileError(f"{image_id} is truncated")
            return images[image_id]

        predictor = TorchPredictor(net_folder, views=["identity", "hflip"], device="cpu", precision=precision)
        seen = list(predict_stream(predictor, list(images), read, size=(64, 96), batch_size=3, threads=2))
        assert [image_id for image_id, _ in seen] == list(images)
        for image_id, levels in seen:
            if image_id in ("2", "6"):
                assert isinstance(levels, CorruptFileError)
            else:
                alone = predictor.predict_u8([predictor.preprocess(images[image_id])], 64, 96)[0]
                # Batches of other sizes may be rounded otherwise.
                assert np.abs(levels.astype(int) - alone).max() <= tolerance

    def test_bf16_differs_from_float32_within_rounding(self, net_folder: Path) -> None:
        image = np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8)
        plain, half = (TorchPredictor(net_folder, device="cpu", precision=p)(image) for p in PRECISIONS)
        assert np.abs(plain - half).max() < 0.05

    def test_stream_stops_when_a_drive_fails(self, net_folder: Path) -> None:
        def read(image_id: str) -> NDArray[np.uint8]:
            raise CarvanaError("the drive is gone")

        predictor = TorchPredictor(net_folder, views=["identity"], device="cpu")
        with pytest.raises(CarvanaError, match="the drive is gone"):
            list(predict_stream(predictor, ["1"], read, size=(64, 96), batch_size=3, threads=2))

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_non_finite_weights_are_refused_when_loaded(self, net_folder: Path, value: float) -> None:
        path = net_folder / workspace.WEIGHTS["last"]
        state = dict(weights.read_weights(path))
        name = next(name for name, value in state.items() if value.is_floating_point())
        weights.save_weights(path, state | {name: torch.full_like(state[name], value)})
        with pytest.raises(CarvanaError, match=name):
            TorchPredictor(net_folder, device="cpu")

    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_non_finite_output_is_refused(self, net_folder: Path, precision: Precision) -> None:
        predictor = TorchPredictor(net_folder, device="cpu", precision=precision)
        with torch.no_grad():  # finite weights whose output overflows
            for parameter in predictor.net.parameters():
                parameter.fill_(1e30)
        with pytest.raises(CarvanaError, match=str(net_folder)):
            predictor(np.full((64, 96, 3), 255, np.uint8))


class TestPredictionTimer:
    @staticmethod
    def laps(predictor: TorchPredictor, count: int) -> tuple[TimingRecord, TimingRecord]:
        """Stream images, the second of which can't be read, in batches of three."""
        image = np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8)

        def read(image_id: str) -> NDArray[np.uint8]:
            if image_id == "1":
                raise CorruptFileError("truncated")
            return image

        ids = [str(number) for number in range(count)]
        list(predict_stream(predictor, ids, read, size=(64, 96), batch_size=3, threads=2))
        return predictor.timer.warmup_and_rest()

    def test_the_first_batch_of_all_is_kept_apart(self, net_folder: Path) -> None:
        predictor = TorchPredictor(net_folder, views=["identity", "hflip"], device="cpu")
        first, later = self.laps(predictor, 7)
        assert (first.images, later.images) == (2, 4)
        for lap in (first, later):
            assert set(lap.views) == {"identity", "hflip"}
            assert all(seconds > 0 for seconds in lap.views.values())
            # One batch at a time on a CPU: what the views took is a part of what the clock on the wall says.
            assert sum(lap.views.values()) <= lap.seconds * (1 + 1e-9)
        first, later = self.laps(predictor, 3)
        assert (first.images, later.images) == (0, 2), "a second stream is warm"

    def test_a_single_batch_takes_all_the_time(self, net_folder: Path) -> None:
        first, later = self.laps(TorchPredictor(net_folder, device="cpu"), 3)
        assert first.images == 2
        assert 0 < sum(first.views.values()) <= first.seconds
        assert later == TimingRecord(views={"identity": 0.0})

    def test_nothing_was_predicted(self, net_folder: Path) -> None:
        predictor = TorchPredictor(net_folder, device="cpu")
        assert [lap.images for lap in self.laps(predictor, 0)] == [0, 0]

    def test_batches_of_several_threads_add_up(self) -> None:
        class Second(DeviceSpans):
            def seconds(self) -> list[tuple[str, float]]:
                return [("identity", 1.0), ("hflip", 0.25), ("identity", 1.0)]

        stopwatch = PredictionTimer(["identity", "hflip"])
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda _: stopwatch.add_batch(3, Second(torch.device("cpu"))), range(1001)))
        first, later = stopwatch.warmup_and_rest()
        assert (first.images, later.images) == (3, 3000)
        assert later.views == {"identity": 2000, "hflip": 250}

    def test_gpu_events_are_read_after_the_batch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Event:
            """A clock that goes on by 500 ms with each thing that is noted, and can't be read before all is done."""

            noted, done = 0, False

            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                Event.noted += 500
                self.at = Event.noted

            def elapsed_time(self, end: "Event") -> float:
                assert Event.done
                return end.at - self.at

        monkeypatch.setattr(torch.cuda, "Event", Event)
        spans = DeviceSpans(torch.device("cuda"))
        for view in ("identity", "identity", "hflip"):
            with spans.span(view):
                pass
        Event.done = True
        assert spans.seconds() == [("identity", 0.5), ("identity", 0.5), ("hflip", 0.5)]
