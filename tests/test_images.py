"""Any image reaches the encoders as a viewer shows it, or is named and left out."""

import json
import os
import struct
import zlib

from common import run, toycity
from common.images import list_images, read_image
from common.run import UserError

import numpy as np
import pytest
import torch
from PIL import Image

SCENE = toycity.scene("val", 60)[0][100:292, 300:556]  # uint8 [192, 256, 3]


def png16(path, pixels):
    """Write a PNG of 16 bits a channel, [H, W, 3 or 4]. Pillow writes none."""

    def chunk(kind, content):
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


def grey(scene):
    return np.asarray(Image.fromarray(scene).convert("L"))


def read(path):
    image = read_image(path)
    assert image.dtype == torch.uint8 and image.shape[0] == 3 and image.is_contiguous()
    return image.permute(1, 2, 0).numpy().astype(int)


def test_grey_and_sixteen_bit_images_keep_their_tones(tmp_path):
    tones = grey(SCENE)
    Image.fromarray(tones).save(tmp_path / "grey.png")
    Image.fromarray(tones.astype(np.uint16) * 257).save(tmp_path / "grey16.png")
    Image.fromarray(tones.astype(np.uint16) * 257).save(tmp_path / "grey16.tif")
    Image.fromarray(tones > 128).save(tmp_path / "bits.png")
    png16(tmp_path / "colour16.png", SCENE.astype(np.uint16) * 257)
    for name in ("grey.png", "grey16.png", "grey16.tif"):
        assert (read(tmp_path / name) == tones[..., None]).all(), name
    assert (read(tmp_path / "bits.png") == (tones > 128)[..., None] * 255).all()
    assert (read(tmp_path / "colour16.png") == SCENE).all()


def test_palettes_and_transparency_are_as_on_a_white_page(tmp_path):
    palette = Image.fromarray(SCENE).quantize(64)
    palette.save(tmp_path / "palette.png")
    colours = np.asarray(palette.convert("RGB"))
    assert (read(tmp_path / "palette.png") == colours).all()
    palette.save(tmp_path / "hole.png", transparency=palette.getpixel((5, 5)))
    hole = np.asarray(palette) == palette.getpixel((5, 5))
    assert (read(tmp_path / "hole.png")[hole] == 255).all() and hole.any()
    assert (read(tmp_path / "hole.png")[~hole] == colours[~hole]).all()

    alpha = np.zeros(SCENE.shape[:2], np.uint8)
    alpha[:, 100:] = 128
    alpha[:, 200:] = 255
    opacity = alpha[..., None] / 255
    expected = SCENE * opacity + 255 * (1 - opacity)
    with_alpha = np.dstack([SCENE, alpha])
    Image.fromarray(with_alpha).save(tmp_path / "alpha.png")
    png16(tmp_path / "alpha16.png", with_alpha.astype(np.uint16) * 257)
    Image.fromarray(with_alpha).save(tmp_path / "alpha.webp", lossless=True, exact=True)
    for name in ("alpha.png", "alpha16.png", "alpha.webp"):
        assert np.abs(read(tmp_path / name) - expected).max() <= 1, name


def test_cmyk_keeps_its_colours(tmp_path):
    for colour in [(230, 40, 40), (20, 200, 30), (255, 255, 255), (0, 0, 0)]:
        image = Image.new("RGB", (64, 48), colour).convert("CMYK")
        image.save(tmp_path / "cmyk.jpg", quality=98)
        assert np.abs(read(tmp_path / "cmyk.jpg") - np.array(colour)).max() <= 4


def test_an_image_is_turned_as_its_exif_tag_says(tmp_path):
    turned = {3: np.rot90(SCENE, 2), 6: np.rot90(SCENE, -1), 8: np.rot90(SCENE), 2: SCENE[:, ::-1]}
    exif = Image.Exif()
    for orientation, expected in turned.items():
        exif[0x0112] = orientation
        Image.fromarray(SCENE).save(tmp_path / "turned.png", exif=exif)
        assert (read(tmp_path / "turned.png") == expected).all(), orientation
        stored = read_image(tmp_path / "turned.png", exif=False)
        assert (stored.permute(1, 2, 0).numpy() == SCENE).all(), orientation
    exif[0x0112] = 6
    tones = grey(SCENE)
    opaque = np.dstack([SCENE, tones | 255])
    for pixels in (tones, tones.astype(np.uint16) * 257, opaque):  # uncompressed, in each mode
        Image.fromarray(pixels).save(tmp_path / "turned.tif", exif=exif)
        expected = SCENE if pixels.ndim == 3 else np.repeat(tones[..., None], 3, -1)
        assert (read(tmp_path / "turned.tif") == np.rot90(expected, -1)).all(), pixels.dtype


def test_numbers_that_no_screen_shows_are_refused(tmp_path):
    Image.fromarray(SCENE[..., 0].astype(np.float32)).save(tmp_path / "depth.tif")
    with pytest.raises(UserError, match="depth.tif cannot be read as an image .*16 bits"):
        read_image(tmp_path / "depth.tif")


# ------------------------------------------------------------------ folders
def test_a_folder_that_is_linked_twice_is_listed_once_and_under_its_first_name(tmp_path):
    for name in ("m", "a"):
        (tmp_path / name).mkdir()
        Image.fromarray(SCENE).save(tmp_path / name / "scene.png")
    for i in range(8):
        (tmp_path / f"d{i}").symlink_to(tmp_path / "m")
    (tmp_path / "a/circle").symlink_to(tmp_path)
    assert list_images(tmp_path) == ["a/scene.png", "d0/scene.png"]


@pytest.fixture
def shoebox(tmp_path):
    """A folder as people have them, and the paths of what cannot be used."""
    folder = tmp_path / "shoe box"
    for sub in ("summer 2019", "été", ".thumbnails"):
        (folder / sub).mkdir(parents=True)
        Image.fromarray(SCENE).save(folder / sub / "same name.png")
    Image.fromarray(grey(SCENE)).save(folder / "grey.PNG")
    Image.fromarray(grey(SCENE).astype(np.uint16) * 257).save(folder / "sixteen.png")
    Image.fromarray(SCENE).quantize(16).save(folder / "palette.png")
    Image.fromarray(np.dstack([SCENE, SCENE[..., :1]])).save(folder / "alpha.png")
    Image.fromarray(SCENE).convert("CMYK").save(folder / "cmyk.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(SCENE).save(folder / "turned.jpg", exif=exif)
    Image.fromarray(SCENE).save(folder / "modern.webp")
    Image.fromarray(SCENE).resize((4000, 3000)).save(folder / "large.jpg")
    Image.fromarray(SCENE).resize((20, 20)).save(folder / "tiny.jpg")
    # A file of the last name can exist, but not one with ".safetensors" added.
    bad = ["letter.jpg", "half.jpg", "tape.png", "deep.tif", f"{'long' * 55}.png"]
    bad.append(f"{'l' * 250}.png")
    (folder / "letter.jpg").write_text("Dear grandmother,")
    (folder / "half.jpg").write_bytes((folder / "large.jpg").read_bytes()[:20_000])
    # The features of this image are those of no other one.
    Image.fromarray(SCENE).save(folder / "summer 2019__same name.png")
    Image.fromarray(SCENE).resize((900, 20)).save(folder / "tape.png")
    Image.fromarray(SCENE[..., 0].astype(np.float32)).save(folder / "deep.tif")
    for name in bad[-2:]:
        Image.fromarray(SCENE).save(folder / name)
    os.link(folder / "grey.PNG", os.fsencode(folder) + b"/caf\xe9.png")  # from an old disk
    (folder / "notes.txt").write_text("no image, and does not say so")
    return folder, bad


def test_a_folder_of_everything_runs_and_names_what_it_leaves_out(shoebox, stage, tmp_path):
    folder, bad = shoebox
    words = ["--images", folder, "--run", tmp_path / "run", "--size", "64"]
    said = stage("01_extract", *words, "--workers", 1)
    lines = [line for line in said.splitlines() if line.startswith("left out: ")]
    for name in (*bad, "caf\\udce9"):
        assert sum(f"/{name}" in line for line in lines) == 1, name
    assert len(lines) == len(bad) + 1
    run_config = json.loads((tmp_path / "run/run.json").read_text())
    names = list_images(folder)
    good = [name for name in names if name not in bad and not name.startswith("caf")]
    left_out = run_config["left_out"]
    assert [name for name in run_config["images"] if name not in left_out] == good
    assert len(good) == 12
    shapes = {}
    for name in good:
        shapes[name] = run.read_features(tmp_path / "run", "tiny_vit", name)[16].shape
    assert shapes["turned.jpg"] == (128, 6, 4)
    assert shapes["cmyk.jpg"] == shapes["large.jpg"] == (128, 4, 6)
    assert shapes["tiny.jpg"] == (128, 4, 4)

    # The same again has nothing to write, and leaves out the same.
    written = sorted((tmp_path / "run/features").rglob("*.safetensors"))
    times = [path.stat().st_mtime_ns for path in written]
    again = stage("01_extract", *words)
    assert f": {len(bad) + 1} are to be extracted" in again and "again:" not in again
    assert json.loads((tmp_path / "run/run.json").read_text()) == run_config
    assert sorted((tmp_path / "run/features").rglob("*.safetensors")) == written
    assert [path.stat().st_mtime_ns for path in written] == times
    assert f"means over {len(good)} images" in stage("02_metrics", "--run", tmp_path / "run")

    # The maps do not depend on the number of workers.
    other = tmp_path / "other"
    stage("01_extract", "--images", folder, "--run", other, "--size", "64", "--workers", 3)
    for name in good:
        for encoder in ("tiny_vit", "tiny_hiera"):
            maps = run.read_features(tmp_path / "run", encoder, name)
            other_maps = run.read_features(other, encoder, name)
            assert all(torch.equal(maps[stride], other_maps[stride]) for stride in maps)


def test_a_folder_of_nothing_usable_is_an_error(stage, tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/one.jpg").write_text("Dear uncle,")
    with pytest.raises(UserError, match="none of the 1 images of .*letters can be used"):
        stage("01_extract", "--images", tmp_path / "letters", "--run", tmp_path / "run")


# ------------------------------------------------------------------ images that change later
@pytest.fixture
def album(tmp_path, stage):
    """A run on three images, and its flags."""
    (tmp_path / "album").mkdir()
    for i in range(3):
        Image.fromarray(SCENE[: 128 + 32 * i]).save(tmp_path / f"album/{i}.png")
    words = ["--images", tmp_path / "album", "--run", tmp_path / "run", "--size", "64"]
    words += ["--encoders", "tiny_hiera", "--workers", 0]
    stage("01_extract", *words)
    return tmp_path, words


def replace_content(file):
    """The same size and time as before would not be noticed, so only the size differs."""
    before = file.stat()
    Image.fromarray(255 - SCENE[:100, ::2]).save(file)
    assert file.stat().st_size != before.st_size
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def touch(file):
    before = file.stat()
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000))
    assert file.stat().st_size == before.st_size


@pytest.mark.parametrize("change", [replace_content, touch])
def test_an_image_that_changed_in_size_or_time_is_extracted_again(album, stage, change):
    folder, words = album
    before = [run.read_features(folder / "run", "tiny_hiera", f"{i}.png") for i in range(3)]
    times = [run.feature_path(folder / "run", "tiny_hiera", f"{i}.png").stat() for i in range(3)]
    change(folder / "album/1.png")
    # Stage 2 takes the feature files as they are.
    assert "means over 3 images" in stage("02_metrics", "--run", folder / "run")
    said = stage("01_extract", *words)
    path = run.feature_path(folder / "run", "tiny_hiera", "1.png")
    image = folder / "album/1.png"
    assert f"extracting {path} again: {image} has changed since its features were made\n" in said
    assert said.count("again:") == 1 and ": 1 are to be extracted" in said
    for i in range(3):
        maps = run.read_features(folder / "run", "tiny_hiera", f"{i}.png")
        is_same = maps[4].shape == before[i][4].shape and torch.equal(maps[4], before[i][4])
        assert is_same == (i != 1 or change is touch)
        path = run.feature_path(folder / "run", "tiny_hiera", f"{i}.png")
        assert (path.stat().st_ino == times[i].st_ino) == (i != 1)
    assert ": 0 are to be extracted" in stage("01_extract", *words)


def test_an_image_that_is_gone_is_left_out(album, stage):
    folder, words = album
    (folder / "album/1.png").unlink()
    (folder / "album/1.png").symlink_to(folder / "nowhere.png")
    said = stage("01_extract", *words)
    assert said.count("left out: ") == 1 and "album/1.png" in said
    run_config = json.loads((folder / "run/run.json").read_text())
    assert list(run_config["left_out"]) == ["1.png"]


def test_images_keep_their_size_on_request(stage, tmp_path):
    (tmp_path / "album").mkdir()
    for name, height, width in (("a", 192, 256), ("b", 100, 70), ("c", 20, 60)):
        image = Image.fromarray(SCENE).resize((width, height))
        image.save(tmp_path / f"album/{name}.png")
    words = ["--images", tmp_path / "album", "--run", tmp_path / "run", "--size", "original"]
    stage("01_extract", *words, "--encoders", "tiny_hiera", "--workers", 0)
    run_config = json.loads((tmp_path / "run/run.json").read_text())
    assert run_config["size"] == "original" and run_config["left_out"] == {}
    shapes = []
    for name in run_config["images"]:
        shapes.append(run.read_features(tmp_path / "run", "tiny_hiera", name)[4].shape[1:])
    assert shapes == [(48, 64), (24, 16), (8, 16)]  # of 192 x 256, 96 x 64 and 32 x 64 pixels
    assert "means over 3 images" in stage("02_metrics", "--run", tmp_path / "run")
