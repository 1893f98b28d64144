"""Memory operations on arrays: no parameters, one sequence, one head."""

from memzoo.ops.attention import attention as attention
from memzoo.ops.batched import batched as batched
from memzoo.ops.delta_rule import delta_rule as delta_rule
from memzoo.ops.diag_plus_rank_one import (
  diag_plus_rank_one as diag_plus_rank_one,
)
from memzoo.ops.gradient_step import gradient_step as gradient_step
from memzoo.ops.hopfield import hopfield as hopfield
from memzoo.ops.linear_attention import linear_attention as linear_attention
from memzoo.ops.linear_recurrence import linear_recurrence as linear_recurrence
from memzoo.ops.product_key import product_key as product_key
from memzoo.ops.selective_scan import selective_scan as selective_scan
