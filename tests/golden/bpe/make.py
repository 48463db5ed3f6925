"""Writes the golden values of this folder with Hugging Face `tokenizers`.

    pip install tokenizers==0.23.3
    python make.py [WIKITEXT2]

For each of english.txt and unicode.txt (written for this purpose, public domain):
  NAME.tokenizer.json   the BPE tokenizer trained on NAME.txt, as Hugging Face writes it
  NAME.ids.json         the ids of both texts' lines and of a few more under it
With WIKITEXT2, the folder with WikiText-2's wiki.train.tokens, also
  wikitext-2.merges.txt the merges of 8,192 tokens trained on it, one a line

Lines, each with its newline, are the units of training and encoding.
"""

import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

HERE = Path(__file__).parent
END_OF_TEXT = "<|endoftext|>"
VOCAB_SIZES = {"english": 500, "unicode": 600}
MORE_LINES = [
    "",
    " ",
    "\n",
    "  \n",
    "It's the keeper's 1st new line, isn't it?\n",
    "Ελληνικά, русский, 日本語, 한국어 and العربية together 2\u00b2.\n",
    "\U0001f469\u200d\U0001f52c sees \U0001f30a\U0001f30a\U0001f30a at 12:34\u00a0h\u3000.",
]


def lines_of(path: Path) -> list[str]:
    """The lines of a text with their newlines; only "\\n" ends a line."""
    with path.open(encoding="utf-8", newline="\n") as text:
        return list(text)


def train(lines: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE as Lockstep has it, by Hugging Face's trainer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END_OF_TEXT],
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    assert tokenizer.get_vocab_size() == vocab_size, tokenizer.get_vocab_size()
    return tokenizer


def main() -> None:
    texts = {name: lines_of(HERE / f"{name}.txt") for name in VOCAB_SIZES}
    # Hugging Face finds the special token in text; Lockstep never does.
    lines = [line for text in texts.values() for line in text if END_OF_TEXT not in line]
    lines += MORE_LINES
    for name, vocab_size in VOCAB_SIZES.items():
        tokenizer = train(texts[name], vocab_size)
        tokenizer.save(str(HERE / f"{name}.tokenizer.json"), pretty=False)
        ids = [[line, tokenizer.encode(line).ids] for line in lines]
        rows = ",\n".join(json.dumps(row, separators=(",", ":")) for row in ids)
        (HERE / f"{name}.ids.json").write_text(f"[\n{rows}\n]\n")
    if len(sys.argv) > 1:
        tokenizer = train(lines_of(Path(sys.argv[1]) / "wiki.train.tokens"), 8192)
        merges = json.loads(tokenizer.to_str())["model"]["merges"]
        rows = "".join(f"{left} {right}\n" for left, right in merges)
        (HERE / "wikitext-2.merges.txt").write_text(rows, encoding="utf-8")


if __name__ == "__main__":
    main()
