"""The fused model: the master's feature pyramid with the auxiliary's map at one stride, under a Mask2Former decoder.

images [B, 3, H, W] -> FusedPyramid -> maps at output strides 4, 8, 16, 32
                    -> pixel decoder (deformable attention over 8-32, lateral connection from 4)
                    -> transformer decoder -> for each query, class logits and a mask at output stride 4
"""

import math

import torch
from torch import nn
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
from transformers.models.mask2former.modeling_mask2former import Mask2FormerPixelDecoder

from common.encoders import STRIDES, Encoder, level, load_encoder, nearest_stride

LOSS_WEIGHTS = {"cross_entropy": 2.0, "mask": 5.0, "dice": 5.0}
PADDING = 128 / 255  # grey, as detectron2 pads pictures below and to the right


class FusedPyramid(nn.Module):
    """Four maps for the decoder, at most one of them touched by the auxiliary.

    master, auxiliary: encoders; auxiliary None or fusion "none" leaves the master alone.
    stride: the level s* at which the auxiliary's map goes in.
    fusion: "replace" (the method): the auxiliary's map, at its own width, in place of the master's;
        "concat": both, side by side; "add": the master's plus the auxiliary's through a 1 x 1 convolution.
    widths: channels of a ViT master's four levels, each a 1 x 1 convolution of its one map.
    train_master, train_auxiliary: a frozen encoder runs in eval mode and without gradients.
    """

    def __init__(
        self,
        master: Encoder,
        auxiliary: Encoder | None = None,
        stride: int = 16,
        fusion: str = "replace",
        widths: tuple[int, int, int, int] = (128, 256, 512, 1024),
        train_master: bool = True,
        train_auxiliary: bool = False,
    ):
        super().__init__()
        self.master, self.stride = master, stride
        self.fusion = fusion if auxiliary is not None else "none"
        self.auxiliary = auxiliary if self.fusion != "none" else None
        self.train_master, self.train_auxiliary = train_master, train_auxiliary
        # the levels that the master feeds
        self.own = [s for s in STRIDES if not (s == stride and self.fusion == "replace")]

        # What no level needs is dropped: it would cost time, and no gradient would ever reach it.
        self.master.cut(nearest_stride(master.channels, self.own[-1]))
        if self.auxiliary:
            self.auxiliary.cut(nearest_stride(auxiliary.channels, stride))
        self.master.requires_grad_(train_master)
        if self.auxiliary:
            self.auxiliary.requires_grad_(train_auxiliary)

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
            else:
                self.projections["add"] = nn.Conv2d(width, channels[stride], 1)
        self.channels = [channels[s] for s in STRIDES]

    def train(self, mode: bool = True) -> "FusedPyramid":
        super().train(mode)
        self.master.train(mode and self.train_master)
        if self.auxiliary:
            self.auxiliary.train(mode and self.train_auxiliary)
        return self

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
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

    classes: number of classes, no-object not counted. width: channels of the decoder, a multiple of 32.
    decoder_layers: each predicts, and so does the learned query before the first: decoder_layers + 1 predictions.
    """

    def __init__(
        self,
        fused: FusedPyramid,
        classes: int,
        width: int = 256,
        queries: int = 100,
        encoder_layers: int = 6,
        decoder_layers: int = 9,
        heads: int = 8,
        points: int = 12544,
    ):
        super().__init__()
        config = Mask2FormerConfig(
            # The library insists on a backbone of its own; the smallest it can build is made and thrown away.
            backbone_config=SwinConfig(embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, out_indices=[1, 2, 3, 4]),
            num_labels=classes,
            num_queries=queries,
            feature_size=width,
            mask_feature_size=width,
            hidden_dim=width,
            encoder_feedforward_dim=4 * width,
            dim_feedforward=8 * width,
            encoder_layers=encoder_layers,
            decoder_layers=decoder_layers + 1,
            num_attention_heads=heads,
            train_num_points=points,
        )
        whole = Mask2FormerForUniversalSegmentation(config)
        pixel_decoder = Mask2FormerPixelDecoder(config, fused.channels)
        # Built by hand, it is not initialised by the library: the level embedding would be whatever memory held.
        pixel_decoder.apply(whole._init_weights)
        # As Mask2Former's input projections; the library leaves them at a std of 0.02.
        for module in pixel_decoder.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
        self.pyramid = fused
        self.pixel_decoder = pixel_decoder
        self.transformer = whole.model.transformer_module
        self.class_predictor = whole.class_predictor
        self.criterion = whole.criterion

    def forward(self, images: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """images float32 [B, 3, H, W] in [0, 1], sides multiples of 32.

        Returns (class logits [B, Q, classes + 1], mask logits [B, Q, H/4, W/4]) of every decoder layer, the last one's
        last; the last class is no-object.
        """
        # In float32, for the position encodings take the maps' kind of number; autocast still computes in its own.
        pixels = self.pixel_decoder([feature.float() for feature in self.pyramid(images)], return_dict=True)
        decoded = self.transformer(pixels.multi_scale_features, pixels.mask_features)
        classes = [self.class_predictor(state.transpose(0, 1)) for state in decoded.intermediate_hidden_states]
        return list(zip(classes, decoded.masks_queries_logits, strict=True))

    def loss_counts(self, labels: list[torch.Tensor]) -> torch.Tensor:
        """What the loss divides by, float32 [2]: the number of masks, and the weight of all queries' classes."""
        queries = self.transformer.queries_embedder.num_embeddings
        no_object = self.criterion.eos_coef  # the weight of a query that no mask is matched to
        matched = sum(min(len(k), queries) for k in labels)
        return torch.tensor([sum(map(len, labels)), matched + no_object * (len(labels) * queries - matched)])

    def losses(
        self, outputs: list, masks: list[torch.Tensor], labels: list[torch.Tensor], counts: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Weighted loss terms, each summed over the decoder's layers.

        outputs: what forward returned; masks: for each image float32 [S, H, W] of 0 and 1; labels: int64 [S].
        An image may have no segment. counts: where this is one of several parts of a batch, the mean of their
        loss_counts (of masks, at least one in all); the parts' losses then average to that of the whole batch. Raises
        FloatingPointError for logits or losses that are not finite, which the library's matcher would hide.
        """
        outputs = [(class_logits.float(), mask_logits.float()) for class_logits, mask_logits in outputs]
        finite = torch.stack([torch.stack([logits.isfinite().all() for logits in pair]).all() for pair in outputs])
        for layer, fine in enumerate(finite.tolist()):
            if not fine:
                raise FloatingPointError(f"the logits of decoder layer {layer} are not finite")
        total = dict.fromkeys(LOSS_WEIGHTS, 0.0)
        for class_logits, mask_logits in outputs:
            terms = self.criterion(mask_logits, class_logits, masks, labels)
            for name, weight in LOSS_WEIGHTS.items():
                total[name] = total[name] + weight * terms[f"loss_{name}"]
        if counts is not None:
            own = self.loss_counts(labels)
            own[0].clamp_(min=1)  # the library divides by one mask where there is none
            of_masks, of_classes = (own / counts).tolist()
            shares = {"cross_entropy": of_classes, "mask": of_masks, "dice": of_masks}
            total = {name: shares[name] * value for name, value in total.items()}
        for name, value in zip(total, torch.stack(list(total.values())).tolist(), strict=True):
            if not math.isfinite(value):
                raise FloatingPointError(f"the {name} loss is {value}")
        return total


def build_model(settings: dict, weights: dict[str, str]) -> FusedModel:
    """The model that a checkpoint's settings describe; weights: {encoder: as in load_encoder}.

    An encoder that `weights` does not name stays random: evaluation fills the whole model from the checkpoint.
    """
    master = load_encoder(settings["master"], weights.get(settings["master"], "none"))
    auxiliary = None
    if settings["fusion"] != "none":
        auxiliary = load_encoder(settings["auxiliary"], weights.get(settings["auxiliary"], "none"))
    fused = FusedPyramid(
        master,
        auxiliary,
        settings["stride"],
        settings["fusion"],
        settings["vit_widths"],
        train_master=settings["master_mode"] == "ft",
        train_auxiliary=settings["aux_mode"] == "ft",
    )
    names = ("width", "queries", "encoder_layers", "decoder_layers", "heads", "points")
    return FusedModel(fused, len(settings["classes"]), **{name: settings[name] for name in names})
