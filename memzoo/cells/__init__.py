"""Every memory of the zoo: one paper mechanism a file."""

from memzoo.cells.matrix.gated_delta import GatedDelta as GatedDelta
from memzoo.cells.matrix.linear_attention import (
  LinearAttention as LinearAttention,
)
from memzoo.cells.rnn.gru import GRU as GRU
