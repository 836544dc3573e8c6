"""The U-Nets, and the folder of a trained net: weights and config.json."""

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config import InputSettings, ModelConfig, SmpUNetConfig, UNetConfig
from pipeline.errors import CarvanaError
from pipeline.utils.files import atomic_write, write_json
from pipeline.workspace import CONFIG, WEIGHTS, project_root

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
_GRAY_MEAN = (0.449,)
_GRAY_STD = (0.226,)

StateDict = Mapping[str, Tensor]


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


def save_weights(path: Path, state: StateDict) -> None:
    """Write weights as safetensors; the file appears whole or not at all."""
    with atomic_write(path) as temporary:
        save_file({name: value.detach().cpu().contiguous() for name, value in state.items()}, temporary)


def save_config(folder: Path, spec: ModelConfig, input: InputSettings, facts: Mapping[str, Any]) -> None:
    """Write what ``load_model`` needs to build the net, and ``facts`` about it for people."""
    config = {"architecture": spec.model_dump(exclude={"input", "train"}), "input": input.model_dump(), **facts}
    write_json(folder / CONFIG, config)


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


def load_weights(net: nn.Module, path: Path) -> None:
    """Load weights into ``net``; raises CarvanaError that names what does not fit."""
    state = read_weights(path)
    unknown = sorted(set(state) - set(net.state_dict()))
    if unknown:
        raise CarvanaError(
            f"{path} has weights of another architecture: the net has no '{unknown[0]}' ({len(unknown)} such names)."
        )
    _load_strict(net, state, path)


def weights_path(path: Path) -> Path:
    """Return the file of weights at a path: the file itself, or the last weights in a trained net's folder."""
    return path / WEIGHTS["last"] if path.is_dir() else path


def read_weights(path: Path) -> StateDict:
    """Return the weights of a .safetensors file, or of a PyTorch file with nothing but tensors."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CarvanaError(f"{path} does not exist. Check the path of the weights.") from error
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CarvanaError(f"{path} is not a file of weights ({error}). Is it complete?") from error
    except Exception as error:  # torch.load raises errors of many types for what it does not unpickle
        # Not torch's own message, which advises to run the code in the file.
        raise CarvanaError(f"{path} is not a plain state dict. Save it as .safetensors.") from error
    weights = state.get("state_dict", state) if isinstance(state, dict) else None
    if not isinstance(weights, dict):
        raise CarvanaError(f"{path} has no named weights. Save the state_dict of a net.")
    return weights


def _load_strict(module: nn.Module, state: StateDict, path: Path) -> None:
    wanted = {name: value.shape for name, value in module.state_dict().items()}
    missing = sorted(set(wanted) - set(state))
    unfit = sorted(name for name in set(wanted) & set(state) if state[name].shape != wanted[name])
    if missing or unfit:
        name = (missing or unfit)[0]
        reason = (
            f"'{name}' is missing" if missing else f"'{name}' is {list(state[name].shape)}, not {list(wanted[name])}"
        )
        raise CarvanaError(f"{path} has weights of another architecture: {reason} ({len(missing + unfit)} such names).")
    broken = non_finite_name(state)
    if broken is not None:
        raise CarvanaError(f"{path}: '{broken}' contains NaN or infinity. Train the net again with a lower train.lr.")
    module.load_state_dict({name: state[name] for name in wanted})


def non_finite_name(state: StateDict) -> str | None:
    """Return the name of the first tensor that contains NaN or infinity, None where all are finite.

    Outputs alone do not show it: convolutions in bf16 on a CPU give finite numbers for infinite weights.
    """
    return next((name for name, value in state.items() if not torch.isfinite(value).all()), None)


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


def encoder_weights_path(weights: str | None) -> Path | None:
    """Return the file that ``encoder_weights`` names, relative to the project's root; None for the name of a set."""
    if weights is None or not ("/" in weights or Path(weights).suffix in (".safetensors", ".pt", ".pth", ".bin")):
        return None
    return project_root() / Path(weights).expanduser()


def init_checkpoint_path(init_checkpoint: str | None, fold: int) -> Path | None:
    """Return the path in ``train.init_checkpoint`` for a fold, relative to the project's root."""
    if init_checkpoint is None:
        return None
    return weights_path(project_root() / Path(init_checkpoint.replace("{fold}", str(fold))).expanduser())


def initial_weights_digest(spec: ModelConfig, init_checkpoint: Path | None = None) -> str | None:
    """Return the SHA-256 of the file that a net starts from, or None without one."""
    key, file = "train.init_checkpoint", init_checkpoint
    if file is None:
        key, file = (
            "encoder_weights",
            encoder_weights_path(spec.encoder_weights) if isinstance(spec, SmpUNetConfig) else None,
        )
    if file is None:
        return None
    if not file.is_file():
        raise CarvanaError(f"{file} does not exist. Check {key}.")
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _encoder_state(encoder: nn.Module, state: StateDict) -> StateDict:
    """Return the encoder's weights under its own names, from a file of an encoder, of a whole U-Net (this project's or
    smp's), or of a classifier as timm and torchvision save it."""
    wanted = set(encoder.state_dict())
    for prefix, replacement in (("", ""), ("network.encoder.", ""), ("encoder.", ""), ("", "model.")):
        renamed = {
            replacement + name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)
        }
        if wanted & set(renamed):
            return renamed
    return state


def _encoder_error(encoder: str, weights: str | None, error: Exception) -> str:
    # Hubs fail with errors of many libraries, so any error with weights counts as theirs.
    if weights and not isinstance(error, KeyError):
        return (
            f"The '{weights}' weights of encoder '{encoder}' cannot be downloaded ({_first_line(error)}). Check the "
            "network, or set encoder_weights to a local file, or to null for random weights."
        )
    return f"Encoder '{encoder}' with weights '{weights}' cannot be built: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip("\"'")[:300]
