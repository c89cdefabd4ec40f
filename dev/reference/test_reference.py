"""Checks train_mamba2 against PyTorch and Hugging Face:

    python test_reference.py ./train_mamba2 ./train_mamba2_double

One line a check, then a count; exit status 1 when one failed. Three judges: the plain recurrence of
mamba2.py in float64, Hugging Face's Mamba2ForCausalLM in float32, and torch.optim.AdamW.
"""
import json
import math
import os
import sys
import tempfile
import time
from dataclasses import dataclass, field

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
import transformers

import checks
import mamba2
import test_huggingface
import train
from checks import (EOT, GRADIENT, LOGITS, LOSS, Program, check, check_tensors, error,
                    random_tokens, random_weights, tolerances)
from mamba2 import Config
from test_huggingface import TEXT

transformers.utils.logging.disable_progress_bar()


# ---- One forward and backward pass ---------------------------------------------------------------

@dataclass
class Case:
    name: str
    c: Config
    R: int = 2
    T: int = 37
    packed: bool = False
    flags: list = field(default_factory=lambda: ["--chunk-size", 16])
    store: torch.dtype = torch.float32  # type of the weights in the file
    shard: str = "1GB"                  # largest file


CASES = [
    Case("plain", Config(), T=48),
    Case("odd sizes, three layers", Config(M=40, P=8, N=12, L=3, V=100)),
    Case("odder: M 25, P 5, N 7, 1003 rows", Config(M=25, P=5, N=7, V=1003), T=33),
    Case("expand 3, untied, width 3", Config(M=24, expand=3, P=8, W=3, tie=False, V=80), T=19),
    Case("expand 1, width 2, 4 groups", Config(M=48, expand=1, P=12, G=4, W=2, V=80)),
    Case("2 groups of 4 heads", Config(M=32, P=8, G=2, N=12, V=80), T=50),
    Case("dt limits", Config(M=32, P=16, V=80, dt_limit=(0.1, 0.3))),
    Case("lower dt limit alone", Config(M=32, P=16, V=80, dt_limit=(0.2, math.inf))),
    Case("packed documents", Config(M=40, P=8, N=12, V=80), R=3, T=45, packed=True),
    Case("packed, groups, MLP, limits, untied",
         Config(M=32, P=8, G=2, F=24, tie=False, V=80, dt_limit=(0.01, 0.5)), T=40, packed=True),
    Case("MLP, width not a multiple of 8", Config(M=32, F=44, V=80)),
    Case("bfloat16 weights", Config(M=32, V=80), store=torch.bfloat16),
    Case("float16 weights in shards, untied", Config(M=40, P=8, tie=False, V=90),
         store=torch.float16, shard="20KB"),
    Case("rows shorter than the convolution", Config(M=32, V=80), R=5, T=2),
    Case("rows of one token", Config(M=32, V=80), R=5, T=1),
    Case("default chunk, long rows", Config(M=16, L=1, P=8, N=8, V=80), R=1, T=300, flags=[]),
    Case("full width: M 256, N 128, P 64", Config(M=256, N=128, P=64), T=100, flags=[]),
    Case("one chunk, chunk longer than rows", Config(M=32, V=80), flags=["--chunk-size", 64]),
    Case("recompute", Config(M=32, L=3, F=24, V=80), flags=["--recompute", "--chunk-size", 8]),
]


def hf_model(c, weights):
    """None when Hugging Face has no such model."""
    if c.F:
        return None
    config = {k: v for k, v in mamba2.to_json(c).items() if k != "torch_dtype"}
    model = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**config))
    result = model.load_state_dict(weights, strict=False)
    assert not result.unexpected_keys and set(result.missing_keys) <= {"lm_head.weight"}
    model.tie_weights()
    return model


def write_model(case, weights, directory):
    """As Hugging Face's save_pretrained writes it, where it can; returns the rounded weights."""
    stored = {name: w.to(case.store) for name, w in weights.items()}
    model = hf_model(case.c, weights)
    if model:
        model.to(case.store).save_pretrained(directory, max_shard_size=case.shard)
        many = os.path.exists(f"{directory}/model.safetensors.index.json")
        assert many == (case.shard != "1GB")
    else:
        mamba2.save(case.c, stored, directory)
    return {name: w.float() for name, w in stored.items()}


def pass_of_reference(c, weights, ids, targets, eot, dtype):
    weights = {name: w.to(dtype).requires_grad_() for name, w in weights.items()}
    logits, _ = mamba2.forward(c, weights, ids, eot=eot)
    loss = mamba2.loss(logits, targets)
    loss.backward()
    gradients = {GRADIENT + name: w.grad for name, w in weights.items()}
    return {LOSS: loss.detach(), LOGITS: logits.detach()} | gradients


def pass_of_hf(model, ids, targets, eot):
    if eot is None:
        logits = model(ids, use_cache=False).logits
    else:                               # it has no packed documents: one at a time
        rows = []
        for row in ids:
            starts = [0] + [t for t in range(1, len(row)) if row[t] == eot] + [len(row)]
            documents = [row[a:b] for a, b in zip(starts, starts[1:])]
            rows.append(torch.cat([model(d[None], use_cache=False).logits for d in documents], 1))
        logits = torch.cat(rows)
    loss = mamba2.loss(logits, targets)
    loss.backward()
    gradients = {GRADIENT + n: w.grad for n, w in model.named_parameters() if w.grad is not None}
    return {LOSS: loss.detach(), LOGITS: logits.detach()} | gradients


def test_passes(programs, tmp):
    for i, case in enumerate(CASES):
        c, directory = case.c, f"{tmp}/case{i}"
        weights = write_model(case, random_weights(c, i), directory)
        tokens = random_tokens(c, case.R*case.T + 1, i, case.packed)
        train.write_shard(f"{directory}/tokens.bin", tokens, version=1 + 6*(i % 2))
        (ids, targets), = next(train.in_file_order([tokens], case.R, case.T, 1))[0]
        eot = EOT if case.packed else None
        exact = pass_of_reference(c, weights, ids, targets, eot, torch.float64)
        rounded = pass_of_reference(c, weights, ids, targets, eot, torch.float32)
        limit = tolerances(rounded, exact)
        model = hf_model(c, weights)
        if model:
            hf = pass_of_hf(model, ids, targets, eot)
            check_tensors(f"{case.name}: Hugging Face = reference", hf, exact, limit)
        for program in programs:
            name = f"{case.name}: {program.name}"
            dump = program.dump(name, directory, "--init", directory, "--data",
                                f"{directory}/tokens.bin", "--shuffle", 0, "--batch", case.R,
                                "--seq-len", case.T, "--eot", EOT,
                                *(["--packed"] if case.packed else []), *case.flags)
            if dump is None:
                continue
            check_tensors(f"{name} = reference", dump, exact,
                          tolerances(rounded, exact, program.double))
            if model and not program.double:
                both = {name: 2*t for name, t in limit.items()}
                check_tensors(f"{name} = Hugging Face", dump, hf, both)
            check(f"{name}: the weights are those of the file",
                  all(error(dump.get(n), w) == 0 for n, w in weights.items()))


# ---- Ten steps of training -----------------------------------------------------------------------

@dataclass
class Training:
    name: str
    c: Config
    shards: list                        # tokens of each
    R: int = 3
    T: int = 16
    K: int = 1
    version: int = 1                    # of the shards; 0: one text file
    options: dict = field(default_factory=dict)     # of train.train, and flags of the same names


TRAININGS = [
    Training("cosine with warmup, clip, accumulation over shards", Config(M=32, V=80),
             [200, 40, 163], K=2, options=dict(lr=3e-3, warmup=3, schedule="cosine", clip=1.0)),
    Training("linear, no clip, untied, MLP", Config(M=32, F=24, tie=False, V=80), [600],
             version=7, options=dict(lr=2e-3, min_lr=5e-4, schedule="linear", clip=0.0)),
    Training("wsd, strong decay of weights", Config(M=40, P=8, N=12, G=2, V=80), [500],
             options=dict(lr=3e-3, min_lr=0.0, warmup=2, schedule="wsd", decay_frac=0.44,
                          weight_decay=0.5)),
    Training("constant, packed documents", Config(M=32, V=80), [700], T=23, K=2,
             options=dict(lr=1e-3, schedule="constant", packed=True)),
    Training("carried states, over a shard's end", Config(M=32, V=80), [404, 300], K=2,
             options=dict(lr=1e-3, schedule="constant", carry=True)),
    Training("carried states, packed documents", Config(M=32, V=80), [300], T=7,
             options=dict(lr=1e-3, schedule="constant", carry=True, packed=True)),
    Training("bytes of a text, its last tenth held back", Config(M=32), [], version=0,
             options=dict(lr=1e-3, warmup=5, schedule="linear")),
]


DEFAULTS = {"warmup": 0, "clip": 1, "weight_decay": 0.1}     # those of train.train


def write_data(case, directory):
    if case.version == 0:
        with open(f"{directory}/data.txt", "w") as f:
            f.write(TEXT[:533])         # of 533 bytes, floor(0.9*533) = 479 are for training
        return [torch.tensor(list(TEXT[:479].encode()))], f"{directory}/data.txt"
    packed = case.options.get("packed", False)
    shards = [random_tokens(case.c, n, i, packed) for i, n in enumerate(case.shards)]
    for i, shard in enumerate(shards):
        train.write_shard(f"{directory}/tokens_{i}.bin", shard, case.version)
    return shards, f"{directory}/tokens_*.bin"


def as_flags(options):
    flags = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        flags += ([flag] if value else []) if isinstance(value, bool) else [flag, value]
    return flags


def read_log(path):
    with open(path) as f:
        lines = [json.loads(line) for line in f]
    return [line for line in lines if "loss" in line]


def as_tensors(log, weights):           # what is compared: three curves and every final weight
    curves = {key: torch.tensor([line[key] for line in log], dtype=torch.float64)
              for key in ("loss", "grad_norm", "lr")}
    return curves | {name: w.detach() for name, w in weights.items()}


def test_training(programs, tmp):
    for i, case in enumerate(TRAININGS):
        c, directory = case.c, f"{tmp}/training{i}"
        mamba2.save(c, random_weights(c, 100 + i), directory)
        shards, pattern = write_data(case, directory)
        options = {k: v for k, v in case.options.items() if k != "packed"}
        eot = EOT if case.options.get("packed") else None
        results = []
        for dtype in (torch.float64, torch.float32):
            _, weights = mamba2.load(directory, dtype)
            log = train.train(c, weights, shards, 10, case.R, case.T, case.K, eot, **options)
            results.append(as_tensors(log, weights))
        exact, rounded = results
        for program in programs:
            name = f"training, {case.name}: {program.name} = torch's AdamW"
            out = f"{directory}/{program.name}"
            flags = DEFAULTS | case.options | {
                "init": directory, "data": pattern, "shuffle": 0, "eot": EOT, "batch": case.R,
                "seq_len": case.T, "accum": case.K, "steps": 10, "save_every": 10, "eval_every": 0,
                "sample_every": 0, "out": out}
            if program.works(name, *as_flags(flags)):
                got = as_tensors(read_log(f"{out}/log.jsonl"), mamba2.load(f"{out}/last")[1])
                check_tensors(name, got, exact, tolerances(rounded, exact, program.double))


def main():
    if len(sys.argv) != 3:
        sys.exit("usage: python test_reference.py ./train_mamba2 ./train_mamba2_double")
    programs, start = [Program(path) for path in sys.argv[1:]], time.time()
    with tempfile.TemporaryDirectory() as tmp:
        for test in (test_passes, test_training, *test_huggingface.TESTS):
            print(f"---- {test.__name__} (after {time.time() - start:.0f} s)", flush=True)
            try:
                test(programs if test.__module__ == __name__ else programs[0], tmp)
            except Exception as e:      # one broken file must not hide the other checks
                check(test.__name__, False, f"stopped by {type(e).__name__}: {e}")
    print(f"{checks.passed} passed, {checks.failed} failed")
    sys.exit(checks.failed > 0)


if __name__ == "__main__":
    main()
