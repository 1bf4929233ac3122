"""The command that asks a model an example of a dataset again: train.py prints one at its end."""
import os
import shlex
import subprocess

from data.llava import Example
from nanoaki import place_pictures


def ask_command(model_path, example: Example, order: str) -> str:
    """The sample.py command that gives a model of that order an Example's prompt.

    It is quoted for this system, without <image> where pictures stand in the same places anyway.
    """
    written, bare, pictures = [], [], [str(path) for path in example.pictures]
    for speaker, text in example.turns:
        count = text.count("<image>") if speaker == "human" else 0
        ((_, pieces),) = place_pictures([(speaker, text)], count)
        written.append((speaker, "<image>".join(pieces)))
        bare.append((speaker, "".join(pieces)))
    placed = [place_pictures(turns, len(pictures), order) for turns in (written, bare)]
    turns = bare if placed[0] == placed[1] else written
    system = [text for speaker, text in turns if speaker == "system"]
    talk = [text for speaker, text in turns if speaker != "system"]
    words = ["python", "sample.py", "--model", str(model_path)]
    for flag, texts in (("--image", pictures), ("--system", system), ("--history", talk[:-1]),
                        ("--ask", talk[-1:])):
        if any(text.startswith("-") for text in texts):  # else it would be read as a flag
            words += [f"{flag}={text}" for text in texts]
        elif texts:
            words += [flag, *texts]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)
