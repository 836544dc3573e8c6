"""Photographs of drawn cars: the studio, the camera, and a small renderer that returns a picture and its exact mask.

The studio's frame is in metres: X to the right, Y away from the camera, Z up, the origin on the floor at the turntable's
middle. The camera looks along Y, so that upright things stay upright.
"""

from dataclasses import dataclass
from functools import cache, lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.competition.layout import ANGLES, HEIGHT, WIDTH
from pipeline.data.car_model import Triangles, build_car, design_car, paint_texture

Floats = NDArray[np.float32]
Image = NDArray[np.uint8]

MARGIN = 24
"""Pixels by which the painted studio is larger than a picture on every side, for the camera to shift."""

_FOCAL, _DISTANCE, _EYE = 2600.0, 8.6, 1.52  # pixels; metres from the turntable's middle; metres above the floor
_CENTRE_X, _HORIZON = WIDTH / 2, 372.0  # pixels
_TURNTABLE = 3.35  # metres
_CHUNK = 16384  # pixels shaded at once: few enough to stay in the processor's cache


@dataclass(frozen=True)
class Shot:
    """What differs between the cars' visits to the studio, the same for all angles of one car."""

    turn: float
    """Radians by which the car stands askew on the turntable."""
    place: tuple[float, float]
    """Metres from the turntable's middle, to the right and away from the camera."""
    shift: tuple[int, int]
    """Pixels by which the camera is moved, right and down; at most ``MARGIN``."""
    gain: tuple[float, float, float]
    """Exposure and white balance: factors of red, green and blue."""


def draw_car(seed: int, index: int) -> list[tuple[Image, Image]]:
    """Draw car number ``index`` of the sample ``seed`` at its 16 angles.

    Returns for each angle the picture, (1280, 1918, 3) uint8 RGB, and its mask, (1280, 1918) uint8, 1 where the renderer
    drew the car and 0 elsewhere.
    """
    design = design_car(seed, index)
    model, texture = build_car(design), paint_texture(design)
    rng = np.random.default_rng((seed, 2, index))
    right, down = (int(value) for value in rng.integers(-MARGIN, MARGIN + 1, 2))
    light, warmth = 1 + rng.uniform(-0.05, 0.03), rng.uniform(-0.012, 0.012)
    shot = Shot(
        turn=rng.uniform(-0.05, 0.05),
        place=(rng.uniform(-0.08, 0.08), rng.uniform(-0.12, 0.12)),
        shift=(right, down),
        gain=(light + warmth, light, light - warmth),
    )
    return [photograph(model, texture, shot, angle, rng) for angle in range(1, ANGLES + 1)]


def photograph(
    model: Triangles, texture_HW4: Image, shot: Shot, angle: int, rng: np.random.Generator
) -> tuple[Image, Image]:
    """Draw one car at one turntable angle (1 to 16, 1 from the front, 5 from its left) in the studio.

    Returns the picture, (1280, 1918, 3) uint8 RGB, and the mask, (1280, 1918) uint8 of 0 and 1.
    """
    turn = (angle - 1) * 2 * np.pi / ANGLES + shot.turn
    forward, left = np.array([-np.sin(turn), -np.cos(turn), 0.0]), np.array([np.cos(turn), -np.sin(turn), 0.0])
    to_studio = np.stack([forward, left, [0.0, 0.0, 1.0]])
    corners = model.corners_T33 @ to_studio + np.array([*shot.place, 0.0])
    normals = model.normals_T33 @ to_studio

    picture = _exposed_studio(shot).copy()
    _cast_shadow(picture, corners, shot)
    triangles, ids = _rasterise(corners, model.behind_T, shot)
    mask = (ids > 0).astype(np.uint8)
    edges = np.concatenate([_project(corners[triangles], shot), np.ones((len(triangles), 3, 1))], axis=2)
    surface = np.linalg.solve(edges, np.concatenate([normals[triangles], model.uv_T32[triangles]], axis=2))
    _paint_car(picture, ids, surface.astype(np.float32), texture_HW4, shot)
    y, x = (int(value) for value in rng.integers(0, 256, 2))
    noise = _sensor_noise()[y : y + HEIGHT, x : x + WIDTH]
    return cv2.add(picture, noise, dtype=cv2.CV_8U), mask


# ---------------------------------------------------------------- studio


def _project(points: NDArray[np.float64], shot: Shot | None = None) -> NDArray[np.float64]:
    """Project studio points (..., 3) to pixel coordinates (..., 2), a pixel's centre being a whole number."""
    depth = points[..., 1] + _DISTANCE
    right, down = shot.shift if shot else (MARGIN, MARGIN)
    x = _CENTRE_X + right + _FOCAL * points[..., 0] / depth
    y = _HORIZON + down - _FOCAL * (points[..., 2] - _EYE) / depth
    return np.stack([x, y], axis=-1)


_LETTERS = {
    "E": [[(0, -1), (0, 2)], [(-1, 0), (2, 0)], [(-1, 0.5), (2, 0.5)], [(-1, 1), (2, 1)]],
    "X": [[(-0.5, -0.5), (1.5, 1.5)], [(1.5, -0.5), (-0.5, 1.5)]],
    "A": [[(-0.5, 2), (0.5, 0), (1.5, 2)]],
    "M": [[(0, -1), (0, 2)], [(1, -1), (1, 2)], [(0, 0), (0.5, 0.7), (1, 0)]],
    "P": [[(0, -1), (0, 2)], [(-1, 0), (0.8, 0), (1, 0.12), (1, 0.45), (0.8, 0.57), (0, 0.57)]],
    "L": [[(0, -1), (0, 2)], [(-1, 1), (2, 1)]],
}
"""Strokes of the sign on the wall, in a unit square with y downwards; their ends are cut off square at its edges."""


def _letter(letter: str, thickness: int) -> Image:
    """Draw one letter of the sign, (h, w) uint8 from 0 to 255."""
    size = np.array([165, 215])
    canvas = np.zeros((215 + thickness, 165 + thickness), np.uint8)
    for stroke in _LETTERS[letter]:
        points = np.round((np.array(stroke) * size + thickness / 2) * 16).astype(np.int32)
        cv2.polylines(canvas, [points], False, 255, thickness, cv2.LINE_AA, 4)
    return canvas


@cache
def _studio() -> Image:
    """Paint the empty studio with a margin all round, once per process: (1280 + 2m, 1918 + 2m, 3) uint8 RGB."""
    rng = np.random.default_rng(20170725)
    height, width = HEIGHT + 2 * MARGIN, WIDTH + 2 * MARGIN
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    across = (x - width / 2) / (width / 2)
    seam = 440 + MARGIN + 16 * across**2

    wall = 240 + 10 * np.exp(-(((y - seam) / 160) ** 2)) - 5 * across**2 + 4 * (y / seam)
    sign = np.zeros((height, width), np.uint8)
    for place, letter in enumerate("EXAMPLE"):
        drawn = _letter(letter, 22 if place < 3 else 50)
        left = 95 + MARGIN + place * 254
        top = round(206 + MARGIN + 14 * ((left - width / 2 + 90) / (width / 2)) ** 2) - (0 if place < 3 else 14)
        sign[top : top + drawn.shape[0], left : left + drawn.shape[1]] = drawn
    sign = np.where(y > seam - 2, 0, sign).astype(np.float32) / 255
    wall = wall * (1 - sign) + 88 * sign
    wall_rgb = wall[..., None] * np.array([0.998, 1.0, 0.998], np.float32)

    depth = _FOCAL * _EYE / np.maximum(y - MARGIN - _HORIZON, 1)
    reach = np.hypot((x - MARGIN - _CENTRE_X) * depth / _FOCAL, depth - _DISTANCE)
    disc = np.clip((_TURNTABLE - reach) / 0.02, 0, 1)
    ring = np.exp(-(((reach - _TURNTABLE) / 0.018) ** 2))
    floor = 176 + 14 * np.exp(-(((y - 760) / 260) ** 2)) - 10 * across**2
    cool, warm = np.array([0.975, 0.992, 1.0], np.float32), np.array([1.0, 0.995, 0.965], np.float32)
    floor_rgb = floor[..., None] * (cool + (warm - cool) * disc[..., None])
    stains = cv2.resize(rng.normal(0, 1, (34, 25)).astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
    streaks = cv2.resize(rng.normal(0, 1, (220, 90)).astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
    floor_rgb += (1.6 * stains + 0.9 * streaks - 45 * ring)[..., None]

    above = np.clip(seam - y + 0.5, 0, 1)[..., None]
    plate = wall_rgb * above + floor_rgb * (1 - above)
    plate *= (1 - 0.035 * (across**2 + ((y - height / 2) / (height / 2)) ** 2))[..., None]
    plate = cv2.GaussianBlur(plate, (0, 0), 0.8)
    return np.clip(np.round(plate), 0, 255).astype(np.uint8)


@cache
def _sensor_noise() -> NDArray[np.int8]:
    """A sheet of noise, from which each picture takes a piece: (1280 + 256, 1918 + 256, 3) grey levels."""
    white = np.random.default_rng(1918).standard_normal((HEIGHT + 256, WIDTH + 256, 3), np.float32)
    return np.round(cv2.GaussianBlur(white * 2.2, (0, 0), 0.7)).astype(np.int8)


@lru_cache(maxsize=1)
def _exposed_studio(shot: Shot) -> Image:
    """The empty studio as one car's shot sees it: (1280, 1918, 3) uint8 RGB, not to be written to."""
    right, down = shot.shift
    top, left = MARGIN - down, MARGIN - right
    levels = np.arange(256)[:, None] * np.array(shot.gain)
    table = np.clip(np.round(levels), 0, 255).astype(np.uint8)
    exposed: Image = cv2.LUT(_studio()[top : top + HEIGHT, left : left + WIDTH], table[None])
    return exposed


def _cast_shadow(picture_HWC: Image, corners_T33: NDArray[np.float64], shot: Shot) -> None:
    """Darken the floor under and around the car, in place."""
    shrink = 8
    floor = corners_T33.mean(axis=1) * [1, 1, 0]
    low = corners_T33[..., 2].min(axis=1) < 0.03
    shadow = np.zeros((HEIGHT // shrink, WIDTH // shrink + 1), np.float32)
    for points, size, strength in ((floor, 2.5, 0.35), (floor, 12.0, 0.25), (floor[low], 1.5, 0.2)):
        layer = np.zeros_like(shadow)
        hull = cv2.convexHull((_project(points, shot) / shrink * 16).astype(np.int32))
        cv2.fillConvexPoly(layer, hull, strength, cv2.LINE_8, 4)
        shadow += cv2.GaussianBlur(layer, (0, 0), size)
    light = cv2.resize(1 - shadow, (shadow.shape[1] * shrink, HEIGHT), interpolation=cv2.INTER_LINEAR)[:, :WIDTH]
    rows = slice(440, HEIGHT)
    factor = cv2.merge([np.round(light[rows] * 255).astype(np.uint8)] * 3)
    picture_HWC[rows] = cv2.multiply(picture_HWC[rows], factor, scale=1 / 255)


# ---------------------------------------------------------------- car


def _rasterise(
    corners_T33: NDArray[np.float64], behind_T: NDArray[np.float64], shot: Shot
) -> tuple[NDArray[np.intp], NDArray[np.int32]]:
    """Draw the triangles that face the camera, far ones first.

    Returns their indices and an image (1280, 1918) int32 of 1 + the place in those indices, 0 where there is no car.
    """
    eye = np.array([0.0, -_DISTANCE, _EYE])
    middle = corners_T33.mean(axis=1)
    facing = np.cross(corners_T33[:, 1] - corners_T33[:, 0], corners_T33[:, 2] - corners_T33[:, 0])
    pixels = _project(corners_T33, shot)
    (ax, ay), (bx, by) = (pixels[:, 1] - pixels[:, 0]).T, (pixels[:, 2] - pixels[:, 0]).T
    seen = (np.einsum("ij,ij->i", facing, middle - eye) < 0) & (np.abs(ax * by - ay * bx) > 0.05)
    distance = np.linalg.norm(middle - eye, axis=1) + behind_T
    order = np.flatnonzero(seen)
    order = order[np.argsort(-distance[order], kind="stable")]
    fixed = np.round(pixels[order] * 16).astype(np.int32)
    ids = np.zeros((HEIGHT, WIDTH), np.int32)
    for place, triangle in enumerate(fixed, start=1):
        cv2.fillConvexPoly(ids, triangle, place, cv2.LINE_8, 4)
    return order, ids


def _paint_car(
    picture_HWC: Image, ids_HW: NDArray[np.int32], surface_N35: Floats, texture_HW4: Image, shot: Shot
) -> None:
    """Shade the car's pixels and lay them over the picture with soft edges, in place.

    ``ids_HW`` is 1 + the triangle a pixel shows, or 0. A pixel's (x, y, 1) times that triangle's part of ``surface_N35`` is the
    normal and the texture position there.
    """
    left, top, width, height = cv2.boundingRect((ids_HW > 0).astype(np.uint8))
    left, top, right, bottom = max(left - 4, 0), max(top - 4, 0), left + width + 4, top + height + 4
    ids = ids_HW[top:bottom, left:right]
    pixels = np.flatnonzero(ids)
    triangles = ids.ravel()[pixels] - 1
    surface_35N = np.ascontiguousarray(surface_N35.transpose(1, 2, 0))
    car = np.zeros((ids.size, 4), np.uint8)
    car[pixels, 3] = 255
    gain_31 = np.array(shot.gain, np.float32)[:, None]
    middle_x, middle_y = np.float32(_CENTRE_X + shot.shift[0]), np.float32(_HORIZON + shot.shift[1])
    for start in range(0, len(pixels), _CHUNK):
        chunk = pixels[start : start + _CHUNK]
        row, column = np.divmod(chunk.astype(np.int32), np.int32(ids.shape[1]))
        y, x = (row + top).astype(np.float32), (column + left).astype(np.float32)
        by_x, by_y, constant = surface_35N.take(triangles[start : start + _CHUNK], axis=2)
        nx, ny, nz, u, v = by_x * x + by_y * y + constant
        texels = cv2.remap(texture_HW4, u[:, None], v[:, None], cv2.INTER_LINEAR)[:, 0]
        colours = _shade((nx, ny, nz), texels.T * np.float32(1 / 255), x - middle_x, y - middle_y)
        car[chunk, :3] = np.minimum(colours * gain_31 + np.float32(0.5), 255).T

    # The colours and the cover are blurred alike, so that edges are smooth and no background bleeds into the paint.
    blurred = cv2.GaussianBlur(car.reshape(*ids.shape, 4), (5, 5), 0.75)
    uncovered = cv2.merge([255 - blurred[..., 3]] * 3)
    behind = picture_HWC[top:bottom, left:right]
    behind[:] = cv2.add(cv2.multiply(behind, uncovered, scale=1 / 255), blurred[..., :3])


def _shade(normal: tuple[Floats, Floats, Floats], material_4N: Floats, right_N: Floats, down_N: Floats) -> Floats:
    """Return sRGB colours (3, N) from 0 to 255: paint lit by the studio, and the studio mirrored in its clear coat."""
    nx, ny, nz = normal
    norm = 1 / np.sqrt(nx * nx + ny * ny + nz * nz)
    nx, ny, nz = nx * norm, ny * norm, nz * norm
    scale = 1 / np.sqrt(right_N * right_N + down_N * down_N + np.float32(_FOCAL**2))
    vx, vy, vz = right_N * scale, np.float32(_FOCAL) * scale, -down_N * scale
    cosine = np.clip(-(nx * vx + ny * vy + nz * vz), 0, 1)
    rx, ry, rz = vx + 2 * cosine * nx, vy + 2 * cosine * ny, vz + 2 * cosine * nz

    light = 0.78 + 0.30 * nz - 0.08 * ny + 0.06 * nx
    gloss = material_4N[3]
    slant = 1 - cosine
    grazing = np.square(np.square(slant)) * slant * np.minimum(gloss * 25, 1) * 0.6
    mirrored = (gloss + (1 - gloss) * grazing) * _surroundings(rx, ry, rz)
    albedo = np.square(material_4N[:3])  # a texture holds sRGB, about the square root of the light
    linear: Floats = albedo * (light * (1 - grazing)) + mirrored
    return 255 * np.sqrt(np.clip(linear, 0, 1))


def _ramp(value: Floats, start: float, end: float) -> Floats:
    return np.clip((value - start) * np.float32(1 / (end - start)), 0, 1)


def _surroundings(rx: Floats, ry: Floats, rz: Floats) -> Floats:
    """Brightness (N,) of the studio in a direction: grey floor, white walls, a darker ceiling with two rows of lamps."""
    floor = 0.24 + 0.18 * rz
    wall = 0.30 + 0.55 * _ramp(ry, -0.3, 0.5)
    wall = wall * (1 - 0.75 * _ramp(rz, 0.12, 0.45))
    steep = np.maximum(rz, 0.15)
    across, along = ry / steep, rx / steep
    lamps = _ramp(0.34 - np.abs(np.abs(across) - 0.75), 0, 0.16) * _ramp(2.2 - np.abs(along), 0, 0.4)
    sky = wall + 3.0 * lamps * _ramp(rz, 0.2, 0.4)
    horizon = _ramp(rz, -0.02, 0.05)
    return floor + (sky - floor) * horizon
