"""The whole model (Rombach et al., 2022): autoencoder, text encoder and UNet, with the schedule that joins them."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict

import torch
from torch import Tensor, nn

from errors import InputError
from models.attention import CrossAttention
from models.autoencoder import Autoencoder
from models.mmdit import MMDiT
from models.t5 import T5
from models.text import Clip, TextEncoder, TextTowers, build_clip, build_text
from models.unet import ProjectedContext, UNet
from samplers import Conditioning, FlowSchedule, NoiseSchedule


class LatentDiffusion(nn.Module):
    """What editing methods and samplers see of a model. `prediction` is what the UNet was trained to output:
    "epsilon", "v" (Salimans & Ho, 2022) or "flow", the velocity; `image_size` is the side in pixels of its training."""

    def __init__(
        self,
        unet: UNet | MMDiT,
        autoencoder: Autoencoder,
        towers: TextTowers,
        schedule: NoiseSchedule | FlowSchedule,
        prediction: str = "epsilon",
        image_size: int = 512,
        clip: Clip | None = None,  # holds the very same text encoder as the towers
    ):
        super().__init__()
        if prediction not in (("flow",) if isinstance(schedule, FlowSchedule) else ("epsilon", "v")):
            raise InputError(f"prediction is {prediction!r}: choose epsilon or v, or with schedule.kind=flow, flow")
        if prediction == "epsilon" and schedule.zero_snr:
            raise InputError("a schedule of zero terminal SNR ends in pure noise, which only prediction=v can use")
        self.unet, self.autoencoder, self.towers = unet, autoencoder, towers
        self.schedule, self.prediction, self.image_size = schedule, prediction, image_size
        self.multiple = autoencoder.downsampling * unet.downsampling  # of which a picture's sides are multiples
        if not isinstance(image_size, int) or image_size < 1 or image_size % self.multiple:
            raise InputError(f"image_size is {image_size}: the side in pixels must be a multiple of {self.multiple}")
        self.clip = clip
        self.config: dict = {}  # the sizes it was built from, which `save` writes down
        self.evaluations = 0  # of the network so far, one for each latent in a batch

    @property
    def device(self) -> torch.device:
        return self.unet.time_embed[0].weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.time_embed[0].weight.dtype

    @property
    def text(self) -> TextEncoder:
        """The first tower, whose tokens are the places of the states."""
        return self.towers["text"]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(c, h, w) of one image's latent at `image_size`."""
        side = self.image_size // self.autoencoder.downsampling
        return self.autoencoder.z_channels, side, side

    @property
    def fingerprint(self) -> str:
        """A hash of everything that determines the outputs: the config, the schedule and all weights."""
        settings = [self.config, asdict(self.schedule), self.prediction, self.autoencoder.scale_factor]
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()

    def encode_image(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> scaled latents (B, c, h, w): the posterior's mean, or with a generator
        a sample. Raises InputError where H or W does not fit the networks."""
        high, wide = x.shape[-2:]
        if high % self.multiple or wide % self.multiple:
            raise InputError(f"a picture of {wide}x{high} does not fit: its sides are multiples of {self.multiple}")
        return self.autoencoder.encode(x.to(self.autoencoder.encoder.conv_in.weight), generator)

    def decode_latents(self, z: Tensor) -> Tensor:
        """Scaled latents (B, c, h, w) of any dtype -> images (B, 3, H, W), about [-1, 1], not clamped."""
        return self.autoencoder.decode(z.to(self.autoencoder.encoder.conv_in.weight))

    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        """Prompts -> one row each, in the model's dtype; the empty prompt by the family's rule."""
        return self.towers(prompts).map(lambda x: x.to(self.dtype))

    def project(self, conditioning: Conditioning) -> ProjectedContext:
        """Keys and values of the text for every layer of the UNet, to be reused over steps, and its vector."""
        return self.unet.project_context(conditioning.states, conditioning.vector)

    def predict(self, x: Tensor, t: Tensor | float, conditioning: Conditioning | ProjectedContext) -> Tensor:
        """The schedule's own prediction, epsilon or a velocity (B, c, h, w), for noisy latents x at timestep t (a
        number or (B,)). The network works in its own precision; the prediction is computed in that of x."""
        if isinstance(conditioning, Conditioning):
            conditioning = self.project(conditioning.expand(len(x)))
        self.evaluations += len(x)
        # As a tensor for the network, which would be compiled anew for each number; made without waiting for a device.
        timesteps = torch.full((len(x),), t, device=x.device) if isinstance(t, int | float) else t
        pixels = tuple(side * self.autoencoder.downsampling for side in x.shape[-2:])
        out = self.unet(x.to(self.dtype), timesteps, conditioning, pixels).to(x.dtype)
        return self.schedule.eps_from_v(x, out, t) if self.prediction == "v" else out


def build(
    config: Mapping, seed: int | None = None, vocabulary: Tensor | None = None, meta: bool = False
) -> LatentDiffusion:
    """A model with random weights from the sizes in `config`: `unet`, `vae`, `text` (and `text_2`, where there are two
    towers), `schedule`, optionally `vision`, `prediction`, `image_size` and `empty_is_zero`. `seed` makes the weights
    reproducible without touching the global generator; `vocabulary` gives the first tower a compact embedding; `meta`
    leaves all weights on the meta device, without time or memory. Raises InputError for sizes of no network."""
    import open_clip  # noqa: F401 (now: torch 2.6 cannot import what it needs on the meta device)

    try:
        with torch.random.fork_rng([], seed is not None), torch.device("meta") if meta else nullcontext():
            if seed is not None:
                torch.manual_seed(seed)
            text = build_text(**config["text"], vocabulary=vocabulary)
            towers = {"text": text} | {name: build_text(**config[name]) for name in ("text_2",) if name in config}
            if "t5" in config:
                towers["t5"] = T5(**config["t5"])
            unet = MMDiT(**config["mmdit"]) if "mmdit" in config else UNet(**config["unet"])
            wide = sum(config[name]["width"] for name in towers if name != "t5")
            if {m.to_kv.in_features for m in unet.modules() if isinstance(m, CrossAttention)} - {wide}:
                raise InputError(f"arch.unet.context_dim is not {wide}, the width of the text's states")
            autoencoder = Autoencoder(**config["vae"])
            vision = config.get("vision")
            clip = build_clip(text, config["text"]["embed_dim"], **vision) if vision else None
        others = {name: config[name] for name in ("prediction", "image_size") if name in config}
        width = unet.context_embedder.in_features if isinstance(unet, MMDiT) else None
        towers = TextTowers(towers, config.get("empty_is_zero", False), width)
        schedule = (FlowSchedule if config["schedule"].get("kind") == "flow" else NoiseSchedule)(**config["schedule"])
        model = LatentDiffusion(unet, autoencoder, towers, schedule, clip=clip, **others)
        if not all(weight.numel() for weight in model.parameters()):
            raise InputError("the sizes of arch describe a layer without weights")
    except Exception as error:  # torch and open_clip have many
        line = str(error) if isinstance(error, InputError) else f"the sizes of arch describe no network ({error!r})"
        raise InputError(line) from error
    model.config = dict(config)
    return model.eval()
