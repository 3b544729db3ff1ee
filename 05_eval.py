"""Stage 5: evaluate the trained model.

    python 05_eval.py                                    the run's own benchmark, runs/toycity
    python 05_eval.py --benchmark cityscapes_instance    another one of the same classes
    python 05_eval.py --all                              every benchmark that is on disk and has the model's classes
    python 05_eval.py --save-predictions                 in the forms that Cityscapes and COCO want, under submission/
    python 05_eval.py --images holiday/                  no scores: draw what the model sees on your own pictures
    python 05_eval.py --compare runs/*                   no model: one table of what several runs scored
    torchrun --nproc_per_node=4 -- 05_eval.py …          the images shared by four GPUs

One model answers up to three questions. Semantic: which class is each pixel? (mIoU) Instance: where is each thing, and
how sure are we? (AP) Panoptic: one label for each pixel, things told apart. (PQ)

Reads run.json and checkpoint.pt. Writes results.json, results.md and predictions.png, all scores in percent.
"""

import contextlib
import io
import shutil
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy import ndimage, stats
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from common import figures, run
from common.benchmarks import (
    BENCHMARKS,
    CITYSCAPES_VOID,
    KITTI360_THINGS,
    CocoInstances,
    find_benchmark,
    list_pictures,
    on_disk,
    open_split,
    present,
    read_image,
    without_a_file_name,
    working_size,
)
from common.model import PADDING, FusedModel, build_model
from common.run import UserError

# ---------------------------------------------------------------------------------------------- settings


def parse_arguments():
    parser = run.arguments(__doc__)
    parser.add_argument("--data", type=Path, help="data root (default: as in stage 1)")
    parser.add_argument("--limit", type=run.positive, help="evaluate only so many images, evenly spaced")
    parser.add_argument("--save-predictions", action="store_true", help="write submission/ as well")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--benchmark", help="instead of the run's own")
    instead.add_argument("--all", action="store_true", help="every benchmark on disk whose classes fit")
    instead.add_argument("--images", type=Path, metavar="FOLDER", help="draw predictions on a folder of pictures")
    instead.add_argument("--compare", type=Path, nargs="+", metavar="RUN", help="table the results of several runs")
    args = parser.parse_args()
    if (args.images or args.compare) and (args.limit or args.save_predictions):
        parser.error("--limit and --save-predictions go with an evaluation, not with --images or --compare")
    return args


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
        void, size = len(self.names), len(self.names) + 1
        target = target.numpy().astype(np.uint8)
        counts = target != 255
        target = np.where(counts, target, void).astype(np.uint8)
        pred = np.where(counts, pred.numpy(), void).astype(np.uint8)
        pairs = target.astype(np.int32) * size + pred
        self.confusion += np.bincount(pairs.ravel(), minlength=size**2).reshape(size, size)
        distance = max(1, round(0.02 * np.hypot(*target.shape)))
        edges = [self.is_boundary(labels, distance) for labels in (target, pred)]
        self.near += np.bincount(pairs[edges[0] & edges[1]], minlength=size**2).reshape(size, size)
        for row, labels, edge in zip(self.boundary, (target, pred), edges, strict=True):
            row += np.bincount(labels[edge], minlength=size)

    def merge(self, other: "SemanticScore") -> None:
        """Add what another process counted on other images; the other scores have the same."""
        self.confusion += other.confusion
        self.near += other.near
        self.boundary += other.boundary

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
            results.append((_mean(iou), dict(zip(self.names, iou.tolist(), strict=True))))
        (miou, per_class), (boundary_miou, _) = results
        return {"mIoU": miou, "boundary_mIoU": boundary_miou, "per_class": per_class}


def _mean(values: np.ndarray) -> float:
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
        values = np.array(present(ids))  # [V]
        place_of = np.zeros(values[-1] + 1, np.int32)
        place_of[values] = np.arange(len(values))
        places = place_of[ids]
        true_area = np.bincount(places.ravel(), None if weights is None else weights.ravel())  # [V]
        overlap = np.array([self.areas(mask, places, weights, len(values)) for mask in masks.numpy()])  # [N, V]
        overlap = overlap.reshape(len(masks), len(values))
        area, labels, scores = overlap.sum(1), labels.numpy(), scores.double().numpy()
        classes = np.where(values >= 1000, values // 1000, values)
        classes[classes == 34] = 11  # KITTI-360's garages are buildings
        void = np.isin(values, list(CITYSCAPES_VOID))

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
                right = np.zeros(
                    len(confidence), bool
                )  # of those that found one instance, the surest; others are wrong
                if right.size:
                    right[np.where(over, confidence[:, None], -np.inf).argmax(0)[over.any(0)]] = True
                chosen = over.any(1) | false
                self.scored[label, k].append((confidence[chosen], right[chosen]))

    def merge(self, other: "CityscapesInstanceScore") -> None:
        self.missed += other.missed
        for key, scored in other.scored.items():
            self.scored[key] += scored
        for label, count in other.truths.items():
            self.truths[label] += count

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
        return {"AP": _mean(table), "AP50": _mean(table[:, 0]), "per_class": per_class}

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

    def merge(self, other: "CocoInstanceScore") -> None:
        self.image_ids += other.image_ids
        self.detections = sorted(self.detections + other.detections, key=lambda entry: entry["image_id"])

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
        places, values = [], []
        for ids in (pred_ids.numpy(), true_ids.numpy()):  # ids may be large and far apart
            values.append(present(ids))
            place_of = np.zeros(values[-1][-1] + 1, np.int32)
            place_of[values[-1]] = np.arange(len(values[-1]))
            places.append(place_of[ids])
        pairs = np.bincount((places[0] * len(values[1]) + places[1]).ravel(), minlength=len(values[0]) * len(values[1]))
        overlap = {  # {(predicted id, true id): pixels}
            (values[0][place // len(values[1])], values[1][place % len(values[1])]): int(pairs[place])
            for place in np.flatnonzero(pairs)
        }
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

    def merge(self, other: "PanopticScore") -> None:
        for mine, theirs in ((self.iou, other.iou), (self.tp, other.tp), (self.fp, other.fp), (self.fn, other.fn)):
            for category, value in theirs.items():
                mine[category] += value

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
        result = {name: _mean(values) for name, values in parts.items()}
        return result | {"per_class": {self.categories[c]["name"]: row[0] for c, row in rows.items()}}


# ---------------------------------------------------------------------------------------------- evaluation


def evaluate(
    model: FusedModel,
    samples,
    size: str,
    device: str,
    workers: int,
    indices: list[int] | None = None,
    submission: Path | None = None,
) -> dict:
    """Score a model on a validation split; `indices` picks images. Returns {task: that score's result}.

    The split's measures say which: mIoU, AP (Cityscapes' or KITTI-360's rules, COCO's on COCO) and PQ. With
    `submission`, a folder, predictions are written there in the forms of Cityscapes and COCO. Several processes share
    the images; all but the first return {}.
    """
    names = [name for _, name, _ in samples.categories]
    ids = torch.tensor([raw for raw, _, _ in samples.categories])
    things = [label for label, (_, _, isthing) in enumerate(samples.categories) if isthing]
    scores = {}
    if "mIoU" in samples.measures:
        scores["semantic"] = SemanticScore(names)
    by_coco = isinstance(samples, CocoInstances)
    if "AP" in samples.measures:
        label_ids = {name: raw for raw, name, isthing in samples.categories if isthing}
        scores["instance"] = (
            CocoInstanceScore(samples.annotation_file) if by_coco else CityscapesInstanceScore(label_ids)
        )
    if "PQ" in samples.measures:
        categories = [{"id": raw, "name": name, "isthing": isthing} for raw, name, isthing in samples.categories]
        scores["panoptic"] = PanopticScore(categories)

    loader = DataLoader(
        Subset(samples, (range(len(samples)) if indices is None else indices)[run.rank() :: run.world()]),
        batch_size=None,
        num_workers=workers,
        worker_init_fn=run.leave_interrupts_to_the_parent,
    )
    annotations = []  # COCO's panoptic form
    model.to(device).eval()
    for sample in tqdm(loader, "evaluating", unit="image", disable=run.rank() > 0):
        truth, stem = sample["truth"], Path(sample["name"]).with_suffix("").as_posix().replace("/", "__")
        if stem.endswith("_leftImg8bit"):  # Cityscapes looks for <city>_<sequence>_<frame>*
            stem = stem.rsplit("__", 1)[-1].removesuffix("_leftImg8bit")
        classes, masks = predict(model, sample["image"], size, device)
        if "semantic" in scores:
            labels = semantic(classes, masks).cpu()
            scores["semantic"].update(labels, *truth["semantic"])
            if submission:
                save_png(submission / f"semantic/{stem}.png", ids[labels].numpy())
        if "instance" in scores:
            found, labels, confidence = (part.cpu() for part in instances(classes, masks, things))
            if by_coco:
                scores["instance"].update(sample["image_id"], found, ids[labels], confidence)
            else:
                scores["instance"].update(found, ids[labels], confidence, *truth["instance"])
                if submission:
                    save_instances(submission / "instance", stem, found, ids[labels], confidence)
        if "panoptic" in scores:
            segment_ids, segments = panoptic(classes, masks, things)
            segment_ids = segment_ids.cpu()
            segments = [{"id": s["id"], "category_id": int(ids[s["label"]])} for s in segments]
            scores["panoptic"].update(segment_ids, segments, *truth["panoptic"])
            if submission:
                colours = torch.stack([segment_ids % 256, segment_ids // 256 % 256, segment_ids // 65536], -1)
                save_png(submission / f"panoptic/{stem}.png", colours.numpy())
                entry = {"image_id": sample["image_id"], "file_name": f"{stem}.png", "segments_info": segments}
                annotations.append(entry)

    counted = run.gather((scores, annotations))  # by each process
    if not counted:
        return {}
    for theirs, more in counted[1:]:
        annotations = sorted(annotations + more, key=lambda entry: entry["image_id"])
        for task in scores:
            scores[task].merge(theirs[task])
    if submission and "panoptic" in scores:
        run.write_json(submission / "panoptic.json", {"annotations": annotations})
    if submission and "instance" in scores and by_coco:
        run.write_json(submission / "instances.json", scores["instance"].as_results())
    results = {task: score.result() for task, score in scores.items()}
    if samples.categories == KITTI360_THINGS:  # it counts buildings, hardly anyone else does
        others = [ap for name, ap in results["instance"]["per_class"].items() if name != "building"]
        results["instance"]["AP_without_building"] = _mean(np.array(others))
    return results


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


def drawing(model: FusedModel, settings: dict, task: str, sample: dict, device: str) -> tuple[torch.Tensor, list]:
    """A row of predictions.png: the image, its truth if it has one, and the prediction (things above 0.5)."""
    image, things = sample["image"], [label for label, isthing in enumerate(settings["isthing"]) if isthing]
    classes, masks = predict(model, image, settings["test_size"], device)
    drawings = []
    if "segments" in sample:
        drawings.append(("truth", sample["segments"], sample["labels"].tolist()))
    elif "rles" in sample:
        drawings.append(("truth", *painted([torch.from_numpy(rle.decode(code)) for code in sample["rles"]], sample)))
    if task == "semantic":
        prediction = semantic(classes, masks).cpu() + 1, list(range(len(settings["classes"])))
    elif task == "panoptic":
        ids, segments = panoptic(classes, masks, things)
        prediction = ids.cpu(), [segment["label"] for segment in segments]
    else:
        found, labels, confidence = (part.cpu() for part in instances(classes, masks, things))
        order = confidence.argsort()  # the surest on top
        order = order[confidence[order] > 0.5]
        prediction = painted(found[order], {"image": image, "labels": labels[order]})
    return image, [*drawings, ("prediction", *prediction)]


def painted(masks: list[torch.Tensor] | torch.Tensor, sample: dict) -> tuple[torch.Tensor, list[int]]:
    """Masks that may overlap, one over the other, as segment ids int [H, W] and the labels of the segments."""
    ids = torch.zeros(sample["image"].shape[1:], dtype=torch.int32)
    for i, mask in enumerate(masks):
        ids[mask.bool()] = i + 1
    return ids, sample["labels"].tolist()


# ---------------------------------------------------------------------------------------------- report


def headline(results: dict, categories: list) -> dict[str, float]:
    """The numbers that a reader compares, in percent, in the order of the table; mIoU_th is that of the things."""
    numbers = {}
    if "semantic" in results:
        things = [results["semantic"]["per_class"][name] for _, name, isthing in categories if isthing]
        numbers["mIoU"] = results["semantic"]["mIoU"]
        if 0 < len(things) < len(categories):
            numbers["mIoU_th"] = _mean(np.array(things))
        numbers["boundary_mIoU"] = results["semantic"]["boundary_mIoU"]
    for task, keys in {"instance": ("AP", "AP50", "AP_without_building"), "panoptic": ("PQ", "PQ_th", "PQ_st")}.items():
        numbers |= {key: results[task][key] for key in keys if key in results.get(task, {})}
    return numbers


def benchmark_rows(headlines: dict[str, dict], limited: list[str], trained_on: str, data: Path) -> list[list[str]]:
    """Every benchmark with the paper's number and ours, or why there is none; trained_on: data set and split, limited:
    benchmarks of which only some images were scored."""
    rows = [["benchmark", "trains on", "evaluates on", "score", "paper", "here"]]
    for name, benchmark in BENCHMARKS.items():
        ours = "not evaluated" if on_disk(benchmark, data) else "not on disk"
        if name in headlines:
            ours = ", ".join(f"{headlines[name][measure]:.1f}" for measure in benchmark.measures)
            ours += "" if benchmark.trains_on == trained_on else f" (but trained on {trained_on})"
            ours += " (of some images)" if name in limited else ""
        where = [name, benchmark.trains_on, benchmark.evaluates_on]
        rows.append([*where, ", ".join(benchmark.measures), benchmark.paper, ours])
    return rows


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


def compare(folders: list[Path]) -> str:
    """Tables of several runs' results; where the injected stride differs, its gain over no fusion beside the EF."""
    runs = []  # (folder, selection, model, benchmark, what else must agree for a fair comparison, scores)
    for folder in folders:
        if not (folder / "results.json").is_file():
            print(f"left out: {folder} has no results.json, which 05_eval.py writes for a trained run")
            continue
        try:
            results = run.read_stage(folder, "results.json", "05_eval.py")
            selection = run.read_stage(folder, "selection.json", "03_select.py")
            for benchmark, entry in results["benchmarks"].items():
                same = {
                    k: v for k, v in results["model"].items() if k not in ("auxiliary", "stride", "fusion", "weights")
                }
                same = (benchmark, entry["images"], *same.items())
                runs.append((folder, selection, results["model"], benchmark, same, entry["scores"]))
        except UserError as error:
            print(f"left out: {error}")
        except (KeyError, TypeError):
            print(f"left out: {folder}/results.json is of another version: run 05_eval.py again")
    if not runs:
        raise UserError("none of these folders holds results: run 05_eval.py on them first")

    def cell(value: float | None, sign: str = "") -> str:
        return "-" if value is None else f"{value:{sign}.1f}"

    names = list(dict.fromkeys(name for *_, scores in runs for name in scores))
    rows = [
        ["run", "trained for", "scored on", "master", "auxiliary", "OS", "fusion", "modes", "steps", "images", *names]
    ]
    for folder, _, model, benchmark, same, scores in sorted(runs, key=lambda entry: (entry[3], entry[2]["stride"])):
        fused = model["fusion"] != "none"
        pair = [model["auxiliary"], str(model["stride"])] if fused else ["-", "-"]
        modes = f"{model['master_mode']}/{model['aux_mode']}" if fused else model["master_mode"]
        what = [str(folder), model["benchmark"], benchmark, model["master"], *pair, model["fusion"], modes]
        rows.append([*what, str(model["steps"]), str(same[1]), *(cell(scores.get(name)) for name in names)])
    report = [markdown(rows)]

    alone = {same: scores for _, _, model, _, same, scores in runs if model["fusion"] == "none"}
    groups = defaultdict(list)  # runs that differ in the stride only
    for _, selection, model, _, same, scores in runs:
        score = selection["score"].upper()
        ef = selection["scores"].get(model["auxiliary"], {}).get(score)
        if model["fusion"] == "replace" and ef and same in alone:
            groups[same, model["auxiliary"], score].append((model["stride"], ef[str(model["stride"])], model, scores))
    for (same, auxiliary, score), entries in groups.items():
        if len(entries) < 2:
            continue
        base, model = alone[same], entries[0][2]
        shared = [name for name in names if all(s.get(name) is not None for s in [base, *(e[3] for e in entries)])]
        rows = [["OS", score, *(f"{name} gained" for name in shared)]]
        for stride, ef, _, scores in sorted(entries, key=lambda entry: entry[0]):
            rows.append([str(stride), f"{ef:.2f}", *(cell(scores[name] - base[name], "+") for name in shared)])
        title = f"{auxiliary} injected into {model['master']}, against {model['master']} alone; scored on {same[0]}\n"
        if len({entry[1] for entry in entries}) > 2:
            efs = [entry[1] for entry in entries]
            columns = [[entry[3][name] for entry in entries] for name in shared]
            rhos = [stats.spearmanr(efs, c).statistic if len(set(c)) > 1 else None for c in columns]
            rows.append(["rho", "", *("-" if rho is None else f"{rho:.2f}" for rho in rhos)])
            title += f"rho: Spearman's, of the gain with the {score} (the paper: 0.80)\n"
        report.append(f"{title}\n{markdown(rows)}")
    return "\n".join(report)


# ---------------------------------------------------------------------------------------------- the stage


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
    try:
        settings = checkpoint["settings"]
        if checkpoint["step"] < settings["steps"]:
            print(f"WARNING: {path} holds step {checkpoint['step']} of {settings['steps']}: training is not finished")
            settings["steps"] = checkpoint["step"]  # what is reported is what was trained
        model = build_model(settings, weights={})
        model.load_state_dict(checkpoint["model"])
    except (KeyError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is no checkpoint of this project's model ({type(error).__name__}: {reason})") from None
    return model, settings


def open_fitting(name: str, data: Path, settings: dict):
    """A benchmark's validation split; UserError if the trained model has other classes, or was taught another task."""
    own, asked = find_benchmark(settings["benchmark"]), find_benchmark(name)
    if own.task != asked.task:
        raise UserError(f"{name} is a benchmark of {asked.task} segmentation, the model was trained for {own.task}")
    samples = None if asked.categories else open_split(name, data, "val")  # COCO's classes stand in its own files
    classes = [category for _, category, _ in asked.categories or samples.categories]
    if classes != settings["classes"]:
        ours, theirs = (f"{len(c)} classes ({', '.join(c[:4])}, …)" for c in (settings["classes"], classes))
        raise UserError(f"the model was trained on {ours}, {name} has {theirs}: they do not fit")
    return samples or open_split(name, data, "val")


def draw_folder(model, settings: dict, task: str, pictures: Path, folder: Path, device: str) -> None:
    """predictions/<picture>.png for each picture of a folder."""
    names = list_pictures(pictures)
    reasons = without_a_file_name(pictures, names)
    for name in tqdm(names[run.rank() :: run.world()], "predicting", unit="picture", disable=run.rank() > 0):
        try:
            if name in reasons:
                raise UserError(reasons[name])
            image = read_image(pictures / name)
        except UserError as error:
            tqdm.write(f"left out: {error}", file=sys.stderr)
            continue
        row = drawing(model, settings, task, {"image": image}, device)
        figures.draw_predictions(folder / "predictions" / f"{name.replace('/', '__')}.png", [row], settings["classes"])
    run.gather(None)  # all are done
    print(f"wrote {folder}/predictions/")


def main():
    args = parse_arguments()
    if args.compare:
        print(compare(args.compare))
        return
    run.join_processes(args.device)
    folder = args.run
    asked = run.read_stage(folder, "run.json", "01_extract.py")
    model, settings = load_trained(folder)
    task = find_benchmark(settings["benchmark"]).task
    if args.images:
        draw_folder(model.to(args.device).eval(), settings, task, args.images, folder, args.device)
        return

    # Which benchmarks; what does not fit is said before hours are spent
    data = args.data or Path(asked["data"])
    splits = {}
    own, seen = settings["benchmark"], set()
    for name in [own, *(name for name in BENCHMARKS if name != own)] if args.all else [args.benchmark or own]:
        where = find_benchmark(name).evaluates_on, find_benchmark(name).task
        if where in seen:  # three sources and Cityscapes itself are evaluated alike
            continue
        seen.add(where)
        try:
            with run.first_process_first():
                splits[name] = open_fitting(name, data, settings)
        except UserError as error:
            if not args.all:
                raise
            print(f"left out: {error}")
    if not splits:
        raise UserError(f"{data} holds no benchmark that fits the model")

    # Score, and draw three pictures of the first
    benchmarks, headlines, rows = {}, {}, []
    for name, samples in splits.items():
        count = min(len(samples), args.limit or len(samples))
        indices = [i * len(samples) // count for i in range(count)]
        submission = folder / "submission" / name if args.save_predictions else None
        with run.first_process_first():
            if submission and run.rank() == 0:
                shutil.rmtree(submission, ignore_errors=True)  # of an earlier model
        results = evaluate(model, samples, settings["test_size"], args.device, args.workers, indices, submission)
        if not results:  # the first process reports for all
            continue
        headlines[name] = headline(results, samples.categories)
        benchmarks[name] = {"images": count, "scores": headlines[name], **results}
        if not rows:
            chosen = [samples[index] for index in indices[:: max(1, count // 3)][:3]]
            rows = [drawing(model, settings, task, sample, args.device) for sample in chosen]
    if run.rank():
        return
    figures.draw_predictions(folder / "predictions.png", rows, settings["classes"])

    # What the model is, how it does, class by class, and beside the paper
    what = {key: settings[key] for key in ("benchmark", "master", "auxiliary", "stride", "fusion", "steps", "seed")}
    what |= {key: settings[key] for key in ("master_mode", "aux_mode", "weights")}
    run.write_json(folder / "results.json", {"model": what, "benchmarks": benchmarks})
    fusion = f"{settings['auxiliary']} at stride {settings['stride']}, fusion {settings['fusion']}"
    fusion = "alone" if settings["fusion"] == "none" else fusion
    trained_on = find_benchmark(own).trains_on
    title = (
        f"{settings['master']}, {fusion}, {settings['steps']} steps on {trained_on}, seed {settings['seed']}; percent"
    )
    title += "".join(f"; RANDOM WEIGHTS at the start: {e}" for e, w in settings["weights"].items() if w == "none")
    parts = [f"{title}\n"]
    for name, entry in benchmarks.items():
        numbers = headlines[name]
        parts.append(f"{name}, {entry['images']} of {len(splits[name])} images\n")
        parts.append(markdown([list(numbers), [f"{value:.1f}" for value in numbers.values()]]))
        parts.append(markdown(class_rows(entry)))
    limited = [name for name, samples in splits.items() if benchmarks[name]["images"] < len(samples)]
    report = "\n".join([*parts, markdown(benchmark_rows(headlines, limited, trained_on, data))])
    with run.whole_file(folder / "results.md") as temporary:
        temporary.write_text(report)
    print(f"\n{report}\nwrote {folder}/results.json, results.md, predictions.png")
    if args.save_predictions:
        print(f"wrote {folder}/submission/")
    if settings["fusion"] != "none":
        flags = ("--out", f"{folder}_alone", "--fusion", "none", "--steps", str(settings["steps"]))
        print(f"next: {run.command('04_train.py', folder, *flags)}   # the master alone, to compare")
    else:
        print("next: python 05_eval.py --compare runs/*")


if __name__ == "__main__":
    run.start(main)
