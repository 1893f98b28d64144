"""Memory operations on arrays: no parameters, one sequence, one head."""

from memzoo.ops.attention import attention as attention
from memzoo.ops.batched import batched as batched
from memzoo.ops.delta_rule import delta_rule as delta_rule
from memzoo.ops.linear_attention import linear_attention as linear_attention
