"""Recipes: small YAML files whose settings are applied to params.yaml, keeping its comments."""

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
"""Key of a recipe that names another recipe to apply first."""


def recipe_names() -> dict[str, str]:
    """Return the name and the purpose (its first line) of every recipe; raises CarvanaError if there is none."""
    purposes = {
        path.stem: read_versioned(path).partition("\n")[0].lstrip("# ") for path in sorted(RECIPES_DIR.glob("*.yaml"))
    }
    if not purposes:
        raise CarvanaError(f"{RECIPES_DIR}/ has no recipes. Run this in the project's folder.")
    return purposes


def apply_recipe(name: str, params: Path = Path(PARAMS_FILE)) -> list[str]:
    """Apply a recipe to params.yaml and return the changes, one line per key.

    Raises CarvanaError if the recipe does not exist or the result would not be valid; params.yaml is then unchanged.
    """
    overlay: dict[str, Any] = {}
    for part in _resolve_bases(name):
        list(_merge(overlay, part, ""))
    return apply_overlay(overlay, params)


def _resolve_bases(name: str, derived: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Yield the settings of a recipe's base, if it has one, and then the recipe's own.

    ``derived`` are the recipes that led here.
    """
    if name in derived:
        raise CarvanaError(
            f"Recipe '{name}' is its own base ({' -> '.join([*derived, name])}). "
            f"Change '{_BASE_KEY}' in {RECIPES_DIR}/{name}.yaml."
        )
    path = RECIPES_DIR / f"{name}.yaml"
    if not path.is_file():
        raise CarvanaError(f"Unknown recipe '{name}'. Choose one of {', '.join(recipe_names())}.")
    own = _load_mapping(YAML(typ="safe"), path)
    base = own.pop(_BASE_KEY, None)
    if base is not None:
        yield from _resolve_bases(base, [*derived, name])
    yield own


def _load_mapping(yaml: YAML, path: Path) -> Any:
    """Return the settings in a YAML file; raises CarvanaError if it cannot be read, is not valid YAML or is empty."""
    try:
        tree = yaml.load(read_versioned(path))
    except OSError as error:
        raise CarvanaError(f"{path} cannot be read ({error.strerror}). Run this in the project's folder.") from error
    except YAMLError as error:
        raise CarvanaError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise CarvanaError(f"{path} has no settings. Restore it with 'git checkout {path}'.")
    return tree


def apply_overlay(overlay: dict[str, Any], params: Path = Path(PARAMS_FILE)) -> list[str]:
    """Apply settings to params.yaml, keeping its comments, and return the changes, one line per key.

    Raises CarvanaError if the result would not be valid; params.yaml is then unchanged.
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
    """Set the values of ``overlay`` in ``tree``, in place, and yield each change; ``prefix`` is the key of ``tree``."""
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
    """Return whether a mapping is replaced as a whole: a mix of two sets of losses or two models makes no sense."""
    return key.endswith((".losses", ".weights")) or (key.startswith("models.specs.") and key.count(".") == 2)


def _flow_style(value: Any) -> Any:
    """Return the value with its lists marked to be written in brackets, as in params.yaml."""
    if isinstance(value, dict):
        return CommentedMap({key: _flow_style(inner) for key, inner in value.items()})
    if isinstance(value, list):
        value = CommentedSeq(value)
        value.fa.set_flow_style()
    return value


def _format_value(value: Any) -> str:
    return "null" if value is None else str(dict(value) if isinstance(value, dict) else value)
