"""SigLIP's and DINOv2's ViTs and GPT-2's decoder as parts of nanoAKI's model, of published folders."""
import math
from pathlib import Path

import torch
import torch.nn.functional as F

from engine.published import Published, read_json
from nanoaki import Tokenizer

GELU = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}
EPS = {eps: eps for eps in (1e-6, 1e-5, 1e-12)}
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])  # ImageNet's

# Of each family what a config.json may leave out, and what our layers are called in a block.
SIGLIP = {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 12,
          "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh"}
SIGLIP_LAYERS = {"norm1": "layer_norm1", "q": "self_attn.q_proj", "k": "self_attn.k_proj",
                 "v": "self_attn.v_proj", "out": "self_attn.out_proj", "norm2": "layer_norm2",
                 "up": "mlp.fc1", "down": "mlp.fc2"}
DINOV2 = SIGLIP | {"hidden_act": "gelu"}
DINOV2_LAYERS = {"norm1": "norm1", "q": "attention.attention.query", "k": "attention.attention.key",
                 "v": "attention.attention.value", "out": "attention.output.dense",
                 "norm2": "norm2", "up": "mlp.fc1", "down": "mlp.fc2"}
GPT2 = {"n_embd": 768, "n_head": 12, "n_layer": 12, "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new", "scale_attn_by_inverse_layer_idx": False}
GPT2_LAYERS = {"norm1": "ln_1", "qkv": "attn.c_attn", "out": "attn.c_proj", "norm2": "ln_2",
               "up": "mlp.c_fc", "down": "mlp.c_proj"}


def read_vit(folder: Path, image_size: int | None, layers: int | None) -> tuple[dict, dict]:
    """Fields of Config and the weights of a ViT, for pictures of that size and its first layers.

    None is what the folder has. Raises ValueError where it does not fit our ViT.
    """
    theirs = Published(folder, {"siglip": SIGLIP, "siglip_vision_model": SIGLIP, "dinov2": DINOV2},
                       "embeddings.patch_embedding")
    C, depth = theirs.number("hidden_size"), theirs.number("num_hidden_layers")
    if theirs.type == "dinov2":
        weights, blocks = read_dinov2(theirs, C, depth)
    else:
        weights, blocks = read_siglip(theirs, C, depth)
    theirs.refuse_rest("head.", "mask_token")
    kept = layers or depth
    if kept > depth:
        raise ValueError(f"--vit-layer {kept} is more than the {depth} blocks of {folder}")
    if kept < depth:
        print(f"vit: the first {kept} of {depth} blocks; the LayerNorm after them is a new one")
        weights |= {"norm.weight": torch.ones(C), "norm.bias": torch.zeros(C)}
    for n, block in enumerate(blocks[:kept]):
        weights |= {f"blocks.{n}.{name}": weight for name, weight in block.items()}
    patch, side = weights["patch.weight"].shape[-1], math.isqrt(len(weights["position"]))
    size = image_size or side * patch
    if size // patch != side:
        print(f"vit: positions of {side} x {side} patches are resized to {size // patch} a side")
        grid = weights["position"].T.reshape(1, C, side, side)
        grid = F.interpolate(grid, (size // patch, size // patch), mode="bicubic")
        weights["position"] = grid[0].flatten(1).T
    return {"image_size": size, "patch_size": patch, "vit_layer": kept, "vit_embd": C,
            "vit_head": theirs.number("num_attention_heads"),
            "vit_classes": len(weights.get("classes", [])),
            "vit_eps": theirs.config["layer_norm_eps"],
            "vit_gelu": theirs.choose("hidden_act", GELU)}, weights


def read_siglip(theirs: Published, C: int, depth: int) -> tuple[dict, list[dict]]:
    """The weights of a ViT, those of its blocks apart."""
    weights = {"position": theirs.take("embeddings.position_embedding.weight", None, C)}
    weights |= theirs.take_layer("patch", "embeddings.patch_embedding", C, 3, None, None)
    weights |= theirs.take_layer("norm", "post_layernorm", C)
    return weights, [theirs.take_block(f"encoder.layers.{n}.", SIGLIP_LAYERS, C)
                     for n in range(depth)]


def read_dinov2(theirs: Published, C: int, depth: int) -> tuple[dict, list[dict]]:
    """The weights of a ViT, those of its blocks apart; what ours does not do is folded into them."""
    weights = theirs.take_layer("patch", "embeddings.patch_embeddings.projection", C, 3, None, None)
    weights |= theirs.take_layer("norm", "layernorm", C)
    # Pictures are -1 to 1 here, and there normal in each colour.
    shift = weights["patch.weight"] * ((0.5 - MEAN) / STD)[:, None, None]
    weights["patch.bias"] = weights["patch.bias"] + shift.sum((1, 2, 3))
    weights["patch.weight"] = weights["patch.weight"] / (2 * STD)[:, None, None]
    position = theirs.take("embeddings.position_embeddings", 1, None, C)[0]
    weights["classes"] = theirs.take("embeddings.cls_token", 1, 1, C)[0] + position[:1]
    weights["position"], blocks = position[1:], []
    for n in range(depth):
        block = theirs.take_block(f"encoder.layer.{n}.", DINOV2_LAYERS, C)
        for ours, scale in (("out", "layer_scale1"), ("down", "layer_scale2")):
            by = theirs.take(f"encoder.layer.{n}.{scale}.lambda1", C)
            block[f"{ours}.weight"] = block[f"{ours}.weight"] * by[:, None]
            block[f"{ours}.bias"] = block[f"{ours}.bias"] * by
        blocks.append(block)
    return weights, blocks


def read_decoder(folder: Path, block_size: int | None) -> tuple[dict, dict, list]:
    """Fields of Config and the weights of a decoder with so many positions, and its merges.

    None is what the folder has. Raises ValueError where it does not fit our decoder.
    """
    theirs = Published(folder, {"gpt2": GPT2}, "wte.weight")
    theirs.choose("activation_function", {name: name for name in GELU if GELU[name] == "tanh"})
    theirs.choose("layer_norm_epsilon", {1e-5: 1e-5})
    theirs.choose("scale_attn_by_inverse_layer_idx", {False: False})
    C, depth = theirs.number("n_embd"), theirs.number("n_layer")
    tokens, positions = theirs.take("wte.weight", None, C), theirs.take("wpe.weight", None, C)
    merges, rows = read_merges(folder, len(tokens))
    tokens = tokens[rows]
    tokens[[Tokenizer.image, Tokenizer.answer, Tokenizer.pad]] = tokens.mean(0)  # new ones
    size = block_size or len(positions)
    if size > len(positions):
        raise ValueError(f"--block-size {size} is more than the {len(positions)} positions of "
                         f"{folder}")
    weights = {"token.weight": tokens, "position.weight": positions[:size],
               "head.weight": tokens.clone()} | theirs.take_layer("norm", "ln_f", C)
    for n in range(depth):
        block = theirs.take_block(f"h.{n}.", GPT2_LAYERS, C, turned=True)
        weights |= {f"blocks.{n}.{name}": weight for name, weight in block.items()}
    theirs.refuse_rest("attn.bias", "attn.masked_bias", "lm_head.weight")
    return {"vocab_size": len(tokens), "block_size": size, "n_layer": depth, "n_embd": C,
            "n_head": theirs.number("n_head")}, weights, merges


def read_merges(folder: Path, most: int) -> tuple[list[tuple[int, int]], list[int]]:
    """A tokenizer's merges in our ids, and the folder's id of each of ours; ValueError."""
    path, ids = folder / "merges.txt", read_json(folder / "vocab.json")
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that stand for themselves
    others = [i for i in range(256) if i not in seen]
    names = {i: chr(i) for i in seen} | {i: chr(256 + n) for n, i in enumerate(others)}
    names |= dict.fromkeys(range(256, 260), "<|endoftext|>")  # <eos>; of the others none is used
    known, merges = {name: i for i, name in names.items()}, []
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            if line and not line.startswith("#version"):
                a, b = line.split(" ")
                merges.append((known[a], known[b]))
                known[a + b] = len(names)
                names[len(names)] = a + b
        rows = [ids[names[i]] for i in range(len(names))]
    except (ValueError, KeyError) as e:
        raise ValueError(f"{path}: it and vocab.json are not of one GPT-2 tokenizer ({e})") from e
    if not all(type(i) is int and 0 <= i < most for i in rows):
        raise ValueError(f"{folder / 'vocab.json'}: ids beyond the {most} rows of wte.weight")
    return merges, rows
