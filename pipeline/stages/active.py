"""The active nets as params.yaml has them and ``predictions/`` holds their maps."""

from pipeline.ensembling.active import ActiveNets
from pipeline.ensembling.maps import MapStore
from pipeline.ensembling.postprocess import Photo
from pipeline.params import Params
from pipeline.stages.inputs import maps_folder


def active_nets(params: Params, image: Photo) -> ActiveNets:
    """Return the active nets; ``image`` returns a photograph by its id."""
    return ActiveNets(
        settings=params.ensemble,
        views=params.predict.views.test,
        models=params.models.active,
        folds=params.folds.active,
        ensemble=params.ensemble_nets(),
        store=stored_maps,
        image=image,
    )


def stored_maps(split: str, model: str, fold: int) -> MapStore:
    """Return the maps of a net; raises PipelineError that says which command makes them, if they are not there."""
    return MapStore(maps_folder(split, model, fold))
