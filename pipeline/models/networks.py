"""Networks, and the folder of a trained net: weights and config.json."""

import contextlib
import copy
import inspect
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.nn import functional

from pipeline.config import (
    EncoderConfig,
    InputSettings,
    ModelConfig,
    Size,
    SmpConfig,
    SmpUNetConfig,
    UNetConfig,
)
from pipeline.errors import CarvanaError, is_out_of_memory
from pipeline.models.weights import (
    encoder_weights_source,
    first_line,
    load_encoder,
    load_weights,
)
from pipeline.workspace import CONFIG, WEIGHTS, weights_path

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
_GRAY_MEAN = (0.449,)
_GRAY_STD = (0.226,)


class SegmentationModel(nn.Module):
    """A network with normalization before it, and padding to its stride that is removed after it."""

    mean: Tensor
    std: Tensor

    def __init__(
        self, body: nn.Module, input: InputSettings, stride: int, mean: Sequence[float] = (), std: Sequence[float] = ()
    ) -> None:
        super().__init__()
        self.network = body
        self.stride = stride
        self.dtype = torch.float32
        """Of the network's input, which autocast or ``prepare_for_gpu`` decides."""
        gray = input.channels == "gray"
        mean, std = mean or (_GRAY_MEAN if gray else _IMAGENET_MEAN), std or (_GRAY_STD if gray else _IMAGENET_STD)
        for name, values in (("mean", mean), ("std", std)):
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
        return ((pixels_BCHW.to(self.mean.dtype) - self.mean) / self.std).to(self.dtype)


def prepare_for_gpu(net: SegmentationModel, dtype: torch.dtype) -> SegmentationModel:
    """Return a copy of a net in evaluation mode that predicts faster: weights cast once, batch norm in convolutions."""
    prepared = copy.deepcopy(net)
    # A network that torch.fx can't trace keeps its batch norm.
    with contextlib.suppress(Exception):
        prepared.network = fuse(prepared.network)
    prepared.network = prepared.network.to(dtype)
    prepared.dtype = dtype
    return prepared


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
            body = build_smp(spec, spec.encoder_weights if pretrained else None)
            if input.channels == "gray":
                body = nn.Sequential(GrayToRGB(3), body)
    stride = _needed_stride(body, input.channel_count, spec.stride)
    return SegmentationModel(body, input, stride, *_timm_normalization(spec, input))


def _timm_normalization(spec: ModelConfig, input: InputSettings) -> tuple[Sequence[float], Sequence[float]]:
    """Return mean and standard deviation per channel that a timm encoder was trained with; empty for other nets.

    Most were trained with ImageNet's, but EfficientNet-Lite, for one, with 0.5 and 0.5.
    """
    if not isinstance(spec, EncoderConfig) or not spec.encoder.startswith("tu-"):
        return (), ()
    from timm.models import get_pretrained_cfg

    trained = get_pretrained_cfg(spec.encoder.removeprefix("tu-"), allow_unregistered=True)
    if trained is None:
        return (), ()
    values = trained.mean, trained.std
    return values if input.channels == "rgb" else tuple((sum(channels) / 3,) for channels in values)  # type: ignore[return-value]


def _needed_stride(body: nn.Module, channels: int, stride: int) -> int:
    """Return the least multiple of ``stride`` that the sides of an input must be multiples of.

    Some encoders need more than the strides of their levels say: HRNet halves once more inside. Returns ``stride``
    where no multiple up to 64 is enough, as for encoders of one fixed size.
    """
    if isinstance(body, UNet):
        return stride
    shapes = copy.deepcopy(body).to("meta").eval()
    for factor in (1, 2, 4, 8):
        side = factor * stride
        if side <= 64 and forward_error(shapes, (1, channels, 3 * side, 5 * side)) is None:
            return side
    return stride


def forward_error(network: nn.Module, shape: tuple[int, int, int, int]) -> str | None:
    """Return why ``network`` can't process an input of ``shape`` (B, C, H, W), or None if it can.

    A network on the meta device is run on shapes alone, which takes milliseconds.
    """
    device = next(network.parameters()).device
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logits = network(torch.zeros(shape, device=device))
    except Exception as error:  # libraries raise assertions, values and shapes of all kinds here
        if is_out_of_memory(error):
            raise
        return first_line(error)
    expected = (shape[0], 1, *shape[2:])
    return None if tuple(logits.shape) == expected else f"the output is {tuple(logits.shape)}, not {expected}"


def check_sizes(
    spec: ModelConfig, input: InputSettings, batches: Mapping[str, tuple[int, int, int]], sizes: Mapping[str, Size]
) -> None:
    """Raise CarvanaError if a net of ``spec`` can't process all inputs that it will get; takes seconds at most.

    ``batches`` are (images, height, width) in training mode, ``sizes`` are (height, width) in prediction, each by what
    it is for. Only shapes are computed, except for networks that need real numbers.
    """
    name = spec.encoder if isinstance(spec, EncoderConfig) else spec.architecture
    net = build_model(spec, input, pretrained=False)
    shapes = copy.deepcopy(net).to("meta")
    inputs = [(purpose, True, batch) for purpose, batch in batches.items()]
    inputs += [(purpose, False, (1, *size)) for purpose, size in sizes.items()]
    for purpose, training, (images, height, width) in inputs:
        shape = (images, input.channel_count, height, width)
        error = dry_run_error(net.train(training), shapes.train(training), shape)
        if error is None:
            continue
        if training and images == 1 and dry_run_error(net, shapes, (2, *shape[1:])) is None:
            raise CarvanaError(
                f"{name} can't train on a batch of one image ({purpose}: {error}). Raise train.batch_size, or train on "
                "more images per process."
            )
        raise CarvanaError(
            f"{name} can't process {height} x {width} ({purpose}): {error}. {_accepted_sizes(shapes.eval(), input)}"
        )


def dry_run_error(net: nn.Module, shapes: nn.Module, shape: tuple[int, int, int, int]) -> str | None:
    """Return why ``net`` can't process an input of ``shape`` (B, C, H, W), or None if it can.

    ``shapes`` is a copy of it on the meta device, which decides unless an operation needs real numbers.
    """
    error = forward_error(shapes, shape)
    return forward_error(net, shape) if error and "meta" in error.lower() else error


def _accepted_sizes(shapes: nn.Module, input: InputSettings) -> str:
    """Return which sizes a network on the meta device accepts, in a sentence, found by trying some."""

    def accepts(height: int, width: int) -> bool:
        return forward_error(shapes, (1, input.channel_count, height, width)) is None

    for multiple in (32, 64, 128, 224, 256):
        height, width = (max(1, round(side / multiple)) * multiple for side in (input.height, input.width))
        # Another size too, as networks of one fixed size accept one multiple of it.
        if accepts(height, width) and accepts(height, width + multiple):
            return f"It accepts multiples of {multiple}: set input.size to [{height}, {width}]."
    for side in (224, 256, 384, 448, 512):
        if accepts(side, side):
            return f"It accepts {side} x {side}: set input.size to [{side}, {side}], with no crops or scaled views."
    return "Choose another encoder, or another input.size."


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
    groups = max(count for count in range(1, 9) if channels % count == 0)
    return [nn.GroupNorm(groups, channels)] if kind == "group" else []


class GrayToRGB(nn.Module):
    """Repeats a gray image as RGB, so that the pretrained weights of an encoder stay as they are."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def forward(self, gray: Tensor) -> Tensor:
        """Return (B, times, H, W) of gray pixels (B, 1, H, W)."""
        return gray.expand(-1, self.times, -1, -1)


class TransposedDecoderUNet(nn.Module):
    """A U-Net whose decoder has one transposed convolution per level, and no skip connection at full size."""

    def __init__(self, spec: SmpUNetConfig, weights: str | None) -> None:
        super().__init__()
        from segmentation_models_pytorch.encoders import get_encoder

        self.encoder = get_encoder(
            spec.encoder, depth=len(spec.decoder_channels), weights=weights, **spec.encoder_options
        )
        # From the lowest level up; the first of all is the image itself.
        lowest, *skips = self.encoder.out_channels[:0:-1]
        self.up = nn.ModuleList()
        channels = lowest
        for out, skip in zip(spec.decoder_channels, [*skips, 0], strict=True):
            upsample = nn.ConvTranspose2d(channels, out, 4, stride=2, padding=1, bias=False)
            self.up.append(nn.Sequential(upsample, nn.BatchNorm2d(out), nn.ReLU(inplace=True)))
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


def build_smp(spec: SmpUNetConfig | SmpConfig, weights: str | None) -> nn.Module:
    """Return a net of smp, or a U-Net with a transposed decoder; raises CarvanaError if it can't be built."""
    # Imported here: it takes seconds, and other nets do not need it.
    import segmentation_models_pytorch as smp

    _check_options(spec)
    start = encoder_weights_source(spec.encoder, weights)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the names of timm's weights
            # From a hub, smp and timm load by themselves: timm adapts some weights to the net.
            from_hub = weights if start and start.from_hub else None
            if isinstance(spec, SmpUNetConfig) and spec.upsampling == "transposed":
                net: nn.Module = TransposedDecoderUNet(spec, from_hub)
            else:
                arguments = {**spec.smp_arguments, **spec.encoder_options, **spec.options}
                net = smp.create_model(encoder_name=spec.encoder, encoder_weights=from_hub, **arguments)
    except Exception as error:  # libraries raise errors of all kinds here
        if is_out_of_memory(error):
            raise
        levels = "decoder_channels" if isinstance(spec, SmpUNetConfig) else "levels (encoder_depth)"
        raise CarvanaError(
            f"{spec.architecture} with the encoder '{spec.encoder}' cannot be built with "
            f"{spec.smp_arguments['encoder_depth']} {levels}: {first_line(error)}. Choose another encoder, depth or "
            "option."
        ) from error
    if start and not start.from_hub:
        load_encoder(net.get_submodule("encoder"), start)
    if isinstance(spec, SmpUNetConfig) and spec.dropout:
        net.segmentation_head = nn.Sequential(nn.Dropout2d(spec.dropout), net.get_submodule("segmentation_head"))
    return net


_NOT_OPTIONS = (
    "self",
    "kwargs",
    "encoder_name",
    "encoder_weights",
    "in_channels",
    "classes",
    "activation",
    "aux_params",
)
"""Parameters of smp's classes that the pipeline decides."""


def _check_options(spec: SmpUNetConfig | SmpConfig) -> None:
    """Raise CarvanaError that names an option that the architecture or the encoder does not have."""
    from segmentation_models_pytorch import MODEL_ARCHITECTURES_MAPPING

    net = MODEL_ARCHITECTURES_MAPPING[spec.smp_arguments["arch"]]
    parameters = set(inspect.signature(net.__init__).parameters)
    known = parameters - {*_NOT_OPTIONS, *spec.smp_arguments}
    if isinstance(spec, SmpUNetConfig) and spec.upsampling == "transposed":
        known = set()
    unknown = [name for name in spec.options if name not in known]
    if unknown:
        raise CarvanaError(
            f"{spec.architecture} has no option '{unknown[0]}'. Its options are: {', '.join(sorted(known)) or 'none'}."
        )
    # What timm does not know, it names itself.
    unknown = [name for name in spec.encoder_options if name in parameters or not spec.encoder.startswith("tu-")]
    if unknown:
        raise CarvanaError(
            f"Encoder '{spec.encoder}' has no option '{unknown[0]}'. encoder_options are arguments of timm's encoders, "
            "whose names start with tu-."
        )
