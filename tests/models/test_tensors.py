"""Devices and precisions."""

import pytest
import torch

from pipeline.errors import CarvanaError
from pipeline.models.tensors import (
    device_label,
    memory_format,
    quantize_logits_tensor,
    resolve_device,
    resolve_precision,
    upsample_and_quantize_tensor,
    upsample_logits_tensor,
)


class TestDevices:
    def test_half_precision_is_for_gpus(self) -> None:
        with pytest.raises(CarvanaError, match="precision: 16"):
            resolve_precision("16", torch.device("cpu"))

    def test_words(self) -> None:
        assert device_label(torch.device("cpu"), torch.bfloat16) == "the CPU in bfloat16"

    def test_no_gpu_where_one_was_asked_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(CarvanaError, match="-smi"):
            resolve_device("gpu")

    @pytest.mark.parametrize(
        ("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]
    )
    def test_auto_precision_on_gpus(
        self, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype
    ) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        assert resolve_precision("auto", torch.device("cuda")) == dtype

    @pytest.mark.parametrize(("amx", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
    def test_auto_precision_on_cpus(self, monkeypatch: pytest.MonkeyPatch, amx: bool, dtype: torch.dtype) -> None:
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
        assert resolve_precision("auto", torch.device("cpu")) == dtype

    @pytest.mark.parametrize(
        ("device", "capability", "onednn", "expected"),
        [
            ("cuda", "DEFAULT", False, torch.channels_last),
            ("mps", "AVX2", True, torch.contiguous_format),
            ("cpu", "AVX2", True, torch.channels_last),
            ("cpu", "AVX512", True, torch.channels_last),
            ("cpu", "AVX2", False, torch.contiguous_format),
            ("cpu", "DEFAULT", True, torch.contiguous_format),
            ("cpu", "NO AVX", True, torch.contiguous_format),
        ],
    )
    def test_memory_format(
        self,
        monkeypatch: pytest.MonkeyPatch,
        device: str,
        capability: str,
        onednn: bool,
        expected: torch.memory_format,
    ) -> None:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)
        assert memory_format(torch.device(device)) == expected


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("size", [(20, 30), (160, 240), (71, 95)])
def test_upsampling_and_quantizing_at_once_is_the_same_as_in_two_steps(count: int, size: tuple[int, int]) -> None:
    logits_B1HW = 4 * torch.randn(count, 1, 20, 30, generator=torch.Generator().manual_seed(0))
    probs_BHW = upsample_and_quantize_tensor(logits_B1HW, *size)
    assert probs_BHW.equal(quantize_logits_tensor(upsample_logits_tensor(logits_B1HW, *size)))
