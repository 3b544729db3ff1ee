"""The fused model: what goes in at the fused level, what does not, and what learns."""

import copy
from typing import NamedTuple

from common.encoders import STRIDES, load_encoder
from common.model import FusedModel, FusedPyramid

import pytest
import torch

SMALL = {
    "hidden_dim": 32,
    "queries": 8,
    "pixel_decoder_layers": 1,
    "decoder_layers": 2,
    "heads": 4,
    "sample_points": 64,
}
LEVEL_CHANNELS = (32, 32, 32, 32)
FUSIONS = ("replace", "concat", "add", "none")


class Batch(NamedTuple):
    images: torch.Tensor  # [2, 3, 64, 96]
    masks: list[torch.Tensor]
    labels: list[torch.Tensor]


def fused(
    master="tiny_vit",
    auxiliary="tiny_hiera",
    stride=8,
    fusion="replace",
    modes=("finetuned", "frozen"),
) -> FusedModel:
    torch.manual_seed(0)
    auxiliary = load_encoder(auxiliary, "none")
    master = load_encoder(master, "none")
    pyramid = FusedPyramid(master, auxiliary, stride, fusion, LEVEL_CHANNELS, modes)
    return FusedModel(pyramid, classes=4, recipe=SMALL)


def some_batch(classes=4) -> Batch:
    """Two images, with three segments and with one."""
    images = torch.rand(2, 3, 64, 96)
    first = (torch.rand(3, 64, 96) > 0.5).float()
    second = (torch.rand(1, 64, 96) > 0.5).float()
    labels = [torch.randint(classes, (3,)), torch.randint(classes, (1,))]
    return Batch(images, [first, second], labels)


def backward(model, batch):
    losses = model.losses(model(batch.images), batch.masks, batch.labels)
    sum(losses.values()).backward()


def parameters_without_gradient(model) -> list[str]:
    missing = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.grad is None:
            missing.append(name)
    return missing


def step(model, learning_rate=1e-2):
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trainable, learning_rate)
    backward(model, some_batch())
    optimiser.step()


def moved(model, before) -> list[str]:
    """Names of what differs from an earlier state."""
    state = model.state_dict()
    return [name for name in state if not torch.equal(state[name], before[name])]


def scale_maps(encoder, factor):
    """From now on, all maps of the encoder are scaled. Returns the handle that ends it."""

    def hook(module, inputs, maps):
        return {stride: factor * feature for stride, feature in maps.items()}

    return encoder.register_forward_hook(hook)


def changed_levels(model, images, encoder) -> list[int]:
    """Strides of the pyramid's levels that change when all maps of an encoder are scaled."""
    before = model.pyramid(images)
    handle = scale_maps(encoder, 1.5)
    after = model.pyramid(images)
    handle.remove()
    return [stride for stride in STRIDES if not torch.equal(before[stride], after[stride])]


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize(
    "master, auxiliary", [("tiny_vit", "tiny_hiera"), ("tiny_hiera", "tiny_vit")]
)
def test_the_auxiliary_takes_over_one_level_and_only_that(stride, master, auxiliary):
    model = fused(master, auxiliary, stride).eval()
    images = some_batch().images
    others = [s for s in STRIDES if s != stride]
    with torch.no_grad():
        assert changed_levels(model, images, model.pyramid.auxiliary) == [stride]
        assert changed_levels(model, images, model.pyramid.master) == others
        _, before = model(images)[-1]
        scale_maps(model.pyramid.auxiliary, -1)
        _, after = model(images)[-1]
    assert not torch.allclose(before, after)  # the masks change with the level


@pytest.mark.parametrize("fusion", ["concat", "add"])
def test_concat_and_add_keep_both_at_the_level(fusion):
    model = fused(stride=16, fusion=fusion).eval()
    images = some_batch().images
    with torch.no_grad():
        assert changed_levels(model, images, model.pyramid.auxiliary) == [16]
        assert changed_levels(model, images, model.pyramid.master) == list(STRIDES)
    expected = {"concat": 32 + 96, "add": 32}
    assert model.pyramid.channels[16] == expected[fusion]


def test_fusion_none_leaves_the_auxiliary_out():
    model = fused(fusion="none")
    assert model.pyramid.auxiliary is None
    assert not any("auxiliary" in name for name, _ in model.named_parameters())
    assert len(model(some_batch().images)) == SMALL["decoder_layers"] + 1


def test_fusion_none_needs_neither_auxiliary_nor_stride():
    pyramid = FusedPyramid(
        load_encoder("tiny_vit", "none"), None, None, "none", LEVEL_CHANNELS, ("frozen", "frozen")
    )
    levels = pyramid(some_batch().images)
    assert list(levels) == list(STRIDES)


def test_replacing_adds_no_parameters_of_its_own():
    """The level's input projection is made for the auxiliary's channels, the master's own goes."""
    model = fused(stride=8)
    assert model.pyramid.channels == {4: 32, 8: 48, 16: 32, 32: 32}
    assert set(model.pyramid.projections) == {"4", "16", "32"}
    own = dict(model.pyramid.named_children())
    assert set(own) == {"master", "auxiliary", "projections"}


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("master", ["tiny_vit", "tiny_hiera"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_trainable_parameter_gets_a_gradient(master, stride, fusion):
    auxiliary = {"tiny_vit": "tiny_hiera", "tiny_hiera": "tiny_vit"}[master]
    model = fused(master, auxiliary, stride, fusion).train()
    backward(model, some_batch())
    assert parameters_without_gradient(model) == []


def test_training_moves_the_master_and_leaves_the_auxiliary_bit_identical():
    model = fused().train()
    before = copy.deepcopy(model.state_dict())
    for _ in range(3):
        step(model)
    names = moved(model, before)
    assert not any(name.startswith("pyramid.auxiliary.") for name in names)
    assert sum(name.startswith("pyramid.master.") for name in names) > 20
    assert not model.pyramid.auxiliary.training
    assert model.pyramid.master.training


def test_modes_swap_the_roles():
    model = fused(modes=("frozen", "finetuned")).train()
    before = copy.deepcopy(model.state_dict())
    step(model)
    names = moved(model, before)
    assert not any(name.startswith("pyramid.master.") for name in names)
    assert any(name.startswith("pyramid.auxiliary.") for name in names)


def test_the_auxiliary_runs_only_as_deep_as_needed():
    assert len(fused(stride=4).pyramid.auxiliary.model.blocks) == 1
    assert len(fused(stride=32).pyramid.auxiliary.model.blocks) == 7
    # The master's last stage feeds no level here.
    replaced = fused("tiny_hiera", "tiny_vit", stride=32)
    assert len(replaced.pyramid.master.model.blocks) == 6


def test_nothing_in_the_decoder_is_uninitialised_memory():
    """With deterministic algorithms torch fills fresh memory with NaN.

    Two models built from one seed are equal.
    """
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(4).isnan().all()  # or this test would find nothing
        first, second = fused(), fused()
    finally:
        torch.use_deterministic_algorithms(False)
    other = second.state_dict()
    for name, value in first.state_dict().items():
        assert value.isfinite().all(), name
        assert torch.equal(value, other[name]), name
    # Deformable attention begins with a ring of points, at most 4 pixels away.
    offsets = first.pixel_decoder.encoder.layers[0].self_attn.sampling_offsets
    assert not offsets.weight.any()
    assert offsets.bias.abs().max() == 4
    assert first.pixel_decoder.level_embed.std() > 0.5


def test_the_decoder_is_initialised_as_mask2former_s():
    """The rms of what each of the official modules draws, by formula."""
    torch.manual_seed(0)
    dim = SMALL["hidden_dim"]
    model = fused()
    pixel = model.pixel_decoder
    encoder = pixel.encoder.layers[0]
    layer = model.transformer.decoder.layers[0]
    self_attention, cross_attention = layer.self_attn, layer.cross_attn
    predictor = model.transformer.decoder.mask_predictor.mask_embedder

    def xavier(fan_in, fan_out):
        return (2 / (fan_in + fan_out)) ** 0.5

    fine, coarse = model.pyramid.channels[4], model.pyramid.channels[32]
    expected = {
        pixel.input_projections[0][0].weight: xavier(coarse, dim),
        pixel.adapter_1[0].weight: fine**-0.5,
        pixel.layer_1[0].weight: (9 * dim) ** -0.5,
        pixel.mask_projection.weight: dim**-0.5,
        pixel.level_embed: 1,
        encoder.fc1.weight: xavier(dim, 4 * dim),
        encoder.fc2.weight: xavier(dim, 4 * dim),
        encoder.fc1.bias: (3 * dim) ** -0.5,
        encoder.self_attn.value_proj.weight: xavier(dim, dim),
        self_attention.q_proj.weight: xavier(dim, 3 * dim),
        self_attention.k_proj.weight: xavier(dim, 3 * dim),
        self_attention.v_proj.weight: xavier(dim, 3 * dim),
        self_attention.out_proj.weight: xavier(dim, dim),
        cross_attention.in_proj_weight: xavier(dim, 3 * dim),
        cross_attention.out_proj.weight: xavier(dim, dim),
        layer.fc1.weight: xavier(dim, 8 * dim),
        layer.fc2.bias: (3 * 8 * dim) ** -0.5,
        getattr(predictor, "0").layers[0].weight: (3 * dim) ** -0.5,
        model.class_predictor.weight: (3 * dim) ** -0.5,
        model.transformer.queries_features.weight: 1,
    }
    for parameter, rms in expected.items():
        spread = 4 / parameter.numel() ** 0.5  # of the rms of so many draws
        assert parameter.square().mean().sqrt().item() == pytest.approx(rms, rel=spread)

    zero = [
        pixel.input_projections[0][0].bias,
        pixel.mask_projection.bias,
        encoder.self_attn.value_proj.bias,
        self_attention.q_proj.bias,
        self_attention.k_proj.bias,
        self_attention.v_proj.bias,
        self_attention.out_proj.bias,
        cross_attention.in_proj_bias,
        cross_attention.out_proj.bias,
    ]
    for bias in zero:
        assert not bias.any()


def test_the_pixel_decoder_computes_in_float32_under_autocast():
    model = fused().eval()
    dtypes = {}
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):

            def remember(module, inputs, output, name=name):
                dtypes[name] = output.dtype

            module.register_forward_hook(remember)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(torch.rand(1, 3, 64, 96))
    pixel_decoder = {dtypes[name] for name in dtypes if name.startswith("pixel_decoder.")}
    assert pixel_decoder == {torch.float32}
    assert dtypes["class_predictor"] == torch.bfloat16  # autocast holds for the rest


def test_losses_refuse_what_is_not_finite_and_accept_an_empty_image():
    model = fused()
    images, masks, labels = some_batch()
    outputs = model(images)
    losses = model.losses(outputs, [masks[0], masks[1][:0]], [labels[0], labels[1][:0]])
    assert all(value.isfinite() for value in losses.values())
    outputs[1][0][0, 0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="decoder layer 1"):
        model.losses(outputs, masks, labels)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_batch_without_a_segment_reaches_every_parameter(fusion):
    """Or a process with such a batch would keep the others waiting for its gradients."""
    model = fused(fusion=fusion).train()
    no_masks = [torch.zeros(0, 64, 96), torch.zeros(0, 64, 96)]
    no_labels = [torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)]
    backward(model, Batch(some_batch().images, no_masks, no_labels))
    assert parameters_without_gradient(model) == []


def test_the_loss_is_the_weighted_sum_of_the_library_terms():
    model = fused()
    images, masks, labels = some_batch()
    outputs = model(images)
    torch.manual_seed(5)
    losses = model.losses(outputs, masks, labels)
    torch.manual_seed(5)
    expected = {"cross_entropy": 0, "mask": 0, "dice": 0}
    weights = {"cross_entropy": 2, "mask": 5, "dice": 5}
    for class_logits, mask_logits in outputs:
        terms = model.criterion(mask_logits, class_logits, masks, labels)
        for name, weight in weights.items():
            expected[name] = expected[name] + weight * terms[f"loss_{name}"]
    for name in weights:
        torch.testing.assert_close(losses[name], expected[name])
