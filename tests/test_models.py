"""What is frozen, what is trained, in which precision, and by which optimizer."""

import optimi
import pytest
import torch
import torch.distributed
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves
from transformers import CLIPTextModel

from dreambooth import latents, models
from dreambooth.loss import training_loss
from dreambooth.schedules import DiffusionSchedule

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def random_inputs(num_images=2):
    """Latents, timesteps and two prompts, each for half of the images."""
    generator = torch.Generator().manual_seed(0)
    noisy_latents = torch.randn(num_images, 4, 16, 16, generator=generator)
    timesteps = torch.linspace(10, 900, num_images).long()
    input_ids = torch.randint(0, 500, (2, 48), generator=generator)
    return noisy_latents, timesteps, {"input_ids": input_ids, "counts": [num_images // 2] * 2}


def set_second_matrices(denoiser):
    """Give the second matrices of a LoRA, which are zero at first, random values."""
    torch.manual_seed(0)
    for name, parameter in denoiser.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)


def trained_parameters(module):
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def gradients_of(denoiser, inputs):
    """Of its trained parameters, by name."""
    denoiser(*inputs).float().square().mean().backward()
    return {name: p.grad for name, p in trained_parameters(denoiser).items()}


def test_full_training_trains_unet_and_text_encoder_in_float32(load_models):
    vae, denoiser, scheduler = load_models()
    assert {p.dtype for module in (vae, denoiser) for p in module.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in vae.parameters())
    assert not vae.training
    assert all(p.requires_grad for p in denoiser.parameters())
    assert denoiser.training
    for part in (denoiser.unet, denoiser.text_encoder):
        assert sum(p.numel() for p in part.parameters()) > 300_000
    assert scheduler.alphas_cumprod.dtype == torch.float32


@pytest.mark.parametrize("changes", [{}, {"use_lora": True}, {"param_dtype": "bf16"}])
def test_the_text_encoder_can_be_left_as_it_is(load_models, changes):
    """To the last bit: trained weights in bfloat16 are no reason to round those that stay."""
    _, original, _ = load_models()
    _, denoiser, _ = load_models(**changes, no_train_text_encoder=True)
    assert trained_parameters(denoiser.text_encoder) == {}
    assert trained_parameters(denoiser.unet) != {}
    kept = denoiser.text_encoder.state_dict()
    expected = original.text_encoder.state_dict()
    assert kept.keys() == expected.keys()
    for name, weight in expected.items():
        assert kept[name].dtype == torch.float32
        assert torch.equal(kept[name], weight)


@pytest.mark.parametrize(
    ("changes", "unet", "text_encoder"),
    [
        ({}, torch.float32, torch.float32),
        ({"autocast": True}, torch.bfloat16, torch.float32),
        ({"autocast": True, "use_lora": True}, torch.bfloat16, torch.bfloat16),
        ({"param_dtype": "bf16"}, torch.bfloat16, torch.bfloat16),
    ],
)
def test_forward_pass_is_bfloat16_where_asked_for_or_needed(
    load_models, changes, unet, text_encoder
):
    """On a GPU it is asked for; on a CPU it gains nothing, and only bfloat16 weights need it. The
    text encoder needs it for bfloat16 weights alone, trained or under a LoRA."""
    _, denoiser, _ = load_models(**changes)
    dtypes = []
    for layer in (denoiser.text_encoder.encoder.layers[0].mlp, denoiser.unet.mid_block):
        layer.register_forward_hook(lambda *args: dtypes.append(args[-1].dtype))
    with torch.no_grad():
        denoiser(*random_inputs())
    assert dtypes == [text_encoder, unet]


@pytest.mark.parametrize("use_lora", [False, True])
def test_on_a_gpu_the_forward_pass_is_bfloat16(train_args, monkeypatch, use_lora):
    """What load_models decides for a CUDA device, with the weights left on the CPU: autocast,
    channels_last, and a LoRA's frozen layers in bfloat16."""

    def on_cpu(load):
        return lambda *args, **kwargs: load(*args, **{**kwargs, "device_map": "cpu"})

    for cls in (AutoencoderKL, CLIPTextModel, UNet2DConditionModel):
        monkeypatch.setattr(cls, "from_pretrained", on_cpu(cls.from_pretrained))
    monkeypatch.setattr(DiffusionSchedule, "to", lambda scheduler, device: scheduler)
    args = train_args("out", use_lora=use_lora)
    vae, denoiser, _ = models.load_models(args, torch.device("cuda"))
    assert denoiser.autocast
    for weight in (denoiser.unet.conv_in.weight, vae.encoder.conv_in.weight):
        assert weight.is_contiguous(memory_format=torch.channels_last)
    in_bfloat16 = {p.dtype == torch.bfloat16 for p in denoiser.parameters()}
    assert (True in in_bfloat16) == use_lora
    assert {p.dtype for p in trained_parameters(denoiser).values()} == {torch.float32}


def test_a_captured_step_computes_what_the_denoiser_does(load_models, monkeypatch):
    """Predictions and gradients of three batches with other prompts each, to rounding, where each
    batch is copied to the tensors of the first one, as CUDA graphs need it; and the original model,
    as with LoRA, is not what was captured."""

    def record(module, batch, **settings):
        module(*batch)  # its warm-up
        forward = module.forward

        def replay(*given):
            for kept, tensor in zip(tree_leaves(batch), tree_leaves(given), strict=True):
                assert kept.data_ptr() != tensor.data_ptr()
                kept.copy_(tensor)
            replayed.append(len(given))
            return forward(*batch)

        module.forward = replay

    replayed = []
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    _, denoiser, _ = load_models()
    captured = models.Captured(denoiser)
    noisy_latents, timesteps, conditions = random_inputs(num_images=6)
    for rows, counts in (([0, 1], [3, 3]), ([1, 0], [2, 4]), ([0, 1, 0], [3, 1, 2])):
        found = []
        given = {"input_ids": conditions["input_ids"][rows], "counts": counts}
        for model in (denoiser, captured):
            denoiser.zero_grad()
            prediction = model(noisy_latents, timesteps, given)
            prediction.square().mean().backward()
            found += [prediction.detach(), denoiser.unet.conv_in.weight.grad]
            found += [denoiser.text_encoder.get_input_embeddings().weight.grad]
        for expected, actual in zip(found[:3], found[3:], strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-6)
        noisy_latents, timesteps = noisy_latents.flip(0), timesteps.flip(0)
    assert len(replayed) == 3
    models.predict_original(denoiser, [], noisy_latents, timesteps, conditions)
    assert len(replayed) == 3


def test_each_prompt_is_encoded_once_however_many_images_share_it(load_models):
    """Six images and two prompts: prediction and gradients as with one prompt for each image."""
    noisy_latents, timesteps, together = random_inputs(num_images=6)
    ids = together["input_ids"].repeat_interleave(3, 0)
    uneven = {"input_ids": together["input_ids"][[0, 1, 1]], "counts": [3, 1, 2]}
    _, denoiser, _ = load_models()
    encoded = []
    denoiser.text_encoder.register_forward_pre_hook(
        lambda module, inputs: encoded.append(len(inputs[0]))
    )
    results = []
    for conditions in (together, uneven, {"input_ids": ids, "counts": [1] * 6}):
        prediction = denoiser(noisy_latents, timesteps, conditions)
        (prediction * torch.linspace(-1, 1, 6).view(6, 1, 1, 1)).sum().backward()
        gradient = [p.grad.flatten() for p in denoiser.text_encoder.encoder.parameters()]
        denoiser.zero_grad()
        results.append((prediction.detach(), torch.cat(gradient)))
    assert encoded == [2, 3, 6]
    *found, (expected, expected_gradient) = results
    for prediction, gradient in found:
        torch.testing.assert_close(prediction, expected, rtol=0, atol=1e-5)
        assert (gradient - expected_gradient).norm() < 1e-5 * expected_gradient.norm()


@pytest.mark.parametrize("use_lora", [False, True])
def test_gradient_checkpointing_changes_no_gradient(load_models, use_lora):
    """Nor does it lose that of a LoRA behind frozen layers. Layers run once more on the way
    back."""
    gradients = []
    for checkpointing in (False, True):
        _, denoiser, _ = load_models(
            use_lora=use_lora, gradient_checkpointing=checkpointing, autocast=True
        )
        set_second_matrices(denoiser)
        calls = []
        for layer in (
            denoiser.unet.mid_block.resnets[1].conv1,
            denoiser.text_encoder.encoder.layers[0].mlp.fc1,
        ):
            layer.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        gradients.append(gradients_of(denoiser, random_inputs()))
        assert len(calls) == (4 if checkpointing else 2)
    plain, checkpointed = gradients
    for name, gradient in plain.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("use_lora", [False, True])
def test_a_text_encoder_that_is_not_trained_has_no_backward_pass(load_models, use_lora):
    """transformers' checkpointing gives one to a model that is frozen as well: each step then
    computed it for nothing."""
    flags = {"no_train_text_encoder": True, "gradient_checkpointing": True}
    _, denoiser, _ = load_models(use_lora=use_lora, **flags)
    states = denoiser.text_encoder(torch.tensor([[1, 2]]))[0]
    assert not states.requires_grad
    assert denoiser(*random_inputs()).requires_grad


def layers_of(module, leave_out):
    """The names of its linear and convolution layers, but for those whose name contains one of
    `leave_out`."""
    return {
        name
        for name, layer in module.named_modules()
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d))
        and not any(part in name for part in leave_out)
    }


@pytest.mark.parametrize("layers", ["attention", "all"])
def test_a_lora_trains_low_rank_matrices_and_nothing_else(load_models, layers):
    """In all projections of attention; with "all", in the U-Net's blocks, in all layers but those
    of the timestep. At the start it adds nothing, as its second matrices are zero."""
    _, original, _ = load_models()
    flags = {"use_lora": True, "lora_rank": 3, "lora_layers": layers}
    vae, denoiser, _ = load_models(**flags)
    assert trained_parameters(vae) == {}
    trained = trained_parameters(denoiser)
    assert {min(p.shape[:2]) for p in trained.values()} == {3}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    adapted = {name.rpartition(".lora_")[0] for name in trained}
    expected = {f"text_encoder.{name}" for name in layers_of(original.text_encoder, [".fc"])}
    left_out = ["conv_in", "conv_out", "time_emb"]
    if layers == "attention":
        left_out += ["conv", "proj_", ".ff."]
    assert adapted == expected | {f"unet.{name}" for name in layers_of(original.unet, left_out)}
    frozen = {name.replace(".base_layer", ""): p for name, p in denoiser.named_parameters()}
    for name, weight in original.named_parameters():
        assert torch.equal(frozen[name], weight)
        assert not frozen[name].requires_grad
    with torch.no_grad():
        assert torch.equal(denoiser(*random_inputs()), original(*random_inputs()))


def test_a_lora_adds_the_product_of_its_matrices(load_models):
    """Of rank 3, with a scale of 1. The first matrix is a normal one with standard deviation 1/3,
    and follows from the seed, whatever was sampled before."""
    firsts = []
    for seed in (0, 0, 1):
        _, denoiser, _ = load_models(use_lora=True, lora_rank=3, seed=seed)
        layer = denoiser.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
        first, second = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        firsts.append(first)
    assert torch.equal(firsts[0], firsts[1])
    assert not torch.equal(firsts[0], firsts[2])
    assert first.std().item() == pytest.approx(1 / 3, rel=0.2)
    torch.nn.init.normal_(second)
    x = torch.randn(4, first.shape[1])
    expected = layer.base_layer(x) + x @ (second @ first).T
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-4)


def test_frozen_layers_in_bfloat16_change_no_bit_of_the_loss(load_models):
    """Autocast would round them at every step. Norms and embeddings, which it leaves in float32,
    stay so."""
    losses = []
    for in_float32 in (False, True):
        _, denoiser, scheduler = load_models(use_lora=True, autocast=True)
        for layer in denoiser.modules():
            rounded = isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d))
            for p in layer.parameters(recurse=False):
                in_bfloat16 = rounded and not p.requires_grad
                assert p.dtype == (torch.bfloat16 if in_bfloat16 else torch.float32)
        if in_float32:  # the same numbers: those that bfloat16 can hold
            denoiser.unet.float()  # (a text encoder in float32 would be computed in it)
        set_second_matrices(denoiser)
        noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        loss, _ = training_loss(
            denoiser,
            scheduler,
            posteriors=torch.ones(2, 2, 4, 16, 16),
            conditions={"input_ids": torch.arange(96).view(2, 48), "counts": [1, 1]},
            posterior_noise=noise,
            noise=noise.flip(0),
            timesteps=torch.tensor([10, 900]),
            prior_loss_weight=1.0,
        )
        losses.append(loss)
    assert torch.equal(losses[0], losses[1])


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_gradients_of_several_workers_stay_in_ddps_buckets(process_group, accumulation_steps):
    """If they are not set to None. Else DDP has them twice where they are accumulated: 3.7 GiB more
    for Stable Diffusion 1.4."""
    layers = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    ddp = DistributedDataParallel(layers, **models.ddp_settings(accumulation_steps))

    def take_step(set_to_none):
        """Returns the bytes outside of the buckets after the first forward pass."""
        for i in range(accumulation_steps):
            ddp.require_backward_grad_sync = i == accumulation_steps - 1  # as no_sync does
            ddp(torch.ones(1, 8)).sum().backward()
            if i == 0:
                grads = [p.grad for p in layers.parameters()]
                outside = [g.nbytes for g in grads if g.untyped_storage().nbytes() == g.nbytes]
        assert layers[1].bias.grad.tolist() == [accumulation_steps] * 8
        ddp.zero_grad(set_to_none=set_to_none)
        return sum(outside)

    assert [take_step(set_to_none=False) for _ in range(3)][1:] == [0, 0]
    take_step(set_to_none=True)
    copied = take_step(set_to_none=True)
    assert copied == (2 * (8 * 8 + 8) * 4 if accumulation_steps == 2 else 0)


def test_with_several_workers_a_block_is_compiled_as_one_graph(
    load_models, process_group, monkeypatch
):
    """DDP's optimizer would split it where a bucket of gradients ends."""
    monkeypatch.setattr(torch._dynamo.config, "optimize_ddp", True)
    graphs = []

    def note(graph, inputs):
        graphs.append(graph)
        return graph

    def compile_blocks(unet):
        for block in unet.down_blocks:
            block.compile(backend=note)

    monkeypatch.setattr(UNet2DConditionModel, "compile_repeated_blocks", compile_blocks)
    _, denoiser, _ = load_models(compile=True)
    ddp = DistributedDataParallel(denoiser, bucket_cap_mb=0.5)
    conditions = {"input_ids": torch.zeros(2, 48, dtype=torch.long), "counts": [1, 1]}
    ddp(torch.zeros(2, 4, 16, 16), torch.zeros(2), conditions)
    assert len(graphs) == 3
    torch._dynamo.reset()


def kahan_compensation(optimizer, parameter):
    """What an optimizer has kept of a parameter's updates that were rounded off."""
    kept = optimizer.state[parameter].get("kahan_comp")
    return torch.zeros(()) if kept is None else kept.float()


@pytest.fixture
def share_moved(load_models):
    """The share of the weights of the U-Net and of the layers of the text encoder that four steps
    move at the default learning rate: share_moved(param_dtype, build)."""

    def measure(param_dtype, build):
        _, denoiser, scheduler = load_models(param_dtype=param_dtype)
        layers = [*denoiser.unet.parameters(), *denoiser.text_encoder.encoder.parameters()]
        start = [p.detach().clone() for p in layers]
        optimizer = build(list(denoiser.parameters()))
        posteriors = torch.rand(2, 2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        _, _, conditions = random_inputs()
        for step in range(4):  # on one pair, with other noise in each step
            noise = latents.sample_noise(0, [step], (4, 16, 16), "cpu")
            timesteps = (latents.sample_fractions(0, [step]) * 1000).long()
            loss, _ = training_loss(
                denoiser, scheduler, posteriors, conditions, *noise, timesteps, 1.0
            )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert {p.dtype for p in layers} == {DTYPES[param_dtype]}
        moved = 0
        for parameter, before in zip(layers, start, strict=True):
            is_moved = parameter != before
            is_moved = is_moved | (kahan_compensation(optimizer, parameter) != 0)
            moved += is_moved.sum().item()
        return moved / sum(p.numel() for p in layers)

    return measure


@pytest.mark.parametrize("param_dtype", DTYPES)
def test_all_weights_learn(share_moved, train_args, param_dtype):
    """With Kahan summation those that are too large to move themselves have it kept for them."""
    args = train_args("out", param_dtype=param_dtype)
    assert share_moved(param_dtype, lambda weights: models.build_optimizer(weights, args)) > 0.99


def test_plain_bfloat16_weights_hardly_learn(share_moved):
    """Fault 1 of the published example: weights and optimizer in bfloat16 at a learning rate of
    5e-6, where a step moves only weights smaller than about 0.002."""
    assert share_moved("bf16", lambda weights: torch.optim.AdamW(weights, 5e-6)) < 0.2


def test_kahan_summation_follows_float32_where_plain_bfloat16_does_not(train_args):
    """200 steps of 5e-6 with the same gradients and beta2: how far from float32's updates each is,
    relative to these."""
    generator = torch.Generator().manual_seed(0)
    start = (0.05 * torch.randn(4096, generator=generator)).bfloat16().float()
    drift = torch.randn(4096, generator=generator)
    gradients = [drift + torch.randn(4096, generator=generator) for _ in range(200)]

    def update(param_dtype, build):
        weight = torch.nn.Parameter(start.to(DTYPES[param_dtype], copy=True))
        optimizer = build([weight])
        for gradient in gradients:
            weight.grad = gradient.to(weight.dtype)
            optimizer.step()
        return weight.detach().float() - start + kahan_compensation(optimizer, weight)

    def build_ours(param_dtype):
        args = train_args("out", param_dtype=param_dtype, adam_beta2=0.99)
        return lambda weights: models.build_optimizer(weights, args)

    exact = update("fp32", build_ours("fp32"))
    kahan = update("bf16", build_ours("bf16"))
    plain = update("bf16", lambda weights: torch.optim.AdamW(weights, 5e-6, (0.9, 0.99)))
    assert (kahan - exact).norm() / exact.norm() < 0.05
    assert (plain - exact).norm() / exact.norm() > 0.5


def test_a_bfloat16_second_moment_falls_with_the_gradients(train_args):
    """Gradients fall to a tenth after 100 of 900 steps; Adam's steps should soon be as long as
    before. In bfloat16 a second moment that decays by 0.1 % per step (beta2 = 0.999) stays where
    it was: hence 0.99 there."""
    generator = torch.Generator().manual_seed(0)
    gradients = [
        torch.randn(512, generator=generator) * (1 if n < 100 else 0.1) for n in range(900)
    ]

    def length_of_the_last_100_steps(args):
        weight = torch.nn.Parameter(torch.zeros(512, dtype=DTYPES[args.param_dtype]))
        optimizer = models.build_optimizer([weight], args)
        for n, gradient in enumerate(gradients):
            if n == 800:
                start = weight.detach().double().clone()
            weight.grad = gradient.to(weight.dtype)
            optimizer.step()
        return (weight.detach().double() - start).norm()

    exact = length_of_the_last_100_steps(train_args("out", adam_beta2=0.99))
    default = length_of_the_last_100_steps(train_args("out", param_dtype="bf16"))
    slow = length_of_the_last_100_steps(train_args("out", param_dtype="bf16", adam_beta2=0.999))
    assert default / exact == pytest.approx(1, abs=0.1)
    assert slow / exact < 0.8


@pytest.mark.parametrize(
    ("param_dtype", "optimizer_class", "beta2"),
    [("fp32", torch.optim.AdamW, 0.999), ("bf16", optimi.AdamW, 0.99)],
)
def test_every_flag_of_adamw_reaches_it(train_args, param_dtype, optimizer_class, beta2):
    def settings(**flags):
        weight = torch.nn.Parameter(torch.zeros(2, dtype=DTYPES[param_dtype]))
        args = train_args("out", param_dtype=param_dtype, **flags)
        optimizer = models.build_optimizer([weight], args)
        assert type(optimizer) is optimizer_class
        group = optimizer.param_groups[0]
        betas = group["betas"] if "betas" in group else (group["beta1"], group["beta2"])
        return group["lr"], *betas, group["eps"], group["weight_decay"]

    assert settings() == (5e-6, 0.9, beta2, 1e-8, 1e-2)
    flags = {
        "lr": 1e-3,
        "adam_beta1": 0.8,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-6,
        "adam_weight_decay": 0.1,
    }
    assert settings(**flags) == tuple(flags.values())
