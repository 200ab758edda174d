"""Steps 1 and 2: which files of a model are fetched, and what is there already; the example's
photos; and what can fail while something is downloaded from the Hugging Face Hub."""

import errno
import fnmatch
import hashlib
import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
import urllib.parse
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

import cache_model
import download_example_dataset
from dreambooth.cli import UserError
from dreambooth.files import pipeline_dir
from dreambooth.files.pipelines import PIPELINES


@pytest.fixture
def run(tmp_path):
    """Run cache_model.py in this process, into the cache tmp_path/hub; returns where the revision
    of the model belongs."""

    def main(model_name, revision="v1"):
        argv = ["--model_dir", str(tmp_path / "hub"), f"--model_name={model_name}"]
        cache_model.main(cache_model.parse_args([*argv, "--revision", revision]))
        return pipeline_dir.snapshot_dir(tmp_path / "hub", model_name, revision)

    return main


class LocalHub(http.server.BaseHTTPRequestHandler):
    """What the Hub answers about the folders of a directory, each a repository of "acme"; it notes
    the files that it sends."""

    root, sent, commit = None, [], "a" * 40

    def log_message(self, *args):
        pass

    def answer(self, body, status=200, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path).strip("/").split("/")
        folder = self.root / path[path.index("acme") + 1]
        if not folder.is_dir():
            self.answer(b"{}", 404, X_Error_Code="RepoNotFound")
        elif path[0] == "api":
            names = sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())
            files = [{"rfilename": name} for name in names]
            about = {"id": f"acme/{folder.name}", "sha": self.commit, "siblings": files}
            if "tree" in path:
                about = [
                    {
                        "type": "file",
                        "path": n,
                        "oid": "b" * 40,
                        "size": (folder / n).stat().st_size,
                    }
                    for n in names
                ]
            self.answer(json.dumps(about).encode(), Content_Type="application/json")
        else:
            name = "/".join(path[path.index("resolve") + 2 :])
            content = (folder / name).read_bytes()
            if self.command == "GET":
                self.sent.append(f"{folder.name}/{name}")
            tag = f'"{hashlib.sha1(content).hexdigest()}"'
            self.answer(content, ETag=tag, X_Repo_Commit=self.commit)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hub on this machine: a namespace of its `root` and the files that it has `sent`."""
    LocalHub.root = tmp_path_factory.mktemp("repositories")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), LocalHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    yield SimpleNamespace(root=LocalHub.root, sent=LocalHub.sent, address=address)
    server.shutdown()


@pytest.fixture
def download(hub, run_script, tmp_path):
    """Run cache_model.py as a command that asks this Hub: download("acme/sd")."""

    def run(name):
        hub.sent.clear()
        argv = ["--model_dir", tmp_path / "hub", "--model_name", name]
        online = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1"}
        return run_script("cache_model.py", *argv, **online)

    return run


def test_what_the_scripts_use_is_downloaded_and_nothing_else(hub, download, model_dir):
    """Safetensors where there are any; no half precision copies, pickles, flax, or safety checker.
    The last line printed is a directory that works. A second time nothing is fetched."""
    folder = shutil.copytree(model_dir, hub.root / "sd")
    needed = {f"sd/{file.relative_to(folder)}" for file in folder.rglob("*") if file.is_file()}
    for name in (
        "README.md", "sd-v1-4.ckpt", "text_encoder/model.fp16.safetensors",
        "text_encoder/pytorch_model.bin", "safety_checker/model.safetensors",
        "vae/diffusion_flax_model.msgpack",
    ):  # fmt: skip
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not needed")
    result = download("acme/sd")
    assert result.returncode == 0, result.stderr
    assert set(hub.sent) == needed
    snapshot = result.stdout.splitlines()[-1]
    assert pipeline_dir.fingerprint(snapshot) == pipeline_dir.fingerprint(model_dir)
    assert download("acme/sd").returncode == 0
    assert hub.sent == []


@pytest.mark.parametrize("name", ["model_index.json", "unet/diffusion_pytorch_model.safetensors"])
def test_a_damaged_file_is_fetched_again_once_it_is_deleted(hub, download, model_dir, name):
    """As the error says; in the Hub's cache the snapshot's file is a link to it."""
    shutil.copytree(model_dir, hub.root / "sd", dirs_exist_ok=True)
    snapshot = Path(download("acme/sd").stdout.splitlines()[-1])
    whole = (snapshot / name).read_bytes()
    (snapshot / name).write_bytes(whole[:-20])
    result = download("acme/sd")
    assert result.returncode == 2
    (deleted,) = re.findall(r"is damaged .*; delete (\S+) and fetch", result.stderr)
    Path(deleted).unlink()
    assert download("acme/sd").returncode == 0
    assert hub.sent == [f"sd/{name}"]
    assert (snapshot / name).read_bytes() == whole


@pytest.mark.parametrize(
    ("pipeline", "message"),
    [
        ("StableDiffusion3Pipeline", "acme/sd3 is Stable Diffusion 3 (StableDiffusion3Pipeline); "),
        ("FluxPipeline", "acme/flux is FLUX.1 (FluxPipeline); these scripts take Stable Diffusion"),
        (None, "acme/lora is no diffusers model: it has no model_index.json"),
    ],
)
def test_another_model_is_named_before_gigabytes_are_downloaded(
    hub, download, assert_one_line, pipeline, message
):
    folder = hub.root / message.split()[0].removeprefix("acme/")
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(bytes(1000))
    if pipeline:
        (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    assert_one_line(download(f"acme/{folder.name}"), message)
    assert hub.sent in ([], [f"{folder.name}/model_index.json"])


def test_half_precision_and_sharded_weights_are_chosen_where_there_are_no_others():
    names = [
        "model_index.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json",
        "text_encoder/config.json", "text_encoder/model.fp16.safetensors",
        "unet/diffusion_pytorch_model.safetensors.index.json",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.fp16.bin",
    ]  # fmt: skip
    facts = PIPELINES["StableDiffusionPipeline"]
    left_out = {"unet/diffusion_pytorch_model.fp16.safetensors"}
    left_out.add("vae/diffusion_pytorch_model.fp16.bin")
    assert set(cache_model.files_to_fetch(names, facts)) == set(names) - left_out
    with pytest.raises(UserError, match="no unet weights"):
        cache_model.files_to_fetch([n for n in names if "unet" not in n], facts)


@pytest.fixture
def photo_hub(flat_image, monkeypatch):
    """A Hub of the example's photos: the list of what was asked for. Beside photos it leaves cache
    files of its own."""
    calls = []

    def download_photos(name, local_dir, **settings):
        calls.append(name)
        for photo in ("a.jpeg", "b.jpeg"):
            flat_image(photo, 0, folder=local_dir)
        (local_dir / ".cache").mkdir()
        (local_dir / ".cache" / "a.jpeg.metadata").touch()

    monkeypatch.setattr(download_example_dataset, "snapshot_download", download_photos)
    return calls


def test_pocket_is_copied_without_a_network_and_only_where_it_is_not_there(run, capsys):
    snapshot = run("pocket")
    assert capsys.readouterr().out == f"{snapshot}\n"
    pipeline_dir.check_model_dir(snapshot)
    (snapshot / "mark").touch()
    run("pocket")
    assert (snapshot / "mark").exists()
    (snapshot / "unet" / "config.json").unlink()
    with pytest.raises(UserError, match="holds other files .mark., which would be lost"):
        run("pocket")
    (snapshot / "mark").unlink()
    run("pocket")
    pipeline_dir.check_model_dir(snapshot)


def test_runs_that_begin_at_once_share_the_first_ones_copy(root, tmp_path):
    """Two subjects, say, on a new disk: the others wait, and take it as it is."""
    argv = ["--model_dir", str(tmp_path), "--model_name", "pocket", "--revision", "embedded"]
    command = [sys.executable, str(root / "cache_model.py"), *argv]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(3)]
    snapshot = pipeline_dir.snapshot_dir(tmp_path, "pocket", "embedded")
    assert [process.communicate()[0] for process in processes] == [f"{snapshot}\n"] * 3


@pytest.mark.parametrize("revision", ["", "/home", "..", "../..", "main/../../..", "."])
def test_a_revision_that_leaves_the_cache_is_refused(run, capsys, revision):
    """Pocket would have replaced the folder that it leads to; an empty one is that of all."""
    with pytest.raises(SystemExit):
        run("pocket", revision=revision)
    reason = "is no commit, tag or branch" if revision else "--revision: is empty"
    assert reason in capsys.readouterr().err


def test_a_complete_cache_may_be_read_only_and_needs_no_network(
    run, model_dir, tmp_path, monkeypatch, capsys
):
    """Such as an administrator's. (A branch is looked for every time: run.sh gives commits.)"""
    run("pocket")
    snapshot = pipeline_dir.snapshot_dir(tmp_path / "hub", "acme/sd", "v1")
    shutil.copytree(model_dir, snapshot)
    refused = MagicMock(side_effect=UserError("it cannot be written"))
    monkeypatch.setattr(cache_model.atomic, "check_writable", refused)
    monkeypatch.setattr(cache_model, "fetch_from_hub", refused)
    run("pocket")
    run("acme/sd")
    assert not refused.called
    assert capsys.readouterr().out.splitlines()[-1] == str(snapshot)


def test_without_a_network_a_branch_is_what_was_fetched_last(run, model_dir, tmp_path, capsys):
    """As the Hub's own tools do. Tests are told to be offline."""
    snapshot = pipeline_dir.snapshot_dir(tmp_path / "hub", "acme/sd", "0123abc")
    shutil.copytree(model_dir, snapshot)
    ref = snapshot.parents[1] / "refs" / "v1"
    with pytest.raises(UserError, match="no answer from the Hub"):
        run("acme/sd")
    ref.parent.mkdir()
    ref.write_text("0123abc")
    run("acme/sd")
    out, err = capsys.readouterr()
    assert out.splitlines() == [str(snapshot)]
    assert err.startswith("warning: using what was fetched earlier: no answer from the Hub")
    (ref.parent / "refs" / "pr").mkdir(parents=True)
    (ref.parent / "refs" / "pr" / "1").write_text("0123abc")
    run("acme/sd", revision="refs/pr/1")
    assert capsys.readouterr().out.splitlines() == [str(snapshot)]
    (snapshot / "unet" / "config.json").unlink()
    with pytest.raises(UserError, match="no answer from the Hub"):
        run("acme/sd")


def test_another_pocket_model_replaces_the_cached_one(run, model_dir, monkeypatch):
    """After a pretraining of one's own."""
    run("pocket")
    monkeypatch.setattr(cache_model, "POCKET_DIR", model_dir)
    snapshot = run("pocket")
    assert pipeline_dir.fingerprint(snapshot) == pipeline_dir.fingerprint(model_dir)


def test_the_folder_holds_the_photos_alone(photo_hub, tmp_path, capsys):
    """And photos that are there are not downloaded again. What a file manager puts into a folder
    that it shows is no photo."""
    args = download_example_dataset.parse_args([str(tmp_path / "dog")])
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / ".DS_Store").touch()
    download_example_dataset.main(args)
    assert sorted(path.name for path in (tmp_path / "dog").iterdir()) == ["a.jpeg", "b.jpeg"]
    assert capsys.readouterr().out == f"photos in {tmp_path / 'dog'}: 2\n"
    (tmp_path / "dog" / "b.jpeg").unlink()
    download_example_dataset.main(args)
    assert photo_hub == ["diffusers/dog-example"]
    assert "already: 1\n" in capsys.readouterr().out


def test_runs_that_begin_at_once_download_the_photos_once(photo_hub, tmp_path, monkeypatch):
    """The other one would have removed what the first had downloaded so far."""
    download = download_example_dataset.snapshot_download
    began, may_end = threading.Event(), threading.Event()

    def download_slowly(*args, **settings):
        began.set()
        assert may_end.wait(20)
        download(*args, **settings)

    monkeypatch.setattr(download_example_dataset, "snapshot_download", download_slowly)
    args = download_example_dataset.parse_args([str(tmp_path / "dog")])
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(download_example_dataset.main, args)
        assert began.wait(20)
        second = threads.submit(download_example_dataset.main, args)
        assert not wait([second], timeout=0.1).done
        may_end.set()
    assert first.result() is second.result() is None
    assert len(photo_hub) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dog"]


def test_a_place_that_cannot_be_written_is_refused(photo_hub, tmp_path):
    (tmp_path / "file").write_text("mine")
    below = str(tmp_path / "file" / "below")
    with pytest.raises(UserError, match="--model_dir"):
        cache_model.main(cache_model.parse_args(["--model_dir", below]))
    with pytest.raises(UserError, match="DIR"):
        download_example_dataset.main(download_example_dataset.parse_args([below]))
    assert photo_hub == []


@pytest.mark.parametrize("script", [cache_model, download_example_dataset])
def test_without_an_answer_of_the_hub_the_remedy_is_named(
    assert_one_line, run_script, tmp_path, script
):
    """Told to be offline, as these tests are; and with a closed port of this machine as the Hub."""
    argv = (["--model_dir"] if script == cache_model else []) + [str(tmp_path / "new")]
    remedy = "--model_name pocket" if script == cache_model else "images/lego-car"
    with pytest.raises(UserError, match=f"check the network, or .*{remedy}"):
        script.main(script.parse_args(argv))
    closed = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    assert_one_line(run_script(script.__file__, *argv, **closed), "check the network", remedy)
    assert list(tmp_path.iterdir()) == []


def test_a_malformed_model_name_is_refused(run):
    for name in ("two words", "a/b/c", "-x"):
        with pytest.raises(UserError, match=f"^'{name}': "):
            run(name)
    with pytest.raises(UserError, match="^--model_name /models/mine is a path: pass that dir"):
        run("/models/mine")


ANSWER = MagicMock()  # of the Hub
ERRORS = {
    "licence": (GatedRepoError("403", response=ANSWER), "a/b requires accepting its licence"),
    "name": (RepositoryNotFoundError("404", response=ANSWER), "'a/b' is not on the Hub"),
    "revision": (RevisionNotFoundError("404", response=ANSWER), "a/b has no revision 'v1'"),
    "malformed name": (HFValidationError("Repo id must\nbe short"), "'a/b': Repo id must"),
    "permission": (PermissionError(errno.EACCES, "denied"), "/cache cannot be written"),
    "full disk": (OSError(errno.ENOSPC, "No space left"), "no space left in /cache"),
    "offline": (OfflineModeIsEnabled("offline"), "check the network, or copy it there"),
    "not cached": (LocalEntryNotFoundError("no"), "check the network, or copy it there"),
    "no connection": (ConnectionError("refused"), "check the network, or copy it there"),
    "hf_xet": (RuntimeError("Task error: CAS"), "(RuntimeError: Task error: CAS): check the netw"),
    "hf_xet's full disk": (
        RuntimeError("Task: No space left on device"),
        "no space left in /cache",
    ),
    "server": (HTTPError("502"), "no answer from the Hub (HTTPError: 502)"),
    "proxy": (ImportError("Using SOCKS proxy, but"), "cannot be asked (Using SOCKS proxy, but): "),
    "proxy's scheme": (ValueError("Unknown scheme"), "such as ALL_PROXY and HF_TOKEN, or copy it"),
    "user": (UserError("not a diffusers model"), "not a diffusers model"),
}


def test_what_fails_while_downloading_is_one_line_with_the_remedy():
    """A bug keeps its type."""

    def fail(error):
        with cache_model.hub_errors_as_one_line("a/b", "v1", "/cache", "copy it there"):
            raise error

    for name, (error, text) in ERRORS.items():
        with pytest.raises(UserError) as raised:
            fail(error)
        assert text in str(raised.value), name
        assert "\n" not in str(raised.value)
    with pytest.raises(ZeroDivisionError):
        fail(ZeroDivisionError())


def test_a_tokenizers_text_files_are_fetched_as_well():
    """Merges of CLIP's, the chat template of FLUX.2-klein's."""
    for name, pipeline in (
        ("tokenizer/merges.txt", "StableDiffusionPipeline"),
        ("tokenizer/chat_template.jinja", "Flux2KleinPipeline"),
    ):
        facts = PIPELINES[pipeline]
        weights = [f"{part}/model.safetensors" for part in facts.text_encoders]
        weights += [
            f"{part}/diffusion_pytorch_model.safetensors" for part in ("vae", facts.backbone)
        ]
        assert name in cache_model.files_to_fetch([name, *weights], facts)


def test_photos_are_asked_for_by_their_names_on_the_hub(tmp_path, flat_image, monkeypatch):
    """alvan-nee-....jpeg; not the dataset's README."""

    def download(name, repo_type, local_dir, allow_patterns):
        assert (name, repo_type) == ("diffusers/dog-example", "dataset")  # no model of that name
        for photo in ("dog.jpeg", "README.md"):
            if any(fnmatch.fnmatch(photo, pattern) for pattern in allow_patterns):
                flat_image(photo, 0, folder=local_dir)

    monkeypatch.setattr(download_example_dataset, "snapshot_download", download)
    download_example_dataset.main(download_example_dataset.parse_args([str(tmp_path / "dog")]))
    assert [file.name for file in (tmp_path / "dog").iterdir()] == ["dog.jpeg"]


def test_a_download_that_was_cut_off_is_completed_and_what_comes_is_checked(
    run, model_dir, tmp_path, monkeypatch
):
    snapshot = shutil.copytree(
        model_dir, pipeline_dir.snapshot_dir(tmp_path / "hub", "acme/sd", "v1")
    )
    config = snapshot / "unet" / "config.json"
    content = config.read_bytes()

    def fetch(sent):
        def download(*asked_for):
            config.write_bytes(sent)
            return snapshot

        config.unlink()
        monkeypatch.setattr(cache_model, "fetch_from_hub", download)
        run("acme/sd")

    fetch(content)
    pipeline_dir.check_model_dir(snapshot)
    with pytest.raises(UserError, match="unet/config.json is damaged"):
        fetch(b"[]")
