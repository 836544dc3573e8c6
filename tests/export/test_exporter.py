"""Exports: every format says what the net says, at every size; what does not is not kept; ONNX runs without torch."""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from ruamel.yaml import YAML

from pipeline import workspace
from pipeline.cli import main
from pipeline.competition.dice import confusion_counts
from pipeline.competition.image_ids import HEIGHT, WIDTH, car_id
from pipeline.config import InputSettings, MergeName, ModelConfig, SmpUNetConfig, UNetConfig
from pipeline.data.competition_data import CompetitionData
from pipeline.data.fold_assignment import read_folds, write_folds
from pipeline.ensemble.merge import MergeRule
from pipeline.errors import CarvanaError
from pipeline.export import exporter, verification
from pipeline.export.exporter import CARD_FILE, README_FILE, ExportResult, export_net, render_card
from pipeline.export.formats import FORMATS
from pipeline.export.verification import (
    ExportContext,
    ExportJob,
    LoadedExport,
    ReferencePrediction,
    assert_close,
    benchmark_export,
)
from pipeline.export.writers import quiet, write_int8, write_onnx, write_torchscript
from pipeline.inference.onnx_predictor import OnnxMetadata, OnnxPredictor
from pipeline.inference.probability_map import sum_views
from pipeline.inference.torch_predictor import TorchPredictor
from pipeline.models import networks, weights
from pipeline.models.resize import soft_target, to_network_input
from pipeline.utils.arrays import UInt8Array
from pipeline.utils.files import write_json
from tests import ROOT

pytestmark = pytest.mark.usefixtures("one_thread")

INPUT = InputSettings(size=(40, 60))
TINY = UNetConfig(architecture="unet", widths=(8, 16, 16, 16))
STEPS = 60
VIEWS = ("identity", "hflip", "scale:0.75", "hflip+scale:1.25")
START = {"source": "package lite 0.1", "file": "lite.pth", "sha256": "5793" * 16}
FORMATS_AS_THEY_ARE = dict(FORMATS)
SIZES = [(1, 40, 60), (3, 37, 51), (2, 64, 33), (1, 9, 90)]
"""Batch, height and width: the net's own, and such as are no multiples of anything."""


@dataclass(frozen=True)
class SampleImages:
    """The drawn sample's photographs and masks."""

    source: CompetitionData

    def image(self, image_id: str) -> UInt8Array:
        return self.source.train.image(image_id)

    def mask(self, image_id: str) -> UInt8Array:
        return self.source.masks.mask(image_id)


def trained(reader: SampleImages, image_ids: Sequence[str], seed: int) -> networks.SegmentationModel:
    """A tiny net after some seconds of learning, so that its masks are masks."""
    net = networks.build_model(TINY, INPUT, seed)
    pixels = torch.stack(
        [torch.from_numpy(to_network_input(reader.image(i), INPUT)).permute(2, 0, 1) for i in image_ids]
    )
    targets = torch.stack([torch.from_numpy(soft_target(reader.mask(i), INPUT))[None] / 255 for i in image_ids])
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(net(pixels), targets).backward()
        optimizer.step()
        schedule.step()
    return net.eval()


def save(net: networks.SegmentationModel, folder: Path, fold: int, spec: ModelConfig = TINY) -> None:
    folder.mkdir(parents=True)
    weights.save_config(folder, spec, INPUT, {"model": "tiny", "fold": fold, "initial_weights": START})
    weights.save_weights(folder / workspace.WEIGHTS["last"], net.state_dict())


@pytest.fixture(scope="module")
def job(tiny_sample: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportJob:
    """Two trained nets, and drawn photographs to check them on."""
    folder, reader = tmp_path_factory.mktemp("folds"), SampleImages(CompetitionData(tiny_sample))
    image_ids = reader.source.train.ids()
    for fold in (0, 1):
        save(trained(reader, image_ids[16 + fold :: 3], fold), folder / str(fold), fold)
    return ExportJob(
        model="tiny",
        fold=0,
        folders={fold: folder / str(fold) for fold in (0, 1)},
        digests={0: "a", 1: "b"},
        ensemble=(0, 1),
        weights="last",
        views=VIEWS,
        merge="mean_probability",
        threshold=0.5,
        reader=reader,
        check_ids=image_ids[:16:5],
        calibration=image_ids[16::6],
    )


@pytest.fixture(scope="module")
def material(job: ExportJob, tmp_path_factory: pytest.TempPathFactory) -> ExportContext:
    return ExportContext(job, tmp_path_factory.mktemp("material"))


OWN = {"dice": 0.98765, "images": 64, "cars": 4}


@pytest.fixture(scope="module")
def exported(job: ExportJob, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ExportResult]:
    """What became of each format, all of them in one folder."""
    done = export_net(job, list(FORMATS), OWN, tmp_path_factory.mktemp("exports"))
    return dict(zip(FORMATS, done, strict=True))


def batch(size: tuple[int, int, int], channels: int = 3) -> NDArray[np.float32]:
    number, height, width = size
    random = np.random.default_rng(height)
    return random.integers(0, 256, (number, channels, height, width)).astype(np.float32)


def jit_load(path: Path) -> Any:
    with quiet():
        return torch.jit.load(path)  # type: ignore[no-untyped-call]


Run = Callable[[NDArray[np.float32]], NDArray[np.float32]]


def runner(path: Path) -> Run:
    """What runs a file of any single net's format, on batches."""
    if path.suffix == ".onnx":
        return OnnxPredictor(path).logits
    net = {
        "hub": lambda: networks.load_model(path)[0],
        "model.torchscript.pt": lambda: jit_load(path),
        "model.pt2": lambda: torch.export.load(path).module(),
    }[path.name]()
    return lambda pixels: net(torch.from_numpy(pixels)).detach().numpy()


@pytest.mark.slow
class TestFormats:
    @pytest.mark.parametrize("name", FORMATS)
    def test_each_passes_its_check_and_is_on_the_card(
        self, job: ExportJob, exported: dict[str, ExportResult], name: str
    ) -> None:
        path, measured = exported[name].path, exported[name].result
        assert isinstance(measured, verification.ExportReport), measured
        assert path.name == FORMATS[name].file
        assert measured.images == len(job.check_ids)
        assert measured.bytes == sum(p.stat().st_size for p in (path, *path.glob("*")) if p.is_file())
        assert measured.dice > 0.6, "the nets have not learned enough to tell anything"
        assert 0 < measured.images_per_second < 1e5
        if name == "int8":
            assert abs(measured.dice_drop) <= 0.003
        else:
            assert measured.difference < 1e-4
        entry = json.loads((path.parent / CARD_FILE).read_text())["formats"][name]
        assert entry.items() >= asdict(measured).items()
        assert entry["folds"] == ([0, 1] if name == "ensemble" else [0])
        assert f"| `{path.name}` | {FORMATS[name].description} |" in (path.parent / README_FILE).read_text()

    def test_nothing_else_is_left_and_no_path_of_this_machine(self, exported: dict[str, ExportResult]) -> None:
        folder = exported["hub"].path.parent
        assert {path.name for path in folder.iterdir()} == {f.file for f in FORMATS.values()} | {CARD_FILE, README_FILE}
        for path in folder.rglob("*"):
            if path.is_file():
                assert str(ROOT).encode() not in path.read_bytes(), path
                if zipfile.is_zipfile(path):
                    archive = zipfile.ZipFile(path)
                    assert all(str(ROOT).encode() not in archive.read(name) for name in archive.namelist()), path

    @pytest.mark.parametrize("size", SIZES, ids=str)
    @pytest.mark.parametrize("name", [name for name in FORMATS if FORMATS[name].exact and not FORMATS[name].ensemble])
    def test_float_formats_equal_the_net_at_every_size(
        self, material: ExportContext, exported: dict[str, ExportResult], name: str, size: tuple[int, int, int]
    ) -> None:
        pixels = batch(size)
        assert size[1] > material.net.stride
        with torch.inference_mode():
            expected = material.net(torch.from_numpy(pixels)).numpy()
        said = runner(exported[name].path)(pixels)
        assert said.shape == (size[0], 1, *size[1:])
        assert np.abs(said - expected).max() < 1e-4

    @pytest.mark.parametrize("size", SIZES, ids=str)
    def test_int8_is_near_at_every_size(
        self, material: ExportContext, exported: dict[str, ExportResult], size: tuple[int, int, int]
    ) -> None:
        photograph = material.job.reader.image(material.job.check_ids[0])
        seen = cv2.resize(photograph, size[:0:-1], interpolation=cv2.INTER_AREA)
        pixels = np.stack([seen.transpose(2, 0, 1)] * size[0]).astype(np.float32)
        with torch.inference_mode():
            expected = material.net(torch.from_numpy(pixels)).sigmoid().numpy()
        said = 1 / (1 + np.exp(-OnnxPredictor(exported["int8"].path).logits(pixels)))
        assert said.shape == expected.shape
        assert np.abs(said - expected).mean() < 0.02

    def test_int8_is_in_8_bits(self, exported: dict[str, ExportResult]) -> None:
        weights = {"int8": 0, "onnx": 0}
        for name in weights:
            model = onnx.load(exported[name].path)
            weights[name] = sum(
                np.prod(t.dims) for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT
            )
        assert weights["int8"] < weights["onnx"] / 4
        assert exported["int8"].path.read_bytes() != exported["onnx"].path.read_bytes()

    def test_an_ensemble_holds_the_weights_of_each_net_once(self, exported: dict[str, ExportResult]) -> None:
        names = [tensor.name for tensor in onnx.load(exported["ensemble"].path).graph.initializer]
        single = [tensor.name for tensor in onnx.load(exported["onnx"].path).graph.initializer]
        convolutions = [name for name in names if "weight" in name]
        assert len(convolutions) == 2 * len([name for name in single if "weight" in name]) > 0

    @pytest.mark.parametrize("write", [write_onnx, write_torchscript])
    @pytest.mark.parametrize(
        "spec",
        [
            SmpUNetConfig(architecture="smp_unet", encoder="resnet18", decoder_channels=(16, 8, 8, 8, 8)),
            SmpUNetConfig(
                architecture="smp_unet", encoder="mobilenet_v2", upsampling="transposed", decoder_channels=(8, 8, 8)
            ),
        ],
        ids=lambda spec: spec.encoder,
    )
    def test_nets_with_encoders_too(self, tmp_path: Path, spec: SmpUNetConfig, write: Callable[..., None]) -> None:
        net = networks.build_model(spec, InputSettings(size=(64, 96), channels="gray")).eval()
        if write is write_onnx:
            path = tmp_path / "model.onnx"
            write(net, OnnxMetadata(kind="net", model="tiny", folds=(0,), input=INPUT), path)
        else:
            path = tmp_path / "model.torchscript.pt"
            write(net, path)
        run = runner(path)
        for size in [(1, 64, 96), (3, 37, 51), (2, 100, 33)]:
            pixels = batch(size, channels=1)
            with torch.inference_mode():
                expected = net(torch.from_numpy(pixels)).numpy()
            assert np.abs(run(pixels) - expected).max() < 1e-4, size

    def test_grey_128_in_8_bits_is_at_most_2_and_a_half_megabytes(self, tmp_path: Path) -> None:
        overlay = YAML(typ="safe").load((ROOT / "recipes" / "grey-128.yaml").read_text())["models"]["specs"]["grey-128"]
        input = InputSettings.model_validate(overlay["input"])
        net = networks.build_model(UNetConfig(architecture="unet", widths=tuple(overlay["widths"])), input).eval()
        facts = OnnxMetadata(kind="net", model="grey-128", folds=(0,), input=input)
        write_onnx(net, facts, tmp_path / "model.onnx")
        noise = np.random.default_rng(0).integers(0, 256, (4, input.height, input.width, 1)).astype(np.uint8)
        write_int8(tmp_path / "model.onnx", noise, facts, tmp_path / "model.int8.onnx")
        assert 1.8e6 < (tmp_path / "model.int8.onnx").stat().st_size <= 2.5e6
        assert OnnxPredictor(tmp_path / "model.int8.onnx").logits(batch((2, 128, 128), channels=1)).shape == (
            2,
            1,
            128,
            128,
        )


@pytest.mark.slow
class TestEnsemble:
    @pytest.mark.parametrize("merge", ["mean_probability", "mean_logit", "majority_vote"])
    @pytest.mark.parametrize("threshold", [0.5, 0.3])
    def test_its_masks_are_those_of_the_pipeline(
        self, job: ExportJob, material: ExportContext, tmp_path: Path, merge: MergeName, threshold: float
    ) -> None:
        other = ExportContext(replace(job, merge=merge, threshold=threshold), tmp_path)
        other.onnx = material.onnx  # type: ignore[method-assign]
        FORMATS["ensemble"].write(other, tmp_path / "ensemble.onnx")
        predictor, cut = OnnxPredictor(tmp_path / "ensemble.onnx"), other.metadata().decision_threshold
        for image_id in job.check_ids[:2]:
            image_HWC = job.reader.image(image_id)
            maps = []
            for fold in job.ensemble:
                net = TorchPredictor(job.folders[fold], views=VIEWS, device="cpu", precision="32")
                maps.append(sum_views(image_id, "all", net.predict_u8([net.preprocess(image_HWC)], HEIGHT, WIDTH)[0]))
            expected = MergeRule(merge, threshold, (len(VIEWS),) * 2, (1, 1)).mask(maps)
            said = predictor.probability([predictor.preprocess(image_HWC)], HEIGHT, WIDTH)[0]
            assert 0.05 < expected.mean() < 0.95
            # The pipeline rounds what each view says to 255 levels.
            assert ((said >= cut) != expected).mean() < 5e-4
            assert confusion_counts(said >= cut, expected).dice > 0.998

    def test_pictures_of_any_batch_and_size(self, job: ExportJob, exported: dict[str, ExportResult]) -> None:
        predictor = OnnxPredictor(exported["ensemble"].path)
        nets = [TorchPredictor(job.folders[f], views=VIEWS, device="cpu", precision="32") for f in job.ensemble]
        for size, wanted in [((3, 37, 51), (90, 70)), ((1, 40, 60), (40, 60)), ((2, 64, 33), (20, 31))]:
            inputs = list(batch(size).transpose(0, 2, 3, 1).astype(np.uint8))
            levels = np.concatenate([net.predict_u8(inputs, *wanted) for net in nets], axis=1)
            said = predictor.probability(inputs, *wanted)
            assert said.shape == (size[0], *wanted)
            assert np.abs(said - levels.mean(axis=1) / 255).max() < 0.6 / 255

    def test_nets_that_see_different_pictures_are_refused(self, job: ExportJob, tmp_path: Path) -> None:
        folder = tmp_path / "other"
        folder.mkdir()
        weights.save_config(folder, TINY, InputSettings(size=(48, 64)), {"model": "tiny", "fold": 1})
        weights.save_weights(folder / workspace.WEIGHTS["last"], networks.build_model(TINY, INPUT).state_dict())
        mixed = replace(job, folders={0: job.folders[0], 1: folder})
        with pytest.raises(CarvanaError, match="folds 0 and 1"):
            next(export_net(mixed, ["ensemble"], {}, tmp_path / "exports"))


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
class TestChecks:
    @pytest.fixture
    def spoilt(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
        """Lets a format hold another net than it should."""

        def spoil(name: str) -> None:
            def write(material: ExportContext, path: Path) -> None:
                with torch.no_grad():
                    for parameter in material.net.network.parameters():
                        parameter.mul_(0.9)
                    FORMATS_AS_THEY_ARE[name].write(material, path)
                    for parameter in material.net.network.parameters():
                        parameter.div_(0.9)

            monkeypatch.setitem(FORMATS, name, replace(FORMATS[name], write=write))

        return spoil

    def test_failed_verification_keeps_existing_files(
        self, job: ExportJob, tmp_path: Path, spoilt: Callable[[str], None]
    ) -> None:
        good = list(export_net(job, ["torchscript", "hub"], {}, tmp_path))
        assert all(isinstance(done.result, verification.ExportReport) for done in good)
        before = content(tmp_path)
        spoilt("torchscript")
        (done,) = export_net(job, ["torchscript"], {}, tmp_path)
        assert re.search(r"model\.torchscript\.pt was not kept", str(done.result))
        assert content(tmp_path) == before

    def test_of_several_formats_only_the_failing_one_is_missing(
        self, job: ExportJob, tmp_path: Path, spoilt: Callable[[str], None]
    ) -> None:
        spoilt("torchscript")
        done = list(export_net(job, ["torchscript", "hub"], {}, tmp_path))
        assert [isinstance(one.result, verification.ExportReport) for one in done] == [False, True]
        assert sorted(path.name for path in tmp_path.iterdir()) == [README_FILE, CARD_FILE, "hub"]
        assert json.loads((tmp_path / CARD_FILE).read_text())["formats"].keys() == {"hub"}

    def test_a_format_that_can_not_be_written_says_so(
        self, job: ExportJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def write(material: ExportContext, path: Path) -> None:
            raise RuntimeError("no such operator")

        monkeypatch.setitem(FORMATS, "torch-export", replace(FORMATS["torch-export"], write=write))
        (done,) = export_net(job, ["torch-export"], {}, tmp_path)
        assert re.search(r"^model\.pt2: .*RuntimeError: no such operator", str(done.result))
        assert not list(tmp_path.iterdir())

    def test_a_picture_that_a_format_does_not_take_says_so(
        self, job: ExportJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Such as one of a single stride, of which torch.export makes another case."""
        monkeypatch.setattr("pipeline.export.verification.to_network_input", lambda image_HWC, _: image_HWC[:8, :8])
        (done,) = export_net(job, ["torch-export"], {}, tmp_path)
        assert "model.pt2: export failed" in str(done.result)
        assert not list(tmp_path.iterdir())

    def test_int8_without_photographs_is_refused(self, job: ExportJob, tmp_path: Path) -> None:
        (done,) = export_net(replace(job, calibration=()), ["int8"], {}, tmp_path)
        assert "int8 needs training images" in str(done.result)
        assert not list(tmp_path.iterdir())

    def test_leftovers_of_a_kill_are_removed(self, job: ExportJob, tmp_path: Path) -> None:
        (tmp_path / ".abc.part").mkdir()
        (tmp_path / ".abc.part" / "model.onnx").touch()
        list(export_net(job, ["hub"], {}, tmp_path))
        assert sorted(path.name for path in tmp_path.iterdir()) == [README_FILE, CARD_FILE, "hub"]

    def test_a_net_that_was_trained_anew_is_told_on_the_card(self, job: ExportJob, tmp_path: Path) -> None:
        list(export_net(job, ["hub", "torchscript"], {}, tmp_path))
        assert "outdated" not in (tmp_path / README_FILE).read_text()
        assert all(part in (tmp_path / README_FILE).read_text() for part in START.values())
        list(export_net(replace(job, digests={0: "later", 1: "b"}), ["hub"], {}, tmp_path))
        (told,) = [line for line in (tmp_path / README_FILE).read_text().splitlines() if "outdated" in line]
        assert "`model.torchscript.pt`" in told

    @pytest.mark.parametrize(
        ("changed", "difference", "lost"),
        [
            ({}, 0, 0),
            ({(0, 0): 0.4}, 0.4, 0),
            ({(0, 0): np.nan}, 1, 0),
            ({(1, 1): 0.2}, 0.8, 1 / 3),
        ],
    )
    def test_verification_measures_difference_and_dice(
        self, tmp_path: Path, changed: dict[tuple[int, int], float], difference: float, lost: float
    ) -> None:
        (tmp_path / "file").write_bytes(b"123")
        right = np.asarray([[0, 1], [0, 1]], np.float32)
        said = right.copy()
        for place, value in changed.items():
            said[place] = value
        proof = ReferencePrediction(np.zeros((1, 1, 3), np.uint8), right, right > 0, 1.0)
        measured = benchmark_export(
            tmp_path / "file", LoadedExport(lambda _: said, lambda raster: raster), [proof], 0.5
        )
        assert (measured.bytes, measured.images) == (3, 1)
        assert measured.difference == pytest.approx(difference)
        assert measured.dice_drop == pytest.approx(lost)

    def test_where_rounding_turns_votes_probabilities_are_not_compared(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        right = np.asarray([[0, 1], [0, 1]], np.float32)
        undecided = np.asarray([[True, False], [False, False]])
        proof = ReferencePrediction(np.zeros((1, 1, 3), np.uint8), right, right > 0, 1.0, undecided)
        for said, difference in (([[0.5, 1], [0, 1]], 0), ([[0.5, 1], [0.5, 1]], 0.5)):
            exported = LoadedExport(lambda _, said=said: np.asarray(said, np.float32), lambda raster: raster)  # type: ignore[misc]
            assert benchmark_export(tmp_path / "file", exported, [proof], 0.5).difference == difference

    @pytest.mark.parametrize(
        ("difference", "lost", "exact", "words"),
        [
            (0.00099, 0.0029, True, None),
            (0.001, 0.0, True, "up to 0.001 on 16 images"),
            (0.0, 0.0031, True, "-0.0031 on 16 images"),
            (0.9, 0.003, False, None),
            (0.9, 0.0031, False, r"-0.0031 .*--images"),
            (0.9, -0.0031, False, r"\+0.0031 on 16 images"),
            (float("nan"), 0.0, True, "up to nan"),
            (0.0, float("nan"), False, "nan on 16 images"),
        ],
    )
    def test_verification_limits(self, difference: float, lost: float, exact: bool, words: str | None) -> None:
        measured = verification.ExportReport(1, difference, 0.9, lost, 16, 1.0, "here")
        if words is None:
            assert_close("model.onnx", measured, exact=exact)
        else:
            with pytest.raises(CarvanaError, match=rf"model\.onnx.*{words}"):
                assert_close("model.onnx", measured, exact=exact)


@pytest.mark.slow
class TestRuntime:
    @pytest.mark.parametrize("view", ["identity", "hflip", "scale:0.75", "hflip+scale:1.25", "scale:0.33"])
    def test_onnx_equals_the_net_in_every_view(
        self, job: ExportJob, exported: dict[str, ExportResult], view: str
    ) -> None:
        image_HWC = job.reader.image(job.check_ids[1])
        net = TorchPredictor(job.folders[0], views=[view], device="cpu", precision="32")
        file = OnnxPredictor(exported["onnx"].path, views=[view])
        assert (file.views, file.input) == ([view], net.input)
        inputs = [net.preprocess(image_HWC), net.preprocess(image_HWC[:, ::-1])]
        assert np.array_equal(file.preprocess(image_HWC), inputs[0])
        expected, said = net.predict_u8(inputs, 128, 192), file.predict_u8(inputs, 128, 192)
        assert said.shape == expected.shape == (2, 1, 128, 192)
        assert said.dtype == expected.dtype == np.uint8
        apart = np.abs(said.astype(int) - expected)
        assert apart.max() <= 1
        assert (apart > 0).mean() < 1e-3

    @pytest.mark.parametrize("name", ["onnx", "ensemble"])
    def test_onnx_predictor_has_the_predictor_interface(
        self, job: ExportJob, exported: dict[str, ExportResult], name: str
    ) -> None:
        views = ["identity", "hflip"]
        file = OnnxPredictor(exported[name].path, views=views)
        assert file.views == (["ensemble"] if name == "ensemble" else views)
        image_HWC = job.reader.image(job.check_ids[0])[:400, :301]
        said_HW = file(image_HWC)
        assert (said_HW.shape, said_HW.dtype) == ((400, 301), np.float32)
        assert 0 <= said_HW.min() < said_HW.max() <= 1
        pixels = file.preprocess(image_HWC)
        levels = file.predict_u8_at_sizes([pixels, pixels], [(400, 301), (20, 30)])
        assert [raster.shape for raster in levels] == [(len(file.views), 400, 301), (len(file.views), 20, 30)]
        assert np.allclose(levels[0].mean(axis=0) / 255, said_HW, atol=1e-6)

    def test_a_file_says_what_it_wants_to_see(self, exported: dict[str, ExportResult]) -> None:
        facts = OnnxPredictor(exported["ensemble"].path).metadata
        assert facts == OnnxMetadata(kind="ensemble", model="tiny", folds=(0, 1), input=INPUT, views=VIEWS)
        assert OnnxPredictor(exported["int8"].path).metadata == OnnxMetadata(
            kind="net", model="tiny", folds=(0,), input=INPUT
        )

    def test_unusable_onnx_files_are_named(self, exported: dict[str, ExportResult], tmp_path: Path) -> None:
        with pytest.raises(CarvanaError, match=r"gone\.onnx"):
            OnnxPredictor(tmp_path / "gone.onnx")
        (tmp_path / "truncated.onnx").write_bytes(exported["onnx"].path.read_bytes()[:1000])
        with pytest.raises(CarvanaError, match=r"truncated\.onnx"):
            OnnxPredictor(tmp_path / "truncated.onnx")
        model = onnx.load(exported["onnx"].path)
        del model.metadata_props[:]
        onnx.save(model, tmp_path / "plain.onnx")
        with pytest.raises(CarvanaError, match=r"plain\.onnx"):
            OnnxPredictor(tmp_path / "plain.onnx")

    def test_non_finite_onnx_output_is_refused(
        self, job: ExportJob, exported: dict[str, ExportResult], tmp_path: Path
    ) -> None:
        model = onnx.load(exported["onnx"].path)
        (head,) = [tensor for tensor in model.graph.initializer if tensor.name.endswith("head.bias")]
        head.CopyFrom(onnx.numpy_helper.from_array(np.asarray([np.nan], np.float32), head.name))
        onnx.save(model, tmp_path / "model.onnx")
        with pytest.raises(CarvanaError, match=r"model\.onnx"):
            OnnxPredictor(tmp_path / "model.onnx")(job.reader.image(job.check_ids[0]))


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Path], str]:
    """What runs code in an environment that has what is installed here but torch and all that is built on it."""
    folder = tmp_path_factory.mktemp("site-packages")
    heavy = ("torch", "nvidia", "triton", "functorch", "lightning", "pytorch_lightning", "timm", "segmentation_models")
    for site in {Path(path) for path in sys.path if path.endswith("site-packages")}:
        for package in site.iterdir():
            if not package.name.startswith((*heavy, "__editable__")) and package.suffix != ".pth":
                (folder / package.name).symlink_to(package)
    (folder / "pipeline").symlink_to(ROOT / "pipeline")

    def run(code: str, where: Path) -> str:
        # -I and -S: neither this environment's site-packages nor its variables; what there is is put there by hand.
        first = f"import sys; sys.path.append({str(folder)!r})\n"
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", first + code], cwd=where, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.mark.slow
class TestWithoutTorch:
    def test_the_environment_has_no_torch(self, without_torch: Callable[[str, Path], str], tmp_path: Path) -> None:
        code = "import cv2, numpy, onnxruntime\ntry:\n    import torch\nexcept ImportError:\n    print('none')"
        assert without_torch(code, tmp_path) == "none\n"

    @pytest.mark.parametrize("name", ["onnx", "int8", "ensemble"])
    def test_a_file_predicts(
        self,
        job: ExportJob,
        exported: dict[str, ExportResult],
        without_torch: Callable[[str, Path], str],
        tmp_path: Path,
        name: str,
    ) -> None:
        image_HWC = job.reader.image(job.check_ids[0])
        np.save(tmp_path / "image.npy", image_HWC)
        code = f"""
import numpy as np
from pathlib import Path
from pipeline.inference.onnx_predictor import OnnxPredictor
predictor = OnnxPredictor(Path({str(exported[name].path)!r}), views=["identity", "scale:0.75"])
np.save("said.npy", predictor(np.load("image.npy")))
assert "torch" not in sys.modules
"""
        without_torch(code, tmp_path)
        here = OnnxPredictor(exported[name].path, views=["identity", "scale:0.75"])(image_HWC)
        assert np.array_equal(np.load(tmp_path / "said.npy"), here)

    @pytest.mark.parametrize("name", ["onnx", "int8", "ensemble"])
    def test_the_cards_example_runs_as_it_stands(
        self,
        job: ExportJob,
        exported: dict[str, ExportResult],
        without_torch: Callable[[str, Path], str],
        tmp_path: Path,
        name: str,
    ) -> None:
        file = exported[name].path
        card = (file.parent / README_FILE).read_text()
        examples = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        if name == "int8":
            assert "`model.int8.onnx`" in card
            examples = [example.replace("model.onnx", "model.int8.onnx") for example in examples]
        (example,) = [example for example in examples if f'"{file.name}"' in example]
        assert "pipeline" not in example
        (tmp_path / file.name).symlink_to(file)
        photograph = job.reader.image(job.check_ids[0])[:900, :1501]
        cv2.imwrite(str(tmp_path / "image.jpg"), cv2.cvtColor(photograph, cv2.COLOR_RGB2BGR))
        without_torch(example, tmp_path)
        mask_HW = cv2.imread(str(tmp_path / "mask.png"), cv2.IMREAD_GRAYSCALE)
        read = cv2.cvtColor(cv2.imread(str(tmp_path / "image.jpg")), cv2.COLOR_BGR2RGB)
        expected = OnnxPredictor(file)(read) >= 0.5
        assert set(np.unique(mask_HW)) == {0, 255}
        assert ((mask_HW > 0) != expected).mean() < 1e-4

    def test_grey_and_native_examples_are_complete(self, exported: dict[str, ExportResult]) -> None:
        card = json.loads((exported["onnx"].path.parent / CARD_FILE).read_text())
        card["formats"] = {"onnx": card["formats"]["onnx"]}
        card["net"]["input"] = {"size": "native", "channels": "gray"}
        text = render_card(card, {"onnx": "ONNX"})
        assert "cv2.COLOR_BGR2GRAY" in text
        assert "INTER_AREA" not in text
        assert "(1, 1, h, w)" in text


@pytest.mark.slow
class TestCommand:
    @pytest.fixture
    def project(self, job: ExportJob, tmp_path: Path, tiny_sample: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A project with two trained nets of the model ``tiny``, as the stages leave it."""
        yaml, source = YAML(), job.reader.source  # type: ignore[attr-defined]
        settings = yaml.load(ROOT / "params.yaml")
        settings["data"]["directory"] = str(tiny_sample)
        settings["folds"] |= {"count": 3, "active": [0, 1], "holdout_cars": 0}
        settings["ensemble"]["merge"] = "mean_logit"
        yaml.dump(settings, tmp_path / "params.yaml")
        parts = {"train": source.train.archive, "masks": source.masks, "test": source.test.archive}
        digests = {part: {"digest": files.fingerprint()} for part, files in parts.items()}
        write_json(tmp_path / "data" / "manifest.json", digests | {"unreadable": {}})
        cars = sorted({car_id(image_id) for image_id in source.train.ids()})
        write_folds(tmp_path / "folds" / "folds.csv", {car: number % 3 for number, car in enumerate(cars)})
        for fold, folder in job.folders.items():
            shutil.copytree(folder, tmp_path / "folds" / "tiny" / str(fold))
        write_json(tmp_path / "reports" / "metrics.json", {"oof": {"tiny": OWN}})
        monkeypatch.chdir(tmp_path)
        return tmp_path

    @staticmethod
    def run(*arguments: str) -> int:
        with pytest.raises(SystemExit) as end:
            main(["export", *arguments])
        assert isinstance(end.value.code, int)
        return end.value.code

    @pytest.mark.long
    def test_export_of_every_format(self, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.run("tiny", "--images", "8") == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines[:-1]] == [
            f"exports/tiny/{chosen.file}" for chosen in FORMATS.values()
        ]
        assert all(
            re.search(r"  [\d.]+ [kM]B  difference \S+  Dice drop [+-]\d\.\d{4}  \S+ images/s$", line)
            for line in lines[:-1]
        )
        card = json.loads((project / "exports" / "tiny" / CARD_FILE).read_text())
        assert list(card["formats"]) == list(FORMATS)
        assert all(entry["images"] == verification.CHECK_IMAGES for entry in card["formats"].values())
        assert (card["net"]["model"], card["net"]["fold"]) == ("tiny", 0)
        ensemble = card["formats"]["ensemble"]
        assert (ensemble["merge"], ensemble["views"], ensemble["folds"]) == (
            "mean_logit",
            ["identity", "hflip"],
            [0, 1],
        )
        text = (project / "exports" / "tiny" / README_FILE).read_text()
        assert "| out-of-fold Dice of its model | 0.9877, on 64 images of 4 cars |" in text
        assert "| architecture | U-Net, 8-16-16-16 channels |" in text

    def test_the_fold_that_is_named(self, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.run("tiny", "--fold", "1", "--format", "hub") == 0
        card = json.loads((project / "exports" / "tiny" / CARD_FILE).read_text())
        assert (card["net"]["fold"], card["formats"]["hub"]["folds"]) == (1, [1])
        exported = (project / "exports" / "tiny" / "hub" / "model.safetensors").read_bytes()
        assert exported == (project / "folds" / "tiny" / "1" / "model.safetensors").read_bytes()

    def test_checked_on_cars_of_its_fold_and_calibrated_on_those_it_learned_from(
        self, project: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        jobs: list[ExportJob] = []
        monkeypatch.setattr(exporter, "export_net", lambda job, *_: jobs.append(job) or [])  # type: ignore[func-returns-value]
        assert self.run("tiny", "--fold", "1", "--images", "9") == 0
        fold_of = read_folds(Path("folds/folds.csv"))
        (job,) = jobs
        assert len(job.check_ids) == len(set(job.check_ids)) == 16
        assert len(job.calibration) == len(set(job.calibration)) == 9
        assert {fold_of[car_id(image_id)] for image_id in job.check_ids} == {1}
        assert {fold_of[car_id(image_id)] for image_id in job.calibration} == {0, 2}

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["big"], "Model 'big' is not trained"),
            (["tiny", "--fold", "7"], "Model 'tiny' is not trained for fold 7, only for 0, 1"),
            (["tiny", "--format", "onyx"], "Unknown format 'onyx'"),
            (["tiny", "--format", "int8", "--images", "0"], "int8 needs training images"),
        ],
    )
    def test_export_errors_name_the_argument(
        self, project: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
    ) -> None:
        assert self.run(*arguments) == 1
        printed = capsys.readouterr()
        assert words in printed.err
        assert README_FILE not in printed.out
        assert not list(project.glob("exports/*/*"))

    def test_before_any_training(self, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
        shutil.rmtree("folds/tiny")
        assert self.run("tiny") == 1
        assert "No net" in capsys.readouterr().err

    def test_a_net_of_the_ensemble_that_is_gone(self, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
        shutil.rmtree("folds/tiny/1")
        assert self.run("tiny", "--format", "ensemble") == 1
        assert "folds/tiny/1 has no trained net" in capsys.readouterr().err
        assert self.run("tiny", "--format", "hub") == 0

    @pytest.mark.parametrize(
        ("name", "package"),
        [
            ("onnx", "onnx"),
            ("onnx", "onnxscript"),
            ("int8", "onnxruntime.quantization"),
            ("int8", "onnxscript"),
            ("ensemble", "onnx"),
            ("ensemble", "onnxruntime"),
        ],
    )
    def test_a_package_that_is_missing(
        self,
        project: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        name: str,
        package: str,
    ) -> None:
        monkeypatch.setitem(sys.modules, package, None)
        assert self.run("tiny", "--format", name) == 1
        error = capsys.readouterr().err
        assert package in error
        assert ".[export]" in error
        assert not list(project.glob("exports/*/*"))

    def test_help_names_every_format(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.run("--help") == 0
        text = capsys.readouterr().out
        assert all(name in text for name in FORMATS)
