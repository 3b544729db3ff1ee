"""The readers, on scenes whose labels are known, and pictures on their way into the encoders."""

import dataclasses
import importlib
import json
import pickle

from common import datasets as readers
from common import toycity
from common.datasets import BENCHMARKS, CITYSCAPES, TOYCITY, open_split, resize_image
from common.run import UserError

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle

stage4 = importlib.import_module("04_train")


@pytest.fixture
def street(tmp_path):
    """A data set of one 4 x 6 picture with every kind of label."""
    for folder in ("leftImg8bit/val/x", "gtFine/val/x"):
        (tmp_path / "cityscapes" / folder).mkdir(parents=True)
    ids = np.array(
        [
            [7, 7, 23, 23, 23, 0],
            [7, 26000, 26000, 26001, 26, 26],  # two cars, a group of cars
            [7, 24003, 25001, 29001, 4, 1],  # person, rider, a caravan, static, ego vehicle
            [9, 9, 10, 33, 33, 11],  # not evaluated; a group of bicycles; building
        ]
    )
    picture = np.random.default_rng(0).integers(0, 255, (4, 6, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "cityscapes/leftImg8bit/val/x/x_0_leftImg8bit.png")
    Image.fromarray(ids.astype(np.uint16)).save(tmp_path / "cityscapes/gtFine/val/x/x_0_gtFine_instanceIds.png")
    return tmp_path, picture, ids


def test_a_scene_is_read_back_pixel_for_pixel(data):
    samples = open_split("toycity", data, "val")
    assert len(samples) == 6
    for index in (0, 5):
        image, labels, instances = toycity.scene("val", index)
        sample = samples[index]
        assert sample["name"] == f"leftImg8bit/val/toycity/toycity_000000_{index:06d}_leftImg8bit.bmp"
        np.testing.assert_array_equal(sample["image"].permute(1, 2, 0), image)
        raw = np.array([0, *(TOYCITY[label][0] for label in sample["labels"])])[sample["segments"]]
        np.testing.assert_array_equal(raw, np.where(labels == toycity.EGO, 0, labels))
        # a segment is one instance id, and one instance id a segment
        pairs = np.unique(np.stack([sample["segments"].numpy().ravel(), instances.ravel()]), axis=1)
        assert len(pairs[0]) == len(np.unique(pairs[0])) == len(np.unique(pairs[1]))
        assert not sample["crowd"].any()


def split(data, task, categories=CITYSCAPES, where="cityscapes val", measures=()):
    benchmark = dataclasses.replace(BENCHMARKS["cityscapes_semantic"], task=task, categories=categories)
    return readers.Split(benchmark, data, where, measures)


def read(street, task, categories=CITYSCAPES):
    sample = split(street[0], task, categories, measures=("mIoU", "AP", "PQ"))[0]
    names = [categories[label][1] for label in sample["labels"]]
    return sample, [
        (n, c, (sample["segments"] == i + 1).sum().item())
        for i, (n, c) in enumerate(zip(names, sample["crowd"].tolist(), strict=True))
    ]


def test_panoptic_segments(street):
    sample, segments = read(street, "panoptic")
    assert sorted(segments) == [
        ("bicycle", True, 2),
        ("building", False, 1),
        ("car", False, 1),
        ("car", False, 2),
        ("car", True, 2),
        ("person", False, 1),
        ("rider", False, 1),
        ("road", False, 4),
        ("sky", False, 3),
    ]
    ids, truth = sample["truth"]["panoptic"]
    assert torch.equal(ids, sample["segments"])
    np.testing.assert_array_equal(sample["truth"]["instance"][0], street[2])
    assert [s["category_id"] for s in truth if s["iscrowd"]] == [26, 33]


def test_semantic_segments_merge_things_and_groups(street):
    sample, segments = read(street, "semantic")
    assert ("car", False, 5) in segments and not sample["crowd"].any()
    (target,) = sample["truth"]["semantic"]
    raw = np.array([entry[0] for entry in CITYSCAPES] + [0] * 237)[target.numpy()]  # 255 becomes 0
    counted = np.where(
        np.isin(street[2], [0, 1, 4, 9, 10, 29001]), 0, np.where(street[2] > 999, street[2] // 1000, street[2])
    )
    np.testing.assert_array_equal(raw, counted)


def test_instance_segments_are_things_only(street):
    _, segments = read(street, "instance", [entry for entry in CITYSCAPES if entry[2]])
    assert sorted({name for name, _, _ in segments}) == ["bicycle", "car", "person", "rider"]


def test_what_does_not_fit_is_named(street, tmp_path):
    folder = street[0]
    label = folder / "cityscapes/gtFine/val/x/x_0_gtFine_instanceIds.png"
    Image.fromarray(np.zeros((5, 5), np.uint16)).save(label)
    with pytest.raises(UserError, match="instanceIds.png is .5, 5., its picture .4, 6."):
        split(folder, "panoptic")[0]
    label.unlink()
    with pytest.raises(UserError, match="instanceIds.png is needed and not there"):
        split(folder, "panoptic")
    with pytest.raises(UserError, match="no pictures: expected"):
        split(folder, "panoptic", where="cityscapes train")


# ---------------------------------------------------------------------------------------------- every data set


LISTED = {name: benchmark for name, benchmark in BENCHMARKS.items() if not name.startswith("own_")}  # see test_own.py


def test_all_benchmarks_of_the_paper_are_listed():
    assert len(LISTED) == 10 and len(BENCHMARKS) == 13


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """Every data set, small, both splits; and what is in them."""
    root, found = tmp_path_factory.mktemp("shelf"), {}
    for name, benchmark in LISTED.items():
        for where in (benchmark.trains_on, benchmark.evaluates_on):
            folder, split = where.split()
            if name != "toycity" and where not in found:
                found[where] = datasets.FOLDERS[folder](root / folder, split)
    return root, found


def found_in(sample, samples):
    """{(class name, mask as bytes)} of a sample's things."""
    if "rles" in sample:
        masks = [rle.decode(code).astype(bool) for code in sample["rles"]]
    else:
        masks = [sample["segments"].numpy() == i + 1 for i in range(len(sample["labels"]))]
    classes = [samples.categories[label] for label in sample["labels"]]
    return {(name, mask.tobytes()) for (_, name, thing), mask in zip(classes, masks, strict=True) if thing}


@pytest.mark.parametrize("name", [name for name in LISTED if name not in ("toycity", "ade20k_semantic")])
@pytest.mark.parametrize("part", ["train", "val"])
def test_every_data_set_is_read_back_pixel_for_pixel(shelf, name, part):
    data, found = shelf
    benchmark = BENCHMARKS[name]
    expected = found[benchmark.trains_on if part == "train" else benchmark.evaluates_on]
    samples = open_split(name, data, part)
    assert samples.names == sorted(expected) and len(samples) == len(expected)
    pickle.loads(pickle.dumps(samples))  # for workers that are spawned
    for index, sample_name in enumerate(samples.names):
        sample = samples[index]
        image, things = expected[sample_name]
        assert sample["name"] == sample_name and ("truth" in sample) == (part == "val")
        np.testing.assert_array_equal(sample["image"].permute(1, 2, 0), image)
        assert len(sample["labels"]) == len(sample["crowd"]) and sample["labels"].dtype == torch.int64
        if name == "cityscapes_semantic":
            if part == "val":
                file = sample_name.replace("leftImg8bit/", "gtFine/").replace("leftImg8bit", "gtFine_labelIds")
                labels = np.array(Image.open(data / "cityscapes" / file))
                raw = np.array([c[0] for c in CITYSCAPES] + [0] * 237)[sample["truth"]["semantic"][0]]
                np.testing.assert_array_equal(raw, np.where(labels == 1, 0, labels))
            continue
        if name == "coco_panoptic":  # the scene's own masks; in the other form some are boxes
            things = [datasets.things(ids) for _, _, ids in datasets.scenes(1)][0] if index == 0 else set()
        assert found_in(sample, samples) == things
        if name.startswith("coco"):
            assert sample["crowd"].sum() == (index == 0)
        else:
            assert not sample["crowd"].any()
    assert any(things for _, things in expected.values()) or name == "cityscapes_semantic"


@pytest.mark.parametrize("name", [name for name in LISTED if name != "toycity"])
def test_every_data_set_can_be_trained_on(shelf, name):
    """Its own recipe's augmentation gives crops whose masks are its segments, crowds and void left out."""
    samples, recipe = open_split(name, shelf[0], "train"), stage4.RECIPES[name]
    seen = set()
    for n in range(3 * len(samples)):
        sample = samples[n % len(samples)]
        crop = stage4.augment(sample, recipe, np.random.default_rng(n))
        assert crop["image"].shape == (3, *recipe.crop) and crop["masks"].shape == (len(crop["labels"]), *recipe.crop)
        assert crop["masks"].flatten(1).any(1).all() and crop["name"] == sample["name"]
        assert set(crop["labels"].tolist()) <= set(sample["labels"][~sample["crowd"]].tolist())
        seen |= set(crop["labels"].tolist())
    assert seen and max(seen) < len(samples.categories)


def test_coco_keeps_its_ids_and_its_truth(shelf):
    instance, panoptic = open_split("coco_instance", shelf[0], "val"), open_split("coco_panoptic", shelf[0], "val")
    assert [s["image_id"] for s in instance] == [s["image_id"] for s in panoptic] == [1000, 1037]
    assert instance[1]["rles"] == [] and len(panoptic[1]["labels"]) == 0 and instance[1]["truth"] == {"instance": ()}
    assert instance[1]["image"].shape[0] == 3  # a grey photograph
    assert [c[0] for c in instance.categories] == [24, 25, 26, 27, 28, 31, 32, 33]  # ids with gaps
    file = json.loads((shelf[0] / "coco/annotations/panoptic_val2017.json").read_text())
    sample = panoptic[0]
    ids, segments = sample["truth"]["panoptic"]
    areas = {(s["category_id"], s["area"], s["iscrowd"]) for s in file["annotations"][0]["segments_info"]}
    merged = {(s["category_id"], int((ids == s["id"]).sum()), s["iscrowd"]) for s in segments}
    assert areas == merged and any(crowd for *_, crowd in areas)


def test_ade20k_reads_its_classes_from_its_own_table(shelf):
    samples = open_split("ade20k_semantic", shelf[0], "val")
    assert [name for _, name, _ in samples.categories] == [name.split(",")[0] for name in datasets.ADE20K]
    for sample in samples:
        (target,) = sample["truth"]["semantic"]
        _, labels = shelf[1]["ADEChallengeData2016 validation"][sample["name"]]
        np.testing.assert_array_equal(target, np.where(labels == 0, 255, labels - 1))


def test_kitti360_comes_with_its_weights(shelf):
    sample = open_split("kitti360_instance", shelf[0], "val")[0]
    ids, weights = sample["truth"]["instance"]
    assert weights[:, 0].eq(1).all() and weights[0, -1] == pytest.approx(100 / 65535) and ids.dtype == torch.int32
    assert (ids == 26000).any() and (ids == 34001).any()
    assert "truth" not in open_split("kitti360_instance", shelf[0], "train")[0]


def test_things_without_an_instance_are_a_crowd(tmp_path):
    for write, name, folder in (
        (datasets.synscapes, "synscapes", "img/instance"),
        (datasets.synthia, "synthia", "GT/LABELS"),
    ):
        write(tmp_path / name)
        for file in (tmp_path / name / folder).iterdir():
            if folder == "GT/LABELS":
                channels = readers.torchvision.io.decode_image(str(file), "UNCHANGED").numpy().transpose(1, 2, 0)
                datasets.png16(file, channels * np.array([1, 0, 0]))
            else:
                Image.new("RGB", (256, 128)).save(file)
        sample = split(tmp_path, "instance", readers.CITYSCAPES_THINGS, f"{name} train")[0]
        assert len(sample["labels"]) >= 1 and sample["crowd"].all(), folder


def test_the_real_layouts_traps_are_named(shelf, tmp_path):
    """Each mistake in one line, with the file and what was expected; all but the last before any sample is read."""

    def broken(folder, split, change):
        root = tmp_path / f"case{len(list(tmp_path.iterdir()))}" / folder
        datasets.FOLDERS[folder](root, split, 2)
        change(root)
        return root.parent

    def edit(file, old, new):
        return lambda root: (root / file).write_text((root / file).read_text().replace(old, new, 1))

    def gone(pattern):
        return lambda root: sorted(p for p in root.rglob("*.png") if p.match("*" + pattern))[0].unlink()

    panoptic, instances = "annotations/panoptic_val2017.json", "annotations/instances_val2017.json"
    frames = "data_2d_semantics/train/2013_05_28_drive_val_frames.txt"
    at_once = [
        ("coco_instance", "coco", lambda root: (root / instances).write_text((root / instances).read_text()[:-40]),
         "instances_val2017.json cannot be read as COCO's instances JSON"),
        ("coco_panoptic", "coco", edit(panoptic, "000000001000.jpg", "../../secret.jpg"), "lies outside"),
        ("coco_instance", "coco", edit(instances, "000000001000.jpg", "/etc/passwd"), "lies outside"),
        ("coco_instance", "coco", lambda root: (root / "val2017/000000001037.jpg").unlink(), "1037.jpg is needed"),
        ("coco_instance", "coco", lambda root: (root / instances).unlink(), "instances_val2017.json cannot be read"),
        ("coco_panoptic", "coco", lambda root: (root / panoptic).write_text("[]"), "read as COCO's panoptic JSON"),
        ("kitti360_instance", "KITTI-360", edit(frames, "data_2d_raw", "../data_2d_raw"), "not where pictures are"),
        ("kitti360_instance", "KITTI-360", lambda root: next(root.rglob("confidence/*.png")).unlink(), "confidence"),
        ("kitti360_instance", "KITTI-360", lambda root: (root / frames).unlink(), "val_frames.txt cannot be read"),
        ("kitti360_instance", "KITTI-360", gone("data_rect/*.png"), "data_rect/.*is needed and not there"),
        ("kitti360_instance", "KITTI-360", gone("/instance/*.png"), "instance/.*is needed and not there"),
        ("kitti360_instance", "KITTI-360", edit(frames, " ", "  too "), "lines of a picture's path and its label's"),
        ("coco_panoptic", "coco", gone("panoptic_val2017/*.png"), "panoptic_val2017/.*is needed and not there"),
        ("coco_panoptic", "coco", edit(panoptic, '"000000001000.png"', '"../../../x.png"'), "lies outside"),
        ("coco_panoptic", "coco", edit(panoptic, '"image_id": 1037', '"image_id": 1000'), "expected one annotation"),
        ("ade20k_semantic", "ADEChallengeData2016", edit("objectInfo150.txt", "\t11664", ";11664"), "tabs"),
        ("ade20k_semantic", "ADEChallengeData2016", lambda root: next(root.rglob("annotations/*/*.png")).unlink(),
         "ADE_val.*png is needed and not there"),
    ]  # fmt: skip
    for name, folder, change, message in at_once:
        split = BENCHMARKS[name].evaluates_on.split()[1]
        with pytest.raises(UserError, match=message) as error:
            open_split(name, broken(folder, split, change), "val")
        assert "\n" not in str(error.value) and folder in str(error.value)
    for name, folder, pattern in [
        ("urbansyn_to_cityscapes_instance", "urbansyn", "panoptic/*.png"),
        ("synscapes_to_cityscapes_instance", "synscapes", "class/*.png"),
        ("synscapes_to_cityscapes_instance", "synscapes", "img/instance/*.png"),
        ("synthia_to_cityscapes_instance", "synthia", "GT/LABELS/*.png"),
        ("cityscapes_instance", "cityscapes", "gtFine/train/bonn/*instanceIds.png"),
    ]:
        with pytest.raises(UserError, match="png is needed and not there"):
            open_split(name, broken(folder, "train", gone(pattern)), "train")
    with pytest.raises(UserError, match="json is needed and not there"):
        lost = broken("urbansyn", "train", lambda root: sorted(root.rglob("*.json"))[0].unlink())
        open_split("urbansyn_to_cityscapes_instance", lost, "train")

    def repaint(pattern, change):
        def edit(root):
            file = sorted(root.rglob(pattern))[0]
            datasets.save(file, change(np.array(Image.open(file))))

        return edit

    later = [
        ("coco_panoptic", "val", edit(panoptic, '"category_id": 7', '"category_id": 99'), "unknown label 99"),
        ("coco_instance", "val", edit(instances, '"category_id": 26', '"category_id": 99'), "unknown label 99"),
        ("coco_panoptic", "val", repaint("panoptic_val2017/*.png",
         lambda a: a + np.uint8(1)), "segments that its JSON lists .KeyError: [0-9]+"),
        ("coco_instance", "val", repaint("val2017/*.jpg", lambda a: a[:-8]), "its annotations in .* are for"),
        ("coco_instance", "val", edit(instances, '"size": [128, 256]', '"size": [128, 255]'),
         "mask 1 of .*its size is .128, 255."),
        ("coco_instance", "val", edit(instances, '"size": [128, 256], ', ''),
         "cannot be read as mask 1 of .*KeyError: .size"),
        ("kitti360_instance", "val", repaint("confidence/*.png", lambda a: a[:-8]), "confidence.*is .120, 256., its"),
        ("synscapes_to_cityscapes_instance", "train",
         repaint("img/instance/*.png", lambda a: a[:-8]), "instance/1.png is .120, 256., its"),
        ("synscapes_to_cityscapes_instance", "train",
         repaint("img/class/*.png", lambda a: a.astype(np.uint16) + 900), "unknown label 9[0-9]+"),
        ("coco_panoptic", "val", repaint("panoptic_val2017/*.png", lambda a: a[:-8]), "is .120, 256., its picture"),
        ("cityscapes_instance", "val", repaint("*instanceIds.png", lambda a: a + np.uint16(40000)),
         "unknown label [0-9]+"),
        ("ade20k_semantic", "val", repaint("annotations/*/*.png", lambda a: a + np.uint8(99)), "unknown label [0-9]+"),
        ("kitti360_instance", "val", repaint("instance/*.png", lambda a: a * 0 + np.uint16(60000)), "unknown label 60"),
        ("synscapes_to_cityscapes_instance", "train", repaint("class/*.png", lambda a: a + np.uint8(60)),
         "unknown label"),
        ("urbansyn_to_cityscapes_instance", "train",
         lambda root: sorted(root.rglob("*.json"))[0].write_text('[{"color": [1, 2, 3]}]'), "objects with .color"),
        ("synthia_to_cityscapes_instance", "train", repaint("LABELS/*.png", lambda a: a), "has not 16 bits a channel"),
        ("synscapes_to_cityscapes_instance", "train", repaint("img/rgb/*.png", lambda a: a[:-8]), "is .128, 256., its"),
    ]  # fmt: skip
    for name, part, change, message in later:
        folder, split = (BENCHMARKS[name].trains_on if part == "train" else BENCHMARKS[name].evaluates_on).split()
        samples = open_split(name, broken(folder, split, change), part)
        with pytest.raises(UserError, match=message) as error:
            samples[0]
        assert "\n" not in str(error.value) and folder in str(error.value)


def test_pictures_are_scaled_to_multiples_of_32():
    assert readers.working_size(427, 640, "512") == (512, 768)
    assert readers.working_size(1024, 2048, "512x1024") == (512, 1024)
    assert readers.working_size(376, 1408, "own") == (384, 1408)
    assert readers.working_size(480, 640, "800/1333", multiple=1) == (800, 1067)
    assert readers.working_size(480, 1000, "800/1333", multiple=1) == (640, 1333)
    for wrong in ("", "x", "12", "800/", "800/1333/2000", "512x", "0x64", "ours"):
        with pytest.raises(UserError, match="neither HEIGHTxWIDTH nor a short side"):
            readers.working_size(480, 640, wrong)
    image = torch.full((3, 50, 70), 51, dtype=torch.uint8)
    scaled = resize_image(image, "64")
    assert scaled.shape == (3, 64, 96) and scaled.dtype == torch.float32
    torch.testing.assert_close(scaled, torch.full((3, 64, 96), 0.2))
