"""Any picture a person may have: shown to the encoders as a viewer would show it, or named and left out."""

import json
import os
import struct
import zlib

from common import run, toycity
from common.datasets import list_pictures, read_image
from common.run import UserError

import numpy as np
import pytest
import torch
from PIL import Image

SCENE = toycity.scene("val", 60)[0][100:292, 300:556]  # uint8 [192, 256, 3]


def png16(path, pixels):
    """A PNG of 16 bits a channel, [H, W, 3 or 4]; Pillow writes none."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

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


def test_grey_and_sixteen_bit_pictures_keep_their_tones(tmp_path):
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
    assert (read(tmp_path / "palette.png") == np.asarray(palette.convert("RGB"))).all()
    palette.save(tmp_path / "hole.png", transparency=palette.getpixel((5, 5)))
    hole = np.asarray(palette) == palette.getpixel((5, 5))
    assert (read(tmp_path / "hole.png")[hole] == 255).all() and hole.any()
    assert (read(tmp_path / "hole.png")[~hole] == np.asarray(palette.convert("RGB"))[~hole]).all()

    alpha = np.zeros(SCENE.shape[:2], np.uint8)
    alpha[:, 100:] = 128
    alpha[:, 200:] = 255
    expected = SCENE * (alpha[..., None] / 255) + 255 * (1 - alpha[..., None] / 255)
    Image.fromarray(np.dstack([SCENE, alpha])).save(tmp_path / "alpha.png")
    png16(tmp_path / "alpha16.png", np.dstack([SCENE, alpha]).astype(np.uint16) * 257)
    Image.fromarray(np.dstack([SCENE, alpha])).save(tmp_path / "alpha.webp", lossless=True, exact=True)
    for name in ("alpha.png", "alpha16.png", "alpha.webp"):
        assert np.abs(read(tmp_path / name) - expected).max() <= 1, name


def test_cmyk_keeps_its_colours_and_exif_turns_the_picture(tmp_path):
    for colour in [(230, 40, 40), (20, 200, 30), (255, 255, 255), (0, 0, 0)]:
        Image.new("RGB", (64, 48), colour).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=98)
        assert np.abs(read(tmp_path / "cmyk.jpg") - np.array(colour)).max() <= 4
    exif = Image.Exif()
    for orientation, turned in {
        3: np.rot90(SCENE, 2),
        6: np.rot90(SCENE, -1),
        8: np.rot90(SCENE),
        2: SCENE[:, ::-1],
    }.items():
        exif[0x0112] = orientation
        Image.fromarray(SCENE).save(tmp_path / "turned.png", exif=exif)
        assert (read(tmp_path / "turned.png") == turned).all(), orientation
    exif[0x0112] = 6
    tones = grey(SCENE)
    for pixels in (tones, tones.astype(np.uint16) * 257, np.dstack([SCENE, tones | 255])):  # uncompressed, in each mode
        Image.fromarray(pixels).save(tmp_path / "turned.tif", exif=exif)
        expected = SCENE if pixels.ndim == 3 else np.repeat(tones[..., None], 3, -1)
        assert (read(tmp_path / "turned.tif") == np.rot90(expected, -1)).all(), pixels.dtype


def test_numbers_that_no_screen_shows_are_refused(tmp_path):
    Image.fromarray(SCENE[..., 0].astype(np.float32)).save(tmp_path / "depth.tif")
    with pytest.raises(UserError, match="depth.tif cannot be read as a picture .*16 bits"):
        read_image(tmp_path / "depth.tif")


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
    bad = ["letter.jpg", "half.jpg", "tape.png", "deep.tif", f"{'long' * 55}.png"]
    (folder / "letter.jpg").write_text("Dear grandmother,")
    (folder / "half.jpg").write_bytes((folder / "large.jpg").read_bytes()[:20_000])
    Image.fromarray(SCENE).save(folder / "summer 2019__same name.png")  # its features are no other picture's
    Image.fromarray(SCENE).resize((900, 20)).save(folder / "tape.png")
    Image.fromarray(SCENE[..., 0].astype(np.float32)).save(folder / "deep.tif")
    Image.fromarray(SCENE).save(folder / bad[-1])
    os.link(folder / "grey.PNG", os.fsencode(folder) + b"/caf\xe9.png")  # from an old disk
    (folder / "notes.txt").write_text("no picture, and does not say so")
    return folder, bad


def test_a_folder_of_everything_runs_and_names_what_it_leaves_out(shoebox, stage, tmp_path):
    folder, bad = shoebox
    words = ["--images", folder, "--run", tmp_path / "run", "--size", "64"]
    said = stage("01_extract", *words, "--workers", 1)
    lines = [line for line in said.splitlines() if line.startswith("left out: ")]
    for name in (*bad, "caf\\udce9"):
        assert sum(name in line for line in lines) == 1, name
    assert len(lines) == len(bad) + 1
    asked = json.loads((tmp_path / "run/run.json").read_text())
    good = [name for name in list_pictures(folder) if name not in bad and not name.startswith("caf")]
    assert [name for name in asked["images"] if name not in asked["left_out"]] == good and len(good) == 12
    shapes = {
        name: run.read_features(tmp_path / "run", "tiny_vit", name, run.fingerprint(folder / name))[16].shape
        for name in good
    }
    assert shapes["turned.jpg"] == (128, 6, 4) and shapes["cmyk.jpg"] == shapes["large.jpg"] == (128, 4, 6)
    assert shapes["tiny.jpg"] == (128, 4, 4)

    again = stage("01_extract", *words)  # the same again: nothing to write, the same left out
    assert f"; {len(bad) + 1} are still to be extracted" in again and "GB to write" not in again
    assert json.loads((tmp_path / "run/run.json").read_text()) == asked
    assert f"means over {len(good)} images" in stage("02_metrics", "--run", tmp_path / "run")

    # The maps do not depend on the number of workers
    stage("01_extract", "--images", folder, "--run", tmp_path / "other", "--size", "64", "--workers", 3)
    for name in good:
        for encoder in ("tiny_vit", "tiny_hiera"):
            one, other = (
                run.read_features(tmp_path / f, encoder, name, run.fingerprint(folder / name)) for f in ("run", "other")
            )
            assert all(torch.equal(one[s], other[s]) for s in one)


def test_a_folder_of_nothing_usable_is_an_error(stage, tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/one.jpg").write_text("Dear uncle,")
    with pytest.raises(UserError, match="none of the 1 pictures of .*letters can be used"):
        stage("01_extract", "--images", tmp_path / "letters", "--run", tmp_path / "run")
