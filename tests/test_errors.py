"""How errors are printed."""

import pytest

from pipeline.errors import report_errors


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
        RuntimeError("std::bad_alloc"),
        OSError(12, "Cannot allocate memory"),
        MemoryError("Unable to allocate 3.1 GiB for an array"),
    ],
)
def test_a_lack_of_memory_names_the_settings_to_lower(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert "train.batch_size" in printed(error, capsys)


def test_an_error_of_a_worker_is_one_line_without_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    text = "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File x\n"
    line = printed(RuntimeError(f"{text}Traceback (most recent call last):\nValueError: bad pixels"), capsys)
    assert "bad pixels" in line
    assert "Traceback" not in line
    assert line.count("\n") == 1
