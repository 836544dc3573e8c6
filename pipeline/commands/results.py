"""``carvana results``: what runs reached, kept in docs/results/ and laid side by side."""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.competition.layout import car_id
from pipeline.ensembling.maps import PredictionStore
from pipeline.errors import CarvanaError
from pipeline.files import sha256_of, write_json, write_text
from pipeline.params import Params, read_params
from pipeline.reporting.headlines import MERGED
from pipeline.reporting.results import KEYS, RunResult, results_table, scores_of_split, throughput
from pipeline.reporting.tables import read_table
from pipeline.stages.inputs import net_dir, predictions_dir, read_json, read_manifest, training_images

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
