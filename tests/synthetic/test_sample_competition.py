import csv
import io
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError

from pipeline.competition import rle
from pipeline.competition.image_ids import (
    ANGLES,
    HEIGHT,
    WIDTH,
    format_image_id,
    image_filename,
    mask_filename,
    parse_image_id,
)
from pipeline.config import SampleSettings
from pipeline.synthetic.sample_competition import car_ids, draw_sample

TINY = SampleSettings(train_cars=4, test_cars=1)
FILES = {
    "train.zip",
    "train_masks.zip",
    "train_masks.csv.zip",
    "test.zip",
    "metadata.csv.zip",
    "sample_submission.csv.zip",
    "truth.csv",
}


def rows(folder: Path, name: str) -> list[list[str]]:
    if name.endswith(".zip"):
        with zipfile.ZipFile(folder / name) as archive:
            assert archive.namelist() == [name.removesuffix(".zip")]
            text = archive.read(name.removesuffix(".zip"))
    else:
        text = (folder / name).read_bytes()
    assert text.endswith(b"\n") and b"\r" not in text
    return list(csv.reader(io.StringIO(text.decode())))


@pytest.fixture(scope="module")
def masks(tiny_sample: Path) -> dict[str, NDArray[np.uint8]]:
    table = rows(tiny_sample, "train_masks.csv.zip")
    return {name: rle.decode(text, HEIGHT, WIDTH) for name, text in table[1:]}


def test_the_competitions_files_and_no_others(tiny_sample: Path) -> None:
    assert {path.name for path in tiny_sample.iterdir()} == FILES


@pytest.mark.parametrize(("split", "cars"), [("train", car_ids(TINY)[:4]), ("test", car_ids(TINY)[4:])])
def test_images_are_named_and_encoded_as_kaggles(tiny_sample: Path, split: str, cars: list[str]) -> None:
    with zipfile.ZipFile(tiny_sample / f"{split}.zip") as archive:
        wanted = [
            f"{split}/{image_filename(format_image_id(car, angle))}"
            for car in sorted(cars)
            for angle in range(1, ANGLES + 1)
        ]
        assert archive.namelist() == wanted
        for name in wanted[::5]:
            with Image.open(io.BytesIO(archive.read(name))) as image:
                assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (WIDTH, HEIGHT))


def test_gif_masks_are_kaggles_palette_gifs_and_equal_the_csv(
    tiny_sample: Path, masks: dict[str, NDArray[np.uint8]]
) -> None:
    with zipfile.ZipFile(tiny_sample / "train_masks.zip") as archive:
        assert archive.namelist() == [f"train_masks/{mask_filename(name.removesuffix('.jpg'))}" for name in masks]
        for member, mask in zip(archive.namelist(), masks.values(), strict=True):
            with Image.open(io.BytesIO(archive.read(member))) as image:
                assert (image.format, image.mode, image.size) == ("GIF", "P", (WIDTH, HEIGHT))
                palette = image.getpalette()
                assert palette is not None and palette[:6] == [0, 0, 0, 255, 255, 255]
                np.testing.assert_array_equal(np.asarray(image), mask)


def test_csv_tables_match_kaggles_format(tiny_sample: Path) -> None:
    cars = car_ids(TINY)
    train = [f"{car}_{angle:02d}.jpg" for car in sorted(cars[:4]) for angle in range(1, 17)]
    test = [f"{cars[4]}_{angle:02d}.jpg" for angle in range(1, 17)]
    for name, images in (("train_masks.csv.zip", train), ("truth.csv", test), ("sample_submission.csv.zip", test)):
        table = rows(tiny_sample, name)
        assert table[0] == ["img", "rle_mask"]
        assert [row[0] for row in table[1:]] == images
    assert {row[1] for row in rows(tiny_sample, "sample_submission.csv.zip")[1:]} == {"1 1"}
    metadata = rows(tiny_sample, "metadata.csv.zip")
    assert metadata[0] == ["id", "year", "make", "model", "trim1", "trim2"]
    assert [row[0] for row in metadata[1:]] == sorted(cars)
    assert all(len(row) == 6 for row in metadata)


def test_masks_cover_as_much_as_real_ones(masks: dict[str, NDArray[np.uint8]]) -> None:
    cover = [float(mask.mean()) for mask in masks.values()]
    assert min(cover) > 0.088 and max(cover) < 0.41
    assert 0.16 < np.mean(cover) < 0.26


def test_each_mask_is_one_car_clear_of_the_frame(masks: dict[str, NDArray[np.uint8]]) -> None:
    for name, mask in masks.items():
        _, _, stats, _ = cv2.connectedComponentsWithStats(mask)
        areas = np.sort(stats[1:, cv2.CC_STAT_AREA])[::-1]
        assert areas[0] > 0.995 * areas.sum(), name
        frame = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
        assert not frame.any(), name


def test_mask_edges_lie_on_image_edges(tiny_sample: Path, masks: dict[str, NDArray[np.uint8]]) -> None:
    """Moved by two pixels either way, the outline crosses weaker gradients."""
    strengths = dict.fromkeys((-2, 0, 2), 0.0)
    with zipfile.ZipFile(tiny_sample / "train.zip") as archive:
        for name in list(masks)[::8]:
            image = cv2.imdecode(np.frombuffer(archive.read(f"train/{name}"), np.uint8), cv2.IMREAD_GRAYSCALE)
            slope = cv2.magnitude(cv2.Sobel(image, cv2.CV_32F, 1, 0), cv2.Sobel(image, cv2.CV_32F, 0, 1))
            outline = cv2.morphologyEx(masks[name], cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0
            for shift in strengths:
                strengths[shift] += float(slope[np.roll(outline, shift, axis=1)].mean())
    assert strengths[0] > 1.1 * max(strengths[-2], strengths[2])


def dice(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def largest_component(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    if len(stats) == 1:
        return mask
    component: NDArray[np.bool_] = labels == 1 + np.argmax(stats[1:, cv2.CC_STAT_AREA])
    return component


@pytest.mark.slow
def test_a_gray_threshold_scores_below_0_95(tiny_sample: Path, masks: dict[str, NDArray[np.uint8]]) -> None:
    """The best gray threshold, on the image or on its difference from the typical image, stays well below a net."""
    scale = (WIDTH // 8, HEIGHT // 8)
    with zipfile.ZipFile(tiny_sample / "train.zip") as archive:
        gray = np.stack(
            [
                cv2.resize(
                    cv2.imdecode(np.frombuffer(archive.read(f"train/{name}"), np.uint8), cv2.IMREAD_GRAYSCALE),
                    scale,
                    interpolation=cv2.INTER_AREA,
                )
                for name in masks
            ]
        ).astype(np.float32)
    truth = [cv2.resize(mask, scale, interpolation=cv2.INTER_LINEAR) > 0 for mask in masks.values()]
    background = np.median(gray, axis=0)
    readings = {"dark": -gray, "bright": gray, "different": np.abs(gray - background)}
    best = 0.0
    for reading in readings.values():
        for threshold in np.quantile(reading, np.linspace(0.4, 0.98, 20)):
            scores = [dice(largest_component(r > threshold), t) for r, t in zip(reading, truth, strict=True)]
            best = max(best, float(np.mean(scores)))
    print(f"best threshold: Dice {best:.4f}")
    assert best < 0.95


@pytest.mark.slow
def test_bytes_follow_from_the_settings_alone(tiny_sample: Path, tmp_path: Path) -> None:
    """The same settings, drawn by one process over what an earlier run left, give the bytes that several gave."""
    (tmp_path / "train.zip").write_bytes(b"from an earlier run")
    draw_sample(tmp_path, TINY, workers=1)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (tiny_sample / name).read_bytes(), name


def test_a_failed_run_leaves_nothing_behind(tmp_path: Path) -> None:
    undrawable = SampleSettings.model_construct(train_cars=2, test_cars=1, seed=-1)
    with pytest.raises(ValueError, match="non-negative"):
        draw_sample(tmp_path, undrawable, workers=1)
    assert list(tmp_path.iterdir()) == []


def test_car_ids_have_kaggles_form_and_are_different() -> None:
    cars = car_ids(SampleSettings(train_cars=1000, test_cars=1000))
    assert len(set(cars)) == 2000
    assert parse_image_id(format_image_id(cars[0], 16)) == (cars[0], 16)
    assert not set(cars) & set(car_ids(SampleSettings(seed=1)))


@pytest.mark.parametrize("bad", [{"train_cars": 1}, {"test_cars": 0}, {"seed": -1}, {"seed": "x"}, {"angles": 8}])
def test_invalid_settings_are_errors(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        SampleSettings.model_validate(bad)
