"""Do SAEs of other seeds find the same modes?"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from codec_dist.modes.errors import ModesError


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
    """Match modes by the Hungarian algorithm on cosine (METHOD §5): the sum of cosines is the highest possible.

    Raises:
        ModesError: the dictionaries have other numbers of channels.
    """
    # Here, because it takes seconds to import and every training rank imports this room.
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


def _unit_rows(dictionary: Tensor) -> Tensor:
    """Rows of norm 1; a zero row stays zero, and so has cosine 0 with everything."""
    return torch.nn.functional.normalize(dictionary.detach().to("cpu", torch.float64), dim=1, eps=1e-300)
