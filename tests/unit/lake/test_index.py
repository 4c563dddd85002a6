from __future__ import annotations

import gzip
import itertools
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem

from tinysam.lake import listing, schema
from tinysam.lake.filesystem import LakeError, MissingError, join, write_once
from tinysam.lake.images import ImageError, decode_image
from tinysam.lake.index import IndexConfig, build_index, read_image_bytes
from tinysam.lake.listing import LakeFile

Png = Callable[[int], bytes]
Tar = Callable[..., bytes]

ODD_NAMES = [
    "a b/c d.png",
    "it's.png",
    'say "hi".png',
    "日本/ü.png",
    "100%25.png",
    "a#b?c=d.png",
    "[x]*.png",
    "a,b;c.png",
]


def ids(index: pa.Table) -> list[str]:
    return index.column("image_id").to_pylist()


def parquet(images: list[Any], kind: pa.DataType | None = None, name: str = "image", **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(
        pa.table({"label": list(range(len(images))), name: pa.array(images, kind or pa.binary())}), sink, **options
    )
    return sink.getvalue().to_pybytes()


def value(row: Mapping[str, Any]) -> int:
    return int(decode_image(read_image_bytes(row))[0, 0, 0])


class TestFolders:
    def test_every_odd_name_is_listed_and_read(self, storage: str, png: Png) -> None:
        for number, name in enumerate(ODD_NAMES):
            write_once(join(storage, name), png(number))
        index = build_index(IndexConfig(lake=storage))
        assert index.schema == schema.INDEX
        assert ids(index) == sorted(ODD_NAMES)
        assert [value(row) for row in index.to_pylist()] == [ODD_NAMES.index(name) for name in ids(index)]

    def test_two_files_of_one_name_keep_separate_ids(self, storage: str, png: Png) -> None:
        write_once(join(storage, "a", "1.png"), png(1))
        write_once(join(storage, "b", "1.png"), png(2))
        index = build_index(IndexConfig(lake=storage))
        assert ids(index) == ["a/1.png", "b/1.png"]
        assert [value(row) for row in index.to_pylist()] == [1, 2]

    def test_sizes_come_from_the_listing(self, storage: str, png: Png) -> None:
        write_once(join(storage, "1.png"), png(1))
        (row,) = build_index(IndexConfig(lake=storage)).to_pylist()
        assert (row["offset"], row["size"]) == (0, len(png(1)))
        assert row["shard_id"] is row["annotations"] is row["width"] is None

    def test_only_images_are_taken(self, storage: str, png: Png) -> None:
        for name in (
            "1.png",
            "2.JPG",
            "3.Tiff",
            "notes.txt",
            "instances.json",
            "model.pt",
            ".4.png",
            ".git/5.png",
            "._6.png",
        ):
            write_once(join(storage, name), png(1))
        assert ids(build_index(IndexConfig(lake=storage))) == ["1.png", "2.JPG", "3.Tiff"]

    def test_order_is_that_of_the_ids_across_folders_and_containers(self, storage: str, png: Png, tar: Tar) -> None:
        names = ["a/z.png", "a-b/y.png", "a.png", "a0.png", "A.png", "b/c/d.png", "b/c-d.png"]
        for name in names:
            write_once(join(storage, name), png(1))
        write_once(join(storage, "a.tar"), tar({"z.png": png(1), "b.png": png(2)}))
        write_once(join(storage, "a.parquet"), parquet([png(1)] * 11))
        found = ids(build_index(IndexConfig(lake=storage)))
        assert found == sorted(found)
        assert len(found) == len(names) + 2 + 11

    def test_a_single_file_is_a_lake(self, storage: str, png: Png) -> None:
        url = join(storage, "a b", "ü.png")
        write_once(url, png(3))
        write_once(join(storage, "a b", "ü.json"), b"[]")
        (row,) = build_index(IndexConfig(lake=url)).to_pylist()
        assert row["image_id"] == "ü.png"
        assert value(row) == 3
        assert row["annotations_uri"].endswith("ü.json")

    def test_sidecars_are_found_by_stem_in_the_same_folder(self, storage: str, png: Png) -> None:
        for name in ("a/1.png", "a/1.json", "a/2.png", "b/2.json", "a/x.y.png", "a/x.y.json"):
            write_once(join(storage, name), png(1))
        rows = build_index(IndexConfig(lake=storage)).to_pylist()
        sidecars = {row["image_id"]: row["annotations_uri"] for row in rows}
        assert sidecars == {
            "a/1.png": join(rows[0]["uri"].rsplit("/", 1)[0], "1.json"),
            "a/2.png": None,
            "a/x.y.png": join(rows[0]["uri"].rsplit("/", 1)[0], "x.y.json"),
        }

    def test_links_are_followed_unless_they_lead_back(self, tmp_path: Path, png: Png) -> None:
        lake, elsewhere = tmp_path / "lake", tmp_path / "elsewhere"
        lake.mkdir()
        elsewhere.mkdir()
        (elsewhere / "1.png").write_bytes(png(1))
        (lake / "folder").symlink_to(elsewhere)
        (lake / "2.png").symlink_to(elsewhere / "1.png")
        (lake / "loop").symlink_to(lake)
        (lake / "gone.png").symlink_to(lake / "nothing")
        os.mkfifo(lake / "pipe.png")
        assert ids(build_index(IndexConfig(lake=str(lake)))) == ["2.png", "folder/1.png"]

    def test_a_name_that_is_not_utf8_is_left_out_with_a_warning(
        self, tmp_path: Path, png: Png, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "good.png").write_bytes(png(1))
        with open(os.fsencode(tmp_path) + b"/bad\xff.png", "wb") as file:  # noqa: PTH123
            file.write(png(2))
        assert ids(build_index(IndexConfig(lake=str(tmp_path)))) == ["good.png"]
        assert "not UTF-8" in caplog.text

    def test_a_file_that_vanished_is_missing(self, tmp_path: Path, png: Png) -> None:
        (tmp_path / "1.png").write_bytes(png(1))
        (row,) = build_index(IndexConfig(lake=str(tmp_path))).to_pylist()
        (tmp_path / "1.png").unlink()
        with pytest.raises(ImageError) as caught:
            read_image_bytes(row)
        assert caught.value.status == "missing"

    def test_a_file_that_cannot_be_opened_is_unreadable(self, tmp_path: Path, png: Png) -> None:
        (tmp_path / "1.png").write_bytes(png(1))
        (row,) = build_index(IndexConfig(lake=str(tmp_path))).to_pylist()
        (tmp_path / "1.png").unlink()
        (tmp_path / "1.png").mkdir()
        with pytest.raises(ImageError) as caught:
            read_image_bytes(row)
        assert caught.value.status == "unreadable"

    def test_trouble_with_remote_storage_is_no_fault_of_the_image(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("tinysam.lake.index.read_bytes", _denied)
        with pytest.raises(LakeError, match="denied"):
            read_image_bytes({"uri": "s3://b/1.png", "offset": 0, "size": 1})


def _denied(url: str, offset: int = 0, size: int = -1) -> bytes:
    raise LakeError(f"{url}: access denied")


class TestTars:
    def test_members_are_read_by_range(self, storage: str, png: Png, tar: Tar) -> None:
        names = ["./b.png", "a b/ü.png", "x" * 150 + ".png", "notes.txt"]
        write_once(join(storage, "t", "s.tar"), tar({name: png(number) for number, name in enumerate(names)}))
        rows = build_index(IndexConfig(lake=storage)).to_pylist()
        assert {row["image_id"]: value(row) for row in rows} == {
            "t/s.tar/b.png": 0,
            "t/s.tar/a b/ü.png": 1,
            f"t/s.tar/{'x' * 150}.png": 2,
        }
        assert all(row["uri"].endswith("s.tar") and row["size"] == len(png(value(row))) for row in rows)

    def test_a_tar_alone_is_a_lake(self, storage: str, png: Png, tar: Tar) -> None:
        write_once(join(storage, "s.tar"), tar({"1.png": png(7)}))
        (row,) = build_index(IndexConfig(lake=join(storage, "s.tar"))).to_pylist()
        assert (row["image_id"], value(row)) == ("s.tar/1.png", 7)

    def test_of_two_members_of_one_name_the_last_counts(self, tmp_path: Path, png: Png, tar: Tar) -> None:
        (tmp_path / "s.tar").write_bytes(tar({"1.png": png(1), "./1.png": png(2)}))
        (row,) = build_index(IndexConfig(lake=str(tmp_path))).to_pylist()
        assert value(row) == 2

    def test_names_cannot_lead_out_of_the_tar(self, tmp_path: Path, png: Png, tar: Tar) -> None:
        (tmp_path / "s.tar").write_bytes(tar({"../../etc/1.png": png(1), "/abs/2.png": png(2), "a/../3.png": png(3)}))
        assert ids(build_index(IndexConfig(lake=str(tmp_path)))) == [
            "s.tar/a/3.png",
            "s.tar/abs/2.png",
            "s.tar/etc/1.png",
        ]

    def test_a_name_that_is_not_utf8_is_spelt_out(self, tmp_path: Path, png: Png, tar: Tar) -> None:
        (tmp_path / "s.tar").write_bytes(tar({"bad\udcff.png": png(5)}))
        (row,) = build_index(IndexConfig(lake=str(tmp_path))).to_pylist()
        assert (row["image_id"], value(row)) == ("s.tar/bad\\xff.png", 5)

    @pytest.mark.parametrize("name", ["s.tar.gz", "s.tgz", "s.tar.zst", "s.tar"])
    def test_compressed_tars_are_explained(self, tmp_path: Path, png: Png, tar: Tar, name: str) -> None:
        (tmp_path / name).write_bytes(gzip.compress(tar({"1.png": png(1)})))
        with pytest.raises(LakeError, match=f"{name} is a compressed tar: .*unpack it once"):
            build_index(IndexConfig(lake=str(tmp_path)))

    @pytest.mark.parametrize("keep", [1000, 1024 + 20, 1024 + 512, 1024 + 512 + 100])
    def test_a_tar_cut_short_is_explained(self, tmp_path: Path, png: Png, tar: Tar, keep: int) -> None:
        (tmp_path / "s.tar").write_bytes(tar({"1.png": png(1) + bytes(400), "2.png": png(2) + bytes(600)})[:keep])
        with pytest.raises(LakeError, match=r"s\.tar (is not a whole tar|ends inside its member).*--exclude"):
            build_index(IndexConfig(lake=str(tmp_path)))

    def test_damage_in_the_middle_of_a_tar_is_explained(self, tmp_path: Path, png: Png, tar: Tar) -> None:
        data = tar({"1.png": png(1), "2.png": png(2), "3.png": png(3)})
        (tmp_path / "s.tar").write_bytes(data[:1024] + b"\xff" * 512 + data[1536:])
        with pytest.raises(LakeError, match="is not a whole tar"):
            build_index(IndexConfig(lake=str(tmp_path)))

    def test_a_tar_without_its_end_marker_is_whole(self, tmp_path: Path, png: Png, tar: Tar) -> None:
        (tmp_path / "s.tar").write_bytes(tar({"1.png": png(1), "2.png": png(2)})[:2048])
        assert len(build_index(IndexConfig(lake=str(tmp_path)))) == 2

    def test_rubbish_called_tar_is_explained(self, tmp_path: Path) -> None:
        (tmp_path / "s.tar").write_bytes(b"rubbish" * 1000)
        with pytest.raises(LakeError, match="is not a whole tar"):
            build_index(IndexConfig(lake=str(tmp_path)))

    def test_a_tar_that_shrank_since_it_was_indexed_gives_a_status(self, tmp_path: Path, png: Png, tar: Tar) -> None:
        (tmp_path / "s.tar").write_bytes(tar({"1.png": png(1)}))
        (row,) = build_index(IndexConfig(lake=str(tmp_path))).to_pylist()
        (tmp_path / "s.tar").write_bytes(b"")
        with pytest.raises(ImageError) as caught:
            read_image_bytes(row)
        assert caught.value.status == "truncated"


class TestParquet:
    HF = pa.struct([("bytes", pa.binary()), ("path", pa.string())])

    @pytest.mark.parametrize("row_group_size", [1, 3, 100])
    def test_rows_are_images(self, storage: str, png: Png, row_group_size: int) -> None:
        data = parquet([png(number) for number in range(12)], row_group_size=row_group_size)
        write_once(join(storage, "p.parquet"), data)
        rows = build_index(IndexConfig(lake=storage)).to_pylist()
        assert [row["image_id"] for row in rows] == [f"p.parquet#{number:02d}" for number in range(12)]
        assert [value(row) for row in rows] == list(range(12))

    def test_hugging_face_structs_are_images(self, storage: str, png: Png) -> None:
        write_once(join(storage, "p.parquet"), parquet([{"bytes": png(4), "path": "/etc/passwd"}], self.HF))
        (row,) = build_index(IndexConfig(lake=storage)).to_pylist()
        assert value(row) == 4

    @pytest.mark.parametrize("image", [None, {"bytes": None, "path": "/etc/passwd"}])
    def test_a_path_in_a_row_is_never_followed(self, tmp_path: Path, image: Any) -> None:
        (tmp_path / "p.parquet").write_bytes(parquet([image], self.HF))
        (row,) = build_index(IndexConfig(lake=str(tmp_path))).to_pylist()
        with pytest.raises(ImageError) as caught:
            read_image_bytes(row)
        assert caught.value.status == "missing"

    def test_the_only_column_of_bytes_is_taken_whatever_its_name(self, tmp_path: Path, png: Png) -> None:
        (tmp_path / "p.parquet").write_bytes(parquet([png(9)], pa.large_binary(), name="picture"))
        (row,) = build_index(IndexConfig(lake=str(tmp_path))).to_pylist()
        assert value(row) == 9

    def test_several_columns_of_bytes_are_ambiguous(self, tmp_path: Path) -> None:
        pq.write_table(pa.table({"left": [b"1"], "right": [b"2"]}), tmp_path / "p.parquet")
        with pytest.raises(LakeError, match=r"several columns of bytes \(left, right\)"):
            build_index(IndexConfig(lake=str(tmp_path)))

    def test_a_customary_name_wins(self, tmp_path: Path, png: Png) -> None:
        pq.write_table(pa.table({"mask": [b"1"], "image": [png(8)]}), tmp_path / "p.parquet")
        (row,) = build_index(IndexConfig(lake=str(tmp_path))).to_pylist()
        assert value(row) == 8

    def test_tables_without_images_are_left_out_with_a_warning(
        self, tmp_path: Path, png: Png, caplog: pytest.LogCaptureFixture
    ) -> None:
        pq.write_table(pa.table({"caption": ["a"]}), tmp_path / "captions.parquet")
        (tmp_path / "1.png").write_bytes(png(1))
        with caplog.at_level(logging.WARNING):
            assert ids(build_index(IndexConfig(lake=str(tmp_path)))) == ["1.png"]
        assert "captions.parquet" in caplog.text

    @pytest.mark.parametrize("damage", [slice(0, 30), slice(0, -20), slice(0, 0)])
    def test_damaged_parquet_is_explained(self, tmp_path: Path, png: Png, damage: slice) -> None:
        (tmp_path / "p.parquet").write_bytes(parquet([png(1)])[damage])
        with pytest.raises(LakeError, match=r"p\.parquet is not a whole parquet file .*--exclude"):
            build_index(IndexConfig(lake=str(tmp_path)))

    def test_a_file_replaced_under_its_name_is_read_anew(self, tmp_path: Path, png: Png) -> None:
        path = tmp_path / "p.parquet"
        path.write_bytes(parquet([png(1), png(2)]))
        rows = build_index(IndexConfig(lake=str(tmp_path))).to_pylist()
        assert value(rows[0]) == 1
        path.write_bytes(parquet([png(30)]))
        os.utime(path, ns=(1, 1))
        assert value(rows[0]) == 30
        with pytest.raises(ImageError, match="has 1 rows, not 2"):
            read_image_bytes(rows[1])


class TestSelection:
    @pytest.fixture
    def lake(self, tmp_path: Path, png: Png, tar: Tar) -> str:
        for name in ("train/1.png", "train/2.jpg", "val/1.png"):
            write_once(join(str(tmp_path), name), png(1))
        write_once(join(str(tmp_path), "t.tar"), tar({"1.png": png(1), "2.jpg": png(2)}))
        return str(tmp_path)

    @pytest.mark.parametrize(
        ("include", "exclude", "expected"),
        [
            (("train/*",), (), ["train/1.png", "train/2.jpg"]),
            (("*.png",), (), ["t.tar/1.png", "train/1.png", "val/1.png"]),
            (("*.tar",), (), ["t.tar/1.png", "t.tar/2.jpg"]),
            ((), ("*.tar",), ["train/1.png", "train/2.jpg", "val/1.png"]),
            ((), ("*/1.png", "val/*"), ["t.tar/2.jpg", "train/2.jpg"]),
            (("*.png",), ("t.tar/*", "val/*"), ["train/1.png"]),
        ],
    )
    def test_patterns_choose(
        self, lake: str, include: tuple[str, ...], exclude: tuple[str, ...], expected: list[str]
    ) -> None:
        assert ids(build_index(IndexConfig(lake=lake, include=include, exclude=exclude))) == expected

    def test_an_excluded_container_is_not_opened(self, lake: str) -> None:
        write_once(join(lake, "broken.tar"), b"rubbish" * 1000)
        assert len(build_index(IndexConfig(lake=lake, exclude=("broken.tar",)))) == 5

    def test_limit_takes_the_first_ids(self, lake: str) -> None:
        everything = ids(build_index(IndexConfig(lake=lake)))
        for limit in range(1, 7):
            assert ids(build_index(IndexConfig(lake=lake, limit=limit))) == everything[:limit]

    def test_limit_ends_the_listing(self, tmp_path: Path, png: Png, monkeypatch: pytest.MonkeyPatch) -> None:
        for number in range(300):
            write_once(join(str(tmp_path), f"{number:03d}", "1.png"), png(1))
        listed = itertools.count()
        original = listing._list_folder

        def counted(*arguments: Any) -> Any:
            next(listed)
            return original(*arguments)

        monkeypatch.setattr(listing, "_list_folder", counted)
        assert len(build_index(IndexConfig(lake=str(tmp_path), limit=3))) == 3
        assert next(listed) < 100

    def test_nothing_chosen_is_explained(self, lake: str) -> None:
        with pytest.raises(LakeError, match="holds no images that --include and --exclude let through"):
            build_index(IndexConfig(lake=lake, include=("none/*",)))


class TestLakes:
    def test_a_missing_folder_is_explained(self, storage: str) -> None:
        with pytest.raises(MissingError, match=r"does not exist\. Check the spelling"):
            build_index(IndexConfig(lake=join(storage, "none")))

    def test_an_empty_folder_is_explained(self, storage: str) -> None:
        with pytest.raises(LakeError, match="holds no images"):
            build_index(IndexConfig(lake=storage))

    def test_a_file_that_holds_no_images_is_explained(self, storage: str) -> None:
        write_once(join(storage, "notes.md"), b"hello")
        with pytest.raises(LakeError, match="neither a folder nor an image, tar or parquet file"):
            build_index(IndexConfig(lake=join(storage, "notes.md")))

    def test_two_ways_to_one_id_are_refused(
        self, tmp_path: Path, png: Png, tar: Tar, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # An object store can hold both the object "a.tar" and objects below "a.tar/", which a local disk cannot.
        (tmp_path / "a.tar").write_bytes(tar({"1.png": png(1)}))
        write_once(str(tmp_path / "below" / "1.png"), png(1))
        files = [
            LakeFile(name="a.tar", url=str(tmp_path / "a.tar"), size=(tmp_path / "a.tar").stat().st_size, kind="tar"),
            LakeFile(name="a.tar/1.png", url=str(tmp_path / "below" / "1.png"), size=-1, kind="image"),
        ]
        monkeypatch.setattr("tinysam.lake.index.list_lake", lambda url: iter(files))
        with pytest.raises(LakeError, match=r"two images called 'a\.tar/1\.png'"):
            build_index(IndexConfig(lake="s3://b"))

    def test_a_tar_beside_a_folder_of_its_name_hides_neither(
        self, tmp_path: Path, png: Png, tar: Tar, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_once(str(tmp_path / "a.tar" / "2.png"), png(1))
        write_once(str(tmp_path / "b.tar"), tar({"1.png": png(1)}))
        original = LocalFileSystem.ls

        def ls(self: LocalFileSystem, path: str, detail: bool = False, **options: Any) -> Any:
            # As in a bucket: the object "a.tar" beside the prefix "a.tar/".
            entries = original(self, path, detail, **options)
            return [
                {**entry, "name": entry["name"].replace("b.tar", "a.tar")} if entry["type"] == "file" else entry
                for entry in entries
            ]

        monkeypatch.setattr(LocalFileSystem, "ls", ls)
        names = [(file.name, file.kind) for file in listing.list_lake(str(tmp_path))]
        assert sorted(names) == [("a.tar", "tar"), ("a.tar/2.png", "image")]

    @pytest.mark.parametrize("options", [{"lake": ""}, {"lake": "x", "limit": 0}])
    def test_settings_are_checked(self, options: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=r"give a folder|at least 1"):
            IndexConfig(**options)

    def test_twice_the_same_lake_gives_the_same_index(self, storage: str, png: Png, rng: np.random.Generator) -> None:
        for number in rng.permutation(40):
            write_once(join(storage, f"{number % 7}", f"{number}.png"), png(int(number)))
        assert build_index(IndexConfig(lake=storage)).equals(build_index(IndexConfig(lake=storage)))


class TestCoco:
    def coco(self, tmp_path: Path, names: list[str]) -> str:
        images = [{"id": number, "file_name": name, "width": 6, "height": 4} for number, name in enumerate(names)]
        annotations = [{"id": 1, "image_id": 0, "segmentation": [[0, 0, 3, 0, 3, 3]], "iscrowd": 0}]
        path = tmp_path / "instances.json"
        path.write_text(json.dumps({"images": images, "annotations": annotations}))
        return str(path)

    def matched(self, tmp_path: Path, png: Png, lake_names: list[str], coco_names: list[str]) -> list[str]:
        for name in lake_names:
            write_once(join(str(tmp_path), "lake", name), png(1))
        config = IndexConfig(lake=str(tmp_path / "lake"), annotations=self.coco(tmp_path, coco_names))
        return [row["image_id"] for row in build_index(config).to_pylist() if row["annotations"] is not None]

    @pytest.mark.parametrize(
        ("lake_names", "coco_names", "expected"),
        [
            (["1.png", "2.png"], ["1.png"], ["1.png"]),
            (["images/1.png", "images/2.png"], ["1.png", "2.png"], ["images/1.png", "images/2.png"]),
            (["1.png", "2.png"], ["images/1.png", "./images/2.png"], ["1.png", "2.png"]),
            (["images/a/1.png", "images/b/1.png"], ["a/1.png"], ["images/a/1.png"]),
            (["x/1.png", "y/1.png", "2.png"], ["1.png", "2.png"], ["2.png"]),
            (["1.png"], ["a/1.png", "b/1.png", "1.png"], ["1.png"]),
            (["a/1.png", "2.png"], ["b/1.png", "2.png"], ["2.png", "a/1.png"]),
            (["sub/日本 é.png"], ["日本 é.png"], ["sub/日本 é.png"]),
        ],
    )
    def test_names_are_matched_only_where_they_are_certain(
        self, tmp_path: Path, png: Png, lake_names: list[str], coco_names: list[str], expected: list[str]
    ) -> None:
        assert self.matched(tmp_path, png, lake_names, coco_names) == expected

    def test_size_and_annotations_are_inlined(self, tmp_path: Path, png: Png) -> None:
        for name in ("1.png", "2.png", "3.png"):
            (tmp_path / name).write_bytes(png(1))
        rows = build_index(
            IndexConfig(lake=str(tmp_path), annotations=self.coco(tmp_path, ["1.png", "2.png"]))
        ).to_pylist()
        assert [(row["width"], row["height"]) for row in rows] == [(6, 4), (6, 4), (None, None)]
        assert [row["annotations"] and len(json.loads(row["annotations"])) for row in rows] == [1, 0, None]

    def test_members_of_tars_are_matched(self, tmp_path: Path, png: Png, tar: Tar) -> None:
        (tmp_path / "s.tar").write_bytes(tar({"./1.png": png(1), "2.png": png(1)}))
        config = IndexConfig(lake=str(tmp_path), annotations=self.coco(tmp_path, ["1.png"]))
        assert [row["annotations"] is not None for row in build_index(config).to_pylist()] == [True, False]

    def test_a_limit_does_not_make_an_ambiguous_name_certain(self, tmp_path: Path, png: Png) -> None:
        for name in ("x/1.png", "y/1.png", "z/2.png"):
            write_once(join(str(tmp_path), name), png(1))
        config = IndexConfig(lake=str(tmp_path), annotations=self.coco(tmp_path, ["1.png", "2.png"]), limit=1)
        assert build_index(config).column("annotations").to_pylist() == [None]

    def test_annotations_of_another_lake_are_explained(self, tmp_path: Path, png: Png) -> None:
        (tmp_path / "1.png").write_bytes(png(1))
        with pytest.raises(LakeError, match=r"names none of .* it says 'other\.png', the lake has '1\.png'"):
            build_index(IndexConfig(lake=str(tmp_path), annotations=self.coco(tmp_path, ["other.png"])))

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"{",
            b"[]",
            b"{}",
            b'{"images": [{"id": 1}], "annotations": []}',
            b'{"images": [], "annotations": [{"image_id": 5}]}',
            b'{"images": 5, "annotations": 5}',
        ],
    )
    def test_other_json_is_explained(self, tmp_path: Path, png: Png, content: bytes) -> None:
        (tmp_path / "1.png").write_bytes(png(1))
        (tmp_path / "x.json").write_bytes(content)
        with pytest.raises(LakeError, match=r"x\.json is not a COCO instances file"):
            build_index(IndexConfig(lake=str(tmp_path), annotations=str(tmp_path / "x.json")))

    def test_two_images_of_one_name_are_refused(self, tmp_path: Path, png: Png) -> None:
        (tmp_path / "1.png").write_bytes(png(1))
        with pytest.raises(LakeError, match="names two images alike"):
            build_index(IndexConfig(lake=str(tmp_path), annotations=self.coco(tmp_path, ["1.png", "./1.png"])))

    def test_a_missing_file_is_explained(self, tmp_path: Path, png: Png) -> None:
        (tmp_path / "1.png").write_bytes(png(1))
        with pytest.raises(MissingError, match=r"none\.json does not exist"):
            build_index(IndexConfig(lake=str(tmp_path), annotations=str(tmp_path / "none.json")))


class TestLists:
    def test_a_list_names_images_tars_and_parquet_files_anywhere(
        self, storage: str, png: Png, tar: Tar, tmp_path: Path
    ) -> None:
        write_once(join(storage, "a", "1.png"), png(1))
        write_once(join(storage, "a", "2.tar"), tar({"x.png": png(2)}))
        write_once(join(storage, "b", "3.parquet"), parquet([png(3)]))
        write_once(join(storage, "b", "without suffix"), png(4))
        write_once(join(storage, "b", "not named.png"), png(5))
        uris = [join(storage, name) for name in ("b/without suffix", "b/3.parquet", "a/2.tar", "a/1.png", "a/1.png")]
        lines = ["# my images", "", f"  {uris[0]}  ", *uris[1:]]
        write_once(join(str(tmp_path), "list.txt"), "\n".join(lines).encode())
        rows = build_index(IndexConfig(lake=str(tmp_path / "list.txt"))).to_pylist()
        root = storage.split("://", 1)[-1].lstrip("/")
        names = ["a/1.png", "a/2.tar/x.png", "b/3.parquet#0", "b/without suffix"]
        assert [row["image_id"] for row in rows] == [f"{root}/{name}" for name in names]
        assert [value(row) for row in rows] == [1, 2, 3, 4]
        (row,) = build_index(
            IndexConfig(lake=str(tmp_path / "list.txt"), include=("*/b/*",), exclude=("*.parquet",))
        ).to_pylist()
        assert value(row) == 4

    def test_paths_are_relative_to_the_list(self, storage: str, png: Png) -> None:
        write_once(join(storage, "images", "1.png"), png(1))
        write_once(join(storage, "list.TXT"), b"\xef\xbb\xbfimages/1.png\r\n")
        (row,) = build_index(IndexConfig(lake=join(storage, "list.TXT"))).to_pylist()
        assert (row["image_id"], value(row)) == ("images/1.png", 1)

    @pytest.mark.parametrize("uri", ["https://host/a.png?X-Amz-Signature=verysecret", "s3://me:verysecret@b/a.png"])
    def test_secrets_in_a_list_are_refused_and_not_repeated(self, uri: str, storage: str) -> None:
        write_once(join(storage, "list.txt"), uri.encode())
        with pytest.raises(LakeError, match="line 1") as error:
            build_index(IndexConfig(lake=join(storage, "list.txt")))
        assert "verysecret" not in str(error.value)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"s3://a/1.png\ngs://a/1.png", "same id"),
            (b"\xff\xfe1", "UTF-8"),
            (b"# nothing\n", "holds no images"),
            (b"hello", "line 1: 'hello' is neither"),
        ],
    )
    def test_lists_that_make_no_sense_are_explained(self, content: bytes, message: str, storage: str) -> None:
        write_once(join(storage, "list.txt"), content)
        with pytest.raises(LakeError, match=message):
            build_index(IndexConfig(lake=join(storage, "list.txt")))
