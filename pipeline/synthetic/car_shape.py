"""Triangle mesh of a synthetic car, with normals and texture positions.

Car coordinates are in meters: x forward, y to the car's left, z up, with the origin on the floor at the car's center.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipeline.synthetic.car_design import CarDesign, Proportions
from pipeline.synthetic.car_texture import end_uv, side_uv, swatch_uv, wheel_uv
from pipeline.utils.arrays import Float64Array


@dataclass(frozen=True)
class Triangles:
    """T triangles; seen from outside the car, their corners are in counterclockwise order."""

    corners_T33: Float64Array
    """Corners, in meters."""
    normals_T33: Float64Array
    """Unit normals of the smooth surface at the corners."""
    uv_T32: Float64Array
    """Positions of the corners in the texture, in pixels."""
    depth_offset_T: Float64Array
    """Meters added to the distance when triangles are sorted, so that parts below the skin are drawn before it."""

    def mirrored(self) -> "Triangles":
        """Return the triangles mirrored to the other side of the car."""
        flip = np.array([1.0, -1.0, 1.0])
        corners, normals = self.corners_T33[:, ::-1] * flip, self.normals_T33[:, ::-1] * flip
        return Triangles(corners, normals, self.uv_T32[:, ::-1], self.depth_offset_T)


def build_car(design: CarDesign) -> Triangles:
    """Return the car's mesh; its texture is that of ``pipeline.synthetic.car_texture.paint_texture``."""
    car = design.proportions
    half = [*_body(car), *_wheels(car), *_mirror(car)]
    if car.rails:
        half.append(_roof_rail(car))
    parts = [*half, *(part.mirrored() for part in half), *_underbody(car)]
    if design.antenna:
        parts.append(_antenna(car))
    return Triangles(
        np.concatenate([part.corners_T33 for part in parts]),
        np.concatenate([part.normals_T33 for part in parts]),
        np.concatenate([part.uv_T32 for part in parts]),
        np.concatenate([part.depth_offset_T for part in parts]),
    )


def _grid(points_RC3: Float64Array, material: str, depth_offset: float = 0.0) -> Triangles:
    """Triangulate a grid of points, two triangles per cell, with smooth normals and one plain material.

    Seen from outside with rows running upwards, columns must run to the right.
    """
    rows, columns = points_RC3.shape[:2]
    index = np.arange(rows * columns).reshape(rows, columns)
    a, b, c, d = index[:-1, :-1].ravel(), index[:-1, 1:].ravel(), index[1:, 1:].ravel(), index[1:, :-1].ravel()
    triangles = np.stack([a, c, b, a, d, c], axis=1).reshape(-1, 3)
    points = points_RC3.reshape(-1, 3)
    corners = points[triangles]
    faces = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normals = np.zeros_like(points)
    for corner in range(3):
        np.add.at(normals, triangles[:, corner], faces)
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-12)
    uv = np.broadcast_to(swatch_uv(material), (len(triangles), 3, 2))
    return Triangles(corners, normals[triangles], uv, np.full(len(triangles), depth_offset))


# ---------------------------------------------------------------- skin

_CAP_RINGS = 8  # rings that close the skin at either end


def _body(car: Proportions) -> list[Triangles]:
    """Return the left half of the skin, made of cross-sections along the car and closed by rounded ends."""
    d = _stations(car)[:, None]
    lower = _flank(car, d)
    upper = _cabin(car, d, lower[:, -1:, 1])
    under = np.stack([lower[:, 0] * np.array([1, t, 1]) for t in (0.0, 0.5, 1.0)], axis=1)
    closed = _capped(under, car)
    skins = [_capped(lower, car), _capped(upper, car), closed[: _CAP_RINGS + 1], closed[-_CAP_RINGS - 1 :]]
    return [
        *(_textured(_grid(_shaped(points, car), "paint"), car) for points in skins),
        _grid(_shaped(under, car), "black", depth_offset=0.3),
    ]


def _stations(car: Proportions) -> Float64Array:
    """Return the distances d (S,) of the cross-sections, denser where the shape changes quickly."""
    arches = [axle + car.arch_radius * np.sin(np.linspace(-np.pi / 2, np.pi / 2, 21)) for axle in car.axles]
    turns = [point[0] + np.linspace(-0.09, 0.09, 5) for point in (car.cowl, car.header, car.roof_end, car.deck)]
    d = np.sort(np.concatenate([np.linspace(0, car.length, 48), *arches, *turns]))
    return d[np.diff(d, prepend=-1.0) > 0.015]


def _flank(car: Proportions, d_S1: Float64Array) -> Float64Array:
    """Return points (S, 12, 3), as (d, y, z), from the sills up to the shoulder, with wheel arches cut out."""
    shoulder = car.shoulder(d_S1)
    sill = car.clearance + 0.05 * np.exp(-(((car.length - d_S1) / 0.35) ** 2)) + 0.03 * np.exp(-((d_S1 / 0.3) ** 2))
    bottom = sill
    for axle in car.axles:
        reach = np.clip(1 - ((d_S1 - axle) / car.arch_radius) ** 2, 0, None)
        arch = car.wheel_radius + car.arch_radius * np.sqrt(reach)
        bottom = np.where(reach > 0, np.maximum(bottom, arch), bottom)
    z = bottom + (shoulder - bottom) * np.linspace(0, 1, 12)

    # The flank has a crease at two thirds of its height, a hollow at one third, and lips around the wheels.
    rise = (z - sill) / (shoulder - sill)
    below, above = np.clip(0.66 - rise, 0, None) / 0.66, np.clip(rise - 0.66, 0, None) / 0.34
    bulge = 1 - 0.055 * below**2 - 0.05 * above**1.4 - 0.010 * np.exp(-(((rise - 0.33) / 0.13) ** 2))
    to_nose, to_tail = np.clip(1 - d_S1 / 0.9, 0, 1), np.clip(1 - (car.length - d_S1) / 0.9, 0, 1)
    y = car.width / 2 * (1 - 0.09 * to_nose**2 - 0.07 * to_tail**2) * bulge
    for axle in car.axles:
        lip = np.hypot(d_S1 - axle, z - car.wheel_radius) - car.arch_radius
        y = y + 0.018 * np.exp(-((lip / 0.07) ** 2))
    return np.stack(np.broadcast_arrays(d_S1, y, z), axis=2)


def _cabin(car: Proportions, d_S1: Float64Array, base_S1: Float64Array) -> Float64Array:
    """Return points (S, 15, 3), as (d, y, z), from the shoulder (y = ``base_S1``) up to the middle of the roof (y = 0).

    The sections are quarters of superellipses that lean inwards; higher ones are closer to a rectangle.
    """
    shoulder = car.shoulder(d_S1)
    height = car.top(d_S1) - shoulder
    power = 2 / (2.6 + 3.0 * np.clip(height / 0.4, 0, 1))
    turn = np.linspace(0, np.pi / 2, 15)
    z = shoulder + height * np.sin(turn) ** power
    lean = np.clip((z - car.belt) / (car.peak[1] - car.belt), 0, 1)
    y = base_S1 * np.clip(np.cos(turn), 0, 1) ** power * (1 - 0.17 * lean)
    y[:, -1] = 0  # the cosine leaves a rounding error
    return np.stack(np.broadcast_arrays(d_S1, y, z), axis=2)


def _capped(points_SK3: Float64Array, car: Proportions) -> Float64Array:
    """Close a strip of the skin at nose and tail with ever smaller copies of its end sections, slightly rounded."""
    middle = np.array([0.0, 0.0, 0.55 * car.belt])
    shrink = np.sin(np.linspace(0, np.pi / 2, _CAP_RINGS + 1)[:-1])
    bulge = 0.07 * np.sqrt(1 - shrink**4)
    rounded = []
    for end, sign in ((points_SK3[0], -1), (points_SK3[-1], 1)):
        rings = middle + (end - middle) * shrink[:, None, None]
        rings[:, :, 0] = end[:, 0] + sign * bulge[:, None]
        rounded.append(rings)
    return np.concatenate([rounded[0], points_SK3, rounded[1][::-1]])


def _shaped(points_SK3: Float64Array, car: Proportions) -> Float64Array:
    """Curve nose and tail in top and side view, and convert (d, y, z) to car coordinates."""
    d, y, z = np.moveaxis(points_SK3, 2, 0)
    across = (np.abs(y) / (car.width / 2)) ** 2.5
    heights = [0.0, 0.25, 0.4, 0.6, 0.75, 1.1]
    lean_front = np.interp(z, heights, [0.07, 0.02, 0.0, 0.015, 0.06, 0.14])
    lean_rear = np.interp(z, heights, [0.10, 0.03, 0.0, 0.02, 0.06, 0.07])
    to_nose, to_tail = np.clip(1 - d / 0.9, 0, 1) ** 1.5, np.clip(1 - (car.length - d) / 0.9, 0, 1) ** 1.5
    d = d + to_nose * (0.20 * across + lean_front) - to_tail * (0.15 * across + lean_rear)
    return np.stack([car.length / 2 - d, y, z], axis=2)


def _textured(skin: Triangles, car: Proportions) -> Triangles:
    """Map triangles of the skin to the side, front or rear tile of the texture, by the direction they face."""
    x, y, z = np.moveaxis(skin.corners_T33, 2, 0)
    # Both triangles of a cell use the same tile, so that the seam between two tiles is not jagged.
    center = np.repeat(skin.corners_T33.reshape(-1, 6, 3).mean(axis=1), 2, axis=0)
    facing = np.repeat(np.abs(skin.normals_T33.reshape(-1, 6, 3).mean(axis=1)), 2, axis=0)
    side = facing[:, 1] > np.maximum(facing[:, 0], 0.75 * facing[:, 2])
    side |= (center[:, 2] < car.belt) & (np.abs(center[:, 0]) < car.length / 2 - 0.6)
    front = center[:, 0] > car.length / 2 - car.peak[0]
    uv = np.where(side[:, None, None], side_uv(car.length / 2 - x, z), end_uv(front[:, None], y, z))
    # Normals on the middle line have no y component, so that the two halves join smoothly.
    normals = skin.normals_T33 * np.where(y[..., None] == 0, [1, 0, 1], [1, 1, 1])
    return replace(skin, normals_T33=normals, uv_T32=uv)


# ---------------------------------------------------------------- other parts


def _ring(points: int) -> tuple[Float64Array, Float64Array]:
    """Return cosine and sine of a full turn, each (points,), with the first point repeated at the end."""
    turn = np.linspace(0, 2 * np.pi, points)
    return np.cos(turn), np.sin(turn)


def _block(center: Sequence[float], size: Sequence[float], material: str, depth_offset: float = 0.0) -> Triangles:
    """Return a rounded box around ``center`` that extends ``size`` in each direction."""

    def boxy(value: Float64Array) -> Float64Array:
        return np.sign(value) * np.abs(value) ** 0.55

    down = np.linspace(np.pi / 2, -np.pi / 2, 9)[:, None]
    along, across = _ring(17)
    flat = boxy(np.cos(down))
    unit = np.stack(np.broadcast_arrays(flat * boxy(along), flat * boxy(across), boxy(np.sin(down))), axis=2)
    return _grid(np.array(center) + unit * np.array(size), material, depth_offset)


def _wheels(car: Proportions) -> list[Triangles]:
    """Return the left wheels: tires, and rims."""
    along, up = _ring(41)
    tire = [(0.001, -0.23), (0.93, -0.23), (1.0, -0.20), (1.0, -0.04), (0.97, -0.012), (0.90, 0.0), (0.76, 0.0)]
    rim = [(0.76, 0.0), (0.70, -0.004), (0.67, -0.03), (0.3, -0.03), (0.15, -0.015), (0.001, -0.01)]
    parts = []
    for axle in car.axles:
        hub = np.array([car.length / 2 - axle, car.width / 2 - 0.035, car.wheel_radius])
        for profile, material in ((tire, "tire"), (rim, "chrome")):
            radius, offset = np.transpose(profile)[:, :, None]
            radius = radius * car.wheel_radius
            circles = np.stack(np.broadcast_arrays(radius * along, offset, radius * up), axis=2)
            part = _grid(hub + circles, material, depth_offset=0.3)
            if material == "chrome":
                x, _, z = np.moveaxis((part.corners_T33 - hub) / car.wheel_radius, 2, 0)
                part = replace(part, uv_T32=wheel_uv(x, z))
            parts.append(part)
    return parts


def _mirror(car: Proportions) -> list[Triangles]:
    """Return the left door mirror and its stalk."""
    x, y, z = car.length / 2 - car.cowl[0] - 0.42, car.width / 2, car.belt + 0.085
    return [
        _block((x, y + 0.09, z), (0.05, 0.11, 0.07), "black" if car.cladding else "paint"),
        _block((x, y - 0.05, z - 0.055), (0.03, 0.08, 0.02), "black"),
    ]


def _roof_rail(car: Proportions) -> Triangles:
    d = np.linspace(car.header[0] + 0.15, car.roof_end[0] - 0.1, 9)[:, None]
    across, up = _ring(9)
    y, z = 0.30 * car.width + 0.017 * across, car.top(d) + 0.017 * up
    return _grid(np.stack(np.broadcast_arrays(car.length / 2 - d, y, z), axis=2), "chrome", depth_offset=-0.15)


def _underbody(car: Proportions) -> list[Triangles]:
    """Return dark blocks inside the car, so that it is opaque between the wheels."""
    bottom, top = car.clearance - 0.03, 0.78 * car.belt
    edges = np.linspace(-0.5, 0.5, 9) * (car.length - 1.0)
    reach = (edges[1] - edges[0]) / 2 * 1.03
    size = (reach, 0.32 * car.width, (top - bottom) / 2)
    return [_block((edge + reach, 0.0, (top + bottom) / 2), size, "black", depth_offset=0.3) for edge in edges[:-1]]


def _antenna(car: Proportions) -> Triangles:
    """Return a thin rod at the rear of the roof."""
    d = car.roof_end[0] - 0.25
    z = float(car.top(np.array(d)))
    along, across = _ring(7)
    circle = np.stack([along, across, np.zeros(7)], axis=1)
    foot, tip = np.array([car.length / 2 - d, 0.0, z - 0.02]), np.array([car.length / 2 - d - 0.16, 0.0, z + 0.17])
    return _grid(np.stack([tip + 0.004 * circle, foot + 0.009 * circle]), "black", depth_offset=-0.3)
