"""Scores: what answers come to, by task, in numbers and as a table."""
from collections import defaultdict
from typing import NamedTuple


class Answered(NamedTuple):
    """A question and what came back, outer white space aside."""
    id: str
    task: str
    question: str
    right: str
    answer: str
    blind: str | None  # the answer with another record's pictures; None where there are none


def scores(answered: list[Answered]) -> dict[str, dict]:
    """By task and of "all": share of exact matches, number of questions, and share blind."""
    right, blind = defaultdict(list), defaultdict(list)
    for a in answered:
        for task in {"all", a.task or "all"}:
            right[task].append(a.answer == a.right)
            if a.blind is not None:
                blind[task].append(a.blind == a.right)
    return {"accuracy": {task: sum(hits) / len(hits) for task, hits in sorted(right.items())},
            "questions": {task: len(hits) for task, hits in sorted(right.items())},
            "blind": {task: sum(hits) / len(hits) for task, hits in sorted(blind.items())}}


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
    """Accuracy, blind accuracy and number of questions, a line per task; F1 of yes where asked."""
    found, known = scores(answered), yes_no(answered)
    head = f"{'task':<12}{'accuracy':>10}{'blind':>10}{'questions':>11}"
    lines = [head + f"{'F1 of yes':>11}{'says yes':>10}" if known else head]
    for task in sorted(found["questions"], key=lambda task: (task == "all", task)):
        line = (f"{task:<12}{percent(found['accuracy'][task]):>10}"
                f"{percent(found['blind'].get(task)):>10}{found['questions'][task]:>11,}")
        if task in known:
            f1, share = known[task]
            line += f"{percent(f1):>11}{percent(share):>10}"
        lines.append(line)
    return "\n".join(lines)
