"""Invented cars for the drawn sample: proportions, body shape and paintwork as a textured triangle model.

Lengths are in metres. Sideways, a car is described by ``d``, the distance behind its nose, and ``z``, the height above the
floor. The finished model is in the car's own frame: x forward, y to its left, z up, the origin on the floor at its middle.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import cv2
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Colour = tuple[float, float, float, float]
"""Red, green and blue as in an sRGB picture, then the share of light that the surface mirrors head-on; all 0 to 255."""

# ---------------------------------------------------------------- proportions


@dataclass(frozen=True)
class Proportions:
    """Measures of one kind of car, in metres; ``landmarks`` are (d, z) along the upper line of the side view."""

    kind: str
    length: float
    width: float
    nose: float
    cowl: tuple[float, float]
    header: tuple[float, float]
    peak: tuple[float, float]
    roof_end: tuple[float, float]
    deck: tuple[float, float]
    tail: float
    belt: float
    front_axle: float
    wheelbase: float
    wheel_radius: float
    clearance: float
    doors: int = 4
    cladding: bool = False
    rails: bool = False

    @cached_property
    def upper_line(self) -> tuple[Floats, Floats]:
        """Distances d and heights z of the side view's upper line, each of shape (N,), smoothed as pressed steel is."""
        points = np.array(
            [
                (-1.0, self.nose),
                (0.0, self.nose),
                (0.22, self.nose + 0.35 * (self.cowl[1] - self.nose)),
                self.cowl,
                self.header,
                self.peak,
                self.roof_end,
                self.deck,
                (self.length - 0.06, self.tail),
                (self.length + 1.0, self.tail - 0.03),
            ]
        )
        d = np.arange(-0.5, self.length + 0.5, 0.01)
        z = np.interp(d, points[:, 0], points[:, 1])
        kernel = np.hanning(17)
        padded = np.pad(z, 8, mode="edge")
        return d, np.convolve(padded, kernel / kernel.sum(), mode="valid")

    def top(self, d: Floats) -> Floats:
        """Height of the side view's upper line at distances ``d``."""
        return np.interp(d, *self.upper_line)

    def shoulder(self, d: Floats) -> Floats:
        """Height where the flank ends and bonnet, glass or boot begins; it rises a little towards the tail."""
        return np.minimum(self.belt + 0.05 * (d / self.length - 0.4), self.top(d) - 0.05)

    @property
    def axles(self) -> tuple[float, float]:
        """Distances d of the two axles."""
        return self.front_axle, self.front_axle + self.wheelbase

    @property
    def arch_radius(self) -> float:
        """Radius of the cut-outs above the wheels."""
        return self.wheel_radius + 0.06


KINDS = (
    Proportions("saloon", 4.86, 1.84, 0.70, (1.35, 0.99), (2.10, 1.41), (2.65, 1.45), (3.35, 1.39), (4.15, 1.11), 1.06,
                0.95, 0.95, 2.80, 0.335, 0.20),
    Proportions("suv", 4.78, 1.93, 0.92, (1.30, 1.17), (1.92, 1.69), (2.60, 1.75), (4.35, 1.68), (4.66, 1.16), 1.08,
                1.12, 0.92, 2.85, 0.375, 0.26, cladding=True, rails=True),
    Proportions("hatchback", 4.25, 1.78, 0.74, (1.15, 1.02), (1.85, 1.44), (2.45, 1.49), (3.75, 1.41), (4.12, 1.04), 0.97,
                0.97, 0.88, 2.60, 0.32, 0.20),
    Proportions("pickup", 5.30, 1.96, 1.02, (1.42, 1.26), (1.98, 1.80), (2.50, 1.86), (3.28, 1.82), (3.50, 1.28), 1.25,
                1.19, 0.96, 3.35, 0.395, 0.32, cladding=True),
    Proportions("coupe", 4.60, 1.87, 0.66, (1.45, 0.96), (2.15, 1.31), (2.60, 1.36), (3.05, 1.31), (4.10, 1.04), 1.00,
                0.92, 0.93, 2.75, 0.345, 0.16, doors=2),
    Proportions("estate", 4.85, 1.84, 0.71, (1.35, 1.00), (2.08, 1.43), (2.70, 1.48), (4.35, 1.41), (4.70, 1.03), 0.98,
                0.96, 0.95, 2.80, 0.335, 0.20, rails=True),
    Proportions("van", 5.05, 1.98, 0.86, (1.00, 1.12), (1.90, 1.70), (2.70, 1.77), (4.62, 1.70), (4.96, 1.10), 1.02,
                1.04, 0.94, 3.02, 0.345, 0.20),
    Proportions("convertible", 4.45, 1.82, 0.67, (1.40, 0.95), (2.05, 1.29), (2.45, 1.34), (2.85, 1.30), (3.55, 1.03), 0.98,
                0.91, 0.90, 2.60, 0.335, 0.16, doors=2),
    Proportions("offroader", 4.45, 1.88, 1.00, (1.45, 1.22), (1.78, 1.80), (2.40, 1.83), (4.22, 1.81), (4.36, 1.20), 1.10,
                1.17, 0.80, 2.75, 0.40, 0.30, cladding=True),
)  # fmt: skip
"""One of each kind of car; a drawn car varies these by a few per cent."""

PAINTS: tuple[tuple[int, int, int], ...] = (
    (236, 237, 238),  # white
    (24, 25, 28),  # black
    (176, 179, 182),  # silver, near the floor's own grey
    (84, 87, 92),  # dark grey
    (128, 20, 26),  # red
    (228, 226, 220),  # pearl white, near the wall
    (30, 52, 104),  # blue
    (128, 130, 131),  # mid grey
    (14, 15, 17),  # black
    (150, 138, 118),  # beige
)
"""Paints in sRGB, in about the mix of a used-car lot."""


@dataclass(frozen=True)
class Design:
    """One invented car: its measures, its paint (sRGB, 0 to 255) and the choices of trim."""

    measures: Proportions
    paint: tuple[int, int, int]
    chrome: bool
    grille: int
    spokes: int
    aerial: bool


def design_car(seed: int, index: int) -> Design:
    """Invent the car number ``index`` of the sample ``seed``; neighbours differ in kind and paint."""
    deal = np.random.default_rng((seed, 0))
    kinds, paints = deal.permutation(len(KINDS)), deal.permutation(len(PAINTS))
    rng = np.random.default_rng((seed, 1, index))
    base = KINDS[kinds[index % len(KINDS)]]
    stretch, widen, lift = 1 + rng.uniform(-0.03, 0.03, 3)

    def scaled(point: tuple[float, float]) -> tuple[float, float]:
        return point[0] * stretch, point[1] * lift

    measures = replace(
        base,
        length=base.length * stretch, width=base.width * widen, nose=base.nose * lift, cowl=scaled(base.cowl),
        header=scaled(base.header), peak=scaled(base.peak), roof_end=scaled(base.roof_end), deck=scaled(base.deck),
        tail=base.tail * lift, belt=base.belt * lift, front_axle=base.front_axle * stretch,
        wheelbase=base.wheelbase * stretch, wheel_radius=base.wheel_radius * (1 + rng.uniform(-0.03, 0.03)),
        clearance=base.clearance * lift,
    )  # fmt: skip
    return Design(
        measures,
        PAINTS[paints[index % len(PAINTS)]],
        chrome=bool(rng.random() < 0.5),
        grille=int(rng.integers(3)),
        spokes=int(rng.choice([5, 6, 7, 10])),
        aerial=bool(rng.random() < 0.6),
    )


# ---------------------------------------------------------------- texture

SCALE = 320
"""Texture pixels per metre, about the scale of the picture."""

TEXTURE_HEIGHT, TEXTURE_WIDTH = 1280, 1856
_SIDE_D, _SIDE_Z = -0.12, 1.96  # d and z at the top left of the side tile
_HALF = 1.05  # the front and rear tiles span y from -_HALF to _HALF
_FRONT_U, _REAR_U, _TILE_V = 0, 672, 640
_WHEEL_UV = (1600.0, 832.0)  # centre of the wheel's tile
_WHEEL_PIXELS = 180.0  # texture pixels per wheel radius
_SWATCHES = {"black": (1420, 1150), "tyre": (1500, 1150), "chrome": (1580, 1150), "paint": (1660, 1150)}

_BLACK: Colour = (10, 10, 11, 2)
_TRIM: Colour = (26, 27, 29, 6)
_TYRE: Colour = (30, 30, 31, 2)
_GLASS: Colour = (30, 34, 35, 15)
_CHROME: Colour = (96, 98, 100, 120)


class _Tile:
    """Draws into one tile of a texture in metres, anti-aliased."""

    def __init__(self, texture_HW4: NDArray[np.uint8], u: float, v: float, left: float, top: float) -> None:
        self.texture_HW4, self.u, self.v, self.left, self.top = texture_HW4, u, v, left, top

    def _fixed(self, points: Floats) -> NDArray[np.int32]:
        pixels = np.stack(
            [self.u + (points[:, 0] - self.left) * SCALE, self.v + (self.top - points[:, 1]) * SCALE], axis=1
        )
        return np.round(pixels * 16).astype(np.int32)

    def fill(self, points: list[tuple[float, float]] | Floats, colour: Colour) -> None:
        """Fill the polygon with the corners ``points`` (across, z)."""
        fixed = self._fixed(np.asarray(points, dtype=float))
        cv2.fillPoly(self.texture_HW4, [fixed], colour, cv2.LINE_AA, 4)

    def line(self, points: list[tuple[float, float]] | Floats, colour: Colour, width: float = 0.01) -> None:
        """Draw the open line through ``points`` (across, z), ``width`` metres wide."""
        fixed = self._fixed(np.asarray(points, dtype=float))
        cv2.polylines(self.texture_HW4, [fixed], False, colour, max(1, round(width * SCALE)), cv2.LINE_AA, 4)

    def box(self, across: float, z: float, width: float, height: float, colour: Colour) -> None:
        """Fill an upright rectangle around the centre (across, z)."""
        a, b = width / 2, height / 2
        self.fill([(across - a, z - b), (across + a, z - b), (across + a, z + b), (across - a, z + b)], colour)

    def disc(self, across: float, z: float, radius: float, colour: Colour) -> None:
        """Fill a disc around the centre (across, z)."""
        turn = np.linspace(0, 2 * np.pi, 48, endpoint=False)
        self.fill(np.stack([across + radius * np.cos(turn), z + radius * np.sin(turn)], axis=1), colour)


def paint_texture(design: Design) -> NDArray[np.uint8]:
    """Return the car's texture, (1280, 1856, 4) uint8: tiles for side, front, rear, wheel and plain materials."""
    texture = np.empty((TEXTURE_HEIGHT, TEXTURE_WIDTH, 4), np.uint8)
    texture[:] = _paint(design)
    # Less light comes to the lower flanks, from the floor only.
    rows = np.arange(TEXTURE_HEIGHT)
    z = _SIDE_Z - np.where(rows < _TILE_V, rows, rows - _TILE_V) / SCALE
    shade = 1 - 0.16 * np.clip((0.85 - z) / 0.65, 0, 1)
    texture[..., :3] = np.round(texture[..., :3] * shade[:, None, None])
    _draw_side(_Tile(texture, 0, 0, _SIDE_D, _SIDE_Z), design)
    _draw_front(_Tile(texture, _FRONT_U, _TILE_V, -_HALF, _SIDE_Z), design)
    _draw_rear(_Tile(texture, _REAR_U, _TILE_V, -_HALF, _SIDE_Z), design)
    _draw_wheel(texture, design)
    for name, colour in (("black", _BLACK), ("tyre", _TYRE), ("chrome", _CHROME), ("paint", _paint(design))):
        u, v = _SWATCHES[name]
        texture[v - 20 : v + 20, u - 20 : u + 20] = colour
    return texture


def _paint(design: Design, shade: float = 1.0) -> Colour:
    red, green, blue = design.paint
    return red * shade, green * shade, blue * shade, 11


def _draw_side(tile: _Tile, design: Design) -> None:
    car = design.measures
    soft_top = car.kind == "convertible"
    d = np.linspace(car.cowl[0] - 0.1, car.deck[0] + 0.1, 200)
    if soft_top:
        tile.fill([*zip(d, car.shoulder(d), strict=True), (d[-1], 1.9), (d[0], 1.9)], _TRIM)
        tile.line([car.cowl, car.header], _paint(design), 0.16)
    # Glass keeps clear of the roof's edge and of the pillars, whatever the slope of the line above it.
    edge = np.min([car.top(d + reach) for reach in (-0.13, -0.06, 0.0, 0.06, 0.13)], axis=0) - 0.075
    lower = car.shoulder(d) + 0.035
    edge = np.minimum(edge, car.shoulder(d) + 0.83 * (car.top(d) - car.shoulder(d)))
    inside = (edge > lower + 0.03) & (d < (3.0 if soft_top else car.roof_end[0] + 0.45))
    if car.kind == "pickup":
        inside &= d < car.roof_end[0] - 0.02
    d, edge, lower = d[inside], edge[inside], lower[inside]
    outline = np.concatenate([np.stack([d, edge], axis=1), np.stack([d, lower], axis=1)[::-1]])
    tile.fill(outline, _GLASS)
    first, last = d[0], d[-1]
    rear_door = car.axles[0] + 0.5 * car.wheelbase if car.doors == 4 else car.axles[0] + 0.72 * car.wheelbase
    door_end = min(car.axles[1] - 0.12, last - 0.15) if car.doors == 4 else rear_door
    front_door = car.axles[0] + car.arch_radius + 0.1
    # Behind the glass: the studio through the far window, and dark seats before it.
    for start, end in ((first + 0.3, rear_door - 0.12), (rear_door + 0.1, door_end - 0.1)):
        if end - start < 0.2:
            continue
        across = np.linspace(start, end, 30)
        high = np.interp(across, d, edge) - 0.06
        low = np.interp(across, d, lower) + 0.10
        view = np.concatenate([np.stack([across, high], axis=1), np.stack([across, low], axis=1)[::-1]])
        tile.fill(view, (92, 99, 99, 15) if end < rear_door else (58, 62, 63, 15))
        seat = end - 0.22
        z = float(np.interp(seat, d, lower))
        tile.fill([(seat - 0.14, z), (seat - 0.07, z + 0.21), (seat + 0.09, z + 0.23), (seat + 0.2, z)], _GLASS)
    tile.line(outline[[*range(len(outline)), 0]], _CHROME if design.chrome else _TRIM, 0.018)
    for pillar in {rear_door, door_end} if car.doors == 4 else {rear_door}:
        if first + 0.1 < pillar < last - 0.08:
            z0, z1 = float(np.interp(pillar, d, lower)), float(np.interp(pillar, d, edge))
            tile.fill([(pillar - 0.05, z0), (pillar - 0.04, z1), (pillar + 0.04, z1), (pillar + 0.05, z0)], _TRIM)
    gap = _paint(design, 0.4)
    sill = car.clearance + 0.1
    belt = float(car.belt)
    for at in {front_door, rear_door, door_end}:
        tile.line([(at, belt), (at + 0.01, belt - 0.3), (at - 0.02, sill)], gap, 0.007)
    tile.line([(front_door, sill), (door_end, sill)], gap, 0.007)
    for at in {rear_door - 0.14, door_end - 0.14}:
        tile.box(at, belt - 0.105, 0.2, 0.05, _paint(design, 0.55))
        tile.box(at, belt - 0.1, 0.19, 0.026, _CHROME if design.chrome else _paint(design, 0.9))
    tile.line([(front_door - 0.55, belt - 0.2), (door_end + 0.5, belt - 0.15)], _paint(design, 0.82), 0.01)
    lamp, tail = car.nose + 0.0, car.tail - 0.13
    tile.fill([(0.02, lamp - 0.12), (0.02, lamp + 0.02), (0.42, lamp + 0.09), (0.30, lamp - 0.04)], (70, 73, 76, 30))
    tile.fill([(0.05, lamp - 0.10), (0.05, lamp), (0.30, lamp + 0.045), (0.24, lamp - 0.04)], (150, 155, 160, 50))
    tile.fill([(0.27, lamp - 0.03), (0.28, lamp + 0.04), (0.38, lamp + 0.07), (0.31, lamp - 0.02)], (214, 104, 26, 25))
    end = car.length
    tile.fill([(end, tail - 0.1), (end, tail + 0.1), (end - 0.3, tail + 0.1), (end - 0.2, tail - 0.06)], (150, 12, 18, 25))
    for start, stop in ((0.0, car.axles[0] - car.arch_radius), (end, car.axles[1] + car.arch_radius)):
        tile.line([(start, car.clearance + 0.36), (stop, car.clearance + 0.36)], gap, 0.007)
    tile.box(end / 2, _trim_height(car) / 2, 1.1 * end, _trim_height(car), _TRIM)
    for axle in car.axles:
        rim = car.arch_radius + (0.07 if car.cladding else 0.012)
        tile.disc(axle, car.wheel_radius, rim, _TRIM if car.cladding else _paint(design, 0.3))


def _trim_height(car: Proportions) -> float:
    """Height up to which sills and bumpers are unpainted."""
    return car.clearance + (0.16 if car.cladding else 0.07)


def _half_width(car: Proportions, z: float) -> float:
    """Half the width of the cabin's glass at height ``z``."""
    rise = (z - car.belt) / (car.peak[1] - car.belt)
    return car.width / 2 * (0.84 - 0.16 * rise)


def _draw_screen(tile: _Tile, car: Proportions, bottom: float, top: float, tint: float) -> None:
    """Draw windscreen or rear window between two heights: dark glass, seats and a brighter view through."""
    low, high = _half_width(car, bottom), _half_width(car, top)
    tile.fill([(-low, bottom), (low, bottom), (high, top), (-high, top)], _BLACK)
    low, high = low - 0.03, high - 0.03
    bottom, top = bottom + 0.015, top - 0.02
    shade: Colour = (44 * tint, 49 * tint, 50 * tint, 15)
    tile.fill([(-low, bottom), (low, bottom), (high, top), (-high, top)], shade)
    middle = bottom + 0.45 * (top - bottom)
    tile.fill([(-high * 0.9, middle), (high * 0.9, middle), (high * 0.85, top - 0.05), (-high * 0.85, top - 0.05)],
              (92 * tint, 99 * tint, 99 * tint, 15))  # fmt: skip
    for seat in (-0.38, 0.38):
        tile.box(seat, bottom + 0.3 * (top - bottom), 0.44, 0.4 * (top - bottom), (26, 27, 28, 20))
        tile.disc(seat, middle + 0.03, 0.11, (22, 23, 24, 20))
    tile.line([(-low, bottom), (low, bottom)], _BLACK, 0.03)


def _draw_plate(tile: _Tile, z: float) -> None:
    tile.box(0, z, 0.36, 0.2, (40, 41, 43, 10))
    tile.box(0, z, 0.33, 0.17, (238, 240, 242, 8))
    tile.box(0, z - 0.062, 0.33, 0.045, (30, 130, 205, 8))
    tile.box(0.03, z + 0.01, 0.18, 0.03, (120, 124, 128, 8))
    tile.disc(-0.105, z + 0.01, 0.03, (30, 130, 205, 8))


def _draw_front(tile: _Tile, design: Design) -> None:
    car = design.measures
    half = car.width / 2
    lamp, floor = car.nose, car.clearance
    if car.kind == "convertible":
        tile.box(0, 1.8, 2.1, 2 * (1.8 - car.header[1] + 0.01), _TRIM)
    _draw_screen(tile, car, car.cowl[1] + 0.015, car.header[1] - 0.035, 1.0)
    for side in (-1, 1):
        wiper = car.cowl[1] + 0.03
        tile.line([(side * 0.02 + 0.3, wiper), (side * 0.35 - 0.25, wiper + 0.03)], _BLACK, 0.014)
        tile.fill([(side * half * a, lamp + b) for a, b in ((0.52, -0.10), (0.56, 0.0), (1.02, 0.07), (1.02, -0.1))], (60, 63, 66, 30))
        for at, radius in ((0.66, 0.05), (0.8, 0.06)):
            tile.disc(side * half * at, lamp - 0.04, radius, (150, 154, 158, 60))
            tile.disc(side * half * at, lamp - 0.04, radius * 0.7, (96, 100, 104, 90))
            tile.disc(side * half * at, lamp - 0.04, radius * 0.35, (226, 230, 232, 90))
        tile.fill([(side * half * a, lamp + b) for a, b in ((0.9, -0.08), (0.9, 0.03), (1.0, 0.04), (1.0, -0.07))], (214, 104, 26, 25))
        tile.box(side * half * 0.74, floor + 0.19, 0.3, 0.13, _TRIM)
        tile.disc(side * half * 0.74, floor + 0.19, 0.05, (190, 194, 197, 60))
    low, wide = ((0.16, 0.48), (0.24, 0.40), (0.3, 0.5))[design.grille]
    grille = [(-half * wide * 0.8, lamp - low), (half * wide * 0.8, lamp - low), (half * wide, lamp + 0.01), (-half * wide, lamp + 0.01)]
    tile.fill(grille, _BLACK)
    for z in np.arange(lamp - low + 0.03, lamp, 0.045):
        tile.line([(-half * wide * 0.8, z), (half * wide * 0.8, z)], _CHROME if design.chrome else _TRIM, 0.012)
    tile.line([*grille, grille[0]], _CHROME if design.chrome or design.grille == 0 else _TRIM, 0.022)
    tile.disc(0, lamp - low / 2, 0.055, _CHROME)
    tile.fill([(-half * 0.52, floor + 0.1), (half * 0.52, floor + 0.1), (half * 0.46, floor + 0.24), (-half * 0.46, floor + 0.24)], _BLACK)
    tile.box(0, _trim_height(car) / 2, 2 * _HALF, _trim_height(car), _TRIM)
    tile.line([(-_HALF, lamp + 0.075), (_HALF, lamp + 0.075)], _paint(design, 0.5), 0.006)
    _draw_plate(tile, floor + 0.27)


def _draw_rear(tile: _Tile, design: Design) -> None:
    car = design.measures
    half = car.width / 2
    tail, floor = car.tail, car.clearance
    if car.kind == "convertible":
        tile.box(0, 1.5, 2.1, 2 * (1.5 - car.deck[1] + 0.01), _TRIM)
    pickup = car.kind == "pickup"
    if pickup:  # a soft cover over the bed
        tile.box(0, (car.deck[1] + tail) / 2, 1.86 * half, car.deck[1] - tail + 0.02, _TRIM)
    _draw_screen(tile, car, car.deck[1] + 0.04, car.roof_end[1] - 0.07, 0.6)
    lamp = tail - 0.13
    for side in (-1, 1):
        tile.fill([(side * half * a, lamp + b) for a, b in ((0.62, -0.06), (0.58, 0.08), (1.02, 0.1), (1.02, -0.1))], (150, 12, 18, 25))
        tile.box(side * half * 0.74, lamp + 0.005, 0.16, 0.045, (225, 205, 205, 30))
        tile.box(side * half * 0.7, floor + 0.22, 0.2, 0.035, (150, 12, 18, 20))
        tile.box(side * half * 0.6, floor + 0.03, 0.15, 0.06, _CHROME)
    tile.box(0, car.roof_end[1] - 0.05, 0.32, 0.03, (150, 12, 18, 20))
    tile.box(0, tail - 0.04, half, 0.03, _CHROME if design.chrome else _paint(design, 0.7))
    _draw_plate(tile, tail - 0.2 if not pickup else floor + 0.3)
    tile.box(0, _trim_height(car) / 2, 2 * _HALF, _trim_height(car), _TRIM)
    tile.line([(-_HALF, floor + 0.36), (_HALF, floor + 0.36)], _paint(design, 0.4), 0.007)
    for side in (-1, 1):
        tile.line([(side * half * 0.56, floor + 0.36), (side * half * 0.56, tail - 0.02)], _paint(design, 0.5), 0.006)


def _draw_wheel(texture_HW4: NDArray[np.uint8], design: Design) -> None:
    u, v = _WHEEL_UV
    unit = _WHEEL_PIXELS
    tile = _Tile(texture_HW4, u, v, 0.0, 0.0)
    radius = unit / SCALE
    tile.disc(0, 0, radius * 1.05, _TYRE)
    tile.disc(0, 0, radius * 0.72, (168, 170, 173, 60))
    tile.disc(0, 0, radius * 0.66, (18, 18, 19, 4))
    tile.disc(0, 0, radius * 0.40, (60, 60, 62, 30))
    for k in range(design.spokes):
        turn = 2 * np.pi * k / design.spokes
        along = np.array([np.cos(turn), np.sin(turn)])
        across = np.array([-along[1], along[0]])
        inner, outer = 0.09 + 0.25 / design.spokes, 0.05 + 0.25 / design.spokes
        corners = np.array(
            [0.1 * along - inner * across, 0.7 * along - outer * across, 0.7 * along + outer * across, 0.1 * along + inner * across]
        )
        tile.fill(corners * radius, (172, 174, 178, 60))
    tile.disc(0, 0, radius * 0.17, (150, 152, 155, 60))
    tile.disc(0, 0, radius * 0.08, (70, 72, 75, 60))


# ---------------------------------------------------------------- shape


@dataclass(frozen=True)
class Triangles:
    """Triangles seen from the side where their corners run anticlockwise, with normals and texture at each corner.

    ``behind`` is added to their distance when they are sorted, so that what the skin covers is drawn before it.
    """

    corners_T33: Floats
    normals_T33: Floats
    uv_T32: Floats
    behind_T: Floats

    def mirrored(self) -> "Triangles":
        """Return the same triangles on the car's other side."""
        flip = np.array([1.0, -1.0, 1.0])
        corners, normals = self.corners_T33[:, ::-1] * flip, self.normals_T33[:, ::-1] * flip
        return Triangles(corners, normals, self.uv_T32[:, ::-1], self.behind_T)


def _join(parts: list[Triangles]) -> Triangles:
    return Triangles(
        np.concatenate([part.corners_T33 for part in parts]),
        np.concatenate([part.normals_T33 for part in parts]),
        np.concatenate([part.uv_T32 for part in parts]),
        np.concatenate([part.behind_T for part in parts]),
    )


def _grid(points_RC3: Floats, swatch: str, behind: float = 0.0) -> Triangles:
    """Triangulate a grid of points in one plain material, with smooth normals.

    The outside is where rows run upwards while columns run to the left.
    """
    rows, columns = points_RC3.shape[:2]
    index = np.arange(rows * columns).reshape(rows, columns)
    a, b, c, d = index[:-1, :-1].ravel(), index[:-1, 1:].ravel(), index[1:, 1:].ravel(), index[1:, :-1].ravel()
    triangles = np.stack([np.stack([a, c, b], axis=1), np.stack([a, d, c], axis=1)], axis=1).reshape(-1, 3)
    points = points_RC3.reshape(-1, 3)
    corners = points[triangles]
    faces = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normals = np.zeros_like(points)
    for corner in range(3):
        np.add.at(normals, triangles[:, corner], faces)
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-12)
    uv = np.broadcast_to(np.array(_SWATCHES[swatch], float), (len(triangles), 3, 2))
    return Triangles(corners, normals[triangles], uv, np.full(len(triangles), behind))


def build_car(design: Design) -> Triangles:
    """Return the car as triangles in its own frame, textured for :func:`paint_texture`."""
    car = design.measures
    parts = _body(car) + _wheels(car) + _mirror(design)
    parts += [part.mirrored() for part in parts]
    parts += _underbody(car)
    if design.aerial:
        parts += _aerial(car)
    return _join(parts)


def _stations(car: Proportions) -> Floats:
    """Distances d of the cross-sections: close together where the shape turns quickly."""
    turn = np.linspace(-1, 1, 21)
    arches = [axle + car.arch_radius * np.sin(turn * np.pi / 2) for axle in car.axles]
    corners = [np.linspace(point[0] - 0.09, point[0] + 0.09, 5) for point in (car.cowl, car.header, car.roof_end, car.deck)]
    every = np.concatenate([np.linspace(0, car.length, 48), *arches, *corners])
    every = np.sort(every[(every >= 0) & (every <= car.length)])
    return every[np.concatenate([[True], np.diff(every) > 0.015])]


def _body(car: Proportions) -> list[Triangles]:
    """Return the left half of the skin: cross-sections along the car, closed by rounded ends."""
    d = _stations(car)[:, None]
    half = car.width / 2
    shoulder, top = car.shoulder(d), car.top(d)
    sill = car.clearance + 0.05 * np.exp(-((car.length - d) / 0.35) ** 2) + 0.03 * np.exp(-((d / 0.3) ** 2))
    bottom = sill.copy()
    for axle in car.axles:
        reach = np.clip(1 - ((d - axle) / car.arch_radius) ** 2, 0, None)
        bottom = np.where(reach > 0, np.maximum(bottom, car.wheel_radius + car.arch_radius * np.sqrt(reach)), bottom)
    narrow = 1 - 0.09 * np.clip(1 - d / 0.9, 0, 1) ** 2 - 0.07 * np.clip(1 - (car.length - d) / 0.9, 0, 1) ** 2

    z = bottom + (shoulder - bottom) * np.linspace(0, 1, 12)
    rise = (z - sill) / (shoulder - sill)
    flank = np.where(rise < 0.66, 1 - 0.055 * ((0.66 - rise) / 0.66) ** 2, 1 - 0.05 * (np.clip(rise - 0.66, 0, None) / 0.34) ** 1.4)
    y = half * narrow * (flank - 0.010 * np.exp(-(((rise - 0.33) / 0.13) ** 2)))
    for axle in car.axles:
        lip = np.hypot(d - axle, z - car.wheel_radius) - car.arch_radius
        y = y + 0.018 * np.exp(-((lip / 0.07) ** 2))
    lower = np.stack(np.broadcast_arrays(d, y, z), axis=2)

    height = top - shoulder
    boxy = 2.6 + 3.0 * np.clip(height / 0.4, 0, 1)
    turn = np.linspace(0, np.pi / 2, 15)
    z = shoulder + height * np.sin(turn) ** (2 / boxy)
    lean = (z - car.belt) / (car.peak[1] - car.belt)
    y = lower[:, -1:, 1] * np.cos(turn) ** (2 / boxy) * (1 - 0.17 * np.clip(lean, 0, 1))
    upper = np.stack(np.broadcast_arrays(d, y, z), axis=2)
    under = np.stack([lower[:, 0] * np.array([1, t, 1]) for t in (0.0, 0.5, 1.0)], axis=1)

    skins = [_capped(lower, car), _capped(upper, car)]
    capped = _capped(under, car)
    skins += [capped[: _CAPS + 1], capped[-_CAPS - 1 :]]
    return [
        *(_textured(_grid(_shaped(points, car), "paint"), car) for points in skins),
        _grid(_shaped(under, car), "black", behind=0.3),
    ]


_CAPS = 8
"""Rings that close the skin at either end."""


def _capped(points_SK3: Floats, car: Proportions) -> Floats:
    """Close the skin at nose and tail with ever smaller copies of the end sections, bulging a little."""
    middle = np.array([0.0, 0.0, 0.55 * car.belt])
    shrink = np.sin(np.linspace(0, np.pi / 2, _CAPS + 1)[:-1])
    bulge = 0.07 * np.sqrt(1 - shrink**2)
    rounded = []
    for end, sign in ((points_SK3[0], -1.0), (points_SK3[-1], 1.0)):
        rings = middle + (end - middle) * shrink[:, None, None] ** np.array([0.0, 1.0, 1.0])
        rings[:, :, 0] = end[:, 0] + sign * bulge[:, None]
        rounded.append(rings)
    return np.concatenate([rounded[0], points_SK3, rounded[1][::-1]])


def _shaped(points_SK3: Floats, car: Proportions) -> Floats:
    """Curve nose and tail in plan and side view, and go from (d, y, z) to the car's frame."""
    d, y, z = np.moveaxis(points_SK3, 2, 0)
    across = (np.abs(y) / (car.width / 2)) ** 2.5
    lean_front = np.interp(z, [0, 0.25, 0.4, 0.6, 0.75, 1.1, 2], [0.07, 0.02, 0.0, 0.015, 0.06, 0.14, 0.14])
    lean_rear = np.interp(z, [0, 0.25, 0.4, 0.6, 0.75, 1.1, 2], [0.10, 0.03, 0.0, 0.02, 0.06, 0.07, 0.07])
    near_nose = np.clip(1 - d / 0.9, 0, 1) ** 1.5
    near_tail = np.clip(1 - (car.length - d) / 0.9, 0, 1) ** 1.5
    d = d + near_nose * (0.20 * across + lean_front) - near_tail * (0.15 * across + lean_rear)
    return np.stack([car.length / 2 - d, y, z], axis=2)


def _textured(part: Triangles, car: Proportions) -> Triangles:
    """Give the skin's triangles the side, front or rear tile, by the way they face."""
    x, y, z = np.moveaxis(part.corners_T33, 2, 0)
    # The two triangles of a quadrilateral go together, lest the seam between two tiles be a saw.
    centre = np.repeat(part.corners_T33.reshape(-1, 6, 3).mean(axis=1), 2, axis=0)
    facing = np.repeat(np.abs(part.normals_T33.reshape(-1, 6, 3).mean(axis=1)), 2, axis=0)
    side = facing[:, 1] > np.maximum(facing[:, 0], 0.75 * facing[:, 2])
    side |= (centre[:, 2] < car.belt) & (np.abs(centre[:, 0]) < car.length / 2 - 0.6)
    front = centre[:, 0] > car.length / 2 - car.peak[0]
    v_side = (_SIDE_Z - z) * SCALE
    side_uv = np.stack([(car.length / 2 - x - _SIDE_D) * SCALE, v_side], axis=2)
    end_u = np.where(front[:, None], _FRONT_U, _REAR_U) + (y + _HALF) * SCALE
    end_uv = np.stack([end_u, _TILE_V + v_side], axis=2)
    return replace(part, uv_T32=np.where(side[:, None, None], side_uv, end_uv))


def _wheels(car: Proportions) -> list[Triangles]:
    """Return the left wheels: tyre, and a rim seen from outside."""
    turn = np.linspace(0, 2 * np.pi, 41)
    circle = np.stack([np.cos(turn), np.zeros(41), np.sin(turn)], axis=1)
    profile = [(0.93, -0.23), (1.0, -0.20), (1.0, -0.04), (0.97, -0.012), (0.90, 0.0), (0.76, 0.0)]
    rim = [(0.76, 0.0), (0.70, -0.004), (0.67, -0.03), (0.3, -0.03), (0.15, -0.015), (0.001, -0.01)]
    parts = []
    for axle in car.axles:
        hub = np.array([car.length / 2 - axle, car.width / 2 - 0.035, car.wheel_radius])
        for rings, swatch in ((profile, "tyre"), (rim, "chrome")):
            points = np.stack([hub + circle * car.wheel_radius * r + np.array([0, offset, 0]) for r, offset in rings])
            part = _grid(points, swatch, 0.3)
            around = (part.corners_T33[..., [0, 2]] - hub[[0, 2]]) * [-1, -1] / car.wheel_radius
            if swatch == "chrome":
                part = replace(part, uv_T32=np.array(_WHEEL_UV) + around * _WHEEL_PIXELS)
            parts.append(part)
    return parts


def _ball(centre: Floats, size: Floats, swatch: str, behind: float = 0.0) -> Triangles:
    """Return a rounded box around ``centre`` with half-sizes ``size``."""
    up = np.linspace(-np.pi / 2, np.pi / 2, 9)[:, None]
    around = np.linspace(0, 2 * np.pi, 17)[None, :]

    def boxy(value: Floats) -> Floats:
        return np.sign(value) * np.abs(value) ** 0.55

    unit = np.stack(
        np.broadcast_arrays(boxy(np.cos(up)) * boxy(np.cos(around)), boxy(np.cos(up)) * boxy(np.sin(around)), boxy(np.sin(up))),
        axis=2,
    )
    return _grid(centre + unit[::-1] * size, swatch, behind)


def _mirror(design: Design) -> list[Triangles]:
    """Return the left door mirror on its stalk, and for some cars the left roof rail."""
    car = design.measures
    x, y, z = car.length / 2 - car.cowl[0] - 0.42, car.width / 2, car.belt + 0.085
    parts = [
        _ball(np.array([x, y + 0.09, z]), np.array([0.05, 0.11, 0.07]), "paint" if not car.cladding else "black"),
        _ball(np.array([x, y - 0.05, z - 0.055]), np.array([0.03, 0.08, 0.02]), "black"),
    ]
    if car.rails:
        d = np.linspace(car.header[0] + 0.15, car.roof_end[0] - 0.1, 9)
        inset = car.width / 2 * 0.60
        turn = np.linspace(0, 2 * np.pi, 9)
        x, y, z = (car.length / 2 - d)[:, None], inset + 0.017 * np.cos(turn), car.top(d)[:, None] + 0.017 * np.sin(turn)
        parts.append(_grid(np.stack(np.broadcast_arrays(x, y, z), axis=2), "chrome", -0.15))
    return parts


def _underbody(car: Proportions) -> list[Triangles]:
    """Return axles and underbody as a dark block, so that nobody looks through the car below its sills."""
    length = car.length / 2 - 0.5
    slices = np.linspace(-length, length, 9)
    bottom, top = car.clearance - 0.03, 0.78 * car.belt
    size = np.array([length / 7.8, 0.32 * car.width, (top - bottom) / 2])
    return [_ball(np.array([x, 0, (top + bottom) / 2]), size, "black", 0.3) for x in (slices[:-1] + slices[1:]) / 2]


def _aerial(car: Proportions) -> list[Triangles]:
    """Return a thin rod aerial at the rear of the roof."""
    x = car.length / 2 - car.roof_end[0] + 0.25
    z = float(car.top(np.array(car.roof_end[0] - 0.25)))
    foot, tip = np.array([x, 0.0, z - 0.02]), np.array([x - 0.16, 0.0, z + 0.17])
    turn = np.linspace(0, 2 * np.pi, 7)
    circle = np.stack([np.cos(turn), np.sin(turn), np.zeros(7)], axis=1)
    return [_grid(np.stack([tip + 0.004 * circle, foot + 0.009 * circle]), "black", -0.3)]
