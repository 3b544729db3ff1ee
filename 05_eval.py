"""Stage 5: evaluate the trained model.

    python 05_eval.py                                the run's own benchmark, runs/toycity
    python 05_eval.py --run runs/stride8             an ablation
    python 05_eval.py --images holiday/              no scores: draw what the model sees on your own pictures

One model answers three questions. Semantic: which class is each pixel? (mIoU) Instance: where is each thing, and how
sure are we? (AP) Panoptic: one label for each pixel, things told apart. (PQ)

Reads run.json and checkpoint.pt. Writes results.json, results.md and predictions.png, all scores in percent.
"""

import contextlib
import io
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from common import figures, run
from common.benchmarks import BENCHMARKS, list_pictures, on_disk, open_split, read_image, resize_image
from common.model import FusedModel, build_model
from common.run import UserError

# ---------------------------------------------------------------------------------------------- settings


def parse_arguments():
    parser = run.arguments(__doc__)
    parser.add_argument("--data", type=Path, help="data root (default: as in stage 1)")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="draw predictions on a folder of pictures")
    parser.add_argument("--limit", type=run.positive, help="evaluate only so many images, evenly spaced")
    return parser.parse_args()


# ---------------------------------------------------------------------------------------------- inference


@torch.inference_mode()
def predict(model: FusedModel, image: torch.Tensor, size: str, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """One image, uint8 [3, H, W], through the model at the working `size`.

    Returns class probabilities [Q, classes + 1], the last column no-object, and mask probabilities [Q, H, W] at the
    image's own size: the logits are enlarged, not the decisions.
    """
    scaled = resize_image(image, size)[None].to(device)  # [1, 3, h, w]
    class_logits, mask_logits = model(scaled)[-1]  # [1, Q, classes + 1], [1, Q, h/4, w/4]
    masks = F.interpolate(mask_logits.float(), image.shape[1:], mode="bilinear", align_corners=False)
    return class_logits[0].float().softmax(-1), masks[0].sigmoid_()


def semantic(classes: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Class of each pixel, int64 [H, W]: every query votes for its classes where its mask is."""
    return torch.einsum("qc,qhw->chw", classes[:, :-1], masks).argmax(0)


def instances(
    classes: torch.Tensor, masks: torch.Tensor, things: list[int], top: int = 100
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The things among the `top` best pairs of query and class: masks bool [N, H, W], labels int64 [N], scores [N].

    score = class probability x mean mask probability inside the mask.
    """
    probabilities = classes[:, :-1]
    scores, order = probabilities.flatten().topk(min(top, probabilities.numel()))
    queries, labels = order // probabilities.shape[1], order % probabilities.shape[1]
    thing = torch.isin(labels, torch.tensor(things, device=labels.device))
    queries, labels, scores = queries[thing], labels[thing], scores[thing]
    binary = masks > 0.5  # [Q, H, W]; made once, a query may appear with several classes
    quality = (masks * binary).sum((1, 2)) / binary.sum((1, 2)).clamp(min=1)
    return binary[queries], labels, scores * quality[queries]


def panoptic(
    classes: torch.Tensor,
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
    scores, labels = classes.max(-1)
    chosen = (labels < classes.shape[1] - 1) & (scores > object_threshold)
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


# ---------------------------------------------------------------------------------------------- scores


class SemanticScore:
    """Mean intersection over union from one confusion matrix over all images, as Cityscapes defines it."""

    def __init__(self, class_names: list[str]):
        self.names = class_names
        self.confusion = torch.zeros(len(class_names), len(class_names), dtype=torch.int64)  # [truth, prediction]

    def update(self, pred: torch.Tensor, target: torch.Tensor) -> None:
        """pred int [H, W] of class indices; target the same, 255 where it does not count."""
        counts = target != 255
        pairs = target[counts].long() * len(self.names) + pred[counts].long()
        self.confusion += torch.bincount(pairs, minlength=len(self.names) ** 2).view_as(self.confusion)

    def result(self) -> dict:
        """mIoU and per_class in percent; a class absent from the truth is NaN and left out of the mean."""
        hit = self.confusion.diag().double()
        truth, predicted = self.confusion.sum(1), self.confusion.sum(0)
        iou = torch.where(truth > 0, 100 * hit / (truth + predicted - hit), torch.nan)
        return {"mIoU": iou.nanmean().item(), "per_class": dict(zip(self.names, iou.tolist(), strict=True))}


class CocoInstanceScore:
    """COCO's mask AP by pycocotools. annotations: path of a COCO instances JSON, or its content."""

    def __init__(self, annotations: Path | dict):
        with contextlib.redirect_stdout(io.StringIO()):
            self.truth = COCO() if isinstance(annotations, dict) else COCO(annotations)
            if isinstance(annotations, dict):
                self.truth.dataset = annotations
                self.truth.createIndex()
        self.image_ids, self.detections = [], []

    def update(self, image_id: int, masks: torch.Tensor, category_ids: torch.Tensor, scores: torch.Tensor) -> None:
        """masks bool [N, H, W], category_ids int64 [N] as in the annotations, scores float [N]."""
        self.image_ids.append(image_id)
        for mask, category, score in zip(masks, category_ids.tolist(), scores.tolist(), strict=True):
            if mask.any():
                code = rle.encode(np.asfortranarray(mask.numpy(), np.uint8))
                entry = {"image_id": image_id, "category_id": category, "segmentation": code, "score": score}
                self.detections.append(entry)

    def result(self) -> dict:
        """AP, AP50, AP75, APs, APm, APl and per_class (by name) in percent; NaN where there is no truth."""
        with contextlib.redirect_stdout(io.StringIO()):
            found = self.truth.loadRes(self.detections) if self.detections else COCO()
            evaluation = COCOeval(self.truth, found, "segm")
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
            result["per_class"][self.truth.cats[category]["name"]] = float(ap)
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
        base = int(true_ids.max()) + 1
        pairs, areas = (pred_ids.long() * base + true_ids.long()).unique(return_counts=True)
        overlap = {divmod(pair, base): area for pair, area in zip(pairs.tolist(), areas.tolist(), strict=True)}
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
        """PQ, SQ, RQ, PQ_th, PQ_st and per_class (PQ by name) in percent; a class never met is NaN and left out."""
        rows = {}
        for category, entry in self.categories.items():
            tp, weight = self.tp[category], self.tp[category] + (self.fp[category] + self.fn[category]) / 2
            sq = 100 * self.iou[category] / max(tp, 1) if weight else np.nan
            rq = 100 * tp / weight if weight else np.nan
            rows[category] = (sq * rq / 100, sq, rq, bool(entry["isthing"]))
        table = np.array(list(rows.values()), float)  # [category, (PQ, SQ, RQ, is it a thing?)]
        parts = {"PQ": table[:, 0], "SQ": table[:, 1], "RQ": table[:, 2]}
        parts |= {"PQ_th": table[table[:, 3] == 1, 0], "PQ_st": table[table[:, 3] == 0, 0]}
        result = {name: float(np.nanmean(v)) if np.isfinite(v).any() else np.nan for name, v in parts.items()}
        return result | {"per_class": {self.categories[c]["name"]: row[0] for c, row in rows.items()}}


# ---------------------------------------------------------------------------------------------- evaluation


def evaluate(
    model: FusedModel, samples, size: str, device: str, workers: int, indices: list[int] | None = None
) -> dict:
    """Score a model on a validation split; `indices` picks images. Returns {task: that score's result}.

    A panoptic data set gets all three scores, a semantic one mIoU; Cityscapes' AP, for instances, is not here yet.
    """
    names = [name for _, name, _ in samples.categories]
    ids = torch.tensor([raw for raw, _, _ in samples.categories])
    things = [label for label, (_, _, isthing) in enumerate(samples.categories) if isthing]
    indices = list(range(len(samples))) if indices is None else indices
    loader = DataLoader(
        Subset(samples, indices),
        batch_size=None,
        num_workers=workers,
        worker_init_fn=run.leave_interrupts_to_the_parent,
    )
    scores = {"semantic": SemanticScore(names)}
    if samples.task == "panoptic":
        categories = [{"id": raw, "name": name, "isthing": isthing} for raw, name, isthing in samples.categories]
        scores["instance"] = CocoInstanceScore(coco_annotations(loader, categories))
        scores["panoptic"] = PanopticScore(categories)

    model.to(device).eval()
    for sample in tqdm(loader, "evaluating", unit="image"):
        classes, masks = predict(model, sample["image"], size, device)
        scores["semantic"].update(semantic(classes, masks).cpu(), *sample["truth"]["semantic"])
        if "panoptic" in scores:
            found, labels, confidence = instances(classes, masks, things)
            scores["instance"].update(sample["image_id"], found.cpu(), ids[labels.cpu()], confidence.cpu())
            segment_ids, segments = panoptic(classes, masks, things)
            segments = [{"id": s["id"], "category_id": int(ids[s["label"]])} for s in segments]
            scores["panoptic"].update(segment_ids.cpu(), segments, *sample["truth"]["panoptic"])
    return {task: score.result() for task, score in scores.items()}


def coco_annotations(loader: DataLoader, categories: list[dict]) -> dict:
    """The things of a panoptic data set in the form of COCO's instances JSON."""
    content = {"images": [], "annotations": [], "categories": [entry for entry in categories if entry["isthing"]]}
    for sample in loader:
        height, width = sample["segments"].shape
        content["images"].append({"id": sample["image_id"], "height": height, "width": width})
        for index, (label, crowd) in enumerate(zip(sample["labels"].tolist(), sample["crowd"].tolist(), strict=True)):
            if categories[label]["isthing"]:
                mask = (sample["segments"] == index + 1).numpy()
                annotation = {
                    "id": len(content["annotations"]) + 1,
                    "image_id": sample["image_id"],
                    "category_id": categories[label]["id"],
                    "segmentation": rle.encode(np.asfortranarray(mask, np.uint8)),
                    "area": int(mask.sum()),
                    "iscrowd": int(crowd),
                }
                content["annotations"].append(annotation)
    return content


def load_trained(folder: Path) -> tuple[FusedModel, dict]:
    """The model of a run's checkpoint and the settings it was trained with."""
    path = folder / "checkpoint.pt"
    if not path.is_file():
        raise UserError(f"{path} is missing: run `{run.command('04_train.py', folder)}` first")
    try:
        checkpoint = torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a damaged file
        raise UserError(
            f"{path} cannot be read ({type(error).__name__}): run `{run.command('04_train.py', folder)}` again"
        ) from None
    settings = checkpoint["settings"]
    if checkpoint["step"] < settings["steps"]:
        print(f"WARNING: {path} holds step {checkpoint['step']} of {settings['steps']}: training is not finished")
    model = build_model(settings, weights={})
    model.load_state_dict(checkpoint["model"])
    return model, settings


# ---------------------------------------------------------------------------------------------- report


def headline(results: dict, categories: list) -> dict[str, float]:
    """The numbers that a reader compares, in percent, in the order of the table; mIoU_th is that of the things."""
    per_class = results["semantic"]["per_class"]
    things = [per_class[name] for _, name, isthing in categories if isthing and not np.isnan(per_class[name])]
    numbers = {"mIoU": results["semantic"]["mIoU"], "mIoU_th": float(np.mean(things)) if things else np.nan}
    for task, keys in {"instance": ("AP", "AP50"), "panoptic": ("PQ", "PQ_th", "PQ_st")}.items():
        numbers |= {key: results[task][key] for key in keys if task in results}
    return numbers


def benchmark_rows(name: str, numbers: dict[str, float], data: Path) -> list[list[str]]:
    """Every benchmark with the paper's number and ours, or why there is none."""
    rows = [["benchmark", "trains on", "evaluates on", "score", "paper", "here"]]
    for other, benchmark in BENCHMARKS.items():
        ours = "not evaluated" if on_disk(benchmark, data) else "not on disk"
        ours = ours if benchmark.categories else f"{ours}, no reader yet"
        if other == name:
            ours = ", ".join(f"{numbers[measure]:.1f}" for measure in benchmark.measures)
        where = [other, benchmark.trains_on, benchmark.evaluates_on]
        rows.append([*where, ", ".join(benchmark.measures), benchmark.paper, ours])
    return rows


def class_rows(results: dict) -> list[list[str]]:
    columns = {"semantic": "IoU", "instance": "AP", "panoptic": "PQ"}
    rows = [["class", *(columns[task] for task in results)]]
    for name in results["semantic"]["per_class"]:
        values = [results[task]["per_class"].get(name, np.nan) for task in results]
        rows.append([name, *("-" if np.isnan(value) else f"{value:.1f}" for value in values)])
    return rows


def markdown(rows: list[list[str]]) -> str:
    """A table whose columns line up on a screen as well; the first row is its head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "".join(f"| {line} |\n" for line in lines)


def draw_folder(model, settings: dict, things: list[int], pictures: Path, folder: Path, device: str) -> None:
    """predictions/<picture>.png for each picture of a folder."""
    for name in tqdm(list_pictures(pictures), "predicting", unit="picture"):
        try:
            image = read_image(pictures / name)
        except UserError as error:
            print(f"left out: {error}")
            continue
        ids, segments = panoptic(*predict(model, image, settings["test_size"], device), things)
        row = (image, [("prediction", ids.cpu(), [s["label"] for s in segments])])
        path = folder / "predictions" / f"{name.replace('/', '__')}.png"
        figures.draw_predictions(path, [row], settings["classes"])
    print(f"wrote {folder}/predictions/")


def main():
    args = parse_arguments()
    folder = args.run
    asked = run.read_stage(folder, "run.json", "01_extract.py")
    model, settings = load_trained(folder)
    things = [label for label, isthing in enumerate(settings["isthing"]) if isthing]
    if args.images:
        draw_folder(model.to(args.device).eval(), settings, things, args.images, folder, args.device)
        return

    name, data, size = settings["benchmark"], args.data or Path(asked["data"]), settings["test_size"]
    samples = open_split(name, data, "val")
    if samples.task == "instance":
        raise UserError(f"{name} is scored by Cityscapes' AP, which is not written yet")
    count = min(len(samples), args.limit or len(samples))
    indices = [i * len(samples) // count for i in range(count)]
    results = evaluate(model, samples, size, args.device, args.workers, indices)

    # Three pictures: image, truth, prediction
    rows = []
    for index in indices[:: max(1, count // 3)][:3]:
        sample = samples[index]
        ids, segments = panoptic(*predict(model, sample["image"], size, args.device), things)
        truth = ("truth", sample["segments"], sample["labels"].tolist())
        rows.append((sample["image"], [truth, ("prediction", ids.cpu(), [s["label"] for s in segments])]))
    figures.draw_predictions(folder / "predictions.png", rows, settings["classes"])

    # What the model is, how it does, class by class, and beside the paper
    what = {key: settings[key] for key in ("master", "auxiliary", "stride", "fusion", "steps", "seed", "weights")}
    run.write_json(folder / "results.json", {"benchmark": name, "images": count, **what, **results})
    numbers = headline(results, samples.categories)
    tables = [[list(numbers), [f"{value:.1f}" for value in numbers.values()]]]
    tables += [class_rows(results), benchmark_rows(name, numbers, data)]
    title = (
        f"{settings['master']}, {settings['auxiliary']} at stride {settings['stride']}, fusion {settings['fusion']}, "
    )
    title += f"{settings['steps']} steps, seed {settings['seed']}; {count} images of {name}; percent"
    title += "".join(f"; RANDOM WEIGHTS at the start: {e}" for e, w in settings["weights"].items() if w == "none")
    report = "\n".join([f"{title}\n", *map(markdown, tables)])
    with run.whole_file(folder / "results.md") as temporary:
        temporary.write_text(report)
    print(f"\n{report}\nwrote {folder}/results.json, results.md, predictions.png")
    if settings["fusion"] != "none":
        flags = ("--out", f"{folder}_alone", "--fusion", "none", "--steps", str(settings["steps"]))
        print(f"next: the master alone, to compare: {run.command('04_train.py', folder, *flags)}")


if __name__ == "__main__":
    run.start(main)
