"""Published weights: what transformers computes with those of tests/pretrained, and bad folders."""
import json
import random
import re
import shutil
import struct
from pathlib import Path

import pytest
import torch

import compare
import sample
import train
from conftest import VISUAL, fill, tiny_config, tiny_model
from engine import pretrained
from engine.families import read_decoder, read_vit
from engine.pretrained import read_merges
from engine.published import read_tensors
from helpers import make_tiny, metrics, refused, refused_at_last, weights
from nanoaki import (ANSWER, IMAGE, PROMPT, Config, Decoder, Model, NanoAKI, Projector, Resampler,
                     Tokenizer, ViT, load_file)

FOLDERS = Path(__file__).parent / "pretrained"
VITS = ("siglip", "dinov2")
SMALL = ["--n-embd", "32", "--n-head", "2", "--n-layer", "2"]  # a new decoder
EYES = ["--image-size", "16", "--patch-size", "8", "--vit-embd", "32", "--vit-head", "2"]


def expected(name: str) -> dict:
    return read_tensors(FOLDERS / name / "expected.safetensors")


def published_vit(folder: str | Path, image_size: int | None = None, layers: int | None = None):
    about, found = read_vit(FOLDERS / folder, image_size, layers)
    vit = ViT(Config(**about))
    vit.load_state_dict(found)
    return vit


def far(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, of the last positions of theirs: its class token stands before."""
    return float((ours - theirs[:, -ours.shape[1]:]).detach().abs().max())


NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
         torch.int32: "I32", torch.uint8: "U8"}


def write_tensors(path: Path, tensors: dict, blanks: int = 0) -> None:
    """A .safetensors file, with so many blanks at the end of its header."""
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in tensors.items():
        raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    text = json.dumps(header).encode() + b" " * blanks
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


# The same numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VITS)
def test_a_published_vit_gives_the_states_that_transformers_has(name):
    vit, e = published_vit(name), expected(name)
    assert far(vit(e["own.pictures"]), e["own.states"]) < 1e-5
    for weight in (vit.blocks[0].out.weight, vit.blocks[1].qkv.weight[:16]):  # controls
        kept = weight.detach().clone()
        weight.data.copy_(kept.T)
        assert far(vit(e["own.pictures"]), e["own.states"]) > 1e-2
        weight.data.copy_(kept)


@pytest.mark.parametrize("name", VITS)
def test_positions_are_resized_as_transformers_does(name):
    vit, e = published_vit(name, 42), expected(name)
    assert far(vit(e["other.pictures"]), e["other.states"]) < 1e-5
    grid = vit.position.data.view(6, 6, -1)
    grid.copy_(grid.transpose(0, 1).clone())
    assert far(vit(e["other.pictures"]), e["other.states"]) > 1e-2


@pytest.mark.parametrize("name", VITS)
def test_the_first_blocks_alone_end_with_a_new_layer_norm(name, capsys):
    vit, e = published_vit(name, layers=1), expected(name)
    assert "first 1 of 2 blocks; the LayerNorm after them is a new one" in capsys.readouterr().out
    first = torch.nn.functional.layer_norm(e["own.first"], [16], eps=1e-6)
    assert far(vit(e["own.pictures"]), first) < 1e-5
    assert far(published_vit(name)(e["own.pictures"]), first) > 1e-2


def test_a_published_decoder_gives_the_states_and_logits_that_transformers_has():
    about, found = read_decoder(FOLDERS / "gpt2", read_merges(FOLDERS / "gpt2")[1], None)
    decoder, e = Decoder(Config(**about, image_size=16)), expected("gpt2")
    decoder.load_state_dict(found)
    ours = {theirs: i for i, theirs in enumerate(read_merges(FOLDERS / "gpt2")[1]) if i < 259}
    ours |= {theirs: theirs + 3 for theirs in range(257, 400)}
    tokens = torch.tensor([[ours[i] for i in row] for row in e["tokens"].tolist()])
    causal = torch.ones(2 * tokens.shape[1:], dtype=torch.bool).tril()

    def compute():
        states = decoder(decoder.token(tokens) + decoder.position.weight[:tokens.shape[1]], causal)
        return states, decoder.head(states)[..., [ours[i] for i in range(400)]]

    states, logits = compute()
    assert far(states, e["states"]) < 1e-5 and far(logits, e["logits"]) < 1e-5
    decoder.blocks[0].out.weight.data.copy_(decoder.blocks[0].out.weight.data.T.clone())
    assert far(compute()[0], e["states"]) > 1e-2


def test_200_strings_have_the_ids_of_gpt2_but_for_one_renumbering(monkeypatch):
    merges, rows = read_merges(FOLDERS / "gpt2")
    vocabulary = json.loads((FOLDERS / "gpt2/vocab.json").read_text())
    strings = json.loads((FOLDERS / "gpt2/strings.json").read_text())
    assert len(strings) == 200 and rows[Tokenizer.eos] == vocabulary["<|endoftext|>"]

    def differing() -> int:
        tokenizer = Tokenizer(merges)
        return sum([rows[i] for i in tokenizer.encode(text)] != ids for text, ids in strings)

    assert differing() == 0
    monkeypatch.setattr(Tokenizer, "words", re.compile(r"\s*\S+|\s+"))  # the control
    assert differing() > 20


# Files and folders --------------------------------------------------------------------------------


def test_tensors_are_read_as_they_were_written_wherever_they_lie(tmp_path):
    g = torch.Generator().manual_seed(0)
    written = {str(dtype): torch.randint(0, 100, (3, 5), generator=g).to(dtype) for dtype in NAMES}
    written |= {"odd": torch.tensor([7], dtype=torch.uint8), "number": torch.tensor(2.5),
                "none": torch.zeros(0, 4), "after": torch.arange(6.0).view(1, 2, 3)}
    for blanks in range(8):
        write_tensors(tmp_path / "a.safetensors", written, blanks)
        found = read_tensors(tmp_path / "a.safetensors")
        assert found.keys() == written.keys()
        for name, tensor in written.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


def test_a_spoiled_or_cut_file_is_a_value_error_in_one_line_or_is_read(tmp_path):
    rng, path, counts = random.Random(0), tmp_path / "a.safetensors", {True: 0, False: 0}
    whole = (FOLDERS / "dinov2/model.safetensors").read_bytes()
    start = 8 + struct.unpack("<Q", whole[:8])[0]
    for n in range(400):
        spoiled = bytearray(whole)
        if n < 100:
            del spoiled[rng.randrange(len(whole)):]
        else:
            for _ in range(rng.randint(1, 4)):
                spoiled[rng.randrange(start)] = rng.choice(b'0123456789[]{},:"-.eE \xff\0')
        path.write_bytes(spoiled)
        try:
            read_tensors(path)
            read = True
        except ValueError as e:
            assert str(path) in str(e) and "\n" not in str(e)
            read = False
        assert not (read and n < 100)
        counts[read] += 1
    assert counts[False] > 200 and counts[True] > 10  # a letter of a name may be another


@pytest.mark.parametrize("header", [
    "[]", "{", "null", '{"a": 1}', '{"a": {}}', '{"a": ["F32", [1], [0, 4]]}', "[" * 100_000,
    {"dtype": "F8"}, {"dtype": ["F32"]}, {"shape": [2]}, {"shape": [-1]}, {"shape": [1.0]},
    {"shape": ["1"]}, {"shape": [2 ** 70, 0], "data_offsets": [0, 0]}, {"shape": 1},
    {"data_offsets": [0, 8]}, {"data_offsets": [4, 0]}, {"data_offsets": [-4, 0]},
    {"data_offsets": [0.0, 4.0]}, {"data_offsets": [0]}, {"data_offsets": [1 << 70, 1 << 71]},
    {"shape": [0], "data_offsets": [4, 4]},
    '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "b": {"dtype": "U8", "shape": [4], '
    '"data_offsets": [0, 4]}}',  # they overlap
    '{"a": {"dtype": "U8", "shape": [2], "data_offsets": [2, 4]}}'])
def test_a_header_that_lies_is_a_value_error(tmp_path, header):
    path, good = tmp_path / "a.safetensors", {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    text = header
    if isinstance(header, dict):
        text = json.dumps({"a": good | header})
    for text, bad in ((text, True), (json.dumps({"a": good}), False)):  # the second is the control
        path.write_bytes(struct.pack("<Q", len(text)) + text.encode() + bytes(4))
        if bad:
            with pytest.raises(ValueError, match="not a whole safetensors file"):
                read_tensors(path)
        else:
            assert read_tensors(path)["a"].tolist() == [0.0]


@pytest.mark.parametrize("size", [0, 1, 8, 2 ** 40, 2 ** 64 - 1])
def test_a_header_longer_than_its_file_is_a_value_error(tmp_path, size):
    path = tmp_path / "a.safetensors"
    for data in (struct.pack("<Q", size), b"", b"\0" * 5):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            read_tensors(path)


def test_the_tower_of_a_whole_siglip_is_found_and_what_a_config_leaves_out_is_its_default(tmp_path):
    own = json.loads((FOLDERS / "siglip/config.json").read_text())
    kept = ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    config = {"model_type": "siglip", "text_config": {"hidden_size": 99},
              "vision_config": {key: own[key] for key in kept}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = read_tensors(FOLDERS / "siglip/model.safetensors")
    tensors = {f"vision_model.{key}": tensor for key, tensor in found.items()}
    tensors |= {"text_model.head.weight": torch.zeros(2), "logit_scale": torch.zeros(1),
                "vision_model.head.probe": torch.zeros(1, 1, 16)}
    write_tensors(tmp_path / "model.safetensors", tensors)
    both = read_vit(tmp_path, None, None), read_vit(FOLDERS / "siglip", None, None)
    for ours, theirs in zip(*both):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(torch.as_tensor(ours[key]), torch.as_tensor(theirs[key]))
                   for key in ours if key != "vit_gelu")
        assert ours.get("vit_gelu") == theirs.get("vit_gelu")
    config["vision_config"]["hidden_act"] = "gelu"  # the control: it is read
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_vit(tmp_path, None, None)[0]["vit_gelu"] == "none"


def change_config(**changes):
    def spoil(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return spoil


def change_tensors(change):
    def spoil(folder):
        tensors = {key: t.clone() for key, t in read_tensors(folder / "model.safetensors").items()}
        change(tensors)
        write_tensors(folder / "model.safetensors", tensors)
    return spoil


def rename(old: str, new: str):
    def change(tensors):
        tensors[new] = tensors.pop(old)
    return change_tensors(change)


def remove(name: str):
    return lambda folder: (folder / name).unlink()


def only_a_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def edit(name: str, old: str, new: str):
    def spoil(folder):
        text = (folder / name).read_text(encoding="utf-8")
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1), encoding="utf-8")
    return spoil


def twice(folder):
    version, first, *rest = (folder / "merges.txt").read_text(encoding="utf-8").splitlines(True)
    (folder / "merges.txt").write_text("".join([version, first, first, *rest]), encoding="utf-8")


def nothing(folder):
    pass


QUERY = "encoder.layer.0.attention.attention.query"
WTE = "transformer.wte.weight"


@pytest.mark.parametrize("name, spoil, flags, wanted", [
    ("siglip", remove("config.json"), [], "config.json"),
    ("siglip", edit("config.json", "{", "["), [], "config.json: not JSON"),
    ("siglip", lambda f: (f / "config.json").write_text("[1]"), [], "not a JSON object"),
    ("siglip", change_config(model_type="clip"), [], "model_type 'clip' is none of siglip"),
    ("siglip", change_config(model_type=["siglip"]), [], "model_type ['siglip'] is none of"),
    ("siglip", change_config(vision_config=7), [], "vision_config must be an object, not 7"),
    ("siglip", change_config(hidden_act="quick_gelu"), [], "hidden_act must be 'gelu' or"),
    ("siglip", change_config(hidden_act={}), [], "hidden_act must be"),
    ("siglip", change_config(layer_norm_eps="small"), [], "layer_norm_eps must be"),
    ("siglip", change_config(num_hidden_layers=3), [], "there is no encoder.layers.2."),
    ("siglip", change_config(num_hidden_layers=1), [], "encoder.layers.1."),
    ("siglip", change_config(num_hidden_layers="2"), [], "num_hidden_layers must be a whole"),
    ("siglip", change_config(patch_size=0), [], "patch_size must be a whole number above 0"),
    ("siglip", change_config(hidden_size=32), [], "is (16, 3, 7, 7), not (32, 3, 7, 7)"),
    ("siglip", change_config(image_size=56), [], "position_embedding.weight is (16, 16), not (64"),
    ("siglip", change_config(num_attention_heads=3), [], "must be a multiple of vit_head 3"),
    ("siglip", remove("model.safetensors"), [], "there is no model.safetensors"),
    ("siglip", only_a_pickle, [], "pickles (.bin, .pt) are not opened"),
    ("siglip", lambda f: (f / "model.safetensors").write_bytes(b"\x80\4"), [], "not a whole"),
    ("siglip", nothing, ["--vit-embd", "16"], "--vit-embd is 16 in the folder: leave it out"),
    ("siglip", nothing, ["--vit-layer", "3"], "--vit-layer must be at most 2, not 3"),
    ("siglip", nothing, ["--image-size", "6"], "--image-size at least 7, not 6"),
    ("siglip", nothing, ["--merge", "3"], "merge 3 must divide the 4 patches"),
    ("siglip", nothing, ["--block-size", "16"], "block_size 16 must be more than the 16"),
    ("siglip", nothing, ["--vit-size", "9"], "no such flag: --vit-size"),
    ("dinov2", rename(f"{QUERY}.bias", "query.bias"), [], f"there is no {QUERY}.bias"),
    ("dinov2", rename(f"{QUERY}.weight", "encoder.layer.0.fc"), [], f"there is no {QUERY}.weight"),
    ("dinov2", change_tensors(lambda t: t.update({f"{QUERY}.weight": torch.zeros(16, 8)})), [],
     f"{QUERY}.weight is (16, 8), not (16, 16)"),
    ("dinov2", change_tensors(lambda t: t.update({f"{QUERY}.weight": torch.zeros(16)})), [],
     f"{QUERY}.weight is (16,), not (16, 16)"),
    ("dinov2", change_tensors(lambda t: t.update(
        {"embeddings.register_tokens": torch.ones(1, 4, 16)})), [], "register_tokens has no place"),
    ("dinov2", rename("encoder.layer.0.mlp.fc1.weight", "encoder.layer.0.mlp.weights_in.weight"),
     [], "there is no encoder.layer.0.mlp.fc1.weight"),
    ("dinov2", change_tensors(lambda t: t.update(
        {"encoder.layer.0.mlp.fc1.weight": torch.zeros(65, 16),
         "encoder.layer.0.mlp.fc1.bias": torch.zeros(65)})), [], "mlp.fc1 makes 65 numbers, more"),
    ("dinov2", rename("embeddings.patch_embeddings.projection.weight", "patch"), [], "there is no"),
    ("gpt2", nothing, ["--n-layer", "2"], "--n-layer is 2 in the folder"),
    ("gpt2", nothing, ["--vocab-size", "500"], "--vocab-size is 403 in the folder"),
    ("gpt2", nothing, ["--block-size", "49"], "--block-size must be at most the 48 positions"),
    ("gpt2", nothing, ["--block-size", "4"], "block_size 4 must be more than the 4 visual"),
    ("gpt2", change_config(activation_function="relu"), [], "activation_function must be"),
    ("gpt2", change_config(scale_attn_by_inverse_layer_idx=True), [], "scale_attn_by_inverse"),
    ("gpt2", change_config(tie_word_embeddings=False), [], "tie_word_embeddings must be True"),
    ("gpt2", change_config(model_type="llama"), [], "model_type 'llama' is none of gpt2"),
    ("gpt2", rename("transformer.h.0.ln_1.bias", "transformer.h.0.ln"), [], "h.0.ln_1.bias"),
    ("gpt2", change_tensors(lambda t: t.update({WTE: t[WTE][:300].clone()})), [],
     "vocab.json: id 399"),
    ("gpt2", change_tensors(lambda t: t.update(
        {"transformer.h.0.crossattention.c_attn.bias": torch.ones(2)})), [], "crossattention"),
    ("gpt2", remove("vocab.json"), [], "vocab.json"),
    ("gpt2", remove("merges.txt"), [], "merges.txt"),
    ("gpt2", lambda f: (f / "merges.txt").write_text("#version: 0.2\nab\n"), [],
     "not of one GPT-2 tokenizer (line 2 is not two tokens"),
    ("gpt2", edit("merges.txt", "\n", "\n! \u0101\n"), [], "not of one GPT-2 tokenizer ('!"),
    ("gpt2", twice, [], "is made twice"),
    ("gpt2", lambda f: (f / "merges.txt").write_text("#version: 0.2\n"), [],
     "143 tokens are made by no merge"),
    ("gpt2", edit("vocab.json", '"!"', '"!!!"'), [], "not of one GPT-2 tokenizer ('!')"),
    ("gpt2", edit("vocab.json", ":1,", ':"1",'), [], "ids must be whole numbers"),
    ("gpt2", edit("vocab.json", ":1,", ":2,"), [], "no two alike"),
    ("gpt2", change_tensors(lambda t: t.update({WTE: t[WTE].to(torch.int32)})), [],
     f"{WTE} has not only finite floats"),
    ("dinov2", change_tensors(lambda t: t[f"{QUERY}.bias"].fill_(float("nan"))), [],
     f"{QUERY}.bias has not only finite floats"),
    ("dinov2", change_config(use_swiglu_ffn=True), [], "use_swiglu_ffn must be False"),
    ("siglip", change_config(layer_norm_eps=-1e-6), [], "layer_norm_eps must be a fraction above"),
])
def test_what_does_not_fit_is_one_line_and_writes_nothing(tmp_path, capsys, name, spoil, flags,
                                                          wanted):
    folder, out = tmp_path / "folder", tmp_path / "start.pt"
    shutil.copytree(FOLDERS / name, folder)
    command = ["--vit", folder, "--out", out, *SMALL]
    if name == "gpt2":
        command = ["--decoder", folder, "--out", out, *EYES]
    spoil(folder)
    before = sorted(tmp_path.rglob("*"))
    said = refused(capsys, pretrained.main, *command, *flags)
    assert wanted in said, said
    assert sorted(tmp_path.rglob("*")) == before
    if spoil is nothing:  # the control: without the flags it is written
        pretrained.main([str(word) for word in command])
        assert out.exists()


def test_what_exists_is_not_overwritten_and_what_is_not_asked_for_not_made(tmp_path, capsys):
    out = tmp_path / "start.pt"
    assert "give --vit, --decoder or both" in refused(capsys, pretrained.main, "--out", out)
    out.write_text("mine")
    said = refused(capsys, pretrained.main, "--vit", FOLDERS / "siglip", "--out", out)
    assert "exists already" in said and out.read_text() == "mine"
    missing = tmp_path / "none/start.pt"
    assert "there is no folder" in refused(capsys, pretrained.main, "--vit", FOLDERS / "siglip",
                                          "--out", missing)


def test_a_rest_of_pixels_is_said_and_pictures_are_fitted_into_what_the_patches_fill(tmp_path,
                                                                                   capsys):
    out = tmp_path / "start.pt"
    for flags, fill in (([], 28), (["--image-size", "36"], 35)):
        pretrained.main(["--vit", str(FOLDERS / "siglip"), "--out", str(out), *SMALL, *flags])
        assert f"fill {fill}, into which pictures are fitted" in capsys.readouterr().out
        assert load_file(out)["config"]["image_size"] == fill
        out.unlink()
    pretrained.main(["--vit", str(FOLDERS / "dinov2"), "--out", str(out), *SMALL])
    assert "fill" not in capsys.readouterr().out  # the control: 28 pixels are four patches of 7


# Training from them -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("data") / "tiny", n=24)


@pytest.fixture(scope="module")
def starts(tmp_path_factory):
    """Checkpoints of published weights: of a ViT, of a decoder, and of both."""
    folder, found = tmp_path_factory.mktemp("starts"), {}
    vit, decoder = ["--vit", str(FOLDERS / "dinov2"), "--merge", "2"], ["--decoder",
                                                                       str(FOLDERS / "gpt2")]
    for name, flags in (("vit", [*vit, *SMALL]), ("decoder", [*decoder, *EYES]),
                        ("vit,decoder", [*vit, *decoder]),
                        ("queries", [*vit[:2], *decoder, "--queries", "3"])):
        found[name] = folder / f"{name}.pt"
        pretrained.main([*flags, "--out", str(found[name])])
    return found


RUN = ["--steps", "4", "--eval-every", "4", "--eval-sample", "8", "--batch-size", "8", "--workers",
       "0", "--device", "cpu"]


@pytest.mark.parametrize("parts", ["vit", "decoder", "vit,decoder", "queries"])
def test_both_stages_are_trained_and_what_is_frozen_stays_bit_identical(tiny, starts, tmp_path,
                                                                        parts):
    start, frozen = starts[parts], parts if parts != "queries" else "vit,decoder"
    for out, freeze in ((tmp_path / "a", ["--freeze", frozen]), (tmp_path / "b", [])):
        train.main(["--data", str(tiny), "--init", str(start), "--align-steps", "3", *RUN, *freeze,
                    "--out", str(out)])
        assert [line["stage"] for line in metrics(out)] == ["align", "instruct", "test"]
        before, after = weights(start), weights(out / "last.pt")
        moved = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
        assert moved == (set() if freeze else set(frozen.split(",")))
    model = NanoAKI.load(out / "last.pt")
    assert isinstance(model.projector, Resampler if parts == "queries" else Projector)
    assert isinstance(model.ask(tiny / "images/test0.png", "what color is left?"), str)


def test_a_new_part_is_drawn_from_the_seed_and_cannot_be_frozen_or_asked(tiny, starts, tmp_path,
                                                                         capsys):
    flags = ["--data", tiny, "--init", starts["vit"], *RUN, "--out", tmp_path / "out"]
    for part in ("decoder", "vit,decoder"):
        said = refused(capsys, train.main, *flags, "--freeze", part)
        assert "has no decoder, so it is new: train it" in said
    said = refused(capsys, sample.main, "--model", starts["vit"], "--ask", "what?")
    assert "has no projector and no decoder yet: train.py --init" in said
    for flag in ("--n-embd", "--merge"):
        assert f"leave out {flag}" in refused(capsys, train.main, *flags, flag, 32)
    flags[3] = starts["decoder"]
    assert "leave out --block-size" in refused(capsys, train.main, *flags, "--block-size", 40)
    assert not (tmp_path / "out").exists()


def test_a_trained_checkpoint_begins_with_stage_2_unless_align_steps_is_given(
        tiny, starts, tmp_path, capsys):
    begin, first = ["--data", str(tiny), *RUN, "--init"], tmp_path / "first"
    train.main([*begin, str(starts["vit"]), "--align-steps", "2", "--steps", "0", "--out",
                str(first)])
    assert [line["stage"] for line in metrics(first)] == ["align"]
    for name, flags, stages in (("second", [], ["instruct", "test"]),
                                ("third", ["--align-steps", "2"], ["align", "instruct", "test"])):
        capsys.readouterr()
        train.main([*begin, str(first / "model.pt"), *flags, "--out", str(tmp_path / name)])
        assert [line["stage"] for line in metrics(tmp_path / name)] == stages
        assert ("stage 1 is skipped" in capsys.readouterr().out) == (name == "second")
    said = refused(capsys, train.main, *begin, first / "model.pt", "--steps", "0", "--out",
                   tmp_path / "fourth")
    assert "nothing to train" in said and not (tmp_path / "fourth").exists()


def test_the_data_choose_the_vocabulary_and_positions_of_a_new_decoder_alone(
        tiny, starts, tmp_path, capsys):
    long = shutil.copytree(tiny, tmp_path / "long")
    records = json.loads((long / "train.json").read_text())
    letters = random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=400)
    records[0]["conversations"][0]["value"] = "<image>\n" + "".join(letters)
    (long / "train.json").write_text(json.dumps(records))
    train.main(["--data", str(long), "--init", str(starts["vit"]), "--align-steps", "1", *RUN,
                "--out", str(tmp_path / "out")])
    config = NanoAKI.load(tmp_path / "out/last.pt").config
    began = load_file(starts["vit"])["config"]
    assert config.block_size > 200 > began["block_size"]
    assert config.vocab_size < began["vocab_size"]
    said = refused_at_last(capsys, train.main, "--data", long, "--init", starts["vit"],
                           "--block-size", 100, *RUN, "--out", tmp_path / "none")
    assert "more than the model's 100 positions" in said  # where it is given, it holds
    said = refused_at_last(capsys, train.main, "--data", long, "--init", starts["decoder"], *RUN,
                           "--out", tmp_path / "none")
    assert "more than the model's 48 positions" in said  # GPT-2's has those that it has


@pytest.mark.parametrize("freeze", ["vit", "vit,decoder", ""])
def test_frozen_parts_have_no_dropout_before_an_evaluation_and_after(tiny, starts, tmp_path,
                                                                     monkeypatch, freeze):
    modes, real = set(), train.Run.step

    def watched(self, *how):
        modes.add((self.model.vit.training, self.model.decoder.training,
                   self.model.projector.training))
        return real(self, *how)

    monkeypatch.setattr(train.Run, "step", watched)
    train.main(["--data", str(tiny), "--init", str(starts["vit,decoder"]), "--align-steps", "2",
                *RUN, "--dropout", "0.2", "--out", str(tmp_path / "out"), "--augment",
                "--freeze", freeze])
    assert modes == {("vit" not in freeze, "decoder" not in freeze, True)}


def test_a_frozen_decoder_gives_the_same_loss_twice_with_dropout(starts):
    torch.manual_seed(0)
    model = NanoAKI.load(starts["vit,decoder"], new_parts=True).train()
    model.config.dropout = 0.5
    tokens = torch.tensor([[Tokenizer.image] * 4 + [104, Tokenizer.answer, 105, Tokenizer.eos]])
    roles = torch.tensor([[IMAGE] * 4 + [PROMPT] * 2 + [ANSWER] * 2])
    picture = torch.zeros(1, 3, 28, 28, dtype=torch.uint8)
    assert not torch.equal(model(picture, tokens, roles)[0], model(picture, tokens, roles)[0])
    model.decoder.eval()
    assert torch.equal(model(picture, tokens, roles)[0], model(picture, tokens, roles)[0])


def test_a_comparison_begins_both_stages_from_them_and_knows_where_it_began(tiny, starts, tmp_path,
                                                                            capsys):
    def planned(init, *more):
        argv = ["--data", tiny, "--init", init, "--freeze", "vit", "--align-steps", 2, *RUN,
                "--lr", 0.01, "--seeds", 1, "--masks", "mma,text", "--out", tmp_path / "out", *more]
        flags = vars(compare.make_parser().parse_args([str(word) for word in argv]))
        return compare.plan(flags.pop("masks"), flags.pop("seeds"), flags.pop("jobs"), flags)

    c, before = planned(starts["vit"]), weights(starts["vit"])
    first, trials, second = c.phases(0.01)
    assert [run.folder.name for run in first] == ["align-data", "align-text"] and not trials
    for run in first + second:
        train.main(c.next_command(run)[2:])
        after = weights(run.folder / "last.pt")
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert run.trained()
        c.refuse_other_flags(run)  # the control: none is another
    for one, two in zip(first, second):
        assert two.flags["init"] == str(one.folder / "last.pt")
        assert [line["stage"] for line in metrics(one.folder)] == ["align"]
        assert [line["stage"] for line in metrics(two.folder)] == ["instruct"]
    other = starts["vit"].with_name("other.pt")
    shutil.copy(starts["vit"], other)
    for changed, wanted in ((planned(other), "align-data: --init was"),
                            (planned(starts["vit"], "--batch-size", 9), "--batch-size was 8")):
        with pytest.raises(ValueError, match=wanted):
            changed.refuse_other_flags(changed.phases(0.01)[0][0])


# The resampler ------------------------------------------------------------------------------------


def test_a_resampler_gives_its_number_of_tokens_whatever_the_order_of_patches():
    config = tiny_config(queries=3, image_size=16)
    assert config.visual_tokens == 3 and tiny_config(image_size=16).visual_tokens == 16
    patches, order = torch.randn(2, 16, 32), torch.randperm(16)
    torch.manual_seed(0)
    ours, theirs = Resampler(config), Projector(tiny_config(image_size=16, merge=2))
    assert ours(patches).shape == (2, 3, 32)
    assert torch.allclose(ours(patches), ours(patches[:, order]), atol=1e-6)
    assert not torch.allclose(ours(patches), ours(patches.flip(2)), atol=1e-3)
    assert not torch.allclose(theirs(patches), theirs(patches[:, order]), atol=1e-3)


def test_queries_do_not_go_with_merged_patches():
    with pytest.raises(ValueError, match="queries 4 .* merge must be 1, not 2"):
        tiny_config(queries=4, merge=2)
    tiny_config(queries=4)


def test_a_model_with_queries_returns_from_its_file_bit_for_bit(tmp_path):
    model = tiny_model(torch.float32, queries=VISUAL)
    model.save(tmp_path / "model.pt")
    roles = torch.tensor([[IMAGE] * VISUAL + [PROMPT] * 3])
    images, tokens = fill(roles)
    loaded = NanoAKI.load(tmp_path / "model.pt")
    assert torch.equal(loaded(images, tokens, roles)[0], model(images, tokens, roles)[0])
    assert not torch.equal(Model(model.config).eval()(images, tokens, roles)[0],
                           model(images, tokens, roles)[0])
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    del state["model"]["projector.queries"]
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="projector.queries"):
        NanoAKI.load(tmp_path / "model.pt")


def test_queries_read_the_prompt_under_mma_alone_and_no_answer_leaks_through_them():
    model = tiny_model(queries=VISUAL)
    roles = torch.tensor([[IMAGE] * VISUAL + [PROMPT] * 3 + [ANSWER] * 3])
    images, tokens = fill(roles)
    asked, answered = tokens.clone(), tokens.clone()
    asked[0, VISUAL], answered[0, -1] = (tokens[0, VISUAL] + 1) % 256, (tokens[0, -1] + 1) % 256
    for mask, reads in (("causal", False), ("mma", True)):
        states = model.hidden(images, tokens, roles, mask)
        moved = model.hidden(images, asked, roles, mask) - states
        assert bool(moved[0, :VISUAL].abs().max() > 1e-6) == reads
        assert torch.equal(model.hidden(images, answered, roles, mask)[:, :-1], states[:, :-1])
    leaks = model.hidden(images, answered, roles, "leaky") - model.hidden(images, tokens, roles,
                                                                         "leaky")
    assert leaks[0, VISUAL:-1].abs().max() > 1e-6  # the control
