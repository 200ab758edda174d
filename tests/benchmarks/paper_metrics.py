"""The DreamBooth paper's own metrics for real models (Ruiz et al. 2022, arXiv 2208.12242, section
4.1), with two encoders that the user has as directories: a DINO (ViT-S/16 in the paper) and a CLIP
(ViT-B/32).

    python tests/benchmarks/paper_metrics.py --model_dir $ORIG_MODEL_PATH \\
        --tuned_model_dir $TUNED_MODEL_DIR --encoder ~/dino-vits16 ~/clip-vit-base-patch32 \\
        --instance_images_dir images/dog --live_subject --num_samples 4 --guidance_scale 7.5

    DINO      images of the subject in 25 scenes and its photos: mean cosine in DINO       higher
    CLIP-I    the same with CLIP's image embeddings                                        higher
    CLIP-T    each image and the text of its scene: cosine in CLIP                         higher
    PRES      images of the class and the photos: mean cosine in DINO                      lower
    DIV       two images of one prompt: mean distance                                      higher

Two things differ from the paper. DIV is 1 - cosine of DINO's embeddings; the paper has LPIPS, which
would take a third network. In CLIP-T the class name stands for the subject, as CLIP does not know
the identifier. The 25 scenes are those of the paper's data set (github.com/google/dreambooth,
CC BY 4.0).

Letters: N images, H and W height and width, D size of an embedding.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, CLIPModel

sys.path.insert(0, str(Path(__file__).parents[2]))

from dreambooth.files.decode import open_image
from dreambooth.files.photos import find_images
from tests.benchmarks import fidelity

ANY = [
    "{} in the jungle",
    "{} in the snow",
    "{} on the beach",
    "{} on a cobblestone street",
    "{} on top of pink fabric",
    "{} on top of a wooden floor",
    "{} with a city in the background",
    "{} with a mountain in the background",
    "{} with a blue house in the background",
    "{} on top of a purple rug in a forest",
    "red {}",
    "purple {}",
    "shiny {}",
    "wet {}",
    "cube shaped {}",
]
OBJECT = ANY + [
    "{} with a wheat field in the background",
    "{} with a tree and autumn leaves in the background",
    "{} with the Eiffel Tower in the background",
    "{} floating on top of water",
    "{} floating in an ocean of milk",
    "{} on top of green grass with sunflowers around it",
    "{} on top of a mirror",
    "{} on top of the sidewalk in a crowded street",
    "{} on top of a dirt road",
    "{} on top of a white rug",
]
LIVE = ANY + [
    "{} wearing a red hat",
    "{} wearing a santa hat",
    "{} wearing a rainbow scarf",
    "{} wearing a black top hat and a monocle",
    "{} in a chef outfit",
    "{} in a firefighter outfit",
    "{} in a police outfit",
    "{} wearing pink glasses",
    "{} wearing a yellow shirt",
    "{} in a purple wizard outfit",
]


class Encoders:
    """The two encoders; embeddings have unit length, (N, D)."""

    def __init__(self, dino_dir, clip_dir, device="cpu"):
        self.device = device
        self.dino = AutoModel.from_pretrained(dino_dir, dtype=torch.float32).to(device).eval()
        self.clip = CLIPModel.from_pretrained(clip_dir, dtype=torch.float32).to(device).eval()
        self.dino_processor = AutoImageProcessor.from_pretrained(dino_dir)
        self.clip_processor = AutoImageProcessor.from_pretrained(clip_dir)
        self.tokenizer = AutoTokenizer.from_pretrained(clip_dir)

    def _pixel_values(self, processor, images):
        pil_images = [Image.fromarray(image) for image in images]
        return processor(images=pil_images, return_tensors="pt").pixel_values.to(self.device)

    @torch.inference_mode()
    def embed_images(self, images):
        """Embeddings of images, each (H, W, 3) uint8, by DINO (its class token) and by CLIP."""
        dino_pixels = self._pixel_values(self.dino_processor, images)
        clip_pixels = self._pixel_values(self.clip_processor, images)
        dino = self.dino(pixel_values=dino_pixels).last_hidden_state[:, 0]
        clip = self.clip.get_image_features(pixel_values=clip_pixels).pooler_output
        return {"dino": _normalize(dino), "clip": _normalize(clip)}

    @torch.inference_mode()
    def embed_text(self, text):
        """CLIP's embedding of one text, (1, D)."""
        inputs = self.tokenizer([text], padding=True, truncation=True, return_tensors="pt")
        return _normalize(self.clip.get_text_features(**inputs.to(self.device)).pooler_output)


def _normalize(embeddings):
    return embeddings / embeddings.norm(dim=1, keepdim=True)


def mean_cosine(a, b):
    """Of each row of `a` with each row of `b`, both of unit length."""
    return (a @ b.T).mean().item()


def mean_distance(a):
    """1 - cosine, over all pairs of two different rows of `a`, of unit length."""
    n = len(a)
    return 1 - (((a @ a.T).sum() - n) / (n * (n - 1))).item()


def paper_report(sample, encoders, photos, subject, class_name, scenes):
    """The five metrics of one model.

    `sample(prompt)` gives two or more of its images, (N, H, W, 3) uint8; `photos` are the
    subject's, (H, W, 3) uint8 each; `subject` is as in training, such as "unqtkn dog".
    """
    real = encoders.embed_images(photos)
    values = {"DINO": [], "CLIP-I": [], "CLIP-T": [], "DIV": []}
    for scene in scenes:
        generated = encoders.embed_images(sample(f"photo of {scene.format(subject)}"))
        text = encoders.embed_text(f"photo of a {scene.format(class_name)}")
        values["DINO"].append(mean_cosine(generated["dino"], real["dino"]))
        values["CLIP-I"].append(mean_cosine(generated["clip"], real["clip"]))
        values["CLIP-T"].append(mean_cosine(generated["clip"], text))
        values["DIV"].append(mean_distance(generated["dino"]))
    others = encoders.embed_images(sample(f"photo of a {class_name}"))
    means = {name: sum(numbers) / len(numbers) for name, numbers in values.items()}
    return {**means, "PRES": mean_cosine(others["dino"], real["dino"])}


def main(args):
    """A row for the original model and for each tuned one."""
    samplers = fidelity.samplers_of(args)
    encoders = Encoders(*args.encoder, device=samplers["original"].generator.device)
    photos = [np.asarray(open_image(path)) for path in find_images(args.instance_images_dir)]
    scenes = LIVE if args.live_subject else OBJECT
    for name, sample in samplers.items():
        metrics = paper_report(sample, encoders, photos, args.subject, args.class_name, scenes)
        fidelity.print_row(name, metrics)


def parse_args(argv=None):
    parser = fidelity.build_parser(__doc__)
    add = parser.add_argument
    add("--encoder", nargs=2, metavar=("DINO_DIR", "CLIP_DIR"), required=True, help="two encoders")
    add("--instance_images_dir", required=True, help="photos of the subject")
    add("--subject", default="unqtkn dog", help="the subject's name in prompts")
    add("--class_name", default="dog", help="the class's name in prompts")
    add("--live_subject", action="store_true", help="use the paper's animal scenes")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
