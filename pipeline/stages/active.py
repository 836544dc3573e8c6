"""The active nets as params.yaml has them and ``predictions/`` holds their maps."""

from pipeline.ensembling.active import EnsembleContext
from pipeline.ensembling.maps import PredictionStore
from pipeline.ensembling.postprocess import ImageLoader
from pipeline.params import Params
from pipeline.stages.inputs import predictions_dir


def ensemble_context(params: Params, image: ImageLoader) -> EnsembleContext:
    """Return the active nets; ``image`` returns a photograph by its id."""
    return EnsembleContext(
        settings=params.ensemble,
        views=params.predict.tta.test,
        models=params.models.active,
        folds=params.folds.active,
        ensemble=params.ensemble_members(),
        store=stored_predictions,
        image=image,
    )


def stored_predictions(split: str, model: str, fold: int) -> PredictionStore:
    """Return the maps of a net; raises CarvanaError that says which command makes them, if they are not there."""
    return PredictionStore(predictions_dir(split, model, fold))
