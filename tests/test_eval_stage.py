"""Stage 5 as a whole: which benchmarks, what it writes for others' tools, and several runs in one table."""

import importlib
import json

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from test_scores import official, official_instance_ap, pixel_tool, same  # noqa: F401  official is a fixture

from common import run
from common.datasets import BENCHMARKS, CITYSCAPES_THINGS, open_split
from common.model import build_model
from common.run import UserError

stage4, stage5 = importlib.import_module("04_train"), importlib.import_module("05_eval")


def write_run(folder, data, benchmark, categories, **changes):
    """A run folder with an untrained model of the given classes, as stage 4 would leave it."""
    settings = dict(master="tiny_hiera", auxiliary="tiny_vit", stride=8, fusion="replace") | changes
    settings |= dict(benchmark=benchmark, master_mode="ft", aux_mode="fz", seed=0)
    settings |= dict(weights={"tiny_hiera": "pretrained", "tiny_vit": "pretrained"})
    settings |= {"classes": [c[1] for c in categories], "isthing": [c[2] for c in categories]}
    settings |= stage4.dataclasses.asdict(stage4.RECIPES["toycity"]) | {"steps": 0, "test_size": "64"}
    model = build_model(settings, settings["weights"])
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"model": model.state_dict(), "step": 0, "settings": settings}, folder / "checkpoint.pt")
    run.write_json(folder / "run.json", {"benchmark": benchmark, "data": str(data), "command": "python 01_extract.py"})
    return model, settings


class Guess:
    """In place of predict(): the truth moved by some pixels, some of it doubled or unsure; 50 queries."""

    def __init__(self, samples):
        self.samples, self.classes = {s["image"].numpy().tobytes(): s for s in samples}, len(samples.categories)

    def __call__(self, model, image, size, device):
        sample, generator = self.samples[image.numpy().tobytes()], torch.Generator().manual_seed(image.sum().item())
        if "rles" in sample:
            masks = [torch.from_numpy(stage5.rle.decode(code)).bool() for code in sample["rles"]]
        else:
            masks = [sample["segments"] == i + 1 for i in range(len(sample["labels"]))]
        masks, labels = masks[:25], sample["labels"][:25].repeat(2)
        masks = torch.stack([m.roll(k, -1) for k in (1, 3) for m in masks] or [torch.zeros(image.shape[1:]).bool()])
        logits = torch.zeros(len(masks), self.classes + 1)
        logits[:, -1] = 0.5
        if len(labels):
            logits[range(len(labels)), labels] = 1 + 5 * torch.rand(len(labels), generator=generator)
        return logits.softmax(-1), torch.where(masks, 0.9, 0.05)


def test_what_is_saved_for_cityscapes_scores_the_same_there(data, stage, monkeypatch, tmp_path, official):  # noqa: F811
    samples = open_split("toycity", data, "val")
    write_run(tmp_path / "run", data, "toycity", samples.categories)
    monkeypatch.setattr(stage5, "predict", Guess(samples))
    assert "submission" in stage("05_eval", "--run", tmp_path / "run", "--save-predictions")
    ours = json.loads((tmp_path / "run/results.json").read_text())["benchmarks"]["toycity"]
    assert 5 < ours["instance"]["AP"] < 95 and 20 < ours["semantic"]["mIoU"] < 99
    submission = tmp_path / "run/submission/toycity"

    stems = [f"toycity_000000_{i:06d}" for i in range(6)]
    truths = [data / f"toycity/gtFine/val/toycity/{stem}_gtFine_instanceIds.png" for stem in stems]
    theirs = official_instance_ap(submission, truths, [submission / f"instance/{stem}.txt" for stem in stems])
    same(ours["instance"]["AP"], 100 * theirs["averages"]["allAp"])
    truths = [str(data / f"toycity/gtFine/val/toycity/{stem}_gtFine_labelIds.png") for stem in stems]
    guesses = [str(submission / f"semantic/{stem}.png") for stem in stems]
    theirs = pixel_tool.evaluateImgLists(guesses, truths, pixel_tool.args)
    same(ours["semantic"]["mIoU"], 100 * np.mean([theirs["classScores"][n] for n in ours["semantic"]["per_class"]]))

    # COCO's panoptic form, read back and scored again
    categories = [{"id": raw, "name": name, "isthing": thing} for raw, name, thing in samples.categories]
    score, content = stage5.PanopticScore(categories), json.loads((submission / "panoptic.json").read_text())
    for sample, entry in zip(samples, content["annotations"], strict=True):
        assert entry["image_id"] == sample["image_id"]
        colours = np.asarray(Image.open(submission / "panoptic" / entry["file_name"])).astype(int)
        ids = torch.from_numpy(colours[..., 0] + 256 * colours[..., 1] + 65536 * colours[..., 2])
        assert set(ids.unique().tolist()) - {0} == {s["id"] for s in entry["segments_info"]}
        score.update(ids, entry["segments_info"], *sample["truth"]["panoptic"])
    assert score.result()["PQ"] == pytest.approx(ours["panoptic"]["PQ"])


def test_what_is_saved_for_coco_scores_the_same_there(stage, monkeypatch, tmp_path):
    datasets.coco(tmp_path / "coco", count=4)
    samples = open_split("coco_instance", tmp_path, "val")
    write_run(tmp_path / "run", tmp_path, "coco_instance", samples.categories)
    monkeypatch.setattr(stage5, "predict", Guess(samples))
    stage("05_eval", "--run", tmp_path / "run", "--save-predictions")
    ours = json.loads((tmp_path / "run/results.json").read_text())["benchmarks"]["coco_instance"]["instance"]
    truth = COCO(str(samples.annotation_file))
    tool = COCOeval(truth, truth.loadRes(str(tmp_path / "run/submission/coco_instance/instances.json")), "segm")
    tool.evaluate()
    tool.accumulate()
    tool.summarize()
    assert 5 < ours["AP"] < 95
    for name, value in zip(("AP", "AP50", "AP75"), tool.stats[:3], strict=True):
        same(ours[name], 100 * value)


def test_another_benchmark_must_have_the_models_classes(stage, data, tmp_path):
    """A model trained on UrbanSyn is scored on Cityscapes; --all finds what else is there and fits."""
    root = tmp_path / "data"
    datasets.cityscapes(root / "cityscapes")
    datasets.kitti360(root / "KITTI-360")
    write_run(tmp_path / "run", root, "urbansyn_to_cityscapes_instance", CITYSCAPES_THINGS)
    stage("05_eval", "--run", tmp_path / "run")
    stage("05_eval", "--run", tmp_path / "run", "--benchmark", "cityscapes_instance", "--limit", 1)
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert list(results["benchmarks"]) == ["cityscapes_instance"]
    assert list(results["benchmarks"]["cityscapes_instance"]["instance"]["per_class"]) == [
        c[1] for c in CITYSCAPES_THINGS
    ]
    assert "(but trained on urbansyn train)" in (tmp_path / "run/results.md").read_text()
    said = stage("05_eval", "--run", tmp_path / "run", "--all", "--limit", 1)  # what is evaluated alike, once
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert list(results["benchmarks"]) == ["urbansyn_to_cityscapes_instance"]
    assert (
        "left out: the model was trained on 8 classes (person, rider, car, truck, …), kitti360_instance has 7" in said
    )
    assert not (root / "toycity").exists()  # nothing is drawn to find that it does not fit
    with pytest.raises(UserError, match="8 classes .person, .*kitti360_instance has 7 classes .building"):
        stage("05_eval", "--run", tmp_path / "run", "--benchmark", "kitti360_instance")
    with pytest.raises(UserError, match="toycity is a benchmark of panoptic .*trained for instance"):
        stage("05_eval", "--run", tmp_path / "run", "--benchmark", "toycity")
    with pytest.raises(UserError, match="cityscapes_instance needs .*--data"):
        stage("05_eval", "--run", tmp_path / "run", "--benchmark", "cityscapes_instance", "--data", tmp_path / "no")
    with pytest.raises(SystemExit):
        stage("05_eval", "--compare", tmp_path / "run", "--limit", 3)


def test_a_checkpoint_of_something_else_is_named(stage, data, tmp_path):
    write_run(tmp_path / "run", data, "toycity", open_split("toycity", data, "val").categories)
    file = tmp_path / "run/checkpoint.pt"
    whole = torch.load(file, weights_only=True)
    whole["model"].popitem()
    for content in ({"a": 1}, whole):
        torch.save(content, file)
        with pytest.raises(UserError, match="checkpoint.pt is no checkpoint of this project's model") as error:
            stage("05_eval", "--run", tmp_path / "run")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "benchmark, folder, measure",
    [
        ("kitti360_instance", "KITTI-360", "AP_without_building"),
        ("coco_panoptic", "coco", "PQ_st"),
        ("coco_instance", "coco", "AP50"),
        ("ade20k_semantic", "ADEChallengeData2016", "boundary_mIoU"),
        ("cityscapes_semantic", "cityscapes", "mIoU_th"),
    ],
)
def test_every_kind_of_benchmark_is_scored_and_drawn(benchmark, folder, measure, stage, monkeypatch, tmp_path):
    datasets.FOLDERS[folder](tmp_path / folder, BENCHMARKS[benchmark].evaluates_on.split()[1])
    samples = open_split(benchmark, tmp_path, "val")
    write_run(tmp_path / "run", tmp_path, benchmark, samples.categories)
    monkeypatch.setattr(stage5, "predict", Guess(samples))
    said = stage("05_eval", "--run", tmp_path / "run")
    scores = json.loads((tmp_path / "run/results.json").read_text())["benchmarks"][benchmark]["scores"]
    main = BENCHMARKS[benchmark].measures[0]
    assert scores[measure] > 5 and scores[main] > 5 and f"{scores[main]:.1f}" in said
    assert BENCHMARKS[benchmark].paper in said and Image.open(tmp_path / "run/predictions.png").size[0] > 500
    assert list(scores)[0] == main


def test_runs_are_compared_by_stride_with_the_ef_beside(stage, tmp_path):
    """Gains over no fusion, and Spearman's rho of gain and EF, on results made for the purpose."""
    ef = {4: 1.0, 8: 3.0, 16: 2.0, 32: 4.0}
    folders = []
    for stride, miou, fusion in [(8, 40.0, "none"), (4, 41.0, "replace"), (8, 43.0, "replace"), (16, 42.0, "replace"),
                                 (32, 39.0, "replace"), (8, 50.0, "add")]:  # fmt: skip
        folders.append(tmp_path / f"{fusion}{stride}")
        model = {
            "benchmark": "toycity",
            "master": "a",
            "auxiliary": "b",
            "stride": stride,
            "fusion": fusion,
            "steps": 9,
            "master_mode": "ft",
            "aux_mode": "fz",
            "seed": 0,
        }
        results = {
            "model": model,
            "benchmarks": {"toycity": {"images": 6, "scores": {"mIoU": miou, "AP": float("nan")}}},
        }
        run.write_json(folders[-1] / "results.json", results)
        run.write_json(folders[-1] / "selection.json", {"score": "ef", "scores": {"b": {"EF": ef}}})
    other = tmp_path / "other"  # fine-tuned too, on fewer images, and one without a selection: none is mixed in
    for name, model_change, images in (("tuned", {"aux_mode": "ft"}, 6), ("limited", {}, 3), ("bare", {}, 6)):
        changed = {"model": model | {"fusion": "replace"} | model_change}
        changed["benchmarks"] = {"toycity": {"images": images, "scores": {"mIoU": 99.0, "AP": None}}}
        run.write_json(tmp_path / name / "results.json", changed)
        if name != "bare":
            run.write_json(tmp_path / name / "selection.json", {"score": "ef", "scores": {"b": {"EF": ef}}})
    run.write_json(other / "results.json", {"semantic": {"mIoU": 1.0}})
    run.write_json(other / "selection.json", {})
    said = stage("05_eval", "--compare", *folders, tmp_path / "tuned", tmp_path / "limited", tmp_path / "bare", other)
    assert f"left out: {tmp_path}/bare/selection.json is missing" in said
    assert f"left out: {other}/results.json is of another version" in said
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in said.splitlines() if line.startswith("|")]
    head = [
        "run",
        "trained for",
        "scored on",
        "master",
        "auxiliary",
        "OS",
        "fusion",
        "modes",
        "steps",
        "images",
        "mIoU",
        "AP",
    ]
    assert rows[0] == head and [row[5:8] for row in rows[2:10]].count(["-", "none", "ft"]) == 1
    gains = rows[10:]
    assert gains[0] == ["OS", "EF", "mIoU gained"]
    assert gains[2:] == [["4", "1.00", "+1.0"], ["8", "3.00", "+3.0"], ["16", "2.00", "+2.0"], ["32", "4.00", "-1.0"],
                         ["rho", "", "-0.20"]]  # fmt: skip
    with pytest.raises(UserError, match="none of these folders holds results"):
        stage("05_eval", "--compare", tmp_path)
