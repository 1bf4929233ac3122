"""curves.png: what is drawn is what metrics.jsonl has, wherever the run was cut."""
import copy
import itertools
import json
import math

import pytest

import engine.charts
from engine.charts import GRAY, ORANGE, RED, draw_run, scale
from engine.folder import Metrics

STEPS = {"align": 100, "instruct": 400}


def line(stage, step, loss, **tasks):
    accuracy = {"all": sum(tasks.values()) / len(tasks)} | tasks
    return {"stage": stage, "step": step, "train_loss": loss, "val_loss": loss / 2,
            "accuracy": accuracy, "questions": dict.fromkeys(accuracy, 9),
            "blind": {"all": 0.1} if stage == "instruct" else {}, "seconds": 1.0}


def made_up():
    lines = [line("align", 100, 0.7, all=0.9)]
    lines += [line("instruct", step, 100 / step, at=step / 500, hop=step / 900)
              for step in (100, 200, 300, 400)]
    return [*lines, {"stage": "test", "step": 400, "accuracy": {"all": 0.5, "far": 0.5},
                     "questions": {"all": 9, "far": 9}, "blind": {}}]


def drawn(lines, steps=STEPS):
    return draw_run(lines, steps).tobytes()


@pytest.fixture
def panels(monkeypatch):
    """What draw_run has drawn: (curves that are not empty, ticks, marks) of each panel."""
    found, chart = [], engine.charts.chart

    def spy(title, curves, colors, last, ticks, marks):
        found.append(({name: points for name, points in curves.items() if points}, ticks, marks))
        return chart(title, curves, colors, last, ticks, marks)

    monkeypatch.setattr(engine.charts, "chart", spy)
    return found


def test_both_stages_stand_on_one_axis_and_the_report_is_left_out(panels):
    draw_run(made_up(), STEPS)
    (losses, ticks, marks), (shares, percent, _) = panels
    after = [200, 300, 400, 500]  # 100 steps are stage 1's
    assert losses == {
        "align training": {100: [0.7]}, "align held-out": {100: [0.35]},
        "instruct training": {x: [100 / (x - 100)] for x in after},
        "instruct held-out": {x: [50 / (x - 100)] for x in after}}
    assert shares["instruct at"] == {x: [pytest.approx((x - 100) / 5)] for x in after}
    assert shares["instruct all, blind"] == {x: [10] for x in after}
    assert list(shares) == ["align all", *(f"instruct {task}" for task in (
        "at", "hop", "all, blind", "all"))]
    assert ticks == (0, 0.25, 0.5, 0.75, 1) and percent == (0, 25, 50, 75, 100)
    assert marks == {0: GRAY, 100: GRAY}
    far = made_up()
    far[-1]["accuracy"]["another"] = 0.5  # a task of the report alone takes no colour
    assert drawn(far) == drawn(made_up())
    panels.clear()
    draw_run(made_up(), {"instruct": 400})  # a run from --init has no stage 1
    assert list(panels[0][0]["instruct training"]) == [100, 200, 300, 400]
    assert panels[0][2] == {0: GRAY}


def test_without_planned_steps_the_axis_ends_where_the_lines_do(panels):
    draw_run(made_up(), STEPS)
    draw_run(made_up())
    assert panels[:2] == panels[2:] and drawn(made_up(), None) == drawn(made_up())
    assert drawn(made_up()[:3], None) != drawn(made_up()[:3])  # the control
    for lines in [], made_up()[-1:], [{"stage": "align", "step": 0, "diverged": "loss nan"}]:
        assert drawn(lines, None)  # nothing is divided by no steps


def test_a_run_that_was_cut_and_goes_on_draws_as_one_that_was_not(tmp_path):
    def read(path):
        return [json.loads(text) for text in path.read_text().splitlines()]

    whole, cut = Metrics(tmp_path / "whole"), Metrics(tmp_path / "cut")
    for n, one in enumerate(made_up()):
        whole.write(one)
        cut.write(one)
        if n == 1:
            checkpoint = cut.size()
        if n == 2:  # what came after the checkpoint is lost, and comes again
            lost = drawn(read(tmp_path / "cut"))
            cut.cut(checkpoint)
            assert drawn(read(tmp_path / "cut")) != lost  # the control
            cut.write(one)
    assert drawn(read(tmp_path / "cut")) == drawn(read(tmp_path / "whole"))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 2, 4])
def test_a_number_that_is_none_is_left_out_and_moves_no_other(panels, bad, place):
    draw_run(made_up(), STEPS)
    lines = made_up()
    lines[place]["val_loss"] = bad
    lines = json.loads(json.dumps(lines))  # NaN and Infinity, as in the file
    draw_run(lines, STEPS)
    (losses, *rest), shares, (spoiled, *others), same = panels
    stage, step = ("align", 100) if place == 0 else ("instruct", 100 + 100 * place)
    expected = copy.deepcopy(losses)
    del expected[f"{stage} held-out"][step]
    assert spoiled == {name: points for name, points in expected.items() if points}
    assert others == rest and same == shares
    assert drawn(lines) != drawn(made_up())  # the control


def test_a_run_of_no_finite_loss_draws_its_accuracies():
    lines = made_up()
    for one in lines:
        one |= {"train_loss": math.nan, "val_loss": math.inf}
    image, whole = draw_run(lines, STEPS), draw_run(made_up(), STEPS)
    right = whole.width // 2, 0, whole.width, image.height  # the panel of accuracies
    assert image.crop(right).tobytes() == whole.crop(right).tobytes()
    assert image.tobytes() != whole.tobytes()


def test_divergence_is_a_red_line_at_its_step_and_moves_nothing(panels):
    draw_run(made_up()[:3], STEPS)
    lines = made_up()[:3] + [{"stage": "instruct", "step": 217, "diverged": "loss nan"}]
    image = draw_run(lines, STEPS)
    for (curves, ticks, marks), (others, same, more) in zip(panels[:2], panels[2:], strict=True):
        assert curves == others and ticks == same
        assert more == marks | {317: RED} and 317 not in marks
    x = 14 + 32 + 317 / 500 * (330 - 32 - 12)  # margins of the sheet and of a panel
    reds = [[y for y in range(image.height) if math.dist(some.getpixel((round(x), y)), RED) < 99]
            for some in (image, draw_run(made_up()[:3], STEPS))]
    assert len(reds[0]) > 150 and not reds[1]
    assert drawn([lines[-1] | {"stage": "align"}])  # at once: nothing but the line


def test_a_task_that_appears_later_is_drawn_from_there_on(panels):
    lines = made_up()
    lines[3]["accuracy"]["late"] = lines[4]["accuracy"]["late"] = 0.25
    draw_run(lines, STEPS)
    assert panels[1][0]["instruct late"] == {400: [25], 500: [25]}
    panels.clear()
    draw_run(made_up(), STEPS)
    assert "instruct late" not in panels[1][0]


def test_a_single_evaluation_and_none_draw():
    one, none = drawn(made_up()[:1]), drawn([])
    image = draw_run(made_up()[1:2], {"instruct": 400})
    pixels = itertools.product(range(46, 330), range(30, 215))
    assert any(math.dist(image.getpixel(at), ORANGE) < 60 for at in pixels)  # a mark
    assert one != none


@pytest.mark.parametrize("greatest", [1e-30, 0.00321, 0.099, 0.1, 0.68, 1, 1.06, 2.4, 7, 10, 3e38])
def test_the_scale_fits(greatest):
    ticks = scale([greatest / 3, greatest])
    assert ticks[0] == 0 and len(ticks) == 5
    assert greatest <= ticks[-1] <= 1.5 * greatest
    assert all(len(f"{tick:g}") <= 7 for tick in ticks)
    assert scale([]) == scale([0.0]) == (0, 0.25, 0.5, 0.75, 1)


def test_twenty_tasks_have_their_own_colours_and_a_legend_that_wraps(monkeypatch):
    seen, legend = [], engine.charts.legend

    def spy(entries, room):
        seen.append(entries)
        return legend(entries, room)

    monkeypatch.setattr(engine.charts, "legend", spy)
    tasks = {f"task {n:02}": n / 20 for n in range(19)} | {"a name " * 30: 0.5}
    image, few = draw_run([line("instruct", 400, 0.5, **tasks)], STEPS), draw_run(made_up(), STEPS)
    colors = [color for _, color in seen[1]]
    assert len(colors) == 22
    assert min(math.dist(a, b) for a, b in itertools.combinations(colors, 2)) > 40
    assert max(min(color) for color in colors) < 200  # none is nearly white
    assert image.width == few.width and image.height > few.height
    assert [name for name, _ in seen[3]] == ["at", "hop", "all, blind", "all"]  # as last it was
