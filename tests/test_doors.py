"""Who gets into the Ray that a script starts: its user, by a token that nobody else can read."""

import os
import re
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dreambooth import cluster

CLIENT = """
import sys, ray
try:
    ray.init(address=sys.argv[1], log_to_driver=False, logging_level="CRITICAL")
except Exception:
    sys.exit(3)
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A user who has never run Ray."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_token_is_readable_by_its_user_alone(home):
    cluster.create_token()
    token = home / ".ray" / "auth_token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert re.fullmatch("[0-9a-f]{64}", token.read_text())


def test_existing_token_is_kept(home):
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("mine")
    cluster.create_token()
    assert (home / ".ray" / "auth_token").read_text() == "mine"


def test_no_setting_of_ours_turns_authentication_off():
    assert not [name for name in cluster.SETTINGS if "AUTH" in name]


def ray_address_of(process):
    """Where the Ray that a script has started listens: as its raylet's command line says."""
    deadline = time.time() + 120
    while process.poll() is None and time.time() < deadline:
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                command = (folder / "cmdline").read_bytes().decode()
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            found = re.search(r"--gcs-address=([\d.]+:\d+)", command)
            if found and parent == process.pid:
                return found[1]
        time.sleep(0.2)
    raise AssertionError("the script has started no Ray")


def connect(address, home, **env):
    """The exit code of a client that tries to get in: 0 if it does, else 3."""
    env = {**os.environ, "HOME": str(home), "RAY_gcs_rpc_server_connect_timeout_s": "2", **env}
    command = [sys.executable, "-c", CLIENT, address]
    return subprocess.run(command, env=env, capture_output=True, timeout=120).returncode


def test_client_without_the_token_is_refused_by_a_running_training(
    root, home, train_argv, tmp_path
):
    """One with another token, too; the user's own client gets in."""
    command = [sys.executable, "train.py", *train_argv(tmp_path / "out", max_train_steps=1000)]
    command += ["--num_epochs", "1000", "--checkpointing_steps", "0"]
    env = {**os.environ, "HOME": str(home)}
    process = subprocess.Popen(
        command, cwd=root, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        address = ray_address_of(process)
        other_home = tmp_path / "other_home"
        assert connect(address, other_home) == 3
        assert connect(address, other_home, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="a" * 64) == 3
        assert connect(address, home, RAY_AUTH_MODE="token") == 0
    finally:
        process.kill()
        process.wait()
