"""The active nets by their stored maps, and how those of the ensemble are merged."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline.ensembling.ensemble import EnsembleSettings, Merge
from pipeline.ensembling.maps import MapStore
from pipeline.ensembling.postprocess import Decision, Photo

Net = tuple[str, int]
"""Model and fold."""


@dataclass(frozen=True)
class ActiveNets:
    """Every fold of every active model."""

    settings: EnsembleSettings
    views: Sequence[str]
    """Those in which all look."""
    models: Sequence[str]
    folds: Sequence[int]
    ensemble: Sequence[Net]
    """Those of them that are merged."""
    store: Callable[[str, str, int], MapStore]
    """Maps by split, model and fold."""
    image: Photo
    """Asked for where the settings post-process by photographs."""

    @property
    def merged_models(self) -> list[str]:
        """The ensemble's models."""
        return list(dict.fromkeys(model for model, _ in self.ensemble))

    def maps(self, split: str, nets: Sequence[Net]) -> list[MapStore]:
        """Return the maps of some nets."""
        return [self.store(split, *net) for net in nets]

    def merge(self, nets: Sequence[Net]) -> Merge:
        """Return how the settings merge some nets."""
        return merge_of(self.settings, nets, len(self.views))

    def decision(self, nets: Sequence[Net]) -> Decision:
        """Return how the settings make a mask of what some nets say."""
        return decision_of(self.settings, nets, len(self.views), self.image)


def merge_of(settings: EnsembleSettings, nets: Sequence[Net], views: int) -> Merge:
    """Return the merge of ``nets``, each a sum of as many views."""
    weights = tuple(settings.weights.get(model, 1) for model, _ in nets)
    return Merge(settings.merge, settings.threshold, (views,) * len(nets), weights)


def decision_of(settings: EnsembleSettings, nets: Sequence[Net], views: int, image: Photo) -> Decision:
    """Return how maps of ``nets``, each a sum of as many views, become a mask."""
    return Decision(merge_of(settings, nets, views), settings.postprocess, image)
