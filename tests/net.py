"""A small model with all that replacing, saving and loading must keep: a shared layer, a tied weight, a buffer."""

import torch
from torch import nn

from qkernels import replace_linear


class Net(nn.Module):
    """Two blocks, a shared projection, an embedding tied to the head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 32)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(2))
        self.shared = nn.Linear(32, 32, bias=False)
        self.again = self.shared
        self.head = nn.Linear(32, 20, bias=False)
        self.head.weight = self.embed.weight
        self.lm_head = nn.Linear(32, 20)
        self.register_buffer("steps", torch.arange(3))

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(self.again(self.shared(x)))
        return self.head(x) + self.lm_head(x)


IDS = torch.arange(12).reshape(3, 4)


def quantized(format="int4_g32", **options):
    model = Net().eval()
    return model, replace_linear(model, format, progress=False, **options)


def fingerprint(model):
    return [(n, id(m)) for n, m in model.named_modules()], {k: t.clone() for k, t in model.state_dict().items()}


def unchanged(model, before):
    modules, state = before
    now = model.state_dict()
    return [(n, id(m)) for n, m in model.named_modules()] == modules and all(torch.equal(now[k], t) for k, t in state.items())
