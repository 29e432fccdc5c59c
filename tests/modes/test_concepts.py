"""Concept files: what they may hold, and what is said about what they may not."""

import json

import pytest
import torch

from codec_dist.modes import Correlations, LayerModes, ModesError, load_concepts, parse_concepts

CLASSES = ("tabby cat", "tiger cat", "beagle", "3")


def test_names_and_indices_become_ascending_indices_once_each(tmp_path):
    path = tmp_path / "concepts.json"
    path.write_text(json.dumps({"cat": ["tiger cat", 0, "tabby cat"], "dog": [2], "digit": ["3"]}))
    assert load_concepts(path, CLASSES) == {"cat": (0, 1), "dog": (2,), "digit": (3,)}


def test_unknown_class_is_named_with_the_nearest():
    with pytest.raises(ModesError, match=r"'pets' lists the unknown class 'tigre cat'.*tiger cat"):
        parse_concepts({"pets": ["beagle", "tigre cat"]}, CLASSES)


def test_name_of_several_classes_is_refused_with_their_numbers():
    classes = ("crane", "cardigan", "crane", "maillot", "crane")
    with pytest.raises(ModesError, match="'birds' lists the ambiguous class 'crane': classes 0, 2 and 4 have"):
        parse_concepts({"birds": ["crane"]}, classes)
    assert parse_concepts({"birds": [0], "clothes": ["maillot", 4]}, classes) == {"birds": (0,), "clothes": (3, 4)}
    counts = torch.full((5,), 2)
    nothing = Correlations(10, 10, counts, torch.ones(1), torch.ones(1), torch.zeros(5, 1))
    modes = LayerModes("blocks.0", "contribution-positive", "mode", nothing, nothing, 0.5, classes)
    assert modes.top_modes("cardigan")
    with pytest.raises(ModesError, match="ambiguous class 'crane': classes 0, 2 and 4 have this name"):
        modes.top_modes("crane")


@pytest.mark.parametrize("member", [4, -1, True, 1.5, None])
def test_what_is_no_class_is_refused(tmp_path, member):
    path = tmp_path / "concepts.json"
    path.write_text(json.dumps({"pets": [member]}))
    with pytest.raises(ModesError, match="from 0 to 3"):
        load_concepts(path, CLASSES)


def test_concept_without_classes_is_refused():
    with pytest.raises(ModesError, match="'pets' lists no class"):
        parse_concepts({"pets": []}, CLASSES)


@pytest.mark.parametrize("content", ["[1]", "{", '{"cat": "tabby cat"}', "\xff"])
def test_unreadable_file_is_one_line(tmp_path, content):
    path = tmp_path / "concepts.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ModesError, match=r"concepts\.json") as refusal:
        load_concepts(path, CLASSES)
    assert "\n" not in str(refusal.value)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ModesError, match="there is no concepts file"):
        load_concepts(tmp_path / "none.json", CLASSES)
