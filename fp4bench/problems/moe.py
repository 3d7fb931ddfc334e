"""The experts of a MoE layer: y = sum over a token's experts e of weight * (act(x @ w13[e].T + b13[e]) @ w2[e].T + b2[e])."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import torch

from fp4bench.formats import BlockFormat
from fp4bench.models import SILU, Activation
from fp4bench.problems.modes import Fp8Scaling, Mode
from fp4bench.problems.operands import fp4_bytes, join_case_id, normal
from fp4bench.problems.routing import UNIFORM, Choices, Routing

__all__ = ["SILU", "Activation", "ExpertWeights", "MoeInputs", "MoeProblem"]

# Calls of one case go round at least so many bytes of weights: more than three times the largest L2 (B200: 126 MB).
COLD_BYTES = 1 << 29

# Spread of a bias: with it, a few of a hundred gates reach gpt-oss' limit of 7, which no unit normal does.
_BIAS = 3.0


@dataclass(frozen=True)
class MoeProblem:
    """The experts of one MoE layer of one rank, at one batch size; routing is given, its logits are not computed.

    hidden: of x and y. intermediate: of one expert, on this rank. format: None in the modes without FP4 weights.
    fp8: what shares a scale, in mode fp8 alone; FP8 activations of w4a8 have a scale a row.
    m may be 0. Raises ValueError for what no layer is.
    """

    op: ClassVar[str] = "moe"
    copies_agree: ClassVar[bool] = False  # each has choices of its own
    hadamard: ClassVar[None] = None

    model: str
    layer: str
    tp: int
    m: int
    hidden: int
    intermediate: int
    experts: int
    topk: int
    mode: Mode
    format: BlockFormat | None = None
    activation: Activation = SILU
    bias: bool = False
    routing: Routing = UNIFORM
    fp8: Fp8Scaling | None = None

    def __post_init__(self) -> None:
        if self.m < 0 or min(self.hidden, self.intermediate) < 1 or not 1 <= self.topk <= self.experts:
            raise ValueError(
                f"{self} has m = {self.m}, hidden = {self.hidden}, intermediate = {self.intermediate}, {self.topk} of "
                f"{self.experts} experts: that is no MoE layer"
            )
        if (self.mode.weights == "fp4") != (self.format is not None):
            raise ValueError(
                f"{self}: mode {self.mode} {'needs an FP4 format' if self.format is None else 'has no FP4 format'}"
            )
        if (self.mode.weights == "fp8") != (self.fp8 is not None):
            raise ValueError(f"{self}: mode {self.mode} {'needs' if self.fp8 is None else 'has no'} FP8 scaling")
        if self.mode.activations != "bf16" and self.mode.weights == "fp4" and not self.mode.quantizes:
            raise ValueError(
                f"{self}: a MoE layer has no mode {self.mode}: it begins and ends in bfloat16, and is quantized inside"
            )

    def case_id(self, provider: str = "") -> str:
        """`moe-[<format>-]<mode>[-<scaling>][-<provider>]-<model>.<layer>.tp<t>-m<m>[-<routing>]`, the key of a baseline.

        FP8 scaling by tensors and uniform routing, those of vLLM's benchmark, are not named.
        """
        what = (*((str(self.format),) if self.format else ()), self.mode.name)
        scaling = (self.fp8.name,) if self.fp8 and self.fp8.name != "tensor" else ()
        where = f"{self.model}.{self.layer}.tp{self.tp}"
        routing = "" if self.routing == UNIFORM else f"-{self.routing}"
        return join_case_id(self.op, (*what, *scaling), provider, where, self.m) + routing

    def __str__(self) -> str:
        return self.case_id()

    @property
    def n(self) -> int:
        """The intermediate size, as vLLM's MoE benchmark names it."""
        return self.intermediate

    @property
    def k(self) -> int:
        """The hidden size, likewise: 7168 of DeepSeek-R1, with n = 2048. Tables elsewhere have the two the other way round."""
        return self.hidden

    @property
    def shape(self) -> tuple[Any, ...]:
        """Problems of one operation and shape have the same inputs."""
        return self.m, self.hidden, self.intermediate, self.experts, self.topk, self.bias, self.routing

    @property
    def choices(self) -> Choices:
        """The experts of each token, of every copy of the inputs up to a rotation of the experts."""
        return self.routing.choose(self.m, self.experts, self.topk)

    @cached_property
    def experts_hit(self) -> int:
        """How many experts have a token; only these are read."""
        return self.choices.hit

    @property
    def flops(self) -> int:
        """Multiplications and additions of the products of all pairs of a token and its expert."""
        return 6 * self.m * self.topk * self.hidden * self.intermediate

    @property
    def bytes(self) -> int:
        """Weights, scales and biases of the experts hit, x, y, and the choices: int32 ids and float32 weights."""
        around = 2 * self.m * self.hidden * 2 + self.m * self.topk * (4 + 4)
        return self.experts_hit * self.expert_bytes + around

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's weights, scales and biases."""
        bias = 2 * (2 * self.intermediate + self.hidden) if self.bias else 0
        return (
            self._weight_bytes(2 * self.intermediate, self.hidden) + self._weight_bytes(self.hidden, self.intermediate) + bias
        )

    def inputs(self, device: torch.device | str = "cpu", seed: int = 0) -> "MoeInputs":
        """Normal values from `seed`, weights scaled by their width**-0.5. Devices draw different values, not other choices."""
        choices = self.choices
        weights = ExpertWeights(self.experts, self.hidden, self.intermediate, self.bias, str(device), seed)
        x = normal(self.m, self.hidden, device, weights.seed_of(0, _X))
        return MoeInputs(x, choices.weights.to(device, copy=True), choices.ids.to(device, copy=True), weights)

    def copy(self, inputs: "MoeInputs", number: int) -> "MoeInputs":
        """Inputs of the same work that find no weight in the L2: the choices, moved on to the next experts.

        In copy c every expert e of the choices is e + c * (experts hit), modulo their number: as many are hit, and the load of
        each is that of another. Copies share weights. Where all experts together are less than `COLD_BYTES`, several sets of
        weights take turns as well.
        """
        sets = max(1, -(-COLD_BYTES // (self.experts * self.expert_bytes)))
        turns, which = divmod(number, sets)
        ids = (inputs.topk_ids + turns * self.experts_hit) % self.experts
        return replace(
            inputs,
            x=inputs.x.clone(),
            topk_weights=inputs.topk_weights.clone(),
            topk_ids=ids,
            weights=inputs.weights.other(which),
        )

    def _weight_bytes(self, rows: int, k: int) -> int:
        if self.mode.weights == "bf16":
            return 2 * rows * k
        if self.fp8 is None:
            assert self.format is not None
            return fp4_bytes(rows, k, self.format)
        tile_rows, tile_columns = self.fp8.weight_tile
        return rows * k + 4 * -(-rows // (tile_rows or rows)) * -(-k // (tile_columns or k))  # a float32 scale each


_X, _W13, _W2, _B13, _B2 = range(5)


@dataclass(frozen=True, eq=False)
class ExpertWeights:
    """bfloat16 weights of all experts, each drawn when it is asked for: those of a layer of DeepSeek-R1 are 22.5 GB, and need
    never be there at once. A provider quantizes and lays out one expert after another, and keeps only what it makes of them.

    number: of the set; sets have different values.
    """

    experts: int
    hidden: int
    intermediate: int
    bias: bool
    device: str
    seed: int = 0
    number: int = 0
    _kept: dict[Any, Any] = field(default_factory=dict, repr=False)

    def w13(self, expert: int) -> torch.Tensor:
        """(2 * intermediate, hidden): the gate's rows, then those of what it gates; not interleaved. The same at each call."""
        return normal(2 * self.intermediate, self.hidden, self.device, self.seed_of(expert, _W13)) * self.hidden**-0.5

    def w2(self, expert: int) -> torch.Tensor:
        """(hidden, intermediate)."""
        return normal(self.hidden, self.intermediate, self.device, self.seed_of(expert, _W2)) * self.intermediate**-0.5

    def b13(self, expert: int) -> torch.Tensor | None:
        """(2 * intermediate), rows as in w13; None where the layer has no bias."""
        return _BIAS * normal(1, 2 * self.intermediate, self.device, self.seed_of(expert, _B13))[0] if self.bias else None

    def b2(self, expert: int) -> torch.Tensor | None:
        """(hidden); None where the layer has no bias."""
        return normal(1, self.hidden, self.device, self.seed_of(expert, _B2))[0] if self.bias else None

    def all_w13(self) -> Iterator[torch.Tensor]:
        """Expert by expert."""
        return map(self.w13, range(self.experts))

    def all_w2(self) -> Iterator[torch.Tensor]:
        """Expert by expert."""
        return map(self.w2, range(self.experts))

    def keep(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` returned at the first call with this key, such as a provider's layout of these weights.

        Copies of a case's inputs share weights: what is made of the weights alone goes through here, and is there once.
        """
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def other(self, number: int) -> "ExpertWeights":
        """Another set of weights of the same shape; the same one at each call."""
        if number == self.number:
            return self
        return self.keep(("set", number), lambda: replace(self, number=number, _kept={}))

    def seed_of(self, expert: int, part: int) -> int:
        """A different seed for each tensor of each expert and set."""
        return ((self.seed * 1000 + self.number) * self.experts + expert) * 5 + part


@dataclass(frozen=True, eq=False)
class MoeInputs:
    """What a MoE layer gets, before any quantization.

    x: bfloat16 (m, hidden). topk_weights: float32 (m, topk). topk_ids: int32 (m, topk), a token's experts, all different.
    weights: the experts', one by one. The properties below stack them, anew at each access: for layers that fit.
    """

    x: torch.Tensor
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    weights: ExpertWeights

    @property
    def w13(self) -> torch.Tensor:
        """(experts, 2 * intermediate, hidden)."""
        w = self.weights
        return _stacked(w.all_w13(), w.experts)

    @property
    def w2(self) -> torch.Tensor:
        """(experts, hidden, intermediate)."""
        w = self.weights
        return _stacked(w.all_w2(), w.experts)

    @property
    def b13(self) -> torch.Tensor | None:
        """(experts, 2 * intermediate), or None."""
        w = self.weights
        return torch.stack([b for e in range(w.experts) if (b := w.b13(e)) is not None]) if w.bias else None

    @property
    def b2(self) -> torch.Tensor | None:
        """(experts, hidden), or None."""
        w = self.weights
        return torch.stack([b for e in range(w.experts) if (b := w.b2(e)) is not None]) if w.bias else None


def _stacked(parts: Iterator[torch.Tensor], count: int) -> torch.Tensor:
    """`torch.stack` without holding all parts beside the result."""
    first = next(parts)
    stack = first.new_empty(count, *first.shape)
    stack[0] = first
    for number, part in enumerate(parts, 1):
        stack[number] = part
    return stack
