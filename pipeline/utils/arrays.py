"""Array types. The suffix of a variable's name gives its shape: ``image_HWC``, ``mask_HW``, ``pixels_BCHW``."""

import numpy as np
from numpy.typing import NDArray

UInt8Array = NDArray[np.uint8]
UnsignedArray = NDArray[np.unsignedinteger]
BoolArray = NDArray[np.bool_]
Float32Array = NDArray[np.float32]
Float64Array = NDArray[np.float64]

BoxSlices = tuple[slice, slice]
"""Rows and columns of a box within an image."""
