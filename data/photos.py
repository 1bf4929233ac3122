"""
Photographs: 96 x 96 scenes of cut-outs on plain grounds, questions in eight tasks, and captions.

    python data/photos.py                     # Tux Paint's: apt install tuxpaint-stamps-default
    python data/photos.py --pictures FILE     # that package as a .deb, on any system
    python data/photos.py --pictures DIR      # any tree of pictures: DIR/cat/Tom.png, ...

A thing's kind is its picture's folder, its name the first line of the .txt beside the picture, or
else the file's name. Pictures of one name in one folder are one thing.
"""
import lzma
import random
import re
import sys
import tarfile
from collections import Counter
from io import BytesIO
from pathlib import Path, PurePosixPath

from PIL import Image, ImageOps
from tqdm import tqdm

if __name__ == "__main__":  # a script's folder is on the path, the repository's root is not
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import scenes as grid
from data.scenes import CELL, PLACES, Thing, command, the_only, write

INSTALLED = Path("/usr/share/tuxpaint/stamps")
STAMPS = """
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
"""  # folder, kind and files of Tux Paint's photographs; most of its stamps are drawings
TASKS = ["exist", "count", "where", "at", "kind", "rel", "hop"]
READ = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".txt")
SIDE = 2 * CELL  # pictures are kept in this size; scenes show them smaller
LONGEST = 30     # letters of a name: it is an answer
FEWEST = 4       # kinds, and things of a kind: one of them is kept out of training


def read_files(path: Path) -> dict:
    """Name of a picture or text in a folder or a .deb -> what returns its bytes; ValueError."""
    if path.is_dir():
        return {file.relative_to(path).as_posix(): file.read_bytes for file in path.rglob("*")
                if file.name.lower().endswith(READ) and file.is_file()}
    if path == INSTALLED:
        raise FileNotFoundError("Tux Paint's stamps are not installed: apt install tuxpaint-stamps"
                                "-default, or --pictures with its .deb (packages.debian.org)")
    files, header, size = {}, b"", 0
    try:
        with path.open("rb") as file:
            file.seek(8)  # it is an `ar` archive: a line, then members with headers of 60 bytes
            while not header.startswith(b"data.tar.xz"):
                file.seek(size + size % 2, 1)
                header = file.read(60)
                length = re.fullmatch(rb".{48}(\d+) *`\n", header, re.DOTALL)
                if length is None:
                    raise EOFError("it has no data.tar.xz; what it has can be unpacked")
                size = int(length[1])
            with lzma.open(file) as data, tarfile.open(fileobj=data, mode="r|") as tar:
                for entry in tqdm(tar, desc=f"reading {path.name}", unit="file", leave=False):
                    if entry.isfile() and entry.name.lower().endswith(READ):
                        name = entry.name.removeprefix(".").removeprefix(f"{INSTALLED.as_posix()}/")
                        files[name] = BytesIO(tar.extractfile(entry).read()).getvalue
                while data.read(2 ** 20):  # to the end, where its checksum is
                    pass
    except (ValueError, EOFError, lzma.LZMAError, tarfile.TarError) as e:
        raise ValueError(f"{path}: neither a folder nor a sound Debian package ({e})") from None
    return files


def read_name(file: str, files: dict) -> str:
    """The name of what a picture shows; raises ValueError."""
    path = PurePosixPath(file)
    text = files.get(f"{path.with_suffix('.txt')}", bytes)().decode("utf-8-sig", "replace")
    line = text.split("\n")[0].strip(". \r")
    name = re.sub("^(an?|the) +", "", line, flags=re.IGNORECASE) or path.stem.strip()
    for word in (name, path.parent.name):
        if not word.isprintable() or any(bad in word for bad in ("/", "<image>", "\ufffd")):
            raise ValueError(f"{file}: a name or folder is UTF-8 without /, <image> and control "
                             f"characters, not {word!r}")
    return name


def read_picture(content: bytes) -> Image.Image:
    """In RGBA, without clear edges, of at most SIDE pixels; raises whatever a decoder raises."""
    with Image.open(BytesIO(content)) as image:
        image.draft("RGB", (2 * SIDE, 2 * SIDE))  # large JPEGs are decoded small
        image = ImageOps.exif_transpose(image).convert("RGBA")
    image = image.crop(image.getchannel("A").getbbox() or (0, 0, 1, 1))
    image.thumbnail((SIDE, SIDE))
    if max(image.size) < CELL or min(image.size) < 4:
        raise ValueError("too small")
    return image


def load(path: Path) -> dict[Thing, list[Image.Image]]:
    """The things of a folder or .deb and their pictures; says what is left out; ValueError."""
    files, things, left_out = read_files(path), {}, Counter()
    kinds = {file: PurePosixPath(path.resolve().name, file).parent.name
             for file in sorted(files) if not file.lower().endswith(".txt")}
    stamps = {f"{folder}/{file}.png": kind for folder, kind, *some in
              map(str.split, STAMPS.strip().splitlines()) for file in some}
    if not stamps.keys().isdisjoint(kinds):
        left_out["not listed as photographs"] = len(kinds.keys() - stamps.keys())
        kinds = {file: stamps[file] for file in kinds if file in stamps}
    for file, kind in tqdm(kinds.items(), desc="reading pictures", unit="file", leave=False):
        thing = Thing(read_name(file, files), (kind,))
        try:
            picture = read_picture(files[file]())
        except Exception:
            left_out["too small or unreadable"] += 1
        else:
            things.setdefault(thing, []).append(picture)
    names = Counter(word.casefold() for word in [*set(kinds.values()), *(t.name for t in things)])
    for thing in [t for t in things if not (t.name and len(t.name) <= LONGEST)
                  or names[t.name.casefold()] > 1]:
        left_out["without a short name of their own"] += len(things.pop(thing))
    sizes = Counter(thing.traits for thing in things)
    for thing in [t for t in things if sizes[t.traits] < FEWEST]:
        left_out[f"of a kind with fewer than {FEWEST} things"] += len(things.pop(thing))
    number = len({thing.traits for thing in things})
    said = (f"{sum(map(len, things.values()))} pictures of {len(things)} things of {number} kinds;"
            f" left out: {', '.join(f'{n} {why}' for why, n in left_out.items()) or 'none'}")
    if number < FEWEST:
        raise ValueError(f"{path}: {FEWEST} kinds (folders) of {FEWEST} things are needed; {said}")
    print(said)
    return things


def split_pictures(things: dict[Thing, list], seed: int) -> tuple[list, list, dict]:
    """(things to train on, a quarter of each kind kept out, split -> thing -> pictures)."""
    rng, kinds, train, held_out = random.Random(f"photos {seed} pictures"), {}, {}, {}
    for thing, pictures in things.items():
        kinds.setdefault(thing.traits, []).append(thing)
        some = rng.sample(pictures, len(pictures))
        n = max(1, len(some) // 4)  # of several pictures, training sees none of val and test
        train[thing], held_out[thing] = some[n:] or some, some[:n]
    new = [thing for some in kinds.values() for thing in rng.sample(some, len(some) // 4)]
    known = [thing for thing in things if thing not in new]
    return known, new, {"train": train, "val": held_out, "test": held_out}


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
    """Write the dataset, as shapes.make does; raises ValueError for pictures that do not do."""
    known, new, shown = split_pictures(load(pictures), seed)
    traits = list(dict.fromkeys(kind for thing in known for kind in thing.traits))

    def random_scene(rng, split):
        things = new if split != "train" and rng.randrange(8) == 0 else known
        return grid.random_scene(rng, things, questions, ["kind", "hop"])

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
        if set(scene.values()) <= set(new):
            return [("new", *pair) for pair in questions(scene, "new", rng)]
        return grid.ask(questions, TASKS, scene, rng)

    write(folder, f"photos {seed}", scenes, held_out, random_scene,
          lambda scene, rng, split: draw_scene(scene, rng, shown[split]), ask)


if __name__ == "__main__":
    command(make, "photos", INSTALLED)
