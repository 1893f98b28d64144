"""Every memory of the zoo: one paper mechanism a file."""

from memzoo.cells.hopfield.hopfield_lookup import (
  HopfieldLookup as HopfieldLookup,
)
from memzoo.cells.kv.window import Window as Window
from memzoo.cells.matrix.gated_delta import GatedDelta as GatedDelta
from memzoo.cells.matrix.linear_attention import (
  LinearAttention as LinearAttention,
)
from memzoo.cells.rnn.gru import GRU as GRU
from memzoo.cells.rnn.lstm import LSTM as LSTM
from memzoo.cells.slot.token_turing_machine import (
  TokenTuringMachine as TokenTuringMachine,
)
from memzoo.cells.ssm.lru import LRU as LRU
from memzoo.cells.ssm.mamba import Mamba as Mamba
from memzoo.cells.table.product_key import ProductKey as ProductKey
from memzoo.cells.ttt.ttt_linear import TTTLinear as TTTLinear
