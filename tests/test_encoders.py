"""The encoder zoo: maps as the published models make them, put together by hand; weights loaded whole or refused."""

import copy
import hashlib
import pickle
import socket
import time

from common import encoders
from common.encoders import ENCODERS, Encoder, find_encoder, load_encoder, pyramid, weights_origin
from common.run import UserError

import pytest
import torch
import torch.nn.functional as F
from conftest import free_memory
from safetensors.torch import save_file

BIG = ["dinov3_b", "dinov3_l", "sam2_b", "sam2_l"]  # each has a smaller sibling of the same code
HALVED = ["dinov3_l"]  # its weights are such as bfloat16 holds too: a file of float32 beside it would fill 1.2 GB more


@pytest.fixture(scope="module", params=[pytest.param(n, marks=[pytest.mark.slow] * (n in BIG)) for n in ENCODERS])
def encoder(request):
    """Each encoder once, its random weights moved away from values that every initialisation has in common."""
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


@pytest.mark.parametrize("height, width", [(32, 32), (64, 96), (256, 512), (96, 1056)])
def test_maps_have_the_promised_shapes(encoder, height, width):
    maps = maps_of(encoder, torch.rand(1, 3, height, width))
    channels = ENCODERS[encoder.name].channels
    assert {s: m.shape for s, m in maps.items()} == {s: (1, c, height // s, width // s) for s, c in channels.items()}
    assert all(m.isfinite().all() and m.std() > 0 for m in maps.values())
    levels = pyramid(maps, (height, width))
    assert {s: m.shape[-2:] for s, m in levels.items()} == {s: (height // s, width // s) for s in (4, 8, 16, 32)}


def test_encoders_have_their_published_sizes(encoder):
    millions = {
        "dinov3_s": 21.6, "dinov3_b": 85.6, "dinov3_l": 303.1, "dinov2_b": 86.6, "dino_b": 85.8, "clip_b": 85.8,
        "sam_b": 89.7, "sam2_t": 26.8, "sam2_b": 68.7, "sam2_l": 212.1, "swin_b": 86.9, "tiny_vit": 1.29,
        "tiny_hiera": 0.80,
    }  # fmt: skip
    assert sum(p.numel() for p in encoder.parameters()) / 1e6 == pytest.approx(millions[encoder.name], rel=0.005)


def test_a_batch_of_two_equals_two_of_one(encoder):
    images = torch.rand(2, 3, 64, 96)
    both, each = maps_of(encoder, images), [maps_of(encoder, image[None]) for image in images]
    for stride, maps in both.items():
        torch.testing.assert_close(maps, torch.cat([one[stride] for one in each]), rtol=1e-4, atol=1e-4)


def test_sides_that_are_no_multiple_of_32_are_refused():
    with pytest.raises(ValueError, match="multiples of 32"):
        load_encoder("tiny_vit", "none")(torch.rand(1, 3, 48, 64))


# ---------------------------------------------------------------------------------------------- by hand


def resampled(table, size):
    """A square table of positions [1, N, C] at another size, [1, h * w, C]."""
    side = int(table.shape[1] ** 0.5)
    table = table.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    return F.interpolate(table, size, mode="bicubic", antialias=True).flatten(2).transpose(1, 2)


def patches(model, images):
    """Non-overlapping patches through one linear map: [B, N, C], and the grid's height and width."""
    conv = model.patch_embed.proj
    grid = F.conv2d(images, conv.weight, conv.bias, stride=conv.kernel_size)
    return grid.flatten(2).transpose(1, 2), grid.shape[-2:]


def dino(model, images):
    x, grid = patches(model, images)
    x = x + resampled(model.pos_embed[:, 1:], grid)
    x = torch.cat([(model.cls_token + model.pos_embed[:, :1]).expand(len(x), -1, -1), x], 1)
    for block in model.blocks:
        x = block(x)
    return {16: model.norm(x)[:, 1:].transpose(1, 2).unflatten(2, grid)}


def clip(model, images):
    x, grid = patches(model, images)
    x = x + resampled(model.pos_embed[:, 1:], grid)
    x = torch.cat([(model.cls_token + model.pos_embed[:, :1]).expand(len(x), -1, -1), x], 1)
    x = model.norm_pre(x)
    for block in model.blocks:
        x = x + block.attn(block.norm1(x))
        hidden = block.mlp.fc1(block.norm2(x))
        x = x + block.mlp.fc2(hidden * torch.sigmoid(1.702 * hidden))  # OpenAI's quick GELU
    assert model.norm.eps == 1e-5
    return {16: model.norm(x)[:, 1:].transpose(1, 2).unflatten(2, grid)}


def dinov2(model, images):
    height, width = images.shape[-2:]
    images = F.interpolate(images, (height * 14 // 16, width * 14 // 16), mode="bicubic", antialias=True)
    x, grid = patches(model, images)
    x = x + resampled(model.pos_embed, grid)  # the class token's own position is added into it
    x = torch.cat([model.cls_token.expand(len(x), -1, -1), model.reg_token.expand(len(x), -1, -1), x], 1)
    for block in model.blocks:
        x = x + block.ls1.gamma * block.attn(block.norm1(x))
        x = x + block.ls2.gamma * block.mlp(block.norm2(x))
    return {16: model.norm(x)[:, 5:].transpose(1, 2).unflatten(2, grid)}


def dinov3(model, images):
    x, (h, w) = patches(model, images)
    x = torch.cat([model.cls_token.expand(len(x), -1, -1), model.reg_token.expand(len(x), -1, -1), x], 1)
    # Rotary positions: patch centres in [-1, 1] along each axis, periods 1 to 100, the same angles for both halves
    quarter = x.shape[-1] // model.blocks[0].attn.num_heads // 4
    periods = 100 ** (torch.arange(quarter) / quarter)
    rows, columns = torch.meshgrid(
        (torch.arange(h) + 0.5) / h * 2 - 1, (torch.arange(w) + 0.5) / w * 2 - 1, indexing="ij"
    )
    angles = 2 * torch.pi * torch.stack([rows.flatten(), columns.flatten()], -1)[..., None] / periods  # [N, 2, D/4]
    angles = angles.flatten(1).tile(1, 2)
    for block in model.blocks:
        x = block(x, rope=torch.cat([angles.sin(), angles.cos()], -1))
    return {16: model.norm(x)[:, 5:].transpose(1, 2).unflatten(2, (h, w))}


def sam(model, images):
    x, grid = patches(model, images)
    x = x.unflatten(1, grid) + resampled(model.pos_embed.flatten(1, 2), grid).unflatten(1, grid)
    for block in model.blocks:
        x = block(x)  # [B, h, w, C]

    def norm(x, layer):  # over channels
        mean, variance = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
        return (x - mean) / (variance + 1e-6).sqrt() * layer.weight[:, None, None] + layer.bias[:, None, None]

    first, norm1, second, norm2 = model.neck
    x = norm(F.conv2d(x.permute(0, 3, 1, 2), first.weight), norm1)
    return {16: norm(F.conv2d(x, second.weight, padding=1), norm2)}


def hiera(model, images):
    conv = model.patch_embed.proj
    x = F.conv2d(images, conv.weight, conv.bias, stride=4, padding=3)
    window = model.pos_embed_window
    position = F.interpolate(model.pos_embed, x.shape[-2:], mode="bicubic")
    times = [-(-side // 8) for side in x.shape[-2:]]  # the window's table, 8 x 8, repeats over the picture
    position = position + window.tile(1, 1, *times)[..., : x.shape[2], : x.shape[3]]
    x, maps = (x + position).permute(0, 2, 3, 1), {}
    for i, block in enumerate(model.blocks):
        x = block(x)
        if i in model.stage_ends:
            maps[4 * 2 ** len(maps)] = x.permute(0, 3, 1, 2)
    return maps


def swin(model, images):
    x, grid = patches(model, images)
    x, maps = model.patch_embed.norm(x).unflatten(1, grid), {}  # [B, h, w, C]
    for i, stage in enumerate(model.layers):
        if i > 0:  # patch merging: the four pixels of each 2 x 2 side by side, columns outermost
            corners = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
            x = stage.downsample.reduction(stage.downsample.norm(torch.cat(corners, -1)))
        for block in stage.blocks:
            x = block(x)
        maps[4 * 2**i] = x.permute(0, 3, 1, 2)
    return maps


CLIP_NORMALISATION = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
BY_HAND = {"dino": dino, "clip": clip, "dinov2": dinov2, "dinov3": dinov3, "sam": sam, "sam2": hiera, "swin": swin}
BY_HAND |= {"tiny_vit": dinov3, "tiny_hiera": hiera}


def test_maps_equal_the_official_forward_by_hand(encoder):
    family = encoder.name if "tiny" in encoder.name else encoder.name.split("_")[0]
    mean, std = CLIP_NORMALISATION if family == "clip" else ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    images = torch.rand(2, 3, 128, 192)
    normalised = ((images.permute(0, 2, 3, 1) - torch.tensor(mean)) / torch.tensor(std)).permute(0, 3, 1, 2)
    got = maps_of(encoder, images)
    with torch.inference_mode():
        expected = BY_HAND[family](encoder.model, normalised)
    assert list(got) == list(expected)
    for stride, feature in expected.items():
        torch.testing.assert_close(got[stride], feature, rtol=1e-3, atol=1e-3 * feature.std().item())


# ---------------------------------------------------------------------------------------------- pyramid


def test_pyramid_takes_the_nearest_native_stride():
    native = {8: torch.rand(1, 2, 8, 8), 32: torch.rand(1, 3, 2, 2)}
    levels = pyramid(native, (64, 64))
    assert levels[8] is native[8] and levels[32] is native[32]
    torch.testing.assert_close(levels[4], native[8].repeat_interleave(2, -1).repeat_interleave(2, -2))
    assert levels[16].shape == (1, 2, 4, 4)  # 8 and 32 are equally close, the finer one is taken


@pytest.mark.parametrize("name", ["tiny_hiera", "swin_b", "timm:resnet10t"])
def test_cutting_drops_later_stages_and_changes_nothing_before(name):
    whole = load_encoder(name, "none")
    cut = load_encoder(name, "none")
    cut.load_state_dict(whole.state_dict())
    cut.cut(8)
    images = torch.rand(1, 3, 64, 64)
    expected, got = maps_of(whole, images), maps_of(cut, images)
    assert list(got) == [4, 8] and list(cut.channels) == [4, 8]
    assert all(torch.equal(got[s], expected[s]) for s in got)
    assert sum(p.numel() for p in cut.parameters()) < 0.2 * sum(p.numel() for p in whole.parameters())


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224", "vit_small_patch8_224.dino", "convnext_atto"])
def test_any_timm_model_joins_by_its_name(name):
    encoder = load_encoder(f"timm:{name}", "none")
    maps = maps_of(encoder, torch.rand(1, 3, 64, 160))
    assert {s: m.shape[1:] for s, m in maps.items()} == {s: (c, 64 // s, 160 // s) for s, c in encoder.channels.items()}
    assert list(maps) == ([8] if "patch8" in name else [16] if "patch16" in name else [4, 8, 16, 32])
    assert find_encoder(f"timm:{name}").hub[0].startswith(f"timm/{name}")


@pytest.mark.parametrize(
    "name, reason",
    [("resnet9000", "has no model"), ("resnet50.nosuch", "has no model"), ("beit_base_patch16_224", "of any size")],
)
def test_timm_models_that_cannot_serve_are_refused_by_name(name, reason):
    with pytest.raises(UserError, match=f"({name}.*{reason}|{reason}.*{name})"):
        find_encoder(f"timm:{name}")


# ---------------------------------------------------------------------------------------------- weights


def official(encoder: Encoder) -> dict:
    """An encoder's weights in the layout in which their authors publish them."""
    state, family = dict(encoder.model.state_dict()), encoder.name.split("_")[0]
    if family == "sam2":
        extra = {"sam_mask_decoder.iou_token.weight": torch.zeros(1, 256)}
        return {"model": {f"image_encoder.trunk.{k}": v for k, v in state.items()} | extra}
    if family == "sam":
        state = {f"image_encoder.{k.replace('mlp.fc', 'mlp.lin')}": v for k, v in state.items()}
        return state | {"mask_decoder.iou_token.weight": torch.zeros(1, 256)}
    if family == "dinov2":  # the class token's position lies in the table; exact in float32, so that maps are equal
        position = torch.randint(-8, 8, (1, 1, 768)) / 64
        state["cls_token"] = (state["cls_token"] * 1024).round() / 1024
        encoder.model.cls_token.copy_(state["cls_token"])
        state["cls_token"] = state["cls_token"] - position
        state["pos_embed"] = torch.cat([position, state["pos_embed"]], 1)
        state["register_tokens"] = state.pop("reg_token")
        return state | {"mask_token": torch.zeros(1, 768)}
    if family == "swin":  # Microsoft's: patches are merged at a stage's end, not at the next one's beginning
        for i in (1, 2, 3):
            for key in [key for key in state if key.startswith(f"layers.{i}.downsample")]:
                state[key.replace(f"layers.{i}", f"layers.{i - 1}")] = state.pop(key)
        return {"model": state | {"norm.weight": torch.ones(1024), "layers.0.blocks.1.attn_mask": torch.zeros(64, 144)}}
    if family == "dinov3":
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
    return state  # DINO and timm agree; CLIP and the shipped ones have no other layout


@pytest.mark.parametrize("layout", ["official", "library"])
def test_a_checkpoint_file_loads_back_to_identical_maps(encoder, layout, tmp_path):
    if layout == "official":
        file = tmp_path / "weights.pth"
        torch.save(official(encoder), file)
    else:
        file, kind = tmp_path / "model.safetensors", torch.bfloat16 if encoder.name in HALVED else torch.float32
        save_file({key: value.to(kind) for key, value in encoder.model.state_dict().items()}, file)
    images = torch.rand(1, 3, 64, 96)
    expected = maps_of(encoder, images)
    for parameter in encoder.parameters():  # the largest do not fit into a few GB twice and with their file
        parameter.data = parameter.new_empty(0)
    free_memory()
    loaded = load_encoder(encoder.name, str(file))
    got = maps_of(loaded, images)
    assert all(torch.equal(got[s], expected[s]) for s in expected)
    for parameter, again in zip(encoder.parameters(), loaded.parameters(), strict=True):
        parameter.data = again.data


TABLES = ("patch_embed.proj.weight", "pos_embed", "relative_position_bias_table")  # timm's converters touch these


def test_files_that_do_not_fit_are_refused_in_one_line(encoder, tmp_path):
    file, other = tmp_path / "file.pth", copy.deepcopy(encoder)
    # What is refused is refused whatever it holds: one number for each tensor makes small files.
    good = {key: value.new_zeros(()).expand(value.shape) for key, value in encoder.model.state_dict().items()}
    last = list(good)[-1]
    missing = {k: v for k, v in good.items() if k != last}
    nan = torch.full_like(good[last], torch.nan)
    cases = [
        (missing, f"Missing key.*{last}"),
        (missing | {f"renamed.{last}": good[last]}, f"Missing key.*{last}"),
        (good | {last: good[last].to(torch.int8)}, f"{last} holds torch.int8"),
        (good | {last: nan}, f"{last} is not finite"),
        ({"surplus.weight": torch.ones(3)}, f"Missing key.*{next(iter(good))}.*,"),
    ]
    for key in [last, *(key for key in good if key.endswith(TABLES))][:6]:
        cases.append((good | {key: torch.ones(3)}, rf"size mismatch for {key}"))
    for state, reason in cases:
        torch.save(state, file)
        with pytest.raises(UserError, match=reason) as error:
            encoders._fill(other, file)
        assert "\n" not in str(error.value) and str(file) in str(error.value) and len(str(error.value)) < 600


def test_timm_files_come_with_heads_and_final_norms(tmp_path):
    for name in ("swin_b", "clip_b"):
        encoder, images = load_encoder(name, "none"), torch.rand(1, 3, 64, 64)
        with torch.device("meta"):
            classifier = encoders.timm.create_model(ENCODERS[name].model).state_dict()  # as timm publishes it
        state = encoder.model.state_dict()
        surplus = {key: torch.zeros(value.shape) for key, value in classifier.items() if key not in state}
        assert any("head" in key for key in surplus)
        save_file(surplus | state, tmp_path / "model.safetensors")
        expected, got = maps_of(encoder, images), maps_of(load_encoder(name, tmp_path / "model.safetensors"), images)
        assert all(torch.equal(got[s], expected[s]) for s in expected)


@pytest.mark.parametrize(
    "name, key, change",
    [
        ("dino_b", "patch_embed.proj.weight", lambda v: v[..., :8, :8]),  # DINO's other ViT-B, of 8-pixel patches
        ("dino_b", "pos_embed", lambda v: v[:, : 1 + 7 * 7]),
        ("dinov2_b", "pos_embed", lambda v: v[:, : 16 * 16]),
        ("swin_b", "relative_position_bias_table", lambda v: v[: 13 * 13]),  # Swin's windows of 7
    ],
)
def test_tables_of_another_size_are_refused_not_resampled(name, key, change, tmp_path):
    shapes = {k: v.shape for k, v in load_encoder(name, "none").model.state_dict().items()}
    state = {k: torch.zeros(()).expand(shape) for k, shape in shapes.items()}  # small in the file
    state |= {k: change(v).clone() for k, v in state.items() if k.endswith(key)}
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(UserError, match=f"{key} is of another size"):
        load_encoder(name, tmp_path / "other.pth")


def test_missing_and_damaged_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        load_encoder("tiny_vit", tmp_path / "nowhere.safetensors")
    save_file(load_encoder("tiny_vit").model.state_dict(), tmp_path / "whole.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:-100])
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
    settings = {"master": "tiny_vit", "auxiliary": "tiny_hiera", "fusion": "replace"}
    torch.save({"model": state, "settings": settings}, tmp_path / "checkpoint.pt")
    loaded = load_encoder("tiny_hiera", tmp_path / "checkpoint.pt")
    assert all(torch.equal(v, loaded.model.state_dict()[k]) for k, v in encoder.model.state_dict().items())
    with pytest.raises(UserError, match="sam2_t: .* is a run's, of tiny_vit and tiny_hiera"):
        load_encoder("sam2_t", tmp_path / "checkpoint.pt")
    torch.save({"model": state, "settings": settings | {"fusion": "none"}}, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match="tiny_hiera: .* is a run's, of tiny_vit$"):
        load_encoder("tiny_hiera", tmp_path / "checkpoint.pt")
    without_last_stage = {k: v for k, v in state.items() if "blocks.6" not in k}
    torch.save({"model": without_last_stage, "settings": settings}, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match="a run keeps only the stages.*Missing key.*blocks.6"):
        load_encoder("tiny_hiera", tmp_path / "checkpoint.pt")


def test_the_origin_of_weights_is_recorded_with_their_hash(tmp_path):
    file = tmp_path / "mine.safetensors"
    save_file(load_encoder("tiny_vit").model.state_dict(), file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert weights_origin("tiny_vit", str(file)) == f"{file} sha256:{digest}"
    assert weights_origin("tiny_vit", "none") == "random"
    assert weights_origin("tiny_vit", "pretrained").startswith("common/tiny_vit.safetensors sha256:")


@pytest.mark.parametrize("network", ["off", "mute"])
def test_pretrained_without_a_network_fails_fast_in_one_line(network, monkeypatch, tmp_path):
    monkeypatch.setattr(encoders.huggingface_hub, "try_to_load_from_cache", lambda *where: None)
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes the connection and never answers
        if network == "mute":
            monkeypatch.setattr(encoders.huggingface_hub.constants, "HF_HUB_OFFLINE", False)
            url = f"http://127.0.0.1:{server.getsockname()[1]}/file"
            monkeypatch.setattr(encoders.huggingface_hub, "hf_hub_url", lambda *where: url)
            encoders.huggingface_hub.close_session()  # the session that conftest's offline mode has made
        started = time.perf_counter()
        with pytest.raises(UserError, match="--weights dinov3_s=FILE") as error:
            load_encoder("dinov3_s")
        took = time.perf_counter() - started
    encoders.huggingface_hub.close_session()
    assert took < 5 and "\n" not in str(error.value) and (network == "off" or took > 2.5)


def test_an_unknown_encoder_is_answered_with_the_known_ones():
    with pytest.raises(UserError, match="dinov3_b.*sam2_b"):
        load_encoder("dinov4")


@pytest.mark.parametrize("name", ["dinov3_s", "tiny_vit"])
def test_positions_of_dinov3_are_rescaled_in_training_alone(name):
    encoder, image = load_encoder(name, "none"), torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        first, second = encoder(image)[16], encoder(image)[16]
        assert torch.equal(first, second)
        encoder.train()
        assert not torch.equal(encoder(image)[16], encoder(image)[16])
        assert torch.equal(encoder.eval()(image)[16], first)


@pytest.mark.parametrize("content", [{"settings": {"lr": 1}}, {"settings": None}, {"model": torch.zeros(2)}])
def test_another_project_s_checkpoint_is_refused_in_a_line(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match="x.pt is another project's checkpoint|x.pt does not fit"):
        load_encoder("tiny_vit", str(tmp_path / "x.pt"))
