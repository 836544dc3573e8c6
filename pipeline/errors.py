"""Exceptions with messages for users, and how a command prints them."""

import errno
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

_LOW_DISK_BYTES = 32 << 20

_NO_MEMORY = re.compile(
    r"out of memory|not enough memory|unable to allocate|cannot allocate memory|bad_alloc|STATUS_ALLOC_FAILED"
    r"|CUDNN_STATUS_INTERNAL_ERROR|mmap.*Errno 12",
    re.IGNORECASE,
)
"""Messages of torch, NumPy, cuDNN and cuBLAS when memory runs out, often in a general exception class."""


class CarvanaError(Exception):
    """A problem that a user can fix; the message names the file, image or key at fault and says what to do.

    Commands print the message and exit with status 1. Any other exception that reaches a command is a bug.
    """


class CorruptFileError(CarvanaError):
    """The content of a file is not valid, so reading it again would fail again.

    Such a file may be skipped for good. A failing drive is another error, because the file may be fine.
    """


def report_errors(call: Callable[[], object], *, debug: bool) -> int:
    """Run ``call`` and return the exit status: 0, or after printing the error 1, or 130 for Ctrl-C.

    A reader that closes the pipe gives 141. ``debug`` raises errors instead of printing them.
    """
    try:
        call()
    except KeyboardInterrupt as stop:
        print(str(stop) or "Stopped. Run the same command to continue.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # as from 'carvana ... | head'
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
    # Libraries report a full disk in different ways, so check the disk itself too.
    if getattr(error, "errno", None) == errno.ENOSPC or shutil.disk_usage(Path.cwd()).free < _LOW_DISK_BYTES:
        return f"The disk is full ({error}). Free some space and run the same command again; finished work is kept."
    if isinstance(error, PermissionError):
        return f"Permission denied: {error.filename or error}. Change its permissions or its owner."
    kind = type(error).__name__
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError" or _NO_MEMORY.search(str(error)):
        return f"Out of memory ({error}). Lower train.batch_size, hardware.predict_batch or hardware.cache_gb."
    text = str(error)
    if "Traceback (most recent call last)" in text:  # from a worker process; the last line is its message
        kind, text = "in a worker", text.strip().splitlines()[-1]
    details = " ".join(f"{kind}: {text}".split())
    return f"Internal error ({details}). Run the same command with --debug for a traceback."
