"""Tasks: data as pure functions of (seed, step).

A task is added by one file here and one line below.
"""

from memzoo.tasks.associative_retrieval import (
  AssociativeRetrieval as AssociativeRetrieval,
)
from memzoo.tasks.compositional_mqar import (
  CompositionalMqar as CompositionalMqar,
)
from memzoo.tasks.english import english as english
from memzoo.tasks.examples import Examples as Examples
from memzoo.tasks.forgetting_mqar import ForgettingMqar as ForgettingMqar
from memzoo.tasks.generator import Generator as Generator
from memzoo.tasks.induction import Induction as Induction
from memzoo.tasks.induction import InductionStream as InductionStream
from memzoo.tasks.mad_compression import MadCompression as MadCompression
from memzoo.tasks.mad_fuzzy_recall import MadFuzzyRecall as MadFuzzyRecall
from memzoo.tasks.mad_memorization import MadMemorization as MadMemorization
from memzoo.tasks.mad_recall import MadRecall as MadRecall
from memzoo.tasks.mad_selective_copying import (
  MadSelectiveCopying as MadSelectiveCopying,
)
from memzoo.tasks.mixture import Mixture as Mixture
from memzoo.tasks.mnist1d import Mnist1d as Mnist1d
from memzoo.tasks.mqar import Mqar as Mqar
from memzoo.tasks.ntm import NtmAssociativeRecall as NtmAssociativeRecall
from memzoo.tasks.ntm import NtmCopy as NtmCopy
from memzoo.tasks.ntm import NtmPrioritySort as NtmPrioritySort
from memzoo.tasks.ntm import NtmRepeatCopy as NtmRepeatCopy
from memzoo.tasks.selective_copying import SelectiveCopying as SelectiveCopying
from memzoo.tasks.state_capacity import MemoryCopy as MemoryCopy
from memzoo.tasks.task import SPLITS as SPLITS
from memzoo.tasks.task import Batch as Batch
from memzoo.tasks.task import Task as Task
from memzoo.tasks.task import make as make
from memzoo.tasks.task import names as names
from memzoo.tasks.task import register as register
from memzoo.tasks.text import Text as Text
from memzoo.tasks.tfds import TfdsClassification as TfdsClassification
from memzoo.tasks.tfds import TfdsText as TfdsText
