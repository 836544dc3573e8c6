"""Exporting: each format is written, checked against PyTorch, and only then named and put on the card."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.errors import CarvanaError
from pipeline.exporting.card import describe_net, render_card
from pipeline.exporting.check import ExportReport, assert_close, benchmark_export
from pipeline.exporting.formats import FORMATS, ExportFormat
from pipeline.exporting.material import ExportContext, ExportJob
from pipeline.files import publish_tree, remove_path, write_json, write_text

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
