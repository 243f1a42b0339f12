"""The embedded world: a small town that is written to disk in the true nuScenes layout.

    python tests/toyworld.py                     # writes data/toy in about a minute, on two cores
    python tests/toyworld.py --train-segmenter   # trains tests/toy_segmenter, a tiny but real Mask2Former

The unmodified devkit loads the result: NuScenes("v1.0-trainval", "data/toy") and NuScenesMap("data/toy", location).
Nothing here imports the rest of the project: this file is the independent ground truth of its tests.

What it keeps of what makes nuScenes hard
  - Paint is 0.15 m wide, dashed and worn; in the map a divider is one unbroken line.
  - Stop lines and arrows look like dividers, and carry their Mapillary label, but are not dividers in the map.
  - Vehicles, trees and buildings hide the ground. Light, haze, texture and noise differ by scene, at night and in rain.
  - Each camera has nuScenes' intrinsics (scaled by 0.32, to 512 x 288) and mounting, and its own time and ego pose.
  - The map is off by N(0, 0.15 m) in x and in y, one draw a scene: the poses in the tables are the true ones plus that
    constant, which is the same as a shifted map. Nothing else in the scene shares it.
  - About one crossing in twelve is missing from the map or is in the map only.

Frames are nuScenes': world is x east, y north, z up; ego is x ahead, y left, z up; cam is x right, y down, z ahead.
`a_T_b` takes points in b to a. The ground is the plane z = 0. Pixel i covers [i, i + 1), so its centre is at i + 0.5;
OpenCV's functions put it at i, which is where every `- 0.5` below comes from.

How an image is made: the ground is one raster a scene (colour and label, 5 cm), looked up through the homography
camera -> ground with mip levels; sky behind it; then every box and billboard as flat faces, farthest first (painter's
algorithm); then the ego car's boot, exposure, noise. All is drawn at 2 x 2 samples a pixel (the ground's colour at
2 x 4), which are then averaged.
"""
import argparse
import hashlib
import json
import math
import multiprocessing
import shutil
import sys
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
from shapely.geometry import Point, Polygon
from shapely.ops import unary_union
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------------------------
# What is fixed: labels, cameras, places

# Mapillary Vistas names. The index is the label id in rendered truth and in tests/toy_segmenter.
LABELS = ["Road", "Lane Marking - General", "Lane Marking - Crosswalk", "Curb", "Sidewalk", "Terrain", "Building",
          "Vegetation", "Car", "Person", "Pole", "Sky", "Ego Vehicle"]
(ROAD, MARKING, CROSSWALK, CURB, SIDEWALK, TERRAIN, BUILDING, VEGETATION, CAR, PERSON, POLE, SKY,
 EGO) = range(len(LABELS))
UNLABELLED = 255                      # a face that changes the colour but not the label: windows, contact shadows
THIN = (CURB, MARKING, CROSSWALK)     # labels that win a pixel from half of its samples on; the last one wins ties

IMAGE_W, IMAGE_H = 512, 288
SCALE = IMAGE_W / 1600                # nuScenes images are 1600 x 900

# name: focal length, principal point (pixels at 1600 x 900), translation (m) and rotation (w, x, y, z) of ego_T_cam,
# time against LIDAR_TOP (ms). One real nuScenes car.
CAMERAS = {
    "CAM_FRONT": (1252.8131, (826.5881, 469.9847), (1.7220, 0.0048, 1.4949),
                  (0.5077241, -0.4973392, 0.4983717, -0.4964832), -35.6),
    "CAM_FRONT_RIGHT": (1256.7485, (817.7888, 451.9542), (1.5808, -0.4991, 1.5175),
                        (-0.2033517, 0.1914633, -0.6785710, 0.6793609), -27.6),
    "CAM_BACK_RIGHT": (1249.9629, (825.3768, 462.5482), (1.0595, -0.4672, 1.5505),
                       (0.1381919, -0.1379672, -0.6893330, 0.6976303), -19.7),
    "CAM_BACK": (796.8911, (857.7774, 476.8849), (0.0552, 0.0108, 1.5679),
                 (0.5067997, -0.4977567, -0.4987849, 0.4965942), -10.5),
    "CAM_BACK_LEFT": (1254.9861, (829.5769, 467.1681), (1.0485, 0.4831, 1.5621),
                      (0.7048620, -0.6907307, -0.1120910, 0.1161735), -0.6),
    "CAM_FRONT_LEFT": (1257.8625, (827.2411, 450.9155), (1.5753, 0.5005, 1.5070),
                       (0.6812089, -0.6687507, 0.2101702, -0.2110816), -43.2),
}
LIDAR_TRANSLATION, LIDAR_ROTATION = (0.9858, 0.0, 1.8402), (-0.7067492, 0.0153010, -0.0173975, 0.7070847)

# The devkit accepts only these four names. No town is in both splits; SEGMENTER_TOWN is never written to disk.
TRAIN_TOWNS = ("boston-seaport", "singapore-onenorth", "singapore-hollandvillage")
VAL_TOWN = "singapore-queenstown"
SEGMENTER_TOWN = "segmenter-town"
RIGHT_HAND_TRAFFIC = ("boston-seaport",)
WEATHER_CYCLE = ("Day", "Rain", "Day", "Day", "Night", "Day")

# ---------------------------------------------------------------------------------------------------------------------
# Sizes in metres and seconds

PAINT_WIDTH, STOP_LINE_WIDTH, KERB_WIDTH = 0.15, 0.40, 0.30
PARKING_WIDTH = 2.3                   # a strip beside the lanes in which vehicles are parked
ROAD_LENGTH = 90.0                    # from the middle of a district to the end of its roads
DISTRICT_SPACING = 330.0              # each scene has a district of its own; districts do not touch
CORNER_RADIUS = 6.0
MAP_ERROR = 0.15                      # standard deviation of the map's offset, each axis, one draw a scene
FRAME_PERIOD = 0.5                    # key frames come at 2 Hz
TEXEL = 0.05                          # size of a cell of the ground raster
VIEW_RADIUS = 75.0                    # the raster reaches this far from the ego path
FAR_GROUND = 300.0                    # beyond this depth the ground is sky (it is all haze)
NEAR_PLANE = 0.3


@dataclass
class Plan:
    """What is known of a scene before it is built; `key` seeds everything in it."""
    name: str
    location: str
    weather: str
    origin: tuple      # world x, y of the middle of its district (m)
    frames: int
    key: tuple         # of ints
    timestamp: int     # of the first key frame (microseconds)
    sweeps: int = 0    # camera frames between two key frames


@dataclass
class Road:
    """A road; `outwards` is the direction of its centreline, away from the junction."""
    line: np.ndarray   # (N, 2) world points of the centreline, one a metre
    lanes_out: int
    lanes_in: int
    lane_width: float
    side: int          # -1: traffic keeps to the right, the outward lanes lie at negative offsets; +1: to the left
    parking: tuple     # widths of the parking strips (right, left)
    centre_style: str  # "double_yellow", "solid_white" or "dashed_white"
    start: float = 0.0  # arc length at which the road leaves the junction

    @property
    def length(self):
        """Metres from the first point of the centreline to the last."""
        return len(self.line) - 1.0

    @property
    def lane_edges(self):
        """Lateral offsets (m, left of outwards is positive) of the rightmost and leftmost lane edge."""
        right, left = (self.lanes_out, self.lanes_in) if self.side < 0 else (self.lanes_in, self.lanes_out)
        return -right * self.lane_width, left * self.lane_width

    @property
    def kerbs(self):
        """Lateral offsets (m) of the right and the left kerb: the lanes and what parking strips there are."""
        right, left = self.lane_edges
        return right - self.parking[0], left + self.parking[1]

    def lane_centre(self, index, outwards):
        """Lateral offset of lane `index` (0 is next to the centreline) in one of the two directions."""
        return (self.side if outwards else -self.side) * (index + 0.5) * self.lane_width

    def at(self, s, offset):
        """Arc lengths (M,) and lateral offsets (M,) or scalar -> world points (M, 2) and headings (M,)."""
        index = np.arange(len(self.line))
        step = np.gradient(self.line, axis=0)
        heading = np.interp(s, index, np.unwrap(np.arctan2(step[:, 1], step[:, 0])))
        centre = np.stack([np.interp(s, index, self.line[:, k]) for k in range(2)], -1)
        left = np.stack([-np.sin(heading), np.cos(heading)], -1)
        return centre + np.asarray(offset)[..., None] * left, heading

    def offset_line(self, offset, start, stop):
        """(M, 2) world points of the line at `offset` from arc length `start` to `stop`: its ends and all whole metres
        between them. So polygons that share an edge share its points, and their union has no hairline gaps."""
        return self.at(np.unique([start, *np.arange(np.ceil(start), stop), stop]), offset)[0]

    def strip(self, right, left, start, stop):
        """(M, 2) outline, counter-clockwise, of what lies between two offsets and two arc lengths."""
        return np.concatenate([self.offset_line(right, start, stop), self.offset_line(left, start, stop)[::-1]])


@dataclass
class District:
    """The roads around one scene: what the map says of them, and what is painted on them. All in world metres."""
    roads: list
    segments: list = field(default_factory=list)        # (Polygon, is_intersection)
    lanes: list = field(default_factory=list)           # Polygon
    lane_dividers: list = field(default_factory=list)   # (line (N, 2), segment type)
    road_dividers: list = field(default_factory=list)   # (line (N, 2), segment type)
    stop_lines: list = field(default_factory=list)      # Polygon
    crossings: list = field(default_factory=list)       # Polygon, as painted
    map_crossings: list = field(default_factory=list)   # Polygon, as in the map
    walkways: list = field(default_factory=list)        # Polygon
    paint: list = field(default_factory=list)           # (outline (N, 2), colour name, label or None)
    surface: Polygon = None                             # union of segments and lanes: its outline is the kerb line
    sidewalk_width: float = 3.0


@dataclass
class Mesh:
    """F flat faces. Colours may exceed 255: lit windows at night."""
    vertices: np.ndarray   # (F, 8, 3) world; faces of fewer corners repeat the last one
    colour: np.ndarray     # (F, 3) RGB albedo
    label: np.ndarray      # (F,) label id or UNLABELLED
    anchor: np.ndarray     # (F, 2) world x, y by whose distance faces are sorted, one for a whole object
    order: np.ndarray      # (F,) order of painting within an object


@dataclass
class Weather:
    """Light and air of a scene; colours are RGB 0..255."""
    kind: str
    sun: np.ndarray        # (3,) unit vector towards the sun
    ambient: float
    diffuse: float
    sky_top: np.ndarray
    sky_low: np.ndarray    # also the colour of haze
    clouds: float
    haze_length: float     # m after which 63% is haze
    gain: np.ndarray       # (3,) exposure and white balance
    noise: float           # standard deviation, grey levels
    wear: float            # 0: fresh paint, 1: hardly visible


@dataclass
class Scene:
    """Everything that can be seen in a scene, and what the tables say of it."""
    plan: Plan
    district: District
    weather: Weather
    description: str
    ego_path: np.ndarray     # (T, 3): time (s), world x, y of the ego origin
    ego_yaw: np.ndarray      # (T,) unwrapped
    wobble: np.ndarray       # (2, 3): amplitude (rad), frequency (rad/s), phase of pitch and roll
    map_offset: np.ndarray   # (2,) what is added to every true pose before it is written (m)
    static: Mesh             # buildings, poles, parked vehicles, people
    crowns: tuple            # centres (B, 3), radii (B,), colours (B, 3) of tree crowns and heads, labels (B,)
    movers: list             # (Mesh in the vehicle's own frame, path (T, 4): time, x, y, yaw)
    footprints: list         # (outline (N, 2), height): what casts a shadow


# ---------------------------------------------------------------------------------------------------------------------
# Rotations


def rotation_from_quaternion(quaternion):
    """(w, x, y, z) of any length -> (3, 3) rotation matrix."""
    w, x, y, z = np.asarray(quaternion, float) / np.linalg.norm(quaternion)
    return np.array([[1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
                     [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
                     [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]])


def quaternion_from_angles(yaw, pitch, roll):
    """Rotation Rz(yaw) Ry(pitch) Rx(roll) as (w, x, y, z)."""
    cy, sy, cp, sp = np.cos(yaw / 2), np.sin(yaw / 2), np.cos(pitch / 2), np.sin(pitch / 2)
    cr, sr = np.cos(roll / 2), np.sin(roll / 2)
    return np.array([cy * cp * cr + sy * sp * sr, cy * cp * sr - sy * sp * cr,
                     cy * sp * cr + sy * cp * sr, sy * cp * cr - cy * sp * sr])


def make_transform(rotation, translation):
    """(3, 3) and (3,) -> (4, 4)."""
    transform = np.eye(4)
    transform[:3, :3], transform[:3, 3] = rotation, translation
    return transform


def camera_calibration(camera):
    """Camera name -> intrinsics K (3, 3) at 512 x 288 and ego_T_cam (4, 4)."""
    focal, (cx, cy), translation, rotation, _ = CAMERAS[camera]
    K = np.array([[focal * SCALE, 0, cx * SCALE], [0, focal * SCALE, cy * SCALE], [0, 0, 1]])
    return K, make_transform(rotation_from_quaternion(rotation), translation)


def ego_pose(scene, time):
    """True pose at `time` (s from the first key frame): translation (3,), quaternion (4,)."""
    x, y = (np.interp(time, scene.ego_path[:, 0], scene.ego_path[:, k]) for k in (1, 2))
    yaw = np.interp(time, scene.ego_path[:, 0], scene.ego_yaw)
    pitch, roll = (amplitude * np.sin(frequency * time + phase) for amplitude, frequency, phase in scene.wobble)
    return np.array([x, y, 0.0]), quaternion_from_angles(yaw, pitch, roll)


def moments(plan, channel):
    """The numbers of the frames that a sensor takes: ints are key frames, Fractions lie between (1/2: half way)."""
    parts = plan.sweeps + 1 if channel in CAMERAS else 1
    return [Fraction(k, parts) if k % parts else k // parts for k in range((plan.frames - 1) * parts + 1)]


def seed_words(frame):
    """A frame's number as what seeds are made of: ints."""
    return [frame] if isinstance(frame, int) else [frame.numerator, frame.denominator]


def camera_time(scene, frame, camera):
    """Seconds from the first key frame at which `camera` takes frame `frame`; LIDAR_TOP's is frame * 0.5."""
    seed = [*scene.plan.key, 7, *seed_words(frame), list(CAMERAS).index(camera)]
    jitter = np.random.default_rng(seed).uniform(-1e-3, 1e-3)
    return round(float(frame) * FRAME_PERIOD + CAMERAS[camera][4] * 1e-3 + jitter, 6)


# ---------------------------------------------------------------------------------------------------------------------
# Districts: roads, junctions, paint and map


def bent_line(heading, curvature, straight, length, origin):
    """(N, 2) points a metre apart from `origin`: straight for a while, then a bend of constant curvature (1/m)."""
    s = np.arange(int(length) + 1)
    angle = heading + curvature * np.maximum(s - straight, 0)
    steps = np.stack([np.cos(angle), np.sin(angle)], -1)
    return np.asarray(origin) + np.concatenate([np.zeros((1, 2)), np.cumsum(steps[:-1], 0)])


def random_road(rng, line, side, lanes):
    """A Road with `lanes` = (outwards, inwards) and random width, parking and centre line."""
    parking = tuple(PARKING_WIDTH * (rng.random() < 0.5) for _ in range(2))
    style = rng.choice(["double_yellow", "solid_white", "dashed_white"], p=[0.45, 0.3, 0.25])
    return Road(line, lanes[0], lanes[1], rng.uniform(3.0, 3.6), side, parking, str(style))


def lay_roads(rng, origin, side):
    """One through road (one in four), or a T- or X-junction of roads that all start at `origin`."""
    heading = rng.uniform(0, 2 * np.pi)
    lane_counts = [1, 2, 2, 3]
    if rng.random() < 0.25:
        half = bent_line(heading, rng.uniform(-1, 1) / 90, 10, ROAD_LENGTH, origin)
        other = bent_line(heading + np.pi, rng.uniform(-1, 1) / 90, 10, ROAD_LENGTH, origin)
        line = np.concatenate([other[:0:-1], half])
        return [random_road(rng, line, side, (rng.choice(lane_counts), rng.choice(lane_counts)))]
    turns = [0, np.pi / 2, np.pi, 3 * np.pi / 2] if rng.random() < 0.6 else [0, np.pi / 2, np.pi]
    main, cross = rng.choice(lane_counts, 2), rng.choice(lane_counts[:3], 2)
    roads = []
    for k, turn in enumerate(turns):
        lanes = main if k % 2 == 0 else cross    # opposite roads match, so that lanes go on across the junction
        line = bent_line(heading + turn + rng.normal(0, 0.06), rng.uniform(-1, 1) / 120, 25, ROAD_LENGTH, origin)
        roads.append(random_road(rng, line, side, lanes if k < 2 else lanes[::-1]))
    return roads


def add_junction(district):
    """Sets each road's start, and adds the junction's polygon, whose corners between roads are rounded."""
    roads = district.roads
    strips = unary_union([Polygon(road.strip(*road.kerbs, 0, road.length)) for road in roads])
    rounded = strips.buffer(CORNER_RADIUS).buffer(-CORNER_RADIUS)     # a closing: fills concave corners only
    for road in roads:
        road.start = 6.0
        while any(rounded.contains(Point(road.at(np.array([road.start]), kerb + step)[0][0]))
                  for kerb, step in zip(road.kerbs, (-0.05, 0.05))):
            road.start += 1.0
    # The junction reaches 0.3 m into its roads, so that the union of all has no gaps.
    outside = unary_union([Polygon(road.strip(road.kerbs[0] - 1, road.kerbs[1] + 1, road.start + 0.3, road.length + 1))
                           for road in roads])
    pieces = rounded.difference(outside)
    district.segments.append((max(getattr(pieces, "geoms", [pieces]), key=lambda piece: piece.area), True))


def add_crossing(rng, district, road, start, width):
    """A zebra over the whole road from arc length `start`; one in twenty is missing from the map."""
    right, left = road.kerbs
    outline = road.strip(right + KERB_WIDTH / 2, left - KERB_WIDTH / 2, start, start + width)
    district.paint.append((outline, None, CROSSWALK))
    stripe = rng.uniform(0.4, 0.6)
    for offset in np.arange(right + 0.5, left - 0.4 - stripe, 2 * stripe):
        district.paint.append((road.strip(offset, offset + stripe, start, start + width), "white", None))
    polygon = Polygon(road.strip(right, left, start, start + width))
    district.crossings.append(polygon)
    if rng.random() > 1 / 20:
        district.map_crossings.append(polygon)


def add_stop_line(district, road, start, outwards):
    """A stop line across the lanes of one direction."""
    edges = sorted([0.0, road.lane_edges[0] if (road.side < 0) == outwards else road.lane_edges[1]])
    outline = road.strip(edges[0] + 0.15, edges[1] - 0.15, start, start + STOP_LINE_WIDTH)
    district.paint.append((outline, "white", MARKING))
    district.stop_lines.append(Polygon(outline))


def add_arrow(district, road, s, offset, outwards, turn):
    """A lane arrow with its tail at arc length s. turn: 0 straight on, +1 left, -1 right."""
    shapes = [[(0, -0.08), (2.4, -0.08), (2.4, 0.08), (0, 0.08)]]
    if turn == 0:
        shapes.append([(2.4, -0.35), (4.0, 0.0), (2.4, 0.35)])
    else:
        shapes.append([(2.3, -0.08 * turn), (2.5, -0.08 * turn), (3.1, 0.5 * turn), (2.8, 0.6 * turn)])
        shapes.append([(2.4, 0.6 * turn), (3.4, 0.3 * turn), (3.4, 1.0 * turn)])
    direction = 1 if outwards else -1
    for shape in shapes:
        along, left = np.array(shape).T
        district.paint.append((road.at(s + direction * along, offset + direction * left)[0], "white", MARKING))


def add_line(district, road, offset, start, stop, dash=None, colour="white"):
    """A painted line of PAINT_WIDTH; dash = (painted, blank) lengths in metres, or None for a solid line."""
    painted, blank = dash or (ROAD_LENGTH * 3, 0.0)
    for s in np.arange(start, stop - 0.5, painted + blank):     # a rest of under half a metre is left out
        outline = road.strip(offset - PAINT_WIDTH / 2, offset + PAINT_WIDTH / 2, s, min(s + painted, stop))
        district.paint.append((outline, colour, MARKING))


def add_dividers(rng, district, road, start, stop, solid_until, solid_from):
    """The dividers of one stretch of road between arc lengths: paint, and one unbroken line each in the map."""
    if road.centre_style == "double_yellow":
        for offset in (-PAINT_WIDTH, PAINT_WIDTH):
            add_line(district, road, offset, start, stop, colour="yellow")
        kind = "DOUBLE_SOLID_WHITE"      # nuScenes knows no yellow
    else:
        dash = (3.0, 4.0) if road.centre_style == "dashed_white" else None
        add_line(district, road, 0.0, start, stop, dash)
        kind = "DOUBLE_DASHED_WHITE" if dash else "SINGLE_SOLID_WHITE"
    district.road_dividers.append((road.offset_line(0.0, start, stop), kind))
    right, left = road.lane_edges
    dash = (3.0, rng.uniform(4.0, 6.0))
    for lane in range(1, max(road.lanes_out, road.lanes_in)):
        for offset in (-lane * road.lane_width, lane * road.lane_width):
            if not right + 0.1 < offset < left - 0.1:
                continue
            add_line(district, road, offset, start, solid_until)
            add_line(district, road, offset, solid_until, solid_from, dash)
            add_line(district, road, offset, solid_from, stop)
            district.lane_dividers.append((road.offset_line(offset, start, stop), "DOUBLE_DASHED_WHITE"))


def furnish_junction_road(rng, district, road):
    """Crossing, stop line, arrows and dividers of a road that leaves a junction."""
    end, width = road.start + 0.5, rng.uniform(3.0, 4.0)
    if rng.random() < 0.75:
        add_crossing(rng, district, road, end + 0.4, width)
        end += width + 1.6
    elif rng.random() < 1 / 10:         # a crossing that is in the map only
        district.map_crossings.append(Polygon(road.strip(*road.kerbs, end + 0.4, end + 0.4 + width)))
    if rng.random() < 0.8:
        add_stop_line(district, road, end, outwards=False)
        end += STOP_LINE_WIDTH + 0.1
    for lane in range(road.lanes_in):
        if rng.random() < 0.6:
            add_arrow(district, road, end + 7, road.lane_centre(lane, False), False, int(rng.integers(-1, 2)))
    add_dividers(rng, district, road, end, road.length, end + rng.choice([0.0, 12.0]), road.length)


def furnish_through_road(rng, district, road):
    """Dividers of a road without a junction, with a crossing in the middle in two of three."""
    middle, half = road.length / 2 + rng.uniform(-15, 15), 0.0
    if rng.random() < 2 / 3:
        half = rng.uniform(1.5, 2.0)
        add_crossing(rng, district, road, middle - half, 2 * half)
        half += 1.2
        add_stop_line(district, road, middle - half - STOP_LINE_WIDTH, outwards=True)
        add_stop_line(district, road, middle + half, outwards=False)
        half += STOP_LINE_WIDTH + 0.1
        add_dividers(rng, district, road, 0, middle - half, 0, middle - half - 10)
        add_dividers(rng, district, road, middle + half, road.length, middle + half + 10, road.length)
    else:
        add_dividers(rng, district, road, 0, road.length, 0, road.length)


def make_district(rng, origin, side):
    """Roads, map and paint around `origin`."""
    district = District(lay_roads(rng, origin, side), sidewalk_width=rng.uniform(2.2, 4.0))
    is_junction = len(district.roads) > 1
    if is_junction:
        add_junction(district)
    for road in district.roads:
        half_way = (road.start + road.length) // 2
        for start, stop in ((road.start, half_way + 1), (half_way, road.length)):    # overlap: no hairline gap
            district.segments.append((Polygon(road.strip(*road.kerbs, start, stop)), False))
        for outwards, count in ((True, road.lanes_out), (False, road.lanes_in)):
            for lane in range(count):
                edges = sorted((road.side if outwards else -road.side) * road.lane_width * k for k in (lane, lane + 1))
                district.lanes.append(Polygon(road.strip(*edges, road.start, road.length)))
        (furnish_junction_road if is_junction else furnish_through_road)(rng, district, road)
    # The roads of a district enclose nothing: what holes their union has are 1e-13 m wide, by rounding.
    district.surface = Polygon(unary_union([polygon for polygon, _ in district.segments] + district.lanes).exterior)
    beside = district.surface.buffer(district.sidewalk_width).difference(district.surface)
    beside = beside.intersection(Point(origin).buffer(ROAD_LENGTH - 2))
    district.walkways = [piece for piece in getattr(beside, "geoms", [beside]) if piece.area > 5]
    return district


# ---------------------------------------------------------------------------------------------------------------------
# Traffic: routes, the ego's drive, other vehicles


def route_between(rng, roads, start, stop):
    """A drive from the far end of one road to the far end of another: points (N, 2), 0.25 m apart, and the arc lengths
    at which the junction is entered and left."""
    if len(roads) == 1:
        road, outwards = roads[0], start == 0
        lane = rng.integers(road.lanes_out if outwards else road.lanes_in)
        line = road.offset_line(road.lane_centre(lane, outwards), 0, road.length)
        parts, entry = [line if outwards else line[::-1]], road.length / 2
        leave = entry
    else:
        a, b = roads[start], roads[stop]
        lane = int(rng.integers(min(a.lanes_in, b.lanes_out)))
        before = a.offset_line(a.lane_centre(lane, False), a.start, a.length)[::-1]
        after = b.offset_line(b.lane_centre(lane, True), b.start, b.length)
        p0, p3 = before[-1], after[0]
        reach = 0.45 * np.linalg.norm(p3 - p0)
        p1 = p0 + reach * (before[-1] - before[-3]) / np.linalg.norm(before[-1] - before[-3])
        p2 = p3 - reach * (after[2] - after[0]) / np.linalg.norm(after[2] - after[0])
        u = np.linspace(0, 1, 41)[1:-1, None]
        curve = (1 - u) ** 3 * p0 + 3 * u * (1 - u) ** 2 * p1 + 3 * u ** 2 * (1 - u) * p2 + u ** 3 * p3
        parts = [before, curve, after]
        entry = np.linalg.norm(np.diff(before, axis=0), axis=1).sum()
        leave = entry + np.linalg.norm(np.diff(np.concatenate([before[-1:], curve, after[:1]]), axis=0), axis=1).sum()
    points = np.concatenate(parts)
    s = np.append(0, np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1)))
    fine = np.arange(0, s[-1], 0.25)
    return np.stack([np.interp(fine, s, points[:, k]) for k in range(2)], -1), entry, leave


def follow(route, s):
    """Arc lengths (T,) along a route -> x, y, yaw (T, 3); the heading is averaged over a car's length."""
    step = np.gradient(route, axis=0)
    yaw = np.unwrap(np.arctan2(step[:, 1], step[:, 0]))
    yaw = np.convolve(np.pad(yaw, 8, mode="edge"), np.ones(17) / 17, mode="valid")
    index = np.clip(s / 0.25, 0, len(route) - 1)
    return np.stack([np.interp(index, np.arange(len(route)), column) for column in (route[:, 0], route[:, 1], yaw)], -1)


def ego_speed(rng, times, start, entry, leave, is_turn):
    """Arc length (T,) at each time: cruises, slows down for a turn, in one scene of three stops before the junction."""
    cruise, turn_speed = rng.uniform(3.5, 8.3), rng.uniform(3.5, 5.0)
    wait_until = rng.uniform(2.0, 5.0) if rng.random() < 1 / 3 else -1.0
    stop_at = entry - 6.0
    s, speed = start, min(cruise, rng.uniform(2.0, 10.0))
    if wait_until > 0:      # it must still be able to stop
        speed = min(speed, np.sqrt(max(0.0, 4.0 * (stop_at - start))))
    travelled, pulse = [], rng.uniform(0, 2 * np.pi)
    for now, dt in zip(times, np.diff(times, append=times[-1])):
        travelled.append(s)
        wish = cruise * (1 + 0.2 * np.sin(0.9 * now + pulse))
        if is_turn and s < leave:
            wish = min(wish, np.sqrt(turn_speed ** 2 + 4.0 * max(0.0, entry - s)))
        if now < wait_until and s <= stop_at + 0.5:
            wish = min(wish, np.sqrt(4.0 * max(0.0, stop_at - s)))
        speed = np.clip(wish, speed - 3.0 * dt, speed + 2.0 * dt)
        s += max(speed, 0.0) * dt
    return np.array(travelled)


def drive_ego(rng, roads, times):
    """The ego's drive: (T, 3) x, y, yaw, its route, its arc lengths (T,), and a word on where it goes."""
    start = int(rng.integers(2 if len(roads) == 1 else len(roads)))
    stop = int(rng.choice([k for k in range(max(2, len(roads))) if k != start]))
    route, entry, leave = route_between(rng, roads, start, stop)
    whole_turn = follow(route, np.array([entry - 3, leave + 3]))[:, 2]
    turned = whole_turn[1] - whole_turn[0] if len(roads) > 1 else 0.0
    word = "turn left" if turned > 0.6 else "turn right" if turned < -0.6 else "straight on"
    s = ego_speed(rng, times, entry - rng.uniform(8, 38), entry, leave, abs(turned) > 0.6)
    return follow(route, s), route, s, word


def drive_others(rng, roads, times, ego, ego_route, ego_s):
    """Paths (T, 4) of time, x, y, yaw of other vehicles that keep clear of the ego and of each other."""
    paths = [ego]
    if rng.random() < 0.5:          # a vehicle ahead of the ego, or behind it
        paths.append(follow(ego_route, np.maximum(ego_s + rng.choice([-1, 1]) * rng.uniform(10, 22), 0)))
    for _ in range(16):
        start = int(rng.integers(2 if len(roads) == 1 else len(roads)))
        stop = int(rng.choice([k for k in range(max(2, len(roads))) if k != start]))
        route, entry, leave = route_between(rng, roads, start, stop)
        s = rng.uniform(0, len(route) * 0.25) + rng.choice([0.0, 1.0, 1.0]) * rng.uniform(3, 9) * times
        path = follow(route, s)
        inside = s.min() > 0 and s.max() < len(route) * 0.25 - 1
        # So far apart, middle to middle, that no two overlap whichever way they face.
        clear = all(np.min(np.linalg.norm(path[:, :2] - other[:, :2], axis=1)) > 7.5 for other in paths)
        if inside and clear and len(paths) < 9:
            paths.append(path)
    return [np.concatenate([times[:, None], path], 1) for path in paths[1:]]


# ---------------------------------------------------------------------------------------------------------------------
# Things that stand on the ground


def pad_face(corners):
    """(K, 3) corners, K <= 8 -> (8, 3), the last one repeated."""
    corners = np.asarray(corners, float)
    return np.concatenate([corners, np.repeat(corners[-1:], 8 - len(corners), axis=0)])


def make_mesh(faces, anchor=None):
    """Faces (corners (K, 3), colour, label, order) -> Mesh. Without an anchor each face is sorted by its own middle."""
    vertices = np.array([pad_face(corners) for corners, _, _, _ in faces])
    own = np.array([np.mean(corners, axis=0)[:2] for corners, _, _, _ in faces])
    return Mesh(vertices, np.array([colour for _, colour, _, _ in faces], float),
                np.array([label for _, _, label, _ in faces]),
                own if anchor is None else np.tile(np.asarray(anchor, float), (len(faces), 1)),
                np.array([order for _, _, _, order in faces]))


def join_meshes(meshes):
    """Several Meshes as one."""
    return Mesh(*(np.concatenate([getattr(mesh, name) for mesh in meshes])
                  for name in ("vertices", "colour", "label", "anchor", "order")))


def move_mesh(mesh, x, y, yaw):
    """A Mesh turned by yaw about its origin and moved to x, y."""
    c, s = np.cos(yaw), np.sin(yaw)
    rotation = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    return Mesh(mesh.vertices @ rotation.T + [x, y, 0], mesh.colour, mesh.label,
                mesh.anchor @ rotation[:2, :2].T + [x, y], mesh.order)


def frustum(x0, x1, half_width, z0, z1, inset=(0.0, 0.0, 0.0), colours=None, label=CAR, order=0):
    """Five outward faces (front, left, rear, right, top) of a box; inset: how much shorter its top is at each."""
    bottom = [(x1, -half_width), (x1, half_width), (x0, half_width), (x0, -half_width)]
    front, rear, side = inset
    top = [(x1 - front, -half_width + side), (x1 - front, half_width - side),
           (x0 + rear, half_width - side), (x0 + rear, -half_width + side)]
    faces = []
    for k in range(4):
        j = (k + 1) % 4
        corners = [(*bottom[k], z0), (*bottom[j], z0), (*top[j], z1), (*top[k], z1)]
        faces.append((corners, colours[k], label, order))
    return faces + [([(*corner, z1) for corner in top], colours[4], label, order)]


def make_vehicle(rng):
    """A car, van or lorry in its own frame (x ahead, origin in the middle, on the ground): Mesh, length and width."""
    kind = rng.choice(["car", "car", "car", "suv", "van", "lorry"])
    length, width, waist, height = {"car": (4.5, 1.8, 0.85, 1.45), "suv": (4.7, 1.9, 1.0, 1.75),
                                    "van": (5.2, 2.0, 1.1, 2.2), "lorry": (7.5, 2.4, 1.1, 3.1)}[str(kind)]
    length *= rng.uniform(0.93, 1.07)
    paint = np.array([[225, 225, 222], [190, 192, 195], [120, 122, 126], [40, 42, 46], [150, 30, 30], [40, 70, 130],
                      [200, 180, 140], [60, 90, 70]][rng.integers(8)], float)
    glass, x0, x1, half = np.array([45, 55, 62.0]), -length / 2, length / 2, width / 2
    faces = [([(x0, -half, 0.01), (x1, -half, 0.01), (x1, half, 0.01), (x0, half, 0.01)], (30, 30, 32), UNLABELLED, 0)]
    faces += frustum(x0, x1, half, 0.28, waist, (0.08, 0.05, 0.03), [paint] * 5, order=1)
    if kind == "lorry":
        faces += frustum(x0, x1 - 2.0, half, waist, height, (0, 0, 0), [paint * 0.9] * 5, order=2)
        faces += frustum(x1 - 1.8, x1, half - 0.1, waist, 2.4, (0.3, 0, 0.05), [glass] + [paint] * 4, order=2)
    else:
        bonnet = {"car": 1.15, "suv": 1.0, "van": 0.75}[str(kind)]
        boot = {"car": 0.55, "suv": 0.1, "van": 0.03}[str(kind)]
        side = paint if kind == "van" else glass * 0.9
        faces += frustum(x0 + boot, x1 - bonnet, half - 0.06, waist, height, (0.65, 0.35, 0.18),
                         [glass, side, glass, side, paint], order=2)
    angles = np.linspace(0, 2 * np.pi, 8, endpoint=False)
    for x in (x0 + 0.85, x1 - 0.9):
        ring = np.stack([x + 0.33 * np.cos(angles), np.zeros(8), 0.33 + 0.33 * np.sin(angles)], -1)
        faces.append((ring[::-1] + [0, half + 0.01, 0], (28, 28, 30), CAR, 3))
        faces.append((ring - [0, half + 0.01, 0], (28, 28, 30), CAR, 3))
    for x, colour in ((x1 - 0.02, (250, 245, 225)), (x0 + 0.02, (190, 25, 25))):
        for y in (-half + 0.3, half - 0.3):
            lamp = np.array([(0, -0.16, -0.07), (0, 0.16, -0.07), (0, 0.16, 0.07), (0, -0.16, 0.07)])
            lamp = lamp if x > 0 else lamp[::-1]
            faces.append((lamp + [x, y, waist - 0.2], colour, CAR, 3))
    return make_mesh(faces, anchor=(0, 0)), length, width


def park_vehicles(rng, district):
    """Parked vehicles in the parking strips: a Mesh each, and their outlines."""
    meshes, outlines = [], []
    for road in district.roads:
        for strip, side in zip(road.parking, (-1, 1)):
            s = road.start + (10.0 if len(district.roads) > 1 else 2.0)
            while strip and s < road.length - 6:
                mesh, length, width = make_vehicle(rng)
                s += length / 2
                kerb = road.kerbs[0] if side < 0 else road.kerbs[1]
                (point,), (heading,) = road.at(np.array([s]), kerb - side * (width / 2 + 0.3))
                outline = road.strip(*sorted([kerb, kerb - side * width]), s - length / 2, s + length / 2)
                on_crossing = any(Polygon(outline).buffer(1.5).intersects(crossing)
                                  for crossing in district.crossings + district.map_crossings)
                if rng.random() < 0.6 and not on_crossing:
                    facing = heading if (side == road.side) else heading + np.pi
                    meshes.append(move_mesh(mesh, *point, facing + rng.normal(0, 0.02)))
                    outlines.append((outline, 1.5))
                s += length / 2 + rng.uniform(0.6, 1.5)
    return meshes, outlines


def upright(p, q, low, high):
    """Corners (4, 3) of a wall over the line from p to q between two heights."""
    return [(*p, low), (*q, low), (*q, high), (*p, high)]


def make_building(rng, corners, height, is_night):
    """Walls in bays of about five metres, each with its windows. corners (4, 2) counter-clockwise."""
    wall = np.array([[150, 95, 75], [175, 165, 150], [200, 195, 185], [110, 112, 118], [140, 120, 100],
                     [165, 140, 115]][rng.integers(6)]) * rng.uniform(0.7, 1.1)
    glass, floor = np.array([62, 76, 90]) * rng.uniform(0.6, 1.2), rng.uniform(2.9, 3.6)
    faces, anchors = [], []
    for k in range(4):
        a, b = corners[k], corners[(k + 1) % 4]
        bays = max(1, int(round(np.linalg.norm(b - a) / 5)))
        for bay in range(bays):
            p, q = a + (b - a) * bay / bays, a + (b - a) * (bay + 1) / bays
            bay_faces = [(upright(p, q, 0, height), wall, BUILDING, 0),
                         (upright(p, q, 0, 0.6), wall * 0.6, UNLABELLED, 1)]
            for z in np.arange(1.0, height - floor + 0.8, floor):
                for u in (0.12, 0.58):
                    is_lit = is_night and rng.random() < 0.3
                    pane = np.array([600, 520, 330]) if is_lit else glass * rng.uniform(0.7, 1.3)
                    window = upright(p + (q - p) * u, p + (q - p) * (u + 0.3), z, z + floor * 0.55)
                    bay_faces.append((window, pane, UNLABELLED, 1))
            faces += bay_faces
            anchors += [(p + q) / 2] * len(bay_faces)
    mesh = make_mesh(faces)
    mesh.anchor = np.array(anchors)
    return mesh


def build_houses(rng, district, is_night):
    """Rows of houses behind the pavements of every road: a Mesh each, (outline, height) of each, and all they cover."""
    meshes, outlines = [], []
    free_of = district.surface.buffer(district.sidewalk_width + 0.8)
    for road in district.roads:
        for side, kerb in zip((-1, 1), road.kerbs):
            s = 1.0
            while s < road.length - 12:
                length, depth, height = rng.uniform(10, 24), rng.uniform(8, 14), rng.uniform(5, 22)
                front = abs(kerb) + district.sidewalk_width + rng.uniform(1.5, 9)
                (middle,), (heading,) = road.at(np.array([s + length / 2]), side * (front + depth / 2))
                along = np.array([np.cos(heading), np.sin(heading)]) * length / 2
                left = np.array([-np.sin(heading), np.cos(heading)]) * depth / 2
                corners = middle + np.array([-along - left, along - left, along + left, left - along])
                if not Polygon(corners).intersects(free_of):
                    free_of = free_of.union(Polygon(corners).buffer(1.0))
                    meshes.append(make_building(rng, corners, height, is_night))
                    outlines.append((corners, height))
                    s += length
                s += rng.uniform(1.5, 8)
    return meshes, outlines, unary_union([Polygon(corners) for corners, _ in outlines])


def make_post(rng, place):
    """A lamp post at `place` (2,): faces around the origin; billboards (centre, radius, colour, label) and what casts a
    shadow, which it has none of."""
    half = 0.08
    return frustum(-half, half, half, 0, rng.uniform(3, 7), colours=[(95, 97, 100)] * 5, label=POLE), [], []


def make_person(rng, place):
    """As make_post: someone who stands there."""
    trousers, coat = rng.uniform(25, 90) * np.ones(3), rng.uniform(40, 180) * rng.uniform(0.6, 1.2, 3)
    faces = frustum(-0.15, 0.15, 0.15, 0, 0.8, colours=[trousers] * 5, label=PERSON)
    faces += frustum(-0.2, 0.2, 0.25, 0.75, 1.48, (0.08, 0.08, 0.06), [coat] * 5, PERSON, 1)
    return faces, [((*place, 1.6), 0.13, rng.uniform(0.4, 1.0) * np.array([225, 180, 150]), PERSON)], []


def make_tree(rng, place):
    """As make_post: a trunk, and a crown of seven billboards."""
    green, size = rng.uniform([40, 70, 25], [95, 125, 60]), rng.uniform(1.2, 2.0)
    crown = []
    for x, y, z in rng.normal(0, 0.4, (7, 3)) * size:
        crown.append(((place[0] + x, place[1] + y, 2.4 + size + 0.8 * z), size * rng.uniform(0.5, 0.9),
                      green * rng.uniform(0.75, 1.2), VEGETATION))
    angles = np.arange(8) * np.pi / 4
    shadow = place + size * np.stack([np.cos(angles), np.sin(angles)], -1)
    return frustum(-0.14, 0.14, 0.14, 0, 2.6, colours=[(85, 65, 50)] * 5, label=VEGETATION), crown, [(shadow, 3.5)]


def furnish_roadside(rng, district, houses):
    """Trees, lamp posts and people along every road: meshes, billboards, and what casts a shadow."""
    meshes, boards, outlines = [], [], []
    for road in district.roads:
        for side, kerb in zip((-1, 1), road.kerbs):
            for s in np.arange(road.start + 3, road.length - 5, 6.0):
                chance = rng.random()
                make, behind = ((make_tree, district.sidewalk_width + 1.0) if chance < 0.3 else
                                (make_post, 0.7) if chance < 0.45 else (make_person, rng.uniform(0.8, 2.0)))
                (point,), (heading,) = road.at(np.array([s + rng.uniform(-2, 2)]), kerb + side * behind)
                if chance > 0.6 or district.surface.contains(Point(point)) or houses.contains(Point(point)):
                    continue
                faces, crown, shadow = make(rng, point)
                meshes.append(move_mesh(make_mesh(faces, anchor=(0, 0)), *point, heading))
                boards += crown
                outlines += shadow
    return meshes, boards, outlines


# ---------------------------------------------------------------------------------------------------------------------
# Scenes


def make_weather(rng, kind):
    """Draws light, air and camera noise. kind: "Day", "Rain" or "Night"."""
    azimuth, elevation = rng.uniform(0, 2 * np.pi), rng.uniform(0.5, 1.1)
    sun = np.array([np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation), np.sin(elevation)])
    overcast = rng.uniform(0, 1)
    weather = Weather(kind, sun, 0.55 + 0.25 * overcast, 0.55 * (1 - overcast),
                      sky_top=np.array([95, 140, 205]) * (1 - overcast) + np.array([165, 170, 178]) * overcast,
                      sky_low=np.array([195, 210, 228]) * (1 - overcast) + np.array([205, 207, 210]) * overcast,
                      clouds=rng.uniform(8, 28), haze_length=rng.uniform(120, 400),
                      gain=rng.uniform(0.85, 1.15) * rng.uniform(0.96, 1.04, 3),
                      noise=rng.uniform(1.5, 4.0), wear=rng.uniform(0.05, 0.5))
    if kind == "Rain":
        grey = rng.uniform(0.8, 1.0)
        weather.ambient, weather.diffuse, weather.haze_length = 0.85, 0.0, rng.uniform(60, 110)
        weather.clouds, weather.gain = 8.0, weather.gain + 0.05
        weather.sky_top, weather.sky_low = np.array([150, 155, 162]) * grey, np.array([185, 188, 192]) * grey
    if kind == "Night":
        weather.ambient, weather.diffuse, weather.haze_length = rng.uniform(0.30, 0.42), 0.0, rng.uniform(60, 120)
        weather.sky_top, weather.sky_low = np.array([8, 9, 16.0]), np.array([34, 30, 30.0])
        weather.clouds, weather.noise = 4.0, rng.uniform(4.0, 6.5)
        weather.gain = weather.gain * np.array([1.08, 1.0, 0.88])
    return weather


def describe(rng, weather, parked, district, way):
    """A description in nuScenes' words, such as "Rain, parked cars, turn left, ped crossing"."""
    words = [way]
    if parked:
        words.append("parked cars")
    if len(district.roads) > 1:
        words.append("intersection")
    if district.crossings:
        words.append("ped crossing")
    rng.shuffle(words)
    text = ", ".join(([weather.kind] if weather.kind != "Day" else []) + words)
    return text[0].upper() + text[1:]


def map_offset(plan):
    """(2,) metres by which the written poses, and so the map, are off in this scene."""
    return np.random.default_rng([*plan.key, 3]).normal(0, MAP_ERROR, 2)


def make_scene(plan):
    """Builds the scene that a Plan stands for; everything in it follows from plan.key."""
    rng = np.random.default_rng(plan.key)
    weather = make_weather(rng, plan.weather)
    right_hand = plan.location in RIGHT_HAND_TRAFFIC or (plan.location == SEGMENTER_TOWN and rng.random() < 0.5)
    district = make_district(rng, plan.origin, -1 if right_hand else 1)
    times = np.arange(-0.5, plan.frames * FRAME_PERIOD + 0.5, 0.02)
    ego, route, ego_s, way = drive_ego(rng, district.roads, times)
    parked, parked_outlines = park_vehicles(rng, district)
    houses, house_outlines, covered = build_houses(rng, district, weather.kind == "Night")
    roadside, boards, tree_outlines = furnish_roadside(rng, district, covered)
    centres, radii, colours, labels = zip(*boards)
    movers = [(make_vehicle(rng)[0], path) for path in drive_others(rng, district.roads, times, ego, route, ego_s)]
    wobble = np.stack([np.radians(rng.uniform(0.05, 0.3, 2)), rng.uniform(1, 5, 2), rng.uniform(0, 6.3, 2)], -1)
    return Scene(plan, district, weather, describe(rng, weather, parked, district, way),
                 np.concatenate([times[:, None], ego[:, :2]], 1), ego[:, 2], wobble, map_offset(plan),
                 join_meshes(parked + houses + roadside), tuple(map(np.array, (centres, radii, colours, labels))),
                 movers, parked_outlines + house_outlines + tree_outlines)


# ---------------------------------------------------------------------------------------------------------------------
# The ground raster

GROUND_COLOURS = {"white": (225, 225, 220), "yellow": (215, 165, 45)}


def rings(geometry):
    """All exterior and interior rings of a (Multi)Polygon as (N, 2) arrays; fillPoly leaves the holes out."""
    parts = getattr(geometry, "geoms", [geometry])
    return [np.array(ring.coords) for part in parts for ring in (part.exterior, *part.interiors)]


class Ground:
    """The ground as a raster: cell (row, column) covers [y0 + row * TEXEL, ...) x [x0 + column * TEXEL, ...).

    mips[k] (H / 2^k, W / 2^k, 3) uint8 RGB, lit; labels (H, W) uint8."""

    def __init__(self, scene, rng):
        low, high = scene.ego_path[:, 1:].min(0) - VIEW_RADIUS, scene.ego_path[:, 1:].max(0) + VIEW_RADIUS
        self.origin = low
        width, height = (np.ceil((high - low) / TEXEL / 32) * 32).astype(int)
        weather, district = scene.weather, scene.district
        wet = 0.72 if weather.kind == "Rain" else 1.0
        asphalt = np.array([1.0, 1.0, 1.02]) * rng.uniform(75, 115) * wet
        kerb = rng.uniform(135, 185) * np.array([1, 0.99, 0.96])
        pavement = rng.uniform(120, 165) * np.array([1, 0.97, 0.93])
        self.labels = np.full((height, width), TERRAIN, np.uint8)
        self.colour = np.empty((height, width, 3), np.uint8)
        self.colour[:] = rng.uniform([75, 90, 45], [115, 125, 70])
        self.fill(rings(district.surface.buffer(district.sidewalk_width)), pavement * wet, SIDEWALK)
        # fillPoly also fills the cells its outline runs through, half a cell too much: hence the "- TEXEL / 2" here.
        self.fill(rings(district.surface.buffer(KERB_WIDTH / 2 - TEXEL / 2)), kerb * wet, CURB)
        self.fill(rings(district.surface.buffer(-KERB_WIDTH / 2 - TEXEL / 2)), asphalt, ROAD)
        self.wear_road(rng, scene, asphalt)
        self.lay_paint(rng, scene)
        self.add_texture(rng)
        self.cast_shadows(scene)
        light = weather.ambient + weather.diffuse * weather.sun[2]
        self.mips = [cv2.convertScaleAbs(self.colour, alpha=light)]
        for _ in range(4):
            self.mips.append(cv2.resize(self.mips[-1], None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA))
        del self.colour

    def cells(self, points):
        """World points (N, 2) -> (column, row) for fillPoly, with 4 fractional bits, cell centres at integers."""
        return np.round(((np.asarray(points) - self.origin) / TEXEL - 0.5) * 16).astype(np.int32)

    def fill(self, outlines, colour, label=None):
        """Fills outlines (even-odd), in colour and, if given, in label."""
        outlines = [self.cells(outline) for outline in outlines]
        cv2.fillPoly(self.colour, outlines, tuple(map(float, colour)), shift=4)
        if label is not None:
            cv2.fillPoly(self.labels, outlines, int(label), shift=4)

    def wear_road(self, rng, scene, asphalt):
        """Patches, tar seams and manholes: things on a road that are not paint."""
        for road in scene.district.roads:
            low, high = road.kerbs[0] + 0.3, road.kerbs[1] - 0.3
            for _ in range(8):
                s, offset = rng.uniform(0, road.length - 12), rng.uniform(low, high - 1)
                patch = road.strip(offset, min(offset + rng.uniform(0.8, 3), high), s, s + rng.uniform(2, 12))
                self.fill([patch], asphalt * rng.uniform(0.8, 1.15))
            for _ in range(6):
                s = rng.uniform(0, road.length - 21)
                along = np.linspace(s, s + rng.uniform(5, 20), 12)
                seam, _ = road.at(along, rng.uniform(low, high) + rng.normal(0, 0.05, 12))
                cv2.polylines(self.colour, [self.cells(seam)], False, tuple(asphalt * 0.55), 1, shift=4)
            for _ in range(4):
                (centre,), _ = road.at(rng.uniform(0, road.length, 1), rng.uniform(low, high))
                cv2.circle(self.colour, tuple(map(int, self.cells(centre))), int(0.35 / TEXEL * 16),
                           tuple(asphalt * 0.7), -1, shift=4)

    def lay_paint(self, rng, scene):
        """Paint is laid over the asphalt with an opacity that varies from place to place."""
        mask = np.zeros(self.labels.shape, np.uint8)
        names = list(GROUND_COLOURS)
        for outline, colour, label in scene.district.paint:
            cells = self.cells(Polygon(outline).buffer(-TEXEL / 2, join_style=2).exterior.coords)
            if label is not None:
                cv2.fillPoly(self.labels, [cells], int(label), shift=4)
            if colour is not None:
                cv2.fillPoly(mask, [cells], names.index(colour) + 1, shift=4)
        coarse, fine = rng.random((64, 64), np.float32), rng.random((512, 512), np.float32)
        coarse = cv2.resize(coarse, mask.shape[::-1], interpolation=cv2.INTER_LINEAR)
        rows, columns = np.nonzero(mask)
        wear = scene.weather.wear * (0.4 + coarse[rows, columns]) + 0.5 * (fine[rows % 512, columns % 512] - 0.5)
        opacity = np.clip(1 - wear, 0.2, 0.95)[:, None]
        paint = np.array([GROUND_COLOURS[name] for name in names])[mask[rows, columns] - 1]
        self.colour[rows, columns] = opacity * paint + (1 - opacity) * self.colour[rows, columns]

    def add_texture(self, rng):
        """Multiplies by fine and coarse noise, from one tile that is repeated."""
        fine = rng.standard_normal((768, 768), np.float32) * 0.05
        coarse = cv2.resize(rng.standard_normal((24, 24), np.float32) * 0.05, (768, 768), interpolation=cv2.INTER_CUBIC)
        tile = np.clip((1 + fine + coarse) * 128, 0, 255).astype(np.uint8)
        height, width = self.labels.shape
        tiled = np.tile(tile, (height // 768 + 1, width // 768 + 1))[:height, :width]
        self.colour = cv2.multiply(self.colour, cv2.merge([tiled] * 3), scale=1 / 128)

    def cast_shadows(self, scene):
        """Darkens what lies in the shadow of houses, trees and parked vehicles."""
        weather = scene.weather
        if weather.diffuse < 0.05:
            return
        shade = np.full(self.labels.shape, 255, np.uint8)
        strength = weather.ambient / (weather.ambient + weather.diffuse * weather.sun[2])
        for outline, height in scene.footprints:
            far_end = outline - weather.sun[:2] / weather.sun[2] * height
            hull = cv2.convexHull(self.cells(np.concatenate([outline, far_end])))
            cv2.fillPoly(shade, [hull], int(255 * strength), shift=4)
        shade = cv2.blur(shade, (7, 7))
        self.colour = cv2.multiply(self.colour, cv2.merge([shade] * 3), scale=1 / 255)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


class Renderer:
    """Draws a scene from any camera: images (288, 512, 3) uint8 RGB, labels (288, 512) uint8 ids into LABELS."""

    def __init__(self, scene):
        self.scene = scene
        rng = np.random.default_rng([*scene.plan.key, 1])
        self.ground = Ground(scene, rng)
        clouds = sum(cv2.resize(rng.standard_normal((2 ** k, 2 ** (k + 1)), np.float32), (256, 128),
                                interpolation=cv2.INTER_CUBIC) / 2 ** (k - 2) for k in (2, 3, 4, 5))
        self.clouds = np.concatenate([clouds, clouds[:, ::-1]], 1) * scene.weather.clouds    # so that it closes

    def render(self, camera, time, seed):
        """The picture and the true labels of `camera` at `time` (s from the first key frame). seed: of the noise."""
        translation, quaternion = ego_pose(self.scene, time)
        K, ego_T_cam = camera_calibration(camera)
        world_T_cam = make_transform(rotation_from_quaternion(quaternion), translation) @ ego_T_cam
        cam_T_world = np.linalg.inv(world_T_cam)
        canvas = self.draw_sky(K, world_T_cam)                              # (576, 1024, 3): 2 x 2 samples a pixel
        labels = np.full(canvas.shape[:2], SKY, np.uint8)
        self.draw_ground(canvas, labels, K, cam_T_world, camera)
        self.draw_faces(canvas, labels, K, cam_T_world, time)
        if camera == "CAM_BACK":
            for image, value in ((canvas, (np.array([205, 206, 208]) * self.light()).tolist()), (labels, EGO)):
                cv2.ellipse(image, (586, 582), (416, 52), 0, 0, 360, value, -1)
        return self.expose(canvas, seed), reduce_labels(labels)

    def light(self):
        """Brightness of an upright surface."""
        return self.scene.weather.ambient + 0.4 * self.scene.weather.diffuse

    def draw_sky(self, K, world_T_cam):
        """(576, 1024, 3) uint8: a gradient and clouds, by the direction in which each pixel looks."""
        weather = self.scene.weather
        columns, rows = np.meshgrid(np.arange(64) + 0.5, np.arange(36) + 0.5)
        pixels = np.stack([columns * IMAGE_W / 64, rows * IMAGE_H / 36, np.ones_like(columns)])
        rays = np.einsum("ij,jhw->ihw", world_T_cam[:3, :3] @ np.linalg.inv(K), pixels)
        elevation = np.arctan2(rays[2], np.hypot(rays[0], rays[1]))
        azimuth = np.arctan2(rays[1], rays[0])
        rise = np.clip(elevation / 0.5, 0, 1)[..., None] ** 0.7
        column, row = (azimuth / (2 * np.pi) + 0.5) * 512, np.clip(elevation * 120, 0, 127)
        cloud = cv2.remap(self.clouds, column.astype(np.float32), row.astype(np.float32), cv2.INTER_LINEAR,
                          borderMode=cv2.BORDER_WRAP)
        sky = weather.sky_low * (1 - rise) + weather.sky_top * rise + cloud[..., None] * rise
        sky = np.clip(sky, 0, 255).astype(np.uint8)
        return cv2.resize(sky, (2 * IMAGE_W, 2 * IMAGE_H), interpolation=cv2.INTER_LINEAR)

    def draw_ground(self, canvas, labels, K, cam_T_world, camera):
        """Looks the ground up where a pixel's ray meets it nearer than FAR_GROUND; hazes it by depth."""
        homography = K @ cam_T_world[:3][:, [0, 1, 3]]       # world (x, y, 1) -> depth * pixel (u, v, 1)
        inverse = np.linalg.inv(homography)                  # pixel (u, v, 1) -> world (x, y, 1) / depth
        height, width = labels.shape
        u, v = (np.arange(width) + 0.5) / 2, (np.arange(height) + 0.5) / 2
        per_depth = (inverse[2, 0] * u)[None] + (inverse[2, 1] * v + inverse[2, 2])[:, None]     # 1 / m, (576, 1024)
        seen = per_depth > 1 / FAR_GROUND
        top = int(np.argmax(seen.any(1)))
        depth = 1 / np.maximum(per_depth[:, width // 2], 1 / FAR_GROUND)
        # Sample distances on the ground, across and along the view: a mip level whose cells are their geometric mean.
        across, along = depth / K[0, 0] / 2, depth ** 2 / (K[1, 1] * 1.5) / 4
        level = np.round(np.log2(np.sqrt(across * along) / TEXEL) - 0.3)
        level = np.clip(level, 0, len(self.ground.mips) - 1).astype(int)
        picture = np.empty((height - top, width, 3), np.uint8)
        edges = [top, *(np.flatnonzero(np.diff(level[top:])) + top + 1), height]
        for start, stop in zip(edges[:-1], edges[1:]):       # bands of rows of one level, 4 samples a pixel downwards
            raster = self.raster_from_pixel(inverse, TEXEL * 2 ** level[start], 2, 4, start * 2)
            band = cv2.warpPerspective(self.ground.mips[level[start]], raster, (width, (stop - start) * 2),
                                       flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REPLICATE)
            cv2.resize(band, (width, stop - start), dst=picture[start - top:stop - top], interpolation=cv2.INTER_AREA)
        haze, gain = self.haze(depth[top:]), self.headlights(camera, depth[top:])
        picture = picture * ((1 - haze) * gain)[:, None, None].astype(np.float32)
        picture += (haze[:, None] * self.scene.weather.sky_low)[:, None].astype(np.float32)
        cv2.copyTo(np.minimum(picture, 255).astype(np.uint8), seen[top:].astype(np.uint8), canvas[top:])
        raster = self.raster_from_pixel(inverse, TEXEL, 2, 2, top)
        found = cv2.warpPerspective(self.ground.labels, raster, (width, height - top),
                                    flags=cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REPLICATE)
        cv2.copyTo(found, seen[top:].astype(np.uint8), labels[top:])

    def raster_from_pixel(self, inverse, cell, per_column, per_row, first_row):
        """(3, 3) from OpenCV indices of samples (per_column x per_row a pixel, from row first_row) to a raster's."""
        pixel_from_index = np.array([[1 / per_column, 0, 0.5 / per_column],
                                     [0, 1 / per_row, (first_row + 0.5) / per_row], [0, 0, 1]])
        index_from_world = np.array([[1 / cell, 0, -self.ground.origin[0] / cell - 0.5],
                                     [0, 1 / cell, -self.ground.origin[1] / cell - 0.5], [0, 0, 1]])
        return index_from_world @ inverse @ pixel_from_index

    def haze(self, distance):
        """Share of haze in what is seen at a distance (m)."""
        return 1 - np.exp(-distance / self.scene.weather.haze_length)

    def headlights(self, camera, depth):
        """What the ego's headlights (at night, ahead) do to the ground at a depth (m)."""
        if self.scene.weather.kind != "Night" or not camera.startswith("CAM_FRONT"):
            return np.ones_like(depth)
        return 1 + (2.0 if camera == "CAM_FRONT" else 0.6) * np.exp(-np.maximum(depth - 6, 0) / 14)

    def draw_faces(self, canvas, labels, K, cam_T_world, time):
        """Boxes and billboards, farthest first."""
        eye = -cam_T_world[:3, :3].T @ cam_T_world[:3, 3]
        meshes = [self.scene.static, face_billboards(self.scene.crowns, eye)]
        for mesh, path in self.scene.movers:
            meshes.append(move_mesh(mesh, *(np.interp(time, path[:, 0], path[:, k]) for k in (1, 2, 3))))
        mesh = join_meshes(meshes)
        points = mesh.vertices @ cam_T_world[:3, :3].T + cam_T_world[:3, 3]                     # (F, 8, 3) cam
        distance = np.linalg.norm(mesh.anchor - eye[:2], axis=1)
        normal = np.cross(mesh.vertices[:, 1] - mesh.vertices[:, 0], mesh.vertices[:, 2] - mesh.vertices[:, 0])
        outward = np.einsum("fi,fi->f", normal, eye - mesh.vertices[:, 0]) > 0
        reach = np.maximum(points[..., 2].max(1), 0) * (IMAGE_W / K[0, 0]) + 1                  # generous view cone
        in_view = (points[..., 2].max(1) > NEAR_PLANE) & (np.abs(points[..., 0]).min(1) < reach) & outward
        # Small things far off are not worth drawing: windows from 60 m on.
        in_view &= (distance < 60) | (mesh.order == 0) | (mesh.label != UNLABELLED)
        chosen = np.flatnonzero(in_view)
        chosen = chosen[np.lexsort((mesh.order[chosen], -distance[chosen]))]
        colours = self.shade(mesh.colour[chosen], normal[chosen], distance[chosen])
        pixels = points[chosen] @ K.T
        straddles = points[chosen][..., 2].min(1) <= NEAR_PLANE
        pixels = pixels[..., :2] / np.where(straddles[:, None], 1.0, pixels[..., 2])[..., None]
        fixed = sample_cells(pixels)
        for k, face in enumerate(chosen):
            polygon = sample_cells(clip_near(points[face], K)) if straddles[k] else fixed[k]
            cv2.fillConvexPoly(canvas, polygon, colours[k], shift=4)
            if mesh.label[face] != UNLABELLED:
                cv2.fillConvexPoly(labels, polygon, int(mesh.label[face]), shift=4)

    def shade(self, albedo, normal, distance):
        """Colours (F, 3) of faces as lists: sun and sky light, then haze."""
        weather = self.scene.weather
        normal = normal / np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-9)
        light = weather.ambient + weather.diffuse * np.maximum(normal @ weather.sun, 0)
        haze = self.haze(distance)[:, None]
        return np.minimum(albedo * light[:, None] * (1 - haze) + weather.sky_low * haze, 255).tolist()

    def expose(self, canvas, seed):
        """Averages the samples of each pixel, then exposure, vignetting, rain on the lens, and noise."""
        rng, weather = np.random.default_rng(seed), self.scene.weather
        image = cv2.resize(canvas, (IMAGE_W, IMAGE_H), interpolation=cv2.INTER_AREA)
        if weather.kind == "Rain":
            soft = cv2.GaussianBlur(image, (0, 0), 5)
            drops = np.zeros((IMAGE_H, IMAGE_W), np.uint8)
            for x, y, size in zip(rng.integers(0, IMAGE_W, 6), rng.integers(0, IMAGE_H, 6), rng.integers(4, 14, 6)):
                cv2.circle(drops, (int(x), int(y)), int(size), 1, -1)
            cv2.copyTo(soft, drops, image)
        x, y = np.meshgrid(np.linspace(-1, 1, IMAGE_W, dtype=np.float32), np.linspace(-1, 1, IMAGE_H, dtype=np.float32))
        vignette = 1 - 0.12 * (x * x + y * y)
        image = image * (vignette[..., None] * weather.gain.astype(np.float32))
        image += weather.noise * rng.standard_normal(image.shape, np.float32)
        return np.clip(np.round(image), 0, 255).astype(np.uint8)


def face_billboards(crowns, eye):
    """Octagons that stand upright and face the eye, as a Mesh. crowns: centres (B, 3), radii, colours, labels."""
    centres, radii, colours, labels = crowns
    view = centres[:, :2] - eye[:2]
    right = np.stack([view[:, 1], -view[:, 0]], -1) / np.linalg.norm(view, axis=1, keepdims=True)
    angle = np.arange(8) * np.pi / 4 + np.pi / 8
    vertices = np.repeat(centres[:, None], 8, axis=1)
    vertices[..., :2] += (radii[:, None] * np.cos(angle))[..., None] * right[:, None]
    vertices[..., 2] += radii[:, None] * np.sin(angle)
    return Mesh(vertices, colours, labels, centres[:, :2], np.full(len(radii), 3))


def sample_cells(pixels):
    """Pixels (..., 2) -> fixed-point indices into the 2 x 2 times finer canvas, 4 fractional bits."""
    return np.round(np.clip(pixels * 2 - 0.5, -20000, 20000) * 16).astype(np.int32)


def clip_near(points, K):
    """Camera points (8, 3) of a face that reaches behind the near plane -> pixels (N, 2) of the part before it."""
    kept = []
    for a, b in zip(points, np.roll(points, -1, axis=0)):
        if a[2] > NEAR_PLANE:
            kept.append(a)
        if (a[2] > NEAR_PLANE) != (b[2] > NEAR_PLANE):
            kept.append(a + (b - a) * (NEAR_PLANE - a[2]) / (b[2] - a[2]))
    pixels = np.array(kept) @ K.T
    return pixels[:, :2] / pixels[:, 2:]


def reduce_labels(labels):
    """(2H, 2W) -> (H, W): the label of one sample, but a thin one wins from two samples of four on."""
    samples = np.stack([labels[i::2, j::2] for i in (0, 1) for j in (0, 1)])
    reduced = samples[0].copy()
    for label in THIN:
        reduced[(samples == label).sum(0) >= 2] = label
    return reduced


# ---------------------------------------------------------------------------------------------------------------------
# nuScenes tables and map


def token(*parts):
    """A nuScenes-like token of 32 hexadecimal digits that depends on nothing but its arguments."""
    return hashlib.md5("/".join(map(str, parts)).encode()).hexdigest()


def plan_scenes(seed, train_scenes, val_scenes, frames, sweeps=0):
    """The Plans of a world: names from nuScenes' official splits, each scene in a district of its own."""
    from nuscenes.utils.splits import train, val     # here, since it imports the whole devkit
    plans, used = [], {}
    for split, (names, count) in enumerate(((train, train_scenes), (val, val_scenes))):
        for k in range(count):
            town = VAL_TOWN if split else TRAIN_TOWNS[k % len(TRAIN_TOWNS)]
            place = used[town] = used.get(town, -1) + 1
            origin = (300.0 + DISTRICT_SPACING * (place % 6), 300.0 + DISTRICT_SPACING * (place // 6))
            # Moved on by one each round, or else it would rain in one of the towns only.
            weather = WEATHER_CYCLE[(k + k // len(WEATHER_CYCLE) + split) % len(WEATHER_CYCLE)]
            timestamp = 1_533_151_000_000_000 + len(plans) * 1_000_000_000
            plans.append(Plan(sorted(names)[k * (len(names) // count)], town, weather, origin, frames, (seed, split, k),
                              timestamp, sweeps))
    return plans


def write_scene(plan, out):
    """Renders a scene's images to disk; returns its records, {table: [record]}, and the map layers of its district."""
    cv2.setNumThreads(1)
    scene = make_scene(plan)
    renderer = Renderer(scene)
    prefix = ("n008" if plan.location.startswith("boston") else "n015") + f"-{plan.name}"
    tables = {"log": [], "scene": [], "sample": [], "sample_data": [], "ego_pose": []}
    log_token, scene_token = token(plan.name, "log"), token(plan.name)
    samples = [token(plan.name, "sample", k) for k in range(plan.frames)] + [""]
    tables["log"].append({"token": log_token, "logfile": prefix, "vehicle": prefix[:4], "date_captured": "2018-08-01",
                          "location": plan.location})
    tables["scene"].append({"token": scene_token, "log_token": log_token, "nbr_samples": plan.frames,
                            "first_sample_token": samples[0], "last_sample_token": samples[plan.frames - 1],
                            "name": plan.name, "description": scene.description})
    for frame in range(plan.frames):
        lidar_time = plan.timestamp + int(frame * FRAME_PERIOD * 1e6)
        tables["sample"].append({"token": samples[frame], "timestamp": lidar_time, "prev": samples[frame - 1],
                                 "next": samples[frame + 1], "scene_token": scene_token})
        for channel in ("LIDAR_TOP", *CAMERAS):
            for moment in moments(plan, channel):
                if frame <= moment < frame + 1:
                    record, pose = describe_shot(scene, moment, channel, prefix)
                    tables["sample_data"].append(record)
                    tables["ego_pose"].append(pose)
                    if channel in CAMERAS:
                        image, _ = render_frame(renderer, moment, channel)
                        ok, jpeg = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])
                        (Path(out) / record["filename"]).write_bytes(jpeg.tobytes())
    return tables, map_layers(scene.district, plan.name)


def render_frame(renderer, frame, camera):
    """Image (288, 512, 3) uint8 RGB, as it is before JPEG, and true labels (288, 512) uint8 of a camera's frame."""
    seed = [*renderer.scene.plan.key, 2, *seed_words(frame), list(CAMERAS).index(camera)]
    return renderer.render(camera, camera_time(renderer.scene, frame, camera), seed)


def describe_shot(scene, frame, channel, prefix):
    """The sample_data record and the ego_pose record of one sensor's frame. Between two key frames it belongs, as in
    nuScenes, to the sample of the later one."""
    plan, taken = scene.plan, moments(scene.plan, channel)
    is_camera, is_key_frame = channel in CAMERAS, isinstance(frame, int)
    time = camera_time(scene, frame, channel) if is_camera else frame * FRAME_PERIOD
    microseconds = plan.timestamp + int(round(time * 1e6))
    extension, folder = "jpg" if is_camera else "pcd.bin", "samples" if is_key_frame else "sweeps"
    tokens, index = [token(plan.name, channel, k) for k in taken] + [""], taken.index(frame)
    record = {"token": tokens[index], "sample_token": token(plan.name, "sample", math.ceil(frame)),
              "ego_pose_token": token(plan.name, channel, frame, "pose"),
              "calibrated_sensor_token": token(channel, "calibration"), "timestamp": microseconds,
              "fileformat": extension, "is_key_frame": is_key_frame,
              "height": IMAGE_H * is_camera, "width": IMAGE_W * is_camera,
              "filename": f"{folder}/{channel}/{prefix}__{channel}__{microseconds}.{extension}",
              "prev": tokens[index - 1], "next": tokens[index + 1]}
    translation, rotation = ego_pose(scene, time)
    translation[:2] += scene.map_offset
    pose = {"token": record["ego_pose_token"], "timestamp": microseconds, "rotation": rotation.tolist(),
            "translation": translation.tolist()}
    return record, pose


def shared_tables(plans):
    """The tables that do not depend on what happens in a scene."""
    sensors, calibrations = [], []
    for channel in ("LIDAR_TOP", *CAMERAS):
        is_camera = channel in CAMERAS
        sensors.append({"token": token(channel), "channel": channel, "modality": "camera" if is_camera else "lidar"})
        translation, rotation = CAMERAS[channel][2:4] if is_camera else (LIDAR_TRANSLATION, LIDAR_ROTATION)
        K = camera_calibration(channel)[0].tolist() if is_camera else []
        calibrations.append({"token": token(channel, "calibration"), "sensor_token": token(channel),
                             "translation": list(translation), "rotation": list(rotation), "camera_intrinsic": K})
    maps = [{"token": token(town, "map"), "category": "semantic_prior", "filename": f"maps/{token(town)}.png",
             "log_tokens": [token(plan.name, "log") for plan in plans if plan.location == town]}
            for town in sorted({plan.location for plan in plans})]
    levels = [{"token": str(k + 1), "level": level, "description": level}
              for k, level in enumerate(("v0-40", "v40-60", "v60-80", "v80-100"))]
    return {"sensor": sensors, "calibrated_sensor": calibrations, "map": maps, "visibility": levels, "category": [],
            "attribute": [], "instance": [], "sample_annotation": []}


MAP_LAYERS = ("polygon", "line", "node", "drivable_area", "road_segment", "road_block", "lane", "ped_crossing",
              "walkway", "stop_line", "carpark_area", "road_divider", "lane_divider", "traffic_light", "lane_connector")


def map_layers(district, name):
    """A district as records of the map expansion 1.3: {layer: [record]}."""
    layers = {layer: [] for layer in MAP_LAYERS}

    def add_nodes(points):
        first = len(layers["node"])
        layers["node"] += [{"token": token(name, "node", first + k), "x": float(x), "y": float(y)}
                           for k, (x, y) in enumerate(points)]
        return [node["token"] for node in layers["node"][first:]]

    def add_polygon(polygon):
        record = {"token": token(name, "polygon", len(layers["polygon"])),
                  "exterior_node_tokens": add_nodes(polygon.exterior.coords[:-1]),
                  "holes": [{"node_tokens": add_nodes(hole.coords[:-1])} for hole in polygon.interiors]}
        layers["polygon"].append(record)
        return record["token"]

    def add_record(layer, **values):
        layers[layer].append({"token": token(name, layer, len(layers[layer])), **values})

    for polygon, is_intersection in district.segments:
        add_record("road_segment", polygon_token=add_polygon(polygon), is_intersection=is_intersection,
                   drivable_area_token=token(name, "drivable_area", 0))
    for polygon in district.lanes:
        add_record("lane", polygon_token=add_polygon(polygon), lane_type="CAR", from_edge_line_token="",
                   to_edge_line_token="", left_lane_divider_segments=[], right_lane_divider_segments=[])
    for polygon in district.map_crossings:
        add_record("ped_crossing", polygon_token=add_polygon(polygon), road_segment_token="")
    for polygon in district.walkways:
        add_record("walkway", polygon_token=add_polygon(polygon))
    for polygon in district.stop_lines:
        add_record("stop_line", polygon_token=add_polygon(polygon), stop_line_type="STOP_SIGN", ped_crossing_tokens=[],
                   traffic_light_tokens=[], road_block_token="")
    add_record("drivable_area", polygon_tokens=[add_polygon(district.surface)])
    for layer, lines in (("lane_divider", district.lane_dividers), ("road_divider", district.road_dividers)):
        for line, kind in lines:
            nodes, line_token = add_nodes(line), token(name, "line", len(layers["line"]))
            layers["line"].append({"token": line_token, "node_tokens": nodes})
            extra = {"road_segment_token": ""} if layer == "road_divider" else {}
            add_record(layer, line_token=line_token, **extra,
                       **{f"{layer}_segments": [{"node_token": node, "segment_type": kind} for node in nodes]})
    return layers


# ---------------------------------------------------------------------------------------------------------------------
# The whole world


def in_parallel(function, jobs, processes, label):
    """[function(*job) for job in jobs] on several processes, in order, with a progress bar."""
    # "spawn": a forked copy of a process in which torch or OpenCV already runs threads may hang.
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pending = [pool.apply_async(function, job) for job in jobs]
        return [result.get() for result in tqdm(pending, desc=label, unit="scene")]


def build_world(out, seed=0, train_scenes=24, val_scenes=6, frames=12, processes=2, sweeps=0):
    """Writes the world to the folder `out`. True if it is there now, False if another one is there already."""
    out, arguments = Path(out), {"format": 1, "seed": seed, "train_scenes": train_scenes, "val_scenes": val_scenes,
                                 "frames": frames, **({"sweeps": sweeps} if sweeps else {})}
    if out.exists():
        note = out / "toyworld.json"
        found = json.loads(note.read_text()) if note.is_file() else None
        same = found == arguments
        print(f"{out}: already there, nothing to do" if same else
              f"{out}: holds something else ({found}), not {arguments}; remove it, or choose another --out")
        return same
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    kinds = ("samples", "sweeps") if sweeps else ("samples",)
    for folder in ("v1.0-trainval", "maps/expansion", *(f"{kind}/{camera}" for kind in kinds for camera in CAMERAS)):
        (partial / folder).mkdir(parents=True)
    plans = plan_scenes(seed, train_scenes, val_scenes, frames, sweeps)
    results = in_parallel(write_scene, [(plan, str(partial)) for plan in plans], processes, "toy world")
    tables = shared_tables(plans)
    for scene_tables, _ in results:
        for name, records in scene_tables.items():
            tables.setdefault(name, []).extend(records)
    for name, records in tables.items():
        (partial / "v1.0-trainval" / f"{name}.json").write_text(json.dumps(records, indent=0))
    for record in tables["map"]:
        cv2.imwrite(str(partial / record["filename"]), np.zeros((100, 100), np.uint8))
    for town in (*TRAIN_TOWNS, VAL_TOWN):
        layers = [layers for plan, (_, layers) in zip(plans, results) if plan.location == town]
        merged = {layer: [record for part in layers for record in part[layer]] for layer in MAP_LAYERS}
        merged.update(version="1.3", arcline_path_3={}, connectivity={}, canvas_edge=[2500.0, 2500.0])
        (partial / "maps" / "expansion" / f"{town}.json").write_text(json.dumps(merged))
    (partial / "toyworld.json").write_text(json.dumps(arguments))
    partial.rename(out)
    print(f"{out}: {len(plans)} scenes, {len(plans) * frames} key frames, "
          f"{sum(record['fileformat'] == 'jpg' for record in tables['sample_data'])} images")
    return True


# ---------------------------------------------------------------------------------------------------------------------
# The segmenter. torch and transformers are imported inside: the processes that render have no use for them.

SEGMENTER_FOLDER = Path(__file__).parent / "toy_segmenter"
LOSS_WEIGHTS = {MARKING: 2.0, CURB: 1.5, CROSSWALK: 2.0}    # thin and rare labels; all others weigh 1


def render_district(plan):
    """All key frames of a plan, by all cameras: images (6 * frames, 288, 512, 3), labels (6 * frames, 288, 512)."""
    cv2.setNumThreads(1)
    renderer = Renderer(make_scene(plan))
    shots = [render_frame(renderer, frame, camera) for frame in range(plan.frames) for camera in CAMERAS]
    return np.stack([image for image, _ in shots]), np.stack([labels for _, labels in shots])


def segmenter_images(seed, first, count, frames=2, processes=2):
    """Images and labels, as render_district gives them, of districts first .. first + count - 1 of SEGMENTER_TOWN."""
    plans = [Plan(f"segmenter-{k}", SEGMENTER_TOWN, WEATHER_CYCLE[k % len(WEATHER_CYCLE)], (300.0, 300.0), frames,
                  (seed, 2, k), 0) for k in range(first, first + count)]
    parts = in_parallel(render_district, [(plan,) for plan in plans], processes, "segmenter town")
    return np.concatenate([images for images, _ in parts]), np.concatenate([labels for _, labels in parts])


def make_segmenter():
    """An untrained Mask2Former of about 0.3 M parameters, with a query for each label."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, ResNetConfig
    backbone = ResNetConfig(layer_type="basic", embedding_size=32, hidden_sizes=[32, 48, 64, 96], depths=[1, 1, 1, 1],
                            out_features=["stage1", "stage2", "stage3", "stage4"])
    names = dict(enumerate(LABELS))
    return Mask2FormerForUniversalSegmentation(Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=64,
        encoder_layers=1, decoder_layers=3, num_attention_heads=4, dim_feedforward=64, num_queries=len(LABELS),
        id2label=names, label2id={name: k for k, name in names.items()}))


def make_image_processor():
    """What the checkpoint's preprocessor_config.json says: 288 x 512, ImageNet's mean and deviation."""
    from transformers import Mask2FormerImageProcessor
    return Mask2FormerImageProcessor(size={"height": IMAGE_H, "width": IMAGE_W}, ignore_index=255,
                                     num_labels=len(LABELS))


def segmenter_input(processor, images):
    """(B, 288, 512, 3) uint8 array -> pixel_values (B, 3, 288, 512), as the processor makes them."""
    return processor(images=list(images), return_tensors="pt")["pixel_values"]


def predict_labels(model, processor, images, batch=16):
    """(N, 288, 512, 3) uint8 -> label ids (N, 288, 512) uint8: the usual sum over queries of class times mask."""
    import torch
    found = []
    for start in range(0, len(images), batch):
        with torch.inference_mode():
            outputs = model(pixel_values=segmenter_input(processor, images[start:start + batch]))
        masks = torch.nn.functional.interpolate(outputs.masks_queries_logits, (IMAGE_H, IMAGE_W), mode="bilinear",
                                                align_corners=False).sigmoid()
        classes = outputs.class_queries_logits.softmax(-1)[..., :-1]
        found.append(torch.einsum("bqc,bqhw->bchw", classes, masks).argmax(1).to(torch.uint8))
    return torch.cat(found).numpy()


def label_iou(predicted, truth):
    """Intersection over union by label, over all pixels: {label name: float}; nan where a label is in neither."""
    table = np.bincount(truth.ravel().astype(int) * len(LABELS) + predicted.ravel(), minlength=len(LABELS) ** 2)
    table = table.reshape(len(LABELS), len(LABELS)).astype(float)
    union = table.sum(0) + table.sum(1) - table.diagonal()
    return {name: table[k, k] / union[k] if union[k] else float("nan") for k, name in enumerate(LABELS)}


def segmenter_loss(outputs, labels, weights):
    """Query i stands for label i, so no matching is needed: the class head learns that, and the masks learn the labels.

    outputs: of the model, B images, Q queries. labels (B, H, W) int64. weights (Q,)."""
    import torch
    from torch.nn import functional as F
    masks = F.interpolate(outputs.masks_queries_logits, labels.shape[-2:], mode="bilinear", align_corners=False)
    classes = outputs.class_queries_logits                              # (B, Q, Q + 1)
    own = torch.arange(classes.shape[1]).expand(classes.shape[:2])
    # Which label a pixel has (masks compete), and whether each mask is there at all (as sigmoid(mask) is read later).
    compete = F.cross_entropy(masks, labels, weights)
    present = F.softplus(masks).mean() - masks.gather(1, labels[:, None]).mean() / masks.shape[1]
    # Overlap over the batch, of the thin labels, whose pixels are too few to matter much in the terms above.
    thin = list(THIN)
    drawn, true = masks[:, thin].sigmoid(), labels[:, None] == torch.tensor(thin)[:, None, None]
    dice = 2 * (drawn * true).sum((0, 2, 3)) / (drawn.sum((0, 2, 3)) + true.sum((0, 2, 3)) + 1)
    return compete + present + (1 - dice).mean() + 0.2 * F.cross_entropy(classes.flatten(0, 1), own.flatten())


def train_segmenter(folder=SEGMENTER_FOLDER, seed=0, steps=2000, batch=4):
    """Renders the segmenter's town, trains on it, prints the IoU on held-out districts, writes the checkpoint."""
    import torch
    torch.manual_seed(seed)
    images, labels = segmenter_images(seed, 0, 64)
    model, processor = make_segmenter(), make_image_processor()
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(images)} images")
    weights = torch.tensor([LOSS_WEIGHTS.get(k, 1.0) for k in range(len(LABELS))])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.1)
    model.train()
    for step in (bar := tqdm(range(steps), desc="segmenter", unit="step")):
        chosen = torch.randint(len(images), (batch,))
        pixels = segmenter_input(processor, images[chosen])
        target = torch.from_numpy(labels[chosen]).long()
        # A window of 224 x 384 pixels takes 0.6 of the time of a whole image, and is as good to learn from.
        top, left = torch.randint(IMAGE_H - 224 + 1, ()), torch.randint(IMAGE_W - 384 + 1, ())
        pixels, target = (part[..., top:top + 224, left:left + 384] for part in (pixels, target))
        if torch.rand(()) < 0.5:
            pixels, target = pixels.flip(-1), target.flip(-1)
        loss = segmenter_loss(model(pixel_values=pixels), target, weights)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()
    images, labels = segmenter_images(seed, 1000, 12, frames=1)
    for name, iou in label_iou(predict_labels(model, processor, images), labels).items():
        print(f"  {name:28s} IoU {iou:.3f}")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def parse_args():
    """The flags."""
    parser = argparse.ArgumentParser(description="Writes the embedded world, or trains its segmenter.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", default="data/toy", help="folder to write the data set to")
    parser.add_argument("--seed", type=int, default=0, help="everything follows from it")
    parser.add_argument("--train-scenes", type=int, default=24, help="scenes of the official train split")
    parser.add_argument("--val-scenes", type=int, default=6, help="scenes of the official val split, elsewhere")
    parser.add_argument("--frames", type=int, default=12, help="key frames a scene, half a second apart")
    parser.add_argument("--sweeps", type=int, default=0,
                        help="camera frames between two key frames, not labelled by any map (5: nuScenes' 12 Hz)")
    parser.add_argument("--processes", type=int, default=2, help="scenes rendered at a time")
    parser.add_argument("--train-segmenter", action="store_true",
                        help=f"train and write {SEGMENTER_FOLDER.name} beside this file instead; takes --seed")
    return parser.parse_args()


if __name__ == "__main__":
    args = parse_args()
    if args.train_segmenter:
        train_segmenter(seed=args.seed)
        sys.exit()
    if min(args.train_scenes, args.val_scenes, args.sweeps) < 0 or min(args.frames, args.processes) < 1:
        sys.exit("error: --frames and --processes are at least 1, the other numbers at least 0")
    sys.exit(not build_world(args.out, args.seed, args.train_scenes, args.val_scenes, args.frames, args.processes,
                         args.sweeps))
