"""Which experts the tokens of a MoE layer go to: distributions of the load, drawn from a seed.

Drawn on the CPU whatever the device, so that the number of experts hit, and with it a problem's bytes, is the same everywhere.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

import torch


@dataclass(frozen=True, eq=False)
class Choices:
    """Each token's experts, all different, and what their outputs are weighted by.

    ids: int32 (m, topk), from 0 to experts - 1. weights: float32 (m, topk), a softmax, the largest first.
    """

    ids: torch.Tensor
    weights: torch.Tensor

    @property
    def hit(self) -> int:
        """How many experts have at least one token."""
        return len(self.ids.unique())

    @property
    def most(self) -> int:
        """Tokens of the expert that has most."""
        return int(self.ids.flatten().bincount().max()) if self.ids.numel() else 0


@dataclass(frozen=True)
class Routing:
    """How load is spread over experts.

    name: one of `ROUTINGS`, or that of a recorded distribution, by which case ids name it.
    seed: of the draw. counts: of a recorded distribution, tokens by expert; None for those of `ROUTINGS`.
    """

    name: str = "uniform"
    seed: int = 0
    counts: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.counts is None and self.name not in ROUTINGS:
            raise ValueError(
                f"unknown routing {self.name!r}: known are {', '.join(ROUTINGS)}, or the path of a recorded one (.json)"
            )
        if self.counts is not None and self.name in ROUTINGS:
            raise ValueError(f"a recorded routing cannot be named {self.name!r}")

    def __str__(self) -> str:
        return f"{self.name}_s{self.seed}" if self.seed else self.name

    def choose(self, m: int, experts: int, topk: int) -> Choices:
        """Draw the experts of m tokens, 0 allowed; the same tensors each time, not to be written to.

        Raises ValueError where a token cannot have so many different experts.
        """
        return _choose(self, m, experts, topk)


@lru_cache(maxsize=64)
def _choose(routing: Routing, m: int, experts: int, topk: int) -> Choices:
    if not 1 <= topk <= experts:
        raise ValueError(f"a token has 1 to {experts} experts, not {topk}")
    generator = torch.Generator().manual_seed(routing.seed)
    if routing.counts is None:
        ids = ROUTINGS[routing.name](m, experts, topk, generator)
    else:
        ids = _recorded(routing, m, experts, topk, generator)
    logits = torch.randn(m, topk, generator=generator, dtype=torch.float64)
    weights = logits.sort(dim=-1, descending=True).values.softmax(dim=-1)
    return Choices(ids.to(torch.int32), weights.float())


def _uniform(m: int, experts: int, topk: int, generator: torch.Generator) -> torch.Tensor:
    return _draw(torch.zeros(m, experts, dtype=torch.float64), topk, generator)


def _zipf(m: int, experts: int, topk: int, generator: torch.Generator) -> torch.Tensor:
    """The expert of rank r is drawn with a chance in proportion to 1 / r; which expert has which rank is drawn too."""
    rank = 1 + torch.randperm(experts, generator=generator).double()
    return _draw(-rank.log().expand(m, experts), topk, generator)


def _one_hot(m: int, experts: int, topk: int, generator: torch.Generator) -> torch.Tensor:
    """One expert, not the first or last where there are others, is among the choices of every token; the rest is uniform."""
    log_chance = torch.zeros(m, experts, dtype=torch.float64)
    log_chance[:, experts // 2] = torch.inf
    return _draw(log_chance, topk, generator)


def _balanced(m: int, experts: int, topk: int, generator: torch.Generator) -> torch.Tensor:
    """Experts are dealt in turn: no two differ by more than one token."""
    deal = torch.randperm(experts, generator=generator)
    return deal[torch.arange(m * topk) % experts].reshape(m, topk)


ROUTINGS: dict[str, Callable[[int, int, int, torch.Generator], torch.Tensor]] = {
    "uniform": _uniform,
    "zipf": _zipf,
    "one_hot": _one_hot,
    "balanced": _balanced,
}

UNIFORM = Routing()


def read_routing(path: Path) -> Routing:
    """A recorded distribution: a JSON object whose `counts` say how many tokens each expert had.

    Tokens are drawn anew from these shares. Its name is that of the file and six digits of a hash of the counts, so that a
    changed file never meets the baseline of the old one. Raises ValueError naming the file and what is wrong with it.
    """
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read the routing {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"the routing {path} is not JSON: {error}") from error
    counts = recorded.get("counts") if isinstance(recorded, dict) else None
    if not isinstance(counts, list) or not counts or not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError(f"the routing {path} has no counts, a list of whole numbers, one an expert")
    stem = "".join(c if c.isalnum() or c in "._" else "_" for c in path.stem.lower())
    return Routing(f"{stem}_{sha256(repr(counts).encode()).hexdigest()[:6]}", counts=tuple(counts))


def _recorded(routing: Routing, m: int, experts: int, topk: int, generator: torch.Generator) -> torch.Tensor:
    counts = torch.tensor(routing.counts, dtype=torch.float64)
    if len(counts) != experts:
        raise ValueError(f"the routing {routing} is of {len(counts)} experts, and the model has {experts}")
    if int((counts > 0).sum()) < topk:
        raise ValueError(f"the routing {routing} has tokens at {int((counts > 0).sum())} experts, and each token needs {topk}")
    return _draw(counts.log().expand(m, experts), topk, generator)


def _draw(log_chance: torch.Tensor, topk: int, generator: torch.Generator) -> torch.Tensor:
    """Different experts of each token, one after another by their chances among what is left. (m, experts) -> (m, topk)."""
    # The largest of log chances with Gumbel noise are such a draw (Kool et al., arXiv 1903.06059).
    uniform = torch.rand(log_chance.shape, generator=generator, dtype=torch.float64).clamp(min=1e-300)
    return (log_chance - (-uniform.log()).log()).topk(topk, dim=-1).indices
