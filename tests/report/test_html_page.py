"""reports/index.html: content, self-containment, charts, sentences and images."""

import base64
import json
import re
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from pipeline.competition.image_ids import HEIGHT, WIDTH
from pipeline.config import EnsembleSettings
from pipeline.data.competition_data import read_car_makes
from pipeline.ensemble.evaluation import EnsembleContext, MemberPredictions
from pipeline.errors import CarvanaError
from pipeline.inference.prediction_store import PredictionStore, PredictJob, write_predictions
from pipeline.inference.probability_map import CompressedMap, ProbabilityMap
from pipeline.report import ablation_text, charts, overlays, summary, tables
from pipeline.report.html_page import ReportData, build_comparison, render_page
from pipeline.report.overlays import FALSE_NEGATIVE, FALSE_POSITIVE, TRUTH, CropBox, Figure, FigureImage
from tests.fakes.fake_maps import as_maps
from tests.fakes.fake_reports import FakeReports

FULL = FakeReports()
BARE = FakeReports(models=("small",), folds=(0,), cars=("0" * 12, "1" * 12), held_out=(), seconds=False)
"""One model, one fold, too few cars for intervals, no held-out car, nothing timed."""

MAKES = dict(zip((*FULL.cars, *FULL.held_out), ["Acura", "BMW", "Estrada Motors"] * 8, strict=True))
SUBMISSION: dict[str, Any] = {
    "rows": 64,
    "nets": [f"{model}/{fold}" for model in FULL.models for fold in FULL.folds],
    "views": ["identity", "hflip"],
    "postprocess": [],
    "test": {"dice": 0.987654},
}
ALONE: dict[str, Any] = {"rows": 64, "nets": ["small/0"], "views": ["identity", "hflip"], "postprocess": []}


def report_data(reports: FakeReports, folder: Path, **changes: Any) -> ReportData:
    """The files of a run, written and read as the stages do."""
    parts = ("settings", "postprocess", "fold_subsets", "disagreement", "images")
    submission, read = changes.pop("submission", SUBMISSION), {}
    for name in parts:
        getattr(reports, name)().to_csv(folder / name, index=False, lineterminator="\n")
        read[name] = tables.read_table(folder / name)
    ablation = json.loads(json.dumps(reports.summary()))
    read["images"] = summary.rows_as_submitted(read["images"], submission)
    read["disagreement"] = summary.with_final_dice(read["disagreement"], read["images"])
    whole = ReportData(ablation, **read, curves=reports.curves(), submission=submission, makes=MAKES)
    return replace(whole, **changes)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> ReportData:
    return report_data(FULL, tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> ReportData:
    return report_data(BARE, tmp_path_factory.mktemp("bare"), submission=ALONE, makes={})


def box(top: int, bottom: int, left: int, right: int) -> NDArray[np.uint8]:
    mask_HW = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask_HW[top:bottom, left:right] = 1
    return mask_HW


GREY = np.full((HEIGHT, WIDTH, 3), 128, np.uint8)


def figure(title: str = "0123456789ab_01") -> Figure:
    return Figure(
        title, ["Dice 0.99000", "car 0123456789ab (Kia)"], [FigureImage("data:image/jpeg;base64,AA==", "errors", 4, 3)]
    )


class Document(HTMLParser):
    """Texts, ids and addresses of a page, scripts and styles apart."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.scripts: list[str] = []
        self.policy = ""
        self._within = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self._within = tag
        self.tags.append(tag)
        named = {name: value or "" for name, value in attributes}
        self.ids += [named["id"]] if "id" in named else []
        self.addresses += [named[name] for name in ("src", "href", "srcset", "data", "action") if name in named]
        if named.get("http-equiv") == "Content-Security-Policy":
            self.policy = named["content"]

    def handle_data(self, data: str) -> None:
        if self._within in ("script", "style"):
            self.scripts.append(data)
        elif data.strip():
            self.texts.append(" ".join(data.split()))

    def handle_endtag(self, tag: str) -> None:
        self._within = ""

    @property
    def text(self) -> str:
        return " ".join(self.texts)

    @property
    def specs(self) -> dict[str, Any]:
        (specs,) = [json.loads(script) for script in self.scripts if script.lstrip().startswith('{"chart-')]
        return specs


SECTIONS = ("ablation", "cost", "folds", "threshold", "changes", "training", "cars", "worst", "suspects")


class TestPage:
    def test_every_section_and_chart_is_there(self, full: ReportData) -> None:
        document = Document(render_page(full, [figure()], [figure()]))
        assert set(SECTIONS) <= set(document.ids)
        assert list(document.specs) == [
            *("chart-cost-out-of-fold", "chart-cost-held-out-cars", "chart-folds-held-out-cars"),
            *("chart-threshold-out-of-fold", "chart-threshold-held-out-cars"),
            *(
                "chart-training-validation-dice",
                "chart-training-training-loss",
                "chart-angle-by-angle",
                "chart-make-by-make",
            ),
        ]
        assert set(document.specs) <= set(document.ids)
        assert len(document.ids) == len(set(document.ids))
        assert document.tags.count("img") == 2
        for text in (
            "0.98765",
            "224 images of 14 cars",
            "160 images of 10 cars",
            "threshold 0.45",
            "Out of fold: post-processing, on 224 images of 14 cars",
            *(warning for split in ("oof", "holdout") for warning in full.ablation[split]["warnings"]),
            "at 14% of its cost.",
        ):
            assert text in document.text

    def test_prediction_grids_are_embedded_unchanged(self, full: ReportData) -> None:
        jpeg = cv2.imencode(".jpg", np.zeros((30, 40, 3), np.uint8))[1].tobytes()
        html = render_page(
            full,
            [],
            [],
            [
                overlays.prediction_grid_figure("small/0", 0.98765, jpeg),
                overlays.prediction_grid_figure("resnet18/0", 0.9, jpeg),
            ],
        )
        document = Document(html)
        assert document.tags.count("img") == 2
        assert document.addresses.count(f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}") == 2
        assert 'width="40" height="30" alt="small/0, ' in html
        assert "small/0 Dice 0.98765 on all its validation images" in document.text
        section = html.partition('<section id="training">')[2].partition("</section>")[0]
        for color, meaning in ((FALSE_NEGATIVE, "false negatives"), (FALSE_POSITIVE, "false positives")):
            assert f'style="background: rgb{color}"></span>{meaning}' in section
        assert "panel.jpg" not in Document(render_page(full, [], [])).text

    def test_page_makes_no_network_request(self, full: ReportData) -> None:
        html = render_page(full, [figure()], [figure()])
        document = Document(html)
        assert all(address.startswith(("data:image/", "#")) for address in document.addresses)
        assert {"link", "iframe", "object", "embed", "base"}.isdisjoint(document.tags)
        assert document.policy.startswith("default-src 'none'; img-src data:;")
        assert "unsafe-eval" not in document.policy
        style = html.partition("<style>")[2].partition("</style>")[0]
        assert "url(" not in style and "@import" not in style
        assert "$schema" not in json.dumps(document.specs) and "http" not in json.dumps(document.specs)
        assert len(html) < 1_500_000

    def test_the_current_setting_is_described_with_its_post_processing(self, full: ReportData) -> None:
        assert (
            "small and resnet18, folds 0 1 2, identity + hflip, mean of probabilities, threshold 0.5; 6 nets, 2.2 s "
            "and 12 forward passes per image" in Document(render_page(full, [], [])).text
        )
        postprocessed = replace(full, submission=SUBMISSION | {"postprocess": ["keep_largest", "fill_holes"]})
        assert (
            "threshold 0.5, post-processing keep_largest and fill_holes; 6 nets, 2.2 s"
            in Document(render_page(postprocessed, [], [])).text
        )

    def test_the_cost_of_the_submission_is_not_that_of_one_fold(self, full: ReportData) -> None:
        refused = full.ablation | {"holdout": {"skipped": "Too few."}}
        alone = replace(full, ablation=refused, settings=tables.rows_of_split(full.settings, "oof"))
        text = Document(render_page(alone, [], [])).text
        assert "folds 0 1 2, identity + hflip, mean of probabilities, threshold 0.5; 6 nets, 12 forward passes" in text

    def test_scores_are_those_after_the_steps_of_the_submission(self, full: ReportData) -> None:
        images = full.images.assign(dice=full.images["dice"] - 0.02)
        disagreement = summary.with_final_dice(full.disagreement, images)
        steps = SUBMISSION | {"postprocess": ["refine_edges"]}
        document = Document(
            render_page(replace(full, images=images, disagreement=disagreement, submission=steps), [], [])
        )
        out_of_fold = tables.rows_of_split(images, "oof")["dice"].mean()
        assert f"{out_of_fold:.5f}" in document.texts
        assert f"{tables.rows_of_split(full.images, 'oof')['dice'].mean():.5f}" not in document.texts
        assert document.text.count("before post-processing (refine_edges)") == 5
        assert "before post-processing" not in Document(render_page(full, [], [])).text
        angles = document.specs["chart-angle-by-angle"]
        assert max(point["median"] for point in values(angles, layers(angles)[1])) < 0.98

    def test_suspects_are_counted_and_warnings_shown(self, full: ReportData) -> None:
        first = full.disagreement.index < 5
        disagreement = full.disagreement.assign(
            **{
                name: full.disagreement[name].mask(first, 900 if name == "suspect" else 30)
                for name in ("suspect", "height", "width")
            }
        )
        text = Document(
            render_page(
                replace(full, disagreement=disagreement, warnings=["2 images were left out: a, b"]), [], [figure()]
            )
        ).text
        assert "5 of 384 images" in text
        assert "2 images were left out: a, b" in text

    def test_names_are_escaped_in_html(self, full: ReportData) -> None:
        evil = '</script><script>alert("x")</script><b>'
        disagreement = full.disagreement.assign(car=evil)
        makes = {evil: evil}
        refused = full.ablation | {"holdout": {"skipped": f"Not so: {evil}"}}
        html = render_page(replace(full, disagreement=disagreement, makes=makes, ablation=refused), [figure(evil)], [])
        assert evil not in html
        assert html.count("<script>alert") == 0
        assert evil in Document(html).text
        assert evil in json.dumps(Document(html).specs["chart-make-by-make"]).replace('\\"', '"')

    def test_page_of_a_minimal_run(self, bare: ReportData) -> None:
        document = Document(render_page(bare, [figure()], []))
        assert list(document.specs) == [
            *("chart-cost-out-of-fold", "chart-threshold-out-of-fold", "chart-training-validation-dice"),
            *("chart-training-training-loss", "chart-angle-by-angle"),
        ]
        for text in (
            bare.ablation["holdout"]["skipped"],
            bare.ablation["oof"]["no_interval"],
            "metadata.csv",
            "dvc repro --single-item --force report",
        ):
            assert text in document.text
        assert "Test cars" not in document.text and "95 % CI 0." not in document.text
        assert "forward passes per image" in json.dumps(document.specs["chart-cost-out-of-fold"])

    @pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
    def test_a_browser_draws_every_chart_and_asks_nobody(self, full: ReportData, tmp_path: Path) -> None:
        (tmp_path / "index.html").write_text(render_page(full, [], []), encoding="utf-8")
        arguments = (
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"),
            *("--disable-component-update", "--no-first-run", "--host-resolver-rules=MAP * ~NOTFOUND"),
            *(
                "--enable-logging=stderr",
                "--v=0",
                "--virtual-time-budget=20000",
                f"--user-data-dir={tmp_path / 'home'}",
            ),
            *("--window-size=1200,3000", "--dump-dom", f"file://{tmp_path / 'index.html'}"),
        )
        run = subprocess.run(["chromium", *arguments], capture_output=True, text=True, timeout=300, check=True)
        assert "CONSOLE" not in run.stderr, run.stderr
        assert re.search(r'<html lang="en" data-drawn="9"', run.stdout)
        assert "could not be drawn" not in run.stdout.partition("</main>")[0]
        assert run.stdout.count('role="graphics-document"') == 9


class TestTables:
    def test_columns_are_read_as_they_were_written(self, full: ReportData, tmp_path: Path) -> None:
        settings = full.settings
        assert set(settings.loc[settings["split"] == "oof", "folds"]) == {""}
        assert {"0", "0 1 2"} <= set(settings["folds"])
        assert settings["current"].sum() == 2
        assert settings["front"].dtype == bool
        (tmp_path / "truncated").write_text("split,dice\noof,much\n")
        with pytest.raises(CarvanaError, match="truncated"):
            tables.read_table(tmp_path / "truncated")
        with pytest.raises(CarvanaError, match="dvc repro"):
            tables.read_table(tmp_path / "none")

    def test_blank_numbers_are_none_and_blank_texts_are_blank(self, bare: ReportData) -> None:
        assert bare.settings["seconds"].isna().all() and bare.settings["low"].isna().all()
        assert (bare.settings["weights"] == "").all()
        assert tables.cost_column(bare.settings) == "passes"

    def test_a_setting_without_seconds_makes_all_count_passes(self, full: ReportData) -> None:
        assert tables.cost_column(full.settings) == "seconds"
        assert (
            tables.cost_column(full.settings.assign(seconds=full.settings["seconds"].where(~full.settings["current"])))
            == "passes"
        )

    def test_one_setting_a_cost_the_best_and_the_current(self, full: ReportData) -> None:
        rows = tables.rows_of_split(full.settings, "holdout")
        shown = tables.best_at_each_cost(rows)
        keys = ["models", "views"]
        folds = shown["folds"].str.split().str.len()
        best = shown.groupby([*(shown[key] for key in keys), folds])["dice"].max()
        of_all = rows.groupby([*(rows[key] for key in keys), rows["folds"].str.split().str.len()])["dice"].max()
        assert best.tolist() == of_all.tolist()
        assert shown["current"].sum() == 1
        assert set(rows.index[rows["front"]]) <= set(shown.index)
        assert len(shown) <= len(of_all) + 1 + rows["front"].sum()

    def test_one_change_at_a_time(self, full: ReportData) -> None:
        rows = tables.rows_of_split(full.settings, "oof")
        changes = tables.one_factor_changes(rows, 3)
        current = rows[rows["current"]].iloc[0]
        assert changes["changed"].value_counts().to_dict() == {"models": 2, "views": 3, "merge": 2, "threshold": 3}
        for row in changes.to_dict("records"):
            assert [name for name in ("models", "views", "threshold") if row[name] != current[name]] == (
                [row["changed"]] if row["changed"] != "merge" else []
            )

    def test_a_single_net_merges_with_nothing_and_is_one_change_away(self, full: ReportData) -> None:
        rows = tables.rows_of_split(full.settings, "oof").copy()
        rows["current"] = (
            (rows["models"] == "small resnet18") & (rows["merge"] == "mean_logit") & (rows["threshold"] == 0.5)
        )
        rows["current"] &= rows["views"] == "identity hflip"
        assert rows["current"].sum() == 1
        assert set(tables.one_factor_changes(rows, 3).query("changed == 'models'")["models"]) == {"small", "resnet18"}

    def test_the_best_with_the_current_at_its_rank(self, full: ReportData) -> None:
        rows = tables.rows_of_split(full.settings, "holdout")
        shown = tables.best_and_current(rows, 15)
        assert len(shown) == 16
        assert shown["dice"].is_monotonic_decreasing
        last = shown.iloc[-1]
        assert last["current"] and last["rank"] == 1 + (rows["dice"] > last["dice"]).sum()
        assert len(tables.best_and_current(rows.sort_values("current", ascending=False).head(3), 15)) == 3

    def test_the_worst_are_not_all_of_one_car(self) -> None:
        disagreement = pd.DataFrame(
            {"car": ["a"] * 5 + ["b"] * 2, "image_id": list("1234567"), "dice": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]}
        )
        assert tables.worst_images(disagreement, 3, per_car=2)["image_id"].tolist() == ["1", "2", "6"]

    def test_suspects_are_large_and_broad(self) -> None:
        sizes = [(900, 30, 30), (499, 30, 30), (2000, 400, 5), (500, 50, 10)]
        disagreement = pd.DataFrame(
            [(str(n), *size) for n, size in enumerate(sizes)], columns=["image_id", "suspect", "height", "width"]
        )
        assert tables.suspected_label_errors(disagreement)["image_id"].tolist() == ["0", "3"]


def layers(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return spec.get("layer", [spec])


def values(spec: dict[str, Any], layer: dict[str, Any]) -> list[dict[str, Any]]:
    """The data of a layer, which Altair may keep at the top by name."""
    data = layer.get("data", spec.get("data", {}))
    return spec["datasets"][data["name"]] if "name" in data else data["values"]


class TestCharts:
    def test_cost_has_a_rising_front_and_one_current_setting(self, full: ReportData) -> None:
        rows = tables.rows_of_split(full.settings, "holdout")
        spec = charts.accuracy_by_cost(rows)
        front, *current, points = layers(spec)
        line = values(spec, front)
        assert front["mark"]["interpolate"] == "step-after"
        assert [p["seconds"] for p in line] == sorted({p["seconds"] for p in line})
        assert [p["dice"] for p in line] == sorted({p["dice"] for p in line})
        shown = values(spec, points)
        assert max(p["dice"] for p in shown) == line[-1]["dice"] == round(rows["dice"].max(), 6)
        assert len(shown) < 100 < len(rows)
        assert {p["kind"] for p in shown} == {"single net", "folds", "models"}
        for layer in current:
            (ring,) = values(spec, layer)
            assert ring["setting"].startswith(
                "small and resnet18, folds 0 1 2, identity + hflip, mean of probabilities"
            )
        assert {"color", "shape"} <= points["encoding"].keys()
        assert points["encoding"]["y"]["scale"]["zero"] is False
        assert points["encoding"]["x"]["title"] == "seconds per image"
        out_of_fold = charts.accuracy_by_cost(tables.rows_of_split(full.settings, "oof"))
        assert layers(out_of_fold)[-1]["encoding"]["x"]["title"] == "seconds per image (nets of one fold)"

    def test_cost_in_passes_where_there_are_no_seconds(self, bare: ReportData) -> None:
        spec = charts.accuracy_by_cost(bare.settings)
        assert layers(spec)[-1]["encoding"]["x"]["title"] == "forward passes per image (nets of one fold)"
        assert "NaN" not in json.dumps(spec)
        assert all("seconds" not in point for point in values(spec, layers(spec)[-1]))

    def test_fold_subsets_have_points_and_means(self, full: ReportData) -> None:
        spec = charts.fold_subsets(full.fold_subsets)
        band, _, points = layers(spec)
        assert {v["count"] for v in values(spec, band)} == {1, 2}, (
            "the subset of all three folds has no standard deviation"
        )
        assert len(values(spec, points)) == len(full.fold_subsets) == 14
        small = full.fold_subsets.query("models == 'small' and count == 2")["dice"]
        (mean,) = [v for v in values(spec, band) if v["models"] == "small" and v["count"] == 2]
        assert mean["mean"] == pytest.approx(small.mean(), abs=1e-6)
        assert mean["high"] - mean["mean"] == pytest.approx(small.std(), abs=2e-6)

    def test_threshold_has_one_line_per_merge_rule(self, full: ReportData) -> None:
        spec = charts.threshold_curve(tables.rows_of_split(full.settings, "holdout"))
        points = pd.DataFrame(values(spec, layers(spec)[0]))
        assert points.groupby("merge").size().to_dict() == {
            "mean of probabilities": 7,
            "mean of logits": 7,
            "majority vote": 7,
        }

    def test_training_leaves_out_epochs_without_a_value(self) -> None:
        spec = charts.training_curves(FULL.curves(), "dice", "Dice")
        points = pd.DataFrame(values(spec, spec))
        assert set(points["epoch"]) == {4, 8, 12, 16}
        assert set(points["color"]) == {"small", "resnet18"}
        assert set(pd.DataFrame(values(spec, spec))["net"]) == {f"{m}/{f}" for m in FULL.models for f in FULL.folds}
        alone = charts.training_curves(BARE.curves(), "loss", "loss")
        assert {point["color"] for point in values(alone, alone)} == {"small/0"}

    def test_angles_and_makes(self, full: ReportData) -> None:
        angles = charts.dice_by_angle(full.disagreement)
        points = pd.DataFrame(values(angles, layers(angles)[1]))
        assert len(points) == 2 * 16
        first = full.disagreement.query("split == 'oof' and angle == 1")["dice"]
        assert points.query("split == 'Out of fold' and angle == 1")["median"].item() == pytest.approx(
            first.median(), abs=1e-6
        )
        makes = charts.dice_by_make(full.disagreement, {FULL.cars[0]: "Kia"})
        cars = pd.DataFrame(values(makes, layers(makes)[1]))
        assert set(cars["row"]) == {"Kia (1)", "make unknown (23)"}
        assert len(cars) == 24
        means = pd.DataFrame(values(makes, layers(makes)[0]))
        unknown = means.query("row == 'make unknown (23)'").set_index("split")["mean"]
        by_car = full.disagreement.query("split == 'holdout'")["dice"].mean()
        assert unknown["Held-out cars"] == pytest.approx(by_car, abs=1e-6) and len(unknown) == 2


class TestHeadlines:
    def test_scores_have_an_interval_or_the_reason_why_not(self, full: ReportData, bare: ReportData) -> None:
        (oof, holdout, test) = summary.headline_scores(full.images, SUBMISSION)
        assert (oof.title, holdout.title, test.title) == ("Out of fold", "Held-out cars", "Test cars")
        assert re.fullmatch(r"95 % CI 0\.99\d{3} to 0\.99\d{3}", oof.interval)
        assert oof.basis == "224 images of 14 cars"
        assert oof.dice == f"{tables.rows_of_split(full.images, 'oof')['dice'].mean():.5f}"
        assert test.interval.startswith("No interval")
        (alone,) = summary.headline_scores(bare.images, ALONE)
        assert alone.interval.startswith("No interval")

    def test_one_held_out_car_has_a_score_though_its_settings_are_not_compared(self, tmp_path: Path) -> None:
        data = report_data(FakeReports(held_out=("f" * 12,)), tmp_path)
        _, holdout, _ = summary.headline_scores(data.images, SUBMISSION)
        assert holdout.basis == "16 images of 1 car"
        assert holdout.interval.startswith("No interval")
        assert "16 images of 1 car" in Document(render_page(data, [], [])).text

    def test_no_bound_is_above_1(self) -> None:
        rows = pd.DataFrame({"split": "oof", "car": [str(n) for n in range(10)], "dice": [0.5, *[1.0] * 9]})
        (score,) = summary.headline_scores(rows, {})
        assert score.interval.endswith("to 1.00000")

    def test_the_rows_are_those_of_the_model_that_is_submitted(self) -> None:
        images = FULL.images()
        several = summary.rows_as_submitted(images, SUBMISSION)
        assert set(several["model"]) == {"ensemble"} and set(several["split"]) == {"oof", "holdout"}
        one = summary.rows_as_submitted(images, SUBMISSION | {"nets": ["small/0", "small/1"]})
        assert set(zip(one["split"], one["model"], strict=True)) == {("oof", "small"), ("holdout", "ensemble")}
        assert len(one) == len(several) == 384

    def test_disagreement_gets_the_dice_after_post_processing(self) -> None:
        images = summary.rows_as_submitted(FULL.images(), SUBMISSION).sample(frac=1, random_state=0)
        disagreement = summary.with_final_dice(FULL.disagreement(), images.assign(dice=images["dice"] / 2))
        assert np.allclose(disagreement["dice"], FULL.disagreement()["dice"] / 2)
        assert list(disagreement["image_id"]) == list(FULL.disagreement()["image_id"])


class TestSentences:
    def points(self, **changes: Any) -> dict[str, ablation_text.SummaryPoint]:
        results = FULL.summary()
        oof, _ = ablation_text.summarize_ablation(results | {"oof": results["oof"] | changes})
        return {point.label: point for point in oof.points}

    def test_best_cheapest_recommended_and_nested_selection(self) -> None:
        points, result = self.points(), FULL.summary()["oof"]
        assert (
            points["Best"].setting == "resnet18, identity + hflip + scale:0.75, mean of probabilities, threshold 0.45"
        )
        assert "0.93 s and 3 forward passes per image" in points["Best"].text
        for figure in ("45 settings", "0.00020", "0.00040", "0.31 s and 1 forward pass per image (nets of one fold)"):
            assert figure in points["Cheapest"].text
        assert points["Recommended"].setting
        assert "14%" in points["Recommended"].text
        for figure in ("nested_dice", "best_dice"):
            assert f"{result['nested_selection'][figure]:.5f}" in points["Selection bias"].text
        assert "95 %" not in points["Selection bias"].text
        assert "No intervals" not in points

    def test_a_confidence_set_of_one_and_missing_results(self) -> None:
        best = FULL.summary()["oof"]["best"]
        assert not self.points(confidence_set_size=1, cheapest=best)["Cheapest"].setting
        assert "7 settings" in self.points(confidence_set_size=7, cheapest=best)["Cheapest"].text
        points = self.points(
            confidence_set_size=None,
            cheapest=None,
            recommended=None,
            reason=None,
            nested_selection=None,
            no_interval="Few cars.",
        )
        assert list(points) == ["Best", "Selection bias", "No intervals"]
        current = self.points(best=best | {"current": True, "difference": 0.0})["Best"]
        assert "the current setting" in current.text

    def test_numbers(self) -> None:
        assert ablation_text.format_signed(-0.00012) == "−0.00012"
        assert [ablation_text.format_seconds(value) for value in (0.0123, 0.5, 2.79, 123.4)] == [
            "0.012 s",
            "0.5 s",
            "2.8 s",
            "123 s",
        ]
        assert ablation_text.pluralize(1, "forward pass", "forward passes") == "1 forward pass"
        assert ablation_text.pluralize(12345, "image") == "12,345 images"


class TestForest:
    def test_marks_lie_in_order_on_one_axis(self, full: ReportData) -> None:
        rows = tables.best_and_current(tables.rows_of_split(full.settings, "oof"), 15)
        current = rows[rows["current"]].iloc[0]
        table = build_comparison(rows, [str(n) for n in rows["rank"]], "rank", current)
        assert table.columns == ["models", "views", "merge", "threshold"], "what is blank in all rows is left out"
        for line, (_, row) in zip(table.rows, rows.iterrows(), strict=True):
            assert 0 <= line.mark.low <= line.mark.dot <= line.mark.high <= 150
            assert (line.kind == "better") == (row["low"] > 0)
            assert (line.mark.dot > table.zero) == (row["difference"] > 0) or abs(row["difference"]) < 1e-6
            assert [cell.changed for cell in line.cells] == [row[name] != current[name] for name in table.columns]
        assert table.rows[-1].current and not table.rows[-1].difference

    def test_without_intervals_nothing_is_called_better(self, bare: ReportData) -> None:
        rows = tables.best_and_current(bare.settings, 15)
        table = build_comparison(rows, [""] * len(rows), "rank", rows[rows["current"]].iloc[0])
        assert {line.kind for line in table.rows} == {"open"}
        assert all(line.mark.low == line.mark.dot == line.mark.high for line in table.rows)
        assert not table.timed


def near(color: NDArray[np.uint8], wanted: tuple[int, int, int], by: int = 30) -> bool:
    return bool(np.abs(color.astype(int) - wanted).max() < by)


class TestCrops:
    def test_boxes(self) -> None:
        assert CropBox.around([box(100, 200, 300, 500), box(150, 250, 400, 450)], 10) == (90, 290, 260, 510)
        assert CropBox.around([box(0, 200, 0, 500)], 10) == (0, 0, 210, 510)
        assert CropBox.around([box(0, 0, 0, 0)], 10) == (0, 0, HEIGHT, WIDTH)

    @pytest.mark.parametrize(
        "region",
        [
            CropBox(600, 900, 620, 930),
            CropBox(0, 0, 12, 10),
            CropBox(1270, 1900, 1280, 1918),
            CropBox(10, 100, 20, 1500),
        ],
    )
    def test_context_holds_the_region_and_stays_inside(self, region: CropBox) -> None:
        top, left, bottom, right = region.in_context(2.5, 160, HEIGHT, WIDTH)
        assert 0 <= top <= region.top and region.bottom <= bottom <= HEIGHT
        assert 0 <= left <= region.left and region.right <= right <= WIDTH
        assert bottom - top >= 80 and right - left >= 100

    def test_errors_and_the_true_outline(self) -> None:
        true, mask = box(400, 800, 400, 1200), box(400, 800, 600, 1400)
        part = CropBox.around([true, mask], 0)
        image = overlays.error_overlay(GREY, mask, true, part, 500)  # half as large
        assert image.shape == (200, 500, 3)
        assert near(image[100, 50], FALSE_NEGATIVE, 1)
        assert near(image[100, 450], FALSE_POSITIVE, 1)
        assert near(image[100, 250], (128, 128, 128), 1)
        outline = overlays.with_outlines(GREY, true, [mask], CropBox(300, 300, 900, 1500), 1200)
        assert near(outline[100, 500], TRUTH, 1) and near(outline[300, 100], TRUTH, 1)
        assert near(outline[300, 300], overlays.NETS, 1) and near(outline[300, 1100], overlays.NETS, 1)
        assert near(outline[300, 600], (128, 128, 128), 1)

    def test_an_outline_does_not_follow_the_border_of_the_crop(self) -> None:
        image = overlays.with_outlines(GREY, box(0, 1280, 0, 700), [], CropBox(500, 500, 800, 900), 400)
        assert near(image[0, 50], (128, 128, 128), 1) and near(image[150, 0], (128, 128, 128), 1)
        assert near(image[150, 200], TRUTH, 1)

    def test_a_heatmap_shows_lines_of_one_pixel(self) -> None:
        heat_HW = np.zeros((HEIGHT, WIDTH), np.uint8)
        heat_HW[600, 400:1200] = 255
        image = overlays.heatmap_overlay(GREY, heat_HW, CropBox(0, 0, HEIGHT, WIDTH), WIDTH // 4)
        assert image[150, 200].max() > 150
        quiet = image[50, 50]
        assert np.ptp(quiet.astype(int)) == 0 and quiet.max() < 80

    def test_a_frame_lies_just_outside_its_region(self) -> None:
        image = np.full((400, 800, 3), 128, np.uint8)
        framed = overlays.with_frame(image, CropBox(400, 500, 500, 700), CropBox(300, 300, 700, 1100))
        assert near(framed[96, 300], overlays.REGION, 1) and near(framed[150, 196], overlays.REGION, 1)
        assert near(framed[150, 300], (128, 128, 128), 1) and (image == 128).all()

    def test_images_are_embedded(self) -> None:
        address = overlays.data_uri(overlays.crop_image(GREY, CropBox(0, 0, 400, 800), 200))
        head, _, text = address.partition(",")
        assert head == "data:image/jpeg;base64"
        read = cv2.imdecode(np.frombuffer(base64.b64decode(text), np.uint8), cv2.IMREAD_COLOR)
        assert read.shape == (100, 200, 3)

    def test_figures_show_the_region_and_tell_of_it(self) -> None:
        true, mask = box(400, 800, 400, 1200), box(400, 800, 400, 1300)
        row = {"image_id": "0123456789ab_03", "car": "0123456789ab", "angle": 3.0, "split": "oof", "dice": 0.94118}
        row |= {
            "nets": 2.0,
            "disagreement": 1234.0,
            "suspect": 40000.0,
            "top": 400.0,
            "left": 1200.0,
            "height": 400.0,
            "width": 100.0,
        }
        worst = overlays.worst_image_figure(row, "Kia", GREY, true, mask, np.zeros_like(true))
        assert worst.title == "0123456789ab_03"
        assert worst.facts[:4] == ["Dice 0.94118", "car 0123456789ab (Kia)", "angle 3", "out of fold"]
        assert "1,234 pixels" in worst.facts[4]
        assert [image.caption for image in worst.images] == ["errors", "disagreement between 2 nets"]
        single = overlays.worst_image_figure(row | {"nets": 1.0}, None, GREY, true, mask, np.zeros_like(true))
        assert single.images[1].caption == "uncertainty of the net"
        assert single.facts == ["Dice 0.94118", "car 0123456789ab", "angle 3", "out of fold"]
        suspect = overlays.label_error_figure(row, "Kia", GREY, true, [mask, mask])
        assert suspect.facts[0].startswith("40,000 pixels (100 x 400)")
        assert [image.caption for image in suspect.images][:2] == ["location", "image"]


IDS = [f"{car:012x}_{angle:02d}" for car in range(3) for angle in range(1, 16)]


def certain(image_id: str, seed: int) -> NDArray[np.uint8]:
    """Two views (2, H, W): a box that depends on the image, less a strip that a net of this seed misses; a speck."""
    levels = np.zeros((2, HEIGHT, WIDTH), np.uint8)
    levels[:, 300:400, 500 + IDS.index(image_id) : 700 - 10 * seed] = 255
    levels[1, 300:310] //= 2
    levels[:, 10, 10] = 255  # a speck
    return levels


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, int], PredictionStore]:
    """Models a and b, folds 0 and 1: fold 0 holds the first car, fold 1 the second, and the third is held out."""
    folder = tmp_path_factory.mktemp("maps")
    for split, model, fold in (("oof", m, f) for m in "ab" for f in (0, 1)):
        _maps(folder, split, model, fold, IDS[15 * fold : 15 * fold + 15])
    for model, fold in ((m, f) for m in "ab" for f in (0, 1)):
        _maps(folder, "holdout", model, fold, IDS[30:])
    return lambda split, model, fold: PredictionStore(folder / split / model / str(fold) / "maps")


def _maps(folder: Path, split: str, model: str, fold: int, ids: list[str]) -> None:
    work = folder / split / model / str(fold)
    work.mkdir(parents=True)
    seed = 2 * "ab".index(model) + (fold if split == "holdout" else 0)
    job = PredictJob(ids, ["identity", "hflip"], shard_images=6, test=False, net="x")
    write_predictions(job, lambda some: as_maps(job, ((image_id, certain(image_id, seed)) for image_id in some)), work)


class TestMapsOfSomeImages:
    def test_they_equal_what_whole_shards_hold(self, stores: Callable[[str, str, int], PredictionStore]) -> None:
        store = stores("oof", "a", 0)
        wanted = {IDS[2], IDS[3], IDS[13]}
        for views in (None, ["identity"], ["hflip", "identity"]):
            every = [m for number in range(store.shard_count()) for m in store.images(number, views)]
            expected = [prob_map for prob_map in every if prob_map.image_id in wanted]
            found = list(store.iter_images(wanted, views))
            assert [m.image_id for m in found] == sorted(wanted)
            for prob_map, other in zip(found, expected, strict=True):
                assert (prob_map.view, prob_map.count, prob_map.box) == (other.view, other.count, other.box)
                assert np.array_equal(prob_map.probs_u8, other.probs_u8)
        raw = [m for number in range(store.shard_count()) for m in store.shard(number) if m.image_id in wanted]
        assert len(raw) == 2 * len(found)
        assert list(store.iter_images(set())) == []
        with pytest.raises(CarvanaError, match=r"scale:0\.5"):
            list(store.iter_images(wanted, ["scale:0.5"]))

    def test_no_other_map_is_decompressed(
        self, stores: Callable[[str, str, int], PredictionStore], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        unpacked: list[str] = []
        plain = CompressedMap.decompress

        def noted(packed: CompressedMap) -> ProbabilityMap:
            unpacked.append(packed.image_id)
            return plain(packed)

        monkeypatch.setattr(CompressedMap, "decompress", noted)
        list(stores("oof", "a", 1).iter_images({IDS[20]}))
        assert unpacked == [IDS[20]] * 2


class TestMemberPredictions:
    def members(self, stores: Callable[[str, str, int], PredictionStore], **changes: Any) -> MemberPredictions:
        nets = [(model, fold) for model in "ab" for fold in (0, 1)]
        whole = EnsembleContext(
            EnsembleSettings(), ["identity"], ["a", "b"], [0, 1], nets, stores, lambda image_id: GREY
        )
        return MemberPredictions(replace(whole, **changes))

    def test_only_nets_that_did_not_train_on_the_car_are_used(
        self, stores: Callable[[str, str, int], PredictionStore]
    ) -> None:
        found = {o.image_id: o for o in self.members(stores).iter_images("oof", [IDS[20], IDS[3]])}
        assert {image_id: list(o.nets) for image_id, o in found.items()} == {
            IDS[3]: ["a/0", "b/0"],
            IDS[20]: ["a/1", "b/1"],
        }
        (held_out,) = self.members(stores).iter_images("holdout", [IDS[31]])
        assert list(held_out.nets) == ["a/0", "a/1", "b/0", "b/1"]

    def test_masks_and_where_they_differ(self, stores: Callable[[str, str, int], PredictionStore]) -> None:
        (found,) = self.members(stores).iter_images("oof", [IDS[3]])
        first, second = found.nets.values()
        assert np.array_equal(first, certain(IDS[3], 0)[0] > 0) and np.array_equal(second, certain(IDS[3], 2)[0] > 0)
        assert np.array_equal(found.mask_HW, first), "ties count as foreground"
        assert np.array_equal(found.disagreement_HW > 0, first != second) and found.disagreement_HW.max() == 255
        (held_out,) = self.members(stores).iter_images("holdout", [IDS[31]])
        assert held_out.disagreement_HW[350, [665, 675, 685, 695, 705]].tolist() == [0, 127, 254, 127, 0], (
            "4, 3, 2, 1, 0 of 4"
        )

    def test_the_merge_is_that_of_the_ensemble_alone(self, stores: Callable[[str, str, int], PredictionStore]) -> None:
        only_b = self.members(stores, ensemble=[("b", 0)])
        (oof,) = only_b.iter_images("oof", [IDS[20]])
        assert list(oof.nets) == ["a/1", "b/1"]
        assert np.array_equal(oof.mask_HW, oof.nets["b/1"]), "the model of the ensemble, with the fold of the image"
        (held_out,) = only_b.iter_images("holdout", [IDS[31]])
        assert np.array_equal(held_out.mask_HW, held_out.nets["b/0"])

    def test_steps_after_the_merge_count_for_the_mask_of_all_alone(
        self, stores: Callable[[str, str, int], PredictionStore]
    ) -> None:
        settings = EnsembleSettings(postprocess=("keep_largest",))
        (found,) = self.members(stores, settings=settings).iter_images("oof", [IDS[3]])
        assert found.nets["a/0"][10, 10] and not found.mask_HW[10, 10]
        assert found.mask_HW.sum() == found.nets["a/0"].sum() - 1

    def test_a_single_net_has_an_uncertainty_map(self, stores: Callable[[str, str, int], PredictionStore]) -> None:
        alone = self.members(stores, models=["a"], folds=[0], ensemble=[("a", 0)], views=["identity", "hflip"])
        (found,) = alone.iter_images("oof", [IDS[3], IDS[20]])  # of fold 1, which is not active
        assert found.disagreement_HW[305, 600] == pytest.approx(128, abs=2)
        assert found.disagreement_HW[350, 600] == found.disagreement_HW[10, 10] == 0


class TestMetadata:
    HEADER = '"id","year","make","model","trim1","trim2"\n'

    def test_makes_by_car_zipped_or_not(self, tmp_path: Path) -> None:
        text = self.HEADER + '"0004d4463b50","2014","Acura","TL","TL","w/SE"\n"00087a6bd4dc","2014","","RLX","",""\n'
        (tmp_path / "metadata.csv").write_text(text)
        assert read_car_makes(tmp_path) == {"0004d4463b50": "Acura"}
        (tmp_path / "metadata.csv").unlink()
        with zipfile.ZipFile(tmp_path / "metadata.csv.zip", "w") as archive:
            archive.writestr("metadata.csv", text)
        assert read_car_makes(tmp_path) == {"0004d4463b50": "Acura"}

    def test_none_where_the_file_is_not_there_and_an_error_where_it_is_another(self, tmp_path: Path) -> None:
        assert read_car_makes(tmp_path) == {}
        (tmp_path / "metadata.csv").write_text("car,maker\n")
        with pytest.raises(CarvanaError, match=r"\bid\b.*\bmake\b"):
            read_car_makes(tmp_path)
