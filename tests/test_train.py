"""Stage 4: augmentation, the loop, and what an interruption leaves behind."""

import dataclasses
import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from common import run
from common.datasets import BENCHMARKS, Category, open_split
from common.images import working_size
from common.model import LOSS_WEIGHTS, PADDING, build_model
from common.run import UserError

import numpy as np
import pytest
import torch
from pycocotools import mask as rle
from torch.utils.data import DataLoader, Dataset

ROOT = Path(__file__).parents[1]
CATEGORIES = [
    Category(1, "ground", False),
    Category(2, "sky", False),
    Category(3, "box", True),
    Category(4, "disc", True),
]

stage4 = importlib.import_module("04_train")
stage5 = importlib.import_module("05_eval")
RECIPE = dataclasses.replace(
    stage4.RECIPES["toycity"],
    steps=6,
    batch_size=2,
    crop=(64, 96),
    resize=(64, 64),
    test_size="64x96",
    encoder_multiplier=0.1,
    hidden_dim=32,
    queries=12,
    pixel_decoder_layers=1,
    decoder_layers=2,
    sample_points=512,
)


class Shapes(Dataset):
    """Eight images, 64 x 96. A box and a disc, two things, lie on ground and sky, two stuffs."""

    categories = CATEGORIES
    task = "panoptic"
    root = Path("shapes")

    def __len__(self):
        return 8

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        y, x = np.mgrid[:64, :96]
        segments = np.where(y > rng.integers(24, 40), 1, 2)
        top, left = rng.integers(4, 30), rng.integers(4, 30)
        segments[top : top + 24, left : left + 28] = 3
        disc_y, disc_x = rng.integers(20, 44), rng.integers(64, 80)
        segments[(y - disc_y) ** 2 + (x - disc_x) ** 2 < 14**2] = 4
        colours = rng.integers(0, 255, (5, 3))
        image = colours[segments] + rng.integers(-20, 20, (64, 96, 3))
        image = np.clip(image, 0, 255).astype(np.uint8)
        segments = torch.from_numpy(segments.astype(np.int32))
        return {
            "image": torch.from_numpy(image).permute(2, 0, 1),
            "segments": segments,
            "labels": torch.arange(4),
            "iscrowd": torch.zeros(4, dtype=torch.bool),
            "image_id": index,
            "name": str(index),
            "truth": {"mIoU": {"target": (segments - 1).byte()}},
        }


class Disturbed(Shapes):
    """Shapes that do something when an image is read for the n-th time."""

    def __init__(self, n, disturb):
        self.n = n
        self.disturb = disturb
        self.reads = 0

    def __getitem__(self, index):
        self.reads += 1
        if self.reads == self.n:
            self.disturb()
        return super().__getitem__(index)


def interrupt():
    raise KeyboardInterrupt


def training_for(recipe=RECIPE, **changes):
    training = {
        "benchmark": "shapes",
        "master": "tiny_vit",
        "auxiliary": "tiny_hiera",
        "stride": 8,
        "fusion": "replace",
        "master_mode": "finetuned",
        "aux_mode": "frozen",
        "seed": 0,
        "parts": 1,
        "weights": {},
        "weights_from": {},
        "train_images": 8,
        "class_names": [category.name for category in CATEGORIES],
        "isthing": [category.isthing for category in CATEGORIES],
        "recipe": dataclasses.asdict(recipe),
    }
    return {**training, **changes}


def build(training):
    torch.manual_seed(training["seed"])
    return build_model(training, {"tiny_vit": "none", "tiny_hiera": "none"})


def train(folder, recipe=RECIPE, samples=None, model=None, accumulate=1, save_every=2, **changes):
    training = training_for(recipe, parts=stage4.WORLD * accumulate, **changes)
    settings = stage4.Settings(
        device="cpu", workers=0, accumulate=accumulate, save_every=save_every
    )
    samples = samples or Shapes()
    model = model or build(training)
    checkpoint = stage4.load_checkpoint(folder, training)
    model.ended_by = stage4.train(model, samples, training, settings, folder, checkpoint)
    return model


def losses(folder) -> list[tuple]:
    """The step and the losses of each row of log.csv."""
    log = stage4.read_log(folder)
    columns = [log[name] for name in ("step", "loss", *LOSS_WEIGHTS)]
    return list(zip(*columns, strict=True))


def record_losses(model):
    """A list that fills with the losses of each micro-batch of a training."""
    recorded = []
    losses_of_model = model.losses

    def record(*batch):
        terms = losses_of_model(*batch)
        recorded.append({name: value.item() for name, value in terms.items()})
        return terms

    model.losses = record
    return recorded


def saved_step(folder) -> int:
    """The step of the checkpoint."""
    return torch.load(folder / "checkpoint.pt", weights_only=True)["step"]


def logged_step(folder) -> int:
    """The last step in log.csv, or 0 if there is none."""
    path = folder / "log.csv"
    last = ""
    if path.is_file():
        last = path.read_text().splitlines()[-1].partition(",")[0]
    return int(last) if last.isdecimal() else 0


# ------------------------------------------------------------------ data


def test_masks_stay_on_what_they_mark():
    """In images whose colour is the segment's, every mask of a crop covers just that colour."""
    sample = Shapes()[0]
    sample["image"] = (40 * sample["segments"]).byte()[None].repeat(3, 1, 1)
    recipe = dataclasses.replace(RECIPE, resize=(60, 160))
    seen = set()
    for seed in range(20):
        crop = stage4.augment(sample, recipe, np.random.default_rng(seed))
        assert crop["image"].shape == (3, 64, 96)
        assert crop["masks"].shape[1:] == (64, 96)
        assert crop["masks"].sum(0).max() == 1
        assert crop["masks"].flatten(1).any(1).all()
        for mask, label in zip(crop["masks"], crop["labels"].tolist(), strict=True):
            # This is the label, but for pixels that are mixed at borders.
            level = crop["image"][0][mask] * 255 / 40 - 1
            assert abs(level.median() - label) < 0.05
        seen |= set(crop["labels"].tolist())
    assert seen == {0, 1, 2, 3}


def test_augmentation_flips_half_and_scales_within_bounds():
    sample = Shapes()[0]
    # The brightness of a pixel is its column.
    sample["image"] = torch.arange(96, dtype=torch.uint8).expand(3, 64, 96).contiguous()
    flips = 0
    widths = []
    recipe = dataclasses.replace(RECIPE, resize=(64, 128), crop=(64, 64))
    for seed in range(60):
        row = stage4.augment(sample, recipe, np.random.default_rng(seed))["image"][0, 32] * 255
        flips += bool(row[0] > row[-1])
        widths.append(float((row[-1] - row[0]).abs()))
    assert 15 < flips < 45
    assert 28 < min(widths) < 36 and 56 < max(widths) < 66  # 64 pixels show 32 to 64 columns


def test_void_and_crowds_get_no_mask():
    sample = Shapes()[0]
    sample["iscrowd"][3] = True
    sample["segments"][sample["segments"] == 1] = 0
    crop = stage4.augment(sample, RECIPE, np.random.default_rng(0))
    assert crop["labels"].tolist() == [1, 2]


def test_an_image_smaller_than_the_crop_is_padded():
    recipe = dataclasses.replace(RECIPE, resize=(32, 32))
    crop = stage4.augment(Shapes()[0], recipe, np.random.default_rng(0))
    assert crop["image"].shape == (3, 64, 96)
    padded = torch.ones(64, 96, dtype=torch.bool)
    padded[:32, :48] = False
    grey = crop["image"] == PADDING
    assert grey[:, padded].all() and not grey[:, ~padded].all()
    assert not crop["masks"][:, padded].any()
    assert crop["masks"][:, ~padded].sum(0).eq(1).all()


def as_rles(sample):
    """The same sample as COCO's instances come: run-length codes in place of segments."""
    sample = dict(sample)
    segments = sample.pop("segments").numpy()
    sample["rles"] = []
    for number in range(1, len(sample["labels"]) + 1):
        sample["rles"].append(rle.encode(np.asfortranarray(segments == number, np.uint8)))
    return sample


@pytest.mark.parametrize("side, resize", [("short", (40, 200)), ("long", (10, 400))])
def test_run_length_codes_give_the_masks_of_segments(side, resize):
    sample = Shapes()[1]
    sample["iscrowd"][2] = True
    recipe = dataclasses.replace(RECIPE, resize=resize, resized_side=side)
    numbers = set()
    for seed in range(30):
        one = stage4.augment(sample, recipe, np.random.default_rng(seed))
        two = stage4.augment(as_rles(sample), recipe, np.random.default_rng(seed))
        assert torch.equal(one["labels"], two["labels"])
        assert torch.equal(one["masks"], two["masks"]) and two["masks"].dtype == torch.bool
        assert torch.equal(one["image"], two["image"])
        numbers.add(len(two["labels"]))
    assert 2 not in set(one["labels"].tolist())
    assert len(numbers) > 1  # some segments lie outside some crops


def test_overlapping_masks_stay_whole_and_none_is_fine():
    sample = as_rles(Shapes()[0])
    sample["rles"].append(sample["rles"][2])  # two things in one place
    sample["labels"] = torch.tensor([0, 1, 2, 3, 3])
    sample["iscrowd"] = torch.zeros(5, dtype=torch.bool)
    crop = stage4.augment(sample, RECIPE, np.random.default_rng(0))
    assert torch.equal(crop["masks"][2], crop["masks"][4]) and crop["masks"][2].any()

    empty = dict(sample, rles=[])
    empty["labels"] = torch.zeros(0, dtype=torch.int64)
    empty["iscrowd"] = torch.zeros(0, dtype=torch.bool)
    crop = stage4.augment(empty, RECIPE, np.random.default_rng(0))
    assert crop["masks"].shape == (0, 64, 96) and crop["labels"].shape == (0,)

    void = Shapes()[0]
    void["segments"] *= 0
    assert stage4.augment(void, RECIPE, np.random.default_rng(0))["masks"].shape == (0, 64, 96)


def test_large_scale_jitter_goes_by_the_long_side():
    """An image of 60 x 120 is scaled to 0.5 to 2 times a crop of 96 x 96, then padded."""
    recipe = dataclasses.replace(RECIPE, resize=(48, 192), resized_side="long", crop=(96, 96))
    sample = dict(Shapes()[0], image=torch.zeros(3, 60, 120, dtype=torch.uint8))
    sample["segments"] = torch.ones(60, 120, dtype=torch.int32)
    widths = []
    for seed in range(60):
        mask = stage4.augment(sample, recipe, np.random.default_rng(seed))["masks"][0]
        width = mask.any(0).sum().item()
        height = mask.any(1).sum().item()
        drawn = np.random.default_rng(seed).uniform(48, 192)
        assert abs(width - min(96, drawn)) <= 1
        assert abs(height - min(96, drawn / 2)) <= 1
        widths.append(width)
    assert min(widths) < 60 and widths.count(96) > 20


def test_colours_change_in_half_of_the_images_and_stay_colours():
    image = torch.rand(3, 32, 48, generator=torch.Generator().manual_seed(0))
    unchanged = 0
    for seed in range(80):
        changed = stage4.jitter_colours(image, np.random.default_rng(seed))
        assert changed.min() >= 0 and changed.max() <= 1 and changed.shape == image.shape
        assert torch.equal(changed, stage4.jitter_colours(image, np.random.default_rng(seed)))
        unchanged += torch.equal(changed, image)
    assert 1 <= unchanged <= 15  # each of four changes stays out half of the time

    jittered = dataclasses.replace(RECIPE, colour_jitter=True)
    for seed in range(5):
        one = stage4.augment(Shapes()[0], RECIPE, np.random.default_rng(seed))
        two = stage4.augment(Shapes()[0], jittered, np.random.default_rng(seed))
        assert torch.equal(one["masks"], two["masks"])


class RecordingRandom:
    """Random numbers, and what was drawn uniformly: (low, high, value) of each."""

    def __init__(self, seed):
        self.generator = np.random.default_rng(seed)
        self.random = self.generator.random
        self.drawn = []

    def uniform(self, low, high):
        value = self.generator.uniform(low, high)
        self.drawn.append((low, high, value))
        return value


def test_each_colour_change_falls_to_half_of_the_images_within_its_range(monkeypatch):
    """Contrast changes before the colours in half of the images, and after them in the others."""
    ranges = {
        "brightness": (-32, 32),
        "contrast": (0.5, 1.5),
        "saturation": (0.5, 1.5),
        "hue": (-0.1, 0.1),
    }
    adjust_saturation = stage4.TF.adjust_saturation
    saturations = []

    def record_saturation(image, factor):
        saturations.append(factor)
        return adjust_saturation(image, factor)

    monkeypatch.setattr(stage4.TF, "adjust_saturation", record_saturation)
    effects = {
        "brightness": lambda image, value: (image + value / 255).clamp(0, 1),
        "contrast": lambda image, value: (image * value).clamp(0, 1),
        "saturation": adjust_saturation,
        "hue": stage4.TF.adjust_hue,
    }
    image = torch.rand(3, 8, 12, generator=torch.Generator().manual_seed(0))
    values = {name: [] for name in ranges}
    orders = set()
    contrast_first = []
    for seed in range(400):
        random = RecordingRandom(seed)
        changed = stage4.jitter_colours(image, random)
        expected = image
        order = []
        for low, high, value in random.drawn:
            names = [name for name, bounds in ranges.items() if bounds == (low, high)]
            # Contrast and saturation have the same range.
            name = names[0]
            if value in saturations:
                name = "saturation"
            assert name in names
            values[name].append(value)
            order.append(name)
            expected = effects[name](expected, value)
        assert torch.equal(changed, expected)
        orders.add(tuple(order))
        if "contrast" in order and "saturation" in order:
            contrast_first.append(order.index("contrast") < order.index("saturation"))

    for name, (low, high) in ranges.items():
        assert 160 <= len(values[name]) <= 240, name
        near = 0.05 * (high - low)
        assert low <= min(values[name]) < low + near, name
        assert high - near < max(values[name]) <= high, name
    assert 0.35 < np.mean(contrast_first) < 0.65
    longest = {order for order in orders if len(order) == 4}
    assert longest == {
        ("brightness", "contrast", "saturation", "hue"),
        ("brightness", "saturation", "hue", "contrast"),
    }


def test_the_stream_depends_on_the_seed_alone(data):
    recipe = dataclasses.replace(stage4.RECIPES["toycity"], steps=4, batch_size=4)
    crops = stage4.TrainCrops(open_split("toycity", data, "train"), recipe, seed=3)
    alone = DataLoader(crops, 4, sampler=range(16), num_workers=0, collate_fn=list)
    workers = DataLoader(crops, 4, sampler=range(16), num_workers=2, collate_fn=list)
    for batch, again in zip(alone, workers, strict=True):
        for a, b in zip(batch, again, strict=True):
            assert torch.equal(a["image"], b["image"]) and torch.equal(a["masks"], b["masks"])
        names = {crop["name"] for crop in batch}
        assert len(names) == 4 and all(name.startswith("leftImg8bit/") for name in names)
    other = stage4.TrainCrops(crops.samples, recipe, seed=4)
    assert not torch.equal(crops[0]["image"], other[0]["image"])


def test_an_epoch_sees_every_image_once():
    class Names(Dataset):
        def __len__(self):
            return 5

        def __getitem__(self, index):
            seen.append(int(index))
            return Shapes()[int(index)]

    seen = []
    crops = stage4.TrainCrops(Names(), RECIPE, seed=0)
    for n in range(15):
        crops[n]
    epochs = [seen[0:5], seen[5:10], seen[10:15]]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1


@pytest.mark.parametrize("world, accumulate", [(1, 1), (1, 4), (2, 2), (4, 1)])
def test_the_processes_share_each_batch_in_order(monkeypatch, world, accumulate):
    recipe = dataclasses.replace(RECIPE, steps=3, batch_size=8)
    monkeypatch.setattr(stage4, "WORLD", world)
    of_step = {step: [] for step in range(1, 3)}
    for rank in range(world):
        monkeypatch.setattr(stage4, "RANK", rank)
        parts = list(stage4.crop_numbers(recipe, 1, accumulate))
        assert len(parts) == 2 * accumulate
        for number, part in enumerate(parts):
            assert len(part) == 8 // (world * accumulate)
            of_step[1 + number // accumulate] += part
    assert of_step == {1: list(range(8, 16)), 2: list(range(16, 24))}


# ------------------------------------------------------------------ recipes


def test_every_benchmark_has_a_recipe_of_full_size():
    assert set(stage4.RECIPES) == {name for name in BENCHMARKS if not name.startswith("own_")}
    for name, recipe in stage4.RECIPES.items():
        assert all(side % 32 == 0 for side in recipe.crop) and len(recipe.crop) == 2, name
        working_size(375, 1242, recipe.test_size)
        if name == "toycity":
            continue
        assert (recipe.learning_rate, recipe.sample_points) == (1e-4, 12544)
        assert recipe.decoder_layers == 9
        assert recipe.queries == (200 if name.startswith("coco") else 100)


def test_learning_rates_fall_by_a_power_or_at_milestones():
    poly = stage4.RECIPES["cityscapes_instance"]
    assert stage4.schedule(0, poly) == 1
    assert stage4.schedule(45_000, poly) == pytest.approx(0.75)
    slower = dataclasses.replace(poly, steps=90_000, poly_power=0.9)
    assert stage4.schedule(45_000, slower) == pytest.approx(0.5**0.9)
    factors = {0: 1, 327_777: 1, 327_778: 0.1, 355_091: 0.1, 355_092: 0.01, 368_749: 0.01}
    for step, factor in factors.items():
        assert stage4.schedule(step, stage4.RECIPES["coco_panoptic"]) == pytest.approx(factor)


def choose_recipe(monkeypatch, name, *flags):
    monkeypatch.setattr(sys, "argv", ["04_train.py", *flags])
    settings, changes = run.parse("", stage4.Settings, stage4.Recipe)
    return stage4.choose_recipe(stage4.RECIPES[name], settings, changes)


@pytest.mark.parametrize(
    "name, release, mask2former",
    [
        ("cityscapes_instance", (3, 180_000, 1.0), (16, 90_000, 0.9)),
        ("synthia_to_cityscapes_instance", (3, 180_000, 1.0), (16, 90_000, 0.9)),
        ("kitti360_instance", (3, 180_000, 1.0), (16, 90_000, 0.9)),
        ("coco_instance", (3, 368_750, 1.0), (16, 368_750, 1.0)),
        ("ade20k_semantic", (16, 160_000, 0.9), (16, 160_000, 0.9)),
    ],
)
def test_two_recipes(monkeypatch, name, release, mask2former):
    for flags, expected in [((), release), (("--recipe", "mask2former"), mask2former)]:
        recipe = choose_recipe(monkeypatch, name, *flags)
        assert (recipe.batch_size, recipe.steps, recipe.poly_power) == expected
        assert recipe.milestones == ((327_778, 355_092) if name.startswith("coco") else ())


def test_the_long_side_is_limited():
    recipe = dataclasses.replace(
        RECIPE, crop=(64, 96), resize=(413, 752), longest=1504, resized_side="short"
    )
    sample = {
        "image": torch.zeros(3, 376, 1408, dtype=torch.uint8),
        "segments": torch.zeros(376, 1408, dtype=torch.int32),
        "labels": torch.zeros(0, dtype=torch.int64),
        "iscrowd": torch.zeros(0, dtype=torch.bool),
        "name": "x",
    }
    # At 1504 of 1408 pixels a crop of 96 holds some 90 of these columns.
    sample["image"][:, :, ::2] = 255
    image = stage4.augment(sample, recipe, np.random.default_rng(0))["image"]
    changes = (image[0, 32].diff().sign().diff() != 0).sum().item()
    assert 80 < changes < 100


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--crop", "100x64"], "multiples of 32"),
        (["--crop", "64"], "multiples of 32"),
        (["--crop", "0x64"], "multiples of 32"),
        (["--crop", "64x64x64"], "multiples of 32"),
        (["--steps", "-1"], "not be negative"),
        (["--learning-rate", "0"], "nothing is learned"),
        (["--encoder-multiplier", "0"], "nothing is learned"),
        (["--max-grad-norm", "0"], "nothing is learned"),
        (["--resize", "200", "100"], "smaller one first"),
        (["--resize", "0", "100"], "smaller one first"),
        (["--hidden-dim", "50"], "multiple of 32"),
        (["--hidden-dim", "32", "--heads", "3"], "of --heads, 3"),
        (["--test-size", "tiny"], "expected HEIGHTxWIDTH"),
        (["--batch-size", "3", "--accumulate", "2"], "--batch-size 3 cannot be shared evenly"),
    ],
)
def test_flags_that_cannot_be(monkeypatch, flags, message):
    with pytest.raises(UserError, match=message):
        choose_recipe(monkeypatch, "toycity", *flags)


@pytest.mark.parametrize(
    "flags",
    [
        ["--learning-rate", "-1"],
        ["--learning-rate", "inf"],
        ["--encoder-multiplier", "-1"],
        ["--max-grad-norm", "nan"],
        ["--poly-power", "nan"],
        ["--poly-power", "-1"],
        ["--weight-decay", "-1"],
        ["--level-channels", "0", "8", "8", "8"],
        ["--batch-size", "0"],
        ["--accumulate", "0"],
        ["--save-every", "0"],
    ],
)
def test_flags_that_are_no_such_number(monkeypatch, capsys, flags):
    with pytest.raises(SystemExit) as ended:
        choose_recipe(monkeypatch, "toycity", *flags)
    assert ended.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"error: argument {flags[0]}: " in last and repr(flags[1]) in last


def test_flags_change_the_recipe_and_the_milestones_move_along(monkeypatch):
    flags = ["--steps", "1000", "--batch-size", "8", "--learning-rate", "2e-4"]
    flags += ["--crop", "512x640", "--accumulate", "4"]
    expected = dataclasses.replace(
        stage4.RECIPES["coco_instance"],
        steps=1000,
        batch_size=8,
        learning_rate=2e-4,
        crop=(512, 640),
        milestones=(889, 963),
    )
    assert choose_recipe(monkeypatch, "coco_instance", *flags) == expected
    recipe = choose_recipe(monkeypatch, "coco_instance", *flags, "--milestones", "7")
    assert recipe.milestones == (7,)
    # With --steps 0 the recipe is only described.
    assert choose_recipe(monkeypatch, "toycity", "--steps", "0") == stage4.RECIPES["toycity"]


def test_every_field_of_a_recipe_is_a_flag(monkeypatch):
    wanted = stage4.RECIPES["coco_panoptic"]
    flags = []
    for name, value in dataclasses.asdict(wanted).items():
        flag = "--" + name.replace("_", "-")
        if name == "colour_jitter":
            flags.append("--no-colour-jitter")
        elif name == "crop":
            flags += [flag, "x".join(map(str, value))]
        elif isinstance(value, tuple):
            flags += [flag, *map(str, value)]
        else:
            flags += [flag, str(value)]
    assert choose_recipe(monkeypatch, "toycity", *flags) == wanted


# ------------------------------------------------------------------ training


def test_encoders_learn_at_a_tenth_and_norms_do_not_decay():
    model = build(training_for())
    optimiser = stage4.make_optimiser(model, RECIPE)
    group_of = {}
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            group_of[id(parameter)] = group
    groups = {}  # by the parameter's name
    for name, parameter in model.named_parameters():
        assert (id(parameter) in group_of) == parameter.requires_grad, name
        groups[name] = group_of.get(id(parameter))

    qkv = groups["pyramid.master.model.blocks.0.attn.qkv.weight"]
    assert qkv["initial_lr"] == pytest.approx(RECIPE.learning_rate / 10)
    assert groups["pyramid.projections.4.weight"]["initial_lr"] == RECIPE.learning_rate
    assert groups["class_predictor.weight"]["weight_decay"] == RECIPE.weight_decay
    for name in (
        "pyramid.master.model.norm.weight",
        "pixel_decoder.level_embed",
        "transformer.queries_embedder.weight",
    ):
        assert groups[name]["weight_decay"] == 0


def test_interrupted_and_resumed_equals_uninterrupted_to_the_last_bit(tmp_path):
    whole = train(tmp_path / "whole")
    # The tenth image is one of the fifth step. The last checkpoint is after the fourth.
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", samples=Disturbed(10, interrupt))
    assert saved_step(tmp_path / "parts") == 4
    resumed = train(tmp_path / "parts")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert len(losses(tmp_path / "whole")) == 6
    files = sorted(path.name for path in (tmp_path / "parts").iterdir())
    assert files == ["checkpoint.pt", "log.csv"]


def test_a_training_goes_on_with_another_save_every(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", samples=Disturbed(10, interrupt))
    assert saved_step(tmp_path / "parts") == 4
    # Now a checkpoint is due after the fifth step only, and none after the fourth.
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", samples=Disturbed(3, interrupt), save_every=5)
    assert saved_step(tmp_path / "parts") == 5
    train(tmp_path / "parts", save_every=4)
    assert saved_step(tmp_path / "parts") == 6
    train(tmp_path / "whole", save_every=3)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


def test_a_training_does_not_go_on_in_another_number_of_parts(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, samples=Disturbed(10, interrupt))
    before = (tmp_path / "log.csv").read_bytes()
    refused = r"checkpoint\.pt was made with other settings \(parts\): give another --out"
    with pytest.raises(UserError, match=refused):
        train(tmp_path, accumulate=2)
    assert saved_step(tmp_path) == 4
    assert (tmp_path / "log.csv").read_bytes() == before


def test_steps_after_the_checkpoint_are_logged_once(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", samples=Disturbed(12, interrupt))
    path = tmp_path / "parts/log.csv"
    rows = path.read_text().splitlines()
    assert len(rows) == 1 + 5 and saved_step(tmp_path / "parts") == 4
    # Whatever the fifth step's row holds, and a row that was half-written, must not stay.
    rows[5] = "5," + ",".join(["9"] * (len(stage4.LOG_COLUMNS) - 1))
    path.write_text("\n".join([*rows, "6,1"]))
    ended_by = train(tmp_path / "parts").ended_by
    train(tmp_path / "whole")
    assert ended_by is None and len(path.read_text().splitlines()) == 1 + 6
    assert stage4.read_log(tmp_path / "parts")["step"].tolist() == [1, 2, 3, 4, 5, 6]
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_steps_keep_their_numbers_without_the_log_of_those_before(tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", samples=Disturbed(10, interrupt))
    (tmp_path / "parts/log.csv").unlink()
    train(tmp_path / "parts")
    assert stage4.read_log(tmp_path / "parts")["step"].tolist() == [5, 6]
    train(tmp_path / "whole")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")[4:]
    capsys.readouterr()
    stage4.report(tmp_path / "parts")
    table = capsys.readouterr().out.strip().splitlines()
    assert [row.split()[1] for row in table[2:4]] == ["5-5", "6-6"]


@pytest.mark.filterwarnings("ignore:loadtxt. input contained no data:UserWarning")
@pytest.mark.parametrize("content", [None, "", "step,loss\n1,2\n", "this is\nno log\n"])
def test_a_log_that_is_gone_or_damaged_is_told(tmp_path, content):
    if content is not None:
        (tmp_path / "log.csv").write_text(content)
    with pytest.raises(UserError, match="log.csv is gone or damaged"):
        stage4.read_log(tmp_path)


def test_a_training_that_begins_anew_begins_its_log_anew(tmp_path):
    train(tmp_path)
    (tmp_path / "checkpoint.pt").unlink()
    train(tmp_path, dataclasses.replace(RECIPE, steps=2))
    assert len(losses(tmp_path)) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_training_after_the_step_with_a_checkpoint(tmp_path, number):
    # The fifth image is one of the third step.
    samples = Disturbed(5, lambda: os.kill(os.getpid(), number))
    before = signal.getsignal(number)
    assert train(tmp_path, samples=samples).ended_by == number
    assert signal.getsignal(number) is before
    assert saved_step(tmp_path) == 3
    assert train(tmp_path).ended_by is None
    train(tmp_path / "whole")
    assert losses(tmp_path) == losses(tmp_path / "whole")


def test_a_signal_in_the_last_step_comes_too_late(tmp_path):
    samples = Disturbed(12, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert train(tmp_path, samples=samples).ended_by is None
    assert saved_step(tmp_path) == 6


@pytest.mark.slow
def test_killed_for_real_and_started_again_to_the_last_bit(data, tmp_path, stage):
    """SIGKILL at random moments, while steps run and checkpoints are written.

    The same command then goes on.
    """
    folder = tmp_path / "run"
    stage("01_extract", "--run", folder, "--data", data, "--limit", 2, "--size", "64x128")
    stage("02_metrics", "--run", folder)
    stage("03_select", "--run", folder, "--stride", 8)
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    flags = ["--steps", "24", "--batch-size", "2", "--save-every", "2"]
    flags += ["--crop", "64x96", "--resize", "64", "96"]

    def start(out):
        command = [sys.executable, ROOT / "04_train.py", "--run", folder, "--out", tmp_path / out]
        return subprocess.Popen([*command, *flags], env=environment, stderr=subprocess.DEVNULL)

    assert start("whole").wait() == 0
    delays = np.random.default_rng()
    killed = tmp_path / "killed"
    kills = 0
    for _ in range(3):
        before = saved_step(killed) if (killed / "checkpoint.pt").exists() else 0
        process = start("killed")
        # The log ends at the checkpoint until this process has done a step of its own.
        began_anew = False
        while process.poll() is None and not (began_anew and logged_step(killed) > before):
            began_anew = began_anew or logged_step(killed) == before
            time.sleep(0.02)
        time.sleep(delays.uniform(0, 0.5))
        process.kill()
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 2
    assert start("killed").wait() == 0
    assert losses(killed) == losses(tmp_path / "whole")
    assert len(losses(killed)) == 24
    whole_model = torch.load(tmp_path / "whole/checkpoint.pt", weights_only=True)["model"]
    killed_model = torch.load(killed / "checkpoint.pt", weights_only=True)["model"]
    assert all(torch.equal(value, killed_model[name]) for name, value in whole_model.items())
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_batch_in_micro_batches_is_nearly_the_batch(tmp_path):
    """The same images, learning rates and averages.

    Only the points that the loss samples differ, as each image has four segments, two of them
    things.
    """
    recipe = dataclasses.replace(RECIPE, batch_size=4, steps=3, sample_points=4096)
    train(tmp_path / "one", recipe)
    train(tmp_path / "four", recipe, accumulate=4)
    for one, four in zip(losses(tmp_path / "one"), losses(tmp_path / "four"), strict=True):
        assert one == pytest.approx(four, rel=0.05)


def test_bfloat16_follows_float32():
    """On a CPU, whose autocast leaves other operations in float32 than a GPU's."""
    model = build(training_for()).train()
    sample = stage4.augment(Shapes()[0], RECIPE, np.random.default_rng(0))
    found = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            outputs = model(sample["image"][None])
        terms = model.losses(outputs, [sample["masks"].float()], [sample["labels"]])
        assert all(value.dtype == torch.float32 for value in terms.values())
        sum(terms.values()).backward()
        found.append({name: value.item() for name, value in terms.items()})
    assert outputs[0][1].dtype == torch.bfloat16  # the masks were made in it
    assert found[0] == pytest.approx(found[1], rel=0.05) and found[0] != found[1]
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_a_damaged_checkpoint_is_named_and_nothing_begun_anew(tmp_path):
    train(tmp_path)
    path = tmp_path / "checkpoint.pt"
    refused = r"checkpoint.pt cannot be read \(.*\): move it away to start anew"
    for content in (path.read_bytes()[:1000], b""):
        path.write_bytes(content)
        with pytest.raises(UserError, match=refused):
            train(tmp_path)
        assert path.read_bytes() == content


def test_other_settings_are_refused_by_name(tmp_path):
    train(tmp_path)
    other = r"checkpoint\.pt was made with other settings \({}\): give another --out, or delete it"
    with pytest.raises(UserError, match=other.format("stride")):
        train(tmp_path, stride=16)
    with pytest.raises(UserError, match=other.format(r"recipe\.steps")):
        train(tmp_path, dataclasses.replace(RECIPE, steps=8))
    with pytest.raises(UserError, match=other.format(r"seed, recipe\.steps")):
        train(tmp_path, dataclasses.replace(RECIPE, steps=8), seed=1)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_logits_that_are_not_finite_stop_training_before_anything_is_saved(tmp_path, accumulate):
    model = build(training_for())
    with torch.no_grad():
        model.class_predictor.weight.fill_(torch.nan)
    names = r"\d, \d" if accumulate == 1 else r"\d"
    told = f"in step 1.* images {names}: the logits of decoder layer 0 are not finite"
    with pytest.raises(UserError, match=told):
        train(tmp_path, model=model, accumulate=accumulate)
    assert not (tmp_path / "checkpoint.pt").exists()


@pytest.mark.parametrize("term", ["the mask loss is", "the gradient is"])
def test_what_is_not_finite_stops_training_and_the_last_checkpoint_stays(
    tmp_path, monkeypatch, term
):
    """In the fourth step something is NaN. Without it, the same command goes on from the second."""
    model = build(training_for())
    criterion = model.criterion.forward
    calls = []

    def is_spoilt():
        return len(calls) > 9  # there are three predictions a step

    def spoil_loss(*arguments):
        terms = criterion(*arguments)
        calls.append(len(arguments))
        if "mask" in term and is_spoilt():
            terms["loss_mask"] = terms["loss_mask"] * torch.nan
        return terms

    def spoil_gradient(gradient):
        return gradient * torch.nan if is_spoilt() else gradient

    monkeypatch.setattr(model.criterion, "forward", spoil_loss)
    if "gradient" in term:
        model.class_predictor.weight.register_hook(spoil_gradient)
    told = rf"in step 4.* images \d, \d: {term} .*nan|{term} not finite"
    with pytest.raises(UserError, match=told):
        train(tmp_path, model=model)
    assert saved_step(tmp_path) == 2
    assert len(losses(tmp_path)) == 3
    train(tmp_path)
    train(tmp_path / "whole")
    assert losses(tmp_path) == losses(tmp_path / "whole")


def test_a_checkpoint_gives_the_same_predictions(tmp_path):
    model = train(tmp_path).eval()
    loaded, training = stage5.load_trained(tmp_path)
    assert training["stride"] == 8
    image = Shapes()[0]["image"]
    before = stage5.predict(model, image, "64x96", "cpu")
    after = stage5.predict(loaded.eval(), image, "64x96", "cpu")
    assert torch.equal(before.class_probabilities, after.class_probabilities)
    assert torch.equal(before.masks, after.masks)


def test_eight_images_can_be_overfitted(tmp_path):
    recipe = dataclasses.replace(
        RECIPE,
        steps=160,
        batch_size=4,
        learning_rate=2 * RECIPE.learning_rate,
        encoder_multiplier=1.0,
    )
    samples = Shapes()
    model = train(tmp_path, recipe, samples, save_every=300).eval()
    score = stage5.SemanticScore([category.name for category in samples.categories])
    for index in range(8):
        sample = samples[index]
        prediction = stage5.predict(model, sample["image"], "64x96", "cpu")
        score.update(stage5.semantic(prediction), **sample["truth"]["mIoU"])
    assert score.result()["mIoU"] > 95
