"""Step 2: the example's photos, and nothing beside them."""

import pytest

import download_example_dataset
from dreambooth.cli import UserError

# Told to be offline, and with a Hub that does not answer: a closed port of this machine.
NO_NETWORK = {
    "offline": {"HF_HUB_OFFLINE": "1"},
    "no answer": {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"},
}


@pytest.fixture
def run(tmp_path):
    """Run download_example_dataset.py in this process, into tmp_path/dog or another folder."""

    def main(folder=tmp_path / "dog"):
        download_example_dataset.main(download_example_dataset.parse_args([str(folder)]))

    return main


@pytest.fixture
def downloads(flat_image, monkeypatch):
    """The calls to the Hub, which gives two photos and its own cache files."""
    calls = []

    def download(name, local_dir, **settings):
        calls.append(name)
        for photo in ("a.jpeg", "b.jpeg"):
            flat_image(photo, 0, folder=local_dir)
        (local_dir / ".cache").mkdir()
        (local_dir / ".cache" / "a.jpeg.metadata").touch()

    monkeypatch.setattr(download_example_dataset, "snapshot_download", download)
    return calls


@pytest.mark.parametrize("network", NO_NETWORK)
def test_without_a_network_the_remedy_is_named(assert_one_line, run_script, tmp_path, network):
    argv = ["download_example_dataset.py", tmp_path / "dog"]
    result = run_script(*argv, **NO_NETWORK[network])
    assert_one_line(result, "check the network", "images/lego-car")
    assert list(tmp_path.iterdir()) == []


def test_the_folder_holds_the_photos_alone(run, downloads, tmp_path, capsys):
    run()
    assert sorted(path.name for path in (tmp_path / "dog").iterdir()) == ["a.jpeg", "b.jpeg"]
    assert capsys.readouterr().out == f"photos in {tmp_path / 'dog'}: 2\n"


def test_photos_that_are_there_are_not_downloaded_again(run, downloads, tmp_path, capsys):
    run()
    (tmp_path / "dog" / "b.jpeg").unlink()
    run()
    assert len(downloads) == 1
    assert "already: 1\n" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_refused(run, downloads, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="DIR"):
        run(tmp_path / "file" / "below")
    assert downloads == []
