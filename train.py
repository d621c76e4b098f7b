"""Train a text-to-image model part by part: `python train.py part=autoencoder|clip|unet`, judge it: `part=evaluation`,
or all of this in turn: `part=all`.

Wiring only: the loop is in training/loop.py, the losses in training/losses.py, the settings in conf/train.yaml. Under
`torchrun --nproc-per-node=N train.py ...` N processes share each batch.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import hydra
import torch
import torch.distributed as dist
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import Dataset
from tqdm import tqdm

from data.images import to_pil
from errors import InputError
from evaluation import cli
from files import whole_file
from models import build, load
from models.checkpoints import SECTIONS_OF, part_of, read_config, read_part
from models.device import choose_device, computes_in
from models.text import compact_vocabulary
from training.evaluate import evaluate, pictures
from training.loop import Objective, Settings, train
from training.losses import AutoencoderObjective, ClipObjective, UNetObjective

NEEDS = {"autoencoder": [], "clip": [], "unet": ["autoencoder", "clip"]}  # parts that must be trained before
ConfigStore.instance().store(group="training", name="defaults", node=Settings)


@hydra.main(config_path="conf", config_name="train", version_base="1.3")
def main(cfg: DictConfig) -> None:
    with cli.job():
        if not run(cfg):
            cli.end("stopped by SIGTERM; the state is saved, and the same command goes on from it", 143)


def run(cfg: DictConfig) -> bool:
    """Train, or judge, the part or the parts in turn; False if a SIGTERM cut it short."""
    if cfg.dtype not in ("auto", "float32", "bfloat16"):
        raise InputError(f"dtype={cfg.dtype} is unknown: auto, float32 or bfloat16")
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    out = Path(cfg.out)
    (out / "training").mkdir(parents=True, exist_ok=True)
    parts = [cfg.part] if "name" in cfg.part else cfg.part.values()
    with process_group(cfg.device) as (rank, device), logger(cfg, out, rank) as log:
        bfloat16 = cfg.dtype == "bfloat16" or (cfg.dtype == "auto" and computes_in("bfloat16", device))
        for part in parts:
            if part.name != "evaluation":
                objective, dataset = assemble(cfg, part, out)
                settings, file = OmegaConf.to_object(part.training), out / "training" / f"{part.name}.pt"
                if not train(objective, dataset, settings, file, device, cfg.seed, bfloat16, partial(log, part.name)):
                    return False
            elif rank == 0:
                model = load(out, device=device)
                evaluate(model, datasets(cfg, model.image_size, cfg.seed + 1), out, cfg.seed, part)
    return True


def datasets(cfg: DictConfig, size: int, seed: int) -> dict[str, Dataset]:
    """Pictures of what training shows, and of what it does not."""
    return {
        "trained": hydra.utils.instantiate(cfg.data.train, size=size, seed=seed),
        "heldout": hydra.utils.instantiate(cfg.data.heldout, size=size, seed=seed + 1),
    }


def assemble(cfg: DictConfig, part: DictConfig, out: Path) -> tuple[Objective, Dataset]:
    """The objective of a part, on a model whose other parts are read from `out`, and its training data. Raises
    InputError where `arch` contradicts a part that is already trained."""
    arch = OmegaConf.to_container(cfg.arch, resolve=True)
    if (out / "config.json").exists():
        stored = read_config(out)
        arch["vae"]["scale_factor"] = stored["vae"]["scale_factor"]  # which was measured
        for other, sections in SECTIONS_OF.items():
            differing = [f"arch.{section}" for section in sections if stored.get(section) != arch.get(section)]
            if differing and other != part.name and (out / f"{other}.safetensors").exists():
                raise InputError(f"{differing[0]} is not that of the {other} in {out}: choose another `out`")
    states = {name: read_part(out, name) for name in NEEDS[part.name]}
    if cfg.init:  # a training state in `out`, where there is one, is resumed all the same
        states[part.name] = read_part(Path(cfg.init), part.name)
    data = datasets(cfg, arch["image_size"], cfg.seed)
    vocabulary = states["clip"].get("text.vocabulary") if "clip" in states else None
    if part.name == "clip" and not cfg.init:
        vocabulary = compact_vocabulary(data["trained"].vocabulary())
    model = build(arch, seed=cfg.seed, vocabulary=vocabulary)
    for name, state in states.items():
        start_from(part_of(model, name), state, f"{cfg.init if name == part.name else out}/{name}")
    options = OmegaConf.to_container(part.objective, resolve=True)
    if part.name == "autoencoder":
        return AutoencoderObjective(model, out, data["heldout"], **options), data["trained"]
    if part.name == "clip":
        return ClipObjective(model, out, datasets(cfg, arch["image_size"], cfg.seed + 1), **options), data["trained"]
    prompts = options.pop("prompts") or pictures(data["trained"], range(10**8, 10**8 + 16))[1]
    return UNetObjective(model, out, data["heldout"], prompts, **options), data["trained"]


def start_from(module: torch.nn.Module, state: dict[str, torch.Tensor], source: str) -> None:
    """Load the weights whose shapes agree, and print in one line which others stay random. Raises InputError if none
    agrees."""
    own = module.state_dict()
    fitting = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
    if not fitting:
        raise InputError(f"{source}: no weight has a shape that arch asks for")
    module.load_state_dict(fitting, strict=False)
    if left := [k for k in own if k not in fitting]:
        names = ", ".join(left[:8]) + (", ..." if len(left) > 8 else "")
        print(f"{source} lacks {len(left)} of {len(own)} weights in this shape, which start at random: {names}")


@contextmanager
def logger(cfg: DictConfig, out: Path, rank: int) -> Iterator[Callable]:
    """Yield log(part, numbers, pictures, step): pictures become files in `out`/training, and unless
    logger.mode=disabled, all goes to one W&B run. Only rank 0 logs."""
    wanted = {k: v for k, v in OmegaConf.to_container(cfg.logger).items() if k != "_target_"}
    run = nullcontext()
    if rank == 0 and cfg.logger.mode != "disabled":
        import wandb

        config, quiet = OmegaConf.to_container(cfg, resolve=True), wandb.Settings(silent=True, console="off")
        try:
            run = wandb.init(dir=out, config=config, settings=quiet, **wanted)
        except wandb.errors.Error as error:
            raise InputError(f"W&B could not start: {error} (logger.mode=offline needs no account)") from error
        for part in NEEDS:
            run.define_metric(f"{part}/*", step_metric=f"{part}/step")

    def log(part: str, numbers: dict, grids: dict, step: int) -> None:
        if rank > 0:
            return
        images = {name: to_pil(picture) for name, picture in grids.items()}
        for name, image in images.items():
            with whole_file(out / "training" / f"{name}_{step:07d}.png") as file:
                image.save(file, format="PNG")
        if "loss" not in numbers:  # of a validation
            tqdm.write(f"{part}, step {step}: " + ", ".join(f"{k} {v:.4f}" for k, v in numbers.items()))
        if cfg.logger.mode != "disabled":
            point = numbers | {name: wandb.Image(image) for name, image in images.items()} | {"step": step}
            run.log({f"{part}/{name}": value for name, value in point.items()})

    with run:
        yield log


@contextmanager
def process_group(device_name: str) -> Iterator[tuple[int, torch.device]]:
    """(rank, device) of this process, joined to the others where torchrun started several."""
    device = choose_device(device_name)
    if "WORLD_SIZE" not in os.environ:
        yield 0, device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield dist.get_rank(), device
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    cli.run(main)
