"""Times Lockstep's tokenizer beside gigatoken, tiktoken and Hugging Face tokenizers, in one run.

    .venv/bin/python -m pip install tokenizers tiktoken gigatoken
    . .venv/lockstep.env && cargo build --release --example bench_tokenizer
    target/release/lockstep prepare --source sample --tokenizer gpt2 --out data/sample-gpt2
    .venv/bin/python analysis/bench/bench_tokenizer.py TEXT --gpt2 data/sample-gpt2/tokenizer.json

Trains BPE of --vocab-size tokens on TEXT and encodes TEXT with GPT-2's vocabulary, with one thread
and with all cores, reading and start-up not counted. Of programs that remember words, a fresh
tokenizer (encode_s) and its second pass (again_s) are timed, after a first call of another. The
programs take turns for --rounds rounds. It prints medians, their range, MB/s, and how many times
faster Lockstep is; --out writes the rows as JSON. All programs must find the same number of GPT-2
ids.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
END_OF_TEXT = "<|endoftext|>"
# What the programs measure, in seconds: training, starting (Lockstep only), encoding, once more.
FIGURES = ["train_s", "load_s", "encode_s", "again_s"]


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


def time_gigatoken(args: argparse.Namespace) -> dict:
    """Seconds of gigatoken's trainer and encoder: the whole text at once, its fastest way, on one
    thread, and its lines on several."""
    import awkward
    import gigatoken

    text = Path(args.text).read_bytes()
    lines = [line.encode() for line in read_lines(args.text)]
    start = time.perf_counter()
    gigatoken.train_bpe(text, args.vocab_size, [END_OF_TEXT])
    train_s = time.perf_counter() - start

    def encode(tokenizer: gigatoken.Tokenizer) -> tuple[float, int]:
        start = time.perf_counter()
        ids = tokenizer.encode(text) if args.threads == 1 else tokenizer.encode_batch(lines)
        seconds = time.perf_counter() - start
        return seconds, len(ids) if args.threads == 1 else int(awkward.count(ids))

    encode(gigatoken.Tokenizer(args.gpt2))
    tokenizer = gigatoken.Tokenizer(args.gpt2)
    encode_s, tokens = encode(tokenizer)
    again_s, _ = encode(tokenizer)
    return {"train_s": train_s, "encode_s": encode_s, "again_s": again_s, "tokens": tokens}


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
    return json.loads(result.stdout.splitlines()[-1])  # a library may print, too


def report(results: dict, megabytes: float) -> list[dict]:
    """A row for each figure, program and thread count; prints them, too."""
    rows = []
    for key, ((program, threads), runs) in itertools.product(FIGURES, results.items()):
        if key not in runs[0]:
            continue
        seconds = [run[key] for run in runs]
        median = statistics.median(seconds)
        ratio = median / statistics.median(run[key] for run in results["lockstep", threads])
        row = {"figure": key, "program": program, "threads": threads, "median_s": median}
        row |= {"min_s": min(seconds), "max_s": max(seconds), "rounds": len(seconds)}
        rows.append(row | {"mb_per_s": megabytes / median, "lockstep_is_faster_by": ratio})
        print(
            f"{key:9} {program:12} {threads:2} threads: {median:6.3f} s "
            f"({min(seconds):.3f} to {max(seconds):.3f}), {megabytes / median:6.1f} MB/s, "
            f"Lockstep is {ratio:.1f} times as fast"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text")
    parser.add_argument("--gpt2", required=True, help="a tokenizer.json of GPT-2's vocabulary")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="a file for the rows, as JSON")
    parser.add_argument(
        "--example", default=str(HERE.parents[1] / "target/release/examples/bench_tokenizer")
    )
    parser.add_argument("--program", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    peers = {
        "gigatoken": time_gigatoken,
        "tiktoken": time_tiktoken,
        "huggingface": time_huggingface,
    }
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
    rows = report(results, megabytes)
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
