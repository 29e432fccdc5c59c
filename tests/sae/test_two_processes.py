"""Two processes give the result of one: with the dictionary divided, and with the batch divided."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))

from two_processes import CASES, MODES, ROWS, declare_dead, make, train

from codec_dist.sae import ALONE, SaeError, build, shard

pytestmark = pytest.mark.slow

Results = list[dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder, script = tmp_path_factory.mktemp("processes"), Path(__file__).with_name("two_processes.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    processes = [
        subprocess.Popen([sys.executable, str(script), str(folder), str(rank)], env=environment) for rank in range(2)
    ]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    return [load_file(folder / f"{rank}.safetensors") for rank in range(2)]


def close(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12, msg=lambda message: f"{what}: {message}")


@pytest.mark.parametrize("name", CASES)
def test_a_divided_dictionary_has_the_loadings_loss_and_gradients_of_the_whole(name: str, results: Results) -> None:
    sae, rows = make(name)
    first, second = ({key.removeprefix(f"{name}.sharded."): value for key, value in one.items()} for one in results)
    loadings = sae.encode(rows[:ROWS])
    close(torch.cat([first["loadings.0"], second["loadings.1"]], dim=1), loadings, "loadings")
    parts = sae.loss(rows[:ROWS])
    assert "auxiliary" in parts.parts or name == "relu"
    parts.total.backward()
    for own in (first, second):
        close(own["reconstruction"], sae.decode(loadings), "reconstruction")
        close(own["joined.loadings"], loadings, "loadings of all modes")
        close(own["joined.reconstruction"], sae.decode(loadings), "reconstruction from them")
        close(own["loss"], parts.total, "loss")
    for label, parameter in sae.named_parameters():
        gradients = [own[f"gradient.{label}.{rank}"] for rank, own in enumerate((first, second))]
        if label in sae.mode_parameters:
            close(torch.cat(gradients), parameter.grad, label)
        else:
            close(gradients[0], parameter.grad, label)
            close(gradients[1], parameter.grad, label)


@pytest.mark.parametrize("name", CASES)
def test_a_divided_dictionary_trains_and_resamples_as_the_whole(name: str, results: Results) -> None:
    sae, rows = make(name)
    optimizer = torch.optim.Adam(sae.parameters(), lr=0.02)
    for batch in rows[: 2 * ROWS].split(ROWS):
        optimizer.zero_grad()
        sae.loss(batch).total.backward()
        sae.before_step()
        optimizer.step()
        sae.after_step()
    declare_dead(sae)
    resampled = sae.resample(rows, seed=3)
    assert resampled[::3].all()
    found = torch.cat([results[rank][f"{name}.sharded.resampled.{rank}"] for rank in range(2)])
    assert torch.equal(found, resampled)
    for own in results:
        for label, value in sae.state_dict().items():
            close(own[f"{name}.sharded.after.{label}"], value, label)


@pytest.mark.parametrize("name", CASES)
def test_a_divided_batch_trains_as_the_whole(name: str, results: Results) -> None:
    """BatchTopK's selection and threshold, AuxK and dead windows are those of the global batch."""
    sae, rows = make(name)
    losses = train(sae, rows, ALONE)
    for own in results:
        close(own[f"{name}.rows.losses"].double(), torch.tensor(losses).double(), "losses")
        for label, value in sae.state_dict().items():
            close(own[f"{name}.rows.{label}"], value, label)


def test_fewer_modes_than_processes_are_refused() -> None:
    class Many(type(ALONE)):
        size = 3

    with pytest.raises(SaeError, match="2 modes cannot be spread over 3"):
        shard(build("topk", {"modes": 2, "k": 1}, channels=4), Many())
    assert shard(build("topk", {"modes": 3, "k": 1}, channels=4), Many()).decoder.shape[0] == 1
    assert MODES % 2, "an uneven division is the harder case"
