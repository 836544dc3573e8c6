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
from pipeline.ensembling.ensemble import ENSEMBLE, EnsembleSettings
from pipeline.ensembling.grid import FEWEST_HELD_OUT, AblationSettings, Choices
from pipeline.errors import PipelineError
from pipeline.learning.prediction_settings import PredictSettings
from pipeline.learning.settings import Design, InputSettings, MachineSettings, ModelSpec, TrainSettings
from pipeline.sections import Distinct, Section

FILE = "params.yaml"

_NAME = re.compile(r"[A-Za-z0-9_-]+")

T = TypeVar("T", bound=BaseModel)


class ModelSettings(Section):
    """Section ``models`` of params.yaml."""

    active: Distinct[str]
    """Models to train, predict and merge."""

    specs: Mapping[str, ModelSpec]
    """Every model that can be made active, by name."""

    @model_validator(mode="after")
    def _active_exist(self) -> "ModelSettings":
        for name in self.specs:
            if not _NAME.fullmatch(name) or name == ENSEMBLE:
                raise ValueError(
                    f"models.specs.{name}: name it otherwise, in letters, digits, - and _, not '{ENSEMBLE}'"
                )
        for name in self.active:
            if name not in self.specs:
                raise ValueError(f"models.active has '{name}', but models.specs has only {', '.join(self.specs)}")
        return self


class Params(Section):
    """All of params.yaml."""

    data: DataSettings
    folds: FoldSettings
    input: InputSettings
    models: ModelSettings
    train: TrainSettings
    machine: MachineSettings
    predict: PredictSettings
    ensemble: EnsembleSettings
    ablation: AblationSettings

    def design(self, model: str) -> Design:
        """Return a model with the defaults of ``input`` and ``train`` filled in; raises PipelineError if unknown."""
        if model not in self.models.specs:
            raise PipelineError(f"There is no model '{model}': {FILE} has {', '.join(self.models.specs)}.")
        try:
            return Design(spec=self.models.specs[model], input=self._input(model), train=self._train(model))
        except ValidationError as error:
            raise PipelineError(_in_words(error, f"models.specs.{model}")) from error

    def check(self) -> None:
        """Raise PipelineError for what no section can tell by itself; inactive models need not fit ``input``."""
        for model in self.models.specs:
            self._input(model)
            self._train(model)
        for model in self.models.active:
            self.design(model)
        self.ensemble_nets()
        self._check_ablation()

    def _input(self, model: str) -> InputSettings:
        return _override(f"models.specs.{model}.input", self.input, self.models.specs[model].input)

    def _train(self, model: str) -> TrainSettings:
        return _override(f"models.specs.{model}.train", self.train, self.models.specs[model].train)

    def ensemble_nets(self) -> list[tuple[str, int]]:
        """Return the model and fold of every net of the ensemble; raises PipelineError for one that is not active."""
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
                raise PipelineError(f"ensemble.{key} has {unknown[0]}, which {active_key} lacks: add it there.")
        return [(model, fold) for model in models for fold in folds]

    def choices(self) -> Choices:
        """Return what an ablation chooses from."""
        views = self.predict.views
        return Choices(
            ablation=self.ablation,
            ensemble=self.ensemble,
            models=self.models.active,
            folds=self.folds.active,
            predicted={"oof": views.oof, "holdout": views.holdout},
            views=views.test,
            weights=self.predict.weights,
        )

    def _check_ablation(self) -> None:
        ablation, views = self.ablation, self.predict.views
        if self.folds.holdout_cars < FEWEST_HELD_OUT:
            if ablation.folds is not None:
                raise PipelineError(
                    f"ablation.folds names fold ensembles, which are scored on held-out cars alone: set it to null, or "
                    f"folds.holdout_cars to {FEWEST_HELD_OUT} or more."
                )
            held_out = views.oof  # nothing is scored on others
        else:
            held_out = views.holdout
        for key, sets, known, where in (
            ("models", ablation.models or (), self.models.active, "models.active"),
            ("weights", ablation.weights, self.models.active, "models.active"),
            ("folds", ablation.folds or (), self.folds.active, "folds.active"),
            ("views", ablation.views or (), views.oof, "predict.views.oof"),
            ("views", ablation.views or (), held_out, "predict.views.holdout"),
        ):
            unknown = [item for chosen in sets for item in chosen if item not in known]
            if unknown:
                raise PipelineError(
                    f"ablation.{key} has {unknown[0]}, which {where} lacks: add it there and run 'dvc repro'."
                )


def read_params(path: Path = Path(FILE)) -> Params:
    """Return the settings; raises PipelineError that names the file, the key and what is wrong with it."""
    try:
        return parse(YAML(typ="safe").load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise PipelineError(f"{path} can't be read ({error.strerror}): run this in the project's folder.") from error
    except (YAMLError, UnicodeDecodeError) as error:
        raise PipelineError(f"{path} is no sound YAML: {' '.join(str(error).split())}") from error


def parse(tree: Any) -> Params:
    """Return the settings of a YAML tree."""
    if not isinstance(tree, dict):
        raise PipelineError(f"{FILE} holds no settings: take back the last sound ones with 'git checkout {FILE}'.")
    try:
        params = _strictly(Params, tree)
        params.check()
    except ValidationError as error:
        raise PipelineError(_in_words(error)) from error
    return params


def _strictly(kind: type[T], tree: Any) -> T:
    # By way of JSON, since only there strictness lets a list be a tuple; '3' for 3 and yes for 1 stay errors.
    return kind.model_validate_json(json.dumps(tree, default=str), strict=True)


def _override(key: str, defaults: T, changes: Mapping[str, Any]) -> T:
    tree = defaults.model_dump(mode="json")
    for name, value in changes.items():
        tree[name] = tree[name] | value if name == "augment" and isinstance(value, dict) else value
    try:
        return _strictly(type(defaults), tree)
    except ValidationError as error:
        raise PipelineError(_in_words(error, key)) from error


def _in_words(error: ValidationError, prefix: str = "") -> str:
    faults = error.errors()
    # What holds a fault is often reported too, as being empty without it.
    inner = [a for a in faults if not any(b["loc"] != a["loc"] == b["loc"][: len(a["loc"])] for b in faults)]
    return "\n".join(f"{FILE}: {_fault(details, prefix)}" for details in inner)


def _fault(details: ErrorDetails, prefix: str) -> str:
    steps = [str(step) for step in details["loc"]]
    # Which kind of a union was tried stands in the location as if it were a key: the net, or such as tuple[int, int].
    if steps[:2] == ["models", "specs"]:
        del steps[3:4]
    key = ".".join(filter(None, [prefix, *(step for step in steps if "[" not in step)]))
    reason = details["msg"].removeprefix("Value error, ")
    if details["type"] == "extra_forbidden":
        return f"{key} is no setting: mend the name or take it out."
    if details["type"] == "missing":
        return f"{key} is missing: set it."
    if details["type"] == "value_error":
        return f"{reason}." if not key or key in reason else f"{key}: {reason}."
    return f"{key} can't be {details['input']!r}: {reason[0].lower()}{reason[1:]}."
