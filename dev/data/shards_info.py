#!/usr/bin/env python3
"""What token shards hold, and whether they are whole.

    python3 dev/data/shards_info.py data/shakespeare/*.bin --tokenizer data/bpe1024.json

Prints version, size, largest token and documents of each file, and its beginning decoded. Exit
status 1 if a size is not the header's or a token is outside the vocabulary.
"""
import shards


def main():
    parser = shards.parser(__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("--tokenizer", metavar="JSON", help="decodes the tokens, bounds them")
    parser.add_argument("--vocab-size", type=int, metavar="V", help="bounds the tokens")
    parser.add_argument("--eot", type=int, metavar="ID",
                        help="the end of text (the tokenizer's, else 50256 or 128000)")
    parser.add_argument("--first", type=int, default=32, metavar="N",
                        help="tokens to show (%(default)s)")
    args = parser.parse_args()
    tokenizer = shards.load_tokenizer(args.tokenizer) if args.tokenizer else None
    rows = args.vocab_size or (tokenizer.get_vocab_size() if tokenizer else None)
    for path in args.files:
        version, tokens = shards.read(path)
        eot = args.eot
        if eot is None and tokenizer:
            eot = tokenizer.token_to_id(shards.ENDOFTEXT)
        elif eot is None:
            eot = {1: 50256, 7: 128000}[version]
        largest = max(tokens, default=0)
        print(f"{path}: version {version}, {len(tokens)} tokens, largest {largest}, "
              f"{tokens.count(eot)} of them end of text ({eot})")
        beginning = tokens[:args.first].tolist()
        print(f"    {' '.join(map(str, beginning))}")
        if tokenizer:
            print(f"    {tokenizer.decode(beginning, skip_special_tokens=False)!r}")
        if rows and largest >= rows:
            position = next(i for i, token in enumerate(tokens) if token >= rows)
            shards.fail(f"{path}: token {tokens[position]} at position {position} is outside the "
                        f"vocabulary of {rows}; was the shard made with another tokenizer?")


if __name__ == "__main__":
    main()
