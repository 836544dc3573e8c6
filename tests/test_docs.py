"""README and docs: generated parts are current, links and pictures exist, commands are ones that the program takes."""

import importlib.util
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
from ruamel.yaml import YAML

from pipeline import cli
from pipeline.report.recipe_results import show_results
from tests import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)|<(?:img|a)[^>]*(?:src|href)=\"([^\"]+)\"")
CODE_BLOCK = re.compile(r"^( *)```.*?^\1```", flags=re.M | re.S)

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def make_reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_reference", ROOT / "docs" / "make_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_parts_are_current(make_reference: ModuleType) -> None:
    stale = [page.name for page, text in make_reference.pages().items() if read(page) != text]
    assert not stale, "run 'make docs'"


def test_the_table_of_results_is_current(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    show_results(tmp_path / "results.md")
    made, kept = (
        read(page).partition("`docs/results/`.")[2] for page in (tmp_path / "results.md", ROOT / "docs/results.md")
    )
    assert made == kept, "run 'make docs'"


def test_the_commands_table_names_every_command_and_option(make_reference: ModuleType) -> None:
    text = "\n".join(make_reference.commands())
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == ["Run", "Inspect", "Kaggle", "Nets"]
    for name, command in leaf_commands():
        assert f"### `carvana {name}`" in text
        for option in (parameter for parameter in command.params if parameter.param_type_name == "option"):
            assert option.opts[-1] in text


def test_the_settings_table_names_the_stages_that_read_a_setting(make_reference: ModuleType) -> None:
    assert make_reference.stages_of("train.augment.hflip") == "train"
    assert make_reference.stages_of("folds.seed") == "folds"
    assert make_reference.stages_of("predict.tta.oof") == "predict, ablate"
    assert make_reference.stages_of("hardware.device") == "-"
    assert make_reference.followers(["ablate"]) == ["report"]
    assert "ensemble" in make_reference.followers(["train"])


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", CODE_BLOCK.sub("", read(page)), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_relative_links_and_pictures_exist(page: Path) -> None:
    for groups in LINK.findall(CODE_BLOCK.sub("", read(page))):
        target = groups[0] or groups[1]
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), target
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), target


@every_page
def test_files_of_the_code_that_a_page_names_exist(page: Path) -> None:
    """Those of the repository, not those that a run writes; placeholders such as NAME aside."""
    for name in re.findall(r"`((?:pipeline|tests|docs|recipes|benchmarks)/[\w./-]*)`", read(page)):
        if not re.search(r"[A-Z]{4}", name) and "results/" not in name:
            assert (ROOT / name).exists(), name
    if page.name == "design.md":
        for name in re.findall(r"`((?:\w+/)?\w+\.py)`", read(page)):
            assert list((ROOT / "pipeline").rglob(name)) or (ROOT / name).exists(), name


def commands_of(page: Path) -> Iterator[str]:
    """Lines of code blocks, and code in sentences, that run ``carvana`` or ``make``."""
    for block in CODE_BLOCK.finditer(read(page)):
        for line in block[0].splitlines():
            yield line.strip().partition("  #")[0].strip()
    yield from (" ".join(code.split()) for code in re.findall(r"`([^`]+)`", CODE_BLOCK.sub("", read(page))))


def leaf_commands() -> Iterator[tuple[str, Any]]:
    program: Any = typer.main.get_command(cli.app)
    for name, command in program.commands.items():
        parts = getattr(command, "commands", None)
        yield from ((f"{name} {part}", inner) for part, inner in parts.items()) if parts else [(name, command)]


@every_page
def test_commands_are_taken(page: Path) -> None:
    """Each one's name and options; those with placeholders such as NAME or [SCORE] by name only."""
    known = dict(leaf_commands())
    targets = set(re.findall(r"^([a-z-]+):", read(ROOT / "Makefile"), flags=re.M))
    for line in commands_of(page):
        program, *words = shlex.split(line) if line.startswith(("carvana ", "make ")) else [""]
        if program == "make" and re.fullmatch(r"[a-z-]+", words[0]):
            assert words[0] in targets, line
        if program != "carvana" or words[0].startswith("-") or words[0].isupper() or page.name == "CHANGELOG.md":
            continue
        name = " ".join(words[:2]) if words[0] == "stage" else words[0]
        if name in ("stage", "stage NAME", "stage --help"):
            continue
        assert name in known, line
        given = [word for word in cli._repeat_options(words[len(name.split()) :]) if word != "--debug"]
        if not any(re.search(r"[A-Z]{4}|[\[\]|]", word) for word in given) and given:
            known[name].make_context(name, given)


def test_one_version() -> None:
    version = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]["version"]
    assert YAML(typ="safe").load(read(ROOT / "CITATION.cff"))["version"] == version
    assert re.search(r"^## (\S+)", read(ROOT / "CHANGELOG.md"), flags=re.M)[1] == version  # type: ignore[index]


def test_pictures_are_small() -> None:
    large = [path.name for path in (ROOT / "docs" / "images").iterdir() if path.stat().st_size > 400_000]
    assert not large


def test_the_readme_is_short_and_shows_pictures() -> None:
    text = read(ROOT / "README.md")
    lines = text.splitlines()
    assert len(lines) <= 180
    assert len(text.split()) <= 1800
    assert max(map(len, lines)) <= 120
    assert len(re.findall(r"!\[[^\]]*\]\(docs/images/", text)) >= 3


def test_the_readme_quotes_params_yaml() -> None:
    excerpt = re.search(r"^```yaml\n(.*?)^```", read(ROOT / "README.md"), flags=re.M | re.S)
    assert excerpt is not None
    load = YAML(typ="safe").load
    assert_part_of(load(excerpt[1]), load(read(ROOT / "params.yaml")), "params.yaml")


def assert_part_of(part: Any, whole: Any, where: str) -> None:
    if isinstance(part, dict):
        for key, value in part.items():
            assert_part_of(value, whole[key], f"{where}: {key}")
    else:
        assert part == whole, where
