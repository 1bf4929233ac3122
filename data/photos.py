"""
Photographs: 96 x 96 scenes of cut-outs on plain grounds, questions in eight tasks, and captions.

    python data/photos.py                     # Tux Paint's: apt install tuxpaint-stamps-default
    python data/photos.py --pictures FILE     # that package as a .deb, on any system
    python data/photos.py --pictures DIR --out data/mine    # any tree of them: DIR/cat/Tom.png, ...

A thing's kind is its picture's folder, its name the first line of the .txt beside the picture, or
else the file's name. Pictures of one name in one folder are one thing.
"""
import lzma
import os
import random
import re
import sys
import tarfile
from collections import Counter
from contextlib import suppress
from functools import partial
from io import BytesIO
from pathlib import Path, PurePosixPath

from PIL import Image, ImageOps
from tqdm import tqdm

if __name__ == "__main__":  # a script's folder is on the path, the repository's root is not
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import scenes as grid
from data.scenes import CELL, PLACES, Thing, command, plural, the_only, write
from nanoaki import to_eight_bits

INSTALLED = Path("/usr/share/tuxpaint/stamps")
STAMPS = {}  # file of a photograph of Tux Paint's -> kind; most of its stamps are drawings
for line in """
animals/birds bird duck ostrich owl pelican penguin pigeon pink_flamingo tucan
animals/fish fish butterflyfish clownfish coraltrout dolphinfish moonwrasse seahorse stripedfish
animals/mammals mammal apes/gorilla elephant equines/zebra giraffe pig rodents/squirrel
animals/mammals/cats mammal lion lion-2 tiger
food/fruit fruit apricot banana kiwi mango orange pineapple pomegranate strawberry
food/vegetables vegetable carrot chilepepper eggplant garlic mushroom onion yam yellowpepper
hobbies/music instrument brass/trumpet percussion/cymbal_crash percussion/drum_tomtom_floor
hobbies/music instrument percussion/drumkit string/cello string/guitar2 string/guitar_classical
hobbies/music instrument string/guitar_electric string/violin
household/tools tool cementmixer hammer mallet_metal paintbrush_large plyers saw toolbox wrench
plants/flowers flower daffodil flower10 iris marigold red-gazania rose yellow-flower
plants/flowers flower whitestar-petunia
vehicles vehicle auto/beetle auto/truck cycle/pink_tricycle emergency/firetruck race/indycar
vehicles vehicle flight/balloon360 flight/planes/747 masstransit/green_korean_bus
""".strip().splitlines():
    folder, kind, *names = line.split()
    STAMPS |= {f"{folder}/{name}.png": kind for name in names}
TASKS = ["exist", "count", "where", "at", "kind", "rel", "hop"]
READ = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".ppm",
        ".txt")
SIDE = 2 * CELL  # pictures are kept in this size; scenes show them smaller
LONGEST = 30     # letters of a name: it is an answer
FEWEST = 4       # kinds, and things of a kind: one of them is kept out of training


def read_folder(path: Path) -> dict:
    """Name of each file below a folder -> a function that returns its bytes; raises OSError."""
    def fail(error):
        raise error

    files = {}
    for folder, folders, names in os.walk(path, onerror=fail):
        for name in names + [name for name in folders if os.path.islink(f"{folder}/{name}")]:
            file = Path(folder, name)
            files[file.relative_to(path).as_posix()] = file.read_bytes
    return files


def read_package(path: Path) -> dict:
    """The same of Tux Paint's stamps in a Debian package; raises ValueError, OSError."""
    files, header, size = {}, b"", 0
    try:
        with path.open("rb") as file:
            # It is an `ar` archive: a line, then members, each after a header of 60 bytes.
            if file.read(8) != b"!<arch>\n":
                raise EOFError("it does not begin as one")
            while not header.startswith(b"data.tar.xz"):
                file.seek(size + size % 2, os.SEEK_CUR)
                header = file.read(60)
                length = re.fullmatch(rb".{48}(\d+) *`\n", header, re.DOTALL)
                if length is None:
                    raise EOFError("it has no data.tar.xz; what it has can be unpacked")
                size = int(length[1])
            with lzma.open(file) as data, tarfile.open(fileobj=data, mode="r|") as tar:
                for entry in tqdm(tar, desc=f"reading {path.name}", unit="file", leave=False):
                    if entry.isfile():
                        name = entry.name.removeprefix(".").removeprefix(f"{INSTALLED.as_posix()}/")
                        content = b""  # of sounds, which most of them are
                        if name.lower().endswith(READ):
                            content = tar.extractfile(entry).read()
                        files[name] = partial(bytes, content)
                while data.read(2 ** 20):  # to the end, where its checksum is
                    pass
    except (ValueError, EOFError, lzma.LZMAError, tarfile.TarError) as e:
        raise ValueError(f"{path}: neither a folder nor a sound Debian package ({e})") from None
    return files


def read_text(content: bytes) -> str:
    """The name that a text beside a picture gives it: its first line, without article and stop."""
    first = content.decode("utf-8-sig", "replace").splitlines()[:1]
    line = " ".join("".join(first).split()).strip(". ")
    return re.sub("^(an?|the) +", "", line, flags=re.IGNORECASE)


def check_word(word: str, file: str) -> None:
    """Raise ValueError if a name or kind cannot stand in a question."""
    if not word.isprintable() or any(bad in word for bad in ("/", "<image>", "\ufffd")):
        raise ValueError(f"{file!r}: a name or folder is printable UTF-8 without / and <image>, "
                         f"not {word!r}")


def read_picture(content: bytes) -> Image.Image:
    """In RGBA, without clear edges, of at most SIDE pixels; raises whatever a decoder raises."""
    with Image.open(BytesIO(content)) as image:
        image.draft("RGB", (2 * SIDE, 2 * SIDE))  # large JPEGs are decoded small
        image.load()
        with suppress(Exception):  # broken metadata around good pixels
            image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":
            image = to_eight_bits(image)
        image = image.convert("RGBA")
    image = image.crop(image.getchannel("A").getbbox() or (0, 0, 1, 1))
    image.thumbnail((SIDE, SIDE))
    if max(image.size) < CELL or min(image.size) < 4:
        raise ValueError("too small")
    return image


def find_kinds(path: Path, files: dict) -> dict[str, str]:
    """Kind of each picture, the name of its folder; raises ValueError on two that read alike."""
    kinds, spelled = {}, {}
    for file in sorted(files):
        if file.lower().endswith(READ) and not file.lower().endswith(".txt"):
            kinds[file] = PurePosixPath(path.resolve().name, file).parent.name
    for file, kind in kinds.items():
        check_word(kind, file)
        other = spelled.setdefault(plural(kind).casefold(), kind)
        if not kind or kind != other:
            raise ValueError(f"{path}: the folders {other!r} and {kind!r} cannot be told apart in "
                             f"a question; rename one")
    return kinds


def load(path: Path) -> dict[Thing, list[Image.Image]]:
    """The things of a folder or .deb and their pictures; says what is left out.

    Raises ValueError where these do not do, OSError where they cannot be read.
    """
    if not path.exists():
        advice = "no such folder or Debian package"
        if path == INSTALLED:
            advice = ("Tux Paint's stamps are not installed: apt install tuxpaint-stamps-default, "
                      "or --pictures FILE.deb with that package (packages.debian.org)")
        raise FileNotFoundError(f"{path}: {advice}")
    files = read_folder(path) if path.is_dir() else read_package(path)
    texts = {file[:-4]: files[file] for file in files if file.lower().endswith(".txt")}
    kinds = find_kinds(path, files)
    left_out = {"not pictures by their names": [file for file in sorted(files)
                                                if not file.lower().endswith(READ)]}
    if not STAMPS.keys().isdisjoint(kinds):
        left_out["not listed as photographs"] = sorted(kinds.keys() - STAMPS.keys())
        kinds = {file: STAMPS[file] for file in kinds if file in STAMPS}
    things, seen = {}, set()
    for file, kind in tqdm(kinds.items(), desc="reading pictures", unit="file", leave=False):
        stem = PurePosixPath(file).with_suffix("")
        name = read_text(texts[f"{stem}"]()) if f"{stem}" in texts else ""
        thing = Thing(name or stem.name.replace("_", " ").strip(), (kind,))
        check_word(thing.name, file)
        try:
            picture = read_picture(files[file]())
        except Exception:
            left_out.setdefault("too small or unreadable", []).append(file)
            continue
        if (picture.size, picture.tobytes()) in seen:  # else training might see one of the tests
            left_out.setdefault("the same as another", []).append(file)
            continue
        seen.add((picture.size, picture.tobytes()))
        things.setdefault(thing, {})[file] = picture
    names = Counter(word.casefold() for word in [*set(kinds.values()), *(t.name for t in things)])
    for thing in list(things):
        if not 0 < len(thing.name) <= LONGEST or names[thing.name.casefold()] > 1:
            left_out.setdefault("without a short name of their own", []).extend(things.pop(thing))
    sizes = Counter(thing.traits for thing in things)
    for thing in list(things):
        if sizes[thing.traits] < FEWEST:
            reason = f"of a kind with fewer than {FEWEST} things"
            left_out.setdefault(reason, []).extend(things.pop(thing))
    said = [f"{len(some):,} {why} ({some[0]!r})" for why, some in left_out.items() if some]
    number = len({thing.traits for thing in things})
    line = (f"{sum(map(len, things.values()))} pictures of {len(things)} things of {number} kinds; "
            f"left out: {', '.join(said) or 'none'}")
    if number < FEWEST:
        raise ValueError(f"{path}: {FEWEST} kinds (folders) of {FEWEST} things are needed; {line}")
    print(line)
    return {thing: list(pictures.values()) for thing, pictures in things.items()}


def split_pictures(things: dict[Thing, list], seed: int) -> tuple[list, list, dict]:
    """(things to train on, a quarter of each kind kept out, split -> thing -> pictures)."""
    rng, kinds, train, held_out = random.Random(f"photos {seed} pictures"), {}, {}, {}
    for thing, pictures in things.items():
        kinds.setdefault(thing.traits, []).append(thing)
        some = rng.sample(pictures, len(pictures))
        n = max(1, len(some) // 4)  # of several pictures, training sees none of val and test
        held_out[thing] = some[:n]
        train[thing] = some[n:] if len(some) > 1 else some
    new = [thing for some in kinds.values() for thing in rng.sample(some, len(some) // 4)]
    known = [thing for thing in things if thing not in new]
    return known, new, {"train": train, "val": held_out, "test": held_out}


def even_out(some: list[Thing], things: dict[Thing, list]) -> list[Thing]:
    """Some of the things, those of small kinds several times, so that kinds are drawn alike."""
    sizes = Counter(thing.traits for thing in things)
    most = max(sizes.values())
    return [thing for thing in some for _ in range(round(most / sizes[thing.traits]))]


def draw_scene(scene: dict[int, Thing], rng: random.Random, pictures: dict) -> Image.Image:
    """The scene on a plain ground; ground, picture, size, place in the cell and sides vary."""
    image = Image.new("RGB", (3 * CELL, 3 * CELL), tuple(rng.randint(70, 200) for _ in "RGB"))
    for place, thing in scene.items():
        picture = ImageOps.contain(rng.choice(pictures[thing]), (rng.randint(25, 31),) * 2)
        if rng.random() < 0.5:
            picture = ImageOps.mirror(picture)
        y, x = (CELL * i + rng.randint(0, CELL - length)
                for i, length in zip(divmod(place, 3), reversed(picture.size)))
        image.paste(picture, (x, y), picture)
    return image


def make(folder: Path, seed: int = 0, scenes: int = 20000, held_out: int = 600,
         pictures: Path = INSTALLED) -> None:
    """Write the dataset, as shapes.make does.

    Raises ValueError for pictures that do not do, OSError where they cannot be read, and
    FileExistsError.
    """
    things = load(pictures)
    known, new, shown = split_pictures(things, seed)
    traits = list(dict.fromkeys(kind for thing in known for kind in thing.traits))
    known, new = even_out(known, things), even_out(new, things)

    def random_scene(rng, split):
        some = new if split != "train" and rng.randrange(8) == 0 else known
        return grid.random_scene(rng, some, questions, ["kind", "hop"])

    def questions(scene, task, rng):
        if task == "kind":
            return [(f"what {kind} is there?", thing.name) for thing, kind in the_only(scene)]
        kinds = [(f"what kind of thing is at the {PLACES[place]}?", thing.traits[0])
                 for place, thing in scene.items()]
        if task == "new":
            return kinds
        pairs = grid.questions(scene, task, rng, known, traits)
        return pairs + kinds if task == "at" else pairs  # else nobody could answer `new`

    def ask(scene, rng):
        if next(iter(scene.values())) in new:
            return [("new", *pair) for pair in questions(scene, "new", rng)]
        return grid.ask(questions, TASKS, scene, rng)

    write(folder, f"photos {seed}", scenes, held_out, random_scene,
          lambda scene, rng, split: draw_scene(scene, rng, shown[split]), ask)


if __name__ == "__main__":
    command(make, "photos", INSTALLED)
