"""Contact sheets, metrics and the terminal summary."""

from pathlib import Path
from typing import ClassVar

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.competition import rle
from pipeline.competition.image_ids import HEIGHT, WIDTH
from pipeline.report.overlays import SheetTile, write_contact_sheet
from pipeline.report.summary import build_metrics, prediction_tiles, print_summary

GREY = np.full((HEIGHT, WIDTH, 3), 128, np.uint8)
ORANGE, RED, GREEN, YELLOW = (255, 140, 0), (235, 30, 60), (40, 200, 40), (255, 220, 0)


def box(top: int, bottom: int, left: int, right: int) -> NDArray[np.uint8]:
    mask_HW = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask_HW[top:bottom, left:right] = 1
    return mask_HW


def tile_of(path: Path, index: int) -> NDArray[np.uint8]:
    """Return the image of a tile, 320 x 480 RGB, from a sheet of four in a row."""
    sheet_HWC = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
    top, left = 26 + index // 4 * (320 + 26), index % 4 * 480
    return sheet_HWC[top : top + 320, left : left + 480]


def near(color: NDArray[np.uint8], wanted: tuple[int, int, int]) -> bool:
    return bool(np.abs(color.astype(int) - wanted).max() < 30)  # JPEG


class TestSheet:
    def test_errors_are_drawn_in_their_places(self, tmp_path: Path) -> None:
        true, mask = box(400, 800, 400, 1200), box(400, 800, 800, 1600)
        write_contact_sheet(tmp_path / "a.jpg", [SheetTile(GREY, mask, true, "x")], "title")
        tile = tile_of(tmp_path / "a.jpg", 0)
        assert near(tile[150, 150], ORANGE)  # false negative
        assert near(tile[150, 350], RED)  # false positive
        assert near(tile[150, 250], (128, 128, 128))  # correct
        assert near(tile[50, 50], (128, 128, 128))

    def test_outlines(self, tmp_path: Path) -> None:
        mask = box(400, 800, 400, 1200)
        tiles = [SheetTile(GREY, mask, None, "yellow"), SheetTile(GREY, mask, mask, "green")]
        write_contact_sheet(tmp_path / "a.jpg", tiles, "title")
        for index, color in enumerate((YELLOW, GREEN)):
            tile = tile_of(tmp_path / "a.jpg", index)
            assert np.abs(tile[150, 98:104].astype(int) - color).max(axis=1).min() < 30
            assert near(tile[150, 200], (128, 128, 128))

    @pytest.mark.parametrize("count", [0, 1, 5])
    def test_four_in_a_row(self, tmp_path: Path, count: int) -> None:
        write_contact_sheet(tmp_path / "a.jpg", [SheetTile(GREY, box(0, 1, 0, 1), None, "")] * count, "title")
        height, width, _ = cv2.imread(str(tmp_path / "a.jpg")).shape
        assert (height, width) == (26 + max(1, -(-count // 4)) * 346, 1920)


IDS = [f"0123456789ab_{angle:02d}" for angle in range(1, 17)]


class TestPredictions:
    def test_tiles_are_evenly_spaced_and_skip_replaced_images(self, tmp_path: Path) -> None:
        masks = {image_id: box(0, 10, 0, 10 + n) for n, image_id in enumerate(IDS)}
        lines = "".join(f"{image_id}.jpg,{rle.encode(mask)}\n" for image_id, mask in masks.items())
        (tmp_path / "a.csv").write_text(f"img,rle_mask\n{lines}")
        submission = {"rows": 16, "replaced_images": {IDS[4]: "truncated"}}
        tiles = prediction_tiles(tmp_path / "a.csv", lambda image_id: GREY, submission, wanted=4)
        assert [tile.caption for tile in tiles] == [IDS[0], IDS[8], IDS[12]]
        for tile in tiles:
            assert np.array_equal(tile.mask, masks[tile.caption])
            assert tile.true is None


class TestSummary:
    scores: ClassVar = {"dice": 0.98765432, "iou": 0.97, "accuracy": 0.99, "images": 16, "cars": 1}
    submission: ClassVar = {"rows": 16, "nets": ["small/0"], "replaced_images": {}}

    def test_only_known_scores_are_printed(self, capsys: pytest.CaptureFixture[str]) -> None:
        evaluation = {"oof": {"small": self.scores}, "skipped_images": {}}
        nothing = {split: {"skipped": "too few cars"} for split in ("oof", "holdout")}
        assert build_metrics(evaluation, self.submission, nothing) == {
            "oof": {"small": self.scores | {"dice": 0.987654}}
        }
        print_summary(evaluation, self.submission)
        printed = capsys.readouterr().out
        assert "out of fold, small  0.98765  0.97000   0.99000" in printed
        assert "held-out" not in printed and "test cars" not in printed
        known = build_metrics(evaluation | {"holdout": self.scores}, self.submission | {"test": {"dice": 0.5}}, nothing)
        assert (known["holdout"]["dice"], known["test"]["dice"]) == (0.987654, 0.5)

    def test_metrics_of_the_ablation_leave_out_skipped_splits(self) -> None:
        compared = {
            "current": {"dice": 0.9912345678},
            "best": {"dice": 0.992},
            "nested_selection": {"nested_dice": 0.9915},
        }
        ablation = {"oof": compared, "holdout": {"skipped": "too few cars"}}
        found = build_metrics({"oof": {"small": self.scores}}, self.submission, ablation)["ablation"]
        assert found == {"oof": {"current": 0.991235, "best": 0.992, "honest": 0.9915}}
        alone = build_metrics({"oof": {}}, self.submission, ablation | {"oof": compared | {"nested_selection": None}})
        assert alone["ablation"]["oof"] == {"current": 0.991235, "best": 0.992}

    def test_skipped_and_replaced_images_are_named(self, capsys: pytest.CaptureFixture[str]) -> None:
        evaluation = {"oof": {"small": self.scores}, "skipped_images": dict.fromkeys(IDS[:5], "truncated")}
        print_summary(evaluation, self.submission | {"replaced_images": {IDS[7]: "truncated"}})
        printed = capsys.readouterr().out
        assert f"{IDS[0]}, {IDS[1]}, {IDS[2]} ..." in printed
        assert IDS[3] not in printed and IDS[7] in printed
