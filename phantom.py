"""Made-up patients in the real layouts, so that everything here runs with no download: CT in HU
with AMOS's 15 organs, four-contrast brain MR with a tumour, eight kinds of lesion, nodules of two
classes, lungs with and without opacities.

    python phantom.py --out data/phantom    # all parts: a minute, 37 MB

The same seed gives the same voxels whatever the number of workers. Files that are there are kept, a
part that is complete is left alone (brats is drawn again, not written). Nothing here is a patient:
results on it say that the code runs, not that it heals.

How a patient is made: all organs are ellipsoids, or tubes of balls, in a standard patient (mm; x to
the right, y to the front, z to the head: RAS+). Every patient has them in another size at another
place, and a smooth random field bends the whole. The signed distance to a shape becomes an edge one
voxel wide (partial volume); where it is negative, the label is the shape's. What is where and how
it looks stands in tables: LOOKS, INNER and OUTER; SIGNAL, HULL and DEEP; LESIONS. Change those.
"""

import gzip
import itertools
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy.ndimage import distance_transform_edt, gaussian_filter
from scipy.spatial.transform import Rotation

from common import (
    BadInput,
    check_least,
    cli,
    new_parser,
    parallel,
    read_json,
    write_beside,
    write_json,
    write_table,
    write_text,
)

VERSION = 3  # of the made-up patients: folders of another version are not mixed with this one's

COUNTS = {  # patients: training, validation, test; or in all
    "amos": (12, 4),
    "brats": (8,),
    "deeplesion": (48,),
    "nodule": (480, 120, 240),
    "ricord": (12, 4, 8),
}
PARTS = tuple(COUNTS)
# written last: where it is, the patients, which it is made from, are not made again
LAST = {
    "amos": "dataset.json",
    "deeplesion": "DL_info.csv",
    "nodule": "nodulemnist3d.npz",
    "ricord": "test.txt",
}
SHAPES = {  # voxels of a volume; a patient's may differ by four, a nodule's not
    "amos": (80, 80, 72),
    "brats": (72, 72, 50),
    "deeplesion": (80, 80, 22),
    "nodule": (28, 28, 28),
    "ricord": (80, 72, 68),
}


def write_phantom(out, parts=PARTS, seed=0, workers=None):
    """Write the made-up patients of `parts` under folder `out`; returns {part: its folder}.

    workers: processes, None for one a core; the voxels do not depend on it. BadInput: a part that
    there is not, or `out` holds patients of another seed or version.
    """
    folders = {}
    for part in parts:
        if part not in PARTS:
            raise BadInput(f"part {part!r}: it is one of {', '.join(PARTS)}")
        folder = folders[part] = Path(out) / part
        note, wanted = folder / "phantom.json", {"seed": seed, "version": VERSION}
        if note.exists() and (there := read_json(note, "a note of phantom.py")) != wanted:
            raise BadInput(f"{folder}: holds phantom {there}, not {wanted}: remove it, or --out")
        write_json(note, wanted)
        if not (folder / LAST.get(part, "none")).exists():
            make = partial(write_patient, part, folder, seed)
            finish(part, folder, list(parallel(make, range(sum(COUNTS[part])), workers, part)))
    return folders


def write_patient(part, folder, seed, i):
    """Write the files of patient i, each with random numbers of its own; returns what to list."""
    rng = np.random.default_rng((seed, PARTS.index(part), i))
    shape = SHAPES[part] + rng.integers(-4, 5, 3)
    return WRITERS[part](i, rng, shape, folder)


def main():
    p = new_parser(__doc__)
    p.add_argument("--out", default="data/phantom", help="folder to write to (default %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="other seed, other patients")
    p.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, help="default: all")
    p.add_argument("--workers", type=int, help="processes (default: one a core)")
    args = p.parse_args()
    check_least(args, seed=0)
    write_phantom(args.out, args.parts, args.seed, args.workers)


# ---- the standard patient --------------------------------------------------------------------

# HU, what contrast agent adds, texture, HU of the wall, y from which there is gas. The first 16 are
# AMOS's labels in their order; the others have numbers too, so that lesions find their places.
LOOKS = {
    "background": (-98, 0, 14),  # the fat of the belly
    "spleen": (48, 72),
    "right kidney": (30, 110, 14, 60),
    "left kidney": (30, 110, 14, 60),
    "gall bladder": (10, 0),
    "esophagus": (20, 30, 10, 40),
    "liver": (58, 52),
    "stomach": (20, 60, 40, 38, 155),
    "aorta": (42, 230),
    "postcava": (40, 105),
    "pancreas": (40, 55),
    "right adrenal gland": (28, 45),
    "left adrenal gland": (28, 45),
    "duodenum": (22, 40, 10, 38, 155),
    "bladder": (8, 0, 4, 35),
    "prostate/uterus": (38, 37),
    "muscle": (52, 8),
    "fat": (-104, 0, 8),
    "bone": (190, 0, 45, 800),
    "lung": (-830, 0, 26),
    "vessel": (42, 110),
    "bowel": (20, 40, 10, 38, 180),
    "colon": (-30, 40, 60, 38, 150),
    "airway": (-960, 0),
    "air": (-1100, 0, 0),  # a scanner stores no less than -1024
}
# Tissue, centre (mm), radii and perhaps turn (degrees about x, y, z) of an ellipsoid; or tissue,
# points and radius of a tube. x: from the middle to the right; y: from the back; z: from the
# thighs. A later tissue covers an earlier one; neighbouring rows of one are one shape. The wall of
# the trunk cuts off the first:
INNER = [
    ("lung", (74, 108, 445), (64, 88, 128)),
    ("colon", [(94, 116, 135), (106, 110, 262), (10, 184, 232)], 21),
    ("colon", [(10, 184, 232), (-104, 120, 285), (-106, 110, 150)], 16),
    ("liver", (84, 112, 320), (66, 76, 68), (0, 25, 0)),
    ("liver", (22, 146, 344), (66, 36, 30), (0, 12, 0)),
    ("spleen", (-104, 74, 332), (27, 47, 52), (15, 12, -28)),
    ("stomach", [(-66, 96, 362), (-60, 154, 300), (26, 154, 290)], 25),
]
OUTER = [
    ("muscle", [(38, 70, 270), (88, 122, 50)], 16),
    ("muscle", [(33, 32, 120), (30, 26, 600)], 23),
    ("muscle", (88, 90, 60), (52, 72, 60)),
    ("bone", (92, 80, 148), (8, 58, 46), (0, 24, 28)),
    ("bone", [(88, 112, 68), (122, 104, 10)], 20),
    *(("bone", (0, 58, z), (23, 17, 13)) for z in range(100, 620, 32)),  # vertebrae
    *(("bone", (12, 26, z), (18, 22, 8)) for z in range(95, 620, 32)),
    ("vessel", (-20, 136, 408), (54, 43, 46), (20, -35, 25)),
    ("vessel", (0, 112, 462), (52, 11, 11)),
    ("right kidney", (66, 66, 247), (28, 25, 53), (12, -9, 20)),
    ("left kidney", (-66, 66, 265), (28, 25, 53), (12, 9, -20)),
    ("right adrenal gland", [(54, 60, 302), (44, 76, 312)], 5),
    ("left adrenal gland", [(-54, 60, 320), (-44, 76, 330)], 5),
    ("pancreas", [(40, 126, 250), (20, 138, 280), (-78, 98, 308)], 11),
    ("duodenum", [(28, 156, 290), (56, 124, 236), (-34, 132, 240)], 12),
    ("postcava", [(19, 98, 168), (22, 116, 390)], 11),
    ("aorta", [(-9, 93, 168), (-26, 76, 480)], 11),
    ("aorta", [(-26, 76, 480), (-10, 118, 515), (6, 144, 445)], 13),
    ("esophagus", [(-30, 106, 352), (-2, 86, 620)], 8),
    ("gall bladder", [(44, 144, 296), (58, 168, 268)], 13),
    ("bladder", (0, 136, 88), (38, 30, 26)),
    ("prostate/uterus", (0, 110, 58), (25, 20, 20)),
    ("airway", [(0, 102, 640), (2, 98, 482), (46, 100, 452)], 8),
]
PAIRED = ("lung", "muscle", "bone", "airway", "fluid", "nuclei")  # they have a mirror image
FLIP = np.array((-1, 1, 1))


def looks_of(rng):
    """{tissue: arguments of Canvas.paint} of one patient, at one moment after the injection."""
    share = rng.random()

    def look(hu, agent, mottle=6, wall=None, gas=999):
        shift = agent * share + rng.normal(0, 8)
        return hu + shift, mottle, wall and wall + shift, rng.normal(gas, 12)

    return {tissue: look(*row) for tissue, row in LOOKS.items()}


# ---- shapes and painting ---------------------------------------------------------------------
# A shape is a list of ellipsoids (centre, radii, rotation).


def ball(centre, radii, turn=(0, 0, 0)):
    """Ellipsoid; turn: degrees about x, y, z."""
    rotation = Rotation.from_euler("xyz", turn, degrees=True).as_matrix()
    return [(centre, np.broadcast_to(radii, 3), rotation)]


def tube(points, radius):
    """Bent tube through two or three `points` (a parabola), out of balls."""
    bend = np.polyfit(np.linspace(0, 1, len(points)), points, len(points) - 1)
    return [(np.polyval(bend, t), np.full(3, radius), np.eye(3)) for t in np.linspace(0, 1, 50)]


def column(v):
    return np.reshape(np.float32(v), (-1, 1, 1, 1))


def noise(rng, axes, scale):
    """Random field [X, Y, Z] of mean 0 and deviation 1, smooth over `scale` mm. axes: mm, three."""
    knots = [np.arange(a[0] - 2 * scale, a[-1] + 3 * scale, scale) for a in axes]
    field = rng.standard_normal([len(k) for k in knots], np.float32)
    for a, k in zip(axes, knots):
        bumps = np.exp(-(((a - k[:, None]) / scale) ** 2)).astype(np.float32)
        bumps /= np.linalg.norm(bumps, axis=0)
        # no BLAS, whose sums depend on the number of threads; the axes go round once in three
        field = np.einsum("abc,ax->bcx", field, bumps)
    return field


class Canvas:
    """A volume to paint shapes into: image [C, X, Y, Z], and the tissue [X, Y, Z] of each voxel.

    middle, edges, shape: its centre and the edges of a voxel in mm, its voxels. looks: {tissue:
    arguments of `paint`}, "background" first. bend: by how many mm, over how many, all is bent.
    """

    def __init__(self, rng, middle, edges, shape, looks, bend):
        axes = [m + e * (np.arange(n) - n / 2) for m, e, n in zip(middle, edges, shape)]
        self.axes, self.width, self.looks = axes, np.mean(edges), looks
        self.points = np.stack(np.meshgrid(*axes, indexing="ij")).astype(np.float32)
        for octave in (1, 4):
            for p in self.points:
                p += bend[0] / octave * noise(rng, axes, bend[1] / octave)
        self.margin = self.width + 6 * bend[0]
        self.texture = noise(rng, axes, 1.5 * self.width)
        core, mottle, *_ = looks["background"]
        self.image = column(core) + mottle * self.texture
        self.tissue = np.zeros(shape, np.uint8)

    def distance(self, shape, beyond=0):
        """mm [X, Y, Z] to the surface, negative inside; true up to `beyond` mm from it, 99 else."""
        d = np.full(self.tissue.shape, 99, np.float32)
        for centre, radii, rotation in shape:
            reach = max(radii) + self.margin + beyond
            ends = np.add.outer(centre, (-reach, reach))
            box = tuple(slice(*np.searchsorted(a, e)) for a, e in zip(self.axes, ends))
            if not d[box].size:
                continue
            # Quilez, "ellipsoid SDF": exact to first order at the surface
            q = self.points[:, *box] - column(centre)
            q = np.einsum("ij,i...->j...", np.float32(rotation / radii), q)
            k, slope = np.linalg.norm(q, axis=0) + 1e-3, np.linalg.norm(q / column(radii), axis=0)
            d[box] = np.minimum(d[box], k * (k - 1) / (slope + 1e-6))
        return d

    def lump(self, rng, voxel, radius, lobes=0, spikes=0):
        """Distance to a ball with ellipsoids through it, which bulge or stick out."""
        centre = self.points[:, *voxel]
        shape = ball(centre, radius)
        for radii in [(1.35, 0.7, 0.7)] * lobes + [(1.7, 0.25, 0.25)] * spikes:
            radii = np.multiply(radii, radius * rng.uniform(0.85, 1.15))
            shape += ball(centre, radii, rng.uniform(0, 360, 3))
        return self.distance(shape, 40)

    def paint(self, d, core, mottle=6, rim=None, gas=999, soft=0.0):
        """Blend what lies at distance `d` [X, Y, Z] into the image.

        core: value within, or one a channel; mottle: deviation of the texture; rim: value of the
        outermost 4 mm; gas: y from which air fills it (patients lie on their backs); soft: mm of a
        blurred edge.
        """
        soft = max(soft, self.width)
        near = np.flatnonzero(d < soft / 2)
        depth, texture, y = (a.take(near) for a in (-d, self.texture, self.points[1]))
        value = np.where(y > gas, -930, np.array(core)[..., None] + mottle * texture)
        if rim is not None:
            value = rim + (value - rim) * np.clip(depth / 4 - 0.3, 0, 1)
        image = self.image.reshape(len(self.image), -1)
        image[:, near] += np.clip(0.5 + depth / soft, 0, 1) * (value - image[:, near])

    def cover(self, d, tissue):
        """Paint a tissue, with its label."""
        self.paint(d, *self.looks[tissue])
        self.tissue[d < 0] = list(self.looks).index(tissue)

    def fill(self, rng, rows):
        """Paint the rows of a table as one patient has them; returns the last shape's distance."""
        for tissue, group in itertools.groupby(rows, lambda row: row[0]):
            shape = []
            for _, points, radii, *turn in group:
                points = np.add(points, rng.normal(0, 2.5, 3))
                radii = np.maximum(radii, 0.75 * self.width) * rng.normal(1, 0.1)
                shape += (tube if points.ndim == 2 else ball)(points, radii, *turn)
            if tissue in PAIRED:
                shape += [(c * FLIP, r, turn * FLIP[:, None]) for c, r, turn in shape]
            d = self.distance(shape)
            self.cover(d, tissue)
        return d

    def where(self, *tissues):
        """Mask [X, Y, Z] of the voxels of these tissues."""
        return np.isin(self.tissue, [list(self.looks).index(t) for t in tissues])


# ---- the trunk -------------------------------------------------------------------------------


def trunk(rng, shape, middle, height):
    """One patient without noise: (Canvas in HU, RAS+; edges of a voxel, mm).

    middle, height: the z in the middle of the volume, and how much it covers, mm of the standard
    patient; in plane the body fills most of it.
    """
    broad, deep, fat = rng.uniform((127, 79, 7), (142, 91, 32))
    edge = 2.1 * (broad + fat + 21) / shape[0]
    edges, centre = np.array((edge, edge, height / shape[2])), rng.normal((0, 104, middle), 4)
    canvas = Canvas(rng, centre, edges, shape, looks_of(rng), (5, 90))
    for at in rng.uniform((-70, 110, 115), (70, 170, 240), (20, 3)):
        canvas.fill(rng, [("bowel", at, (36, 13, 13), rng.uniform(0, 360, 3))])
    canvas.fill(rng, INNER)
    wall = canvas.distance(ball((0, 110, 280), (broad, deep, 2000)))
    for tissue, layer in (("muscle", 0), ("fat", 13), ("air", 13 + fat)):
        canvas.cover(layer - wall, tissue)
    # ribs run downward to the front and end at the costal margin
    _, y, z = canvas.points
    slant = np.abs((z + 0.5 * y) % 30 - 15) - 6.5
    canvas.cover(np.max((np.abs(wall) - 5, slant, 244 + 0.75 * y - z), 0), "bone")
    canvas.fill(rng, OUTER)
    vessels = []
    for at in rng.normal((0, 105, 450), (60, 30, 50), (50, 3)):
        vessels += ball(at, (36, 3, 3), rng.uniform(0, 360, 3))
    canvas.paint(np.where(canvas.where("lung"), canvas.distance(vessels), 99), 45)
    return canvas, edges


# ---- the brain -------------------------------------------------------------------------------

SIGNAL = {  # of each tissue in t1n, t1c, t2w and t2f; the first four are BraTS 2023's labels
    "background": (0, 0, 0, 0),
    "necrosis": (0.33, 0.36, 0.90, 0.42),
    "oedema": (0.52, 0.53, 0.82, 0.95),
    "enhancing": (0.55, 1.15, 0.66, 0.72),
    "fluid": (0.20, 0.20, 1.00, 0.14),
    "grey": (0.52, 0.55, 0.60, 0.62),
    "white": (0.80, 0.80, 0.42, 0.46),
    "nuclei": (0.63, 0.66, 0.50, 0.54),
}
# as INNER: cerebrum, temporal lobes, cerebellum, stem; then thalamus, ventricles
HULL = [
    ("fluid", (20, 0, 10), (50, 85, 56)),
    ("fluid", (44, 12, -26), (22, 42, 20)),
    ("fluid", (22, -46, -36), (30, 34, 26)),
    ("fluid", [(0, -12, 0), (0, -24, -75)], 13),
]
DEEP = [
    ("nuclei", (12, -14, 8), (10, 15, 10)),
    ("fluid", [(8, 32, 15), (13, -18, 25), (33, -16, -12)], 5),
]


def brain(rng, shape, spacing):
    """Four contrasts of one brain with a tumour: (float [4, X, Y, Z], labels uint8 [X, Y, Z]).

    RAS+, without the skull: exactly 0 outside. Labels as in BraTS 2023: 1 necrotic core, 2 oedema,
    3 enhancing tumour.
    """
    looks = {t: (np.multiply(v, rng.normal(1, 0.05)), 0.02) for t, v in SIGNAL.items()}
    canvas = Canvas(rng, (0, 0, -6), spacing, shape, looks, (3, 60))
    field = partial(noise, rng, canvas.axes)
    hull = canvas.fill(rng, HULL)
    # a sulcus is where a smooth noise is zero; like the cleft between the hemispheres it closes
    # in the depth
    fold = 0.9 - 4 * np.abs(field(9)) + 0.9 * np.minimum(hull + 28, 0)
    cleft = 1.4 - np.abs(canvas.points[0]) + 0.9 * np.minimum(hull + 38, 0)
    rind = np.max((hull + 1, fold, cleft), 0)
    canvas.cover(rind, "grey")
    canvas.cover(rind + 3, "white")
    canvas.fill(rng, DEEP)
    # the tumour sits in the white matter, which its oedema follows
    voxel = rng.choice(np.argwhere((rind < -6) & (hull < -18)))
    radius, spread = rng.uniform((9, 7), (19, 18))
    core = canvas.lump(rng, voxel, radius, 4) + 0.15 * radius * field(10)
    core = np.maximum(core, hull)
    oedema = np.maximum(core - spread * (0.8 + 0.45 * field(16)), rind + 2.5)
    canvas.cover(np.minimum(oedema, core), "oedema")
    canvas.cover(core, "enhancing")
    canvas.cover(core + rng.uniform(3, 5), "necrosis")
    # the scanner: a bias field, noise, and no unit
    image = canvas.image * np.exp(0.12 * field(100))
    image = (image + rng.normal(0, 0.02, image.shape)) * rng.uniform(300, 1500, (4, 1, 1, 1))
    return np.maximum(image, 1) * (hull < 1), canvas.tissue * (canvas.tissue < 4)


# ---- lesions and opacities -------------------------------------------------------------------

# Where it is; lobes and spikes of the shape; by how many HU the core is darker and the rim brighter
# than the lesion's level, which is drawn from one range for all; texture; mm of its blurred edge.
LESIONS = {
    1: (["bone"], 3, 0, 130, 50, 0),
    2: (["background", "bowel", "colon"], 6, 0, 0, 6, 0),
    3: (["vessel", "aorta"], 4, 0, 50, 6, 0),
    4: (["liver"], 0, 0, 40, 8, 12),
    5: (["lung"], 2, 9, -15, 60, 0),
    6: (["right kidney", "left kidney"], 0, 0, 45, 3, 0),
    7: (["muscle"], 2, 3, 0, 45, 8),
    8: (["background", "bowel", "bladder"], 2, 0, 45, 20, 0),
}
# two types of lesion a patient, and the z (mm) of the scan's middle at which both can be
PAIRS = [(3, 5, 455), (4, 6, 280), (2, 8, 128), (1, 7, 440)]


def lesion(rng, canvas, kind):
    """Paint a lesion of type `kind` well inside its tissue: its mask [X, Y, Z]."""
    tissues, lobes, spikes, step, mottle, soft = LESIONS[kind]
    home = canvas.where(*tissues)
    home[..., :4] = home[..., -4:] = False
    depth = distance_transform_edt(home)
    voxel = rng.choice(np.argwhere(depth >= np.quantile(depth[home], 0.6)))
    radius, level = rng.uniform((14, 25), (23, 85))
    d = canvas.lump(rng, voxel, radius, lobes, spikes)
    canvas.paint(d, level - step, mottle, level + step, soft=soft)
    canvas.tissue[d < 20] = 255  # another lesion keeps away
    return d < 0


def opacities(rng, canvas, sick):
    """Give a chest patches of ground glass and consolidation if `sick`.

    Every patient's lungs are then set to a mean that does not depend on `sick`.
    """
    hu, lung = canvas.image[0], canvas.where("lung")
    for voxel in rng.choice(np.argwhere(lung), rng.integers(6, 16) * sick):
        d = np.where(lung, canvas.lump(rng, voxel, rng.uniform(8, 22), 5), 99)
        canvas.paint(d, rng.uniform(-650, 0), 80, soft=rng.uniform(5, 20))
    hu[lung] += rng.uniform(-830, -750) - hu[lung].mean()


# ---- one writer for each layout --------------------------------------------------------------
# It writes the files of patient i and returns what `finish` lists.

SPLITS = ("train", "val", "test")


def amos(i, rng, shape, folder):
    """AMOS22: dataset.json, imagesTr, labelsTr, imagesVa, labelsVa."""
    split = "Tr" if i < COUNTS["amos"][0] else "Va"
    pair = {k: f"./{k}s{split}/amos_{i + 1:04d}.nii.gz" for k in ("image", "label")}
    canvas, spacing = trunk(rng, shape, 223, 378)
    place = placed(rng, shape, spacing)
    save_nifti(folder / pair["label"], canvas.tissue * (canvas.tissue < 16), *place[:2])
    save_nifti(folder / pair["image"], scan(rng, canvas), *place)
    return pair


def brats(i, rng, shape, folder):
    """BraTS 2023: CASE/CASE-{t1n,t1c,t2w,t2f,seg}.nii.gz."""
    case, spacing = f"BraTS-GLI-{i:05d}-000", (2.6, 2.6, 2.85)
    image, labels = brain(rng, shape, spacing)
    for kind, data in zip(("t1n", "t1c", "t2w", "t2f", "seg"), (*image, labels)):
        path = folder / case / f"{case}-{kind}.nii.gz"
        save_nifti(path, np.rint(data).astype(np.int16), np.diag((*spacing, 1)), "LPS")


def deeplesion(i, rng, shape, folder):
    """DeepLesion: DL_info.csv and Images_nifti.

    An image is [row, col, slice] as the NIH script turns it: to the back, the left and the feet.
    """
    *types, middle = PAIRS[i % len(PAIRS)]
    types += types[:1] * (i % 12 == 5)
    canvas, spacing = trunk(rng, shape, middle, 100)
    name, first, last = f"{i + 1:06d}_01_01", i + 1, i + shape[2]
    rows = []
    for kind in types:
        mask = np.flip(lesion(rng, canvas, kind))
        k = mask.sum((0, 1)).argmax()
        x, y = mask[:, :, k].nonzero()
        box = np.array((x.min(), y.min(), x.max() + 1, y.max() + 1))
        rows.append(
            {
                "File_name": f"{name}_{first + k:03d}.png",
                "Patient_index": i + 1,
                "Study_index": 1,
                "Series_ID": 1,
                "Key_slice_index": first + k,
                "Measurement_coordinates": text(*box, *box[[0, 3, 2, 1]]),
                "Bounding_boxes": text(*box + (-1, -1, 1, 1)),
                "Lesion_diameters_Pixel_": text(*box[2:] - box[:2]),
                "Normalized_lesion_location": text(*np.divide((x.mean(), y.mean(), k), shape)),
                "Coarse_lesion_type": -1 if len(rows) == 2 else kind,  # the third's is not known
                "Possibly_noisy": 0,
                "Slice_range": text(first, last),
                "Spacing_mm_px_": text(*spacing),
                "Image_size": text(*shape[1::-1]),
                "DICOM_windows": "-175, 275",
                "Patient_gender": "F",
                "Patient_age": 60,
                "Train_Val_Test": 1,
            }
        )
    path = folder / f"Images_nifti/{name}_{first:03d}-{last:03d}.nii.gz"
    hu = np.flip(scan(rng, canvas)).transpose(1, 0, 2)
    save_nifti(path, hu, np.diag((*-spacing, 1))[[1, 0, 2, 3]])
    return rows


def text(*values):
    return ", ".join(f"{v:g}" for v in values)


def nodule(i, rng, shape, folder):
    """MedMNIST: nodulemnist3d.npz, uint8, 0-255 is -1000 to 400 HU.

    Benign (0): round and smooth; malignant (1): lobes and spicules. A nodule has its own histogram
    or, rank by rank, that of its twin of the other class; which is drawn without a look at the
    label: no statistic of the grey levels (mean, spread, percentiles) tells the classes apart.
    """
    looks = {"background": (rng.uniform(-900, -740), 25)}
    shape = SHAPES["nodule"]
    canvas = Canvas(rng, (0, 0, 0), (1, 1, 1), shape, looks, (0.6, 4))
    vessels = []
    for at in rng.uniform(-14, 14, (6, 3)):
        vessels += ball(at, (14, 1.2, 1.2), rng.uniform(0, 360, 3))
    canvas.paint(canvas.distance(vessels), 0)
    lung, radius = canvas.image, rng.uniform(4, 7)
    twins = []
    for lobes, spikes in rng.integers(((0, 0), (3, 4)), ((2, 1), (7, 9))):
        canvas.image = lung + rng.normal(0, 22, shape)
        d = canvas.lump(rng, (14, 14, 14), radius - 0.2 * lobes, lobes, spikes)
        canvas.paint(d, rng.uniform(-180, 80), 50, soft=rng.uniform(1, 3))
        twins.append(np.clip(canvas.image * 0.18 + 180, 0, 255).astype(np.uint8).ravel())
    label = rng.integers(2)
    image, other = twins[label], rng.choice(twins)
    image[np.lexsort((rng.random(image.size), image))] = np.sort(other)
    return image.reshape(shape), [label]


def ricord(i, rng, shape, folder):
    """RICORD: images; {train,val,test}.txt of lines `images/NAME.nii.gz LABEL`."""
    name, sick = f"images/RICORD-{i + 1:06d}.nii.gz", i % 2
    canvas, spacing = trunk(rng, shape, 447, 290)
    opacities(rng, canvas, sick)
    save_nifti(folder / name, scan(rng, canvas), *placed(rng, shape, spacing))
    return f"{name} {sick}\n"


WRITERS = {
    "amos": amos,
    "brats": brats,
    "deeplesion": deeplesion,
    "nodule": nodule,
    "ricord": ricord,
}


def finish(part, folder, patients):
    """Write the file in which a layout lists or holds all of its patients."""
    ends = np.cumsum(COUNTS[part])[:-1]
    if part == "amos":
        about = {
            "modality": {"0": "CT"},
            "labels": dict(enumerate(list(LOOKS)[:16])),
            "training": patients[: ends[0]],
            "validation": patients[ends[0] :],
        }
        write_json(folder / "dataset.json", about)
    elif part == "deeplesion":
        rows = list(itertools.chain(*patients))
        write_table(folder / "DL_info.csv", rows[0], [row.values() for row in rows])
    elif part == "nodule":
        arrays = {}
        for kind, values in zip(("images", "labels"), zip(*patients)):
            pieces = np.split(np.array(values, np.uint8), ends)
            arrays |= {f"{split}_{kind}": v for split, v in zip(SPLITS, pieces)}
        with write_beside(folder / "nodulemnist3d.npz") as tmp:
            np.savez_compressed(tmp, **arrays)
    elif part == "ricord":
        for split, lines in zip(SPLITS, np.split(patients, ends)):
            write_text(folder / f"{split}.txt", "".join(lines))


# ---- scanners and files ----------------------------------------------------------------------


def scan(rng, canvas):
    """What a CT scanner makes of the patient: int16 HU [X, Y, Z] with the noise of its kernel."""
    hu = canvas.image[0]
    noise = rng.standard_normal(hu.shape, np.float32) * rng.uniform(30, 70)
    hu = hu + gaussian_filter(noise, rng.uniform(0.6, 0.9))
    return np.maximum(np.rint(hu), -1024).astype(np.int16)


def placed(rng, shape, spacing):
    """How a RAS+ volume is stored: its affine (now and then oblique), orientation, intercept."""
    tilt = rng.uniform(-6, 6, 3) * (rng.random() < 0.2)
    axes = Rotation.from_euler("xyz", tilt, degrees=True).as_matrix() * spacing
    affine = nib.affines.from_matvec(axes, rng.normal(0, 20, 3) - axes @ shape / 2)
    orientation = rng.choice(("LPS", "RAS", "LAS", "RPI", "LPI", "PIR"))
    return affine, orientation, rng.choice((0, -1024))


def save_nifti(path, data, affine, orientation="", intercept=0):
    """Write integers [X, Y, Z] as .nii.gz, unless it is there; stored = value - intercept.

    orientation: of the axes on disk, such as LPS, if the data are RAS+.
    """
    if path.exists():
        return
    image = nib.Nifti1Image((data - intercept).astype(data.dtype), affine)
    if orientation:
        ends = nib.orientations.axcodes2ornt(orientation)
        own = nib.io_orientation(affine)
        image = image.as_reoriented(nib.orientations.ornt_transform(own, ends))
    image.set_qform(image.affine, 1)
    image.set_sform(image.affine, 1)
    image.header.set_xyzt_units("mm")
    image.header.set_slope_inter(1, intercept)
    with write_beside(path) as tmp:
        tmp.write_bytes(gzip.compress(image.to_bytes(), 1, mtime=0))


if __name__ == "__main__":
    cli(main)
