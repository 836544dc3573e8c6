"""The ``carvana`` command: parses, then calls one function; rooms are imported only when they are entered."""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

_STAGES = ("download", "folds", "train", "predict", "evaluate", "ensemble", "ablate", "report")

_RENAMED = {"predict": "segment"}
"""Commands by their old names."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and leave with its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] in _RENAMED:
        sys.exit(f"error: 'carvana {given[0]}' is now 'carvana {_RENAMED[given[0]]}'.")
    # Taken out first, wherever it stands: people add it to the end, and there DVC would get repro's.
    options = _parser().parse_args([argument for argument in given if argument != "--debug"])
    from pipeline.stages.runner import report_errors

    sys.exit(report_errors(lambda: options.call(options), debug="--debug" in given))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="carvana",
        description="Carvana image masking, from the competition's files to a submission.",
        epilog="Run one stage by itself: carvana stage train --help",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")  # here for --help alone
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, call: Callable[[argparse.Namespace], None], words: str, **how: Any) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=words, description=words, **how)
        command.set_defaults(call=call)
        return command

    # With a prefix that nobody types, so that -f and the like are left to dvc.
    words = "check DVC's files, run dvc repro, and show the scores"
    repro = add("repro", _repro, words, add_help=False, prefix_chars="\0")
    repro.set_defaults(print_help=repro.print_help)
    repro.add_argument("arguments", nargs=argparse.REMAINDER, help="of dvc repro, such as -f or a stage")
    stage = add("stage", _stage, "run a single stage of dvc.yaml")
    stage.add_argument("name", choices=_STAGES, metavar="NAME", help=", ".join(_STAGES))
    stage.add_argument("arguments", nargs=argparse.REMAINDER, help="options of the stage, such as --model and --fold")
    recipe = add("recipe", _recipe, "apply a recipe to params.yaml and show what changed")
    recipe.add_argument("name", nargs="?", metavar="NAME", help="without it: the recipes there are")
    check = add("check", _check, "validate a submission CSV: every image once, every run-length code valid")
    check.add_argument("csv", type=Path, nargs="?", default=Path("submissions/submission.csv.gz"), metavar="CSV")
    score = add("score", _score, "score a submission CSV against true masks, as Kaggle does")
    score.add_argument("csv", type=Path, metavar="CSV")
    score.add_argument("--truth", type=Path, required=True, metavar="CSV", help="masks in the same form")
    download = add("download", _download, "download (or draw) the competition's files, and verify them")
    download.add_argument("--check", action="store_true", help="check your setup without downloading anything")
    submit = add("submit", _submit, "validate a CSV, submit it to Kaggle, and log it in submissions/ledger.csv")
    submit.add_argument("csv", type=Path, nargs="?", default=Path("submissions/submission.csv.gz"), metavar="CSV")
    submit.add_argument("-m", "--message", required=True, metavar="TEXT", help="what this submission is")
    submit.add_argument("--again", action="store_true", help="submit even if the same content was submitted before")
    submit.add_argument("--wait", action="store_true", help="wait for the score")
    submit.add_argument("--dry-run", action="store_true", help="do everything except submit")
    listed = add("submissions", _submissions, "list submissions with current scores from Kaggle")
    listed.add_argument("--json", action="store_true", help="machine-readable output")
    board = add("leaderboard", _leaderboard, "show the rank of a score on Kaggle's leaderboard")
    board.add_argument("score", type=float, nargs="?", metavar="SCORE", help="by default the best of the ledger")
    board.add_argument("--public", action="store_true", help="on the public leaderboard")
    ablate = add("ablate", _ablate, "show ablation results: views, folds, models, merging and threshold")
    which = ablate.add_mutually_exclusive_group()
    which.add_argument("--best", action="store_true", help="print the recommended setting")
    which.add_argument("--apply", action="store_true", help="write the recommended setting to params.yaml")
    which.add_argument(
        "--exps", action="store_true", help="compare the experiments of 'dvc exp run' with this workspace"
    )
    ablate.add_argument(
        "--split", choices=("oof", "holdout"), help="one of them; by default held-out cars' advice is applied"
    )
    results = add("results", _results, "compare the results of runs")
    results.add_argument("--keep", action="store_true", help="keep this run's figures in docs/results/")
    results.add_argument("--out", type=Path, metavar="FILE", help="write the table there")
    logs = add("tensorboard", _tensorboard, "start TensorBoard: training curves and prediction images")
    logs.add_argument("--port", type=int, default=6006, metavar="N", help="by default %(default)s")
    logs.add_argument(
        "--address", default="127.0.0.1", metavar="A", help="by default %(default)s, which only this machine reaches"
    )
    page = add("app", _app, "start the web app: segment images, compare settings, list submissions")
    page.add_argument("--port", type=int, default=8501, metavar="N", help="by default %(default)s")
    page.add_argument(
        "--address", default="127.0.0.1", metavar="A", help="by default %(default)s, which only this machine reaches"
    )
    segment = add("segment", _segment, "segment your own images: JPEG, PNG or WebP of any size")
    segment.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="a picture, or a folder with all below it")
    segment.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the results go")
    segment.add_argument(
        "--net",
        nargs="+",
        default=["ensemble"],
        metavar="NAME",
        help="model/fold, a model with all its folds, a net's folder, an .onnx file, or ensemble (the default)",
    )
    segment.add_argument("--views", nargs="+", metavar="VIEW", help="by default predict.tta.test")
    segment.add_argument("--threshold", type=_part, metavar="P", help="by default ensemble.threshold")
    segment.add_argument(
        "--merge", choices=("mean_probability", "mean_logit", "majority_vote"), help="by default ensemble.merge"
    )
    segment.add_argument(
        "--write",
        nargs="+",
        choices=("mask", "overlay", "cutout", "rle"),
        default=["mask"],
        metavar="KIND",
        help="any of mask (the default), overlay, cutout, and rle, one CSV for all pictures",
    )
    segment.add_argument("--overwrite", action="store_true", help="replace results that are there")
    export = add("export", _export, "export a trained net to exports/MODEL/ and verify each file")
    export.add_argument("model", metavar="MODEL", help="one that was trained, such as small")
    export.add_argument("--fold", type=int, metavar="N", help="whose net; by default the first active one")
    export.add_argument(
        "--format",
        nargs="+",
        metavar="NAME",
        help="any of hub, torchscript, torch-export, onnx, int8, ensemble; by default all",
    )
    export.add_argument(
        "--images", type=_count, default=32, metavar="N", help="to calibrate int8 on; by default %(default)s"
    )
    add("summary", _summary, "show the scores of the last run")
    clean = add("clean", _clean, "show or delete cached run state")
    clean.add_argument("--yes", action="store_true", help="remove it, unfinished work too")
    return parser


def _repro(options: argparse.Namespace) -> None:
    from pipeline.repro import repro

    if {"-h", "--help"} & set(options.arguments):
        options.print_help()
        return
    repro(options.arguments)


def _stage(options: argparse.Namespace) -> None:
    from importlib import import_module

    from pipeline.stages.runner import run_stage

    module = import_module(f"pipeline.stages.{options.name}")
    run_stage(module.run, module.__doc__, options.arguments)


def _recipe(options: argparse.Namespace) -> None:
    from pipeline.recipes import apply_recipe, recipe_names

    if options.name is None:
        print("\n".join(f"{name}: {words}" for name, words in recipe_names().items()))
    else:
        print("\n".join(apply_recipe(options.name)) or "Nothing changed.")


def _download(options: argparse.Namespace) -> None:
    from pipeline.config import read_params
    from pipeline.stages.download import bring_in
    from pipeline.workspace import project_root

    settings = read_params().data
    if options.check:
        from pipeline.kaggle.commands import preview_competition

        preview_competition(settings, project_root())
    else:
        source = bring_in(settings, project_root(), thorough=True)
        print(f"The competition's files are in {source.directory}{', verified' if settings.is_from_kaggle else ''}.")


def _submit(options: argparse.Namespace) -> None:
    from pipeline.config import read_params
    from pipeline.kaggle.commands import submit
    from pipeline.workspace import project_root

    submit(
        options.csv,
        options.message,
        read_params().data,
        project_root(),
        again=options.again,
        wait=options.wait,
        dry_run=options.dry_run,
    )


def _submissions(options: argparse.Namespace) -> None:
    from pipeline.config import read_params
    from pipeline.kaggle.commands import show_submissions

    show_submissions(read_params().data, as_json=options.json)


def _leaderboard(options: argparse.Namespace) -> None:
    from pipeline.config import read_params
    from pipeline.kaggle.commands import show_leaderboard

    show_leaderboard(read_params().data, options.score, public=options.public)


def _check(options: argparse.Namespace) -> None:
    from pipeline.submission.validation import coverage_warnings, validate_submission

    ids, why_not = _expected_ids()
    report = validate_submission(options.csv, ids, _bar("Checking", ids))
    print(f"{options.csv} is valid: {report.rows} images, each once; {report.empty} masks are empty.")
    if why_not:
        print(f"Image ids were not checked, because the competition's files are not available: {why_not}")
    least, mean, most = report.coverage_min, report.coverage_mean, report.coverage_max
    print(f"Mask coverage: {least:.1%} to {most:.1%}, {mean:.1%} on average.")
    print(f"Content, sha256: {report.sha256}")
    for warning in coverage_warnings(report):
        print(f"warning: {warning}", file=sys.stderr)


def _score(options: argparse.Namespace) -> None:
    from pipeline.submission.validation import score_submission

    result = score_submission(options.csv, options.truth, _bar("Scoring", _expected_ids()[0]))
    worst = min(result.dice, key=result.dice.__getitem__)
    print(f"Dice {result.mean:.6f}  IoU {result.mean_iou:.6f}  accuracy {result.mean_accuracy:.6f}")
    print(f"{len(result.counts)} images; the worst is {worst} with {result.dice[worst]:.6f}.")


def _expected_ids() -> tuple[list[str] | None, str]:
    """Return the ids that a submission must hold, or None and why they are not known."""
    from pipeline.errors import CarvanaError
    from pipeline.workspace import expected_ids

    try:
        return expected_ids(), ""
    except CarvanaError as error:
        return None, str(error)


def _bar(words: str, ids: list[str] | None) -> Callable[[Iterator[Any]], Iterable[Any]]:
    from functools import partial

    from tqdm import tqdm

    return partial(tqdm, desc=words, total=ids and len(ids), unit="row", leave=False, disable=None)


def _ablate(options: argparse.Namespace) -> None:
    from pipeline.report import ablation_text

    if options.exps:
        from pipeline.report.experiments import show_experiments

        show_experiments()
    elif options.apply:
        ablation_text.apply_recommendation(options.split)
    elif options.best:
        ablation_text.show_recommendation(options.split)
    else:
        ablation_text.show_table(options.split)


def _results(options: argparse.Namespace) -> None:
    from pipeline.report.recipe_results import keep_results, show_results

    if options.keep:
        keep_results()
    if options.out or not options.keep:
        show_results(options.out)


def _tensorboard(options: argparse.Namespace) -> None:
    from pipeline.app.launch import serve_tensorboard

    serve_tensorboard(options.address, options.port)


def _app(options: argparse.Namespace) -> None:
    from pipeline.app.launch import serve_app

    serve_app(options.address, options.port)


def _segment(options: argparse.Namespace) -> None:
    from pipeline.segment.batch import segment_images

    changes = {"threshold": options.threshold, "merge": options.merge}
    segment_images(
        options.paths,
        options.out,
        names=options.net,
        views=options.views,
        changes={key: value for key, value in changes.items() if value is not None},
        write=options.write,
        overwrite=options.overwrite,
    )


def _part(text: str) -> float:
    """Return a number between 0 and 1, for argparse, which says what is wrong with another."""
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1 (exclusive)")
    return value


def _count(text: str) -> int:
    """Return a whole number from 0 on, for argparse, which says what is wrong with another."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not a whole number")
    return int(text)


def _export(options: argparse.Namespace) -> None:
    from pipeline.export.exporter import export_model

    export_model(options.model, options.fold, options.format, options.images)


def _summary(options: argparse.Namespace) -> None:
    from pipeline.repro import show_summary

    show_summary()


def _clean(options: argparse.Namespace) -> None:
    from pipeline.utils.run_state import delete_states, state_sizes
    from pipeline.workspace import project_root

    for slot, size in state_sizes(project_root()).items():
        print(f"{size / 1e6:8.1f} MB  {slot}")
    if options.yes:
        delete_states(project_root())
        print("Removed. Results in the project and in DVC's cache are as they were.")
    else:
        print("Results that DVC holds too take no room twice. 'carvana clean --yes' removes all of these.")
