"""Concept files: what they may hold, and what is said about what they may not."""

import json

import pytest

from codec_dist.modes import ModesError, load_concepts, parse_concepts

CLASSES = ("tabby cat", "tiger cat", "beagle", "3")


def test_names_and_indices_become_ascending_indices_once_each(tmp_path):
    path = tmp_path / "concepts.json"
    path.write_text(json.dumps({"cat": ["tiger cat", 0, "tabby cat"], "dog": [2], "digit": ["3"]}))
    assert load_concepts(path, CLASSES) == {"cat": (0, 1), "dog": (2,), "digit": (3,)}


def test_unknown_class_is_named_with_the_nearest():
    with pytest.raises(ModesError, match=r"'pets' lists the unknown class 'tigre cat'.*tiger cat"):
        parse_concepts({"pets": ["beagle", "tigre cat"]}, CLASSES)


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
