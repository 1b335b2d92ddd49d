"""Made-up patients in the real layouts, so that everything here runs with no download: CT in HU with AMOS's 15 organs,
four-contrast brain MR with a tumour, eight kinds of lesion, nodules of two classes, lungs with and without opacities.

    python phantom.py --out data/phantom                          # small, all parts: under a minute on 2 cores, 42 MB
    python phantom.py --out data/phantom --picture phantom.png    # the same, and a contact sheet of what was made
    python phantom.py --out data/full --size full --parts amos    # 512 x 512 x 200-300: 25-40 s a scan, 1.6 GB a process

The same seed gives the same voxels whatever the number of workers. Files that are already there are kept, so a run that
was cut off goes on where it stopped. Nothing here is a patient: results on it say that the code runs, not that it heals.

How a patient is made: organs are balls and tubes given by their signed distance in a standard patient (millimetres,
x to the right, y to the front, z to the head: RAS+). Every patient has organs of other sizes and places, and a smooth
random field bends the whole. A distance becomes an edge about one voxel wide (partial volume); the label is its half.
"""
import argparse
import copy
import csv
import functools
import gzip
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
from scipy.interpolate import make_interp_spline
from scipy.ndimage import distance_transform_edt, gaussian_filter
from scipy.spatial.transform import Rotation

from common import BadInput, cli, parallel, read_json, write_beside, write_json

PARTS = ("amos", "brats", "deeplesion", "nodule", "ricord")
VERSION = 2  # of the made-up patients: folders of another version are not mixed with this one's

# Patients of each part: (training, validation), or (training, validation, test), or in all.
COUNTS = {"small": dict(amos=(12, 4), brats=8, deeplesion=48, nodule=(480, 120, 240), ricord=(12, 4, 8)),
          "full": dict(amos=(4, 2), brats=4, deeplesion=24, nodule=(1158, 165, 310), ricord=(194, 52, 84))}
# Voxels of a volume, and the most that a patient's may differ from it.
SHAPES = {"small": dict(amos=((80, 80, 72), (6, 6, 5)), brats=((72, 72, 50), (3, 3, 4)), deeplesion=((80, 80, 22), (5, 5, 4)),
                        ricord=((80, 72, 68), (5, 4, 2))),
          "full": dict(amos=((512, 512, 250), (0, 0, 50)), brats=((240, 240, 155), (0, 0, 0)),
                       deeplesion=((512, 512, 50), (0, 0, 8)), ricord=((256, 256, 96), (0, 0, 12)))}

ORGANS = ("background", "spleen", "right kidney", "left kidney", "gall bladder", "esophagus", "liver", "stomach", "aorta",
          "postcava", "pancreas", "right adrenal gland", "left adrenal gland", "duodenum", "bladder", "prostate/uterus")
(SPLEEN, R_KIDNEY, L_KIDNEY, GALL, ESOPHAGUS, LIVER, STOMACH, AORTA, POSTCAVA, PANCREAS, R_ADRENAL, L_ADRENAL, DUODENUM,
 BLADDER, PROSTATE) = range(1, 16)
BONE, LUNG, MUSCLE, FAT, CAVITY, MEDIASTINUM, VESSEL = range(16, 23)  # what AMOS does not label, for placing lesions
LESIONS = ("bone", "abdomen", "mediastinum", "liver", "lung", "kidney", "soft tissue", "pelvis")  # types 1 ... 8
ABDOMEN, CHEST = (-206, 172), (62, 352)  # z of the standard patient, mm, that the scan covers
CONTRASTS, NODULE_EDGES = ("t1n", "t1c", "t2w", "t2f"), {"small": (28,), "full": (28, 64)}

# ---------------------------------------------------------------- fields and shapes


def smooth_noise(rng, shape, sigma):
    """Random field [X, Y, Z] float32 of mean about 0 and deviation 1, correlated over `sigma` voxels."""
    f = gaussian_filter(rng.standard_normal(shape, dtype=np.float32), sigma, mode="wrap")
    return f / f.std()


def upsample(field, shape, z=slice(None)):
    """Linear interpolation of a coarse field to [X, Y, Z] voxels, or to the slices `z` of them."""
    for axis in (2, 1, 0):
        t = np.linspace(0, field.shape[axis] - 1, shape[axis], dtype=np.float32)[z if axis == 2 else slice(None)]
        i = np.minimum(t.astype(int), field.shape[axis] - 2)
        w = (t - i).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(3)])
        low = np.take(field, i, axis)
        field = low + w * (np.take(field, i + 1, axis) - low)
    return field


def coarse_noise(rng, extent, scale):
    """Noise correlated over `scale` mm on a grid just fine enough for it, to be upsampled. extent: mm of the volume."""
    return smooth_noise(rng, [max(4, int(np.ceil(e / scale * 2)) + 1) for e in extent], 1.0)


# A shape is a list of (low corner, high corner, distance): distance(x, y, z) is in mm, negative inside.


def ball(centre, radii, turn=(0, 0, 0)):
    """Ellipsoid; turn: degrees about x, y, z."""
    R, r, c = Rotation.from_euler("xyz", turn, degrees=True).as_matrix(), np.asarray(radii, float), np.asarray(centre, float)
    half = np.sqrt((R * r) ** 2 @ np.ones(3))
    A, c32 = (R / r).T.astype(np.float32), c.astype(np.float32)

    def distance(x, y, z):
        x, y, z = x - c32[0], y - c32[1], z - c32[2]
        q = [A[i, 0] * x + A[i, 1] * y + A[i, 2] * z for i in range(3)]
        k0 = np.sqrt(q[0] ** 2 + q[1] ** 2 + q[2] ** 2)
        k1 = np.sqrt(sum((q[i] * np.float32(1 / r[i])) ** 2 for i in range(3)))
        return k0 * (k0 - 1) / (k1 + np.float32(1e-6))  # Quilez, "ellipsoid SDF": exact to first order at the surface
    return [(c - half, c + half, distance)]


def segment(a, b, ra, rb):
    """Rod from a to b whose radius goes from ra to rb."""
    a, ab = np.asarray(a, np.float32), np.asarray(b, np.float32) - np.asarray(a, np.float32)
    ra, slope, ab2 = np.float32(ra), np.float32(rb - ra), np.float32(ab @ ab + 1e-6)
    r, b = max(ra, rb), a + ab

    def distance(x, y, z):
        x, y, z = x - a[0], y - a[1], z - a[2]
        t = np.clip((x * ab[0] + y * ab[1] + z * ab[2]) / ab2, 0, 1)
        return np.sqrt((x - t * ab[0]) ** 2 + (y - t * ab[1]) ** 2 + (z - t * ab[2]) ** 2) - (ra + t * slope)
    return [(np.minimum(a, b) - r, np.maximum(a, b) + r, distance)]


def tube(points, radii, beads=0.0):
    """Bent tube through `points` (a spline); radii: one, or one a point; beads: depth of the pinches along it (haustra)."""
    points = np.asarray(points, float)
    n, t = len(points), np.linspace(0, 1, 1 + 4 * (len(points) - 1))
    path = make_interp_spline(np.linspace(0, 1, n), points, k=min(3, n - 1))(t)
    r = np.interp(t, np.linspace(0, 1, n), np.broadcast_to(radii, n)) * (1 - beads * (np.arange(len(t)) % 2))
    return [s for i in range(len(t) - 1) for s in segment(path[i], path[i + 1], r[i], r[i + 1])]


def tree(rng, start, heading, radius, thinnest, length=28.0):
    """Vessels that fork until they are thinner than `thinnest` mm."""
    if radius < thinnest:
        return []
    heading = heading / np.linalg.norm(heading)
    end = start + heading * length * rng.uniform(0.7, 1.2)
    rods = segment(start, end, radius, radius * 0.8)
    for _ in range(2):
        rods += tree(rng, end, heading + rng.normal(0, 0.55, 3), radius * rng.uniform(0.62, 0.82), thinnest, length * 0.82)
    return rods


# ---------------------------------------------------------------- the trunk


def slices_of(axes, low, high):
    """Index slices of the voxels between two corners (mm), or None where there are none. axes: three ascending arrays."""
    cut = [slice(*np.searchsorted(a, (l, h))) for a, l, h in zip(axes, low, high)]
    return tuple(cut) if all(c.stop > c.start for c in cut) else None


def paint(s, shape, hu, code=None, inside=False, texture=6.0):
    """Blend a shape into the slab `s`, edges one voxel wide. hu: a number or a function of (distance, points, texture).

    code: written into the label where more than half of the voxel is inside. inside: cut at the wall of the belly.
    """
    low = np.min([p[0] for p in shape], 0) - s.margin
    high = np.max([p[1] for p in shape], 0) + s.margin
    box = slices_of(s.axes, low, high)
    if box is None:
        return
    axes = [a[b] for a, b in zip(s.axes, box)]
    points = [c[box] for c in s.points]
    d = np.full(points[0].shape, 99, np.float32)
    for low, high, distance in shape:
        sub = slices_of(axes, low - s.margin, high + s.margin)
        if sub:
            np.minimum(d[sub], distance(*(c[sub] for c in points)), out=d[sub])
    if inside:
        np.maximum(d, s.wall[box], out=d)
    blend(s, box, d, hu, code, texture, points)


def blend(s, box, d, hu, code, texture, points):
    """Write distance `d` of the voxels in `box` into the slab's HU and label."""
    share = np.clip(0.5 - d / s.width, 0, 1)  # of the voxel that the shape fills
    value = hu(d, points, s.texture[box]) if callable(hu) else hu + texture * s.texture[box]
    s.hu[box] += share * (value - s.hu[box])
    if code is not None:
        s.label[box][share > 0.5] = code


def bone_hu(spongy, cortical, thick):
    """HU of bone by depth: a cortical shell `thick` mm around spongy bone."""
    return lambda d, points, tex: spongy + 45 * tex + (cortical - spongy) * np.clip(1.3 + d / thick, 0, 1)


def hollow_hu(wall, content, gas_level, thick, mottle=8.0):
    """HU of a hollow organ: wall, content, and gas in front of the level y (the patient lies on the back)."""
    def hu(d, points, tex):
        inner = np.where(points[1] > gas_level, np.float32(-930), content + mottle * tex)
        return wall + 5 * tex + (inner - wall) * np.clip(-d / thick - 0.3, 0, 1)
    return hu


def contrast_phase(rng):
    """HU of each tissue at one moment after the injection: so the organs' ranges overlap between patients."""
    t = rng.uniform(0, 3)  # 0 none, 1 arterial, 2 portal venous, 3 late
    curves = dict(liver=(55, 68, 112, 92), spleen=(48, 115, 118, 92), cortex=(34, 175, 185, 140), medulla=(30, 75, 150, 150),
                  aorta=(42, 290, 155, 115), cava=(40, 75, 145, 115), pancreas=(40, 98, 92, 75), muscle=(50, 54, 60, 60),
                  gut=(38, 75, 80, 65), gland=(25, 70, 75, 55), portal=(42, 85, 165, 115), prostate=(38, 60, 75, 75))
    hu = {k: float(np.interp(t, range(4), v) + rng.normal(0, 5)) for k, v in curves.items()}
    hu["liver"] -= float(rng.choice([0, 0, 0, 25]))  # fatty liver
    return SimpleNamespace(**hu, bile=rng.uniform(0, 18), urine=rng.uniform(-2, 16) + 200 * (t > 2.7))


def moved(rng, points, sd=3.0):
    """The same organ where another patient has it: all points moved together by `sd` mm, and each a little."""
    points = np.asarray(points, float)
    return points + rng.normal(0, sd, 3) + rng.normal(0, sd / 3, points.shape)


def muscles_and_bones(rng, width, flesh):
    """What lies under the organs: list of (shape, hu, code). The spine and the ribs repeat: `paint_spine`."""
    bone = bone_hu(rng.uniform(120, 260), rng.uniform(600, 1000), max(3.0, 0.7 * width))
    soft, hard = [], [ball((0, -66, -118), (46, 17, 46), (-22, 0, 0)), tube([[0, 88, 150], [0, 96, 210], [0, 84, 275]], [8, 8, 11])]
    for m in (-1, 1):  # left, right
        soft += [tube(moved(rng, [[35 * m, -42, 40], [42 * m, -36, -40], [62 * m, 0, -110], [88 * m, 12, -190]], 2), [9, 19, 19, 13]),
                 tube([[33 * m, -78, -120], [36 * m, -80, 60], [30 * m, -84, 360]], [22, 25, 18])]
        soft += [ball(moved(rng, [x * m, y, z]), r) for x, y, z, r in (
            (95, -52, -140, (48, 34, 62)), (112, 30, -170, (30, 36, 50)), (60, 15, -205, (42, 40, 32)), (68, 6, -158, (14, 44, 30)))]
        hard += [ball((92 * m, -30, -92), (7.5, 58, 46), (0, 24 * m, 28 * m)), ball((88 * m, 2, -172), (25, 25, 25)),
                 tube([[92 * m, -14, -120], [86 * m, -8, -160], [70 * m, -28, -205]], [15, 17, 12]),
                 tube([[72 * m, 22, -175], [38 * m, 52, -184], [7 * m, 58, -196]], [10, 7, 9]),
                 tube([[98 * m, 0, -178], [122 * m, -4, -196], [128 * m, -6, -230]], [16, 15, 15]),
                 ball((98 * m, -84, 270), (42, 5, 58), (0, 0, 18 * m))]
    return [(s, flesh, MUSCLE) for s in soft] + [(s, bone, BONE) for s in hard]


def organs(rng, width):
    """The soft organs of one patient: list of (shape, hu, code, inside) in the order in which they are painted.

    width: mm of a voxel: an organ thinner than that is thickened until it is there.
    """
    v, parts, near = contrast_phase(rng), [], functools.partial(moved, rng)
    kidney = lambda d, points, tex: v.medulla + 14 * tex + (v.cortex - v.medulla) * np.clip(1.6 + d / 5, 0, 1)  # noqa: E731

    def size(r, sd=0.08):
        return np.maximum(np.asarray(r, float) * np.exp(rng.normal(0, sd)), 0.8 * width)

    def add(shape, hu, code=None, inside=False):
        parts.append((shape, hu, code, inside))

    def gut(content, gas):
        return hollow_hu(v.gut, content, gas, max(2.5, width / 2), mottle=60 if content < 10 else 10)

    # -- chest --
    heart = near([-20, 26, 168], 4)
    add(ball(heart, size([54, 43, 46]), (20, -35, 25)), v.muscle + 12, MEDIASTINUM)
    for c, r in (((-34, 22, 158), (26, 20, 24)), ((18, 34, 170), (24, 22, 26)), ((-8, 2, 190), (28, 16, 18))):
        add(ball(heart + np.subtract(c, (-20, 26, 168)), size(r)), v.cava + rng.normal(25, 15), VESSEL)
    add(tube(near([[-12, 38, 195], [-16, 30, 222], [0, 8, 228], [42, -4, 220]], 2), size([15, 14, 12, 9])), v.aorta, VESSEL)
    add(tube(near([[-16, 28, 222], [-40, 0, 226], [-50, -12, 222]], 2), size([13, 11, 9])), v.aorta, VESSEL)
    add(tube(near([[26, 14, 190], [27, 12, 240], [22, 14, 300]], 2), size(9)), v.cava, VESSEL)
    for side in (-1, 1):
        add(tube(near([[6 * side, 8, 275], [16 * side, 8, 310], [28 * side, 0, 350]], 2), size(6)), v.aorta, VESSEL)
        for aim in ((1, 0.2, -0.9), (1, 0.9, -0.1), (0.8, -0.7, -0.5), (0.7, 0.1, 1)):
            vessels = tree(rng, np.array([44 * side, -4, 220.]), np.array([aim[0] * side, *aim[1:]]), 5.5, max(0.9, 0.28 * width))
            add(vessels, 45, None)
    # -- bowel --
    for _ in range(9):
        walk = np.cumsum(rng.normal(0, 30, (9, 3)) * (1, 0.6, 0.9), 0)
        walk = (walk - walk.mean(0)) / (walk.std(0) + 1e-6) * (46, 20, 30) + (*rng.uniform((-30, 0), (30, 46)), rng.uniform(-100, -40))
        add(tube(walk, size(11)), gut(rng.uniform(10, 40), rng.choice([200, 66])), CAVITY, True)
    colon = [[88, 8, -105], [104, 0, -60], [106, 0, -10], [98, 28, 22], [55, 66, 4], [0, 74, -12], [-55, 62, 12], [-98, 18, 52],
             [-110, -10, 20], [-110, -12, -40], [-98, 4, -88], [-60, 6, -118], [-18, -18, -122]]
    add(tube(near(colon, 4), size([23, 24, 22, 21, 18, 18, 18, 17, 15, 14, 14, 14, 13], 0.15), 0.16),
        gut(rng.uniform(-90, 30), rng.uniform(10, 70)), CAVITY, True)
    add(tube(near([[-15, -30, -122], [2, -50, -150], [0, -42, -190], [0, -42, -225]]), size([12, 17, 17, 11])),
        gut(rng.uniform(-120, 20), rng.uniform(-48, 0)), CAVITY)
    # -- the labelled organs --
    liver = near([84, 2, 80], 4)
    add(ball(liver, size([66, 76, 68]), (0, 25, 0)) + ball(liver + (-62, 34, 24), size([66, 36, 30], 0.15), (0, 12, 0)),
        v.liver, LIVER, True)
    for aim in ((1, -0.3, 0.4), (1, 0.5, -0.3), (-1, 0.8, 0.5)):
        add(tree(rng, liver + (-36, 4, -8), np.array(aim), 5.5, max(1.4, 0.3 * width), 24), v.portal, None, True)
    add(ball(near([-104, -36, 92], 4), size([27, 47, 52], 0.18), (15, 12, -28)), v.spleen, SPLEEN, True)
    stomach = near([[-66, -14, 122], [-74, 12, 100], [-70, 38, 72], [-42, 56, 46], [-2, 56, 42], [26, 44, 50]], 4)
    add(tube(stomach, size([30, 35, 31, 24, 18, 13], 0.14)),
        hollow_hu(v.gut, float(rng.choice([5, 25, 120])), rng.uniform(30, 62), max(4, width / 2)), STOMACH, True)
    for side, code in ((1, R_KIDNEY), (-1, L_KIDNEY)):
        c = near([66 * side, -44, 16 - 9 * side], 4)
        add(ball(c, size([28, 25, 53], 0.1), (12, -9 * side, 20 * side)), kidney, code)
        add(ball(c - (15 * side, -6, 0), size([13, 9, 24]), (12, -9 * side, 20 * side)), -70, CAVITY)
        add(tube([c - (10 * side, -4, 0), c - (30 * side, -8, 4)], 5), v.medulla, VESSEL)
        top = c + (-20 * side, 6, 60)
        r = max(3.6, 0.72 * width)
        add(tube([top + (0, 4, 3), top + (5 * side, -14, -10)], r) + tube([top + (0, 4, 3), top + (-8 * side, -13, -7)], r)
            + tube([top + (0, 4, 3), top + (1 * side, 10, 0)], r), v.gland, code + R_ADRENAL - R_KIDNEY)
    add(tube(near([[40, 16, 10], [37, 22, 26], [16, 30, 36], [-16, 26, 46], [-48, 6, 58], [-78, -12, 68]], 3),
             size([13, 14, 9, 10, 9, 7], 0.12)), v.pancreas, PANCREAS)
    add(tube(near([[28, 46, 50], [50, 34, 46], [58, 22, 18], [50, 10, -12], [18, 8, -26], [-18, 10, -20], [-34, 22, 4]], 3),
             size([12, 12, 12, 12, 11, 10, 10], 0.1)), gut(rng.uniform(10, 35), rng.choice([200, 28])), DUODENUM)
    add(tube(near([[19, -12, -72], [20, -12, 0], [20, -8, 70], [22, 2, 118], [22, 10, 150]], 2), size([10, 11, 12, 12, 13])),
        v.cava, POSTCAVA)
    aorta = near([[-9, -17, -72], [-10, -16, 0], [-8, -17, 60], [-14, -24, 120], [-24, -34, 180], [-28, -34, 240], [-22, -12, 268],
                  [0, 18, 272], [14, 34, 245], [6, 34, 205]], 2)
    add(tube(aorta, size([9, 10, 11, 12, 12.5, 12.5, 13, 14, 15, 15], 0.12)), v.aorta, AORTA)
    for side in (-1, 1):
        add(tube([aorta[0], [28 * side, -8, -105], [52 * side, 12, -150], [62 * side, 42, -200]], size([7, 6.5, 6, 6])), v.aorta, VESSEL)
        add(tube([[19, -14, -72], [36 * side, -16, -105], [58 * side, 4, -150], [66 * side, 36, -200]], size(7)), v.cava, VESSEL)
    for _ in range(rng.integers(0, 7)):  # calcified plaques of the aorta's wall
        angle = rng.uniform(0, 2 * np.pi)
        at = aorta[rng.integers(0, 4)] + (11 * np.cos(angle), 11 * np.sin(angle), rng.normal(0, 10))
        add(ball(at, rng.uniform(1.5, 4, 3)), rng.uniform(350, 700))
    add(tube([[-40, 4, 112], *near([[-14, -8, 122], [-8, -18, 160], [-6, -26, 220], [-3, -26, 300], [0, -22, 400]], 2)], size(8.5)),
        hollow_hu(v.gut, float(rng.choice([-400, 20, 40])), 200, 4), ESOPHAGUS)
    add(tube(near([[44, 34, 56], [54, 50, 40], [60, 60, 24]]), size([7, 13, 15], 0.15)), v.bile, GALL)
    bladder, female = near([0, 26, -152], 4), rng.random() < 0.5
    add(ball(bladder, size([38, 30, 26], 0.18)), lambda d, p, tex: v.urine + 4 * tex + 30 * np.clip(1.2 + d / 3, 0, 1), BLADDER)
    add(ball(bladder + ((0, -38, 12) if female else (0, -14, -36)), size([27, 20, 27] if female else [25, 20, 18], 0.12)),
        v.prostate, PROSTATE)
    # -- airways --
    add(tube([[0, -8, 400], [0, -8, 300], [2, -12, 242]], [9, 9, 9]) + tube([[2, -12, 242], [24, -12, 224], [46, -10, 212]], 6.5)
        + tube([[2, -12, 242], [-26, -14, 222], [-48, -12, 210]], 6), -960, MEDIASTINUM)
    return parts


def ring(x, y, a, b):
    """About the distance (mm) to a rounded box of half axes a, b: midway between an ellipse and a squarer one."""
    u, v = (x / a) ** 2, (y / b) ** 2
    return (0.5 * (np.sqrt(u + v) + np.sqrt(np.sqrt(u * u + v * v))) - 1) * np.minimum(a, b)


def paint_body(s, p):
    """Fill the slab `s` from outside in: air, table, skin, fat, muscle, belly, lungs. Sets s.belly and s.wall: mm to the ends of the belly with, without the lungs."""
    x, y, z = s.points
    level = s.axes[2]
    heights = np.array([(-230, 152, 98), (-150, 152, 98), (-40, 136, 92), (60, 142, 98), (200, 142, 104), (300, 134, 96), (370, 95, 70)])
    a, b = (np.interp(level, heights[:, 0], h).astype(np.float32) * k for h, k in ((heights[:, 1], p.broad), (heights[:, 2], p.deep)))
    envelope = ring(x, y, a, b)  # of the muscles
    skin = ring(x, y - p.belly, a + p.fat, b + p.fat * p.fat_depth)
    d_table = np.abs(y - np.float32(p.table) - 0.0012 * x * x) - 5
    np.maximum(d_table, np.abs(x) - 190, out=d_table)
    cover = functools.partial(blend, s, (slice(None),) * 3, points=s.points)
    cover(d_table, lambda d, _, tex: -160 - 700 * np.clip(-d / 3, 0, 1), None, 0)
    cover(skin, lambda d, _, tex: -104 + 8 * tex + 135 * np.clip(1 + d / 2.5, 0, 1), FAT, 0)
    cover(envelope, lambda d, _, tex: p.muscle + 10 * tex - 40 * np.exp(-((d + 6) / 1.2) ** 2), MUSCLE, 0)
    belly = envelope + 13
    cover(belly, lambda d, _, tex: -98 + 14 * tex, CAVITY, 0)
    # Two lungs on the domes of the diaphragm, deeper behind; they end in the apex.
    dome = p.dome - 58 * ((np.abs(x) - 64) / 78) ** 2 - 62 * ((y - 16) / 92) ** 2 + 5 * np.sign(x)
    lung = np.maximum(belly + 2 + 45 * np.clip((z - 270) / 70, 0, None) ** 2, (dome - z) * 0.75)
    thorax = np.maximum(np.maximum(belly, (dome - 10 - z) * 0.75), np.abs(x) - 60)
    s.label[(thorax < 0) & (z > 115)] = MEDIASTINUM
    lung = np.maximum(lung, p.mediastinum - np.abs(x + 4) + 0.07 * np.abs(z - 200) - 0.12 * np.abs(y - 8))
    cover(lung, lambda d, _, tex: p.lung + 26 * tex - 0.9 * y, LUNG, 0)
    s.belly, s.wall = belly, np.maximum(belly, 2 - lung)


def paint_spine(s, p):
    """Vertebrae, discs, canal and ribs: periodic along z."""
    box = slices_of(s.axes, (-60 - s.margin[0], -150, -95), (60 + s.margin[0], 20, 500))
    if box:
        x, y, z = points = [c[box] for c in s.points]
        y = y + 50 - 7 * np.sin((z + 50) / 70)
        t = (z + p.spine) % 34 - 17
        body = ring(x, y, np.float32(23), np.float32(17)) + 1.2 * np.cos(t / 5)
        hu = bone_hu(p.marrow, p.cortex, max(2.5, 0.6 * s.width))
        blend(s, box, body, 85, BONE, 8, points)
        arch = np.abs(np.sqrt(x * x + (y + 27) ** 2) - 12.5) - 3.5
        spinous = np.maximum(np.abs(x) - 4, np.abs(y + 50) - 14)
        across = np.maximum(np.maximum(np.abs(y + 27 - 0.1 * np.abs(x)) - 5, np.abs(x) - 40), 12 - np.abs(x))
        blend(s, box, np.sqrt(x * x + (y + 27) ** 2) - 9.5, 25, MUSCLE, 5, points)
        d = np.minimum(np.maximum(body, np.abs(t) - 12.5), np.maximum(np.minimum(arch, spinous), np.abs(t + 3) - 10))
        blend(s, box, np.minimum(d, np.maximum(across, np.abs(t) - 6)), hu, BONE, 0, points)
    box = slices_of(s.axes, (-200, -140, -20), (200, 140, 360))
    if box:
        x, y, z = points = [c[box] for c in s.points]
        phase = (z + 0.5 * y + p.spine) % 30 - 15  # ribs run downward to the front
        d = np.maximum(np.abs(s.belly[box]) - 4.5, np.abs(phase) - 6.5)
        d = np.maximum(d, 22 + 0.75 * (y + 85) - z)  # and end at the costal margin
        hu = bone_hu(p.marrow, p.cortex * 0.8, max(2.0, 0.6 * s.width))
        blend(s, box, d, hu, BONE, 0, points)


def trunk(rng, shape, spacing, levels):
    """One patient from prostate to apex: (hu float32, tissue uint8), both [X, Y, Z] in RAS+, without noise.

    spacing: mm of a voxel. levels: z of the standard patient (mm) at the bottom and top of the volume; in plane the body
    fills most of the field of view. Tissue: 1-15 AMOS's organs, then BONE, LUNG, MUSCLE, FAT, CAVITY, MEDIASTINUM, VESSEL.
    """
    p = SimpleNamespace(
        broad=rng.uniform(0.95, 1.05), deep=rng.uniform(0.94, 1.06), fat=rng.uniform(7, 32), fat_depth=rng.uniform(0.7, 1.2),
        belly=rng.uniform(-4, 6), dome=rng.uniform(118, 140), mediastinum=rng.uniform(24, 32), muscle=rng.uniform(45, 65),
        lung=rng.uniform(-870, -780), spine=rng.uniform(0, 34), marrow=rng.uniform(120, 260), cortex=rng.uniform(550, 900))
    p.table = -(98 * p.deep + p.fat * p.fat_depth) + p.belly - 9
    # The standard patient's millimetres at every voxel: the field of view holds the body, and a field bends it.
    reach = 2 * (154 * p.broad + p.fat + 16) * rng.uniform(1.0, 1.1)
    extent = np.array([reach, reach * shape[1] * spacing[1] / (shape[0] * spacing[0]), levels[1] - levels[0]])
    middle = np.array([rng.normal(0, 4), 0.5 * p.belly - 8 + rng.normal(0, 4), np.mean(levels)])
    axes = [(m + e * ((np.arange(n) + 0.5) / n - 0.5)).astype(np.float32) for m, e, n in zip(middle, extent, shape)]
    bends = [sum(mm * upsample(coarse_noise(rng, extent, scale), nodes) for mm, scale in ((5.0, 70.), (2.2, 28.), (0.8, 11.)))
             for nodes in [[int(e / 6) + 2 for e in extent]] for _ in range(3)]
    roll = np.sin(rng.normal(0, 0.03))
    fine, coarse = coarse_noise(rng, extent, 5.0), coarse_noise(rng, extent, 16.0)
    width = float(max(extent[0] / shape[0], 0.7 * extent[2] / shape[2]))
    below, above = muscles_and_bones(rng, width, p.muscle), organs(rng, width)
    hu, tissue = np.full(shape, -1000, np.float32), np.zeros(shape, np.uint8)
    step = max(4, 4_000_000 // (shape[0] * shape[1]))
    for z0 in range(0, shape[2], step):  # slab by slab: memory stays small, and near the cache
        z = slice(z0, min(z0 + step, shape[2]))
        x, y = axes[0][:, None, None], axes[1][None, :, None]
        u = [upsample(b, shape, z) for b in bends]
        s = SimpleNamespace(hu=hu[:, :, z], label=tissue[:, :, z], axes=[axes[0], axes[1], axes[2][z]], width=width,
                            points=[u[0] + (x - roll * y), u[1] + (y + roll * x), u[2] + axes[2][z]])
        s.margin = np.array([float(np.abs(c - a).max()) for c, a in zip(s.points, (x, y, axes[2][z]))]) + width
        s.texture = 0.75 * upsample(fine, shape, z) + 0.65 * upsample(coarse, shape, z)
        paint_body(s, p)
        for part in below:
            paint(s, *part)
        paint_spine(s, p)
        for part in above:
            paint(s, *part)
    return hu, tissue


def abdomen(rng, shape, spacing):
    """An abdominal CT without noise: (HU float32, label uint8 0-15 as ORGANS), both [X, Y, Z] in RAS+; all 15 are there."""
    hu, tissue = trunk(rng, shape, spacing, np.add(ABDOMEN, rng.normal(0, 3, 2)))
    return hu, np.where(tissue < len(ORGANS), tissue, 0).astype(np.uint8)


def chest(rng, shape, spacing):
    """A chest CT without noise: (HU float32, lung bool), both [X, Y, Z] in RAS+."""
    hu, tissue = trunk(rng, shape, spacing, np.add(CHEST, rng.normal(0, 5, 2)))
    return hu, tissue == LUNG


# ---------------------------------------------------------------- brain

# Signal of each tissue in t1n, t1c, t2w, t2f, of white matter's in t1n about 0.8.
SIGNAL = dict(fluid=(0.20, 0.20, 1.00, 0.14), grey=(0.52, 0.55, 0.60, 0.62), white=(0.80, 0.80, 0.42, 0.46),
              nuclei=(0.63, 0.66, 0.50, 0.54), vessel=(0.30, 1.10, 0.15, 0.20), oedema=(0.52, 0.53, 0.82, 0.95),
              enhancing=(0.55, 1.15, 0.66, 0.72), necrosis=(0.33, 0.36, 0.90, 0.42))


def brain(rng, shape, spacing):
    """Four contrasts of one brain with a tumour: (dict contrast -> float32, seg uint8), all [X, Y, Z] in RAS+.

    Skull-stripped: exactly 0 outside. seg as in BraTS 2023: 1 necrotic core, 2 oedema, 3 enhancing tumour.
    """
    extent = np.multiply(shape, spacing)
    fit = min(1.0, *(extent / (152, 184, 146))) * np.exp(rng.normal(-0.04, 0.02))
    axes = [((np.arange(n) + 0.5) / n - 0.5) * e / fit + c for n, e, c in zip(shape, extent, rng.normal((0, 0, -6), 1))]
    noise = lambda mm: upsample(coarse_noise(rng, extent / fit, mm), shape)  # noqa: E731
    tilt = Rotation.from_euler("xyz", rng.normal(0, 4, 3), degrees=True).as_matrix()
    grid = np.meshgrid(*(a.astype(np.float32) for a in axes), indexing="ij", sparse=True)
    q = [sum(np.float32(t) * g for t, g in zip(row, grid)) + 3.0 * noise(50.) + 1.2 * noise(20.) for row in tilt]
    x, y, z = q
    width = float(max(np.divide(spacing, fit)))
    far = lambda s: functools.reduce(np.minimum, (f(*q) for _, _, f in s))  # noqa: E731
    # -- surfaces: mm, positive inside the brain; a sulcus is where a band-limited noise is zero --
    cerebrum = -far(ball((0, 0, 12), (67, 83, 54)) + ball((44, 12, -26), (22, 42, 20)) + ball((-44, 12, -26), (22, 42, 20)))
    fold = 4.6 * np.abs(noise(8.5)) + 0.9 * np.clip(cerebrum - rng.uniform(18, 25), 0, None)
    cleft = np.abs(x) - 0.6 + 0.9 * np.clip(cerebrum - 38, 0, None)
    rind = np.minimum(np.minimum(cerebrum, fold - 0.9), cleft - 0.8)
    cerebellum = -far(ball((26, -46, -36), (28, 32, 24)) + ball((-26, -46, -36), (28, 32, 24)))
    folia = 2.2 * (1.1 + np.sin((z + 0.35 * y) * (2 * np.pi / max(5.0, 2.6 * width)) + 0.5 * x / 10))
    stem = -far(tube([[0, -10, 4], [0, -16, -30], [0, -24, -75]], [17, 14, 9]))
    # -- tissues, from outside in --
    out = np.zeros((4, *shape), np.float32)

    def cover(depth, tissue):
        share = np.clip(0.5 + depth / width, 0, 1)
        for image, signal in zip(out, SIGNAL[tissue]):
            image += share * (signal * levels[tissue] - image)
    levels = {t: np.exp(rng.normal(0, 0.05)) for t in SIGNAL}
    inside = np.maximum(np.maximum(cerebrum, cerebellum), stem)
    cover(inside + 1, "fluid")
    cover(np.minimum(cerebellum, folia - 0.5), "grey")
    cover(np.minimum(cerebellum - 6, folia - 1.6), "white")
    cover(rind, "grey")
    cover(rind - rng.uniform(2.6, 3.4), "white")
    cover(stem, "white")
    for side in (-1, 1):
        wide = rng.uniform(0.8, 1.5)
        cover(-far(ball((12 * side, -14, 8), (10, 15, 10))), "nuclei")  # thalamus
        cover(-far(ball((25 * side, 6, 8), (6, 18, 12), (0, 0, 12 * side))), "nuclei")  # putamen
        cover(-far(tube([[12 * side, 30, 14], [17 * side, 8, 26], [20 * side, -16, 26]], [7, 5, 3])), "nuclei")  # caudate
        cover(-far(tube([[7 * side, 34, 14], [8 * side, 10, 24], [14 * side, -20, 24], [26 * side, -38, 8], [34 * side, -14, -14]],
                        np.multiply([4, 6, 6.5, 5, 2.5], wide))), "fluid")  # lateral ventricle
    cover(-far(ball((0, -12, 4), (2.6, 13, 10)) + ball((0, -34, -34), (6, 6, 9))), "fluid")  # third, fourth
    sinus = [[0, 74, 34], [0, 30, 66], [0, -30, 64], [0, -76, 26], [0, -72, 4]]
    cover(np.minimum(-far(tube(sinus, 3.2)), inside + 1), "vessel")
    # -- tumour: in the white matter, its oedema follows the white matter --
    white = np.argwhere((rind > 6) & (cerebrum > 18) & (z > -5))
    at = white[rng.integers(len(white))]
    r, ragged = rng.uniform(9, 19), noise(9.)
    core = r * (1 + 0.22 * ragged) - np.sqrt(sum((c - c[tuple(at)]) ** 2 for c in q))
    oedema = np.minimum(core + rng.uniform(7, 18) * (0.8 + 0.45 * noise(14.)), np.maximum(rind - 2.5, core))
    dead = core - max(rng.uniform(2.5, 5), 1.1 * width) * (1 + 0.25 * noise(6.))
    oedema, core, dead = (np.minimum(d, inside) for d in (oedema, core, dead))
    seg = np.zeros(shape, np.uint8)
    for depth, tissue, code in ((oedema, "oedema", 2), (core, "enhancing", 3), (dead, "necrosis", 1)):
        cover(depth, tissue)
        seg[depth > 0] = code
    # -- scanner: texture, bias field, Rician noise --
    fine = 0.02 * noise(5.)
    for i, image in enumerate(out):
        image *= np.exp(0.12 * noise(90.)) * (1 + fine)
        sd = rng.uniform(0.012, 0.03)
        n = [sd * smooth_noise(rng, shape, 0.5) for _ in range(2)]
        image[:] = np.sqrt((image + n[0]) ** 2 + n[1] ** 2) * rng.uniform(300, 1500)
    out = np.where(inside > -1, np.maximum(out, 1), 0)
    return dict(zip(CONTRASTS, out)), np.where(inside > -1, seg, 0).astype(np.uint8)


# ---------------------------------------------------------------- lesions, nodules, opacities


def lump(rng, q, radius, lobes=0.0, spikes=0, reach=0.6):
    """Distance (mm, negative inside) to a lump about the origin of `q` (x, y, z in mm).

    lobes: relative depth of its bulges. spikes: number of spicules, which reach `reach` radii out.
    """
    r = np.sqrt(q[0] ** 2 + q[1] ** 2 + q[2] ** 2) + 1e-3
    unit, edge = [c / r for c in q], np.ones_like(r)
    for _ in range(5 if lobes else 0):
        v, phase = rng.normal(0, 2.3, 3), rng.uniform(0, 2 * np.pi)
        edge += lobes * np.cos(sum(a * c for a, c in zip(unit, v)) + phase)
    for _ in range(spikes):
        v = rng.normal(size=3)
        along = np.clip(sum(a * c for a, c in zip(unit, v / np.linalg.norm(v))), 0, None)
        edge += reach * rng.uniform(0.6, 1.3) * along ** 40
    return r - radius * edge


def lesion(rng, kind, hu, spacing, centre):
    """Paint a lesion of type `kind` (1-8, see LESIONS) into `hu` [X, Y, Z] at voxel `centre`; returns its mask.

    The types differ in shape, margin and texture; the mean HU is drawn from the same range for all.
    """
    w, base = float(np.mean(spacing[:2])), rng.uniform(25, 85)
    R = rng.uniform(14, 23) * (1.2 if kind in (2, 3, 8) else 1)
    reach = 2.4 * R + 2 * max(spacing)
    box = tuple(slice(max(0, int(c - reach / m)), int(c + reach / m) + 2) for c, m in zip(centre, spacing))
    n = hu[box].shape
    q = np.meshgrid(*((np.arange(b.start, b.start + k) - c) * m for b, k, c, m in zip(box, n, centre, spacing)),
                    indexing="ij", sparse=True)
    turn = Rotation.random(random_state=rng).as_matrix()
    q = [sum(t * c for t, c in zip(row, q)).astype(np.float32) for row in turn]
    shift = lambda v: [c - k for c, k in zip(q, v)]  # noqa: E731
    union = lambda ds: functools.reduce(np.minimum, ds)  # noqa: E731
    tex = smooth_noise(rng, [max(k, 4) for k in n], 1.2)[:n[0], :n[1], :n[2]]
    soft, value = w, base + 6 * tex
    if kind == 1:  # eats the bone, with a dense rim
        d = lump(rng, q, R, 0.08)
        value = base - 170 + 50 * tex + 330 * np.exp(-((d + 3) / max(2.5, 0.7 * w)) ** 2)
    elif kind == 2:  # a clump of nodes
        d = union(lump(rng, shift(v), 0.62 * R) for v in rng.normal(0, 0.5 * R, (5, 3)))
    elif kind == 3:  # a chain of oval nodes with fat in their hila
        d = union(lump(rng, [c / k for c, k in zip(shift((t * R, *rng.normal(0, 3, 2))), (1, 0.8, 0.7))], 0.62 * R)
                  for t in (-1, 0.1, 1.1))
        value = base + 25 + 6 * tex - 110 * np.clip(-d / (0.3 * R) - 0.6, 0, 1)
    elif kind == 4:  # no clear margin, a target: brighter ring, dark centre
        d, soft = lump(rng, q, R, 0.05), 0.7 * R
        value = base - 45 + 8 * tex + 75 * np.exp(-((d + 0.35 * R) / (0.18 * R + 0.4 * w)) ** 2)
    elif kind == 5:  # spicules and small holes
        d = lump(rng, q, 0.8 * R, 0.08, 18, 0.9)
        value = base + 15 - 260 * np.clip(tex - 0.9, 0, 1)
    elif kind == 6:  # a cyst: round, sharp, thin wall, a septum
        d, soft = lump(rng, q, R), 0.8 * w
        value = base - 35 + 3 * tex + 90 * (np.exp(-((d + 1.5) / max(2, 0.6 * w)) ** 2) + np.exp(-(q[0] / max(1.5, 0.5 * w)) ** 2))
    elif kind == 7:  # spreads between the fibres of a muscle
        d = lump(rng, [c / k for c, k in zip(q, (1.5, 1.1, 0.6))], R, 0.12) * 0.7
        value = base + 55 * np.sin(q[2] * (2 * np.pi / max(7, 3 * w))) + 15 * tex
    else:  # thick wall, two layers of fluid, chalk
        d = lump(rng, q, R, 0.1)
        settled = np.arange(n[1])[None, :, None] + box[1].start < centre[1]  # the patient lies on the back
        value = base + np.where(settled, 40, -45) + 70 * np.clip(1.5 + d / max(3, 0.9 * w), 0, 1) + 350 * (tex > 2.2)
    share = np.clip(0.5 - d / soft, 0, 1)
    hu[box] += share * (value - hu[box])
    mask = np.zeros(hu.shape, bool)
    mask[box] = share > 0.5
    return mask


def nodule(rng, malignant, sizes=(28,)):
    """A nodule in 28 mm of lung, uint8 [n, n, n] for each n of `sizes`: 0-255 is -1000 to 400 HU.

    Benign: smooth, sharp, often with chalk. Malignant: lobes, spicules, uneven. Size and brightness do not tell them apart.
    """
    tones, seeds = rng.uniform(0, 1, 12), rng.integers(1 << 31, size=2)
    field, R = [smooth_noise(rng, (30, 30, 30), s) for s in (1.3, 3.0)], rng.uniform(3.8, 7.5) * (0.9 if malignant else 1.0)
    vessels = [segment(rng.uniform(-18, 18, 3), rng.uniform(-18, 18, 3), *rng.uniform(0.6, 1.8, 2)) for _ in range(rng.integers(3, 8))]
    side = rng.normal(size=3)
    side /= np.linalg.norm(side)
    images = []
    for n in sizes:
        shape_rng, noise_rng = (np.random.default_rng(s) for s in (seeds[0], (seeds[1], n)))
        axis = ((np.arange(n) + 0.5) / n - 0.5).astype(np.float32) * 28
        q, w = np.meshgrid(axis, axis, axis, indexing="ij"), 28 / n
        fine, coarse = (upsample(f, (n, n, n)) for f in field)
        hu = -900 + 160 * tones[0] + 25 * coarse
        over = lambda d, value, soft=w: hu + np.clip(0.5 - d / max(soft, w), 0, 1) * (value - hu)  # noqa: E731
        for v in vessels:
            hu = over(v[0][2](*q), -60 + 90 * tones[1])
        wall = 9 + 7 * tones[2] - sum(a * c for a, c in zip(side, q)) + 0.8 * coarse
        if tones[3] < 0.6:
            hu = over(wall, 40 + 12 * fine)
        bent = [c + 0.5 * f for c, f in zip(q, (coarse, fine, -coarse))]
        body = -180 + 260 * tones[4]
        if malignant:
            d = lump(shape_rng, bent, R, 0.05 + 0.05 * tones[5], 4 + int(12 * tones[6]), 0.3 + 0.6 * tones[7])
            hu = over(d - 1, body - 330, 3)  # a halo
            hu = over(d, body + (20 + 60 * tones[8]) * fine + 30 * coarse)
        else:
            d = lump(shape_rng, [c * k for c, k in zip(q, 0.85 + 0.3 * tones[5:8])], R, 0.06 * tones[9], 5 * (tones[10] < 0.2), 0.35)
            hu = over(d, body - 40 + 30 * tones[11] * (fine + coarse))
            if tones[8] < 0.4:
                hu = over(d + R * (0.35 + 0.3 * tones[9]), body + 250)
        hu = hu + 22 * smooth_noise(noise_rng, hu.shape, 0.7)
        images.append(np.clip((hu + 1000) * (255 / 1400), 0, 255).astype(np.uint8))
    return images


def opacities(rng, hu, lung, spacing, sick):
    """Give a chest patches of ground glass and consolidation near the pleura if `sick`; changes `hu` [X, Y, Z] in place.

    Every patient's lungs are then set to a mean that does not depend on `sick`: the mean must not give it away.
    """
    if sick:
        rim = distance_transform_edt(lung, spacing)
        extent = np.multiply(hu.shape, spacing)
        field = 0.8 * upsample(coarse_noise(rng, extent, 22.), hu.shape) + 0.5 * upsample(coarse_noise(rng, extent, 9.), hu.shape)
        patch = field + 0.9 * np.exp(-rim / 14)
        rank = np.quantile(patch[lung], 1 - rng.uniform(0.12, 0.4))
        glass = np.clip((patch - rank) / 0.5, 0, 1) * lung
        solid = np.clip((patch - rank - rng.uniform(0.7, 1.3)) / 0.3, 0, 1) * lung
        hu += glass * rng.uniform(180, 330)
        hu += solid * np.clip(10 - hu, 0, None)
    air = lung & (hu < -500)
    if air.any():
        hu[air] += rng.uniform(-830, -750) - hu[lung].mean()


# ---------------------------------------------------------------- scanners and files


def scan(rng, hu, spacing):
    """What the CT scanner makes of the patient: int16 HU [X, Y, Z] with streaks, the kernel's noise, and a round field of view."""
    hu = hu.copy()
    bones = np.argwhere(hu[::4, ::4, ::4] > 450) * 4
    if len(bones) and rng.random() < 0.4:  # metal in a bone
        streaks(rng, hu, bones[rng.integers(len(bones))], spacing, rng.uniform(40, 140))
    noise = gaussian_filter(rng.standard_normal(hu.shape, dtype=np.float32), (*[rng.uniform(0.7, 1.0)] * 2, 0.4))
    noise *= rng.uniform(8, 20) / noise[::2, ::2, ::2].std()
    noise[hu < -950] *= 0.25
    hu += noise
    if rng.random() < 0.6:
        x, y = (2 * (np.arange(n) + 0.5) / n - 1 for n in hu.shape[:2])
        hu[x[:, None] ** 2 + y[None] ** 2 > 1] = -1024
    return np.clip(np.rint(hu, out=hu), -1024, 3071).astype(np.int16)


def streaks(rng, hu, at, spacing, strength):
    """A screw at voxel `at` and the rays that it throws through its slices, in place."""
    reach = int(np.ceil(14 / spacing[2]))
    z = slice(max(0, at[2] - reach), at[2] + reach + 1)
    x, y, z_mm = ((np.arange(n) - c) * m for n, c, m in zip(hu.shape, at, spacing))
    x, y, z_mm = x[:, None, None], y[None, :, None], z_mm[None, None, z]
    rays = smooth_noise(rng, (180, 1, 1), (2.0, 0, 0))[:, 0, 0]
    r = np.sqrt(x ** 2 + y ** 2)
    angle = (np.degrees(np.arctan2(y, x)) % 180).astype(int) % 180
    hu[:, :, z] += (strength * rays[angle] * np.exp(-r / 90) * np.clip(r / 12, 0, 1) * np.exp(-(z_mm / 7) ** 2)).astype(np.float32)
    rod = np.sqrt((x / 4) ** 2 + (y / 4) ** 2 + (z_mm / 8) ** 2) < 1
    hu[:, :, z][rod] = 2600


CODES = ("LPS", "RAS", "LAS", "RPI", "LPI", "PIR")


def affine_of(rng, shape, spacing, oblique=False):
    """Affine of a RAS+ volume with its centre near the origin; oblique: turned by a few degrees."""
    turn = Rotation.from_euler("xyz", rng.uniform(-6, 6, 3) * oblique, degrees=True).as_matrix()
    A = np.eye(4)
    A[:3, :3] = turn * np.asarray(spacing)
    A[:3, 3] = rng.normal(0, 20, 3) - A[:3, :3] @ (np.asarray(shape) / 2)
    return A


def save_nifti(path, data, affine, code=None, intercept=0):
    """Write integers [X, Y, Z] as .nii.gz, with axes turned to `code` (the data are RAS+); stored = value - intercept."""
    img = nib.Nifti1Image(data if intercept == 0 else (data - intercept).astype(data.dtype), affine)
    if code:
        ends = nib.orientations.axcodes2ornt(code)
        img = img.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(affine), ends))
    img.set_qform(img.affine, 1)
    img.set_sform(img.affine, 1)
    img.header.set_xyzt_units("mm")
    img.header.set_slope_inter(1, intercept)
    with write_beside(path) as tmp:
        tmp.write_bytes(gzip.compress(img.to_bytes(), 1, mtime=0))


def open_folder(out, part, size, seed):
    """Make out/part and note in it what it holds; BadInput if it holds another size, seed or version."""
    folder, mine = Path(out) / part, dict(size=size, seed=seed, version=VERSION)
    note = folder / "phantom.json"
    if note.exists() and read_json(note, "the note of phantom.py") != mine:
        raise BadInput(f"{folder}: holds the phantom {read_json(note, '')}, not {mine}: choose another --out, or remove it")
    write_json(note, mine)
    return folder


def new_patient(seed, part, i, size):
    """The random numbers of patient i, and the shape of the volume, where the part's patients have volumes."""
    rng = np.random.default_rng([seed, PARTS.index(part), i])
    shape, jitter = SHAPES[size].get(part, ((), ()))
    return rng, tuple(int(n + rng.integers(-j, j + 1)) for n, j in zip(shape, jitter))


def each_patient(make, out, part, size, seed, workers):
    """Run make(i, folder, size, seed) for every patient of a part: (folder, list of what they returned)."""
    folder, count = open_folder(out, part, size, seed), COUNTS[size][part]
    return folder, list(parallel(functools.partial(make, folder=folder, size=size, seed=seed), range(np.sum(count)), workers, part))


def ct_spacing(rng, shape, levels):
    """Voxel edges (mm, to two places) with which a body of usual size fills the volume."""
    plane = round(float(rng.uniform(355, 400) / shape[0]), 2)
    return plane, plane, round(float((levels[1] - levels[0]) * rng.uniform(0.93, 1.07) / shape[2]), 2)


# ---------------------------------------------------------------- one writer for each layout


def amos_patient(i, folder, size, seed):
    (rng, shape), split = new_patient(seed, "amos", i, size), "Tr" if i < COUNTS[size]["amos"][0] else "Va"
    image, label = (folder / (kind + split) / f"amos_{i + 1:04d}.nii.gz" for kind in ("images", "labels"))
    if not (image.exists() and label.exists()):
        spacing = ct_spacing(rng, shape, ABDOMEN)
        hu, organ = abdomen(rng, shape, spacing)
        A, code = affine_of(rng, shape, spacing, oblique=i % 5 == 4), CODES[i % len(CODES)]
        save_nifti(label, organ, A, code)
        save_nifti(image, scan(rng, hu, spacing), A, code, intercept=-1024 if i % 3 == 1 else 0)
    return dict(image=f"./images{split}/{image.name}", label=f"./labels{split}/{label.name}")


def write_amos(out, size="small", seed=0, workers=None):
    """AMOS22's layout in out/amos: dataset.json, imagesTr, labelsTr, imagesVa, labelsVa. Returns the folder."""
    folder, pairs = each_patient(amos_patient, out, "amos", size, seed, workers)
    tr, va = COUNTS[size]["amos"]
    write_json(folder / "dataset.json", dict(
        name="AMOS (phantom)", description="Made-up patients in the layout of AMOS22", reference="phantom.py", licence="none",
        release=str(VERSION), tensorImageSize="3D", modality={"0": "CT"}, labels={str(i): o for i, o in enumerate(ORGANS)},
        numTraining=tr, numValidation=va, numTest=0, training=pairs[:tr], validation=pairs[tr:], test=[]))
    return folder


def brats_patient(i, folder, size, seed):
    (rng, shape), name = new_patient(seed, "brats", i, size), f"BraTS-GLI-{i:05d}-000"
    files = {c: folder / name / f"{name}-{c}.nii.gz" for c in (*CONTRASTS, "seg")}
    if not all(f.exists() for f in files.values()):
        spacing = (1, 1, 1) if size == "full" else (2.6, 2.6, 2.85)
        images, seg = brain(rng, shape, spacing)
        for c, data in (*images.items(), ("seg", seg)):
            save_nifti(files[c], np.rint(data).astype(np.int16), np.diag([*spacing, 1.0]), "LPS")


def write_brats(out, size="small", seed=0, workers=None):
    """BraTS 2023's layout in out/brats: CASE/CASE-{t1n,t1c,t2w,t2f,seg}.nii.gz. Returns the folder."""
    return each_patient(brats_patient, out, "brats", size, seed, workers)[0]


DL_COLUMNS = ("File_name Patient_index Study_index Series_ID Key_slice_index Measurement_coordinates Bounding_boxes "
              "Lesion_diameters_Pixel_ Normalized_lesion_location Coarse_lesion_type Possibly_noisy Slice_range "
              "Spacing_mm_px_ Image_size DICOM_windows Patient_gender Patient_age Train_Val_Test").split()
# Two types of lesion a patient and the z (mm) of the scan's middle at which both can be; each type comes twice in eight.
DL_PAIRS = ((3, 5, 215), (4, 6, 50), (2, 8, -112), (7, 3, 215), (5, 1, 200), (6, 2, 5), (8, 7, -140), (1, 4, 85))
DL_TISSUES = {1: [BONE], 2: [CAVITY], 3: [MEDIASTINUM], 4: [LIVER], 5: [LUNG], 6: [R_KIDNEY, L_KIDNEY], 7: [MUSCLE],
              8: [CAVITY, BLADDER]}


def lesion_place(rng, kind, tissue, spacing, taken):
    """Voxel for a lesion of this type: well inside its tissue (a kidney's: at its edge), far from those `taken`."""
    home = np.isin(tissue, DL_TISSUES[kind])
    home[:, :, :4] = home[:, :, -4:] = False
    if kind in (2, 8):  # in front of the spine
        home[:, :tissue.shape[1] // 2] = False
    depth = distance_transform_edt(home, spacing)
    voxels = np.argwhere(home & (depth >= (0 if kind == 6 else np.quantile(depth[home], 0.6)))) if home.any() else []
    if not len(voxels):
        raise ValueError(f"no {LESIONS[kind - 1]} in a scan of {tissue.shape} voxels")
    tries = voxels[rng.integers(len(voxels), size=40)]
    apart = [min([np.linalg.norm((v - t) * spacing) for t in taken], default=99) for v in tries]
    return tries[int(np.argmax(np.minimum(apart, 60)))]


def deeplesion_scan(i, size, seed):
    """Patient i: (int16 HU [row, col, slice], spacing, list of (type, mask [row, col, slice])), as the NIH script turns it."""
    rng, shape = new_patient(seed, "deeplesion", i, size)
    *kinds, middle = DL_PAIRS[i % 8]
    kinds = kinds[:1] if i % 24 == 11 else kinds + [kinds[0]] * (i % 12 == 5)
    spacing = ct_spacing(rng, shape, (-45, 45) if size == "full" else (-50, 50))
    half = 0.5 * shape[2] * spacing[2]
    hu, tissue = trunk(rng, shape, spacing, (middle - half, middle + half))
    places, masks = [], []
    for kind in kinds:
        places.append(lesion_place(rng, kind, tissue, spacing, places))
        masks.append(lesion(rng, kind, hu, spacing, places[-1]))
    turn = lambda a: np.ascontiguousarray(a[::-1, ::-1, ::-1].transpose(1, 0, 2))  # noqa: E731  row: to the back, col: to the left
    types = kinds[:2] + [-1] * (len(kinds) - 2)  # the third's type is not known
    return turn(scan(rng, hu, spacing)), spacing, [(t, turn(m)) for t, m in zip(types, masks)]


def deeplesion_patient(i, folder, size, seed):
    hu, spacing, lesions = deeplesion_scan(i, size, seed)
    rng = np.random.default_rng([seed, i])
    start, sex, age, series = int(rng.integers(1, 180)), rng.choice(["M", "F"]), rng.integers(25, 85), 1 + i % 3
    span, where = (start, start + hu.shape[2] - 1), f"{i + 1:06d}_01_{series:02d}"
    path = folder / "Images_nifti" / f"{where}_{span[0]:03d}-{span[1]:03d}.nii.gz"
    if not path.exists():
        A = np.zeros((4, 4))
        A[0, 1], A[1, 0], A[2, 2], A[3, 3] = -spacing[0], -spacing[1], -spacing[2], 1
        save_nifti(path, hu, A)
    rows, join = [], lambda v: ", ".join(f"{x:g}" for x in v)  # noqa: E731
    for kind, mask in lesions:
        k = int(mask.sum((0, 1)).argmax())
        y, x = np.nonzero(mask[:, :, k])
        pad = max(1, round(5 * hu.shape[1] / 512))
        box = [max(0, x.min() - pad), max(0, y.min() - pad), min(hu.shape[1], x.max() + 1 + pad), min(hu.shape[0], y.max() + 1 + pad)]
        mid, wide, high = (x.mean(), y.mean()), x.max() + 1 - x.min(), y.max() + 1 - y.min()
        ends = [x.min(), mid[1], x.max() + 1, mid[1], mid[0], y.min(), mid[0], y.max() + 1]
        place = (mid[0] / hu.shape[1], mid[1] / hu.shape[0], k / hu.shape[2])
        rows.append([f"{where}_{start + k:03d}.png", i + 1, 1, series, start + k, join(ends), join(box),
                     join(sorted((wide, high), reverse=True)), join(np.round(place, 4)), kind, 0, join(span), join(spacing),
                     join(hu.shape[:2]), "-1500, 500" if kind == 5 else "-175, 275", sex, age, (1, 1, 1, 1, 1, 2, 3)[i % 7]])
    return rows


def write_deeplesion(out, size="small", seed=0, workers=None):
    """DeepLesion's layout in out/deeplesion: DL_info.csv (18 columns) and Images_nifti. Returns the folder."""
    folder = open_folder(out, "deeplesion", size, seed)
    if not (folder / "DL_info.csv").exists():  # written last
        _, rows = each_patient(deeplesion_patient, out, "deeplesion", size, seed, workers)
        with write_beside(folder / "DL_info.csv") as tmp, open(tmp, "w", newline="") as f:
            csv.writer(f, lineterminator="\n").writerows([DL_COLUMNS, *sum(rows, [])])
    return folder


def nodule_patient(i, folder, size, seed):
    rng, _ = new_patient(seed, "nodule", i, size)
    label, other = int(rng.random() < 0.45), int(rng.random() < 0.5)
    twins = [nodule(copy.deepcopy(rng), malignant, NODULE_EDGES[size]) for malignant in (0, 1)]
    return label, [with_grey_levels(v, w, rng) for v, w in zip(twins[label], twins[other])]


def with_grey_levels(image, other, rng):
    """`image` with the histogram of `other`, rank by rank: the twin is drawn without a look at the label, so no statistic of
    the grey levels (mean, spread, percentiles, or any mixture of them) tells the classes apart."""
    out = np.empty_like(image).ravel()
    out[np.lexsort((rng.random(image.size), image.ravel()))] = np.sort(other, axis=None)
    return out.reshape(image.shape)


def write_nodules(out, size="small", seed=0, workers=None):
    """MedMNIST's layout in out/nodule: nodulemnist3d.npz and, if size is full, nodulemnist3d_64.npz. Returns the folder."""
    folder, edges = open_folder(out, "nodule", size, seed), NODULE_EDGES[size]
    files = [folder / f"nodulemnist3d{'' if n == 28 else f'_{n}'}.npz" for n in edges]
    if not all(f.exists() for f in files):
        labels, images = zip(*each_patient(nodule_patient, out, "nodule", size, seed, workers)[1])
        ends = np.cumsum(COUNTS[size]["nodule"])[:-1]
        for path, stack in zip(files, (np.stack(n) for n in zip(*images))):
            pieces = {"images": np.split(stack, ends), "labels": np.split(np.array(labels, np.uint8)[:, None], ends)}
            with write_beside(path) as tmp:
                np.savez_compressed(tmp, **{f"{split}_{k}": v[j] for k, v in pieces.items()
                                            for j, split in enumerate(("train", "val", "test"))})
    return folder


def ricord_patient(i, folder, size, seed):
    (rng, shape), name, sick = new_patient(seed, "ricord", i, size), f"images/RICORD-{i + 1:06d}.nii.gz", i % 2
    if not (folder / name).exists():
        spacing = ct_spacing(rng, shape, CHEST)
        code, intercept = str(rng.choice(CODES)), int(rng.choice([0, -1024]))  # nothing in the header tells the label
        hu, lung = chest(rng, shape, spacing)
        opacities(rng, hu, lung, spacing, sick)
        save_nifti(folder / name, scan(rng, hu, spacing), affine_of(rng, shape, spacing), code, intercept)
    return f"{name} {sick}\n"


def write_ricord(out, size="small", seed=0, workers=None):
    """RICORD's layout in out/ricord: images; {train,val,test}.txt of lines `images/NAME.nii.gz LABEL`. Returns the folder."""
    folder, lines = each_patient(ricord_patient, out, "ricord", size, seed, workers)
    ends = np.cumsum((0, *COUNTS[size]["ricord"]))
    for split, a, b in zip(("train", "val", "test"), ends, ends[1:]):
        with write_beside(folder / f"{split}.txt") as tmp:
            tmp.write_text("".join(lines[a:b]))
    return folder


WRITERS = dict(zip(PARTS, (write_amos, write_brats, write_deeplesion, write_nodules, write_ricord)))


def write_phantom(out, size="small", seed=0, parts=PARTS, workers=None):
    """Write the made-up patients of `parts` under folder `out`; returns a dict part -> its folder.

    size: small (42 MB, a minute) or full (the real data's sizes). workers: processes, None for one a core; the voxels do
    not depend on it. Files that are there are kept. BadInput: unknown size or part, or `out` holds another phantom.
    """
    if size not in COUNTS:
        raise BadInput(f"size {size!r}: it is one of {', '.join(COUNTS)}")
    for part in parts:
        if part not in PARTS:
            raise BadInput(f"part {part!r}: it is one of {', '.join(PARTS)}")
    return {part: WRITERS[part](out, size, seed, workers) for part in parts}


# ---------------------------------------------------------------- picture and command line


def draw(folders, path):
    """Contact sheet (PNG): of each part in `folders` (see `write_phantom`) six files by name, in three planes each."""
    from matplotlib.figure import Figure
    figure = Figure((12, 6 * len(folders)), facecolor="black")
    for row, (part, folder) in zip(figure.subfigures(len(folders), 1, squeeze=False)[:, 0], folders.items()):
        axes = row.subplots(3, 6, gridspec_kw=dict(left=0, right=1, bottom=0, top=0.96, wspace=0.02, hspace=0.02))
        if part == "nodule":  # nine benign, nine malignant
            data = np.load(folder / "nodulemnist3d.npz")
            views = [v[14] for label in (0, 1) for v in data["train_images"][data["train_labels"][:, 0] == label][:9]]
        else:
            files = sorted(folder.rglob("*.nii.gz"), key=lambda f: (f.name, f.parent.name))[:6]
            volumes = [np.asarray(nib.as_closest_canonical(nib.load(f)).dataobj) for f in files]
            views = [np.take(v, int(v.shape[a] * at), a) for a, at in ((2, 0.6), (1, 0.5), (0, 0.5)) for v in volumes]
        for ax, v in zip(axes.flat, views):
            low, high = {"ricord": (-1000, 200), "brats": (0, np.percentile(v, 99.7) + 1), "nodule": (0, 255)}.get(part, (-180, 250))
            low, high = (0, 15) if v.max() <= 15 else (low, high)  # a label
            ax.imshow(v.T, origin="lower", cmap="gray", vmin=low, vmax=high, aspect="auto")
            ax.set_axis_off()
        row.suptitle(part, color="white")
    with write_beside(path) as tmp:
        figure.savefig(tmp, dpi=70)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="data/phantom", help="folder to write to (default: %(default)s)")
    parser.add_argument("--size", default="small", choices=list(COUNTS), help="small: seconds; full: the real data's sizes")
    parser.add_argument("--seed", type=int, default=0, help="other seed, other patients")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, help="what to make (default: all)")
    parser.add_argument("--workers", type=int, help="processes (default: one a core)")
    parser.add_argument("--picture", metavar="FILE.png", help="draw a contact sheet of what was made")
    args = parser.parse_args()
    folders = write_phantom(args.out, args.size, args.seed, args.parts, args.workers)
    for part, folder in folders.items():
        print(f"{part}: {folder} ({sum(f.stat().st_size for f in folder.rglob('*') if f.is_file()) / 1e6:.1f} MB)")
    if args.picture:
        draw(folders, args.picture)
        print(args.picture)


if __name__ == "__main__":
    cli(main)
