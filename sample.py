"""
Ask a trained model: about pictures, or everything in a split of a dataset.

    python sample.py --image scene.png --ask "what color is the circle?" "is there a red square?"
    python sample.py --image scene.png               # an interactive prompt
    python sample.py --image left.png right.png --ask "what differs?"   # one question, two pictures
    python sample.py --data data/shapes-seed0 --split test              # a whole split: a table
"""
import json
import sys
from pathlib import Path

import torch
from PIL import Image

from data import shapes
from data.llava import Examples, read_split
from engine.device import autocast, choose_device
from engine.evaluation import report
from engine.flags import Parser, flag, one_line, run_script
from engine.folder import write_whole
from nanoaki import MASKS, NanoAKI, open_picture


def print_answer(model: NanoAKI, pictures: list[Image.Image], question: str, limit: int,
           **sampling) -> None:
    """Print the answer as it is generated; a character of several tokens once it is complete."""
    ids, shown = [], ""
    for (new,) in model.stream(*model.prompt([pictures], [question]), limit, **sampling):
        ids.append(new)
        text = model.tokenizer.decode(ids)
        if not text.endswith("\ufffd"):
            print(text[len(shown):], end="", flush=True)
            shown = text
    print(model.tokenizer.decode(ids)[len(shown):])


def prompt(model: NanoAKI, pictures: list[Image.Image], limit: int, **sampling) -> None:
    """Answer a question a line, each on its own, until there are no more."""
    try:
        while True:
            question = input("> ")
            if not question:
                return
            try:
                print_answer(model, pictures, question, limit, **sampling)
            except ValueError as e:
                print(e)
    except EOFError:
        print()


def ask_split(model: NanoAKI, args) -> None:
    """Ask everything in a split: a table, and in the file --out a line per question."""
    split = args.split or "test"
    records = read_split(shapes.find(args.data), split, args.skip_bad)
    examples = Examples(records, model.tokenizer, model.config, args.skip_bad)
    answered = report(model, examples, split, list(range(len(examples))), args.mask,
                      dtype=args.dtype)
    if args.out:
        lines = [json.dumps(a._asdict()) + "\n" for a in answered]
        write_whole(args.out, "".join(lines))


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--model", default="out/shapes/model.pt",
                        help="checkpoint (default %(default)s)")
    parser.add_argument("--image", nargs="+", metavar="FILE",
                        help="pictures; all of them belong to every question (default: none)")
    parser.add_argument("--ask", nargs="+", metavar="QUESTION",
                        help="questions; standard output gets their answers, a line each")
    parser.add_argument("--data", metavar="DIR",
                        help="ask a whole split of this dataset, 'shapes' or a folder, instead")
    parser.add_argument("--split", metavar="NAME", help="of --data (default test)")
    parser.add_argument("--out", metavar="FILE", help="with --data: a line of JSON per question")
    parser.add_argument("--skip-bad", action="store_true",
                        help="with --data: leave bad records out, counted")
    parser.add_argument("--max-new-tokens", type=int,
                        help="longest answer, in tokens (default: what fits)")
    parser.add_argument("--temperature", type=float,
                        help="0 takes the likeliest token, more draws more freely (default 0)")
    parser.add_argument("--top-k", type=int,
                        help="draw from the k likeliest tokens only (default: from all)")
    parser.add_argument("--mask", choices=MASKS, help="attend under another mask than the model's")
    parser.add_argument("--seed", type=int, help="of what is drawn (default 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default auto)")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"],
                        help="auto is bfloat16 on recent GPUs (default auto)")
    return parser


def check(args) -> None:
    """Raise ValueError where flags make no sense, or not together."""
    if args.temperature and not 0.01 <= args.temperature <= 100:
        raise ValueError(f"--temperature must be 0, or between 0.01 and 100, not "
                         f"{args.temperature}")
    for name, value, least in (("top-k", args.top_k, 1), ("max-new-tokens", args.max_new_tokens, 1),
                               ("seed", args.seed, 0)):
        if value is not None and not least <= value < 2 ** 62:
            raise ValueError(f"--{name} must be at least {least}, not {value}")
    if any(not question.strip() for question in args.ask or []):
        raise ValueError("--ask: a question is empty")
    for name in ("image", "ask", "max_new_tokens", "temperature", "top_k", "seed"):
        if args.data and getattr(args, name) is not None:
            raise ValueError(f"{flag(name)} does not go with --data: a split is asked greedily")
    for name in ("split", "out", "skip_bad"):
        if not args.data and getattr(args, name):
            raise ValueError(f"{flag(name)} needs --data")
    if args.out and Path(args.out).exists():
        raise ValueError(f"{args.out} exists already: remove it, or name another with --out")
    if args.out and not Path(args.out).absolute().parent.is_dir():
        raise ValueError(f"--out: there is no folder {Path(args.out).parent}")


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    with one_line():
        check(args)
        torch.manual_seed(args.seed or 0)
        device, reason = choose_device(args.device, args.dtype)
        model = NanoAKI.load(args.model).to(device)
        if model.tokenizer is None:
            raise ValueError(f"{args.model} was saved without a tokenizer: it cannot be asked")
        if args.data:
            print(reason)
            ask_split(model, args)
            return
        pictures = [open_picture(path) for path in args.image or []]
        limit = args.max_new_tokens or model.config.block_size
        sampling = {"temperature": args.temperature or 0.0, "top_k": args.top_k, "mask": args.mask}
        with autocast(device, args.dtype):
            if args.ask is None:
                print(f"{reason}; a question a line, an empty one or Ctrl-D to leave")
                prompt(model, pictures, limit, **sampling)
                return
            answers = model.ask([pictures] * len(args.ask), args.ask, limit, **sampling)
        print(reason, file=sys.stderr)
        for answer in answers:
            print(answer.replace("\n", "\\n"))


if __name__ == "__main__":
    run_script(main)
