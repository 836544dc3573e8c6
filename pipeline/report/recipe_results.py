"""``carvana results``: keep the results of runs in docs/results/, and show them in one table."""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline.competition.image_ids import car_id
from pipeline.config import Params, read_params
from pipeline.errors import CarvanaError
from pipeline.inference.prediction_store import PredictionStore
from pipeline.report.ablation_text import format_dice, format_int, pluralize
from pipeline.report.summary import MERGED, mean_dice_bounds
from pipeline.report.tables import read_table
from pipeline.utils.files import sha256_of, write_json, write_text
from pipeline.utils.terminal import print_table
from pipeline.workspace import net_dir, predictions_dir, read_json, read_manifest, training_images

RunResult = Mapping[str, Any]
"""The result of one model or of several merged ones: ``KEYS``, and ``ensemble``, that section of params.yaml."""

KEYS = {
    "name",
    "setting",
    "data",
    "folds",
    "seeds",
    "views",
    "device",
    "models",
    "parameters",
    "oof",
    "holdout",
    "minutes",
    "trained_per_second",
    "predicted_per_second",
}
"""Keys of a result; ``setting`` is a digest of everything that must be equal for results to be comparable."""

_COLUMNS = (
    "recipe",
    "parameters",
    "input size",
    "epochs",
    "CV Dice",
    "holdout Dice",
    "IoU",
    "accuracy",
    "training, min",
    "images/s trained",
    "images/s predicted",
)

_NOTES = (
    "Dice, IoU and accuracy are means over images at 1918 x 1280. CV Dice, IoU and accuracy are out of fold: each car "
    "is scored by nets that did not train on it. Holdout Dice scores all folds merged, on cars kept out of every fold. "
    "Brackets: 95 % confidence interval, bootstrapped over cars (needs 8 cars). Minutes: training of all folds, "
    "including validation. Images/s: training steps, and out-of-fold prediction including reading and writing. "
    "*: encoder trained from random weights."
)


def scores_of_split(images: pd.DataFrame, split: str, model: str) -> dict[str, Any] | None:
    """Return mean scores of rows of reports/images.csv and the interval of their Dice, or None if there are no rows."""
    rows = images[(images["split"] == split) & (images["model"] == model)]
    if rows.empty:
        return None
    means = {name: round(float(rows[name].mean()), 6) for name in ("dice", "iou", "accuracy")}
    low_high = mean_dice_bounds(rows)
    interval = [round(bound, 6) for bound in low_high] if low_high else None
    return means | {"interval": interval, "images": len(rows), "cars": int(rows["car"].nunique())}


def throughput(trainings: Sequence[Mapping[str, Any]], predictions: Sequence[tuple[int, float]]) -> dict[str, Any]:
    """Return training minutes and images per second.

    ``trainings``: the timing.json of each net; ``predictions``: images and seconds of each prediction.
    """
    trained = sum(timing["training_seconds"] for timing in trainings)
    predicted = sum(seconds for _, seconds in predictions)
    return {
        "minutes": round(sum(timing["seconds"] for timing in trainings) / 60, 2),
        "trained_per_second": _ratio(sum(timing["images"] for timing in trainings), trained),
        "predicted_per_second": _ratio(sum(images for images, _ in predictions), predicted),
        "device": " and ".join(dict.fromkeys(timing["device"] for timing in trainings)),
    }


def results_table(results: Sequence[RunResult]) -> str:
    """Return Markdown with one table per setting, since only equal settings are comparable; best first."""
    parts, ruler = [_NOTES], ["---", *["---:"] * (len(_COLUMNS) - 1)]
    for heading, rows in _tables(results):
        lines = [f"| {' | '.join(cells)} |" for cells in (_COLUMNS, ruler, *rows)]
        parts.append("\n".join([f"## {heading}", "", *lines]))
    return "\n\n".join(parts) + "\n"


def _tables(results: Sequence[RunResult]) -> Iterator[tuple[str, list[list[str]]]]:
    """Yield heading and rows of each table; rows have one cell per column."""

    def order(result: RunResult) -> tuple[str, str, float]:
        return _heading(result), result["setting"], -result["oof"]["dice"]

    for _, group in groupby(sorted(results, key=order), key=lambda result: result["setting"]):
        equal = list(group)
        yield _heading(equal[0]), [list(_cells(result)) for result in equal]


def _heading(result: RunResult) -> str:
    data, folds = result["data"], result["folds"]
    cars = pluralize(data["cars"], "car")
    what = f"Synthetic sample, {cars}" if data["source"] == "sample" else f"Real images, {cars}"
    parts = f"{len(folds['active'])} of {folds['count']} folds, {pluralize(folds['holdout_cars'], 'car')} held out"
    return (
        f"{what}; {parts}, fold seed {folds['seed']}, training seed {' and '.join(map(str, result['seeds']))}; "
        f"{result['device']}; {_format_views(result['views'])}; setting {result['setting']}"
    )


def _format_views(views: Mapping[str, Sequence[str]]) -> str:
    out_of_fold, holdout = (", ".join(views[split]) for split in ("oof", "test"))
    return out_of_fold if out_of_fold == holdout else f"{out_of_fold} out of fold, {holdout} on held-out cars"


def _cells(result: RunResult) -> Iterator[str]:
    yield result["name"] + (" *" if any(map(_has_random_encoder, result["models"])) else "")
    yield format_int(result["parameters"])
    yield " + ".join(dict.fromkeys(model["input_size"] for model in result["models"]))
    yield " + ".join(dict.fromkeys(str(model["epochs"]) for model in result["models"]))
    yield _with_interval(result["oof"])
    yield _with_interval(result["holdout"])
    yield format_dice(result["oof"]["iou"])
    yield f"{result['oof']['accuracy']:.2%}"
    yield f"{result['minutes']:.1f}"
    yield _format_rate(result["trained_per_second"])
    yield _format_rate(result["predicted_per_second"])


def _has_random_encoder(model: Mapping[str, Any]) -> bool:
    return model["spec"]["architecture"] != "unet" and model["spec"]["encoder_weights"] is None


def _with_interval(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return "-"
    interval = score["interval"]
    return format_dice(score["dice"]) + (
        f" [{format_dice(interval[0])}, {format_dice(interval[1])}]" if interval else ""
    )


def _ratio(images: float, seconds: float) -> float | None:
    return round(images / seconds, 3) if seconds else None


def _format_rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


RESULTS_DIR = Path("docs/results")
"""One JSON file per model or merged models, data and setting."""

GPU_RESULTS_DIR = RESULTS_DIR / "gpu"
"""JSON files that ``python -m benchmarks gpu --out`` wrote."""

_GPU_NOTES = (
    "ResNet-34 U-Net at 1280 x 1918, the net of the recipe `carvana`. Forward and step: bare loops, on batches that "
    "lie on the GPU. Prepared: weights cast, batch norm folded into convolutions. Compiled: `hardware.compile: true`. "
    "Training and prediction: this project's, from JPEG files to a trained net and to stored maps."
)


def keep_results() -> None:
    """Keep the results of the current run; raises CarvanaError if it is incomplete or the settings changed since."""
    params = read_params()
    _check_up_to_date()
    for result in _results(params):
        data = result["data"]
        where = f"{'sample' if data['source'] == 'sample' else 'real'}-{data['cars']}-{result['setting']}"
        path = RESULTS_DIR / f"{result['name'].replace(' + ', '+')}@{where}.json"
        write_json(path, result)
        print(f"{path}: CV Dice {result['oof']['dice']:.4f}")


def show_results(out: Path | None) -> None:
    """Print the kept results, or write them to ``out`` as Markdown; raises CarvanaError if there are none."""
    kept = [_read_result(path) for path in sorted(RESULTS_DIR.glob("*.json"))]
    if not kept:
        raise CarvanaError(f"{RESULTS_DIR} has no results. 'carvana results --keep' keeps those of this run.")
    if out:
        header = f"# Results\n\nGenerated by `carvana results --out {out}` from `{RESULTS_DIR}/`."
        write_text(out, f"{header}\n\n{results_table(kept)}{gpu_tables()}")
        return
    for heading, rows in _tables(kept):
        print(heading)
        print_table(_COLUMNS, rows, right=_COLUMNS[1:])
        print()
    print(_NOTES)


def gpu_tables() -> str:
    """Return Markdown with the kept figures of ``python -m benchmarks gpu``, a table for each file; "" if none."""
    parts = []
    for path in sorted(GPU_RESULTS_DIR.glob("*.json")):
        found = read_json(path, "Fix it or delete it.")
        try:
            heading = f"{found['device']}, {found['cores']} cores, {found['precision']}, torch {found['torch']}"
            rows = [f"| {row['name']} | {row['value']:,.3f} | {row['unit']} |" for row in found["figures"]]
        except (KeyError, TypeError, ValueError) as error:
            raise CarvanaError(f"{path} is no result of 'python -m benchmarks gpu' ({error}). Delete it.") from error
        ruler = ["| measured | figure | unit |", "| --- | ---: | --- |"]
        parts.append("\n".join([f"\n## GPU benchmark: {heading}\n", _GPU_NOTES + "\n", *ruler, *rows]) + "\n")
    return "".join(parts)


def _read_result(path: Path) -> RunResult:
    result = read_json(path, "Fix it or delete it.")
    missing = sorted(KEYS - set(result))
    if missing:
        raise CarvanaError(f"{path} has no key '{missing[0]}'. Delete it and keep that run again.")
    return result


def _check_up_to_date() -> None:
    """Raise CarvanaError unless the scores were made with the current settings."""
    run = subprocess.run(
        [sys.executable, "-m", "dvc", "status", "--json", "--with-deps", "evaluate"],
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode or not run.stdout.strip():
        raise CarvanaError(f"DVC could not check whether the scores match params.yaml: {run.stderr.strip()[-300:]}")
    # The stage initial_weights has DVC run it each time.
    changed = [stage for stage in json.loads(run.stdout.strip().splitlines()[-1]) if stage != "initial_weights"]
    if changed:
        raise CarvanaError(f"The scores do not match the current settings ({changed[0]} changed). Run 'dvc repro'.")


def _results(params: Params) -> Iterator[dict[str, Any]]:
    """Yield the result of each active model, and of the ensemble if there are several."""
    images, models, data = read_table(Path("reports/images.csv")), params.models.active, _data(params)
    for model in models:
        oof = scores_of_split(images, "oof", model)
        if oof is None:
            raise CarvanaError(f"reports/images.csv has no scores of '{model}'. Run 'dvc repro'.")
        # Only the ensemble is scored on held-out cars, and a single model is the ensemble.
        holdout = scores_of_split(images, "holdout", MERGED) if len(models) == 1 else None
        yield _result(params, [model], data) | {"oof": oof, "holdout": holdout}
    merged = scores_of_split(images, "oof", MERGED)
    if merged:
        yield _result(params, params.ensemble.models or models, data) | {
            "oof": merged,
            "holdout": scores_of_split(images, "holdout", MERGED),
        }


def _result(params: Params, models: Sequence[str], data: Mapping[str, Any]) -> dict[str, Any]:
    nets = [(model, fold) for model in models for fold in params.folds.active]
    trainings = [read_json(net_dir(*net) / "timing.json") for net in nets]
    metrics = [read_json(net_dir(model, params.folds.active[0]) / "metrics.json") for model in models]
    speed = throughput(trainings, [_prediction_timing(*net) for net in nets])
    setting = {
        "data": data,
        "folds": params.folds.model_dump(mode="json"),
        "seeds": sorted({params.resolve_model(model).train.seed for model in models}),
        "views": {"oof": list(params.predict.tta.oof), "test": list(params.predict.tta.test)},
        "ensemble": params.ensemble.model_dump(mode="json", exclude={"models", "folds"}),
        "device": speed["device"],
    }
    return {
        "name": " + ".join(models),
        "setting": sha256_of(json.dumps(setting, sort_keys=True).encode())[:6],
        **setting,
        **speed,
        "models": [_model(params, model) for model in models],
        "parameters": sum(model_metrics["parameters"] for model_metrics in metrics),
    }


def _data(params: Params) -> dict[str, Any]:
    ids, manifest = training_images(params).ids(), read_manifest()
    return {
        "source": "directory" if params.data.directory else params.data.source,
        "cars": len({car_id(image_id) for image_id in ids}),
        "images": len(ids),
        "digests": [manifest[part]["digest"] for part in ("train", "masks")],
    }


def _model(params: Params, model: str) -> Mapping[str, Any]:
    resolved = params.resolve_model(model)
    size = "native" if resolved.input.size == "native" else f"{resolved.input.height} x {resolved.input.width}"
    gray = " gray" if resolved.input.channels == "gray" else ""
    return {
        "name": model,
        "input_size": size + gray,
        "epochs": resolved.train.epochs,
        "spec": resolved.spec.model_dump(mode="json"),
    }


def _prediction_timing(model: str, fold: int) -> tuple[int, float]:
    """Return the number of images and the seconds of a net's out-of-fold prediction; zeros if it was not timed."""
    timing = PredictionStore(predictions_dir("oof", model, fold)).timing()
    return (timing.images, timing.seconds) if timing else (0, 0.0)
