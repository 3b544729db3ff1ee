"""Stage 5: inference rules on masks made by hand."""

import importlib

from common.model import PADDING

import torch
import torch.nn.functional as F

stage5 = importlib.import_module("05_eval")


# ---------------------------------------------------------------------------------------------- inference


def queries(*entries, size=(8, 8)):
    """(class probabilities without no-object, rows from, rows to) -> what predict() returns."""
    classes = torch.tensor([[*p, 1 - sum(p)] for p, _, _ in entries])
    masks = torch.full((len(entries), *size), 0.1)
    for i, (_, begin, end) in enumerate(entries):
        masks[i, begin:end] = 0.9
    return classes, masks


def test_predict_pads_and_gives_masks_in_the_images_own_pixels():
    """The stand-in's mask logits are the picture's brightness: they must come back where they were."""
    seen = []

    def model(images):
        seen.append(images)
        return [(torch.zeros(1, 1, 3), 40 * (F.avg_pool2d(images[:, :1], 4) - 0.2))]

    image = torch.zeros(3, 100, 150, dtype=torch.uint8)
    image[:, 60:, :90] = 120
    for size in ("own", "200", "200/260", "64", "96x160"):
        classes, masks = stage5.predict(model, image, size, "cpu")
        assert all(side % 32 == 0 for side in seen[-1].shape[2:])
        assert masks.shape == (1, 100, 150) and classes.shape == (1, 3)
        assert ((masks[0] > 0.5) == (image[0] > 0)).float().mean() > 0.97, size
    height, width = seen[0].shape[2:]
    assert (height, width) == (128, 160) and (seen[0][:, :, 100:] == PADDING).all()


def test_semantic_adds_the_votes_of_queries():
    # Two weak queries for class 1 outvote one stronger query for class 0 where they overlap.
    classes, masks = queries(([0.6, 0, 0], 0, 8), ([0, 0.4, 0], 0, 4), ([0, 0.4, 0], 0, 4))
    labels = stage5.semantic(classes, masks)
    assert (labels[:4] == 1).all() and (labels[4:] == 0).all()


def test_instances_score_class_times_mask_quality():
    classes, masks = queries(([0, 0.2, 0.7], 0, 4), ([0.9, 0, 0.05], 4, 8))
    found, labels, scores = stage5.instances(classes, masks, things=[1, 2])
    assert labels.tolist() == [2, 1, 2, 1]  # stuff never appears
    torch.testing.assert_close(scores, torch.tensor([0.7, 0.2, 0.05, 0.0]) * 0.9)
    assert found[0, :4].all() and not found[0, 4:].any() and torch.equal(found[1], found[0])
    # stuff counts among the best, and only then is left out: of 0.9 (stuff), 0.7 and 0.2 two things stay
    assert stage5.instances(classes, masks, things=[1, 2], top=3)[1].tolist() == [2, 1]


def test_panoptic_keeps_the_sure_and_the_visible():
    classes, masks = queries(
        ([0.95, 0, 0], 0, 4),  # stuff
        ([0.95, 0, 0], 6, 8),  # the same stuff elsewhere: one segment
        ([0, 0, 0.9], 4, 6),  # a thing
        ([0, 0, 0.85], 3, 6),  # a thing that keeps a third of its mask: dropped
        ([0, 0.79, 0], 0, 8),  # not sure enough
    )
    ids, segments = stage5.panoptic(classes, masks, things=[2])
    assert [s["label"] for s in segments] == [0, 2]
    assert ids[:, 0].tolist() == [1, 1, 1, 1, 2, 2, 1, 1]


def test_panoptic_of_nothing_is_void():
    ids, segments = stage5.panoptic(*queries(([0.5, 0, 0], 0, 8)), things=[2])
    assert not ids.any() and segments == []
