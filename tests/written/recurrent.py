"""Recurrent networks, as people write them."""

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from .parts import param, tanh_net


class DeepLSTM(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 3, num_layers=2, bidirectional=True, batch_first=True), nn.Linear(6, 2)

    def forward(self, x):  # [n, 3, 3]
        h, (last, _) = self.lstm(x)
        return self.head(h[:, -1]) + last[-1, :, :2]


class LearnedStart(nn.Module):
    """A GRU with a first state of its own."""

    def __init__(self):
        super().__init__()
        self.start, self.gru, self.head = param(1, 1, 3), nn.GRU(3, 3), nn.Linear(3, 2)

    def forward(self, x):  # [n, 3, 3]
        _, last = self.gru(x.transpose(0, 1), self.start.expand(-1, len(x), -1).contiguous())
        return self.head(last.squeeze(0))


class Elman(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.RNN(3, 4, nonlinearity="relu", batch_first=True), nn.Linear(4, 2)

    def forward(self, x):  # [n, 3, 3]
        return self.head(torch.tanh(self.rnn(x)[0]).mean(1))


class PackedLSTM(nn.Module):
    """Samples of different lengths, longest first."""

    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x):  # [n, 4, 3]
        lengths = [max(1, x.shape[1] - i) for i in range(len(x))]
        h, (last, _) = self.lstm(pack_padded_sequence(x, lengths, batch_first=True))
        h, _ = pad_packed_sequence(h, batch_first=True)
        return self.head(torch.tanh(h).sum(1)) * last[0, :, :1]


class CellLoop(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.LSTMCell(3, 3), nn.Linear(3, 2)

    def forward(self, x):  # [n, 3, 3]
        h, c = x.new_zeros(len(x), 3), x.new_zeros(len(x), 3)
        for t in range(x.shape[1]):
            h, c = self.cell(x[:, t], (h, c))
        return self.head(h)


class KeptState(nn.Module):
    """The state is an attribute, and is there when the next call starts again."""

    def __init__(self):
        super().__init__()
        self.inp, self.w, self.head = nn.Linear(3, 3), param(3, 3), nn.Linear(3, 2)
        self.state = None

    def step(self, x):
        self.state = torch.tanh(self.inp(x) + self.state @ self.w)

    def forward(self, x):  # [n, 3, 3]
        self.state = x.new_zeros(len(x), 3)
        for t in range(x.shape[1]):
            self.step(x[:, t])
        return self.head(self.state)


class NeuralODE(nn.Module):
    """One field at every stage of a Runge-Kutta method, with a learned step."""

    def __init__(self):
        super().__init__()
        self.field, self.dt = tanh_net(3, 4, 3), nn.Parameter(torch.tensor(0.2))

    def forward(self, x):
        for _ in range(2):
            k1 = self.field(x)
            k2 = self.field(x + 0.5 * self.dt * k1)
            x = x + self.dt * k2
        return x


class StateSpace(nn.Module):
    """A diagonal state-space model: powers of one vector, by a loop over time."""

    def __init__(self):
        super().__init__()
        self.log_a, self.b, self.c, self.d = param(3), param(3), param(3, 2), param(2)

    def forward(self, u):  # [n, 5]
        a, state = torch.exp(-self.log_a.exp()), 0
        for t in range(u.shape[1]):
            state = a * state + u[:, t : t + 1] * self.b
        return state @ self.c + self.d * u[:, -1:]


MODELS = {
    "lstm_deep": (DeepLSTM, (3, 3)),
    "gru_learned_start": (LearnedStart, (3, 3)),
    "rnn": (Elman, (3, 3)),
    "lstm_packed": (PackedLSTM, (4, 3)),
    "lstm_cell": (CellLoop, (3, 3)),
    "kept_state": (KeptState, (3, 3)),
    "neural_ode": (NeuralODE, (3,)),
    "state_space": (StateSpace, (5,)),
}
