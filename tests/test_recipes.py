"""Every recipe end to end on a tiny sample, alone and mixed, from folds to a checked submission and kept results."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from ruamel.yaml import YAML

from pipeline.config import Params, SmpUNetConfig, UNetConfig, read_params
from pipeline.errors import CarvanaError
from pipeline.recipes import apply_overlay, apply_recipe, recipe_names
from pipeline.report import recipe_results
from pipeline.report.recipe_results import keep_results, show_results
from pipeline.stages import download, ensemble, evaluate, folds, predict, train
from pipeline.submission.validation import validate_submission
from tests import ROOT

RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))

SMALLER: dict[str, list[int]] = {"native-r34": [96, 160], "carvana": [96, 160], "classic-512": [128, 128]}
"""What a net of some recipes sees here, as a CPU would take hours at its own size."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, tiny_sample: Path) -> Path:
    """A project whose data are in."""
    folder = tmp_path_factory.mktemp("recipes") / "project"
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    shutil.copyfile(ROOT / "params.yaml", folder / "params.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        apply_overlay(
            {
                "data": {"directory": str(tiny_sample)},
                "folds": {"count": 2, "active": [0], "holdout_cars": 1},
                "predict": {"tta": {split: ["identity"] for split in ("oof", "holdout", "test")}},
                "hardware": {"device": "cpu", "workers": 0},
            }
        )
        download.run(read_params())
    return folder


@pytest.fixture
def project(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    shutil.copytree(prepared, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    # The stages run here without DVC, which therefore knows nothing of them.
    monkeypatch.setattr(recipe_results, "_check_up_to_date", lambda: None)
    yield tmp_path / "project"


def apply(name: str) -> None:
    """Apply a recipe as users do, but for what needs a GPU, a network, Kaggle or hours."""
    before = read_params()
    apply_recipe(name)
    model = read_params().models.active[0]
    spec = read_params().models.specs[model]
    changed: dict[str, Any] = spec.model_dump(mode="json", exclude_unset=True)
    changed["train"] = dict(spec.train) | {"epochs": 1, "batch_size": 4}
    changed["input"] = dict(spec.input) | ({"size": SMALLER[name]} if name in SMALLER else {})
    if changed["architecture"] == "smp_unet":
        changed["encoder_weights"] = None
    kept = {section: getattr(before, section).model_dump(mode="json") for section in ("data", "folds", "hardware")}
    kept["data"]["on_corrupt"] = read_params().data.on_corrupt
    views = {"tta": before.predict.tta.model_dump(mode="json")}
    apply_overlay({"models": {"specs": {model: changed}}, "predict": views, **kept})


def run_all() -> Params:
    params = read_params()
    folds.run(params)
    for model in params.models.active:
        for fold in params.folds.active:
            train.run(params, model, fold)
            for split in ("oof", "holdout", "test"):
                predict.run(params, model, fold, split)
    evaluate.run(params)
    ensemble.run(params)
    return params


def leaves(tree: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every setting with the names that lead to it; the parts of a loss are one."""
    for name, value in tree.items():
        if isinstance(value, dict) and name != "losses":
            yield from leaves(value, (*path, name))
        else:
            yield (*path, name), value


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_holds_only_what_differs_from_the_defaults(name: str) -> None:
    recipe, params = (YAML(typ="safe").load(ROOT / file) for file in (f"recipes/{name}.yaml", "params.yaml"))
    defaults = dict(leaves(params))
    for path, value in leaves(recipe):
        default = defaults.get(path)
        if path[:2] == ("models", "specs"):
            _, _, model, *setting = path
            spec = UNetConfig if recipe["models"]["specs"][model]["architecture"] == "unet" else SmpUNetConfig
            field = spec.model_fields.get(setting[0])
            default = defaults.get(tuple(setting)) if len(setting) > 1 else field and field.default
        assert value != (list(default) if isinstance(default, tuple) else default), path


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "carvana" else [pytest.mark.long]) for name in RECIPES]
)
def test_a_recipe_runs_to_a_checked_submission(project: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    apply(name)
    params = run_all()
    described = json.loads(Path("submissions/submission.json").read_text())
    assert described["nets"] == [f"{params.models.active[0]}/0"]
    assert described["content_sha256"] == validate_submission(Path("submissions/submission.csv.gz"), None).sha256
    images = pd.read_csv("reports/images.csv")
    assert images.groupby("split").size().to_dict() == {"holdout": 16, "oof": 32}
    assert images["dice"].between(0, 1).all()
    keep_results()
    show_results(None)
    model = params.models.active[0]
    mark = " *" if params.models.specs[model].architecture == "smp_unet" else ""  # no weights were fetched for it here
    assert f"\n{model}{mark}  " in capsys.readouterr().out


@pytest.mark.slow
def test_a_grey_net_and_an_encoder_net_of_two_recipes_make_one_ensemble(project: Path) -> None:
    apply("grey-128")
    apply("mobilenetv2-128")
    apply_overlay({"models": {"active": ["grey-128", "mobilenetv2-128"]}})
    run_all()
    assert json.loads(Path("submissions/submission.json").read_text())["nets"] == ["grey-128/0", "mobilenetv2-128/0"]
    images = pd.read_csv("reports/images.csv")
    assert set(images["model"]) == {"grey-128", "mobilenetv2-128", "ensemble"}
    keep_results()
    (file,) = Path("docs/results").glob("grey-128+mobilenetv2-128@real-4-*.json")
    kept = json.loads(file.read_text())
    rows = images[(images["split"] == "oof") & (images["model"] == "ensemble")]
    assert kept["oof"]["dice"] == pytest.approx(rows["dice"].mean(), abs=1e-6)


def test_every_recipe_says_in_its_head_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    names = recipe_names()
    assert set(names) >= {
        "mobilenetv2-128",
        "classic-512",
        "classic-160x240",
        "grey-128",
        "colab-amp",
        "native-r34",
        "carvana",
    }
    assert all(names.values())


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_holds_only_what_differs(project: Path, name: str) -> None:
    """A setting of its net that says what holds anyway would hide a later change of the default."""
    default = read_params()
    apply_recipe(name)
    params = read_params()
    model = params.models.active[0]
    spec = params.models.specs[model]
    for section, changes in (("input", spec.input), ("train", spec.train)):
        held = getattr(default, section).model_dump(mode="json")
        same = [key for key, value in changes.items() if held[key] == value]
        assert not same, f"{name}: {section}.{same}"


def test_a_recipe_on_another_one(project: Path) -> None:
    (project / "recipes/mine.yaml").write_text("# Mine.\nrecipe: grey-128\nfolds: {seed: 3}\n")
    apply_recipe("mine")
    params = read_params()
    assert (params.models.active, params.folds.seed) == (("grey-128",), 3)


def test_a_recipe_on_one_that_is_not_there(project: Path) -> None:
    (project / "recipes/mine.yaml").write_text("# Mine.\nrecipe: lost\n")
    with pytest.raises(CarvanaError, match="lost"):
        apply_recipe("mine")


def test_a_recipe_on_itself(project: Path) -> None:
    (project / "recipes/mine.yaml").write_text("# Mine.\nrecipe: yours\n")
    (project / "recipes/yours.yaml").write_text("# Yours.\nrecipe: mine\n")
    with pytest.raises(CarvanaError, match=r"mine.*yours.*mine"):
        apply_recipe("mine")


def test_outside_a_project_there_is_no_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for call in (recipe_names, lambda: apply_recipe("grey-128")):
        with pytest.raises(CarvanaError, match="recipes"):
            call()


def test_results_of_nothing(project: Path) -> None:
    with pytest.raises(CarvanaError, match="carvana results --keep"):
        show_results(None)
