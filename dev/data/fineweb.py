#!/usr/bin/env python3
r"""FineWeb, or another large text dataset that you have downloaded, to llm.c token shards.

    hf download HuggingFaceFW/fineweb-edu --repo-type dataset --include 'sample/10BT/*' \
        --local-dir data/fineweb-edu
    python3 dev/data/fineweb.py data/fineweb-edu/sample/10BT/*.parquet --tokenizer tokenizer.json
    ./train_mamba2cu --model mamba2-130m --tokenizer tokenizer.json --packed \
        --data 'data/fineweb/*_train_*.bin' --val-data 'data/fineweb/*_val_*.bin'

The first documents are for validation. Files are .parquet or .jsonl, one document a row.

Shards that others have made for llm.c need no conversion:

    hf download kjj0/fineweb10B-gpt2 fineweb_val_000000.bin fineweb_train_000001.bin \
        --repo-type dataset --local-dir data/fineweb10B
    ./train_mamba2cu --model mamba2-130m --vocab-size 50257 \
        --data 'data/fineweb10B/*_train_*.bin' --val-data 'data/fineweb10B/*_val_*.bin'
"""
import shards


def main():
    parser = shards.parser(__doc__)
    shards.add_arguments(parser, size=100_000_000, out="data/fineweb/fineweb")
    parser.add_argument("--val-tokens", type=int, default=10_000_000, metavar="N",
                        help="tokens for validation, about (%(default)s)")
    args = parser.parse_args()
    if args.val_tokens < 0:
        parser.error("--val-tokens is at least 0")
    for path in args.files:
        if not path.removesuffix(".gz").endswith((".parquet", ".jsonl", ".ndjson")):
            shards.fail(f"{path}: expected .parquet or .jsonl; text files: text2shards.py")
    train, _ = shards.write_shards(args, shards.documents(args.files, args.field),
                                   lambda _, val_tokens: val_tokens < args.val_tokens)
    if train.total == 0:
        shards.fail("everything went to validation: give a smaller --val-tokens")


if __name__ == "__main__":
    main()
