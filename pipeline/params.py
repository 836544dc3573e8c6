"""params.yaml as frozen, typed sections; unknown keys and ill-typed values are errors that name the key."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError, model_validator
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.data.settings import DataSettings, FoldSettings
from pipeline.ensembling.ensemble import ENSEMBLE_NAME, EnsembleSettings
from pipeline.ensembling.grid import MIN_HOLDOUT_CARS, AblationSettings, AblationSpace
from pipeline.errors import CarvanaError
from pipeline.learning.prediction_settings import PredictSettings
from pipeline.learning.settings import HardwareSettings, InputSettings, ModelConfig, ResolvedModel, TrainSettings
from pipeline.sections import NonEmptyUnique, StrictModel

PARAMS_FILE = "params.yaml"

_NAME = re.compile(r"[A-Za-z0-9_-]+")

T = TypeVar("T", bound=BaseModel)


class ModelSettings(StrictModel):
    """Section ``models`` of params.yaml."""

    active: NonEmptyUnique[str]
    """Models to train, predict and merge."""

    specs: Mapping[str, ModelConfig]
    """Every model that can be made active, by name."""

    @model_validator(mode="after")
    def _active_exist(self) -> "ModelSettings":
        for name in self.specs:
            if not _NAME.fullmatch(name) or name == ENSEMBLE_NAME:
                raise ValueError(
                    f"models.specs.{name}: name it otherwise, in letters, digits, - and _, not '{ENSEMBLE_NAME}'"
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
        """Return a model with the defaults of ``input`` and ``train`` filled in; raises CarvanaError if unknown."""
        if model not in self.models.specs:
            raise CarvanaError(f"There is no model '{model}': {PARAMS_FILE} has {', '.join(self.models.specs)}.")
        try:
            return ResolvedModel(spec=self.models.specs[model], input=self._input(model), train=self._train(model))
        except ValidationError as error:
            raise CarvanaError(_format_errors(error, f"models.specs.{model}")) from error

    def check(self) -> None:
        """Raise CarvanaError for what no section can tell by itself; inactive models need not fit ``input``."""
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

    def ensemble_members(self) -> list[tuple[str, int]]:
        """Return the model and fold of every net of the ensemble; raises CarvanaError for one that is not active."""
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
                raise CarvanaError(f"ensemble.{key} has {unknown[0]}, which {active_key} lacks: add it there.")
        return [(model, fold) for model in models for fold in folds]

    def ablation_space(self) -> AblationSpace:
        """Return what an ablation chooses from."""
        views = self.predict.tta
        return AblationSpace(
            ablation=self.ablation,
            ensemble=self.ensemble,
            models=self.models.active,
            folds=self.folds.active,
            predicted={"oof": views.oof, "holdout": views.holdout},
            views=views.test,
            weights=self.predict.checkpoint,
        )

    def _check_ablation(self) -> None:
        ablation, views = self.ablation, self.predict.tta
        if self.folds.holdout_cars < MIN_HOLDOUT_CARS:
            if ablation.folds is not None:
                raise CarvanaError(
                    f"ablation.folds names fold ensembles, which are scored on held-out cars alone: set it to null, or "
                    f"folds.holdout_cars to {MIN_HOLDOUT_CARS} or more."
                )
            held_out = views.oof  # nothing is scored on others
        else:
            held_out = views.holdout
        for key, sets, known, where in (
            ("models", ablation.models or (), self.models.active, "models.active"),
            ("weights", ablation.weights, self.models.active, "models.active"),
            ("folds", ablation.folds or (), self.folds.active, "folds.active"),
            ("views", ablation.views or (), views.oof, "predict.tta.oof"),
            ("views", ablation.views or (), held_out, "predict.tta.holdout"),
        ):
            unknown = [item for chosen in sets for item in chosen if item not in known]
            if unknown:
                raise CarvanaError(
                    f"ablation.{key} has {unknown[0]}, which {where} lacks: add it there and run 'dvc repro'."
                )


def read_params(path: Path = Path(PARAMS_FILE)) -> Params:
    """Return the settings; raises CarvanaError that names the file, the key and what is wrong with it."""
    try:
        return parse_params(YAML(typ="safe").load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise CarvanaError(f"{path} can't be read ({error.strerror}): run this in the project's folder.") from error
    except (YAMLError, UnicodeDecodeError) as error:
        raise CarvanaError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error


def parse_params(tree: Any) -> Params:
    """Return the settings of a YAML tree."""
    if not isinstance(tree, dict):
        raise CarvanaError(f"{PARAMS_FILE} is empty; restore it with 'git checkout {PARAMS_FILE}'.")
    try:
        params = _validate_strict(Params, tree)
        params.check()
    except ValidationError as error:
        raise CarvanaError(_format_errors(error)) from error
    return params


def _validate_strict(kind: type[T], tree: Any) -> T:
    # By way of JSON, since only there strictness lets a list be a tuple; '3' for 3 and yes for 1 stay errors.
    return kind.model_validate_json(json.dumps(tree, default=str), strict=True)


def _apply_overrides(key: str, defaults: T, changes: Mapping[str, Any]) -> T:
    tree = defaults.model_dump(mode="json")
    for name, value in changes.items():
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
"""Settings by their old names; those of a model's spec without what stands before."""


def _unknown_key(key: str) -> str:
    parents, _, name = key.rpartition(".")
    section = parents.rpartition(".")[2]
    new = _RENAMED.get(f"{section}.{name}".lstrip(".")) or (_RENAMED.get(name) if key.startswith("models.") else None)
    if new is None:
        return f"Unknown setting {key}. Correct the name or remove it."
    return f"Unknown setting {key}: it is now called {new.rpartition('.')[2]}."


def _format_errors(error: ValidationError, prefix: str = "") -> str:
    faults = error.errors()
    # What holds a fault is often reported too, as being empty without it.
    inner = [a for a in faults if not any(b["loc"] != a["loc"] == b["loc"][: len(a["loc"])] for b in faults)]
    return "\n".join(f"{PARAMS_FILE}: {_format_error(details, prefix)}" for details in inner)


def _format_error(details: ErrorDetails, prefix: str) -> str:
    steps = [str(step) for step in details["loc"]]
    # Which kind of a union was tried stands in the location as if it were a key: the net, or such as tuple[int, int].
    if steps[:2] == ["models", "specs"]:
        del steps[3:4]
    key = ".".join(filter(None, [prefix, *(step for step in steps if "[" not in step)]))
    reason = details["msg"].removeprefix("Value error, ")
    if details["type"] == "extra_forbidden":
        return _unknown_key(key)
    if details["type"] == "missing":
        return f"{key} is missing: set it."
    if details["type"] == "value_error":
        return f"{reason}." if not key or key in reason else f"{key}: {reason}."
    return f"{key} can't be {details['input']!r}: {reason[0].lower()}{reason[1:]}."
