"""Stage 5 as a whole, on each kind of benchmark, beside the official tools, and on several runs."""

import dataclasses
import importlib
import json

from common import run
from common.datasets import BENCHMARKS, CITYSCAPES_THINGS, open_split
from common.model import build_model
from common.run import UserError

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from test_scores import (
    coco_mask,
    official,  # noqa: F401  a fixture
    official_instance_ap,
    panoptic_slowly,
    pixel_tool,
    same,
    save_instances,
)

stage4 = importlib.import_module("04_train")
stage5 = importlib.import_module("05_eval")


# ------------------------------------------------------------------ stand-ins
def write_run(folder, data, benchmark, categories, **changes):
    """A run folder with an untrained model of the given classes, as stage 4 would leave it.

    changes: of what the checkpoint remembers of the training.
    """
    recipe = dataclasses.asdict(stage4.RECIPES["toycity"])
    weights = {"tiny_hiera": "pretrained", "tiny_vit": "pretrained"}
    training = {
        "benchmark": benchmark,
        "master": "tiny_hiera",
        "auxiliary": "tiny_vit",
        "stride": 8,
        "fusion": "replace",
        "master_mode": "finetuned",
        "aux_mode": "frozen",
        "seed": 0,
        "weights": weights,
        "class_names": [category.name for category in categories],
        "isthing": [category.isthing for category in categories],
        "recipe": {**recipe, "steps": 0, "test_size": "64"},
        **changes,
    }
    model = build_model(training, weights)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = {"model": model.state_dict(), "step": 0, "training": training}
    torch.save(checkpoint, folder / "checkpoint.pt")
    run.write_json(folder / "run.json", {"benchmark": benchmark, "data": str(data)})
    return model, training


class Guess:
    """In place of predict(): the truth moved by some pixels, with 50 queries.

    Each segment is there twice, and some of them have a low probability.
    """

    def __init__(self, samples):
        self.samples = {sample["image"].numpy().tobytes(): sample for sample in samples}
        self.classes = len(samples.categories)

    def __call__(self, model, image, size, device):
        sample = self.samples[image.numpy().tobytes()]
        generator = torch.Generator().manual_seed(image.sum().item())
        masks = []
        if "rles" in sample:
            for encoded in sample["rles"][:25]:
                masks.append(torch.from_numpy(stage5.rle.decode(encoded)).bool())
        else:
            for i in range(len(sample["labels"][:25])):
                masks.append(sample["segments"] == i + 1)
        labels = sample["labels"][:25].repeat(2)
        moved = [mask.roll(k, -1) for k in (1, 3) for mask in masks]
        if not moved:
            moved = [torch.zeros(image.shape[1:]).bool()]
        masks = torch.stack(moved)
        logits = torch.zeros(len(masks), self.classes + 1)
        logits[:, -1] = 0.5
        if len(labels):
            logits[range(len(labels)), labels] = 1 + 5 * torch.rand(
                len(labels), generator=generator
            )
        return stage5.Prediction(logits.softmax(-1), torch.where(masks, 0.9, 0.05))


def guess(samples, sample):
    return Guess(samples)(None, sample["image"], None, None)


def read_results(folder, suffix=""):
    return json.loads((folder / f"results{suffix}.json").read_text())


# ------------------------------------------------------------------ the official tools
def test_scores_on_cityscapes_labels_equal_the_official_tools(
    data,
    stage,
    monkeypatch,
    tmp_path,
    official,  # noqa: F811
):
    samples = open_split("toycity", data, "val")
    write_run(tmp_path / "run", data, "toycity", samples.categories)
    monkeypatch.setattr(stage5, "predict", Guess(samples))
    stage("05_eval", "--run", tmp_path / "run")
    ours = read_results(tmp_path / "run")
    scores = ours["scores"]
    assert 5 < scores["AP"] < 95 and 20 < scores["mIoU"] < 99 and 5 < scores["PQ"] < 95

    # The same predictions, in the files that the tools read
    ids = torch.tensor([category.id for category in samples.categories])
    isthing = [category.isthing for category in samples.categories]
    stems = []
    texts = []
    class_maps = []
    segmentations = []
    for i, sample in enumerate(samples):
        stems.append(f"toycity_000000_{i:06d}")
        prediction = guess(samples, sample)
        found = stage5.instances(prediction, isthing)
        labels = ids[found.labels]
        texts.append(save_instances(tmp_path, stems[-1], found.masks, labels, found.confidences))
        class_maps.append(str(tmp_path / f"{stems[-1]}_pred.png"))
        class_map = ids[stage5.semantic(prediction)].numpy().astype(np.uint8)
        Image.fromarray(class_map).save(class_maps[-1])
        segment_ids, segments = stage5.panoptic(prediction, isthing)
        for segment in segments:
            segment["category_id"] = ids[segment["label"]].item()
        assert set(segment_ids.unique().tolist()) - {0} == {s["id"] for s in segments}
        truth = sample["truth"]["PQ"]
        segmentations.append((segment_ids, segments, truth["true_ids"], truth["true_segments"]))

    labels = data / "toycity/gtFine/val/toycity"
    truths = [labels / f"{stem}_gtFine_instanceIds.png" for stem in stems]
    theirs = official_instance_ap(tmp_path, truths, texts)["averages"]
    same(scores["AP"], 100 * theirs["allAp"])
    same(scores["AP50"], 100 * theirs["allAp50%"])
    for name, ap in ours["per_class"]["AP"].items():
        if ap is not None:
            same(ap, 100 * theirs["classes"][name]["ap"])

    truths = [str(labels / f"{stem}_gtFine_labelIds.png") for stem in stems]
    theirs = pixel_tool.evaluateImgLists(class_maps, truths, pixel_tool.args)["classScores"]
    assert len(ours["per_class"]["mIoU"]) == len(samples.categories)
    same(scores["mIoU"], 100 * np.mean([theirs[name] for name in ours["per_class"]["mIoU"]]))

    categories = [category._asdict() for category in samples.categories]
    expected = panoptic_slowly(segmentations, categories)
    same(scores["PQ"], np.mean([pq for pq, _, _ in expected.values()]))
    for name, (pq, _, _) in expected.items():
        same(ours["per_class"]["PQ"][name], pq)


def test_scores_on_coco_equal_pycocotools(stage, monkeypatch, tmp_path):
    datasets.coco(tmp_path / "coco", count=4)
    samples = open_split("coco_instance", tmp_path, "val")
    model, _ = write_run(tmp_path / "run", tmp_path, "coco_instance", samples.categories)
    monkeypatch.setattr(stage5, "predict", Guess(samples))
    stage("05_eval", "--run", tmp_path / "run")
    written = read_results(tmp_path / "run")["scores"]
    settings = stage5.Settings(device="cpu", workers=0)
    ours = stage5.evaluate(model, samples, "64", settings, range(len(samples)))["AP"]
    assert list(written) == ["AP", "AP50", "AP75", "APs", "APm", "APl"]
    for name, value in written.items():
        assert value == (None if np.isnan(ours[name]) else ours[name])

    detections = []
    isthing = [category.isthing for category in samples.categories]
    for sample in samples:
        found = stage5.instances(guess(samples, sample), isthing)
        for mask, label, confidence in zip(*found, strict=True):
            if not mask.any():
                continue
            detection = {
                "image_id": sample["image_id"],
                "category_id": samples.categories[label].id,
                "segmentation": coco_mask(mask.numpy()),
                "score": confidence.item(),
            }
            detections.append(detection)
    truth = COCO(str(samples.coco.file))
    tool = COCOeval(truth, truth.loadRes(detections), "segm")
    tool.evaluate()
    tool.accumulate()
    tool.summarize()
    assert 5 < ours["AP"] < 95
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    for name, value in zip(names, tool.stats[:6], strict=True):
        same(ours[name], np.nan if value == -1 else 100 * value)


# ------------------------------------------------------------------ what is scored
def test_a_model_is_scored_on_its_own_benchmark_and_some_images_on_the_side(stage, tmp_path):
    """A model trained on UrbanSyn is scored on Cityscapes' validation split."""
    root = tmp_path / "data"
    folder = tmp_path / "run"
    datasets.cityscapes(root / "cityscapes")
    _, training = write_run(folder, root, "urbansyn_to_cityscapes_instance", CITYSCAPES_THINGS)
    stage("05_eval", "--run", folder)
    whole = (folder / "results.json").read_bytes()
    results = json.loads(whole)
    assert list(results) == ["benchmark", "model", "images", "scores", "per_class"]
    assert results["benchmark"] == "urbansyn_to_cityscapes_instance" and results["images"] == 2
    for name in ("master", "auxiliary", "stride", "fusion", "seed", "weights"):
        assert results["model"][name] == training[name]
    assert results["model"]["steps"] == 0
    assert list(results["per_class"]) == ["AP"]
    assert list(results["per_class"]["AP"]) == [category.name for category in CITYSCAPES_THINGS]
    assert "32.5 (ViT-L)" in (folder / "results.md").read_text()
    assert "urbansyn train" in (folder / "results.md").read_text()

    stage("05_eval", "--run", folder, "--limit", 1)
    assert (folder / "results.json").read_bytes() == whole
    assert read_results(folder, "_limit1")["images"] == 1
    assert "1 of 2 images" in (folder / "results_limit1.md").read_text()
    assert (folder / "predictions_limit1.png").is_file()


def test_what_cannot_be_evaluated_is_refused(stage, tmp_path):
    root = tmp_path / "data"
    datasets.cityscapes(root / "cityscapes")
    write_run(tmp_path / "run", root, "urbansyn_to_cityscapes_instance", CITYSCAPES_THINGS)
    with pytest.raises(UserError, match="cityscapes is needed and not there: .*--data"):
        stage("05_eval", "--run", tmp_path / "run", "--data", tmp_path / "no")
    with pytest.raises(UserError, match="--images and --compare are two things"):
        stage("05_eval", "--images", tmp_path, "--compare", tmp_path / "run")
    for flags in (("--compare", tmp_path / "run"), ("--images", tmp_path)):
        with pytest.raises(UserError, match="--limit goes with an evaluation"):
            stage("05_eval", "--run", tmp_path / "run", "--limit", 3, *flags)
    # These are not the classes of the benchmark.
    write_run(tmp_path / "other", root, "cityscapes_semantic", CITYSCAPES_THINGS)
    with pytest.raises(UserError, match="trained on other classes than those of .*cityscapes"):
        stage("05_eval", "--run", tmp_path / "other")


def test_a_checkpoint_of_something_else_is_named(stage, data, tmp_path):
    categories = open_split("toycity", data, "val").categories
    write_run(tmp_path / "run", data, "toycity", categories)
    file = tmp_path / "run/checkpoint.pt"
    whole = torch.load(file, weights_only=True)
    whole["model"].popitem()
    for content in ({"a": 1}, whole):
        torch.save(content, file)
        message = "checkpoint.pt is no checkpoint of this project's model"
        with pytest.raises(UserError, match=message) as error:
            stage("05_eval", "--run", tmp_path / "run")
        assert "\n" not in str(error.value)


def test_an_unfinished_training_is_reported_with_the_steps_it_had(data, capsys, tmp_path):
    categories = open_split("toycity", data, "val").categories
    recipe = dataclasses.asdict(stage4.RECIPES["toycity"])
    write_run(tmp_path / "run", data, "toycity", categories, recipe=recipe)
    model, training = stage5.load_trained(tmp_path / "run")
    assert "step 0 of 900: training is not finished" in capsys.readouterr().out
    assert training["recipe"]["steps"] == 0 and not model.training


@pytest.mark.parametrize(
    "benchmark, folder, score",
    [
        ("kitti360_instance", "KITTI-360", "AP_things"),
        ("coco_panoptic", "coco", "PQ_st"),
        ("coco_instance", "coco", "AP50"),
        ("ade20k_semantic", "ADEChallengeData2016", "boundary_mIoU"),
        ("cityscapes_semantic", "cityscapes", "mIoU_th"),
    ],
)
def test_every_kind_of_benchmark_is_scored_and_drawn(
    benchmark, folder, score, stage, monkeypatch, tmp_path
):
    data_set = BENCHMARKS[benchmark].evaluate_on
    assert data_set.folder == folder
    datasets.FOLDERS[folder](tmp_path / folder, data_set.splits["val"])
    samples = open_split(benchmark, tmp_path, "val")
    write_run(tmp_path / "run", tmp_path, benchmark, samples.categories)
    monkeypatch.setattr(stage5, "predict", Guess(samples))
    said = stage("05_eval", "--run", tmp_path / "run")
    results = read_results(tmp_path / "run")
    scores = results["scores"]
    main = BENCHMARKS[benchmark].metrics[0]
    assert scores[score] > 5 and scores[main] > 5 and f"{scores[main]:.1f}" in said
    assert BENCHMARKS[benchmark].paper in said
    assert Image.open(tmp_path / "run/predictions.png").size[0] > 500
    assert list(scores)[0] == main
    if benchmark != "kitti360_instance":
        return
    # The means are over the official classes, and over the paper's.
    per_class = results["per_class"]["AP"]
    present = {name: ap for name, ap in per_class.items() if ap is not None}
    assert len(per_class) == 9 and {"building", "car"} < set(present)
    of_official = [ap for name, ap in present.items() if name not in ("bus", "train")]
    of_paper = [ap for name, ap in present.items() if name != "building"]
    assert scores["AP"] == pytest.approx(np.mean(of_official))
    assert scores["AP_things"] == pytest.approx(np.mean(of_paper))


# ------------------------------------------------------------------ several runs
def write_results(folder, stride, miou, fusion, **modes):
    is_alone = fusion == "none"
    model = {
        "master": "a",
        "auxiliary": None if is_alone else "b",
        "stride": None if is_alone else stride,
        "fusion": fusion,
        "master_mode": "finetuned",
        "aux_mode": "frozen",
        "seed": 0,
        "weights": {},
        "steps": 9,
        **modes,
    }
    content = {
        "benchmark": "toycity",
        "model": model,
        "images": 6,
        "scores": {"mIoU": miou, "AP": float("nan")},
        "per_class": {},
    }
    run.write_json(folder / "results.json", content)
    return folder


RUNS = [
    (8, 40.0, "none"),
    (4, 41.0, "replace"),
    (8, 43.0, "replace"),
    (16, 42.0, "replace"),
    (32, 39.0, "replace"),
]


def cells(said):
    rows = []
    for line in said.splitlines():
        if line[:1] == "|":
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_runs_are_compared_in_one_flat_table(stage, tmp_path):
    folders = []
    for stride, miou, fusion in RUNS:
        folder = tmp_path / f"{fusion}{stride}_of_a_long_name"
        folders.append(write_results(folder, stride, miou, fusion))
    modes = {"master_mode": "frozen", "aux_mode": "finetuned"}
    folders.append(write_results(tmp_path / "add", 8, 50.0, "add", **modes))
    folders.append(write_results(tmp_path / "alone", None, 38.0, "none", **modes))
    run.write_json(tmp_path / "other/results.json", {"semantic": {"mIoU": 1.0}})
    (tmp_path / "a_file").write_text("runs/* may name it as well")
    said = stage(
        "05_eval",
        "--compare",
        *folders,
        tmp_path / "other",
        tmp_path / "nothing",
        tmp_path / "a_file",
    )
    for left in (tmp_path / "other", tmp_path / "nothing"):
        message = f"left out: {left} holds no results.json of an evaluation on all images"
        assert message in said
    assert "a_file" not in said
    rows = cells(said)
    head = ["run", "benchmark", "master", "auxiliary", "OS", "fusion", "steps"]
    assert rows[0] == [*head, "mIoU", "boundary_mIoU", "AP", "PQ"]
    assert [row[4] for row in rows[2:]] == ["-", "-", "4", "8", "8", "16", "32"]
    # No auxiliary and no stride where the master is alone
    name = "…a_long_name"
    assert rows[2] == [name, "toycity", "a", "-", "-", "none", "9", "40.0", "-", "-", "-"]
    assert rows[3][5] == "none, frozen master"
    assert rows[4] == [name, "toycity", "a", "b", "4", "replace", "9", "41.0", "-", "-", "-"]
    assert ["add, frozen master, finetuned auxiliary", "9", "50.0"] in [row[5:8] for row in rows]
    usual = stage("05_eval", "--compare", *folders[:5])
    assert max(len(line) for line in usual.splitlines() if line[:1] == "|") <= 120
    with pytest.raises(UserError, match="none of these folders holds results"):
        stage("05_eval", "--compare", tmp_path)
