"""The U-Nets, and the folder of a trained net: weights and config.json."""

import json
import warnings
from pathlib import Path

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config import InputSettings, ModelConfig, SmpUNetConfig, UNetConfig
from pipeline.errors import CarvanaError
from pipeline.models.weights import (
    _encoder_state,
    _first_line,
    _load_strict,
    encoder_weights_path,
    load_weights,
    read_weights,
    weights_path,
)
from pipeline.workspace import CONFIG, WEIGHTS

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
_GRAY_MEAN = (0.449,)
_GRAY_STD = (0.226,)


class SegmentationModel(nn.Module):
    """A network with normalization before it, and padding to its stride that is removed after it."""

    mean: Tensor
    std: Tensor

    def __init__(self, body: nn.Module, input: InputSettings, stride: int) -> None:
        super().__init__()
        self.network = body
        self.stride = stride
        rgb = input.channels == "rgb"
        for name, values in (
            ("mean", _IMAGENET_MEAN if rgb else _GRAY_MEAN),
            ("std", _IMAGENET_STD if rgb else _GRAY_STD),
        ):
            self.register_buffer(name, 255 * torch.tensor(values).view(1, -1, 1, 1), persistent=False)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Return logits (B, 1, H, W) of pixels (B, C, H, W) from 0 to 255, uint8 or floating."""
        if all(side % self.stride == 0 for side in pixels_BCHW.shape[-2:]):
            return self.network(self._normal(pixels_BCHW))  # type: ignore[no-any-return]
        return self.forward_padded(pixels_BCHW)

    def forward_padded(self, pixels_BCHW: Tensor) -> Tensor:
        """Return the same as ``forward``, with the same operations for every size, as exporters need them."""
        height, width = pixels_BCHW.shape[-2:]
        # Written so that an exporter can infer that the network's input is a multiple of its stride.
        bottom, right = (self.stride * ((side + self.stride - 1) // self.stride) - side for side in (height, width))
        # The same on both sides, so that padding commutes with a flip: 1918 becomes 1 + 1918 + 1.
        top, left = bottom // 2, right // 2
        sides = left, right - left, top, bottom - top
        padded = functional.pad(self._normal(pixels_BCHW), sides, mode="replicate")
        return functional.pad(self.network(padded), [-side for side in sides])

    def _normal(self, pixels_BCHW: Tensor) -> Tensor:
        return (pixels_BCHW.to(self.mean.dtype) - self.mean) / self.std


def build_model(
    spec: ModelConfig, input: InputSettings, seed: int = 0, pretrained: bool = True, init_checkpoint: Path | None = None
) -> SegmentationModel:
    """Return a new net: random weights from ``seed``, and ``encoder_weights`` in the encoder if ``pretrained``.

    With ``init_checkpoint``, a file or a trained net's folder, all weights come from there. Raises CarvanaError that
    names the first weight that does not fit.
    """
    if init_checkpoint is not None:
        net = build_model(spec, input, seed, pretrained=False)
        try:
            load_weights(net, weights_path(init_checkpoint))
        except CarvanaError as error:
            raise CarvanaError(
                f"{error} Set train.init_checkpoint to weights of this architecture, or to null."
            ) from error
        return net
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(spec, UNetConfig):
            body: nn.Module = UNet(spec, input.channel_count)
        else:
            body = build_smp_unet(spec, spec.encoder_weights if pretrained else None)
            if input.channels == "gray":
                body = nn.Sequential(GrayToRGB(3), body)
    return SegmentationModel(body, input, spec.stride)


def load_model(folder: Path, weights: str = "last") -> tuple[SegmentationModel, InputSettings]:
    """Return a trained net, on the CPU in evaluation mode, and its input settings.

    Raises CarvanaError if the folder has no net, or weights of another architecture.
    """
    try:
        config = json.loads((folder / CONFIG).read_text())
        spec: ModelConfig = TypeAdapter(ModelConfig).validate_python(config["architecture"])
        input = InputSettings.model_validate(config["input"])
    except (OSError, ValueError, KeyError) as error:
        raise CarvanaError(f"{folder} has no trained net ({error}). Run 'dvc repro train'.") from error
    net = build_model(spec, input, pretrained=False)
    load_weights(net, folder / WEIGHTS[weights])
    return net.eval(), input


class UNet(nn.Module):
    """The U-Net as published: double convolutions, max pooling, transposed convolutions."""

    def __init__(self, spec: UNetConfig, channels: int) -> None:
        super().__init__()
        widths, norm = spec.widths, spec.norm
        ins = (channels, *widths[:-1])
        self.down = nn.ModuleList(double_conv(a, b, norm) for a, b in zip(ins, widths, strict=True))
        self.dropout = nn.Dropout2d(spec.dropout)
        rising = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.up = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, stride=2) for a, b in rising)
        self.merge = nn.ModuleList(double_conv(2 * b, b, norm) for _, b in rising)
        self.head = nn.Conv2d(widths[0], 1, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits (B, 1, H, W) of normalized pixels (B, C, H, W)."""
        skips: list[Tensor] = []
        features = self.down[0](pixels)
        for block in self.down[1:]:
            skips.append(features)
            features = block(functional.max_pool2d(features, 2))
        features = self.dropout(features)
        for up, merge in zip(self.up, self.merge, strict=True):
            features = merge(torch.cat([skips.pop(), up(features)], dim=1))
        return self.head(features)  # type: ignore[no-any-return]


def double_conv(channels_in: int, channels_out: int, norm: str) -> nn.Sequential:
    """Return two 3 x 3 convolutions, each with normalization and ReLU."""

    def half(channels: int) -> list[nn.Module]:
        convolution = nn.Conv2d(channels, channels_out, 3, padding=1, bias=norm == "none")
        return [convolution, *_norm(norm, channels_out), nn.ReLU(inplace=True)]

    return nn.Sequential(*half(channels_in), *half(channels_out))


def _norm(kind: str, channels: int) -> list[nn.Module]:
    if kind == "batch":
        return [nn.BatchNorm2d(channels)]
    return [nn.GroupNorm(min(8, channels), channels)] if kind == "group" else []


class GrayToRGB(nn.Module):
    """Repeats a gray image as RGB, so that the pretrained weights of an encoder stay as they are."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def forward(self, grey: Tensor) -> Tensor:
        """Return (B, times, H, W) of gray pixels (B, 1, H, W)."""
        return grey.expand(-1, self.times, -1, -1)


class TransposedDecoderUNet(nn.Module):
    """A U-Net whose decoder has one transposed convolution per level, and no skip connection at full size."""

    def __init__(self, spec: SmpUNetConfig, weights: str | None) -> None:
        super().__init__()
        from segmentation_models_pytorch.encoders import get_encoder

        self.encoder = get_encoder(spec.encoder, depth=len(spec.decoder_channels), weights=weights)
        # From the lowest level up; the first of all is the image itself.
        lowest, *skips = self.encoder.out_channels[:0:-1]
        self.up = nn.ModuleList()
        channels = lowest
        for out, skip in zip(spec.decoder_channels, [*skips, 0], strict=True):
            grow = nn.ConvTranspose2d(channels, out, 4, stride=2, padding=1, bias=False)
            self.up.append(nn.Sequential(grow, nn.BatchNorm2d(out), nn.ReLU(inplace=True)))
            channels = out + skip
        self.segmentation_head = nn.Conv2d(channels, 1, 3, padding=1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits (B, 1, H, W) of normalized pixels (B, C, H, W)."""
        _, *skips, features = self.encoder(pixels)
        for up in self.up:
            features = up(features)
            if skips:
                features = torch.cat([features, skips.pop()], dim=1)
        return self.segmentation_head(features)  # type: ignore[no-any-return]


def build_smp_unet(spec: SmpUNetConfig, weights: str | None) -> nn.Module:
    """Return smp's U-Net, or one with a transposed decoder; raises CarvanaError if the encoder can't be built."""
    # Imported here: it takes seconds, and other nets do not need it.
    import segmentation_models_pytorch as smp

    file = encoder_weights_path(weights)
    if spec.encoder.startswith("tu-") and not file and weights not in (None, "imagenet"):
        # smp would load timm's default weights for any name.
        raise CarvanaError(
            f"Encoder '{spec.encoder}' has no weights '{weights}'. Set encoder_weights to imagenet, a file or null."
        )
    fetched = None if file else weights
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the names of timm's weights
            if spec.upsampling == "transposed":
                unet: nn.Module = TransposedDecoderUNet(spec, fetched)
            else:
                unet = smp.Unet(
                    spec.encoder,
                    encoder_depth=len(spec.decoder_channels),
                    encoder_weights=fetched,
                    decoder_channels=spec.decoder_channels,
                )
    except (KeyError, ValueError, RuntimeError, OSError) as error:
        raise CarvanaError(_encoder_error(spec.encoder, weights, error)) from error
    if file:
        encoder = unet.get_submodule("encoder")
        _load_strict(encoder, _encoder_state(encoder, read_weights(file)), file)
    if spec.dropout:
        unet.segmentation_head = nn.Sequential(nn.Dropout2d(spec.dropout), unet.get_submodule("segmentation_head"))
    return unet


def _encoder_error(encoder: str, weights: str | None, error: Exception) -> str:
    # Hubs fail with errors of many libraries, so any error with weights counts as theirs.
    if weights and not isinstance(error, KeyError):
        return (
            f"The '{weights}' weights of encoder '{encoder}' cannot be downloaded ({_first_line(error)}). Check the "
            "network, or set encoder_weights to a local file, or to null for random weights."
        )
    return f"Encoder '{encoder}' with weights '{weights}' cannot be built: {_first_line(error)}"
