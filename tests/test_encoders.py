"""The encoders: their maps against the published models put together by hand, and their weights,
which are loaded whole or refused."""

import copy
import hashlib
import pickle
import socket
import time

from common import encoders
from common.encoders import (
    ENCODERS,
    Encoder,
    find_encoder,
    load_encoder,
    load_weights,
    pyramid,
    weights_origin,
)
from common.run import UserError

import pytest
import torch
import torch.nn.functional as F
from conftest import free_memory
from safetensors.torch import save_file

# Each of these has a smaller sibling of the same code.
BIG = ["dinov3_b", "dinov3_l", "sam2_b", "sam2_l"]
# Its weights are rounded to bfloat16 and kept so in a file: float32 would take 1.2 GB more.
HALVED = ["dinov3_l"]

EVERY_ENCODER = []
for encoder_name in ENCODERS:
    if encoder_name in BIG:
        EVERY_ENCODER.append(pytest.param(encoder_name, marks=pytest.mark.slow))
    else:
        EVERY_ENCODER.append(encoder_name)


@pytest.fixture(scope="module", params=EVERY_ENCODER)
def encoder(request):
    """Each encoder once. Noise moves its weights away from the initial zeros and ones."""
    torch.manual_seed(0)
    encoder = load_encoder(request.param, "none").requires_grad_(False)
    for parameter in encoder.parameters():
        parameter += 0.02 * torch.randn_like(parameter)
        if request.param in HALVED:
            parameter.copy_(parameter.bfloat16())
    yield encoder
    for parameter in encoder.parameters():  # pytest holds the encoder for a while
        parameter.data = parameter.new_empty(0)
    free_memory()


def maps_of(encoder, images):
    with torch.inference_mode():
        return encoder(images)


def assert_equal_maps(got, expected):
    assert list(got) == list(expected)
    for stride, feature in expected.items():
        assert torch.equal(got[stride], feature)


@pytest.mark.parametrize("height, width", [(32, 32), (64, 96), (256, 512), (96, 1056)])
def test_maps_have_the_promised_shapes(encoder, height, width):
    maps = maps_of(encoder, torch.rand(1, 3, height, width))
    channels = ENCODERS[encoder.name].channels
    assert list(maps) == list(channels)
    for stride, feature in maps.items():
        assert feature.shape == (1, channels[stride], height // stride, width // stride)
        assert feature.isfinite().all()
        assert feature.std() > 0
    levels = pyramid(maps, (height, width))
    assert list(levels) == [4, 8, 16, 32]
    for stride, feature in levels.items():
        assert feature.shape[-2:] == (height // stride, width // stride)


def test_encoders_have_their_published_sizes(encoder):
    millions = {
        "dinov3_s": 21.6,
        "dinov3_b": 85.6,
        "dinov3_l": 303.1,
        "dinov2_b": 86.6,
        "dino_b": 85.8,
        "clip_b": 85.8,
        "sam_b": 89.7,
        "sam2_t": 26.8,
        "sam2_b": 68.7,
        "sam2_l": 212.1,
        "swin_b": 86.9,
        "tiny_vit": 1.29,
        "tiny_hiera": 0.80,
    }
    count = sum(parameter.numel() for parameter in encoder.parameters())
    assert count / 1e6 == pytest.approx(millions[encoder.name], rel=0.005)


def test_a_batch_of_two_equals_two_of_one(encoder):
    images = torch.rand(2, 3, 64, 96)
    both = maps_of(encoder, images)
    first = maps_of(encoder, images[:1])
    second = maps_of(encoder, images[1:])
    for stride, maps in both.items():
        expected = torch.cat([first[stride], second[stride]])
        torch.testing.assert_close(maps, expected, rtol=1e-4, atol=1e-4)


def test_sides_that_are_no_multiple_of_32_are_refused():
    with pytest.raises(ValueError, match="multiples of 32"):
        load_encoder("tiny_vit", "none")(torch.rand(1, 3, 48, 64))


# ------------------------------------------------------------------ by hand


def resampled(table, size):
    """A square table of positions [1, N, C] at another size, [1, h * w, C]."""
    side = int(table.shape[1] ** 0.5)
    table = table.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    return F.interpolate(table, size, mode="bicubic", antialias=True).flatten(2).transpose(1, 2)


def patches(model, images):
    """Non-overlapping patches through one linear map, [B, N, C], and the grid's (height, width)."""
    conv = model.patch_embed.proj
    grid = F.conv2d(images, conv.weight, conv.bias, stride=conv.kernel_size)
    return grid.flatten(2).transpose(1, 2), grid.shape[-2:]


def prepend(tokens, x):
    """The same tokens [1, n, C] before the patches of each image [B, N, C]."""
    return torch.cat([tokens.expand(len(x), -1, -1), x], 1)


def dino(model, images):
    x, grid = patches(model, images)
    x = x + resampled(model.pos_embed[:, 1:], grid)
    x = prepend(model.cls_token + model.pos_embed[:, :1], x)
    for block in model.blocks:
        x = block(x)
    return {16: model.norm(x)[:, 1:].transpose(1, 2).unflatten(2, grid)}


def clip(model, images):
    x, grid = patches(model, images)
    x = x + resampled(model.pos_embed[:, 1:], grid)
    x = prepend(model.cls_token + model.pos_embed[:, :1], x)
    x = model.norm_pre(x)
    for block in model.blocks:
        x = x + block.attn(block.norm1(x))
        hidden = block.mlp.fc1(block.norm2(x))
        x = x + block.mlp.fc2(hidden * torch.sigmoid(1.702 * hidden))  # OpenAI's quick GELU
    assert model.norm.eps == 1e-5
    return {16: model.norm(x)[:, 1:].transpose(1, 2).unflatten(2, grid)}


def dinov2(model, images):
    height, width = images.shape[-2:]
    size = (height * 14 // 16, width * 14 // 16)
    images = F.interpolate(images, size, mode="bicubic", antialias=True)
    x, grid = patches(model, images)
    x = x + resampled(model.pos_embed, grid)  # the class token's own position is added into it
    x = prepend(torch.cat([model.cls_token, model.reg_token], 1), x)
    for block in model.blocks:
        x = x + block.ls1.gamma * block.attn(block.norm1(x))
        x = x + block.ls2.gamma * block.mlp(block.norm2(x))
    return {16: model.norm(x)[:, 5:].transpose(1, 2).unflatten(2, grid)}


def dinov3(model, images):
    x, (h, w) = patches(model, images)
    x = prepend(torch.cat([model.cls_token, model.reg_token], 1), x)
    # Rotary positions: patch centres in [-1, 1] along each axis, with periods from 1 to 100. Both
    # halves of a head's channels turn by the same angles.
    quarter = x.shape[-1] // model.blocks[0].attn.num_heads // 4
    periods = 100 ** (torch.arange(quarter) / quarter)
    row_centres = (torch.arange(h) + 0.5) / h * 2 - 1
    column_centres = (torch.arange(w) + 0.5) / w * 2 - 1
    rows, columns = torch.meshgrid(row_centres, column_centres, indexing="ij")
    centres = torch.stack([rows.flatten(), columns.flatten()], -1)  # [N, 2]
    angles = 2 * torch.pi * centres[..., None] / periods  # [N, 2, D/4]
    angles = angles.flatten(1).tile(1, 2)  # [N, D]
    for block in model.blocks:
        x = block(x, rope=torch.cat([angles.sin(), angles.cos()], -1))
    return {16: model.norm(x)[:, 5:].transpose(1, 2).unflatten(2, (h, w))}


def sam(model, images):
    x, grid = patches(model, images)
    x = x.unflatten(1, grid) + resampled(model.pos_embed.flatten(1, 2), grid).unflatten(1, grid)
    for block in model.blocks:
        x = block(x)  # [B, h, w, C]

    def norm(x, layer):  # over channels
        mean = x.mean(1, keepdim=True)
        variance = x.var(1, keepdim=True, unbiased=False)
        x = (x - mean) / (variance + 1e-6).sqrt()
        return x * layer.weight[:, None, None] + layer.bias[:, None, None]

    first, norm1, second, norm2 = model.neck
    x = norm(F.conv2d(x.permute(0, 3, 1, 2), first.weight), norm1)
    return {16: norm(F.conv2d(x, second.weight, padding=1), norm2)}


def hiera(model, images):
    conv = model.patch_embed.proj
    x = F.conv2d(images, conv.weight, conv.bias, stride=4, padding=3)
    window = model.pos_embed_window
    position = F.interpolate(model.pos_embed, x.shape[-2:], mode="bicubic")
    # The window's table of 8 x 8 positions repeats over the image.
    times = [-(-side // 8) for side in x.shape[-2:]]
    position = position + window.tile(1, 1, *times)[..., : x.shape[2], : x.shape[3]]
    x = (x + position).permute(0, 2, 3, 1)
    maps = {}
    for i, block in enumerate(model.blocks):
        x = block(x)
        if i in model.stage_ends:
            maps[4 * 2 ** len(maps)] = x.permute(0, 3, 1, 2)
    return maps


def swin(model, images):
    x, grid = patches(model, images)
    x = model.patch_embed.norm(x).unflatten(1, grid)  # [B, h, w, C]
    maps = {}
    for i, stage in enumerate(model.layers):
        if i > 0:  # patch merging: the four pixels of each 2 x 2 side by side, columns outermost
            left = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2]], -1)
            right = torch.cat([x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
            merged = torch.cat([left, right], -1)
            x = stage.downsample.reduction(stage.downsample.norm(merged))
        for block in stage.blocks:
            x = block(x)
        maps[4 * 2**i] = x.permute(0, 3, 1, 2)
    return maps


BY_HAND = {
    "dino_b": dino,
    "clip_b": clip,
    "dinov2_b": dinov2,
    "dinov3_s": dinov3,
    "dinov3_b": dinov3,
    "dinov3_l": dinov3,
    "sam_b": sam,
    "sam2_t": hiera,
    "sam2_b": hiera,
    "sam2_l": hiera,
    "swin_b": swin,
    "tiny_vit": dinov3,
    "tiny_hiera": hiera,
}


def test_maps_equal_the_official_forward_by_hand(encoder):
    if encoder.name == "clip_b":
        mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
        std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    else:
        mean = torch.tensor([0.485, 0.456, 0.406])
        std = torch.tensor([0.229, 0.224, 0.225])
    images = torch.rand(2, 3, 128, 192)
    normalised = (images - mean[:, None, None]) / std[:, None, None]
    got = maps_of(encoder, images)
    with torch.inference_mode():
        expected = BY_HAND[encoder.name](encoder.model, normalised)
    assert list(got) == list(expected)
    for stride, feature in expected.items():
        tolerance = 1e-3 * feature.std().item()
        torch.testing.assert_close(got[stride], feature, rtol=1e-3, atol=tolerance)


# ------------------------------------------------------------------ pyramid


def test_pyramid_takes_the_nearest_native_stride():
    native = {8: torch.rand(1, 2, 8, 8), 32: torch.rand(1, 3, 2, 2)}
    levels = pyramid(native, (64, 64))
    assert levels[8] is native[8]
    assert levels[32] is native[32]
    doubled = native[8].repeat_interleave(2, -1).repeat_interleave(2, -2)
    torch.testing.assert_close(levels[4], doubled)
    # 8 and 32 are equally close, and the finer one is taken, which has two channels.
    assert levels[16].shape == (1, 2, 4, 4)


@pytest.mark.parametrize("name", ["tiny_hiera", "swin_b", "timm:resnet10t"])
def test_truncation_drops_later_stages_and_changes_nothing_before(name):
    whole = load_encoder(name, "none")
    truncated = load_encoder(name, "none")
    truncated.load_state_dict(whole.state_dict())
    truncated.truncate(8)
    images = torch.rand(1, 3, 64, 64)
    maps = maps_of(whole, images)
    assert_equal_maps(maps_of(truncated, images), {4: maps[4], 8: maps[8]})
    assert list(truncated.channels) == [4, 8]
    size = sum(parameter.numel() for parameter in truncated.parameters())
    assert size < 0.2 * sum(parameter.numel() for parameter in whole.parameters())


def test_truncation_keeps_the_native_stride_nearest_to_a_level():
    vit = load_encoder("tiny_vit", "none")
    vit.truncate(4)
    assert list(vit.channels) == [16]
    assert vit.channels_at(4) == vit.channels_at(32) == 128


@pytest.mark.parametrize(
    "name, strides",
    [
        ("resnet10t", [4, 8, 16, 32]),
        ("vit_tiny_patch16_224", [16]),
        ("vit_small_patch8_224.dino", [8]),
        ("convnext_atto", [4, 8, 16, 32]),
    ],
)
def test_any_timm_model_joins_by_its_name(name, strides):
    encoder = load_encoder(f"timm:{name}", "none")
    maps = maps_of(encoder, torch.rand(1, 3, 64, 160))
    assert list(maps) == list(encoder.channels) == strides
    for stride, feature in maps.items():
        assert feature.shape[1:] == (encoder.channels[stride], 64 // stride, 160 // stride)
    assert find_encoder(f"timm:{name}").hub[0].startswith(f"timm/{name}")


@pytest.mark.parametrize(
    "name, reason",
    [
        ("resnet9000", "has no model"),
        ("resnet50.nosuch", "has no model"),
        ("beit_base_patch16_224", "of any size"),
    ],
)
def test_timm_models_that_cannot_serve_are_refused_by_name(name, reason):
    with pytest.raises(UserError, match=f"({name}.*{reason}|{reason}.*{name})"):
        find_encoder(f"timm:{name}")


# ------------------------------------------------------------------ weights


def official(encoder: Encoder) -> dict:
    """An encoder's weights in the layout in which their authors publish them."""
    state = dict(encoder.model.state_dict())
    family = encoder.name.split("_")[0]
    if family == "sam2":
        return official_sam2(state)
    if family == "sam":
        return official_sam(state)
    if family == "dinov2":
        return official_dinov2(encoder, state)
    if family == "swin":
        return official_swin(state)
    if family == "dinov3":
        return official_dinov3(state)
    return state  # DINO's layout is timm's, CLIP and the shipped ones have no other


def official_sam2(state):
    renamed = {"sam_mask_decoder.iou_token.weight": torch.zeros(1, 256)}
    for key, value in state.items():
        renamed[f"image_encoder.trunk.{key}"] = value
    return {"model": renamed}


def official_sam(state):
    renamed = {"mask_decoder.iou_token.weight": torch.zeros(1, 256)}
    for key, value in state.items():
        key = key.replace("mlp.fc", "mlp.lin")
        renamed[f"image_encoder.{key}"] = value
    return renamed


def official_dinov2(encoder, state):
    """The class token's position lies in the table. Rounding makes their sum exact in float32."""
    position = torch.randint(-8, 8, (1, 1, 768)) / 64
    encoder.model.cls_token.copy_((state["cls_token"] * 1024).round() / 1024)
    state["cls_token"] = encoder.model.cls_token - position
    state["pos_embed"] = torch.cat([position, state["pos_embed"]], 1)
    state["register_tokens"] = state.pop("reg_token")
    state["mask_token"] = torch.zeros(1, 768)
    return state


def official_swin(state):
    """Microsoft merges patches at a stage's end, timm at the beginning of the next one."""
    renamed = {"norm.weight": torch.ones(1024), "layers.0.blocks.1.attn_mask": torch.zeros(64, 144)}
    for key, value in state.items():
        for stage in (1, 2, 3):
            if key.startswith(f"layers.{stage}.downsample"):
                key = key.replace(f"layers.{stage}", f"layers.{stage - 1}")
                break
        renamed[key] = value
    return {"model": renamed}


def official_dinov3(state):
    channels = state["cls_token"].shape[-1]
    renamed = {"mask_token": torch.zeros(1, channels), "rope_embed.periods": torch.ones(16)}
    names = {"gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma", "reg_token": "storage_tokens"}
    for key, value in state.items():
        for timms, metas in names.items():
            key = key.replace(timms, metas)
        renamed[key] = value
        if key.endswith("qkv.weight"):
            renamed[key.replace("weight", "bias")] = torch.zeros(len(value))
            renamed[key.replace("weight", "bias_mask")] = torch.ones(len(value))
    return renamed


@pytest.mark.parametrize("layout", ["official", "library"])
def test_a_checkpoint_file_loads_back_to_identical_maps(encoder, layout, tmp_path):
    if layout == "official":
        file = tmp_path / "weights.pth"
        torch.save(official(encoder), file)
    else:
        file = tmp_path / "model.safetensors"
        state = encoder.model.state_dict()
        if encoder.name in HALVED:
            state = {key: value.bfloat16() for key, value in state.items()}
        save_file(state, file)
        del state
    images = torch.rand(1, 3, 64, 96)
    expected = maps_of(encoder, images)
    # The largest encoders do not fit into a few GB twice and with their file.
    for parameter in encoder.parameters():
        parameter.data = parameter.new_empty(0)
    free_memory()
    loaded = load_encoder(encoder.name, str(file))
    assert_equal_maps(maps_of(loaded, images), expected)
    for parameter, again in zip(encoder.parameters(), loaded.parameters(), strict=True):
        parameter.data = again.data


# timm's converters treat these in a way of their own.
TABLES = ("patch_embed.proj.weight", "pos_embed", "relative_position_bias_table")


def small_copy(state):
    """Zeros of the same shapes. One number for each tensor makes a small file."""
    return {key: value.new_zeros(()).expand(value.shape) for key, value in state.items()}


def test_files_that_do_not_fit_are_refused_in_one_line(encoder, tmp_path):
    file = tmp_path / "file.pth"
    other = copy.deepcopy(encoder)
    good = small_copy(encoder.model.state_dict())
    first, *_, last = good
    missing = dict(good)
    del missing[last]
    nan = torch.full_like(good[last], torch.nan)
    cases = [
        (missing, f"Missing key.*{last}"),
        (missing | {f"renamed.{last}": good[last]}, f"Missing key.*{last}"),
        (good | {last: good[last].to(torch.int8)}, f"{last} holds torch.int8"),
        (good | {last: nan}, f"{last} is not finite"),
        ({"surplus.weight": torch.ones(3)}, f"Missing key.*{first}.*,"),
    ]
    tables = [key for key in good if key.endswith(TABLES)]
    for key in [last, *tables][:6]:
        cases.append((good | {key: torch.ones(3)}, f"size mismatch for {key}"))
    for state, reason in cases:
        torch.save(state, file)
        with pytest.raises(UserError, match=reason) as error:
            load_weights(other, file)
        message = str(error.value)
        assert "\n" not in message
        assert str(file) in message
        assert len(message) < 600


def test_timm_files_come_with_heads_and_final_norms(tmp_path):
    file = tmp_path / "model.safetensors"
    images = torch.rand(1, 3, 64, 64)
    for name in ("swin_b", "clip_b"):
        encoder = load_encoder(name, "none")
        state = encoder.model.state_dict()
        with torch.device("meta"):  # the classifier as timm publishes it
            classifier = encoders.timm.create_model(ENCODERS[name].model).state_dict()
        published = dict(state)
        for key in classifier.keys() - state.keys():
            published[key] = torch.zeros(classifier[key].shape)
        assert any("head" in key for key in published)
        save_file(published, file)
        loaded = load_encoder(name, file)
        assert_equal_maps(maps_of(loaded, images), maps_of(encoder, images))


@pytest.mark.parametrize(
    "name, key, change",
    [
        # DINO's other ViT-B has patches of 8 pixels.
        ("dino_b", "patch_embed.proj.weight", lambda table: table[..., :8, :8]),
        ("dino_b", "pos_embed", lambda table: table[:, : 1 + 7 * 7]),
        ("dinov2_b", "pos_embed", lambda table: table[:, : 16 * 16]),
        # Swin's other windows are 7 wide.
        ("swin_b", "relative_position_bias_table", lambda table: table[: 13 * 13]),
    ],
)
def test_tables_of_another_size_are_refused_not_resampled(name, key, change, tmp_path):
    file = tmp_path / "other.pth"
    state = small_copy(load_encoder(name, "none").model.state_dict())
    for tensor_name, value in state.items():
        if tensor_name.endswith(key):
            state[tensor_name] = change(value).clone()
    torch.save(state, file)
    with pytest.raises(UserError, match=f"{key} is of another size"):
        load_encoder(name, file)


def test_tables_of_another_size_are_refused_under_openclip_s_names_too(tmp_path):
    """timm converts OpenCLIP's files for its plain ViTs."""
    name = "timm:vit_tiny_patch16_224"
    file = tmp_path / "openclip.pth"
    state = load_encoder(name, "none").model.state_dict()
    published = {f"visual.trunk.{key}": value for key, value in state.items()}
    torch.save(published, file)
    assert torch.equal(load_encoder(name, file).model.pos_embed, state["pos_embed"])
    published["visual.trunk.pos_embed"] = state["pos_embed"][:, : 1 + 7 * 7]
    torch.save(published, file)
    with pytest.raises(UserError, match="pos_embed is of another size"):
        load_encoder(name, file)


def test_missing_and_damaged_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        load_encoder("tiny_vit", tmp_path / "nowhere.safetensors")
    save_file(load_encoder("tiny_vit").model.state_dict(), tmp_path / "whole.safetensors")
    content = (tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "damaged.safetensors").write_bytes(content[:-100])
    with pytest.raises(UserError, match="cannot be read as tensors"):
        load_encoder("tiny_vit", tmp_path / "damaged.safetensors")


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
    file = tmp_path / "checkpoint.pt"
    encoder = load_encoder("tiny_hiera", "none")
    state = {}
    for key, value in encoder.model.state_dict().items():
        state[f"pyramid.auxiliary.model.{key}"] = value
    # The decoder's and the other encoder's tensors lie beside it.
    other = load_encoder("tiny_vit", "none")
    for key, value in other.model.state_dict().items():
        state[f"pyramid.master.model.{key}"] = value
    state["pixel_decoder.level_embed"] = torch.ones(3, 64)
    training = {"master": "tiny_vit", "auxiliary": "tiny_hiera", "fusion": "replace"}
    torch.save({"model": state, "training": training}, file)
    for expected in (encoder, other):
        loaded = load_encoder(expected.name, file).model.state_dict()
        for key, value in expected.model.state_dict().items():
            assert torch.equal(loaded[key], value)
    with pytest.raises(UserError, match="sam2_t: .* of a run with tiny_vit and tiny_hiera$"):
        load_encoder("sam2_t", file)

    without_last_stage = {key: state[key] for key in state if "blocks.6" not in key}
    torch.save({"model": without_last_stage, "training": training}, file)
    with pytest.raises(UserError, match="its run dropped the stages.*Missing key.*blocks.6"):
        load_encoder("tiny_hiera", file)

    training = {"master": "tiny_vit", "auxiliary": None, "fusion": "none"}
    torch.save({"model": state, "training": training}, file)
    with pytest.raises(UserError, match="tiny_hiera: .* of a run with tiny_vit$"):
        load_encoder("tiny_hiera", file)


def test_the_origin_of_weights_is_recorded_with_their_hash(tmp_path):
    file = tmp_path / "mine.safetensors"
    save_file(load_encoder("tiny_vit").model.state_dict(), file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert weights_origin("tiny_vit", str(file)) == f"{file} sha256:{digest}"
    assert weights_origin("tiny_vit", "none") == "random"
    shipped = weights_origin("tiny_vit", "pretrained")
    assert shipped.startswith("common/tiny_vit.safetensors sha256:")


@pytest.mark.parametrize("network", ["off", "mute"])
def test_pretrained_without_a_network_fails_fast_in_one_line(network, monkeypatch, tmp_path):
    monkeypatch.setattr(encoders.huggingface_hub, "try_to_load_from_cache", lambda *where: None)
    # The server takes the connection and never answers.
    with socket.create_server(("127.0.0.1", 0)) as server:
        if network == "mute":
            monkeypatch.setattr(encoders.huggingface_hub.constants, "HF_HUB_OFFLINE", False)
            url = f"http://127.0.0.1:{server.getsockname()[1]}/file"
            monkeypatch.setattr(encoders.huggingface_hub, "hf_hub_url", lambda *where: url)
            # The session at hand was made in conftest's offline mode.
            encoders.huggingface_hub.close_session()
        started = time.perf_counter()
        with pytest.raises(UserError, match="--weights dinov3_s=FILE") as error:
            load_encoder("dinov3_s")
        took = time.perf_counter() - started
    encoders.huggingface_hub.close_session()
    assert took < 5
    assert network == "off" or took > 2.5
    assert "\n" not in str(error.value)


def test_an_unknown_encoder_is_answered_with_the_known_ones():
    with pytest.raises(UserError, match="dinov3_b.*sam2_b"):
        load_encoder("dinov4")


@pytest.mark.parametrize("name", ["dinov3_s", "tiny_vit"])
def test_positions_of_dinov3_are_rescaled_in_training_alone(name):
    encoder = load_encoder(name, "none")
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        first = encoder(image)[16]
        assert torch.equal(encoder(image)[16], first)
        encoder.train()
        assert not torch.equal(encoder(image)[16], encoder(image)[16])
        assert torch.equal(encoder.eval()(image)[16], first)


@pytest.mark.parametrize(
    "content", [{"training": {"lr": 1}}, {"training": None}, {"model": torch.zeros(2)}]
)
def test_another_project_s_checkpoint_is_refused_in_a_line(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match="x.pt is another project's checkpoint|x.pt does not fit"):
        load_encoder("tiny_vit", str(tmp_path / "x.pt"))
