"""Every memory of the zoo: one paper mechanism a file."""

from memzoo.cells.rnn.gru import GRU as GRU
