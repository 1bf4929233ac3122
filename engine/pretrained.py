"""
Make a checkpoint to begin from of published weights, in folders as the Hugging Face hub has them.

    python engine/pretrained.py --vit siglip-base-patch16-224 --decoder gpt2 --out start.pt
    python engine/pretrained.py --vit dinov2-small --image-size 224 --merge 2 --out start.pt
    python train.py --init start.pt --data DIR

A ViT is SigLIP's (arXiv 2303.15343) or DINOv2's (2304.07193), a decoder is GPT-2's; what no folder
brings is new, of a preset and its flags. Nothing is downloaded, and no pickle is opened.
"""
import sys
from dataclasses import asdict, replace
from pathlib import Path

if __name__ == "__main__":  # a script's folder is on the path, the repository's root is not
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from engine.families import read_decoder, read_vit
from engine.flags import Parser, flag, one_line, quoted, run_script
from engine.published import read_json
from nanoaki import PRESETS, Config, save_file


def read_merges(folder: Path) -> tuple[list[tuple[int, int]], list[int]]:
    """A tokenizer's merges in our ids, and the folder's id of each of ours; raises ValueError."""
    path, ids = folder / "merges.txt", read_json(folder / "vocab.json")
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that stand for themselves
    hidden = [i for i in range(256) if i not in shown]
    names = {i: chr(i) for i in shown} | {i: chr(256 + n) for n, i in enumerate(hidden)}
    names |= dict.fromkeys(range(256, 260), "<|endoftext|>")  # <eos>; of the others none is used
    known, merges = {name: i for i, name in names.items()}, []
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if line and not line.startswith("#version"):
                if line.count(" ") != 1:
                    raise ValueError(f"line {number} is not two tokens")
                a, b = line.split(" ")
                merges.append((known[a], known[b]))
                if a + b in known:
                    raise ValueError(f"{a + b} is made twice")
                known[a + b] = len(names)
                names[len(names)] = a + b
        rows = [ids[names[i]] for i in range(len(names))]
        if len(ids) > len(known):
            raise ValueError(f"{len(ids) - len(known)} tokens are made by no merge")
    except (ValueError, KeyError) as e:
        raise ValueError(f"{path}: it and vocab.json are not of one GPT-2 tokenizer ({e})") from e
    if not all(type(i) is int and i >= 0 for i in ids.values()) or len(set(rows)) < len(ids):
        raise ValueError(f"{folder / 'vocab.json'}: ids must be whole numbers from 0 on, no two "
                         f"alike")
    return merges, rows


def make(vit: str, decoder: str, preset: str, out: str, flags: dict) -> None:
    """Write the checkpoint; raises ValueError where flags and folders do not go together."""
    if not vit and not decoder:
        raise ValueError("give --vit, --decoder or both: folders of published weights")
    if not out or Path(out).exists():
        raise ValueError(f"--out {out!r} exists already, or is no name: choose another")
    if not Path(out).parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {Path(out).parent}")
    brought, weights, merges = {}, {}, None
    if vit:
        about, found = read_vit(Path(vit), flags.pop("image_size", None),
                                flags.pop("vit_layer", None))
        brought |= about
        weights |= {f"vit.{name}": weight for name, weight in found.items()}
    if decoder:
        merges, rows = read_merges(Path(decoder))
        about, found = read_decoder(Path(decoder), rows, flags.pop("block_size", None))
        brought |= about
        weights |= {f"decoder.{name}": weight for name, weight in found.items()}
    for name in flags:
        if name in brought:
            raise ValueError(f"{flag(name)} is {brought[name]} in the folder: leave it out")
    chosen, few = flags | brought, PRESETS[preset].block_size
    config = replace(PRESETS[preset], **{"block_size": 1 << 20} | chosen)
    if "block_size" not in chosen:  # train.py makes more of it where data ask for it
        config = replace(config, block_size=config.visual_tokens + few)
    save_file({"config": asdict(config), "merges": merges, "model": weights}, out)
    new = [part for part, folder in (("vit", vit), ("projector", ""), ("decoder", decoder))
           if not folder]
    command = quoted(["python", "train.py", "--init", str(out), "--data", "DIR"])
    print(f"{out}: {config.visual_tokens} visual tokens a picture, {config.block_size} positions; "
          f"new will be: {', '.join(new)}; to train it: {command}")


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--vit", default="", help="folder of a SigLIP or DINOv2")
    parser.add_argument("--decoder", default="", help="folder of a GPT-2 and its vocabulary")
    parser.add_argument("--preset", default="nano", choices=list(PRESETS),
                        help="of what is new (default nano)")
    parser.add_argument("--out", required=True, help="checkpoint to write")
    parser.add_fields("model: of what is new; of a folder, pictures, blocks and positions to keep",
                      Config)
    return parser


def main(argv: list[str] | None = None) -> None:
    flags = vars(make_parser().parse_args(argv))
    with one_line():
        make(*(flags.pop(name) for name in ("vit", "decoder", "preset", "out")), flags)


if __name__ == "__main__":
    run_script(main)
