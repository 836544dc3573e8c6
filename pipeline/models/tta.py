"""Test-time augmentation: the views of an image, and how their logits are turned back. Imports torch when used."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.errors import CarvanaError

if TYPE_CHECKING:
    from torch import Tensor
_SCALE = re.compile(r"scale:(\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class TTATransform:
    """One view of an image: flipped left to right or not, at a scale."""

    hflip: bool = False
    scale: float = 1.0

    @classmethod
    def parse(cls, name: str) -> "TTATransform":
        """Return the view that ``identity``, ``hflip``, ``scale:0.75`` or ``hflip+scale:0.75`` names."""
        hflip, scale = False, 1.0
        for word in name.split("+"):
            match = _SCALE.fullmatch(word)
            if match:
                scale = float(match[1])
            elif word == "hflip":
                hflip = True
            elif word != "identity":
                raise CarvanaError(f"Unknown view '{name}'. Use identity, hflip, scale:0.75 or hflip+scale:0.75.")
        return cls(hflip, scale)

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width of this view of an image."""
        return max(1, round(height * self.scale)), max(1, round(width * self.scale))

    def augment(self, pixels_BCHW: "Tensor") -> "Tensor":
        """Return this view of floating pixels (B, C, H, W)."""
        if self.scale != 1.0:
            from torch.nn import functional

            size = self.size(*pixels_BCHW.shape[-2:])
            # Half-pixel centers, so that nothing shifts; antialiased, since it may shrink.
            pixels_BCHW = functional.interpolate(
                pixels_BCHW, size=size, mode="bilinear", align_corners=False, antialias=True
            )
        return pixels_BCHW.flip(-1) if self.hflip else pixels_BCHW

    def deaugment(self, logits_B1HW: "Tensor") -> "Tensor":
        """Return logits with the flip undone. Their size stays: they are enlarged once, later."""
        return logits_B1HW.flip(-1) if self.hflip else logits_B1HW
