"""The fused model: what goes in at s*, what does not, and what learns."""

import copy

from common.encoders import STRIDES, load_encoder
from common.model import FusedModel, FusedPyramid

import pytest
import torch

SMALL = {"width": 32, "queries": 8, "encoder_layers": 1, "decoder_layers": 2, "heads": 4, "points": 64}
WIDTHS = (32, 32, 32, 32)


def fused(master="tiny_vit", auxiliary="tiny_hiera", stride=8, fusion="replace", modes=("ft", "fz")) -> FusedModel:
    torch.manual_seed(0)
    other = auxiliary and load_encoder(auxiliary, "none")
    levels = FusedPyramid(load_encoder(master, "none"), other, stride, fusion, WIDTHS, modes)
    return FusedModel(levels, 4, SMALL)


def some_batch(classes=4):
    images = torch.rand(2, 3, 64, 96)
    masks = [(torch.rand(3, 64, 96) > 0.5).float(), (torch.rand(1, 64, 96) > 0.5).float()]
    return images, masks, [torch.randint(classes, (3,)), torch.randint(classes, (1,))]


def step(model, learning_rate=1e-2):
    images, masks, labels = some_batch()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], learning_rate)
    sum(model.losses(model(images), masks, labels).values()).backward()
    optimiser.step()


def changes(model, images, encoder, factor=1.5) -> list[bool]:
    """Which pyramid levels change when an encoder's map at one stride is scaled; [level of STRIDES]."""
    before = model.pyramid(images)
    handle = encoder.register_forward_hook(lambda module, inputs, maps: {s: factor * m for s, m in maps.items()})
    after = model.pyramid(images)
    handle.remove()
    return [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("master, auxiliary", [("tiny_vit", "tiny_hiera"), ("tiny_hiera", "tiny_vit")])
def test_the_auxiliary_takes_over_one_level_and_only_that(stride, master, auxiliary):
    model, images = fused(master, auxiliary, stride).eval(), some_batch()[0]
    here = [s == stride for s in STRIDES]
    with torch.no_grad():
        assert changes(model, images, model.pyramid.auxiliary) == here
        assert changes(model, images, model.pyramid.master) == [not at for at in here]
        before = model(images)[-1]
        handle = model.pyramid.auxiliary.register_forward_hook(lambda m, i, maps: {s: -v for s, v in maps.items()})
        after = model(images)[-1]
        handle.remove()
    assert not torch.allclose(before[1], after[1])  # and the masks follow


@pytest.mark.parametrize("fusion", ["concat", "add"])
def test_concat_and_add_keep_both_at_the_level(fusion):
    model, images = fused(stride=16, fusion=fusion).eval(), some_batch()[0]
    with torch.no_grad():
        assert changes(model, images, model.pyramid.auxiliary) == [False, False, True, False]
        assert changes(model, images, model.pyramid.master) == [True] * 4
    assert model.pyramid.channels[2] == (32 + 96 if fusion == "concat" else 32)


def test_fusion_none_leaves_the_auxiliary_out():
    model = fused(fusion="none")
    assert model.pyramid.auxiliary is None and not any("auxiliary" in name for name, _ in model.named_parameters())
    assert len(model(some_batch()[0])) == SMALL["decoder_layers"] + 1


def test_replacing_adds_no_parameters_of_its_own():
    """The level's input projection takes the auxiliary's width; the master's own projection to it is gone."""
    model = fused(stride=8)
    assert model.pyramid.channels == [32, 48, 32, 32]
    assert set(model.pyramid.projections) == {"4", "16", "32"}


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("master", ["tiny_vit", "tiny_hiera"])
@pytest.mark.parametrize("fusion", ["replace", "concat", "add", "none"])
def test_every_trainable_parameter_gets_a_gradient(master, stride, fusion):
    auxiliary = "tiny_hiera" if master == "tiny_vit" else "tiny_vit"
    model = fused(master, auxiliary, stride, fusion).train()
    images, masks, labels = some_batch()
    sum(model.losses(model(images), masks, labels).values()).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_training_moves_the_master_and_leaves_the_auxiliary_bit_identical():
    model = fused().train()
    before = copy.deepcopy(model.state_dict())
    for _ in range(3):
        step(model)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert not any(name.startswith("pyramid.auxiliary.") for name in moved)
    assert sum(name.startswith("pyramid.master.") for name in moved) > 20
    assert not model.pyramid.auxiliary.training and model.pyramid.master.training


def test_modes_turn_the_roles_round():
    model = fused(modes=("fz", "ft")).train()
    before = copy.deepcopy(model.state_dict())
    step(model)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert not any(name.startswith("pyramid.master.") for name in moved)
    assert any(name.startswith("pyramid.auxiliary.") for name in moved)


def test_the_auxiliary_runs_only_as_deep_as_needed():
    assert len(fused(stride=4).pyramid.auxiliary.model.blocks) == 1
    assert len(fused(stride=32).pyramid.auxiliary.model.blocks) == 7
    replaced = fused("tiny_hiera", "tiny_vit", stride=32)  # the master's last stage feeds no level
    assert len(replaced.pyramid.master.model.blocks) == 6


def test_nothing_in_the_decoder_is_uninitialised_memory():
    """With deterministic algorithms torch fills fresh memory with NaN; and two builds from one seed are equal."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(4).isnan().all()  # the trap is armed
        first, second = fused(), fused()
    finally:
        torch.use_deterministic_algorithms(False)
    for (name, value), other in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert value.isfinite().all(), name
        assert torch.equal(value, other), name
    offsets = first.pixel_decoder.encoder.layers[0].self_attn.sampling_offsets
    assert not offsets.weight.any() and offsets.bias.abs().max() == 4  # a ring of points, up to 4 pixels away
    assert first.pixel_decoder.level_embed.std() > 0.5


def test_the_decoder_is_initialised_as_mask2former_s():
    """The rms that each of the official modules draws its weights and biases at, by formula."""
    torch.manual_seed(0)
    width, model = SMALL["width"], fused()
    pixel, layer = model.pixel_decoder, model.transformer.decoder.layers[0]
    encoder, own, cross = pixel.encoder.layers[0], layer.self_attn, layer.cross_attn
    predictor = model.transformer.decoder.mask_predictor.mask_embedder

    def xavier(fan_in, fan_out):
        return (2 / (fan_in + fan_out)) ** 0.5

    fine, coarse = model.pyramid.channels[0], model.pyramid.channels[3]
    expected = {
        pixel.input_projections[0][0].weight: xavier(coarse, width),
        pixel.adapter_1[0].weight: fine**-0.5,
        pixel.layer_1[0].weight: (9 * width) ** -0.5,
        pixel.mask_projection.weight: width**-0.5,
        pixel.level_embed: 1,
        encoder.fc1.weight: xavier(width, 4 * width),
        encoder.fc2.weight: xavier(width, 4 * width),
        encoder.fc1.bias: (3 * width) ** -0.5,
        encoder.self_attn.value_proj.weight: xavier(width, width),
        own.q_proj.weight: xavier(width, 3 * width),
        own.k_proj.weight: xavier(width, 3 * width),
        own.v_proj.weight: xavier(width, 3 * width),
        own.out_proj.weight: xavier(width, width),
        cross.in_proj_weight: xavier(width, 3 * width),
        cross.out_proj.weight: xavier(width, width),
        layer.fc1.weight: xavier(width, 8 * width),
        layer.fc2.bias: (3 * 8 * width) ** -0.5,
        getattr(predictor, "0").layers[0].weight: (3 * width) ** -0.5,
        model.class_predictor.weight: (3 * width) ** -0.5,
        model.transformer.queries_features.weight: 1,
    }
    for parameter, rms in expected.items():
        spread = 4 / parameter.numel() ** 0.5  # of the rms of so many draws
        assert parameter.square().mean().sqrt().item() == pytest.approx(rms, rel=spread)
    for bias in (pixel.input_projections[0][0].bias, pixel.mask_projection.bias, encoder.self_attn.value_proj.bias):
        assert not bias.any()
    for bias in (own.q_proj.bias, own.out_proj.bias, cross.in_proj_bias, cross.out_proj.bias):
        assert not bias.any()


def test_the_pixel_decoder_computes_in_float32_under_autocast():
    model, images = fused().eval(), torch.rand(1, 3, 64, 96)
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            module.register_forward_hook(lambda module, given, out, name=name: found.update({name: out.dtype}))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(images)
    pixel = {name: kind for name, kind in found.items() if name.startswith("pixel_decoder.")}
    assert pixel and set(pixel.values()) == {torch.float32}
    assert found["class_predictor"] == torch.bfloat16  # the rest does as it is told


def test_losses_refuse_what_is_not_finite_and_accept_an_empty_image():
    model = fused()
    images, masks, labels = some_batch()
    outputs = model(images)
    empty = model.losses(outputs, [masks[0], masks[1][:0]], [labels[0], labels[1][:0]])
    assert all(value.isfinite() for value in empty.values())
    outputs[1][0][0, 0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="decoder layer 1"):
        model.losses(outputs, masks, labels)


@pytest.mark.parametrize("fusion", ["replace", "concat", "add", "none"])
def test_a_batch_without_a_segment_reaches_every_parameter(fusion):
    """Or a process with such a batch would keep the others waiting for its gradients."""
    model = fused(fusion=fusion).train()
    none = [torch.zeros(0, 64, 96)] * 2, [torch.zeros(0, dtype=torch.int64)] * 2
    sum(model.losses(model(some_batch()[0]), *none).values()).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_the_loss_is_the_weighted_sum_of_the_library_terms():
    model = fused()
    images, masks, labels = some_batch()
    outputs = model(images)
    torch.manual_seed(5)
    ours = model.losses(outputs, masks, labels)
    torch.manual_seed(5)
    terms = [model.criterion(mask_logits, class_logits, masks, labels) for class_logits, mask_logits in outputs]
    for name, weight in {"cross_entropy": 2, "mask": 5, "dice": 5}.items():
        torch.testing.assert_close(ours[name], weight * sum(t[f"loss_{name}"] for t in terms))
