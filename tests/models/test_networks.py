"""Networks: shapes, initial weights, saving and loading."""

from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline import workspace
from pipeline.config import InputSettings, SmpUNetConfig, UNetConfig
from pipeline.errors import CarvanaError
from pipeline.models import networks, weights
from tests.fakes.tiny_nets import SMALL, TINY

ENCODER = SmpUNetConfig(architecture="smp_unet", encoder="resnet18", decoder_channels=(32, 16, 8))


def parameters(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


class TestNetworks:
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

    def test_saved_folder_loads_the_same_net(self, tmp_path: Path) -> None:
        net = networks.build_model(TINY, SMALL, seed=3)
        weights.save_config(tmp_path, TINY, SMALL, {"fold": 0})
        weights.save_weights(tmp_path / workspace.WEIGHTS["last"], net.state_dict())
        loaded, input = networks.load_model(tmp_path)
        pixels = torch.rand(1, 3, 64, 64) * 255
        assert input == SMALL
        assert torch.equal(loaded(pixels), net.eval()(pixels))

    def test_weights_of_another_architecture(self, tmp_path: Path) -> None:
        weights.save_weights(tmp_path / "other.safetensors", networks.build_model(TINY, SMALL).state_dict())
        wider = networks.build_model(UNetConfig(architecture="unet", widths=(8, 8)), SMALL)
        with pytest.raises(CarvanaError, match=r"other\.safetensors"):
            weights.load_weights(wider, tmp_path / "other.safetensors")

    def test_load_model_of_an_empty_folder(self, tmp_path: Path) -> None:
        with pytest.raises(CarvanaError, match="trained"):
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
            weights.save_weights(path, state)
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
        with pytest.raises(CarvanaError, match=r"r18\.safetensors.*encoder_weights"):
            weights.initial_weights(spec)
        facts = []
        for content in (b"one", b"two"):
            (tmp_path / "weights" / "r18.safetensors").write_bytes(content)
            facts.append(weights.initial_weights(spec))
        assert facts[0] != facts[1]
        assert weights.initial_weights(ENCODER) is None

    def test_unknown_encoder_and_missing_file(self) -> None:
        with pytest.raises(CarvanaError, match=r"resnet1\b"):
            networks.build_model(ENCODER.model_copy(update={"encoder": "resnet1"}), SMALL)
        with pytest.raises(CarvanaError, match=r"gone\.pth"):
            networks.build_model(ENCODER.model_copy(update={"encoder_weights": "./gone.pth"}), SMALL)

    def test_a_timm_encoder_gets_its_own_normalization(self) -> None:
        spec = ENCODER.model_copy(update={"encoder": "tu-tf_efficientnet_lite0"})
        net = networks.build_model(spec, SMALL)
        assert net.mean.flatten().tolist() == net.std.flatten().tolist() == [127.5] * 3

    def test_timm_encoders_have_one_set_of_weights(self) -> None:
        spec = ENCODER.model_copy(update={"encoder": "tu-resnet18", "encoder_weights": "imagnet"})
        with pytest.raises(CarvanaError, match=r"'tu-resnet18'.*'imagnet'.*encoder_weights"):
            networks.build_model(spec, SMALL)

    def test_pickles_are_refused(self, tmp_path: Path) -> None:
        torch.save(networks.build_model(TINY, SMALL), tmp_path / "net.pth")
        with pytest.raises(CarvanaError, match=r"net\.pth"):
            weights.read_weights(tmp_path / "net.pth")
