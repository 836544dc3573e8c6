"""Exporting: each format is written, checked against PyTorch, and only then named and put on the card."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.errors import PipelineError
from pipeline.exporting.card import describe, render
from pipeline.exporting.check import Measured, demand, measure
from pipeline.exporting.formats import FORMATS, Format
from pipeline.exporting.material import Job, Material
from pipeline.files import publish, remove, write_json, write_text

CARD, README = "card.json", "README.md"


@dataclass(frozen=True)
class Done:
    """What became of a format."""

    path: Path
    result: Measured | PipelineError
    """What its check measured, or why the file is not kept."""


def demand_formats(names: Sequence[str]) -> None:
    """Raise PipelineError for a format that there is not, or whose package is not installed."""
    for name in names:
        if name not in FORMATS:
            raise PipelineError(f"There is no format '{name}': use {', '.join(FORMATS)}.")
        FORMATS[name].needs()


def export(job: Job, names: Sequence[str], own_scores: Mapping[str, Any], folder: Path) -> Iterator[Done]:
    """Export a model in several formats into ``folder``, with its card, and yield each when it is done.

    ``own_scores`` are those of the model out of fold, for the card. What fails its check is not kept: an earlier file
    of its name stays as it was, and so does its entry in the card. Nobody else may export into ``folder`` meanwhile.
    Raises PipelineError, before anything is written, for a format that there is not.
    """
    demand_formats(names)
    folder.mkdir(parents=True, exist_ok=True)
    for left_by_a_kill in folder.glob(".*.part"):
        remove(left_by_a_kill)
    with TemporaryDirectory(dir=folder, prefix=".", suffix=".part") as work:
        material = Material(job, Path(work))
        about = describe(job.folders[job.fold], material.net, own_scores) | {"digests": _by_fold(job, job.digests)}
        for name in names:
            yield _export(material, name, about, folder, Path(work))


def _export(material: Material, name: str, about: Mapping[str, Any], folder: Path, work: Path) -> Done:
    chosen = FORMATS[name]
    made, target = work / chosen.file, folder / chosen.file
    try:
        measured = _proven(material, chosen, made)
    except PipelineError as error:
        return Done(target, error)
    publish(made, target)
    _write_card(folder, about, {name: _of_what(material, chosen) | asdict(measured)})
    return Done(target, measured)


def _proven(material: Material, chosen: Format, made: Path) -> Measured:
    """Write a file and hold it against PyTorch; raises PipelineError if it can't be made, or is too far off."""
    proofs, cut = (material.ensemble_proofs, material.facts().cut) if chosen.ensemble else (material.net_proofs, 0.5)
    try:
        chosen.write(material, made)
        measured = measure(made, chosen.open(made), proofs, cut)
    except (PipelineError, OSError, MemoryError):
        raise
    except Exception as error:  # exporters fail with errors of many libraries; other formats may do
        words = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise PipelineError(f"{chosen.file} can't be made of this net ({words}).") from error
    demand(chosen.file, measured, exact=chosen.exact)
    return measured


def _of_what(material: Material, chosen: Format) -> dict[str, Any]:
    job = material.job
    folds = list(job.ensemble) if chosen.ensemble else [job.fold]
    entry: dict[str, Any] = {"file": chosen.file, "folds": folds, "nets": _by_fold(job, folds)}
    if chosen.ensemble:
        cut = material.facts().cut
        entry |= {"views": list(job.views), "merge": job.merge, "threshold": job.threshold, "cut": cut}
    return entry


def _by_fold(job: Job, folds: Iterable[int]) -> dict[str, str]:
    return {str(fold): job.digests[fold] for fold in folds}


def _write_card(folder: Path, about: Mapping[str, Any], entries: dict[str, Any]) -> None:
    formats = _entries(folder) | entries
    there = {name: formats[name] for name in FORMATS if name in formats and (folder / FORMATS[name].file).exists()}
    card = {"net": about, "formats": there}
    write_json(folder / CARD, card)
    write_text(folder / README, render(card, {name: FORMATS[name].words for name in there}))


def _entries(folder: Path) -> dict[str, Any]:
    """Return what the card says of each format, nothing where there is no card that can be read."""
    try:
        entries: dict[str, Any] = json.loads((folder / CARD).read_text(encoding="utf-8"))["formats"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return entries
