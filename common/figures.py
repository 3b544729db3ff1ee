"""The pictures that the stages draw, each a function that takes what it shows and writes a PNG."""

import matplotlib

matplotlib.use("Agg")
from common import run

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import ListedColormap, hsv_to_rgb
from matplotlib.patches import Patch

plt.rc("figure", dpi=120)
plt.rc("figure.constrained_layout", use=True)
plt.rc("axes", titlesize=10)
plt.rc("axes.spines", top=False, right=False)
plt.rc("legend", frameon=False)
plt.rc("axes.formatter", min_exponent=3)  # 20, not 2 x 10^1
# Okabe and Ito's colours, told apart with any colour vision; controls are grey and differ by dash.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
DASHES = {"noise": (0, (1, 1.5)), "image": (0, (6, 2)), "shifted": (0, (5, 1.5, 1, 1.5))}


def grid(images, columns, inches, gap=0):
    """A figure with a row of `columns` panels for each image [3, H, W], in its shape; gap: inches for titles."""
    shapes = [image.shape[1] / image.shape[2] for image in images]
    size = (inches * columns, inches * sum(shapes) + gap * len(images) + 0.8)
    bare = {"xticks": [], "yticks": [], "frame_on": False}
    return plt.subplots(len(images), columns, figsize=size, height_ratios=shapes, squeeze=False, subplot_kw=bare)


def save(figure, path):
    with run.whole_file(path) as temporary:
        figure.savefig(temporary, format="png")
    plt.close(figure)


def draw_features(path, images, maps):
    """Rows of pictures, columns of encoders and native strides; a map's first three principal components as RGB.

    images: float [3, H, W] in [0, 1]; maps: {encoder: for each image {native stride: [C, h, w]}}. The components are
    those of all the pictures shown together, so within a column the same colour means the same direction.
    """
    columns = [(encoder, stride) for encoder, pictures in maps.items() for stride in pictures[0]]
    figure, axes = grid(images, 1 + len(columns), 2.2)
    for axis, image in zip(axes[:, 0], images, strict=True):
        axis.imshow(image.permute(1, 2, 0).numpy())
    axes[0, 0].set_title("picture")
    figure.supxlabel("colours: the first three principal components of a column's maps", fontsize="medium")
    for column, (encoder, stride) in enumerate(columns, 1):
        coloured = principal_colours([picture[stride].float() for picture in maps[encoder]])
        for axis, colours in zip(axes[:, column], coloured, strict=True):
            axis.imshow(colours, interpolation="nearest")
        axes[0, column].set_title(f"{encoder}\nstride {stride}")
    save(figure, path)


def principal_colours(maps):
    """[C, h, w] each -> [h, w, 3] in [0, 1]: three principal components, 2nd to 98th percentile stretched."""
    flat = torch.cat([m.flatten(1) for m in maps], dim=1).T  # [positions of all maps, C]
    flat = torch.nan_to_num(flat - flat.mean(dim=0)).double()
    parts = (flat @ torch.linalg.eigh(flat.T @ flat).eigenvectors[:, -3:].flip(1)).numpy()  # [positions, 3]
    low, high = np.percentile(parts, [2, 98], axis=0)
    colours = np.clip((parts - low) / np.maximum(high - low, 1e-12), 0, 1)
    pieces = np.split(colours, np.cumsum([m[0].numel() for m in maps])[:-1])
    return [piece.reshape(*m.shape[1:], 3) for piece, m in zip(pieces, maps, strict=True)]


def draw_edges(path, rows):
    """Rows of pictures: the image with its edges' centreline, then each encoder's edges by the zone they lie in.

    rows: [(image [3, H, W] in [0, 1], [(title, centreline bool [h, w], edges int [h, w])])], edges 0 for none, 1 core,
    2 near and 3 far; all without the border of one pixel that has no gradient.
    """
    zones = {  # what 02_metrics.py counts as such
        "within 2 map pixels of the centreline (EC)": COLOURS[0],
        "further out within 4 (NC)": COLOURS[4],
        "far (FAR)": COLOURS[3],
        "centreline, no edge there": "black",
    }
    figure, axes = grid([image for image, _ in rows], 1 + len(rows[0][1]), 3.4, gap=0.5)
    colours = {"cmap": ListedColormap(list(zones.values())), "vmin": 1, "vmax": 4, "interpolation": "nearest"}
    for (image, drawings), line in zip(rows, axes, strict=True):
        whole = (0, image.shape[2], 0, image.shape[1])  # maps of any size over the whole panel
        finest = max((centreline for _, centreline, _ in drawings), key=torch.numel)
        panels = [("picture, centreline of its edges", finest, torch.zeros_like(finest)), *drawings]
        for axis, (title, centreline, edges) in zip(line, panels, strict=True):
            zone = torch.where(centreline & (edges == 0), 4, edges).numpy()
            axis.imshow(image.permute(1, 2, 0).numpy(), alpha=0.4, extent=whole)
            axis.imshow(np.ma.masked_equal(zone, 0), extent=whole, **colours)
            axis.set_title(title)
    patches = [Patch(color=colour, label=zone) for zone, colour in zones.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=4)
    save(figure, path)


def draw_profiles(path, metrics, selection=None):
    """SC, EF and ER over stride for each source of metrics.json, 95 % intervals shaded, controls in grey.

    With selection.json's content, master and auxiliary are named and drawn bold and s* is marked.
    """
    panels = {"SC": "Structural Coherence, SC", "EF": "Edge Fidelity, EF", "ER": "edge readout, ER"}
    strides, selection = metrics["strides"], selection or {}
    first, *_ = metrics["scores"].values()
    if run.number(first[str(strides[0])].get("ER", {}).get("mean")) == "-":  # of a few pictures there is no readout
        del panels["ER"]
    roles = {selection.get(role): role for role in ("auxiliary", "master")}
    figure, axes = plt.subplots(1, len(panels), figsize=(9, 4))
    for axis, (score, title) in zip(axes, panels.items(), strict=True):
        for i, (source, profile) in enumerate(metrics["scores"].items()):
            mean, low, high = ([profile[str(s)][score][key] for s in strides] for key in ("mean", "low", "high"))
            if source in metrics["controls"]:
                axis.plot(strides, mean, color="0.45", lw=1.2, ls=DASHES[source], label=f"control: {source}")
                continue
            random = "random weights" if source in metrics["random_weights"] else ""
            label = ", ".join(filter(None, [source, roles.get(source), random]))
            colour, width = COLOURS[i % len(COLOURS)], 2.6 if source in roles else 1.6
            axis.plot(strides, mean, "o-", color=colour, lw=width, label=label)
            axis.fill_between(strides, low, high, color=colour, alpha=0.18, lw=0)
        if selection:
            axis.axvline(selection["stride"], color="0.2", lw=1, zorder=0, label="s*")
        axis.set(title=title, xlabel="output stride")
        axis.set_xscale("log", base=2)
        axis.set_xticks(strides, labels=strides)
        axis.grid(alpha=0.25)
    axes[0].set_ylim(0, 1)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    save(figure, path)


def draw_loss(path, log, terms):
    """These columns of log.csv, {name: [step]}, over its steps: each step faint, on top the mean of up to 50."""
    figure, axis = plt.subplots(figsize=(7, 3.5))
    steps, window = log["step"], min(50, 1 + len(log["step"]) // 4)
    for colour, term in zip(COLOURS, terms, strict=False):
        mean = np.convolve(log[term], np.full(window, 1 / window), "valid")
        axis.plot(steps, log[term], color=colour, lw=0.4, alpha=0.3)
        axis.plot(steps[window // 2 :][: len(mean)], mean, color=colour, lw=1.8, label=term)
    axis.set(xlabel="training step", ylabel=f"loss, weighted (bold: mean of {window} steps)", yscale="log")
    axis.legend(loc="upper right")
    save(figure, path)


def draw_predictions(path, rows, class_names):
    """Rows of pictures: the image, then segments coloured by class over it, each outlined; dark is what none claims.

    rows: [(image uint8 [3, H, W], [(title, segment ids int [H, W] with 0 for none, class index of segment i + 1)])].
    """
    columns, seen = 1 + len(rows[0][1]), set()
    figure, axes = grid([image for image, _ in rows], columns, 4, gap=0.2)
    # Hues a golden ratio apart, so that neighbouring classes differ; lightness differs as well, for all eyes.
    order = np.argsort(np.argsort(0.618 * np.arange(len(class_names)) % 1)) / len(class_names)  # evenly spaced
    hsv = [((0.6 + hue) % 1, 0.75, (0.95, 0.6, 0.8)[i % 3]) for i, hue in enumerate(order)]
    palette = np.array([(0, 0, 0), *map(hsv_to_rgb, hsv)])  # [1 + classes, 3], 0 void
    for (image, drawings), line in zip(rows, axes, strict=True):
        picture = image.permute(1, 2, 0).numpy() / 255
        line[0].imshow(picture)
        line[0].set_title("image")
        for axis, (title, ids, labels) in zip(line[1:], drawings, strict=True):
            ids = ids.numpy()
            classes = np.array([0, *(label + 1 for label in labels)])[ids]  # [H, W], 0 void
            seen.update(np.unique(classes[classes > 0]) - 1)
            mixed = 0.3 * picture + 0.7 * palette[classes]
            mixed[:-1][ids[:-1] != ids[1:]] = 1  # outlines
            mixed[:, :-1][ids[:, :-1] != ids[:, 1:]] = 1
            axis.imshow(mixed)
            axis.set_title(title)
    patches = [Patch(color=palette[label + 1], label=class_names[label]) for label in sorted(seen)]
    patches.append(Patch(color="0.15", label="dark: no segment, or not counted"))
    figure.legend(handles=patches, loc="outside lower center", ncols=2 * columns, fontsize="small")
    save(figure, path)
