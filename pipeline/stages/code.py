"""Which of the project's files decide a stage's result, read off the imports."""

import ast
from functools import cache
from pathlib import Path

from pipeline.utils.files import sha256_of

ROOT = Path(__file__).parents[2]

PLUMBING = frozenset(
    f"pipeline/{name}.py"
    for name in (
        "cli",
        "cores",
        "errors",
        "files",
        "params",
        "places",
        "resume",
        "sections",
        "stages/command",
        "stages/code",
    )
)
"""Files that decide where results appear and how settings and errors are worded, not what a result is."""

FETCHING = "pipeline/kaggle_api/"
"""The room that brings files here; what they are is for the manifest to say."""


def files_of(stage: str) -> list[str]:
    """Return the files, relative to the project's root, that ``pipeline/stages/<stage>.py`` runs; sorted.

    A template that is named as a module, such as ``page.html.j2`` beside ``page.py``, belongs to it.
    """
    found: set[str] = set()
    waiting = [f"pipeline/stages/{stage}.py"]
    while waiting:
        file = waiting.pop()
        if file not in found and file not in PLUMBING and not file.startswith(FETCHING):
            found |= {file, *templates(file)}
            waiting.extend(imports(file))
    return sorted(file for file in found if not file.endswith("__init__.py"))


def digest(stage: str) -> str:
    """Return a digest of the files that decide a stage's result."""
    return sha256_of(*((ROOT / file).read_bytes() for file in files_of(stage)))


def templates(file: str) -> set[str]:
    """Return the templates beside a module that have its name."""
    module = ROOT / file
    return {str(path.relative_to(ROOT)) for path in module.parent.glob(f"{module.stem}.*.j2")}


@cache
def imports(file: str) -> frozenset[str]:
    """Return the project's own files that a file imports, inside functions too."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    paths = {module.replace(".", "/") for module in modules if module.split(".")[0] == "pipeline"}
    candidates = {f"{path}.py" for path in paths} | {f"{path}/__init__.py" for path in paths}
    return frozenset(candidate for candidate in candidates if (ROOT / candidate).is_file())
