"""What a memory holds, how long, and what it does to its state."""

from memzoo.diagnostics import figures as figures
from memzoo.diagnostics.capacity import TokensHeld as TokensHeld
from memzoo.diagnostics.capacity import tokens_held as tokens_held
from memzoo.diagnostics.forgetting import Forgetting as Forgetting
from memzoo.diagnostics.forgetting import forgetting as forgetting
from memzoo.diagnostics.horizon import Horizon as Horizon
from memzoo.diagnostics.horizon import (
  horizon_by_gradient as horizon_by_gradient,
)
from memzoo.diagnostics.horizon import (
  horizon_by_perturbation as horizon_by_perturbation,
)
from memzoo.diagnostics.interference import Interference as Interference
from memzoo.diagnostics.interference import interference as interference
from memzoo.diagnostics.interference import interference_of as interference_of
from memzoo.diagnostics.lyapunov import Lyapunov as Lyapunov
from memzoo.diagnostics.lyapunov import lyapunov as lyapunov
from memzoo.diagnostics.rollout import Trajectory as Trajectory
from memzoo.diagnostics.rollout import draw as draw
from memzoo.diagnostics.rollout import trajectory as trajectory
from memzoo.diagnostics.state_statistics import (
  StateStatistics as StateStatistics,
)
from memzoo.diagnostics.state_statistics import effective_rank as effective_rank
from memzoo.diagnostics.state_statistics import (
  participation_ratio as participation_ratio,
)
from memzoo.diagnostics.state_statistics import (
  state_statistics as state_statistics,
)
from memzoo.diagnostics.write_map import WriteMap as WriteMap
from memzoo.diagnostics.write_map import write_map as write_map
