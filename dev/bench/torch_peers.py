"""Whole training steps of the same model, in the same minutes: ours beside PyTorch on the CPU.

    python dev/bench/torch_peers.py --ours ./train_mamba2 --shape small
    python dev/bench/torch_peers.py --ours ./train_mamba2 --shape 130m

The peers, all in float32 with fused AdamW and clipping:
    eager     chunked SSD as einsums, as PyTorch code for Mamba-2 usually has it
    compile   the same under torch.compile (some minutes of compiling at 130m)
    hf        Hugging Face's Mamba2ForCausalLM, its torch path

Everybody's steps are interleaved, round by round; the table has medians of tokens per second.
Before that, the einsum form is checked against Hugging Face's logits.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
import transformers

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "reference"))
import mamba2
from train import write_shard

SHAPES = {                              # sizes of the model, rows and tokens of a batch
    "130m": (mamba2.Config(M=768, L=24, N=128, P=64, V=50288), 4, 256),
    "small": (mamba2.Config(M=256, L=6, N=128, P=64, V=272), 8, 256),
    "tiny": (mamba2.Config(M=64, L=2, N=16, P=16, V=272), 2, 128),
}


# ---- The einsum form -----------------------------------------------------------------------------

def segment_sums(a):
    """a (..,Q) -> (..,Q,Q): [l,s] is the sum of a over s < i <= l, and -inf where s > l."""
    Q = a.shape[-1]
    lower = torch.ones(Q, Q, dtype=torch.bool, device=a.device).tril
    sums = a[..., None].expand(*a.shape, Q).masked_fill(~lower(-1), 0).cumsum(-2)
    return sums.masked_fill(~lower(), -torch.inf)


def ssd(x, a, B, C, Q):
    """x (R,T,H,P) times dt, a (R,T,H) = dt A, B and C (R,T,1,N), T a multiple of Q -> y (R,T,H,P).
    Indices: b row, c chunk, l and s tokens of a chunk, h head, p channel, n state."""
    x, a, B, C = (t.unflatten(1, (-1, Q)) for t in (x, a, B, C))
    a = a.permute(0, 3, 1, 2)                                          # (b,h,c,l)
    sums = a.cumsum(-1)
    within = torch.einsum("bclhn,bcshn,bhcls,bcshp->bclhp", C, B, segment_sums(a).exp(), x)
    to_end = (sums[..., -1:] - sums).exp()
    states = torch.einsum("bclhn,bhcl,bclhp->bchpn", B, to_end, x)
    states = torch.cat([torch.zeros_like(states[:, :1]), states], 1)
    between = segment_sums(F.pad(sums[..., -1], (1, 0))).exp()         # from chunk to chunk
    states = torch.einsum("bhzc,bchpn->bzhpn", between, states)[:, :-1]
    across = torch.einsum("bclhn,bchpn,bhcl->bclhp", C, states, sums.exp())
    return (within + across).flatten(1, 2)


class RMSNorm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.weight, 1e-5)


class Mixer(nn.Module):
    def __init__(self, c, chunk):
        super().__init__()
        self.c, self.chunk = c, chunk
        self.in_proj = nn.Linear(c.M, c.E + c.S + c.H, bias=False)
        self.conv1d = nn.Conv1d(c.S, c.S, c.W, groups=c.S, padding=c.W - 1)
        self.dt_bias = nn.Parameter(torch.zeros(c.H))
        self.A_log = nn.Parameter(torch.zeros(c.H))
        self.D = nn.Parameter(torch.ones(c.H))
        self.norm = RMSNorm(c.E)
        self.out_proj = nn.Linear(c.E, c.M, bias=False)

    def forward(self, u):
        c, T = self.c, u.shape[1]
        z, xBC, dt = self.in_proj(u).split([c.E, c.S, c.H], -1)
        xBC = F.silu(self.conv1d(xBC.transpose(1, 2))[..., :T].transpose(1, 2))
        x, B, C = xBC.split([c.E, c.N, c.N], -1)
        x = x.unflatten(-1, (c.H, c.P))
        dt = F.softplus(dt + self.dt_bias)
        y = ssd(x*dt[..., None], -dt*self.A_log.exp(), B[:, :, None], C[:, :, None], self.chunk)
        y = (y + self.D[:, None]*x).flatten(2)
        return self.out_proj(self.norm(y*F.silu(z)))


class Block(nn.Module):
    def __init__(self, c, chunk):
        super().__init__()
        self.norm, self.mixer = RMSNorm(c.M), Mixer(c, chunk)

    def forward(self, x):
        return x + self.mixer(self.norm(x))


class Backbone(nn.Module):
    def __init__(self, c, chunk):
        super().__init__()
        self.embeddings = nn.Embedding(c.V, c.M)
        self.layers = nn.Sequential(*(Block(c, chunk) for _ in range(c.L)))
        self.norm_f = RMSNorm(c.M)

    def forward(self, ids):
        return self.norm_f(self.layers(self.embeddings(ids)))


class Einsum(nn.Module):                # parameters have Hugging Face's names
    def __init__(self, c, chunk):
        super().__init__()
        self.backbone = Backbone(c, chunk)

    def forward(self, ids):
        return self.backbone(ids) @ self.backbone.embeddings.weight.T


# ---- Peers: step() trains on one batch and returns the loss --------------------------------------

def hf_model(c, chunk):
    config = {k: v for k, v in mamba2.to_json(c).items() if k != "torch_dtype"}
    config = transformers.Mamba2Config(**config | {"chunk_size": chunk})
    return transformers.Mamba2ForCausalLM(config)


def check_einsum(c, chunk, ids):
    torch.manual_seed(0)
    one, two = hf_model(c, chunk), Einsum(c, chunk)
    two.load_state_dict(one.state_dict(), strict=False)
    with torch.no_grad():
        want, got = one(ids, use_cache=False).logits, two(ids)
    error = ((got - want).norm()/want.norm()).item()
    assert error < 1e-5, f"the einsum form differs from Hugging Face's by {error:.1e}"


def trainer(model, logits, ids, targets):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1,
                                  fused=True)

    def step():
        loss = F.cross_entropy(logits(ids).flatten(0, 1), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()
    return step


def make_peer(name, c, chunk, ids, targets):
    torch.manual_seed(0)
    if name == "hf":
        model = hf_model(c, chunk).train()
        return trainer(model, lambda ids: model(ids, use_cache=False).logits, ids, targets)
    model = Einsum(c, chunk)
    return trainer(model, torch.compile(model) if name == "compile" else model, ids, targets)


def run_ours(path, c, R, T, steps, threads, flags):
    """Tokens per second of every step but the first, from our program's log."""
    with tempfile.TemporaryDirectory() as tmp:
        write_shard(f"{tmp}/tokens.bin", torch.randint(0, min(c.V, 65536), (4*R*T + 1,)))
        command = ["--data", f"{tmp}/tokens.bin", "--d-model", c.M, "--n-layer", c.L,
                   "--d-state", c.N, "--headdim", c.P, "--vocab-size", c.V, "--batch", R,
                   "--seq-len", T, "--steps", steps + 1, "--lr", 1e-4, "--eval-every", 0,
                   "--save-every", 0, "--sample-every", 0, "--plot", 0, "--threads", threads,
                   "--out", f"{tmp}/out", *flags]
        subprocess.run([os.path.abspath(path), *map(str, command)], check=True,
                       stdout=subprocess.DEVNULL)
        with open(f"{tmp}/out/log.jsonl") as f:
            lines = [json.loads(line) for line in f]
    return [line["tokens_per_s"] for line in lines if "loss" in line][1:]


def main():
    parser = argparse.ArgumentParser(description="Our training step beside PyTorch's on the CPU.")
    parser.add_argument("--ours", metavar="PROGRAM", help="train_mamba2; left out: only the peers")
    parser.add_argument("--flags", default="", help="more flags for our program")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--peers", default="eager,compile,hf", help="some of eager,compile,hf")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="steps of each in a round")
    parser.add_argument("--chunk", type=int, default=64, help="of the peers")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    c, R, T = SHAPES[args.shape]
    tokens = torch.randint(0, c.V, (R, T + 1))
    ids, targets = tokens[:, :-1], tokens[:, 1:]
    check_einsum(SHAPES["tiny"][0], 32, torch.randint(0, 272, (2, 128)))

    flags = args.flags.split()
    peers, speeds = {}, {}
    if args.ours:                       # a first run, to fail early and to warm up
        speeds["ours"] = []
        run_ours(args.ours, c, R, T, 1, args.threads, flags)
    for name in filter(None, args.peers.split(",")):
        peers[name], speeds[name] = make_peer(name, c, args.chunk, ids, targets), []
        start = time.time()
        peers[name]()                   # the first step compiles, allocates, warms up
        print(f"{name}: first step {time.time() - start:.1f} s", flush=True)
    for number in range(args.rounds):
        if args.ours:
            speeds["ours"] += run_ours(args.ours, c, R, T, args.steps, args.threads, flags)
        for name, step in peers.items():
            for _ in range(1 if name == "hf" else args.steps):
                start = time.perf_counter()
                step()
                speeds[name].append(R*T/(time.perf_counter() - start))
        latest = "  ".join(f"{name} {values[-1]:.1f}" for name, values in speeds.items())
        print(f"round {number + 1}, tokens/s: {latest}", flush=True)

    print(f"\n{args.shape}: d_model {c.M}, {c.L} layers, {c.V} rows, B={R} T={T}, {args.threads} "
          f"threads, PyTorch {torch.__version__}, transformers {transformers.__version__}")
    print(f"python {' '.join(sys.argv)}")
    print(f"{'':10}{'tokens/s':>10}{'best':>10}{'steps':>8}{'ours is':>10}")
    ours = statistics.median(speeds["ours"]) if args.ours else None
    for name, values in speeds.items():
        median = statistics.median(values)
        ratio = f"{ours/median:9.2f}x" if ours else ""
        print(f"{name:10}{median:10.1f}{max(values):10.1f}{len(values):8}{ratio:>10}")


if __name__ == "__main__":
    main()
