"""The DreamBooth paper's own figures for real models (Ruiz et al. 2022, arXiv 2208.12242, section 4.1), with two
encoders that the user has as directories: a DINO (ViT-S/16 in the paper) and a CLIP (ViT-B/32).

    DINO      pictures of the subject in 25 scenes against its photos, mean cosine of DINO's embeddings   higher
    CLIP-I    the same with CLIP's image embeddings                                                       higher
    CLIP-T    each picture against the words of its scene, cosine of CLIP's embeddings                    higher
    PRES      pictures of the class against the photos, mean cosine of DINO's embeddings                  lower
    DIV       two pictures of one prompt, mean distance                                                   higher

Two things differ from the paper: DIV is 1 - cosine of DINO's embeddings where the paper has LPIPS, which
would take a third network; and in CLIP-T the class's name stands for the subject, as CLIP does not know the
identifier. The 25 scenes are those of the paper's data set (github.com/google/dreambooth, CC BY 4.0).
"""

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, CLIPModel

ANY = [
    "{} in the jungle", "{} in the snow", "{} on the beach", "{} on a cobblestone street", "{} on top of pink fabric",
    "{} on top of a wooden floor", "{} with a city in the background", "{} with a mountain in the background",
    "{} with a blue house in the background", "{} on top of a purple rug in a forest",
    "red {}", "purple {}", "shiny {}", "wet {}", "cube shaped {}",
]  # fmt: skip
OBJECT = ANY + [
    "{} with a wheat field in the background", "{} with a tree and autumn leaves in the background",
    "{} with the Eiffel Tower in the background", "{} floating on top of water", "{} floating in an ocean of milk",
    "{} on top of green grass with sunflowers around it", "{} on top of a mirror",
    "{} on top of the sidewalk in a crowded street", "{} on top of a dirt road", "{} on top of a white rug",
]  # fmt: skip
LIVE = ANY + [
    "{} wearing a red hat", "{} wearing a santa hat", "{} wearing a rainbow scarf",
    "{} wearing a black top hat and a monocle", "{} in a chef outfit", "{} in a firefighter outfit",
    "{} in a police outfit", "{} wearing pink glasses", "{} wearing a yellow shirt", "{} in a purple wizard outfit",
]  # fmt: skip


class Encoders:
    """The two encoders; embeddings have unit length, (N, D)."""

    def __init__(self, dino_dir, clip_dir, device="cpu"):
        self.device = device
        self.dino = AutoModel.from_pretrained(dino_dir, dtype=torch.float32).to(device).eval()
        self.clip = CLIPModel.from_pretrained(clip_dir, dtype=torch.float32).to(device).eval()
        self.processors = {"dino": AutoImageProcessor.from_pretrained(dino_dir)}
        self.processors["clip"] = AutoImageProcessor.from_pretrained(clip_dir)
        self.tokenizer = AutoTokenizer.from_pretrained(clip_dir)

    def _pixels(self, name, pictures):
        images = [Image.fromarray(picture) for picture in pictures]
        return self.processors[name](images=images, return_tensors="pt").pixel_values.to(self.device)

    @torch.inference_mode()
    def see(self, pictures):
        """Pictures, each (H, W, 3) uint8, through DINO (its class token) and CLIP."""
        dino = self.dino(pixel_values=self._pixels("dino", pictures)).last_hidden_state[:, 0]
        clip = self.clip.get_image_features(pixel_values=self._pixels("clip", pictures)).pooler_output
        return {"dino": dino / dino.norm(dim=1, keepdim=True), "clip": clip / clip.norm(dim=1, keepdim=True)}

    @torch.inference_mode()
    def read(self, text):
        words = self.tokenizer([text], padding=True, truncation=True, return_tensors="pt").to(self.device)
        clip = self.clip.get_text_features(**words).pooler_output
        return clip / clip.norm(dim=1, keepdim=True)


def mean_cosine(a, b):
    """Of each row of `a` with each row of `b`, both of unit length."""
    return (a @ b.T).mean().item()


def mean_distance(a):
    """1 - cosine, over all pairs of two different rows of `a`, of unit length."""
    n = len(a)
    return 1 - (((a @ a.T).sum() - n) / (n * (n - 1))).item()


def paper_report(draw, encoders, photos, subject, class_name, scenes):
    """The five figures of one model; `draw(prompt)` gives two or more of its pictures, (N, H, W, 3) uint8;
    `photos` are the subject's, (H, W, 3) uint8 each; `subject` is as in training, such as "unqtkn dog"."""
    real, figures = encoders.see(photos), {"DINO": [], "CLIP-I": [], "CLIP-T": [], "DIV": []}
    for scene in scenes:
        seen = encoders.see(draw(f"photo of {scene.format(subject)}"))
        figures["DINO"].append(mean_cosine(seen["dino"], real["dino"]))
        figures["CLIP-I"].append(mean_cosine(seen["clip"], real["clip"]))
        figures["CLIP-T"].append(mean_cosine(seen["clip"], encoders.read(f"photo of a {scene.format(class_name)}")))
        figures["DIV"].append(mean_distance(seen["dino"]))
    figures = {name: sum(values) / len(values) for name, values in figures.items()}
    others = encoders.see(draw(f"photo of a {class_name}"))
    return {**figures, "PRES": mean_cosine(others["dino"], real["dino"])}
