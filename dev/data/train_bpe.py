#!/usr/bin/env python3
"""A byte-level BPE tokenizer from text.

    python3 dev/data/train_bpe.py data/tinyshakespeare.txt.gz --vocab-size 1024 \\
        --out data/bpe1024.json
    ./train_mamba2 --data data/tinyshakespeare.txt.gz --tokenizer data/bpe1024.json

The 256 bytes are always in it, so that it encodes any text. <|endoftext|> is the last id. A
vocabulary that is a multiple of 16 leaves no unused row in the model.
"""
import shards


def main():
    parser = shards.parser(__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE", help="text, .jsonl or .parquet")
    parser.add_argument("--vocab-size", type=int, default=4096, metavar="V",
                        help="ids in all, at least 257 (%(default)s)")
    parser.add_argument("--out", default="data/tokenizer.json", metavar="JSON",
                        help="(%(default)s)")
    parser.add_argument("--field", default="text", help="where rows have their text (%(default)s)")
    args = parser.parse_args()
    if args.vocab_size < 257:
        parser.error("--vocab-size: 256 bytes and the end of text are 257 ids")
    try:
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError:
        shards.fail("this takes the tokenizers package: pip install tokenizers")

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=args.vocab_size - 1,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(shards.documents(args.files, args.field), trainer)
    tokenizer.add_special_tokens([AddedToken(shards.ENDOFTEXT, special=True, normalized=False)])
    tokenizer.save(args.out)
    print(f"{args.out}: {tokenizer.get_vocab_size()} ids, "
          f"end of text {tokenizer.token_to_id(shards.ENDOFTEXT)}")


if __name__ == "__main__":
    main()
