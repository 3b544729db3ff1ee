"""The readers of data sets, on scenes whose labels are known."""

import importlib
import json
import pickle
from dataclasses import replace

from common import datasets as readers
from common import toycity
from common.datasets import BENCHMARKS, CITYSCAPES_CATEGORIES, TOYCITY_CATEGORIES, open_split
from common.images import resize_image, working_size
from common.run import UserError

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle

stage4 = importlib.import_module("04_train")
NOT_EVALUATED = [0, 1, 4, 9, 10, 29001]


@pytest.fixture
def street(tmp_path):
    """A data set of one 4 x 6 image with every kind of label."""
    root = tmp_path / "cityscapes"
    ids = np.array(
        [
            [7, 7, 23, 23, 23, 0],
            [7, 26000, 26000, 26001, 26, 26],  # two cars, a group of cars
            [7, 24003, 25001, 29001, 4, 1],  # person, rider, a caravan, static, ego vehicle
            [9, 9, 10, 33, 33, 11],  # not evaluated, a group of bicycles, building
        ]
    )
    image = np.random.default_rng(0).integers(0, 255, (4, 6, 3), dtype=np.uint8)
    datasets.save(root / "leftImg8bit/val/x/x_0_leftImg8bit.png", image)
    datasets.save(root / "gtFine/val/x/x_0_gtFine_instanceIds.png", ids.astype(np.uint16))
    return tmp_path, image, ids


def test_a_scene_is_read_back_pixel_for_pixel(data):
    samples = open_split("toycity", data, "val")
    assert len(samples) == 6
    raw_ids = np.array([category.id for category in TOYCITY_CATEGORIES])
    for index in (0, 5):
        image, labels, instances = toycity.scene("val", index)
        sample = samples[index]
        stem = f"toycity_000000_{index:06d}"
        assert sample["name"] == f"leftImg8bit/val/toycity/{stem}_leftImg8bit.bmp"
        np.testing.assert_array_equal(sample["image"].permute(1, 2, 0), image)
        raw = np.array([0, *raw_ids[sample["labels"]]])[sample["segments"]]
        np.testing.assert_array_equal(raw, np.where(labels == toycity.EGO, 0, labels))
        # A segment is one instance id, and one instance id a segment.
        both = np.stack([sample["segments"].numpy().ravel(), instances.ravel()])
        pairs = np.unique(both, axis=1)
        assert len(pairs[0]) == len(np.unique(pairs[0])) == len(np.unique(pairs[1]))
        assert not sample["iscrowd"].any()


def split(
    data,
    task,
    categories=CITYSCAPES_CATEGORIES,
    data_set=readers.CITYSCAPES,
    split="val",
    metrics=(),
):
    """A split of any data set for any task."""
    benchmark = replace(BENCHMARKS["cityscapes_semantic"], task=task, categories=categories)
    root = data / data_set.folder
    layout = data_set.find(data_set, root, data_set.splits[split], task)
    return readers.Split(root, layout, benchmark, metrics)


def read(street, task, categories=CITYSCAPES_CATEGORIES):
    """The sample, and (class name, iscrowd, pixels) of its segments."""
    sample = split(street[0], task, categories, metrics=("mIoU", "AP", "PQ"))[0]
    segments = []
    for index, label in enumerate(sample["labels"]):
        pixels = (sample["segments"] == index + 1).sum().item()
        segments.append((categories[label].name, sample["iscrowd"][index].item(), pixels))
    return sample, segments


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
    truth = sample["truth"]
    assert torch.equal(truth["PQ"]["true_ids"], sample["segments"])
    crowds = [s["category_id"] for s in truth["PQ"]["true_segments"] if s["iscrowd"]]
    assert crowds == [26, 33]
    np.testing.assert_array_equal(truth["AP"]["instance_ids"], street[2])


def test_semantic_segments_merge_things_and_groups(street):
    sample, segments = read(street, "semantic")
    assert ("car", False, 5) in segments and not sample["iscrowd"].any()
    target = sample["truth"]["mIoU"]["target"]
    raw_ids = [category.id for category in CITYSCAPES_CATEGORIES]
    raw = np.array(raw_ids + [0] * 237)[target.numpy()]  # 255 becomes 0
    labels = np.where(street[2] > 999, street[2] // 1000, street[2])
    counted = np.where(np.isin(street[2], NOT_EVALUATED), 0, labels)
    np.testing.assert_array_equal(raw, counted)


def test_instance_segments_are_things_only(street):
    _, segments = read(street, "instance", readers.CITYSCAPES_THINGS)
    assert sorted({name for name, _, _ in segments}) == ["bicycle", "car", "person", "rider"]


def test_what_does_not_fit_is_named(street):
    folder = street[0]
    label = folder / "cityscapes/gtFine/val/x/x_0_gtFine_instanceIds.png"
    datasets.save(label, np.zeros((5, 5), np.uint16))
    with pytest.raises(UserError, match="instanceIds.png is .5, 5., its image .4, 6."):
        split(folder, "panoptic")[0]
    label.unlink()
    with pytest.raises(UserError, match="instanceIds.png is needed and not there"):
        split(folder, "panoptic")
    with pytest.raises(UserError, match="no images: expected"):
        split(folder, "panoptic", split="train")


# ------------------------------------------------------------------ every data set
# People's own data sets are in test_own.py.
LISTED = {name: one for name, one in BENCHMARKS.items() if not name.startswith("own_")}


def place(name, split):
    """The folder of a benchmark's split below the data root, and the split's name on disk."""
    benchmark = BENCHMARKS[name]
    data_set = benchmark.train_on if split == "train" else benchmark.evaluate_on
    return data_set.folder, data_set.splits[split]


def test_all_benchmarks_of_the_paper_are_listed():
    assert len(LISTED) == 10 and len(BENCHMARKS) == 13


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """Every data set, small, both splits, and {(folder, split): what is in them}."""
    root = tmp_path_factory.mktemp("shelf")
    found = {}
    for name in LISTED:
        for split in ("train", "val"):
            folder, on_disk = place(name, split)
            if name != "toycity" and (folder, on_disk) not in found:
                found[folder, on_disk] = datasets.FOLDERS[folder](root / folder, on_disk)
    return root, found


def found_in(sample, samples):
    """{(class name, mask as bytes)} of a sample's things."""
    things = set()
    for index, label in enumerate(sample["labels"]):
        if "rles" in sample:
            mask = rle.decode(sample["rles"][index]).astype(bool)
        else:
            mask = sample["segments"].numpy() == index + 1
        category = samples.categories[label]
        if category.isthing:
            things.add((category.name, mask.tobytes()))
    return things


WITH_THINGS = [name for name in LISTED if name not in ("toycity", "ade20k_semantic")]


@pytest.mark.parametrize("name", WITH_THINGS)
@pytest.mark.parametrize("split", ["train", "val"])
def test_every_data_set_is_read_back_pixel_for_pixel(shelf, name, split):
    data, found = shelf
    expected = found[place(name, split)]
    samples = open_split(name, data, split)
    assert samples.names == sorted(expected) and len(samples) == len(expected)
    pickle.loads(pickle.dumps(samples))  # for workers that are spawned
    for index, sample_name in enumerate(samples.names):
        sample = samples[index]
        image, things = expected[sample_name]
        assert sample["name"] == sample_name and ("truth" in sample) == (split == "val")
        np.testing.assert_array_equal(sample["image"].permute(1, 2, 0), image)
        assert len(sample["labels"]) == len(sample["iscrowd"])
        assert sample["labels"].dtype == torch.int64
        if name == "cityscapes_semantic":
            if split == "val":
                check_cityscapes_target(data, sample)
            continue
        if name == "coco_panoptic":  # the scene's own masks, of which COCO's instances make boxes
            things = set()
            if index == 0:
                (scene,) = datasets.scenes(1)
                things = datasets.things(scene[2])
        assert found_in(sample, samples) == things
        if name.startswith("coco"):
            assert sample["iscrowd"].sum() == (index == 0)
        else:
            assert not sample["iscrowd"].any()
    assert any(things for _, things in expected.values()) or name == "cityscapes_semantic"


def check_cityscapes_target(data, sample):
    file = sample["name"].replace("leftImg8bit/", "gtFine/")
    file = file.replace("leftImg8bit", "gtFine_labelIds")
    labels = np.array(Image.open(data / "cityscapes" / file))
    raw_ids = [category.id for category in CITYSCAPES_CATEGORIES]
    raw = np.array(raw_ids + [0] * 237)[sample["truth"]["mIoU"]["target"]]
    np.testing.assert_array_equal(raw, np.where(labels == 1, 0, labels))


@pytest.mark.parametrize("name", [name for name in LISTED if name != "toycity"])
def test_every_data_set_can_be_trained_on(shelf, name):
    """Its own recipe gives crops whose masks are its segments, crowds and void left out."""
    samples = open_split(name, shelf[0], "train")
    recipe = stage4.RECIPES[name]
    seen = set()
    for n in range(3 * len(samples)):
        sample = samples[n % len(samples)]
        crop = stage4.augment(sample, recipe, np.random.default_rng(n))
        assert crop["image"].shape == (3, *recipe.crop)
        assert crop["masks"].shape == (len(crop["labels"]), *recipe.crop)
        assert crop["masks"].flatten(1).any(1).all() and crop["name"] == sample["name"]
        labels = set(crop["labels"].tolist())
        assert labels <= set(sample["labels"][~sample["iscrowd"]].tolist())
        seen |= labels
    assert seen and max(seen) < len(samples.categories)


def test_coco_keeps_its_ids_and_its_truth(shelf):
    instance = open_split("coco_instance", shelf[0], "val")
    panoptic = open_split("coco_panoptic", shelf[0], "val")
    assert [sample["image_id"] for sample in instance] == [1000, 1037]
    assert [sample["image_id"] for sample in panoptic] == [1000, 1037]
    assert instance[1]["rles"] == [] and len(panoptic[1]["labels"]) == 0
    assert instance[1]["truth"] == {"AP": {"image_id": 1037}}
    assert instance[1]["image"].shape[0] == 3  # a grey photograph
    category_ids = [category.id for category in instance.categories]
    assert category_ids == [24, 25, 26, 27, 28, 31, 32, 33]  # ids with gaps
    file = json.loads((shelf[0] / "coco/annotations/panoptic_val2017.json").read_text())
    areas = set()
    for segment in file["annotations"][0]["segments_info"]:
        areas.add((segment["category_id"], segment["area"], segment["iscrowd"]))
    truth = panoptic[0]["truth"]["PQ"]
    merged = set()
    for segment in truth["true_segments"]:
        area = int((truth["true_ids"] == segment["id"]).sum())
        merged.add((segment["category_id"], area, segment["iscrowd"]))
    assert areas == merged and any(iscrowd for _, _, iscrowd in areas)


def test_ade20k_reads_its_classes_from_its_own_table(shelf):
    samples = open_split("ade20k_semantic", shelf[0], "val")
    names = [category.name for category in samples.categories]
    assert names == [name.split(",")[0] for name in datasets.ADE20K]
    for sample in samples:
        _, labels = shelf[1]["ADEChallengeData2016", "validation"][sample["name"]]
        expected = np.where(labels == 0, 255, labels - 1)
        np.testing.assert_array_equal(sample["truth"]["mIoU"]["target"], expected)


def test_kitti360_comes_with_its_weights(shelf):
    sample = open_split("kitti360_instance", shelf[0], "val")[0]
    ids = sample["truth"]["AP"]["instance_ids"]
    weights = sample["truth"]["AP"]["weights"]
    assert weights[:, 0].eq(1).all() and weights[0, -1] == pytest.approx(100 / 65535)
    assert ids.dtype == torch.int32 and (ids == 26000).any() and (ids == 34001).any()
    assert "truth" not in open_split("kitti360_instance", shelf[0], "train")[0]


def test_things_without_an_instance_are_a_crowd(tmp_path):
    datasets.synscapes(tmp_path / "synscapes")
    for file in (tmp_path / "synscapes/img/instance").iterdir():
        Image.new("RGB", (256, 128)).save(file)
    datasets.synthia(tmp_path / "synthia")
    for file in (tmp_path / "synthia/GT/LABELS").iterdir():
        channels = readers.torchvision.io.decode_image(str(file), "UNCHANGED").numpy()
        datasets.png16(file, channels.transpose(1, 2, 0) * np.array([1, 0, 0]))
    for data_set in (readers.SYNSCAPES, readers.SYNTHIA):
        samples = split(tmp_path, "instance", readers.CITYSCAPES_THINGS, data_set, "train")
        sample = samples[0]
        assert len(sample["labels"]) >= 1 and sample["iscrowd"].all(), data_set.folder


# ------------------------------------------------------------------ what is wrong with the files
COCO_PANOPTIC = "annotations/panoptic_val2017.json"
COCO_INSTANCES = "annotations/instances_val2017.json"
FRAMES = "data_2d_semantics/train/2013_05_28_drive_val_frames.txt"


def edit(file, old, new):
    """A change of a data set, to be given its folder: the first `old` in a file becomes `new`."""

    def change(root):
        text = (root / file).read_text()
        assert old in text
        (root / file).write_text(text.replace(old, new, 1))

    return change


def gone(pattern):
    """The first file of the pattern is deleted."""
    return lambda root: sorted(root.rglob(pattern))[0].unlink()


def filled(pattern, text):
    """The first file of the pattern holds this text."""
    return lambda root: sorted(root.rglob(pattern))[0].write_text(text)


def truncated(file):
    return lambda root: (root / file).write_text((root / file).read_text()[:-40])


def repaint(pattern, function):
    """The pixels of the first file of the pattern pass through a function."""

    def change(root):
        file = sorted(root.rglob(pattern))[0]
        datasets.save(file, function(np.array(Image.open(file))))

    return change


def without_last_rows(pixels):
    return pixels[:-8]


CASES_AT_ONCE = [
    (
        "coco_instance",
        truncated(COCO_INSTANCES),
        "instances_val2017.json cannot be read as COCO's instances JSON",
    ),
    ("coco_panoptic", edit(COCO_PANOPTIC, "000000001000.jpg", "../../x.jpg"), "lies outside"),
    ("coco_instance", edit(COCO_INSTANCES, "000000001000.jpg", "/etc/passwd"), "lies outside"),
    ("coco_instance", gone("val2017/000000001037.jpg"), "1037.jpg is needed"),
    ("coco_instance", gone(COCO_INSTANCES), "instances_val2017.json cannot be read"),
    ("coco_panoptic", filled(COCO_PANOPTIC, "[]"), "read as COCO's panoptic JSON"),
    (
        "kitti360_instance",
        edit(FRAMES, "data_2d_raw", "../data_2d_raw"),
        "not where images are expected",
    ),
    ("kitti360_instance", gone("confidence/*.png"), "confidence/.*is needed and not there"),
    ("kitti360_instance", gone(FRAMES), "val_frames.txt cannot be read"),
    ("kitti360_instance", gone("data_rect/*.png"), "data_rect/.*is needed and not there"),
    ("kitti360_instance", gone("instance/*.png"), "instance/.*is needed and not there"),
    ("kitti360_instance", edit(FRAMES, " ", "  too "), "lines of an image's path and its label's"),
    ("coco_panoptic", gone("panoptic_val2017/*.png"), "panoptic_val2017/.*is needed and not there"),
    (
        "coco_panoptic",
        edit(COCO_PANOPTIC, '"000000001000.png"', '"../../../x.png"'),
        "lies outside",
    ),
    (
        "coco_panoptic",
        edit(COCO_PANOPTIC, '"image_id": 1037', '"image_id": 1000'),
        "expected one annotation",
    ),
    ("ade20k_semantic", edit("objectInfo150.txt", "\t11664", ";11664"), "tabs"),
    ("ade20k_semantic", gone("annotations/*/*.png"), "ADE_val.*png is needed and not there"),
]
CASES_OF_TRAINING = [
    ("urbansyn_to_cityscapes_instance", "panoptic/*.png", "png"),
    ("urbansyn_to_cityscapes_instance", "*.json", "json"),
    ("synscapes_to_cityscapes_instance", "class/*.png", "png"),
    ("synscapes_to_cityscapes_instance", "img/instance/*.png", "png"),
    ("synthia_to_cityscapes_instance", "GT/LABELS/*.png", "png"),
    ("cityscapes_instance", "gtFine/train/bonn/*instanceIds.png", "png"),
]
CASES_OF_A_SAMPLE = [
    (
        "coco_panoptic",
        "val",
        edit(COCO_PANOPTIC, '"category_id": 7', '"category_id": 99'),
        "unknown label 99",
    ),
    (
        "coco_instance",
        "val",
        edit(COCO_INSTANCES, '"category_id": 26', '"category_id": 99'),
        "unknown label 99",
    ),
    (
        "coco_panoptic",
        "val",
        repaint("panoptic_val2017/*.png", lambda pixels: pixels + np.uint8(1)),
        "holds the segment [0-9]+, which .*panoptic_val2017.json does not list",
    ),
    (
        "coco_instance",
        "val",
        repaint("val2017/*.jpg", without_last_rows),
        "its annotations in .* are for",
    ),
    (
        "coco_instance",
        "val",
        edit(COCO_INSTANCES, '"size": [128, 256]', '"size": [128, 255]'),
        "mask 1 of .*its size is .128, 255.",
    ),
    (
        "coco_instance",
        "val",
        edit(COCO_INSTANCES, '"size": [128, 256], ', ""),
        "cannot be read as mask 1 of .*KeyError: .size",
    ),
    (
        "kitti360_instance",
        "val",
        repaint("confidence/*.png", without_last_rows),
        "confidence.*is .120, 256., its",
    ),
    (
        "synscapes_to_cityscapes_instance",
        "train",
        repaint("img/instance/*.png", without_last_rows),
        "instance/1.png is .120, 256., its",
    ),
    (
        "synscapes_to_cityscapes_instance",
        "train",
        repaint("img/class/*.png", lambda pixels: pixels.astype(np.uint16) + 900),
        "unknown label 9[0-9]+",
    ),
    (
        "coco_panoptic",
        "val",
        repaint("panoptic_val2017/*.png", without_last_rows),
        "is .120, 256., its image",
    ),
    (
        "cityscapes_instance",
        "val",
        repaint("*instanceIds.png", lambda pixels: pixels + np.uint16(40000)),
        "unknown label [0-9]+",
    ),
    (
        "ade20k_semantic",
        "val",
        repaint("annotations/*/*.png", lambda pixels: pixels + np.uint8(99)),
        "unknown label [0-9]+",
    ),
    (
        "kitti360_instance",
        "val",
        repaint("instance/*.png", lambda pixels: pixels * 0 + np.uint16(60000)),
        "unknown label 60",
    ),
    (
        "synscapes_to_cityscapes_instance",
        "train",
        repaint("class/*.png", lambda pixels: pixels + np.uint8(60)),
        "unknown label",
    ),
    (
        "urbansyn_to_cityscapes_instance",
        "train",
        filled("*.json", '[{"color": [1, 2, 3]}]'),
        "objects with .color",
    ),
    (
        "synthia_to_cityscapes_instance",
        "train",
        repaint("LABELS/*.png", lambda pixels: pixels),
        "has not 16 bits a channel",
    ),
    (
        "synscapes_to_cityscapes_instance",
        "train",
        repaint("img/rgb/*.png", without_last_rows),
        "is .128, 256., its",
    ),
]


def broken(tmp_path, name, split, change):
    """A data root that holds one changed data set, and that data set's folder."""
    folder, on_disk = place(name, split)
    datasets.FOLDERS[folder](tmp_path / folder, on_disk, 2)
    change(tmp_path / folder)
    return tmp_path, folder


@pytest.mark.parametrize("name, change, message", CASES_AT_ONCE)
def test_a_mistake_is_named_before_any_sample_is_read(tmp_path, name, change, message):
    data, folder = broken(tmp_path, name, "val", change)
    with pytest.raises(UserError, match=message) as error:
        open_split(name, data, "val")
    assert "\n" not in str(error.value) and folder in str(error.value)


@pytest.mark.parametrize("name, pattern, suffix", CASES_OF_TRAINING)
def test_a_missing_label_is_named_before_any_sample_is_read(tmp_path, name, pattern, suffix):
    data, _ = broken(tmp_path, name, "train", gone(pattern))
    with pytest.raises(UserError, match=f"{suffix} is needed and not there"):
        open_split(name, data, "train")


@pytest.mark.parametrize("name, split, change, message", CASES_OF_A_SAMPLE)
def test_a_sample_that_cannot_be_used_is_named(tmp_path, name, split, change, message):
    data, folder = broken(tmp_path, name, split, change)
    samples = open_split(name, data, split)
    with pytest.raises(UserError, match=message) as error:
        samples[0]
    assert "\n" not in str(error.value) and folder in str(error.value)


# ------------------------------------------------------------------ the size of images
def test_images_are_resized_to_multiples_of_32():
    assert working_size(427, 640, "512") == (512, 768)
    assert working_size(1024, 2048, "512x1024") == (512, 1024)
    assert working_size(376, 1408, "original") == (384, 1408)
    assert working_size(20, 1408, "original") == (32, 1408)
    assert working_size(480, 640, "800/1333", multiple=1) == (800, 1067)
    assert working_size(480, 1000, "800/1333", multiple=1) == (640, 1333)
    for wrong in ("", "x", "12", "800/", "800/1333/2000", "512x", "0x64", "own"):
        with pytest.raises(UserError, match="is no size: expected HEIGHTxWIDTH, a short side"):
            working_size(480, 640, wrong)
    image = torch.full((3, 50, 70), 51, dtype=torch.uint8)
    resized = resize_image(image, "64")
    assert resized.shape == (3, 64, 96) and resized.dtype == torch.float32
    torch.testing.assert_close(resized, torch.full((3, 64, 96), 0.2))
