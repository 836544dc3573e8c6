"""Test-time views of a picture, and the way back from what the net says of them. torch is loaded when it is used."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.errors import CarvanaError

if TYPE_CHECKING:
    from torch import Tensor
_SCALE = re.compile(r"scale:(\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class TTATransform:
    """A way to look at a picture: mirrored left to right or not, at a scale."""

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
                raise CarvanaError(f"There is no view '{name}': use identity, hflip, scale:0.75 or hflip+scale:0.75.")
        return cls(hflip, scale)

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width at which this view sees so many pixels."""
        return max(1, round(height * self.scale)), max(1, round(width * self.scale))

    def augment(self, pixels_BCHW: "Tensor") -> "Tensor":
        """Return floating pixels as this view sees them."""
        if self.scale != 1.0:
            from torch.nn import functional

            size = self.size(*pixels_BCHW.shape[-2:])
            # Half-pixel centres, so that nothing shifts; antialiased, so that nothing flickers when shrunk.
            pixels_BCHW = functional.interpolate(
                pixels_BCHW, size=size, mode="bilinear", align_corners=False, antialias=True
            )
        return pixels_BCHW.flip(-1) if self.hflip else pixels_BCHW

    def deaugment(self, logits_B1HW: "Tensor") -> "Tensor":
        """Return logits the right way round; their size is left to whoever grows them, who grows them once."""
        return logits_B1HW.flip(-1) if self.hflip else logits_B1HW
