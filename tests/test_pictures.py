"""Pictures of any kind, made square."""
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from helpers import spoil
from nanoaki import fit_picture


def pixels(image, size=8):
    tensor = fit_picture(image, size)
    assert tensor.shape == (3, size, size) and tensor.dtype == torch.uint8
    return tensor.permute(1, 2, 0).numpy()  # (size, size, 3)


def through_file(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return Image.open(io.BytesIO(file.getvalue()))


@pytest.fixture
def square():
    return np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def test_a_picture_of_the_right_size_is_unchanged_pixel_for_pixel(square):
    assert (pixels(Image.fromarray(square)) == square).all()
    assert (pixels(through_file(Image.fromarray(square))) == square).all()


UPRIGHT = {1: lambda s: s, 2: np.fliplr, 3: lambda s: np.rot90(s, 2), 4: np.flipud,
           5: lambda s: s.swapaxes(0, 1), 6: lambda s: np.rot90(s, -1),
           7: lambda s: np.rot90(s.swapaxes(0, 1), 2), 8: np.rot90}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_followed(square, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = through_file(Image.fromarray(square), exif=exif)
    assert (pixels(image) == UPRIGHT[orientation](square)).all()
    assert (pixels(image) == square).all() == (orientation == 1)


def test_exif_rotation_comes_before_the_letterbox():
    exif = Image.Exif()
    exif[0x0112] = 6
    tall = pixels(through_file(Image.new("RGB", (16, 4), "red"), exif=exif))
    assert (tall[:, 3:5] == (255, 0, 0)).all() and (tall[:, [0, 1, 2, 5, 6, 7]] == 128).all()


def test_palette_becomes_its_colors(square):
    image = Image.fromarray(square).quantize(16)
    assert (pixels(image) == np.asarray(image.convert("RGB"))).all()
    assert (pixels(through_file(image)) == pixels(image)).all()


@pytest.mark.parametrize("table", [0, bytes([0, 255])])
def test_transparent_palette_entry_becomes_white(table):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 255, 255, 0, 0])                                          # blue, red
    image.putpixel((2, 5), 0)
    found = pixels(through_file(image, transparency=table))
    assert tuple(found[5, 2]) == (255, 255, 255) and tuple(found[0, 0]) == (255, 0, 0)


@pytest.mark.parametrize("mode, color, on_white", [
    ("RGBA", (255, 0, 0, 255), (255, 0, 0)), ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
    ("RGBA", (255, 0, 0, 128), (255, 127, 127)), ("LA", (0, 255), (0, 0, 0)),
    ("LA", (0, 0), (255, 255, 255)), ("LA", (0, 128), (127, 127, 127)),
    ("L", 77, (77, 77, 77)), ("1", 1, (255, 255, 255)), ("1", 0, (0, 0, 0)),
    ("RGB", (1, 2, 3), (1, 2, 3)), ("RGBX", (1, 2, 3, 0), (1, 2, 3)),
    ("CMYK", (0, 255, 255, 0), (255, 0, 0)), ("CMYK", (0, 0, 0, 255), (0, 0, 0)),
    ("YCbCr", (255, 128, 128), (255, 255, 255)), ("HSV", (0, 255, 255), (255, 0, 0)),
    ("I;16", 65535, (255, 255, 255)), ("I;16", 32768, (127, 127, 127)), ("I;16", 0, (0, 0, 0)),
    ("I;16B", 65535, (255, 255, 255)), ("I", 65535, (255, 255, 255)), ("I", 257 * 50, (50, 50, 50)),
])
def test_modes_become_their_color_on_white(mode, color, on_white):
    for size in ((8, 8), (5, 5)):
        found = pixels(Image.new(mode, size, color)).astype(int)
        assert abs(found - on_white).max() <= 1


RAMP = np.linspace(0, 1, 64).reshape(8, 8)
SIGNED = np.linspace(-3, 5, 64).reshape(8, 8)
DEEP = {  # what stands in a picture, and what of 0 to 255 it is
    "float to 1": (RAMP.astype(np.float32), 255 * RAMP),
    "float to 255": ((255 * RAMP).astype(np.float32), 255 * RAMP),
    "float below 0": (SIGNED.astype(np.float32), 255 * RAMP),
    "dark float": ((0.5 * RAMP).astype(np.float32), 127.5 * RAMP),
    "8 of 16 bits": ((255 * RAMP).round().astype(np.uint16), 255 * RAMP),
    "dark 12 of 16 bits": ((2000 * RAMP).round().astype(np.uint16), 2000 / 4095 * 255 * RAMP),
    "16 bits": ((65535 * RAMP).round().astype(np.uint16), 255 * RAMP),
    "32 bits to 1000": ((1000 * RAMP).round().astype(np.int32), 1000 / 4095 * 255 * RAMP),
    "32 bits to a million": ((10 ** 6 * RAMP).round().astype(np.int32), 255 * RAMP),
    "32 bits below 0": ((9000 * SIGNED).round().astype(np.int32), 255 * RAMP),
    "1 bit": (RAMP > 0.5, 255.0 * (RAMP > 0.5)),
}


@pytest.mark.parametrize("name", DEEP)
def test_any_depth_is_read_in_the_smallest_usual_range_that_holds_it(name, tmp_path):
    values, wanted = DEEP[name]
    image = Image.fromarray(values)
    image.save(tmp_path / "deep.tif")
    for picture in (image, tmp_path / "deep.tif"):
        found = fit_picture(picture, 8).numpy().astype(float)
        assert abs(found - wanted).max() <= 1
    if name not in ("16 bits", "1 bit"):  # what Pillow alone would make of them, which may be right
        clipped = np.asarray(image.convert("I").convert("L")).astype(float)
        assert abs(clipped - wanted).max() > 10 or name in ("float to 255", "8 of 16 bits")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_no_numbers_are_refused_and_huge_ones_are_not(value):
    values = np.ones((8, 8), np.float32)
    values[3, 3] = value
    with pytest.raises(ValueError, match="not finite"):
        fit_picture(Image.fromarray(values), 8)
    values[3, 3] = 3e38
    assert fit_picture(Image.fromarray(values), 8).max() == 255


def sixteen_bits_a_colour(path, values):
    """A PNG of 16-bit RGB, which Pillow cannot write."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 2, 0, 0, 0)
    parts = [(b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts))
    return path


def test_sixteen_bits_a_colour_are_read_and_refused_where_what_they_hold_would_be_lost(tmp_path):
    ramp = (65535 * RAMP)[..., None] * (1, 0.5, 0.25)
    found = fit_picture(sixteen_bits_a_colour(tmp_path / "deep.png", ramp), 8)
    assert abs(found.permute(1, 2, 0).numpy() - ramp / 257).max() <= 1
    with pytest.raises(ValueError, match="dark.png: .*16 bits a colour hold 12 or fewer"):
        fit_picture(sixteen_bits_a_colour(tmp_path / "dark.png", ramp / 16), 8)


def photograph(width=2400, height=1600):
    """Noise of all sizes, from all of it down to single pixels."""
    rng, levels = np.random.default_rng(0), []
    for side in (4, 16, 64, 256, 1600):
        noise = Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8))
        levels.append(np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), float))
    return Image.fromarray((np.mean(levels, 0)).astype(np.uint8))


@pytest.mark.parametrize("size, orientation", [(96, 1), (224, 6)])
def test_a_jpeg_decoded_at_about_the_size_that_is_needed_differs_little(tmp_path, size, orientation):
    path, exif = tmp_path / "phone.jpg", Image.Exif()
    exif[0x0112] = orientation
    photograph().save(path, quality=90, exif=exif)
    with Image.open(path) as image:
        slow = fit_picture(image, size).float()
        assert image.size == (2400, 1600)  # the picture of a caller stays as large as it is
    difference = (fit_picture(path, size).float() - slow).abs()
    assert difference.mean() < 0.5 and difference.max() < 8
    aside = Image.fromarray(np.roll(photograph(), 2400 // size, axis=1))  # by a pixel of the square
    aside.save(path, quality=90, exif=exif)
    assert (fit_picture(path, size).float() - slow).abs().mean() > 1


def test_a_large_jpeg_is_never_decoded_whole(tmp_path, monkeypatch):
    path, sizes = tmp_path / "phone.jpg", []
    photograph().save(path)
    convert = Image.Image.convert
    monkeypatch.setattr(Image.Image, "convert",
                        lambda image, mode: sizes.append(image.size) or convert(image, mode))
    fit_picture(path, 96)
    with Image.open(path) as image:
        fit_picture(image, 96)
    assert sizes == [(300, 200), (2400, 1600)]


def test_an_animated_picture_is_its_first_frame(tmp_path, square):
    first, second = Image.fromarray(square).quantize(), Image.new("P", (8, 8), 0)
    for name in ("moving.gif", "moving.webp", "moving.png"):
        frames = [frame.convert("RGB") for frame in (first, second)]
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
        with Image.open(tmp_path / name) as image:
            assert image.n_frames == 2
        frames[0].save(tmp_path / "still.png")
        still = fit_picture(tmp_path / "still.png", 8)
        assert (fit_picture(tmp_path / name, 8).int() - still.int()).abs().max() < 8


def test_a_good_png_with_a_large_colour_profile_and_much_text_is_read(tmp_path, square):
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "node " * 1_000_000, zip=True)
    Image.fromarray(square).save(tmp_path / "large.png", pnginfo=text, icc_profile=b"0" * 3_000_000)
    assert (fit_picture(tmp_path / "large.png", 8).permute(1, 2, 0).numpy() == square).all()


@pytest.mark.parametrize("kind", ["L", "RGB"])
def test_transparent_color_of_a_png_becomes_white(kind):
    color = {"L": 60, "RGB": (60, 0, 0)}[kind]
    image = Image.new(kind, (8, 8), color)
    image.putpixel((0, 0), 0)
    found = pixels(through_file(image, transparency=color))
    assert (found[1:] == 255).all() and (found[0, 0] == 0).all()


@pytest.mark.parametrize("size", [(16, 8), (8, 16), (4, 2), (2, 4), (100, 50), (96, 24), (3, 3)])
def test_letterbox_keeps_the_whole_picture_and_its_shape_on_grey(size):
    w, h = size
    marked = np.full((h, w, 3), (255, 0, 0), np.uint8)
    marked[:, -(w // 2):] = (0, 0, 255)
    found = pixels(Image.fromarray(marked), 16).astype(int)
    inside = (abs(found - 128).max(-1) > 20)
    columns, rows = inside.any(0).sum(), inside.any(1).sum()
    assert (columns, rows) == (round(16 * w / max(size)), round(16 * h / max(size)))
    top, left = (16 - rows) // 2, (16 - columns) // 2
    assert inside[top:top + rows, left:left + columns].all()  # centred
    assert (found[~inside] == 128).all()
    red, blue = found[8, left], found[8, left + columns - 1]
    assert red[0] > 200 > 60 > red[2] and blue[2] > 200 > 60 > blue[0]


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1), (1, 1), (2, 999), (5000, 3)])
def test_extreme_shapes_keep_at_least_a_line(size):
    found = pixels(Image.new("RGB", size, "red"))
    red = (found == (255, 0, 0)).all(-1)
    assert red.any(0).sum() == (8 if size[0] >= size[1] else 1)
    assert red.any(1).sum() == (8 if size[1] >= size[0] else 1)
    assert (found[~red] == 128).all()


def test_fit_picture_leaves_the_picture_it_was_given_alone(square):
    image = Image.fromarray(square).resize((5, 9))
    before = image.copy()
    fit_picture(image, 8)
    assert image == before and image.size == (5, 9)


def test_a_picture_that_cannot_be_decoded_is_refused_and_never_shown_black(square, tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(square).save(path)
    assert (pixels(path) == square).all()
    spoil(path)
    with Image.open(path) as image:
        image.verify()  # nothing but decoding shows it
    with pytest.raises(ValueError, match="a.png: not a picture .*broken"):
        fit_picture(path, 8)
    with Image.open(path) as image, pytest.raises(ValueError, match="decoded: broken"):
        fit_picture(image, 8)
