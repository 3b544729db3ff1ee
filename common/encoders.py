"""The encoders of visual foundation models: one table, one loader, and the pyramid that every stage reads.

    encoder = load_encoder("dinov3_b")                  # or "sam2_b", "timm:resnet50"; weights="none" or a file
    native = encoder(images)                            # {native output stride: [B, C, H/stride, W/stride]}
    levels = pyramid(native, images.shape[-2:])         # {4, 8, 16, 32: ...}

A ViT has one native map, at output stride 16; a hierarchical encoder has one per stage.
"""

import contextlib
import functools
import hashlib
import io
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import huggingface_hub
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from sam2.modeling.backbones.hieradet import Hiera
from torch import nn

from common.run import UserError

STRIDES = (4, 8, 16, 32)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class EncoderSpec:
    model: str  # timm's name for it; "hiera": the trunk of sam2
    channels: dict[int, int]  # {native stride: channels}
    hub: tuple[str, str] | None  # repository and file of the pretrained weights; None: shipped in common/
    arguments: dict = field(default_factory=dict)  # what the constructor wants
    mean: tuple = IMAGENET_MEAN  # as published with the weights, for images in [0, 1]
    std: tuple = IMAGENET_STD


def _timm(model: str, channels: dict[int, int], **arguments) -> EncoderSpec:
    published = timm.get_pretrained_cfg(model)
    hub = (published.hf_hub_id or f"timm/{model}", published.hf_hub_filename or "model.safetensors")
    return EncoderSpec(model, channels, hub, arguments, published.mean, published.std)


def _sam2(size: str, width: int, **arguments) -> EncoderSpec:
    channels = {4: width, 8: 2 * width, 16: 4 * width, 32: 8 * width}
    hub = (f"facebook/sam2.1-hiera-{size}", f"sam2.1_hiera_{size.replace('-', '_')}.pt")
    return EncoderSpec("hiera", channels, hub, {"embed_dim": width, **arguments})


ENCODERS = {
    "dinov3_s": _timm("vit_small_patch16_dinov3.lvd1689m", {16: 384}),
    "dinov3_b": _timm("vit_base_patch16_dinov3.lvd1689m", {16: 768}),
    "dinov3_l": _timm("vit_large_patch16_dinov3.lvd1689m", {16: 1024}),
    # Patches of 14 pixels: the picture is resized to 14/16, so that its map too is at stride 16.
    "dinov2_b": _timm("vit_base_patch14_reg4_dinov2.lvd142m", {16: 768}, dynamic_img_size=True),
    "dino_b": _timm("vit_base_patch16_224.dino", {16: 768}, dynamic_img_size=True),
    # OpenAI trained CLIP with the quick GELU; timm's model without it in its name would compute another function.
    "clip_b": _timm("vit_base_patch16_clip_quickgelu_224.openai", {16: 768}, dynamic_img_size=True),
    "sam_b": _timm("samvit_base_patch16.sa1b", {16: 256}),
    "sam2_t": _sam2(
        "tiny", 96, stages=(1, 2, 7, 2), global_att_blocks=(5, 7, 9), window_pos_embed_bkg_spatial_size=(7, 7)
    ),
    "sam2_b": _sam2("base-plus", 112, num_heads=2),
    "sam2_l": _sam2(
        "large",
        144,
        num_heads=2,
        stages=(2, 6, 36, 4),
        global_att_blocks=(23, 33, 43),
        window_pos_embed_bkg_spatial_size=(7, 7),
        window_spec=(8, 4, 16, 8),
    ),
    "swin_b": _timm(
        "swin_base_patch4_window12_384.ms_in22k", {4: 128, 8: 256, 16: 512, 32: 1024}, strict_img_size=False
    ),
    # Trained by tests/pretrain_tiny.py, so that the embedded benchmark runs offline and in minutes.
    "tiny_vit": EncoderSpec(
        "vit_small_patch16_dinov3",
        {16: 128},
        None,
        # Layer scale, 1e-5 in DINOv3, is left out: it is for deep networks and long schedules.
        {"embed_dim": 128, "depth": 6, "num_heads": 4, "init_values": None},
    ),
    "tiny_hiera": EncoderSpec(
        "hiera",
        {4: 24, 8: 48, 16: 96, 32: 192},
        None,
        {
            "embed_dim": 24,
            "stages": (1, 2, 3, 1),
            "global_att_blocks": (5,),
            "window_pos_embed_bkg_spatial_size": (7, 7),
        },
    ),
}


def find_encoder(name: str) -> EncoderSpec:
    """The table's row, or one made for "timm:NAME". Raises UserError for a name that is neither."""
    if name.startswith("timm:"):
        return _any_timm(name.removeprefix("timm:"))
    if name not in ENCODERS:
        raise UserError(f"unknown encoder {name!r}; known are {', '.join(ENCODERS)}, and timm:NAME for timm's models")
    return ENCODERS[name]


@functools.cache
def _any_timm(model: str) -> EncoderSpec:
    """Try the model without memory or arithmetic: what maps does it give for a picture of an odd size?"""
    if not timm.is_model(model):
        raise UserError(f"timm has no model {model!r}: python -c 'import timm; print(timm.list_models())' lists them")
    try:
        spec = _timm(model, {})
    except Exception as error:  # a tag that does not exist
        raise UserError(f"timm has no weights {model!r} ({error})") from None
    for arguments in ({"dynamic_img_size": True}, {"strict_img_size": False}, {}):
        spec = replace(spec, arguments=arguments)
        with contextlib.suppress(Exception), torch.device("meta"), torch.no_grad():  # each model has its own objections
            maps = Encoder(model, spec).eval()(torch.zeros(1, 3, 64, 96))
            if maps and all(feature.shape[2:] == (64 // s, 96 // s) for s, feature in maps.items()):
                return replace(spec, channels={s: feature.shape[1] for s, feature in maps.items()})
    raise UserError(f"timm's {model} gives no feature maps for pictures of any size: choose another encoder")


class Encoder(nn.Module):
    """One encoder with its own normalisation.

    Input: images float32 [B, 3, H, W] in [0, 1], H and W multiples of 32.
    Output: {native stride: [B, C, H/stride, W/stride]}, C as in `channels`. A ViT's map is its last layer's, with the
    final norm (SAM: the neck; timm models that pool by averaging have none), prefix tokens dropped; a hierarchical
    encoder's are its stages, raw.
    """

    def __init__(self, name: str, spec: EncoderSpec):
        super().__init__()
        self.name, self.channels, self.scale = name, dict(spec.channels), 1
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(1, 3, 1, 1), persistent=False)
        if spec.model == "hiera":
            self.model, self.strides = Hiera(**spec.arguments), list(STRIDES)
            return
        self.model = timm.create_model(spec.model, num_classes=0, **spec.arguments)
        strides = [stage["reduction"] for stage in self.model.feature_info]
        self.is_vit = len(set(strides)) == 1
        if self.is_vit:
            patch, self.taken = strides[0], 1  # the last layer
            self.strides = [patch if patch in STRIDES else 16]
            self.scale = patch / self.strides[0]
        else:
            self.taken = [i for i, s in enumerate(strides) if s in STRIDES]
            self.strides = [strides[i] for i in self.taken]
        self.model.prune_intermediate_layers(self.taken, prune_norm=not self.is_vit, prune_head=True)

    def forward(self, images: torch.Tensor) -> dict[int, torch.Tensor]:
        height, width = images.shape[-2:]
        if height % 32 or width % 32:
            raise ValueError(f"image sides must be multiples of 32, got {height} x {width}")
        if self.scale != 1:
            size = round(height * self.scale), round(width * self.scale)
            images = F.interpolate(images, size, mode="bicubic", antialias=True)
        images = (images - self.mean) / self.std
        if isinstance(self.model, Hiera):
            maps = self.model(images)
        else:
            maps = self.model.forward_intermediates(
                images, indices=self.taken, norm=self.is_vit, intermediates_only=True
            )
        return dict(zip(self.strides, maps, strict=True))

    def cut(self, stride: int) -> None:
        """Drop the stages that no map up to `stride` needs. A ViT has one map and keeps all its blocks."""
        if len(self.strides) == 1:
            return
        self.strides = [s for s in self.strides if s <= stride]
        self.channels = {s: self.channels[s] for s in self.strides}
        if isinstance(self.model, Hiera):
            self.model.stage_ends = self.model.stage_ends[: len(self.strides)]
            self.model.blocks = self.model.blocks[: self.model.stage_ends[-1] + 1]
        else:
            self.taken = self.taken[: len(self.strides)]
            self.model.prune_intermediate_layers(self.taken, prune_norm=True, prune_head=True)


def pyramid(native: dict[int, torch.Tensor], size: tuple[int, int], mode: str = "nearest") -> dict[int, torch.Tensor]:
    """The four levels of a feature pyramid, each resampled from the nearest native stride.

    native: {stride: [B, C, h, w]}; size: height and width of the image, multiples of 32; mode: as in F.interpolate.
    Returns {4, 8, 16, 32: [B, C, H/stride, W/stride]}; a level that is native is passed through untouched.
    """
    return {stride: level(native, size, stride, mode) for stride in STRIDES}


def level(native: dict[int, torch.Tensor], size: tuple[int, int], stride: int, mode: str = "nearest") -> torch.Tensor:
    """One level of the pyramid, [B, C, H/stride, W/stride]."""
    nearest = nearest_stride(native, stride)
    if nearest == stride:
        return native[stride]
    return F.interpolate(native[nearest], (size[0] // stride, size[1] // stride), mode=mode)


def nearest_stride(native, stride: int) -> int:
    """The native stride closest to `stride` in octaves; the finer one of two equally close."""
    return min(sorted(native), key=lambda s: max(s, stride) / min(s, stride))


# ---------------------------------------------------------------------------------------------- weights


def load_encoder(name: str, weights: str = "pretrained", device: str = "cpu") -> Encoder:
    """Build an encoder and fill it: `weights` is "pretrained", "none" (random) or a local checkpoint file.

    Raises UserError for an unknown name, for weights that cannot be had, and for a file that does not fit.
    """
    encoder = Encoder(name, find_encoder(name))
    if weights != "none":
        _fill(encoder, weights_file(name, weights))
    return encoder.eval().to(device)


def weights_file(name: str, weights: str) -> Path:
    """Where an encoder's weights lie: a given file, or shipped file, local cache and download, in this order.

    The hub is probed once, so that offline fails fast. Raises UserError if there is no such file.
    """
    if weights != "pretrained":
        if not Path(weights).is_file():
            raise UserError(f"weights of {name}: there is no file {weights}")
        return Path(weights)
    hub = find_encoder(name).hub
    if hub is None:
        return Path(__file__).with_name(f"{name}.safetensors")
    cached = huggingface_hub.try_to_load_from_cache(*hub)
    if isinstance(cached, str):
        return Path(cached)
    try:
        huggingface_hub.get_session().head(huggingface_hub.hf_hub_url(*hub), timeout=3)
        return Path(huggingface_hub.hf_hub_download(*hub))
    except Exception as error:  # offline, no access, disk full: all end in the same advice
        raise UserError(
            f"the weights of {name} ({'/'.join(hub)}) are not in the local cache and could not be downloaded "
            f"({type(error).__name__}): give 01_extract.py a file with --weights {name}=FILE, or --weights none for "
            "random weights"
        ) from None


def weights_origin(name: str, weights: str) -> str:
    """For the record: "random", or where the weights came from and the SHA-256 of their file."""
    if weights == "none":
        return "random"
    file, hub = weights_file(name, weights), find_encoder(name).hub
    place = file if weights != "pretrained" else "/".join(hub) if hub else f"common/{file.name}"
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(1 << 20):
            digest.update(chunk)
    return f"{place} sha256:{digest.hexdigest()}"


def _fill(encoder: Encoder, path: Path) -> None:
    """Load a checkpoint file strictly: every tensor of the encoder must be in it and fit, surplus is ignored."""
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception:  # a damaged file, or a pickle that holds more: torch would advise to run whatever code it holds
        raise UserError(f"weights of {encoder.name}: {path} cannot be read as tensors") from None
    found = _library_names(encoder, state, path)
    wanted = encoder.model.state_dict()
    problems = [f"{key} is missing" for key in wanted if key not in found]
    for key in wanted:
        if key in found and found[key].shape != wanted[key].shape:
            problems.append(f"{key} is {list(found[key].shape)}, not {list(wanted[key].shape)}")
        elif key in found and found[key].is_floating_point() != wanted[key].is_floating_point():
            problems.append(f"{key} holds {found[key].dtype}")
        elif key in found and not found[key].isfinite().all():
            problems.append(f"{key} is not finite")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        if "settings" in state:
            more += " (a run keeps only the stages that its pyramid needs)"
        raise UserError(f"{path} does not hold the weights of {encoder.name}: {'; '.join(problems[:3])}{more}")
    encoder.model.load_state_dict({key: found[key].to(wanted[key].dtype) for key in wanted})


def _library_names(encoder: Encoder, state: dict, path: Path) -> dict[str, torch.Tensor]:
    """Bring a checkpoint's tensors to the names of the library that the encoder is built with.

    Raises UserError for a file that would compute something else under these names.
    """
    prefix = "image_encoder.trunk."  # SAM 2.1
    if "settings" in state:  # a run's checkpoint.pt: the encoder as fine-tuned there
        used = ("master",) if state["settings"]["fusion"] == "none" else ("master", "auxiliary")
        roles = {state["settings"][role]: role for role in used}
        if encoder.name not in roles:
            raise UserError(f"{path} does not hold {encoder.name}: it is a run's, of {' and '.join(roles)}")
        prefix = f"pyramid.{roles[encoder.name]}.model."
    state = state.get("model", state)
    state = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    if any(key.startswith(prefix) for key in state):
        return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    convert = getattr(sys.modules[type(encoder.model).__module__], "checkpoint_filter_fn", None)  # timm's own
    if convert is None:
        return state
    given = {value.untyped_storage().data_ptr() for value in state.values()}
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints each zero bias that it skips
            found = convert(dict(state), encoder.model)
    except Exception:  # it trips over tensors of other shapes, which are named better as they are
        return state
    wanted = encoder.model.state_dict()
    biased = any(value.any() for key, value in state.items() if key.endswith("qkv.bias"))
    if biased and all(key in found for key in wanted) and not any(key.endswith("qkv.bias") for key in wanted):
        raise UserError(
            f"{path} does not fit {encoder.name}: its qkv biases are not zero, as the LVD-1689M weights' are"
        )
    for key, value in found.items():  # it would resample these to fit
        resizable = key.endswith(("pos_embed", "patch_embed.proj.weight", "relative_position_bias_table"))
        if resizable and value.untyped_storage().data_ptr() not in given:
            raise UserError(f"{path} does not hold the weights of {encoder.name}: {key} is of another size")
    return found
