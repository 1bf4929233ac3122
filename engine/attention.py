"""What a model attends to while it answers, and what that does to its states."""
import re
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from engine.cells import runs
from nanoaki import ANSWER, IMAGE, PROMPT, NanoAKI, Tokenizer

# Chinese and Japanese have no spaces: a character, with the marks that follow it, is a word.
CJK = r"\u3001-\u312f\u31a0-\u9fff\uf900-\ufaff\uff00-\uff9f\U00020000-\U0003ffff"
WORD = re.compile(rf"\s*(?:[{CJK}][\u3099\u309a\ufe00-\ufe0f]*|[^\s{CJK}]+)")
CHARACTER = r"(?s).|\Z"  # the end has no text
MARKS = {Tokenizer.answer: "<answer>", Tokenizer.eos: "<eos>"}  # tokens without text


class Recorder(TorchFunctionMode):
    """Within, masked attention is computed openly, and its weights are kept, call by call.

    torch hands every call of a function of its own to this mode, so that the model need not know.
    """

    def __init__(self):
        super().__init__()
        self.weights = []  # of each call (B, heads, queries, keys), float32

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not F.scaled_dot_product_attention or args[3] is None:  # the ViT has no mask
            return function(*args, **(kwargs or {}))
        q, k, v, mask = args
        scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~mask, float("-inf"))
        self.weights.append(scores.float().softmax(-1))
        return self.weights[-1].to(v.dtype) @ v


class Attention(NamedTuple):
    answer: str
    words: list[str]  # of the prompt, <answer> last
    tokens: list[str]  # of the answer, joined to characters; <eos> where the model has ended
    looks: Tensor     # (layers, heads, tokens, visual tokens): what each was predicted from; mean
    reads: Tensor     # (layers, heads, words, visual tokens): how much each visual token reads it
    weights: Tensor   # (layers, heads, T, T), all of them: rows are queries, columns keys
    roles: Tensor     # (T,)
    ids: list[int]    # of the T tokens, and of one more, the last, which is not attended from
    logits: Tensor    # (generated tokens, vocab_size): what each was chosen by


def split_tokens(tokenizer: Tokenizer, ids: list[int], pattern, start: int = 0):
    """(positions, text) of tokens: parts, each from where a find of the pattern begins a token."""
    pieces = [tokenizer.bytes[i] if i < len(tokenizer) else b"" for i in ids]
    whole = b"".join(pieces).decode("utf-8", "surrogateescape")
    begins = {len(whole[:found.start()].encode("utf-8", "surrogateescape"))
              for found in re.finditer(pattern, whole)}
    parts, at = [], 0
    for i, piece in enumerate(pieces, start):
        if at in begins or not parts:
            parts.append(([], b""))
        parts[-1] = parts[-1][0] + [i], parts[-1][1] + piece
        at += len(piece)
    return [(some, part.decode("utf-8", "backslashreplace")) for some, part in parts]


def prompt_words(tokenizer: Tokenizer, ids: list[int], roles: list[int]):
    """(positions, text) of each WORD of a prompt, parted by pictures and marks; a mark is one."""
    marks = [MARKS.get(i) for i in ids]
    words = []
    for start, stop in runs(list(zip(roles, marks))):
        if marks[start] is not None:
            words.append(([start], marks[start]))
        elif roles[start] == PROMPT:
            words += [(some, word.strip())
                      for some, word in split_tokens(tokenizer, ids[start:stop], WORD, start)]
    return words


def token_labels(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """What each token is called: its text, or, of a character's parts, which part it is."""
    labels = []
    for some, text in split_tokens(tokenizer, ids, CHARACTER):
        for n, i in enumerate(some, 1):
            part = f" {n}/{len(some)}" if len(some) > 1 else ""
            mark = MARKS.get(ids[i])
            labels.append((text or f"<{ids[i]}>") + part if mark is None else f" {mark}")
    return labels


def attention_maps(model: NanoAKI, pictures: list, question: str, mask: str | None = None,
                   max_new_tokens: int | None = None, history=(), system: str = "") -> Attention:
    """The attention weights of a forward over a question about pictures and its greedy answer.

    Generation has the same, but computes of the last block only what it needs. The last generated
    token is never attended from. Raises ValueError as NanoAKI.ask does.
    """
    limit = model.config.block_size if max_new_tokens is None else max_new_tokens
    if limit < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {limit}")
    training, asked = model.training, model.prompt([pictures], [question], history, system)
    images, tokens, roles = asked
    logits, start = [], tokens.shape[1]                     # the answer begins at start
    hook = model.decoder.head.register_forward_hook(lambda head, x, out: logits.append(out[0]))
    (ids,) = model.generate(*asked, limit, mask=mask)
    hook.remove()
    new = ids + [Tokenizer.eos] if len(logits) > len(ids) else ids
    tokens = torch.cat([tokens, tokens.new_tensor([new[:-1]])], 1)
    roles = F.pad(roles, (0, len(new) - 1), value=ANSWER)
    model.eval()
    with Recorder() as recorder, torch.no_grad():
        model.hidden(images, tokens, roles, mask)
    model.train(training)
    weights, roles, given = torch.cat(recorder.weights).cpu(), roles[0].cpu(), asked[1][0].tolist()
    visual = roles == IMAGE
    words = prompt_words(model.tokenizer, given, roles.tolist()[:start])
    reads = torch.stack([weights[..., visual, :][..., some].sum(-1) for some, _ in words], 2)
    pieces = [(some, text.strip()) for some, text in split_tokens(model.tokenizer, ids, CHARACTER)]
    if len(new) > len(ids):
        pieces.append(([len(ids)], "<eos>"))
    looks = weights[:, :, start - 1:][..., visual]          # the row before a token predicts it
    looks = torch.stack([looks[:, :, some].mean(2) for some, _ in pieces], 2)
    return Attention(model.tokenizer.decode(ids), [word for _, word in words],
                     [piece for _, piece in pieces], looks, reads, weights, roles, given + new,
                     torch.stack(logits).float().cpu())


@torch.no_grad()
def movement(model: NanoAKI, pictures: list, questions: list[str], mask: str | None = None,
             history=(), system: str = "") -> Tensor:
    """How far each layer's state of each visual token moves from one of two questions to the other.

    float32 (layers, visual tokens of all pictures): the distance of the two states in a padded
    batch, as a share of their mean length. Raises ValueError as NanoAKI.ask does.
    """
    training, asked = model.training, model.prompt([pictures] * 2, questions, history, system)
    states = []
    hooks = [block.register_forward_hook(lambda block, x, out: states.append(out.float()))
             for block in model.decoder.blocks]
    model.eval().hidden(*asked, mask)
    for hook in hooks:
        hook.remove()
    model.train(training)
    a, b = (torch.stack(states)[:, i, asked[2][i] == IMAGE] for i in (0, 1))
    return ((a - b).norm(dim=-1) / ((a.norm(dim=-1) + b.norm(dim=-1)) / 2)).cpu()
