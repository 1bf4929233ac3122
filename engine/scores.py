"""Scores: what answers come to, by task, in numbers and as a table."""
import re
import unicodedata
from collections import defaultdict
from typing import NamedTuple

from engine.flags import escaped

NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4",
           "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
SIGNS = "%‰٪％#＃&＆@＠*＊/／\\＼′″"  # punctuation to Unicode, but "50%" is not "50"


class Answered(NamedTuple):
    """A question and what came back, outer white space aside."""
    id: str
    task: str
    question: str
    right: str
    answer: str
    blind: str | None  # the answer with another record's pictures; None where there are none


def around(c: str) -> bool:
    """Whether a character is white space or punctuation, of any script; a dash is neither."""
    marks = "Po", "Ps", "Pe", "Pi", "Pf"  # Unicode's, but for its dashes: "-5" is not "5"
    return c.isspace() or unicodedata.category(c) in marks and c not in SIGNS


def bare(answer: str) -> str:
    """An answer without what is around it; the point of ".5" is not."""
    start, end = 0, len(answer)
    while end and around(answer[end - 1]):
        end -= 1
    while start < end and around(answer[start]):
        if answer[start] == "." and answer[start + 1].isdecimal():
            break
        start += 1
    return answer[start:end]


def loosely(answer: str) -> str:
    """An answer without letter case, outer punctuation, articles, number words and wide spaces.

    As in VQA's scoring (arXiv 1505.00468), but an article is one only before another word, and an
    answer of nothing but punctuation stays what it is.
    """
    answer = " ".join(answer.casefold().split())
    plain = bare(re.sub(r"(?<!\S)(a|an|the) ", "", bare(answer))) or answer
    return re.sub(r"\w+", lambda word: NUMBERS.get(word[0], word[0]), plain)


def scores(answered: list[Answered]) -> dict[str, dict]:
    """By task and of "all": share of exact and of loose matches, number of questions, share blind.

    Loose matches do not count what loosely leaves out; blind ones are exact.
    """
    right, loose, blind = defaultdict(list), defaultdict(list), defaultdict(list)
    for a in answered:
        alike = loosely(a.answer) == loosely(a.right)
        for task in {"all", a.task or "all"}:
            right[task].append(a.answer == a.right)
            loose[task].append(alike)
            if a.blind is not None:
                blind[task].append(a.blind == a.right)
    return {"accuracy": shares(right), "loose": shares(loose),
            "questions": {task: len(hits) for task, hits in sorted(right.items())},
            "blind": shares(blind)}


def shares(hits_of: dict[str, list[bool]]) -> dict[str, float]:
    return {task: sum(hits) / len(hits) for task, hits in sorted(hits_of.items())}


def yes_no(answered: list[Answered]) -> dict[str, tuple[float, float]]:
    """F1 of "yes" and its share of the answers, as POPE's, of tasks with answers yes and no."""
    pairs, found = defaultdict(list), {}  # the right answer and the model's
    for a in answered:
        pairs[a.task or "all"].append((a.right.lower(), a.answer.lower()))
    for task, some in pairs.items():
        if {right for right, _ in some} == {"yes", "no"}:
            hits = some.count(("yes", "yes"))
            rights = sum(right == "yes" for right, _ in some)
            said = sum(answer == "yes" for _, answer in some)
            found[task] = 2 * hits / (rights + said), said / len(some)
    return found


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def table(answered: list[Answered]) -> str:
    """Accuracy, blind accuracy and number of questions, a line per task; F1 of yes where asked.

    Loose accuracy too, where it differs from the exact one.
    """
    found, known = scores(answered), yes_no(answered)
    kinds = ["accuracy", "loose", "blind"]
    if found["loose"] == found["accuracy"]:
        kinds.remove("loose")
    head = f"{'task':<12}{''.join(f'{kind:>10}' for kind in kinds)}{'questions':>11}"
    lines = [head + f"{'F1 of yes':>11}{'says yes':>10}" if known else head]
    for task in sorted(found["questions"], key=lambda task: (task == "all", task)):
        shown = "".join(f"{percent(found[kind].get(task)):>10}" for kind in kinds)
        line = f"{escaped(task):<12}{shown}{found['questions'][task]:>11,}"
        if task in known:
            f1, share = known[task]
            line += f"{percent(f1):>11}{percent(share):>10}"
        lines.append(line)
    return "\n".join(lines)
