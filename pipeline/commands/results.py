"""``carvana results``: what runs reached, kept in docs/results/ and laid side by side."""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.competition.layout import car_of
from pipeline.ensembling.maps import MapStore
from pipeline.errors import PipelineError
from pipeline.files import sha256_of, write_json, write_text
from pipeline.params import Params, read_params
from pipeline.reporting.headlines import MERGED
from pipeline.reporting.results import KEYS, Result, scored, speeds, table
from pipeline.reporting.tables import read_table
from pipeline.stages.inputs import maps_folder, net_folder, read_json, read_manifest, training_images

KEPT = Path("docs/results")
"""A JSON file for each model, or models merged, and data."""


def keep_results() -> None:
    """Keep what this run reached; raises PipelineError if it is not whole, or settings were changed since."""
    params = read_params()
    _demand_up_to_date()
    for result in _results(params):
        data = result["data"]
        where = f"{'sample' if data['source'] == 'sample' else 'real'}-{data['cars']}-{result['setting']}"
        path = KEPT / f"{result['name'].replace(' + ', '+')}@{where}.json"
        write_json(path, result)
        print(f"{path}: Dice {result['oof']['dice']:.4f} out of fold")


def show_results(out: Path | None) -> None:
    """Print the table of what is kept, or write it to ``out``; raises PipelineError if nothing is."""
    kept = [_kept(path) for path in sorted(KEPT.glob("*.json"))]
    if not kept:
        raise PipelineError(f"{KEPT} holds no results: 'carvana results --keep' keeps those of this run.")
    text = table(kept)
    if out is None:
        print(text, end="")
    else:
        write_text(out, f"# Results\n\nMade by `carvana results --out {out}` from `{KEPT}/`.\n\n{text}")


def _kept(path: Path) -> Result:
    result = read_json(path, "mend it or delete it")
    lacking = sorted(KEYS - set(result))
    if lacking:
        raise PipelineError(f"{path} has no '{lacking[0]}': delete it, and keep that run anew.")
    return result


def _demand_up_to_date() -> None:
    """Raise PipelineError if what is here was made with other settings, which would be kept in its name."""
    run = subprocess.run(
        [sys.executable, "-m", "dvc", "status", "--json", "--with-deps", "evaluate"],
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode or not run.stdout.strip():
        raise PipelineError(f"DVC can't tell whether the scores are those of params.yaml: {run.stderr.strip()[-300:]}")
    changed = list(json.loads(run.stdout.strip().splitlines()[-1]))
    if changed:
        raise PipelineError(
            f"The scores are not those of the present settings ({changed[0]} changed): run 'dvc repro'."
        )


def _results(params: Params) -> Iterator[dict[str, Any]]:
    """Yield a result for each active model, and for the ensemble of several."""
    images, models, data = read_table(Path("reports/images.csv")), params.models.active, _data(params)
    one = len(models) == 1
    for model in models:
        # Held-out cars are scored by the ensemble alone, which a single model is.
        holdout = scored(images, "holdout", MERGED) if one else None
        yield _result(params, [model], data) | {
            "oof": _demanded(scored(images, "oof", model), model),
            "holdout": holdout,
        }
    merged = scored(images, "oof", MERGED)
    if merged:
        yield _result(params, params.ensemble.models or models, data) | {
            "oof": merged,
            "holdout": scored(images, "holdout", MERGED),
        }


def _result(params: Params, models: Sequence[str], data: Mapping[str, Any]) -> dict[str, Any]:
    nets = [(model, fold) for model in models for fold in params.folds.active]
    trainings = [read_json(net_folder(*net) / "timing.json") for net in nets]
    told = [read_json(net_folder(model, params.folds.active[0]) / "metrics.json") for model in models]
    measured = speeds(trainings, [_predicted(*net) for net in nets])
    setting = {
        "data": data,
        "folds": params.folds.model_dump(mode="json"),
        "seeds": sorted({params.design(model).train.seed for model in models}),
        "views": {"oof": list(params.predict.views.oof), "test": list(params.predict.views.test)},
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
        "cars": len({car_of(image_id) for image_id in ids}),
        "images": len(ids),
        "digests": [manifest[part]["digest"] for part in ("train", "masks")],
    }


def _model(params: Params, model: str) -> Mapping[str, Any]:
    design = params.design(model)
    size = "native" if design.input.size == "native" else f"{design.input.height} x {design.input.width}"
    grey = " grey" if design.input.channels == "grey" else ""
    return {
        "name": model,
        "sees": size + grey,
        "epochs": design.train.epochs,
        "spec": design.spec.model_dump(mode="json"),
    }


def _predicted(model: str, fold: int) -> tuple[int, float]:
    timing = MapStore(maps_folder("oof", model, fold)).timing()
    return (timing.images, timing.seconds) if timing else (0, 0.0)


def _demanded(score: dict[str, Any] | None, model: str) -> dict[str, Any]:
    if score is None:
        raise PipelineError(f"reports/images.csv has no scores of '{model}': run 'dvc repro'.")
    return score
