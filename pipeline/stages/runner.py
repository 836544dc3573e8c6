"""What every command of the pipeline does around its one call: arguments, settings, errors in words."""

import argparse
import errno
import inspect
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.config import read_params
from pipeline.errors import CarvanaError
from pipeline.utils.run_state import STATE_DIR, file_lock

_TOO_LITTLE = 32 << 20
_CHOICES = {"split": ("oof", "holdout", "test")}


def run_stage(run: Callable[..., None], words: str | None, arguments: Sequence[str] | None = None) -> None:
    """Run a stage as a program: its parameters after ``params`` are its options.

    ``arguments`` are those of the command line by default. Ends the process with the exit status.
    """
    parser = argparse.ArgumentParser(prog=f"carvana stage {_stage_name(run)}", description=words)
    for name, parameter in list(inspect.signature(run).parameters.items())[1:]:
        parser.add_argument(
            f"--{name}", required=True, type=parameter.annotation, choices=_CHOICES.get(name), help=f"which {name}"
        )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options = vars(parser.parse_args(arguments))
    debug = options.pop("debug")
    words = " ".join([_stage_name(run), *map(str, options.values())])

    def call() -> None:
        # A killed dvc leaves its stage running, maybe with other settings than now: it must not publish over this one.
        with file_lock(Path(STATE_DIR) / "running" / f"{words.replace(' ', '-')}.lock", words):
            run(read_params(), **options)

    sys.exit(report_errors(call, debug=debug))


def report_errors(call: Callable[[], object], *, debug: bool) -> int:
    """Return 0 when ``call`` ends well; else print what went wrong in a sentence, and return the exit status."""
    try:
        call()
    except KeyboardInterrupt as stop:
        print(str(stop) or "Stopped. The same command goes on from here.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # of 'head' and the like, that have seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if debug:
            raise
        print(f"error: {_message(error)}", file=sys.stderr)
        return 1
    return 0


def _message(error: Exception) -> str:
    if isinstance(error, CarvanaError):
        return str(error)
    # Libraries report a full disk each in their own way, so look for oneself.
    if getattr(error, "errno", None) == errno.ENOSPC or shutil.disk_usage(Path.cwd()).free < _TOO_LITTLE:
        return f"The disk is full ({error}): free some space and run the same command again; what is done is kept."
    if isinstance(error, PermissionError):
        return f"Permission denied: {error.filename or error}. Change its permissions or its owner."
    kind = type(error).__name__
    if kind in ("OutOfMemoryError", "MemoryError"):
        return f"Out of memory ({error}): lower train.batch_size, hardware.predict_batch or hardware.cache_gb."
    words = " ".join(f"{kind}: {error}".split())
    return f"Internal error ({words}). Run the same command with --debug to see where."


def _stage_name(run: Callable[..., Any]) -> str:
    return Path(inspect.getfile(run)).stem
