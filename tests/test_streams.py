"""Tar shards, data sets that stream, buckets, and what is held out: real files, made here."""

import io
import json
import shutil
import tarfile

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import sample
import train
from batches import Batches
from checkpoint import STATE, load_expert
from data import open_source
from evaluate import LoadedRun
from extras.captioned import HELD_OUT_FROM, WIDEST, bucket_shapes
from extras.files import read_picture
from extras.held_out import held_out_examples, source_of
from extras.streams import Shards, shard_files
from flags import data_form
from weights import read_safetensors

COLORS = ("red", "lime", "blue", "white", "black", "yellow", "magenta")


def png(color, size=(20, 20)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return file.getvalue()


def write_tar(path, members: dict[str, bytes]):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def write_shards(folder, shards=3, each=4) -> str:
    folder.mkdir(exist_ok=True)
    for k in range(shards):
        members = {}
        for i in range(each):
            color = COLORS[(k * each + i) % len(COLORS)]
            members[f"{k:02d}{i:02d}.png"] = png(color)
            members[f"{k:02d}{i:02d}.txt"] = f"no. {k * each + i}, {color}".encode()
        write_tar(folder / f"{k:03d}.tar", members)
    return str(folder / f"{{000..{shards - 1:03d}}}.tar")


def opened(text: str, image_size: int = 16, seed: int = 0):
    name, options = data_form(text)
    return open_source(name, image_size, seed, **options)


def is_of_its_color(caption: str, picture: np.ndarray) -> bool:
    expected = Image.new("RGB", (1, 1), caption.split(", ")[1]).getpixel((0, 0))
    return bool((picture == np.array(expected)).all())


# -------------------------------------------------------------------------------------------------
# tar shards


def test_shards_are_read_where_they_lie(tmp_path):
    """An epoch has each picture once, shard after shard, each in its own order, and another epoch
    other shards first; nothing is extracted."""
    pattern = write_shards(tmp_path / "shards")
    source = opened(pattern)
    epochs = []
    for start in (0, 12, 24, 36):
        numbers = []
        for i in range(start, start + 12):
            caption, pictures = source.example(i, 2)
            assert pictures.shape == (2, 16, 16, 3) and is_of_its_color(caption, pictures)
            numbers.append(int(caption.split(",")[0].removeprefix("no. ")))
        assert sorted(numbers) == list(range(12))
        assert all(numbers[k + 1] == numbers[k] + 1 for k in range(11) if (k + 1) % 4)
        epochs.append(tuple(numbers))
    assert len(set(epochs)) > 1
    assert sorted(path.name for path in (tmp_path / "shards").iterdir()) == [
        "000.tar", "001.tar", "002.tar"
    ]  # fmt: skip
    same = opened(str(tmp_path / "shards" / "*.tar"))
    assert same.example(5, 1)[0] == source.example(5, 1)[0]
    assert "12 pictures with captions in 3 shards" in source.about()


def test_captions_in_json_folders_and_pictures_without(tmp_path):
    members = {
        "a/0.jpg.png": png("red"),  # WebDataset: the name ends at the first point
        "a/0.json": json.dumps({"caption": " no. 0, red "}).encode(),
        "a/1.PNG": png("blue"),
        "a/1.txt": "\ufeffno. 1, blue\n".encode(),
        "a/2.png": png("lime"),
        "a/3.txt": b"no picture",
        "b/1.png": png("white"),
        "b/1.txt": b"  ",
        "readme": b"",
    }
    source = opened(str(write_tar(tmp_path / "x.tar", members)))
    captions = sorted(source.example(i, 1)[0] for i in range(len(source.pairs)))
    assert captions == ["no. 1, blue"]  # 0.jpg.png is of the kind "jpg.png", which is no picture's
    assert source.uncaptioned == 2


@pytest.mark.parametrize(
    "name, kind, message",
    [
        ("../a.png", tarfile.REGTYPE, "leads out of it"),
        ("/a.png", tarfile.REGTYPE, "leads out of it"),
        ("b\\..\\..\\a.png", tarfile.REGTYPE, "leads out of it"),
        ("C:/a.png", tarfile.REGTYPE, "leads out of it"),
        ("a.png", tarfile.SYMTYPE, "is a link or a device"),
        ("a.txt", tarfile.LNKTYPE, "is a link or a device"),
        ("a.txt", tarfile.CHRTYPE, "is a link or a device"),
    ],
)
def test_names_that_lead_out_of_a_shard_are_refused(name, kind, message, tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        entry = tarfile.TarInfo(name)
        entry.type = kind
        entry.linkname = "/etc/passwd"
        tar.addfile(entry)
    with pytest.raises(ValueError, match=message):
        Shards(str(tmp_path / "x.tar"), 16)


def test_what_are_no_shards_is_refused(tmp_path):
    write_shards(tmp_path, 2)
    whole = (tmp_path / "000.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 3])
    (tmp_path / "text.tar").write_text("no tar at all" * 100)
    with tarfile.open(tmp_path / "small.tar", "w:gz") as tar:
        tar.add(tmp_path / "000.tar")
    write_tar(tmp_path / "empty.tar", {})
    write_tar(tmp_path / "latin.tar", {"a.png": png("red"), "a.txt": b"\xe9t\xe9"})
    cases = {
        "{000..002}.tar": "002.tar is not there",
        "{002..000}.tar": "expected a range upward",
        "{000..999999}.tar": "of at most 100000",
        "nothing-*.tar": "there is no such file",
        "cut.tar": "does not read as a tar file",
        "text.tar": "does not read as a tar file",
        "small.tar": "whole and not compressed",
        "empty.tar": "no picture with a caption",
        "latin.tar": "a.txt in .*latin.tar: .* expected UTF-8",
    }
    for pattern, message in cases.items():
        with pytest.raises(ValueError, match=message):
            Shards(str(tmp_path / pattern), 16)
    assert len(shard_files(str(tmp_path / "{000..001}.tar"))) == 2


def test_a_damaged_picture_of_a_shard_is_skipped(tmp_path):
    members = {"0.png": png("red")[:-30], "0.txt": b"no. 0, red"}
    members |= {"1.png": png("blue"), "1.txt": b"no. 1, blue"}
    source = opened(str(write_tar(tmp_path / "x.tar", members)))
    with pytest.warns(UserWarning, match="0.png in .*x.tar does not decode .* and is skipped"):
        drawn = [source.example(i, 1) for i in range(2)]
    assert [caption for caption, _ in drawn] == ["no. 1, blue"] * 2
    assert len(source.skipped) == 1


def test_a_run_on_shards_goes_on_exactly_where_it_was(tiny_run, tmp_path):
    """Also with the shards in another place; not with others."""
    pattern = write_shards(tmp_path / "shards")
    flags = [*tiny_run, "--steps", "5", "--draws", "2", "--data"]
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    train.main([*flags, pattern, "--out", whole])
    run = train.prepare(*train.settings([*flags, pattern, "--out", parts]))
    train.train(run, until=3)
    (tmp_path / "shards").rename(tmp_path / "moved")
    train.main(["--resume", "--out", parts, "--data", str(tmp_path / "moved" / "*.tar")])
    expected, found = (
        read_safetensors(f"{whole}/{STATE}")[1],
        read_safetensors(f"{parts}/{STATE}")[1],
    )
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    write_tar(tmp_path / "moved" / "003.tar", {"a.png": png("red"), "a.txt": b"no. 12, red"})
    with pytest.raises(ValueError, match="has changed"):
        train.main(
            ["--resume", "--out", parts, "--steps", "6", "--data", f"{tmp_path}/moved/*.tar"]
        )


# -------------------------------------------------------------------------------------------------
# data sets of the Hugging Face Hub


@pytest.fixture(scope="module")
def hub_set(tmp_path_factory):
    """A folder that `datasets` reads, as it would an id."""
    folder = tmp_path_factory.mktemp("hub") / "set"
    images = [{"bytes": png(color), "path": None} for color in COLORS]
    images[3]["bytes"] = images[3]["bytes"][:-30]
    columns = {
        "picture": images,
        "caption": [f"no. {i}, {color}" for i, color in enumerate(COLORS)],
        "number": list(range(len(COLORS))),
    }
    columns["caption"][5] = ""
    features = datasets.Features(
        {
            "picture": datasets.Image(),
            "caption": datasets.Value("string"),
            "number": datasets.Value("int64"),
        }
    )
    table = datasets.Dataset.from_dict(columns, features)
    folder.mkdir()
    table.to_parquet(str(folder / "train.parquet"))
    return str(folder)


def test_a_data_set_is_streamed(hub_set):
    """In its order, without what has no caption, the next in place of what does not decode; again
    and again; and any example at once, or anew."""
    source = opened(f"hf:{hub_set}")
    expected = [f"no. {i}, {COLORS[i]}" for i in (0, 1, 2, 4, 4, 6)]
    for i in [*range(14), 3, 9, 2]:
        caption, pictures = source.example(i, 2)
        assert caption == expected[i % 6] and is_of_its_color(caption, pictures)
    assert source.prompts[:2] == ("no. 0, red", "no. 1, lime")
    assert "caption of picture" in source.about() and len(source.skipped) > 1
    chosen = opened(f"hf:{hub_set}:split=train:image=picture:text=caption")
    assert chosen.example(4, 1)[0] == expected[4]


def test_a_stream_beside_another_source(hub_set, tiny_llm):
    """One thread alone asks it, in order."""
    batches = Batches(opened(f"shapes,hf:{hub_set}"), tiny_llm("qwen2"), 8, 1, 0)
    captions = [caption for _ in range(20) for caption in next(batches)[0]]
    batches.close()
    expected = [f"no. {i}, {COLORS[i]}" for i in (0, 1, 2, 4, 4, 6)]
    assert captions[1::2] == [expected[i % 6] for i in range(80)]


def test_what_a_data_set_does_not_have_is_refused(hub_set, tmp_path):
    cases = {
        f"{hub_set}:text=title": "no column for text; expected text=COLUMN, one of picture, caption",
        f"{hub_set}:split=test": "split 'test' cannot be read",
        f"{hub_set}:column=a": "has no option 'column'; it has split, image, text",
        f"{hub_set}:text=number": "no picture with a caption",
        str(tmp_path): "cannot be read",
    }
    for text, message in cases.items():
        with pytest.raises(ValueError, match=message):
            opened(f"hf:{text}").example(0, 1)


def test_a_run_on_a_stream_goes_on(hub_set, tiny_run, tmp_path):
    flags = [*tiny_run, "--steps", "4", "--draws", "4", "--data", f"hf:{hub_set}"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train.main([*flags, "--out", str(whole)])
    train.train(train.prepare(*train.settings([*flags, "--out", str(parts)])), until=2)
    train.main(["--resume", "--out", str(parts)])
    assert (whole / STATE).read_bytes()[-1000:] == (parts / STATE).read_bytes()[-1000:]
    expected, found = read_safetensors(whole / STATE)[1], read_safetensors(parts / STATE)[1]
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


# -------------------------------------------------------------------------------------------------
# shapes of pictures


def test_bucket_shapes():
    shapes = bucket_shapes(64, 16)
    assert (64, 64) in shapes and (48, 80) in shapes and (80, 48) in shapes
    for height, width in shapes:
        assert height % 16 == width % 16 == 0
        assert max(height, width) <= WIDEST * min(height, width)
        assert 0.75 * 64**2 <= height * width <= 1.25 * 64**2


def stripes(path, width, height, exif=None):
    """Its left half red, its right half blue."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2, 0] = 255
    pixels[:, width // 2 :, 2] = 255
    Image.fromarray(pixels).save(path, **({"exif": exif} if exif else {}))
    path.with_suffix(".txt").write_text(f"{width} by {height}, {path.stem}")


@pytest.fixture
def all_shapes(tmp_path):
    folder = tmp_path / "all-shapes"
    folder.mkdir()
    for i in range(8):
        stripes(folder / f"wide{i}.png", 60 + i, 30)
        stripes(folder / f"tall{i}.png", 30, 58 + i)
        stripes(folder / f"square{i}.png", 40, 40 + i % 2)
    stripes(folder / "strip.png", 200, 20)  # too few of this shape: it goes to the wide ones
    turned = Image.Exif()
    turned[0x0112] = 6  # lies on its side: a tall picture
    stripes(folder / "camera.png", 60, 30, turned)
    return folder


def test_a_batch_has_one_shape_and_pictures_keep_theirs(all_shapes, tiny_llm):
    source = open_source(str(all_shapes), 16)
    source.use_buckets(4, 4)
    batches = Batches(source, tiny_llm("qwen2"), 8, 2, 0)
    seen: dict[tuple, set] = {}
    for _ in range(24):
        captions, pictures = next(batches)
        shape = pictures.shape[1:3]
        assert pictures.shape == (8, *shape, 3)
        for caption, picture in zip(captions, pictures):
            seen.setdefault(shape, set()).add(caption.split(", ")[1])
            if "camera" not in caption:
                assert picture[0, 0, 0] == 255 and picture[-1, -1, 2] == 255  # uncut sides
    batches.close()
    kinds = {shape: {name.rstrip("01234567") for name in names} for shape, names in seen.items()}
    assert kinds == {
        (16, 16): {"square"},
        (12, 24): {"wide", "strip"},
        (24, 12): {"tall", "camera"},
    }
    every = set().union(*seen.values())
    assert len(every) == 26  # in 24 batches of 4 captions each is seen, whatever is left out
    wide = np.asarray(read_picture(all_shapes / "wide0.png", (12, 24)))
    assert np.array_equal(wide[:, :9], np.full((12, 9, 3), (255, 0, 0)))


def test_a_run_with_buckets_draws_in_any_shape(all_shapes, tiny_run, tmp_path, capsys):
    flags = [*tiny_run, "--draws", "2", "--data", str(all_shapes), "--buckets", "--steps", "6"]
    run = str(tmp_path / "run")
    train.train(train.prepare(*train.settings(flags)), until=3)
    train.main(["--resume", "--out", run])
    whole = str(tmp_path / "whole")
    train.main([*flags, "--out", whole])
    expected, found = read_safetensors(f"{whole}/{STATE}")[1], read_safetensors(f"{run}/{STATE}")[1]
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    drawing = f"--ckpt {run} --device cpu --dtype float32 --steps 2 --size 12x20 --n 2".split()
    out = tmp_path / "drawn"
    sample.main([*drawing, "--prompt", "a", "--maps", "--trajectory", "--out", str(out)])
    assert Image.open(out / "000-a-seed0.png").size == (20, 12)
    assert (out / "grid.png").exists() and len(list(out.glob("*maps.png"))) == 2
    with pytest.raises(ValueError, match="12x21: expected sides that 4 divides"):
        sample.main([*drawing[:-3], "12x21", "--prompt", "a", "--out", str(out)])
    with pytest.raises(ValueError, match="--buckets: --data shapes has one shape"):
        train.main([*tiny_run, "--buckets", "--out", str(tmp_path / "other")])


# -------------------------------------------------------------------------------------------------
# what training never sees


def test_a_tenth_is_held_out_by_the_picture_not_its_name(tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(300):
        picture = Image.fromarray(rng.integers(0, 255, (4, 4, 3), np.uint8))
        for name in (f"{i}", f"copy-of-{i}"):
            picture.save(folder / f"{name}.png")
            (folder / f"{name}.txt").write_text(name)
    source = open_source(str(folder), 16)
    held_out = {caption for _, caption in source.held_out}
    assert 30 <= len(held_out) <= 90
    for i in range(300):
        assert (str(i) in held_out) == (f"copy-of-{i}" in held_out)
    seen = {source.example(i, 1)[0] for i in range(len(source.pairs))}
    assert seen == {caption for _, caption in source.pairs} and not seen & held_out
    assert f"{len(held_out)} of them held out" in source.about()
    for path in list(folder.iterdir())[2 * (HELD_OUT_FROM - 1) :]:
        path.unlink()
    assert not open_source(str(folder), 16).held_out


def test_the_loss_on_what_is_held_out(tiny_run, tmp_path, monkeypatch, capsys):
    """By t, with intervals; for one's own pictures and for what is drawn on the fly; the same run
    beside itself differs by nothing."""
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(120):
        stripes(folder / f"{i}.png", 4 + i, 8)
    run = str(tmp_path / "run")
    train.main([*tiny_run, "--data", str(folder), "--steps", "3"])
    score = ["--suite", "held-out", "--device", "cpu", "--dtype", "float32", "--limit", "9"]
    evaluate.main(["--ckpt", run, *score])
    found = json.loads((tmp_path / "run" / "partial" / "evaluate.json").read_text())["held-out"]
    assert found["pictures"] == 9 and len(found["by_t"]) == 5
    for line in [*found["by_t"], found["all"]]:
        low, high = line["interval"]
        assert 0 < low < line["loss"] < high < 1e4
    mean = np.mean([line["loss"] for line in found["by_t"]])
    assert abs(mean - found["all"]["loss"]) < 1e-4 * mean
    assert "loss on 9 pictures that training never saw" in capsys.readouterr().out

    shapes = str(tmp_path / "shapes")
    train.main([*tiny_run, "--out", shapes, "--steps", "2"])
    shutil.copytree(shapes, tmp_path / "same")
    evaluate.main(["--ckpt", shapes, "--versus", str(tmp_path / "same"), *score])
    scores = json.loads((tmp_path / "shapes" / "partial" / "evaluate.json").read_text())
    assert scores["held-out"]["difference"]["all"] == {"loss": 0.0, "interval": [0.0, 0.0]}
    with pytest.raises(ValueError, match="hold out different pictures"):
        evaluate.main(["--ckpt", shapes, "--versus", run, *score])
    with pytest.raises(ValueError, match="for shapes, .*for other data: --suite held-out"):
        evaluate.main(["--ckpt", run])
    for path in list(folder.glob("*.png"))[50:]:
        path.unlink()
    with pytest.raises(ValueError, match="none is held out of 50 pictures"):
        evaluate.main(["--ckpt", run, *score])


def test_of_a_mix_each_one_holds_out_its_share(tiny_run, tmp_path):
    """Of the folder what training never sees, of shapes another seed's the same."""
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(200):
        stripes(folder / f"{i}.png", 4 + i, 8)
    data = f"shapes:1,{folder}:3"
    name, options = data_form(data)
    source = open_source(name, 16, **options)
    captions = [caption for caption, _ in held_out_examples(source, 12)]
    trained = {caption for _, caption in source.sources[1].pairs}
    never = {caption for _, caption in source.sources[1].held_out}
    assert len(captions) == 12 and len(never) > 9 and not trained & never
    assert not never & set(captions[:3]) and set(captions[3:]) <= never

    run = str(tmp_path / "run")
    train.main([*tiny_run, "--data", data, "--steps", "2", "--save-every", "1", "--keep", "2"])
    for folder_of_run in (run, f"{run}/step-000001"):
        expert = load_expert(folder_of_run, torch.device("cpu"))
        found = source_of(LoadedRun(folder_of_run, expert, None, None), seed=3)
        assert found.weights == [1, 3]
    (tmp_path / "run" / STATE).unlink()
    with pytest.raises(ValueError, match="the shares of shapes,.* stand in a run's"):
        source_of(LoadedRun(run, expert, None, None), seed=3)
