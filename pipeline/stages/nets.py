"""Which net a folder holds, told without torch."""

from pathlib import Path

from pipeline.errors import CarvanaError
from pipeline.files import sha256_of

CONFIG = "config.json"
WEIGHTS = {"last": "model.safetensors", "best": "best.safetensors"}
"""As in ``pipeline/learning/models.py``, which loads torch; a test holds the two together."""


def net_digest(folder: Path, weights: str) -> str:
    """Return the digest of a trained net's folder, with the ``weights`` (``last`` or ``best``) that predict.

    An index of maps holds it as ``net``. Raises CarvanaError if the folder holds no such net.
    """
    try:
        return sha256_of(*((folder / name).read_bytes() for name in (CONFIG, WEIGHTS[weights])))
    except OSError as error:
        raise CarvanaError(f"{folder} holds no trained net ({error}): train it with 'dvc repro train'.") from error
