"""Ensemble settings to compare: every combination that can be scored on cars that none of its nets trained on."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from math import gcd
from typing import Any, Literal, TypeVar

from pipeline.config import MIN_HOLDOUT_CARS, AblationSettings, EnsembleSettings, MergeName, NetId, Params, ScoredSplit
from pipeline.ensemble.merge import MergeRule
from pipeline.errors import CarvanaError

T = TypeVar("T")

OWN_FOLD = -1
"""Fold of a net that stands for "the net of the image's own fold"."""

_MAX_SUBSETS = 252
"""Most fold subsets per size: enough for all subsets of 10 folds."""


@dataclass(frozen=True)
class EnsembleConfig:
    """One way to make masks from stored maps, in normal form: settings that give the same masks compare equal."""

    models: tuple[str, ...]
    folds: tuple[int, ...]
    """Empty out of fold, where each image is scored by the nets of its own fold."""
    views: tuple[str, ...]
    merge: MergeName
    weights: tuple[int, ...]
    """One per model, with greatest common divisor 1."""
    threshold: float

    @property
    def nets(self) -> list[NetId]:
        """Model and fold of every net that predicts an image."""
        return [(model, fold) for model in self.models for fold in self.folds or (OWN_FOLD,)]

    @property
    def passes(self) -> int:
        """Forward passes per image."""
        return len(self.nets) * len(self.views)

    @property
    def net_weights(self) -> tuple[int, ...]:
        """One weight per net."""
        return tuple(weight for weight in self.weights for _ in self.folds or (OWN_FOLD,))

    @property
    def merge_rule(self) -> MergeRule:
        """The merge rule for maps summed over the views."""
        return MergeRule(self.merge, self.threshold, (len(self.views),) * len(self.nets), self.net_weights)

    def row(self) -> dict[str, Any]:
        """Return the setting's columns of ablation.csv."""
        equal = len(set(self.weights)) == 1
        weights = "" if equal else " ".join(f"{m}={w}" for m, w in zip(self.models, self.weights, strict=True))
        return {
            "models": " ".join(self.models),
            "folds": " ".join(map(str, self.folds)),
            "views": " ".join(self.views),
            "merge": self.merge,
            "weights": weights,
            "threshold": self.threshold,
        }

    @property
    def kind(self) -> str:
        """``single net``, ``folds`` (several folds of one model) or ``models``."""
        return "models" if len(self.models) > 1 else "folds" if len(self.folds) > 1 else "single net"


@dataclass(frozen=True)
class AblationSpace:
    """The settings to choose from, and the current ones."""

    ablation: AblationSettings
    ensemble: EnsembleSettings
    models: tuple[str, ...]
    """Active models."""
    folds: tuple[int, ...]
    """Active folds."""
    predicted: Mapping[ScoredSplit, tuple[str, ...]]
    """Predicted views, by split."""
    views: tuple[str, ...]
    """Views of the submission."""
    checkpoint: Literal["last", "best"] = "last"
    """Checkpoint used for prediction."""

    def current(self, split: ScoredSplit) -> EnsembleConfig:
        """Return the current setting; out of fold, each image uses the nets of its own fold."""
        folds = () if split == "oof" else self.ensemble.folds or self.folds
        models, weights = self.ensemble.models or self.models, self.ensemble.weights
        return self._setting(split, models, folds, self.views, self.ensemble.merge, weights, self.ensemble.threshold)

    def grid(self, split: ScoredSplit) -> list[EnsembleConfig]:
        """Return every combination, each once, the current setting first."""
        ablation = self.ablation
        folds_to_merge = [()] if split == "oof" else ablation.folds or singles_and_prefixes(self.folds)
        settings = (
            self._setting(split, models, folds, views, merge, weights, threshold)
            for models, folds, views, merge, weights, threshold in product(
                ablation.models or singles_and_prefixes(self.models),
                folds_to_merge,
                ablation.views or singles_and_prefixes(self.predicted[split]),
                ablation.merge,
                (*ablation.weights, self.ensemble.weights),
                ablation.threshold,
            )
        )
        return list(dict.fromkeys([self.current(split), *settings]))

    def fingerprint(self) -> dict[str, Any]:
        """Return the whole space as plain JSON values, to check whether an ablation is still current."""
        content = {
            "ablation": self.ablation.model_dump(mode="json"),
            "ensemble": self.ensemble.model_dump(mode="json"),
            "models": self.models,
            "folds": self.folds,
            "predicted": dict(self.predicted),
            "views": self.views,
            "checkpoint": self.checkpoint,
        }
        plain: dict[str, Any] = json.loads(json.dumps(content))
        return plain

    def fold_subsets(self) -> list[EnsembleConfig]:
        """Return the current setting with every subset of the active folds, for its models together and one by one."""
        current = self.current("holdout")
        sets = dict.fromkeys([current.models, *((model,) for model in current.models)])
        subsets = [folds for size in range(1, len(self.folds) + 1) for folds in _subsets(self.folds, size)]
        weights, merge = self.ensemble.weights, self.ensemble.merge
        return [
            self._setting("holdout", models, folds, current.views, merge, weights, current.threshold)
            for models in sets
            for folds in subsets
        ]

    def warnings(self, split: ScoredSplit) -> list[str]:
        """Return caveats about a split's scores, as sentences."""
        notes = []
        if split == "oof" and self.checkpoint == "best":
            notes.append(
                "predict.checkpoint is 'best': each net's epoch was selected on the cars that score it here, which "
                "biases the score upward. Use held-out cars."
            )
        if self.ensemble.postprocess:
            steps = ", ".join(self.ensemble.postprocess)
            notes.append(f"Settings are compared before post-processing ({steps}), which is evaluated separately.")
        return notes

    def why_not_scorable(self, split: ScoredSplit, holdout_cars: int) -> str | None:
        """Return why a split with this many held-out cars cannot be scored, or None if it can.

        Raises CarvanaError if ``ablation.folds`` requires it.
        """
        if split == "oof" or holdout_cars >= MIN_HOLDOUT_CARS:
            return None
        held_out = "only one car is" if holdout_cars else "no cars are"
        reason = (
            f"{held_out} held out, and some net of a fold ensemble trained on every other car. Set folds.holdout_cars "
            f"to {MIN_HOLDOUT_CARS} or more (8 for intervals) and run 'dvc repro'."
        )
        if self.ablation.folds is not None:
            raise CarvanaError(f"ablation.folds cannot be scored: {reason}")
        return f"Fold ensembles are not scored: {reason}"

    def _setting(
        self,
        split: ScoredSplit,
        models: Sequence[str],
        folds: Sequence[int],
        views: Sequence[str],
        merge: MergeName,
        weights: Mapping[str, int],
        threshold: float,
    ) -> EnsembleConfig:
        """Return the normal form: names in the order of the active ones; a single net has no merge rule to choose."""
        models = sorted(models, key=self.models.index)
        model_weights = [weights.get(model, 1) for model in models]
        common = gcd(*model_weights)
        setting = EnsembleConfig(
            models=tuple(models),
            folds=tuple(sorted(folds, key=self.folds.index)),
            views=tuple(sorted(views, key=self.predicted[split].index)),
            merge=merge,
            weights=tuple(weight // common for weight in model_weights),
            threshold=threshold,
        )
        return setting if len(setting.nets) > 1 else replace(setting, merge="mean_probability")


def ablation_space(params: Params) -> AblationSpace:
    """Return the search space of these settings."""
    views = params.predict.tta
    return AblationSpace(
        ablation=params.ablation,
        ensemble=params.ensemble,
        models=params.models.active,
        folds=params.folds.active,
        predicted={"oof": views.oof, "holdout": views.holdout},
        views=views.test,
        checkpoint=params.predict.checkpoint,
    )


def singles_and_prefixes(items: Sequence[T]) -> list[tuple[T, ...]]:
    """Return each item alone, then the first two, three and so on together."""
    return [*((item,) for item in items), *(tuple(items[:size]) for size in range(2, len(items) + 1))]


def _subsets(folds: Sequence[int], size: int) -> list[tuple[int, ...]]:
    """Return the subsets of one size; evenly spaced ones if there are too many."""
    subsets = list(combinations(folds, size))
    return subsets[:: -(-len(subsets) // _MAX_SUBSETS)]
