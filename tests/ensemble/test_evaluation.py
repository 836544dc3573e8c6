"""Scores of models and of the ensemble."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.competition.image_ids import HEIGHT, WIDTH
from pipeline.config import EnsembleSettings
from pipeline.ensemble.evaluation import EnsembleContext, Evaluation
from pipeline.ensemble.postprocess import no_image
from pipeline.errors import CarvanaError
from pipeline.inference.prediction_store import PredictionStore, PredictJob, write_predictions
from tests.fakes.fake_maps import IDS, as_maps


class TestEvaluation:
    """Two models: ``good`` is right, and ``bad`` sees less of a car the higher the angle; both are merged."""

    cars = (IDS, [f"ba9876543210_{angle:02d}" for angle in range(1, 4)])

    @staticmethod
    def truth(image_id: str) -> NDArray[np.uint8]:
        mask_HW = np.zeros((HEIGHT, WIDTH), np.uint8)
        mask_HW[300:320, 500:540] = 1
        return mask_HW

    def predicted(self, model: str, image_id: str) -> NDArray[np.uint8]:
        """Views of an image: ``good`` is right; ``bad`` finds a part that shrinks with the angle, in identity alone."""
        levels_VHW = np.stack([self.truth(image_id) * np.uint8(255)] * 2)
        if model == "bad":
            levels_VHW[0, :, 500 + 40 // int(image_id[-2:]) :] = 0
            levels_VHW[1] = 0
        return levels_VHW

    def evaluation(self, folder: Path, **changes: Any) -> Evaluation:
        def store(split: str, model: str, fold: int) -> PredictionStore:
            ids = self.cars[1] if split == "holdout" else self.cars[0][:2] if fold == 0 else self.cars[0][2:]
            work = folder / split / model / str(fold)
            work.mkdir(parents=True, exist_ok=True)
            job = PredictJob(ids, ["identity", "hflip"], shard_images=2, test=False, net="n")
            return PredictionStore(
                write_predictions(job, lambda some: as_maps(job, ((i, self.predicted(model, i)) for i in some)), work)
            )

        both = [(model, fold) for model in ("good", "bad") for fold in (0, 1)]
        whole = EnsembleContext(
            settings=EnsembleSettings(threshold=0.75),
            views=["identity"],
            models=["good", "bad"],
            folds=[0, 1],
            ensemble=both,
            store=store,
            image=no_image,
        )
        return Evaluation(replace(whole, **changes), self.truth)

    @staticmethod
    def dice_of(share: float) -> float:
        return 2 * share / (1 + share)

    def test_each_model_and_the_ensemble_are_scored_by_image(self, tmp_path: Path) -> None:
        scores = self.evaluation(tmp_path).score(holdout=True)
        summary = scores.summary()
        shares = [1 / angle for angle in range(1, 6)]
        bad = [self.dice_of(int(40 * share) / 40) for share in shares]
        assert summary["oof"]["good"] == {"dice": 1, "iou": 1, "accuracy": 1, "images": 5, "cars": 1}
        assert summary["oof"]["bad"]["dice"] == pytest.approx(np.mean(bad), abs=1e-6)
        # At 0.75, both must see it.
        assert summary["oof"]["ensemble"]["dice"] == summary["oof"]["bad"]["dice"]
        assert summary["holdout"]["dice"] == pytest.approx(np.mean(bad[:3]), abs=1e-6)
        assert summary["holdout"]["images"] == 3
        assert set(scores.by_car()["car"]) == {"0123456789ab", "ba9876543210"}

    def test_the_ensemble_is_merged_as_its_settings_say(self, tmp_path: Path) -> None:
        weighted = EnsembleSettings(threshold=0.75, weights={"good": 4})
        summary = self.evaluation(tmp_path, settings=weighted).score(holdout=True).summary()
        assert summary["holdout"]["dice"] == summary["oof"]["ensemble"]["dice"] == 1
        assert summary["oof"]["bad"]["dice"] < 1

    def test_views_are_those_of_the_submission(self, tmp_path: Path) -> None:
        summary = self.evaluation(tmp_path, views=["identity", "hflip"]).score(holdout=False).summary()
        assert (summary["oof"]["good"]["dice"], summary["oof"]["bad"]["dice"]) == (1, 0)
        assert "holdout" not in summary
        with pytest.raises(CarvanaError, match=r"scale:0\.5"):
            self.evaluation(tmp_path, views=["scale:0.5"]).score(holdout=False)

    def test_worst_images_are_those_of_the_submitted_model(self, tmp_path: Path) -> None:
        evaluation = self.evaluation(tmp_path)
        found = list(evaluation.worst_images(evaluation.score(holdout=True), 2))
        assert [(row.model, row.image_id) for row, _ in found] == [("ensemble", IDS[4]), ("ensemble", IDS[3])]
        assert [int(mask_HW.sum()) for _, mask_HW in found] == [20 * 8, 20 * 10]
        alone = self.evaluation(tmp_path, ensemble=[("good", 0), ("good", 1)])
        assert {row.model for row, _ in alone.worst_images(alone.score(holdout=False), 3)} == {"good"}
