"""Record which weights files nets start from: data/weights.json. DVC can't see files outside the project itself."""

from typing import Any

from pipeline.config import EncoderConfig, Params
from pipeline.utils.files import write_json
from pipeline.workspace import WEIGHTS_FILE, WeightsFile, init_checkpoint_path, local_encoder_weights


def run(params: Params) -> None:
    """Read the weights files of active models; write their SHA-256, null where a file is missing or only a hub has it.

    Raises CarvanaError if ``encoder_weights`` names a missing file, or one that is not its package's.
    """
    write_json(WEIGHTS_FILE, {model: _digests(params, model) for model in params.models.active})


def _digests(params: Params, model: str) -> dict[str, Any]:
    resolved = params.resolve_model(model)
    spec, init = resolved.spec, resolved.train.init_checkpoint
    if init is not None:
        # A file may be missing yet, as another net of this run may write it; the stage train demands it.
        files = {str(fold): init_checkpoint_path(init, fold) for fold in params.folds.active}
        return {"init_checkpoint": {fold: _sha256(WeightsFile(path, "file")) for fold, path in files.items() if path}}
    encoder = local_encoder_weights(spec.encoder, spec.encoder_weights) if isinstance(spec, EncoderConfig) else None
    return {"encoder_weights": encoder and _sha256(encoder)}


def _sha256(file: WeightsFile) -> str | None:
    return file.facts()["sha256"] if file.path.is_file() else None
