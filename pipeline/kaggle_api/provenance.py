"""Which state of the project a submission comes from."""

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

from pipeline.kaggle_api.ledger import Row


def provenance(project: Path, content_sha256: str, ledger: Path) -> Row:
    """Return the cells of the ledger that say where a CSV of this content comes from.

    ``git_clean`` leaves the ledger itself out, which changes with every submission. What ``submission.json`` says is
    taken only if it speaks of this very content; cells of what is not known stay empty.
    """
    lock = project / "dvc.lock"
    return {
        "git_commit": _git(project, "rev-parse", "HEAD"),
        "git_clean": _clean(project, ledger),
        "dvc_lock_sha256": hashlib.sha256(lock.read_bytes()).hexdigest() if lock.is_file() else "",
        **_facts(project / "submissions" / "submission.json", content_sha256),
    }


def _clean(project: Path, ledger: Path) -> str:
    if not _git(project, "rev-parse", "HEAD"):
        return ""
    changed = _git(project, "status", "--porcelain", "--", ".", f":(exclude){ledger.relative_to(project).as_posix()}")
    return "no" if changed else "yes"


def _git(project: Path, *arguments: str) -> str:
    try:
        run = subprocess.run(["git", *arguments], cwd=project, capture_output=True, text=True, check=False)
    except OSError:  # no git here
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""


def _facts(file: Path, content_sha256: str) -> Row:
    try:
        described: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if described.get("content_sha256") != content_sha256:
        return {}
    own = described.get("own_dice", {})
    nets = described.get("nets", [])
    models = {net.partition("/")[0] for net in nets}
    # Several models are scored out of fold as the ensemble merges them.
    out_of_fold = own.get("oof", {}).get(models.pop() if len(models) == 1 else "ensemble")
    return {
        "oof_dice": "" if out_of_fold is None else f"{out_of_fold:.6f}",
        "holdout_dice": f"{own['holdout']:.6f}" if "holdout" in own else "",
        "nets": " ".join(nets),
        "views": " ".join(described.get("views", ())),
        "merge": str(described.get("merge", "")),
        "weights": json.dumps(described["weights"]) if described.get("weights") else "",
        "threshold": str(described.get("threshold", "")),
    }
