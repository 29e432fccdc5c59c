"""Files of weights load as they are found, or are named for what they are in one line; no code of theirs runs."""

import argparse
import gzip
import io
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from codec_dist.models import ModelError
from codec_dist.models.checkpoints import read_checkpoint
from codec_dist.models.weights import load_weights


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))


def filled(seed: int = 1) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {
        name: torch.randn(tensor.shape) if tensor.is_floating_point() else torch.tensor(7)
        for name, tensor in network().state_dict().items()
    }


def assert_loads(path: Path, expected: dict[str, torch.Tensor]) -> tuple[str, ...]:
    model = network()
    notes = load_weights(model, path, "the network")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    return notes


def refused(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        load_weights(network(), path, "the network")
    message = str(caught.value)
    assert path.name in message
    assert "\n" not in message
    assert "\x1b" not in message
    return message


@settings(max_examples=30)
@given(parts=st.lists(st.sampled_from(["module", "model", "_orig_mod", "net", "backbone"]), max_size=4))
def test_prefixes_that_all_names_share_are_left_out_and_said(
    parts: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("weights") / "wrapped.pth"
    prefix = "".join(f"{part}." for part in parts)
    torch.save({prefix + name: tensor for name, tensor in filled().items()}, path)
    notes = assert_loads(path, filled())
    assert [repr(prefix) in note for note in notes] == ([True] if parts else [])


def test_what_data_parallel_saves_loads(tmp_path: Path) -> None:
    model = network()
    model.load_state_dict(filled())
    torch.save(nn.DataParallel(model).state_dict(), tmp_path / "weights.pth")
    (note,) = assert_loads(tmp_path / "weights.pth", filled())
    assert "'module.'" in note


def test_prefix_that_the_model_has_itself_stays(tmp_path: Path) -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = network()

    state = {f"model.{name}": tensor for name, tensor in filled().items()}
    torch.save(state, tmp_path / "weights.pth")
    wrapper = Wrapper()
    assert load_weights(wrapper, tmp_path / "weights.pth", "the network") == ()
    assert torch.equal(wrapper.model[3].weight, state["model.3.weight"])


def test_prefix_of_some_names_only_stays_and_the_problem_is_named(tmp_path: Path) -> None:
    state = {f"module.{name}" if name.startswith("3") else name: tensor for name, tensor in filled().items()}
    torch.save(state, tmp_path / "weights.pth")
    assert "unexpected module.3.weight" in refused(tmp_path / "weights.pth")


def test_prefix_of_no_wrapper_stays(tmp_path: Path) -> None:
    torch.save({f"other.{name}": tensor for name, tensor in filled().items()}, tmp_path / "weights.pth")
    assert "unexpected other." in refused(tmp_path / "weights.pth")


def test_prefix_goes_also_where_something_else_does_not_fit(tmp_path: Path) -> None:
    state = {f"module.{name}": tensor for name, tensor in filled().items()} | {"module.extra": torch.zeros(1)}
    torch.save(state, tmp_path / "weights.pth")
    message = refused(tmp_path / "weights.pth")
    assert "unexpected extra" in message
    assert "missing" not in message


@pytest.mark.parametrize("name", ["state_dict", "model", "model_state_dict", "net", "teacher"])
def test_checkpoint_with_other_things_beside_the_weights_loads(name: str, tmp_path: Path) -> None:
    beside = {
        "epoch": 3,
        "best": np.float64(0.5),
        "seen": np.int64(12),
        "curve": np.linspace(0, 1, 5),
        "args": argparse.Namespace(lr=0.1, layers=[1, 2]),
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1}]},
        "schedule": {},
    }
    torch.save({**beside, name: filled()}, tmp_path / "checkpoint.pth")
    assert_loads(tmp_path / "checkpoint.pth", filled())


def test_wrappers_within_wrappers_load(tmp_path: Path) -> None:
    torch.save({"model": {"state_dict": filled(), "epoch": np.int32(1)}}, tmp_path / "checkpoint.pth")
    assert_loads(tmp_path / "checkpoint.pth", filled())


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.int8, np.uint64, np.bool_, np.complex64])
def test_scalars_of_numpy_of_any_kind_are_no_obstacle(kind: type, tmp_path: Path) -> None:
    torch.save({"state_dict": filled(), "best": kind(1)}, tmp_path / "checkpoint.pth")
    assert_loads(tmp_path / "checkpoint.pth", filled())


def test_scalars_as_the_first_numpy_wrote_them_are_no_obstacle(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"state_dict": filled(), "best": np.float64(0.5)}, buffer, _use_new_zipfile_serialization=False)
    old = buffer.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    assert b"cnumpy.core.multiarray\n" in old
    (tmp_path / "old.pth").write_bytes(old)
    assert_loads(tmp_path / "old.pth", filled())


@pytest.mark.parametrize("suffix", ["pth", "bin", "ckpt", "weights"])
def test_safetensors_file_loads_under_any_name(suffix: str, tmp_path: Path) -> None:
    save_file(filled(), tmp_path / f"weights.{suffix}")
    assert_loads(tmp_path / f"weights.{suffix}", filled())


def test_file_of_torch_loads_under_the_name_of_the_other_format(tmp_path: Path) -> None:
    torch.save(filled(), tmp_path / "weights.safetensors")
    assert_loads(tmp_path / "weights.safetensors", filled())


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_point_types_are_rounded_into_the_model(kind: torch.dtype, tmp_path: Path) -> None:
    state = {name: tensor.to(kind) if tensor.is_floating_point() else tensor for name, tensor in filled().items()}
    torch.save(state, tmp_path / "weights.pth")
    expected = {name: tensor.to(filled()[name].dtype) for name, tensor in state.items()}
    assert_loads(tmp_path / "weights.pth", expected)


@pytest.mark.parametrize("kind", [torch.int8, torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_types_that_are_no_floating_point_numbers_are_refused(kind: torch.dtype, tmp_path: Path) -> None:
    state = filled()
    state["3.weight"] = state["3.weight"].to(kind)
    torch.save(state, tmp_path / "weights.pth")
    message = refused(tmp_path / "weights.pth")
    assert f"3.weight ({str(kind).removeprefix('torch.')} in the file, float32 in the model)" in message


def test_floating_point_numbers_for_whole_ones_are_refused(tmp_path: Path) -> None:
    model = nn.Module()
    model.register_buffer("index", torch.arange(3))
    torch.save({"index": torch.tensor([0.5, 1.5, 2.5])}, tmp_path / "weights.pth")
    with pytest.raises(ModelError, match=r"index \(float32 in the file, int64 in the model\)"):
        load_weights(model, tmp_path / "weights.pth", "the network")


def zipped(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
NOT_WEIGHTS = {
    "pointer": (LFS, "git lfs pull"),
    "web page": (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "web page"),
    "nothing": (b"", "empty"),
    "text": ("Grüße, keine Gewichte\n".encode() * 300, "text"),
    "another zip": (zipped(readme=b"hello"), "zip file that torch did not write"),
    "arrays": (zipped(**{"weight.npy": b"x"}), "numpy archive"),
    "array": (b"\x93NUMPY\x01\x00", "numpy array"),
    "gzip": (gzip.compress(saved(filled())), "gzip"),
    "keras": (b"\x89HDF\r\n\x1a\n" + bytes(64), "HDF5"),
    "half": (saved(filled())[:900], "cut short"),
    "noise": (np.random.default_rng(0).bytes(5000), "damaged"),
    "pickled noise": (b"\x80\x02" + np.random.default_rng(1).bytes(500), "damaged"),
}


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("kind", NOT_WEIGHTS)
def test_what_is_no_file_of_weights_is_named(kind: str, suffix: str, tmp_path: Path) -> None:
    content, message = NOT_WEIGHTS[kind]
    (tmp_path / f"weights.{suffix}").write_bytes(content)
    assert message in refused(tmp_path / f"weights.{suffix}")


@pytest.mark.parametrize("kept", [9, 200, 0.5, -1])
def test_safetensors_file_cut_short_is_named(kept: float, tmp_path: Path) -> None:
    save_file(filled(), tmp_path / "whole.safetensors")
    content = (tmp_path / "whole.safetensors").read_bytes()
    length = int(kept * len(content)) if isinstance(kept, float) else kept
    (tmp_path / "cut.safetensors").write_bytes(content[:length])
    assert "not a whole safetensors file" in refused(tmp_path / "cut.safetensors")


def test_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    assert "folder" in refused(tmp_path / "folder")


class Exploding:
    """Something of a training script's own; unpickling it would run code."""

    def __reduce__(self) -> tuple:
        return (exec, ("raise SystemExit('code of the file was run')",))


@pytest.mark.parametrize("value", [Exploding(), {"state_dict": {}, "config": Exploding()}, nn.Linear(2, 2)])
def test_file_with_code_gets_one_recipe_and_no_code_runs(value: object, tmp_path: Path) -> None:
    torch.save(value, tmp_path / "weights.pth")
    message = refused(tmp_path / "weights.pth")
    assert "if you trust it" in message
    assert message.count("torch.load(") == 1
    assert "weights_only" in message.partition("python -c")[2]
    assert "add_safe_globals" not in message


@pytest.mark.parametrize("kind", ["model", "model in a dictionary", "dictionary", "older names", "newer pickle"])
def test_recipe_works(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    model.load_state_dict(filled())
    saved = {
        "model": model,
        "model in a dictionary": {"epoch": 3, "model": model},
        "dictionary": {"state_dict": filled(), "folder": tmp_path},
        "older names": {"model_state_dict": filled(), "folder": tmp_path},
        "newer pickle": filled(),
    }
    torch.save(saved[kind], tmp_path / "whole.pth", pickle_protocol=4 if kind == "newer pickle" else 2)
    recipe = re.search(r'python -c "(.*)"', refused(tmp_path / "whole.pth"))
    assert recipe is not None
    monkeypatch.chdir(tmp_path)
    exec(recipe[1])
    assert_loads(tmp_path / "weights.pth", filled())


@pytest.mark.parametrize("name", ["\x1b[31mred", "\x1b]0;title\x07", "two\nlines", "bell\x07", "\x1bc"])
def test_names_in_a_file_do_nothing_to_the_terminal(name: str, tmp_path: Path) -> None:
    for values in (filled() | {name: torch.zeros(1)}, {name: 3}):
        torch.save(values, tmp_path / "weights.pth")
        assert refused(tmp_path / "weights.pth").isprintable()


def test_lazy_layers_take_their_shapes_from_the_file(tmp_path: Path) -> None:
    model = nn.Sequential(nn.LazyConv2d(2, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(3))
    weights = filled() | {"1.running_var": torch.ones(2)}
    torch.save(weights, tmp_path / "weights.pth")
    load_weights(model, tmp_path / "weights.pth", "the network")
    expected = network()
    expected.load_state_dict(weights)
    images = torch.randn(2, 1, 4, 4)
    assert torch.equal(model.eval()(images), expected.eval()(images))


@pytest.mark.filterwarnings("ignore")
def test_torchscript_program_is_named(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(network()), tmp_path / "program.pt")
    assert "TorchScript" in refused(tmp_path / "program.pt")


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(3, 8, device="meta"), "without values"),
        (torch.zeros(3, 8).to_sparse(), "sparse"),
    ],
)
def test_tensors_that_are_not_plain_are_refused(tensor: torch.Tensor, message: str, tmp_path: Path) -> None:
    torch.save(filled() | {"3.weight": tensor}, tmp_path / "weights.pth")
    assert message in refused(tmp_path / "weights.pth")


@pytest.mark.parametrize("value", [[1, 2], 3, {}, {"epoch": 3}, {"first": filled(1), "second": filled(2)}])
def test_checkpoint_without_one_state_dict_is_refused(value: object, tmp_path: Path) -> None:
    torch.save(value, tmp_path / "weights.pth")
    assert "not a state dict" in refused(tmp_path / "weights.pth")


def test_reading_alone_gives_the_tensors(tmp_path: Path) -> None:
    torch.save(filled(), tmp_path / "weights.pth")
    assert read_checkpoint(tmp_path / "weights.pth").keys() == filled().keys()
