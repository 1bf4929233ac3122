"""What loose scores leave out, and what they must not."""
import pytest

from engine.scores import Answered, loosely, scores, table


def answered(*pairs, task="", blind=None):
    """Of (right answer, model's answer)."""
    return [Answered("", task, "", right, answer, blind) for right, answer in pairs]


ALIKE = [
    ("red", "RED"), ("Straße", "STRASSE"),                           # letter case
    ("red", "red."), ("red", "“Red!”"), ("A", "(a)"), ("yes", "¿yes?"), ("he's", "he's."),
    ("红色", "红色。"), ("红色", "「红色」！"), ("红", "红？"), ("نعم", "نعم،"), ("نعم", "نعم؟"),
    ("red", "‘red’"), ("red", "red ."), ("red", "... red"),         # punctuation of any script
    ("dog", "a dog"), ("apple", "An apple"), ("on the left", "on left"), ("dog", "The a dog."),
    ("dog", 'a "dog"'), ("A", "the A"),                             # articles
    ("none", "0"), ("zero", "none"), ("one", "1"), ("Ten", "10."), ("7 dogs", "seven dogs"),
    ("two, three", "2, 3"), ("5", '"five"'),                        # number words
    ("on  the\tleft", "on the left"), ("red\u3000ball", "red ball"),  # inner white space
    ("-5", "-5."), ("-5", "-five"), (".5", "(.5)"), ("50%", "50%.")]
APART = [
    ("red", "blue"), ("red", "dark red"), ("red", "redd"), ("dog", "anthedog"), ("tenth", "10th"),
    ("5", "-5"), ("5", "−5"), ("5", "–5"), ("5", ".5"), ("5", "-.5"), ("0.5", "5"), ("1.5", "15"),
    ("50%", "50"), ("C", "C#"), ("A", "A-"), ("A", "A+"), ("$5", "5"),
    ("", "the"), ("", "a"), ("", "."), ("", "!?"), ("the", "a"), ("?", "!"), ("。", "."), ("A", "B"),
    ("vitamin a", "vitamin"), ("A, B", "B"), ("A", ""), ("0", ""), ("none", "one"),
    ("ice cream", "icecream"), ("no", "0"), ("plan-a b", "plan-b"), ("1,2", "12"), ("e.g.", "eg")]


@pytest.mark.parametrize(("right", "answer"), ALIKE)
def test_case_outer_punctuation_articles_and_number_words_do_not_count(right, answer):
    found, turned = scores(answered((right, answer))), scores(answered((answer, right)))
    assert found["loose"]["all"] == turned["loose"]["all"] == 1
    assert found["accuracy"]["all"] == turned["accuracy"]["all"] == 0


@pytest.mark.parametrize(("right", "answer"), APART)
def test_what_means_something_counts(right, answer):
    assert scores(answered((right, answer)))["loose"]["all"] == 0
    assert scores(answered((answer, right)))["loose"]["all"] == 0
    assert scores(answered((right, right)))["loose"]["all"] == 1  # the control


@pytest.mark.parametrize("answer", ["a", "an", "the", ".", "?!", "。", "...", ""])
def test_an_answer_of_nothing_but_an_article_or_punctuation_stays(answer):
    assert loosely(answer) == answer
    assert loosely(f"{answer} x") == "x"  # the control


@pytest.mark.parametrize("answer", [one for pair in ALIKE + APART for one in pair])
def test_leaving_out_twice_is_leaving_out_once(answer):
    assert loosely(loosely(answer)) == loosely(answer)


def test_loose_is_by_task_and_never_below_accuracy_and_blind_is_exact():
    some = answered(("red", "Red."), ("red", "red"), task="at", blind="Red.")
    some += answered(("two", "2"), ("two", "3"), task="count", blind="two")
    found = scores(some)
    assert found["accuracy"] == {"all": 0.25, "at": 0.5, "count": 0}
    assert found["loose"] == {"all": 0.75, "at": 1, "count": 0.5}
    assert found["questions"] == {"all": 4, "at": 2, "count": 2}
    assert found["blind"] == {"all": 0.5, "at": 0, "count": 1}
    assert scores([]) == {"accuracy": {}, "loose": {}, "questions": {}, "blind": {}}


def test_the_table_has_loose_after_accuracy_only_where_they_differ():
    exact = answered(("red", "red"), ("red", "blue"), task="at")
    assert table(exact).splitlines()[0].split() == ["task", "accuracy", "blind", "questions"]
    head, at, exist, everything = [line.split() for line in table(
        exact + answered(("yes", "Yes"), ("no", "no"), task="exist", blind="yes")).splitlines()]
    assert head == "task accuracy loose blind questions F1 of yes says yes".split()
    assert at == ["at", "50.0%", "50.0%", "-", "2"]
    assert exist == "exist 50.0% 100.0% 50.0% 2 100.0% 50.0%".split()
    assert everything == "all 50.0% 75.0% 50.0% 4".split()
    assert len({len(line) for line in table(exact + answered(("a b", "b"))).splitlines()}) == 1
