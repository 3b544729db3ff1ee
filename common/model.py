"""The fused model: the master's feature pyramid with the auxiliary's feature map at one output
stride, under a Mask2Former decoder.

images [B, 3, H, W] -> FusedPyramid -> feature maps at output strides 4, 8, 16, 32
                    -> pixel decoder (deformable attention over 8-32, lateral connection from 4)
                    -> transformer decoder -> class logits and a mask at output stride 4 per query

Fusion: "Metric-Guided Feature Fusion of Visual Foundation Models for Segmentation Tasks",
arXiv 2605.16864. Decoder, its initialisation and its loss: Mask2Former, arXiv 2112.01527.
"""

from common.encoders import STRIDES, level, load_encoder

import torch
from torch import nn
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
from transformers.models.mask2former.modeling_mask2former import Mask2FormerPixelDecoder

FUSIONS = ("replace", "concat", "add", "none")
LOSS_WEIGHTS = {"cross_entropy": 2.0, "mask": 5.0, "dice": 5.0}
PADDING = 128 / 255  # the grey with which detectron2 pads images below and to the right


class FusedPyramid(nn.Module):
    """Four feature maps for the decoder, at output strides 4, 8, 16 and 32.

    master, auxiliary: two Encoders. The auxiliary may be None if fusion is "none".
    stride: output stride of the level that takes the auxiliary's map. None if fusion is "none".
    fusion: "replace", the paper's method, puts the auxiliary's map in the master's place at that
        level, with its own number of channels. "concat" puts it beside the master's map. "add" adds
        it to the master's map after a 1 x 1 convolution. "none" leaves the auxiliary out.
    level_channels: channels of the four levels of a ViT master. It has one map, and a 1 x 1
        convolution makes each level from it. Other masters have a map of their own for each level.
    modes: of the master and of the auxiliary, "finetuned" or "frozen". A frozen encoder stays in
        eval mode and gets no gradients.

    Attribute `channels`: {stride: channels of the level that forward() returns}.
    """

    def __init__(self, master, auxiliary, stride, fusion, level_channels, modes):
        super().__init__()
        self.master = master
        self.auxiliary = auxiliary if fusion != "none" else None
        self.stride = stride
        self.fusion = fusion
        self.train_master = modes[0] == "finetuned"
        self.train_auxiliary = modes[1] == "finetuned"
        self.master_levels = list(STRIDES)
        if fusion == "replace":
            self.master_levels.remove(stride)

        # Stages deeper than any level needs would cost time, and no gradient would reach them.
        master.truncate(self.master_levels[-1])
        master.requires_grad_(self.train_master)
        if fusion != "none":
            auxiliary.truncate(stride)
            auxiliary.requires_grad_(self.train_auxiliary)
            auxiliary_channels = auxiliary.channels_at(stride)

        # First the channels that the master gives to each level, then what fusion makes of them.
        master_is_vit = len(master.channels) == 1
        if master_is_vit:
            master_channels = dict(zip(STRIDES, level_channels, strict=True))
        else:
            master_channels = {s: master.channels_at(s) for s in STRIDES}
        self.channels = dict(master_channels)
        if fusion == "replace":
            self.channels[stride] = auxiliary_channels
        elif fusion == "concat":
            self.channels[stride] += auxiliary_channels

        self.projections = nn.ModuleDict()
        if master_is_vit:
            for s in self.master_levels:
                self.projections[str(s)] = nn.Conv2d(master.channels_at(s), master_channels[s], 1)
        if fusion == "add":
            self.add_projection = nn.Conv2d(auxiliary_channels, master_channels[stride], 1)

    def train(self, mode=True):
        """Set training or eval mode. Frozen encoders stay in eval mode."""
        super().train(mode)
        self.master.train(mode and self.train_master)
        if self.fusion != "none":
            self.auxiliary.train(mode and self.train_auxiliary)
        return self

    def forward(self, images):
        """Return {stride: [B, channels[stride], H/stride, W/stride]} for strides 4, 8, 16 and 32.

        images: float32 [B, 3, H, W] in [0, 1], H and W multiples of 32.
        """
        levels = self.read_master(images)
        if self.fusion != "none":
            auxiliary_map = self.read_auxiliary(images)
            levels[self.stride] = self.fuse(levels, auxiliary_map)
        return {s: levels[s] for s in STRIDES}

    def read_master(self, images):
        """Return the levels that the master feeds, {stride: [B, C, H/stride, W/stride]}."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.train_master):
            native = self.master(images)
        levels = {}
        for s in self.master_levels:
            maps = native
            if self.projections:
                # A ViT's only map. To project it after enlarging it to OS 4 would cost 16 times as
                # much.
                projection = self.projections[str(s)]
                maps = {stride: projection(vit_map) for stride, vit_map in native.items()}
            levels[s] = level(maps, images.shape[-2:], s)
        return levels

    def read_auxiliary(self, images):
        """Return the auxiliary's map at the fused level, [B, C, H/stride, W/stride]."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.train_auxiliary):
            native = self.auxiliary(images)
            return level(native, images.shape[-2:], self.stride)

    def fuse(self, levels, auxiliary_map):
        """Return the fused level, [B, channels[stride], H/stride, W/stride]."""
        if self.fusion == "replace":
            return auxiliary_map
        if self.fusion == "add":
            return levels[self.stride] + self.add_projection(auxiliary_map)
        return torch.cat([levels[self.stride], auxiliary_map], dim=1)


class FusedModel(nn.Module):
    """A FusedPyramid under transformers' Mask2Former decoder, which starts from random weights.

    classes: number of classes without no-object.
    recipe: dictionary with hidden_dim (channels of the decoder, a multiple of 32), queries,
        pixel_decoder_layers, decoder_layers, heads, and sample_points (points of each mask at
        which the loss is taken).
    """

    def __init__(self, pyramid, classes, recipe):
        super().__init__()
        hidden_dim = recipe["hidden_dim"]
        # The library insists on a backbone of its own. The smallest one is built and thrown away.
        swin = SwinConfig(embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, out_indices=[1, 2, 3, 4])
        config = Mask2FormerConfig(
            backbone_config=swin,
            num_labels=classes,
            num_queries=recipe["queries"],
            feature_size=hidden_dim,
            mask_feature_size=hidden_dim,
            hidden_dim=hidden_dim,
            encoder_feedforward_dim=4 * hidden_dim,
            dim_feedforward=8 * hidden_dim,
            encoder_layers=recipe["pixel_decoder_layers"],
            # The library counts the prediction that the queries make before the first layer.
            decoder_layers=recipe["decoder_layers"] + 1,
            num_attention_heads=recipe["heads"],
            train_num_points=recipe["sample_points"],
        )
        library_model = Mask2FormerForUniversalSegmentation(config)
        self.pyramid = pyramid
        self.pixel_decoder = Mask2FormerPixelDecoder(config, list(pyramid.channels.values()))
        self.transformer = library_model.model.transformer_module
        self.class_predictor = library_model.class_predictor
        self.criterion = library_model.criterion
        # The library initialises no pixel decoder that it did not build itself. Without this call
        # its level embedding would be uninitialised memory.
        self.pixel_decoder.apply(library_model._init_weights)
        self.initialise()

    @torch.no_grad()
    def initialise(self):
        """Draw the decoder's weights as Mask2Former's authors do.

        The library draws some of them on another scale. What is not set here has PyTorch's own.
        """
        # The library draws deformable attention as the authors do.
        already_initialised = set()
        for layer in self.pixel_decoder.encoder.layers:
            already_initialised.update(layer.self_attn.modules())
        parts = nn.ModuleList([self.pixel_decoder, self.transformer, self.class_predictor])
        for module in parts.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)) and module not in already_initialised:
                module.reset_parameters()
            if isinstance(module, nn.Conv2d):
                # This is Caffe2's Xavier initialisation, which detectron2 gives to convolutions.
                nn.init.kaiming_uniform_(module.weight, a=1)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

        # pixel decoder
        for convolution, _ in self.pixel_decoder.input_projections:
            nn.init.xavier_uniform_(convolution.weight)
        for layer in self.pixel_decoder.encoder.layers:
            nn.init.xavier_uniform_(layer.fc1.weight)
            nn.init.xavier_uniform_(layer.fc2.weight)

        # transformer decoder
        for layer in self.transformer.decoder.layers:
            for parameter in layer.parameters():
                if parameter.ndim > 1:
                    nn.init.xavier_uniform_(parameter)
            attention = layer.self_attn
            # The authors' attention keeps q, k and v in one matrix [3 * hidden_dim, hidden_dim].
            # Xavier's variance is 2 / (fan-in + fan-out), there 2 / 4d and here 2 / 2d.
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
                projection.weight *= 0.5**0.5
                nn.init.zeros_(projection.bias)
            nn.init.zeros_(attention.out_proj.bias)
            nn.init.zeros_(layer.cross_attn.out_proj.bias)

    def forward(self, images):
        """Return (class logits [B, Q, classes + 1], mask logits [B, Q, H/4, W/4]) for each layer.

        images: float32 [B, 3, H, W] in [0, 1], H and W multiples of 32.
        The list begins with what the queries predict before the first decoder layer, and ends with
        the last layer's prediction. The last class is no-object.
        """
        maps = [feature.float() for feature in self.pyramid(images).values()]
        # Deformable attention needs float32, as in Mask2Former's own code.
        with torch.autocast(images.device.type, enabled=False):
            pixels = self.pixel_decoder(maps, return_dict=True)
        decoded = self.transformer(pixels.multi_scale_features, pixels.mask_features)
        states = decoded.intermediate_hidden_states  # one [Q, B, hidden_dim] for each prediction
        class_logits = [self.class_predictor(state.transpose(0, 1)) for state in states]
        return list(zip(class_logits, decoded.masks_queries_logits, strict=True))

    def losses(self, outputs, masks, labels):
        """Return {name: loss}, each weighted by LOSS_WEIGHTS and summed over the decoder's layers.

        outputs: what forward() returned.
        masks: one float32 [S, H, W] of 0 and 1 for each image, which may have no segment (S = 0).
        labels: one int64 [S] of classes for each image.
        Raises FloatingPointError if a logit or a loss is not finite.
        """
        # The library's matcher hides NaN, so the logits are checked first. amax() returns NaN if
        # there is one. One transfer from the GPU serves all layers.
        largest = []
        for class_logits, mask_logits in outputs:
            largest.append(torch.maximum(class_logits.abs().amax(), mask_logits.abs().amax()))
        finite = torch.stack(largest).isfinite().tolist()
        if not all(finite):
            raise FloatingPointError(
                f"the logits of decoder layer {finite.index(False)} are not finite"
            )

        total = dict.fromkeys(LOSS_WEIGHTS, 0.0)
        for class_logits, mask_logits in outputs:
            terms = self.criterion(mask_logits.float(), class_logits.float(), masks, labels)
            for name, weight in LOSS_WEIGHTS.items():
                total[name] += weight * terms[f"loss_{name}"]
        for name, value in total.items():
            if not value.isfinite():
                raise FloatingPointError(f"the {name} loss is {value.item()}")
        return total


def build_model(training, weights):
    """Build the model that a checkpoint's "training" describes.

    training: dictionary with master, auxiliary, stride, fusion, master_mode, aux_mode, class_names
        and recipe. With fusion "none", auxiliary and stride are None.
    weights: {encoder: "pretrained", "none" or a file}. An encoder that is not named is random.
    """

    def load(name):
        return load_encoder(name, weights.get(name, "none"))

    master = load(training["master"])
    auxiliary = None
    if training["fusion"] != "none":
        auxiliary = load(training["auxiliary"])
    pyramid = FusedPyramid(
        master,
        auxiliary,
        training["stride"],
        training["fusion"],
        training["recipe"]["level_channels"],
        modes=(training["master_mode"], training["aux_mode"]),
    )
    return FusedModel(pyramid, len(training["class_names"]), training["recipe"])
