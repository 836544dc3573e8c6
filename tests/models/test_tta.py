"""Test-time augmentation: each transform and its inverse."""

import pytest
import torch

from pipeline.errors import CarvanaError
from pipeline.models.tta import TTATransform


class TestTTATransform:
    @pytest.mark.parametrize("name", ["identity", "hflip"])
    def test_inverse_is_exact(self, name: str) -> None:
        pixels, view = torch.randn(2, 1, 32, 48), TTATransform.parse(name)
        assert torch.equal(view.deaugment(view.augment(pixels)), pixels)

    @pytest.mark.parametrize("name", ["scale:0.75", "scale:1.5", "hflip+scale:0.5"])
    def test_scales_do_not_shift(self, name: str) -> None:
        # A ramp of column numbers says where each pixel went: half-pixel centres keep every one in its place.
        height, width = 64, 96
        ramp = torch.arange(width, dtype=torch.float32).expand(1, 1, height, width).contiguous()
        view = TTATransform.parse(name)
        back = torch.nn.functional.interpolate(
            view.deaugment(view.augment(ramp)), (height, width), mode="bilinear", align_corners=False
        )
        inner = slice(8, -8)
        assert (back - ramp)[..., inner].abs().max() < 0.05

    def test_flip_mirrors_left_and_right_only(self) -> None:
        pixels = torch.arange(6.0).reshape(1, 1, 2, 3)
        assert TTATransform.parse("hflip").augment(pixels).flatten().tolist() == [2, 1, 0, 5, 4, 3]

    def test_scaled_sides_keep_their_ratio(self) -> None:
        assert TTATransform.parse("scale:0.75").augment(torch.zeros(1, 3, 1280, 1918)).shape[-2:] == (960, 1438)

    def test_unknown_view(self) -> None:
        with pytest.raises(CarvanaError, match="'vflip'"):
            TTATransform.parse("vflip")
