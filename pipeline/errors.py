"""The exceptions that users are meant to read, and how they are printed."""

import errno
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

_LITTLE_SPACE = 32 << 20

_NO_MEMORY = re.compile(
    r"out of memory|not enough memory|unable to allocate|cannot allocate memory|bad_alloc|STATUS_ALLOC_FAILED"
    r"|CUDNN_STATUS_INTERNAL_ERROR|mmap.*Errno 12",
    re.IGNORECASE,
)
"""How torch, NumPy, cuDNN and cuBLAS report a lack of memory; many without an exception class of their own."""


class CarvanaError(Exception):
    """Something a user can fix: the message names the file, image or key at fault and says what to do.

    Commands print it as one line and exit with 1; anything else that escapes is a bug.
    """


class CorruptFileError(CarvanaError):
    """A file was read, and what it holds is not sound: reading it again would say the same.

    Apart from a drive that fails, since only this may be skipped, or replaced by a fallback, for good.
    """


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
    if getattr(error, "errno", None) == errno.ENOSPC or shutil.disk_usage(Path.cwd()).free < _LITTLE_SPACE:
        return f"The disk is full ({error}): free some space and run the same command again; what is done is kept."
    if isinstance(error, PermissionError):
        return f"Permission denied: {error.filename or error}. Change its permissions or its owner."
    kind = type(error).__name__
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError" or _NO_MEMORY.search(str(error)):
        return f"Out of memory ({error}): lower train.batch_size, hardware.predict_batch or hardware.cache_gb."
    text = str(error)
    if "Traceback (most recent call last)" in text:  # of another process: its last line says what went wrong
        kind, text = "in a worker", text.strip().splitlines()[-1]
    words = " ".join(f"{kind}: {text}".split())
    return f"Internal error ({words}). Run the same command with --debug to see where."
