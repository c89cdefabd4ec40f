"""What we write, Hugging Face reads, and the other way round: checkpoints, tokenizers, configs; and
the official initialization. Run by test_reference.py."""
import json
import math
import os

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer

import mamba2
import train
from checks import LOSS, SLACK, check, error, random_tokens, random_weights
from mamba2 import Config

TEXT = ("Who goes there? Speak the word, or stand and be known.\n"
        "A friend, my lord, with news of the ships at sea.\n") * 40

SHAPE = ["--d-model", 48, "--n-layer", 2, "--d-state", 16, "--headdim", 16]
SHORT = ["--batch", 4, "--seq-len", 64, "--lr", 0.01, "--warmup", 0, "--eval-every", 0,
         "--sample-every", 0, "--save-every", 100, "--seed", 7]


def write_text(tmp):
    with open(f"{tmp}/text.txt", "w") as f:
        f.write(TEXT)
    return f"{tmp}/text.txt"


def strict_json(path):                  # bare Infinity and NaN are not JSON
    def refuse(constant):
        raise ValueError(f"{path} holds {constant}")
    with open(path) as f:
        return json.load(f, parse_constant=refuse)


# ---- Checkpoints ---------------------------------------------------------------------------------

VARIANTS = [                            # name, more flags, steps
    ("default", [], 10), ("trained longer", [], 50),
    ("untied, dt limits", ["--tie", 0, "--dt-limit", "0.01,1"], 10),
    ("one dt limit, 2 groups", ["--dt-limit", "0.01,inf", "--ngroups", 2], 10),
]


def test_checkpoints(program, tmp):
    for i, (variant, flags, steps) in enumerate(VARIANTS):
        name, out = f"checkpoint, {variant}", f"{tmp}/checkpoint{i}"
        if program.works(name, *SHAPE, *SHORT, *flags, "--steps", steps, "--data", write_text(tmp),
                         "--out", out):
            check_checkpoint(program, name, f"{out}/last")
    check_resaved(program, tmp, f"{tmp}/checkpoint2/last")


def check_checkpoint(program, name, last):
    for file in ("config.json", "generation_config.json", "tokenizer_config.json"):
        strict_json(f"{last}/{file}")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        last, dtype=torch.float32, output_loading_info=True)
    wrong = {k: v for k, v in info.items() if v}
    check(f"{name}: from_pretrained loads it as it is", not wrong, str(wrong or ""))
    c, weights = mamba2.load(last)
    ids = torch.tensor([list(TEXT[20:90].encode())])
    with torch.no_grad():
        exact = mamba2.forward(c, weights, ids)[0]
        rounded = mamba2.forward(c, {n: w.float() for n, w in weights.items()}, ids)[0]
        e = error(model.eval()(ids).logits, exact)
    limit = SLACK*max(error(rounded, exact), 2**-24)
    check(f"{name}: Hugging Face's logits = reference", e <= limit, f"{e:.1e} ({limit:.1e})")
    check_greedy(program, name, last, model, c, weights)


def check_greedy(program, name, last, model, c, weights):
    prompt, count = TEXT[:30], 40
    result = program.works(name, "--init", last, "--generate", count, "--prompt", prompt,
                           "--temperature", 0)
    if not result:
        return
    got, ids = list(result.stdout), list(prompt.encode())
    want = mamba2.greedy(c, weights, ids, count, 257)
    check(f"{name}: --generate = reference", got == want, f"{bytes(got)!r}")
    if c.dt_limit == (0.0, math.inf):   # Hugging Face forgets the limits in its single step
        start = torch.tensor([ids])
        hf = model.generate(start, attention_mask=torch.ones_like(start), do_sample=False,
                            max_new_tokens=count, eos_token_id=256, pad_token_id=256)
        check(f"{name}: --generate = Hugging Face", got == hf[0, len(ids):].tolist())


def check_resaved(program, tmp, last):
    """Ours, loaded and saved by Hugging Face, is the same model to us, bit for bit."""
    again = f"{tmp}/resaved"
    transformers.AutoModelForCausalLM.from_pretrained(last).save_pretrained(again)
    flags = ["--data", f"{tmp}/text.txt", "--shuffle", 0, "--batch", 1, "--seq-len", 32]
    one = program.dump("resaved", again, "--init", last, *flags)
    two = program.dump("resaved", again, "--init", again, *flags)
    if one and two:
        check("saved by us = saved by us, then by Hugging Face",
              one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one))


def test_mlp_is_refused(program, tmp):
    out = f"{tmp}/mlp"
    if not program.works("MLP checkpoint", *SHAPE, *SHORT, "--d-intermediate", 40, "--steps", 2,
                         "--data", write_text(tmp), "--out", out):
        return
    config = strict_json(f"{out}/last/config.json")
    check("an MLP model has model_type mamba2_mlp",
          config["model_type"] == "mamba2_mlp" and config["d_intermediate"] == 40)
    c, weights = mamba2.load(f"{out}/last")
    check("the reference loads an MLP model", c.F == 40 and weights.keys() == c.shapes().keys())
    try:
        transformers.AutoModelForCausalLM.from_pretrained(f"{out}/last")
        check("transformers refuses an MLP model", False, "it loaded another model")
    except (ValueError, KeyError) as refusal:
        check("transformers refuses an MLP model", True, str(refusal)[:70] + "...")


# ---- Tokenizers ----------------------------------------------------------------------------------

SAMPLES = [TEXT[:50], "tabs\tand  spaces \n\n", "Äpfel, naïve, 日本語, 🙂", " <|endoftext", "I'll 123",
           "".join(map(chr, range(1, 128)))]


def test_bytes(program, tmp):
    """A checkpoint's tokenizer.json: a token is a byte, all text comes back."""
    out = f"{tmp}/bytes"
    if not program.works("bytes", *SHAPE, *SHORT, "--steps", 1, "--data", write_text(tmp), "--out",
                         out):
        return
    tokenizer = transformers.AutoTokenizer.from_pretrained(f"{out}/last")
    for text in SAMPLES:
        ids = tokenizer.encode(text)
        check(f"bytes: round trip of {text[:12]!r}",
              ids == list(text.encode()) and tokenizer.decode(ids) == text, f"{len(ids)} ids")
    check("bytes: end of text is 256", tokenizer.eos_token_id == 256
          and tokenizer.encode("a<|endoftext|>b") == [97, 256, 98])


def test_bpe(program, tmp):
    """A tokenizer of Hugging Face's: the same tokens, so the same loss; the same text again."""
    tokenizer, out = ByteLevelBPETokenizer(), f"{tmp}/bpe"
    tokenizer.train(write_text(tmp), vocab_size=300, special_tokens=["<|endoftext|>"],
                    show_progress=False)
    os.makedirs(out)
    tokenizer.save(f"{out}/tokenizer.json")
    flags = [*SHAPE, *SHORT, "--data", f"{tmp}/text.txt", "--tokenizer", f"{out}/tokenizer.json",
             "--shuffle", 0]
    if not program.works("BPE", *flags, "--steps", 40, "--out", f"{out}/run"):
        return
    last = f"{out}/run/last"
    c, weights = mamba2.load(last)
    dump = program.dump("BPE", out, *flags, "--init", last)
    if dump:
        ids = torch.tensor(tokenizer.encode(TEXT).ids[:4*64 + 1])
        logits, _ = mamba2.forward(c, weights, ids[:-1].view(4, 64))
        e = error(dump[LOSS], mamba2.loss(logits, ids[1:].view(4, 64)))
        check("BPE: a text's tokens are those of tokenizers", e < 1e-5, f"loss off by {e:.1e}")
    auto = transformers.AutoTokenizer.from_pretrained(last)
    check("BPE: AutoTokenizer reads the checkpoint's tokenizer",
          all(auto.encode(text) == tokenizer.encode(text).ids for text in SAMPLES))
    result = program.works("BPE", "--init", last, "--generate", 20, "--prompt", TEXT[:40],
                           "--temperature", 0)
    if result:
        ids = tokenizer.encode(TEXT[:40]).ids
        want = tokenizer.decode(mamba2.greedy(c, weights, ids, 20, tokenizer.get_vocab_size()))
        check("BPE: --generate = reference, decoded by tokenizers",
              result.stdout.decode(errors="replace") == want, f"{result.stdout!r}")


# ---- Traps of the format -------------------------------------------------------------------------

def test_formats(program, tmp):
    c, count = Config(M=32, V=80), 0
    weights, config = random_weights(c, 1), mamba2.to_json(c)
    train.write_shard(f"{tmp}/format.bin", random_tokens(c, 65, 3))

    def outcome(change={}, text=None, tensors=weights):
        """Exit status, loss and message of a pass over an edited directory."""
        nonlocal count
        count += 1
        directory = f"{tmp}/format{count}"
        path = f"{directory}/dump.safetensors"
        os.makedirs(directory)
        save_file(tensors, f"{directory}/model.safetensors", {"format": "pt"})
        with open(f"{directory}/config.json", "w") as f:
            f.write(text or json.dumps(config | change))
        result = program.run("--init", directory, "--data", f"{tmp}/format.bin", "--shuffle", 0,
                             "--batch", 2, "--seq-len", 32, "--out", f"{directory}/out",
                             "--dump", path)
        loss = load_file(path)[LOSS].item() if os.path.exists(path) else None
        return result.returncode, loss, result.stderr.decode(errors="replace").strip()

    def same(name, *args, **kwargs):
        status, loss, message = outcome(*args, **kwargs)
        check(f"format: {name}", status == 0 and loss == right, message or f"loss {loss}")

    def refused(name, word, *args, **kwargs):
        status, _, message = outcome(*args, **kwargs)
        check(f"format: {name} is refused", status == 1 and word in message, message)

    right = outcome()[1]
    open_end, head = json.dumps(config)[:-1], weights["backbone.embeddings.weight"].clone()
    without = lambda name: {k: w for k, w in weights.items() if k != name}
    same("time_step_limit with a bare Infinity",
         text=open_end + ', "time_step_limit": [0.0, Infinity]}')
    same('time_step_limit with {"__float__": "Infinity"}',
         {"time_step_limit": [0.0, {"__float__": "Infinity"}]})
    same("time_step_limit with an integer and the largest float",
         {"time_step_limit": [0, 3.4028234663852886e38]})
    same("unknown keys, nested and null", {"auto_map": {"a": [1, {"b": None}]}, "dtype": None})
    same("text with escapes", {"_name_or_path": "C:\\m\"\u00e9\n\U0001f642"})
    same("a tied head that is in the file too", tensors=weights | {"lm_head.weight": head})
    same("embedding for embeddings",
         tensors=without("backbone.embeddings.weight") | {"backbone.embedding.weight": head})
    same("whole numbers written as floats", {"hidden_size": 32.0, "expand": 2.0})
    same("float64 weights", tensors={k: w.double() for k, w in weights.items()})
    refused("an untied model without its head", "lm_head", {"tie_word_embeddings": False})
    refused("a missing tensor", "backbone.layers.1.mixer.out_proj.weight",
            tensors=without("backbone.layers.1.mixer.out_proj.weight"))
    refused("another hidden_act", "hidden_act", {"hidden_act": "gelu"})
    refused("a bias of linear layers", "use_bias", {"use_bias": True})
    refused("a tensor of another shape", "dt_bias",
            tensors=weights | {"backbone.layers.0.mixer.dt_bias": torch.zeros(5)})
    refused("an integer tensor", "A_log", tensors=weights |
            {"backbone.layers.0.mixer.A_log": torch.zeros(c.H, dtype=torch.int32)})
    refused("half a channel", "hidden_size", {"hidden_size": 32.5})
    refused("a config.json that is cut off", "config.json", text=open_end)


# ---- Initialization ------------------------------------------------------------------------------

def test_initialization(program, tmp):
    """The official one, by its moments: uniform within bounds, dt log-uniform, A uniform."""
    M, L, E, H, F_, W = 96, 4, 192, 48, 128, 3
    dump = program.dump("initialization", tmp, "--d-model", M, "--n-layer", L, "--d-state", 32,
                        "--headdim", E//H, "--d-intermediate", F_, "--tie", 0, "--d-conv", W,
                        "--data", write_text(tmp), "--batch", 1, "--seq-len", 8)
    if dump is None:
        return
    own = {k: w.double() for k, w in dump.items() if k.startswith(("backbone.", "lm_head."))}
    all_of = lambda end: torch.cat([w.flatten() for k, w in own.items() if k.endswith(end)])

    def uniform(name, w, low, high):    # within five standard errors
        deviation, spread = (high - low)/math.sqrt(12), 5/math.sqrt(w.numel())
        ok = (low - 1e-6 <= w.min() and w.max() <= high + 1e-6
              and abs(w.mean() - (low + high)/2) < spread*deviation
              and abs(w.std()/deviation - 1) < spread)
        check(f"initialization: {name} uniform in [{low:.4g}, {high:.4g}]", ok,
              f"[{w.min():.4g}, {w.max():.4g}], mean {w.mean():.3g}, deviation {w.std():.3g}")

    bounds = {"in_proj.weight": M**-0.5, "out_proj.weight": (E*L)**-0.5, "lm_head.weight": M**-0.5,
              "conv1d.weight": W**-0.5, "conv1d.bias": W**-0.5, "fc1.weight": M**-0.5,
              "fc2.weight": (F_*L)**-0.5}
    for end, bound in bounds.items():
        uniform(end, all_of(end), -bound, bound)
    uniform("A = exp(A_log)", all_of("A_log").exp(), 1, 16)
    uniform("log dt, dt = softplus(dt_bias),", F.softplus(all_of("dt_bias")).log(),
            math.log(0.001), math.log(0.1))
    check("initialization: norms and D are 1", all((all_of(end) == 1).all() for end in (
        "norm.weight", "norm2.weight", "norm_f.weight", "mixer.D")))
    w = all_of("embeddings.weight")
    check("initialization: embedding normal, deviation 0.02",
          abs(w.std()/0.02 - 1) < 5/math.sqrt(2*w.numel())
          and abs(w.mean()) < 5*0.02/math.sqrt(w.numel()), f"{w.mean():.1e}, {w.std():.5f}")


TESTS = [test_checkpoints, test_mlp_is_refused, test_bytes, test_bpe, test_formats,
         test_initialization]
