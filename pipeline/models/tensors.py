"""What resize.py does, for tensors on any device; which device and precision to use."""

import sys
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.config import Device, Precision
from pipeline.errors import CarvanaError, is_out_of_memory
from pipeline.models.resize import LOGIT_CLAMP, quantize_logits, upsample_and_quantize, upsample_logits
from pipeline.models.weights import first_line
from pipeline.utils.arrays import Float32Array, UInt8Array


def to_batch(inputs: list[UInt8Array], device: torch.device) -> Tensor:
    """Return inputs (h, w, C) as one uint8 tensor (B, C, h, w) in the device's fastest memory format."""
    batch_BCHW = torch.from_numpy(np.stack(inputs)).to(device).permute(0, 3, 1, 2)
    return batch_BCHW.contiguous(memory_format=memory_format(device))


def memory_format(device: torch.device) -> torch.memory_format:
    """Return channels_last for GPUs, and for CPUs with AVX2 or AVX-512, where oneDNN's convolutions are made for it."""
    if device.type == "cpu":
        # With narrower vector units it is slower, by up to a quarter.
        onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        fast = onednn and torch.backends.cpu.get_cpu_capability().startswith("AVX")
    else:
        fast = device.type == "cuda"
    return torch.channels_last if fast else torch.contiguous_format


def compile_or_eager(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return ``function`` compiled by torch for the shapes that it gets; if that fails, with one warning, as it is."""
    compiled: Callable[[Tensor], Tensor] | None = torch.compile(function, dynamic=False)

    def run(pixels_BCHW: Tensor) -> Tensor:
        nonlocal compiled
        if compiled is not None:
            try:
                return compiled(pixels_BCHW)
            except Exception as error:  # compilers and their tools raise errors of all kinds
                if is_out_of_memory(error):
                    raise
                compiled = None
                reason = f"{type(error).__name__}: {first_line(error)}"
                print(
                    f"warning: hardware.compile: the net can't be compiled ({reason}). It runs as it is.",
                    file=sys.stderr,
                )
        return function(pixels_BCHW)

    return run


def upsample_logits_tensor(logits_B1HW: Tensor, height: int, width: int) -> Tensor:
    """Return logits (B, height, width) in float32, clamped and then enlarged by bicubic interpolation."""
    logits_B1HW = logits_B1HW.float()
    if logits_B1HW.device.type == "cpu":
        # The same interpolation as torch's, nine times faster.
        upsampled = [upsample_logits(logits_HW.numpy(), height, width) for logits_HW in logits_B1HW[:, 0]]
        return torch.from_numpy(np.stack(upsampled)) if len(upsampled) > 1 else torch.from_numpy(upsampled[0])[None]
    logits_B1HW = logits_B1HW.clamp(-LOGIT_CLAMP, LOGIT_CLAMP)
    if logits_B1HW.shape[-2:] == (height, width):
        return logits_B1HW[:, 0]
    return functional.interpolate(logits_B1HW, (height, width), mode="bicubic", align_corners=False)[:, 0]


def quantize_logits_tensor(logits: Tensor) -> Tensor:
    """Return probabilities as uint8, rounded: 0 and 255 at the clamps and beyond, 128 from probability 0.5 on."""
    if logits.device.type != "cpu":
        return _quantize_tensor(logits)
    return torch.from_numpy(quantize_logits(logits.numpy(), _quantize_unclamped))


def upsample_and_quantize_tensor(logits_B1HW: Tensor, height: int, width: int) -> Tensor:
    """Return probabilities (B, height, width) as uint8: ``quantize_logits_tensor`` of ``upsample_logits_tensor``."""
    if logits_B1HW.device.type != "cpu":
        return quantize_logits_tensor(upsample_logits_tensor(logits_B1HW, height, width))
    maps = [upsample_and_quantize(x.numpy(), height, width, _quantize_unclamped) for x in logits_B1HW[:, 0].float()]
    return torch.from_numpy(np.stack(maps) if len(maps) > 1 else maps[0][None])


def _quantize_unclamped(logits: Float32Array) -> UInt8Array:
    return np.asarray(_quantize_tensor(torch.from_numpy(logits)))


def _quantize_tensor(logits: Tensor) -> Tensor:
    highest = torch.tensor(LOGIT_CLAMP).sigmoid().item()
    # Centered, so that a probability of 0.5 is 127.5 exactly, which rounds (to even) to 128.
    stretched = (logits.sigmoid() - 0.5).mul_(127.5 / (highest - 0.5)).add_(127.5)
    return stretched.clamp_(0, 255).round_().to(torch.uint8)


def resolve_device(wanted: Device) -> torch.device:
    """Return the device to run on; raises CarvanaError if a GPU is wanted and there is none."""
    if wanted == "gpu" and not torch.cuda.is_available():
        raise CarvanaError(
            "hardware.device is gpu, but torch finds none. Check the driver with nvidia-smi, "
            "or set hardware.device to auto or cpu."
        )
    if wanted == "mps" and not torch.backends.mps.is_available():
        raise CarvanaError("hardware.device is mps, but torch finds no Apple GPU. Set it to auto or cpu.")
    if wanted in ("gpu", "auto") and torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if wanted == "mps" else "cpu")


def resolve_precision(wanted: Precision, device: torch.device) -> torch.dtype:
    """Return the dtype of convolutions; ``auto`` takes the fastest that the device has units for.

    Raises CarvanaError for 16 on a CPU, where Lightning would train in another type than prediction runs in.
    """
    if wanted == "16" and device.type == "cpu":
        raise CarvanaError("precision: 16 needs a GPU. Set it to auto, bf16 or 32.")
    if wanted != "auto":
        return {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}[wanted]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    # On a processor without bf16 units, bf16 is emulated and slower than float32.
    return torch.bfloat16 if device.type == "cpu" and cpu_has_bf16() else torch.float32


def device_label(device: torch.device, dtype: torch.dtype) -> str:
    """Return device and dtype for people, such as ``Tesla T4 in float16``."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"the {device.type.upper()}"
    return f"{name} in {str(dtype).removeprefix('torch.')}"


def cpu_has_bf16() -> bool:
    """Return whether this processor has units for bf16 (AMX or AVX512-BF16)."""
    # torch has no public name for these yet; where one is missing, float32 is right if not fastest.
    tests = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in tests)
