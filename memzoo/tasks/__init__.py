"""Tasks: data as pure functions of (seed, step).

A task is added by one file here and one line below.
"""

from memzoo.tasks.adding import Adding as Adding
from memzoo.tasks.aeon import Aeon as Aeon
from memzoo.tasks.associative_retrieval import (
  AssociativeRetrieval as AssociativeRetrieval,
)
from memzoo.tasks.babi import Babi as Babi
from memzoo.tasks.babilong import BabiLong as BabiLong
from memzoo.tasks.bernoulli import Bernoulli as Bernoulli
from memzoo.tasks.chomsky import Chomsky as Chomsky
from memzoo.tasks.chomsky_binary import BinaryAddition as BinaryAddition
from memzoo.tasks.chomsky_binary import (
  BinaryMultiplication as BinaryMultiplication,
)
from memzoo.tasks.chomsky_binary import ComputeSqrt as ComputeSqrt
from memzoo.tasks.chomsky_brackets import (
  ModularArithmeticBrackets as ModularArithmeticBrackets,
)
from memzoo.tasks.chomsky_brackets import SolveEquation as SolveEquation
from memzoo.tasks.chomsky_context_free import ReverseString as ReverseString
from memzoo.tasks.chomsky_context_free import (
  StackManipulation as StackManipulation,
)
from memzoo.tasks.chomsky_context_sensitive import BucketSort as BucketSort
from memzoo.tasks.chomsky_context_sensitive import (
  DuplicateString as DuplicateString,
)
from memzoo.tasks.chomsky_context_sensitive import (
  MissingDuplicateString as MissingDuplicateString,
)
from memzoo.tasks.chomsky_context_sensitive import OddsFirst as OddsFirst
from memzoo.tasks.chomsky_regular import CycleNavigation as CycleNavigation
from memzoo.tasks.chomsky_regular import EvenPairs as EvenPairs
from memzoo.tasks.chomsky_regular import ModularArithmetic as ModularArithmetic
from memzoo.tasks.chomsky_regular import ParityCheck as ParityCheck
from memzoo.tasks.compositional_mqar import (
  CompositionalMqar as CompositionalMqar,
)
from memzoo.tasks.continual import Continual as Continual
from memzoo.tasks.continual import average_accuracy as average_accuracy
from memzoo.tasks.continual import backward_transfer as backward_transfer
from memzoo.tasks.continual import forward_transfer as forward_transfer
from memzoo.tasks.delay import Delay as Delay
from memzoo.tasks.digits import Digits as Digits
from memzoo.tasks.dyck import Dyck as Dyck
from memzoo.tasks.english import english as english
from memzoo.tasks.examples import Examples as Examples
from memzoo.tasks.forgetting_mqar import ForgettingMqar as ForgettingMqar
from memzoo.tasks.general_icl import GeneralIcl as GeneralIcl
from memzoo.tasks.generator import Generator as Generator
from memzoo.tasks.induction import Induction as Induction
from memzoo.tasks.induction import InductionStream as InductionStream
from memzoo.tasks.listops import ListOps as ListOps
from memzoo.tasks.mackey_glass import MackeyGlass as MackeyGlass
from memzoo.tasks.mad_compression import MadCompression as MadCompression
from memzoo.tasks.mad_fuzzy_recall import MadFuzzyRecall as MadFuzzyRecall
from memzoo.tasks.mad_memorization import MadMemorization as MadMemorization
from memzoo.tasks.mad_recall import MadRecall as MadRecall
from memzoo.tasks.mad_selective_copying import (
  MadSelectiveCopying as MadSelectiveCopying,
)
from memzoo.tasks.mixture import Mixture as Mixture
from memzoo.tasks.mnist1d import Mnist1d as Mnist1d
from memzoo.tasks.modular_sum import ModularSum as ModularSum
from memzoo.tasks.mqar import Mqar as Mqar
from memzoo.tasks.needles import Needles as Needles
from memzoo.tasks.ntm import NtmAssociativeRecall as NtmAssociativeRecall
from memzoo.tasks.ntm import NtmCopy as NtmCopy
from memzoo.tasks.ntm import NtmPrioritySort as NtmPrioritySort
from memzoo.tasks.ntm import NtmRepeatCopy as NtmRepeatCopy
from memzoo.tasks.popgym import PopgymAutoencode as PopgymAutoencode
from memzoo.tasks.popgym import PopgymConcentration as PopgymConcentration
from memzoo.tasks.popgym import PopgymCountRecall as PopgymCountRecall
from memzoo.tasks.popgym import PopgymRepeatFirst as PopgymRepeatFirst
from memzoo.tasks.popgym import PopgymRepeatPrevious as PopgymRepeatPrevious
from memzoo.tasks.selective_copying import SelectiveCopying as SelectiveCopying
from memzoo.tasks.state_capacity import MemoryCopy as MemoryCopy
from memzoo.tasks.task import SPLITS as SPLITS
from memzoo.tasks.task import Batch as Batch
from memzoo.tasks.task import Task as Task
from memzoo.tasks.task import make as make
from memzoo.tasks.task import names as names
from memzoo.tasks.task import register as register
from memzoo.tasks.text import Text as Text
from memzoo.tasks.text_rows import TextRows as TextRows
from memzoo.tasks.tfds import TfdsClassification as TfdsClassification
from memzoo.tasks.tfds import TfdsText as TfdsText
from memzoo.tasks.variable_tracking import VariableTracking as VariableTracking
from memzoo.tasks.word_counting import CommonWords as CommonWords
from memzoo.tasks.word_counting import FrequentWords as FrequentWords
from memzoo.tasks.word_problem import WordProblem as WordProblem
