"""Segmentation of users' images: loading, masks equal to the submission's, and ``carvana segment``."""

import io
import resource
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pipeline import workspace
from pipeline.cli import main
from pipeline.competition import rle
from pipeline.competition.image_ids import format_image_id, image_filename
from pipeline.config import EnsembleSettings, InputSettings, ModelConfig, SmpUNetConfig, UNetConfig, read_params
from pipeline.data.competition_data import CompetitionData
from pipeline.data.decoding import decode_jpeg
from pipeline.ensemble.evaluation import build_mask_builder
from pipeline.ensemble.merge import MergeRule
from pipeline.ensemble.submission_writer import shard_rows
from pipeline.errors import CarvanaError, CorruptFileError
from pipeline.export.writers import save as save_model
from pipeline.inference.onnx_predictor import OnnxMetadata
from pipeline.inference.prediction_store import PredictionStore, PredictJob, write_predictions
from pipeline.inference.probability_map import ProbabilityMap
from pipeline.inference.torch_predictor import TorchPredictor
from pipeline.inference.torch_predictor import predict_stream as competition_stream
from pipeline.models import networks, weights
from pipeline.models.resize import to_network_input
from pipeline.segment import batch, segmenter
from pipeline.segment.image_loader import ImageLimits, image_area, load_image
from pipeline.segment.outputs import (
    SegmentJob,
    check_conflicts,
    cutout_png,
    mask_png,
    overlay,
    overlay_jpg,
    plan_outputs,
    rle_row,
)
from pipeline.segment.segmenter import RawPredictions, Segmenter
from tests.end_to_end.dvc_project import Project
from tests.import_probe import HEAVY_MODULES, loaded_modules

Pixels = NDArray[np.uint8]

pytestmark = pytest.mark.usefixtures("one_thread")

COLORS = np.asarray(
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)).resize((72, 48)), np.uint8
)
"""A smooth image (48, 72, 3) without any symmetry."""

RGB = Image.fromarray(COLORS)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decoded(data: bytes) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(data)), np.uint8)


LOSSLESS: dict[str, dict[str, Any]] = {"PNG": {}, "WEBP": {"lossless": True}}
TRANSPARENT = np.dstack([COLORS, np.full((48, 72), 255, np.uint8)])
TRANSPARENT[10:20, 30:50, 3] = 0
OVER_WHITE = COLORS.copy()
OVER_WHITE[10:20, 30:50] = 255
GREY = np.asarray(RGB.convert("L"), np.uint8)
PALETTE = RGB.convert("P")
SIXTEEN = (GREY.astype(np.uint16) << 8) + 77

ANY = {
    "PNG": encoded(RGB, "PNG"),
    "PNG, palette": encoded(PALETTE, "PNG"),
    "PNG, 16 bits": encoded(Image.fromarray(SIXTEEN), "PNG"),
    "PNG, transparent": encoded(Image.fromarray(TRANSPARENT), "PNG"),
    "PNG, interlaced rows of one bit": encoded(RGB.convert("1"), "PNG"),
    "JPEG": encoded(RGB, "JPEG", quality=95),
    "JPEG, progressive": encoded(RGB, "JPEG", quality=95, progressive=True),
    "JPEG, grey": encoded(RGB.convert("L"), "JPEG", quality=95),
    "JPEG, CMYK": encoded(RGB.convert("CMYK"), "JPEG", quality=95),
    "WebP": encoded(RGB, "WEBP", quality=95),
    "WebP, lossless": encoded(RGB, "WEBP", lossless=True),
    "WebP, transparent": encoded(Image.fromarray(TRANSPARENT), "WEBP", lossless=True),
}


class TestLoadImage:
    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_upright_by_exif(self, kind: str, orientation: int) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options = LOSSLESS.get(kind, {"quality": 98, "subsampling": 0})
        data = encoded(RGB, kind, exif=exif.tobytes(), **options)
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        image_HWC = load_image(data, "a")
        assert image_HWC.shape == ((48, 72, 3) if orientation < 5 else (72, 48, 3))
        assert image_HWC.flags.c_contiguous
        np.testing.assert_allclose(image_HWC.astype(int), np.asarray(upright, int), atol=1)

    @pytest.mark.parametrize("kind", ["PNG", "WEBP"])
    def test_exif_that_ends_within_a_number(self, kind: str) -> None:
        data = encoded(RGB, kind, exif=b"MM\0*", **({"lossless": True} if kind == "WEBP" else {}))
        np.testing.assert_array_equal(load_image(data, "a"), COLORS)

    def test_a_header_that_makes_no_sense(self) -> None:
        with pytest.raises(CorruptFileError, match=r"car\.png"):
            load_image(b"\x89PNG\r\n\x1a\n" + bytes(40), "car.png")

    @pytest.mark.parametrize(
        "exif", [b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0nonsense", b"\xff" * 40]
    )
    def test_damaged_exif_leaves_an_image_as_stored(self, exif: bytes) -> None:
        np.testing.assert_array_equal(load_image(encoded(RGB, "PNG", exif=b"Exif\0\0" + exif), "a"), COLORS)

    @pytest.mark.parametrize("orientation", [0, 9, 4000])
    def test_unknown_orientations_are_ignored(self, orientation: int) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        np.testing.assert_array_equal(load_image(encoded(RGB, "PNG", exif=exif), "a"), COLORS)

    @pytest.mark.parametrize(
        ("data", "expected"),
        [
            pytest.param(ANY["PNG"], COLORS, id="PNG"),
            pytest.param(ANY["WebP, lossless"], COLORS, id="WebP"),
            pytest.param(ANY["PNG, transparent"], OVER_WHITE, id="transparent PNG"),
            pytest.param(ANY["WebP, transparent"], OVER_WHITE, id="transparent WebP"),
            pytest.param(encoded(RGB.convert("L"), "PNG"), np.dstack([GREY] * 3), id="gray"),
            pytest.param(encoded(RGB.convert("LA"), "PNG"), np.dstack([GREY] * 3), id="grey with alpha"),
            pytest.param(ANY["PNG, palette"], np.asarray(PALETTE.convert("RGB")), id="palette"),
            pytest.param(ANY["PNG, 16 bits"], np.dstack([np.rint(SIXTEEN / 257)] * 3), id="16 bits"),
            pytest.param(
                ANY["PNG, interlaced rows of one bit"], np.asarray(RGB.convert("1").convert("RGB")), id="one bit"
            ),
            pytest.param(
                encoded(RGB, "WEBP", lossless=True, save_all=True, append_images=[RGB.rotate(180)]),
                COLORS,
                id="the first frame of an animation",
            ),
            pytest.param(
                encoded(RGB, "PNG", save_all=True, append_images=[RGB.rotate(180)]), COLORS, id="an animated PNG"
            ),
        ],
    )
    def test_every_color_mode_becomes_rgb(self, data: bytes, expected: Pixels) -> None:
        image_HWC = load_image(data, "a")
        assert image_HWC.dtype == np.uint8
        np.testing.assert_array_equal(image_HWC, expected)

    @pytest.mark.parametrize("kind", ["JPEG", "JPEG, progressive", "JPEG, CMYK"])
    def test_jpegs(self, kind: str) -> None:
        assert np.abs(load_image(ANY[kind], "a").astype(int) - COLORS).mean() < 3

    def test_half_transparent_pixels_are_mixed_with_white(self) -> None:
        half = np.dstack([np.zeros((4, 4, 3), np.uint8), np.full((4, 4), 128, np.uint8)])
        assert load_image(encoded(Image.fromarray(half), "PNG"), "a").tolist() == [[[127] * 3] * 4] * 4

    @pytest.mark.parametrize("mode", ["RGB", "L", "P"])
    def test_a_transparent_color_becomes_white(self, mode: str) -> None:
        source = RGB.convert(mode)
        key = source.getpixel((3, 2))
        white = load_image(encoded(source, "PNG", transparency=key), "a")[2, 3]
        assert white.tolist() == [255, 255, 255]

    def test_a_transparent_16_bit_gray_becomes_white(self) -> None:
        data = encoded(Image.fromarray(SIXTEEN), "PNG", transparency=int(SIXTEEN[2, 3]))
        transparent_HW = SIXTEEN[2, 3] == SIXTEEN
        assert (load_image(data, "a")[..., 0] == 255).tolist() == transparent_HW.tolist()

    def test_a_second_image_after_the_first_is_ignored(self) -> None:
        data = encoded(RGB, "MPO", save_all=True, append_images=[RGB.rotate(180)], quality=95)
        np.testing.assert_array_equal(load_image(data, "a"), load_image(ANY["JPEG"], "b"))

    @pytest.mark.parametrize("kind", ANY)
    def test_files_truncated_at_any_byte_are_refused(self, kind: str) -> None:
        data = ANY[kind]
        for length in {20, 60, len(data) // 3, len(data) // 2, len(data) - 200, len(data) - 20, len(data) - 8}:
            with pytest.raises(CorruptFileError, match=rf"car\.x.*{kind.partition(',')[0]}"):
                load_image(data[:length], "car.x")

    @pytest.mark.parametrize("kind", [kind for kind in ANY if kind.startswith("PNG")])
    def test_a_flipped_bit_of_a_png_is_an_error(self, kind: str) -> None:
        data = bytearray(ANY[kind])
        data[len(data) // 2] ^= 4
        with pytest.raises(CorruptFileError, match="PNG"):
            load_image(bytes(data), "a")

    @pytest.mark.parametrize("kind", ["JPEG", "JPEG, CMYK"])
    def test_a_jpeg_with_a_stretch_of_nonsense_is_an_error(self, kind: str) -> None:
        data = ANY[kind]
        with pytest.raises(CorruptFileError, match="JPEG"):
            load_image(data[: len(data) // 2] + b"\xff\xc0\xff\xd9" + data[len(data) // 2 + 40 :], "a")

    @pytest.mark.parametrize(
        "data",
        [b"", b"hello", encoded(RGB, "GIF"), encoded(RGB, "TIFF"), encoded(RGB, "BMP"), b"RIFF1234WAVEfmt "],
        ids=["nothing", "text", "GIF", "TIFF", "BMP", "sound"],
    )
    def test_other_types_are_refused(self, data: bytes) -> None:
        with pytest.raises(CorruptFileError, match=r"car\.jpg.*JPEG, PNG or WebP"):
            load_image(data, "car.jpg")

    def test_file_type_follows_content_not_suffix(self, tmp_path: Path) -> None:
        (tmp_path / "car.jpg").write_bytes(ANY["PNG"])
        np.testing.assert_array_equal(load_image(tmp_path / "car.jpg", "car.jpg"), COLORS)

    def test_a_file_that_is_not_there_is_no_fault_of_its_content(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            load_image(tmp_path / "gone.png", "gone.png")

    @pytest.mark.parametrize("limit", [{"bytes": 500}, {"pixels": 48 * 72 - 1}, {"side": 71}])
    def test_too_large(self, tmp_path: Path, limit: dict[str, int]) -> None:
        (tmp_path / "a.png").write_bytes(ANY["PNG"])
        for source in (ANY["PNG"], tmp_path / "a.png"):
            with pytest.raises(CorruptFileError, match=r"a\.png"):
                load_image(source, "a.png", ImageLimits(**limit))
        assert load_image(ANY["PNG"], "a", ImageLimits(bytes=len(ANY["PNG"]), pixels=48 * 72, side=72)).shape == (
            48,
            72,
            3,
        )

    @pytest.mark.filterwarnings("ignore:Image size")
    @pytest.mark.parametrize("size", [(60_000, 60_000), (12_000, 12_000), (2_000_000, 40)])
    def test_bombs_are_refused_before_they_unpack(self, tmp_path: Path, size: tuple[int, int]) -> None:
        before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        (tmp_path / "bomb.png").write_bytes(bomb(*size))
        with pytest.raises(CorruptFileError, match=r"bomb\.png"):
            load_image(tmp_path / "bomb.png", "bomb.png")
        assert image_area(tmp_path / "bomb.png") == 0
        assert time.perf_counter() - begun < 1
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10, "KB"

    def test_a_jpeg_of_endless_scans_is_refused_before_they_are_decoded(self) -> None:
        data = encoded(Image.new("RGB", (5000, 5000)), "JPEG", progressive=True)
        assert load_image(data, "a", ImageLimits(scans=10)).shape == (5000, 5000, 3)
        last = data[data.rindex(b"\xff\xda") : -2]
        begun = time.perf_counter()
        with pytest.raises(CorruptFileError, match=r"car\.jpg.*5010.*100"):
            load_image(data[:-2] + last * 5000 + data[-2:], "car.jpg")
        assert time.perf_counter() - begun < 1

    def test_the_header_tells_how_many_pixels(self, tmp_path: Path) -> None:
        for name, data in {"a": ANY["JPEG"], "b": ANY["WebP"], "c": b"", "d": b"hello"}.items():
            (tmp_path / name).write_bytes(data)
        assert [image_area(tmp_path / name) for name in "abcd"] == [48 * 72, 48 * 72, 0, 0]

    def test_real_photographs_are_read_as_the_competitions(self, real_carvana: Path) -> None:
        photos = CompetitionData(real_carvana).test
        name = photos.files[photos.ids()[0]]
        data = photos.archive.read(name)
        np.testing.assert_array_equal(load_image(data, name), decode_jpeg(data, name))


def bomb(width: int, height: int) -> bytes:
    """A PNG of one color that unpacks to gigabytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1 << 20))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


class TestWhatNetsSee:
    NET = InputSettings(size=(32, 48))

    def test_a_large_image_is_averaged(self) -> None:
        import cv2

        image_HWC = np.random.default_rng(1).integers(0, 256, (128, 190, 3), dtype=np.uint8)
        expected = cv2.resize(image_HWC, (48, 32), interpolation=cv2.INTER_AREA)
        np.testing.assert_allclose(to_network_input(image_HWC, self.NET), expected, atol=1)

    def test_a_flat_image_is_shrunk_in_width_and_enlarged_in_height(self) -> None:
        stripes_HWC = np.zeros((8, 4800, 3), np.uint8)
        stripes_HWC[:, ::2] = 255
        seen_HWC = to_network_input(stripes_HWC, self.NET)
        assert seen_HWC.shape == (32, 48, 3)
        assert set(np.unique(seen_HWC).tolist()) <= {127, 128}, (
            "OpenCV's area average alone would pick some of the stripes"
        )

    def test_a_small_image_is_enlarged_smoothly(self) -> None:
        ramp_HWC = np.repeat(np.linspace(0, 240, 12, dtype=np.uint8)[None, :, None], 8, axis=0).repeat(3, axis=2)
        row = to_network_input(ramp_HWC, self.NET)[16, 4:-4, 0].astype(int)
        assert (np.diff(row) > 0).all()


TINY = UNetConfig(architecture="unet", widths=(4, 8))
GRAY_TINY = InputSettings(size=(32, 32), channels="gray")
COLOUR_TINY = InputSettings(size=(32, 48))


def save_net(folder: Path, spec: ModelConfig, input: InputSettings, seed: int) -> None:
    weights.save_config(folder, spec, input, {})
    weights.save_weights(folder / workspace.WEIGHTS["last"], networks.build_model(spec, input, seed).state_dict())


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with nets that have learned nothing: two folds of one that sees grey, two of one with an encoder."""
    changes = {
        "folds.count": 2,
        "folds.active": [0, 1],
        "models.specs.gray": {
            "architecture": "unet",
            "widths": [4, 8],
            "input": {"size": [32, 32], "channels": "gray"},
        },
        "models.specs.encoder": {"architecture": "smp_unet", "encoder": "resnet18", "decoder_channels": [16, 8, 8]},
        "models.active": ["gray", "encoder"],
        "input.size": [32, 48],
        "hardware.device": "cpu",
        "predict.precision": "32",
        "ensemble.weights": {"gray": 2},
        "ensemble.merge": "mean_logit",
        "ensemble.threshold": 0.47,
        "ensemble.postprocess": ["refine_edges", "keep_largest", "fill_holes"],
    }
    folder = Project(tmp_path_factory.mktemp("serving") / "project", changes).folder
    encoder = SmpUNetConfig(architecture="smp_unet", encoder="resnet18", decoder_channels=(16, 8, 8))
    for fold in (0, 1):
        save_net(folder / "folds/gray" / str(fold), TINY, GRAY_TINY, seed=fold)
        save_net(folder / "folds/encoder" / str(fold), encoder, COLOUR_TINY, seed=fold)
    return folder


@pytest.fixture(scope="module")
def masker(project: Path) -> Segmenter:
    names = [f"{model}/{fold}" for model in ("gray", "encoder") for fold in (0, 1)]
    return Segmenter(
        {name: segmenter.load_predictor(name, ["identity", "hflip"], device="cpu", project=project) for name in names}
    )


def noise(height: int, width: int, seed: int = 0) -> Pixels:
    small = np.random.default_rng(seed).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC), np.uint8)


class TestSegmenter:
    @pytest.mark.parametrize("size", [(120, 180), (300, 100), (20, 30), (1, 1), (7, 500)])
    @pytest.mark.parametrize("merge", ["mean_probability", "mean_logit", "majority_vote"])
    def test_any_size_is_merged_as_submissions_are(self, masker: Segmenter, size: tuple[int, int], merge: Any) -> None:
        image_HWC = noise(*size)
        looked = masker.predict(image_HWC)
        settings = EnsembleSettings(merge=merge, threshold=0.48, weights={"encoder": 3})
        maps = []
        for net in masker.nets.values():
            levels_VHW = net.predict_u8([net.preprocess(image_HWC)], *size)[0]
            maps.append(ProbabilityMap.crop("", "", 2, levels_VHW.sum(axis=0, dtype=np.uint16)))
        expected_HW = MergeRule(merge, 0.48, (2, 2, 2, 2), (1, 1, 3, 3)).mask(maps, *size)
        np.testing.assert_array_equal(masker.segment(looked, settings), expected_HW)
        masked = masker.combine(looked, settings)
        np.testing.assert_array_equal(masked.mask_HW, expected_HW)
        assert masked.probability_HW.shape == masked.disagreement_HW.shape == looked.size == size
        total_HW = sum(
            weight * m.to_full_size(*size).astype(float) for weight, m in zip((1, 1, 3, 3), maps, strict=True)
        )
        np.testing.assert_allclose(masked.probability_HW, total_HW / 16, atol=0.51)

    def test_settings_change_without_a_forward_pass(self, masker: Segmenter) -> None:
        looked = masker.predict(noise(60, 90))
        asleep = Segmenter({})
        for names in (["gray/0"], ["gray/0", "encoder/1"]):
            for views in (["identity"], ["hflip"], ["hflip", "identity"]):
                masked = asleep.combine(looked, EnsembleSettings(threshold=0.5), names, views)
                total_HW = np.zeros((60, 90))
                for name in names:
                    total_HW += sum(looked.maps[name][view].to_full_size(60, 90).astype(float) for view in views)
                np.testing.assert_array_equal(masked.mask_HW, total_HW >= 127.5 * len(names) * len(views))
                assert list(masked.seconds) == ["prepare", *names, "merge"]

    def test_disagreement(self, masker: Segmenter) -> None:
        looked, settings = masker.predict(noise(60, 90)), EnsembleSettings()
        alone = [masker.combine(looked, settings, [name]) for name in ("gray/0", "gray/1")]
        both = masker.combine(looked, settings, ["gray/0", "gray/1"])
        np.testing.assert_array_equal(both.disagreement_HW, np.where(alone[0].mask_HW != alone[1].mask_HW, 255, 0))
        probability_HW = alone[0].probability_HW.astype(float)
        np.testing.assert_allclose(alone[0].disagreement_HW, 255 - abs(2 * probability_HW - 255), atol=2)

    def test_nothing_chosen(self, masker: Segmenter) -> None:
        looked = masker.predict(noise(8, 8))
        with pytest.raises(CarvanaError, match="No net"):
            masker.combine(looked, EnsembleSettings(), [])
        with pytest.raises(CarvanaError, match="identity, hflip"):
            masker.segment(looked, EnsembleSettings(), views=["scale:0.5"])

    def test_images_of_any_sizes_share_a_batch(self, masker: Segmenter, monkeypatch: pytest.MonkeyPatch) -> None:
        images = [noise(40, 60, 1), noise(90, 50, 2), noise(33, 200, 3)]
        alone = [masker.predict(image_HWC) for image_HWC in images]
        passes: list[int] = []
        for net in masker.nets.values():
            assert isinstance(net, TorchPredictor)
            monkeypatch.setattr(net, "_logits", counting(net._logits, passes))
        together = masker.predict_batch([masker.prepare(image_HWC) for image_HWC in images])
        assert passes == [3] * 4 * 2, "of each net and view"
        for one, other in zip(alone, together, strict=True):
            for name, by_view in one.maps.items():
                for view, level_map in by_view.items():
                    levels = [m.to_full_size(*one.size).astype(int) for m in (level_map, other.maps[name][view])]
                    np.testing.assert_allclose(*levels, atol=1)

    def test_native_input_is_limited_to_the_competitions_pixel_count(self, tmp_path: Path) -> None:
        save_net(tmp_path / "net", TINY, InputSettings(size="native"), seed=0)
        masker = Segmenter({"native": segmenter.load_predictor(str(tmp_path / "net"), ["identity"], device="cpu")})
        small, exact, large = (
            masker.prepare(np.zeros((*size, 3), np.uint8)) for size in ((30, 40), (1280, 1918), (4000, 3000))
        )
        assert small.inputs["native"].shape == (30, 40, 3)
        assert exact.inputs["native"] is exact.image_HWC
        height, width, _ = large.inputs["native"].shape
        assert height * width == pytest.approx(1280 * 1918, rel=2e-3)
        assert height / width == pytest.approx(4 / 3, rel=2e-3)
        assert [looked.size for looked in masker.predict_batch([small, masker.prepare(noise(30, 40))])] == [
            (30, 40)
        ] * 2


def counting(logits: Callable[..., Any], passes: list[int]) -> Callable[..., Any]:
    def counted(view: Any, pixels_BCHW: Any) -> Any:
        passes.append(len(pixels_BCHW))
        return logits(view, pixels_BCHW)

    return counted


def save_onnx(path: Path, kind: Literal["net", "ensemble"] = "net", **facts: Any) -> None:
    """Write an export for which what is dark is car: a net's logits, or an ensemble's probabilities at some size."""
    onnx = pytest.importorskip("onnx")
    make, floats = onnx.helper.make_node, onnx.TensorProto.FLOAT
    constants = {"slope": -0.1, "middle": 12.0, "scale": 1 / 255}
    parts = [onnx.numpy_helper.from_array(np.float32(value), name) for name, value in constants.items()]
    if kind == "net":
        nodes = [make("Mul", ["pixels", "slope"], ["x"]), make("Add", ["x", "middle"], ["logits"])]
        gives, wants = "logits", [onnx.helper.make_tensor_value_info("pixels", floats, ["b", 1, "h", "w"])]
    else:
        parts.append(onnx.numpy_helper.from_array(np.int64([0]), "first"))
        nodes = [make("Expand", ["scale", "size"], ["x"]), make("Mul", ["x", "level"], ["y"])]
        nodes += [make("Unsqueeze", ["y", "first"], ["mean_probability"])]
        parts.append(onnx.numpy_helper.from_array(np.float32(100), "level"))
        gives, wants = (
            "mean_probability",
            [
                onnx.helper.make_tensor_value_info("pixels", onnx.TensorProto.UINT8, ["b", 1, "h", "w"]),
                onnx.helper.make_tensor_value_info("size", onnx.TensorProto.INT64, [2]),
            ],
        )
    given = onnx.helper.make_tensor_value_info(gives, floats, None)
    model = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "g", wants, [given], parts),
        opset_imports=[onnx.helper.make_opsetid("", 18)],
        ir_version=9,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    save_model(model, OnnxMetadata(kind=kind, model="gray", folds=(0,), input=GRAY_TINY, **facts), path)


class TestExports:
    def test_a_net_predicts_where_there_is_no_torch(self, tmp_path: Path) -> None:
        save_onnx(tmp_path / "dark.onnx")
        touch(tmp_path, "in/a.png")
        arguments = ["segment", "in", "--out", "out", "--net", "dark.onnx", "--views", "hflip", "scale:0.5"]
        code = f"import sys; sys.modules['torch'] = None; from pipeline.cli import main; main({arguments})"
        run = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
        )
        assert run.returncode == 0, run.stderr
        mask_HW = decoded((tmp_path / "out/a_mask.png").read_bytes()) > 0
        assert 0.1 < mask_HW.mean() < 0.9
        assert GREY[mask_HW].mean() < 120 < GREY[~mask_HW].mean()

    def test_with_nets_of_other_kinds(self, project: Path, tmp_path: Path) -> None:
        save_onnx(tmp_path / "exports/dark/model.onnx")
        dark = segmenter.load_predictor("exports/dark/model.onnx", ["identity"], project=tmp_path)
        masker = Segmenter(
            {"dark": dark, "gray/0": segmenter.load_predictor("gray/0", ["identity", "hflip"], project=project)}
        )
        looked = masker.predict(COLORS)
        assert [list(by_view) for by_view in looked.maps.values()] == [["identity"], ["identity", "hflip"]]
        total_HW = looked.maps["dark"]["identity"].to_full_size(48, 72) * 2.0
        total_HW += sum(level_map.to_full_size(48, 72).astype(float) for level_map in looked.maps["gray/0"].values())
        np.testing.assert_array_equal(masker.segment(looked, EnsembleSettings()), total_HW >= 2 * 255)

    def test_an_ensembles_file_has_its_own_views_and_threshold(
        self, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        touch(tmp_path, "in/a.png")
        monkeypatch.chdir(tmp_path)
        for cut, expected in ((0.3, 255), (0.5, 0)):
            save_onnx(tmp_path / "all.onnx", "ensemble", threshold=cut)
            out = f"out{cut}"
            assert carvana("in", "--out", out, "--net", "all.onnx", "--views", "hflip") == 0
            assert np.unique(decoded((tmp_path / out / "a_mask.png").read_bytes())).tolist() == [expected]

    def test_list_models_finds_nets_and_exports(self, tmp_path: Path) -> None:
        touch(tmp_path, "exports/gray/int8.onnx", "exports/gray/model.onnx", "exports/gray/card.json")
        assert segmenter.list_models(tmp_path) == ["exports/gray/int8.onnx", "exports/gray/model.onnx"]
        assert segmenter.resolve("exports/gray/model.onnx", tmp_path) == ["exports/gray/model.onnx"]


class TestNets:
    def test_model_names_are_expanded(self, project: Path, tmp_path: Path) -> None:
        all_four = ["encoder/0", "encoder/1", "gray/0", "gray/1"]
        assert segmenter.list_models(project) == all_four
        assert segmenter.list_models(tmp_path) == []
        assert segmenter.resolve("gray", project) == ["gray/0", "gray/1"]
        assert segmenter.resolve("folds/gray/1/", project) == segmenter.resolve("gray/1", project) == ["gray/1"]
        assert segmenter.resolve(str(project / "folds/gray"), tmp_path) == [
            f"{project}/folds/gray/{fold}" for fold in (0, 1)
        ]

    def test_ten_comes_after_nine(self, tmp_path: Path) -> None:
        for fold in range(12):
            (tmp_path / "folds/a" / str(fold)).mkdir(parents=True)
            (tmp_path / "folds/a" / str(fold) / "config.json").touch()
        assert (
            segmenter.resolve("a", tmp_path) == segmenter.list_models(tmp_path) == [f"a/{fold}" for fold in range(12)]
        )

    def test_unfinished_nets_are_not_listed(self, tmp_path: Path) -> None:
        for made in ("folds/a/.0.part/config.json", "exports/a/.x.part/model.onnx", "folds/.a.part/0/config.json"):
            (tmp_path / made).parent.mkdir(parents=True)
            (tmp_path / made).touch()
        assert segmenter.list_models(tmp_path) == []
        with pytest.raises(CarvanaError, match="'a'"):
            segmenter.resolve("a", tmp_path)

    def test_unknown_net_is_named(self, project: Path, tmp_path: Path) -> None:
        with pytest.raises(CarvanaError, match=r"'grey'.*encoder/0.*\.onnx"):
            segmenter.resolve("grey", project)
        with pytest.raises(CarvanaError, match="'gray/0'"):
            segmenter.load_predictor("gray/0", ["identity"], project=tmp_path)


class TestOutputs:
    IMAGE, MASK = noise(20, 31), noise(20, 31, 1)[..., 0] > 120

    def test_masks_are_0_and_255(self) -> None:
        np.testing.assert_array_equal(decoded(mask_png(self.MASK)), self.MASK * np.uint8(255))

    def test_cutouts_hold_the_car_and_nothing_else(self) -> None:
        rgba_HWC = decoded(cutout_png(self.IMAGE, self.MASK))
        np.testing.assert_array_equal(rgba_HWC[..., 3], self.MASK * np.uint8(255))
        np.testing.assert_array_equal(rgba_HWC[self.MASK][:, :3], self.IMAGE[self.MASK])
        assert not rgba_HWC[~self.MASK].any()

    def test_overlays_tint_the_car_and_leave_the_rest(self) -> None:
        mask_HW = np.zeros((20, 31), np.bool_)
        mask_HW[5:15, 5:25] = True
        over_HWC = overlay(self.IMAGE, mask_HW)
        np.testing.assert_array_equal(over_HWC[~mask_HW], self.IMAGE[~mask_HW])
        assert (over_HWC[mask_HW] != self.IMAGE[mask_HW]).any(axis=1).all()
        assert over_HWC[5, 5].tolist() != over_HWC[10, 10].tolist(), "outlined"
        assert decoded(overlay_jpg(self.IMAGE, mask_HW)).shape == (20, 31, 3)

    def test_rows_are_the_competitions_and_odd_names_are_quoted(self) -> None:
        assert rle_row("0cdf5b5d0ce1_01.jpg", self.MASK) == f"0cdf5b5d0ce1_01.jpg,{rle.encode(self.MASK)}\n"
        assert rle_row('a, "b".png', self.MASK[:0]) == '"a, ""b"".png",\n'


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"text" if name.endswith(".txt") else ANY["PNG"])


class TestJobs:
    def test_folders_are_searched_below_and_kept(self, tmp_path: Path) -> None:
        touch(tmp_path, "in/b.PNG", "in/a.jpeg", "in/sub/deep/c.webp", "in/.hidden/d.jpg", "in/._a.jpg", "in/note.txt")
        jobs = plan_outputs([tmp_path / "in"], tmp_path / "out")
        assert [str(job.path.relative_to(tmp_path)) for job in jobs] == ["in/a.jpeg", "in/b.PNG", "in/sub/deep/c.webp"]
        assert [str(job.target("mask").relative_to(tmp_path)) for job in jobs] == [
            "out/a_mask.png",
            "out/b_mask.png",
            "out/sub/deep/c_mask.png",
        ]

    def test_a_file_is_taken_whatever_its_suffix_and_once(self, tmp_path: Path) -> None:
        touch(tmp_path, "in/a", "in/b.jpg")
        jobs = plan_outputs([tmp_path / "in/a", tmp_path / "in/b.jpg", tmp_path / "in"], tmp_path / "out")
        assert [job.path.name for job in jobs] == ["a", "b.jpg"]

    def test_dots_in_names(self, tmp_path: Path) -> None:
        touch(tmp_path, "a.b.jpg")
        assert plan_outputs([tmp_path], tmp_path / "out")[0].target("cutout") == tmp_path / "out/a.b_cutout.png"

    def test_results_in_the_input_folder_are_not_inputs(self, tmp_path: Path) -> None:
        touch(tmp_path, "a.jpg", "out/a_mask.png")
        assert [job.path.name for job in plan_outputs([tmp_path], tmp_path / "out")] == ["a.jpg"]

    def test_missing_inputs_and_wrong_suffixes(self, tmp_path: Path) -> None:
        touch(tmp_path, "in/a.jpg", "file")
        (tmp_path / "empty").mkdir()
        out = tmp_path / "out"
        for paths, folder, words in (
            ([tmp_path / "gone"], out, "gone does not exist"),
            ([tmp_path / "empty"], out, "images"),
            ([tmp_path / "in"], tmp_path / "file", "file is a file"),
            ([tmp_path / "in"], tmp_path / "file/below", "file is a file"),
            ([tmp_path / "in"], tmp_path / "in", "in holds the input images"),
        ):
            with pytest.raises(CarvanaError, match=words):
                plan_outputs(paths, folder)

    def test_inputs_with_the_same_output_are_refused(self, tmp_path: Path) -> None:
        touch(tmp_path, "one/a.jpg", "two/a.png", "three/sub/a.jpg")
        out = tmp_path / "out"
        with pytest.raises(CarvanaError, match=r"one/a\.jpg.*two/a\.png.*a_mask\.png"):
            check_conflicts(plan_outputs([tmp_path / "one", tmp_path / "two"], out), ["mask"], None, overwrite=True)
        jobs = plan_outputs([tmp_path / "one", tmp_path / "three"], out)
        check_conflicts(jobs, ["mask"], None, overwrite=False)
        with pytest.raises(CarvanaError, match=r"one/a\.jpg.*three/sub/a\.jpg.*masks\.csv"):
            check_conflicts(jobs, ["mask"], out / "masks.csv", overwrite=False)

    def test_results_never_replace_an_input(self, tmp_path: Path) -> None:
        touch(tmp_path, "sub/a.jpg", "a_mask.png")
        jobs = plan_outputs([tmp_path / "sub", tmp_path / "a_mask.png"], tmp_path)
        with pytest.raises(CarvanaError, match=r"a_mask\.png"):
            check_conflicts(jobs, ["mask"], None, overwrite=True)

    def test_outputs_blocked_by_files_are_refused(self, tmp_path: Path) -> None:
        touch(tmp_path, "in/a.jpg", "in/sub/b.jpg", "out/sub", "other/a_mask.png/mine.txt")
        with pytest.raises(CarvanaError, match="out/sub"):
            check_conflicts(plan_outputs([tmp_path / "in"], tmp_path / "out"), ["mask"], None, overwrite=True)
        with pytest.raises(CarvanaError, match=r"a_mask\.png"):
            check_conflicts(plan_outputs([tmp_path / "in"], tmp_path / "other"), ["mask"], None, overwrite=True)

    def test_overwriting(self, tmp_path: Path) -> None:
        touch(tmp_path, "in/a.jpg", "in/b.jpg", "in/c.jpg", "out/b_mask.png", "out/c_overlay.jpg", "out/masks.csv")
        jobs, out = plan_outputs([tmp_path / "in"], tmp_path / "out"), tmp_path / "out"
        check_conflicts(jobs, ["cutout"], None, overwrite=False)
        with pytest.raises(CarvanaError, match=r"out/b_mask\.png.*--overwrite"):
            check_conflicts(jobs, ["mask"], None, overwrite=False)
        with pytest.raises(CarvanaError, match=r"masks\.csv.*\b2\b"):
            check_conflicts(jobs, ["mask", "overlay"], out / "masks.csv", overwrite=False)
        check_conflicts(jobs, ["mask", "overlay"], out / "masks.csv", overwrite=True)


class TestStream:
    def test_in_order_with_faults_among_them(self, masker: Segmenter, tmp_path: Path) -> None:
        sizes = [(30 + 7 * number, 90 - 5 * number) for number in range(9)]
        for number, (height, width) in enumerate(sizes):
            Image.fromarray(noise(height, width)).save(tmp_path / f"{number}.png")
        for number in (0, 4, 5, 8):
            (tmp_path / f"{number}.png").write_bytes(ANY["PNG"][:99])
        jobs = [SegmentJob(tmp_path / f"{number}.png", tmp_path / str(number)) for number in range(9)]
        found = list(batch.predict_images(masker, jobs, lambda job, looked: looked.size, batch_size=2))
        assert [job for job, _ in found] == jobs
        for number, (_, result) in enumerate(found):
            if number in (0, 4, 5, 8):
                assert isinstance(result, CorruptFileError)
                assert str(tmp_path / f"{number}.png") in str(result)
            else:
                assert result == sizes[number]

    def test_few_bytes_are_under_way(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(batch, "MAX_IN_FLIGHT_BYTES", 10)
        monkeypatch.setattr(batch, "_MIN_ITEM_BYTES", 1)
        under_way, most = [0], [0]
        lock = threading.Lock()

        def work(size: int) -> int:
            with lock:
                under_way[0] += size
                most[0] = max(most[0], under_way[0])
            time.sleep(0.002)
            with lock:
                under_way[0] -= size
            return size

        items = [3, 4, 5, 1, 50, 2, 9, 9, 0, 0, 1] * 3
        with batch.ThreadPoolExecutor(4) as pool:
            assert list(batch.bounded_map(pool, work, items, lambda size: size)) == items
        assert most[0] == 50, "alone"

    def test_predict_images_raises_other_errors(self, masker: Segmenter, tmp_path: Path) -> None:
        touch(tmp_path, *(f"{number}.png" for number in range(4)))

        def fail(job: SegmentJob, looked: RawPredictions) -> None:
            raise PermissionError(13, "Permission denied", str(job.output_stem))

        with pytest.raises(PermissionError):
            list(batch.predict_images(masker, plan_outputs([tmp_path], tmp_path / "out"), fail, batch_size=2))


def carvana(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in ("segment", *arguments)])
    assert isinstance(end.value.code, int)
    return end.value.code


@pytest.fixture
def here(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(project)
    return project


class TestCommand:
    def test_masks_are_those_of_the_submission(
        self, here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        params, stores = read_params(), []
        image_ids = [format_image_id("0cdf5b5d0ce1", angle) for angle in (1, 2, 3)]
        files = {image_id: tmp_path / "in" / image_filename(image_id) for image_id in image_ids}
        (tmp_path / "in").mkdir()
        for seed, path in enumerate(files.values()):
            path.write_bytes(encoded(Image.fromarray(noise(1280, 1918, seed)), "JPEG"))

        def photograph(image_id: str) -> Pixels:
            return decode_jpeg(files[image_id].read_bytes(), image_id)

        for model, fold in params.ensemble_members():
            folder, views = here / "folds" / model / str(fold), params.predict.tta.test
            predictor = TorchPredictor(folder, views=views, device="cpu", precision=params.predict.precision)
            work = tmp_path / model / str(fold)
            work.mkdir(parents=True)
            job = PredictJob(image_ids, views, shard_images=8, test=True, net="")

            def predict(ids: Sequence[str], predictor: TorchPredictor = predictor) -> Any:
                return competition_stream(predictor, ids, photograph, (1280, 1918), 4, threads=1, merged=True)

            stores.append(PredictionStore(write_predictions(job, predict, work)))
        decision = build_mask_builder(params.ensemble, params.ensemble_members(), 2, photograph)
        rows = list(shard_rows(stores, decision, lambda _: "", 0))
        assert all(0.05 < rle.decode(row.split(",")[1], 1280, 1918).mean() < 0.95 for row in rows)

        assert carvana(tmp_path / "in", "--out", tmp_path / "out", "--write", "rle", "mask") == 0
        assert (tmp_path / "out/masks.csv").read_text().splitlines() == ["img,rle_mask", *rows]
        mask_HW = np.asarray(Image.open(tmp_path / f"out/{image_ids[2]}_mask.png"))
        assert rle.encode(mask_HW) == rows[2].split(",")[1]
        said = capsys.readouterr()
        assert "Predicting with gray/0, gray/1, encoder/0, encoder/1." in said.err
        assert "3 images (2.5 megapixels on average) in " in said.out

    def test_all_formats_for_any_images(self, here: Path, masker: Segmenter, tmp_path: Path) -> None:
        Image.fromarray(noise(50, 80)).save(tmp_path / "a.png")
        exif = Image.Exif()
        exif[0x0112] = 6
        (tmp_path / "b.jpg").write_bytes(encoded(RGB, "JPEG", exif=exif))
        (tmp_path / "sub").mkdir()
        Image.fromarray(noise(20, 10)).save(tmp_path / "sub/c.webp", lossless=True)
        kinds = ("mask", "overlay", "cutout", "rle")
        arguments = ("--net", "gray", "encoder/1", "--views", "hflip", "--threshold", "0.4", "--merge", "majority_vote")
        assert carvana(tmp_path, "--out", tmp_path / "out", "--write", *kinds, *arguments) == 0
        settings = EnsembleSettings(
            threshold=0.4,
            merge="majority_vote",
            weights={"gray": 2},
            postprocess=("refine_edges", "keep_largest", "fill_holes"),
        )
        rows = (tmp_path / "out/masks.csv").read_text().splitlines()[1:]
        for path, size, row in zip(("a.png", "b.jpg", "sub/c.webp"), ((50, 80), (72, 48), (20, 10)), rows, strict=True):
            image_HWC = load_image(tmp_path / path, path)
            mask_HW = masker.segment(masker.predict(image_HWC), settings, ["gray/0", "gray/1", "encoder/1"], ["hflip"])
            stem = tmp_path / "out" / Path(path).with_suffix("")
            written = {ending: decoded(Path(f"{stem}_{ending}").read_bytes()) for ending in ("mask.png", "cutout.png")}
            np.testing.assert_array_equal(written["mask.png"], mask_HW * np.uint8(255))
            np.testing.assert_array_equal(written["cutout.png"][..., 3], mask_HW * np.uint8(255))
            assert decoded(Path(f"{stem}_overlay.jpg").read_bytes()).shape == (*size, 3)
            assert row == f"{Path(path).name},{rle.encode(mask_HW)}"

    def test_what_is_corrupt_is_named_and_skipped_and_the_exit_code_says_so(
        self, here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        touch(tmp_path, "a.png", "b.png", "c.png")
        (tmp_path / "b.png").write_bytes(ANY["PNG"][:300])
        assert carvana(tmp_path, "--out", tmp_path / "out", "--net", "gray/0", "--write", "mask", "rle") == 1
        said = capsys.readouterr()
        assert f"skipped: {tmp_path}/b.png: not a valid PNG" in said.err
        assert "error: 1 of 3 images were skipped" in said.err
        assert "2 images (0.0 megapixels" in said.out
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a_mask.png", "c_mask.png", "masks.csv"]
        rows = (tmp_path / "out/masks.csv").read_text().splitlines()
        assert [row.partition(",")[0] for row in rows] == ["img", "a.png", "c.png"]

    def test_an_unreadable_file_is_skipped(
        self, here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        touch(tmp_path, "in/a.png")
        (tmp_path / "in/b.png").symlink_to(tmp_path / "gone.png")
        assert carvana(tmp_path / "in", "--out", tmp_path / "out", "--net", "gray/0") == 1
        assert "in/b.png" in capsys.readouterr().err
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["a_mask.png"]

    def test_nothing_is_overwritten_without_the_option(
        self, here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        touch(tmp_path, "in/a.png", "in/b.png")
        (tmp_path / "out").mkdir()
        (tmp_path / "out/b_mask.png").write_text("mine")
        arguments = (tmp_path / "in", "--out", tmp_path / "out", "--net", "gray/0")
        assert carvana(*arguments) == 1
        assert "out/b_mask.png. Add --overwrite" in capsys.readouterr().err
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["b_mask.png"], "nothing was written"
        assert carvana(*arguments, "--overwrite") == 0
        assert decoded((tmp_path / "out/b_mask.png").read_bytes()).shape == (48, 72)

    @pytest.mark.parametrize(
        ("arguments", "status", "words"),
        [
            (("--net", "grey"), 1, "'grey'"),
            (("--views", "vflip"), 1, "'vflip'"),
            (("--threshold", "1"), 2, "--threshold"),
            (("--threshold", "x"), 2, "--threshold"),
            (("--merge", "max"), 2, "--merge"),
            (("--write", "gif"), 2, "gif"),
        ],
    )
    def test_usage(
        self,
        here: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        arguments: tuple[str, ...],
        status: int,
        words: str,
    ) -> None:
        touch(tmp_path, "a.png")
        assert carvana(tmp_path, "--out", tmp_path / "out", *arguments) == status
        assert words in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_before_anything_is_trained(
        self, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        touch(tmp_path, "in/a.png")
        monkeypatch.chdir(tmp_path)
        assert carvana("in", "--out", "out") == 1
        assert "params.yaml" in capsys.readouterr().err
        (tmp_path / "params.yaml").write_bytes((project / "params.yaml").read_bytes())
        assert carvana("in", "--out", "out") == 1
        assert "carvana repro" in capsys.readouterr().err

    def test_outside_a_project_defaults_hold(
        self, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        touch(tmp_path, "in/a.png")
        monkeypatch.chdir(tmp_path)
        assert carvana("in", "--out", "out", "--net", project / "folds/gray/0") == 0
        masker = Segmenter({"gray": segmenter.load_predictor("gray/0", ["identity"], project=project)})
        mask_HW = masker.segment(masker.predict(COLORS), EnsembleSettings())
        np.testing.assert_array_equal(decoded((tmp_path / "out/a_mask.png").read_bytes()) > 0, mask_HW)

    def test_a_stop_leaves_whole_files_only(
        self, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        touch(tmp_path, "in/a.png", "in/b.png", "in/c.png")

        predict_images = batch.predict_images

        def until_the_second(*arguments: Any) -> Iterator[Any]:
            yield next(whole := predict_images(*arguments))
            whole.close()
            raise KeyboardInterrupt

        monkeypatch.setattr("pipeline.segment.batch.predict_images", until_the_second)
        assert carvana(tmp_path / "in", "--out", tmp_path / "out", "--net", "gray/0", "--write", "mask", "rle") == 130
        assert "Stopped after 1 of 3 images" in capsys.readouterr().err
        written = sorted(path.name for path in (tmp_path / "out").iterdir())
        assert written[0] == "a_mask.png"
        assert all(name.endswith("_mask.png") and name[0] != "." for name in written)

    def test_it_is_parsed_without_torch(self) -> None:
        modules = loaded_modules("import pipeline.segment.batch")
        assert "cv2" in modules
        assert modules.isdisjoint(HEAVY_MODULES)
