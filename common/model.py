"""The fused model: the master's feature pyramid with the auxiliary's map at one stride, under a Mask2Former decoder.

images [B, 3, H, W] -> FusedPyramid -> maps at output strides 4, 8, 16, 32
                    -> pixel decoder (deformable attention over 8-32, lateral connection from 4)
                    -> transformer decoder -> for each query, class logits and a mask at output stride 4
"""

from common.encoders import STRIDES, level, load_encoder, nearest_stride

import torch
from torch import nn
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
from transformers.models.mask2former.modeling_mask2former import Mask2FormerPixelDecoder

FUSIONS = ("replace", "concat", "add", "none")
LOSS_WEIGHTS = {"cross_entropy": 2.0, "mask": 5.0, "dice": 5.0}
PADDING = 128 / 255  # grey, as detectron2 pads pictures below and to the right


class FusedPyramid(nn.Module):
    """Four maps for the decoder; master and auxiliary are encoders, the latter's map goes in at the level `stride`.

    fusion: "replace" (the method): the auxiliary's map, at its own width, in place of the master's;
        "concat": both, side by side; "add": the master's plus the auxiliary's through a 1 x 1 convolution;
        "none", or no auxiliary: the master alone.
    widths: channels of a ViT master's four levels, each a 1 x 1 convolution of its one map.
    modes: of master and auxiliary, "ft" fine-tuned or "fz" frozen, which is in eval mode and without gradients.
    """

    def __init__(self, master, auxiliary, stride, fusion, widths, modes=("ft", "fz")):
        super().__init__()
        self.master, self.stride = master, stride
        self.fusion = fusion if auxiliary is not None else "none"
        self.auxiliary = auxiliary if self.fusion != "none" else None
        self.train_master, self.train_auxiliary = (mode == "ft" for mode in modes)
        # the levels that the master feeds
        self.own = [s for s in STRIDES if not (s == stride and self.fusion == "replace")]

        # Stages deeper than any level needs are dropped: they would cost time, and no gradient would reach them.
        self.master.cut(nearest_stride(master.channels, self.own[-1]))
        self.master.requires_grad_(self.train_master)
        if self.auxiliary:
            self.auxiliary.cut(nearest_stride(auxiliary.channels, stride))
            self.auxiliary.requires_grad_(self.train_auxiliary)

        self.projections = nn.ModuleDict()
        channels = {s: master.channels[nearest_stride(master.channels, s)] for s in STRIDES}
        if len(master.channels) == 1:
            channels = dict(zip(STRIDES, widths, strict=True))
            (width,) = master.channels.values()
            self.projections.update({str(s): nn.Conv2d(width, channels[s], 1) for s in self.own})
        if self.auxiliary:
            width = auxiliary.channels[nearest_stride(auxiliary.channels, stride)]
            if self.fusion == "replace":
                channels[stride] = width
            elif self.fusion == "concat":
                channels[stride] += width
            elif self.fusion == "add":
                self.projections["add"] = nn.Conv2d(width, channels[stride], 1)
        self.channels = [channels[s] for s in STRIDES]

    def train(self, mode=True):
        super().train(mode)
        self.master.train(mode and self.train_master)
        if self.auxiliary:
            self.auxiliary.train(mode and self.train_auxiliary)
        return self

    def forward(self, images):
        """images float32 [B, 3, H, W] in [0, 1], sides multiples of 32 -> maps at strides 4, 8, 16, 32."""
        size, learn = images.shape[-2:], torch.is_grad_enabled()
        with torch.set_grad_enabled(learn and self.train_master):
            native = self.master(images)
        maps = {}
        for s in self.own:
            own = native
            if str(s) in self.projections:  # a ViT: its one map is projected first, resampling fewer channels
                own = {stride: self.projections[str(s)](feature) for stride, feature in native.items()}
            maps[s] = level(own, size, s)  # [B, width of this level, H/s, W/s]
        if self.auxiliary:
            with torch.set_grad_enabled(learn and self.train_auxiliary):
                other = level(self.auxiliary(images), size, self.stride)  # [B, C, H/stride, W/stride]
            if self.fusion == "add":
                other = maps[self.stride] + self.projections["add"](other)
            elif self.fusion == "concat":
                other = torch.cat([maps[self.stride], other], dim=1)
            maps[self.stride] = other
        return [maps[s] for s in STRIDES]


class FusedModel(nn.Module):
    """FusedPyramid under transformers' Mask2Former decoder, randomly initialised.

    classes: how many, no-object not counted. recipe: width of the decoder, a multiple of 32, queries, encoder_layers,
    decoder_layers, heads and points. Each decoder layer predicts, and so do the queries before the first.
    """

    def __init__(self, fused, classes, recipe):
        super().__init__()
        width = recipe["width"]
        config = Mask2FormerConfig(
            # The library insists on a backbone of its own; the smallest it can build is made and thrown away.
            backbone_config=SwinConfig(embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, out_indices=[1, 2, 3, 4]),
            num_labels=classes,
            num_queries=recipe["queries"],
            feature_size=width,
            mask_feature_size=width,
            hidden_dim=width,
            encoder_feedforward_dim=4 * width,
            dim_feedforward=8 * width,
            encoder_layers=recipe["encoder_layers"],
            decoder_layers=recipe["decoder_layers"] + 1,  # the library counts the queries' own prediction
            num_attention_heads=recipe["heads"],
            train_num_points=recipe["points"],
        )
        whole = Mask2FormerForUniversalSegmentation(config)
        self.pyramid = fused
        self.pixel_decoder = Mask2FormerPixelDecoder(config, fused.channels)
        self.transformer = whole.model.transformer_module
        self.class_predictor = whole.class_predictor
        self.criterion = whole.criterion
        # The library initialises no pixel decoder that it did not build (the level embedding would be whatever memory
        # held), and the rest on a scale of its own in places.
        self.pixel_decoder.apply(whole._init_weights)
        self.initialise()

    @torch.no_grad()
    def initialise(self):
        """Draw the decoder's weights as Mask2Former's authors do: on PyTorch's own scale but for what is set here."""
        encoder, decoder = self.pixel_decoder.encoder, self.transformer.decoder
        given = {module for layer in encoder.layers for module in layer.self_attn.modules()}  # right in the library
        for module in (
            m for part in (self.pixel_decoder, self.transformer, self.class_predictor) for m in part.modules()
        ):
            if isinstance(module, (nn.Linear, nn.Conv2d)) and module not in given:
                module.reset_parameters()
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)  # Caffe2's Xavier, in detectron2's words
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for convolution, _ in self.pixel_decoder.input_projections:
            nn.init.xavier_uniform_(convolution.weight)
        for layer in encoder.layers:
            nn.init.xavier_uniform_(layer.fc1.weight)
            nn.init.xavier_uniform_(layer.fc2.weight)
        for layer in decoder.layers:
            for parameter in layer.parameters():
                if parameter.ndim > 1:
                    nn.init.xavier_uniform_(parameter)
            own = layer.self_attn
            for projection in (own.q_proj, own.k_proj, own.v_proj):
                projection.weight *= 0.5**0.5  # one matrix there, [3 * width, width]
            for linear in (own.q_proj, own.k_proj, own.v_proj, own.out_proj, layer.cross_attn.out_proj):
                nn.init.zeros_(linear.bias)

    def forward(self, images):
        """images float32 [B, 3, H, W] in [0, 1], sides multiples of 32.

        Returns (class logits [B, Q, classes + 1], mask logits [B, Q, H/4, W/4]) of every decoder layer, the last one's
        last; the last class is no-object.
        """
        maps = [feature.float() for feature in self.pyramid(images)]
        with torch.autocast(images.device.type, enabled=False):  # as Mask2Former's: deformable attention needs float32
            pixels = self.pixel_decoder(maps, return_dict=True)
        decoded = self.transformer(pixels.multi_scale_features, pixels.mask_features)
        classes = [self.class_predictor(state.transpose(0, 1)) for state in decoded.intermediate_hidden_states]
        return list(zip(classes, decoded.masks_queries_logits, strict=True))

    def losses(self, outputs, masks, labels):
        """Weighted loss terms, each summed over the decoder's layers; an image may have no segment.

        outputs: what forward returned; masks: for each image float32 [S, H, W] of 0 and 1; labels: int64 [S].
        Raises FloatingPointError for what is not finite: the library's matcher would hide it.
        """
        total = dict.fromkeys(LOSS_WEIGHTS, 0.0)
        largest = [torch.maximum(a.abs().amax(), b.abs().amax()) for a, b in outputs]  # NaN if there is one
        finite = torch.stack(largest).isfinite().tolist()
        if not all(finite):
            raise FloatingPointError(f"the logits of decoder layer {finite.index(False)} are not finite")
        for class_logits, mask_logits in outputs:
            terms = self.criterion(mask_logits.float(), class_logits.float(), masks, labels)
            for name, weight in LOSS_WEIGHTS.items():
                total[name] = total[name] + weight * terms[f"loss_{name}"]
        for name, value in total.items():
            if not value.isfinite():
                raise FloatingPointError(f"the {name} loss is {value.item()}")
        return total


def build_model(settings, weights):
    """The model that a checkpoint's settings describe; weights: {encoder: as in load_encoder}, random if not named."""
    names = [settings["master"]] + [settings["auxiliary"]] * (settings["fusion"] != "none")
    master, *auxiliary = [load_encoder(name, weights.get(name, "none")) for name in names]
    modes, widths = (settings["master_mode"], settings["aux_mode"]), settings["recipe"]["vit_widths"]
    fused = FusedPyramid(master, *(auxiliary or [None]), settings["stride"], settings["fusion"], widths, modes)
    return FusedModel(fused, len(settings["class_names"]), settings["recipe"])
