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
import shutil
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

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

from common import figures, run
from common.datasets import (
    BENCHMARKS,
    CITYSCAPES_VOID,
    KITTI360_THINGS,
    Split,
    compact,
    count_pairs,
    list_pictures,
    open_split,
    read_image,
    working_size,
)
from common.model import PADDING, FusedModel, build_model
from common.run import CORES, DEVICES, UserError, flag, need, positive

# ---------------------------------------------------------------------------------------------- settings


@dataclass
class Settings:
    run: Path = flag(Path("runs/toycity"), "run folder")
    data: Path | None = flag(None, "data root (default: as in stage 1)")
    limit: int | None = flag(None, "evaluate only so many images, evenly spaced", type=positive)
    save_predictions: bool = flag(False, "write submission/ as well")
    images: Path | None = flag(None, "draw predictions on a folder of pictures instead", metavar="FOLDER")
    compare: tuple[Path, ...] = flag((), "table the results of several runs instead", metavar="RUN")
    device: str = flag(DEVICES[0], choices=DEVICES)
    workers: int = flag(CORES, "helpers beside the main process", type=positive)


# ---------------------------------------------------------------------------------------------- inference


@torch.inference_mode()
def predict(model: FusedModel, image: torch.Tensor, size: str, device: str) -> tuple[torch.Tensor, torch.Tensor]:
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


def semantic(class_probabilities: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Class of each pixel, int64 [H, W]: every query votes for its classes where its mask is."""
    return torch.einsum("qc,qhw->chw", class_probabilities[:, :-1], masks).argmax(0)


def instances(
    class_probabilities: torch.Tensor, masks: torch.Tensor, things: list[int], top: int = 100
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The things among the `top` best pairs of query and class: masks bool [N, H, W], labels int64 [N], scores [N].

    score = class probability x mean mask probability inside the mask.
    """
    probabilities = class_probabilities[:, :-1]
    scores, order = probabilities.flatten().topk(min(top, probabilities.numel()))
    queries, labels = order // probabilities.shape[1], order % probabilities.shape[1]
    thing = torch.isin(labels, torch.tensor(things, device=labels.device))
    queries, labels, scores = queries[thing], labels[thing], scores[thing]
    binary = masks > 0.5  # [Q, H, W]; made once, a query may appear with several classes
    quality = (masks * binary).sum((1, 2)) / binary.sum((1, 2)).clamp(min=1)
    return binary[queries], labels, scores * quality[queries]


def panoptic(
    class_probabilities: torch.Tensor,
    masks: torch.Tensor,
    things: list[int],
    object_threshold: float = 0.8,
    overlap_threshold: float = 0.8,
) -> tuple[torch.Tensor, list[dict]]:
    """Segment ids int64 [H, W], 0 where nothing is claimed, and segments [{"id", "label"}].

    A query takes part if its class is not no-object and has a probability above `object_threshold`. Each pixel goes to
    the query with the highest probability x mask; a query that keeps under `overlap_threshold` of its own mask is
    dropped.
    """
    scores, labels = class_probabilities.max(-1)
    chosen = (labels < class_probabilities.shape[1] - 1) & (scores > object_threshold)
    scores, labels, masks = scores[chosen], labels[chosen].tolist(), masks[chosen]
    ids = torch.zeros(masks.shape[1:], dtype=torch.int64, device=masks.device)
    if not labels:
        return ids, []
    owner = (scores[:, None, None] * masks).argmax(0)  # [H, W]
    segments, stuff = [], {}
    for query, label in enumerate(labels):
        own = masks[query] >= 0.5
        region = own & (owner == query)
        if region.sum() == 0 or region.sum() < overlap_threshold * own.sum():
            continue
        if label in stuff:  # stuff of one class is one segment
            ids[region] = stuff[label]
            continue
        segments.append({"id": len(segments) + 1, "label": label})
        ids[region] = len(segments)
        if label not in things:
            stuff[label] = len(segments)
    return ids, segments


# ---------------------------------------------------------------------------------------------- evaluation


def scores_for(samples: Split) -> dict:
    """An empty score for each of a split's measures: {"semantic", "instance", "panoptic": score}."""
    scores = {}
    if "mIoU" in samples.measures:
        scores["semantic"] = SemanticScore([category.name for category in samples.categories])
    if "AP" in samples.measures and samples.coco:
        scores["instance"] = CocoInstanceScore(samples.coco.file)
    elif "AP" in samples.measures:
        scores["instance"] = CityscapesInstanceScore({c.name: c.id for c in samples.categories if c.isthing})
    if "PQ" in samples.measures:
        scores["panoptic"] = PanopticScore([category._asdict() for category in samples.categories])
    return scores


def evaluate(
    model: FusedModel, samples: Split, size: str, settings: Settings, indices: list[int], submission: Path | None = None
) -> dict:
    """Score a model on the images `indices` of a validation split at the working `size`: {task: that score's result}.

    The split's measures say which: mIoU, AP (Cityscapes' or KITTI-360's rules, COCO's on COCO) and PQ. With
    `submission`, a folder, predictions are written there in the forms of Cityscapes and COCO.
    """
    scores, annotations = scores_for(samples), []  # in COCO's panoptic form
    ids = torch.tensor([category.id for category in samples.categories])
    things = [label for label, category in enumerate(samples.categories) if category.isthing]
    loader = DataLoader(
        Subset(samples, indices),
        batch_size=None,
        num_workers=settings.workers,
        worker_init_fn=run.leave_interrupts_to_the_parent,
    )
    model.to(settings.device).eval()
    for sample in tqdm(loader, "evaluating", unit="image"):
        truth, stem = sample["truth"], submission_stem(sample["name"])
        class_probabilities, masks = predict(model, sample["image"], size, settings.device)
        if "semantic" in scores:
            labels = semantic(class_probabilities, masks).cpu()
            scores["semantic"].update(labels, *truth["semantic"])
            if submission:
                save_png(submission / f"semantic/{stem}.png", ids[labels].numpy())
        if "instance" in scores:
            found, labels, confidence = (part.cpu() for part in instances(class_probabilities, masks, things))
            if samples.coco:
                scores["instance"].update(sample["image_id"], found, ids[labels], confidence)
            else:
                scores["instance"].update(found, ids[labels], confidence, *truth["instance"])
                if submission:
                    save_instances(submission / "instance", stem, found, ids[labels], confidence)
        if "panoptic" in scores:
            segment_ids, segments = panoptic(class_probabilities, masks, things)
            segments = [{"id": s["id"], "category_id": int(ids[s["label"]])} for s in segments]
            scores["panoptic"].update(segment_ids.cpu(), segments, *truth["panoptic"])
            if submission:
                save_panoptic(submission / f"panoptic/{stem}.png", segment_ids.cpu())
                entry = {"image_id": sample["image_id"], "file_name": f"{stem}.png", "segments_info": segments}
                annotations.append(entry)
    if submission and "panoptic" in scores:
        run.write_json(submission / "panoptic.json", {"annotations": annotations})
    if submission and samples.coco and "instance" in scores:
        run.write_json(submission / "instances.json", scores["instance"].as_results())
    results = {task: score.result() for task, score in scores.items()}
    if samples.categories == KITTI360_THINGS:  # it counts buildings, hardly anyone else does
        others = [ap for name, ap in results["instance"]["per_class"].items() if name != "building"]
        results["instance"]["AP_without_building"] = mean(np.array(others))
    return results


def submission_stem(name: str) -> str:
    """The name of a picture's files in a submission; Cityscapes looks for <city>_<sequence>_<frame>*."""
    stem = Path(name).with_suffix("").as_posix().replace("/", "__")
    return stem.rsplit("__", 1)[-1].removesuffix("_leftImg8bit") if stem.endswith("_leftImg8bit") else stem


def save_png(path: Path, pixels: np.ndarray) -> None:
    """8 bits a channel; pixels [H, W] or [H, W, 3]."""
    with run.whole_file(path) as temporary:
        Image.fromarray(pixels.astype(np.uint8)).save(temporary, "PNG")


def save_instances(folder: Path, stem: str, masks: torch.Tensor, label_ids: torch.Tensor, scores: torch.Tensor) -> None:
    """Cityscapes' form: <stem>.txt with a line for each mask: its file, label id and confidence."""
    lines = []
    for i, (mask, label, score) in enumerate(zip(masks, label_ids.tolist(), scores.tolist(), strict=True)):
        save_png(folder / f"{stem}_{i:03}.png", 255 * mask.numpy())
        lines.append(f"{stem}_{i:03}.png {label} {score}\n")
    with run.whole_file(folder / f"{stem}.txt") as temporary:
        temporary.write_text("".join(lines))


def save_panoptic(path: Path, ids: torch.Tensor) -> None:
    """COCO's form: id = R + 256 G + 65536 B."""
    save_png(path, torch.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).numpy())


# ---------------------------------------------------------------------------------------------- report


def drawing(model: FusedModel, trained: dict, sample: dict, device: str) -> tuple[torch.Tensor, list]:
    """A row of predictions.png: the image, its truth if it has one, and the prediction (things above 0.5)."""
    image, things = sample["image"], [label for label, isthing in enumerate(trained["isthing"]) if isthing]
    class_probabilities, masks = predict(model, image, trained["recipe"]["test_size"], device)
    drawings = []
    if "segments" in sample:
        drawings.append(("truth", sample["segments"], sample["labels"].tolist()))
    elif "rles" in sample:
        true_masks = [torch.from_numpy(rle.decode(code)) for code in sample["rles"]]
        drawings.append(("truth", painted(true_masks, image), sample["labels"].tolist()))
    task = BENCHMARKS[trained["benchmark"]].task
    if task == "semantic":
        prediction = semantic(class_probabilities, masks).cpu() + 1, list(range(len(trained["class_names"])))
    elif task == "panoptic":
        ids, segments = panoptic(class_probabilities, masks, things)
        prediction = ids.cpu(), [segment["label"] for segment in segments]
    else:
        found, labels, confidence = (part.cpu() for part in instances(class_probabilities, masks, things))
        order = confidence.argsort()  # the surest on top
        order = order[confidence[order] > 0.5]
        prediction = painted(found[order], image), labels[order].tolist()
    return image, [*drawings, ("prediction", *prediction)]


def painted(masks, image: torch.Tensor) -> torch.Tensor:
    """Masks that may overlap, one over the other, as segment ids int [H, W]."""
    ids = torch.zeros(image.shape[1:], dtype=torch.int32)
    for i, mask in enumerate(masks):
        ids[mask.bool()] = i + 1
    return ids


def headline(results: dict, categories: list) -> dict[str, float]:
    """The numbers that a reader compares, in percent, in the order of the table; mIoU_th is that of the things."""
    numbers = {}
    if "semantic" in results:
        things = [results["semantic"]["per_class"][category.name] for category in categories if category.isthing]
        numbers["mIoU"] = results["semantic"]["mIoU"]
        if 0 < len(things) < len(categories):
            numbers["mIoU_th"] = mean(np.array(things))
        numbers["boundary_mIoU"] = results["semantic"]["boundary_mIoU"]
    for task, keys in {"instance": ("AP", "AP50", "AP_without_building"), "panoptic": ("PQ", "PQ_th", "PQ_st")}.items():
        numbers |= {key: results[task][key] for key in keys if key in results.get(task, {})}
    return numbers


def class_rows(results: dict) -> list[list[str]]:
    columns = {"semantic": "IoU", "instance": "AP", "panoptic": "PQ"}
    tasks = [task for task in columns if task in results]
    rows = [["class", *(columns[task] for task in tasks)]]
    for name in {name: None for task in tasks for name in results[task]["per_class"]}:
        values = [results[task]["per_class"].get(name, np.nan) for task in tasks]
        rows.append([name, *("-" if np.isnan(value) else f"{value:.1f}" for value in values)])
    return rows


def markdown(rows: list[list[str]]) -> str:
    """A table whose columns line up on a screen as well; the first row is its head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "".join(f"| {line} |\n" for line in lines)


def report(samples: Split, trained: dict, entry: dict) -> str:
    """What the model is, how it does, beside the paper's number, and class by class."""
    fusion = f"{trained['auxiliary']} at stride {trained['stride']}, fusion {trained['fusion']}"
    fusion = "alone" if trained["fusion"] == "none" else fusion
    benchmark, steps = BENCHMARKS[trained["benchmark"]], trained["recipe"]["steps"]
    title = f"{trained['master']}, {fusion}, {steps} steps on {benchmark.trains_on}, seed {trained['seed']}; percent"
    title += "".join(f"; RANDOM WEIGHTS at the start: {e}" for e, w in trained["weights"].items() if w == "none")
    paper = f"; the paper: {', '.join(benchmark.measures)} {benchmark.paper}" if benchmark.paper != "-" else ""
    where = f"{trained['benchmark']}, {entry['images']} of {len(samples)} images{paper}"
    scores = entry["scores"]
    table = markdown([list(scores), [f"{value:.1f}" for value in scores.values()]])
    return "\n".join([f"{title}\n", f"{where}\n", table, markdown(class_rows(entry))])


def compare(folders: tuple[Path, ...]) -> str:
    """A row a run with its scores, then every benchmark beside the paper's number."""
    runs = []
    for folder in folders:
        if not (folder / "results.json").is_file():
            print(f"left out: {folder} has no results.json, which 05_eval.py writes for a trained run")
            continue
        try:
            results = run.read_stage(folder, "results.json", "05_eval.py")
            ((benchmark, entry),) = results["benchmarks"].items()
            runs.append((folder.name, benchmark, results["model"], entry["scores"]))
        except UserError as error:
            print(f"left out: {error}")
        except (KeyError, TypeError, ValueError):
            print(f"left out: {folder}/results.json is of another version: run 05_eval.py again")
    need(runs, "none of these folders holds results: run 05_eval.py on them first")
    names = list(dict.fromkeys(name for *_, scores in runs for name in scores))
    names = [name for name in names if name in ("mIoU", "boundary_mIoU", "AP", "PQ")]
    short = ["b_mIoU" if name == "boundary_mIoU" else name for name in names]
    rows = [["run", "benchmark", "master", "auxiliary", "OS", "fusion", "steps", *short]]
    for name, benchmark, model, scores in sorted(runs, key=lambda entry: (entry[1], entry[2]["stride"])):
        fused = model["fusion"] != "none"
        pair = [model["auxiliary"], str(model["stride"])] if fused else ["-", "-"]
        modes = f"{model['fusion']} {model['master_mode']}" + (f"/{model['aux_mode']}" if fused else "")
        numbers = ["-" if scores.get(name) is None else f"{scores[name]:.1f}" for name in names]
        what = [cell if len(cell) <= 11 else f"{cell[:10]}…" for cell in (name, benchmark, model["master"], *pair)]
        rows.append([*what, modes, str(model["steps"]), *numbers])
    paper = [["benchmark", "score", "paper", "here, best"]]
    for name, benchmark in BENCHMARKS.items():
        best = []
        for measure in benchmark.measures:
            ours = [scores[measure] for _, ran, _, scores in runs if ran == name and scores.get(measure) is not None]
            best.append(f"{max(ours):.1f}" if ours else "-")
        paper.append([name, ", ".join(benchmark.measures), benchmark.paper, ", ".join(best)])
    return f"{markdown(rows)}\n{markdown(paper)}"


# ---------------------------------------------------------------------------------------------- the stage


def load_trained(folder: Path) -> tuple[FusedModel, dict]:
    """The model of a run's checkpoint and what it was trained with: 04_train.py's Training, as a dictionary."""
    path, again = folder / "checkpoint.pt", f"run `{run.command('04_train.py', folder)}`"
    need(path.is_file(), f"{path} is missing: {again} first")
    try:
        checkpoint = torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a damaged file
        raise UserError(f"{path} cannot be read ({type(error).__name__}): {again} again") from None
    try:
        trained, step = checkpoint["settings"], checkpoint["step"]
        if step < trained["recipe"]["steps"]:
            print(f"WARNING: {path} holds step {step} of {trained['recipe']['steps']}: training is not finished")
            trained["recipe"]["steps"] = step  # what is reported is what was trained
        model = build_model(trained, weights={})
        model.load_state_dict(checkpoint["model"])
    except (KeyError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is no checkpoint of this project's model ({type(error).__name__}: {reason})") from None
    return model, trained


def draw_folder(model: FusedModel, trained: dict, settings: Settings) -> None:
    """predictions/<picture>.png for each picture of a folder."""
    folder = settings.run / "predictions"
    for name in tqdm(list_pictures(settings.images), "predicting", unit="picture"):
        try:
            image = read_image(settings.images / name)
        except UserError as error:
            tqdm.write(f"left out: {error}", file=sys.stderr)
            continue
        row = drawing(model, trained, {"image": image}, settings.device)
        figures.draw_predictions(folder / f"{name}.png", [row], trained["class_names"])
    print(f"wrote {folder}/")


def next_command(folder: Path, trained: dict) -> str:
    if trained["fusion"] == "none":
        return "python 05_eval.py --compare runs/*"
    flags = ("--out", f"{folder}_alone", "--fusion", "none", "--steps", str(trained["recipe"]["steps"]))
    return f"{run.command('04_train.py', folder, *flags)}   # the master alone, to compare"


def main():
    settings = run.parse(__doc__, Settings)
    need(not (settings.images and settings.compare), "--images and --compare are two things to do: give one")
    other = (settings.images or settings.compare) and (settings.limit or settings.save_predictions)
    need(not other, "--limit and --save-predictions go with an evaluation, not with --images or --compare")
    if settings.compare:
        print(compare(settings.compare))
        return
    folder = settings.run
    asked = run.read_stage(folder, "run.json", "01_extract.py")
    model, trained = load_trained(folder)
    if settings.images:
        draw_folder(model.to(settings.device).eval(), trained, settings)
        return

    benchmark = trained["benchmark"]
    samples = open_split(benchmark, settings.data or Path(asked["data"]), "val")
    fits = [category.name for category in samples.categories] == trained["class_names"]
    need(fits, f"the model was trained on other classes than those of {samples.root}")
    count = min(len(samples), settings.limit or len(samples))
    indices = [i * len(samples) // count for i in range(count)]
    part = f"_limit{count}" if count < len(samples) else ""  # a look at some never takes the place of all
    submission = folder / f"submission{part}" / benchmark if settings.save_predictions else None
    if submission:
        shutil.rmtree(submission, ignore_errors=True)  # of an earlier model
    results = evaluate(model, samples, trained["recipe"]["test_size"], settings, indices, submission)

    entry = {"images": count, "scores": headline(results, samples.categories), **results}
    keys = ("benchmark", "master", "auxiliary", "stride", "fusion", "seed", "master_mode", "aux_mode", "weights")
    what = {key: trained[key] for key in keys} | {"steps": trained["recipe"]["steps"]}
    run.write_json(folder / f"results{part}.json", {"model": what, "benchmarks": {benchmark: entry}})
    text = report(samples, trained, entry)
    with run.whole_file(folder / f"results{part}.md") as temporary:
        temporary.write_text(text)
    rows = [drawing(model, trained, samples[i], settings.device) for i in indices[:: max(1, count // 3)][:3]]
    figures.draw_predictions(folder / f"predictions{part}.png", rows, trained["class_names"])
    saved = f", submission{part}/" if submission else ""
    print(f"\n{text}\nwrote results{part}.json, results{part}.md, predictions{part}.png{saved} in {folder}")
    print(f"next: {next_command(folder, trained)}")


# ---------------------------------------------------------------------------------------------- scores


class SemanticScore:
    """Mean intersection over union from confusion matrices over all images, as Cityscapes defines it.

    boundary_mIoU is the same on each class's boundary alone: its pixels within 2 % of the image's diagonal of pixels
    that are not of the class (Boundary IoU, Cheng et al. 2021). Void is cut out of truth and prediction alike.
    """

    def __init__(self, class_names: list[str]):
        self.names = class_names
        size = len(class_names) + 1  # void comes last
        self.confusion = np.zeros((size, size), np.int64)  # [truth, prediction]
        self.near = np.zeros((size, size), np.int64)  # the same where both are boundary
        self.boundary = np.zeros((2, size), np.int64)  # boundary pixels of each class in truth, prediction

    def update(self, pred: torch.Tensor, target: torch.Tensor) -> None:
        """pred int [H, W] of class indices; target the same, 255 where it does not count."""
        void, size = len(self.names), len(self.confusion)
        target = target.numpy().astype(np.uint8)
        counts = target != 255
        target = np.where(counts, target, void).astype(np.uint8)
        pred = np.where(counts, pred.numpy(), void).astype(np.uint8)
        self.confusion += count_pairs(target, pred, (size, size))
        distance = max(1, round(0.02 * np.hypot(*target.shape)))
        edges = [self.is_boundary(labels, distance) for labels in (target, pred)]
        both = edges[0] & edges[1]
        self.near += count_pairs(target[both], pred[both], (size, size))
        for row, labels, edge in zip(self.boundary, (target, pred), edges, strict=True):
            row += np.bincount(labels[edge], minlength=size)

    @staticmethod
    def is_boundary(labels: np.ndarray, distance: int) -> np.ndarray:
        """Pixels with another label, or the image's end, at most `distance` away in both axes: bool [H, W]."""
        window = 2 * distance + 1
        highest = ndimage.maximum_filter(labels, window, mode="constant", cval=255)  # beyond the end: no class
        return highest != ndimage.minimum_filter(labels, window, mode="constant", cval=255)

    def result(self) -> dict:
        """mIoU, boundary_mIoU and per_class (IoU) in percent; a class absent from the truth is NaN and left out."""
        truth, predicted = self.confusion[:-1].sum(1), self.confusion[:, :-1].sum(0)
        results = []
        for hit, union in [
            (np.diag(self.confusion)[:-1], truth + predicted - np.diag(self.confusion)[:-1]),
            (np.diag(self.near)[:-1], self.boundary.sum(0)[:-1] - np.diag(self.near)[:-1]),
        ]:
            iou = np.where(truth > 0, 100 * hit / np.maximum(union, 1), np.nan)
            results.append((mean(iou), dict(zip(self.names, iou.tolist(), strict=True))))
        (miou, per_class), (boundary_miou, _) = results
        return {"mIoU": miou, "boundary_mIoU": boundary_miou, "per_class": per_class}


def mean(values: np.ndarray) -> float:
    """Of the numbers that are not NaN; NaN if there are none."""
    return float(np.nanmean(values)) if np.isfinite(values).any() else np.nan


class CityscapesInstanceScore:
    """Cityscapes' instance AP by the rules of cityscapesScripts; with weights, KITTI-360's.

    label_ids: {name: raw label id} of the classes that count, or a list of ids. Of the true instance ids, id*1000 + n
    is an instance, the bare id of a class that counts a group, those of CITYSCAPES_VOID are void, all else background.
    """

    OVERLAPS = np.arange(0.5, 1.0, 0.05)
    SMALLEST = 100  # pixels; smaller instances are neither wanted nor wrong

    def __init__(self, label_ids: dict[str, int] | list[int]):
        self.ids = label_ids if isinstance(label_ids, dict) else {label: label for label in label_ids}
        self.scored = {(label, k): [] for label in self.ids.values() for k in range(len(self.OVERLAPS))}
        self.missed = np.zeros((max(self.ids.values()) + 1, len(self.OVERLAPS)), int)  # instances nobody found
        self.truths = defaultdict(int)  # {label id: instances that count}

    def update(
        self,
        masks: torch.Tensor,
        labels: torch.Tensor,
        scores: torch.Tensor,
        instance_ids: torch.Tensor,
        weights: torch.Tensor | None = None,
    ) -> None:
        """masks bool [N, H, W], labels int64 [N] (raw ids), scores float [N], instance_ids int64 [H, W].

        With weights, float [H, W], areas and overlaps are sums of them.
        """
        ids, weights = instance_ids.numpy(), None if weights is None else weights.numpy()
        values, places = compact(ids)  # [V], [H, W]
        values = np.array(values)
        true_area = np.bincount(places.ravel(), None if weights is None else weights.ravel())  # [V]
        overlap = np.array([self.areas(mask, places, weights, len(values)) for mask in masks.numpy()])  # [N, V]
        overlap = overlap.reshape(len(masks), len(values))
        area, labels, scores = overlap.sum(1), labels.numpy(), scores.double().numpy()
        classes = np.where(values >= 1000, values // 1000, values)
        classes[classes == 34] = 11  # KITTI-360's garages are buildings
        void = np.isin(values, CITYSCAPES_VOID)

        for label in self.ids.values():
            mine, true = (labels == label) & ~np.isclose(area, 0), classes == label
            confidence, shared = scores[mine], overlap[mine][:, true]  # [P], [P, T]
            iou = shared / (area[mine][:, None] + true_area[true] - shared)
            group, small = values[true] < 1000, true_area[true] < self.SMALLEST
            wanted = ~group & ~small
            excused = overlap[mine][:, void].sum(1) + (shared * (group.astype(int) + small)).sum(1)
            self.truths[label] += wanted.sum()
            for k, threshold in enumerate(self.OVERLAPS):
                over = iou > threshold  # [P, T]; at most one in a row, as thresholds are not below one half
                false = ~over.any(1) & (excused / area[mine] <= threshold)
                over = over[:, wanted]
                self.missed[label, k] += (~over.any(0)).sum()
                right = np.zeros(len(confidence), bool)  # of those that found one instance, the surest
                if right.size:
                    right[np.where(over, confidence[:, None], -np.inf).argmax(0)[over.any(0)]] = True
                chosen = over.any(1) | false
                self.scored[label, k].append((confidence[chosen], right[chosen]))

    @staticmethod
    def areas(mask: np.ndarray, places: np.ndarray, weights: np.ndarray | None, count: int) -> np.ndarray:
        """How much of a mask, bool [H, W], lies on each of `count` places: float [count]."""
        rows = np.flatnonzero(mask.any(1))
        if not len(rows):
            return np.zeros(count)
        columns = np.flatnonzero(mask[rows[0] : rows[-1] + 1].any(0))
        box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        inside = mask[box]
        return np.bincount(places[box][inside], None if weights is None else weights[box][inside], count).astype(float)

    def result(self) -> dict:
        """AP, AP50 and per_class (AP by name or id) in percent; a class absent from the truth is NaN and left out."""
        table = np.full((len(self.ids), len(self.OVERLAPS)), np.nan)
        for row, label in zip(table, self.ids.values(), strict=True):
            for k in range(len(self.OVERLAPS)):
                if self.truths[label]:
                    row[k] = 100 * self.average_precision(self.scored[label, k], self.missed[label, k])
        per_class = {name: float(row.mean()) for name, row in zip(self.ids, table, strict=True)}
        return {"AP": mean(table), "AP50": mean(table[:, 0]), "per_class": per_class}

    @staticmethod
    def average_precision(scored: list, missed: int) -> float:
        """Area under the precision-recall curve, one point for each score that occurs."""
        scores, right = (np.concatenate(parts) for parts in zip(*scored, strict=True))
        if not len(scores):
            return 0.0
        order = scores.argsort()
        _, first = np.unique(scores[order], return_index=True)  # predictions from here on are counted at this point
        below = np.append(right[order].cumsum(), 0)[first - 1]  # right ones that fall under the score
        hits = right.sum() - below
        precision = np.append(hits / (len(scores) - first), 1.0)
        recall = np.append(hits / (right.sum() + missed), 0.0)
        around = np.concatenate([recall[:1], recall, [0.0]])
        return float(precision @ (around[:-2] - around[2:]) / 2)


class CocoInstanceScore:
    """COCO's mask AP by pycocotools. annotations: path of a COCO instances JSON."""

    def __init__(self, annotations: Path):
        self.annotations = annotations
        self.image_ids, self.detections = [], []

    def update(self, image_id: int, masks: torch.Tensor, category_ids: torch.Tensor, scores: torch.Tensor) -> None:
        """masks bool [N, H, W], category_ids int64 [N] as in the annotations, scores float [N]."""
        self.image_ids.append(image_id)
        for mask, category, score in zip(masks, category_ids.tolist(), scores.tolist(), strict=True):
            if mask.any():
                code = rle.encode(np.asfortranarray(mask.numpy(), np.uint8))
                entry = {"image_id": image_id, "category_id": category, "segmentation": code, "score": score}
                self.detections.append(entry)

    def as_results(self) -> list[dict]:
        """The detections in the form of COCO's results JSON."""
        return [
            entry | {"segmentation": entry["segmentation"] | {"counts": entry["segmentation"]["counts"].decode()}}
            for entry in self.detections
        ]

    def result(self) -> dict:
        """AP, AP50, AP75, APs, APm, APl and per_class (by name) in percent; NaN where there is no truth."""
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO(str(self.annotations))
            found = truth.loadRes(self.detections) if self.detections else COCO()
            evaluation = COCOeval(truth, found, "segm")
            evaluation.params.imgIds = sorted(self.image_ids)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        percent = np.where(evaluation.stats[:6] > -1, 100 * evaluation.stats[:6], np.nan).tolist()
        result = dict(zip(("AP", "AP50", "AP75", "APs", "APm", "APl"), percent, strict=True)) | {"per_class": {}}
        precision = evaluation.eval["precision"][:, :, :, 0, -1]  # [IoU, recall, class] for all sizes, 100 detections
        for index, category in enumerate(evaluation.params.catIds):
            values = precision[:, :, index][precision[:, :, index] > -1]
            ap = 100 * values.mean() if len(values) else np.nan
            result["per_class"][truth.cats[category]["name"]] = float(ap)
        return result


class PanopticScore:
    """Panoptic quality by the rules of COCO's panopticapi; categories: [{"id", "isthing", "name"}].

    PQ = sum of IoU over TP / (TP + FP/2 + FN/2), for each class, then the mean. A predicted and a true segment of one
    class match if their IoU, void left out of the union, is above 0.5.
    """

    def __init__(self, categories: list[dict]):
        self.categories = {category["id"]: category for category in categories}
        self.iou, self.tp, self.fp, self.fn = (defaultdict(float) for _ in range(4))  # by category id

    def update(
        self, pred_ids: torch.Tensor, pred_segments: list[dict], true_ids: torch.Tensor, true_segments: list[dict]
    ) -> None:
        """ids int [H, W], 0 void; segments [{"id", "category_id"(, "iscrowd" in the truth)}]."""
        predicted = {segment["id"]: segment["category_id"] for segment in pred_segments}
        true = {s["id"]: s["category_id"] for s in true_segments if not s.get("iscrowd")}
        crowds = {s["category_id"]: s["id"] for s in true_segments if s.get("iscrowd")}
        pred_values, pred_places = compact(pred_ids.numpy())  # ids may be large and far apart
        true_values, true_places = compact(true_ids.numpy())
        pairs = count_pairs(pred_places, true_places, (len(pred_values), len(true_values)))
        overlap = {(pred_values[i], true_values[j]): int(pairs[i, j]) for i, j in zip(*pairs.nonzero(), strict=True)}
        pred_area, true_area = defaultdict(int), defaultdict(int)
        for (p, t), area in overlap.items():
            pred_area[p] += area
            true_area[t] += area

        matched_pred, matched_true = set(), set()
        for (p, t), area in overlap.items():
            if p == 0 or t not in true or predicted[p] != true[t]:  # void and crowds match nothing
                continue
            union = pred_area[p] + true_area[t] - area - overlap.get((p, 0), 0)
            if area / union > 0.5:
                matched_pred.add(p)
                matched_true.add(t)
                self.iou[true[t]] += area / union
                self.tp[true[t]] += 1
        for t, category in true.items():
            self.fn[category] += t not in matched_true
        for p, category in predicted.items():
            # A prediction that lies mostly on void or on a crowd of its class is no false positive.
            excused = overlap.get((p, 0), 0) + overlap.get((p, crowds.get(category)), 0)
            if p not in matched_pred and excused <= 0.5 * pred_area[p]:
                self.fp[category] += 1

    def result(self) -> dict:
        """PQ, SQ, RQ, PQ_th, PQ_st and per_class (PQ by name) in percent; NaN, and left out, is a class that
        neither truth nor predictions hold: as in panopticapi, predictions of a class that is not there count."""
        rows = {}
        for category, entry in self.categories.items():
            tp, weight = self.tp[category], self.tp[category] + (self.fp[category] + self.fn[category]) / 2
            sq = 100 * self.iou[category] / max(tp, 1) if weight else np.nan
            rq = 100 * tp / weight if weight else np.nan
            rows[category] = (sq * rq / 100, sq, rq, bool(entry["isthing"]))
        table = np.array(list(rows.values()), float)  # [category, (PQ, SQ, RQ, is it a thing?)]
        parts = {"PQ": table[:, 0], "SQ": table[:, 1], "RQ": table[:, 2]}
        parts |= {"PQ_th": table[table[:, 3] == 1, 0], "PQ_st": table[table[:, 3] == 0, 0]}
        result = {name: mean(values) for name, values in parts.items()}
        return result | {"per_class": {self.categories[c]["name"]: row[0] for c, row in rows.items()}}


if __name__ == "__main__":
    run.start(main)
