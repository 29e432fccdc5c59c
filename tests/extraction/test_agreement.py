"""What predictions and labels say of each other: accuracy, chance, other numberings."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from codec_dist.extraction.agreement import NOTHING_EXPECTED, Agreement, Expectation, warnings_of

PAIRS = st.lists(st.tuples(st.none() | st.integers(0, 5), st.integers(0, 5)), max_size=60)


def counted(labels: np.ndarray | list, predictions: np.ndarray | list) -> Agreement:
    return Agreement.of(
        pa.table({"label": pa.array(list(labels), pa.int32()), "prediction": pa.array(list(predictions), pa.int32())})
    )


@given(PAIRS, st.integers(0, 60))
def test_parts_add_up_to_the_whole(pairs: list[tuple[int | None, int]], cut: int) -> None:
    parts = [
        counted([label for label, _ in part], [answer for _, answer in part]) for part in (pairs[:cut], pairs[cut:])
    ]
    parts[0].merge(parts[1])
    labelled = [(label, answer) for label, answer in pairs if label is not None]
    assert parts[0].labelled == len(labelled)
    assert parts[0].right == sum(label == answer for label, answer in labelled)
    assert parts[0].pairs == {pair: labelled.count(pair) for pair in labelled}
    # Chance: a label and a prediction drawn apart from each other.
    drawn = [label == answer for label, _ in labelled for _, answer in labelled]
    assert parts[0].chance == pytest.approx(sum(drawn) / max(len(drawn), 1))


def guesses(labels: np.ndarray, accuracy: float, outputs: int, seed: int = 0) -> np.ndarray:
    """Predictions that are right at a rate, and anything else otherwise."""
    generator = np.random.default_rng(seed)
    wrong = (labels + generator.integers(1, outputs, len(labels))) % outputs
    return np.where(generator.random(len(labels)) < accuracy, labels, wrong)


LABELS = np.random.default_rng(3).integers(0, 10, 400)
NUMBERING = np.array([0, 217, 482, 491, 497, 566, 569, 571, 574, 701])  # ten classes among a thousand


@pytest.mark.parametrize("accuracy", [0.3, 0.5, 0.742, 0.95, 1.0])
@pytest.mark.parametrize("outputs", [10, 1000])
def test_model_that_has_learned_something_gets_no_warning(accuracy: float, outputs: int) -> None:
    labels = LABELS if outputs == 10 else NUMBERING[LABELS]
    assert warnings_of(counted(labels, guesses(labels, accuracy, outputs)), Expectation(outputs, None, False)) == {}


@pytest.mark.parametrize("only", [0, 7])
def test_shard_of_one_class_gets_no_warning(only: int) -> None:
    labels = np.full(50, only)
    assert warnings_of(counted(labels, guesses(labels, 0.8, 1000)), NOTHING_EXPECTED) == {}
    assert "agreement" in warnings_of(counted(labels, np.full(50, 500)), NOTHING_EXPECTED)


@pytest.mark.parametrize(
    ("predictions", "cause"),
    [
        (guesses(LABELS, 0.1, 10), "near chance"),
        (np.full(400, 4), "class 4"),
        (NUMBERING[LABELS], "1 as 217"),
        (NUMBERING[guesses(LABELS, 0.8, 10)], "1 as 217"),
        (guesses(LABELS, 0.9, 10) + 1, "1 above"),
        ((guesses(LABELS, 0.7, 10) - 1) % 10, "1 below"),
        (9 - guesses(LABELS, 0.9, 10), "0 as 9"),
        (np.random.default_rng(5).integers(10, 1000, 400), "other classes"),
    ],
    ids=["random", "constant", "subset", "noisy subset", "shifted", "shifted back", "reversed", "elsewhere"],
)
def test_predictions_that_do_not_fit_the_labels_are_noticed_with_the_likely_cause(
    predictions: np.ndarray, cause: str
) -> None:
    agreement = counted(LABELS, predictions)
    right = int((predictions == LABELS).sum())
    warning = warnings_of(agreement, NOTHING_EXPECTED)["agreement"]
    assert f"{right} of 400 images" in warning
    assert cause in warning


def test_few_labels_with_enough_images_do_not_speak_for_all() -> None:
    # Two wrong labels have three images each; seven right ones have two.
    labels = [0] * 3 + [1] * 3 + [number for number in range(2, 9) for _ in range(2)]
    predictions = [5] * 3 + [6] * 3 + labels[6:]
    assert warnings_of(counted(labels, predictions), NOTHING_EXPECTED) == {}


def test_two_classes_the_wrong_way_round_are_noticed() -> None:
    labels = LABELS % 2
    assert "0 as 1" in warnings_of(counted(labels, 1 - guesses(labels, 0.9, 2)), NOTHING_EXPECTED)["agreement"]


def test_no_agreement_in_few_images_is_noticed() -> None:
    labels = np.arange(20)
    assert "0 of 20" in warnings_of(counted(labels, NUMBERING[labels % 10] + 300), NOTHING_EXPECTED)["agreement"]


def test_random_weights_are_named_as_the_cause() -> None:
    agreement = counted(LABELS, guesses(LABELS, 0.1, 10))
    assert "random" in warnings_of(agreement, Expectation(10, 10, True))["agreement"]


@pytest.mark.parametrize(("outputs", "classes", "warned"), [(1000, 10, True), (10, 10, False), (None, 10, False)])
def test_outputs_without_classes_are_noticed(outputs: int | None, classes: int, warned: bool) -> None:
    found = warnings_of(counted(LABELS, LABELS), Expectation(outputs, classes, False))
    assert ("outputs" in found) == warned
    if warned:
        assert "1,000 outputs" in found["outputs"]
        assert "10 classes" in found["outputs"]


def test_nothing_is_said_of_images_without_labels() -> None:
    agreement = counted([None] * 30, np.zeros(30))
    assert agreement.accuracy is None
    assert warnings_of(agreement, Expectation(1000, 10, False)) == {}
