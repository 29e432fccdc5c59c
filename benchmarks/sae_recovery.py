"""Whether each SAE finds a dictionary that is known.

Rows are sums of a few atoms of a random unit-norm dictionary, plus a mean and a little noise. Every architecture is
trained by the same plain loop (Adam, a cosine schedule after a short warm-up, batches drawn with replacement) and
judged on rows that it has not seen: explained variance, and for every true atom the cosine with the most similar row
of the learned dictionary. Modes are more than atoms, samples many more than modes. The loadings of `stsae`, a
sigmoid above a threshold, lie in [τ, 1], so it gets data with such loadings and no mean.

PCA and NMF are there for comparison: PCA finds a subspace, not atoms, and NMF needs rows ≥ 0, so it gets data with
nonnegative atoms.

Prints a table for people and one JSON line for machines.
"""

import argparse
import json
import math
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from codec_dist.sae import FittedAutoencoder, TrainedAutoencoder, build, forget_moments

WARM_UP = 0.02
TAU = 0.8


@dataclass(frozen=True)
class Data:
    """Rows with a known dictionary."""

    channels: int = 64
    atoms: int = 128
    active: int = 3
    low: float = 0.5
    high: float = 1.5
    mean: float = 0.5
    """Size of what is added to all rows."""
    noise: float = 0.01
    nonnegative: bool = False
    fit_rows: int = 40_000
    held_out_rows: int = 5_000
    seed: int = 0


@dataclass(frozen=True)
class Recipe:
    """How one architecture is trained."""

    architecture: str
    options: dict[str, Any] = field(default_factory=dict)
    steps: int = 3_000
    batch: int = 256
    rate: float = 3e-3
    data: Data = Data()


DEAD_WINDOW = 20_000
STSAE = {"modes": 160, "hidden": 256, "threshold": TAU, "initial_l0": 8}
RECIPES = (
    Recipe("relu", {"modes": 160, "l1": 0.025}),
    Recipe("topk", {"modes": 160, "k": 3, "dead_window": DEAD_WINDOW}, steps=2_500),
    Recipe("batchtopk", {"modes": 160, "k": 3, "dead_window": DEAD_WINDOW}, steps=2_500),
    Recipe("matryoshka", {"modes": 160, "k": 3, "dead_window": DEAD_WINDOW, "prefixes": [0.25, 0.5, 1]}),
    Recipe("jumprelu", {"modes": 160, "l0": 0.01}, steps=2_500),
    Recipe("gated", {"modes": 160, "l1": 0.07}),
    Recipe("stsae", STSAE, steps=5_000, rate=2e-3, data=Data(low=TAU, high=1.0, mean=0)),
    Recipe("pca", {"modes": 64, "k": 3}),
    Recipe("nmf", {"modes": 32, "max_rows": 4_000}, data=Data(atoms=32, nonnegative=True, mean=0)),
)


SMALL_OPTIONS: dict[str, dict[str, Any]] = {
    "matryoshka": {"prefixes": [0.5, 1]},
    "stsae": {"hidden": 128},
    "pca": {"modes": 32},
    "nmf": {"modes": 16},
}


@dataclass(frozen=True)
class Recovery:
    """What was found."""

    architecture: str
    ev: float
    cosine: float
    """Mean over true atoms of the highest cosine with a row of the dictionary."""
    l0: float
    dead: float
    """Fraction of modes that fire for no held-out row."""
    seconds: float


def smaller(recipe: Recipe) -> Recipe:
    """The same question at half the width, for a test: 2 of 48 atoms (NMF: of 16) in 32 channels, 60 modes."""
    atoms = 16 if recipe.architecture == "nmf" else 48
    data = replace(recipe.data, channels=32, atoms=atoms, active=2, fit_rows=10_000, held_out_rows=2_000)
    options = {**recipe.options, "modes": 60, **({"k": 2} if "k" in recipe.options else {})}
    options |= SMALL_OPTIONS.get(recipe.architecture, {})
    return replace(recipe, options=options, data=data, steps=recipe.steps * 2 // 3, batch=128)


def synthesize(data: Data) -> tuple[Tensor, Tensor, Tensor]:
    """The true atoms [atoms, channels], rows to fit on, and held-out rows."""
    generator = torch.Generator().manual_seed(data.seed)
    atoms = torch.randn(data.atoms, data.channels, generator=generator)
    atoms = normalize(atoms.abs().pow(3) if data.nonnegative else atoms, dim=1)
    mean = data.mean * torch.rand(data.channels, generator=generator)

    def rows(count: int) -> Tensor:
        chosen = torch.rand(count, data.atoms, generator=generator).argsort(1)[:, : data.active]
        values = data.low + (data.high - data.low) * torch.rand(count, data.active, generator=generator)
        loadings = torch.zeros(count, data.atoms).scatter_(1, chosen, values)
        noise = data.noise * torch.randn(count, data.channels, generator=generator)
        return loadings @ atoms + mean + (noise.abs() if data.nonnegative else noise)

    return atoms, rows(data.fit_rows), rows(data.held_out_rows)


def recover(recipe: Recipe, seed: int = 0) -> Recovery:
    """Train (or fit) one architecture and compare its dictionary with the true one."""
    atoms, rows, held_out = synthesize(recipe.data)
    sae = build(recipe.architecture, recipe.options, recipe.data.channels, seed=seed)
    sae.calibrate(rows[:4096], rows.std(correction=0).item())
    started = time.monotonic()
    if isinstance(sae, FittedAutoencoder):
        sae.fit(rows.split(1000))
    else:
        assert isinstance(sae, TrainedAutoencoder)
        train(sae, rows, recipe, seed)
    seconds = time.monotonic() - started
    report = sae.metrics(held_out.split(1000))
    similarity = atoms @ normalize(sae.dictionary, dim=1).T
    # A principal component has no sign.
    best = (similarity.abs() if recipe.architecture == "pca" else similarity).amax(1)
    return Recovery(recipe.architecture, report.ev, best.mean().item(), report.l0, report.dead_fraction, seconds)


def train(sae: TrainedAutoencoder, rows: Tensor, recipe: Recipe, seed: int) -> None:
    """The plain loop; dead modes are resampled every so often in its first half if the SAE asks for it."""
    sae.train()
    sae.seed_noise(seed)
    optimizer = torch.optim.Adam(sae.parameters(), lr=recipe.rate, fused=True)
    generator = torch.Generator().manual_seed(seed)
    due = sae.options["resample_every"]
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * rate_factor(step / recipe.steps)
        optimizer.zero_grad()
        batch = rows[torch.randint(len(rows), (recipe.batch,), generator=generator)]
        sae.loss(batch).total.backward()
        sae.before_step()
        optimizer.step()
        sae.after_step()
        samples = (step + 1) * recipe.batch
        if due is not None and samples % due < recipe.batch and step < recipe.steps / 2:
            modes = sae.resample(rows[:4096], seed=step)
            for moment in ("exp_avg", "exp_avg_sq"):
                named = sae.named_parameters()
                forget_moments(sae, modes, {name: optimizer.state[one][moment] for name, one in named})


def rate_factor(progress: float) -> float:
    """Linear warm-up, then half a cosine."""
    return min(1.0, progress / WARM_UP) * 0.5 * (1 + math.cos(math.pi * progress))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [recipe.architecture for recipe in RECIPES]
    parser.add_argument("--architectures", nargs="*", choices=names, default=names)
    parser.add_argument("--small", action="store_true", help="the form that the tests run")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    print(f"{'':12}{'EV':>8}{'cosine':>8}{'L0':>8}{'dead':>8}{'seconds':>9}")
    recipes = [recipe for recipe in RECIPES if recipe.architecture in given.architectures]
    recipes = [smaller(recipe) for recipe in recipes] if given.small else recipes
    found = []
    for recipe in recipes:
        one = recover(recipe, given.seed)
        found.append(asdict(one))
        print(f"{one.architecture:12}{one.ev:8.3f}{one.cosine:8.3f}{one.l0:8.2f}{one.dead:8.1%}{one.seconds:9.1f}")
    environment = {"torch": torch.__version__, "machine": platform.machine(), "threads": given.threads}
    settings = [asdict(recipe) for recipe in recipes]
    print(json.dumps({"benchmark": "sae_recovery", "environment": environment, "results": found, "recipes": settings}))


if __name__ == "__main__":
    main()
