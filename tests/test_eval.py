"""Stage 5: the inference rules, on masks made by hand."""

import importlib

from common.model import PADDING

import torch
import torch.nn.functional as F

stage5 = importlib.import_module("05_eval")


def queries(*entries, size=(8, 8)):
    """A Prediction of queries, each given as (class probabilities, first row, end row).

    The class probabilities lack no-object, which gets the rest.
    """
    classes = torch.tensor([[*p, 1 - sum(p)] for p, _, _ in entries])
    masks = torch.full((len(entries), *size), 0.1)
    for i, (_, begin, end) in enumerate(entries):
        masks[i, begin:end] = 0.9
    return stage5.Prediction(classes, masks)


def test_predict_pads_and_gives_masks_in_the_images_own_pixels():
    """The stand-in's mask logits are the image's brightness. They must come back in place."""
    seen = []

    def model(images):
        seen.append(images)
        brightness = F.avg_pool2d(images[:, :1], 4)
        return [(torch.zeros(1, 1, 3), 40 * (brightness - 0.2))]

    image = torch.zeros(3, 100, 150, dtype=torch.uint8)
    image[:, 60:, :90] = 120
    for size in ("original", "200", "200/260", "64", "96x160"):
        prediction = stage5.predict(model, image, size)
        assert all(side % 32 == 0 for side in seen[-1].shape[2:])
        assert prediction.masks.shape == (1, 100, 150)
        assert prediction.class_probabilities.shape == (1, 3)
        same = (prediction.masks[0] > 0.5) == (image[0] > 0)
        assert same.float().mean() > 0.97, size
    original = seen[0]
    assert original.shape[2:] == (128, 160)
    assert (original[:, :, 100:] == PADDING).all()


def test_semantic_adds_the_votes_of_queries():
    # Two weak queries for class 1 outvote one stronger query for class 0 where they overlap.
    prediction = queries(([0.6, 0, 0], 0, 8), ([0, 0.4, 0], 0, 4), ([0, 0.4, 0], 0, 4))
    labels = stage5.semantic(prediction)
    assert (labels[:4] == 1).all() and (labels[4:] == 0).all()


def test_instances_score_class_times_mask_quality():
    prediction = queries(([0, 0.2, 0.7], 0, 4), ([0.9, 0, 0.05], 4, 8))
    isthing = [False, True, True]
    masks, labels, confidences = stage5.instances(prediction, isthing)
    assert labels.tolist() == [2, 1, 2, 1]  # Stuff never appears.
    torch.testing.assert_close(confidences, torch.tensor([0.7, 0.2, 0.05, 0.0]) * 0.9)
    assert masks[0, :4].all() and not masks[0, 4:].any() and torch.equal(masks[1], masks[0])
    # Stuff counts among the best, and only then is left out: of 0.9 (stuff), 0.7 and 0.2 two things
    # stay.
    assert stage5.instances(prediction, isthing, top=3).labels.tolist() == [2, 1]


def test_panoptic_keeps_the_confident_and_the_visible():
    prediction = queries(
        ([0.95, 0, 0], 0, 3),  # stuff
        ([0.95, 0, 0], 6, 8),  # the same stuff elsewhere: one segment
        ([0, 0, 0.9], 4, 6),  # a thing
        ([0, 0, 0.85], 3, 6),  # a thing that keeps a third of its mask: dropped
        ([0, 0.79, 0], 0, 8),  # below the score threshold
    )
    isthing = [False, False, True]
    masks = prediction.masks.clone()
    ids, segments = stage5.panoptic(prediction, isthing)
    assert segments == [{"id": 1, "label": 0}, {"id": 2, "label": 2}]
    assert ids[:, 0].tolist() == [1, 1, 1, 0, 2, 2, 1, 1]
    assert torch.equal(prediction.masks, masks)  # Other decodings may follow on the same masks.

    ids, segments = stage5.panoptic(prediction, isthing, overlap_threshold=0.3)
    assert [segment["label"] for segment in segments] == [0, 2, 2]
    assert ids[:, 0].tolist() == [1, 1, 1, 3, 2, 2, 1, 1]

    ids, segments = stage5.panoptic(prediction, isthing, score_threshold=0.92)
    assert [segment["label"] for segment in segments] == [0]
    assert ids[:, 0].tolist() == [1, 1, 1, 0, 0, 0, 1, 1]


def test_panoptic_of_nothing_is_void():
    prediction = queries(([0.5, 0, 0], 0, 8))
    ids, segments = stage5.panoptic(prediction, [False, False, True])
    assert ids.shape == (8, 8) and not ids.any() and segments == []
