"""SigLIP's and DINOv2's ViTs and GPT-2's decoder, of published folders, as parts of our model."""
from pathlib import Path

import torch
import torch.nn.functional as F

from engine.published import Published
from nanoaki import Tokenizer

GELU = {"gelu": "none", "gelu_pytorch_tanh": "tanh", "gelu_new": "tanh"}
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])  # ImageNet's

# Of each family what a config.json may leave out, and what our layers are called in a block.
SIGLIP = {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 12, "image_size": 224,
          "patch_size": 16, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh"}
SIGLIP_LAYERS = {"norm1": "layer_norm1", "q": "self_attn.q_proj", "k": "self_attn.k_proj",
                 "v": "self_attn.v_proj", "out": "self_attn.out_proj", "norm2": "layer_norm2",
                 "up": "mlp.fc1", "down": "mlp.fc2"}
DINOV2 = SIGLIP | {"patch_size": 14, "hidden_act": "gelu", "use_swiglu_ffn": False}
VITS = {"siglip": SIGLIP, "siglip_vision_model": SIGLIP, "dinov2": DINOV2}
DINOV2_LAYERS = {"norm1": "norm1", "q": "attention.attention.query", "k": "attention.attention.key",
                 "v": "attention.attention.value", "out": "attention.output.dense",
                 "norm2": "norm2", "up": "mlp.fc1", "down": "mlp.fc2"}
GPT2 = {"n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False, "tie_word_embeddings": True}
GPT2_LAYERS = {"norm1": "ln_1", "qkv": "attn.c_attn", "out": "attn.c_proj", "norm2": "ln_2",
               "up": "mlp.c_fc", "down": "mlp.c_proj"}


def read_vit(folder: Path, image_size: int | None, layers: int | None) -> tuple[dict, dict]:
    """Fields of Config and the weights of a ViT, for pictures of that size and its first layers.

    None is what the folder has; what is changed is said. Raises ValueError where it does not fit.
    """
    theirs = Published(folder, VITS, "embeddings.patch_embedding")
    C, depth, patch = map(theirs.number, ("hidden_size", "num_hidden_layers", "patch_size"))
    own, kept = theirs.number("image_size"), layers or depth
    size = image_size or own
    side, own_side = size // patch, own // patch
    if side < 1 or kept > depth:
        raise ValueError(f"{folder} has {depth} blocks for patches of {patch} pixels: --vit-layer "
                         f"must be at most {depth}, not {kept}, --image-size at least {patch}, not "
                         f"{size}")
    if theirs.type == "dinov2":
        theirs.one_of("use_swiglu_ffn", False)
        weights, blocks = read_dinov2(theirs, C, depth, patch, own_side)
    else:
        weights, blocks = read_siglip(theirs, C, depth, patch, own_side)
    theirs.refuse_rest("head.", "mask_token")
    if kept < depth:
        print(f"vit: the first {kept} of {depth} blocks; the LayerNorm after them is a new one")
        weights |= {"norm.weight": torch.ones(C), "norm.bias": torch.zeros(C)}
    for n, block in enumerate(blocks[:kept]):
        weights |= {f"blocks.{n}.{name}": weight for name, weight in block.items()}
    if size % patch:
        print(f"vit: of {size} pixels {side} patches of {patch} fill {side * patch}, into which "
              f"pictures are fitted")
    if side != own_side:
        print(f"vit: positions of {own_side} x {own_side} patches are resized to {side} a side")
        grid = weights["position"].T.reshape(1, C, own_side, own_side)
        grid = F.interpolate(grid, (side, side), mode="bicubic")
        weights["position"] = grid[0].flatten(1).T.contiguous()
    return {"image_size": side * patch, "patch_size": patch, "vit_layer": kept, "vit_embd": C,
            "vit_head": theirs.number("num_attention_heads"),
            "vit_classes": len(weights.get("classes", [])),
            "vit_eps": theirs.number("layer_norm_eps", float),
            "vit_gelu": GELU[theirs.one_of("hidden_act", *GELU)]}, weights


def read_siglip(theirs: Published, C: int, depth: int, patch: int, side: int):
    """The weights of a ViT, and those of each of its blocks."""
    weights = theirs.take_layer("patch", "embeddings.patch_embedding", C, 3, patch, patch)
    weights["position"] = theirs.take("embeddings.position_embedding.weight", side ** 2, C)
    weights |= theirs.take_layer("norm", "post_layernorm", C)
    return weights, [theirs.take_block(f"encoder.layers.{n}.", SIGLIP_LAYERS, C)
                     for n in range(depth)]


def read_dinov2(theirs: Published, C: int, depth: int, patch: int, side: int):
    """The weights of a ViT, and of each of its blocks, with what ours does not do folded in."""
    weights = theirs.take_layer("patch", "embeddings.patch_embeddings.projection", C, 3, patch,
                                patch)
    # Pictures are -1 to 1 here, and there normal in each colour.
    shift = weights["patch.weight"] * ((0.5 - MEAN) / STD)[:, None, None]
    weights["patch.bias"] += shift.sum((1, 2, 3))
    weights["patch.weight"] /= (2 * STD)[:, None, None]
    position = theirs.take("embeddings.position_embeddings", 1, 1 + side ** 2, C)[0]
    weights["classes"] = theirs.take("embeddings.cls_token", 1, 1, C)[0] + position[:1]
    weights["position"], blocks = position[1:], []
    weights |= theirs.take_layer("norm", "layernorm", C)
    for n in range(depth):
        block = theirs.take_block(f"encoder.layer.{n}.", DINOV2_LAYERS, C)
        for ours, scale in (("out", "layer_scale1"), ("down", "layer_scale2")):
            by = theirs.take(f"encoder.layer.{n}.{scale}.lambda1", C)
            block[f"{ours}.weight"] *= by[:, None]
            block[f"{ours}.bias"] *= by
        blocks.append(block)
    return weights, blocks


def read_decoder(folder: Path, rows: list[int], block_size: int | None) -> tuple[dict, dict]:
    """Fields of Config and the weights of a decoder with so many positions, None for all it has.

    rows are the folder's id of each of our tokens. Raises ValueError where it does not fit.
    """
    theirs = Published(folder, {"gpt2": GPT2}, "wte.weight")
    for key, right in (("layer_norm_epsilon", 1e-5), ("scale_attn_weights", True),
                       ("scale_attn_by_inverse_layer_idx", False), ("tie_word_embeddings", True)):
        theirs.one_of(key, right)
    theirs.one_of("activation_function", "gelu_new", "gelu_pytorch_tanh")
    C, depth, positions = map(theirs.number, ("n_embd", "n_layer", "n_positions"))
    size = block_size or positions
    if size > positions:
        raise ValueError(f"--block-size must be at most the {positions} positions of {folder}, not "
                         f"{size}")
    tokens = theirs.take("wte.weight", None, C)
    if max(rows) >= len(tokens):
        raise ValueError(f"{folder / 'vocab.json'}: id {max(rows)} of {len(tokens)} embeddings")
    tokens = tokens[rows]
    tokens[[Tokenizer.image, Tokenizer.answer, Tokenizer.pad]] = tokens.mean(0)  # new ones
    weights = {"token.weight": tokens, "head.weight": tokens.clone(),
               "position.weight": theirs.take("wpe.weight", positions, C)[:size].clone()}
    weights |= theirs.take_layer("norm", "ln_f", C)
    for n in range(depth):
        block = theirs.take_block(f"h.{n}.", GPT2_LAYERS, C, turned=True)
        weights |= {f"blocks.{n}.{name}": weight for name, weight in block.items()}
    theirs.refuse_rest(".attn.bias", ".attn.masked_bias", "lm_head.weight")
    return {"vocab_size": len(tokens), "block_size": size, "n_layer": depth, "n_embd": C,
            "n_head": theirs.number("n_head")}, weights
