import copy
import io
import os
import pickle
import random
import socket
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cascadevlm.base import images
from cascadevlm.base.errors import ImageError, LabelError
from cascadevlm.base.images import ImageSource, decoded, load_image, pixel_digest, size_of
from cascadevlm.base.labels import NAME_COLUMNS, Label, LabelSet, fold
from cascadevlm.testing import noise, picture


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("names.txt", "ant\n\n  bee \nC++\nC\n"),
        ("names.csv", "name,text\nant,\nbee,\nC++,\nC,the language\n"),
        ("names.json", '["ant", {"name": "bee"}, {"name": "C++", "aliases": ["cpp"]}, "C"]'),
    ],
)
def test_label_files(tmp_path: Path, file: str, content: str) -> None:
    (tmp_path / file).write_text(content)
    assert LabelSet.read(tmp_path / file).names == ("ant", "bee", "C++", "C")


SYNSETS = "n90000001 red finch, Rubeo avis\nn90000002 grey owl\n"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("names.csv", "id;Species;note\n1;red finch;a, b\n2;grey owl;\n"),
        ("names.csv", "label,region\nred finch,north\n\ngrey owl\n"),
        ("names.csv", "id,class\r\n1,red finch\r\n2,grey owl\r\n"),
        ("names.csv", "name\tid\nred finch\t1\ngrey owl\t2\n"),
        ("names.tsv", "name\ttext\nred finch\ta red finch\ngrey owl\t\n"),
        ("names.jsonl", '{"name": "red finch", "text": "a red finch"}\n\n"grey owl"\n'),
        ("synset_words.txt", SYNSETS),
        ("words.txt", SYNSETS.replace(" ", "\t", 1).replace("2 ", "2\t")),
        ("classes.txt", "1 red finch\n2 grey owl\n"),
        ("classes.txt", "0: red finch\n1: grey owl\n"),
        ("classes.txt", "0=red finch\n1=grey owl\n"),
        ("classes.txt", "red finch 0\ngrey owl 1\n"),
        ("classes.txt", "red finch\t1\ngrey owl\t2\n"),
        ("synset_words.txt", "n90000001 1 red finch\nn90000002 2 grey owl\n"),
        ("names.csv", 'sep=;\r\nname;note\r\n"red finch";a, b, c\r\n"grey owl";\r\n'),
        ("names.csv", "\n,\nname,id\nred finch,1\ngrey owl,2\n"),
        ("classes.txt", "\ufeffred finch\r\ngrey owl\r\n"),
    ],
)
def test_label_files_of_other_tools(tmp_path: Path, file: str, content: str) -> None:
    (tmp_path / file).write_text(content, encoding="utf-8", newline="")
    assert LabelSet.read(tmp_path / file).names == ("red finch", "grey owl")


def test_numbers_are_names_where_nothing_else_is(tmp_path: Path) -> None:
    for file, content in (("a.csv", "class\n0\n1\n"), ("b.csv", "name,text\n0,zero\n1,one\n"), ("c.txt", "0\n1\n")):
        (tmp_path / file).write_text(content)
        assert LabelSet.read(tmp_path / file).names == ("0", "1")


def test_wordnet_ids_and_synonyms_are_aliases(tmp_path: Path) -> None:
    (tmp_path / "synset_words.txt").write_text(SYNSETS)
    assert LabelSet.read(tmp_path / "synset_words.txt")[0].aliases == ("n90000001", "Rubeo avis")
    (tmp_path / "synset_words.txt").write_text(SYNSETS + "n90000003 bird, Rubeo avis, red finch\n")
    assert [label.aliases for label in LabelSet.read(tmp_path / "synset_words.txt")] == [(f"n9000000{i}",) for i in (1, 2, 3)]


@pytest.mark.parametrize(
    "content",
    [
        "1 Series\n2 Series\n",
        "1 finch\n",
        "Series 1\nSeries 2\n",
        "'t Hooft\nant\n",
        "747 jet\n757 jet\n",
        "[a]\n",
        "n1 finch\n",
        "A\u2028B\nC\x85D\n",
    ],
)
def test_lines_that_only_look_like_another_form_are_names(tmp_path: Path, content: str) -> None:
    (tmp_path / "names.txt").write_text(content, encoding="utf-8")
    assert LabelSet.read(tmp_path / "names.txt").names == tuple(content.split("\n")[:-1])


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("data.yaml", "names:\n  0: red finch\n"),
        ("list.txt", "['red finch', 'grey owl']\n"),
        ("list.txt", '{"0": "red finch"}\n'),
        ("list.txt", '[\n  {"name": "red finch"}\n]\n'),
        ("names.csv", ""),
        ("names.csv", "name\n" + "x" * 200_000),
        ("names.jsonl", '"red finch"\n"grey\n'),
        ("names.json", "[" * 100_000),
        ("names.toml", "names = ['red finch']\n"),
        ("map.pbtxt", "item {\n"),
        ("list.txt", "red finch, grey owl\n"),
        ("list.txt", "red finch,\ngrey owl\n"),
        ("list.txt", '"red finch"\n"grey owl"\n'),
        ("wnids.txt", "n90000001\nn90000002\n"),
        ("names.txt", "r\0e\0d\0"),
        ("names.csv", "class,common_name\n0,red finch\n1,grey owl\n"),
        ("names.csv", "\n,\n"),
    ],
)
def test_what_is_no_label_file_is_refused_by_name(tmp_path: Path, file: str, content: str) -> None:
    (tmp_path / file).write_text(content)
    with pytest.raises(LabelError, match=file):
        LabelSet.read(tmp_path / file)


def test_all_doubled_names_are_told() -> None:
    with pytest.raises(LabelError, match=r"2 names occur twice: 'crane', 'heron'\. Keep one entry per class"):
        LabelSet.of(["crane", "heron", "crane", "pelican", "heron"])


@pytest.mark.parametrize(("one", "other"), [("Gr\u00fcnfink", "Gru\u0308nfink"), ("red finch", "red_finch")])
def test_names_that_look_the_same_are_one_class(one: str, other: str) -> None:
    with pytest.raises(LabelError, match="occurs twice"):
        LabelSet.of([one, other])


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("red_finch", "red finch"),
        ("__red__finch_", "red finch"),
        ("Gru\u0308n-Fink", "Gr\u00fcn-Fink"),
        ("_", "_"),
        ("001.Red_finch", "Red finch"),
        ("n90000001-red_finch", "red finch"),
        ("3.Series", "3.Series"),
        ("007.", "007."),
        ("A_001.B", "A 001.B"),
    ],
)
def test_names_are_shown_as_words(name: str, shown: str) -> None:
    label = Label(name=name)
    assert (label.prompt_text, label.words, label.name) == (shown, shown, name)
    assert Label(name=name, text="a bird").prompt_text == "a bird"


def test_labels_of_a_folder_of_folders(tmp_path: Path) -> None:
    for name in ("bee", "ant"):
        (tmp_path / name).mkdir()
    assert LabelSet.read(tmp_path).names == ("ant", "bee")


def test_csv_carries_everything(tmp_path: Path) -> None:
    (tmp_path / "names.csv").write_text('name,text,aliases,description\nA4,"an Audi A4",Audi A4|A4 sedan,"a car, mid-size"\n')
    (label,) = LabelSet.read(tmp_path / "names.csv")
    assert label == Label(name="A4", text="an Audi A4", aliases=("Audi A4", "A4 sedan"), description="a car, mid-size")


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("empty.txt", "\n \n", "empty"),
        ("twice.txt", "ant\nbee\n ant \n", "'ant' occurs twice"),
        ("bad.csv", "title\nant\n", "unknown column 'title'"),
        ("bad.json", '[{"name": "ant", "alias": []}]', "alias"),
        ("bad.json", '{"ant": 1}', "the file: Input should be a valid array. Write a list of names"),
        ("bad.json", '["ant", {"name": "bee", "id": 1}]', "entry 2, key 'id': Unexpected keyword"),
        ("blank.json", '["ant", " "]', "empty name"),
        ("none.txt", None, "cannot be read"),
        ("latin.txt", b"caf\xe9\n", "not UTF-8"),
    ],
)
def test_bad_label_files_name_the_file_and_the_fault(
    tmp_path: Path, file: str, content: str | bytes | None, sentence: str
) -> None:
    if content is not None:
        (tmp_path / file).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(LabelError) as caught:
        LabelSet.read(tmp_path / file)
    assert sentence in str(caught.value)
    assert file in str(caught.value)


def test_one_name_is_no_list() -> None:
    with pytest.raises(LabelError, match="one name, not a list"):
        LabelSet.of("ant")


def test_an_alias_may_not_be_another_label() -> None:
    with pytest.raises(LabelError, match="'bee' occurs twice"):
        LabelSet.of([Label(name="ant", aliases=("bee",)), "bee"])


def test_what_was_computed_from_labels_is_not_in_their_pickle() -> None:
    labels, used = LabelSet.of(["wren", "robin"]), LabelSet.of(["wren", "robin"])
    assert (used.names, used.digest) == (("wren", "robin"), labels.digest)
    fresh = pickle.dumps(LabelSet.of(["wren", "robin"]))
    assert pickle.dumps(used) == fresh
    assert copy.deepcopy(used) == pickle.loads(fresh) == labels


@given(st.text())
def test_folding_twice_changes_nothing(text: str) -> None:
    assert fold(fold(text)) == fold(text)


@pytest.mark.parametrize(
    ("one", "other"), [("Café-Noir", "cafe noir"), ("  A  B ", "a b"), ("STRASSE", "straße"), ("x_y", "x y")]
)
def test_fold_ignores_case_accents_and_punctuation(one: str, other: str) -> None:
    assert fold(one) == fold(other)


def test_all_sources_give_the_same_image(tmp_path: Path) -> None:
    image = noise(1)
    image.save(tmp_path / "image.png")
    data = (tmp_path / "image.png").read_bytes()
    sources: list[ImageSource] = [tmp_path / "image.png", str(tmp_path / "image.png"), data, image, np.asarray(image)]
    assert len({pixel_digest(load_image(source)) for source in sources}) == 1


def test_orientation_is_applied_and_transparency_flattened() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    picture(size=(40, 20)).save(buffer, "JPEG", exif=exif)
    assert load_image(buffer.getvalue()).size == (20, 40)
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert load_image(clear).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    assert load_image(Image.new(mode, (5, 3))).mode == "RGB"


def test_sixteen_bits_keep_their_brightness() -> None:
    grey = Image.fromarray(np.full((2, 2), 0x8000, dtype=np.uint16))
    assert load_image(grey).getpixel((0, 0)) == (128, 128, 128)


def test_what_is_no_image(tmp_path: Path) -> None:
    whole = io.BytesIO()
    noise(1, (200, 200)).save(whole, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(whole.getvalue()[:2000])
    (tmp_path / "text.jpg").write_text("hello")
    sources: list[ImageSource] = [
        tmp_path / "cut.jpg",
        tmp_path / "text.jpg",
        tmp_path / "none.jpg",
        b"",
        cast(ImageSource, np.zeros((2, 2), np.float32)),
        Image.new("F", (2, 2), 0.5),
        np.zeros((2, 2, 7), np.uint8),
        tmp_path,
    ]
    for source in sources:
        with pytest.raises(ImageError):
            load_image(source)


def test_decompression_bombs_are_refused_before_they_are_decoded() -> None:
    buffer = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(buffer, "PNG")
    with pytest.raises(ImageError, match="too large"):
        load_image(buffer.getvalue())


def test_a_single_pixel_changes_the_digest() -> None:
    one, other = noise(1), noise(1)
    assert pixel_digest(one) == pixel_digest(other)
    other.putpixel((3, 3), (1, 2, 3))
    assert pixel_digest(one) != pixel_digest(other)
    assert pixel_digest(picture(size=(2, 8))) != pixel_digest(picture(size=(8, 2)))


def encoded(kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture(size=(40, 20)).save(buffer, kind, **options)
    return buffer.getvalue()


def exif(*tags: tuple[int, int, int, bytes], order: str = "<") -> bytes:
    """EXIF data with these tags: number, kind, count and a value of four bytes."""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(tags))
    return b"Exif\0\0" + head + b"".join(struct.pack(f"{order}HHI", *tag[:3]) + tag[3] for tag in tags) + bytes(4)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def jpeg_with(marker: int, data: bytes) -> bytes:
    """A JPEG file with orientation 6 and one more segment."""
    turned = exif((0x0112, 3, 1, b"\6\0\0\0"))
    segments = b"".join(
        bytes((0xFF, each)) + struct.pack(">H", len(content) + 2) + content for each, content in ((0xE1, turned), (marker, data))
    )
    return b"\xff\xd8" + segments + encoded("JPEG", quality=95)[2:]


def png_with(kind: bytes, data: bytes) -> bytes:
    """A PNG file with orientation 6 and one more chunk."""
    whole = encoded("PNG", exif=exif((0x0112, 3, 1, b"\6\0\0\0")))
    return whole[:33] + png_chunk(kind, data) + whole[33:]


def tiff_with(compression: str, tag: int, kind: int, count: int, value: bytes) -> bytes:
    """A TIFF file with orientation 6 and one more tag."""
    whole = encoded("TIFF", compression=compression)
    (place,) = struct.unpack_from("<I", whole, 4)
    (number,) = struct.unpack_from("<H", whole, place)
    entries = {whole[start : start + 2]: whole[start : start + 12] for start in range(place + 2, place + 2 + 12 * number, 12)}
    for each in ((0x0112, 3, 1, b"\6\0\0\0"), (tag, kind, count, value)):
        entries[struct.pack("<H", each[0])] = struct.pack("<HHI", *each[:3]) + each[3]
    directory = b"".join(sorted(entries.values(), key=lambda entry: struct.unpack_from("<H", entry)))
    return whole[:4] + struct.pack("<I", len(whole)) + whole[8:] + struct.pack("<H", len(entries)) + directory + bytes(4)


ODD_TAGS = [(0x0100, 2, 2, b"9\0\0\0"), (0x0100, 11, 1, bytes(4)), (0x010F, 5, 9999, b"\x10\0\0\0"), (0x8769, 4, 1, b"\xff" * 4)]
ODD_TAGS += [(0x011A, 5, 1, bytes(4)), (0x0128, 3, 0, bytes(4)), (0x9003, 255, 1, bytes(4)), (0x8825, 2, 4, b"abcd")]
SOUND_PIXELS = {
    **{
        f"{kind} {tag}": encoded(kind, exif=exif(*sorted([tag, (0x0112, 3, 1, b"\6\0\0\0")])))
        for kind, tag in product(("JPEG", "PNG", "WEBP"), ODD_TAGS)
    },
    "big-endian": encoded("JPEG", exif=exif((0x010F, 5, 9999, b"\0\0\0\x10"), (0x0112, 3, 1, b"\0\6\0\0"), order=">")),
    "JFIF cut": jpeg_with(0xE0, b"JFIF\0"),
    "Adobe cut": jpeg_with(0xEE, b"Adobe"),
    "Photoshop cut": jpeg_with(0xED, b"Photoshop 3.0\0" + b"8BIM\0\0"),
    "MPF": jpeg_with(0xE2, b"MPF\0II*\0\x08\0\0\0\1\0\1\xb0\x07\0\4\0\0\0abcd\0\0\0\0"),
    "text too long": png_with(b"zTXt", b"a\0\0" + zlib.compress(bytes(5_000_000))),
    "profile of no known compression": png_with(b"iCCP", b"a\0\7"),
    "short chunk": png_with(b"pHYs", b"\0"),
    "no text": png_with(b"iTXt", b"\xff\0\1\7"),
    "wrong checksum": png_with(b"tIME", bytes(7)).replace(
        png_chunk(b"tIME", bytes(7)), png_chunk(b"tIME", bytes(7))[:-1] + b"\0"
    ),
    **{
        f"TIFF {compression} {tag}": tiff_with(compression, *tag)
        for compression in ("raw", "tiff_lzw")
        for tag in [*ODD_TAGS[2:], (0x02BC, 3, 1, b"\1\0\0\0"), (0x011A, 2, 4, b"abc\0"), (0xBC01, 3, 1, bytes(4))]
    },
}


@pytest.mark.parametrize("content", SOUND_PIXELS.values(), ids=SOUND_PIXELS.keys())
def test_a_bad_tag_beside_sound_pixels_is_no_reason_to_refuse_them(content: bytes) -> None:
    image = load_image(content)
    assert image.size == (20, 40)
    assert np.abs(np.asarray(image).astype(int) - (200, 30, 30)).max() < 8
    assert sorted(size_of(content)) == [20, 40]


@pytest.mark.parametrize(
    "error", [struct.error, ZeroDivisionError, IndexError, RuntimeError, AttributeError, MemoryError, KeyError]
)
def test_whatever_a_decoder_raises_is_the_error_of_that_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def fail(*args: object) -> None:
        raise error

    picture().save(tmp_path / "odd.png")
    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(ImageError, match=f"odd.png' cannot be decoded: {error.__name__}"):
        load_image(tmp_path / "odd.png")


def test_only_formats_on_the_list_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: pytest.fail("a decoder runs a program"))
    for kind in ("EPS", "SPIDER", "DDS", "ICNS", "ICO"):
        with pytest.raises(ImageError, match="not an image, or has an unknown format"):
            load_image(encoded(kind) if kind != "SPIDER" else spider())


def spider() -> bytes:
    buffer = io.BytesIO()
    Image.new("F", (4, 4)).save(buffer, "SPIDER")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "kind", ["JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP", "AVIF", "JPEG2000", "PPM", "QOI", "PCX", "SGI", "TGA"]
)
def test_damaged_files_raise_nothing_but_image_errors(kind: str) -> None:
    chance = random.Random(kind)
    whole = encoded(kind, **({"exif": exif(*ODD_TAGS)} if kind in ("JPEG", "PNG", "WEBP") else {}))
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(chance.randrange(1, 8)):
            place = chance.randrange(min(len(damaged), chance.choice([40, 200, len(whole)])))
            damaged[place : place + chance.randrange(3)] = chance.randbytes(chance.randrange(3))
        for read in (load_image, size_of):
            with suppress(ImageError):
                read(bytes(damaged))


def test_pixels_without_metadata_keep_what_says_how_they_are_read() -> None:
    file = io.BytesIO()
    Image.new("L", (5, 5), 7).save(file, "PNG", transparency=7)
    whole = file.getvalue()
    assert load_image(whole[:33] + png_chunk(b"iCCP", b"a\0\7") + whole[33:]).getpixel((0, 0)) == (255, 255, 255)


def test_an_image_that_is_read_a_second_time_takes_room_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_ROOM", images._Room(10_000))
    whole = encoded("PNG")
    late = whole[:-12] + png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(5_000_000))) + whole[-12:]
    with decoded(late) as image:
        assert images._ROOM.taken == image.width * image.height


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "large.png").write_bytes(encoded("PNG"))
    monkeypatch.setattr(images, "MAX_BYTES", 10)
    with pytest.raises(ImageError, match="the maximum is 10"):
        load_image(tmp_path / "large.png")


def test_negative_grey_is_black() -> None:
    assert np.asarray(load_image(Image.fromarray(np.array([[-5, 0, 255]], dtype=np.int32))))[0, :, 0].tolist() == [0, 0, 255]


def test_one_side_may_be_two_thousand_times_the_other() -> None:
    assert load_image(Image.new("RGB", (1, 2_000))).size == (1, 2_000)


@pytest.mark.parametrize("size", [(1, 2_001), (60_000, 1), (0, 5)])
def test_an_image_without_area_or_far_too_narrow_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ImageError):
        load_image(Image.new("RGB", size))


@pytest.mark.parametrize(
    ("bits", "dtype"), [(8, np.int32), (12, np.int32), (16, np.int32), (31, np.int32), (12, np.uint16), (16, np.uint16)]
)
def test_grey_of_many_bits_keeps_its_brightness(bits: int, dtype: type[np.generic]) -> None:
    ramp = (np.arange(256, dtype=np.int64) << bits - 8).astype(dtype)
    buffer = io.BytesIO()
    Image.fromarray(np.tile(ramp, (4, 1))).save(buffer, "TIFF")
    assert np.asarray(load_image(buffer.getvalue()))[0, :, 0].tolist() == list(range(256))


@pytest.fixture
def special(tmp_path: Path) -> Iterator[list[Path]]:
    """A pipe, a device, a socket, a folder, and links to them."""
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket.jpg"))
        found = [tmp_path / "pipe.jpg", tmp_path / "socket.jpg", tmp_path / "folder.jpg", Path("/dev/zero")]
        links = [tmp_path / f"link{number}.jpg" for number in range(len(found))]
        for link, target in zip(links, found, strict=True):
            link.symlink_to(target)
        yield found + links


def test_special_files_are_refused(special: list[Path]) -> None:
    for path in special:
        for read in (load_image, size_of, images.read_bytes):
            with pytest.raises(ImageError, match=f"{path}.*(not a regular file|a folder)"):
                read(path)


def test_all_threads_share_the_room_for_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_ROOM", images._Room(3_000))
    at_once, most, lock = 0, 0, threading.Lock()

    def read(size: tuple[int, int]) -> None:
        nonlocal at_once, most
        with decoded(picture(size=size)) as image:
            pixels = image.width * image.height
            with lock:
                at_once += pixels
                most = max(most, at_once)
                assert at_once <= 3_000 or at_once == pixels
            threading.Event().wait(0.002)
            with lock:
                at_once -= pixels

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, [(40, 40), (10, 10), (100, 100), (30, 30)] * 8))
    assert most == 10_000  # the one that is larger than all the room was read, alone


def test_room_is_given_back_after_an_error() -> None:
    whole = encoded("PNG")
    for _ in range(3):
        with pytest.raises(ImageError):
            load_image(whole[:-30])
    assert images._ROOM.taken == 0


def test_the_documentation_names_every_column_and_ending() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    for word in (*NAME_COLUMNS, "text", "aliases", "description", ".csv", ".tsv", ".json", ".jsonl", "synset_words.txt"):
        assert f"`{word}`" in page


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_nothing_is_warned_of_a_size_that_is_read(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    file = io.BytesIO()
    noise(0, (40, 40)).save(file, kind, compression="tiff_deflate")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    monkeypatch.setattr(images, "MAX_PIXELS", 2000)
    assert load_image(file.getvalue()).size == (40, 40)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is counted as Linux does")
def test_threads_do_not_keep_the_memory_of_images_they_are_done_with() -> None:
    code = """
import io, resource
from concurrent.futures import ThreadPoolExecutor
from PIL import Image
from cascadevlm.base import images
images._ROOM.size = 1  # one at a time
images.HUGE_PIXELS = 1_000_000
file = io.BytesIO()
Image.new("RGB", (3000, 3000)).save(file, "PNG", compress_level=1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with ThreadPoolExecutor(8) as readers:
    list(readers.map(lambda content: images.load_image(content).size, [file.getvalue()] * 8))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 160_000  # KB; an image takes 36 MB as it is read, and as much converted
