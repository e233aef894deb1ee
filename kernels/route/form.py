"""What a router does with its logits, as one value."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

MOST_PAIRS = 2**15
"""The most experts times choices: 512 by 64. Beyond, what is chosen is no mixture's."""
SCORES = ("softmax", "sigmoid", "sqrt_softplus")


@dataclasses.dataclass(frozen=True)
class Form:
    """The attributes of `route`, in the order of its op's arguments.

    `by_logits`: experts are compared by their logits, not by their scores. `scores_after`: only the chosen logits are
    scored, which were chosen by logits then. `group_size`: experts in a group, 0 where there are none; the
    `num_kept` best groups by the sum of their `group_choices` largest stay, and all others count as 0 (`fills_zero`)
    or are left out. `eps` and `least` bound the sum that weights are divided by.
    """

    score: str
    num_choices: int
    by_logits: bool = False
    scores_after: bool = False
    group_size: int = 0
    num_kept: int = 0
    group_choices: int = 1
    fills_zero: bool = False
    normalizes: bool = False
    eps: float = 0.0
    least: float = 0.0
    scale: float = 1.0
    is_sorted: bool = True
    scores_dtype: torch.dtype = torch.float32
    dtype: torch.dtype = torch.float32

    def astuple(self) -> tuple[Any, ...]:
        """Return the attributes as the op takes them."""
        return tuple(vars(self).values())

    def choice_dtype(self, logits: Tensor, bias: Tensor | None) -> torch.dtype:
        """Return the dtype in which experts are compared."""
        compared = logits.dtype if self.by_logits else self.scores_dtype
        return compared if bias is None else torch.promote_types(compared, bias.dtype)

    def has_kernel(self, logits: Tensor, bias: Tensor | None) -> bool:
        """Return whether the kernels compute it: not in float64, and no more experts and choices than a tile holds."""
        is_narrow = torch.float64 not in (self.scores_dtype, self.choice_dtype(logits, bias))
        return is_narrow and logits.shape[-1] * self.num_choices <= MOST_PAIRS


ATTRIBUTES = (
    "str score, int num_choices, bool by_logits, bool scores_after, int group_size, int num_kept, int group_choices, "
    "bool fills_zero, bool normalizes, float eps, float least, float scale, bool is_sorted, "
    "ScalarType scores_dtype, ScalarType dtype"
)
"""The fields of a `Form` in a schema."""


def check_form(form: Form, logits: Tensor) -> None:
    """Raise a ValueError if `form` cannot be the routing of `logits`."""
    num_experts = logits.shape[-1] if logits.dim() else 0
    if form.score not in SCORES:
        raise ValueError(f"route: score, expected one of {SCORES}, got {form.score!r}")
    if not 0 < form.num_choices <= num_experts:
        raise ValueError(f"route: num_choices, expected 1 to {num_experts}, got {form.num_choices}")
    if form.scores_after and not form.by_logits:
        raise ValueError(
            "route: scores_after, expected by_logits: what is scored later has no scores to compare"
        )
    if form.group_size and not is_grouping(form, num_experts):
        raise ValueError(
            f"route: groups of {form.group_size} of {num_experts} experts, {form.num_kept} kept for "
            f"{form.num_choices} choices, expected equal groups, and enough experts in those kept"
        )


def is_grouping(form: Form, num_experts: int) -> bool:
    """Return whether the groups of `form` are equal ones, and those kept have experts enough.

    >>> is_grouping(Form("sigmoid", 8, group_size=32, num_kept=4), 256)
    True
    """
    return (
        num_experts % form.group_size == 0
        and 0 < form.num_kept <= num_experts // form.group_size
        and 1 <= form.group_choices <= min(2, form.group_size)
        and form.num_kept * form.group_size >= form.num_choices
    )
