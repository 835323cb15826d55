import io
import json
import stat
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from benchmarks.synthetic import write_synthetic
from depgraph import DepgraphError
from domains import KNOWN, load_domains, unpack
from domains.data.unpack import MANIFEST
from tests.domains.copies import BAD_NAMES, files_of, hdf5, png, tarred, zipped


@pytest.fixture(scope="module")
def pacs(tmp_path_factory):
    """All domains and classes of PACS, two to eight images each."""
    return write_synthetic("PACS", tmp_path_factory.mktemp("pacs") / "data", share=0.01, side=8)


TREE = {
    f"{domain}/{name}/{i}.png": png((80 * i, 9 * len(domain), 0))
    for domain in ("art", "photo")
    for name in ("cat", "dog")
    for i in range(3)
}


@pytest.mark.parametrize("top", ["", "PACS/", "kfold/", "PACS/kfold/"])
@pytest.mark.parametrize("pack", [zipped, tarred])
def test_archives_with_any_folders_above_the_domains_give_the_same_tree(pacs, tmp_path, top, pack):
    files = files_of(pacs)
    extra = {"Readme.txt": b"read me", "__MACOSX/photo/dog/._pic_001.png": b"x"}
    path = pack(tmp_path / "PACS.archive", files | extra, top)
    done = unpack([path], tmp_path / "out")
    assert files_of(tmp_path / "out") == files
    assert done.written == len(files) and done.skipped == 2
    assert load_domains(tmp_path / "out").classes == KNOWN["PACS"].classes


def test_office_home_with_its_spaces_and_lists_is_unpacked_from_a_compressed_tar(tmp_path):
    data = write_synthetic("Office-Home", tmp_path / "data", share=1e-3, side=8)
    files = files_of(data)
    extra = {"ImageInfo.csv": b"a,b", "imagelist.txt": b"Art/..."}
    path = tarred(tmp_path / "office.tar.gz", files | extra, "OfficeHomeDataset_10072016/")
    done = unpack([path], tmp_path / "out")
    assert files_of(tmp_path / "out") == files
    assert list(done.images) == ["Art", "Clipart", "Product", "Real World"]


def test_one_archive_a_domain_is_put_together(tmp_path):
    parts = [
        zipped(tmp_path / f"{name}.zip", {k: v for k, v in TREE.items() if k.startswith(name)})
        for name in ("art", "photo")
    ]
    unpack(parts, tmp_path / "out")
    assert files_of(tmp_path / "out") == TREE


def test_the_same_call_again_writes_nothing_and_another_archive_is_refused(tmp_path):
    path = zipped(tmp_path / "a.zip", TREE)
    assert unpack([path], tmp_path / "out").written == len(TREE)
    assert unpack([path], tmp_path / "out").written == 0
    other = zipped(tmp_path / "b.zip", {**TREE, "art/cat/9.png": png()})
    with pytest.raises(DepgraphError, match="holds something else"):
        unpack([other], tmp_path / "out")
    (tmp_path / "out/art/cat/0.png").unlink()
    with pytest.raises(DepgraphError, match="11 of 12"):
        unpack([path], tmp_path / "out")


def test_an_interrupted_call_is_continued_where_it_stopped(tmp_path, monkeypatch):
    path = zipped(tmp_path / "a.zip", TREE)
    read, count = zipfile.ZipFile.read, 0

    def stop_after_five(archive, name):
        nonlocal count
        count += 1
        if count == 6:
            raise KeyboardInterrupt
        return read(archive, name)

    monkeypatch.setattr(zipfile.ZipFile, "read", stop_after_five)
    with pytest.raises(KeyboardInterrupt):
        unpack([path], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(zipfile.ZipFile, "read", read)
    assert unpack([path], tmp_path / "out").written == len(TREE) - 5
    assert files_of(tmp_path / "out") == TREE


def refused(sources, out, match, **options):
    """An error that says so, and nothing written anywhere near."""
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(DepgraphError, match=match):
        unpack(sources, out, **options)
    assert sorted(out.parent.rglob("*")) == before


@pytest.mark.parametrize("name", BAD_NAMES)
@pytest.mark.parametrize("pack", [zipped, tarred])
def test_a_member_that_leads_out_of_the_folder_refuses_the_whole_archive(tmp_path, name, pack):
    path = pack(tmp_path / "bad", {**TREE, name: png()})
    refused([path], tmp_path / "out", "leads out of its folder|no portable path")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_a_tar_with_links_or_devices_is_refused(tmp_path, kind):
    path = tmp_path / "bad.tar"
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("art/dog/a.png")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    refused([path], tmp_path / "out", r"art/dog/a\.png.*link or a device")


def test_a_zip_with_a_symbolic_link_is_refused(tmp_path):
    path = tmp_path / "bad.zip"
    with zipfile.ZipFile(path, "w") as archive:
        info = zipfile.ZipInfo("art/dog")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc")
        archive.writestr("art/dog/a.png", png())
    refused([path], tmp_path / "out", "'art/dog' is a link")


@pytest.mark.parametrize(("pack", "name"), [(zipped, "bomb.zip"), (tarred, "bomb.tar.gz")])
def test_more_than_the_limit_is_refused_by_what_the_archive_declares(tmp_path, pack, name):
    path = pack(tmp_path / name, {**TREE, "art/cat/zeros.png": bytes(5 * 2**20)})
    assert path.stat().st_size < 2**20
    refused([path], tmp_path / "out", "above the limit.*--max-size", max_bytes=4 * 2**20)


def test_more_than_the_disk_has_is_refused(tmp_path, monkeypatch):
    path = zipped(tmp_path / "a.zip", TREE)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10}))
    refused([path], tmp_path / "out", "are free.*make room")


def test_a_damaged_member_leaves_no_folder(tmp_path):
    path = zipped(tmp_path / "a.zip", {"art/cat/0.png": png(side=64), **TREE})
    content = bytearray(path.read_bytes())
    content[60:70] = bytes(10)
    path.write_bytes(content)
    with pytest.raises(DepgraphError, match=r"damaged.*get it again"):
        unpack([path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ({"dog/a.png": png()}, "outside of .*<domain>/<class>"),
        ({"a/x/dog/1.png": png(), "b/x/dog/1.png": png()}, "choose the one.*--inside"),
        ({"notes.txt": b"x"}, "has no images"),
    ],
)
def test_an_archive_without_images_by_domain_and_class_is_refused(tmp_path, files, match):
    refused([zipped(tmp_path / "a.zip", files)], tmp_path / "out", match)


def test_the_folder_that_holds_the_domains_can_be_chosen(tmp_path):
    files = {f"data/PACS/{k}": v for k, v in TREE.items()} | {"paper/figures/a.png": png()}
    path = zipped(tmp_path / "a.zip", {**files, "figure.png": png()})
    refused([path], tmp_path / "out", "--inside")
    unpack([path], tmp_path / "out", inside="data/PACS/")
    assert files_of(tmp_path / "out") == TREE


def test_what_is_no_archive_or_not_there_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    for source, match in ((tmp_path / "a.txt", "no zip, tar"), (tmp_path / "none", "not there")):
        refused([source], tmp_path / "out", match)
    refused([tmp_path], tmp_path / "out", "datasets did not save")


def test_a_folder_with_something_else_in_it_is_kept(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    refused([zipped(tmp_path / "a.zip", TREE)], tmp_path / "out", "holds something else")


def pixels(count, seed):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 227, 227, 3), dtype=np.uint8)


def test_pacs_as_hdf5_becomes_the_same_pixels_and_the_test_file_repeats_nothing(tmp_path):
    train, val, labels = pixels(7, 0), pixels(2, 1), np.array([1, 2, 3, 4, 5, 6, 7])
    paths = [
        hdf5(tmp_path / "photo_train.hdf5", train, labels),
        hdf5(tmp_path / "photo_val.hdf5", val, np.array([7, 1])),
        hdf5(tmp_path / "photo_test.hdf5", np.concatenate([train, val]), np.array([*labels, 7, 1])),
        hdf5(tmp_path / "sketch_test.hdf5", pixels(1, 2), np.array([[3]])),
    ]
    done = unpack(paths, tmp_path / "out")
    assert done.images == {"photo": 9, "sketch": 1}
    for index, name in enumerate(KNOWN["PACS"].classes):
        with Image.open(tmp_path / "out/photo" / name / f"train_{index:05d}.png") as image:
            assert np.array_equal(np.asarray(image), train[index])
    alone = unpack(paths[2:3], tmp_path / "alone")
    assert alone.images == {"photo": 9}


@pytest.mark.parametrize(
    ("name", "images", "labels", "match"),
    [
        ("photo_train.hdf5", np.zeros((2, 8, 8, 3), np.float32), [1, 2], "expected uint8"),
        ("photo_train.hdf5", np.zeros((2, 8, 8, 3), np.uint8), [0, 1], "from 1 to 7"),
        ("photo_train.hdf5", np.zeros((2, 8, 8, 3), np.uint8), [1], "from 1 to 7"),
        ("photo.hdf5", np.zeros((1, 8, 8, 3), np.uint8), [1], "says no domain"),
    ],
)
def test_hdf5_of_another_form_is_refused(tmp_path, name, images, labels, match):
    refused([hdf5(tmp_path / name, images, np.array(labels))], tmp_path / "out", match)


def saved_dataset(folder, images, domains, labels):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed (extra: data)")
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "domain": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
        }
    )
    rows = {
        "image": [{"bytes": content, "path": None} for content in images],
        "domain": domains,
        "label": labels,
    }
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(folder)
    return folder


def jpeg():
    buffer = io.BytesIO()
    Image.fromarray(pixels(1, 5)[0]).save(buffer, "JPEG")
    return buffer.getvalue()


def test_a_saved_hugging_face_dataset_is_copied_byte_for_byte(tmp_path):
    images = [png(), jpeg(), png((0, 0, 9)), png((0, 9, 0))]
    saved_dataset(tmp_path / "hub", images, ["photo", "photo", "art", "art"], [0, 1, 0, 1])
    done = unpack([tmp_path / "hub"], tmp_path / "out")
    files = files_of(tmp_path / "out")
    assert done.images == {"art": 2, "photo": 2}
    assert files["photo/dog/all_000001.jpg"] == images[1]
    assert sorted(files.values()) == sorted(images)
    assert unpack([tmp_path / "hub"], tmp_path / "out").written == 0
    assert load_domains(tmp_path / "out").classes == ("cat", "dog")


def test_a_dataset_whose_domain_names_are_no_folder_names_is_refused(tmp_path):
    saved_dataset(tmp_path / "hub", [png()], ["../up"], [0])
    refused([tmp_path / "hub"], tmp_path / "out", r"'\.\./up' as the name")


def test_a_dataset_without_domains_is_refused_with_its_columns(tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed (extra: data)")
    datasets.Dataset.from_dict({"image": ["x"], "label": ["a"]}).save_to_disk(tmp_path / "hub")
    refused([tmp_path / "hub"], tmp_path / "out", "no column 'domain', only image, label")


def test_a_library_that_is_not_installed_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    refused(["hf:owner/name"], tmp_path / "out", r"depgraph-prune\[data\]")


def test_the_folder_says_what_it_was_made_from(tmp_path):
    unpack([zipped(tmp_path / "a.zip", TREE)], tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["sources"] == ["a.zip"] and manifest["images"] == len(TREE)
