"""Draw the documentation's pictures from a finished run of the synthetic sample.

Run after ``make repro``, in the project's root: ``python docs/make_pictures.py``. Writes ``docs/images/*.jpg``. The
cars are synthetic; photographs of the competition must not be redistributed, so the script refuses other data.
"""

import argparse
import zipfile
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.competition import rle
from pipeline.competition.image_ids import HEIGHT, WIDTH, image_filename
from pipeline.submission.csv_file import read_rows

Image = NDArray[np.uint8]

MISSED_BGR, EXTRA_BGR, OUTLINE_BGR = (0, 140, 255), (40, 40, 220), (60, 200, 60)
MAX_BYTES = 400_000


def read_masks(path: Path) -> dict[str, Image]:
    """Return ``{image name: mask_HW}`` of a submission CSV."""
    return {image_filename(image_id): rle.decode(text, HEIGHT, WIDTH) for _, image_id, text in read_rows(path)}


def read_photo(archive: zipfile.ZipFile, name: str) -> Image:
    """Return a test photograph as BGR pixels."""
    pixels = cv2.imdecode(np.frombuffer(archive.read(f"test/{name}"), np.uint8), cv2.IMREAD_COLOR)
    if pixels is None:
        raise SystemExit(f"{name}: not a valid JPEG.")
    return pixels.astype(np.uint8)


def dice(predicted_HW: Image, true_HW: Image) -> float:
    """Return the Dice coefficient of two masks."""
    total = int(predicted_HW.sum()) + int(true_HW.sum())
    return 2 * int((predicted_HW & true_HW).sum()) / total if total else 1.0


def with_label(photo: Image, text: str) -> Image:
    """Return a copy with a caption in its top left corner."""
    out = photo.copy()
    for color, thickness in ((255, 255, 255), 14), ((40, 40, 40), 5):
        cv2.putText(out, text, (40, 100), cv2.FONT_HERSHEY_SIMPLEX, 2.6, color, thickness, cv2.LINE_AA)
    return out


def error_overlay(photo: Image, predicted_HW: Image, true_HW: Image) -> Image:
    """Return the photograph, dimmed, with missed pixels in orange and extra ones in red, made wide enough to see."""
    out = (photo * 0.45 + 255 * 0.55).astype(np.uint8)
    for wrong, color in ((true_HW & ~predicted_HW & 1, MISSED_BGR), (predicted_HW & ~true_HW & 1, EXTRA_BGR)):
        out[cv2.dilate(wrong.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0] = color
    return out


def with_outline(photo: Image, mask_HW: Image) -> Image:
    """Return the photograph with the mask's outline."""
    contours, _ = cv2.findContours(mask_HW, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(photo.copy(), contours, -1, OUTLINE_BGR, 8, cv2.LINE_AA).astype(np.uint8)


def shrunk(image: Image, width: int) -> Image:
    """Return the image shrunk to a width, by area average."""
    height = round(image.shape[0] * width / image.shape[1])
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA).astype(np.uint8)


def write(path: Path, image: Image) -> None:
    """Write a JPEG of at most MAX_BYTES, at the highest quality that fits."""
    for quality in (92, 88, 84, 80, 75, 70):
        encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
        if len(encoded) <= MAX_BYTES:
            break
    path.write_bytes(encoded)
    print(f"{path}: {len(encoded):,} bytes")


def main() -> None:
    """Write all pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path(), metavar="DIR", help="project with a finished run")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "images", metavar="DIR")
    arguments = parser.parse_args()
    run, out = arguments.run, arguments.out

    zips = sorted((run / "data").glob("sample-*/test.zip"))
    if not zips:
        raise SystemExit(f"{run / 'data'}: no synthetic sample found. Run 'make repro' first.")
    out.mkdir(parents=True, exist_ok=True)
    predicted = read_masks(run / "submissions" / "submission.csv.gz")
    true = read_masks(run / "data" / "truth.csv")
    with zipfile.ZipFile(zips[-1]) as archive:
        if set(archive.namelist()) != {f"test/{name}" for name in predicted} or predicted.keys() != true.keys():
            raise SystemExit("submissions/submission.csv.gz is not a submission of the synthetic sample.")
        by_car: dict[str, list[str]] = {}
        for name in sorted(predicted):
            by_car.setdefault(name.split("_")[0], []).append(name)
        angles = [names[(2 + 5 * i) % len(names)] for i, names in enumerate(by_car.values())]

        name = angles[0]
        photo = read_photo(archive, name)
        mask = cv2.cvtColor(predicted[name] * np.uint8(255), cv2.COLOR_GRAY2BGR).astype(np.uint8)
        mask_label = with_label(np.full_like(mask, 0), "")
        cv2.putText(mask_label, "mask", (40, 100), cv2.FONT_HERSHEY_SIMPLEX, 2.6, (255, 255, 255), 5, cv2.LINE_AA)
        error = error_overlay(photo, predicted[name], true[name])
        tiles = [
            with_label(photo, "photograph"),
            np.maximum(mask, mask_label),
            with_label(error, f"error, Dice {dice(predicted[name], true[name]):.4f}"),
        ]
        write(out / "mask-and-error.jpg", shrunk(np.hstack(tiles), 1500))

        outlined = [with_outline(read_photo(archive, name), predicted[name]) for name in angles[:4]]
        rows = [np.hstack(outlined[at : at + 2]) for at in (0, 2)]
        write(out / "outlines.jpg", shrunk(np.vstack(rows), 1200))

    for source, target, width in (
        (min((run / "folds").glob("*/*/panel.jpg"), default=None), "training-panel.jpg", 1464),
        (run / "reports" / "worst.jpg", "worst.jpg", 1200),
    ):
        image = cv2.imread(str(source)) if source else None
        if image is None:
            raise SystemExit(f"{source or 'panel.jpg'} not found. Run 'make repro' first.")
        write(out / target, shrunk(image.astype(np.uint8), width))


if __name__ == "__main__":
    main()
