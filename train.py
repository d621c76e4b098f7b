"""Train a text-to-image model part by part: `python train.py part=autoencoder|clip|unet`, judge it: `part=evaluation`,
or all of this in turn: `part=all`. Wiring only; see conf/train.yaml.

Under `torchrun --nproc-per-node=N train.py ...` N processes share each batch.
"""

import atexit
import json
import os
from functools import partial
from pathlib import Path

import hydra
import torch
import torch.distributed as dist
from hydra.core.config_store import ConfigStore
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import Dataset
from tqdm import tqdm

from data.images import to_pil
from errors import MOST, InputError, check_number, made
from evaluation import cli
from files import whole_file
from models import build, load
from models.checkpoints import SECTIONS_OF, part_of, read_config, read_part
from models.device import choose_device, computes_in
from models.text import compact_vocabulary
from training.evaluate import evaluate
from training.loop import Objective, Settings, train
from training.losses import OBJECTIVES

COUNTS = ("probes", "pictures", "samples", "steps")  # of an objective, or of the evaluation
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
    check_number("seed", cfg.seed, whole=True, high=2**32 - 1)
    parts = [cfg.part] if "name" in cfg.part else list(cfg.part.values())
    for part in parts:
        if not isinstance(part, DictConfig) or part.get("name") not in (*OBJECTIVES, "evaluation"):
            raise InputError(f"a part's name must be one of {', '.join(OBJECTIVES)}, evaluation; this is {part}")
        for name, value in OmegaConf.to_container(part.get("objective", part), resolve=True).items():
            if name not in ("name", "prompts"):
                count, share = name in COUNTS, name in ("prompt_dropout", "unknown_rate")
                check_number(f"{part.name}: {name}", value, count, int(count), 1 if share else MOST)
    trained = {part.name: part.training for part in parts if part.name != "evaluation"}
    plans = {name: made(Settings, **OmegaConf.to_container(own, resolve=True)) for name, own in trained.items()}
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    out, logger, device = Path(cfg.out), instantiate(cfg.logger), choose_device(cfg.device)
    bfloat16 = cfg.dtype == "bfloat16" or (cfg.dtype == "auto" and computes_in("bfloat16", device))
    (out / "training").mkdir(parents=True, exist_ok=True)
    if "WORLD_SIZE" in os.environ:  # torchrun started several processes
        if device.type == "cuda":
            torch.cuda.set_device(device)
        try:
            if not 0 <= int(os.environ.get("RANK", 0)) < int(os.environ["WORLD_SIZE"]):  # torch would wait for others
                raise ValueError("RANK must be below WORLD_SIZE")
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        except (ValueError, RuntimeError) as error:
            raise InputError(f"WORLD_SIZE is set, as by torchrun, but no processes join: {error}") from error
        atexit.register(dist.destroy_process_group)
    rank, settings = dist.get_rank() if dist.is_initialized() else 0, OmegaConf.to_container(cfg, resolve=True)
    if rank > 0:
        logger.mode = "disabled"  # the first process logs the whole run
    else:
        with whole_file(out / "training" / "run.json") as temporary:
            temporary.write_text(json.dumps(cli.provenance() | {"settings": settings}, indent=1) + "\n")
    with logger.run(out, settings, f"train {', '.join(part.name for part in parts)}", out.name):
        for part in parts:
            if part.name != "evaluation":
                objective, dataset = assemble(cfg, part, out)
                file, logged = out / "training" / f"{part.name}.pt", partial(log, logger, out, part.name)
                if not train(objective, dataset, plans[part.name], file, device, cfg.seed, bfloat16, logged):
                    return False
            elif rank == 0:
                model = load(out, device=device)
                evaluate(model, datasets(cfg, model.image_size, cfg.seed + 1), out, cfg.seed, part)
    return True


def datasets(cfg: DictConfig, size: int, seed: int) -> dict[str, Dataset]:
    """Pictures of what training shows, and of what it does not."""
    trained = instantiate(cfg.data, split="train", size=size, seed=seed)
    return {"trained": trained, "heldout": instantiate(cfg.data, split="heldout", size=size, seed=seed + 1)}


def assemble(cfg: DictConfig, part: DictConfig, out: Path) -> tuple[Objective, Dataset]:
    """The objective and the training data of a part. Raises InputError where `arch` contradicts parts in `out`."""
    arch, states = OmegaConf.to_container(cfg.arch, resolve=True), {}
    for name in ("autoencoder", "clip") if part.name == "unet" else ():
        states[name], stored = read_part(out, name), read_config(out)
        arch["vae"]["scale_factor"] = stored["vae"]["scale_factor"]  # which was measured
        for section in SECTIONS_OF[name]:
            if stored.get(section) != arch.get(section):
                raise InputError(f"arch.{section} is not that of the {name} in {out}: choose another `out`")
    if cfg.init:  # a training state in `out`, where there is one, is resumed all the same
        states[part.name] = read_part(Path(cfg.init), part.name)
    data = datasets(cfg, arch["image_size"], cfg.seed)
    vocabulary = states.get("clip", {}).get("text.vocabulary")
    if part.name == "clip" and not cfg.init:
        vocabulary = compact_vocabulary(data["trained"].vocabulary())
    model = build(arch, seed=cfg.seed, vocabulary=vocabulary)
    if part.name == "clip" and model.clip is None:
        raise InputError("part=clip takes an image tower: arch.vision says its sizes")
    for name, state in states.items():
        start_from(part_of(model, name), state, f"{cfg.init if name == part.name else out}/{name}")
    return made(OBJECTIVES[part.name], model, out, data, **OmegaConf.to_container(part.objective)), data["trained"]


def start_from(module: torch.nn.Module, state: dict[str, torch.Tensor], source: str) -> None:
    """Load the weights whose shapes agree, and count those that stay random. Raises InputError if none agrees."""
    own = module.state_dict()
    fitting = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
    if not fitting:
        raise InputError(f"{source}: no weight has a shape that arch asks for")
    if left := module.load_state_dict(fitting, strict=False).missing_keys:
        print(f"{source}: {len(left)} of {len(own)} weights start at random, from {left[0]} to {left[-1]}")


def log(logger, out: Path, part: str, numbers: dict, grids: dict, step: int) -> None:
    """Write pictures to `out`/training, print a validation's numbers, and send all to W&B."""
    images = {name: to_pil(grid) for name, grid in grids.items()}
    for name, image in images.items():
        image.save(out / "training" / f"{name}_{step:07d}.png")
    if "loss" not in numbers:  # of a validation
        tqdm.write(f"{part}, step {step}: " + ", ".join(f"{k} {v:.4f}" for k, v in numbers.items()))
    if logger.active:
        import wandb

        logger.scalars(part, step, numbers | {name: wandb.Image(image) for name, image in images.items()})


if __name__ == "__main__":
    cli.run(main)
