"""Stage 2: each metric against a small computation of its own, what degenerate maps score, and the stage end to end."""

import csv
import importlib
import json

from common import run

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
    """[1,C,H,W] of soft blobs over a little noise, the look of a real feature map."""
    blobs = F.interpolate(random(1, channels, 5, 7, seed=seed), (height, width), mode="bicubic")
    return blobs + 0.3 * random(1, channels, height, width, seed=seed + 1)


def pictures(count, height=128, width=192):
    """[B,3,H,W] of coloured rectangles with some grain."""
    draw = np.random.default_rng(0)
    images = np.full((count, 3, height, width), 0.5)
    for image in images:
        for _ in range(12):
            y, x = draw.integers(0, height - 20), draw.integers(0, width - 20)
            image[:, y : y + draw.integers(10, 60), x : x + draw.integers(10, 60)] = draw.random((3, 1, 1))
    return torch.tensor((images + 0.02 * draw.standard_normal(images.shape)).clip(0, 1), dtype=torch.float32)


def both(features, images):
    return metrics.structural_coherence(features) | metrics.edge_fidelity(features, images)


# ------------------------------------------------------------------------------------------- structural coherence


def test_contrast_is_between_cells_over_all():
    draw = np.random.default_rng(1)
    cells = np.kron(draw.random((16, 16)) + 1, np.ones((3, 5)))  # [48,80], constant in each cell
    grain = np.kron(np.ones((16, 16)), draw.standard_normal((3, 5)) * 0.2)  # the same in every cell
    grain -= grain.mean()
    norm = np.pad(cells + grain, ((0, 2), (0, 9)), mode="edge")  # rows and columns that must be cropped
    total = norm.std(ddof=1) ** 2
    expected = (cells.var() / total) / (cells.var() / total + grain[:3, :5].var() / total)
    measured = metrics.feature_contrast(torch.tensor(norm, dtype=torch.float32)[None])
    assert measured.item() == pytest.approx(expected, abs=1e-5)


def test_contrast_of_small_maps_and_noise():
    assert metrics.feature_contrast(random(1, 8, 16)).item() == pytest.approx(1, abs=1e-5)
    assert metrics.feature_contrast(random(1, 128, 256)).item() < 0.02


def test_silhouette_equals_scikit_learn():
    points, labels = random(1, 300, 5), torch.arange(300)[None] % 6
    labels[0, 0] = 6  # a cluster of one; 7 stays empty
    expected = silhouette_score(points[0].numpy(), labels[0].numpy())
    assert metrics.silhouette(points, labels, 8).item() == pytest.approx(expected, abs=1e-5)
    assert silhouette_samples(points[0].numpy(), labels[0].numpy())[0] == 0


def test_clear_regions_score_higher_than_noise():
    regions = torch.eye(8).repeat_interleave(4, 1).repeat_interleave(2, 0)[None]  # [1,16,32], eight kinds of column
    regions = regions[:, :, None].expand(-1, -1, 16, -1) + 0.01 * random(1, 16, 16, 32)
    assert metrics.structural_coherence(regions)["SCS"] > 0.8
    assert metrics.structural_coherence(random(1, 16, 16, 32))["SCS"] < 0.6


# ------------------------------------------------------------------------------------------------- edge fidelity


STEPS = (12, 31, 50)  # columns at which the striped picture changes


def striped_picture():
    """[1,3,30,62]: the gradients of its three steps fill exactly the top tenth of the valid area, six of 60 columns."""
    image = torch.zeros(1, 3, 30, 62)
    for column, value in zip(STEPS, (0.8, 0.2, 0.9), strict=True):
        image[..., column:] = value
    return image


def step_features(column):
    features = torch.zeros(1, 2, 30, 62)  # a step has two columns of gradient, on either side of it
    features[:, 0, :, column:] = 1
    return features


def test_zones_are_squares_around_the_centreline():
    _, core, near = metrics.edge_zones(striped_picture(), (30, 62))  # on the valid area, which begins at column 1
    for zone, offsets in ((core, range(-3, 3)), (near, (-5, -4, 3, 4))):
        columns = sorted(step + offset - 1 for step in STEPS for offset in offsets)
        assert zone.all(1)[0].nonzero().flatten().tolist() == columns
        assert zone.any(1)[0].nonzero().flatten().tolist() == columns


@pytest.mark.parametrize(
    ("column", "shares"), [(31, (1, 0, 0)), (35, (0, 1, 0)), (41, (0, 0, 1)), (34, (0.5, 0.5, 0)), (36, (0, 0.5, 0.5))]
)
def test_feature_edges_count_where_they_lie(column, shares):
    scores = metrics.edge_fidelity(step_features(column), striped_picture())
    assert [scores[name].item() for name in ("EC", "NC", "FAR")] == pytest.approx(shares, abs=1e-5)
    ec, nc, far = shares
    fc, fc_pca, sp = (scores[name].item() for name in ("FC", "FC_PCA", "SP"))
    assert scores["EF"].item() == pytest.approx(100 * ec * nc * fc * sp, abs=1e-4)
    assert scores["EF_RELEASED"].item() == pytest.approx(100 * nc * (1 - far) * fc_pca * sp, abs=1e-4)


def test_picture_without_contrast_has_no_edges():
    scores = metrics.edge_fidelity(random(1, 8, 32, 32), torch.full((1, 3, 64, 64), 0.4))
    assert (scores["EC"], scores["NC"], scores["FAR"]) == (0, 0, pytest.approx(1))


def test_high_frequency_share_against_numpy():
    norm = np.random.default_rng(3).standard_normal((20, 33)).cumsum(0)
    windowed = (norm - norm.mean()) / norm.std(ddof=1) * np.hanning(20)[:, None] * np.hanning(33)
    power = np.abs(np.fft.fftshift(np.fft.fft2(windowed))) ** 2
    radius = np.hypot(*np.meshgrid(np.linspace(-1, 1, 20), np.linspace(-1, 1, 33), indexing="ij"))
    expected = power[radius / radius.max() >= 0.15].sum() / power.sum()
    measured = metrics.high_frequency_share(metrics.standardise(torch.tensor(norm)[None].float()))
    assert 0.05 < expected < 0.95
    assert measured.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("power", [0.5, 2, 4])
def test_spatial_precision_against_numpy(power):
    """All eight offsets, each with NumPy's own correlation, on maps whose detail resembles itself over many pixels."""
    norm = (np.hanning(48)[:, None] * np.hanning(72)) ** power + 0.01 * np.random.default_rng(0).random((48, 72)) * (
        power < 1
    )
    padded = np.pad(norm, 1)
    detail = norm - sum(padded[y : y + 48, x : x + 72] for y in range(3) for x in range(3)) / 9
    radii = np.unique(np.round(np.logspace(0, np.log10(28), 16)).astype(int))
    for radius in radii:
        found, similarities = radius, []
        for dy, dx in [(y, x) for y in (-radius, 0, radius) for x in (-radius, 0, radius) if (y, x) != (0, 0)]:
            a = detail[max(dy, 0) : 48 + min(dy, 0), max(dx, 0) : 72 + min(dx, 0)]
            b = detail[max(-dy, 0) : 48 + min(-dy, 0), max(-dx, 0) : 72 + min(-dx, 0)]
            similarities.append(np.corrcoef(a.ravel(), b.ravel())[0, 1])
        if np.mean(similarities) < 0.5:
            break
    assert (found > 3) == (power > 1)
    measured = metrics.spatial_precision(torch.tensor(norm)[None].float())
    assert measured.item() == pytest.approx(1 / (1 + found / 64), abs=1e-5)


# ------------------------------------------------------------------------------------------------- edge readout


def readout(maps, images):
    """Pearson's r of each picture, of one map [C,H,W] a picture."""
    edges = [metrics.picture_edges(image[None], m.shape[1:]) for image, m in zip(images, maps, strict=True)]
    samples = [[("map", metrics.readout_samples(m[None], e))] for m, e in zip(maps, edges, strict=True)]
    return metrics.edge_readout(lambda i: samples[i], len(maps))["map"]


def place(height, width):
    """Cosines of 0 to 1.5 periods along each axis: [H*W,16]."""
    y, x = ((np.arange(side) + 0.5) / side * np.pi for side in (height, width))
    waves = [np.outer(np.cos(i * y), np.cos(j * x)).ravel() for i in range(4) for j in range(4)]
    return np.stack(waves, 1)


@pytest.mark.parametrize("count", [4, 6, 9])
def test_readout_equals_scikit_learns_ridge_in_blocks_of_neighbours(count):
    images = pictures(count)
    maps = [smooth(10, 16, 24, seed=40 + 2 * i)[0] for i in range(count)]
    for m, image in zip(maps, images, strict=True):
        m[3] += 5 * metrics.picture_edges(image[None], (16, 24))[0]

    def given_position(columns):
        left = columns - LinearRegression().fit(place(16, 24), columns).predict(place(16, 24))
        return left / left.std(0)

    points = [given_position(m.flatten(1).T.double().numpy()) for m in maps]
    edges = [
        given_position(metrics.picture_edges(image[None], (16, 24)).flatten().double().numpy()) for image in images
    ]
    expected = []
    for block in np.array_split(np.arange(count), [round(count * f / 4 + 0.49) for f in (1, 2, 3)]):
        others = [i for i in range(count) if i not in block]
        x, y = np.concatenate([points[i] for i in others]), np.concatenate([edges[i] for i in others])
        fitted = Ridge(metrics.RIDGE * 10 * len(x), fit_intercept=False).fit(x, y)
        expected += [np.corrcoef(fitted.predict(points[i]), edges[i])[0, 1] for i in block]
    assert min(expected) > 0.05
    assert readout(maps, images) == pytest.approx(expected, abs=2e-3)


def test_readout_is_zero_for_noise_and_for_other_pictures_and_one_for_the_edges_themselves():
    images = pictures(24)
    noise = readout([random(64, 32, 48, seed=i) for i in range(24)], images)
    assert abs(noise.mean()) < 0.03
    edges = torch.cat([metrics.picture_edges(image[None], (32, 48)) for image in images])[:, None]
    assert readout(list(edges), images).min() > 0.999
    assert abs(readout(list(edges.roll(1, 0)), images).mean()) < 0.1
    # What holds in one picture and not in the next is not learnt: the sign differs from block to block.
    signs = torch.tensor([1.0, -1, 1, -1]).repeat_interleave(6)[:, None, None, None]
    assert readout(list(edges * signs), images).max() < 0


def test_readout_is_zero_for_position_and_the_same_for_channels_given_twice():
    """All pictures have their edges in one place, and a map that knows the place knows nothing of them."""
    images = 0.1 * pictures(8)
    images[:, :, 66:] += 0.9  # a horizon
    position = torch.from_numpy(place(32, 48).T).float().reshape(16, 32, 48)
    position = position * torch.linspace(1, 3, 16)[:, None, None]
    edges = [metrics.picture_edges(image[None], (32, 48))[0].flatten() for image in images]
    known = np.corrcoef(np.stack([e.numpy() for e in edges]))
    assert known.min() > 0.5
    assert abs(readout([position] * 8, images)).max() < 0.1
    maps = [
        smooth(5, 32, 48, seed=60 + i)[0] + metrics.picture_edges(i_[None], (32, 48)) for i, i_ in enumerate(images)
    ]
    once = readout(maps, images)
    assert once.mean() > 0.2
    assert readout([m.repeat(20, 1, 1) for m in maps], images) == pytest.approx(once, abs=2e-3)


def test_readout_of_sampled_positions_of_pictures_of_several_sizes_and_of_maps_without_content():
    images = [picture[:, :, : 192 - 16 * (i % 3)] for i, picture in enumerate(pictures(8))]
    maps = [metrics.picture_edges(image[None], image.shape[1:]) for image in images]  # of more positions than are taken
    assert metrics.readout_samples(maps[0][None], maps[0]).shape == (metrics.READOUT_POSITIONS, 2)
    maps[5] = torch.full_like(maps[5], 3)
    found = readout(maps, images)
    assert found[5] == 0
    assert np.delete(found, 5).min() > 0.999
    assert readout([random(3, 4, 6, seed=i) for i in range(8)], images).tolist() == [0] * 8  # 24 positions: too few
    with pytest.raises(ValueError, match="4 folds"):
        readout(maps[:3], images[:3])


# ------------------------------------------------------------------------------------------------ both together


def test_degenerate_maps_score_zero_and_leave_the_others_alone():
    images, good = pictures(1), smooth(6, 32, 48)
    constant = torch.full_like(good, 0.7)
    broken, infinite, barely = good.clone(), good.clone(), 1 + 1e-5 * good
    broken[0, 2, 3, 4], infinite[0, 2, 3, 4] = torch.nan, torch.inf
    batch = torch.cat([constant, good, broken, infinite, barely, torch.zeros_like(good)])
    scores, alone = both(batch, images.expand(6, -1, -1, -1)), both(good, images)
    for name, score in scores.items():
        assert score[[0, 2, 3, 4, 5]].eq(0).all(), name
        assert score[1].item() == pytest.approx(alone[name].item(), abs=1e-4), name
    assert alone["SC"] > 0.1
    assert alone["EF"] > 0
    # A constant channel beside varying ones is no flaw; a map may have one channel; 2 x 2 pixels have no valid one.
    with_constant = both(torch.cat([good, constant[:, :1]], 1), images)
    assert with_constant["SC"] > 0.1
    assert with_constant["EF"] > 0
    assert both(smooth(1, 16, 16), images)["SC"] > 0.1
    assert all(score.eq(0) for name, score in both(random(1, 5, 2, 2), images).items() if name != "SFC")


def test_batch_of_three_equals_three_of_one():
    features, images = torch.cat([smooth(24, 32, 48, seed=s) for s in (0, 20, 40)]).half(), pictures(3)
    together = both(features, images)
    assert set(together) == set(metrics.SCORES) - {"ER"}
    for i in range(3):
        for name, score in both(features[i : i + 1], images[i : i + 1]).items():
            assert score.dtype == torch.float32
            assert together[name][i].item() == pytest.approx(score.item(), abs=2e-3 if "EF" in name else 1e-4), name


def test_same_seed_same_numbers_and_autocast_changes_nothing():
    features, images = smooth(24, 80, 96), pictures(1)  # more positions than are sampled
    first = both(features, images)
    torch.manual_seed(1)  # the global generator plays no part
    with torch.autocast("cpu", dtype=torch.bfloat16):
        second = both(features, images)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert metrics.structural_coherence(features, seed=1)["SCS"] != first["SCS"]


# ---------------------------------------------------------------------------------------------------- the stage


@pytest.fixture
def filled(tmp_path):
    """A run folder as stage 1 leaves it: four small pictures, two encoders."""
    names = ["a.png", "b.png", "c.png", "d.png"]
    for i, (name, picture) in enumerate(zip(names, pictures(4, 64, 96), strict=True)):
        Image.fromarray((picture * 255).byte().permute(1, 2, 0).numpy()).save(tmp_path / name)
        for encoder, levels in {"tiny_vit": {16: 12}, "tiny_hiera": {4: 4, 8: 8, 16: 12, 32: 16}}.items():
            path = run.feature_path(tmp_path, encoder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            maps = {
                str(s): smooth(c, 64 // s, 96 // s, seed=50 * i + s)[0].half().contiguous() for s, c in levels.items()
            }
            save_file(maps, path, {"picture": run.fingerprint(tmp_path / name)})
    settings = {
        "benchmark": None,
        "command": "python 01_extract.py --images pictures",
        "root": str(tmp_path),
        "images": names,
        "encoders": ["tiny_vit", "tiny_hiera"],
        "size": "64x96",
        "seed": 0,
        "left_out": {},
    }
    run.write_json(tmp_path / "run.json", settings | {"weights": {"tiny_vit": "none", "tiny_hiera": "pretrained"}})
    return tmp_path


def test_stage_writes_every_map_and_its_means_twice_the_same(filled, stage):
    printed = stage("02_metrics", "--run", filled, "--device", "cpu")
    table, summary = (filled / "metrics.csv").read_text(), json.loads((filled / "metrics.json").read_text())
    rows = list(csv.DictReader(table.splitlines()))
    assert len(rows) == 4 * 5 * 4
    assert summary["random_weights"] == ["tiny_vit"]
    for source in ("tiny_hiera", "noise"):
        values = [float(row["SC"]) for row in rows if (row["source"], row["stride"]) == (source, "8")]
        numbers = summary["scores"][source]["8"]["SC"]
        assert numbers["mean"] == pytest.approx(np.mean(values), abs=1e-6)
        assert min(values) - 1e-8 <= numbers["low"] <= numbers["mean"] <= numbers["high"] <= max(values) + 1e-8
    found = json.loads((filled / "run.json").read_text())
    samples = []  # ER of the stage is that of the maps that it stores
    for name in found["images"]:
        image, maps = metrics.read_maps(metrics.Settings(run=filled, device="cpu"), found, name)
        edges = metrics.picture_edges(image, (16, 24))
        samples.append([("hiera", metrics.readout_samples(maps["tiny_hiera"][4], edges))])
    expected = metrics.edge_readout(lambda i: samples[i], 4)["hiera"]
    written = [float(row["ER"]) for row in rows if (row["source"], row["stride"]) == ("tiny_hiera", "4")]
    assert written == pytest.approx(expected, abs=1e-5)
    assert Image.open(filled / "metrics.png").width > 900
    assert Image.open(filled / "edges.png").width > 900
    assert "tiny_vit has RANDOM weights" in printed
    assert printed.rstrip().endswith(f"python 03_select.py --run {filled}")
    stage("02_metrics", "--run", filled, "--device", "cpu", "--workers", 1)
    assert (filled / "metrics.csv").read_text() == table


def test_stage_names_what_is_missing(filled, stage):
    path = run.feature_path(filled, "tiny_hiera", "b.png")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(run.UserError, match=r"b\.png\.safetensors is damaged.*01_extract\.py"):
        stage("02_metrics", "--run", filled, "--device", "cpu")
    assert not (filled / "metrics.csv").exists()
    with pytest.raises(run.UserError, match=r"run `python 01_extract\.py --run .*nowhere.*` first"):
        stage("02_metrics", "--run", filled / "nowhere", "--device", "cpu")


def test_stage_refuses_an_extraction_that_has_not_ended_and_leaves_out_what_it_left_out(filled, stage):
    settings = json.loads((filled / "run.json").read_text())
    run.write_json(filled / "run.json", settings | {"left_out": {"b.png": "b.png cannot be read"}})
    printed = stage("02_metrics", "--run", filled, "--device", "cpu")
    assert "means over 3 images" in printed
    assert "ER, needs 4 images or more" in printed
    assert json.loads((filled / "metrics.json").read_text())["scores"]["noise"]["4"]["ER"]["mean"] is None
    assert "b.png" not in (filled / "metrics.csv").read_text()
    del settings["left_out"]
    run.write_json(filled / "run.json", settings)
    with pytest.raises(run.UserError, match=r"has not ended: run `python 01_extract\.py --images pictures` again"):
        stage("02_metrics", "--run", filled, "--device", "cpu")


def write_maps(folder, encoder, name, maps):
    """Feature maps of the picture as it is now."""
    maps = {str(s): feature.half().contiguous() for s, feature in maps.items()}
    save_file(maps, run.feature_path(folder, encoder, name), {"picture": run.fingerprint(folder / name)})


def test_edges_are_drawn_where_each_encoders_own_ef_peaks(filled, stage, monkeypatch):
    drawn = []
    monkeypatch.setattr(metrics, "draw_edges", lambda path, rows: drawn.append(rows))
    stage("02_metrics", "--run", filled, "--device", "cpu")
    summary = json.loads((filled / "metrics.json").read_text())["scores"]
    (rows,) = drawn
    assert len(rows) == 3  # of four
    for image, drawings in rows:
        assert image.shape == (3, 64, 96)
        for encoder, (title, centreline, edges) in zip(("tiny_vit", "tiny_hiera"), drawings, strict=True):
            peak = max((4, 8, 16, 32), key=lambda s: summary[encoder][str(s)]["EF"]["mean"])  # noqa: B023
            assert title.startswith(f"{encoder}, OS {peak}\nEC 0.")
            size = (64 // peak - 2, 96 // peak - 2)
            assert centreline.shape == edges.shape == size
            assert 0 < (edges > 0).float().mean() <= 0.1 + 1 / edges.numel()
            assert set(edges.unique().tolist()) <= {0, 1, 2, 3}


def test_maps_or_pictures_without_edges_do_not_break_the_drawing(filled, stage):
    before = run.read_features(filled, "tiny_hiera", "a.png", run.fingerprint(filled / "a.png"))
    Image.new("RGB", (96, 64), (90, 90, 90)).save(filled / "a.png")
    write_maps(filled, "tiny_hiera", "a.png", before)
    for name, value in (("a.png", 0.7), ("b.png", torch.nan)):
        write_maps(filled, "tiny_vit", name, {16: torch.full((12, 4, 6), value)})
    assert "leaves out a.png: no contrast" in stage("02_metrics", "--run", filled, "--device", "cpu")
    assert (filled / "edges.png").is_file()


def test_drawing_leaves_out_pictures_whose_maps_are_too_small(filled, capsys):
    found = json.loads((filled / "run.json").read_text())
    settings, values = metrics.Settings(run=filled, device="cpu"), np.zeros((4, 5, 4, len(metrics.SCORES)))
    values[:, :, 3, metrics.SCORES.index("EF")] = 1  # they peak at OS 32, where maps are 2 x 3
    assert metrics.edges_at_peaks(settings, found, found["images"], values) == []
    assert capsys.readouterr().out.count("under 3 pixels") == 3


def test_a_border_that_outshines_the_inside_hides_no_edge():
    """The gradient is clamped to [0, 1] before a pixel is held against its neighbours, those of the border included."""
    image = torch.zeros(1, 3, 16, 16)
    image[..., 2:] = 0.5  # its gradient is highest in columns 1 and 2
    image[..., 0] = 1  # on the border it is higher still
    centreline, _, _ = metrics.edge_zones(image, (16, 16))
    assert centreline[0, :, 0].all()  # column 1 of the map
