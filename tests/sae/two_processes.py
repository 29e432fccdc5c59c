"""What each of two processes does in test_two_processes.py: run as a script, results in files."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from codec_dist.sae import Group, Joined, ProcessGroup, TrainedAutoencoder, build, shard, unshard

CHANNELS, MODES, ROWS = 5, 13, 12
# Of stsae, dropout 0: it draws per process.
CASES: dict[str, dict[str, object]] = {
    "relu": {"l1": 0.1, "normalize": False},
    "topk": {"k": 3, "auxk": 4},
    "batchtopk": {"k": 2, "auxk": 4},
    "matryoshka": {"k": 3, "auxk": 4, "prefixes": [0.2, 0.5, 1]},
    "jumprelu": {"l0": 0.05, "auxk": 3},
    "gated": {"l1": 0.1, "auxk": 3, "decoder_bias": "none"},
    "stsae": {"hidden": 7, "threshold": 0.5, "dropout": 0, "l1": 0.1, "auxk": 3, "nonnegative": True},
}
# How many rows of each batch the first process takes; one batch leaves the other with none.
SHARES = (6, 5, 12, 6, 1, 7)


def make(name: str) -> tuple[TrainedAutoencoder, torch.Tensor]:
    """An SAE in float64 with some modes dead, and rows."""
    sae = build(name, {"modes": MODES, "dead_window": 30, **CASES[name]}, CHANNELS, seed=4).double()
    assert isinstance(sae, TrainedAutoencoder)
    rows = 2 * torch.rand(ROWS * len(SHARES), CHANNELS, generator=torch.Generator().manual_seed(1)).double()
    sae.calibrate(rows, 0.7)
    sae.samples_since_fired[::4] = 100
    return sae.train(), rows


def train(sae: TrainedAutoencoder, rows: torch.Tensor, group: Group) -> list[float]:
    """Steps on shares of batches, with gradients and statistics summed over the processes of ``group``."""
    sae.row_group = group
    optimizer, losses = torch.optim.Adam(sae.parameters(), lr=0.02), []
    for batch, first in zip(rows.split(ROWS), SHARES, strict=True):
        mine = batch if group.size == 1 else (batch[:first], batch[first:])[group.rank]
        optimizer.zero_grad()
        sae.statistics.zero_()
        loss = sae.loss(mine, batch_rows=ROWS).total * (len(mine) / ROWS)
        loss.backward()
        for parameter in sae.parameters():
            parameter.grad = group.sum(parameter.grad if parameter.grad is not None else torch.zeros_like(parameter))
        sae.statistics.copy_(group.sum(sae.statistics))
        sae.before_step()
        optimizer.step()
        sae.after_step()
        losses.append(group.sum(loss.detach()).item())
    return losses


def declare_dead(sae: TrainedAutoencoder) -> None:
    """Let every third mode be dead."""
    numbers = sae.first_mode + torch.arange(len(sae.samples_since_fired))
    sae.samples_since_fired[numbers % 3 == 0] = 100


def sharded(name: str, group: ProcessGroup) -> dict[str, torch.Tensor]:
    """Loss, loadings, reconstruction, gradients, and weights after two steps and a resampling, of a divided SAE."""
    whole, rows = make(name)
    part = shard(whole, group)
    joined = Joined(part)
    all_loadings = joined.encode(rows[:ROWS])
    loadings = part.encode(rows[:ROWS])
    found = {"loss": part.loss(rows[:ROWS]).total.detach(), f"loadings.{group.rank}": loadings.detach()}
    found["reconstruction"] = part.decode(loadings).detach()
    found |= {"joined.loadings": all_loadings, "joined.reconstruction": joined.decode(all_loadings).detach()}
    optimizer = torch.optim.Adam(part.parameters(), lr=0.02)
    for batch in rows[: 2 * ROWS].split(ROWS):
        optimizer.zero_grad()
        part.loss(batch).total.backward()
        for label, parameter in part.named_parameters():
            assert parameter.grad is not None
            found.setdefault(f"gradient.{label}.{group.rank}", parameter.grad.clone())
        part.before_step()
        optimizer.step()
        part.after_step()
    declare_dead(part)
    found[f"resampled.{group.rank}"] = part.resample(rows, seed=3)
    return found | {f"after.{label}": value for label, value in unshard(part).state_dict().items()}


def main() -> None:
    """Everything that two processes are needed for."""
    directory, rank = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory / 'meeting-point'}", rank=rank, world_size=2)
    group = ProcessGroup()
    results: dict[str, torch.Tensor] = {}
    for name in CASES:
        results |= {f"{name}.sharded.{label}": value for label, value in sharded(name, group).items()}
        sae, rows = make(name)
        losses = train(sae, rows, group)
        results[f"{name}.rows.losses"] = torch.tensor(losses)
        results |= {f"{name}.rows.{label}": value for label, value in sae.state_dict().items()}
    save_file({label: value.contiguous() for label, value in results.items()}, directory / f"{rank}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
