"""Stage 5: evaluate the trained model.

    python 05_eval.py                           on its benchmark's validation images, runs/toycity
    python 05_eval.py --limit 100               on some of them, evenly spaced
    python 05_eval.py --images holiday/         draw its predictions on your own images, no scores
    python 05_eval.py --compare runs/*          no model: one table of what several runs scored

One model answers up to three questions. Semantic segmentation: which class is each pixel (mIoU)?
Instance segmentation: where is each thing, with which confidence (AP)? Panoptic segmentation: one
label for each pixel, with things told apart (PQ).

From Python, load_trained() gives a run's model, predict() runs it on an image, and semantic(),
instances() and panoptic() decode the prediction.

Reads run.json and checkpoint.pt. Writes results.json, results.md and predictions.png, with all
scores in percent. With --limit the files' names say so.
"""

import contextlib
import io
import json
import shlex
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from common import figures, run
from common.datasets import BENCHMARKS, CITYSCAPES_VOID, encode_mask, open_split
from common.figures import SegmentPanel
from common.images import count_pairs, list_images, read_image, reading, relabel, working_size
from common.model import PADDING, build_model
from common.run import CORES, DEVICES, UserError, flag, natural, positive, require

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy import ndimage
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm


# ------------------------------------------------------------------ settings
@dataclass
class Settings:
    run: Path = flag(Path("runs/toycity"), "run folder")
    data: Path | None = flag(None, "data root (default: as in stage 1)")
    limit: int | None = flag(None, "evaluate this many images, evenly spaced", type=positive)
    images: Path | None = flag(None, "draw predictions on a folder of images", metavar="FOLDER")
    compare: tuple[Path, ...] = flag((), "print a table of several runs", metavar="RUN", nargs="+")
    device: str = flag(DEVICES[0], choices=DEVICES)
    workers: int = flag(CORES, "processes that read images", type=natural)


# The scores in tables, in this order
HEADLINE = ("mIoU", "mIoU_th", "boundary_mIoU", "AP", "AP50", "AP_things", "PQ", "PQ_th", "PQ_st")
PER_CLASS = {"mIoU": "IoU", "AP": "AP", "PQ": "PQ"}  # what a metric is called for one class


# ------------------------------------------------------------------ inference
class Prediction(NamedTuple):
    """What a model's Q queries see in an image."""

    class_probabilities: torch.Tensor  # float32 [Q, classes + 1], no-object last
    masks: torch.Tensor  # float32 [Q, H, W], mask probabilities


class Instances(NamedTuple):
    masks: torch.Tensor  # bool [N, H, W]
    labels: torch.Tensor  # int64 [N], class indices
    confidences: torch.Tensor  # float32 [N] in [0, 1]


@torch.inference_mode()
def predict(model, image, size, device="cpu"):
    """Run a model on one image: a Prediction at the image's own size.

    image: uint8 [3, H, W]. size: the working size, as in working_size(); the image is padded to
    multiples of 32. The mask logits are enlarged before anything is decided.
    """
    height, width = image.shape[1:]
    working_height, working_width = working_size(height, width, size, multiple=1)
    image = TF.resize(image, (working_height, working_width), antialias=True).float() / 255
    padding = (0, -working_width % 32, 0, -working_height % 32)
    image = F.pad(image, padding, value=PADDING)[None].to(device)  # [1, 3, h, w]
    class_logits, mask_logits = model(image)[-1]  # [1, Q, classes + 1], [1, Q, h/4, w/4]

    # The size of the padded image, in pixels of the original
    padded_height = round(image.shape[2] * height / working_height)
    padded_width = round(image.shape[3] * width / working_width)
    padded_size = (padded_height, padded_width)
    masks = F.interpolate(mask_logits.float(), padded_size, mode="bilinear", align_corners=False)
    # What was padded is cropped again.
    masks = masks[0, :, :height, :width].sigmoid_()
    return Prediction(class_logits[0].float().softmax(-1), masks)


def semantic(prediction):
    """The class of each pixel, int64 [H, W].

    Each query votes for its classes where its mask is.
    """
    probabilities = prediction.class_probabilities[:, :-1]
    votes = torch.einsum("qc,qhw->chw", probabilities, prediction.masks)
    return votes.max(0).indices.cpu()  # on a CPU far faster than argmax


def instances(prediction, isthing, top=100):
    """The things among the `top` best pairs of query and class: Instances.

    confidence = class probability * mean mask probability inside the mask

    isthing: for each class, is it a thing?
    """
    # The best pairs over all queries and classes. The last class, no-object, is none of them.
    probabilities = prediction.class_probabilities[:, :-1]
    classes = probabilities.shape[1]
    best = probabilities.flatten().topk(min(top, probabilities.numel()))
    queries = best.indices // classes
    labels = best.indices % classes
    is_thing = torch.tensor(isthing, device=labels.device)[labels]
    queries = queries[is_thing]
    labels = labels[is_thing]
    # A query may appear with several classes, and its mask is judged once. One after the other, as
    # one mask fits into a CPU's cache.
    binary = prediction.masks > 0.5
    quality = []
    for probability, inside in zip(prediction.masks, binary, strict=True):
        quality.append((probability * inside).sum() / inside.count_nonzero().clamp_min(1))
    confidences = best.values[is_thing] * torch.stack(quality)[queries]
    return Instances(binary[queries].cpu(), labels.cpu(), confidences.cpu())


def panoptic(prediction, isthing, score_threshold=0.8, overlap_threshold=0.8):
    """Segment ids int64 [H, W], 0 where nothing is claimed, and segments [{"id", "label"}].

    A query takes part if its best class is not no-object and has a probability above
    score_threshold. Each pixel goes to the query with the highest probability * mask. A query that
    keeps less than overlap_threshold of its own mask is dropped. Stuff of one class is one segment.
    """
    scores, labels = prediction.class_probabilities.max(-1)
    no_object = prediction.class_probabilities.shape[1] - 1
    chosen = (labels < no_object) & (scores > score_threshold)
    masks = prediction.masks[chosen]  # a copy, so that mul_() changes nothing else
    binary = masks >= 0.5
    ids = torch.zeros(masks.shape[1:], dtype=torch.int64, device=masks.device)
    segments = []
    if len(masks) == 0:
        return ids.cpu(), segments
    # Each pixel has one owner, whose mask it need not be inside.
    owner = masks.mul_(scores[chosen][:, None, None]).max(0).indices  # [H, W]
    stuff_id = {}  # {label: segment id}
    for query, label in enumerate(labels[chosen].tolist()):
        region = binary[query] & (owner == query)
        area = region.sum()
        if area == 0 or area < overlap_threshold * binary[query].sum():
            continue
        if not isthing[label] and label in stuff_id:
            segment_id = stuff_id[label]
        else:
            segment_id = len(segments) + 1
            segments.append({"id": segment_id, "label": label})
            stuff_id[label] = segment_id
        ids[region] = segment_id
    return ids.cpu(), segments


# ------------------------------------------------------------------ evaluation
def evaluate(model, samples, size, settings, indices):
    """Score a model on the images `indices` of a validation split, at the working `size`.

    Returns {metric: the result of its score}, for the split's metrics.
    """
    model.to(settings.device).eval()
    scores = {metric: make_score(metric, samples) for metric in samples.metrics}
    loader = DataLoader(
        Subset(samples, indices), batch_size=None, **run.loader_arguments(settings.workers)
    )
    for sample in tqdm(loader, "evaluating", unit="image"):
        prediction = predict(model, sample["image"], size, settings.device)
        for metric, score in scores.items():
            decoded = decode(metric, prediction, samples)
            score.update(**decoded, **sample["truth"][metric])
            del decoded  # large, so it goes before the next is made
        del prediction
    return {metric: score.result() for metric, score in scores.items()}


def make_score(metric, samples):
    """The score that computes a metric as the data set's official tool does."""
    categories = samples.categories
    if metric == "mIoU":
        return SemanticScore([category.name for category in categories])
    if metric == "PQ":
        return PanopticScore([category._asdict() for category in categories])
    if samples.coco:
        return CocoInstanceScore(samples.coco.file)
    thing_ids = {category.name: category.id for category in categories if category.isthing}
    return CityscapesInstanceScore(thing_ids, samples.excluded_from_mean)


def decode(metric, prediction, samples):
    """What a score's update() takes of a prediction, by name."""
    category_ids = torch.tensor([category.id for category in samples.categories])
    isthing = [category.isthing for category in samples.categories]
    if metric == "mIoU":
        return {"pred": semantic(prediction)}
    if metric == "AP":
        found = instances(prediction, isthing)
        # Both scores take the data set's own category ids, under different names.
        ids_name = "category_ids" if samples.coco else "labels"
        ids = category_ids[found.labels]
        return {"masks": found.masks, ids_name: ids, "scores": found.confidences}
    # Scores compare the data set's own category ids.
    segment_ids, segments = panoptic(prediction, isthing)
    for segment in segments:
        segment["category_id"] = int(category_ids[segment["label"]])
    return {"pred_ids": segment_ids, "pred_segments": segments}


# ------------------------------------------------------------------ figures
def segment_panels(model, training, sample, device):
    """Panels of predictions.png: the truth, if the sample has one, and the prediction."""
    image = sample["image"]
    panels = []
    if "rles" in sample:
        masks = [torch.from_numpy(rle.decode(mask)).bool() for mask in sample["rles"]]
        panels.append(SegmentPanel("truth", paint(masks, image), sample["labels"].tolist()))
    elif "segments" in sample:
        panels.append(SegmentPanel("truth", sample["segments"], sample["labels"].tolist()))

    prediction = predict(model, image, training["recipe"]["test_size"], device)
    task = BENCHMARKS[training["benchmark"]].task
    if task == "semantic":
        ids = semantic(prediction) + 1
        labels = list(range(len(training["class_names"])))
    elif task == "panoptic":
        ids, segments = panoptic(prediction, training["isthing"])
        labels = [segment["label"] for segment in segments]
    else:
        found = instances(prediction, training["isthing"])
        order = found.confidences.argsort()  # the most confident one on top
        shown = order[found.confidences[order] > 0.5]
        ids = paint(found.masks[shown], image)
        labels = found.labels[shown].tolist()
    return [*panels, SegmentPanel("prediction", ids, labels)]


def paint(masks, image):
    """Masks bool [H, W] that may overlap, each over the one before, as segment ids int32 [H, W]."""
    ids = torch.zeros(image.shape[1:], dtype=torch.int32)
    for number, mask in enumerate(masks, 1):
        ids[mask] = number
    return ids


def draw_folder(model, training, settings):
    """Draw predictions/<image>.png for each image of a folder. Its sub-folders are kept."""
    folder = settings.run / "predictions"
    model.to(settings.device)
    for name in tqdm(list_images(settings.images), "predicting", unit="image"):
        try:
            image = read_image(settings.images / name)
        except UserError as error:
            tqdm.write(f"left out: {error}", file=sys.stderr)
            continue
        panels = segment_panels(model, training, {"image": image}, settings.device)
        path = folder / f"{name}.png"
        figures.draw_predictions(path, [(image, panels)], training["class_names"])
    print(f"wrote {folder}/")


# ------------------------------------------------------------------ report
def headline(results, samples, benchmark):
    """The scores that a reader compares: {name: percent}."""
    numbers = {}
    for result in results.values():
        numbers.update(result)
    things = [category.name for category in samples.categories if category.isthing]
    if "mIoU" in results and 0 < len(things) < len(samples.categories):
        of_things = [results["mIoU"]["per_class"][name] for name in things]
        numbers["mIoU_th"] = mean(of_things)  # without stuff it would equal mIoU
    if benchmark == "kitti360_instance":  # the paper's mean is over Cityscapes' eight things
        per_class = results["AP"]["per_class"]
        numbers["AP_things"] = mean([ap for name, ap in per_class.items() if name != "building"])
    return {name: numbers[name] for name in HEADLINE if name in numbers}


def describe(training, samples, images):
    """Two lines of what was trained and of what it is evaluated on."""
    if training["fusion"] == "none":
        model = f"{training['master']}, alone"
    else:
        place = f"at stride {training['stride']}, fusion {training['fusion']}"
        model = f"{training['master']}, {training['auxiliary']} {place}"
    benchmark = BENCHMARKS[training["benchmark"]]
    trained_on = benchmark.train_on.folder or training["benchmark"]
    steps = f"{training['recipe']['steps']} steps on {trained_on} train"
    text = f"{model}, {steps}, seed {training['seed']}, percent\n"
    for encoder, weights in training["weights"].items():
        if weights == "none":
            text += f"RANDOM WEIGHTS at the start: {encoder}\n"
    kind = "images held out of train" if samples.held_out else "images"
    evaluated_on = f"{training['benchmark']}, {images} of {len(samples)} {kind}"
    text += f"\n{evaluated_on}"
    if benchmark.paper != "-":
        text += f", the paper has {', '.join(benchmark.metrics)} {benchmark.paper}"
    return text + "\n"


def report(path, results, samples, training, images):
    """Write <path>.json and <path>.md, and return the latter's text.

    path: without a suffix. images: how many were evaluated.
    """
    shown = headline(results, samples, training["benchmark"])
    scores = dict(shown)
    per_class = {}
    for metric, result in results.items():
        for name, value in result.items():
            if name == "per_class":
                per_class[metric] = value
            else:
                scores[name] = value
    kept = ("master", "auxiliary", "stride", "fusion", "master_mode", "aux_mode", "seed", "weights")
    model = {key: training[key] for key in kept}
    content = {
        "benchmark": training["benchmark"],
        "model": {**model, "steps": training["recipe"]["steps"]},
        "images": images,
        "scores": scores,
        "per_class": per_class,
    }
    run.write_json(path.with_name(f"{path.name}.json"), content)

    rows = [["class", *(PER_CLASS[metric] for metric in per_class)]]
    first = next(iter(per_class.values()))
    for name in first:
        row = [name]
        for column in per_class.values():
            row.append(run.number(column.get(name)))
        rows.append(row)
    text = describe(training, samples, images)
    text += "\n" + run.table([list(shown), [run.number(value) for value in shown.values()]])
    text += "\n" + run.table(rows)
    run.write_text(path.with_name(f"{path.name}.md"), text)
    return text


def compare(folders):
    """A table with a row for each run, sorted by benchmark and stride."""
    head = ["run", "benchmark", "master", "auxiliary", "OS", "fusion", "steps"]
    names = ("mIoU", "boundary_mIoU", "AP", "PQ")
    runs = []
    for folder in folders:
        if folder.is_file():  # runs/* may name some
            continue
        try:
            results = run.read_stage(folder, "results.json", "05_eval.py")
            model = results["model"]
            words = [folder.resolve().name, results["benchmark"], model["master"]]
            words.append(model["auxiliary"] or "-")
            # Names often differ at their ends only.
            row = [word if len(word) <= 12 else f"…{word[-11:]}" for word in words]
            stride = int(model["stride"] or 0)
            row.append(str(model["stride"] or "-"))
            # The usual modes, a finetuned master and a frozen auxiliary, are not named.
            fusion = model["fusion"]
            if model["master_mode"] == "frozen":
                fusion += ", frozen master"
            if model["fusion"] != "none" and model["aux_mode"] == "finetuned":
                fusion += ", finetuned auxiliary"
            row.append(fusion)
            row.append(str(model["steps"]))
            row += [run.number(results["scores"].get(name)) for name in names]
            runs.append((results["benchmark"], stride, row))
        except (UserError, KeyError, TypeError, ValueError, AttributeError):
            print(f"left out: {folder} holds no results.json of an evaluation on all images")
    require(runs, "none of these folders holds results: run 05_eval.py on them first")
    runs.sort(key=lambda entry: entry[:2])
    rows = [row for _, _, row in runs]
    return run.table([[*head, *names], *rows])


# ------------------------------------------------------------------ the stage
def load_trained(folder):
    """The model of a run folder's checkpoint, in eval mode, and what it was trained with.

    The latter is the dictionary `training` of 04_train.py. UserError if the checkpoint is missing,
    damaged or another project's.
    """
    path = folder / "checkpoint.pt"
    again = f"run `{run.command('04_train.py', folder)}`"
    require(path.is_file(), f"{path} is missing: {again} first")
    try:
        checkpoint = run.read_checkpoint(path)
        training = checkpoint["training"]
        step = int(checkpoint["step"])
        steps = int(training["recipe"]["steps"])
        model = build_model(training, weights={})
        model.load_state_dict(checkpoint["model"])
    except Exception as error:  # torch raises many types for a damaged file
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise UserError(
            f"{path} is no checkpoint of this project's model ({reason}): {again} again"
        ) from None
    if step < steps:
        print(f"WARNING: {path} holds step {step} of {steps}: training is not finished")
        training["recipe"]["steps"] = step  # what is reported is what was trained
    return model.eval(), training


def main():
    settings = run.parse(__doc__, Settings)
    folder = settings.run
    require(
        not (settings.images and settings.compare),
        "--images and --compare are two things: give one",
    )
    no_evaluation = settings.images or settings.compare
    require(
        not (no_evaluation and settings.limit),
        "--limit goes with an evaluation, not with --images or --compare",
    )
    if settings.compare:
        print(compare(settings.compare))
        return
    run_config = run.read_stage(folder, "run.json", "01_extract.py")
    require(
        run_config["benchmark"],
        f"{folder} holds images without labels, so nothing is trained on them: give the --run "
        "of a trained model",
    )
    model, training = load_trained(folder)
    if settings.images:
        draw_folder(model, training, settings)
        return

    data = settings.data or Path(run_config["data"])
    samples = open_split(training["benchmark"], data, "val")
    class_names = [category.name for category in samples.categories]
    require(
        class_names == training["class_names"],
        f"the model was trained on other classes than those of {samples.root}",
    )
    indices = run.evenly_spaced(range(len(samples)), settings.limit or len(samples))
    # The results of some images never take the place of those of all.
    suffix = f"_limit{len(indices)}" if len(indices) < len(samples) else ""
    results = evaluate(model, samples, training["recipe"]["test_size"], settings, indices)
    path = folder / f"results{suffix}"
    text = report(path, results, samples, training, len(indices))

    rows = []
    for index in run.evenly_spaced(indices, 3):
        sample = samples[index]
        panels = segment_panels(model, training, sample, settings.device)
        rows.append((sample["image"], panels))
    figures.draw_predictions(folder / f"predictions{suffix}.png", rows, class_names)
    written = f"results{suffix}.json, results{suffix}.md, predictions{suffix}.png"
    print(f"\n{text}\nwrote {written} in {folder}")
    if training["fusion"] != "none":
        out = shlex.quote(f"{folder}_alone")
        alone = f"--out {out} --fusion none --steps {training['recipe']['steps']}"
        print("to compare with the master alone, other flags as before:")
        print(f"    {run.command('04_train.py', folder)} {alone}")
    print(f"next: python 05_eval.py --compare {shlex.quote(str(folder.parent))}/*")


# ------------------------------------------------------------------ scores
def mean(values):
    """The mean of the numbers that are not NaN, or NaN if there are none."""
    return float(np.nanmean(values)) if np.isfinite(values).any() else np.nan


class SemanticScore:
    """Mean intersection over union from confusion matrices over all images, as Cityscapes has it.

    boundary_mIoU counts only a band inside the edge of each class, as wide as 2 % of the image's
    diagonal (Boundary IoU, Cheng et al. 2021). Void is left out of truth and prediction alike.
    """

    def __init__(self, class_names):
        self.names = class_names
        self.void = len(class_names)
        size = len(class_names) + 1
        self.confusion = np.zeros((size, size), np.int64)  # [truth, prediction], void last
        self.boundary_confusion = np.zeros((size, size), np.int64)

    def update(self, pred, target):
        """pred int [H, W] of class indices; target the same, 255 where it does not count."""
        is_valid = target.numpy() != 255
        truth = np.where(is_valid, target.numpy(), self.void).astype(np.uint8)
        prediction = np.where(is_valid, pred.numpy(), self.void).astype(np.uint8)
        shape = self.confusion.shape
        self.confusion += count_pairs(truth, prediction, shape)
        true_edges = self.keep_boundary(truth)
        predicted_edges = self.keep_boundary(prediction)
        self.boundary_confusion += count_pairs(true_edges, predicted_edges, shape)

    def keep_boundary(self, labels):
        """Labels [H, W] with void wherever there is no boundary.

        A boundary is where another label, or the image's end, is at most 2 % of the diagonal away
        along both axes.
        """
        size = 2 * max(1, round(0.02 * np.hypot(*labels.shape))) + 1
        # Beyond the image's end there is no class.
        highest = ndimage.maximum_filter(labels, size, mode="constant", cval=255)
        lowest = ndimage.minimum_filter(labels, size, mode="constant", cval=255)
        return np.where(highest != lowest, labels, self.void)

    def result(self):
        """mIoU, boundary_mIoU and per_class (IoU) in percent.

        A class that is absent from the truth is NaN and left out of the means.
        """
        absent = self.confusion.sum(1)[:-1] == 0
        iou = np.where(absent, np.nan, self.iou(self.confusion))
        boundary_iou = np.where(absent, np.nan, self.iou(self.boundary_confusion))
        per_class = dict(zip(self.names, iou.tolist(), strict=True))
        return {"mIoU": mean(iou), "boundary_mIoU": mean(boundary_iou), "per_class": per_class}

    @staticmethod
    def iou(confusion):
        """Intersection over union of each class, without void, in percent."""
        intersection = confusion.diagonal()
        union = confusion.sum(0) + confusion.sum(1) - intersection
        return (100 * intersection / np.maximum(union, 1))[:-1]


class CityscapesInstanceScore:
    """Cityscapes' instance AP by the rules of cityscapesScripts. With weights, KITTI-360's.

    label_ids: {name: raw label id} of the classes that count, or a list of ids.
    excluded_from_mean: names of classes with an AP of their own that the means leave out.

    In `instance_ids`, label * 1000 + n is instance n, the bare label of a class that counts is a
    group, the labels in CITYSCAPES_VOID are void, and all else is background.
    """

    OVERLAPS = np.arange(0.5, 1.0, 0.05)
    SMALLEST = 100  # pixels; smaller instances are neither required nor wrong

    def __init__(self, label_ids, excluded_from_mean=()):
        if not isinstance(label_ids, dict):
            label_ids = {label_id: label_id for label_id in label_ids}
        self.label_ids = label_ids
        self.excluded_from_mean = excluded_from_mean
        self.required = Counter()  # {label id: true instances that count}
        # Of all predictions so far, an array an image:
        self.labels = []  # [N]
        self.scores = []  # [N]
        self.is_match = []  # [N, OVERLAPS]: is it the prediction of a true instance?
        self.is_scored = []  # [N, OVERLAPS]: is it a true or a false positive, and not ignored?

    def update(self, masks, labels, scores, instance_ids, weights=None):
        """masks bool [N, H, W], labels int64 [N] (raw ids), scores float [N] (confidences).

        instance_ids: int [H, W]. With weights, float [H, W], areas and overlaps are sums of them.
        """
        values, index_map = relabel(instance_ids.numpy())
        values = np.array(values)  # [V]
        if weights is not None:
            weights = weights.numpy()
        everywhere = np.ones(index_map.shape, bool)
        true_area = self.areas(index_map, weights, everywhere, len(values))  # [V]
        overlap = np.zeros((len(masks), len(values)))
        for row, mask in enumerate(masks.numpy()):
            overlap[row] = self.areas(index_map, weights, mask, len(values))

        # By falling confidence, without predictions of no area
        scores = scores.double().numpy()
        order = np.argsort(-scores, kind="stable")
        order = order[~np.isclose(overlap[order].sum(1), 0)]
        labels = labels.numpy()[order]
        overlap = overlap[order]  # [N, V]
        area = overlap.sum(1)  # [N]

        classes = np.where(values >= 1000, values // 1000, values)
        classes[classes == 34] = 11  # KITTI-360's garages are buildings
        is_void = np.isin(values, CITYSCAPES_VOID)
        is_group = values < 1000  # or stuff, of which there are no predictions, or void
        is_small = true_area < self.SMALLEST
        is_required = ~is_group & ~is_small
        same_class_overlap = overlap * (labels[:, None] == classes)
        # Pixels on void, on groups and on small instances excuse a prediction. A small group counts
        # twice, as in the official script.
        ignored_area = overlap[:, is_void].sum(1)
        ignored_area += (same_class_overlap * (is_group.astype(int) + is_small)).sum(1)
        is_ignored = (ignored_area / area)[:, None] > self.OVERLAPS  # [N, OVERLAPS]

        # From here on each threshold of overlap has a column of its own.
        iou = same_class_overlap / (area[:, None] + true_area - same_class_overlap)
        # As no threshold is below one half, a prediction reaches it with one instance at most.
        reaches = iou[..., None] > self.OVERLAPS  # [N, V, OVERLAPS]
        is_wrong = ~reaches.any(1) & ~is_ignored
        reaches = reaches[:, is_required]
        # Several predictions may reach the threshold with one instance. They are sorted by
        # confidence, so the first of them is its match.
        is_first = reaches.cumsum(0) == 1
        self.labels.append(labels)
        self.scores.append(scores[order])
        self.is_match.append((reaches & is_first).any(1))
        self.is_scored.append(reaches.any(1) | is_wrong)
        self.required.update(classes[is_required].tolist())

    @staticmethod
    def areas(index_map, weights, mask, count):
        """The area of each true id inside a mask: [count]."""
        inside = None if weights is None else weights[mask].ravel()
        return np.bincount(index_map[mask].ravel(), weights=inside, minlength=count)

    def result(self):
        """AP, AP50 and per_class (AP by name or id) in percent.

        A class that is absent from the truth is NaN and left out of the means.
        """
        table = np.full((len(self.label_ids), len(self.OVERLAPS)), np.nan)
        # A class gets an AP for each threshold, from its predictions on all images.
        if self.labels:
            labels = np.concatenate(self.labels)
            scores = np.concatenate(self.scores)
            is_match = np.concatenate(self.is_match)
            is_scored = np.concatenate(self.is_scored)
            for row, label_id in enumerate(self.label_ids.values()):
                required = self.required[label_id]
                if required == 0:
                    continue
                for k in range(len(self.OVERLAPS)):
                    chosen = is_scored[:, k] & (labels == label_id)
                    ap = self.average_precision(scores[chosen], is_match[chosen, k], required)
                    table[row, k] = 100 * ap
        per_class = dict(zip(self.label_ids, table.mean(1).tolist(), strict=True))
        in_mean = [name not in self.excluded_from_mean for name in self.label_ids]
        table = table[in_mean]
        return {"AP": mean(table), "AP50": mean(table[:, 0]), "per_class": per_class}

    @staticmethod
    def average_precision(scores, is_match, required):
        """Area under the precision-recall curve, by cityscapesScripts' rule.

        The curve has a point for each score that occurs. A point's precision has the weight of half
        the distance in recall between the points before and after it.
        """
        order = np.argsort(-scores)
        # The index of the last prediction of each score. The -1 behind them differs from all of
        # them, so the very last prediction is one of these, too.
        last = np.flatnonzero(np.diff(scores[order], append=-1))
        hits = is_match[order].cumsum()[last]
        precision = np.append(1, hits / (last + 1))
        recall = np.append(0, hits / required)
        neighbours = np.pad(recall, 1, mode="edge")
        return float(precision @ (neighbours[2:] - neighbours[:-2]) / 2)


class CocoInstanceScore:
    """COCO's mask AP by pycocotools. annotations: the path of a COCO instances JSON."""

    def __init__(self, annotations):
        self.image_ids = []
        self.detections = []  # as in COCO's results JSON
        content = json.loads(Path(annotations).read_text("utf-8-sig"))
        sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
        entries = []
        for entry in content["annotations"]:
            image_id = entry["image_id"]
            with reading(annotations, f"a mask of image {image_id}"):
                mask = encode_mask(entry["segmentation"], sizes[image_id])
            if mask is None:
                continue
            # pycocotools takes both for granted.
            entry.setdefault("iscrowd", 0)
            entry.setdefault("area", float(rle.area(mask)))
            # New ids: pycocotools takes a match with annotation 0 for none, and of two annotations
            # with the same id it keeps only one.
            entry["id"] = len(entries) + 1
            entry["segmentation"] = mask
            entries.append(entry)
        content["annotations"] = entries
        self.truth = COCO()
        self.truth.dataset = content
        with contextlib.redirect_stdout(io.StringIO()):
            self.truth.createIndex()

    def update(self, image_id, masks, category_ids, scores):
        """masks bool [N, H, W], category_ids int64 [N] as in the annotations, scores float [N]."""
        self.image_ids.append(image_id)
        for index, mask in enumerate(masks):
            if not mask.any():
                continue
            encoded = rle.encode(np.asfortranarray(mask.numpy(), np.uint8))
            encoded["counts"] = encoded["counts"].decode()
            detection = {
                "image_id": image_id,
                "category_id": category_ids[index].item(),
                "segmentation": encoded,
                "score": scores[index].item(),
            }
            self.detections.append(detection)

    def result(self):
        """AP, AP50, AP75, APs, APm, APl and per_class (AP by name) in percent.

        NaN where there is no truth.
        """
        with contextlib.redirect_stdout(io.StringIO()):
            detections = self.truth.loadRes(self.detections) if self.detections else COCO()
            evaluation = COCOeval(self.truth, detections, "segm")
            evaluation.params.imgIds = sorted(self.image_ids)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        stats = np.where(evaluation.stats > -1, 100 * evaluation.stats, np.nan).tolist()
        names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
        result = dict(zip(names, stats[: len(names)], strict=True))
        precision = evaluation.eval["precision"]  # [IoU, recall, class, size, detections]
        precision = precision[..., 0, -1]  # for all sizes, with 100 detections
        precision = np.where(precision > -1, 100 * precision, np.nan)
        result["per_class"] = {}
        for index, category_id in enumerate(evaluation.params.catIds):
            name = self.truth.cats[category_id]["name"]
            result["per_class"][name] = mean(precision[..., index])
        return result


class PanopticScore:
    """Panoptic quality by the rules of COCO's panopticapi (Kirillov et al. 2019).

        PQ = sum of IoU over TP / (TP + FP/2 + FN/2)    for each class, then the mean

    The divisor is half of all segments, true and predicted. Two segments of one class match if
    their IoU, with void left out of the union, is above 0.5.

    categories: [{"id", "isthing", "name"}].
    """

    def __init__(self, categories):
        self.categories = categories
        self.iou = Counter()  # {category id: summed over matches}
        self.matches = Counter()
        self.segments = Counter()

    def update(self, pred_ids, pred_segments, true_ids, true_segments):
        """ids int [H, W], 0 void; segments [{"id", "category_id"(, "iscrowd" in the truth)}]."""
        true = {}  # {segment id: category id}
        crowds = {}  # {category id: segment id}
        for segment in true_segments:
            if segment.get("iscrowd"):
                crowds[segment["category_id"]] = segment["id"]
            else:
                true[segment["id"]] = segment["category_id"]
        self.segments.update(true.values())
        # Ids may be large and far apart, so pairs of their indices are counted.
        pred_values, pred_index = relabel(pred_ids.numpy())
        true_values, true_index = relabel(true_ids.numpy())
        shape = (len(pred_values), len(true_values))
        overlaps = count_pairs(pred_index, true_index, shape)  # pixels
        true_areas = dict(zip(true_values, overlaps.sum(0).tolist(), strict=True))
        overlaps_of = dict(zip(pred_values, overlaps.tolist(), strict=True))

        for segment in pred_segments:
            category = segment["category_id"]
            overlap = Counter()  # {true id: pixels}
            if segment["id"] in overlaps_of:
                overlap.update(dict(zip(true_values, overlaps_of[segment["id"]], strict=True)))
            area = overlap.total()
            void = overlap[0]
            crowd = overlap[crowds[category]] if category in crowds else 0
            iou = 0
            for true_id, shared in overlap.items():
                if shared and true.get(true_id) == category:
                    union = area + true_areas[true_id] - shared - void
                    iou = max(iou, shared / union)
            if iou > 0.5:
                self.iou[category] += iou
                self.matches[category] += 1
                self.segments[category] += 1
            elif void + crowd <= 0.5 * area:
                # One that lies mostly on void or on a crowd of its class is no false positive.
                self.segments[category] += 1

    def result(self):
        """PQ, SQ, RQ, PQ_th, PQ_st and per_class (PQ by name) in percent.

        A class that is absent from both truth and predictions is NaN and left out of the means. As
        in panopticapi, predictions of a class that is not in the truth count.
        """
        table = np.full((len(self.categories), 3), np.nan)  # PQ, SQ, RQ
        for row, category in enumerate(self.categories):
            matches = self.matches[category["id"]]
            segments = self.segments[category["id"]]
            if segments:
                sq = 100 * self.iou[category["id"]] / max(matches, 1)
                rq = 200 * matches / segments
                table[row] = (sq * rq / 100, sq, rq)
        isthing = np.array([bool(category["isthing"]) for category in self.categories])
        names = [category["name"] for category in self.categories]
        return {
            "PQ": mean(table[:, 0]),
            "SQ": mean(table[:, 1]),
            "RQ": mean(table[:, 2]),
            "PQ_th": mean(table[isthing, 0]),
            "PQ_st": mean(table[~isthing, 0]),
            "per_class": dict(zip(names, table[:, 0].tolist(), strict=True)),
        }


if __name__ == "__main__":
    run.start(main)
