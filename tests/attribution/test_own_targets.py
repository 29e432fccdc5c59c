"""A user's own target: found in the current folder, and named in whatever it raises."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from codec_dist.attribution import TARGETS, AttributionError, Attributor

SOURCE = """
import torch
from codec_dist.attribution import Target

def margin(output, factor=1.0):
    return factor * (output[:, 0] - output[:, 1])

def faulty(output):
    return output[:, 0] / (1 // 0)

def hungry(output):
    raise torch.OutOfMemoryError("out of memory")

class Chooses(Target):
    name = "chooses"
    def choose(self, output, labels):
        raise KeyError("class seven")
    def value(self, output, choice):
        return output[:, 0]

class Picky(Target):
    name = "picky"
    def __init__(self, number: int = 0):
        raise RuntimeError(f"not {number}")
    def value(self, output, choice):
        return output[:, 0]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The current folder holds the module; returns its name, which no other test has."""
    name = f"targets_of_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(SOURCE)
    (tmp_path / f"broken_{name}.py").write_text("raise OSError('no such table')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", ".")])
    return name


def attribute(target: str) -> torch.Tensor:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    return Attributor(model, ["1"], target=TARGETS.build(target, {}))(torch.rand(2, 3))["1"].positive


def test_it_is_found_in_the_current_folder(folder: str) -> None:
    assert attribute(f"{folder}:margin").shape == (2, 4)


@pytest.mark.parametrize(
    ("module", "name", "cause"),
    [
        ("{}", "faulty", "ZeroDivisionError"),
        ("{}", "chooses", "class seven"),
        ("{}", "picky", "not 0"),
        ("broken_{}", "margin", "no such table"),
        ("absent_{}", "margin", "absent_"),
        ("{}", "nowhere", "nowhere"),
    ],
)
def test_what_it_raises_names_it(folder: str, module: str, name: str, cause: str) -> None:
    attribute_name = {"chooses": "Chooses", "picky": "Picky"}.get(name, name)
    with pytest.raises(AttributionError) as found:
        attribute(f"{module.format(folder)}:{attribute_name}")
    assert name in str(found.value).lower()
    assert cause in str(found.value)
    assert "\n" not in str(found.value)


def test_too_little_memory_is_left_to_the_engine(folder: str) -> None:
    with pytest.raises(AttributionError, match="memory of the cpu is too small"):
        attribute(f"{folder}:hungry")
