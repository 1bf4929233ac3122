"""
Ask a trained model: about pictures, or everything in a split of a dataset.

    python sample.py --image scene.png --ask "what color is the circle?" "is there a red square?"
    python sample.py --image scene.png               # an interactive prompt
    python sample.py --image left.png right.png --ask "what differs?"   # one question, two pictures
    python sample.py --image scene.png --system "Be brief." --history "how many?" "2" --ask "sure?"
    python sample.py --image scene.png --chat        # each answer is history of the next question
    python sample.py --data data/shapes-seed0 --split test              # a whole split: a table

Without --chat each question stays on its own: a model that was trained on single questions, as the
default one is, answers a second turn badly.
"""
import json
import os
import sys
from pathlib import Path

import torch

from data import shapes
from data.llava import Examples, read_split
from engine.device import autocast, choose_device
from engine.evaluation import report
from engine.flags import Parser, check_asked, escaped, flag, one_line, run_script
from engine.folder import check_writable, write_whole
from nanoaki import MASKS, NanoAKI, fit_picture

COMMANDS = "in a --chat /new begins another, without pictures, and /image FILE shows one"


def print_answer(model: NanoAKI, pictures: list[str], texts: list[str], system, **how) -> str:
    """Print the answer to texts (questions and answers in turn) as it comes, and return it."""
    ids, shown, history = [], "", list(zip(texts[::2], texts[1::2]))
    for (new,) in model.stream(*model.prompt([pictures], texts[-1:], history, system), **how):
        ids.append(new)
        text = model.tokenizer.decode(ids)
        print(escaped(text[len(shown):], keep="\n\t"), end="", flush=True)
        shown = text
    print()
    return shown


def prompt(model: NanoAKI, first: list[str], history: list[str], chat: bool, **how) -> None:
    """Answer a question a line: each on its own after pictures and history, or all in a chat."""
    pictures, texts = first, history
    try:
        while line := input("> "):
            command, _, path = line.partition(" ")
            try:
                if chat and command == "/new":
                    first, pictures, texts = [], [], []
                elif chat and command == "/image" and path.strip():
                    path = os.path.expanduser(path.strip().strip("\"'"))
                    fit_picture(path, model.config.image_size)
                    pictures = [*pictures, path]
                    print(f"{path} is shown with the next question")
                elif command.startswith("/"):
                    print(COMMANDS)
                elif not chat:
                    print_answer(model, first, [*history, line], **how)
                else:
                    asked = write_pictures([*texts, line], len(first), len(pictures))
                    texts = [*asked, print_answer(model, pictures, asked, **how)]
            except ValueError as e:
                print(e)
    except EOFError:
        print()


def write_pictures(texts: list[str], first: int, pictures: int) -> list[str]:
    """Texts of a chat, questions and answers in turn, with an <image> for each of its pictures.

    The first of them, those of --image, belong to the first question, others to the last.
    """
    *texts, question = texts
    written, asked = sum(text.count("<image>") for text in texts[::2]), question.count("<image>")
    if texts and not written and asked in (0, pictures - first):
        texts[0], written = "<image>" * first + texts[0], first
    if not asked:
        question = "<image>" * (pictures - written) + question
    return [*texts, question]


def ask_split(model: NanoAKI, args) -> None:
    """Ask everything in a split: a table, and in the file --out a line per question."""
    split = args.split or "test"
    records = read_split(shapes.find(args.data), split, args.skip_bad)
    examples = Examples(records, model.tokenizer, model.config, args.skip_bad)
    indices = examples.readable(list(range(len(examples))))
    answered = report(model, examples, split, indices, args.mask, dtype=args.dtype)
    if args.out is not None:
        lines = [json.dumps(a._asdict(), ensure_ascii=False) + "\n" for a in answered]
        write_whole(args.out, "".join(lines))


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--model", default="out/shapes/model.pt",
                        help="checkpoint (default %(default)s)")
    parser.add_argument("--image", nargs="+", action="extend", metavar="FILE",
                        help="pictures of every question, or of a chat's first (default: none)")
    parser.add_argument("--ask", nargs="+", action="extend", metavar="QUESTION",
                        help="questions; standard output gets their answers, a line each")
    parser.add_argument("--system", metavar="TEXT", help="text that stands before all questions")
    parser.add_argument("--history", nargs="+", action="extend", metavar="TEXT",
                        help="what was said before, questions and answers in turn: Q A [Q A ...]")
    parser.add_argument("--chat", action="store_true", default=None,
                        help="each answer is history of the next question, which a model trained "
                             "on single ones, as the default, answers badly")
    parser.add_argument("--data", metavar="DIR",
                        help="ask a whole split of this dataset, 'shapes' or a folder, instead")
    parser.add_argument("--split", metavar="NAME", help="of --data (default test)")
    parser.add_argument("--out", type=Path, metavar="FILE",
                        help="with --data: a line of JSON per question")
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
    check_asked(args.ask or [])
    if len(args.history or []) % 2:
        raise ValueError(f"--history: {len(args.history)} texts, not pairs of question and answer")
    if args.chat and args.ask:
        raise ValueError("--ask does not go with --chat: its questions are typed")
    for name in ("image", "ask", "system", "history", "chat", "max_new_tokens", "temperature",
                 "top_k", "seed"):
        if args.data is not None and getattr(args, name) is not None:
            raise ValueError(f"{flag(name)} does not go with --data: it asks as written, greedily")
    for name in ("split", "out", "skip_bad"):
        if args.data is None and getattr(args, name):
            raise ValueError(f"{flag(name)} needs --data")
    if args.out is not None:
        if os.path.lexists(args.out):
            raise ValueError(f"--out: {args.out} exists already: name another")
        if not args.out.absolute().parent.is_dir():
            raise ValueError(f"--out: there is no folder {args.out.parent}")
        check_writable(args.out.absolute().parent)


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    with one_line():
        check(args)
        torch.manual_seed(args.seed or 0)
        device, reason = choose_device(args.device, args.dtype)
        model = NanoAKI.load(args.model).to(device)
        if model.tokenizer is None:
            raise ValueError(f"{args.model} was saved without a tokenizer: it cannot be asked")
        if args.data is not None:
            print(reason)
            ask_split(model, args)
            return
        pictures, texts = args.image or [], args.history or []
        for path in pictures:
            fit_picture(path, model.config.image_size)  # or it is refused, before any question is
        how = {"max_new_tokens": args.max_new_tokens or model.config.block_size,
               "temperature": args.temperature or 0.0, "top_k": args.top_k, "mask": args.mask,
               "system": args.system}
        with autocast(device, args.dtype):
            if args.ask is None:
                print(f"{reason}; a question a line, an empty one or Ctrl-D to leave")
                if args.chat:
                    print(COMMANDS)
                prompt(model, pictures, texts, args.chat, **how)
                return
            history = list(zip(texts[::2], texts[1::2]))
            answers = model.ask([pictures] * len(args.ask), args.ask, history=history, **how)
        print(reason, file=sys.stderr)
        for answer in answers:
            print(escaped(answer))


if __name__ == "__main__":
    run_script(main)
