"""
Make the folders beside this file: small random models and what transformers computes with them.

    pip install transformers==5.24.0 && python tests/pretrained/make.py

tests/test_pretrained.py compares nanoAKI with them; transformers is needed here alone.
"""
import json
import random
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import ByteLevelBPETokenizer
from transformers import (Dinov2Config, Dinov2Model, GPT2Config, GPT2LMHeadModel, GPT2Tokenizer,
                          SiglipVisionConfig, SiglipVisionModel)

HERE = Path(__file__).parent
TEXTS = ["Hello world, it's 2026! They'll say: I'd've, we're, he'S, DON'T.",
         "  two spaces\n\n\nand   three \t tabs\r\n", "1234567 12.5% ½ ² Ⅷ ٣٤ x² 10½ ①②",
         "naïve café Größe ŒUVRE", "東京は夜です。一二三", "한국어 שלום العربية हिन्दी ภาษา",
         "👩‍👩‍👧 🏳️‍🌈 🇫🇷 👍🏽 😀😀", "\x00\x1b\x7f\x1c\x1d\x1e\x1f \x85 \xa0 \u2028 \u3000 \u200b",
         "<|endoftext|> <image> <answer>", "snake_case __init__ _x_ a_1", "e\u0301 ʼn 's 't ''s",
         "def f(x):\n    return x ** 2  # why?\n", "https://example.org/a?b=c&d=%20"]


def strings() -> list[str]:
    """200 of all kinds: each text, and random pieces of all together."""
    rng, everything, found = random.Random(0), "".join(TEXTS), [*TEXTS, "", " ", "  ", "\n"]
    while len(found) < 200:
        start = rng.randrange(len(everything))
        found.append(everything[start:start + rng.randint(1, 25)]
                     + rng.choice(["", " ", "  ", "\n", " 's", "\u00bd", "7", "_"])
                     + "".join(rng.choices(everything, k=rng.randint(0, 6))))
    return found


def keep(name: str, model, **tensors) -> None:
    """A folder: the model as the hub has it, and what goes in and comes out."""
    model.save_pretrained(HERE / name)
    save_file({key: value.contiguous() for key, value in tensors.items()},
              HERE / name / "expected.safetensors")


def spread(model):
    """Random weights large enough, biases and norms too, that a wrong place for one is seen."""
    torch.manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3 if p.dim() > 1 else 0.5)
    return model.eval()


@torch.no_grad()
def make_vit(name: str, model, mean, std, **sizes: int) -> None:
    """What goes in and comes out for pictures of some sizes, of which the first is the model's."""
    spread(model)
    mean, std = (torch.tensor(x)[:, None, None] for x in (mean, std))
    tensors = {}
    for size, pixels in sizes.items():
        pictures = torch.randint(0, 256, (2, 3, pixels, pixels), dtype=torch.uint8)
        out = model((pictures / 255 - mean) / std, output_hidden_states=True,
                    interpolate_pos_encoding=True)
        tensors |= {f"{size}.pictures": pictures, f"{size}.states": out.last_hidden_state,
                    f"{size}.first": out.hidden_states[1]}  # after one block
    keep(name, model, **tensors)


@torch.no_grad()
def make_gpt2() -> None:
    folder = HERE / "gpt2"
    folder.mkdir(exist_ok=True)
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(TEXTS * 2, vocab_size=400, special_tokens=["<|endoftext|>"])
    trained.save_model(str(folder))
    tokenizer = GPT2Tokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    ids = [tokenizer(text, split_special_tokens=True)["input_ids"] for text in strings()]
    (folder / "strings.json").write_text(json.dumps(list(zip(strings(), ids))))
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=48, n_embd=16, n_layer=2, n_head=2,
                        n_inner=40)
    model = spread(GPT2LMHeadModel(config))
    tokens = torch.tensor(sum(ids, [])[:24]).view(2, 12)
    out = model(tokens, output_hidden_states=True)
    keep("gpt2", model, tokens=tokens, states=out.hidden_states[-1], logits=out.logits)
    (folder / "generation_config.json").unlink()


if __name__ == "__main__":
    half = (0.5,) * 3
    make_vit("siglip", SiglipVisionModel(SiglipVisionConfig(
        hidden_size=16, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
        image_size=30, patch_size=7, vision_use_head=False)), half, half, own=30, other=42)
    make_vit("dinov2", Dinov2Model(Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7)),
        (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), own=28, other=42)
    make_gpt2()
