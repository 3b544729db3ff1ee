"""The encoders: one table, one loader, and the feature pyramid that every stage reads.

encoder = load_encoder("dinov3_b")                  # or "sam2_b", "timm:resnet50", ...
native = encoder(images)                            # {native stride: [B, C, H/stride, W/stride]}
levels = pyramid(native, images.shape[-2:])         # the same for output strides 4, 8, 16 and 32
"""

import contextlib
import functools
import hashlib
import inspect
import math
from pathlib import Path
from typing import NamedTuple

from common.run import UserError, require

import huggingface_hub
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from sam2.modeling.backbones.hieradet import Hiera
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

STRIDES = (4, 8, 16, 32)


class EncoderSpec(NamedTuple):
    """A row of the table. Mean and deviation are of RGB in [0, 1], published with the weights."""

    model: str  # timm's name for it, or "hiera" for sam2's image encoder
    channels: dict[int, int]  # {native stride: channels}
    hub: tuple[str, str] | None  # repository and file of the weights; None if they ship in common/
    arguments: dict  # keyword arguments of the model's constructor
    mean: tuple = IMAGENET_DEFAULT_MEAN
    std: tuple = IMAGENET_DEFAULT_STD


def timm_spec(model, channels, **arguments):
    """Return the row of one of timm's models, with its published weights and normalisation."""
    published = timm.get_pretrained_cfg(model)
    repository = published.hf_hub_id or f"timm/{model}"
    hub = (repository, published.hf_hub_filename or "model.safetensors")
    return EncoderSpec(model, channels, hub, arguments, published.mean, published.std)


def sam2_spec(size, **arguments):
    """Return the row of a SAM 2.1 encoder, with the arguments of its official configuration."""
    hub = (f"facebook/sam2.1-hiera-{size}", f"sam2.1_hiera_{size.replace('-', '_')}.pt")
    return EncoderSpec("hiera", doubling(arguments["embed_dim"]), hub, arguments)


def doubling(channels):
    """Return {stride: channels} of a hierarchical encoder, whose channels double at each stage.

    channels: those of the first stage, at stride 4.
    """
    return {stride: channels * stride // 4 for stride in STRIDES}


# In training mode DINOv3's rotary position coordinates (RoPE) are multiplied by a random factor
# between 1/2 and 2, as in DINOv3's own pretraining.
DINOV3 = {"rope_rescale_coords": 2}
ENCODERS = {
    "dinov3_s": timm_spec("vit_small_patch16_dinov3.lvd1689m", {16: 384}, **DINOV3),
    "dinov3_b": timm_spec("vit_base_patch16_dinov3.lvd1689m", {16: 768}, **DINOV3),
    "dinov3_l": timm_spec("vit_large_patch16_dinov3.lvd1689m", {16: 1024}, **DINOV3),
    # DINOv2 has patches of 14 pixels. The image is resized to 14/16, so that its map is at 16 too.
    "dinov2_b": timm_spec("vit_base_patch14_reg4_dinov2.lvd142m", {16: 768}, dynamic_img_size=True),
    "dino_b": timm_spec("vit_base_patch16_224.dino", {16: 768}, dynamic_img_size=True),
    # OpenAI trained CLIP with an approximate GELU. timm names the models that have it "quickgelu".
    "clip_b": timm_spec(
        "vit_base_patch16_clip_quickgelu_224.openai", {16: 768}, dynamic_img_size=True
    ),
    "sam_b": timm_spec("samvit_base_patch16.sa1b", {16: 256}),
    "sam2_t": sam2_spec(
        "tiny",
        embed_dim=96,
        stages=(1, 2, 7, 2),
        global_att_blocks=(5, 7, 9),
        window_pos_embed_bkg_spatial_size=(7, 7),
    ),
    "sam2_b": sam2_spec("base-plus", embed_dim=112, num_heads=2),
    "sam2_l": sam2_spec(
        "large",
        embed_dim=144,
        num_heads=2,
        stages=(2, 6, 36, 4),
        global_att_blocks=(23, 33, 43),
        window_pos_embed_bkg_spatial_size=(7, 7),
        window_spec=(8, 4, 16, 8),
    ),
    "swin_b": timm_spec(
        "swin_base_patch4_window12_384.ms_in22k", doubling(128), strict_img_size=False
    ),
    # tests/pretrain_tiny.py trained these two, so that toycity runs offline and in minutes.
    "tiny_vit": EncoderSpec(
        model="vit_small_patch16_dinov3",
        channels={16: 128},
        hub=None,
        # DINOv3's layer scale of 1e-5 is left out. It is meant for deep networks and long training.
        arguments=dict(DINOV3, embed_dim=128, depth=6, num_heads=4, init_values=None),
    ),
    "tiny_hiera": EncoderSpec(
        model="hiera",
        channels=doubling(24),
        hub=None,
        arguments={
            "embed_dim": 24,
            "stages": (1, 2, 3, 1),
            "global_att_blocks": (5,),
            "window_pos_embed_bkg_spatial_size": (7, 7),
        },
    ),
}


@functools.cache
def find_encoder(name):
    """Return an encoder's EncoderSpec: the table's, or one made for "timm:NAME".

    UserError if the name is unknown, or if timm's model gives no maps for images of any size.
    """
    if name in ENCODERS:
        return ENCODERS[name]
    known = ", ".join(ENCODERS)
    is_timm = name.startswith("timm:")
    require(is_timm, f"unknown encoder {name!r}: known are {known}, and timm:NAME")
    model = name.removeprefix("timm:")
    try:
        # Which of the strides it has, and with how many channels, is not known before it is tried.
        spec = timm_spec(model, channels=dict.fromkeys(STRIDES))
    except Exception:  # timm raises different types for a wrong name and a wrong tag
        raise UserError(f"timm has no model {model!r}: timm.list_pretrained() lists them") from None
    # timm's models differ in the argument that makes them take any size, so each is tried.
    for arguments in ({"dynamic_img_size": True}, {"strict_img_size": False}, {}):
        spec = spec._replace(arguments=arguments)
        channels = measure_channels(spec)
        if channels:
            return spec._replace(channels=channels)
    raise UserError(f"timm's {model} gives no maps for images of any size: choose another encoder")


def measure_channels(spec):
    """Return {native stride: channels} of a model of timm, or {} if it cannot take a 64 x 96 image.

    On the device "meta" the model runs without memory and without arithmetic.
    """
    try:
        with torch.device("meta"), torch.no_grad():
            maps = Encoder(spec.model, spec).eval()(torch.zeros(1, 3, 64, 96))
    except Exception:  # each model refuses a size or an argument with an error of its own
        return {}
    channels = {}
    for stride, feature in maps.items():
        if feature.shape[2:] != (64 // stride, 96 // stride):
            return {}
        channels[stride] = feature.shape[1]
    return channels


class Encoder(torch.nn.Module):
    """One encoder. It normalises images with its own mean and standard deviation.

    Attribute `channels`: {native stride: C}. What forward() returns depends on the model:
        hierarchical (SAM2, Swin, CNNs)   each stage's output, not normalised, at its own stride
        ViT (DINO, DINOv2, DINOv3, CLIP)  the last layer's patch tokens after the model's last norm,
                                          without class and register tokens (timm's models that
                                          average patch tokens have no such norm)
        SAM                               the output of the neck, 256 channels
    """

    def __init__(self, name, spec):
        super().__init__()
        self.name = name
        self.register_buffer("mean", torch.tensor(spec.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(3, 1, 1), persistent=False)
        if spec.model == "hiera":
            self.model = Hiera(**spec.arguments)
            strides = STRIDES
        else:
            self.model = timm.create_model(spec.model, num_classes=0, **spec.arguments)
            strides = [stage["reduction"] for stage in self.model.feature_info]
        # All layers of a ViT have the stride of its patches. If that is none of ours, as with
        # patches of 14 pixels, images are rescaled so that the patches lie 16 pixels apart.
        self.is_vit = len(set(strides)) == 1
        self.scale = 1
        if self.is_vit and strides[0] not in STRIDES:
            self.scale = strides[0] / 16
            strides = [16] * len(strides)
        # Where several stages have one stride, as a ViT's layers, the last one is taken.
        stages = {s: index for index, s in enumerate(strides)}
        self.channels = {s: channels for s, channels in spec.channels.items() if s in stages}
        self.stage_indices = [stages[s] for s in self.channels]
        self.truncate(STRIDES[-1])  # drops the head, and layers that no level needs

    def forward(self, images):
        """Return {native stride: [B, C, H/stride, W/stride]}.

        images: float32 [B, 3, H, W] in [0, 1]. ValueError if H or W is no multiple of 32.
        """
        height, width = images.shape[-2:]
        if height % 32 or width % 32:
            raise ValueError(f"image sides must be multiples of 32, got {height} x {width}")
        if self.scale != 1:
            size = (round(height * self.scale), round(width * self.scale))
            images = F.interpolate(images, size, mode="bicubic", antialias=True)
        images = (images - self.mean) / self.std
        if isinstance(self.model, Hiera):
            maps = self.model(images)
        else:
            maps = self.model.forward_intermediates(
                images, self.stage_indices, norm=self.is_vit, intermediates_only=True
            )
        return dict(zip(self.channels, maps, strict=True))

    def truncate(self, stride):
        """Drop what the pyramid's levels up to `stride` do not need: later stages and the head."""
        deepest = nearest_stride(self.channels, stride)
        self.channels = {s: channels for s, channels in self.channels.items() if s <= deepest}
        self.stage_indices = self.stage_indices[: len(self.channels)]
        if isinstance(self.model, Hiera):
            self.model.stage_ends = self.model.stage_ends[: len(self.stage_indices)]
            self.model.blocks = self.model.blocks[: self.model.stage_ends[-1] + 1]
        else:
            self.model.prune_intermediate_layers(
                self.stage_indices, prune_norm=not self.is_vit, prune_head=True
            )

    def channels_at(self, stride):
        """Return the channels of the map from which the pyramid's level at `stride` is made."""
        return self.channels[nearest_stride(self.channels, stride)]


def pyramid(native, size, mode="nearest"):
    """Return four levels, {4, 8, 16, 32: [B, C, H/stride, W/stride]}.

    native: {native stride: [B, C, h, w]}.
    size: height and width of the image in pixels, multiples of 32.
    mode: of the resampling, as in F.interpolate.
    """
    return {stride: level(native, size, stride, mode) for stride in STRIDES}


def level(native, size, stride, mode="nearest"):
    """Return one level of the pyramid, [B, C, H/stride, W/stride].

    It is resampled from the nearest native stride. A native map is returned as it is.
    """
    nearest = nearest_stride(native, stride)
    if nearest == stride:
        return native[stride]
    height, width = size
    return F.interpolate(native[nearest], (height // stride, width // stride), mode=mode)


def nearest_stride(native, stride):
    """Return the native stride at the smallest ratio to `stride`. Of two alike, the finer one."""
    return min(sorted(native), key=lambda s: abs(math.log2(s / stride)))


# ------------------------------------------------------------------ weights
def load_encoder(name, weights="pretrained", device="cpu"):
    """Return an Encoder in eval mode.

    name: a key of ENCODERS, or "timm:NAME".
    weights: "pretrained", "none" (random), or a file.
    UserError if the name is unknown, or if the weights cannot be had or do not fit.
    """
    encoder = Encoder(name, find_encoder(name))
    if weights != "none":
        load_weights(encoder, weights_file(name, weights))
    return encoder.eval().to(device)


def weights_file(name, weights):
    """Return the path of the given file, or of the pretrained weights. UserError if there is none.

    Pretrained weights ship in common/, lie in the cache, or are downloaded.
    """
    hub = find_encoder(name).hub
    if weights != "pretrained":
        file = Path(weights)
    elif hub is None:
        file = Path(__file__).with_name(f"{name}.safetensors")
    else:
        return hub_file(name, hub)
    require(file.is_file(), f"weights of {name}: there is no file {file}")
    return file


def hub_file(name, hub):
    """Return the path of a file of the Hugging Face hub, downloaded unless it is in the cache.

    UserError if it can be neither found nor downloaded.
    """
    cached = huggingface_hub.try_to_load_from_cache(*hub)
    if isinstance(cached, str):
        return Path(cached)
    try:
        # A request with a short timeout comes first, because a download without network waits long.
        huggingface_hub.get_session().head(huggingface_hub.hf_hub_url(*hub), timeout=3)
        return Path(huggingface_hub.hf_hub_download(*hub))
    except Exception as error:  # offline, no access, or a full disk: the advice is the same
        raise UserError(
            f"{'/'.join(hub)} is out of reach ({type(error).__name__}): give 01_extract.py a file "
            f"with --weights {name}=FILE, or --weights none for random weights"
        ) from None


def weights_origin(name, weights):
    """Return "random", or where the weights came from and the SHA-256 of their file."""
    if weights == "none":
        return "random"
    file = weights_file(name, weights)
    hub = find_encoder(name).hub
    if weights != "pretrained":
        place = file
    elif hub is None:
        place = f"common/{file.name}"
    else:
        place = "/".join(hub)
    with file.open("rb") as opened:
        return f"{place} sha256:{hashlib.file_digest(opened, 'sha256').hexdigest()}"


def load_weights(encoder, path):
    """Fill an encoder from a file, which must hold all of its tensors and may hold others.

    path: the authors' checkpoint, timm's safetensors, or a run's checkpoint.pt.
    UserError if it cannot be read, or if a tensor is missing, not finite, or of another shape.
    """
    what = f"weights of {encoder.name}: {path}"
    try:
        if path.suffix == ".safetensors":
            contents = load_file(path)
        else:
            contents = dict(torch.load(path, "cpu", weights_only=True))
    except Exception:  # torch's message advises weights_only=False, which runs code in the file
        raise UserError(f"{what} cannot be read as tensors") from None
    try:
        tensors = tensors_for(encoder, contents, what)
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{what} is another project's checkpoint: it has another layout") from None

    fitting = {}
    for key, expected in encoder.model.state_dict().items():
        if key in tensors:
            value = tensors[key]
            # load_state_dict would turn integers into floating point without a word.
            same_kind = value.is_floating_point() == expected.is_floating_point()
            require(same_kind, f"{what} does not fit: {key} holds {value.dtype}")
            require(value.isfinite().all(), f"{what} does not fit: {key} is not finite")
            fitting[key] = value
    try:
        encoder.model.load_state_dict(fitting)
    except RuntimeError as error:
        # torch's message has a line for each tensor that is missing or of another shape.
        reason = " ".join(str(error).split())[:300]
        hint = ""
        if "training" in contents:
            hint = " (its run dropped the stages that it did not need: give the original file)"
        raise UserError(f"{what} does not fit{hint}: {reason}") from None


def tensors_for(encoder, contents, what):
    """Return a file's tensors, with the encoder's renamed to the names in its model."""
    # Some checkpoints hold more than the model, which is then found under "model".
    state = contents.get("model", contents)
    tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    if "training" not in contents:
        consume_prefix_in_state_dict_if_present(tensors, "image_encoder.trunk.")  # SAM 2.1
        return convert(encoder.model, tensors, what)
    # A run's checkpoint holds its encoders by their models' names, as trained there.
    training = contents["training"]
    roles = {training["master"]: "master", training["auxiliary"]: "auxiliary"}
    roles.pop(None, None)  # without fusion there is no auxiliary
    require(encoder.name in roles, f"{what} is the checkpoint of a run with {' and '.join(roles)}")
    consume_prefix_in_state_dict_if_present(tensors, f"pyramid.{roles[encoder.name]}.model.")
    return tensors


def convert(model, tensors, what):
    """Rename a published checkpoint's tensors by timm's function, where the model has one.

    UserError for a tensor that would be lost or changed by it.
    """
    # timm's DINOv3 has no biases of queries, keys and values, because the published ones are zero.
    has_biases = any(key.endswith("qkv.bias") for key in model.state_dict())
    for key, value in tensors.items():
        lost = key.endswith("qkv.bias") and not has_biases and value.any()
        require(not lost, f"{what} does not fit: the encoder has no place for its qkv biases")

    # timm's function prints a line for each zero bias. Where it fails, tensors are missing or have
    # another shape, and load_state_dict will say which.
    module = inspect.getmodule(type(model))
    converted = tensors
    if hasattr(module, "checkpoint_filter_fn"):
        with contextlib.suppress(Exception), contextlib.redirect_stdout(None):
            converted = module.checkpoint_filter_fn(dict(tensors), model)

    # timm's function also resamples tables of another size without a word, which is refused here. A
    # table that was resampled lies in new memory, and one that was renamed or sliced does not.
    storages = {value.untyped_storage().data_ptr() for value in tensors.values()}
    for key, table in converted.items():
        if key.endswith(("pos_embed", "patch_embed.proj.weight", "relative_position_bias_table")):
            is_original = table.untyped_storage().data_ptr() in storages
            require(is_original, f"{what} does not fit: {key} is of another size")
    return converted
