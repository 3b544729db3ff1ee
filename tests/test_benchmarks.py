"""The Cityscapes reader, on scenes whose labels are known, and pictures on their way into the encoders."""

import numpy as np
import pytest
import torch
from PIL import Image

from common import benchmarks, toycity
from common.benchmarks import BENCHMARKS, CITYSCAPES, TOYCITY, Cityscapes, open_split, resize_image
from common.run import UserError


@pytest.fixture
def street(tmp_path):
    """A data set of one 4 x 6 picture with every kind of label."""
    for folder in ("leftImg8bit/val/x", "gtFine/val/x"):
        (tmp_path / folder).mkdir(parents=True)
    ids = np.array(
        [
            [7, 7, 23, 23, 23, 0],
            [7, 26000, 26000, 26001, 26, 26],  # two cars, a group of cars
            [7, 24003, 25001, 29001, 4, 1],  # person, rider, a caravan, static, ego vehicle
            [9, 9, 10, 33, 33, 11],  # not evaluated; a group of bicycles; building
        ]
    )
    picture = np.random.default_rng(0).integers(0, 255, (4, 6, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "leftImg8bit/val/x/x_0_leftImg8bit.png")
    Image.fromarray(ids.astype(np.uint16)).save(tmp_path / "gtFine/val/x/x_0_gtFine_instanceIds.png")
    return tmp_path, picture, ids


def test_a_scene_is_read_back_pixel_for_pixel(data):
    samples = open_split("toycity", data, "val")
    assert len(samples) == 6
    for index in (0, 5):
        image, labels, instances = toycity.scene("val", index)
        sample = samples[index]
        assert sample["name"] == f"leftImg8bit/val/toycity/toycity_000000_{index:06d}_leftImg8bit.png"
        np.testing.assert_array_equal(sample["image"].permute(1, 2, 0), image)
        raw = np.array([0, *(TOYCITY[label][0] for label in sample["labels"])])[sample["segments"]]
        np.testing.assert_array_equal(raw, np.where(labels == toycity.EGO, 0, labels))
        # a segment is one instance id, and one instance id a segment
        pairs = np.unique(np.stack([sample["segments"].numpy().ravel(), instances.ravel()]), axis=1)
        assert len(pairs[0]) == len(np.unique(pairs[0])) == len(np.unique(pairs[1]))
        assert not sample["crowd"].any()


def read(street, task, categories=CITYSCAPES):
    sample = Cityscapes(street[0], "val", categories, task, with_truth=True)[0]
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
    label = folder / "gtFine/val/x/x_0_gtFine_instanceIds.png"
    Image.fromarray(np.zeros((5, 5), np.uint16)).save(label)
    with pytest.raises(UserError, match="instanceIds.png is .5, 5., its picture .4, 6."):
        Cityscapes(folder, "val", CITYSCAPES, "panoptic")[0]
    label.unlink()
    with pytest.raises(UserError, match="has no labels: expected .*instanceIds.png"):
        Cityscapes(folder, "val", CITYSCAPES, "panoptic")
    with pytest.raises(UserError, match="no pictures: expected"):
        Cityscapes(folder, "train", CITYSCAPES, "panoptic")


def test_all_benchmarks_of_the_paper_are_listed_and_the_missing_are_missing(tmp_path, data):
    assert len(BENCHMARKS) == 10
    assert [name for name, b in BENCHMARKS.items() if benchmarks.on_disk(b, data)] == ["toycity"]
    with pytest.raises(UserError, match="no reader yet"):
        open_split("coco_panoptic", tmp_path, "train")


def test_pictures_are_scaled_to_multiples_of_32():
    assert benchmarks.working_size(427, 640, "512") == (512, 768)
    assert benchmarks.working_size(1024, 2048, "512x1024") == (512, 1024)
    image = torch.full((3, 50, 70), 51, dtype=torch.uint8)
    scaled = resize_image(image, "64")
    assert scaled.shape == (3, 64, 96) and scaled.dtype == torch.float32
    torch.testing.assert_close(scaled, torch.full((3, 64, 96), 0.2))
