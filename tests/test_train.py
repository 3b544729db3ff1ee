"""Stage 4: augmentation, the loop, and what an interruption leaves behind."""

import dataclasses
import importlib

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from common.benchmarks import open_split
from common.model import build_model
from common.run import UserError

stage4, stage5 = importlib.import_module("04_train"), importlib.import_module("05_eval")
RECIPE = dataclasses.replace(
    stage4.RECIPES["toycity"],
    steps=6,
    batch=2,
    short_side=(64, 64),
    crop=(64, 96),
    test_size="64x96",
    width=32,
    queries=12,
    encoder_layers=1,
    decoder_layers=2,
    points=512,
    save_every=2,
)


class Shapes(Dataset):
    """Eight pictures, 64 x 96: a coloured rectangle and a grey disc, two things, on ground and sky, two stuffs."""

    categories = [(1, "ground", False), (2, "sky", False), (3, "box", True), (4, "disc", True)]
    task = "panoptic"

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


def settings_for(recipe, **changes):
    settings = {"master": "tiny_vit", "auxiliary": "tiny_hiera", "stride": 8, "fusion": "replace", "seed": 0}
    settings |= {"master_mode": "ft", "aux_mode": "fz", "classes": ["ground", "sky", "box", "disc"]}
    return settings | dataclasses.asdict(recipe) | changes


def train(folder, recipe=RECIPE, samples=None, **changes):
    settings = settings_for(recipe, **changes)
    torch.manual_seed(settings["seed"])
    model = build_model(settings, {"tiny_vit": "none", "tiny_hiera": "none"})
    checkpoint = stage4.load_checkpoint(folder, settings)
    stage4.train(model, samples or Shapes(), recipe, settings, folder, checkpoint, workers=0)
    return model


# ---------------------------------------------------------------------------------------------- data


def test_masks_stay_on_what_they_mark():
    """In pictures whose colour is the segment's, every mask of a crop covers just that colour."""
    sample = Shapes()[0]
    sample["image"] = (40 * sample["segments"]).byte()[None].repeat(3, 1, 1)
    recipe = dataclasses.replace(RECIPE, short_side=(60, 160))
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
    recipe = dataclasses.replace(RECIPE, short_side=(64, 128), crop=(64, 64))
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
    recipe = dataclasses.replace(RECIPE, short_side=(32, 32))
    crop = stage4.augment(Shapes()[0], recipe, np.random.default_rng(0))
    assert crop["image"].shape == (3, 64, 96)
    assert not crop["image"][:, 32:].any() and not crop["masks"][:, 32:].any() and not crop["masks"][:, :, 48:].any()


def test_the_stream_depends_on_the_seed_alone(data):
    recipe = dataclasses.replace(stage4.RECIPES["toycity"], steps=4, batch=4)
    crops = stage4.TrainCrops(open_split("toycity", data, "train"), recipe, seed=3)
    one, two = (list(DataLoader(crops, 4, num_workers=n, collate_fn=stage4.collate)) for n in (0, 2))
    for (a, masks_a, _), (b, masks_b, _) in zip(one, two, strict=True):
        assert torch.equal(a, b) and all(torch.equal(m, n) for m, n in zip(masks_a, masks_b, strict=True))
    other = stage4.TrainCrops(crops.samples, recipe, seed=4)
    assert not torch.equal(crops[0]["image"], other[0]["image"])


def test_an_epoch_sees_every_picture_once():
    class Names(Dataset):
        def __len__(self):
            return 5

        def __getitem__(self, index):
            seen.append(int(index))
            return Shapes()[index]

    seen = []
    crops = stage4.TrainCrops(Names(), RECIPE, seed=0)
    for n in range(15):
        crops[n]
    epochs = [seen[0:5], seen[5:10], seen[10:15]]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs) and len(set(map(tuple, epochs))) > 1


# ---------------------------------------------------------------------------------------------- training


def test_encoders_learn_at_a_tenth_and_norms_do_not_decay():
    model = build_model(settings_for(RECIPE), {})
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
    rows = [[(r["step"], r["loss"]) for r in stage4.read_log(tmp_path / part)] for part in ("whole", "parts")]
    assert rows[0] == rows[1] and len(rows[0]) == 6
    assert sorted(p.name for p in (tmp_path / "parts").iterdir()) == [
        "checkpoint.pt",
        "checkpoint_previous.pt",
        "log.csv",
    ]


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, capsys):
    train(tmp_path)
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:1000])
    assert stage4.load_checkpoint(tmp_path, settings_for(RECIPE))["step"] == 4
    assert "checkpoint.pt cannot be read" in capsys.readouterr().out


def test_other_settings_are_refused_by_name(tmp_path):
    train(tmp_path)
    with pytest.raises(UserError, match="stride was 8, now 16"):
        train(tmp_path, stride=16)


def test_a_loss_that_is_not_finite_stops_with_the_step_and_keeps_the_checkpoint(tmp_path):
    model_settings = settings_for(RECIPE)
    model = build_model(model_settings, {"tiny_vit": "none", "tiny_hiera": "none"})
    with torch.no_grad():
        model.class_predictor.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="stopped at step 0: the logits of decoder layer 0 are not finite"):
        stage4.train(model, Shapes(), RECIPE, model_settings, tmp_path, workers=0)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_checkpoint_gives_the_same_predictions(tmp_path):
    model, image = train(tmp_path).eval(), Shapes()[0]["image"]
    loaded, settings = stage5.load_trained(tmp_path)
    assert settings["stride"] == 8
    before = stage5.predict(model, image, "64x96", "cpu")
    after = stage5.predict(loaded.eval(), image, "64x96", "cpu")
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_eight_pictures_can_be_overfitted(tmp_path):
    recipe = dataclasses.replace(RECIPE, steps=300, batch=4, save_every=300, master_rate=1.0)
    samples = Shapes()
    model = train(tmp_path, recipe, samples).eval()
    score = stage5.SemanticScore([name for _, name, _ in samples.categories])
    for sample in map(samples.__getitem__, range(8)):
        score.update(
            stage5.semantic(*stage5.predict(model, sample["image"], "64x96", "cpu")), *sample["truth"]["semantic"]
        )
    assert score.result()["mIoU"] > 95
