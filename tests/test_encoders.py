"""The encoder zoo: maps of the promised shapes, and weights that are either loaded whole or refused."""

import pickle
import time

import pytest
import torch
from safetensors.torch import save_file

from common import encoders
from common.encoders import ENCODERS, Encoder, load_encoder, pyramid
from common.run import UserError

SMALL = ["tiny_vit", "tiny_hiera", "dinov3_s", "sam2_t"]


@pytest.mark.parametrize("name", SMALL)
def test_maps_have_the_promised_shapes(name):
    encoder = load_encoder(name, "none")
    for height, width in [(32, 32), (64, 96), (96, 256)]:
        with torch.inference_mode():
            maps = encoder(torch.rand(2, 3, height, width))
            levels = pyramid(maps, (height, width))
        channels = ENCODERS[name].channels
        assert {s: m.shape for s, m in maps.items()} == {
            s: (2, c, height // s, width // s) for s, c in channels.items()
        }
        assert {s: m.shape[-2:] for s, m in levels.items()} == {s: (height // s, width // s) for s in (4, 8, 16, 32)}


@pytest.mark.parametrize("name", sorted(set(ENCODERS) - set(SMALL)))
def test_large_encoders_have_their_real_sizes(name):
    millions = {"dinov3_b": 85.6, "dinov3_l": 303.1, "sam2_b": 68.7, "sam2_l": 212.1}[name]
    with torch.device("meta" if ENCODERS[name].family == "vit" else "cpu"):  # Hiera cannot be built without memory
        encoder = Encoder(name, ENCODERS[name])
    assert sum(p.numel() for p in encoder.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


@pytest.mark.parametrize("name", ["tiny_vit", "tiny_hiera"])
def test_a_batch_of_two_equals_two_of_one(name):
    encoder, images = load_encoder(name), torch.rand(2, 3, 64, 96)
    with torch.inference_mode():
        both, each = encoder(images), [encoder(image[None]) for image in images]
    for stride, maps in both.items():
        torch.testing.assert_close(maps, torch.cat([one[stride] for one in each]), rtol=1e-4, atol=1e-4)


def test_sides_that_are_no_multiple_of_32_are_refused():
    with pytest.raises(ValueError, match="multiples of 32"):
        load_encoder("tiny_vit", "none")(torch.rand(1, 3, 48, 64))


def test_maps_are_the_library_forward_on_normalised_images():
    """By hand from the library's pieces: mean and std as published, prefix tokens dropped, rows before columns."""
    images = torch.rand(1, 3, 64, 96)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalised = ((images.permute(0, 2, 3, 1) - mean) / std).permute(0, 3, 1, 2)
    vit, hiera = load_encoder("tiny_vit"), load_encoder("tiny_hiera")
    with torch.inference_mode():
        tokens = vit.model.forward_features(normalised)
        grid = vit(images)[16]
        assert tokens.shape == (1, 1 + 4 + 4 * 6, 128)  # class token, four registers, 64/16 x 96/16 patches
        torch.testing.assert_close(grid[0, :, 1, 2], tokens[0, 5 + 1 * 6 + 2])
        for ours, theirs in zip(hiera(images).values(), hiera.model(normalised), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_pyramid_takes_the_nearest_native_stride():
    native = {8: torch.rand(1, 2, 8, 8), 32: torch.rand(1, 3, 2, 2)}
    levels = pyramid(native, (64, 64))
    assert levels[8] is native[8] and levels[32] is native[32]
    torch.testing.assert_close(levels[4], native[8].repeat_interleave(2, -1).repeat_interleave(2, -2))
    assert levels[16].shape == (1, 2, 4, 4)  # 8 and 32 are equally close, the finer one is taken


def test_cutting_drops_later_stages_and_changes_nothing_before():
    whole, cut = load_encoder("tiny_hiera"), load_encoder("tiny_hiera")
    cut.cut(8)
    images = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        expected, got = whole(images), cut(images)
    assert list(got) == [4, 8] and list(cut.channels) == [4, 8]
    assert all(torch.equal(got[s], expected[s]) for s in got)
    assert sum(p.numel() for p in cut.parameters()) < 0.2 * sum(p.numel() for p in whole.parameters())


# ---------------------------------------------------------------------------------------------- weights


def official(encoder: Encoder) -> dict:
    """An encoder's weights as their authors publish them."""
    state = encoder.model.state_dict()
    if encoder.family == "hiera":
        extra = {"sam_mask_decoder.iou_token.weight": torch.zeros(1, 256)}
        return {"model": {f"image_encoder.trunk.{k}": v for k, v in state.items()} | extra}
    names = {"gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma", "reg_token": "storage_tokens"}
    meta = {"mask_token": torch.zeros(1, state["cls_token"].shape[-1]), "rope_embed.periods": torch.ones(16)}
    for key, value in state.items():
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        meta[key] = value
        if key.endswith("qkv.weight"):
            meta[key.replace("weight", "bias")] = torch.zeros(len(value))
            meta[key.replace("weight", "bias_mask")] = torch.ones(len(value))
    return meta


@pytest.mark.parametrize("name", ["dinov3_s", "sam2_t"])
@pytest.mark.parametrize("layout", ["official", "library"])
def test_a_checkpoint_file_loads_back_to_identical_maps(name, layout, tmp_path):
    encoder, images = load_encoder(name, "none"), torch.rand(1, 3, 32, 64)
    for parameter in encoder.parameters():  # away from values that every initialisation has in common
        parameter.data += 0.01 * torch.randn_like(parameter)
    if layout == "official":
        file = tmp_path / "weights.pth"
        torch.save(official(encoder), file)
    else:
        file = tmp_path / "model.safetensors"
        save_file(encoder.model.state_dict(), file)
    with torch.inference_mode():
        expected, got = encoder(images), load_encoder(name, str(file))(images)
    assert all(torch.equal(got[s], expected[s]) for s in expected)


def test_files_that_do_not_fit_are_refused(tmp_path):
    good = load_encoder("tiny_vit").model.state_dict()
    missing = {k: v for k, v in good.items() if k != "norm.weight"}
    save_file(missing, tmp_path / "missing.safetensors")
    with pytest.raises(UserError, match="norm.weight is missing"):
        load_encoder("tiny_vit", tmp_path / "missing.safetensors")
    save_file(good | {"norm.weight": torch.ones(64)}, tmp_path / "shape.safetensors")
    with pytest.raises(UserError, match=r"norm.weight is \[64\], not \[128\]"):
        load_encoder("tiny_vit", tmp_path / "shape.safetensors")
    with pytest.raises(UserError, match="there is no file"):
        load_encoder("tiny_vit", tmp_path / "nowhere.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "shape.safetensors").read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be read as tensors"):
        load_encoder("tiny_vit", tmp_path / "cut.safetensors")


def test_dinov3_files_with_live_biases_are_refused(tmp_path):
    state = official(load_encoder("dinov3_s", "none"))
    state["blocks.0.attn.qkv.bias"] += 1  # the model has no place for it
    torch.save(state, tmp_path / "biased.pth")
    with pytest.raises(UserError, match="biases"):
        load_encoder("dinov3_s", tmp_path / "biased.pth")


def test_a_pickle_that_runs_code_is_refused_unread(tmp_path):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"model": Attack()}))
    with pytest.raises(UserError, match="cannot be read as tensors"):
        load_encoder("sam2_t", tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_a_fine_tuned_encoder_comes_out_of_a_checkpoint(tmp_path):
    encoder = load_encoder("tiny_hiera", "none")
    state = {f"pyramid.auxiliary.model.{k}": v for k, v in encoder.model.state_dict().items()}
    settings = {"master": "tiny_vit", "auxiliary": "tiny_hiera"}
    torch.save({"model": state, "settings": settings}, tmp_path / "checkpoint.pt")
    loaded = load_encoder("tiny_hiera", tmp_path / "checkpoint.pt")
    assert all(torch.equal(v, loaded.model.state_dict()[k]) for k, v in encoder.model.state_dict().items())


def test_pretrained_offline_fails_fast_in_one_line(monkeypatch):
    monkeypatch.setattr(encoders.huggingface_hub, "try_to_load_from_cache", lambda *where: None)
    started = time.perf_counter()
    with pytest.raises(UserError, match="--weights dinov3_s=FILE") as error:
        load_encoder("dinov3_s")
    assert time.perf_counter() - started < 5 and "\n" not in str(error.value)


def test_an_unknown_encoder_is_answered_with_the_known_ones():
    with pytest.raises(UserError, match="dinov3_b.*sam2_b"):
        load_encoder("dinov4")
