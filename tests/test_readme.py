"""The README's Python examples, run as they stand there."""

import importlib
import re
from pathlib import Path

from common import toycity
from common.datasets import BENCHMARKS

import pytest
import torch
from PIL import Image
from test_eval_stage import write_run

README = Path(__file__).parents[1] / "README.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", README.read_text("utf-8"), re.M | re.S)


@pytest.fixture
def street(tmp_path, monkeypatch):
    """What the examples read, in the working folder: street.jpg and the run of an untrained model.

    Returns the image's height and width.
    """
    pixels = toycity.scene("val", 60)[0][128:384, 256:768]
    Image.fromarray(pixels).save(tmp_path / "street.jpg")
    write_run(tmp_path / "runs/toycity", tmp_path, "toycity", BENCHMARKS["toycity"].categories)
    monkeypatch.chdir(tmp_path)
    return pixels.shape[:2]


def run_example(module):
    """Run the example that uses a stage's module, and return the variables that it leaves."""
    (example,) = [text for text in EXAMPLES if module in text]
    variables = {}
    exec(compile(example, str(README), "exec"), variables)
    return variables


def test_there_are_two_short_examples():
    assert len(EXAMPLES) == 2
    for example in EXAMPLES:
        assert len(example.splitlines()) <= 8, example


def test_the_scores_of_a_feature_map(street):
    stage2 = importlib.import_module("02_metrics")
    variables = run_example("02_metrics")
    image = variables["image"]
    features = variables["features"]
    assert image.ndim == features.ndim == 3 and image.shape[0] == 3
    scores = variables["scores"]
    assert list(scores) == [*stage2.SC_SCORES, *stage2.EF_SCORES]
    highest = {"EF": 25, "EF_RELEASED": 100}
    for name, score in scores.items():
        # A degenerate map would score 0.
        assert isinstance(score, float) and 0 < score <= highest.get(name, 1), name
    assert scores["EC"] + scores["NC"] + scores["FAR"] == pytest.approx(1)


def test_a_trained_model_on_an_image(street):
    variables = run_example("05_eval")
    masks = variables["masks"]
    labels = variables["labels"]
    confidences = variables["confidences"]
    assert 0 < len(masks) == len(labels) == len(confidences) <= 100
    assert masks.dtype == torch.bool and masks.shape[1:] == street
    isthing = [category.isthing for category in BENCHMARKS["toycity"].categories]
    assert labels.dtype == torch.int64 and all(isthing[label] for label in labels)
    assert confidences.min() >= 0 and confidences.max() <= 1
