#!/usr/bin/env python3
"""Text to llm.c token shards.

    python3 dev/data/text2shards.py data/tinyshakespeare.txt.gz --split '\\n\\n' \\
        --tokenizer data/bpe1024.json --out data/shakespeare/shakespeare
    ./train_mamba2 --tokenizer data/bpe1024.json \\
        --data 'data/shakespeare/*_train_*.bin' --val-data 'data/shakespeare/*_val_*.bin'

A text file is one document, or several with --split; a .jsonl or .parquet file has one a row.
Any of them may be gzipped. Each document gets the end-of-text token before it.
"""
import codecs

import shards


def main():
    parser = shards.parser(__doc__)
    shards.add_arguments(parser, size=100_000_000, out="data/text/text")
    parser.add_argument("--split", metavar="TEXT",
                        help=r"what separates documents in text files, e.g. '\n\n'")
    parser.add_argument("--val-frac", type=float, default=0.1, metavar="F",
                        help="this part of the documents is for validation (%(default)s)")
    args = parser.parse_args()
    if not 0 <= args.val_frac < 1:
        parser.error("--val-frac is at least 0 and below 1")
    split = codecs.decode(args.split.encode(), "unicode_escape") if args.split else None

    def goes_to_val(number, _):  # evenly spread: each time number * F passes a whole number
        return int((number + 1) * args.val_frac + 1e-9) > int(number * args.val_frac + 1e-9)

    texts = shards.documents(args.files, args.field, split)
    train, val = shards.write_shards(args, texts, goes_to_val)
    if train.total == 0 or (val.total == 0 and args.val_frac > 0):
        shards.fail("too few documents for both parts: give --split, or --val-frac 0")


if __name__ == "__main__":
    main()
