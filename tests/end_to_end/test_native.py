"""The full competition's recipe on real photographs at native resolution, as far as a CPU can go."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pipeline.competition.dice import confusion_counts
from pipeline.competition.image_ids import HEIGHT, WIDTH
from pipeline.config import HardwareSettings, ResolvedModel, SmpUNetConfig, read_params
from pipeline.data.competition_data import CompetitionData, LabeledImages
from pipeline.inference.torch_predictor import TorchPredictor
from pipeline.recipes import apply_recipe
from pipeline.training.module import TrainJob
from pipeline.training.trainer import train
from tests import ROOT

STEPS = 3


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ResolvedModel:
    """The recipe's net; ImageNet's weights are the one thing that can't be had without a network."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    shutil.copyfile(ROOT / "params.yaml", tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)
    apply_recipe("carvana")
    design = read_params().resolve_model("native-r34")
    assert isinstance(design.spec, SmpUNetConfig)
    spec = design.spec.model_copy(update={"encoder_weights": None})
    fewer = design.train.model_copy(
        update={"epochs": 1, "batch_size": 1, "accumulate_grad_batches": 1, "validate_every": 1}
    )
    return design.model_copy(update={"spec": spec, "train": fewer})


@pytest.mark.long
def test_a_few_steps_and_views_at_native_resolution(real_carvana: Path, recipe: ResolvedModel, tmp_path: Path) -> None:
    source = CompetitionData(real_carvana)
    images = LabeledImages(source.train, source.masks, [])
    ids = images.ids()
    machine = HardwareSettings(workers=0, cache_gb=0, device="cpu")
    folder = train(TrainJob(recipe, 0, ids[:STEPS], ids[-1:], images, machine), tmp_path / "work")

    curves = pd.read_csv(folder / "curves.csv")
    assert np.isfinite(curves["loss"]).all()
    predictor = TorchPredictor(folder, views=["identity", "hflip"], device="cpu")
    probability = predictor(images.image(ids[-1]))
    assert probability.shape == (HEIGHT, WIDTH)
    assert np.isfinite(probability).all()

    # What training reported of its validation image is what the net in the folder says of it.
    alone = TorchPredictor(folder, views=["identity"], device="cpu")(images.image(ids[-1]))
    dice = confusion_counts(alone >= 0.5, images.mask(ids[-1])).dice
    assert json.loads((folder / "metrics.json").read_text())["dice"] == pytest.approx(dice, abs=1e-4)
