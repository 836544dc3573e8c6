"""Nets at small sizes: shapes, weights, losses, views, prediction, and resuming to the last bit."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from pipeline import workspace
from pipeline.config import AugmentSettings, InputSettings, Precision, SmpUNetConfig, TrainSettings, UNetConfig
from pipeline.errors import CarvanaError, CorruptFileError
from pipeline.inference.torch_predictor import (
    DeviceSpans,
    PredictionTimer,
    TimingRecord,
    TorchPredictor,
    predict_stream,
)
from pipeline.models import networks
from pipeline.models.resize import soft_target, to_network_input
from pipeline.models.tensors import (
    device_label,
    quantize_logits_tensor,
    resolve_device,
    resolve_precision,
    upsample_logits_tensor,
)
from pipeline.models.tta import TTATransform
from pipeline.training.dataset import CachedImages, DistributedEvalSampler, EpochSampler, TrainingSet
from pipeline.training.module import border_bce, compute_losses, dice_loss

SMALL = InputSettings(size=(64, 64))
TINY = UNetConfig(architecture="unet", widths=(4, 8), dropout=0.2)
ENCODER = SmpUNetConfig(architecture="smp_unet", encoder="resnet18", decoder_channels=(32, 16, 8))


def settings(**changes: object) -> TrainSettings:
    values = {"epochs": 2, "batch_size": 2, "losses": {"bce": 1.0}, "lr": 0.01}
    return TrainSettings.model_validate(values | changes)


def parameters(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


class TestModels:
    def test_the_classic_unet_has_31_million_parameters(self) -> None:
        net = networks.build_model(UNetConfig(architecture="unet"), SMALL)
        assert parameters(net) == 31_037_633

    @pytest.mark.parametrize("norm", ["batch", "group", "none"])
    @pytest.mark.parametrize("channels", ["rgb", "gray"])
    def test_classic_keeps_size(self, norm: str, channels: str) -> None:
        spec = UNetConfig.model_validate({"architecture": "unet", "widths": (8, 8, 16), "norm": norm})
        input = InputSettings.model_validate({"size": (64, 96), "channels": channels})
        net = networks.build_model(spec, input).eval()
        assert net(torch.zeros(2, input.channel_count, 64, 96)).shape == (2, 1, 64, 96)

    @pytest.mark.parametrize("encoder", ["resnet18", "tu-mobilenetv3_small_050"])
    @pytest.mark.parametrize("channels", ["rgb", "gray"])
    def test_encoder_keeps_size(self, encoder: str, channels: str) -> None:
        spec = SmpUNetConfig(architecture="smp_unet", encoder=encoder, decoder_channels=(32, 16, 16, 8, 8))
        input = InputSettings.model_validate({"size": (64, 64), "channels": channels})
        net = networks.build_model(spec, input).eval()
        assert net(torch.zeros(1, input.channel_count, 64, 64)).shape == (1, 1, 64, 64)

    def test_native_width_is_padded_by_as_much_on_each_side(self) -> None:
        class Columns(nn.Module):
            def forward(self, pixels: torch.Tensor) -> torch.Tensor:
                assert pixels.shape[-1] == 96
                return pixels[:, :1]

        net = networks.SegmentationModel(Columns(), SMALL, stride=32)
        pixels = torch.rand(1, 3, 64, 94) * 255
        expected = ((pixels - net.mean) / net.std)[:, :1]
        assert torch.equal(net(pixels), expected)
        assert torch.equal(net(pixels.flip(-1)).flip(-1), expected)

    def test_same_seed_same_weights(self) -> None:
        first, again, other = (networks.build_model(TINY, SMALL, seed).state_dict() for seed in (1, 1, 2))
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert not all(torch.equal(first[name], other[name]) for name in first)

    def test_a_folder_explains_itself(self, tmp_path: Path) -> None:
        net = networks.build_model(TINY, SMALL, seed=3)
        networks.save_config(tmp_path, TINY, SMALL, {"fold": 0})
        networks.save_weights(tmp_path / workspace.WEIGHTS["last"], net.state_dict())
        loaded, input = networks.load_model(tmp_path)
        pixels = torch.rand(1, 3, 64, 64) * 255
        assert input == SMALL
        assert torch.equal(loaded(pixels), net.eval()(pixels))

    def test_weights_of_another_architecture(self, tmp_path: Path) -> None:
        networks.save_weights(tmp_path / "other.safetensors", networks.build_model(TINY, SMALL).state_dict())
        wider = networks.build_model(UNetConfig(architecture="unet", widths=(8, 8)), SMALL)
        with pytest.raises(CarvanaError, match=r"other\.safetensors holds weights of another architecture: 'network"):
            networks.load_weights(wider, tmp_path / "other.safetensors")

    def test_a_folder_without_a_net(self, tmp_path: Path) -> None:
        with pytest.raises(CarvanaError, match="holds no trained net"):
            networks.load_model(tmp_path)

    @pytest.mark.parametrize("ending", [".safetensors", ".pth"])
    @pytest.mark.parametrize("prefix", ["", "encoder."])
    def test_encoder_weights_from_a_file(self, tmp_path: Path, ending: str, prefix: str) -> None:
        source = networks.build_model(ENCODER, SMALL, seed=1).network.encoder
        state = {f"{prefix}{name}": value.contiguous() for name, value in source.state_dict().items()}
        path = tmp_path / f"weights{ending}"
        if ending == ".pth":
            torch.save({"state_dict": state}, path)
        else:
            networks.save_weights(path, state)
        net = networks.build_model(ENCODER.model_copy(update={"encoder_weights": str(path)}), SMALL, seed=2)
        assert torch.equal(net.network.encoder.conv1.weight, source.conv1.weight)

    def test_a_weights_file_is_sought_in_the_projects_root(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        spec = ENCODER.model_copy(update={"encoder_weights": "weights/r18.safetensors"})
        experiment = tmp_path / ".dvc" / "tmp" / "exps" / "x"
        experiment.mkdir(parents=True)
        (tmp_path / "weights").mkdir()
        monkeypatch.chdir(experiment)
        with pytest.raises(CarvanaError, match=r"no weights at .*r18\.safetensors: check encoder_weights"):
            networks.initial_weights_digest(spec)
        digests = []
        for content in (b"one", b"two"):
            (tmp_path / "weights" / "r18.safetensors").write_bytes(content)
            digests.append(networks.initial_weights_digest(spec))
        assert digests[0] != digests[1]
        assert networks.initial_weights_digest(ENCODER) is None
        assert networks.initial_weights_digest(ENCODER.model_copy(update={"encoder_weights": "imagenet"})) is None

    def test_weights_that_cannot_be_fetched(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def offline(*_: object, **__: object) -> None:
            raise OSError("no route to host")

        monkeypatch.setattr("segmentation_models_pytorch.encoders.hf_hub_download", offline)
        spec = ENCODER.model_copy(update={"encoder_weights": "imagenet"})
        with pytest.raises(CarvanaError, match=r"can't be fetched.*check the network.*local file"):
            networks.build_model(spec, SMALL)

    def test_unknown_encoder_and_missing_file(self) -> None:
        with pytest.raises(CarvanaError, match="Encoder 'resnet1'"):
            networks.build_model(ENCODER.model_copy(update={"encoder": "resnet1"}), SMALL)
        with pytest.raises(CarvanaError, match=r"no weights at .*gone\.pth"):
            networks.build_model(ENCODER.model_copy(update={"encoder_weights": "./gone.pth"}), SMALL)

    def test_timm_encoders_have_one_set_of_weights(self) -> None:
        spec = ENCODER.model_copy(update={"encoder": "tu-resnet18", "encoder_weights": "imagnet"})
        with pytest.raises(CarvanaError, match="'tu-resnet18' has no weights 'imagnet': set encoder_weights to"):
            networks.build_model(spec, SMALL)

    def test_pickles_are_refused(self, tmp_path: Path) -> None:
        torch.save(networks.build_model(TINY, SMALL), tmp_path / "net.pth")
        with pytest.raises(CarvanaError, match="holds more than weights"):
            networks.read_weights(tmp_path / "net.pth")


class TestLosses:
    def test_all_are_low_for_the_truth_and_high_for_its_opposite(self) -> None:
        target = torch.zeros(2, 1, 32, 32)
        target[:, :, 8:24, 8:20] = 1
        weights = {"bce": 1.0, "border_bce": 1.0, "dice": 1.0, "lovasz": 1.0}
        right = compute_losses((target - 0.5) * 40, target, weights, 5.0)
        wrong = compute_losses((0.5 - target) * 40, target, weights, 5.0)
        for name in ("loss_bce", "loss_border_bce", "loss_dice", "loss_lovasz"):
            assert right[name] < 0.01 < 0.5 < wrong[name]
        assert torch.isclose(right["loss"], sum(right[f"loss_{name}"] for name in weights))

    def test_the_sum_is_weighted(self) -> None:
        logits, target = torch.randn(1, 1, 8, 8), torch.rand(1, 1, 8, 8)
        parts = compute_losses(logits, target, {"bce": 2.0, "dice": 0.5}, 0)
        assert torch.isclose(parts["loss"], 2 * parts["loss_bce"] + 0.5 * parts["loss_dice"])

    def test_half_precision_logits_give_a_float32_loss(self) -> None:
        # A raster of this size overflows a sum in float16, whose largest number is 65,504.
        logits, target = torch.full((1, 1, 512, 512), 5.0, dtype=torch.float16), torch.ones(1, 1, 512, 512)
        with torch.autocast("cpu", torch.bfloat16):
            loss = compute_losses(logits, target, {"dice": 1.0}, 0)["loss"]
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
        assert border_bce(logits + near, target, 5.0) > 2 * border_bce(logits + far, target, 5.0)


class TestViews:
    @pytest.mark.parametrize("name", ["identity", "hflip"])
    def test_inverse_is_exact(self, name: str) -> None:
        pixels, view = torch.randn(2, 1, 32, 48), TTATransform.parse(name)
        assert torch.equal(view.deaugment(view.augment(pixels)), pixels)

    @pytest.mark.parametrize("name", ["scale:0.75", "scale:1.5", "hflip+scale:0.5"])
    def test_scales_do_not_shift(self, name: str) -> None:
        # A ramp of column numbers says where each pixel went: half-pixel centres keep every one in its place.
        height, width = 64, 96
        ramp = torch.arange(width, dtype=torch.float32).expand(1, 1, height, width).contiguous()
        view = TTATransform.parse(name)
        back = torch.nn.functional.interpolate(
            view.deaugment(view.augment(ramp)), (height, width), mode="bilinear", align_corners=False
        )
        inner = slice(8, -8)
        assert (back - ramp)[..., inner].abs().max() < 0.05

    def test_flip_mirrors_left_and_right_only(self) -> None:
        pixels = torch.arange(6.0).reshape(1, 1, 2, 3)
        assert TTATransform.parse("hflip").augment(pixels).flatten().tolist() == [2, 1, 0, 5, 4, 3]

    def test_scaled_sides_keep_their_ratio(self) -> None:
        assert TTATransform.parse("scale:0.75").augment(torch.zeros(1, 3, 1280, 1918)).shape[-2:] == (960, 1438)

    def test_unknown_view(self) -> None:
        with pytest.raises(CarvanaError, match="no view 'vflip'"):
            TTATransform.parse("vflip")


class TestPixels:
    def test_levels_round_and_half_is_car(self) -> None:
        logits = torch.tensor([-9.0, -1e-3, 0.0, 1e-3, 9.0])
        assert quantize_logits_tensor(logits).tolist() == [0, 127, 128, 128, 255]

    def test_growing_a_soft_mask_keeps_the_outline(self) -> None:
        # Soft targets and clamped logits take most of the loss out of a small net (competition's own masks: 0.998).
        rows, columns = np.mgrid[:1280, :1918]
        mask = ((((rows - 700) / 310) ** 2 + ((columns - 960) / 620) ** 2) < 1).astype(np.uint8)
        soft = soft_target(mask, InputSettings(size=(160, 240))) / np.float32(255)
        grown = (
            upsample_logits_tensor(torch.logit(torch.from_numpy(soft), 1e-6)[None, None], 1280, 1918)[0].numpy() >= 0
        )
        assert 2 * (grown & (mask > 0)).sum() / (grown.sum() + mask.sum()) > 0.998

    def test_growing_is_the_same_cubic_on_every_device(self) -> None:
        logits = torch.randn(2, 1, 20, 30)
        torchs = torch.nn.functional.interpolate(logits, (64, 95), mode="bicubic", align_corners=False)[:, 0]
        assert (upsample_logits_tensor(logits, 64, 95) - torchs).abs().max() < 1e-3

    def test_native_is_not_touched(self) -> None:
        image = np.random.default_rng(0).integers(0, 255, (1280, 1918, 3), np.uint8)
        assert to_network_input(image, InputSettings(size="native")) is image

    def test_grey_has_one_channel(self) -> None:
        image = np.zeros((1280, 1918, 3), np.uint8)
        assert to_network_input(image, InputSettings(size=(64, 96), channels="gray")).shape == (64, 96, 1)


@pytest.fixture
def net_folder(tmp_path: Path) -> Path:
    networks.save_config(tmp_path, TINY, InputSettings(size=(32, 48)), {})
    networks.save_weights(tmp_path / workspace.WEIGHTS["last"], networks.build_model(TINY, SMALL, seed=5).state_dict())
    return tmp_path


class TestPredictor:
    def test_probability_at_the_pictures_own_size(self, net_folder: Path) -> None:
        image = np.random.default_rng(0).integers(0, 255, (70, 90, 3), np.uint8)
        probability = TorchPredictor(net_folder, device="cpu")(image)
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

    def test_stream_keeps_order_and_passes_what_cannot_be_read(self, net_folder: Path) -> None:
        random = np.random.default_rng(0)
        images = {f"{n}": random.integers(0, 255, (64, 96, 3), np.uint8) for n in range(7)}

        def read(image_id: str) -> NDArray[np.uint8]:
            if image_id in ("2", "6"):
                raise CorruptFileError(f"{image_id} is truncated")
            return images[image_id]

        predictor = TorchPredictor(net_folder, views=["identity", "hflip"], device="cpu")
        seen = list(predict_stream(predictor, list(images), read, size=(64, 96), batch_size=3, threads=2))
        assert [image_id for image_id, _ in seen] == list(images)
        for image_id, levels in seen:
            if image_id in ("2", "6"):
                assert isinstance(levels, CorruptFileError)
            else:
                assert np.array_equal(levels, predictor.predict_u8([predictor.preprocess(images[image_id])], 64, 96)[0])

    def test_stream_stops_when_a_drive_fails(self, net_folder: Path) -> None:
        def read(image_id: str) -> NDArray[np.uint8]:
            raise CarvanaError("the drive is gone")

        predictor = TorchPredictor(net_folder, views=["identity"], device="cpu")
        with pytest.raises(CarvanaError, match="the drive is gone"):
            list(predict_stream(predictor, ["1"], read, size=(64, 96), batch_size=3, threads=2))

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_non_finite_weights_are_refused_when_loaded(self, net_folder: Path, value: float) -> None:
        path = net_folder / workspace.WEIGHTS["last"]
        state = dict(networks.read_weights(path))
        name = next(name for name, value in state.items() if value.is_floating_point())
        networks.save_weights(path, state | {name: torch.full_like(state[name], value)})
        with pytest.raises(CarvanaError, match=name):
            TorchPredictor(net_folder, device="cpu")

    @pytest.mark.parametrize("precision", ["32", "bf16"])
    def test_non_finite_output_is_refused(self, net_folder: Path, precision: Precision) -> None:
        predictor = TorchPredictor(net_folder, device="cpu", precision=precision)
        with torch.no_grad():  # finite weights whose output overflows
            for parameter in predictor.net.parameters():
                parameter.fill_(1e30)
        with pytest.raises(CarvanaError, match=str(net_folder)):
            predictor(np.full((64, 96, 3), 255, np.uint8))


class TestStopwatch:
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

    def test_a_gpu_is_asked_only_in_the_end(self, monkeypatch: pytest.MonkeyPatch) -> None:
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


class TestNetDigest:
    def test_files_are_named_as_nets_name_them(self) -> None:
        assert (workspace.CONFIG, workspace.WEIGHTS) == (workspace.CONFIG, workspace.WEIGHTS)

    def test_architecture_and_weights_count(self, net_folder: Path) -> None:
        digests = {workspace.net_digest(net_folder, "last")}
        networks.save_config(net_folder, TINY, InputSettings(size=(32, 64)), {})
        digests.add(workspace.net_digest(net_folder, "last"))
        networks.save_weights(
            net_folder / workspace.WEIGHTS["last"], networks.build_model(TINY, SMALL, seed=6).state_dict()
        )
        digests.add(workspace.net_digest(net_folder, "last"))
        assert len(digests) == 3
        with pytest.raises(CarvanaError, match="holds no trained net"):
            workspace.net_digest(net_folder, "best")


class TestDevices:
    def test_half_precision_is_for_gpus(self) -> None:
        with pytest.raises(CarvanaError, match="precision: 16 needs a GPU"):
            resolve_precision("16", torch.device("cpu"))

    def test_words(self) -> None:
        assert device_label(torch.device("cpu"), torch.bfloat16) == "the CPU in bfloat16"

    def test_no_gpu_where_one_was_asked_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(CarvanaError, match=r"device: gpu.*nvidia-smi"):
            resolve_device("gpu")

    @pytest.mark.parametrize(
        ("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]
    )
    def test_auto_precision_on_gpus(
        self, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype
    ) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        assert resolve_precision("auto", torch.device("cuda")) == dtype

    @pytest.mark.parametrize(("amx", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
    def test_auto_precision_on_cpus(self, monkeypatch: pytest.MonkeyPatch, amx: bool, dtype: torch.dtype) -> None:
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
        assert resolve_precision("auto", torch.device("cpu")) == dtype


class Drawn:
    """Discs, so small that a net learns them in a second."""

    def __init__(self, height: int = 1280, width: int = 1918) -> None:
        self.rows, self.columns = np.mgrid[:height, :width]

    def mask(self, image_id: str) -> NDArray[np.uint8]:
        offset = int(image_id) * 60
        disc = (self.rows - 640) ** 2 + (self.columns - 700 - offset) ** 2 < 300**2
        return disc.astype(np.uint8)

    def image(self, image_id: str) -> NDArray[np.uint8]:
        return np.repeat(self.mask(image_id)[..., None] * np.uint8(120) + np.uint8(60), 3, axis=2)


@pytest.fixture(scope="module")
def examples() -> CachedImages:
    return CachedImages.load([str(n) for n in range(6)], Drawn(), InputSettings(size=(32, 48)), cache_gb=1)


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
        car = item["image"][0].float() - 60
        assert (car / 120 - item["target"][0].float() / 255).abs().mean() < 0.02

    def test_crops(self, examples: CachedImages) -> None:
        item = TrainingSet(examples, settings(crop=(16, 24)), 0)[(0, 0)]
        assert item["image"].shape == (3, 16, 24)
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
