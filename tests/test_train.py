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
from common.datasets import BENCHMARKS, open_split
from common.model import LOSS_WEIGHTS, PADDING, build_model
from common.run import UserError

import numpy as np
import pytest
import torch
from pycocotools import mask as rle
from torch.utils.data import DataLoader, Dataset

ROOT = Path(__file__).parents[1]

stage4, stage5 = importlib.import_module("04_train"), importlib.import_module("05_eval")
SMALL = {"width": 32, "queries": 12, "encoder_layers": 1, "decoder_layers": 2, "points": 512, "save_every": 2}
RECIPE = stage4.Recipe(6, 2, (64, 96), (64, 64), test_size="64x96", **stage4.TINY | SMALL)


class Shapes(Dataset):
    """Eight pictures, 64 x 96: a coloured rectangle and a grey disc, two things, on ground and sky, two stuffs."""

    categories = [(1, "ground", False), (2, "sky", False), (3, "box", True), (4, "disc", True)]
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
        cy, cx = rng.integers(20, 44), rng.integers(64, 80)
        segments[(y - cy) ** 2 + (x - cx) ** 2 < 14**2] = 4
        colours = rng.integers(0, 255, (5, 3))
        image = np.clip(colours[segments] + rng.integers(-20, 20, (64, 96, 3)), 0, 255).astype(np.uint8)
        segments = torch.from_numpy(segments.astype(np.int32))
        return {
            "image": torch.from_numpy(image).permute(2, 0, 1),
            "segments": segments,
            "labels": torch.arange(4),
            "crowd": torch.zeros(4, dtype=torch.bool),
            "image_id": index,
            "name": str(index),
            "truth": {"semantic": ((segments - 1).byte(),)},
        }


def training_for(recipe=RECIPE, **changes):
    about = {"benchmark": "shapes", "master": "tiny_vit", "auxiliary": "tiny_hiera", "stride": 8, "fusion": "replace"}
    about |= {"master_mode": "ft", "aux_mode": "fz", "seed": 0, "weights": {}, "weights_from": {}, "train_images": 8}
    about |= {"class_names": ["ground", "sky", "box", "disc"], "isthing": [False, False, True, True]}
    return stage4.Training(**about | changes, recipe=recipe)


def build(training):
    torch.manual_seed(training.seed)
    return build_model(dataclasses.asdict(training), {"tiny_vit": "none", "tiny_hiera": "none"})


def train(folder, recipe=RECIPE, samples=None, accumulate=1, model=None, **changes):
    training = training_for(recipe, **changes)
    settings = stage4.Settings(device="cpu", workers=0, accumulate=accumulate)
    model = model or build(training)
    checkpoint = stage4.load_checkpoint(folder, training)
    model.ended_by = stage4.train(model, samples or Shapes(), training, settings, folder, checkpoint)
    return model


def losses(folder) -> list[tuple]:
    log = stage4.read_log(folder)
    return list(zip(log["step"], log["loss"], *(log[name] for name in LOSS_WEIGHTS), strict=True))


# ---------------------------------------------------------------------------------------------- data


def test_masks_stay_on_what_they_mark():
    """In pictures whose colour is the segment's, every mask of a crop covers just that colour."""
    sample = Shapes()[0]
    sample["image"] = (40 * sample["segments"]).byte()[None].repeat(3, 1, 1)
    recipe = dataclasses.replace(RECIPE, resize=(60, 160))
    seen = set()
    for seed in range(20):
        crop = stage4.augment(sample, recipe, np.random.default_rng(seed))
        assert crop["image"].shape == (3, 64, 96) and crop["masks"].shape[1:] == (64, 96)
        assert crop["masks"].sum(0).max() == 1 and crop["masks"].flatten(1).any(1).all()
        for mask, label in zip(crop["masks"], crop["labels"].tolist(), strict=True):
            level = crop["image"][0][mask] * 255 / 40 - 1  # the label, but for pixels mixed at borders
            assert abs(level.median() - label) < 0.05
        seen |= set(crop["labels"].tolist())
    assert seen == {0, 1, 2, 3}


def test_augmentation_flips_half_and_scales_within_bounds():
    sample = Shapes()[0]
    sample["image"] = torch.arange(96, dtype=torch.uint8).expand(3, 64, 96).contiguous()  # brightness is the column
    flips, widths = 0, []
    recipe = dataclasses.replace(RECIPE, resize=(64, 128), crop=(64, 64))
    for seed in range(60):
        row = stage4.augment(sample, recipe, np.random.default_rng(seed))["image"][0, 32] * 255
        flips += bool(row[0] > row[-1])
        widths.append(float((row[-1] - row[0]).abs()))
    assert 15 < flips < 45
    assert 28 < min(widths) < 36 and 56 < max(widths) < 66  # 64 pixels show 32 to 64 columns


def test_void_and_crowds_get_no_mask():
    sample = Shapes()[0]
    sample["crowd"][3] = True
    sample["segments"][sample["segments"] == 1] = 0
    crop = stage4.augment(sample, RECIPE, np.random.default_rng(0))
    assert crop["labels"].tolist() == [1, 2]


def test_a_picture_smaller_than_the_crop_is_padded():
    recipe = dataclasses.replace(RECIPE, resize=(32, 32))
    crop = stage4.augment(Shapes()[0], recipe, np.random.default_rng(0))
    assert crop["image"].shape == (3, 64, 96)
    padded = torch.ones(64, 96, dtype=torch.bool)
    padded[:32, :48] = False
    assert (crop["image"][:, padded] == PADDING).all() and not (crop["image"] == PADDING)[:, ~padded].all()
    assert not crop["masks"][:, padded].any() and crop["masks"][:, ~padded].sum(0).eq(1).all()


def as_rles(sample):
    """The same sample as COCO's instances come: a list of run-length codes in place of segments."""
    masks = [(sample["segments"] == i + 1).numpy().astype(np.uint8) for i in range(len(sample["labels"]))]
    codes = [rle.encode(np.asfortranarray(mask)) for mask in masks]
    return {key: value for key, value in sample.items() if key != "segments"} | {"rles": codes}


@pytest.mark.parametrize("side, resize", [("short", (40, 200)), ("long", (10, 400))])
def test_run_length_codes_give_the_masks_of_segments(side, resize):
    sample = Shapes()[1]
    sample["crowd"][2] = True
    recipe = dataclasses.replace(RECIPE, resize=resize, resized_side=side)
    numbers = set()
    for seed in range(30):
        one, two = (stage4.augment(s, recipe, np.random.default_rng(seed)) for s in (sample, as_rles(sample)))
        assert torch.equal(one["labels"], two["labels"]) and torch.equal(one["masks"], two["masks"])
        assert torch.equal(one["image"], two["image"]) and two["masks"].dtype == torch.bool
        numbers.add(len(two["labels"]))
    assert 2 not in set(one["labels"].tolist()) and len(numbers) > 1  # some segments lie outside some crops


def test_overlapping_masks_stay_whole_and_none_is_fine():
    sample = as_rles(Shapes()[0])
    sample["rles"] += [sample["rles"][2]]  # two things in one place
    sample["labels"], sample["crowd"] = torch.tensor([0, 1, 2, 3, 3]), torch.zeros(5, dtype=torch.bool)
    crop = stage4.augment(sample, RECIPE, np.random.default_rng(0))
    assert torch.equal(crop["masks"][2], crop["masks"][4]) and crop["masks"][2].any()
    empty = sample | {"rles": [], "labels": torch.zeros(0, dtype=torch.int64), "crowd": torch.zeros(0).bool()}
    crop = stage4.augment(empty, RECIPE, np.random.default_rng(0))
    assert crop["masks"].shape == (0, 64, 96) and crop["labels"].shape == (0,)
    void = Shapes()[0]
    void["segments"] *= 0
    assert stage4.augment(void, RECIPE, np.random.default_rng(0))["masks"].shape == (0, 64, 96)


def test_large_scale_jitter_goes_by_the_long_side():
    """A picture of 60 x 120 at 0.5 to 2 times a crop of 96 x 96: what is not padded is as wide as drawn."""
    recipe = dataclasses.replace(RECIPE, resize=(48, 192), resized_side="long", crop=(96, 96))
    sample = Shapes()[0] | {"image": torch.zeros(3, 60, 120, dtype=torch.uint8)}
    sample["segments"] = torch.ones(60, 120, dtype=torch.int32)
    widths = []
    for seed in range(60):
        mask = stage4.augment(sample, recipe, np.random.default_rng(seed))["masks"][0]
        width, height = mask.any(0).sum().item(), mask.any(1).sum().item()
        drawn = np.random.default_rng(seed).uniform(48, 192)
        assert abs(width - min(96, drawn)) <= 1 and abs(height - min(96, drawn / 2)) <= 1
        widths.append(width)
    assert min(widths) < 60 and widths.count(96) > 20


def test_colours_change_in_half_of_the_images_and_stay_colours():
    image = torch.rand(3, 32, 48, generator=torch.Generator().manual_seed(0))
    changed = [stage4.jitter_colours(image, np.random.default_rng(seed)) for seed in range(80)]
    assert all(c.min() >= 0 and c.max() <= 1 and c.shape == image.shape for c in changed)
    assert 1 <= sum(torch.equal(c, image) for c in changed) <= 15  # each of four changes stays out half of the time
    assert torch.equal(changed[3], stage4.jitter_colours(image, np.random.default_rng(3)))
    jittered = dataclasses.replace(RECIPE, colour_jitter=True)
    for seed in range(5):
        one, two = (stage4.augment(Shapes()[0], r, np.random.default_rng(seed)) for r in (RECIPE, jittered))
        assert torch.equal(one["masks"], two["masks"])


def test_the_stream_depends_on_the_seed_alone(data):
    recipe = dataclasses.replace(stage4.RECIPES["toycity"], steps=4, batch=4)
    crops = stage4.TrainCrops(open_split("toycity", data, "train"), recipe, seed=3)
    one, two = (list(DataLoader(crops, 4, sampler=range(16), num_workers=n, collate_fn=list)) for n in (0, 2))
    for batch, again in zip(one, two, strict=True):
        for a, b in zip(batch, again, strict=True):
            assert torch.equal(a["image"], b["image"]) and torch.equal(a["masks"], b["masks"])
        names = {crop["name"] for crop in batch}
        assert len(names) == 4 and all(name.startswith("leftImg8bit/") for name in names)
    other = stage4.TrainCrops(crops.samples, recipe, seed=4)
    assert not torch.equal(crops[0]["image"], other[0]["image"])


def test_an_epoch_sees_every_picture_once():
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
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs) and len(set(map(tuple, epochs))) > 1


# ---------------------------------------------------------------------------------------------- recipes


def test_every_benchmark_has_a_recipe_of_full_size():
    assert set(stage4.RECIPES) == {name for name in BENCHMARKS if not name.startswith("own_")}
    for name, recipe in stage4.RECIPES.items():
        assert all(side % 32 == 0 for side in recipe.crop) and len(recipe.crop) == 2, name
        stage5.working_size(375, 1242, recipe.test_size)
        if name != "toycity":
            assert (recipe.learning_rate, recipe.points, recipe.decoder_layers) == (1e-4, 12544, 9)
            assert recipe.queries == (200 if name.startswith("coco") else 100)


def test_rates_fall_by_a_power_or_in_drops():
    poly, drops = stage4.RECIPES["cityscapes_instance"], stage4.RECIPES["coco_panoptic"]
    assert stage4.schedule(0, poly) == 1 and stage4.schedule(45_000, poly) == pytest.approx(0.75)
    slower = dataclasses.replace(poly, steps=90_000, power=0.9)
    assert stage4.schedule(45_000, slower) == pytest.approx(0.5**0.9)
    steps = (0, 327_777, 327_778, 355_091, 355_092, 368_749)
    assert [stage4.schedule(step, drops) for step in steps] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def choose_recipe(monkeypatch, name, *flags):
    monkeypatch.setattr(sys, "argv", ["04_train.py", *flags])
    settings, changes = run.parse("", stage4.Settings, stage4.Recipe)
    return stage4.choose_recipe(stage4.RECIPES[name], changes, settings)


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
def test_schedules(monkeypatch, name, release, mask2former):
    for flags, expected in [((), release), (("--schedule", "mask2former"), mask2former)]:
        recipe = choose_recipe(monkeypatch, name, *flags)
        assert (recipe.batch, recipe.steps, recipe.power) == expected
        assert recipe.drops == ((327_778, 355_092) if name.startswith("coco") else ())


def test_the_long_side_is_limited():
    recipe = dataclasses.replace(RECIPE, crop=(64, 96), resize=(413, 752), longest=1504, resized_side="short")
    sample = {"image": torch.zeros(3, 376, 1408, dtype=torch.uint8), "labels": torch.zeros(0).long()}
    sample |= {"crowd": torch.zeros(0).bool(), "segments": torch.zeros(376, 1408, dtype=torch.int32), "name": "x"}
    sample["image"][:, :, ::2] = 255  # at 1504 of 1408 pixels a crop of 96 holds some 90 of them
    image = stage4.augment(sample, dataclasses.replace(recipe, colour_jitter=False), np.random.default_rng(0))["image"]
    changes = (image[0, 32].diff().sign().diff() != 0).sum().item()
    assert 80 < changes < 100


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--crop", "100x64"], "multiples of 32"),
        (["--crop", "64"], "multiples of 32"),
        (["--crop", "0x64"], "multiples of 32"),
        (["--steps", "-1"], "not be negative"),
        (["--learning-rate", "0"], "above 0"),
        (["--power", "nan"], "finite"),
        (["--power", "-1"], "not be below 0"),
        (["--vit-widths", "0", "8", "8", "8"], "above 0"),
        (["--weight-decay", "-1"], "not be below 0"),
        (["--resize", "200", "100"], "smaller one first"),
        (["--width", "50"], "multiple of 32"),
        (["--width", "32", "--heads", "3"], "of --heads, 3"),
        (["--test-size", "tiny"], "neither HEIGHTxWIDTH"),
        (["--batch", "3", "--accumulate", "2"], "--batch 3 cannot be shared evenly"),
    ],
)
def test_flags_that_cannot_be(monkeypatch, flags, message):
    with pytest.raises(UserError, match=message):
        choose_recipe(monkeypatch, "toycity", *flags)


def test_flags_change_the_recipe_and_the_drops_move_along(monkeypatch):
    flags = ["--steps", "1000", "--batch", "8", "--learning-rate", "2e-4", "--crop", "512x640", "--accumulate", "4"]
    recipe = choose_recipe(monkeypatch, "coco_instance", *flags)
    given = {"steps": 1000, "batch": 8, "learning_rate": 2e-4, "crop": (512, 640), "drops": (889, 963)}
    assert recipe == dataclasses.replace(stage4.RECIPES["coco_instance"], **given)
    assert choose_recipe(monkeypatch, "coco_instance", *flags, "--drops", "7").drops == (7,)
    assert choose_recipe(monkeypatch, "toycity", "--steps", "0") == stage4.RECIPES["toycity"]  # to be described


def test_every_field_of_a_recipe_is_a_flag(monkeypatch):
    wanted, flags = stage4.RECIPES["coco_panoptic"], []
    for name, value in dataclasses.asdict(wanted).items():
        words = "x".join(map(str, value)) if name == "crop" else value
        words = words if isinstance(words, tuple) else (words,)
        flags += ["--no-colour-jitter"] if name == "colour_jitter" else ["--" + name.replace("_", "-"), *words]
    assert choose_recipe(monkeypatch, "toycity", *map(str, flags)) == wanted


# ---------------------------------------------------------------------------------------------- training


def test_encoders_learn_at_a_tenth_and_norms_do_not_decay():
    model = build(training_for())
    optimiser = stage4.make_optimiser(model, RECIPE)
    names = {id(p): name for name, p in model.named_parameters()}
    where = {names[id(p)]: group for group in optimiser.param_groups for p in group["params"]}
    assert set(where) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert where["pyramid.master.model.blocks.0.attn.qkv.weight"]["rate"] == pytest.approx(RECIPE.learning_rate / 10)
    assert where["pyramid.projections.4.weight"]["rate"] == RECIPE.learning_rate
    assert where["class_predictor.weight"]["weight_decay"] == RECIPE.weight_decay
    for name in (
        "pyramid.master.model.norm.weight",
        "pixel_decoder.level_embed",
        "transformer.queries_embedder.weight",
    ):
        assert where[name]["weight_decay"] == 0


def test_interrupted_and_resumed_equals_uninterrupted_to_the_last_bit(tmp_path):
    class Interrupted(Shapes):
        reads = 0

        def __getitem__(self, index):
            self.reads += 1
            if self.reads == 10:  # in the fifth step; the last checkpoint is after the fourth
                raise KeyboardInterrupt
            return super().__getitem__(index)

    whole = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", samples=Interrupted())
    assert torch.load(tmp_path / "parts/checkpoint.pt", weights_only=True)["step"] == 4
    resumed = train(tmp_path / "parts")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts") and len(losses(tmp_path / "whole")) == 6
    assert sorted(p.name for p in (tmp_path / "parts").iterdir()) == ["checkpoint.pt", "log.csv"]


def test_a_step_done_twice_counts_by_its_last_row(tmp_path):
    whole = train(tmp_path)
    rows = (tmp_path / "log.csv").read_text().splitlines()
    again = ["5," + ",".join(["9"] * (len(stage4.LOG) - 1)), "6," + rows[-1].partition(",")[2]]
    (tmp_path / "log.csv").write_text("\n".join([*rows, *again, ""]))  # from step 5 on, once more
    log = stage4.read_log(tmp_path)
    assert whole.ended_by is None and log["step"].tolist() == [1, 2, 3, 4, 5, 6]
    assert log["loss"][4] == 9 and log["loss"][5] == float(rows[-1].split(",")[1])
    (tmp_path / "log.csv").unlink()
    with pytest.raises(UserError, match="log.csv is gone or damaged"):
        stage4.read_log(tmp_path)


def test_a_training_that_begins_anew_begins_its_log_anew(tmp_path):
    train(tmp_path)
    (tmp_path / "checkpoint.pt").unlink()
    train(tmp_path, dataclasses.replace(RECIPE, steps=2))
    assert len(losses(tmp_path)) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_training_after_the_step_with_a_checkpoint(tmp_path, number):
    class Signalled(Shapes):
        reads = 0

        def __getitem__(self, index):
            self.reads += 1
            if self.reads == 5:  # in the third step
                os.kill(os.getpid(), number)
            return super().__getitem__(index)

    before = signal.getsignal(number)
    assert train(tmp_path, samples=Signalled()).ended_by == number
    assert signal.getsignal(number) is before
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 3
    assert train(tmp_path).ended_by is None
    train(tmp_path / "whole")
    assert losses(tmp_path) == losses(tmp_path / "whole")


@pytest.mark.slow
def test_killed_for_real_and_started_again_to_the_last_bit(data, tmp_path, stage):
    """SIGKILL at random moments, while steps run and checkpoints are written; the same command then goes on."""
    few = ("--data", data, "--limit", 2, "--size", "64x128")
    for stage_, *flags in (("01_extract", *few), ("02_metrics",), ("03_select", "--stride", 8)):
        stage(stage_, "--run", tmp_path / "run", *flags)
    code = (
        "import dataclasses, importlib, sys; from common import run; stage = importlib.import_module('04_train'); "
        "stage.RECIPES['toycity'] = dataclasses.replace(stage.RECIPES['toycity'], batch=2, crop=(64, 96), "
        "resize=(64, 96), save_every=2); run.start(stage.main)"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def start(out):
        command = [sys.executable, "-c", code, "--run", tmp_path / "run", "--out", tmp_path / out, "--steps", "24"]
        return subprocess.Popen(list(map(str, command)), env=environment, stderr=subprocess.DEVNULL)

    assert start("whole").wait() == 0
    delays, kills = np.random.default_rng(), 0
    for _ in range(3):
        process, log = start("killed"), tmp_path / "killed/log.csv"
        before = log.read_bytes() if log.exists() else b""
        while process.poll() is None and (not log.exists() or log.read_bytes() == before or log.stat().st_size < 200):
            time.sleep(0.02)  # until it has done a step of its own
        time.sleep(delays.uniform(0, 0.5))
        process.kill()
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 2
    assert start("killed").wait() == 0
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 24
    whole, killed = (torch.load(tmp_path / out / "checkpoint.pt", weights_only=True) for out in ("whole", "killed"))
    assert all(torch.equal(value, killed["model"][name]) for name, value in whole["model"].items())
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_batch_in_micro_batches_is_nearly_the_batch(tmp_path):
    """The same pictures, rates and averages; only the points that the loss samples differ, as each picture has four
    segments, two of them things."""
    recipe = dataclasses.replace(RECIPE, batch=4, steps=3, points=4096)
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
    for content in (path.read_bytes()[:1000], b""):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"checkpoint.pt cannot be read \(.*\): move it away to start anew"):
            train(tmp_path)
        assert path.read_bytes() == content


def test_other_settings_are_refused_by_name(tmp_path):
    train(tmp_path)
    with pytest.raises(UserError, match="stride was 8, now 16"):
        train(tmp_path, stride=16)
    with pytest.raises(UserError, match=r'recipe was \{"steps": 6\}, now \{"steps": 8\}'):
        train(tmp_path, dataclasses.replace(RECIPE, steps=8))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_logits_that_are_not_finite_stop_training_before_anything_is_saved(tmp_path, accumulate):
    model = build(training_for())
    with torch.no_grad():
        model.class_predictor.weight.fill_(torch.nan)
    names = r"\d, \d" if accumulate == 1 else r"\d"
    with pytest.raises(UserError, match=f"in step 1.* images {names}: the logits of decoder layer 0 are not finite"):
        train(tmp_path, model=model, accumulate=accumulate)
    assert not (tmp_path / "checkpoint.pt").exists()


@pytest.mark.parametrize("term", ["the mask loss is", "the gradient is"])
def test_what_is_not_finite_stops_training_and_the_last_checkpoint_stays(tmp_path, monkeypatch, term):
    """In the fourth step something turns to NaN; the same command without it then goes on from the second."""
    model = build(training_for())
    inside, calls = model.criterion.forward, []

    def spoilt(*given):
        found = inside(*given)
        calls.append(len(given))
        if "mask" in term and len(calls) > 9:  # three layers a step
            found["loss_mask"] = found["loss_mask"] * torch.nan
        return found

    monkeypatch.setattr(model.criterion, "forward", spoilt)
    if "gradient" in term:
        model.class_predictor.weight.register_hook(lambda gradient: gradient * (torch.nan if len(calls) > 9 else 1))
    with pytest.raises(UserError, match=rf"in step 4.* images \d, \d: {term} .*nan|{term} not finite"):
        train(tmp_path, model=model)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 2
    assert len(losses(tmp_path)) == 3
    train(tmp_path)
    train(tmp_path / "whole")
    assert losses(tmp_path) == losses(tmp_path / "whole")


def test_a_checkpoint_gives_the_same_predictions(tmp_path):
    model, image = train(tmp_path).eval(), Shapes()[0]["image"]
    loaded, settings = stage5.load_trained(tmp_path)
    assert settings["stride"] == 8
    before = stage5.predict(model, image, "64x96", "cpu")
    after = stage5.predict(loaded.eval(), image, "64x96", "cpu")
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_eight_pictures_can_be_overfitted(tmp_path):
    rate = 2 * RECIPE.learning_rate
    recipe = dataclasses.replace(RECIPE, steps=160, batch=4, save_every=300, learning_rate=rate, master_rate=1.0)
    samples = Shapes()
    model = train(tmp_path, recipe, samples).eval()
    score = stage5.SemanticScore([name for _, name, _ in samples.categories])
    for sample in map(samples.__getitem__, range(8)):
        score.update(
            stage5.semantic(*stage5.predict(model, sample["image"], "64x96", "cpu")), *sample["truth"]["semantic"]
        )
    assert score.result()["mIoU"] > 95
