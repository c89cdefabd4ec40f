"""How train_mamba2 trains, in PyTorch: the order of the tokens, the schedule, AdamW, clipping,
accumulation over micro-batches, packed documents and carried states."""
import math

import numpy as np
import torch

import mamba2


def write_shard(path, tokens, version=1):
    """llm.c's format: 256 int32 of header, then uint16 (version 1) or uint32 (version 7)."""
    header = np.zeros(256, np.int32)
    header[:3] = {1: 20240520, 7: 20240801}[version], version, len(tokens)
    with open(path, "wb") as f:
        f.write(header.tobytes())
        f.write(np.asarray(tokens, {1: np.uint16, 7: np.uint32}[version]).tobytes())


def learning_rate(t, steps, lr, min_lr, warmup, schedule, decay_frac):
    """Of step t = 1 .. steps."""
    if t <= warmup:
        return lr*t/warmup
    done = (t - warmup)/(steps - warmup)
    if schedule == "linear":
        return min_lr + (lr - min_lr)*(1 - done)
    if schedule == "cosine":
        return min_lr + (lr - min_lr)/2*(1 + math.cos(math.pi*done))
    if schedule == "wsd":               # warmup, stable, decay
        start = max(warmup, steps - math.floor(decay_frac*steps + 0.5))
        return lr if t <= start else min_lr + (lr - min_lr)*(steps - t)/(steps - start)
    return lr


def in_file_order(shards, B, T, K):
    """Steps of K micro-batches (ids, targets), and whether states start afresh before the step."""
    def micro_batches():
        while True:
            for shard in shards:
                for i in range((len(shard) - 1)//(B*T)):
                    yield cut(shard, [(i*B + b)*T for b in range(B)], T)
    stream = micro_batches()
    while True:
        yield [next(stream) for _ in range(K)], True


def in_lanes(shards, B, T, K):
    """--carry: a shard is cut into B*K lanes, and every row reads on in its own lane."""
    while True:
        for shard in shards:
            lane = (len(shard) - 1)//(B*K)
            for s in range(lane//T):
                rows = [[(k*B + b)*lane + s*T for b in range(B)] for k in range(K)]
                yield [cut(shard, starts, T) for starts in rows], s == 0


def cut(shard, starts, T):
    rows = torch.stack([shard[start:start + T + 1] for start in starts])
    return rows[:, :-1], rows[:, 1:]


def decays(name):                       # the matrices, embedding and head included
    return name.endswith(("embeddings.weight", "lm_head.weight", "in_proj.weight",
                          "out_proj.weight", "fc1.weight", "fc2.weight"))


def train(c, weights, shards, steps, B, T, K=1, eot=None, carry=False, lr=1e-3, min_lr=None,
          warmup=0, schedule="cosine", decay_frac=0.2, weight_decay=0.1, clip=1.0):
    """Trains the weights in place; returns loss, gradient norm and learning rate of every step."""
    for w in weights.values():
        w.requires_grad_()
    groups = [{"params": [w for name, w in weights.items() if decays(name)]},
              {"params": [w for name, w in weights.items() if not decays(name)], "weight_decay": 0}]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, weight_decay=weight_decay)
    shards = [torch.as_tensor(np.asarray(shard, np.int64)) for shard in shards]
    batches = (in_lanes if carry else in_file_order)(shards, B, T, K)
    min_lr = lr/10 if min_lr is None else min_lr
    log, states = [], [None]*K
    for t in range(1, steps + 1):
        micro_batches, afresh = next(batches)
        total = 0
        for k, (ids, targets) in enumerate(micro_batches):
            before = None if afresh else states[k]
            logits, after = mamba2.forward(c, weights, ids, before, eot)
            states[k] = [(state.detach(), past.detach()) for state, past in after]
            loss = mamba2.loss(logits, targets)/K
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(weights.values(), clip if clip else math.inf).item()
        rate = learning_rate(t, steps, lr, min_lr, warmup, schedule, decay_frac)
        for group in adamw.param_groups:
            group["lr"] = rate
        adamw.step()
        adamw.zero_grad()
        log.append({"loss": total, "grad_norm": norm, "lr": rate})
    return log
