"""The torch predictor, its stream of images, and its timer."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pipeline import workspace
from pipeline.config import InputSettings, ModelConfig, Precision, SmpUNetConfig, UNetConfig
from pipeline.errors import CarvanaError, CorruptFileError
from pipeline.inference import torch_predictor
from pipeline.inference.probability_map import ProbabilityMap
from pipeline.inference.torch_predictor import (
    DeviceSpans,
    PinnedRing,
    PredictionTimer,
    PreparedImage,
    TimingRecord,
    TorchPredictor,
    predict_stream,
)
from pipeline.models import weights
from pipeline.models.networks import build_model, prepare_for_gpu

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
        seen = list(predict_stream(predictor, list(images), read, size=(64, 96), batch_size=3, threads=2, merged=False))
        assert [image_id for image_id, _ in seen] == list(images)
        for image_id, maps in seen:
            if image_id in ("2", "6"):
                assert isinstance(maps, CorruptFileError)
            else:
                assert [m.view for m in maps] == ["identity", "hflip"]
                levels = np.stack([m.to_full_size(64, 96) for m in maps])
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
            list(predict_stream(predictor, ["1"], read, size=(64, 96), batch_size=3, threads=2, merged=True))

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


class SlowLink:
    """Does what ``GpuLink`` does with threads that start late, so that a buffer that is reused too early is noticed."""

    def __init__(self, device: torch.device) -> None:
        self.pool = ThreadPoolExecutor(2)
        self.random = np.random.default_rng(0)

    def buffer(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=dtype)

    def upload(self, host: torch.Tensor) -> torch.Tensor:
        return self._later(host.clone).result()

    def download(self, results: Sequence[torch.Tensor], hosts: Sequence[torch.Tensor]) -> Callable[[], object]:
        def copy() -> None:
            for result, host in zip(results, hosts, strict=True):
                host.copy_(result)

        return self._later(copy).result

    def _later(self, call: Callable[[], Any]) -> Future[Any]:
        seconds = self.random.uniform(0, 0.01)
        return self.pool.submit(lambda: (time.sleep(seconds), call())[1])


class TestStreamOnGPU:
    """The stream of a GPU, with the CPU in its place."""

    @pytest.fixture(autouse=True)
    def gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch_predictor, "GpuLink", SlowLink)

    @pytest.mark.parametrize("merged", [True, False])
    @pytest.mark.parametrize("views", [["identity"], ["identity", "hflip", "scale:0.5"]])
    def test_the_maps_are_those_of_the_cpu(self, net_folder: Path, views: list[str], merged: bool) -> None:
        random = np.random.default_rng(0)
        images = [random.integers(0, 255, (64, 96, 3), np.uint8) for _ in range(23)]
        predictor = TorchPredictor(net_folder, views=views, device="cpu", precision="32")

        def batches() -> Iterator[list[PreparedImage]]:
            unreadable: list[PreparedImage] = [(f"{n}", CorruptFileError("truncated")) for n in (90, 91)]
            for start in range(0, 23, 4):
                yield [(f"{n}", predictor.preprocess(images[n])) for n in range(start, min(start + 4, 23))]
                if start in (4, 8):
                    yield unreadable

        def maps(predict: Any) -> list[ProbabilityMap]:
            found = predict(predictor, batches(), (64, 96), 4, merged)
            return [prob_map for _, images in found for maps in images for prob_map in maps]

        on_gpu, on_cpu = maps(torch_predictor._predict_on_gpu), maps(torch_predictor._predict_on_cpu)
        assert len(on_gpu) == len(on_cpu) == 23 * (1 if merged else len(views))
        for a, b in zip(on_gpu, on_cpu, strict=True):
            assert (a.image_id, a.view, a.count) == (b.image_id, b.view, b.count)
            assert a.probs_u8.dtype == b.probs_u8.dtype
            # The last batch is filled up on a GPU, and batches of other sizes may be rounded otherwise.
            difference = np.abs(a.to_full_size(64, 96).astype(int) - b.to_full_size(64, 96))
            assert difference.max() <= a.count

    def test_non_finite_output_is_refused(self, net_folder: Path) -> None:
        predictor = TorchPredictor(net_folder, device="cpu", precision="32")
        with torch.no_grad():
            for parameter in predictor.net.parameters():
                parameter.fill_(1e30)
        batches = iter([[("a", predictor.preprocess(np.full((64, 96, 3), 255, np.uint8)))]])
        with pytest.raises(CarvanaError, match=str(net_folder)):
            list(torch_predictor._predict_on_gpu(predictor, batches, (64, 96), 4, True))

    def test_a_buffer_is_not_used_again_before_its_batch_was_collected(self) -> None:
        ring = PinnedRing(SlowLink(torch.device("cpu")), 3)  # type: ignore[arg-type]
        waiting = deque()
        for number in range(50):
            ring.submit([np.full((5, 6, 3), number, np.uint8)], lambda batch: [batch + 1, batch.sum()])
            waiting.append(number)
            if len(ring) == 3:
                with ring.collect() as (one_more, total):
                    oldest = waiting.popleft()
                    assert (one_more == oldest + 1).all()
                    assert total == oldest * 90
        with pytest.raises(IndexError):
            for _ in range(3):
                ring.submit([np.zeros((5, 6, 3), np.uint8)], lambda batch: [batch])

    def test_a_map_of_nothing(self) -> None:
        nothing = np.zeros((40, 50), np.uint8)
        assert ProbabilityMap.cut("a", "v", 1, nothing, nothing.any(1), nothing.any(0)).probs_u8.shape == (0, 0)


class TestPreparedNet:
    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(
        "spec",
        [
            UNetConfig(architecture="unet", widths=(8, 16)),
            SmpUNetConfig(architecture="smp_unet", encoder="resnet18"),
            SmpUNetConfig(architecture="smp_unet", encoder="resnet18", upsampling="transposed"),
            SmpUNetConfig(architecture="smp_unet", encoder="mobilenet_v2"),
            SmpUNetConfig(architecture="smp_unet", encoder="tu-tf_efficientnet_lite0"),
        ],
        ids=lambda spec: getattr(spec, "encoder", "unet"),
    )
    def test_logits_stay_within_the_rounding_of_the_precision(self, spec: ModelConfig, dtype: torch.dtype) -> None:
        net = build_model(spec, InputSettings(size=(64, 96)), pretrained=False)
        pixels = torch.randint(0, 256, (2, 3, 64, 96), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            net.train()
            for _ in range(20):  # statistics that are not those of a new net
                net(pixels)
            net.eval()
            plain, prepared = net(pixels), prepare_for_gpu(net, dtype)(pixels)
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                cast = net(pixels)
        assert prepared.dtype == dtype
        errors = [(logits.float() - plain).abs().mean() / plain.std() for logits in (prepared, cast)]
        assert errors[0] < max(1e-4, 1.5 * errors[1])

    def test_batch_norm_is_gone_from_a_resnet(self) -> None:
        net = build_model(
            SmpUNetConfig(architecture="smp_unet", encoder="resnet18"), InputSettings(size=(64, 96)), pretrained=False
        )
        prepared = prepare_for_gpu(net.eval(), torch.float32)
        assert not any(isinstance(layer, torch.nn.BatchNorm2d) for layer in prepared.modules())
        assert any(isinstance(layer, torch.nn.BatchNorm2d) for layer in net.modules())


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
        list(predict_stream(predictor, ids, read, size=(64, 96), batch_size=3, threads=2, merged=True))
        return predictor.timer.lap()

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
        first, later = stopwatch.lap()
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
