"""dvc.yaml against the code: what a stage imports are its deps, what it reads of params.yaml are its params."""

import ast
from math import prod
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from ruamel.yaml import YAML

from pipeline.config import Params
from pipeline.stages.code import files_of

ROOT = Path(__file__).parents[1]
STAGES: dict[str, Any] = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]


def functions(file: str) -> dict[str, ast.FunctionDef]:
    """All functions of a file by name, methods too."""
    tree = ast.parse((ROOT / "pipeline" / file).read_text(encoding="utf-8"))
    return {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


INPUTS = functions("stages/inputs.py") | functions("stages/active.py")
METHODS = functions("params.py")


def keys_read(function: ast.FunctionDef, root: str, siblings: set[str]) -> set[str]:
    """The keys of params.yaml that a function reads, where ``root`` is its name for all settings.

    Follows ``params.folds.count``, names given to parts (``settings = params.folds``), methods of Params, and functions
    of inputs.py and active.py that are handed ``params``; ``siblings``, the functions of the same file, are looked at
    by the caller.
    """
    known, found = {root: ""}, set[str]()

    def key_of(node: ast.AST) -> str | None:
        if isinstance(node, ast.Name):
            return known.get(node.id)
        if isinstance(node, ast.Attribute):
            outer = key_of(node.value)
            return None if outer is None else f"{outer}.{node.attr}".removeprefix(".")
        return None

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Assign):
            for target, value in pairs(node):
                key = key_of(value)
                if key and isinstance(target, ast.Name):
                    known[target.id] = key
                else:
                    visit(value)
            return
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            handed_on = [argument for argument in node.args if key_of(argument) == ""]
            if handed_on and node.func.id in INPUTS:
                found.update(keys_read(INPUTS[node.func.id], "params", set(INPUTS)))
            if handed_on and (node.func.id in INPUTS or node.func.id in siblings):
                for argument in (*node.args, *node.keywords):
                    if argument not in handed_on:
                        visit(argument)
                return
        key = key_of(node)
        if key is None:
            for child in ast.iter_child_nodes(node):
                visit(child)
        elif key in METHODS:
            found.update(keys_read(METHODS[key], "self", set()))
        else:
            assert key, f"{function.name} hands on all settings, where this test can't follow: line {node.lineno}"  # type: ignore[attr-defined]
            found.add(as_field(key))

    for statement in function.body:
        visit(statement)
    return found


def pairs(node: ast.Assign) -> list[tuple[ast.AST, ast.AST]]:
    (target,) = node.targets
    if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
        return list(zip(target.elts, node.value.elts, strict=True))
    return [(target, node.value)]


def as_field(key: str) -> str:
    """The key, cut off where a setting ends and what Python can do with it begins."""
    kind: Any = Params
    fields: list[str] = []
    for name in key.split("."):
        if not (isinstance(kind, type) and issubclass(kind, BaseModel) and name in kind.model_fields):
            break
        fields.append(name)
        kind = kind.model_fields[name].annotation
    return ".".join(fields)


def widest(keys: set[str]) -> set[str]:
    """The keys without those that lie within another."""
    return {key for key in keys if not any(key.startswith(f"{other}.") for other in keys)}


def stage_reads(stage: str) -> set[str]:
    here = functions(f"stages/{stage}.py")
    keys = set[str]().union(*(keys_read(function, "params", set(here)) for function in here.values()))
    # Two exemptions: how fast a result comes is no part of it, nor where the files lie, for which the manifest stands.
    exempt = {"hardware"} if stage == "download" else {"hardware", "data"}
    return widest({key for key in keys if key.partition(".")[0] not in exempt})


@pytest.mark.parametrize("stage", STAGES)
def test_code_among_the_deps_is_what_the_stage_imports_with_its_templates(stage: str) -> None:
    assert [dep for dep in STAGES[stage]["deps"] if dep.startswith("pipeline/")] == files_of(stage)


@pytest.mark.parametrize("stage", STAGES)
def test_params_are_what_the_stage_reads(stage: str) -> None:
    listed = [key.partition(".${")[0] for key in STAGES[stage].get("params", [])]
    assert listed == sorted(stage_reads(stage))


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_runs_the_module_of_its_name(stage: str) -> None:
    module, *options = STAGES[stage]["cmd"].removeprefix("python -m ").split()
    assert module == f"pipeline.stages.{stage}"
    assert [option for option in options if option.startswith("--")] == [
        f"--{key}" for key in STAGES[stage].get("matrix", {})
    ]


def test_the_default_has_at_most_20_stages() -> None:
    params = YAML(typ="safe").load((ROOT / "params.yaml").read_text(encoding="utf-8"))

    def length(values: Any) -> int:
        if isinstance(values, str):
            section, key = values.removeprefix("${").removesuffix("}").split(".")
            values = params[section][key]
        return len(values)

    counts = {
        name: prod(length(values) for values in stage.get("matrix", {}).values()) for name, stage in STAGES.items()
    }
    assert sum(counts.values()) <= 20, counts


@pytest.mark.parametrize(
    ("body", "keys"),
    [
        ("use(params.train.lr)", {"train.lr"}),
        ("settings, n = params.folds, 3; use(settings.count, settings.seed)", {"folds.count", "folds.seed"}),
        ("settings = params.folds; use(settings)", {"folds"}),
        ("use(getattr(params.predict.tta, split))", {"predict.tta"}),
        ("use(params.ensemble.model_dump(mode='json'))", {"ensemble"}),
        ("use(f'{params.input.height}')", {"input"}),
        ("use(params.resolve_model(model))", {"input", "train", "models.specs"}),
        (
            "nets = params.ensemble_members()",
            {"ensemble.models", "ensemble.folds", "ensemble.weights", "models.active", "folds.active"},
        ),
        ("images = training_images(params)", {"data", "data.directory", "data.quality"}),
        ("use([params.train.seed for _ in range(3)], key=params.folds.seed)", {"train.seed", "folds.seed"}),
    ],
)
def test_the_reader_of_this_test_sees_what_is_read(body: str, keys: set[str]) -> None:
    (function,) = ast.parse(f"def run(params):\n    {body}").body
    assert isinstance(function, ast.FunctionDef)
    assert keys_read(function, "params", {"run"}) == keys


def test_the_reader_of_this_test_refuses_what_it_can_not_follow() -> None:
    (function,) = ast.parse("def run(params):\n    elsewhere(params)").body
    assert isinstance(function, ast.FunctionDef)
    with pytest.raises(AssertionError, match="hands on all settings"):
        keys_read(function, "params", {"run"})
