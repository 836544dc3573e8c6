"""The ``carvana`` command line. Each command parses its options and makes one call.

Modules are imported by the command that needs them, so that the program starts quickly.
"""

import functools
import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

_RENAMED = {"predict": "segment"}
"""New names of renamed commands."""

_MULTI_VALUE_OPTIONS = {"--net", "--views", "--write", "--format"}
"""Options that take several values: ``--net a b``."""

_RUN, _INSPECT, _KAGGLE, _NETS = "Run", "Inspect", "Kaggle", "Nets"

app = typer.Typer(
    help="Carvana image masking, from the competition's files to a submission.",
    epilog="Run one stage by itself: carvana stage train --help",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
stages = typer.Typer(help="Run a single stage of dvc.yaml.", no_args_is_help=True)
app.add_typer(stages, name="stage", rich_help_panel=_RUN)

_debug = False


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command, by default that of ``sys.argv``, and exit with its status.

    0: success. 1: error. 2: wrong usage. 130: stopped by Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # for terminals that are ASCII only
    given = list(sys.argv[1:] if arguments is None else arguments)
    if arguments is None:
        _prefer_code_of_working_folder(given)
    if given and given[0] in _RENAMED:
        print(f"error: 'carvana {given[0]}' is now 'carvana {_RENAMED[given[0]]}'.", file=sys.stderr)
        sys.exit(2)
    # --debug goes first, wherever it was given, because repro passes the options after it on to DVC.
    given.sort(key=lambda argument: argument != "--debug")
    app(_repeat_options(given), prog_name="carvana")


def _prefer_code_of_working_folder(arguments: list[str]) -> None:
    """Restart with the code in the working folder, if that is another copy of the project.

    DVC runs queued experiments in copies of the project, whose code may differ.
    """
    here = Path("pipeline/cli.py").resolve()
    if here.is_file() and here != Path(__file__).resolve():
        os.execv(sys.executable, [sys.executable, "-m", "pipeline.cli", *arguments])


def _repeat_options(arguments: Iterable[str]) -> list[str]:
    """Turn ``--net a b`` into ``--net a --net b``, as Typer expects it."""
    repeated: list[str] = []
    option, has_value = None, False
    for argument in arguments:
        if argument.startswith("-"):
            option, has_value = argument if argument in _MULTI_VALUE_OPTIONS else None, False
        elif option and has_value:
            repeated.append(option)
        else:
            has_value = True
        repeated.append(argument)
    return repeated


def _command(
    name: str, panel: str | None = None, group: typer.Typer = app, *, anywhere: bool = False, **options: Any
) -> Callable[[Any], Any]:
    """Register a command. Its errors are printed without a traceback and set the exit status.

    Unless ``anywhere``, it is an error to run the command outside the project's folder. ``options`` are Typer's.
    """

    def register(call: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(call)
        def checked(*args: Any, **kwargs: Any) -> None:
            from pipeline.errors import report_errors

            def run() -> None:
                if not anywhere:
                    _check_folder()
                call(*args, **kwargs)

            status = report_errors(run, debug=_debug)
            if status:
                raise typer.Exit(status)

        return group.command(name, rich_help_panel=panel, **options)(checked)

    return register


def _check_folder() -> None:
    """Raise CarvanaError outside the project's folder."""
    from pipeline.errors import CarvanaError

    folder = Path.cwd()
    if not (folder / "params.yaml").is_file():
        projects = [str(parent) for parent in folder.parents if (parent / "params.yaml").is_file()]
        raise CarvanaError(f"{folder} has no params.yaml. Run this in {[*projects, 'the folder of the project'][0]}.")


@app.callback()
def _global_options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    global _debug
    _debug = debug


_FORWARDED = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}


@_command("repro", _RUN, context_settings=_FORWARDED)
def _repro(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[DVC OPTIONS]", help="Options of dvc repro, such as -f or a stage.")
    ] = None,
) -> None:
    """Check DVC's files, run dvc repro, and show the scores."""
    from pipeline.report.summary import show_summary
    from pipeline.repro import repro

    if repro(arguments or []):
        show_summary()


def _recipe_names() -> list[str]:
    from pipeline.recipes import recipe_names

    return list(recipe_names())


@_command("recipe", _RUN)
def _recipe(
    name: Annotated[
        str | None, typer.Argument(help="Without it: list the recipes.", autocompletion=_recipe_names)
    ] = None,
) -> None:
    """Apply a recipe to params.yaml and show what changed."""
    from pipeline.recipes import apply_recipe, recipe_names
    from pipeline.utils.terminal import print_table

    if name is None:
        print_table(["recipe", "purpose"], list(recipe_names().items()))
    else:
        print("\n".join(apply_recipe(name)) or "Nothing changed.")


@_command("clean", _RUN)
def _clean(yes: Annotated[bool, typer.Option("--yes", help="Delete it, including unfinished work.")] = False) -> None:
    """Show or delete cached run state."""
    from pipeline.utils.run_state import delete_states, state_sizes
    from pipeline.utils.terminal import print_table
    from pipeline.workspace import project_root

    sizes = state_sizes(project_root())
    if not sizes:
        print("There is no run state.")
        return
    print_table(["MB", "run state"], [(f"{size / 1e6:.1f}", task) for task, size in sizes.items()], right=["MB"])
    if yes:
        delete_states(project_root())
        print("Deleted. Results in the project and in DVC's cache are kept.")
    else:
        print("Results that are also in DVC's cache take no extra space. 'carvana clean --yes' deletes all of these.")


_Csv = Annotated[Path, typer.Argument(metavar="CSV")]
_SUBMISSION = Path("submissions/submission.csv.gz")


@_command("check", _INSPECT, anywhere=True)
def _check(csv: _Csv = _SUBMISSION) -> None:
    """Validate a submission CSV: every image once, every run-length code valid."""
    from pipeline.submission.validation import validate_submission

    ids, reason = _expected_ids()
    report = validate_submission(csv, ids, _progress("Checking", ids))
    print(f"{csv} is valid: {report.rows} images, each once; {report.empty} with an empty mask.")
    if reason:
        print(f"Image ids were not checked, because the competition's files are not available: {reason}")
    least, mean, most = report.coverage_min, report.coverage_mean, report.coverage_max
    print(f"Mask coverage: {least:.1%} to {most:.1%}, {mean:.1%} on average.")
    print(f"SHA-256 of the content: {report.sha256}")
    for warning in report.warnings:
        print(f"warning: {warning}", file=sys.stderr)


@_command("score", _INSPECT, anywhere=True)
def _score(
    csv: _Csv, truth: Annotated[Path, typer.Option(metavar="CSV", help="True masks, in the same format.")]
) -> None:
    """Score a submission CSV against true masks, as Kaggle does."""
    from pipeline.submission.validation import score_submission

    result = score_submission(csv, truth, _progress("Scoring", _expected_ids()[0]))
    worst = min(result.dice, key=result.dice.__getitem__)
    print(f"Dice {result.mean:.6f}  IoU {result.mean_iou:.6f}  accuracy {result.mean_accuracy:.6f}")
    print(f"{len(result.counts)} images; the worst is {worst} with {result.dice[worst]:.6f}.")


def _expected_ids() -> tuple[list[str] | None, str]:
    """Return the image ids that a submission must contain, or None and the reason why they are unknown."""
    from pipeline.errors import CarvanaError
    from pipeline.workspace import expected_ids

    try:
        return expected_ids(), ""
    except CarvanaError as error:
        return None, str(error)


def _progress(label: str, ids: list[str] | None) -> Callable[[Iterator[Any]], Iterable[Any]]:
    from tqdm import tqdm

    return functools.partial(tqdm, desc=label, total=ids and len(ids), unit="row", leave=False, disable=None)


@_command("summary", _INSPECT)
def _summary() -> None:
    """Show the scores of the last run."""
    from pipeline.report.summary import show_summary

    show_summary()


@_command("ablate", _INSPECT)
def _ablate(
    best: Annotated[bool, typer.Option("--best", help="Print the recommended setting.")] = False,
    apply: Annotated[bool, typer.Option("--apply", help="Write the recommended setting to params.yaml.")] = False,
    exps: Annotated[
        bool, typer.Option("--exps", help="Compare the experiments of 'dvc exp run' with this workspace.")
    ] = False,
    split: Annotated[
        Literal["oof", "holdout"] | None,
        typer.Option(help="One split only. --apply uses held-out cars by default."),
    ] = None,
) -> None:
    """Show ablation results: views, folds, models, merging and threshold."""
    if best + apply + exps > 1:
        raise typer.BadParameter("give one of --best, --apply and --exps")
    from pipeline.report import recommendation

    if exps:
        from pipeline.report.experiments import show_experiments

        show_experiments()
    elif apply:
        recommendation.apply_recommendation(split)
    elif best:
        recommendation.show_recommendation(split)
    else:
        recommendation.show_table(split)


@_command("results", _INSPECT)
def _results(
    keep: Annotated[bool, typer.Option("--keep", help="Keep this run's figures in docs/results/.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the table to a file.")] = None,
) -> None:
    """Compare the results of runs."""
    from pipeline.report.recipe_results import keep_results, show_results

    if keep:
        keep_results()
    if out or not keep:
        show_results(out)


_Port = Annotated[int, typer.Option(metavar="N", help="Port to listen on.")]
_Address = Annotated[str, typer.Option(metavar="A", help="Address to listen on. The default is this machine only.")]


@_command("tensorboard", _INSPECT)
def _tensorboard(port: _Port = 6006, address: _Address = "127.0.0.1") -> None:
    """Start TensorBoard: training curves and prediction images."""
    from pipeline.app.launch import serve_tensorboard

    serve_tensorboard(address, port)


@_command("app", _INSPECT)
def _app(port: _Port = 8501, address: _Address = "127.0.0.1") -> None:
    """Start the web app: segment images, compare settings, list submissions."""
    from pipeline.app.launch import serve_app

    serve_app(address, port)


@_command("download", _KAGGLE)
def _download(
    check: Annotated[bool, typer.Option("--check", help="Check your setup without downloading anything.")] = False,
) -> None:
    """Download (or draw) the competition's files, and verify them."""
    from pipeline.config import read_params
    from pipeline.repro import provide_data
    from pipeline.workspace import project_root

    settings = read_params().data
    if check:
        from pipeline.kaggle.commands import preview_competition

        preview_competition(settings, project_root())
    else:
        source = provide_data(settings, project_root(), thorough=True)
        print(f"The competition's files are in {source.directory}{', verified' if settings.is_from_kaggle else ''}.")


@_command("submit", _KAGGLE)
def _submit(
    message: Annotated[str, typer.Option("-m", "--message", metavar="TEXT", help="What this submission is.")],
    csv: _Csv = _SUBMISSION,
    again: Annotated[
        bool, typer.Option("--again", help="Submit even if the same content was submitted before.")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the score.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Do everything except submit.")] = False,
) -> None:
    """Validate a CSV, submit it to Kaggle, and log it in submissions/ledger.csv."""
    from pipeline.config import read_params
    from pipeline.kaggle.commands import submit
    from pipeline.workspace import project_root

    submit(csv, message, read_params().data, project_root(), again=again, wait=wait, dry_run=dry_run)


@_command("submissions", _KAGGLE)
def _submissions(json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False) -> None:
    """List submissions with current scores from Kaggle."""
    from pipeline.config import read_params
    from pipeline.kaggle.commands import show_submissions

    show_submissions(read_params().data, as_json=json)


@_command("leaderboard", _KAGGLE)
def _leaderboard(
    score: Annotated[float | None, typer.Argument(help="By default the best score in the ledger.")] = None,
    public: Annotated[bool, typer.Option("--public", help="Use the public leaderboard.")] = False,
) -> None:
    """Show the rank of a score on Kaggle's leaderboard."""
    from pipeline.config import read_params
    from pipeline.kaggle.commands import show_leaderboard

    show_leaderboard(read_params().data, score, public=public)


def _probability(value: float | None) -> float | None:
    if value is not None and not 0 < value < 1:
        raise typer.BadParameter(f"{value:g} is not between 0 and 1 (exclusive)")
    return value


def _mask_formats(names: list[str]) -> list[str]:
    from pipeline.segment.batch import RLE
    from pipeline.segment.outputs import MASK_FORMATS

    known = (*MASK_FORMATS, RLE)
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"{name!r} is not one of {', '.join(known)}")
    return names


@_command("segment", _NETS, anywhere=True)
def _segment(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Images, or folders of images.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the results go.")],
    net: Annotated[
        list[str],
        typer.Option(
            metavar="NAME...",
            help="model/fold, a model with all its folds, a net's folder, an .onnx file, or ensemble.",
        ),
    ] = ["ensemble"],  # noqa: B006 - the help shows a list as default
    views: Annotated[list[str] | None, typer.Option(metavar="VIEW...", help="By default predict.tta.test.")] = None,
    threshold: Annotated[
        float | None, typer.Option(metavar="P", help="By default ensemble.threshold.", callback=_probability)
    ] = None,
    merge: Annotated[
        Literal["mean_probability", "mean_logit", "majority_vote"] | None,
        typer.Option(help="By default ensemble.merge."),
    ] = None,
    write: Annotated[
        list[str],
        typer.Option(
            metavar="KIND...",
            help="Any of mask, overlay, cutout, and rle (one CSV for all images).",
            callback=_mask_formats,
        ),
    ] = ["mask"],  # noqa: B006
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing results.")] = False,
) -> None:
    """Segment your own images: JPEG, PNG or WebP of any size."""
    from pipeline.segment.batch import segment_images

    changes = {"threshold": threshold, "merge": merge}
    segment_images(
        paths,
        out,
        names=net,
        views=views,
        changes={key: value for key, value in changes.items() if value is not None},
        write=write,
        overwrite=overwrite,
    )


@_command("export", _NETS)
def _export(
    model: Annotated[str, typer.Argument(help="A trained model, such as small.")],
    fold: Annotated[int | None, typer.Option(metavar="N", help="By default the first active fold.")] = None,
    format: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME...", help="Any of hub, torchscript, torch-export, onnx, int8, ensemble. By default all."
        ),
    ] = None,
    images: Annotated[int, typer.Option(metavar="N", min=0, help="Images to calibrate int8 on.")] = 32,
) -> None:
    """Export a trained net to exports/MODEL/ and verify each file."""
    from pipeline.export.exporter import export_model

    export_model(model, fold, format, images)


_Model = Annotated[str, typer.Option(help="A model of models.specs.")]
_Fold = Annotated[int, typer.Option(metavar="N", help="A fold of folds.csv.")]


def _run_stage(name: str, **options: Any) -> None:
    """Run a stage. Wait if it is already running, as after a killed dvc, so that two runs never write one output."""
    from importlib import import_module

    from pipeline.config import read_params
    from pipeline.utils.run_state import STATE_DIR, file_lock

    label = " ".join([name, *map(str, options.values())])
    with file_lock(Path(STATE_DIR) / "running" / f"{label.replace(' ', '-')}.lock", label):
        import_module(f"pipeline.stages.{name}").run(read_params(), **options)


@_command("download", group=stages)
def _stage_download() -> None:
    """Download (or draw) the competition's files and describe them in data/manifest.json."""
    _run_stage("download")


@_command("folds", group=stages)
def _stage_folds() -> None:
    """Assign cars to folds: folds/folds.csv."""
    _run_stage("folds")


@_command("initial_weights", group=stages)
def _stage_initial_weights() -> None:
    """Record which weights files nets start from: data/weights.json."""
    _run_stage("initial_weights")


@_command("train", group=stages)
def _stage_train(model: _Model, fold: _Fold) -> None:
    """Train one net: folds/MODEL/FOLD/."""
    _run_stage("train", model=model, fold=fold)


@_command("predict", group=stages)
def _stage_predict(
    model: _Model,
    fold: _Fold,
    split: Annotated[Literal["oof", "holdout", "test"], typer.Option(help="Images to predict.")],
) -> None:
    """Predict the images of one split with one net: predictions/SPLIT/MODEL/FOLD/."""
    _run_stage("predict", model=model, fold=fold, split=split)


@_command("evaluate", group=stages)
def _stage_evaluate() -> None:
    """Score the nets and the ensemble on cars with masks: reports/evaluation.json."""
    _run_stage("evaluate")


@_command("ensemble", group=stages)
def _stage_ensemble() -> None:
    """Merge the test predictions: submissions/submission.csv.gz."""
    _run_stage("ensemble")


@_command("ablate", group=stages)
def _stage_ablate() -> None:
    """Score all ensemble settings: reports/ablation.csv."""
    _run_stage("ablate")


@_command("report", group=stages)
def _stage_report() -> None:
    """Write the report: reports/index.html and reports/metrics.json."""
    _run_stage("report")


if __name__ == "__main__":
    main(sys.argv[1:])
