"""
Ask a trained model about a picture.

    python sample.py --image scene.png --ask "what color is the circle?" "is there a red square?"
    python sample.py --image scene.png               # an interactive prompt
    python sample.py --image left.png right.png --ask "what differs?"   # one question, two pictures
"""
import sys

import torch
from PIL import Image

from nanoaki import MASKS, NanoAKI
from train import Parser, autocast, choose_device, fail


def open_picture(path: str) -> Image.Image:
    """The picture in a file, decoded; raises ValueError, naming the file, if there is none."""
    try:
        image = Image.open(path)
        image.load()
        return image
    except OSError as e:
        reason = e.strerror or "not a picture that Pillow can read, such as PNG or JPEG"
        raise ValueError(f"{path}: {reason}") from e
    except Exception as e:  # Pillow raises whatever the bytes make it raise
        raise ValueError(f"{path}: the picture cannot be read ({e})") from e


def stream(model: NanoAKI, pictures: list[Image.Image], question: str, limit: int,
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


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--model", default="out/shapes/model.pt",
                        help="checkpoint (default %(default)s)")
    parser.add_argument("--image", nargs="+", default=[], metavar="FILE",
                        help="pictures; all of them belong to every question (default: none)")
    parser.add_argument("--ask", nargs="+", metavar="QUESTION",
                        help="questions; standard output gets their answers, a line each")
    parser.add_argument("--max-new-tokens", type=int,
                        help="longest answer, in tokens (default: what fits)")
    parser.add_argument("--temperature", type=float, default=0.0,
                        help="0 takes the likeliest token, more draws more freely (default 0)")
    parser.add_argument("--top-k", type=int,
                        help="draw from the k likeliest tokens only (default: from all)")
    parser.add_argument("--mask", choices=MASKS, help="attend under another mask than the model's")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default auto)")
    args = parser.parse_args(argv)
    if args.temperature != 0 and not 0.01 <= args.temperature <= 100:
        fail(f"--temperature must be 0, or between 0.01 and 100, not {args.temperature}")
    for name, value, least in (("top-k", args.top_k, 1), ("max-new-tokens", args.max_new_tokens, 1),
                               ("seed", args.seed, 0)):
        if value is not None and not least <= value < 2 ** 62:
            fail(f"--{name} must be at least {least}, not {value}")
    if any(not question.strip() for question in args.ask or []):
        fail("--ask: a question is empty")
    try:
        torch.manual_seed(args.seed)
        device, reason = choose_device(args.device)
        model = NanoAKI.load(args.model).to(device)
        pictures = [open_picture(path) for path in args.image]
        limit = args.max_new_tokens or model.config.block_size
        sampling = {"temperature": args.temperature, "top_k": args.top_k, "mask": args.mask}
        with autocast(device):
            if args.ask:
                answers = model.ask([pictures] * len(args.ask), args.ask, limit, **sampling)
                print(reason, file=sys.stderr)
                for answer in answers:
                    print(answer.replace("\n", "\\n"))
                return
            print(f"{reason}; a question a line, Ctrl-D to leave")
            while question := input("> "):
                try:
                    stream(model, pictures, question, limit, **sampling)
                except ValueError as e:
                    print(e)
    except EOFError:
        print()
    except ValueError as e:
        fail(e)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a console may not know every character
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130)
