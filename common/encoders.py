"""The encoders of visual foundation models: one table, one loader, and the pyramid that every stage reads.

encoder = load_encoder("dinov3_b")                  # or "sam2_b", "timm:resnet50"; weights="none" or a file
native = encoder(images)                            # {native output stride: [B, C, H/stride, W/stride]}
levels = pyramid(native, images.shape[-2:])         # {4, 8, 16, 32: ...}
"""

import contextlib
import functools
import hashlib
import sys
from pathlib import Path
from typing import NamedTuple

from common.run import UserError, need

import huggingface_hub
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from sam2.modeling.backbones.hieradet import Hiera

STRIDES = (4, 8, 16, 32)


class EncoderSpec(NamedTuple):
    model: str  # timm's name for it; "hiera": the trunk of sam2
    channels: dict[int, int]  # {native stride: channels}
    hub: tuple[str, str] | None  # repository and file of the weights; None: shipped in common/
    arguments: dict  # what the constructor wants
    mean: tuple = (0.485, 0.456, 0.406)  # for images in [0, 1], as published with the weights
    std: tuple = (0.229, 0.224, 0.225)


def _timm(model, channels, **arguments):
    published = timm.get_pretrained_cfg(model)
    hub = (published.hf_hub_id or f"timm/{model}", published.hf_hub_filename or "model.safetensors")
    return EncoderSpec(model, channels, hub, arguments, published.mean, published.std)


def _sam2(size, width, **arguments):
    hub = (f"facebook/sam2.1-hiera-{size}", f"sam2.1_hiera_{size.replace('-', '_')}.pt")
    return EncoderSpec("hiera", {s: width * s // 4 for s in STRIDES}, hub, {"embed_dim": width} | arguments)


HIERA_T = {"stages": (1, 2, 7, 2), "global_att_blocks": (5, 7, 9), "window_pos_embed_bkg_spatial_size": (7, 7)}
HIERA_L = HIERA_T | {"stages": (2, 6, 36, 4), "global_att_blocks": (23, 33, 43), "window_spec": (8, 4, 16, 8)}
TINY_HIERA = HIERA_T | {"embed_dim": 24, "stages": (1, 2, 3, 1), "global_att_blocks": (5,)}
# In training mode its position coordinates are rescaled at random, by up to 2 either way, as in its pretraining.
DINOV3 = {"rope_rescale_coords": 2}
# Layer scale, 1e-5 in DINOv3, is left out: it is for deep networks and long schedules.
TINY_VIT = DINOV3 | {"embed_dim": 128, "depth": 6, "num_heads": 4, "init_values": None}
ENCODERS = {
    "dinov3_s": _timm("vit_small_patch16_dinov3.lvd1689m", {16: 384}, **DINOV3),
    "dinov3_b": _timm("vit_base_patch16_dinov3.lvd1689m", {16: 768}, **DINOV3),
    "dinov3_l": _timm("vit_large_patch16_dinov3.lvd1689m", {16: 1024}, **DINOV3),
    # Patches of 14 pixels: the picture is resized to 14/16, so that its map too is at stride 16.
    "dinov2_b": _timm("vit_base_patch14_reg4_dinov2.lvd142m", {16: 768}, dynamic_img_size=True),
    "dino_b": _timm("vit_base_patch16_224.dino", {16: 768}, dynamic_img_size=True),
    # OpenAI trained CLIP with the quick GELU, which timm's model has only with it in its name.
    "clip_b": _timm("vit_base_patch16_clip_quickgelu_224.openai", {16: 768}, dynamic_img_size=True),
    "sam_b": _timm("samvit_base_patch16.sa1b", {16: 256}),
    "sam2_t": _sam2("tiny", 96, **HIERA_T),
    "sam2_b": _sam2("base-plus", 112, num_heads=2),
    "sam2_l": _sam2("large", 144, num_heads=2, **HIERA_L),
    "swin_b": _timm("swin_base_patch4_window12_384.ms_in22k", {s: 32 * s for s in STRIDES}, strict_img_size=False),
    # Trained by tests/pretrain_tiny.py, so that the embedded benchmark runs offline and in minutes.
    "tiny_vit": EncoderSpec("vit_small_patch16_dinov3", {16: 128}, None, TINY_VIT),
    "tiny_hiera": EncoderSpec("hiera", {s: 6 * s for s in STRIDES}, None, TINY_HIERA),
}


@functools.cache
def find_encoder(name):
    """The table's row, or for "timm:NAME" one found by trying it. UserError for what cannot serve."""
    if name in ENCODERS:
        return ENCODERS[name]
    model = name.removeprefix("timm:")
    need(model != name, f"unknown encoder {name!r}; known are {', '.join(ENCODERS)}, and timm:NAME")
    try:
        spec = _timm(model, {})
    except Exception:  # timm has an error of its own for each way to be unknown
        raise UserError(f"timm has no model {model!r}: timm.list_pretrained() lists them") from None
    # Without memory or arithmetic: what maps does it give for an odd size? Each has its own objections.
    for arguments in ({"dynamic_img_size": True}, {"strict_img_size": False}, {}):
        spec = spec._replace(arguments=arguments)
        with contextlib.suppress(Exception), torch.device("meta"), torch.no_grad():
            maps = Encoder(name, spec).eval()(torch.zeros(1, 3, 64, 96))
            if maps and all(feature.shape[2:] == (64 // s, 96 // s) for s, feature in maps.items()):
                return spec._replace(channels={s: feature.shape[1] for s, feature in maps.items()})
    raise UserError(f"timm's {model} gives no maps for pictures of any size: choose another encoder")


class Encoder(torch.nn.Module):
    """One encoder with its own normalisation.

    Input: images float32 [B, 3, H, W] in [0, 1], H and W multiples of 32.
    Output: {native stride: [B, C, H/stride, W/stride]}, C as in `channels`: of a ViT the last layer's map, normed (SAM:
    the neck; timm models that pool by averaging: raw), no prefix tokens; of a hierarchical encoder its stages, raw.
    """

    def __init__(self, name, spec):
        super().__init__()
        self.name, self.channels, self.scale = name, spec.channels, 1
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(1, 3, 1, 1), persistent=False)
        if spec.model == "hiera":
            self.model, strides = Hiera(**spec.arguments), STRIDES
        else:
            self.model = timm.create_model(spec.model, num_classes=0, **spec.arguments)
            strides = [stage["reduction"] for stage in self.model.feature_info]
        self.is_vit = len(set(strides)) == 1
        if self.is_vit and strides[0] not in STRIDES:
            self.scale, strides = strides[0] / 16, [16] * len(strides)
        # {native stride: stage}; where several have one stride, as a ViT's layers, the last
        self.stages = {stride: stage for stage, stride in enumerate(strides) if stride in STRIDES}
        self.cut(STRIDES[-1])

    def forward(self, images):
        if any(side % 32 for side in images.shape[-2:]):
            raise ValueError(f"image sides must be multiples of 32, got {list(images.shape[-2:])}")
        if self.scale != 1:
            size = [round(side * self.scale) for side in images.shape[-2:]]
            images = F.interpolate(images, size, mode="bicubic", antialias=True)
        images = (images - self.mean) / self.std
        if isinstance(self.model, Hiera):
            maps = self.model(images)
        else:
            maps = self.model.forward_intermediates(images, self.taken, norm=self.is_vit, intermediates_only=True)
        return dict(zip(self.stages, maps, strict=True))

    def cut(self, stride):
        """Drop what no map up to `stride`, a native one, needs: the head, later stages."""
        self.stages = {s: stage for s, stage in self.stages.items() if s <= stride}
        self.channels = {s: channels for s, channels in self.channels.items() if s <= stride}
        self.taken = list(self.stages.values())
        if isinstance(self.model, Hiera):
            self.model.stage_ends = self.model.stage_ends[: len(self.taken)]
            self.model.blocks = self.model.blocks[: self.model.stage_ends[-1] + 1]
        else:
            self.model.prune_intermediate_layers(self.taken, prune_norm=not self.is_vit, prune_head=True)


def pyramid(native, size, mode="nearest"):
    """Four levels, {4, 8, 16, 32: [B, C, H/stride, W/stride]}, each resampled from the nearest native stride.

    native: {stride: [B, C, h, w]}; size: height and width of the image, multiples of 32; mode: as in F.interpolate.
    """
    return {stride: level(native, size, stride, mode) for stride in STRIDES}


def level(native, size, stride, mode="nearest"):
    """One level of the pyramid, [B, C, H/stride, W/stride]; a native one as it is."""
    nearest = nearest_stride(native, stride)
    if nearest == stride:
        return native[stride]
    return F.interpolate(native[nearest], (size[0] // stride, size[1] // stride), mode=mode)


def nearest_stride(native, stride):
    """The native stride closest to `stride` in octaves; the finer one of two equally close."""
    return min(sorted(native), key=lambda s: max(s, stride) / min(s, stride))


# ------------------------------------------------------------------ weights
def load_encoder(name, weights="pretrained", device="cpu"):
    """`weights`: "pretrained", "none" (random) or a file. UserError for what is unknown or does not fit."""
    encoder = Encoder(name, find_encoder(name))
    if weights != "none":
        _fill(encoder, weights_file(name, weights))
    return encoder.eval().to(device)


def weights_file(name, weights):
    """The given file; else the shipped, the cached, the downloaded one. UserError if there is none."""
    hub = find_encoder(name).hub
    if weights != "pretrained" or hub is None:
        file = Path(__file__).with_name(f"{name}.safetensors") if weights == "pretrained" else Path(weights)
        need(file.is_file(), f"weights of {name}: there is no file {file}")
        return file
    cached = huggingface_hub.try_to_load_from_cache(*hub)
    if isinstance(cached, str):
        return Path(cached)
    try:  # the hub is probed once, so that offline fails fast
        huggingface_hub.get_session().head(huggingface_hub.hf_hub_url(*hub), timeout=3)
        return Path(huggingface_hub.hf_hub_download(*hub))
    except Exception as error:  # offline, no access, disk full: all end in the same advice
        advice = f"give 01_extract.py a file with --weights {name}=FILE, or --weights none for random ones"
        raise UserError(f"{'/'.join(hub)} is out of reach ({type(error).__name__}): {advice}") from None


def weights_origin(name, weights):
    """For the record: "random", or where the weights came from and the SHA-256 of their file."""
    if weights == "none":
        return "random"
    file, hub = weights_file(name, weights), find_encoder(name).hub
    place = file if weights != "pretrained" else "/".join(hub) if hub else f"common/{file.name}"
    with file.open("rb") as opened:
        return f"{place} sha256:{hashlib.file_digest(opened, 'sha256').hexdigest()}"


def _fill(encoder, path):
    """Load a file strictly: every tensor of the encoder must be in it and fit, surplus is ignored."""
    what = f"weights of {encoder.name}: {path}"
    try:
        state = dict(load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True))
    except Exception:  # damaged, or a pickle that holds more: torch would advise to run its code
        raise UserError(f"{what} cannot be read as tensors") from None
    wanted = encoder.model.state_dict()
    try:
        found = {key: value for key, value in _library_names(encoder, state, what).items() if key in wanted}
    except (KeyError, TypeError, AttributeError):
        raise UserError(
            f"{what} is another project's checkpoint: its tensors do not lie where they are looked for"
        ) from None
    for key, value in found.items():
        same_kind = value.is_floating_point() == wanted[key].is_floating_point()
        need(same_kind, f"{what} does not fit: {key} holds {value.dtype}")
        need(value.isfinite().all(), f"{what} does not fit: {key} is not finite")
    try:
        encoder.model.load_state_dict(found)
    except RuntimeError as error:  # a line for each tensor that is missing or of another shape
        hint = " (a run keeps only the stages that its pyramid needs)" if "settings" in state else ""
        raise UserError(f"{what} does not fit{hint}: {' '.join(str(error).split())[:300]}") from None


def _library_names(encoder, state, what):
    """A checkpoint's tensors by the library's names; UserError if they would mean something else there."""
    prefix = "image_encoder.trunk."  # SAM 2.1
    if "settings" in state:  # a run's checkpoint.pt: the encoder as fine-tuned there
        used = ("master",) if state["settings"]["fusion"] == "none" else ("master", "auxiliary")
        roles = {state["settings"][role]: role for role in used}
        need(encoder.name in roles, f"{what} is a run's, of {' and '.join(roles)}")
        prefix = f"pyramid.{roles[encoder.name]}.model."
    state = {key: value for key, value in state.get("model", state).items() if isinstance(value, torch.Tensor)}
    state = {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)} or state
    biased = any(value.any() for key, value in state.items() if key.endswith("qkv.bias"))
    placed = any(key.endswith("qkv.bias") for key in encoder.model.state_dict())
    need(placed or not biased, f"{what} does not fit: the encoder has no place for its qkv biases")
    given = {value.untyped_storage().data_ptr() for value in state.values()}
    # timm's own converter prints each zero bias that it skips, and trips over other shapes; sam2 has none.
    with contextlib.suppress(Exception), contextlib.redirect_stdout(None):
        state = sys.modules[type(encoder.model).__module__].checkpoint_filter_fn(dict(state), encoder.model)
    for key, value in state.items():  # it would resample these to fit
        if key.endswith(("pos_embed", "patch_embed.proj.weight", "relative_position_bias_table")):
            need(value.untyped_storage().data_ptr() in given, f"{what} does not fit: {key} is of another size")
    return state
