"""``carvana ablate --exps``: DVC's experiments beside the workspace's results, read without checking them out."""

import hashlib
import json
import re
import shutil
import subprocess
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd
from ruamel.yaml import YAML

from pipeline.ablation.run_comparison import WORKSPACE, PairedComparison, ScoredRun, compare_runs
from pipeline.ablation.search_space import AblationSpace
from pipeline.config import SCORED_SPLITS, AblationSettings, EnsembleSettings
from pipeline.errors import CarvanaError
from pipeline.report.tables import SPLIT_TITLES, rows_of_split
from pipeline.repro import check_dvc_lock
from pipeline.utils.files import write_text

_INDENT = " " * 4


def format_experiments(table: pd.DataFrame, notes: Sequence[str], width: int) -> Iterator[str]:
    """Yield reports/experiments.csv, a part a split, and notes on it, in lines no longer than ``width``.

    Settings are told by what changed; images and passes where they are not the same for all. A split without anything
    beside the workspace is left out.
    """
    for split, title in SPLIT_TITLES.items():
        rows = rows_of_split(table, split)
        if not rows["current"].all():
            yield from [*_table_lines(rows, title, width), ""]
    for note in notes:
        yield from textwrap.wrap(note, width, subsequent_indent="  ", break_on_hyphens=False)


def _table_lines(rows: pd.DataFrame, title: str, width: int) -> Iterator[str]:
    here = rows[rows["current"]].iloc[0]
    yield f"{title}: {here['images']} images of {here['cars']} cars"
    cells = {
        "": rows["name"],
        "Dice": rows["dice"].map("{:.5f}".format),
        "difference": rows["difference"].map("{:+.5f}".format).mask(rows["current"], ""),
    }
    if rows["low"].notna().any():
        bounds = [f"{low:+.5f} to {high:+.5f}" for low, high in zip(rows["low"], rows["high"], strict=True)]
        cells["95 % interval"] = pd.Series(bounds, rows.index).mask(rows["current"] | rows["low"].isna(), "")
    for column in ("better", "worse", "images", "passes"):
        if rows[column].nunique() > 1:
            cells[column] = rows[column].astype(str).mask(rows["current"] & (column in ("better", "worse")), "")
    yield from _aligned(cells, rows["changed"].mask(~rows["current"] & (rows["changed"] == ""), "no setting"), width)


def _aligned(cells: Mapping[str, "pd.Series[str]"], changed: "pd.Series[str]", width: int) -> Iterator[str]:
    """Yield a line a row, with its changes to the right, or below where they find no room there."""
    widths = {title: max(len(title), *map(len, texts)) for title, texts in cells.items()}
    left = sum(widths.values()) + 2 * len(widths)
    below = max((len(word) for words in changed for word in words.split()), default=0) > width - left
    for *texts, last in [(*cells, "" if below else "changed"), *zip(*cells.values(), changed, strict=True)]:
        name, *numbers = (text.rjust(size) for text, size in zip(texts, widths.values(), strict=True))
        indent = _INDENT if below else " " * left
        words = textwrap.wrap(last, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
        row = "  ".join([name.strip().ljust(len(name)), *numbers, ""])
        first = [] if below else words[:1]
        yield (row + "".join(first).lstrip()).rstrip()
        yield from words[len(first) :]


TABLE = Path("reports/experiments.csv")
"""A row an experiment and split; the workspace's are among them."""

_IMAGES = Path("reports/images.csv")
_LOCK = Path("dvc.lock")
_PARAMS = "params.yaml"
_COLUMNS = {"split": str, "model": str, "fold": int, "image_id": str, "car": str, "dice": float}

_COMMITTED = "HEAD"
_NONE_YET = (
    "There are no experiments yet: 'dvc exp run --temp --set-param train.epochs=20' makes one and leaves the workspace "
    "as it is; with --queue instead of --temp, several wait for 'dvc exp run --run-all'."
)
_FLATTERING = (
    "predict.checkpoint=best chooses nets by the very images that score them out of fold: only held-out cars can tell "
    "what it is worth."
)
_LEARNING = ("train.", "input.", "models.", "folds.", "data.")
_LUCK = (
    "Where nets were trained again, an interval tells how far the cars may deceive, not the luck of a training: "
    "another train.seed may move the score as much."
)
_STATES = {
    "Queued": "waits in the queue; 'dvc exp run --run-all' runs it.",
    "Running": "is running.",
    "Failed": "failed; 'dvc queue logs {}' shows why.",
}

_SCORING = ("download", "folds", "train", "predict", "evaluate")
"""Stages that scores follow from; of predict not all."""

_CODE = re.compile(r"^    - path: pipeline/.*\n(?:      .*\n)+", re.MULTILINE)
"""The pipeline's own code among a stage's dependencies: most of dvc.lock, and YAML is slow to parse."""


def show_experiments() -> None:
    """Print the experiments beside the workspace and write ``TABLE``; raises CarvanaError as `compare` does."""
    found = compare()
    write_text(TABLE, found.table.to_csv(index=False, lineterminator="\n", float_format="%.9g"))
    print("\n".join(format_experiments(found.table, found.notes, max(80, shutil.get_terminal_size((120, 24)).columns))))
    print(f"{TABLE}: all of it")


def compare() -> PairedComparison:
    """Return all experiments, and the last commit where it scored otherwise, beside the workspace.

    Those of earlier commits too: pairs of images tell what a setting did wherever it was tried, and to commit the best
    one should not empty the table. Raises CarvanaError where the workspace has no scores, or DVC can't be asked.
    """
    lock, here = _workspace()
    project = _ask_dvc()
    runs, notes = [], [f"{name} {reason}" for name, reason in project.unfinished]
    committed = _lock_of(_COMMITTED)
    if committed and committed.images not in (None, lock.images):
        project.finished[_COMMITTED] = _COMMITTED
    for name, revision in project.finished.items():
        try:
            runs.append(_run(name, revision, lock, project.cache))
        except CarvanaError as error:
            notes.append(f"{name} {error}")
    found = compare_runs(here, runs)
    if any("predict.checkpoint=" in run.changed for run in runs):
        notes.append(_FLATTERING)
    if any(word.startswith(_LEARNING) for run in runs for word in run.changed.split()):
        notes.append(_LUCK)
    return PairedComparison(found.table, [*found.notes, *notes] if runs or notes else [_NONE_YET])


@dataclass(frozen=True)
class _LockFile:
    """What a dvc.lock says of scores."""

    settings: Mapping[str, Any]
    """By key of params.yaml, as far as scores follow from them."""
    images: str | None
    """MD5 of reports/images.csv."""
    older: bool
    """Whether the scores are older than nets or maps."""


@dataclass(frozen=True)
class _DvcProject:
    """What DVC knows of experiments."""

    finished: dict[str, str]
    """Revision by name."""
    unfinished: list[tuple[str, str]]
    """Names, and what became of them."""
    cache: Path


def _ask_dvc() -> _DvcProject:
    from dvc.exceptions import DvcException  # takes half a second
    from dvc.repo import Repo

    try:
        with Repo(str(Path.cwd())) as repo:
            experiments = repo.experiments
            found = [
                (str(name), str(baseline), str(revision))
                for baseline, group in experiments.ls(all_commits=True).items()
                for name, revision in group
            ]
            queue = [(task["name"] or task["rev"][:7], task["status"]) for task in experiments.celery_queue.status()]
            queue += [(task.name or task.stash_rev[:7], "Running") for task in experiments.tempdir_queue.iter_active()]
            cache = Path(repo.cache.local.path)
            changed = [dep for part in repo.status(["evaluate"]).get("evaluate", ()) for dep in _deps_of(part)]
    except DvcException as error:
        raise CarvanaError(f"DVC can't tell its experiments: {error}") from error
    if any(dep.startswith("predictions/") for dep in changed):
        raise CarvanaError(f"{_IMAGES} is older than the maps here: run 'dvc repro' first, for scores to compare with.")
    times = Counter(name for name, _, _ in found)
    finished = {name if times[name] == 1 else f"{name}@{base[:7]}": rev for name, base, rev in found}
    # What failed at first and was run again is finished.
    unfinished = {(n, state) for n, state in queue if state in _STATES and not (state == "Failed" and times[n])}
    return _DvcProject(finished, [(n, _STATES[state].format(n)) for n, state in sorted(unfinished)], cache)


def _deps_of(changes: Any) -> Iterator[str]:
    """Yield what a part of DVC's status calls changed; it may be a word."""
    if isinstance(changes, dict):
        yield from changes.get("changed deps", ())


def _workspace() -> tuple[_LockFile, ScoredRun]:
    check_dvc_lock(Path.cwd())
    try:
        lock, content = _parse(_LOCK.read_text(encoding="utf-8")), _IMAGES.read_bytes()
    except OSError as error:
        raise CarvanaError(
            f"{error.filename} is missing: run 'dvc repro' first, for scores to compare with."
        ) from error
    if lock.older or lock.images != hashlib.md5(content, usedforsecurity=False).hexdigest():
        raise CarvanaError(f"{_IMAGES} is not what {_LOCK} says: run 'dvc repro' first, for scores to compare with.")
    try:
        return lock, _as_run(WORKSPACE, "", lock, content)
    except CarvanaError as error:
        raise CarvanaError(f"The workspace {error} Run 'dvc repro'.") from error


def _run(name: str, revision: str, here: _LockFile, cache: Path) -> ScoredRun:
    """Return an experiment; raises CarvanaError with why it can't be compared, which follows its name."""
    lock = _lock_of(revision)
    if lock is None or lock.images is None or lock.older:
        raise CarvanaError("was run only in part: it has no scores of its own.")
    try:
        content = (cache / lock.images[:2] / lock.images[2:]).read_bytes()
    except OSError as error:
        raise CarvanaError("has no scores in DVC's cache any more: run it again, or 'dvc exp pull' it.") from error
    changes = list(_changes(here, lock))
    if changes and lock.images == here.images:
        raise CarvanaError("has the very scores of the workspace: it was run only in part, or changed nothing.")
    return _as_run(name, " ".join(changes), lock, content)


def _as_run(name: str, changed: str, lock: _LockFile, content: bytes) -> ScoredRun:
    try:
        images = pd.read_csv(BytesIO(content), usecols=list(_COLUMNS), dtype=_COLUMNS, keep_default_na=False)
        views = tuple(lock.settings["predict.tta.test"])
        choices = AblationSpace(
            ablation=AblationSettings(),
            ensemble=EnsembleSettings.model_validate(lock.settings["ensemble"]),
            models=tuple(lock.settings["models.active"]),
            folds=tuple(lock.settings["folds.active"]),
            predicted=dict.fromkeys(SCORED_SPLITS, views),
            views=views,
        )
    except (ValueError, KeyError, TypeError) as error:  # pydantic's and pandas' own are ValueErrors
        raise CarvanaError("has settings or scores in the form of another version.") from error
    return ScoredRun(name, changed, {split: choices.current(split) for split in SCORED_SPLITS}, images)


def _lock_of(revision: str) -> _LockFile | None:
    """Return what a revision's dvc.lock says, or None where it has none."""
    # By git, since DVC would parse all of dvc.yaml and dvc.lock for it.
    command = ["git", "show", f"{revision}:./{_LOCK}"]
    try:
        shown = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    except OSError as error:
        raise CarvanaError(f"git can't be run ({error.strerror}): experiments are kept in it.") from error
    return _parse(shown.stdout) if shown.returncode == 0 else None


def _parse(text: str) -> _LockFile:
    stages = YAML(typ="safe").load(_CODE.sub("", text))["stages"]
    evaluate = stages.get("evaluate", {})
    known = evaluate.get("params", {}).get(_PARAMS, {})
    nets = [f"{model}-{fold}" for model in known.get("models.active", ()) for fold in known.get("folds.active", ())]
    # Stages of models that are no longer active stay in dvc.lock.
    matrix = {"", *nets, *(f"{net}-{split}" for net in nets for split in SCORED_SPLITS)}
    parts = {name: name.partition("@") for name in stages}
    used = [stages[name] for name, (stage, _, item) in parts.items() if stage in _SCORING and item in matrix]
    made = {out["path"]: out.get("md5") for entry in used for out in entry.get("outs") or ()}
    read = [dep for entry in used for dep in entry.get("deps") or ()]
    return _LockFile(
        settings={key: value for entry in used for key, value in entry.get("params", {}).get(_PARAMS, {}).items()},
        images=made.get(_IMAGES.as_posix()),
        older=any(made.get(dep["path"], dep.get("md5")) != dep.get("md5") for dep in read),
    )


def _changes(here: _LockFile, there: _LockFile) -> Iterator[str]:
    """Yield the settings that scores follow from and that differ there, as DVC's ``--set-param`` takes them."""
    for key, value in sorted(there.settings.items()):
        # Of a model that is not active here dvc.lock knows nothing.
        base = here.settings[key] if key in here.settings else _written(key)
        own, theirs = dict(_flat(key, base)), dict(_flat(key, value))
        yield from (f"{name}={_as_text(v)}" for name, v in theirs.items() if name not in own or own[name] != v)
        yield from (f"no {name}" for name in own if name not in theirs)


def _written(key: str) -> Any:
    tree = YAML(typ="safe").load(Path(_PARAMS).read_text(encoding="utf-8"))
    for step in key.split("."):
        tree = tree.get(step, {}) if isinstance(tree, dict) else {}
    return tree


def _flat(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _flat(f"{key}.{name}", inner)
    else:
        yield key, value


def _as_text(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), default=str).replace('"', "")
