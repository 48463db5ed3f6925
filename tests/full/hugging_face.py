"""Hugging Face's side of tests/full/hugging_face.rs, which starts it with transformers on the path.

python hugging_face.py read REQUESTS    loads folders, and writes what each makes of texts
python hugging_face.py make RECIPES     writes random GPT-2s
"""

import json
import os
import sys
from pathlib import Path

# PyTorch's libraries for GPUs may be empty ones here: what nobody calls need not be found.
sys.setdlopenflags(os.RTLD_LAZY)

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import (  # noqa: E402
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
)


def read(request):
    """Logits of `inputs`, the ids of `texts`, and a greedy continuation of the prompt's ids."""
    folder, answer = request["folder"], Path(request["answer"])
    model = GPT2LMHeadModel.from_pretrained(folder).float().eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # Lockstep's models do not stop at the end of a text.
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        logits = model(torch.tensor(request["inputs"])).logits
        prompt = torch.tensor([request["prompt"]])
        greedy = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=request["tokens"],
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
    save_file({"logits": logits.contiguous()}, answer.with_suffix(".safetensors"))
    ids = [tokenizer(text).input_ids for text in request["texts"]]
    said = {
        "ids": ids,
        "texts": [tokenizer.decode(row) for row in ids],
        "greedy": greedy[0, prompt.shape[1] :].tolist(),
        "special": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id],
    }
    answer.write_text(json.dumps(said))


def make(recipe):
    """Writes a GPT-2 of random weights in the way that the recipe says, and a tokenizer."""
    folder = Path(recipe["folder"])
    torch.manual_seed(1)
    tokenizer = AutoTokenizer.from_pretrained(recipe["tokenizer"])
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = GPT2Config(vocab_size=len(tokenizer), **special, **recipe["config"])
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        # Norms and biases as well, which are ones and zeros in a new model.
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.to(getattr(torch, recipe["dtype"]))
    model.save_pretrained(folder, max_shard_size=recipe["shard"])
    tokenizer.save_pretrained(folder)
    if recipe["old"]:
        rewrite_as_the_oldest(folder, config)


def rewrite_as_the_oldest(folder, config):
    """As GPT-2's own files are: no prefix, masks beside the weights, two files of a tokenizer."""
    path = folder / "model.safetensors"
    tensors = {name.removeprefix("transformer."): x for name, x in load_file(path).items()}
    mask = torch.ones(config.n_positions, config.n_positions).tril()[None, None]
    for layer in range(config.n_layer):
        tensors[f"h.{layer}.attn.bias"] = mask.clone()
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, path)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]
    merges = [
        merge if isinstance(merge, str) else " ".join(merge) for merge in vocabulary["merges"]
    ]
    (folder / "vocab.json").write_text(json.dumps(vocabulary["vocab"]))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    (folder / "tokenizer.json").unlink()


if __name__ == "__main__":
    verb, path = sys.argv[1:]
    for order in json.loads(Path(path).read_text()):
        {"read": read, "make": make}[verb](order)
