"""The pipelines that these scripts take, by the class that model_index.json names: the parts of
their directories, limits and defaults. What needs neither torch nor diffusers is here; what the
models compute is in families.py.
"""

from typing import NamedTuple


class PipelineFacts(NamedTuple):
    """What holds for all models of one pipeline class."""

    class_name: str  # as model_index.json has it
    name: str
    tokenizers: tuple  # parts, each a folder with the files of its model
    text_encoders: tuple
    backbone: str  # the U-Net, or the transformer in its place
    can_train_text_encoder: bool  # and by default does; else prompts are encoded once
    sampler: dict  # the defaults of generate.py
    tags: tuple  # of the model card
    classes: dict  # by part: the one class that it may have
    extra_conditions: frozenset = frozenset()  # of the U-Net, beside timestep and text
    extras: dict = {}  # what the pipeline's class is told beside its models
    is_distilled: bool = False  # a model that was made to sample in few steps
    is_flow: bool = False  # the noise schedule: a flow, else a diffusion
    pixels: int = 512  # the side of its images, where no configuration says it
    patch: int = 1  # latents on each side that its backbone takes as one
    text_field: str = "cross_attention_dim"  # of the backbone's configuration: the text's width
    text_layers: int = 1  # of the text encoder, side by side in that width
    max_tokens: int | None = None  # of a prompt, where text encoders take more
    has_chat_template: bool = False  # in which the tokenizer puts a prompt

    @property
    def models(self):
        """The parts that have weights."""
        return (*self.text_encoders, "vae", self.backbone)

    @property
    def parts(self):
        return (*self.tokenizers, *self.models, "scheduler")


SD_CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
CLIP, PROJECTED_CLIP = "CLIPTextModel", "CLIPTextModelWithProjection"
ROWS = (
    PipelineFacts(
        class_name="StableDiffusionPipeline",
        name="Stable Diffusion 1.x and 2.x",
        tokenizers=("tokenizer",),
        text_encoders=("text_encoder",),
        backbone="unet",
        can_train_text_encoder=True,
        sampler={"scheduler": "dpm", "num_inference_steps": 25, "guidance_scale": 7.5},
        tags=("stable-diffusion",),
        classes={**SD_CLASSES, "text_encoder": CLIP},
        extras={
            "safety_checker": None,
            "feature_extractor": None,
            "image_encoder": None,
            "requires_safety_checker": False,
        },
    ),
    PipelineFacts(
        class_name="StableDiffusionXLPipeline",
        name="Stable Diffusion XL",
        tokenizers=("tokenizer", "tokenizer_2"),
        text_encoders=("text_encoder", "text_encoder_2"),
        backbone="unet",
        can_train_text_encoder=False,
        sampler={"scheduler": "dpm", "num_inference_steps": 25, "guidance_scale": 5.0},
        tags=("stable-diffusion-xl",),
        classes={**SD_CLASSES, "text_encoder": CLIP, "text_encoder_2": PROJECTED_CLIP},
        extra_conditions=frozenset({"addition_embed_type"}),
        extras={"add_watermarker": False, "feature_extractor": None, "image_encoder": None},
    ),
    PipelineFacts(
        class_name="Flux2KleinPipeline",
        name="FLUX.2-klein",
        tokenizers=("tokenizer",),
        text_encoders=("text_encoder",),
        backbone="transformer",
        can_train_text_encoder=False,
        sampler={"scheduler": "model", "num_inference_steps": 50, "guidance_scale": 4.0},
        tags=("flux2-klein",),
        classes={"transformer": "Flux2Transformer2DModel", "vae": "AutoencoderKLFlux2"},
        is_flow=True,
        pixels=1024,
        patch=2,
        text_field="joint_attention_dim",
        text_layers=3,
        max_tokens=512,
        has_chat_template=True,
    ),
)
PIPELINES = {facts.class_name: facts for facts in ROWS}
DISTILLED_SAMPLER = {"scheduler": "model", "num_inference_steps": 4, "guidance_scale": 1.0}
OTHER_MODELS = {  # of pipelines that people bring, by the beginning of the class's name
    "StableDiffusion3": "Stable Diffusion 3",
    "Flux2": "FLUX.2",
    "Flux": "FLUX.1",
    "PixArt": "PixArt",
    "ZImage": "Z-Image",
    "QwenImage": "Qwen-Image",
}
