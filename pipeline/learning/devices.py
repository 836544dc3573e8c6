"""Which device to run on, and in which precision."""

import torch

from pipeline.errors import CarvanaError
from pipeline.learning.settings import Device, Precision


def resolve_device(wanted: Device) -> torch.device:
    """Return the device to run on; raises CarvanaError if a GPU is asked for and there is none."""
    if wanted == "gpu" and not torch.cuda.is_available():
        raise CarvanaError(
            "A GPU is asked for (device: gpu), but torch sees none: check the driver with nvidia-smi, "
            "or set device to auto or cpu."
        )
    if wanted == "mps" and not torch.backends.mps.is_available():
        raise CarvanaError("Apple's GPU is asked for (device: mps), but torch sees none: set device to auto or cpu.")
    if wanted in ("gpu", "auto") and torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if wanted == "mps" else "cpu")


def resolve_precision(wanted: Precision, device: torch.device) -> torch.dtype:
    """Return the type that convolutions run in; ``auto`` takes the fastest that the device has units for.

    Raises CarvanaError for 16 on a CPU, where Lightning would train in another type than prediction runs in.
    """
    if wanted == "16" and device.type == "cpu":
        raise CarvanaError("precision: 16 needs a GPU: set it to auto, bf16 or 32.")
    if wanted != "auto":
        return {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}[wanted]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    # On a processor without bf16 units, bf16 is emulated and slower than float32.
    return torch.bfloat16 if device.type == "cpu" and cpu_has_bf16() else torch.float32


def device_label(device: torch.device, dtype: torch.dtype) -> str:
    """Return words for people, such as ``Tesla T4 in float16``."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"the {device.type.upper()}"
    return f"{name} in {str(dtype).removeprefix('torch.')}"


def cpu_has_bf16() -> bool:
    """Return whether this processor has units for bf16 (AMX or AVX512-BF16)."""
    # torch has no public name for these yet; where one is missing, float32 is right if not fastest.
    tests = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in tests)
