"""GPUs that cannot be used are errors, and a slow CPU is said before one waits for it."""

import re
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from dreambooth import cluster, hardware, memory, ray_errors
from dreambooth import gpus as gpus_module
from dreambooth.cli import UserError


@pytest.fixture
def gpus(monkeypatch):
    """Let torch find so many GPUs: gpus(2, usable=False) as with an old driver, which counts them
    and cannot start CUDA."""

    def pretend(count, usable=True, capability=(8, 0), free_gib=(22,)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: usable and count > 0)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args: True)  # by emulation
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda gpu: "Tesla T4")
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (free_gib[gpu] * 2**30, 0))

    return pretend


@pytest.mark.parametrize(("cuda", "driver"), [("13.2", 580), ("13.0", 580), ("12.6", 525)])
def test_an_old_driver_is_an_error_that_names_the_one_needed(gpus, monkeypatch, cuda, driver):
    gpus(2, usable=False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(UserError) as error:
        hardware.check_driver()
    message = str(error.value)
    assert f"CUDA {cuda} needs NVIDIA's driver {driver} or newer" in message
    assert 'CUDA_VISIBLE_DEVICES=""' in message
    assert "\n" not in message


def test_the_driver_for_this_pytorch_is_known():
    major = int(torch.version.cuda.split(".")[0])
    assert major in hardware.DRIVER_FOR_CUDA


def test_usable_gpus_and_none_are_no_error(gpus, monkeypatch):
    for hidden in (None, "", "-1"):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if hidden is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        for count in (0, 2):
            gpus(count)
            hardware.check_driver()
    gpus(2, usable=False)
    with pytest.raises(UserError):
        hardware.check_driver()


def test_a_gpu_that_is_asked_for_and_not_there_is_an_error(gpus, monkeypatch):
    gpus(0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with pytest.raises(UserError, match="^CUDA_VISIBLE_DEVICES=7 names no GPU"):
        hardware.check_driver()


def test_ray_is_not_started_with_gpus_that_cannot_be_used(gpus, monkeypatch):
    """Ray would count them, and training would end in a stack trace of NCCL's."""
    gpus(1, usable=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster.ray, "init", MagicMock())
    with pytest.raises(UserError, match="driver"):
        cluster.start_ray()
    assert cluster.ray.init.call_args_list == []


def test_nccls_error_on_another_node_is_the_drivers():
    text = "Training failed due to controller error:\nRuntimeError: nccl2 requires at least one"
    error = ray_errors.training_error(RuntimeError(f"{text} CUDA device"))
    assert type(error) is UserError
    assert "NVIDIA's driver" in str(error)


def test_bfloat16_is_a_question_of_the_card_and_not_of_emulation(gpus):
    gpus(1, capability=(7, 5))
    with pytest.raises(UserError, match=r"^Tesla T4 \(compute capability 7.5\) has no bfloat16"):
        hardware.check_bfloat16(0)
    for capability in ((8, 0), (8, 9), (9, 0), (12, 0)):
        gpus(1, capability=capability)
        hardware.check_bfloat16(0)


def test_memory_of_the_gpus(gpus):
    gpus(3, free_gib=(22, 79, 11))
    assert hardware.gpu_memory() == [22, 79, 11]
    gpus(0)
    assert hardware.gpu_memory() == []
    gpus(1, capability=(7, 5))
    with pytest.raises(UserError, match="bfloat16"):
        hardware.gpu_memory()


def test_the_number_of_gpus_is_that_of_those_that_can_be_used(gpus, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    gpus(2, free_gib=(22, 22))
    assert len(gpus_module.free_memory()) == 2
    gpus(2, usable=False)
    with pytest.raises(UserError, match="driver"):
        gpus_module.free_memory()


def minutes(text):
    (line,) = text.splitlines()
    return int(re.match(r"warning: no GPU: .* about (\d+) min ", line).group(1))


def test_minutes_per_image_on_a_cpu_are_said(sd14_dir, generate_args, capsys):
    """About 40 TFLOP with guidance, at 0.05 TFLOP/s per core."""
    args = generate_args("out", model_dir=sd14_dir, num_inference_steps=25)
    hardware.warn_of_slow_images(args, num_cores=2)
    assert 5 <= minutes(capsys.readouterr().err) <= 10
    args.num_inference_steps = 100
    hardware.warn_of_slow_images(args, num_cores=2)
    assert 20 <= minutes(capsys.readouterr().err) <= 40
    args.guidance_scale = 1
    hardware.warn_of_slow_images(args, num_cores=2)
    assert 10 <= minutes(capsys.readouterr().err) <= 20


def test_minutes_per_step_on_a_cpu_are_said(sd14_dir, train_args, capsys):
    """RESULTS.md counts 10 TFLOP for two pairs."""
    args = train_args("out", model_dir=sd14_dir)
    plan = SimpleNamespace(resolution=512, pairs_per_step=2)
    hardware.warn_of_slow_steps(args, plan, num_cores=2)
    assert minutes(capsys.readouterr().err) == 2
    plan = SimpleNamespace(resolution=512, pairs_per_step=16)
    hardware.warn_of_slow_steps(args, plan, num_cores=2)
    assert 11 <= minutes(capsys.readouterr().err) <= 16


def test_nothing_is_said_of_a_small_model(generate_args, train_args, capsys):
    hardware.warn_of_slow_images(generate_args("out", num_inference_steps=1000), num_cores=1)
    plan = SimpleNamespace(resolution=64, pairs_per_step=64)
    hardware.warn_of_slow_steps(train_args("out"), plan, num_cores=1)
    assert capsys.readouterr() == ("", "")


def test_messages_for_the_cpu_are_the_same_everywhere(sd14_dir):
    """What a user is told to set is what run.sh and the README know."""
    assert 'CUDA_VISIBLE_DEVICES=""' in hardware.USE_THE_CPU
    assert hardware.LARGE > 10 * 5_648_692
    sizes = hardware.model_dir.num_parameters(sd14_dir)
    assert memory.SD14["unet"] == pytest.approx(sizes["unet"], rel=0.01)
    assert memory.SD14["text_encoder"] == pytest.approx(sizes["text_encoder"], rel=0.01)
    assert sum(sizes.values()) == pytest.approx(hardware.SD14_PARAMETERS, rel=0.01)
