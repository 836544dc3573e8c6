"""Texture of a synthetic car: one image with tiles for its side, front, rear and wheel.

Tiles are orthographic views in meters. The side has coordinates (d, z), the distance behind the nose and the height
above the floor; front and rear have (y, z), the position to the car's left and the height.
"""

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.synthetic.car_design import CarDesign, Proportions
from pipeline.utils.arrays import Float64Array

Color = tuple[float, float, float, float]
"""Red, green and blue in sRGB, then the reflectance at normal incidence; all from 0 to 255."""

Points = Sequence[tuple[float, float]] | Float64Array
"""Corners (across, z) in meters."""

_SCALE = 320  # texture pixels per meter, about the scale of the images
_HEIGHT, _WIDTH = 1280, 1856
_CEILING = 1.96  # z at the top of the tiles for side, front and rear
_AHEAD = 0.12  # the side tile begins this many meters before the nose
_HALF = 1.05  # the front and rear tiles span y from -_HALF to _HALF
_FRONT_U, _REAR_U, _ENDS_V = 0, 672, 640
_WHEEL_U, _WHEEL_V, _WHEEL_RADIUS = 1600, 832, 180  # the wheel's center and radius, in texture pixels
_SWATCH_U = {"black": 1420, "tire": 1500, "chrome": 1580, "paint": 1660}
_SWATCH_V = 1150

_BLACK: Color = (10, 10, 11, 2)
_TRIM: Color = (26, 27, 29, 6)
_TIRE: Color = (30, 30, 31, 2)
_GLASS: Color = (30, 34, 35, 15)
_SEAT: Color = (24, 25, 26, 15)
_CHROME: Color = (96, 98, 100, 120)
_LAMP: Color = (62, 65, 68, 30)
_LENS: Color = (150, 154, 158, 30)
_AMBER: Color = (214, 104, 26, 25)
_RED: Color = (150, 12, 18, 25)
_RIM: Color = (172, 174, 178, 60)


def side_uv(d: Float64Array, z: Float64Array) -> Float64Array:
    """Return the texture positions (..., 2) in pixels of points on the side."""
    return np.stack([(d + _AHEAD) * _SCALE, (_CEILING - z) * _SCALE], axis=-1)


def end_uv(front: NDArray[np.bool_], y: Float64Array, z: Float64Array) -> Float64Array:
    """Return the texture positions (..., 2) in pixels of points on the front, or on the rear if not ``front``."""
    u = np.where(front, _FRONT_U, _REAR_U) + (y + _HALF) * _SCALE
    return np.stack([u, _ENDS_V + (_CEILING - z) * _SCALE], axis=-1)


def wheel_uv(x: Float64Array, z: Float64Array) -> Float64Array:
    """Return the texture positions (..., 2) in pixels of points on a wheel, given in wheel radii from its hub."""
    return np.stack([_WHEEL_U - x * _WHEEL_RADIUS, _WHEEL_V - z * _WHEEL_RADIUS], axis=-1)


def swatch_uv(material: str) -> Float64Array:
    """Return the texture position (2,) in pixels of a plain material: black, tire, chrome or paint."""
    return np.array([_SWATCH_U[material], _SWATCH_V], dtype=float)


def paint_texture(design: CarDesign) -> NDArray[np.uint8]:
    """Return the car's texture, uint8 (1280, 1856, 4), with the channels of ``Color``."""
    texture = np.empty((_HEIGHT, _WIDTH, 4), np.uint8)
    # The lower flanks are darker, because they are lit by the floor only.
    z = _CEILING - (np.arange(_HEIGHT) % _ENDS_V) / _SCALE
    shade = 1 - 0.16 * np.clip((0.85 - z) / 0.65, 0, 1)
    texture[..., :3] = np.round(shade[:, None, None] * design.paint)
    texture[..., 3] = _paint(design)[3]
    _draw_side(_TextureTile(texture, 0, 0, -_AHEAD, _CEILING), design)
    _draw_front(_TextureTile(texture, _FRONT_U, _ENDS_V, -_HALF, _CEILING), design)
    _draw_rear(_TextureTile(texture, _REAR_U, _ENDS_V, -_HALF, _CEILING), design)
    _draw_wheel(_TextureTile(texture, _WHEEL_U, _WHEEL_V, 0, 0), design)
    for name, color in (("black", _BLACK), ("tire", _TIRE), ("chrome", _CHROME), ("paint", _paint(design))):
        u = _SWATCH_U[name]
        texture[_SWATCH_V - 20 : _SWATCH_V + 20, u - 20 : u + 20] = color
    return texture


class _TextureTile:
    """Draws into a tile of a texture, in meters; pixel (u, v) of the texture is the point (left, top)."""

    def __init__(self, texture_HW4: NDArray[np.uint8], u: float, v: float, left: float, top: float) -> None:
        self.texture_HW4, self.u, self.v, self.left, self.top = texture_HW4, u, v, left, top

    def _sixteenths(self, points: Points) -> NDArray[np.int32]:
        across, z = np.asarray(points, dtype=float).T
        pixels = np.stack([self.u + (across - self.left) * _SCALE, self.v + (self.top - z) * _SCALE], axis=1)
        return np.round(pixels * 16).astype(np.int32)

    def fill(self, points: Points, color: Color) -> None:
        """Fill a polygon."""
        cv2.fillPoly(self.texture_HW4, [self._sixteenths(points)], color, cv2.LINE_AA, 4)

    def fill_both(self, points: Sequence[tuple[float, float]], color: Color) -> None:
        """Fill a polygon and its mirror image at negative ``across``."""
        self.fill(points, color)
        self.fill([(-across, z) for across, z in points], color)

    def line(self, points: Points, color: Color, width: float) -> None:
        """Draw an open line, ``width`` meters wide."""
        thickness = max(1, round(width * _SCALE))
        cv2.polylines(self.texture_HW4, [self._sixteenths(points)], False, color, thickness, cv2.LINE_AA, 4)

    def box(self, across: float, z: float, width: float, height: float, color: Color) -> None:
        """Fill an upright rectangle around a center."""
        a, b = width / 2, height / 2
        self.fill([(across - a, z - b), (across + a, z - b), (across + a, z + b), (across - a, z + b)], color)

    def disc(self, across: float, z: float, radius: float, color: Color) -> None:
        """Fill a disc around a center."""
        turn = np.linspace(0, 2 * np.pi, 48, endpoint=False)
        self.fill(np.stack([across + radius * np.cos(turn), z + radius * np.sin(turn)], axis=1), color)


def _paint(design: CarDesign, shade: float = 1.0) -> Color:
    red, green, blue = design.paint
    return red * shade, green * shade, blue * shade, 11


# ---------------------------------------------------------------- side


def _draw_side(tile: _TextureTile, design: CarDesign) -> None:
    car = design.proportions
    belt, end, gap = car.belt, car.length, _paint(design, 0.4)
    if car.doors == 4:
        rear_door, door_end = car.axles[0] + 0.5 * car.wheelbase, car.axles[1] - 0.12
    else:
        rear_door = door_end = car.axles[0] + 0.72 * car.wheelbase
    _draw_side_windows(tile, design, rear_door, door_end)

    sill, front_door = car.clearance + 0.1, car.axles[0] + car.arch_radius + 0.1
    for at in (front_door, rear_door, door_end):
        tile.line([(at, belt), (at + 0.01, belt - 0.3), (at - 0.02, sill)], gap, 0.007)
    tile.line([(front_door, sill), (door_end, sill)], gap, 0.007)
    for at in (rear_door - 0.14, door_end - 0.14):
        tile.box(at, belt - 0.105, 0.2, 0.05, _paint(design, 0.55))
        tile.box(at, belt - 0.1, 0.19, 0.026, _CHROME if design.chrome else _paint(design, 0.9))
    tile.line([(front_door - 0.55, belt - 0.2), (door_end + 0.5, belt - 0.15)], _paint(design, 0.82), 0.01)

    lamp, tail = car.nose, car.tail - 0.18
    tile.fill([(0.02, lamp - 0.12), (0.02, lamp + 0.02), (0.42, lamp + 0.09), (0.30, lamp - 0.04)], _LAMP)
    tile.fill([(0.05, lamp - 0.10), (0.05, lamp), (0.30, lamp + 0.045), (0.24, lamp - 0.04)], _LENS)
    tile.fill([(0.27, lamp - 0.03), (0.28, lamp + 0.04), (0.38, lamp + 0.07), (0.31, lamp - 0.02)], _AMBER)
    tile.fill([(end, tail - 0.1), (end, tail + 0.09), (end - 0.3, tail + 0.09), (end - 0.2, tail - 0.06)], _RED)

    for start, stop in ((0.0, car.axles[0] - car.arch_radius), (car.axles[1] + car.arch_radius, end)):
        tile.line([(start, car.clearance + 0.36), (stop, car.clearance + 0.36)], gap, 0.007)
    tile.box(end / 2, car.trim_height / 2, 1.1 * end, car.trim_height, _TRIM)
    for axle in car.axles:
        if car.cladding:
            tile.disc(axle, car.wheel_radius, car.arch_radius + 0.07, _TRIM)
        else:
            tile.disc(axle, car.wheel_radius, car.arch_radius + 0.012, _paint(design, 0.3))


def _draw_side_windows(tile: _TextureTile, design: CarDesign, rear_door: float, door_end: float) -> None:
    """Draw the side windows, their frame and pillars, and what is visible through the glass."""
    car = design.proportions
    d = np.linspace(car.cowl[0] - 0.1, car.deck[0] + 0.1, 200)
    stop = {"convertible": car.roof_end[0] + 0.15, "pickup": car.roof_end[0] - 0.02}.get(
        car.kind, car.roof_end[0] + 0.45
    )
    if car.kind == "convertible":  # a cloth roof
        tile.fill([*zip(d, car.shoulder(d), strict=True), (d[-1], 1.9), (d[0], 1.9)], _TRIM)
        tile.line([car.cowl, car.header], _paint(design), 0.16)

    # The glass keeps a distance from the outline above it, also where that is steep.
    high = np.min([car.top(d + reach) for reach in (-0.13, -0.06, 0.0, 0.06, 0.13)], axis=0) - 0.075
    high = np.minimum(high, car.shoulder(d) + 0.83 * (car.top(d) - car.shoulder(d)))
    low = car.shoulder(d) + 0.035
    inside = (high > low + 0.03) & (d < stop)
    d, high, low = d[inside], high[inside], low[inside]
    outline = _area_between(d, low, high)
    tile.fill(outline, _GLASS)

    # Visible through the glass: the studio behind the far window, darker at the rear, and seats in front of it.
    for start, end, brightness in ((d[0] + 0.3, rear_door - 0.12, 1.0), (rear_door + 0.1, door_end - 0.1, 0.63)):
        if end - start > 0.2:
            across = np.linspace(start, end, 30)
            view = _area_between(across, np.interp(across, d, low) + 0.1, np.interp(across, d, high) - 0.06)
            tile.fill(view, (92 * brightness, 99 * brightness, 99 * brightness, 15))
            at, z = end - 0.22, float(np.interp(end - 0.22, d, low))
            tile.fill([(at - 0.14, z), (at - 0.07, z + 0.21), (at + 0.09, z + 0.23), (at + 0.2, z)], _SEAT)

    tile.line(np.concatenate([outline, outline[:1]]), _CHROME if design.chrome else _TRIM, 0.018)
    for pillar in (rear_door, min(door_end, d[-1] - 0.15)):
        foot, head = np.interp(pillar, d, low), np.interp(pillar, d, high)
        tile.fill([(pillar - 0.05, foot), (pillar - 0.04, head), (pillar + 0.04, head), (pillar + 0.05, foot)], _TRIM)


def _area_between(across: Float64Array, low: Float64Array, high: Float64Array) -> Float64Array:
    """Return the outline (2N, 2) of the area between the lines ``low`` and ``high``."""
    return np.concatenate([np.stack([across, high], axis=1), np.stack([across, low], axis=1)[::-1]])


# ---------------------------------------------------------------- front and rear


def _draw_front(tile: _TextureTile, design: CarDesign) -> None:
    car = design.proportions
    half, lamp, floor = car.width / 2, car.nose, car.clearance
    trim = _CHROME if design.chrome else _TRIM
    if car.kind == "convertible":
        tile.box(0, 1.8, 2.1, 2 * (1.8 - car.header[1] + 0.01), _TRIM)
    foot = car.cowl[1] + 0.015
    _draw_window(tile, car, foot, car.header[1] - 0.035, brightness=1.0, seats=True)
    for middle in (-0.3, 0.3):
        tile.line([(middle - 0.3, foot + 0.045), (middle + 0.27, foot + 0.015)], _BLACK, 0.014)  # a wiper

    tile.fill_both([(half * a, lamp + b) for a, b in ((0.52, -0.10), (0.56, 0.0), (1.02, 0.07), (1.02, -0.1))], _LAMP)
    tile.fill_both([(half * a, lamp + b) for a, b in ((0.9, -0.08), (0.9, 0.03), (1.0, 0.04), (1.0, -0.07))], _AMBER)
    for side in (-half, half):
        for at, radius in ((0.66, 0.05), (0.8, 0.06)):
            tile.disc(side * at, lamp - 0.04, radius, _LENS)
            tile.disc(side * at, lamp - 0.04, radius * 0.7, (96, 100, 104, 30))
            tile.disc(side * at, lamp - 0.04, radius * 0.35, (226, 230, 232, 30))
        tile.box(side * 0.74, floor + 0.19, 0.3, 0.13, _TRIM)
        tile.disc(side * 0.74, floor + 0.19, 0.05, _LENS)

    depth, share = ((0.16, 0.48), (0.24, 0.40), (0.30, 0.50))[design.grille]
    foot, low, high = lamp - depth, 0.8 * share * half, share * half
    grille = [(-low, foot), (low, foot), (high, lamp + 0.01), (-high, lamp + 0.01)]
    tile.fill(grille, _BLACK)
    for z in np.arange(foot + 0.03, lamp, 0.045):
        tile.line([(-low, z), (low, z)], trim, 0.012)
    tile.line([*grille, grille[0]], trim, 0.022)
    tile.disc(0, lamp - depth / 2, 0.055, _CHROME)
    intake = [(half * a, floor + b) for a, b in ((-0.52, 0.1), (0.52, 0.1), (0.46, 0.24), (-0.46, 0.24))]
    tile.fill(intake, _BLACK)

    tile.box(0, car.trim_height / 2, 2 * _HALF, car.trim_height, _TRIM)
    tile.line([(-_HALF, lamp + 0.075), (_HALF, lamp + 0.075)], _paint(design, 0.5), 0.006)
    _draw_plate(tile, floor + 0.27)


def _draw_rear(tile: _TextureTile, design: CarDesign) -> None:
    car = design.proportions
    half, lamp, floor = car.width / 2, car.tail - 0.18, car.clearance
    if car.kind == "convertible":
        tile.box(0, 1.5, 2.1, 2 * (1.5 - car.deck[1] + 0.01), _TRIM)
    if car.kind == "pickup":  # a cloth cover over the bed
        tile.box(0, (car.deck[1] + car.tail) / 2, 1.86 * half, car.deck[1] - car.tail + 0.02, _TRIM)
    _draw_window(tile, car, car.deck[1] + 0.04, car.roof_end[1] - 0.07, brightness=0.6, seats=False)
    tile.box(0, car.roof_end[1] - 0.05, 0.32, 0.025, _RED)

    tile.fill_both([(half * a, lamp + b) for a, b in ((0.62, -0.06), (0.58, 0.08), (1.02, 0.09), (1.02, -0.1))], _RED)
    for side in (-half, half):
        tile.box(side * 0.74, lamp + 0.005, 0.16, 0.045, (225, 205, 205, 30))
        tile.box(side * 0.7, floor + 0.22, 0.2, 0.035, _RED)
        tile.line([(side * 0.56, floor + 0.36), (side * 0.56, car.tail - 0.02)], _paint(design, 0.5), 0.006)
    tile.line([(-_HALF, floor + 0.36), (_HALF, floor + 0.36)], _paint(design, 0.4), 0.007)
    tile.box(0, car.tail - 0.04, half, 0.03, _CHROME if design.chrome else _paint(design, 0.7))
    tile.box(0, car.trim_height / 2, 2 * _HALF, car.trim_height, _TRIM)
    tile.box(half * 0.6, floor + 0.03, 0.15, 0.06, _CHROME)
    _draw_plate(tile, floor + 0.3 if car.kind == "pickup" else car.tail - 0.2)


def _draw_window(
    tile: _TextureTile, car: Proportions, foot: float, head: float, *, brightness: float, seats: bool
) -> None:
    """Draw windshield or rear window between the heights ``foot`` and ``head``: dark glass, and what is behind it."""

    def half_width(z: float) -> float:
        return car.width / 2 * (0.84 - 0.16 * (z - car.belt) / (car.peak[1] - car.belt))

    low, high = half_width(foot), half_width(head)
    tile.fill([(-low, foot), (low, foot), (high, head), (-high, head)], _BLACK)
    low, high, foot, head = low - 0.03, high - 0.03, foot + 0.015, head - 0.02
    glass = [(-low, foot), (low, foot), (high, head), (-high, head)]
    tile.fill(glass, (44 * brightness, 49 * brightness, 50 * brightness, 15))
    middle, top = foot + 0.45 * (head - foot), head - 0.05
    view = [(-0.9 * high, middle), (0.9 * high, middle), (0.85 * high, top), (-0.85 * high, top)]
    tile.fill(view, (92 * brightness, 99 * brightness, 99 * brightness, 15))
    if seats:
        for at in (-0.38, 0.38):
            tile.box(at, foot + 0.3 * (head - foot), 0.44, 0.4 * (head - foot), _SEAT)
            tile.disc(at, middle + 0.03, 0.11, _SEAT)
    tile.line([(-low, foot), (low, foot)], _BLACK, 0.03)


def _draw_plate(tile: _TextureTile, z: float) -> None:
    tile.box(0, z, 0.36, 0.2, (40, 41, 43, 10))
    tile.box(0, z, 0.33, 0.17, (238, 240, 242, 8))
    tile.box(0, z - 0.062, 0.33, 0.045, (30, 130, 205, 8))
    tile.box(0.03, z + 0.01, 0.18, 0.03, (120, 124, 128, 8))
    tile.disc(-0.105, z + 0.01, 0.03, (30, 130, 205, 8))


# ---------------------------------------------------------------- wheel


def _draw_wheel(tile: _TextureTile, design: CarDesign) -> None:
    radius = _WHEEL_RADIUS / _SCALE
    for share, color in ((1.05, _TIRE), (0.72, _RIM), (0.66, (18, 18, 19, 4)), (0.40, (60, 60, 62, 30))):
        tile.disc(0, 0, radius * share, color)
    thin = 0.25 / design.spokes
    spoke = np.array([(0.1, -0.09 - thin), (0.7, -0.05 - thin), (0.7, 0.05 + thin), (0.1, 0.09 + thin)]) * radius
    for turn in np.arange(design.spokes) * 2 * np.pi / design.spokes:
        turned = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
        tile.fill(spoke @ turned, _RIM)
    tile.disc(0, 0, radius * 0.17, (150, 152, 155, 60))
    tile.disc(0, 0, radius * 0.08, (70, 72, 75, 60))
