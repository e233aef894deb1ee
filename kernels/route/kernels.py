"""The kernels: one program a token, all its experts in one tile of groups and their members."""

from fxopt.kernels.launch import jit, tl


@jit
def rounded(b_x, DTYPE: tl.constexpr):
    """Return a tile in fp32 after rounding to DTYPE."""
    if DTYPE == "bfloat16":
        b_x = b_x.to(tl.bfloat16).to(tl.float32)
    elif DTYPE == "float16":
        b_x = b_x.to(tl.float16).to(tl.float32)
    return b_x


@jit
def softplus(b_x):
    """Return log(1 + exp(x)) as torch does: x itself where it is large; exact where exp(x) is small beside 1."""
    b_exp = tl.exp(tl.minimum(b_x, 20.0))
    b_sum = 1 + b_exp
    b_log = tl.where(b_sum == 1, b_exp, tl.log(b_sum) * (b_exp / tl.where(b_sum == 1, 1, b_sum - 1)))
    return tl.where(b_x > 20.0, b_x, b_log)


@jit
def score_of_one(b_x, SCORE: tl.constexpr, DTYPE: tl.constexpr):
    """Return scores that each hang on one logit alone, in fp32; DTYPE is that of what is made on the way."""
    if SCORE == "sigmoid":
        b_x = tl.sigmoid(b_x)
    else:
        b_x = tl.sqrt_rn(rounded(softplus(b_x), DTYPE))
    return b_x


@jit
def largest_of(b_value, b_is_open, b_index):
    """Return the largest value of a tile's open items, and the first index where it stands."""
    top = tl.max(tl.max(tl.where(b_is_open, b_value, -float("inf")), axis=1), axis=0)
    b_at = tl.where(b_is_open & (b_value == top), b_index, 2147483647)
    return top, tl.min(tl.min(b_at, axis=1), axis=0)


@jit
def kept_groups(
    b_value,
    b_is_inside,
    b_group,
    b_member,
    num_groups,
    NUM_KEPT: tl.constexpr,
    GROUP_CHOICES: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Return which rows of a tile are the best groups, as a column."""
    b_top = tl.max(tl.where(b_is_inside, b_value, -float("inf")), axis=1)[:, None]
    b_score = b_top
    if GROUP_CHOICES == 2:
        b_first = tl.min(tl.where(b_is_inside & (b_value == b_top), b_member, 2147483647), axis=1)[:, None]
        b_others = tl.where(b_is_inside & (b_member != b_first), b_value, -float("inf"))
        b_score = rounded(b_top + tl.max(b_others, axis=1)[:, None], DTYPE)
    b_is_open = b_group < num_groups
    b_is_kept = b_group < 0
    for _ in range(NUM_KEPT):
        _, at = largest_of(b_score, b_is_open, b_group)
        b_is_kept = b_is_kept | (b_group == at)
        b_is_open = b_is_open & (b_group != at)
    return b_is_kept


@jit
def route_forward_kernel(
    p_logits,
    p_bias,
    p_weights,
    p_ids,
    logits_row_stride,
    num_experts,
    group_size,
    eps,
    least,
    scale,
    SCORE: tl.constexpr,
    BY_LOGITS: tl.constexpr,
    SCORES_AFTER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NUM_CHOICES: tl.constexpr,
    NUM_KEPT: tl.constexpr,
    GROUP_CHOICES: tl.constexpr,
    FILLS_ZERO: tl.constexpr,
    NORMALIZES: tl.constexpr,
    SCORES_DTYPE: tl.constexpr,
    CHOICE_DTYPE: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_MEMBERS: tl.constexpr,
    BLOCK_CHOICES: tl.constexpr,
):
    """Write one token's ids and weights; NUM_KEPT 0: there is one group, with all experts."""
    row = tl.program_id(0).to(tl.int64)
    b_group = tl.arange(0, BLOCK_GROUPS)[:, None]
    b_member = tl.arange(0, BLOCK_MEMBERS)[None, :]
    b_index = b_group * group_size + b_member
    b_is_inside = (b_member < group_size) & (b_index < num_experts)
    b_logits = tl.load(p_logits + row * logits_row_stride + b_index, mask=b_is_inside, other=-float("inf"))
    b_scores = b_logits.to(tl.float32)
    b_choice = b_scores
    if not SCORES_AFTER:
        if SCORE == "softmax":
            b_exp = tl.exp(b_scores - tl.max(tl.max(b_scores, axis=1), axis=0))
            b_scores = b_exp / tl.sum(tl.sum(b_exp, axis=1), axis=0)
        else:
            b_scores = score_of_one(b_scores, SCORE, SCORES_DTYPE)
        b_scores = rounded(b_scores, SCORES_DTYPE)
    if not BY_LOGITS:
        b_choice = b_scores
    if HAS_BIAS:
        b_bias = tl.load(p_bias + b_index, mask=b_is_inside, other=0.0).to(tl.float32)
        b_choice = rounded(b_choice + b_bias, CHOICE_DTYPE)
    b_choice = tl.where(b_choice != b_choice, float("inf"), b_choice)  # a NaN is the largest, as in torch
    if NUM_KEPT > 0:
        b_is_kept = kept_groups(
            b_choice,
            b_is_inside,
            b_group,
            b_member,
            num_experts // group_size,
            NUM_KEPT,
            GROUP_CHOICES,
            CHOICE_DTYPE,
        )
        b_choice = tl.where(b_is_kept, b_choice, 0.0 if FILLS_ZERO else -float("inf"))
    b_place = tl.arange(0, BLOCK_CHOICES)
    b_ids = tl.zeros([BLOCK_CHOICES], tl.int32)
    b_picked = tl.zeros([BLOCK_CHOICES], tl.float32)
    b_is_open = b_is_inside
    for place in range(NUM_CHOICES):
        _, at = largest_of(b_choice, b_is_open, b_index)
        picked = tl.sum(
            tl.sum(tl.where(b_index == at, tl.where(b_is_inside, b_scores, 0.0), 0.0), axis=1), axis=0
        )
        b_ids = tl.where(b_place == place, at, b_ids)
        b_picked = tl.where(b_place == place, picked, b_picked)
        b_is_open = b_is_open & (b_index != at)
    b_is_choice = b_place < NUM_CHOICES
    if SCORES_AFTER:
        if SCORE == "softmax":
            b_masked = tl.where(b_is_choice, b_picked, -float("inf"))
            b_exp = tl.exp(b_masked - tl.max(b_masked, axis=0))
            b_picked = b_exp / tl.sum(b_exp, axis=0)
        else:
            b_picked = score_of_one(b_picked, SCORE, SCORES_DTYPE)
        b_picked = rounded(b_picked, SCORES_DTYPE)
    if NORMALIZES:
        total = tl.sum(tl.where(b_is_choice, b_picked, 0.0), axis=0) + eps
        b_picked = b_picked / tl.where(total < least, least, total)
    at_row = row * NUM_CHOICES + b_place
    tl.store(p_weights + at_row, (b_picked * scale).to(p_weights.dtype.element_ty), mask=b_is_choice)
    tl.store(p_ids + at_row, b_ids.to(tl.int64), mask=b_is_choice)


@jit
def route_backward_kernel(
    p_dweights,
    p_logits,
    p_ids,
    p_dlogits,
    logits_row_stride,
    num_experts,
    eps,
    least,
    scale,
    SCORE: tl.constexpr,
    SCORES_AFTER: tl.constexpr,
    NUM_CHOICES: tl.constexpr,
    NORMALIZES: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    BLOCK_CHOICES: tl.constexpr,
):
    """Write the gradient of one token's logits."""
    row = tl.program_id(0).to(tl.int64)
    b_place = tl.arange(0, BLOCK_CHOICES)
    b_is_choice = b_place < NUM_CHOICES
    at_row = row * NUM_CHOICES + b_place
    b_ids = tl.load(p_ids + at_row, mask=b_is_choice, other=0)
    b_given = tl.load(p_dweights + at_row, mask=b_is_choice, other=0.0).to(tl.float32) * scale
    p_row = p_logits + row * logits_row_stride
    b_chosen = tl.load(p_row + b_ids, mask=b_is_choice, other=-float("inf")).to(tl.float32)
    b_index = tl.arange(0, BLOCK_EXPERTS)
    b_is_inside = b_index < num_experts
    b_scores = tl.zeros([BLOCK_EXPERTS], tl.float32)
    if SCORE != "softmax":
        b_picked = score_of_one(b_chosen, SCORE, "float32")
    elif SCORES_AFTER:
        b_exp = tl.exp(b_chosen - tl.max(b_chosen, axis=0))
        b_picked = b_exp / tl.sum(b_exp, axis=0)
    else:
        b_logits = tl.load(p_row + b_index, mask=b_is_inside, other=-float("inf")).to(tl.float32)
        top = tl.max(b_logits, axis=0)
        b_exp = tl.exp(b_logits - top)
        total = tl.sum(b_exp, axis=0)
        b_scores = b_exp / total
        b_picked = tl.exp(b_chosen - top) / total
    if NORMALIZES:
        total = tl.sum(b_picked, axis=0) + eps
        divisor = tl.where(total < least, least, total)
        through_sum = tl.sum(b_given * b_picked, axis=0) / (divisor * divisor)
        b_given = b_given / divisor - tl.where(total < least, 0.0, through_sum)
    b_given = tl.where(b_is_choice, b_given, 0.0)
    mean = tl.sum(b_given * b_picked, axis=0)
    if SCORE == "sigmoid":
        b_given = b_given * b_picked * (1 - b_picked)
    elif SCORE == "sqrt_softplus":
        b_given = tl.where(b_is_choice, b_given * tl.sigmoid(b_chosen) / (2 * b_picked), 0.0)
    elif SCORES_AFTER:
        b_given = b_picked * (b_given - mean)
    b_is_at = (b_index[:, None] == b_ids[None, :]) & b_is_choice[None, :]
    b_dlogits = tl.sum(tl.where(b_is_at, b_given[None, :], 0.0), axis=1)
    if SCORE == "softmax" and not SCORES_AFTER:
        b_dlogits = b_scores * (b_dlogits - mean)
    p_out = p_dlogits + row * num_experts + b_index
    tl.store(p_out, b_dlogits.to(p_dlogits.dtype.element_ty), mask=b_is_inside)
