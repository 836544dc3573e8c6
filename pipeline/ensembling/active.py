"""The active nets by their stored maps, and how those of the ensemble are merged."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline.ensembling.ensemble import EnsembleSettings, MergeRule
from pipeline.ensembling.maps import PredictionStore
from pipeline.ensembling.postprocess import ImageLoader, MaskBuilder

NetId = tuple[str, int]
"""Model and fold."""


@dataclass(frozen=True)
class EnsembleContext:
    """Every fold of every active model."""

    settings: EnsembleSettings
    views: Sequence[str]
    """Those in which all look."""
    models: Sequence[str]
    folds: Sequence[int]
    ensemble: Sequence[NetId]
    """Those of them that are merged."""
    store: Callable[[str, str, int], PredictionStore]
    """Maps by split, model and fold."""
    image: ImageLoader
    """Asked for where the settings post-process by photographs."""

    @property
    def merged_models(self) -> list[str]:
        """The ensemble's models."""
        return list(dict.fromkeys(model for model, _ in self.ensemble))

    def stores(self, split: str, nets: Sequence[NetId]) -> list[PredictionStore]:
        """Return the maps of some nets."""
        return [self.store(split, *net) for net in nets]

    def merge_rule(self, nets: Sequence[NetId]) -> MergeRule:
        """Return how the settings merge some nets."""
        return build_merge_rule(self.settings, nets, len(self.views))

    def mask_builder(self, nets: Sequence[NetId]) -> MaskBuilder:
        """Return how the settings make a mask of what some nets say."""
        return build_mask_builder(self.settings, nets, len(self.views), self.image)


def build_merge_rule(settings: EnsembleSettings, nets: Sequence[NetId], views: int) -> MergeRule:
    """Return the merge of ``nets``, each a sum of as many views."""
    weights = tuple(settings.weights.get(model, 1) for model, _ in nets)
    return MergeRule(settings.merge, settings.threshold, (views,) * len(nets), weights)


def build_mask_builder(
    settings: EnsembleSettings, nets: Sequence[NetId], views: int, image: ImageLoader
) -> MaskBuilder:
    """Return how maps of ``nets``, each a sum of as many views, become a mask."""
    return MaskBuilder(build_merge_rule(settings, nets, views), settings.postprocess, image)
