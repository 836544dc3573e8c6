"""Which settings of an ensemble to compare: every combination that can be scored on cars no net of it trained on."""

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

_SUBSETS_OF_A_SIZE = 252
"""All those of ten folds."""


@dataclass(frozen=True)
class EnsembleConfig:
    """One way to make masks of stored maps, in its one normal form: settings that give the same masks are equal."""

    models: tuple[str, ...]
    folds: tuple[int, ...]
    """Empty out of fold: each image by the nets of its own fold."""
    views: tuple[str, ...]
    merge: MergeName
    weights: tuple[int, ...]
    """Of each model, without a common factor."""
    threshold: float

    @property
    def nets(self) -> list[NetId]:
        """Model and fold of every net that sees an image."""
        return [(model, fold) for model in self.models for fold in self.folds or (OWN_FOLD,)]

    @property
    def passes(self) -> int:
        """Forward passes an image."""
        return len(self.nets) * len(self.views)

    @property
    def net_weights(self) -> tuple[int, ...]:
        """The weight of every net."""
        return tuple(weight for weight in self.weights for _ in self.folds or (OWN_FOLD,))

    @property
    def merge_rule(self) -> MergeRule:
        """The arithmetic, for maps that are sums of the views."""
        return MergeRule(self.merge, self.threshold, (len(self.views),) * len(self.nets), self.net_weights)

    def row(self) -> dict[str, Any]:
        """Return the setting as cells of a table."""
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
        """Whether one net makes the mask, several folds of one model, or several models."""
        return "models" if len(self.models) > 1 else "folds" if len(self.folds) > 1 else "single net"


@dataclass(frozen=True)
class AblationSpace:
    """What there is to choose from, and what is chosen now."""

    ablation: AblationSettings
    ensemble: EnsembleSettings
    models: tuple[str, ...]
    """Active ones."""
    folds: tuple[int, ...]
    """Active ones."""
    predicted: Mapping[ScoredSplit, tuple[str, ...]]
    """Views by split."""
    views: tuple[str, ...]
    """Of the submission."""
    weights: Literal["last", "best"] = "last"
    """Of training, that predict."""

    def current(self, split: ScoredSplit) -> EnsembleConfig:
        """Return what the submission is made with; out of fold, its folds are each image's own."""
        folds = () if split == "oof" else self.ensemble.folds or self.folds
        models, weights = self.ensemble.models or self.models, self.ensemble.weights
        return self._setting(split, models, folds, self.views, self.ensemble.merge, weights, self.ensemble.threshold)

    def grid(self, split: ScoredSplit) -> list[EnsembleConfig]:
        """Return every combination, each once, the current setting first."""
        ablation = self.ablation
        settings = (
            self._setting(split, models, folds, views, merge, weights, threshold)
            for models, folds, views, merge, weights, threshold in product(
                ablation.models or singles_and_prefixes(self.models),
                self._fold_sets(split),
                ablation.views or singles_and_prefixes(self.predicted[split]),
                ablation.merge,
                (*ablation.weights, self.ensemble.weights),
                ablation.threshold,
            )
        )
        return list(dict.fromkeys([self.current(split), *settings]))

    def fingerprint(self) -> dict[str, Any]:
        """Return all of it as JSON has it, to tell whether an ablation was made of the same."""
        facts = {
            "ablation": self.ablation.model_dump(mode="json"),
            "ensemble": self.ensemble.model_dump(mode="json"),
            "models": self.models,
            "folds": self.folds,
            "predicted": dict(self.predicted),
            "views": self.views,
            "weights": self.weights,
        }
        tree: dict[str, Any] = json.loads(json.dumps(facts))
        return tree

    def fold_subsets(self) -> list[EnsembleConfig]:
        """Return the current setting with every subset of the active folds, for its models and for each of them."""
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
        """Return what a reader must know of a split's scores, in sentences."""
        found = []
        if split == "oof" and self.weights == "best":
            found.append(
                "predict.checkpoint is best: the epoch of each net was chosen on the very cars that score it here, "
                "which flatters it. Held-out cars tell."
            )
        if self.ensemble.postprocess:
            steps = ", ".join(self.ensemble.postprocess)
            found.append(f"Settings are compared before post-processing ({steps}), which is tried apart.")
        return found

    def why_not_scorable(self, split: ScoredSplit, cars: int) -> str | None:
        """Return why nothing can be scored on so many cars of a split, or None.

        Raises CarvanaError if that was asked for in so many words.
        """
        if split == "oof" or cars >= MIN_HOLDOUT_CARS:
            return None
        held_out = "One car is" if cars else "No cars are"
        reason = (
            f"{held_out} held out of all folds, and each other car was learned by some net of an ensemble of folds: "
            f"set folds.holdout_cars to {MIN_HOLDOUT_CARS} or more (8 for intervals) and run 'dvc repro'."
        )
        if self.ablation.folds is not None:
            raise CarvanaError(f"ablation.folds can't be scored. {reason}")
        return f"Fold ensembles are not scored. {reason}"

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
        """Return the normal form: sets in the order of what is active, and one net, which merges with nothing."""
        models = sorted(models, key=self.models.index)
        numbers = [weights.get(model, 1) for model in models]
        common = gcd(*numbers)
        setting = EnsembleConfig(
            models=tuple(models),
            folds=tuple(sorted(folds, key=self.folds.index)),
            views=tuple(sorted(views, key=self.predicted[split].index)),
            merge=merge,
            weights=tuple(number // common for number in numbers),
            threshold=threshold,
        )
        return setting if len(setting.nets) > 1 else replace(setting, merge="mean_probability")

    def _fold_sets(self, split: ScoredSplit) -> Sequence[tuple[int, ...]]:
        return [()] if split == "oof" else self.ablation.folds or singles_and_prefixes(self.folds)


def ablation_space(params: Params) -> AblationSpace:
    """Return what an ablation with these settings chooses from."""
    views = params.predict.tta
    return AblationSpace(
        ablation=params.ablation,
        ensemble=params.ensemble,
        models=params.models.active,
        folds=params.folds.active,
        predicted={"oof": views.oof, "holdout": views.holdout},
        views=views.test,
        weights=params.predict.checkpoint,
    )


def singles_and_prefixes(items: Sequence[T]) -> list[tuple[T, ...]]:
    """Return each item by itself, and the first two, three and so on together."""
    return [*((item,) for item in items), *(tuple(items[:size]) for size in range(2, len(items) + 1))]


def _subsets(folds: Sequence[int], size: int) -> list[tuple[int, ...]]:
    """Return the subsets of a size; of very many, some that are evenly spaced."""
    subsets = list(combinations(folds, size))
    return subsets[:: -(-len(subsets) // _SUBSETS_OF_A_SIZE)]
