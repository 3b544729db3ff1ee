"""Stage 5 as a whole: which benchmarks, what it writes for others' tools, and several runs in one table."""

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
from test_scores import official, official_instance_ap, pixel_tool, same  # noqa: F401  official is a fixture

stage4, stage5 = importlib.import_module("04_train"), importlib.import_module("05_eval")


def write_run(folder, data, benchmark, categories, **changes):
    """A run folder with an untrained model of the given classes, as stage 4 would leave it."""
    recipe = dataclasses.asdict(stage4.RECIPES["toycity"]) | {"steps": 0, "test_size": "64"}
    trained = dict(master="tiny_hiera", auxiliary="tiny_vit", stride=8, fusion="replace", recipe=recipe) | changes
    trained |= dict(benchmark=benchmark, master_mode="ft", aux_mode="fz", seed=0)
    trained |= dict(weights={"tiny_hiera": "pretrained", "tiny_vit": "pretrained"})
    trained |= {"class_names": [c.name for c in categories], "isthing": [c.isthing for c in categories]}
    model = build_model(trained, trained["weights"])
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"model": model.state_dict(), "step": 0, "settings": trained}, folder / "checkpoint.pt")
    run.write_json(folder / "run.json", {"benchmark": benchmark, "data": str(data), "command": "python 01_extract.py"})
    return model, trained


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
    truth = COCO(str(samples.coco.file))
    tool = COCOeval(truth, truth.loadRes(str(tmp_path / "run/submission/coco_instance/instances.json")), "segm")
    tool.evaluate()
    tool.accumulate()
    tool.summarize()
    assert 5 < ours["AP"] < 95
    for name, value in zip(("AP", "AP50", "AP75"), tool.stats[:3], strict=True):
        same(ours[name], 100 * value)


def test_a_model_is_scored_on_its_own_benchmark_and_some_images_on_the_side(stage, data, tmp_path):
    """A model trained on UrbanSyn is scored on Cityscapes' validation split."""
    root = tmp_path / "data"
    datasets.cityscapes(root / "cityscapes")
    write_run(tmp_path / "run", root, "urbansyn_to_cityscapes_instance", CITYSCAPES_THINGS)
    stage("05_eval", "--run", tmp_path / "run")
    whole = (tmp_path / "run/results.json").read_bytes()
    results = json.loads(whole)["benchmarks"]["urbansyn_to_cityscapes_instance"]
    assert results["images"] == 2 and list(results["instance"]["per_class"]) == [c.name for c in CITYSCAPES_THINGS]
    assert "32.5 (ViT-L)" in (tmp_path / "run/results.md").read_text()
    stage("05_eval", "--run", tmp_path / "run", "--limit", 1, "--save-predictions")
    assert (tmp_path / "run/results.json").read_bytes() == whole
    assert "1 of 2 images" in (tmp_path / "run/results_limit1.md").read_text()
    assert (tmp_path / "run/predictions_limit1.png").is_file() and (tmp_path / "run/submission_limit1").is_dir()
    with pytest.raises(UserError, match="cityscapes is needed and not there: .*--data"):
        stage("05_eval", "--run", tmp_path / "run", "--data", tmp_path / "no")
    with pytest.raises(UserError, match="--images and --compare are two things"):
        stage("05_eval", "--images", tmp_path, "--compare", tmp_path / "run")
    for flags in (("--compare", tmp_path / "run", "--limit", 3), ("--images", tmp_path, "--save-predictions")):
        with pytest.raises(UserError, match="go with an evaluation"):
            stage("05_eval", "--run", tmp_path / "run", *flags)
    write_run(tmp_path / "other", root, "cityscapes_semantic", CITYSCAPES_THINGS)  # not the classes of its benchmark
    with pytest.raises(UserError, match="trained on other classes than those of .*cityscapes"):
        stage("05_eval", "--run", tmp_path / "other")


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
        ("kitti360_instance", "KITTI-360", "AP_things"),
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
    if benchmark == "kitti360_instance":  # the official classes and the paper's
        per_class = json.loads((tmp_path / "run/results.json").read_text())["benchmarks"][benchmark]["instance"][
            "per_class"
        ]
        present = {name: ap for name, ap in per_class.items() if ap is not None}
        assert len(per_class) == 9 and {"building", "car"} < set(present)
        official = [ap for name, ap in present.items() if name not in ("bus", "train")]
        assert scores["AP"] == pytest.approx(np.mean(official))
        assert scores["AP_things"] == pytest.approx(np.mean([present[n] for n in present if n != "building"]))


def write_results(folder, stride, miou, fusion, images=6, selection=True, **changes):
    model = {"benchmark": "toycity", "master": "a", "auxiliary": "b", "stride": stride, "fusion": fusion, "steps": 9}
    model |= {"master_mode": "ft", "aux_mode": "fz", "seed": 0} | changes
    scores = {"mIoU": miou, "AP": float("nan")}
    entry = {"model": model, "benchmarks": {"toycity": {"images": images, "scores": scores}}}
    run.write_json(folder / "results.json", entry)
    if selection:
        scores = {"b": {"EF": {4: 1.0, 8: 3.0, 16: 2.0, 32: 4.0}}}
        run.write_json(folder / "selection.json", {"score": "ef", "scores": scores})
    return folder


RUNS = [(8, 40.0, "none"), (4, 41.0, "replace"), (8, 43.0, "replace"), (16, 42.0, "replace"), (32, 39.0, "replace")]


def cells(said):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in said.splitlines() if line[:1] == "|"]


def test_runs_are_compared_in_one_flat_table(stage, tmp_path):
    folders = [write_results(tmp_path / f"{fusion}{stride}_of_a_long_name", stride, *rest, fusion)
               for stride, *rest, fusion in [*RUNS, (8, 50.0, "add")]]  # fmt: skip
    run.write_json(tmp_path / "other/results.json", {"semantic": {"mIoU": 1.0}})
    said = stage("05_eval", "--compare", *folders, tmp_path / "other", tmp_path / "nothing")
    for left in (tmp_path / "other", tmp_path / "nothing"):
        assert f"left out: {left} holds no results.json of an evaluation on all images" in said
    rows = cells(said)
    assert rows[0] == ["run", "benchmark", "master", "auxiliary", "OS", "fusion", "steps", "mIoU", "b_mIoU", "AP", "PQ"]
    assert [row[4] for row in rows[2:8]] == ["4", "-", "8", "8", "16", "32"]
    assert ["…a_long_name", "toycity", "a", "-", "-", "none ft", "9", "40.0", "-", "-", "-"] in rows
    assert max(len(line) for line in said.splitlines() if line[:1] == "|") <= 120
    assert any(row[0] == "coco_panoptic" and "56.9" in row for row in rows)  # the paper's table, here alone
    assert any(row[0] == "toycity" and row[-1] == "50.0, -, -" for row in rows)
    with pytest.raises(UserError, match="none of these folders holds results"):
        stage("05_eval", "--compare", tmp_path)
