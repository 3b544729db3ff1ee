"""The figures that the stages draw. Each function takes what it shows and writes one PNG file.

They are made without pyplot, so they need no display and leave a notebook's backend as it is.
"""

from typing import NamedTuple

from common import run

import matplotlib
import numpy as np
import torch
from matplotlib.colors import hsv_to_rgb, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

# Okabe and Ito's colours can be told apart with any colour vision.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
matplotlib.rcParams.update(
    {
        "figure.dpi": 120,
        "figure.constrained_layout.use": True,
        "axes.titlesize": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.formatter.min_exponent": 3,  # A logarithmic axis says 20, not 2 x 10^1.
        "axes.prop_cycle": matplotlib.cycler(color=COLOURS),  # Called "C0", "C1", ... below.
        "legend.frameon": False,
    }
)
# Controls are grey, and their dashes tell them apart.
DASHES = {"noise": ":", "image": "--", "shifted": "-."}
# Zones 1, 2 and 3 are those of an EdgePanel. The last one is drawn where these are not.
ZONES = {
    "core: within 2 map pixels of an image edge (EC)": "#0072B2",  # blue
    "near: further out, within 4 (NC)": "#E69F00",  # orange
    "far (FAR)": "#CC79A7",  # pink
    "thinned image edge": "black",
}


class EdgePanel(NamedTuple):
    """The edges of one feature map, for draw_edges."""

    title: str
    thinned: torch.Tensor  # bool [h, w], the thinned image edges at the map's size
    zones: torch.Tensor  # int [h, w], 0 where the map has no edge, 1 core, 2 near, 3 far


class SegmentPanel(NamedTuple):
    """The segments of one image, for draw_predictions."""

    title: str
    ids: torch.Tensor  # int [H, W], 0 void, 1 the first segment
    labels: list[int]  # class index of each segment


# ------------------------------------------------------------------ rows of images
def draw_rows(rows, inches):
    """Make a figure with a row of panels for each image.

    rows: for each image {title: pixels [h, w, 3] in [0, 1]}, with the image itself as "image";
    inches: width of a panel.
    """
    proportions = []
    for row in rows:
        height, width, _ = row["image"].shape
        proportions.append(height / width)
    columns = len(rows[0])
    # Titles take some 0.3 inches a row, and the legend below 0.8.
    figure_height = inches * sum(proportions) + 0.3 * len(rows) + 0.8
    figure = Figure(figsize=(inches * columns, figure_height))
    axes = figure.subplots(len(rows), columns, height_ratios=proportions, squeeze=False)
    for row, row_axes in zip(rows, axes, strict=True):
        for axis, (title, pixels) in zip(row_axes, row.items(), strict=True):
            # The pixels of a small map stay visible. An image has more than its panel can show.
            interpolation = "auto"
            if pixels.size < row["image"].size:
                interpolation = "nearest"
            axis.imshow(pixels, interpolation=interpolation)
            axis.axis("off")
            axis.set_title(title)
    return figure


def pixels_of(image):
    """Return an image [3, H, W] as the array [H, W, 3] that matplotlib shows."""
    return image.permute(1, 2, 0).numpy()


def save(figure, path):
    """Write a figure as PNG."""
    with run.whole_file(path) as temporary:
        figure.savefig(temporary, format="png")


def draw_features(path, images, maps):
    """Draw a row for each image and a column for each encoder and native stride.

    A map's first three principal components are its red, green and blue. They are those of all
    images together, so within a column the same colour means the same direction.

    images: float [3, H, W] in [0, 1]; maps: {encoder: for each image {native stride: [C, h, w]}}.
    """
    rows = [{"image": pixels_of(image)} for image in images]
    for encoder, maps_of_images in maps.items():
        for stride in maps_of_images[0]:
            features = [native_maps[stride] for native_maps in maps_of_images]
            for row, colours in zip(rows, principal_colours(features), strict=True):
                row[f"{encoder}\nstride {stride}"] = colours
    figure = draw_rows(rows, inches=2.2)
    figure.supxlabel("colours: a column's first three principal components", fontsize=10)
    save(figure, path)


def principal_colours(maps):
    """Return an array [h, w, 3] in [0, 1] for each map [C, h, w]: three principal components."""
    features = torch.cat([feature.flatten(1) for feature in maps], dim=1).T.float()
    # Infinity becomes the largest float32, whose square a float64 can hold.
    centred = torch.nan_to_num(features - features.mean(dim=0)).double()  # [positions, C]
    _, directions = torch.linalg.eigh(centred.T @ centred)  # [C, C], the principal one last
    components = (centred @ directions[:, -3:].flip(1)).numpy()  # [positions, 3]

    # Without these percentiles a few extreme positions would leave all others nearly grey.
    low, high = np.percentile(components, [2, 98], axis=0)
    colours = np.clip((components - low) / (high - low + 1e-12), 0, 1)

    coloured = []
    for feature in maps:
        height, width = feature.shape[1:]
        of_map, colours = np.split(colours, [height * width])
        coloured.append(of_map.reshape(height, width, 3))
    return coloured


def draw_edges(path, rows):
    """Draw a row for each image: its thinned edges, then each encoder's edges by their zone.

    rows: [(image float [3, H, W] in [0, 1], [EdgePanel])]. The panels may have different sizes.
    They lack the image's border of one map pixel, where there is no gradient.
    """
    drawn = []
    for image, panels in rows:
        finest = max((panel.thinned for panel in panels), key=torch.numel)
        row = {"image": paint_zones(image, finest, torch.zeros_like(finest))}
        for panel in panels:
            row[panel.title] = paint_zones(image, panel.thinned, panel.zones)
        drawn.append(row)
    figure = draw_rows(drawn, inches=3.4)
    patches = [Patch(color=colour, label=zone) for zone, colour in ZONES.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=2, fontsize="small")
    save(figure, path)


def paint_zones(image, thinned, zones):
    """Return pixels [H, W, 3]: an EdgePanel's edges over the faded image [3, H, W]."""
    zones = torch.where(thinned & (zones == 0), len(ZONES), zones).byte()  # [h, w]
    zones = torch.nn.functional.interpolate(zones[None, None], image.shape[1:])[0, 0]  # [H, W]
    pixels = 0.4 * pixels_of(image) + 0.6
    for zone, colour in enumerate(ZONES.values(), start=1):
        pixels[zones.numpy() == zone] = to_rgb(colour)
    return pixels


def draw_predictions(path, rows, class_names):
    """Draw a row for each image: the image, then over it segments in the colours of their classes.

    rows: [(image uint8 [3, H, W], [SegmentPanel])].
    """
    # Void is drawn as one more class, the last one.
    names = [*class_names, "dark: no segment, or not counted"]
    palette = np.vstack([class_colours(len(class_names)), np.zeros(3)])  # [classes + 1, 3]
    drawn = []
    seen = set()
    for image, panels in rows:
        pixels = pixels_of(image) / 255
        row = {"image": pixels}
        for panel in panels:
            ids = panel.ids.numpy()
            classes = np.array([len(class_names), *panel.labels])[ids]  # [H, W]
            seen.update(np.unique(classes))
            painted = 0.3 * pixels + 0.7 * palette[classes]
            # White lines run between segments.
            painted[:-1][np.diff(ids, axis=0) != 0] = 1
            painted[:, :-1][np.diff(ids, axis=1) != 0] = 1
            row[panel.title] = painted
        drawn.append(row)
    figure = draw_rows(drawn, inches=4)
    patches = [Patch(color=palette[index], label=names[index]) for index in sorted(seen)]
    columns = 2 * len(drawn[0])
    figure.legend(handles=patches, loc="outside lower center", ncols=columns, fontsize="small")
    save(figure, path)


def class_colours(count):
    """Return RGB colours [count, 3] in [0, 1]."""
    # Hues follow one another by the golden ratio, so that those of neighbouring classes differ.
    # Their ranks space them evenly. Brightness differs as well, for all eyes.
    ranks = np.argsort(np.argsort(0.618 * np.arange(count) % 1))
    hues = (0.6 + ranks / count) % 1
    brightness = np.resize([0.95, 0.6, 0.8], count)
    return hsv_to_rgb(np.column_stack([hues, np.full(count, 0.75), brightness]))


# ------------------------------------------------------------------ curves
def draw_profiles(path, metrics, selection=None):
    """Draw SC, EF and ER over output stride, with 95 % intervals shaded and controls in grey.

    metrics: the content of metrics.json. selection: that of selection.json, with which master and
    auxiliary are named and drawn bold, and s* is marked if there is one.
    """
    selection = selection or {}
    roles = {selection.get("auxiliary"): "auxiliary", selection.get("master"): "master"}
    titles = {"SC": "Structural Coherence, SC", "EF": "Edge Fidelity, EF"}
    # The linear edge probe is not fitted on few images, and then no source has an ER.
    if np.isfinite(values_of(metrics["scores"]["noise"], "ER", "mean")).any():
        titles["ER"] = "linear edge probe, ER"

    figure = Figure(figsize=(9, 4))
    axes = figure.subplots(1, len(titles))
    for axis, (score, title) in zip(axes, titles.items(), strict=True):
        for number, source in enumerate(metrics["scores"]):
            draw_profile(axis, metrics, source, score, f"C{number}", roles.get(source))
        if selection.get("stride"):
            axis.axvline(str(selection["stride"]), color="0.2", linewidth=1, zorder=0, label="s*")
        axis.set(title=title, xlabel="output stride")
        axis.grid(alpha=0.25)
    axes[0].set_ylim(0, 1)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    save(figure, path)


def draw_profile(axis, metrics, source, score, colour, role):
    """Draw one score of one encoder or control over output stride."""
    profile = metrics["scores"][source]
    strides = list(profile)  # As they are text, they stand at equal distances.
    mean = values_of(profile, score, "mean")
    if source in DASHES:
        axis.plot(strides, mean, DASHES[source], color="0.45", label=f"control: {source}")
        return
    label = source
    if role:
        label += f", {role}"
    if source in metrics["random_weights"]:
        label += ", random weights"
    axis.plot(strides, mean, "o-", color=colour, linewidth=2.6 if role else 1.5, label=label)
    low = values_of(profile, score, "low")
    high = values_of(profile, score, "high")
    axis.fill_between(strides, low, high, color=colour, alpha=0.18, linewidth=0)


def values_of(profile, score, key):
    """Return the "mean", "low" or "high" of a score at each stride, NaN where JSON has null."""
    return np.array([scores[score][key] for scores in profile.values()], dtype=float)


def draw_loss(path, log, terms):
    """Draw losses over the training step: each step faint, and on top their mean over up to 50.

    log: {column of log.csv: array [steps]}; terms: the columns to draw.
    """
    steps = log["step"]
    window = min(50, 1 + len(steps) // 4)
    figure = Figure(figsize=(7, 3.5))
    axis = figure.subplots()
    for number, term in enumerate(terms):
        # A mean stands at the middle of its window, so there is none near both ends.
        means = np.convolve(log[term], np.full(window, 1 / window), "valid")
        middles = steps[window // 2 :][: len(means)]
        axis.plot(steps, log[term], color=f"C{number}", linewidth=0.4, alpha=0.3)
        axis.plot(middles, means, color=f"C{number}", linewidth=1.8, label=term)
    axis.set(
        xlabel="training step",
        ylabel=f"loss, weighted (bold: mean of {window} steps)",
        yscale="log",
    )
    axis.legend(loc="upper right")
    save(figure, path)
