"""How errors are printed."""

from concurrent.futures.process import BrokenProcessPool

import pytest

from pipeline.errors import CorruptFileError, original_error, report_errors


def printed(error: Exception, capsys: pytest.CaptureFixture[str]) -> str:
    def fail() -> None:
        raise error

    assert report_errors(fail, debug=False) == 1
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: not enough memory: you tried"),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a large input"),
        RuntimeError("GET was unable to find an engine to execute this computation"),
        RuntimeError("MPS backend out of memory (MPS allocated: 17.97 GB)"),
        RuntimeError("DataLoader worker (pid 51) is killed by signal: Killed."),
        RuntimeError("[ONNXRuntimeError] : 6 : Failed to allocate memory for requested buffer of size 39272"),
        RuntimeError("error: OpenCV(4.12.0) alloc.cpp:73: error: (-4:Insufficient memory) Failed to allocate 1 bytes"),
        BrokenProcessPool("A process in the process pool was terminated abruptly"),
        MemoryError(),
        RuntimeError("std::bad_alloc"),
        OSError(12, "Cannot allocate memory"),
        MemoryError("Unable to allocate 3.1 GiB for an array"),
    ],
)
def test_a_lack_of_memory_names_the_settings_to_lower(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert "train.batch_size" in printed(error, capsys)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("unable to allocate shared memory(shm) for file </torch_23_36_44>: No space left on device (28)"),
        RuntimeError("unable to write to file </torch_23_36_44>: No space left on device (28)"),
        RuntimeError("DataLoader worker (pid 5) is killed by signal: Bus error. Workers are out of shared memory."),
    ],
)
def test_a_lack_of_shared_memory_is_no_full_disk(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--shm-size" in printed(error, capsys)


def from_worker(raised: str) -> Exception:
    """Return what a DataLoader raises for an error of one of its workers."""
    stack = 'Traceback (most recent call last):\n  File "a.py", line 1, in f\n    f()\n    ~^^\n'
    return RuntimeError(f"Caught ValueError in DataLoader worker process 0.\nOriginal {stack}{raised}\n")


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        ("ValueError: bad pixels", ValueError("bad pixels")),
        ("pipeline.errors.CorruptFileError: 3 is truncated\nand so on", CorruptFileError("3 is truncated\nand so on")),
        (
            "PermissionError: [Errno 13] Permission denied: 'a: b.jpg'",
            PermissionError(13, "Permission denied", "a: b.jpg"),
        ),
        ("OSError: [Errno 28] No space left on device", OSError(28, "No space left on device")),
        ("cv2.error: OpenCV(4.12.0) bad size", RuntimeError("error: OpenCV(4.12.0) bad size")),
        ("UnicodeDecodeError: 'utf-8' codec", RuntimeError("UnicodeDecodeError: 'utf-8' codec")),
        ("AssertionError", AssertionError("")),
    ],
)
def test_an_error_of_a_worker_is_read_from_its_traceback(raised: str, expected: Exception) -> None:
    nested = RuntimeError(f"-- Process 1 terminated with the following error:\n{from_worker(raised)}")
    for error in (from_worker(raised), nested):
        original = original_error(error)
        assert type(original) is type(expected)
        assert str(original) == str(expected)


def test_an_error_of_this_process_stays() -> None:
    error = ValueError("bad pixels")
    assert original_error(error) is error
