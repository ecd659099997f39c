"""`python -m benchmarks.peers.probe NAME THREADS`: run one peer on a small layer and exit with 0 when its results are right."""

from __future__ import annotations

import sys

import torch

from .. import peers
from ..check import check

N, K = 256, 512  # the least that every peer's packing takes
ROWS = (1, 17)  # the two code paths that libraries usually have: GEMV and GEMM


def probe(name: str, threads: int) -> str:
    """Return "" when the peer computes the right thing, else what is wrong with it."""
    peer = next(p for p in peers.ALL if p.name == name)
    torch.manual_seed(0)
    weight = torch.randn(N, K) * K**-0.5
    try:
        prepared = peer.prepare(weight, threads)
        layer = prepared.make()
        for m in ROWS:
            x = torch.randn(m, K).to(peer.dtype)
            check(prepared, peer.arithmetic, x, layer(x))
    except Exception as error:  # whatever a foreign library throws is the answer
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    return ""


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    with torch.inference_mode():
        verdict = probe(sys.argv[1], int(sys.argv[2]))
    print(verdict, flush=True)
    sys.exit(1 if verdict else 0)
