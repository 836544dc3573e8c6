"""Nets so small that tests can build and train them."""

from pathlib import Path

from pipeline import workspace
from pipeline.config import InputSettings, UNetConfig
from pipeline.models import networks, weights

SMALL = InputSettings(size=(64, 64))
TINY = UNetConfig(architecture="unet", widths=(4, 8), dropout=0.2)


def save_tiny_net(folder: Path) -> Path:
    """Save an untrained net of 32 x 48 pixels, and return its folder."""
    weights.save_config(folder, TINY, InputSettings(size=(32, 48)), {})
    weights.save_weights(folder / workspace.WEIGHTS["last"], networks.build_model(TINY, SMALL, seed=5).state_dict())
    return folder
