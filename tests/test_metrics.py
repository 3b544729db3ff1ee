"""Stage 2: each score against a small computation of its own, degenerate maps, and the stage."""

import csv
import importlib
import json

from common import run
from common.encoders import STRIDES

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.metrics import silhouette_samples, silhouette_score

metrics = importlib.import_module("02_metrics")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def smooth(channels, height, width, seed=0):
    """A map [C, H, W] of soft blobs over a little noise, the look of a real feature map."""
    coarse = random(1, channels, 5, 7, seed=seed)
    blobs = F.interpolate(coarse, (height, width), mode="bicubic")[0]
    return blobs + 0.3 * random(channels, height, width, seed=seed + 1)


def draw_images(count, height=128, width=192):
    """Images [count, 3, H, W] of coloured rectangles with some grain."""
    rng = np.random.default_rng(0)
    images = np.full((count, 3, height, width), 0.5)
    for image in images:
        for _ in range(12):
            y, x = rng.integers(0, height - 20), rng.integers(0, width - 20)
            rows = slice(y, y + rng.integers(10, 60))
            columns = slice(x, x + rng.integers(10, 60))
            image[:, rows, columns] = rng.random((3, 1, 1))
    images = images + 0.02 * rng.standard_normal(images.shape)
    return torch.tensor(images.clip(0, 1), dtype=torch.float32)


def both(features, image):
    return {**metrics.structural_coherence(features), **metrics.edge_fidelity(features, image)}


# ------------------------------------------------------------------ Structural Coherence


def test_contrast_is_between_cells_over_all():
    rng = np.random.default_rng(1)
    # The cells [48, 80] are constant, and the grain is the same in every cell.
    cells = np.kron(rng.random((16, 16)) + 1, np.ones((3, 5)))
    grain = np.kron(np.ones((16, 16)), rng.standard_normal((3, 5)) * 0.2)
    grain -= grain.mean()
    # The rows and columns that are added must be cropped.
    norm = np.pad(cells + grain, ((0, 2), (0, 9)), mode="edge")
    total = norm.std(ddof=1) ** 2
    between, within = cells.var() / total, grain[:3, :5].var() / total
    measured = metrics.structured_feature_contrast(torch.tensor(norm, dtype=torch.float32))
    assert measured == pytest.approx(between / (between + within), abs=1e-5)


def test_contrast_of_small_maps_and_noise():
    assert metrics.structured_feature_contrast(random(8, 16)) == pytest.approx(1, abs=1e-5)
    assert metrics.structured_feature_contrast(random(128, 256)) < 0.02


def test_silhouette_equals_scikit_learn():
    points, labels = random(300, 5), torch.arange(300) % 6
    labels[0] = 6  # a cluster of one; 7 stays empty
    expected = silhouette_score(points.numpy(), labels.numpy())
    assert metrics.silhouette(points, labels, 8) == pytest.approx(expected, abs=1e-5)
    assert silhouette_samples(points.numpy(), labels.numpy())[0] == 0


def test_clear_regions_score_higher_than_noise():
    kinds = torch.eye(8).repeat_interleave(4, 1).repeat_interleave(2, 0)  # [16, 32], 8 of column
    regions = kinds[:, None].expand(-1, 16, -1) + 0.01 * random(16, 16, 32)
    assert metrics.structural_coherence(regions)["SCS"] > 0.8
    assert metrics.structural_coherence(random(16, 16, 32))["SCS"] < 0.6


# ------------------------------------------------------------------ Edge Fidelity


STEPS = (12, 31, 50)  # columns at which the striped image changes


def striped_image():
    """An image [3, 30, 62] of three steps.

    Their gradients fill exactly the top tenth of the valid area, six of its 60 columns.
    """
    image = torch.zeros(3, 30, 62)
    for column, value in zip(STEPS, (0.8, 0.2, 0.9), strict=True):
        image[..., column:] = value
    return image


def step_features(column):
    """A map [2, 30, 62] with a step, which has a column of gradient on either side."""
    features = torch.zeros(2, 30, 62)
    features[0, :, column:] = 1
    return features


def test_zones_are_squares_around_the_thinned_image_edges():
    edges = metrics.locate_edges(step_features(31)[0], striped_image())
    for zone, offsets in ((1, range(-3, 3)), (2, (-5, -4, 3, 4))):
        # The valid area begins at column 1 of the map.
        columns = sorted(step + offset - 1 for step in STEPS for offset in offsets)
        within = edges.zone == zone
        assert within.all(0).nonzero().flatten().tolist() == columns
        assert within.any(0).nonzero().flatten().tolist() == columns
    assert set(edges.zone.unique().tolist()) == {1, 2, 3}


@pytest.mark.parametrize(
    ("column", "shares"),
    [(31, (1, 0, 0)), (35, (0, 1, 0)), (41, (0, 0, 1)), (34, (0.5, 0.5, 0)), (36, (0, 0.5, 0.5))],
)
def test_feature_edges_count_where_they_lie(column, shares):
    scores = metrics.edge_fidelity(step_features(column), striped_image())
    assert [scores[name] for name in ("EC", "NC", "FAR")] == pytest.approx(shares, abs=1e-5)
    ec, nc, far = shares
    fc, fc_pca, sp = (scores[name] for name in ("FC", "FC_PCA", "SP"))
    assert scores["EF"] == pytest.approx(100 * ec * nc * fc * sp, abs=1e-4)
    assert scores["EF_RELEASED"] == pytest.approx(100 * nc * (1 - far) * fc_pca * sp, abs=1e-4)


def test_image_without_contrast_has_no_edges():
    scores = metrics.edge_fidelity(random(8, 32, 32), torch.full((3, 64, 64), 0.4))
    assert (scores["EC"], scores["NC"], scores["FAR"]) == (0, 0, pytest.approx(1))


def test_frequency_content_against_numpy():
    norm = np.random.default_rng(3).standard_normal((20, 33)).cumsum(0)
    window = np.hanning(20)[:, None] * np.hanning(33)
    windowed = (norm - norm.mean()) / norm.std(ddof=1) * window
    power = np.abs(np.fft.fftshift(np.fft.fft2(windowed))) ** 2
    radius = np.hypot(np.linspace(-1, 1, 20)[:, None], np.linspace(-1, 1, 33))
    expected = power[radius / radius.max() >= 0.15].sum() / power.sum()
    measured = metrics.frequency_content(metrics.standardise(torch.tensor(norm).float()))
    assert 0.05 < expected < 0.95
    assert measured == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("power", [0.5, 2, 4])
def test_spatial_precision_against_numpy(power):
    """All eight shifts, each with NumPy's own correlation, also where detail is wide."""
    norm = (np.hanning(48)[:, None] * np.hanning(72)) ** power
    if power < 1:
        norm = norm + 0.01 * np.random.default_rng(0).random((48, 72))
    padded = np.pad(norm, 1)
    blurred = sum(padded[y : y + 48, x : x + 72] for y in range(3) for x in range(3)) / 9
    detail = norm - blurred
    radii = np.unique(np.round(np.logspace(0, np.log10(28), 16)).astype(int))
    for radius in radii:
        found, similarities = radius, []
        for dy in (-radius, 0, radius):
            for dx in (-radius, 0, radius):
                if dy == dx == 0:
                    continue
                a = detail[max(dy, 0) : 48 + min(dy, 0), max(dx, 0) : 72 + min(dx, 0)]
                b = detail[max(-dy, 0) : 48 + min(-dy, 0), max(-dx, 0) : 72 + min(-dx, 0)]
                similarities.append(np.corrcoef(a.ravel(), b.ravel())[0, 1])
        if np.mean(similarities) < 0.5:
            break
    assert (found > 3) == (power > 1)
    measured = metrics.spatial_precision(torch.tensor(norm).float())
    assert measured == pytest.approx(1 / (1 + found / 64), abs=1e-5)


def test_a_border_that_outshines_the_inside_hides_no_edge():
    """The gradient is clamped to [0, 1] before a pixel is compared with the border beside it."""
    image = torch.zeros(3, 16, 16)
    image[..., 2:] = 0.5  # its gradient is highest in columns 1 and 2
    image[..., 0] = 1  # on the border it is higher still
    thinned = metrics.thinned_image_edges(image, (16, 16))
    assert thinned[:, 0].all()  # column 1 of the map


# ------------------------------------------------------------------ linear edge probe


def probe_scores(maps, images):
    """ER of each image, from one map [C, H, W] of each."""
    samples = []
    for features, image in zip(maps, images, strict=True):
        edges = metrics.image_edges(image, features.shape[1:])
        samples.append(metrics.probe_samples(features, edges))
    probe = metrics.EdgeProbe(len(samples))
    for index, columns in enumerate(samples):
        probe.add(index, columns.T @ columns / len(columns))
    probe.fit()
    return np.array([probe.score(index, columns) for index, columns in enumerate(samples)])


def cosines(height, width):
    """Cosines of 0 to 1.5 periods along each axis: [H*W, 16]."""
    y = (np.arange(height) + 0.5) / height * np.pi
    x = (np.arange(width) + 0.5) / width * np.pi
    waves = []
    for i in range(4):
        for j in range(4):
            waves.append(np.outer(np.cos(i * y), np.cos(j * x)).ravel())
    return np.stack(waves, 1)


@pytest.mark.parametrize("count", [4, 6, 9])
def test_probe_equals_scikit_learns_ridge_in_blocks_of_neighbours(count):
    images = draw_images(count)
    edges = [metrics.image_edges(image, (16, 24)) for image in images]
    maps = [smooth(10, 16, 24, seed=40 + 2 * i) for i in range(count)]
    for features, its_edges in zip(maps, edges, strict=True):
        features[3] += 5 * its_edges

    def without_position(columns):
        model = LinearRegression().fit(cosines(16, 24), columns)
        rest = columns - model.predict(cosines(16, 24))
        return rest / rest.std(0)

    x = [without_position(features.flatten(1).T.double().numpy()) for features in maps]
    y = [without_position(its_edges.flatten().double().numpy()) for its_edges in edges]
    expected = []
    borders = [round(count * fold / 4 + 0.49) for fold in (1, 2, 3)]
    for block in np.array_split(np.arange(count), borders):
        others = [i for i in range(count) if i not in block]
        other_x = np.concatenate([x[i] for i in others])
        other_y = np.concatenate([y[i] for i in others])
        penalty = metrics.RIDGE * 10 * len(other_x)
        fitted = Ridge(penalty, fit_intercept=False).fit(other_x, other_y)
        expected += [np.corrcoef(fitted.predict(x[i]), y[i])[0, 1] for i in block]
    assert min(expected) > 0.05
    assert probe_scores(maps, images) == pytest.approx(expected, abs=2e-3)


def test_probe_is_zero_for_noise_and_for_other_images_and_one_for_the_edges_themselves():
    images = draw_images(24)
    noise = probe_scores([random(64, 32, 48, seed=i) for i in range(24)], images)
    assert abs(noise.mean()) < 0.03
    edges = [metrics.image_edges(image, (32, 48))[None] for image in images]
    assert probe_scores(edges, images).min() > 0.999
    of_others = [edges[-1], *edges[:-1]]
    assert abs(probe_scores(of_others, images).mean()) < 0.1
    # What holds in one image and not in the next is not learnt: the sign differs between blocks.
    signed = [its_edges * (-1) ** (i // 6) for i, its_edges in enumerate(edges)]
    assert probe_scores(signed, images).max() < 0


def test_probe_is_zero_for_position_and_the_same_for_channels_given_twice():
    """All images have their edges in one place, and to know the place is not to know the edges."""
    images = 0.1 * draw_images(8)
    images[:, :, 66:] += 0.9  # a horizon
    position = torch.from_numpy(cosines(32, 48).T).float().reshape(16, 32, 48)
    position = position * torch.linspace(1, 3, 16)[:, None, None]
    edges = [metrics.image_edges(image, (32, 48)) for image in images]
    similarity = np.corrcoef(np.stack([its_edges.flatten().numpy() for its_edges in edges]))
    assert similarity.min() > 0.5
    assert abs(probe_scores([position] * 8, images)).max() < 0.1
    maps = [smooth(5, 32, 48, seed=60 + i) + its_edges for i, its_edges in enumerate(edges)]
    once = probe_scores(maps, images)
    assert once.mean() > 0.2
    repeated = [features.repeat(20, 1, 1) for features in maps]
    assert probe_scores(repeated, images) == pytest.approx(once, abs=2e-3)


def test_probe_of_sampled_positions_of_several_sizes_and_of_maps_without_content():
    images = [image[:, :, : 192 - 16 * (i % 3)] for i, image in enumerate(draw_images(8))]
    maps = [metrics.image_edges(image, image.shape[1:])[None] for image in images]
    # These maps have more positions than are sampled.
    samples = metrics.probe_samples(maps[0], maps[0][0])
    assert samples.shape == (metrics.PROBE_POSITIONS, 2)
    maps[5] = torch.full_like(maps[5], 3)
    scores = probe_scores(maps, images)
    assert scores[5] == 0
    assert np.delete(scores, 5).min() > 0.999
    too_small = [random(3, 4, 6, seed=i) for i in range(8)]  # 24 positions
    assert probe_scores(too_small, images).tolist() == [0] * 8
    with pytest.raises(ValueError, match="4 folds"):
        probe_scores(maps[:3], images[:3])


# ------------------------------------------------------------------ both scores


@pytest.mark.filterwarnings("ignore:std:UserWarning")  # of a single pixel
def test_degenerate_maps_score_zero():
    image, good = draw_images(1)[0], smooth(6, 32, 48)
    broken, infinite = good.clone(), good.clone()
    broken[2, 3, 4], infinite[2, 3, 4] = torch.nan, torch.inf
    constant = torch.full_like(good, 0.7)
    barely = 1 + 1e-5 * good
    for features in (constant, broken, infinite, barely, torch.zeros_like(good)):
        assert both(features, image) == dict.fromkeys(set(metrics.SCORES) - {"ER"}, 0)
    scores = both(good, image)
    assert scores["SC"] > 0.1
    assert scores["EF"] > 0
    # A constant channel beside varying ones is no flaw.
    with_constant = both(torch.cat([good, constant[:1]]), image)
    assert with_constant["SC"] > 0.1
    assert with_constant["EF"] > 0
    # A map may have one channel. One of 2 x 2 pixels has no valid gradient.
    assert both(smooth(1, 16, 16), image)["SC"] > 0.1
    for name, score in both(random(5, 2, 2), image).items():
        assert score == 0 or name == "SFC", name
    # A single pixel is degenerate, too.
    assert set(both(random(5, 1, 1), image).values()) == {0}


def test_same_seed_same_scores_and_autocast_changes_nothing():
    features, image = smooth(24, 80, 96), draw_images(1)[0]  # more positions than are sampled
    first = both(features, image)
    torch.manual_seed(1)  # the global generator plays no part
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            assert both(features, image) == first
            assert torch.is_autocast_enabled("cpu")
    assert metrics.structural_coherence(features, seed=1)["SCS"] != first["SCS"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scores_of_any_float_type_are_floats_and_leave_their_inputs_alone(dtype):
    features, image = smooth(24, 32, 48).to(dtype), draw_images(1)[0].to(dtype)
    features_before, image_before = features.clone(), image.clone()
    scores = both(features, image)
    assert list(scores) == [name for name in metrics.SCORES if name != "ER"]
    assert {type(score) for score in scores.values()} == {float}
    assert scores["SC"] > 0.1
    assert scores["EF"] > 0
    assert scores == both(features.float(), image.float())
    assert torch.equal(features, features_before)
    assert torch.equal(image, image_before)


def test_scores_of_what_an_encoder_gives_in_a_notebook():
    """Its map requires gradients, or was made in inference mode, or is a view of ViT tokens."""
    features, image = smooth(24, 32, 48), draw_images(1)[0]
    expected = both(features, image)
    learnt = features.clone().requires_grad_()
    assert both(learnt * 1, image.clone().requires_grad_()) == expected
    assert both(learnt, image) == expected
    assert learnt.grad is None
    assert torch.is_grad_enabled()
    with torch.inference_mode():
        made, made_image = features * 1, image * 1
        assert both(made, made_image) == expected
    assert both(made, made_image) == expected
    tokens = features.flatten(1).T.contiguous()  # [H*W, C]
    view = tokens.T.unflatten(1, (32, 48))
    assert both(view, image) == pytest.approx(expected, abs=1e-3)


# ------------------------------------------------------------------ the stage


def write_maps(folder, encoder, name, maps):
    """The feature maps of an image as stage 1 stores them."""
    path = run.feature_path(folder, encoder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = {str(stride): features.half().contiguous() for stride, features in maps.items()}
    save_file(stored, path)


@pytest.fixture
def filled(tmp_path):
    """A run folder as stage 1 leaves it, of four small images and two encoders."""
    names = ["a.png", "b.png", "c.png", "d.png"]
    channels_of = {"tiny_vit": {16: 12}, "tiny_hiera": {4: 4, 8: 8, 16: 12, 32: 16}}
    for i, (name, image) in enumerate(zip(names, draw_images(4, 64, 96), strict=True)):
        pixels = (image * 255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(tmp_path / name)
        for encoder, channels in channels_of.items():
            maps = {}
            for stride, count in channels.items():
                maps[stride] = smooth(count, 64 // stride, 96 // stride, seed=50 * i + stride)
            write_maps(tmp_path, encoder, name, maps)
    run_config = {
        "benchmark": None,
        "root": str(tmp_path),
        "images": names,
        "encoders": ["tiny_vit", "tiny_hiera"],
        "weights": {"tiny_vit": "none", "tiny_hiera": "pretrained"},
        "size": "64x96",
        "seed": 0,
        "left_out": {},
    }
    run.write_json(tmp_path / "run.json", run_config)
    return tmp_path


def read_json(path):
    return json.loads(path.read_text())


def settings_of(folder):
    return metrics.Settings(run=folder, device="cpu", seed=0)


def test_stage_writes_every_map_and_its_means_twice_the_same(filled, stage):
    printed = stage("02_metrics", "--run", filled, "--device", "cpu")
    table, summary = (filled / "metrics.csv").read_text(), read_json(filled / "metrics.json")
    rows = list(csv.DictReader(table.splitlines()))
    assert len(rows) == 4 * 5 * 4
    assert summary["random_weights"] == ["tiny_vit"]

    def column(source, stride, score):
        kept = [row for row in rows if (row["source"], row["stride"]) == (source, stride)]
        return [float(row[score]) for row in kept]

    for source in ("tiny_hiera", "noise"):
        values = column(source, "8", "SC")
        numbers = summary["scores"][source]["8"]["SC"]
        assert numbers["mean"] == pytest.approx(np.mean(values), abs=1e-6)
        assert min(values) - 1e-8 <= numbers["low"] <= numbers["mean"]
        assert numbers["mean"] <= numbers["high"] <= max(values) + 1e-8
    # The stage's scores are those of the maps that it reads.
    run_config = read_json(filled / "run.json")
    images, maps = [], []
    for name in run_config["images"]:
        image, sources = metrics.read_image_and_maps(settings_of(filled), run_config, name)
        images.append(image)
        maps.append(sources["tiny_hiera", 4])
    written = column("tiny_hiera", "4", "ER")
    assert written == pytest.approx(probe_scores(maps, images), abs=1e-5)
    for i, (image, features) in enumerate(zip(images, maps, strict=True)):
        for score, value in both(features, image).items():
            assert column("tiny_hiera", "4", score)[i] == pytest.approx(value, abs=1e-5)
    assert Image.open(filled / "metrics.png").width > 900
    assert Image.open(filled / "edges.png").width > 900
    assert "tiny_vit has RANDOM weights" in printed
    assert printed.rstrip().endswith(f"python 03_select.py --run {filled}")
    stage("02_metrics", "--run", filled, "--device", "cpu", "--workers", 1)
    assert (filled / "metrics.csv").read_text() == table


def test_stage_names_what_is_missing(filled, stage):
    path = run.feature_path(filled, "tiny_hiera", "b.png")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(run.UserError, match=r"b\.png\.safetensors cannot be read.*01_extract\.py"):
        stage("02_metrics", "--run", filled, "--device", "cpu")
    assert not (filled / "metrics.csv").exists()
    with pytest.raises(run.UserError, match=r"run `python 01_extract\.py --run .*nowhere.*` first"):
        stage("02_metrics", "--run", filled / "nowhere", "--device", "cpu")


def test_stage_refuses_an_unfinished_extraction_and_leaves_out_what_that_left_out(filled, stage):
    run_config = read_json(filled / "run.json")
    run_config["left_out"] = {"b.png": "b.png cannot be read"}
    run.write_json(filled / "run.json", run_config)
    printed = stage("02_metrics", "--run", filled, "--device", "cpu")
    assert "means over 3 images" in printed
    assert "the edge probe needs 4 images, there are 3: no ER" in printed
    summary = read_json(filled / "metrics.json")
    assert summary["scores"]["noise"]["4"]["ER"]["mean"] is None
    assert "b.png" not in (filled / "metrics.csv").read_text()
    del run_config["left_out"]
    run.write_json(filled / "run.json", run_config)
    with pytest.raises(run.UserError, match=r"has not ended: start 01_extract\.py again"):
        stage("02_metrics", "--run", filled, "--device", "cpu")


def test_edges_are_drawn_where_each_encoders_own_ef_peaks(filled, stage, monkeypatch):
    drawn = []
    monkeypatch.setattr(metrics, "draw_edges", lambda path, rows: drawn.append(rows))
    stage("02_metrics", "--run", filled, "--device", "cpu")
    summary = read_json(filled / "metrics.json")["scores"]
    table = {}
    for row in csv.DictReader((filled / "metrics.csv").read_text().splitlines()):
        table[row["image"], row["source"], int(row["stride"])] = row
    (rows,) = drawn
    assert len(rows) == 3  # of four
    for name, (image, panels) in zip(["a.png", "b.png", "c.png"], rows, strict=True):
        assert image.shape == (3, 64, 96)
        for encoder, panel in zip(("tiny_vit", "tiny_hiera"), panels, strict=True):
            ef = {stride: summary[encoder][str(stride)]["EF"]["mean"] for stride in STRIDES}
            peak = max(ef, key=ef.get)
            scores = table[name, encoder, peak]
            shares = ", ".join(f"{part} {float(scores[part]):.2f}" for part in ("EC", "NC", "FAR"))
            assert panel.title == f"{encoder}, OS {peak}\n{shares}"
            size = (64 // peak - 2, 96 // peak - 2)
            assert panel.thinned.shape == panel.zones.shape == size
            drawn_share = (panel.zones > 0).float().mean()
            assert 0 < drawn_share <= 0.1 + 1 / panel.zones.numel()
            assert set(panel.zones.unique().tolist()) <= {0, 1, 2, 3}


def test_maps_or_images_without_edges_do_not_break_the_drawing(filled, stage):
    Image.new("RGB", (96, 64), (90, 90, 90)).save(filled / "a.png")
    for name, value in (("a.png", 0.7), ("b.png", torch.nan)):
        write_maps(filled, "tiny_vit", name, {16: torch.full((12, 4, 6), value)})
    printed = stage("02_metrics", "--run", filled, "--device", "cpu")
    assert "leaves out a.png: no contrast" in printed
    assert "2 maps of tiny_vit at OS 16 are constant or not finite" in printed
    assert (filled / "edges.png").is_file()


def test_drawing_leaves_out_images_whose_maps_are_too_small(filled, capsys):
    run_config = read_json(filled / "run.json")
    # EF peaks at OS 32, where maps are 2 x 3.
    profile = {str(stride): {"EF": {"mean": float(stride == 32)}} for stride in STRIDES}
    summary = {"tiny_vit": profile, "tiny_hiera": profile}
    rows = metrics.edge_rows(settings_of(filled), run_config, run_config["images"], summary)
    assert rows == []
    assert capsys.readouterr().out.count("less than 3 pixels") == 3


def test_a_batch_and_an_image_of_whole_numbers_are_refused():
    features = random(4, 16, 16)
    image = torch.rand(3, 64, 64)
    with pytest.raises(ValueError, match=r"one map \[C, H, W\]"):
        metrics.structural_coherence(features[None])
    with pytest.raises(ValueError, match=r"one map \[C, H, W\]"):
        metrics.edge_fidelity(features[None], image)
    with pytest.raises(ValueError, match=r"floating-point"):
        metrics.edge_fidelity(features, (255 * image).byte())
