"""Training jobs of a second."""

from typing import Any

from pipeline.config import HardwareSettings, InputSettings, ResolvedModel, TrainSettings, UNetConfig
from pipeline.training.module import TrainJob
from tests.fakes.fake_images import FakeImages

READER = FakeImages()
CPU = HardwareSettings(device="cpu")


def job(reader: Any = READER, **changes: Any) -> TrainJob:
    values: dict[str, Any] = {
        "epochs": 3,
        "batch_size": 2,
        "precision": "32",
        "losses": {"bce": 1.0, "dice": 1.0},
        "lr": 0.01,
        "warmup_fraction": 0.1,
    }
    values |= {"ema_decay": 0.9, "gradient_clip_norm": 1.0}
    spec = UNetConfig(architecture="unet", widths=(4, 8), dropout=0.3)
    design = ResolvedModel(
        spec=spec, input=InputSettings(size=(32, 48)), train=TrainSettings.model_validate(values | changes)
    )
    return TrainJob(design, 0, [str(n) for n in range(6)], ["6", "7"], reader, CPU, facts={"fold": 0})


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the run's own clears up after it."""
