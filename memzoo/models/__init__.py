"""Models: Flax NNX modules that have a cell's shape, with a batch."""

from memzoo.models.block import Block as Block
from memzoo.models.block import BlockOptions as BlockOptions
from memzoo.models.classifier import SequenceClassifier as SequenceClassifier
from memzoo.models.config import from_config as from_config
from memzoo.models.config import to_config as to_config
from memzoo.models.encoder import Encoder as Encoder
from memzoo.models.generate import generate as generate
from memzoo.models.layers import Buffer as Buffer
from memzoo.models.layers import MemoryLayer as MemoryLayer
from memzoo.models.lm import LanguageModel as LanguageModel
from memzoo.models.model import SequenceModel as SequenceModel
from memzoo.models.regressor import SequenceRegressor as SequenceRegressor
from memzoo.models.stack import Stack as Stack
