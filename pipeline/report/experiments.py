"""``carvana ablate --exps``: compare DVC experiments with the workspace, without checking them out."""

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
    """Yield reports/experiments.csv as text, one table per split, then notes, in lines of at most ``width``.

    Columns that are equal in all rows, and splits without experiments, are left out.
    """
    for split, title in SPLIT_TITLES.items():
        rows = rows_of_split(table, split)
        if not rows["current"].all():
            yield from [*_table_lines(rows, title, width), ""]
    for note in notes:
        yield from textwrap.wrap(note, width, subsequent_indent="  ", break_on_hyphens=False)


def _table_lines(rows: pd.DataFrame, title: str, width: int) -> Iterator[str]:
    workspace = rows[rows["current"]].iloc[0]
    yield f"{title}: {workspace['images']} images of {workspace['cars']} cars"
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
    yield from _aligned(cells, rows["changed"].mask(~rows["current"] & (rows["changed"] == ""), "nothing"), width)


def _aligned(cells: Mapping[str, "pd.Series[str]"], changed: "pd.Series[str]", width: int) -> Iterator[str]:
    """Yield one line per row, with its changes to the right, or below if they do not fit."""
    widths = {title: max(len(title), *map(len, texts)) for title, texts in cells.items()}
    left = sum(widths.values()) + 2 * len(widths)
    below = max((len(word) for text in changed for word in text.split()), default=0) > width - left
    for *texts, last in [(*cells, "" if below else "changed"), *zip(*cells.values(), changed, strict=True)]:
        name, *numbers = (text.rjust(size) for text, size in zip(texts, widths.values(), strict=True))
        indent = _INDENT if below else " " * left
        lines = textwrap.wrap(last, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
        row = "  ".join([name.strip().ljust(len(name)), *numbers, ""])
        first = [] if below else lines[:1]
        yield (row + "".join(first).lstrip()).rstrip()
        yield from lines[len(first) :]


TABLE = Path("reports/experiments.csv")
"""One row per run and split, the workspace included."""

_IMAGES = Path("reports/images.csv")
_LOCK = Path("dvc.lock")
_PARAMS = "params.yaml"
_COLUMNS = {"split": str, "model": str, "fold": int, "image_id": str, "car": str, "dice": float}

_HEAD = "HEAD"
_NO_EXPERIMENTS = (
    "No experiments yet. 'dvc exp run --temp --set-param train.epochs=20' runs one without changing the workspace; "
    "with --queue instead of --temp it waits for 'dvc exp run --run-all'."
)
_BIASED_CHECKPOINT = (
    "predict.checkpoint=best selects checkpoints on the images that score them out of fold, which biases those scores "
    "upward. Compare on held-out cars."
)
_TRAINING_KEYS = ("train.", "input.", "models.", "folds.", "data.")
_TRAINING_NOISE = (
    "If nets were retrained: intervals cover the choice of cars, not the randomness of training. Another train.seed "
    "may change the score as much."
)
_STATES = {
    "Queued": "is queued; 'dvc exp run --run-all' runs it.",
    "Running": "is running.",
    "Failed": "failed; 'dvc queue logs {}' shows why.",
}

_SCORING_STAGES = ("download", "folds", "train", "predict", "evaluate")
"""Stages that the scores depend on."""

_CODE = re.compile(r"^    - path: pipeline/.*\n(?:      .*\n)+", re.MULTILINE)
"""Code dependencies in dvc.lock. They are most of the file, and removing them makes parsing the YAML much faster."""


def show_experiments() -> None:
    """Print the experiments next to the workspace and write ``TABLE``; raises CarvanaError as `compare` does."""
    found = compare()
    write_text(TABLE, found.table.to_csv(index=False, lineterminator="\n", float_format="%.9g"))
    print("\n".join(format_experiments(found.table, found.notes, max(80, shutil.get_terminal_size((120, 24)).columns))))
    print(f"All columns: {TABLE}")


def compare() -> PairedComparison:
    """Compare all experiments, and the last commit if its scores differ, with the workspace.

    Experiments of earlier commits are included, so that committing the best one does not empty the table. Raises
    CarvanaError if the workspace has no scores or DVC fails.
    """
    lock, here = _workspace()
    project = _ask_dvc()
    runs, notes = [], [f"{name} {reason}" for name, reason in project.unfinished]
    committed = _lock_of(_HEAD)
    if committed and committed.images not in (None, lock.images):
        project.finished[_HEAD] = _HEAD
    for name, revision in project.finished.items():
        try:
            runs.append(_experiment(name, revision, lock, project.cache))
        except CarvanaError as error:
            notes.append(f"{name} {error}")
    found = compare_runs(here, runs)
    if any("predict.checkpoint=" in run.changed for run in runs):
        notes.append(_BIASED_CHECKPOINT)
    if any(word.startswith(_TRAINING_KEYS) for run in runs for word in run.changed.split()):
        notes.append(_TRAINING_NOISE)
    return PairedComparison(found.table, [*found.notes, *notes] if runs or notes else [_NO_EXPERIMENTS])


@dataclass(frozen=True)
class _LockFile:
    """The parts of a dvc.lock that concern scores."""

    settings: Mapping[str, Any]
    """Values by key of params.yaml, for the stages that scores depend on."""
    images: str | None
    """MD5 of reports/images.csv."""
    stale: bool
    """Whether nets or predictions changed after scoring."""


@dataclass(frozen=True)
class _DvcProject:
    """DVC's experiments."""

    finished: dict[str, str]
    """Revision by name."""
    unfinished: list[tuple[str, str]]
    """Names with their states as text."""
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
        raise CarvanaError(f"DVC could not list its experiments: {error}") from error
    if any(dep.startswith("predictions/") for dep in changed):
        raise CarvanaError(f"{_IMAGES} is older than the predictions. Run 'dvc repro' first.")
    times = Counter(name for name, _, _ in found)
    finished = {name if times[name] == 1 else f"{name}@{base[:7]}": rev for name, base, rev in found}
    # An experiment that failed and was then rerun is finished.
    unfinished = {(n, state) for n, state in queue if state in _STATES and not (state == "Failed" and times[n])}
    return _DvcProject(finished, [(n, _STATES[state].format(n)) for n, state in sorted(unfinished)], cache)


def _deps_of(changes: Any) -> Iterator[str]:
    """Yield the changed dependencies in an entry of DVC's status, which may also be a plain string."""
    if isinstance(changes, dict):
        yield from changes.get("changed deps", ())


def _workspace() -> tuple[_LockFile, ScoredRun]:
    check_dvc_lock(Path.cwd())
    try:
        lock, content = _parse(_LOCK.read_text(encoding="utf-8")), _IMAGES.read_bytes()
    except OSError as error:
        raise CarvanaError(f"{error.filename} not found. Run 'dvc repro' first.") from error
    if lock.stale or lock.images != hashlib.md5(content, usedforsecurity=False).hexdigest():
        raise CarvanaError(f"{_IMAGES} does not match {_LOCK}. Run 'dvc repro' first.")
    try:
        return lock, _scored_run(WORKSPACE, "", lock, content)
    except CarvanaError as error:
        raise CarvanaError(f"The workspace {error} Run 'dvc repro'.") from error


def _experiment(name: str, revision: str, workspace: _LockFile, cache: Path) -> ScoredRun:
    """Return an experiment's run; raises CarvanaError if it cannot be compared, whose message follows its name."""
    lock = _lock_of(revision)
    if lock is None or lock.images is None or lock.stale:
        raise CarvanaError("is incomplete: it has no scores.")
    try:
        content = (cache / lock.images[:2] / lock.images[2:]).read_bytes()
    except OSError as error:
        raise CarvanaError("has scores that are not in DVC's cache. Run it again, or run 'dvc exp pull'.") from error
    changes = list(_changes(workspace, lock))
    if changes and lock.images == workspace.images:
        raise CarvanaError("has the same scores as the workspace: it is incomplete, or its settings changed nothing.")
    return _scored_run(name, " ".join(changes), lock, content)


def _scored_run(name: str, changed: str, lock: _LockFile, content: bytes) -> ScoredRun:
    try:
        images = pd.read_csv(BytesIO(content), usecols=list(_COLUMNS), dtype=_COLUMNS, keep_default_na=False)
        views = tuple(lock.settings["predict.tta.test"])
        space = AblationSpace(
            ablation=AblationSettings(),
            ensemble=EnsembleSettings.model_validate(lock.settings["ensemble"]),
            models=tuple(lock.settings["models.active"]),
            folds=tuple(lock.settings["folds.active"]),
            predicted=dict.fromkeys(SCORED_SPLITS, views),
            views=views,
        )
    except (ValueError, KeyError, TypeError) as error:  # includes pydantic's and pandas' errors
        raise CarvanaError("has settings or scores in the format of another version.") from error
    return ScoredRun(name, changed, {split: space.current(split) for split in SCORED_SPLITS}, images)


def _lock_of(revision: str) -> _LockFile | None:
    """Return the dvc.lock of a revision, or None if it has none."""
    # With git, which is faster: DVC would parse all of dvc.yaml and dvc.lock.
    command = ["git", "show", f"{revision}:./{_LOCK}"]
    try:
        shown = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    except OSError as error:
        raise CarvanaError(f"Cannot run git ({error.strerror}), which stores the experiments. Install it.") from error
    return _parse(shown.stdout) if shown.returncode == 0 else None


def _parse(text: str) -> _LockFile:
    stages = YAML(typ="safe").load(_CODE.sub("", text))["stages"]
    evaluate = stages.get("evaluate", {})
    known = evaluate.get("params", {}).get(_PARAMS, {})
    nets = [f"{model}-{fold}" for model in known.get("models.active", ()) for fold in known.get("folds.active", ())]
    # dvc.lock keeps stages of models that are no longer active.
    matrix = {"", *nets, *(f"{net}-{split}" for net in nets for split in SCORED_SPLITS)}
    parts = {name: name.partition("@") for name in stages}
    entries = [stages[name] for name, (stage, _, item) in parts.items() if stage in _SCORING_STAGES and item in matrix]
    made = {out["path"]: out.get("md5") for entry in entries for out in entry.get("outs") or ()}
    read = [dep for entry in entries for dep in entry.get("deps") or ()]
    return _LockFile(
        settings={key: value for entry in entries for key, value in entry.get("params", {}).get(_PARAMS, {}).items()},
        images=made.get(_IMAGES.as_posix()),
        stale=any(made.get(dep["path"], dep.get("md5")) != dep.get("md5") for dep in read),
    )


def _changes(workspace: _LockFile, experiment: _LockFile) -> Iterator[str]:
    """Yield the settings that affect scores and differ from the workspace, in the form of DVC's ``--set-param``."""
    for key, value in sorted(experiment.settings.items()):
        # The workspace's dvc.lock lacks models that are not active there.
        base = workspace.settings[key] if key in workspace.settings else _param(key)
        own, theirs = dict(_flat(key, base)), dict(_flat(key, value))
        yield from (f"{name}={_as_text(v)}" for name, v in theirs.items() if name not in own or own[name] != v)

        yield from (f"no {name}" for name in own if name not in theirs)


def _param(key: str) -> Any:
    """Return the value of a dotted key of params.yaml, an empty dict if it is missing."""
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
