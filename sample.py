"""
Ask a trained model about a picture.

    python sample.py --image scene.png --ask "what color is the circle?" "is there a red square?"
    python sample.py --image scene.png               # an interactive prompt
    python sample.py --image left.png right.png --ask "what differs?"   # one question, two pictures
"""
import argparse
import difflib
import os
import sys
from pathlib import Path

import torch
from PIL import Image

from nanoaki import MASKS, NanoAKI

# Command line: one clear line where it is wrong, for all scripts ----------------------------------


def fail(message) -> None:
    """One clear line, exit code 2."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(2)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and which suggests the nearest flag."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message):
        fail(f"{message} (--help lists the flags)")

    def parse_args(self, args=None, namespace=None):
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = list(self._option_string_actions)
            near = difflib.get_close_matches(unknown[0].split("=")[0], flags, 1)
            hint = f"did you mean {near[0]}?" if near else "--help lists the flags"
            fail(f"no such flag: {unknown[0]}; {hint}")
        return known


# Device -------------------------------------------------------------------------------------------


def choose_device(name: str, dtype: str = "auto") -> tuple[torch.device, str]:
    """The device asked for, or the best there is, and a line that says why; raises ValueError."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name != "auto" and not has.get(name):
        raise ValueError(f"device {name!r} must be auto or one that torch {torch.__version__} "
                         f"finds here: {', '.join(d for d in has if has[d])}")
    device = name if name != "auto" else next(d for d in has if has[d])
    if device == "cuda":
        number, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if number >= gpus:
            raise ValueError(f"process {number} of this machine has no GPU: there are {gpus}")
        torch.cuda.set_device(number)
    why = {"cuda": "a CUDA GPU was found", "mps": "an Apple GPU was found", "cpu": "no GPU found"}
    what = f"{torch.get_num_threads()} threads"
    if device == "cuda":
        what = torch.cuda.get_device_name()
    what += ", bfloat16" if in_bfloat16(device, dtype) else ", float32"
    reason = "asked for" if name != "auto" else why[device]
    return torch.device(device), f"device: {device}, {what} ({reason})"


def in_bfloat16(device: str, dtype: str) -> bool:
    return dtype == "bfloat16" or dtype == "auto" and device == "cuda"


def autocast(device: torch.device, dtype: str = "auto") -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=in_bfloat16(device.type, dtype))


# Asking -------------------------------------------------------------------------------------------


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
