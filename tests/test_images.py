"Reading, converting and resizing pictures: round trips, properties, damaged and hostile files."
import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from medxfer_nb import images
from medxfer_nb.core import MedxferError
from medxfer_nb.images import fit_square, read_folder, read_image, show_images, to_gray, to_uint8

FINITE = {"allow_nan": False, "allow_infinity": False, "width": 32}
SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 40)) | st.tuples(st.integers(1, 20), st.integers(1, 20), st.just(3))
PICTURES = (hnp.arrays(np.uint8, SHAPES) | hnp.arrays(np.uint16, SHAPES)
            | hnp.arrays(np.float32, SHAPES, elements=st.floats(-3000, 3000, **FINITE)))


def save(path, array):
    "Write `array` with Pillow and return its path."
    Image.fromarray(array).save(path)
    return path


@pytest.fixture(scope="session")
def room(tmp_path_factory):
    "One folder for the property tests, which may not use a folder per test."
    return tmp_path_factory.mktemp("images")


@pytest.fixture
def noise():
    "A picture that does not compress, so that cutting the file cuts the picture."
    return np.random.default_rng(0).integers(0, 256, (64, 48), dtype=np.uint8)


# round trips

@given(hnp.arrays(np.uint8, SHAPES) | hnp.arrays(np.uint16, st.tuples(st.integers(1, 40), st.integers(1, 40))))
@settings(max_examples=60, deadline=None)
def test_png_returns_the_same_pixels_and_type(room, picture):
    back = read_image(save(room / "a.png", picture))
    assert back.dtype == picture.dtype and np.array_equal(back, picture) and back.flags.writeable


@given(PICTURES)
@settings(max_examples=60, deadline=None)
def test_arrays_return_the_same_pixels_and_type(room, picture):
    np.save(room / "a.npy", picture)
    np.savez_compressed(room / "a.npz", image=picture, other=np.zeros(3))
    for name in ("a.npy", "a.npz"):
        back = read_image(room / name)
        assert back.dtype == picture.dtype and np.array_equal(back, picture)


def test_jpeg_is_close_and_endings_may_be_capitals(tmp_path):
    smooth = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (64, 1))
    for name in ("a.JPG", "a.jpeg"): assert np.abs(read_image(save(tmp_path / name, smooth)).astype(int) - smooth).max() < 8


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    upright = np.zeros((16, 32), np.uint8)
    upright[:8, :16] = 255
    undo = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
            6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}
    im = Image.fromarray(upright)
    if orientation > 1: im = im.transpose(undo[orientation])
    exif = im.getexif()
    exif[0x0112] = orientation
    im.save(tmp_path / "a.jpg", exif=exif, quality=95)
    assert np.abs(read_image(tmp_path / "a.jpg").astype(int) - upright).max() < 40


def test_modes_of_pillow_become_pictures(tmp_path):
    gray = np.arange(256, dtype=np.uint8).reshape(16, 16)
    bits = Image.fromarray(gray).convert("1")
    bits.save(tmp_path / "bits.png")
    assert set(np.unique(read_image(tmp_path / "bits.png"))) == {0, 255}
    Image.fromarray(gray).convert("P").save(tmp_path / "palette.png")
    assert np.array_equal(read_image(tmp_path / "palette.png"), np.stack([gray] * 3, -1))
    Image.fromarray(np.dstack([gray] * 3 + [np.full_like(gray, 0)])).save(tmp_path / "clear.png")
    assert not read_image(tmp_path / "clear.png").any()                # what is fully transparent is black
    Image.fromarray(np.dstack([gray, np.full_like(gray, 255)])).save(tmp_path / "la.png")
    assert np.array_equal(read_image(tmp_path / "la.png"), gray)
    Image.fromarray(np.dstack([gray] * 3)).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    assert read_image(tmp_path / "cmyk.jpg").shape == (16, 16, 3)


@pytest.mark.parametrize(("array", "kind"), [
    (np.ones((4, 4), bool), np.uint8), (np.full((4, 4), -1000, np.int16), np.float32), (np.ones((4, 4)), np.float32),
    (np.ones((4, 4, 1)), np.float32)])
def test_other_number_types_become_a_picture(tmp_path, array, kind):
    np.save(tmp_path / "a.npy", array)
    assert read_image(tmp_path / "a.npy").dtype == kind and read_image(tmp_path / "a.npy").shape == (4, 4)


# faults: one exception, with the file and the reason

def fails(path, *words):
    "Reading `path` is a MedxferError with the file's name and `words`."
    with pytest.raises(MedxferError) as e: read_image(path)
    assert all(w in str(e.value) for w in (path.name, *words)), str(e.value)


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_a_file_cut_anywhere_is_refused(tmp_path, noise, name):
    whole = save(tmp_path / name, noise).read_bytes()
    for share in (0.001, 0.1, 0.5, 0.9):
        (tmp_path / name).write_bytes(whole[:max(1, int(len(whole) * share))])
        fails(tmp_path / name, "damaged, cut short, or not a")


def test_every_flipped_byte_in_a_png_is_refused_or_harmless(tmp_path, noise):
    whole = save(tmp_path / "a.png", noise).read_bytes()
    for at in np.random.default_rng(1).integers(8, len(whole), 150):
        (tmp_path / "a.png").write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1:])
        try: assert np.array_equal(read_image(tmp_path / "a.png"), noise)
        except MedxferError as e: assert "a.png" in str(e)


def test_random_damage_to_a_jpeg_never_escapes(tmp_path, noise):
    whole = save(tmp_path / "a.jpg", noise).read_bytes()
    rng = np.random.default_rng(2)
    for _ in range(150):
        damaged = np.frombuffer(whole, np.uint8).copy()
        damaged[rng.integers(0, len(damaged), 5)] = rng.integers(0, 256, 5)
        (tmp_path / "a.jpg").write_bytes(damaged.tobytes())
        try: read_image(tmp_path / "a.jpg")
        except MedxferError as e: assert "a.jpg" in str(e)


def test_wrong_files_are_named_with_the_reason(tmp_path):
    fails(tmp_path / "gone.png", "no such file")
    fails(tmp_path, "folder")
    (tmp_path / "empty.png").write_bytes(b"")
    fails(tmp_path / "empty.png", "empty")
    (tmp_path / "text.png").write_text("not a picture")
    fails(tmp_path / "text.png", "not a .png file")
    (tmp_path / "a.pgn").write_bytes(b"x")
    fails(tmp_path / "a.pgn", "did you mean '.png'")
    Image.new("L", (4, 4)).save(tmp_path / "real.gif")
    (tmp_path / "real.gif").rename(tmp_path / "gif.png")
    fails(tmp_path / "gif.png", "not a .png file")                      # GIF is not on the list, whatever the file is called


def test_a_bomb_is_refused_before_decoding(tmp_path):
    Image.new("1", (13000, 13000)).save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 50_000
    tracemalloc.start()
    fails(tmp_path / "bomb.png", "169,000,000 pixels")
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()


def test_a_header_that_lies_about_its_size_is_refused(tmp_path, noise):
    whole = bytearray(save(tmp_path / "a.png", noise).read_bytes())
    whole[16:24] = struct.pack(">II", 60000, 60000)
    whole[29:33] = struct.pack(">I", zlib.crc32(whole[12:29]))
    (tmp_path / "a.png").write_bytes(whole)
    fails(tmp_path / "a.png", "too many pixels (Image size (3600000000")


def test_arrays_with_objects_or_lies_are_refused(tmp_path):
    np.savez(tmp_path / "object.npz", image=np.array([{"run": "me"}]))
    fails(tmp_path / "object.npz", "allow_pickle=False")
    np.save(tmp_path / "object.npy", np.array([print]))
    fails(tmp_path / "object.npy")
    np.savez(tmp_path / "two.npz", a=np.zeros((2, 2)), b=np.zeros((2, 2)))
    fails(tmp_path / "two.npz", "2 arrays (a, b)")
    np.savez_compressed(tmp_path / "big.npz", image=np.zeros((1, 700_000_000), np.uint8))
    fails(tmp_path / "big.npz", "more than the limit")
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<f4", "fortran_order": False, "shape": (100_000, 100_000)})
    (tmp_path / "lie.npy").write_bytes(head.getvalue() + b"1234")
    fails(tmp_path / "lie.npy")


@pytest.mark.parametrize(("array", "word"), [
    (np.zeros(5), "shape"), (np.zeros((2, 2, 4)), "shape"), (np.zeros((0, 4)), "shape"), (np.array([["a"]]), "not numbers"),
    (np.array([[np.nan]]), "NaN"), (np.array([[2 ** 40 + 1]]), "too large"), (np.array([[1e300]]), "NaN or infinity")])
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_arrays_that_are_no_picture_are_refused(tmp_path, array, word):
    np.save(tmp_path / "a.npy", array)
    fails(tmp_path / "a.npy", word)


def test_a_folder_uses_the_good_and_names_the_bad(tmp_path, noise, capsys):
    (tmp_path / "deep").mkdir()
    good = [save(tmp_path / "b.png", noise), save(tmp_path / "deep" / "c.png", noise)]
    (tmp_path / "a.png").write_text("no")
    for other in ("._b.png", "notes.txt"): (tmp_path / other).write_text("ignored: hidden, or not an image by name")
    reading = read_folder(tmp_path, then=to_uint8)
    assert list(reading.pictures) == good and [p.name for p in reading.problems] == ["a.png"]
    assert "read 2 of 3 images" in capsys.readouterr().out
    assert len(read_folder(good + [tmp_path / "gone.png"]).problems) == 1
    assert not read_folder(good).problems
    with pytest.raises(MedxferError, match="no image could be read"): read_folder([tmp_path / "a.png"])


# conversions

@given(PICTURES)
@settings(max_examples=80, deadline=None)
def test_uint8_keeps_the_order_and_uses_the_whole_range(picture):
    out = to_uint8(picture)
    assert out.dtype == np.uint8 and out.shape == picture.shape
    order = np.argsort(picture, axis=None, kind="stable")
    assert (np.diff(out.ravel()[order].astype(int)) >= 0).all()
    if picture.dtype != np.uint8 and np.ptp(picture) > 0: assert (out.min(), out.max()) == (0, 255)


def test_window_is_linear_and_clips():
    hu = np.array([[-1000, -100, 0, 100, 3000]], np.float32)
    assert to_uint8(hu, window=(-100, 155)).tolist() == [[0, 0, 100, 200, 255]]
    assert to_uint8(np.full((3, 3), 7, np.uint16)).max() == 0
    with pytest.raises(MedxferError, match="window"): to_uint8(hu, window=(5, 1))


@given(PICTURES)
@settings(max_examples=60, deadline=None)
def test_gray_lies_between_the_channels(picture):
    gray = to_gray(picture)
    assert gray.shape == picture.shape[:2] and gray.dtype == picture.dtype
    planes = picture if picture.ndim == 3 else picture[..., None]
    assert (gray >= planes.min(-1) - 1e-2).all() and (gray <= planes.max(-1) + 1e-2).all()


@given(PICTURES, st.integers(1, 48), st.sampled_from(["pad", "crop"]), st.booleans())
@settings(max_examples=120, deadline=None)
def test_fit_square_has_the_size_type_and_range_of_its_picture(picture, size, how, nearest):
    before = picture.copy()
    out = fit_square(picture, size, how, nearest)
    assert out.shape == (size, size, *picture.shape[2:]) and out.dtype == picture.dtype
    assert out.min() >= picture.min() and out.max() <= picture.max()
    assert np.array_equal(picture, before)
    if nearest: assert np.isin(out, picture).all()


@given(hnp.arrays(np.uint16, st.integers(1, 30).map(lambda n: (n, n))), st.sampled_from(["pad", "crop"]))
@settings(max_examples=40, deadline=None)
def test_a_square_of_the_right_size_is_unchanged(picture, how):
    assert np.array_equal(fit_square(picture, len(picture), how), picture)


def test_shrinking_agrees_with_pillow_on_uint8(noise):
    ours, pillow = fit_square(noise[:48], 20), np.array(Image.fromarray(noise[:48]).resize((20, 20), Image.Resampling.BICUBIC))
    assert np.abs(ours.astype(int) - pillow).max() <= 1


def test_a_bad_size_is_refused(noise):
    with pytest.raises(MedxferError, match="size=0"): fit_square(noise, 0)


def test_the_grid_checks_its_lists(noise):
    with pytest.raises(MedxferError, match="no pictures"): show_images([], alt="nothing")
    with pytest.raises(MedxferError, match="titles= holds 1 entries for 2"): show_images([noise, noise], ["one"], alt="two pictures of noise")


@pytest.mark.parametrize(("width", "mm", "length"), [(512, 0.7, 50), (128, 0.3, 5), (64, 0.01, 0.1), (1000, 1, 200)])
def test_the_scale_bar_has_a_round_length_of_at_most_a_quarter(width, mm, length):
    _, ax = images.plt.subplots()
    images._scale_bar(ax, (width, width), mm)
    (x0, x1), text = ax.lines[0].get_xdata(), ax.texts[0].get_text()
    images.plt.close("all")
    assert text == f"{length:g} mm" and abs((x1 - x0) * mm - length) < 1e-6 and x1 - x0 <= width / 4
