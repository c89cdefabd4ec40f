"""What the scripts here share: documents, tokenizers and llm.c's token shards (data/README.md)."""
import argparse
import array
import gzip
import itertools
import json
import os
import struct
import sys

FORMATS = {1: (20240520, "H"), 7: (20240801, "I")}  # version: magic, array type of its tokens
HEADER = 1024                                       # bytes: 256 int32, of which three are in use
ENDOFTEXT = "<|endoftext|>"


def fail(message):
    raise SystemExit(f"error: {message}")


def opened(path, mode="rb", **text):
    """A plain or gzipped file; gzip is known by its magic, not by its name."""
    try:
        with open(path, "rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
        return (gzip.open if zipped else open)(path, mode, **text)
    except OSError as error:
        fail(f"{path}: {error.strerror}")


# ---- documents -------------------------------------------------------------------------------

def documents(paths, field="text", split=None):
    """Every document of .jsonl and .parquet files (one a row, in `field`), and of text files,
    cut at `split` where it is given."""
    for path in paths:
        name = path.removesuffix(".gz")
        if name.endswith(".parquet"):
            texts = (row[field] for row in parquet_rows(path, [field]))
        elif name.endswith((".jsonl", ".ndjson")):
            texts = (row[field] for row in json_rows(path, field))
        else:
            texts = text_file(path, split)
        yield from (text for text in texts if text)


def text_file(path, split):
    try:
        with opened(path, "rt", encoding="utf-8", newline="") as file:  # newline="": as it is
            text = file.read()
    except UnicodeDecodeError as error:
        fail(f"{path}: byte {error.start} is not UTF-8; convert the file first")
    return text.split(split) if split else [text]


def json_rows(path, field):
    with opened(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except ValueError:
                fail(f"{path}: line {number} is not JSON")
            if not isinstance(row, dict) or not isinstance(row.get(field), str):
                fail(f"{path}: line {number} has no text in {field!r}; choose another with --field")
            yield row


def parquet_rows(path, fields):
    try:
        from pyarrow import parquet
    except ImportError:
        fail("reading parquet takes pyarrow: pip install pyarrow")
    file = parquet.ParquetFile(path)
    for missing in set(fields) - set(file.schema_arrow.names):
        fail(f"{path}: has no column {missing!r}, only {', '.join(file.schema_arrow.names)}")
    for batch in file.iter_batches(columns=fields):
        yield from batch.to_pylist()


# ---- tokens ----------------------------------------------------------------------------------

def load_tokenizer(path):
    try:
        from tokenizers import Tokenizer
    except ImportError:
        fail("this takes the tokenizers package: pip install tokenizers")
    try:
        return Tokenizer.from_file(path)
    except Exception as error:  # the package raises nothing more specific
        fail(f"{path}: is not a tokenizer.json: {error}")


def encoded(texts, tokenizer, eot=ENDOFTEXT):
    """Token lists of the documents, the end-of-text token before each. A text that contains the
    letters of a special token does not become one."""
    first = tokenizer.token_to_id(eot)
    if first is None:
        fail(f"the tokenizer has no token {eot!r}; choose another with --eot")
    tokenizer.encode_special_tokens = True
    texts = iter(texts)
    while batch := list(itertools.islice(texts, 1024)):  # encoded on all cores
        for encoding in tokenizer.encode_batch(batch, add_special_tokens=False):
            yield [first] + encoding.ids


class Writer:
    """Writes NAME_000000.bin, NAME_000001.bin, … of at most `size` tokens each; a document that
    does not fit goes on in the next one. A file has its name only when it is complete."""

    def __init__(self, name, version, size):
        self.name, self.version, self.size = name, version, size
        self.magic, self.type = FORMATS[version]
        self.file, self.held, self.total, self.paths = None, 0, 0, []
        os.makedirs(os.path.dirname(name) or ".", exist_ok=True)

    def add(self, tokens):
        while tokens:
            if self.file is None:
                self.paths.append(f"{self.name}_{len(self.paths):06d}.bin")
                self.file, self.held = open(self.paths[-1] + ".tmp", "wb"), 0
                self.file.write(bytes(HEADER))
            part, tokens = tokens[:self.size - self.held], tokens[self.size - self.held:]
            self.file.write(packed(part, self.type))
            self.held += len(part)
            self.total += len(part)
            if self.held == self.size:
                self.close()

    def close(self):
        if self.file is None:
            return
        self.file.seek(0)
        self.file.write(struct.pack("<3i", self.magic, self.version, self.held))
        self.file.close()
        self.file = None
        os.replace(self.paths[-1] + ".tmp", self.paths[-1])


def packed(tokens, kind):
    values = array.array(kind, tokens)
    if sys.byteorder == "big":
        values.byteswap()
    return values.tobytes()


def unpacked(data, kind):
    values = array.array(kind, data)
    if sys.byteorder == "big":
        values.byteswap()
    return values


def read(path):
    """(version, tokens) of a shard; ends with an error when its size is not the header's."""
    with opened(path) as file:
        data = file.read()
    magic, version, count = struct.unpack("<3i", data[:12]) if len(data) >= HEADER else (0, 0, 0)
    if FORMATS.get(version, (None,))[0] != magic:
        fail(f"{path}: is not a shard of llm.c (a headerless one of nanoGPT has to be rewritten)")
    kind = FORMATS[version][1]
    expected = HEADER + count * array.array(kind).itemsize
    if len(data) != expected:
        fail(f"{path}: has {len(data)} bytes, but {count} tokens take {expected}; make it again")
    return version, unpacked(data[HEADER:], kind)


# ---- command lines ---------------------------------------------------------------------------

def parser(doc):
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter)


def add_arguments(parser, size, out):
    """The arguments that write_shards() reads."""
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("--tokenizer", required=True, metavar="JSON", help="a tokenizer.json")
    parser.add_argument("--out", default=out, metavar="NAME",
                        help="makes NAME_train_000000.bin, NAME_val_000000.bin, … (%(default)s)")
    parser.add_argument("--field", default="text", help="where rows have their text (%(default)s)")
    parser.add_argument("--eot", default=ENDOFTEXT, metavar="TOKEN",
                        help="goes before each document (%(default)s)")
    parser.add_argument("--shard-tokens", type=int, default=size, metavar="N",
                        help="tokens of a shard (%(default)s)")
    parser.add_argument("--version", type=int, choices=sorted(FORMATS),
                        help="1: uint16, 7: uint32 (1 if the vocabulary fits)")


def write_shards(args, texts, goes_to_val):
    """Writes both splits; goes_to_val(document number, validation tokens so far) chooses."""
    tokenizer = load_tokenizer(args.tokenizer)
    rows = tokenizer.get_vocab_size()
    version = args.version or (1 if rows <= 1 << 16 else 7)
    if version == 1 and rows > 1 << 16:
        fail(f"a vocabulary of {rows} does not fit uint16; leave --version out")
    if not 1 <= args.shard_tokens < 1 << 31:
        fail("--shard-tokens: a shard has 1 to 2147483647 tokens")
    train = Writer(args.out + "_train", version, args.shard_tokens)
    val = Writer(args.out + "_val", version, args.shard_tokens)
    for number, tokens in enumerate(encoded(texts, tokenizer, args.eot)):
        (val if goes_to_val(number, val.total) else train).add(tokens)
    for name, split in (("train", train), ("val", val)):
        split.close()
        print(f"{name}: {split.total} tokens in {len(split.paths)} shards {split.name}_*.bin")
    return train, val
