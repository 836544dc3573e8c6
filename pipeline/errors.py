"""Exceptions with messages for users, and how a command prints them."""

import builtins
import contextlib
import errno
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

_LOW_DISK_BYTES = 32 << 20

_NO_MEMORY = re.compile(
    r"MemoryError|out of memory|not enough memory|insufficient memory|bad.?alloc|failed to allocate"
    r"|(unable to|can(no|')t) allocate"
    r"|STATUS_ALLOC_FAILED|CUDNN_STATUS_(INTERNAL_ERROR|NOT_SUPPORTED)|unable to find an engine"
    r"|killed by signal: Killed|signal SIGKILL|terminated abruptly",
    re.IGNORECASE,
)
"""Messages of libraries when memory runs out, often in a general class, and of processes that the system kills then."""

_NO_SHARED_MEMORY = re.compile(
    r"shared memory ?(\(shm\)|limit)|out of shared memory|/dev/shm|/torch_\d|\bbus error", re.IGNORECASE
)
"""Messages of torch when the memory for exchange between processes runs out."""


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


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error says that memory ran out, on this machine or a GPU, in whatever class it comes."""
    if isinstance(error, CarvanaError):
        return False
    return _NO_MEMORY.search(f"{type(error).__name__}: {error}") is not None


def original_error(error: Exception) -> Exception:
    """Return the error that another process raised, from the traceback in the message of ``error``.

    Processes that load images or train pass errors on as text, without classes and error numbers. Returns ``error``
    itself if its message has no traceback.
    """
    _, marker, trace = str(error).rpartition("Traceback (most recent call last):\n")
    # The lines of the stack are indented; what follows is the class and the message.
    raised = re.search(r"^([\w.]+)(?:: (.*))?\Z", trace.strip(), re.MULTILINE | re.DOTALL)
    if not marker or raised is None:
        return error
    module, _, name = raised[1].rpartition(".")
    text = raised[2] or ""
    numbered = re.match(r"\[Errno (\d+)\] (.*?)(?:: '(.*)')?$", text)
    if numbered and not module:
        return OSError(int(numbered[1]), numbered[2], numbered[3])
    kind = {__name__: globals(), "": vars(builtins)}.get(module, {}).get(name)
    if isinstance(kind, type) and issubclass(kind, Exception):
        with contextlib.suppress(TypeError):  # a class that takes more than a message
            return kind(text)
    return RuntimeError(f"{name}: {text}")


def _message(error: Exception) -> str:
    if isinstance(error, CarvanaError):
        return str(error)
    if _NO_SHARED_MEMORY.search(str(error)):
        return (
            f"Out of shared memory ({_one_line(error)}). Start the container with --shm-size=2g, or lower "
            "hardware.workers or train.devices."
        )
    if is_out_of_memory(error):
        return (
            f"Out of memory ({_one_line(error)}). Lower train.batch_size, hardware.predict_batch, hardware.workers or "
            "hardware.cache_gb."
        )
    # Libraries report a full disk in different ways, so check the disk itself too.
    if getattr(error, "errno", None) == errno.ENOSPC or shutil.disk_usage(Path.cwd()).free < _LOW_DISK_BYTES:
        return f"The disk is full ({error}). Free some space and run the same command again; finished work is kept."
    if isinstance(error, PermissionError):
        return f"Permission denied: {error.filename or error}. Change its permissions or its owner."
    details = f"{type(error).__name__}: {_one_line(error)}"
    return f"Internal error ({details}). Run the same command with --debug for a traceback."


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
