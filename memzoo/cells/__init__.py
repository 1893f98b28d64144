"""Every memory of the zoo: one paper mechanism a file."""

from memzoo.cells.hopfield.hopfield_lookup import (
  HopfieldLookup as HopfieldLookup,
)
from memzoo.cells.kv.window import Window as Window
from memzoo.cells.matrix.based import Based as Based
from memzoo.cells.matrix.delta_net import DeltaNet as DeltaNet
from memzoo.cells.matrix.ecoformer import EcoFormer as EcoFormer
from memzoo.cells.matrix.fast_weight_programmer import (
  FastWeightProgrammer as FastWeightProgrammer,
)
from memzoo.cells.matrix.gated_delta import GatedDelta as GatedDelta
from memzoo.cells.matrix.gated_delta2 import GatedDelta2 as GatedDelta2
from memzoo.cells.matrix.gated_delta_product import (
  GatedDeltaProduct as GatedDeltaProduct,
)
from memzoo.cells.matrix.gated_slot_attention import (
  GatedSlotAttention as GatedSlotAttention,
)
from memzoo.cells.matrix.gla import GLA as GLA
from memzoo.cells.matrix.hgrn2 import HGRN2 as HGRN2
from memzoo.cells.matrix.kimi_delta_attention import (
  KimiDeltaAttention as KimiDeltaAttention,
)
from memzoo.cells.matrix.lightnet import LightNet as LightNet
from memzoo.cells.matrix.lightning_attention import (
  LightningAttention as LightningAttention,
)
from memzoo.cells.matrix.linear_attention import (
  LinearAttention as LinearAttention,
)
from memzoo.cells.matrix.longhorn import Longhorn as Longhorn
from memzoo.cells.matrix.mesa_net import MesaNet as MesaNet
from memzoo.cells.matrix.mixture_of_memories import (
  MixtureOfMemories as MixtureOfMemories,
)
from memzoo.cells.matrix.mlstm import MLSTM as MLSTM
from memzoo.cells.matrix.orthogonal_memory import (
  OrthogonalMemory as OrthogonalMemory,
)
from memzoo.cells.matrix.performer import Performer as Performer
from memzoo.cells.matrix.prefix_linear_attention import (
  PrefixLinearAttention as PrefixLinearAttention,
)
from memzoo.cells.matrix.retnet import RetNet as RetNet
from memzoo.cells.matrix.rwkv6 import RWKV6 as RWKV6
from memzoo.cells.matrix.rwkv7 import RWKV7 as RWKV7
from memzoo.cells.rnn.co_rnn import CoRNN as CoRNN
from memzoo.cells.rnn.echo_state_network import (
  EchoStateNetwork as EchoStateNetwork,
)
from memzoo.cells.rnn.elm_neuron import ELMNeuron as ELMNeuron
from memzoo.cells.rnn.elman import Elman as Elman
from memzoo.cells.rnn.gru import GRU as GRU
from memzoo.cells.rnn.ind_rnn import IndRNN as IndRNN
from memzoo.cells.rnn.long_expressive_memory import (
  LongExpressiveMemory as LongExpressiveMemory,
)
from memzoo.cells.rnn.hgrn import HGRN as HGRN
from memzoo.cells.rnn.lstm import LSTM as LSTM
from memzoo.cells.rnn.min_gru import MinGRU as MinGRU
from memzoo.cells.rnn.min_lstm import MinLSTM as MinLSTM
from memzoo.cells.rnn.qrnn import QRNN as QRNN
from memzoo.cells.rnn.slstm import SLSTM as SLSTM
from memzoo.cells.rnn.sru import SRU as SRU
from memzoo.cells.rnn.unicornn import UnICORNN as UnICORNN
from memzoo.cells.slot.token_turing_machine import (
  TokenTuringMachine as TokenTuringMachine,
)
from memzoo.cells.ssm.chimera import Chimera as Chimera
from memzoo.cells.ssm.dss import DSS as DSS
from memzoo.cells.ssm.hyena import Hyena as Hyena
from memzoo.cells.ssm.lmu import LMU as LMU
from memzoo.cells.spiking.liquid_state_machine import (
  LiquidStateMachine as LiquidStateMachine,
)
from memzoo.cells.ssm.fast_and_forgetful import (
  FastAndForgetful as FastAndForgetful,
)
from memzoo.cells.ssm.b_mojo import BMojo as BMojo
from memzoo.cells.ssm.long_mamba import LongMamba as LongMamba
from memzoo.cells.ssm.long_mamba1 import LongMamba1 as LongMamba1
from memzoo.cells.ssm.long_vq import LongVQ as LongVQ
from memzoo.cells.ssm.lru import LRU as LRU
from memzoo.cells.ssm.lssl import LSSL as LSSL
from memzoo.cells.ssm.mamba import Mamba as Mamba
from memzoo.cells.ssm.mamba2 import Mamba2 as Mamba2
from memzoo.cells.ssm.mamba3 import Mamba3 as Mamba3
from memzoo.cells.ssm.rg_lru import RGLRU as RGLRU
from memzoo.cells.ssm.parallel_lmu import ParallelLMU as ParallelLMU
from memzoo.cells.ssm.s4 import S4 as S4
from memzoo.cells.ssm.s4d import S4D as S4D
from memzoo.cells.ssm.s5 import S5 as S5
from memzoo.cells.ssm.state_memory_replay import (
  StateMemoryReplay as StateMemoryReplay,
)
from memzoo.cells.table.product_key import ProductKey as ProductKey
from memzoo.cells.ttt.atlas import Atlas as Atlas
from memzoo.cells.ttt.titans import Titans as Titans
from memzoo.cells.ttt.ttt_linear import TTTLinear as TTTLinear
from memzoo.cells.ttt.ttt_mlp import TTTMLP as TTTMLP
