"""All settings of params.yaml: names, types, defaults and validation. Every error names the key at fault."""

import json
import re
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.competition.image_ids import HEIGHT, WIDTH
from pipeline.errors import CarvanaError
from pipeline.utils.files import read_versioned

T = TypeVar("T")


class StrictModel(BaseModel):
    """Base of all settings: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


def _no_repeats(values: tuple[T, ...]) -> tuple[T, ...]:
    for index, value in enumerate(values):
        if value in values[:index]:
            raise ValueError(f"{value} is listed twice")
    return values


def _as_text(value: Any) -> Any:
    """Return a whole number as text: YAML reads a name or an option such as ``32`` as a number."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Text = Annotated[str, BeforeValidator(_as_text)]

Unique = Annotated[tuple[T, ...], AfterValidator(_no_repeats)]
"""Different values."""

NonEmptyUnique = Annotated[tuple[T, ...], Field(min_length=1), AfterValidator(_no_repeats)]
"""Different values, at least one."""

_COMPETITION_URL = re.compile(
    r"(?:(?:https?://)?(?:www\.)?kaggle\.com/)?(?:(?:c|competitions)/)?([a-z0-9-]+)(?:[/?#].*)?"
)


class SampleSettings(StrictModel):
    """Section ``data.sample`` of params.yaml: size and seed of the synthetic sample."""

    train_cars: int = Field(default=14, ge=2, le=1000)
    """Training cars, with masks; 16 images each."""

    test_cars: int = Field(default=4, ge=1, le=1000)
    """Test cars, 16 images each; their masks are in data/truth.csv only."""

    seed: int = Field(default=0, ge=0, le=2**32 - 1)
    """Seed of the cars; another one draws other cars."""


class DataSettings(StrictModel):
    """Section ``data`` of params.yaml: the competition's files."""

    source: Literal["sample", "directory", "kaggle"]
    """``sample``: synthetic, drawn here. ``directory``: files that you have. ``kaggle``: downloaded."""

    directory: Text | None = None
    """Folder with the zips, or with the unpacked files. If set, it overrides ``source``."""

    competition: Text = "carvana-image-masking-challenge"
    """Name of the competition on Kaggle, as in its address; the address also works."""

    quality: Literal["standard", "hq"] = "standard"
    """``standard``, or ``hq``: the same photographs, less compressed, in larger files."""

    on_corrupt: Literal["error", "skip"] = "error"
    """For a training image or mask that cannot be read: stop, or skip it and list it in the summary."""

    sample: SampleSettings = SampleSettings()
    """The synthetic sample."""

    @field_validator("competition")
    @classmethod
    def _name_from_url(cls, value: str) -> str:
        match = _COMPETITION_URL.fullmatch(value.strip().lower())
        if match is None:
            raise ValueError(
                f"data.competition cannot be {value!r}: expected the name in the competition's address, "
                "such as carvana-image-masking-challenge"
            )
        return match[1]

    @property
    def is_from_kaggle(self) -> bool:
        """Whether the files are downloaded from Kaggle."""
        return self.source == "kaggle" and self.directory is None

    @model_validator(mode="after")
    def _check_directory(self) -> "DataSettings":
        if self.source == "directory" and self.directory is None:
            raise ValueError(
                "data.source is 'directory', but data.directory is not set; set it to the folder of the files"
            )
        return self


class FoldSettings(StrictModel):
    """Section ``folds`` of params.yaml: cross-validation, grouped by car."""

    count: int = Field(ge=2)
    """Number of folds."""

    active: NonEmptyUnique[int]
    """Folds to train and predict: all of them, or fewer to save time."""

    holdout_cars: int = Field(ge=0)
    """Cars kept out of every fold, on which ensembles of folds are scored; 0 for a final run."""

    seed: int = Field(default=0, ge=0)
    """Seed of the assignment of cars to folds."""

    @model_validator(mode="after")
    def _check_active(self) -> "FoldSettings":
        outside = [fold for fold in self.active if not 0 <= fold < self.count]
        if outside:
            raise ValueError(f"folds.active has {outside[0]}, but the {self.count} folds are 0 to {self.count - 1}")
        return self


LossName = Literal["bce", "border_bce", "dice", "lovasz"]

Precision = Annotated[Literal["auto", "32", "bf16", "16"], BeforeValidator(_as_text)]

Device = Literal["auto", "cpu", "gpu", "mps"]

Size = tuple[PositiveInt, PositiveInt]
"""Height and width in pixels."""


class InputSettings(StrictModel):
    """Section ``input`` of params.yaml: the net's input."""

    size: Literal["native"] | Size
    """``native`` (1280 x 1918, padded to a multiple of the net's stride), or height and width to shrink to."""

    channels: Literal["rgb", "gray"] = "rgb"
    """Color, or luminance only."""

    @property
    def height(self) -> int:
        """Height of the net's input, in pixels."""
        return HEIGHT if self.size == "native" else self.size[0]

    @property
    def width(self) -> int:
        """Width of the net's input, in pixels."""
        return WIDTH if self.size == "native" else self.size[1]

    @property
    def channel_count(self) -> int:
        """Number of input channels: 3 for ``rgb``, 1 for ``gray``."""
        return 3 if self.channels == "rgb" else 1


class AugmentSettings(StrictModel):
    """Augmentation of training images; 0 turns a change off."""

    hflip: float = Field(default=0.5, ge=0, le=1)
    """Probability of a horizontal flip."""

    shift: float = Field(default=0.05, ge=0, le=1)
    """Maximum shift, as a fraction of the image's side."""

    scale: float = Field(default=0.1, ge=0, lt=1)
    """Maximum zoom, in or out, as a fraction."""

    rotate: float = Field(default=3.0, ge=0, le=180)
    """Maximum rotation, in degrees."""

    brightness: float = Field(default=0.2, ge=0, le=1)
    """Maximum change of brightness and contrast, as a fraction."""

    hue: float = Field(default=0.05, ge=0, le=0.5)
    """Maximum change of hue and saturation, as fractions of their range; color input only."""


class TrainSettings(StrictModel):
    """Section ``train`` of params.yaml: training of one net."""

    seed: int = Field(default=0, ge=0, le=2**32 - 1)
    """Seed of initial weights, order, augmentation and dropout; each fold derives its own from it."""

    init_checkpoint: Text | None = None
    """Weights to start from: a trained net's folder, or a file, of the same architecture.

    ``{fold}`` in it stands for the fold. None: random weights, and ``encoder_weights`` for the encoder.
    """

    epochs: PositiveInt
    """Passes over the training images of a fold."""

    batch_size: PositiveInt
    """Images per batch and device."""

    accumulate_grad_batches: PositiveInt = 1
    """Batches per optimizer step."""

    crop: Size | None = None
    """Height and width of random crops to train on; None: whole images."""

    losses: Mapping[LossName, Annotated[float, Field(gt=0)]] = Field(min_length=1)
    """Losses and their weights, summed in float32."""

    border_weight: float = Field(default=5.0, ge=0)
    """Extra weight of pixels near the outline in ``border_bce``."""

    border_radius: PositiveInt = 3
    """Distance from the outline, in pixels of the net's input, that still counts as near in ``border_bce``."""

    optimizer: Literal["adam", "adamw", "sgd", "rmsprop"] = "adamw"
    """Optimizer; SGD and RMSprop have momentum 0.9."""

    lr: float = Field(gt=0)
    """Peak learning rate."""

    encoder_lr_scale: float = Field(default=1.0, gt=0)
    """Factor on ``lr`` for the encoder, such as 0.3 for pretrained weights; 1.0 where a net has no encoder."""

    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay of the optimizer."""

    schedule: Literal["constant", "cosine", "onecycle", "poly", "plateau"] = "cosine"
    """Schedule of the learning rate, by step; ``plateau`` halves it when the validation Dice stops rising."""

    warmup_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of all steps in which the learning rate rises; 0.3 if 0 for ``onecycle``, ignored by ``plateau``."""

    gradient_clip_norm: float | None = Field(default=None, gt=0)
    """Maximum norm of the gradient; None: no clipping."""

    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Decay of the moving average of weights, which validation and prediction use; None: no average."""

    precision: Precision = "auto"
    """``auto``: bf16 on GPUs from compute capability 8.0 and on CPUs with bf16 units, 16 on older GPUs, else 32."""

    channels_last: bool = True
    """Use the channels-last memory format where it is faster: on GPUs, and on CPUs with AVX2 or AVX-512."""

    devices: PositiveInt = 1
    """GPUs (or CPU processes) that share the batches."""

    validate_every: PositiveInt = 1
    """Epochs between validations; the last epoch is always validated."""

    augment: AugmentSettings = AugmentSettings()
    """Augmentation of training images."""


class HardwareSettings(StrictModel):
    """Section ``hardware`` of params.yaml: affects speed and memory, not results. DVC does not track it."""

    device: Device = "auto"
    """``auto``: a CUDA GPU if there is one, else the CPU."""

    workers: Literal["auto"] | NonNegativeInt = "auto"
    """Processes that load training images, at most one per CPU; none on a CPU if the images fit into ``cache_gb``.
    ``auto``: two CPUs are left free where there are four or more; fewer if shared memory is small."""

    cache_gb: Literal["auto"] | NonNegativeFloat = "auto"
    """Memory in GB for decoded, shrunk training images; if they fit, they are decoded only once. ``auto``: half of the
    free memory."""

    predict_batch: PositiveInt = 4
    """Images per forward pass of prediction and validation."""

    compile: bool = False
    """Compile nets with torch.compile: a minute per net, then up to 1.6 times faster on a GPU."""


class UNetConfig(StrictModel):
    """The original U-Net: double convolutions, and a decoder of transposed convolutions."""

    architecture: Literal["unet"]
    """Architecture of the network."""

    widths: tuple[PositiveInt, ...] = Field(default=(64, 128, 256, 512, 1024), min_length=2)
    """Channels per level, from full size down; each level halves height and width."""

    norm: Literal["batch", "group", "none"] = "batch"
    """Normalization after each convolution."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability of dropping a channel of the lowest level."""

    input: Mapping[str, Any] = {}
    """Overrides of the section ``input``."""

    train: Mapping[str, Any] = {}
    """Overrides of the section ``train``."""

    @property
    def stride(self) -> int:
        """The height and width of the network's input must be multiples of this."""
        return int(2 ** (len(self.widths) - 1))


class EncoderConfig(StrictModel):
    """A net of ``segmentation_models_pytorch`` (smp) over any of its encoders, including timm's (``tu-...``)."""

    architecture: str
    """Architecture of the network."""

    encoder: Text
    """Name of the encoder, such as ``resnet34`` or ``tu-efficientnetv2_rw_s``."""

    encoder_weights: Text | None = None
    """``imagenet``, another set that the encoder has, the path of a local file, or None: random weights."""

    encoder_options: Mapping[str, Any] = {}
    """Further arguments of a timm encoder, such as ``drop_path_rate: 0.1``."""

    options: Mapping[str, Any] = {}
    """Further arguments of the architecture in smp, such as ``decoder_interpolation: bilinear``."""

    input: Mapping[str, Any] = {}
    """Overrides of the section ``input``."""

    train: Mapping[str, Any] = {}
    """Overrides of the section ``train``."""


class SmpUNetConfig(EncoderConfig):
    """smp's U-Net."""

    architecture: Literal["smp_unet"]
    """Architecture of the network."""

    upsampling: Literal["nearest", "transposed"] = "nearest"
    """``nearest``: nearest neighbor, then two convolutions. ``transposed``: one transposed convolution; smaller."""

    decoder_channels: tuple[PositiveInt, ...] = (256, 128, 64, 32, 16)
    """Channels per decoder level, from the lowest up; their number is the encoder's depth."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability of dropping a channel of the decoder's output."""

    @property
    def smp_arguments(self) -> dict[str, Any]:
        """Arguments of ``segmentation_models_pytorch.create_model``, except for the encoder and ``options``."""
        channels = self.decoder_channels
        return {"arch": "unet", "encoder_depth": len(channels), "decoder_channels": channels}

    @property
    def stride(self) -> int:
        """The height and width of the network's input must be multiples of this."""
        return int(2 ** len(self.decoder_channels))


class SmpConfig(EncoderConfig):
    """Another architecture of smp, under smp's name."""

    architecture: Literal[
        "unetplusplus",
        "manet",
        "linknet",
        "fpn",
        "pspnet",
        "pan",
        "deeplabv3",
        "deeplabv3plus",
        "upernet",
        "segformer",
        "dpt",
    ]
    """Architecture of the network."""

    encoder_depth: Annotated[int, Field(ge=1, le=5)] | None = None
    """Levels of the encoder that the decoder uses; None: smp's default, 3 for ``pspnet``, 4 for ``dpt``, else 5."""

    @property
    def smp_arguments(self) -> dict[str, Any]:
        """Arguments of ``segmentation_models_pytorch.create_model``, except for the encoder and ``options``."""
        return {"arch": self.architecture, "encoder_depth": self._depth}

    @property
    def stride(self) -> int:
        """The height and width of the network's input must be multiples of this."""
        return int(2**self._depth)

    @property
    def _depth(self) -> int:
        return self.encoder_depth or {"pspnet": 3, "dpt": 4}.get(self.architecture, 5)


ModelConfig = Annotated[UNetConfig | SmpUNetConfig | SmpConfig, Field(discriminator="architecture")]


class ResolvedModel(BaseModel):
    """A model's spec, with its complete ``input`` and ``train`` settings: the sections, and the spec's overrides."""

    model_config = ConfigDict(frozen=True)

    spec: ModelConfig
    input: InputSettings
    train: TrainSettings

    @model_validator(mode="after")
    def _check_encoder(self) -> "ResolvedModel":
        if isinstance(self.spec, UNetConfig) and self.train.encoder_lr_scale != 1:
            raise ValueError(f"train.encoder_lr_scale is {self.train.encoder_lr_scale:g}, but the net has no encoder")
        return self

    @model_validator(mode="after")
    def _check_sizes(self) -> "ResolvedModel":
        sizes = {"train.crop": self.train.crop, "input.size": None if self.input.size == "native" else self.input.size}
        for key, size in sizes.items():
            if size is not None and any(side % self.spec.stride for side in size):
                raise ValueError(
                    f"{key} {size[0]} x {size[1]}: this model needs multiples of {self.spec.stride} in both directions"
                )
        crop = self.train.crop
        if crop is not None and (crop[0] > self.input.height or crop[1] > self.input.width):
            raise ValueError(
                f"train.crop {crop[0]} x {crop[1]} is larger than the input, {self.input.height} x {self.input.width}"
            )
        return self


Split = Literal["oof", "holdout", "test"]
"""Images to predict: validation cars of a fold, cars held out of all folds, or test images."""

ViewName = Annotated[str, Field(pattern=r"^(identity|hflip|(hflip\+)?scale:\d+(\.\d+)?)$")]
"""Name of a test-time augmentation: ``identity``, ``hflip``, ``scale:0.75`` or ``hflip+scale:0.75``."""

Views = NonEmptyUnique[ViewName]


class SplitTTA(StrictModel):
    """Views of each split. Views for an ablation do not require new predictions of the test images."""

    oof: Views
    """Views of validation cars; stored separately. ``identity``, ``hflip``, ``scale:0.75`` or ``hflip+scale:0.75``."""

    holdout: Views
    """Views of held-out cars; stored separately."""

    test: Views
    """Views of test images; only their sum is stored. ``oof`` and ``holdout`` must contain them, for scoring."""

    @model_validator(mode="after")
    def _check_scorable(self) -> "SplitTTA":
        for split in ("oof", "holdout"):
            missing = set(self.test) - set(getattr(self, split))
            if missing:
                raise ValueError(
                    f"predict.tta.test has {sorted(missing)[0]}, but predict.tta.{split} does not; add it there, "
                    "so that the submission can be scored"
                )
        return self


class PredictSettings(StrictModel):
    """Section ``predict`` of params.yaml: probability maps of each net."""

    tta: SplitTTA
    """Test-time augmentation: the views of each split."""

    checkpoint: Literal["last", "best"] = "last"
    """``last``, or ``best`` (biased: selected on the images of its out-of-fold score)."""

    precision: Precision = "auto"
    """As ``train.precision``."""

    shard_images: PositiveInt = 256
    """Images per file of probability maps; an interrupted run loses at most one file."""


ENSEMBLE_NAME = "ensemble"
"""Name of the ensemble where a model's name is expected, as in ``carvana segment --net``."""

MergeName = Literal["mean_probability", "mean_logit", "majority_vote"]

PostStep = Literal["refine_edges", "keep_largest", "fill_holes"]
"""Post-processing step between merged probability maps and mask, see ``pipeline.ensemble.postprocess``."""


def _in_order(steps: tuple[PostStep, ...]) -> tuple[PostStep, ...]:
    return tuple(step for step in get_args(PostStep) if step in steps)


Steps = Annotated[Unique[PostStep], AfterValidator(_in_order)]
"""Post-processing steps, always in the order of ``PostStep``."""


class EnsembleSettings(StrictModel):
    """Section ``ensemble`` of params.yaml: from probability maps to masks."""

    models: NonEmptyUnique[Text] | None = None
    """Models to merge; None: all active ones."""

    folds: NonEmptyUnique[int] | None = None
    """Folds to merge; None: all active ones."""

    weights: Mapping[str, Annotated[int, Field(gt=0, le=1_000_000)]] = {}
    """Weight of each model's nets; 1 if not given."""

    merge: MergeName = "mean_probability"
    """Mean of probabilities, mean of logits, or majority vote of masks."""

    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Pixels of at least this probability are foreground."""

    postprocess: Steps = ()
    """Post-processing steps after the merge, run in the order ``refine_edges``, ``keep_largest``, ``fill_holes``."""


ScoredSplit = Literal["oof", "holdout"]
"""Images with known masks: validation cars, predicted by the nets of their own fold, or held-out cars."""

SCORED_SPLITS: tuple[ScoredSplit, ...] = ("oof", "holdout")


NetId = tuple[str, int]
"""Model and fold of a net; the fold is ``OWN_FOLD`` if each image is predicted by the net of its own fold."""

Threshold = Annotated[float, Field(gt=0, lt=1)]


MIN_HOLDOUT_CARS = 2
"""Minimum number of held-out cars on which ensembles of folds are scored."""


class AblationSettings(StrictModel):
    """Section ``ablation`` of params.yaml: settings to compare on stored probability maps, in all combinations.

    None: each item alone, and the first two, the first three and so on together.
    """

    views: NonEmptyUnique[NonEmptyUnique[str]] | None = None
    """Sets of predicted views."""

    models: NonEmptyUnique[NonEmptyUnique[Text]] | None = None
    """Sets of active models."""

    folds: NonEmptyUnique[NonEmptyUnique[int]] | None = None
    """Sets of active folds, scored on held-out cars; must be None if there are no held-out cars."""

    merge: NonEmptyUnique[MergeName] = ("mean_probability", "mean_logit", "majority_vote")
    """Merge rules."""

    weights: NonEmptyUnique[Mapping[str, Annotated[int, Field(gt=0, le=1_000_000)]]] = ({},)
    """Weights of models, as in ``ensemble.weights``; the current ones are always included."""

    threshold: NonEmptyUnique[Threshold] = (0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7)
    """Thresholds, as ``ensemble.threshold``."""

    tolerance: Annotated[float, Field(ge=0)] | None = 0.0002
    """Maximum Dice loss, with 95 % confidence, of a cheaper setting that is recommended.

    None: any setting in the confidence set of the best.
    """

    postprocess: Unique[Steps] = ((), ("keep_largest",), ("fill_holes",), ("refine_edges",))
    """Sets of post-processing steps, tried on the current and the best settings only; empty: none is tried."""

    postprocess_best: Annotated[int, Field(ge=0)] = 2
    """How many of the best settings ``postprocess`` is tried on, besides the current one."""


PARAMS_FILE = "params.yaml"

_MODEL_NAME = re.compile(r"[A-Za-z0-9_-]+")

S = TypeVar("S", bound=BaseModel)


class ModelSettings(StrictModel):
    """Section ``models`` of params.yaml: the networks, by name."""

    active: NonEmptyUnique[Text]
    """Models to train, predict and merge."""

    specs: Mapping[str, ModelConfig]
    """All models, by name; only active ones are used."""

    @model_validator(mode="after")
    def _check_names(self) -> "ModelSettings":
        for name in self.specs:
            if not _MODEL_NAME.fullmatch(name) or name == ENSEMBLE_NAME:
                raise ValueError(
                    f"models.specs.{name}: a name has only letters, digits, - and _, and is not '{ENSEMBLE_NAME}'"
                )
        for name in self.active:
            if name not in self.specs:
                raise ValueError(f"models.active has '{name}', but models.specs has only {', '.join(self.specs)}")
        return self


class Params(StrictModel):
    """All of params.yaml."""

    data: DataSettings
    folds: FoldSettings
    input: InputSettings
    models: ModelSettings
    train: TrainSettings
    hardware: HardwareSettings
    predict: PredictSettings
    ensemble: EnsembleSettings
    ablation: AblationSettings

    def resolve_model(self, model: str) -> ResolvedModel:
        """Return a model with its complete settings; raises CarvanaError if it is unknown or its sizes do not fit."""
        if model not in self.models.specs:
            raise CarvanaError(f"Unknown model '{model}'. {PARAMS_FILE} has {', '.join(self.models.specs)}.")
        try:
            return ResolvedModel(spec=self.models.specs[model], input=self._input(model), train=self._train(model))
        except ValidationError as error:
            raise CarvanaError(_format_errors(error, f"models.specs.{model}")) from error

    def check(self) -> None:
        """Raise CarvanaError if sections contradict each other; inactive models may have unsuitable sizes."""
        for model in self.models.specs:
            self._input(model)
            self._train(model)
        for model in self.models.active:
            self.resolve_model(model)
        self.ensemble_members()
        self._check_ablation()

    def _input(self, model: str) -> InputSettings:
        return _apply_overrides(f"models.specs.{model}.input", self.input, self.models.specs[model].input)

    def _train(self, model: str) -> TrainSettings:
        return _apply_overrides(f"models.specs.{model}.train", self.train, self.models.specs[model].train)

    def ensemble_members(self) -> list[NetId]:
        """Return model and fold of each net of the ensemble; raises CarvanaError if one is not active."""
        models = self.ensemble.models or self.models.active
        folds = self.ensemble.folds or self.folds.active
        for key, chosen, active in (
            ("models", models, self.models.active),
            ("folds", folds, self.folds.active),
            ("weights", self.ensemble.weights, self.models.active),
        ):
            unknown = [item for item in chosen if item not in active]
            if unknown:
                active_key = "folds.active" if key == "folds" else "models.active"
                raise CarvanaError(f"ensemble.{key} has {unknown[0]}, but {active_key} does not. Add it there.")
        return [(model, fold) for model in models for fold in folds]

    def _check_ablation(self) -> None:
        ablation, views = self.ablation, self.predict.tta
        if self.folds.holdout_cars < MIN_HOLDOUT_CARS:
            if ablation.folds is not None:
                raise CarvanaError(
                    "ablation.folds needs held-out cars, on which ensembles of folds are scored. Set it to null, or "
                    f"folds.holdout_cars to {MIN_HOLDOUT_CARS} or more."
                )
            holdout_views = views.oof  # held-out cars are not scored, so their views do not matter
        else:
            holdout_views = views.holdout
        for key, sets, known, where in (
            ("models", ablation.models or (), self.models.active, "models.active"),
            ("weights", ablation.weights, self.models.active, "models.active"),
            ("folds", ablation.folds or (), self.folds.active, "folds.active"),
            ("views", ablation.views or (), views.oof, "predict.tta.oof"),
            ("views", ablation.views or (), holdout_views, "predict.tta.holdout"),
        ):
            unknown = [item for chosen in sets for item in chosen if item not in known]
            if unknown:
                raise CarvanaError(
                    f"ablation.{key} has {unknown[0]}, but {where} does not. Add it there and run 'dvc repro'."
                )


def read_params(path: Path = Path(PARAMS_FILE)) -> Params:
    """Return the settings in a params.yaml; raises CarvanaError, which names the file and each key at fault."""
    try:
        return parse_params(YAML(typ="safe").load(read_versioned(path)))
    except OSError as error:
        raise CarvanaError(f"{path} cannot be read ({error.strerror}). Run this in the project's folder.") from error
    except (YAMLError, UnicodeDecodeError) as error:
        raise CarvanaError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error


def parse_params(tree: Any) -> Params:
    """Return the settings in a parsed params.yaml; raises CarvanaError, which names each key at fault."""
    if not isinstance(tree, dict):
        raise CarvanaError(f"{PARAMS_FILE} has no settings. Restore it with 'git checkout {PARAMS_FILE}'.")
    _check_text(tree)
    try:
        params = _validate_strict(Params, tree)
        params.check()
    except ValidationError as error:
        raise CarvanaError(_format_errors(error)) from error
    return params


def _check_text(tree: Any, key: str = "") -> None:
    """Raise CarvanaError for dates, and for names that YAML reads as other than text or a whole number, such as 1e3."""
    if isinstance(tree, date):
        raise CarvanaError(f"{PARAMS_FILE}: {key} cannot be {tree}, which YAML reads as a date. Put it in quotes.")
    if isinstance(tree, dict):
        for name, value in tree.items():
            if isinstance(name, bool) or not isinstance(name, str | int):
                raise CarvanaError(
                    f"{PARAMS_FILE}: {key or 'the file'} has the name {name}, which YAML does not read as text. "
                    "Put it in quotes."
                )
            _check_text(value, f"{key}.{name}" if key else str(name))
    elif isinstance(tree, list):
        for index, value in enumerate(tree):
            _check_text(value, f"{key}.{index}")


def _validate_strict(kind: type[S], tree: Any) -> S:
    # Through JSON, because only there does strict mode accept a list as a tuple. It rejects '3' for 3 and true for 1.
    return kind.model_validate_json(json.dumps(tree, default=str), strict=True)


def _apply_overrides(key: str, defaults: S, overrides: Mapping[str, Any]) -> S:
    """Return ``defaults`` with the overrides of a spec, which are at ``key`` of params.yaml."""
    tree = defaults.model_dump(mode="json")
    for name, value in overrides.items():
        tree[name] = tree[name] | value if name == "augment" and isinstance(value, dict) else value
    try:
        return _validate_strict(type(defaults), tree)
    except ValidationError as error:
        raise CarvanaError(_format_errors(error, key)) from error


_RENAMED = {
    "machine": "hardware",
    "predict.views": "predict.tta",
    "predict.weights": "predict.checkpoint",
    "train.accumulate": "train.accumulate_grad_batches",
    "train.clip": "train.gradient_clip_norm",
    "train.ema": "train.ema_decay",
    "train.init": "train.init_checkpoint",
    "train.warmup": "train.warmup_fraction",
    "net": "architecture",
    "decoder": "upsampling",
}
"""New names of renamed settings; those of a model's spec have no section."""


def _unknown_key(key: str) -> str:
    parents, _, name = key.rpartition(".")
    section = parents.rpartition(".")[2]
    new = _RENAMED.get(f"{section}.{name}".lstrip(".")) or (_RENAMED.get(name) if key.startswith("models.") else None)
    if new is None:
        return f"Unknown setting {key}. Correct the name or remove it."
    return f"Unknown setting {key}. Its new name is {new.rpartition('.')[2]}."


def _format_errors(error: ValidationError, prefix: str = "") -> str:
    errors = error.errors()
    # The parent of an invalid value is often reported too, as empty or too short.
    inner = [a for a in errors if not any(b["loc"] != a["loc"] == b["loc"][: len(a["loc"])] for b in errors)]
    return "\n".join(f"{PARAMS_FILE}: {_format_error(details, prefix)}" for details in inner)


def _format_error(details: ErrorDetails, prefix: str) -> str:
    steps = [str(step) for step in details["loc"]]
    # The location also names the member of a union that was tried, such as 'unet' or 'tuple[int, int]'.
    if steps[:2] == ["models", "specs"]:
        del steps[3:4]
    key = ".".join(filter(None, [prefix, *(step for step in steps if "[" not in step)]))
    reason = details["msg"].removeprefix("Value error, ")
    if details["type"] == "extra_forbidden":
        return _unknown_key(key)
    if details["type"] == "missing":
        return f"{key} is missing. Set it."
    if details["type"] == "value_error":
        return f"{reason}." if not key or key in reason else f"{key}: {reason}."
    return f"{key} cannot be {details['input']!r}: {reason[0].lower()}{reason[1:]}.{_yaml_hint(details)}"


def _yaml_hint(details: ErrorDetails) -> str:
    """Return a sentence where YAML reads a word otherwise than it was probably meant, or nothing."""
    kind, value = details["type"], details["input"]
    if kind == "string_type":
        return " Put it in quotes."
    word = value.lower() if isinstance(value, str) else ""
    if kind == "bool_type" and word in ("on", "yes", "off", "no"):
        return f" Write {'true' if word in ('on', 'yes') else 'false'}."
    if kind != "literal_error" and word in ("none", "off", "no"):
        return " Write null for none."
    return ""
