"""
Estimate the memory of training from a checkpoint, from shapes and dtypes alone.

    python engine/memory.py start.pt
    python engine/memory.py start.pt --freeze vit,decoder --batch-size 32
    python engine/memory.py start.pt --dtype float32 --tokens 128

Steps are made with torch's fake tensors, which have shapes and no numbers: nothing is computed.
"""
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if __name__ == "__main__":  # a script's folder is on the path, the repository's root is not
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from engine.flags import Parser, one_line, run_script
from engine.optimizer import make_optimizers
from nanoaki import ANSWER, IMAGE, Batch, Config, Model, load_file


class Held(TorchDispatchMode):
    """Within, the bytes that tensors hold now, and the most that they held at once."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.most = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if torch.is_tensor(tensor):
                self.count(tensor.untyped_storage())
        return made

    def count(self, storage: torch.UntypedStorage) -> None:
        """Once for all tensors that share it, until it is let go."""
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.let_go, key)

    def let_go(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def make_batch(c: Config, size: int, text: int, seen: bool) -> Batch:
    """Examples of a picture and an answer of so many tokens, all of them learned.

    seen: of the pictures there is what a frozen ViT has said.
    """
    V, T = c.visual_tokens, c.visual_tokens + text
    images = torch.zeros(size, 3, c.image_size, c.image_size, dtype=torch.uint8)
    if seen:
        images = torch.zeros(size, c.patches, c.vit_embd, dtype=torch.float16)
    flat, roles = torch.arange(size * T).view(size, T), torch.full((size, T), ANSWER)
    roles[:, :V] = IMAGE
    return Batch(images, torch.arange(size), torch.zeros_like(roles), roles,
                 torch.zeros_like(roles), flat[:, :V].flatten(), flat[:, V:].flatten(), V - 1, [],
                 problem="", unread=[])


def estimate(c: Config, batch_size: int, text: int, freeze: list[str], dtype: str) -> dict:
    """Bytes by what holds them, and the most at once, in two steps of training.

    Raises ValueError where the text does not fit the model's positions.
    """
    if c.visual_tokens + text > c.block_size:
        raise ValueError(f"--tokens {text} and {c.visual_tokens} visual tokens are more than the "
                         f"model's {c.block_size} positions")
    with FakeTensorMode(), Held() as held:
        model = Model(c).train()
        for part in freeze:
            getattr(model, part).requires_grad_(False)
        weights, optimizers = held.now, make_optimizers(model, 0.1, 0.1, 0.0)
        batch = make_batch(c, batch_size, text, "vit" in freeze)
        given = held.now
        for _ in range(2):  # the optimizers' states come with the first
            before = held.now
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                loss = model.loss(batch)
            kept = held.now - before
            loss.backward()
            del loss
            gradients = held.now - before
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        states = held.now - given
    return {"weights": weights, "their gradients": gradients, "the optimizers' states": states,
            "kept of the forward pass for the backward one": kept, "at once, at most": held.most}


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("model", metavar="FILE", help="a checkpoint, as engine/pretrained.py's")
    parser.add_argument("--batch-size", type=int, default=8, help="examples a step, each with a "
                        "picture of its own: a part of it with --grad-accum (default 8)")
    parser.add_argument("--tokens", type=int, default=64, help="of text, all learned (default 64)")
    parser.add_argument("--freeze", default="", help="as train.py's, without its --augment")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"],
                        help="to compute in (default bfloat16)")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    with one_line():
        freeze = [part for part in args.freeze.split(",") if part]
        for name, value in (("batch-size", args.batch_size), ("tokens", args.tokens)):
            if value < 1:
                raise ValueError(f"--{name} must be at least 1, not {value}")
        if not set(freeze) <= {"vit", "decoder"}:
            raise ValueError(f"--freeze {args.freeze!r} must be vit, decoder or vit,decoder")
        state = load_file(args.model)
        config = Config(**state["config"])
        if not any(name.startswith("decoder.") for name in state["model"]):
            # a new one gets the positions that the data ask for
            config = replace(config, block_size=config.visual_tokens + args.tokens)
        found = estimate(config, args.batch_size, args.tokens, freeze, args.dtype)
        print(f"steps of {args.batch_size} examples, {config.visual_tokens} visual tokens and "
              f"{args.tokens} of text each, in {args.dtype}:")
        for name, size in found.items():
            print(f"{size / 1e9:8.2f} GB  {name}")


if __name__ == "__main__":
    run_script(main)
