"""Designs of the synthetic cars: body proportions, paint and trim.

The side view of a car has coordinates ``d``, the distance behind its nose, and ``z``, the height above the floor, in
meters.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from pipeline.utils.arrays import Float64Array

Point = tuple[float, float]


@dataclass(frozen=True)
class Proportions:
    """Measures of one kind of car, in meters; pairs are points (d, z) on the upper outline of the side view."""

    kind: str
    length: float
    width: float
    nose: float
    """Height of the front edge of the hood."""
    cowl: Point
    """Lower edge of the windshield."""
    header: Point
    """Upper edge of the windshield."""
    peak: Point
    """Highest point of the roof."""
    roof_end: Point
    """Upper edge of the rear window."""
    deck: Point
    """Lower edge of the rear window."""
    tail: float
    """Height of the rear edge of the trunk."""
    belt: float
    """Height at which the doors end and the side windows begin."""
    front_axle: float
    """Distance d of the front axle."""
    wheelbase: float
    wheel_radius: float
    clearance: float
    """Height of the sills above the floor."""
    doors: int = 4
    cladding: bool = False
    """Unpainted sills and wheel arches."""
    rails: bool = False
    """Roof rails."""

    @cached_property
    def upper_line(self) -> tuple[Float64Array, Float64Array]:
        """Coordinates d and z of the upper outline of the side view, each (N,), smoothed to round the corners."""
        first_rise = (0.22, self.nose + 0.35 * (self.cowl[1] - self.nose))
        end = (self.length - 0.06, self.tail)
        points = [(0.0, self.nose), first_rise, self.cowl, self.header, self.peak, self.roof_end, self.deck, end]
        d = np.arange(-0.5, self.length + 0.5, 0.01)
        z = np.interp(d, *np.transpose(points))
        kernel = np.hanning(31)
        return d, np.convolve(np.pad(z, 15, mode="edge"), kernel / kernel.sum(), mode="valid")

    def top(self, d: Float64Array) -> Float64Array:
        """Height of the upper outline at distances ``d``."""
        return np.interp(d, *self.upper_line)

    def shoulder(self, d: Float64Array) -> Float64Array:
        """Upper edge of the flank, where hood, glass or trunk begins; it rises a little towards the tail."""
        return np.minimum(self.belt + 0.05 * (d / self.length - 0.4), self.top(d) - 0.05)

    @property
    def axles(self) -> tuple[float, float]:
        """Distances d of the two axles."""
        return self.front_axle, self.front_axle + self.wheelbase

    @property
    def arch_radius(self) -> float:
        """Radius of the wheel arches."""
        return self.wheel_radius + 0.06

    @property
    def trim_height(self) -> float:
        """Height up to which sills and bumpers are unpainted."""
        return self.clearance + (0.16 if self.cladding else 0.07)

    def scaled(self, along: float, across: float, up: float) -> "Proportions":
        """Return the same car scaled in length, width and height by these factors, with wheels of the same radius."""

        def scaled(point: Point) -> Point:
            return point[0] * along, point[1] * up

        return replace(
            self,
            length=self.length * along,
            front_axle=self.front_axle * along,
            wheelbase=self.wheelbase * along,
            width=self.width * across,
            nose=self.nose * up,
            tail=self.tail * up,
            belt=self.belt * up,
            clearance=self.clearance * up,
            cowl=scaled(self.cowl),
            header=scaled(self.header),
            peak=scaled(self.peak),
            roof_end=scaled(self.roof_end),
            deck=scaled(self.deck),
        )


# fmt: off
BODY_STYLES = (
    Proportions("saloon", 4.86, 1.84, 0.70, (1.35, 0.99), (2.10, 1.41), (2.65, 1.45), (3.35, 1.39), (4.15, 1.11),
                1.06, 0.95, 0.95, 2.80, 0.335, 0.20),
    Proportions("suv", 4.78, 1.93, 0.92, (1.30, 1.17), (1.92, 1.69), (2.60, 1.75), (4.35, 1.68), (4.66, 1.16),
                1.08, 1.12, 0.92, 2.85, 0.375, 0.26, cladding=True, rails=True),
    Proportions("hatchback", 4.25, 1.78, 0.74, (1.15, 1.02), (1.85, 1.44), (2.45, 1.49), (3.75, 1.41), (4.12, 1.04),
                0.97, 0.97, 0.88, 2.60, 0.32, 0.20),
    Proportions("pickup", 5.30, 1.96, 1.02, (1.42, 1.26), (1.98, 1.80), (2.50, 1.86), (3.28, 1.82), (3.50, 1.28),
                1.25, 1.19, 0.96, 3.35, 0.395, 0.32, cladding=True),
    Proportions("coupe", 4.60, 1.87, 0.66, (1.45, 0.96), (2.15, 1.31), (2.60, 1.36), (3.05, 1.31), (4.10, 1.04),
                1.00, 0.92, 0.93, 2.75, 0.345, 0.16, doors=2),
    Proportions("estate", 4.85, 1.84, 0.71, (1.35, 1.00), (2.08, 1.43), (2.70, 1.48), (4.35, 1.41), (4.70, 1.03),
                0.98, 0.96, 0.95, 2.80, 0.335, 0.20, rails=True),
    Proportions("van", 5.05, 1.98, 0.86, (1.00, 1.12), (1.90, 1.70), (2.70, 1.77), (4.62, 1.70), (4.96, 1.10),
                1.02, 1.04, 0.94, 3.02, 0.345, 0.20),
    Proportions("convertible", 4.45, 1.82, 0.67, (1.40, 0.95), (2.05, 1.29), (2.45, 1.34), (2.85, 1.30), (3.55, 1.03),
                0.98, 0.91, 0.90, 2.60, 0.335, 0.16, doors=2),
    Proportions("offroader", 4.45, 1.88, 1.00, (1.45, 1.22), (1.78, 1.80), (2.40, 1.83), (4.22, 1.81), (4.36, 1.20),
                1.10, 1.17, 0.80, 2.75, 0.40, 0.30, cladding=True),
)
# fmt: on
"""One of each kind of car; a synthetic car differs from its kind by up to 3 % in each direction."""

PAINTS: tuple[tuple[int, int, int], ...] = (
    (236, 237, 238),  # white
    (24, 25, 28),  # black
    (176, 179, 182),  # silver, close to the gray of the floor
    (84, 87, 92),  # dark gray
    (128, 20, 26),  # red
    (228, 226, 220),  # pearl white, close to the wall
    (30, 52, 104),  # blue
    (128, 130, 131),  # mid gray
    (14, 15, 17),  # black
    (150, 138, 118),  # beige
)
"""Paints in sRGB, 0 to 255, with about the frequencies of used cars."""


@dataclass(frozen=True)
class CarDesign:
    """One synthetic car: its proportions, its paint (sRGB, 0 to 255) and its trim."""

    proportions: Proportions
    paint: tuple[int, int, int]
    chrome: bool
    grille: int
    """Shape of the grille: 0, 1 or 2."""
    spokes: int
    antenna: bool


def design_car(seed: int, index: int) -> CarDesign:
    """Return the design of car ``index`` of the sample with this ``seed``; neighbors differ in kind and paint."""
    order_rng = np.random.default_rng((seed, 0))
    kinds, paints = order_rng.permutation(len(BODY_STYLES)), order_rng.permutation(len(PAINTS))
    rng = np.random.default_rng((seed, 1, index))
    proportions = BODY_STYLES[kinds[index % len(BODY_STYLES)]].scaled(*(1 + rng.uniform(-0.03, 0.03, 3)))
    return CarDesign(
        replace(proportions, wheel_radius=proportions.wheel_radius * (1 + rng.uniform(-0.03, 0.03))),
        PAINTS[paints[index % len(PAINTS)]],
        chrome=bool(rng.random() < 0.5),
        grille=int(rng.integers(3)),
        spokes=int(rng.choice([5, 6, 7, 10])),
        antenna=bool(rng.random() < 0.6),
    )
