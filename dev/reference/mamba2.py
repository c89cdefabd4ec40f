"""Mamba-2 as a plain recurrence in PyTorch: the judge of train_mamba2, and the shortest way to see
what it computes.

Nothing here is fast. The state space model is one loop over time, exactly as it is defined; the
gradients come from autograd; the default type is float64. Weights are a dictionary with Hugging
Face's names, which are the names of model.safetensors.

Sizes, as in train_mamba2.c:
    R rows of a batch   T tokens of a row   M d_model   E d_inner   H heads   P headdim (E = H*P)
    N d_state   G groups   W d_conv   S = E + 2GN channels of the convolution   L layers
    F d_intermediate of the MLP   V rows of the vocabulary
"""
import json
import math
import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file


@dataclass
class Config:
    M: int = 64
    L: int = 2
    N: int = 16
    P: int = 16
    expand: int = 2
    G: int = 1
    W: int = 4
    V: int = 272
    F: int = 0                          # 0: layers without an MLP
    tie: bool = True                    # the head is the embedding
    dt_limit: tuple = (0.0, math.inf)
    eps: float = 1e-5

    @property
    def E(self): return self.expand*self.M

    @property
    def H(self): return self.E//self.P

    @property
    def S(self): return self.E + 2*self.G*self.N

    def shapes(self):                   # name -> shape, of every weight
        shapes = {"backbone.embeddings.weight": (self.V, self.M)}
        for i in range(self.L):
            layer = {"norm.weight": (self.M,),
                     "mixer.in_proj.weight": (self.E + self.S + self.H, self.M),
                     "mixer.conv1d.weight": (self.S, 1, self.W), "mixer.conv1d.bias": (self.S,),
                     "mixer.dt_bias": (self.H,), "mixer.A_log": (self.H,), "mixer.D": (self.H,),
                     "mixer.norm.weight": (self.E,), "mixer.out_proj.weight": (self.M, self.E)}
            if self.F:
                layer |= {"norm2.weight": (self.M,), "mlp.fc1.weight": (2*self.F, self.M),
                          "mlp.fc2.weight": (self.M, self.F)}
            shapes |= {f"backbone.layers.{i}.{name}": shape for name, shape in layer.items()}
        shapes["backbone.norm_f.weight"] = (self.M,)
        return shapes if self.tie else shapes | {"lm_head.weight": (self.V, self.M)}


# ---- The model ---------------------------------------------------------------------------------

def rmsnorm(x, w, eps, groups=1):
    g = x.unflatten(-1, (groups, -1))
    return (g*torch.rsqrt(g.square().mean(-1, keepdim=True) + eps)).flatten(-2)*w


def conv1d(xBC, w, b, past, doc):
    """v_t = silu(b + sum_k w_k xBC_{t-(W-1)+k}), over the tokens of t's own document only.
    past (R,W-1,S) is xBC before this row, the end of document 0. Returns v and the next past."""
    T, W = xBC.shape[1], w.shape[-1]
    long = torch.cat([past, xBC], 1)
    docs = F.pad(doc, (W - 1, 0))       # what came before the row is document 0
    v = b
    for k in range(W):
        same = (docs[:, k:k+T] == doc)[..., None]
        v = v + w[:, 0, k]*long[:, k:k+T]*same
    last = slice(T, T + W - 1)
    return F.silu(v), long[:, last]*(docs[:, last] == doc[:, -1:])[..., None]


def ssd(x, dt, A, B, C, D, state, doc):
    """S_t = exp(dt A) S_{t-1} + dt x_t B_t^T,  y_t = S_t C_t + D x_t, for every head. The state
    starts afresh with every document. x (R,T,H,P), dt (R,T,H), B, C (R,T,H,N), state (R,H,P,N)."""
    ys, before = [], torch.zeros_like(doc[:, 0])
    for t in range(x.shape[1]):
        decay = torch.exp(dt[:, t]*A)*(doc[:, t] == before)[:, None]
        inflow = (dt[:, t, :, None]*x[:, t])[..., None]*B[:, t, :, None, :]
        state = decay[..., None, None]*state + inflow
        ys.append((state*C[:, t, :, None, :]).sum(-1) + D[:, None]*x[:, t])
        before = doc[:, t]
    return torch.stack(ys, 1), state


def mixer(c, w, u, state, past, doc):
    z, xBC, dt = (u @ w("in_proj.weight").T).split([c.E, c.S, c.H], -1)
    xBC, past = conv1d(xBC, w("conv1d.weight"), w("conv1d.bias"), past, doc)
    x, B, C = xBC.split([c.E, c.G*c.N, c.G*c.N], -1)
    of_head = lambda bc: bc.unflatten(-1, (c.G, c.N)).repeat_interleave(c.H//c.G, 2)
    dt = F.softplus(dt + w("dt_bias")).clamp(*c.dt_limit)
    A = -torch.exp(w("A_log"))
    y, state = ssd(x.unflatten(-1, (c.H, c.P)), dt, A, of_head(B), of_head(C), w("D"), state, doc)
    o = rmsnorm(y.flatten(-2)*F.silu(z), w("norm.weight"), c.eps, c.G)
    return o @ w("out_proj.weight").T, state, past


def mlp(w, u):
    a, b = (u @ w("fc1.weight").T).chunk(2, -1)
    return (a*F.silu(b)) @ w("fc2.weight").T


def fresh(c, R, dtype):
    """The states before the first token, of all layers: (R,H,P,N) of SSD, (R,W-1,S) of conv1d."""
    zeros = lambda *shape: torch.zeros(shape, dtype=dtype)
    return [(zeros(R, c.H, c.P, c.N), zeros(R, c.W - 1, c.S)) for _ in range(c.L)]


def forward(c, weights, ids, states=None, eot=None):
    """ids (R,T) -> logits (R,T,V) and the states after the last token. With eot, documents are
    packed: every end-of-text token begins one."""
    doc = torch.zeros_like(ids) if eot is None else (ids == eot).cumsum(1)
    embedding = weights["backbone.embeddings.weight"]
    resid, after = embedding[ids], []
    states = states or fresh(c, len(ids), embedding.dtype)
    for i, (state, past) in enumerate(states):
        w = lambda name: weights[f"backbone.layers.{i}.{name}"]
        u = rmsnorm(resid, w("norm.weight"), c.eps)
        y, state, past = mixer(c, lambda name: w("mixer." + name), u, state, past, doc)
        resid = resid + y
        if c.F:
            u = rmsnorm(resid, w("norm2.weight"), c.eps)
            resid = resid + mlp(lambda name: w("mlp." + name), u)
        after.append((state, past))
    u = rmsnorm(resid, weights["backbone.norm_f.weight"], c.eps)
    return u @ weights.get("lm_head.weight", embedding).T, after


def loss(logits, targets):
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@torch.no_grad()
def greedy(c, weights, prompt, count, vocab):
    """The likeliest continuation among the first vocab ids, one step of the recurrence a token."""
    logits, states = forward(c, weights, torch.tensor([prompt]))
    tokens = []
    for _ in range(count):
        tokens.append(logits[0, -1, :vocab].argmax().item())
        logits, states = forward(c, weights, torch.tensor([tokens[-1:]]), states)
    return tokens


# ---- Directories, ours and Hugging Face's --------------------------------------------------------

def to_json(c):
    config = dict(
        architectures=["Mamba2ForCausalLM"], model_type="mamba2_mlp" if c.F else "mamba2",
        vocab_size=c.V, hidden_size=c.M, num_hidden_layers=c.L, state_size=c.N, expand=c.expand,
        head_dim=c.P, num_heads=c.H, n_groups=c.G, conv_kernel=c.W, chunk_size=64,
        hidden_act="silu", use_bias=False, use_conv_bias=True, rms_norm=True,
        residual_in_fp32=True, layer_norm_epsilon=c.eps, tie_word_embeddings=c.tie,
        bos_token_id=0, eos_token_id=0, pad_token_id=0, torch_dtype="float32")
    if c.dt_limit != (0.0, math.inf):
        config["time_step_limit"] = [min(limit, 3.4028234663852886e38) for limit in c.dt_limit]
    return config | ({"d_intermediate": c.F} if c.F else {})


def from_json(j):
    number = lambda v: float(v["__float__"]) if isinstance(v, dict) else float(v)
    lo, hi = map(number, j.get("time_step_limit", (0, math.inf)))
    return Config(M=j["hidden_size"], L=j["num_hidden_layers"], N=j["state_size"], P=j["head_dim"],
                  expand=j["expand"], G=j["n_groups"], W=j["conv_kernel"], V=j["vocab_size"],
                  F=j.get("d_intermediate", 0), tie=j["tie_word_embeddings"], dt_limit=(lo, hi),
                  eps=j["layer_norm_epsilon"])


def save(c, weights, directory):
    os.makedirs(directory, exist_ok=True)
    with open(f"{directory}/config.json", "w") as f:
        json.dump(to_json(c), f, indent=1)
    save_file(weights, f"{directory}/model.safetensors", {"format": "pt"})


def load(directory, dtype=torch.float64):
    with open(f"{directory}/config.json") as f:
        c = from_json(json.load(f))
    found = {}
    for name in sorted(os.listdir(directory)):
        if name.startswith("model") and name.endswith(".safetensors"):      # one file or its parts
            found |= load_file(f"{directory}/{name}")
    found = {name.replace("embedding.", "embeddings."): w.to(dtype) for name, w in found.items()}
    return c, {name: found[name] for name in c.shapes()}
