"""Stage 02: rasterise nuScenes' vector map into BEV ground truth, for fine-tuning (04) and scoring (05) only.

Reads:  the tables and the map expansion (maps/expansion/<location>.json, version 1.3) of a nuScenes data set.
Writes: out/bev_gt/<scene>.pt  {meta, scene, token [T], bev (T, H, W) uint8: class index of each cell}
        out/splits.json        {"train": [scenes], "val": [scenes], the official split of the scenes that are there;
                               "geo_train", "geo_val", "geo_test": [scenes]}, whose sides share no street

    python 02_bev_gt.py                                                                # the embedded toy world
    python 02_bev_gt.py --dataroot data/nuscenes --version v1.0-trainval --preset paper --out out

A cell belongs to a class if and only if its centre does:
    divider       the centre lies within line_width / 2 of a lane_divider or road_divider line
    boundary      the centre lies within line_width / 2 of the contour of the road: the union of road_segment and lane
    ped_crossing  the centre lies inside a ped_crossing polygon (not in its holes)
Where classes overlap, boundary wins over divider, and divider over ped_crossing: a line must not vanish in the wide
polygon that it crosses, and of two lines the one that a wheel must not cross matters more.
"""
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from functools import partial
from pathlib import Path

import numpy as np
import shapely
import torch
from nuscenes.nuscenes import NuScenes
from nuscenes.utils import splits
from tqdm import tqdm

from model import PRESETS
from reproject import (CLASSES, GRID_META, RANK, RANKS, SPLITS, drive_of, fingerprint, is_finished, keep_freed_memory,
                       key_frames, look_up, make_meta, open_tables, read_json, rules_of, save_json, save_pt,
                       watched, world_from_ego)

EXPANSION = "nuScenes-map-expansion-v1.3.zip from nuscenes.org, unpacked into the folder maps of the data root"
PIECE = 1.25  # m; lines are cut into pieces no longer than this, so that each one touches a small square of cells only
SEAM = 0.02  # m; lanes that should abut may be drawn apart by up to twice this and still count as one road
SHARES = (70, 15, 15)  # % of the key frames on each side of the geo split
NEAR = 5.0  # m; a key frame that is so near one to train on shows the same street


def parse_args():
    """The flags of this stage."""
    parser = ArgumentParser(description=__doc__.splitlines()[0], formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--dataroot", default="data/toy", help="folder of the nuScenes data set")
    parser.add_argument("--version", default="v1.0-trainval", help="version of its tables: the folder's name")
    parser.add_argument("--preset", default="toy", choices=PRESETS, help="size of grid and images (model.py)")
    parser.add_argument("--out", default="out", help="folder of everything the stages write")
    parser.add_argument("--geo-distance", type=float, default=50.0, help="m; geo: nearer scenes stay on one side")
    parser.add_argument("--workers", type=int, default=2, help="processes that rasterise (0: this one alone)")
    return parser.parse_args()


def read_map(path):
    """Read a map expansion JSON: {class name: STRtree}, of line pieces or of polygons' rings, in metres in the world.

    The devkit's NuScenesMap is left out: it knows four locations by name, and its line masks fail on Shapely 2."""
    table = read_json(path, f"get {EXPANSION}")
    try:
        if [int(number) for number in str(table.get("version", "1.0")).split(".")] < [1, 3]:
            sys.exit(f"error: {path} is older than version 1.3 of the map expansion: get {EXPANSION}")
        node = {record["token"]: (record["x"], record["y"]) for record in table["node"]}
        line = {record["token"]: [node[token] for token in record["node_tokens"]] for record in table["line"]}
        rings = {record["token"]: [record["exterior_node_tokens"], *(hole["node_tokens"] for hole in record["holes"])]
                 for record in table["polygon"]}
        polygon = {}
        for layer in ("ped_crossing", "road_segment", "lane"):
            points = [[[node[n] for n in ring] for ring in rings[record["polygon_token"]]] for record in table[layer]]
            polygon[layer] = [shapely.Polygon(outside, holes) for outside, *holes in points]
        # Some road dividers of the real maps have no line: an empty token or fewer than two nodes.
        divider = [line[record["line_token"]] for layer in ("lane_divider", "road_divider")
                   for record in table[layer] if record["line_token"] != ""]
        if not np.isfinite(np.array(list(node.values()), float)).all():
            raise ValueError("a node has no place")
        return {"ped_crossing": shapely.STRtree(one_way(polygon["ped_crossing"])),
                "divider": shapely.STRtree(pieces(divider)),
                "boundary": shapely.STRtree(pieces(contour(polygon["road_segment"] + polygon["lane"])))}
    except (LookupError, TypeError, ValueError, AttributeError, shapely.errors.ShapelyError) as error:
        sys.exit(f"error: {path} is damaged ({type(error).__name__}: {error}): get {EXPANSION}")


def one_way(polygons):
    """The rings of polygons, outlines running one way and holes the other; a bow tie becomes two triangles."""
    parts = shapely.get_parts(shapely.get_parts(shapely.make_valid(polygons)))  # collections of multipolygons
    return shapely.get_rings(shapely.normalize(parts))


def contour(road):
    """Outlines of the union of polygons, outside and holes, as lists of points (x, y).

    The union is that of the whole map: were a frame's window cut out first, its edge would be drawn as a boundary."""
    grown = shapely.union_all(shapely.buffer(shapely.make_valid(road), SEAM, join_style="mitre"))
    union = shapely.buffer(grown, -SEAM, join_style="mitre")
    return [shapely.get_coordinates(ring) for ring in shapely.get_rings(shapely.get_parts(union))]


def pieces(lines):
    """Cut polylines, lists of points (x, y), into straight shapely lines of at most PIECE metres."""
    lines = [shapely.LineString(points) for points in lines if len(points) > 1]
    lines = shapely.segmentize([line for line in lines if line.length > 0], PIECE)
    points, line = shapely.get_coordinates(lines, return_index=True)
    return shapely.linestrings(np.stack((points[:-1], points[1:]), 1)[line[:-1] == line[1:]])


def draw_lines(ends, value, shape, reach):
    """A map (H, W) uint8: the `value` of the last line piece that passes within `reach` of a cell's centre, 0 where
    none does. ends (S, 2, 2) as (row, column) and reach in cells, value (S,).

    Each piece is compared with one square of n x n cells around it, all pieces at once."""
    first = np.floor(np.minimum(ends[:, 0], ends[:, 1]) - reach).astype(np.int32)  # (S, 2): the squares' first cells
    n = int(np.max(np.ceil(np.maximum(ends[:, 0], ends[:, 1]) + reach) - first, initial=0))
    near = ((first > -n) & (first < shape)).all(1)
    ends, first, value = ends[near], first[near], value[near]
    # From here on places are relative to the square, where float32 is exact to a millionth of a cell.
    a, along = (ends[:, 0] - first).astype(np.float32), (ends[:, 1] - ends[:, 0]).astype(np.float32)  # (S, 2) each
    centre = np.arange(n, dtype=np.float32) + 0.5
    x, y = (centre - a[:, :1])[:, :, None], (centre - a[:, 1:])[:, None]  # from a to the centre: (S, n, 1), (S, 1, n)
    dx, dy = along.T[..., None, None]  # (S, 1, 1) each
    length2 = np.maximum(dx ** 2 + dy ** 2, 1e-12)
    share = (x * (dx / length2) + y * (dy / length2)).clip(0, 1)  # (S, n, n), of the way from a to b
    hit = (x - share * dx) ** 2 + (y - share * dy) ** 2 <= reach ** 2
    drawn = np.zeros((shape[0] + 2 * n, shape[1] + 2 * n), np.uint8)  # squares may reach n cells over the rim
    piece, row, column = np.unravel_index(np.flatnonzero(hit), hit.shape)  # (P,) each, of the hits
    drawn[first[piece, 0] + n + row, first[piece, 1] + n + column] = value[piece]
    return drawn[n:n + shape[0], n:n + shape[1]]


def fill_rings(points, ring, shape):
    """Cells (H, W) bool whose centre lies inside polygons: points (P, 2) of their rings as (row, column) in cells, ring
    (P,) the number of each point's ring.

    The rings are from one_way: along a row, an edge that leads into a polygon counts 1, one that leads out -1."""
    edges = np.stack((points[:-1], points[1:]), 1)[ring[:-1] == ring[1:]]  # (E, 2, 2)
    centre = np.arange(shape[0]) + 0.5
    start, end = edges[:, :, :1].swapaxes(0, 1)  # (E, 1) each: their rows
    edge, row = ((start <= centre) != (end <= centre)).nonzero()  # where an edge cuts a row
    a, along = edges[edge, 0], edges[edge, 1] - edges[edge, 0]
    cut = a[:, 1] + (centre[row] - a[:, 0]) * along[:, 1] / along[:, 0]
    column = np.ceil(cut - 0.5).clip(0, shape[1]).astype(int)  # the first cell whose centre lies beyond the edge
    windings = np.zeros((shape[0], shape[1] + 1), np.int8)
    np.add.at(windings, (row, column), np.sign(along[:, 0]).astype(np.int8))
    return windings.cumsum(1, dtype=np.int8)[:, :-1] != 0


def rasterise(road_map, world_T_ego, grid, line_width):
    """The map around the car: (H, W) uint8 class index a cell. world_T_ego (4, 4) float64, levelled."""
    margin, R, t = line_width / 2, world_T_ego[:2, :2].numpy(), world_T_ego[:2, 3].numpy()
    rim = np.stack(np.meshgrid(grid.x_range, grid.y_range), -1).reshape(4, 2) @ R.T + t  # the grid's corners, world
    window = shapely.box(*(rim.min(0) - margin), *(rim.max(0) + margin))

    def to_cells(xy_world):  # (..., 2) -> (row, column), in cells: the upper left corner is (0, 0)
        return grid.cells((xy_world - t) @ R)  # the inverse of a rotation is its transpose: p @ R

    near = {name: tree.geometries[tree.query(window)] for name, tree in road_map.items()}
    bev = np.zeros(grid.shape, np.uint8)
    for name in ("ped_crossing",):  # areas; lines lie on top of them
        points, ring = shapely.get_coordinates(near[name], return_index=True)
        bev[fill_rings(to_cells(points), ring, grid.shape)] = CLASSES.index(name)
    lines = ("divider", "boundary")  # later ones lie on top
    ends = to_cells(shapely.get_coordinates(np.concatenate([near[name] for name in lines]))).reshape(-1, 2, 2)
    value = np.repeat([CLASSES.index(name) for name in lines], [len(near[name]) for name in lines])
    drawn = draw_lines(ends, value, grid.shape, margin / grid.cell)
    return np.where(drawn > 0, drawn, bev)


def rasterise_scene(road_map, config, scene):
    """The content of a scene's file. scene: (all of it but the maps, world_T_ego (T, 4, 4)). The maps are an array, as
    tensors would come from a worker through shared memory, of which there may be little."""
    content, poses = scene
    return content | {"bev": np.stack([rasterise(road_map, pose, config.grid, config.line_width) for pose in poses])}


def official_splits(scenes, version):
    """{"train": [...], "val": [...]}: which of the scene names belong to the official split of this version."""
    prefix = "mini_" if version.endswith("mini") else ""
    return {name: sorted(set(scenes) & set(getattr(splits, prefix + name))) for name in SPLITS["official"]}


def join_tracks(tracks, distance):
    """Groups of scenes that come within `distance` metres of one another, directly or by way of others of their group.

    tracks: {scene: (T, 2) positions of its key frames in metres}. Returns tuples of names, most key frames first."""
    names, clouds = list(tracks), [shapely.MultiPoint(xy) for xy in tracks.values()]
    together = {name: {name} for name in names}
    for a, b in shapely.STRtree(clouds).query(clouds, "dwithin", distance).T:
        if names[a] not in together[names[b]]:
            union = together[names[a]] | together[names[b]]
            together |= dict.fromkeys(union, union)
    return sorted({tuple(sorted(group)) for group in together.values()},
                  key=lambda group: (-sum(len(tracks[name]) for name in group), group))


def geo_splits(tracks, distance):
    """{"geo_train", "geo_val", "geo_test": [scenes]}: no scene within `distance` metres of one on another side.

    Each group of join_tracks goes to the side that lacks most key frames of its share, the last ones to empty sides."""
    groups, total = join_tracks(tracks, distance), sum(map(len, tracks.values()))
    lack = {side: share * total for side, share in zip(SPLITS["geo"], SHARES)}  # in hundredths of a key frame
    split = {side: [] for side in lack}
    for number, group in enumerate(groups):
        empty = [side for side in split if not split[side]]
        side = max(empty if len(groups) - number <= len(empty) else split, key=lack.get)
        split[side] += group
        lack[side] -= 100 * sum(len(tracks[name]) for name in group)
    return {side: sorted(names) for side, names in split.items()}


def share_near(tracks, scenes, train):
    """The share (0 to 1) of the key frames of `scenes` that lie within NEAR of a key frame of the scenes `train`."""
    here, there = ([point for name in names for point in shapely.points(tracks[name])] for names in (scenes, train))
    near = shapely.STRtree(there).query_nearest(here, max_distance=NEAR, all_matches=False)  # (2, pairs)
    return near.shape[1] / max(1, len(here))


if __name__ == "__main__":
    args = parse_args()
    if args.workers < 0 or not 0 < args.geo_distance < np.inf:
        sys.exit("error: --workers is at least 0, and --geo-distance a number above 0")

    config, folder, listing = PRESETS[args.preset], Path(args.out) / "bev_gt", Path(args.out) / "splits.json"
    nusc = open_tables(NuScenes, args.dataroot, args.version)
    split = official_splits([scene["name"] for scene in nusc.scene], args.version)
    if not split["train"] + split["val"]:
        sys.exit(f"error: no scene of {args.dataroot} is in nuScenes' official train or val split: see --version")

    rules = rules_of(PIECE, SEAM, read_map, one_way, contour, pieces, draw_lines, fill_rings, rasterise)
    todo, digests, tracks = {}, {}, {}  # map file -> scenes, map file -> its fingerprint, scene -> (T, 2) m
    for number, scene in enumerate(nusc.scene):
        path = Path(args.dataroot) / f"maps/expansion/{look_up(nusc, 'log', scene['log_token'])['location']}.json"
        if path not in digests:
            if not path.is_file():
                sys.exit(f"error: {path} is missing (the map of {scene['name']}): get {EXPANSION}")
            digests[path] = fingerprint(path.read_bytes())
        samples = key_frames(nusc, scene)
        source = {"version": args.version, "map": digests[path], "drive": drive_of(nusc, samples), "rules": rules}
        meta = make_meta(config, source)
        tokens, poses = [s["token"] for s in samples], torch.stack([world_from_ego(nusc, s) for s in samples])
        tracks[scene["name"]] = poses[:, :2, 3].numpy() + (1e6 * list(digests).index(path), 0)  # a far place each
        if number % RANKS == RANK and not is_finished(folder / f"{scene['name']}.pt", meta, GRID_META, tokens):
            todo.setdefault(path, []).append(({"meta": meta, "scene": scene["name"], "token": tokens}, poses))
    del nusc.explorer, nusc  # it refers back to the tables: gigabytes, which the workers would inherit

    keep_freed_memory()
    # Location by location, as joining up its roads takes seconds; for the workers it is milliseconds a frame then.
    with watched(), tqdm(total=sum(map(len, todo.values())), unit="scene", disable=not todo or RANK > 0) as progress:
        for path, scenes in todo.items():
            draw = partial(rasterise_scene, read_map(path), config)
            # A DataLoader as a pool of processes: it hands out the scenes one by one, and each worker draws its own.
            for content in torch.utils.data.DataLoader(scenes, None, num_workers=args.workers, collate_fn=draw):
                save_pt(content | {"bev": torch.from_numpy(content["bev"])}, folder / f"{content['scene']}.pt")
                progress.update()
    if RANK:
        sys.exit()

    split |= geo_splits(tracks, args.geo_distance)
    near = ", ".join(f"{side} {share_near(tracks, split[side], split[train]):.1%}"
                     for train, *others in SPLITS.values() for side in others)
    print(f"key frames within {NEAR:g} m of one to train on: {near}")
    if todo or not listing.exists() or read_json(listing, "delete it") != split:
        save_json(split, listing)
        print(f"wrote {folder} and {listing}; scenes: {', '.join(f'{side} {len(split[side])}' for side in split)}")
    else:
        print(f"{folder} and {listing} are finished: nothing to do")
