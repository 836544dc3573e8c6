"""``carvana export``: write a trained model in several formats, verify each, and add a model card: exports/<model>/."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from pipeline.config import InputSettings, Params, read_params
from pipeline.data.fold_assignment import images_in_folds, training_folds
from pipeline.errors import CarvanaError, is_out_of_memory
from pipeline.export.formats import FORMATS, ExportFormat
from pipeline.export.verification import (
    CHECK_IMAGES,
    MAX_DICE_DROP,
    MAX_DIFFERENCE,
    ExportContext,
    ExportJob,
    ExportReport,
    assert_close,
    benchmark_export,
)
from pipeline.models.networks import SegmentationModel
from pipeline.models.resize import LOGIT_CLAMP
from pipeline.utils.files import publish_tree, remove_path, write_json, write_text
from pipeline.utils.run_state import STATE_DIR, file_lock
from pipeline.workspace import CONFIG, net_digest, net_dir, read_fold_by_car, training_images

CARD_FILE, README_FILE = "card.json", "README.md"


@dataclass(frozen=True)
class ExportResult:
    """The outcome for one format."""

    path: Path
    result: ExportReport | CarvanaError
    """The verification's measurements, or why the file was not kept."""


def check_formats(names: Sequence[str]) -> None:
    """Raise CarvanaError for an unknown format, or one whose package is not installed."""
    for name in names:
        if name not in FORMATS:
            raise CarvanaError(f"Unknown format '{name}'. Use {', '.join(FORMATS)}.")
        FORMATS[name].require()


def export_net(
    job: ExportJob, names: Sequence[str], cv_scores: Mapping[str, Any], folder: Path
) -> Iterator[ExportResult]:
    """Export a model to ``folder`` in several formats, with a model card, and yield each result when it is ready.

    ``cv_scores``: the model's out-of-fold scores, for the card. A file that fails verification is not kept, and an
    earlier file of the same name stays, with its entry in the card. The caller must hold a lock on ``folder``. Raises
    CarvanaError for an unknown format before anything is written.
    """
    check_formats(names)
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".*.part"):
        remove_path(leftover)
    with TemporaryDirectory(dir=folder, prefix=".", suffix=".part") as work:
        context = ExportContext(job, Path(work))
        net = describe_net(job.folders[job.fold], context.net, cv_scores) | {"digests": _digests(job, job.digests)}
        for name in names:
            yield _export(context, name, net, folder, Path(work))


def _export(context: ExportContext, name: str, net: Mapping[str, Any], folder: Path, work: Path) -> ExportResult:
    chosen = FORMATS[name]
    written, target = work / chosen.file, folder / chosen.file
    try:
        report = _write_and_verify(context, chosen, written)
    except CarvanaError as error:
        return ExportResult(target, error)
    publish_tree(written, target)
    _write_card(folder, net, {name: _card_entry(context, chosen) | asdict(report)})
    return ExportResult(target, report)


def _write_and_verify(context: ExportContext, chosen: ExportFormat, path: Path) -> ExportReport:
    """Write a file and compare it with PyTorch; raises CarvanaError if it cannot be written or differs too much."""
    references, threshold = (
        (context.ensemble_references, context.metadata().decision_threshold)
        if chosen.ensemble
        else (context.net_references, 0.5)
    )
    try:
        chosen.write(context, path)
        report = benchmark_export(path, chosen.open(path), references, threshold)
    except (CarvanaError, OSError):
        raise
    except Exception as error:  # exporters raise errors of many libraries, and other formats may still work
        if is_out_of_memory(error):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise CarvanaError(f"{chosen.file}: export failed ({reason}).") from error
    assert_close(chosen.file, report, exact=chosen.exact)
    return report


def _card_entry(context: ExportContext, chosen: ExportFormat) -> dict[str, Any]:
    job = context.job
    folds = list(job.ensemble) if chosen.ensemble else [job.fold]
    entry: dict[str, Any] = {"file": chosen.file, "folds": folds, "nets": _digests(job, folds)}
    if chosen.ensemble:
        cut = context.metadata().decision_threshold
        entry |= {"views": list(job.views), "merge": job.merge, "threshold": job.threshold, "cut": cut}
    return entry


def _digests(job: ExportJob, folds: Iterable[int]) -> dict[str, str]:
    return {str(fold): job.digests[fold] for fold in folds}


def _write_card(folder: Path, net: Mapping[str, Any], entries: dict[str, Any]) -> None:
    formats = _read_entries(folder) | entries
    kept = {name: formats[name] for name in FORMATS if name in formats and (folder / FORMATS[name].file).exists()}
    card = {"net": net, "formats": kept}
    write_json(folder / CARD_FILE, card)
    write_text(folder / README_FILE, render_card(card, {name: FORMATS[name].description for name in kept}))


def _read_entries(folder: Path) -> dict[str, Any]:
    """Return the card's entries by format; empty if there is no readable card."""
    try:
        entries: dict[str, Any] = json.loads((folder / CARD_FILE).read_text(encoding="utf-8"))["formats"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return entries


EXPORTS_DIR = Path("exports")
METRICS = Path("reports/metrics.json")


def export_model(model: str, fold: int | None, formats: Sequence[str] | None, images: int) -> None:
    """Export a trained model, print one line per format, and write the model card.

    ``fold``: which fold's net to export, by default the first active one. ``formats``: by default all. ``images``:
    number of images for int8 calibration. Raises CarvanaError if the net is not trained, and at the end if any format
    failed verification.
    """
    names = list(dict.fromkeys(formats or FORMATS))
    check_formats(names)
    params, folder = read_params(), EXPORTS_DIR / model
    job = _job(params, model, params.folds.active[0] if fold is None else fold, "ensemble" in names, images)
    failed = []
    with file_lock(Path(STATE_DIR) / "running" / f"export-{model}.lock", f"the exports of {model}"):
        for done in export_net(job, names, _cv_scores(model), folder):
            print(_line(done), flush=True)
            failed += [str(done.result)] if isinstance(done.result, CarvanaError) else []
    if (folder / README_FILE).exists():  # unless no export was ever kept
        print(f"Description and usage: {folder / README_FILE}")
    if failed:
        raise CarvanaError("\n".join(failed))


def _job(params: Params, model: str, fold: int, ensemble: bool, calibration: int) -> ExportJob:
    trained = _trained_folds(model, fold)
    merged = params.folds.active if ensemble else ()
    folders = {number: net_dir(model, number) for number in sorted({fold, *merged})}
    weights, settings = params.predict.checkpoint, params.ensemble
    images, fold_by_car = training_images(params), read_fold_by_car()
    validation_ids = images_in_folds(images.ids(), fold_by_car, [fold])
    if not validation_ids:
        raise CarvanaError(f"Fold {fold} has no images to verify exports on. Choose another with --fold.")
    training_ids = images_in_folds(images.ids(), fold_by_car, training_folds(fold, params.folds.count))
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
        reader=images,
        check_ids=_evenly_spaced(validation_ids, CHECK_IMAGES),
        calibration=_evenly_spaced(training_ids, calibration),
    )


def _trained_folds(model: str, fold: int) -> list[int]:
    """Return the trained folds of a model; raises CarvanaError if ``fold`` is not one of them."""
    trained = sorted(path.parent.relative_to("folds") for path in Path("folds").glob(f"[!.]*/[!.]*/{CONFIG}"))
    models = sorted({path.parts[0] for path in trained})
    if not models:
        raise CarvanaError("No net is trained yet. Run 'dvc repro train'.")
    if model not in models:
        raise CarvanaError(f"Model '{model}' is not trained. Trained models: {', '.join(models)}.")
    folds = sorted(int(path.name) for path in trained if path.parts[0] == model)
    if fold not in folds:
        known = ", ".join(map(str, folds))
        raise CarvanaError(
            f"Model '{model}' is not trained for fold {fold}, only for {known}. Choose one of these with --fold, "
            "or train it with 'dvc repro train'."
        )
    return folds


def _cv_scores(model: str) -> dict[str, Any]:
    """Return the model's out-of-fold scores; empty before the report stage has run."""
    try:
        scores: dict[str, Any] = json.loads(METRICS.read_text(encoding="utf-8"))["oof"].get(model, {})
    except (OSError, ValueError, KeyError):
        return {}
    return scores


def _evenly_spaced(image_ids: Sequence[str], wanted: int) -> list[str]:
    """Return up to ``wanted`` evenly spaced ids, which cover many cars and angles."""
    places = np.linspace(0, len(image_ids) - 1, min(wanted, len(image_ids))).round().astype(int)
    return [image_ids[place] for place in places]


def _line(done: ExportResult) -> str:
    result = done.result
    if not isinstance(result, ExportReport):
        return f"{done.path}  not kept"
    return (
        f"{done.path}  {format_bytes(result.bytes)}  difference {result.difference:.1g}  "
        f"Dice drop {result.dice_drop:+.4f}  {format_rate(result.images_per_second)} images/s"
    )


def describe_net(folder: Path, net: SegmentationModel, cv_scores: Mapping[str, Any]) -> dict[str, Any]:
    """Return the description of a trained net for card.json.

    ``cv_scores``: the out-of-fold scores of its model; empty if unknown.
    """
    config = _read(folder / CONFIG)
    return {
        "model": config.get("model", folder.name),
        "fold": config.get("fold"),
        "architecture": config["architecture"],
        "input": config["input"],
        "initial_weights": config.get("initial_weights"),
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        "stride": net.stride,
        "training": _read(folder / "metrics.json") | {"timing": _read(folder / "timing.json")},
        "out_of_fold": dict(cv_scores),
    }


def render_card(card: Mapping[str, Any], descriptions: Mapping[str, str]) -> str:
    """Return the content of card.json as Markdown; ``descriptions`` by format."""
    environment = Environment(
        loader=PackageLoader("pipeline.export", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown without user input
    )
    environment.filters |= {"bytes": format_bytes, "rate": format_rate}
    net, formats = card["net"], card["formats"]
    return environment.get_template("model_card.md.j2").render(
        net=net,
        about=dict(_about(net)),
        input=InputSettings.model_validate(net["input"]),
        formats=formats,
        descriptions=descriptions,
        images=max(entry["images"] for entry in formats.values()),
        machines=sorted({entry["machine"] for entry in formats.values()}),
        outdated=[name for name, entry in formats.items() if not _is_current(entry, net["digests"])],
        clamp=LOGIT_CLAMP,
        max_dice_drop=MAX_DICE_DROP,
        max_difference=MAX_DIFFERENCE,
    )


def format_bytes(size: int) -> str:
    """Return a size in MB or kB."""
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"


def format_rate(per_second: float) -> str:
    """Return a rate with two significant digits."""
    return f"{per_second:.2g}" if per_second < 10 else f"{per_second:.0f}"


def _about(net: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    input, training, scores = InputSettings.model_validate(net["input"]), net["training"], net["out_of_fold"]
    yield "architecture", _architecture(net["architecture"])
    yield "parameters", f"{net['parameters']:,}"
    resized = "" if input.size == "native" else ", resized by area averaging"
    colors = "RGB" if input.channels == "rgb" else "gray"
    yield "input", f"{colors}, {input.height} x {input.width} (height x width){resized}"
    if net["initial_weights"]:
        yield "initial weights", "{source}, `{file}`, SHA-256 `{sha256}`".format(**net["initial_weights"])
    yield "training data", f"all folds except {net['fold']}"
    if "dice" in training:
        yield "validation Dice of this net", f"{training['dice']:.4f}"
    if "training_seconds" in training["timing"]:
        timing = training["timing"]
        yield "training time", f"{timing['training_seconds'] / 60:.1f} minutes on {timing['device']}"
    if "dice" in scores:
        images, cars = scores["images"], scores["cars"]
        yield "out-of-fold Dice of its model", f"{scores['dice']:.4f}, on {images} images of {cars} cars"


def _architecture(spec: Mapping[str, Any]) -> str:
    if spec["architecture"] == "unet":
        return f"U-Net, {'-'.join(map(str, spec['widths']))} channels"
    if spec["architecture"] != "smp_unet":
        return f"{spec['architecture']} of segmentation_models_pytorch, encoder {spec['encoder']}"
    channels = "-".join(map(str, spec["decoder_channels"]))
    return f"U-Net, encoder {spec['encoder']}, {spec.get('upsampling', 'nearest')} upsampling, {channels} channels"


def _is_current(entry: Mapping[str, Any], digests: Mapping[str, str]) -> bool:
    """Return whether a file contains the model's current nets."""
    return all(digests.get(fold) == digest for fold, digest in entry["nets"].items())


def _read(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file; empty if it is missing, as in nets of older versions."""
    if not path.is_file():
        return {}
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
