"""The rules of the house: who may import whom, and what a command must not load."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.competition.image_ids import format_image_id
from pipeline.stages.code import imports

ROOT = Path(__file__).parents[1]
FILES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "pipeline").rglob("*.py"))

TOOLS = {"cores", "errors", "files", "places", "resume", "sections"}
"""Files beside the rooms that every room but ``competition`` may use."""

ROOMS = {"competition", "data", "kaggle_api", "learning", "ensembling", "reporting", "exporting", "serving", "app"}

MAY_IMPORT = {
    "competition": {"errors"},
    "data": {"competition"} | TOOLS,
    "kaggle_api": {"competition", "data"} | TOOLS,
    "learning": {"competition", "data"} | TOOLS,
    "ensembling": {"competition", "data"} | TOOLS,
    "reporting": {"competition", "data"} | TOOLS,
    "cores": set[str](),
    "errors": set[str](),
    "files": {"errors"},
    "places": set[str](),
    "resume": {"errors", "files"},
    "params": {"data", "ensembling", "learning", "errors", "sections"},
    "sections": set[str](),
    "recipes": {"errors", "files", "params"},
    "exporting": {"competition", "learning", "ensembling"} | TOOLS,
    "serving": {"competition", "learning", "exporting", "ensembling"} | TOOLS,
    "app": (ROOMS - {"app", "exporting"}) | {"params", "stages"} | TOOLS,
    "stages": {"competition", "data", "learning", "ensembling", "reporting", "kaggle_api", "params"} | TOOLS,
    "commands": (ROOMS - {"app"}) | {"params", "recipes", "stages"} | TOOLS,
    "cli": {"competition", "kaggle_api", "params", "recipes", "stages", "commands"} | TOOLS,
}
"""Rooms of ``pipeline/``, and single files there, with those that they may import."""

ONLY = {
    "torch": {"learning", "exporting"},
    "torchvision": {"learning"},
    "timm": {"learning"},
    "segmentation_models_pytorch": {"learning"},
    "safetensors": {"learning"},
    "lightning": {"learning/training.py", "learning/clock.py", "learning/logbook.py"},
    "albumentations": {"learning/dataset.py"},
    "tensorboard": {"learning/logbook.py", "commands/tensorboard.py"},
    "onnx": {"exporting"},
    "onnxscript": {"exporting"},
    "onnxruntime": {"exporting"},
    "streamlit": {"app"},
    "altair": {"reporting", "app"},
    "vl_convert": {"reporting"},
    "jinja2": {"reporting", "exporting"},
    "kaggle": {"kaggle_api"},
    "kagglesdk": {"kaggle_api"},
}
"""Libraries that only these rooms or files may import."""


def room_of(file: str) -> str:
    return file.removeprefix("pipeline/").split("/")[0].removesuffix(".py")


def libraries(file: str) -> set[str]:
    """The top-level names that a file imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports by a relative name"
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("file", FILES)
def test_imports_run_one_way(file: str) -> None:
    room = room_of(file)
    if room == "__init__":
        assert not imports(file)
        return
    imported = {room_of(other) for other in imports(file)} - {room, "__init__"}
    assert imported <= MAY_IMPORT[room], f"{file} imports {sorted(imported - MAY_IMPORT[room])}"


@pytest.mark.parametrize("library", ONLY)
def test_a_library_stays_in_its_room(library: str) -> None:
    for file in FILES:
        place = file.removeprefix("pipeline/")
        if library in libraries(file):
            assert place in ONLY[library] or place.split("/")[0] in ONLY[library], f"{file} imports {library}"


def test_the_rules_of_the_game_need_python_and_numpy_only() -> None:
    for file in FILES:
        if room_of(file) == "competition":
            assert libraries(file) <= {"numpy", "pipeline"} | sys.stdlib_module_names, file


def test_the_packages_own_files_import_nothing() -> None:
    """So that to enter one file of a room is not to enter all of them."""
    for file in FILES:
        if file.endswith("/__init__.py"):
            assert not imports(file), file


def loaded(code: str, folder: Path = ROOT) -> set[str]:
    """The top-level modules that a fresh Python has loaded after some code."""
    code += "\nimport sys; print('loaded', *{name.split('.')[0] for name in sys.modules})"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False, timeout=120
    )
    assert run.returncode == 0, run.stderr
    return set(run.stdout.splitlines()[-1].split()[1:])


HEAVY = {"torch", "lightning", "albumentations", "torchvision", "timm", "segmentation_models_pytorch"}


def test_the_command_line_itself_loads_next_to_nothing() -> None:
    assert loaded("import pipeline.cli").isdisjoint(HEAVY | {"numpy", "pydantic", "pandas", "cv2", "ruamel"})


@pytest.mark.parametrize("command", ["check", "score"])
def test_checking_and_scoring_a_csv_never_load_torch(tmp_path: Path, command: str) -> None:
    (tmp_path / "a.csv").write_text(f"img,rle_mask\n{format_image_id('00087a6bd4dc', 1)}.jpg,1 5\n")
    arguments = ["check", "a.csv"] if command == "check" else ["score", "a.csv", "--truth", "a.csv"]
    code = f"""
from pipeline.cli import main
try:
    main({arguments})
except SystemExit as end:
    assert not end.code, end
"""
    modules = loaded(code, tmp_path)
    assert "numpy" in modules
    assert modules.isdisjoint(HEAVY)


def test_settings_and_the_stages_without_nets_never_load_torch() -> None:
    stages = ("download", "folds", "evaluate", "ensemble", "report")
    commands = "pipeline.repro, pipeline.report.experiments"
    modules = loaded(
        f"import pipeline.recipes, {', '.join(f'pipeline.stages.{stage}' for stage in stages)}, {commands}"
    )
    assert "pandas" in modules
    assert modules.isdisjoint(HEAVY)


def test_prediction_loads_neither_lightning_nor_albumentations() -> None:
    modules = loaded("import pipeline.inference.torch_predictor")
    assert "torch" in modules
    assert modules.isdisjoint({"lightning", "albumentations"})
