"""Settings: validation, error messages, resolved models, and recipes."""

import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from ruamel.yaml import YAML

from pipeline.config import Params, parse_params, read_params
from pipeline.errors import CarvanaError
from pipeline.recipes import apply_recipe, recipe_names
from tests import ROOT

RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))

DELETED = object()
SPECS: dict[str, Any] = {
    "classic": {"architecture": "unet", "widths": [8, 16, 32]},
    "encoder": {"architecture": "smp_unet", "encoder": "resnet34", "encoder_weights": None},
    "small": {"architecture": "unet", "widths": [8, 16, 32], "input": {"size": [64, 96]}},
}
"""Specs of both architectures."""


@pytest.fixture(scope="module")
def shipped() -> dict[str, Any]:
    tree: dict[str, Any] = YAML(typ="safe").load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    return tree


@pytest.fixture
def tree(shipped: dict[str, Any]) -> dict[str, Any]:
    """The shipped settings with folds and models that these tests know."""
    tree = deepcopy(shipped)
    tree["folds"] |= {"count": 3, "active": [0, 1, 2]}
    tree["models"] = {"active": ["small", "encoder"], "specs": deepcopy(SPECS)}
    tree["predict"]["tta"] = {split: ["identity"] for split in ("oof", "holdout", "test")}
    return tree


def put(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        tree = tree[section]
    if value is DELETED:
        del tree[last]
    else:
        tree[last] = value


# ---------------------------------------------------------------- the file that is shipped


def test_the_shipped_settings_parse() -> None:
    assert read_params(ROOT / "params.yaml").models.active


def test_no_default_is_hidden(shipped: dict[str, Any]) -> None:
    """Whatever can be set stands in params.yaml, but for the specs of models, which hold what differs."""
    assert list(missing_keys(Params, shipped)) == []


def missing_keys(kind: type[BaseModel], tree: dict[str, Any], prefix: str = "") -> list[str]:
    missing = [f"{prefix}{name}" for name in kind.model_fields if name not in tree]
    for name, field in kind.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel) and name in tree:
            missing += missing_keys(field.annotation, tree[name], f"{prefix}{name}.")
    return missing


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("key", "value", "names"),
    [
        # unknown and missing keys
        ("trian", {}, "trian"),
        ("train.lrr", 0.1, "train.lrr"),
        ("data.sample.angles", 8, "data.sample.angles"),
        ("train.augment.vflip", 0.5, "train.augment.vflip"),
        # old names
        ("machine", {}, "machine hardware"),
        ("train.ema", 0.9, "train.ema ema_decay"),
        ("predict.weights", "last", "predict.weights checkpoint"),
        ("models.specs.small.train", {"clip": 1}, "train.clip gradient_clip_norm"),
        ("train.lr", DELETED, "train.lr"),
        ("predict", DELETED, "predict"),
        # values of another type
        ("folds.count", "3", "folds.count '3'"),
        ("folds.seed", True, "folds.seed True"),
        ("train.epochs", 24.0, "train.epochs 24.0"),
        ("train.channels_last", "yes", "train.channels_last 'yes'"),
        ("train.lr", "1e-3", "train.lr '1e-3'"),
        ("train", None, "train None"),
        ("models.active", "small", "models.active 'small'"),
        # values out of range
        ("train.lr", -1, "train.lr -1"),
        ("train.lr", float("nan"), "train.lr nan"),
        ("ensemble.threshold", 1, "ensemble.threshold 1"),
        ("hardware.device", "tpu", "hardware.device 'tpu'"),
        ("data.source", "web", "data.source 'web'"),
        ("data.source", "directory", "data.source data.directory"),
        ("train.losses", {}, "train.losses {}"),
        ("train.losses", {"bcee": 1.0}, "train.losses.bcee 'bcee'"),
        # what an ablation can't try
        ("ablation.views", [["identity", "scale:2"]], "ablation.views scale:2 predict.tta.oof"),
        ("ablation.models", [["small", "large"]], "ablation.models large models.active"),
        ("ablation.folds", [[0], [0, 9]], "ablation.folds 9 folds.active"),
        ("ablation.weights", [{"large": 2}], "ablation.weights large models.active"),
        ("ablation.weights", [{"small": 0}], "ablation.weights.0.small 0"),
        ("ablation.folds", [[0, 0]], "ablation.folds.0 0"),
        ("ablation.folds", [], "ablation.folds []"),
        ("ablation.tolerance", -0.1, "ablation.tolerance -0.1"),
        ("ablation.merge", ["mean"], "ablation.merge.0 'mean'"),
        ("ablation.threshold", [0.5, 1], "ablation.threshold.1 1"),
        ("ablation.postprocess", [["smooth"]], "ablation.postprocess.0.0 'smooth'"),
        # folds and models that are not there
        ("folds.active", [0, 3], "folds.active 3"),
        ("folds.active", [0, -1], "folds.active -1"),
        ("folds.active", [0, 0], "folds.active 0"),
        ("folds.active", [], "folds.active []"),
        ("models.active", ["smal"], "models.active smal models.specs"),
        ("models.active", [], "models.active []"),
        ("ensemble.models", ["classic"], "ensemble.models classic models.active"),
        ("ensemble.folds", [3], "ensemble.folds 3 folds.active"),
        ("ensemble.weights", {"classic": 2}, "ensemble.weights classic models.active"),
        ("models.active", ["small", "small"], "models.active small"),
        ("ensemble.folds", [0, 0], "ensemble.folds 0"),
        ("ensemble.models", [], "ensemble.models []"),
        ("ensemble.weights", {"small": 10**7}, "ensemble.weights.small 10000000"),
        ("predict.tta.test", ["identity", "identity"], "predict.tta.test identity"),
        ("folds.seed", -1, "folds.seed -1"),
        ("train.seed", -1, "train.seed -1"),
        # views
        ("predict.tta.test", ["vflip"], "predict.tta.test.0 'vflip'"),
        ("predict.tta.oof", ["scale:x"], "predict.tta.oof.0 'scale:x'"),
        ("predict.tta.test", [], "predict.tta.test []"),
        ("predict.tta.test", ["identity", "hflip"], "predict.tta.test hflip predict.tta.oof"),
        # sizes that a net can't take
        ("input.size", [100, 240], "models.specs.encoder input.size 32"),
        ("input.size", [160], "input.size"),
        ("input.size", "big", "input.size 'big'"),
        ("input.size", [160, "a"], "input.size.1 'a'"),
        ("train.crop", [62, 64], "models.specs.small train.crop 4"),
        ("train.crop", [640, 640], "train.crop 640"),
        # specs, whose nets' kinds are no part of a key
        ("models.specs.classic.widths", "x", "models.specs.classic.widths 'x'"),
        ("models.specs.classic.wid", 1, "models.specs.classic.wid"),
        ("models.specs.encoder.encoder", [3], "models.specs.encoder.encoder"),
        ("models.specs.small.architecture", "vit", "models.specs.small"),
        ("models.specs.small", 3, "models.specs.small 3"),
        # overrides within a spec
        ("models.specs.small.train", {"lrr": 1}, "models.specs.small.train.lrr"),
        ("models.specs.small.train", {"lr": "x"}, "models.specs.small.train.lr 'x'"),
        ("models.specs.small.train", {"augment": {"flip": 1}}, "models.specs.small.train.augment.flip"),
        ("models.specs.small.train", 3, "models.specs.small.train 3"),
        ("models.specs.small.input", {"size": [62, 64]}, "models.specs.small input.size 62"),
    ],
)
def test_invalid_settings_name_their_key(tree: dict[str, Any], key: str, value: Any, names: str) -> None:
    parse_params(tree)
    put(tree, key, value)
    with pytest.raises(CarvanaError) as caught:
        parse_params(tree)
    assert all(name in str(caught.value) for name in names.split())
    assert "[key]" not in str(caught.value) and "tuple[" not in str(caught.value)


def test_all_invalid_settings_are_listed(tree: dict[str, Any]) -> None:
    put(tree, "train.lrr", 1)
    put(tree, "folds.count", "3")
    with pytest.raises(CarvanaError) as caught:
        parse_params(tree)
    assert len(str(caught.value).splitlines()) == 2


def test_a_list_with_one_bad_item_is_not_also_called_empty(tree: dict[str, Any]) -> None:
    put(tree, "predict.tta.test", ["vflip"])
    with pytest.raises(CarvanaError) as caught:
        parse_params(tree)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (b"train: [", "YAML"),
        (b"train: {}\ntrain: {}", "YAML"),
        (b"\xff", "YAML"),
        (b"", "git checkout"),
        (b"- 1", "git checkout"),
        (b"folds: 2020-01-01", "folds .*2020-01-01"),
    ],
)
def test_unreadable_params_file_is_named(tmp_path: Path, text: bytes, part: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(text)
    with pytest.raises(CarvanaError, match=rf"params\.yaml.*{part}"):
        read_params(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CarvanaError, match=r"params\.yaml"):
        read_params(tmp_path / "params.yaml")


# ---------------------------------------------------------------- what comes out


def test_a_spec_overrides_what_it_names_and_nothing_else(tree: dict[str, Any]) -> None:
    tree["models"]["specs"]["small"]["train"] = {"lr": 0.5, "losses": {"lovasz": 1.0}, "augment": {"hflip": 0.0}}
    params = parse_params(tree)
    resolved, plain = params.resolve_model("small"), params.resolve_model("classic")
    assert (plain.input, plain.train) == (params.input, params.train)
    assert resolved.input.size == (64, 96)
    assert resolved.input.channels == params.input.channels
    assert (resolved.train.lr, resolved.train.losses) == (0.5, {"lovasz": 1.0})
    assert resolved.train.augment == params.train.augment.model_copy(update={"hflip": 0.0})
    assert resolved.train.epochs == params.train.epochs


def test_a_model_that_does_not_exist_is_named(tree: dict[str, Any]) -> None:
    with pytest.raises(CarvanaError, match=r"smal\b.*small"):
        parse_params(tree).resolve_model("smal")


def test_a_size_need_not_suit_a_net_that_is_not_active(tree: dict[str, Any]) -> None:
    tree["models"]["specs"]["deep"] = {"architecture": "unet", "widths": [4] * 8}
    parse_params(tree)
    tree["models"]["active"] = ["small", "deep"]
    with pytest.raises(CarvanaError, match=r"models\.specs\.deep.*input\.size.*128"):
        parse_params(tree)


def test_nets_of_the_ensemble_are_all_active_ones_or_those_chosen(tree: dict[str, Any]) -> None:
    tree["models"]["active"] = ["small", "classic"]
    assert len(parse_params(tree).ensemble_members()) == 6
    tree["ensemble"] |= {"models": ["classic"], "folds": [2, 0]}
    assert parse_params(tree).ensemble_members() == [("classic", 2), ("classic", 0)]


# ---------------------------------------------------------------- recipes


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with copies of params.yaml and recipes/."""
    shutil.copy(ROOT / "params.yaml", tmp_path)
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def comments(path: Path) -> list[str]:
    return [line.partition("#")[2] for line in path.read_text(encoding="utf-8").splitlines() if "#" in line]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_parses_keeps_comments_and_is_done_at_once(project: Path, name: str) -> None:
    path = project / "params.yaml"
    before = comments(path)
    changes = apply_recipe(name)
    after = path.read_bytes()
    assert changes
    assert comments(path) == before
    read_params(path)
    assert apply_recipe(name) == []
    assert path.read_bytes() == after


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_changes_the_lines_that_it_says_and_no_others(project: Path, name: str) -> None:
    def code(text: str) -> list[str]:
        return [line.partition("#")[0].rstrip() for line in text.splitlines()]

    before = code((project / "params.yaml").read_text(encoding="utf-8"))
    changed_keys = {change.partition(":")[0].rpartition(".")[2] for change in apply_recipe(name)}
    after = code((project / "params.yaml").read_text(encoding="utf-8"))
    for line in set(before) - set(after):
        assert line.partition(":")[0].strip() in changed_keys, line


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_in_its_first_line_what_it_is_for(project: Path, name: str) -> None:
    assert len(recipe_names()[name]) > 20


def test_a_recipe_holds_only_what_differs(project: Path) -> None:
    (project / "recipes" / "few.yaml").write_text("# few\ntrain:\n  epochs: 99\n  losses: {lovasz: 1.0}\n")
    before = read_params()
    changes = apply_recipe("few")
    assert changes == [
        f"train.epochs: {before.train.epochs} -> 99",
        f"train.losses: {dict(before.train.losses)} -> {{'lovasz': 1.0}}",
    ]
    changed = before.train.model_copy(update={"epochs": 99, "losses": {"lovasz": 1.0}})
    assert read_params() == before.model_copy(update={"train": changed})


@pytest.mark.parametrize(
    ("recipe", "names"),
    [
        ("train: {epochs: many}", "train.epochs 'many'"),
        ("folds: {active: [99]}", "folds.active 99"),
        ("trian: {epochs: 3}", "trian"),
        ("train: 3", "train 3"),
        ("train: [", "bad.yaml YAML"),
        ("# nothing", "bad.yaml"),
    ],
)
def test_a_recipe_that_fails_changes_nothing(project: Path, recipe: str, names: str) -> None:
    before = (project / "params.yaml").read_bytes()
    (project / "recipes" / "bad.yaml").write_text(recipe)
    with pytest.raises(CarvanaError) as caught:
        apply_recipe("bad")
    assert all(name in str(caught.value) for name in names.split())
    assert (project / "params.yaml").read_bytes() == before


def test_the_full_competition_is_augmented(project: Path) -> None:
    apply_recipe("carvana")
    augment = read_params().resolve_model("native-r34").train.augment
    assert all(getattr(augment, name) > 0 for name in type(augment).model_fields)


def test_a_recipe_leaves_the_data_where_the_user_has_them(project: Path) -> None:
    path = project / "params.yaml"
    path.write_text(path.read_text().replace("directory: null", "directory: /mine"))
    apply_recipe("carvana")
    assert read_params().data.directory == "/mine"
    assert not read_params().data.is_from_kaggle


def test_an_unknown_recipe_is_answered_with_those_there_are(project: Path) -> None:
    with pytest.raises(CarvanaError, match=r"carvan\b.*carvana"):
        apply_recipe("carvan")


def test_a_recipe_outside_the_project_says_where_to_go(project: Path) -> None:
    (project / "params.yaml").unlink()
    with pytest.raises(CarvanaError, match=r"params\.yaml"):
        apply_recipe("carvana")


@pytest.mark.parametrize(
    ("key", "value", "read"),
    [("train.precision", 32, "32"), ("predict.precision", 16, "16"), ("train.init_checkpoint", 7, "7")],
)
def test_a_number_is_read_as_text_where_text_is_meant(tree: dict[str, Any], key: str, value: Any, read: str) -> None:
    section, name = key.split(".")
    tree[section][name] = value
    assert getattr(getattr(parse_params(tree), section), name) == read


def test_models_may_have_numbers_as_names(tree: dict[str, Any]) -> None:
    tree["models"]["specs"][34] = tree["models"]["specs"].pop("small")
    tree["models"]["active"] = [34]
    assert parse_params(tree).models.active == ("34",)


@pytest.mark.parametrize("name", ["1e3", "2020-01-01", "true", "null", "3.4"])
def test_names_that_yaml_does_not_read_as_text_need_quotes(tmp_path: Path, name: str) -> None:
    text = (ROOT / "params.yaml").read_text(encoding="utf-8").replace("    small: ", f"    {name}: ")
    (tmp_path / "params.yaml").write_text(text.replace("active: [small]", f"active: [{name}]"))
    with pytest.raises(CarvanaError, match=r"models\..*quotes"):
        read_params(tmp_path / "params.yaml")
    if name not in ("3.4", "null"):  # not a name of a folder, or no name
        quoted = text.replace(f"    {name}: ", f'    "{name}": ').replace("active: [small]", f'active: ["{name}"]')
        (tmp_path / "params.yaml").write_text(quoted)
        assert read_params(tmp_path / "params.yaml").models.active == (name,)


@pytest.mark.parametrize(
    ("key", "written", "names"),
    [
        ("models.active", "[1e3]", r"models\.active.*quotes"),
        ("models.specs.encoder.encoder", "1.5", r"encoder.*1\.5.*quotes"),
        ("data.directory", "2020-01-01", r"data\.directory.*2020-01-01.*quotes"),
        ("train.init_checkpoint", "true", r"train\.init_checkpoint.*quotes"),
        ("train.channels_last", "off", r"train\.channels_last.*false"),
        ("train.channels_last", "yes", r"train\.channels_last.*true"),
        ("train.ema_decay", "none", r"train\.ema_decay.*null"),
        ("train.crop", "off", r"train\.crop.*null"),
        ("train.seed", '"7"', r"train\.seed.*'7'.*integer"),
        ("train.epochs", "1e2", r"train\.epochs.*100\.0.*integer"),
        ("train.precision", "32.0", r"train\.precision.*32\.0"),
        ("train.schedule", "off", r"train\.schedule.*'off'.*constant"),
    ],
)
def test_words_that_yaml_reads_otherwise(tree: dict[str, Any], key: str, written: str, names: str) -> None:
    put(tree, key, YAML(typ="safe").load(written))
    with pytest.raises(CarvanaError, match=names):
        parse_params(tree)
