"""Which state of the project a submission comes from."""

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

from pipeline.kaggle_api.ledger import LedgerRow


def submission_provenance(project: Path, content_sha256: str, ledger: Path) -> LedgerRow:
    """Return the cells of the ledger that say where a CSV of this content comes from.

    The commit is the one it is sent from; ``git_clean`` leaves the ledger itself out, which every submission changes.
    The hash of ``dvc.lock`` and what ``submission.json`` says are taken only if the latter speaks of this very content:
    a CSV from elsewhere is not of this run. Cells of what is not known stay empty.
    """
    lock, facts = project / "dvc.lock", _facts(project / "submissions" / "submission.json", content_sha256)
    if facts and lock.is_file():
        facts["dvc_lock_sha256"] = hashlib.sha256(lock.read_bytes()).hexdigest()
    return {
        "git_commit": _git(project, "rev-parse", "HEAD") or "",
        "git_clean": _clean(project, ledger),
        **facts,
    }


def _clean(project: Path, ledger: Path) -> str:
    apart = f":(exclude){ledger.relative_to(project).as_posix()}"
    changed = _git(project, "status", "--porcelain", "--untracked-files=normal", "--", ".", apart)
    return "" if changed is None else "no" if changed else "yes"


def _git(project: Path, *arguments: str) -> str | None:
    """Return what git says, or None where there is no git, no repository, or a broken one."""
    try:
        run = subprocess.run(["git", *arguments], cwd=project, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return run.stdout.strip() if run.returncode == 0 else None


def _facts(file: Path, content_sha256: str) -> LedgerRow:
    try:
        described: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(described, dict) or described.get("content_sha256") != content_sha256:
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
        "merge": " + ".join(map(str, [described.get("merge", ""), *described.get("postprocess", ())])),
        "weights": json.dumps(described["weights"]) if described.get("weights") else "",
        "threshold": str(described.get("threshold", "")),
    }
