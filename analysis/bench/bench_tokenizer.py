"""Times Lockstep's tokenizer beside Hugging Face tokenizers and tiktoken, in one run.

    .venv/bin/python -m pip install tokenizers tiktoken
    . .venv/lockstep.env && cargo build --release --example bench_tokenizer
    target/release/lockstep prepare --source sample --tokenizer gpt2 --out data/sample-gpt2
    .venv/bin/python analysis/bench/bench_tokenizer.py TEXT --gpt2 data/sample-gpt2/tokenizer.json

Trains BPE of --vocab-size tokens on TEXT and encodes TEXT with GPT-2's vocabulary, with one thread
and with all cores, reading and start-up not counted. The programs take turns for --rounds rounds.
It prints medians, their range, MB/s, and how many times faster Lockstep is. All programs must find
the same number of GPT-2 ids.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
END_OF_TEXT = "<|endoftext|>"


def read_lines(path: str) -> list[str]:
    """The lines of a text with their newlines: the unit of training and encoding."""
    with open(path, encoding="utf-8", newline="\n") as text:
        return list(text)


def time_huggingface(args: argparse.Namespace) -> dict:
    """Seconds of Hugging Face's trainer and encoder on this process's threads."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    lines = read_lines(args.text)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=args.vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END_OF_TEXT],
        show_progress=False,
    )
    start = time.perf_counter()
    tokenizer.train_from_iterator(lines, trainer)
    train_s = time.perf_counter() - start

    tokenizer = Tokenizer.from_file(args.gpt2)
    start = time.perf_counter()
    encodings = tokenizer.encode_batch_fast(lines)
    encode_s = time.perf_counter() - start
    return {"train_s": train_s, "encode_s": encode_s, "tokens": sum(map(len, encodings))}


def time_tiktoken(args: argparse.Namespace) -> dict:
    """Seconds of tiktoken's encoder, with ranks from the tokenizer.json: it has no trainer."""
    import tiktoken
    from tokenizers.pre_tokenizers import ByteLevel

    # The characters that represent bytes: printing ones themselves, the others from U+0100 on.
    chars = {byte: chr(byte) for byte in range(256) if chr(byte) in ByteLevel.alphabet()}
    others = [byte for byte in range(256) if byte not in chars]
    chars |= {byte: chr(256 + at) for at, byte in enumerate(others)}
    byte_of = {char: byte for byte, char in chars.items()}
    vocab = json.loads(Path(args.gpt2).read_text(encoding="utf-8"))["model"]["vocab"]
    end_of_text = vocab.pop(END_OF_TEXT)
    encoding = tiktoken.Encoding(
        "gpt2-from-file",
        pat_str=r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
        mergeable_ranks={bytes(byte_of[c] for c in name): rank for name, rank in vocab.items()},
        special_tokens={END_OF_TEXT: end_of_text},
    )
    lines = read_lines(args.text)
    start = time.perf_counter()
    if args.threads == 1:
        ids = [encoding.encode_ordinary(line) for line in lines]
    else:
        ids = encoding.encode_ordinary_batch(lines, num_threads=args.threads)
    return {"encode_s": time.perf_counter() - start, "tokens": sum(map(len, ids))}


def run(program: str, threads: int, args: argparse.Namespace) -> dict:
    """One measurement in a separate process, which is limited to this number of threads."""
    command = [args.example, args.text, str(args.vocab_size)]
    if program != "lockstep":
        command = [sys.executable, __file__, args.text, "--gpt2", args.gpt2]
        command += ["--vocab-size", str(args.vocab_size)]
        command += ["--program", program, "--threads", str(threads)]
    environment = os.environ | {"RAYON_NUM_THREADS": str(threads)}
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(result.stdout)


def report(results: dict, key: str, megabytes: float) -> None:
    """Prints a line for each program and thread count that measured this."""
    for (program, threads), rows in results.items():
        if key not in rows[0]:
            continue
        seconds = [row[key] for row in rows]
        median = statistics.median(seconds)
        ours = statistics.median(row[key] for row in results["lockstep", threads])
        print(
            f"{key:9} {program:12} {threads:2} threads: {median:6.3f} s "
            f"({min(seconds):.3f} to {max(seconds):.3f}), {megabytes / median:6.1f} MB/s, "
            f"Lockstep is {median / ours:.1f} times as fast"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text")
    parser.add_argument("--gpt2", required=True, help="a tokenizer.json of GPT-2's vocabulary")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--example", default=str(HERE.parents[1] / "target/release/examples/bench_tokenizer")
    )
    parser.add_argument("--program", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    peers = {"huggingface": time_huggingface, "tiktoken": time_tiktoken}
    if args.program:
        print(json.dumps(peers[args.program](args)))
        return

    cores = os.cpu_count() or 1
    runs = [(program, n) for n in sorted({1, cores}) for program in ["lockstep", *peers]]
    results: dict = {key: [] for key in runs}
    for _ in range(args.rounds):
        for key in runs:
            results[key].append(run(*key, args))
    tokens = {row["tokens"] for rows in results.values() for row in rows}
    if len(tokens) > 1:
        sys.exit(f"the programs disagree on the number of ids: {sorted(tokens)}")
    megabytes = os.path.getsize(args.text) / 1e6
    print(f"{megabytes:.1f} MB of text, {tokens.pop()} ids, {args.rounds} rounds")
    report(results, "train_s", megabytes)
    report(results, "encode_s", megabytes)


if __name__ == "__main__":
    main()
