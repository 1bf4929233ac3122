"""The command that asks a model an example of a dataset again: train.py prints one at its end."""
from data.llava import Example, Examples
from engine.flags import quoted
from nanoaki import build_sequence, place_pictures


def example_to_ask(examples: Examples) -> Example:
    """The last reply of the first record whose history was not cut to make room for the answer."""
    replies = int((examples.replies.record == examples.replies.record[0]).sum())
    for example in [examples[i] for i in reversed(range(replies))]:
        placed = place_pictures(example.turns, len(example.pictures), examples.config.order)
        if build_sequence(examples.tokenizer, examples.config, placed) == example.prompt:
            break
    return example


def ask_command(model_path, example: Example, order: str) -> str:
    """The sample.py command that gives a model of that order an Example's prompt.

    It is quoted for this system, without <image> where pictures stand in the same places anyway;
    a question that says nothing is left to be typed.
    """
    written, bare, pictures = [], [], [str(path) for path in example.pictures]
    for speaker, text in example.turns:
        count = text.count("<image>") if speaker == "human" else 0
        ((_, pieces),) = place_pictures([(speaker, text)], count)
        written.append((speaker, "<image>".join(pieces)))
        bare.append((speaker, "".join(pieces)))
    placed = [place_pictures(turns, len(pictures), order) for turns in (written, bare)]
    turns = bare if placed[0] == placed[1] and bare[-1][1].strip() else written
    system = [text for speaker, text in turns if speaker == "system"]
    *history, question = [text for speaker, text in turns if speaker != "system"]
    words = ["python", "sample.py", "--model", str(model_path)]
    for flag, texts in (("--image", pictures), ("--system", system), ("--history", history),
                        ("--ask", [question] if question.strip() else [])):
        if any(text.startswith("-") for text in texts):  # else it would be read as a flag
            words += [f"{flag}={text}" for text in texts]
        elif texts:
            words += [flag, *texts]
    return quoted(words)
