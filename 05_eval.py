"""Stage 5: evaluate the trained model.

    python 05_eval.py                                    on its benchmark's validation images, runs/toycity
    python 05_eval.py --limit 100                        on some of them, evenly spaced: results_limit100.json
    python 05_eval.py --save-predictions                 in the forms that Cityscapes and COCO want, under submission/
    python 05_eval.py --images holiday/                  no scores: draw what the model sees on your own pictures
    python 05_eval.py --compare runs/*                   no model: one table of what several runs scored

One model answers up to three questions. Semantic: which class is each pixel? (mIoU) Instance: where is each thing, and
how sure are we? (AP) Panoptic: one label for each pixel, things told apart. (PQ)

Reads run.json and checkpoint.pt. Writes results.json, results.md and predictions.png, all scores in percent.
"""

import contextlib
import io
import json
import shutil
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from common import datasets, figures, run
from common.datasets import BENCHMARKS, compact, count_pairs, working_size
from common.model import PADDING, build_model
from common.run import CORES, DEVICES, UserError, flag, natural, need, positive

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from PIL import Image
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
    limit: int | None = flag(None, "evaluate only so many images, evenly spaced", type=positive)
    save_predictions: bool = flag(False, "write submission/ as well")
    images: Path | None = flag(None, "draw predictions on a folder of pictures instead", metavar="FOLDER")
    compare: tuple[Path, ...] = flag((), "table the results of several runs instead", metavar="RUN", nargs="+")
    device: str = flag(DEVICES[0], choices=DEVICES)
    workers: int = flag(CORES, "helpers beside the main process", type=natural)


MEASURES = {"mIoU": "semantic", "AP": "instance", "PQ": "panoptic"}
# What a reader compares
HEADLINE = ("mIoU", "mIoU_th", "boundary_mIoU", "AP", "AP50", "AP_things", "PQ", "PQ_th", "PQ_st")


# ------------------------------------------------------------------ inference
@torch.inference_mode()
def predict(model, image, size, device):
    """One image, uint8 [3, H, W], through the model at the working `size`, padded to multiples of 32.

    Returns class probabilities [Q, classes + 1], the last column no-object, and mask probabilities [Q, H, W] at the
    image's own size: the logits are enlarged, not the decisions.
    """
    height, width = image.shape[1:]
    h, w = working_size(height, width, size, multiple=1)
    scaled = TF.resize(image, (h, w), antialias=True).float() / 255
    scaled = F.pad(scaled, (0, -w % 32, 0, -h % 32), value=PADDING)[None].to(device)  # [1, 3, h', w']
    class_logits, mask_logits = model(scaled)[-1]  # [1, Q, classes + 1], [1, Q, h'/4, w'/4]
    padded = round(scaled.shape[2] * height / h), round(scaled.shape[3] * width / w)  # h' and w' in the image's pixels
    masks = F.interpolate(mask_logits.float(), padded, mode="bilinear", align_corners=False)[0, :, :height, :width]
    return class_logits[0].float().softmax(-1), masks.sigmoid_()


def semantic(class_probabilities, masks):
    """Class of each pixel, int64 [H, W]: every query votes for its classes where its mask is."""
    votes = torch.einsum("qc,qhw->chw", class_probabilities[:, :-1], masks)
    return votes.max(0).indices.cpu()  # on a CPU far faster than argmax


def instances(class_probabilities, masks, things, top=100):
    """The things among the `top` best pairs of query and class: masks bool [N, H, W], labels int64 [N], scores [N].

    score = class probability x mean mask probability inside the mask.
    """
    probabilities = class_probabilities[:, :-1]
    scores, order = probabilities.flatten().topk(min(top, probabilities.numel()))
    queries, labels = order // probabilities.shape[1], order % probabilities.shape[1]
    thing = torch.isin(labels, torch.tensor(things, device=labels.device))
    queries, labels, scores = queries[thing], labels[thing], scores[thing]
    binary = masks > 0.5  # [Q, H, W]; made once, a query may appear with several classes
    # one by one, as a plane fits into a CPU's cache
    quality = [(mask * own).sum() / own.count_nonzero().clamp(min=1) for mask, own in zip(masks, binary, strict=True)]
    return binary[queries].cpu(), labels.cpu(), (scores * torch.stack(quality)[queries]).cpu()


def panoptic(class_probabilities, masks, things, sure=0.8, kept=0.8):
    """Segment ids int64 [H, W], 0 where nothing is claimed, and segments [{"id", "label"}].

    A query takes part if its class is not no-object and has a probability above `sure`. Each pixel goes to the query
    with the highest probability x mask; a query that keeps under the share `kept` of its own mask is dropped.
    """
    scores, labels = class_probabilities.max(-1)
    chosen = (labels < class_probabilities.shape[1] - 1) & (scores > sure)
    scores, labels, masks = scores[chosen], labels[chosen].tolist(), masks[chosen]  # a copy
    binary = masks >= 0.5
    ids = torch.zeros(masks.shape[1:], dtype=torch.int64, device=masks.device)
    owner = masks.mul_(scores[:, None, None]).max(0).indices if labels else ids  # [H, W]
    segments, id_of = [], {}
    for query, (label, own) in enumerate(zip(labels, binary, strict=True)):
        region = own & (owner == query)
        if not region.any() or region.sum() < kept * own.sum():
            continue
        if label in things or label not in id_of:  # stuff of one class is one segment
            segments.append({"id": len(segments) + 1, "label": label})
            id_of[label] = len(segments)
        ids[region] = id_of[label]
    return ids.cpu(), segments


# ------------------------------------------------------------------ evaluation
def evaluate(model, samples, size, settings, indices, submission=None):
    """Score a model on the images `indices` of a validation split, at the working `size`, in the split's measures.

    Returns {task: that score's result}. Predictions go into the folder `submission` as Cityscapes and COCO want them.
    """
    if submission:
        shutil.rmtree(submission, ignore_errors=True)  # of an earlier model
    categories, of_panoptic = samples.categories, []
    ids = torch.tensor([c.id for c in categories])  # by label
    things = [label for label, c in enumerate(categories) if c.isthing]
    thing_ids = {c.name: c.id for c in categories if c.isthing}
    scores = {
        "mIoU": SemanticScore([c.name for c in categories]),
        "AP": CityscapesInstanceScore(thing_ids, samples.beside),
        "PQ": PanopticScore([c._asdict() for c in categories]),
    }
    if samples.coco and "AP" in samples.measures:
        scores["AP"] = CocoInstanceScore(samples.coco.file)
    scores = {MEASURES[measure]: scores[measure] for measure in samples.measures}
    loader = DataLoader(Subset(samples, indices), batch_size=None, **run.loader_arguments(settings.workers))
    model.to(settings.device).eval()
    for sample in tqdm(loader, "evaluating", unit="image"):
        predicted = predict(model, sample["image"], size, settings.device)
        found = {}  # by task, what its score takes before the truth
        if "semantic" in scores:
            found["semantic"] = [semantic(*predicted)]
        if "instance" in scores:
            masks, labels, confidence = instances(*predicted, things)
            of_image = [sample["image_id"]] if samples.coco else []
            found["instance"] = [*of_image, masks, ids[labels], confidence]
        if "panoptic" in scores:
            segment_ids, segments = panoptic(*predicted, things)
            segments = [{"id": s["id"], "category_id": int(ids[s["label"]])} for s in segments]
            found["panoptic"] = [segment_ids, segments]
        for task, score in scores.items():
            score.update(*found[task], *sample["truth"][task])
        if submission:
            of_panoptic.append(save_predictions(submission, sample, found, ids))
        del predicted, found  # large: gone before the next are made
    if submission and "panoptic" in scores:
        run.write_json(submission / "panoptic.json", {"annotations": of_panoptic})
    if submission and samples.coco and "instance" in scores:
        run.write_json(submission / "instances.json", scores["instance"].detections)
    return {task: score.result() for task, score in scores.items()}


def save_predictions(folder, sample, found, ids):
    """An image's predictions in Cityscapes' form and as COCO's panoptic PNG, whose entry in the JSON is returned."""
    name = Path(sample["name"]).with_suffix("")
    stem = name.as_posix().replace("/", "__")
    if stem.endswith("_leftImg8bit"):  # Cityscapes looks for <city>_<sequence>_<frame>*
        stem = name.name.removesuffix("_leftImg8bit")
    entry = {"image_id": sample["image_id"], "file_name": f"{stem}.png"}
    if "semantic" in found:
        save_png(folder / f"semantic/{stem}.png", ids[found["semantic"][0]].numpy())
    if "instance" in found and "rles" not in sample:  # COCO's go into one JSON
        save_instances(folder / "instance", stem, *found["instance"])
    if "panoptic" in found:
        segment_ids, entry["segments_info"] = found["panoptic"]
        colours = segment_ids.numpy().astype("<u4")[..., None].view(np.uint8)[..., :3]  # R + 256 G + 65536 B
        save_png(folder / f"panoptic/{stem}.png", colours)
    return entry


def save_instances(folder, stem, masks, label_ids, scores):
    """Cityscapes' form: <stem>.txt with a line for each mask: its file, label id and confidence."""
    text = ""
    for i, (mask, label, score) in enumerate(zip(masks, label_ids.tolist(), scores.tolist(), strict=True)):
        save_png(folder / f"{stem}_{i:03}.png", 255 * mask.numpy())
        text += f"{stem}_{i:03}.png {label} {score}\n"
    with run.whole_file(folder / f"{stem}.txt") as temporary:
        temporary.write_text(text)


def save_png(path, pixels):
    """8 bits a channel; pixels [H, W] or [H, W, 3]."""
    with run.whole_file(path) as temporary:
        Image.fromarray(pixels.astype(np.uint8)).save(temporary, "PNG")


# ------------------------------------------------------------------ report
def drawing(model, trained, sample, device):
    """A row of predictions.png: the image, its truth if it has one, and the prediction (things above 0.5)."""
    image, task, drawings = sample["image"], BENCHMARKS[trained["benchmark"]].task, []
    if "labels" in sample:
        ids = painted(map(rle.decode, sample["rles"]), image) if "rles" in sample else sample["segments"]
        drawings = [("truth", ids, sample["labels"].tolist())]
    things = np.flatnonzero(trained["isthing"]).tolist()
    predicted = predict(model, image, trained["recipe"]["test_size"], device)
    if task == "semantic":
        ids, labels = semantic(*predicted) + 1, range(len(trained["class_names"]))
    elif task == "panoptic":
        ids, segments = panoptic(*predicted, things)
        labels = [segment["label"] for segment in segments]
    else:
        masks, labels, confidence = instances(*predicted, things)
        order = confidence.argsort()  # the surest on top
        order = order[confidence[order] > 0.5]
        ids, labels = painted(masks[order], image), labels[order].tolist()
    return image, [*drawings, ("prediction", ids, labels)]


def painted(masks, image):
    """Masks [H, W] that may overlap, one over the other, as segment ids int32 [H, W]."""
    ids = torch.zeros(image.shape[1:], dtype=torch.int32)
    for i, mask in enumerate(masks, 1):
        ids[torch.as_tensor(mask, dtype=torch.bool)] = i
    return ids


def headline(results, categories):
    """The numbers that a reader compares, in percent; mIoU_th is that of the things, where there is stuff as well."""
    numbers = {name: value for result in results.values() for name, value in result.items()}
    things = [c.name for c in categories if c.isthing]
    if "semantic" in results and 0 < len(things) < len(categories):
        numbers["mIoU_th"] = mean([results["semantic"]["per_class"][name] for name in things])
    if categories == datasets.KITTI360_THINGS:  # the paper's AP is Cityscapes' eight things'
        per_class = results["instance"]["per_class"]
        numbers["AP_things"] = mean([ap for name, ap in per_class.items() if name != "building"])
    return {name: numbers[name] for name in HEADLINE if name in numbers}


def report(path, samples, trained, entry):
    """Write <path>.json and .md, whose text is returned: the model, its scores beside the paper's, and by class."""
    benchmark = BENCHMARKS[trained["benchmark"]]
    keys = ["benchmark", "master", "auxiliary", "stride", "fusion", "seed", "master_mode", "aux_mode", "weights"]
    model = {key: trained[key] for key in keys} | {"steps": trained["recipe"]["steps"]}
    run.write_json(Path(f"{path}.json"), {"model": model, "benchmarks": {trained["benchmark"]: entry}})

    text = "{master}, {auxiliary} at stride {stride}, fusion {fusion}".format(**model)
    if model["fusion"] == "none":
        text = f"{model['master']}, alone"
    trained_on = benchmark.trains_on.replace("own ", f"{trained['benchmark']} ")
    text += f", {model['steps']} steps on {trained_on}, seed {model['seed']}; percent"
    for encoder, weights in model["weights"].items():
        text += f"; RANDOM WEIGHTS at the start: {encoder}" if weights == "none" else ""
    of = "images held out of train" if samples.held_out else "images"
    text += f"\n\n{model['benchmark']}, {entry['images']} of {len(samples)} {of}"
    text += f"; the paper: {', '.join(benchmark.measures)} {benchmark.paper}\n\n"
    text += run.table([list(entry["scores"]), list(map(run.number, entry["scores"].values()))])
    columns = [entry[MEASURES[measure]]["per_class"] for measure in benchmark.measures]
    rows = [["class", *(measure.removeprefix("m") for measure in benchmark.measures)]]
    rows += [[name, *(run.number(column.get(name)) for column in columns)] for name in columns[0]]
    text += f"\n{run.table(rows)}"
    with run.whole_file(Path(f"{path}.md")) as temporary:
        temporary.write_text(text)
    return text


def compare(folders):
    """A row a run with its scores, then every benchmark beside the paper's number."""
    runs, best = [], defaultdict(list)
    for folder in folders:
        if folder.is_file():  # runs/* may name some
            continue
        try:
            results = run.read_stage(folder, "results.json", "05_eval.py")
            ((benchmark, entry),) = results["benchmarks"].items()
            model, scores = results["model"], entry["scores"]
            pair = [model["auxiliary"], str(model["stride"])]
            fusion = "{fusion} {master_mode}/{aux_mode}".format(**model)
            if model["fusion"] == "none":
                pair, fusion = ["-", "-"], f"none {model['master_mode']}"
            row = [folder.resolve().name, benchmark, model["master"], *pair]
            row = [cell if len(cell) <= 12 else f"…{cell[-11:]}" for cell in row]  # names differ at their ends
            row += [fusion, str(model["steps"])]
            row += [run.number(scores.get(name)) for name in ("mIoU", "boundary_mIoU", "AP", "PQ")]
            runs.append((benchmark, int(model["stride"]), row))
            best[benchmark].append(scores)
        except (UserError, KeyError, TypeError, ValueError, AttributeError):
            print(f"left out: {folder} holds no results.json of an evaluation on all images")
    need(runs, "none of these folders holds results: run 05_eval.py on them first")
    rows = [["run", "benchmark", "master", "auxiliary", "OS", "fusion", "steps", "mIoU", "b_mIoU", "AP", "PQ"]]
    rows += [row for *_, row in sorted(runs, key=lambda entry: entry[:2])]
    paper = [["benchmark", "score", "paper", "here, best"]]
    for name, benchmark in BENCHMARKS.items():
        of_runs = [s | {"AP": s.get("AP_things", s.get("AP"))} for s in best[name]]  # KITTI-360: as in the paper
        here = [max((s[m] for s in of_runs if s.get(m) is not None), default=None) for m in benchmark.measures]
        paper.append([name, ", ".join(benchmark.measures), benchmark.paper, ", ".join(map(run.number, here))])
    return f"{run.table(rows)}\n{run.table(paper)}"


# ------------------------------------------------------------------ the stage
def load_trained(folder):
    """The model of a run's checkpoint and what it was trained with: 04_train.py's Training, as a dictionary."""
    path, again = folder / "checkpoint.pt", f"run `{run.command('04_train.py', folder)}`"
    need(path.is_file(), f"{path} is missing: {again} first")
    try:
        checkpoint = run.read_checkpoint(path)
        trained, step = checkpoint["settings"], checkpoint["step"]
        if step < trained["recipe"]["steps"]:
            print(f"WARNING: {path} holds step {step} of {trained['recipe']['steps']}: training is not finished")
            trained["recipe"]["steps"] = step  # what is reported is what was trained
        model = build_model(trained, weights={})
        model.load_state_dict(checkpoint["model"])
    except Exception as error:  # torch raises many types for a damaged file
        reason, *_ = f"{type(error).__name__}: {error}".splitlines()
        raise UserError(f"{path} is no checkpoint of this project's model ({reason}): {again} again") from None
    return model, trained


def draw_folder(model, trained, settings):
    """predictions/<picture>.png for each picture of a folder, its sub-folders kept."""
    folder = settings.run / "predictions"
    for name in tqdm(datasets.list_pictures(settings.images), "predicting", unit="picture"):
        try:
            image = datasets.read_image(settings.images / name)
        except UserError as error:
            tqdm.write(f"left out: {error}", file=sys.stderr)
            continue
        row = drawing(model, trained, {"image": image}, settings.device)
        figures.draw_predictions(folder / f"{name}.png", [row], trained["class_names"])
    print(f"wrote {folder}/")


def main():
    settings = run.parse(__doc__, Settings)
    folder, elsewhere = settings.run, settings.images or settings.compare
    need(not (settings.images and settings.compare), "--images and --compare are two things: give one")
    wrong = "--limit and --save-predictions go with an evaluation, not with --images or --compare"
    need(not (elsewhere and (settings.limit or settings.save_predictions)), wrong)
    if settings.compare:
        print(compare(settings.compare))
        return
    asked = run.read_stage(folder, "run.json", "01_extract.py")
    trains = asked["benchmark"] is not None
    need(
        trains, f"{folder} holds pictures without labels, nothing is trained on them: give the --run of a trained model"
    )
    model, trained = load_trained(folder)
    if settings.images:
        draw_folder(model.to(settings.device).eval(), trained, settings)
        return

    benchmark, recipe = trained["benchmark"], trained["recipe"]
    samples = datasets.open_split(benchmark, settings.data or Path(asked["data"]), "val")
    fits = [c.name for c in samples.categories] == trained["class_names"]
    need(fits, f"the model was trained on other classes than those of {samples.root}")
    indices = run.evenly_spaced(range(len(samples)), settings.limit or len(samples))
    some = f"_limit{len(indices)}" if len(indices) < len(samples) else ""  # never takes the place of all
    submission = folder / f"submission{some}" / benchmark if settings.save_predictions else None
    results = evaluate(model, samples, recipe["test_size"], settings, indices, submission)

    entry = {"images": len(indices), "scores": headline(results, samples.categories), **results}
    text = report(folder / f"results{some}", samples, trained, entry)
    rows = [drawing(model, trained, samples[i], settings.device) for i in run.evenly_spaced(indices, 3)]
    figures.draw_predictions(folder / f"predictions{some}.png", rows, trained["class_names"])
    saved = f", submission{some}/" if submission else ""
    print(f"\n{text}\nwrote results{some}.json, results{some}.md, predictions{some}.png{saved} in {folder}")
    advice = "python 05_eval.py --compare runs/*"
    if trained["fusion"] != "none":
        flags = ("--out", f"{folder}_alone", "--fusion", "none", "--steps", str(recipe["steps"]))
        advice = f"{run.command('04_train.py', folder, *flags)}   # the master alone, to compare; other flags as before"
    print(f"next: {advice}")


# ------------------------------------------------------------------ scores
def mean(values):
    """Of the numbers that are not NaN; NaN if there are none."""
    return float(np.nanmean(values)) if np.isfinite(values).any() else np.nan


class SemanticScore:
    """Mean intersection over union from confusion matrices over all images, as Cityscapes defines it.

    boundary_mIoU is the same on each class's boundary alone: its pixels within 2 % of the image's diagonal of pixels
    that are not of the class (Boundary IoU, Cheng et al. 2021). Void is cut out of truth and prediction alike.
    """

    def __init__(self, class_names):
        self.names = class_names
        size = len(class_names) + 1  # void comes last
        self.confusion = np.zeros((2, size, size), np.int64)  # [everywhere or boundary, truth, prediction]

    def update(self, pred, target):
        """pred int [H, W] of class indices; target the same, 255 where it does not count."""
        void, counts = len(self.names), target.numpy() != 255
        both = [np.where(counts, labels.numpy(), void).astype(np.uint8) for labels in (target, pred)]
        edges = [np.where(self.is_boundary(labels), labels, void) for labels in both]
        self.confusion += [count_pairs(*maps, self.confusion.shape[1:]) for maps in (both, edges)]

    @staticmethod
    def is_boundary(labels):
        """Pixels with another label, or the image's end, at most 2 % of the diagonal away in both axes: bool [H, W]."""
        window = 2 * max(1, round(0.02 * np.hypot(*labels.shape))) + 1
        around = {"size": window, "mode": "constant", "cval": 255}  # beyond the end: no class
        return ndimage.maximum_filter(labels, **around) != ndimage.minimum_filter(labels, **around)

    def result(self):
        """mIoU, boundary_mIoU and per_class (IoU) in percent; a class absent from the truth is NaN and left out."""
        hit = self.confusion.diagonal(axis1=1, axis2=2)  # [2, classes and void]
        union = self.confusion.sum(1) + self.confusion.sum(2) - hit
        absent = self.confusion[0].sum(1) == 0
        iou, boundary = np.where(absent, np.nan, 100 * hit / np.maximum(union, 1))[:, :-1]
        per_class = dict(zip(self.names, iou.tolist(), strict=True))
        return {"mIoU": mean(iou), "boundary_mIoU": mean(boundary), "per_class": per_class}


class CityscapesInstanceScore:
    """Cityscapes' instance AP by the rules of cityscapesScripts; with weights, KITTI-360's.

    label_ids: {name: raw label id} of the classes that count, or a list of ids; beside: those not in the means.
    Of the true instance ids, id*1000 + n is an instance, the bare id of a class that counts a group, those of
    CITYSCAPES_VOID are void, all else background.
    """

    OVERLAPS = np.arange(0.5, 1.0, 0.05)
    SMALLEST = 100  # pixels; smaller instances are neither wanted nor wrong
    NOTHING = [np.zeros(0)] * 4  # of no image

    def __init__(self, label_ids, beside=()):
        self.beside = beside
        self.ids = label_ids if isinstance(label_ids, dict) else dict(zip(label_ids, label_ids, strict=True))
        self.wanted = Counter()  # {label id: instances that count}
        # For each image label ids [N] and scores [N], and at each threshold [N, K]: is it right? does it count?
        self.scored = []

    def update(self, masks, labels, scores, instance_ids, weights=None):
        """masks bool [N, H, W], labels int64 [N] (raw ids), scores float [N], instance_ids int [H, W].

        With weights, float [H, W], areas and overlaps are sums of them.
        """
        values, places = compact(instance_ids.numpy())  # [V], [H, W]
        maps = [places] if weights is None else [places, weights.numpy()]
        true_area = np.bincount(*(pixels.ravel() for pixels in maps))  # [V]
        overlap = np.zeros((len(masks), len(values)))
        for mask, row in zip(masks.numpy(), overlap, strict=True):
            lines = np.flatnonzero(mask.any(1))  # few, mostly: the others are passed over
            part = slice(lines.min(initial=len(mask)), lines.max(initial=0) + 1)
            row[:] = np.bincount(*(pixels[part][mask[part]] for pixels in maps), minlength=len(values))

        labels, scores = labels.numpy(), scores.double().numpy()
        order = np.argsort(-scores, kind="stable")  # the surest first, without those of no area
        order = order[~np.isclose(overlap[order].sum(1), 0)]
        labels, scores, overlap = labels[order], scores[order], overlap[order]
        area, values = overlap.sum(1), np.array(values)
        classes = np.where(values >= 1000, values // 1000, values)
        classes[classes == 34] = 11  # KITTI-360's garages are buildings
        void, group, small = np.isin(values, datasets.CITYSCAPES_VOID), values < 1000, true_area < self.SMALLEST
        shared = overlap * (labels[:, None] == classes)  # [N, V], with those of the same class
        excused = overlap[:, void].sum(1) + (shared * (group.astype(int) + small)).sum(1)
        iou = shared / (area[:, None] + true_area - shared)
        over = iou[..., None] > self.OVERLAPS  # [N, V, K]; at most one V each: thresholds are not below one half
        false = ~over.any(1) & ((excused / area)[:, None] <= self.OVERLAPS)
        over = over[:, ~group & ~small]
        right = (over & (over.cumsum(0) == 1)).any(1)  # of those that found one instance, the surest
        self.scored.append((labels, scores, right, over.any(1) | false))
        self.wanted.update(classes[~group & ~small].tolist())

    def result(self):
        """AP, AP50 and per_class (AP by name or id) in percent; a class absent from the truth is NaN and left out."""
        table = np.full((len(self.ids), len(self.OVERLAPS)), np.nan)
        labels, scores, right, counts = map(np.concatenate, zip(*self.scored or [self.NOTHING], strict=True))
        for row, label in zip(table, self.ids.values(), strict=True):
            if self.wanted[label]:
                for k, counted in enumerate(counts.T):
                    here = counted & (labels == label)
                    row[k] = 100 * self.average_precision(scores[here], right[here, k], self.wanted[label])
        per_class = dict(zip(self.ids, table.mean(1).tolist(), strict=True))
        table = table[[name not in self.beside for name in self.ids]]
        return {"AP": mean(table), "AP50": mean(table[:, 0]), "per_class": per_class}

    @staticmethod
    def average_precision(scores, right, wanted):
        """Area under the precision-recall curve, one point for each score that occurs."""
        order = np.argsort(-scores)
        last = np.flatnonzero(np.diff(scores[order], append=-1))  # of each score that occurs
        hits = right[order].cumsum()[last]
        precision, recall = np.append(1, hits / (last + 1)), np.append(0, hits / wanted)
        around = np.pad(recall, 1, mode="edge")
        return float(precision @ (around[2:] - around[:-2]) / 2)


class CocoInstanceScore:
    """COCO's mask AP by pycocotools. annotations: path of a COCO instances JSON."""

    def __init__(self, annotations):
        self.image_ids, self.detections = [], []  # the latter as COCO's results JSON has them
        self.truth = COCO()
        content = json.loads(Path(annotations).read_text("utf-8-sig"))
        sizes, entries = {image["id"]: (image["height"], image["width"]) for image in content["images"]}, []
        for entry in content["annotations"]:
            with datasets.reading(annotations, f"a mask of image {entry['image_id']}"):
                code = datasets.encode_mask(entry["segmentation"], sizes[entry["image_id"]])
            if code:  # numbered anew: to pycocotools an id of 0 is no match, and of two alike it keeps one
                given = {"iscrowd": 0, "area": float(rle.area(code))} | entry
                entries.append(given | {"id": len(entries) + 1, "segmentation": code})
        self.truth.dataset = content | {"annotations": entries}
        with contextlib.redirect_stdout(io.StringIO()):
            self.truth.createIndex()

    def update(self, image_id, masks, category_ids, scores):
        """masks bool [N, H, W], category_ids int64 [N] as in the annotations, scores float [N]."""
        self.image_ids.append(image_id)
        for mask, category, score in zip(masks, category_ids.tolist(), scores.tolist(), strict=True):
            if mask.any():
                code = rle.encode(np.asfortranarray(mask.numpy(), np.uint8))
                code["counts"] = code["counts"].decode()
                entry = {"image_id": image_id, "category_id": category, "segmentation": code, "score": score}
                self.detections.append(entry)

    def result(self):
        """AP, AP50, AP75, APs, APm, APl and per_class (by name) in percent; NaN where there is no truth."""
        with contextlib.redirect_stdout(io.StringIO()):
            found = self.truth.loadRes(self.detections) if self.detections else COCO()
            evaluation = COCOeval(self.truth, found, "segm")
            evaluation.params.imgIds = sorted(self.image_ids)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        percent = np.where(evaluation.stats[:6] > -1, 100 * evaluation.stats[:6], np.nan).tolist()
        precision = evaluation.eval["precision"][..., 0, -1]  # [IoU, recall, class] for all sizes, 100 detections
        precision = np.where(precision > -1, 100 * precision, np.nan)
        names = [self.truth.cats[category]["name"] for category in evaluation.params.catIds]
        per_class = {name: mean(precision[..., i]) for i, name in enumerate(names)}
        return dict(zip(("AP", "AP50", "AP75", "APs", "APm", "APl"), percent, strict=True), per_class=per_class)


class PanopticScore:
    """Panoptic quality by the rules of COCO's panopticapi; categories: [{"id", "isthing", "name"}].

    PQ = sum of IoU over TP / (TP + FP/2 + FN/2), for each class, then the mean; the divisor is half of all segments,
    true and predicted. Two of one class match if their IoU, void left out of the union, is above 0.5.
    """

    def __init__(self, categories):
        self.categories = categories
        self.iou, self.matches, self.segments = Counter(), Counter(), Counter()  # by category id

    def update(self, pred_ids, pred_segments, true_ids, true_segments):
        """ids int [H, W], 0 void; segments [{"id", "category_id"(, "iscrowd" in the truth)}]."""
        predicted = {s["id"]: s["category_id"] for s in pred_segments}
        true = {s["id"]: s["category_id"] for s in true_segments if not s.get("iscrowd")}
        crowds = {s["category_id"]: s["id"] for s in true_segments if s.get("iscrowd")}
        pred_values, pred_places = compact(pred_ids.numpy())  # ids may be large and far apart
        true_values, true_places = compact(true_ids.numpy())
        pairs = count_pairs(pred_places, true_places, (len(pred_values), len(true_values)))
        overlaps = dict(zip(pred_values, pairs.tolist(), strict=True))
        true_area = dict(zip(true_values, pairs.sum(0).tolist(), strict=True))
        self.segments.update(true.values())
        for p, category in predicted.items():
            overlap = Counter(dict(zip(true_values, overlaps.get(p, ()), strict=False)))  # {true id: pixels}
            area, void, crowd = overlap.total(), overlap[0], overlap[crowds.get(category)]
            same = [t for t, shared in overlap.items() if shared and true.get(t) == category]
            iou = max((overlap[t] / (area + true_area[t] - overlap[t] - void) for t in same), default=0)
            if iou > 0.5:
                self.iou[category] += iou
                self.matches[category] += 1
            # A prediction that lies mostly on void or on a crowd of its class is no false positive.
            self.segments[category] += iou > 0.5 or void + crowd <= 0.5 * area

    def result(self):
        """PQ, SQ, RQ, PQ_th, PQ_st and per_class (PQ by name) in percent; NaN, and left out, is a class that
        neither truth nor predictions hold: as in panopticapi, predictions of a class that is not there count."""
        table = np.full((len(self.categories), 3), np.nan)
        for row, c in zip(table, self.categories, strict=True):
            matches, segments = self.matches[c["id"]], self.segments[c["id"]]
            if segments:
                sq, rq = 100 * self.iou[c["id"]] / max(matches, 1), 200 * matches / segments
                row[:] = sq * rq / 100, sq, rq
        result = dict(zip(("PQ", "SQ", "RQ"), map(mean, table.T), strict=True))
        things = np.array([bool(c["isthing"]) for c in self.categories])
        result |= {"PQ_th": mean(table[things, 0]), "PQ_st": mean(table[~things, 0])}
        names = [c["name"] for c in self.categories]
        return result | {"per_class": dict(zip(names, table[:, 0].tolist(), strict=True))}


if __name__ == "__main__":
    run.start(main)
