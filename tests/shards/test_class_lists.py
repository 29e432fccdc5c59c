"""Labels by a list of the model's classes: the lists that people have, and the folders that they name."""

import csv
import io
import json
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from codec_dist.shards import ShardError, image_folder, load_index, pack, parquet_images, read_class_list

# Its ten folders and their outputs in any model of ImageNet's 1,000 classes.
IMAGENETTE = {
    "n01440764": 0, "n02102040": 217, "n02979186": 482, "n03000684": 491, "n03028079": 497,
    "n03394916": 566, "n03417042": 569, "n03425413": 571, "n03445777": 574, "n03888257": 701,
}  # fmt: skip
FRUIT = [("n07739125", "apple"), ("n07747607", "orange"), ("n07753592", "banana, Musa")]


def folders(root, names):
    for name in names:
        (root / name).mkdir(parents=True)
        Image.fromarray(np.zeros((2, 2), np.uint8)).save(root / name / "1.png")
    return root


def labels(root, classes=None):
    samples, names = image_folder(root, classes)
    return {unquote(each.key.partition("/")[0]): each.label for each in samples}, names, samples.notes


def test_the_packaged_classes_are_imagenets_as_torchvision_and_timm_have_them():
    ours = read_class_list("imagenet")
    assert list(ours.names) == pytest.importorskip("torchvision.models._meta")._IMAGENET_CATEGORIES
    theirs = pytest.importorskip("timm.data").ImageNetInfo()
    assert [known[0] for known in ours.known_as] == theirs.label_names()


def test_a_subset_of_imagenet_gets_the_labels_of_the_models_outputs(tmp_path):
    classes = read_class_list("imagenet")
    assert labels(folders(tmp_path / "ids", IMAGENETTE), classes)[0] == IMAGENETTE
    named = dict(zip(("Tench", "english_springer", "cassette player", "gas-pump"), (0, 217, 482, 571)))
    found, names, _ = labels(folders(tmp_path / "names", named), classes)
    assert found == named
    assert len(names) == 1000
    plain, _, notes = labels(tmp_path / "ids")
    assert sorted(plain.values()) == list(range(10))
    assert any("10 of ImageNet's 1,000" in note and "--classes imagenet" in note for note in notes)


def test_numbers_of_classes_are_taken_as_they_are_with_a_list(tmp_path):
    found, _, notes = labels(folders(tmp_path, ["0", "7", "10", "999"]), read_class_list("imagenet"))
    assert found == {"0": 0, "7": 7, "10": 10, "999": 999}
    assert len(notes) == 1
    with pytest.raises(ShardError, match=r"1 of 2 folders .* '1000': the classes are numbered 0 to 999"):
        labels(folders(tmp_path / "more", ["0", "1000"]), read_class_list("imagenet"))


def test_folders_named_by_numbers_are_in_the_order_of_the_numbers(tmp_path):
    found, names, notes = labels(folders(tmp_path / "a", map(str, range(12))))
    assert found == {str(number): number for number in range(12)}
    assert names == [str(number) for number in range(12)]
    assert len(notes) == 1
    found, _, notes = labels(folders(tmp_path / "b", ["2", "10", "007"]))
    assert found == {"2": 0, "007": 1, "10": 2}
    assert "--classes" in notes[0]


def test_names_that_match_nothing_or_several_classes_are_refused(tmp_path):
    classes = read_class_list("imagenet")
    with pytest.raises(
        ShardError, match=r"2 of 3 folders are no class in ImageNet.*'golden_retreiver'.*golden retriever"
    ):
        labels(folders(tmp_path / "a", ["tench", "golden_retreiver", "quux"]), classes)
    with pytest.raises(ShardError, match=r"'crane' may be class 134 \(n02012849.* or 517 \(n03126707"):
        labels(folders(tmp_path / "b", ["crane"]), classes)


def as_csv(rows, **options):
    content = io.StringIO()
    csv.writer(content, **options).writerows(rows)
    return content.getvalue()


FORMS = {
    "names.json": json.dumps([name for _, name in FRUIT]),
    "pairs.json": json.dumps(FRUIT),
    "objects.json": json.dumps([{"wnid": wnid, "name": name} for wnid, name in FRUIT]),
    "class_index.json": json.dumps({str(number): pair for number, pair in reversed(list(enumerate(FRUIT)))}),
    "by_name.json": json.dumps({name: number for number, (_, name) in reversed(list(enumerate(FRUIT)))}),
    "config.json": json.dumps({"id2label": {number: name for number, (_, name) in enumerate(FRUIT)}, "num_labels": 3}),
    "python.txt": str({number: name for number, (_, name) in enumerate(FRUIT)}),
    "plain.txt": "\r\n".join(name for _, name in FRUIT) + "\n\n",
    "ids.txt": "\n".join(wnid for wnid, _ in FRUIT),
    "synset_words.txt": "\n".join(f"{wnid} {name}" for wnid, name in FRUIT),
    "from-one.txt": "\n".join(f"{number} {name}" for number, (_, name) in reversed(list(enumerate(FRUIT, 1)))),
    "number-last.txt": "\n".join(f"{name} {number}" for number, (_, name) in enumerate(FRUIT)),
    "plain.csv": as_csv([[name] for _, name in FRUIT]),
    "header.csv": as_csv([["index", "wnid", "name"]] + [[i, *pair] for i, pair in reversed(list(enumerate(FRUIT)))]),
    "strange-header.csv": as_csv([["#", "Frucht"]] + [[i, name] for i, (_, name) in enumerate(FRUIT)]),
    "semicolon.csv": as_csv([[wnid, name] for wnid, name in FRUIT], delimiter=";"),
    "tab.tsv": as_csv([[name, i] for i, (_, name) in enumerate(FRUIT)], delimiter="\t"),
    "names.yaml": "nc: 3\nnames:\n" + "".join(f"- {name}\n" for _, name in FRUIT),
    "numbers.yml": "names:\n" + "".join(f"  {number}: {name}\n" for number, (_, name) in enumerate(FRUIT)),
    "coco.json": json.dumps(
        {
            "categories": [
                {"id": i, "name": name, "group": "fruit"} for i, (_, name) in reversed(list(enumerate(FRUIT, 1)))
            ]
        }
    ),
    "class_to_idx.json": json.dumps({"class_to_idx": {name: str(i) for i, (_, name) in enumerate(FRUIT)}}),
    "colon-last.txt": "\n".join(f"{name}: {i}" for i, (_, name) in reversed(list(enumerate(FRUIT)))),
    "dots.txt": "\n".join(f"{i}. {name}" for i, (_, name) in reversed(list(enumerate(FRUIT)))),
    "equals.txt": "\n".join(f"{i} = {name}" for i, (_, name) in reversed(list(enumerate(FRUIT)))),
    "comment.txt": "# of the orchard\n" + "\n".join(name for _, name in FRUIT),
    "pandas.csv": as_csv([["0"]] + [[name] for _, name in FRUIT]),
    "one-row.csv": as_csv([[name.partition(",")[0] for _, name in FRUIT]]),
    "species.csv": as_csv([["Species"]] + [[name] for _, name in FRUIT]),
    "bom.txt": "\ufeff" + "\n".join(name for _, name in FRUIT),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_list_gives_each_class_its_place(tmp_path, name):
    (tmp_path / name).write_text(FORMS[name], encoding="utf-8")
    classes = read_class_list(tmp_path / name)
    by_id = name in ("pairs.json", "objects.json", "class_index.json", "ids.txt", "synset_words.txt", "header.csv")
    by_name = name != "ids.txt"
    if by_id or name == "semicolon.csv":
        assert labels(folders(tmp_path / "ids", [FRUIT[2][0], FRUIT[0][0]]), classes)[0] == {
            "n07739125": 0,
            "n07753592": 2,
        }
    if by_name:
        found, names, _ = labels(folders(tmp_path / "names", ["Banana", "orange"]), classes)
        assert found == {"Banana": 2, "orange": 1}
        assert names == [each.partition(",")[0] if name == "one-row.csv" else each for _, each in FRUIT]


def test_an_unknown_header_above_ids_is_no_class(tmp_path):
    rows = [["Kennung", "Frucht"], *FRUIT]
    (tmp_path / "a.csv").write_text(as_csv(rows))
    assert read_class_list(tmp_path / "a.csv").names == tuple(name for _, name in FRUIT)


def test_numbers_may_be_a_part_of_the_names(tmp_path):
    (tmp_path / "grades.txt").write_text("\n".join(f"grade {number}" for number in (2, 1, 0)))
    grades = {f"grade {number}": 2 - number for number in range(3)}
    assert labels(folders(tmp_path / "grades", grades), read_class_list(tmp_path / "grades.txt"))[0] == grades
    birds = ["001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross"]
    (tmp_path / "birds.txt").write_text("\n".join(birds))
    (tmp_path / "classes.txt").write_text("\n".join(f"{i} {name}" for i, name in enumerate(birds, 1)))
    folders(tmp_path / "birds", birds[1:])
    for file in ("birds.txt", "classes.txt"):
        assert labels(tmp_path / "birds", read_class_list(tmp_path / file))[0] == {birds[1]: 1, birds[2]: 2}


@pytest.mark.parametrize(
    ("names", "first", "second"),
    [
        ([f"class_{number}" for number in range(1, 13)], "class_12", "class_2"),
        ([*map(str, range(11)), "background"], "10", "2"),
        (["1.0", "10.0", "2.0"], "10.0", "2.0"),
    ],
)
def test_an_order_of_numbers_by_their_characters_is_noted(tmp_path, names, first, second):
    found, _, notes = labels(folders(tmp_path, names))
    assert found == {name: place for place, name in enumerate(sorted(names))}
    assert len(notes) == 1
    assert f"{first} (label {found[first]}) comes before {second} (label {found[second]})" in notes[0]


def test_usual_names_are_not_noted_and_a_single_class_is(tmp_path):
    assert labels(folders(tmp_path / "a", ["a", "b10", "c2", "A320", "class 01", "class 10"]))[2] == []
    assert "images" in labels(folders(tmp_path / "b", ["images"]))[2][0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "not JSON"),
        ("a.json", "3", "lists no classes"),
        ("a.json", "[]", "lists no classes"),
        ("a.json", '["a", ""]', "lists no classes"),
        ("a.json", '{"a": "b"}', "lists no classes"),
        ("a.json", '{"0": "a", "2": "b"}', "do not count from 0 to 1"),
        ("a.json", '{"a": 0, "b": 0}', "do not count from 0 to 1"),
        ("a.csv", "0,a\n5,b\n", "do not count from 0 to 1"),
        ("a.txt", "", "lists no classes"),
        ("a.txt", "apple\n\nbanana\n", "line 2 of .* is empty"),
        ("a.yaml", "names: [a", "not YAML"),
    ],
)
def test_lists_that_are_none_are_refused_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ShardError, match=message) as caught:
        read_class_list(tmp_path / name)
    assert "\n" not in str(caught.value)
    with pytest.raises(ShardError, match=r"nowhere.*or `imagenet`"):
        read_class_list(tmp_path / "nowhere")


def test_class_names_of_any_bytes_and_all_classes_of_the_model_are_kept(tmp_path):
    samples, classes = image_folder(folders(tmp_path / "in", ["b\udcff", "a\nb"]))
    pack(samples, tmp_path / "out", classes=classes)
    assert load_index(tmp_path / "out").classes == ("a\\nb", "b\\xff")


def table(path, content, kind=None, **more):
    image = io.BytesIO()
    Image.fromarray(np.zeros((2, 2), np.uint8)).save(image, "PNG")
    pq.write_table(
        pa.table({"image": [image.getvalue()] * len(content), "label": pa.array(content, kind), **more}), path
    )
    return path


def test_texts_and_named_integers_of_parquet_files_get_their_places_too(tmp_path):
    (tmp_path / "list.txt").write_text(FORMS["synset_words.txt"])
    classes = read_class_list(tmp_path / "list.txt")
    samples, names = parquet_images(table(tmp_path / "a.parquet", ["Banana", None, "n07739125"]), class_list=classes)
    assert ([each.label for each in samples], len(names)) == ([2, None, 0], 3)
    samples, _ = parquet_images(table(tmp_path / "b.parquet", [2, 0, -1]), class_list=classes)
    assert [each.label for each in samples] == [2, 0, None]
    with pytest.raises(ShardError, match=r"label 3 in row 1 of .* is out of range: expected 0 to 2"):
        list(parquet_images(table(tmp_path / "c.parquet", [2, 3]), class_list=classes)[0])
    with pytest.raises(ShardError, match=r"1 of 2 labels are no class in .*'pear'"):
        parquet_images(table(tmp_path / "d.parquet", ["pear", "orange"]), class_list=classes)
    features = {"info": {"features": {"label": {"names": ["orange", "apple"], "_type": "ClassLabel"}}}}
    named = pq.read_table(table(tmp_path / "e.parquet", [0, 1, -1])).replace_schema_metadata(
        {"huggingface": json.dumps(features)}
    )
    pq.write_table(named, tmp_path / "e.parquet")
    samples, _ = parquet_images(tmp_path / "e.parquet", class_list=classes)
    assert [each.label for each in samples] == [1, 0, None]
