"""Every architecture of smp, tiny: trained for a step, saved, loaded, run at an odd size, exported to ONNX."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from pipeline.config import InputSettings, ModelConfig, ResolvedModel
from pipeline.errors import CarvanaError
from pipeline.export.writers import write_onnx
from pipeline.inference.onnx_predictor import OnnxMetadata, OnnxPredictor
from pipeline.models.networks import build_model, check_sizes, load_model
from pipeline.training.trainer import train
from tests.fakes.train_jobs import job

INPUT = InputSettings(size=(128, 192))
TINY: dict[str, dict[str, Any]] = {
    "smp_unet": {"decoder_channels": [16, 8, 8], "options": {"decoder_interpolation": "bilinear"}},
    "unetplusplus": {"encoder_depth": 3, "options": {"decoder_channels": [16, 8, 8]}},
    "manet": {"encoder_depth": 3, "options": {"decoder_channels": [16, 8, 8], "decoder_pab_channels": 8}},
    "linknet": {"encoder_depth": 3},
    "fpn": {"options": {"decoder_pyramid_channels": 16, "decoder_segmentation_channels": 32}},
    "pspnet": {"options": {"psp_out_channels": 16}},
    "pan": {"options": {"decoder_channels": 8}},
    "deeplabv3": {"options": {"decoder_channels": 8, "encoder_output_stride": 16}},
    "deeplabv3plus": {"options": {"decoder_channels": 8}},
    "upernet": {"options": {"decoder_channels": 8}},
    "segformer": {"options": {"decoder_segmentation_channels": 8}},
    "dpt": {
        "encoder": "tu-vit_tiny_patch16_224",
        "encoder_options": {"dynamic_img_size": True},
        "options": {"decoder_intermediate_channels": [8, 8, 8, 8], "decoder_fusion_channels": 8},
    },
}


def spec(architecture: str, **changes: Any) -> ModelConfig:
    values = {"architecture": architecture, "encoder": "tu-mobilenetv3_small_050", **TINY.get(architecture, {})}
    return TypeAdapter(ModelConfig).validate_python(values | changes)  # type: ignore[no-any-return]


@pytest.fixture(scope="module", params=TINY)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a net after a step of training."""
    plain = job(epochs=1, batch_size=6)
    model = ResolvedModel(spec=spec(request.param), input=INPUT, train=plain.model.train)
    return train(replace(plain, model=model), tmp_path_factory.mktemp(request.param))


@pytest.mark.slow
def test_a_trained_net_is_loaded_and_predicts_at_an_odd_size(trained: Path) -> None:
    net, input = load_model(trained)
    assert input == INPUT
    with torch.inference_mode():
        logits = net(torch.rand(1, 3, 131, 197) * 255)
    assert logits.shape == (1, 1, 131, 197)
    assert logits.isfinite().all()


@pytest.mark.long
def test_onnx_gives_the_same(trained: Path, tmp_path: Path) -> None:
    net, input = load_model(trained)
    write_onnx(net, OnnxMetadata(kind="net", model="tiny", folds=(0,), input=input), tmp_path / "model.onnx")
    for size in [(1, 128, 192), (2, 149, 131)]:
        pixels = np.random.default_rng(0).integers(0, 256, (size[0], 3, *size[1:])).astype(np.float32)
        with torch.inference_mode():
            expected = net(torch.from_numpy(pixels)).numpy()
        difference = np.abs(OnnxPredictor(tmp_path / "model.onnx").logits(pixels) - expected).max()
        # After one step, logits of noise are far from 0.
        assert difference < 1e-4 * max(1, np.abs(expected).max())


def test_each_architecture_of_smp_is_known() -> None:
    from segmentation_models_pytorch import MODEL_ARCHITECTURES_MAPPING

    assert set(MODEL_ARCHITECTURES_MAPPING) == set(TINY) - {"smp_unet"} | {"unet"}


@pytest.mark.parametrize("architecture", TINY)
@pytest.mark.parametrize("name", ["decoder_rates", "classes", "activation", "encoder_depth"])
def test_an_unknown_option_is_named(architecture: str, name: str) -> None:
    with pytest.raises(CarvanaError, match=rf"{architecture}.*'{name}'"):
        build_model(spec(architecture, options={name: 2}), INPUT)


def test_the_transposed_decoder_has_no_options() -> None:
    with pytest.raises(CarvanaError, match=r"'decoder_interpolation'"):
        build_model(spec("smp_unet", upsampling="transposed"), INPUT)


@pytest.mark.parametrize(("encoder", "name"), [("resnet18", "drop_path_rate"), ("tu-resnet18", "decoder_channels")])
def test_an_unknown_encoder_option_is_named(encoder: str, name: str) -> None:
    with pytest.raises(CarvanaError, match=rf"'{encoder}'.*'{name}"):
        build_model(spec("fpn", encoder=encoder, encoder_options={name: 1}), INPUT)
    with pytest.raises(CarvanaError, match=r"'tu-resnet18'.*nonsense"):
        build_model(spec("fpn", encoder="tu-resnet18", encoder_options={"nonsense": 1}), INPUT)


def test_options_reach_the_net() -> None:
    net = build_model(spec("fpn", options={"decoder_segmentation_channels": 64}), INPUT)
    assert net.network.segmentation_head[0].weight.shape[1] == 64
    net = build_model(spec("smp_unet", encoder="resnet18", options={"decoder_attention_type": "scse"}), INPUT)
    assert any("attention" in name for name in net.state_dict())


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("smp_unet", {"encoder": "resnet18", "decoder_channels": [8] * 6}),
        ("smp_unet", {"encoder": "tu-vit_tiny_patch16_224"}),
        ("unetplusplus", {"encoder": "mit_b0"}),
        ("manet", {"encoder_depth": 4}),
        ("fpn", {"encoder_depth": 2}),
        ("deeplabv3", {"encoder": "tu-swin_tiny_patch4_window7_224"}),
        ("deeplabv3plus", {"options": {"encoder_output_stride": 4}}),
        ("segformer", {"encoder": "tu-nonsense"}),
        ("dpt", {"encoder": "resnet18", "encoder_options": {}}),
    ],
)
def test_an_encoder_that_the_architecture_cannot_use_is_named(architecture: str, changes: dict[str, Any]) -> None:
    model = spec(architecture, **changes)
    with pytest.raises(CarvanaError, match=rf"{architecture}.*'{model.encoder}'"):
        build_model(model, INPUT)


@pytest.mark.parametrize(
    ("architecture", "changes", "named"),
    [
        ("pspnet", {"options": {"upsampling": 4}}, "output"),
        ("dpt", {"encoder_options": {}}, r"\[224, 224\]"),
        ("fpn", {"encoder": "tu-convnext_atto", "encoder_depth": 3}, "input.size"),
    ],
)
def test_a_net_that_cannot_process_the_input_is_named(architecture: str, changes: dict[str, Any], named: str) -> None:
    model = spec(architecture, **changes)
    with pytest.raises(CarvanaError, match=rf"{model.encoder}.*128 x 192.*{named}"):
        check_sizes(model, INPUT, {"training": (2, 128, 192)}, {})
