"""``carvana segment``: people's own pictures, by nets of the project, or by exports anywhere."""

import os
import sys
import time
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from pipeline.competition.submission import CSV_HEADER
from pipeline.ensembling.ensemble import ENSEMBLE_NAME, EnsembleSettings
from pipeline.errors import CarvanaError, CorruptFileError
from pipeline.files import atomic_write
from pipeline.params import PARAMS_FILE, Params, read_params
from pipeline.serving import nets
from pipeline.serving.jobs import RLE_CSV, SegmentJob, check_conflicts, plan_outputs
from pipeline.serving.masker import RawPredictions, Segmenter
from pipeline.serving.outputs import MASK_FORMATS, rle_row
from pipeline.serving.stream import predict_images

RLE = "rle"
"""What is written besides ``KINDS``: one CSV for all pictures."""

_BATCH = 4
"""Pictures a forward pass where there are no settings."""


@dataclass
class RunTally:
    """What became of the pictures."""

    pixels: list[int] = field(default_factory=list)
    """Of each that was sound."""
    skipped: list[str] = field(default_factory=list)
    """Why, of each that was not."""
    seconds: float = 0.0


def segment_images(
    paths: Sequence[Path],
    out: Path,
    *,
    names: Sequence[str] = (ENSEMBLE_NAME,),
    views: Sequence[str] | None = None,
    changes: Mapping[str, Any] | None = None,
    write: Collection[str] = ("mask",),
    overwrite: bool = False,
) -> None:
    """Write what the nets of some ``names`` make of each picture, by params.yaml with some ``changes`` of `ensemble`.

    Where there is no params.yaml, defaults hold. Raises CarvanaError before any work if it can't be done, and at the
    end if a picture was not sound.
    """
    jobs, kinds, csv = (
        plan_outputs(paths, out),
        [kind for kind in MASK_FORMATS if kind in write],
        out / RLE_CSV if RLE in write else None,
    )
    check_conflicts(jobs, kinds, csv, overwrite=overwrite)
    params = read_params() if Path(PARAMS_FILE).exists() else None
    masker = _segmenter(names, views, params)
    settings = _settings(params, masker, changes or {})
    print(f"Predicting with {', '.join(masker.nets)}.", file=sys.stderr)

    def finish(job: SegmentJob, looked: RawPredictions) -> tuple[int, str]:
        mask_HW = masker.segment(looked, settings)
        for kind in kinds:
            with atomic_write(job.target(kind)) as temporary:
                temporary.write_bytes(MASK_FORMATS[kind].encode(looked.image_HWC, mask_HW))
        return mask_HW.size, rle_row(job.path.name, mask_HW) if csv else ""

    tally = _work(
        predict_images(masker, jobs, finish, params.hardware.predict_batch if params else _BATCH), len(jobs), csv
    )
    print(_summary(tally, [*kinds, *([csv.name] if csv else [])], out))
    if tally.skipped:
        raise CarvanaError(f"{len(tally.skipped)} of {len(jobs)} pictures were skipped, first: {tally.skipped[0]}")


def _segmenter(names: Sequence[str], views: Sequence[str] | None, params: Params | None) -> Segmenter:
    found = dict.fromkeys(net for name in names for net in _expand(name, params))
    if params is None:
        return Segmenter({net: nets.load_predictor(net, views or ["identity"]) for net in found})
    views, device = views or params.predict.tta.test, params.hardware.device
    weights, precision = params.predict.checkpoint, params.predict.precision
    return Segmenter(
        {net: nets.load_predictor(net, views, weights=weights, device=device, precision=precision) for net in found}
    )


def _settings(params: Params | None, masker: Segmenter, changes: Mapping[str, Any]) -> EnsembleSettings:
    tree = params.ensemble.model_dump() if params else {}
    own = nets.default_threshold(masker.nets.values())
    return EnsembleSettings.model_validate({**tree, **({} if own is None else {"threshold": own}), **changes})


def _expand(name: str, params: Params | None) -> list[str]:
    if name != ENSEMBLE_NAME:
        return nets.resolve(name)
    if params is None:
        raise CarvanaError(
            f"The ensemble is that of {PARAMS_FILE}, which is not here: go to the project, or give --net."
        )
    return [f"{model}/{fold}" for model, fold in params.ensemble_members()]


def _work(
    results: Generator[tuple[SegmentJob, tuple[int, str] | CorruptFileError]], count: int, csv: Path | None
) -> RunTally:
    """Take all results, showing how far it is; the CSV, if any, appears when all are there."""
    tally, begun = RunTally(), time.perf_counter()
    bar = tqdm(total=count, desc="Predicting", unit="picture", disable=None)
    with bar, _rows(csv) as rows, closing(results):
        try:
            for _, result in results:
                if isinstance(result, CorruptFileError):
                    tally.skipped.append(str(result))
                    bar.write(f"skipped: {result}", file=sys.stderr)
                else:
                    tally.pixels.append(result[0])
                    rows.write(result[1])
                bar.update()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"Stopped after {len(tally.pixels)} of {count} pictures. What is written is whole; "
                "with --overwrite the same command begins again."
            ) from None
    tally.seconds = time.perf_counter() - begun
    return tally


@contextmanager
def _rows(csv: Path | None) -> Iterator[TextIO]:
    """Yield where rows go: to the file, which appears whole or not at all, or nowhere."""
    with (
        atomic_write(csv) if csv else nullcontext(Path(os.devnull)) as path,
        path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        file.write(f"{CSV_HEADER}\n")
        yield file


def _summary(tally: RunTally, written: Sequence[str], out: Path) -> str:
    count, megapixels = len(tally.pixels), sum(tally.pixels) / 1e6
    if not count:
        return "No picture was sound."
    return (
        f"{count} picture{'s' * (count != 1)} of {megapixels / count:.1f} megapixels on average "
        f"in {tally.seconds:.1f} s, "
        f"{count / tally.seconds:.2f} a second: {', '.join(written)} in {out}."
    )
