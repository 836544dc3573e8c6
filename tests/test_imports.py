"""What a command must not load. Which package may import which is in pyproject.toml: see ``lint-imports``."""

from pathlib import Path

import pytest

from pipeline.competition.image_ids import format_image_id
from tests.import_probe import HEAVY_MODULES, loaded_modules


def test_cli_import_loads_no_heavy_module() -> None:
    assert loaded_modules("import pipeline.cli").isdisjoint(HEAVY_MODULES | {"numpy", "pandas", "cv2", "ruamel"})


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
    modules = loaded_modules(code, tmp_path)
    assert "numpy" in modules
    assert modules.isdisjoint(HEAVY_MODULES)


def test_settings_and_the_stages_without_nets_never_load_torch() -> None:
    stages = ("download", "folds", "initial_weights", "evaluate", "ensemble", "report")
    commands = "pipeline.repro, pipeline.report.experiments"
    modules = loaded_modules(
        f"import pipeline.recipes, {', '.join(f'pipeline.stages.{stage}' for stage in stages)}, {commands}"
    )
    assert "pandas" in modules
    assert modules.isdisjoint(HEAVY_MODULES)


def test_prediction_loads_neither_lightning_nor_albumentations() -> None:
    modules = loaded_modules("import pipeline.inference.torch_predictor")
    assert "torch" in modules
    assert modules.isdisjoint({"lightning", "albumentations"})
