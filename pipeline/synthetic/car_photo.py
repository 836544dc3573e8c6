"""Render synthetic cars in a studio: a small renderer that returns an image and its exact mask.

Studio coordinates are in meters: X to the right, Y away from the camera, Z up, with the origin on the floor at the
center of the turntable. The camera looks along Y, so vertical lines stay vertical.
"""

from dataclasses import dataclass
from functools import cache, lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.competition.image_ids import ANGLES, HEIGHT, WIDTH
from pipeline.synthetic.car_design import design_car
from pipeline.synthetic.car_shape import Triangles, build_car
from pipeline.synthetic.car_texture import paint_texture
from pipeline.utils.arrays import Float32Array, UInt8Array

Points3D = NDArray[np.float64]

MARGIN = 24
"""Pixels by which the painted studio is larger than an image on each side, so that images can be shifted."""

_FOCAL, _DISTANCE, _EYE = 2600.0, 8.6, 1.52  # pixels; meters from the turntable's center; meters above the floor
_CENTER_X, _HORIZON = WIDTH / 2, 372.0  # pixels
_TURNTABLE = 3.35  # radius in meters
_CHUNK = 16384  # pixels shaded at once: few enough for the CPU cache


@dataclass(frozen=True)
class CameraSetup:
    """Position of the car and settings of the camera, which are the same for all angles of one car."""

    turn: float
    """Angle of the car on the turntable at position 1, in radians; 0 if it faces the camera."""
    offset: tuple[float, float]
    """Meters from the turntable's center, to the right and away from the camera."""
    shift: tuple[int, int]
    """Pixels by which the image is shifted, right and down; at most ``MARGIN``."""
    gain: tuple[float, float, float]
    """Factors of red, green and blue, for exposure and white balance."""


def draw_car(seed: int, index: int) -> list[tuple[UInt8Array, UInt8Array]]:
    """Return image and mask of car ``index`` of the sample with this ``seed``, at each of the 16 angles.

    Images are uint8 RGB (1280, 1918, 3). Masks are uint8 (1280, 1918): 1 where the car was drawn, else 0.
    """
    design = design_car(seed, index)
    mesh, texture = build_car(design), paint_texture(design)
    rng = np.random.default_rng((seed, 2, index))
    right, down = (int(value) for value in rng.integers(-MARGIN, MARGIN + 1, 2))
    light, warmth = 1 + rng.uniform(-0.05, 0.03), rng.uniform(-0.012, 0.012)
    camera = CameraSetup(
        turn=rng.uniform(-0.05, 0.05),
        offset=(rng.uniform(-0.08, 0.08), rng.uniform(-0.12, 0.12)),
        shift=(right, down),
        gain=(light + warmth, light, light - warmth),
    )
    return [render_photo(mesh, texture, camera, angle, rng) for angle in range(1, ANGLES + 1)]


def render_photo(
    mesh: Triangles, texture_HW4: UInt8Array, camera: CameraSetup, angle: int, rng: np.random.Generator
) -> tuple[UInt8Array, UInt8Array]:
    """Return image and mask of a car at a turntable angle: 1 shows its front, 5 its left side; up to 16.

    The image is uint8 RGB (1280, 1918, 3), the mask uint8 of 0 and 1, (1280, 1918).
    """
    turn = (angle - 1) * 2 * np.pi / ANGLES + camera.turn
    forward, left = [-np.sin(turn), -np.cos(turn), 0.0], [np.cos(turn), -np.sin(turn), 0.0]
    to_studio = np.array([forward, left, [0.0, 0.0, 1.0]])
    corners = mesh.corners_T33 @ to_studio + np.array([*camera.offset, 0.0])
    normals = mesh.normals_T33 @ to_studio

    image = _exposed_studio(camera).copy()
    _cast_shadow(image, corners, camera)
    visible, ids = _rasterize(corners, mesh.depth_offset_T, camera)
    # Within a triangle, normal and texture position are linear in the pixel's x and y.
    pixels = np.concatenate([_project(corners[visible], camera), np.ones((len(visible), 3, 1))], axis=2)
    surface = np.linalg.solve(pixels, np.concatenate([normals[visible], mesh.uv_T32[visible]], axis=2))
    _paint_car(image, ids, surface.astype(np.float32), texture_HW4, camera)
    y, x = rng.integers(0, _NOISE_MARGIN, 2)
    noise = _sensor_noise()[y : y + HEIGHT, x : x + WIDTH]
    noisy = np.asarray(cv2.add(image, noise, dtype=cv2.CV_8U), np.uint8)
    return noisy, (ids > 0).astype(np.uint8)


def _project(points: Points3D, camera: CameraSetup) -> Points3D:
    """Project studio points (..., 3) to pixel coordinates (..., 2); pixel centers have whole numbers."""
    depth = points[..., 1] + _DISTANCE
    x = _CENTER_X + camera.shift[0] + _FOCAL * points[..., 0] / depth
    y = _HORIZON + camera.shift[1] - _FOCAL * (points[..., 2] - _EYE) / depth
    return np.stack([x, y], axis=-1)


# ---------------------------------------------------------------- studio

_SIGN = "EXAMPLE"
_LETTERS: dict[str, list[list[tuple[float, float]]]] = {
    "E": [[(0, -1), (0, 2)], [(-1, 0), (2, 0)], [(-1, 0.5), (2, 0.5)], [(-1, 1), (2, 1)]],
    "X": [[(-0.5, -0.5), (1.5, 1.5)], [(1.5, -0.5), (-0.5, 1.5)]],
    "A": [[(-0.5, 2), (0.5, 0), (1.5, 2)]],
    "M": [[(0, -1), (0, 2)], [(1, -1), (1, 2)], [(0, 0), (0.5, 0.7), (1, 0)]],
    "P": [[(0, -1), (0, 2)], [(-1, 0), (0.8, 0), (1, 0.12), (1, 0.45), (0.8, 0.57), (0, 0.57)]],
    "L": [[(0, -1), (0, 2)], [(-1, 1), (2, 1)]],
}
"""Strokes of the letters on the wall, in a unit square with y downwards; what is outside is cut off."""

_NOISE_MARGIN = 256  # pixels by which the array of noise is larger than an image


@cache
def _studio() -> UInt8Array:
    """Return the empty studio, uint8 RGB (1280 + 2m, 1918 + 2m, 3) with m = ``MARGIN``; painted once per process."""
    height, width = HEIGHT + 2 * MARGIN, WIDTH + 2 * MARGIN
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    across = (x - width / 2) / (width / 2)
    seam = 440 + MARGIN + 16 * across**2  # row where the floor, which curves up the wall, ends

    wall = 240 + 10 * np.exp(-(((y - seam) / 160) ** 2)) - 5 * across**2 + 4 * (y / seam)
    sign = np.where(y > seam - 2, 0, _sign(height, width)) / np.float32(255)
    wall = wall * (1 - sign) + 88 * sign
    wall_HW3 = wall[..., None] * np.array([0.998, 1.0, 0.998], np.float32)

    depth = _FOCAL * _EYE / np.maximum(y - MARGIN - _HORIZON, 1)
    radius = np.hypot((x - MARGIN - _CENTER_X) * depth / _FOCAL, depth - _DISTANCE)
    turntable = np.clip((_TURNTABLE - radius) / 0.02, 0, 1)[..., None]
    rim = np.exp(-(((radius - _TURNTABLE) / 0.018) ** 2))
    rng = np.random.default_rng(0)
    stains, streaks = (
        cv2.resize(rng.standard_normal(size, np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
        for size in ((34, 25), (220, 90))
    )
    floor = 184 + 12 * np.exp(-(((y - 760) / 260) ** 2)) - 10 * across**2
    cool, warm = np.array([0.975, 0.992, 1.0], np.float32), np.array([1.0, 0.995, 0.965], np.float32)
    floor_HW3 = floor[..., None] * (cool + (warm - cool) * turntable)
    floor_HW3 += (1.6 * stains + 0.9 * streaks - 45 * rim)[..., None]

    above = np.clip(seam - y + 0.5, 0, 1)[..., None]
    studio = wall_HW3 * above + floor_HW3 * (1 - above)
    studio *= (1 - 0.035 * (across**2 + (2 * y / height - 1) ** 2))[..., None]  # vignette
    return np.asarray(np.clip(np.round(cv2.GaussianBlur(studio, (0, 0), 0.8)), 0, 255), np.uint8)


def _sign(height: int, width: int) -> UInt8Array:
    """Return the letters on the wall, uint8 (height, width), 0 to 255: thin ones, then bold ones."""
    sign = np.zeros((height, width), np.uint8)
    for index, letter in enumerate(_SIGN):
        stroke = 22 if index < 3 else 50
        canvas = np.zeros((215 + stroke, 165 + stroke), np.uint8)
        for points in _LETTERS[letter]:
            sixteenths = np.round((np.array(points) * (165, 215) + stroke / 2) * 16).astype(np.int32)
            cv2.polylines(canvas, [sixteenths], False, 255, stroke, cv2.LINE_AA, 4)
        left = 95 + MARGIN + 254 * index
        top = round(217 + MARGIN + 14 * ((left + 90) / (width / 2) - 1) ** 2) - stroke // 2
        sign[top : top + canvas.shape[0], left : left + canvas.shape[1]] = canvas
    return sign


@lru_cache(maxsize=1)
def _exposed_studio(camera: CameraSetup) -> UInt8Array:
    """Return the empty studio as photographed by ``camera``: uint8 RGB (1280, 1918, 3), shared, so do not modify it."""
    left, top = MARGIN - camera.shift[0], MARGIN - camera.shift[1]
    scaled = np.round(np.arange(256)[:, None] * np.array(camera.gain))
    table = np.clip(scaled, 0, 255).astype(np.uint8)[None]
    return np.asarray(cv2.LUT(_studio()[top : top + HEIGHT, left : left + WIDTH], table), np.uint8)


@cache
def _sensor_noise() -> NDArray[np.int8]:
    """Return noise, int8 (1280 + 256, 1918 + 256, 3), of which each image uses a random window."""
    size = (HEIGHT + _NOISE_MARGIN, WIDTH + _NOISE_MARGIN, 3)
    white = np.random.default_rng(1).standard_normal(size, np.float32)
    return np.round(cv2.GaussianBlur(white * 2.2, (0, 0), 0.7)).astype(np.int8)


def _cast_shadow(image_HWC: UInt8Array, corners_T33: Points3D, camera: CameraSetup) -> None:
    """Darken the floor under and around the car, in place."""
    shrink = 8  # soft shadows need less resolution
    below = corners_T33.mean(axis=1) * [1, 1, 0]
    touching = corners_T33[..., 2].min(axis=1) < 0.03
    shadow = np.zeros((HEIGHT // shrink, -(-WIDTH // shrink)), np.float32)
    for points, softness, strength in ((below, 2.5, 0.35), (below, 12.0, 0.25), (below[touching], 1.5, 0.2)):
        layer = np.zeros_like(shadow)
        outline = cv2.convexHull((_project(points, camera) / shrink * 16).astype(np.int32))
        cv2.fillConvexPoly(layer, outline, strength, cv2.LINE_8, 4)
        shadow += cv2.GaussianBlur(layer, (0, 0), softness)
    light = cv2.resize(1 - shadow, (shadow.shape[1] * shrink, HEIGHT), interpolation=cv2.INTER_LINEAR)
    floor = slice(440, HEIGHT)
    factor = cv2.merge([np.round(light[floor, :WIDTH] * 255).astype(np.uint8)] * 3)
    image_HWC[floor] = cv2.multiply(image_HWC[floor], factor, scale=1 / 255)


# ---------------------------------------------------------------- car


def _rasterize(
    corners_T33: Points3D, depth_offset_T: Points3D, camera: CameraSetup
) -> tuple[NDArray[np.intp], NDArray[np.int32]]:
    """Draw the triangles that face the camera, far ones first.

    Returns their indices (N,), and an int32 image (1280, 1918) of the triangle shown at each pixel: 1 + its position
    among those indices, 0 for background.
    """
    eye = np.array([0.0, -_DISTANCE, _EYE])
    middle = corners_T33.mean(axis=1)
    facing = np.cross(corners_T33[:, 1] - corners_T33[:, 0], corners_T33[:, 2] - corners_T33[:, 0])
    pixels = _project(corners_T33, camera)
    (ax, ay), (bx, by) = (pixels[:, 1] - pixels[:, 0]).T, (pixels[:, 2] - pixels[:, 0]).T
    wide_enough = np.abs(ax * by - ay * bx) > 0.05  # edge-on triangles cannot be interpolated
    visible = np.flatnonzero((np.sum(facing * (middle - eye), axis=1) < 0) & wide_enough)
    distance = np.linalg.norm(middle[visible] - eye, axis=1) + depth_offset_T[visible]
    visible = visible[np.argsort(-distance, kind="stable")]
    ids = np.zeros((HEIGHT, WIDTH), np.int32)
    for number, triangle in enumerate(np.round(pixels[visible] * 16).astype(np.int32), start=1):
        cv2.fillConvexPoly(ids, triangle, number, cv2.LINE_8, 4)
    return visible, ids


def _paint_car(
    image_HWC: UInt8Array,
    ids_HW: NDArray[np.int32],
    surface_N35: Float32Array,
    texture_HW4: UInt8Array,
    camera: CameraSetup,
) -> None:
    """Shade the car's pixels and blend them into the image with smooth edges, in place.

    ``ids_HW`` is 1 + the triangle shown at each pixel, or 0. A pixel's (x, y, 1) times the triangle's ``surface_N35``
    gives the normal and the texture position there.
    """
    left, top, width, height = cv2.boundingRect((ids_HW > 0).astype(np.uint8))
    left, top, right, bottom = max(left - 4, 0), max(top - 4, 0), left + width + 4, top + height + 4
    ids = ids_HW[top:bottom, left:right]
    pixels = np.flatnonzero(ids)
    triangles = ids.ravel()[pixels] - 1
    surface_35N = np.ascontiguousarray(surface_N35.transpose(1, 2, 0))
    middle_x, middle_y = np.float32(_CENTER_X + camera.shift[0]), np.float32(_HORIZON + camera.shift[1])
    gain_31 = np.array(camera.gain, np.float32)[:, None]
    car = np.zeros((ids.size, 4), np.uint8)
    car[pixels, 3] = 255
    for start in range(0, len(pixels), _CHUNK):
        chunk = pixels[start : start + _CHUNK]
        row, column = np.divmod(chunk.astype(np.int32), np.int32(ids.shape[1]))
        y, x = (row + top).astype(np.float32), (column + left).astype(np.float32)
        by_x, by_y, constant = surface_35N.take(triangles[start : start + _CHUNK], axis=2)
        values_5N = by_x * x + by_y * y + constant
        texels = cv2.remap(texture_HW4, values_5N[3][:, None], values_5N[4][:, None], cv2.INTER_LINEAR)[:, 0]
        colors = _shade(values_5N[:3], texels.T * np.float32(1 / 255), x - middle_x, y - middle_y)
        car[chunk, :3] = np.minimum(colors * gain_31 + np.float32(0.5), 255).T

    # Colors and coverage get the same blur, so that edges are smooth and the background does not bleed into the car.
    blurred = cv2.GaussianBlur(car.reshape(*ids.shape, 4), (5, 5), 0.75)
    uncovered = cv2.merge([255 - blurred[..., 3]] * 3)
    background = image_HWC[top:bottom, left:right]
    background[:] = cv2.add(cv2.multiply(background, uncovered, scale=1 / 255), blurred[..., :3])


def _shade(
    normals_3N: Float32Array, material_4N: Float32Array, right_N: Float32Array, down_N: Float32Array
) -> Float32Array:
    """Return sRGB colors (3, N), 0 to 255: paint lit by the studio, plus reflections of the studio.

    ``material_4N`` is the texture, 0 to 1; ``right_N`` and ``down_N`` are distances from the vanishing point in pixels.
    """
    nx, ny, nz = normals_3N / np.sqrt(np.sum(np.square(normals_3N), axis=0))
    inverse_length = 1 / np.sqrt(np.square(right_N) + np.square(down_N) + np.float32(_FOCAL**2))
    vx, vy, vz = right_N * inverse_length, np.float32(_FOCAL) * inverse_length, -down_N * inverse_length
    cosine = np.clip(-(nx * vx + ny * vy + nz * vz), 0, 1)
    rx, ry, rz = vx + 2 * cosine * nx, vy + 2 * cosine * ny, vz + 2 * cosine * nz

    light = 0.78 + 0.30 * nz - 0.08 * ny + 0.06 * nx
    gloss, slant = material_4N[3], 1 - cosine
    # Schlick's approximation, weakened because the surroundings are simplified.
    grazing = 0.6 * np.square(np.square(slant)) * slant * np.minimum(gloss * 25, 1)
    mirrored = (gloss + (1 - gloss) * grazing) * _surroundings(rx, ry, rz)
    albedo = np.square(material_4N[:3])  # sRGB values are about the square root of the light
    colors: Float32Array = 255 * np.sqrt(np.clip(albedo * (light * (1 - grazing)) + mirrored, 0, 1))
    return colors


def _surroundings(rx: Float32Array, ry: Float32Array, rz: Float32Array) -> Float32Array:
    """Return the studio's brightness (N,) by direction: gray floor, white wall, dark ceiling, two rows of lamps."""
    floor = 0.24 + 0.18 * rz
    wall = (0.30 + 0.55 * _ramp(ry, -0.3, 0.5)) * (1 - 0.75 * _ramp(rz, 0.12, 0.45))
    steep = np.maximum(rz, np.float32(0.15))
    across: Float32Array = np.abs(np.abs(ry / steep) - 0.75)
    along: Float32Array = np.abs(rx / steep)
    lamps = _ramp(-across, -0.34, -0.18) * _ramp(-along, -2.2, -1.8)
    sky = wall + 2.2 * lamps * _ramp(rz, 0.2, 0.4)
    brightness: Float32Array = floor + (sky - floor) * _ramp(rz, -0.02, 0.05)
    return brightness


def _ramp(value: Float32Array, start: float, end: float) -> Float32Array:
    """Return 0 up to ``start``, 1 from ``end``, and linear values between."""
    line: Float32Array = np.clip((value - start) * np.float32(1 / (end - start)), 0, 1)
    return line
