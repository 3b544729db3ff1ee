"""toycity: the same scenes every time, labels that agree, no colours that tell cars from trucks."""

from concurrent.futures import ThreadPoolExecutor

from common import toycity
from common.toycity import BUILDING, CAR, PERSON, POLE, ROAD, SIDEWALK, SKY, TRUCK, VEGETATION

import numpy as np
import pytest
from PIL import Image
from pretrain_tiny import PRETRAIN

STUFF = {ROAD, SIDEWALK, BUILDING, POLE, VEGETATION, SKY}
THINGS = {PERSON, CAR, TRUCK}


@pytest.fixture(scope="module")
def scenes():
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda index: toycity.scene("train", index), range(20)))


def small(monkeypatch):
    """Let `write` draw cheap images, as the writer is what is tested."""

    def scene(split, index, style):
        label = np.full((8, 16), index, np.uint8)
        return np.full((8, 16, 3), 7, np.uint8), label, label.astype(np.int32)

    monkeypatch.setattr(toycity, "scene", scene)


def test_same_scene_every_time(scenes):
    for again, first in zip(toycity.scene("train", 3), scenes[3], strict=True):
        np.testing.assert_array_equal(again, first)


def test_scenes_differ_between_splits_seeds_and_indices(scenes):
    others = [toycity.scene("val", 0), toycity.scene("pretrain", 0, style=PRETRAIN), scenes[1]]
    for image, labels, _ in [*others, toycity.scene("train", 0, seed=1)]:
        assert np.mean(image != scenes[0][0]) > 0.5
        assert np.mean(labels != scenes[0][1]) > 0.02


def test_labels_and_instances_agree(scenes):
    for image, labels, instances in scenes:
        assert (image.dtype, labels.dtype, instances.dtype) == (np.uint8, np.uint8, np.int32)
        assert image.shape == (512, 1024, 3) and labels.shape == instances.shape == (512, 1024)
        thing = np.isin(labels, list(THINGS))
        np.testing.assert_array_equal(instances[thing] // 1000, labels[thing])
        np.testing.assert_array_equal(instances[~thing], labels[~thing])
        ids, pixels = np.unique(instances[thing], return_counts=True)
        assert pixels.size == 0 or pixels.min() >= toycity.MIN_PIXELS
        for label in THINGS:
            numbers = ids[ids // 1000 == label] % 1000  # sorted, as ids are
            np.testing.assert_array_equal(numbers, np.arange(len(numbers)))


def test_every_class_is_frequent(scenes):
    present = [set(np.unique(labels).tolist()) for _, labels, _ in scenes]
    assert set.union(*present) == STUFF | THINGS | {toycity.EGO}
    for label in STUFF | THINGS:
        assert sum(label in found for found in present) > len(scenes) / 2, label


def test_labels_follow_the_image(scenes):
    """Colour changes most across the borders of labels, so labels are not shifted."""

    def contrast(shift):
        total = 0
        for image, labels, _ in scenes[:6]:
            step = np.abs(np.diff(image.astype(int), axis=1)).sum(2)
            border = np.roll(labels[:, 1:] != labels[:, :-1], shift, axis=1)
            total += step[border].mean() / step.mean()
        return total / 6

    assert contrast(0) > 3
    assert contrast(0) > 1.5 * max(contrast(-3), contrast(3))


def test_colour_does_not_tell_car_from_truck(scenes):
    colour = []
    label = []
    for image, _, instances in scenes:
        for number in np.unique(instances[instances >= CAR * 1000]):
            colour.append(image[instances == number].mean(0))
            label.append(number // 1000 == CAR)
    colour, label = np.array(colour), np.array(label)
    assert min(label.sum(), (~label).sum()) > 20
    # Each instance goes to the class whose mean colour is nearest, its own colour left out. The
    # average of both classes' accuracies is 0.5 by chance.
    right = []
    for i in range(len(label)):
        others = np.arange(len(label)) != i
        to_car = np.linalg.norm(colour[i] - colour[others & label].mean(0))
        to_truck = np.linalg.norm(colour[i] - colour[others & ~label].mean(0))
        right.append((to_car < to_truck) == label[i])
    right = np.array(right)
    assert (right[label].mean() + right[~label].mean()) / 2 < 0.62


def test_written_files(tmp_path, scenes):
    toycity.write(tmp_path / "a", {"train": 2, "val": 1})
    toycity.write(tmp_path / "b", {"train": 1})
    stem = "train/toycity/toycity_000000_000000"
    names = [f"leftImg8bit/{stem}_leftImg8bit.bmp", f"gtFine/{stem}_gtFine_labelIds.png"]
    names.append(f"gtFine/{stem}_gtFine_instanceIds.png")
    for name, mode, expected in zip(names, ("RGB", "L", "I;16"), scenes[0], strict=True):
        with Image.open(tmp_path / "a" / name) as image:
            assert image.mode == mode
            np.testing.assert_array_equal(np.asarray(image), expected)
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert len(list((tmp_path / "a").rglob("*.*"))) == 9
    val = tmp_path / "a/leftImg8bit/val/toycity/toycity_000000_000000_leftImg8bit.bmp"
    assert val.is_file()


def test_interrupted_writer_leaves_nothing_half_written(tmp_path, monkeypatch):
    small(monkeypatch)
    drawn = []
    cheap = toycity.scene

    def stopped(split, index, style):
        drawn.append(index)
        if index == 3:
            raise KeyboardInterrupt
        return cheap(split, index, style)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(toycity, "scene", stopped)
        toycity.write(tmp_path / "toycity", {"train": 200})
    assert not (tmp_path / "toycity").exists()
    assert len(drawn) < 200
    toycity.write(tmp_path / "toycity", {"val": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["toycity"]
    assert len(list((tmp_path / "toycity").rglob("*.*"))) == 6  # nothing of the first run


def test_existing_folder_is_left_alone(tmp_path, monkeypatch):
    small(monkeypatch)
    (tmp_path / "toycity").mkdir()
    toycity.write(tmp_path / "toycity", {"train": 1})
    assert not list((tmp_path / "toycity").iterdir())
