"""Do SAEs of other seeds find the same modes?"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from codec_dist.modes.errors import ModesError
from codec_dist.utils import read_json, write_json_atomically

STABILITY_FILE = "stability.json"


@dataclass(frozen=True)
class DictionaryMatch:
    """The best one-to-one matching of two dictionaries."""

    partner: Int[Tensor, "modes"]
    """For each mode of the first dictionary, the matched mode of the second; −1 where it has too few."""
    cosine: Float[Tensor, "modes"]
    """Cosine of the pair, float64; nan where there is none. A mode far below 1 is unstable."""


def match_dictionaries(
    first: Float[Tensor, "modes channels"], second: Float[Tensor, "other_modes other_channels"]
) -> DictionaryMatch:
    """Match modes by the Hungarian algorithm on cosine (docs/method.md §5): the sum of cosines is the highest possible.

    Raises:
        ModesError: the dictionaries have other numbers of channels.
    """
    # Here, because it takes seconds to import and every training rank imports this package.
    from scipy.optimize import linear_sum_assignment

    if first.shape[1] != second.shape[1]:
        raise ModesError(f"dictionaries of {first.shape[1]} and {second.shape[1]} channels cannot be matched")
    cosines = _unit_rows(first) @ _unit_rows(second).T
    rows, columns = linear_sum_assignment(cosines.numpy(), maximize=True)
    partner = torch.full((len(first),), -1, dtype=torch.int64)
    cosine = torch.full((len(first),), torch.nan, dtype=torch.float64)
    partner[rows] = torch.as_tensor(columns, dtype=torch.int64)
    cosine[rows] = cosines[rows, columns]
    return DictionaryMatch(partner, cosine)


def stability_over_seeds(
    dictionaries: Sequence[Float[Tensor, "_ channels"]], alive: Sequence[Bool[Tensor, "_"]]
) -> list[Float[Tensor, "_"]]:
    """How well each mode of each seed's dictionary is found again with the other seeds.

    A mode's stability is the mean, over the other seeds, of its cosine with the mode matched there. Only
    living modes are matched, since dead ones lie where chance has put them. A living mode for which the
    other seed has no partner left counts as 0 there.

    Args:
        dictionaries: of at least two SAEs that differ in nothing but their seed.
        alive: which modes of each fire.

    Returns:
        For each dictionary a number per mode, float64; nan for dead modes.

    Raises:
        ModesError: fewer than two dictionaries, or other numbers of channels.
    """
    if len(dictionaries) < 2:
        raise ModesError("stability needs at least two seeds: train more of them")
    living = [dictionary[lives] for dictionary, lives in zip(dictionaries, alive, strict=True)]
    sums = [torch.zeros(len(modes), dtype=torch.float64) for modes in living]
    for left in range(len(living)):
        for right in range(left + 1, len(living)):
            match = match_dictionaries(living[left], living[right])
            matched = match.partner >= 0
            sums[left][matched] += match.cosine[matched]
            sums[right][match.partner[matched]] += match.cosine[matched]
    found = []
    for lives, total in zip(alive, sums, strict=True):
        values = torch.full((len(lives),), torch.nan, dtype=torch.float64)
        values[lives.cpu()] = total / (len(dictionaries) - 1)
        found.append(values)
    return found


def write_stability(folder: Path, modes: Float[Tensor, "modes"], compared: dict[str, str]) -> None:
    """Write ``stability.json`` beside an SAE: a number per mode (null for dead ones), and what it was compared with.

    ``compared`` has a hash of the weights for each of the seeds' folders, so that it is known when to compare again.
    """
    values = [None if value != value else round(value, 6) for value in modes.tolist()]
    write_json_atomically(folder / STABILITY_FILE, {"compared": compared, "modes": values})


def read_stability(folder: Path, compared: dict[str, str] | None = None) -> Float[Tensor, "modes"] | None:
    """The stability of an SAE's modes, nan for dead ones; None where it has no other seeds.

    Args:
        folder: of the SAE.
        compared: None too if it was compared with other weights than these.

    Raises:
        ModesError: the file is damaged.
    """
    path = folder / STABILITY_FILE
    try:
        content = read_json(path)
        if compared is not None and content["compared"] != compared:
            return None
        values = [torch.nan if value is None else float(value) for value in content["modes"]]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModesError(f"{path} cannot be read ({error!r}): remove it and run `codec-dist train` again") from error
    return torch.tensor(values, dtype=torch.float64)


def _unit_rows(dictionary: Tensor) -> Tensor:
    """Rows of norm 1; a zero row stays zero, and so has cosine 0 with everything."""
    return torch.nn.functional.normalize(dictionary.detach().to("cpu", torch.float64), dim=1, eps=1e-300)
