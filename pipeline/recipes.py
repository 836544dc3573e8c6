"""Recipes: small YAML overlays on params.yaml that keep its comments."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import YAMLError

from pipeline.config import PARAMS_FILE, parse_params
from pipeline.errors import CarvanaError
from pipeline.utils.files import read_versioned, write_text

RECIPES_DIR = Path("recipes")

_BASE_KEY = "recipe"
"""Key of a recipe that names another one, which is laid below it."""


def recipe_names() -> dict[str, str]:
    """Return every recipe with the first line of its head; raises CarvanaError if there is none."""
    heads = ((path, read_versioned(path).partition("\n")[0]) for path in sorted(RECIPES_DIR.glob("*.yaml")))
    found = {path.stem: head.lstrip("# ") for path, head in heads}
    if not found:
        raise CarvanaError(f"There is no recipe in {RECIPES_DIR}/: run this in the project's folder.")
    return found


def apply_recipe(name: str, params: Path = Path(PARAMS_FILE)) -> list[str]:
    """Lay a recipe over params.yaml and return what changed, a line a key.

    Raises CarvanaError if there is no such recipe or what would come out is not a valid params.yaml, which then stays
    as it was.
    """
    overlay: dict[str, Any] = {}
    for part in _resolve_bases(name):
        list(_merge(overlay, part, ""))
    return apply_overlay(overlay, params)


def _resolve_bases(name: str, above: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Yield the settings of the recipe that ``name`` builds on, and so on, and then its own."""
    if name in above:
        raise CarvanaError(f"Recipe '{name}' builds on itself ({' on '.join([*above, name])}): fix {RECIPES_DIR}/.")
    path = RECIPES_DIR / f"{name}.yaml"
    if not path.is_file():
        raise CarvanaError(f"There is no recipe '{name}': there are {', '.join(recipe_names())}.")
    own = _load_mapping(YAML(typ="safe"), path)
    below = own.pop(_BASE_KEY, None)
    if below is not None:
        yield from _resolve_bases(below, [*above, name])
    yield own


def _load_mapping(yaml: YAML, path: Path) -> Any:
    """Return a file's settings; raises CarvanaError if it holds none."""
    try:
        tree = yaml.load(read_versioned(path))
    except OSError as error:
        raise CarvanaError(f"{path} can't be read ({error.strerror}): run this in the project's folder.") from error
    except YAMLError as error:
        raise CarvanaError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise CarvanaError(f"{path} is empty; restore it with 'git checkout {path}'.")
    return tree


def apply_overlay(overlay: dict[str, Any], params: Path = Path(PARAMS_FILE)) -> list[str]:
    """Lay settings over params.yaml, keeping its comments, and return what changed, a line a key.

    Raises CarvanaError if what would come out is not a valid params.yaml, which then stays as it was.
    """
    yaml = YAML()
    yaml.width = 120
    yaml.preserve_quotes = True
    yaml.representer.add_representer(type(None), lambda to, _: to.represent_scalar("tag:yaml.org,2002:null", "null"))
    tree = _load_mapping(yaml, params)
    changes = list(_merge(tree, overlay, ""))
    text = io.StringIO()
    yaml.dump(tree, text)
    parse_params(YAML(typ="safe").load(text.getvalue()))
    if changes:
        write_text(params, text.getvalue())
    return changes


def _merge(tree: Any, overlay: dict[str, Any], prefix: str) -> Iterator[str]:
    for name, value in overlay.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and isinstance(tree.get(name), dict) and not _is_atomic(key):
            yield from _merge(tree[name], value, f"{key}.")
        elif name in tree and tree[name] == value:
            continue
        else:
            yield f"{key}: {_format_value(tree.get(name))} -> {_format_value(value)}"
            tree[name] = _flow_style(value)


def _is_atomic(key: str) -> bool:
    """Return whether a mapping is one value: parts of two lists of losses, or of two nets, make no third."""
    return key.endswith((".losses", ".weights")) or (key.startswith("models.specs.") and key.count(".") == 2)


def _flow_style(value: Any) -> Any:
    """Return a value whose lists are written in brackets, as params.yaml has them."""
    if isinstance(value, dict):
        return CommentedMap({key: _flow_style(inner) for key, inner in value.items()})
    if isinstance(value, list):
        value = CommentedSeq(value)
        value.fa.set_flow_style()
    return value


def _format_value(value: Any) -> str:
    return "null" if value is None else str(dict(value) if isinstance(value, dict) else value)
