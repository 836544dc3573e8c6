"""What a net is, sees and learns from. No torch here, so that params are read at once."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from pipeline.competition.layout import HEIGHT, WIDTH
from pipeline.sections import StrictModel

LossName = Literal["bce", "border_bce", "dice", "lovasz"]

Precision = Literal["auto", "32", "bf16", "16"]

Device = Literal["auto", "cpu", "gpu", "mps"]

Size = tuple[PositiveInt, PositiveInt]
"""Height and width in pixels."""


class InputSettings(StrictModel):
    """Section ``input`` of params.yaml: what the net sees of a photograph."""

    size: Literal["native"] | Size
    """``native`` (1280 x 1918, padded to what the net's strides need), or height and width to shrink to."""

    channels: Literal["rgb", "gray"] = "rgb"
    """Color, or luminance only."""

    @property
    def height(self) -> int:
        """Rows of what the net sees, in pixels."""
        return HEIGHT if self.size == "native" else self.size[0]

    @property
    def width(self) -> int:
        """Columns of what the net sees, in pixels."""
        return WIDTH if self.size == "native" else self.size[1]

    @property
    def channel_count(self) -> int:
        """3 or 1."""
        return 3 if self.channels == "rgb" else 1


class AugmentSettings(StrictModel):
    """Random changes to training images; a value of 0 leaves a change out."""

    hflip: float = Field(default=0.5, ge=0, le=1)
    """Probability of a flip left to right."""

    shift: float = Field(default=0.05, ge=0, le=1)
    """Greatest shift, as a part of the image's side."""

    scale: float = Field(default=0.1, ge=0, lt=1)
    """Greatest zoom, in or out."""

    rotate: float = Field(default=3.0, ge=0, le=180)
    """Greatest rotation, in degrees."""

    brightness: float = Field(default=0.2, ge=0, le=1)
    """Greatest change of brightness and contrast."""

    hue: float = Field(default=0.05, ge=0, le=0.5)
    """Greatest change of hue and saturation, as parts of the full circle and range; color input only."""


class TrainSettings(StrictModel):
    """Section ``train`` of params.yaml: how a net learns."""

    seed: int = Field(default=0, ge=0, le=2**32 - 1)
    """Of first weights, order, augmentation and dropout; the fold is mixed in."""

    init_checkpoint: str | None = None
    """Weights to start from: a trained net's folder, or a file, of the same architecture.

    ``{fold}`` in it stands for the fold. None for random ones, and those of ``encoder_weights``.
    """

    epochs: PositiveInt
    """Passes over the training images of a fold."""

    batch_size: PositiveInt
    """Images a step and device."""

    accumulate_grad_batches: PositiveInt = 1
    """Batches whose gradients make one optimizer step."""

    crop: Size | None = None
    """Height and width of a random crop that the net trains on; None for whole images."""

    losses: Mapping[LossName, Annotated[float, Field(gt=0)]] = Field(min_length=1)
    """Weighted sum of losses, computed in float32."""

    border_weight: float = Field(default=5.0, ge=0)
    """Extra weight of pixels near an outline in ``border_bce``."""

    optimizer: Literal["adam", "adamw", "sgd", "rmsprop"] = "adamw"
    """SGD and RMSprop run with momentum 0.9."""

    lr: float = Field(gt=0)
    """Learning rate at its height."""

    weight_decay: float = Field(default=0.0, ge=0)
    """Of the optimizer."""

    schedule: Literal["constant", "cosine", "onecycle", "poly", "plateau"] = "cosine"
    """Of the learning rate; ``plateau`` halves it when the validation Dice stands still, the others go by step."""

    warmup_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Part of all steps in which the learning rate rises from 0 (cosine, poly, constant, onecycle)."""

    gradient_clip_norm: float | None = Field(default=None, gt=0)
    """Greatest norm of the gradient; None for no clipping."""

    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Decay of the weights' exponential moving average, which validation and prediction use; None for none."""

    precision: Precision = "auto"
    """``auto``: bf16 on GPUs from compute capability 8.0 and on CPUs with AMX or AVX512-BF16, fp16 on older GPUs."""

    channels_last: bool = True
    """Memory format that convolutions run faster in on GPUs; CPUs keep their own."""

    devices: PositiveInt = 1
    """GPUs (or CPU processes) that share the batches."""

    validate_every: PositiveInt = 1
    """Epochs between validations; the last epoch is always validated."""

    augment: AugmentSettings = AugmentSettings()
    """Random changes to training images."""


class HardwareSettings(StrictModel):
    """Section ``machine`` of params.yaml: what decides how fast a result comes, not what it is. DVC ignores it."""

    device: Device = "auto"
    """``auto`` takes a GPU where there is one."""

    workers: int = Field(default=2, ge=0)
    """Processes that load training images, at most one a processor; on a CPU none where they fit into ``cache_gb``."""

    cache_gb: float = Field(default=2.0, ge=0)
    """Memory that decoded and shrunk training images may take, in GB; they are decoded once if they fit."""

    predict_batch: PositiveInt = 4
    """Images a forward pass of prediction, and of scoring while training."""


class UNetConfig(StrictModel):
    """The U-Net as it was published: double convolutions, transposed-convolution decoder."""

    architecture: Literal["unet"]
    """Which family."""

    widths: tuple[PositiveInt, ...] = Field(default=(64, 128, 256, 512, 1024), min_length=2)
    """Channels at each level, from full size down; each level halves the image."""

    norm: Literal["batch", "group", "none"] = "batch"
    """Normalization after each convolution."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability with which channels of the lowest level are dropped."""

    input: Mapping[str, Any] = {}
    """Overrides of the section ``input``."""

    train: Mapping[str, Any] = {}
    """Overrides of the section ``train``."""

    @property
    def stride(self) -> int:
        """Height and width of what the net sees must be multiples of this."""
        return int(2 ** (len(self.widths) - 1))


class SmpUNetConfig(StrictModel):
    """``segmentation_models_pytorch.Unet`` over any encoder it knows, timm's ``tu-...`` among them."""

    architecture: Literal["smp_unet"]
    """Which family."""

    encoder: str
    """Name of the encoder, such as ``resnet34`` or ``tu-efficientnetv2_rw_s``."""

    encoder_weights: str | None = None
    """``imagenet`` or another set that the encoder has, the path of a local file, or None for random ones."""

    upsampling: Literal["nearest", "transposed"] = "nearest"
    """How features grow from level to level: smp's own (nearest neighbour, then two convolutions), or a transposed
    convolution alone, which is smaller."""

    decoder_channels: tuple[PositiveInt, ...] = (256, 128, 64, 32, 16)
    """Channels of the decoder, from the lowest level up; their number is the encoder's depth."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability with which channels of the decoder's result are dropped."""

    input: Mapping[str, Any] = {}
    """Overrides of the section ``input``."""

    train: Mapping[str, Any] = {}
    """Overrides of the section ``train``."""

    @property
    def stride(self) -> int:
        """Height and width of what the net sees must be multiples of this."""
        return int(2 ** len(self.decoder_channels))


ModelConfig = Annotated[UNetConfig | SmpUNetConfig, Field(discriminator="architecture")]


class ResolvedModel(BaseModel):
    """A model as it will be built and trained: its spec, with the defaults of ``input`` and ``train`` filled in."""

    model_config = ConfigDict(frozen=True)

    spec: ModelConfig
    input: InputSettings
    train: TrainSettings

    @model_validator(mode="after")
    def _sizes_fit(self) -> "ResolvedModel":
        sizes = {"train.crop": self.train.crop, "input.size": None if self.input.size == "native" else self.input.size}
        for key, size in sizes.items():
            if size is not None and any(side % self.spec.stride for side in size):
                raise ValueError(
                    f"{key} {size[0]} x {size[1]}: this net needs multiples of {self.spec.stride} in both directions"
                )
        crop = self.train.crop
        if crop is not None and (crop[0] > self.input.height or crop[1] > self.input.width):
            raise ValueError(f"train.crop {crop[0]} x {crop[1]} is larger than what the net sees")
        return self
