"""What the checks share: counting, comparing, running the programs, random models and tokens.

The tolerance of a tensor is not a guess. The reference itself, run in float32, shows what rounding
does to it; another order of sums has another error of that size. So a float program may differ
SLACK times as much, and a double program 2^-29 of that, the ratio of the epsilons.
"""
import math
import os
import subprocess

import torch
from safetensors.torch import load_file

torch.set_num_threads(1)                # the tensors are tiny

SLACK = 8
EOT = 5                                 # end of text in the small vocabularies used here

# What tensors are called in a file of --dump; parameters have Hugging Face's names.
LOGITS, LOSS, GRADIENT = "logits", "loss", "grad."

passed = failed = 0


def check(name, ok, detail=""):
    global passed, failed
    passed, failed = passed + bool(ok), failed + (not ok)
    print(f"{'ok  ' if ok else 'FAIL'}  {name}{': ' if detail else ''}{detail}", flush=True)


def error(got, want):
    """Relative, in the Euclidean norm; infinite when anything is missing or not a number."""
    if got is None or got.numel() != want.numel():
        return math.inf
    got, want = got.double().flatten(), want.double().flatten()
    e = ((got - want).norm()/want.norm().clamp_min(1e-300)).item()
    return e if e == e else math.inf


def tolerances(rounded, exact, double=False):
    """name -> tolerance, from a run of the reference in float32 and one in float64. A small tensor
    may have been lucky: none counts as better than the median."""
    errors = {name: error(rounded[name], exact[name]) for name in exact}
    median = sorted(errors.values())[len(errors)//2]
    unit = SLACK*(2**-29 if double else 1)
    return {name: unit*max(e, median, 2**-24) for name, e in errors.items()}


def check_tensors(name, got, want, tolerance):
    """Every tensor of want is in got, and close; prints the worst, measured by its tolerance."""
    worst = max(want, key=lambda k: error(got.get(k), want[k])/tolerance[k])
    e = error(got.get(worst), want[worst])
    detail = f"{len(want)} tensors, worst {worst} {e:.1e} (tolerance {tolerance[worst]:.1e})"
    check(name, e <= tolerance[worst], detail if worst in got else f"{worst} is missing")


class Program:
    def __init__(self, path):
        self.path, self.name = os.path.abspath(path), os.path.basename(path)
        self.double = "double" in self.name

    def run(self, *flags):
        command = [self.path, "--threads", "2", *map(str, flags)]
        env = os.environ | {"OMP_WAIT_POLICY": "passive"}    # the machine may be busy: do not spin
        return subprocess.run(command, capture_output=True, timeout=120, env=env)

    def works(self, name, *flags):
        """The result of a run, or None and a failed check."""
        result = self.run(*flags)
        if result.returncode == 0:
            return result
        lines = result.stderr.decode(errors="replace").strip().splitlines() or ["(no message)"]
        check(name, False, f"{self.name} ended with {result.returncode}: {lines[-1]}")

    def dump(self, name, directory, *flags):
        """The tensors of one forward and backward pass, or None and a failed check."""
        path = f"{directory}/dump-{self.name}.safetensors"
        if self.works(name, *flags, "--dump", path, "--out", f"{directory}/out-{self.name}"):
            return load_file(path)


def random_weights(c, seed):
    """Nothing is zero, one, or equal in two heads, so that no mistake hides."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in c.shapes().items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith(("norm.weight", "norm2.weight", "norm_f.weight", "mixer.D")):
            weights[name] = 1 + 0.2*noise
        elif name.endswith("A_log"):    # decays from slow to fast
            weights[name] = torch.linspace(-1, 2, shape[0]) + 0.1*noise
        elif name.endswith("dt_bias"):
            weights[name] = noise - 2
        elif name.endswith(("conv1d.weight", "conv1d.bias")):
            weights[name] = 0.4*noise
        else:                           # a matrix: outputs about as large as inputs
            weights[name] = noise/math.sqrt(shape[-1])
    return weights


def random_tokens(c, count, seed, documents=False):
    """With documents: of 1, 2, 3, .. tokens, and two end-of-text tokens in a row in the middle."""
    tokens = torch.randint(EOT + 1, c.V, (count,), generator=torch.Generator().manual_seed(seed))
    if documents:
        starts = torch.arange(count).cumsum(0)
        tokens[starts[starts < count]] = EOT
        tokens[count//2:count//2 + 2] = EOT
    return tokens
