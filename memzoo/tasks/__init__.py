"""Tasks: data as pure functions of (seed, step).

A task is added by one file here and one line below.
"""

from memzoo.tasks.examples import Examples as Examples
from memzoo.tasks.generator import Generator as Generator
from memzoo.tasks.induction import Induction as Induction
from memzoo.tasks.mixture import Mixture as Mixture
from memzoo.tasks.mnist1d import Mnist1d as Mnist1d
from memzoo.tasks.mqar import Mqar as Mqar
from memzoo.tasks.selective_copying import SelectiveCopying as SelectiveCopying
from memzoo.tasks.task import SPLITS as SPLITS
from memzoo.tasks.task import Batch as Batch
from memzoo.tasks.task import Task as Task
from memzoo.tasks.task import make as make
from memzoo.tasks.task import names as names
from memzoo.tasks.task import register as register
from memzoo.tasks.text import Text as Text
from memzoo.tasks.tfds import TfdsClassification as TfdsClassification
from memzoo.tasks.tfds import TfdsText as TfdsText
