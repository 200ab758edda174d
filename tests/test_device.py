"""GPUs that cannot be used are errors, and a slow CPU is said before one waits for it."""

import os
from unittest.mock import MagicMock

import pytest
import torch

from dreambooth.cli import UserError
from dreambooth.machines import cluster, device, gpus

BUILDS = "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120"  # those of the wheel that requirements.txt names


@pytest.fixture
def pretend(monkeypatch):
    """Let torch find so many GPUs: pretend(2, usable=False) as with an old driver, which counts
    them and cannot start CUDA."""

    def gpus(
        count, usable=True, capability=(8, 0), free_gib=(22,), builds=BUILDS, reason="too old"
    ):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: usable and count > 0)
        monkeypatch.setattr(torch.cuda, "init", MagicMock(side_effect=RuntimeError(reason)))
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args: True)  # by emulation
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: capability)
        monkeypatch.setattr(torch.cuda, "get_arch_list", builds.split)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda gpu: "Tesla T4")
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (free_gib[gpu] * 2**30, 0))

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return gpus


def test_an_old_driver_is_an_error_that_names_the_one_needed(pretend, monkeypatch):
    """All would run on the CPU, and nobody would say so. The driver for the installed PyTorch is
    known, too."""
    pretend(2, usable=False)
    with pytest.raises(UserError, match=f"CUDA {torch.version.cuda} needs NVIDIA's driver"):
        device.check_driver()
    for cuda, driver in (("13.2", 580), ("12.6", 525)):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        with pytest.raises(UserError, match=f'CUDA {cuda} needs .* {driver} or .*DEVICES=""'):
            device.check_driver()


def test_what_else_keeps_cuda_from_starting_is_said(pretend):
    """And not that the driver is old."""
    pretend(8, usable=False, reason="Error 802: system not yet initialized\nmore")
    with pytest.raises(UserError, match="Error 802: system not yet initialized") as raised:
        device.check_driver()
    assert "driver" not in str(raised.value)
    assert "more" not in str(raised.value)


def test_nothing_starts_with_gpus_that_cannot_be_used(pretend, monkeypatch):
    """Not Ray either, which would count them: training would end in a stack trace of NCCL's."""
    pretend(1, usable=False)
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: pytest.fail("Ray was asked"))
    for start in (device.pick_device, gpus.free_memory_of_all, cluster.start_ray):
        with pytest.raises(UserError, match="driver"):
            start()


def test_usable_gpus_and_none_are_no_error(pretend, monkeypatch):
    for count, picked in ((2, "cuda"), (0, "cpu")):
        pretend(count)
        for hidden in ("", "-1", "NoDevFiles"):  # the last is Slurm's
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
            assert device.pick_device() == picked
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        assert device.pick_device() == picked


def test_a_gpu_that_is_asked_for_and_not_there_is_an_error(pretend, monkeypatch):
    pretend(0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with pytest.raises(UserError, match="^CUDA_VISIBLE_DEVICES=7 names no GPU"):
        device.pick_device()


def test_a_card_without_kernels_is_refused_before_the_first_one(pretend):
    """Of the same major capability and no smaller minor one, or from PTX; ROCm's list is empty."""
    for capability in ((7, 5), (8, 6), (8, 9), (9, 0), (10, 3), (12, 1)):
        pretend(1, capability=capability)
        device.check_driver()
    for capability, builds in (
        ((7, 0), BUILDS),
        ((6, 1), BUILDS),
        ((8, 0), "sm_86 sm_90"),
        ((11, 0), BUILDS),
        ((9, 0), "sm_80 compute_100"),
    ):
        pretend(1, capability=capability, builds=builds)
        with pytest.raises(UserError, match=r"^GPU 0, Tesla T4 .* CUDA_VISIBLE_DEVICES") as error:
            device.pick_device()
        assert "(compute capability {}.{})".format(*capability) in str(error.value)
    for capability, builds in (
        ((7, 0), ""),
        ((9, 0), "sm_80 compute_80"),
        ((9, 0), "sm_90a"),
        ((12, 1), "sm_90 sm_120f"),
    ):
        pretend(1, capability=capability, builds=builds)
        assert device.pick_device() == "cuda"


@pytest.fixture
def in_group(tmp_path, monkeypatch):
    """Put this process into control groups: in_group("0::/job/step", {"job/cpu.max": "2 1"})."""
    control_groups = device.control_groups

    def put(line, files):
        own, root = tmp_path / "own", tmp_path / "root"
        own.write_text(f"{line}\n")
        (root / "job" / "step").mkdir(parents=True)
        for name, content in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(f"{content}\n")
        monkeypatch.setattr(
            device, "control_groups", lambda controller: control_groups(controller, root, own)
        )

    return put


def test_the_free_memory_of_a_container_is_its_own(in_group):
    """It may be less than the machine's; page cache that can be dropped counts as free. A batch
    system sets the limit in a group above that of the process."""
    gib = 2**30
    in_group("0::/job/step", {
        "job/step/memory.max": "max",
        "job/memory.max": 3 * gib,
        "job/memory.current": 2 * gib + gib // 2,
        "job/memory.stat": f"anon 5\ninactive_file {gib // 2}",
    })  # fmt: skip
    assert device.host_memory() == 1


def test_the_first_version_of_control_groups_counts_as_well(in_group):
    gib = 2**30
    in_group("4:cpu,memory:/job", {
        "memory/job/memory.limit_in_bytes": 2 * gib,
        "memory/job/memory.usage_in_bytes": gib,
        "memory/job/memory.stat": "total_inactive_file 0",
        "memory/memory.limit_in_bytes": 9223372036854771712,  # none
        "memory/memory.usage_in_bytes": gib,
        "memory/memory.stat": "total_inactive_file 0",
        "cpu/job/cpu.cfs_quota_us": 50000,
        "cpu/job/cpu.cfs_period_us": 100000,
    })  # fmt: skip
    assert device.host_memory() == 1
    assert device.num_cores() == 1


def test_a_quota_leaves_fewer_cores(in_group, monkeypatch):
    """As containers are given; half a core counts as one."""
    monkeypatch.setattr(device.os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    in_group("0::/job/step", {"job/step/cpu.max": "max 100000", "job/cpu.max": "350000 100000"})
    assert device.num_cores() == 4


def test_bfloat16_is_a_question_of_the_card_and_not_of_emulation(pretend):
    pretend(1, capability=(7, 5))
    for check in (lambda: device.check_bfloat16(0), device.gpu_memory):
        with pytest.raises(UserError, match=r"^Tesla T4 \(compute capability 7.5\) has no bfloat"):
            check()
    for capability in ((8, 0), (8, 9), (12, 0)):
        pretend(1, capability=capability)
        device.check_bfloat16(0)


def test_free_memory_of_each_gpu_of_this_machine(pretend):
    """A list: its length is the number of GPUs."""
    pretend(3, free_gib=(22, 79, 11))
    assert gpus.free_memory_of_all() == [22, 79, 11]
    pretend(0)
    assert gpus.free_memory_of_all() == []


def test_minutes_on_a_cpu_are_said_of_a_large_model_alone(capsys, monkeypatch):
    """Stable Diffusion 1.4 has 1000 M parameters, pocket 6 M."""
    monkeypatch.setattr(device, "num_cores", lambda: 3)
    device.warn_if_slow({"unet": 5e6, "vae": 1e6}, "a step")
    assert capsys.readouterr().err == ""
    device.warn_if_slow({"unet": 860e6, "vae": 84e6}, "a step")
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "warning: no GPU: a step takes minutes with this model on 3 CPU cores"


def test_cores_are_those_that_this_process_may_use_and_workers_share_them(monkeypatch):
    """Ray gives a worker one thread, whatever there is."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 3, 5, 6}, raising=False)
    assert device.num_cores() == 4
    assert device.describe(0).startswith("4 cores (")
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    for workers_here in (1, 2, 8):
        device.configure_torch(torch.device("cpu"), workers_here)
    device.configure_torch(torch.device("cuda"), 2)
    assert threads == [4, 2, 1]
    monkeypatch.delattr(os, "sched_getaffinity")  # as on a Mac
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert device.num_cores() == 7


def test_a_runs_hardware_in_words(pretend):
    pretend(2)
    assert device.describe(2) == "2 x Tesla T4"
    pretend(0)
    assert device.describe(8) == "8 GPUs of a cluster"
    assert device.describe(0).endswith(", no GPU")


def test_each_gpu_must_be_one_that_can_be_used(pretend, monkeypatch):
    """Also the second one, an older card."""
    for check, capability, message in (
        (device.check_driver, (7, 0), "^GPU 1, Tesla T4"),
        (device.gpu_memory, (7, 5), "has no bfloat16"),
    ):
        pretend(2, free_gib=(22, 22))
        check()
        capabilities = [(8, 0), capability]
        monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
        with pytest.raises(UserError, match=message):
            check()


def test_a_compiler_that_is_named_in_the_environment_is_one(monkeypatch, tmp_path):
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(device.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(device.shutil, "which", lambda name: None)
    for device_type, variable, missing in (
        ("cuda", "CC", "a C compiler: apt install gcc"),
        ("cpu", "CXX", r"a C\+\+ compiler: apt install g\+\+"),
    ):
        monkeypatch.delenv(variable, raising=False)
        with pytest.raises(UserError, match=f"^--compile needs {missing} python3-dev"):
            device.check_compiler("--compile", device_type)
        monkeypatch.setenv(variable, "/opt/gcc-13/bin/compiler")
        assert device.check_compiler("--compile", device_type) is None
