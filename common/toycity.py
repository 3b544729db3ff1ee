"""toycity, the embedded benchmark: procedural street scenes in the layout of Cityscapes.

A scene is a small world in metres (X right, Y up, Z ahead along the road) seen by a pinhole
camera. It is painted near to far, each object only where nothing nearer stands, so its labels are
exact to the pixel. An object of which too little would show is left out. Cars and trucks share
palette, glass, wheels and surface, so that shape tells them apart and colour does not.
"""

import math
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFilter
from tqdm import tqdm

H, W = 512, 1024
Y, X = np.arange(H, dtype=np.float32)[:, None], np.arange(W, dtype=np.float32)
EGO, ROAD, SIDEWALK, BUILDING, POLE = 1, 7, 8, 11, 17  # label ids of Cityscapes
VEGETATION, SKY, PERSON, CAR, TRUCK = 21, 23, 24, 26, 27
SPLITS = {"train": 0, "val": 1, "pretrain": 2}  # part of the random seed: no scene is in two splits
COUNTS = {"train": 120, "val": 40}
MIN_PIXELS = 40  # an object that would show less is left out


def colours(text):
    return [ImageColor.getrgb("#" + word) for word in text.split()]


GLASS, TYRE, GREY, BARK, RED, WHITE = colours("4c5966 1e1e21 5c5f62 4e3e30 aa241e e2e0c8")
SKIN = colours("e0b496 bc8a69 78523c 543a2c")
# Likelihood; colours of the sky above, of the sky at the horizon and of clouds; brightness,
# strength of the sun, share of dark windows.
WEATHER = [
    (0.60, *colours("608ecd c4d6e6 ebebeb"), 1.0, 1, 0.98),
    (0.25, *colours("afb6be d4d8dc ebebeb"), 0.95, 0, 0.95),
    (0.15, *colours("465a8c eba582 aaaaaa"), 0.6, 0, 0.6),
]
# What makes a kind of city. Pairs are ranges in metres, but for grey values (asphalt), focal length
# and horizon (in image heights) and centre (in widths). Patterns (wall, paving): height of a row,
# length of a stone, shift, joint.
STREET = dict(
    palette=colours("8e4a3a aa684e c4b498 807e7c 5c626a bcbab6 5c7060 4e5a76 9e8c60 3e383a"),
    greens=colours("3e5c2c 546a32 304e34 68703a"), rough=0.6, leaf=8, pole=0.17, rows=4, people=10,
    asphalt=(92, 118), wall=(0.3, 0.7, 0.5, 0.14), green=0.25, paving=(0.9, 0.9, 0, 0.08),
    window=(0.25, 0.27), storey=3.0, front=(8, 20), tall=(6, 17), trees=(9, 20), road=(5.2, 6.6),
    walk=(3.0, 4.6), focal=(1.1, 1.35), horizon=(0.40, 0.47), eye=(1.35, 1.75), centre=(0.38, 0.62),
    pavement=1.35, bonnet=0.2,
)  # fmt: skip


def noise(rng, height, width, cell, rough):
    """Fractal noise [height, width] in [0, 1]: random grids of `cell` pixels and finer.

    Each grid is weaker than the coarser one by the factor `rough`.
    """
    total = np.zeros((height, width), np.float32)
    for octave in range(5):
        rows, columns = 1 + (height << octave) // cell, 1 + (width << octave) // cell
        grid = rng.integers(0, 256, (rows, columns), dtype=np.uint8)
        # Pillow resizes 8-bit images in integers: the same result on every machine
        layer = Image.fromarray(grid).resize((width, height), Image.Resampling.BILINEAR)
        total += np.asarray(layer, np.float32) * rough**octave
    return total / (255 * sum(rough**octave for octave in range(5)))


def joints(pattern, u, v):
    """Where the joints of a wall or pavement run, u metres along and v up or across: bool."""
    row, length, shift, width = pattern
    return (v / row % 1 < width) | ((u / length + shift * (v // row)) % 1 < width)


def project(points, s):
    """World points [n, 3] -> pixels [n, 2]; what is behind the lens is held before it."""
    x, y, z = points.T
    scale = s.focal / np.maximum(z, 0.7)
    return np.array([s.centre + scale * (x - s.x), s.horizon + scale * (s.eye - y)]).T


def disc(x, y, rx, ry, corners=10):
    turns = [2 * math.pi * i / corners for i in range(corners)]
    return [(x - rx * math.cos(turn), y + ry * math.sin(turn)) for turn in turns]


def solid(profile, half, rgb, glazed=False):
    """A convex prism: profile [(z, y)], clockwise, swept from x = -half to half.

    Returns its faces [(corners [n, 3], rgb)].
    """
    left, right = (np.array([(x, y, z) for z, y in profile]) for x in (-half, half))
    faces = [(left[::-1], rgb), (right, rgb)]
    for i, (_, dy, dz) in enumerate(left - np.roll(left, 1, 0)):
        light = 1 + 0.2 * (dz / math.hypot(dy, dz))  # comes from above
        face = np.array([left[i - 1], left[i], right[i], right[i - 1]])
        faces.append((face, [c * light for c in rgb]))
    if glazed:  # windows all round, none in roof and floor
        walls = [corners for corners, _ in faces if np.ptp(corners[:, 1]) > 0.1]
        for wall in walls:
            faces.append((wall.mean(0) + (wall - wall.mean(0)) * (0.84, 0.74, 0.84), GLASS))
    return faces


def vehicle(label, rng, palette, away):
    """Faces of a car (body and cabin) or a truck (cab and tall box), farther parts first."""
    rgb = palette[rng.integers(len(palette))]
    if label == CAR:
        rear, front, half = -2.15, 2.15, 0.9
        roof, back = rng.uniform(1.4, 1.7), rng.uniform(0.9, 2.0)
        body = solid([(rear, 0.3), (rear, 0.85), (1.1, 0.92), (2.1, 0.72), (front, 0.3)], half, rgb)
        cabin = [(-back, 0.88), (0.3 - back, roof), (0.4, roof), (1.15, 0.9)]
        body += solid(cabin, 0.82, rgb, glazed=True)
    else:
        rear, front, half, roof = -rng.uniform(1.6, 3.2), 2.9, 1.05, rng.uniform(2.4, 3.2)
        # The chassis is dark, as cars have as much dark.
        box = solid([(rear, 0.4), (rear, 0.9), (1.0, 0.9), (1.0, 0.4)], half, TYRE)
        box += solid([(rear, 0.9), (rear, roof), (1.0, roof), (1.0, 0.9)], half, rgb)
        cab = solid([(1.15, 0.4), (1.15, 1.25), (2.85, 1.2), (front, 0.4)], half, rgb)
        cab += solid([(1.15, 1.25), (1.15, 2.15), (2.4, 2.15), (2.85, 1.2)], 0.97, rgb, glazed=True)
        body = cab + box if away else box + cab
    for z in (rear + 0.8, front - 0.8):
        axle = solid(disc(z, 0.36, 0.36, 0.36), half + 0.01, TYRE)
        body = axle + body + axle[:2]  # under the body, but the wheels' sides over it
    bar = np.array([(-0.8, 0.62, 0), (-0.8, 0.72, 0), (0.8, 0.72, 0), (0.8, 0.62, 0)])
    body += [(bar + (0, 0, rear), RED), (bar[::-1] + (0, 0, front), WHITE)]  # lamps
    size = rng.uniform(0.85, 1.12)
    return [(corners * size, colour) for corners, colour in body]


def upright(parts, size=1.0):
    """Polygons [(corners (x, y), rgb)] that face the camera, as faces."""
    faces = []
    for corners, rgb in parts:
        faces.append((np.array([(x * size, y * size, 0) for x, y in corners]), rgb))
    return faces


def person(rng, palette):
    """Faces of a figure; shirt, sleeves and trousers from the common palette."""
    shirt, sleeve, trousers = (palette[i] for i in rng.integers(len(palette), size=3))
    step, size, parts = rng.uniform(-0.3, 0.3), rng.uniform(0.75, 1.08), []
    for x in (step, -step):
        leg = [(-0.12, 0.9), (x - 0.07, 0), (x + 0.14, 0), (0.13, 0.9)]
        arm = [(-0.16, 1.45), (-0.9 * x - 0.3, 0.85), (-0.9 * x - 0.15, 0.82), (0, 1.4)]
        parts += [(leg, trousers), (arm, sleeve)]
    body = [(-0.25, 1.46), (-0.2, 0.8), (0.2, 0.8), (0.25, 1.46), (0.1, 1.54), (-0.1, 1.54)]
    head, hair = disc(0, 1.66, 0.11, 0.14), disc(0, 1.73, 0.12, 0.09)
    return upright([*parts, (body, shirt), (head, SKIN[rng.integers(4)]), (hair, TYRE)], size)


def tree(rng, greens, leaf):
    """Faces of a trunk and of a crown of leaf clusters, the rear ones darker."""
    green, wide, crown = greens[rng.integers(4)], rng.uniform(1.1, 2.0), rng.uniform(3.6, 5.2)
    parts = [([(-0.16, 0), (0.16, 0), (0.1, crown), (-0.1, crown)], BARK)]
    for i in range(80):
        turn, far = rng.uniform(0, 2 * math.pi), wide * math.sqrt(rng.uniform())
        size = rng.uniform(0.15, 0.45)
        cluster = disc(far * math.cos(turn), crown + 0.8 * far * math.sin(turn), size, size, leaf)
        parts.append((cluster, [c * (0.55 + 0.006 * i) * rng.uniform(0.75, 1.2) for c in green]))
    return upright(parts)


def lamp_post(rng, r, side):
    """Faces of a post of radius r and of its arm, over the road, with the lamp."""
    top, arm = rng.uniform(4.5, 7.5), -side * rng.uniform(0.8, 1.8)
    post = [(-r, 0), (r, 0), (r - 0.03, top), (0.03 - r, top)]
    beam = [(0, top), (arm, top), (arm, top + 0.1)]
    return upright([(corners, GREY) for corners in (post, beam, disc(arm, top, 0.36, 0.12))])


def objects(rng, s):
    """All that stands in the street, near to far: [(Z, X, label, yaw, faces)]."""
    found = []
    # Parked vehicles, oncoming ones, our lane, parked vehicles.
    lanes = [1.3 - s.road, 1.2 - s.road / 2, s.road / 2 - 1.2, s.road - 1.3]
    # In this row one vehicle shows its side, at times far away, and none stands beside it. The
    # near road stays free.
    crossing = int(rng.integers(1, s.rows + 2))
    slots = [(lane, row) for lane in range(4) for row in range(lane in (1, 2), s.rows)]
    slots = [slot for slot in slots if slot[1] != crossing]
    labels = rng.permutation([CAR] * rng.integers(3, 7) + [TRUCK] * rng.integers(1, 4)).tolist()
    slots = [(1, crossing), *rng.permutation(slots).tolist()]
    for label, (lane, row) in zip(labels, slots, strict=False):
        x, z = lanes[lane] + rng.uniform(-0.2, 0.2), 8.5 + 8 * row + rng.uniform(-1, 1)
        yaw = rng.uniform(-0.06, 0.06)
        if row == crossing:
            yaw += rng.choice([-1, 1]) * rng.uniform(1.1, 1.9)
        else:
            yaw += math.pi * (lane < 2)
        found.append((z, x, label, yaw, vehicle(label, rng, s.palette, away=math.cos(yaw) > 0)))
    for _ in range(rng.integers(3, 8)):
        x = rng.choice([-1, 1]) * (s.road + rng.uniform(0.4, s.walk - 0.5))
        z = 5.5 + s.people * rng.random() ** 1.5
        if rng.random() < 0.3:  # on the road, between two rows of vehicles
            x, z = rng.uniform(-0.8, 0.8) * s.road, 12.5 + 8 * rng.integers(0, 3)
        found.append((z, x, PERSON, 0, person(rng, s.palette)))
    for side in (-1, 1):
        for z in np.cumsum(rng.uniform(12, 26, 4)) - 6:
            found.append((z, side * (s.road + 0.4), POLE, 0, lamp_post(rng, s.pole, side)))
        for z in np.cumsum(rng.uniform(*s.trees, 4)):
            x = side * (s.road + s.walk * 0.8)
            found.append((z, x, VEGETATION, 0, tree(rng, s.greens, s.leaf)))
    return sorted(found, key=lambda item: item[:2])


def fill(s, where, rgb, label, depth):
    s.image[where], s.labels[where], s.depth[where] = rgb, label, depth


def paint(s, z, x, label, yaw, faces):
    """Paint an object where nothing nearer stands, and its shadow.

    If too little of the object would show, only the shadow is painted.
    """
    cos, sin = math.cos(yaw), math.sin(yaw)
    turn = np.array([(cos, 0, -sin), (0, 1, 0), (sin, 0, cos)])
    fall = np.array([(1, 0, 0), (s.dx, 0, s.dz), (0, 0, 1)])  # along the sun's rays onto the ground
    tile = Image.new("RGBA", (W, H))
    draw, draw_shadow = ImageDraw.Draw(tile), ImageDraw.Draw(s.shadow)
    # The corners of all faces at once are faster than those of each.
    world = np.concatenate([corners for corners, _ in faces]) @ turn + (x, 0, z)
    ends = np.cumsum([len(corners) for corners, _ in faces])[:-1]
    outlines, shadows = (np.split(project(points, s), ends) for points in (world, world @ fall))
    for (_, rgb), seen, fallen in zip(faces, outlines, shadows, strict=True):
        (ax, ay), (bx, by) = seen[1:3] - seen[0]
        if label not in (CAR, TRUCK) or ax * by > bx * ay:  # faces that look away run backwards
            draw.polygon(seen.ravel().tolist(), fill=(*map(int, rgb), 255))
            draw_shadow.polygon(fallen.ravel().tolist(), fill=1)
    left, top, right, bottom = tile.getbbox() or (0, 0, 0, 0)
    tile = np.asarray(tile.crop((left, top, right, bottom)))
    ys, xs = np.nonzero((tile[..., 3] > 0) & (s.labels[top:bottom, left:right] == 0))
    if len(ys) < MIN_PIXELS:
        return
    where = ys + top, xs + left
    fill(s, where, tile[ys, xs, :3] * s.grain[where], label, z)
    if label in s.next_id:
        s.instances[where] = s.next_id[label]
        s.next_id[label] += 1


def paint_row(s, rng, side):
    """Houses and hedges along one side of the street -> where each begins, and its height."""
    starts, leafy = np.cumsum(rng.uniform(*s.front, 60)) - 20, rng.random(60) < s.green
    tall = np.where(leafy, rng.uniform(2 * s.eye, 3.2 * s.eye, 60), rng.uniform(*s.tall, 60))
    tint = np.where(leafy[:, None], rng.choice(s.greens, 60), rng.choice(s.palette, 60))
    # in the plane of the fronts a column of pixels has one distance
    z = s.focal * (s.road + s.walk - s.x * side) / np.maximum(side * (X - s.centre), 10)
    block = np.searchsorted(starts, z, "right") - 1
    up = s.eye - (Y - s.horizon) * (z / s.focal)
    ragged = 1 + leafy[block] * (s.texture[0, (z * 40).astype(int) % 512] - 0.5)
    stands = (up > 0) & (up < tall[block] * ragged)
    where = ys, xs = np.nonzero((s.labels == 0) & (z < 100) & stands)
    block, up, z, leaves = block[xs], up[where], z[xs], leafy[block[xs]]
    fine = s.texture[(up * 45).astype(int) % 512, (z * 45).astype(int) % 512]
    stone = 0.8 + 0.4 * fine - np.minimum(3.5 / z, 0.25) * joints(s.wall, z, up)
    tone = np.where(leaves, 0.3 + 1.3 * fine, stone)
    rgb = np.float32(tint)[block] * (tone * (0.95 - 0.12 * s.sweep * side))[:, None]
    across, floor = z / rng.uniform(2.2, 3.4, 60)[block], up / s.storey
    wide, high = s.window
    # Negative where the pane is.
    frame = np.maximum(np.abs(across % 1 - 0.5) - wide, np.abs(floor % 1 - 0.52) - high)
    frame[leaves | (up > tall[block] - 0.5)] = 1
    rgb[frame < 0.05] = 0.4 * rgb[frame < 0.05] + 110
    glow = rng.random((64, 64))[(floor + 7 * block).astype(int) % 64, across.astype(int) % 64]
    glow = glow[frame < 0, None]
    glass = np.float32(GLASS) * (0.5 + 0.6 * glow)
    rgb[frame < 0] = np.where(glow > s.dark_windows, (225, 180, 110), glass)
    fill(s, where, rgb, np.where(leaves, VEGETATION, BUILDING), z)
    return starts, tall


def paint_ground(s, rng, starts, tall):
    """Road and sidewalks, in the shadow of things and of the sunny side's houses (starts, tall)."""
    where = ys, xs = np.nonzero((s.labels == 0) & (s.horizon + 1 < Y))
    z = s.focal * s.eye / (np.float32(ys) - s.horizon)
    x = (np.float32(xs) - s.centre) * z / s.focal + s.x
    out, near, paved = np.abs(x), np.minimum(10 / z, 1), np.abs(x) > s.road
    broad = s.texture[(z * 5).astype(int) % 512, (x * 5).astype(int) % 512]
    fine = s.texture[(z * 30).astype(int) % 512, (x * 30).astype(int) % 512]
    tone = 0.68 + 0.32 * broad + 0.6 * near * (fine - 0.3)
    tone -= 0.2 * near * (paved & joints(s.paving, x, z))
    tone[paved & (out < s.road + 0.18)] *= 1.25  # the kerb
    greys = rng.uniform(*s.asphalt, (2, 1)) * rng.uniform(0.94, 1.06, (2, 3))
    greys = greys * [[1], [s.pavement]]  # [2, 3], road and sidewalk
    rgb = np.float32(greys)[paved.astype(int)] * tone[:, None]
    dash, zebra = rng.uniform(5, 9), rng.uniform(8, 40)
    mark = (out < 0.09) & (z / dash % 1 < 0.5) | (np.abs(out - s.road + 2.5) < 0.07)
    mark |= (np.abs(z - zebra) < 1.5) & (x % 1 < 0.5) & ~paved
    rgb[mark] = 0.35 * rgb[mark] + (78 + 78 * broad[mark])[:, None]
    house = np.searchsorted(starts, z - s.dz * 5, "right") - 1
    dark = np.asarray(s.shadow)[where] | (s.road + s.walk + x * s.sweep < tall[house] * abs(s.dx))
    rgb[dark] *= s.shade
    fill(s, where, rgb, np.where(paved, SIDEWALK, ROAD), z)


def scene(split, index, seed=0, style=STREET):
    """Returns the image uint8 [512, 1024, 3], label ids uint8 and instance ids int32 [512, 1024].

    An instance id is the label id for stuff and void, and label id * 1000 + number for things.
    """
    rng = np.random.default_rng((seed, SPLITS[split], index))
    s = SimpleNamespace(**style)  # the scene: its style, then what is drawn
    for name in ("road", "walk", "focal", "horizon", "eye", "centre"):
        setattr(s, name, rng.uniform(*getattr(s, name)))
    s.focal, s.horizon, s.centre = H * s.focal, H * s.horizon, W * s.centre  # in pixels
    s.x = s.road / 2 - 1.2 + rng.uniform(-0.4, 0.4)  # the camera's place in its lane
    weather = WEATHER[rng.choice(3, p=[row[0] for row in WEATHER])]
    _, high, low, white, gain, sun, s.dark_windows = weather
    sunny_side, s.shade = int(rng.choice([-1, 1])), rng.uniform(0.45, 0.65)
    s.sweep = -sunny_side * sun  # the side to which shadows fall, 0 without sun
    # The shadow of a metre of height.
    s.dx, s.dz = s.sweep * rng.uniform(0.2, 1.1), sun * rng.uniform(-0.3, 0.6)
    s.texture = noise(rng, 512, 512, 32, s.rough)
    s.grain = 0.75 + 0.5 * noise(rng, H, W, 64, s.rough)[..., None]
    s.shadow = Image.new("1", (W, H))
    s.image, s.depth = np.zeros((H, W, 3), np.float32), np.zeros((H, W), np.float32)
    s.labels, s.instances = np.zeros((H, W), np.uint8), np.zeros((H, W), np.int32)
    s.next_id = {label: label * 1000 for label in (PERSON, CAR, TRUCK)}
    if rng.random() < s.bonnet:  # the bonnet of the car that carries the camera
        depth = Y - H + rng.uniform(30, 70) * (1 - 12 * (X / W - 0.5) ** 4)
        light = 0.5 + 0.012 * np.minimum(depth, 50)[..., None]
        bonnet = np.float32(s.palette[rng.integers(10)]) * light * s.grain
        fill(s, depth > 0, bonnet[depth > 0], EGO, 1)
    for item in objects(rng, s):
        paint(s, *item)
    rows = {side: paint_row(s, rng, side) for side in (-1, 1)}
    paint_ground(s, rng, *rows[sunny_side])
    hills = (s.labels == 0) & (s.horizon - 0.12 * H * noise(rng, 1, W, 128, 0.5) ** 2 < Y)
    fill(s, hills, np.float32(s.greens[0]) * (2.2 * s.grain[hills] - 1.2), VEGETATION, 160)
    sky, high, low = s.labels == 0, np.float32(high), np.float32(low)
    cloud = np.clip(noise(rng, H, W, 256, 0.6)[sky][:, None] * 2.2 - 1, 0, 0.7)
    blue = high + (low - high) * np.minimum(np.float32(np.nonzero(sky)[0]) / s.horizon, 1)[:, None]
    fill(s, sky, blue * (1 - cloud) + np.float32(white) * cloud, SKY, 0)
    # haze, light, lens and sensor
    clear, warm = 1 / (1 + s.depth / rng.uniform(150, 700))[..., None], rng.uniform(-0.08, 0.08)
    light = np.float32([gain + warm, gain, gain - warm])
    image = (s.image * clear + low * (1 - clear)) * light * rng.uniform(0.85, 1.15)
    lens = Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).filter(ImageFilter.BoxBlur(0.5))
    image = np.asarray(lens, np.int16) + rng.integers(-5, 6, (H, W, 3), dtype=np.int8)
    instances = np.where(s.instances, s.instances, s.labels)
    return np.clip(image, 0, 255).astype(np.uint8), s.labels, instances


def write(root, counts=COUNTS, style=STREET):
    """Write counts = {split: scenes} under `root`, unless it exists.

    All goes to a folder beside `root` that takes its name at the end. What is there is complete.
    """
    root = Path(root)
    if root.exists():
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    scratch = tempfile.TemporaryDirectory(prefix=f".{root.name}.", dir=root.parent)
    partial = Path(scratch.name) / root.name
    for split in counts:
        (partial / "leftImg8bit" / split / "toycity").mkdir(parents=True)
        (partial / "gtFine" / split / "toycity").mkdir(parents=True)

    def write_scene(job):
        image, labels, instances = map(Image.fromarray, scene(*job, style=style))
        stem = "{}/toycity/toycity_000000_{:06d}".format(*job)
        # A BMP is read and written in a tenth of a PNG's time.
        image.save(partial / f"leftImg8bit/{stem}_leftImg8bit.bmp")
        labels.save(partial / f"gtFine/{stem}_gtFine_labelIds.png", compress_level=1)
        instances = instances.convert("I;16")
        instances.save(partial / f"gtFine/{stem}_gtFine_instanceIds.png", compress_level=1)

    jobs = [(split, index) for split, count in counts.items() for index in range(count)]
    # Two threads help, as NumPy and the PNG encoder let go of the interpreter's lock.
    with scratch, ThreadPoolExecutor(2) as pool:
        list(tqdm(pool.map(write_scene, jobs), total=len(jobs), desc=f"drawing {root.name}"))
        try:
            partial.rename(root)
        except OSError:
            if not root.exists():  # else another process was faster
                raise
