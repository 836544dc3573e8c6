"""``carvana ablate --exps``: compare DVC experiments with the workspace, without checking them out."""

import hashlib
import json
import re
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping
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
from pipeline.utils.terminal import print_table

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

_CODE_DEPS = re.compile(r"^    - path: pipeline/.*\n(?:      .*\n)+", re.MULTILINE)
"""Code dependencies in dvc.lock. They are most of the file, and removing them makes parsing the YAML much faster."""


def show_experiments() -> None:
    """Print the experiments next to the workspace and write ``TABLE``; raises CarvanaError as `compare` does."""
    comparison = compare()
    write_text(TABLE, comparison.table.to_csv(index=False, lineterminator="\n", float_format="%.9g"))
    print_experiments(comparison)
    print(f"All columns: {TABLE}")


def print_experiments(comparison: PairedComparison) -> None:
    """Print one table per split, then the notes.

    Columns that are equal in all rows, and splits without experiments, are left out.
    """
    for split, title in SPLIT_TITLES.items():
        rows = rows_of_split(comparison.table, split)
        if rows["current"].all():
            continue
        workspace = rows[rows["current"]].iloc[0]
        print(f"{title}: {workspace['images']} images of {workspace['cars']} cars")
        cells = _cells(rows)
        print_table(list(cells), zip(*cells.values(), strict=True), right=set(cells) - {"run", "changed"})
        print()
    for note in comparison.notes:
        print(note)


def _cells(rows: pd.DataFrame) -> dict[str, "pd.Series[str]"]:
    """Return the printed columns of a split by title; differences from itself are blank for the workspace."""
    current = rows["current"]
    cells = {
        "run": rows["name"],
        "Dice": rows["dice"].map("{:.5f}".format),
        "difference": rows["difference"].map("{:+.5f}".format).mask(current, ""),
    }
    if rows["low"].notna().any():
        bounds = [f"{low:+.5f} to {high:+.5f}" for low, high in zip(rows["low"], rows["high"], strict=True)]
        cells["95 % CI"] = pd.Series(bounds, rows.index).mask(current | rows["low"].isna(), "")
    for column in ("better", "worse", "images", "passes"):
        if rows[column].nunique() > 1:
            cells[column] = rows[column].astype(str).mask(current & (column in ("better", "worse")), "")
    return cells | {"changed": rows["changed"].mask(~current & (rows["changed"] == ""), "nothing")}


def compare() -> PairedComparison:
    """Compare all experiments, and the last commit if its scores differ, with the workspace.

    Experiments of earlier commits are included, so that committing the best one does not empty the table. Raises
    CarvanaError if the workspace has no scores or DVC fails.
    """
    lock, here = _workspace()
    project = _read_dvc_project()
    runs, notes = [], [f"{name} {reason}" for name, reason in project.unfinished]
    committed = _lock_of(_HEAD)
    if committed and committed.images not in (None, lock.images):
        project.finished[_HEAD] = _HEAD
    for name, revision in project.finished.items():
        try:
            runs.append(_experiment(name, revision, lock, project.cache))
        except CarvanaError as error:
            notes.append(f"{name} {error}")
    comparison = compare_runs(here, runs)
    if any("predict.checkpoint=" in run.changed for run in runs):
        notes.append(_BIASED_CHECKPOINT)
    if any(word.startswith(_TRAINING_KEYS) for run in runs for word in run.changed.split()):
        notes.append(_TRAINING_NOISE)
    return PairedComparison(comparison.table, [*comparison.notes, *notes] if runs or notes else [_NO_EXPERIMENTS])


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


def _read_dvc_project() -> _DvcProject:
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
    counts = Counter(name for name, _, _ in found)
    finished = {name if counts[name] == 1 else f"{name}@{base[:7]}": rev for name, base, rev in found}
    # An experiment that failed and was then rerun is finished.
    unfinished = {(n, state) for n, state in queue if state in _STATES and not (state == "Failed" and counts[n])}
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
        result = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    except OSError as error:
        raise CarvanaError(f"Cannot run git ({error.strerror}), which stores the experiments. Install it.") from error
    return _parse(result.stdout) if result.returncode == 0 else None


def _parse(text: str) -> _LockFile:
    stages = YAML(typ="safe").load(_CODE_DEPS.sub("", text))["stages"]
    evaluate = stages.get("evaluate", {})
    known = evaluate.get("params", {}).get(_PARAMS, {})
    nets = [f"{model}-{fold}" for model in known.get("models.active", ()) for fold in known.get("folds.active", ())]
    # dvc.lock keeps stages of models that are no longer active.
    matrix = {"", *nets, *(f"{net}-{split}" for net in nets for split in SCORED_SPLITS)}
    parts = {name: name.partition("@") for name in stages}
    entries = [stages[name] for name, (stage, _, item) in parts.items() if stage in _SCORING_STAGES and item in matrix]
    outputs = {out["path"]: out.get("md5") for entry in entries for out in entry.get("outs") or ()}
    dependencies = [dep for entry in entries for dep in entry.get("deps") or ()]
    return _LockFile(
        settings={key: value for entry in entries for key, value in entry.get("params", {}).get(_PARAMS, {}).items()},
        images=outputs.get(_IMAGES.as_posix()),
        stale=any(outputs.get(dep["path"], dep.get("md5")) != dep.get("md5") for dep in dependencies),
    )


def _changes(workspace: _LockFile, experiment: _LockFile) -> Iterator[str]:
    """Yield the settings that affect scores and differ from the workspace, in the form of DVC's ``--set-param``."""
    for key, value in sorted(experiment.settings.items()):
        # The workspace's dvc.lock lacks models that are not active there.
        base = workspace.settings[key] if key in workspace.settings else _param(key)
        own, theirs = dict(_flatten(key, base)), dict(_flatten(key, value))
        yield from (f"{name}={_format_value(v)}" for name, v in theirs.items() if name not in own or own[name] != v)
        yield from (f"no {name}" for name in own if name not in theirs)


def _param(key: str) -> Any:
    """Return the value of a dotted key of params.yaml, an empty dict if it is missing."""
    tree = YAML(typ="safe").load(Path(_PARAMS).read_text(encoding="utf-8"))
    for step in key.split("."):
        tree = tree.get(step, {}) if isinstance(tree, dict) else {}
    return tree


def _flatten(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _flatten(f"{key}.{name}", inner)
    else:
        yield key, value


def _format_value(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), default=str).replace('"', "")
