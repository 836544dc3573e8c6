"""The whole pipeline as users run it: dvc repro on a tiny sample, again, changed, and as an experiment."""

import gzip
import re
import zipfile
from pathlib import Path

import pandas as pd
import pytest

from pipeline.ablation.fast_dice import MapStack, SettingScorer
from pipeline.ablation.search_space import AblationSpace
from pipeline.competition.dice import confusion_counts
from pipeline.config import AblationSettings, EnsembleSettings
from pipeline.data.competition_data import CompetitionData
from pipeline.inference.prediction_store import PredictionStore
from pipeline.inference.probability_map import ProbabilityMap, sum_maps
from pipeline.inference.torch_predictor import TorchPredictor
from pipeline.submission.validation import score_submission, validate_submission
from pipeline.utils.run_state import acquire_run_state
from pipeline.workspace import net_digest
from tests.end_to_end.dvc_project import TINY, Project


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, finished_project: Path) -> Project:
    """A project after one run of everything on a tiny sample."""
    return Project.copy_of(finished_project, tmp_path_factory.mktemp("pipeline") / "project")


@pytest.mark.slow
class TestRepro:
    def test_a_submission_is_made_checked_and_scored(self, done: Project, tiny_sample: Path) -> None:
        csv = done.folder / "submissions/submission.csv.gz"
        with zipfile.ZipFile(tiny_sample / "sample_submission.csv.zip") as sample:
            lines = sample.read("sample_submission.csv").decode().splitlines()[1:]
        ids = [line.partition(".")[0] for line in lines]
        report = validate_submission(csv, ids)
        described = done.read("submissions/submission.json")
        assert described["content_sha256"] == report.sha256
        assert described["nets"] == ["small/0", "small/1"]
        assert described["test"]["dice"] == pytest.approx(score_submission(csv, tiny_sample / "truth.csv").mean)
        assert gzip.decompress(csv.read_bytes()).startswith(b"img,rle_mask\n")

    def test_metrics_and_reports(self, done: Project) -> None:
        metrics = done.read("reports/metrics.json")
        assert metrics["oof"]["small"]["images"] == 32
        assert metrics["holdout"]["cars"] == 2
        for scores in (metrics["oof"]["small"], metrics["holdout"], metrics["test"]):
            assert 0 < scores["iou"] <= scores["dice"] <= 1
            assert 0 < scores["accuracy"] <= 1
        images = pd.read_csv(done.folder / "reports/images.csv")
        assert images.groupby("split").size().to_dict() == {"holdout": 32, "oof": 32}
        assert images[images["split"] == "oof"]["dice"].mean() == pytest.approx(
            metrics["oof"]["small"]["dice"], abs=1e-5
        )
        for name in ("worst.jpg", "predictions.jpg"):
            assert (done.folder / "reports" / name).read_bytes().startswith(b"\xff\xd8")
        curves = pd.read_csv(done.folder / "reports/curves.csv")
        assert curves.groupby("net")["epoch"].max().to_dict() == {"small/0": 3, "small/1": 3}
        assert metrics["ablation"]["oof"]["current"] == pytest.approx(metrics["oof"]["small"]["dice"], abs=2e-6)
        html = (done.folder / "reports/index.html").read_text(encoding="utf-8")
        assert html.count('src="data:image/jpeg;base64,') >= 12, "two images of each of three cars, each twice"

    def test_no_car_was_scored_by_a_net_that_learned_it(self, done: Project) -> None:
        folds = pd.read_csv(done.folder / "folds/folds.csv").set_index("car")["fold"]
        images = pd.read_csv(done.folder / "reports/images.csv")
        assert (images["fold"] == images["car"].map(folds)).all()

    @pytest.mark.parametrize("split", ["oof", "holdout", "test"])
    def test_prediction_stores_record_net_and_timing(self, done: Project, split: str) -> None:
        store = PredictionStore(done.folder / "predictions" / split / "small/0")
        assert store.net == net_digest(done.folder / "folds/small/0", "last")
        timing = store.timing()
        assert timing is not None
        assert 0 < timing.images <= len(store.image_ids)
        assert list(timing.views) == store.views
        assert sum(timing.views.values()) <= timing.seconds * (1 + 1e-9)

    def test_the_ablation_equals_brute_force_on_real_photographs(self, done: Project, real_carvana: Path) -> None:
        views, folds = ("identity", "hflip", "scale:0.75"), (0, 1)
        nets = [("small", fold) for fold in folds]
        predictors = [
            TorchPredictor(done.folder / "folds/small" / str(fold), views=views, device="cpu") for fold in folds
        ]
        grid = AblationSpace(
            ablation=AblationSettings(),
            ensemble=EnsembleSettings(),
            models=("small",),
            folds=folds,
            predicted={"oof": views, "holdout": views},
            views=views[:2],
        ).grid("holdout")
        source, counter = CompetitionData(real_carvana), SettingScorer(grid, nets, views)
        for image_id in source.masks.ids()[:40:20]:
            image_HWC, true_HW = source.train.image(image_id), source.masks.mask(image_id)
            levels = [
                predictor.predict_u8([predictor.preprocess(image_HWC)], *true_HW.shape)[0] for predictor in predictors
            ]
            maps = [
                [
                    ProbabilityMap.crop(image_id, view, 1, levels_HW)
                    for view, levels_HW in zip(views, of_net, strict=True)
                ]
                for of_net in levels
            ]
            pixels = MapStack.of(maps, true_HW).ambiguous_pixels(counter.bounds)
            assert pixels.probs_u8_NVU.shape[2]
            for setting, (both, own) in zip(grid, counter.count(pixels).tolist(), strict=True):
                chosen = [views.index(view) for view in setting.views]
                merged = [sum_maps([maps[fold][view] for view in chosen]) for fold in setting.folds]
                expected = confusion_counts(setting.merge_rule.mask(merged), true_HW)
                assert (both, own, pixels.total_true) == expected[:3], (image_id, setting)

    def test_a_second_run_does_nothing(self, done: Project) -> None:
        assert re.findall(r"Running stage '(.+)'", done.repro()) == ["initial_weights"]
        assert "Dice" in done.run("carvana", "summary")

    @pytest.mark.parametrize(
        ("key", "value", "stages"),
        [
            ("ensemble.threshold", 0.4, {"evaluate", "ensemble", "ablate", "report"}),
            ("models.specs.small.dropout", 0.1, {"train@small-0", "train@small-1"}),
            ("models.specs.classic.dropout", 0.1, set()),
            ("predict.tta.oof", ["identity", "scale:0.75"], {"predict@small-0-oof", "predict@small-1-oof", "ablate"}),
            ("hardware.workers", 0, set()),
            ("train.lr", 0.005, {"train@small-0", "train@small-1"}),
        ],
    )
    def test_a_change_reruns_just_what_depends_on_it(
        self, done: Project, key: str, value: object, stages: set[str]
    ) -> None:
        done.put({key: value})
        try:
            assert done.changed() == stages
        finally:
            done.git("checkout", "params.yaml")

    def test_a_changed_weights_file_retrains(self, done: Project) -> None:
        start = done.folder / "data/start.safetensors"
        nets = [(done.folder / f"folds/small/{fold}/model.safetensors").read_bytes() for fold in (0, 1)]
        done.put({"train.init_checkpoint": "data/start.safetensors"})
        try:
            for net, stages in (
                (0, ["initial_weights", "train@small-1"]),
                (0, ["initial_weights"]),
                (1, ["initial_weights", "train@small-1"]),
            ):
                start.write_bytes(nets[net])
                assert re.findall(r"Running stage '(.+)'", done.repro("train@small-1")) == stages
        finally:
            done.git("checkout", "params.yaml", "dvc.lock")
            done.run("dvc", "checkout", "initial_weights", "train@small-1")

    def test_results_are_kept_only_of_the_present_settings(self, done: Project) -> None:
        assert "Dice" in done.run("carvana", "results", "--keep")
        (kept,) = (done.folder / "docs/results").glob("small@real-4-*.json")
        assert done.read(str(kept))["name"] in done.run("carvana", "results")
        done.put({"train.epochs": 9})
        try:
            assert "'dvc repro'" in done.run("carvana", "results", "--keep", status=1)
        finally:
            done.git("checkout", "params.yaml")

    def test_masks_are_post_processed_for_scores_and_submission(self, done: Project, tiny_sample: Path) -> None:
        before = done.read("reports/evaluation.json")["oof"]["small"]["dice"]
        done.put({"ensemble.postprocess": ["fill_holes", "keep_largest", "refine_edges"]})
        try:
            done.repro("ensemble")
            described = done.read("submissions/submission.json")
            assert described["postprocess"] == ["refine_edges", "keep_largest", "fill_holes"]
            truth = score_submission(done.folder / "submissions/submission.csv.gz", tiny_sample / "truth.csv")
            assert described["test"]["dice"] == pytest.approx(truth.mean)
            assert described["own_dice"]["oof"]["small"] != before
        finally:
            done.git("checkout", "params.yaml", "dvc.lock")
            done.run("dvc", "checkout", "evaluate", "ensemble")

    def test_a_temporary_experiment_finds_data_and_state(self, done: Project) -> None:
        printed = done.run("dvc", "exp", "run", "--temp", "--set-param", "ensemble.threshold=0.45", "--name", "t45")
        assert "Running stage 'ensemble'" in printed
        assert "Running stage 'download'" not in printed
        assert "Running stage 'train" not in printed
        shown = done.run("dvc", "exp", "show", "--csv", "--drop", ".*sha.*")
        assert "t45" in shown
        # One that trains shares the state of resumes with the workspace.
        before = {path.name for path in (done.folder / ".resume/train/small/0").iterdir()}
        done.run("dvc", "exp", "run", "--temp", "--set-param", "train.lr=0.02", "--name", "lr", "train@small-0")
        after = {path.name for path in (done.folder / ".resume/train/small/0").iterdir()}
        assert before < after

    @pytest.mark.long
    def test_queued_experiments_find_data_and_state(self, done: Project) -> None:
        done.run(
            "dvc", "exp", "run", "--queue", "--set-param", "ensemble.merge=majority_vote", "--name", "majority_vote"
        )
        done.run("dvc", "exp", "run", "--run-all")
        shown = done.run("dvc", "exp", "show", "--csv")
        (row,) = [line for line in shown.splitlines() if line.startswith("majority_vote,")]
        assert re.search(r",0\.\d+,", row), "it has scores"
        assert not list((done.folder / ".dvc/tmp/exps").rglob("data/*.zip"))

    def test_metrics_and_plots_of_dvc(self, done: Project) -> None:
        assert "holdout.dice" in done.run("dvc", "metrics", "show")
        assert "file:" in done.run("dvc", "plots", "show", "--out", "plots")
        assert "train@small-0" in done.run("dvc", "dag", "--mermaid")


@pytest.mark.slow
class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["train", "--model", "none", "--fold", "0"], "'none'"),
            (["train", "--model", "small", "--fold", "7"], "Fold 7"),
            (["predict", "--model", "small", "--fold", "5", "--split", "test"], "trained"),
        ],
    )
    def test_stages_name_unknown_models_folds_and_nets(self, done: Project, arguments: list[str], words: str) -> None:
        printed = done.run("carvana", "stage", *arguments, status=1)
        assert words in printed
        assert "Traceback" not in printed

    def test_a_gpu_where_there_is_none(self, done: Project) -> None:
        done.put({"hardware.device": "gpu"})
        try:
            command = ("carvana", "stage", "predict", "--model", "small", "--fold", "0", "--split", "test")
            blind = ("env", "CUDA_VISIBLE_DEVICES=", *command)
            assert "hardware.device" in done.run(*blind, status=1)
        finally:
            done.git("checkout", "params.yaml")

    def test_repro_with_a_truncated_dvc_lock(self, done: Project) -> None:
        lock = done.folder / "dvc.lock"
        whole = lock.read_bytes()
        lock.write_bytes(whole[: len(whole) // 2] + b"\n  truncated: [")
        try:
            printed = done.run("carvana", "repro", status=1)
            assert "git checkout dvc.lock" in printed
            assert "Traceback" not in printed
        finally:
            lock.write_bytes(whole)


@pytest.mark.slow
def test_a_corrupt_test_image_keeps_its_row(tiny_sample: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for file in tiny_sample.iterdir():
        if file.name != "test.zip":
            (data / file.name).symlink_to(file)
    with zipfile.ZipFile(tiny_sample / "test.zip") as old, zipfile.ZipFile(data / "test.zip", "w") as new:
        truncated = old.namelist()[3]
        for name in old.namelist():
            new.writestr(name, old.read(name)[: 30_000 if name == truncated else None])
    quick = {"data.directory": str(data), "train.epochs": 1, "folds.active": [0]}
    project = Project(tmp_path / "project", TINY | quick)
    project.repro("evaluate", "ensemble")
    image_id = Path(truncated).stem
    replaced = project.read("submissions/submission.json")["replaced_images"]
    assert list(replaced) == [image_id]
    assert validate_submission(project.folder / "submissions/submission.csv.gz").rows == 16
    assert image_id in project.run("carvana", "summary")


@pytest.mark.slow
def test_large_files_are_linked_not_copied(tmp_path: Path) -> None:
    """Where the file system links; DVC does so on its own only if links come first among its cache's types."""
    project = Project(tmp_path / "project", {})
    with acquire_run_state(project.folder, "slot", {}) as state:
        built = state.work_dir / "built"
        built.mkdir()
        (built / "large").write_bytes(bytes(2 << 20))
        state.finish(built)
        state.publish(project.folder / "out")
    project.run("dvc", "add", "out")
    kept = state.result_dir / "large"
    assert kept.samefile(project.folder / "out" / "large")
    assert kept.stat().st_nlink == 3
