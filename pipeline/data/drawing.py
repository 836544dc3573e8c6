"""Photographs of drawn cars: the studio, the camera, and a small renderer that returns a picture and its exact mask.

The studio's frame is in metres: X to the right, Y away from the camera, Z up, the origin on the floor at the turntable's
middle. The camera looks along Y, so that upright things stay upright.
"""

from dataclasses import dataclass
from functools import cache

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

    right, down = shot.shift
    plate, noise = _studio()
    top, start = MARGIN - down, MARGIN - right
    picture = plate[top : top + HEIGHT, start : start + WIDTH].copy()
    _cast_shadow(picture, corners, shot)
    triangles, ids = _rasterise(corners, model.behind_T, shot)
    mask = (ids > 0).astype(np.uint8)
    _paint_car(picture, ids, _planes(corners, normals, model.uv_T32, triangles, shot), texture_HW4, shot)
    y, x = (int(value) for value in rng.integers(0, 256, 2))
    picture = cv2.add(picture, noise[y : y + HEIGHT, x : x + WIDTH], dtype=cv2.CV_8U)
    levels = np.arange(256)[:, None] * np.array(shot.gain)
    return cv2.LUT(picture, np.clip(np.round(levels), 0, 255).astype(np.uint8)[None]), mask


# ---------------------------------------------------------------- studio


def _project(points: NDArray[np.float64], shot: Shot | None = None) -> NDArray[np.float64]:
    """Project studio points (..., 3) to pixel coordinates (..., 2), a pixel's centre being a whole number."""
    depth = points[..., 1] + _DISTANCE
    right, down = shot.shift if shot else (MARGIN, MARGIN)
    x = _CENTRE_X + right + _FOCAL * points[..., 0] / depth
    y = _HORIZON + down - _FOCAL * (points[..., 2] - _EYE) / depth
    return np.stack([x, y], axis=-1)


_LETTERS = {
    "E": [[(1, 0), (0, 0), (0, 1), (1, 1)], [(0, 0.5), (0.8, 0.5)]],
    "X": [[(0, 0), (1, 1)], [(1, 0), (0, 1)]],
    "A": [[(0, 1), (0.5, 0), (1, 1)]],
    "M": [[(0, 1), (0, 0), (0.5, 0.7), (1, 0), (1, 1)]],
    "P": [[(0, 1), (0, 0), (0.8, 0), (1, 0.12), (1, 0.45), (0.8, 0.57), (0, 0.57)]],
    "L": [[(0, 0), (0, 1), (1, 1)]],
}
"""Strokes of the sign on the wall, in a unit square with y downwards."""


@cache
def _studio() -> tuple[Image, NDArray[np.int8]]:
    """Paint the empty studio, with a margin all round, and a sheet of sensor noise; once per process."""
    rng = np.random.default_rng(20170725)
    height, width = HEIGHT + 2 * MARGIN, WIDTH + 2 * MARGIN
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    across = (x - width / 2) / (width / 2)
    seam = 440 + MARGIN + 16 * across**2

    wall = 236 + 10 * np.exp(-(((y - seam) / 160) ** 2)) - 5 * across**2 + 4 * (y / seam)
    sign = np.zeros((height, width), np.uint8)
    for place, letter in enumerate("EXAMPLE"):
        left, size = 110 + MARGIN + place * 250, np.array([170, 215])
        origin = np.array([left, 216 + MARGIN + 14 * ((left + 85 - width / 2) / (width / 2)) ** 2])
        for stroke in _LETTERS[letter]:
            points = np.round(origin + np.array(stroke) * size).astype(np.int32)
            cv2.polylines(sign, [points], False, 255, 20 if place < 3 else 44, cv2.LINE_AA)
    sign = np.where(y > seam - 2, 0, sign).astype(np.float32) / 255
    wall = wall * (1 - sign) + 92 * sign
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
    noise = cv2.GaussianBlur(rng.normal(0, 2.2, (HEIGHT + 256, WIDTH + 256, 3)).astype(np.float32), (0, 0), 0.7)
    return np.clip(np.round(plate), 0, 255).astype(np.uint8), np.round(noise).astype(np.int8)


def _cast_shadow(picture_HWC: Image, corners_T33: NDArray[np.float64], shot: Shot) -> None:
    """Darken the floor under and around the car, in place."""
    shrink = 8
    floor = corners_T33.reshape(-1, 3) * [1, 1, 0]
    low = corners_T33[..., 2].reshape(-1) < 0.03
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


def _planes(
    corners_T33: NDArray[np.float64],
    normals_T33: NDArray[np.float64],
    uv_T32: NDArray[np.float64],
    triangles: NDArray[np.intp],
    shot: Shot,
) -> Floats:
    """Return (N, 3, 5) float32: how normal and texture position change with a pixel's x, y and 1 in each triangle."""
    pixels = _project(corners_T33[triangles], shot)
    matrix = np.concatenate([pixels, np.ones((*pixels.shape[:2], 1))], axis=2)
    values = np.concatenate([normals_T33[triangles], uv_T32[triangles]], axis=2)
    planes: Floats = (np.linalg.inv(matrix) @ values).astype(np.float32)
    return planes


def _paint_car(picture_HWC: Image, ids_HW: NDArray[np.int32], planes_N35: Floats, texture_HW4: Image, shot: Shot) -> None:
    """Shade the car's pixels and lay them over the picture with soft edges, in place."""
    rows, columns = np.flatnonzero(ids_HW.any(axis=1)), np.flatnonzero(ids_HW.any(axis=0))
    box = (slice(max(rows[0] - 4, 0), rows[-1] + 5), slice(max(columns[0] - 4, 0), columns[-1] + 5))
    ids = ids_HW[box]
    y, x = np.nonzero(ids)
    column, row = (x + box[1].start).astype(np.float32), (y + box[0].start).astype(np.float32)
    plane = planes_N35[ids[y, x] - 1]
    values = plane[:, 0] * column[:, None] + plane[:, 1] * row[:, None] + plane[:, 2]
    material = _sample(texture_HW4, values[:, 3], values[:, 4])
    colours = _shade(values[:, :3], material, column - _CENTRE_X - shot.shift[0], row - _HORIZON - shot.shift[1])

    # The colours and the cover are blurred alike, so that edges are smooth and no background bleeds into the paint.
    car = np.zeros((*ids.shape, 4), np.float32)
    car[y, x, :3] = colours
    car[y, x, 3] = 1
    car = cv2.GaussianBlur(car, (5, 5), 0.75)
    cover = car[..., 3:]
    picture_HWC[box] = np.round(picture_HWC[box] * (1 - cover) + car[..., :3]).astype(np.uint8)


def _sample(texture_HW4: Image, u: Floats, v: Floats) -> Floats:
    """Look the texture up, bilinearly, at positions (N,); returns (N, 4) float32 from 0 to 1."""
    width = 4096  # remap wants an image-shaped question
    rows = -(-len(u) // width)
    grid = np.zeros((2, rows * width), np.float32)
    grid[0, : len(u)], grid[1, : len(u)] = u, v
    found = cv2.remap(texture_HW4, grid[0].reshape(rows, width), grid[1].reshape(rows, width), cv2.INTER_LINEAR)
    return found.reshape(-1, 4)[: len(u)] * np.float32(1 / 255)


def _shade(normals_N3: Floats, material_N4: Floats, right_N: Floats, down_N: Floats) -> Floats:
    """Return sRGB colours (N, 3) from 0 to 255: paint lit by the studio, and the studio mirrored in its clear coat."""
    nx, ny, nz = (normals_N3 / np.linalg.norm(normals_N3, axis=1, keepdims=True)).T
    length = np.sqrt(right_N**2 + down_N**2 + _FOCAL**2)
    vx, vy, vz = right_N / length, _FOCAL / length, -down_N / length
    cosine = np.clip(-(nx * vx + ny * vy + nz * vz), 0, 1)
    rx, ry, rz = vx + 2 * cosine * nx, vy + 2 * cosine * ny, vz + 2 * cosine * nz

    light = 0.80 + 0.30 * nz - 0.10 * ny + 0.05 * nx
    gloss = material_N4[:, 3]
    grazing = (1 - cosine) ** 5 * np.minimum(gloss / 0.04, 1) * 0.6
    mirrored = (gloss + (1 - gloss) * grazing) * _surroundings(rx, ry, rz)
    albedo = material_N4[:, :3] ** 2  # a texture holds sRGB, about the square root of the light
    linear = albedo * (light * (1 - grazing))[:, None] + mirrored[:, None]
    return 255 * np.sqrt(np.clip(linear, 0, 1))


def _ramp(value: Floats, start: float, end: float) -> Floats:
    return np.clip((value - start) * np.float32(1 / (end - start)), 0, 1)


def _surroundings(rx: Floats, ry: Floats, rz: Floats) -> Floats:
    """Brightness (N,) of the studio in a direction: grey floor, white walls, a darker ceiling with two rows of lamps."""
    floor = 0.30 + 0.22 * rz
    wall = 0.75 + 0.2 * _ramp(ry, -0.6, 0.6) - 0.35 * _ramp(rz, 0.35, 0.75)
    steep = np.maximum(rz, 0.15)
    across, along = ry / steep, rx / steep
    lamps = (_ramp(0.32 - np.abs(np.abs(across) - 0.75), 0, 0.12)) * _ramp(2.2 - np.abs(along), 0, 0.4)
    sky = wall + 1.6 * lamps * _ramp(rz, 0.2, 0.35)
    horizon = _ramp(rz, -0.02, 0.05)
    return floor + (sky - floor) * horizon
