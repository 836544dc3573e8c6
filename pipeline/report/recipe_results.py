"""``carvana results``: what runs reached, kept in docs/results/ and laid side by side."""

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
from pipeline.workspace import net_dir, predictions_dir, read_json, read_manifest, training_images

RunResult = Mapping[str, Any]
"""Of a model or of several merged: ``KEYS``, and ``ensemble``, the section of ``params.yaml``."""

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
"""What the table tells; ``setting`` is a digest of all in which results have to be equal to be compared."""

_COLUMNS = (
    "recipe",
    "parameters",
    "sees",
    "epochs",
    "Dice out of fold",
    "Dice held out",
    "IoU",
    "accuracy",
    "training, min",
    "images/s trained",
    "images/s predicted",
)

_NOTES = (
    "Dice, IoU and accuracy are means over images at 1918 x 1280. Dice out of fold, IoU and accuracy score each car by "
    "the net that never saw it; Dice held out scores cars that were kept out of every fold, by all folds merged. In "
    "brackets the 95 % interval, by resampling cars, which takes 8 of them. Minutes are those of training all folds, "
    "scoring included. Images a second are those of training steps, and of predicting out of fold, reading and storing "
    "included. *: an encoder that began with random weights."
)


def scores_of_split(images: pd.DataFrame, split: str, model: str) -> dict[str, Any] | None:
    """Return scores of rows of ``reports/images.csv`` with the interval of their Dice, or None if there are none."""
    rows = images[(images["split"] == split) & (images["model"] == model)]
    if rows.empty:
        return None
    means = {name: round(float(rows[name].mean()), 6) for name in ("dice", "iou", "accuracy")}
    low_high = mean_dice_bounds(rows)
    interval = [round(bound, 6) for bound in low_high] if low_high else None
    return means | {"interval": interval, "images": len(rows), "cars": int(rows["car"].nunique())}


def throughput(trainings: Sequence[Mapping[str, Any]], predictions: Sequence[tuple[int, float]]) -> dict[str, Any]:
    """Return minutes and images a second from the ``timing.json`` of nets, and images and seconds of predictions."""
    trained = sum(timing["training_seconds"] for timing in trainings)
    predicted = sum(seconds for _, seconds in predictions)
    return {
        "minutes": round(sum(timing["seconds"] for timing in trainings) / 60, 2),
        "trained_per_second": _ratio(sum(timing["images"] for timing in trainings), trained),
        "predicted_per_second": _ratio(sum(images for images, _ in predictions), predicted),
        "device": " and ".join(dict.fromkeys(timing["device"] for timing in trainings)),
    }


def results_table(results: Sequence[RunResult]) -> str:
    """Return Markdown: a table for each setting, since only equal ones compare, best first."""
    parts, ruler = [_NOTES], ["---", *["---:"] * (len(_COLUMNS) - 1)]
    for _, group in groupby(sorted(results, key=_order), key=lambda result: result["setting"]):
        equal = list(group)
        lines = [f"## {_heading(equal[0])}", "", _line(_COLUMNS), _line(ruler)]
        parts.append("\n".join([*lines, *(_line(_cells(result)) for result in equal)]))
    return "\n\n".join(parts) + "\n"


def _order(result: RunResult) -> tuple[str, str, float]:
    return _heading(result), result["setting"], -result["oof"]["dice"]


def _heading(result: RunResult) -> str:
    data, folds = result["data"], result["folds"]
    cars = pluralize(data["cars"], "car")
    what = f"The drawn sample, {cars}" if data["source"] == "sample" else f"Real photographs, {cars}"
    parts = f"{len(folds['active'])} of {folds['count']} folds, {pluralize(folds['holdout_cars'], 'car')} held out"
    return (
        f"{what}; {parts}, seed {folds['seed']} of folds and {' and '.join(map(str, result['seeds']))} of training; "
        f"{result['device']}; {_views(result['views'])}; setting {result['setting']}"
    )


def _views(views: Mapping[str, Sequence[str]]) -> str:
    out_of_fold, held_out = (", ".join(views[split]) for split in ("oof", "test"))
    return out_of_fold if out_of_fold == held_out else f"{out_of_fold} out of fold, {held_out} held out"


def _cells(result: RunResult) -> Iterator[str]:
    yield result["name"] + (" *" if any(map(_from_random, result["models"])) else "")
    yield format_int(result["parameters"])
    yield " + ".join(dict.fromkeys(model["sees"] for model in result["models"]))
    yield " + ".join(dict.fromkeys(str(model["epochs"]) for model in result["models"]))
    yield _with_interval(result["oof"])
    yield _with_interval(result["holdout"])
    yield format_dice(result["oof"]["iou"])
    yield f"{result['oof']['accuracy']:.2%}"
    yield f"{result['minutes']:.1f}"
    yield _speed(result["trained_per_second"])
    yield _speed(result["predicted_per_second"])


def _from_random(model: Mapping[str, Any]) -> bool:
    return model["spec"]["architecture"] == "smp_unet" and model["spec"]["encoder_weights"] is None


def _with_interval(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return "-"
    interval = score["interval"]
    return format_dice(score["dice"]) + (
        f" [{format_dice(interval[0])}, {format_dice(interval[1])}]" if interval else ""
    )


def _ratio(images: float, seconds: float) -> float | None:
    return round(images / seconds, 3) if seconds else None


def _speed(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


RESULTS_DIR = Path("docs/results")
"""A JSON file for each model, or models merged, and data."""


def keep_results() -> None:
    """Keep what this run reached; raises CarvanaError if it is not whole, or settings were changed since."""
    params = read_params()
    _check_up_to_date()
    for result in _results(params):
        data = result["data"]
        where = f"{'sample' if data['source'] == 'sample' else 'real'}-{data['cars']}-{result['setting']}"
        path = RESULTS_DIR / f"{result['name'].replace(' + ', '+')}@{where}.json"
        write_json(path, result)
        print(f"{path}: Dice {result['oof']['dice']:.4f} out of fold")


def show_results(out: Path | None) -> None:
    """Print the table of what is kept, or write it to ``out``; raises CarvanaError if nothing is."""
    kept = [_kept(path) for path in sorted(RESULTS_DIR.glob("*.json"))]
    if not kept:
        raise CarvanaError(f"{RESULTS_DIR} holds no results: 'carvana results --keep' keeps those of this run.")
    text = results_table(kept)
    if out is None:
        print(text, end="")
    else:
        write_text(out, f"# Results\n\nMade by `carvana results --out {out}` from `{RESULTS_DIR}/`.\n\n{text}")


def _kept(path: Path) -> RunResult:
    result = read_json(path, "fix it or delete it")
    lacking = sorted(KEYS - set(result))
    if lacking:
        raise CarvanaError(f"{path} has no '{lacking[0]}': delete it, and keep that run again.")
    return result


def _check_up_to_date() -> None:
    """Raise CarvanaError if what is here was made with other settings, which would be kept in its name."""
    run = subprocess.run(
        [sys.executable, "-m", "dvc", "status", "--json", "--with-deps", "evaluate"],
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode or not run.stdout.strip():
        raise CarvanaError(f"DVC can't tell whether the scores are those of params.yaml: {run.stderr.strip()[-300:]}")
    changed = list(json.loads(run.stdout.strip().splitlines()[-1]))
    if changed:
        raise CarvanaError(f"The scores are not those of the present settings ({changed[0]} changed): run 'dvc repro'.")


def _results(params: Params) -> Iterator[dict[str, Any]]:
    """Yield a result for each active model, and for the ensemble of several."""
    images, models, data = read_table(Path("reports/images.csv")), params.models.active, _data(params)
    one = len(models) == 1
    for model in models:
        # Held-out cars are scored by the ensemble alone, which a single model is.
        holdout = scores_of_split(images, "holdout", MERGED) if one else None
        yield _result(params, [model], data) | {
            "oof": _demanded(scores_of_split(images, "oof", model), model),
            "holdout": holdout,
        }
    merged = scores_of_split(images, "oof", MERGED)
    if merged:
        yield _result(params, params.ensemble.models or models, data) | {
            "oof": merged,
            "holdout": scores_of_split(images, "holdout", MERGED),
        }


def _result(params: Params, models: Sequence[str], data: Mapping[str, Any]) -> dict[str, Any]:
    nets = [(model, fold) for model in models for fold in params.folds.active]
    trainings = [read_json(net_dir(*net) / "timing.json") for net in nets]
    told = [read_json(net_dir(model, params.folds.active[0]) / "metrics.json") for model in models]
    measured = throughput(trainings, [_predicted(*net) for net in nets])
    setting = {
        "data": data,
        "folds": params.folds.model_dump(mode="json"),
        "seeds": sorted({params.resolve_model(model).train.seed for model in models}),
        "views": {"oof": list(params.predict.tta.oof), "test": list(params.predict.tta.test)},
        "ensemble": params.ensemble.model_dump(mode="json", exclude={"models", "folds"}),
        "device": measured["device"],
    }
    return {
        "name": " + ".join(models),
        "setting": sha256_of(json.dumps(setting, sort_keys=True).encode())[:6],
        **setting,
        **measured,
        "models": [_model(params, model) for model in models],
        "parameters": sum(metrics["parameters"] for metrics in told),
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
    design = params.resolve_model(model)
    size = "native" if design.input.size == "native" else f"{design.input.height} x {design.input.width}"
    grey = " grey" if design.input.channels == "gray" else ""
    return {
        "name": model,
        "sees": size + grey,
        "epochs": design.train.epochs,
        "spec": design.spec.model_dump(mode="json"),
    }


def _predicted(model: str, fold: int) -> tuple[int, float]:
    timing = PredictionStore(predictions_dir("oof", model, fold)).timing()
    return (timing.images, timing.seconds) if timing else (0, 0.0)


def _demanded(score: dict[str, Any] | None, model: str) -> dict[str, Any]:
    if score is None:
        raise CarvanaError(f"reports/images.csv has no scores of '{model}': run 'dvc repro'.")
    return score
