"""``carvana export``: a trained model as files that run elsewhere, each checked, with a card: exports/<model>/."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from pipeline.config import Params, read_params
from pipeline.data.fold_assignment import images_in_folds, training_folds
from pipeline.errors import CarvanaError
from pipeline.export.formats import FORMATS, ExportFormat
from pipeline.export.model_card import describe_net, format_bytes, format_rate, render_card
from pipeline.export.verification import (
    CHECK_IMAGES,
    ExportContext,
    ExportJob,
    ExportReport,
    assert_close,
    benchmark_export,
)
from pipeline.utils.files import publish_tree, remove_path, write_json, write_text
from pipeline.utils.run_state import STATE_DIR, file_lock
from pipeline.workspace import CONFIG, net_digest, net_dir, read_fold_by_car, training_images

CARD_FILE, README_FILE = "card.json", "README.md"


@dataclass(frozen=True)
class ExportResult:
    """What became of a format."""

    path: Path
    result: ExportReport | CarvanaError
    """What its check measured, or why the file is not kept."""


def check_formats(names: Sequence[str]) -> None:
    """Raise CarvanaError for a format that there is not, or whose package is not installed."""
    for name in names:
        if name not in FORMATS:
            raise CarvanaError(f"There is no format '{name}': use {', '.join(FORMATS)}.")
        FORMATS[name].needs()


def export_net(
    job: ExportJob, names: Sequence[str], own_scores: Mapping[str, Any], folder: Path
) -> Iterator[ExportResult]:
    """Export a model in several formats into ``folder``, with its card, and yield each when it is done.

    ``own_scores`` are those of the model out of fold, for the card. What fails its check is not kept: an earlier file
    of its name stays as it was, and so does its entry in the card. Nobody else may export into ``folder`` meanwhile.
    Raises CarvanaError, before anything is written, for a format that there is not.
    """
    check_formats(names)
    folder.mkdir(parents=True, exist_ok=True)
    for left_by_a_kill in folder.glob(".*.part"):
        remove_path(left_by_a_kill)
    with TemporaryDirectory(dir=folder, prefix=".", suffix=".part") as work:
        material = ExportContext(job, Path(work))
        about = describe_net(job.folders[job.fold], material.net, own_scores) | {"digests": _by_fold(job, job.digests)}
        for name in names:
            yield _export(material, name, about, folder, Path(work))


def _export(material: ExportContext, name: str, about: Mapping[str, Any], folder: Path, work: Path) -> ExportResult:
    chosen = FORMATS[name]
    made, target = work / chosen.file, folder / chosen.file
    try:
        measured = _verified(material, chosen, made)
    except CarvanaError as error:
        return ExportResult(target, error)
    publish_tree(made, target)
    _write_card(folder, about, {name: _of_what(material, chosen) | asdict(measured)})
    return ExportResult(target, measured)


def _verified(material: ExportContext, chosen: ExportFormat, made: Path) -> ExportReport:
    """Write a file and hold it against PyTorch; raises CarvanaError if it can't be made, or is too far off."""
    proofs, cut = (
        (material.ensemble_proofs, material.facts().decision_threshold)
        if chosen.ensemble
        else (material.net_proofs, 0.5)
    )
    try:
        chosen.write(material, made)
        measured = benchmark_export(made, chosen.open(made), proofs, cut)
    except (CarvanaError, OSError, MemoryError):
        raise
    except Exception as error:  # exporters fail with errors of many libraries; other formats may do
        words = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise CarvanaError(f"{chosen.file} can't be made of this net ({words}).") from error
    assert_close(chosen.file, measured, exact=chosen.exact)
    return measured


def _of_what(material: ExportContext, chosen: ExportFormat) -> dict[str, Any]:
    job = material.job
    folds = list(job.ensemble) if chosen.ensemble else [job.fold]
    entry: dict[str, Any] = {"file": chosen.file, "folds": folds, "nets": _by_fold(job, folds)}
    if chosen.ensemble:
        cut = material.facts().decision_threshold
        entry |= {"views": list(job.views), "merge": job.merge, "threshold": job.threshold, "cut": cut}
    return entry


def _by_fold(job: ExportJob, folds: Iterable[int]) -> dict[str, str]:
    return {str(fold): job.digests[fold] for fold in folds}


def _write_card(folder: Path, about: Mapping[str, Any], entries: dict[str, Any]) -> None:
    formats = _entries(folder) | entries
    there = {name: formats[name] for name in FORMATS if name in formats and (folder / FORMATS[name].file).exists()}
    card = {"net": about, "formats": there}
    write_json(folder / CARD_FILE, card)
    write_text(folder / README_FILE, render_card(card, {name: FORMATS[name].words for name in there}))


def _entries(folder: Path) -> dict[str, Any]:
    """Return what the card says of each format, nothing where there is no card that can be read."""
    try:
        entries: dict[str, Any] = json.loads((folder / CARD_FILE).read_text(encoding="utf-8"))["formats"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return entries


EXPORTS_DIR = Path("exports")
METRICS = Path("reports/metrics.json")


def export_model(model: str, fold: int | None, formats: Sequence[str] | None, images: int) -> None:
    """Export a trained model, print a line a format, and write its card.

    ``fold``, by default the first active one, says whose net; ``formats`` are all by default; ``images`` are for the
    calibration of int8. Raises CarvanaError for what is not there, and in the end for what failed its check.
    """
    names = list(dict.fromkeys(formats or FORMATS))
    check_formats(names)
    params, folder = read_params(), EXPORTS_DIR / model
    job = _job(params, model, params.folds.active[0] if fold is None else fold, "ensemble" in names, images)
    refused = []
    with file_lock(Path(STATE_DIR) / "running" / f"export-{model}.lock", f"the exports of {model}"):
        for done in export_net(job, names, _own_scores(model), folder):
            print(_line(done), flush=True)
            refused += [str(done.result)] if isinstance(done.result, CarvanaError) else []
    if (folder / README_FILE).exists():  # not where nothing was ever kept
        print(f"{folder / README_FILE} says what they are and how to use them.")
    if refused:
        raise CarvanaError("\n".join(refused))


def _job(params: Params, model: str, fold: int, ensemble: bool, calibration: int) -> ExportJob:
    trained = _demand_trained(model, fold)
    merged = params.folds.active if ensemble else ()
    folders = {number: net_dir(model, number) for number in sorted({fold, *merged})}
    weights, settings = params.predict.checkpoint, params.ensemble
    photographs, fold_by_car = training_images(params), read_fold_by_car()
    unseen = images_in_folds(photographs.ids(), fold_by_car, [fold])
    if not unseen:
        raise CarvanaError(f"Fold {fold} has no photographs to check exports on: name another with --fold.")
    learned = images_in_folds(photographs.ids(), fold_by_car, training_folds(fold, params.folds.count))
    return ExportJob(
        model=model,
        fold=fold,
        folders=folders,
        digests={number: net_digest(net_dir(model, number), weights) for number in trained},
        ensemble=merged,
        weights=weights,
        views=params.predict.tta.test,
        merge=settings.merge,
        threshold=settings.threshold,
        reader=photographs,
        check_ids=_spread(unseen, CHECK_IMAGES),
        calibration=_spread(learned, calibration),
    )


def _demand_trained(model: str, fold: int) -> list[int]:
    """Return the folds of a model that are trained; raises CarvanaError if ``fold`` is not among them."""
    trained = sorted(path.parent.relative_to("folds") for path in Path("folds").glob(f"[!.]*/[!.]*/{CONFIG}"))
    models = sorted({path.parts[0] for path in trained})
    if not models:
        raise CarvanaError("There is no trained net yet: run 'dvc repro train'.")
    if model not in models:
        raise CarvanaError(f"There is no trained model '{model}': there is {', '.join(models)}.")
    there = sorted(int(path.name) for path in trained if path.parts[0] == model)
    if fold not in there:
        known = ", ".join(map(str, there))
        raise CarvanaError(
            f"There is no net of {model} for fold {fold}, only for {known}: name one of these with --fold, "
            "or train it with 'dvc repro train'."
        )
    return there


def _own_scores(model: str) -> dict[str, Any]:
    """Return the model's scores out of fold, nothing before the report has them."""
    try:
        scores: dict[str, Any] = json.loads(METRICS.read_text(encoding="utf-8"))["oof"].get(model, {})
    except (OSError, ValueError, KeyError):
        return {}
    return scores


def _spread(image_ids: Sequence[str], wanted: int) -> list[str]:
    """Return so many images, or all, from one end of the list to the other: of many cars and angles."""
    places = np.linspace(0, len(image_ids) - 1, min(wanted, len(image_ids))).round().astype(int)
    return [image_ids[place] for place in places]


def _line(done: ExportResult) -> str:
    result = done.result
    if not isinstance(result, ExportReport):
        return f"{done.path}  not kept"
    return (
        f"{done.path}  {format_bytes(result.bytes)}  difference {result.difference:.1g}  "
        f"Dice lost {result.dice_drop:+.4f}  {format_rate(result.images_per_second)} images/s"
    )
