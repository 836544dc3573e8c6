"""dvc.yaml against the code: what a stage imports lies in the folders that it depends on."""

from math import prod
from pathlib import Path
from typing import Any

import grimp
import pytest
from ruamel.yaml import YAML

from pipeline.workspace import code_digest, dvc_stages
from tests import ROOT

STAGES = dvc_stages(ROOT)
NO_RESULT = ("config", "errors", "workspace", "utils", "kaggle", "repro")
"""Modules that say where files are, how settings are read and errors are worded: they decide no result."""


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_imports_only_what_it_depends_on(stage: str) -> None:
    graph = grimp.build_graph("pipeline")
    # `carvana repro` tries nets before it provides data as the stage download does: that decides no result either.
    graph.remove_import(importer="pipeline.repro", imported="pipeline.models.networks")
    imported = graph.find_upstream_modules(f"pipeline.stages.{stage}")
    packages = {module.split(".")[1] for module in imported if module != "pipeline"} - set(NO_RESULT)
    code = {dep for dep in STAGES[stage]["deps"] if dep.startswith("pipeline/")}
    assert code == {f"pipeline/{package}/" for package in packages} | {f"pipeline/stages/{stage}.py"}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_run_by_its_command(stage: str) -> None:
    name, *options = STAGES[stage]["cmd"].removeprefix("carvana stage ").split()
    assert name == stage
    assert [option for option in options if option.startswith("--")] == [
        f"--{key}" for key in STAGES[stage].get("matrix", {})
    ]


def test_the_code_digest_changes_with_files_in_the_deps_only(tmp_path: Path) -> None:
    for file in ("models/unet.py", "models/notes.txt", "report/page.py", "stages/train.py"):
        path = tmp_path / "pipeline" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("1")
    (tmp_path / "dvc.yaml").write_text("stages: {train: {deps: [data/x, pipeline/models/, pipeline/stages/train.py]}}")
    before = code_digest("train", tmp_path)
    for file, changed in (("models/notes.txt", False), ("report/page.py", False), ("models/unet.py", True)):
        (tmp_path / "pipeline" / file).write_text("2")
        assert (code_digest("train", tmp_path) != before) == changed


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
