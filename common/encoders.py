"""The encoders of visual foundation models: one table, one loader, and the pyramid that every stage reads.

    encoder = load_encoder("dinov3_b")                  # or "sam2_b", weights="none", weights="my/file.safetensors"
    native = encoder(images)                            # {native output stride: [B, C, H/stride, W/stride]}
    levels = pyramid(native, images.shape[-2:])         # {4, 8, 16, 32: ...}

A ViT has one native map, at output stride 16; a hierarchical encoder has one per stage.
"""

import contextlib
import io
from dataclasses import dataclass, field
from pathlib import Path

import huggingface_hub
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from sam2.modeling.backbones.hieradet import Hiera
from timm.models.eva import checkpoint_filter_fn
from torch import nn

from common.run import UserError

STRIDES = (4, 8, 16, 32)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class EncoderSpec:
    family: str  # "vit": a timm model, last layer's normalised patch tokens. "hiera": sam2's trunk, its stages, raw
    channels: dict[int, int]  # {native stride: channels}
    hub: tuple[str, str] | None  # repository and file of the pretrained weights; None: shipped in common/
    arguments: dict = field(default_factory=dict)  # what the constructor wants
    mean: tuple = IMAGENET_MEAN  # as published with the weights, for images in [0, 1]
    std: tuple = IMAGENET_STD


def _dinov3(model: str, channels: int) -> EncoderSpec:
    arguments = {"model_name": f"{model}.lvd1689m"}
    return EncoderSpec("vit", {16: channels}, (f"timm/{model}.lvd1689m", "model.safetensors"), arguments)


def _sam2(size: str, width: int, **arguments) -> EncoderSpec:
    channels = {4: width, 8: 2 * width, 16: 4 * width, 32: 8 * width}
    hub = (f"facebook/sam2.1-hiera-{size}", f"sam2.1_hiera_{size.replace('-', '_')}.pt")
    return EncoderSpec("hiera", channels, hub, {"embed_dim": width, **arguments})


ENCODERS = {
    "dinov3_s": _dinov3("vit_small_patch16_dinov3", 384),
    "dinov3_b": _dinov3("vit_base_patch16_dinov3", 768),
    "dinov3_l": _dinov3("vit_large_patch16_dinov3", 1024),
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
    # Trained by tests/pretrain_tiny.py, so that the embedded benchmark runs offline and in minutes.
    "tiny_vit": EncoderSpec(
        "vit",
        {16: 128},
        None,
        # Layer scale, 1e-5 in DINOv3, is left out: it is for deep networks and long schedules.
        {"model_name": "vit_small_patch16_dinov3", "embed_dim": 128, "depth": 6, "num_heads": 4, "init_values": None},
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


class Encoder(nn.Module):
    """One encoder with its own normalisation.

    Input: images float32 [B, 3, H, W] in [0, 1], H and W multiples of 32.
    Output: {native stride: [B, C, H/stride, W/stride]}, C as in `channels`.
    """

    def __init__(self, name: str, spec: EncoderSpec):
        super().__init__()
        self.name, self.family, self.channels = name, spec.family, dict(spec.channels)
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(1, 3, 1, 1), persistent=False)
        if spec.family == "vit":
            self.model = timm.create_model(pretrained=False, num_classes=0, **spec.arguments)
        else:
            self.model = Hiera(**spec.arguments)

    def forward(self, images: torch.Tensor) -> dict[int, torch.Tensor]:
        height, width = images.shape[-2:]
        if height % 32 or width % 32:
            raise ValueError(f"image sides must be multiples of 32, got {height} x {width}")
        images = (images - self.mean) / self.std
        if self.family == "hiera":
            return dict(zip(STRIDES, self.model(images), strict=False))  # fewer stages after cut()
        tokens = self.model.forward_features(images)[:, self.model.num_prefix_tokens :]  # [B, H/16 * W/16, C]
        return {16: tokens.transpose(1, 2).unflatten(2, (height // 16, width // 16))}

    def cut(self, stride: int) -> None:
        """Drop the stages that no map up to `stride` needs. A ViT has one map and keeps all its blocks."""
        if self.family == "hiera":
            stages = STRIDES.index(stride) + 1
            self.model.blocks = self.model.blocks[: self.model.stage_ends[stages - 1] + 1]
            self.model.stage_ends = self.model.stage_ends[:stages]
            self.channels = {s: c for s, c in self.channels.items() if s <= stride}


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
    if name not in ENCODERS:
        raise UserError(f"unknown encoder {name!r}; known are {', '.join(ENCODERS)}")
    encoder = Encoder(name, ENCODERS[name])
    if weights != "none":
        _fill(encoder, _pretrained_file(name) if weights == "pretrained" else Path(weights))
    return encoder.eval().to(device)


def _pretrained_file(name: str) -> Path:
    """Shipped file, local cache, or download, in this order; the hub is probed once so that offline fails fast."""
    hub = ENCODERS[name].hub
    if hub is None:
        return Path(__file__).with_name(f"{name}.safetensors")
    cached = huggingface_hub.try_to_load_from_cache(*hub)
    if isinstance(cached, str):
        return Path(cached)
    try:
        huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(*hub), timeout=3)
        return Path(huggingface_hub.hf_hub_download(*hub))
    except Exception as error:  # offline, no access, disk full: all end in the same advice
        raise UserError(
            f"the weights of {name} ({'/'.join(hub)}) are not in the local cache and could not be downloaded "
            f"({type(error).__name__}): give a file with --weights {name}=FILE, or --weights none for random weights"
        ) from None


def _fill(encoder: Encoder, path: Path) -> None:
    """Load a checkpoint file strictly: every tensor of the encoder must be in it and fit, surplus is ignored."""
    if not path.is_file():
        raise UserError(f"weights of {encoder.name}: there is no file {path}")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
        state = _without_wrapping(encoder, state)
    except Exception as error:  # a damaged file, or a pickle that holds more than tensors
        # torch's own message would advise to run whatever code the file holds
        reason = f" ({error})" if isinstance(error, ValueError) else ""
        raise UserError(f"weights of {encoder.name}: {path} cannot be read as tensors{reason}") from None
    wanted = encoder.model.state_dict()
    missing = [key for key in wanted if key not in state]
    misfit = [key for key in wanted if key in state and state[key].shape != wanted[key].shape]
    if missing or misfit:
        problems = [f"{key} is missing" for key in missing]
        problems += [f"{key} is {list(state[key].shape)}, not {list(wanted[key].shape)}" for key in misfit]
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{path} does not hold the weights of {encoder.name}: {'; '.join(problems[:3])}{more}")
    encoder.model.load_state_dict({key: state[key].float() for key in wanted})


def _without_wrapping(encoder: Encoder, state: dict) -> dict[str, torch.Tensor]:
    """Bring an official checkpoint's tensors to the names of the library that the encoder is built with."""
    prefix = "image_encoder.trunk."  # SAM 2.1
    if "settings" in state:  # a run's checkpoint.pt: the encoder as fine-tuned there
        role = "master" if state["settings"]["master"] == encoder.name else "auxiliary"
        prefix = f"pyramid.{role}.model."
    state = state.get("model", state)
    if any(key.startswith(prefix) for key in state):
        return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if encoder.family == "vit":
        if any(value.any() for key, value in state.items() if key.endswith("qkv.bias")):
            raise ValueError("its qkv biases are not zero, as the LVD-1689M weights' are")
        with contextlib.redirect_stdout(io.StringIO()):  # the converter prints each zero bias that it skips
            return checkpoint_filter_fn(state, encoder.model)  # Meta's names to timm's
    return state
