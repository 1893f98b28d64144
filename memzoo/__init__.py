"""memzoo: the JAX zoo of memories, behind one contract."""

from memzoo import cells as cells
from memzoo import kernels as kernels
from memzoo import ops as ops
from memzoo.core.card import card as card
from memzoo.core.cell import Cell as Cell
from memzoo.core.cell import param_count as param_count
from memzoo.core.cell import reset_from_cu_seqlens as reset_from_cu_seqlens
from memzoo.core.cell import reset_from_done as reset_from_done
from memzoo.core.cell import reset_from_segment_ids as reset_from_segment_ids
from memzoo.core.cell import scan as scan
from memzoo.core.cell import state_bytes as state_bytes
from memzoo.core.cell import state_size as state_size
from memzoo.core.dispatch import explain as explain
from memzoo.core.dispatch import platform as platform
from memzoo.core.registry import describe as describe
from memzoo.core.registry import from_config as from_config
from memzoo.core.registry import make as make
from memzoo.core.registry import names as names
from memzoo.core.registry import register as register
from memzoo.core.registry import tiny as tiny
from memzoo.core.registry import to_config as to_config
from memzoo.core.store import Store as Store
from memzoo.core.store import write_all as write_all

__version__ = "0.1.0"
